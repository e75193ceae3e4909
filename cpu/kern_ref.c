/* The plain C truth of the kernel table: what every other table must repeat bit for bit (kern.h, numeric contract). */
#include "cpu/kern.h"

#include "cpu/kern_mat.h"
#include "cpu/kern_math.h"
#include "cpu/kern_record.h"

#include <assert.h>
#include <math.h>
#include <string.h>

enum { N_LANE = 16 };

/* Lanes l and l+8, then l and l+4, l+2, l+1. */
static float tree(float *lane)
{
    for (int step = N_LANE / 2; step; step /= 2)
        for (int l = 0; l < step; l++)
            lane[l] += lane[l + step];
    return lane[0];
}

static float dot_ref(const float *a, const float *b, int64_t n)
{
    float lane[N_LANE] = {0};

    for (int64_t i = 0; i < n; i++)
        lane[i % N_LANE] = fmaf(a[i], b[i], lane[i % N_LANE]);
    return tree(lane);
}

static float sum_sq_ref(const float *a, int64_t n)
{
    return dot_ref(a, a, n);
}

static void rms_norm_ref(const float *x, const float *w, float eps, float *out, int64_t n)
{
    float f = 1.0f / sqrtf(sum_sq_ref(x, n) / (float)n + eps);

    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * f * w[i];
}

static void add_ref(const float *a, const float *b, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = a[i] + b[i];
}

static void scale_ref(const float *a, float f, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = a[i] * f;
}

static void glu_ref(enum op_act act, const float *g, const float *u, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = kern_v_glu(act, g[i], u[i]);
}

static void softcap_ref(const float *a, float cap, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = kern_v_softcap(a[i], cap);
}

static void axpy_ref(float f, const float *x, float *acc, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        acc[i] = fmaf(f, x[i], acc[i]);
}

static void rope_ref(const struct op_rope *p, float *x, const float *cos_sin)
{
    int half = p->n_rot / 2;
    int step = p->neox ? 1 : 2, apart = p->neox ? half : 1;

    for (int head = 0; head < p->n_head; head++, x += p->head_dim) {
        for (int i = 0; i < half; i++) {
            float c = cos_sin[i], s = cos_sin[half + i];
            float a = x[i * step], b = x[i * step + apart];
            x[i * step] = a * c - b * s;
            x[i * step + apart] = a * s + b * c;
        }
    }
}

/* The largest that is not NaN. */
static float max_ref(const float *x, int64_t n)
{
    float m = -INFINITY;

    for (int64_t i = 0; i < n; i++)
        m = kern_v_max(x[i], m);
    return m;
}

/* x = exp(x - m); returns the sum. */
static float exp_sum_ref(float *x, float m, int64_t n)
{
    float lane[N_LANE] = {0};

    for (int64_t i = 0; i < n; i++) {
        x[i] = kern_v_exp(x[i] - m);
        lane[i % N_LANE] += x[i];
    }
    return tree(lane);
}

static void softmax_ref(float *x, int64_t n)
{
    float sum = exp_sum_ref(x, max_ref(x, n), n);

    for (int64_t i = 0; i < n; i++)
        x[i] /= sum;
}

/* Blocks of 32: d = amax / 127 as half, q = round-half-even(x / d). A NaN becomes -127. */
static void q8_0_write(const float *x, uint8_t *out, int64_t n)
{
    for (; n > 0; n -= 32, x += 32, out += 34) {
        float amax = 0.0f;
        for (int i = 0; i < 32; i++)
            amax = kern_v_max(fabsf(x[i]), amax);
        uint16_t d = quant_f32_to_f16(amax / 127.0f);
        float f = amax > 0.0f ? 127.0f / amax : 0.0f;
        memcpy(out, &d, sizeof d);
        for (int i = 0; i < 32; i++) {
            float v = kern_v_min(kern_v_max(x[i] * f, -127.0f), 127.0f);
            out[2 + i] = (uint8_t)(int8_t)rintf(v);
        }
    }
}

static void kv_write_ref(enum quant_type type, const float *x, void *out, int64_t n)
{
    assert(type == QUANT_F16 || type == QUANT_Q8_0);
    if (type == QUANT_Q8_0) {
        q8_0_write(x, out, n);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        ((uint16_t *)out)[i] = quant_f32_to_f16(x[i]);
}

static void kv_read_ref(enum quant_type type, const void *in, float *x, int64_t n)
{
    assert(type == QUANT_F16 || type == QUANT_Q8_0);
    if (type == QUANT_F16) {
        for (int64_t i = 0; i < n; i++)
            x[i] = quant_f16_to_f32(((const uint16_t *)in)[i]);
        return;
    }
    const uint8_t *block = in;
    for (; n > 0; n -= 32, x += 32, block += 34) {
        uint16_t d;
        memcpy(&d, block, sizeof d);
        for (int i = 0; i < 32; i++)
            x[i] = quant_f16_to_f32(d) * (float)(int8_t)block[2 + i];
    }
}

/* Row `key` of a page as floats: in place, or converted into buf. */
static const float *page_row(enum quant_type type, const void *page, int key, int row_len, float *buf)
{
    if (type == QUANT_F32)
        return (const float *)page + (int64_t)key * row_len;
    kv_read_ref(type, (const char *)page + (uint64_t)key * quant_row_bytes(type, row_len), buf, row_len);
    return buf;
}

static void attn_page_ref(const struct kern_attn_args *args)
{
    float *p = args->scratch;                         /* (n_q, DEVICE_PAGE_TOK): scores, then weights */
    float *row_buf = p + args->n_q * DEVICE_PAGE_TOK; /* (larger head_dim) */

    for (int i = 0; i < args->n_q * DEVICE_PAGE_TOK; i++)
        p[i] = -INFINITY;
    for (int key = args->key_begin; key < args->key_end; key++) {
        const float *k = page_row(args->kv_type, args->k, key, args->head_dim_k, row_buf);
        for (int q = 0; q < args->n_q; q++) {
            float s = dot_ref(args->q + q * args->q_stride, k, args->head_dim_k) * args->scale;
            p[q * DEVICE_PAGE_TOK + key] = args->softcap != 0.0f ? kern_v_softcap(s, args->softcap) : s;
        }
    }
    for (int q = 0; q < args->n_q; q++) {
        float *pq = p + q * DEVICE_PAGE_TOK;
        float m = kern_v_max(max_ref(pq, DEVICE_PAGE_TOK), args->m[q]);
        float old = kern_v_exp(args->m[q] - m);
        args->l[q] = args->l[q] * old + exp_sum_ref(pq, m, DEVICE_PAGE_TOK);
        args->m[q] = m;
        scale_ref(args->o + q * args->o_stride, old, args->o + q * args->o_stride, args->head_dim_v);
    }
    for (int key = args->key_begin; key < args->key_end; key++) {
        const float *v = page_row(args->kv_type, args->v, key, args->v_row, row_buf);
        for (int q = 0; q < args->n_q; q++)
            axpy_ref(p[q * DEVICE_PAGE_TOK + key], v, args->o + q * args->o_stride, args->head_dim_v);
    }
}

static void attn_merge_ref(const float *o, float m, float l, float *o_sum, float *m_sum, float *l_sum, int64_t head_dim)
{
    float m_both = kern_v_max(m, *m_sum);
    float f = kern_v_exp(m - m_both), f_sum = kern_v_exp(*m_sum - m_both);

    *m_sum = m_both;
    *l_sum = fmaf(l, f, *l_sum * f_sum);
    for (int64_t i = 0; i < head_dim; i++)
        o_sum[i] = fmaf(o[i], f, o_sum[i] * f_sum);
}

const struct kern_table kern_ref = {
    .isa = "ref",
    .mat = kern_ref_mat_table,
    .act_row = kern_ref_act_row,
    .dot = dot_ref,
    .sum_sq = sum_sq_ref,
    .rms_norm = rms_norm_ref,
    .add = add_ref,
    .scale = scale_ref,
    .glu = glu_ref,
    .softcap = softcap_ref,
    .axpy = axpy_ref,
    .gate = gate_v,
    .conv = conv_v,
    .delta = delta_v,
    .rope = rope_ref,
    .softmax = softmax_ref,
    .kv_write = kv_write_ref,
    .kv_read = kv_read_ref,
    .attn_page = attn_page_ref,
    .attn_merge = attn_merge_ref,
};
