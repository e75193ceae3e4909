/* seed_oss (ByteDance's Seed-OSS, its model card): llama's layers with biases on q, k and v, rotated by halves. */
#include "src/model/arch.h"

static const struct arch_op layer[] = {
    ARCH_ATTENTION(ROLE_ATTN_POST_NORM),
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

const struct arch arch_seed_oss = {
    .name = "seed_oss",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_post_normed,
    .ffn_dense = arch_ffn_dense,
};
