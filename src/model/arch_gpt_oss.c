/* gpt-oss (arXiv 2508.10925): attention with sinks, every other layer behind a window; biases on every product; experts chosen by the
 * largest logits, whose gates are the softmax over the chosen. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_ATTEND_BESIDE(ROLE_ATTN_SINKS),
    ARCH_BIAS_IF(ARCH_H, ROLE_ATTN_OUT_BIAS),
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_POST_NORM),
    ARCH_MATMUL_IF(ARCH_ROUTER, ARCH_H, ROLE_ROUTER),
    ARCH_BIAS_IF(ARCH_ROUTER, ROLE_ROUTER_BIAS),
    ARCH_CHOSEN(ROLE_NONE, ROLE_EXPERT_GATE_SCALE, ROLE_EXPERT_UP_SCALE, ROLE_EXPERT_DOWN_SCALE, ROLE_EXPERT_GATE_BIAS,
                ROLE_EXPERT_UP_BIAS, ROLE_EXPERT_DOWN_BIAS),
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role required[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,     ROLE_ATTN_K,         ROLE_ATTN_V,
                                     ROLE_ATTN_OUT,  ROLE_ATTN_SINKS, ROLE_ATTN_POST_NORM, ROLE_NONE};
static const enum role moe_biased[] = {ROLE_ROUTER,         ROLE_ROUTER_BIAS,      ROLE_EXPERT_GATE,
                                       ROLE_EXPERT_UP,      ROLE_EXPERT_DOWN,      ROLE_EXPERT_GATE_BIAS,
                                       ROLE_EXPERT_UP_BIAS, ROLE_EXPERT_DOWN_BIAS, ROLE_NONE};

/* A window without a pattern is every other layer's, the first one's among them. */
static int hparams(const struct gguf *g, struct model *m)
{
    m->hp.route_fn = OP_ROUTE_SOFTMAX_TOPK;
    int rc = hparams_rope_alike(g, m);
    return rc < 0 ? rc : hparams_windows(g, m, 0, 2);
}

const struct arch arch_gpt_oss = {
    .name = "gpt-oss",
    .rope_neox = true,
    .act = OP_ACT_SWIGLU_OAI,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = required,
    .ffn_moe = moe_biased,
    .hparams = hparams,
};
