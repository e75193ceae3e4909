/* qwen2, qwen2moe, qwen3, qwen3moe (Qwen2: arXiv 2407.10671; Qwen3: arXiv 2505.09388). Qwen2 has biases on q, k and v,
 * Qwen3 norms q and k by head instead; qwen2moe adds a shared expert behind a sigmoid gate. qwen2vl, qwen3vl and qwen3vlmoe
 * are the same for text: positions in an image have three coordinates, which are equal in text, and what images add to layers
 * is not there. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

#define QWEN_ATTENTION                                                                                         \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), ARCH_QKV, ARCH_NORM_IF(ARCH_Q, ARCH_Q, ROLE_ATTN_Q_NORM),       \
        ARCH_NORM_IF(ARCH_K, ARCH_K, ROLE_ATTN_K_NORM), ARCH_ATTEND, ARCH_BIAS_IF(ARCH_H, ROLE_ATTN_OUT_BIAS), \
        ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM)

static const struct arch_op layer2[] = {
    QWEN_ATTENTION,
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const struct arch_op layer2moe[] = {
    QWEN_ATTENTION,
    ARCH_SHARED_EXPERT,
    ARCH_MATMUL_IF(ARCH_SHARED_GATE, ARCH_H, ROLE_SHARED_ROUTER),
    {.kind = OP_GATE, .dst = {ARCH_SHARED}, .src = {ARCH_SHARED, ARCH_SHARED_GATE}},
    ARCH_MOE_PLAIN,
    ARCH_ADD_SHARED,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const struct arch_op layer3[] = {
    QWEN_ATTENTION,
    ARCH_FFN_SCALED,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const struct arch_op layer3moe[] = {
    QWEN_ATTENTION,
    ARCH_MOE_SCALED,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role required_biases[] = {ROLE_ATTN_NORM,   ROLE_ATTN_Q,      ROLE_ATTN_K,      ROLE_ATTN_V,
                                            ROLE_ATTN_Q_BIAS, ROLE_ATTN_K_BIAS, ROLE_ATTN_V_BIAS, ROLE_ATTN_OUT,
                                            ROLE_FFN_NORM,    ROLE_NONE};
static const enum role moe_shared[] = {ROLE_ROUTER,      ROLE_EXPERT_GATE,   ROLE_EXPERT_UP,
                                       ROLE_EXPERT_DOWN, ROLE_SHARED_ROUTER, ROLE_SHARED_GATE,
                                       ROLE_SHARED_UP,   ROLE_SHARED_DOWN,   ROLE_NONE};

#define QWEN_LAYER(ops) .rope_neox = true, .act = OP_ACT_SILU, .layer = ops, .n_layer_ops = sizeof ops / sizeof *ops

const struct arch arch_qwen2 = {
    .name = "qwen2",
    QWEN_LAYER(layer2),
    .required = required_biases,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_qwen2vl = {
    .name = "qwen2vl",
    QWEN_LAYER(layer2),
    .required = required_biases,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_qwen2moe = {
    .name = "qwen2moe",
    QWEN_LAYER(layer2moe),
    .required = required_biases,
    .ffn_moe = moe_shared,
};

const struct arch arch_qwen3 = {
    .name = "qwen3",
    QWEN_LAYER(layer3),
    .required = arch_normed,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_qwen3moe = {
    .name = "qwen3moe",
    QWEN_LAYER(layer3moe),
    .required = arch_normed,
    .ffn_moe = arch_ffn_moe,
    .hparams = hparams_gates_sum_to_1,
};

const struct arch arch_qwen3vl = {
    .name = "qwen3vl",
    QWEN_LAYER(layer3),
    .required = arch_normed,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_qwen3vlmoe = {
    .name = "qwen3vlmoe",
    QWEN_LAYER(layer3moe),
    .required = arch_normed,
    .ffn_moe = arch_ffn_moe,
    .hparams = hparams_gates_sum_to_1,
};
