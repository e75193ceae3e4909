/* The contract between whoever walks a model (run/) and whoever does the arithmetic (cpu/, cuda/).
 * No policy here: which device runs what was decided when the plan was made. */
#ifndef FERRY_DEVICE_DEVICE_H
#define FERRY_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "src/device/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

enum op_kind {
#define OP(NAME, text) OP_##NAME,
#include "src/device/ops.def"
#undef OP
    OP_N_KIND
};

#define OP_MAX_IO 9

/* Which rows of a step an op touches: all, or those that want logits. */
enum op_rows { OP_ROWS_ALL, OP_ROWS_OUT };

/* Most groups of experts that ROUTE chooses from. */
#define DEVICE_MAX_EXPERT_GROUPS 64

/* What becomes of a gate g and an up u: silu(g) u; gelu(g) u; g sigmoid(1.702 g) (u + 1) of a g that is cut at 7 and a u that is cut at
 * -7 and 7 (gpt-oss). */
enum op_act { OP_ACT_SILU, OP_ACT_GELU_TANH, OP_ACT_SWIGLU_OAI };

/* Pages of the KV cache. A page holds DEVICE_PAGE_TOK consecutive positions, starting at an absolute multiple of that
 * number, for every layer of one group of layers (all full-attention layers, or all sliding-window ones). Inside it a
 * layer has K as (n_head_kv, DEVICE_PAGE_TOK, head_dim_k) at k_off and V as (n_head_kv, DEVICE_PAGE_TOK, head_dim_v) at
 * v_off, rows of `type` (F16 or Q8_0); or V is the first head_dim_v values of K's rows (op_attn.v_in_k). Pages start at 64-byte
 * multiples, k_off and v_off are multiples of 64. */
#define DEVICE_PAGE_TOK 64
#define DEVICE_MAX_GROUPS 4

/* Attention is folded in segments of this many positions at absolute multiples (each: tiles of one page, ascending), the
 * segments' (o, m, l) merged in ascending order. Fixed, so that a row's bits do not depend on how work was cut. */
#define DEVICE_ATTN_SEGMENT_TOK 512
#define DEVICE_SEGMENT_PAGES (DEVICE_ATTN_SEGMENT_TOK / DEVICE_PAGE_TOK)

/* Most that TOP_K finds of a row. */
#define DEVICE_MAX_TOP_K 256

/* Most positions that CONV looks at. */
#define DEVICE_MAX_CONV 8

/* One sequence's pages as a device sees them: page[group][pos / DEVICE_PAGE_TOK] is a page's address, NULL where a
 * sliding window has moved on, and for all pages of a segment that lies in another memory. Recurrent layers have a record instead, of as
 * many bytes whatever the position: as it was before the step (NULL before position 0: zeros), and another for what it is after it, so that
 * a step that fails has changed nothing. 64-byte aligned. Views, valid for one step. */
struct kv_seq {
    void *const *page[DEVICE_MAX_GROUPS];
    const char *record;
    char *next_record;
};

/* One step's rows, the same for every op of the step. Arrays of n, owned by whoever calls run. Rows of one sequence
 * stand together in ascending position. */
struct rows {
    int n;
    int n_out;    /* rows that want logits */
    int n_prompt; /* the first n_prompt rows are prompt (prefill) rows; counts only with PREFILL_BLAS */
    const int32_t *token;
    const int32_t *pos;     /* absolute position in its sequence */
    const int32_t *seq;     /* index into seqs */
    const int32_t *out_row; /* (n_out) */
    const struct kv_seq *seqs;
};

struct op_norm {
    float eps;
};

struct op_scale {
    float f;
};

struct op_glu {
    enum op_act act;
};

struct op_rope_table {
    const double *freq; /* view: (n_rot/2) radians per position */
    float mscale;
};

struct op_rope {
    int n_head, head_dim, n_rot; /* of dst0: the first n_rot values of each head are rotated */
    bool neox;                   /* pairs are (i, i + n_rot/2); otherwise (2i, 2i + 1) */
    bool at_end;                 /* it is the last n_rot values, of src0's heads, too */
    bool from_one;               /* src0 has one head, which goes to all of dst0's */
};

struct op_heads {
    int n_head;
    bool is_shared; /* src0 is one row for all heads */
};

struct op_attn {
    int n_head, n_head_kv, head_dim_k, head_dim_v;
    float scale;   /* of q.k */
    float softcap; /* 0: none; else score = softcap * tanh(score / softcap) */
    int window;    /* 0: all; else keys with pos - window < key pos <= pos */
    int group;     /* index into kv_seq.page */
    enum quant_type kv_type;
    uint64_t k_off, v_off;
    bool v_in_k; /* V is the first head_dim_v values of K's rows: v_off is k_off */
    /* Only in steps of a sequence whose pages lie in two memories; zero in a program's ops. */
    bool is_part;          /* KV_APPEND: rows whose page is NULL are left out */
    int first, n_segments; /* ATTN_STATES, ATTN_MERGE: segments [first, first + n_segments) */
    bool is_last;          /* ATTN_MERGE: no row sees any behind them */
};

#define DEVICE_MAX_PARTS 4

struct op_split {
    int n_groups, n_parts;
    int len[DEVICE_MAX_PARTS], to[DEVICE_MAX_PARTS];
};

struct op_l2 {
    int n_head, head_dim;
    float eps;
};

struct op_conv {
    uint64_t off; /* in a record; a multiple of 64, as op_delta's */
};

struct op_delta {
    int n_head_k, n_head_v, head_dim_k, head_dim_v;
    bool is_tiled;
    uint64_t off;
};

enum op_route_fn {
    OP_ROUTE_SOFTMAX,      /* scores = softmax over all experts, then top-k */
    OP_ROUTE_SOFTMAX_TOPK, /* top-k of the logits, then softmax over the chosen */
    OP_ROUTE_SIGMOID,      /* scores = sigmoid; selection by score + bias, gate = score */
};

struct op_route {
    int n_expert, k;
    enum op_route_fn fn;
    bool normalize; /* divide the gates by their sum (sum over ranks, rank 0 first; at least 6.103515625e-5) */
    float scale;    /* gates are multiplied by this at the end */
    int n_group, n_group_used; /* experts come from so many of these groups; 0: there are none */
};

/* One expert's share of an OP_MOE: slots slot[first .. first+n) of op_moe.slot are its rows. */
struct op_expert {
    const void *w[3];     /* gate, up, down: raw matrices in this device's memory; views until run returns */
    float scale[3];       /* their products are multiplied by this; 1: none (exact) */
    const float *bias[3]; /* and this is added then (ff, ff, d), in the same memory; NULL: none */
    int first, n;
};

struct op_moe {
    int k; /* experts per token: slot / k is the token's row */
    enum op_act act;
    /* (n_experts) the experts to compute now: any subset, in any order. NULL, on a device with memory of its own: those that src1 names,
     * whose matrices, scales and biases lie in w0 to w8. */
    const struct op_expert *experts;
    int n_experts;
    const int32_t *slot; /* token*k + rank, grouped by expert */
};

/* One op: tensors are views with data bound before the first run; dst/src/w not used are NULL. */
struct op {
    enum op_kind kind;
    enum op_rows rows;
    int layer; /* -1 before and after the layers; for traces */
    int n_w;   /* MATMUL: how many of w (and dst) are used */
    const struct tensor *dst[OP_MAX_IO];
    const struct tensor *src[OP_MAX_IO];
    const struct tensor *w[OP_MAX_IO];
    union {
        struct op_norm norm;
        struct op_scale scale;
        struct op_glu glu;
        struct op_rope_table rope_table;
        struct op_rope rope;
        struct op_heads heads;
        struct op_attn attn;
        struct op_split split;
        struct op_l2 l2;
        struct op_conv conv;
        struct op_delta delta;
        struct op_route route;
        struct op_moe moe;
    } p;
};

/* Values from one V row to the next. */
static inline int op_attn_v_row(const struct op_attn *p)
{
    return p->v_in_k ? p->head_dim_k : p->head_dim_v;
}

/* "matmul" for OP_MATMUL. */
const char *device_op_name(enum op_kind kind);

/* How quantized prompt rows are multiplied: by integer dots (the default; same bits for prompt and generated rows), or
 * dequantized in tiles through OpenBLAS (faster on some machines; prompt rows then differ in rounding from generated ones). */
enum device_prefill { DEVICE_PREFILL_INT = 0, DEVICE_PREFILL_BLAS };

struct device;

/* The largest step of an engine: what a device makes room for when it is opened. */
struct device_step {
    int n_rows, n_seqs;
    int64_t n_ctx;               /* positions of a sequence */
    int n_expert, n_expert_used; /* 0: no experts */
    int n_fences;                /* numbers for fence() */
};

/* What a device with memory of its own works off beside each other. */
enum device_queue { DEVICE_OPS, DEVICE_COPIES };

/* What a device takes for itself when it is opened. */
struct device_own {
    uint64_t dev_bytes, host_bytes; /* of its own memory, and of the host's that it copies through */
    int n_allocs;                   /* pieces of its memory */
};

/* A device of one kind. The functions take the handle that open gave. run() is called by one thread at a time. */
struct device_ops {
    const char *name; /* "cpu" */

    /* Can it run this op on these types and shapes (data may be NULL)? Asked while planning; what cannot is an error then. */
    bool (*can)(const struct op *op);

    /* Scratch that running these ops (each with at most n_rows rows) needs beside their tensors. Pure arithmetic. */
    uint64_t (*scratch_bytes)(const struct op *ops, int n_ops, int n_rows, int n_threads);

    /* Give the device its scratch: (bytes) of its own memory, 64-byte aligned, until close or the next call. View. */
    int (*set_scratch)(struct device *dev, void *scratch, uint64_t bytes);

    /* Run the ops in order over the step's rows, and return when they are queued (GPU) or done (CPU). Allocates nothing.
     * ERR_LIMIT when the scratch is too small, ERR_ARG for an op that it cannot run, ERR_DEVICE. */
    int (*run)(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows);

    /* Wait until everything queued has been done. */
    int (*sync)(struct device *dev);

    /* Memory of the device where it is not the host's: all of the following are NULL where it is (CPU). Ops then take addresses
     * that alloc gave, and pages and experts with them; what a step says (struct rows, slots) stays host memory.
     * alloc: 256-byte aligned, uninitialised; ERR_NOMEM. release takes NULL. Neither inside a step. */
    int (*alloc)(struct device *dev, uint64_t bytes, void **out);
    void (*release)(struct device *dev, void *ptr);
    /* In the order of what was queued before. upload: src may be changed on return. download returns when dst is there. copy:
     * within the device, queued. ERR_DEVICE. */
    int (*upload)(struct device *dev, void *dst, const void *src, uint64_t bytes);
    int (*download)(struct device *dev, void *dst, const void *src, uint64_t bytes);
    int (*copy)(struct device *dev, void *dst, const void *src, uint64_t bytes);

    /* What opening the device for such steps takes, beside scratch. Pure arithmetic. */
    void (*own_bytes)(const struct device_step *most, struct device_own *out);

    /* For work that host and device share, copies that nobody waits for. They want host memory from alloc_host (64-byte aligned;
     * ERR_NOMEM; release_host takes NULL; neither inside a step).
     * fetch: down, after all that was queued before; dst is there after the next sync.
     * send: up, as soon as can be: beside the ops that are queued, none of which may touch dst; src stays as it is until a sync
     * that comes after the next meet. meet: what is queued from here on comes after all that was sent. ERR_DEVICE: whatever was
     * sent or fetched has come to its end.
     * fetched: wait for all that was fetched, while what was queued since runs on. send_after: what is sent from here on comes after
     * all that is queued, so that dst may be what those ops read. */
    int (*alloc_host)(struct device *dev, uint64_t bytes, void **out);
    void (*release_host)(struct device *dev, void *ptr);
    int (*fetch)(struct device *dev, void *dst, const void *src, uint64_t bytes);
    int (*send)(struct device *dev, void *dst, const void *src, uint64_t bytes);
    int (*meet)(struct device *dev);
    int (*fetched)(struct device *dev);
    int (*send_after)(struct device *dev);
    /* bring: up, in the background of all that is queued now or later, none of which may touch dst until it is there; src stays as it
     * is so long. brought: is all that was brought there, so that ops may be queued that read it? wait: until it is. ERR_DEVICE: as
     * above; dst is then undefined. */
    int (*bring)(struct device *dev, void *dst, const void *src, uint64_t bytes);
    int (*brought)(struct device *dev, bool wait, bool *is_there);

    /* Let memory of the host (pages, as mem_map gives them) be carried from, as if alloc_host had given it, until unpin. Systems give
     * no more of it than they like: *is_pinned says whether it was taken; ERR_DEVICE: the device does not answer any more. Neither
     * inside a step. */
    int (*pin)(struct device *dev, void *p, uint64_t bytes, bool *is_pinned);
    void (*unpin)(struct device *dev, void *p);

    /* Weights that travel while ops run, and are waited for by those alone that read them.
     * carry: up, in the order of the queue of copies; src is memory from alloc_host, or pinned, and stays as it is until a later fence is
     * passed. fence: number f is passed once all is done that the queue holds now. follow: what the queue is given from here on comes
     * after fence f. passed: is it? wait: until it is. span_ns: between two fences that are passed, by the device's clock; what that
     * cannot tell apart is 0. ERR_DEVICE as above; ERR_ARG: f is not below n_fences. */
    int (*carry)(struct device *dev, void *dst, const void *src, uint64_t bytes);
    int (*fence)(struct device *dev, enum device_queue queue, int f);
    int (*follow)(struct device *dev, enum device_queue queue, int f);
    int (*passed)(struct device *dev, int f, bool wait, bool *is_passed);
    int (*span_ns)(struct device *dev, int from, int to, uint64_t *ns);

    /* Kernels, or pieces of work at least as large (graphs of kernels), that were given to it since it was opened. */
    uint64_t (*n_launches)(const struct device *dev);

    /* Nanoseconds spent in each op kind since the last reset, (OP_N_KIND); for traces and bench. */
    void (*op_ns)(const struct device *dev, uint64_t *ns, bool reset);

    void (*close)(struct device *dev); /* takes NULL */
};

/* Every device starts with this. */
struct device {
    const struct device_ops *ops;
};

#ifdef __cplusplus
}
#endif
#endif
