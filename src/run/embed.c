/* Pooling of hidden states. */
#include "src/run/embed.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"

int embed_init(struct embed *e, enum embed_pooling pooling, int n_embd)
{
    *e = (struct embed){.pooling = pooling, .n_embd = n_embd};
    if (pooling == EMBED_NONE)
        return 0;
    e->value = mem_zalloc((size_t)n_embd, sizeof *e->value, MEM_OTHER);
    if (pooling == EMBED_MEAN)
        e->sum = mem_zalloc((size_t)n_embd, sizeof *e->sum, MEM_OTHER);
    if (e->value && (e->sum || pooling != EMBED_MEAN))
        return 0;
    embed_done(e);
    return err(ERR_NOMEM, "an embedding of %d values", n_embd);
}

void embed_done(struct embed *e)
{
    mem_free(e->sum);
    mem_free(e->value);
    *e = (struct embed){0};
}

void embed_add(struct embed *e, const float *hidden)
{
    e->n_tok++;
    if (e->pooling == EMBED_LAST)
        memcpy(e->value, hidden, (size_t)e->n_embd * sizeof *hidden);
    for (int i = 0; i < e->n_embd && e->pooling == EMBED_MEAN; i++)
        e->sum[i] += (double)hidden[i];
}

void embed_finish(struct embed *e, bool normalize)
{
    double square = 0;

    for (int i = 0; i < e->n_embd && e->pooling == EMBED_MEAN; i++)
        e->value[i] = (float)(e->sum[i] / (double)e->n_tok);
    for (int i = 0; i < e->n_embd; i++)
        square += (double)e->value[i] * (double)e->value[i];
    for (int i = 0; i < e->n_embd && normalize && square > 0; i++)
        e->value[i] = (float)((double)e->value[i] / sqrt(square));
}
