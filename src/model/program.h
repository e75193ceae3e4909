/* A model laid out as one flat list of ops with the shapes of everything they touch. Pure: no data, no device.
 * The planner asks it for bytes; exec binds memory to it and runs it. */
#ifndef FERRY_MODEL_PROGRAM_H
#define FERRY_MODEL_PROGRAM_H

#include "src/device/device.h"
#include "src/model/arch.h"
#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

struct program_args {
    const struct model *model; /* view, outlives the program */
    int n_rows;                /* most rows of a step */
    int n_out;                 /* most rows of logits of a step; at most n_rows */
    enum quant_type kv_type;
    bool has_top;           /* with the last layer: TOP_K of the logits comes last */
    struct model_span span; /* the layers; zeros: all. Those before another span are the host's, beside a device */
};

/* ops run in order. Each OP_MOE has its gate, up and down stacks in w[0..2] and wants the host's help (a lease) first, so
 * the list falls into segments between them. */
struct program {
    const struct model *model; /* view */
    struct model_span span;
    int n_rows, n_out;
    struct op *ops; /* own: (n_ops); their tensors point into views and weights */
    int n_ops, n_moe;
    struct tensor *views;    /* own: (n_views) activations: a register with the width it has there */
    enum arch_reg *view_reg; /* own: (n_views) */
    int n_views;
    struct tensor *weights; /* own: (model->n_weights), data NULL until bound */
    const struct tensor *x; /* (n_rows, n_embd), one of views: what goes from layer to layer, and from span to span */
    const struct tensor *logits; /* (n_out, n_vocab), the same; NULL: the span has not the last layer */
    struct op *top;              /* the last of ops, for a step that wants the best logits alone; NULL: not asked for */
    /* Not among ops: the final norm of all rows, in place, for a step that wants hidden states; dst[0] (n_rows, n_embd). It comes
     * after ops, which read what it overwrites. Zeros without the last layer. */
    struct op hidden;
    struct kv_shape kv;
    uint64_t reg_off[ARCH_N_REG]; /* where each register lies in the arena */
    uint64_t arena_bytes;
};

/* ERR_UNSUPPORTED (head size the KV type cannot hold), ERR_ARG (n_rows, n_out), ERR_FORMAT (shapes that do not fit together), ERR_NOMEM. */
int program_make(const struct program_args *args, struct program **out);
void program_free(struct program *p); /* takes NULL */

/* What passes between a device with memory of its own and the host, where the host computes some of the experts: rows that
 * experts read, which ones were chosen, rows that they give. Bytes for n_rows; 0 without experts. */
struct program_host {
    uint64_t x_bytes, ids_bytes, y_bytes;
};
void program_host_bytes(const struct program *p, struct program_host *out);

/* Point the registers into arena (arena_bytes, 64-byte aligned; view). */
void program_bind_arena(struct program *p, void *arena);

#ifdef __cplusplus
}
#endif
#endif
