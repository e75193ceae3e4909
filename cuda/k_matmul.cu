/* Matrices times rows by the arithmetic of cpu/kern.h, bit for bit, whatever the number of rows: which kernel it is, and the one for
 * floats. Experts are matrices that a tile names. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/mat.cuh"
#include "cuda/math.cuh"

enum { THREADS = 256 };

/* ---- float dots: 16 lanes for each two weight rows ---- */

enum { FLOAT_ROWS = 2, FLOAT_BLOCK = THREADS / 16 * FLOAT_ROWS, AT_ONCE = 16 };

/* N steps of a lane from column c on: loads before products, so that all are under way at once. */
template <int TYPE, int N>
static __device__ inline void add_products(const typename cu_float<TYPE>::word *const *w, const float *x, int c,
                                           float *acc)
{
    typename cu_float<TYPE>::word part[FLOAT_ROWS][N];
    float part_x[N];

    CU_UNROLL
    for (int i = 0; i < N; i++) {
        part_x[i] = x[c + 16 * i];
        CU_UNROLL
        for (int r = 0; r < FLOAT_ROWS; r++)
            part[r][i] = w[r][c + 16 * i];
    }
    CU_UNROLL
    for (int i = 0; i < N; i++) {
        CU_UNROLL
        for (int r = 0; r < FLOAT_ROWS; r++)
            acc[r] = fmaf(cu_float<TYPE>::value(part[r][i]), part_x[i], acc[r]);
    }
}

template <int TYPE> static __global__ void gemv_float(const struct cu_mat_args a)
{
    typedef cu_float<TYPE> type;
    int lane = (int)threadIdx.x % 16, first = (int)blockIdx.x * FLOAT_BLOCK + (int)threadIdx.x / 16 * FLOAT_ROWS;
    cu_await_ids(&a);
    if (cu_is_unlisted(&a))
        return;
    struct cu_work k = cu_work_of(&a);
    const typename type::word *w[FLOAT_ROWS];

    if ((int)blockIdx.x * FLOAT_BLOCK >= k.n_rows)
        return;
    cu_await();
    for (int r = 0; r < FLOAT_ROWS; r++) {
        int row = first + r < k.n_rows ? first + r : k.n_rows - 1;
        w[r] = reinterpret_cast<const typename type::word *>(k.w + (uint64_t)row * a.w_stride);
    }
    for (int tok = 0; tok < k.n; tok++) {
        const float *x = static_cast<const float *>(cu_x_of(&a, cu_nth_place(&a, k.first, tok)));
        float acc[FLOAT_ROWS] = {};
        int c = lane;
        for (; c + 16 * (AT_ONCE - 1) < (int)a.n_cols; c += 16 * AT_ONCE)
            add_products<TYPE, AT_ONCE>(w, x, c, acc);
        for (; c < (int)a.n_cols; c += 16)
            add_products<TYPE, 1>(w, x, c, acc);
        for (int r = 0; r < FLOAT_ROWS; r++) {
            acc[r] = cu_tree16_shfl(acc[r]);
            if (lane == 0 && first + r < k.n_rows)
                cu_put(&a, &k, cu_nth_place(&a, k.first, tok), first + r, acc[r]);
        }
    }
}

/* A matrix of few rows, such as a router's, for few places keeps few multiprocessors busy, however it is cut: there what counts is how
 * long one row takes. All of a block bring two rows and x into shared memory, from where a warp multiplies them. */
enum {
    FEW_ROWS = 1024,
    FEW_THREADS = 128,
    FEW_CHUNK = 2048,
    FEW_STRIDE = FEW_CHUNK + 16,
    FEW_BATCH = FEW_CHUNK / FEW_THREADS
};

/* n elements, 1 to BATCH for each thread, all of a thread's loads under way at once: a choice for each would hold them up, so that those
 * behind the last bring that one again, to places that nobody reads. */
template <int TYPE, int BATCH>
static __device__ inline void bring(const typename cu_float<TYPE>::word *from, int n, float *to)
{
    typename cu_float<TYPE>::word part[BATCH];

    CU_UNROLL
    for (int i = 0; i < BATCH; i++) {
        int at = (int)threadIdx.x + i * FEW_THREADS;
        part[i] = from[at < n ? at : n - 1];
    }
    CU_UNROLL
    for (int i = 0; i < BATCH; i++)
        to[(int)threadIdx.x + i * FEW_THREADS] = cu_float<TYPE>::value(part[i]);
}

/* n: 1 to FEW_CHUNK. The choice is one for the whole block. */
template <int TYPE> static __device__ inline void bring_all(const typename cu_float<TYPE>::word *from, int n, float *to)
{
    if (n <= FEW_CHUNK / 8)
        bring<TYPE, FEW_BATCH / 8>(from, n, to);
    else
        bring<TYPE, FEW_BATCH>(from, n, to);
}

template <int TYPE> static __global__ void gemv_float_few(const struct cu_mat_args a)
{
    CU_SHARED_DYN(float, shared); /* two rows, x; (FEW_STRIDE) each */
    typedef typename cu_float<TYPE>::word word;
    cu_await_ids(&a);
    if (cu_is_unlisted(&a))
        return;
    struct cu_work k = cu_work_of(&a);
    int first = (int)blockIdx.x * 2, mine = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;
    int n_cols = (int)a.n_cols, n_rows = k.n_rows - first < 2 ? k.n_rows - first : 2;
    const word *w = reinterpret_cast<const word *>(k.w + (uint64_t)first * a.w_stride);
    const word *next = reinterpret_cast<const word *>(k.w + (uint64_t)(first + n_rows - 1) * a.w_stride);
    float *x = shared + 2 * FEW_STRIDE;

    if (n_rows <= 0)
        return;
    for (int tok = 0; tok < k.n; tok++) {
        float acc = 0.0f;
        for (int at = 0; at < n_cols; at += FEW_CHUNK) {
            int n = n_cols - at < FEW_CHUNK ? n_cols - at : (int)FEW_CHUNK;
            if (tok == 0 || n_cols > FEW_CHUNK) {
                bring_all<TYPE>(w + at, n, shared);
                bring_all<TYPE>(next + at, n, shared + FEW_STRIDE);
            }
            cu_await(); /* weights are there before any kernel of the call */
            bring_all<QUANT_F32>(static_cast<const float *>(cu_x_of(&a, cu_nth_place(&a, k.first, tok))) + at, n, x);
            __syncthreads();
            if (mine < 2)
                acc = cu_lane_dot(shared + mine * FEW_STRIDE, x, lane, n, acc);
            __syncthreads();
        }
        if (threadIdx.x >= 32)
            continue;
        acc = cu_tree16_shfl(acc);
        if (lane == 0 && mine < n_rows)
            cu_put(&a, &k, cu_nth_place(&a, k.first, tok), first + mine, acc);
    }
}

template <int TYPE> static cudaError_t launch_float(const struct cu_mat_args *a, cudaStream_t stream)
{
    int most = cu_most_rows(a);
    dim3 grid((unsigned)((most + FLOAT_BLOCK - 1) / FLOAT_BLOCK), cu_n_tiles(a), 1 + (unsigned)a->n_more);
    dim3 few((unsigned)((most + 1) / 2), grid.y, grid.z);

    if (most <= FEW_ROWS && a->n_place <= CU_GEMV_TOK)
        return CU_LAUNCH((gemv_float_few<TYPE>), few, dim3(FEW_THREADS), 3 * FEW_STRIDE * sizeof(float), stream, *a);
    return CU_LAUNCH((gemv_float<TYPE>), grid, dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_gemv(const struct cu_mat_args *a, cudaStream_t stream)
{
    if (quant_info((int)a->type)->act != QUANT_ACT_F32)
        return a->tile_tok == CU_GEMM_INT_TOK ? cu_gemm_int(a, stream) : cu_gemv_int(a, stream);
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return launch_float<QUANT_##NAME>(a, stream);
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}
