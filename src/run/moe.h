/* The MoE op's host side: from the router's choice to groups of rows by expert, on loan from the store. */
#ifndef FERRY_RUN_MOE_H
#define FERRY_RUN_MOE_H

#include "src/device/device.h"
#include "src/model/model.h"
#include "src/run/ahead.h"
#include "src/run/moe_split.h"

#ifdef __cplusplus
extern "C" {
#endif

struct program;
struct store;
struct store_expert;
struct trace;

/* What passed between host and device, and who computed how many rows of experts. */
struct moe_stats {
    uint64_t down_bytes, up_bytes;
    uint64_t n_rows, n_host_rows; /* an expert's for a token; of them, by the host beside a device */
};

/* Room for grouping one layer's rows; made once. Where a device has memory of its own (it is then "the device"), the host sees
 * copies of what the router chose and, in split plans, of the rows that its own experts read and give. */
struct moe {
    const struct model *model; /* view */
    struct store *store;       /* view */
    struct device *dev;        /* view: runs the ops */
    struct device *host;       /* view: runs the experts that are not in dev's memory; NULL: there are none */
    struct trace *trace;       /* view; may be NULL */
    int n_expert, k;
    int32_t *n_slots;         /* own: (n_expert) slots of each expert in this step */
    int32_t *first;           /* own: (n_expert) where its slots begin in slot */
    int32_t *ids;             /* own: (n_expert) the experts that have any, ascending */
    int32_t *slot;            /* own: (n_rows * k) */
    bool *is_host;            /* own: (n_expert) the host computes it in this step */
    struct op_expert *groups; /* own: (n_expert) */
    /* own: (n_expert) on loan; of them, those that go to the device; the same, where they are there, and their places */
    struct store_expert *given, *up, *there;
    int *places;
    float *scales; /* own: (n_layer, 3, n_expert) what products are multiplied by; NULL: nothing, in all layers */
    float *
        biases; /* own: (plan_bias_bytes()) the host's copy of what is added to products; NULL: nothing, or it lies there */
    const float **host_bias; /* own: (n_layer, 3) where in it they lie; NULL: as above */
    int32_t *chosen;         /* own, alloc_host: (n_rows, k) */
    float *x, *y;            /* own, alloc_host, with host: (n_rows, n_embd), (n_rows * k, n_embd) */
    struct ahead ahead;
    bool look_ahead;       /* the plan's: tell the store what the next layer will likely want */
    const int32_t *likely; /* view into ahead: (n_likely) of likely_layer */
    int n_likely, likely_layer;
    struct ahead_from later; /* what likely is guessed from once there is time; n_rows 0: it has been */
    struct tensor later_x;   /* of it */
    struct moe_split split;  /* with host */
    uint64_t (*clock)(void);
    struct moe_stats stats;
};

struct moe_args {
    const struct program *program; /* view until moe_done, as all here; its weights are bound */
    struct store *store;
    struct device *dev, *host; /* host: with a split plan; otherwise NULL */
    struct trace *trace;       /* may be NULL */
    bool look_ahead;
    int n_ahead; /* experts that are named for a row */
    /* With host: */
    const struct plan *plan;
    const struct offload_rates *rates; /* what is thought of costs before any is measured */
    uint64_t (*clock)(void);           /* nanoseconds */
};

/* ERR_NOMEM, ERR_DEVICE. A dense model takes nothing. */
int moe_init(struct moe *moe, const struct moe_args *args);
void moe_done(struct moe *moe);

/* Run one OP_MOE: group the rows by the expert ids in op->src[1], borrow those experts, and let each be computed where it lies, as
 * they become readable: the device's are queued first, so that it computes while the host does. Adds the bytes of the experts
 * used to *expert_bytes. ERR_FORMAT (an id out of range), what the store and the devices say. */
int moe_run(struct moe *moe, const struct op *op, const struct rows *rows, uint64_t *expert_bytes);

/* Has the host to see what an OP_MOE's router chose, and to call moe_run? Otherwise the device may run the op with the others. That is so
 * for a layer whose experts all lie there, where no trace wants to know which were chosen. */
bool moe_wants_host(const struct moe *moe, const struct op *op);

/* Such an op has been run: what it used, of experts as many as the rows can have chosen at most. */
void moe_count_unseen(struct moe *moe, const struct op *op, int n_rows, uint64_t *expert_bytes);

/* From the next layer on, does the device compute experts that host and device share? */
void moe_use_gpu(struct moe *moe, bool use);

#ifdef __cplusplus
}
#endif
#endif
