/* AVX2 packing of the types with a float scale per 32 or 16 columns (kern_avx2_mat.h). */
#include "cpu/kern_avx2_mat.h"

#include "quant/blocks.h"
#include "quant/iq_grid.h"

/* Walk the blocks of 32 columns: `tile` is filled from the block at byte `off` of each row. */
#define FOR_BLOCKS(form, type)                                        \
    struct form *tile = p->tile;                                      \
    int64_t off = p->col / 32 * (int64_t)sizeof(struct block_##type); \
    for (int n = p->n_cols / 32; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_##type))

/* 16 bytes of nibbles: columns 0..15 low, 16..31 high. */
AVX2_INLINE void nibbles(const uint8_t *const row[8], int64_t off, __m256i q[8])
{
    __m256i v[4];
    avx2_rows16(row, off, v);
    AVX2_UNROLL
    for (int i = 0; i < 4; i++) {
        q[i] = avx2_low4(v[i]);
        q[i + 4] = avx2_high4(v[i]);
    }
}

AVX2_INLINE void store8(struct avx2_u32 *tile, const __m256i q[8])
{
    AVX2_UNROLL
    for (int i = 0; i < 8; i++)
        avx2_store(tile->q[i], q[i]);
}

static void pack_q4_0(const struct avx2_pack *p)
{
    FOR_BLOCKS(avx2_u32, q4_0)
    {
        avx2_prefetch(p, off, sizeof(struct block_q4_0));
        __m256i q[8];
        nibbles(p->row, off + 2, q);
        store8(tile, q);
        _mm256_store_ps(tile->d, avx2_rows_half(p->row, off));
    }
}

static void pack_q4_1(const struct avx2_pack *p)
{
    FOR_BLOCKS(avx2_u32, q4_1)
    {
        avx2_prefetch(p, off, sizeof(struct block_q4_1));
        __m256i q[8];
        nibbles(p->row, off + 4, q);
        store8(tile, q);
        avx2_two_halves(avx2_rows4(p->row, off), tile->d, tile->m, _mm256_setzero_ps());
    }
}

/* Put bit i of each lane of `bits` into the code of column i as its fifth. */
AVX2_INLINE void add_fifth_bits(__m256i bits, __m256i q[8])
{
#define SPREAD(k) (char)(k), (char)(k), (char)(k), (char)(k)
#define SPREAD4(k) SPREAD(k), SPREAD(4 + (k)), SPREAD(8 + (k)), SPREAD(12 + (k))
    AVX2_UNROLL
    for (int i = 0; i < 8; i++) {
        __m256i byte = _mm256_shuffle_epi8(bits, _mm256_setr_epi8(SPREAD4(i / 2), SPREAD4(i / 2)));
        __m256i one = _mm256_set1_epi32(i % 2 ? (int)0x80402010 : 0x08040201); /* a bit of its own for each byte */
        __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(byte, one), one);
        q[i] = _mm256_or_si256(q[i], _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
    }
#undef SPREAD4
#undef SPREAD
}

static void pack_q5_0(const struct avx2_pack *p)
{
    FOR_BLOCKS(avx2_u32, q5_0)
    {
        avx2_prefetch(p, off, sizeof(struct block_q5_0));
        __m256i q[8];
        nibbles(p->row, off + 6, q);
        add_fifth_bits(avx2_rows4(p->row, off + 2), q);
        store8(tile, q);
        _mm256_store_ps(tile->d, avx2_rows_half(p->row, off));
    }
}

static void pack_q5_1(const struct avx2_pack *p)
{
    FOR_BLOCKS(avx2_u32, q5_1)
    {
        avx2_prefetch(p, off, sizeof(struct block_q5_1));
        __m256i q[8];
        nibbles(p->row, off + 8, q);
        add_fifth_bits(avx2_rows4(p->row, off + 4), q);
        store8(tile, q);
        avx2_two_halves(avx2_rows4(p->row, off), tile->d, tile->m, _mm256_setzero_ps());
    }
}

static void pack_q8_0(const struct avx2_pack *p)
{
    FOR_BLOCKS(avx2_s32, q8_0)
    {
        avx2_prefetch(p, off, sizeof(struct block_q8_0));
        __m256i q[8];
        avx2_rows32(p->row, off + 2, q);
        AVX2_UNROLL
        for (int i = 0; i < 8; i++)
            avx2_widen(q[i], tile->q + 2 * i);
        _mm256_store_ps(tile->d[0], avx2_rows_half(p->row, off));
    }
}

AVX2_INLINE __m256i table16(const int8_t *t)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)t));
}

static void pack_iq4_nl(const struct avx2_pack *p)
{
    __m256i levels = table16(iq_grid_iq4_levels);
    FOR_BLOCKS(avx2_s32, iq4_nl)
    {
        avx2_prefetch(p, off, sizeof(struct block_iq4_nl));
        __m256i q[8];
        nibbles(p->row, off + 2, q);
        AVX2_UNROLL
        for (int i = 0; i < 8; i++)
            avx2_widen(_mm256_shuffle_epi8(levels, q[i]), tile->q + 2 * i);
        _mm256_store_ps(tile->d[0], avx2_rows_half(p->row, off));
    }
}

/* E2M1 doubled. MXFP4 is packed 12 too large, to be unsigned. */
static const int8_t fp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static void pack_mxfp4(const struct avx2_pack *p)
{
    __m256i levels = _mm256_add_epi8(table16(fp4_levels), _mm256_set1_epi8(12));
    FOR_BLOCKS(avx2_u32, mxfp4)
    {
        avx2_prefetch(p, off, sizeof(struct block_mxfp4));
        __m256i q[8];
        nibbles(p->row, off + 1, q);
        AVX2_UNROLL
        for (int i = 0; i < 8; i++)
            avx2_store(tile->q[i], _mm256_shuffle_epi8(levels, q[i]));
        __m256i e = _mm256_and_si256(avx2_rows4(p->row, off), _mm256_set1_epi32(255));
        _mm256_store_ps(tile->d, avx2_e8m0_half(e));
    }
}

/* Half of the unsigned E4M3 in byte k of each lane; its NaN counts as 0. */
AVX2_INLINE __m256 ue4m3_half(__m256i v, int k)
{
    __m256i x = _mm256_and_si256(_mm256_srli_epi32(v, 8 * k), _mm256_set1_epi32(0xff));
    __m256i low7 =
        _mm256_and_si256(x, _mm256_set1_epi32(0x7f)); /* exponent and mantissa; the top bit counts only for NaN */
    __m256i exp = _mm256_srli_epi32(low7, 3), man = _mm256_and_si256(x, _mm256_set1_epi32(7));
    __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(low7, 20), _mm256_set1_epi32(119 << 23));
    __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(man), _mm256_set1_ps(0x1p-10f));
    __m256 is_small = _mm256_castsi256_ps(_mm256_cmpeq_epi32(exp, _mm256_setzero_si256()));
    __m256 is_nan = _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_set1_epi32(0x7f)));
    return _mm256_andnot_ps(is_nan, _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, is_small));
}

/* A block of 64 columns is two packed ones. A group of 16 has 8 bytes: low nibbles are its columns 0..7. */
static void pack_nvfp4(const struct avx2_pack *p)
{
    __m256i levels = table16(fp4_levels);
    struct avx2_s32 *tile = p->tile;
    int64_t off = p->col / 64 * (int64_t)sizeof(struct block_nvfp4);
    for (int n = p->n_cols / 64; n > 0; n--, off += (int64_t)sizeof(struct block_nvfp4)) {
        __m256i scales = avx2_rows4(p->row, off);
        avx2_prefetch(p, off, sizeof(struct block_nvfp4));
        AVX2_UNROLL
        for (int half = 0; half < 2; half++, tile++) {
            __m256i v[4];
            avx2_rows16(p->row, off + 4 + half * 16, v);
            AVX2_UNROLL
            for (int i = 0; i < 4; i++) {
                int to = i / 2 * 8 + i % 2 * 2;
                avx2_widen(_mm256_shuffle_epi8(levels, avx2_low4(v[i])), tile->q + to);
                avx2_widen(_mm256_shuffle_epi8(levels, avx2_high4(v[i])), tile->q + to + 4);
            }
            _mm256_store_ps(tile->d[0], ue4m3_half(scales, half * 2));
            _mm256_store_ps(tile->d[1], ue4m3_half(scales, half * 2 + 1));
        }
    }
}

AVX2_MAT_VEC(q4_0, u32_a8_off8)
AVX2_MAT_VEC(q4_1, u32_a8_min)
AVX2_MAT_VEC(q5_0, u32_a4_off16)
AVX2_MAT_VEC(q5_1, u32_a4_min)
AVX2_MAT_VEC(q8_0, s32)
AVX2_MAT_VEC(iq4_nl, s32)
AVX2_MAT_VEC(mxfp4, u32_a4_off12)
AVX2_MAT(nvfp4, s32_part16)
