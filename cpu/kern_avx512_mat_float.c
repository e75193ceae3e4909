/* AVX-512 matmul of F32, F16 and BF16 weights: the 16 lanes of a sum are one vector (kern.h). One token waits for memory, which
 * the fewer rows of AVX2 get more out of. */
#include "cpu/kern_avx2_mat.h"
#include "cpu/kern_avx512_mat.h"

#include <string.h>

/* Sums of so many rows and tokens fill 24 of the 32 registers, beside the rows. */
#define ROWS 6
#define TOKS 4

enum form { FORM_F32, FORM_F16, FORM_BF16 };

/* Elements k.. of a row under a mask. */
AVX512_INLINE __m512 load_n(const char *row, int64_t k, __mmask16 mask, const enum form form)
{
    if (form == FORM_F32)
        return _mm512_maskz_loadu_ps(mask, row + k * 4);
    __m256i h = _mm256_maskz_loadu_epi16(mask, row + k * 2);
    if (form == FORM_F16)
        return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

AVX512_INLINE __m512 load16(const char *row, int64_t k, const enum form form)
{
    if (form == FORM_F32)
        return _mm512_loadu_ps(row + k * 4);
    __m256i h = _mm256_loadu_si256((const __m256i *)(row + k * 2));
    if (form == FORM_F16)
        return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Lanes l and l + 8, l and l + 4, l and l + 2, l and l + 1. */
AVX512_INLINE float fold(__m512 v)
{
    __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* What a call multiplies: rows as they lie, or widened. */
struct block {
    const char *w[ROWS];
    const float *x[TOKS];
    float *dst[TOKS];
    int64_t n;
};

/* R rows times T tokens. */
AVX512_INLINE void dots(const struct block *b, const int R, const int T, const enum form form)
{
    __m512 acc[ROWS][TOKS];
    int64_t k = 0;
    AVX512_UNROLL
    for (int r = 0; r < R; r++)
        AVX512_UNROLL
    for (int t = 0; t < T; t++)
        acc[r][t] = _mm512_setzero_ps();
    for (; k + 16 <= b->n; k += 16) {
        __m512 xv[TOKS];
        AVX512_UNROLL
        for (int t = 0; t < T; t++)
            xv[t] = _mm512_loadu_ps(b->x[t] + k);
        AVX512_UNROLL
        for (int r = 0; r < R; r++) {
            __m512 wv = load16(b->w[r], k, form);
            AVX512_UNROLL
            for (int t = 0; t < T; t++)
                acc[r][t] = _mm512_fmadd_ps(wv, xv[t], acc[r][t]);
        }
    }
    __mmask16 rest = (__mmask16)((1u << (b->n - k)) - 1); /* the other lanes keep what they have, also a -0 */
    AVX512_UNROLL
    for (int r = 0; r < R; r++)
        AVX512_UNROLL
    for (int t = 0; t < T; t++) {
        if (rest)
            acc[r][t] = _mm512_mask3_fmadd_ps(load_n(b->w[r], k, rest, form), _mm512_maskz_loadu_ps(rest, b->x[t] + k),
                                              acc[r][t], rest);
        b->dst[t][r] = fold(acc[r][t]);
    }
}

AVX512_INLINE void dots_any(const struct block *b, int n_row, int n_tok, const enum form form)
{
    if (n_tok == TOKS && n_row == ROWS)
        dots(b, ROWS, TOKS, form);
    else if (n_tok == TOKS)
        dots(b, 1, TOKS, form);
    else if (n_row == ROWS)
        dots(b, ROWS, 1, form);
    else
        dots(b, 1, 1, form);
}

/* n_row (1 or ROWS) rows times all tokens. */
AVX512_INLINE void all_tokens(const struct kern_mat_args *a, int row, int n_row, const char *const w[ROWS],
                              const enum form form)
{
    for (int tok = 0, n_tok; tok < a->n_tok; tok += n_tok) {
        struct block b = {.n = a->n_cols};
        n_tok = a->n_tok - tok < TOKS ? 1 : TOKS;
        memcpy(b.w, w, sizeof b.w);
        for (int t = 0; t < n_tok; t++) {
            b.x[t] = (const float *)((const char *)a->x + (uint64_t)(tok + t) * a->x_stride);
            b.dst[t] = a->dst + (tok + t) * a->dst_stride + row;
        }
        dots_any(&b, n_row, n_tok, form);
    }
}

/* Once for all three types. */
static __attribute__((noinline)) void all_tokens_f32(const struct kern_mat_args *a, int row, int n_row,
                                                     const char *const w[ROWS])
{
    all_tokens(a, row, n_row, w, FORM_F32);
}

/* With several tokens half floats are widened once, if the rows fit the scratch. */
AVX512_INLINE bool widen_rows(const struct kern_mat_args *a, int n_row, const char *w[ROWS], const enum form form)
{
    int64_t n = a->n_cols, stride = (n + 15) & ~(int64_t)15;
    if (a->n_tok < TOKS || ROWS * stride * 4 > KERN_MAT_SCRATCH_BYTES)
        return false;
    for (int r = 0; r < n_row; r++) {
        float *out = (float *)a->scratch + r * stride;
        for (int64_t k = 0; k < n; k += 16)
            _mm512_store_ps(out + k, n - k >= 16 ? load16(w[r], k, form)
                                                 : load_n(w[r], k, (__mmask16)((1u << (n - k)) - 1), form));
        w[r] = (const char *)out;
    }
    return true;
}

AVX512_INLINE void mat_float(const struct kern_mat_args *a, const enum form form)
{
    for (int row = 0, n_row; row < a->n_rows; row += n_row) {
        const char *w[ROWS] = {0};
        n_row = a->n_rows - row < ROWS ? 1 : ROWS;
        for (int r = 0; r < n_row; r++)
            w[r] = (const char *)a->w + (uint64_t)(row + r) * a->w_stride;
        if (form == FORM_F32 || widen_rows(a, n_row, w, form))
            all_tokens_f32(a, row, n_row, w);
        else
            all_tokens(a, row, n_row, w, form);
    }
}

void kern_avx512_mat_f32(const struct kern_mat_args *a)
{
    if (a->n_tok == 1)
        kern_avx2_mat_f32(a);
    else
        mat_float(a, FORM_F32);
}

void kern_avx512_mat_f16(const struct kern_mat_args *a)
{
    if (a->n_tok == 1)
        kern_avx2_mat_f16(a);
    else
        mat_float(a, FORM_F16);
}

void kern_avx512_mat_bf16(const struct kern_mat_args *a)
{
    if (a->n_tok == 1)
        kern_avx2_mat_bf16(a);
    else
        mat_float(a, FORM_BF16);
}
