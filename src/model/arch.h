/* Families of models as data: which ops a layer has, on which registers, with which weights. One arch_*.c per family, one
 * row in arch.c's table. program.c turns this into struct op with shapes. */
#ifndef FERRY_MODEL_ARCH_H
#define FERRY_MODEL_ARCH_H

#include <stddef.h>

#include "src/device/device.h"
#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Activations by name: (rows, width), reused by every layer. */
enum arch_reg {
    ARCH_NONE,
    ARCH_X, /* the residual stream (n, d) */
    ARCH_H, /* what a block reads after its norm, and then gives (n, d) */
    ARCH_Q,
    ARCH_K,
    ARCH_V,
    ARCH_O,      /* attention's heads side by side */
    ARCH_QA,     /* compressed queries (n, n_lora_q) */
    ARCH_LATENT, /* compressed keys and values, and the rotated part of keys (n, n_lora_kv + n_rot) */
    ARCH_QL,     /* queries as they meet those (n, n_head * head_dim_k) */
    ARCH_OL,     /* attention's heads, compressed as values are (n, n_head * n_lora_kv) */
    ARCH_GATE,
    ARCH_UP,
    ARCH_ROUTER,      /* router logits (n, n_expert) */
    ARCH_IDS,         /* chosen experts (n, k) I32 */
    ARCH_GATES,       /* their weights (n, k) */
    ARCH_Y,           /* experts' rows (n*k, d) */
    ARCH_SHARED,      /* the shared expert's rows (n, d) */
    ARCH_SHARED_GATE, /* (n, 1) */
    ARCH_ALPHA,
    ARCH_BETA, /* of each of a recurrent layer's heads: how much it forgets and learns */
    ARCH_ROPE0,
    ARCH_ROPE1,  /* cos and sin of the step's positions: full-attention layers, window layers */
    ARCH_OUT,    /* rows that want logits (n_out, d) */
    ARCH_LOGITS, /* (n_out, n_vocab) */
    ARCH_TOP,    /* the best of them (n_out, 2 * DEVICE_MAX_TOP_K) I32 */
    ARCH_N_REG
};

/* One op of a family. Parameters (eps, scale, heads, …) follow from the kind and the layer. ARCH_ROPE0 as ROPE's src1
 * means the table of the layer's own kind. */
struct arch_op {
    enum op_kind kind;
    enum role when; /* only in layers that have this weight; ROLE_NONE: always */
    enum arch_reg dst[OP_MAX_IO], src[OP_MAX_IO];
    enum role w[OP_MAX_IO];
};

struct gguf;

struct arch {
    const char *name; /* general.architecture */
    bool rope_neox;
    enum op_act act;
    const struct arch_op *layer; /* (n_layer_ops) */
    int n_layer_ops;
    const enum role *required; /* every layer must have these; ROLE_NONE-terminated */
    const enum role *ffn_dense,
        *ffn_moe; /* and these, if it is dense, or has a router; ROLE_NONE-terminated; NULL: never so */
    /* The same of recurrent layers (model_layer); NULL: the family has none. */
    const struct arch_op *recurrent; /* (n_recurrent_ops) */
    int n_recurrent_ops;
    const enum role *required_recurrent;
    bool is_tiled; /* value head h has key head h % n, not h / (how many share one) */
    /* Family-specific metadata after the common keys were read; NULL: none. ERR_FORMAT, ERR_UNSUPPORTED. */
    int (*hparams)(const struct gguf *g, struct model *m);
};

/* The row with that name, or NULL. */
const struct arch *arch_find(const char *name);
/* All rows, NULL-terminated. */
const struct arch *const *arch_all(void);

/* Write "<arch>.<what>", a metadata key, into key (key_bytes). */
void arch_key(char *key, size_t key_bytes, const char *arch, const char *what);

/* What many layers must have; ROLE_NONE-terminated. Of every layer: plain; with norms of q and k; with post_attention_norm for the FFN's.
 * A plain dense FFN, plain experts, and those beside a shared one. */
extern const enum role arch_plain[], arch_normed[], arch_post_normed[];
extern const enum role arch_ffn_dense[], arch_ffn_moe[], arch_ffn_shared[];

/* clang-format off */
/* Building blocks of the families, to be written in a list of ops. */
#define ARCH_NORM(d, s, wt) {.kind = OP_RMS_NORM, .dst = {d}, .src = {s}, .w = {wt}}
#define ARCH_NORM_IF(d, s, wt) {.kind = OP_RMS_NORM, .when = wt, .dst = {d}, .src = {s}, .w = {wt}}
#define ARCH_BIAS_IF(r, wt) {.kind = OP_ADD_BIAS, .when = wt, .dst = {r}, .src = {r}, .w = {wt}}
#define ARCH_ADD(d, a, b) {.kind = OP_ADD, .dst = {d}, .src = {a, b}}

#define ARCH_SCALE_IF(r, wt) {.kind = OP_SCALE, .when = wt, .dst = {r}, .src = {r}, .w = {wt}}
#define ARCH_MATMUL_IF(d, s, wt) {.kind = OP_MATMUL, .when = wt, .dst = {d}, .src = {s}, .w = {wt}}

/* q, k, v of H, with whatever scales (4-bit float files have them) and biases the file holds */
#define ARCH_QKV \
    {.kind = OP_MATMUL, .dst = {ARCH_Q, ARCH_K, ARCH_V}, .src = {ARCH_H}, .w = {ROLE_ATTN_Q, ROLE_ATTN_K, ROLE_ATTN_V}}, \
    ARCH_SCALE_IF(ARCH_Q, ROLE_ATTN_Q_SCALE), ARCH_SCALE_IF(ARCH_K, ROLE_ATTN_K_SCALE), \
    ARCH_SCALE_IF(ARCH_V, ROLE_ATTN_V_SCALE), ARCH_BIAS_IF(ARCH_Q, ROLE_ATTN_Q_BIAS), \
    ARCH_BIAS_IF(ARCH_K, ROLE_ATTN_K_BIAS), ARCH_BIAS_IF(ARCH_V, ROLE_ATTN_V_BIAS)
/* rotate q and k */
#define ARCH_ROTATE \
    {.kind = OP_ROPE, .dst = {ARCH_Q}, .src = {ARCH_Q, ARCH_ROPE0}}, \
    {.kind = OP_ROPE, .dst = {ARCH_K}, .src = {ARCH_K, ARCH_ROPE0}}
/* keep k and v, attend (with the sinks of that role, or ROLE_NONE), project back into H */
#define ARCH_ATTEND_ROTATED(sinks) \
    {.kind = OP_KV_APPEND, .src = {ARCH_K, ARCH_V}}, \
    {.kind = OP_ATTENTION, .dst = {ARCH_O}, .src = {ARCH_Q}, .w = {sinks}}, \
    {.kind = OP_MATMUL, .dst = {ARCH_H}, .src = {ARCH_O}, .w = {ROLE_ATTN_OUT}}, \
    ARCH_SCALE_IF(ARCH_H, ROLE_ATTN_OUT_SCALE)
#define ARCH_ATTEND_BESIDE(sinks) ARCH_ROTATE, ARCH_ATTEND_ROTATED(sinks)
#define ARCH_ATTEND ARCH_ATTEND_BESIDE(ROLE_NONE)
/* plain attention added to X, whose next norm is in H then */
#define ARCH_ATTENTION(ffn_norm) \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), ARCH_QKV, ARCH_ATTEND, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), \
    ARCH_NORM(ARCH_H, ARCH_X, ffn_norm)
/* the same with q and k normed before they are rotated; norm: ARCH_NORM, or ARCH_NORM_IF where only some files do that */
#define ARCH_ATTENTION_NORMED(norm, ffn_norm) \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), ARCH_QKV, norm(ARCH_Q, ARCH_Q, ROLE_ATTN_Q_NORM), \
    norm(ARCH_K, ARCH_K, ROLE_ATTN_K_NORM), ARCH_ATTEND, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), \
    ARCH_NORM(ARCH_H, ARCH_X, ffn_norm)
/* H = down(act(gate(H)) * up(H)), in layers that have a dense FFN; biases where the file has them */
#define ARCH_FFN \
    {.kind = OP_MATMUL, .when = ROLE_FFN_GATE, .dst = {ARCH_GATE, ARCH_UP}, .src = {ARCH_H}, \
     .w = {ROLE_FFN_GATE, ROLE_FFN_UP}}, \
    ARCH_BIAS_IF(ARCH_GATE, ROLE_FFN_GATE_BIAS), ARCH_BIAS_IF(ARCH_UP, ROLE_FFN_UP_BIAS), \
    {.kind = OP_GLU, .when = ROLE_FFN_GATE, .dst = {ARCH_GATE}, .src = {ARCH_GATE, ARCH_UP}}, \
    ARCH_MATMUL_IF(ARCH_H, ARCH_GATE, ROLE_FFN_DOWN), ARCH_BIAS_IF(ARCH_H, ROLE_FFN_DOWN_BIAS)
/* the same with the scales that a file may hold; they come after the bias */
#define ARCH_FFN_SCALED \
    {.kind = OP_MATMUL, .when = ROLE_FFN_GATE, .dst = {ARCH_GATE, ARCH_UP}, .src = {ARCH_H}, \
     .w = {ROLE_FFN_GATE, ROLE_FFN_UP}}, \
    ARCH_BIAS_IF(ARCH_GATE, ROLE_FFN_GATE_BIAS), ARCH_BIAS_IF(ARCH_UP, ROLE_FFN_UP_BIAS), \
    ARCH_SCALE_IF(ARCH_GATE, ROLE_FFN_GATE_SCALE), ARCH_SCALE_IF(ARCH_UP, ROLE_FFN_UP_SCALE), \
    {.kind = OP_GLU, .when = ROLE_FFN_GATE, .dst = {ARCH_GATE}, .src = {ARCH_GATE, ARCH_UP}}, \
    ARCH_MATMUL_IF(ARCH_H, ARCH_GATE, ROLE_FFN_DOWN), \
    ARCH_BIAS_IF(ARCH_H, ROLE_FFN_DOWN_BIAS), ARCH_SCALE_IF(ARCH_H, ROLE_FFN_DOWN_SCALE)
/* the shared expert's rows, from H as the router reads it; before ARCH_MOE, which replaces H */
#define ARCH_SHARED_EXPERT \
    {.kind = OP_MATMUL, .when = ROLE_SHARED_GATE, .dst = {ARCH_GATE, ARCH_UP}, .src = {ARCH_H}, \
     .w = {ROLE_SHARED_GATE, ROLE_SHARED_UP}}, \
    {.kind = OP_GLU, .when = ROLE_SHARED_GATE, .dst = {ARCH_GATE}, .src = {ARCH_GATE, ARCH_UP}}, \
    ARCH_MATMUL_IF(ARCH_SHARED, ARCH_GATE, ROLE_SHARED_DOWN)
/* H = sum of the chosen experts' rows, in layers that have a router; the roles of the experts' scales, or ROLE_NONE */
#define ARCH_MOE(bias, gate_scale, up_scale, down_scale) \
    ARCH_MATMUL_IF(ARCH_ROUTER, ARCH_H, ROLE_ROUTER), \
    ARCH_CHOSEN(bias, gate_scale, up_scale, down_scale, ROLE_NONE, ROLE_NONE, ROLE_NONE)
/* the same behind a router's logits, with biases of the experts' products */
#define ARCH_CHOSEN(bias, gate_scale, up_scale, down_scale, gate_bias, up_bias, down_bias) \
    {.kind = OP_ROUTE, .when = ROLE_ROUTER, .dst = {ARCH_IDS, ARCH_GATES}, .src = {ARCH_ROUTER}, .w = {bias}}, \
    {.kind = OP_MOE, .when = ROLE_ROUTER, .dst = {ARCH_Y}, .src = {ARCH_H, ARCH_IDS}, \
     .w = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN, gate_scale, up_scale, down_scale, \
           gate_bias, up_bias, down_bias}}, \
    {.kind = OP_COMBINE, .when = ROLE_ROUTER, .dst = {ARCH_H}, .src = {ARCH_Y, ARCH_GATES}}
#define ARCH_MOE_PLAIN ARCH_MOE(ROLE_NONE, ROLE_NONE, ROLE_NONE, ROLE_NONE)
#define ARCH_MOE_SCALED ARCH_MOE(ROLE_NONE, ROLE_EXPERT_GATE_SCALE, ROLE_EXPERT_UP_SCALE, ROLE_EXPERT_DOWN_SCALE)
#define ARCH_MOE_SELECTED ARCH_MOE(ROLE_ROUTER_SELECT_BIAS, ROLE_NONE, ROLE_NONE, ROLE_NONE)
#define ARCH_ADD_SHARED {.kind = OP_ADD, .when = ROLE_SHARED_GATE, .dst = {ARCH_H}, .src = {ARCH_H, ARCH_SHARED}}
/* a dense FFN in some layers, in the others experts by a biased selection beside a shared one; added to X */
#define ARCH_FFN_OR_SELECTED \
    ARCH_FFN, ARCH_SHARED_EXPERT, ARCH_MOE_SELECTED, ARCH_ADD_SHARED, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H)
/* clang-format on */

#ifdef __cplusplus
}
#endif
#endif
