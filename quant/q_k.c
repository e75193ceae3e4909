/* K-quants: super-blocks of 256 elements with a half scale (and minimum) above the small integer ones of each group.
 * Products are taken in the order scale first, element last, as in the `gguf` package, which fixes the bits. */
#include "quant/blocks.h"
#include "quant/q_fit.h"
#include "quant/q_impl.h"

#include <stddef.h>

void quant_to_float_q2_k(const void *blocks, float *out, int64_t n)
{
    const struct block_q2_k *b = blocks;
    for (; n > 0; n -= 256, b++, out += 256) {
        float d = q_half(b->d), dmin = q_half(b->dmin);
        for (int k = 0; k < 256; k++) {
            uint8_t scale = b->scales[k / 16];
            out[k] = d * (float)(scale & 15) * (float)q_crumb(b->qs, k) - dmin * (float)(scale >> 4);
        }
    }
}

/* Scale of group 0..15 of Q3_K. */
static int q3_k_scale(const uint8_t *scales, int group)
{
    int low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
    int high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    return (low | high << 4) - 32;
}

void quant_to_float_q3_k(const void *blocks, float *out, int64_t n)
{
    const struct block_q3_k *b = blocks;
    for (; n > 0; n -= 256, b++, out += 256) {
        float d = q_half(b->d);
        for (int k = 0; k < 256; k++) {
            int q = q_crumb(b->qs, k) - (b->hmask[k % 32] >> (k / 32) & 1 ? 0 : 4);
            out[k] = d * (float)q3_k_scale(b->scales, k / 16) * (float)q;
        }
    }
}

/* Scale and minimum of group 0..7 of Q4_K and Q5_K. */
static void q4_k_scale_min(const uint8_t *scales, int group, int *scale, int *min)
{
    if (group < 4) {
        *scale = scales[group] & 63;
        *min = scales[group + 4] & 63;
    } else {
        *scale = (scales[group + 4] & 15) | (scales[group - 4] >> 6) << 4;
        *min = scales[group + 4] >> 4 | (scales[group] >> 6) << 4;
    }
}

void quant_to_float_q4_k(const void *blocks, float *out, int64_t n)
{
    const struct block_q4_k *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int group = 0; group < 8; group++, out += 32) {
            int scale, min;
            q4_k_scale_min(b->scales, group, &scale, &min);
            float d = q_half(b->d) * (float)scale, m = q_half(b->dmin) * (float)min;
            const uint8_t *qs = b->qs + group / 2 * 32;
            for (int k = 0; k < 32; k++)
                out[k] = d * (float)(qs[k] >> group % 2 * 4 & 15) - m;
        }
}

void quant_to_float_q5_k(const void *blocks, float *out, int64_t n)
{
    const struct block_q5_k *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int group = 0; group < 8; group++, out += 32) {
            int scale, min;
            q4_k_scale_min(b->scales, group, &scale, &min);
            float d = q_half(b->d) * (float)scale, m = q_half(b->dmin) * (float)min;
            const uint8_t *qs = b->qs + group / 2 * 32;
            for (int k = 0; k < 32; k++)
                out[k] = d * (float)((qs[k] >> group % 2 * 4 & 15) | (b->qh[k] >> group & 1) << 4) - m;
        }
}

void quant_to_float_q6_k(const void *blocks, float *out, int64_t n)
{
    const struct block_q6_k *b = blocks;
    for (; n > 0; n -= 256, b++, out += 256) {
        float d = q_half(b->d);
        for (int k = 0; k < 256; k++) {
            int low = b->ql[k / 128 * 64 + k % 64] >> (k % 128 / 64 * 4) & 15;
            int q = (low | q_crumb(b->qh, k) << 4) - 32;
            out[k] = d * (float)b->scales[k / 16] * (float)q;
        }
    }
}

void quant_fit_q2_k(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q2_k *b = blocks;
    struct q_fit_min fit = {.top = 3, .group_len = 16, .scale_top = 15};
    for (; n > 0; n -= 256, b++, x += 256, weights += weights ? 256 : 0) {
        q_fit_min(&fit, x, weights);
        b->d = fit.d;
        b->dmin = fit.dmin;
        for (int group = 0; group < 16; group++)
            b->scales[group] = (uint8_t)(fit.scale[group] | fit.min[group] << 4);
        q_crumbs_pack(fit.code, b->qs);
    }
}

void quant_fit_q3_k(const float *x, const float *weights, void *blocks, int64_t n)
{
    static const struct q_levels levels = {8, -4, NULL, 1.0f};
    struct block_q3_k *b = blocks;
    struct q_fit_signed fit = {.levels = &levels, .group_len = 16, .scale_lo = -32, .scale_hi = 31};
    uint8_t low[256];
    for (; n > 0; n -= 256, b++, x += 256, weights += weights ? 256 : 0) {
        q_fit_signed(&fit, x, weights);
        b->d = fit.d;
        memset(b->scales, 0, sizeof b->scales);
        memset(b->hmask, 0, sizeof b->hmask);
        for (int group = 0; group < 16; group++) {
            int scale = fit.scale[group] + 32;
            b->scales[group % 8] |= (uint8_t)((scale & 15) << group / 8 * 4);
            b->scales[8 + group % 4] |= (uint8_t)((scale >> 4) << group / 4 * 2);
        }
        for (int k = 0; k < 256; k++) { /* index 0..7 is level + 4: its low bits, and the mask where it is 4 or more */
            low[k] = fit.code[k] & 3;
            b->hmask[k % 32] |= (uint8_t)((fit.code[k] >> 2) << k / 32);
        }
        q_crumbs_pack(low, b->qs);
    }
}

static void q4_k_scales_pack(const struct q_fit_min *fit, uint8_t *scales)
{
    for (int group = 0; group < 4; group++) {
        int above = group + 4;
        scales[group] = (uint8_t)(fit->scale[group] | fit->scale[above] >> 4 << 6);
        scales[group + 4] = (uint8_t)(fit->min[group] | fit->min[above] >> 4 << 6);
        scales[group + 8] = (uint8_t)((fit->scale[above] & 15) | (fit->min[above] & 15) << 4);
    }
}

/* The low nibbles of the codes: 64 elements per 32 bytes. */
static void nibbles_pack_64(const uint8_t *code, uint8_t *qs)
{
    for (int k = 0; k < 128; k++) {
        const uint8_t *pair = code + k / 32 * 64 + k % 32;
        qs[k] = (uint8_t)((pair[0] & 15) | (pair[32] & 15) << 4);
    }
}

void quant_fit_q4_k(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q4_k *b = blocks;
    struct q_fit_min fit = {.top = 15, .group_len = 32, .scale_top = 63};
    for (; n > 0; n -= 256, b++, x += 256, weights += weights ? 256 : 0) {
        q_fit_min(&fit, x, weights);
        b->d = fit.d;
        b->dmin = fit.dmin;
        q4_k_scales_pack(&fit, b->scales);
        nibbles_pack_64(fit.code, b->qs);
    }
}

void quant_fit_q5_k(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q5_k *b = blocks;
    struct q_fit_min fit = {.top = 31, .group_len = 32, .scale_top = 63};
    for (; n > 0; n -= 256, b++, x += 256, weights += weights ? 256 : 0) {
        q_fit_min(&fit, x, weights);
        b->d = fit.d;
        b->dmin = fit.dmin;
        q4_k_scales_pack(&fit, b->scales);
        nibbles_pack_64(fit.code, b->qs);
        memset(b->qh, 0, sizeof b->qh);
        for (int k = 0; k < 256; k++)
            b->qh[k % 32] |= (uint8_t)((fit.code[k] >> 4) << k / 32);
    }
}

void quant_fit_q6_k(const float *x, const float *weights, void *blocks, int64_t n)
{
    static const struct q_levels levels = {64, -32, NULL, 1.0f};
    struct block_q6_k *b = blocks;
    struct q_fit_signed fit = {.levels = &levels, .group_len = 16, .scale_lo = -128, .scale_hi = 127};
    uint8_t high[256];
    for (; n > 0; n -= 256, b++, x += 256, weights += weights ? 256 : 0) {
        q_fit_signed(&fit, x, weights);
        b->d = fit.d;
        for (int group = 0; group < 16; group++)
            b->scales[group] = (int8_t)fit.scale[group];
        memset(b->ql, 0, sizeof b->ql);
        for (int k = 0; k < 256; k++) {
            b->ql[k / 128 * 64 + k % 64] |= (uint8_t)((fit.code[k] & 15) << (k % 128 / 64 * 4));
            high[k] = fit.code[k] >> 4;
        }
        q_crumbs_pack(high, b->qh);
    }
}

#define FROM_FLOAT(fn)                                                  \
    void quant_from_float_##fn(const float *x, void *blocks, int64_t n) \
    {                                                                   \
        quant_fit_##fn(x, NULL, blocks, n);                             \
    }
FROM_FLOAT(q2_k)
FROM_FLOAT(q3_k)
FROM_FLOAT(q4_k)
FROM_FLOAT(q5_k)
FROM_FLOAT(q6_k)
