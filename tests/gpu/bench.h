/* The parts of bench_gpu: a device with room to work in, and how something on it is timed. */
#ifndef FERRY_TESTS_GPU_BENCH_H
#define FERRY_TESTS_GPU_BENCH_H

#include <cuda_runtime_api.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "cuda/launch.h"

struct bench {
    bool is_quick; /* shapes that the emulated runtime can bear: figures mean nothing */
    cudaStream_t stream, copy;
    cudaEvent_t from, to, copied; /* from, to: what is timed; copied: of the copy stream */
    char *dev, *host;             /* own: random bytes in the GPU's memory; pinned memory */
    uint64_t dev_bytes, host_bytes;
    uint64_t cold_bytes; /* so much read between two visits leaves nothing of the first in the L2 cache */
    struct cu_card card;
    double read_bytes_per_s, dp4a_ops_per_s, mma_flops_per_s, up_bytes_per_s, down_bytes_per_s; /* measured roofs */
    json_t *rows;                                                                               /* own */
};

/* Queue run number i on b->stream. */
typedef cudaError_t bench_fn(const struct bench *b, void *ctx, int i);

/* Seconds that one of n runs takes, queued one behind another: the median of five such rows, after one that warms up. ERR_DEVICE. */
int bench_time(struct bench *b, bench_fn *fn, void *ctx, int n, double *s);

/* The same of runs as a step has them: one CUDA graph, in which kernels are brought up while those before them still run, where the card
 * can (launch.h: cu_overlap). */
int bench_time_step(struct bench *b, bench_fn *fn, void *ctx, int n, double *s);

/* "x: what the runtime said", or 0. */
int bench_failed(cudaError_t e, const char *what);

/* bytes from *at on, 256-byte aligned, of the GPU's room; ERR_LIMIT. */
int bench_take(const struct bench *b, uint64_t *at, uint64_t bytes, void **out);

/* A row of results. View, to which more can be added; NULL is fine there. */
json_t *bench_row(struct bench *b, const char *name, const char *what, double s);

/* Fill it with what it says; ERR_DEVICE, ERR_LIMIT. In this order: the roofs are what the others are measured by. */
int bench_copy_rates(struct bench *b);
int bench_kernels_roofs(struct bench *b);
int bench_kernels(struct bench *b);
int bench_copy_overlap(struct bench *b);

/* The peer of cu_gemm: cuBLAS, where a library of it is found. 0: there is none, or it refused. Seconds a product of halves
 * (n_rows, n_cols) times (n_cols, n_tok). */
double bench_blas(struct bench *b, int n_rows, int n_cols, int n_tok);

#endif
