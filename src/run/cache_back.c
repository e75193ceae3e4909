/* Owns the segment that is on its way back to the device: whose turn it is, what of it was sent, and when the tables say so. Leaves pools
 * and tables to cache.c. */
#include "src/run/cache_back.h"

#include "src/run/cache_in.h"

static void drop_coming(struct cache *c)
{
    struct cache_coming *w = &c->coming;

    for (int i = 0; i < w->n_to; i++)
        cache_drop_page(&c->group[w->group].pool[CACHE_NEAR], w->to[i]);
    c->stats.n_given_up++;
    *w = (struct cache_coming){.n_to = 0};
}

/* What is under way has to end before its pages are anybody else's. */
int cache_back_wait(struct cache *c)
{
    bool is_there;

    return c->coming.n_to ? c->dev->ops->brought(c->dev, true, &is_there) : 0;
}

/* Whoever runs needs the pages that a segment comes back to. */
int cache_back_leave(struct cache *c)
{
    int rc = cache_back_wait(c);

    drop_coming(c); /* after an error nothing is under way */
    c->n_waited = 0;
    return rc;
}

/* A sequence that ended, or lost positions that were sent, needs nothing that is on its way. */
void cache_back_forget(const struct cache_seq *s)
{
    struct cache_coming *w = &s->c->coming;

    if (w->seq == s && s->len < (w->first + w->n_sent) * DEVICE_PAGE_TOK)
        w->seq = NULL;
}

static bool is_segment_far(const struct cache_seq *s, int group, int64_t first)
{
    return first < s->end[group] && cache_side_of(s, group, first) == CACHE_FAR;
}

/* Segments of the host's memory; the first of them. */
static int64_t count_far(const struct cache_seq *s, int group, int64_t *first)
{
    int64_t n = 0;

    for (int64_t at = 0; at < s->end[group]; at += DEVICE_SEGMENT_PAGES)
        if (is_segment_far(s, group, at) && n++ == 0)
            *first = at;
    return n;
}

/* The segment that comes next: of the sequence that is whole soonest. false: there is none. */
static bool find_coming(struct cache *c, struct cache_coming *out)
{
    int64_t least = INT64_MAX;

    for (int i = 0; i < c->n_tables; i++)
        for (int group = 0; group < c->n_groups; group++) {
            struct cache_seq *s = &c->seqs[i];
            int64_t first = 0, n;
            if (!s->alive || s->asked != c->step || !cache_is_two_sided(&c->group[group]))
                continue;
            n = count_far(s, group, &first);
            if (n == 0 || n >= least || first * DEVICE_PAGE_TOK >= s->len)
                continue;
            least = n;
            *out = (struct cache_coming){.seq = s, .group = group, .first = first};
        }
    return least < INT64_MAX;
}

/* Pages that those who run still need for what they have begun on the device. */
static int64_t n_promised(const struct cache *c, int group)
{
    int64_t n = 0;

    for (int i = 0; i < c->n_tables; i++) {
        const struct cache_seq *s = &c->seqs[i];
        int64_t end = s->end[group];
        if (s->alive && s->asked == c->step && end % DEVICE_SEGMENT_PAGES &&
            cache_side_of(s, group, end - 1) == CACHE_NEAR)
            n += DEVICE_SEGMENT_PAGES - end % DEVICE_SEGMENT_PAGES;
    }
    return n;
}

/* Pages that just became free may still be written to by what is queued: copies of shared pages, pages that were loaded. */
static int begin_coming(struct cache *c)
{
    struct cache_coming next;

    c->wants_room = false;
    c->n_waited = find_coming(c, &next) ? c->n_waited + 1 : 0;
    if (c->n_waited <= c->back_steps)
        return 0;
    struct cache_pool *near = &c->group[next.group].pool[CACHE_NEAR];
    c->wants_room = near->n_free - n_promised(c, next.group) < DEVICE_SEGMENT_PAGES;
    if (c->wants_room)
        return 0;
    for (; next.n_to < DEVICE_SEGMENT_PAGES; next.n_to++)
        next.to[next.n_to] = cache_take_page(near);
    c->coming = next;
    return c->dev->ops->sync(c->dev);
}

/* Pages of the segment that hold nothing but committed positions: none is written to. */
static int64_t n_whole(const struct cache_coming *w)
{
    int64_t n = cache_slot_of(w->seq->len) - w->first;

    return n < DEVICE_SEGMENT_PAGES ? n : DEVICE_SEGMENT_PAGES;
}

static int send_page(struct cache *c, int64_t i)
{
    const struct cache_coming *w = &c->coming;
    uint64_t bytes = c->group[w->group].page_bytes;

    c->stats.n_pages++;
    c->stats.bytes += bytes;
    return c->dev->ops->bring(c->dev, w->to[i], w->seq->page[CACHE_FAR][w->group][w->first + i], bytes);
}

/* As many as may be on their way in a step. */
static int send_pages(struct cache *c)
{
    struct cache_coming *w = &c->coming;
    const uint64_t page_bytes = c->group[w->group].page_bytes;
    int rc = 0;

    for (uint64_t bytes = 0; w->n_sent < n_whole(w) && rc == 0; w->n_sent++) {
        if (bytes > 0 && bytes + page_bytes > c->back_bytes)
            break;
        bytes += page_bytes;
        rc = send_page(c, w->n_sent);
    }
    return rc;
}

/* Does it hold those pages of the segment, and no others? */
static bool is_of_segment(const struct cache_seq *s, const struct cache_coming *w, void *const *from)
{
    for (int64_t i = 0; i < DEVICE_SEGMENT_PAGES && w->first + i < s->c->n_slots; i++)
        if (s->page[CACHE_FAR][w->group][w->first + i] != from[i])
            return false;
    return s->alive;
}

/* The device's pages instead of the host's, for a sequence that holds n of them. */
static void swap_pages(struct cache_seq *s, const struct cache_coming *w, int n)
{
    struct cache_pool *near = &s->c->group[w->group].pool[CACHE_NEAR];

    for (int i = 0; i < n; i++) {
        cache_drop_slot(s, w->group, w->first + i);
        s->page[CACHE_NEAR][w->group][w->first + i] = w->to[i];
        near->n_ref[cache_page_number(near, w->to[i])]++;
    }
}

/* All is there: whoever holds the same pages has those on the device from now on. */
static void end_coming(struct cache *c)
{
    const struct cache_coming w = c->coming;
    void *from[DEVICE_SEGMENT_PAGES] = {NULL};
    int n = 0;

    for (; n < DEVICE_SEGMENT_PAGES && w.first + n < w.seq->end[w.group]; n++)
        from[n] = w.seq->page[CACHE_FAR][w.group][w.first + n];
    for (int i = 0; i < c->n_tables; i++)
        if (is_of_segment(&c->seqs[i], &w, from))
            swap_pages(&c->seqs[i], &w, n);
    drop_coming(c); /* its own count of the pages, and those that nobody holds */
    c->stats.n_given_up--;
    c->stats.n_back++;
}

/* Go on with what is on its way, or end it. */
static int go_on_coming(struct cache *c)
{
    struct cache_coming *w = &c->coming;
    bool is_there = false;

    if (w->seq && w->n_sent < n_whole(w))
        return send_pages(c);
    int rc = w->n_sent ? c->dev->ops->brought(c->dev, false, &is_there) : 0;
    if (rc || !(is_there || w->n_sent == 0))
        return rc;
    if (!w->seq) {
        drop_coming(c);
        return 0;
    }
    bool has_part = w->n_sent < DEVICE_SEGMENT_PAGES && w->seq->len % DEVICE_PAGE_TOK;
    rc = has_part ? send_page(c, w->n_sent) : 0;
    if (rc == 0 && has_part)
        rc = cache_back_wait(c);
    if (rc == 0)
        end_coming(c);
    return rc;
}

int cache_back_step(struct cache *c)
{
    int rc = 0;

    if (!c->back_steps || !c->bytes[CACHE_FAR])
        return 0;
    if (!c->coming.n_to)
        rc = begin_coming(c);
    if (rc == 0 && c->coming.n_to)
        rc = go_on_coming(c);
    if (rc) /* nothing is under way then, and nobody knows what lies there */
        drop_coming(c);
    c->step++;
    return rc;
}

bool cache_back_wants_room(const struct cache *c)
{
    return c->wants_room;
}

bool cache_back_may_come(const struct cache_seq *s)
{
    bool has_far = false;

    for (int group = 0; group < s->c->n_groups; group++) {
        const struct cache_group *g = &s->c->group[group];
        int64_t first;
        if (!cache_is_two_sided(g))
            continue;
        has_far = has_far || count_far(s, group, &first) > 0;
        if (s->end[group] > g->pool[CACHE_NEAR].n_pages)
            return false;
    }
    return has_far && s->c->back_steps > 0;
}

int64_t cache_back_n_far(const struct cache_seq *s)
{
    int64_t n = 0, first;

    for (int group = 0; group < s->c->n_groups; group++)
        if (cache_is_two_sided(&s->c->group[group]))
            n += count_far(s, group, &first);
    return n;
}

bool cache_back_frees(const struct cache_seq *s)
{
    for (int group = 0; group < s->c->n_groups; group++) {
        const struct cache_pool *near = &s->c->group[group].pool[CACHE_NEAR];
        for (int64_t slot = s->first[group]; slot < s->end[group] && cache_is_two_sided(&s->c->group[group]); slot++)
            if (cache_side_of(s, group, slot) == CACHE_NEAR &&
                near->n_ref[cache_page_number(near, s->page[CACHE_NEAR][group][slot])] == 1)
                return true;
    }
    return false;
}

void cache_back_stats(const struct cache *c, struct cache_back_stats *out)
{
    *out = c->stats;
}
