/* Floats, and the types of one half scale (and minimum) per 32 elements. The quantizers take the same steps in float32 as
 * those of the `gguf` package, so that both write the same bytes; with weights (quant_fit_x) scales are searched for. */
#include "quant/blocks.h"
#include "quant/q_fit.h"
#include "quant/q_impl.h"

#include <math.h>
#include <stddef.h>

void quant_to_float_f32(const void *blocks, float *out, int64_t n)
{
    memcpy(out, blocks, (size_t)n * sizeof *out);
}

void quant_from_float_f32(const float *x, void *blocks, int64_t n)
{
    memcpy(blocks, x, (size_t)n * sizeof *x);
}

void quant_to_float_f16(const void *blocks, float *out, int64_t n)
{
    const uint16_t *half = blocks;
    for (int64_t k = 0; k < n; k++)
        out[k] = q_half(half[k]);
}

void quant_from_float_f16(const float *x, void *blocks, int64_t n)
{
    uint16_t *half = blocks;
    for (int64_t k = 0; k < n; k++)
        half[k] = quant_f32_to_f16(x[k]);
}

void quant_to_float_bf16(const void *blocks, float *out, int64_t n)
{
    const uint16_t *brain = blocks;
    for (int64_t k = 0; k < n; k++)
        out[k] = quant_bf16_to_f32(brain[k]);
}

void quant_from_float_bf16(const float *x, void *blocks, int64_t n)
{
    uint16_t *brain = blocks;
    for (int64_t k = 0; k < n; k++)
        brain[k] = quant_f32_to_bf16(x[k]);
}

static int nibble(const uint8_t *qs, int k)
{
    return k < 16 ? qs[k] & 15 : qs[k - 16] >> 4;
}

static int fifth_bit(const uint8_t *qh, int k)
{
    return (qh[k / 8] >> k % 8 & 1) << 4;
}

void quant_to_float_q4_0(const void *blocks, float *out, int64_t n)
{
    const struct block_q4_0 *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = q_half(b->d);
        for (int k = 0; k < 32; k++)
            out[k] = d * (float)(nibble(b->qs, k) - 8);
    }
}

void quant_to_float_q4_1(const void *blocks, float *out, int64_t n)
{
    const struct block_q4_1 *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = q_half(b->d), m = q_half(b->m);
        for (int k = 0; k < 32; k++)
            out[k] = d * (float)nibble(b->qs, k) + m;
    }
}

void quant_to_float_q5_0(const void *blocks, float *out, int64_t n)
{
    const struct block_q5_0 *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = q_half(b->d);
        for (int k = 0; k < 32; k++)
            out[k] = d * (float)((nibble(b->qs, k) | fifth_bit(b->qh, k)) - 16);
    }
}

void quant_to_float_q5_1(const void *blocks, float *out, int64_t n)
{
    const struct block_q5_1 *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = q_half(b->d), m = q_half(b->m);
        for (int k = 0; k < 32; k++)
            out[k] = d * (float)(nibble(b->qs, k) | fifth_bit(b->qh, k)) + m;
    }
}

void quant_to_float_q8_0(const void *blocks, float *out, int64_t n)
{
    const struct block_q8_0 *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = q_half(b->d);
        for (int k = 0; k < 32; k++)
            out[k] = (float)b->qs[k] * d;
    }
}

static float inverse(float d)
{
    return d == 0.0f ? 0.0f : 1.0f / d;
}

/* The first element of largest magnitude. */
static float peak(const float *x)
{
    float best = x[0];
    for (int k = 1; k < 32; k++)
        if (fabsf(x[k]) > fabsf(best))
            best = x[k];
    return best;
}

static void range(const float *x, float *min, float *max)
{
    *min = *max = x[0];
    for (int k = 1; k < 32; k++) {
        *min = x[k] < *min ? x[k] : *min;
        *max = x[k] > *max ? x[k] : *max;
    }
}

static void fifth_bits_pack(const uint8_t *code, uint8_t *qh)
{
    memset(qh, 0, 4);
    for (int k = 0; k < 32; k++)
        qh[k / 8] |= (uint8_t)(code[k] >> 4 << k % 8);
}

/* Codes 0..2 * half - 1 around a zero at `half`; the peak gets code 0. Returns the scale. */
static uint16_t codes_around_zero(const float *x, int half, uint8_t *code)
{
    float d = peak(x) / (float)-half, id = inverse(d);
    for (int k = 0; k < 32; k++)
        code[k] = (uint8_t)q_trunc_clamp(x[k] * id + ((float)half + 0.5f), 0, 2 * half - 1);
    return quant_f32_to_f16(d);
}

/* Codes 0..top from the minimum up. Returns the scale. */
static uint16_t codes_from_min(const float *x, int top, uint8_t *code, uint16_t *m)
{
    float min, max;
    range(x, &min, &max);
    float d = (max - min) / (float)top, id = inverse(d);
    for (int k = 0; k < 32; k++)
        code[k] = (uint8_t)q_trunc_clamp((x[k] - min) * id + 0.5f, 0, top);
    *m = quant_f32_to_f16(min);
    return quant_f32_to_f16(d);
}

void quant_from_float_q4_0(const float *x, void *blocks, int64_t n)
{
    struct block_q4_0 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32) {
        b->d = codes_around_zero(x, 8, code);
        q_nibbles_pack(code, b->qs);
    }
}

void quant_from_float_q4_1(const float *x, void *blocks, int64_t n)
{
    struct block_q4_1 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32) {
        b->d = codes_from_min(x, 15, code, &b->m);
        q_nibbles_pack(code, b->qs);
    }
}

void quant_from_float_q5_0(const float *x, void *blocks, int64_t n)
{
    struct block_q5_0 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32) {
        b->d = codes_around_zero(x, 16, code);
        q_nibbles_pack(code, b->qs);
        fifth_bits_pack(code, b->qh);
    }
}

void quant_from_float_q5_1(const float *x, void *blocks, int64_t n)
{
    struct block_q5_1 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32) {
        b->d = codes_from_min(x, 31, code, &b->m);
        q_nibbles_pack(code, b->qs);
        fifth_bits_pack(code, b->qh);
    }
}

void quant_from_float_q8_0(const float *x, void *blocks, int64_t n)
{
    struct block_q8_0 *b = blocks;
    for (; n > 0; n -= 32, b++, x += 32) {
        float d = fabsf(peak(x)) / 127.0f, id = inverse(d);
        for (int k = 0; k < 32; k++) /* roundf: halves away from zero; the clamp is for NaN and overflowed scales */
            b->qs[k] = (int8_t)q_trunc_clamp(roundf(x[k] * id), -128, 127);
        b->d = quant_f32_to_f16(d);
    }
}

static const struct q_levels levels_4 = {16, -8, NULL, 1.0f}, levels_5 = {32, -16, NULL, 1.0f};

void quant_fit_q4_0(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q4_0 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32, weights += 32) {
        b->d = q_fit_block(&levels_4, x, weights, code);
        q_nibbles_pack(code, b->qs);
    }
}

void quant_fit_q4_1(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q4_1 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32, weights += 32) {
        b->d = q_fit_block_min(15, x, weights, code, &b->m);
        q_nibbles_pack(code, b->qs);
    }
}

void quant_fit_q5_0(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q5_0 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32, weights += 32) {
        b->d = q_fit_block(&levels_5, x, weights, code);
        q_nibbles_pack(code, b->qs);
        fifth_bits_pack(code, b->qh);
    }
}

void quant_fit_q5_1(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_q5_1 *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32, weights += 32) {
        b->d = q_fit_block_min(31, x, weights, code, &b->m);
        q_nibbles_pack(code, b->qs);
        fifth_bits_pack(code, b->qh);
    }
}
