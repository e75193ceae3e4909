/* The k best values of long rows: slices of a row give their best, by one block each, and one block for the row the best of those. */
#include "cuda/launch.h"

#include "cuda/device.cuh"

/* THREADS of a block; keys that a slice looks at at once; keys in which the slices of a row may end; slices of all rows from which each
 * row gets no more of them: enough to fill a GPU. Powers of two. */
enum { THREADS = 512, CHUNK = 2048, MOST_KEYS = 4096, MANY_SLICES = 1024 };

/* Larger for better values, different for all: of equal ones the lower id is better. 0: not finite. */
static __device__ inline uint64_t key_of(float x, int64_t id)
{
    uint32_t bits = cu_bits_of_f32(x + 0.0f); /* zeros of either sign are equal */
    uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
    return is_finite ? (uint64_t)order << 32 | (0xffffffffu - (uint32_t)id) : 0;
}

static __device__ inline int32_t id_of(uint32_t low)
{
    return (int32_t)(0xffffffffu - low);
}

static __device__ inline void put_in_order(uint64_t *a, uint64_t *b, bool is_falling)
{
    uint64_t x = *a, y = *b;

    if ((x < y) == is_falling) {
        *a = y;
        *b = x;
    }
}

/* The lower of pair t among keys that are paired with those `stride` further on. Powers of two. */
static __device__ inline int lower_of(int t, int stride)
{
    return 2 * t - (t & (stride - 1));
}

/* Make falling runs of `len` of the keys (n), powers of two both (bitonic). All of the block. */
static __device__ inline void sort_runs(uint64_t *keys, int n, int len)
{
    for (int size = 2; size <= len; size *= 2)
        for (int stride = size / 2; stride; stride /= 2) {
            for (int t = (int)threadIdx.x; t < n / 2; t += THREADS) {
                int i = lower_of(t, stride);
                put_in_order(&keys[i], &keys[i + stride], size == len || !(i & size));
            }
            __syncthreads();
        }
}

/* Of falling runs (n_runs, 2^log_len) leave the best of all as the first one; n_runs is a power of two. A round puts the best of each two
 * into the first: of key i of one and key i from behind of the other, the larger. What comes of that falls, then rises, so that only the
 * last part of a sort is left to do. */
static __device__ inline void merge_runs(uint64_t *keys, int n_runs, int log_len)
{
    int len = 1 << log_len, n = n_runs << log_len; /* n: keys of the runs that stay */

    for (int apart = len; apart < n_runs * len; apart *= 2) {
        n /= 2;
        for (int t = (int)threadIdx.x; t < n; t += THREADS) {
            int first = (t >> log_len) * 2 * apart, i = t & (len - 1);
            uint64_t other = keys[first + apart + len - 1 - i];
            keys[first + i] = keys[first + i] < other ? other : keys[first + i];
        }
        __syncthreads();
        for (int stride = len / 2; stride; stride /= 2) {
            for (int t = (int)threadIdx.x; t < n / 2; t += THREADS) {
                int at = lower_of(t, stride), i = (at >> log_len) * 2 * apart + (at & (len - 1));
                put_in_order(&keys[i], &keys[i + stride], true);
            }
            __syncthreads();
        }
    }
}

/* What both kernels are told. */
struct top_args {
    struct cu_top_args a;
    int log_len, n_slices; /* 2^log_len: what each slice gives, k or more */
};

/* The keys that n values take, in whole runs of `len`: a power of two up to CHUNK. */
static __device__ inline int n_keys_of(int64_t n, int len)
{
    int n_keys = len;

    while (n_keys < n && n_keys < CHUNK)
        n_keys *= 2;
    return n_keys;
}

/* blockIdx.x is the slice, blockIdx.y the row. */
static __global__ void CU_BOUNDS(THREADS, 1) top_of_slice(const struct top_args p)
{
    CU_SHARED_DYN(uint64_t, keys);
    const float *x = p.a.x + blockIdx.y * p.a.x_stride;
    int64_t width = p.a.width, per_slice = (width + p.n_slices - 1) / p.n_slices;
    int64_t at = blockIdx.x * per_slice, end = at + per_slice < width ? at + per_slice : width;
    int len = 1 << p.log_len;
    uint64_t *out = p.a.scratch + (blockIdx.y * (int64_t)p.n_slices + blockIdx.x) * len;

    cu_await();
    for (int n_kept = 0;; n_kept = len) { /* the best of the chunks before are the first run of the next one */
        int n = n_keys_of(n_kept + end - at, len);
        for (int i = (int)threadIdx.x + n_kept; i < n; i += THREADS) {
            int64_t id = at + i - n_kept;
            keys[i] = id < end ? key_of(x[id], id) : 0;
        }
        __syncthreads();
        sort_runs(keys, n, len);
        merge_runs(keys, n >> p.log_len, p.log_len);
        at += n - n_kept;
        if (at >= end)
            break;
    }
    for (int i = (int)threadIdx.x; i < len; i += THREADS)
        out[i] = keys[i];
}

/* blockIdx.x is the row. shared: (n_runs, len), a power of two of runs. */
static __global__ void CU_BOUNDS(THREADS, 1) top_of_row(const struct top_args p)
{
    CU_SHARED_DYN(uint64_t, keys);
    const float *x = p.a.x + blockIdx.x * p.a.x_stride;
    int n_runs = 1, len = 1 << p.log_len;
    const uint64_t *in = p.a.scratch + blockIdx.x * (int64_t)p.n_slices * len;
    int32_t *out = p.a.dst + blockIdx.x * p.a.dst_stride;

    cu_await();
    while (n_runs < p.n_slices)
        n_runs *= 2;
    for (int i = (int)threadIdx.x; i < n_runs * len; i += THREADS)
        keys[i] = i < p.n_slices * len ? in[i] : 0;
    __syncthreads();
    merge_runs(keys, n_runs, p.log_len);
    /* By id: with the halves of a key changed, a lower one is the larger. */
    for (int i = (int)threadIdx.x; i < len; i += THREADS)
        keys[i] = i < p.a.k ? keys[i] << 32 | keys[i] >> 32 : 0;
    __syncthreads();
    sort_runs(keys, len, len);
    for (int i = (int)threadIdx.x; i < p.a.k; i += THREADS) {
        int32_t id = keys[i] ? id_of((uint32_t)(keys[i] >> 32)) : -1;
        out[i] = id;
        out[p.a.k + i] = id < 0 ? 0 : (int32_t)cu_bits_of_f32(x[id]);
    }
}

/* The least log_len that does for k. */
static int log_of(int k)
{
    int log_len = 0;

    while (1 << log_len < k)
        log_len++;
    return log_len;
}

static int least(int64_t a, int64_t b)
{
    return (int)(a < b ? a : b);
}

/* Slices of each of n_rows rows. */
static int n_slices_of(int n_rows, int64_t width, int log_len)
{
    int n = least((width + CHUNK - 1) / CHUNK, MOST_KEYS >> log_len), most = MANY_SLICES / n_rows;

    return most < 1 ? 1 : least(n, most);
}

uint64_t cu_top_scratch_bytes(int n_rows, int64_t width, int k)
{
    /* Fewer rows have more slices each, but never more than these together. */
    int64_t n = (int64_t)n_rows * n_slices_of(1, width, log_of(k)), most = n_rows > MANY_SLICES ? n_rows : MANY_SLICES;

    return ((uint64_t)least(n, most) << log_of(k)) * sizeof(uint64_t);
}

cudaError_t cu_top(const struct cu_top_args *a, cudaStream_t stream)
{
    struct top_args p = {};
    int n_runs = 1;

    p.a = *a;
    p.log_len = log_of(a->k);
    p.n_slices = n_slices_of(a->n, a->width, p.log_len);
    while (n_runs < p.n_slices)
        n_runs *= 2;
    cudaError_t e = CU_LAUNCH((top_of_slice), dim3((unsigned)p.n_slices, (unsigned)a->n), dim3(THREADS),
                              CHUNK * sizeof(uint64_t), stream, p);
    return e ? e
             : CU_LAUNCH((top_of_row), dim3((unsigned)a->n), dim3(THREADS),
                         ((size_t)n_runs << p.log_len) * sizeof(uint64_t), stream, p);
}
