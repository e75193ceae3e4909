/* Mixtures of types, against what llama-quantize chooses (tests/gen/quantize_types.py). */
#include "src/base/err.h"
#include "src/model/recipe.h"
#include "tests/memfile.h"
#include "tests/raw.h"
#include "tests/run_suite.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_LAYERS = 32 };
static const struct shape {
    const char *name;
    uint32_t n_head, n_kv, n_expert;
    bool has_output;
} shapes[] = {
    {"gqa", 32, 8, 0, true}, {"mha-tied", 32, 32, 0, false}, {"moe8", 32, 8, 8, true}, {"moe16", 32, 8, 16, true}};

/* Returns where the next tensor begins. */
static uint64_t put_stack(struct raw *r, const char *name, uint64_t n_experts, uint64_t off)
{
    raw_text(r, name);
    raw_u32(r, n_experts ? 3 : 2);
    raw_u64(r, 256);
    raw_u64(r, 32);
    if (n_experts)
        raw_u64(r, n_experts);
    raw_u32(r, QUANT_F32);
    raw_u64(r, off);
    return off + 256 * 32 * 4 * (n_experts ? n_experts : 1);
}

static struct gguf *open_shape(const struct shape *shape)
{
    static const char *const kinds[] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
    static struct raw r;
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;
    uint64_t off = 0;
    char name[80];

    r.n = 0;
    raw_put(&r, "GGUF", 4);
    raw_u32(&r, 3);
    raw_u64(&r, N_LAYERS * 7 + 1 + shape->has_output);
    raw_u64(&r, 5);
    raw_text(&r, "general.architecture"), raw_u32(&r, GGUF_STRING), raw_text(&r, "llama");
    raw_key_u32(&r, "llama.block_count", N_LAYERS);
    raw_key_u32(&r, "llama.attention.head_count", shape->n_head);
    raw_key_u32(&r, "llama.attention.head_count_kv", shape->n_kv);
    raw_key_u32(&r, "llama.expert_count", shape->n_expert);
    off = put_stack(&r, "token_embd.weight", 0, off);
    if (shape->has_output)
        off = put_stack(&r, "output.weight", 0, off);
    for (int layer = N_LAYERS - 1; layer >= 0; layer--) /* the order in the file is nobody's business */
        for (int kind = 0; kind < 7; kind++) {
            bool is_stack = kind >= 4 && shape->n_expert;
            snprintf(name, sizeof name, "blk.%d.%s%s.weight", layer, kinds[kind], is_stack ? "_exps" : "");
            off = put_stack(&r, name, is_stack ? shape->n_expert : 0, off);
        }
    unsigned char *all = calloc(1, r.n + off + 64);
    memcpy(all, r.p, r.n);
    memfile_add(&files, "s.gguf", all, r.n + off + 64);
    int rc = gguf_open("s.gguf", &ops, &g);
    ck_assert_msg(!rc, "%s", err_text());
    free(all);
    return g;
}

static enum quant_type type_of_letter(char letter)
{
    static const char letters[] = "fhb234568pqrsnxm";
    static const enum quant_type types[] = {QUANT_F32,  QUANT_F16,    QUANT_BF16,   QUANT_Q2_K, QUANT_Q3_K, QUANT_Q4_K,
                                            QUANT_Q5_K, QUANT_Q6_K,   QUANT_Q8_0,   QUANT_Q4_0, QUANT_Q4_1, QUANT_Q5_0,
                                            QUANT_Q5_1, QUANT_IQ4_NL, QUANT_IQ4_XS, QUANT_MXFP4};
    const char *at = strchr(letters, letter);

    ck_assert_ptr_nonnull(at);
    return types[at - letters];
}

static void must_choose(const struct gguf *g, const char *type, int weighted, const char *kind, const char *letters)
{
    struct recipe_choice choices[N_LAYERS * 7 + 2];
    struct recipe_options options = {.has_imatrix = weighted};

    ck_assert_int_eq(recipe_choose(recipe_find(type), g, &options, choices), 0);
    for (size_t layer = 0; layer < strlen(letters); layer++) {
        char name[80];
        if (strlen(letters) == 1)
            snprintf(name, sizeof name, "%s.weight", kind);
        else
            snprintf(name, sizeof name, "blk.%zu.%s.weight", layer, kind);
        const struct gguf_tensor *t = gguf_find_tensor(g, name);
        ck_assert_msg(t != NULL, "no tensor %s", name);
        enum quant_type got = choices[t - gguf_tensor(g, 0)].type, want = type_of_letter(letters[layer]);
        ck_assert_msg(got == want, "%s, importance %d, %s: %s, llama-quantize has %s", type, weighted, name,
                      quant_info((int)got)->name, quant_info((int)want)->name);
    }
}

START_TEST(mixture_is_another_than_llama_quantize_makes)
{
    struct gguf *g = open_shape(&shapes[_i]);
    FILE *f = fopen(TEST_DATA_DIR "/quantize/types", "r");
    char model[16], type[16], kind[32], letters[64];
    int weighted, n = 0;

    ck_assert_ptr_nonnull(f);
    while (fscanf(f, "%15s %15s %d %31s %63s", model, type, &weighted, kind, letters) == 5) {
        if (strcmp(model, shapes[_i].name) != 0)
            continue;
        must_choose(g, type, weighted, kind, letters);
        n++;
    }
    fclose(f);
    gguf_close(g);
    ck_assert_int_ge(n, 20 * 2 * 8);
}
END_TEST

START_TEST(recipe_is_not_found_or_twice)
{
    for (int i = 0; recipe_at(i); i++)
        ck_assert_ptr_eq(recipe_find(recipe_at(i)->name), recipe_at(i));
    ck_assert_ptr_eq(recipe_find("q4_k_m"), recipe_find("Q4_K_M"));
    ck_assert_int_eq(recipe_find("Q4_K")->file_type, recipe_find("Q4_K_M")->file_type);
    ck_assert_ptr_null(recipe_find("Q4"));
    ck_assert_ptr_null(recipe_at(-1));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("recipe");
    TCase *t = tcase_create("recipe");

    tcase_add_loop_test(t, mixture_is_another_than_llama_quantize_makes, 0, 4);
    tcase_add_test(t, recipe_is_not_found_or_twice);
    suite_add_tcase(s, t);
    return run_suite(s);
}
