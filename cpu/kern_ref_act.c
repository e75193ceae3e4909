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

/* Largest magnitude, compared as integers, so that a NaN is the largest. */
static float amax_of(const float *x, int n)
{
    uint32_t amax_bits = 0;
    for (int k = 0; k < n; k++) {
        uint32_t bits;
        memcpy(&bits, &x[k], sizeof bits);
        bits &= 0x7fffffff;
        amax_bits = bits > amax_bits ? bits : amax_bits;
    }
    float amax;
    memcpy(&amax, &amax_bits, sizeof amax);
    return amax;
}

/* 32 codes, those of x * inv, or 0 where inv is 0; 16 bits get them times sub. */
static void put32(const float *x, float inv, int sub, int8_t *q, int16_t *q16)
{
    for (int k = 0; k < 32; k++) {
        q[k] = inv != 0.0f ? (int8_t)lrintf(x[k] * inv) : 0;
        q16[kern_act_q16_place(k)] = (int16_t)(sub * q[k]);
    }
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
    for (int64_t b = 0; b < n / 32; b++, x += 32) {
        float amax = amax_of(x, 32);
        bool is_finite = amax <= FLT_MAX, is_zero = is_finite && !(127.0f / amax <= FLT_MAX);
        float top = is_finite && !is_zero ? top_of(x, 32, amax) : 0.0f;
        put32(x, top != 0.0f ? top / amax : 0.0f, 1, a.q + b * 32, a.q16 + b * 32);
        a.s[b].d = top != 0.0f ? amax / top : is_zero ? 0.0f : amax;
        a.s[b].sum = sum_of(a.q + b * 32, 32);
    }
}

static void block_x256(const float *x, struct kern_act_s256 *s, int8_t *q, int16_t *q16)
{
    float amax = amax_of(x, 256), inv = KERN_ACT_TOP_256 / amax;
    bool is_finite = amax <= FLT_MAX, has_codes = is_finite && inv <= FLT_MAX;
    s->d = has_codes ? amax / KERN_ACT_TOP_256 : is_finite ? 0.0f : amax;
    for (int j = 0; j < 8; j++, x += 32, q += 32, q16 += 32) {
        float steps = has_codes ? ceilf(amax_of(x, 32) * (KERN_ACT_SUB_MAX / amax)) : 1.0f;
        int sub = steps < 1.0f ? 1 : steps > KERN_ACT_SUB_MAX ? KERN_ACT_SUB_MAX : (int)steps;
        put32(x, has_codes ? inv / (float)sub : 0.0f, sub, q, q16);
        s->sub[j] = (int16_t)sub;
        s->sum16[2 * j] = (int16_t)(sub * sum_of(q, 16));
        s->sum16[2 * j + 1] = (int16_t)(sub * sum_of(q + 16, 16));
        s->sum32[j] = (int16_t)(sub * sum_of(q, 32));
    }
}

static void row_x256(const float *x, void *out, int64_t n)
{
    struct kern_act_x256 a = kern_act_x256(out, n);
    for (int64_t b = 0; b < n / 256; b++)
        block_x256(x + b * 256, &a.s[b], a.q + b * 256, a.q16 + b * 256);
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
