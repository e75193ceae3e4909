/* The float kernels for AVX2, FMA and F16C: the same bits as kern_ref.c. 16 lanes are two vectors; the elements past a
 * whole vector are loaded and stored under a mask. */
#include "cpu/kern.h"

#define KERN_MATH_AVX2
#include "cpu/kern_math.h"

#include "cpu/kern_avx2_mat.h"

#include <assert.h>
#include <math.h>
#include <string.h>

enum { V = 8 };

/* All ones in the first n of 8 lanes, n clamped to 0..8. */
static inline __m256i mask_of(int64_t n)
{
    static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    n = n < 0 ? 0 : n > V ? V : n;
    return _mm256_loadu_si256((const __m256i *)(ones + V - n));
}

static inline __m256 load_n(const float *x, int64_t n)
{
    return n >= V ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, mask_of(n));
}

static inline void store_n(float *x, __m256 v, int64_t n)
{
    if (n >= V)
        _mm256_storeu_ps(x, v);
    else
        _mm256_maskstore_ps(x, mask_of(n), v);
}

/* Lanes l and l+8, then l and l+4, l+2, l+1. */
static inline float tree(__m256 a, __m256 b)
{
    __m256 s8 = _mm256_add_ps(a, b);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* acc = fmaf(a, b, acc) in the first n of 8 lanes only: adding a product of zeros would turn -0 into 0. */
static inline __m256 fma_n(const float *a, const float *b, __m256 acc, int64_t n)
{
    __m256i mask = mask_of(n);
    __m256 sum = _mm256_fmadd_ps(_mm256_maskload_ps(a, mask), _mm256_maskload_ps(b, mask), acc);
    return _mm256_blendv_ps(acc, sum, _mm256_castsi256_ps(mask));
}

static float dot_avx2(const float *a, const float *b, int64_t n)
{
    __m256 lo = _mm256_setzero_ps(), hi = _mm256_setzero_ps();
    int64_t i = 0;

    for (; i + 2 * V <= n; i += 2 * V) {
        lo = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), lo);
        hi = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + V), _mm256_loadu_ps(b + i + V), hi);
    }
    if (i < n) {
        lo = fma_n(a + i, b + i, lo, n - i);
        if (n - i > V)
            hi = fma_n(a + i + V, b + i + V, hi, n - i - V);
    }
    return tree(lo, hi);
}

static float sum_sq_avx2(const float *a, int64_t n)
{
    return dot_avx2(a, a, n);
}

static void rms_norm_avx2(const float *x, const float *w, float eps, float *out, int64_t n)
{
    __m256 f = _mm256_set1_ps(1.0f / sqrtf(sum_sq_avx2(x, n) / (float)n + eps));

    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, _mm256_mul_ps(_mm256_mul_ps(load_n(x + i, n - i), f), load_n(w + i, n - i)), n - i);
}

static void add_avx2(const float *a, const float *b, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, _mm256_add_ps(load_n(a + i, n - i), load_n(b + i, n - i)), n - i);
}

static void scale_avx2(const float *a, float f, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, _mm256_mul_ps(load_n(a + i, n - i), _mm256_set1_ps(f)), n - i);
}

static void glu_avx2(enum op_act act, const float *g, const float *u, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, kern_v_glu(act, load_n(g + i, n - i), load_n(u + i, n - i)), n - i);
}

static void softcap_avx2(const float *a, float cap, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, kern_v_softcap(load_n(a + i, n - i), _mm256_set1_ps(cap)), n - i);
}

static void axpy_avx2(float f, const float *x, float *acc, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(acc + i, _mm256_fmadd_ps(_mm256_set1_ps(f), load_n(x + i, n - i), load_n(acc + i, n - i)), n - i);
}

/* The pairs of one head from pair i on, one by one. */
static void rope_rest(float *x, const float *cos_sin, int i, int half, bool neox)
{
    int step = neox ? 1 : 2, apart = neox ? half : 1;

    for (; i < half; i++) {
        float c = cos_sin[i], s = cos_sin[half + i];
        float a = x[i * step], b = x[i * step + apart];
        x[i * step] = a * c - b * s;
        x[i * step + apart] = a * s + b * c;
    }
}

static int rope_neox(float *x, const float *cos_sin, int half)
{
    int i = 0;

    for (; i + V <= half; i += V) {
        __m256 c = _mm256_loadu_ps(cos_sin + i), s = _mm256_loadu_ps(cos_sin + half + i);
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + half + i);
        _mm256_storeu_ps(x + i, _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s)));
        _mm256_storeu_ps(x + half + i, _mm256_add_ps(_mm256_mul_ps(a, s), _mm256_mul_ps(b, c)));
    }
    return i;
}

/* Four pairs (a, b) side by side: (a, b) c -+ (b, a) s. */
static int rope_pairs(float *x, const float *cos_sin, int half)
{
    const __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    int i = 0;

    for (; i + 4 <= half; i += 4) {
        __m256 c = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos_sin + i)), twice);
        __m256 s = _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(cos_sin + half + i)), twice);
        __m256 ab = _mm256_loadu_ps(x + 2 * i), ba = _mm256_permute_ps(ab, 0xb1);
        _mm256_storeu_ps(x + 2 * i, _mm256_addsub_ps(_mm256_mul_ps(ab, c), _mm256_mul_ps(ba, s)));
    }
    return i;
}

static void rope_avx2(const struct op_rope *p, float *x, const float *cos_sin)
{
    int half = p->n_rot / 2;

    for (int head = 0; head < p->n_head; head++, x += p->head_dim) {
        int i = p->neox ? rope_neox(x, cos_sin, half) : rope_pairs(x, cos_sin, half);
        rope_rest(x, cos_sin, i, half, p->neox);
    }
}

/* The largest that is not NaN. */
static float max_avx2(const float *x, int64_t n)
{
    __m256 m = _mm256_set1_ps(-INFINITY);

    for (int64_t i = 0; i < n; i += V) {
        __m256 rest = _mm256_castsi256_ps(mask_of(n - i));
        m = _mm256_blendv_ps(m, kern_v_max(load_n(x + i, n - i), m), rest);
    }
    __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
    return _mm_cvtss_f32(_mm_max_ss(m4, _mm_movehdup_ps(m4)));
}

/* x = exp(x - m); returns the sum. */
static float exp_sum_avx2(float *x, float m, int64_t n)
{
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};

    for (int64_t i = 0; i < n; i += V) {
        __m256 e = kern_v_exp(_mm256_sub_ps(load_n(x + i, n - i), _mm256_set1_ps(m)));
        e = _mm256_and_ps(e, _mm256_castsi256_ps(mask_of(n - i))); /* exp is never -0, so adding 0 changes nothing */
        store_n(x + i, e, n - i);
        sum[i / V % 2] = _mm256_add_ps(sum[i / V % 2], e);
    }
    return tree(sum[0], sum[1]);
}

static void softmax_avx2(float *x, int64_t n)
{
    __m256 sum = _mm256_set1_ps(exp_sum_avx2(x, max_avx2(x, n), n));

    for (int64_t i = 0; i < n; i += V)
        store_n(x + i, _mm256_div_ps(load_n(x + i, n - i), sum), n - i);
}

/* ---- KV rows ---- */

static void q8_0_write(const float *x, uint8_t *out, int64_t n)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes the lanes of the two packs */

    for (; n > 0; n -= 32, x += 32, out += 34) {
        __m256 v[4], m = _mm256_setzero_ps();
        AVX2_UNROLL
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + i * V);
            m = kern_v_max(kern_v_abs(v[i]), m);
        }
        __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
        m4 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
        float amax = _mm_cvtss_f32(_mm_max_ss(m4, _mm_movehdup_ps(m4)));
        uint16_t d = quant_f32_to_f16(amax / 127.0f);
        __m256 f = _mm256_set1_ps(amax > 0.0f ? 127.0f / amax : 0.0f);
        __m256i q[4];
        AVX2_UNROLL
        for (int i = 0; i < 4; i++)
            q[i] = _mm256_cvtps_epi32(
                kern_v_min(kern_v_max(_mm256_mul_ps(v[i], f), _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f)));
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        memcpy(out, &d, sizeof d);
        _mm256_storeu_si256((__m256i *)(out + 2), _mm256_permutevar8x32_epi32(bytes, order));
    }
}

static void kv_write_avx2(enum quant_type type, const float *x, void *out, int64_t n)
{
    uint16_t *h = out;
    int64_t i = 0;

    assert(type == QUANT_F16 || type == QUANT_Q8_0);
    if (type == QUANT_Q8_0) {
        q8_0_write(x, out, n);
        return;
    }
    for (; i + V <= n; i += V)
        _mm_storeu_si128((__m128i *)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; i++)
        h[i] = quant_f32_to_f16(x[i]);
}

static void kv_read_avx2(enum quant_type type, const void *in, float *x, int64_t n)
{
    const uint16_t *h = in;
    const uint8_t *block = in;
    int64_t i = 0;

    assert(type == QUANT_F16 || type == QUANT_Q8_0);
    if (type == QUANT_F16) {
        for (; i + V <= n; i += V)
            _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
        for (; i < n; i++)
            x[i] = quant_f16_to_f32(h[i]);
        return;
    }
    for (; i < n; i += 32, block += 34) {
        uint16_t d;
        memcpy(&d, block, sizeof d);
        __m256 f = _mm256_set1_ps(_cvtsh_ss(d));
        for (int k = 0; k < 32; k += V) {
            __m256i q = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(block + 2 + k)));
            _mm256_storeu_ps(x + i + k, _mm256_mul_ps(f, _mm256_cvtepi32_ps(q)));
        }
    }
}

/* ---- attention ---- */

/* Keys taken together: their rows, as floats, stay in the L1 cache while all queries pass by. */
enum { TILE = 8, QUAD = 4 };

/* q . k for four rows of n floats, n_stride apart. */
AVX2_INLINE __m128 dot_quad(const float *q, const float *k, int64_t n)
{
    __m256 lo[QUAD], hi[QUAD], s[QUAD];
    int64_t i = 0;

    AVX2_UNROLL
    for (int r = 0; r < QUAD; r++)
        lo[r] = hi[r] = _mm256_setzero_ps();
    for (; i + 2 * V <= n; i += 2 * V) {
        __m256 q_lo = _mm256_loadu_ps(q + i), q_hi = _mm256_loadu_ps(q + i + V);
        AVX2_UNROLL
        for (int r = 0; r < QUAD; r++) {
            lo[r] = _mm256_fmadd_ps(q_lo, _mm256_loadu_ps(k + r * n + i), lo[r]);
            hi[r] = _mm256_fmadd_ps(q_hi, _mm256_loadu_ps(k + r * n + i + V), hi[r]);
        }
    }
    if (i < n) {
        AVX2_UNROLL
        for (int r = 0; r < QUAD; r++) {
            lo[r] = fma_n(q + i, k + r * n + i, lo[r], n - i);
            if (n - i > V)
                hi[r] = fma_n(q + i + V, k + r * n + i + V, hi[r], n - i - V);
        }
    }
    AVX2_UNROLL
    for (int r = 0; r < QUAD; r++)
        s[r] = _mm256_add_ps(lo[r], hi[r]);
    /* The tree of all four at once: lanes l and l+4 of rows (0 | 1) and (2 | 3), then l+2, then l+1. */
    __m256 s01 = _mm256_add_ps(_mm256_permute2f128_ps(s[0], s[1], 0x20), _mm256_permute2f128_ps(s[0], s[1], 0x31));
    __m256 s23 = _mm256_add_ps(_mm256_permute2f128_ps(s[2], s[3], 0x20), _mm256_permute2f128_ps(s[2], s[3], 0x31));
    __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(s01, s23, 0x44), _mm256_shuffle_ps(s01, s23, 0xee));
    __m256 sums = _mm256_add_ps(_mm256_permute_ps(pairs, 0x88), _mm256_permute_ps(pairs, 0xdd)); /* 0 2 . . | 1 3 . . */
    return _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* p[key] = q . k for keys [begin, end) of rows at k, for every query. */
static void scores(const struct kern_attn_args *args, const float *k, int begin, int end, float *p)
{
    for (int q = 0; q < args->n_q; q++) {
        const float *qv = args->q + q * args->q_stride, *row = k;
        float *pq = p + q * DEVICE_PAGE_TOK;
        int key = begin;
        for (; key + QUAD <= end; key += QUAD, row += QUAD * args->head_dim_k)
            _mm_storeu_ps(pq + key, dot_quad(qv, row, args->head_dim_k));
        for (; key < end; key++, row += args->head_dim_k)
            pq[key] = dot_avx2(qv, row, args->head_dim_k);
    }
}

/* Rows [key, end) of a page as floats: in place, or converted into buf (TILE rows). Those of the next page are fetched. */
static const float *page_rows(enum quant_type type, const void *page, const void *next, int key, int end, int row_len,
                              float *buf)
{
    if (type == QUANT_F32)
        return (const float *)page + (int64_t)key * row_len;
    uint64_t row_bytes = quant_row_bytes(type, row_len), off = (uint64_t)key * row_bytes;
    if (next)
        avx2_fetch_l2((const char *)next + off, (end - key) * (int)row_bytes);
    kv_read_avx2(type, (const char *)page + off, buf, (int64_t)(end - key) * row_len);
    return buf;
}

/* From scores to weights, with the running maximum and sum; returns by how much earlier outputs shrink. */
static float weigh(const struct kern_attn_args *args, float *p, float *m_run, float *l_run)
{
    for (int i = 0; i < DEVICE_PAGE_TOK; i += V) {
        __m256 s = _mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(args->scale));
        _mm256_storeu_ps(p + i, args->softcap != 0.0f ? kern_v_softcap(s, _mm256_set1_ps(args->softcap)) : s);
    }
    for (int i = 0; i < args->key_begin; i++)
        p[i] = -INFINITY;
    for (int i = args->key_end; i < DEVICE_PAGE_TOK; i++)
        p[i] = -INFINITY;
    float m = max_avx2(p, DEVICE_PAGE_TOK);
    m = m > *m_run ? m : *m_run;
    float shrink = _mm256_cvtss_f32(kern_v_exp(_mm256_set1_ps(*m_run - m)));
    *l_run = *l_run * shrink + exp_sum_avx2(p, m, DEVICE_PAGE_TOK);
    *m_run = m;
    return shrink;
}

/* o = fmaf(p[key], v_key, o), keys ascending, for N vectors of the head, at most 8, or n elements of fewer. */
AVX2_INLINE void add_rows_v(const int N, const float *p, const float *v, int n_keys, int64_t stride, float *o)
{
    __m256 acc[8];

    AVX2_UNROLL
    for (int i = 0; i < N; i++)
        acc[i] = _mm256_loadu_ps(o + i * V);
    for (int key = 0; key < n_keys; key++, v += stride) {
        __m256 f = _mm256_broadcast_ss(p + key);
        AVX2_UNROLL
        for (int i = 0; i < N; i++)
            acc[i] = _mm256_fmadd_ps(f, _mm256_loadu_ps(v + i * V), acc[i]);
    }
    AVX2_UNROLL
    for (int i = 0; i < N; i++)
        _mm256_storeu_ps(o + i * V, acc[i]);
}

static inline void add_rows_n(const float *p, const float *v, int n_keys, int64_t stride, float *o, int64_t n)
{
    __m256 acc = load_n(o, n);

    for (int key = 0; key < n_keys; key++, v += stride)
        acc = _mm256_fmadd_ps(_mm256_broadcast_ss(p + key), load_n(v, n), acc);
    store_n(o, acc, n);
}

static void add_rows(const struct kern_attn_args *args, const float *v, int begin, int end, const float *p)
{
    int64_t n = args->head_dim_v;

    for (int q = 0; q < args->n_q; q++) {
        const float *pq = p + q * DEVICE_PAGE_TOK + begin;
        float *o = args->o + q * args->o_stride;
        int64_t i = 0;
        for (; i + 8 * V <= n; i += 8 * V)
            add_rows_v(8, pq, v + i, end - begin, args->v_row, o + i);
        for (; i + 4 * V <= n; i += 4 * V)
            add_rows_v(4, pq, v + i, end - begin, args->v_row, o + i);
        for (; i < n; i += V)
            add_rows_n(pq, v + i, end - begin, args->v_row, o + i, n - i);
    }
}

static void attn_page_avx2(const struct kern_attn_args *args)
{
    float *p = args->scratch;                      /* (n_q, DEVICE_PAGE_TOK): scores, then weights */
    float *rows = p + args->n_q * DEVICE_PAGE_TOK; /* (TILE, larger head_dim) */
    int step = args->kv_type == QUANT_F32 ? DEVICE_PAGE_TOK : TILE;

    memset(p, 0, (size_t)args->n_q * DEVICE_PAGE_TOK * sizeof *p);
    for (int key = args->key_begin, end; key < args->key_end; key = end) {
        end = key + TILE < args->key_end ? key + TILE : args->key_end;
        scores(args, page_rows(args->kv_type, args->k, args->next_k, key, end, args->head_dim_k, rows), key, end, p);
    }
    for (int q = 0; q < args->n_q; q++) {
        float shrink = weigh(args, p + q * DEVICE_PAGE_TOK, &args->m[q], &args->l[q]);
        scale_avx2(args->o + q * args->o_stride, shrink, args->o + q * args->o_stride, args->head_dim_v);
    }
    for (int key = args->key_begin, end; key < args->key_end; key = end) {
        end = key + step < args->key_end ? key + step : args->key_end;
        add_rows(args, page_rows(args->kv_type, args->v, args->next_v, key, end, args->v_row, rows), key, end, p);
    }
}

static void attn_merge_avx2(const float *o, float m, float l, float *o_sum, float *m_sum, float *l_sum,
                            int64_t head_dim)
{
    float m_both = m > *m_sum ? m : *m_sum;
    __m256 f = kern_v_exp(_mm256_set1_ps(m - m_both)), f_sum = kern_v_exp(_mm256_set1_ps(*m_sum - m_both));

    *m_sum = m_both;
    *l_sum = fmaf(l, _mm256_cvtss_f32(f), *l_sum * _mm256_cvtss_f32(f_sum));
    for (int64_t i = 0; i < head_dim; i += V) {
        __m256 scaled = _mm256_mul_ps(load_n(o_sum + i, head_dim - i), f_sum);
        store_n(o_sum + i, _mm256_fmadd_ps(load_n(o + i, head_dim - i), f, scaled), head_dim - i);
    }
}

#include "cpu/kern_record.h"

const struct kern_table kern_avx2 = {
    .isa = "avx2",
    .mat = kern_avx2_mat_table,
    .act_row = kern_avx2_act_row,
    .dot = dot_avx2,
    .sum_sq = sum_sq_avx2,
    .rms_norm = rms_norm_avx2,
    .add = add_avx2,
    .scale = scale_avx2,
    .glu = glu_avx2,
    .softcap = softcap_avx2,
    .axpy = axpy_avx2,
    .gate = gate_v,
    .conv = conv_v,
    .delta = delta_v,
    .rope = rope_avx2,
    .softmax = softmax_avx2,
    .kv_write = kv_write_avx2,
    .kv_read = kv_read_avx2,
    .attn_page = attn_page_avx2,
    .attn_merge = attn_merge_avx2,
};
