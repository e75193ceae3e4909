/* Weight blocks as integers: how every quantized type maps onto codes, integer factors and one or two float scales.
 * Constant factors that are powers of two (an eighth, a quarter) go into the float scale, which stays exact. */
#include "cpu/kern_mat.h"

#include <string.h>

#include "quant/blocks.h"
#include "quant/iq_grid.h"

/* Blocks lie at any byte address: copied to an aligned struct first. */
#define BLOCK_HERE(type)         \
    struct block_##type b;       \
    memcpy(&b, block, sizeof b); \
    (void)part

static void no_factors(struct kern_mat_block *out, int n_group)
{
    for (int j = 0; j < n_group; j++) {
        out->scale[j] = 1;
        out->min[j] = 1;
    }
    out->m = 0.0f;
}

static int nibble(const uint8_t *qs, int k)
{
    return k < 16 ? qs[k] & 15 : qs[k - 16] >> 4;
}

/* Two bits of code k in the 64 bytes of Q2_K, Q3_K and TQ2_0. */
static int crumb(const uint8_t *qs, int k)
{
    return qs[k / 128 * 32 + k % 32] >> (k % 128 / 32 * 2) & 3;
}

static int bit(const uint8_t *bits, int k)
{
    return bits[k / 8] >> k % 8 & 1;
}

static void unpack_q4_0(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q4_0);
    no_factors(out, 2);
    out->d = quant_f16_to_f32(b.d);
    for (int k = 0; k < 32; k++)
        out->q[k] = (int8_t)(nibble(b.qs, k) - 8);
}

static void unpack_q4_1(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q4_1);
    no_factors(out, 2);
    out->d = quant_f16_to_f32(b.d);
    out->m = quant_f16_to_f32(b.m);
    for (int k = 0; k < 32; k++)
        out->q[k] = (int8_t)nibble(b.qs, k);
}

static void unpack_q5_0(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q5_0);
    no_factors(out, 2);
    out->d = quant_f16_to_f32(b.d);
    for (int k = 0; k < 32; k++)
        out->q[k] = (int8_t)((nibble(b.qs, k) | bit(b.qh, k) << 4) - 16);
}

static void unpack_q5_1(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q5_1);
    no_factors(out, 2);
    out->d = quant_f16_to_f32(b.d);
    out->m = quant_f16_to_f32(b.m);
    for (int k = 0; k < 32; k++)
        out->q[k] = (int8_t)(nibble(b.qs, k) | bit(b.qh, k) << 4);
}

static void unpack_q8_0(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q8_0);
    no_factors(out, 2);
    out->d = quant_f16_to_f32(b.d);
    memcpy(out->q, b.qs, sizeof b.qs);
}

static void unpack_q2_k(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q2_k);
    out->d = quant_f16_to_f32(b.d);
    out->m = -quant_f16_to_f32(b.dmin);
    for (int j = 0; j < 16; j++) {
        out->scale[j] = b.scales[j] & 15;
        out->min[j] = b.scales[j] >> 4;
    }
    for (int k = 0; k < 256; k++)
        out->q[k] = (int8_t)crumb(b.qs, k);
}

static void unpack_q3_k(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q3_k);
    out->d = quant_f16_to_f32(b.d);
    for (int j = 0; j < 16; j++) {
        int low = j < 8 ? b.scales[j] & 15 : b.scales[j - 8] >> 4;
        int high = b.scales[8 + j % 4] >> (j / 4 * 2) & 3;
        out->scale[j] = (int16_t)((low | high << 4) - 32);
    }
    for (int k = 0; k < 256; k++)
        out->q[k] = (int8_t)(crumb(b.qs, k) - (b.hmask[k % 32] >> k / 32 & 1 ? 0 : 4));
}

/* Scales and minima of the 8 groups of Q4_K and Q5_K. */
static void scales_k4(const uint8_t *s, struct kern_mat_block *out)
{
    for (int j = 0; j < 16; j++) {
        int g = j / 2;
        if (g < 4) {
            out->scale[j] = s[g] & 63;
            out->min[j] = s[g + 4] & 63;
        } else {
            out->scale[j] = (int16_t)((s[g + 4] & 15) | (s[g - 4] >> 6) << 4);
            out->min[j] = (int16_t)(s[g + 4] >> 4 | (s[g] >> 6) << 4);
        }
    }
}

static int nibble_k4(const uint8_t *qs, int k)
{
    return qs[k / 64 * 32 + k % 32] >> (k / 32 % 2 * 4) & 15;
}

static void unpack_q4_k(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q4_k);
    out->d = quant_f16_to_f32(b.d);
    out->m = -quant_f16_to_f32(b.dmin);
    scales_k4(b.scales, out);
    for (int k = 0; k < 256; k++)
        out->q[k] = (int8_t)nibble_k4(b.qs, k);
}

static void unpack_q5_k(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q5_k);
    out->d = quant_f16_to_f32(b.d);
    out->m = -quant_f16_to_f32(b.dmin);
    scales_k4(b.scales, out);
    for (int k = 0; k < 256; k++)
        out->q[k] = (int8_t)(nibble_k4(b.qs, k) | (b.qh[k % 32] >> k / 32 & 1) << 4);
}

static void unpack_q6_k(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(q6_k);
    out->d = quant_f16_to_f32(b.d);
    for (int j = 0; j < 16; j++)
        out->scale[j] = b.scales[j];
    for (int k = 0; k < 256; k++) {
        int low = b.ql[k / 128 * 64 + k % 64] >> (k % 128 / 64 * 4) & 15;
        out->q[k] = (int8_t)((low | crumb(b.qh, k) << 4) - 32);
    }
}

/* n magnitudes of a book's row, negated where the sign bit is set. */
static void put_signed(int8_t *q, int n, uint64_t row, uint32_t signs)
{
    for (int k = 0; k < n; k++) {
        int v = (int)(row >> 8 * k & 255);
        q[k] = (int8_t)(signs >> k & 1 ? -v : v);
    }
}

static uint32_t word_of(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, sizeof w);
    return w;
}

static void unpack_iq2_xxs(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq2_xxs);
    out->d = quant_f16_to_f32(b.d) * 0.125f;
    for (int g = 0; g < 8; g++) {
        const uint8_t *index = b.qs + g * 8;
        uint32_t w = word_of(index + 4);
        out->scale[2 * g] = out->scale[2 * g + 1] = (int16_t)(2 * (w >> 28) + 1);
        for (int k = 0; k < 4; k++)
            put_signed(out->q + g * 32 + k * 8, 8, iq_grid_iq2_xxs[index[k]], iq_grid_signs(w >> 7 * k & 127));
    }
}

/* Scales of IQ2_XS and IQ2_S. */
static void scales_iq2(const uint8_t *scales, struct kern_mat_block *out)
{
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (scales[j / 2] >> j % 2 * 4 & 15) + 1);
}

static void unpack_iq2_xs(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq2_xs);
    out->d = quant_f16_to_f32(b.d) * 0.125f;
    scales_iq2(b.scales, out);
    for (int k = 0; k < 32; k++)
        put_signed(out->q + k * 8, 8, iq_grid_iq2_xs[b.qs[k] & 511], iq_grid_signs(b.qs[k] >> 9));
}

static void unpack_iq2_s(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq2_s);
    out->d = quant_f16_to_f32(b.d) * 0.125f;
    scales_iq2(b.scales, out);
    for (int k = 0; k < 32; k++) {
        int index = b.qs[k] | (b.qh[k / 4] >> k % 4 * 2 & 3) << 8;
        put_signed(out->q + k * 8, 8, iq_grid_iq2_s[index], b.signs[k]);
    }
}

static void unpack_iq3_xxs(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq3_xxs);
    out->d = quant_f16_to_f32(b.d) * 0.25f;
    for (int g = 0; g < 8; g++) {
        const uint8_t *index = b.qs + g * 8;
        uint32_t w = word_of(b.scales + g * 4);
        out->scale[2 * g] = out->scale[2 * g + 1] = (int16_t)(2 * (w >> 28) + 1);
        for (int k = 0; k < 8; k++) {
            uint32_t signs = (uint32_t)iq_grid_signs(w >> 7 * (k / 2) & 127) >> k % 2 * 4;
            put_signed(out->q + g * 32 + k * 4, 4, iq_grid_iq3_xxs[index[k]], signs);
        }
    }
}

static void unpack_iq3_s(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq3_s);
    out->d = quant_f16_to_f32(b.d);
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (b.scales[j / 4] >> j / 2 % 2 * 4 & 15) + 1);
    for (int k = 0; k < 64; k++) {
        int index = b.qs[k] | bit(b.qh, k) << 8;
        put_signed(out->q + k * 4, 4, iq_grid_iq3_s[index], (uint32_t)b.signs[k / 2] >> k % 2 * 4);
    }
}

/* 8 elements of IQ1 in eighths: every one is shifted by one eighth, up or down. */
static void put_shifted(int8_t *q, int index, bool down)
{
    uint64_t row = iq_grid_iq1_s[index];
    for (int k = 0; k < 8; k++)
        q[k] = (int8_t)((int8_t)(row >> 8 * k) * 8 + (down ? -1 : 1));
}

static void unpack_iq1_s(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq1_s);
    out->d = quant_f16_to_f32(b.d) * 0.125f;
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (b.qh[j / 2] >> 12 & 7) + 1);
    for (int k = 0; k < 32; k++) {
        int qh = b.qh[k / 4];
        put_shifted(out->q + k * 8, b.qs[k] | (qh >> k % 4 * 3 & 7) << 8, qh & 0x8000);
    }
}

static void unpack_iq1_m(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq1_m);
    uint16_t word[4];
    memcpy(word, b.scales, sizeof word);
    uint16_t half = 0;
    for (int k = 0; k < 4; k++)
        half = (uint16_t)(half | (word[k] >> 12) << 4 * k);
    out->d = quant_f16_to_f32(half) * 0.125f;
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (word[j / 4] >> j % 4 * 3 & 7) + 1);
    for (int k = 0; k < 32; k++) {
        int qh = b.qh[k / 2] >> k % 2 * 4;
        put_shifted(out->q + k * 8, b.qs[k] | (qh & 7) << 8, qh & 8);
    }
}

static void unpack_iq4_nl(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq4_nl);
    no_factors(out, 2);
    out->d = quant_f16_to_f32(b.d);
    for (int k = 0; k < 32; k++)
        out->q[k] = iq_grid_iq4_levels[nibble(b.qs, k)];
}

static void unpack_iq4_xs(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(iq4_xs);
    out->d = quant_f16_to_f32(b.d);
    for (int j = 0; j < 16; j++) {
        int low = b.scales_l[j / 4] >> j / 2 % 2 * 4 & 15;
        out->scale[j] = (int16_t)((low | (b.scales_h >> j / 2 * 2 & 3) << 4) - 32);
    }
    for (int k = 0; k < 256; k++)
        out->q[k] = iq_grid_iq4_levels[nibble(b.qs + k / 32 * 16, k % 32)];
}

/* A byte of TQ1_0 is a fraction of 256 with five digits of base 3. */
static int digit(uint8_t byte, int place)
{
    static const uint8_t power_of_3[5] = {1, 3, 9, 27, 81};
    return (uint8_t)(byte * power_of_3[place]) * 3 >> 8;
}

static void unpack_tq1_0(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(tq1_0);
    no_factors(out, 16);
    out->d = quant_f16_to_f32(b.d);
    for (int k = 0; k < 160; k++)
        out->q[k] = (int8_t)(digit(b.qs[k % 32], k / 32) - 1);
    for (int k = 0; k < 80; k++)
        out->q[160 + k] = (int8_t)(digit(b.qs[32 + k % 16], k / 16) - 1);
    for (int k = 0; k < 16; k++)
        out->q[240 + k] = (int8_t)(digit(b.qh[k % 4], k / 4) - 1);
}

static void unpack_tq2_0(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(tq2_0);
    no_factors(out, 16);
    out->d = quant_f16_to_f32(b.d);
    for (int k = 0; k < 256; k++)
        out->q[k] = (int8_t)(crumb(b.qs, k) - 1);
}

/* E2M1 doubled; the float scales below are halved to make up for it. */
static const int8_t fp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static float f32_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void unpack_mxfp4(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(mxfp4);
    no_factors(out, 2);
    out->d = f32_of_bits(b.e < 2 ? (uint32_t)0x00200000 << b.e : (uint32_t)(b.e - 1) << 23);
    for (int k = 0; k < 32; k++)
        out->q[k] = fp4_levels[nibble(b.qs, k)];
}

/* Half of an unsigned E4M3; its NaN counts as 0. */
static float ue4m3_half(uint8_t x)
{
    int exp = x >> 3 & 15, man = x & 7;
    if (x == 0x7f)
        return 0.0f;
    return exp ? f32_of_bits((uint32_t)(exp + 119) << 23 | (uint32_t)man << 20) : (float)man * 0x1p-10f;
}

static void unpack_nvfp4(const void *block, int part, struct kern_mat_block *out)
{
    BLOCK_HERE(nvfp4);
    no_factors(out, 1);
    out->d = ue4m3_half(b.d[part]);
    for (int k = 0; k < 8; k++) {
        out->q[k] = fp4_levels[b.qs[part * 8 + k] & 15];
        out->q[k + 8] = fp4_levels[b.qs[part * 8 + k] >> 4];
    }
}

#define ROW(NAME, fn, len, n, min) [QUANT_##NAME] = {unpack_##fn, (int)sizeof(struct block_##fn), len, n, min}

static const struct kern_mat_layout layouts[QUANT_ID_END] = {
    ROW(Q4_0, q4_0, 32, 1, false),      ROW(Q4_1, q4_1, 32, 1, true),         ROW(Q5_0, q5_0, 32, 1, false),
    ROW(Q5_1, q5_1, 32, 1, true),       ROW(Q8_0, q8_0, 32, 1, false),        ROW(Q2_K, q2_k, 256, 1, true),
    ROW(Q3_K, q3_k, 256, 1, false),     ROW(Q4_K, q4_k, 256, 1, true),        ROW(Q5_K, q5_k, 256, 1, true),
    ROW(Q6_K, q6_k, 256, 1, false),     ROW(IQ2_XXS, iq2_xxs, 256, 1, false), ROW(IQ2_XS, iq2_xs, 256, 1, false),
    ROW(IQ2_S, iq2_s, 256, 1, false),   ROW(IQ3_XXS, iq3_xxs, 256, 1, false), ROW(IQ3_S, iq3_s, 256, 1, false),
    ROW(IQ1_S, iq1_s, 256, 1, false),   ROW(IQ1_M, iq1_m, 256, 1, false),     ROW(IQ4_NL, iq4_nl, 32, 1, false),
    ROW(IQ4_XS, iq4_xs, 256, 1, false), ROW(TQ1_0, tq1_0, 256, 1, false),     ROW(TQ2_0, tq2_0, 256, 1, false),
    ROW(MXFP4, mxfp4, 32, 1, false),    ROW(NVFP4, nvfp4, 16, 4, false),
};

const struct kern_mat_layout *kern_ref_mat_layout(enum quant_type type)
{
    return layouts[type].unpack ? &layouts[type] : 0;
}
