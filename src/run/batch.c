/* The rows of one step. */
#include "src/run/batch.h"

#include <assert.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"

int batch_init(struct batch *b, int cap_rows, int cap_seqs)
{
    memset(b, 0, sizeof *b);
    b->cap_rows = cap_rows;
    b->cap_seqs = cap_seqs;
    b->token = mem_zalloc((size_t)cap_rows, sizeof *b->token, MEM_META);
    b->pos = mem_zalloc((size_t)cap_rows, sizeof *b->pos, MEM_META);
    b->seq = mem_zalloc((size_t)cap_rows, sizeof *b->seq, MEM_META);
    b->out_row = mem_zalloc((size_t)cap_rows, sizeof *b->out_row, MEM_META);
    b->n_top = mem_zalloc((size_t)cap_rows, sizeof *b->n_top, MEM_META);
    b->seqs = mem_zalloc((size_t)cap_seqs, sizeof *b->seqs, MEM_META);
    if (b->token && b->pos && b->seq && b->out_row && b->n_top && b->seqs)
        return 0;
    batch_done(b);
    return err(ERR_NOMEM, "a batch of %d rows", cap_rows);
}

void batch_done(struct batch *b)
{
    mem_free(b->seqs);
    mem_free(b->n_top);
    mem_free(b->out_row);
    mem_free(b->seq);
    mem_free(b->pos);
    mem_free(b->token);
    memset(b, 0, sizeof *b);
}

void batch_clear(struct batch *b)
{
    b->n_rows = b->n_out = b->n_prompt = b->n_seqs = b->n_second = 0;
    b->wants_hidden = false;
}

void batch_add(struct batch *b, struct cache_seq *seq, const int32_t *token, int n, int32_t pos, int n_logits,
               bool prompt)
{
    assert(b->n_rows + n <= b->cap_rows && b->n_seqs < b->cap_seqs && n_logits <= n);
    assert(!prompt || b->n_prompt == b->n_rows);
    b->seqs[b->n_seqs] = seq;
    for (int i = 0; i < n; i++) {
        int row = b->n_rows + i;
        b->token[row] = token[i];
        b->pos[row] = pos + i;
        b->seq[row] = b->n_seqs;
        if (i < n - n_logits)
            continue;
        b->n_top[b->n_out] = 0;
        b->out_row[b->n_out++] = row;
    }
    b->n_rows += n;
    b->n_seqs++;
    if (prompt)
        b->n_prompt = b->n_rows;
}

void batch_set_top(struct batch *b, int n)
{
    assert(b->n_out > 0 && b->out_row[b->n_out - 1] == b->n_rows - 1);
    b->n_top[b->n_out - 1] = n;
}
