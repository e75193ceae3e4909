/* The shapes of ops.def, and whether a step fits them: what every device asks before it runs an op. */
#ifndef FERRY_DEVICE_DEVICE_CHECK_H
#define FERRY_DEVICE_DEVICE_CHECK_H

#include <stdbool.h>

#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Types and shapes go together; data may be NULL. Whether a device has a kernel for a type is its own business. Any thread. */
bool device_check_shapes(const struct op *op);

/* What is known only now: memory bound, rows within the tensors, tokens, positions, pages and slots in range. Given
 * device_check_shapes(). Reads no tensor. ERR_ARG names op, layer and numbers. */
int device_check_step(const struct op *op, const struct rows *rows);

#ifdef __cplusplus
}
#endif
#endif
