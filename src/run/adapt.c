/* Owns the simulated slots and their counts of misses. What really lies in slots is store_slots.c's. */
#include "src/run/adapt.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/evict.h"

#include <math.h>

const int adapt_half_steps[ADAPT_N] = {1, 4, 16, 64};

/* Until something is known. */
enum { FIRST = 1 };

/* Every fourth layer is simulated, which is enough to tell policies apart, and costs a thousandth of a step; of few layers all are. */
enum { PART = 4, FEW_LAYERS = 8 };

/* Misses count half after so many steps. Another half-life has to miss 3 % less, and 8 misses: below that they take turns. */
#define FADE_STEPS 32
#define CLEARLY 0.97
#define LEAST 8

struct cache {
    double *heat; /* own: (n_keys) evict.h */
    bool *is_in;  /* own: (n_keys) */
    int n_in;
    double n_misses;
};

struct adapt {
    struct cache caches[ADAPT_N];
    uint64_t *at;  /* own: (n_keys) number of the last loan that wanted it */
    bool *is_held; /* own: (n_keys) by this loan */
    int n_experts, n_keys, n_slots, part, best;
    uint64_t n_loans, step;
};

static int open_cache(struct cache *c, int n_keys)
{
    c->heat = mem_zalloc((size_t)n_keys, sizeof *c->heat, MEM_META);
    c->is_in = mem_zalloc((size_t)n_keys, sizeof *c->is_in, MEM_META);
    if (!c->heat || !c->is_in)
        return err(ERR_NOMEM, "simulated slots of %d experts", n_keys);
    for (int key = 0; key < n_keys; key++)
        c->heat[key] = -INFINITY;
    return 0;
}

int adapt_open(int n_slots, int n_layers, int n_experts, struct adapt **out)
{
    struct adapt *a = mem_zalloc(1, sizeof *a, MEM_META);
    int rc = 0;

    *out = NULL;
    if (!a)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *a);
    a->part = n_layers < FEW_LAYERS ? 1 : PART;
    int n_sampled = (n_layers - 1) / a->part + 1;
    a->n_slots = (int)((int64_t)n_slots * n_sampled / n_layers);
    a->n_slots = a->n_slots ? a->n_slots : 1;
    a->n_experts = n_experts;
    a->n_keys = n_sampled * n_experts;
    a->best = FIRST;
    a->at = mem_zalloc((size_t)a->n_keys, sizeof *a->at, MEM_META);
    a->is_held = mem_zalloc((size_t)a->n_keys, sizeof *a->is_held, MEM_META);
    if (!a->at || !a->is_held)
        rc = err(ERR_NOMEM, "simulated slots of %d experts", a->n_keys);
    for (int i = 0; i < ADAPT_N && !rc; i++)
        rc = open_cache(&a->caches[i], a->n_keys);
    if (rc) {
        adapt_close(a);
        return rc;
    }
    *out = a;
    return 0;
}

void adapt_close(struct adapt *a)
{
    if (!a)
        return;
    for (int i = ADAPT_N - 1; i >= 0; i--) {
        mem_free(a->caches[i].is_in);
        mem_free(a->caches[i].heat);
    }
    mem_free(a->is_held);
    mem_free(a->at);
    mem_free(a);
}

/* The coldest goes, of equals the one that was not wanted for longer; -1 when all are held. */
static int coldest(const struct adapt *a, const struct cache *c)
{
    int best = -1;

    for (int key = 0; key < a->n_keys; key++) {
        if (!c->is_in[key] || a->is_held[key])
            continue;
        if (best < 0 || c->heat[key] < c->heat[best] || (c->heat[key] == c->heat[best] && a->at[key] < a->at[best]))
            best = key;
    }
    return best;
}

static void want(struct adapt *a, struct cache *c, int key)
{
    if (c->is_in[key])
        return;
    c->n_misses++;
    int gone = c->n_in < a->n_slots ? key : coldest(a, c);
    if (gone < 0) /* the sample's share of the slots is smaller than its loans */
        return;
    c->n_in += gone == key;
    c->is_in[gone] = false;
    c->is_in[key] = true;
}

static void fade(struct adapt *a, uint64_t step)
{
    for (int i = 0; i < ADAPT_N && step != a->step; i++)
        a->caches[i].n_misses *= exp2(-(double)(step - a->step) / FADE_STEPS);
    a->step = step;
}

static int choose(const struct adapt *a)
{
    int least = 0;

    for (int i = 1; i < ADAPT_N; i++)
        least = a->caches[i].n_misses < a->caches[least].n_misses ? i : least;
    double now = a->caches[a->best].n_misses, then = a->caches[least].n_misses;
    return then < CLEARLY * now && now - then > LEAST ? least : a->best;
}

int adapt_loan(struct adapt *a, uint64_t step, int layer, const int32_t *ids, int n)
{
    if (layer % a->part)
        return a->best;
    int first = layer / a->part * a->n_experts;
    fade(a, step);
    a->n_loans++;
    for (int i = 0; i < n; i++) {
        a->at[first + ids[i]] = a->n_loans;
        a->is_held[first + ids[i]] = true;
    }
    for (int k = 0; k < ADAPT_N; k++) {
        struct cache *c = &a->caches[k];
        for (int i = 0; i < n; i++)
            c->heat[first + ids[i]] = evict_heat_of(c->heat[first + ids[i]], step, adapt_half_steps[k]);
        for (int i = 0; i < n; i++)
            want(a, c, first + ids[i]);
    }
    for (int i = 0; i < n; i++)
        a->is_held[first + ids[i]] = false;
    return a->best = choose(a);
}
