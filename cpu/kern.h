/* The kernel table: what every instruction set offers, with one meaning for all of them. kern_ref.c is the plain truth.
 *
 * Arithmetic (the numeric contract; every table gives the same bits):
 * - Quantized weights: an activation row is quantized once (act_row). For each weight block (of K-quants: super-block) the
 *   sum of products with all integer sub-scales is exact in int32, then acc = fmaf(d_w * d_x, (float)isum, acc), blocks
 *   ascending, one accumulator an output; a type with a minimum or offset adds a second fmaf in the same block, after the
 *   first, with its own exact integer sum. Types whose sub-scales are floats (NVFP4) treat each scaled part as a block.
 * - Float dots: 16 virtual lanes, element i goes to lane i % 16 with fmaf, then the fixed tree: lanes l and l+8, l and l+4,
 *   l and l+2, l and l+1. Sums of squares and of exponentials the same way.
 * - exp, silu, gelu (tanh), sigmoid, tanh: one polynomial each, written once in kern_math.h for plain C and for vectors.
 * - Elementwise: plain order, no contraction unless written as fmaf. */
#ifndef FERRY_CPU_KERN_H
#define FERRY_CPU_KERN_H

#include <stdbool.h>
#include <stdint.h>

#include "quant/quant.h"
#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dst[t * dst_stride + r] = x_t . w_r for r < n_rows, t < n_tok. */
struct kern_mat_args {
    const void *w;     /* first weight row, raw layout */
    uint64_t w_stride; /* bytes between weight rows */
    int n_rows;
    const void *x;     /* first activation row, in the type's partner form (kern_act_bytes each) */
    uint64_t x_stride; /* bytes between activation rows */
    int n_tok;         /* any number: the result of a row does not depend on its neighbours */
    int64_t n_cols;    /* elements of a row; a multiple of the type's block */
    float *dst;
    int64_t dst_stride; /* floats */
    void *scratch;      /* (KERN_MAT_SCRATCH_BYTES) of this worker, 64-byte aligned: unpacked blocks live here */
};
#define KERN_MAT_SCRATCH_BYTES (256 * 1024)

typedef void kern_mat(const struct kern_mat_args *args);

/* One (o, m, l) of a segment or less: see DEVICE_ATTN_SEGMENT_TOK. For query rows of one KV head group. */
struct kern_attn_args {
    const float *q; /* (n_q, head_dim_k): query vectors sharing this KV head and position `pos` (a GQA group) */
    int n_q;
    int64_t q_stride, o_stride; /* floats between query vectors, outputs */
    int head_dim_k, head_dim_v;
    int v_row; /* values from one V row to the next: head_dim_v, or more, at most head_dim_k */
    float scale, softcap;
    enum quant_type kv_type; /* F16, Q8_0, or F32 for pages that the caller has already converted (kv_read) */
    const void *k, *v; /* this head's K (DEVICE_PAGE_TOK, head_dim_k), V (.., v_row) of one page, rows of kv_type */
    int key_begin, key_end;      /* keys [begin, end) of the page are visible */
    const void *next_k, *next_v; /* the same of the page that comes next, to be fetched meanwhile; NULL: none */
    float *o, *m, *l; /* running state: o (n_q, head_dim_v) unnormalised, m and l (n_q). m = -INFINITY at the start */
    float *scratch;   /* (KERN_ATTN_SCRATCH(n_q, max(head_dim_k, head_dim_v))) floats, 64-byte aligned */
};
#define KERN_ATTN_SCRATCH(n_q, head_dim) (DEVICE_PAGE_TOK * (n_q) + 16 * (head_dim) + 64)

/* One position of some columns of OP_CONV. */
struct kern_conv_args {
    const float *x[DEVICE_MAX_CONV]; /* (k) rows of n, the oldest first */
    const float *w;                  /* (k, n) */
    int k, n;
    float *out; /* (n) */
};

/* One position of n columns of a head of OP_DELTA_NET. */
struct kern_delta_args {
    int head_dim_k, n;
    const float *from; /* S (head_dim_k, n), rows `stride` apart; */
    float *to;         /* and what becomes of it; may be from */
    int64_t stride;
    const float *q, *k, *v; /* (head_dim_k), (head_dim_k), (n) */
    float decay, beta, scale;
    float *out; /* (n) = S^T q times scale */
};

struct kern_table {
    const char *isa;
    kern_mat *const *mat; /* (QUANT_ID_END) by weight type; NULL: not a weight type */
    /* x (n) -> one activation row in form `act`; n a multiple of the form's block (32, 256; any for F32: a copy) */
    void (*act_row)(enum quant_act act, const float *x, void *out, int64_t n);
    float (*dot)(const float *a, const float *b, int64_t n);
    float (*sum_sq)(const float *a, int64_t n);
    void (*rms_norm)(const float *x, const float *w, float eps, float *out, int64_t n);
    void (*add)(const float *a, const float *b, float *out, int64_t n);
    void (*scale)(const float *a, float f, float *out, int64_t n);
    void (*glu)(enum op_act act, const float *g, const float *u, float *out, int64_t n);
    void (*softcap)(const float *a, float cap, float *out, int64_t n);
    void (*axpy)(float f, const float *x, float *acc, int64_t n);        /* acc = fmaf(f, x, acc) */
    void (*gate)(const float *a, const float *g, float *out, int64_t n); /* a sigmoid(g) */
    void (*conv)(const struct kern_conv_args *args);
    void (*delta)(const struct kern_delta_args *args);
    void (*rope)(const struct op_rope *p, float *x, const float *cos_sin); /* all heads of one row, in place */
    void (*softmax)(float *x, int64_t n);                                  /* in place; max first, lane sums */
    void (*kv_write)(enum quant_type type, const float *x, void *out, int64_t n);
    void (*kv_read)(enum quant_type type, const void *in, float *x, int64_t n);
    void (*attn_page)(const struct kern_attn_args *args);
    /* Fold the state (o, m, l) of a later segment into (o_sum, m_sum, l_sum); m_sum = -INFINITY at the start. */
    void (*attn_merge)(const float *o, float m, float l, float *o_sum, float *m_sum, float *l_sum, int64_t head_dim);
};

/* Bytes of one activation row of n elements in that form; a multiple of 64. */
uint64_t kern_act_bytes(enum quant_act act, int64_t n);

extern const struct kern_table kern_ref, kern_avx2, kern_avx512, kern_avx512vnni;

#ifdef __cplusplus
}
#endif
#endif
