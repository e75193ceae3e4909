/* The MoE op's host side: from the router's choice to groups of rows by expert, on loan from the store. */
#ifndef FERRY_RUN_MOE_H
#define FERRY_RUN_MOE_H

#include "src/device/device.h"
#include "src/model/model.h"
#include "src/run/ahead.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store;
struct store_expert;
struct trace;

/* Room for grouping one layer's rows; made once. */
struct moe {
    int n_expert, k, n_rows;
    int32_t *n_slots;           /* own: (n_expert) slots of each expert in this step */
    int32_t *first;             /* own: (n_expert) where its slots begin in slot */
    int32_t *ids;               /* own: (n_expert) the experts that have any, ascending */
    int32_t *slot;              /* own: (n_rows * k) */
    int32_t *chosen;            /* own: (n_rows * k) the router's choice, where the device's memory is not the host's */
    struct op_expert *groups;   /* own: (n_expert) */
    struct store_expert *given; /* own: (n_expert) */
    struct trace *trace;        /* view; may be NULL */
    struct ahead ahead;
    bool look_ahead; /* the plan's: tell the store what the next layer will likely want */
};

/* ERR_NOMEM. A dense model takes nothing. m and trace are views until moe_done. */
int moe_init(struct moe *moe, const struct model *m, int n_rows, bool look_ahead, struct trace *trace);
void moe_done(struct moe *moe);

/* Run one OP_MOE: group the rows by the expert ids in op->src[1], borrow those experts, and let the device compute them as
 * they become readable. Adds the bytes of the experts used to *expert_bytes. ERR_FORMAT (an id out of range), what the store
 * and the device say. */
int moe_run(struct moe *moe, const struct model *m, struct store *store, struct device *dev, const struct op *op,
            const struct rows *rows, uint64_t *expert_bytes);

#ifdef __cplusplus
}
#endif
#endif
