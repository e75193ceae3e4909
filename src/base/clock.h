/* Monotonic time, and what measurements of it say. */
#ifndef FERRY_BASE_CLOCK_H
#define FERRY_BASE_CLOCK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The middle of what was measured n times, n >= 1 (the mean of two if n is even), which it sorts, the least first. */
double clock_median(double *measured, size_t n);

/* Nanoseconds of CLOCK_MONOTONIC. Any thread. */
uint64_t clock_ns(void);

/* Tests: let clock_ns() give what this function gives from now on; NULL: the time again. Process-wide. */
void clock_pretend(uint64_t (*ns)(void));

#ifdef __cplusplus
}
#endif
#endif
