/* The plain C truth of activation quantization. */
#include "cpu/kern_mat.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/kern_act.h"

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
