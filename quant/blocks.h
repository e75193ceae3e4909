/* Layouts of the block types, byte for byte as GGUF stores them: plain structs for C, C++ and CUDA.
 * No member is wider than two bytes, so that blocks need an even address and no more. Multi-byte members are little-endian,
 * as the machine must be. `d`, `m` and `dmin` are halves; `qs` holds the low bits of the codes, `qh` their high bits. */
#ifndef FERRY_QUANT_BLOCKS_H
#define FERRY_QUANT_BLOCKS_H

#include <stdint.h>

struct block_q4_0 {
    uint16_t d;
    uint8_t qs[16]; /* low nibbles: elements 0..15, high nibbles: 16..31; value d * (q - 8) */
};

struct block_q4_1 {
    uint16_t d;
    uint16_t m;
    uint8_t qs[16]; /* nibbles as in Q4_0; value d * q + m */
};

struct block_q5_0 {
    uint16_t d;
    uint8_t qh[4];  /* bit i: the fifth bit of element i */
    uint8_t qs[16]; /* nibbles as in Q4_0; value d * (q - 16) */
};

struct block_q5_1 {
    uint16_t d;
    uint16_t m;
    uint8_t qh[4];
    uint8_t qs[16]; /* value d * q + m */
};

struct block_q8_0 {
    uint16_t d;
    int8_t qs[32]; /* value d * q */
};

/* 16 groups of 16. Codes: each half of 128 elements has 32 bytes, and bits 2k..2k+1 of them are elements 32k..32k+31. */
struct block_q2_k {
    uint8_t scales[16]; /* low nibble: scale, high nibble: min */
    uint8_t qs[64];
    uint16_t d;
    uint16_t dmin; /* value d * scale * q - dmin * min */
};

/* 16 groups of 16; codes as in Q2_K. */
struct block_q3_k {
    uint8_t hmask[32]; /* bit k of byte i: element 32k + i keeps its code; where it is 0 the code is 4 less */
    uint8_t qs[64];
    uint8_t scales
        [12]; /* 16 scales of 6 bits, less 32: low nibbles in bytes 0..7 (0..7 low, 8..15 high), bit pairs above */
    uint16_t d;
};

/* 8 groups of 32. scales: 8 scales and 8 mins of 6 bits. 0..3: byte j and byte 4 + j, low six bits. 4..7: byte 4 + j holds
 * the low nibbles (scale low, min high), the upper two bits of bytes j - 4 and j the rest. */
struct block_q4_k {
    uint16_t d;
    uint16_t dmin; /* value d * scale * q - dmin * min */
    uint8_t scales[12];
    uint8_t qs[128]; /* 64 elements per 32 bytes: the low nibbles first, then the high ones */
};

struct block_q5_k {
    uint16_t d;
    uint16_t dmin;
    uint8_t scales[12]; /* as in Q4_K */
    uint8_t qh[32];     /* bit k of byte i: the fifth bit of element 32k + i */
    uint8_t qs[128];
};

/* 16 groups of 16; two halves of 128 elements. */
struct block_q6_k {
    uint8_t ql[128]; /* 64 bytes a half: low nibbles are elements 0..63, high ones 64..127 */
    uint8_t qh[64];  /* 32 bytes a half: bits 2k..2k+1 of byte i are the upper bits of element 32k + i */
    int8_t scales[16];
    uint16_t d; /* value d * scale * (q - 32) */
};

/* Code-book types: iq_grid.h has the books. */
struct block_iq2_xxs {
    uint16_t d;
    uint8_t
        qs[64]; /* per 32 elements: 4 book indices, then a 32-bit word: 4 x 7 sign bits and a scale of 4 bits on top */
};

struct block_iq2_xs {
    uint16_t d;
    uint16_t qs[32];   /* per 8 elements: 9 bits of book index, 7 sign bits */
    uint8_t scales[8]; /* per 32 elements: a nibble for each 16 */
};

struct block_iq2_s {
    uint16_t d;
    uint8_t qs[32];    /* low 8 bits of the book index, per 8 elements */
    uint8_t signs[32]; /* per 8 elements */
    uint8_t qh[8];     /* upper 2 bits of 4 indices */
    uint8_t scales[8];
};

struct block_iq3_xxs {
    uint16_t d;
    uint8_t qs[64];     /* book index, per 4 elements */
    uint8_t scales[32]; /* 8 words of 32 bits: 4 x 7 sign bits and a scale of 4 bits on top, per 32 elements */
};

struct block_iq3_s {
    uint16_t d;
    uint8_t qs[64];    /* low 8 bits of the book index, per 4 elements */
    uint8_t qh[8];     /* the ninth bits of 8 indices */
    uint8_t signs[32]; /* per 8 elements */
    uint8_t scales[4]; /* per 64 elements: a nibble for each 32 */
};

struct block_iq1_s {
    uint16_t d;
    uint8_t qs[32]; /* low 8 bits of the book index, per 8 elements */
    uint16_t qh[8]; /* per 32 elements: 4 x 3 upper index bits, 3 bits of scale, the sign of the shift */
};

/* The half scale is made of the top nibbles of the four 16-bit words in scales. */
struct block_iq1_m {
    uint8_t qs[32];
    uint8_t qh[16];    /* per 16 elements: two nibbles: 3 upper index bits and the sign of the shift */
    uint8_t scales[8]; /* four words, 12 bits each: 4 scales of 3 bits, one per 16 elements */
};

struct block_iq4_nl {
    uint16_t d;
    uint8_t qs[16]; /* nibbles as in Q4_0: indices of the 16 levels */
};

struct block_iq4_xs {
    uint16_t d;
    uint16_t scales_h;   /* upper 2 bits of the 8 scales */
    uint8_t scales_l[4]; /* low nibbles; scale less 32 */
    uint8_t qs[128];     /* per 32 elements 16 bytes, nibbles as in Q4_0 */
};

/* Three-valued: -1, 0, 1. */
struct block_tq1_0 {
    uint8_t
        qs[48];    /* five digits of base 3 per byte, as a fraction of 256: 32 bytes for 160 elements, then 16 for 80 */
    uint8_t qh[4]; /* four digits per byte: the last 16 elements */
    uint16_t d;
};

struct block_tq2_0 {
    uint8_t qs[64]; /* codes laid out as in Q2_K */
    uint16_t d;
};

struct block_mxfp4 {
    uint8_t e;      /* E8M0 scale */
    uint8_t qs[16]; /* nibbles as in Q4_0: E2M1 */
};

/* 4 groups of 16. */
struct block_nvfp4 {
    uint8_t d[4];   /* unsigned E4M3 scales */
    uint8_t qs[32]; /* 8 bytes a group: low nibbles are elements 0..7, high ones 8..15: E2M1 */
};

#ifdef __cplusplus
#define BLOCKS_CHECK(type, bytes) static_assert(sizeof(struct block_##type) == (bytes), #type)
#else
#define BLOCKS_CHECK(type, bytes) _Static_assert(sizeof(struct block_##type) == (bytes), #type)
#endif
BLOCKS_CHECK(q4_0, 18);
BLOCKS_CHECK(q4_1, 20);
BLOCKS_CHECK(q5_0, 22);
BLOCKS_CHECK(q5_1, 24);
BLOCKS_CHECK(q8_0, 34);
BLOCKS_CHECK(q2_k, 84);
BLOCKS_CHECK(q3_k, 110);
BLOCKS_CHECK(q4_k, 144);
BLOCKS_CHECK(q5_k, 176);
BLOCKS_CHECK(q6_k, 210);
BLOCKS_CHECK(iq2_xxs, 66);
BLOCKS_CHECK(iq2_xs, 74);
BLOCKS_CHECK(iq2_s, 82);
BLOCKS_CHECK(iq3_xxs, 98);
BLOCKS_CHECK(iq3_s, 110);
BLOCKS_CHECK(iq1_s, 50);
BLOCKS_CHECK(iq1_m, 56);
BLOCKS_CHECK(iq4_nl, 18);
BLOCKS_CHECK(iq4_xs, 136);
BLOCKS_CHECK(tq1_0, 54);
BLOCKS_CHECK(tq2_0, 66);
BLOCKS_CHECK(mxfp4, 17);
BLOCKS_CHECK(nvfp4, 36);
#undef BLOCKS_CHECK

#endif
