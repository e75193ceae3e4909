/* The float kernels for AVX-512, the same for both of its tables: the same bits as kern_ref.c. The 16 lanes are one vector;
 * the elements past a whole vector are loaded and stored under a mask. */
#include "cpu/kern.h"

#define KERN_MATH_AVX512
#include "cpu/kern_math.h"

#include "cpu/kern_avx2_mat.h"
#include "cpu/kern_avx512_mat.h"

#include <assert.h>
#include <math.h>
#include <string.h>

enum { V = 16 };

/* The first n of 16 lanes; all where there are more. */
static inline __mmask16 mask_of(int64_t n)
{
    return n >= V ? 0xffff : (__mmask16)((1u << n) - 1);
}

static inline __m512 load_n(const float *x, int64_t n)
{
    return _mm512_maskz_loadu_ps(mask_of(n), x);
}

static inline void store_n(float *x, __m512 v, int64_t n)
{
    _mm512_mask_storeu_ps(x, mask_of(n), v);
}

/* Lanes l and l+8, then l and l+4, l+2, l+1. */
static inline float tree(__m512 v)
{
    __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* acc = fmaf(a, b, acc) in the first n lanes only: adding a product of zeros would turn -0 into 0. */
static inline __m512 fma_n(const float *a, const float *b, __m512 acc, int64_t n)
{
    return _mm512_mask3_fmadd_ps(load_n(a, n), load_n(b, n), acc, mask_of(n));
}

static float dot_avx512(const float *a, const float *b, int64_t n)
{
    __m512 sum = _mm512_setzero_ps();
    int64_t i = 0;

    for (; i + V <= n; i += V)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    if (i < n)
        sum = fma_n(a + i, b + i, sum, n - i);
    return tree(sum);
}

static float sum_sq_avx512(const float *a, int64_t n)
{
    return dot_avx512(a, a, n);
}

static void rms_norm_avx512(const float *x, const float *w, float eps, float *out, int64_t n)
{
    __m512 f = _mm512_set1_ps(1.0f / sqrtf(sum_sq_avx512(x, n) / (float)n + eps));

    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, _mm512_mul_ps(_mm512_mul_ps(load_n(x + i, n - i), f), load_n(w + i, n - i)), n - i);
}

static void add_avx512(const float *a, const float *b, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, _mm512_add_ps(load_n(a + i, n - i), load_n(b + i, n - i)), n - i);
}

static void scale_avx512(const float *a, float f, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, _mm512_mul_ps(load_n(a + i, n - i), _mm512_set1_ps(f)), n - i);
}

static void glu_avx512(enum op_act act, const float *g, const float *u, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, kern_v_glu(act, load_n(g + i, n - i), load_n(u + i, n - i)), n - i);
}

static void softcap_avx512(const float *a, float cap, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, kern_v_softcap(load_n(a + i, n - i), _mm512_set1_ps(cap)), n - i);
}

static void axpy_avx512(float f, const float *x, float *acc, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(acc + i, _mm512_fmadd_ps(_mm512_set1_ps(f), load_n(x + i, n - i), load_n(acc + i, n - i)), n - i);
}

static void rope_neox(float *x, const float *cos_sin, int half)
{
    for (int i = 0; i < half; i += V) {
        int n = half - i;
        __m512 c = load_n(cos_sin + i, n), s = load_n(cos_sin + half + i, n);
        __m512 a = load_n(x + i, n), b = load_n(x + half + i, n);
        store_n(x + i, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)), n);
        store_n(x + half + i, _mm512_add_ps(_mm512_mul_ps(a, s), _mm512_mul_ps(b, c)), n);
    }
}

/* Eight pairs (a, b) side by side: (a, b) c -+ (b, a) s. */
static void rope_pairs(float *x, const float *cos_sin, int half)
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);

    for (int i = 0; i < half; i += V / 2) {
        int n = half - i < V / 2 ? half - i : V / 2;
        __m512 c = _mm512_permutexvar_ps(twice, load_n(cos_sin + i, n));
        __m512 s = _mm512_permutexvar_ps(twice, load_n(cos_sin + half + i, n));
        __m512 ab = load_n(x + 2 * i, 2 * n), ba = _mm512_permute_ps(ab, 0xb1);
        __m512 abc = _mm512_mul_ps(ab, c), bas = _mm512_mul_ps(ba, s);
        store_n(x + 2 * i, _mm512_mask_sub_ps(_mm512_add_ps(abc, bas), 0x5555, abc, bas), 2 * n);
    }
}

static void rope_avx512(const struct op_rope *p, float *x, const float *cos_sin)
{
    for (int head = 0; head < p->n_head; head++, x += p->head_dim) {
        if (p->neox)
            rope_neox(x, cos_sin, p->n_rot / 2);
        else
            rope_pairs(x, cos_sin, p->n_rot / 2);
    }
}

/* The largest that is not NaN. */
static float max_avx512(const float *x, int64_t n)
{
    __m512 m = _mm512_set1_ps(-INFINITY);

    for (int64_t i = 0; i < n; i += V)
        m = _mm512_mask_max_ps(m, mask_of(n - i), load_n(x + i, n - i), m);
    return _mm512_reduce_max_ps(m);
}

/* x = exp(x - m); returns the sum. */
static float exp_sum_avx512(float *x, float m, int64_t n)
{
    __m512 sum = _mm512_setzero_ps();

    for (int64_t i = 0; i < n; i += V) {
        __m512 e = kern_v_exp(_mm512_sub_ps(load_n(x + i, n - i), _mm512_set1_ps(m)));
        store_n(x + i, e, n - i);
        sum = _mm512_mask_add_ps(sum, mask_of(n - i), sum, e);
    }
    return tree(sum);
}

static void softmax_avx512(float *x, int64_t n)
{
    __m512 sum = _mm512_set1_ps(exp_sum_avx512(x, max_avx512(x, n), n));

    for (int64_t i = 0; i < n; i += V)
        store_n(x + i, _mm512_div_ps(load_n(x + i, n - i), sum), n - i);
}

/* ---- KV rows ---- */

static void q8_0_write(const float *x, uint8_t *out, int64_t n)
{
    const __m512 lo = _mm512_set1_ps(-127.0f), hi = _mm512_set1_ps(127.0f);

    for (; n > 0; n -= 32, x += 32, out += 34) {
        __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + V);
        __m512 m = kern_v_max(kern_v_abs(b), kern_v_max(kern_v_abs(a), _mm512_setzero_ps())); /* NaN does not count */
        float amax = _mm512_reduce_max_ps(m);
        uint16_t d = quant_f32_to_f16(amax / 127.0f);
        __m512 f = _mm512_set1_ps(amax > 0.0f ? 127.0f / amax : 0.0f);
        __m512i qa = _mm512_cvtps_epi32(kern_v_min(kern_v_max(_mm512_mul_ps(a, f), lo), hi));
        __m512i qb = _mm512_cvtps_epi32(kern_v_min(kern_v_max(_mm512_mul_ps(b, f), lo), hi));
        memcpy(out, &d, sizeof d);
        _mm_storeu_si128((__m128i *)(out + 2), _mm512_cvtepi32_epi8(qa));
        _mm_storeu_si128((__m128i *)(out + 2 + V), _mm512_cvtepi32_epi8(qb));
    }
}

static void kv_write_avx512(enum quant_type type, const float *x, void *out, int64_t n)
{
    assert(type == QUANT_F16 || type == QUANT_Q8_0);
    if (type == QUANT_Q8_0) {
        q8_0_write(x, out, n);
        return;
    }
    for (int64_t i = 0; i < n; i += V)
        _mm256_mask_storeu_epi16((uint16_t *)out + i, mask_of(n - i),
                                 _mm512_cvtps_ph(load_n(x + i, n - i), _MM_FROUND_TO_NEAREST_INT));
}

static void kv_read_avx512(enum quant_type type, const void *in, float *x, int64_t n)
{
    const uint8_t *block = in;

    assert(type == QUANT_F16 || type == QUANT_Q8_0);
    if (type == QUANT_F16) {
        const uint16_t *half = in;
        int64_t i = 0;
        for (; i + V <= n; i += V)
            _mm512_storeu_ps(x + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(half + i))));
        if (i < n)
            store_n(x + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(n - i), half + i)), n - i);
        return;
    }
    for (int64_t i = 0; i < n; i += 32, block += 34) {
        uint16_t d;
        memcpy(&d, block, sizeof d);
        __m512 f = _mm512_set1_ps(_cvtsh_ss(d));
        for (int k = 0; k < 32; k += V) {
            __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 2 + k)));
            _mm512_storeu_ps(x + i + k, _mm512_mul_ps(f, _mm512_cvtepi32_ps(q)));
        }
    }
}

/* ---- attention ---- */

/* Keys taken together: their rows, as floats, stay in the L1 cache while all queries pass by. So many of the next page's rows are fetched
 * meanwhile; of 16 or 32 at a time more is waited for, also where nothing is converted before. */
enum { TILE = 8, QUAD = 4 };
/* Queries of a group that share what is loaded. */
enum { QUERIES = 4 };

/* Elements of a page's rows, which are halves or floats: 16 from place i on, or n of fewer. */
AVX512_INLINE __m512 load_kv(const bool half, const void *rows, int64_t i)
{
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)rows + i)))
                : _mm512_loadu_ps((const float *)rows + i);
}

AVX512_INLINE __m512 load_kv_n(const bool half, const void *rows, int64_t i, int64_t n)
{
    return half ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask_of(n), (const uint16_t *)rows + i))
                : load_n((const float *)rows + i, n);
}

/* q . k of one key, whose row begins at place `at` of k. */
AVX512_INLINE float dot_kv(const bool half, const float *q, const void *k, int64_t at, int64_t n)
{
    __m512 sum = _mm512_setzero_ps();

    for (int64_t i = 0; i < n; i += V)
        sum = _mm512_mask3_fmadd_ps(load_n(q + i, n - i), load_kv_n(half, k, at + i, n - i), sum, mask_of(n - i));
    return tree(sum);
}

/* The tree of four sums at once: lanes l and l+8 of (0 | 1) and (2 | 3), l+4 of all, then l+2, l+1. */
static inline __m128 tree_quad(const __m512 s[QUAD])
{
    __m512 s01 = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x44), _mm512_shuffle_f32x4(s[0], s[1], 0xee));
    __m512 s23 = _mm512_add_ps(_mm512_shuffle_f32x4(s[2], s[3], 0x44), _mm512_shuffle_f32x4(s[2], s[3], 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(s01, s23, 0x88), _mm512_shuffle_f32x4(s01, s23, 0xdd));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all));
}

/* p[key] = q . k for Q queries and the keys of four rows, from row `key` on: as many sums as hide the latency, and every row loaded
 * serves all of them. */
AVX512_INLINE void dot_quad(const struct kern_attn_args *args, const int Q, const bool half, int q, const void *k,
                            int key, float *p)
{
    const float *qv = args->q + q * args->q_stride;
    int64_t n = args->head_dim_k, i = 0, at = key * n;
    __m512 s[QUERIES][QUAD];

    AVX512_UNROLL
    for (int r = 0; r < Q * QUAD; r++)
        s[r / QUAD][r % QUAD] = _mm512_setzero_ps();
    for (; i + V <= n; i += V) {
        __m512 kv[QUAD];
        AVX512_UNROLL
        for (int r = 0; r < QUAD; r++)
            kv[r] = load_kv(half, k, at + r * n + i);
        AVX512_UNROLL
        for (int t = 0; t < Q; t++) {
            __m512 v = _mm512_loadu_ps(qv + t * args->q_stride + i);
            AVX512_UNROLL
            for (int r = 0; r < QUAD; r++)
                s[t][r] = _mm512_fmadd_ps(v, kv[r], s[t][r]);
        }
    }
    AVX512_UNROLL
    for (int t = 0; t < Q; t++) {
        if (i < n) {
            AVX512_UNROLL
            for (int r = 0; r < QUAD; r++)
                s[t][r] = _mm512_mask3_fmadd_ps(load_n(qv + t * args->q_stride + i, n - i),
                                                load_kv_n(half, k, at + r * n + i, n - i), s[t][r], mask_of(n - i));
        }
        _mm_storeu_ps(p + t * DEVICE_PAGE_TOK, tree_quad(s[t]));
    }
}

/* Queries of a group are taken four at a time, then those that are left: f(…, how many, …), which is compiled for each number. */
#define FOR_QUERIES(args, q, f, ...)               \
    for (int q = 0; q < (args)->n_q; q += QUERIES) \
        switch ((args)->n_q - q) {                 \
        case 1:                                    \
            f(args, 1, __VA_ARGS__);               \
            break;                                 \
        case 2:                                    \
            f(args, 2, __VA_ARGS__);               \
            break;                                 \
        case 3:                                    \
            f(args, 3, __VA_ARGS__);               \
            break;                                 \
        default:                                   \
            f(args, QUERIES, __VA_ARGS__);         \
        }

/* p[key] = q . k for keys [begin, end), whose rows are at k, for every query. */
AVX512_INLINE void scores(const struct kern_attn_args *args, const bool half, const void *k, int begin, int end,
                          float *p)
{
    int64_t n = args->head_dim_k;
    int key = begin;

    for (; key + QUAD <= end; key += QUAD)
        FOR_QUERIES(args, q, dot_quad, half, q, k, key - begin, p + q * DEVICE_PAGE_TOK + key)
    for (; key < end; key++)
        for (int q = 0; q < args->n_q; q++)
            p[q * DEVICE_PAGE_TOK + key] = dot_kv(half, args->q + q * args->q_stride, k, (key - begin) * n, n);
}

/* Rows [key, end) of a page: in place where they are floats, or halves that are taken as such; else converted into buf (TILE rows).
 * Those of the next page are fetched. */
static const void *page_rows(enum quant_type type, bool half, const void *page, const void *next, int key, int end,
                             int row_len, float *buf)
{
    uint64_t row_bytes = quant_row_bytes(type, row_len), off = (uint64_t)key * row_bytes;

    if (next)
        avx2_fetch_l2((const char *)next + off, (end - key) * (int)row_bytes);
    if (half || type == QUANT_F32)
        return (const char *)page + off;
    kv_read_avx512(type, (const char *)page + off, buf, (int64_t)(end - key) * row_len);
    return buf;
}

/* From scores to weights, with the running maximum and sum; returns by how much earlier outputs shrink. */
static float weigh(const struct kern_attn_args *args, float *p, float *m_run, float *l_run)
{
    for (int i = 0; i < DEVICE_PAGE_TOK; i += V) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_set1_ps(args->scale));
        s = args->softcap != 0.0f ? kern_v_softcap(s, _mm512_set1_ps(args->softcap)) : s;
        __mmask16 seen = (__mmask16)(mask_of(args->key_end - i < 0 ? 0 : args->key_end - i) &
                                     ~mask_of(args->key_begin - i < 0 ? 0 : args->key_begin - i));
        _mm512_storeu_ps(p + i, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, s));
    }
    float m = max_avx512(p, DEVICE_PAGE_TOK);
    m = m > *m_run ? m : *m_run;
    float shrink = _mm512_cvtss_f32(kern_v_exp(_mm512_set1_ps(*m_run - m)));
    *l_run = *l_run * shrink + exp_sum_avx512(p, m, DEVICE_PAGE_TOK);
    *m_run = m;
    return shrink;
}

/* o = fmaf(p[key], v_key, o), keys ascending, for Q queries and 64 elements of the head, or n of fewer, from place `at` on. */
AVX512_INLINE void add_rows_64(const struct kern_attn_args *args, const int Q, const bool half, int q, const float *p,
                               const void *v, int n_keys, int64_t at)
{
    float *o = args->o + q * args->o_stride + at;
    __m512 acc[QUERIES][4];

    AVX512_UNROLL
    for (int i = 0; i < Q * 4; i++)
        acc[i / 4][i % 4] = _mm512_loadu_ps(o + i / 4 * args->o_stride + i % 4 * V);
    for (int key = 0; key < n_keys; key++, at += args->v_row) {
        __m512 row[4];
        AVX512_UNROLL
        for (int i = 0; i < 4; i++)
            row[i] = load_kv(half, v, at + i * V);
        AVX512_UNROLL
        for (int t = 0; t < Q; t++) {
            __m512 f = _mm512_set1_ps(p[t * DEVICE_PAGE_TOK + key]);
            AVX512_UNROLL
            for (int i = 0; i < 4; i++)
                acc[t][i] = _mm512_fmadd_ps(f, row[i], acc[t][i]);
        }
    }
    AVX512_UNROLL
    for (int i = 0; i < Q * 4; i++)
        _mm512_storeu_ps(o + i / 4 * args->o_stride + i % 4 * V, acc[i / 4][i % 4]);
}

AVX512_INLINE void add_rows_n(const bool half, const float *p, const void *v, int n_keys, int64_t stride, float *o,
                              int64_t at, int64_t n)
{
    __m512 acc = load_n(o + at, n);

    for (int key = 0; key < n_keys; key++)
        acc = _mm512_fmadd_ps(_mm512_set1_ps(p[key]), load_kv_n(half, v, key * stride + at, n), acc);
    store_n(o + at, acc, n);
}

AVX512_INLINE void add_rows(const struct kern_attn_args *args, const bool half, const void *v, int begin, int end,
                            const float *p)
{
    int64_t n = args->head_dim_v, at = 0;

    for (; at + 64 <= n; at += 64)
        FOR_QUERIES(args, q, add_rows_64, half, q, p + q * DEVICE_PAGE_TOK + begin, v, end - begin, at)
    for (; at < n; at += V)
        for (int q = 0; q < args->n_q; q++)
            add_rows_n(half, p + q * DEVICE_PAGE_TOK + begin, v, end - begin, args->v_row, args->o + q * args->o_stride,
                       at, n - at);
}

AVX512_INLINE void attn_page(const struct kern_attn_args *args, const bool half)
{
    float *p = args->scratch;                      /* (n_q, DEVICE_PAGE_TOK): scores, then weights */
    float *rows = p + args->n_q * DEVICE_PAGE_TOK; /* (TILE, larger head_dim) */
    int step = args->kv_type == QUANT_F32 ? DEVICE_PAGE_TOK : TILE;

    memset(p, 0, (size_t)args->n_q * DEVICE_PAGE_TOK * sizeof *p);
    for (int key = args->key_begin, end; key < args->key_end; key = end) {
        end = key + TILE < args->key_end ? key + TILE : args->key_end;
        scores(args, half, page_rows(args->kv_type, half, args->k, args->next_k, key, end, args->head_dim_k, rows), key,
               end, p);
    }
    for (int q = 0; q < args->n_q; q++) {
        float shrink = weigh(args, p + q * DEVICE_PAGE_TOK, &args->m[q], &args->l[q]);
        scale_avx512(args->o + q * args->o_stride, shrink, args->o + q * args->o_stride, args->head_dim_v);
    }
    for (int key = args->key_begin, end; key < args->key_end; key = end) {
        end = key + step < args->key_end ? key + step : args->key_end;
        add_rows(args, half, page_rows(args->kv_type, half, args->v, args->next_v, key, end, args->v_row, rows), key,
                 end, p);
    }
}

/* Halves that all queries pass by at once become floats where they are multiplied; else once, before. */
static void attn_page_avx512(const struct kern_attn_args *args)
{
    if (args->kv_type == QUANT_F16 && args->n_q <= QUERIES)
        attn_page(args, true);
    else
        attn_page(args, false);
}

static void attn_merge_avx512(const float *o, float m, float l, float *o_sum, float *m_sum, float *l_sum,
                              int64_t head_dim)
{
    float m_both = m > *m_sum ? m : *m_sum;
    __m512 f = kern_v_exp(_mm512_set1_ps(m - m_both)), f_sum = kern_v_exp(_mm512_set1_ps(*m_sum - m_both));

    *m_sum = m_both;
    *l_sum = fmaf(l, _mm512_cvtss_f32(f), *l_sum * _mm512_cvtss_f32(f_sum));
    for (int64_t i = 0; i < head_dim; i += V) {
        __m512 scaled = _mm512_mul_ps(load_n(o_sum + i, head_dim - i), f_sum);
        store_n(o_sum + i, _mm512_fmadd_ps(load_n(o + i, head_dim - i), f, scaled), head_dim - i);
    }
}

#include "cpu/kern_record.h"

/* Activations are quantized by the AVX2 function: parts of 32 elements are two vectors here, and their sums cost the rest. */
#define TABLE(name, matmuls)                                                                                   \
    {                                                                                                          \
        .isa = name, .mat = matmuls, .act_row = kern_avx2_act_row, .dot = dot_avx512, .sum_sq = sum_sq_avx512, \
        .rms_norm = rms_norm_avx512, .add = add_avx512, .scale = scale_avx512, .glu = glu_avx512,              \
        .softcap = softcap_avx512, .axpy = axpy_avx512, .rope = rope_avx512, .softmax = softmax_avx512,        \
        .kv_write = kv_write_avx512, .kv_read = kv_read_avx512, .attn_page = attn_page_avx512,                 \
        .attn_merge = attn_merge_avx512, .gate = gate_v, .conv = conv_v, .delta = delta_v,                     \
    }

const struct kern_table kern_avx512 = TABLE("avx512", kern_avx512_mat_table);
const struct kern_table kern_avx512vnni = TABLE("avx512vnni", kern_avx512vnni_mat_table);
