/* Attention of a layer whose KV pages lie on two sides, in the memory of a device and in the host's. */
#ifndef FERRY_RUN_ATTN_H
#define FERRY_RUN_ATTN_H

#include <stdbool.h>

#include "src/device/device.h"
#include "src/model/attn_shape.h"

#ifdef __cplusplus
extern "C" {
#endif

struct attn_job;
struct batch;

/* What passed between host and device, and who computed how many segments (of a row and a layer), those that came up included. */
struct attn_stats {
    uint64_t down_bytes, up_bytes;
    uint64_t n_dev_segments, n_host_segments, n_staged_segments;
};

/* Room for one layer; made once. */
struct attn {
    struct device *dev, *host;     /* views; host: the CPU */
    const struct program *program; /* view */
    struct attn_shape shape;
    int stage_rows; /* the plan's */
    int n_seqs;
    char *dev_memory;            /* own: (shape.dev_bytes) of the device */
    char *host_memory;           /* own, alloc_host: (shape.host_bytes) */
    const struct kv_seq *on_dev; /* view of the step: (n_seqs) its pages in the device's memory */
    struct kv_seq *on_host;      /* own: (n_seqs) in the host's */
    struct kv_seq *staged;       /* own: (n_seqs) on_dev, but for the sequence that is being staged */
    void **table;                /* own: (n_pages) of that sequence */
    int64_t n_pages;
    bool *has_host;       /* own: (n_seqs) has pages in the host's memory */
    bool is_split;        /* some sequence of the step has */
    int fence;            /* the device's: what came down is there */
    struct attn_job *job; /* own: the stretch of rows that is worked on */
    bool is_open;         /* attn_start has left it to attn_finish */
    struct attn_stats stats;
};

struct attn_args {
    const struct program *program; /* view until attn_done, as all here; bound */
    struct device *dev, *host;
    int n_seqs;    /* most of a step */
    int64_t n_ctx; /* positions of a sequence */
    int stage_rows; /* from so many rows of a sequence in a step on, its pages come up; below, the host computes with them */
    int fence;      /* the number of one of the device's that nobody else uses */
};

/* ERR_NOMEM, ERR_DEVICE. */
int attn_init(struct attn *a, const struct attn_args *args);
void attn_done(struct attn *a);

/* Before a step: where the pages of the batch's sequences [first_seq, end_seq) lie, of whose rows the next calls will be. on_dev:
 * (batch->n_seqs) what cache_view gave; view until the step's end. */
void attn_begin(struct attn *a, const struct batch *batch, int first_seq, int end_seq, const struct kv_seq *on_dev);

/* Shall attn_start have this OP_KV_APPEND and the OP_ATTENTION behind it? Otherwise all pages that they touch are the device's. */
static inline bool attn_wants(const struct attn *a, const struct op *op)
{
    return a->is_split && op->kind == OP_KV_APPEND && op->p.attn.window == 0;
}

/* Run both, ops[0] and ops[1]. Keys and values go to where the page of their position lies. The device computes its segments; the
 * host's are computed with by the host meanwhile, or, for sequences with many rows, come up in stages, one computed with while the next
 * is on its way. All segments' states are merged on the device in ascending order, so that no bit depends on where a page lies.
 * attn_start leaves to attn_finish what the host does for the last rows, if it does anything for them: until then the device may be given
 * anything that does not want these rows' results. Each attn_start wants its attn_finish. rows: views until then.
 * ERR_DEVICE and what else the devices say; nothing is under way then. */
int attn_start(struct attn *a, const struct op *ops, const struct rows *rows);
int attn_finish(struct attn *a);

#ifdef __cplusplus
}
#endif
#endif
