/* What k_gemm.cu and k_gemm_wgmma.cu share: how weights lie, how the edges of a matrix are copied; and how the one calls the other. */
#ifndef FERRY_CUDA_GEMM_CUH
#define FERRY_CUDA_GEMM_CUH

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"

/* How a type lies: blocks of LEN columns in BYTES. Floats count as blocks of 32. */
template <int TYPE> struct cu_storage {
    static constexpr int LEN = cu_block<TYPE>::LEN, BYTES = cu_block<TYPE>::BYTES;
};

#define CU_FLOAT_STORAGE(NAME)                                                                 \
    template <> struct cu_storage<QUANT_##NAME> {                                              \
        static constexpr int LEN = 32, BYTES = 32 * (int)sizeof(cu_float<QUANT_##NAME>::word); \
    };
CU_FLOAT_TYPES(CU_FLOAT_STORAGE)

/* 16 aligned bytes from `from + at` on, of which only those of the chunk and of the matrix are touched. */
static __device__ inline void cu_copy_edge(uint8_t *to, const uint8_t *from, int at, int n_bytes)
{
    for (int e = at < 0 ? -at : 0; e < 16 && at + e < n_bytes; e++)
        to[e] = from[at + e];
}

/* The multiple of 16 there or before: to mask an address is less than to subtract from it. */
static __device__ inline const uint8_t *cu_aligned16(const uint8_t *p)
{
    return reinterpret_cast<const uint8_t *>(reinterpret_cast<uintptr_t>(p) & ~(uintptr_t)15);
}

/* So often do all multiprocessors get a block. */
static inline int64_t cu_n_rounds(int64_t n_rows, int rows, int64_t n_place, int tok, int n_multiprocessors)
{
    int64_t n_blocks = (n_rows + rows - 1) / rows * ((n_place + tok - 1) / tok);
    return (n_blocks + n_multiprocessors - 1) / n_multiprocessors;
}

/* cu_gemm and what belongs to it, on a card that has_wgmma. */
cudaError_t cu_wgmma_prepare(void);
int cu_wgmma_tile_tok(const struct cu_card *card, int64_t n_rows, int n_place);
cudaError_t cu_wgmma(const struct cu_mat_args *a, cudaStream_t stream);

#endif
