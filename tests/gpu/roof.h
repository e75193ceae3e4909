/* Kernels that do one thing as fast as the card can: what the others are measured by. */
#ifndef FERRY_TESTS_GPU_ROOF_H
#define FERRY_TESTS_GPU_ROOF_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ROOF_THREADS = 256 };
/* Of one thread and round; of one warp and round. */
#define ROOF_DP4A_OPS (8 * 8.0)
#define ROOF_MMA_FLOPS (4 * 16 * 8 * 16 * 2.0)

struct roof_args {
    const void *in;   /* (n_bytes), which are read once */
    uint32_t *out;    /* (1): hardly ever written; the compiler does not know that */
    uint64_t n_bytes; /* multiple of 16 */
    int n_rounds, n_blocks;
};
cudaError_t roof_read(const struct roof_args *a, cudaStream_t stream); /* 16 bytes a thread and load */
cudaError_t roof_dp4a(const struct roof_args *a, cudaStream_t stream); /* products of 4 bytes, 8 sums a thread */
cudaError_t roof_mma(const struct roof_args *a, cudaStream_t stream);  /* halves in tensor cores, 4 tiles a warp */

#ifdef __cplusplus
}
#endif
#endif
