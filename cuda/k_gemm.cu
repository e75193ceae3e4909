/* Matrices times rows by tensor cores on halves, for many rows. Experts are matrices that a tile names. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/mat.cuh"
#include "cuda/math.cuh"
#include "cuda/ptx.cuh"

enum { THREADS = 256 };

/* A block makes 64 weight rows x 64 places; its 4 warps have 32 x 32 each. Columns come in steps of 32: rows of x by
 * asynchronous copies some steps ahead, weights through registers, dequantized while the step before is multiplied. Rows in
 * shared memory are 40 halves apart: 8 neighbouring rows then begin in different banks. */
enum { GEMM_ROWS = 64, GEMM_K = 32, GEMM_THREADS = 128, GEMM_STRIDE = 40, GEMM_STAGES = 3 };

uint64_t cu_half_bytes(int64_t n)
{
    return cu_up16((uint64_t)n * 2) + 16;
}

/* A block for each row. */
static __global__ void to_halves(const struct cu_act_args a)
{
    CU_SHARED_DYN(float, part); /* (THREADS / 32) */
    const float *x = a.x + blockIdx.x * a.x_stride;
    char *row = static_cast<char *>(a.out) + blockIdx.x * a.out_stride;
    float mine = 0.0f, amax = 0.0f;

    for (int64_t k = threadIdx.x; k < a.width; k += THREADS)
        mine = cu_max(fabsf(x[k]), mine);
    mine = cu_amax_of_warp(mine);
    part[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++)
        amax = cu_max(part[i], amax);
    /* amax = 1.m * 2^e becomes 1.m * 2^14: no half overflows, and what is 2^28 times smaller is a normal half still. */
    int e = (int)(cu_bits_of_f32(amax) >> 23 & 255) - 127;
    e = e < -100 ? -100 : e;
    float up = cu_f32_of_bits((uint32_t)(14 - e + 127) << 23), down = cu_f32_of_bits((uint32_t)(e - 14 + 127) << 23);
    for (int64_t k = threadIdx.x; k < a.width; k += THREADS)
        reinterpret_cast<uint16_t *>(row)[k] = cu_f32_to_half(x[k] * up);
    if (threadIdx.x == 0)
        *reinterpret_cast<float *>(row + a.out_stride - 16) = down;
}

cudaError_t cu_half(const struct cu_act_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((to_halves), dim3((unsigned)a->n_rows), dim3(THREADS), THREADS / 32 * sizeof(float), stream, *a);
}

/* Copy step `step` of the places' rows into its stage: 64 rows of 4 pieces of 16 bytes. */
static __device__ inline void fetch_x(const struct cu_mat_args *a, const struct cu_work *k, int64_t step, uint16_t *stage)
{
    if (step < a->n_cols / GEMM_K)
        for (int i = (int)threadIdx.x; i < CU_GEMM_TOK * 4; i += GEMM_THREADS) {
            int tok = i / 4, piece = i % 4, place = k->first + (tok < k->n ? tok : 0);
            cu_async_copy16(stage + tok * GEMM_STRIDE + piece * 8,
                            static_cast<const char *>(cu_x_of(a, place)) + step * GEMM_K * 2 + piece * 16);
        }
    cu_async_commit();
}

/* Two threads for each weight row and step: both unpack the group, each writes a half of it. */
template <int TYPE>
static __device__ inline void fetch_w(const struct cu_mat_args *a, const struct cu_work *k, int64_t step, uint16_t *tile)
{
    int r = (int)threadIdx.x / 2, side = (int)threadIdx.x % 2;
    int64_t row = (int64_t)blockIdx.x * GEMM_ROWS + r;
    uint16_t *out = tile + r * GEMM_STRIDE + 16 * side;

    if (row < a->n_rows) {
        float x[32];
        cu_row<TYPE>::load32(k->w + (uint64_t)row * a->w_stride, step, a->books, x);
        for (int e = 0; e < 16; e++)
            out[e] = cu_f32_to_half(x[16 * side + e]);
    } else {
        for (int e = 0; e < 16; e++)
            out[e] = 0;
    }
}

/* acc (2, 4, 4) += the warp's 32 weight rows x 32 places over one step. */
static __device__ inline void multiply(const uint16_t *w, const uint16_t *x, float acc[2][4][4])
{
    for (int kk = 0; kk < GEMM_K; kk += 16) {
        struct cu_frag_a fa[2];
        for (int m = 0; m < 2; m++)
            fa[m] = cu_load_a(w + m * 16 * GEMM_STRIDE + kk, GEMM_STRIDE);
        for (int n = 0; n < 4; n++) {
            struct cu_frag_b fb = cu_load_b(x + n * 8 * GEMM_STRIDE + kk, GEMM_STRIDE);
            for (int m = 0; m < 2; m++)
                cu_mma(acc[m][n], &fa[m], &fb);
        }
    }
}

/* A lane holds rows lane / 4 and + 8, places 2 * (lane % 4) and + 1 of each 16 x 8. */
static __device__ inline void write_tile(const struct cu_mat_args *a, const struct cu_work *k, int row0, int tok0,
                                         const float acc[2][4][4])
{
    int lane = (int)threadIdx.x % 32;

    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 4; n++)
            for (int i = 0; i < 4; i++) {
                int row = row0 + 16 * m + lane / 4 + i / 2 * 8, tok = tok0 + 8 * n + lane % 4 * 2 + i % 2;
                if (row >= a->n_rows || tok >= k->n)
                    continue;
                const char *x = static_cast<const char *>(cu_x_of(a, k->first + tok));
                float down = *reinterpret_cast<const float *>(x + a->x_stride - 16);
                cu_put(a, k, k->first + tok, row, acc[m][n][i] * down);
            }
}

template <int TYPE> static __global__ void gemm(const struct cu_mat_args a)
{
    CU_SHARED_DYN(uint16_t, x); /* GEMM_STAGES of (CU_GEMM_TOK, GEMM_STRIDE), then two of (GEMM_ROWS, GEMM_STRIDE) */
    const int x_len = CU_GEMM_TOK * GEMM_STRIDE, w_len = GEMM_ROWS * GEMM_STRIDE;
    uint16_t *w = x + GEMM_STAGES * x_len;
    struct cu_work k = cu_work_of(&a);
    int warp = (int)threadIdx.x / 32, row0 = warp / 2 * 32, tok0 = warp % 2 * 32;
    int64_t n_step = a.n_cols / GEMM_K;
    float acc[2][4][4] = {};

    for (int s = 0; s < GEMM_STAGES - 1; s++)
        fetch_x(&a, &k, s, x + s * x_len);
    fetch_w<TYPE>(&a, &k, 0, w);
    for (int64_t step = 0; step < n_step; step++) {
        cu_async_wait<GEMM_STAGES - 2>();
        __syncthreads(); /* what this step reads is there, and nobody reads what the next lines write any more */
        int64_t ahead = step + GEMM_STAGES - 1;
        fetch_x(&a, &k, ahead, x + ahead % GEMM_STAGES * x_len);
        if (step + 1 < n_step)
            fetch_w<TYPE>(&a, &k, step + 1, w + (step + 1) % 2 * w_len);
        multiply(w + step % 2 * w_len + row0 * GEMM_STRIDE, x + step % GEMM_STAGES * x_len + tok0 * GEMM_STRIDE, acc);
    }
    cu_async_wait<0>();
    write_tile(&a, &k, (int)blockIdx.x * GEMM_ROWS + row0, tok0, acc);
}

template <int TYPE> static cudaError_t launch_gemm(const struct cu_mat_args *a, cudaStream_t stream)
{
    size_t bytes = (GEMM_STAGES * CU_GEMM_TOK + 2 * GEMM_ROWS) * GEMM_STRIDE * sizeof(uint16_t);
    dim3 grid((unsigned)((a->n_rows + GEMM_ROWS - 1) / GEMM_ROWS), cu_n_tiles(a));
    return CU_LAUNCH((gemm<TYPE>), grid, dim3(GEMM_THREADS), bytes, stream, *a);
}

cudaError_t cu_gemm(const struct cu_mat_args *a, cudaStream_t stream)
{
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return launch_gemm<QUANT_##NAME>(a, stream);
        CU_QUANT_TYPES(CASE)
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}
