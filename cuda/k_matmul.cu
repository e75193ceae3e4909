/* Matrices times rows by the integer arithmetic of cpu/kern.h, bit for bit, whatever the number of rows (by tensor cores:
 * k_gemm.cu). Experts are matrices that a tile names. */
#include "cuda/launch.h"

#include "cuda/act.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/lane.cuh"
#include "cuda/mat.cuh"
#include "cuda/math.cuh"

enum { THREADS = 256 };

/* ---- activations ---- */

uint64_t cu_act_bytes(enum quant_act act, int64_t n)
{
    uint64_t n_elem = (uint64_t)n;

    if (act == QUANT_ACT_Q8X32)
        return cu_up16(n_elem + n_elem / 32 * sizeof(struct cu_act_s32));
    if (act == QUANT_ACT_Q8X256)
        return cu_up16(n_elem + n_elem / 256 * sizeof(struct cu_act_s256));
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

/* Value k of row i of what is to be coded. */
static __device__ inline float value_of(const struct cu_act_args *a, int64_t i, int64_t k)
{
    int64_t at = i * a->x_stride + k;
    return a->up ? cu_glu_of(a->glu, a->x[at], a->up[at]) : a->x[at];
}

/* A warp for each 32 values, blockIdx.y the row. All warps of a block run to the end: the last ones have nothing to write. */
static __global__ void act_x32(const struct cu_act_args a)
{
    int64_t k = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    bool is_in = k < a.width;
    float x = is_in ? value_of(&a, blockIdx.y, k) : 0.0f, amax = cu_amax_of_warp(x);
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
        struct cu_act_s32 *s = reinterpret_cast<struct cu_act_s32 *>(row + a.width) + k / 32;
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
    float x = value_of(&a, blockIdx.y, k), mine = cu_amax_of_warp(x);
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
    struct cu_act_s256 *s = reinterpret_cast<struct cu_act_s256 *>(row + a.width) + blockIdx.x;

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
            value_of(&a, blockIdx.y, k);
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

/* ---- integer dots ---- */

/* A block has some weight rows; its warps take pieces of 32 lanes' weights in turn, and put what blocks add to the sums, side by side,
 * into shared memory. There a lane for each place and row adds it up in ascending order. */
enum { MAX_WARPS = 4 };

/* What a weight block adds to a sum: fmaf(f, sum, acc). Blocks with a minimum (CU_SECOND_MIN) or a second scale add two. */
struct term {
    float f, sum;
};

/* TOK: most places of a tile. */
template <int TYPE, int TOK> struct shape {
    typedef cu_lane<TYPE> type;
    /* weight rows of a block; columns of a term; terms of a row in shared memory at once; values that a term gives for all rows */
    static constexpr int ROWS = TOK == 1 ? (int)type::ROWS : 4, COLS = type::LANES * type::ELEMENTS,
                         SPAN = (TOK == 1 ? 8192 : 2048) / COLS, KINDS = type::SECOND == CU_SECOND_NONE ? 1 : 2,
                         VALUES = ROWS * KINDS, KEPT = VALUES > type::LANES ? VALUES / type::LANES : 1,
                         SAME = type::LANES > VALUES ? type::LANES / VALUES : 1; /* neighbours with the same value */
};

/* From one sum's terms to the next's: one more than they are, so that the lanes that add up read different banks. */
template <int TYPE, int TOK> static __host__ __device__ inline int term_stride(int64_t n_cols)
{
    typedef shape<TYPE, TOK> shape;
    int n = (int)(n_cols / shape::COLS);
    return (n < shape::SPAN ? n : shape::SPAN) * shape::KINDS + 1;
}

/* Sums over 2 STEP neighbours of what each has for LEFT results. In each step a lane gives half of what it has left away, and gets the
 * other half's: in the end v[0], v[1], ... are the sums of results `of()`, `of()` + 1, ... */
template <int STEP, int LEFT> struct lane_sums {
    static __device__ inline int of(int *v)
    {
        const int KEEP = LEFT > 1 ? LEFT / 2 : 1;
        bool is_upper = LEFT > 1 && (threadIdx.x & STEP);

        CU_UNROLL
        for (int i = 0; i < KEEP; i++) {
            int give = is_upper || LEFT == 1 ? v[i] : v[i + KEEP], keep = is_upper ? v[i + KEEP] : v[i];
            v[i] = keep + cu_shfl_xor(give, STEP);
        }
        return (is_upper ? KEEP : 0) + lane_sums<STEP / 2, KEEP>::of(v);
    }
};

template <int LEFT> struct lane_sums<0, LEFT> {
    static __device__ inline int of(int *)
    {
        return 0;
    }
};

/* One of n values in registers. */
template <int N> static __device__ inline float pick(const float *x, int at)
{
    float y = x[0];

    CU_UNROLL
    for (int i = 1; i < N; i++)
        y = at == i ? x[i] : y;
    return y;
}

/* The terms of one place and all rows. */
template <int TYPE, int TOK>
static __device__ inline void put_terms(const typename cu_lane<TYPE>::weights *w, const struct cu_x *x, bool is_in,
                                        struct term *terms, int stride)
{
    typedef cu_lane<TYPE> type;
    typedef shape<TYPE, TOK> shape;
    int v[2 * shape::VALUES]; /* lane_sums names places behind the results, for nobody */
    float factors[shape::VALUES];

    CU_UNROLL
    for (int r = 0; r < shape::ROWS; r++) {
        int first, second;
        float m;
        type::dot(&w[r], x, &first, &second);
        type::factors(&w[r], &factors[r * shape::KINDS], &m);
        v[r * shape::KINDS] = is_in ? first : 0;
        if (shape::KINDS == 2) {
            v[r * shape::KINDS + 1] = is_in ? second : 0;
            factors[r * shape::KINDS + 1] = m;
        }
    }
    int at = lane_sums<type::LANES / 2, shape::VALUES>::of(v);
    bool is_mine = is_in && threadIdx.x % shape::SAME == 0;
    CU_UNROLL
    for (int i = 0; i < shape::KEPT; i++) {
        int value = type::LANES == 1 ? i : at + i;
        float f = (type::LANES == 1 ? factors[i] : pick<shape::VALUES>(factors, value)) * x->d;
        if (is_mine)
            terms[value / shape::KINDS * stride + value % shape::KINDS] = {f, (float)v[i]};
    }
}

/* A block's weight rows; where there are fewer than ROWS, the first stands for those that are missing. */
template <int ROWS> struct weight_rows {
    const uint8_t *first;
    uint64_t next[ROWS]; /* bytes from the first */
};

template <int ROWS>
static __device__ inline weight_rows<ROWS> rows_of(const struct cu_mat_args *a, const struct cu_work *k)
{
    int row = (int)blockIdx.x * ROWS;
    weight_rows<ROWS> w;

    w.first = k->w + (uint64_t)row * a->w_stride;
    CU_UNROLL
    for (int r = 0; r < ROWS; r++)
        w.next[r] = row + r < a->n_rows ? (uint64_t)r * a->w_stride : 0;
    return w;
}

/* Terms [first, first + n) of each row and place. */
template <int TYPE, int TOK>
static __device__ inline void multiply_span(const struct cu_mat_args *a, const struct cu_work *k,
                                            const weight_rows<shape<TYPE, TOK>::ROWS> *rows, unsigned first, unsigned n,
                                            struct term *terms, int stride)
{
    typedef cu_lane<TYPE> type;
    typedef shape<TYPE, TOK> shape;
    const unsigned LANES = type::LANES, PIECES = cu_block<TYPE>::LEN / type::ELEMENTS; /* of a block */
    unsigned lane = threadIdx.x % 32, n_pieces = n * LANES;
    const void *x_first = cu_x_of(a, k->first);

    for (unsigned piece = threadIdx.x; piece - lane < n_pieces; piece += blockDim.x) {
        bool is_in = piece < n_pieces;
        unsigned mine = is_in ? piece : 0, at = first * LANES + mine;
        const uint8_t *b = rows->first + (uint64_t)(at / PIECES) * cu_block<TYPE>::BYTES;
        typename type::weights w[shape::ROWS];
        CU_UNROLL
        for (int r = 0; r < shape::ROWS; r++)
            type::load(b + rows->next[r], (int)(at % PIECES), a->books, &w[r]);
        for (int tok = 0; tok < (TOK == 1 ? 1 : k->n); tok++) {
            struct cu_x x;
            type::share::load(TOK == 1 ? x_first : cu_x_of(a, k->first + tok), (int)a->n_cols, (int)(at / LANES),
                              (int)(at % LANES), &x);
            put_terms<TYPE, TOK>(w, &x, is_in, terms + tok * shape::ROWS * stride + (int)(mine / LANES) * shape::KINDS,
                                 stride);
        }
    }
}

template <int TYPE, int TOK> static __global__ void gemv_int(const struct cu_mat_args a)
{
    typedef shape<TYPE, TOK> shape;
    const int ROWS = shape::ROWS;
    CU_SHARED_DYN(struct term, terms); /* (TOK, ROWS, stride) */
    int stride = term_stride<TYPE, TOK>(a.n_cols), n_terms = (int)a.n_cols / shape::COLS, me = (int)threadIdx.x;
    struct cu_work k = cu_work_of(&a);
    weight_rows<ROWS> rows = rows_of<ROWS>(&a, &k);
    float acc = 0.0f; /* of place me / ROWS and row me % ROWS */

    for (int first = 0; first < n_terms; first += shape::SPAN) {
        int n = n_terms - first < shape::SPAN ? n_terms - first : shape::SPAN;
        multiply_span<TYPE, TOK>(&a, &k, &rows, (unsigned)first, (unsigned)n, terms, stride);
        __syncthreads();
        for (int i = 0; me < k.n * ROWS && i < n * shape::KINDS; i++) {
            struct term t = terms[me * stride + i];
            acc = fmaf(t.f, t.sum, acc);
        }
        __syncthreads();
    }
    int row = (int)blockIdx.x * ROWS + me % ROWS;
    if (me < k.n * ROWS && row < a.n_rows)
        cu_put(&a, &k, k.first + me / ROWS, row, acc);
}

template <int TYPE, int TOK> static cudaError_t launch_int(const struct cu_mat_args *a, cudaStream_t stream)
{
    const int ROWS = shape<TYPE, TOK>::ROWS;
    const int64_t n_pieces = (a->n_cols / cu_lane<TYPE>::ELEMENTS + 31) / 32;
    const unsigned n_warps = n_pieces < MAX_WARPS ? (unsigned)n_pieces : (unsigned)MAX_WARPS;
    dim3 grid((unsigned)((a->n_rows + ROWS - 1) / ROWS), cu_n_tiles(a), a->dst2 ? 2 : 1);
    size_t bytes = (size_t)(TOK * ROWS * term_stride<TYPE, TOK>(a->n_cols)) * sizeof(struct term);

    return CU_LAUNCH((gemv_int<TYPE, TOK>), grid, dim3(32 * n_warps), bytes, stream, *a);
}

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
    struct cu_work k = cu_work_of(&a);
    const typename type::word *w[FLOAT_ROWS];

    for (int r = 0; r < FLOAT_ROWS; r++) {
        int row = first + r < a.n_rows ? first + r : a.n_rows - 1;
        w[r] = reinterpret_cast<const typename type::word *>(k.w + (uint64_t)row * a.w_stride);
    }
    for (int tok = 0; tok < k.n; tok++) {
        const float *x = static_cast<const float *>(cu_x_of(&a, k.first + tok));
        float acc[FLOAT_ROWS] = {};
        int c = lane;
        for (; c + 16 * (AT_ONCE - 1) < (int)a.n_cols; c += 16 * AT_ONCE)
            add_products<TYPE, AT_ONCE>(w, x, c, acc);
        for (; c < (int)a.n_cols; c += 16)
            add_products<TYPE, 1>(w, x, c, acc);
        for (int r = 0; r < FLOAT_ROWS; r++) {
            acc[r] = cu_tree16_shfl(acc[r]);
            if (lane == 0 && first + r < a.n_rows)
                cu_put(&a, &k, k.first + tok, first + r, acc[r]);
        }
    }
}

template <int TYPE> static cudaError_t launch_float(const struct cu_mat_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((a->n_rows + FLOAT_BLOCK - 1) / FLOAT_BLOCK), cu_n_tiles(a), a->dst2 ? 2 : 1);
    return CU_LAUNCH((gemv_float<TYPE>), grid, dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_gemv(const struct cu_mat_args *a, cudaStream_t stream)
{
    if (a->tile_tok == CU_GEMM_INT_TOK && quant_info((int)a->type)->act != QUANT_ACT_F32)
        return cu_gemm_int(a, stream);
    switch (a->type) {
#define CASE(NAME)                                                       \
    case QUANT_##NAME:                                                   \
        return a->tile_tok == 1 ? launch_int<QUANT_##NAME, 1>(a, stream) \
                                : launch_int<QUANT_##NAME, CU_GEMV_TOK>(a, stream);
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
