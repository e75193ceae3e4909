/* AVX2 matmul with one token: nothing is packed, since a weight is used only once. Each block of a weight row is multiplied
 * as it lies in memory, 32 columns a vector; the integer sums of 4 or 8 rows are then added across their lanes into one
 * vector, a row per lane, so that the scales and the fmafs of the contract (kern.h) are vector operations over rows.
 *
 * vpmaddubsw does not saturate here: two products of unsigned codes up to 63 with 127 fit 16 bits, and so do two of
 * signed codes down to -128 whose sign has been moved to the activation. */
#include "cpu/kern_avx2_vec.h"

#include "quant/blocks.h"
#include "quant/iq_grid.h"

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

/* Sums of words of 16 bits, if is_16, or of 32 bits. The first grow fourfold before they are widened: codes may have 5 bits,
 * since 4 * 2 * 31 * 127 < 32768. */
AVX2_INLINE __m256i sum8(const __m256i s[8], const bool is_16)
{
#define ADD(a, b) (is_16 ? _mm256_add_epi16(a, b) : _mm256_add_epi32(a, b))
    __m256i t[4], u[2];
    AVX2_UNROLL
    for (int i = 0; i < 4; i++)
        t[i] = ADD(_mm256_unpacklo_epi32(s[2 * i], s[2 * i + 1]), _mm256_unpackhi_epi32(s[2 * i], s[2 * i + 1]));
    AVX2_UNROLL
    for (int i = 0; i < 2; i++) {
        u[i] = ADD(_mm256_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm256_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
        u[i] = is_16 ? _mm256_madd_epi16(u[i], _mm256_set1_epi16(1)) : u[i];
    }
#undef ADD
    return _mm256_add_epi32(_mm256_permute2x128_si256(u[0], u[1], 0x20), _mm256_permute2x128_si256(u[0], u[1], 0x31));
}

/* The first 4 bytes of 8 rows' blocks: each loaded into all lanes, which takes no shuffle, and blended. */
AVX2_INLINE __m256i heads8(const uint8_t *const row[8], int64_t off)
{
#define HEAD(r) _mm256_set1_epi32(avx2_i32_at(row[r] + off))
    __m256i a =
        _mm256_blend_epi32(_mm256_blend_epi32(HEAD(0), HEAD(1), 2), _mm256_blend_epi32(HEAD(2), HEAD(3), 8), 12);
    __m256i b =
        _mm256_blend_epi32(_mm256_blend_epi32(HEAD(4), HEAD(5), 32), _mm256_blend_epi32(HEAD(6), HEAD(7), 128), 192);
#undef HEAD
    return _mm256_blend_epi32(a, b, 0xf0);
}

/* The low halves of each lane as floats, and the high ones. */
AVX2_INLINE void two_halves(__m256i v, __m256 *lo, __m256 *hi)
{
    __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2,
                                     3, 6, 7, 10, 11, 14, 15);
    v = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(v, order), 0xd8);
    *lo = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
    *hi = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
}

AVX2_INLINE __m256 add_scaled8(__m256 acc, __m256 d, __m256 dx, __m256i isum)
{
    return _mm256_fmadd_ps(_mm256_mul_ps(d, dx), _mm256_cvtepi32_ps(isum), acc);
}

AVX2_INLINE void two_halves4(__m128i v, __m128 *lo, __m128 *hi)
{
    __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256 f = _mm256_cvtph_ps(_mm_shuffle_epi8(v, order));
    *lo = _mm256_castps256_ps128(f);
    *hi = _mm256_extractf128_ps(f, 1);
}

/* What the first 16 bytes of a block of Q4_K or Q5_K hold, for 4 rows: scales and minima are those of rows 0 and 1, then of
 * rows 2 and 3, 8 bytes each. */
struct head_k4 {
    __m128 d, m;
    __m128i scale[2], min[2];
};

AVX2_INLINE struct head_k4 head_k4(const uint8_t *const row[4], int64_t off)
{
    __m128i mask4 = _mm_set1_epi8(15), mask6 = _mm_set1_epi8(63), high2 = _mm_set1_epi8(48);
    __m128i a0 = avx2_load16(row[0] + off), a1 = avx2_load16(row[1] + off);
    __m128i a2 = avx2_load16(row[2] + off), a3 = avx2_load16(row[3] + off);
    __m128i t0 = _mm_unpacklo_epi32(a0, a1), t1 = _mm_unpacklo_epi32(a2, a3);
    __m128i t2 = _mm_unpackhi_epi32(a0, a1), t3 = _mm_unpackhi_epi32(a2, a3);
    __m128i dm = _mm_unpacklo_epi64(t0, t1), s = _mm_unpackhi_epi64(t0, t1);
    __m128i m = _mm_unpacklo_epi64(t2, t3), sm = _mm_unpackhi_epi64(t2, t3);
    __m128i s_high = _mm_or_si128(_mm_and_si128(sm, mask4), _mm_and_si128(_mm_srli_epi16(s, 2), high2));
    __m128i m_high =
        _mm_or_si128(_mm_and_si128(_mm_srli_epi16(sm, 4), mask4), _mm_and_si128(_mm_srli_epi16(m, 2), high2));
    s = _mm_and_si128(s, mask6);
    m = _mm_and_si128(m, mask6);
    struct head_k4 h = {
        .scale = {_mm_unpacklo_epi32(s, s_high), _mm_unpackhi_epi32(s, s_high)},
        .min = {_mm_unpacklo_epi32(m, m_high), _mm_unpackhi_epi32(m, m_high)},
    };
    two_halves4(dm, &h.d, &h.m);
    h.m = _mm_xor_ps(_mm_set1_ps(-0.0f), h.m);
    return h;
}

/* Sums of the minima of 4 rows times those of 32 activation codes. */
AVX2_INLINE __m128i min_sums(const __m128i min[2], const int16_t *sum32)
{
    __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)sum32));
    __m256i a = _mm256_madd_epi16(_mm256_cvtepu8_epi16(min[0]), x);
    __m256i b = _mm256_madd_epi16(_mm256_cvtepu8_epi16(min[1]), x);
    a = _mm256_hadd_epi32(a, b); /* rows 0, 0, 2, 2 and 1, 1, 3, 3 */
    a = _mm256_hadd_epi32(a, a);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

/* A row's block of Q4_K, or of Q5_K if it has the fifth bits qh; both halves of `scale` hold its 8 factors. */
AVX2_INLINE __m256i dot_k4(const uint8_t *qs, const uint8_t *qh, const int8_t *x, __m256i scale)
{
    __m256i sum = _mm256_setzero_si256(), high = qh ? avx2_load32(qh) : sum;
    AVX2_UNROLL
    for (int c = 0; c < 4; c++) {
        __m256i v = avx2_load32(qs + c * 32), a = avx2_low4(v), b = avx2_high4(v);
        if (qh) {
            a = _mm256_or_si256(a, avx2_move_bits(high, 2 * c, 4, 16));
            b = _mm256_or_si256(b, avx2_move_bits(high, 2 * c + 1, 4, 16));
        }
        a = _mm256_maddubs_epi16(a, avx2_load32(x + c * 64));
        b = _mm256_maddubs_epi16(b, avx2_load32(x + c * 64 + 32));
        sum = avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(a, avx2_pick_word(scale, 2 * c))));
        sum = avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(b, avx2_pick_word(scale, 2 * c + 1))));
    }
    return sum;
}

AVX2_INLINE void run_k4(const struct kern_mat_args *a, const int bytes, const int64_t qs, const int64_t qh)
{
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 4) {
        const uint8_t *row[4];
        float out[4];
        __m128 acc = _mm_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, 4, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += bytes) {
            struct head_k4 h = head_k4(row, off);
            __m256i s[4], sub = avx2_sub_of(&x.s[b]);
            AVX2_UNROLL
            for (int r = 0; r < 4; r++) {
                avx2_vec_prefetch(a, 4, row, off, r, bytes);
                const uint8_t *p = row[r] + off;
                __m256i two = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(h.scale[r / 2]), sub); /* rows r, r ^ 1 */
                __m256i scale =
                    r % 2 ? _mm256_permute2x128_si256(two, two, 0x11) : _mm256_permute2x128_si256(two, two, 0);
                s[r] = dot_k4(p + qs, qh ? p + qh : 0, x.q + b * 256, scale);
            }
            __m128 dx = _mm_set1_ps(x.s[b].d);
            acc = avx2_vec_add4(acc, h.d, dx, avx2_vec_sum4(s));
            acc = avx2_vec_add4(acc, h.m, dx, min_sums(h.min, x.s[b].sum32));
        }
        _mm_storeu_ps(out, acc);
        avx2_vec_store(a, first, 4, out);
    }
}

void kern_avx2_vec_q4_k(const struct kern_mat_args *a)
{
    run_k4(a, sizeof(struct block_q4_k), OFF(q4_k, qs), 0);
}

void kern_avx2_vec_q5_k(const struct kern_mat_args *a)
{
    run_k4(a, sizeof(struct block_q5_k), OFF(q5_k, qs), OFF(q5_k, qh));
}

/* 32 columns of unsigned codes under two scales: those of the two halves of `scale`, word k. */
AVX2_INLINE __m256i add_codes(__m256i sum, __m256i codes, const int8_t *x, __m256i scale, const int k)
{
    __m256i prod = _mm256_maddubs_epi16(codes, avx2_load32(x));
    return avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(prod, avx2_pick_word(scale, k))));
}

/* A row's block; its codes are 32 too large. */
AVX2_INLINE __m256i dot_q6_k(const uint8_t *p, struct avx2_x256 x)
{
    __m128i bytes = avx2_load16(p + OFF(q6_k, scales));
    __m256i scale = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(avx2_even_odd(bytes)), avx2_sub_of(x.s));
    __m256i sum = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), avx2_load32(x.s->sum16));
    sum = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, 5));
    AVX2_UNROLL
    for (int half = 0; half < 2; half++) {
        __m256i a = avx2_load32(p + half * 64), b = avx2_load32(p + half * 64 + 32);
        __m256i high = avx2_load32(p + OFF(q6_k, qh) + half * 32);
        const int8_t *xh = x.q + half * 128;
        sum = add_codes(sum, _mm256_or_si256(avx2_low4(a), avx2_move_bits(high, 0, 4, 48)), xh, scale, half * 4);
        sum =
            add_codes(sum, _mm256_or_si256(avx2_low4(b), avx2_move_bits(high, 2, 4, 48)), xh + 32, scale, half * 4 + 1);
        sum = add_codes(sum, _mm256_or_si256(avx2_high4(a), avx2_move_bits(high, 4, 4, 48)), xh + 64, scale,
                        half * 4 + 2);
        sum = add_codes(sum, _mm256_or_si256(avx2_high4(b), avx2_move_bits(high, 6, 4, 48)), xh + 96, scale,
                        half * 4 + 3);
    }
    return sum;
}

AVX2_INLINE int half_q6_k(const uint8_t *p)
{
    return avx2_u16_at(p + OFF(q6_k, d));
}

void kern_avx2_vec_q6_k(const struct kern_mat_args *a)
{
    avx2_vec_256(a, sizeof(struct block_q6_k), dot_q6_k, half_q6_k, 1);
}

/* A row's block of Q3_K; codes are taken 4 too large. */
AVX2_INLINE __m256i dot_q3_k(const uint8_t *p, struct avx2_x256 x)
{
    __m128i low = _mm_loadl_epi64((const __m128i *)(p + OFF(q3_k, scales)));
    __m128i high = _mm_set1_epi32(avx2_i32_at(p + OFF(q3_k, scales) + 8));
    low = _mm_and_si128(_mm_unpacklo_epi64(low, _mm_srli_epi16(low, 4)), _mm_set1_epi8(15));
    high = _mm_and_si128(_mm_srlv_epi32(high, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
    __m128i bytes = _mm_sub_epi8(_mm_or_si128(low, _mm_slli_epi16(high, 4)), _mm_set1_epi8(32));
    __m256i scale = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(avx2_even_odd(bytes)), avx2_sub_of(x.s));
    __m256i sum = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), avx2_load32(x.s->sum16));
    __m256i mask = avx2_load32(p + OFF(q3_k, hmask));
    sum = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, 2));
    AVX2_UNROLL
    for (int c = 0; c < 8; c++) {
        __m256i low2 = avx2_move_bits(avx2_load32(p + OFF(q3_k, qs) + c / 4 * 32), c % 4 * 2, 0, 3);
        sum = add_codes(sum, _mm256_or_si256(low2, avx2_move_bits(mask, c, 2, 4)), x.q + c * 32, scale, c);
    }
    return sum;
}

AVX2_INLINE int half_q3_k(const uint8_t *p)
{
    return avx2_u16_at(p + OFF(q3_k, d));
}

void kern_avx2_vec_q3_k(const struct kern_mat_args *a)
{
    avx2_vec_256(a, sizeof(struct block_q3_k), dot_q3_k, half_q3_k, 1);
}

/* A row's block of TQ2_0; codes are taken 1 too large. */
AVX2_INLINE __m256i dot_tq2_0(const uint8_t *p, struct avx2_x256 x)
{
    __m256i sum = _mm256_madd_epi16(_mm256_set1_epi16(-1), avx2_load32(x.s->sum16)), scale = avx2_sub_of(x.s);
    AVX2_UNROLL
    for (int c = 0; c < 8; c++)
        sum = add_codes(sum, avx2_move_bits(avx2_load32(p + OFF(tq2_0, qs) + c / 4 * 32), c % 4 * 2, 0, 3),
                        x.q + c * 32, scale, c);
    return sum;
}

AVX2_INLINE int half_tq2_0(const uint8_t *p)
{
    return avx2_u16_at(p + OFF(tq2_0, d));
}

void kern_avx2_vec_tq2_0(const struct kern_mat_args *a)
{
    avx2_vec_256(a, sizeof(struct block_tq2_0), dot_tq2_0, half_tq2_0, 1);
}

/* A row's block of Q2_K, and the sums of its minima. */
AVX2_INLINE __m256i dot_q2_k(const uint8_t *p, struct avx2_x256 x, __m256i *min_sum)
{
    __m128i bytes = avx2_load16(p + OFF(q2_k, scales)), mask = _mm_set1_epi8(15);
    __m128i min = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    __m256i scale = _mm256_cvtepi8_epi16(avx2_even_odd(_mm_and_si128(bytes, mask))), sum = _mm256_setzero_si256();
    scale = _mm256_mullo_epi16(scale, avx2_sub_of(x.s));
    *min_sum = _mm256_madd_epi16(_mm256_cvtepi8_epi16(min), avx2_load32(x.s->sum16));
    AVX2_UNROLL
    for (int c = 0; c < 8; c++)
        sum = add_codes(sum, avx2_move_bits(avx2_load32(p + OFF(q2_k, qs) + c / 4 * 32), c % 4 * 2, 0, 3), x.q + c * 32,
                        scale, c);
    return sum;
}

void kern_avx2_vec_q2_k(const struct kern_mat_args *a)
{
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 4) {
        const uint8_t *row[4];
        float out[4];
        __m128 acc = _mm_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, 4, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += (int64_t)sizeof(struct block_q2_k)) {
            __m256i s[4], m[4];
            AVX2_UNROLL
            for (int r = 0; r < 4; r++) {
                avx2_vec_prefetch(a, 4, row, off, r, sizeof(struct block_q2_k));
                s[r] = dot_q2_k(row[r] + off, (struct avx2_x256){x.q + b * 256, &x.s[b]}, &m[r]);
            }
            int64_t at = off + OFF(q2_k, d);
            __m128 d, min, dx = _mm_set1_ps(x.s[b].d);
            two_halves4(_mm_setr_epi32(avx2_i32_at(row[0] + at), avx2_i32_at(row[1] + at), avx2_i32_at(row[2] + at),
                                       avx2_i32_at(row[3] + at)),
                        &d, &min);
            acc = avx2_vec_add4(acc, d, dx, avx2_vec_sum4(s));
            acc = avx2_vec_add4(acc, _mm_xor_ps(_mm_set1_ps(-0.0f), min), dx, avx2_vec_sum4(m));
        }
        _mm_storeu_ps(out, acc);
        avx2_vec_store(a, first, 4, out);
    }
}

/* 16 bytes of nibbles: columns 0..15 low, 16..31 high. */
AVX2_INLINE __m256i codes4(const uint8_t *p)
{
    __m256i v = _mm256_broadcastsi128_si256(avx2_load16(p));
    return avx2_low4(_mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)));
}

/* The same with bit i of the word before them as the fifth of column i. */
AVX2_INLINE __m256i codes5(const uint8_t *p)
{
#define SPREAD(k) k, k, k, k, k, k, k, k
    __m256i place = _mm256_setr_epi8(SPREAD(0), SPREAD(1), SPREAD(2), SPREAD(3));
#undef SPREAD
    __m256i one = _mm256_set1_epi64x((int64_t)0x8040201008040201u); /* a bit of its own for each byte */
    __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32(avx2_i32_at(p - 4)), place);
    __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, one), one);
    return _mm256_or_si256(codes4(p), _mm256_and_si256(is_set, _mm256_set1_epi8(16)));
}

/* E2M1 doubled, and 12 more. */
static const uint8_t fp4_levels12[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

/* How blocks of 32 columns are laid out. */
struct vec_32 {
    int bytes, qs;     /* of a block; where its codes begin */
    int n_bits, more;  /* of a code (8: with sign), which is this much too large */
    bool has_min;      /* a minimum follows the scale */
    const void *table; /* (16) bytes: codes are what nibbles find there */
    bool is_e8m0;      /* the scale is a byte, a power of 2 (its half is what counts), and no half */
};

AVX2_INLINE __m256i codes_of(const struct vec_32 f, const uint8_t *p)
{
    if (f.table)
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(avx2_load16(f.table)), codes4(p));
    return f.n_bits == 4 ? codes4(p) : f.n_bits == 5 ? codes5(p) : avx2_load32(p);
}

AVX2_INLINE void run_32(const struct kern_mat_args *a, const struct vec_32 f)
{
    struct kern_act_x32 x = kern_act_x32(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 8) {
        const uint8_t *row[8];
        float out[8];
        __m256 acc = _mm256_setzero_ps();
        int64_t off = 0;
        avx2_vec_rows(a, first, 8, row);
        for (int64_t b = 0; b < a->n_cols / 32; b++, off += f.bytes) {
            __m256i s[8], xv = avx2_load32(x.q + b * 32), xsum = _mm256_set1_epi32(x.s[b].sum);
            AVX2_UNROLL
            for (int r = 0; r < 8; r++) {
                avx2_vec_prefetch(a, 8, row, off, r, f.bytes);
                __m256i w = codes_of(f, row[r] + off + f.qs);
                __m256i prod = f.n_bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xv, w))
                                             : _mm256_maddubs_epi16(w, xv);
                s[r] = f.n_bits == 8 ? _mm256_madd_epi16(prod, _mm256_set1_epi16(1)) : prod;
            }
            __m256i isum = sum8(s, f.n_bits < 8), heads = heads8(row, off);
            __m256 d, m, dx = _mm256_set1_ps(x.s[b].d);
            if (f.is_e8m0)
                d = avx2_e8m0_half(_mm256_and_si256(heads, _mm256_set1_epi32(255)));
            else
                two_halves(heads, &d, &m);
            if (f.more)
                isum = _mm256_sub_epi32(isum, _mm256_mullo_epi32(xsum, _mm256_set1_epi32(f.more)));
            acc = add_scaled8(acc, d, dx, isum);
            if (f.has_min)
                acc = add_scaled8(acc, m, dx, xsum);
        }
        _mm256_storeu_ps(out, acc);
        avx2_vec_store(a, first, 8, out);
    }
}

#define VEC_32(type, ...)                                                                         \
    void kern_avx2_vec_##type(const struct kern_mat_args *a)                                      \
    {                                                                                             \
        run_32(a, (struct vec_32){sizeof(struct block_##type), (int)OFF(type, qs), __VA_ARGS__}); \
    }
VEC_32(q4_0, .n_bits = 4, .more = 8)
VEC_32(q4_1, .n_bits = 4, .has_min = true)
VEC_32(q5_0, .n_bits = 5, .more = 16)
VEC_32(q5_1, .n_bits = 5, .has_min = true)
VEC_32(q8_0, .n_bits = 8)
VEC_32(iq4_nl, .n_bits = 8, .table = iq_grid_iq4_levels)
VEC_32(mxfp4, .n_bits = 5, .more = 12, .table = fp4_levels12, .is_e8m0 = true)
