/* Which slot goes next. A pure function of what is known of the slots, so that a recorded trace can be replayed.
 *
 * Loans that one layer's fair share of the slots holds are kept by heat: every use counts, half as much for
 * every so many steps that have passed since (adapt.h says how many). That lies between recency, which is best where a text keeps
 * to some experts for a while, and frequency, which is best where slots are few and the router has favourites.
 *
 * A larger loan (a chunk of a prompt, or slots for less than one token's experts a layer) walks through the model in a circle,
 * where the last use says nothing but how long it will take until the next. So what such a loan brought in is marked PASSING and
 * goes before anything else: the rarest first, of equals the newest, so that most of it stays for the next round. Layers that hold
 * more than their share give it up first, even where slots are free: then each layer finds as much, and what is missing of one can be read
 * while the one before is computed. */
#ifndef FERRY_RUN_EVICT_H
#define FERRY_RUN_EVICT_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum evict_state {
    EVICT_FREE,
    EVICT_HELD,    /* on loan, or being filled: never goes */
    EVICT_PASSING, /* brought in by a loan larger than a layer's share, and not wanted by a smaller one since */
    EVICT_KEPT,
};

struct evict_slot {
    enum evict_state state;
    uint32_t n_unwanted; /* loans of its layer so far that did not want it */
    double heat;         /* of this expert, KEPT: evict_heat_of */
    /* KEPT: number of the last loan that wanted it, which says who goes of equally warm ones; PASSING: of the one that brought it */
    uint64_t at;
};

/* Heat after one more use, in this step (they count up). It is the logarithm of the sum of 2^(step / half_steps) over all
 * uses, which orders experts now and later as their faded counts do, and needs no fading. -INFINITY: never used. */
double evict_heat_of(double heat, uint64_t step, int half_steps);

/* Has an expert of heat `warm` been wanted so much more often than one of heat `cold` that it is no accident? Their faded counts, as
 * of `step`, differ by more than three standard deviations of the difference, the counts being Poisson's: some ten uses more than
 * none. So experts that are wanted alike stay where they are. */
bool evict_is_warmer(double warm, double cold, uint64_t step, int half_steps);

/* Does a go before b? Both are KEPT or PASSING. */
bool evict_goes_before(const struct evict_slot *a, const struct evict_slot *b);

/* Index of the slot to be filled next: a free one, else by the policy above; -1 when all are held. */
int evict_choose(const struct evict_slot *slots, int n);

#ifdef __cplusplus
}
#endif
#endif
