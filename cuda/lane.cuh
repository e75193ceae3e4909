/* What a lane of a warp takes of a weight row and of the activations beside it, and their integer dot. A block of 256 is shared among
 * 4 lanes, so that scales are unpacked once for 64 elements; their sums, exact integers, are added up in any order. Types without a
 * form of their own here come through cu_block (dequant.cuh).
 *
 * cu_lane<TYPE>: LANES share what one term of the sum needs (a block; of NVFP4 half a block), each of them has ELEMENTS of it. ROWS:
 * weight rows that a lane multiplies with the activations it has loaded. dot(): ELEMENTS number j of a block, their share of the term's
 * two integers. factors(): what those of the term are multiplied by. Both read the block where it lies, in shared memory.
 *
 * What counts is instructions, above all those that are neither products nor loads: shifts, masks and selections have half the rate
 * of what else a multiprocessor does. So codes are masked where they lie and multiplied as they are, 4, 16 or 64 times too large, and
 * the sum is shifted back, once. */
#ifndef FERRY_CUDA_LANE_CUH
#define FERRY_CUDA_LANE_CUH

#include "cuda/act.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device.cuh"

/* ---- activations ---- */

/* 64 codes (32 of blocks of 32) in the order in which the type's lanes have their weights, and what they are scaled by. */
struct cu_x {
    uint32_t c[16];
    int sub[4]; /* of a row of blocks of 256: of each group of 32 that c comes from */
    int sum[4]; /* sums of 16 codes times sub, or of groups of 32, or of the block of 32 */
    float d;
    /* Of the type's levels (below). They come with the kernel's arguments, for all look-ups: as constants the compiler would move them into
     * registers for each. */
    uint32_t magnitudes[4];
    const uint32_t *book; /* the type's code-book (cu_book below), in shared memory */
};

/* Numbers 2i and 2i + 1 of an array of 16-bit integers. */
static __device__ inline void cu_two_shorts(const int16_t *x, int i, int *out)
{
    uint32_t both = cu_load_word(x + 2 * i);

    out[0] = (int16_t)both;
    out[1] = (int)both >> 16;
}

/* A lane has groups 2j and 2j + 1 of block `block`. */
struct cu_share_pair {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s256 *s = cu_act_s256_of(row, n) + block;

        cu_load_wide<16>(static_cast<const uint8_t *>(row) + 256 * block + 64 * j, x->c);
        cu_two_shorts(s->sub, j, x->sub);
        for (int i = 0; i < 2; i++) {
            int sums[2];
            cu_two_shorts(s->sum16, 2 * j + i, sums);
            x->sum[i] = sums[0] + sums[1];
        }
        x->d = s->d;
    }
};

/* A lane has groups g and g + 2 of half h of a block, whose nibbles share bytes; j = 2h + g. */
struct cu_share_nibbles {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s256 *s = cu_act_s256_of(row, n) + block;
        int group = j / 2 * 4 + j % 2;
        const uint8_t *codes = static_cast<const uint8_t *>(row) + 256 * block + 32 * group;

        cu_load_wide<8>(codes, x->c);
        cu_load_wide<8>(codes + 64, x->c + 8);
        x->sub[0] = s->sub[group];
        x->sub[1] = s->sub[group + 2];
        cu_two_shorts(s->sum16, group, x->sum);
        cu_two_shorts(s->sum16, group + 2, x->sum + 2);
        x->d = s->d;
    }
};

/* A lane has 16 elements, the first or the last, of each of the four groups of half h of a block; j = 2h + 0 or 1. */
struct cu_share_crumbs {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s256 *s = cu_act_s256_of(row, n) + block;
        const uint8_t *codes = static_cast<const uint8_t *>(row) + 256 * block + j / 2 * 128 + j % 2 * 16;

        for (int g = 0; g < 4; g++) {
            cu_load_wide<4>(codes + 32 * g, x->c + 4 * g);
            x->sub[g] = s->sub[j / 2 * 4 + g];
            x->sum[g] = s->sum16[j / 2 * 8 + 2 * g + j % 2];
        }
        x->d = s->d;
    }
};

/* A lane has a block of 32. */
struct cu_share_block {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s32 *s = cu_act_s32_of(row, n) + block;

        (void)j;
        cu_load_wide<8>(static_cast<const uint8_t *>(row) + 32 * block, x->c);
        x->sum[0] = s->sum;
        x->d = s->d;
    }
};

/* Bytes i of four words that lie `apart` from each other, for i from 0 to 3. */
static __device__ inline void cu_transpose(const uint32_t *from, int apart, uint32_t to[4])
{
    for (int i = 0; i < 2; i++) {
        const uint32_t which = i ? 0x7362u : 0x5140u, first = cu_byte_perm(from[0], from[apart], which),
                       last = cu_byte_perm(from[2 * apart], from[3 * apart], which);
        to[2 * i] = cu_byte_perm(first, last, 0x5410u);
        to[2 * i + 1] = cu_byte_perm(first, last, 0x7632u);
    }
}

/* A lane has a block of 32 whose fifth bits lie in one word: behind the codes they come once more as a mask of one bit of each byte takes
 * them, elements i, 8 + i, 16 + i and 24 + i. */
struct cu_share_fifths {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        cu_share_block::load(row, n, block, j, x);
        cu_transpose(x->c, 2, x->c + 8);
        cu_transpose(x->c + 1, 2, x->c + 12);
    }
};

/* Elements 4i, 16 + 4i, 4i + 1, 16 + 4i + 1, and the next: as bytes of nibbles have them, each its low one first. */
static __device__ inline void cu_interleave(uint32_t c[8])
{
    uint32_t x[8];

    for (int i = 0; i < 4; i++) {
        x[2 * i] = cu_byte_perm(c[i], c[i + 4], 0x5140u);
        x[2 * i + 1] = cu_byte_perm(c[i], c[i + 4], 0x7362u);
    }
    for (int i = 0; i < 8; i++)
        c[i] = x[i];
}

/* The same shares for types with levels. */
struct cu_share_levels32 {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        cu_share_block::load(row, n, block, j, x);
        cu_interleave(x->c);
    }
};

/* Of NVFP4, whose bytes have elements i and i + 8 of 16. */
struct cu_share_levels16 {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        uint32_t c[8];

        cu_share_block::load(row, n, block, j, x);
        for (int i = 0; i < 4; i++) {
            const uint32_t low = x->c[i / 2 * 4 + i % 2], high = x->c[i / 2 * 4 + i % 2 + 2];
            c[2 * i] = cu_byte_perm(low, high, 0x5140u);
            c[2 * i + 1] = cu_byte_perm(low, high, 0x7362u);
        }
        memcpy(x->c, c, sizeof c);
    }
};

struct cu_share_levels256 {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        cu_share_pair::load(row, n, block, j, x);
        cu_interleave(x->c);
        cu_interleave(x->c + 8);
    }
};

template <int N> static __device__ inline int cu_dot(const uint32_t *q, const uint32_t *c, int sum)
{
    for (int i = 0; i < N; i++)
        sum = cu_dp4a((int)q[i], (int)c[i], sum);
    return sum;
}

/* Of N words of unsigned codes where `mask` has them. */
template <int N>
static __device__ inline int cu_dot_masked(const uint32_t *q, uint32_t mask, const uint32_t *c, int sum)
{
    for (int i = 0; i < N; i++)
        sum = cu_dp4a_u8(q[i] & mask, (int)c[i], sum);
    return sum;
}

/* Levels of codes below 8 and of the others have opposite signs: magnitudes of both, all below 128. */
template <int TYPE> struct cu_magnitudes {
    static constexpr uint32_t A = 0, B = 0, C = 0, D = 0;
    static constexpr bool IS_UPPER_POSITIVE = false;
};

template <> struct cu_magnitudes<QUANT_IQ4_NL> {
    static constexpr uint32_t A = 0x4153687fu, B = 0x0a162331u, C = 0x26190d01u, D = 0x71594535u;
    static constexpr bool IS_UPPER_POSITIVE = true;
};

template <> struct cu_magnitudes<QUANT_MXFP4> {
    static constexpr uint32_t A = 0x03020100u, B = 0x0c080604u, C = A, D = B;
    static constexpr bool IS_UPPER_POSITIVE = false;
};

template <> struct cu_magnitudes<QUANT_IQ4_XS> : cu_magnitudes<QUANT_IQ4_NL> {
};
template <> struct cu_magnitudes<QUANT_NVFP4> : cu_magnitudes<QUANT_MXFP4> {
};

/* Of 8 N codes that number the levels of a table. A code of the other half gives the sign of a magnitude, 0: so a look-up costs one
 * instruction, which looks at half a word, and a product of its own. */
template <int TYPE, int N>
static __device__ inline int cu_dot_levels(const uint32_t *q, const uint32_t *c, const struct cu_x *x)
{
    const uint32_t *t = x->magnitudes;
    int lower = 0, upper = 0;

    for (int i = 0; i < 2 * N; i++) {
        uint32_t four = q[i / 2] >> i % 2 * 16;
        lower = cu_dp4a((int)cu_byte_or_sign(t[0], t[1], four), (int)c[i], lower);
        upper = cu_dp4a((int)cu_byte_or_sign(t[2], t[3], four ^ 0x8888u), (int)c[i], upper);
    }
    return cu_magnitudes<TYPE>::IS_UPPER_POSITIVE ? upper - lower : lower - upper;
}

/* Byte i of a word as a signed number. */
static __device__ inline int cu_signed_byte(uint32_t x, int i)
{
    return (int8_t)(x >> 8 * i);
}

/* Two numbers of 16 bits in a word. */
static __device__ inline uint32_t cu_pack_shorts(const int *x)
{
    return (uint32_t)(x[0] & 0xffff) | (uint32_t)x[1] << 16;
}

/* ---- types without a form of their own ---- */

template <int TYPE> struct cu_lane {
    typedef cu_block<TYPE> block;
    typedef cu_share_pair share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = block::SECOND;
    static_assert(block::X256 && SECOND == CU_SECOND_NONE, "minima would have to be multiplied");

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        *first = *second = 0;
        for (int i = 0; i < 2; i++) {
            struct cu_group w;
            block::group(b, 2 * j + i, books, &w);
            int low = cu_dot<4>(w.q, x->c + 8 * i, 0), high = cu_dot<4>(w.q + 4, x->c + 8 * i + 4, 0);
            *first += (w.scale[0] * low + w.scale[1] * high) * x->sub[i];
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        struct cu_group w;
        block::group(b, 2 * j, books, &w);
        *d = w.d;
        *m = w.m;
    }
};

/* ---- blocks of 32 ---- */

/* Nibbles. Codes below OFFSET are negative: the sum of all x is taken off OFFSET times. */
template <int TYPE, int OFFSET, int CODES_AT> struct cu_lane_nibbles {
    typedef cu_share_block share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = cu_block<TYPE>::SECOND;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t q[4];
        (void)j, (void)books;
        cu_load_shared_words<4>(b + CODES_AT, q);
        int low = cu_dot_masked<4>(q, 0x0f0f0f0fu, x->c, -OFFSET * x->sum[0]);
        *first = low + (cu_dot_masked<4>(q, 0xf0f0f0f0u, x->c + 4, 0) >> 4);
        *second = x->sum[0];
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b);
        *m = CODES_AT == 4 ? cu_half_at(b + 2) : 0.0f;
    }
};

template <> struct cu_lane<QUANT_Q4_0> : cu_lane_nibbles<QUANT_Q4_0, 8, 2> {
};
template <> struct cu_lane<QUANT_Q4_1> : cu_lane_nibbles<QUANT_Q4_1, 0, 4> {
};

/* Nibbles, and a fifth bit of each. */
template <int TYPE, int OFFSET, int BITS_AT> struct cu_lane_five {
    typedef cu_share_fifths share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = cu_block<TYPE>::SECOND;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t q[5]; /* fifth bits of all, then nibbles */
        int fifths = 0, low;
        (void)j, (void)books;
        cu_load_shared_words<5>(b + BITS_AT, q);
        for (int i = 0; i < 4; i++) { /* bits i and i + 4 of bytes: 2^i times too large */
            const uint32_t bits[2] = {q[0], q[0] >> 4}, mask = 0x01010101u << i;
            int sum = cu_dp4a_u8(bits[0] & mask, (int)x->c[8 + i], 0);
            fifths = 2 * fifths + cu_dp4a_u8(bits[1] & mask, (int)x->c[12 + i], sum);
        }
        low = cu_dot_masked<4>(q + 1, 0x0f0f0f0fu, x->c, -OFFSET * x->sum[0]) + 2 * fifths;
        *first = low + (cu_dot_masked<4>(q + 1, 0xf0f0f0f0u, x->c + 4, 0) >> 4);
        *second = x->sum[0];
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b);
        *m = BITS_AT == 4 ? cu_half_at(b + 2) : 0.0f;
    }
};

template <> struct cu_lane<QUANT_Q5_0> : cu_lane_five<QUANT_Q5_0, 16, 2> {
};
template <> struct cu_lane<QUANT_Q5_1> : cu_lane_five<QUANT_Q5_1, 0, 4> {
};

template <> struct cu_lane<QUANT_Q8_0> {
    typedef cu_share_block share;
    static constexpr int ROWS = 4, LANES = 1, ELEMENTS = 32, SECOND = CU_SECOND_NONE;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t q[8];
        (void)j, (void)books;
        cu_load_shared_words<8>(b + 2, q);
        *first = cu_dot<8>(q, x->c, 0);
        *second = 0;
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b);
        *m = 0.0f;
    }
};

/* Nibbles that number the levels of a table. */
template <int TYPE, int CODES_AT> struct cu_lane_levels {
    typedef cu_share_levels32 share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = CU_SECOND_NONE;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t q[4];
        (void)j, (void)books;
        cu_load_shared_words<4>(b + CODES_AT, q);
        *first = cu_dot_levels<TYPE, 4>(q, x->c, x);
        *second = 0;
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = CODES_AT == 1 ? cu_e8m0_half(b[0]) : cu_half_at(b);
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ4_NL> : cu_lane_levels<QUANT_IQ4_NL, 2> {
};
template <> struct cu_lane<QUANT_MXFP4> : cu_lane_levels<QUANT_MXFP4, 1> {
};

template <> struct cu_lane<QUANT_NVFP4> {
    typedef cu_share_levels16 share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = CU_SECOND_HALF;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t q[4];
        (void)books;
        for (int i = 0; i < 4; i++)
            q[i] = cu_load_word(b + 4 + 16 * j + 4 * i);
        *first = cu_dot_levels<QUANT_NVFP4, 2>(q, x->c, x);
        *second = cu_dot_levels<QUANT_NVFP4, 2>(q + 2, x->c + 4, x);
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        uint32_t both = cu_u16(b + 2 * j);
        (void)books;
        *d = cu_ue4m3_half(both & 255);
        *m = cu_ue4m3_half(both >> 8);
    }
};

/* ---- blocks of 256 ---- */

/* Q4_K, and Q5_K with a fifth bit of each code. */
template <int TYPE> struct cu_lane_k45 {
    static constexpr bool HAS_FIFTH = TYPE == QUANT_Q5_K;
    typedef cu_share_pair share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_MIN;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        struct cu_word16 head = cu_load16(b);
        uint32_t q[8], fifth[8], scale, min;
        int low = 0, high = 0;

        (void)books;
        cu_load_wide<8>(b + (HAS_FIFTH ? 48 : 16) + 32 * j, q);
        low = cu_dot_masked<8>(q, 0x0f0f0f0fu, x->c, 0);
        high = cu_dot_masked<8>(q, 0xf0f0f0f0u, x->c + 8, 0) >> 4;
        if (HAS_FIFTH) {
            cu_load_wide<8>(b + 16, fifth);
            low += (cu_dot_masked<8>(fifth, 0x01010101u << 2 * j, x->c, 0) >> 2 * j) * 16;
            high += (cu_dot_masked<8>(fifth, 0x02020202u << 2 * j, x->c + 8, 0) >> 2 * j) * 8;
        }
        cu_scale_min_pair(head.x + 1, j, &scale, &min);
        *first = cu_dp4a_u8(scale, x->sub[0], 0) * low + cu_dp4a_u8(scale, x->sub[1] << 8, 0) * high;
        *second = cu_dp2a_low(cu_pack_shorts(x->sum), min, 0); /* 32 * 127 * 8 at most: 16 bits */
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        uint32_t both = cu_load_word(b);
        (void)j, (void)books;
        *d = cu_half_to_f32((uint16_t)both);
        *m = -cu_half_to_f32((uint16_t)(both >> 16));
    }
};

template <> struct cu_lane<QUANT_Q4_K> : cu_lane_k45<QUANT_Q4_K> {
};
template <> struct cu_lane<QUANT_Q5_K> : cu_lane_k45<QUANT_Q5_K> {
};

template <> struct cu_lane<QUANT_Q6_K> {
    typedef cu_share_nibbles share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_NONE;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        const int half = j / 2, g = j % 2;
        uint32_t low[8], high[8], scale[2];
        int sum = 0;

        (void)books;
        cu_load_shared_words<8>(b + 64 * half + 32 * g, low);
        cu_load_shared_words<8>(b + 128 + 32 * half, high, 2 * g);
        for (int i = 0; i < 2; i++)
            scale[i] = cu_u16(b + 192 + 8 * half + 2 * g + 4 * i);
        for (int i = 0; i < 4; i++) { /* 16 elements of group g, 16 more, and of group g + 2 */
            const int at = i % 2 * 4;
            const uint32_t *c = x->c + 4 * i;
            int part = i < 2 ? cu_dot_masked<4>(low + at, 0x0f0f0f0fu, c, 0)
                             : cu_dot_masked<4>(low + at, 0xf0f0f0f0u, c, 0) >> 4;
            if (i < 2)
                part += cu_dot_masked<4>(high + at, 0x03030303u, c, 0) * 16;
            else
                part += cu_dot_masked<4>(high + at, 0x30303030u, c, 0);
            sum += cu_signed_byte(scale[i / 2], i % 2) * (x->sub[i / 2] * part - 32 * x->sum[i]);
        }
        *first = sum;
        *second = 0;
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b + 208);
        *m = 0.0f;
    }
};

/* Of a half's 8 scales those of the groups' first or last 16 elements, a byte each. */
static __device__ inline uint32_t cu_scales_of_crumbs(uint32_t first, uint32_t last, int place)
{
    return cu_byte_perm(first, last, place ? 0x7531u : 0x6420u);
}

template <> struct cu_lane<QUANT_Q2_K> {
    typedef cu_share_crumbs share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_MIN;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        const int half = j / 2, place = j % 2;
        const uint8_t *codes = b + 16 + 32 * half + 16 * place;
        uint32_t q[4], both = cu_scales_of_crumbs(cu_load_word(b + 8 * half), cu_load_word(b + 8 * half + 4), place);
        const uint32_t scales = both & 0x0f0f0f0fu, mins = both >> 4 & 0x0f0f0f0fu;
        int sum[2] = {0, 0}; /* of two groups each, the first as much too large as the second */

        (void)books;
        for (int i = 0; i < 4; i++)
            q[i] = cu_load_word(codes + 4 * i);
        for (int g = 0; g < 4; g++) {
            int scale = cu_dp4a_u8(scales, (g % 2 ? 1 : 4) * x->sub[g] << 8 * g, 0);
            sum[g / 2] += scale * cu_dot_masked<4>(q, 0x03030303u << 2 * g, x->c + 4 * g, 0);
        }
        *first = (sum[0] >> 2) + (sum[1] >> 6);
        *second = cu_dp2a_high(cu_pack_shorts(x->sum + 2), mins, cu_dp2a_low(cu_pack_shorts(x->sum), mins, 0));
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b + 80);
        *m = -cu_half_at(b + 82);
    }
};

template <> struct cu_lane<QUANT_Q3_K> {
    typedef cu_share_crumbs share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_NONE;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        const int half = j / 2, place = j % 2;
        uint32_t q[4], high[4], s[3];
        int sum = 0, sums = x->sum[0] + x->sum[1] + x->sum[2] + x->sum[3];

        (void)books;
        cu_load_shared_words<4>(b + 16 * place, high, 4 * half);
        cu_load_shared_words<4>(b + 32 + 32 * half + 16 * place, q);
        cu_load_shared_words<3>(b + 96, s);
        /* four bits of a nibble, two of the last word: of groups 0 and 1, and 2 higher of the others */
        const uint32_t low4 = cu_scales_of_crumbs(s[0], s[1], place) >> 4 * half & 0x0f0f0f0fu,
                       high2 = cu_byte_perm(s[2], 0, place ? 0x3131u : 0x2020u) >> 4 * half,
                       scales = low4 | (high2 << 4 & 0x00003030u) | (high2 << 2 & 0x30300000u);
        for (int g = 0; g < 4; g++) {
            int scale = cu_dp4a_u8(scales, x->sub[g] << 8 * g, -32 * x->sub[g]);
            int part = cu_dot_masked<4>(q, 0x03030303u << 2 * g, x->c + 4 * g, 0) >> 2 * g;
            part += cu_dot_masked<4>(high, 0x01010101u << g, x->c + 4 * g, 0) * 4 >> g;
            sum += scale * part;
        }
        sums = cu_dp2a_low(cu_pack_shorts(x->sum), scales, -32 * sums);
        *first = sum - 4 * cu_dp2a_high(cu_pack_shorts(x->sum + 2), scales, sums);
        *second = 0;
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b + 108);
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_TQ2_0> {
    typedef cu_share_crumbs share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_NONE;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t q[4];
        int sum = 0; /* 64 times too large */

        (void)books;
        cu_load_shared_words<4>(b + 16 * j, q);
        for (int g = 0; g < 4; g++)
            sum += (x->sub[g] << (6 - 2 * g)) * cu_dot_masked<4>(q, 0x03030303u << 2 * g, x->c + 4 * g, 0);
        *first = (sum >> 6) - (x->sum[0] + x->sum[1] + x->sum[2] + x->sum[3]);
        *second = 0;
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b + 64);
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ4_XS> {
    typedef cu_share_levels256 share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_NONE;

    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t head = cu_load_word(b), low = cu_load_word(b + 4), q[8];

        (void)books;
        for (int i = 0; i < 4; i++)
            cu_load8(b + 8 + 32 * j + 8 * i, q + 2 * i);
        *first = *second = 0;
        for (int i = 0; i < 2; i++) {
            int g = 2 * j + i, scale = (int)((low >> 4 * g & 15) | (head >> 16 >> 2 * g & 3) << 4) - 32;
            *first += scale * (x->sub[i] * cu_dot_levels<QUANT_IQ4_XS, 4>(q + 4 * i, x->c + 8 * i, x));
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b);
        *m = 0.0f;
    }
};

/* ---- blocks of 256 with code-books ---- */

/* The part of struct cu_books that the type's lanes read. */
template <int TYPE> struct cu_book {
    static constexpr uint32_t OFF = 0, BYTES = 0;
};

#define CU_BOOK(NAME, member)                                                                                \
    template <> struct cu_book<QUANT_##NAME> {                                                               \
        static constexpr uint32_t OFF = offsetof(struct cu_books, member), BYTES = sizeof(cu_books::member); \
    };
CU_BOOK(IQ2_XXS, iq2_xxs)
CU_BOOK(IQ2_XS, iq2_xs)
CU_BOOK(IQ2_S, iq2_s)
CU_BOOK(IQ3_XXS, iq3_xxs)
CU_BOOK(IQ3_S, iq3_s)
#undef CU_BOOK

/* Entry `at` of those of 8 bytes. */
static __device__ inline void cu_book_row(const struct cu_x *x, uint32_t at, uint32_t row[2])
{
    cu_load8(x->book + 2 * at, row);
}

/* Where a bit of 7 goes by this product, or of their last three and an eighth, added at the top: to the highest bits of bytes. No two of
 * them meet elsewhere. */
static constexpr uint32_t CU_TO_TOPS = 0x10204080u, CU_LAST_TO_TOPS = 0x01020408u;

/* 255 in each byte whose highest bit is set. */
static __device__ inline uint32_t cu_mask_of_tops(uint32_t x)
{
    return cu_byte_or_sign(x, 0, 0xba98u);
}

/* Bit i: whether an odd number of bits i to i + 6 are set. */
static __device__ inline uint32_t cu_parities7(uint32_t x)
{
    uint32_t two = x ^ x >> 1;
    return two ^ two >> 2 ^ two >> 4 ^ x >> 6;
}

/* Products with magnitudes, of all and of those that have a minus sign. */
struct cu_signed_sum {
    int all, negative;
};

/* Of 8, whose signs are the highest bits of two words' bytes. */
static __device__ inline void cu_add_signed(const uint32_t row[2], uint32_t first4, uint32_t last4, const uint32_t *c,
                                            struct cu_signed_sum *sum)
{
    sum->all = cu_dp4a((int)row[1], (int)c[1], cu_dp4a((int)row[0], (int)c[0], sum->all));
    sum->negative = cu_dp4a((int)(row[0] & cu_mask_of_tops(first4)), (int)c[0], sum->negative);
    sum->negative = cu_dp4a((int)(row[1] & cu_mask_of_tops(last4)), (int)c[1], sum->negative);
}

/* Of 8, whose signs are 8 bits. */
static __device__ inline void cu_add_signed8(const uint32_t row[2], uint32_t signs, const uint32_t *c,
                                             struct cu_signed_sum *sum)
{
    cu_add_signed(row, (signs & 15) * CU_TO_TOPS, (signs >> 4 & 15) * CU_TO_TOPS, c, sum);
}

/* Of 8, whose signs are 7 bits from bit `at` on; the eighth makes their number even. */
static __device__ inline void cu_add_signed7(const uint32_t row[2], uint32_t signs, uint32_t parities, int at,
                                             const uint32_t *c, struct cu_signed_sum *sum)
{
    const uint32_t seven = signs >> at & 127, eighth = parities << (31 - at) & 0x80000000u;
    cu_add_signed(row, seven * CU_TO_TOPS, seven * CU_LAST_TO_TOPS | eighth, c, sum);
}

static __device__ inline int cu_value(const struct cu_signed_sum *sum)
{
    return sum->all - 2 * sum->negative;
}

/* What all of them have. */
struct cu_lane_book {
    typedef cu_share_pair share;
    static constexpr int ROWS = 4, LANES = 4, ELEMENTS = 64, SECOND = CU_SECOND_NONE;
};

template <> struct cu_lane<QUANT_IQ2_XXS> : cu_lane_book {
    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t w[4], row[2]; /* of each group: four indices, and signs with a scale */

        (void)books;
        cu_load_shared_words<4>(b + 2 + 16 * j, w);
        *first = *second = 0;
        for (int i = 0; i < 2; i++) {
            const uint32_t signs = w[2 * i + 1], parities = cu_parities7(signs);
            struct cu_signed_sum sum = {0, 0};
            for (int k = 0; k < 4; k++) {
                cu_book_row(x, w[2 * i] >> 8 * k & 255, row);
                cu_add_signed7(row, signs, parities, 7 * k, x->c + 8 * i + 2 * k, &sum);
            }
            *first += (int)(2 * (signs >> 28) + 1) * (x->sub[i] * cu_value(&sum));
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b) * 0.125f;
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ2_XS> : cu_lane_book {
    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t w[4], row[2], scales = cu_u16(b + 66 + 2 * j); /* indices of 9 bits below signs of 7 */

        (void)books;
        cu_load_shared_words<4>(b + 2 + 16 * j, w);
        *first = *second = 0;
        for (int i = 0; i < 4; i++) { /* 16 elements */
            const uint32_t parities = cu_parities7(w[i]);
            struct cu_signed_sum sum = {0, 0};
            for (int k = 0; k < 2; k++) {
                cu_book_row(x, w[i] >> 16 * k & 511, row);
                cu_add_signed7(row, w[i], parities, 9 + 16 * k, x->c + 4 * i + 2 * k, &sum);
            }
            *first += (int)(2 * (scales >> 4 * i & 15) + 1) * (x->sub[i / 2] * cu_value(&sum));
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b) * 0.125f;
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ2_S> : cu_lane_book {
    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t index[2], signs[2], row[2], scales = cu_u16(b + 74 + 2 * j), high = cu_u16(b + 66 + 2 * j);

        (void)books;
        cu_load_shared_words<2>(b + 2 + 8 * j, index);
        cu_load_shared_words<2>(b + 34 + 8 * j, signs);
        *first = *second = 0;
        for (int i = 0; i < 4; i++) { /* 16 elements */
            struct cu_signed_sum sum = {0, 0};
            for (int k = 2 * i; k < 2 * i + 2; k++) {
                const uint32_t of8 = signs[k / 4] >> k % 4 * 8;
                cu_book_row(x, (index[k / 4] >> k % 4 * 8 & 255) | (high >> 2 * k & 3) << 8, row);
                cu_add_signed8(row, of8, x->c + 2 * k, &sum);
            }
            *first += (int)(2 * (scales >> 4 * i & 15) + 1) * (x->sub[i / 2] * cu_value(&sum));
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b) * 0.125f;
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ3_XXS> : cu_lane_book {
    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t index[4], signs[2];

        (void)books;
        cu_load_shared_words<4>(b + 2 + 16 * j, index);
        cu_load_shared_words<2>(b + 66 + 8 * j, signs);
        *first = *second = 0;
        for (int i = 0; i < 2; i++) {
            const uint32_t parities = cu_parities7(signs[i]);
            struct cu_signed_sum sum = {0, 0};
            for (int k = 0; k < 4; k++) {
                const uint32_t two = index[2 * i + k / 2] >> k % 2 * 16;
                const uint32_t row[2] = {x->book[two & 255], x->book[two >> 8 & 255]};
                cu_add_signed7(row, signs[i], parities, 7 * k, x->c + 8 * i + 2 * k, &sum);
            }
            *first += (int)(2 * (signs[i] >> 28) + 1) * (x->sub[i] * cu_value(&sum));
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b) * 0.25f;
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ3_S> : cu_lane_book {
    static __device__ inline void dot(const uint8_t *b, int j, const struct cu_books *books, const struct cu_x *x,
                                      int *first, int *second)
    {
        uint32_t index[4], signs[2], high = cu_u16(b + 66 + 2 * j), scales = b[106 + j];

        (void)books;
        cu_load_shared_words<4>(b + 2 + 16 * j, index);
        cu_load_shared_words<2>(b + 74 + 8 * j, signs);
        *first = *second = 0;
        for (int i = 0; i < 2; i++) {
            struct cu_signed_sum sum = {0, 0};
            for (int k = 4 * i; k < 4 * i + 4; k++) {
                const uint32_t of8 = signs[i] >> k % 4 * 8, two = index[k / 2] >> k % 2 * 16, ninth = high >> 2 * k;
                const uint32_t row[2] = {x->book[(two & 255) | (ninth & 1) << 8],
                                         x->book[(two >> 8 & 255) | (ninth & 2) << 7]};
                cu_add_signed8(row, of8, x->c + 2 * k, &sum);
            }
            *first += (int)(2 * (scales >> 4 * i & 15) + 1) * (x->sub[i] * cu_value(&sum));
        }
    }
    static __device__ inline void factors(const uint8_t *b, int j, const struct cu_books *books, float *d, float *m)
    {
        (void)j, (void)books;
        *d = cu_half_at(b);
        *m = 0.0f;
    }
};

#endif
