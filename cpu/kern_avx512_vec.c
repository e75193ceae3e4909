/* AVX-512 matmul with one token: nothing is packed, since a weight is used only once. 8 rows at a time, each multiplied as it
 * lies in memory, 64 columns a vector; the integer sums of the rows are then added across their lanes into one vector, a row
 * per lane, so that the scales and the fmafs of the contract (kern.h) are vector operations over rows.
 * kern_avx512vnni_vec.c includes this file to compile it once more with AVX512_VNNI. */
#include "cpu/kern_avx512_dot.h"
#include "cpu/kern_avx512_mat.h"

#include <stdbool.h>

#include "cpu/kern_act.h"
#include "cpu/kern_avx2_vec.h"
#include "quant/blocks.h"

enum { ROWS = 8 };

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

/* ---- rows ---- */

AVX512_INLINE void store_rows(const struct kern_mat_args *a, int first, __m256 acc)
{
    int n = a->n_rows - first;
    _mm256_mask_storeu_ps(a->dst + first, n < ROWS ? (__mmask8)((1u << n) - 1) : 0xff, acc);
}

/* 16 bytes of each of 8 rows; out[i] has bytes 4i..4i+3 of row r in lane r. */
AVX512_INLINE void rows8(const uint8_t *const row[ROWS], int64_t off, __m256i out[4])
{
    __m256i a[4], t[4];
    AVX512_UNROLL
    for (int i = 0; i < 4; i++)
        a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(avx512_load16(row[i] + off)),
                                       avx512_load16(row[i + 4] + off), 1);
    t[0] = _mm256_unpacklo_epi32(a[0], a[1]);
    t[1] = _mm256_unpackhi_epi32(a[0], a[1]);
    t[2] = _mm256_unpacklo_epi32(a[2], a[3]);
    t[3] = _mm256_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm256_unpacklo_epi64(t[0], t[2]);
    out[1] = _mm256_unpackhi_epi64(t[0], t[2]);
    out[2] = _mm256_unpacklo_epi64(t[1], t[3]);
    out[3] = _mm256_unpackhi_epi64(t[1], t[3]);
}

AVX512_INLINE __m256 low_half8(__m256i v)
{
    return _mm256_cvtph_ps(_mm256_cvtepi32_epi16(v));
}

AVX512_INLINE __m256 high_half8(__m256i v)
{
    return low_half8(_mm256_srli_epi32(v, 16));
}

/* The last 4 bytes before `end` of 8 rows. */
AVX512_INLINE __m256i last_words(const uint8_t *const row[ROWS], int64_t end)
{
    __m256i v[4];
    rows8(row, end - 16, v);
    return v[3];
}

/* ---- sums across lanes ---- */

/* Sums within each quarter: those of rows 0..3 in the four lanes of out[0], of rows 4..7 in out[1]. */
AVX512_INLINE void sum_quarters(const __m512i s[ROWS], __m512i out[2])
{
    __m512i t[4];
    AVX512_UNROLL
    for (int i = 0; i < 4; i++)
        t[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2 * i], s[2 * i + 1]),
                                _mm512_unpackhi_epi32(s[2 * i], s[2 * i + 1]));
    AVX512_UNROLL
    for (int i = 0; i < 2; i++)
        out[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]),
                                  _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
}

/* One sum a row. */
AVX512_INLINE __m256i sum8(const __m512i s[ROWS])
{
    __m512i u[2];
    sum_quarters(s, u);
    __m512i v = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x44), _mm512_shuffle_i32x4(u[0], u[1], 0xee));
    return _mm256_add_epi32(_mm512_castsi512_si256(_mm512_shuffle_i32x4(v, v, 0x08)),
                            _mm512_castsi512_si256(_mm512_shuffle_i32x4(v, v, 0x0d)));
}

/* One sum a row of the first 32 columns, then one a row of the other 32. */
AVX512_INLINE __m512i sum8_halves(const __m512i s[ROWS])
{
    __m512i u[2];
    sum_quarters(s, u);
    __m512i v = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x88), _mm512_shuffle_i32x4(u[0], u[1], 0xdd));
    return _mm512_shuffle_i32x4(v, v, 0xd8);
}

/* ---- one fmaf of the contract a row ---- */

AVX512_INLINE __m256 add_scaled(__m256 acc, __m256 d, __m256 dx, __m256i isum)
{
    return _mm256_fmadd_ps(_mm256_mul_ps(d, dx), _mm256_cvtepi32_ps(isum), acc);
}

/* The first half of the lanes, then the other one if there is a second block. */
AVX512_INLINE __m256 add_first(__m256 acc, __m512 d, __m512 x)
{
    return _mm256_fmadd_ps(_mm512_castps512_ps256(d), _mm512_castps512_ps256(x), acc);
}

AVX512_INLINE __m256 add_second(__m256 acc, __m512 d, __m512 x)
{
    return _mm256_fmadd_ps(_mm512_extractf32x8_ps(d, 1), _mm512_extractf32x8_ps(x, 1), acc);
}

/* ---- types with a float scale for 32 columns: two blocks at a time ---- */

/* 16 bytes of nibbles of each block: columns 0..15 low, 16..31 high. */
AVX512_INLINE __m512i codes4(const uint8_t *p0, const uint8_t *p1)
{
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4);
    __m512i v = _mm512_broadcast_i32x4(avx512_load16(p0));
    v = _mm512_mask_broadcast_i32x4(v, 0xff00, avx512_load16(p1));
    return avx512_low4(_mm512_srlv_epi32(v, shift));
}

/* The same with bit i of the word before them as the fifth of column i. */
AVX512_INLINE __m512i codes5(const uint8_t *p0, const uint8_t *p1)
{
    uint32_t b0, b1;
    __builtin_memcpy(&b0, p0 - 4, sizeof b0);
    __builtin_memcpy(&b1, p1 - 4, sizeof b1);
    __m512i q = codes4(p0, p1);
    return _mm512_mask_add_epi8(q, _cvtu64_mask64((uint64_t)b1 << 32 | b0), q, _mm512_set1_epi8(16));
}

/* How blocks of a type are read. */
struct form32 {
    int bytes, n_bits; /* of a block; of a code, 8: with sign */
    int64_t qs;
    int off;         /* what the codes are too large by */
    bool has_min;    /* a half after the scale */
    bool has_levels; /* codes are indices */
    bool is_e8m0;    /* the scale is a power of two */
};

/* Codes of 64 columns. */
AVX512_INLINE struct avx512_codes codes32(const struct form32 f, const uint8_t *p0, const uint8_t *p1, __m512i levels)
{
    p0 += f.qs, p1 += f.qs;
    if (f.n_bits == 8 && !f.has_levels) {
        __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(avx2_load32(p0)), avx2_load32(p1), 1);
        return avx512_codes_signed(_mm512_xor_si512(q, _mm512_set1_epi8((char)0x80)));
    }
    __m512i q = f.n_bits == 5 ? codes5(p0, p1) : codes4(p0, p1);
    if (f.has_levels)
        q = _mm512_shuffle_epi8(levels, q);
    return f.n_bits == 8 ? avx512_codes_signed(q) : avx512_codes_of(q);
}

/* The first 4 bytes of a block of each row, then of another block. */
AVX512_INLINE __m512i heads_32(const uint8_t *const row[ROWS], int64_t off, int64_t next)
{
    __m512i v[4], out[4];
    AVX512_UNROLL
    for (int i = 0; i < 4; i++)
        v[i] = avx512_four16(row[i] + off, row[i + 4] + off, row[i] + next, row[i + 4] + next);
    avx512_turn(v, out);
    return out[0];
}

AVX512_INLINE void run_32(const struct kern_mat_args *a, const struct form32 f, __m512i levels)
{
    const __m512i d_place = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
    const __m512i sum_place = _mm512_setr_epi32(1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 3);
    struct kern_act_x32 x = kern_act_x32(a->x, a->n_cols);
    int64_t n_block = a->n_cols / 32;
    for (int first = 0; first < a->n_rows; first += ROWS) {
        const uint8_t *row[ROWS];
        __m256 acc = _mm256_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, ROWS, row);
        for (int64_t b = 0; b < n_block; b += 2, off += 2 * f.bytes) {
            bool is_pair = b + 1 < n_block; /* else the second block is the first again, and its sums are not used */
            int64_t next = is_pair ? off + f.bytes : off;
            __m512i s[ROWS], xv = avx512_load(x.q + b * 32);
            __m512i xs = _mm512_castsi128_si512(avx512_load16((const uint8_t *)&x.s[b]));
            __m512i xsum = _mm512_permutexvar_epi32(sum_place, xs);
            AVX512_UNROLL
            for (int r = 0; r < ROWS; r++) {
                avx2_vec_prefetch(a, ROWS, row, off, r, 2 * f.bytes);
                __m512i part;
                s[r] = _mm512_setzero_si512();
                avx512_dot_step(&s[r], &part, codes32(f, row[r] + off, row[r] + next, levels), xv, 0,
                                f.n_bits == 8 ? 0 : 1);
            }
            __m512i head = heads_32(row, off, next);
            __m512i isum = sum8_halves(s);
            if (f.off)
                isum = _mm512_sub_epi32(isum, _mm512_mullo_epi32(xsum, _mm512_set1_epi32(f.off)));
            __m512 dx = _mm512_castsi512_ps(_mm512_permutexvar_epi32(d_place, xs)), sum = _mm512_cvtepi32_ps(isum);
            __m512 d = _mm512_mul_ps(f.is_e8m0 ? avx512_e8m0_half(avx512_byte_of(head, 0)) : avx512_low_half(head), dx);
            __m512 m = _mm512_mul_ps(avx512_high_half(head), dx), msum = _mm512_cvtepi32_ps(xsum);
            acc = add_first(acc, d, sum);
            acc = f.has_min ? add_first(acc, m, msum) : acc;
            if (!is_pair)
                break;
            acc = add_second(acc, d, sum);
            acc = f.has_min ? add_second(acc, m, msum) : acc;
        }
        store_rows(a, first, acc);
    }
}

#define VEC_32(name, n_bits, off, has_min, has_levels, is_e8m0, levels)                             \
    static void vec_##name(const struct kern_mat_args *a)                                           \
    {                                                                                               \
        const struct form32 f = {                                                                   \
            sizeof(struct block_##name), n_bits, OFF(name, qs), off, has_min, has_levels, is_e8m0}; \
        run_32(a, f, levels);                                                                       \
    }
VEC_32(q4_0, 4, 8, false, false, false, _mm512_setzero_si512())
VEC_32(q4_1, 4, 0, true, false, false, _mm512_setzero_si512())
VEC_32(q5_0, 5, 16, false, false, false, _mm512_setzero_si512())
VEC_32(q5_1, 5, 0, true, false, false, _mm512_setzero_si512())
VEC_32(q8_0, 8, AVX512_SIGNED_OFF, false, false, false, _mm512_setzero_si512())
VEC_32(iq4_nl, 8, AVX512_SIGNED_OFF, false, true, false, avx512_iq4_levels())
VEC_32(mxfp4, 4, 12, false, true, true, avx512_fp4_levels())

/* ---- NVFP4: a block of 64 columns, whose quarters have scales of their own ---- */

/* Lanes of quarters `k` and k + 1 of both: rows 0..7 of the one, then of the other. */
AVX512_INLINE __m512i two_quarters(const __m512i u[2], const int k)
{
    __m512i v = k ? _mm512_shuffle_i32x4(u[0], u[1], 0xee) : _mm512_shuffle_i32x4(u[0], u[1], 0x44);
    return _mm512_shuffle_i32x4(v, v, 0xd8);
}

/* Byte k of 8 rows, then byte k + 1, from the first words of the rows, as scales. */
AVX512_INLINE __m512 two_scales(__m256i heads, const int k)
{
    __m256i b0 = _mm256_srli_epi32(heads, 8 * k), b1 = _mm256_srli_epi32(heads, 8 * k + 8);
    return avx512_ue4m3_half(avx512_byte_of(_mm512_inserti64x4(_mm512_castsi256_si512(b0), b1, 1), 0));
}

/* Low nibbles of 8 bytes, then their high ones, in each quarter. */
AVX512_INLINE __m512i codes_nvfp4(const uint8_t *p)
{
    __m512i v =
        _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), _mm512_castsi256_si512(avx2_load32(p)));
    v = avx512_low4(_mm512_srlv_epi64(v, _mm512_setr_epi64(0, 4, 0, 4, 0, 4, 0, 4)));
    return _mm512_shuffle_epi8(avx512_fp4_levels(), v);
}

/* What the codes being 12 too large makes of the sum of each quarter, in all of its lanes. */
AVX512_INLINE __m512i too_much_nvfp4(__m512i x)
{
    __m512i v = avx512_dot7(_mm512_setzero_si512(), _mm512_set1_epi8(12), x);
    v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, 0x4e));
    return _mm512_add_epi32(v, _mm512_shuffle_epi32(v, 0xb1));
}

static void vec_nvfp4(const struct kern_mat_args *a)
{
    struct kern_act_x32 x = kern_act_x32(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += ROWS) {
        const uint8_t *row[ROWS];
        __m256 acc = _mm256_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, ROWS, row);
        for (int64_t b = 0; b < a->n_cols / 64; b++, off += (int64_t)sizeof(struct block_nvfp4)) {
            __m512i s[ROWS], u[2], xv = avx512_load(x.q + b * 64), more = too_much_nvfp4(xv);
            __m256i head[4];
            AVX512_UNROLL
            for (int r = 0; r < ROWS; r++) {
                avx2_vec_prefetch(a, ROWS, row, off, r, sizeof(struct block_nvfp4));
                s[r] = avx512_dot7(_mm512_setzero_si512(), codes_nvfp4(row[r] + off + OFF(nvfp4, qs)), xv);
            }
            sum_quarters(s, u);
            u[0] = _mm512_sub_epi32(u[0], more);
            u[1] = _mm512_sub_epi32(u[1], more);
            rows8(row, off, head);
            AVX512_UNROLL
            for (int k = 0; k < 4; k += 2) {
                __m512 d = _mm512_mul_ps(two_scales(head[0], k), _mm512_set1_ps(x.s[2 * b + k / 2].d));
                __m512 sum = _mm512_cvtepi32_ps(two_quarters(u, k));
                acc = add_second(add_first(acc, d, sum), d, sum);
            }
        }
        store_rows(a, first, acc);
    }
}

/* ---- types with integer scales in blocks of 256: vpmaddubsw, then vpmaddwd by scale times sub-scale ---- */

/* An activation block's sub-scales, by 32 and by 16 columns. */
struct subs {
    __m128i by32;
    __m256i by16;
};

AVX512_INLINE struct subs subs_of(const struct kern_act_s256 *x)
{
    __m128i s = avx512_load16((const uint8_t *)x->sub);
    return (struct subs){
        s, _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(s, s)), _mm_unpackhi_epi16(s, s), 1)};
}

/* Factors arranged for chunks of 64 columns: word c of quarter k is that of columns 64 c + 16 k. From 16 factors, and from
 * 8. */
AVX512_INLINE __m512i factors16(__m256i f)
{
#define PLACES(k) k, 4 + (k), 8 + (k), 12 + (k), k, 4 + (k), 8 + (k), 12 + (k)
    static const int16_t place[32] = {PLACES(0), PLACES(1), PLACES(2), PLACES(3)};
#undef PLACES
    return _mm512_permutexvar_epi16(avx512_load(place), _mm512_castsi256_si512(f));
}

AVX512_INLINE __m512i factors8(__m128i f)
{
#define PLACES(k) k, 2 + (k), 4 + (k), 6 + (k), k, 2 + (k), 4 + (k), 6 + (k)
    static const int16_t place[32] = {PLACES(0), PLACES(0), PLACES(1), PLACES(1)};
#undef PLACES
    return _mm512_permutexvar_epi16(avx512_load(place), _mm512_castsi128_si512(f));
}

/* acc + 64 codes up to 127 times x times the factors of chunk c. */
AVX512_INLINE __m512i add_chunk(__m512i acc, __m512i q, __m512i x, __m512i factors, const int c)
{
    __m512i f = _mm512_shuffle_epi8(factors, _mm512_set1_epi16((short)(2 * c | (2 * c + 1) << 8)));
    return avx512_madd_add(acc, _mm512_maddubs_epi16(q, x), f);
}

/* Where to begin, with codes 2^log2_off too large. */
AVX512_INLINE __m512i less_off(__m256i scale, const struct kern_act_s256 *xs, const int log2_off)
{
    __m256i sum = _mm256_slli_epi32(_mm256_madd_epi16(scale, avx2_load32(xs->sum16)), log2_off);
    return _mm512_zextsi256_si512(_mm256_sub_epi32(_mm256_setzero_si256(), sum));
}

/* Two shifts, of the lower and the upper 32 bytes. */
AVX512_INLINE __m512i two_shifts(const int lo, const int hi)
{
    return _mm512_inserti64x4(_mm512_set1_epi32(lo), _mm256_set1_epi32(hi), 1);
}

/* The codes with `more` added where bit 2c of the lower 32 bytes, 2c + 1 of the upper is set. */
AVX512_INLINE __m512i add_bits(__m512i q, __m512i bits, const int c, const int more)
{
    __m512i at = _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << 2 * c)), _mm256_set1_epi8((char)(2 << 2 * c)), 1);
    return _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, at), q, _mm512_set1_epi8((char)more));
}

/* 64 columns of two bits each: chunk c. */
AVX512_INLINE __m512i crumbs(const uint8_t *qs, const int c)
{
    __m512i shift = c % 2 ? two_shifts(4, 6) : two_shifts(0, 2);
    return _mm512_and_si512(_mm512_srlv_epi32(avx512_twice32(qs + c / 2 * 32), shift), _mm512_set1_epi8(3));
}

/* The 16 scales of Q3_K: low nibbles in bytes 0..7, bit pairs in bytes 8..11. */
AVX512_INLINE __m256i scales_q3_k(const uint8_t *p)
{
    __m128i v = avx512_load16(p - 4), mask4 = _mm_set1_epi8(15);
    __m128i low = _mm_srli_si128(_mm_and_si128(v, mask4), 4);
    low = _mm_unpacklo_epi64(low, _mm_srli_si128(_mm_and_si128(_mm_srli_epi16(v, 4), mask4), 4));
    __m128i high = _mm_srlv_epi32(_mm_shuffle_epi32(v, 0xff), _mm_setr_epi32(0, 2, 4, 6));
    high = _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4);
    return _mm256_cvtepi8_epi16(_mm_sub_epi8(_mm_or_si128(low, high), _mm_set1_epi8(32)));
}

/* A row's block; its codes are 4 too large. */
AVX512_INLINE __m512i dot_q3_k(const uint8_t *p, const int8_t *x, const struct kern_act_s256 *xs, struct subs sub)
{
    __m256i scale = scales_q3_k(p + OFF(q3_k, scales));
    __m512i factors = factors16(_mm256_mullo_epi16(scale, sub.by16)), sum = less_off(scale, xs, 2);
    __m512i high = avx512_twice32(p + OFF(q3_k, hmask));
    AVX512_UNROLL
    for (int c = 0; c < 4; c++)
        sum = add_chunk(sum, add_bits(crumbs(p + OFF(q3_k, qs), c), high, c, 4), avx512_load(x + c * 64), factors, c);
    return sum;
}

/* A row's block; its codes are 1 too large. */
AVX512_INLINE __m512i dot_tq2_0(const uint8_t *p, const int8_t *x, const struct kern_act_s256 *xs, struct subs sub)
{
    __m512i factors = factors16(sub.by16), sum = less_off(_mm256_set1_epi16(1), xs, 0);
    AVX512_UNROLL
    for (int c = 0; c < 4; c++)
        sum = add_chunk(sum, crumbs(p + OFF(tq2_0, qs), c), avx512_load(x + c * 64), factors, c);
    return sum;
}

/* The 8 scales of IQ4_XS: nibbles in 4 bytes, bit pairs in the two bytes before. */
AVX512_INLINE __m128i scales_iq4_xs(const uint8_t *p)
{
    __m128i v = avx512_load16(p);
    __m128i low = _mm_shuffle_epi8(v, _mm_setr_epi8(4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7));
    __m128i high = _mm_shuffle_epi8(v, _mm_set1_epi16(0x0302));
    low = _mm_and_si128(_mm_srlv_epi16(low, _mm_setr_epi16(0, 4, 8, 12, 0, 4, 8, 12)), _mm_set1_epi16(15));
    high = _mm_and_si128(_mm_srlv_epi16(high, _mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14)), _mm_set1_epi16(3));
    return _mm_sub_epi16(_mm_or_si128(low, _mm_slli_epi16(high, 4)), _mm_set1_epi16(32));
}

/* A row's block: codes of 8 bits would saturate, so their sign is moved to x. The first 8 levels are negative. */
AVX512_INLINE __m512i dot_iq4_xs(const uint8_t *p, const int8_t *x, const struct kern_act_s256 *xs, struct subs sub)
{
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4);
    const __m512i levels = _mm512_abs_epi8(_mm512_xor_si512(avx512_iq4_levels(), _mm512_set1_epi8((char)0x80)));
    __m512i factors = factors8(_mm_mullo_epi16(scales_iq4_xs(p), sub.by32));
    __m512i sum = _mm512_setzero_si512();
    (void)xs;
    AVX512_UNROLL
    for (int c = 0; c < 4; c++) {
        __m512i v = _mm512_castsi256_si512(avx2_load32(p + OFF(iq4_xs, qs) + c * 32)), xv = avx512_load(x + c * 64);
        v = avx512_low4(_mm512_srlv_epi32(_mm512_shuffle_i32x4(v, v, 0x50), shift));
        __mmask64 is_neg = _mm512_testn_epi8_mask(v, _mm512_set1_epi8(8));
        xv = _mm512_mask_sub_epi8(xv, is_neg, _mm512_setzero_si512(), xv);
        sum = add_chunk(sum, _mm512_shuffle_epi8(levels, v), xv, factors, c);
    }
    return sum;
}

/* A row's block of Q2_K; *min: the sums for the second fmaf. */
AVX512_INLINE __m512i dot_q2_k(const uint8_t *p, const int8_t *x, const struct kern_act_s256 *xs, struct subs sub,
                               __m256i *min)
{
    __m128i v = avx512_load16(p + OFF(q2_k, scales)), mask4 = _mm_set1_epi8(15);
    __m256i scale = _mm256_cvtepu8_epi16(_mm_and_si128(v, mask4));
    __m512i factors = factors16(_mm256_mullo_epi16(scale, sub.by16)), sum = _mm512_setzero_si512();
    *min = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(v, 4), mask4)), avx2_load32(xs->sum16));
    AVX512_UNROLL
    for (int c = 0; c < 4; c++)
        sum = add_chunk(sum, crumbs(p + OFF(q2_k, qs), c), avx512_load(x + c * 64), factors, c);
    return sum;
}

static void vec_q2_k(const struct kern_mat_args *a)
{
    const int bytes = sizeof(struct block_q2_k);
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += ROWS) {
        const uint8_t *row[ROWS];
        __m256 acc = _mm256_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, ROWS, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += bytes) {
            struct subs sub = subs_of(&x.s[b]);
            __m512i s[ROWS], m[ROWS];
            AVX512_UNROLL
            for (int r = 0; r < ROWS; r++) {
                avx2_vec_prefetch(a, ROWS, row, off, r, bytes);
                __m256i min;
                s[r] = dot_q2_k(row[r] + off, x.q + b * 256, &x.s[b], sub, &min);
                m[r] = _mm512_zextsi256_si512(min);
            }
            __m256 dx = _mm256_set1_ps(x.s[b].d);
            __m256i d = last_words(row, off + bytes);
            acc = add_scaled(acc, low_half8(d), dx, sum8(s));
            acc = add_scaled(acc, _mm256_xor_ps(_mm256_set1_ps(-0.0f), high_half8(d)), dx, sum8(m));
        }
        store_rows(a, first, acc);
    }
}

typedef __m512i row_dot(const uint8_t *p, const int8_t *x, const struct kern_act_s256 *xs, struct subs sub);

/* Types with one scale, a half that begins or ends the block. */
AVX512_INLINE void run_256(const struct kern_mat_args *a, const int bytes, row_dot *dot, const bool is_d_first)
{
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += ROWS) {
        const uint8_t *row[ROWS];
        __m256 acc = _mm256_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, ROWS, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += bytes) {
            struct subs sub = subs_of(&x.s[b]);
            __m512i s[ROWS];
            __m256i head[4];
            AVX512_UNROLL
            for (int r = 0; r < ROWS; r++) {
                avx2_vec_prefetch(a, ROWS, row, off, r, bytes);
                s[r] = dot(row[r] + off, x.q + b * 256, &x.s[b], sub);
            }
            rows8(row, is_d_first ? off : off + bytes - 16, head);
            __m256 d = is_d_first ? low_half8(head[0]) : high_half8(head[3]);
            acc = add_scaled(acc, d, _mm256_set1_ps(x.s[b].d), sum8(s));
        }
        store_rows(a, first, acc);
    }
}

#define VEC_256(type, is_d_first)                                        \
    static void vec_##type(const struct kern_mat_args *a)                \
    {                                                                    \
        run_256(a, sizeof(struct block_##type), dot_##type, is_d_first); \
    }
VEC_256(q3_k, false)
VEC_256(iq4_xs, true)
VEC_256(tq2_0, false)

#ifdef AVX512_VNNI
#define VEC_TABLE kern_avx512vnni_vec
#else
#define VEC_TABLE kern_avx512_vec
#endif
/* Q4_K, Q5_K and Q6_K are those of AVX2: on Zen 4 their 4 rows at a time came faster out of memory than 8 here (one core, rows of
 * 1024 to 1536 columns: Q4_K 17 against 13 GB/s, Q5_K 13 and 11, Q6_K 20 and 16), and as fast with long rows. So are the types
 * with books, which wait for loads and not for multiplications. */
kern_mat *const VEC_TABLE[QUANT_ID_END] = {
    [QUANT_Q4_0] = vec_q4_0,
    [QUANT_Q4_1] = vec_q4_1,
    [QUANT_Q5_0] = vec_q5_0,
    [QUANT_Q5_1] = vec_q5_1,
    [QUANT_Q8_0] = vec_q8_0,
    [QUANT_Q2_K] = vec_q2_k,
    [QUANT_Q3_K] = vec_q3_k,
    [QUANT_Q4_K] = kern_avx2_vec_q4_k,
    [QUANT_Q5_K] = kern_avx2_vec_q5_k,
    [QUANT_Q6_K] = kern_avx2_vec_q6_k,
    [QUANT_IQ2_XXS] = kern_avx2_vec_iq2_xxs,
    [QUANT_IQ2_XS] = kern_avx2_vec_iq2_xs,
    [QUANT_IQ2_S] = kern_avx2_vec_iq2_s,
    [QUANT_IQ3_S] = kern_avx2_vec_iq3_s,
    [QUANT_IQ3_XXS] = kern_avx2_vec_iq3_xxs,
    [QUANT_IQ1_S] = kern_avx2_vec_iq1_s,
    [QUANT_IQ1_M] = kern_avx2_vec_iq1_m,
    [QUANT_IQ4_NL] = vec_iq4_nl,
    [QUANT_IQ4_XS] = vec_iq4_xs,
    [QUANT_TQ1_0] = kern_avx2_vec_tq1_0,
    [QUANT_TQ2_0] = vec_tq2_0,
    [QUANT_MXFP4] = vec_mxfp4,
    [QUANT_NVFP4] = vec_nvfp4,
};
