/* IQ types: code-book indices with separate signs (IQ2, IQ3), a code-book of -1, 0, 1 with a shift (IQ1), and 16 uneven
 * levels (IQ4). The order of float operations is that of the `gguf` package, which fixes the bits. */
#include "quant/blocks.h"
#include "quant/iq_grid.h"
#include "quant/q_fit.h"
#include "quant/q_impl.h"

#include <stddef.h>

static uint32_t word_of(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, sizeof w);
    return w;
}

/* 4-bit scale number `k` of a byte array. */
static float nibble(const uint8_t *bytes, int k)
{
    return (float)(bytes[k / 2] >> k % 2 * 4 & 15);
}

/* n magnitudes of a book's row times db, negated where the sign bit is set. */
static void put_signed(float *out, int n, float db, uint64_t row, uint8_t signs)
{
    for (int k = 0; k < n; k++) {
        float v = db * (float)(row >> 8 * k & 255);
        out[k] = signs >> k & 1 ? -v : v;
    }
}

void quant_to_float_iq2_xxs(const void *blocks, float *out, int64_t n)
{
    const struct block_iq2_xxs *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int group = 0; group < 8; group++, out += 32) {
            const uint8_t *index = b->qs + group * 8;
            uint32_t w = word_of(index + 4);
            float db = q_half(b->d) * (0.5f + (float)(w >> 28)) * 0.25f;
            for (int k = 0; k < 4; k++)
                put_signed(out + 8 * k, 8, db, iq_grid_iq2_xxs[index[k]], iq_grid_signs(w >> 7 * k & 127));
        }
}

void quant_to_float_iq2_xs(const void *blocks, float *out, int64_t n)
{
    const struct block_iq2_xs *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int k = 0; k < 32; k++, out += 8) {
            float db = q_half(b->d) * (0.5f + nibble(b->scales, k / 2)) * 0.25f;
            put_signed(out, 8, db, iq_grid_iq2_xs[b->qs[k] & 511], iq_grid_signs(b->qs[k] >> 9));
        }
}

void quant_to_float_iq2_s(const void *blocks, float *out, int64_t n)
{
    const struct block_iq2_s *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int k = 0; k < 32; k++, out += 8) {
            float db = q_half(b->d) * (0.5f + nibble(b->scales, k / 2)) * 0.25f;
            int index = b->qs[k] | (b->qh[k / 4] >> k % 4 * 2 & 3) << 8;
            put_signed(out, 8, db, iq_grid_iq2_s[index], b->signs[k]);
        }
}

void quant_to_float_iq3_xxs(const void *blocks, float *out, int64_t n)
{
    const struct block_iq3_xxs *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int group = 0; group < 8; group++, out += 32) {
            const uint8_t *index = b->qs + group * 8;
            uint32_t w = word_of(b->scales + group * 4);
            float db = q_half(b->d) * (0.5f + (float)(w >> 28)) * 0.5f;
            for (int k = 0; k < 8; k++) {
                uint8_t signs = iq_grid_signs(w >> 7 * (k / 2) & 127);
                put_signed(out + 4 * k, 4, db, iq_grid_iq3_xxs[index[k]], (uint8_t)(signs >> k % 2 * 4));
            }
        }
}

void quant_to_float_iq3_s(const void *blocks, float *out, int64_t n)
{
    const struct block_iq3_s *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int k = 0; k < 64; k++, out += 4) {
            float db = q_half(b->d) * (1.0f + 2.0f * nibble(b->scales, k / 8));
            int index = b->qs[k] | (b->qh[k / 8] >> k % 8 & 1) << 8;
            put_signed(out, 4, db, iq_grid_iq3_s[index], (uint8_t)(b->signs[k / 2] >> k % 2 * 4));
        }
}

/* 8 elements of IQ1: every one is shifted by an eighth, up or down. */
static void put_shifted(float *out, float dl, int index, bool down)
{
    uint64_t row = iq_grid_iq1_s[index];
    for (int k = 0; k < 8; k++)
        out[k] = dl * ((float)(int8_t)(row >> 8 * k) + (down ? -0.125f : 0.125f));
}

void quant_to_float_iq1_s(const void *blocks, float *out, int64_t n)
{
    const struct block_iq1_s *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int k = 0; k < 32; k++, out += 8) {
            int qh = b->qh[k / 4];
            float dl = q_half(b->d) * (float)(2 * (qh >> 12 & 7) + 1);
            put_shifted(out, dl, b->qs[k] | (qh >> k % 4 * 3 & 7) << 8, qh & 0x8000);
        }
}

void quant_to_float_iq1_m(const void *blocks, float *out, int64_t n)
{
    const struct block_iq1_m *b = blocks;
    for (; n > 0; n -= 256, b++) {
        uint16_t word[4];
        memcpy(word, b->scales, sizeof word);
        float d =
            q_half((uint16_t)(word[0] >> 12 | (word[1] >> 12) << 4 | (word[2] >> 12) << 8 | (word[3] >> 12) << 12));
        for (int k = 0; k < 32; k++, out += 8) {
            int scale = word[k / 8] >> (k / 2 % 4 * 3) & 7;
            int qh = b->qh[k / 2] >> k % 2 * 4;
            put_shifted(out, d * (float)(2 * scale + 1), b->qs[k] | (qh & 7) << 8, qh & 8);
        }
    }
}

void quant_to_float_iq4_nl(const void *blocks, float *out, int64_t n)
{
    const struct block_iq4_nl *b = blocks;
    for (; n > 0; n -= 32, b++, out += 32) {
        float d = q_half(b->d);
        for (int k = 0; k < 16; k++) {
            out[k] = d * (float)iq_grid_iq4_levels[b->qs[k] & 15];
            out[k + 16] = d * (float)iq_grid_iq4_levels[b->qs[k] >> 4];
        }
    }
}

/* Scale of group 0..7 of IQ4_XS. */
static int iq4_xs_scale(const struct block_iq4_xs *b, int group)
{
    int low = b->scales_l[group / 2] >> group % 2 * 4 & 15;
    return (low | (b->scales_h >> 2 * group & 3) << 4) - 32;
}

void quant_to_float_iq4_xs(const void *blocks, float *out, int64_t n)
{
    const struct block_iq4_xs *b = blocks;
    for (; n > 0; n -= 256, b++)
        for (int group = 0; group < 8; group++, out += 32) {
            float d = q_half(b->d) * (float)iq4_xs_scale(b, group);
            const uint8_t *qs = b->qs + group * 16;
            for (int k = 0; k < 16; k++) {
                out[k] = d * (float)iq_grid_iq4_levels[qs[k] & 15];
                out[k + 16] = d * (float)iq_grid_iq4_levels[qs[k] >> 4];
            }
        }
}

static const struct q_levels iq4_levels = {16, 0, iq_grid_iq4_levels, 23.5f};

void quant_fit_iq4_nl(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_iq4_nl *b = blocks;
    uint8_t code[32];
    for (; n > 0; n -= 32, b++, x += 32, weights += weights ? 32 : 0) {
        b->d = q_fit_block(&iq4_levels, x, weights, code);
        q_nibbles_pack(code, b->qs);
    }
}

void quant_from_float_iq4_nl(const float *x, void *blocks, int64_t n)
{
    quant_fit_iq4_nl(x, NULL, blocks, n);
}

void quant_fit_iq4_xs(const float *x, const float *weights, void *blocks, int64_t n)
{
    struct block_iq4_xs *b = blocks;
    struct q_fit_signed fit = {.levels = &iq4_levels, .group_len = 32, .scale_lo = -32, .scale_hi = 31};
    for (; n > 0; n -= 256, b++, x += 256, weights += weights ? 256 : 0) {
        q_fit_signed(&fit, x, weights);
        b->d = fit.d;
        b->scales_h = 0;
        memset(b->scales_l, 0, sizeof b->scales_l);
        for (int group = 0; group < 8; group++) {
            int scale = fit.scale[group] + 32;
            b->scales_l[group / 2] |= (uint8_t)((scale & 15) << group % 2 * 4);
            b->scales_h |= (uint16_t)((scale >> 4) << 2 * group);
            q_nibbles_pack(fit.code + group * 32, b->qs + group * 16);
        }
    }
}

void quant_from_float_iq4_xs(const float *x, void *blocks, int64_t n)
{
    quant_fit_iq4_xs(x, NULL, blocks, n);
}
