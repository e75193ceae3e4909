/* Between the parts of the cache: who holds which page and where it lies (cache.c), and segments that come back to the device
 * (cache_back.c). */
#ifndef FERRY_RUN_CACHE_IN_H
#define FERRY_RUN_CACHE_IN_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/device/device.h"
#include "src/run/cache.h"
#include "src/run/cache_back.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Which memory a page is in: the device's, or the host's beside it. A device without memory of its own has all in the first. */
enum cache_side { CACHE_NEAR, CACHE_FAR, CACHE_N_SIDES };

struct cache_pool {
    int64_t n_pages;
    uint64_t page_bytes;
    char *base;         /* view into cache.memory */
    int32_t *n_ref;     /* view into cache.counts: (n_pages) sequences that hold it */
    int32_t *free_page; /* view into cache.counts: (n_pages) a stack */
    int64_t n_free;
};

/* A sequence's records: of its length, of the length that the step gives it, of its mark. */
enum cache_record { CACHE_NOW, CACHE_NEXT, CACHE_MARKED, CACHE_N_RECORDS };
enum { CACHE_NO_RECORD = -1 };

/* Record number i lies at memory[side] + i * bytes[side], on each side that has recurrent layers. */
struct cache_records {
    int32_t n;                     /* 0: there are no such layers */
    uint64_t bytes[CACHE_N_SIDES]; /* of a record */
    char *memory[CACHE_N_SIDES];   /* view into cache.memory, behind the pages; NULL: no such layers there */
    int32_t *n_ref;                /* own: (n) how many hold it */
    int32_t *free_record;          /* view, behind n_ref: (n) a stack */
    int32_t n_free;
};

struct cache_group {
    uint64_t page_bytes;
    int window;         /* positions; 0: all */
    int64_t most_slots; /* that one sequence needs to hold */
    struct cache_pool
        pool[CACHE_N_SIDES]; /* CACHE_FAR: no pages where the device holds all; CACHE_NEAR: none where the host does */
};

struct cache_seq {
    struct cache *c; /* view */
    bool alive;
    int64_t len;      /* positions committed */
    int64_t reserved; /* positions from len on that may be written */
    uint64_t asked;   /* the step before which somebody last reserved for it */
    void **page[CACHE_N_SIDES]
               [DEVICE_MAX_GROUPS];   /* views into cache.slots: (n_slots); a slot that is held has one, on one side */
    int64_t first[DEVICE_MAX_GROUPS]; /* slots [first, end) are held, and those of the mark; all others NULL */
    int64_t end[DEVICE_MAX_GROUPS];
    int32_t record[CACHE_N_RECORDS]; /* numbers; CACHE_NO_RECORD */
    int64_t mark;                    /* a length to come back to; 0: none. Window groups hold what it looks at */
};

/* A segment on its way to the device. The sequence sees it in the host's memory until all of it is there. */
struct cache_coming {
    struct cache_seq *seq; /* view; NULL: given up */
    int group;
    int64_t first, n_sent;          /* its first slot; the pages that were sent: nobody writes to them */
    void *to[DEVICE_SEGMENT_PAGES]; /* taken from the near pool, view; (n_to) */
    int n_to;                       /* 0: nothing is on its way */
};

struct cache {
    int n_groups, n_tables;
    int64_t n_ctx, chunk_tok;
    int64_t n_slots; /* pages that n_ctx positions have */
    struct cache_group group[DEVICE_MAX_GROUPS];
    struct cache_records records;
    struct device *dev;            /* view; NULL: the near pool is host memory */
    char *memory[CACHE_N_SIDES];   /* own: (bytes); CACHE_FAR: alloc_host, NULL without one */
    uint64_t bytes[CACHE_N_SIDES]; /* of pages; CACHE_FAR: 0: the device holds all */
    uint64_t near_bytes;           /* of memory[CACHE_NEAR] */
    struct cache_seq *seqs;        /* own: (n_tables) */
    void **slots;                  /* own: (n_tables, sides, n_groups, n_slots) */
    int32_t *counts;               /* own: n_ref and free_page of every pool */
    uint64_t step;                 /* number of the next */
    int back_steps;                /* cache_args; so is back_bytes */
    uint64_t back_bytes;
    int n_waited; /* steps in a row in which somebody's pages lay in the host's memory, since a segment had to leave */
    bool wants_room;
    struct cache_coming coming;
    struct cache_back_stats stats;
};

/* Do its pages lie in both memories? */
static inline bool cache_is_two_sided(const struct cache_group *g)
{
    return g->pool[CACHE_NEAR].n_pages && g->pool[CACHE_FAR].n_pages;
}

static inline int64_t cache_slot_of(int64_t pos)
{
    return pos / DEVICE_PAGE_TOK;
}

static inline int64_t cache_slots_of(int64_t n_tok)
{
    return cache_slot_of(n_tok + DEVICE_PAGE_TOK - 1);
}

static inline int32_t cache_page_number(const struct cache_pool *pool, const void *page)
{
    return (int32_t)((uint64_t)((const char *)page - pool->base) / pool->page_bytes);
}

static inline void *cache_take_page(struct cache_pool *pool)
{
    assert(pool->n_free > 0); /* cache_reserve counted them */
    int32_t i = pool->free_page[--pool->n_free];
    pool->n_ref[i] = 1;
    return pool->base + (uint64_t)i * pool->page_bytes;
}

static inline void cache_drop_page(struct cache_pool *pool, void *page)
{
    int32_t i = cache_page_number(pool, page);

    if (--pool->n_ref[i] == 0)
        pool->free_page[pool->n_free++] = i;
}

/* Where a slot that is held lies. */
static inline enum cache_side cache_side_of(const struct cache_seq *s, int group, int64_t slot)
{
    return s->page[CACHE_FAR][group] && s->page[CACHE_FAR][group][slot] ? CACHE_FAR : CACHE_NEAR;
}

static inline void cache_drop_slot(struct cache_seq *s, int group, int64_t slot)
{
    enum cache_side side = cache_side_of(s, group, slot);

    cache_drop_page(&s->c->group[group].pool[side], s->page[side][group][slot]);
    s->page[side][group][slot] = NULL;
}

/* cache_record.c, for cache.c, all without an effect where there are no recurrent layers. init: with all memory there; ERR_NOMEM. commit:
 * with what the step wrote, or not. go_back: to the mark's length, or 0, before len changes. */
int cache_record_init(struct cache *c, const struct cache_args *args);
void cache_record_done(struct cache *c);
void cache_record_begin(struct cache_seq *s);
void cache_record_end(struct cache_seq *s);
bool cache_record_has_room(const struct cache_seq *s);
void cache_record_reserve(struct cache_seq *s);
void cache_record_commit(struct cache_seq *s, bool counts);
void cache_record_mark(struct cache_seq *s);
void cache_record_unmark(struct cache_seq *s);
void cache_record_go_back(struct cache_seq *s, int64_t n);
void cache_record_fork(const struct cache_seq *s, struct cache_seq *copy);
void cache_record_view(const struct cache_seq *s, enum cache_side side, struct kv_seq *out);

/* For cache.c. Wait for what is on its way; ERR_DEVICE. Give it up, because its pages are needed (there is one): as above. A sequence has
 * become shorter, or ends: maybe nobody needs what is on its way any more. */
int cache_back_wait(struct cache *c);
int cache_back_leave(struct cache *c);
void cache_back_forget(const struct cache_seq *s);

#ifdef __cplusplus
}
#endif
#endif
