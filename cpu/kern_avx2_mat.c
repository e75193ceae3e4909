/* AVX2 matmul: the table, the walk over tiles, and the micro-kernels that multiply a packed tile (kern_avx2_mat.h). */
#include "cpu/kern_avx2_mat.h"

#include <string.h>

#include "cpu/kern_act.h"

/* Columns packed at a time. With many tokens a tile of 16 rows stays in the 32 KiB of a first-level cache beside the
 * activations; with few it is read once or twice, and the smaller the sooner. */
#define CHUNK_COLS_U8 1024
#define CHUNK_COLS_S16 512
#define CHUNK_COLS_FEW 256
#define FEW_TOK 4

_Static_assert(2 * (CHUNK_COLS_U8 / 32) * sizeof(struct avx2_u32) <= KERN_MAT_SCRATCH_BYTES, "packed tile");
_Static_assert(2 * (CHUNK_COLS_U8 / 256) * sizeof(struct avx2_u256) <= KERN_MAT_SCRATCH_BYTES, "packed tile");
_Static_assert(2 * (CHUNK_COLS_S16 / 32) * sizeof(struct avx2_s32) <= KERN_MAT_SCRATCH_BYTES, "packed tile");
_Static_assert(2 * (CHUNK_COLS_S16 / 256) * sizeof(struct avx2_s256) <= KERN_MAT_SCRATCH_BYTES, "packed tile");

struct walk {
    const struct kern_mat_args *a;
    const struct avx2_type *type;
    int row, n_rows;   /* of this tile, at most 16 */
    int64_t col;
    int n_cols;        /* of this chunk */
    size_t group_bytes;
};

/* The next tile's share of this chunk: rows are streams too short for a hardware prefetcher to learn. */
static void prefetch_next(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    int n = a->n_rows - w->row - 16;
    int64_t begin = w->col / w->type->block_cols * w->type->block_bytes;
    int64_t end = (w->col + w->n_cols) / w->type->block_cols * w->type->block_bytes;
    for (int r = 0; r < n && r < 16; r++) {
        const char *p = (const char *)a->w + (uint64_t)(w->row + 16 + r) * a->w_stride;
        for (int64_t off = begin; off < end; off += 64)
            _mm_prefetch(p + off, _MM_HINT_T1);
    }
}

static void pack_chunk(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    prefetch_next(w);
    for (int group = 0; group * 8 < w->n_rows; group++) {
        struct avx2_pack p = {.col = w->col, .n_cols = w->n_cols};
        p.tile = (char *)a->scratch + (size_t)group * w->group_bytes;
        for (int r = 0; r < 8; r++) {
            int row = group * 8 + r < w->n_rows ? group * 8 + r : w->n_rows - 1;
            p.row[r] = (const uint8_t *)a->w + (uint64_t)(w->row + row) * a->w_stride;
        }
        w->type->pack(&p);
    }
}

static void load_acc(const struct walk *w, int tok, int n_tok, float *acc)
{
    memset(acc, 0, 4 * 16 * sizeof *acc);
    if (w->col == 0)
        return;
    for (int t = 0; t < n_tok; t++)
        memcpy(acc + t * 16, w->a->dst + (tok + t) * w->a->dst_stride + w->row, (size_t)w->n_rows * sizeof *acc);
}

static void store_acc(const struct walk *w, int tok, int n_tok, const float *acc)
{
    for (int t = 0; t < n_tok; t++)
        memcpy(w->a->dst + (tok + t) * w->a->dst_stride + w->row, acc + t * 16, (size_t)w->n_rows * sizeof *acc);
}

/* All tokens times the packed chunk; sums so far wait in dst, which is exact. */
static void multiply_chunk(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    const struct avx2_micro *micro = w->type->micro;
    float acc[4 * 16] __attribute__((aligned(32)));
    struct avx2_step s = {.n_block = w->n_cols / micro->tile_cols, .col = w->col, .n_cols = a->n_cols, .acc = acc};
    s.tile[0] = a->scratch;
    s.tile[1] = (const char *)a->scratch + w->group_bytes;
    for (int tok = 0, n_tok; tok < a->n_tok; tok += n_tok) {
        int left = a->n_tok - tok, size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        n_tok = 1 << size;
        for (int t = 0; t < n_tok; t++)
            s.x[t] = (const char *)a->x + (uint64_t)(tok + t) * a->x_stride;
        load_acc(w, tok, n_tok, acc);
        micro->run[w->n_rows > 8][size](&s);
        store_acc(w, tok, n_tok, acc);
    }
}

void kern_avx2_mat_run(const struct kern_mat_args *a, const struct avx2_type *type)
{
    const struct avx2_micro *micro = type->micro;
    bool is_s16 = micro->tile_bytes > micro->tile_cols * 12;
    int chunk = a->n_tok <= FEW_TOK ? CHUNK_COLS_FEW : is_s16 ? CHUNK_COLS_S16 : CHUNK_COLS_U8;
    struct walk w = {.a = a, .type = type};
    w.group_bytes = (size_t)(chunk / micro->tile_cols * micro->tile_bytes);
    for (w.row = 0; w.row < a->n_rows; w.row += 16) {
        w.n_rows = a->n_rows - w.row < 16 ? a->n_rows - w.row : 16;
        for (w.col = 0; w.col < a->n_cols; w.col += chunk) {
            w.n_cols = (int)(a->n_cols - w.col < chunk ? a->n_cols - w.col : chunk);
            pack_chunk(&w);
            multiply_chunk(&w);
        }
    }
}

AVX2_INLINE __m256i bcast4(const void *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm256_set1_epi32(x);
}

AVX2_INLINE __m256i load(const void *p)
{
    return _mm256_load_si256((const __m256i *)p);
}

/* One fmaf of the contract: acc = d * dx * isum + acc for 8 rows. */
AVX2_INLINE void add_scaled(float *acc, const float *d, float dx, __m256i isum)
{
    __m256 scale = _mm256_mul_ps(_mm256_load_ps(d), _mm256_set1_ps(dx));
    _mm256_store_ps(acc, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(isum), _mm256_load_ps(acc)));
}

/* One sum, right now, in its own register: left alone, gcc 12 gathers all products of an unrolled loop first, to add them
 * as a tree, and spills them (a third of the speed). */
AVX2_INLINE __m256i in_order(__m256i sum)
{
    __asm__("" : "+x"(sum));
    return sum;
}

/* Sums of A * 4 columns of codes for R groups of rows and T tokens. The 16-bit sums do not wrap: A times twice the largest
 * code times 127 is at most 32767. */
AVX2_INLINE void dot_u8(const int R, const int T, const int A, const uint8_t (*const w[2])[32], const int8_t *const x[4],
                        __m256i s[2][4])
{
    AVX2_UNROLL
    for (int i = 0; i < A; i++) {
        __m256i wv[2];
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            wv[g] = load(w[g][i]);
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            __m256i xv = bcast4(x[t] + i * 4);
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                __m256i prod = _mm256_maddubs_epi16(wv[g], xv);
                s[g][t] = i == 0 ? prod : in_order(_mm256_add_epi16(s[g][t], prod));
            }
        }
    }
}

/* A: vectors of 4 columns whose products are added in 16 bits. */
AVX2_INLINE void run_u32(const struct avx2_step *st, const int R, const int T, const int A, const bool has_min, const int off)
{
    struct kern_act_x32 x[4];
    AVX2_UNROLL
    for (int t = 0; t < T; t++)
        x[t] = kern_act_x32(st->x[t], st->n_cols);
    for (int b = 0; b < st->n_block; b++) {
        const struct avx2_u32 *w[2] = {(const struct avx2_u32 *)st->tile[0] + b, (const struct avx2_u32 *)st->tile[1] + b};
        int64_t block = st->col / 32 + b;
        __m256i isum[2][4];
        AVX2_UNROLL
        for (int step = 0; step < 8 / A; step++) {
            const uint8_t(*q[2])[32] = {w[0]->q + step * A, w[1]->q + step * A};
            const int8_t *xq[4];
            __m256i s[2][4];
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                xq[t] = x[t].q + block * 32 + step * A * 4;
            dot_u8(R, T, A, q, xq, s);
            AVX2_UNROLL
            for (int g = 0; g < R; g++)
                AVX2_UNROLL
                for (int t = 0; t < T; t++) {
                    __m256i s32 = _mm256_madd_epi16(s[g][t], _mm256_set1_epi16(1));
                    isum[g][t] = step == 0 ? s32 : _mm256_add_epi32(isum[g][t], s32);
                }
        }
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            __m256i xsum = _mm256_set1_epi32(x[t].sum[block] * (off ? off : 1));
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                float *acc = st->acc + t * 16 + g * 8;
                if (off)
                    isum[g][t] = _mm256_sub_epi32(isum[g][t], xsum);
                add_scaled(acc, w[g]->d, x[t].d[block], isum[g][t]);
                if (has_min)
                    add_scaled(acc, w[g]->m, x[t].d[block], xsum);
            }
        }
    }
}

/* Sums of n_vec * 2 columns of 16-bit codes. */
AVX2_INLINE void dot_s16(const int R, const int T, int n_vec, const int16_t (*const w[2])[16], const int16_t *const x[4],
                         __m256i s[2][4])
{
    AVX2_UNROLL
    for (int i = 0; i < n_vec; i++) {
        __m256i wv[2];
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            wv[g] = load(w[g][i]);
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            __m256i xv = bcast4(x[t] + i * 2);
            AVX2_UNROLL
            for (int g = 0; g < R; g++)
                s[g][t] = in_order(_mm256_add_epi32(s[g][t], _mm256_madd_epi16(wv[g], xv)));
        }
    }
}

AVX2_INLINE void run_s32(const struct avx2_step *st, const int R, const int T, const int n_part)
{
    struct kern_act_x32 x[4];
    AVX2_UNROLL
    for (int t = 0; t < T; t++)
        x[t] = kern_act_x32(st->x[t], st->n_cols);
    for (int b = 0; b < st->n_block; b++) {
        const struct avx2_s32 *tile[2] = {(const struct avx2_s32 *)st->tile[0] + b, (const struct avx2_s32 *)st->tile[1] + b};
        int64_t block = st->col / 32 + b;
        AVX2_UNROLL
        for (int part = 0; part < n_part; part++) {
            const int n_vec = 16 / n_part;
            const int16_t(*w[2])[16] = {tile[0]->q + part * n_vec, tile[1]->q + part * n_vec};
            const int16_t *q16[4];
            __m256i s[2][4];
            AVX2_UNROLL
            for (int t = 0; t < T; t++) {
                q16[t] = x[t].q16 + block * 32 + part * n_vec * 2;
                s[0][t] = s[1][t] = _mm256_setzero_si256();
            }
            dot_s16(R, T, n_vec, w, q16, s);
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                AVX2_UNROLL
                for (int g = 0; g < R; g++)
                    add_scaled(st->acc + t * 16 + g * 8, tile[g]->d[part], x[t].d[block], s[g][t]);
        }
    }
}

AVX2_INLINE void run_s256(const struct avx2_step *st, const int R, const int T)
{
    struct kern_act_x256 x[4];
    AVX2_UNROLL
    for (int t = 0; t < T; t++)
        x[t] = kern_act_x256(st->x[t], st->n_cols);
    for (int b = 0; b < st->n_block; b++) {
        const struct avx2_s256 *tile[2] = {(const struct avx2_s256 *)st->tile[0] + b,
                                           (const struct avx2_s256 *)st->tile[1] + b};
        int64_t block = st->col / 256 + b;
        __m256i s[2][4];
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            s[0][t] = s[1][t] = _mm256_setzero_si256();
        for (int i = 0; i < 128; i += 16) {
            const int16_t(*w[2])[16] = {tile[0]->q + i, tile[1]->q + i};
            const int16_t *q16[4];
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                q16[t] = x[t].q16 + block * 256 + i * 2;
            dot_s16(R, T, 16, w, q16, s);
        }
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            AVX2_UNROLL
            for (int g = 0; g < R; g++)
                add_scaled(st->acc + t * 16 + g * 8, tile[g]->d, x[t].d[block], s[g][t]);
    }
}

/* SUB: columns under one integer scale. The sums of x over SUB columns times min are taken off the integer sum (off: min
 * holds the scale times what the unsigned codes are too large by), or enter the second fmaf. */
AVX2_INLINE void run_u256(const struct avx2_step *st, const int R, const int T, const int SUB, const int A, const bool off)
{
    struct kern_act_x256 x[4];
    AVX2_UNROLL
    for (int t = 0; t < T; t++)
        x[t] = kern_act_x256(st->x[t], st->n_cols);
    for (int b = 0; b < st->n_block; b++) {
        const struct avx2_u256 *w[2] = {(const struct avx2_u256 *)st->tile[0] + b,
                                        (const struct avx2_u256 *)st->tile[1] + b};
        int64_t block = st->col / 256 + b;
        __m256i isum[2][4];
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            isum[0][t] = isum[1][t] = _mm256_setzero_si256();
        for (int j = 0; j < 256 / SUB; j++)
            AVX2_UNROLL
            for (int step = 0; step < SUB / 4 / A; step++) {
                int vec = j * (SUB / 4) + step * A;
                const uint8_t(*q[2])[32] = {w[0]->q + vec, w[1]->q + vec};
                const int8_t *xq[4];
                __m256i s[2][4];
                AVX2_UNROLL
                for (int t = 0; t < T; t++)
                    xq[t] = x[t].q + block * 256 + vec * 4;
                dot_u8(R, T, A, q, xq, s);
                AVX2_UNROLL
                for (int g = 0; g < R; g++)
                    AVX2_UNROLL
                    for (int t = 0; t < T; t++)
                        isum[g][t] = _mm256_add_epi32(isum[g][t], _mm256_madd_epi16(s[g][t], load(w[g]->scale[j])));
            }
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                const int16_t *xsum = SUB == 16 ? x[t].sum16 + block * 16 : x[t].sum32 + block * 8;
                __m256i msum = _mm256_setzero_si256();
                for (int j = 0; j < 128 / SUB; j++)
                    msum = _mm256_add_epi32(msum, _mm256_madd_epi16(load(w[g]->min[j]), bcast4(xsum + j * 2)));
                float *acc = st->acc + t * 16 + g * 8;
                if (off)
                    isum[g][t] = _mm256_sub_epi32(isum[g][t], msum);
                add_scaled(acc, w[g]->d, x[t].d[block], isum[g][t]);
                if (!off)
                    add_scaled(acc, w[g]->m, x[t].d[block], msum);
            }
    }
}

/* The six sizes of a micro-kernel. */
#define MICRO_FN(name, R, T, run, ...)                                                                                 \
    static void name##_r##R##_t##T(const struct avx2_step *s)                                                          \
    {                                                                                                                  \
        run(s, R, T, ##__VA_ARGS__);                                                                                   \
    }
#define MICRO(name, form, cols, run, ...)                                                                              \
    MICRO_FN(name, 1, 1, run, ##__VA_ARGS__)                                                                           \
    MICRO_FN(name, 1, 2, run, ##__VA_ARGS__)                                                                           \
    MICRO_FN(name, 1, 4, run, ##__VA_ARGS__)                                                                           \
    MICRO_FN(name, 2, 1, run, ##__VA_ARGS__)                                                                           \
    MICRO_FN(name, 2, 2, run, ##__VA_ARGS__)                                                                           \
    MICRO_FN(name, 2, 4, run, ##__VA_ARGS__)                                                                           \
    const struct avx2_micro kern_avx2_mat_##name = {                                                                   \
        {{name##_r1_t1, name##_r1_t2, name##_r1_t4}, {name##_r2_t1, name##_r2_t2, name##_r2_t4}}, sizeof(form), cols};

MICRO(u32_a8_min, struct avx2_u32, 32, run_u32, 8, true, 0)
MICRO(u32_a8_off8, struct avx2_u32, 32, run_u32, 8, false, 8)
MICRO(u32_a4_min, struct avx2_u32, 32, run_u32, 4, true, 0)
MICRO(u32_a4_off12, struct avx2_u32, 32, run_u32, 4, false, 12)
MICRO(u32_a4_off16, struct avx2_u32, 32, run_u32, 4, false, 16)
MICRO(s32, struct avx2_s32, 32, run_s32, 1)
MICRO(s32_part16, struct avx2_s32, 32, run_s32, 2)
MICRO(s256, struct avx2_s256, 256, run_s256)
MICRO(u256_s32_a8_min, struct avx2_u256, 256, run_u256, 32, 8, false)
MICRO(u256_s32_a4_min, struct avx2_u256, 256, run_u256, 32, 4, false)
MICRO(u256_s16_a4_min, struct avx2_u256, 256, run_u256, 16, 4, false)
MICRO(u256_s16_a4_off, struct avx2_u256, 256, run_u256, 16, 4, true)
MICRO(u256_s16_a2_off, struct avx2_u256, 256, run_u256, 16, 2, true)

kern_mat *const kern_avx2_mat_table[QUANT_ID_END] = {
#define T(NAME, text, id, len, bytes, act, fn) [id] = kern_avx2_mat_##fn,
#include "quant/types.def"
#undef T
};
