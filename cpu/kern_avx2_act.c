/* AVX2 activation quantization: the same bytes as kern_ref_act.c. */
#include "cpu/kern_avx2_mat.h"

#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "cpu/kern_act.h"

static float max_lane(__m256i bits)
{
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

/* Largest magnitude of n elements, by its bits: a NaN is larger than all else. */
static float amax_of(const float *x, int n)
{
    __m256i abs_mask = _mm256_set1_epi32(0x7fffffff), m = _mm256_setzero_si256();
    for (int k = 0; k < n; k += 8)
        m = _mm256_max_epi32(m, _mm256_and_si256(abs_mask, _mm256_castps_si256(_mm256_loadu_ps(x + k))));
    return max_lane(m);
}

/* Where inv is 0 so are the codes, also of an x that is not finite. */
static __m256i codes8(const float *x, __m256 inv)
{
    __m256 some = _mm256_cmp_ps(inv, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_and_ps(_mm256_loadu_ps(x), some), inv));
}

/* 32 codes; 16 bits get them times sub. */
static __m256i put32(const float *x, __m256 inv, int sub, int8_t *q, int16_t *q16)
{
    __m256i lo = _mm256_packs_epi32(codes8(x, inv), codes8(x + 8, inv));
    __m256i hi = _mm256_packs_epi32(codes8(x + 16, inv), codes8(x + 24, inv));
    __m256i v = _mm256_packs_epi16(lo, hi); /* groups of 4 in the order 0 2 4 6 1 3 5 7 */
    v = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)q, v);
    __m256i order = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7, 8,
                                     10, 9, 11, 12, 14, 13, 15);
    __m256i w = _mm256_shuffle_epi8(v, order);
    __m256i f = _mm256_set1_epi16((short)sub);
    __m256i w0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)),
            w1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1));
    _mm256_storeu_si256((__m256i *)q16, _mm256_mullo_epi16(w0, f));
    _mm256_storeu_si256((__m256i *)(q16 + 16), _mm256_mullo_epi16(w1, f));
    return v;
}

/* Sums of the two halves of 32 codes. */
static void sums16(__m256i v, int *a, int *b)
{
    __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), v), _mm256_set1_epi16(1));
    s = _mm256_hadd_epi32(s, s);
    s = _mm256_hadd_epi32(s, s);
    *a = _mm_cvtsi128_si32(_mm256_castsi256_si128(s));
    *b = _mm_cvtsi128_si32(_mm256_extracti128_si256(s, 1));
}

/* sum += the squared errors of rounding 8 x * inv. */
static __m256 add_sq_err(__m256 sum, __m256 x, float inv)
{
    __m256 y = _mm256_mul_ps(x, _mm256_set1_ps(inv));
    __m256 err = _mm256_sub_ps(y, _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return _mm256_fmadd_ps(err, err, sum);
}

/* Lanes l and l+8, then l and l+4. */
static __m128 fold4(__m256 lo, __m256 hi)
{
    __m256 s = _mm256_add_ps(lo, hi);
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* Lanes l and l+2 of a beside those of b. */
static __m128 fold2(__m128 a, __m128 b)
{
    return _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
}

/* The code for amax: see KERN_ACT_TOPS. n is a multiple of 16. */
static float top_of(const float *x, int n, float amax)
{
    static const float tops[4] = KERN_ACT_TOPS, factors[4] = KERN_ACT_TOP_FACTORS;
    float inv[4];
    __m256 lo[4], hi[4];

    _Static_assert(KERN_ACT_N_TOP == 4, "one lane each");
    _mm_storeu_ps(inv, _mm_div_ps(_mm_loadu_ps(tops), _mm_set1_ps(amax)));
    AVX2_UNROLL
    for (int i = 0; i < 4; i++)
        lo[i] = hi[i] = _mm256_setzero_ps();
    for (int k = 0; k < n; k += 16) {
        __m256 a = _mm256_loadu_ps(x + k), b = _mm256_loadu_ps(x + k + 8);
        AVX2_UNROLL
        for (int i = 0; i < 4; i++) {
            lo[i] = add_sq_err(lo[i], a, inv[i]);
            hi[i] = add_sq_err(hi[i], b, inv[i]);
        }
    }
    __m128 sum = _mm_hadd_ps(fold2(fold4(lo[0], hi[0]), fold4(lo[1], hi[1])),
                             fold2(fold4(lo[2], hi[2]), fold4(lo[3], hi[3]))); /* lanes l and l+1 */
    sum = _mm_mul_ps(sum, _mm_loadu_ps(factors));
    __m128 least = _mm_min_ps(sum, _mm_shuffle_ps(sum, sum, 0x4e));
    least = _mm_min_ps(least, _mm_shuffle_ps(least, least, 0xb1));
    return tops[__builtin_ctz((unsigned)_mm_movemask_ps(_mm_cmpeq_ps(sum, least)))];
}

static void row_x32(const float *x, void *out, int64_t n)
{
    struct kern_act_x32 a = kern_act_x32(out, n);
    for (int64_t b = 0; b < n / 32; b++, x += 32) {
        float amax = amax_of(x, 32);
        bool is_finite = amax <= FLT_MAX, is_zero = is_finite && !(127.0f / amax <= FLT_MAX);
        float top = is_finite && !is_zero ? top_of(x, 32, amax) : 0.0f;
        __m256 inv = _mm256_set1_ps(top != 0.0f ? top / amax : 0.0f);
        int s0, s1;
        sums16(put32(x, inv, 1, a.q + b * 32, a.q16 + b * 32), &s0, &s1);
        a.s[b].d = top != 0.0f ? amax / top : is_zero ? 0.0f : amax;
        a.s[b].sum = s0 + s1;
    }
}

/* How many steps of an eighth of amax the parts take, whose largest magnitudes are `part`. */
static __m256 steps_of(__m256 part, float amax)
{
    __m256 steps = _mm256_ceil_ps(_mm256_mul_ps(part, _mm256_set1_ps(KERN_ACT_SUB_MAX / amax)));
    steps = _mm256_max_ps(steps, _mm256_set1_ps(1.0f));
    return _mm256_min_ps(steps, _mm256_set1_ps(KERN_ACT_SUB_MAX));
}

static void block_x256(const float *x, struct kern_act_s256 *s, int8_t *q, int16_t *q16)
{
    float part[8], invs[8];
    for (int j = 0; j < 8; j++)
        part[j] = amax_of(x + j * 32, 32);
    __m256 parts = _mm256_loadu_ps(part);
    float amax = max_lane(_mm256_castps_si256(parts)), inv = KERN_ACT_TOP_256 / amax;
    bool is_finite = amax <= FLT_MAX, has_codes = is_finite && inv <= FLT_MAX;
    __m256 steps = has_codes ? steps_of(parts, amax) : _mm256_set1_ps(1.0f);
    _mm256_storeu_ps(invs, _mm256_div_ps(_mm256_set1_ps(has_codes ? inv : 0.0f), steps));
    __m256i sub = _mm256_cvtps_epi32(steps);
    _mm_storeu_si128((__m128i *)s->sub, _mm_packs_epi32(_mm256_castsi256_si128(sub), _mm256_extracti128_si256(sub, 1)));
    s->d = has_codes ? amax / KERN_ACT_TOP_256 : is_finite ? 0.0f : amax;
    for (int j = 0; j < 8; j++) {
        int k = j * 32, f = s->sub[j], s0, s1;
        sums16(put32(x + k, _mm256_set1_ps(invs[j]), f, q + k, q16 + k), &s0, &s1);
        s->sum16[2 * j] = (int16_t)(f * s0);
        s->sum16[2 * j + 1] = (int16_t)(f * s1);
        s->sum32[j] = (int16_t)(f * (s0 + s1));
    }
}

static void row_x256(const float *x, void *out, int64_t n)
{
    struct kern_act_x256 a = kern_act_x256(out, n);
    for (int64_t b = 0; b < n / 256; b++)
        block_x256(x + b * 256, &a.s[b], a.q + b * 256, a.q16 + b * 256);
}

void kern_avx2_act_row(enum quant_act act, const float *x, void *out, int64_t n)
{
    if (act == QUANT_ACT_Q8X32)
        row_x32(x, out, n);
    else if (act == QUANT_ACT_Q8X256)
        row_x256(x, out, n);
    else
        memcpy(out, x, (size_t)n * sizeof *x);
}
