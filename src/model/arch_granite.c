/* granite, granitemoe (IBM Granite 3): llama's layers with fixed multipliers on embeddings, residuals, scores and logits. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_ATTEND,
    ARCH_BIAS_IF(ARCH_H, ROLE_ATTN_OUT_BIAS),
    {.kind = OP_SCALE, .dst = {ARCH_H}, .src = {ARCH_H}},
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),
    ARCH_FFN,
    ARCH_SHARED_EXPERT,
    ARCH_MOE_PLAIN,
    ARCH_ADD_SHARED,
    {.kind = OP_SCALE, .dst = {ARCH_H}, .src = {ARCH_H}},
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

/* A multiplier that may be missing or 0: both mean none. */
static int multiplier(const struct gguf *g, const char *arch, const char *what, float *out)
{
    float v = 0;
    int rc = hparams_f32(g, arch, what, 0, 1e6, &v);
    if (v > 0)
        *out = v;
    return rc;
}

static int hparams(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    float divisor = 1.0f;
    int rc = multiplier(g, arch, "embedding_scale", &hp->embd_scale);
    if (rc == 0)
        rc = multiplier(g, arch, "residual_scale", &hp->residual_scale);
    if (rc == 0)
        rc = multiplier(g, arch, "attention.scale", &hp->attn_scale);
    if (rc == 0)
        rc = multiplier(g, arch, "logit_scale", &divisor);
    hp->logit_scale = 1.0f / divisor;
    hp->route_normalize = true;
    return rc;
}

#define GRANITE_LAYER                                                                                    \
    .rope_neox = false, .act = OP_ACT_SILU, .layer = layer, .n_layer_ops = sizeof layer / sizeof *layer, \
    .required = arch_plain, .ffn_dense = arch_ffn_dense, .ffn_moe = arch_ffn_moe, .hparams = hparams

const struct arch arch_granite = {
    .name = "granite",
    GRANITE_LAYER,
};

const struct arch arch_granitemoe = {
    .name = "granitemoe",
    GRANITE_LAYER,
};
