/* Whole engines whose GPU the emulated runtime plays, on the tiny models of tests/data/models: no bit of the logits may differ
 * from the CPU's, no word of a greedy answer, and nothing may be left over. */
#include "src/ferry.h"

#include "src/base/err.h"
#include "tests/emu/emu.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_TOK = 150, PREFILL = 130, N_VOCAB = 288, N_NEW = 64 };

static const char *const models[] = {"llama",    "mixed",    "gemma2",  "gemma3", "qwen3",
                                     "qwen2moe", "qwen3moe", "mixtral", "dots1",  "olmoe"};
enum { N_MODELS = sizeof models / sizeof *models };

static int32_t ids[N_TOK];

static void setup(void)
{
    FILE *f = fopen(TEST_DATA_DIR "/models/ids.txt", "r");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_TOK; i++)
        ck_assert_int_eq(fscanf(f, "%d", &ids[i]), 1);
    fclose(f);
    emu_reset(1);
}

static struct ferry_engine_opts opts_of(const char *device)
{
    struct ferry_engine_opts o;
    ferry_engine_opts_init(&o);
    o.n_ctx = 256;
    o.n_threads = 1;
    o.n_out = 16;
    o.chunk_tok = 64;
    o.n_sessions = 2;
    o.no_pin = true;
    o.io = "pread";
    o.device = device;
    return o;
}

static int try_open(const char *name, const struct ferry_engine_opts *o, struct ferry_engine **e)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    return ferry_engine_open(path, o, e);
}

static struct ferry_engine *open_with(const char *name, const struct ferry_engine_opts *o)
{
    struct ferry_engine *e;
    ck_assert_msg(try_open(name, o, &e) == 0, "%s: %s", name, ferry_error());
    return e;
}

static struct ferry_session *session_of(struct ferry_engine *e)
{
    struct ferry_session *s = NULL;
    ck_assert_msg(ferry_session_make(e, NULL, &s) == 0, "%s", ferry_error());
    return s;
}

/* Logits of ids: the first PREFILL as a prompt, the rest one by one. Caller frees. */
static float *logits_of(const char *name, const struct ferry_engine_opts *o)
{
    float *out = malloc(sizeof(float) * N_TOK * N_VOCAB);
    struct ferry_engine *e = open_with(name, o);
    struct ferry_session *s = session_of(e);

    emu_in_step(true);
    ck_assert_msg(ferry_session_logits(s, ids, PREFILL, true, out) == 0, "%s", ferry_error());
    ck_assert_msg(ferry_session_logits(s, ids + PREFILL, N_TOK - PREFILL, false, out + PREFILL * N_VOCAB) == 0, "%s",
                  ferry_error());
    emu_in_step(false);
    ferry_session_free(s);
    ferry_engine_close(e);
    return out;
}

static void must_equal(const float *want, const float *got, const char *name)
{
    for (int i = 0; i < N_TOK * N_VOCAB; i++)
        ck_assert_msg(memcmp(&want[i], &got[i], sizeof *want) == 0, "%s: row %d, logit %d: %.9g instead of %.9g", name,
                      i / N_VOCAB, i % N_VOCAB, (double)got[i], (double)want[i]);
}

START_TEST(logits_differ_from_the_cpus)
{
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");
    float *want = logits_of(models[_i], &cpu);

    ck_assert_uint_eq(emu_n_launches(), 0);
    float *got = logits_of(models[_i], &gpu);
    ck_assert_uint_gt(emu_n_launches(), N_TOK - PREFILL); /* it was the GPU */
    must_equal(want, got, models[_i]);
    ck_assert_int_eq(emu_n_live(), 0);
    free(got);
    free(want);
}
END_TEST

START_TEST(logits_with_a_q8_0_cache_differ)
{
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");
    cpu.kv_type = gpu.kv_type = "q8_0";
    gpu.chunk_tok = gpu.n_out = 7;
    float *want = logits_of("gemma3", &cpu), *got = logits_of("gemma3", &gpu);

    must_equal(want, got, "gemma3");
    free(got);
    free(want);
}
END_TEST

/* Prompt rows by tensor cores: each layer's products lose 2^-10 of their magnitude, 2 products deep in each of a few layers;
 * the average over the rows is far below the worst. */
START_TEST(prompt_by_tensor_cores_loses_the_thread)
{
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");
    gpu.prefill = "blas";
    float *want = logits_of("mixed", &cpu), *got = logits_of("mixed", &gpu);
    double sum_sq = 0, diff_sq = 0;

    for (int i = 0; i < N_TOK * N_VOCAB; i++) {
        sum_sq += (double)want[i] * (double)want[i];
        diff_sq += ((double)want[i] - (double)got[i]) * ((double)want[i] - (double)got[i]);
    }
    ck_assert_msg(diff_sq > 0, "the option changed nothing");
    ck_assert_msg(sqrt(diff_sq / sum_sq) < 0.03, "relative error %g", sqrt(diff_sq / sum_sq));
    free(got);
    free(want);
}
END_TEST

/* Greedy tokens after the first 20 ids, from a session and from one that was forked off it in the middle. */
static void words_of(const char *name, const char *device, int32_t words[2 * N_NEW])
{
    struct ferry_engine_opts o = opts_of(device);
    struct ferry_engine *e = open_with(name, &o);
    struct ferry_sample_opts greedy;
    struct ferry_session *s, *fork;

    ferry_sample_opts_init(&greedy);
    greedy.temperature = 0;
    ck_assert_int_eq(ferry_session_make(e, &greedy, &s), 0);
    emu_in_step(true);
    ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
    for (int i = 0; i < N_NEW / 2; i++)
        ck_assert_msg(ferry_session_step(s, &words[i]) == 0, "%s", ferry_error());
    ck_assert_int_eq(ferry_session_fork(s, &fork), 0);
    for (int i = N_NEW / 2; i < N_NEW; i++) { /* both write into a page that they share */
        ck_assert_int_eq(ferry_session_step(s, &words[i]), 0);
        ck_assert_int_eq(ferry_session_step(fork, &words[N_NEW + i]), 0);
    }
    emu_in_step(false);
    ferry_session_free(fork);
    ferry_session_free(s);
    ferry_engine_close(e);
}

START_TEST(greedy_words_differ)
{
    static const char *const names[] = {"llama", "mixtral"};
    int32_t want[2 * N_NEW] = {0}, got[2 * N_NEW] = {0};

    words_of(names[_i], "cpu", want);
    words_of(names[_i], "cuda:0", got);
    ck_assert_mem_eq(want, got, sizeof want);
    ck_assert_mem_eq(got + N_NEW / 2, got + N_NEW + N_NEW / 2, N_NEW / 2 * sizeof *got);
}
END_TEST

START_TEST(another_order_of_streams_and_threads_changes_bits)
{
    struct ferry_engine_opts gpu = opts_of("cuda:0");
    float *want = logits_of("qwen2moe", &gpu);

    for (uint64_t seed = 2; seed < 4; seed++) {
        emu_seed(seed);
        float *got = logits_of("qwen2moe", &gpu);
        must_equal(want, got, "qwen2moe");
        free(got);
    }
    free(want);
}
END_TEST

/* ---- when it does not fit, or fails ---- */

START_TEST(too_little_memory_leaves_something)
{
    struct ferry_engine_opts gpu = opts_of("cuda:0");
    struct ferry_engine *e = open_with("llama", &gpu);
    size_t bytes = emu_device_bytes();

    ferry_engine_close(e);
    for (int i = 0; i < 8; i++) {
        emu_set_vram(bytes * (size_t)i / 8);
        ck_assert_int_eq(try_open("llama", &gpu, &e), FERRY_ERR_NOMEM);
        ck_assert_ptr_null(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
    emu_set_vram(bytes);
    ferry_engine_close(open_with("llama", &gpu));
}
END_TEST

START_TEST(failed_call_at_open_leaves_something)
{
    struct ferry_engine_opts gpu = opts_of("cuda:0");
    int rc = -1;

    for (int n = 1; rc < 0; n++) {
        struct ferry_engine *e;
        emu_fail_nth(n);
        rc = try_open("mixtral", &gpu, &e);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == FERRY_ERR_NOMEM || rc == FERRY_ERR_DEVICE);
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
}
END_TEST

/* Every call of a step in turn; the session then goes on as if nothing had been. */
START_TEST(failed_call_in_a_step_spoils_the_session)
{
    struct ferry_engine_opts gpu = opts_of("cuda:0");
    struct ferry_engine *e = open_with("mixtral", &gpu);
    struct ferry_session *s = session_of(e);
    float want[N_VOCAB], got[N_VOCAB];
    int rc = -1, n = 1;

    ck_assert_int_eq(ferry_session_append(s, ids, 10, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids + 10, 1, false, want), 0);
    size_t len = ferry_session_n_tokens(s) - 1;
    for (; rc < 0; n++) {
        ck_assert_int_eq(ferry_session_truncate(s, len), 0);
        emu_fail_nth(n);
        rc = ferry_session_logits(s, ids + 10, 1, false, got);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == FERRY_ERR_DEVICE);
    }
    ck_assert_mem_eq(want, got, sizeof want);
    ck_assert_int_gt(n, 30); /* launches of a few layers */
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* Embeddings of two prompts together, (2, MOST_EMBD); the nth call of their steps fails, which has to be told once and to change
 * nothing. 0: none. false: there were not so many calls. */
enum { MOST_EMBD = 64 };

static bool embed_two(const char *device, int nth, float *out)
{
    struct ferry_engine_opts o = opts_of(device);
    struct ferry_batch *b = NULL;
    struct ferry_request q;
    uint64_t first = 0, id;
    int n_told = 0, n_done = 0;

    o.n_batch = 2;
    struct ferry_engine *e = open_with("qwen3moe", &o);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    ferry_request_init(&q);
    q.tokens = ids;
    for (int i = 0; i < 2; i++) {
        q.n_tokens = i ? 30 : 101; /* more than are copied at once */
        q.pooling = i ? FERRY_POOLING_LAST : FERRY_POOLING_MEAN;
        ck_assert_int_eq(ferry_batch_submit(b, &q, &id), 0);
        first = i ? first : id;
    }
    emu_fail_nth(nth);
    while (n_done < 2) {
        struct ferry_answer *a = NULL;
        int rc = ferry_batch_poll(b, &a);
        ck_assert(rc == 0 || rc == FERRY_ERR_DEVICE);
        n_told += rc < 0;
        if (!a)
            continue;
        ck_assert_int_eq(a->finish, FERRY_FINISH_POOLED);
        ck_assert_uint_le(a->n_embd, MOST_EMBD);
        memcpy(out + (a->id - first) * MOST_EMBD, a->embedding, a->n_embd * sizeof *out);
        ferry_answer_free(a);
        n_done++;
    }
    emu_fail_nth(0);
    ferry_batch_free(b);
    ferry_engine_close(e);
    ck_assert_int_le(n_told, 1);
    return n_told == 1;
}

START_TEST(embedding_differs_from_the_cpus)
{
    float want[2 * MOST_EMBD] = {0}, got[2 * MOST_EMBD] = {0};
    int n = 1;

    embed_two("cpu", 0, want);
    embed_two("cuda:0", 0, got);
    ck_assert_mem_eq(want, got, sizeof want);
    for (bool failed = true; failed; n += 7) { /* each takes a whole run: not every call */
        memset(got, 0, sizeof got);
        failed = embed_two("cuda:0", n, got);
        ck_assert_mem_eq(want, got, sizeof want);
    }
    ck_assert_int_gt(n, 30);
}
END_TEST

START_TEST(what_a_gpu_cannot_have_is_taken)
{
    struct ferry_engine_opts o = opts_of("cuda:0");
    struct ferry_engine *e;

    o.io = "mmap";
    ck_assert_int_eq(try_open("llama", &o, &e), FERRY_ERR_UNSUPPORTED);
    o = opts_of("cuda:1");
    ck_assert_int_eq(try_open("llama", &o, &e), FERRY_ERR_DEVICE);
    static const char *const wrong[] = {"cuda", "cuda:", "cuda:x", "cuda:0x", "gpu", ""};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        o = opts_of(wrong[i]);
        ck_assert_int_eq(try_open("llama", &o, &e), FERRY_ERR_ARG);
    }
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_session");
    TCase *tc = tcase_create("cuda_session");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 240);
    tcase_add_loop_test(tc, logits_differ_from_the_cpus, 0, N_MODELS);
    tcase_add_test(tc, logits_with_a_q8_0_cache_differ);
    tcase_add_test(tc, prompt_by_tensor_cores_loses_the_thread);
    tcase_add_loop_test(tc, greedy_words_differ, 0, 2);
    tcase_add_test(tc, another_order_of_streams_and_threads_changes_bits);
    tcase_add_test(tc, too_little_memory_leaves_something);
    tcase_add_test(tc, failed_call_at_open_leaves_something);
    tcase_add_test(tc, failed_call_in_a_step_spoils_the_session);
    tcase_add_test(tc, embedding_differs_from_the_cpus);
    tcase_add_test(tc, what_a_gpu_cannot_have_is_taken);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
