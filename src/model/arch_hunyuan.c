/* hunyuan-dense, hunyuan-moe (Hunyuan-A13B's technical report, 2025): q and k are normed by head after they were rotated; with experts, a
 * shared one is always on. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

#define HUNYUAN_ATTENTION                                                                                              \
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM), ARCH_QKV, ARCH_ROTATE, ARCH_NORM(ARCH_Q, ARCH_Q, ROLE_ATTN_Q_NORM),     \
        ARCH_NORM(ARCH_K, ARCH_K, ROLE_ATTN_K_NORM), ARCH_ATTEND_ROTATED(ROLE_NONE), ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), \
        ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM)

static const struct arch_op layer[] = {
    HUNYUAN_ATTENTION,
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const struct arch_op layer_moe[] = {
    HUNYUAN_ATTENTION, ARCH_SHARED_EXPERT, ARCH_MOE_PLAIN, ARCH_ADD_SHARED, ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

/* For longer contexts than it was trained on a model has a larger base, which the files hold as it is: they need no factor for it. */
static int hparams(const struct gguf *g, struct model *m)
{
    float alpha = 0;
    return hparams_f32(g, m->arch->name, "rope.scaling.alpha", 0, 0, &alpha);
}

const struct arch arch_hunyuan_dense = {
    .name = "hunyuan-dense",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = arch_normed,
    .ffn_dense = arch_ffn_dense,
    .hparams = hparams,
};

const struct arch arch_hunyuan_moe = {
    .name = "hunyuan-moe",
    .rope_neox = true,
    .act = OP_ACT_SILU,
    .layer = layer_moe,
    .n_layer_ops = sizeof layer_moe / sizeof *layer_moe,
    .required = arch_normed,
    .ffn_moe = arch_ffn_shared,
    .hparams = hparams_gates_sum_to_1,
};
