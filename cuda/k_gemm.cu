/* Matrices times rows by tensor cores on halves, for many rows. Experts are matrices that a tile names. Products on cards of compute
 * capability 9.0 are those of k_gemm_wgmma.cu.
 *
 * A block makes ROWS weight rows x TOK places, a step of K columns at a time. Three things are under way at once: rows of x (halves)
 * come by asynchronous copies STAGES - 1 steps ahead; weights come as they are stored, chunks of whole blocks, by asynchronous
 * copies still further ahead; and while a step is multiplied, the next one's weights are dequantized from shared memory into
 * shared memory. One barrier a step. A place's sum is made column by column in the same order whatever the tile is. */
#include "cuda/launch.h"

#include "cuda/dequant_half.cuh"
#include "cuda/device.cuh"
#include "cuda/gemm.cuh"
#include "cuda/mat.cuh"
#include "cuda/math.cuh"
#include "cuda/ptx.cuh"

enum { THREADS = 256 };

/* ---- activations ---- */

/* The factor stands behind whole 128 columns, of which those past the last are 0. */
uint64_t cu_half_bytes(int64_t n)
{
    return (uint64_t)((n + 127) / 128 * 256 + 16);
}

/* Where column k of a row stands for products of warpgroups: what a lane has of 8 products of 16 columns are 32 neighbours
 * (k_gemm_wgmma.cu), so that column 32 q + 4 t + 2 h + e of 128 is number 16 t + 8 h + 2 q + e. */
static __device__ inline int64_t lane_order(int64_t k)
{
    int64_t q = k / 32 % 4, t = k / 4 % 8, h = k / 2 % 2;
    return k / 128 * 128 + 16 * t + 8 * h + 2 * q + k % 2;
}

/* A block for each row. */
static __global__ void to_halves(const struct cu_act_args a)
{
    CU_SHARED_DYN(float, part); /* (THREADS / 32) */
    cu_await();
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
    for (int64_t k = threadIdx.x; k < (a.width + 127) / 128 * 128; k += THREADS)
        reinterpret_cast<uint16_t *>(row)[a.by_lanes ? lane_order(k) : k] =
            k < a.width ? cu_f32_to_half(x[k] * up) : (uint16_t)0;
    if (threadIdx.x == 0)
        *reinterpret_cast<float *>(row + a.out_stride - 16) = down;
}

cudaError_t cu_half(const struct cu_act_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((to_halves), dim3((unsigned)a->n_rows), dim3(THREADS), THREADS / 32 * sizeof(float), stream, *a);
}

/* ---- shapes ---- */

/* MANY: 8 warps of 64 places x 32 rows each, for GPUs whose blocks may have so much shared memory; else 4 of 32 x 32, in what
 * every card since sm_75 gives. A chunk's copies begin in the step before its buffer's last reader is a step old, and have
 * STAGES - 1 steps to arrive: (CHUNKS - 1) * STEPS >= STAGES - 1. */
template <int TYPE, bool MANY> struct shape {
    static constexpr int TOK = MANY ? CU_GEMM_TOK_MANY : CU_GEMM_TOK, ROWS = MANY ? 128 : 64, K = MANY ? 64 : 32;
    static constexpr int WARP_TOK = MANY ? 64 : 32, WARP_ROWS = 32, WARPS_TOK = TOK / WARP_TOK;
    static constexpr int N_THREADS = TOK / WARP_TOK * (ROWS / WARP_ROWS) * 32, STAGES = 3;
    static constexpr int LEN = cu_storage<TYPE>::LEN, CHUNK = LEN > K ? LEN : K, STEPS = CHUNK / K;
    static constexpr int CHUNKS = STEPS > 1 ? 2 : 3;
    static constexpr int BLOCK_BYTES = cu_storage<TYPE>::BYTES, CHUNK_BYTES = CHUNK / LEN * BLOCK_BYTES;
    /* A row of a chunk comes in pieces of 16 aligned bytes, wherever it begins; so many of them from one row to the next that 8
     * neighbouring threads read different banks: those of two rows, of which each reads 4 pieces in a row (Q6_K, Q8_0), or fewer. */
    static constexpr int PIECES = (CHUNK_BYTES + 15 + 15) / 16;
    static constexpr bool READS_FOUR = MANY && (TYPE == QUANT_Q6_K || TYPE == QUANT_Q8_0);
    static constexpr int PITCH = 16 * (READS_FOUR ? (PIECES + 3) / 8 * 8 + 4 : PIECES | 1);
    static constexpr int LANES = PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32; /* that copy one row */
    static constexpr int RAW_BYTES = ROWS * PITCH, X_LEN = TOK * K, W_LEN = ROWS * K;
    static constexpr int BYTES = CHUNKS * RAW_BYTES + (STAGES * X_LEN + 2 * W_LEN) * (int)sizeof(uint16_t);
    static constexpr int N_X = TOK * (K / 8) / N_THREADS;    /* pieces of x that a thread copies each step */
    static constexpr bool CAN_ALIGN = BLOCK_BYTES % 16 == 0; /* then usually no row begins askew */
    static constexpr bool IS_RAGGED = LEN % K != 0;          /* the last step may have columns past the last */
    static constexpr int N_UNITS = ROWS * (K / 16) / N_THREADS, M = WARP_TOK / 16, N = WARP_ROWS / 8;
    static_assert((CHUNKS - 1) * STEPS >= STAGES - 1 && N_UNITS <= K / 16 && N % 2 == 0, "a shape that cannot be");
    static_assert(PIECES <= LANES && N_THREADS % LANES == 0, "a chunk's rows are too long");
};

/* Where piece `piece` (8 halves) of a row of K halves lies: 8 rows' pieces of one number are in different banks, as ldmatrix wants
 * them, and so are the pieces of one row. */
template <int K> static __device__ inline int place_of(int row, int piece)
{
    return row * K + (piece ^ (K == 64 ? row & 7 : row >> 1 & 3)) * 8;
}

/* What a block works on, and where; of a thread, what it copies and unpacks. Rows past the last are the last again. */
template <typename S> struct block {
    struct cu_work k;
    int row0, n_cols, n_step;
    const uint8_t *w0, *end;    /* row row0; behind the last byte of the matrix */
    int last_row, w_stride;     /* from row0 on */
    const char *x_from[S::N_X]; /* of the next step that is fetched */
    const uint8_t *raw_from;    /* a piece of chunk 0, before it is aligned; of blocks whose rows are all there */
    uint32_t skew[S::N_UNITS];  /* how far a unit's row begins behind a multiple of 16 bytes */
    uint8_t *raw;
    uint16_t *x, *w;
};

template <typename S> static __device__ inline const uint8_t *row_of(const struct block<S> *b, int row)
{
    return b->w0 + (row < b->last_row ? row : b->last_row) * b->w_stride;
}

/* ---- copies ---- */

/* This thread's pieces of x: one and the same of each N_THREADS / (K / 8)th place. Places past the last are the first again. */
template <typename S> static __device__ inline void find_x(const struct cu_mat_args *a, struct block<S> *b)
{
    CU_UNROLL
    for (int i = 0; i < S::N_X; i++) {
        int tok = ((int)threadIdx.x + i * S::N_THREADS) / (S::K / 8), place = b->k.first + (tok < b->k.n ? tok : 0);
        b->x_from[i] = static_cast<const char *>(cu_x_of(a, place)) + (int)threadIdx.x % (S::K / 8) * 16;
    }
}

/* Where the pieces of a tile of (n, K) halves lie that are N_THREADS / per_row rows apart: the first; others are so many times K
 * behind. */
template <typename S> static __device__ inline int first_place(int per_row, int piece)
{
    static_assert(S::N_THREADS / (S::K / 8) % 8 == 0, "pieces that are swizzled in different ways");
    return place_of<S::K>((int)threadIdx.x / per_row, piece);
}

/* The next step of x, `step`, into its stage; columns past the last are 0. */
template <typename S> static __device__ inline void fetch_x(struct block<S> *b, int step)
{
    const int piece = (int)threadIdx.x % (S::K / 8), apart = S::N_THREADS / (S::K / 8) * S::K;
    uint16_t *to = b->x + step % S::STAGES * S::X_LEN + first_place<S>(S::K / 8, piece);

    if (step >= b->n_step)
        return;
    CU_UNROLL
    for (int i = 0; i < S::N_X; i++) {
        if (!S::IS_RAGGED || step * S::K + piece * 8 < b->n_cols)
            cu_async_copy16(to + i * apart, b->x_from[i]);
        else
            *reinterpret_cast<struct cu_piece *>(to + i * apart) = {};
        b->x_from[i] += S::K * 2;
    }
}

/* Chunk `chunk` of the weights into its buffer `to`. What lies beside a row's part of it comes along, but never what lies beside the
 * matrix: chunks that may touch its edges go this way, and blocks with fewer rows than they have room for. */
template <typename S>
static __device__ inline void copy_edges(const struct block<S> *b, int chunk, int n_bytes, uint8_t *to)
{
    for (int i = (int)threadIdx.x; i < S::ROWS * S::LANES; i += S::N_THREADS) {
        int row = i / S::LANES, lane = i % S::LANES;
        const uint8_t *from = row_of(b, row) + chunk * S::CHUNK_BYTES;
        int at = 16 * lane - (int)(reinterpret_cast<uintptr_t>(from) & 15);
        uint8_t *piece = to + row * S::PITCH + 16 * lane;
        if (at >= n_bytes)
            continue;
        if (from + at >= b->k.w && from + at + 16 <= b->end)
            cu_async_copy16(piece, from + at);
        else
            cu_copy_edge(piece, from, at, n_bytes);
    }
}

template <typename S>
static __device__ inline void copy_inner(const struct block<S> *b, int chunk, int n_bytes, uint8_t *to)
{
    const int lane = (int)threadIdx.x % S::LANES, apart = S::N_THREADS / S::LANES;
    const uint8_t *from = b->raw_from + chunk * S::CHUNK_BYTES;
    uint8_t *piece = to + (int)threadIdx.x / S::LANES * S::PITCH + 16 * lane;

    CU_UNROLL
    for (int i = 0; i < S::ROWS / apart; i++) {
        int skew = (int)(reinterpret_cast<uintptr_t>(from) & 15);
        if (16 * lane - skew < n_bytes)
            cu_async_copy16(piece + i * apart * S::PITCH, from - skew);
        from += apart * b->w_stride;
    }
}

template <typename S> static __device__ inline void fetch_raw(const struct block<S> *b, int chunk)
{
    int left = (b->n_cols - chunk * S::CHUNK) / S::LEN * S::BLOCK_BYTES;
    int n_bytes = left < S::CHUNK_BYTES ? left : S::CHUNK_BYTES;
    uint8_t *to = b->raw + chunk % S::CHUNKS * S::RAW_BYTES;
    bool is_first = b->row0 == 0 && chunk == 0, is_last = b->last_row == S::ROWS - 1 && left <= S::CHUNK_BYTES;

    if (left <= 0)
        return;
    if (b->last_row < S::ROWS - 1 || is_first || is_last)
        copy_edges(b, chunk, n_bytes, to);
    else
        copy_inner(b, chunk, n_bytes, to);
}

/* ---- weights as halves ---- */

/* Unit `i` of this thread, 16 columns of a row, of step `step`; columns past the last are 0. Without branches, so that it can go on
 * between the products; past the last step it unpacks whatever is there, for nobody. */
template <typename S, int TYPE, bool IS_ALIGNED>
static __device__ inline void dequantize(const struct cu_mat_args *a, const struct block<S> *b, int step, int i)
{
    const int per_row = S::K / 16, apart = S::N_THREADS / per_row, part = (int)threadIdx.x % per_row;
    int chunk = step / S::STEPS, at = step % S::STEPS * (S::K / 32) + part / 2;
    uint16_t *to = b->w + step % 2 * S::W_LEN + i * apart * S::K;
    const uint8_t *from =
        b->raw + chunk % S::CHUNKS * S::RAW_BYTES + ((int)threadIdx.x / per_row + i * apart) * S::PITCH;
    uint32_t skew = IS_ALIGNED ? 0 : (b->skew[i] + (uint32_t)(chunk * S::CHUNK_BYTES)) % 16;
    uint32_t keep = !S::IS_RAGGED || step * S::K + part * 16 < b->n_cols ? 0xffffffffu : 0, x[8];

    cu_half16<TYPE>::unpack(from, skew, at, part % 2, a->books, x);
    CU_UNROLL
    for (int e = 0; e < 2; e++) {
        struct cu_piece out = {{x[4 * e] & keep, x[4 * e + 1] & keep, x[4 * e + 2] & keep, x[4 * e + 3] & keep}};
        *reinterpret_cast<struct cu_piece *>(to + first_place<S>(per_row, 2 * part + e)) = out;
    }
}

/* ---- products ---- */

/* Places are the 16 rows of a product, weight rows its 8 columns: neighbouring lanes then hold neighbouring floats of dst. */
template <typename S>
static __device__ inline void multiply(const uint16_t *x, const uint16_t *w, int kk, float acc[S::M][S::N][4])
{
    int lane = (int)threadIdx.x % 32, x_row = lane % 16, w_row = lane % 8 + lane / 16 * 8;
    struct cu_frag_a fa[S::M];
    struct cu_frag_b fb[S::N];

    CU_UNROLL
    for (int m = 0; m < S::M; m++)
        cu_load_matrices(x + place_of<S::K>(x_row, 2 * kk + lane / 16) + 16 * m * S::K, fa[m].x);
    CU_UNROLL
    for (int n = 0; n < S::N; n += 2) {
        uint32_t two[4];
        cu_load_matrices(w + place_of<S::K>(w_row, 2 * kk + lane / 8 % 2) + 8 * n * S::K, two);
        fb[n] = {{two[0], two[1]}};
        fb[n + 1] = {{two[2], two[3]}};
    }
    CU_UNROLL
    for (int m = 0; m < S::M; m++)
        CU_UNROLL
    for (int n = 0; n < S::N; n++)
        cu_mma(acc[m][n], &fa[m], &fb[n]);
}

struct alignas(8) two_floats {
    float x[2];
};

/* Two neighbours of a place's row, of which the second may be past the end. */
static __device__ inline void put2(float *to, float x, float y, bool is_two)
{
    if (is_two && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        struct two_floats both = {{x, y}};
        *reinterpret_cast<struct two_floats *>(to) = both;
        return;
    }
    to[0] = x;
    if (is_two)
        to[1] = y;
}

/* A lane holds places lane / 4 and + 8, rows 2 * (lane % 4) and + 1 of each 16 x 8. */
template <typename S>
static __device__ inline void write_tile(const struct cu_mat_args *a, const struct block<S> *b, int row0, int tok0,
                                         const float acc[S::M][S::N][4])
{
    int lane = (int)threadIdx.x % 32;

    CU_UNROLL
    for (int i = 0; i < 2 * S::M; i++) {
        int tok = tok0 + 8 * i + lane / 4, place = b->k.first + tok;
        if (tok >= b->k.n)
            continue;
        const char *x = static_cast<const char *>(cu_x_of(a, place));
        float factor = *reinterpret_cast<const float *>(x + a->x_stride - 16);
        float *to = a->dst + (int64_t)(a->dst_row ? a->dst_row[place] : place) * a->dst_stride;
        CU_UNROLL
        for (int n = 0; n < S::N; n++) {
            int row = row0 + 8 * n + lane % 4 * 2;
            const float *sums = acc[i / 2][n] + i % 2 * 2;
            const bool is_two = row + 1 < a->n_rows;
            if (row < a->n_rows)
                put2(to + row, cu_finished(b->k.scale, b->k.bias, row, sums[0] * factor),
                     is_two ? cu_finished(b->k.scale, b->k.bias, row + 1, sums[1] * factor) : 0.0f, is_two);
        }
    }
}

/* ---- the kernel ---- */

template <typename S> static __device__ inline struct block<S> block_of(const struct cu_mat_args *a, char *shared) {
    struct block<S> b;

    b.k = cu_work_of(a);
    b.row0 = (int)blockIdx.x * S::ROWS;
    b.n_cols = (int)a->n_cols;
    b.n_step = (b.n_cols + S::K - 1) / S::K;
    b.w0 = b.k.w + (uint64_t)b.row0 * a->w_stride;
    b.last_row = a->n_rows - 1 - b.row0;
    b.w_stride = (int)a->w_stride;
    b.end = b.k.w + (uint64_t)(a->n_rows - 1) * a->w_stride + b.n_cols / S::LEN * S::BLOCK_BYTES;
    b.raw = reinterpret_cast<uint8_t *>(shared);
    b.x = reinterpret_cast<uint16_t *>(shared + S::CHUNKS * S::RAW_BYTES);
    b.w = b.x + S::STAGES * S::X_LEN;
    b.raw_from = b.w0 + (int)threadIdx.x / S::LANES * b.w_stride + 16 * ((int)threadIdx.x % S::LANES);
    find_x<S>(a, &b);
    CU_UNROLL
    for (int i = 0; i < S::N_UNITS; i++) {
        int row = ((int)threadIdx.x + i * S::N_THREADS) / (S::K / 16);
        b.skew[i] = (uint32_t)(reinterpret_cast<uintptr_t>(row_of(&b, row)) & 15);
    }
    return b;
}

/* What the first step needs; the last STAGES - 1 groups of copies are the first steps of x. */
template <typename S>
static __device__ inline void begin(struct block<S> *b)
{
    fetch_raw<S>(b, 0);
    cu_async_commit();
    for (int step = 0; step < S::STAGES - 1; step++) {
        fetch_x<S>(b, step);
        if (step == 0)
            for (int chunk = 1; chunk < S::CHUNKS; chunk++)
                fetch_raw<S>(b, chunk);
        cu_async_commit();
    }
    cu_async_wait<S::STAGES - 1>();
    __syncthreads();
}

/* All steps: the sums of the warp's places from tok0 on and rows from row0 on. */
template <typename S, int TYPE, bool IS_ALIGNED>
static __device__ inline void steps(const struct cu_mat_args *a, struct block<S> *b, int row0, int tok0,
                                    float acc[S::M][S::N][4])
{
    begin<S>(b);
    CU_UNROLL
    for (int i = 0; i < S::N_UNITS; i++)
        dequantize<S, TYPE, IS_ALIGNED>(a, b, 0, i);
    for (int step = 0; step < b->n_step; step++) {
        cu_async_wait<S::STAGES - 2>();
        __syncthreads(); /* what this step reads is there, and nobody reads what the next lines write any more */
        fetch_x<S>(b, step + S::STAGES - 1);
        if ((step + 1) % S::STEPS == 0)
            fetch_raw<S>(b, (step + 1) / S::STEPS + S::CHUNKS - 1);
        cu_async_commit();
        const uint16_t *x = b->x + step % S::STAGES * S::X_LEN + tok0 * S::K;
        const uint16_t *w = b->w + step % 2 * S::W_LEN + row0 * S::K;
        CU_UNROLL
        for (int kk = 0; kk < S::K / 16; kk++) {
            multiply<S>(x, w, kk, acc);
            if (kk < S::N_UNITS)
                dequantize<S, TYPE, IS_ALIGNED>(a, b, step + 1, kk);
        }
    }
    cu_async_wait<0>();
}

template <int TYPE, bool MANY>
static __global__ void __launch_bounds__(shape<TYPE, MANY>::N_THREADS, 1) gemm(const struct cu_mat_args a)
{
    typedef shape<TYPE, MANY> S;
    CU_SHARED_DYN(
        char, shared); /* CHUNKS of (ROWS, PITCH) bytes, STAGES of (TOK, K) halves of x, two of (ROWS, K) of weights */
    cu_await();
    if (cu_is_unlisted(&a))
        return;
    struct block<S> b = block_of<S>(&a, shared);
    int warp = (int)threadIdx.x / 32, row0 = warp / S::WARPS_TOK * S::WARP_ROWS,
        tok0 = warp % S::WARPS_TOK * S::WARP_TOK;
    float acc[S::M][S::N][4] = {};

    if (S::CAN_ALIGN && (reinterpret_cast<uintptr_t>(b.k.w) | a.w_stride) % 16 == 0)
        steps<S, TYPE, S::CAN_ALIGN>(&a, &b, row0, tok0, acc);
    else
        steps<S, TYPE, false>(&a, &b, row0, tok0, acc);
    write_tile<S>(&a, &b, b.row0 + row0, tok0, acc);
}

/* ---- launches ---- */

template <int TYPE, bool MANY> static cudaError_t launch(const struct cu_mat_args *a, cudaStream_t stream)
{
    typedef shape<TYPE, MANY> S;
    dim3 grid((unsigned)((a->n_rows + S::ROWS - 1) / S::ROWS), cu_n_tiles(a));
    return CU_LAUNCH((gemm<TYPE, MANY>), grid, dim3(S::N_THREADS), S::BYTES, stream, *a);
}

cudaError_t cu_gemm(const struct cu_mat_args *a, cudaStream_t stream)
{
    bool is_many = a->tile_tok == CU_GEMM_TOK_MANY;

    if (a->card.has_wgmma)
        return cu_wgmma(a, stream);
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return is_many ? launch<QUANT_##NAME, true>(a, stream) : launch<QUANT_##NAME, false>(a, stream);
        CU_QUANT_TYPES(CASE)
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}

/* Let a kernel's blocks have more than the 48 KiB of shared memory that need no asking for; those that no block may have are
 * never launched (fits_many). */
template <int TYPE, bool MANY> static cudaError_t allow(const struct cu_card *card)
{
    const int bytes = shape<TYPE, MANY>::BYTES;

    if (bytes <= 48 * 1024 || bytes > card->shared_bytes)
        return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(gemm<TYPE, MANY>),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

cudaError_t cu_gemm_prepare(const struct cu_card *card)
{
    cudaError_t e = card->has_wgmma ? cu_wgmma_prepare() : cudaSuccess;

#define ALLOW(NAME)                               \
    e = e ? e : allow<QUANT_##NAME, false>(card); \
    e = e ? e : allow<QUANT_##NAME, true>(card);
    CU_QUANT_TYPES(ALLOW)
    CU_FLOAT_TYPES(ALLOW)
#undef ALLOW
    return e;
}

static int many_bytes(enum quant_type type)
{
    switch (type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return shape<QUANT_##NAME, true>::BYTES;
        CU_QUANT_TYPES(CASE)
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return INT32_MAX;
    }
}

/* Large tiles read x and weights less often, but leave multiprocessors idle when they are few. A large tile is four small ones; a small
 * one takes some 1.6 of its quarter, because it loads twice as much for each product. */
int cu_gemm_tile_tok(const struct cu_card *card, enum quant_type type, int64_t n_rows, int n_place)
{
    if (card->has_wgmma)
        return cu_wgmma_tile_tok(card, n_rows, n_place);
    if (n_place <= CU_GEMM_TOK || many_bytes(type) > card->shared_bytes)
        return CU_GEMM_TOK;
    int64_t many = cu_n_rounds(n_rows, 128, n_place, CU_GEMM_TOK_MANY, card->n_multiprocessors);
    int64_t few = cu_n_rounds(n_rows, 64, n_place, CU_GEMM_TOK, card->n_multiprocessors);
    return 40 * many <= 16 * few ? CU_GEMM_TOK_MANY : CU_GEMM_TOK;
}
