/* K-quants: super-blocks of 256 elements with a half scale (and minimum) above the small integer ones of each group.
 * Products are taken in the order scale first, element last, as in the `gguf` package, which fixes the bits. */
#include "quant/blocks.h"
#include "quant/q_impl.h"

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
