/* AVX2 matmul with one token for types whose codes are looked up (kern_avx2_vec.h): IQ4_XS, and the books of IQ1 to IQ3.
 * What a block says of indices, signs and scales is worked out for all its 256 columns at once; then come 32 columns at a
 * time: book rows are loaded, the signs go over to the activations, and vpmaddubsw multiplies. Books hold at most 62 and
 * IQ4's levels 127, so that two products fit 16 bits. */
#include "cpu/kern_avx2_vec.h"

#include <string.h>

#include "quant/blocks.h"
#include "quant/iq_grid.h"

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

/* Bits of the scale of a block that begins with it. */
AVX2_INLINE int half_first(const uint8_t *p)
{
    return avx2_u16_at(p);
}

AVX2_INLINE __m256i twice(__m128i v)
{
    return _mm256_broadcastsi128_si256(v);
}

/* 2 v + 1 */
AVX2_INLINE __m128i odd_of(__m128i v)
{
    return _mm_add_epi16(_mm_add_epi16(v, v), _mm_set1_epi16(1));
}

/* 2 n bytes of the low and high nibbles of n bytes, as they alternate. */
AVX2_INLINE __m128i nibbles_of(__m128i v)
{
    __m128i mask = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(v, mask), _mm_and_si128(_mm_srli_epi16(v, 4), mask));
}

/* The factors of 8 groups of 32, times what their activations count, in both halves. */
AVX2_INLINE __m256i scales32(__m128i scale, struct avx2_x256 x)
{
    return _mm256_mullo_epi16(twice(scale), avx2_sub_of(x.s));
}

/* The factors of 16 groups of 16: even ones in the low half. */
AVX2_INLINE __m256i scales16(__m256i scale_even_odd, struct avx2_x256 x)
{
    return _mm256_mullo_epi16(scale_even_odd, avx2_sub_of(x.s));
}

/* 32 columns of group g: products of `codes` with `signed_x`, of which one must not have a sign. */
AVX2_INLINE __m256i add_group(__m256i sum, __m256i codes, __m256i signed_x, __m256i scale, const int g)
{
    __m256i prod = _mm256_maddubs_epi16(codes, signed_x);
    return avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(prod, avx2_pick_word(scale, g))));
}

/* ---- IQ4_XS ---- */

AVX2_INLINE __m256i dot_iq4_xs(const uint8_t *p, struct avx2_x256 x)
{
    __m256i levels = twice(_mm_loadu_si128((const __m128i *)iq_grid_iq4_levels)), sum = _mm256_setzero_si256();
    __m256i shifts = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    __m128i low = _mm_cvtepu8_epi16(nibbles_of(_mm_cvtsi32_si128(avx2_i32_at(p + OFF(iq4_xs, scales_l)))));
    __m128i up = _mm_setr_epi16(1 << 14, 1 << 12, 1 << 10, 1 << 8, 1 << 6, 1 << 4, 1 << 2, 1);
    __m128i high = _mm_mullo_epi16(_mm_set1_epi16((short)avx2_u16_at(p + OFF(iq4_xs, scales_h))), up);
    high = _mm_slli_epi16(_mm_srli_epi16(high, 14), 4);
    __m256i scale = scales32(_mm_sub_epi16(_mm_or_si128(low, high), _mm_set1_epi16(32)), x);
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        __m256i v = twice(avx2_load16(p + OFF(iq4_xs, qs) + g * 16));
        v = _mm256_shuffle_epi8(levels, avx2_low4(_mm256_srlv_epi32(v, shifts)));
        sum = add_group(sum, _mm256_abs_epi8(v), _mm256_sign_epi8(avx2_load32(x.q + g * 32), v), scale, g);
    }
    return sum;
}

/* ---- signs ---- */

/* Each of 4 bytes, 8 times. */
AVX2_INLINE __m256i spread4(const uint8_t *p)
{
    __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                      3, 3, 3, 3, 3);
    return _mm256_shuffle_epi8(_mm256_set1_epi32(avx2_i32_at(p)), spread);
}

/* x negated where a bit of the 32 at `signs` is set. */
AVX2_INLINE __m256i signed_x(const int8_t *x, const uint8_t *signs)
{
    __m256i one = _mm256_set1_epi64x((int64_t)0x8040201008040201u), v = spread4(signs);
    v = _mm256_cmpeq_epi8(_mm256_and_si256(v, one), one);
    return _mm256_sign_epi8(avx2_load32(x), _mm256_or_si256(v, _mm256_set1_epi8(1)));
}

/* Bytes of 7 sign bits with their parity as the eighth (iq_grid_signs()). */
AVX2_INLINE __m256i add_parity(__m256i v)
{
    const char e = 0, o = (char)0x80;
    __m256i odd = twice(_mm_setr_epi8(e, o, o, e, o, e, e, o, o, e, e, o, e, o, o, e));
    __m256i folded = avx2_low4(_mm256_xor_si256(v, _mm256_srli_epi16(v, 4)));
    return _mm256_or_si256(v, _mm256_shuffle_epi8(odd, folded));
}

/* Of each word of IQ2_XXS and IQ3_XXS: 4 bytes of signs; the scale on top goes to `scale`. */
AVX2_INLINE __m256i signs_of_words(__m256i w, __m128i *scale)
{
    __m256i v = _mm256_and_si256(w, _mm256_set1_epi32(0x7f));
    v = _mm256_or_si256(v, _mm256_and_si256(_mm256_slli_epi32(w, 1), _mm256_set1_epi32(0x7f00)));
    v = _mm256_or_si256(v, _mm256_and_si256(_mm256_slli_epi32(w, 2), _mm256_set1_epi32(0x7f0000)));
    v = _mm256_or_si256(v, _mm256_and_si256(_mm256_slli_epi32(w, 3), _mm256_set1_epi32(0x7f000000)));
    __m256i top = _mm256_srli_epi32(w, 28);
    top = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
    *scale = odd_of(_mm256_castsi256_si128(top));
    return add_parity(v);
}

/* ---- books of 8 columns a row ---- */

AVX2_INLINE __m256i rows8(const uint64_t *book, int i0, int i1, int i2, int i3)
{
    return _mm256_setr_epi64x((int64_t)book[i0], (int64_t)book[i1], (int64_t)book[i2], (int64_t)book[i3]);
}

AVX2_INLINE __m256i dot_iq2_xxs(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint8_t signs[32];
    __m256i a = avx2_load32(p + OFF(iq2_xxs, qs)), b = avx2_load32(p + OFF(iq2_xxs, qs) + 32);
    __m256 odd = _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd);
    __m128i scale16;
    avx2_store(signs, signs_of_words(_mm256_permute4x64_epi64(_mm256_castps_si256(odd), 0xd8), &scale16));
    __m256i scale = scales32(scale16, x), sum = _mm256_setzero_si256();
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = p + OFF(iq2_xxs, qs) + g * 8;
        __m256i codes = rows8(iq_grid_iq2_xxs, i[0], i[1], i[2], i[3]);
        sum = add_group(sum, codes, signed_x(x.q + g * 32, signs + g * 4), scale, g);
    }
    return sum;
}

/* Scales of IQ2_XS and IQ2_S: 8 bytes. */
AVX2_INLINE __m256i scales_iq2(const uint8_t *p, struct avx2_x256 x)
{
    __m128i v = _mm_loadl_epi64((const __m128i *)p), mask = _mm_set1_epi8(15);
    __m128i even = _mm_cvtepu8_epi16(_mm_and_si128(v, mask));
    __m128i odd = _mm_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(v, 4), mask));
    return scales16(_mm256_inserti128_si256(_mm256_castsi128_si256(odd_of(even)), odd_of(odd), 1), x);
}

/* 256 columns whose book rows and signs are known. */
AVX2_INLINE __m256i dot_rows8(const uint64_t *book, const uint16_t index[32], const uint8_t *signs, __m256i scale,
                              struct avx2_x256 x)
{
    __m256i sum = _mm256_setzero_si256();
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        const uint16_t *i = index + g * 4;
        sum = add_group(sum, rows8(book, i[0], i[1], i[2], i[3]), signed_x(x.q + g * 32, signs + g * 4), scale, g);
    }
    return sum;
}

AVX2_INLINE __m256i dot_iq2_xs(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint16_t index[32];
    _Alignas(32) uint8_t signs[32];
    __m256i a = avx2_load32(p + OFF(iq2_xs, qs)), b = avx2_load32(p + OFF(iq2_xs, qs) + 32);
    __m256i nine = _mm256_set1_epi16(511);
    avx2_store(index, _mm256_and_si256(a, nine));
    avx2_store(index + 16, _mm256_and_si256(b, nine));
    __m256i seven = _mm256_packus_epi16(_mm256_srli_epi16(a, 9), _mm256_srli_epi16(b, 9));
    avx2_store(signs, add_parity(_mm256_permute4x64_epi64(seven, 0xd8)));
    return dot_rows8(iq_grid_iq2_xs, index, signs, scales_iq2(p + OFF(iq2_xs, scales), x), x);
}

AVX2_INLINE __m256i dot_iq2_s(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint16_t index[32];
    __m256i high = twice(_mm_loadl_epi64((const __m128i *)(p + OFF(iq2_s, qh))));
    __m256i up = _mm256_set1_epi64x(0x0004001000400100), mask = _mm256_set1_epi16(0x300);
    const char z = -1;
#define WORDS(k) k, z, k, z, k, z, k, z
    __m256i order[2] = {_mm256_setr_epi8(WORDS(0), WORDS(1), WORDS(2), WORDS(3)),
                        _mm256_setr_epi8(WORDS(4), WORDS(5), WORDS(6), WORDS(7))};
#undef WORDS
    AVX2_UNROLL
    for (int i = 0; i < 2; i++) {
        __m256i low = _mm256_cvtepu8_epi16(avx2_load16(p + OFF(iq2_s, qs) + i * 16));
        __m256i h = _mm256_and_si256(_mm256_mullo_epi16(_mm256_shuffle_epi8(high, order[i]), up), mask);
        avx2_store(index + i * 16, _mm256_or_si256(low, h));
    }
    return dot_rows8(iq_grid_iq2_s, index, p + OFF(iq2_s, signs), scales_iq2(p + OFF(iq2_s, scales), x), x);
}

/* Every element is an eighth more or less than its book row says: of a group of 32 all the same. */
AVX2_INLINE __m256i dot_iq1_s(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint16_t index[32];
    __m128i qh = avx2_load16(p + OFF(iq1_s, qh));
    __m256i up = _mm256_set1_epi64x(0x0000000400200100), mask = _mm256_set1_epi16(0x700);
    __m256i sum = _mm256_setzero_si256(), both = twice(qh);
#define WORDS(k) 2 * k, 2 * k + 1, 2 * k, 2 * k + 1, 2 * k, 2 * k + 1, 2 * k, 2 * k + 1
    __m256i order[2] = {_mm256_setr_epi8(WORDS(0), WORDS(1), WORDS(2), WORDS(3)),
                        _mm256_setr_epi8(WORDS(4), WORDS(5), WORDS(6), WORDS(7))};
#undef WORDS
    AVX2_UNROLL
    for (int i = 0; i < 2; i++) {
        __m256i h = _mm256_shuffle_epi8(both, order[i]); /* bits 0, 3, 6 and 9 on, in turn */
        h = _mm256_blend_epi16(_mm256_mullo_epi16(h, up), _mm256_srli_epi16(h, 1), 0x88);
        __m256i low = _mm256_cvtepu8_epi16(avx2_load16(p + OFF(iq1_s, qs) + i * 16));
        avx2_store(index + i * 16, _mm256_or_si256(low, _mm256_and_si256(h, mask)));
    }
    __m128i factor = odd_of(_mm_and_si128(_mm_srli_epi16(qh, 12), _mm_set1_epi16(7)));
    __m256i scale = scales32(factor, x), ones = _mm256_set1_epi8(1);
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        const uint16_t *i = index + g * 4;
        __m256i v = rows8(iq_grid_iq1_s, i[0], i[1], i[2], i[3]);
        sum = add_group(sum, ones, _mm256_sign_epi8(avx2_load32(x.q + g * 32), v), scale, g);
    }
    __m128i shift = _mm_sign_epi16(factor, _mm_or_si128(qh, _mm_set1_epi16(1)));
    __m128i more = _mm_madd_epi16(shift, _mm_loadu_si128((const __m128i *)x.s->sum32));
    return _mm256_add_epi32(_mm256_slli_epi32(sum, 3), _mm256_zextsi128_si256(more));
}

/* 16 factors of 3 bits, in the low 12 bits of four words. */
AVX2_INLINE __m256i scales_iq1_m(const uint8_t *p, struct avx2_x256 x)
{
    __m256i v = twice(_mm_loadl_epi64((const __m128i *)(p + OFF(iq1_m, scales))));
#define WORD(k) 2 * k, 2 * k + 1, 2 * k, 2 * k + 1
    v = _mm256_shuffle_epi8(v, twice(_mm_setr_epi8(WORD(0), WORD(1), WORD(2), WORD(3))));
#undef WORD
    __m256i up = _mm256_setr_epi16(1 << 13, 1 << 7, 1 << 13, 1 << 7, 1 << 13, 1 << 7, 1 << 13, 1 << 7, 1 << 10, 1 << 4,
                                   1 << 10, 1 << 4, 1 << 10, 1 << 4, 1 << 10, 1 << 4);
    v = _mm256_srli_epi16(_mm256_mullo_epi16(v, up), 13);
    return scales16(_mm256_add_epi16(_mm256_add_epi16(v, v), _mm256_set1_epi16(1)), x);
}

/* 32 columns in eighths: 8 times the book's, less one where the 8 columns' byte of `down` is set, else one more. */
AVX2_INLINE __m256i shifted(__m256i v, const uint8_t *down)
{
    __m256i shift = spread4(down);
    v = _mm256_add_epi8(v, v);
    v = _mm256_add_epi8(v, v);
    return _mm256_add_epi8(_mm256_add_epi8(v, v), _mm256_or_si256(shift, _mm256_set1_epi8(1)));
}

AVX2_INLINE __m256i dot_iq1_m(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint16_t index[32];
    _Alignas(32) uint8_t down[32];
    __m256i nibble[2], is_down[2], up = _mm256_set1_epi32(0x00100100), both = twice(avx2_load16(p + OFF(iq1_m, qh)));
    const char z = -1;
#define WORDS(k) k, z, k, z
    __m256i order[2] = {
        _mm256_setr_epi8(WORDS(0), WORDS(1), WORDS(2), WORDS(3), WORDS(4), WORDS(5), WORDS(6), WORDS(7)),
        _mm256_setr_epi8(WORDS(8), WORDS(9), WORDS(10), WORDS(11), WORDS(12), WORDS(13), WORDS(14), WORDS(15))};
#undef WORDS
    AVX2_UNROLL
    for (int i = 0; i < 2; i++) { /* bits 8 to 11 of each word: its nibble */
        nibble[i] = _mm256_mullo_epi16(_mm256_shuffle_epi8(both, order[i]), up);
        is_down[i] = _mm256_srai_epi16(_mm256_slli_epi16(nibble[i], 4), 15);
        __m256i low = _mm256_cvtepu8_epi16(avx2_load16(p + OFF(iq1_m, qs) + i * 16));
        avx2_store(index + i * 16, _mm256_or_si256(low, _mm256_and_si256(nibble[i], _mm256_set1_epi16(0x700))));
    }
    avx2_store(down, _mm256_permute4x64_epi64(_mm256_packs_epi16(is_down[0], is_down[1]), 0xd8));
    __m256i scale = scales_iq1_m(p, x), sum = _mm256_setzero_si256();
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        const uint16_t *i = index + g * 4;
        __m256i v = shifted(rows8(iq_grid_iq1_s, i[0], i[1], i[2], i[3]), down + g * 4);
        sum = add_group(sum, _mm256_abs_epi8(v), _mm256_sign_epi8(avx2_load32(x.q + g * 32), v), scale, g);
    }
    return sum;
}

AVX2_INLINE int half_iq1_m(const uint8_t *p)
{
    uint16_t w[4];
    memcpy(w, p + OFF(iq1_m, scales), sizeof w);
    return w[0] >> 12 | (w[1] >> 8 & 0xf0) | (w[2] >> 4 & 0xf00) | (w[3] & 0xf000);
}

/* ---- books of 4 columns a row ---- */

AVX2_INLINE __m256i rows4(const uint32_t *book, int i0, int i1, int i2, int i3, int i4, int i5, int i6, int i7)
{
    return _mm256_setr_epi32((int)book[i0], (int)book[i1], (int)book[i2], (int)book[i3], (int)book[i4], (int)book[i5],
                             (int)book[i6], (int)book[i7]);
}

AVX2_INLINE __m256i dot_iq3_xxs(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint8_t signs[32];
    __m128i scale16;
    avx2_store(signs, signs_of_words(avx2_load32(p + OFF(iq3_xxs, scales)), &scale16));
    __m256i scale = scales32(scale16, x), sum = _mm256_setzero_si256();
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = p + OFF(iq3_xxs, qs) + g * 8;
        __m256i codes = rows4(iq_grid_iq3_xxs, i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]);
        sum = add_group(sum, codes, signed_x(x.q + g * 32, signs + g * 4), scale, g);
    }
    return sum;
}

AVX2_INLINE __m256i dot_iq3_s(const uint8_t *p, struct avx2_x256 x)
{
    _Alignas(32) uint16_t index[64];
    __m256i bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    AVX2_UNROLL
    for (int i = 0; i < 4; i++) {
        __m256i low = _mm256_cvtepu8_epi16(avx2_load16(p + OFF(iq3_s, qs) + i * 16));
        __m256i h = _mm256_set1_epi16((short)avx2_u16_at(p + OFF(iq3_s, qh) + i * 2));
        h = _mm256_cmpeq_epi16(_mm256_and_si256(h, bit), bit);
        avx2_store(index + i * 16, _mm256_or_si256(low, _mm256_and_si256(h, _mm256_set1_epi16(256))));
    }
    __m128i nibbles = nibbles_of(_mm_cvtsi32_si128(avx2_i32_at(p + OFF(iq3_s, scales))));
    __m256i scale = scales32(odd_of(_mm_cvtepu8_epi16(nibbles)), x), sum = _mm256_setzero_si256();
    AVX2_UNROLL
    for (int g = 0; g < 8; g++) {
        const uint16_t *i = index + g * 8;
        __m256i codes = rows4(iq_grid_iq3_s, i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]);
        sum = add_group(sum, codes, signed_x(x.q + g * 32, p + OFF(iq3_s, signs) + g * 4), scale, g);
    }
    return sum;
}

/* ---- TQ1_0 ---- */

/* Unpacked first; every factor is 1. */
static __m256i dot_tq1_0(const uint8_t *p, struct avx2_x256 x)
{
    struct kern_mat_block b;
    __m256i sum = _mm256_setzero_si256(), scale = avx2_sub_of(x.s);
    kern_avx2_unpack_tq1_0(p, &b);
    AVX2_UNROLL
    for (int g = 0; g < 8; g++)
        sum = add_group(sum, _mm256_set1_epi8(1),
                        _mm256_sign_epi8(avx2_load32(x.q + g * 32), avx2_load32(b.q + g * 32)), scale, g);
    return sum;
}

AVX2_INLINE int half_tq1_0(const uint8_t *p)
{
    return avx2_u16_at(p + OFF(tq1_0, d));
}

#define VEC(type, half, factor)                                                      \
    void kern_avx2_vec_##type(const struct kern_mat_args *a)                         \
    {                                                                                \
        avx2_vec_256(a, (int)sizeof(struct block_##type), dot_##type, half, factor); \
    }
VEC(iq4_xs, half_first, 1)
VEC(iq1_s, half_first, 0.125f)
VEC(iq1_m, half_iq1_m, 0.125f)
VEC(iq2_xxs, half_first, 0.125f)
VEC(iq2_xs, half_first, 0.125f)
VEC(iq2_s, half_first, 0.125f)
VEC(iq3_xxs, half_first, 0.25f)
VEC(iq3_s, half_first, 1)
VEC(tq1_0, half_tq1_0, 1)
