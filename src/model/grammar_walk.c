/* States and contexts of a walk, made when they are first come to. A context is the set of places where a text goes on when the rule has
 * ended; calls at a rule's end hand their caller's on, so that lists which call themselves at their end take no room. Rules that may be
 * empty are passed by as well as called; an end that is come to within a call without a byte is then known already, and left out. */
#include "src/model/grammar_walk.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"

/* Between two draws states are forgotten that take more than FIRST_BYTES, the next time twice that, and so on: whoever needs more than
 * there is room for would walk his text again each time. MOST_BYTES is the most that they may take, half of it between draws. A state of a
 * JSON grammar takes some 300 bytes. */
enum { FIRST_BYTES = 8 << 20, MOST_BYTES = 128 << 20, MAX_PLACES = 1 << 16 };

/* What a whole text's rule goes on with: the end. As a place of a state it says that the state accepts. */
#define WHOLE GRAMMAR_NONE

/* The set of nothing: as a state it is GRAMMAR_WALK_DEAD, as a context what comes behind WHOLE. */
#define NOTHING 0

static bool grow(void *p, uint64_t n, uint32_t *cap, size_t item_bytes)
{
    void *now;

    if (n <= *cap && *cap)
        return true;
    uint64_t more = *cap ? *cap : 64;
    while (more < n)
        more *= 2;
    memcpy(&now, p, sizeof now);
    now = more <= UINT32_MAX ? mem_realloc(now, more * item_bytes, MEM_OTHER) : NULL;
    if (!now)
        return false;
    memcpy(p, &now, sizeof now);
    *cap = (uint32_t)more;
    return true;
}

static uint32_t mix(uint32_t hash, uint32_t x)
{
    uint64_t z = ((uint64_t)hash << 32 | x) * UINT64_C(0x9e3779b97f4a7c15);

    return (uint32_t)(z ^ z >> 32);
}

static int no_room(void)
{
    return err(ERR_NOMEM, "states of a grammar");
}

/* ---- sets ---- */

static uint32_t n_places(const struct grammar_sets *s, uint32_t set)
{
    return s->from[set + 1] - s->from[set];
}

static uint64_t sets_bytes(const struct grammar_sets *s)
{
    return (uint64_t)s->cap * sizeof *s->from + (uint64_t)s->cap_places * sizeof *s->place +
           ((uint64_t)s->mask + 1) * sizeof *s->slot;
}

static uint64_t bytes(const struct grammar_walk *w)
{
    return sets_bytes(&w->states) + sets_bytes(&w->contexts) +
           (uint64_t)w->states.cap * (uint64_t)w->g->n_classes * sizeof *w->to;
}

static void sets_done(struct grammar_sets *s)
{
    mem_free(s->from);
    mem_free(s->place);
    mem_free(s->slot);
    *s = (struct grammar_sets){0};
}

static uint32_t hash_of(const struct grammar_place *p, uint32_t n)
{
    uint32_t hash = n;

    for (uint32_t i = 0; i < n; i++)
        hash = mix(mix(hash, p[i].node), p[i].context);
    return hash;
}

static bool is_same(const struct grammar_sets *s, uint32_t set, const struct grammar_place *p, uint32_t n)
{
    return n_places(s, set) == n && !memcmp(s->place + s->from[set], p, n * sizeof *p);
}

/* Where a set is, or would be. */
static uint32_t *slot_of(const struct grammar_sets *s, const struct grammar_place *p, uint32_t n)
{
    uint32_t at = hash_of(p, n) & s->mask;

    while (s->slot[at] != GRAMMAR_NONE && !is_same(s, s->slot[at], p, n))
        at = (at + 1) & s->mask;
    return &s->slot[at];
}

static int make_slots(struct grammar_sets *s, uint32_t n_slots)
{
    uint32_t *slot = mem_alloc(n_slots * sizeof *slot, MEM_OTHER);

    if (!slot)
        return no_room();
    memset(slot, 0xff, n_slots * sizeof *slot);
    mem_free(s->slot);
    s->slot = slot;
    s->mask = n_slots - 1;
    for (uint32_t set = 0; set < s->n; set++)
        *slot_of(s, s->place + s->from[set], n_places(s, set)) = set;
    return 0;
}

static int by_place(const void *a, const void *b)
{
    const struct grammar_place *x = a, *y = b;

    if (x->node != y->node)
        return x->node < y->node ? -1 : 1;
    return x->context < y->context ? -1 : x->context > y->context;
}

/* The number of the set of these places, which are put in order. A failure changes nothing. */
static int number_of(struct grammar_sets *s, struct grammar_place *p, uint32_t n, uint32_t *out)
{
    uint32_t n_own = 0;

    qsort(p, n, sizeof *p, by_place);
    for (uint32_t i = 0; i < n; i++)
        if (!n_own || by_place(&p[i], &p[n_own - 1]))
            p[n_own++] = p[i];
    if (s->n) {
        *out = *slot_of(s, p, n_own);
        if (*out != GRAMMAR_NONE)
            return 0;
    }
    if (!grow(&s->from, (uint64_t)s->n + 2, &s->cap, sizeof *s->from))
        return no_room();
    if (s->n == 0)
        s->from[0] = 0;
    if (!grow(&s->place, (uint64_t)s->from[s->n] + n_own, &s->cap_places, sizeof *s->place))
        return no_room();
    if (!s->slot || 2 * s->n > s->mask) {
        int rc = make_slots(s, s->slot ? 2 * (s->mask + 1) : 64);
        if (rc)
            return rc;
    }
    memcpy(s->place + s->from[s->n], p, n_own * sizeof *p);
    s->from[s->n + 1] = s->from[s->n] + n_own;
    *slot_of(s, p, n_own) = s->n;
    *out = s->n++;
    return 0;
}

/* ---- making a state ---- */

/* Where a place is among those to be looked at, or would be. */
static uint32_t slot_of_place(const struct grammar_walk *w, struct grammar_place p)
{
    uint32_t at = mix(mix(0, p.node), p.context) & w->slot_mask;

    while (w->slot[at] != GRAMMAR_NONE && by_place(&w->todo[w->slot[at]].place, &p))
        at = (at + 1) & w->slot_mask;
    return at;
}

/* n_slots: a power of two. */
static int make_place_slots(struct grammar_walk *w, uint32_t n_slots)
{
    uint32_t *slot = mem_alloc(n_slots * sizeof *slot, MEM_OTHER);

    if (!slot)
        return no_room();
    memset(slot, 0xff, n_slots * sizeof *slot);
    mem_free(w->slot);
    w->slot = slot;
    w->slot_mask = n_slots - 1;
    for (uint32_t i = 0; i < w->n_todo; i++) {
        w->todo[i].next = slot_of_place(w, w->todo[i].place);
        slot[w->todo[i].next] = i;
    }
    return 0;
}

/* Look at a place, unless that was done. */
static void visit(struct grammar_walk *w, uint32_t node, uint32_t context)
{
    const struct grammar_place p = {node, context};

    if (w->rc || w->slot[slot_of_place(w, p)] != GRAMMAR_NONE)
        return;
    if (w->n_todo == MAX_PLACES)
        w->rc = err(ERR_LIMIT, "the grammar is too ambiguous: a text is in more than %d places at once", MAX_PLACES);
    else if (!grow(&w->todo, (uint64_t)w->n_todo + 1, &w->cap_todo, sizeof *w->todo))
        w->rc = no_room();
    else if (2 * w->n_todo > w->slot_mask)
        w->rc = make_place_slots(w, 2 * (w->slot_mask + 1));
    if (w->rc)
        return;
    uint32_t at = slot_of_place(w, p);
    w->todo[w->n_todo] = (struct grammar_todo){p, at};
    w->slot[at] = w->n_todo++;
}

static void push_rank(struct grammar_walk *w, uint32_t rank)
{
    if (!grow(&w->rank, (uint64_t)w->n_rank + 1, &w->cap_rank, sizeof *w->rank)) {
        w->rc = no_room();
        return;
    }
    uint32_t at = w->n_rank++;
    for (; at > 0 && w->rank[(at - 1) / 2] > rank; at = (at - 1) / 2)
        w->rank[at] = w->rank[(at - 1) / 2];
    w->rank[at] = rank;
}

static uint32_t pop_rank(struct grammar_walk *w)
{
    uint32_t least = w->rank[0], last = w->rank[--w->n_rank], at = 0;

    for (uint32_t child = 1; child < w->n_rank; child = 2 * at + 1) {
        child += child + 1 < w->n_rank && w->rank[child + 1] < w->rank[child];
        if (w->rank[child] >= last)
            break;
        w->rank[at] = w->rank[child];
        at = child;
    }
    w->rank[at] = last;
    return least;
}

/* A rule is called, and goes on at a place when it has ended. */
static void call(struct grammar_walk *w, uint32_t rule, uint32_t node, uint32_t context)
{
    if (w->rc)
        return;
    if (w->n_behind == MAX_PLACES)
        w->rc = err(ERR_LIMIT, "the grammar is too ambiguous: a text is in more than %d rules at once", MAX_PLACES);
    else if (!grow(&w->behind, (uint64_t)w->n_behind + 1, &w->cap_behind, sizeof *w->behind))
        w->rc = no_room();
    else if (w->first_behind[rule] == GRAMMAR_NONE)
        push_rank(w, w->g->rule[rule].rank);
    if (w->rc)
        return;
    w->behind[w->n_behind] = (struct grammar_todo){{node, context}, w->first_behind[rule]};
    w->first_behind[rule] = w->n_behind++;
}

static void call_from(struct grammar_walk *w, const struct grammar_node *node, uint32_t context)
{
    const struct grammar_sets *c = &w->contexts;

    if (w->g->node[node->next].kind != GRAMMAR_END) {
        call(w, node->other, node->next, context);
        return;
    }
    for (uint32_t i = c->from[context]; i < c->from[context + 1]; i++)
        call(w, node->other, c->place[i].node, c->place[i].context);
}

/* The rule of a place has ended. */
static void leave(struct grammar_walk *w, uint32_t context)
{
    const struct grammar_sets *c = &w->contexts;

    for (uint32_t i = c->from[context]; i < c->from[context + 1]; i++) {
        if (c->place[i].node == WHOLE)
            w->accepts = true;
        else
            visit(w, c->place[i].node, c->place[i].context);
    }
}

/* Look at all places from number `at` on, and what they lead to without a byte. has_read: since the rule was called. */
static void follow(struct grammar_walk *w, uint32_t at, bool has_read)
{
    for (; at < w->n_todo && !w->rc; at++) {
        struct grammar_place p = w->todo[at].place;
        const struct grammar_node *node = &w->g->node[p.node];
        if (node->kind == GRAMMAR_CALL)
            call_from(w, node, p.context);
        if (node->kind == GRAMMAR_FORK || (node->kind == GRAMMAR_CALL && w->g->rule[node->other].is_nullable))
            visit(w, node->next, p.context);
        if (node->kind == GRAMMAR_FORK)
            visit(w, node->other, p.context);
        if (node->kind == GRAMMAR_END && has_read)
            leave(w, p.context);
    }
}

/* All that goes on behind a rule, as a context. */
static int context_of(struct grammar_walk *w, uint32_t rule, uint32_t *out)
{
    uint32_t n = 0, first = w->first_behind[rule];

    w->first_behind[rule] = GRAMMAR_NONE;
    for (uint32_t i = first; i != GRAMMAR_NONE; i = w->behind[i].next)
        n++;
    if (!grow(&w->sorted, n, &w->cap_sorted, sizeof *w->sorted))
        return no_room();
    n = 0;
    for (uint32_t i = first; i != GRAMMAR_NONE; i = w->behind[i].next)
        w->sorted[n++] = w->behind[i].place;
    return number_of(&w->contexts, w->sorted, n, out);
}

/* Enter the rules that are called, callers first, so that all who call one are known when it is entered. */
static void enter(struct grammar_walk *w)
{
    while (w->n_rank > 0 && !w->rc) {
        uint32_t rule = w->g->rule_of_rank[pop_rank(w)], context, at = w->n_todo;
        w->rc = context_of(w, rule, &context);
        visit(w, w->g->rule[rule].entry, w->rc ? 0 : context);
        follow(w, at, false);
    }
}

static int make_to(struct grammar_walk *w, uint32_t old_cap)
{
    size_t n = (size_t)w->states.cap * (size_t)w->g->n_classes, n_old = (size_t)old_cap * (size_t)w->g->n_classes;

    if (w->states.cap == old_cap)
        return 0;
    int32_t *to = mem_realloc(w->to, n * sizeof *to, MEM_OTHER);
    if (!to)
        return no_room();
    memset(to + n_old, 0xff, (n - n_old) * sizeof *to);
    w->to = to;
    return 0;
}

/* The set of places that were come to and wait for a byte. */
static int32_t take_state(struct grammar_walk *w)
{
    uint32_t n = 0, state = 0;

    if (!w->rc && !grow(&w->sorted, (uint64_t)w->n_todo + 1, &w->cap_sorted, sizeof *w->sorted))
        w->rc = no_room();
    for (uint32_t i = 0; i < w->n_todo && !w->rc; i++)
        if (w->g->node[w->todo[i].place.node].kind == GRAMMAR_BYTE)
            w->sorted[n++] = w->todo[i].place;
    if (!w->rc && w->accepts)
        w->sorted[n++] = (struct grammar_place){WHOLE, NOTHING};
    if (!w->rc && bytes(w) > MOST_BYTES)
        w->rc = err(ERR_LIMIT, "the grammar's states take more than %d MiB", MOST_BYTES >> 20);
    /* Room first: a state without its row would be one that a later call finds. */
    uint32_t old_cap = w->states.cap;
    if (!w->rc && !grow(&w->states.from, (uint64_t)w->states.n + 2, &w->states.cap, sizeof *w->states.from))
        w->rc = no_room();
    if (!w->rc && (w->rc = make_to(w, old_cap)))
        w->states.cap = old_cap; /* there is more, but nobody counts on it */
    if (!w->rc)
        w->rc = number_of(&w->states, w->sorted, n, &state);
    return w->rc ? w->rc : (int32_t)state;
}

static void begin(struct grammar_walk *w)
{
    for (uint32_t i = 0; i < w->n_todo; i++)
        w->slot[w->todo[i].next] = GRAMMAR_NONE;
    for (; w->n_rank > 0; w->n_rank--) /* of one that failed */
        w->first_behind[w->g->rule_of_rank[w->rank[w->n_rank - 1]]] = GRAMMAR_NONE;
    w->n_todo = w->n_behind = 0;
    w->accepts = false;
    w->rc = 0;
}

int32_t grammar_walk_start(struct grammar_walk *w, uint32_t rule)
{
    begin(w);
    call(w, rule, WHOLE, NOTHING);
    w->accepts = w->g->rule[rule].is_nullable;
    enter(w);
    return take_state(w);
}

int32_t grammar_walk_find(struct grammar_walk *w, int32_t state, uint8_t byte)
{
    const struct grammar_sets *s = &w->states;

    begin(w);
    for (uint32_t i = s->from[state]; i < s->from[state + 1]; i++) {
        struct grammar_place p = s->place[i];
        if (p.node == WHOLE)
            continue;
        const struct grammar_node *node = &w->g->node[p.node];
        if (byte >= node->lo && byte <= node->hi)
            visit(w, node->next, p.context);
    }
    follow(w, 0, true);
    enter(w);
    int32_t to = take_state(w);
    if (to >= 0)
        w->to[(uint32_t)state * (uint32_t)w->g->n_classes + w->g->class_of[byte]] = to;
    return to;
}

bool grammar_walk_accepts(const struct grammar_walk *w, int32_t state)
{
    uint32_t n = n_places(&w->states, (uint32_t)state);

    return n > 0 && w->states.place[w->states.from[state] + n - 1].node == WHOLE;
}

bool grammar_walk_goes_on(const struct grammar_walk *w, int32_t state)
{
    return n_places(&w->states, (uint32_t)state) > grammar_walk_accepts(w, state);
}

/* ---- the whole ---- */

/* The sets that always are. */
static int begin_sets(struct grammar_walk *w)
{
    uint32_t nothing;

    begin(w);
    int32_t dead = take_state(w);
    return dead < 0 ? dead : number_of(&w->contexts, w->sorted, 0, &nothing);
}

static void clear(struct grammar_sets *s)
{
    memset(s->slot, 0xff, ((size_t)s->mask + 1) * sizeof *s->slot);
    s->n = 0;
}

void grammar_walk_tidy(struct grammar_walk *w)
{
    uint64_t most = (uint64_t)FIRST_BYTES << (w->epoch < 3 ? w->epoch : 3);

    if (bytes(w) <= most)
        return;
    w->epoch++;
    memset(w->to, 0xff, (size_t)w->states.cap * (size_t)w->g->n_classes * sizeof *w->to);
    clear(&w->states);
    clear(&w->contexts);
    begin_sets(w); /* there is room */
}

int grammar_walk_make(const struct grammar *g, struct grammar_walk **out)
{
    struct grammar_walk *w = mem_zalloc(1, sizeof *w, MEM_OTHER);

    *out = NULL;
    if (!w)
        return no_room();
    w->g = g;
    w->first_behind = mem_alloc(g->n_rules * sizeof *w->first_behind, MEM_OTHER);
    int rc = w->first_behind ? make_place_slots(w, 64) : no_room();
    if (!rc) {
        memset(w->first_behind, 0xff, g->n_rules * sizeof *w->first_behind);
        rc = begin_sets(w);
    }
    if (rc) {
        grammar_walk_free(w);
        return rc;
    }
    *out = w;
    return 0;
}

void grammar_walk_free(struct grammar_walk *w)
{
    if (!w)
        return;
    sets_done(&w->states);
    sets_done(&w->contexts);
    mem_free(w->to);
    mem_free(w->todo);
    mem_free(w->behind);
    mem_free(w->slot);
    mem_free(w->first_behind);
    mem_free(w->rank);
    mem_free(w->sorted);
    mem_free(w);
}
