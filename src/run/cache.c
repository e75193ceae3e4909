/* Owns the pool of KV pages, how often each is in use, and the tables that say which page holds which positions of a
 * sequence. Leaves to others what a page holds (device.h) and how large it is (model/kv_shape.c).
 *
 * A sequence holds, of each group, a page for every position that a later one can look at, and for those reserved. Unless
 * pool_tok or n_tables say otherwise, the pool has room for n_seq sequences that hold the most they can, there are never more
 * sequences than that, and a page in two tables counts once: so it cannot run dry, and reserving fails only past n_ctx. One
 * thread at a time. */
#include "src/run/cache.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

struct group {
    uint64_t page_bytes;
    int window; /* positions; 0: all */
    int64_t n_pages;
    char *base;         /* view into cache.pool */
    int32_t *n_ref;     /* view into cache.counts: (n_pages) sequences that hold it */
    int32_t *free_page; /* view into cache.counts: (n_pages) a stack */
    int64_t n_free;
};

struct cache_seq {
    struct cache *c; /* view */
    bool alive;
    int64_t len;                      /* positions committed */
    int64_t reserved;                 /* positions from len on that may be written */
    void **page[DEVICE_MAX_GROUPS];   /* views into cache.slots: (n_slots); NULL: not held */
    int64_t first[DEVICE_MAX_GROUPS]; /* slots [first, end) are held, all others NULL */
    int64_t end[DEVICE_MAX_GROUPS];
};

struct cache {
    int n_groups, n_tables;
    int64_t n_ctx, chunk_tok;
    int64_t n_slots; /* pages that n_ctx positions have */
    struct group group[DEVICE_MAX_GROUPS];
    struct device *dev; /* view; NULL: the pool is host memory */
    char *pool;         /* own: (pool_bytes) */
    uint64_t pool_bytes;
    struct cache_seq *seqs; /* own: (n_tables) */
    void **slots;           /* own: (n_tables, n_groups, n_slots) */
    int32_t *counts;        /* own: n_ref and free_page of every group */
};

/* The system maps whole pages: rounded here, so that what is planned is what is taken. */
#define MAP_BYTES (4 * KIB)

static int64_t slot_of(int64_t pos)
{
    return pos / DEVICE_PAGE_TOK;
}

static int64_t slots_of(int64_t n_tok)
{
    return slot_of(n_tok + DEVICE_PAGE_TOK - 1);
}

static int64_t group_pages(const struct cache_args *args, int group)
{
    const struct kv_pool pool = {args->n_seq, args->n_ctx, args->chunk_tok, args->pool_tok};
    return model_kv_pool_pages(args->shape, group, &pool);
}

static int tables_of(const struct cache_args *args)
{
    return args->n_tables ? args->n_tables : args->n_seq;
}

uint64_t cache_bytes(const struct cache_args *args)
{
    uint64_t sum = 0, bytes;

    for (int group = 0; group < args->shape->n_groups; group++)
        if (!size_mul((uint64_t)group_pages(args, group), args->shape->page_bytes[group], &bytes) ||
            !size_add(sum, bytes, &sum))
            return UINT64_MAX;
    return size_align(sum, MAP_BYTES, &sum) ? sum : UINT64_MAX;
}

static int check_args(const struct cache_args *args)
{
    if (args->n_seq < 1 || args->n_ctx < 1 || args->chunk_tok < 1 || args->pool_tok < 0 ||
        tables_of(args) < args->n_seq)
        return err(ERR_ARG,
                   "KV cache of %d sequences, %" PRId64 " positions, chunks of %" PRId64 ": each must be at least 1",
                   args->n_seq, args->n_ctx, args->chunk_tok);
    /* Positions are int32 (device.h), and so are page numbers here. */
    if (args->n_ctx > INT32_MAX || tables_of(args) > INT32_MAX / slots_of(args->n_ctx))
        return err(ERR_LIMIT, "KV cache of %d sequences of %" PRId64 " positions: more pages than can be counted",
                   args->n_seq, args->n_ctx);
    return 0;
}

static void lay_out(struct cache *c, const struct cache_args *args)
{
    char *base = c->pool;
    int32_t *counts = c->counts;

    for (int group = 0; group < c->n_groups; group++) {
        struct group *g = &c->group[group];
        g->page_bytes = args->shape->page_bytes[group];
        g->window = args->shape->window[group];
        g->n_pages = group_pages(args, group);
        g->base = base;
        g->n_ref = counts;
        g->free_page = counts + g->n_pages;
        g->n_free = g->n_pages;
        for (int64_t i = 0; i < g->n_pages; i++)
            g->free_page[i] = (int32_t)(g->n_pages - 1 - i); /* the first page is on top */
        base += (uint64_t)g->n_pages * g->page_bytes;
        counts += 2 * g->n_pages;
    }
    for (int i = 0; i < c->n_tables; i++) {
        c->seqs[i].c = c;
        for (int group = 0; group < c->n_groups; group++)
            c->seqs[i].page[group] = c->slots + ((int64_t)i * c->n_groups + group) * c->n_slots;
    }
}

/* The pool, in the device's memory where it has its own. */
static int take_pool(struct cache *c)
{
    void *pool = NULL;
    int rc = 0;

    if (c->dev)
        rc = c->dev->ops->alloc(c->dev, c->pool_bytes, &pool);
    else if (!(pool = mem_map(c->pool_bytes, MEM_KV)))
        rc = ERR_NOMEM;
    c->pool = pool;
    return rc;
}

int cache_open(const struct cache_args *args, struct cache **out)
{
    int rc = check_args(args);

    *out = NULL;
    if (rc)
        return rc;
    struct cache *c = mem_zalloc(1, sizeof *c, MEM_META);
    if (!c)
        return err(ERR_NOMEM, "KV cache: %zu bytes", sizeof *c);
    c->n_groups = args->shape->n_groups;
    c->n_tables = tables_of(args);
    c->n_ctx = args->n_ctx;
    c->chunk_tok = args->chunk_tok;
    c->dev = args->device && args->device->ops->alloc ? args->device : NULL;
    c->n_slots = slots_of(args->n_ctx);
    c->pool_bytes = cache_bytes(args);
    int64_t n_pages = 0;
    for (int group = 0; group < c->n_groups; group++)
        n_pages += group_pages(args, group);

    /* The pool first: where it does not fit, the tables are not taken (and cleared) in vain. */
    if (take_pool(c) || !(c->seqs = mem_zalloc((size_t)c->n_tables, sizeof *c->seqs, MEM_META)) ||
        !(c->slots = mem_zalloc((size_t)(c->n_slots * c->n_groups * c->n_tables), sizeof *c->slots, MEM_META)) ||
        !(c->counts = mem_zalloc((size_t)(2 * n_pages), sizeof *c->counts, MEM_META))) {
        rc = err(ERR_NOMEM, "KV cache: %" PRIu64 " bytes for %d sequences of %" PRId64 " positions", c->pool_bytes,
                 args->n_seq, c->n_ctx);
        cache_close(c);
        return rc;
    }
    lay_out(c, args);
    *out = c;
    return 0;
}

void cache_close(struct cache *c)
{
    if (!c)
        return;
    mem_free(c->counts);
    mem_free(c->slots);
    mem_free(c->seqs);
    if (c->dev)
        c->dev->ops->release(c->dev, c->pool);
    else
        mem_unmap(c->pool, c->pool_bytes, MEM_KV);
    mem_free(c);
}

static int32_t page_number(const struct group *g, const void *page)
{
    return (int32_t)((uint64_t)((const char *)page - g->base) / g->page_bytes);
}

static void *take_page(struct group *g)
{
    assert(g->n_free > 0); /* cache_reserve counted them */
    int32_t i = g->free_page[--g->n_free];
    g->n_ref[i] = 1;
    return g->base + (uint64_t)i * g->page_bytes;
}

static void drop_page(struct group *g, void *page)
{
    int32_t i = page_number(g, page);

    if (--g->n_ref[i] == 0)
        g->free_page[g->n_free++] = i;
}

/* Hold slots [first, end) of a group and no others that were held. */
static void keep_slots(struct cache_seq *s, int group, int64_t first, int64_t end)
{
    for (int64_t slot = s->first[group]; slot < s->end[group]; slot++)
        if (slot < first || slot >= end) {
            drop_page(&s->c->group[group], s->page[group][slot]);
            s->page[group][slot] = NULL;
        }
    if (s->first[group] < first)
        s->first[group] = first;
    if (s->end[group] > end)
        s->end[group] = end;
    if (s->first[group] >= s->end[group])
        s->first[group] = s->end[group] = 0;
}

/* The first position that one at pos, or any later one, looks at: pos itself where it looks at none before it. */
static int64_t first_seen(const struct group *g, int64_t pos)
{
    return g->window && pos >= g->window ? pos - g->window + 1 : 0;
}

/* Which slots hold something that positions from len on look at. */
static void seen_slots(const struct cache_seq *s, int group, int64_t *first, int64_t *end)
{
    int64_t seen = first_seen(&s->c->group[group], s->len);

    *first = slot_of(seen);
    *end = seen < s->len ? slots_of(s->len) : 0;
}

static void keep_seen(struct cache_seq *s)
{
    s->reserved = 0;
    for (int group = 0; group < s->c->n_groups; group++) {
        int64_t first, end;
        seen_slots(s, group, &first, &end);
        keep_slots(s, group, first, end);
    }
}

int cache_seq_make(struct cache *c, struct cache_seq **out)
{
    *out = NULL;
    for (int i = 0; i < c->n_tables; i++)
        if (!c->seqs[i].alive) {
            c->seqs[i].alive = true;
            *out = &c->seqs[i];
            return 0;
        }
    return err(ERR_LIMIT, "KV cache: all %d sequences that it was made for are in use", c->n_tables);
}

void cache_seq_free(struct cache_seq *s)
{
    if (!s)
        return;
    assert(s->alive);
    s->len = 0;
    keep_seen(s);
    s->alive = false;
}

int64_t cache_len(const struct cache_seq *s)
{
    return s->len;
}

/* Only the slot that len lies in can be shared and written: those after it hold no committed position, and what is not
 * committed is never shared. */
static int own_slot(struct cache_seq *s, int group, int64_t slot)
{
    struct group *g = &s->c->group[group];
    struct device *dev = s->c->dev;
    void *shared = s->page[group][slot];
    int rc = 0;

    if (g->n_ref[page_number(g, shared)] == 1)
        return 0;
    void *mine = take_page(g);
    if (dev)
        rc = dev->ops->copy(dev, mine, shared, g->page_bytes);
    else
        memcpy(mine, shared, g->page_bytes);
    drop_page(g, rc ? mine : shared);
    if (rc == 0)
        s->page[group][slot] = mine;
    return rc;
}

/* Pages of a group that reserving positions up to slot `end` takes. */
static int64_t pages_wanted(const struct cache_seq *s, int group, int64_t end)
{
    const struct group *g = &s->c->group[group];
    int64_t first = slot_of(s->len), held_end = s->first[group] == s->end[group] ? first : s->end[group];
    bool copies = first < s->end[group] && g->n_ref[page_number(g, s->page[group][first])] > 1;

    return (end > held_end ? end - held_end : 0) + copies;
}

bool cache_has_room(const struct cache_seq *s, int64_t n_tok)
{
    for (int group = 0; group < s->c->n_groups && n_tok > 0; group++) {
        const struct group *g = &s->c->group[group];
        if (g->page_bytes && pages_wanted(s, group, slots_of(s->len + n_tok)) > g->n_free)
            return false;
    }
    return true;
}

int cache_reserve(struct cache_seq *s, int64_t n_tok)
{
    if (n_tok < 0 || n_tok > s->c->n_ctx - s->len)
        return err(ERR_LIMIT,
                   "KV cache: %" PRId64 " positions after %" PRId64 ", but a sequence holds %" PRId64 " at most", n_tok,
                   s->len, s->c->n_ctx);
    if (n_tok > s->c->chunk_tok)
        return err(ERR_LIMIT, "KV cache: %" PRId64 " positions at once, but it was made for chunks of %" PRId64, n_tok,
                   s->c->chunk_tok);
    if (!cache_has_room(s, n_tok))
        return err(ERR_LIMIT, "KV cache: no free pages for %" PRId64 " positions after %" PRId64, n_tok, s->len);
    int64_t first = slot_of(s->len), end = slots_of(s->len + n_tok);
    for (int group = 0; group < s->c->n_groups && n_tok; group++) {
        if (!s->c->group[group].page_bytes)
            continue;
        int rc = first < s->end[group] ? own_slot(s, group, first) : 0;
        if (rc)
            return rc;
        if (s->first[group] == s->end[group])
            s->first[group] = s->end[group] = first;
        for (; s->end[group] < end; s->end[group]++)
            s->page[group][s->end[group]] = take_page(&s->c->group[group]);
    }
    if (s->reserved < n_tok)
        s->reserved = n_tok;
    return 0;
}

void cache_view(const struct cache_seq *s, struct kv_seq *out)
{
    *out = (struct kv_seq){.page = {NULL}};
    for (int group = 0; group < s->c->n_groups; group++)
        out->page[group] = s->page[group];
}

void cache_commit(struct cache_seq *s, int64_t n_tok)
{
    assert(n_tok >= 0 && n_tok <= s->reserved);
    s->len += n_tok;
    keep_seen(s);
}

int64_t cache_whole(const struct cache_seq *s, int64_t n)
{
    if (n > s->len)
        n = s->len;
    if (n < 0)
        n = 0;
    /* A shorter length looks further back still, so that nothing between n and 0 can be whole where n is not. */
    for (int group = 0; group < s->c->n_groups; group++) {
        int64_t seen = first_seen(&s->c->group[group], n);
        if (s->c->group[group].page_bytes && seen < n && (slot_of(seen) < s->first[group] || s->end[group] == 0))
            n = 0;
    }
    return n;
}

int64_t cache_truncate(struct cache_seq *s, int64_t n)
{
    s->len = cache_whole(s, n);
    keep_seen(s);
    return s->len;
}

int cache_fork(const struct cache_seq *s, struct cache_seq **out)
{
    struct cache_seq *copy;
    int rc = cache_seq_make(s->c, &copy);

    *out = copy;
    if (rc)
        return rc;
    copy->len = s->len;
    for (int group = 0; group < s->c->n_groups; group++) {
        struct group *g = &s->c->group[group];
        int64_t first, end;

        seen_slots(s, group, &first, &end);
        if (!g->page_bytes || first >= end)
            continue;
        copy->first[group] = first;
        copy->end[group] = end;
        for (int64_t slot = first; slot < end; slot++) {
            copy->page[group][slot] = s->page[group][slot];
            g->n_ref[page_number(g, s->page[group][slot])]++;
        }
    }
    return 0;
}

int cache_n_groups(const struct cache *c)
{
    return c->n_groups;
}

uint64_t cache_page_bytes(const struct cache *c, int group)
{
    return c->group[group].page_bytes;
}

int cache_save_page(const struct cache_seq *s, int group, int64_t slot, void *p)
{
    const struct device *dev = s->c->dev;
    uint64_t n_bytes = s->c->group[group].page_bytes;

    if (dev)
        return dev->ops->download(s->c->dev, p, s->page[group][slot], n_bytes);
    memcpy(p, s->page[group][slot], n_bytes);
    return 0;
}

int cache_load_page(struct cache_seq *s, int group, int64_t slot, const void *p)
{
    uint64_t n_bytes = s->c->group[group].page_bytes;

    if (s->c->dev)
        return s->c->dev->ops->upload(s->c->dev, s->page[group][slot], p, n_bytes);
    memcpy(s->page[group][slot], p, n_bytes);
    return 0;
}

int64_t cache_pages_used(const struct cache *c, int group)
{
    return c->group[group].n_pages - c->group[group].n_free;
}

int64_t cache_pages(const struct cache *c, int group)
{
    return c->group[group].n_pages;
}

int64_t cache_free_tok(const struct cache *c)
{
    return c->group[0].page_bytes ? c->group[0].n_free * DEVICE_PAGE_TOK : c->n_ctx;
}

bool cache_has_windows(const struct cache *c)
{
    return c->n_groups > 1;
}
