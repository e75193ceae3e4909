/* Monotonic time. */
#ifndef FERRY_BASE_CLOCK_H
#define FERRY_BASE_CLOCK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Nanoseconds of CLOCK_MONOTONIC. Any thread. */
uint64_t clock_ns(void);

/* Tests: let clock_ns() give what this function gives from now on; NULL: the time again. Process-wide. */
void clock_pretend(uint64_t (*ns)(void));

#ifdef __cplusplus
}
#endif
#endif
