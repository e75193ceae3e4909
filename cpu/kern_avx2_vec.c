/* AVX2 matmul with one token: nothing is packed, since a weight is used only once. Each block of a weight row is multiplied
 * as it lies in memory, 32 columns a vector; the integer sums of 4 or 8 rows are then added across their lanes into one
 * vector, a row per lane, so that the scales and the fmafs of the contract (kern.h) are vector operations over rows.
 *
 * vpmaddubsw does not saturate here: two products of unsigned codes up to 63 with 127 fit 16 bits, and so do two of
 * signed codes down to -128 whose sign has been moved to the activation. */
#include "cpu/kern_avx2_mat.h"

#include "cpu/kern_act.h"
#include "quant/blocks.h"

#define OFF(type, member) ((int64_t)offsetof(struct block_##type, member))

AVX2_INLINE __m256i load32(const void *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

/* N rows from `first`; those past the last repeat it, and their sums are thrown away. */
AVX2_INLINE void rows_from(const struct kern_mat_args *a, int first, const int N, const uint8_t *row[])
{
    AVX2_UNROLL
    for (int r = 0; r < N; r++) {
        int at = first + r < a->n_rows ? first + r : a->n_rows - 1;
        row[r] = (const uint8_t *)a->w + (uint64_t)at * a->w_stride;
    }
}

/* Fetch what the next N rows will read, in the order of memory: so the prefetcher of the second-level cache sees one stream
 * and runs ahead, which it does not for N streams as short as rows are. The step at `off` has a share of `bytes` for each
 * of its rows; a burst of more would fill the queue of misses. */
AVX2_INLINE void prefetch(const struct kern_mat_args *a, const int N, const uint8_t *const row[], int64_t off, int r,
                          const int bytes)
{
    const char *p = (const char *)row[0] + (int64_t)a->w_stride * N + off * N + r * bytes;
    for (int i = 0; i < bytes; i += 64)
        _mm_prefetch(p + i, _MM_HINT_T0);
}

AVX2_INLINE void store_rows(const struct kern_mat_args *a, int first, const int N, const float *acc)
{
    for (int r = 0; r < N && first + r < a->n_rows; r++)
        a->dst[first + r] = acc[r];
}

AVX2_INLINE __m128i sum4(const __m256i s[4])
{
    __m256i v = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

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

AVX2_INLINE __m128 add_scaled4(__m128 acc, __m128 d, __m128 dx, __m128i isum)
{
    return _mm_fmadd_ps(_mm_mul_ps(d, dx), _mm_cvtepi32_ps(isum), acc);
}

AVX2_INLINE __m256 add_scaled8(__m256 acc, __m256 d, __m256 dx, __m256i isum)
{
    return _mm256_fmadd_ps(_mm256_mul_ps(d, dx), _mm256_cvtepi32_ps(isum), acc);
}

/* Word k of each half of v as all its words. */
AVX2_INLINE __m256i pick_word(__m256i v, const int k)
{
    return _mm256_shuffle_epi8(v, _mm256_set1_epi16((short)(2 * k | (2 * k + 1) << 8)));
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
    __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256 f = _mm256_cvtph_ps(_mm_shuffle_epi8(dm, order));
    h.d = _mm256_castps256_ps128(f);
    h.m = _mm_xor_ps(_mm_set1_ps(-0.0f), _mm256_extractf128_ps(f, 1));
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
    __m256i sum = _mm256_setzero_si256(), high = qh ? load32(qh) : sum;
    AVX2_UNROLL
    for (int c = 0; c < 4; c++) {
        __m256i v = load32(qs + c * 32), a = avx2_low4(v), b = avx2_high4(v);
        if (qh) {
            a = _mm256_or_si256(a, avx2_move_bits(high, 2 * c, 4, 16));
            b = _mm256_or_si256(b, avx2_move_bits(high, 2 * c + 1, 4, 16));
        }
        a = _mm256_maddubs_epi16(a, load32(x + c * 64));
        b = _mm256_maddubs_epi16(b, load32(x + c * 64 + 32));
        sum = avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(a, pick_word(scale, 2 * c))));
        sum = avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(b, pick_word(scale, 2 * c + 1))));
    }
    return sum;
}

/* What each 32 activations of a block count, in both halves. */
AVX2_INLINE __m256i sub_of(const struct kern_act_s256 *x)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)x->sub));
}

AVX2_INLINE void run_k4(const struct kern_mat_args *a, const int bytes, const int64_t qs, const int64_t qh)
{
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 4) {
        const uint8_t *row[4];
        float out[4];
        __m128 acc = _mm_setzero_ps();
        int64_t off = 0;
        rows_from(a, first, 4, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += bytes) {
            struct head_k4 h = head_k4(row, off);
            __m256i s[4], sub = sub_of(&x.s[b]);
            AVX2_UNROLL
            for (int r = 0; r < 4; r++) {
                prefetch(a, 4, row, off, r, bytes);
                const uint8_t *p = row[r] + off;
                __m256i two = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(h.scale[r / 2]), sub); /* rows r, r ^ 1 */
                __m256i scale =
                    r % 2 ? _mm256_permute2x128_si256(two, two, 0x11) : _mm256_permute2x128_si256(two, two, 0);
                s[r] = dot_k4(p + qs, qh ? p + qh : 0, x.q + b * 256, scale);
            }
            __m128 dx = _mm_set1_ps(x.s[b].d);
            acc = add_scaled4(acc, h.d, dx, sum4(s));
            acc = add_scaled4(acc, h.m, dx, min_sums(h.min, x.s[b].sum32));
        }
        _mm_storeu_ps(out, acc);
        store_rows(a, first, 4, out);
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

/* 32 columns of Q6_K under two scales: those of the two halves of `scale`, word k. */
AVX2_INLINE __m256i add_q6(__m256i sum, __m256i low, __m256i high, const int8_t *x, __m256i scale, const int k)
{
    __m256i prod = _mm256_maddubs_epi16(_mm256_or_si256(low, high), load32(x));
    return avx2_in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(prod, pick_word(scale, k))));
}

/* A row's block; its codes are 32 too large. */
AVX2_INLINE __m256i dot_q6_k(const uint8_t *p, const int8_t *x, const struct kern_act_s256 *xs)
{
    __m128i bytes = avx2_load16(p + OFF(q6_k, scales));
    __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    __m256i scale = _mm256_mullo_epi16(_mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, even_odd)), sub_of(xs));
    __m256i sum = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), load32(xs->sum16));
    sum = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sum, 5));
    AVX2_UNROLL
    for (int half = 0; half < 2; half++) {
        __m256i a = load32(p + half * 64), b = load32(p + half * 64 + 32);
        __m256i high = load32(p + OFF(q6_k, qh) + half * 32);
        const int8_t *xh = x + half * 128;
        sum = add_q6(sum, avx2_low4(a), avx2_move_bits(high, 0, 4, 48), xh, scale, half * 4);
        sum = add_q6(sum, avx2_low4(b), avx2_move_bits(high, 2, 4, 48), xh + 32, scale, half * 4 + 1);
        sum = add_q6(sum, avx2_high4(a), avx2_move_bits(high, 4, 4, 48), xh + 64, scale, half * 4 + 2);
        sum = add_q6(sum, avx2_high4(b), avx2_move_bits(high, 6, 4, 48), xh + 96, scale, half * 4 + 3);
    }
    return sum;
}

void kern_avx2_vec_q6_k(const struct kern_mat_args *a)
{
    struct kern_act_x256 x = kern_act_x256(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 4) {
        const uint8_t *row[4];
        float out[4];
        __m128 acc = _mm_setzero_ps();
        int64_t off = 0;
        rows_from(a, first, 4, row);
        for (int64_t b = 0; b < a->n_cols / 256; b++, off += (int64_t)sizeof(struct block_q6_k)) {
            __m256i s[4];
            __m128i d = _mm_setzero_si128();
            AVX2_UNROLL
            for (int r = 0; r < 4; r++) {
                prefetch(a, 4, row, off, r, sizeof(struct block_q6_k));
                s[r] = dot_q6_k(row[r] + off, x.q + b * 256, &x.s[b]);
            }
            d = _mm_insert_epi16(d, avx2_u16_at(row[0] + off + OFF(q6_k, d)), 0);
            d = _mm_insert_epi16(d, avx2_u16_at(row[1] + off + OFF(q6_k, d)), 1);
            d = _mm_insert_epi16(d, avx2_u16_at(row[2] + off + OFF(q6_k, d)), 2);
            d = _mm_insert_epi16(d, avx2_u16_at(row[3] + off + OFF(q6_k, d)), 3);
            acc = add_scaled4(acc, _mm_cvtph_ps(d), _mm_set1_ps(x.s[b].d), sum4(s));
        }
        _mm_storeu_ps(out, acc);
        store_rows(a, first, 4, out);
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

/* Blocks of 32 columns whose codes have n_bits (8: with sign) and begin at `qs`, `more` too large; with a minimum after the
 * scale if has_min. */
AVX2_INLINE void run_32(const struct kern_mat_args *a, const int bytes, const int64_t qs, const int n_bits,
                        const int more, const bool has_min)
{
    struct kern_act_x32 x = kern_act_x32(a->x, a->n_cols);
    for (int first = 0; first < a->n_rows; first += 8) {
        const uint8_t *row[8];
        float out[8];
        __m256 acc = _mm256_setzero_ps();
        int64_t off = 0;
        rows_from(a, first, 8, row);
        for (int64_t b = 0; b < a->n_cols / 32; b++, off += bytes) {
            __m256i s[8], xv = load32(x.q + b * 32), xsum = _mm256_set1_epi32(x.s[b].sum);
            AVX2_UNROLL
            for (int r = 0; r < 8; r++) {
                prefetch(a, 8, row, off, r, bytes);
                const uint8_t *p = row[r] + off + qs;
                __m256i w = n_bits == 4 ? codes4(p) : n_bits == 5 ? codes5(p) : load32(p);
                __m256i prod = n_bits == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xv, w))
                                           : _mm256_maddubs_epi16(w, xv);
                s[r] = n_bits == 8 ? _mm256_madd_epi16(prod, _mm256_set1_epi16(1)) : prod;
            }
            __m256i isum = sum8(s, n_bits < 8);
            __m256 d, m, dx = _mm256_set1_ps(x.s[b].d);
            two_halves(heads8(row, off), &d, &m);
            if (more)
                isum = _mm256_sub_epi32(isum, _mm256_mullo_epi32(xsum, _mm256_set1_epi32(more)));
            acc = add_scaled8(acc, d, dx, isum);
            if (has_min)
                acc = add_scaled8(acc, m, dx, xsum);
        }
        _mm256_storeu_ps(out, acc);
        store_rows(a, first, 8, out);
    }
}

void kern_avx2_vec_q4_0(const struct kern_mat_args *a)
{
    run_32(a, sizeof(struct block_q4_0), OFF(q4_0, qs), 4, 8, false);
}

void kern_avx2_vec_q4_1(const struct kern_mat_args *a)
{
    run_32(a, sizeof(struct block_q4_1), OFF(q4_1, qs), 4, 0, true);
}

void kern_avx2_vec_q5_0(const struct kern_mat_args *a)
{
    run_32(a, sizeof(struct block_q5_0), OFF(q5_0, qs), 5, 16, false);
}

void kern_avx2_vec_q5_1(const struct kern_mat_args *a)
{
    run_32(a, sizeof(struct block_q5_1), OFF(q5_1, qs), 5, 0, true);
}

void kern_avx2_vec_q8_0(const struct kern_mat_args *a)
{
    run_32(a, sizeof(struct block_q8_0), OFF(q8_0, qs), 8, 0, false);
}
