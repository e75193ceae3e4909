/* Hostile models: the files of tests/data/models with one thing wrong. Opening names the key or tensor and the numbers, and
 * nothing stays behind. Headers are written anew in memory; weights are zeros, which nobody reads here. */
#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/ferry.h"
#include "src/model/arch.h"
#include "src/model/gguf.h"
#include "src/model/layout.h"
#include "src/model/model.h"
#include "src/model/program.h"
#include "src/plan/plan.h"
#include "tests/memfile.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER_BYTES = 1 << 16, FILE_BYTES = 8 << 20 };

static const char *const families[] = {
    "llama",       "llama-yarn", "mixtral",      "qwen2",         "qwen2moe",       "qwen3",         "qwen3moe",
    "olmoe",       "gemma2",     "gemma3",       "dots1",         "granite",        "gpt-oss",       "glm4moe",
    "minimax-m2",  "ernie4_5",   "ernie4_5-moe", "hunyuan-dense", "hunyuan-moe",    "seed_oss",      "smollm3",
    "qwen2vl",     "qwen3vl",    "qwen3vlmoe",   "deepseek2",     "deepseek2-lite", "deepseek2-old", "deepseek2-dense",
    "bailingmoe2", "qwen3next",  "qwen3next-in", "qwen35",        "qwen35moe"};
enum { N_FAMILIES = sizeof families / sizeof *families };

/* What is wrong; NULL and 0: nothing. */
struct edit {
    const char *key; /* leave it out, and, with a type other than -1, put this value in its place */
    int key_type;
    uint64_t bits; /* of the value, as it lies in the file */
    const char *text;
    const char *tensor, *renamed; /* leave it out, or give it another name */
    int dim;                      /* of tensor: this one more dim_more */
    int64_t dim_more;
    int retyped;           /* of tensor, -1: not */
    const char *add;       /* one more tensor, a vector of 32 */
    bool is_gate_up_stack; /* experts' gate and up in one tensor */
};

static const struct edit nothing = {.key_type = -1, .retyped = -1};

static unsigned char *file;
static size_t n_written;

static void put(const void *p, size_t n)
{
    ck_assert_uint_le(n_written + n, HEADER_BYTES);
    memcpy(file + n_written, p, n);
    n_written += n;
}

static void put_int(uint64_t v, size_t n)
{
    put(&v, n);
}

static void put_str(const char *s, uint64_t n)
{
    put_int(n, 8);
    put(s, n);
}

static size_t type_bytes(enum gguf_type t)
{
    static const size_t bytes[GGUF_N_TYPE] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return bytes[t];
}

static void put_key(const char *name, int type)
{
    put_str(name, strlen(name));
    put_int((uint64_t)type, 4);
}

static uint64_t put_keys(const struct gguf *g, const struct edit *e)
{
    uint64_t n = 0;

    for (int i = 0; i < gguf_n_keys(g); i++) {
        const struct gguf_key *k = gguf_key(g, i);
        if (strncmp(k->name, "tokenizer.", 10) == 0 || (e->key && strcmp(k->name, e->key) == 0))
            continue;
        put_key(k->name, k->type);
        n++;
        if (k->type == GGUF_STRING) {
            struct gguf_str s;
            ck_assert_int_eq(gguf_str(g, k->name, &s), 0);
            put_str(s.p, s.n_bytes);
            continue;
        }
        if (k->type == GGUF_ARRAY) {
            put_int(k->array.type, 4);
            put_int(k->array.n, 8);
        }
        put(k->array.data, (size_t)k->array.n * type_bytes(k->array.type));
    }
    if (!e->key || e->key_type < 0)
        return n;
    put_key(e->key, e->key_type);
    if (e->key_type == GGUF_STRING)
        put_str(e->text, strlen(e->text));
    else
        put_int(e->bits, type_bytes((enum gguf_type)e->key_type));
    return n + 1;
}

static uint64_t put_tensor(const char *name, int type, int n_dims, const int64_t *ne, uint64_t off)
{
    uint64_t bytes = quant_row_bytes((enum quant_type)type, ne[0]);

    put_str(name, strlen(name));
    put_int((uint64_t)n_dims, 4);
    for (int d = 0; d < n_dims; d++)
        put_int((uint64_t)ne[d], 8);
    put_int((uint64_t)type, 4);
    put_int(off, 8);
    for (int d = 1; d < n_dims; d++)
        bytes *= (uint64_t)ne[d];
    return off + size_up(bytes, 32);
}

static uint64_t put_tensors(const struct gguf *g, const struct edit *e)
{
    uint64_t n = 0, off = 0;

    for (int i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);
        int64_t ne[4] = {t->ne[0], t->ne[1], t->ne[2], t->ne[3]};
        const char *name = t->name;
        char stack[64];
        int type = t->type, layer;
        if (e->is_gate_up_stack && strstr(name, "ffn_up_exps.weight"))
            continue;
        if (e->is_gate_up_stack && strstr(name, "ffn_gate_exps.weight")) {
            ck_assert_int_eq(sscanf(name, "blk.%d", &layer), 1);
            snprintf(stack, sizeof stack, "blk.%d.ffn_gate_up_exps.weight", layer);
            name = stack;
            ne[1] *= 2;
        }
        if (e->tensor && strcmp(name, e->tensor) == 0) {
            if (!e->renamed && !e->dim_more && e->retyped < 0)
                continue;
            name = e->renamed ? e->renamed : name;
            type = e->retyped < 0 ? type : e->retyped;
            ne[e->dim] += e->dim_more;
        }
        off = put_tensor(name, type, t->n_dims, ne, off);
        n++;
    }
    if (e->add) {
        off = put_tensor(e->add, QUANT_F32, 1, &(int64_t){32}, off);
        n++;
    }
    ck_assert_uint_le(HEADER_BYTES + off, FILE_BYTES);
    return n;
}

static const char *family_path(const char *family)
{
    static char path[1024];
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, family);
    return path;
}

/* The family's file with one thing wrong, in `file`. */
static void make(const char *family, const struct edit *e)
{
    struct gguf *g = NULL;
    uint64_t counts[2];

    ck_assert_msg(gguf_open(family_path(family), NULL, &g) == 0, "%s", err_text());
    memset(file, 0, HEADER_BYTES);
    n_written = 0;
    put("GGUF\3\0\0\0", 8);
    put(counts, sizeof counts);
    counts[1] = put_keys(g, e);
    counts[0] = put_tensors(g, e);
    memcpy(file + 8, counts, sizeof counts);
    gguf_close(g);
}

static struct memfiles files;

static int open_file(struct model **m)
{
    struct file_ops ops = memfile_ops(&files);

    files.n_files = 0;
    memfile_add(&files, "m.gguf", file, FILE_BYTES);
    err_clear();
    int rc = model_open("m.gguf", &ops, m);
    ck_assert_int_eq(files.n_open, 0);
    ck_assert_int_eq(rc == 0, *m != NULL);
    return rc;
}

/* Open, and lower where that works; then nothing may be left. */
static int try_model(const char *family, const struct edit *e)
{
    struct model *m = NULL;
    struct program *p = NULL;

    make(family, e);
    int rc = open_file(&m);
    if (!rc)
        rc = program_make(&(struct program_args){.model = m, .n_rows = 4, .n_out = 1, .kv_type = QUANT_F16}, &p);
    program_free(p);
    model_close(m);
    ck_assert_uint_eq(live_bytes(), 0);
    return rc;
}

static void expect(const char *family, const struct edit *e, int code, const char *a, const char *b)
{
    int rc = try_model(family, e);
    ck_assert_msg(rc == code && strstr(err_text(), a) && strstr(err_text(), b),
                  "%s, key %s, tensor %s: code %d, \"%s\"; expected %d with \"%s\" and \"%s\"", family,
                  e->key ? e->key : "-", e->tensor ? e->tensor : "-", rc, err_text(), code, a, b);
}

static void setup(void)
{
    file = calloc(1, FILE_BYTES);
    ck_assert_ptr_nonnull(file);
    files = (struct memfiles){0};
}

static void teardown(void)
{
    free(file);
}

START_TEST(whole_model_is_refused)
{
    ck_assert_msg(try_model(families[_i], &nothing) == 0, "%s: %s", families[_i], err_text());
}
END_TEST

/* Both lists after each other are the whole one, but for the rotary tables, which each has; a weight belongs to one of them, a head that is
 * the embedding, too, to both. */
START_TEST(two_spans_are_not_the_whole)
{
    struct program_args args = {.n_rows = 4, .n_out = 2, .kv_type = QUANT_F16};
    struct program *all, *part;
    struct model *m = NULL;

    make(families[_i], &nothing);
    ck_assert_msg(open_file(&m) == 0, "%s", err_text());
    args.model = m;
    const int n_layer = m->hp.n_layer;
    ck_assert_int_eq(program_make(&args, &all), 0);
    for (int border = 1; border < n_layer; border++) {
        const struct model_span spans[2] = {{0, border}, {border, n_layer}};
        int at = 0;
        for (int side = 0; side < 2; side++) {
            args.span = spans[side];
            ck_assert_int_eq(program_make(&args, &part), 0);
            ck_assert_int_eq(part->x->ne[0], m->hp.n_embd);
            ck_assert_int_eq(part->logits != NULL, side == 1);
            for (int i = 0; i < part->n_ops; i++) {
                const struct op *op = &part->ops[i], *want = &all->ops[at];
                if (side && op->kind == OP_ROPE_TABLE)
                    continue;
                ck_assert_int_eq(op->kind, want->kind);
                ck_assert_int_eq(op->layer, want->layer);
                ck_assert_int_eq(op->w[0] ? op->w[0] - part->weights : -1, want->w[0] ? want->w[0] - all->weights : -1);
                ck_assert(!op->w[0] || model_span_has(m, spans[side], (int)(op->w[0] - part->weights)));
                at++;
            }
            program_free(part);
        }
        ck_assert_int_eq(at, all->n_ops);
        for (int i = 0; i < m->n_weights; i++) {
            bool is_both = m->weights[i].role == ROLE_TOKEN_EMBD && i == m->w[ROLE_OUTPUT];
            ck_assert_int_eq(model_span_has(m, spans[0], i) + model_span_has(m, spans[1], i), is_both ? 2 : 1);
        }
        ck_assert_uint_eq(model_decode_bytes(m, spans[0]) + model_decode_bytes(m, spans[1]),
                          model_decode_bytes(m, model_all(m)));
    }
    program_free(all);
    model_close(m);
    ck_assert_uint_eq(live_bytes(), 0);
}
END_TEST

START_TEST(unknown_family_is_run)
{
    struct edit e = nothing;
    e.key = "general.architecture";
    expect("llama", &e, ERR_FORMAT, "general.architecture", "missing");
    e.key_type = GGUF_STRING;
    e.text = "martian";
    expect("llama", &e, ERR_UNSUPPORTED, "martian", "qwen3moe");
    e.text = "llama\n\x1b[31m";
    expect("llama", &e, ERR_UNSUPPORTED, "architecture", "qwen3moe");
    e.key_type = GGUF_U32;
    expect("llama", &e, ERR_FORMAT, "general.architecture", "u32");
}
END_TEST

/* Text can be made without these: the embedding is the output, or the family has them in some files only. */
static bool may_be_missing(const char *family, const char *name)
{
    static const char *const parts[] = {"output.weight", "rope_freqs",  ".scale",        "attn_output.bias",
                                        "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias", "output.bias"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (strstr(name, parts[i]) && (i > 0 || strncmp(name, "output", 6) == 0))
            return true;
    if (strstr(name, "exp_probs_b"))
        return strcmp(family, "dots1") == 0 || strcmp(family, "ernie4_5-moe") == 0 ||
               strcmp(family, "deepseek2") == 0 || strcmp(family, "bailingmoe2") == 0;
    if (strstr(name, "ssm_dt"))
        return false;
    if (strcmp(family, "glm4moe") == 0 && (strstr(name, "attn_q_norm") || strstr(name, "attn_k_norm")))
        return true; /* its smaller models have none */
    /* a shared expert is there or not; llama's files have biases or not */
    return (strstr(name, "_shexp") && strcmp(family, "granite") == 0) ||
           (strstr(name, ".bias") && strncmp(family, "qwen2", 5) != 0 && !strstr(name, "_exps.") &&
            !strstr(name, "gate_inp"));
}

/* Behind two, three or four layers these have one more, which guesses tokens further ahead. */
static bool is_of_nextn(const char *family, const char *name)
{
    static const struct {
        const char *family, *stem;
    } layers[] = {{"glm4moe", "blk.2."}, {"bailingmoe2", "blk.2."}, {"deepseek2", "blk.3."}, {"qwen35moe", "blk.4."}};

    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        if (strcmp(family, layers[i].family) == 0)
            return strncmp(name, layers[i].stem, 6) == 0;
    return false;
}

/* All that a family runs. */
static void each_tensor(const char *family, void (*look)(const char *family, const struct gguf_tensor *t))
{
    struct gguf *g = NULL;
    ck_assert_int_eq(gguf_open(family_path(family), NULL, &g), 0);
    int n = gguf_n_tensors(g);
    for (int i = 0; i < n; i++) {
        const struct gguf_tensor *view = gguf_tensor(g, i);
        struct gguf_tensor t = *view;
        char name[64];
        snprintf(name, sizeof name, "%s", view->name);
        t.name = name;
        gguf_close(g); /* so that all that lives is what is under test */
        if (!is_of_nextn(family, name))
            look(family, &t);
        ck_assert_int_eq(gguf_open(family_path(family), NULL, &g), 0);
    }
    gguf_close(g);
}

static void leave_out(const char *family, const struct gguf_tensor *t)
{
    struct edit e = nothing;
    e.tensor = t->name;
    if (may_be_missing(family, t->name))
        ck_assert_msg(try_model(family, &e) == 0, "%s without %s: %s", family, t->name, err_text());
    else if (strcmp(family, "bailingmoe2") == 0 && strstr(t->name, "attn_qkv")) /* three weights in one tensor */
        expect(family, &e, ERR_FORMAT, "attn_q.weight", "missing");
    else
        expect(family, &e, ERR_FORMAT, strstr(t->name, "ssm_in") ? "attn_qkv" : t->name,
               "missing"); /* as newer files have it */
}

START_TEST(missing_tensor_goes_unseen)
{
    each_tensor(families[_i], leave_out);
}
END_TEST

/* 32 more keeps rows whole blocks. Where the size is learned from the first tensor that has it, another one is named. */
static void misshape(const char *family, const struct gguf_tensor *t)
{
    for (int d = 0; d < t->n_dims; d++) {
        struct edit e = nothing;
        e.tensor = t->name;
        e.dim = d;
        e.dim_more = 32;
        int rc = try_model(family, &e);
        if (rc == 0 && d == 1 && strcmp(t->name, "token_embd.weight") == 0)
            continue; /* also the output: a larger vocabulary */
        if (rc == 0 && strstr(t->name, "_norm.weight") && t->ne[0] < 64)
            continue; /* a head's norm, now as wide as all heads: families differ in that */
        ck_assert_msg(rc == ERR_FORMAT && (strstr(err_text(), "weight") || strstr(err_text(), t->name)),
                      "%s, %s, dimension %d: code %d, \"%s\"", family, t->name, d, rc, err_text());
    }
}

START_TEST(misshapen_tensor_goes_unseen)
{
    each_tensor(families[_i], misshape);
}
END_TEST

static void retype_vector(const char *family, const struct gguf_tensor *t)
{
    struct edit e = nothing;
    e.tensor = t->name;
    e.retyped = QUANT_F16;
    if (t->n_dims == 1 && !strstr(t->name, "shexp"))
        expect(family, &e, ERR_UNSUPPORTED, t->name, "F16");
    e.retyped = QUANT_I32;
    if (t->n_dims > 1)
        expect(family, &e, ERR_UNSUPPORTED, t->name, "I32");
}

START_TEST(tensor_of_a_wrong_type_reaches_a_kernel)
{
    each_tensor(families[_i], retype_vector);
}
END_TEST

START_TEST(unknown_tensor_is_left_out)
{
    struct edit e = nothing;
    e.add = "blk.0.mystery.weight";
    expect("llama", &e, ERR_UNSUPPORTED, "blk.0.mystery.weight", "llama");
    e.add = "blk.0.attn_q_norm.weight"; /* another family's */
    expect("llama", &e, ERR_UNSUPPORTED, "blk.0.attn_q_norm.weight", "llama");
    e.add = "blk.99.attn_norm.weight";
    expect("llama", &e, ERR_FORMAT, "blk.99.attn_norm.weight", "layers");
    e.add = "blk.2147483648.attn_norm.weight";
    expect("llama", &e, ERR_UNSUPPORTED, "blk.2147483648.attn_norm.weight", "llama");
    e.add = "blk.00.attn_norm.weight";
    expect("llama", &e, ERR_UNSUPPORTED, "blk.00.attn_norm.weight", "llama");
}
END_TEST

static uint64_t f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

/* Keys say in which form the file has queries, keys and values. */
START_TEST(two_forms_of_latent_attention_are_mixed)
{
    struct edit e = nothing;
    e.add = "blk.0.attn_kv_b.weight";
    expect("deepseek2", &e, ERR_FORMAT, "blk.0.attn_kv_b.weight", "keys of 96");
    e.add = "blk.0.attn_q.weight";
    expect("deepseek2", &e, ERR_FORMAT, "blk.0.attn_q.weight", "24");
    e.add = "blk.1.attn_k_b.weight";
    expect("deepseek2-old", &e, ERR_FORMAT, "blk.1.attn_k_b.weight", "keys of 64");
    e.add = "blk.9.attn_kv_b.weight";
    expect("deepseek2-old", &e, ERR_FORMAT, "blk.9.attn_kv_b.weight", "3 layers");
}
END_TEST

/* Rows behind the queries would be keys and values that nothing reads. */
START_TEST(queries_keys_and_values_in_one_are_taken_for_queries)
{
    struct edit e = nothing;
    e.tensor = "blk.0.attn_q.weight";
    e.renamed = "blk.0.attn_qkv.weight";
    e.dim = 1;
    e.dim_more = 96 + 64;
    expect("deepseek2-lite", &e, ERR_UNSUPPORTED, "blk.0.attn_qkv.weight", "deepseek2");
}
END_TEST

START_TEST(temperature_of_queries_is_left_out)
{
    struct edit e = nothing;
    e.key = "deepseek2.attention.temperature_scale";
    e.key_type = GGUF_F32;
    e.bits = f32_bits(0.1f);
    expect("deepseek2-old", &e, ERR_UNSUPPORTED, "attention.temperature_scale", "0.1");
}
END_TEST

/* Keys in a layer that has a record, a record's projections in one that has keys, both forms of them at once. */
START_TEST(layer_of_two_kinds_is_run_as_one)
{
    struct edit e = nothing;
    e.tensor = "blk.3.attn_k.weight";
    e.renamed = "blk.0.attn_k.weight";
    expect("qwen3next", &e, ERR_FORMAT, "blk.0.attn_k.weight", "recurrent");
    e.tensor = "blk.0.attn_qkv.weight";
    e.renamed = "blk.0.mystery.weight";
    expect("qwen3next", &e, ERR_UNSUPPORTED, "blk.0.mystery.weight", "qwen3next");
    e.renamed = "blk.3.attn_qkv.weight";
    expect("qwen35", &e, ERR_FORMAT, "blk.0.attn_qkv.weight", "missing");
    e.tensor = "blk.1.attn_qkv.weight";
    e.renamed = "blk.0.ssm_in.weight";
    e.dim = 1;
    e.dim_more = 64; /* with their gates */
    expect("qwen3next", &e, ERR_FORMAT, "blk.0.attn_qkv.weight", "ssm_in");
    e = nothing;
    e.key = "qwen35moe.attention.recurrent_layers";
    e.key_type = GGUF_U32;
    expect("qwen35moe", &e, ERR_FORMAT, "recurrent_layers", "u32");
}
END_TEST

/* Nothing of such a layer is a weight, whatever it holds; what is not said to be one is a layer like others. */
START_TEST(layer_that_guesses_ahead_is_run)
{
    struct edit e = nothing;
    struct model *m = NULL;

    e.add = "blk.2.mystery.weight";
    make("glm4moe", &e);
    ck_assert_msg(open_file(&m) == 0, "%s", err_text());
    ck_assert_int_eq(m->hp.n_layer, 2);
    for (int i = 0; i < m->n_weights; i++)
        ck_assert_int_lt(m->weights[i].layer, 2);
    model_close(m);
    e.add = "blk.3.attn_norm.weight";
    expect("glm4moe", &e, ERR_FORMAT, "blk.3.attn_norm.weight", "layers");
    e.add = "blk.02.attn_norm.weight";
    expect("glm4moe", &e, ERR_UNSUPPORTED, "blk.02.attn_norm.weight", "glm4moe");
    e.add = NULL;
    e.key = "glm4moe.nextn_predict_layers";
    expect("glm4moe", &e, ERR_UNSUPPORTED, "blk.2.nextn.", "glm4moe");
    e.key_type = GGUF_U32;
    e.bits = 3;
    expect("glm4moe", &e, ERR_FORMAT, "glm4moe.nextn_predict_layers", "0..2");
}
END_TEST

/* ---- keys ---- */

static const struct {
    const char *family, *what;
    bool is_float, zero_is_good;
} keys[] = {
    {"llama", "block_count", false, false},
    {"llama", "context_length", false, false},
    {"llama", "embedding_length", false, false},
    {"llama", "attention.head_count", false, false},
    {"llama", "attention.head_count_kv", false, false},
    {"llama", "feed_forward_length", false, false},
    {"llama", "attention.key_length", false, false},
    {"llama", "attention.value_length", false, false},
    {"llama", "rope.dimension_count", false, false},
    {"llama-yarn", "rope.scaling.original_context_length", false, false},
    {"mixtral", "expert_count", false, true},
    {"mixtral", "expert_used_count", false, false},
    {"qwen3moe", "expert_feed_forward_length", false, true},
    {"dots1", "leading_dense_block_count", false, true},
    {"dots1", "expert_group_count", false, true},
    {"dots1", "expert_gating_func", false, true},
    {"glm4moe", "nextn_predict_layers", false, true},
    {"glm4moe", "expert_gating_func", false, true},
    {"deepseek2", "nextn_predict_layers", false, true},
    {"deepseek2", "attention.kv_lora_rank", false, false},
    {"deepseek2", "attention.q_lora_rank", false, true},
    {"deepseek2", "attention.key_length_mla", false, true},
    {"deepseek2", "attention.value_length_mla", false, true},
    {"deepseek2", "expert_group_count", false, true},
    {"deepseek2", "expert_group_used_count", false, false},
    {"deepseek2", "expert_gating_func", false, true},
    {"deepseek2", "vocab_size", false, true},
    {"deepseek2-lite", "rope.scaling.yarn_log_multiplier", true, true},
    {"deepseek2-old", "attention.kv_lora_rank", false, false},
    {"deepseek2-old", "attention.temperature_scale", true, true},
    {"gemma3", "attention.sliding_window", false, true},
    {"gpt-oss", "attention.sliding_window", false, true},
    {"llama", "attention.layer_norm_rms_epsilon", true, true},
    {"llama", "rope.freq_base", true, false},
    {"gemma3", "rope.freq_base_swa", true, false},
    {"gpt-oss", "rope.freq_base_swa", true, false},
    {"llama", "rope.scale_linear", true, true},
    {"llama-yarn", "rope.scaling.factor", true, true},
    {"llama-yarn", "rope.scaling.attn_factor", true, true},
    {"llama-yarn", "rope.scaling.yarn_beta_fast", true, false},
    {"llama-yarn", "rope.scaling.yarn_beta_slow", true, false},
    {"dots1", "expert_weights_scale", true, true},
    {"hunyuan-dense", "rope.scaling.alpha", true, true},
    {"gemma2", "attn_logit_softcapping", true, true},
    {"gemma2", "final_logit_softcapping", true, true},
    {"granite", "embedding_scale", true, true},
    {"granite", "residual_scale", true, true},
    {"granite", "attention.scale", true, true},
    {"granite", "logit_scale", true, true},
    {"qwen3next", "ssm.conv_kernel", false, false},
    {"qwen3next", "ssm.group_count", false, false},
    {"qwen3next", "ssm.time_step_rank", false, false},
    {"qwen35", "ssm.state_size", false, false},
    {"qwen35", "ssm.inner_size", false, false},
    {"qwen35", "full_attention_interval", false, false},
};
enum { N_KEYS = sizeof keys / sizeof *keys };

static const char *arch_of(const char *family)
{
    if (strncmp(family, "deepseek2", 9) == 0)
        return "deepseek2";
    return strcmp(family, "mixtral") == 0 || strcmp(family, "llama-yarn") == 0 ? "llama" : family;
}

static uint64_t f64_bits(double f)
{
    uint64_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

START_TEST(impossible_number_of_a_key_is_believed)
{
    const struct {
        int type;
        uint64_t bits;
        const char *said; /* of the value */
    } bad[] = {
        {GGUF_I32, (uint32_t)-1, "-1"},   {GGUF_I64, (uint64_t)INT64_MIN, "-9"}, {GGUF_U64, UINT64_MAX, "1"},
        {GGUF_U64, INT64_MAX, "9"},       {GGUF_F32, f32_bits(NAN), ""},         {GGUF_F32, f32_bits(INFINITY), ""},
        {GGUF_F64, f64_bits(-1e300), ""}, {GGUF_F64, f64_bits(1e300), ""},       {GGUF_STRING, 0, "str"},
        {GGUF_BOOL, 1, "bool"},
    };
    char key[96];
    struct edit e = nothing;

    arch_key(key, sizeof key, arch_of(keys[_i].family), keys[_i].what);
    e.key = key;
    e.text = "seven";
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        e.key_type = bad[i].type;
        e.bits = bad[i].bits;
        expect(keys[_i].family, &e, ERR_FORMAT, key, bad[i].said);
    }
    e.key_type = keys[_i].is_float ? GGUF_F32 : GGUF_U32;
    e.bits = 0;
    if (!keys[_i].zero_is_good)
        expect(keys[_i].family, &e, ERR_FORMAT, key, "0");
}
END_TEST

START_TEST(numbers_that_do_not_fit_together_are_believed)
{
    static const struct {
        const char *family, *key;
        uint32_t value;
        int code;
        const char *a, *b;
    } cases[] = {
        {"llama", "llama.attention.head_count_kv", 3, ERR_FORMAT, "heads", "3 KV heads"},
        {"llama", "llama.attention.head_count", 5, ERR_FORMAT, "attn_q.weight", "should be 160"},
        {"llama", "llama.attention.key_length", 15, ERR_FORMAT, "llama.rope.dimension_count", "15"},
        {"llama", "llama.attention.key_length", 1025, ERR_FORMAT, "llama.attention.key_length", "1025"},
        {"llama", "llama.attention.value_length", 8, ERR_FORMAT, "attn_v.weight", "should be"},
        {"llama", "llama.rope.dimension_count", 7, ERR_FORMAT, "llama.rope.dimension_count", "7: odd"},
        {"llama", "llama.rope.dimension_count", 514, ERR_FORMAT, "llama.rope.dimension_count", "514"},
        {"llama", "llama.feed_forward_length", 1, ERR_FORMAT, "ffn", "should be 1"},
        {"llama", "llama.embedding_length", 1, ERR_FORMAT, "", ""},
        {"llama", "llama.block_count", 1, ERR_FORMAT, "blk.1.", "1 layers"},
        {"llama", "llama.block_count", 3000, ERR_FORMAT, "missing", "blk."},
        {"mixtral", "llama.expert_used_count", 100, ERR_FORMAT, "llama.expert_used_count", "100"},
        {"mixtral", "llama.expert_count", 2, ERR_FORMAT, "ffn_gate_inp.weight", "\"llama.expert_count\" is 2"},
        {"mixtral", "llama.expert_count", 0, ERR_FORMAT, "llama.expert_used_count", "0"},
        {"dots1", "dots1.leading_dense_block_count", 4, ERR_FORMAT, "leading_dense_block_count", ""},
        {"dots1", "dots1.expert_group_count", 2, ERR_FORMAT, "dots1.expert_group_used_count", "missing"},
        {"deepseek2", "deepseek2.expert_group_count", 3, ERR_FORMAT, "8 experts in 3 groups", "2 have 3"},
        {"deepseek2", "deepseek2.expert_group_count", 8, ERR_FORMAT, "8 experts in 8 groups", "2 have 3"},
        {"deepseek2", "deepseek2.expert_group_used_count", 1, ERR_FORMAT, "8 experts in 4 groups", "1 have 3"},
        {"deepseek2", "deepseek2.attention.key_length", 64, ERR_FORMAT, "keys of 64 values", "latent of 64 with 32"},
        {"deepseek2", "deepseek2.attention.value_length", 32, ERR_FORMAT, "values of 32", "latent of 64 with 32"},
        {"deepseek2", "deepseek2.attention.kv_lora_rank", 32, ERR_FORMAT, "keys of 96 values", "latent of 32 with 32"},
        {"deepseek2", "deepseek2.attention.value_length_mla", 0, ERR_FORMAT, "value_length_mla = 0", "both or neither"},
        {"deepseek2", "deepseek2.attention.key_length_mla", 32, ERR_FORMAT, "32 of a key's 32 values", "rotated"},
        {"deepseek2", "deepseek2.attention.head_count_kv", 2, ERR_FORMAT, "2 KV heads", "4 heads"},
        {"deepseek2", "deepseek2.attention.q_lora_rank", 0, ERR_FORMAT, "attn_q_a", "should be 0"},
        {"deepseek2-lite", "deepseek2.attention.q_lora_rank", 8, ERR_FORMAT, "blk.0.attn_q.weight", "to 8 values"},
        {"deepseek2-old", "deepseek2.attention.head_count_kv", 1, ERR_FORMAT, "1 KV heads", "4 heads"},
        {"deepseek2-old", "deepseek2.attention.value_length", 64, ERR_FORMAT, "blk.0.attn_kv_b.weight", "64 of values"},
        {"deepseek2-old", "deepseek2.rope.dimension_count", 64, ERR_FORMAT, "64 of a key's 64 values", "rotated"},
        {"deepseek2-old", "deepseek2.attention.kv_lora_rank", 32, ERR_UNSUPPORTED, "latent of 32 values", "32 rotated"},
        {"qwen3next", "qwen3next.ssm.conv_kernel", 1, ERR_FORMAT, "qwen3next.ssm.conv_kernel", "1"},
        {"qwen3next", "qwen3next.ssm.conv_kernel", 3, ERR_FORMAT, "ssm_conv1d.weight", "should be 3"},
        {"qwen3next", "qwen3next.ssm.group_count", 3, ERR_FORMAT, "4 heads", "3 key heads"},
        {"qwen3next", "qwen3next.ssm.inner_size", 65, ERR_FORMAT, "65 values", "4 heads"},
        {"qwen3next", "qwen3next.ssm.inner_size", 8192, ERR_FORMAT, "8192 values", "1024 a head"},
        {"qwen3next", "qwen3next.ssm.state_size", 32, ERR_FORMAT, "attn_qkv.weight", "should be 192"},
        {"qwen3next-in", "qwen3next.ssm.state_size", 32, ERR_FORMAT, "ssm_in.weight", "should be 256"},
        {"qwen35", "qwen35.full_attention_interval", 1, ERR_FORMAT, "blk.0.attn_q.weight", "missing"},
        {"qwen35", "qwen35.full_attention_interval", 5, ERR_UNSUPPORTED, "all 4 layers", "recurrent"},
    };
    struct edit e = nothing;

    e.key = cases[_i].key;
    e.key_type = GGUF_U32;
    e.bits = cases[_i].value;
    if (strcmp(cases[_i].key, "dots1.leading_dense_block_count") == 0) /* fewer layers than that, or experts in them */
        ck_assert_int_eq(try_model(cases[_i].family, &e), ERR_FORMAT);
    else
        expect(cases[_i].family, &e, cases[_i].code, cases[_i].a, cases[_i].b);
}
END_TEST

START_TEST(tiny_rope_factor_makes_infinite_frequencies)
{
    struct edit e = nothing;
    e.key = "llama.rope.scaling.factor";
    e.key_type = GGUF_F64;
    e.bits = f64_bits(1e-310);
    expect("llama-yarn", &e, ERR_FORMAT, "llama.rope.scaling.factor", "1e-310");
}
END_TEST

/* ---- sizes ---- */

START_TEST(stack_of_gate_and_up_is_counted_twice)
{
    struct machine machine = {
        .n_cores = 1, .ram_total_bytes = GIB, .ram_limit_bytes = UINT64_MAX, .ram_free_bytes = GIB};
    struct plan_opts opts = {.n_ctx = 64, .io = _i ? PLAN_IO_MMAP : PLAN_IO_PREAD};
    struct edit e = nothing;
    struct layout layout;
    struct model *m = NULL;
    struct plan plan;
    uint64_t expert_bytes = 0, n_expert = 0;

    e.is_gate_up_stack = true;
    make("qwen3moe", &e);
    ck_assert_msg(open_file(&m) == 0, "%s", err_text());
    struct plan_in in = {.machine = &machine, .model = m, .opts = &opts, .cpu = &cpu_device_ops};
    n_expert = (uint64_t)m->hp.n_expert;
    for (int layer = 0; layer < m->hp.n_layer; layer++)
        expert_bytes += n_expert * 3 * (uint64_t)m->hp.n_embd * (uint64_t)m->hp.n_ff_expert * sizeof(float);
    ck_assert_msg(plan_make(&in, &plan) == 0, "%s", err_text());
    ck_assert_uint_eq(m->expert_bytes, expert_bytes);
    ck_assert_uint_eq(plan.expert_bytes, expert_bytes);
    ck_assert_int_eq(layout_init(m, &layout), 0);
    ck_assert_uint_eq(plan.dense_bytes + plan.expert_bytes, _i ? m->dense_bytes + expert_bytes : layout.bytes);
    ck_assert_uint_lt(plan.dense_bytes, layout.bytes);
    layout_done(&layout);
    model_close(m);
    ck_assert_uint_eq(live_bytes(), 0);
}
END_TEST

/* The number of rows in the entry of a tensor of two dimensions. */
static void patch_rows(unsigned char *p, size_t n, const char *name, uint64_t rows)
{
    size_t len = strlen(name);
    for (size_t i = 8; i + len + 20 < n; i++)
        if (p[i - 8] == len && memcmp(p + i, name, len) == 0)
            memcpy(p + i + len + 12, &rows, 8);
}

START_TEST(vocabulary_beyond_the_logits_is_accepted)
{
    const char *path = TEST_BUILD_DIR "/t_model.gguf";
    struct ferry_engine *engine = NULL;
    FILE *f = fopen(family_path("llama"), "rb");
    ck_assert_ptr_nonnull(f);
    size_t n = fread(file, 1, FILE_BYTES, f);
    fclose(f);
    patch_rows(file, n, "token_embd.weight", 256);
    patch_rows(file, n, "output.weight", 256);
    f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(file, 1, n, f), n);
    ck_assert_int_eq(fclose(f), 0);
    int rc = ferry_engine_open(path, NULL, &engine);
    remove(path);
    ck_assert_msg(rc == FERRY_ERR_FORMAT && strstr(ferry_error(), "288") && strstr(ferry_error(), "256"), "%d, %s", rc,
                  ferry_error());
    ck_assert_uint_eq(live_bytes(), 0);
}
END_TEST

/* ---- what fails ---- */

START_TEST(failed_allocation_leaks_a_model)
{
    struct model *m = NULL;
    int rc = ERR_NOMEM;

    make(families[_i], &nothing);
    for (uint64_t n = 1; rc == ERR_NOMEM; n++) {
        mem_fail_nth(n);
        rc = open_file(&m);
        mem_fail_nth(0);
        ck_assert_msg(rc == 0 || (rc == ERR_NOMEM && strstr(err_text(), "no memory for ")),
                      "allocation %" PRIu64 ": %d, %s", n, rc, err_text());
        model_close(m);
        m = NULL;
        ck_assert_uint_eq(live_bytes(), 0);
    }
}
END_TEST

START_TEST(failed_read_leaks_a_model)
{
    struct model *m = NULL;
    int rc = ERR_IO;

    make(families[_i], &nothing);
    files.max_read_bytes = 1000;
    for (uint64_t n = 1; rc == ERR_IO; n++) {
        files.n_calls = 0;
        files.fail_at = n;
        rc = open_file(&m);
        ck_assert_msg(rc == 0 || (rc == ERR_IO && strstr(err_text(), "m.gguf")), "call %" PRIu64 ": %d, %s", n, rc,
                      err_text());
        model_close(m);
        m = NULL;
        ck_assert_uint_eq(live_bytes(), 0);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("model");
    TCase *tc = tcase_create("hostile");

    tcase_set_timeout(tc, 60);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, whole_model_is_refused, 0, N_FAMILIES);
    tcase_add_loop_test(tc, two_spans_are_not_the_whole, 0, N_FAMILIES);
    tcase_add_test(tc, unknown_family_is_run);
    tcase_add_loop_test(tc, missing_tensor_goes_unseen, 0, N_FAMILIES);
    tcase_add_loop_test(tc, misshapen_tensor_goes_unseen, 0, N_FAMILIES);
    tcase_add_loop_test(tc, tensor_of_a_wrong_type_reaches_a_kernel, 0, N_FAMILIES);
    tcase_add_test(tc, unknown_tensor_is_left_out);
    tcase_add_test(tc, layer_of_two_kinds_is_run_as_one);
    tcase_add_test(tc, layer_that_guesses_ahead_is_run);
    tcase_add_test(tc, two_forms_of_latent_attention_are_mixed);
    tcase_add_test(tc, queries_keys_and_values_in_one_are_taken_for_queries);
    tcase_add_test(tc, temperature_of_queries_is_left_out);
    tcase_add_loop_test(tc, impossible_number_of_a_key_is_believed, 0, N_KEYS);
    tcase_add_loop_test(tc, numbers_that_do_not_fit_together_are_believed, 0, 40);
    tcase_add_test(tc, tiny_rope_factor_makes_infinite_frequencies);
    tcase_add_loop_test(tc, stack_of_gate_and_up_is_counted_twice, 0, 2);
    tcase_add_test(tc, vocabulary_beyond_the_logits_is_accepted);
    tcase_add_loop_test(tc, failed_allocation_leaks_a_model, 0, N_FAMILIES);
    tcase_add_loop_test(tc, failed_read_leaks_a_model, 0, N_FAMILIES);
    suite_add_tcase(s, tc);

    return run_suite(s);
}
