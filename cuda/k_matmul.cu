/* Matrices times rows by the integer arithmetic of cpu/kern.h, bit for bit, whatever the number of rows (by tensor cores:
 * k_gemm.cu). Experts are matrices that a tile names. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/mat.cuh"
#include "cuda/math.cuh"

enum { THREADS = 256, GEMV_ROWS = THREADS / 32, FLOAT_ROWS = THREADS / 16 };

/* ---- activations ---- */

/* Behind the codes of a row stands one of these for each 32 or 256 of them. */
struct act_s32 {
    float d;
    int32_t sum;
};

struct act_s256 {
    float d;
    int16_t sub[8];
    int16_t sum16[16]; /* of sub * code */
};

static __device__ inline const struct act_s32 *act_s32_of(const void *row, int64_t n)
{
    return reinterpret_cast<const struct act_s32 *>(static_cast<const char *>(row) + n);
}

static __device__ inline const struct act_s256 *act_s256_of(const void *row, int64_t n)
{
    return reinterpret_cast<const struct act_s256 *>(static_cast<const char *>(row) + n);
}

uint64_t cu_act_bytes(enum quant_act act, int64_t n)
{
    uint64_t n_elem = (uint64_t)n;

    if (act == QUANT_ACT_Q8X32)
        return cu_up16(n_elem + n_elem / 32 * sizeof(struct act_s32));
    if (act == QUANT_ACT_Q8X256)
        return cu_up16(n_elem + n_elem / 256 * sizeof(struct act_s256));
    return cu_up16(n_elem * sizeof(float));
}

static __device__ inline int sum_of_lanes(int x, int n_lanes)
{
    for (int step = n_lanes / 2; step; step /= 2)
        x += cu_shfl_xor(x, step);
    return x;
}

static __device__ inline bool is_finite(float x)
{
    return x <= 3.40282346638528859812e+38f;
}

/* The largest code out of four that leaves the least sum of squared errors over the warp's 32 values (cpu/kern_act.h). */
static __device__ inline float top_of(float x, float amax)
{
    const float factors[4] = {1.0f, 16129.0f / 15876, 16129.0f / 15625, 16129.0f / 15376};
    float best = 0.0f, least = CU_INFINITY;

    for (int i = 0; i < 4; i++) {
        float top = 127.0f - (float)i, y = x * (top / amax), e = y - rintf(y);
        float upper = cu_shfl_xor(e, 16), low = threadIdx.x % 32 < 16 ? e : upper,
              high = threadIdx.x % 32 < 16 ? upper : e;
        float sum = cu_tree16_shfl(fmaf(high, high, fmaf(low, low, 0.0f))) * factors[i];
        if (sum < least) {
            least = sum;
            best = top;
        }
    }
    return best;
}

/* A warp for each 32 values, blockIdx.y the row. All warps of a block run to the end: the last ones have nothing to write. */
static __global__ void act_x32(const struct cu_act_args a)
{
    int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    bool is_in = k < a.width;
    float x = is_in ? a.x[blockIdx.y * a.x_stride + k] : 0.0f, amax = cu_amax_of_warp(x);
    bool fits = is_finite(amax), is_zero = fits && !is_finite(127.0f / amax);
    float top = top_of(x, amax); /* not used where amax is no finite number */
    top = fits && !is_zero ? top : 0.0f;
    float inv = top != 0.0f ? top / amax : 0.0f;
    int q = inv != 0.0f ? (int)rintf(x * inv) : 0, sum = sum_of_lanes(q, 32);
    char *row = static_cast<char *>(a.out) + blockIdx.y * a.out_stride;

    if (!is_in)
        return;
    row[k] = (char)q;
    if (threadIdx.x % 32 == 0) {
        struct act_s32 *s = reinterpret_cast<struct act_s32 *>(row + a.width) + k / 32;
        s->d = top != 0.0f ? amax / top : is_zero ? 0.0f : amax;
        s->sum = sum;
    }
}

/* A block of 256 threads for each 256 values. */
static __global__ void act_x256(const struct cu_act_args a)
{
    CU_SHARED_DYN(float, part_amax); /* (8) */
    int64_t k = (int64_t)blockIdx.x * 256 + threadIdx.x;
    int part = (int)threadIdx.x / 32;
    float x = a.x[blockIdx.y * a.x_stride + k], mine = cu_amax_of_warp(x);
    const float top = 127.0f * 8, sub_max = 8.0f;

    part_amax[part] = mine;
    __syncthreads();
    uint32_t bits = 0;
    for (int i = 0; i < 8; i++) {
        uint32_t other = cu_bits_of_f32(part_amax[i]);
        bits = other > bits ? other : bits;
    }
    float amax = cu_f32_of_bits(bits), inv = top / amax;
    bool fits = is_finite(amax), has_codes = fits && is_finite(inv);
    float steps = has_codes ? ceilf(mine * (sub_max / amax)) : 1.0f;
    int sub = steps < 1.0f ? 1 : steps > sub_max ? 8 : (int)steps;
    float factor = has_codes ? inv / (float)sub : 0.0f;
    int q = factor != 0.0f ? (int)rintf(x * factor) : 0, sum16 = sum_of_lanes(q, 16);
    char *row = static_cast<char *>(a.out) + blockIdx.y * a.out_stride;
    struct act_s256 *s = reinterpret_cast<struct act_s256 *>(row + a.width) + blockIdx.x;

    row[k] = (char)q;
    if (threadIdx.x == 0)
        s->d = has_codes ? amax / top : fits ? 0.0f : amax;
    if (threadIdx.x % 32 == 0)
        s->sub[part] = (int16_t)sub;
    if (threadIdx.x % 16 == 0)
        s->sum16[threadIdx.x / 16] = (int16_t)(sub * sum16);
}

static __global__ void act_f32(const struct cu_act_args a)
{
    int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;

    if (k < a.width)
        reinterpret_cast<float *>(static_cast<char *>(a.out) + blockIdx.y * a.out_stride)[k] =
            a.x[blockIdx.y * a.x_stride + k];
}

cudaError_t cu_act(const struct cu_act_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->width + THREADS - 1) / THREADS), (unsigned)a->n_rows);

    if (a->act == QUANT_ACT_Q8X32)
        return CU_LAUNCH((act_x32), grid, dim3(THREADS), 0, stream, *a);
    if (a->act == QUANT_ACT_Q8X256)
        return CU_LAUNCH((act_x256), grid, dim3(THREADS), 8 * sizeof(float), stream, *a);
    return CU_LAUNCH((act_f32), grid, dim3(THREADS), 0, stream, *a);
}

/* ---- integer dots: a warp for each weight row, a lane for each 32 elements ---- */

/* What one weight block adds to the sum: fmaf(f, sum, acc), then fmaf(m, second, acc). */
struct term {
    float f, sum, m, second;
};

static __device__ inline int dot16(const uint32_t *q, const int *x)
{
    int sum = 0;
    for (int i = 0; i < 4; i++)
        sum = cu_dp4a((int)q[i], x[i], sum);
    return sum;
}

/* Group `at` of the row against x, summed over the lanes of its block; every lane of the block gets the whole. */
template <int TYPE>
static __device__ inline struct term term_of(const struct cu_group *w, const void *x, int64_t n_cols, int64_t at,
                                             bool is_in)
{
    typedef cu_block<TYPE> block;
    struct term t = {0.0f, 0.0f, 0.0f, 0.0f};
    int sum = 0, second = 0;

    if (is_in) {
        const int *codes = reinterpret_cast<const int *>(static_cast<const char *>(x) + 32 * at);
        int low = dot16(w->q, codes), high = dot16(w->q + 4, codes + 4);
        sum = w->scale[0] * low + w->scale[1] * high;
        float dx;
        if (block::X256) {
            const struct act_s256 *s = act_s256_of(x, n_cols) + at / 8;
            sum *= s->sub[at % 8];
            second = w->min[0] * s->sum16[at % 8 * 2] + w->min[1] * s->sum16[at % 8 * 2 + 1];
            dx = s->d;
        } else {
            const struct act_s32 *s = act_s32_of(x, n_cols) + at;
            second = block::SECOND == CU_SECOND_HALF ? high : s->sum;
            sum = block::SECOND == CU_SECOND_HALF ? low : sum;
            dx = s->d;
        }
        t.f = w->d * dx;
        t.m = w->m * dx;
    }
    if (block::X256) {
        sum = sum_of_lanes(sum, 8);
        if (block::SECOND != CU_SECOND_NONE)
            second = sum_of_lanes(second, 8);
    }
    t.sum = (float)sum;
    t.second = (float)second;
    return t;
}

/* TOK: most places of a tile. CHUNKS: pieces of 1024 columns between two folds, so that several loads are under way. */
template <int TYPE, int TOK, int CHUNKS> static __global__ void gemv_int(const struct cu_mat_args a)
{
    typedef cu_block<TYPE> block;
    const int PER = block::X256 ? 8 : 1, GROUPS = block::LEN / 32, N_TERM = 32 * CHUNKS / PER;
    CU_SHARED_DYN(struct term, all_terms); /* (GEMV_ROWS, TOK, N_TERM) */
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, row = (int)blockIdx.x * GEMV_ROWS + warp;
    struct term *terms = all_terms + warp * TOK * N_TERM;
    struct cu_work k = cu_work_of(&a);
    const uint8_t *w = k.w + (uint64_t)(row < a.n_rows ? row : 0) * a.w_stride;
    int64_t n_group = a.n_cols / 32;
    float acc = 0.0f; /* of place k.first + lane */

    for (int64_t first = 0; first < n_group; first += 32 * CHUNKS) {
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            int64_t at = first + 32 * chunk + lane;
            bool is_in = at < n_group && row < a.n_rows;
            struct cu_group group;
            if (is_in)
                block::group(w + at / GROUPS * block::BYTES, (int)(at % GROUPS), a.books, &group);
            for (int tok = 0; tok < k.n; tok++) {
                struct term t = term_of<TYPE>(&group, cu_x_of(&a, k.first + tok), a.n_cols, at, is_in);
                if (lane % PER == 0)
                    terms[tok * N_TERM + (32 * chunk + lane) / PER] = t;
            }
        }
        cu_syncwarp();
        int64_t left = (n_group - first) / PER, n = left < N_TERM ? left : (int64_t)N_TERM;
        for (int i = 0; lane < k.n && i < n; i++) {
            struct term t = terms[lane * N_TERM + i];
            acc = fmaf(t.f, t.sum, acc);
            if (block::SECOND != CU_SECOND_NONE)
                acc = fmaf(t.m, t.second, acc);
        }
        cu_syncwarp();
    }
    if (lane < k.n && row < a.n_rows)
        cu_put(&a, &k, k.first + lane, row, acc);
}

template <int TYPE, int TOK, int CHUNKS> static cudaError_t launch_int(const struct cu_mat_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->n_rows + GEMV_ROWS - 1) / GEMV_ROWS), cu_n_tiles(a));
    size_t n_term = 32 * CHUNKS / (cu_block<TYPE>::X256 ? 8 : 1);
    return CU_LAUNCH((gemv_int<TYPE, TOK, CHUNKS>), grid, dim3(THREADS), GEMV_ROWS * TOK * n_term * sizeof(struct term),
                     stream, *a);
}

/* ---- float dots: 16 lanes for each weight row ---- */

template <int TYPE> static __global__ void gemv_float(const struct cu_mat_args a)
{
    typedef cu_float<TYPE> type;
    int lane = (int)threadIdx.x % 16, row = (int)blockIdx.x * FLOAT_ROWS + (int)threadIdx.x / 16;
    struct cu_work k = cu_work_of(&a);
    const typename type::word *w =
        reinterpret_cast<const typename type::word *>(k.w + (uint64_t)(row < a.n_rows ? row : 0) * a.w_stride);

    for (int tok = 0; tok < k.n; tok++) {
        const float *x = static_cast<const float *>(cu_x_of(&a, k.first + tok));
        float acc = 0.0f;
        for (int64_t c = lane; c < a.n_cols; c += 16)
            acc = fmaf(type::value(w[c]), x[c], acc);
        acc = cu_tree16_shfl(acc);
        if (lane == 0 && row < a.n_rows)
            cu_put(&a, &k, k.first + tok, row, acc);
    }
}

template <int TYPE> static cudaError_t launch_float(const struct cu_mat_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->n_rows + FLOAT_ROWS - 1) / FLOAT_ROWS), cu_n_tiles(a));
    return CU_LAUNCH((gemv_float<TYPE>), grid, dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_gemv(const struct cu_mat_args *a, cudaStream_t stream)
{
    switch (a->type) {
#define CASE(NAME)                                                          \
    case QUANT_##NAME:                                                      \
        return a->tile_tok == 1 ? launch_int<QUANT_##NAME, 1, 4>(a, stream) \
                                : launch_int<QUANT_##NAME, CU_GEMV_TOK, 1>(a, stream);
        CU_QUANT_TYPES(CASE)
#undef CASE
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return launch_float<QUANT_##NAME>(a, stream);
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}
