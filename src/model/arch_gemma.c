/* gemma2 (arXiv 2408.00118) and gemma3 (arXiv 2503.19786): norms before and after each block, GELU, embeddings scaled by
 * sqrt(d), sliding windows in most layers; gemma2 caps its scores, gemma3 norms q and k. The files' norm weights already
 * have the family's 1 added. */
#include <math.h>

#include "src/model/arch.h"
#include "src/model/hparams.h"

#define GEMMA_AFTER_QKV                                                                                    \
    ARCH_ATTEND, ARCH_NORM(ARCH_H, ARCH_H, ROLE_ATTN_POST_NORM), ARCH_ADD(ARCH_X, ARCH_X, ARCH_H),         \
        ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM), ARCH_FFN, ARCH_NORM(ARCH_H, ARCH_H, ROLE_FFN_POST_NORM), \
        ARCH_ADD(ARCH_X, ARCH_X, ARCH_H)

static const struct arch_op layer2[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_QKV,
    GEMMA_AFTER_QKV,
};

static const struct arch_op layer3[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),   ARCH_QKV,        ARCH_NORM(ARCH_Q, ARCH_Q, ROLE_ATTN_Q_NORM),
    ARCH_NORM(ARCH_K, ARCH_K, ROLE_ATTN_K_NORM), GEMMA_AFTER_QKV,
};

static const enum role required2[] = {ROLE_ATTN_NORM, ROLE_ATTN_Q,        ROLE_ATTN_K,
                                      ROLE_ATTN_V,    ROLE_ATTN_OUT,      ROLE_ATTN_POST_NORM,
                                      ROLE_FFN_NORM,  ROLE_FFN_POST_NORM, ROLE_NONE};
static const enum role required3[] = {ROLE_ATTN_NORM,   ROLE_ATTN_Q,        ROLE_ATTN_K,   ROLE_ATTN_V,
                                      ROLE_ATTN_Q_NORM, ROLE_ATTN_K_NORM,   ROLE_ATTN_OUT, ROLE_ATTN_POST_NORM,
                                      ROLE_FFN_NORM,    ROLE_FFN_POST_NORM, ROLE_NONE};

static int hparams2(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    hp->embd_scale = sqrtf((float)hp->n_embd);
    /* the 27B alone divides by d / heads instead of the head size (its config's query_pre_attn_scalar) */
    if (hp->n_layer == 46)
        hp->attn_scale = 1.0f / sqrtf((float)hp->n_embd / (float)hp->n_head_max);
    hp->attn_softcap = 50.0f;
    hp->logit_softcap = 30.0f;
    int rc = hparams_f32(g, m->arch->name, "attn_logit_softcapping", 0, 1e6, &hp->attn_softcap);
    if (rc == 0)
        rc = hparams_f32(g, m->arch->name, "final_logit_softcapping", 0, 1e6, &hp->logit_softcap);
    if (rc == 0)
        rc = hparams_rope_alike(g, m);
    return rc < 0 ? rc : hparams_windows(g, m, 4096, 2);
}

static int hparams3(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    hp->embd_scale = sqrtf((float)hp->n_embd);
    if (hp->n_layer == 62) /* 27B, as above */
        hp->attn_scale = 1.0f / sqrtf((float)hp->n_embd / (float)hp->n_head_max);
    int rc = hparams_f32(g, m->arch->name, "final_logit_softcapping", 0, 1e6, &hp->logit_softcap);
    return rc < 0 ? rc : hparams_windows(g, m, 0, 6);
}

const struct arch arch_gemma2 = {
    .name = "gemma2",
    .rope_neox = true,
    .act = OP_ACT_GELU_TANH,
    .layer = layer2,
    .n_layer_ops = sizeof layer2 / sizeof *layer2,
    .required = required2,
    .ffn_dense = arch_ffn_dense,
    .hparams = hparams2,
};

const struct arch arch_gemma3 = {
    .name = "gemma3",
    .rope_neox = true,
    .act = OP_ACT_GELU_TANH,
    .layer = layer3,
    .n_layer_ops = sizeof layer3 / sizeof *layer3,
    .required = required3,
    .ffn_dense = arch_ffn_dense,
    .hparams = hparams3,
};
