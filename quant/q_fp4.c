/* 4-bit floats: MXFP4 (E2M1 times a power of two per 32) and NVFP4 (E2M1 times an unsigned E4M3 per 16). */
#include "quant/blocks.h"
#include "quant/q_impl.h"

#include <math.h>

/* E2M1 doubled, so that the levels are whole; the scales below are halved to make up for it. */
static const int8_t level[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/* Half of 2^(e - 127). */
static float e8m0_half(uint8_t e)
{
    return q_f32_of_bits(e < 2 ? (uint32_t)0x00200000 << e : (uint32_t)(e - 1) << 23);
}

/* Half the value of an unsigned E4M3 (the top bit is not looked at); 0x7f, its NaN, counts as 0 as in the `gguf` package. */
static float ue4m3_half(uint8_t x)
{
    int exp = x >> 3 & 15, man = x & 7;
    if (x == 0x7f)
        return 0.0f;
    if (exp == 0)
        return (float)man * 0x1p-10f;
    return q_f32_of_bits((uint32_t)(exp - 7 - 1 + 127) << 23 | (uint32_t)man << 20);
}

void quant_to_float_mxfp4(const void *blocks, float *out, int64_t n)
{
    const struct block_mxfp4 *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = e8m0_half(b->e);
        for (int k = 0; k < 16; k++) {
            out[k] = d * (float)level[b->qs[k] & 15];
            out[k + 16] = d * (float)level[b->qs[k] >> 4];
        }
    }
}

void quant_to_float_nvfp4(const void *blocks, float *out, int64_t n)
{
    const struct block_nvfp4 *b = blocks;
    for (; n > 0; n -= 64, b++)
        for (int group = 0; group < 4; group++, out += 16) {
            float d = ue4m3_half(b->d[group]);
            const uint8_t *qs = b->qs + group * 8;
            for (int k = 0; k < 8; k++) {
                out[k] = d * (float)level[qs[k] & 15];
                out[k + 8] = d * (float)level[qs[k] >> 4];
            }
        }
}

/* The level nearest to x at scale d; the first of two equally near, which makes -0 unreachable. */
static uint8_t nearest(float x, float d)
{
    int best = 0;
    float best_err = fabsf(d * (float)level[0] - x);
    for (int q = 1; q < 16; q++) {
        float e = fabsf(d * (float)level[q] - x);
        if (e < best_err) {
            best = q;
            best_err = e;
        }
    }
    return (uint8_t)best;
}

static float amax_of(const float *x, int n)
{
    float amax = 0.0f;
    for (int k = 0; k < n; k++)
        amax = fabsf(x[k]) > amax ? fabsf(x[k]) : amax;
    return amax;
}

/* The power of two that brings amax into 4..8, as the `gguf` package chooses it: 6 is the top level, so up to a quarter of
 * the largest element may be cut off. */
void quant_from_float_mxfp4(const float *x, void *blocks, int64_t n)
{
    struct block_mxfp4 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32) {
        float amax = amax_of(x, 32);
        b->e = amax > 0.0f ? (uint8_t)q_trunc_clamp(floorf(log2f(amax)) - 2.0f + 127.0f, 0, 254) : 0;
        float d = e8m0_half(b->e);
        for (int k = 0; k < 32; k++)
            code[k] = nearest(x[k], d);
        q_nibbles_pack(code, b->qs);
    }
}

/* Codes at scale d; the weighted squared error. */
static double mxfp4_codes(const float *x, const float *weights, float d, uint8_t *code)
{
    double sum = 0.0;
    for (int k = 0; k < 32; k++) {
        code[k] = nearest(x[k], d);
        double e = (double)x[k] - (double)(d * (float)level[code[k]]);
        sum += (double)weights[k] * e * e;
    }
    return sum;
}

/* The power of two of least weighted error: the package's, or one of its neighbours. */
void quant_fit_mxfp4(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_mxfp4 *b = blocks;
    uint8_t code[32], best_code[32];
    for (; n > 0; n -= 32, b++, x += 32, weights += 32) {
        quant_from_float_mxfp4(x, b, 32);
        const int near[3] = {b->e, b->e - 1, b->e + 1}; /* of equal ones the package's */
        double best = INFINITY;
        for (int i = 0; i < 3; i++) {
            if (near[i] < 0 || near[i] > 254)
                continue;
            double error = mxfp4_codes(x, weights, e8m0_half((uint8_t)near[i]), code);
            if (error < best) {
                best = error;
                b->e = (uint8_t)near[i];
                memcpy(best_code, code, sizeof code);
            }
        }
        if (best < INFINITY)
            q_nibbles_pack(best_code, b->qs);
    }
}

/* The E4M3 nearest to half as much as a float scale. Its values grow with its code, so a search by bisection finds it. */
static uint8_t ue4m3_of(float x)
{
    uint8_t lo = 0, hi = 0x7e;
    while (hi - lo > 1) {
        uint8_t mid = (uint8_t)((lo + hi) / 2);
        if (ue4m3_half(mid) <= x)
            lo = mid;
        else
            hi = mid;
    }
    return x - ue4m3_half(lo) <= ue4m3_half(hi) - x ? lo : hi;
}

/* Each group's largest magnitude becomes the top level, 12. The tensor-wide scale that such files carry beside the weights
 * is the caller's. */
void quant_from_float_nvfp4(const float *x, void *blocks, int64_t n)
{
    struct block_nvfp4 *b = blocks;
    for (; n > 0; n -= 64, b++)
        for (int group = 0; group < 4; group++, x += 16) {
            b->d[group] = ue4m3_of(amax_of(x, 16) / 12.0f);
            float d = ue4m3_half(b->d[group]);
            for (int k = 0; k < 8; k++)
                b->qs[group * 8 + k] = (uint8_t)(nearest(x[k], d) | nearest(x[k + 8], d) << 4);
        }
}
