/* cu_gemm by products of warpgroups (wgmma), for compute capability 9.0: weights are a factor that lies in registers, rows of x the one in
 * shared memory.
 *
 * A block makes ROWS weight rows x TOK places, 128 columns a step; each warp has 16 of the rows. A lane's words of a product are 4 columns
 * of two rows, and in which order columns are multiplied nobody cares: so that a lane takes 32 neighbouring columns of its rows a step,
 * unpacked straight to where they are multiplied, cu_half puts the columns of x into that order (by_lanes). Rows of x come by asynchronous
 * copies two steps ahead, for the whole block; weights as they are stored, in chunks of whole blocks, each warp's own rows by itself.
 * Products and what unpacks weights use the registers' ports in turn (README.md), so nothing is gained by letting a warp do both at once.
 * A place's sum is made column by column in the same order whatever the tile is. */
#include "cuda/gemm.cuh"

#include "cuda/dequant_half.cuh"
#include "cuda/device.cuh"
#include "cuda/mat.cuh"
#include "cuda/ptx.cuh"

enum { K = 128, STAGES = 3, PRODUCTS = K / 16, TILE_BYTES = 1024 /* what a tile of x is aligned to */ };

/* Shared memory of a multiprocessor, and what of it each block takes besides its own. */
enum { MULTI_BYTES = 228 * 1024, OWN_BYTES = 1024 };

/* ---- shapes ---- */

/* Where a place's sums go. */
struct target {
    float *to;
    float factor;
};

/* N_BLOCKS share a multiprocessor: of 128 x 64 two, of 64 x 64 up to four, if its shared memory has room for so many. A chunk's copies have
 * two steps at least to arrive. */
template <int TYPE, int TOK_, int ROWS_> struct shape {
    static constexpr int TOK = TOK_, ROWS = ROWS_, N_THREADS = ROWS * 2;
    static constexpr int LEN = cu_storage<TYPE>::LEN, BLOCK_BYTES = cu_storage<TYPE>::BYTES;
    /* Columns of a chunk: some 136 bytes of a row, so that little comes along beside them; floats have more. */
    static constexpr int CHUNK =
        LEN > K || K / LEN *BLOCK_BYTES<100 ? 256 : K, STEPS = CHUNK / K, CHUNKS = STEPS> 1 ? 2 : 3;
    static constexpr int CHUNK_BYTES = CHUNK / LEN * BLOCK_BYTES;
    static constexpr bool CAN_ALIGN = BLOCK_BYTES % 16 == 0; /* then usually no row begins askew */
    static constexpr bool IS_RAGGED = LEN % K != 0;          /* the last step may have columns past the last */
    /* A row of a chunk comes in pieces of 16 aligned bytes, wherever it begins. Of a warp's 16 rows the odd ones lie behind the even
     * ones, so much further that 8 neighbouring lanes, which read two rows, meet no bank twice. */
    static constexpr int PIECES = (CHUNK_BYTES + 15 + 15) / 16;
    static constexpr int ODD = TYPE == QUANT_Q8_0 ? (8 * PIECES + 7) / 8 * 8 + 1 : (8 * PIECES + 3) / 8 * 8 + 4;
    static constexpr int WARP_BYTES = 16 * (ODD + 8 * PIECES), RAW_BYTES = ROWS / 16 * WARP_BYTES;
    static constexpr int TILE_LEN = TOK * 64, X_LEN = 2 * TILE_LEN; /* halves of 64 columns, of a step */
    static constexpr int N_X = TOK * 8 / N_THREADS; /* rows of x of which a thread copies a piece of each 64 columns */
    static constexpr int MAIN_BYTES = STAGES * X_LEN * (int)sizeof(uint16_t) + CHUNKS * RAW_BYTES;
    static constexpr int SHARED_BYTES = TILE_BYTES + MAIN_BYTES + TOK * (int)sizeof(struct target);
    static constexpr int ROOM = MULTI_BYTES / (SHARED_BYTES + OWN_BYTES), MOST = 512 / N_THREADS;
    static constexpr int N_BLOCKS = ROOM < 2 ? 1 : ROOM < MOST ? ROOM : MOST;
    static_assert((CHUNKS - 1) * STEPS >= STAGES - 1 && N_THREADS / 8 % 8 == 0, "a shape that cannot be");
};

/* What a block works on, and where; of a thread, what it copies and unpacks. Rows past the last are the last again. */
template <typename S> struct block {
    struct cu_work k;
    int row0, n_cols, n_step, warp, lane;
    const uint8_t *w0, *end;    /* row row0; behind the last byte of the matrix */
    int last_row, w_stride;     /* from row0 on */
    const char *x_from[S::N_X]; /* of the next step that is fetched */
    uint32_t skew[2];           /* how far the lane's rows begin behind a multiple of 16 bytes */
    uint8_t *raw;               /* of the warp */
    const uint8_t *raw_row[2];  /* of the lane */
    uint16_t *x;
};

/* Which stages and which buffer are next: of x that is multiplied, of x that is fetched, of the chunk that is unpacked. */
struct ring {
    int stage, ahead, buffer;
};

template <typename S> static __device__ inline const uint8_t *row_of(const struct block<S> *b, int row)
{
    return b->w0 + (row < b->last_row ? row : b->last_row) * b->w_stride;
}

/* Where one of the warp's 16 rows lies in a chunk. */
template <typename S> static __device__ inline int raw_place(int row)
{
    return 16 * (row / 2 * S::PIECES + row % 2 * S::ODD);
}

/* Aligned floats lie as they are read, four pieces by each lane: pieces change places, so that neighbours meet no bank twice. */
template <int TYPE, bool IS_ALIGNED> static __device__ inline int piece_place(int piece)
{
    return TYPE == QUANT_F16 && IS_ALIGNED ? piece ^ (piece / 4 & 3) : piece;
}

/* ---- copies ---- */

/* This thread's pieces of x: one and the same of each N_THREADS / 8th place. Places past the last are the first again. */
template <typename S> static __device__ inline void find_x(const struct cu_mat_args *a, struct block<S> *b)
{
    CU_UNROLL
    for (int i = 0; i < S::N_X; i++) {
        int tok = ((int)threadIdx.x + i * S::N_THREADS) / 8, place = b->k.first + (tok < b->k.n ? tok : 0);
        b->x_from[i] = static_cast<const char *>(cu_x_of(a, place)) + (int)threadIdx.x % 8 * 16;
    }
}

/* Step `step` of x, the next one, into a stage: two tiles of (TOK, 64) halves, as products want them. */
template <typename S> static __device__ inline void fetch_x(struct block<S> *b, int step, int stage)
{
    const int piece = (int)threadIdx.x % 8, tok = (int)threadIdx.x / 8, apart = S::N_THREADS / 8;
    uint16_t *to = b->x + stage * S::X_LEN + tok * 64 + (piece ^ (tok & 7)) * 8;

    if (step >= b->n_step)
        return;
    CU_UNROLL
    for (int i = 0; i < S::N_X; i++) {
        if (S::TOK > CU_GEMM_TOK || tok + i * apart < b->k.n) { /* a small tile of an expert may have few places */
            cu_async_copy16(to + i * apart * 64, b->x_from[i]);
            cu_async_copy16(to + i * apart * 64 + S::TILE_LEN, b->x_from[i] + 128);
        }
        b->x_from[i] += K * 2;
    }
}

/* Chunk `chunk` of the warp's rows to `to`, piece by piece. What lies beside a row's part of it comes along, but never what lies beside
 * the matrix: chunks that may touch its edges go this way, and blocks with fewer rows than they have room for. */
template <typename S, int TYPE, bool IS_ALIGNED>
static __device__ inline void copy_edges(const struct block<S> *b, int chunk, int left, uint8_t *to)
{
    const int n_bytes = left < S::CHUNK_BYTES ? left : S::CHUNK_BYTES;

    for (int i = b->lane; i < 16 * S::PIECES; i += 32) {
        const int row = i / S::PIECES, piece = i % S::PIECES;
        const uint8_t *from = row_of(b, b->warp * 16 + row) + chunk * S::CHUNK_BYTES;
        int at = 16 * piece - (int)(reinterpret_cast<uintptr_t>(from) & 15);
        uint8_t *place = to + raw_place<S>(row) + 16 * piece_place<TYPE, IS_ALIGNED>(piece);
        if (at >= n_bytes)
            continue;
        if (from + at >= b->k.w && from + at + 16 <= b->end)
            cu_async_copy16(place, from + at);
        else
            cu_copy_edge(place, from, at, n_bytes);
    }
}

template <typename S, int TYPE, bool IS_ALIGNED>
static __device__ inline void copy_inner(const struct block<S> *b, int chunk, uint8_t *to)
{
    constexpr int USED = IS_ALIGNED ? S::CHUNK_BYTES / 16 : S::PIECES, WIDE = USED <= 4    ? 4
                                                                              : USED <= 8  ? 8
                                                                              : USED <= 16 ? 16
                                                                                           : 32;
    constexpr int APART = 32 / WIDE;
    const int row = b->lane / WIDE;

    CU_UNROLL
    for (int e = 0; e < USED; e += WIDE) { /* once, but for floats that lie askew */
        const int piece = b->lane % WIDE + e;
        const uint8_t *from = b->w0 + (b->warp * 16 + row) * b->w_stride + chunk * S::CHUNK_BYTES + 16 * piece;
        uint8_t *place = to + 16 * piece_place<TYPE, IS_ALIGNED>(piece);
        if (piece >= USED)
            continue;
        CU_UNROLL
        for (int i = 0; i < 16 / APART; i++) {
            cu_async_copy16(place + raw_place<S>(row + i * APART), IS_ALIGNED ? from : cu_aligned16(from));
            from += APART * b->w_stride;
        }
    }
}

template <typename S, int TYPE, bool IS_ALIGNED>
static __device__ inline void fetch_raw(const struct block<S> *b, int chunk, int buffer)
{
    const int left = (b->n_cols - chunk * S::CHUNK) / S::LEN * S::BLOCK_BYTES;
    uint8_t *to = b->raw + buffer * S::RAW_BYTES;
    bool is_first = !IS_ALIGNED && b->row0 == 0 && chunk == 0;
    bool is_last = !IS_ALIGNED && b->last_row == S::ROWS - 1 && left < 16 * S::PIECES;

    if (left <= 0)
        return;
    if (b->last_row < S::ROWS - 1 || left < S::CHUNK_BYTES || is_first || is_last)
        copy_edges<S, TYPE, IS_ALIGNED>(b, chunk, left, to);
    else
        copy_inner<S, TYPE, IS_ALIGNED>(b, chunk, to);
}

/* ---- weights as halves ---- */

/* 32 columns of one of the lane's two rows, where products want them; columns past the last are 0. AT: the step's place in its chunk. */
template <typename S, int TYPE, bool IS_ALIGNED, int AT>
static __device__ inline void unpack_row(const struct cu_mat_args *a, const struct block<S> *b, int step, int buffer,
                                         int which, uint32_t w[PRODUCTS][4])
{
    const int part = b->lane & 3, at = AT * 4 + part;
    const uint8_t *from = b->raw_row[which] + buffer * S::RAW_BYTES;
    const uint32_t keep = !S::IS_RAGGED || step * K + part * 32 < b->n_cols ? 0xffffffffu : 0;
    const uint32_t skew = IS_ALIGNED ? 0 : (b->skew[which] + (uint32_t)(step / S::STEPS * S::CHUNK_BYTES)) % 16;
    uint32_t x[16];

    if (TYPE == QUANT_F16 && IS_ALIGNED) {
        CU_UNROLL
        for (int i = 0; i < 4; i++)
            cu_load_wide<4>(from + 16 * piece_place<TYPE, IS_ALIGNED>(4 * at + i), x + 4 * i);
    } else {
        cu_half32<TYPE>::unpack(from, skew, at, a->books, x);
    }
    CU_UNROLL
    for (int i = 0; i < PRODUCTS; i++) {
        w[i][which] = x[2 * i] & keep;
        w[i][2 + which] = x[2 * i + 1] & keep;
    }
}

/* ---- steps ---- */

template <typename S>
static __device__ inline void multiply(const uint16_t *x, uint32_t w[PRODUCTS][4], struct cu_group_sums<S::TOK> *sums)
{
    const struct cu_group_tile tile = cu_group_tile_of(x);

    cu_group_begin(sums, w, PRODUCTS);
    CU_UNROLL
    for (int i = 0; i < PRODUCTS; i++)
        cu_group_mul(sums, w[i], tile, i / 4 * S::TILE_LEN, i % 4);
    cu_group_end(sums);
}

/* What the first steps need; the latest group of copies is x of step 1. */
template <typename S, int TYPE, bool IS_ALIGNED> static __device__ inline struct ring begin(struct block<S> *b)
{
    fetch_raw<S, TYPE, IS_ALIGNED>(b, 0, 0);
    cu_async_commit();
    fetch_x(b, 0, 0);
    CU_UNROLL
    for (int chunk = 1; chunk < S::CHUNKS; chunk++)
        fetch_raw<S, TYPE, IS_ALIGNED>(b, chunk, chunk);
    cu_async_commit();
    fetch_x(b, 1, 1);
    cu_async_commit();
    cu_async_wait<2>();
    cu_syncwarp();
    return {0, 2, 0};
}

template <typename S, int TYPE, bool IS_ALIGNED, int AT>
static __device__ inline void one_step(const struct cu_mat_args *a, struct block<S> *b, int step, struct ring *r,
                                       struct cu_group_sums<S::TOK> *sums)
{
    uint32_t w[PRODUCTS][4];

    CU_UNROLL
    for (int which = 0; which < 2; which++)
        unpack_row<S, TYPE, IS_ALIGNED, AT>(a, b, step, r->buffer, which, w);
    cu_async_wait<1>();
    cu_async_publish();
    __syncthreads(); /* this step's x is there, and so is what the next step unpacks; nobody reads what the next lines write any more */
    multiply<S>(b->x + r->stage * S::X_LEN, w, sums);
    fetch_x(b, step + 2, r->ahead);
    if (AT == S::STEPS - 1) {
        fetch_raw<S, TYPE, IS_ALIGNED>(b, step / S::STEPS + S::CHUNKS, r->buffer);
        r->buffer = r->buffer == S::CHUNKS - 1 ? 0 : r->buffer + 1;
    }
    cu_async_commit();
    cu_group_wait(sums);
    r->stage = r->stage == STAGES - 1 ? 0 : r->stage + 1;
    r->ahead = r->ahead == STAGES - 1 ? 0 : r->ahead + 1;
}

template <typename S, int TYPE, bool IS_ALIGNED>
static __device__ inline void steps(const struct cu_mat_args *a, struct block<S> *b, struct cu_group_sums<S::TOK> *sums)
{
    struct ring r = begin<S, TYPE, IS_ALIGNED>(b);

    CU_UNROLL_BY(1)
    for (int step = 0; step < b->n_step; step += 2) {
        one_step<S, TYPE, IS_ALIGNED, 0>(a, b, step, &r, sums);
        if (step + 1 < b->n_step)
            one_step<S, TYPE, IS_ALIGNED, S::STEPS - 1>(a, b, step + 1, &r, sums);
    }
    cu_async_wait<0>();
}

/* ---- the kernel ---- */

/* shared: a multiple of TILE_BYTES. */
template <typename S> static __device__ inline struct block<S> block_of(const struct cu_mat_args *a, char *shared) {
    struct block<S> b;

    b.k = cu_work_of(a);
    b.row0 = (int)blockIdx.x * S::ROWS;
    b.n_cols = (int)a->n_cols;
    b.n_step = (b.n_cols + K - 1) / K;
    b.warp = (int)threadIdx.x / 32;
    b.lane = (int)threadIdx.x % 32;
    b.w0 = b.k.w + (uint64_t)b.row0 * a->w_stride;
    b.last_row = a->n_rows - 1 - b.row0;
    b.w_stride = (int)a->w_stride;
    b.end = b.k.w + (uint64_t)(a->n_rows - 1) * a->w_stride + b.n_cols / S::LEN * S::BLOCK_BYTES;
    b.x = reinterpret_cast<uint16_t *>(shared);
    b.raw = reinterpret_cast<uint8_t *>(b.x + STAGES * S::X_LEN) + b.warp * S::WARP_BYTES;
    CU_UNROLL
    for (int which = 0; which < 2; which++) {
        const int row = b.lane / 4 + 8 * which;
        b.skew[which] = (uint32_t)(reinterpret_cast<uintptr_t>(row_of(&b, b.warp * 16 + row)) & 15);
        b.raw_row[which] = b.raw + raw_place<S>(row);
    }
    find_x<S>(a, &b);
    return b;
}

template <typename S>
static __device__ inline void find_targets(const struct cu_mat_args *a, const struct block<S> *b, struct target *t)
{
    for (int tok = (int)threadIdx.x; tok < b->k.n; tok += S::N_THREADS) {
        const char *x = static_cast<const char *>(cu_x_of(a, b->k.first + tok));
        t[tok].factor = *reinterpret_cast<const float *>(x + a->x_stride - 16);
        t[tok].to = cu_dst_of(a, &b->k, b->k.first + tok, b->row0);
    }
}

/* A lane holds rows lane / 4 and + 8 of its warp's, places 2 * (lane % 4) and + 1 of each 8. */
template <typename S>
static __device__ inline void write_tile(const struct block<S> *b, const struct target *t,
                                         const struct cu_group_sums<S::TOK> *sums)
{
    const int row = b->warp * 16 + b->lane / 4;

    CU_UNROLL
    for (int i = 0; i < S::TOK / 4; i++) {
        const int tok = i / 2 * 8 + b->lane % 4 * 2 + i % 2;
        if (tok >= b->k.n)
            continue;
        const struct target to = t[tok];
        CU_UNROLL
        for (int half = 0; half < 2; half++)
            if (row + 8 * half <= b->last_row)
                to.to[row + 8 * half] = cu_finished(b->k.scale, b->k.bias, b->row0 + row + 8 * half,
                                                    sums->x[i / 2 * 4 + half * 2 + i % 2] * to.factor);
    }
}

/* Where there is no code for warpgroups, no block may be as large as it is launched: cu_gemm_has_wgmma asks for that. */
template <typename S> constexpr int most_threads = CU_HAS_WGMMA ? S::N_THREADS : 32;

template <int TYPE, typename S>
static __global__ void CU_BOUNDS(most_threads<S>, S::N_BLOCKS) gemm_wgmma(const struct cu_mat_args a)
{
#if CU_HAS_WGMMA
    CU_SHARED_DYN(
        char,
        room); /* up to TILE_BYTES of nothing, STAGES of two (TOK, 64) halves of x, CHUNKS of weights, (TOK) targets */
    cu_await();
    if (cu_is_unlisted(&a))
        return;
    char *shared = room + (TILE_BYTES - reinterpret_cast<uintptr_t>(room) % TILE_BYTES) % TILE_BYTES;
    struct target *targets = reinterpret_cast<struct target *>(shared + S::MAIN_BYTES);
    struct block<S> b = block_of<S>(&a, shared);
    struct cu_group_sums<S::TOK> sums = {
    };

    find_targets(&a, &b, targets);
    if (S::CAN_ALIGN && (reinterpret_cast<uintptr_t>(b.k.w) | a.w_stride) % 16 == 0)
        steps<S, TYPE, S::CAN_ALIGN>(&a, &b, &sums);
    else
        steps<S, TYPE, false>(&a, &b, &sums);
    write_tile(&b, targets, &sums);
#endif
}

/* ---- launches ---- */

/* Rows of a block where they are to be many: of F32 a block has no room for more. */
template <int TYPE> constexpr int most_rows = TYPE == QUANT_F32 ? 64 : 128;

/* What the rounds of a grid take, about, whatever the columns: of 4096 columns of Q4_K a round of blocks took 42 us (128 x 128), 33
 * (128 x 64) and 20 (64 x 64) on an H200; two or four of small ones that share a multiprocessor take hardly less than in turn. */
static int64_t cost(const struct cu_card *card, int64_t n_rows, int rows, int64_t n_place, int tok)
{
    return cu_n_rounds(n_rows, rows, n_place, tok, card->n_multiprocessors) * (tok == CU_GEMM_TOK_MANY ? 42
                                                                               : rows == 128           ? 33
                                                                                                       : 20);
}

int cu_wgmma_tile_tok(const struct cu_card *card, int64_t n_rows, int n_place)
{
    if (n_place <= CU_GEMM_TOK)
        return CU_GEMM_TOK;
    int64_t many = cost(card, n_rows, 128, n_place, CU_GEMM_TOK_MANY);
    return many <= cost(card, n_rows, 128, n_place, CU_GEMM_TOK) && many <= cost(card, n_rows, 64, n_place, CU_GEMM_TOK)
               ? CU_GEMM_TOK_MANY
               : CU_GEMM_TOK;
}

template <int TYPE, int TOK, int ROWS> static cudaError_t launch(const struct cu_mat_args *a, cudaStream_t stream)
{
    typedef shape<TYPE, TOK, ROWS> S;
    dim3 grid((unsigned)((a->n_rows + ROWS - 1) / ROWS), cu_n_tiles(a));
    return CU_LAUNCH((gemm_wgmma<TYPE, S>), grid, dim3(S::N_THREADS), S::SHARED_BYTES, stream, *a);
}

template <int TYPE> static cudaError_t launch_shape(const struct cu_mat_args *a, cudaStream_t stream)
{
    const int64_t n_tiles = cu_n_tiles(a);

    if (a->tile_tok == CU_GEMM_TOK_MANY)
        return launch<TYPE, CU_GEMM_TOK_MANY, most_rows<TYPE>>(a, stream);
    if (cost(&a->card, a->n_rows, 128, n_tiles, 1) <= cost(&a->card, a->n_rows, 64, n_tiles, 1))
        return launch<TYPE, CU_GEMM_TOK, most_rows<TYPE>>(a, stream);
    return launch<TYPE, CU_GEMM_TOK, 64>(a, stream);
}

cudaError_t cu_wgmma(const struct cu_mat_args *a, cudaStream_t stream)
{
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return launch_shape<QUANT_##NAME>(a, stream);
        CU_QUANT_TYPES(CASE)
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}

template <int TYPE, int TOK, int ROWS> static cudaError_t allow()
{
    typedef shape<TYPE, TOK, ROWS> S;
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(gemm_wgmma<TYPE, S>),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, S::SHARED_BYTES);
}

cudaError_t cu_wgmma_prepare(void)
{
    cudaError_t e = cudaSuccess;

#define ALLOW(NAME)                                                                       \
    e = e ? e : allow<QUANT_##NAME, CU_GEMM_TOK_MANY, most_rows<QUANT_##NAME>>();         \
    e = e || most_rows<QUANT_##NAME> == 64 ? e : allow<QUANT_##NAME, CU_GEMM_TOK, 128>(); \
    e = e ? e : allow<QUANT_##NAME, CU_GEMM_TOK, 64>();
    CU_QUANT_TYPES(ALLOW)
    CU_FLOAT_TYPES(ALLOW)
#undef ALLOW
    return e;
}

cudaError_t cu_gemm_has_wgmma(bool *has_wgmma)
{
    typedef shape<QUANT_Q8_0, CU_GEMM_TOK, 64> S;
    struct cudaFuncAttributes of = {};
    cudaError_t e = cudaFuncGetAttributes(&of, reinterpret_cast<const void *>(gemm_wgmma<QUANT_Q8_0, S>));

    *has_wgmma = e == cudaSuccess && of.maxThreadsPerBlock >= S::N_THREADS;
    return e;
}
