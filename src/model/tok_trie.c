/* A vocabulary's texts in order, and the trie that follows from how many bytes neighbours share. */
#include "src/model/tok_trie.h"

#include <stdlib.h>
#include <string.h>

#include "src/base/err.h"
#include "src/model/tok_in.h"

static const char *piece_of(const struct tok *tok, int32_t id, int *n)
{
    *n = (int)tok->piece[id].n;
    return tok->arena + tok->piece[id].off;
}

/* <think>, </think>, and names as <|channel|>, whatever their type. */
static bool is_mark(const char *p, int n)
{
    return (n == 7 && !memcmp(p, "<think>", 7)) || (n == 8 && !memcmp(p, "</think>", 8)) ||
           (n > 4 && !memcmp(p, "<|", 2) && !memcmp(p + n - 2, "|>", 2));
}

static bool is_text(const struct tok *tok, int32_t id)
{
    int n;
    const char *p = piece_of(tok, id, &n);

    return n > 0 && !(tok->attr[id] & (TOK_ATTR_CONTROL | TOK_ATTR_UNKNOWN | TOK_ATTR_EOG)) && !is_mark(p, n);
}

static int by_text(const void *a, const void *b, void *arg)
{
    const struct tok *tok = arg;
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    int n_x, n_y;
    const char *p = piece_of(tok, x, &n_x), *q = piece_of(tok, y, &n_y);
    int order = memcmp(p, q, (size_t)(n_x < n_y ? n_x : n_y));

    return order ? order : n_x != n_y ? n_x - n_y : x - y;
}

/* How many bytes the i-th token's text shares with the one before. */
static int n_shared(const struct tok *tok, const struct tok_trie *t, int32_t i)
{
    int n_x, n_y, n = 0;

    if (i == 0)
        return 0;
    const char *p = piece_of(tok, t->id[i - 1], &n_x), *q = piece_of(tok, t->id[i], &n_y);
    while (n < n_x && n < n_y && p[n] == q[n])
        n++;
    return n;
}

static int pick(const struct tok *tok, struct tok_trie *t)
{
    size_t n = (size_t)tok->n_vocab;

    t->id = mem_alloc(n * sizeof *t->id, MEM_TOK);
    t->has = mem_zalloc(n / 64 + 1, sizeof *t->has, MEM_TOK);
    if (!t->id || !t->has)
        return err(ERR_NOMEM, "texts of %zu tokens", n);
    for (int32_t id = 0; id < tok->n_vocab; id++) {
        if (!is_text(tok, id))
            continue;
        if (tok->piece[id].n > UINT16_MAX)
            return err(ERR_LIMIT, "token %d has %u bytes", id, (unsigned)tok->piece[id].n);
        t->has[id / 64] |= UINT64_C(1) << id % 64;
        t->id[t->n_ids++] = id;
    }
    qsort_r(t->id, (size_t)t->n_ids, sizeof *t->id, by_text, (void *)tok);
    int64_t n_nodes = 1;
    for (int32_t i = 0; i < t->n_ids; i++)
        n_nodes += (int64_t)tok->piece[t->id[i]].n - n_shared(tok, t, i);
    if (n_nodes >= INT32_MAX)
        return err(ERR_LIMIT, "texts of a vocabulary: %lld places", (long long)n_nodes);
    t->n_nodes = (int32_t)n_nodes;
    return 0;
}

/* open: the nodes on the way to the one that was made last, by depth. */
static void fill(const struct tok *tok, struct tok_trie *t, int32_t *open)
{
    int32_t node = 0;
    int depth = 0;

    open[0] = 0;
    for (int32_t i = 0; i < t->n_ids; i++) {
        int n, shared = n_shared(tok, t, i);
        const char *p = piece_of(tok, t->id[i], &n);
        for (; depth > shared; depth--)
            t->end[open[depth]] = node + 1;
        for (; depth < n; depth++) {
            open[depth + 1] = ++node;
            t->byte[node] = (uint8_t)p[depth];
            t->depth[node] = (uint16_t)(depth + 1);
            t->first[node] = i;
        }
        t->max_depth = n > t->max_depth ? n : t->max_depth;
    }
    for (; depth >= 0; depth--)
        t->end[open[depth]] = node + 1;
    t->first[node + 1] = t->n_ids;
}

int tok_trie_make(const struct tok *tok, struct tok_trie **out)
{
    struct tok_trie *t = mem_zalloc(1, sizeof *t, MEM_TOK);
    int rc = t ? pick(tok, t) : err(ERR_NOMEM, "texts of a vocabulary");

    *out = NULL;
    if (!rc) {
        size_t n = (size_t)t->n_nodes;
        int32_t *open = mem_alloc(((size_t)tok->max_piece_bytes + 1) * sizeof *open, MEM_TOK);
        t->byte = mem_zalloc(n, sizeof *t->byte, MEM_TOK);
        t->depth = mem_zalloc(n, sizeof *t->depth, MEM_TOK);
        t->end = mem_zalloc(n, sizeof *t->end, MEM_TOK);
        t->first = mem_zalloc(n + 1, sizeof *t->first, MEM_TOK);
        if (open && t->byte && t->depth && t->end && t->first)
            fill(tok, t, open);
        else
            rc = err(ERR_NOMEM, "texts of a vocabulary: %zu places", n);
        mem_free(open);
    }
    if (rc) {
        tok_trie_free(t);
        return rc;
    }
    *out = t;
    return 0;
}

void tok_trie_free(struct tok_trie *t)
{
    if (!t)
        return;
    mem_free(t->byte);
    mem_free(t->depth);
    mem_free(t->end);
    mem_free(t->first);
    mem_free(t->id);
    mem_free(t->has);
    mem_free(t);
}
