/* Owns the pools of KV pages, how often each is in use, and the tables that say which page holds which positions of a
 * sequence. Leaves to others what a page holds (device.h) and how large it is (model/kv_shape.c).
 *
 * A sequence holds, of each group, a page for every position that a later one can look at, and for those reserved. Unless
 * pool_tok or n_tables say otherwise, the pool has room for n_seq sequences that hold the most they can, there are never more
 * sequences than that, and a page in two tables counts once: so it cannot run dry, and reserving fails only past n_ctx. One
 * thread at a time.
 *
 * Groups of layers that the host computes (kv_shape) lie in its memory, all others in the device's. Beside a device whose memory does not
 * hold all of those (dev_tok) a group without windows has two pools. A segment of positions, which
 * attention folds as one, lies in one of them: the device's as long as a whole segment is free there when it begins, then the
 * host's. Where sequences have taken what a begun one would need, it moves to the host; when there is room again, one after the other comes
 * back. */
#include "src/run/cache.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/run/cache_in.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

/* The system maps whole pages: rounded here, so that what is planned is what is taken. */
#define MAP_BYTES (4 * KIB)

static int64_t group_pages(const struct cache_args *args, int group, enum cache_side side)
{
    const struct kv_pool pool = {.n_seq = args->n_seq,
                                 .n_ctx = args->n_ctx,
                                 .chunk_tok = args->chunk_tok,
                                 .pool_tok = args->pool_tok,
                                 .dev_tok = args->dev_tok};
    return side == CACHE_NEAR ? model_kv_dev_pages(args->shape, group, &pool)
                              : model_kv_host_pages(args->shape, group, &pool);
}

static int tables_of(const struct cache_args *args)
{
    return args->n_tables ? args->n_tables : args->n_seq;
}

static uint64_t side_bytes(const struct cache_args *args, enum cache_side side)
{
    uint64_t sum = 0, bytes;

    for (int group = 0; group < args->shape->n_groups; group++)
        if (!size_mul((uint64_t)group_pages(args, group, side), args->shape->page_bytes[group], &bytes) ||
            !size_add(sum, bytes, &sum))
            return UINT64_MAX;
    return size_align(sum, MAP_BYTES, &sum) ? sum : UINT64_MAX;
}

uint64_t cache_bytes(const struct cache_args *args)
{
    return side_bytes(args, CACHE_NEAR);
}

uint64_t cache_host_bytes(const struct cache_args *args)
{
    return side_bytes(args, CACHE_FAR);
}

static int check_args(const struct cache_args *args)
{
    if (args->n_seq < 1 || args->n_ctx < 1 || args->chunk_tok < 1 || args->pool_tok < 0 ||
        tables_of(args) < args->n_seq)
        return err(ERR_ARG,
                   "KV cache of %d sequences, %" PRId64 " positions, chunks of %" PRId64 ": each must be at least 1",
                   args->n_seq, args->n_ctx, args->chunk_tok);
    if (args->dev_tok < 0 || args->dev_tok % DEVICE_ATTN_SEGMENT_TOK ||
        (args->dev_tok && !(args->device && args->device->ops->alloc)))
        return err(ERR_ARG,
                   "KV cache of which a device holds %" PRId64 " positions: segments of %d, of a device with memory",
                   args->dev_tok, DEVICE_ATTN_SEGMENT_TOK);
    /* Positions are int32 (device.h), and so are page numbers here. */
    if (args->n_ctx > INT32_MAX || tables_of(args) > INT32_MAX / cache_slots_of(args->n_ctx))
        return err(ERR_LIMIT, "KV cache of %d sequences of %" PRId64 " positions: more pages than can be counted",
                   args->n_seq, args->n_ctx);
    return 0;
}

static void lay_out_pool(struct cache_pool *pool, char **base, int32_t **counts)
{
    pool->base = *base;
    pool->n_ref = *counts;
    pool->free_page = *counts + pool->n_pages;
    pool->n_free = pool->n_pages;
    for (int64_t i = 0; i < pool->n_pages; i++)
        pool->free_page[i] = (int32_t)(pool->n_pages - 1 - i); /* the first page is on top */
    *base += (uint64_t)pool->n_pages * pool->page_bytes;
    *counts += 2 * pool->n_pages;
}

static int n_sides(const struct cache *c)
{
    return c->bytes[CACHE_FAR] ? CACHE_N_SIDES : 1;
}

static void lay_out(struct cache *c)
{
    int32_t *counts = c->counts;
    void **slots = c->slots;

    for (int side = 0; side < n_sides(c); side++) {
        char *base = c->memory[side];
        for (int group = 0; group < c->n_groups; group++)
            lay_out_pool(&c->group[group].pool[side], &base, &counts);
    }
    for (int i = 0; i < c->n_tables; i++) {
        c->seqs[i].c = c;
        for (int side = 0; side < n_sides(c); side++)
            for (int group = 0; group < c->n_groups; group++, slots += c->n_slots)
                c->seqs[i].page[side][group] = slots;
    }
}

/* The pools and records, near ones in the device's memory where it has its own. */
static int take_memory(struct cache *c, const struct cache_args *args)
{
    uint64_t host_bytes;
    void *near = NULL, *far = NULL;
    int rc = 0;

    if (!size_add(c->bytes[CACHE_NEAR], cache_record_bytes(args), &c->near_bytes) ||
        !size_add(c->bytes[CACHE_FAR], cache_record_host_bytes(args), &host_bytes))
        return ERR_NOMEM;
    if (c->dev)
        rc = c->dev->ops->alloc(c->dev, c->near_bytes, &near);
    else if (!(near = mem_map(c->near_bytes, MEM_KV)))
        rc = ERR_NOMEM;
    c->memory[CACHE_NEAR] = near;
    if (rc == 0 && host_bytes)
        rc = c->dev->ops->alloc_host(c->dev, host_bytes, &far);
    c->memory[CACHE_FAR] = far;
    return rc;
}

/* How many pages there are; the sum of them. */
static int64_t count_pages(struct cache *c, const struct cache_args *args)
{
    int64_t n_pages = 0;

    for (int group = 0; group < c->n_groups; group++) {
        struct cache_group *g = &c->group[group];
        g->page_bytes = args->shape->page_bytes[group];
        g->window = args->shape->window[group];
        g->most_slots = model_kv_pages(args->shape, group, args->n_ctx, args->chunk_tok);
        for (int side = 0; side < CACHE_N_SIDES; side++) {
            g->pool[side].page_bytes = g->page_bytes;
            g->pool[side].n_pages = group_pages(args, group, (enum cache_side)side);
            n_pages += g->pool[side].n_pages;
        }
    }
    return n_pages;
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
    c->n_slots = cache_slots_of(args->n_ctx);
    c->step = 1; /* nobody asked before */
    c->back_steps = args->back_steps;
    c->back_bytes = args->back_bytes;
    c->bytes[CACHE_NEAR] = cache_bytes(args);
    c->bytes[CACHE_FAR] = cache_host_bytes(args);
    int64_t n_pages = count_pages(c, args), n_slots = c->n_slots * c->n_groups * c->n_tables * n_sides(c);

    /* The pools first: where they do not fit, the tables are not taken (and cleared) in vain. */
    if (take_memory(c, args) || cache_record_init(c, args) ||
        !(c->seqs = mem_zalloc((size_t)c->n_tables, sizeof *c->seqs, MEM_META)) ||
        !(c->slots = mem_zalloc((size_t)n_slots, sizeof *c->slots, MEM_META)) ||
        !(c->counts = mem_zalloc((size_t)(2 * n_pages), sizeof *c->counts, MEM_META))) {
        rc = err(ERR_NOMEM, "KV cache: %" PRIu64 " bytes for %d sequences of %" PRId64 " positions",
                 c->bytes[CACHE_NEAR] + c->bytes[CACHE_FAR] + cache_record_bytes(args) + cache_record_host_bytes(args),
                 args->n_seq, c->n_ctx);
        cache_close(c);
        return rc;
    }
    lay_out(c);
    *out = c;
    return 0;
}

void cache_close(struct cache *c)
{
    if (!c)
        return;
    cache_back_wait(c);
    mem_free(c->counts);
    mem_free(c->slots);
    mem_free(c->seqs);
    cache_record_done(c);
    if (c->memory[CACHE_FAR])
        c->dev->ops->release_host(c->dev, c->memory[CACHE_FAR]);
    if (c->dev)
        c->dev->ops->release(c->dev, c->memory[CACHE_NEAR]);
    else
        mem_unmap(c->memory[CACHE_NEAR], c->near_bytes, MEM_KV);
    mem_free(c);
}

static bool is_shared(const struct cache_seq *s, int group, int64_t slot)
{
    enum cache_side side = cache_side_of(s, group, slot);
    const struct cache_pool *pool = &s->c->group[group].pool[side];

    return pool->n_ref[cache_page_number(pool, s->page[side][group][slot])] > 1;
}

/* The first position that one at pos, or any later one, looks at: pos itself where it looks at none before it. */
static int64_t first_seen(const struct cache_group *g, int64_t pos)
{
    return g->window && pos >= g->window ? pos - g->window + 1 : 0;
}

/* Which slots hold something that positions from len on look at. */
static void seen_slots(const struct cache_group *g, int64_t len, int64_t *first, int64_t *end)
{
    int64_t seen = first_seen(g, len);

    *first = cache_slot_of(seen);
    *end = seen < len ? cache_slots_of(len) : 0;
}

/* Which of them are held for the mark, if they are no others': those of window groups. */
static void marked_slots(const struct cache_seq *s, int group, int64_t *first, int64_t *end)
{
    const struct cache_group *g = &s->c->group[group];

    *first = *end = 0;
    if (s->mark && g->window && g->page_bytes)
        seen_slots(g, s->mark, first, end);
}

/* Hold slots [first, end) of a group, and the mark's, and no others that were held. */
static void keep_slots(struct cache_seq *s, int group, int64_t first, int64_t end)
{
    int64_t mark_first, mark_end;

    marked_slots(s, group, &mark_first, &mark_end);
    for (int64_t slot = s->first[group]; slot < s->end[group]; slot++)
        if ((slot < first || slot >= end) && (slot < mark_first || slot >= mark_end))
            cache_drop_slot(s, group, slot);
    if (s->first[group] < first)
        s->first[group] = first;
    if (s->end[group] > end)
        s->end[group] = end;
    if (s->first[group] >= s->end[group])
        s->first[group] = s->end[group] = 0;
}

static void keep_seen(struct cache_seq *s)
{
    s->reserved = 0;
    cache_back_forget(s);
    for (int group = 0; group < s->c->n_groups; group++) {
        int64_t first, end;
        seen_slots(&s->c->group[group], s->len, &first, &end);
        keep_slots(s, group, first, end);
    }
}

/* ---- a length to come back to ---- */

/* Slots that are held for the mark alone. */
static int64_t n_marked(const struct cache_seq *s, int group)
{
    int64_t first, end, n = 0;

    marked_slots(s, group, &first, &end);
    for (int64_t slot = first; slot < end; slot++)
        n += slot < s->first[group] || slot >= s->end[group];
    return n;
}

static void unmark(struct cache_seq *s)
{
    for (int group = 0; group < s->c->n_groups; group++) {
        int64_t first, end;
        marked_slots(s, group, &first, &end);
        for (int64_t slot = first; slot < end; slot++)
            if (slot < s->first[group] || slot >= s->end[group])
                cache_drop_slot(s, group, slot);
    }
    cache_record_unmark(s);
    s->mark = 0;
}

void cache_mark(struct cache_seq *s)
{
    unmark(s);
    cache_record_mark(s);
    s->mark = s->len;
}

/* Hold what the mark needs of window groups, as if the sequence had never been longer. */
static void come_back(struct cache_seq *s)
{
    for (int group = 0; group < s->c->n_groups; group++) {
        int64_t first, end;
        if (!s->c->group[group].window)
            continue;
        marked_slots(s, group, &first, &end);
        keep_slots(s, group, first, end);
        s->first[group] = first;
        s->end[group] = end;
    }
}

/* No sequence holds more than its share, so that others find theirs: a mark gives way to n_tok positions more. */
static void make_way(struct cache_seq *s, int64_t n_tok)
{
    for (int group = 0; group < s->c->n_groups && s->mark; group++) {
        const int64_t first = s->first[group] < s->end[group] ? s->first[group] : cache_slot_of(s->len);
        if (cache_slots_of(s->len + n_tok) - first + n_marked(s, group) > s->c->group[group].most_slots)
            unmark(s);
    }
    if (n_tok > 0 && s->mark && !cache_record_has_room(s))
        unmark(s);
}

int cache_seq_make(struct cache *c, struct cache_seq **out)
{
    *out = NULL;
    for (int i = 0; i < c->n_tables; i++)
        if (!c->seqs[i].alive) {
            c->seqs[i].alive = true;
            cache_record_begin(&c->seqs[i]);
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
    unmark(s);
    s->len = 0;
    keep_seen(s);
    cache_record_end(s);
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
    enum cache_side side = cache_side_of(s, group, slot);
    struct cache_pool *pool = &s->c->group[group].pool[side];
    struct device *dev = s->c->dev;
    void *shared = s->page[side][group][slot];
    int rc = 0;

    if (!is_shared(s, group, slot))
        return 0;
    void *mine = cache_take_page(pool);
    if (dev && side == CACHE_NEAR)
        rc = dev->ops->copy(dev, mine, shared, pool->page_bytes);
    else
        memcpy(mine, shared, pool->page_bytes);
    cache_drop_page(pool, rc ? mine : shared);
    if (rc == 0)
        s->page[side][group][slot] = mine;
    return rc;
}

/* ---- what reserving takes of a segment ---- */

struct need {
    int64_t first, end; /* slots of the segment that are to be held; [held, end) are not yet */
    int64_t held;
    bool copies; /* one that is held is shared and will be written */
    enum cache_side side;
    bool moves; /* what is held goes to that side first */
};

/* Of the segment that begins with slot `begin`, for positions from len on up to slot `end`, where pools have so many free pages. */
static struct need need_of(const struct cache_seq *s, int group, int64_t begin, int64_t end,
                           const int64_t n_free[CACHE_N_SIDES])
{
    int64_t first = cache_slot_of(s->len), stop = begin + DEVICE_SEGMENT_PAGES;
    bool has_any = s->first[group] < s->end[group];
    struct need n = {.first = has_any && s->first[group] > begin ? s->first[group] : begin,
                     .end = end < stop ? end : stop,
                     .held = has_any ? s->end[group] : first};

    if (n.held < begin)
        n.held = begin;
    if (n.held > n.end)
        n.held = n.end;
    if (!has_any && first > begin)
        n.first = first;
    n.copies = first >= n.first && first < n.held && is_shared(s, group, first);
    if (!cache_is_two_sided(&s->c->group[group])) {
        n.side = s->c->group[group].pool[CACHE_FAR].n_pages ? CACHE_FAR : CACHE_NEAR;
        return n;
    }
    if (n.first == n.held) /* it begins */
        n.side = n_free[CACHE_NEAR] < DEVICE_SEGMENT_PAGES ? CACHE_FAR : CACHE_NEAR;
    else
        n.side = cache_side_of(s, group, n.held - 1);
    if (n.side == CACHE_NEAR && n.end - n.held + n.copies > n_free[CACHE_NEAR]) {
        n.side = CACHE_FAR;
        n.moves = n.held > n.first;
    }
    return n;
}

/* Pages that become free on the near side when what is held moves away. */
static int64_t freed_by(const struct cache_seq *s, int group, const struct need *n)
{
    int64_t n_freed = 0;

    for (int64_t slot = n->first; n->moves && slot < n->held; slot++)
        n_freed += !is_shared(s, group, slot);
    return n_freed;
}

/* What is left of free pages; below 0: it cannot be had. */
static void account(const struct cache_seq *s, int group, const struct need *n, int64_t n_free[CACHE_N_SIDES])
{
    n_free[n->side] -= n->end - n->held + (n->moves ? n->held - n->first : n->copies);
    n_free[CACHE_NEAR] += freed_by(s, group, n);
}

static int64_t segment_of(int64_t slot)
{
    return slot - slot % DEVICE_SEGMENT_PAGES;
}

/* n_coming: pages that a segment comes back to, and that count as free. */
static bool has_room(const struct cache_seq *s, int64_t n_tok, int n_coming)
{
    for (int group = 0; group < s->c->n_groups && n_tok > 0; group++) {
        const struct cache_group *g = &s->c->group[group];
        int64_t n_free[CACHE_N_SIDES] = {g->pool[CACHE_NEAR].n_free, g->pool[CACHE_FAR].n_free},
                end = cache_slots_of(s->len + n_tok);
        n_free[CACHE_NEAR] += group == s->c->coming.group ? n_coming : 0;
        for (int64_t at = segment_of(cache_slot_of(s->len)); g->page_bytes && at < end; at += DEVICE_SEGMENT_PAGES) {
            struct need n = need_of(s, group, at, end, n_free);
            account(s, group, &n, n_free);
            if (n_free[CACHE_NEAR] < 0 || n_free[CACHE_FAR] < 0)
                return false;
        }
    }
    return true;
}

bool cache_has_room(const struct cache_seq *s, int64_t n_tok)
{
    if (n_tok > 0 && !cache_record_has_room(s))
        return false;
    return has_room(s, n_tok, s->c->coming.n_to);
}

/* Slots [first, end) of a segment to the host's side, all or none. */
static int move_slots(struct cache_seq *s, int group, int64_t first, int64_t end)
{
    struct cache_group *g = &s->c->group[group];
    struct device *dev = s->c->dev;
    void *far[DEVICE_SEGMENT_PAGES];
    int rc = 0;

    for (int64_t slot = first; slot < end; slot++)
        far[slot - first] = cache_take_page(&g->pool[CACHE_FAR]);
    for (int64_t slot = first; slot < end && rc == 0; slot++)
        rc = dev->ops->fetch(dev, far[slot - first], s->page[CACHE_NEAR][group][slot], g->page_bytes);
    if (rc == 0)
        rc = dev->ops->fetched(dev);
    for (int64_t slot = first; slot < end; slot++) {
        if (rc == 0) {
            cache_drop_slot(s, group, slot);
            s->page[CACHE_FAR][group][slot] = far[slot - first];
        } else {
            cache_drop_page(&g->pool[CACHE_FAR], far[slot - first]);
        }
    }
    s->c->stats.n_out += rc == 0;
    s->c->n_waited = 0;
    return rc;
}

static int reserve_segment(struct cache_seq *s, int group, int64_t begin, int64_t end)
{
    struct cache_group *g = &s->c->group[group];
    const int64_t n_free[CACHE_N_SIDES] = {g->pool[CACHE_NEAR].n_free, g->pool[CACHE_FAR].n_free};
    struct need n = need_of(s, group, begin, end, n_free);
    if (n.moves && s->c->coming.n_to) { /* who is there goes before who comes */
        int rc = cache_back_leave(s->c);
        return rc ? rc : reserve_segment(s, group, begin, end);
    }
    int rc = n.moves ? move_slots(s, group, n.first, n.held) : n.copies ? own_slot(s, group, cache_slot_of(s->len)) : 0;

    if (rc)
        return rc;
    if (s->first[group] == s->end[group])
        s->first[group] = s->end[group] = n.held;
    for (; s->end[group] < n.end; s->end[group]++)
        s->page[n.side][group][s->end[group]] = cache_take_page(&g->pool[n.side]);
    return 0;
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
    make_way(s, n_tok);
    if (!cache_has_room(s, n_tok))
        return err(ERR_LIMIT, "KV cache: no free %s for %" PRId64 " positions after %" PRId64,
                   cache_record_has_room(s) ? "pages" : "record", n_tok, s->len);
    int rc = has_room(s, n_tok, 0) ? 0 : cache_back_leave(s->c);
    if (rc)
        return rc;
    s->asked = s->c->step;
    int64_t first = cache_slot_of(s->len), end = cache_slots_of(s->len + n_tok);
    for (int group = 0; group < s->c->n_groups && n_tok; group++)
        for (int64_t at = segment_of(first); s->c->group[group].page_bytes && at < end; at += DEVICE_SEGMENT_PAGES) {
            rc = reserve_segment(s, group, at, end);
            if (rc)
                return rc;
        }
    if (n_tok)
        cache_record_reserve(s);
    if (s->reserved < n_tok)
        s->reserved = n_tok;
    return 0;
}

struct cache *cache_of(const struct cache_seq *s)
{
    return s->c;
}

void cache_view(const struct cache_seq *s, struct kv_seq *out)
{
    *out = (struct kv_seq){.page = {NULL}};
    for (int group = 0; group < s->c->n_groups; group++)
        if (s->c->group[group].pool[CACHE_NEAR].n_pages)
            out->page[group] = s->page[CACHE_NEAR][group];
    cache_record_view(s, CACHE_NEAR, out);
}

bool cache_view_host(const struct cache_seq *s, struct kv_seq *out)
{
    bool has_any = false;

    *out = (struct kv_seq){.page = {NULL}};
    cache_record_view(s, CACHE_FAR, out);
    for (int group = 0; group < s->c->n_groups && s->c->bytes[CACHE_FAR]; group++) {
        out->page[group] = s->page[CACHE_FAR][group];
        bool may_have = cache_is_two_sided(&s->c->group[group]);
        for (int64_t slot = s->first[group]; slot < s->end[group] && may_have && !has_any; slot++)
            has_any = cache_side_of(s, group, slot) == CACHE_FAR;
    }
    return has_any;
}

void cache_commit(struct cache_seq *s, int64_t n_tok)
{
    assert(n_tok >= 0 && n_tok <= s->reserved);
    cache_record_commit(s, n_tok > 0);
    s->len += n_tok;
    keep_seen(s);
}

/* Is all there that position n looks at, where window groups hold slots [first, end), and the record is of len? Of full ones all is. */
static bool is_whole(const struct cache_seq *s, const int64_t *first, const int64_t *end, int64_t len, int64_t n)
{
    if (cache_has_records(s->c) && n > 0 && n != len)
        return false;
    /* A shorter length looks further back still, so that nothing between n and 0 can be whole where n is not. */
    for (int group = 0; group < s->c->n_groups; group++) {
        const struct cache_group *g = &s->c->group[group];
        int64_t seen = first_seen(g, n);
        if (g->window && g->page_bytes && seen < n && (cache_slot_of(seen) < first[group] || end[group] == 0))
            return false;
    }
    return true;
}

int64_t cache_whole(const struct cache_seq *s, int64_t n)
{
    if (n > s->len)
        n = s->len;
    if (n < 0)
        n = 0;
    if (is_whole(s, s->first, s->end, s->len, n))
        return n;
    int64_t first[DEVICE_MAX_GROUPS], end[DEVICE_MAX_GROUPS];
    for (int group = 0; group < s->c->n_groups; group++)
        marked_slots(s, group, &first[group], &end[group]);
    n = n < s->mark ? n : s->mark;
    return is_whole(s, first, end, s->mark, n) ? n : 0;
}

int64_t cache_truncate(struct cache_seq *s, int64_t n)
{
    const int64_t whole = cache_whole(s, n);

    if (!is_whole(s, s->first, s->end, s->len, whole))
        come_back(s);
    cache_record_go_back(s, whole);
    if (whole < s->mark)
        unmark(s);
    s->len = whole;
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
    cache_record_fork(s, copy);
    for (int group = 0; group < s->c->n_groups; group++) {
        struct cache_group *g = &s->c->group[group];
        int64_t first, end;

        seen_slots(g, s->len, &first, &end);
        if (!g->page_bytes || first >= end)
            continue;
        copy->first[group] = first;
        copy->end[group] = end;
        for (int64_t slot = first; slot < end; slot++) {
            enum cache_side side = cache_side_of(s, group, slot);
            copy->page[side][group][slot] = s->page[side][group][slot];
            g->pool[side].n_ref[cache_page_number(&g->pool[side], s->page[side][group][slot])]++;
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
    enum cache_side side = cache_side_of(s, group, slot);
    uint64_t n_bytes = s->c->group[group].page_bytes;

    if (s->c->dev && side == CACHE_NEAR)
        return s->c->dev->ops->download(s->c->dev, p, s->page[side][group][slot], n_bytes);
    memcpy(p, s->page[side][group][slot], n_bytes);
    return 0;
}

int cache_load_page(struct cache_seq *s, int group, int64_t slot, const void *p)
{
    enum cache_side side = cache_side_of(s, group, slot);
    uint64_t n_bytes = s->c->group[group].page_bytes;

    if (s->c->dev && side == CACHE_NEAR)
        return s->c->dev->ops->upload(s->c->dev, s->page[side][group][slot], p, n_bytes);
    memcpy(s->page[side][group][slot], p, n_bytes);
    return 0;
}

static int64_t free_pages(const struct cache_group *g)
{
    return g->pool[CACHE_NEAR].n_free + g->pool[CACHE_FAR].n_free;
}

int64_t cache_pages(const struct cache *c, int group)
{
    return c->group[group].pool[CACHE_NEAR].n_pages + c->group[group].pool[CACHE_FAR].n_pages;
}

int64_t cache_pages_used(const struct cache *c, int group)
{
    return cache_pages(c, group) - free_pages(&c->group[group]);
}

int64_t cache_free_tok(const struct cache *c)
{
    int64_t least = -1;

    for (int group = 0; group < c->n_groups; group++) {
        const struct cache_group *g = &c->group[group];
        int64_t n = free_pages(g) * DEVICE_PAGE_TOK;
        if (g->page_bytes && !g->window && (least < 0 || n < least))
            least = n;
    }
    return least < 0 ? c->n_ctx : least;
}

bool cache_has_records(const struct cache *c)
{
    return c->records.n > 0;
}

bool cache_can_shorten(const struct cache *c)
{
    bool can = !cache_has_records(c);

    for (int group = 0; group < c->n_groups; group++)
        can = can && c->group[group].window == 0;
    return can;
}
