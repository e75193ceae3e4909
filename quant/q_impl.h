/* Inside quant/: what the conversion files share. The conversions themselves are named quant_to_float_x and
 * quant_from_float_x in every file, because quant.c pastes those names from types.def. */
#ifndef FERRY_QUANT_Q_IMPL_H
#define FERRY_QUANT_Q_IMPL_H

#include <stdint.h>
#include <string.h>

#include "quant/quant.h"

#define T(NAME, text, id, len, bytes, act, fn)                           \
    void quant_to_float_##fn(const void *blocks, float *out, int64_t n); \
    void quant_from_float_##fn(const float *x, void *blocks, int64_t n); \
    void quant_fit_##fn(const float *x, const float *weights, void *blocks, int64_t n);
#include "quant/types.def"
#undef T

static inline float q_f32_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t q_bits_of_f32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Inline twin of quant_f16_to_f32(). A subnormal half is its mantissa times 2^-24, which float arithmetic does exactly. */
static inline float q_half(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exp = h >> 10 & 31, man = h & 0x3ff;
    if (exp == 0)
        return q_f32_of_bits(sign | q_bits_of_f32((float)man * 0x1p-24f));
    if (exp == 31)
        return q_f32_of_bits(sign | 0x7f800000 | man << 13);
    return q_f32_of_bits(sign | (exp + 112) << 23 | man << 13);
}

/* Truncate to an integer in lo..hi; a NaN becomes lo, since converting one to int is undefined. */
static inline int q_trunc_clamp(float x, int lo, int hi)
{
    if (!(x > (float)lo))
        return lo;
    return x < (float)hi ? (int)x : hi;
}

/* Round to nearest, halves to even (adding and taking away 1.5 * 2^23 rounds in the unit), clamped to lo..hi, which must be
 * within +-2^22; a NaN becomes lo. */
static inline int q_round_clamp(float x, int lo, int hi)
{
    if (!(x > (float)lo))
        return lo;
    if (!(x < (float)hi))
        return hi;
    return (int)(q_bits_of_f32(x + 12582912.0f) & 0x7fffff) - 0x400000;
}

/* Two bits of code k (0..255) in the 64 bytes of Q2_K, Q3_K and TQ2_0: halves of 128, in them four planes of 32. */
static inline int q_crumb(const uint8_t *qs, int k)
{
    return qs[k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3;
}

static inline void q_crumbs_pack(const uint8_t *code /* (256) */, uint8_t *qs /* (64) */)
{
    memset(qs, 0, 64);
    for (int k = 0; k < 256; k++)
        qs[k / 128 * 32 + k % 32] |= (uint8_t)(code[k] << (k % 128 / 32 * 2));
}

/* 32 codes of 4 bits into 16 bytes: 0..15 low, 16..31 high. */
static inline void q_nibbles_pack(const uint8_t *code /* (32) */, uint8_t *qs /* (16) */)
{
    for (int k = 0; k < 16; k++)
        qs[k] = (uint8_t)((code[k] & 15) | code[k + 16] << 4);
}

#endif
