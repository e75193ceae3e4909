/* Inside cpu/: the matmul kernels of each table, and what they share.
 * A weight block is a list of integer codes with integer factors by 16 elements; kern_ref_mat_unpack.c says how each type
 * maps onto that. */
#ifndef FERRY_CPU_KERN_MAT_H
#define FERRY_CPU_KERN_MAT_H

#include "cpu/kern.h"

#ifdef __cplusplus
extern "C" {
#endif

/* By weight type; NULL where the type is no weight. */
extern kern_mat *const kern_ref_mat_table[QUANT_ID_END];
extern kern_mat *const kern_avx2_mat_table[QUANT_ID_END];
extern kern_mat *const kern_avx512_mat_table[QUANT_ID_END];
extern kern_mat *const kern_avx512vnni_mat_table[QUANT_ID_END];

/* kern_table.act_row. Same bytes out of both. A NaN or an infinity makes d of its block not finite and the codes 0, which
 * turns every product with the row into NaN; magnitudes under 3.8e-37 (of blocks of 256: 3e-36), whose reciprocal
 * overflows, count as 0. */
void kern_ref_act_row(enum quant_act act, const float *x, void *out, int64_t n);
void kern_avx2_act_row(enum quant_act act, const float *x, void *out, int64_t n);

/* One block (of NVFP4: one part), or the integers of it. With x the codes of the activation (in blocks of 256 times their
 * sub-scales) and dx its scale:
 *     acc = fmaf(d * dx, sum_k scale[k / 16] * q[k] * x[k], acc)
 *     acc = fmaf(m * dx, sum_j min[j] * sum_of_16_x[j], acc)       only for types that have minima
 * Both sums stay in int32 whatever the bytes are: |scale * q| <= 8192 and |min| <= 63 in every type, |x| <= 127 * 8, and
 * 256 * 127 * 8 * 8192 < 2^31. */
struct kern_mat_block {
    float d, m;
    int16_t scale[16];
    int16_t min[16];
    int8_t q[256];
};

struct kern_mat_layout {
    /* Integers of part `part` of the block at `block` (any alignment). */
    void (*unpack)(const void *block, int part, struct kern_mat_block *out);
    int block_bytes;
    int part_len; /* elements under one float scale */
    int n_part;   /* parts of a block */
    bool has_min;
};

/* NULL for F32, F16, BF16 and for what is no weight. */
const struct kern_mat_layout *kern_ref_mat_layout(enum quant_type type);

#ifdef __cplusplus
}
#endif
#endif
