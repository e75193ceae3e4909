/* The radix tree. A node stands for the tokens on the way from the root to its end. Pages of a beginning are with a user whose
 * leaf lies below, or with a sequence that the tree holds itself: at a place where prompts part (exactly that length, because
 * a sliding window cannot be shortened), or, for a leaf whose last user left, in whole pages, which costs nobody a copy.
 * A node without users, without children and with nothing held is taken out. */
#include "src/run/prefix.h"

#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/cache_back.h"

/* Sharing less than this is not worth a page's copy. */
#define LEAST_SHARED_TOK 16

struct prefix_node {
    struct prefix_node *parent, *child, *next; /* views: up, first below, beside; a node owns its children */
    int32_t *token;                            /* own: (n_tok) from the parent's end to this one's */
    int64_t n_tok, end;
    struct prefix_user *user; /* view: first of those whose leaf this is */
    struct cache_seq *held;   /* own; NULL: nothing */
    uint64_t used;            /* when somebody last came along */
};

struct prefix {
    struct cache *cache; /* view */
    struct prefix_node root;
    uint64_t now;
};

int prefix_open(struct cache *cache, struct prefix **out)
{
    *out = mem_zalloc(1, sizeof **out, MEM_META);
    if (!*out)
        return err(ERR_NOMEM, "a tree of shared beginnings");
    (*out)->cache = cache;
    return 0;
}

static void free_node(struct prefix_node *node)
{
    cache_seq_free(node->held);
    mem_free(node->token);
    mem_free(node);
}

/* The next node in pre-order within the tree under top; NULL behind the last. */
static struct prefix_node *following(const struct prefix_node *node, const struct prefix_node *top)
{
    if (node->child)
        return node->child;
    while (node != top && !node->next)
        node = node->parent;
    return node == top ? NULL : node->next;
}

static void unlink_node(struct prefix_node *node)
{
    struct prefix_node **at = &node->parent->child;
    while (*at != node)
        at = &(*at)->next;
    *at = node->next;
}

/* Take out a node that serves nobody, and those above that then do not either. */
static void prune(struct prefix *p, struct prefix_node *node)
{
    while (node != &p->root && !node->child && !node->user && !node->held) {
        struct prefix_node *parent = node->parent;
        unlink_node(node);
        free_node(node);
        node = parent;
    }
}

void prefix_close(struct prefix *p)
{
    if (!p)
        return;
    struct prefix_node *node = p->root.child;
    while (node) {
        if (node->child) {
            node = node->child;
            continue;
        }
        struct prefix_node *after = node->next ? node->next : node->parent == &p->root ? NULL : node->parent;
        unlink_node(node);
        free_node(node);
        node = after;
    }
    mem_free(p);
}

/* ---- looking ---- */

/* The deepest node whose beginning tokens (n) share, and how many; the node's own tokens may be matched in part. */
static struct prefix_node *walk(const struct prefix *p, const int32_t *tokens, int64_t n, int64_t *n_same)
{
    const struct prefix_node *node = &p->root;
    int64_t same = 0;

    for (;;) {
        const struct prefix_node *child = node->child;
        while (child && (same >= n || child->token[0] != tokens[same]))
            child = child->next;
        if (!child)
            break;
        node = child;
        int64_t start = same;
        while (same < n && same < node->end && node->token[same - start] == tokens[same])
            same++;
        if (same < node->end)
            break;
    }
    *n_same = same;
    return (struct prefix_node *)node;
}

struct donor {
    const struct cache_seq *seq; /* view; NULL: none */
    int64_t n_tok;
};

static void offer(const struct cache_seq *seq, int64_t n_same, struct donor *best)
{
    int64_t n = cache_whole(seq, n_same);
    if (n > best->n_tok)
        *best = (struct donor){seq, n};
}

/* Look at all who share n_same tokens: those in the tree under top. */
static void look_under(const struct prefix_node *top, int64_t n_same, struct donor *best, struct prefix_match *match)
{
    for (const struct prefix_node *node = top; node; node = following(node, top)) {
        if (node->held)
            offer(node->held, n_same, best);
        for (struct prefix_user *user = node->user; user; user = user->next) {
            offer(user->seq, n_same, best);
            if (cache_len(user->seq) < n_same && n_same > match->n_soon) {
                match->n_soon = n_same;
                match->maker = user;
            }
        }
    }
}

static struct donor look(const struct prefix *p, const int32_t *tokens, int64_t n, struct prefix_match *match)
{
    struct donor best = {NULL, LEAST_SHARED_TOK - 1};
    int64_t n_same;
    const struct prefix_node *node = walk(p, tokens, n, &n_same);

    *match = (struct prefix_match){0};
    for (; node && n_same > best.n_tok; node = node->parent) {
        look_under(node, n_same, &best, match);
        n_same = node->parent ? node->parent->end : 0;
    }
    match->n_now = best.seq ? best.n_tok : 0;
    if (match->n_soon < match->n_now + LEAST_SHARED_TOK) {
        match->n_soon = 0;
        match->maker = NULL;
    }
    return best;
}

void prefix_look(const struct prefix *p, const int32_t *tokens, int64_t n, struct prefix_match *out)
{
    look(p, tokens, n, out);
}

/* ---- joining ---- */

/* A sequence from the cache: another's beginning, or an empty one, for whose table the tree lets go of what it holds. */
static int take_seq(struct prefix *p, const struct donor *donor, struct cache_seq **out)
{
    int rc = donor->seq ? cache_fork(donor->seq, out) : cache_seq_make(p->cache, out);

    /* What is forked has to stay, so the tree may not shrink for it. */
    while (rc < 0 && !donor->seq && prefix_shrink(p))
        rc = cache_seq_make(p->cache, out);
    if (rc == 0 && donor->seq)
        cache_truncate(*out, donor->n_tok);
    return rc;
}

static struct prefix_node *make_node(struct prefix_node *parent, const int32_t *token, int64_t n_tok)
{
    struct prefix_node *node = mem_zalloc(1, sizeof *node, MEM_META);
    int32_t *copy = mem_alloc((size_t)n_tok * sizeof *copy, MEM_META);

    if (!node || !copy) {
        mem_free(copy);
        mem_free(node);
        return NULL;
    }
    memcpy(copy, token, (size_t)n_tok * sizeof *copy);
    node->token = copy;
    node->n_tok = n_tok;
    node->end = parent->end + n_tok;
    node->parent = parent;
    node->next = parent->child;
    parent->child = node;
    return node;
}

/* Put a node at position `at` of the way to node, above it. */
static struct prefix_node *split(struct prefix_node *node, int64_t at)
{
    int64_t n_upper = node->n_tok - (node->end - at);
    struct prefix_node *upper = make_node(node->parent, node->token, n_upper);

    if (!upper)
        return NULL;
    unlink_node(node);
    node->n_tok -= n_upper;
    memmove(node->token, node->token + n_upper, (size_t)node->n_tok * sizeof *node->token);
    node->parent = upper;
    node->next = NULL;
    upper->child = node;
    return upper;
}

/* The node that stands for tokens (n), made if there is none; NULL without memory. */
static struct prefix_node *find_or_make(struct prefix *p, const int32_t *tokens, int64_t n)
{
    int64_t n_same;
    struct prefix_node *node = walk(p, tokens, n, &n_same);

    if (n_same < node->end)
        node = split(node, n_same);
    if (!node || n_same == n)
        return node;
    struct prefix_node *leaf = make_node(node, tokens + n_same, n - n_same);
    if (!leaf)
        prune(p, node);
    return leaf;
}

/* Where user's shared pages end, others part from it or go on with it: keep that place. */
static void hold_shared(struct prefix *p, const struct prefix_user *user)
{
    struct prefix_node *node = user->leaf;
    int64_t len = cache_len(user->seq);

    while (node->end > len)
        node = node->parent;
    if (node == &p->root || node->end != len || node->held)
        return;
    if (cache_fork(user->seq, &node->held) < 0)
        node->held = NULL; /* every sequence is taken: the pages are then shared as long as their users live */
}

int prefix_join(struct prefix *p, const int32_t *tokens, int64_t n, struct prefix_user *user)
{
    struct prefix_match match;
    struct donor donor = look(p, tokens, n, &match);

    *user = (struct prefix_user){0};
    int rc = take_seq(p, &donor, &user->seq);
    if (rc < 0 && donor.seq) { /* no table for a fork: an empty sequence may have the one of something held */
        donor = (struct donor){0};
        rc = take_seq(p, &donor, &user->seq);
    }
    if (rc < 0)
        return rc;
    struct prefix_node *leaf = find_or_make(p, tokens, n);
    if (!leaf) {
        cache_seq_free(user->seq);
        user->seq = NULL;
        return err(ERR_NOMEM, "the shared beginnings of a prompt of %lld tokens", (long long)n);
    }
    user->leaf = leaf;
    user->next = leaf->user;
    leaf->user = user;
    p->now++;
    for (struct prefix_node *node = leaf; node; node = node->parent)
        node->used = p->now;
    hold_shared(p, user);
    return 0;
}

/* ---- leaving ---- */

static void hold_pages(struct prefix_node *leaf, const struct cache_seq *seq)
{
    int64_t n = cache_len(seq) < leaf->end ? cache_len(seq) : leaf->end;
    const struct prefix_node *above = leaf->parent;

    n -= n % DEVICE_PAGE_TOK;
    if (leaf->held || !above || n == 0 || (above->held && n <= above->end) || cache_whole(seq, n) != n)
        return;
    if (cache_fork(seq, &leaf->held) < 0)
        leaf->held = NULL;
    else
        cache_truncate(leaf->held, n);
}

void prefix_leave(struct prefix *p, struct prefix_user *user, bool without_trace)
{
    struct prefix_node *leaf = user->leaf;

    if (!leaf)
        return;
    struct prefix_user **at = &leaf->user;
    while (*at != user)
        at = &(*at)->next;
    *at = user->next;
    if (!without_trace)
        hold_pages(leaf, user->seq);
    cache_seq_free(user->seq);
    *user = (struct prefix_user){0};
    prune(p, leaf);
}

static bool shrink(struct prefix *p, bool is_wanted(const struct cache_seq *seq))
{
    struct prefix_node *oldest = NULL;

    /* Of equals the last in pre-order: a beginning goes after what it begins. */
    for (struct prefix_node *node = &p->root; node; node = following(node, &p->root))
        if (node->held && (!oldest || node->used <= oldest->used) && is_wanted(node->held))
            oldest = node;
    if (!oldest)
        return false;
    cache_seq_free(oldest->held);
    oldest->held = NULL;
    prune(p, oldest);
    return true;
}

static bool is_any(const struct cache_seq *seq)
{
    (void)seq;
    return true;
}

bool prefix_shrink(struct prefix *p)
{
    return shrink(p, is_any);
}

bool prefix_leave_device(struct prefix *p)
{
    return shrink(p, cache_back_frees);
}
