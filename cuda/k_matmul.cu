/* Matrices times rows. cu_gemv: the integer arithmetic of cpu/kern.h bit for bit, whatever the number of rows. cu_gemm: the
 * same product by tensor cores on halves. Experts are matrices that a tile names. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/math.cuh"
#include "cuda/ptx.cuh"

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

static uint64_t up16(uint64_t bytes)
{
    return (bytes + 15) & ~(uint64_t)15;
}

uint64_t cu_act_bytes(enum quant_act act, int64_t n)
{
    uint64_t n_elem = (uint64_t)n;

    if (act == QUANT_ACT_Q8X32)
        return up16(n_elem + n_elem / 32 * sizeof(struct act_s32));
    if (act == QUANT_ACT_Q8X256)
        return up16(n_elem + n_elem / 256 * sizeof(struct act_s256));
    return up16(n_elem * sizeof(float));
}

/* Over a warp: a NaN, compared as integers, is the largest magnitude. */
static __device__ inline float amax_of_warp(float x)
{
    int bits = (int)(cu_bits_of_f32(x) & 0x7fffffff);

    for (int step = 16; step; step /= 2) {
        int other = cu_shfl_xor(bits, step);
        bits = other > bits ? other : bits;
    }
    return cu_f32_of_bits((uint32_t)bits);
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
    float x = is_in ? a.x[blockIdx.y * a.x_stride + k] : 0.0f, amax = amax_of_warp(x);
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
    float x = a.x[blockIdx.y * a.x_stride + k], mine = amax_of_warp(x);
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

/* ---- what a block works on ---- */

struct work {
    const uint8_t *w;
    float scale;
    int first, n; /* places */
};

static __device__ inline struct work work_of(const struct cu_mat_args *a)
{
    struct work k = {static_cast<const uint8_t *>(a->w), 1.0f, (int)blockIdx.y * a->tile_tok, a->tile_tok};

    if (a->tiles) {
        struct cu_tile t = a->tiles[blockIdx.y];
        k.w = static_cast<const uint8_t *>(a->experts[t.expert].w[a->which]);
        k.scale = a->experts[t.expert].scale[a->which];
        k.first = t.first;
        k.n = t.n;
    } else if (k.first + k.n > a->n_place) {
        k.n = a->n_place - k.first;
    }
    return k;
}

static __device__ inline const void *x_of(const struct cu_mat_args *a, int place)
{
    return static_cast<const char *>(a->x) + (uint64_t)(a->x_row ? a->x_row[place] : place) * a->x_stride;
}

static __device__ inline void put(const struct cu_mat_args *a, const struct work *k, int place, int row, float x)
{
    a->dst[(a->dst_row ? a->dst_row[place] : place) * a->dst_stride + row] = k->scale != 1.0f ? x * k->scale : x;
}

static unsigned n_tiles(const struct cu_mat_args *a)
{
    return (unsigned)(a->tiles ? a->n_tiles : (a->n_place + a->tile_tok - 1) / a->tile_tok);
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
    struct work k = work_of(&a);
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
                struct term t = term_of<TYPE>(&group, x_of(&a, k.first + tok), a.n_cols, at, is_in);
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
        put(&a, &k, k.first + lane, row, acc);
}

template <int TYPE, int TOK, int CHUNKS> static cudaError_t launch_int(const struct cu_mat_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->n_rows + GEMV_ROWS - 1) / GEMV_ROWS), n_tiles(a));
    size_t n_term = 32 * CHUNKS / (cu_block<TYPE>::X256 ? 8 : 1);
    return CU_LAUNCH((gemv_int<TYPE, TOK, CHUNKS>), grid, dim3(THREADS), GEMV_ROWS * TOK * n_term * sizeof(struct term),
                     stream, *a);
}

/* ---- float dots: 16 lanes for each weight row ---- */

template <int TYPE> static __global__ void gemv_float(const struct cu_mat_args a)
{
    typedef cu_float<TYPE> type;
    int lane = (int)threadIdx.x % 16, row = (int)blockIdx.x * FLOAT_ROWS + (int)threadIdx.x / 16;
    struct work k = work_of(&a);
    const typename type::word *w =
        reinterpret_cast<const typename type::word *>(k.w + (uint64_t)(row < a.n_rows ? row : 0) * a.w_stride);

    for (int tok = 0; tok < k.n; tok++) {
        const float *x = static_cast<const float *>(x_of(&a, k.first + tok));
        float acc = 0.0f;
        for (int64_t c = lane; c < a.n_cols; c += 16)
            acc = fmaf(type::value(w[c]), x[c], acc);
        acc = cu_tree16_shfl(acc);
        if (lane == 0 && row < a.n_rows)
            put(&a, &k, k.first + tok, row, acc);
    }
}

template <int TYPE> static cudaError_t launch_float(const struct cu_mat_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->n_rows + FLOAT_ROWS - 1) / FLOAT_ROWS), n_tiles(a));
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

/* ---- tensor cores ---- */

/* A block makes 64 weight rows x 64 places; its 4 warps have 32 x 32 each. Columns come in steps of 32: rows of x by
 * asynchronous copies some steps ahead, weights through registers, dequantized while the step before is multiplied. Rows in
 * shared memory are 40 halves apart: 8 neighbouring rows then begin in different banks. */
enum { GEMM_ROWS = 64, GEMM_K = 32, GEMM_THREADS = 128, GEMM_STRIDE = 40, GEMM_STAGES = 3 };

uint64_t cu_half_bytes(int64_t n)
{
    return up16((uint64_t)n * 2) + 16;
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
    mine = amax_of_warp(mine);
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
static __device__ inline void fetch_x(const struct cu_mat_args *a, const struct work *k, int64_t step, uint16_t *stage)
{
    if (step < a->n_cols / GEMM_K)
        for (int i = (int)threadIdx.x; i < CU_GEMM_TOK * 4; i += GEMM_THREADS) {
            int tok = i / 4, piece = i % 4, place = k->first + (tok < k->n ? tok : 0);
            cu_async_copy16(stage + tok * GEMM_STRIDE + piece * 8,
                            static_cast<const char *>(x_of(a, place)) + step * GEMM_K * 2 + piece * 16);
        }
    cu_async_commit();
}

/* Two threads for each weight row and step: both unpack the group, each writes a half of it. */
template <int TYPE>
static __device__ inline void fetch_w(const struct cu_mat_args *a, const struct work *k, int64_t step, uint16_t *tile)
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
static __device__ inline void write_tile(const struct cu_mat_args *a, const struct work *k, int row0, int tok0,
                                         const float acc[2][4][4])
{
    int lane = (int)threadIdx.x % 32;

    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 4; n++)
            for (int i = 0; i < 4; i++) {
                int row = row0 + 16 * m + lane / 4 + i / 2 * 8, tok = tok0 + 8 * n + lane % 4 * 2 + i % 2;
                if (row >= a->n_rows || tok >= k->n)
                    continue;
                const char *x = static_cast<const char *>(x_of(a, k->first + tok));
                float down = *reinterpret_cast<const float *>(x + a->x_stride - 16);
                put(a, k, k->first + tok, row, acc[m][n][i] * down);
            }
}

template <int TYPE> static __global__ void gemm(const struct cu_mat_args a)
{
    CU_SHARED_DYN(uint16_t, x); /* GEMM_STAGES of (CU_GEMM_TOK, GEMM_STRIDE), then two of (GEMM_ROWS, GEMM_STRIDE) */
    const int x_len = CU_GEMM_TOK * GEMM_STRIDE, w_len = GEMM_ROWS * GEMM_STRIDE;
    uint16_t *w = x + GEMM_STAGES * x_len;
    struct work k = work_of(&a);
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
    dim3 grid((unsigned)((a->n_rows + GEMM_ROWS - 1) / GEMM_ROWS), n_tiles(a));
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
