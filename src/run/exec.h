/* The engine's one executor: walks a model's op list over a batch. Owns the activations and the device's scratch, both laid
 * out when it is opened: a step allocates nothing. One thread at a time. */
#ifndef FERRY_RUN_EXEC_H
#define FERRY_RUN_EXEC_H

#include <stdint.h>

#include "src/device/device.h"
#include "src/model/model.h"
#include "src/plan/plan.h"
#include "src/run/batch.h"
#include "src/run/cache_back.h"
#include "src/run/landing.h"
#include "src/run/lift.h"
#include "src/run/moe_split.h"
#include "src/run/sample.h"
#include "src/run/tier.h"

#ifdef __cplusplus
extern "C" {
#endif

struct exec;
struct store;
struct trace;

struct exec_args {
    const struct model *model; /* this and all below: views, outlive the executor */
    const struct plan *plan;
    struct device *device;
    struct device *
        host; /* the CPU, with a plan in which it computes layers, experts or attention beside the device; otherwise NULL */
    struct store *store;
    struct trace *trace; /* NULL: nobody wants to know */
    /* With host: what is thought of costs before any is measured (copied), and nanoseconds that rise; NULL: clock_ns(). */
    const struct offload_rates *rates;
    uint64_t (*clock)(void);
};

/* ERR_NOMEM, ERR_UNSUPPORTED (names the op that the device cannot run). */
int exec_open(const struct exec_args *args, struct exec **out);
/* Between two steps: another pace of reading from now on. Without slots and io_uring (plan.pace.n_reads 0) it changes nothing. */
void exec_set_pace(struct exec *e, const struct plan_pace *pace);

void exec_close(struct exec *e); /* takes NULL */

/* Run one step: in halves where the plan has them and the batch says so, else as a whole, which changes no bit. Keys and values go into
 * the batch's sequences (the caller reserved room and commits afterwards).
 * *logits: (batch->n_out, n_vocab), a view until the next run, with those rows filled that want all (batch.n_top); NULL if no row wanted
 * any. cancel (may be NULL): when it is
 * seen to be non-zero between layers, the step is given up with ERR_CANCEL and nothing of it counts.
 * ERR_ARG (token out of range), ERR_LIMIT (more rows than the plan's), ERR_IO from the store, ERR_DEVICE. */
int exec_run(struct exec *e, const struct batch *batch, const int *cancel, const float **logits);

/* What there is of row i of the last run's logits: all, or at least as many of the best as it wanted. Views until the next run; the batch
 * of that run is still as it was. */
void exec_row(const struct exec *e, int i, struct sample_row *row);

/* Copy the hidden states (after the final norm) of n rows of the last run, from row `first` on, to out (n, n_embd). Its batch said
 * wants_hidden; no row need have wanted logits. ERR_STATE: they were not asked for, or there are not so many; ERR_DEVICE. */
int exec_hidden(struct exec *e, int first, int n, float *out);

struct exec_stats {
    uint64_t n_steps, n_rows;
    uint64_t n_halved;      /* of the steps, in halves */
    uint64_t weight_bytes;  /* of the weights that the steps touched, each once a step */
    uint64_t expert_bytes;  /* of these, experts; where the device alone knows which (moe.h), as many as could be */
    uint64_t scratch_bytes; /* activations, and scratch of all devices */
    /* Between a device with memory of its own and the host, beside what a step says (struct rows): rows of the host's layers, the router's
     * choices, experts' rows, what attention on two sides needs, logits. */
    uint64_t down_bytes, up_bytes;
    uint64_t n_expert_rows,
        n_host_rows; /* a chosen expert's for a token; of them, computed by the host beside a device, or before it */
    struct lift_stats lift;       /* the host's layers, by the device */
    bool is_lift_refused;         /* the plan has them lifted, but the system does not pin their weights */
    struct moe_split_stats split; /* zeros without a host beside the device, as the following */
    struct landing_stats landing;
    uint64_t n_launches;                                         /* of a device with memory of its own */
    struct tier tier;                                            /* whether it computes experts */
    uint64_t n_dev_segments, n_host_segments, n_staged_segments; /* of KV pages that a row saw in a layer: attn.h */
    struct cache_back_stats back;                                /* of the last step's cache */
};
void exec_stats(const struct exec *e, struct exec_stats *out);

#ifdef __cplusplus
}
#endif
#endif
