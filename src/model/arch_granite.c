/* granite, granitemoe (IBM Granite 3): llama's layers with fixed multipliers on embeddings, residuals, scores and logits. */
#include <math.h>

#include "src/base/err.h"
#include "src/model/arch.h"
#include "src/model/gguf.h"

static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    ARCH_BIAS_IF(ARCH_Q, ROLE_ATTN_Q_BIAS),
    ARCH_BIAS_IF(ARCH_K, ROLE_ATTN_K_BIAS),
    ARCH_BIAS_IF(ARCH_V, ROLE_ATTN_V_BIAS),
    ARCH_ATTEND,
    {.kind = OP_SCALE, .dst = {ARCH_H}, .src = {ARCH_H}},
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),
    ARCH_FFN,
    ARCH_MOE_FFN,
    {.kind = OP_SCALE, .dst = {ARCH_H}, .src = {ARCH_H}},
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),
};

static const enum role required[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,   ROLE_ATTN_K, ROLE_ATTN_V,
                                     ROLE_ATTN_OUT,  ROLE_FFN_NORM, ROLE_NONE};

/* A multiplier that may be missing or 0 (both mean: none). */
static int multiplier(const struct gguf *g, const char *arch, const char *what, double *out)
{
    char key[96];
    arch_key(key, sizeof key, arch, what);
    double v = 0;
    int rc = gguf_opt_f64(g, key, &v);
    if (rc < 0)
        return rc;
    if (!isfinite(v) || v < 0)
        return err(ERR_FORMAT, "%s = %g: not a multiplier", key, v);
    *out = v == 0 ? 1.0 : v;
    return 0;
}

static int hparams(const struct gguf *g, struct model *m)
{
    const char *arch = m->arch->name;
    double embd = 1, residual = 1, logit = 1;
    int rc = multiplier(g, arch, "embedding_scale", &embd);
    if (rc == 0)
        rc = multiplier(g, arch, "residual_scale", &residual);
    if (rc == 0)
        rc = multiplier(g, arch, "logit_scale", &logit);
    m->hp.embd_scale = (float)embd;
    m->hp.residual_scale = (float)residual;
    m->hp.logit_scale = (float)(1.0 / logit);
    m->hp.route_normalize = true;
    return rc;
}

#define GRANITE_LAYER \
    .rope_neox = false, .act = OP_ACT_SILU, .layer = layer, .n_layer_ops = sizeof layer / sizeof *layer, \
    .required = required, .hparams = hparams

const struct arch arch_granite = {
    .name = "granite",
    GRANITE_LAYER,
    .ffn_dense = arch_ffn_dense,
};

const struct arch arch_granitemoe = {
    .name = "granitemoe",
    GRANITE_LAYER,
    .ffn_moe = arch_ffn_moe,
};
