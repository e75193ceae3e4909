/* ernie4_5, ernie4_5-moe (ERNIE 4.5's technical report, 2025): llama's layers; with experts, the first layers are dense, a selection bias
 * is added to the softmax of the router's logits, and shared experts, as one, are always on. */
#include "src/model/arch.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_ATTEND,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const struct arch_op layer_moe[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_ATTEND,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),
    ARCH_FFN,
    ARCH_SHARED_EXPERT,
    ARCH_MOE(ROLE_ROUTER_SELECT_BIAS, ROLE_NONE, ROLE_NONE, ROLE_NONE),
    ARCH_ADD_SHARED,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role required[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,   ROLE_ATTN_K, ROLE_ATTN_V,
                                     ROLE_ATTN_OUT,  ROLE_FFN_NORM, ROLE_NONE};

static int hparams_moe(const struct gguf *g, struct model *m)
{
    (void)g;
    m->hp.route_normalize = true;
    return 0;
}

const struct arch arch_ernie4_5 = {
    .name = "ernie4_5",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = required,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_ernie4_5_moe = {
    .name = "ernie4_5-moe",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = layer_moe,
    .n_layer_ops = sizeof layer_moe / sizeof *layer_moe,
    .required = required,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = arch_ffn_moe,
    .hparams = hparams_moe,
};
