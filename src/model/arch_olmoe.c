/* olmoe (OLMoE: arXiv 2409.02060): q and k are normed over the whole row, gates are the plain softmax probabilities. */
#include "src/model/arch.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),   ARCH_QKV,       ARCH_NORM(ARCH_Q, ARCH_Q, ROLE_ATTN_Q_NORM),
    ARCH_NORM(ARCH_K, ARCH_K, ROLE_ATTN_K_NORM), ARCH_ATTEND,    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),    ARCH_MOE_PLAIN, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role required[] = {ROLE_ATTN_NORM,   ROLE_ATTN_Q,   ROLE_ATTN_K,   ROLE_ATTN_V, ROLE_ATTN_Q_NORM,
                                     ROLE_ATTN_K_NORM, ROLE_ATTN_OUT, ROLE_FFN_NORM, ROLE_NONE};

const struct arch arch_olmoe = {
    .name = "olmoe",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = required,
    .ffn_moe = arch_ffn_moe,
};
