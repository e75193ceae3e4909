/* Pieces of network, and sets of characters. What makes them a grammar: grammar_check.c. */
#include "src/model/grammar_build.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar_check.h"

/* Copies of a piece of more nodes are calls of a rule. */
#define COPY_NODES 5

static const struct grammar_piece nothing = {0, 0, 0};

int grammar_build_fail(struct grammar_build *b, int code, const char *fmt, ...)
{
    char what[1024];
    va_list args;

    if (b->rc)
        return b->rc;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return b->rc = err(code, "%s", what);
}

void grammar_build_init(struct grammar_build *b)
{
    *b = (struct grammar_build){.g = mem_zalloc(1, sizeof *b->g, MEM_OTHER)};
    if (!b->g)
        grammar_build_fail(b, ERR_NOMEM, "a grammar");
}

void grammar_build_done(struct grammar_build *b)
{
    grammar_free(b->g);
    b->g = NULL;
}

/* ---- rules ---- */

static char *copy_of(const char *text, size_t n)
{
    char *s = mem_alloc(n + 1, MEM_OTHER);

    if (s) {
        memcpy(s, text, n);
        s[n] = '\0';
    }
    return s;
}

/* Room for one more of what the array at *p holds. */
static bool make_room(void *p, uint32_t n, uint32_t *cap, size_t item_bytes)
{
    void *old;

    if (n < *cap)
        return true;
    uint32_t more = *cap ? 2 * *cap : 64;
    memcpy(&old, p, sizeof old);
    void *now = mem_realloc(old, more * item_bytes, MEM_OTHER);
    if (!now)
        return false;
    memcpy(p, &now, sizeof now);
    *cap = more;
    return true;
}

uint32_t grammar_build_rule(struct grammar_build *b, const char *name, size_t n_bytes)
{
    struct grammar *g = b->g;
    char *own = NULL;

    if (b->rc)
        return 0;
    if (g->n_rules >= GRAMMAR_MAX_NODES) {
        grammar_build_fail(b, ERR_LIMIT, "a grammar of more than %" PRIu32 " rules", GRAMMAR_MAX_NODES);
        return 0;
    }
    if (!make_room(&g->rule, g->n_rules, &g->cap_rules, sizeof *g->rule) || (name && !(own = copy_of(name, n_bytes)))) {
        grammar_build_fail(b, ERR_NOMEM, "a grammar of %" PRIu32 " rules", g->n_rules + 1);
        return 0;
    }
    g->rule[g->n_rules] = (struct grammar_rule){.name = own, .entry = GRAMMAR_NONE};
    return g->n_rules++;
}

void grammar_build_define(struct grammar_build *b, uint32_t rule, struct grammar_piece p)
{
    if (b->rc)
        return;
    b->g->rule[rule].entry = p.entry;
    b->g->node[p.exit].kind = GRAMMAR_END;
}

bool grammar_build_is_defined(const struct grammar_build *b, uint32_t rule)
{
    return !b->rc && b->g->rule[rule].entry != GRAMMAR_NONE;
}

/* ---- pieces ---- */

/* Its number; 0 after an error. */
static uint32_t add_node(struct grammar_build *b, struct grammar_node node)
{
    struct grammar *g = b->g;

    if (b->rc)
        return 0;
    if (g->n_nodes >= GRAMMAR_MAX_NODES) {
        grammar_build_fail(b, ERR_LIMIT, "the grammar is too large: it takes more than %" PRIu32 " places",
                           GRAMMAR_MAX_NODES);
        return 0;
    }
    if (!make_room(&g->node, g->n_nodes, &g->cap_nodes, sizeof *g->node)) {
        grammar_build_fail(b, ERR_NOMEM, "a grammar of %" PRIu32 " places", g->n_nodes + 1);
        return 0;
    }
    g->node[g->n_nodes] = node;
    return g->n_nodes++;
}

static uint32_t add_skip(struct grammar_build *b)
{
    return add_node(b, (struct grammar_node){.kind = GRAMMAR_SKIP, .next = GRAMMAR_NONE, .other = GRAMMAR_NONE});
}

static uint32_t add_byte(struct grammar_build *b, uint8_t lo, uint8_t hi, uint32_t next)
{
    return add_node(
        b, (struct grammar_node){.kind = GRAMMAR_BYTE, .lo = lo, .hi = hi, .next = next, .other = GRAMMAR_NONE});
}

static uint32_t add_fork(struct grammar_build *b, uint32_t next, uint32_t other)
{
    return add_node(b, (struct grammar_node){.kind = GRAMMAR_FORK, .next = next, .other = other});
}

/* A node that leads to a way out behind it. */
static struct grammar_piece one(struct grammar_build *b, uint32_t node)
{
    uint32_t exit = add_skip(b);

    if (b->rc)
        return nothing;
    b->g->node[node].next = exit;
    return (struct grammar_piece){node, node, exit};
}

struct grammar_piece grammar_build_empty(struct grammar_build *b)
{
    uint32_t node = add_skip(b);

    return (struct grammar_piece){node, node, node};
}

struct grammar_piece grammar_build_byte(struct grammar_build *b, uint8_t lo, uint8_t hi)
{
    return one(b, add_byte(b, lo, hi, GRAMMAR_NONE));
}

struct grammar_piece grammar_build_text(struct grammar_build *b, const char *bytes, size_t n)
{
    struct grammar_piece p = {b->rc ? 0 : b->g->n_nodes, b->rc ? 0 : b->g->n_nodes, 0};

    for (size_t i = 0; i < n && !b->rc; i++)
        add_byte(b, (uint8_t)bytes[i], (uint8_t)bytes[i], b->g->n_nodes + 1);
    p.exit = add_skip(b);
    return b->rc ? nothing : p;
}

struct grammar_piece grammar_build_call(struct grammar_build *b, uint32_t rule)
{
    return one(b, add_node(b, (struct grammar_node){.kind = GRAMMAR_CALL, .next = GRAMMAR_NONE, .other = rule}));
}

struct grammar_piece grammar_build_seq(struct grammar_build *b, struct grammar_piece x, struct grammar_piece y)
{
    if (b->rc)
        return nothing;
    b->g->node[x.exit].next = y.entry;
    return (struct grammar_piece){x.first, x.entry, y.exit};
}

struct grammar_piece grammar_build_alt(struct grammar_build *b, struct grammar_piece x, struct grammar_piece y)
{
    uint32_t fork = add_fork(b, x.entry, y.entry), exit = add_skip(b);

    if (b->rc)
        return nothing;
    b->g->node[x.exit].next = b->g->node[y.exit].next = exit;
    return (struct grammar_piece){x.first, fork, exit};
}

/* Another piece like x, which is small. */
static struct grammar_piece copy(struct grammar_build *b, struct grammar_piece x)
{
    uint32_t by = b->rc ? 0 : b->g->n_nodes - x.first;

    for (uint32_t i = x.first; i <= x.exit && !b->rc; i++) {
        struct grammar_node node = b->g->node[i];
        node.next = i == x.exit ? GRAMMAR_NONE : node.next + by;
        if (node.kind == GRAMMAR_FORK)
            node.other += by;
        add_node(b, node);
    }
    return b->rc ? nothing : (struct grammar_piece){x.first + by, x.entry + by, x.exit + by};
}

/* A rule of its own, called. */
static struct grammar_piece as_call(struct grammar_build *b, struct grammar_piece x)
{
    uint32_t rule = grammar_build_rule(b, NULL, 0);

    grammar_build_define(b, rule, x);
    return grammar_build_call(b, rule);
}

/* Few nodes, which lead to each other alone. */
static bool is_small(const struct grammar_build *b, struct grammar_piece x)
{
    bool is_own = x.entry >= x.first && x.entry <= x.exit && x.exit - x.first < COPY_NODES;

    for (uint32_t i = x.first; is_own && i < x.exit; i++) {
        const struct grammar_node *node = &b->g->node[i];
        is_own = node->next >= x.first && node->next <= x.exit &&
                 (node->kind != GRAMMAR_FORK || (node->other >= x.first && node->other <= x.exit));
    }
    return is_own;
}

struct grammar_piece grammar_build_repeat(struct grammar_build *b, struct grammar_piece x, uint32_t least,
                                          uint32_t most)
{
    bool loops = most == UINT32_MAX;
    uint32_t n = !loops ? most : least ? least : 1, open = GRAMMAR_NONE, last = GRAMMAR_NONE;

    if (b->rc)
        return nothing;
    if (most == 0)
        return grammar_build_empty(b);
    if (n > 1 && !is_small(b, x))
        x = as_call(b, x);
    struct grammar_piece out = x, at = x;
    for (uint32_t i = 0; i < n && !b->rc; i++) {
        if (i > 0)
            at = copy(b, x);
        uint32_t entry = at.entry;
        if (i >= least) /* open: forks whose other way leads out, linked through it */
            entry = open = add_fork(b, at.entry, open);
        if (b->rc)
            break;
        if (i == 0)
            out.entry = entry;
        else
            b->g->node[last].next = entry;
        last = at.exit;
    }
    if (loops) {
        uint32_t again = least ? add_fork(b, at.entry, open) : open;
        if (b->rc)
            return nothing;
        b->g->node[last].next = open = again;
    }
    out.exit = add_skip(b);
    if (b->rc)
        return nothing;
    if (!loops)
        b->g->node[last].next = out.exit;
    while (open != GRAMMAR_NONE) {
        uint32_t before = b->g->node[open].other;
        b->g->node[open].other = out.exit;
        open = before;
    }
    return out;
}

/* ---- sets of characters ---- */

enum { LAST_CHAR = 0x10ffff, FIRST_SURROGATE = 0xd800, LAST_SURROGATE = 0xdfff };

/* Ranges by rising place, none touching the next. */
static void put_in_order(struct grammar_set *set)
{
    int n = 0;

    for (int i = 1; i < set->n; i++) {
        uint32_t lo = set->lo[i], hi = set->hi[i];
        int at = i;
        for (; at > 0 && set->lo[at - 1] > lo; at--) {
            set->lo[at] = set->lo[at - 1];
            set->hi[at] = set->hi[at - 1];
        }
        set->lo[at] = lo;
        set->hi[at] = hi;
    }
    for (int i = 0; i < set->n; i++) {
        if (n > 0 && set->lo[i] <= set->hi[n - 1] + 1) {
            set->hi[n - 1] = set->hi[i] > set->hi[n - 1] ? set->hi[i] : set->hi[n - 1];
            continue;
        }
        set->lo[n] = set->lo[i];
        set->hi[n++] = set->hi[i];
    }
    set->n = n;
}

bool grammar_build_add(struct grammar_set *set, uint32_t lo, uint32_t hi)
{
    if (set->n == GRAMMAR_BUILD_MAX_RANGES - 1) /* an inverted set may have one more */
        return false;
    set->lo[set->n] = lo;
    set->hi[set->n++] = hi < LAST_CHAR ? hi : LAST_CHAR;
    put_in_order(set);
    return true;
}

void grammar_build_invert(struct grammar_set *set)
{
    uint32_t from = 0;
    int n = 0, n_old = set->n;

    for (int i = 0; i < n_old; i++) {
        uint32_t lo = set->lo[i], hi = set->hi[i];
        if (lo > from) {
            set->lo[n] = from;
            set->hi[n++] = lo - 1;
        }
        from = hi + 1;
    }
    if (from <= LAST_CHAR) {
        set->lo[n] = from;
        set->hi[n++] = LAST_CHAR;
    }
    set->n = n;
}

void grammar_build_clip(struct grammar_set *set, uint32_t lo, uint32_t hi, bool keep)
{
    struct grammar_set in = *set;

    set->n = 0;
    for (int i = 0; i < in.n; i++) {
        uint32_t a = in.lo[i], z = in.hi[i];
        if (keep && a <= hi && z >= lo)
            grammar_build_add(set, a > lo ? a : lo, z < hi ? z : hi);
        if (!keep && a < lo)
            grammar_build_add(set, a, z < lo ? z : lo - 1);
        if (!keep && z > hi)
            grammar_build_add(set, a > hi ? a : hi + 1, z);
    }
}

bool grammar_build_has(const struct grammar_set *set, uint32_t c)
{
    for (int i = 0; i < set->n; i++)
        if (c >= set->lo[i] && c <= set->hi[i])
            return true;
    return false;
}

/* ---- their UTF-8 ---- */

/* The ways from an entry: forks in front of each other. tail[k]: from there k more bytes, each any that goes on a character. */
struct ways {
    uint32_t entry, tail[4];
};

static int encode(uint32_t c, int n, uint8_t *out)
{
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};

    for (int i = n - 1; i > 0; i--, c >>= 6)
        out[i] = (uint8_t)(0x80 | (c & 0x3f));
    out[0] = (uint8_t)(n == 1 ? c : lead[n] | c);
    return n;
}

/* Characters of n bytes that differ, if at all, in bytes of which each may be any of its range. */
static void add_way(struct grammar_build *b, struct ways *w, uint32_t lo, uint32_t hi, int n)
{
    uint8_t a[4], z[4];
    int n_own = n, left = 0;

    encode(lo, n, a);
    encode(hi, n, z);
    while (n_own > 1 && a[n_own - 1] == 0x80 && z[n_own - 1] == 0xbf) {
        n_own--;
        left++;
    }
    uint32_t to = w->tail[left];
    for (int i = n_own - 1; i >= 0; i--)
        to = add_byte(b, a[i], z[i], to);
    w->entry = w->entry == GRAMMAR_NONE ? to : add_fork(b, to, w->entry);
}

/* Characters of n bytes: cut where a byte in front changes and those behind do not run through all (R. Cox, "Regular Expression Matching
 * in the Wild", 2010). */
static void add_ways(struct grammar_build *b, struct ways *w, uint32_t lo, uint32_t hi, int n)
{
    for (int i = 1; i < n && !b->rc; i++) {
        uint32_t mask = ((uint32_t)1 << 6 * i) - 1;
        if ((lo & ~mask) == (hi & ~mask))
            continue;
        if (lo & mask) {
            add_ways(b, w, lo, lo | mask, n);
            add_ways(b, w, (lo | mask) + 1, hi, n);
            return;
        }
        if ((hi & mask) != mask) {
            add_ways(b, w, lo, (hi & ~mask) - 1, n);
            add_ways(b, w, hi & ~mask, hi, n);
            return;
        }
    }
    add_way(b, w, lo, hi, n);
}

static void add_range(struct grammar_build *b, struct ways *w, uint32_t lo, uint32_t hi)
{
    static const uint32_t last[] = {0, 0x7f, 0x7ff, 0xffff, LAST_CHAR};

    for (int n = 1; n <= 4; n++) {
        uint32_t from = lo > last[n - 1] + (n > 1) ? lo : last[n - 1] + (n > 1), to = hi < last[n] ? hi : last[n];
        if (from <= to && !b->rc)
            add_ways(b, w, from, to, n);
    }
}

struct grammar_piece grammar_build_chars(struct grammar_build *b, const struct grammar_set *set)
{
    struct grammar_set valid = *set;
    struct ways w = {.entry = GRAMMAR_NONE};

    grammar_build_clip(&valid, FIRST_SURROGATE, LAST_SURROGATE, false);
    if (b->rc)
        return nothing;
    if (!valid.n) {
        grammar_build_fail(b, ERR_FORMAT, "a set of characters is empty");
        return nothing;
    }
    /* The way out is made last, as a piece has it, but is known: the nodes before it are few. */
    uint32_t first = add_skip(b);
    w.tail[0] = first;
    for (int k = 1; k < 4; k++)
        w.tail[k] = valid.hi[valid.n - 1] < 0x80 ? first : add_byte(b, 0x80, 0xbf, w.tail[k - 1]);
    for (int i = 0; i < valid.n && !b->rc; i++)
        add_range(b, &w, valid.lo[i], valid.hi[i]);
    uint32_t exit = add_skip(b);
    if (b->rc)
        return nothing;
    b->g->node[first].next = exit;
    return (struct grammar_piece){first, w.entry, exit};
}

int grammar_build_finish(struct grammar_build *b, uint32_t root, struct grammar **out)
{
    *out = NULL;
    if (b->rc)
        return b->rc;
    struct grammar_piece lf = grammar_build_byte(b, '\n', '\n');
    lf = grammar_build_repeat(b, lf, 0, 2);
    struct grammar_piece text = grammar_build_seq(b, lf, grammar_build_call(b, root));
    uint32_t behind = grammar_build_rule(b, "root", 4);
    grammar_build_define(b, behind, text);
    if (b->rc)
        return b->rc;
    b->g->root = root;
    b->g->behind = behind;
    b->rc = grammar_check(b->g);
    if (b->rc)
        return b->rc;
    *out = b->g;
    b->g = NULL;
    return 0;
}
