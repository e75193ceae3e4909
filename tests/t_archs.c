/* Every family of models, from the file to the logits, through the public interface: small models with random weights
 * against what the float reference (tests/reference) says about them. tests/mkmodel.py makes both. */
#include "src/ferry.h"

#include <check.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TOK = 24, N_VOCAB = 288, N_PREFILL = 16 };

/* Weights are the same numbers on both sides; what differs is the order of float sums, and here and there a key or value
 * that the order tips over to the neighbouring half-precision number: 2^-11 of it. Such slips are few and average out; 64 of
 * them in a row, all one way, are what a logit (largest 12) is allowed. A wrong bias, scale or angle is off by tenths. */
#define TOLERANCE (12.0f * 64.0f / 2048.0f / 32.0f)

static const char *const families[] = {
    "llama", "llama-bias-linear", "llama-yarn", "llama-moe", "llama-scaled", "qwen2", "qwen3", "qwen3moe", "olmoe",
    "gemma2", "gemma3",
};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

static char *path_of(const char *name, const char *ending, char *buf, size_t n)
{
    snprintf(buf, n, "%s/archs/%s%s", TEST_DATA_DIR, name, ending);
    return buf;
}

static void read_ids(int32_t ids[N_TOK])
{
    char path[4096];
    FILE *f = fopen(path_of("ids", ".txt", path, sizeof path), "r");

    ck_assert_msg(f != NULL, "%s is missing", path);
    for (int i = 0; i < N_TOK; i++)
        ck_assert_int_eq(fscanf(f, "%d", &ids[i]), 1);
    fclose(f);
}

static float *read_expected(const char *name)
{
    char path[4096];
    float *out = malloc(sizeof *out * N_TOK * N_VOCAB);
    FILE *f = fopen(path_of(name, ".f32", path, sizeof path), "rb");

    ck_assert_msg(f != NULL, "%s is missing", path);
    ck_assert_uint_eq(fread(out, sizeof *out, N_TOK * N_VOCAB, f), N_TOK * N_VOCAB);
    fclose(f);
    return out;
}

/* Logits (N_TOK, N_VOCAB): n_prefill ids as a prompt, the others one by one. */
static float *run(const char *name, size_t n_prefill, uint32_t chunk_tok)
{
    char path[4096];
    int32_t ids[N_TOK];
    float *out = malloc(sizeof *out * N_TOK * N_VOCAB);
    struct ferry_engine_opts opts;
    struct ferry_engine *engine = NULL;
    struct ferry_session *session = NULL;

    read_ids(ids);
    ferry_engine_opts_init(&opts);
    opts.n_ctx = 64;
    opts.n_threads = 2;
    opts.n_out = N_TOK;
    opts.chunk_tok = chunk_tok;
    ck_assert_msg(!ferry_engine_open(path_of(name, ".gguf", path, sizeof path), &opts, &engine), "%s", ferry_error());
    ck_assert_msg(!ferry_session_make(engine, NULL, &session), "%s", ferry_error());
    ck_assert_msg(!ferry_session_logits(session, ids, n_prefill, true, out), "%s", ferry_error());
    if (n_prefill < N_TOK)
        ck_assert_msg(!ferry_session_logits(session, ids + n_prefill, N_TOK - n_prefill, false, out + n_prefill * N_VOCAB),
                      "%s", ferry_error());
    ferry_session_free(session);
    ferry_engine_close(engine);
    return out;
}

START_TEST(a_family_computes_something_else)
{
    const char *name = families[_i];
    float *got = run(name, N_PREFILL, 0), *want = read_expected(name);

    for (int i = 0; i < N_TOK * N_VOCAB; i++)
        ck_assert_msg(fabsf(got[i] - want[i]) <= TOLERANCE, "%s: token %d, logit %d: %.6f, the reference says %.6f", name,
                      i / N_VOCAB, i % N_VOCAB, (double)got[i], (double)want[i]);
    free(want);
    free(got);
}
END_TEST

START_TEST(logits_depend_on_the_cut_of_the_prompt)
{
    const char *name = families[_i];
    float *whole = run(name, N_TOK, 0), *cut = run(name, N_PREFILL, 5), *single = run(name, 1, 0);

    ck_assert_msg(!memcmp(whole, cut, sizeof *whole * N_TOK * N_VOCAB), "%s: chunks of 5", name);
    ck_assert_msg(!memcmp(whole, single, sizeof *whole * N_TOK * N_VOCAB), "%s: one by one", name);
    free(single);
    free(cut);
    free(whole);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("archs");
    TCase *tcase = tcase_create("families");
    SRunner *runner;
    int n_failed;

    tcase_set_timeout(tcase, 60);
    tcase_add_loop_test(tcase, a_family_computes_something_else, 0, N_FAMILIES);
    tcase_add_loop_test(tcase, logits_depend_on_the_cut_of_the_prompt, 0, N_FAMILIES);
    suite_add_tcase(suite, tcase);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
