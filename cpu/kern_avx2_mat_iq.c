/* AVX2 packing of the code-book types and TQ1_0 (kern_avx2_mat.h). */
#include "cpu/kern_avx2_mat.h"

#include "quant/blocks.h"
#include "quant/iq_grid.h"

/* Any type of 256 columns through its reference unpacker. */
static void pack_unpacked(const struct avx2_pack *p, enum quant_type type)
{
    const struct kern_mat_layout *layout = kern_ref_mat_layout(type);
    struct avx2_s256 *tile = p->tile;
    int64_t off = p->col / 256 * layout->block_bytes;
    for (int n = p->n_cols / 256; n > 0; n--, tile++, off += layout->block_bytes) {
        struct kern_mat_block b[8];
        const uint8_t *row[8];
        AVX2_UNROLL
        for (int r = 0; r < 8; r++) {
            layout->unpack(p->row[r] + off, 0, &b[r]);
            row[r] = (const uint8_t *)b[r].q;
            tile->d[r] = b[r].d;
        }
        AVX2_UNROLL
        for (int j = 0; j < 16; j++) {
            __m256i v[4], factor;
            avx2_rows16(row, j * 16, v);
            factor = _mm256_setr_epi32(b[0].scale[j], b[1].scale[j], b[2].scale[j], b[3].scale[j], b[4].scale[j],
                                       b[5].scale[j], b[6].scale[j], b[7].scale[j]);
            factor = avx2_pick16(factor);
            AVX2_UNROLL
            for (int i = 0; i < 4; i++)
                avx2_widen_times(v[i], factor, tile->q + j * 8 + i * 2);
        }
    }
}

#define PACK_UNPACKED(NAME, fn)                                                                                        \
    static void pack_##fn(const struct avx2_pack *p)                                                                   \
    {                                                                                                                  \
        pack_unpacked(p, QUANT_##NAME);                                                                                \
    }
PACK_UNPACKED(TQ1_0, tq1_0)
PACK_UNPACKED(IQ1_S, iq1_s)
PACK_UNPACKED(IQ1_M, iq1_m)
PACK_UNPACKED(IQ2_XXS, iq2_xxs)
PACK_UNPACKED(IQ2_XS, iq2_xs)
PACK_UNPACKED(IQ2_S, iq2_s)
PACK_UNPACKED(IQ3_XXS, iq3_xxs)
PACK_UNPACKED(IQ3_S, iq3_s)
PACK_UNPACKED(IQ4_XS, iq4_xs)

AVX2_MAT(tq1_0, s256, 54, 256)
AVX2_MAT(iq1_s, s256, 50, 256)
AVX2_MAT(iq1_m, s256, 56, 256)
AVX2_MAT(iq2_xxs, s256, 66, 256)
AVX2_MAT(iq2_xs, s256, 74, 256)
AVX2_MAT(iq2_s, s256, 82, 256)
AVX2_MAT(iq3_xxs, s256, 98, 256)
AVX2_MAT(iq3_s, s256, 110, 256)
AVX2_MAT(iq4_xs, s256, 136, 256)
