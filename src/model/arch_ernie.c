/* ernie4_5, ernie4_5-moe (ERNIE 4.5's technical report, 2025): llama's layers; with experts, the first layers are dense, a selection bias
 * is added to the softmax of the router's logits, and shared experts, as one, are always on. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION(ROLE_FFN_NORM),
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const struct arch_op layer_moe[] = {
    ARCH_ATTENTION(ROLE_FFN_NORM),
    ARCH_FFN_OR_SELECTED,
};

const struct arch arch_ernie4_5 = {
    .name = "ernie4_5",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_plain,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_ernie4_5_moe = {
    .name = "ernie4_5-moe",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = layer_moe,
    .n_layer_ops = sizeof layer_moe / sizeof *layer_moe,
    .required = arch_plain,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = arch_ffn_moe,
    .hparams = hparams_gates_sum_to_1,
};
