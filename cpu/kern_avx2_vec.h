/* Inside the AVX2 matmul kernels of one token: rows side by side, and what blocks of 256 have in common. */
#ifndef FERRY_CPU_KERN_AVX2_VEC_H
#define FERRY_CPU_KERN_AVX2_VEC_H

#include "cpu/kern_act.h"
#include "cpu/kern_avx2_mat.h"

AVX2_INLINE __m256i avx2_load32(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

/* N rows from `first`; those past the last repeat it, and their sums are thrown away. */
AVX2_INLINE void avx2_vec_rows(const struct kern_mat_args *a, int first, const int N, const uint8_t *row[])
{
    AVX2_UNROLL
    for (int r = 0; r < N; r++) {
        int at = first + r < a->n_rows ? first + r : a->n_rows - 1;
        row[r] = (const uint8_t *)a->w + (uint64_t)at * a->w_stride;
    }
}

/* Fetch what the next N rows will read, in the order of memory: so the prefetcher of the second-level cache sees one stream
 * and runs ahead, which it does not for N streams as short as rows are. The step at `off` has a share of `bytes` for each
 * of its rows; a burst of more would fill the queue of misses. */
AVX2_INLINE void avx2_vec_prefetch(const struct kern_mat_args *a, const int N, const uint8_t *const row[], int64_t off,
                                   int r, const int bytes)
{
    const uint8_t *p = row[0] + off * N + r * bytes;
    avx2_fetch(p + a->w_stride * (uint64_t)N, bytes);
    avx2_fetch_l2(p + AVX2_FAR_BYTES, bytes);
}

AVX2_INLINE void avx2_vec_store(const struct kern_mat_args *a, int first, const int N, const float *acc)
{
    for (int r = 0; r < N && first + r < a->n_rows; r++)
        a->dst[first + r] = acc[r];
}

AVX2_INLINE __m128i avx2_vec_sum4(const __m256i s[4])
{
    __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

AVX2_INLINE __m128 avx2_vec_add4(__m128 acc, __m128 d, __m128 dx, __m128i isum)
{
    return _mm_fmadd_ps(_mm_mul_ps(d, dx), _mm_cvtepi32_ps(isum), acc);
}

/* Word k of each half of v as all its words. */
AVX2_INLINE __m256i avx2_pick_word(__m256i v, const int k)
{
    return _mm256_shuffle_epi8(v, _mm256_set1_epi16((short)(2 * k | (2 * k + 1) << 8)));
}

/* What each 32 activations of a block count, in both halves. */
AVX2_INLINE __m256i avx2_sub_of(const struct kern_act_s256 *x)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)x->sub));
}

/* 256 activations: their codes, and what stands beside them. */
struct avx2_x256 {
    const int8_t *q;
    const struct kern_act_s256 *s;
};

/* Blocks of 256 without minima, 4 rows side by side. dot: the integer sums of a block in 8 lanes; half: the bits of its
 * scale, which counts `factor` times. */
AVX2_INLINE void avx2_vec_256(const struct kern_mat_args *a, const int bytes,
                              __m256i (*const dot)(const uint8_t *block, struct avx2_x256 x),
                              int (*const half)(const uint8_t *block), const float factor)
{
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 4) {
        const uint8_t *row[4];
        float out[4];
        __m128 acc = _mm_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, 4, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += bytes) {
            __m256i s[4];
            __m128i d = _mm_setzero_si128();
            AVX2_UNROLL
            for (int r = 0; r < 4; r++) {
                avx2_vec_prefetch(a, 4, row, off, r, bytes);
                s[r] = dot(row[r] + off, (struct avx2_x256){x.q + b * 256, &x.s[b]});
            }
            d = _mm_insert_epi16(d, half(row[0] + off), 0);
            d = _mm_insert_epi16(d, half(row[1] + off), 1);
            d = _mm_insert_epi16(d, half(row[2] + off), 2);
            d = _mm_insert_epi16(d, half(row[3] + off), 3);
            __m128 df = _mm_mul_ps(_mm_cvtph_ps(d), _mm_set1_ps(factor));
            acc = avx2_vec_add4(acc, df, _mm_set1_ps(x.s[b].d), avx2_vec_sum4(s));
        }
        _mm_storeu_ps(out, acc);
        avx2_vec_store(a, first, 4, out);
    }
}

/* Factors of 16 columns each, as bytes: those of even groups in the low half, of odd ones in the high half. */
AVX2_INLINE __m128i avx2_even_odd(__m128i v)
{
    return _mm_shuffle_epi8(v, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
}

#endif
