/* Inside the AVX2 matmul kernels. A tile of 8 weight rows is packed so that a vector holds 4 columns of all 8 rows, one row
 * per 32-bit lane. Activations are broadcast 4 columns at a time, so that every lane gathers its own row's sum and nothing
 * has to be added across lanes. The same packed tile serves one token or a thousand (of some types two or more).
 *
 * Unsigned codes are multiplied by vpmaddubsw. Two products and a few such sums fit 16 bits (each format says how many),
 * so that a vpmaddwd with the sub-scales is needed only now and then. Codes with 8 bits and a sign would saturate there:
 * they are packed in 16 bits, times their sub-scales, for vpmaddwd alone. */
#ifndef FERRY_CPU_KERN_AVX2_MAT_H
#define FERRY_CPU_KERN_AVX2_MAT_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/kern_mat.h"

/* Loops whose counts are constants once inlined, and whose variables belong in registers. */
#ifdef __clang__
#define AVX2_UNROLL _Pragma("clang loop unroll(full)")
#else
#define AVX2_UNROLL _Pragma("GCC unroll 32")
#endif
#define AVX2_INLINE static inline __attribute__((always_inline))

/* Packed tiles: 8 rows times one block of 32 or 256 columns. */
struct avx2_u32 { /* acc = fmaf(d dx, sum q x - off sum x), then fmaf(m dx, sum x) where there are minima */
    uint8_t q[8][32];
    float d[8], m[8];
};

struct avx2_s32 { /* two parts of 16 columns, each under its d; formats with one d per 32 use the first */
    int16_t q[16][16];
    float d[2][8];
};

struct avx2_u256 {
    uint8_t q[64][32];
    int16_t scale[16][16]; /* by 16 or 32 columns: a row's factor twice, for both of its sums */
    int16_t min[8][16];    /* factors of the sums of x over 16 or 32 columns, two neighbours to a row */
    float d[8], m[8];
};

struct avx2_s256 {
    int16_t q[128][16];
    float d[8];
};

struct avx2_pack {
    const uint8_t *row[8]; /* rows past the last repeat it */
    int64_t col;
    int n_cols;
    int64_t ahead; /* bytes to the rows that are packed next, for prefetching */
    void *tile;    /* array of one of the structs above, one per block of columns */
};

struct avx2_step {
    const void *tile[2]; /* of one or two groups of 8 rows */
    int n_block;
    int64_t col, n_cols; /* first column, and columns of the whole activation row */
    const void *x[4];
    int64_t x_ahead;    /* bytes to the rows of the next step, for prefetching */
    float *acc;         /* (n_tok, 16): sums of the columns before; nothing yet if is_first */
    int64_t acc_stride; /* floats */
    bool is_first;
};

/* Micro-kernels of one packed form, by groups of rows - 1 and tokens: 1, 2, 4. */
struct avx2_micro {
    void (*run[2][3])(const struct avx2_step *s);
    int tile_bytes, tile_cols;
};

struct avx2_type {
    void (*pack)(const struct avx2_pack *p);
    const struct avx2_micro *micro;
};

/* Named by: packed form, columns per sub-scale, vpmaddubsw sums added in 16 bits, then what the sums of x are for. */
extern const struct avx2_micro kern_avx2_mat_u32_a8_min, kern_avx2_mat_u32_a8_off8;
extern const struct avx2_micro kern_avx2_mat_u32_a4_min, kern_avx2_mat_u32_a4_off12, kern_avx2_mat_u32_a4_off16;
extern const struct avx2_micro kern_avx2_mat_s32, kern_avx2_mat_s32_part16, kern_avx2_mat_s256;
extern const struct avx2_micro kern_avx2_mat_u256_s32_a8_min, kern_avx2_mat_u256_s32_a4_min;
extern const struct avx2_micro kern_avx2_mat_u256_s16_a4_min, kern_avx2_mat_u256_s16_a4_off,
    kern_avx2_mat_u256_s16_a2_off;

void kern_avx2_mat_run(const struct kern_mat_args *a, const struct avx2_type *type);

/* The entries of kern_avx2_mat_table; each is beside the packing of its type. */
#define T(NAME, text, id, len, bytes, act, fn) void kern_avx2_mat_##fn(const struct kern_mat_args *a);
#include "quant/types.def"
#undef T

/* Codes, scales and d of a block of the code-book types and TQ1_0. */
void kern_avx2_unpack_iq1_m(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_iq1_s(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_iq2_s(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_iq2_xs(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_iq2_xxs(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_iq3_s(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_iq3_xxs(const uint8_t *block, struct kern_mat_block *out);
void kern_avx2_unpack_tq1_0(const uint8_t *block, struct kern_mat_block *out);

/* With one token, for types that gain by it (kern_avx2_vec.c, kern_avx2_vec_iq.c). */
void kern_avx2_vec_q4_0(const struct kern_mat_args *a);
void kern_avx2_vec_q4_1(const struct kern_mat_args *a);
void kern_avx2_vec_q5_0(const struct kern_mat_args *a);
void kern_avx2_vec_q5_1(const struct kern_mat_args *a);
void kern_avx2_vec_q8_0(const struct kern_mat_args *a);
void kern_avx2_vec_q4_k(const struct kern_mat_args *a);
void kern_avx2_vec_q5_k(const struct kern_mat_args *a);
void kern_avx2_vec_q6_k(const struct kern_mat_args *a);
void kern_avx2_vec_q2_k(const struct kern_mat_args *a);
void kern_avx2_vec_q3_k(const struct kern_mat_args *a);
void kern_avx2_vec_tq1_0(const struct kern_mat_args *a);
void kern_avx2_vec_tq2_0(const struct kern_mat_args *a);
void kern_avx2_vec_iq1_s(const struct kern_mat_args *a);
void kern_avx2_vec_iq1_m(const struct kern_mat_args *a);
void kern_avx2_vec_iq2_xxs(const struct kern_mat_args *a);
void kern_avx2_vec_iq2_xs(const struct kern_mat_args *a);
void kern_avx2_vec_iq2_s(const struct kern_mat_args *a);
void kern_avx2_vec_iq3_xxs(const struct kern_mat_args *a);
void kern_avx2_vec_iq3_s(const struct kern_mat_args *a);
void kern_avx2_vec_iq4_nl(const struct kern_mat_args *a);
void kern_avx2_vec_iq4_xs(const struct kern_mat_args *a);
void kern_avx2_vec_mxfp4(const struct kern_mat_args *a);

/* The kernel of a type from its pack_x and a packed form. */
#define AVX2_MAT(fn, micro)                                                       \
    void kern_avx2_mat_##fn(const struct kern_mat_args *a)                        \
    {                                                                             \
        static const struct avx2_type type = {pack_##fn, &kern_avx2_mat_##micro}; \
        kern_avx2_mat_run(a, &type);                                              \
    }
#define AVX2_MAT_VEC(fn, micro)                                                   \
    void kern_avx2_mat_##fn(const struct kern_mat_args *a)                        \
    {                                                                             \
        static const struct avx2_type type = {pack_##fn, &kern_avx2_mat_##micro}; \
        if (a->n_tok == 1)                                                        \
            kern_avx2_vec_##fn(a);                                                \
        else                                                                      \
            kern_avx2_mat_run(a, &type);                                          \
    }

AVX2_INLINE __m128i avx2_load16(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)p);
}

/* Ask for `bytes` at p, for soon. */
AVX2_INLINE void avx2_fetch(const void *p, const int bytes)
{
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + i, _MM_HINT_T0);
}

/* Ask the second-level cache for them, which has more lines under way than the first. */
AVX2_INLINE void avx2_fetch_l2(const void *p, const int bytes)
{
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* How far ahead, where one row after another is read in the order of memory. */
#define AVX2_FAR_BYTES (24 * 1024)

/* Fetch what comes next at the place of the block at `off` into the second-level cache, a few lines at a time among the
 * packing: a row's part is too short for a hardware prefetcher, and the first-level cache has two dozen lines under way at
 * most and drops them before they are packed (8 tokens: 1.3 to 1.6 times the speed on Zen 4). */
AVX2_INLINE void avx2_prefetch(const struct avx2_pack *p, int64_t off, const int block_bytes)
{
    if (block_bytes < 64 && (off & 63) >= block_bytes)
        return; /* the line was begun by the block before */
    for (int i = 0; i < block_bytes; i += 64)
        for (int r = 0; r < 8; r++)
            _mm_prefetch((const char *)p->row[r] + p->ahead + off + i, _MM_HINT_T1);
}

/* One sum, right now, in its own register: left alone, gcc 12 gathers all products of an unrolled loop first, to add them
 * as a tree, and spills them (a third of the speed). */
AVX2_INLINE __m256i avx2_in_order(__m256i sum)
{
    __asm__("" : "+x"(sum));
    return sum;
}

AVX2_INLINE void avx2_store(void *p, __m256i v)
{
    _mm256_store_si256((__m256i *)p, v);
}

/* 16 bytes of each of 8 rows; out[i] has bytes 4i..4i+3 of row r in lane r. */
AVX2_INLINE void avx2_rows16(const uint8_t *const row[8], int64_t off, __m256i out[4])
{
    __m256i a[4], t[4];
    AVX2_UNROLL
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(avx2_load16(row[i] + off)), avx2_load16(row[i + 4] + off),
                                       1);
    t[0] = _mm256_unpacklo_epi32(a[0], a[1]);
    t[1] = _mm256_unpackhi_epi32(a[0], a[1]);
    t[2] = _mm256_unpacklo_epi32(a[2], a[3]);
    t[3] = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm256_unpacklo_epi64(t[0], t[2]);
    out[1] = _mm256_unpackhi_epi64(t[0], t[2]);
    out[2] = _mm256_unpacklo_epi64(t[1], t[3]);
    out[3] = _mm256_unpackhi_epi64(t[1], t[3]);
}

AVX2_INLINE void avx2_rows32(const uint8_t *const row[8], int64_t off, __m256i out[8])
{
    avx2_rows16(row, off, out);
    avx2_rows16(row, off + 16, out + 4);
}

AVX2_INLINE int avx2_u16_at(const uint8_t *p)
{
    uint16_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

AVX2_INLINE int avx2_i32_at(const uint8_t *p)
{
    int32_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

/* 4 bytes of each of 8 rows. */
AVX2_INLINE __m256i avx2_rows4(const uint8_t *const row[8], int64_t off)
{
    return _mm256_setr_epi32(avx2_i32_at(row[0] + off), avx2_i32_at(row[1] + off), avx2_i32_at(row[2] + off),
                             avx2_i32_at(row[3] + off), avx2_i32_at(row[4] + off), avx2_i32_at(row[5] + off),
                             avx2_i32_at(row[6] + off), avx2_i32_at(row[7] + off));
}

/* A half of each of 8 rows, as floats. */
AVX2_INLINE __m256 avx2_rows_half(const uint8_t *const row[8], int64_t off)
{
    __m128i h = _mm_cvtsi32_si128(avx2_u16_at(row[0] + off));
    h = _mm_insert_epi16(h, avx2_u16_at(row[1] + off), 1);
    h = _mm_insert_epi16(h, avx2_u16_at(row[2] + off), 2);
    h = _mm_insert_epi16(h, avx2_u16_at(row[3] + off), 3);
    h = _mm_insert_epi16(h, avx2_u16_at(row[4] + off), 4);
    h = _mm_insert_epi16(h, avx2_u16_at(row[5] + off), 5);
    h = _mm_insert_epi16(h, avx2_u16_at(row[6] + off), 6);
    h = _mm_insert_epi16(h, avx2_u16_at(row[7] + off), 7);
    return _mm256_cvtph_ps(h);
}

/* The low and the high half of each lane, as floats. */
AVX2_INLINE void avx2_two_halves(__m256i v, float *lo, float *hi, __m256 hi_sign)
{
    __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2,
                                     3, 6, 7, 10, 11, 14, 15);
    v = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0xd8);
    _mm256_store_ps(lo, _mm256_cvtph_ps(_mm256_castsi256_si128(v)));
    _mm256_store_ps(hi, _mm256_xor_ps(hi_sign, _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))));
}

AVX2_INLINE __m256i avx2_low4(__m256i v)
{
    return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

AVX2_INLINE __m256i avx2_high4(__m256i v)
{
    return avx2_low4(_mm256_srli_epi16(v, 4));
}

/* Bits of every byte from place `from` to place `to`, kept where mask has them. */
AVX2_INLINE __m256i avx2_move_bits(__m256i v, int from, int to, int mask)
{
    v = from > to ? _mm256_srli_epi16(v, from - to) : from < to ? _mm256_slli_epi16(v, to - from) : v;
    return _mm256_and_si256(v, _mm256_set1_epi8((char)mask));
}

/* Byte `a` of each lane in the low 16 bits and byte `b` in the high ones, shifted left by 8 there if up. */
AVX2_INLINE __m256i avx2_pick2(__m256i v, int a, int b, int up)
{
    char z = (char)0x80, ca = (char)a, cb = (char)b;
#define PICK(k) \
    up ? z : (char)(ca + (k)), up ? (char)(ca + (k)) : z, up ? z : (char)(cb + (k)), up ? (char)(cb + (k)) : z
    return _mm256_shuffle_epi8(
        v, _mm256_setr_epi8(PICK(0), PICK(4), PICK(8), PICK(12), PICK(0), PICK(4), PICK(8), PICK(12)));
#undef PICK
}

/* Half of 2^(e - 127) for the low byte of each lane (MXFP4); the two smallest are subnormal: 2^-128, 2^-127. */
AVX2_INLINE __m256 avx2_e8m0_half(__m256i e)
{
    __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, is_small));
}

/* The low 16 bits of each lane, twice. */
AVX2_INLINE __m256i avx2_pick16(__m256i v)
{
    return _mm256_or_si256(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(v, 16));
}

/* Signed bytes of each lane as 16 bits, in the order 0, 2 and 1, 3 (kern_act.h). */
AVX2_INLINE void avx2_widen(__m256i v, int16_t out[2][16])
{
    avx2_store(out[0], _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
    avx2_store(out[1], _mm256_srai_epi16(v, 8));
}

/* The same times a factor of the row, which stands in both halves of its lane. */
AVX2_INLINE void avx2_widen_times(__m256i v, __m256i factor, int16_t out[2][16])
{
    avx2_store(out[0], _mm256_mullo_epi16(_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), factor));
    avx2_store(out[1], _mm256_mullo_epi16(_mm256_srai_epi16(v, 8), factor));
}

#endif
