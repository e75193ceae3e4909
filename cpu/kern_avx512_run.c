/* The AVX-512 micro-kernels: a packed tile times a few activation rows (kern_avx512_mat.h). kern_avx512vnni_run.c includes
 * this file to compile it once more with AVX512_VNNI. */
#include "cpu/kern_avx512_mat.h"

#include <string.h>

#include "cpu/kern_act.h"
#include "cpu/kern_avx512_dot.h"

/* Codes with 8 bits, which stand 128 too large. Without VNNI their sign is moved to the activation, and nothing is too
 * large any more. */
enum { A_SIGNED = 0 };

AVX512_INLINE __m512i bcast4(const void *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
}

AVX512_INLINE __m512 bcast_d(const void *p)
{
    float d;
    memcpy(&d, p, sizeof d); /* first in both kern_act_s32 and kern_act_s256 */
    return _mm512_set1_ps(d);
}

/* Activation rows of a step, at its first column: all rows have their parts at the same offsets. */
struct xrows {
    const char *x[AVX512_TOKS];
    int64_t q, s;
};

AVX512_INLINE struct xrows rows_of(const struct avx512_step *st, const int T, const int len, const int s_bytes)
{
    struct xrows r = {.q = st->col};
    r.s = st->n_cols + st->col / len * s_bytes;
    for (int t = 0; t < T; t++)
        r.x[t] = st->x[t];
    return r;
}

/* One fmaf of the contract: acc + d * dx * isum for 16 rows. */
AVX512_INLINE __m512 add_scaled(__m512 acc, const float *d, __m512 dx, __m512i isum)
{
    return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_load_ps(d), dx), _mm512_cvtepi32_ps(isum), acc);
}

#define FOR_G_T(T)              \
    AVX512_UNROLL               \
    for (int t = 0; t < T; t++) \
        AVX512_UNROLL           \
    for (int g = 0; g < 2; g++)

AVX512_INLINE void acc_load(const struct avx512_step *st, const int T, __m512 acc[2][AVX512_TOKS])
{
    FOR_G_T(T)
    acc[g][t] =
        st->is_first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(st->mask[g], st->acc + t * st->acc_stride + g * 16);
}

AVX512_INLINE void acc_store(const struct avx512_step *st, const int T, __m512 acc[2][AVX512_TOKS])
{
    FOR_G_T(T)
    _mm512_mask_storeu_ps(st->acc + t * st->acc_stride + g * 16, st->mask[g], acc[g][t]);
}

/* s += the products of 4 N columns of both groups with T tokens; A: see AVX512_FORMS. */
AVX512_INLINE void dots(const int T, const int N, const int A, const uint8_t (*const q[2])[64], const struct xrows *x,
                        int64_t at, __m512i s[2][AVX512_TOKS])
{
    __m512i s16[2][AVX512_TOKS];
    AVX512_UNROLL
    for (int i = 0; i < N; i++) {
        struct avx512_codes w[2];
        AVX512_UNROLL
        for (int g = 0; g < 2; g++)
            w[g] = A == A_SIGNED ? avx512_codes_signed(avx512_load(q[g][i])) : avx512_codes_of(avx512_load(q[g][i]));
        AVX512_UNROLL
        for (int t = 0; t < T; t++) {
            __m512i xv = bcast4(x->x[t] + at + i * 4);
            AVX512_UNROLL
            for (int g = 0; g < 2; g++)
                avx512_dot_step(&s[g][t], &s16[g][t], w[g], xv, i, A);
        }
    }
}

/* Sum of 16 codes. */
AVX512_INLINE __m512i sum16_of(const char *x)
{
    __m128i v = _mm_maddubs_epi16(_mm_set1_epi8(1), _mm_loadu_si128((const __m128i *)x));
    v = _mm_madd_epi16(v, _mm_set1_epi16(1));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1));
    return _mm512_broadcastd_epi32(v);
}

/* Parts: of 32 columns under one float scale, or two of 16. */
AVX512_INLINE void run_t32(const struct avx512_step *st, const int T, const int A, const bool has_min, const int n_part)
{
    struct xrows x = rows_of(st, T, 32, sizeof(struct kern_act_s32));
    const __m512i minus_off = _mm512_set1_epi32(-(A == A_SIGNED ? AVX512_SIGNED_OFF : st->off));
    const int n_vec = 8 / n_part;
    __m512 acc[2][AVX512_TOKS];
    acc_load(st, T, acc);
    for (int b = 0; b < st->n_block; b++, x.s += (int64_t)sizeof(struct kern_act_s32)) {
        const struct avx512_t32 *w[2] = {(const struct avx512_t32 *)st->tile[0] + b,
                                         (const struct avx512_t32 *)st->tile[1] + b};
        AVX512_UNROLL
        for (int part = 0; part < n_part; part++, x.q += 4 * n_vec) {
            const uint8_t(*q[2])[64] = {w[0]->q + part * n_vec, w[1]->q + part * n_vec};
            __m512i s[2][AVX512_TOKS], xsum[AVX512_TOKS];
            AVX512_UNROLL
            for (int t = 0; t < T; t++) {
                const char *xs = x.x[t] + x.s;
                xsum[t] = n_part == 1 ? bcast4(xs + offsetof(struct kern_act_s32, sum)) : sum16_of(x.x[t] + x.q);
                s[0][t] = s[1][t] = has_min ? _mm512_setzero_si512() : _mm512_mullo_epi32(xsum[t], minus_off);
            }
            dots(T, n_vec, A, q, &x, x.q, s);
            FOR_G_T(T)
            {
                __m512 dx = bcast_d(x.x[t] + x.s);
                acc[g][t] = add_scaled(acc[g][t], w[g]->d[part], dx, s[g][t]);
                if (has_min)
                    acc[g][t] = add_scaled(acc[g][t], w[g]->m, dx, xsum[t]);
            }
        }
    }
    acc_store(st, T, acc);
}

/* Sums of x over SUB columns times min, of one group and token. */
AVX512_INLINE __m512i min_sum(const struct avx512_t256 *w, const char *xs, const int SUB)
{
    const char *sums = xs + (SUB == 16 ? offsetof(struct kern_act_s256, sum16) : offsetof(struct kern_act_s256, sum32));
    __m512i sum = _mm512_setzero_si512();
    AVX512_UNROLL
    for (int j = 0; j < 128 / SUB; j++)
        sum = avx512_madd_add(sum, avx512_load(w->min[j]), bcast4(sums + j * 4));
    return sum;
}

/* Integer sums of a block: SUB columns under one integer scale, 32 under one of the activation's. */
AVX512_INLINE void dot_256(const int T, const int SUB, const int A, const struct avx512_t256 *const w[2],
                           const struct xrows *x, __m512i isum[2][AVX512_TOKS])
{
    const int n_half = 32 / SUB, n_vec = SUB / 4;
    int32_t sub[AVX512_TOKS][8] __attribute__((aligned(32)));
    for (int t = 0; t < T; t++) {
        const char *p = x->x[t] + x->s + offsetof(struct kern_act_s256, sub);
        _mm256_store_si256((__m256i *)sub[t], _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)p)));
    }
    for (int j = 0; j < 8; j++) {
        __m512i s[2][AVX512_TOKS], sum[2][AVX512_TOKS];
        AVX512_UNROLL
        for (int half = 0; half < n_half; half++) {
            const int at = j * 8 + half * n_vec;
            const uint8_t(*q[2])[64] = {w[0]->q + at, w[1]->q + at};
            FOR_G_T(T)
            s[g][t] = _mm512_setzero_si512();
            dots(T, n_vec, A, q, x, x->q + at * 4, s);
            FOR_G_T(T)
            {
                __m512i v = _mm512_mullo_epi32(s[g][t], avx512_load(w[g]->scale[j * n_half + half]));
                sum[g][t] = half == 0 ? v : avx512_in_order(_mm512_add_epi32(sum[g][t], v));
            }
        }
        FOR_G_T(T)
        {
            __m512i v = _mm512_mullo_epi32(sum[g][t], _mm512_set1_epi32(sub[t][j]));
            isum[g][t] = avx512_in_order(_mm512_add_epi32(isum[g][t], v));
        }
    }
}

/* The sums of x over SUB columns times min are taken off the integer sum (off: min holds the scale times what the unsigned
 * codes are too large by), or enter the second fmaf. */
AVX512_INLINE void run_t256(const struct avx512_step *st, const int T, const int A, const int SUB, const bool has_min)
{
    struct xrows x = rows_of(st, T, 256, sizeof(struct kern_act_s256));
    const bool is_off = !has_min && !(A == A_SIGNED && AVX512_SIGNED_OFF == 0);
    __m512 acc[2][AVX512_TOKS];
    acc_load(st, T, acc);
    for (int b = 0; b < st->n_block; b++, x.q += 256, x.s += (int64_t)sizeof(struct kern_act_s256)) {
        const struct avx512_t256 *w[2] = {(const struct avx512_t256 *)st->tile[0] + b,
                                          (const struct avx512_t256 *)st->tile[1] + b};
        __m512i isum[2][AVX512_TOKS];
        FOR_G_T(T)
        isum[g][t] = is_off ? _mm512_sub_epi32(_mm512_setzero_si512(), min_sum(w[g], x.x[t] + x.s, SUB))
                            : _mm512_setzero_si512();
        dot_256(T, SUB, A, w, &x, isum);
        FOR_G_T(T)
        {
            const char *xs = x.x[t] + x.s;
            acc[g][t] = add_scaled(acc[g][t], w[g]->d, bcast_d(xs), isum[g][t]);
            if (has_min)
                acc[g][t] = add_scaled(acc[g][t], w[g]->m, bcast_d(xs), min_sum(w[g], xs, SUB));
        }
    }
    acc_store(st, T, acc);
}

/* The three sizes of a micro-kernel. */
#define MICRO_FN(name, T, run, ...)                      \
    static void name##_x##T(const struct avx512_step *s) \
    {                                                    \
        run(s, T, __VA_ARGS__);                          \
    }
#define MICRO(name, run, ...)           \
    MICRO_FN(name, 1, run, __VA_ARGS__) \
    MICRO_FN(name, 2, run, __VA_ARGS__) \
    MICRO_FN(name, 4, run, __VA_ARGS__)

MICRO(t32_a8_min, run_t32, 8, true, 1)
MICRO(t32_a8_off, run_t32, 8, false, 1)
MICRO(t32_a4_min, run_t32, 4, true, 1)
MICRO(t32_a4_off, run_t32, 4, false, 1)
MICRO(t32_s_off, run_t32, A_SIGNED, false, 1)
MICRO(t32_part16_off, run_t32, 4, false, 2)
MICRO(t256_s32_a8_min, run_t256, 8, 32, true)
MICRO(t256_s32_a4_min, run_t256, 4, 32, true)
MICRO(t256_s16_a4_min, run_t256, 4, 16, true)
MICRO(t256_s16_a2_off, run_t256, 2, 16, false)
MICRO(t256_s16_a1_off, run_t256, 1, 16, false)
MICRO(t256_s16_s_off, run_t256, A_SIGNED, 16, false)

#ifdef AVX512_VNNI
#define RUN_TABLE kern_avx512vnni_run
#else
#define RUN_TABLE kern_avx512_run
#endif
#define SIZES(form) [AVX512_##form] = {form##_x1, form##_x2, form##_x4},
avx512_run *const RUN_TABLE[AVX512_N_FORM][AVX512_N_SIZE] = {AVX512_FORMS(SIZES)};
