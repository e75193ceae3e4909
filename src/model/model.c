/* A model from a GGUF: which family, which weights play which role, and whether the set is whole. A tensor that the family
 * does not know is refused: running without it would give wrong words, not an error. */
#include "src/model/model.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/log.h"
#include "src/base/mem.h"
#include "src/model/arch.h"
#include "src/model/gguf.h"
#include "src/model/hparams.h"

enum dim {
    DIM_ONE,
    DIM_EMBD,
    DIM_VOCAB,
    DIM_Q,
    DIM_O,
    DIM_K,
    DIM_V,
    DIM_FF,
    DIM_FFX,
    DIM_FFS,
    DIM_EXP,
    DIM_ROT2,
    DIM_HEADS,
    DIM_LQ,
    DIM_LKV,
    DIM_LKR,
    DIM_NOPE,
    DIM_OV,
    DIM_ANY,
    DIM_QG,
    DIM_KERN,
    DIM_CONV,
    DIM_INNER,
    DIM_QKVZ,
    DIM_VH,
    DIM_VH2,
    DIM_VD
};

static const struct {
    const char *name;
    enum dim dim[3];
} roles[ROLE_N] = {
#define ROLE(NAME, text, a, b, c) [ROLE_##NAME] = {text, {DIM_##a, DIM_##b, DIM_##c}},
#include "src/model/roles.def"
#undef ROLE
};

/* Some files keep gate and up of the experts in one stack, gate's rows first. */
static const char gate_up_name[] = "blk.%d.ffn_gate_up_exps.weight";

/* Some keep queries, keys and values in one matrix. */
static const char qkv_name[] = "blk.%d.attn_qkv.weight";

/* The layer's number at p: of at most six digits, none a 0 in front. Returns what stands behind it, or NULL. */
static const char *read_layer(const char *p, int *layer)
{
    const char *begin = p;
    int v = 0;
    for (; *p >= '0' && *p <= '9' && p < begin + 6; p++)
        v = v * 10 + (*p - '0');
    if (p == begin || (p > begin + 1 && *begin == '0'))
        return NULL;
    *layer = v;
    return p;
}

/* Does name match pattern, in which "%d" is the layer? *layer is -1 for a pattern without. */
static bool match_name(const char *name, const char *pattern, int *layer)
{
    *layer = -1;
    const char *hole = strstr(pattern, "%d");
    if (!hole)
        return strcmp(name, pattern) == 0;
    size_t n = (size_t)(hole - pattern);
    if (strncmp(name, pattern, n) != 0)
        return false;
    const char *rest = read_layer(name + n, layer);
    return rest && strcmp(rest, hole + 2) == 0;
}

static bool has_role(const struct arch_op *ops, int n_ops, enum role role)
{
    for (int i = 0; i < n_ops; i++)
        for (int j = 0; j < OP_MAX_IO; j++)
            if (ops[i].w[j] == role)
                return true;
    return false;
}

static bool arch_uses(const struct arch *arch, enum role role)
{
    switch (role) {
    case ROLE_TOKEN_EMBD:
    case ROLE_OUTPUT_NORM:
    case ROLE_OUTPUT:
    case ROLE_OUTPUT_BIAS:
    case ROLE_ROPE_FREQS:
        return true;
    default:
        break;
    }
    return has_role(arch->layer, arch->n_layer_ops, role) || has_role(arch->recurrent, arch->n_recurrent_ops, role);
}

/* Where a dimension that metadata may leave out is remembered: the first weight that shows it tells. NULL: not such a one. */
static int64_t *learned_dim(enum dim dim, int64_t *learn)
{
    return dim == DIM_VOCAB ? &learn[0] : dim == DIM_FFX ? &learn[1] : dim == DIM_FFS ? &learn[2] : NULL;
}

static int64_t delta_dim(const struct model_delta *d, enum dim dim)
{
    const int64_t keys = (int64_t)d->n_head_k * d->head_dim_k, values = (int64_t)d->n_head_v * d->head_dim_v;

    switch (dim) {
    case DIM_KERN:
        return d->n_conv;
    case DIM_CONV:
        return 2 * keys + values;
    case DIM_INNER:
        return values;
    case DIM_QKVZ:
        return 2 * (keys + values);
    case DIM_VH:
        return d->n_head_v;
    case DIM_VH2:
        return 2 * (int64_t)d->n_head_v;
    case DIM_VD:
        return d->head_dim_v;
    default:
        return 0;
    }
}

static int64_t fixed_dim(const struct model *m, const struct model_layer *l, enum dim dim)
{
    const struct hparams *hp = &m->hp;
    switch (dim) {
    case DIM_ONE:
        return 1;
    case DIM_EMBD:
        return hp->n_embd;
    case DIM_Q:
        return (int64_t)l->n_head * hp->q_dim;
    case DIM_O:
        return (int64_t)l->n_head * hp->o_dim;
    case DIM_K:
        return (int64_t)l->n_head_kv * hp->head_dim_k;
    case DIM_V:
        return (int64_t)l->n_head_kv * hp->head_dim_v;
    case DIM_FF:
        return l->n_ff;
    case DIM_EXP:
        return hp->n_expert;
    case DIM_ROT2:
        return hp->n_rot / 2;
    case DIM_HEADS:
        return l->n_head;
    case DIM_LQ:
        return hp->n_lora_q;
    case DIM_LKV:
        return hp->n_lora_kv;
    case DIM_LKR:
        return hp->n_lora_kv + hp->n_rot;
    case DIM_NOPE:
        return hp->q_dim - hp->n_rot;
    case DIM_OV:
        return hp->o_dim;
    case DIM_QG:
        return 2 * (int64_t)l->n_head * hp->head_dim_k;
    default:
        return delta_dim(&hp->delta, dim);
    }
}

/* A vector for each expert. */
static bool is_expert_bias(enum role role)
{
    return role == ROLE_EXPERT_GATE_BIAS || role == ROLE_EXPERT_UP_BIAS || role == ROLE_EXPERT_DOWN_BIAS;
}

static int check_shape(struct model *m, const struct weight *w, int64_t *learn)
{
    const struct model_layer *l = w->layer >= 0 ? &m->layers[w->layer] : NULL;
    for (int d = 0; d < 3; d++) {
        enum dim dim = roles[w->role].dim[d];
        int64_t *known = learned_dim(dim, learn);
        if (known && *known == 0)
            *known = w->t.ne[d];
        int64_t want = known ? *known : fixed_dim(m, l, dim);
        if (w->t.ne[d] > INT32_MAX)
            return err(ERR_FORMAT, "tensor %s is %" PRId64 " x %" PRId64 " x %" PRId64 "; dimension %d is beyond %d",
                       w->name, w->t.ne[0], w->t.ne[1], w->t.ne[2], d, INT32_MAX);
        if (dim != DIM_ANY && w->t.ne[d] != want)
            return err(ERR_FORMAT,
                       "tensor %s is %" PRId64 " x %" PRId64 " x %" PRId64 "; dimension %d should be %" PRId64, w->name,
                       w->t.ne[0], w->t.ne[1], w->t.ne[2], d, want);
    }
    if (w->t.ne[3] != 1)
        return err(ERR_FORMAT, "tensor %s has a fourth dimension of %" PRId64, w->name, w->t.ne[3]);
    /* vectors are added and multiplied in place: files keep them as floats */
    bool vector = roles[w->role].dim[1] == DIM_ONE && w->role != ROLE_SHARED_ROUTER;
    if ((vector || is_expert_bias(w->role) || w->role == ROLE_DELTA_CONV) && w->t.type != QUANT_F32)
        return err(ERR_UNSUPPORTED, "tensor %s is %s; a vector has to be F32", w->name, quant_info(w->t.type)->name);
    if (quant_info(w->t.type)->act == QUANT_ACT_NONE)
        return err(ERR_UNSUPPORTED, "tensor %s is %s, which is no type of a weight", w->name,
                   quant_info(w->t.type)->name);
    return 0;
}

static int add_weight(struct model *m, const struct weight *w, int64_t *learn)
{
    if (w->layer >= m->hp.n_layer)
        return err(ERR_FORMAT, "tensor %s: there are %d layers", w->name, m->hp.n_layer);
    int rc = check_shape(m, w, learn);
    if (rc < 0)
        return rc;
    int *slot = w->layer >= 0 ? &m->layers[w->layer].w[w->role] : &m->w[w->role];
    if (*slot >= 0)
        return err(ERR_FORMAT, "tensor %s: %s plays the same part", w->name, m->weights[*slot].name);
    *slot = m->n_weights;
    m->weights[m->n_weights++] = *w;
    uint64_t bytes = w->t.stride[1] * (uint64_t)w->t.ne[1] * (uint64_t)w->t.ne[2];
    *(w->is_expert ? &m->expert_bytes : &m->dense_bytes) += bytes;
    return 0;
}

static struct weight weight_of(const struct gguf_tensor *t, enum role role, int layer)
{
    struct weight w = {.role = role, .layer = layer, .file = t->file, .off = t->off};
    snprintf(w.name, sizeof w.name, "%s", t->name);
    w.t = tensor_make(t->type, t->ne[0], t->ne[1], t->ne[2], NULL);
    w.t.ne[3] = t->ne[3];
    w.is_expert = roles[role].dim[2] == DIM_EXP;
    return w;
}

/* One stack of gate and up: two weights, each a view of half of every matrix's rows. */
static int add_gate_up(struct model *m, const struct gguf_tensor *t, int layer, int64_t *learn)
{
    if (t->ne[1] % 2)
        return err(ERR_FORMAT, "tensor %s: %" PRId64 " rows are not gate and up", t->name, t->ne[1]);
    struct weight gate = weight_of(t, ROLE_EXPERT_GATE, layer);
    gate.t.ne[1] /= 2;
    struct weight up = gate;
    up.role = ROLE_EXPERT_UP;
    up.off += (uint64_t)gate.t.ne[1] * gate.t.stride[1];
    int rc = add_weight(m, &gate, learn);
    return rc < 0 ? rc : add_weight(m, &up, learn);
}

/* Queries, keys and values in one matrix: three weights, each a view of its rows. */
static int add_qkv(struct model *m, const struct gguf_tensor *t, int layer, int64_t *learn)
{
    static const enum role parts[3] = {ROLE_ATTN_Q, ROLE_ATTN_K, ROLE_ATTN_V};
    if (layer >= m->hp.n_layer)
        return err(ERR_FORMAT, "tensor %s: there are %d layers", t->name, m->hp.n_layer);
    const struct model_layer *l = &m->layers[layer];
    const int64_t n[3] = {fixed_dim(m, l, DIM_Q), fixed_dim(m, l, DIM_K), fixed_dim(m, l, DIM_V)};
    if (t->ne[1] != n[0] + n[1] + n[2])
        return err(ERR_FORMAT,
                   "tensor %s has %" PRId64 " rows; queries, keys and values are %" PRId64 ", %" PRId64 " and %" PRId64,
                   t->name, t->ne[1], n[0], n[1], n[2]);
    struct weight w = weight_of(t, parts[0], layer);
    for (int i = 0; i < 3; i++) {
        w.role = parts[i];
        w.t.ne[1] = n[i];
        int rc = add_weight(m, &w, learn);
        if (rc < 0)
            return rc;
        w.off += (uint64_t)n[i] * w.t.stride[1];
    }
    return 0;
}

/* One matrix of keys and values: for each head rows of keys, then rows of values. Two weights, each a matrix a head. */
static int add_kv_b(struct model *m, const struct gguf_tensor *t, int layer, int64_t *learn)
{
    if (layer >= m->hp.n_layer)
        return err(ERR_FORMAT, "tensor %s: there are %d layers", t->name, m->hp.n_layer);
    const int64_t n_head = m->layers[layer].n_head, n_k = m->hp.q_dim - m->hp.n_rot, n_v = m->hp.o_dim;
    if (t->ne[1] != n_head * (n_k + n_v) || t->ne[2] != 1)
        return err(ERR_FORMAT,
                   "tensor %s is %" PRId64 " x %" PRId64 " x %" PRId64 "; %" PRId64 " heads have %" PRId64
                   " rows of keys and %" PRId64 " of values each",
                   t->name, t->ne[0], t->ne[1], t->ne[2], n_head, n_k, n_v);
    struct weight k = weight_of(t, ROLE_ATTN_KV_B_K, layer);
    k.t.stride[2] = (uint64_t)(n_k + n_v) * k.t.stride[1];
    k.t.stride[3] = (uint64_t)n_head * k.t.stride[2];
    k.t.ne[2] = n_head;
    struct weight v = k;
    k.t.ne[1] = n_k;
    v.t.ne[1] = n_v;
    v.role = ROLE_ATTN_KV_B_V;
    v.off += (uint64_t)n_k * k.t.stride[1];
    int rc = add_weight(m, &k, learn);
    return rc < 0 ? rc : add_weight(m, &v, learn);
}

/* Of latent attention, metadata say in which form a file has queries, keys and values; what is of the other one is refused. */
static int check_form(const struct model *m, const char *name, enum role role)
{
    const struct hparams *hp = &m->hp;
    bool is_by_head = role == ROLE_ATTN_K_B || role == ROLE_ATTN_V_B, is_in_one = role == ROLE_ATTN_KV_B_K;

    if (role == ROLE_ATTN_Q && hp->n_lora_q)
        return err(ERR_FORMAT, "tensor %s: queries are said to be compressed to %d values", name, hp->n_lora_q);
    if (hp->kv_is_latent ? is_in_one : is_by_head)
        return err(ERR_FORMAT, "tensor %s: heads with keys of %d and values of %d want the other form of it", name,
                   hp->head_dim_k, hp->head_dim_v);
    return 0;
}

/* Is it of a layer behind the model's last one? Whatever such a layer holds, it guesses tokens that the model then gives itself. */
static bool is_of_nextn(const struct model *m, const char *name)
{
    int layer = -1;
    const char *rest = strncmp(name, "blk.", 4) == 0 ? read_layer(name + 4, &layer) : NULL;
    return rest && *rest == '.' && layer >= m->hp.n_layer && layer < m->hp.n_layer + m->hp.n_nextn;
}

/* Tensors that text can be made without: a reranker's classifier, the calibration of activations for 4-bit float hardware,
 * and scales of products in families whose reference programs leave them out, too. */
static bool is_ignored(const char *name)
{
    const char *dot = strrchr(name, '.');
    if (strncmp(name, "cls.", 4) == 0 || (dot && strcmp(dot, ".input_scale") == 0))
        return true;
    if (!dot || strcmp(dot, ".scale") != 0)
        return false;
    log_warn("tensor %s is not used by this family", name);
    return true;
}

static int add_tensor(struct model *m, const struct gguf_tensor *t, int64_t *learn)
{
    int layer;
    if (is_of_nextn(m, t->name))
        return 0;
    for (int role = ROLE_NONE + 1; role < ROLE_N; role++)
        if (match_name(t->name, roles[role].name, &layer) && arch_uses(m->arch, role)) {
            int rc = m->hp.n_lora_kv ? check_form(m, t->name, role) : 0;
            if (rc < 0 || role == ROLE_ATTN_KV_B_K)
                return rc < 0 ? rc : add_kv_b(m, t, layer, learn);
            struct weight w = weight_of(t, role, layer);
            return add_weight(m, &w, learn);
        }
    if (match_name(t->name, qkv_name, &layer) && arch_uses(m->arch, ROLE_ATTN_Q) && arch_uses(m->arch, ROLE_ATTN_K))
        return add_qkv(m, t, layer, learn);
    if (match_name(t->name, gate_up_name, &layer) && arch_uses(m->arch, ROLE_EXPERT_GATE))
        return add_gate_up(m, t, layer, learn);
    if (is_ignored(t->name))
        return 0;
    return err(ERR_UNSUPPORTED, "tensor %s: not part of a %s model as ferry knows it", t->name, m->arch->name);
}

static int need(const struct model *m, int layer, const enum role *list)
{
    for (; *list != ROLE_NONE; list++)
        if (m->layers[layer].w[*list] < 0) {
            char name[64];
            snprintf(name, sizeof name, roles[*list].name, layer);
            return err(ERR_FORMAT, "tensor %s is missing from a %s model", name, m->arch->name);
        }
    return 0;
}

/* Latent attention: queries, keys and values in the form that metadata say. */
static int check_latent(const struct model *m, int layer)
{
    static const enum role q_ranked[] = {ROLE_ATTN_Q_A, ROLE_ATTN_Q_A_NORM, ROLE_ATTN_Q_B, ROLE_NONE},
                           q_plain[] = {ROLE_ATTN_Q, ROLE_NONE};
    static const enum role by_head[] = {ROLE_ATTN_K_B, ROLE_ATTN_V_B, ROLE_NONE},
                           in_one[] = {ROLE_ATTN_KV_B_K, ROLE_ATTN_KV_B_V, ROLE_NONE};
    int rc = need(m, layer, m->hp.n_lora_q ? q_ranked : q_plain);

    return rc < 0 ? rc : need(m, layer, m->hp.kv_is_latent ? by_head : in_one);
}

/* Older files have all projections of a key head side by side. */
static int check_recurrent(const struct model *m, int layer)
{
    static const enum role apart[] = {ROLE_DELTA_QKV, ROLE_DELTA_Z, ROLE_NONE};
    const int *w = m->layers[layer].w;
    int rc = need(m, layer, m->arch->required_recurrent);

    if (w[ROLE_ATTN_K] >= 0 || (w[ROLE_DELTA_QKVZ] >= 0 && w[ROLE_DELTA_QKV] >= 0))
        return err(ERR_FORMAT, "tensor %s in layer %d, which %s",
                   m->weights[w[w[ROLE_ATTN_K] >= 0 ? ROLE_ATTN_K : ROLE_DELTA_QKV]].name, layer,
                   w[ROLE_ATTN_K] >= 0 ? "is recurrent" : "has ssm_in");
    return rc == 0 && w[ROLE_DELTA_QKVZ] < 0 ? need(m, layer, apart) : rc;
}

static int check_layer(const struct model *m, int layer)
{
    static const enum role shared[] = {ROLE_SHARED_GATE, ROLE_SHARED_UP, ROLE_SHARED_DOWN, ROLE_NONE};
    const struct arch *arch = m->arch;
    const int *w = m->layers[layer].w;
    int rc = m->layers[layer].is_recurrent ? check_recurrent(m, layer) : need(m, layer, arch->required);
    if (rc == 0 && (w[ROLE_SHARED_GATE] >= 0 || w[ROLE_SHARED_UP] >= 0 || w[ROLE_SHARED_DOWN] >= 0))
        rc = need(m, layer, shared);
    if (rc == 0 && m->hp.n_lora_kv)
        rc = check_latent(m, layer);
    if (rc < 0)
        return rc;
    const bool has_experts =
        w[ROLE_ROUTER] >= 0 || w[ROLE_EXPERT_GATE] >= 0 || w[ROLE_EXPERT_UP] >= 0 || w[ROLE_EXPERT_DOWN] >= 0;
    if (has_experts && layer < m->hp.n_dense_lead)
        return err(ERR_FORMAT, "layer %d has experts, but the first %d layers are said to be dense", layer,
                   m->hp.n_dense_lead);
    const enum role *list = has_experts || !arch->ffn_dense ? arch->ffn_moe : arch->ffn_dense;
    if (!list)
        return err(ERR_FORMAT, "layer %d has experts, which a %s model cannot have", layer, arch->name);
    if (has_experts && m->hp.n_expert == 0)
        return err(ERR_FORMAT, "layer %d has experts, but %s.expert_count is missing", layer, arch->name);
    return need(m, layer, list);
}

static int bind_weights(struct model *m)
{
    const int n = gguf_n_tensors(m->gguf);
    if (n == 0)
        return err(ERR_FORMAT, "%s holds a vocabulary but no weights", m->path);
    m->weights = mem_zalloc((size_t)n * 3, sizeof *m->weights, MEM_META); /* of one tensor up to three */
    if (!m->weights)
        return err(ERR_NOMEM, "%d weights", n);
    int64_t learn[3] = {0, m->hp.n_ff_expert, m->hp.n_ff_shared};
    int rc = 0;
    for (int i = 0; rc == 0 && i < n; i++)
        rc = add_tensor(m, gguf_tensor(m->gguf, i), learn);
    for (int layer = 0; rc == 0 && layer < m->hp.n_layer; layer++)
        rc = check_layer(m, layer);
    if (rc < 0)
        return rc;
    if (m->w[ROLE_TOKEN_EMBD] < 0 || m->w[ROLE_OUTPUT_NORM] < 0)
        return err(ERR_FORMAT, "tensor %s is missing",
                   roles[m->w[ROLE_TOKEN_EMBD] < 0 ? ROLE_TOKEN_EMBD : ROLE_OUTPUT_NORM].name);
    if (m->w[ROLE_OUTPUT] < 0) /* tied embeddings */
        m->w[ROLE_OUTPUT] = m->w[ROLE_TOKEN_EMBD];
    m->hp.n_vocab = (int)learn[0];
    m->hp.n_ff_expert = (int)learn[1];
    m->hp.n_ff_shared = (int)learn[2];
    return 0;
}

static int find_arch(struct model *m)
{
    struct gguf_str name;
    int rc = gguf_str(m->gguf, "general.architecture", &name);
    if (rc < 0)
        return rc;
    m->arch = arch_find(name.p);
    if (m->arch)
        return 0;
    char known[512] = "";
    size_t n = 0;
    for (const struct arch *const *a = arch_all(); *a && n < sizeof known; a++)
        n += (size_t)snprintf(known + n, sizeof known - n, "%s%s", n ? ", " : "", (*a)->name);
    return err(ERR_UNSUPPORTED, "%s: architecture %.60s is not known; ferry runs %s", m->path, name.p, known);
}

static int set_name(struct model *m)
{
    const char *slash = strrchr(m->path, '/');
    const char *base = slash ? slash + 1 : m->path;
    struct gguf_str name = {base, strlen(base)};
    int rc = gguf_opt_str(m->gguf, "general.name", &name);
    if (rc < 0)
        return rc;
    m->name = mem_strdup(name.p, MEM_META);
    return m->name ? 0 : err(ERR_NOMEM, "the model's name");
}

typedef int open_gguf(const char *path, const struct file_ops *ops, struct gguf **out);

static int open_by(open_gguf *open, const char *path, const struct file_ops *ops, struct model **out)
{
    *out = NULL;
    struct model *m = mem_zalloc(1, sizeof *m, MEM_META);
    if (!m)
        return err(ERR_NOMEM, "a model");
    for (int role = 0; role < ROLE_N; role++)
        m->w[role] = -1;
    int rc = 0;
    m->path = mem_strdup(path, MEM_META);
    if (!m->path)
        rc = err(ERR_NOMEM, "a path of %zu bytes", strlen(path));
    if (rc == 0)
        rc = open(path, ops, &m->gguf);
    if (rc == 0)
        rc = find_arch(m);
    if (rc == 0)
        rc = set_name(m);
    if (rc == 0)
        rc = hparams_read(m->gguf, m);
    if (rc == 0)
        rc = bind_weights(m);
    if (rc == 0)
        rc = hparams_rope(m);
    if (rc < 0) {
        model_close(m);
        return rc;
    }
    m->identity = gguf_identity(m->gguf);
    *out = m;
    return 0;
}

int model_open(const char *path, const struct file_ops *ops, struct model **out)
{
    return open_by(gguf_open, path, ops, out);
}

int model_open_head(const char *path, const struct file_ops *ops, struct model **out)
{
    return open_by(gguf_open_head, path, ops, out);
}

void model_close(struct model *m)
{
    if (!m)
        return;
    mem_free(m->rope[1].freq);
    mem_free(m->rope[0].freq);
    mem_free(m->weights);
    mem_free(m->layers);
    mem_free(m->name);
    gguf_close(m->gguf);
    mem_free(m->path);
    mem_free(m);
}

const char *model_arch(const struct model *m)
{
    return m->arch->name;
}

void model_rope_factors(struct model *m, const float *factors)
{
    for (int i = 0; m->rope[0].freq && i < m->hp.n_rot / 2; i++)
        m->rope[0].freq[i] /= (double)factors[i];
}

static uint64_t matrix_bytes(const struct model *m, int w)
{
    return w < 0 ? 0 : model_matrix_bytes(&m->weights[w]);
}

int model_router_norm(const struct model *m, int layer)
{
    const int *w = m->layers[layer].w;
    return w[ROLE_FFN_NORM] >= 0 ? w[ROLE_FFN_NORM] : w[ROLE_ATTN_POST_NORM];
}

uint64_t model_expert_bytes(const struct model *m, int layer)
{
    const int *w = m->layers[layer].w;
    return matrix_bytes(m, w[ROLE_EXPERT_GATE]) + matrix_bytes(m, w[ROLE_EXPERT_UP]) +
           matrix_bytes(m, w[ROLE_EXPERT_DOWN]);
}

bool model_span_has(const struct model *m, struct model_span span, int weight)
{
    const struct weight *w = &m->weights[weight];
    bool has_begin = span.first == 0 && span.end > 0, has_end = span.end == m->hp.n_layer;

    if (w->layer >= 0)
        return w->layer >= span.first && w->layer < span.end;
    if (w->role == ROLE_TOKEN_EMBD)
        return has_begin || (has_end && weight == m->w[ROLE_OUTPUT]);
    return w->role == ROLE_ROPE_FREQS ? has_begin : has_end;
}

uint64_t model_decode_bytes(const struct model *m, struct model_span span)
{
    const int embd = m->w[ROLE_TOKEN_EMBD];
    bool multiplies = span.end == m->hp.n_layer && m->w[ROLE_OUTPUT] == embd;
    uint64_t bytes = 0;

    for (int i = 0; i < m->n_weights; i++)
        if (!m->weights[i].is_expert && model_span_has(m, span, i) && (i != embd || multiplies))
            bytes += is_expert_bias(m->weights[i].role)
                         ? matrix_bytes(m, i) / (uint64_t)m->hp.n_expert * (uint64_t)m->hp.n_expert_used
                         : matrix_bytes(m, i) * (uint64_t)m->weights[i].t.ne[2];
    for (int layer = span.first; layer < span.end; layer++)
        bytes += (uint64_t)m->hp.n_expert_used * model_expert_bytes(m, layer);
    return bytes;
}
