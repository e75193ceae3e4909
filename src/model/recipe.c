/* The table of file types and the rules of their mixtures. They are llama.cpp's, so that a file of that name is what its users
 * expect: the same types in the same places. */
#include "src/model/recipe.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* name, mix, type, general.file_type as llama.h numbers them. */
static const struct recipe recipes[] = {
    {"Q2_K", RECIPE_Q2_K, QUANT_Q2_K, 10, "smallest; Q3_K for values and outputs"},
    {"Q2_K_S", RECIPE_Q2_K_S, QUANT_Q2_K, 21, "smaller still; wants --imatrix"},
    {"Q3_K_S", RECIPE_Q3_K_S, QUANT_Q3_K, 11, "3 bits throughout"},
    {"Q3_K_M", RECIPE_Q3_K_M, QUANT_Q3_K, 12, "3 bits, 4 and 5 where it matters"},
    {"Q3_K_L", RECIPE_Q3_K_L, QUANT_Q3_K, 13, "3 bits, 5 where it matters"},
    {"IQ4_XS", RECIPE_IQ4_XS, QUANT_IQ4_XS, 30, "4 bits, uneven levels"},
    {"IQ4_NL", RECIPE_IQ4_NL, QUANT_IQ4_NL, 25, "4 bits, uneven levels, blocks of 32"},
    {"Q4_0", RECIPE_Q4_0, QUANT_Q4_0, 2, "4 bits, the plain form"},
    {"Q4_1", RECIPE_Q4_1, QUANT_Q4_1, 3, "4 bits and a minimum"},
    {"Q4_K_S", RECIPE_Q4_K_S, QUANT_Q4_K, 14, "4 bits, 5 in the first layers"},
    {"Q4_K_M", RECIPE_Q4_K_M, QUANT_Q4_K, 15, "4 bits, 6 where it matters: what most people take"},
    {"Q5_0", RECIPE_Q5_0, QUANT_Q5_0, 8, "5 bits, the plain form"},
    {"Q5_1", RECIPE_Q5_1, QUANT_Q5_1, 9, "5 bits and a minimum"},
    {"Q5_K_S", RECIPE_Q5_K_S, QUANT_Q5_K, 16, "5 bits"},
    {"Q5_K_M", RECIPE_Q5_K_M, QUANT_Q5_K, 17, "5 bits, 6 where it matters"},
    {"Q6_K", RECIPE_Q6_K, QUANT_Q6_K, 18, "6 bits: hardly to be told from 16"},
    {"Q8_0", RECIPE_Q8_0, QUANT_Q8_0, 7, "8 bits"},
    {"MXFP4", RECIPE_MXFP4, QUANT_MXFP4, 38, "4-bit floats for all matrices, 8 bits for the vocabulary's"},
    {"MXFP4_MOE", RECIPE_MXFP4_MOE, QUANT_MXFP4, 38, "4-bit floats for experts, 8 bits for the rest"},
    {"F16", RECIPE_F16, QUANT_F16, 1, "halves"},
    {"BF16", RECIPE_BF16, QUANT_BF16, 32, "bfloat16"},
    {"F32", RECIPE_F32, QUANT_F32, 0, "floats"},
    {"Q3_K", RECIPE_Q3_K_M, QUANT_Q3_K, 12, "Q3_K_M"},
    {"Q4_K", RECIPE_Q4_K_M, QUANT_Q4_K, 15, "Q4_K_M"},
    {"Q5_K", RECIPE_Q5_K_M, QUANT_Q5_K, 17, "Q5_K_M"},
};
#define N_RECIPES ((int)(sizeof recipes / sizeof recipes[0]))

const struct recipe *recipe_at(int i)
{
    return i >= 0 && i < N_RECIPES ? &recipes[i] : NULL;
}

const struct recipe *recipe_find(const char *name)
{
    for (int i = 0; i < N_RECIPES; i++)
        if (!strcasecmp(recipes[i].name, name))
            return &recipes[i];
    return NULL;
}

/* ---- what a tensor is, by its name ---- */

enum part { OTHER, EMBEDDING, OUTPUT, ATTN_V, ATTN_K, ATTN_OUTPUT, ATTN_QKV, FFN_DOWN };

static enum part part_of(const char *name)
{
    static const struct {
        const char *text;
        enum part part;
    } rows[] = {
        {"attn_qkv.weight", ATTN_QKV}, {"attn_kv_b.weight", ATTN_V},        {"attn_v.weight", ATTN_V},
        {"attn_k.weight", ATTN_K},     {"attn_output.weight", ATTN_OUTPUT}, {"ffn_down", FFN_DOWN},
    };

    if (!strcmp(name, "output.weight"))
        return OUTPUT;
    if (!strcmp(name, "token_embd.weight") || !strcmp(name, "per_layer_token_embd.weight"))
        return EMBEDDING;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (strstr(name, rows[i].text))
            return rows[i].part;
    return OTHER;
}

/* Small, or what rounding would spoil: routers, positions, convolutions, decay rates, pictures' and sounds' odd ends. */
static const char *const kept[] = {
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "position_embd.weight",
    "token_types.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
};

static bool is_matrix(const struct gguf_tensor *t)
{
    static const char end[] = "weight";
    size_t n = strlen(t->name), n_end = sizeof end - 1;
    int n_dims = 4;

    while (n_dims > 1 && t->ne[n_dims - 1] == 1)
        n_dims--;
    if (n_dims < 2 || n < n_end || strcmp(t->name + n - n_end, end) != 0 || !quant_info((int)t->type)->to_float)
        return false;
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
        if (strstr(t->name, kept[i]))
            return false;
    return true;
}

/* ---- mixtures ---- */

struct mixer {
    const struct recipe *recipe;
    struct recipe_options options;
    uint64_t n_layers, n_experts, n_gqa;
    bool is_tied, is_llama_70b;
    int n_v, i_v, i_down; /* how many tensors of the kind there are, and were before this one */
};

/* The first and the last eighth, and every third layer between. */
static bool use_more_bits(int layer, int n_layers)
{
    return layer < n_layers / 8 || layer >= 7 * n_layers / 8 || (layer - n_layers / 8) % 3 == 2;
}

static enum quant_type type_of_vocabulary(const struct mixer *m, const struct gguf_tensor *t)
{
    enum quant_type type = m->recipe->type;

    if (m->recipe->mix == RECIPE_MXFP4 || m->recipe->mix == RECIPE_MXFP4_MOE ||
        t->ne[0] % quant_info((int)type)->block_len)
        return QUANT_Q8_0;
    return type == QUANT_Q8_0 ? type : QUANT_Q6_K;
}

static enum quant_type type_of_v(struct mixer *m)
{
    enum quant_type type = m->recipe->type;
    enum recipe_mix mix = m->recipe->mix;
    bool is_shared = m->n_gqa >= 4; /* few keys and values: more bits for them cost little */
    int i = m->i_v++;

    if (mix == RECIPE_Q2_K)
        type = is_shared ? QUANT_Q4_K : QUANT_Q3_K;
    else if (mix == RECIPE_Q2_K_S && is_shared)
        type = QUANT_Q4_K;
    else if (mix == RECIPE_Q3_K_M)
        type = i < 2 ? QUANT_Q5_K : QUANT_Q4_K;
    else if (mix == RECIPE_Q3_K_L)
        type = QUANT_Q5_K;
    else if ((mix == RECIPE_IQ4_NL || mix == RECIPE_IQ4_XS) && is_shared)
        type = QUANT_Q5_K;
    else if ((mix == RECIPE_Q4_K_M || mix == RECIPE_Q5_K_M) && use_more_bits(i, m->n_v))
        type = QUANT_Q6_K;
    else if (mix == RECIPE_Q4_K_S && i < 4)
        type = QUANT_Q5_K;
    if (m->is_llama_70b && (type == QUANT_Q3_K || type == QUANT_Q4_K))
        type = QUANT_Q5_K;
    return m->n_experts == 8 ? QUANT_Q8_0 : type;
}

static enum quant_type type_of_down(struct mixer *m, int layer)
{
    enum quant_type type = m->recipe->type;
    int n = (int)m->n_layers, i = m->n_experts > 1 && layer >= 0 ? layer : m->i_down;
    bool is_early = i < n / 8;

    m->i_down++;
    switch (m->recipe->mix) {
    case RECIPE_Q2_K:
        return QUANT_Q3_K;
    case RECIPE_Q2_K_S:
        return is_early ? QUANT_Q4_K : type;
    case RECIPE_Q3_K_M:
        return i < n / 16 ? QUANT_Q5_K : QUANT_Q4_K;
    case RECIPE_Q3_K_L:
        return QUANT_Q5_K;
    case RECIPE_Q4_K_M:
    case RECIPE_Q5_K_M:
        return use_more_bits(i, n) ? QUANT_Q6_K : type;
    case RECIPE_Q4_K_S:
        return is_early ? QUANT_Q5_K : type;
    case RECIPE_IQ4_NL:
    case RECIPE_IQ4_XS:
        return is_early && !m->options.has_imatrix ? QUANT_Q5_K : type;
    case RECIPE_Q4_0:
        return is_early && m->options.has_imatrix ? QUANT_Q4_1 : type;
    case RECIPE_Q5_0:
        return is_early && m->options.has_imatrix ? QUANT_Q5_1 : type;
    default:
        return type;
    }
}

static enum quant_type type_of_attn_output(const struct mixer *m)
{
    enum quant_type type = m->recipe->type;
    enum recipe_mix mix = m->recipe->mix;

    if (m->n_experts == 8) {
        bool is_small = type == QUANT_Q2_K || type == QUANT_Q3_K || type == QUANT_Q4_K || type == QUANT_IQ4_NL ||
                        type == QUANT_IQ4_XS;
        return is_small && mix != RECIPE_Q3_K_L && mix != RECIPE_Q2_K_S ? QUANT_Q5_K : type;
    }
    return mix == RECIPE_Q2_K     ? QUANT_Q3_K
           : mix == RECIPE_Q3_K_M ? QUANT_Q4_K
           : mix == RECIPE_Q3_K_L ? QUANT_Q5_K
                                  : type;
}

static enum quant_type mixed(struct mixer *m, const struct gguf_tensor *t, int layer)
{
    enum part part = part_of(t->name);

    if (part == OUTPUT || (part == EMBEDDING && m->is_tied))
        return type_of_vocabulary(m, t);
    if (m->recipe->mix == RECIPE_MXFP4_MOE)
        return strstr(t->name, "_exps.") ? QUANT_MXFP4 : QUANT_Q8_0;
    if (m->recipe->mix == RECIPE_MXFP4)
        return part == EMBEDDING ? QUANT_Q8_0 : QUANT_MXFP4;
    switch (part) {
    case ATTN_V:
    case ATTN_QKV:
        return type_of_v(m);
    case ATTN_K:
        return m->n_experts == 8 ? QUANT_Q8_0 : m->recipe->type;
    case FFN_DOWN:
        return type_of_down(m, layer);
    case ATTN_OUTPUT:
        return type_of_attn_output(m);
    default:
        return m->recipe->type;
    }
}

/* A type whose blocks divide the row: of about as many bits, in blocks of 32; a row that even those do not divide stays
 * in halves. */
static enum quant_type fitting(enum quant_type type, int64_t n_columns)
{
    if (n_columns % quant_info((int)type)->block_len == 0)
        return type;
    switch (type) {
    case QUANT_IQ4_XS:
        type = QUANT_IQ4_NL;
        break;
    case QUANT_Q2_K:
    case QUANT_Q3_K:
        type = QUANT_Q4_0;
        break;
    case QUANT_Q4_K:
        type = QUANT_Q5_0;
        break;
    case QUANT_Q5_K:
        type = QUANT_Q5_1;
        break;
    case QUANT_Q6_K:
        type = QUANT_Q8_0;
        break;
    default:
        break;
    }
    return n_columns % quant_info((int)type)->block_len ? QUANT_F16 : type;
}

/* ---- all tensors ---- */

struct ordered {
    const char *name;
    int layer, index; /* layer -1: of no block */
};

static int layer_of(const char *name)
{
    int layer;
    return sscanf(name, "blk.%d.", &layer) == 1 ? layer : -1;
}

/* Rules count tensors of a kind by layer, then name. */
static int by_layer(const void *a, const void *b)
{
    const struct ordered *x = a, *y = b;

    return x->layer != y->layer ? (x->layer < y->layer ? -1 : 1) : strcmp(x->name, y->name);
}

/* A number that some files give layer by layer: the first layer's. */
static int first_u64(const struct gguf *g, const char *arch, const char *key, uint64_t *out)
{
    char name[160];

    snprintf(name, sizeof name, "%.64s.%s", arch, key);
    const struct gguf_key *k = gguf_find(g, name);
    if (!k || k->type != GGUF_ARRAY)
        return gguf_opt_u64(g, name, out);
    struct gguf_array a;
    int rc = gguf_array(g, name, GGUF_WANT_INT, &a);
    if (!rc && a.n)
        *out = (uint64_t)gguf_at_i64(&a, 0);
    return rc;
}

static int read_shape(const struct gguf *g, struct mixer *m)
{
    struct gguf_str arch = {"", 0};
    uint64_t n_head = 0, n_head_kv = 0;
    int rc = gguf_opt_str(g, "general.architecture", &arch);

    if (rc || (rc = first_u64(g, arch.p, "block_count", &m->n_layers)) ||
        (rc = first_u64(g, arch.p, "expert_count", &m->n_experts)) ||
        (rc = first_u64(g, arch.p, "attention.head_count", &n_head)))
        return rc;
    n_head_kv = n_head;
    if ((rc = first_u64(g, arch.p, "attention.head_count_kv", &n_head_kv)))
        return rc;
    m->n_gqa = n_head_kv ? n_head / n_head_kv : 0;
    m->is_llama_70b = !strcmp(arch.p, "llama") && m->n_layers == 80 && n_head != n_head_kv;
    m->n_layers = m->n_layers < 100000 ? m->n_layers : 0; /* no model: no rule by layer then */
    m->is_tied = !gguf_find_tensor(g, "output.weight");
    for (int i = 0; i < gguf_n_tensors(g); i++) {
        enum part part = part_of(gguf_tensor(g, i)->name);
        m->n_v += part == ATTN_V || part == ATTN_QKV;
    }
    return 0;
}

static struct recipe_choice choose(struct mixer *m, const struct gguf_tensor *t, int layer)
{
    struct recipe_choice choice = {.type = t->type, .is_kept = true};

    if (!is_matrix(t))
        return choice;
    bool is_float = quant_info((int)m->recipe->type)->block_len == 1;
    enum quant_type want = is_float || m->options.pure ? m->recipe->type : mixed(m, t, layer);
    choice.type = fitting(want, t->ne[0]);
    choice.is_kept = false;
    choice.is_fallback = choice.type != want;
    return choice;
}

int recipe_choose(const struct recipe *recipe, const struct gguf *g, const struct recipe_options *options,
                  struct recipe_choice *choices)
{
    struct mixer m = {.recipe = recipe, .options = *options};
    int n = gguf_n_tensors(g), rc = read_shape(g, &m);
    struct ordered *order = rc ? NULL : mem_alloc((size_t)n * sizeof *order, MEM_META);

    if (!order)
        return rc ? rc : err(ERR_NOMEM, "the order of %d tensors", n);
    for (int i = 0; i < n; i++) {
        const char *name = gguf_tensor(g, i)->name;
        order[i] = (struct ordered){name, layer_of(name), i};
    }
    qsort(order, (size_t)n, sizeof *order, by_layer);
    for (int k = 0; k < n; k++)
        choices[order[k].index] = choose(&m, gguf_tensor(g, order[k].index), order[k].layer);
    mem_free(order);
    return 0;
}
