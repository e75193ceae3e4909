/* What must run: immutable weights by role, hyperparameters, architecture. Read-only after open; any thread.
 * Holds no weight bytes: it says where they lie in the file, the store fetches them. */
#ifndef FERRY_MODEL_MODEL_H
#define FERRY_MODEL_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "src/device/device.h"
#include "src/device/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

struct gguf;
struct arch;

enum role {
    ROLE_NONE,
#define ROLE(NAME, name, a, b, c) ROLE_##NAME,
#include "src/model/roles.def"
#undef ROLE
    ROLE_N
};

/* One weight: its shape (t.data NULL) and where its bytes are. An expert stack's matrix i lies at off + i * t.stride[2] and
 * is t.ne[1] * t.stride[1] bytes long. */
struct weight {
    char name[64];
    enum role role;
    int layer; /* -1: of the whole model */
    struct tensor t;
    int file;       /* part of a split file, from 0 */
    uint64_t off;   /* bytes from the start of that file */
    bool is_expert; /* a stack of matrices of which a token uses few */
};

/* Bytes of one matrix of a stack, or of a weight that is one: in a stack that holds gate and up together, matrices of either
 * lie further apart than they are long. */
static inline uint64_t model_matrix_bytes(const struct weight *w)
{
    return (uint64_t)w->t.ne[1] * w->t.stride[1];
}

/* Heads of recurrent layers (gated delta nets); zeros: there are no such layers. */
struct model_delta {
    int n_head_k, n_head_v, head_dim_k, head_dim_v;
    int n_conv; /* positions that the convolution before them looks at */
};

/* Facts of a whole model, from metadata; all checked to be in range. */
struct hparams {
    int n_layer, n_ctx_train, n_embd, n_vocab;
    int n_nextn; /* layers behind those, which guess tokens further ahead: in the file, but not run */
    int n_head_max, head_dim_k, head_dim_v, n_rot;
    int q_dim,
        o_dim; /* values of a head that attn_q gives and attn_output reads: head_dim_k and head_dim_v, but where kv_is_latent */
    /* Multi-head latent attention (arXiv 2405.04434): ranks of what queries, keys and values are made of. n_lora_q 0: queries are not
     * compressed; n_lora_kv 0: it is plain attention. kv_is_latent: the compressed keys are cached, for all heads, and attended to. */
    int n_lora_q, n_lora_kv;
    bool kv_is_latent;
    float norm_eps;
    float embd_scale;                  /* token embeddings times this */
    float attn_scale;                  /* of q.k */
    float attn_softcap, logit_softcap; /* 0: none */
    float logit_scale, residual_scale; /* logits, and each block's result before it is added, times these; 1: none */
    double rope_base[2];               /* full-attention layers, sliding-window layers */
    double rope_factor[2];             /* linear scaling: angles divided by this; 1: none */
    bool rope_yarn;
    double yarn_ext, yarn_attn, yarn_beta_fast, yarn_beta_slow;
    float yarn_log_mul; /* 0: YaRN scales cos and sin; else q.k alone, as the family has it */
    int n_ctx_orig;
    bool rope_neox;
    int n_expert, n_expert_used, n_ff_expert, n_ff_shared, n_dense_lead;
    enum op_route_fn route_fn;
    bool route_normalize;
    float route_scale;
    int n_group, n_group_used; /* of experts; 0: none */
    enum op_act act;
    struct model_delta delta;
};

struct model_layer {
    int n_head, n_head_kv, n_ff;
    int window;        /* 0: full attention */
    bool is_recurrent; /* it keeps a record of a sequence (device.h), no keys and values */
    bool is_unrotated; /* its q and k stay as they are, whatever their positions */
    int w[ROLE_N];     /* index into model.weights, -1: the layer has none */
};

/* Rotary frequencies of one kind of layer: 0 full attention, 1 sliding window. */
struct model_rope {
    double *freq; /* own: (n_rot/2) radians per position */
    float mscale; /* cos and sin times this (YaRN) */
};

struct model {
    struct gguf *gguf;       /* own */
    const struct arch *arch; /* view: static */
    char *path, *name;       /* own */
    struct hparams hp;
    struct model_layer *layers; /* own: (n_layer) */
    struct weight *weights;     /* own: (n_weights) */
    int n_weights;
    int w[ROLE_N]; /* weights of the whole model: index or -1 */
    struct model_rope rope[2];
    uint64_t dense_bytes, expert_bytes; /* of weights used */
    uint64_t identity;                  /* hash of header, sizes, times */
};

struct file_ops;

/* Read the header of a GGUF (all parts, if split) and check that it is a whole model of a family ferry knows: every weight
 * that the family needs is there with the right shape. ops: how files are read; NULL: plainly.
 * ERR_UNSUPPORTED names the unknown architecture, ERR_FORMAT the missing or misshapen tensor. */
int model_open(const char *path, const struct file_ops *ops, struct model **out);

/* The same from the beginning of a file (gguf_open_head): enough for plans, which need no weight. */
int model_open_head(const char *path, const struct file_ops *ops, struct model **out);
void model_close(struct model *m); /* takes NULL */

/* Are some of its layers recurrent? */
static inline bool model_has_records(const struct model *m)
{
    return m->hp.delta.n_conv > 0;
}

const char *model_arch(const struct model *m); /* the family's name */

/* Divide the frequencies of full-attention layers by rope_freqs.weight's factors (n_rot/2), which the store has read. Once,
 * before the model is run. */
void model_rope_factors(struct model *m, const float *factors);

/* Which weight is the norm whose rows a layer's router, or dense FFN, reads; -1: none. */
int model_router_norm(const struct model *m, int layer);

/* Bytes of one expert of a layer: gate, up and down together; 0 for a dense layer. */
uint64_t model_expert_bytes(const struct model *m, int layer);

/* Layers [first, end) of a model. The embedding table belongs to the first layer's side, what stands behind the layers to the last
 * one's: a table that is the head, too, belongs to both. */
struct model_span {
    int first, end;
};

static inline struct model_span model_all(const struct model *m)
{
    return (struct model_span){0, m->hp.n_layer};
}

bool model_span_has(const struct model *m, struct model_span span, int weight);

/* Weight bytes that one generated token reads of a span: all dense ones but the embedding table, and n_expert_used experts a layer. */
uint64_t model_decode_bytes(const struct model *m, struct model_span span);

/* How the KV cache of this model is laid out in pages (device.h) for one type of element. Pure arithmetic. */
struct kv_shape {
    enum quant_type type;
    /* 1, or 2 with sliding windows: group 1 holds the window layers. The same again for layers that the host computes before a device's:
     * groups 2 and 3. A group without layers has no pages. */
    int n_groups;
    uint64_t page_bytes[DEVICE_MAX_GROUPS];
    int window[DEVICE_MAX_GROUPS];   /* 0: full */
    bool on_host[DEVICE_MAX_GROUPS]; /* its pages lie in the host's memory, whatever a device has */
    /* A record of a sequence, of the device's recurrent layers and of the host's before them; 0: there are none. */
    uint64_t record_bytes, host_record_bytes;
};
/* Fill out, and p->group, k_off, v_off, v_in_k of each layer's op_attn where p (n_layer) is not NULL. Layers before first_layer are the
 * host's. ERR_UNSUPPORTED for a head size that the type cannot hold. */
int model_kv_shape(const struct model *m, enum quant_type type, int first_layer, struct kv_shape *out,
                   struct op_attn *p);

/* Where a recurrent layer's part of its side's record begins: what CONV keeps, then, model_kv_conv_bytes() further on, DELTA_NET's. */
uint64_t model_kv_record_off(const struct model *m, int layer, int first_layer);
uint64_t model_kv_conv_bytes(const struct model *m);
/* Bytes of a recurrent layer's part. */
uint64_t model_kv_record_bytes(const struct model *m);

/* Records for n_seq sequences: of each one that counts and one that a step writes to; for those that share a pool some of beginnings that
 * many have, for others one of each to come back to. */
int64_t model_kv_records(int64_t n_seq, bool is_pool);

/* Pages of a group that a sequence of n_tok positions needs while running chunks of chunk_tok. */
int64_t model_kv_pages(const struct kv_shape *s, int group, int64_t n_tok, int64_t chunk_tok);

/* Pages of a group for n_seq sequences of up to n_ctx positions; pool_tok > 0: that hold at most so many together (never less
 * than one full sequence). -1 past 63 bits. */
struct kv_pool {
    int64_t n_seq, n_ctx, chunk_tok, pool_tok;
    int64_t
        dev_tok; /* positions of groups without windows that a device's memory holds, the host's the others; 0: all */
};
int64_t model_kv_pool_pages(const struct kv_shape *s, int group, const struct kv_pool *pool);

/* Of these, pages in the device's memory. Windows of its layers lie there whole. */
int64_t model_kv_dev_pages(const struct kv_shape *s, int group, const struct kv_pool *pool);

/* Pages in the host's memory beside a device's; 0: there are none. Of a group on both sides, with several sequences, two segments more
 * than the others, because a segment lies in one memory: so many pages may be free on both sides where one sequence has no use for them. */
int64_t model_kv_host_pages(const struct kv_shape *s, int group, const struct kv_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
