/* Kernels of recurrent layers: what they read and write of a sequence, its record, is another before and after the step. */
#include "cuda/launch.h"

#include "cuda/device.cuh"
#include "cuda/math.cuh"

/* ---- CONV ---- */

enum { CONV_THREADS = 128 };

/* A column of a row, and what was before it. */
struct conv_at {
    const float *x;    /* the row's value */
    const float *from; /* of the record; NULL: zeros */
    int n_before;      /* rows of the sequence before this one that are in the step, k - 1 at most */
};

/* `back` positions ago. */
static __device__ inline float conv_value(const struct cu_conv_args *a, const struct conv_at *at, int back)
{
    if (back <= at->n_before)
        return at->x[-(int64_t)back * a->x_stride];
    return at->from ? at->from[(a->k - 1 - (back - at->n_before)) * a->width] : 0.0f;
}

/* A thread for each value; that of a sequence's last row writes the next record. */
static __global__ void conv(const struct cu_conv_args a)
{
    int64_t col = (int64_t)blockIdx.x * CONV_THREADS + threadIdx.x;
    int row = (int)blockIdx.y;

    cu_await();
    if (col >= a.width)
        return;
    int seq = a.step.seq[row];
    const char *record = static_cast<const char *>(a.step.record[2 * seq]);
    struct conv_at at = {a.x + row * a.x_stride + col, NULL, 0};
    if (record)
        at.from = reinterpret_cast<const float *>(record + a.off) + col;
    while (at.n_before < a.k - 1 && at.n_before < row && a.step.seq[row - at.n_before - 1] == seq)
        at.n_before++;
    const float *w = a.w + col * a.k;
    float y = w[0] * conv_value(&a, &at, a.k - 1);
    for (int j = 1; j < a.k; j++)
        y = fmaf(w[j], conv_value(&a, &at, a.k - 1 - j), y);
    a.dst[row * a.dst_stride + col] = cu_silu(y);
    if (row < a.n - 1 && a.step.seq[row + 1] == seq)
        return;
    float *to = reinterpret_cast<float *>(static_cast<char *>(a.step.record[2 * seq + 1]) + a.off) + col;
    for (int j = 0; j < a.k - 1; j++)
        to[j * a.width] = conv_value(&a, &at, a.k - 2 - j);
}

cudaError_t cu_conv(const struct cu_conv_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->width + CONV_THREADS - 1) / CONV_THREADS), (unsigned)a->n);
    return CU_LAUNCH((conv), grid, dim3(CONV_THREADS), 0, stream, *a);
}

/* ---- DELTA_NET ---- */

/* A block has some columns of a head's S in registers and walks down a sequence's rows with them: four neighbouring lanes have a column,
 * lane c rows c, c + 4, ...: its chain. q, k and what the head forgets and learns are fetched for some rows at once. */
enum { CHAINS = 4, COLUMNS = 32, DELTA_THREADS = CHAINS * COLUMNS, TILE = 8 };

/* Chains c and c + 2, then 0 and 1; all four lanes get the sum. */
static __device__ inline float chains_sum(float x)
{
    x += cu_shfl_xor(x, 2);
    return x + cu_shfl_xor(x, 1);
}

/* Rows [first, first + n) to shared memory: q (TILE, d_k), k (TILE, d_k), decays, betas (TILE). */
static __device__ inline void fetch_tile(const struct cu_delta_args *a, int head, int first, int n, float *shared)
{
    const int dim = a->p.head_dim_k, me = (int)threadIdx.x;
    const int of = a->p.is_tiled ? head % a->p.n_head_k : head / (a->p.n_head_v / a->p.n_head_k);
    float *q = shared, *k = q + TILE * dim, *decay = k + TILE * dim, *beta = decay + TILE;

    for (int i = me; i < n * dim; i += DELTA_THREADS) {
        const float *x = a->x + (first + i / dim) * a->x_stride + (int64_t)of * dim + i % dim;
        q[i] = x[0];
        k[i] = x[(int64_t)a->p.n_head_k * dim];
    }
    if (me < n) {
        float alpha = a->alpha[(first + me) * a->alpha_stride + head];
        decay[me] = cu_exp(a->rate[head] * cu_softplus(alpha + a->bias[head]));
        beta[me] = cu_sigmoid(a->beta[(first + me) * a->beta_stride + head]);
    }
}

/* ROWS: of S that a lane has at most. */
template <int ROWS> static __global__ void delta_net(const struct cu_delta_args a)
{
    CU_SHARED_DYN(float, shared);
    const int dim = a.p.head_dim_k, dim_v = a.p.head_dim_v, head = (int)blockIdx.y;
    const int chain = (int)threadIdx.x % CHAINS, col = (int)blockIdx.x * COLUMNS + (int)threadIdx.x / CHAINS;
    const float *q = shared, *k = q + TILE * dim, *decay = k + TILE * dim, *beta = decay + TILE;
    const int64_t out = (int64_t)head * dim_v + col, at = (int64_t)head * dim * dim_v + col;
    const bool is_in = col < dim_v;
    float s[ROWS];

    cu_await();
    const int begin = a.step.stretch[blockIdx.z], end = a.step.stretch[blockIdx.z + 1], seq = a.step.seq[begin];
    const char *record = static_cast<const char *>(a.step.record[2 * seq]);
    const float *from = record ? reinterpret_cast<const float *>(record + a.p.off) + at : NULL;
    float *to = reinterpret_cast<float *>(static_cast<char *>(a.step.record[2 * seq + 1]) + a.p.off) + at;
    CU_UNROLL
    for (int j = 0; j < ROWS; j++) {
        int i = CHAINS * j + chain;
        s[j] = from && is_in && i < dim ? from[(int64_t)i * dim_v] : 0.0f;
    }
    for (int first = begin; first < end; first += TILE) {
        const int n = end - first < TILE ? end - first : (int)TILE;
        __syncthreads(); /* the last tile has been read */
        fetch_tile(&a, head, first, n, shared);
        __syncthreads();
        for (int row = 0; row < n; row++) {
            const float *x = a.x + (first + row) * a.x_stride + 2 * (int64_t)a.p.n_head_k * dim;
            float v = is_in ? x[out] : 0.0f, sum = 0.0f;
            CU_UNROLL
            for (int j = 0; j < ROWS; j++) {
                int i = CHAINS * j + chain;
                s[j] *= decay[row];
                sum = i < dim ? fmaf(s[j], k[row * dim + i], sum) : sum;
            }
            float d = (v - chains_sum(sum)) * beta[row];
            sum = 0.0f;
            CU_UNROLL
            for (int j = 0; j < ROWS; j++) {
                int i = CHAINS * j + chain;
                s[j] = i < dim ? fmaf(k[row * dim + i], d, s[j]) : 0.0f;
                sum = i < dim ? fmaf(s[j], q[row * dim + i], sum) : sum;
            }
            sum = chains_sum(sum);
            if (is_in && chain == 0)
                a.dst[(first + row) * a.dst_stride + out] = sum * a.scale;
        }
    }
    CU_UNROLL
    for (int j = 0; j < ROWS; j++) {
        int i = CHAINS * j + chain;
        if (is_in && i < dim)
            to[(int64_t)i * dim_v] = s[j];
    }
}

cudaError_t cu_delta_net(const struct cu_delta_args *a, cudaStream_t stream)
{
    const int dim = a->p.head_dim_k;
    dim3 grid((unsigned)((a->p.head_dim_v + COLUMNS - 1) / COLUMNS), (unsigned)a->p.n_head_v, (unsigned)a->n_stretches);
    size_t bytes = (size_t)(2 * TILE * dim + 2 * TILE) * sizeof(float);

    if (dim <= 64)
        return CU_LAUNCH((delta_net<16>), grid, dim3(DELTA_THREADS), bytes, stream, *a);
    if (dim <= 128)
        return CU_LAUNCH((delta_net<32>), grid, dim3(DELTA_THREADS), bytes, stream, *a);
    return CU_LAUNCH((delta_net<CU_DELTA_MAX_DIM / CHAINS>), grid, dim3(DELTA_THREADS), bytes, stream, *a);
}
