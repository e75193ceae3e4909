/* olmoe (OLMoE: arXiv 2409.02060): q and k are normed over the whole row, gates are the plain softmax probabilities. */
#include "src/model/arch.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION_NORMED(ARCH_NORM, ROLE_FFN_NORM),
    ARCH_MOE_PLAIN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

const struct arch arch_olmoe = {
    .name = "olmoe",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_normed,
    .ffn_moe = arch_ffn_moe,
};
