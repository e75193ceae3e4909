/* What host code may ask of the kernels. A launcher queues its kernels on the stream and returns what the runtime said; it
 * checks nothing. Arguments are plain values; their pointers are device memory. What a launcher queues follows from its arguments
 * alone, and is launched by CU_LAUNCH, all of it: launches can then be noted, and captured (graph.h). */
#ifndef FERRY_CUDA_LAUNCH_H
#define FERRY_CUDA_LAUNCH_H

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>

#include "quant/quant.h"
#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Kernels that this thread has launched so far, and graphs of them. */
extern __thread uint64_t cu_launched;

/* Launches in a row, in short: of equal keys are equal kernels with equal grids and arguments, but for a chance of 2^-128. (Where two
 * differ in one word, either half differs for certain.) Starts as zeros. */
struct cu_key {
    uint64_t half[2];
    int n; /* launches */
};

/* Where this thread's launches are noted instead of made; NULL: they are made. */
extern __thread struct cu_key *cu_noting;

/* May the next launch of this thread begin before the kernel ahead of it has ended? Each kernel then waits by itself (cu_await in
 * device.cuh). Where it may (CU_OVERLAP_FIRST), the first launch is still an ordinary one, so that kernels may read at once what was
 * there before it: weights, and what a step says. Only where cu_is_code_of_90() says so. */
enum cu_overlap { CU_OVERLAP_NONE, CU_OVERLAP_FIRST, CU_OVERLAP_REST };
extern __thread enum cu_overlap cu_overlap;

/* Of the GPU that is chosen: were the kernels that it has compiled for compute capability 9.0 or more? What a driver compiles from the PTX
 * of an older card runs on newer ones, but has no bulk copies, and no kernel of it waits by itself. */
cudaError_t cu_is_code_of_90(bool *is);

/* ---- rows ------------------------------------------------------------------------------------------------------------ */

/* A step's rows in device memory, as struct rows has them. */
struct cu_step {
    const int32_t *token, *pos, *seq;
    const int32_t *out_row;   /* NULL: an op's row i is the step's row i */
    void *const *const *page; /* (n_seqs, DEVICE_MAX_GROUPS) tables of page addresses */
    void *const *record;      /* (n_seqs, 2) addresses of the records before and after the step */
    const int32_t *stretch;   /* (n_stretches + 1) first rows of the sequences, and n */
};

/* dst = f(a, b, w) over n rows of `width`; strides in floats. */
struct cu_rows_args {
    int n;
    int64_t width;
    float *dst;
    const float *a, *b;
    const float *w; /* weights: a norm's, a bias, a scale */
    int64_t dst_stride, a_stride, b_stride;
    float f;     /* epsilon, factor, cap */
    int64_t len; /* norm: width of a group; combine: experts a token */
    enum op_act act;
    const int32_t *row; /* get_rows: (n) */
};
cudaError_t cu_get_rows(const struct cu_rows_args *a, cudaStream_t stream);

/* Bytes from pinned host memory, read over the bus where it lies; both 16-byte aligned, n_bytes a multiple of 16. */
struct cu_pull_args {
    void *dst;
    const void *src;
    uint64_t n_bytes;
};
cudaError_t cu_pull(const struct cu_pull_args *a, cudaStream_t stream);

/* Of each row of x (n, width) the k best finite values: ids by rising id, then the values' bits. Two launches. */
struct cu_top_args {
    int n, k;
    int64_t width;
    const float *x;
    int32_t *dst;
    int64_t x_stride, dst_stride; /* in elements */
    uint64_t *scratch;            /* (cu_top_scratch_bytes) */
};
uint64_t cu_top_scratch_bytes(int n_rows, int64_t width, int k); /* of up to n_rows rows */
cudaError_t cu_top(const struct cu_top_args *a, cudaStream_t stream);

/* Code-books of the IQ types (quant/iq_grid.h) in device memory. */
struct cu_books {
    uint64_t iq2_xxs[256], iq2_xs[512], iq2_s[1024], iq1_s[2048];
    uint32_t iq3_xxs[256], iq3_s[512];
};

struct cu_embed_args {
    const struct cu_books *books;
    enum quant_type type;
    const void *w;
    uint64_t w_stride; /* bytes */
    struct cu_step step;
    int n;
    int64_t width;
    float *dst;
    int64_t dst_stride;
    float f;
};
cudaError_t cu_embed(const struct cu_embed_args *a, cudaStream_t stream);

#define CU_ROPE_MAX_FREQ 256
struct cu_rope_table_args {
    struct cu_step step;
    int n, n_freq;
    float mscale;
    float *dst;
    int64_t dst_stride;
    double freq[CU_ROPE_MAX_FREQ];
};
cudaError_t cu_rope_table(const struct cu_rope_table_args *a, cudaStream_t stream);

struct cu_rope_args {
    struct op_rope p;
    int n;
    float *x;
    const float *src, *table; /* src: x, or other heads, of src_dim values each */
    int64_t x_stride, src_stride, table_stride;
    int src_dim;
};
#define CU_ROUTE_MAX_EXPERTS 4096
#define CU_ROUTE_MAX_USED 2048
struct cu_route_args {
    struct op_route p;
    int n;
    const float *logits, *bias; /* bias may be NULL */
    int32_t *ids;
    float *gates;
    int64_t logits_stride, ids_stride, gates_stride; /* in elements */
};
/* ---- attention ------------------------------------------------------------------------------------------------------- */

/* Keys and values of n rows into their pages. */
struct cu_append_args {
    struct op_attn p;
    struct cu_step step;
    int n;
    const float *k, *v;
    int64_t k_stride, v_stride;
};
/* Rows of q over the pages. With states: segments [first, first + n_segments) of each row's, counted from the first it sees,
 * go each to a state of their own, for cu_attn_merge; else all are folded and merged where they are computed. Segments whose first
 * page is NULL are left out then. With windows and states a tile is one row. */
struct cu_attn_args {
    struct op_attn p;
    struct cu_step step;
    int n;
    int tile_rows;          /* rows that share a block: cu_attn_tile_rows() */
    int shared_bytes;       /* the card's */
    const float *q, *sinks; /* sinks: (n_head) or NULL */
    float *dst;
    int64_t q_stride, dst_stride;
    float *states; /* o (head_dim_v), m, l for each row, head and segment; NULL: not split */
    int64_t state_row, state_head, state_segment; /* between neighbours, in floats */
    float *sums;                                  /* (n, n_head, head_dim_v + 2), rows sum_stride floats apart */
    int64_t sum_stride;
    int first, n_segments;
    bool is_last; /* merge: write dst */
};
/* 0: heads so large that not even one query fits a block's shared memory. shared_bytes: most that a block of the card
 * may have; 0: of any card. */
int cu_attn_tile_rows(const struct op_attn *p, int shared_bytes);
cudaError_t cu_attn(const struct cu_attn_args *a, cudaStream_t stream);
/* Before the first cu_attn on the GPU that is chosen: large heads may have so much shared memory. */
cudaError_t cu_attn_prepare(int shared_bytes);
cudaError_t cu_attn_merge(const struct cu_attn_args *a, cudaStream_t stream);

/* ---- recurrent layers ------------------------------------------------------------------------------------------------ */

/* Of the rows' first n_heads heads, in place. */
struct cu_l2_args {
    struct op_l2 p;
    float *x;
    int64_t x_stride;
};

#define CU_SPLIT_TO 2
struct cu_split_args {
    struct op_split p;
    const float *x;
    float *dst[CU_SPLIT_TO];
    int64_t width, x_stride, dst_stride[CU_SPLIT_TO];
};

struct cu_conv_args {
    struct cu_step step;
    uint64_t off;
    int n, k;
    int64_t width;
    const float *x, *w; /* w (width, k) */
    float *dst;
    int64_t x_stride, dst_stride;
};
cudaError_t cu_conv(const struct cu_conv_args *a, cudaStream_t stream);

#define CU_DELTA_MAX_DIM 256
struct cu_delta_args {
    struct op_delta p; /* head_dim_k: up to CU_DELTA_MAX_DIM */
    struct cu_step step;
    int n_stretches;
    const float *x, *alpha, *beta, *bias, *rate;
    float *dst;
    int64_t x_stride, alpha_stride, beta_stride, dst_stride;
    float scale;
};
cudaError_t cu_delta_net(const struct cu_delta_args *a, cudaStream_t stream);

/* ---- matmul ---------------------------------------------------------------------------------------------------------- */

/* Bytes of one activation row of n elements in that form; a multiple of 16. */
uint64_t cu_act_bytes(enum quant_act act, int64_t n);

/* n_rows rows of floats into the form; with `up`, of act(x) * up. */
struct cu_act_args {
    enum quant_act act;
    int n_rows;
    int64_t width;
    const float *x, *up; /* up: not for cu_half; strides of both are x_stride floats */
    int64_t x_stride;
    enum op_act glu;
    void *out;
    uint64_t out_stride; /* bytes */
    bool by_lanes;       /* cu_half: columns in the order that cu_gemm wants on a card that has_wgmma */
};

/* ---- ops of single rows ---------------------------------------------------------------------------------------------- */

/* What needs row i of its arguments and nothing else of the step. */
enum cu_row_kind {
    CU_ROW_ADD,      /* rows: dst = a + b */
    CU_ROW_ADD_BIAS, /* dst = a + w */
    CU_ROW_SCALE,    /* dst = a * (w ? w[0] : f) */
    CU_ROW_SOFTCAP,
    CU_ROW_GLU,       /* dst = act(a) * b */
    CU_ROW_GATE,      /* dst = a * sigmoid(b); b (n, 1) */
    CU_ROW_GATE_EACH, /* b as wide as a */
    CU_ROW_COMBINE,   /* a (n*len, width), b (n, len) */
    CU_ROW_NORM,      /* groups of len */
    CU_ROW_ROPE,
    CU_ROW_ROUTE,
    CU_ROW_APPEND,
    CU_ROW_ACT,
    CU_ROW_L2,
    CU_ROW_SPLIT,
};

struct cu_row_op {
    enum cu_row_kind kind;
    union {
        struct cu_rows_args rows;
        struct cu_rope_args rope;
        struct cu_route_args route;
        struct cu_append_args append;
        struct cu_act_args act;
        struct cu_l2_args l2;
        struct cu_split_args split;
    } u;
};

/* A launch takes longer than what it does to one row: in short steps a block runs several ops, one after another, each over all of
 * its row. All of ops [0, n_ops) have the same n_rows rows; what is behind them is zero. */
#define CU_CHAIN_OPS 8
struct cu_chain {
    int n_ops, n_rows;
    struct cu_row_op op[CU_CHAIN_OPS];
};

/* A thread for each element of all rows, or so: for many rows, or one op alone. */
cudaError_t cu_row_alone(const struct cu_row_op *op, int n_rows, cudaStream_t stream);

/* A block for each row. */
cudaError_t cu_chain(const struct cu_chain *chain, cudaStream_t stream);

/* cu_row_alone() of CU_ROW_ACT. */
cudaError_t cu_act(const struct cu_act_args *a, cudaStream_t stream);

/* ---- products -------------------------------------------------------------------------------------------------------- */

/* What of a GPU decides how products and attention cut their work. */
struct cu_card {
    int n_multiprocessors;
    int shared_bytes; /* most shared memory of a block that asks for it */
    bool has_bulk;    /* bulk copies into shared memory, and kernels that wait by themselves: cu_is_code_of_90() */
    bool has_wgmma;   /* products of warpgroups: 9.0 alone, by code that is made for it (sm_90a) */
};

/* One expert's matrices, what their products are multiplied by, and what is added then (floats, a row's each; NULL: nothing). */
struct cu_expert {
    const void *w[3];
    const float *bias[3];
    float scale[3];
};

/* Matrices of all experts of a layer, `stride` bytes apart; what their products are multiplied by (n_expert), and what is added then
 * (n_expert, rows of a matrix). NULL: nothing. */
struct cu_stack {
    const void *w;
    uint64_t stride;
    const float *scale, *bias;
};

/* Tokens that a block multiplies with the weights it has read: places [first, first + n) of one expert. */
struct cu_tile {
    int32_t expert, first, n;
};

/* A matrix beside another one. */
struct cu_mat_more {
    const void *w; /* dense */
    float *dst;
    int64_t dst_stride; /* floats */
    int n_rows;
};
#define CU_MAT_MORE 2

/* dst[place][row] = x[place] . w[row], by the arithmetic of cpu/kern.h. Dense: tiles is NULL, and places 0..n_place-1 are the
 * rows. Of experts: tiles of at most tile_tok places, whose x row and dst row may be looked up. */
struct cu_mat_args {
    const struct cu_books *books;
    enum quant_type type;
    const void *w;     /* dense */
    uint64_t w_stride; /* bytes */
    int64_t n_cols;
    int n_rows;
    const void *x;     /* rows of the type's form; cu_gemm: of halves (cu_half) */
    uint64_t x_stride; /* bytes */
    float *dst;
    int64_t dst_stride; /* floats */
    int n_place, tile_tok;
    const struct cu_tile *tiles; /* (n_tiles) */
    int n_tiles;
    const int32_t *n_listed; /* NULL; or how many tiles there are, where a kernel of the call lists them */
    const struct cu_expert *experts;
    int which; /* of cu_expert.w */
    /* Or, instead of tiles, with tile_tok 1: place i is of expert ids[i], which a kernel of the same call may have found. Experts of ids,
     * and of tiles where `experts` is NULL, are of this stack; what `more` has first is of the second. */
    const int32_t *ids;
    struct cu_stack stack[2];
    const int32_t *x_row, *dst_row; /* (n_place) or NULL: the place itself */
    int x_div;                      /* x_row's numbers are divided by this; 0 as 1 */
    /* But for cu_gemm: products of the same rows with further matrices of equal type, columns and stride; of an expert: with its next. */
    struct cu_mat_more more[CU_MAT_MORE];
    int n_more;
    /* Not 0: instead of one dense matrix so many, w_head bytes apart, each with n_place places: those of matrix h are h, h + n_heads, ..,
     * so that `skip` = n_heads - 1 lie between two of a tile. Where x's rows are the same for all matrices x_div is n_heads. */
    int n_heads, skip;
    uint64_t w_head;
    /* Of quantized types: the card. Where tile_tok is 1 and the type reads codes of blocks of 256, x may be floats that each block codes
     * itself: code.n_rows of them, one for all places or one for each; 0: x is coded. And an expert's gate and up, which then go to the
     * same dst, may become act(gate) * up, where both begin as far behind a multiple of 16 bytes. */
    struct cu_card card;
    struct cu_act_args code;
    bool is_glu;
    enum op_act glu;
};
/* Places that share one reading of the weights: tile_tok is 1, CU_GEMV_TOK, or CU_GEMM_INT_TOK, with which products of quantized types
 * go through cu_gemm_int. */
#define CU_GEMV_TOK 8
#define CU_GEMM_INT_TOK 64
cudaError_t cu_gemv(const struct cu_mat_args *a, cudaStream_t stream);

/* Of quantized types, tile_tok 1 or CU_GEMV_TOK; the GPU that is chosen has been prepared for it. */
cudaError_t cu_gemv_int(const struct cu_mat_args *a, cudaStream_t stream);
cudaError_t cu_gemv_prepare(const struct cu_card *card);
uint32_t cu_gemv_most_bytes(const struct cu_card *card); /* of shared memory, of each block of it */

/* The same bits by integer tensor cores. */
cudaError_t cu_gemm_int(const struct cu_mat_args *a, cudaStream_t stream);

/* Rows as halves for cu_gemm: each times the power of two that brings its largest magnitude between 2^14 and 2^15; its
 * inverse stands behind the row. */
uint64_t cu_half_bytes(int64_t n);
cudaError_t cu_half(const struct cu_act_args *a, cudaStream_t stream);

/* Of the GPU that is chosen, of compute capability 9.0: is there code for products of its warpgroups? */
cudaError_t cu_gemm_has_wgmma(bool *has_wgmma);

/* Before the first cu_gemm on the GPU that is chosen. */
cudaError_t cu_gemm_prepare(const struct cu_card *card);

/* The same product by tensor cores on halves, for many places; rounding differs (cuda/README.md), but not from one tile_tok to
 * another. n_cols a multiple of 32; tile_tok as cu_gemm_tile_tok says of the same card. */
#define CU_GEMM_TOK 64
#define CU_GEMM_TOK_MANY 128
int cu_gemm_tile_tok(const struct cu_card *card, enum quant_type type, int64_t n_rows, int n_place);
cudaError_t cu_gemm(const struct cu_mat_args *a, cudaStream_t stream);

/* ---- experts --------------------------------------------------------------------------------------------------------- */

/* Slots [first, end) by expert, ascending both, and tiles of at most tile_tok of them: what cu_moe is to be given of them. */
struct cu_permute_list {
    int first, end, tile_tok;
    int32_t *slot;         /* (end - first) */
    struct cu_tile *tiles; /* as many as cu_permute_most_tiles says */
    int32_t *n_tiles;
};

/* Lists of what ids (rows, k) chose of n_expert. A slot whose id is no expert's is in none. */
#define CU_PERMUTE_LISTS 2
struct cu_permute_args {
    int k, n_expert, n_lists;
    const int32_t *ids;
    int64_t ids_stride; /* in elements */
    struct cu_permute_list list[CU_PERMUTE_LISTS];
};
int cu_permute_most_tiles(int n_slots, int n_expert, int tile_tok);
cudaError_t cu_permute(const struct cu_permute_args *a, cudaStream_t stream);

/* The listed experts' slots: their row of dst = down(act(gate(x)) * up(x)), each product times its scale, plus its bias. */
struct cu_moe_args {
    struct cu_card card;
    const struct cu_books *books;
    enum quant_type type[3];
    uint64_t w_stride[3];
    int64_t n_embd, n_ff, n_out;
    enum op_act act;
    int k, n_rows;
    const float *x; /* (n_rows, n_embd) */
    int64_t x_stride;
    float *dst; /* (n_rows * k, n_out) */
    int64_t dst_stride;
    const int32_t *slot; /* (n_place) token * k + rank, grouped by expert */
    int n_place, tile_tok, n_tiles;
    const struct cu_tile *tiles;
    const int32_t *n_listed;         /* as cu_mat_args' */
    const struct cu_expert *experts; /* NULL: the tiles' experts are of these stacks, as those of ids are */
    const int32_t *ids; /* instead of slot and tiles: (n_place) the experts; place i is slot i, tile_tok is 1 */
    struct cu_stack stack[3];
    bool lie_alike; /* each expert's gate and up begin as far behind a multiple of 16 bytes */
    void *scratch;  /* (cu_moe_scratch_bytes) */
};
uint64_t cu_moe_scratch_bytes(const struct cu_moe_args *a); /* of types, widths, k and n_rows */
/* What has to be done to x before, n_rows rows each: their number. */
#define CU_MOE_FORMS 2
int cu_moe_forms(const struct cu_moe_args *a, struct cu_act_args form[CU_MOE_FORMS]);
cudaError_t cu_moe(const struct cu_moe_args *a, cudaStream_t stream);

/* The same by tensor cores on halves: n_embd and n_ff multiples of 32, tile_tok cu_gemm's. */
uint64_t cu_moe_gemm_scratch_bytes(const struct cu_moe_args *a);
cudaError_t cu_moe_gemm(const struct cu_moe_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
