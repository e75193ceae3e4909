/* Inside cpu/: one walk of the team down an op list.
 *
 * Ops are of two sorts. Row-local ones read and write only their own rows: neighbours of this sort form a chain, which every
 * worker runs for the rows it owns with no barrier in between (a single row: whoever comes last to the barrier runs the
 * chain while the others wait there). Shared ones (matmul, attention, moe) are cut in pieces claimed by a counter, and may
 *   prepare  row-local work that belongs to the chain before (quantizing the activations),
 *   begin    by one worker before anyone starts,
 *   run      by all,
 *   finish   by one worker after all have run. */
#ifndef FERRY_CPU_WALK_H
#define FERRY_CPU_WALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/kern.h"
#include "cpu/pool.h"
#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

struct walk {
    const struct kern_table *kern; /* view */
    struct pool *pool;             /* view */
    int n_threads;
    enum device_prefill prefill;
    const struct op *ops; /* view (n_ops) */
    int n_ops;
    const struct rows *rows; /* view */
    char *own;               /* view (n_threads, own_bytes): scratch of each worker */
    uint64_t own_bytes;
    char *shared;           /* view: scratch of the op that runs */
    uint64_t ns[OP_N_KIND]; /* time by op, as worker 0 sees it */
    uint64_t serial_ns;     /* of it, spent by whoever ran a chain alone */
};

/* Scratch that an op needs: for each worker, and for all together. */
struct walk_need {
    uint64_t own_bytes, shared_bytes;
};

/* A shared op. Functions that are NULL have nothing to do. */
struct walk_shared {
    struct walk_need (*need)(const struct op *op, int n_rows, int n_threads);
    void (*prepare)(const struct walk *w, int worker, const struct op *op, int begin, int end);
    void (*begin)(const struct walk *w, int worker, const struct op *op);
    void (*run)(const struct walk *w, int worker, const struct op *op);
    void (*finish)(const struct walk *w, int worker, const struct op *op);
};

extern const struct walk_shared cpu_matmul_shared, cpu_heads_shared, cpu_attn_shared, cpu_attn_states_shared,
    cpu_moe_shared;
extern const struct walk_shared cpu_record_conv, cpu_record_delta;

/* NULL for a row-local op. */
const struct walk_shared *walk_shared(enum op_kind kind);

/* The job of one worker; arg is the struct walk. */
void walk_worker(int worker, void *arg);

/* A row-local op over rows [begin, end) of its row set. */
void cpu_rows_run(const struct walk *w, int worker, const struct op *op, int begin, int end);

/* By what a head's o is multiplied in the end: 1 / l, with what the op's sink adds to l. */
float cpu_attn_factor(const struct op *op, int head, float m, float l);

/* Most experts a router may choose from: their scores lie in a worker's scratch. */
#define CPU_ROWS_MAX_EXPERTS 8192

/* Rows an op runs over, and the step's row that its row i stands for. */
static inline int walk_n(const struct walk *w, const struct op *op)
{
    return op->rows == OP_ROWS_OUT ? w->rows->n_out : w->rows->n;
}

static inline int walk_row(const struct walk *w, const struct op *op, int i)
{
    return op->rows == OP_ROWS_OUT ? w->rows->out_row[i] : i;
}

static inline void *walk_own(const struct walk *w, int worker)
{
    return w->own + (uint64_t)worker * w->own_bytes;
}

/* Where pages of a sequence hold K or V of one head: `head` rows blocks of DEVICE_PAGE_TOK behind `off`. */
static inline char *walk_page(const struct walk *w, const struct op_attn *p, int row, int64_t page, uint64_t off,
                              int head, uint64_t row_bytes)
{
    char *base = (char *)w->rows->seqs[w->rows->seq[row]].page[p->group][page];
    return base + off + (uint64_t)head * DEVICE_PAGE_TOK * row_bytes;
}

/* Does the page of the row's own position lie here? */
static inline bool walk_has_page(const struct walk *w, const struct op_attn *p, int row)
{
    return w->rows->seqs[w->rows->seq[row]].page[p->group][w->rows->pos[row] / DEVICE_PAGE_TOK] != NULL;
}

#ifdef __cplusplus
}
#endif
#endif
