/* AVX-512 packing of the K-quants and TQ2_0 (kern_avx512_mat.h). */
#include "cpu/kern_avx512_mat.h"

#include "quant/blocks.h"

#define FOR_BLOCKS(type)                                               \
    struct avx512_t256 *tile = p->tile;                                \
    int64_t off = p->col / 256 * (int64_t)sizeof(struct block_##type); \
    for (int n = p->n_cols / 256; n > 0; n--, tile++, off += (int64_t)sizeof(struct block_##type))

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

/* A call each: inlined, clang with sanitizers takes minutes over the 32 checked loads of every use. */
static __attribute__((noinline)) void rows32(const uint8_t *const row[16], int64_t off, __m512i out[8])
{
    avx512_rows16(row, off, out);
    avx512_rows16(row, off + 16, out + 4);
}

/* 16 bits from each of two bytes of every lane: bytes k and k + 1. */
AVX512_INLINE __m512i two_bytes(__m512i v, const int k)
{
    __m512i lo = avx512_byte_of(v, k), hi = avx512_byte_of(v, k + 1);
    return _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
}

/* The first 16 bytes of Q4_K and Q5_K: d, dmin, and 8 scales and minima of 6 bits. */
AVX512_INLINE void scales_k4(const uint8_t *const row[16], int64_t off, struct avx512_t256 *tile)
{
    __m512i v[4], s[2], m[2];
    avx512_rows16(row, off, v);
    _mm512_store_ps(tile->d, avx512_low_half(v[0]));
    _mm512_store_ps(tile->m, _mm512_xor_ps(_mm512_set1_ps(-0.0f), avx512_high_half(v[0])));
    s[0] = avx512_move_bits(v[1], 0, 0, 63);
    m[0] = avx512_move_bits(v[2], 0, 0, 63);
    s[1] = _mm512_or_si512(avx512_low4(v[3]), avx512_move_bits(v[1], 6, 4, 48));
    m[1] = _mm512_or_si512(avx512_high4(v[3]), avx512_move_bits(v[2], 6, 4, 48));
    AVX512_UNROLL
    for (int j = 0; j < 8; j++)
        avx512_store(tile->scale[j], avx512_byte_of(s[j / 4], j % 4));
    AVX512_UNROLL
    for (int j = 0; j < 4; j++)
        avx512_store(tile->min[j], two_bytes(m[j / 2], j % 2 * 2));
}

void kern_avx512_pack_q4_k(const struct avx512_pack *p)
{
    FOR_BLOCKS(q4_k)
    {
        avx512_prefetch(p, off, sizeof(struct block_q4_k));
        scales_k4(p->row, off, tile);
        for (int c = 0; c < 4; c++) {
            __m512i v[8];
            rows32(p->row, off + OFF(q4_k, qs) + c * 32, v);
            AVX512_UNROLL
            for (int i = 0; i < 8; i++) {
                avx512_store(tile->q[c * 16 + i], avx512_low4(v[i]));
                avx512_store(tile->q[c * 16 + 8 + i], avx512_high4(v[i]));
            }
        }
    }
}

/* Codes with `bit` more where the mask's bit is set. */
AVX512_INLINE __m512i add_bit(__m512i q, __m512i high, const int high_bit, const int bit)
{
    __mmask64 is_set = _mm512_test_epi8_mask(high, _mm512_set1_epi8((char)(1 << high_bit)));
    return _mm512_mask_add_epi8(q, is_set, q, _mm512_set1_epi8((char)bit));
}

void kern_avx512_pack_q5_k(const struct avx512_pack *p)
{
    FOR_BLOCKS(q5_k)
    {
        __m512i high[8];
        avx512_prefetch(p, off, sizeof(struct block_q5_k));
        scales_k4(p->row, off, tile);
        rows32(p->row, off + OFF(q5_k, qh), high);
        AVX512_UNROLL
        for (int c = 0; c < 4; c++) {
            __m512i v[8];
            rows32(p->row, off + OFF(q5_k, qs) + c * 32, v);
            AVX512_UNROLL
            for (int i = 0; i < 8; i++) {
                avx512_store(tile->q[c * 16 + i], add_bit(avx512_low4(v[i]), high[i], 2 * c, 16));
                avx512_store(tile->q[c * 16 + 8 + i], add_bit(avx512_high4(v[i]), high[i], 2 * c + 1, 16));
            }
        }
    }
}

/* 16 signed scales in four lanes of bytes; codes are packed 2^log2_off too large. */
AVX512_INLINE void scales_signed(const __m512i s[4], const int log2_off, struct avx512_t256 *tile)
{
    AVX512_UNROLL
    for (int j = 0; j < 16; j += 2) {
        /* bytes j and j + 1 on top of the two halves of the lane, then shifted down with their sign */
        __m512i two = _mm512_slli_epi16(two_bytes(s[j / 4], j % 4), 8);
        __m512i words = _mm512_srai_epi16(two, 8);
        avx512_store(tile->min[j / 2], _mm512_slli_epi16(words, (unsigned)log2_off));
        avx512_store(tile->scale[j], _mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
        avx512_store(tile->scale[j + 1], _mm512_srai_epi32(words, 16));
    }
}

/* The half in the last two bytes of a block, which ends at `end`. */
AVX512_INLINE __m512 last_half(const struct avx512_pack *p, int64_t end)
{
    __m512i v[4];
    avx512_rows16(p->row, end - 16, v);
    return avx512_high_half(v[3]);
}

/* Half a block of Q6_K: 128 columns. */
AVX512_INLINE void half_q6_k(const struct avx512_pack *p, int64_t off, int half, struct avx512_t256 *tile)
{
    __m512i a[8], b[8], high[8];
    rows32(p->row, off + OFF(q6_k, ql) + half * 64, a);
    rows32(p->row, off + OFF(q6_k, ql) + half * 64 + 32, b);
    rows32(p->row, off + OFF(q6_k, qh) + half * 32, high);
    uint8_t(*q)[64] = tile->q + half * 32;
    AVX512_UNROLL
    for (int i = 0; i < 8; i++) {
        avx512_store(q[i], _mm512_or_si512(avx512_low4(a[i]), avx512_move_bits(high[i], 0, 4, 48)));
        avx512_store(q[8 + i], _mm512_or_si512(avx512_low4(b[i]), avx512_move_bits(high[i], 2, 4, 48)));
        avx512_store(q[16 + i], _mm512_or_si512(avx512_high4(a[i]), avx512_move_bits(high[i], 4, 4, 48)));
        avx512_store(q[24 + i], _mm512_or_si512(avx512_high4(b[i]), avx512_move_bits(high[i], 6, 4, 48)));
    }
}

void kern_avx512_pack_q6_k(const struct avx512_pack *p)
{
    FOR_BLOCKS(q6_k)
    {
        __m512i s[4];
        avx512_prefetch(p, off, sizeof(struct block_q6_k));
        avx512_rows16(p->row, off + OFF(q6_k, scales), s);
        scales_signed(s, 5, tile);
        for (int half = 0; half < 2; half++)
            half_q6_k(p, off, half, tile);
        _mm512_store_ps(tile->d, last_half(p, off + (int64_t)sizeof(struct block_q6_k)));
    }
}

/* 128 columns of two bits each. */
AVX512_INLINE void crumbs(const struct avx512_pack *p, int64_t off, uint8_t (*q)[64])
{
    __m512i v[8];
    rows32(p->row, off, v);
    AVX512_UNROLL
    for (int i = 0; i < 32; i++)
        avx512_store(q[i], avx512_move_bits(v[i % 8], i / 8 * 2, 0, 3));
}

void kern_avx512_pack_q2_k(const struct avx512_pack *p)
{
    FOR_BLOCKS(q2_k)
    {
        __m512i s[4], v[4];
        avx512_prefetch(p, off, sizeof(struct block_q2_k));
        avx512_rows16(p->row, off, s);
        AVX512_UNROLL
        for (int j = 0; j < 16; j++)
            avx512_store(tile->scale[j], avx512_byte_of(avx512_low4(s[j / 4]), j % 4));
        AVX512_UNROLL
        for (int j = 0; j < 8; j++)
            avx512_store(tile->min[j], two_bytes(avx512_high4(s[j / 2]), j % 2 * 2));
        for (int half = 0; half < 2; half++)
            crumbs(p, off + OFF(q2_k, qs) + half * 32, tile->q + half * 32);
        avx512_rows16(p->row, off + (int64_t)sizeof(struct block_q2_k) - 16, v);
        _mm512_store_ps(tile->d, avx512_low_half(v[3]));
        _mm512_store_ps(tile->m, _mm512_xor_ps(_mm512_set1_ps(-0.0f), avx512_high_half(v[3])));
    }
}

/* 128 columns of Q3_K, packed 4 too large: bits 4 half .. 4 half + 3 of the mask. */
AVX512_INLINE void half_q3_k(const struct avx512_pack *p, int64_t off, const __m512i mask[8], const int half,
                             uint8_t (*q)[64])
{
    __m512i v[8];
    rows32(p->row, off, v);
    AVX512_UNROLL
    for (int i = 0; i < 32; i++)
        avx512_store(q[i], add_bit(avx512_move_bits(v[i % 8], i / 8 * 2, 0, 3), mask[i % 8], half * 4 + i / 8, 4));
}

void kern_avx512_pack_q3_k(const struct avx512_pack *p)
{
    FOR_BLOCKS(q3_k)
    {
        __m512i w[4], s[4], mask[8];
        avx512_prefetch(p, off, sizeof(struct block_q3_k));
        avx512_rows16(p->row, off + OFF(q3_k, scales) - 4, w); /* w[1..3] are the 12 bytes */
        AVX512_UNROLL
        for (int j = 0; j < 4; j++) {
            __m512i low = j < 2 ? avx512_low4(w[1 + j]) : avx512_high4(w[j - 1]);
            s[j] = _mm512_or_si512(low, avx512_move_bits(w[3], j * 2, 4, 48));
            s[j] = _mm512_sub_epi8(s[j], _mm512_set1_epi8(32));
        }
        scales_signed(s, 2, tile);
        rows32(p->row, off, mask);
        half_q3_k(p, off + OFF(q3_k, qs), mask, 0, tile->q);
        half_q3_k(p, off + OFF(q3_k, qs) + 32, mask, 1, tile->q + 32);
        _mm512_store_ps(tile->d, last_half(p, off + (int64_t)sizeof(struct block_q3_k)));
    }
}

/* Packed 1 too large, with scales of 1. */
void kern_avx512_pack_tq2_0(const struct avx512_pack *p)
{
    FOR_BLOCKS(tq2_0)
    {
        avx512_prefetch(p, off, sizeof(struct block_tq2_0));
        for (int half = 0; half < 2; half++)
            crumbs(p, off + half * 32, tile->q + half * 32);
        for (int j = 0; j < 16; j++)
            avx512_store(tile->scale[j], _mm512_set1_epi32(1));
        for (int j = 0; j < 8; j++)
            avx512_store(tile->min[j], _mm512_set1_epi16(1));
        _mm512_store_ps(tile->d, last_half(p, off + (int64_t)sizeof(struct block_tq2_0)));
    }
}
