/* glm4moe (GLM-4.5: arXiv 2508.06471): the first layers dense, then experts chosen by a sigmoid router with a selection bias, beside a
 * shared expert that is always on; part of each head is rotated; the larger models norm q and k. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION_NORMED(ARCH_NORM_IF, ROLE_ATTN_POST_NORM),
    ARCH_FFN_OR_SELECTED,
};

static const enum role moe_shared[] = {ROLE_ROUTER,    ROLE_ROUTER_SELECT_BIAS, ROLE_EXPERT_GATE,
                                       ROLE_EXPERT_UP, ROLE_EXPERT_DOWN,        ROLE_SHARED_GATE,
                                       ROLE_SHARED_UP, ROLE_SHARED_DOWN,        ROLE_NONE};

const struct arch arch_glm4moe = {
    .name = "glm4moe",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_post_normed,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = moe_shared,
    .hparams = hparams_router_sigmoid,
};
