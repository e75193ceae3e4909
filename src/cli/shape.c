/* Owns the table of shapes, and writes headers. Names, types and dimensions are those of tools/make-synthetic, which makes
 * the files. */
#include "src/cli/shape.h"

#include "io/file.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/text.h"
#include "src/model/gguf.h"

#include <stdio.h>
#include <string.h>

#define ALIGN 32
/* A token and its merge, and what they take with their lengths: so that tables are counted as those of a real file. */
#define TOKEN "synthetic"

/* As the models' config.json have them. */
static const struct shape_latent v2_lite = {0, 512, 64, 128, 128, 2, 0, 0, false},
                                 v3 = {1536, 512, 64, 128, 128, 1, 8, 4, true},
                                 kimi_k2 = {1536, 512, 64, 128, 128, 1, 0, 0, true},
                                 glm_flash = {768, 512, 64, 192, 256, 1, 0, 0, true};

/* Gated delta nets of the Qwen family: all layers but each fourth, heads of 128, a convolution of 4. */
enum { DELTA_PERIOD = 4, DELTA_DIM = 128, DELTA_CONV = 4 };

static const struct shape shapes[] = {
    {"qwen3-30b-a3b", "qwen3moe", 48, 2048, 32, 4, 128, 128, 8, 768, 0, 0, 151936, 40960, .window = 0},
    {"olmoe-1b-7b", "olmoe", 16, 2048, 16, 16, 128, 64, 8, 1024, 0, 0, 50304, 4096, .window = 0},
    {"mixtral-8x7b", "llama", 32, 4096, 32, 8, 128, 8, 2, 14336, 0, 0, 32000, 32768, .is_qk_plain = true},
    {"gpt-oss-20b", "gpt-oss", 24, 2880, 64, 8, 64, 32, 4, 2880, 0, 0, 201088, 131072, .window = 128,
     .is_qk_plain = true, .is_mxfp4 = true},
    {"gpt-oss-120b", "gpt-oss", 36, 2880, 64, 8, 64, 128, 4, 2880, 0, 0, 201088, 131072, .window = 128,
     .is_qk_plain = true, .is_mxfp4 = true},
    {"glm-4.5-air", "glm4moe", 46, 4096, 96, 8, 128, 128, 8, 1408, 1, 10944, 151552, 131072, .is_qk_plain = true},
    {"glm-4.5", "glm4moe", 92, 5120, 96, 8, 128, 160, 8, 1536, 3, 12288, 151552, 131072, .window = 0},
    {"minimax-m2", "minimax-m2", 62, 3072, 48, 8, 128, 256, 8, 1536, 0, 0, 200064, 196608, .window = 0},
    {"deepseek-v2-lite", "deepseek2", 27, 2048, 16, 1, 576, 64, 6, 1408, 1, 10944, 102400, 163840, .is_qk_plain = true,
     .latent = &v2_lite},
    {"deepseek-v3", "deepseek2", 61, 7168, 128, 1, 576, 256, 8, 2048, 3, 18432, 129280, 163840, .is_qk_plain = true,
     .latent = &v3},
    {"kimi-k2", "deepseek2", 61, 7168, 64, 1, 576, 384, 8, 2048, 1, 18432, 163840, 131072, .is_qk_plain = true,
     .latent = &kimi_k2},
    {"glm-4.7-flash", "deepseek2", 47, 2048, 20, 1, 576, 64, 4, 1536, 1, 10240, 154880, 202752, .is_qk_plain = true,
     .latent = &glm_flash},
    {"qwen3-next-80b-a3b", "qwen3next", 48, 2048, 16, 2, 256, 512, 10, 512, 0, 0, 151936, 262144, .n_key_head = 16,
     .n_value_head = 32},
    {"qwen3.5-35b-a3b", "qwen35moe", 40, 2048, 16, 2, 256, 256, 8, 512, 0, 0, 248320, 262144, .n_key_head = 16,
     .n_value_head = 32},
    {"small-qwen3moe", "qwen3moe", 16, 1024, 16, 4, 64, 64, 8, 512, 0, 0, 49152, 8192, .window = 0},
    {.name = NULL},
};

const struct shape *shape_find(const char *name)
{
    for (const struct shape *s = shapes; s->name; s++) {
        if (!strcmp(s->name, name))
            return s;
    }
    return NULL;
}

const struct shape *shape_all(void)
{
    return shapes;
}

/* ---- a header ---- */

struct writer {
    const struct shape *shape;
    struct text keys, tensors;
    uint64_t n_keys, n_tensors, data_bytes;
    int rc;
};

static void put(struct writer *w, struct text *t, uint64_t v, int n_bytes)
{
    unsigned char b[8];

    for (int i = 0; i < n_bytes; i++)
        b[i] = (unsigned char)(v >> (8 * i));
    w->rc = w->rc ? w->rc : text_add(t, b, (size_t)n_bytes);
}

static void put_string(struct writer *w, struct text *t, const char *s)
{
    put(w, t, strlen(s), 8);
    w->rc = w->rc ? w->rc : text_add(t, s, strlen(s));
}

static void key(struct writer *w, const char *name, enum gguf_type type)
{
    put_string(w, &w->keys, name);
    put(w, &w->keys, type, 4);
    w->n_keys++;
}

static void key_string(struct writer *w, const char *name, const char *value)
{
    key(w, name, GGUF_STRING);
    put_string(w, &w->keys, value);
}

static void key_of_arch(struct writer *w, const char *what, enum gguf_type type)
{
    char name[96];

    snprintf(name, sizeof name, "%s.%s", w->shape->arch, what);
    key(w, name, type);
}

static void key_int(struct writer *w, const char *what, int value)
{
    key_of_arch(w, what, GGUF_U32);
    put(w, &w->keys, (uint64_t)value, 4);
}

static void key_float(struct writer *w, const char *what, float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof bits);
    key_of_arch(w, what, GGUF_F32);
    put(w, &w->keys, bits, 4);
}

static bool is_recurrent(const struct shape *s, int layer)
{
    return s->n_value_head && layer % DELTA_PERIOD != DELTA_PERIOD - 1;
}

static bool is_one_of(const struct shape *s, const char *a, const char *b)
{
    return !strcmp(s->arch, a) || !strcmp(s->arch, b);
}

static void put_latent_keys(struct writer *w, const struct shape_latent *l)
{
    key_int(w, "attention.key_length_mla", l->n_nope + l->n_rot);
    key_int(w, "attention.value_length_mla", l->n_v);
    key_int(w, "attention.q_lora_rank", l->q_rank);
    key_int(w, "attention.kv_lora_rank", l->kv_rank);
    key_int(w, "rope.dimension_count", l->n_rot);
    key_int(w, "expert_group_count", l->n_group);
    key_int(w, "expert_group_used_count", l->n_group_used);
    key_int(w, "expert_gating_func", l->has_select_bias ? 2 : 1); /* GGUF's: sigmoid, softmax */
}

static void put_keys(struct writer *w)
{
    const struct shape *s = w->shape;

    key_string(w, "general.architecture", s->arch);
    key_string(w, "general.name", s->name);
    key_int(w, "block_count", s->n_layer);
    key_int(w, "context_length", s->n_ctx);
    key_int(w, "embedding_length", s->n_embd);
    key_int(w, "feed_forward_length", s->n_ff_dense ? s->n_ff_dense : s->n_ff);
    key_int(w, "attention.head_count", s->n_head);
    key_int(w, "attention.head_count_kv", s->n_head_kv);
    key_int(w, "attention.key_length", s->head_dim);
    key_int(w, "attention.value_length", s->latent ? s->latent->kv_rank : s->head_dim);
    if (s->latent)
        put_latent_keys(w, s->latent);
    else
        key_int(w, "rope.dimension_count",
                is_one_of(s, "glm4moe", "minimax-m2") ? s->head_dim / 2
                : s->n_value_head                     ? s->head_dim / 4
                                                      : s->head_dim);
    key_float(w, "rope.freq_base", 1e6f);
    key_float(w, "attention.layer_norm_rms_epsilon", 1e-6f);
    key_int(w, "expert_count", s->n_expert);
    key_int(w, "expert_used_count", s->n_used);
    key_int(w, "expert_feed_forward_length", s->n_ff);
    if (s->n_dense)
        key_int(w, "leading_dense_block_count", s->n_dense);
    if (s->window)
        key_int(w, "attention.sliding_window", s->window);
    if (s->n_value_head) {
        key_int(w, "full_attention_interval", DELTA_PERIOD);
        key_int(w, "ssm.conv_kernel", DELTA_CONV);
        key_int(w, "ssm.group_count", s->n_key_head);
        key_int(w, "ssm.time_step_rank", s->n_value_head);
        key_int(w, "ssm.state_size", DELTA_DIM);
        key_int(w, "ssm.inner_size", s->n_value_head * DELTA_DIM);
    }
    key(w, "tokenizer.ggml.tokens", GGUF_ARRAY);
    put(w, &w->keys, GGUF_STRING, 4);
    put(w, &w->keys, (uint64_t)s->n_vocab, 8);
    for (int i = 0; i < s->n_vocab; i++)
        put_string(w, &w->keys, TOKEN);
}

/* Rows that are no whole blocks of a K-quant get what llama-quantize gives them. */
static enum quant_type fitting(enum quant_type type, int n_in)
{
    if (n_in % quant_info(type)->block_len == 0)
        return type;
    return type == QUANT_Q6_K ? QUANT_Q8_0 : QUANT_Q5_0;
}

static void tensor(struct writer *w, const char *name, enum quant_type type, int n_in, int n_out, int n_expert)
{
    const uint64_t ne[3] = {(uint64_t)n_in, (uint64_t)n_out, (uint64_t)n_expert};
    int n_dims = n_expert ? 3 : n_out ? 2 : 1;
    uint64_t bytes = quant_row_bytes(type, n_in);

    put_string(w, &w->tensors, name);
    put(w, &w->tensors, (uint64_t)n_dims, 4);
    for (int i = 0; i < n_dims; i++) {
        put(w, &w->tensors, ne[i], 8);
        bytes *= i ? ne[i] : 1;
    }
    put(w, &w->tensors, type, 4);
    put(w, &w->tensors, w->data_bytes, 8);
    w->data_bytes = size_up(w->data_bytes + bytes, ALIGN);
    w->n_tensors++;
}

static void tensor_of_layer(struct writer *w, int layer, const char *role, enum quant_type type, int n_in, int n_out,
                            int n_expert)
{
    char name[64];

    snprintf(name, sizeof name, "blk.%d.%s", layer, role);
    tensor(w, name, fitting(type, n_in), n_in, n_out, n_expert);
}

/* What Q4_K_M gives more bits: attention's v and the down projection of the first and last eighth of the layers, and of every
 * third between. */
static bool has_more_bits(int layer, int n)
{
    return layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
}

static void put_latent_attention(struct writer *w, int layer, enum quant_type type, enum quant_type v_type)
{
    const struct shape *s = w->shape;
    const struct shape_latent *l = s->latent;
    int q = s->n_head * (l->n_nope + l->n_rot);

    if (l->q_rank) {
        tensor_of_layer(w, layer, "attn_q_a.weight", type, s->n_embd, l->q_rank, 0);
        tensor_of_layer(w, layer, "attn_q_a_norm.weight", QUANT_F32, l->q_rank, 0, 0);
        tensor_of_layer(w, layer, "attn_q_b.weight", type, l->q_rank, q, 0);
    } else {
        tensor_of_layer(w, layer, "attn_q.weight", type, s->n_embd, q, 0);
    }
    tensor_of_layer(w, layer, "attn_kv_a_mqa.weight", type, s->n_embd, l->kv_rank + l->n_rot, 0);
    tensor_of_layer(w, layer, "attn_kv_a_norm.weight", QUANT_F32, l->kv_rank, 0, 0);
    tensor_of_layer(w, layer, "attn_k_b.weight", type, l->n_nope, l->kv_rank, s->n_head);
    tensor_of_layer(w, layer, "attn_v_b.weight", v_type, l->kv_rank, l->n_v, s->n_head);
    tensor_of_layer(w, layer, "attn_output.weight", type, s->n_head * l->n_v, s->n_embd, 0);
}

static void put_attention(struct writer *w, int layer, enum quant_type type, enum quant_type v_type)
{
    const struct shape *s = w->shape;
    int q = s->n_head * s->head_dim, kv = s->n_head_kv * s->head_dim;
    bool is_by_row = is_one_of(s, "olmoe", "minimax-m2");

    tensor_of_layer(w, layer, "attn_q.weight", type, s->n_embd, s->n_value_head ? 2 * q : q, 0);
    tensor_of_layer(w, layer, "attn_k.weight", type, s->n_embd, kv, 0);
    tensor_of_layer(w, layer, "attn_v.weight", v_type, s->n_embd, kv, 0);
    tensor_of_layer(w, layer, "attn_output.weight", type, q, s->n_embd, 0);
    if (!s->is_qk_plain) {
        tensor_of_layer(w, layer, "attn_q_norm.weight", QUANT_F32, is_by_row ? q : s->head_dim, 0, 0);
        tensor_of_layer(w, layer, "attn_k_norm.weight", QUANT_F32, is_by_row ? kv : s->head_dim, 0, 0);
    }
    if (is_one_of(s, "gpt-oss", "glm4moe")) {
        tensor_of_layer(w, layer, "attn_q.bias", QUANT_F32, q, 0, 0);
        tensor_of_layer(w, layer, "attn_k.bias", QUANT_F32, kv, 0, 0);
        tensor_of_layer(w, layer, "attn_v.bias", QUANT_F32, kv, 0, 0);
    }
    if (!strcmp(s->arch, "gpt-oss")) {
        tensor_of_layer(w, layer, "attn_output.bias", QUANT_F32, s->n_embd, 0, 0);
        tensor_of_layer(w, layer, "attn_sinks.weight", QUANT_F32, s->n_head, 0, 0);
    }
}

/* Q4_K_M has joint projections in Q5_K. */
static void put_delta(struct writer *w, int layer, enum quant_type type)
{
    const struct shape *s = w->shape;
    int keys = s->n_key_head * DELTA_DIM, values = s->n_value_head * DELTA_DIM, channels = 2 * keys + values;

    tensor_of_layer(w, layer, "attn_qkv.weight", type == QUANT_Q4_K ? QUANT_Q5_K : type, s->n_embd, channels, 0);
    tensor_of_layer(w, layer, "attn_gate.weight", type, s->n_embd, values, 0);
    if (!strcmp(s->arch, "qwen3next")) {
        tensor_of_layer(w, layer, "ssm_ba.weight", type, s->n_embd, 2 * s->n_value_head, 0);
    } else {
        tensor_of_layer(w, layer, "ssm_beta.weight", type, s->n_embd, s->n_value_head, 0);
        tensor_of_layer(w, layer, "ssm_alpha.weight", type, s->n_embd, s->n_value_head, 0);
    }
    tensor_of_layer(w, layer, "ssm_conv1d.weight", QUANT_F32, DELTA_CONV, channels, 0);
    tensor_of_layer(w, layer, "ssm_dt.bias", QUANT_F32, s->n_value_head, 0, 0);
    tensor_of_layer(w, layer, "ssm_a", QUANT_F32, s->n_value_head, 0, 0);
    tensor_of_layer(w, layer, "ssm_norm.weight", QUANT_F32, DELTA_DIM, 0, 0);
    tensor_of_layer(w, layer, "ssm_out.weight", type, values, s->n_embd, 0);
}

static void put_experts(struct writer *w, int layer, enum quant_type type, enum quant_type down_type)
{
    const struct shape *s = w->shape;

    tensor_of_layer(w, layer, "ffn_gate_inp.weight", QUANT_F32, s->n_embd, s->n_expert, 0);
    tensor_of_layer(w, layer, "ffn_gate_exps.weight", type, s->n_embd, s->n_ff, s->n_expert);
    tensor_of_layer(w, layer, "ffn_up_exps.weight", type, s->n_embd, s->n_ff, s->n_expert);
    tensor_of_layer(w, layer, "ffn_down_exps.weight", down_type, s->n_ff, s->n_embd, s->n_expert);
    if (!strcmp(s->arch, "gpt-oss")) {
        tensor_of_layer(w, layer, "ffn_gate_inp.bias", QUANT_F32, s->n_expert, 0, 0);
        tensor_of_layer(w, layer, "ffn_gate_exps.bias", QUANT_F32, s->n_ff, s->n_expert, 0);
        tensor_of_layer(w, layer, "ffn_up_exps.bias", QUANT_F32, s->n_ff, s->n_expert, 0);
        tensor_of_layer(w, layer, "ffn_down_exps.bias", QUANT_F32, s->n_embd, s->n_expert, 0);
    }
    if (is_one_of(s, "glm4moe", "minimax-m2") || (s->latent && s->latent->has_select_bias))
        tensor_of_layer(w, layer, "exp_probs_b.bias", QUANT_F32, s->n_expert, 0, 0);
    if (s->n_value_head)
        tensor_of_layer(w, layer, "ffn_gate_inp_shexp.weight", QUANT_F32, s->n_embd, 0, 0);
    if (s->n_value_head || is_one_of(s, "glm4moe", "dots1") || s->latent) {
        int n_ff = s->latent ? s->latent->n_shared * s->n_ff : s->n_ff;
        tensor_of_layer(w, layer, "ffn_gate_shexp.weight", type, s->n_embd, n_ff, 0);
        tensor_of_layer(w, layer, "ffn_up_shexp.weight", type, s->n_embd, n_ff, 0);
        tensor_of_layer(w, layer, "ffn_down_shexp.weight", down_type, n_ff, s->n_embd, 0);
    }
}

static void put_tensors(struct writer *w)
{
    const struct shape *s = w->shape;
    bool is_post_norm = s->n_value_head || is_one_of(s, "gpt-oss", "glm4moe");
    int n_ff_dense = s->n_ff_dense ? s->n_ff_dense : s->n_ff;
    enum quant_type dense = s->is_mxfp4 ? QUANT_Q8_0 : QUANT_Q4_K, expert = s->is_mxfp4 ? QUANT_MXFP4 : QUANT_Q4_K;

    tensor(w, "token_embd.weight", dense, s->n_embd, s->n_vocab, 0);
    for (int layer = 0; layer < s->n_layer; layer++) {
        bool is_better = !s->is_mxfp4 && has_more_bits(layer, s->n_layer);
        tensor_of_layer(w, layer, "attn_norm.weight", QUANT_F32, s->n_embd, 0, 0);
        if (is_recurrent(s, layer))
            put_delta(w, layer, dense);
        else
            (s->latent ? put_latent_attention : put_attention)(w, layer, dense, is_better ? QUANT_Q6_K : dense);
        tensor_of_layer(w, layer, is_post_norm ? "post_attention_norm.weight" : "ffn_norm.weight", QUANT_F32, s->n_embd,
                        0, 0);
        if (layer < s->n_dense) {
            tensor_of_layer(w, layer, "ffn_gate.weight", dense, s->n_embd, n_ff_dense, 0);
            tensor_of_layer(w, layer, "ffn_up.weight", dense, s->n_embd, n_ff_dense, 0);
            tensor_of_layer(w, layer, "ffn_down.weight", is_better ? QUANT_Q6_K : dense, n_ff_dense, s->n_embd, 0);
        } else {
            put_experts(w, layer, expert, is_better ? QUANT_Q6_K : expert);
        }
    }
    tensor(w, "output_norm.weight", QUANT_F32, s->n_embd, 0, 0);
    tensor(w, "output.weight", s->is_mxfp4 ? QUANT_Q8_0 : QUANT_Q6_K, s->n_embd, s->n_vocab, 0);
}

static int make_header(const struct shape *shape, struct text *out)
{
    struct writer w = {.shape = shape};

    put_keys(&w);
    put_tensors(&w);
    put(&w, out, 0x46554747, 4); /* "GGUF" */
    put(&w, out, 3, 4);
    put(&w, out, w.n_tensors, 8);
    put(&w, out, w.n_keys, 8);
    if (!w.rc)
        w.rc = text_add(out, w.keys.p, w.keys.n_bytes);
    if (!w.rc)
        w.rc = text_add(out, w.tensors.p, w.tensors.n_bytes);
    text_done(&w.keys);
    text_done(&w.tensors);
    return w.rc;
}

/* ---- the header as a file ---- */

static int file_of(void *ctx, const char *path, void **out)
{
    (void)path;
    *out = ctx;
    return 0;
}

static int identify(void *ctx, void *handle, struct file_id *out)
{
    (void)handle;
    *out = (struct file_id){.bytes = ((const struct text *)ctx)->n_bytes};
    return 0;
}

static int64_t read_at(void *ctx, void *handle, uint64_t off, void *dst, uint64_t bytes)
{
    const struct text *t = ctx;

    (void)handle;
    if (off >= t->n_bytes)
        return 0;
    bytes = bytes < t->n_bytes - off ? bytes : t->n_bytes - off;
    memcpy(dst, t->p + off, bytes);
    return (int64_t)bytes;
}

static void close_file(void *ctx, void *handle)
{
    (void)ctx;
    (void)handle;
}

int shape_open(const struct shape *shape, struct model **out)
{
    struct text header = {0};
    const struct file_ops ops = {
        .ctx = &header, .open = file_of, .identify = identify, .read_at = read_at, .close = close_file};

    *out = NULL;
    int rc = make_header(shape, &header);
    if (!rc)
        rc = model_open_head(shape->name, &ops, out);
    text_done(&header);
    return rc;
}
