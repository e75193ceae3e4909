/* Owns the choice between the CPU and a copy to the GPU, and the fit of what both cost. Measuring is run/'s. */
#include "src/plan/offload.h"

#include <math.h>
#include <string.h>

double offload_seconds(const struct offload_cost *c, double n_calls, double mib, double mib_rows)
{
    return c->call_s * n_calls + c->mib_s * mib + c->row_s * mib_rows;
}

/* ---- the choice ---- */

static bool goes_before(const struct offload_expert *a, const struct offload_expert *b)
{
    return a->rows != b->rows ? a->rows > b->rows : !a->on_disk && b->on_disk;
}

void offload_order(const struct offload_layer *layer, int *order)
{
    for (int i = 0; i < layer->n; i++) { /* by insertion: few, and stable */
        int at = i;
        for (; at > 0 && goes_before(&layer->misses[i], &layer->misses[order[at - 1]]); at--)
            order[at] = order[at - 1];
        order[at] = i;
    }
}

/* When each is done with what it was given so far. */
struct clocks {
    double host, pcie, gpu;
};

static void copy_one(const struct offload_rates *r, const struct offload_expert *e, struct clocks *t)
{
    if (!e->is_pinned)
        t->host += offload_seconds(&r->stage, 1, e->mib, 0);
    t->pcie = fmax(t->pcie, t->host) + offload_seconds(&r->copy, 1, e->mib, 0);
}

/* What is in memory: all copies are set off, then the CPU computes its own in one call, the GPU those that came in another. */
static void walk_memory(const struct offload_rates *r, const struct offload_layer *layer, const int *order,
                        int n_copies, struct clocks *t)
{
    double mib[2] = {0, 0}, mib_rows[2] = {0, 0}; /* the CPU's, copied */

    for (int i = 0; i < layer->n; i++) {
        const struct offload_expert *e = &layer->misses[order[i]];
        bool is_copied = i < n_copies;
        if (e->on_disk)
            continue;
        mib[is_copied] += e->mib;
        mib_rows[is_copied] += e->mib * e->rows;
        if (is_copied)
            copy_one(r, e, t);
    }
    if (mib[0] > 0)
        t->host += offload_seconds(&r->cpu, 1, mib[0], mib_rows[0]);
    if (mib[1] > 0)
        t->gpu = fmax(t->gpu, t->pcie) + offload_seconds(&r->gpu, 1, mib[1], mib_rows[1]);
}

/* What is not: one after the other comes from disk, and then goes either way. */
static void walk_disk(const struct offload_rates *r, const struct offload_layer *layer, const int *order, int n_copies,
                      struct clocks *t)
{
    double came = 0;

    for (int i = 0; i < layer->n; i++) {
        const struct offload_expert *e = &layer->misses[order[i]];
        if (!e->on_disk)
            continue;
        came += offload_seconds(&r->read, 1, e->mib, 0);
        t->host = fmax(t->host, came);
        if (i < n_copies) {
            copy_one(r, e, t);
            t->gpu = fmax(t->gpu, t->pcie) + offload_seconds(&r->gpu, 1, e->mib, e->mib * e->rows);
        } else {
            t->host += offload_seconds(&r->cpu, 1, e->mib, e->mib * e->rows);
        }
    }
}

void offload_walk(const struct offload_rates *r, const struct offload_layer *layer, const int *order, int n_copies,
                  struct offload_choice *out)
{
    struct clocks t = {0, 0, 0};
    double host_rows = 0;

    if (layer->hit_mib > 0)
        t.gpu = offload_seconds(&r->gpu, 1, layer->hit_mib, layer->hit_rows);
    walk_memory(r, layer, order, n_copies, &t);
    walk_disk(r, layer, order, n_copies, &t);
    for (int i = n_copies; i < layer->n; i++)
        host_rows += layer->misses[order[i]].rows;
    double rows_s = host_rows > 0 ? offload_seconds(&r->copy, 1, host_rows * layer->row_mib, 0) : 0;
    *out = (struct offload_choice){.n_copies = n_copies, .cpu_s = t.host + rows_s, .gpu_s = t.gpu};
    out->s = fmax(out->cpu_s, out->gpu_s);
}

void offload_choose(const struct offload_rates *r, const struct offload_layer *layer, const int *order,
                    struct offload_choice *out)
{
    struct offload_choice other;
    int most = layer->most_copies < layer->n ? layer->most_copies : layer->n;

    offload_walk(r, layer, order, 0, out);
    const double alone_s = out->s;
    for (int n = 1; n <= most; n++) {
        offload_walk(r, layer, order, n, &other);
        if (other.s < out->s)
            *out = other;
    }
    out->alone_s = alone_s;
}

/* ---- fitting ---- */

/* Of the prior, in observations of average size. Little, but enough to decide between costs that always came together, as bytes and
 * rows do in steps of one row. */
#define PRIOR_WEIGHT 0.1

void offload_fit_init(struct offload_fit *f, const struct offload_cost *prior)
{
    memset(f, 0, sizeof *f);
    f->prior = *prior;
}

/* Gaussian elimination of the free unknowns of a 3 x 3 system that is symmetric and positive definite in them; the others are 0, or have
 * no part in it, and keep x. */
static void solve(double a[3][3], double b[3], const bool is_free[3], double x[3])
{
    for (int i = 0; i < 3; i++) {
        for (int j = i + 1; j < 3 && is_free[i]; j++) {
            double f = is_free[j] ? a[j][i] / a[i][i] : 0;
            for (int k = i; k < 3; k++)
                a[j][k] -= f * a[i][k];
            b[j] -= f * b[i];
        }
    }
    for (int i = 2; i >= 0; i--) {
        double sum = b[i];
        for (int j = i + 1; j < 3; j++)
            sum -= is_free[j] ? a[i][j] * x[j] : 0;
        if (is_free[i])
            x[i] = sum / a[i][i];
    }
}

/* The normal equations, with the prior as observations of average size along each axis. */
static void equations(const struct offload_fit *f, const double prior[3], double a[3][3], double b[3])
{
    for (int i = 0; i < 3; i++) {
        double weight = PRIOR_WEIGHT * f->xx[i][i] / f->n;
        memcpy(a[i], f->xx[i], sizeof a[i]);
        a[i][i] += weight;
        b[i] = f->xy[i] + weight * prior[i];
    }
}

struct offload_cost offload_fit_cost(const struct offload_fit *f)
{
    const double prior[3] = {f->prior.call_s, f->prior.mib_s, f->prior.row_s};
    double a[3][3], b[3], x[3];
    bool is_free[3], is_again = f->n > 0;

    memcpy(x, prior, sizeof x);
    for (int i = 0; i < 3; i++)
        is_free[i] = f->xx[i][i] > 0; /* what was never seen is the prior's */
    while (is_again) {                /* at most once for each unknown, which is then 0 */
        is_again = false;
        equations(f, prior, a, b);
        solve(a, b, is_free, x);
        for (int i = 0; i < 3; i++) {
            if (is_free[i] && !(x[i] >= 0)) {
                x[i] = 0;
                is_free[i] = false;
                is_again = true;
            }
        }
    }
    return (struct offload_cost){x[0], x[1], x[2]};
}

void offload_fit_add(struct offload_fit *f, double mib, double mib_rows, double seconds)
{
    const double x[3] = {1, mib, mib_rows}, keep = exp2(-1.0 / OFFLOAD_HALF);
    struct offload_cost cost = offload_fit_cost(f);
    double expected = offload_seconds(&cost, 1, mib, mib_rows);

    if (expected > 0) {
        double off = seconds / expected;
        if (f->last[0] > 0)
            seconds = expected * fmin(off, OFFLOAD_JUMP * fmax(f->last[0], f->last[1]));
        f->last[0] = f->last[1];
        f->last[1] = off;
    }
    f->n = f->n * keep + 1;
    for (int i = 0; i < 3; i++) {
        f->xy[i] = f->xy[i] * keep + x[i] * seconds;
        for (int j = 0; j < 3; j++)
            f->xx[i][j] = f->xx[i][j] * keep + x[i] * x[j];
    }
}
