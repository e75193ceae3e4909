/* Block types: names, sizes, and the reference conversions between blocks and floats.
 * quant/ knows blocks and floats only: no files, no tensors, no threads. */
#ifndef FERRY_QUANT_QUANT_H
#define FERRY_QUANT_QUANT_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Values are GGUF's own ids. I8..F64 have a size but are never weights of a matmul. */
enum quant_type {
#define T(NAME, text, id, len, bytes, act, fn) QUANT_##NAME = id,
#include "quant/types.def"
#undef T
    QUANT_I8 = 24,
    QUANT_I16 = 25,
    QUANT_I32 = 26,
    QUANT_I64 = 27,
    QUANT_F64 = 28,
    QUANT_ID_END = 41, /* one past the largest id */
};

/* The form of an activation row that a matmul with this weight type reads.
 * Q8X32:  blocks of 32:  d = amax/127 (f32), q = round-half-even(x * (127/amax)), and the sum of q.
 * Q8X256: blocks of 256: the same over 256, with sums of q by 16.  amax = 0 gives d = 0, q = 0. */
enum quant_act { QUANT_ACT_NONE = 0, QUANT_ACT_F32, QUANT_ACT_Q8X32, QUANT_ACT_Q8X256 };

struct quant_info {
    const char *name;
    enum quant_type type;
    int block_len; /* elements */
    int block_bytes;
    enum quant_act act; /* QUANT_ACT_NONE: cannot be a weight */
    /* n elements, a multiple of block_len; bit-exact with the `gguf` package's dequantize. NULL for I8..F64. */
    void (*to_float)(const void *blocks, float *out, int64_t n);
    /* Reference quantizer: the bytes of the `gguf` package's quantize where it has one, else least squared error.
     * NULL for IQ1, IQ2 and IQ3, whose code-books need activation statistics, and for I8..F64. NaN, infinities and floats
     * whose scale overflows a half give some blocks, no crash. */
    void (*from_float)(const float *x, void *blocks, int64_t n);
    /* The same for the least squared error that counts by weights (n), all finite and not below 0. NULL where there is
     * nothing to weigh, or no quantizer. */
    void (*fit)(const float *x, const float *weights, void *blocks, int64_t n);
};

/* The row of a type; NULL for an id that ferry does not know. Static data, any thread. */
const struct quant_info *quant_info(int gguf_id);

/* The row with that name ("Q4_K"), case-insensitive; NULL if none. */
const struct quant_info *quant_find(const char *name);

/* Bytes of n elements in a row; n must be a multiple of the block length and the type known (our own bug otherwise). */
uint64_t quant_row_bytes(enum quant_type type, int64_t n);

/* One value of half, bfloat16, and back (round to nearest even; NaN stays NaN). */
float quant_f16_to_f32(uint16_t h);
uint16_t quant_f32_to_f16(float x);
float quant_bf16_to_f32(uint16_t h);
uint16_t quant_f32_to_bf16(float x);

#ifdef __cplusplus
}
#endif
#endif
