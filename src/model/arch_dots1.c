/* dots1 (dots.llm1: arXiv 2506.05767): the first layers dense, then experts chosen by a sigmoid router with a selection
 * bias, beside a shared expert that is always on. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION_NORMED(ARCH_NORM, ROLE_FFN_NORM),
    ARCH_FFN_OR_SELECTED,
};

const struct arch arch_dots1 = {
    .name = "dots1",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_normed,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = arch_ffn_shared,
    .hparams = hparams_router,
};
