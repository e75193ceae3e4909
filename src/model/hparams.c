/* Metadata to hyperparameters. Every number comes from a file and is checked before use; the bounds are far above any model
 * known, and small enough that products of two of them fit an int64. */
#include "src/model/hparams.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/arch.h"

#define MAX_LAYER 4096
#define MAX_EMBD (1 << 17)
#define MAX_FF (1 << 20)
#define MAX_HEAD 4096
#define MAX_HEAD_DIM 1024
#define MAX_EXPERT 4096
#define MAX_CTX (1 << 28)

static int check_range(const char *key, int64_t v, int64_t lo, int64_t hi)
{
    if (v < lo || v > hi)
        return err(ERR_FORMAT, "%s = %" PRId64 ": outside %" PRId64 "..%" PRId64, key, v, lo, hi);
    return 0;
}

int hparams_int(const struct gguf *g, const char *arch, const char *what, bool opt, int64_t lo, int64_t hi, int *out)
{
    char key[96];
    arch_key(key, sizeof key, arch, what);
    int64_t v = *out;
    if (opt && !gguf_find(g, key))
        return 0;
    int rc = gguf_i64(g, key, &v);
    if (rc == 0)
        rc = check_range(key, v, lo, hi);
    if (rc == 0)
        *out = (int)v;
    return rc;
}

/* A finite float in [lo, hi], missing allowed. */
static int read_f64(const struct gguf *g, const char *arch, const char *what, double lo, double hi, double *out)
{
    char key[96];
    arch_key(key, sizeof key, arch, what);
    double v = *out;
    int rc = gguf_opt_f64(g, key, &v);
    if (rc < 0)
        return rc;
    if (!(v >= lo && v <= hi)) /* NaN too */
        return err(ERR_FORMAT, "%s = %g: outside %g..%g", key, v, lo, hi);
    *out = v;
    return 0;
}

int hparams_f32(const struct gguf *g, const char *arch, const char *what, double lo, double hi, float *out)
{
    double v = *out;
    int rc = read_f64(g, arch, what, lo, hi, &v);
    *out = (float)v;
    return rc;
}

/* One number for all layers, or an array with one for each. The field of layer i is at (char *)first + i * stride. */
static int read_per_layer(const struct gguf *g, const struct model *m, const char *what, bool opt, int64_t lo,
                          int64_t hi, int *first, size_t stride)
{
    char key[96];
    arch_key(key, sizeof key, m->arch->name, what);
    const struct gguf_key *k = gguf_find(g, key);
    if (!k && opt)
        return 0;
    bool is_array = k && k->type == GGUF_ARRAY;
    struct gguf_array a = {0};
    int64_t v = 0;
    int rc = is_array ? gguf_array(g, key, GGUF_WANT_INT, &a) : gguf_i64(g, key, &v);
    if (rc < 0)
        return rc;
    if (is_array && a.n < (uint64_t)m->hp.n_layer)
        return err(ERR_FORMAT, "%s: %" PRIu64 " elements for %d layers", key, a.n, m->hp.n_layer);
    for (int layer = 0; layer < m->hp.n_layer; layer++) {
        if (is_array)
            v = gguf_at_i64(&a, (uint64_t)layer);
        rc = check_range(key, v, lo, hi);
        if (rc < 0)
            return rc;
        *(int *)(void *)((char *)first + (size_t)layer * stride) = (int)v;
    }
    return 0;
}

static int read_layers(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const size_t stride = sizeof *m->layers;
    m->layers = mem_zalloc((size_t)hp->n_layer, stride, MEM_META);
    if (!m->layers)
        return err(ERR_NOMEM, "%d layers", hp->n_layer);
    for (int layer = 0; layer < hp->n_layer; layer++)
        for (int role = 0; role < ROLE_N; role++)
            m->layers[layer].w[role] = -1;

    int rc = read_per_layer(g, m, "attention.head_count", false, 1, MAX_HEAD, &m->layers->n_head, stride);
    for (int layer = 0; rc == 0 && layer < hp->n_layer; layer++)
        m->layers[layer].n_head_kv = m->layers[layer].n_head;
    if (rc == 0)
        rc = read_per_layer(g, m, "attention.head_count_kv", true, 1, MAX_HEAD, &m->layers->n_head_kv, stride);
    if (rc == 0)
        rc = read_per_layer(g, m, "feed_forward_length", true, 1, MAX_FF, &m->layers->n_ff, stride);
    for (int layer = 0; rc == 0 && layer < hp->n_layer; layer++) {
        const struct model_layer *l = &m->layers[layer];
        if (l->n_head % l->n_head_kv)
            rc = err(ERR_FORMAT, "layer %d: %d heads do not share %d KV heads evenly", layer, l->n_head, l->n_head_kv);
        if (l->n_head > hp->n_head_max)
            hp->n_head_max = l->n_head;
    }
    return rc;
}

static int read_heads(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    hp->head_dim_k = hp->head_dim_v = hp->n_embd / m->layers[0].n_head;
    int rc = hparams_int(g, arch, "attention.key_length", true, 1, MAX_HEAD_DIM, &hp->head_dim_k);
    if (rc == 0)
        rc = hparams_int(g, arch, "attention.value_length", true, 1, MAX_HEAD_DIM, &hp->head_dim_v);
    if (rc == 0)
        rc = check_range("head size", hp->head_dim_k, 1, MAX_HEAD_DIM);
    hp->n_rot = hp->head_dim_k;
    if (rc == 0)
        rc = hparams_int(g, arch, "rope.dimension_count", true, 2, hp->head_dim_k, &hp->n_rot);
    if (rc == 0 && hp->n_rot % 2)
        rc = err(ERR_FORMAT, "%s.rope.dimension_count = %d: odd", arch, hp->n_rot);
    hp->q_dim = hp->head_dim_k;
    hp->o_dim = hp->head_dim_v;
    hp->attn_scale = 1.0f / sqrtf((float)hp->head_dim_k);
    return rc;
}

static int read_rope(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    hp->rope_base[0] = hp->rope_base[1] = 10000.0;
    hp->rope_factor[0] = hp->rope_factor[1] = 1.0;
    hp->yarn_ext = hp->yarn_attn = 1.0;
    hp->yarn_beta_fast = 32.0; /* the defaults of the YaRN paper, arXiv 2309.00071 */
    hp->yarn_beta_slow = 1.0;
    hp->n_ctx_orig = hp->n_ctx_train;

    char key[96];
    arch_key(key, sizeof key, arch, "rope.scaling.type");
    struct gguf_str type = {"linear", 6}; /* a factor without a type has always meant linear */
    int rc = gguf_opt_str(g, key, &type);
    double factor = 0;
    if (rc == 0)
        rc = read_f64(g, arch, "rope.freq_base", 1.0, 1e12, &hp->rope_base[0]);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.freq_base_swa", 1.0, 1e12, &hp->rope_base[1]);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.scale_linear", 0, 1e6, &factor);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.scaling.factor", 0, 1e6, &factor);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.scaling.attn_factor", 0, 1e6, &hp->yarn_attn);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.scaling.yarn_ext_factor", -1, 1e6, &hp->yarn_ext);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.scaling.yarn_beta_fast", 1e-6, 1e6, &hp->yarn_beta_fast);
    if (rc == 0)
        rc = read_f64(g, arch, "rope.scaling.yarn_beta_slow", 1e-6, 1e6, &hp->yarn_beta_slow);
    if (rc == 0)
        rc = hparams_int(g, arch, "rope.scaling.original_context_length", true, 1, MAX_CTX, &hp->n_ctx_orig);
    if (rc < 0)
        return rc;

    if (factor != 0 && factor < 1e-3) /* no model shrinks positions; what is near 0 makes frequencies infinite */
        return err(ERR_FORMAT, "%s.rope.scaling.factor = %g: neither 0 (none) nor from 0.001", arch, factor);
    if (hp->yarn_ext < 0) /* -1: not said */
        hp->yarn_ext = 1.0;
    if (factor > 0)
        hp->rope_factor[0] = factor;
    if (strcmp(type.p, "none") == 0)
        hp->rope_factor[0] = 1.0;
    else if (strcmp(type.p, "yarn") == 0)
        hp->rope_yarn = true;
    else if (strcmp(type.p, "linear") != 0)
        return err(ERR_UNSUPPORTED, "%s = %.40s: ferry knows none, linear and yarn", key, type.p);
    return 0;
}

/* A group's score is that of its two best experts. As many groups as there are, or one, are none. */
static int read_groups(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    int n = 0, n_used = 0;
    int rc = hparams_int(g, arch, "expert_group_count", true, 0, hp->n_expert, &n);
    if (rc < 0 || n <= 1)
        return rc;
    if (n > DEVICE_MAX_EXPERT_GROUPS)
        return err(ERR_UNSUPPORTED, "%s.expert_group_count = %d: ferry chooses from %d groups at most", arch, n,
                   DEVICE_MAX_EXPERT_GROUPS);
    rc = hparams_int(g, arch, "expert_group_used_count", false, 1, n, &n_used);
    if (rc < 0 || n_used == n)
        return rc;
    if (hp->n_expert % n || hp->n_expert / n < 2 || hp->n_expert_used > hp->n_expert / n * n_used)
        return err(ERR_FORMAT, "%s: %d experts in %d groups, of which %d have %d to give", arch, hp->n_expert, n,
                   n_used, hp->n_expert_used);
    hp->n_group = n;
    hp->n_group_used = n_used;
    return 0;
}

static int read_experts(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    hp->route_scale = 1.0f;
    int rc = hparams_int(g, arch, "expert_count", true, 0, MAX_EXPERT, &hp->n_expert);
    if (rc < 0 || hp->n_expert == 0)
        return rc;
    rc = hparams_int(g, arch, "expert_used_count", false, 1, hp->n_expert, &hp->n_expert_used);
    if (rc == 0)
        rc = hparams_int(g, arch, "expert_feed_forward_length", true, 0, MAX_FF, &hp->n_ff_expert);
    if (rc == 0)
        rc = hparams_int(g, arch, "leading_dense_block_count", true, 0, hp->n_layer, &hp->n_dense_lead);
    if (rc == 0)
        rc = read_groups(g, m);
    if (rc == 0)
        rc = hparams_f32(g, arch, "expert_weights_scale", 0, 1e6, &hp->route_scale);
    if (hp->route_scale == 0)
        hp->route_scale = 1.0f;
    return rc;
}

int hparams_read(const struct gguf *g, struct model *m)
{
    struct hparams *hp = &m->hp;
    const char *arch = m->arch->name;
    hp->rope_neox = m->arch->rope_neox;
    hp->act = m->arch->act;
    hp->embd_scale = hp->logit_scale = hp->residual_scale = 1.0f;

    int rc = hparams_int(g, arch, "block_count", false, 1, MAX_LAYER, &hp->n_layer); /* all in the file */
    if (rc == 0)
        rc = hparams_int(g, arch, "nextn_predict_layers", true, 0, hp->n_layer - 1, &hp->n_nextn);
    hp->n_layer -= hp->n_nextn;
    if (rc == 0)
        rc = hparams_int(g, arch, "context_length", false, 1, MAX_CTX, &hp->n_ctx_train);
    if (rc == 0)
        rc = hparams_int(g, arch, "embedding_length", false, 1, MAX_EMBD, &hp->n_embd);
    hp->norm_eps = 1e-5f;
    if (rc == 0)
        rc = hparams_f32(g, arch, "attention.layer_norm_rms_epsilon", 0, 1, &hp->norm_eps);
    if (rc == 0)
        rc = read_layers(g, m);
    if (rc == 0)
        rc = read_heads(g, m);
    if (rc == 0)
        rc = read_rope(g, m);
    if (rc == 0)
        rc = read_experts(g, m);
    if (rc < 0)
        return rc;

    return m->arch->hparams ? m->arch->hparams(g, m) : 0;
}

int hparams_router(const struct gguf *g, struct model *m)
{
    const char *arch = m->arch->name;
    char key[96];
    int gating = 0;
    int rc = hparams_int(g, arch, "expert_gating_func", true, 0, 3, &gating);
    arch_key(key, sizeof key, arch, "expert_weights_norm");
    if (rc == 0)
        rc = gguf_opt_bool(g, key, &m->hp.route_normalize);
    /* GGUF: 1 softmax, 2 sigmoid, 3 softmax over the chosen ones' logits */
    if (gating)
        m->hp.route_fn = gating == 2 ? OP_ROUTE_SIGMOID : gating == 3 ? OP_ROUTE_SOFTMAX_TOPK : OP_ROUTE_SOFTMAX;
    return rc;
}

int hparams_router_sigmoid(const struct gguf *g, struct model *m)
{
    m->hp.route_fn = OP_ROUTE_SIGMOID;
    return hparams_router(g, m);
}

int hparams_gates_sum_to_1(const struct gguf *g, struct model *m)
{
    (void)g;
    m->hp.route_normalize = true;
    return 0;
}

int hparams_rope_alike(const struct gguf *g, struct model *m)
{
    m->hp.rope_base[1] = m->hp.rope_base[0];
    m->hp.rope_factor[1] = m->hp.rope_factor[0];
    return read_f64(g, m->arch->name, "rope.freq_base_swa", 1, 1e12, &m->hp.rope_base[1]);
}

int hparams_windows(const struct gguf *g, struct model *m, int default_window, int default_pattern)
{
    const char *arch = m->arch->name;
    int window = default_window, pattern = default_pattern;
    int rc = hparams_int(g, arch, "attention.sliding_window", true, 0, MAX_CTX, &window);
    if (rc < 0 || window == 0)
        return rc;

    char key[96];
    arch_key(key, sizeof key, arch, "attention.sliding_window_pattern");
    const struct gguf_key *k = gguf_find(g, key);
    struct gguf_array a = {0}; /* one truth value for each layer, as bool or as number */
    if (!k || k->type != GGUF_ARRAY) {
        rc = hparams_int(g, arch, "attention.sliding_window_pattern", true, 0, MAX_LAYER, &pattern);
    } else {
        rc = gguf_array(g, key, k->array.type == GGUF_BOOL ? GGUF_WANT_BOOL : GGUF_WANT_INT, &a);
        if (rc == 0 && a.n < (uint64_t)m->hp.n_layer)
            rc = err(ERR_FORMAT, "%s: %" PRIu64 " elements for %d layers", key, a.n, m->hp.n_layer);
    }
    for (int layer = 0; rc == 0 && layer < m->hp.n_layer; layer++) {
        bool windowed = pattern == 0 || layer % pattern < pattern - 1;
        if (a.n)
            windowed = a.type == GGUF_BOOL ? gguf_at_bool(&a, (uint64_t)layer) : gguf_at_i64(&a, (uint64_t)layer) != 0;
        m->layers[layer].window = windowed ? window : 0;
    }
    return rc;
}

static int read_delta_heads(const struct gguf *g, struct model *m)
{
    struct model_delta *d = &m->hp.delta;
    const char *arch = m->arch->name;
    int n_value = 0;
    int rc = hparams_int(g, arch, "ssm.conv_kernel", false, 2, DEVICE_MAX_CONV, &d->n_conv);
    if (rc == 0)
        rc = hparams_int(g, arch, "ssm.group_count", false, 1, MAX_HEAD, &d->n_head_k);
    if (rc == 0)
        rc = hparams_int(g, arch, "ssm.time_step_rank", false, 1, MAX_HEAD, &d->n_head_v);
    if (rc == 0)
        rc = hparams_int(g, arch, "ssm.state_size", false, 1, MAX_HEAD_DIM, &d->head_dim_k);
    if (rc == 0)
        rc = hparams_int(g, arch, "ssm.inner_size", false, 1, MAX_FF, &n_value);
    if (rc < 0)
        return rc;
    if (d->n_head_v % d->n_head_k || n_value % d->n_head_v || n_value / d->n_head_v > MAX_HEAD_DIM)
        return err(ERR_FORMAT,
                   "%s.ssm: %d values of %d heads, which share %d key heads: not evenly, or more than %d a head", arch,
                   n_value, d->n_head_v, d->n_head_k, MAX_HEAD_DIM);
    d->head_dim_v = n_value / d->n_head_v;
    return 0;
}

int hparams_delta(const struct gguf *g, struct model *m)
{
    char key[96];
    struct gguf_array a = {0};
    int interval = 4, n_attention = 0;
    int rc = read_delta_heads(g, m);
    if (rc == 0)
        rc = hparams_int(g, m->arch->name, "full_attention_interval", true, 1, MAX_LAYER, &interval);
    arch_key(key, sizeof key, m->arch->name, "attention.recurrent_layers");
    if (rc == 0 && gguf_find(g, key))
        rc = gguf_array(g, key, GGUF_WANT_BOOL, &a);
    if (rc == 0 && a.n && a.n < (uint64_t)m->hp.n_layer)
        rc = err(ERR_FORMAT, "%s: %" PRIu64 " elements for %d layers", key, a.n, m->hp.n_layer);
    for (int layer = 0; rc == 0 && layer < m->hp.n_layer; layer++) {
        struct model_layer *l = &m->layers[layer];
        l->is_recurrent = a.n ? gguf_at_bool(&a, (uint64_t)layer) : (layer + 1) % interval != 0;
        n_attention += !l->is_recurrent;
    }
    if (rc == 0 && n_attention == 0)
        rc = err(ERR_UNSUPPORTED, "all %d layers are recurrent: ferry's cache wants one with attention", m->hp.n_layer);
    return rc;
}

/* YaRN (arXiv 2309.00071): how much of the unscaled frequency dimension pair i keeps. */
static double yarn_keep(const struct hparams *hp, double base, int i)
{
    const double two_pi = 6.283185307179586;
    double scale = hp->n_rot / (2.0 * log(base));
    double low = floor(scale * log(hp->n_ctx_orig / (hp->yarn_beta_fast * two_pi)));
    double high = ceil(scale * log(hp->n_ctx_orig / (hp->yarn_beta_slow * two_pi)));
    low = fmax(low, 0.0);
    high = fmin(high, hp->n_rot - 1.0);
    double ramp = (i - low) / fmax(high - low, 0.001);
    return (1.0 - fmin(fmax(ramp, 0.0), 1.0)) * hp->yarn_ext;
}

int hparams_rope(struct model *m)
{
    const struct hparams *hp = &m->hp;
    bool used[2] = {false, false};
    for (int layer = 0; layer < hp->n_layer; layer++)
        used[m->layers[layer].window > 0] = true;
    for (int kind = 0; kind < 2; kind++) {
        if (!used[kind])
            continue;
        const int n = hp->n_rot / 2;
        double *freq = m->rope[kind].freq = mem_zalloc((size_t)n, sizeof *freq, MEM_META);
        if (!freq)
            return err(ERR_NOMEM, "%d rotary frequencies", n);
        const bool yarn = hp->rope_yarn && hp->rope_factor[kind] != 1.0;
        const double factor = hp->rope_factor[kind];
        for (int i = 0; i < n; i++) {
            double f = pow(hp->rope_base[kind], -2.0 * i / hp->n_rot);
            double keep = yarn ? yarn_keep(hp, hp->rope_base[kind], i) : 0.0;
            freq[i] = f / factor * (1.0 - keep) + f * keep;
        }
        const bool is_larger = yarn && hp->yarn_log_mul == 0;
        m->rope[kind].mscale = (float)(is_larger ? hp->yarn_attn * (1.0 + 0.1 * log(factor)) : hp->yarn_attn);
    }
    return 0;
}
