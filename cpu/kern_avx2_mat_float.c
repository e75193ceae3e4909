/* AVX2 matmul of F32, F16 and BF16 weights: 16 lanes are two vectors for each sum (kern.h). 3 rows and 2 tokens at a time
 * fill 12 of the 16 registers with sums. */
#include "cpu/kern_avx2_mat.h"

#include <math.h>
#include <string.h>

#define ROWS 3
#define TOKS 2

enum form { FORM_F32, FORM_F16, FORM_BF16 };

AVX2_INLINE __m256 load8(const char *row, int64_t k, const enum form form)
{
    if (form == FORM_F32)
        return _mm256_loadu_ps((const float *)(row + k * 4));
    __m128i h = _mm_loadu_si128((const __m128i *)(row + k * 2));
    if (form == FORM_F16)
        return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

AVX2_INLINE float load1(const char *row, int64_t k, const enum form form)
{
    if (form == FORM_F32) {
        float x;
        memcpy(&x, row + k * 4, sizeof x);
        return x;
    }
    uint16_t h;
    memcpy(&h, row + k * 2, sizeof h);
    return form == FORM_F16 ? _cvtsh_ss(h) : quant_bf16_to_f32(h);
}

/* Elements k..n of fewer than 16, each into its lane. */
static __attribute__((noinline)) void add_tail(__m256 acc[2], const float *w, const float *x, int n)
{
    float lane[16];
    _mm256_storeu_ps(lane, acc[0]);
    _mm256_storeu_ps(lane + 8, acc[1]);
    for (int k = 0; k < n; k++)
        lane[k] = fmaf(w[k], x[k], lane[k]);
    acc[0] = _mm256_loadu_ps(lane);
    acc[1] = _mm256_loadu_ps(lane + 8);
}

/* Lanes l and l + 8, l and l + 4, l and l + 2, l and l + 1. */
AVX2_INLINE float fold(__m256 a, __m256 b)
{
    __m256 s8 = _mm256_add_ps(a, b);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

/* R rows times T tokens. */
AVX2_INLINE void dots(const char *const w[ROWS], const float *const x[TOKS], int64_t n, float *const dst[TOKS],
                      const int R, const int T, const enum form form)
{
    const int bytes = form == FORM_F32 ? 4 : 2;
    __m256 acc[ROWS][TOKS][2];
    AVX2_UNROLL
    for (int r = 0; r < R; r++)
        AVX2_UNROLL
    for (int t = 0; t < T; t++)
        acc[r][t][0] = acc[r][t][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        if (T == 1) { /* as avx2_vec_prefetch does */
            avx2_fetch(w[0] + (n + k) * bytes * R, 16 * bytes * R);
            avx2_fetch_l2(w[0] + k * bytes * R + AVX2_FAR_BYTES, 16 * bytes * R);
        }
        AVX2_UNROLL
        for (int half = 0; half < 2; half++) {
            __m256 xv[TOKS];
            AVX2_UNROLL
            for (int t = 0; t < T; t++)
                xv[t] = _mm256_loadu_ps(x[t] + k + half * 8);
            AVX2_UNROLL
            for (int r = 0; r < R; r++) {
                __m256 wv = load8(w[r], k + half * 8, form);
                AVX2_UNROLL
                for (int t = 0; t < T; t++)
                    acc[r][t][half] = _mm256_fmadd_ps(wv, xv[t], acc[r][t][half]);
            }
        }
    }
    AVX2_UNROLL
    for (int r = 0; r < R; r++) {
        float tail[16];
        for (int64_t i = k; i < n; i++)
            tail[i - k] = load1(w[r], i, form);
        AVX2_UNROLL
        for (int t = 0; t < T; t++) {
            if (k < n)
                add_tail(acc[r][t], tail, x[t] + k, (int)(n - k));
            dst[t][r] = fold(acc[r][t][0], acc[r][t][1]);
        }
    }
}

AVX2_INLINE void dots_any(const char *const w[ROWS], const float *const x[TOKS], int64_t n, float *const dst[TOKS],
                          int n_row, int n_tok, const enum form form)
{
    if (n_tok == 2) {
        if (n_row == 3)
            dots(w, x, n, dst, 3, 2, form);
        else if (n_row == 2)
            dots(w, x, n, dst, 2, 2, form);
        else
            dots(w, x, n, dst, 1, 2, form);
    } else {
        if (n_row == 3)
            dots(w, x, n, dst, 3, 1, form);
        else if (n_row == 2)
            dots(w, x, n, dst, 2, 1, form);
        else
            dots(w, x, n, dst, 1, 1, form);
    }
}

/* Rows row..row + n_row of `w` (raw or already floats in scratch) times all tokens. */
AVX2_INLINE void all_tokens(const struct kern_mat_args *a, int row, int n_row, const char *const w[ROWS],
                            const enum form form)
{
    for (int tok = 0, n_tok; tok < a->n_tok; tok += n_tok) {
        n_tok = a->n_tok - tok < TOKS ? 1 : TOKS;
        const float *x[TOKS] = {0};
        float *dst[TOKS] = {0};
        for (int t = 0; t < n_tok; t++) {
            x[t] = (const float *)((const char *)a->x + (uint64_t)(tok + t) * a->x_stride);
            dst[t] = a->dst + (tok + t) * a->dst_stride + row;
        }
        dots_any(w, x, a->n_cols, dst, n_row, n_tok, form);
    }
}

/* With several tokens half floats are widened once, if the rows fit the scratch. */
AVX2_INLINE bool widen_rows(const struct kern_mat_args *a, int n_row, const char *w[ROWS], const enum form form)
{
    int64_t n = a->n_cols, stride = (n + 7) & ~(int64_t)7;
    if (a->n_tok <= TOKS || ROWS * stride * 4 > KERN_MAT_SCRATCH_BYTES)
        return false;
    for (int r = 0; r < n_row; r++) {
        float *out = (float *)a->scratch + r * stride;
        int64_t k = 0;
        for (; k + 8 <= n; k += 8)
            _mm256_storeu_ps(out + k, load8(w[r], k, form));
        for (; k < n; k++)
            out[k] = load1(w[r], k, form);
        w[r] = (const char *)out;
    }
    return true;
}

AVX2_INLINE void mat_float(const struct kern_mat_args *a, const enum form form)
{
    for (int row = 0, n_row; row < a->n_rows; row += n_row) {
        n_row = a->n_rows - row < ROWS ? a->n_rows - row : ROWS;
        const char *w[ROWS] = {0};
        for (int r = 0; r < n_row; r++)
            w[r] = (const char *)a->w + (uint64_t)(row + r) * a->w_stride;
        if (form != FORM_F32 && widen_rows(a, n_row, w, form))
            all_tokens(a, row, n_row, w, FORM_F32);
        else
            all_tokens(a, row, n_row, w, form);
    }
}

void kern_avx2_mat_f32(const struct kern_mat_args *a)
{
    mat_float(a, FORM_F32);
}

void kern_avx2_mat_f16(const struct kern_mat_args *a)
{
    mat_float(a, FORM_F16);
}

void kern_avx2_mat_bf16(const struct kern_mat_args *a)
{
    mat_float(a, FORM_BF16);
}
