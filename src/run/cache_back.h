/* Segments of KV pages come back from the host's memory to the device's, where there was no room when they began: other sequences have
 * ended since, or became shorter. Results do not depend on where pages lie.
 *
 * The first of a sequence comes first, and of the sequences that cache_reserve was called for since the last step, be it for no position,
 * the one that is whole soonest. In a step back_bytes (cache_args) are sent, and computed beside. When all pages are there that no step
 * writes to, the one that is written to follows while the caller waits; whoever shares them sees them on the device from then on. Until
 * then everybody sees the host's.
 *
 * A segment begins to come when the device has room for it and for what those who run have begun there, so that none has to go for it.
 * And only after back_steps steps in a row in which somebody's pages lay in the host's memory, since a segment last had to leave: the host
 * has then computed with it for as long as the copy takes, so that whatever comes, no more than twice the least is spent. */
#ifndef FERRY_RUN_CACHE_BACK_H
#define FERRY_RUN_CACHE_BACK_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cache;
struct cache_seq;

/* What usually comes in a step: by the sixth of a millisecond that it takes at 12 GB/s the step's own copies may be later. */
#define CACHE_BACK_BYTES (UINT64_C(2) << 20)

/* Segments that had to leave the device; that came back; that were on their way in vain, because their sequence ended or somebody
 * needed the pages. What was copied for the latter two. */
struct cache_back_stats {
    uint64_t n_out, n_back, n_given_up, n_pages, bytes;
};

/* Before a step, its pages reserved. ERR_DEVICE: nothing has moved. */
int cache_back_step(struct cache *c);

/* Would a segment come back by now, were there room for it? */
bool cache_back_wants_room(const struct cache *c);

/* Has the sequence pages in the host's memory, and will they all come back when there is room? */
bool cache_back_may_come(const struct cache_seq *s);

/* Segments of it that lie in the host's memory beside a device's. */
int64_t cache_back_n_far(const struct cache_seq *s);

/* Would pages of the device become free, did it end? */
bool cache_back_frees(const struct cache_seq *s);

void cache_back_stats(const struct cache *c, struct cache_back_stats *out);

#ifdef __cplusplus
}
#endif
#endif
