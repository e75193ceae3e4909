/* The plain C truth of the matmul kernels and of activation quantization (kern.h says what they must give). */
#include "cpu/kern_mat.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/kern_act.h"
#include "src/base/size.h"

uint64_t kern_act_bytes(enum quant_act act, int64_t n)
{
    uint64_t n_elem = (uint64_t)n;
    switch (act) {
    case QUANT_ACT_Q8X32: return size_up(3 * n_elem + n_elem / 32 * 8, 64);
    case QUANT_ACT_Q8X256: return size_up(3 * n_elem + n_elem / 256 * 4 + n_elem / 16 * 2 + n_elem / 32 * 2, 64);
    case QUANT_ACT_F32:
    case QUANT_ACT_NONE: break;
    }
    return size_up(4 * n_elem, 64);
}

/* Codes of n elements under one scale, which is returned. */
static float quantize(const float *x, int n, int8_t *q, int16_t *q16)
{
    uint32_t amax_bits = 0; /* compared as integers, so that a NaN is the largest */
    for (int k = 0; k < n; k++) {
        uint32_t bits;
        memcpy(&bits, &x[k], sizeof bits);
        bits &= 0x7fffffff;
        amax_bits = bits > amax_bits ? bits : amax_bits;
    }
    float amax;
    memcpy(&amax, &amax_bits, sizeof amax);
    float inv = 127.0f / amax; /* infinite where amax is 0 or too small */
    bool is_finite = amax <= FLT_MAX, is_zero = is_finite && !(inv <= FLT_MAX);
    for (int k = 0; k < n; k++) {
        q[k] = is_finite && !is_zero ? (int8_t)lrintf(x[k] * inv) : 0;
        q16[kern_act_q16_place(k)] = q[k];
    }
    return is_zero ? 0.0f : amax / 127.0f;
}

static int sum_of(const int8_t *q, int n)
{
    int sum = 0;
    for (int k = 0; k < n; k++)
        sum += q[k];
    return sum;
}

void kern_ref_act_row(enum quant_act act, const float *x, void *out, int64_t n)
{
    if (act == QUANT_ACT_Q8X32) {
        struct kern_act_x32 a = kern_act_x32(out, n);
        for (int64_t b = 0; b < n / 32; b++) {
            a.d[b] = quantize(x + b * 32, 32, a.q + b * 32, a.q16 + b * 32);
            a.sum[b] = sum_of(a.q + b * 32, 32);
        }
    } else if (act == QUANT_ACT_Q8X256) {
        struct kern_act_x256 a = kern_act_x256(out, n);
        for (int64_t b = 0; b < n / 256; b++)
            a.d[b] = quantize(x + b * 256, 256, a.q + b * 256, a.q16 + b * 256);
        for (int64_t j = 0; j < n / 16; j++)
            a.sum16[j] = (int16_t)sum_of(a.q + j * 16, 16);
        for (int64_t j = 0; j < n / 32; j++)
            a.sum32[j] = (int16_t)sum_of(a.q + j * 32, 32);
    } else {
        memcpy(out, x, (size_t)n * sizeof *x);
    }
}

/* acc plus one part of a weight row times the codes x under the scale dx. */
static float add_part(const struct kern_mat_block *w, int len, bool has_min, const int8_t *x, float dx, float acc)
{
    int32_t isum = 0, msum = 0;
    for (int j = 0; j < len / 16; j++) {
        int32_t dot = 0;
        for (int k = j * 16; k < j * 16 + 16; k++)
            dot += w->q[k] * x[k];
        isum += w->scale[j] * dot;
        msum += w->min[j] * sum_of(x + j * 16, 16);
    }
    acc = fmaf(w->d * dx, (float)isum, acc);
    return has_min ? fmaf(w->m * dx, (float)msum, acc) : acc;
}

static void mat_int(const struct kern_mat_args *a, const struct kern_mat_layout *t, bool is_x256)
{
    int act_len = is_x256 ? 256 : 32;
    struct kern_mat_block w = {0};
    for (int r = 0; r < a->n_rows; r++) {
        for (int tok = 0; tok < a->n_tok; tok++)
            a->dst[tok * a->dst_stride + r] = 0.0f;
        for (int64_t part = 0; part < a->n_cols / t->part_len; part++) {
            const char *block = (const char *)a->w + (uint64_t)r * a->w_stride;
            t->unpack(block + part / t->n_part * t->block_bytes, (int)(part % t->n_part), &w);
            int64_t col = part * t->part_len;
            for (int tok = 0; tok < a->n_tok; tok++) {
                const int8_t *x = (const int8_t *)a->x + (uint64_t)tok * a->x_stride; /* q is first in both forms */
                const float *dx = (const float *)(x + a->n_cols) + col / act_len;
                float *dst = a->dst + tok * a->dst_stride + r;
                *dst = add_part(&w, t->part_len, t->has_min, x + col, *dx, *dst);
            }
        }
    }
}

/* One weight as a float. */
typedef float load_fn(const char *row, int64_t k);

static float load_f32(const char *row, int64_t k)
{
    float x;
    memcpy(&x, row + k * 4, sizeof x);
    return x;
}

static float load_f16(const char *row, int64_t k)
{
    uint16_t h;
    memcpy(&h, row + k * 2, sizeof h);
    return quant_f16_to_f32(h);
}

static float load_bf16(const char *row, int64_t k)
{
    uint16_t h;
    memcpy(&h, row + k * 2, sizeof h);
    return quant_bf16_to_f32(h);
}

static float dot_lanes(load_fn *load, const char *row, const float *x, int64_t n)
{
    float lane[16] = {0};
    for (int64_t k = 0; k < n; k++)
        lane[k % 16] = fmaf(load(row, k), x[k], lane[k % 16]);
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

static void mat_float(const struct kern_mat_args *a, load_fn *load)
{
    for (int tok = 0; tok < a->n_tok; tok++) {
        const float *x = (const float *)((const char *)a->x + (uint64_t)tok * a->x_stride);
        for (int r = 0; r < a->n_rows; r++) {
            const char *row = (const char *)a->w + (uint64_t)r * a->w_stride;
            a->dst[tok * a->dst_stride + r] = dot_lanes(load, row, x, a->n_cols);
        }
    }
}

static void mat_f32(const struct kern_mat_args *a)
{
    mat_float(a, load_f32);
}

static void mat_f16(const struct kern_mat_args *a)
{
    mat_float(a, load_f16);
}

static void mat_bf16(const struct kern_mat_args *a)
{
    mat_float(a, load_bf16);
}

#define X32_TYPES(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(IQ4_NL) X(MXFP4) X(NVFP4)
#define X256_TYPES(X)                                                                                                  \
    X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M)        \
    X(IQ4_XS) X(TQ1_0) X(TQ2_0)

#define X32_FN(NAME)                                                                                                   \
    static void mat_##NAME(const struct kern_mat_args *a)                                                              \
    {                                                                                                                  \
        mat_int(a, kern_ref_mat_layout(QUANT_##NAME), false);                                                          \
    }
#define X256_FN(NAME)                                                                                                  \
    static void mat_##NAME(const struct kern_mat_args *a)                                                              \
    {                                                                                                                  \
        mat_int(a, kern_ref_mat_layout(QUANT_##NAME), true);                                                           \
    }
X32_TYPES(X32_FN)
X256_TYPES(X256_FN)

#define ENTRY(NAME) [QUANT_##NAME] = mat_##NAME,

kern_mat *const kern_ref_mat_table[QUANT_ID_END] = {
    [QUANT_F32] = mat_f32,
    [QUANT_F16] = mat_f16,
    [QUANT_BF16] = mat_bf16,
    X32_TYPES(ENTRY)
    X256_TYPES(ENTRY)
};
