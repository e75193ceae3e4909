/* smollm3 (Hugging Face's SmolLM3, its blog post of 2025): llama's layers, of which every fourth does not rotate q and k. */
#include "src/model/arch.h"

static const struct arch_op ops[] = {
    ARCH_ATTENTION(ROLE_FFN_NORM),
    ARCH_FFN,
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

/* The files do not say which layers rotate. */
static int hparams(const struct gguf *g, struct model *m)
{
    (void)g;
    for (int layer = 3; layer < m->hp.n_layer; layer += 4)
        m->layers[layer].is_unrotated = true;
    return 0;
}

const struct arch arch_smollm3 = {
    .name = "smollm3",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = ops,
    .n_layer_ops = sizeof ops / sizeof *ops,
    .required = arch_plain,
    .ffn_dense = arch_ffn_dense,
    .hparams = hparams,
};
