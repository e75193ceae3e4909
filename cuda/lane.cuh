/* What a lane of a warp takes of a weight row and of the activations beside it, and their integer dot. A block of 256 is shared among
 * 8 lanes, so that neighbours read neighbouring bytes and each byte is read once; their sums, exact integers, are added up in any
 * order. Types without a form of their own here come through cu_block (dequant.cuh): a lane for each 32 elements.
 *
 * cu_lane<TYPE>: LANES share what one term of the sum needs (a block; of NVFP4 half a block), each of them has ELEMENTS of it.
 * ROWS: weight rows of a block of the kernel for one place; four or eight, whichever was quicker on an H200 (registers against loads under
 * way).
 * struct weights: what load() brings of ELEMENTS number j of a block. dot(): their share of the term's two integers. factors(): what
 * they are multiplied by. */
#ifndef FERRY_CUDA_LANE_CUH
#define FERRY_CUDA_LANE_CUH

#include "cuda/act.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device.cuh"

/* ---- activations ---- */

/* 32 codes (16 where ELEMENTS is 16) in the order in which the type's lanes have their weights, and what they are scaled by. */
struct cu_x {
    uint32_t c[8];
    int sub[4]; /* of a row of blocks of 256: of each 32 elements that c comes from */
    int sum[4]; /* sums of codes, by 16 elements times sub, or of the block of 32 */
    float d;
};

/* A lane has a group of 32 neighbours of block `block`. */
struct cu_share_group {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s256 *s = cu_act_s256_of(row, n) + block;

        cu_load_wide<8>(static_cast<const uint8_t *>(row) + 256 * block + 32 * j, x->c);
        x->sub[0] = s->sub[j];
        x->sum[0] = s->sum16[2 * j];
        x->sum[1] = s->sum16[2 * j + 1];
        x->d = s->d;
    }
};

/* A lane has half h of groups 2p and 2p + 1, whose nibbles share bytes; j = 2p + h. */
struct cu_share_halves {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s256 *s = cu_act_s256_of(row, n) + block;
        const uint8_t *codes = static_cast<const uint8_t *>(row) + 256 * block + j / 2 * 64 + j % 2 * 16;

        cu_load_wide<4>(codes, x->c);
        cu_load_wide<4>(codes + 32, x->c + 4);
        for (int i = 0; i < 2; i++) {
            x->sub[i] = s->sub[j / 2 * 2 + i];
            x->sum[i] = s->sum16[j / 2 * 4 + 2 * i + j % 2];
        }
        x->d = s->d;
    }
};

/* A lane has 8 elements at the same places of the four groups of 32 of a half block; j = 4 * half + place / 8. x->sum: of 16 elements
 * in the lanes that have the first 8 of them, 0 in their neighbours. */
struct cu_share_quarters {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s256 *s = cu_act_s256_of(row, n) + block;
        const uint8_t *codes = static_cast<const uint8_t *>(row) + 256 * block + j / 4 * 128 + j % 4 * 8;

        for (int g = 0; g < 4; g++) {
            cu_load_wide<2>(codes + 32 * g, x->c + 2 * g);
            x->sub[g] = s->sub[j / 4 * 4 + g];
            x->sum[g] = j % 2 ? 0 : s->sum16[j / 4 * 8 + 2 * g + j % 4 / 2];
        }
        x->d = s->d;
    }
};

/* A lane has a block of 32, or half of it. */
template <int LANES> struct cu_share_block {
    static __device__ inline void load(const void *row, int n, int block, int j, struct cu_x *x)
    {
        const struct cu_act_s32 *s = cu_act_s32_of(row, n) + block;

        cu_load_wide<8 / LANES>(static_cast<const uint8_t *>(row) + 32 * block + 32 / LANES * j, x->c);
        x->sum[0] = s->sum;
        x->d = s->d;
    }
};

template <int N> static __device__ inline int cu_dot(const uint32_t *q, const uint32_t *c)
{
    int sum = 0;
    for (int i = 0; i < N; i++)
        sum = cu_dp4a((int)q[i], (int)c[i], sum);
    return sum;
}

/* Sum of 4 N codes. */
template <int N> static __device__ inline int cu_sum_codes(const uint32_t *c)
{
    int sum = 0;
    for (int i = 0; i < N; i++)
        sum = cu_dp4a(0x01010101, (int)c[i], sum);
    return sum;
}

/* Byte i of a word, or of two. */
static __device__ inline int cu_byte(uint32_t x, int i)
{
    return (int)(x >> 8 * i & 255);
}

/* ---- types without a form of their own ---- */

template <int TYPE, int X256> struct cu_lane_group;

template <int TYPE> struct cu_lane_group<TYPE, 1> {
    typedef cu_block<TYPE> block;
    typedef cu_group weights;
    typedef cu_share_group share;
    static constexpr int ROWS = 8, LANES = 8, ELEMENTS = 32, SECOND = block::SECOND;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        block::group(b, j, books, w);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        *first = (w->scale[0] * cu_dot<4>(w->q, x->c) + w->scale[1] * cu_dot<4>(w->q + 4, x->c + 4)) * x->sub[0];
        *second = w->min[0] * x->sum[0] + w->min[1] * x->sum[1];
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = w->d;
        *m = w->m;
    }
};

template <int TYPE> struct cu_lane_group<TYPE, 0> {
    typedef cu_block<TYPE> block;
    typedef cu_group weights;
    typedef cu_share_block<1> share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = block::SECOND;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        block::group(b, j, books, w);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int low = cu_dot<4>(w->q, x->c), high = cu_dot<4>(w->q + 4, x->c + 4);
        *first = SECOND == CU_SECOND_HALF ? low : low + high;
        *second = SECOND == CU_SECOND_HALF ? high : x->sum[0];
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = w->d;
        *m = w->m;
    }
};

template <int TYPE> struct cu_lane : cu_lane_group<TYPE, cu_block<TYPE>::X256> {
};
template <> struct cu_lane<QUANT_NVFP4> : cu_lane_group<QUANT_NVFP4, 0> {
    static constexpr int ROWS = 4;
};

/* ---- blocks of 32 ---- */

/* Codes below OFFSET are negative: the sum of all x is taken off OFFSET times. */
template <int TYPE, int OFFSET, int CODES_AT> struct cu_lane_nibbles {
    struct weights {
        uint32_t head, q[4];
    };
    typedef cu_share_block<1> share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = cu_block<TYPE>::SECOND;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        (void)j, (void)books;
        w->head = CODES_AT == 4 ? cu_load_word(b) : cu_u16(b);
        cu_load_words<4>(b + CODES_AT, w->q);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0;
        for (int i = 0; i < 4; i++) {
            sum = cu_dp4a((int)(w->q[i] & 0x0f0f0f0fu), (int)x->c[i], sum);
            sum = cu_dp4a((int)(w->q[i] >> 4 & 0x0f0f0f0fu), (int)x->c[i + 4], sum);
        }
        *first = sum - OFFSET * x->sum[0];
        *second = x->sum[0];
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->head);
        *m = CODES_AT == 4 ? cu_half_to_f32((uint16_t)(w->head >> 16)) : 0.0f;
    }
};

template <> struct cu_lane<QUANT_Q4_0> : cu_lane_nibbles<QUANT_Q4_0, 8, 2> {
};
template <> struct cu_lane<QUANT_Q4_1> : cu_lane_nibbles<QUANT_Q4_1, 0, 4> {
};

/* Nibbles, and a fifth bit of each. */
template <int TYPE, int OFFSET, int BITS_AT> struct cu_lane_five {
    struct weights {
        uint32_t head, q[5];
    };
    typedef cu_share_block<1> share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = cu_block<TYPE>::SECOND;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        (void)j, (void)books;
        w->head = BITS_AT == 4 ? cu_load_word(b) : cu_u16(b);
        cu_load_words<5>(b + BITS_AT, w->q);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0;
        for (int i = 0; i < 4; i++) {
            uint32_t low = (w->q[i + 1] & 0x0f0f0f0fu) | cu_spread4(w->q[0] >> 4 * i) << 4;
            uint32_t high = (w->q[i + 1] >> 4 & 0x0f0f0f0fu) | cu_spread4(w->q[0] >> (4 * i + 16)) << 4;
            sum = cu_dp4a((int)low, (int)x->c[i], sum);
            sum = cu_dp4a((int)high, (int)x->c[i + 4], sum);
        }
        *first = sum - OFFSET * x->sum[0];
        *second = x->sum[0];
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->head);
        *m = BITS_AT == 4 ? cu_half_to_f32((uint16_t)(w->head >> 16)) : 0.0f;
    }
};

template <> struct cu_lane<QUANT_Q5_0> : cu_lane_five<QUANT_Q5_0, 16, 2> {
};
template <> struct cu_lane<QUANT_Q5_1> : cu_lane_five<QUANT_Q5_1, 0, 4> {
};

/* Two lanes a block: 32 lanes with a block each would reach over nine lines of memory with each load. */
template <> struct cu_lane<QUANT_Q8_0> {
    struct weights {
        uint32_t head, q[4];
    };
    typedef cu_share_block<2> share;
    static constexpr int ROWS = 8, LANES = 2, ELEMENTS = 16, SECOND = CU_SECOND_NONE;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        (void)books;
        w->head = cu_u16(b);
        cu_load_words<4>(b + 2 + 16 * j, w->q);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        *first = cu_dot<4>(w->q, x->c);
        *second = 0;
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->head);
        *m = 0.0f;
    }
};

/* Nibbles that number the levels of a table. */
template <int TYPE, int CODES_AT> struct cu_lane_levels {
    struct weights {
        uint32_t head, q[4];
    };
    typedef cu_share_block<1> share;
    static constexpr int ROWS = 8, LANES = 1, ELEMENTS = 32, SECOND = CU_SECOND_NONE;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        (void)j, (void)books;
        w->head = CODES_AT == 1 ? b[0] : cu_u16(b);
        cu_load_words<4>(b + CODES_AT, w->q);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0;
        for (int i = 0; i < 4; i++) {
            uint32_t low, high;
            cu_levels8<TYPE>(w->q[i], &low, &high);
            sum = cu_dp4a((int)low, (int)x->c[i], sum);
            sum = cu_dp4a((int)high, (int)x->c[i + 4], sum);
        }
        *first = sum;
        *second = 0;
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = CODES_AT == 1 ? cu_e8m0_half(w->head) : cu_half_to_f32((uint16_t)w->head);
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ4_NL> : cu_lane_levels<QUANT_IQ4_NL, 2> {
};
template <> struct cu_lane<QUANT_MXFP4> : cu_lane_levels<QUANT_MXFP4, 1> {
};

/* ---- blocks of 256 ---- */

/* Q4_K, and Q5_K with a fifth bit of each code. */
template <int TYPE> struct cu_lane_k45 {
    static constexpr bool HAS_FIFTH = TYPE == QUANT_Q5_K;
    struct weights {
        int j;
        struct cu_word16 head, q, fifth;
    };
    typedef cu_share_halves share;
    static constexpr int ROWS = HAS_FIFTH ? 4 : 8, LANES = 8, ELEMENTS = 32, SECOND = CU_SECOND_MIN;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        (void)books;
        w->j = j;
        w->head = cu_load16(b);
        w->q = cu_load16(b + (HAS_FIFTH ? 48 : 16) + 16 * j);
        if (HAS_FIFTH)
            w->fifth = cu_load16(b + 16 + j % 2 * 16);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int p = w->j / 2, low = 0, high = 0;
        uint32_t scale, min;

        cu_scale_min_pair(w->head.x + 1, p, &scale, &min);
        for (int i = 0; i < 4; i++) {
            uint32_t a = w->q.x[i] & 0x0f0f0f0fu, b = w->q.x[i] >> 4 & 0x0f0f0f0fu;
            if (HAS_FIFTH) {
                uint32_t bits = w->fifth.x[i] >> 2 * p;
                a |= bits << 4 & 0x10101010u;
                b |= bits << 3 & 0x10101010u;
            }
            low = cu_dp4a((int)a, (int)x->c[i], low);
            high = cu_dp4a((int)b, (int)x->c[i + 4], high);
        }
        *first = cu_byte(scale, 0) * x->sub[0] * low + cu_byte(scale, 1) * x->sub[1] * high;
        *second = cu_byte(min, 0) * x->sum[0] + cu_byte(min, 1) * x->sum[1];
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->head.x[0]);
        *m = -cu_half_to_f32((uint16_t)(w->head.x[0] >> 16));
    }
};

template <> struct cu_lane<QUANT_Q4_K> : cu_lane_k45<QUANT_Q4_K> {
};
template <> struct cu_lane<QUANT_Q5_K> : cu_lane_k45<QUANT_Q5_K> {
};

template <> struct cu_lane<QUANT_Q6_K> {
    struct weights {
        int j;
        uint32_t d, low[4], high[2], scale[2];
    };
    typedef cu_share_quarters share;
    static constexpr int ROWS = 4, LANES = 8, ELEMENTS = 32, SECOND = CU_SECOND_NONE;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        int half = j / 4, place = j % 4 * 8;
        (void)books;
        w->j = j;
        w->d = cu_u16(b + 208);
        cu_load_words<2>(b + 64 * half + place, w->low);
        cu_load_words<2>(b + 64 * half + 32 + place, w->low + 2);
        cu_load_words<2>(b + 128 + 32 * half + place, w->high);
        cu_load_words<2>(b + 192 + 8 * half, w->scale);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0;

        for (int g = 0; g < 4; g++) {
            int part = -32 * cu_sum_codes<2>(x->c + 2 * g);
            for (int i = 0; i < 2; i++) {
                uint32_t q = w->low[g % 2 * 2 + i] >> g / 2 * 4 & 0x0f0f0f0fu;
                q |= (w->high[i] >> 2 * g & 0x03030303u) << 4;
                part = cu_dp4a((int)q, (int)x->c[2 * g + i], part);
            }
            int at = 2 * g + w->j % 4 / 2; /* of the half's 8 scales */
            sum += (int8_t)cu_byte(w->scale[g / 2], at % 4) * x->sub[g] * part;
        }
        *first = sum;
        *second = 0;
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->d);
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_Q2_K> {
    struct weights {
        int j;
        uint32_t d_m, q[2], scale[2];
    };
    typedef cu_share_quarters share;
    static constexpr int ROWS = 4, LANES = 8, ELEMENTS = 32, SECOND = CU_SECOND_MIN;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        int half = j / 4;
        (void)books;
        w->j = j;
        w->d_m = cu_load_word(b + 80);
        for (int i = 0; i < 2; i++) {
            w->q[i] = cu_load_word(b + 16 + 32 * half + j % 4 * 8 + 4 * i);
            w->scale[i] = cu_load_word(b + 8 * half + 4 * i);
        }
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0, mins = 0;

        for (int g = 0; g < 4; g++) {
            int part = 0, at = 2 * g + w->j % 4 / 2;
            for (int i = 0; i < 2; i++)
                part = cu_dp4a((int)(w->q[i] >> 2 * g & 0x03030303u), (int)x->c[2 * g + i], part);
            int both = cu_byte(w->scale[g / 2], at % 4);
            sum += (both & 15) * x->sub[g] * part;
            mins += (both >> 4) * x->sum[g];
        }
        *first = sum;
        *second = mins;
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->d_m);
        *m = -cu_half_to_f32((uint16_t)(w->d_m >> 16));
    }
};

template <> struct cu_lane<QUANT_Q3_K> {
    struct weights {
        int j;
        uint32_t d, q[2], high[2], scale[3];
    };
    typedef cu_share_quarters share;
    static constexpr int ROWS = 4, LANES = 8, ELEMENTS = 32, SECOND = CU_SECOND_NONE;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        int place = j % 4 * 8;
        (void)books;
        w->j = j;
        w->d = cu_u16(b + 108);
        cu_load_words<2>(b + place, w->high);
        cu_load_words<2>(b + 32 + j / 4 * 32 + place, w->q);
        cu_load_words<3>(b + 96, w->scale);
    }
    /* Six bits of scale i of a half, 2g or 2g + 1: four of a nibble, then two of the last word; words are shifted to the half's. */
    static __device__ inline int scale_of(uint32_t low, uint32_t high, int g, int i)
    {
        return (int)((low >> i % 4 * 8 & 15) | (high >> (i % 4 * 8 + g / 2 * 2) & 3) << 4) - 32;
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0, half = w->j / 4;
        const uint32_t low[2] = {w->scale[0] >> 4 * half, w->scale[1] >> 4 * half}, high = w->scale[2] >> 4 * half;

        for (int g = 0; g < 4; g++) {
            int part = -4 * cu_sum_codes<2>(x->c + 2 * g);
            for (int i = 0; i < 2; i++) {
                uint32_t q = w->q[i] >> 2 * g & 0x03030303u;
                q |= (w->high[i] >> (4 * half + g) & 0x01010101u) << 2;
                part = cu_dp4a((int)q, (int)x->c[2 * g + i], part);
            }
            sum += scale_of(low[g / 2], high, g, 2 * g + w->j % 4 / 2) * x->sub[g] * part;
        }
        *first = sum;
        *second = 0;
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->d);
        *m = 0.0f;
    }
};

template <> struct cu_lane<QUANT_IQ4_XS> {
    struct weights {
        int j;
        uint32_t head, low, q[4];
    };
    typedef cu_share_group share;
    static constexpr int ROWS = 8, LANES = 8, ELEMENTS = 32, SECOND = CU_SECOND_NONE;

    static __device__ inline void load(const uint8_t *b, int j, const struct cu_books *books, weights *w)
    {
        (void)books;
        w->j = j;
        w->head = cu_load_word(b);
        w->low = cu_load_word(b + 4);
        cu_load_wide<2>(b + 8 + 16 * j, w->q);
        cu_load_wide<2>(b + 16 + 16 * j, w->q + 2);
    }
    static __device__ inline void dot(const weights *w, const struct cu_x *x, int *first, int *second)
    {
        int sum = 0;
        for (int i = 0; i < 4; i++) {
            uint32_t low, high;
            cu_levels8<QUANT_IQ4_NL>(w->q[i], &low, &high);
            sum = cu_dp4a((int)low, (int)x->c[i], sum);
            sum = cu_dp4a((int)high, (int)x->c[i + 4], sum);
        }
        int scale = (int)((w->low >> 4 * w->j & 15) | (w->head >> 16 >> 2 * w->j & 3) << 4) - 32;
        *first = scale * x->sub[0] * sum;
        *second = 0;
    }
    static __device__ inline void factors(const weights *w, float *d, float *m)
    {
        *d = cu_half_to_f32((uint16_t)w->head);
        *m = 0.0f;
    }
};

#endif
