/* Who runs in the next step, with how many rows. Pure arithmetic on numbers that the caller gives: no sequence is touched. */
#ifndef FERRY_RUN_SCHED_H
#define FERRY_RUN_SCHED_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct sched_seq {
    int64_t len;       /* positions that were run */
    int64_t n_tok;     /* tokens to run in all, more than len */
    int64_t cut;       /* a step that begins before this position does not go beyond it */
    int64_t first_out; /* tokens from here on give logits */
    bool waits;        /* for its pages: it gets no row */
    bool is_second;    /* its row is of the step's second half (batch.h) */
    int n_rows, n_out; /* set by sched_rows: rows of the next step, and how many of them (the last) give logits */
};

struct sched_limits {
    int n_rows;    /* of a step */
    int chunk_tok; /* rows of sequences that have more than one token to run, all together */
    int n_out;     /* rows of logits of a step */
};

/* Set n_rows and n_out of seqs (n), which stand oldest first. Who has one token to run gets its row, so that decoding waits
 * for one chunk at most; the others share the chunk, oldest first. Somebody always gets a row, if limits hold at least n
 * rows, one of them in the chunk, and n rows of logits, and not all wait. */
void sched_rows(struct sched_seq *seqs, int n, const struct sched_limits *limits);

/* May a sequence that has n_tok positions to fill begin beside n_running others, with free_tok positions free? Every other
 * one is taken to want a page soon; alone it always may. */
bool sched_admits(int64_t n_tok, int64_t free_tok, int n_running);

#ifdef __cplusplus
}
#endif
#endif
