/* Inside cpu/: which ops this device runs. */
#ifndef FERRY_CPU_CPU_CAN_H
#define FERRY_CPU_CPU_CAN_H

#include <stdbool.h>

#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Types and shapes; data may be NULL. Any thread. */
bool cpu_can(const struct op *op);

#ifdef __cplusplus
}
#endif
#endif
