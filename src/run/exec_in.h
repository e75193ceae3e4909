/* Between the parts of the executor: what a step needs (exec.c), and the walk down the op list (exec_walk.c). */
#ifndef FERRY_RUN_EXEC_IN_H
#define FERRY_RUN_EXEC_IN_H

#include <stdint.h>

#include "src/device/device.h"
#include "src/model/program.h"
#include "src/run/attn.h"
#include "src/run/exec.h"
#include "src/run/lift.h"
#include "src/run/moe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Layers that one device computes, one list of ops. */
struct part {
    struct device *dev;      /* view */
    struct program *program; /* own; NULL: there are no such layers */
    void *arena;             /* own: (program->arena_bytes) */
    struct kv_seq *seqs;     /* own: (n_seqs) the step's pages */
    struct moe *moe;         /* view */
    struct attn attn;        /* where the host's memory holds pages beside the device's; otherwise zeros */
};

struct exec {
    const struct model *model; /* view */
    struct store *store;       /* view */
    struct trace *trace;       /* view */
    struct part main, before;  /* the device's; the host's, whose arena is alloc_host's */
    struct part half; /* the device's layers once more, with an arena of their own, for the second half of a step */
    struct moe moe, before_moe;
    struct lift lift;                                        /* the host's layers, by the device; zeros: never */
    int lift_rows;                                           /* in steps of so many */
    struct device *host;                                     /* view; NULL: the device computes all */
    void *scratch;                                           /* own: (scratch_bytes), in the device's memory */
    void *host_scratch;                                      /* own: (host_scratch_bytes) */
    uint64_t arena_bytes, scratch_bytes, host_scratch_bytes; /* arena: main's */
    float *logits; /* own: (n_out, n_vocab) where the device's memory is not the host's; else NULL */
    int32_t *best; /* own: (best_bytes) with logits; as TOP_K gives them */
    uint64_t best_bytes;
    void *top_data;       /* view: where TOP_K's results lie in the device's memory */
    struct tensor top;    /* what TOP_K gives in this step, all rows side by side; ne[0] 0: it is left out */
    const float *said;    /* view: the last step's logits (n_out, n_vocab), of rows whose n_top is 0 */
    const int32_t *n_top; /* view: of the last step's batch */
    int n_said;           /* rows of the last step that have logits */
    int n_seqs;
    int n_hidden;     /* rows whose hidden states the last step left */
    struct tier tier; /* with host */
    uint64_t (*clock)(void);
    uint64_t dense_bytes; /* that a step reads: all dense weights but the embedding table, unless it is also the head */
    struct exec_stats stats;
};

/* Run all ops over a step's rows, queued. n_second: so many of them, the last, are a half of their own (batch.h); 0: none. cancel as
 * exec_run's. What the devices say, ERR_CANCEL; where the step was in halves nothing is under way then. */
int exec_walk(struct exec *e, const struct rows *rows, int n_second, const int *cancel);

/* Run ops (n) that want no experts. */
int exec_walk_dense(struct exec *e, const struct part *part, const struct op *ops, int n, const struct rows *rows);

#ifdef __cplusplus
}
#endif
#endif
