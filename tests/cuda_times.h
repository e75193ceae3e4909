/* Times of products by the virtual clock of the emulated runtime: weights over the GPU's rate; what else a kernel reads is in its caches.
 * lint: C, as Check's suites are */
#ifndef FERRY_TESTS_CUDA_TIMES_H
#define FERRY_TESTS_CUDA_TIMES_H

#include "tests/emu/emu.h"

#include "cuda/launch.h"

#include <check.h>
#include <string.h>

/* Slow ones, so that a nanosecond is nothing; the way is so fast that what crosses is little beside what is computed. */
#define GPU_RATE 1e6
#define PCIE_RATE 1e9

static inline uint64_t ns_of(double bytes, double rate)
{
    return (uint64_t)(bytes * 1e9 / rate + 0.5);
}

/* Matrices that a launch multiplies with, an expert's each time that one is wanted. The clock asks when what was queued before has run, and
 * device memory can be read. */
static inline int matrices_of(const struct cu_mat_args *a)
{
    return a->n_listed ? *a->n_listed : a->tiles ? a->n_tiles : a->ids ? a->n_place : 1;
}

/* 0: the launch multiplies with no weights. */
static inline uint64_t product_ns(const struct emu_launch *l)
{
    const struct cu_mat_args *a = (const struct cu_mat_args *)((const char *)l->closure + l->args_off);

    if (!strstr(l->name, "gemv") && !strstr(l->name, "gemm_int"))
        return 0;
    ck_assert_uint_ge(l->closure_bytes - l->args_off, sizeof *a); /* what all products' arguments begin with */
    int n_rows = a->n_rows;
    for (int i = 0; i < a->n_more; i++)
        n_rows += a->more[i].n_rows;
    return ns_of((double)a->w_stride * n_rows * matrices_of(a), GPU_RATE);
}

#endif
