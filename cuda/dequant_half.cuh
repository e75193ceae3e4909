/* Weight blocks as halves for tensor cores, 16 or 32 elements at a time. Each element is the reference's float (dequant.cuh: cu_row), of
 * which d * scale * code is exact, rounded once: no arithmetic in halves. cu_half16<TYPE> unpacks elements
 * [32 at + 16 side, 32 at + 16 side + 16), cu_half32<TYPE> both sides, of the blocks that begin `skew` (0..15) bytes behind `row`, an
 * address of shared memory that 16 divides: they lie there as they lay in the weights. A skew that the compiler knows to be 0 saves most
 * of cu_words(). */
#ifndef FERRY_CUDA_DEQUANT_HALF_CUH
#define FERRY_CUDA_DEQUANT_HALF_CUH

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

/* Any type: both sides are unpacked, one is packed. */
template <int TYPE> struct cu_half16 {
    static __device__ inline void unpack(const uint8_t *row, uint32_t skew, int at, int side,
                                         const struct cu_books *books, uint32_t out[8])
    {
        float x[32];

        cu_row<TYPE>::load32(row + skew, at, books, x);
        CU_UNROLL
        for (int i = 0; i < 8; i++) /* x is not indexed by `side`: it would leave its registers */
            out[i] = cu_pack_halves(side ? x[16 + 2 * i] : x[2 * i], side ? x[16 + 2 * i + 1] : x[2 * i + 1]);
    }
};

/* ---- pieces ---- */

struct alignas(16) cu_piece {
    uint32_t x[4];
};

/* N words that begin `at` bytes behind an address that 16 divides, each shifted right by `more` bits: what of the next word comes in
 * is not used. They are read by WIDTH bytes: 16 at once meet no bank twice where lanes' words are neighbours, but every step down from
 * there saves a choice for each word. What is read behind the words is not used. */
template <int N, int WIDTH>
static __device__ inline void cu_words_by(const uint8_t *row, uint32_t at, uint32_t more, uint32_t x[N])
{
    constexpr int STEP = WIDTH / 4, ALL = (N + STEP + STEP - 1) / STEP * STEP;
    const uint8_t *p = row + (at & ~(uint32_t)(WIDTH - 1));
    uint32_t w[ALL];

    CU_UNROLL
    for (int i = 0; i < ALL; i += STEP) {
        if (WIDTH == 4)
            w[i] = cu_load_word(p + 4 * i);
        else
            cu_load_wide<STEP>(p + 4 * i, w + i);
    }
    CU_UNROLL
    for (int i = 0; i < N + 2 && WIDTH == 16; i++)
        w[i] = at & 8 ? w[i + 2] : w[i];
    CU_UNROLL
    for (int i = 0; i < N + 1 && WIDTH >= 8; i++)
        w[i] = at & 4 ? w[i + 1] : w[i];
    CU_UNROLL
    for (int i = 0; i < N; i++)
        x[i] = (uint32_t)(((uint64_t)w[i + 1] << 32 | w[i]) >> ((at & 3) * 8 + more));
}

/* 4 words that begin `at` bytes behind an address that 16 divides: two pieces of 16 bytes are read, for a warp that reads by words
 * would meet each bank four times, and shifted. What is read behind the words is not used. */
static __device__ inline void cu_words(const uint8_t *row, uint32_t at, uint32_t x[4])
{
    const struct cu_piece *p = reinterpret_cast<const struct cu_piece *>(row + (at & ~15u));
    struct cu_piece first = p[0], second = {};
    uint32_t w[6];

    if (at & 15)
        second = p[1];
    CU_UNROLL
    for (int i = 0; i < 6; i++) {
        uint32_t far = i < 2 ? first.x[i + 2] : second.x[i - 2], near = i < 4 ? first.x[i & 3] : second.x[i & 3];
        w[i] = at & 8 ? far : near;
    }
    CU_UNROLL
    for (int i = 0; i < 5; i++)
        w[i] = at & 4 ? w[i + 1] : w[i];
    CU_UNROLL
    for (int i = 0; i < 4; i++)
        x[i] = (uint32_t)(((uint64_t)w[i + 1] << 32 | w[i]) >> (at & 3) * 8);
}

/* Byte i as a float, less `bias`; exact: the byte is put behind the exponent of 2^23. */
static __device__ inline float cu_byte_float(uint32_t bytes, int i, float bias)
{
    return cu_f32_of_bits(cu_byte_perm(bytes, 0x4b000000u, 0x7650u + (uint32_t)i)) - (8388608.0f + bias);
}

/* factor * (byte - bias) + term for the four bytes of a word. */
static __device__ inline void cu_pack4(uint32_t bytes, float bias, float factor, float term, uint32_t out[2])
{
    CU_UNROLL
    for (int i = 0; i < 2; i++)
        out[i] = cu_pack_halves(fmaf(factor, cu_byte_float(bytes, 2 * i, bias), term),
                                fmaf(factor, cu_byte_float(bytes, 2 * i + 1, bias), term));
}

/* factor * (byte - bias) for the four bytes of a word, each below LIMIT, by one fmaf each: the byte is put into the mantissa of
 * MAGIC (128, or 2^15), which becomes MAGIC + byte, and `less` is -factor * (MAGIC + bias): no bit of either product is lost, where
 * factor has no more than 18 bits (LIMIT 128), or 15 (256). */
template <int LIMIT>
static __device__ inline void cu_pack4_biased(uint32_t bytes, float factor, float less, uint32_t out[2])
{
    float x[4];

    CU_UNROLL
    for (uint32_t i = 0; i < 4; i++)
        x[i] = cu_f32_of_bits(LIMIT == 128 ? cu_byte_perm(bytes, 0x43000000u, 0x7044u + (i << 8))
                                           : cu_byte_perm(bytes, 0x47000000u, 0x7404u + (i << 4)));
    CU_UNROLL
    for (int i = 0; i < 2; i++)
        out[i] = cu_pack_halves(fmaf(factor, x[2 * i], less), fmaf(factor, x[2 * i + 1], less));
}

#define CU_HALF16(NAME)                                                                                         \
    template <> struct cu_half16<QUANT_##NAME> {                                                                \
        static __device__ inline void unpack(const uint8_t *row, uint32_t skew, int at, int side,               \
                                             const struct cu_books *books, uint32_t out[8]);                    \
    };                                                                                                          \
    __device__ inline void cu_half16<QUANT_##NAME>::unpack(const uint8_t *row, uint32_t skew, int at, int side, \
                                                           const struct cu_books *books, uint32_t out[8])

/* ---- blocks of 32 ---- */

CU_HALF16(Q4_0)
{
    const uint32_t b_at = skew + (uint32_t)at * 18;
    const uint8_t *b = row + b_at;
    float d = cu_half_at(b);
    uint32_t q[4];

    (void)books;
    cu_words(row, b_at + 2, q);
    CU_UNROLL
    for (int i = 0; i < 4; i++)
        cu_pack4_biased<128>(q[i] >> 4 * side & 0x0f0f0f0fu, d, d * -136.0f, out + 2 * i);
}

CU_HALF16(Q8_0)
{
    const uint32_t b_at = skew + (uint32_t)at * 34;
    const uint8_t *b = row + b_at;
    float d = cu_half_at(b);
    uint32_t q[4];

    (void)books;
    cu_words(row, b_at + (uint32_t)(2 + 16 * side), q);
    CU_UNROLL
    for (int i = 0; i < 4; i++)
        cu_pack4_biased<256>(q[i] ^ 0x80808080u, d, d * -32896.0f, out + 2 * i);
}

/* E2M1 is put into halves bit by bit: sign, two bits of exponent, one of mantissa give the value times 2^-14, subnormal or not. */
CU_HALF16(MXFP4)
{
    const uint32_t b_at = skew + (uint32_t)at * 17;
    const uint8_t *b = row + b_at;
    uint32_t q[4], e = b[0];
    float d = cu_f32_of_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23); /* of doubled values */

    (void)books;
    d = (d < 1e30f ? d : 1e30f) * 32768.0f; /* the product is infinite as a half long before, but 0 stays 0 */
    cu_words(row, b_at + 1, q);
    CU_UNROLL
    for (int i = 0; i < 8; i++) {
        uint32_t two =
            cu_byte_perm(q[i / 2] >> 4 * side, 0, i % 2 ? 0x4342u : 0x4140u); /* a code in the low bits of each half */
        two = (two & 0x00080008u) << 12 | (two & 0x00070007u) << 9;
        out[i] = cu_pack_halves(d * cu_half_to_f32((uint16_t)two), d * cu_half_to_f32((uint16_t)(two >> 16)));
    }
}

/* ---- super-blocks of 256 ---- */

CU_HALF16(Q4_K)
{
    const uint32_t b_at = skew + (uint32_t)at / 8 * 144;
    const uint8_t *b = row + b_at;
    int g = at % 8;
    struct cu_group scales;
    uint32_t q[4];

    (void)books;
    cu_scale_min_k4(b + 4, g, &scales);
    float d = cu_half_at(b) * (float)scales.scale[0], m = -cu_half_at(b + 2) * (float)scales.min[0];
    cu_words(row, b_at + (uint32_t)(16 + g / 2 * 32 + 16 * side), q);
    CU_UNROLL
    for (int i = 0; i < 4; i++)
        cu_pack4(q[i] >> g % 2 * 4 & 0x0f0f0f0fu, 0.0f, d, m, out + 2 * i);
}

CU_HALF16(Q5_K)
{
    const uint32_t b_at = skew + (uint32_t)at / 8 * 176;
    const uint8_t *b = row + b_at;
    int g = at % 8;
    struct cu_group scales;
    uint32_t q[4], high[4];

    (void)books;
    cu_scale_min_k4(b + 4, g, &scales);
    float d = cu_half_at(b) * (float)scales.scale[0], m = -cu_half_at(b + 2) * (float)scales.min[0];
    cu_words(row, b_at + (uint32_t)(48 + g / 2 * 32 + 16 * side), q);
    cu_words(row, b_at + (uint32_t)(16 + 16 * side), high);
    CU_UNROLL
    for (int i = 0; i < 4; i++)
        cu_pack4((q[i] >> g % 2 * 4 & 0x0f0f0f0fu) | (high[i] >> g & 0x01010101u) << 4, 0.0f, d, m, out + 2 * i);
}

CU_HALF16(Q6_K)
{
    const uint32_t b_at = skew + (uint32_t)at / 8 * 210;
    const uint8_t *b = row + b_at;
    int g = at % 8;
    float d = cu_half_at(b + 208) * (float)(int8_t)b[192 + 2 * g + side];
    uint32_t q[4], high[4];

    (void)books;
    cu_words(row, b_at + (uint32_t)(g / 4 * 64 + g % 2 * 32 + 16 * side), q);
    cu_words(row, b_at + (uint32_t)(128 + g / 4 * 32 + 16 * side), high);
    CU_UNROLL
    for (int i = 0; i < 4; i++)
        cu_pack4_biased<128>((q[i] >> g % 4 / 2 * 4 & 0x0f0f0f0fu) | (high[i] >> g % 4 * 2 & 0x03030303u) << 4, d,
                             d * -160.0f, out + 2 * i);
}

/* ---- floats ---- */

CU_HALF16(F16)
{
    (void)books;
    cu_words(row, skew + (uint32_t)(at * 64 + side * 32), out);
    cu_words(row, skew + (uint32_t)(at * 64 + side * 32 + 16), out + 4);
}

CU_HALF16(BF16)
{
    uint32_t x[8];

    (void)books;
    cu_words(row, skew + (uint32_t)(at * 64 + side * 32), x);
    cu_words(row, skew + (uint32_t)(at * 64 + side * 32 + 16), x + 4);
    CU_UNROLL
    for (int i = 0; i < 8; i++)
        out[i] = cu_pack_halves(cu_f32_of_bits(x[i] << 16), cu_f32_of_bits(x[i] & 0xffff0000u));
}

/* ---- 32 elements at once: [32 at, 32 at + 32) ---- */

/* Any type. */
template <int TYPE> struct cu_half32 {
    static __device__ inline void unpack(const uint8_t *row, uint32_t skew, int at, const struct cu_books *books,
                                         uint32_t out[16])
    {
        float x[32];

        cu_row<TYPE>::load32(row + skew, at, books, x);
        CU_UNROLL
        for (int i = 0; i < 16; i++)
            out[i] = cu_pack_halves(x[2 * i], x[2 * i + 1]);
    }
};

#define CU_HALF32(NAME)                                                                                               \
    template <> struct cu_half32<QUANT_##NAME> {                                                                      \
        static __device__ inline void unpack(const uint8_t *row, uint32_t skew, int at, const struct cu_books *books, \
                                             uint32_t out[16]);                                                       \
    };                                                                                                                \
    __device__ inline void cu_half32<QUANT_##NAME>::unpack(const uint8_t *row, uint32_t skew, int at,                 \
                                                           const struct cu_books *books, uint32_t out[16])

/* Both halves, where they share little. */
#define CU_HALF32_OF_16(NAME)                                              \
    CU_HALF32(NAME)                                                        \
    {                                                                      \
        cu_half16<QUANT_##NAME>::unpack(row, skew, at, 0, books, out);     \
        cu_half16<QUANT_##NAME>::unpack(row, skew, at, 1, books, out + 8); \
    }
CU_HALF32_OF_16(Q4_0)
CU_HALF32_OF_16(MXFP4)
CU_HALF32_OF_16(Q5_K)
CU_HALF32_OF_16(F16)
CU_HALF32_OF_16(BF16)

CU_HALF32(Q8_0)
{
    const uint32_t b_at = skew + (uint32_t)at * 34;
    float d = cu_half_at(row + b_at);
    uint32_t q[8];

    (void)books;
    cu_words_by<8, 8>(row, b_at + 2, 0, q);
    CU_UNROLL
    for (int i = 0; i < 8; i++)
        cu_pack4_biased<256>(q[i] ^ 0x80808080u, d, d * -32896.0f, out + 2 * i);
}

/* Codes become subnormal halves, 2^-24 or 2^-20 of them, where they lie: a conversion then makes floats of two at a time. */
CU_HALF32(Q4_K)
{
    const uint32_t b_at = skew + (uint32_t)at / 8 * 144;
    const uint8_t *b = row + b_at;
    const int g = at % 8;
    const uint32_t mask = g % 2 ? 0x00f000f0u : 0x000f000fu;
    struct cu_group scales;
    uint32_t q[8];

    (void)books;
    cu_scale_min_k4(b + 4, g, &scales);
    float d = cu_half_at(b) * (float)scales.scale[0] * (g % 2 ? 0x1p20f : 0x1p24f);
    float m = -cu_half_at(b + 2) * (float)scales.min[0];
    cu_words_by<8, 16>(row, b_at + (uint32_t)(16 + g / 2 * 32), 0, q);
    CU_UNROLL
    for (int i = 0; i < 8; i++) {
        uint32_t even = q[i] & mask, odd = q[i] >> 8 & mask;
        CU_UNROLL
        for (int two = 0; two < 2; two++)
            out[2 * i + two] = cu_pack_halves(fmaf(d, cu_half_to_f32((uint16_t)(even >> 16 * two)), m),
                                              fmaf(d, cu_half_to_f32((uint16_t)(odd >> 16 * two)), m));
    }
}

CU_HALF32(Q6_K)
{
    const uint32_t b_at = skew + (uint32_t)at / 8 * 210;
    const uint8_t *b = row + b_at;
    const int g = at % 8;
    const uint32_t scales = cu_u16(b + 192 + 2 * g);
    uint32_t q[8], high[8];

    (void)books;
    cu_words_by<8, 4>(row, b_at + (uint32_t)(g / 4 * 64 + g % 2 * 32), (uint32_t)(g % 4 / 2 * 4), q);
    cu_words_by<8, 4>(row, b_at + (uint32_t)(128 + g / 4 * 32), (uint32_t)(g % 4 * 2), high);
    CU_UNROLL
    for (int side = 0; side < 2; side++) {
        float d = cu_half_at(b + 208) * (float)(int8_t)(scales >> 8 * side);
        CU_UNROLL
        for (int i = 4 * side; i < 4 * side + 4; i++)
            cu_pack4_biased<128>((q[i] & 0x0f0f0f0fu) | (high[i] & 0x03030303u) << 4, d, d * -160.0f, out + 2 * i);
    }
}

#endif
