/* What a router's favourites do to slots: which experts tokens want, how often they are found, how many different ones a
 * prompt wants. */
#include "src/plan/cost.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <math.h>

/* Bisection halves an interval of some ten units as often as doubles can tell. */
enum { N_HALVINGS = 60 };

/* Chance that a normal number is above x. */
static double normal_above(double x)
{
    return 0.5 * erfc(x * M_SQRT1_2);
}

/* The x that a normal number is below with chance p. */
static double normal_quantile(double p)
{
    double lo = -10, hi = 10;

    for (int i = 0; i < N_HALVINGS; i++) {
        double mid = 0.5 * (lo + hi);
        if (normal_above(mid) > 1 - p)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* An expert's logit is normal with its row's length for a spread, and the chosen are those above a threshold: the one that k
 * are above on average. */
int cost_router_init(int n_expert, int k, double skew, struct cost_router *out)
{
    double lo = 0, hi = 0;

    *out = (struct cost_router){.n_expert = n_expert, .k = k};
    out->chosen = mem_zalloc((size_t)n_expert, sizeof *out->chosen, MEM_META);
    if (!out->chosen)
        return err(ERR_NOMEM, "the favourites among %d experts", n_expert);
    for (int e = 0; e < n_expert; e++) {
        out->chosen[e] = exp(skew * normal_quantile((e + 0.5) / n_expert)); /* its length, so far */
        hi = fmax(hi, 10 * out->chosen[e]);
        lo = -hi;
    }
    for (int i = 0; i < N_HALVINGS; i++) {
        double mid = 0.5 * (lo + hi), sum = 0;
        for (int e = 0; e < n_expert; e++)
            sum += normal_above(mid / out->chosen[e]);
        if (sum > k)
            lo = mid;
        else
            hi = mid;
    }
    for (int e = 0; e < n_expert; e++)
        out->chosen[e] = normal_above(lo / out->chosen[e]);
    return 0;
}

void cost_router_done(struct cost_router *r)
{
    mem_free(r->chosen);
    r->chosen = NULL;
}

double cost_router_distinct(const struct cost_router *r, double n_rows)
{
    double sum = 0;

    for (int e = 0; e < r->n_expert; e++)
        sum += 1 - pow(1 - r->chosen[e], n_rows);
    return sum;
}

/* Che: an expert is there if it was wanted within the last T tokens, T being such that the slots are full. */
double cost_router_hits(const struct cost_router *r, double share)
{
    double lo = 0, hi = 1e9, sum = 0;

    if (share >= 1)
        return 1;
    for (int i = 0; i < N_HALVINGS; i++) {
        double mid = sqrt((lo + 1) * (hi + 1)) - 1; /* T is anything from 1 to millions */
        if (cost_router_distinct(r, mid) > share * r->n_expert)
            hi = mid;
        else
            lo = mid;
    }
    for (int e = 0; e < r->n_expert; e++)
        sum += r->chosen[e] * (1 - pow(1 - r->chosen[e], lo));
    return sum / r->k;
}
