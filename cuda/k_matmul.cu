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
        w.next[r] = row + r < k->n_rows ? (uint64_t)r * a->w_stride : 0;
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
    const void *x_first = NULL;

    for (unsigned piece = threadIdx.x; piece - lane < n_pieces; piece += blockDim.x) {
        bool is_in = piece < n_pieces;
        unsigned mine = is_in ? piece : 0, at = first * LANES + mine;
        const uint8_t *b = rows->first + (uint64_t)(at / PIECES) * cu_block<TYPE>::BYTES;
        typename type::weights w[shape::ROWS];
        CU_UNROLL
        for (int r = 0; r < shape::ROWS; r++)
            type::load(b + rows->next[r], (int)(at % PIECES), a->books, &w[r]);
        if (!x_first) {
            cu_await(); /* weights are there before any kernel of the call */
            x_first = cu_x_of(a, k->first);
        }
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
    if ((int)blockIdx.x * ROWS >= k.n_rows)
        return;
    weight_rows<ROWS> rows = rows_of<ROWS>(&a, &k);
    float acc = 0.0f; /* of place me / ROWS and row me % ROWS */

    for (int first = 0; first < n_terms; first += shape::SPAN) {
        int n = n_terms - first < shape::SPAN ? n_terms - first : shape::SPAN;
        multiply_span<TYPE, TOK>(&a, &k, &rows, (unsigned)first, (unsigned)n, terms, stride);
        cu_await(); /* threads that had no piece */
        __syncthreads();
        for (int i = 0; me < k.n * ROWS && i < n * shape::KINDS; i++) {
            struct term t = terms[me * stride + i];
            acc = fmaf(t.f, t.sum, acc);
        }
        __syncthreads();
    }
    int row = (int)blockIdx.x * ROWS + me % ROWS;
    if (me < k.n * ROWS && row < k.n_rows)
        cu_put(&a, &k, k.first + me / ROWS, row, acc);
}

template <int TYPE, int TOK> static cudaError_t launch_int(const struct cu_mat_args *a, cudaStream_t stream)
{
    const int ROWS = shape<TYPE, TOK>::ROWS;
    const int64_t n_pieces = (a->n_cols / cu_lane<TYPE>::ELEMENTS + 31) / 32;
    const unsigned n_warps = n_pieces < MAX_WARPS ? (unsigned)n_pieces : (unsigned)MAX_WARPS;
    dim3 grid((unsigned)((cu_most_rows(a) + ROWS - 1) / ROWS), cu_n_tiles(a), 1 + (unsigned)a->n_more);
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

    if ((int)blockIdx.x * FLOAT_BLOCK >= k.n_rows)
        return;
    cu_await();
    for (int r = 0; r < FLOAT_ROWS; r++) {
        int row = first + r < k.n_rows ? first + r : k.n_rows - 1;
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
            if (lane == 0 && first + r < k.n_rows)
                cu_put(&a, &k, k.first + tok, first + r, acc[r]);
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
            bring_all<QUANT_F32>(static_cast<const float *>(cu_x_of(&a, k.first + tok)) + at, n, x);
            __syncthreads();
            if (mine < 2)
                acc = cu_lane_dot(shared + mine * FEW_STRIDE, x, lane, n, acc);
            __syncthreads();
        }
        if (threadIdx.x >= 32)
            continue;
        acc = cu_tree16_shfl(acc);
        if (lane == 0 && mine < n_rows)
            cu_put(&a, &k, k.first + tok, first + mine, acc);
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
