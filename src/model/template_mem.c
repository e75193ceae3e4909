/* Memory of a template: a chain of blocks that is freed at once, and texts that grow. */
#include "src/model/template_in.h"

#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"

struct template_block {
    struct template_block *next;
    char pad[56]; /* what follows keeps the alignment of the block */
};

#define BLOCK_BYTES 16384

void *template_mem_get(struct template_mem *mem, size_t bytes, int *rc)
{
    bytes = (bytes + 15) & ~(size_t)15;
    if (bytes > mem->max_bytes - mem->total) {
        *rc = err(ERR_LIMIT, "chat template: it needs over %zu bytes", mem->max_bytes);
        return NULL;
    }
    if (bytes > mem->left) {
        size_t want = bytes > BLOCK_BYTES ? bytes : BLOCK_BYTES;
        struct template_block *b = mem_alloc(sizeof *b + want, MEM_OTHER);
        if (!b) {
            *rc = err(ERR_NOMEM, "chat template: %zu bytes", want);
            return NULL;
        }
        b->next = mem->head;
        mem->head = b;
        mem->at = (char *)(b + 1);
        mem->left = want;
    }
    char *p = mem->at;
    mem->at += bytes;
    mem->left -= bytes;
    mem->total += bytes;
    return p;
}

void template_mem_done(struct template_mem *mem)
{
    while (mem->head) {
        struct template_block *next = mem->head->next;
        mem_free(mem->head);
        mem->head = next;
    }
    mem->left = 0;
}

int template_mem_add(struct template_buf *buf, const char *p, size_t n)
{
    if (n > buf->max_bytes - buf->n)
        return err(ERR_LIMIT, "chat template: a text of over %zu bytes", buf->max_bytes);
    if (buf->n + n + 1 > buf->cap) {
        size_t cap = buf->cap ? buf->cap : 256;
        while (cap < buf->n + n + 1)
            cap *= 2;
        char *q = mem_realloc(buf->p, cap, MEM_OTHER);
        if (!q)
            return err(ERR_NOMEM, "chat template: %zu bytes", cap);
        buf->p = q;
        buf->cap = cap;
    }
    if (n)
        memcpy(buf->p + buf->n, p, n);
    buf->n += n;
    buf->p[buf->n] = 0;
    return 0;
}
