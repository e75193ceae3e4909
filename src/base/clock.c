/* Monotonic time. */
#define _POSIX_C_SOURCE 200809L
#include "src/base/clock.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

static uint64_t (*_Atomic pretended)(void);

void clock_pretend(uint64_t (*ns)(void))
{
    atomic_store_explicit(&pretended, ns, memory_order_relaxed);
}

uint64_t clock_ns(void)
{
    uint64_t (*ns)(void) = atomic_load_explicit(&pretended, memory_order_relaxed);
    struct timespec ts;

    if (ns)
        return ns();

    clock_gettime(CLOCK_MONOTONIC, &ts); /* cannot fail for this clock on Linux */
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double clock_median(double *measured, size_t n)
{
    qsort(measured, n, sizeof *measured, by_value);
    return n % 2 ? measured[n / 2] : (measured[n / 2 - 1] + measured[n / 2]) / 2;
}
