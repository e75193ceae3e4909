/* The plain C truth of activation quantization. */
#include "cpu/kern_mat.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/kern_act.h"

static const float tops[KERN_ACT_N_TOP] = KERN_ACT_TOPS, factors[KERN_ACT_N_TOP] = KERN_ACT_TOP_FACTORS;

/* Sum of the squared errors of rounding n x * inv. */
static float sum_sq_err(const float *x, int n, float inv)
{
    float lane[16] = {0};
    for (int k = 0; k < n; k++) {
        float y = x[k] * inv, err = y - rintf(y);
        lane[k % 16] = fmaf(err, err, lane[k % 16]);
    }
    for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] += lane[l + half];
    return lane[0];
}

static float top_of(const float *x, int n, float amax)
{
    float top = 0, least = INFINITY;
    for (int i = 0; i < KERN_ACT_N_TOP; i++) {
        float sum = sum_sq_err(x, n, tops[i] / amax) * factors[i];
        if (sum < least) {
            least = sum;
            top = tops[i];
        }
    }
    return top;
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
    bool is_finite = amax <= FLT_MAX, is_zero = is_finite && !(127.0f / amax <= FLT_MAX);
    if (!is_finite || is_zero) {
        memset(q, 0, (size_t)n * sizeof *q);
        memset(q16, 0, (size_t)n * sizeof *q16);
        return is_zero ? 0.0f : amax;
    }
    float top = top_of(x, n, amax), inv = top / amax;
    for (int k = 0; k < n; k++) {
        q[k] = (int8_t)lrintf(x[k] * inv);
        q16[kern_act_q16_place(k)] = q[k];
    }
    return amax / top;
}

static int sum_of(const int8_t *q, int n)
{
    int sum = 0;
    for (int k = 0; k < n; k++)
        sum += q[k];
    return sum;
}

static void row_x32(const float *x, void *out, int64_t n)
{
    struct kern_act_x32 a = kern_act_x32(out, n);
    for (int64_t b = 0; b < n / 32; b++) {
        a.s[b].d = quantize(x + b * 32, 32, a.q + b * 32, a.q16 + b * 32);
        a.s[b].sum = sum_of(a.q + b * 32, 32);
    }
}

static void row_x256(const float *x, void *out, int64_t n)
{
    struct kern_act_x256 a = kern_act_x256(out, n);
    for (int64_t b = 0; b < n / 256; b++) {
        const int8_t *q = a.q + b * 256;
        a.s[b].d = quantize(x + b * 256, 256, a.q + b * 256, a.q16 + b * 256);
        for (int j = 0; j < 16; j++)
            a.s[b].sum16[j] = (int16_t)sum_of(q + j * 16, 16);
        for (int j = 0; j < 8; j++)
            a.s[b].sum32[j] = (int16_t)sum_of(q + j * 32, 32);
    }
}

void kern_ref_act_row(enum quant_act act, const float *x, void *out, int64_t n)
{
    if (act == QUANT_ACT_Q8X32)
        row_x32(x, out, n);
    else if (act == QUANT_ACT_Q8X256)
        row_x256(x, out, n);
    else
        memcpy(out, x, (size_t)n * sizeof *x);
}
