/* Inside cpu/: which ops this device runs, and whether a step fits them. */
#ifndef FERRY_CPU_CPU_CAN_H
#define FERRY_CPU_CPU_CAN_H

#include <stdbool.h>

#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Types and shapes; data may be NULL. Any thread. */
bool cpu_can(const struct op *op);

/* What is known only now: memory bound, rows within the tensors, tokens, positions and slots in range. Given cpu_can().
 * ERR_ARG names op, layer and numbers. */
int cpu_can_step(const struct op *op, const struct rows *rows);

#ifdef __cplusplus
}
#endif
#endif
