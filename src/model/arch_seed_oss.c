/* seed_oss (ByteDance's Seed-OSS, its model card): llama's layers with biases on q, k and v, rotated by halves. */
#include "src/model/arch.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_ATTEND,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_POST_NORM),
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role required[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,         ROLE_ATTN_K, ROLE_ATTN_V,
                                     ROLE_ATTN_OUT,  ROLE_ATTN_POST_NORM, ROLE_NONE};

const struct arch arch_seed_oss = {
    .name = "seed_oss",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = required,
    .ffn_dense = arch_ffn_dense,
};
