/* deepseek2 (DeepSeek-V2: arXiv 2405.04434; V3: arXiv 2412.19437; Kimi-K2, Moonlight, GLM-4.7-Flash): multi-head latent attention; the
 * first layers dense, then experts beside shared ones, in groups where the file says so. Keys and values of all heads are made of one
 * short row, the latent. Today's files have the matrices that do so head by head: keys' are multiplied into queries, values' into what
 * attention gives, so that the latent alone is cached and attended to. Older files have them in one, and then heads are attended to as in
 * other families: a position takes n_head times q_dim + o_dim values instead of n_lora_kv + n_rot. */
#include "src/model/arch.h"
#include "src/model/hparams.h"

#include <math.h>

#include "src/base/err.h"

/* clang-format off */
static const struct arch_op layer[] = {
    ARCH_NORM(ARCH_H, ARCH_X, ROLE_ATTN_NORM),
    ARCH_MATMUL_IF(ARCH_QA, ARCH_H, ROLE_ATTN_Q_A), ARCH_NORM_IF(ARCH_QA, ARCH_QA, ROLE_ATTN_Q_A_NORM),
    ARCH_MATMUL_IF(ARCH_Q, ARCH_QA, ROLE_ATTN_Q_B),
    ARCH_MATMUL_IF(ARCH_Q, ARCH_H, ROLE_ATTN_Q),
    ARCH_MATMUL_IF(ARCH_LATENT, ARCH_H, ROLE_ATTN_KV_A), ARCH_NORM(ARCH_LATENT, ARCH_LATENT, ROLE_ATTN_KV_A_NORM),
    /* the latent alone */
    {.kind = OP_ROPE, .when = ROLE_ATTN_K_B, .dst = {ARCH_LATENT}, .src = {ARCH_LATENT, ARCH_ROPE0}},
    {.kind = OP_ROPE, .when = ROLE_ATTN_K_B, .dst = {ARCH_QL}, .src = {ARCH_Q, ARCH_ROPE0}},
    {.kind = OP_MATMUL_HEADS, .when = ROLE_ATTN_K_B, .dst = {ARCH_QL}, .src = {ARCH_Q}, .w = {ROLE_ATTN_K_B}},
    {.kind = OP_KV_APPEND, .when = ROLE_ATTN_K_B, .src = {ARCH_LATENT}},
    {.kind = OP_ATTENTION, .when = ROLE_ATTN_K_B, .dst = {ARCH_OL}, .src = {ARCH_QL}},
    {.kind = OP_MATMUL_HEADS, .when = ROLE_ATTN_V_B, .dst = {ARCH_O}, .src = {ARCH_OL}, .w = {ROLE_ATTN_V_B}},
    /* head by head */
    {.kind = OP_ROPE, .when = ROLE_ATTN_KV_B_K, .dst = {ARCH_Q}, .src = {ARCH_Q, ARCH_ROPE0}},
    {.kind = OP_ROPE, .when = ROLE_ATTN_KV_B_K, .dst = {ARCH_K}, .src = {ARCH_LATENT, ARCH_ROPE0}},
    {.kind = OP_MATMUL_HEADS, .when = ROLE_ATTN_KV_B_K, .dst = {ARCH_K, ARCH_V}, .src = {ARCH_LATENT},
     .w = {ROLE_ATTN_KV_B_K, ROLE_ATTN_KV_B_V}},
    {.kind = OP_KV_APPEND, .when = ROLE_ATTN_KV_B_K, .src = {ARCH_K, ARCH_V}},
    {.kind = OP_ATTENTION, .when = ROLE_ATTN_KV_B_K, .dst = {ARCH_O}, .src = {ARCH_Q}},
    ARCH_MATMUL_IF(ARCH_H, ARCH_O, ROLE_ATTN_OUT),
    ARCH_ADD(ARCH_X, ARCH_X, ARCH_H), ARCH_NORM(ARCH_H, ARCH_X, ROLE_FFN_NORM),
    ARCH_FFN_OR_SELECTED,
};
/* clang-format on */

static const enum role required[] = {ROLE_ATTN_NORM, ROLE_ATTN_KV_A, ROLE_ATTN_KV_A_NORM,
                                     ROLE_ATTN_OUT,  ROLE_FFN_NORM,  ROLE_NONE};

/* Sizes of heads. In today's files key_length and value_length are those of the cache. */
static int read_heads(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    int q_dim = 0, o_dim = 0;
    int rc = hparams_int(g, arch, "attention.kv_lora_rank", false, 1, HPARAMS_MAX_RANK, &hp->n_lora_kv);

    if (rc == 0)
        rc = hparams_int(g, arch, "attention.q_lora_rank", true, 0, HPARAMS_MAX_RANK, &hp->n_lora_q);
    if (rc == 0)
        rc = hparams_int(g, arch, "attention.key_length_mla", true, 0, HPARAMS_MAX_RANK, &q_dim);
    if (rc == 0)
        rc = hparams_int(g, arch, "attention.value_length_mla", true, 0, HPARAMS_MAX_RANK, &o_dim);
    if (rc < 0)
        return rc;
    if (!q_dim != !o_dim)
        return err(ERR_FORMAT, "%s.attention.key_length_mla = %d, value_length_mla = %d: both or neither", arch, q_dim,
                   o_dim);
    hp->kv_is_latent = q_dim > 0;
    if (hp->kv_is_latent) {
        if (hp->head_dim_k != hp->n_lora_kv + hp->n_rot || hp->head_dim_v != hp->n_lora_kv)
            return err(ERR_FORMAT, "%s: keys of %d values and values of %d beside a latent of %d with %d rotated", arch,
                       hp->head_dim_k, hp->head_dim_v, hp->n_lora_kv, hp->n_rot);
        hp->q_dim = q_dim;
        hp->o_dim = o_dim;
    }
    if (hp->q_dim <= hp->n_rot)
        return err(ERR_FORMAT, "%s: %d of a key's %d values are rotated; some are not to be", arch, hp->n_rot,
                   hp->q_dim);
    if (hp->n_lora_kv <= hp->n_rot) /* the latent's norm leaves what is behind it only if that is shorter (RMS_NORM) */
        return err(ERR_UNSUPPORTED,
                   "%s: a latent of %d values with %d rotated: ferry wants more of those than of these", arch,
                   hp->n_lora_kv, hp->n_rot);
    for (int i = 0; i < hp->n_layer; i++) {
        const struct model_layer *l = &m->layers[i];
        if (l->n_head_kv != (hp->kv_is_latent ? 1 : l->n_head))
            return err(ERR_FORMAT, "layer %d: %d KV heads for %d heads of latent attention", i, l->n_head_kv,
                       l->n_head);
    }
    return 0;
}

/* YaRN: q.k is scaled, too, by the square of what cos and sin are scaled by; or, with a multiplier of the logarithm (a tenth of the one
 * that models are published with), by a square of its own, and cos and sin are left alone. */
static int read_scale(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    float temperature = 0;
    int rc = hparams_f32(g, m->arch->name, "rope.scaling.yarn_log_multiplier", 0, 1e3, &hp->yarn_log_mul);

    if (rc == 0)
        rc = hparams_f32(g, m->arch->name, "attention.temperature_scale", 0, 1e6, &temperature);
    if (rc < 0)
        return rc;
    if (temperature != 0)
        return err(ERR_UNSUPPORTED, "%s.attention.temperature_scale = %g: ferry does not scale queries by position",
                   m->arch->name, (double)temperature);
    const double log_factor = log(hp->rope_factor[0]), log_mul = hp->yarn_log_mul / 0.1;
    const bool is_flat = hp->rope_yarn && hp->yarn_log_mul != 0;
    double mscale = hp->yarn_attn * (is_flat ? 1 : 1 + 0.1 * log_factor) * (1 + 0.1 * log_mul * log_factor);
    hp->attn_scale = (float)(mscale * mscale / sqrt(hp->q_dim));
    return 0;
}

/* Before files said which function a router has, all but one model's were softmaxes: GLM-4.7-Flash, known by its shape. */
static int read_router(const struct gguf *g, struct model *m)
{
    const struct hparams *hp = &m->hp;
    struct gguf_array tokens = {0};
    int n_vocab = 0;
    int rc = hparams_int(g, m->arch->name, "vocab_size", true, 0, INT32_MAX, &n_vocab);

    if (rc == 0 && n_vocab == 0 && gguf_find(g, "tokenizer.ggml.tokens"))
        rc = gguf_array(g, "tokenizer.ggml.tokens", GGUF_WANT_STRING, &tokens);
    if (rc < 0)
        return rc;
    uint64_t n = n_vocab ? (uint64_t)n_vocab : tokens.n;
    bool is_sigmoid = (hp->n_layer == 47 || hp->n_layer == 48) && n == 154880;
    return is_sigmoid ? hparams_router_sigmoid(g, m) : hparams_router(g, m);
}

static int hparams(const struct gguf *g, struct model *m)
{
    int rc = read_heads(g, m);

    if (rc == 0)
        rc = read_scale(g, m);
    return rc == 0 ? read_router(g, m) : rc;
}

const struct arch arch_deepseek2 = {
    .name = "deepseek2",
    .rope_neox = false,
    .act = OP_ACT_SILU,
    .layer = layer,
    .n_layer_ops = sizeof layer / sizeof *layer,
    .required = required,
    .ffn_dense = arch_ffn_dense,
    .ffn_moe = arch_ffn_shared,
    .hparams = hparams,
};
