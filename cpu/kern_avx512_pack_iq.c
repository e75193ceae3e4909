/* AVX-512 packing of the code-book types and TQ1_0 (kern_avx512_mat.h). Rows are unpacked one at a time by the AVX2 functions,
 * since looking up a book is the work there, and wider vectors do not help. */
#include "cpu/kern_avx512_mat.h"

#include "quant/blocks.h"

#include "cpu/kern_avx2_mat.h"

/* Codes are packed this much too large, which makes them unsigned: no book has more than 62. */
enum { CODE_OFF = 64 };

/* Two words of 16 bits of 16 rows in each lane of out: words 2i and 2i + 1 in out[i]. */
AVX512_INLINE void words16(const struct kern_mat_block b[16], __m512i out[8])
{
    const uint8_t *row[16];
    for (int r = 0; r < 16; r++)
        row[r] = (const uint8_t *)b[r].scale;
    avx512_rows16(row, 0, out);
    avx512_rows16(row, 16, out + 4);
}

/* Bytes and scales of 16 rows into a packed tile. */
static void pack_bytes(const struct kern_mat_block b[16], struct avx512_t256 *tile)
{
    const uint8_t *row[16];
    __m512i scale[8];
    words16(b, scale);
    AVX512_UNROLL
    for (int j = 0; j < 8; j++) {
        avx512_store(tile->min[j], _mm512_mullo_epi16(scale[j], _mm512_set1_epi16(CODE_OFF)));
        avx512_store(tile->scale[2 * j], _mm512_srai_epi32(_mm512_slli_epi32(scale[j], 16), 16));
        avx512_store(tile->scale[2 * j + 1], _mm512_srai_epi32(scale[j], 16));
    }
    for (int r = 0; r < 16; r++) {
        row[r] = (const uint8_t *)b[r].q;
        tile->d[r] = b[r].d;
    }
    for (int j = 0; j < 16; j++) {
        __m512i v[4];
        avx512_rows16(row, j * 16, v);
        AVX512_UNROLL
        for (int i = 0; i < 4; i++)
            avx512_store(tile->q[j * 4 + i], _mm512_add_epi8(v[i], _mm512_set1_epi8(CODE_OFF)));
    }
}

#define PACK_BYTES(type)                                                                                 \
    void kern_avx512_pack_##type(const struct avx512_pack *p)                                            \
    {                                                                                                    \
        struct avx512_t256 *tile = p->tile;                                                              \
        int64_t off = p->col / 256 * (int64_t)sizeof(struct block_##type);                               \
        for (int n = p->n_cols / 256; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_##type)) { \
            struct kern_mat_block b[16];                                                                 \
            avx512_prefetch(p, off, sizeof(struct block_##type));                                        \
            for (int r = 0; r < 16; r++)                                                                 \
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
AVX512_INLINE void group_iq4_xs(const struct avx512_pack *p, int64_t off, const __m512i word[2], const int g,
                                struct avx512_t256 *tile)
{
    const __m512i levels = avx512_iq4_levels();
    __m512i v[4];
    __m512i low = _mm512_and_si512(_mm512_srli_epi32(word[1], (unsigned)(4 * g)), _mm512_set1_epi32(15));
    __m512i high = _mm512_and_si512(_mm512_srli_epi32(word[0], (unsigned)(12 + 2 * g)), _mm512_set1_epi32(48));
    __m512i scale = _mm512_sub_epi32(_mm512_or_si512(low, high), _mm512_set1_epi32(32));
    __m512i off128 = _mm512_and_si512(_mm512_slli_epi32(scale, 7), _mm512_set1_epi32(0xffff));
    avx512_store(tile->scale[2 * g], scale);
    avx512_store(tile->scale[2 * g + 1], scale);
    avx512_store(tile->min[g], _mm512_or_si512(off128, _mm512_slli_epi32(off128, 16)));
    avx512_rows16(p->row, off + (int64_t)offsetof(struct block_iq4_xs, qs) + g * 16, v);
    AVX512_UNROLL
    for (int i = 0; i < 4; i++) {
        avx512_store(tile->q[g * 8 + i], _mm512_shuffle_epi8(levels, avx512_low4(v[i])));
        avx512_store(tile->q[g * 8 + 4 + i], _mm512_shuffle_epi8(levels, avx512_high4(v[i])));
    }
}

void kern_avx512_pack_iq4_xs(const struct avx512_pack *p)
{
    struct avx512_t256 *tile = p->tile;
    int64_t off = p->col / 256 * (int64_t)sizeof(struct block_iq4_xs);
    for (int n = p->n_cols / 256; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_iq4_xs)) {
        __m512i head[4];
        avx512_prefetch(p, off, sizeof(struct block_iq4_xs));
        avx512_rows16(p->row, off, head);
        AVX512_UNROLL
        for (int g = 0; g < 8; g++)
            group_iq4_xs(p, off, head, g, tile);
        _mm512_store_ps(tile->d, avx512_low_half(head[0]));
    }
}
