/* AVX2 packing of the K-quants and TQ2_0 (kern_avx2_mat.h). */
#include "cpu/kern_avx2_mat.h"

#include "quant/blocks.h"

#define FOR_BLOCKS(type)                                               \
    struct avx2_u256 *tile = p->tile;                                  \
    int64_t off = p->col / 256 * (int64_t)sizeof(struct block_##type); \
    for (int n = p->n_cols / 256; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_##type))

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

/* The first 16 bytes of Q4_K and Q5_K: d, dmin, and 8 scales and minima of 6 bits. */
AVX2_INLINE void scales_k4(const uint8_t *const row[8], int64_t off, struct avx2_u256 *tile)
{
    __m256i v[4], s[2], m[2];
    avx2_rows16(row, off, v);
    avx2_two_halves(v[0], tile->d, tile->m, _mm256_set1_ps(-0.0f));
    s[0] = avx2_move_bits(v[1], 0, 0, 63);
    m[0] = avx2_move_bits(v[2], 0, 0, 63);
    s[1] = _mm256_or_si256(avx2_low4(v[3]), avx2_move_bits(v[1], 6, 4, 48));
    m[1] = _mm256_or_si256(avx2_high4(v[3]), avx2_move_bits(v[2], 6, 4, 48));
    AVX2_UNROLL
    for (int j = 0; j < 8; j++)
        avx2_store(tile->scale[j], avx2_pick2(s[j / 4], j % 4, j % 4, 0));
    AVX2_UNROLL
    for (int j = 0; j < 4; j++)
        avx2_store(tile->min[j], avx2_pick2(m[j / 2], j % 2 * 2, j % 2 * 2 + 1, 0));
}

static void pack_q4_k(const struct avx2_pack *p)
{
    FOR_BLOCKS(q4_k)
    {
        avx2_prefetch(p, off, sizeof(struct block_q4_k));
        scales_k4(p->row, off, tile);
        AVX2_UNROLL
        for (int c = 0; c < 4; c++) {
            __m256i v[8];
            avx2_rows32(p->row, off + OFF(q4_k, qs) + c * 32, v);
            AVX2_UNROLL
            for (int i = 0; i < 8; i++) {
                avx2_store(tile->q[c * 16 + i], avx2_low4(v[i]));
                avx2_store(tile->q[c * 16 + 8 + i], avx2_high4(v[i]));
            }
        }
    }
}

/* 64 columns of Q5_K; the fifth bits of its halves are bits 2c and 2c + 1 of `high`. */
AVX2_INLINE void part_q5_k(const struct avx2_pack *p, int64_t off, const __m256i high[8], const int c,
                           struct avx2_u256 *tile)
{
    __m256i v[8];
    avx2_rows32(p->row, off + OFF(q5_k, qs) + c * 32, v);
    AVX2_UNROLL
    for (int i = 0; i < 8; i++) {
        avx2_store(tile->q[c * 16 + i], _mm256_or_si256(avx2_low4(v[i]), avx2_move_bits(high[i], 2 * c, 4, 16)));
        avx2_store(tile->q[c * 16 + 8 + i],
                   _mm256_or_si256(avx2_high4(v[i]), avx2_move_bits(high[i], 2 * c + 1, 4, 16)));
    }
}

static void pack_q5_k(const struct avx2_pack *p)
{
    FOR_BLOCKS(q5_k)
    {
        avx2_prefetch(p, off, sizeof(struct block_q5_k));
        __m256i high[8];
        scales_k4(p->row, off, tile);
        avx2_rows32(p->row, off + OFF(q5_k, qh), high);
        part_q5_k(p, off, high, 0, tile);
        part_q5_k(p, off, high, 1, tile);
        part_q5_k(p, off, high, 2, tile);
        part_q5_k(p, off, high, 3, tile);
    }
}

/* 16 signed scales in four lanes of bytes; codes are packed 2^log2_off too large. */
AVX2_INLINE void scales_signed(const __m256i s[4], int log2_off, struct avx2_u256 *tile)
{
    AVX2_UNROLL
    for (int j = 0; j < 16; j++)
        avx2_store(tile->scale[j], _mm256_srai_epi16(avx2_pick2(s[j / 4], j % 4, j % 4, 1), 8));
    AVX2_UNROLL
    for (int j = 0; j < 8; j++)
        avx2_store(tile->min[j], _mm256_srai_epi16(avx2_pick2(s[j / 2], j % 2 * 2, j % 2 * 2 + 1, 1), 8 - log2_off));
}

/* Half a block of Q6_K: 128 columns. */
AVX2_INLINE void half_q6_k(const struct avx2_pack *p, int64_t off, int half, struct avx2_u256 *tile)
{
    __m256i a[8], b[8], high[8];
    avx2_rows32(p->row, off + OFF(q6_k, ql) + half * 64, a);
    avx2_rows32(p->row, off + OFF(q6_k, ql) + half * 64 + 32, b);
    avx2_rows32(p->row, off + OFF(q6_k, qh) + half * 32, high);
    uint8_t(*q)[32] = tile->q + half * 32;
    AVX2_UNROLL
    for (int i = 0; i < 8; i++) {
        avx2_store(q[i], _mm256_or_si256(avx2_low4(a[i]), avx2_move_bits(high[i], 0, 4, 48)));
        avx2_store(q[8 + i], _mm256_or_si256(avx2_low4(b[i]), avx2_move_bits(high[i], 2, 4, 48)));
        avx2_store(q[16 + i], _mm256_or_si256(avx2_high4(a[i]), avx2_move_bits(high[i], 4, 4, 48)));
        avx2_store(q[24 + i], _mm256_or_si256(avx2_high4(b[i]), avx2_move_bits(high[i], 6, 4, 48)));
    }
}

static void pack_q6_k(const struct avx2_pack *p)
{
    FOR_BLOCKS(q6_k)
    {
        avx2_prefetch(p, off, sizeof(struct block_q6_k));
        __m256i s[4];
        avx2_rows16(p->row, off + OFF(q6_k, scales), s);
        scales_signed(s, 5, tile);
        half_q6_k(p, off, 0, tile);
        half_q6_k(p, off, 1, tile);
        _mm256_store_ps(tile->d, avx2_rows_half(p->row, off + OFF(q6_k, d)));
    }
}

static void pack_q2_k(const struct avx2_pack *p)
{
    FOR_BLOCKS(q2_k)
    {
        avx2_prefetch(p, off, sizeof(struct block_q2_k));
        __m256i s[4], v[8];
        avx2_rows16(p->row, off, s);
        AVX2_UNROLL
        for (int j = 0; j < 16; j++)
            avx2_store(tile->scale[j], avx2_pick2(avx2_low4(s[j / 4]), j % 4, j % 4, 0));
        AVX2_UNROLL
        for (int j = 0; j < 8; j++)
            avx2_store(tile->min[j], avx2_pick2(avx2_high4(s[j / 2]), j % 2 * 2, j % 2 * 2 + 1, 0));
        AVX2_UNROLL
        for (int half = 0; half < 2; half++) {
            avx2_rows32(p->row, off + OFF(q2_k, qs) + half * 32, v);
            AVX2_UNROLL
            for (int i = 0; i < 32; i++)
                avx2_store(tile->q[half * 32 + i], avx2_move_bits(v[i % 8], i / 8 * 2, 0, 3));
        }
        avx2_two_halves(avx2_rows4(p->row, off + OFF(q2_k, d)), tile->d, tile->m, _mm256_set1_ps(-0.0f));
    }
}

/* 32 columns of Q3_K, packed 4 too large: plane c % 4 of 32 bytes, and bit c of the mask. */
AVX2_INLINE void part_q3_k(const __m256i v[8], const __m256i mask[8], const int c, struct avx2_u256 *tile)
{
    AVX2_UNROLL
    for (int i = 0; i < 8; i++)
        avx2_store(tile->q[c * 8 + i],
                   _mm256_or_si256(avx2_move_bits(v[i], c % 4 * 2, 0, 3), avx2_move_bits(mask[i], c, 2, 4)));
}

static void pack_q3_k(const struct avx2_pack *p)
{
    FOR_BLOCKS(q3_k)
    {
        avx2_prefetch(p, off, sizeof(struct block_q3_k));
        __m256i w[4], s[4], v[8], mask[8];
        avx2_rows16(p->row, off + OFF(q3_k, scales) - 4, w); /* w[1..3] are the 12 bytes */
        AVX2_UNROLL
        for (int j = 0; j < 4; j++) {
            __m256i low = j < 2 ? avx2_low4(w[1 + j]) : avx2_high4(w[j - 1]);
            s[j] = _mm256_sub_epi8(_mm256_or_si256(low, avx2_move_bits(w[3], j * 2, 4, 48)), _mm256_set1_epi8(32));
        }
        scales_signed(s, 2, tile);
        avx2_rows32(p->row, off, mask);
        avx2_rows32(p->row, off + OFF(q3_k, qs), v);
        part_q3_k(v, mask, 0, tile);
        part_q3_k(v, mask, 1, tile);
        part_q3_k(v, mask, 2, tile);
        part_q3_k(v, mask, 3, tile);
        avx2_rows32(p->row, off + OFF(q3_k, qs) + 32, v);
        part_q3_k(v, mask, 4, tile);
        part_q3_k(v, mask, 5, tile);
        part_q3_k(v, mask, 6, tile);
        part_q3_k(v, mask, 7, tile);
        _mm256_store_ps(tile->d, avx2_rows_half(p->row, off + OFF(q3_k, d)));
    }
}

/* Packed 1 too large, with scales of 1. */
static void pack_tq2_0(const struct avx2_pack *p)
{
    FOR_BLOCKS(tq2_0)
    {
        avx2_prefetch(p, off, sizeof(struct block_tq2_0));
        __m256i v[8], one = _mm256_set1_epi16(1);
        AVX2_UNROLL
        for (int half = 0; half < 2; half++) {
            avx2_rows32(p->row, off + half * 32, v);
            AVX2_UNROLL
            for (int i = 0; i < 32; i++)
                avx2_store(tile->q[half * 32 + i], avx2_move_bits(v[i % 8], i / 8 * 2, 0, 3));
        }
        AVX2_UNROLL
        for (int j = 0; j < 16; j++)
            avx2_store(tile->scale[j], one);
        AVX2_UNROLL
        for (int j = 0; j < 8; j++)
            avx2_store(tile->min[j], one);
        _mm256_store_ps(tile->d, avx2_rows_half(p->row, off + OFF(tq2_0, d)));
    }
}

AVX2_MAT_VEC(q2_k, u256_s16_a4_min)
AVX2_MAT_VEC(q3_k, u256_s16_a4_off)
AVX2_MAT_VEC(q4_k, u256_s32_a8_min)
AVX2_MAT_VEC(q5_k, u256_s32_a4_min)
AVX2_MAT_VEC(q6_k, u256_s16_a2_off)
AVX2_MAT_VEC(tq2_0, u256_s16_a4_off)
