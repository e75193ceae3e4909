/* The rows of one step: (token, position, sequence, wants logits). Filled by a session or the scheduler, read by exec. */
#ifndef FERRY_RUN_BATCH_H
#define FERRY_RUN_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct cache_seq;

struct batch {
    int cap_rows, cap_seqs;
    int n_rows, n_out, n_prompt, n_seqs;
    int32_t *token, *pos, *seq; /* own: (cap_rows) */
    int32_t *out_row;           /* own: (cap_rows) rows that want logits, ascending */
    int32_t *n_top;    /* own: (cap_rows) for each of them, how many of the best logits are enough; 0: all are wanted */
    bool wants_hidden; /* the step gives hidden states, too (exec_hidden); batch_clear says no */
    struct cache_seq **seqs; /* own array of views: (cap_seqs) */
    /* The last n_second rows, generated ones of sequences of their own, may be a half of their own: the host attends to rows of one while a
     * device has the other's to do. Fewer than n_rows; batch_clear says 0. */
    int n_second;
};

/* ERR_NOMEM. */
int batch_init(struct batch *b, int cap_rows, int cap_seqs);
void batch_done(struct batch *b);

/* Empty it. */
void batch_clear(struct batch *b);

/* Add n consecutive tokens of a sequence from position pos on, whose room cache_reserve made; logits are wanted of the last
 * n_logits of them. prompt: they are given, not generated (device.h, n_prompt); prompt rows come before all others.
 * They must fit: the caller cut them to size. */
void batch_add(struct batch *b, struct cache_seq *seq, const int32_t *token, int n, int32_t pos, int n_logits,
               bool prompt);

/* Of the logits of the row added last the n best are enough; 0: all are wanted, as after batch_add. */
void batch_set_top(struct batch *b, int n);

#ifdef __cplusplus
}
#endif
#endif
