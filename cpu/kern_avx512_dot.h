/* The dot products of the two AVX-512 tables: with AVX512_VNNI defined by vpdpbusd and vpdpwssd, else by vpmaddubsw and
 * vpmaddwd, the same sums from both (no intermediate one saturates). */
#ifndef FERRY_CPU_KERN_AVX512_DOT_H
#define FERRY_CPU_KERN_AVX512_DOT_H

#include "cpu/kern_avx512_mat.h"

/* acc + the two products in each 32-bit lane. */
AVX512_INLINE __m512i avx512_madd_add(__m512i acc, __m512i a, __m512i b)
{
#ifdef AVX512_VNNI
    return _mm512_dpwssd_epi32(acc, a, b);
#else
    return avx512_in_order(_mm512_add_epi32(acc, _mm512_madd_epi16(a, b)));
#endif
}

/* acc + the four products in each 32-bit lane of codes up to 127 with signed x. */
AVX512_INLINE __m512i avx512_dot7(__m512i acc, __m512i w, __m512i x)
{
#ifdef AVX512_VNNI
    return _mm512_dpbusd_epi32(acc, w, x);
#else
    return avx512_madd_add(acc, _mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1));
#endif
}

/* Packed codes as the multiplication wants them. */
struct avx512_codes {
    __m512i q;
    __mmask64 neg; /* whose sign has been taken */
};

AVX512_INLINE struct avx512_codes avx512_codes_of(__m512i q)
{
    return (struct avx512_codes){q, 0};
}

#ifdef AVX512_VNNI

/* What signed codes are still too large by. */
#define AVX512_SIGNED_OFF 128

AVX512_INLINE struct avx512_codes avx512_codes_signed(__m512i q)
{
    return (struct avx512_codes){q, 0};
}

/* Step i of a sum over the vectors of a group. `part` is not needed here. */
AVX512_INLINE void avx512_dot_step(__m512i *sum, __m512i *part, struct avx512_codes w, __m512i x, const int i,
                                   const int a)
{
    (void)part, (void)i, (void)a;
    *sum = _mm512_dpbusd_epi32(*sum, w.q, x);
}

#else

#define AVX512_SIGNED_OFF 0

AVX512_INLINE struct avx512_codes avx512_codes_signed(__m512i q)
{
    q = _mm512_xor_si512(q, _mm512_set1_epi8((char)0x80));
    return (struct avx512_codes){_mm512_abs_epi8(q), _mm512_movepi8_mask(q)};
}

/* Step i of a sum over the vectors of a group: `a` products are added in the 16 bits of `part`; a = 0: codes with a sign. */
AVX512_INLINE void avx512_dot_step(__m512i *sum, __m512i *part, struct avx512_codes w, __m512i x, const int i,
                                   const int a)
{
    const int n = a ? a : 1;
    if (a == 0)
        x = _mm512_mask_sub_epi8(x, w.neg, _mm512_setzero_si512(), x);
    __m512i prod = _mm512_maddubs_epi16(w.q, x);
    *part = i % n == 0 ? prod : avx512_in_order(_mm512_add_epi16(*part, prod));
    if (i % n == n - 1)
        *sum = avx512_in_order(_mm512_add_epi32(*sum, _mm512_madd_epi16(*part, _mm512_set1_epi16(1))));
}

#endif
#endif
