/* Monotonic time. */
#ifndef FERRY_BASE_CLOCK_H
#define FERRY_BASE_CLOCK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Nanoseconds of CLOCK_MONOTONIC. Any thread. */
uint64_t clock_ns(void);

#ifdef __cplusplus
}
#endif
#endif
