/* The KV cache: pages of key and value rows, handed to sequences from one pool that the plan sized.
 * It knows pages and positions only; what is written in them is the devices' business (device.h, struct kv_seq).
 * Layer groups differ: a full-attention group keeps every page, a sliding-window group lets go of pages that have moved out
 * of its window. Sequences may share pages (fork): whoever writes into a shared page first gets its own copy. Recurrent layers have no
 * pages but a record of a sequence, which no step writes to: it writes another. */
#ifndef FERRY_RUN_CACHE_H
#define FERRY_RUN_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

struct cache;
struct cache_seq;

struct cache_args {
    const struct kv_shape *shape; /* copied */
    int n_seq;                    /* sequences at full length that must fit */
    int64_t n_ctx;                /* most positions of a sequence */
    int64_t chunk_tok;            /* most positions reserved at once */
    int64_t pool_tok;             /* positions that the pool holds for all sequences together; 0: n_seq full ones */
    int n_tables;                 /* sequences alive at once, those that only hold shared pages included; 0: n_seq */
    struct device
        *device; /* view, outlives the cache: pages are in its memory, if it has its own, but for groups of the host's
                              layers; NULL: the host's */
    int64_t
        dev_tok; /* so many positions of groups without windows lie there, whole segments; the host holds the others; 0: all */
    /* With dev_tok, cache_back.h: what coming back costs (0: nothing does), and bytes that come in a step, or a page, if that is more. */
    int back_steps;
    uint64_t back_bytes;
};

/* Bytes of pages that these arguments need: what the plan counts and cache_open takes; of the device's memory (or the only one there
 * is), and of the host's beside it. Pure arithmetic. */
uint64_t cache_bytes(const struct cache_args *args);
uint64_t cache_host_bytes(const struct cache_args *args);

/* The same of records of recurrent layers, beside those bytes. */
uint64_t cache_record_bytes(const struct cache_args *args);
uint64_t cache_record_host_bytes(const struct cache_args *args);

/* Take the pool: all memory is taken here, none later. Without pool_tok and n_tables it cannot run dry before n_seq sequences
 * are at their full length; with them, one sequence alone always fits. One thread at a time uses a cache and its sequences.
 * ERR_ARG, ERR_LIMIT (sizes past int32), ERR_NOMEM. */
int cache_open(const struct cache_args *args, struct cache **out);
void cache_close(struct cache *c); /* after its sequences; takes NULL */

/* An empty sequence. ERR_LIMIT when n_tables are alive (they, too, were taken at open). */
int cache_seq_make(struct cache *c, struct cache_seq **out);
void cache_seq_free(struct cache_seq *s); /* its pages go back; takes NULL */

struct cache *cache_of(const struct cache_seq *s);

/* Positions held. */
int64_t cache_len(const struct cache_seq *s);

/* Make positions [len, len + n_tok) writable: pages from the pool, a copy of a shared page. On failure nothing that is
 * held has changed. ERR_LIMIT (past n_ctx, more than chunk_tok, or more pages than are free: says the numbers), ERR_DEVICE. */
int cache_reserve(struct cache_seq *s, int64_t n_tok);

/* Are there free pages, and a record, for cache_reserve of so many? Those that a segment comes back to count. */
bool cache_has_room(const struct cache_seq *s, int64_t n_tok);

/* The pages as devices see them; views until the next call that changes the sequence. Where the host's memory has some beside a
 * device's: those in the device's, NULL for the others. */
void cache_view(const struct cache_seq *s, struct kv_seq *out);

/* Those in the host's memory beside a device's (the same memory for host and device, alloc_host), NULL for the others. true: there are some
 * of groups that have pages in both. */
bool cache_view_host(const struct cache_seq *s, struct kv_seq *out);

/* The first n_tok of the reserved positions have been written in every layer, with recurrent layers all that a step wrote or 0: they count
 * from now on, and the others are no longer reserved. Window groups let go of pages that no later position can see. */
void cache_commit(struct cache_seq *s, int64_t n_tok);

/* Forget positions from n on, and return how many are still whole: n, or less where a window group has let go of pages that position n
 * would look at, or recurrent layers have a record of another length (then everything is dropped to that length, and the caller runs those
 * tokens again): the mark's where n is beyond it, n where the mark's pages are all that it looks at, as they mostly are of the position
 * before the mark, or 0. */
int64_t cache_truncate(struct cache_seq *s, int64_t n);

/* Remember the present length, instead of one that was marked before: what position len looks at in windows is held until the
 * sequence needs those pages itself, or is cut below. Takes no pages that were not there for it. */
void cache_mark(struct cache_seq *s);

/* What cache_truncate would return; changes nothing. */
int64_t cache_whole(const struct cache_seq *s, int64_t n);

/* A new sequence that shares all pages of what is committed. ERR_LIMIT as cache_seq_make. */
int cache_fork(const struct cache_seq *s, struct cache_seq **out);

/* Pages of a group in use by anybody, and in all; for statistics and tests. */
int64_t cache_pages_used(const struct cache *c, int group);
int64_t cache_pages(const struct cache *c, int group);

/* Pages as bytes, for whoever keeps them elsewhere for a while. Groups, and the bytes of a group's page: 0, it has none. */
int cache_n_groups(const struct cache *c);
uint64_t cache_page_bytes(const struct cache *c, int group);

/* Copy the page that holds positions from slot * DEVICE_PAGE_TOK on, which the sequence holds or has reserved, to p or from there.
 * One that is written to must be this sequence's alone, as cache_reserve makes it. ERR_DEVICE. */
int cache_save_page(const struct cache_seq *s, int group, int64_t slot, void *p);
int cache_load_page(struct cache_seq *s, int group, int64_t slot, const void *p);

/* Positions for which there are free pages; where all layers have windows, what the windows let through is not bounded by it. */
int64_t cache_free_tok(const struct cache *c);
/* Can a sequence be cut to any shorter length? Not where some layers have windows, or are recurrent. */
bool cache_can_shorten(const struct cache *c);
bool cache_has_records(const struct cache *c);

#ifdef __cplusplus
}
#endif
#endif
