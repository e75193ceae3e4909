/* TQ1_0 and TQ2_0: -1, 0 or 1 times one half scale per 256 elements. */
#include "quant/blocks.h"
#include "quant/q_impl.h"

#include <math.h>

/* A byte of TQ1_0 holds a fraction of 256 whose base-3 digits are the codes, most significant first. Multiplying it by a
 * power of 3 in 8 bits drops the digits before; a final multiplication by 3 carries the next digit out on top. */
static const uint8_t power_of_3[5] = {1, 3, 9, 27, 81};

static int digit(uint8_t byte, int place)
{
    return (uint8_t)(byte * power_of_3[place]) * 3 >> 8;
}

/* Where element k (0..255) of TQ1_0 is stored: which byte of qs followed by qh, and which digit of it. */
static void tq1_0_place(int k, int *byte, int *place)
{
    if (k < 160) {
        *byte = k % 32;
        *place = k / 32;
    } else if (k < 240) {
        *byte = 32 + (k - 160) % 16;
        *place = (k - 160) / 16;
    } else {
        *byte = 48 + (k - 240) % 4;
        *place = (k - 240) / 4;
    }
}

void quant_to_float_tq1_0(const void *blocks, float *out, int64_t n)
{
    const struct block_tq1_0 *b = blocks;
    for (; n > 0; n -= 256, b++, out += 256) {
        float d = q_half(b->d);
        for (int k = 0; k < 256; k++) {
            int byte, place;
            tq1_0_place(k, &byte, &place);
            out[k] = d * (float)(digit(byte < 48 ? b->qs[byte] : b->qh[byte - 48], place) - 1);
        }
    }
}

void quant_to_float_tq2_0(const void *blocks, float *out, int64_t n)
{
    const struct block_tq2_0 *b = blocks;
    for (; n > 0; n -= 256, b++, out += 256) {
        float d = q_half(b->d);
        for (int k = 0; k < 256; k++)
            out[k] = d * (float)(q_crumb(b->qs, k) - 1);
    }
}

/* Codes 0..2 of a block; returns the scale, its largest magnitude. */
static uint16_t ternary_codes(const float *x, uint8_t *code)
{
    float d = 0.0f;
    for (int k = 0; k < 256; k++)
        d = fabsf(x[k]) > d ? fabsf(x[k]) : d;
    float id = d == 0.0f ? 0.0f : 1.0f / d;
    for (int k = 0; k < 256; k++)
        code[k] = (uint8_t)(q_trunc_clamp(roundf(x[k] * id), -1, 1) + 1);
    return quant_f32_to_f16(d);
}

/* value / 243 as a fraction of 256, rounded up so that truncation finds each digit again. */
static uint8_t fraction(int value)
{
    return (uint8_t)((value * 256 + 242) / 243);
}

void quant_from_float_tq1_0(const float *x, void *blocks, int64_t n)
{
    struct block_tq1_0 *b = blocks;
    uint8_t code[256];
    for (; n > 0; n -= 256, b++, x += 256) {
        int value[52] = {0};
        b->d = ternary_codes(x, code);
        for (int k = 0; k < 256; k++) {
            int byte, place;
            tq1_0_place(k, &byte, &place);
            value[byte] += code[k] * power_of_3[4 - place];
        }
        for (int byte = 0; byte < 48; byte++)
            b->qs[byte] = fraction(value[byte]);
        for (int byte = 0; byte < 4; byte++)
            b->qh[byte] = fraction(value[48 + byte]);
    }
}

void quant_from_float_tq2_0(const float *x, void *blocks, int64_t n)
{
    struct block_tq2_0 *b = blocks;
    uint8_t code[256];
    for (; n > 0; n -= 256, b++, x += 256) {
        b->d = ternary_codes(x, code);
        q_crumbs_pack(code, b->qs);
    }
}
