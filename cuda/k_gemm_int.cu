/* Matrices times many rows by integer tensor cores, the bits of cu_gemv: a quantized block's sum is an exact integer in any order, and
 * each thread adds the blocks of its results up in ascending order, one fmaf each (cpu/kern.h). */
#include "cuda/launch.h"

#include "cuda/act.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/mat.cuh"
#include "cuda/ptx.cuh"

/* A block makes ROWS weight rows x CU_GEMM_INT_TOK places, each of its 8 warps 32 x 32 of them. Columns come in steps of STEP, weights
 * unpacked into codes. Rows in shared memory are 16 bytes further apart than they are long: 8 neighbours then begin in different banks. */
enum {
    THREADS = 256,
    ROWS = 128,
    TOK = CU_GEMM_INT_TOK,
    STEP = 128,
    GROUPS = STEP / 32,
    STRIDE = STEP + 16,
    M_TILES = 2,
    N_TILES = 4,
};

/* Types whose groups of 32 have two scales, one for each half; with NVFP4 they are d and m. */
template <int TYPE> struct two_scales {
    static constexpr bool value = false;
};
#define TWO_SCALES(NAME)                          \
    template <> struct two_scales<QUANT_##NAME> { \
        static constexpr bool value = true;       \
    };
TWO_SCALES(Q2_K)
TWO_SCALES(Q3_K)
TWO_SCALES(Q6_K)
TWO_SCALES(IQ2_XS)
TWO_SCALES(IQ2_S)
TWO_SCALES(IQ1_M)
TWO_SCALES(NVFP4)

/* What a step needs. Of types in blocks of 32: d, m, x_d, x_sum of each group. Of those in blocks of 256: scale, sub of each group; min,
 * low and high of the whole block, whose first half comes with one step and second half with the next; d[0], m[0], x_d[0]. */
struct stage {
    alignas(16) uint8_t w[ROWS][STRIDE], x[TOK][STRIDE];
    alignas(16) int8_t min[ROWS][16];               /* of each 16 elements */
    alignas(16) int8_t low[TOK][16], high[TOK][16]; /* sum16 = 128 * high + low */
    int8_t scale[GROUPS][2][ROWS + 8];              /* 8 more: groups begin in different banks */
    int8_t sub[GROUPS][TOK + 8];
    float d[GROUPS][ROWS], m[GROUPS][ROWS];
    float x_d[GROUPS][TOK], x_sum[GROUPS][TOK];
};

static __device__ inline void store16(void *to, const uint32_t *from)
{
    struct cu_word16 w = {{from[0], from[1], from[2], from[3]}};
    *static_cast<struct cu_word16 *>(to) = w;
}

/* Groups [first, first + n) of the block's weight rows; a thread takes a group of a row at a time. */
template <int TYPE>
static __device__ inline void fetch_w(const struct cu_mat_args *a, const struct cu_work *k, int first, int n,
                                      struct stage *s)
{
    typedef cu_block<TYPE> block;
    const int PER = block::LEN / 32;

    for (int i = (int)threadIdx.x; i < ROWS * GROUPS; i += THREADS) {
        int r = i / GROUPS, g = i % GROUPS, row = (int)blockIdx.x * ROWS + r, at = first + g;
        struct cu_group w;
        if (g >= n)
            continue;
        row = row < k->n_rows ? row : k->n_rows - 1;
        block::group(k->w + (uint64_t)row * a->w_stride + (uint64_t)(unsigned)(at / PER) * block::BYTES, at % PER,
                     a->books, &w);
        store16(&s->w[r][32 * g], w.q);
        store16(&s->w[r][32 * g + 16], w.q + 4);
        if (block::X256) {
            s->scale[g][0][r] = (int8_t)w.scale[0];
            if (two_scales<TYPE>::value)
                s->scale[g][1][r] = (int8_t)w.scale[1];
            for (int h = 0; h < 2 && block::SECOND == CU_SECOND_MIN; h++)
                s->min[r][at % 8 * 2 + h] = (int8_t)w.min[h];
            if (at % 8 == 0)
                s->d[0][r] = w.d, s->m[0][r] = w.m;
        } else {
            s->d[g][r] = w.d;
            s->m[g][r] = w.m;
        }
    }
}

/* The same columns of the places' rows; places that are not there are the first. */
template <int TYPE>
static __device__ inline void fetch_x(const struct cu_mat_args *a, const struct cu_work *k, int first, int n,
                                      struct stage *s)
{
    for (int i = (int)threadIdx.x; i < TOK * GROUPS; i += THREADS) {
        int t = i / GROUPS, g = i % GROUPS, at = first + g;
        const char *x = static_cast<const char *>(cu_x_of(a, cu_nth_place(a, k->first, t < k->n ? t : 0)));
        uint32_t codes[8];
        if (g >= n)
            continue;
        cu_load_wide<8>(x + 32 * at, codes);
        store16(&s->x[t][32 * g], codes);
        store16(&s->x[t][32 * g + 16], codes + 4);
        if (cu_block<TYPE>::X256) {
            const struct cu_act_s256 *f = cu_act_s256_of(x, a->n_cols) + at / 8;
            s->sub[g][t] = (int8_t)f->sub[at % 8];
            for (int h = at % 8 * 2; h < at % 8 * 2 + 2 && cu_block<TYPE>::SECOND == CU_SECOND_MIN; h++) {
                s->low[t][h] = (int8_t)(f->sum16[h] & 127);
                s->high[t][h] = (int8_t)(f->sum16[h] >> 7);
            }
            if (at % 8 == 0)
                s->x_d[0][t] = f->d;
        } else {
            const struct cu_act_s32 *f = cu_act_s32_of(x, a->n_cols) + at;
            s->x_d[g][t] = f->d;
            s->x_sum[g][t] = (float)f->sum;
        }
    }
}

/* A warp's results, and sums of the block of 256 that is under way. A lane has rows lane / 4 and + 8, places 2 * (lane % 4) and + 1 of
 * each 16 x 8. */
struct tile {
    float acc[M_TILES][N_TILES][4];
    int sum[M_TILES][N_TILES][4];
};

/* Where the warp's tile begins in the block's, and the lane's first row and place of it. */
struct place {
    int row, tok, lane_row, lane_tok, n_tiles; /* n_tiles: those in which there are places, by twos */
};

static __device__ inline struct place place_of(const struct cu_work *k)
{
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    struct place p = {warp / 2 * 32, warp % 2 * 32, 0, 0, 0};
    int left = (k->n - p.tok + 7) / 8;

    p.lane_row = p.row + lane / 4;
    p.lane_tok = p.tok + lane % 4 * 2;
    p.n_tiles = left < 0 ? 0 : left < N_TILES ? (left + 1) / 2 * 2 : (int)N_TILES;
    return p;
}

/* One group of 32 of blocks of 32: each is a term of its own. */
template <int TYPE>
static __device__ inline void add_terms(const struct stage *s, int g, const struct place *p, const struct cu_frag_a *fa,
                                        int n, const struct cu_frag_b *fb, float acc[M_TILES][N_TILES][4])
{
    const int SECOND = cu_block<TYPE>::SECOND;

    CU_UNROLL
    for (int m = 0; m < M_TILES; m++) {
        int low[4] = {CU_MAGIC, CU_MAGIC, CU_MAGIC, CU_MAGIC}, high[4] = {CU_MAGIC, CU_MAGIC, CU_MAGIC, CU_MAGIC};
        cu_imma16(low, fa[m].x[0], fa[m].x[1], fb->x[0]);
        cu_imma16(SECOND == CU_SECOND_HALF ? high : low, fa[m].x[2], fa[m].x[3], fb->x[1]);
        for (int i = 0; i < 4; i++) {
            int row = p->lane_row + 16 * m + i / 2 * 8, tok = p->lane_tok + 8 * n + i % 2;
            float dx = s->x_d[g][tok], *to = &acc[m][n][i];
            *to = fmaf(s->d[g][row] * dx, cu_of_magic(low[i]), *to);
            if (SECOND == CU_SECOND_HALF)
                *to = fmaf(s->m[g][row] * dx, cu_of_magic(high[i]), *to);
            if (SECOND == CU_SECOND_MIN)
                *to = fmaf(s->m[g][row] * dx, s->x_sum[g][tok], *to);
        }
    }
}

/* One group of 32 of blocks of 256. */
template <int TYPE>
static __device__ inline void add_group(const struct stage *s, int g, const struct place *p, const struct cu_frag_a *fa,
                                        int n, const struct cu_frag_b *fb, int sum[M_TILES][N_TILES][4])
{
    CU_UNROLL
    for (int m = 0; m < M_TILES; m++) {
        int low[4] = {}, high[4] = {};
        cu_imma16(low, fa[m].x[0], fa[m].x[1], fb->x[0]);
        cu_imma16(two_scales<TYPE>::value ? high : low, fa[m].x[2], fa[m].x[3], fb->x[1]);
        for (int i = 0; i < 4; i++) {
            int row = p->lane_row + 16 * m + i / 2 * 8, sub = s->sub[g][p->lane_tok + 8 * n + i % 2];
            sum[m][n][i] += s->scale[g][0][row] * sub * low[i];
            if (two_scales<TYPE>::value)
                sum[m][n][i] += s->scale[g][1][row] * sub * high[i];
        }
    }
}

/* Minima of 16 rows times sums of 16 x of 8 places, for a block of 256. */
static __device__ inline void multiply_minima(const struct stage *s, int row, int tok, int second[4])
{
    int at = (int)threadIdx.x % 4 * 4, low[4] = {}, high[4] = {};
    uint32_t a0 = *reinterpret_cast<const uint32_t *>(&s->min[row][at]);
    uint32_t a1 = *reinterpret_cast<const uint32_t *>(&s->min[row + 8][at]);

    cu_imma16(low, a0, a1, *reinterpret_cast<const uint32_t *>(&s->low[tok][at]));
    cu_imma16(high, a0, a1, *reinterpret_cast<const uint32_t *>(&s->high[tok][at]));
    for (int i = 0; i < 4; i++)
        second[i] = low[i] + 128 * high[i];
}

/* A block of 256 is complete: its terms. */
template <int TYPE>
static __device__ inline void end_block(const struct stage *s, const struct place *p, struct tile *t)
{
    CU_UNROLL
    for (int m = 0; m < M_TILES; m++) {
        CU_UNROLL
        for (int n = 0; n < N_TILES; n++) {
            int second[4] = {};
            if (n >= p->n_tiles)
                break;
            if (cu_block<TYPE>::SECOND == CU_SECOND_MIN)
                multiply_minima(s, p->lane_row + 16 * m, p->tok + 8 * n + (int)threadIdx.x % 32 / 4, second);
            CU_UNROLL
            for (int i = 0; i < 4; i++) {
                int row = p->lane_row + 16 * m + i / 2 * 8;
                float dx = s->x_d[0][p->lane_tok + 8 * n + i % 2], *to = &t->acc[m][n][i];
                *to = fmaf(s->d[0][row] * dx, (float)t->sum[m][n][i], *to);
                if (cu_block<TYPE>::SECOND == CU_SECOND_MIN)
                    *to = fmaf(s->m[0][row] * dx, (float)second[i], *to);
                t->sum[m][n][i] = 0;
            }
        }
    }
}

/* A lane's part of 16 weight rows, or of 16 places' rows, and 32 columns from p on: matrices of 8 rows and 16 bytes, the rows' first. */
static __device__ inline void load_w(const uint8_t *p, struct cu_frag_a *f)
{
    int lane = (int)threadIdx.x % 32;
    cu_load_matrices(reinterpret_cast<const uint16_t *>(p + lane % 16 * STRIDE + lane / 16 * 16), f->x);
}

static __device__ inline void load_x(const uint8_t *p, struct cu_frag_b f[2])
{
    int lane = (int)threadIdx.x % 32;
    uint32_t x[4];

    cu_load_matrices(reinterpret_cast<const uint16_t *>(p + (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 16),
                     x);
    for (int i = 0; i < 4; i++)
        f[i / 2].x[i % 2] = x[i];
}

template <int TYPE>
static __device__ inline void multiply(const struct stage *s, int n_groups, const struct place *p, struct tile *t)
{
    for (int g = 0; g < n_groups; g++) {
        struct cu_frag_a fa[M_TILES];
        for (int m = 0; m < M_TILES; m++)
            load_w(&s->w[p->row + 16 * m][32 * g], &fa[m]);
        CU_UNROLL
        for (int n = 0; n < N_TILES; n += 2) {
            struct cu_frag_b fb[2];
            if (n >= p->n_tiles)
                break;
            load_x(&s->x[p->tok + 8 * n][32 * g], fb);
            CU_UNROLL
            for (int i = 0; i < 2; i++)
                if (cu_block<TYPE>::X256)
                    add_group<TYPE>(s, g, p, fa, n + i, &fb[i], t->sum);
                else
                    add_terms<TYPE>(s, g, p, fa, n + i, &fb[i], t->acc);
        }
    }
}

static __device__ inline void put_tile(const struct cu_mat_args *a, const struct cu_work *k, const struct place *p,
                                       const struct tile *t)
{
    CU_UNROLL
    for (int m = 0; m < M_TILES; m++) {
        CU_UNROLL
        for (int n = 0; n < N_TILES; n++) {
            CU_UNROLL
            for (int i = 0; i < 4; i++) {
                int row = (int)blockIdx.x * ROWS + p->lane_row + 16 * m + i / 2 * 8, tok = p->lane_tok + 8 * n + i % 2;
                if (row < k->n_rows && tok < k->n)
                    cu_put(a, k, cu_nth_place(a, k->first, tok), row, t->acc[m][n][i]);
            }
        }
    }
}

template <int TYPE> static __global__ void gemm_int(const struct cu_mat_args a)
{
    CU_SHARED_DYN(struct stage, s);
    cu_await();
    if (cu_is_unlisted(&a))
        return;
    struct cu_work k = cu_work_of(&a);
    if ((int)blockIdx.x * ROWS >= k.n_rows)
        return;
    struct place p = place_of(&k);
    struct tile t = {};
    int n_groups = (int)a.n_cols / 32;

    for (int first = 0; first < n_groups; first += GROUPS) {
        int n = n_groups - first < GROUPS ? n_groups - first : (int)GROUPS;
        fetch_w<TYPE>(&a, &k, first, n, s);
        fetch_x<TYPE>(&a, &k, first, n, s);
        __syncthreads();
        multiply<TYPE>(s, n, &p, &t);
        if (cu_block<TYPE>::X256 && (first / GROUPS) % 2)
            end_block<TYPE>(s, &p, &t);
        __syncthreads();
    }
    put_tile(&a, &k, &p, &t);
}

template <int TYPE> static cudaError_t launch(const struct cu_mat_args *a, cudaStream_t stream)
{
    dim3 grid((unsigned)((cu_most_rows(a) + ROWS - 1) / ROWS), cu_n_tiles(a), 1 + (unsigned)a->n_more);
    return CU_LAUNCH((gemm_int<TYPE>), grid, dim3(THREADS), sizeof(struct stage), stream, *a);
}

cudaError_t cu_gemm_int(const struct cu_mat_args *a, cudaStream_t stream)
{
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return launch<QUANT_##NAME>(a, stream);
        CU_QUANT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}
