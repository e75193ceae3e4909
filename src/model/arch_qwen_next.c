/* qwen3next (Qwen3-Next, Qwen3-Coder-Next) and qwen35, qwen35moe (Qwen3.5), for text: three layers of four are gated delta nets (arXiv
 * 2412.06464) behind a short convolution, the fourth attends, with a gate on what its heads give. Experts are beside a shared one behind a
 * gate of its own. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

/* clang-format off */
/* The gates of heads are apart from each other: behind the q of the same head. */
#define GATED_ATTENTION \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), \
    {.kind = OP_MATMUL, .dst = {ARCH_UP, ARCH_K, ARCH_V}, .src = {ARCH_H}, .w = {ROLE_ATTN_Q_GATE, ROLE_ATTN_K, ROLE_ATTN_V}}, \
    ARCH_SCALE_IF(ARCH_UP, ROLE_ATTN_Q_SCALE), ARCH_SCALE_IF(ARCH_K, ROLE_ATTN_K_SCALE), \
    ARCH_SCALE_IF(ARCH_V, ROLE_ATTN_V_SCALE), \
    {.kind = OP_SPLIT, .when = ROLE_ATTN_Q_GATE, .dst = {ARCH_Q, ARCH_GATE}, .src = {ARCH_UP}}, \
    ARCH_NORM(ARCH_Q, ARCH_Q, ROLE_ATTN_Q_NORM), ARCH_NORM(ARCH_K, ARCH_K, ROLE_ATTN_K_NORM), ARCH_ROTATE, \
    {.kind = OP_KV_APPEND, .src = {ARCH_K, ARCH_V}}, \
    {.kind = OP_ATTENTION, .dst = {ARCH_O}, .src = {ARCH_Q}}, \
    {.kind = OP_GATE, .dst = {ARCH_O}, .src = {ARCH_O, ARCH_GATE}}, \
    {.kind = OP_MATMUL, .dst = {ARCH_H}, .src = {ARCH_O}, .w = {ROLE_ATTN_OUT}}, \
    ARCH_SCALE_IF(ARCH_H, ROLE_ATTN_OUT_SCALE), \
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_POST_NORM)

/* From Q (q, k, v), GATE (z), ALPHA and BETA on */
#define DELTA_RECALL \
    {.kind = OP_CONV, .dst = {ARCH_V}, .src = {ARCH_Q}, .w = {ROLE_DELTA_CONV}}, \
    {.kind = OP_L2_NORM, .dst = {ARCH_V}, .src = {ARCH_V}}, \
    {.kind = OP_DELTA_NET, .dst = {ARCH_O}, .src = {ARCH_V, ARCH_ALPHA, ARCH_BETA}, .w = {ROLE_DELTA_DT, ROLE_DELTA_A}}, \
    ARCH_NORM(ARCH_O, ARCH_O, ROLE_DELTA_NORM), \
    {.kind = OP_GLU, .dst = {ARCH_GATE}, .src = {ARCH_GATE, ARCH_O}}, \
    {.kind = OP_MATMUL, .dst = {ARCH_H}, .src = {ARCH_GATE}, .w = {ROLE_DELTA_OUT}}, \
    ARCH_SCALE_IF(ARCH_H, ROLE_DELTA_OUT_SCALE), \
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_POST_NORM)

#define DELTA_QKV_Z \
    ARCH_MATMUL_IF(ARCH_Q, ARCH_H, ROLE_DELTA_QKV), ARCH_SCALE_IF(ARCH_Q, ROLE_DELTA_QKV_SCALE), \
    ARCH_MATMUL_IF(ARCH_GATE, ARCH_H, ROLE_DELTA_Z), ARCH_SCALE_IF(ARCH_GATE, ROLE_DELTA_Z_SCALE)

#define DELTA_NEXT \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), DELTA_QKV_Z, \
    ARCH_MATMUL_IF(ARCH_UP, ARCH_H, ROLE_DELTA_QKVZ), \
    {.kind = OP_SPLIT, .when = ROLE_DELTA_QKVZ, .dst = {ARCH_Q, ARCH_GATE}, .src = {ARCH_UP}}, \
    ARCH_MATMUL_IF(ARCH_K, ARCH_H, ROLE_DELTA_BA), \
    {.kind = OP_SPLIT, .when = ROLE_DELTA_BA, .dst = {ARCH_BETA, ARCH_ALPHA}, .src = {ARCH_K}}, \
    DELTA_RECALL

#define DELTA_35 \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), DELTA_QKV_Z, \
    {.kind = OP_MATMUL, .dst = {ARCH_BETA, ARCH_ALPHA}, .src = {ARCH_H}, .w = {ROLE_DELTA_BETA, ROLE_DELTA_ALPHA}}, \
    ARCH_SCALE_IF(ARCH_BETA, ROLE_DELTA_BETA_SCALE), ARCH_SCALE_IF(ARCH_ALPHA, ROLE_DELTA_ALPHA_SCALE), \
    DELTA_RECALL

#define GATED_EXPERTS \
    {.kind = OP_MATMUL, .when = ROLE_SHARED_GATE, .dst = {ARCH_GATE, ARCH_UP}, .src = {ARCH_H}, \
     .w = {ROLE_SHARED_GATE, ROLE_SHARED_UP}}, \
    ARCH_SCALE_IF(ARCH_GATE, ROLE_SHARED_GATE_SCALE), ARCH_SCALE_IF(ARCH_UP, ROLE_SHARED_UP_SCALE), \
    {.kind = OP_GLU, .when = ROLE_SHARED_GATE, .dst = {ARCH_GATE}, .src = {ARCH_GATE, ARCH_UP}}, \
    ARCH_MATMUL_IF(ARCH_SHARED, ARCH_GATE, ROLE_SHARED_DOWN), ARCH_SCALE_IF(ARCH_SHARED, ROLE_SHARED_DOWN_SCALE), \
    ARCH_MATMUL_IF(ARCH_SHARED_GATE, ARCH_H, ROLE_SHARED_ROUTER), \
    {.kind = OP_GATE, .dst = {ARCH_SHARED}, .src = {ARCH_SHARED, ARCH_SHARED_GATE}}, \
    ARCH_MOE_SCALED, ARCH_ADD_SHARED, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H)
/* clang-format on */

static const struct arch_op attention_moe[] = {GATED_ATTENTION, GATED_EXPERTS};
static const struct arch_op attention_dense[] = {GATED_ATTENTION, ARCH_FFN_SCALED, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H)};
static const struct arch_op delta_next[] = {DELTA_NEXT, GATED_EXPERTS};
static const struct arch_op delta_moe[] = {DELTA_35, GATED_EXPERTS};
static const struct arch_op delta_dense[] = {DELTA_35, ARCH_FFN_SCALED, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H)};

static const enum role required[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q_GATE,    ROLE_ATTN_K,
                                     ROLE_ATTN_V,    ROLE_ATTN_Q_NORM,    ROLE_ATTN_K_NORM,
                                     ROLE_ATTN_OUT,  ROLE_ATTN_POST_NORM, ROLE_NONE};
static const enum role required_next[] = {ROLE_ATTN_NORM, ROLE_DELTA_CONV,     ROLE_DELTA_DT,
                                          ROLE_DELTA_A,   ROLE_DELTA_BA,       ROLE_DELTA_NORM,
                                          ROLE_DELTA_OUT, ROLE_ATTN_POST_NORM, ROLE_NONE};
static const enum role required_35[] = {ROLE_ATTN_NORM,      ROLE_DELTA_CONV,  ROLE_DELTA_DT,   ROLE_DELTA_A,
                                        ROLE_DELTA_BETA,     ROLE_DELTA_ALPHA, ROLE_DELTA_NORM, ROLE_DELTA_OUT,
                                        ROLE_ATTN_POST_NORM, ROLE_NONE};
static const enum role experts[] = {ROLE_ROUTER,      ROLE_EXPERT_GATE,   ROLE_EXPERT_UP,
                                    ROLE_EXPERT_DOWN, ROLE_SHARED_ROUTER, ROLE_SHARED_GATE,
                                    ROLE_SHARED_UP,   ROLE_SHARED_DOWN,   ROLE_NONE};

static int hparams(const struct gguf *g, struct model *m)
{
    int rc = hparams_gates_sum_to_1(g, m);
    return rc ? rc : hparams_delta(g, m);
}

#define QWEN_LAYERS(attention, delta)                                                                               \
    .rope_neox = true, .act = OP_ACT_SILU, .layer = attention, .n_layer_ops = sizeof attention / sizeof *attention, \
    .recurrent = delta, .n_recurrent_ops = sizeof delta / sizeof *delta, .required = required, .hparams = hparams

const struct arch arch_qwen3next = {
    .name = "qwen3next",
    QWEN_LAYERS(attention_moe, delta_next),
    .required_recurrent = required_next,
    .ffn_moe = experts,
};

const struct arch arch_qwen35moe = {
    .name = "qwen35moe",
    QWEN_LAYERS(attention_moe, delta_moe),
    .required_recurrent = required_35,
    .is_tiled = true,
    .ffn_moe = experts,
};

const struct arch arch_qwen35 = {
    .name = "qwen35",
    QWEN_LAYERS(attention_dense, delta_dense),
    .required_recurrent = required_35,
    .is_tiled = true,
    .ffn_dense = arch_ffn_dense,
};
