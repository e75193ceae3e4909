/* What a router's favourites do to slots: which experts tokens want, how often they are found, how many different ones a
 * prompt wants. */
#include "src/plan/cost.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <math.h>

/* Bisection halves an interval of some ten units as often as doubles can tell. */
enum { N_HALVINGS = 60 };

/* Of the half-lives that the store counts uses with (run/adapt.h), the one that it comes to take where wishes do not drift. */
enum { FADE_STEPS = 64 };

/* Of a count: those that are always or never wanted have none, and still have to be told apart somehow. */
#define LEAST_VARIANCE 1e-12

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

/* A faded count of uses, half for every FADE_STEPS tokens since, is a sum of many small terms: normal, with this mean and spread. */
struct count {
    double mean, spread;
};

static struct count count_of(double chosen)
{
    const double fade = exp2(-1.0 / FADE_STEPS);
    double variance = chosen * (1 - chosen) / (1 - fade * fade);
    return (struct count){chosen / (1 - fade), sqrt(fmax(variance, LEAST_VARIANCE))};
}

/* How likely an expert's count is above the least of those that lie in slots. */
static double chance_of_slot(double chosen, double least)
{
    struct count count = count_of(chosen);
    return normal_above((least - count.mean) / count.spread);
}

double cost_router_hits(const struct cost_router *r, double share)
{
    struct count most = count_of(1), widest = count_of(0.5);
    double lo = -10 * widest.spread, hi = most.mean + 10 * widest.spread, sum = 0;

    if (share >= 1)
        return 1;
    for (int i = 0; i < N_HALVINGS; i++) {
        double mid = 0.5 * (lo + hi), n_slots = 0;
        for (int e = 0; e < r->n_expert; e++)
            n_slots += chance_of_slot(r->chosen[e], mid);
        if (n_slots > share * r->n_expert)
            lo = mid;
        else
            hi = mid;
    }
    for (int e = 0; e < r->n_expert; e++)
        sum += r->chosen[e] * chance_of_slot(r->chosen[e], hi);
    return fmin(sum / r->k, 1);
}
