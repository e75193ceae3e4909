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
    int row, n_rows; /* of this tile, at most 16 */
    int64_t col;
    int n_cols; /* of this chunk */
    size_t group_bytes;
};

static void pack_chunk(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    for (int group = 0; group * 8 < w->n_rows; group++) {
        struct avx2_pack p = {.col = w->col, .n_cols = w->n_cols, .ahead = 16 * (int64_t)a->w_stride};
        p.tile = (char *)a->scratch + (size_t)group * w->group_bytes;
        for (int r = 0; r < 8; r++) {
            int row = group * 8 + r < w->n_rows ? group * 8 + r : w->n_rows - 1;
            p.row[r] = (const uint8_t *)a->w + (uint64_t)(w->row + row) * a->w_stride;
        }
        w->type->pack(&p);
    }
}

/* Rows that fill their groups of 8 are summed in dst itself; others in `buf`, since nothing beside them may be touched. */
static void run_step(const struct walk *w, struct avx2_step *s, int tok, int n_tok, int size)
{
    const struct kern_mat_args *a = w->a;
    float buf[4 * 16] __attribute__((aligned(32)));
    float *dst = a->dst + tok * a->dst_stride + w->row;
    bool is_whole = w->n_rows % 8 == 0;
    size_t row_bytes = (size_t)w->n_rows * sizeof *buf;
    s->acc = is_whole ? dst : buf;
    s->acc_stride = is_whole ? a->dst_stride : 16;
    for (int t = 0; t < n_tok && !is_whole && !s->is_first; t++)
        memcpy(buf + t * 16, dst + t * a->dst_stride, row_bytes);
    w->type->micro->run[w->n_rows > 8][size](s);
    for (int t = 0; t < n_tok && !is_whole; t++)
        memcpy(dst + t * a->dst_stride, buf + t * 16, row_bytes);
}

/* All tokens times the packed chunk. */
static void multiply_chunk(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    struct avx2_step s = {.n_block = w->n_cols / w->type->micro->tile_cols, .col = w->col, .n_cols = a->n_cols};
    s.tile[0] = a->scratch;
    s.tile[1] = (const char *)a->scratch + w->group_bytes;
    s.x_ahead = a->n_tok > FEW_TOK ? 4 * (int64_t)a->x_stride : 0;
    s.is_first = w->col == 0;
    for (int tok = 0, n_tok; tok < a->n_tok; tok += n_tok) {
        int left = a->n_tok - tok, size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        n_tok = 1 << size;
        for (int t = 0; t < n_tok; t++)
            s.x[t] = (const char *)a->x + (uint64_t)(tok + t) * a->x_stride;
        run_step(w, &s, tok, n_tok, size);
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

/* Activation rows of a step, at its first column: all rows have their parts at the same offsets. */
struct xrows {
    const char *x[4];
    int64_t q, s, q16;
};

AVX2_INLINE struct xrows rows_of(const struct avx2_step *st, const int T, const int len, const int s_bytes)
{
    struct xrows r = {.q = st->col};
    r.s = st->n_cols + st->col / len * s_bytes;
    r.q16 = st->n_cols + st->n_cols / len * s_bytes + st->col * 2;
    for (int t = 0; t < T; t++)
        r.x[t] = st->x[t];
    return r;
}

AVX2_INLINE struct xrows rows_x32(const struct avx2_step *st, const int T)
{
    return rows_of(st, T, 32, sizeof(struct kern_act_s32));
}

AVX2_INLINE struct xrows rows_x256(const struct avx2_step *st, const int T)
{
    return rows_of(st, T, 256, sizeof(struct kern_act_s256));
}

/* Fetch `bytes` at `off` of the rows that come after these: a row's part is too short for a hardware prefetcher. */
AVX2_INLINE void prefetch_x(const struct avx2_step *st, const int T, int64_t off, const int bytes)
{
    for (int t = 0; t < T; t++)
        for (int i = 0; i < bytes; i += 64)
            _mm_prefetch((const char *)st->x[t] + st->x_ahead + off + i, _MM_HINT_T0);
}

/* One fmaf of the contract: acc + d * dx * isum for 8 rows. */
AVX2_INLINE __m256 add_scaled(__m256 acc, const float *d, __m256 dx, __m256i isum)
{
    return _mm256_fmadd_ps(_mm256_mul_ps(_mm256_load_ps(d), dx), _mm256_cvtepi32_ps(isum), acc);
}

AVX2_INLINE __m256 bcast_d(const void *p)
{
    float d;
    memcpy(&d, p, sizeof d); /* first in both kern_act_s32 and kern_act_s256 */
    return _mm256_set1_ps(d);
}

AVX2_INLINE void acc_load(const struct avx2_step *st, const int R, const int T, __m256 acc[2][4])
{
    AVX2_UNROLL
    for (int g = 0; g < R; g++)
        AVX2_UNROLL
    for (int t = 0; t < T; t++)
        acc[g][t] = st->is_first ? _mm256_setzero_ps() : _mm256_loadu_ps(st->acc + t * st->acc_stride + g * 8);
}

AVX2_INLINE void acc_store(const struct avx2_step *st, const int R, const int T, __m256 acc[2][4])
{
    AVX2_UNROLL
    for (int g = 0; g < R; g++)
        AVX2_UNROLL
    for (int t = 0; t < T; t++)
        _mm256_storeu_ps(st->acc + t * st->acc_stride + g * 8, acc[g][t]);
}

/* Sums of 32 columns of codes up to 15 for R groups of rows and T tokens. 16 bits hold them: 8 * 2 * 15 * 127 < 32768. */
AVX2_INLINE void dot_32(const int R, const int T, const uint8_t (*const w[2])[32], const struct xrows *x, int64_t q,
                        __m256i s[2][4])
{
    AVX2_UNROLL
    for (int i = 0; i < 8; i++) {
        __m256i wv[2];
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            wv[g] = load(w[g][i]);
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            __m256i xv = bcast4(x->x[t] + q + i * 4);
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                __m256i prod = _mm256_maddubs_epi16(wv[g], xv);
                s[g][t] = i == 0 ? prod : avx2_in_order(_mm256_add_epi16(s[g][t], prod));
            }
        }
    }
}

/* The factors of SUB columns: those of the weights times what the activation's part counts. sub < 0: there is none. */
AVX2_INLINE __m256i scale_of(__m256i scale, const char *x, const int64_t sub)
{
    if (sub < 0)
        return scale;
    int16_t f;
    memcpy(&f, x + sub, sizeof f);
    return _mm256_mullo_epi16(scale, _mm256_set1_epi16(f));
}

/* The same for 16 columns of larger codes, times scale and added to isum. A products are added in 16 bits: A times twice
 * the largest code times 127 is at most 32767. The weights stay in registers, one token's sums at a time beside them. */
AVX2_INLINE void dot_16(const int R, const int T, const int A, const uint8_t (*const w[2])[32], const struct xrows *x,
                        int64_t q, const __m256i scale[2], const int64_t sub, __m256i isum[2][4])
{
    __m256i wv[2][4];
    AVX2_UNROLL
    for (int g = 0; g < R; g++)
        AVX2_UNROLL
    for (int i = 0; i < 4; i++)
        wv[g][i] = load(w[g][i]);
    AVX2_UNROLL
    for (int t = 0; t < T; t++) {
        __m256i s[2], sum[2], f[2];
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            f[g] = scale_of(scale[g], x->x[t], sub);
        AVX2_UNROLL
        for (int i = 0; i < 4; i++) {
            __m256i xv = bcast4(x->x[t] + q + i * 4);
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                __m256i prod = _mm256_maddubs_epi16(wv[g][i], xv);
                s[g] = i % A == 0 ? prod : avx2_in_order(_mm256_add_epi16(s[g], prod));
                if (i % A == A - 1) {
                    __m256i s32 = _mm256_madd_epi16(s[g], f[g]);
                    sum[g] = i < A ? s32 : avx2_in_order(_mm256_add_epi32(sum[g], s32));
                }
            }
        }
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            isum[g][t] = avx2_in_order(_mm256_add_epi32(isum[g][t], sum[g]));
    }
}

/* A: vectors of 4 columns whose products are added in 16 bits, 8 or fewer. */
AVX2_INLINE void run_u32(const struct avx2_step *st, const int R, const int T, const int A, const bool has_min,
                         const int off)
{
    struct xrows x = rows_x32(st, T);
    __m256 acc[2][4];
    __m256i one = _mm256_set1_epi16(1);
    acc_load(st, R, T, acc);
    for (int b = 0; b < st->n_block; b++, x.q += 32, x.s += (int64_t)sizeof(struct kern_act_s32)) {
        const struct avx2_u32 *w[2] = {(const struct avx2_u32 *)st->tile[0] + b,
                                       (const struct avx2_u32 *)st->tile[1] + b};
        __m256i isum[2][4];
        if (b % 2 == 0)
            prefetch_x(st, T, x.q, 64);
        if (A == 8) {
            dot_32(R, T, (const uint8_t(*[2])[32]){w[0]->q, w[1]->q}, &x, x.q, isum);
        } else {
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                isum[0][t] = isum[1][t] = _mm256_setzero_si256();
            for (int i = 0; i < 8; i += 4)
                dot_16(R, T, A, (const uint8_t(*[2])[32]){w[0]->q + i, w[1]->q + i}, &x, x.q + i * 4,
                       (__m256i[2]){one, one}, -1, isum);
        }
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            __m256 dx = bcast_d(x.x[t] + x.s);
            __m256i xsum = bcast4(x.x[t] + x.s + offsetof(struct kern_act_s32, sum));
            if (off)
                xsum = _mm256_mullo_epi32(xsum, _mm256_set1_epi32(off));
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                __m256i sum = A == 8 ? _mm256_madd_epi16(isum[g][t], one) : isum[g][t];
                acc[g][t] = add_scaled(acc[g][t], w[g]->d, dx, off ? _mm256_sub_epi32(sum, xsum) : sum);
                if (has_min)
                    acc[g][t] = add_scaled(acc[g][t], w[g]->m, dx, xsum);
            }
        }
    }
    acc_store(st, R, T, acc);
}

/* Sums of n_vec * 2 columns of 16-bit codes. */
AVX2_INLINE void dot_s16(const int R, const int T, const int n_vec, const int16_t (*const w[2])[16],
                         const struct xrows *x, int64_t q16, __m256i s[2][4])
{
    AVX2_UNROLL
    for (int i = 0; i < n_vec; i++) {
        __m256i wv[2];
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            wv[g] = load(w[g][i]);
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            __m256i xv = bcast4(x->x[t] + q16 + i * 4);
            AVX2_UNROLL
            for (int g = 0; g < R; g++)
                s[g][t] = avx2_in_order(_mm256_add_epi32(s[g][t], _mm256_madd_epi16(wv[g], xv)));
        }
    }
}

AVX2_INLINE void run_s32(const struct avx2_step *st, const int R, const int T, const int n_part)
{
    struct xrows x = rows_x32(st, T);
    __m256 acc[2][4];
    acc_load(st, R, T, acc);
    for (int b = 0; b < st->n_block; b++, x.q16 += 64, x.s += (int64_t)sizeof(struct kern_act_s32)) {
        const struct avx2_s32 *w[2] = {(const struct avx2_s32 *)st->tile[0] + b,
                                       (const struct avx2_s32 *)st->tile[1] + b};
        const int n_vec = 16 / n_part;
        prefetch_x(st, T, x.q16, 64);
        AVX2_UNROLL
        for (int part = 0; part < n_part; part++) {
            const int16_t(*q[2])[16] = {w[0]->q + part * n_vec, w[1]->q + part * n_vec};
            __m256i s[2][4];
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                s[0][t] = s[1][t] = _mm256_setzero_si256();
            dot_s16(R, T, n_vec, q, &x, x.q16 + part * n_vec * 4, s);
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                AVX2_UNROLL
            for (int g = 0; g < R; g++)
                acc[g][t] = add_scaled(acc[g][t], w[g]->d[part], bcast_d(x.x[t] + x.s), s[g][t]);
        }
    }
    acc_store(st, R, T, acc);
}

AVX2_INLINE void run_s256(const struct avx2_step *st, const int R, const int T)
{
    struct xrows x = rows_x256(st, T);
    __m256 acc[2][4];
    acc_load(st, R, T, acc);
    for (int b = 0; b < st->n_block; b++, x.s += (int64_t)sizeof(struct kern_act_s256)) {
        const struct avx2_s256 *w[2] = {(const struct avx2_s256 *)st->tile[0] + b,
                                        (const struct avx2_s256 *)st->tile[1] + b};
        __m256i s[2][4];
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            s[0][t] = s[1][t] = _mm256_setzero_si256();
        for (int i = 0; i < 128; i += 16, x.q16 += 64) {
            prefetch_x(st, T, x.q16, 64);
            dot_s16(R, T, 16, (const int16_t(*[2])[16]){w[0]->q + i, w[1]->q + i}, &x, x.q16, s);
        }
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            AVX2_UNROLL
        for (int g = 0; g < R; g++)
            acc[g][t] = add_scaled(acc[g][t], w[g]->d, bcast_d(x.x[t] + x.s), s[g][t]);
    }
    acc_store(st, R, T, acc);
}

/* Integer sums of a block: SUB columns under one integer scale, A products added in 16 bits. */
AVX2_INLINE void dot_256(const int R, const int T, const int SUB, const int A, const struct avx2_u256 *const w[2],
                         const struct xrows *x, __m256i isum[2][4])
{
    const int step = A == 8 ? 8 : 4;
    AVX2_UNROLL
    for (int t = 0; t < T; t++)
        isum[0][t] = isum[1][t] = _mm256_setzero_si256();
    for (int i = 0; i < 64; i += step) {
        const uint8_t(*q[2])[32] = {w[0]->q + i, w[1]->q + i};
        __m256i s[2][4], scale[2];
        int64_t sub = x->s + (int64_t)offsetof(struct kern_act_s256, sub) + i / 8 * (int64_t)sizeof(int16_t);
        AVX2_UNROLL
        for (int g = 0; g < R; g++)
            scale[g] = load(w[g]->scale[i / (SUB / 4)]);
        if (A < 8) {
            dot_16(R, T, A, q, x, x->q + i * 4, scale, sub, isum);
            continue;
        }
        dot_32(R, T, q, x, x->q + i * 4, s);
        AVX2_UNROLL
        for (int t = 0; t < T; t++)
            AVX2_UNROLL
        for (int g = 0; g < R; g++) {
            __m256i sum = _mm256_madd_epi16(s[g][t], scale_of(scale[g], x->x[t], sub));
            isum[g][t] = avx2_in_order(_mm256_add_epi32(isum[g][t], sum));
        }
    }
}

/* The sums of x over SUB columns times min are taken off the integer sum (off: min holds the scale times what the unsigned
 * codes are too large by), or enter the second fmaf. */
AVX2_INLINE void run_u256(const struct avx2_step *st, const int R, const int T, const int SUB, const int A,
                          const bool off)
{
    struct xrows x = rows_x256(st, T);
    const int n_min = 128 / SUB; /* before the loop: its division check would keep the loop from being unrolled */
    __m256 acc[2][4];
    acc_load(st, R, T, acc);
    for (int b = 0; b < st->n_block; b++, x.q += 256, x.s += (int64_t)sizeof(struct kern_act_s256)) {
        const struct avx2_u256 *w[2] = {(const struct avx2_u256 *)st->tile[0] + b,
                                        (const struct avx2_u256 *)st->tile[1] + b};
        __m256i isum[2][4];
        prefetch_x(st, T, x.q, 256);
        dot_256(R, T, SUB, A, w, &x, isum);
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            const char *xs = x.x[t] + x.s;
            const char *xsum =
                xs + (SUB == 16 ? offsetof(struct kern_act_s256, sum16) : offsetof(struct kern_act_s256, sum32));
            __m256i msum[2];
            AVX2_UNROLL
            for (int j = 0; j < n_min; j++) {
                __m256i xv = bcast4(xsum + j * 4);
                AVX2_UNROLL
                for (int g = 0; g < R; g++) {
                    __m256i prod = _mm256_madd_epi16(load(w[g]->min[j]), xv);
                    msum[g] = j == 0 ? prod : avx2_in_order(_mm256_add_epi32(msum[g], prod));
                }
            }
            AVX2_UNROLL
            for (int g = 0; g < R; g++) {
                __m256i sum = off ? _mm256_sub_epi32(isum[g][t], msum[g]) : isum[g][t];
                acc[g][t] = add_scaled(acc[g][t], w[g]->d, bcast_d(xs), sum);
                if (!off)
                    acc[g][t] = add_scaled(acc[g][t], w[g]->m, bcast_d(xs), msum[g]);
            }
        }
    }
    acc_store(st, R, T, acc);
}

/* The six sizes of a micro-kernel. */
#define MICRO_FN(name, R, T, run, ...)                        \
    static void name##_r##R##_t##T(const struct avx2_step *s) \
    {                                                         \
        run(s, R, T, ##__VA_ARGS__);                          \
    }
#define MICRO(name, form, cols, run, ...)            \
    MICRO_FN(name, 1, 1, run, ##__VA_ARGS__)         \
    MICRO_FN(name, 1, 2, run, ##__VA_ARGS__)         \
    MICRO_FN(name, 1, 4, run, ##__VA_ARGS__)         \
    MICRO_FN(name, 2, 1, run, ##__VA_ARGS__)         \
    MICRO_FN(name, 2, 2, run, ##__VA_ARGS__)         \
    MICRO_FN(name, 2, 4, run, ##__VA_ARGS__)         \
    const struct avx2_micro kern_avx2_mat_##name = { \
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
