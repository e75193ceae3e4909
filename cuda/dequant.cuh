/* Weight blocks as integers, 32 elements at a time: the twin of cpu/kern_ref_mat_unpack.c for threads that each take a group.
 * cu_block<TYPE> says how long a block is and unpacks group g of it; element e of the group is
 *     (d * scale[e / 16]) * q[e] + m * min[e / 16]
 * A block lies where the largest power of two that divides its size, 16 at most, divides the address: tensors and experts' places begin at
 * multiples of 64, and rows are whole blocks. It is read by as much. */
#ifndef FERRY_CUDA_DEQUANT_CUH
#define FERRY_CUDA_DEQUANT_CUH

#include "cuda/device.cuh"
#include "cuda/launch.h"

struct cu_group {
    float d, m;
    uint32_t q[8]; /* 4 codes each */
    int scale[2], min[2];
};

/* What a minimum or the second scale means. */
enum cu_second {
    CU_SECOND_NONE,
    CU_SECOND_MIN,  /* acc = fmaf(m * dx, sum of min * x, acc) */
    CU_SECOND_HALF, /* m is the scale of the group's upper 16 elements: another block of its own (NVFP4) */
};

template <int TYPE> struct cu_block;

/* ---- loads ---- */

static __device__ inline uint32_t cu_u16(const uint8_t *p)
{
    return *reinterpret_cast<const uint16_t *>(p);
}

static __device__ inline uint32_t cu_u32(const uint8_t *p)
{
    return cu_u16(p) | cu_u16(p + 2) << 16;
}

static __device__ inline float cu_half_at(const uint8_t *p)
{
    return cu_half_to_f32((uint16_t)cu_u16(p));
}

/* ---- bytes of a word ---- */

/* Bit i of the low four to bit 0 of byte i. */
static __device__ inline uint32_t cu_spread4(uint32_t bits)
{
    return (bits & 15) * 0x00204081u & 0x01010101u;
}

/* 4 magnitudes, negated where the sign bit is set. */
static __device__ inline uint32_t cu_signed4(uint32_t magnitudes, uint32_t signs)
{
    uint32_t mask = cu_spread4(signs) * 255;
    return cu_sub4(magnitudes ^ mask, mask);
}

/* 16 bytes of nibbles: low ones are elements 0..15, high ones 16..31. */
static __device__ inline void cu_nibbles16(const uint8_t *p, uint32_t *q)
{
    uint32_t words[4];

    cu_load_words<4>(p, words);
    for (int i = 0; i < 4; i++) {
        q[i] = words[i] & 0x0f0f0f0fu;
        q[i + 4] = words[i] >> 4 & 0x0f0f0f0fu;
    }
}

/* 16 signed bytes, by fours: what the nibbles of some types stand for. */
template <int TYPE> struct cu_levels;

/* -127 -104 -83 -65 -49 -35 -22 -10 | 1 13 25 38 53 69 89 113 */
template <> struct cu_levels<QUANT_IQ4_NL> {
    static constexpr uint32_t A = 0xbfad9881u, B = 0xf6eaddcfu, C = 0x26190d01u, D = 0x71594535u;
};

/* E2M1 doubled: 0 1 2 3 4 6 8 12 and their negatives. */
template <> struct cu_levels<QUANT_MXFP4> {
    static constexpr uint32_t A = 0x03020100u, B = 0x0c080604u, C = 0xfdfeff00u, D = 0xf4f8fafcu;
};

/* Levels of the four nibbles in the lower half of a word. */
template <int TYPE> static __device__ inline uint32_t cu_levels4(uint32_t nibbles)
{
    typedef cu_levels<TYPE> t;
    uint32_t at = nibbles & 0x7777u;
    return cu_byte_perm(cu_byte_perm(t::A, t::B, at), cu_byte_perm(t::C, t::D, at), 0x3210u | (nibbles & 0x8888u) >> 1);
}

/* Of all eight: those of the bytes' low nibbles, and of the high ones. */
template <int TYPE> static __device__ inline void cu_levels8(uint32_t nibbles, uint32_t *low, uint32_t *high)
{
    uint32_t first = cu_levels4<TYPE>(nibbles), last = cu_levels4<TYPE>(nibbles >> 16);
    *low = cu_byte_perm(first, last, 0x6420u);
    *high = cu_byte_perm(first, last, 0x7531u);
}

/* Of 16 bytes at p. */
template <int TYPE> static __device__ inline void cu_levels16(const uint8_t *p, uint32_t *q)
{
    uint32_t words[4];

    cu_load_words<4>(p, words);
    for (int i = 0; i < 4; i++)
        cu_levels8<TYPE>(words[i], q + i, q + i + 4);
}

/* Sign bits of 8 elements from 7: the eighth makes their number even. */
static __device__ inline uint32_t cu_signs8(uint32_t index)
{
    uint32_t parity = index & 127;
    parity ^= parity >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    return (index & 127) | (parity & 1) << 7;
}

static __device__ inline void cu_no_factors(struct cu_group *out)
{
    out->scale[0] = out->scale[1] = out->min[0] = out->min[1] = 1;
    out->m = 0.0f;
}

static __device__ inline void cu_one_scale(struct cu_group *out, int scale)
{
    out->scale[0] = out->scale[1] = scale;
}

#define CU_BLOCK(NAME, len, bytes, x256, second)                                                                   \
    template <> struct cu_block<QUANT_##NAME> {                                                                    \
        static constexpr int LEN = len, BYTES = bytes, X256 = x256, SECOND = second;                               \
        static __device__ inline void group(const uint8_t *b, int g, const struct cu_books *books, cu_group *out); \
    };                                                                                                             \
    __device__ inline void cu_block<QUANT_##NAME>::group(const uint8_t *b, int g, const struct cu_books *books,    \
                                                         cu_group *out)

/* ---- blocks of 32 ---- */

CU_BLOCK(Q4_0, 32, 18, 0, CU_SECOND_NONE)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    cu_nibbles16(b + 2, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = cu_sub4(out->q[i], 0x08080808u);
}

CU_BLOCK(Q4_1, 32, 20, 0, CU_SECOND_MIN)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    out->m = cu_half_at(b + 2);
    cu_nibbles16(b + 4, out->q);
}

/* Codes of 5 bits: the fifth bits of all, then nibbles. */
static __device__ inline void cu_five_bits(const uint8_t *qh, uint32_t *q)
{
    uint32_t high = cu_u32(qh);
    cu_nibbles16(qh + 4, q);
    for (int i = 0; i < 8; i++)
        q[i] |= cu_spread4(high >> 4 * i) << 4;
}

CU_BLOCK(Q5_0, 32, 22, 0, CU_SECOND_NONE)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    cu_five_bits(b + 2, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = cu_sub4(out->q[i], 0x10101010u);
}

CU_BLOCK(Q5_1, 32, 24, 0, CU_SECOND_MIN)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    out->m = cu_half_at(b + 2);
    cu_five_bits(b + 4, out->q);
}

CU_BLOCK(Q8_0, 32, 34, 0, CU_SECOND_NONE)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    cu_load_words<8>(b + 2, out->q);
}

CU_BLOCK(IQ4_NL, 32, 18, 0, CU_SECOND_NONE)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    cu_levels16<QUANT_IQ4_NL>(b + 2, out->q);
}

/* Half of 2^(e - 127): levels are doubled. */
static __device__ inline float cu_e8m0_half(uint32_t e)
{
    return cu_f32_of_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}

CU_BLOCK(MXFP4, 32, 17, 0, CU_SECOND_NONE)
{
    (void)g, (void)books;
    cu_no_factors(out);
    out->d = cu_e8m0_half(b[0]);
    cu_levels16<QUANT_MXFP4>(b + 1, out->q);
}

/* Half of an unsigned E4M3; its NaN counts as 0. Exponent and mantissa lie as a float's, whose denormals are as many steps apart. */
static __device__ inline float cu_ue4m3_half(uint32_t x)
{
    float y = cu_f32_of_bits((x & 127) << 20) * cu_f32_of_bits((127u + 119) << 23);
    return x == 0x7f ? 0.0f : y;
}

CU_BLOCK(NVFP4, 64, 36, 0, CU_SECOND_HALF)
{
    (void)books;
    cu_no_factors(out);
    out->d = cu_ue4m3_half(b[2 * g]);
    out->m = cu_ue4m3_half(b[2 * g + 1]);
    for (int part = 0; part < 2; part++)
        for (int i = 0; i < 2; i++) {
            uint32_t *q = out->q + 4 * part + i;
            cu_levels8<QUANT_MXFP4>(cu_u32(b + 4 + (2 * g + part) * 8 + 4 * i), q, q + 2);
        }
}

/* ---- super-blocks of 256 ---- */

/* 32 codes of 2 bits of group g, as Q2_K, Q3_K and TQ2_0 have them. */
static __device__ inline void cu_crumbs(const uint8_t *qs, int g, uint32_t *q)
{
    cu_load_words<8>(qs + g / 4 * 32, q);
    for (int i = 0; i < 8; i++)
        q[i] = q[i] >> g % 4 * 2 & 0x03030303u;
}

CU_BLOCK(Q2_K, 256, 84, 1, CU_SECOND_MIN)
{
    (void)books;
    out->d = cu_half_at(b + 80);
    out->m = -cu_half_at(b + 82);
    for (int j = 0; j < 2; j++) {
        out->scale[j] = b[2 * g + j] & 15;
        out->min[j] = b[2 * g + j] >> 4;
    }
    cu_crumbs(b + 16, g, out->q);
}

CU_BLOCK(Q3_K, 256, 110, 1, CU_SECOND_NONE)
{
    (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b + 108);
    const uint8_t *scales = b + 96;
    for (int j = 0; j < 2; j++) {
        int at = 2 * g + j;
        int low = at < 8 ? scales[at] & 15 : scales[at - 8] >> 4;
        out->scale[j] = (low | (scales[8 + at % 4] >> at / 4 * 2 & 3) << 4) - 32;
    }
    uint32_t high[8];
    cu_load_words<8>(b, high);
    cu_crumbs(b + 32, g, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = cu_sub4(out->q[i] | (high[i] >> g & 0x01010101u) << 2, 0x04040404u);
}

/* Scales and minima of groups 2p and 2p + 1, each in a byte, out of the 12 bytes that Q4_K and Q5_K have: six bits each, those of the
 * later groups in two parts. */
static __device__ inline void cu_scale_min_pair(const uint32_t *s, int p, uint32_t *scale, uint32_t *min)
{
    const int shift = p % 2 * 16, early_shift = p < 2 ? shift : shift + 2;
    const uint32_t late = p < 2 ? 0 : 0x0f0f, early = p < 2 ? 0x3f3f : 0x3030;

    *scale = (s[0] >> early_shift & early) | (s[2] >> shift & late);
    *min = (s[1] >> early_shift & early) | (s[2] >> shift >> 4 & late);
}

/* Of one group, byte by byte. */
static __device__ inline void cu_scale_min_k4(const uint8_t *s, int g, struct cu_group *out)
{
    int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
    int min = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
    out->scale[0] = out->scale[1] = scale;
    out->min[0] = out->min[1] = min;
}

/* All of Q4_K's and Q5_K's group g but the codes. */
static __device__ inline void cu_head_k45(const uint8_t *b, int g, struct cu_group *out)
{
    struct cu_word16 head = cu_load16(b);
    uint32_t scale, min;

    out->d = cu_half_to_f32((uint16_t)head.x[0]);
    out->m = -cu_half_to_f32((uint16_t)(head.x[0] >> 16));
    cu_scale_min_pair(head.x + 1, g / 2, &scale, &min);
    out->scale[0] = out->scale[1] = (int)(scale >> g % 2 * 8 & 255);
    out->min[0] = out->min[1] = (int)(min >> g % 2 * 8 & 255);
}

CU_BLOCK(Q4_K, 256, 144, 1, CU_SECOND_MIN)
{
    (void)books;
    cu_head_k45(b, g, out);
    cu_load_wide<8>(b + 16 + g / 2 * 32, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = out->q[i] >> g % 2 * 4 & 0x0f0f0f0fu;
}

CU_BLOCK(Q5_K, 256, 176, 1, CU_SECOND_MIN)
{
    (void)books;
    uint32_t fifth[8];
    cu_head_k45(b, g, out);
    cu_load_wide<8>(b + 16, fifth);
    cu_load_wide<8>(b + 48 + g / 2 * 32, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = (out->q[i] >> g % 2 * 4 & 0x0f0f0f0fu) | (fifth[i] >> g & 0x01010101u) << 4;
}

CU_BLOCK(Q6_K, 256, 210, 1, CU_SECOND_NONE)
{
    (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b + 208);
    for (int j = 0; j < 2; j++)
        out->scale[j] = (int8_t)b[192 + 2 * g + j];
    uint32_t low[8];
    cu_load_words<8>(b + g / 4 * 64 + g % 2 * 32, low);
    cu_crumbs(b + 128, g, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = cu_sub4((low[i] >> g % 4 / 2 * 4 & 0x0f0f0f0fu) | out->q[i] << 4, 0x20202020u);
}

/* 8 codes at q[at], q[at + 1] from a book's row and sign bits. */
static __device__ inline void cu_put8(uint64_t row, uint32_t signs, uint32_t *q)
{
    q[0] = cu_signed4((uint32_t)row, signs);
    q[1] = cu_signed4((uint32_t)(row >> 32), signs >> 4);
}

CU_BLOCK(IQ2_XXS, 256, 66, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    out->d = cu_half_at(b) * 0.125f;
    const uint8_t *index = b + 2 + g * 8;
    uint32_t word = cu_u32(index + 4);
    cu_one_scale(out, (int)(2 * (word >> 28) + 1));
    for (int k = 0; k < 4; k++)
        cu_put8(books->iq2_xxs[index[k]], cu_signs8(word >> 7 * k), out->q + 2 * k);
}

CU_BLOCK(IQ2_XS, 256, 74, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    out->d = cu_half_at(b) * 0.125f;
    for (int j = 0; j < 2; j++)
        out->scale[j] = 2 * (b[66 + g] >> 4 * j & 15) + 1;
    for (int k = 0; k < 4; k++) {
        uint32_t word = cu_u16(b + 2 + 2 * (4 * g + k));
        cu_put8(books->iq2_xs[word & 511], cu_signs8(word >> 9), out->q + 2 * k);
    }
}

CU_BLOCK(IQ2_S, 256, 82, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    out->d = cu_half_at(b) * 0.125f;
    for (int j = 0; j < 2; j++)
        out->scale[j] = 2 * (b[74 + g] >> 4 * j & 15) + 1;
    for (int k = 0; k < 4; k++) {
        int index = b[2 + 4 * g + k] | (b[66 + g] >> 2 * k & 3) << 8;
        cu_put8(books->iq2_s[index], b[34 + 4 * g + k], out->q + 2 * k);
    }
}

CU_BLOCK(IQ3_XXS, 256, 98, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    out->d = cu_half_at(b) * 0.25f;
    const uint8_t *index = b + 2 + g * 8;
    uint32_t word = cu_u32(b + 66 + 4 * g);
    cu_one_scale(out, (int)(2 * (word >> 28) + 1));
    for (int k = 0; k < 8; k++)
        out->q[k] = cu_signed4(books->iq3_xxs[index[k]], cu_signs8(word >> 7 * (k / 2)) >> k % 2 * 4);
}

CU_BLOCK(IQ3_S, 256, 110, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    out->d = cu_half_at(b);
    cu_one_scale(out, 2 * (b[106 + g / 2] >> g % 2 * 4 & 15) + 1);
    for (int k = 0; k < 8; k++) {
        int index = b[2 + 8 * g + k] | (b[66 + g] >> k & 1) << 8;
        out->q[k] = cu_signed4(books->iq3_s[index], (uint32_t)b[74 + 4 * g + k / 2] >> k % 2 * 4);
    }
}

/* 8 elements of IQ1 in eighths: rows of -1, 0, 1, each shifted by one eighth up or down. */
static __device__ inline void cu_put_shifted(uint64_t row, bool down, uint32_t *q)
{
    uint32_t shift = down ? 0x01010101u : 0xffffffffu;
    q[0] = cu_sub4(((uint32_t)row & 0x1f1f1f1fu) << 3, shift);
    q[1] = cu_sub4(((uint32_t)(row >> 32) & 0x1f1f1f1fu) << 3, shift);
}

CU_BLOCK(IQ1_S, 256, 50, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    out->d = cu_half_at(b) * 0.125f;
    uint32_t qh = cu_u16(b + 34 + 2 * g);
    cu_one_scale(out, (int)(2 * (qh >> 12 & 7) + 1));
    for (int k = 0; k < 4; k++)
        cu_put_shifted(books->iq1_s[b[2 + 4 * g + k] | (qh >> 3 * k & 7) << 8], qh & 0x8000, out->q + 2 * k);
}

CU_BLOCK(IQ1_M, 256, 56, 1, CU_SECOND_NONE)
{
    cu_no_factors(out);
    uint32_t half = 0;
    for (int k = 0; k < 4; k++)
        half |= cu_u16(b + 48 + 2 * k) >> 12 << 4 * k;
    out->d = cu_half_to_f32((uint16_t)half) * 0.125f;
    for (int j = 0; j < 2; j++)
        out->scale[j] = (int)(2 * (cu_u16(b + 48 + 2 * (g / 2)) >> (2 * g + j) % 4 * 3 & 7) + 1);
    for (int k = 0; k < 4; k++) {
        uint32_t qh = b[32 + 2 * g + k / 2] >> k % 2 * 4;
        cu_put_shifted(books->iq1_s[b[4 * g + k] | (qh & 7) << 8], qh & 8, out->q + 2 * k);
    }
}

CU_BLOCK(IQ4_XS, 256, 136, 1, CU_SECOND_NONE)
{
    (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b);
    int low = b[4 + g / 2] >> g % 2 * 4 & 15;
    cu_one_scale(out, (low | (int)(cu_u16(b + 2) >> 2 * g & 3) << 4) - 32);
    cu_levels16<QUANT_IQ4_NL>(b + 8 + 16 * g, out->q);
}

/* Element e of TQ1_0: a digit of base 3 of a byte that is a fraction of 256. */
static __device__ inline int cu_tq1_digit(const uint8_t *b, int e)
{
    int byte = e < 160 ? e % 32 : e < 240 ? 32 + (e - 160) % 16 : 48 + (e - 240) % 4;
    int place = e < 160 ? e / 32 : e < 240 ? (e - 160) / 16 : (e - 240) / 4;
    uint8_t power = (uint8_t)(UINT64_C(0x511b090301) >> 8 * place); /* 3^place */
    return (uint8_t)(b[byte] * power) * 3 >> 8;
}

CU_BLOCK(TQ1_0, 256, 54, 1, CU_SECOND_NONE)
{
    (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b + 52);
    for (int i = 0; i < 8; i++) {
        out->q[i] = 0;
        for (int k = 0; k < 4; k++)
            out->q[i] |= (uint32_t)((cu_tq1_digit(b, 32 * g + 4 * i + k) - 1) & 255) << 8 * k;
    }
}

CU_BLOCK(TQ2_0, 256, 66, 1, CU_SECOND_NONE)
{
    (void)books;
    cu_no_factors(out);
    out->d = cu_half_at(b + 64);
    cu_crumbs(b, g, out->q);
    for (int i = 0; i < 8; i++)
        out->q[i] = cu_sub4(out->q[i], 0x01010101u);
}

/* clang-format off */
#define CU_QUANT_TYPES(X)                                                                                             \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S)     \
    X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M) X(IQ4_NL) X(IQ4_XS) X(TQ1_0) X(TQ2_0) X(MXFP4) X(NVFP4)
/* clang-format on */
#define CU_FLOAT_TYPES(X) X(F32) X(F16) X(BF16)

/* ---- floats ---- */

template <int TYPE> struct cu_float;

template <> struct cu_float<QUANT_F32> {
    typedef float word;
    static __device__ inline float value(float x)
    {
        return x;
    }
};

template <> struct cu_float<QUANT_F16> {
    typedef uint16_t word;
    static __device__ inline float value(uint16_t x)
    {
        return cu_half_to_f32(x);
    }
};

template <> struct cu_float<QUANT_BF16> {
    typedef uint16_t word;
    static __device__ inline float value(uint16_t x)
    {
        return cu_f32_of_bits((uint32_t)x << 16);
    }
};

/* Element e of an unpacked group. */
template <int SECOND> static __device__ inline float cu_element(const struct cu_group *w, int e)
{
    float q = (float)(int8_t)(w->q[e / 4] >> e % 4 * 8);
    if (SECOND == CU_SECOND_HALF)
        return (e < 16 ? w->d : w->m) * q;
    float x = w->d * (float)w->scale[e / 16] * q;
    return SECOND == CU_SECOND_MIN ? x + w->m * (float)w->min[e / 16] : x;
}

/* Elements [32 at, 32 at + 32) of a weight row as floats. */
template <int TYPE> struct cu_row {
    static __device__ inline void load32(const void *row, int64_t at, const struct cu_books *books, float *out)
    {
        typedef cu_block<TYPE> block;
        const int per = block::LEN / 32;
        struct cu_group w;
        block::group(static_cast<const uint8_t *>(row) + at / per * block::BYTES, (int)(at % per), books, &w);
        for (int e = 0; e < 32; e++)
            out[e] = cu_element<block::SECOND>(&w, e);
    }
};

#define CU_FLOAT_ROW(NAME)                                                                                          \
    template <> struct cu_row<QUANT_##NAME> {                                                                       \
        static __device__ inline void load32(const void *row, int64_t at, const struct cu_books *books, float *out) \
        {                                                                                                           \
            typedef cu_float<QUANT_##NAME> type;                                                                    \
            (void)books;                                                                                            \
            for (int e = 0; e < 32; e++)                                                                            \
                out[e] = type::value(static_cast<const type::word *>(row)[32 * at + e]);                            \
        }                                                                                                           \
    };
CU_FLOAT_TYPES(CU_FLOAT_ROW)

#endif
