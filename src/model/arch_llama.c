/* llama: LLaMA 1-3, Mistral, SmolLM and others that share their file format; with a router in the layers, Mixtral.
 * (LLaMA: arXiv 2302.13971. Mixtral: arXiv 2401.04088: softmax over the chosen experts, here as softmax over all of them,
 * divided by the chosen ones' sum.) */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_ATTEND,
    ARCH_BIAS_IF(ARCH_H, ROLE_ATTN_OUT_BIAS),
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),
    ARCH_FFN_SCALED,
    ARCH_MOE_SCALED,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

const struct arch arch_llama = {
    .name = "llama",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_plain,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = arch_ffn_moe,
    .hparams = hparams_gates_sum_to_1,
};
