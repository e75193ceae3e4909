/* AVX2 packing of the code-book types and TQ1_0 (kern_avx2_mat.h). Book rows are looked up a weight row at a time; the
 * bytes so made are then packed like those of any other type, times their scales. */
#include "cpu/kern_avx2_mat.h"

#include <string.h>

#include "quant/blocks.h"
#include "quant/iq_grid.h"

#define BLOCK_HERE(type)   \
    struct block_##type b; \
    memcpy(&b, block, sizeof b)

AVX2_INLINE float half_of(uint16_t h)
{
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

AVX2_INLINE uint32_t word_of(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, sizeof w);
    return w;
}

AVX2_INLINE void put32(int8_t *q, __m256i v)
{
    _mm256_storeu_si256((__m256i *)q, v);
}

/* All bits of every byte whose bit is set: bit k of `bits` is byte k's. */
AVX2_INLINE __m256i mask_of(uint32_t bits)
{
    __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                      3, 3, 3, 3, 3);
    __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i v = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), spread);
    return _mm256_cmpeq_epi8(_mm256_and_si256(v, one), one);
}

AVX2_INLINE __m256i negate(__m256i v, uint32_t signs)
{
    __m256i m = mask_of(signs);
    return _mm256_sub_epi8(_mm256_xor_si256(v, m), m);
}

/* The four indices of 7 sign bits in the low 28 bits of w, each with its parity above: iq_grid_signs(), four at once. */
AVX2_INLINE uint32_t signs_of(uint32_t w)
{
    uint32_t x = (w & 0x7f) | (w << 1 & 0x7f00) | (w << 2 & 0x7f0000) | (w << 3 & 0x7f000000);
    uint32_t p = x ^ (x >> 4 & 0x0f0f0f0f);
    p ^= p >> 2 & 0x03030303;
    p ^= p >> 1 & 0x01010101;
    return x | (p & 0x01010101) << 7;
}

AVX2_INLINE __m256i book8(const uint64_t *book, uint32_t i0, uint32_t i1, uint32_t i2, uint32_t i3)
{
    return _mm256_setr_epi64x((long long)book[i0], (long long)book[i1], (long long)book[i2], (long long)book[i3]);
}

void kern_avx2_unpack_iq2_xxs(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq2_xxs);
    out->d = half_of(b.d) * 0.125f;
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = b.qs + g * 8;
        uint32_t w = word_of(i + 4);
        out->scale[2 * g] = out->scale[2 * g + 1] = (int16_t)(2 * (w >> 28) + 1);
        put32(out->q + g * 32, negate(book8(iq_grid_iq2_xxs, i[0], i[1], i[2], i[3]), signs_of(w)));
    }
}

/* Scales of IQ2_XS and IQ2_S. */
AVX2_INLINE void scales_iq2(const uint8_t *scales, struct kern_mat_block *out)
{
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (scales[j / 2] >> j % 2 * 4 & 15) + 1);
}

void kern_avx2_unpack_iq2_xs(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq2_xs);
    out->d = half_of(b.d) * 0.125f;
    scales_iq2(b.scales, out);
    for (int g = 0; g < 8; g++) {
        const uint16_t *i = b.qs + g * 4;
        uint32_t w = (uint32_t)(i[0] >> 9 | (i[1] >> 9) << 7 | (i[2] >> 9) << 14 | (i[3] >> 9) << 21);
        __m256i v = book8(iq_grid_iq2_xs, i[0] & 511, i[1] & 511, i[2] & 511, i[3] & 511);
        put32(out->q + g * 32, negate(v, signs_of(w)));
    }
}

void kern_avx2_unpack_iq2_s(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq2_s);
    out->d = half_of(b.d) * 0.125f;
    scales_iq2(b.scales, out);
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = b.qs + g * 4;
        uint32_t h = b.qh[g];
        __m256i v = book8(iq_grid_iq2_s, i[0] | (h << 8 & 768), i[1] | (h << 6 & 768), i[2] | (h << 4 & 768),
                          i[3] | (h << 2 & 768));
        put32(out->q + g * 32, negate(v, word_of(b.signs + g * 4)));
    }
}

void kern_avx2_unpack_iq3_xxs(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq3_xxs);
    const uint32_t *book = iq_grid_iq3_xxs;
    out->d = half_of(b.d) * 0.25f;
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = b.qs + g * 8;
        uint32_t w = word_of(b.scales + g * 4);
        out->scale[2 * g] = out->scale[2 * g + 1] = (int16_t)(2 * (w >> 28) + 1);
        __m256i v = _mm256_setr_epi32((int)book[i[0]], (int)book[i[1]], (int)book[i[2]], (int)book[i[3]],
                                      (int)book[i[4]], (int)book[i[5]], (int)book[i[6]], (int)book[i[7]]);
        put32(out->q + g * 32, negate(v, signs_of(w)));
    }
}

void kern_avx2_unpack_iq3_s(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq3_s);
    out->d = half_of(b.d);
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (b.scales[j / 4] >> j / 2 % 2 * 4 & 15) + 1);
    for (int g = 0; g < 8; g++) {
        int row[8], h = b.qh[g];
        AVX2_UNROLL
        for (int k = 0; k < 8; k++)
            row[k] = (int)iq_grid_iq3_s[b.qs[g * 8 + k] | (h << (8 - k) & 256)];
        __m256i v = _mm256_setr_epi32(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]);
        put32(out->q + g * 32, negate(v, word_of(b.signs + g * 4)));
    }
}

/* Eighths of an IQ1 book row, shifted by one down where `down` is set, else up. */
AVX2_INLINE __m256i shifted(__m256i v, __m256i down)
{
    v = _mm256_add_epi8(v, v);
    v = _mm256_add_epi8(v, v);
    return _mm256_add_epi8(_mm256_add_epi8(v, v), _mm256_or_si256(down, _mm256_set1_epi8(1)));
}

void kern_avx2_unpack_iq1_s(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq1_s);
    out->d = half_of(b.d) * 0.125f;
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = b.qs + g * 4;
        uint32_t h = b.qh[g];
        __m256i v = book8(iq_grid_iq1_s, i[0] | (h << 8 & 0x700), i[1] | (h << 5 & 0x700), i[2] | (h << 2 & 0x700),
                          i[3] | (h >> 1 & 0x700));
        out->scale[2 * g] = out->scale[2 * g + 1] = (int16_t)(2 * (h >> 12 & 7) + 1);
        put32(out->q + g * 32, shifted(v, _mm256_set1_epi8(h & 0x8000 ? -1 : 0)));
    }
}

void kern_avx2_unpack_iq1_m(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(iq1_m);
    uint16_t w[4];
    memcpy(w, b.scales, sizeof w);
    out->d = half_of((uint16_t)(w[0] >> 12 | (w[1] >> 8 & 0xf0) | (w[2] >> 4 & 0xf00) | (w[3] & 0xf000))) * 0.125f;
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int16_t)(2 * (w[j / 4] >> j % 4 * 3 & 7) + 1);
    for (int g = 0; g < 8; g++) {
        const uint8_t *i = b.qs + g * 4;
        uint32_t h = b.qh[2 * g] | (uint32_t)b.qh[2 * g + 1] << 8;
        __m256i v = book8(iq_grid_iq1_s, i[0] | (h << 8 & 0x700), i[1] | (h << 4 & 0x700), i[2] | (h & 0x700),
                          i[3] | (h >> 4 & 0x700));
        uint32_t down = (h & 8 ? 0xffu : 0) | (h & 0x80 ? 0xff00u : 0) | (h & 0x800 ? 0xff0000u : 0) |
                        (h & 0x8000 ? 0xff000000u : 0);
        put32(out->q + g * 32, shifted(v, mask_of(down)));
    }
}

/* The first base-3 digit of each fraction of 256, less 1: 0 below 256/3, 1 below 512/3, else 2. */
AVX2_INLINE __m256i first_digit(__m256i v)
{
    __m256i some = _mm256_cmpeq_epi8(_mm256_max_epu8(v, _mm256_set1_epi8(86)), v);
    __m256i two = _mm256_cmpeq_epi8(_mm256_max_epu8(v, _mm256_set1_epi8((char)171)), v);
    return _mm256_sub_epi8(_mm256_set1_epi8(-1), _mm256_add_epi8(some, two));
}

/* Drop that digit. */
AVX2_INLINE __m256i next_digit(__m256i v)
{
    return _mm256_add_epi8(_mm256_add_epi8(v, v), v);
}

void kern_avx2_unpack_tq1_0(const uint8_t *block, struct kern_mat_block *out)
{
    BLOCK_HERE(tq1_0);
    out->d = half_of(b.d);
    for (int j = 0; j < 16; j++)
        out->scale[j] = 1;
    __m256i v = _mm256_loadu_si256((const __m256i *)b.qs);
    for (int k = 0; k < 5; k++, v = next_digit(v))
        put32(out->q + k * 32, first_digit(v));
    v = _mm256_castsi128_si256(avx2_load16(b.qs + 32));
    for (int k = 0; k < 5; k++, v = next_digit(v))
        _mm_storeu_si128((__m128i *)(out->q + 160 + k * 16), _mm256_castsi256_si128(first_digit(v)));
    v = _mm256_set1_epi32((int)word_of(b.qh));
    for (int k = 0; k < 4; k++, v = next_digit(v)) {
        int32_t q = _mm256_extract_epi32(first_digit(v), 0);
        memcpy(out->q + 240 + k * 4, &q, sizeof q);
    }
}

/* Bytes and scales of 8 rows into a packed tile. */
static void pack_bytes(const struct kern_mat_block b[8], struct avx2_s256 *tile)
{
    const uint8_t *row[8], *scale_row[8];
    __m256i scale[8];
    for (int r = 0; r < 8; r++) {
        row[r] = (const uint8_t *)b[r].q;
        scale_row[r] = (const uint8_t *)b[r].scale;
        tile->d[r] = b[r].d;
    }
    avx2_rows32(scale_row, 0, scale); /* two scales to a lane */
    AVX2_UNROLL
    for (int j = 0; j < 16; j++) {
        __m256i v[4], factor = avx2_pick16(j % 2 ? _mm256_srli_epi32(scale[j / 2], 16) : scale[j / 2]);
        avx2_rows16(row, j * 16, v);
        AVX2_UNROLL
        for (int i = 0; i < 4; i++)
            avx2_widen_times(v[i], factor, tile->q + j * 8 + i * 2);
    }
}

#define PACK_BYTES(type)                                                                                 \
    static void pack_##type(const struct avx2_pack *p)                                                   \
    {                                                                                                    \
        struct avx2_s256 *tile = p->tile;                                                                \
        int64_t off = p->col / 256 * (int64_t)sizeof(struct block_##type);                               \
        for (int n = p->n_cols / 256; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_##type)) { \
            struct kern_mat_block b[8];                                                                  \
            avx2_prefetch(p, off, sizeof(struct block_##type));                                          \
            for (int r = 0; r < 8; r++)                                                                  \
                kern_avx2_unpack_##type(p->row[r] + off, &b[r]);                                         \
            pack_bytes(b, tile);                                                                         \
        }                                                                                                \
    }
PACK_BYTES(tq1_0)
PACK_BYTES(iq1_s)
PACK_BYTES(iq1_m)
PACK_BYTES(iq2_xxs)
PACK_BYTES(iq2_xs)
PACK_BYTES(iq2_s)
PACK_BYTES(iq3_xxs)
PACK_BYTES(iq3_s)

/* Levels are looked up after the nibbles have come together. The low nibbles of group g's scale are bits 4g of the second
 * word, the upper two bits are bits 16 + 2g of the first. */
AVX2_INLINE void group_iq4_xs(const struct avx2_pack *p, int64_t off, __m256i word[2], const int g,
                              struct avx2_s256 *tile)
{
    __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)iq_grid_iq4_levels)), v[4];
    __m256i low = _mm256_and_si256(_mm256_srli_epi32(word[1], 4 * g), _mm256_set1_epi32(15));
    __m256i high = _mm256_and_si256(_mm256_srli_epi32(word[0], 12 + 2 * g), _mm256_set1_epi32(48));
    __m256i scale = avx2_pick16(_mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32)));
    avx2_rows16(p->row, off + (int64_t)offsetof(struct block_iq4_xs, qs) + g * 16, v);
    AVX2_UNROLL
    for (int i = 0; i < 4; i++) {
        avx2_widen_times(_mm256_shuffle_epi8(levels, avx2_low4(v[i])), scale, tile->q + g * 16 + i * 2);
        avx2_widen_times(_mm256_shuffle_epi8(levels, avx2_high4(v[i])), scale, tile->q + g * 16 + 8 + i * 2);
    }
}

static void pack_iq4_xs(const struct avx2_pack *p)
{
    struct avx2_s256 *tile = p->tile;
    int64_t off = p->col / 256 * (int64_t)sizeof(struct block_iq4_xs);
    for (int n = p->n_cols / 256; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_iq4_xs)) {
        avx2_prefetch(p, off, sizeof(struct block_iq4_xs));
        __m256i word[2] = {avx2_rows4(p->row, off), avx2_rows4(p->row, off + 4)};
        AVX2_UNROLL
        for (int g = 0; g < 8; g++)
            group_iq4_xs(p, off, word, g, tile);
        _mm256_store_ps(tile->d, avx2_rows_half(p->row, off));
    }
}

AVX2_MAT_VEC(tq1_0, s256)
AVX2_MAT_VEC(iq1_s, s256)
AVX2_MAT_VEC(iq1_m, s256)
AVX2_MAT_VEC(iq2_xxs, s256)
AVX2_MAT_VEC(iq2_xs, s256)
AVX2_MAT_VEC(iq2_s, s256)
AVX2_MAT_VEC(iq3_xxs, s256)
AVX2_MAT_VEC(iq3_s, s256)
AVX2_MAT_VEC(iq4_xs, s256)
