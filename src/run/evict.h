/* Which slot goes next. A pure function of what is known of the slots, so that a recorded trace can be replayed.
 *
 * Loans that one layer's fair share of the slots holds are kept by recency: the least recently used goes, of equals the one
 * used less often. A larger loan (a chunk of a prompt, or slots for less than one token's experts a layer) walks through the
 * model in a circle, where recency always drops what is wanted next. So what such a loan brought in is marked PASSING and
 * goes before anything else: the rarest first, of equals the newest, so that most of it stays for the next round. */
#ifndef FERRY_RUN_EVICT_H
#define FERRY_RUN_EVICT_H

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
    uint32_t n_uses; /* loans that wanted this expert so far */
    uint64_t at;     /* KEPT: number of the last loan that wanted it; PASSING: of the one that brought it */
};

/* Index of the slot to be filled next: a free one, else by the policy above; -1 when all are held. */
int evict_choose(const struct evict_slot *slots, int n);

#ifdef __cplusplus
}
#endif
#endif
