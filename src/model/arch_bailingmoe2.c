/* bailingmoe2 (Ling 2.0: arXiv 2510.22115; Ring): q, k and v in one matrix, q and k normed by head, part of a head rotated; the first
 * layers dense, then experts in groups, chosen by a sigmoid router with a selection bias, beside shared ones. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION_NORMED(ARCH_NORM, ROLE_FFN_NORM),
    ARCH_FFN_OR_SELECTED,
};

const struct arch arch_bailingmoe2 = {
    .name = "bailingmoe2",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_normed,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = arch_ffn_shared,
    .hparams = hparams_router_sigmoid,
};
