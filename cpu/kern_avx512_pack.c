/* AVX-512 packing of the types with a float scale per 32 or 16 columns, and the list of all packings (kern_avx512_mat.h). */
#include "cpu/kern_avx512_mat.h"

#include "quant/blocks.h"
#include "quant/iq_grid.h"

/* Walk the blocks of 32 columns: `tile` is filled from the block at byte `off` of each row. */
#define FOR_BLOCKS(type)                                              \
    struct avx512_t32 *tile = p->tile;                                \
    int64_t off = p->col / 32 * (int64_t)sizeof(struct block_##type); \
    for (int n = p->n_cols / 32; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_##type))

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

AVX512_INLINE void store8(struct avx512_t32 *tile, const __m512i q[8])
{
    AVX512_UNROLL
    for (int i = 0; i < 8; i++)
        avx512_store(tile->q[i], q[i]);
}

/* 16 bytes of nibbles: columns 0..15 low, 16..31 high. */
AVX512_INLINE void nibbles(const uint8_t *const row[16], int64_t off, __m512i q[8])
{
    __m512i v[4];
    avx512_rows16(row, off, v);
    AVX512_UNROLL
    for (int i = 0; i < 4; i++) {
        q[i] = avx512_low4(v[i]);
        q[i + 4] = avx512_high4(v[i]);
    }
}

/* The first 16 bytes of a block, of which few are wanted: the shuffles for the others fall away. */
AVX512_INLINE __m512i heads(const struct avx512_pack *p, int64_t off, const int word)
{
    __m512i v[4];
    avx512_rows16(p->row, off, v);
    return v[word];
}

AVX512_INLINE void store_d(float *d, __m512i heads)
{
    _mm512_store_ps(d, avx512_low_half(heads));
}

static void pack_q4_0(const struct avx512_pack *p)
{
    FOR_BLOCKS(q4_0)
    {
        __m512i q[8];
        avx512_prefetch(p, off, sizeof(struct block_q4_0));
        nibbles(p->row, off + OFF(q4_0, qs), q);
        store8(tile, q);
        store_d(tile->d[0], heads(p, off, 0));
    }
}

static void pack_q4_1(const struct avx512_pack *p)
{
    FOR_BLOCKS(q4_1)
    {
        __m512i q[8], head = heads(p, off, 0);
        avx512_prefetch(p, off, sizeof(struct block_q4_1));
        nibbles(p->row, off + OFF(q4_1, qs), q);
        store8(tile, q);
        store_d(tile->d[0], head);
        _mm512_store_ps(tile->m, avx512_high_half(head));
    }
}

/* Put bit i of each lane of `bits` into the code of column i as its fifth. */
AVX512_INLINE void add_fifth_bits(__m512i bits, __m512i q[8])
{
    __m512i one_low = _mm512_set1_epi32(0x08040201), one_high = _mm512_set1_epi32((int)0x80402010);
    __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    AVX512_UNROLL
    for (int i = 0; i < 8; i++) {
        __m512i byte = _mm512_shuffle_epi8(bits, _mm512_add_epi8(spread, _mm512_set1_epi8((char)(i / 2))));
        __mmask64 is_set = _mm512_test_epi8_mask(byte, i % 2 ? one_high : one_low); /* a bit of its own for each byte */
        q[i] = _mm512_mask_add_epi8(q[i], is_set, q[i], _mm512_set1_epi8(16));
    }
}

static void pack_q5_0(const struct avx512_pack *p)
{
    FOR_BLOCKS(q5_0)
    {
        __m512i q[8], head[4];
        avx512_prefetch(p, off, sizeof(struct block_q5_0));
        avx512_rows16(p->row, off, head);
        nibbles(p->row, off + OFF(q5_0, qs), q);
        /* the four bytes of qh lie across two words */
        add_fifth_bits(_mm512_or_si512(_mm512_srli_epi32(head[0], 16), _mm512_slli_epi32(head[1], 16)), q);
        store8(tile, q);
        store_d(tile->d[0], head[0]);
    }
}

static void pack_q5_1(const struct avx512_pack *p)
{
    FOR_BLOCKS(q5_1)
    {
        __m512i q[8], head[4];
        avx512_prefetch(p, off, sizeof(struct block_q5_1));
        avx512_rows16(p->row, off, head);
        nibbles(p->row, off + OFF(q5_1, qs), q);
        add_fifth_bits(head[1], q);
        store8(tile, q);
        store_d(tile->d[0], head[0]);
        _mm512_store_ps(tile->m, avx512_high_half(head[0]));
    }
}

static void pack_q8_0(const struct avx512_pack *p)
{
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    FOR_BLOCKS(q8_0)
    {
        __m512i q[8];
        avx512_prefetch(p, off, sizeof(struct block_q8_0));
        avx512_rows16(p->row, off + OFF(q8_0, qs), q);
        avx512_rows16(p->row, off + OFF(q8_0, qs) + 16, q + 4);
        AVX512_UNROLL
        for (int i = 0; i < 8; i++)
            avx512_store(tile->q[i], _mm512_xor_si512(q[i], sign));
        store_d(tile->d[0], heads(p, off, 0));
    }
}

/* Nibbles replaced by levels. */
AVX512_INLINE void store_levels(struct avx512_t32 *tile, const __m512i q[8], __m512i levels)
{
    AVX512_UNROLL
    for (int i = 0; i < 8; i++)
        avx512_store(tile->q[i], _mm512_shuffle_epi8(levels, q[i]));
}

static void pack_iq4_nl(const struct avx512_pack *p)
{
    const __m512i levels = avx512_iq4_levels();
    FOR_BLOCKS(iq4_nl)
    {
        __m512i q[8];
        avx512_prefetch(p, off, sizeof(struct block_iq4_nl));
        nibbles(p->row, off + OFF(iq4_nl, qs), q);
        store_levels(tile, q, levels);
        store_d(tile->d[0], heads(p, off, 0));
    }
}

static void pack_mxfp4(const struct avx512_pack *p)
{
    const __m512i levels = avx512_fp4_levels();
    FOR_BLOCKS(mxfp4)
    {
        __m512i q[8];
        avx512_prefetch(p, off, sizeof(struct block_mxfp4));
        nibbles(p->row, off + OFF(mxfp4, qs), q);
        store_levels(tile, q, levels);
        _mm512_store_ps(tile->d[0], avx512_e8m0_half(avx512_byte_of(heads(p, off, 0), 0)));
    }
}

/* A block of 64 columns is two packed ones. A group of 16 has 8 bytes: low nibbles are its columns 0..7. */
static void pack_nvfp4(const struct avx512_pack *p)
{
    const __m512i levels = avx512_fp4_levels();
    struct avx512_t32 *tile = p->tile;
    int64_t off = p->col / 64 * (int64_t)sizeof(struct block_nvfp4);
    for (int n = p->n_cols / 64; n > 0; n--, off += (int64_t)sizeof(struct block_nvfp4)) {
        __m512i scales = heads(p, off, 0);
        avx512_prefetch(p, off, sizeof(struct block_nvfp4));
        AVX512_UNROLL
        for (int half = 0; half < 2; half++, tile++) {
            __m512i v[4];
            avx512_rows16(p->row, off + OFF(nvfp4, qs) + half * 16, v);
            AVX512_UNROLL
            for (int i = 0; i < 4; i++) {
                int to = i / 2 * 4 + i % 2;
                avx512_store(tile->q[to], _mm512_shuffle_epi8(levels, avx512_low4(v[i])));
                avx512_store(tile->q[to + 2], _mm512_shuffle_epi8(levels, avx512_high4(v[i])));
            }
            _mm512_store_ps(tile->d[0], avx512_ue4m3_half(avx512_byte_of(scales, half * 2)));
            _mm512_store_ps(tile->d[1], avx512_ue4m3_half(avx512_byte_of(scales, half * 2 + 1)));
        }
    }
}

const struct avx512_type kern_avx512_pack[QUANT_ID_END] = {
    [QUANT_Q4_0] = {pack_q4_0, AVX512_t32_a8_off, 8},
    [QUANT_Q4_1] = {pack_q4_1, AVX512_t32_a8_min, 0},
    [QUANT_Q5_0] = {pack_q5_0, AVX512_t32_a4_off, 16},
    [QUANT_Q5_1] = {pack_q5_1, AVX512_t32_a4_min, 0},
    [QUANT_Q8_0] = {pack_q8_0, AVX512_t32_s_off, 0},
    [QUANT_IQ4_NL] = {pack_iq4_nl, AVX512_t32_s_off, 0},
    [QUANT_MXFP4] = {pack_mxfp4, AVX512_t32_a4_off, 12},
    [QUANT_NVFP4] = {pack_nvfp4, AVX512_t32_part16_off, 12},
    [QUANT_Q2_K] = {kern_avx512_pack_q2_k, AVX512_t256_s16_a4_min, 0},
    [QUANT_Q3_K] = {kern_avx512_pack_q3_k, AVX512_t256_s16_a2_off, 0},
    [QUANT_Q4_K] = {kern_avx512_pack_q4_k, AVX512_t256_s32_a8_min, 0},
    [QUANT_Q5_K] = {kern_avx512_pack_q5_k, AVX512_t256_s32_a4_min, 0},
    [QUANT_Q6_K] = {kern_avx512_pack_q6_k, AVX512_t256_s16_a2_off, 0},
    [QUANT_IQ1_M] = {kern_avx512_pack_iq1_m, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ1_S] = {kern_avx512_pack_iq1_s, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ2_S] = {kern_avx512_pack_iq2_s, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ2_XS] = {kern_avx512_pack_iq2_xs, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ2_XXS] = {kern_avx512_pack_iq2_xxs, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ3_S] = {kern_avx512_pack_iq3_s, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ3_XXS] = {kern_avx512_pack_iq3_xxs, AVX512_t256_s16_a1_off, 0},
    [QUANT_IQ4_XS] = {kern_avx512_pack_iq4_xs, AVX512_t256_s16_s_off, 0},
    [QUANT_TQ1_0] = {kern_avx512_pack_tq1_0, AVX512_t256_s16_a1_off, 0},
    [QUANT_TQ2_0] = {kern_avx512_pack_tq2_0, AVX512_t256_s16_a2_off, 0},
};
