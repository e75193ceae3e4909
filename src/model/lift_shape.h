/* Layers whose weights lie in the host's memory, computed by a device for a step of many rows: what of their weights stays on the device,
 * and what comes up each time, through two rooms in turn. Pure arithmetic, for whoever plans it (plan_gpu.c) and whoever runs it
 * (run/lift.c). */
#ifndef FERRY_MODEL_LIFT_SHAPE_H
#define FERRY_MODEL_LIFT_SHAPE_H

#include <stdint.h>

#include "src/model/program.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Where each weight begins on the device. */
#define LIFT_ALIGN 256

enum { LIFT_ROOMS = 2 };

struct lift_shape {
    int n_products;       /* the nth one's weights are in room n % LIFT_ROOMS */
    uint64_t room_bytes;  /* of the one that has the most */
    uint64_t small_bytes; /* of all other weights, which stay: of norms, biases */
    uint64_t bytes;       /* of the device's memory: the small ones, then the rooms */
};

/* Do its weights come up for each step? */
bool lift_shape_is_product(const struct op *op);

void lift_shape_of(const struct program *p, struct lift_shape *out);

/* Bytes of all weights that come up for a step. */
uint64_t lift_shape_up_bytes(const struct program *p);

/* A weight that ops read; NULL: this op's ith is none that goes up (what is looked up in a table stays). */
const struct tensor *lift_shape_weight(const struct op *op, int i);

#ifdef __cplusplus
}
#endif
#endif
