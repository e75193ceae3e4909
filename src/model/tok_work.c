/* What one encode call carries along, and the merging of neighbours that both kinds of tokenizer share: always the pair that
 * comes first in order, and of equal ones the leftmost. A heap keeps this O(n log n) for a word of any length. */
#include "src/model/tok_in.h"

#include "src/base/err.h"

void tok_work_done(struct tok_work *work)
{
    mem_free(work->ids);
    mem_free(work->sym);
    mem_free(work->heap);
    pcre2_match_data_free(work->match);
    *work = (struct tok_work){0};
}

/* Room for one more. */
static int grow(void **array, int64_t n, int64_t *cap, size_t item_bytes)
{
    if (n < *cap)
        return 0;
    int64_t new_cap = *cap ? *cap * 2 : 64;
    void *p = mem_realloc(*array, (size_t)new_cap * item_bytes, MEM_TOK);
    if (!p)
        return err(ERR_NOMEM, "tokenizing: %lld items of %zu bytes", (long long)new_cap, item_bytes);
    *array = p;
    *cap = new_cap;
    return 0;
}

int tok_work_id(struct tok_work *work, int32_t id)
{
    void *p = work->ids;
    int rc = grow(&p, work->n_ids, &work->cap_ids, sizeof *work->ids);
    work->ids = p;
    if (rc == 0)
        work->ids[work->n_ids++] = id;
    return rc;
}

int tok_work_sym(struct tok_work *work, uint32_t off, uint32_t n, int32_t id)
{
    void *p = work->sym;
    int rc = grow(&p, work->n_sym, &work->cap_sym, sizeof *work->sym);
    work->sym = p;
    if (rc)
        return rc;
    int32_t at = (int32_t)work->n_sym++;
    work->sym[at] = (struct tok_sym){.off = off, .n = n, .prev = at - 1, .next = -1, .id = id};
    if (at)
        work->sym[at - 1].next = at;
    return 0;
}

int tok_work_push(struct tok_work *work, const struct tok_node *node)
{
    void *p = work->heap;
    int rc = grow(&p, work->n_heap, &work->cap_heap, sizeof *work->heap);
    work->heap = p;
    if (rc)
        return rc;
    int64_t at = work->n_heap++;
    for (; at > 0 && work->heap[(at - 1) / 2].key > node->key; at = (at - 1) / 2)
        work->heap[at] = work->heap[(at - 1) / 2];
    work->heap[at] = *node;
    return 0;
}

bool tok_work_pop(struct tok_work *work, struct tok_node *out)
{
    if (work->n_heap == 0)
        return false;
    *out = work->heap[0];
    const struct tok_node last = work->heap[--work->n_heap];
    int64_t n = work->n_heap, at = 0;
    for (;;) {
        int64_t kid = at * 2 + 1;
        if (kid >= n)
            break;
        if (kid + 1 < n && work->heap[kid + 1].key < work->heap[kid].key)
            kid++;
        if (work->heap[kid].key >= last.key)
            break;
        work->heap[at] = work->heap[kid];
        at = kid;
    }
    if (n)
        work->heap[at] = last;
    return true;
}

static int offer(struct tok_work *work, int32_t left, int32_t right, tok_work_pair *pair)
{
    if (left < 0 || right < 0)
        return 0;
    const struct tok_sym *l = &work->sym[left], *r = &work->sym[right];
    uint32_t order;
    struct tok_node node = {.right = right, .n = l->n + r->n};
    if (!pair(work, l, r, &order, &node.result))
        return 0;
    node.key = (uint64_t)order << 32 | (uint32_t)left;
    return tok_work_push(work, &node);
}

int tok_work_merge(struct tok_work *work, tok_work_pair *pair)
{
    int rc = 0;
    work->n_heap = 0;
    for (int64_t i = 1; i < work->n_sym && rc == 0; i++)
        rc = offer(work, (int32_t)(i - 1), (int32_t)i, pair);
    struct tok_node node;
    while (rc == 0 && tok_work_pop(work, &node)) {
        int32_t left = (int32_t)(uint32_t)node.key;
        struct tok_sym *l = &work->sym[left], *r = &work->sym[node.right];
        /* Either may have merged with somebody else since: then it is eaten or the sum of bytes differs. */
        if (l->n == 0 || r->n == 0 || l->n + r->n != node.n)
            continue;
        l->n += r->n;
        l->id = node.result;
        l->next = r->next;
        r->n = 0;
        if (l->next >= 0)
            work->sym[l->next].prev = left;
        rc = offer(work, l->prev, left, pair);
        if (rc == 0)
            rc = offer(work, left, l->next, pair);
    }
    return rc;
}
