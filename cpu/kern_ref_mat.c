/* The plain C truth of the matmul kernels (kern.h says what they must give). */
#include "cpu/kern_mat.h"

#include <math.h>
#include <string.h>

#include "cpu/kern_act.h"

static int sum_of(const int8_t *q, int n)
{
    int sum = 0;
    for (int k = 0; k < n; k++)
        sum += q[k];
    return sum;
}

/* Activations of one part: codes, their scale, and integer sub-scales by 32 codes (NULL: 1). */
struct part_x {
    const int8_t *q;
    float d;
    const int16_t *sub;
};

static struct part_x part_x(const void *row, int64_t n_cols, int64_t col, bool is_x256)
{
    if (!is_x256) {
        struct kern_act_x32 a = kern_act_x32(row, n_cols);
        return (struct part_x){a.q + col, a.s[col / 32].d, NULL};
    }
    struct kern_act_x256 a = kern_act_x256(row, n_cols);
    return (struct part_x){a.q + col, a.s[col / 256].d, a.s[col / 256].sub};
}

/* acc plus one part of a weight row times x. */
static float add_part(const struct kern_mat_block *w, int len, bool has_min, const struct part_x *x, float acc)
{
    int32_t isum = 0, msum = 0;
    for (int j = 0; j < len / 16; j++) {
        int32_t dot = 0, sub = x->sub ? x->sub[j / 2] : 1;
        for (int k = j * 16; k < j * 16 + 16; k++)
            dot += w->q[k] * x->q[k];
        isum += w->scale[j] * sub * dot;
        msum += w->min[j] * sub * sum_of(x->q + j * 16, 16);
    }
    acc = fmaf(w->d * x->d, (float)isum, acc);
    return has_min ? fmaf(w->m * x->d, (float)msum, acc) : acc;
}

static void mat_int(const struct kern_mat_args *a, const struct kern_mat_layout *t, bool is_x256)
{
    struct kern_mat_block w = {0};
    for (int r = 0; r < a->n_rows; r++) {
        for (int tok = 0; tok < a->n_tok; tok++)
            a->dst[tok * a->dst_stride + r] = 0.0f;
        for (int64_t part = 0; part < a->n_cols / t->part_len; part++) {
            const char *block = (const char *)a->w + (uint64_t)r * a->w_stride;
            t->unpack(block + part / t->n_part * t->block_bytes, (int)(part % t->n_part), &w);
            int64_t col = part * t->part_len;
            for (int tok = 0; tok < a->n_tok; tok++) {
                struct part_x x = part_x((const char *)a->x + (uint64_t)tok * a->x_stride, a->n_cols, col, is_x256);
                float *dst = a->dst + tok * a->dst_stride + r;
                *dst = add_part(&w, t->part_len, t->has_min, &x, *dst);
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

/* clang-format off */
#define X32_TYPES(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(IQ4_NL) X(MXFP4) X(NVFP4)
#define X256_TYPES(X)                                                                                                  \
    X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M)        \
    X(IQ4_XS) X(TQ1_0) X(TQ2_0)
/* clang-format on */

#define X32_FN(NAME)                                          \
    static void mat_##NAME(const struct kern_mat_args *a)     \
    {                                                         \
        mat_int(a, kern_ref_mat_layout(QUANT_##NAME), false); \
    }
#define X256_FN(NAME)                                        \
    static void mat_##NAME(const struct kern_mat_args *a)    \
    {                                                        \
        mat_int(a, kern_ref_mat_layout(QUANT_##NAME), true); \
    }
X32_TYPES(X32_FN)
X256_TYPES(X256_FN)

/* clang-format off */
#define ENTRY(NAME) [QUANT_##NAME] = mat_##NAME,

kern_mat *const kern_ref_mat_table[QUANT_ID_END] = {
    [QUANT_F32] = mat_f32,
    [QUANT_F16] = mat_f16,
    [QUANT_BF16] = mat_bf16,
    X32_TYPES(ENTRY)
    X256_TYPES(ENTRY)
};
/* clang-format on */
