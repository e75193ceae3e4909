/* Owns the policy of the expert slots; the slots themselves are store_slots.c's. */
#include "src/run/evict.h"

#include <math.h>

bool evict_goes_before(const struct evict_slot *a, const struct evict_slot *b)
{
    if (a->state != b->state)
        return a->state == EVICT_PASSING;
    if (a->state == EVICT_PASSING)
        return a->n_unwanted != b->n_unwanted ? a->n_unwanted > b->n_unwanted : a->at > b->at;
    if (a->heat != b->heat)
        return a->heat < b->heat;
    return a->at != b->at ? a->at < b->at : a->n_unwanted > b->n_unwanted;
}

double evict_heat_of(double heat, uint64_t step, int half_steps)
{
    double now = (double)step / half_steps, most = heat > now ? heat : now, least = heat > now ? now : heat;
    return most + log2(1 + exp2(least - most));
}

bool evict_is_warmer(double warm, double cold, uint64_t step, int half_steps)
{
    double now = (double)step / half_steps, a = exp2(warm - now), b = exp2(cold - now);
    return a > b && (a - b) * (a - b) > 3 * 3 * (a + b);
}

int evict_choose(const struct evict_slot *slots, int n)
{
    int best = -1;

    for (int i = 0; i < n; i++) {
        if (slots[i].state == EVICT_FREE)
            return i;
        if (slots[i].state != EVICT_HELD && (best < 0 || evict_goes_before(&slots[i], &slots[best])))
            best = i;
    }
    return best;
}
