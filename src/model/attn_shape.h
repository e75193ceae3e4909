/* Attention over pages of which the host's memory holds some: what passes between a device and the host, and what of it lies
 * where. Pure arithmetic, for whoever plans it (plan_gpu.c) and whoever runs it (run/attn.c). */
#ifndef FERRY_MODEL_ATTN_SHAPE_H
#define FERRY_MODEL_ATTN_SHAPE_H

#include <stdint.h>

#include "src/model/program.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The most of all layers without a window. A segment is DEVICE_ATTN_SEGMENT_TOK positions. */
struct attn_shape {
    int64_t n_places; /* states of (row, segment) that a wave has room for; at least the rows of a step */
    uint64_t q_row, k_row, v_row, state_row; /* bytes of a row */
    uint64_t stage_page_bytes;               /* K and V of a layer in one page, aligned */
    uint64_t half_bytes; /* of the stage: a segment of a layer. One is filled while the other is computed with */
    /* Where the device's part has (n_places) states, (n_rows) sums, and the two halves; its bytes, 0: no layer lies on two sides */
    uint64_t states_off, sums_off, stage_off, dev_bytes;
    /* Where the host's part has (n_rows) q, k and v, and (n_places) states; its bytes */
    uint64_t q_off, k_off, v_off, host_states_off, host_bytes;
};

void attn_shape_of(const struct program *p, struct attn_shape *out);

/* Is it an op of a layer whose pages may lie on two sides? */
bool attn_shape_is_split(const struct op *op);

/* K and V of an op's layer in one page: they are neighbours there. */
uint64_t attn_shape_page_bytes(const struct op_attn *p);

/* An OP_ATTENTION as the host computes its share of it: OP_ATTN_STATES; dst: room for its result, without data. */
struct op attn_shape_states(const struct op *attention, int64_t n_rows, struct tensor *dst);

#ifdef __cplusplus
}
#endif
#endif
