/* Inside the AVX-512 matmul kernels. A tile of 16 weight rows is packed so that a vector holds 4 columns of all 16 rows, one
 * row per 32-bit lane. Activations are broadcast 4 columns at a time, so that every lane gathers its own row's sum and
 * nothing has to be added across lanes. Codes are packed unsigned; what they are too large by is taken off with the sums of
 * the activations that stand beside their codes (kern_act.h).
 *
 * There are two tables, with VNNI and without. They share the packing; what multiplies (kern_avx512_run.c, with one token
 * kern_avx512_vec.c) is written once, on the primitives of kern_avx512_dot.h, and compiled twice. */
#ifndef FERRY_CPU_KERN_AVX512_MAT_H
#define FERRY_CPU_KERN_AVX512_MAT_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/kern_mat.h"
#include "quant/iq_grid.h"

/* Loops whose counts are constants once inlined, and whose variables belong in registers. */
#ifdef __clang__
#define AVX512_UNROLL _Pragma("clang loop unroll(full)")
#else
#define AVX512_UNROLL _Pragma("GCC unroll 32")
#endif
#define AVX512_INLINE static inline __attribute__((always_inline))

/* ---- packed tiles: 16 rows times one block of 32 or 256 columns ---- */

struct avx512_t32 { /* acc = fmaf(d dx, sum q x - off sum x), then fmaf(m dx, sum x) where there are minima */
    uint8_t q[8][64];
    float d[2][16]; /* types with a scale per 16 columns have two */
    float m[16];
};

struct avx512_t256 {
    uint8_t q[64][64];
    int32_t scale[16][16]; /* by 16 or 32 columns */
    int16_t min[8][32];    /* factors of the sums of x over 16 or 32 columns, two neighbours to a row */
    float d[16], m[16];
};

struct avx512_pack {
    const uint8_t *row[16]; /* rows past the last repeat it */
    int64_t col;
    int n_cols;
    int64_t ahead; /* bytes to the rows that are packed next, for prefetching */
    void *tile;    /* array of one of the structs above, one per block of columns */
};

/* Two groups of 16 rows times up to AVX512_TOKS tokens. */
#define AVX512_TOKS 4

struct avx512_step {
    const void *tile[2];
    uint16_t mask[2]; /* rows that there are; the others are computed and thrown away */
    int n_block;
    int64_t col, n_cols; /* first column, and columns of the whole activation row */
    int off;             /* what the codes of a 32-wide type are too large by */
    const void *x[AVX512_TOKS];
    float *acc;         /* (n_tok, 32): sums of the columns before; nothing yet if is_first */
    int64_t acc_stride; /* floats */
    bool is_first;
};

/* Micro-kernels by number of tokens: 1, 2, 4. */
enum { AVX512_N_SIZE = 3 };
typedef void avx512_run(const struct avx512_step *s);

/* Packed forms, named by the columns of a tile, those of a sub-scale, how many vpmaddubsw sums fit 16 bits (codes of 4, 5, 6,
 * 7 bits: 8, 4, 2, 1; with VNNI any has room for 8 bits), and what the sums of x are for. */
/* clang-format off */
#define AVX512_FORMS(X)                                                                                               \
    X(t32_a8_min) X(t32_a8_off) X(t32_a4_min) X(t32_a4_off) X(t32_part16_off)                            \
    X(t256_s32_a8_min) X(t256_s32_a4_min) X(t256_s16_a4_min) X(t256_s16_a2_off) X(t256_s16_a1_off)
#define AVX512_FORM_NAME(form) AVX512_##form,
enum avx512_form { AVX512_FORMS(AVX512_FORM_NAME) AVX512_N_FORM };
#undef AVX512_FORM_NAME
/* clang-format on */

extern avx512_run *const kern_avx512_run[AVX512_N_FORM][AVX512_N_SIZE];
extern avx512_run *const kern_avx512vnni_run[AVX512_N_FORM][AVX512_N_SIZE];

/* With one token; by weight type, NULL for F32, F16, BF16. */
extern kern_mat *const kern_avx512_vec[QUANT_ID_END];
extern kern_mat *const kern_avx512vnni_vec[QUANT_ID_END];

/* Packing: by weight type; NULL for F32, F16, BF16. */
struct avx512_type {
    void (*pack)(const struct avx512_pack *p);
    enum avx512_form form;
    int off;
};
extern const struct avx512_type kern_avx512_pack[QUANT_ID_END];

void kern_avx512_pack_q2_k(const struct avx512_pack *p);
void kern_avx512_pack_q3_k(const struct avx512_pack *p);
void kern_avx512_pack_q4_k(const struct avx512_pack *p);
void kern_avx512_pack_q5_k(const struct avx512_pack *p);
void kern_avx512_pack_q6_k(const struct avx512_pack *p);
void kern_avx512_pack_iq4_xs(const struct avx512_pack *p);
void kern_avx512_pack_iq1_m(const struct avx512_pack *p);
void kern_avx512_pack_iq1_s(const struct avx512_pack *p);
void kern_avx512_pack_iq2_s(const struct avx512_pack *p);
void kern_avx512_pack_iq2_xs(const struct avx512_pack *p);
void kern_avx512_pack_iq2_xxs(const struct avx512_pack *p);
void kern_avx512_pack_iq3_s(const struct avx512_pack *p);
void kern_avx512_pack_iq3_xxs(const struct avx512_pack *p);
void kern_avx512_pack_tq1_0(const struct avx512_pack *p);
void kern_avx512_pack_tq2_0(const struct avx512_pack *p);

void kern_avx512_mat_f32(const struct kern_mat_args *a);
void kern_avx512_mat_f16(const struct kern_mat_args *a);
void kern_avx512_mat_bf16(const struct kern_mat_args *a);

/* ---- vectors ---- */

AVX512_INLINE __m512i avx512_load(const void *p)
{
    return _mm512_loadu_si512(p);
}

AVX512_INLINE void avx512_store(void *p, __m512i v)
{
    _mm512_store_si512(p, v);
}

AVX512_INLINE __m128i avx512_load16(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)p);
}

/* 32 bytes in both halves. */
AVX512_INLINE __m512i avx512_twice32(const uint8_t *p)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
}

/* 16 bytes of four places, one in each quarter. */
AVX512_INLINE __m512i avx512_four16(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2, const uint8_t *p3)
{
    __m512i v = _mm512_castsi128_si512(avx512_load16(p0));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, avx512_load16(p1));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, avx512_load16(p2));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, avx512_load16(p3));
}

/* 4 x 4 words of 32 bits turned about in every quarter. */
AVX512_INLINE void avx512_turn(const __m512i a[4], __m512i out[4])
{
    __m512i t0 = _mm512_unpacklo_epi32(a[0], a[1]), t1 = _mm512_unpackhi_epi32(a[0], a[1]);
    __m512i t2 = _mm512_unpacklo_epi32(a[2], a[3]), t3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(t0, t2);
    out[1] = _mm512_unpackhi_epi64(t0, t2);
    out[2] = _mm512_unpacklo_epi64(t1, t3);
    out[3] = _mm512_unpackhi_epi64(t1, t3);
}

/* 16 bytes of each of 16 rows; out[i] has bytes 4i..4i+3 of row r in lane r. */
AVX512_INLINE void avx512_rows16(const uint8_t *const row[16], int64_t off, __m512i out[4])
{
    __m512i a[4];
    AVX512_UNROLL
    for (int i = 0; i < 4; i++)
        a[i] = avx512_four16(row[i] + off, row[i + 4] + off, row[i + 8] + off, row[i + 12] + off);
    avx512_turn(a, out);
}

AVX512_INLINE __m512i avx512_low4(__m512i v)
{
    return _mm512_and_si512(v, _mm512_set1_epi8(15));
}

AVX512_INLINE __m512i avx512_high4(__m512i v)
{
    return avx512_low4(_mm512_srli_epi16(v, 4));
}

/* Bits of every byte from place `from` to place `to`, kept where mask has them. */
AVX512_INLINE __m512i avx512_move_bits(__m512i v, int from, int to, int mask)
{
    v = from > to   ? _mm512_srli_epi16(v, (unsigned)(from - to))
        : from < to ? _mm512_slli_epi16(v, (unsigned)(to - from))
                    : v;
    return _mm512_and_si512(v, _mm512_set1_epi8((char)mask));
}

/* The low and the high halves of each lane, as floats. */
AVX512_INLINE __m512 avx512_low_half(__m512i v)
{
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

AVX512_INLINE __m512 avx512_high_half(__m512i v)
{
    return avx512_low_half(_mm512_srli_epi32(v, 16));
}

/* Half of 2^(e - 127) for the low byte of each lane; the two smallest are subnormal: 2^-128, 2^-127. */
AVX512_INLINE __m512 avx512_e8m0_half(__m512i e)
{
    __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    __mmask16 is_small = _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_small, small));
}

/* Half of the unsigned E4M3 in the low byte of each lane (the other bytes 0); its NaN counts as 0. */
AVX512_INLINE __m512 avx512_ue4m3_half(__m512i x)
{
    __m512i low7 = _mm512_and_si512(x, _mm512_set1_epi32(0x7f)); /* the top bit counts only for NaN */
    __m512i man = _mm512_and_si512(x, _mm512_set1_epi32(7));
    __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(low7, 20), _mm512_set1_epi32(119 << 23));
    __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(man), _mm512_set1_ps(0x1p-10f));
    __mmask16 is_small = _mm512_cmplt_epu32_mask(low7, _mm512_set1_epi32(8));
    __mmask16 is_number = _mm512_cmpneq_epi32_mask(x, _mm512_set1_epi32(0x7f));
    return _mm512_maskz_mov_ps(is_number, _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), is_small, small));
}

/* Byte k of each lane. */
AVX512_INLINE __m512i avx512_byte_of(__m512i v, const int k)
{
    return _mm512_and_si512(_mm512_srli_epi32(v, (unsigned)(8 * k)), _mm512_set1_epi32(255));
}

/* E2M1 doubled, and 12 more, to be unsigned. */
AVX512_INLINE __m512i avx512_fp4_levels(void)
{
    return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
}

/* The levels of IQ4, and 128 more. */
AVX512_INLINE __m512i avx512_iq4_levels(void)
{
    __m128i levels = _mm_loadu_si128((const __m128i *)iq_grid_iq4_levels);
    return _mm512_broadcast_i32x4(_mm_xor_si128(levels, _mm_set1_epi8((char)0x80)));
}

/* Fetch what comes next at the place of the block at `off` into the second-level cache, a few lines at a time among the
 * packing: a row's part is too short for a hardware prefetcher, and the first-level cache has two dozen lines under way at
 * most and drops them before they are packed (8 tokens: 1.3 to 1.6 times the speed on Zen 4). */
AVX512_INLINE void avx512_prefetch(const struct avx512_pack *p, int64_t off, const int block_bytes)
{
    if (block_bytes < 64 && (off & 63) >= block_bytes)
        return; /* the line was begun by the block before */
    for (int i = 0; i < block_bytes; i += 64)
        for (int r = 0; r < 16; r++)
            _mm_prefetch((const char *)p->row[r] + p->ahead + off + i, _MM_HINT_T1);
}

/* One sum, right now, in its own register: left alone, compilers gather the products of an unrolled loop first, to add them
 * as a tree, and spill them. */
AVX512_INLINE __m512i avx512_in_order(__m512i sum)
{
    __asm__("" : "+v"(sum));
    return sum;
}

#endif
