/* Checks of a whole grammar. No recursion: hostile rules nest as deep as they are many. */
#include "src/model/grammar_check.h"

#include <inttypes.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar.h"

/* Pairs of numbers, to be looked up by the first. */
struct links {
    uint32_t *from;  /* own: (n_keys + 1) where a key's begin */
    uint32_t *value; /* own: (n) */
    uint32_t *key;   /* own: (n) as they were added */
    uint32_t *to;    /* own: (n) */
    uint32_t n;
};

static void links_done(struct links *l)
{
    mem_free(l->from);
    mem_free(l->value);
    mem_free(l->key);
    mem_free(l->to);
}

static int links_init(struct links *l, uint32_t n_keys, uint32_t n_most)
{
    *l = (struct links){.from = mem_zalloc((size_t)n_keys + 1, sizeof *l->from, MEM_OTHER),
                        .value = mem_zalloc(n_most, sizeof *l->value, MEM_OTHER),
                        .key = mem_zalloc(n_most, sizeof *l->key, MEM_OTHER),
                        .to = mem_zalloc(n_most, sizeof *l->to, MEM_OTHER)};
    return l->from && l->value && l->key && l->to ? 0 : err(ERR_NOMEM, "checking a grammar");
}

static void links_add(struct links *l, uint32_t key, uint32_t to)
{
    l->key[l->n] = key;
    l->to[l->n++] = to;
}

/* When all were added: a counting sort. */
static void links_sort(struct links *l, uint32_t n_keys)
{
    for (uint32_t i = 0; i < l->n; i++)
        l->from[l->key[i] + 1]++;
    for (uint32_t k = 0; k < n_keys; k++)
        l->from[k + 1] += l->from[k];
    for (uint32_t i = 0; i < l->n; i++)
        l->value[l->from[l->key[i]]++] = l->to[i];
    for (uint32_t k = n_keys; k > 0; k--)
        l->from[k] = l->from[k - 1];
    l->from[0] = 0;
}

static int complain(const struct grammar *g, uint32_t rule, const char *what)
{
    const char *name = g->rule[rule].name;

    return err(ERR_FORMAT, "grammar: %s%.80s%s %s", name ? "rule \"" : "a group", name ? name : "", name ? "\"" : "",
               what);
}

static int check_defined(const struct grammar *g)
{
    for (uint32_t i = 0; i < g->n_rules; i++)
        if (g->rule[i].entry == GRAMMAR_NONE)
            return complain(g, i, "is called, but not defined");
    return 0;
}

/* ---- skips ---- */

static uint32_t behind_skips(struct grammar *g, uint32_t at)
{
    uint32_t end = at;

    while (end != GRAMMAR_NONE && g->node[end].kind == GRAMMAR_SKIP)
        end = g->node[end].next;
    while (at != end) { /* so that a chain is walked once */
        uint32_t next = g->node[at].next;
        g->node[at].next = end;
        at = next;
    }
    return end;
}

static void pass_skips(struct grammar *g)
{
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        struct grammar_node *node = &g->node[i];
        if (node->next != GRAMMAR_NONE)
            node->next = behind_skips(g, node->next);
        if (node->kind == GRAMMAR_FORK)
            node->other = behind_skips(g, node->other);
    }
    for (uint32_t i = 0; i < g->n_rules; i++)
        g->rule[i].entry = behind_skips(g, g->rule[i].entry);
}

/* ---- which nodes reach the end of their rule ---- */

/* Who has to be looked at again when a node's mark changes: who leads there, and for a rule's entry who calls it. */
static int find_callers(const struct grammar *g, struct links *back)
{
    int rc = links_init(back, g->n_nodes, 2 * g->n_nodes);

    for (uint32_t i = 0; i < g->n_nodes && !rc; i++) {
        const struct grammar_node *node = &g->node[i];
        if (node->next != GRAMMAR_NONE)
            links_add(back, node->next, i);
        if (node->kind == GRAMMAR_FORK && node->other != GRAMMAR_NONE)
            links_add(back, node->other, i);
        if (node->kind == GRAMMAR_CALL)
            links_add(back, g->rule[node->other].entry, i);
    }
    if (!rc)
        links_sort(back, g->n_nodes);
    return rc;
}

static bool has(const uint8_t *mark, uint32_t node)
{
    return node != GRAMMAR_NONE && mark[node]; /* what was left out (x{0}) leads nowhere */
}

static bool reaches(const struct grammar *g, const uint8_t *mark, const struct grammar_node *node, bool by_bytes)
{
    switch (node->kind) {
    case GRAMMAR_BYTE:
        return by_bytes && has(mark, node->next);
    case GRAMMAR_CALL:
        return has(mark, node->next) && mark[g->rule[node->other].entry];
    case GRAMMAR_FORK:
        return has(mark, node->next) || has(mark, node->other);
    case GRAMMAR_END:
        return true;
    default:
        return false; /* nothing leads to a skip */
    }
}

/* mark (n_nodes, zeros): 1 where a node's rule can end from there, by_bytes or without reading any. stack: (n_nodes) of room. */
static void spread(const struct grammar *g, const struct links *back, bool by_bytes, uint8_t *mark, uint32_t *stack)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < g->n_nodes; i++)
        if (g->node[i].kind == GRAMMAR_END) {
            mark[i] = 1;
            stack[n++] = i;
        }
    while (n > 0) {
        uint32_t at = stack[--n];
        for (uint32_t k = back->from[at]; k < back->from[at + 1]; k++) {
            uint32_t i = back->value[k];
            if (mark[i] || !reaches(g, mark, &g->node[i], by_bytes))
                continue;
            mark[i] = 1;
            stack[n++] = i;
        }
    }
}

/* Of rules that do not end, from number i on, one with a name: who reads the error can find it. */
static uint32_t rather_named(const struct grammar *g, const uint8_t *mark, uint32_t i)
{
    for (uint32_t k = i; k < g->n_rules; k++)
        if (g->rule[k].name && !mark[g->rule[k].entry])
            return k;
    return i;
}

static int check_ends(struct grammar *g)
{
    uint8_t *mark = mem_zalloc(g->n_nodes, 1, MEM_OTHER);
    uint32_t *stack = mem_zalloc(g->n_nodes, sizeof *stack, MEM_OTHER);
    struct links back = {0};
    int rc = mark && stack ? find_callers(g, &back) : err(ERR_NOMEM, "checking a grammar");

    if (!rc)
        spread(g, &back, true, mark, stack);
    for (uint32_t i = 0; i < g->n_rules && !rc; i++)
        if (!mark[g->rule[i].entry])
            rc = complain(g, rather_named(g, mark, i), "derives no text: it never ends");
    if (!rc) {
        memset(mark, 0, g->n_nodes);
        spread(g, &back, false, mark, stack);
    }
    for (uint32_t i = 0; i < g->n_rules && !rc; i++)
        g->rule[i].is_nullable = mark[g->rule[i].entry];
    links_done(&back);
    mem_free(stack);
    mem_free(mark);
    return rc;
}

/* ---- who calls whom before a byte was read ---- */

/* Add a rule's calls. seen (n_nodes): rules have no node in common, so it is never cleared. stack: room. */
static void find_calls(const struct grammar *g, uint32_t rule, uint8_t *seen, uint32_t *stack, struct links *calls)
{
    uint32_t n = 0;

    stack[n++] = g->rule[rule].entry;
    while (n > 0) {
        uint32_t at = stack[--n];
        const struct grammar_node *node = &g->node[at];
        if (seen[at])
            continue;
        seen[at] = 1;
        if (node->kind == GRAMMAR_CALL)
            links_add(calls, rule, node->other);
        if (node->kind == GRAMMAR_FORK || (node->kind == GRAMMAR_CALL && g->rule[node->other].is_nullable))
            stack[n++] = node->next;
        if (node->kind == GRAMMAR_FORK)
            stack[n++] = node->other;
    }
}

/* Ranks: callers before those they call (A. B. Kahn, CACM 5(11), 1962). How many rules got one. */
static uint32_t rank(struct grammar *g, const struct links *calls, uint32_t *n_callers)
{
    uint32_t n = 0;

    for (uint32_t k = 0; k < calls->n; k++)
        n_callers[calls->value[k]]++;
    for (uint32_t i = 0; i < g->n_rules; i++)
        if (!n_callers[i])
            g->rule_of_rank[n++] = i;
    for (uint32_t r = 0; r < n; r++) {
        uint32_t rule = g->rule_of_rank[r];
        g->rule[rule].rank = r;
        for (uint32_t k = calls->from[rule]; k < calls->from[rule + 1]; k++)
            if (--n_callers[calls->value[k]] == 0)
                g->rule_of_rank[n++] = calls->value[k];
    }
    return n;
}

/* A rule of a circle: whoever has no rank is called by another without, and going from caller to caller ends in one. by: room. */
static uint32_t find_circle(const struct grammar *g, const struct links *calls, const uint32_t *n_callers, uint32_t *by)
{
    uint32_t at = 0;

    for (uint32_t i = 0; i < g->n_rules; i++)
        for (uint32_t k = calls->from[i]; k < calls->from[i + 1] && n_callers[i]; k++)
            by[calls->value[k]] = i;
    while (!n_callers[at])
        at++;
    for (uint32_t i = 0; i < g->n_rules; i++)
        at = by[at];
    for (uint32_t i = 0; !g->rule[at].name && i < g->n_rules; i++) /* rather one with a name */
        at = by[at];
    return at;
}

static int check_left(struct grammar *g)
{
    uint8_t *seen = mem_zalloc(g->n_nodes, 1, MEM_OTHER);
    /* A node goes in at most twice. */
    uint32_t *stack = mem_zalloc(2 * (size_t)g->n_nodes + 1, sizeof *stack, MEM_OTHER);
    uint32_t *n_callers = mem_zalloc(g->n_rules, sizeof *n_callers, MEM_OTHER);
    struct links calls = {0};
    int rc =
        seen && stack && n_callers ? links_init(&calls, g->n_rules, g->n_nodes) : err(ERR_NOMEM, "checking a grammar");

    for (uint32_t i = 0; i < g->n_rules && !rc; i++)
        find_calls(g, i, seen, stack, &calls);
    if (!rc)
        links_sort(&calls, g->n_rules);
    if (!rc && rank(g, &calls, n_callers) < g->n_rules)
        rc = complain(g, find_circle(g, &calls, n_callers, stack),
                      "calls itself before anything was read (left recursion)");
    links_done(&calls);
    mem_free(n_callers);
    mem_free(stack);
    mem_free(seen);
    return rc;
}

/* ---- bytes ---- */

static void find_classes(struct grammar *g)
{
    bool begins[257] = {true};
    int class = -1;

    for (uint32_t i = 0; i < g->n_nodes; i++)
        if (g->node[i].kind == GRAMMAR_BYTE) {
            begins[g->node[i].lo] = true;
            begins[g->node[i].hi + 1] = true;
        }
    for (int byte = 0; byte < 256; byte++) {
        class += begins[byte];
        g->class_of[byte] = (uint8_t) class;
    }
    g->n_classes = class + 1;
}

int grammar_check(struct grammar *g)
{
    int rc = check_defined(g);

    if (rc)
        return rc;
    g->rule_of_rank = mem_zalloc(g->n_rules, sizeof *g->rule_of_rank, MEM_OTHER);
    if (!g->rule_of_rank)
        return err(ERR_NOMEM, "a grammar of %" PRIu32 " rules", g->n_rules);
    pass_skips(g);
    rc = check_ends(g);
    if (!rc)
        rc = check_left(g);
    if (!rc)
        find_classes(g);
    return rc;
}
