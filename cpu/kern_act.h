/* Layout of a quantized activation row: known to cpu/ alone, the same for every kernel table. Arrays one after another, so
 * that any four neighbouring codes can be broadcast and any run of blocks read with plain vector loads.
 *
 * q16 repeats the codes (of blocks of 256: times their sub-scales) in 16 bits for weights that need all of 8 bits and a
 * sign: the 8-bit multiply-add saturates there. Of every four codes it holds 0, 2, 1, 3, the order in which the even and
 * the odd bytes of a word of weights come apart. */
#ifndef FERRY_CPU_KERN_ACT_H
#define FERRY_CPU_KERN_ACT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Where code k of a row stands in q16. */
static inline int64_t kern_act_q16_place(int64_t k)
{
    int64_t in4 = k & 3;
    return (k & ~(int64_t)3) | (in4 == 1 ? 2 : in4 == 2 ? 1 : in4);
}

/* Blocks of 32: the code that the largest magnitude gets is one of these, whichever leaves the smallest sum of squared
 * errors, the first of equals. Rounding errors differ from one scale to the next, and the best of four squares sums to some
 * 13 % less than that of 127 (normal numbers; tests/results/logits.md has what it does to logits). Errors are summed in
 * codes, x * (top / amax) less its rounding, in 16 lanes as kern.h has it for sums of squares; the factor makes the sums
 * comparable. */
#define KERN_ACT_N_TOP 4
#define KERN_ACT_TOPS      \
    {                      \
        127, 126, 125, 124 \
    }
#define KERN_ACT_TOP_FACTORS                                    \
    {                                                           \
        1, 16129.0f / 15876, 16129.0f / 15625, 16129.0f / 15376 \
    } /* (127 / top)^2 */

/* Blocks of 256: element k is d * sub[k / 32] * q[k]. One scale for all would leave few codes to the parts whose largest
 * magnitude is far below the block's, as it often is behind a gated activation. sub is the least integer from 1 to this one
 * that the part fits under, so d is the largest magnitude over 127 times this. With 8 the sums of a block stay in int32
 * whatever the weights are (kern_mat.h), and 16 bits hold the products sub * q and their sums over 32 elements. */
#define KERN_ACT_SUB_MAX 8
#define KERN_ACT_TOP_256 (127 * KERN_ACT_SUB_MAX)

/* What stands beside the codes of 32 elements, and of 256. */
struct kern_act_s32 {
    float d;
    int32_t sum; /* of q */
};

struct kern_act_s256 {
    float d;
    int16_t sub[8];
    int16_t sum16[16]; /* of 16 sub * q each */
    int16_t sum32[8];  /* of 32 sub * q each */
};

/* Views into one row of n elements. */
struct kern_act_x32 {
    int8_t *q;              /* (n), -127..127 */
    struct kern_act_s32 *s; /* (n / 32) */
    int16_t *q16;           /* (n) */
};

struct kern_act_x256 {
    int8_t *q;               /* (n), -127..127 */
    struct kern_act_s256 *s; /* (n / 256) */
    int16_t *q16;            /* (n), sub * q */
};

static inline struct kern_act_x32 kern_act_x32(const void *row, int64_t n)
{
    struct kern_act_x32 a;
    a.q = (int8_t *)(uintptr_t)row;
    a.s = (struct kern_act_s32 *)(a.q + n);
    a.q16 = (int16_t *)(a.s + n / 32);
    return a;
}

static inline struct kern_act_x256 kern_act_x256(const void *row, int64_t n)
{
    struct kern_act_x256 a;
    a.q = (int8_t *)(uintptr_t)row;
    a.s = (struct kern_act_s256 *)(a.q + n);
    a.q16 = (int16_t *)(a.s + n / 256);
    return a;
}

#ifdef __cplusplus
}
#endif
#endif
