/* Whole engines on the tiny models of tests/data/models (tests/mkmodel.py): logits against llama.cpp's, and the promise
 * that no bit of them depends on threads, instruction set, cuts, company or placement. */
#include "cpu/cpu.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry.h"
#include "src/model/slot_shape.h"
#include "tests/profile_maker.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <inttypes.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { N_TOK = 150, PREFILL = 130, N_VOCAB = 288 };

/* The float reference does not know the last two. */
static const char *const families[] = {"llama",           "llama-linear",   "llama-scaled",  "llama-yarn",
                                       "mixtral",         "qwen2",          "qwen3",         "qwen3moe",
                                       "olmoe",           "gemma2",         "gemma3",        "gpt-oss",
                                       "dots1",           "glm4moe",        "minimax-m2",    "ernie4_5",
                                       "ernie4_5-moe",    "hunyuan-dense",  "hunyuan-moe",   "seed_oss",
                                       "smollm3",         "qwen2vl",        "qwen3vl",       "qwen3vlmoe",
                                       "deepseek2",       "deepseek2-lite", "deepseek2-old", "deepseek2-old-dense",
                                       "deepseek2-dense", "bailingmoe2",    "qwen3next",     "qwen3next-in",
                                       "qwen35",          "qwen35moe",      "qwen2moe",      "granite"};
enum { N_FAMILIES = sizeof families / sizeof *families, N_REFERENCE = N_FAMILIES - 2 };

static int32_t ids[N_TOK];

static void setup(void)
{
    FILE *f = fopen(TEST_DATA_DIR "/models/ids.txt", "r");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_TOK; i++)
        ck_assert_int_eq(fscanf(f, "%d", &ids[i]), 1);
    fclose(f);
}

static const char *model_path(const char *name)
{
    static char path[1024];
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    return path;
}

static struct ferry_engine_opts small_opts(void)
{
    struct ferry_engine_opts o;
    ferry_engine_opts_init(&o);
    o.n_ctx = 256;
    o.n_threads = 1;
    o.n_out = 16;
    o.chunk_tok = 64;
    o.no_pin = true;
    o.io = "pread";
    return o;
}

static struct ferry_engine *open_with(const char *name, const struct ferry_engine_opts *o)
{
    struct ferry_engine *e = NULL;
    ck_assert_msg(ferry_engine_open(model_path(name), o, &e) == 0, "%s: %s", name, ferry_error());
    return e;
}

static struct ferry_session *session_of(struct ferry_engine *e)
{
    struct ferry_session *s = NULL;
    ck_assert_msg(ferry_session_make(e, NULL, &s) == 0, "%s", ferry_error());
    return s;
}

/* Logits (N_TOK, N_VOCAB) of ids: the first n_prefill as a prompt, the rest one by one. Caller frees. */
static float *logits_of(const char *name, const struct ferry_engine_opts *o, size_t n_prefill)
{
    float *out = malloc(sizeof(float) * N_TOK * N_VOCAB);
    struct ferry_engine *e = open_with(name, o);
    struct ferry_session *s = session_of(e);
    ck_assert_msg(ferry_session_logits(s, ids, n_prefill, true, out) == 0, "%s", ferry_error());
    ck_assert_msg(ferry_session_logits(s, ids + n_prefill, N_TOK - n_prefill, false, out + n_prefill * N_VOCAB) == 0,
                  "%s", ferry_error());
    ferry_session_free(s);
    ferry_engine_close(e);
    return out;
}

/* ---- against the outside ---- */

/* Largest difference from the rows that another program wrote, as a share of their spread. */
static double distance(const char *name, const char *suffix, const float *got)
{
    static const int rows[] = {0, 1, 63, 64, 127, 129, 130, 149};
    enum { N_ROWS = sizeof rows / sizeof *rows };
    static float want[N_ROWS * N_VOCAB];
    char path[1024];
    snprintf(path, sizeof path, "%s/models/%s.%s", TEST_DATA_DIR, name, suffix);
    FILE *f = fopen(path, "rb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fread(want, sizeof(float), N_ROWS * N_VOCAB, f), N_ROWS * N_VOCAB);
    fclose(f);

    double sum_sq = 0, worst = 0;
    for (int i = 0; i < N_ROWS * N_VOCAB; i++)
        sum_sq += (double)want[i] * want[i];
    for (int r = 0; r < N_ROWS; r++)
        for (int v = 0; v < N_VOCAB; v++)
            worst = fmax(worst, fabs((double)want[r * N_VOCAB + v] - got[rows[r] * N_VOCAB + v]));
    return worst / sqrt(sum_sq / (N_ROWS * N_VOCAB));
}

/* The reference is float32 in another order with the same f16 cache. A last-bit difference before the cache may flip the
 * rounding of a key or value, 2^-11 of it; a handful of flips, each weighed by its share of attention, reach 2^-10 of the spread.
 * llama.cpp's single-row attention also sums values in f16: up to 150 roundings of 2^-12, partly cancelling, so sqrt(150) *
 * 2^-12 * 7 layers = 2 %. */
START_TEST(logits_differ_from_those_of_outside_programs)
{
    struct ferry_engine_opts o = small_opts();
    float *got = logits_of(families[_i], &o, PREFILL);
    double reference = _i < N_REFERENCE ? distance(families[_i], "reference", got) : 0;
    double peer = distance(families[_i], "peer", got);
    ck_assert_msg(reference <= 0x1p-10, "%s: off by %g of the spread of the float reference's logits", families[_i],
                  reference);
    ck_assert_msg(peer <= 0.02, "%s: off by %g of the spread of llama.cpp's logits", families[_i], peer);
    free(got);
}
END_TEST

/* ---- no bit depends on ... ---- */

static const char *const exact_models[] = {"mixed", "gemma3", "qwen2moe", "llama-yarn", "qwen3next", "qwen35moe"};
enum { N_EXACT = sizeof exact_models / sizeof *exact_models };

static void must_equal(const float *a, const float *b, const char *model, const char *what)
{
    for (int i = 0; i < N_TOK * N_VOCAB; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            ck_abort_msg("%s, %s: row %d, logit %d: %.9g is not %.9g", model, what, i / N_VOCAB, i % N_VOCAB, a[i],
                         b[i]);
}

START_TEST(bits_depend_on_threads_cuts_isa_or_io)
{
    const char *name = exact_models[_i];
    struct ferry_engine_opts base = small_opts();
    float *want = logits_of(name, &base, PREFILL);
    static const uint32_t threads[] = {2, 3, 5};
    for (size_t i = 0; i < 3; i++) {
        struct ferry_engine_opts o = base;
        o.n_threads = threads[i];
        float *got = logits_of(name, &o, PREFILL);
        must_equal(want, got, name, "more threads");
        free(got);
    }
    static const uint32_t chunks[] = {1, 7, 33, 150};
    for (size_t i = 0; i < 4; i++) {
        struct ferry_engine_opts o = base;
        o.chunk_tok = chunks[i];
        o.n_out = chunks[i];
        float *got = logits_of(name, &o, i == 0 ? 1 : N_TOK);
        must_equal(want, got, name, "other cuts");
        free(got);
    }
    struct ferry_engine_opts o = base;
    o.isa = "ref";
    float *got = logits_of(name, &o, PREFILL);
    must_equal(want, got, name, "plain C");
    free(got);
    o = base;
    o.io = "mmap";
    got = logits_of(name, &o, PREFILL);
    must_equal(want, got, name, "mapped weights");
    free(got);
    free(want);
}
END_TEST

static const char *const streamed_models[] = {"mixed",         "qwen3moe",      "mixtral",    "dots1",
                                              "gpt-oss",       "gpt-oss-mxfp4", "glm4moe",    "minimax-m2",
                                              "ernie4_5-moe",  "hunyuan-moe",   "qwen3vlmoe", "deepseek2",
                                              "deepseek2-old", "bailingmoe2",   "qwen3next",  "qwen35moe"};
enum { N_STREAMED = sizeof streamed_models / sizeof *streamed_models };

/* Bytes of the fewest expert slots that a plan may have; of as many as that, if ram_bytes is more. */
static uint64_t slots_of(const char *name, uint64_t ram_bytes)
{
    struct model *m = NULL;
    struct slot_shape shape;
    ck_assert_int_eq(model_open(model_path(name), NULL, &m), 0);
    ck_assert_int_eq(slot_shape_init(m, NULL, ram_bytes, &shape), 0);
    uint64_t bytes = shape.bytes;
    slot_shape_done(&shape);
    model_close(m);
    return bytes;
}

static uint64_t least_slots(const char *name)
{
    return slots_of(name, 0);
}

/* From the fewest slots (each layer's loan turns them over several times) to most of all. */
START_TEST(bits_depend_on_experts_being_read_when_wanted)
{
    static const char *const ios[] = {"pread", "uring"};
    const char *name = streamed_models[_i];
    struct ferry_engine_opts o = small_opts();
    float *want = logits_of(name, &o, PREFILL);
    uint64_t least = least_slots(name);
    for (int k = 0; k < 6; k++) {
        o.io = ios[k % 2];
        o.expert_ram_bytes = k / 2 == 2 ? slots_of(name, UINT32_MAX) * 3 / 4 : least + least * (uint64_t)(k / 2);
        o.n_threads = (uint32_t)(1 + k / 2);
        struct ferry_engine *e = NULL;
        int rc = ferry_engine_open(model_path(name), &o, &e);
        if (k % 2 && rc == FERRY_ERR_UNSUPPORTED)
            continue; /* no io_uring here; t_ring is skipped and says so */
        ck_assert_msg(rc == 0, "%s", ferry_error());
        ferry_engine_close(e);
        float *got = logits_of(name, &o, PREFILL);
        must_equal(want, got, name, o.io);
        free(got);
    }
    free(want);
}
END_TEST

START_TEST(look_ahead_changes_words_or_reads_nothing)
{
    enum { N_NEW = 40 };
    struct ferry_engine_opts o = small_opts();
    struct ferry_stats st;
    int32_t words[2][N_NEW];
    for (int k = 0; k < 2; k++) {
        struct ferry_engine *e = NULL;
        o.io = k ? "uring" : "pread";
        o.expert_ram_bytes = k ? slots_of("qwen3moe", UINT32_MAX) * 3 / 4 : 0;
        int rc = ferry_engine_open(model_path("qwen3moe"), &o, &e);
        if (k && rc == FERRY_ERR_UNSUPPORTED)
            return; /* no io_uring here; t_ring is skipped and says so */
        ck_assert_msg(rc == 0, "%s", ferry_error());
        struct ferry_session *s = session_of(e);
        ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
        for (int i = 0; i < N_NEW; i++)
            ck_assert_msg(ferry_session_step(s, &words[k][i]) == 0, "%s", ferry_error());
        ferry_session_stats(s, &st);
        ferry_session_free(s);
        ferry_engine_close(e);
    }
    ck_assert_int_eq(memcmp(words[0], words[1], sizeof words[0]), 0);
    ck_assert_uint_gt(st.expert_hits, 0);
    ck_assert_uint_gt(st.expert_misses, 0);
    ck_assert_uint_gt(st.hint_reads, 0);
    ck_assert_uint_le(st.hint_hits, st.hint_reads);
}
END_TEST

/* A clock that a thing looked at a moment later finds 20 ms on. */
static uint64_t hasty(void)
{
    static uint64_t now_ns = 1000000000;
    return __atomic_add_fetch(&now_ns, 20000000, __ATOMIC_RELAXED);
}

/* k 0: everything in memory, nothing predicted; 1: slots for three quarters of the experts, and predictions that are wrong. NULL: no
 * io_uring here; t_ring is skipped and says so. */
static struct ferry_engine *open_for_trials(int k, uint32_t n_batch, const char *profile)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_engine *e = NULL;

    o.n_batch = n_batch;
    o.io = k ? "uring" : "pread";
    o.expert_ram_bytes = k ? slots_of("qwen3moe", UINT32_MAX) * 3 / 4 : 0;
    o.profile_path = k ? profile : NULL;
    int rc = ferry_engine_open(model_path("qwen3moe"), &o, &e);
    ck_assert_msg(rc == 0 || (k && rc == FERRY_ERR_UNSUPPORTED), "%s", ferry_error());
    return e;
}

/* Trials change how experts are read at every few tokens, and no word. */
START_TEST(trials_change_words)
{
    enum { N_NEW = 40, N_ROUNDS = 60 };
    const char profile[] = TEST_BUILD_DIR "/t_session-profile";
    static int32_t words[2][N_NEW];
    char text[1024] = "";

    write_profile(profile, model_path("qwen3moe"));
    for (int k = 0; k < 2; k++) {
        struct ferry_engine *e = open_for_trials(k, 0, profile);
        if (!e)
            break;
        clock_pretend(k ? hasty : NULL);
        struct ferry_session *s = session_of(e);
        for (int round = 0; round < (k ? N_ROUNDS : 1); round++) {
            ck_assert_int_eq(ferry_session_truncate(s, 0), 0);
            ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
            for (int i = 0; i < N_NEW; i++)
                ck_assert_msg(ferry_session_step(s, &words[k][i]) == 0, "%s", ferry_error());
            ck_assert_int_eq(memcmp(words[0], words[k], sizeof words[0]), 0);
        }
        clock_pretend(NULL);
        ferry_engine_refit(e, text, sizeof text);
        ferry_session_free(s);
        ferry_engine_close(e);
        ck_assert_msg(!k || strstr(text, "; tried") != NULL, "%s", text);
    }
    unlink(profile);
}
END_TEST

/* Answers of a batch of equally long ones, all of whose steps but the first are full: (n) each. */
static void run_batch(struct ferry_engine *e, int n_new, int32_t *words, char *review, size_t review_bytes)
{
    enum { N_SEQ = 4 };
    struct ferry_batch *b = NULL;
    uint64_t id[N_SEQ];

    ck_assert_msg(ferry_batch_make(e, &b) == 0, "%s", ferry_error());
    for (int i = 0; i < N_SEQ; i++) {
        struct ferry_request q;
        ferry_request_init(&q);
        q.tokens = ids + 5 * i;
        q.n_tokens = 10;
        q.max_tokens = (uint32_t)n_new;
        q.ignore_eos = true;
        ck_assert_msg(ferry_batch_submit(b, &q, &id[i]) == 0, "%s", ferry_error());
    }
    for (int n = 0; n < N_SEQ;) {
        struct ferry_answer *a = NULL;
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        for (int i = 0; a && i < N_SEQ; i++)
            if (a->id == id[i]) {
                ck_assert_uint_eq(a->n_tokens, (size_t)n_new);
                memcpy(words + i * n_new, a->tokens, (size_t)n_new * sizeof *words);
                n++;
            }
        ferry_answer_free(a);
    }
    ferry_batch_review(b, review, review_bytes);
    ferry_batch_free(b);
}

/* The same in a batch, where full steps are held against the plan of it. */
START_TEST(trials_in_a_batch_change_words)
{
    enum { N_NEW = 100, N_ROUNDS = 20 };
    const char profile[] = TEST_BUILD_DIR "/t_session-batch-profile";
    static int32_t words[2][4 * N_NEW];
    char text[1024] = "", review[1024] = "";

    write_profile(profile, model_path("qwen3moe"));
    for (int k = 0; k < 2; k++) {
        struct ferry_engine *e = open_for_trials(k, 4, profile);
        if (!e)
            break;
        clock_pretend(k ? hasty : NULL);
        for (int round = 0; round < (k ? N_ROUNDS : 1); round++) {
            run_batch(e, N_NEW, words[k], review, sizeof review);
            ck_assert_int_eq(memcmp(words[0], words[k], sizeof words[0]), 0);
        }
        clock_pretend(NULL);
        ferry_engine_refit(e, text, sizeof text);
        ferry_engine_close(e);
        ck_assert_msg(!k || strstr(text, "; tried") != NULL, "%s", text);
        ck_assert_msg(k ? strstr(review, "predicted ") != NULL : !review[0], "%s", review);
    }
    unlink(profile);
}
END_TEST

/* Sums over a written timeline: bytes of reads that ended, and spans by name. */
static uint64_t sum_timeline(const char *path, int *n_reads, int *n_steps)
{
    char line[512];
    uint64_t sum = 0, bytes;
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    *n_reads = *n_steps = 0;
    while (fgets(line, sizeof line, f)) {
        const char *at = strstr(line, "\"bytes\":");
        *n_steps += strstr(line, "\"name\":\"step\"") != NULL;
        if (at && sscanf(at, "\"bytes\":%" SCNu64, &bytes) == 1) {
            ++*n_reads;
            sum += bytes;
        }
    }
    fclose(f);
    return sum;
}

static uint64_t count_wanted(const char *path, int *n_steps)
{
    int c, before = '\n';
    uint64_t n_blanks = 0, n_marks = 0;
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    *n_steps = 0;
    for (; (c = fgetc(f)) != EOF; before = c) {
        n_blanks += c == ' ';
        *n_steps += before == '\n' && c == 's';
    }
    n_marks = (uint64_t)*n_steps;
    fclose(f);
    return n_blanks - n_marks;
}

/* Every read and every wanted expert that the counters know stands in the traces, and no other. */
START_TEST(traces_tell_other_things_than_the_counters)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_engine *e = NULL;
    struct ferry_stats st;
    int n_reads, n_steps;
    int32_t token;
    char timeline[] = TEST_BUILD_DIR "/t_session-timeline", wanted[] = TEST_BUILD_DIR "/t_session-wanted";
    o.expert_ram_bytes = least_slots("qwen3moe") * 2;
    o.trace = o.trace_experts = true;
    ck_assert_msg(ferry_engine_open(model_path("qwen3moe"), &o, &e) == 0, "%s", ferry_error());
    struct ferry_session *s = session_of(e);
    ck_assert_int_eq(ferry_session_append(s, ids, 5, NULL, NULL), 0);
    for (int i = 0; i < 10; i++)
        ck_assert_int_eq(ferry_session_step(s, &token), 0);
    ferry_session_stats(s, &st);
    ck_assert_int_eq(ferry_engine_trace(e, timeline), 0);
    ck_assert_int_eq(ferry_engine_trace_experts(e, wanted), 0);
    ck_assert_uint_eq(sum_timeline(timeline, &n_reads, &n_steps), st.disk_bytes);
    ck_assert_uint_ge((uint64_t)n_reads, st.expert_misses);
    ck_assert_int_eq(n_steps, 1 + 9);
    ck_assert_uint_eq(count_wanted(wanted, &n_steps), st.expert_hits + st.expert_misses);
    ck_assert_int_eq(n_steps, 1 + 9);
    ferry_session_free(s);
    ferry_engine_close(e);
    o.trace = o.trace_experts = false;
    ck_assert_int_eq(ferry_engine_open(model_path("qwen3moe"), &o, &e), 0);
    ck_assert_int_eq(ferry_engine_trace(e, timeline), FERRY_ERR_STATE);
    ck_assert_int_eq(ferry_engine_trace_experts(e, wanted), FERRY_ERR_STATE);
    ferry_engine_close(e);
    unlink(timeline);
    unlink(wanted);
}
END_TEST

/* Gate and up in one stack are the same numbers in other places, in memory and streamed. */
START_TEST(joint_stack_of_gate_and_up_changes_bits)
{
    struct ferry_engine_opts o = small_opts();
    float *want = logits_of("qwen3moe", &o, PREFILL);
    float *got = logits_of("qwen3moe-fused", &o, PREFILL);
    must_equal(want, got, "qwen3moe-fused", "in memory");
    free(got);
    o.expert_ram_bytes = least_slots("qwen3moe-fused");
    got = logits_of("qwen3moe-fused", &o, PREFILL);
    must_equal(want, got, "qwen3moe-fused", "streamed");
    free(got);
    free(want);
}
END_TEST

/* A q8_0 cache rounds keys and values by at most 1/254 of a block's largest, in two layers, keys and values: 4/254. */
START_TEST(q8_0_cache_loses_the_thread)
{
    struct ferry_engine_opts o = small_opts();
    float *want = logits_of("llama", &o, PREFILL);
    o.kv_type = "q8_0";
    float *got = logits_of("llama", &o, PREFILL);
    double sum_sq = 0, diff_sq = 0;
    for (int i = 0; i < N_TOK * N_VOCAB; i++) {
        sum_sq += (double)want[i] * want[i];
        diff_sq += ((double)want[i] - got[i]) * ((double)want[i] - got[i]);
    }
    ck_assert_msg(diff_sq > 0, "the option changed nothing");
    ck_assert_msg(sqrt(diff_sq / sum_sq) < 4.0 / 254, "relative error %g", sqrt(diff_sq / sum_sq));
    free(got);
    free(want);
}
END_TEST

/* OpenBLAS rounds prompt rows differently, but no row may depend on how many came with it. */
START_TEST(blas_prefill_depends_on_the_cut)
{
    struct ferry_engine_opts o = small_opts();
    o.prefill = "blas";
    float *want = logits_of("mixed", &o, PREFILL);
    o.chunk_tok = o.n_out = 9;
    o.n_threads = 2;
    float *got = logits_of("mixed", &o, PREFILL);
    must_equal(want, got, "mixed", "blas, other cuts");
    free(got);
    free(want);
}
END_TEST

/* ---- sessions ---- */

/* Greedy tokens after the first n_prompt ids. */
static void greedy(struct ferry_session *s, int32_t *out, int n)
{
    for (int i = 0; i < n; i++)
        ck_assert_msg(ferry_session_step(s, &out[i]) == 0, "%s", ferry_error());
}

START_TEST(truncate_fork_or_interruption_changes_the_words)
{
    enum { N_PROMPT = 100, N_NEW = 24 };
    const char *name = exact_models[_i];
    struct ferry_engine_opts o = small_opts();
    o.n_sessions = 2;
    struct ferry_engine *e = open_with(name, &o);
    struct ferry_session *s = session_of(e), *f = NULL;
    int32_t want[N_NEW], got[N_NEW];

    ck_assert_int_eq(ferry_session_append(s, ids, N_PROMPT, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_fork(s, &f), 0);
    greedy(s, want, N_NEW);
    ck_assert_uint_eq(ferry_session_n_tokens(s), N_PROMPT + N_NEW);
    greedy(f, got, N_NEW);
    ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: a fork goes another way", name);

    /* wander off, come back */
    ck_assert_int_eq(ferry_session_truncate(f, 70), 0);
    ck_assert_int_eq(ferry_session_append(f, ids + 10, 40, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_truncate(f, 70), 0);
    ck_assert_int_eq(ferry_session_append(f, ids + 70, N_PROMPT - 70, NULL, NULL), 0);
    greedy(f, got, N_NEW);
    ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: truncate left something behind", name);

    /* only the last token forgotten: its logits have to be made again */
    ck_assert_int_eq(ferry_session_truncate(f, N_PROMPT + 1), 0);
    ck_assert_int_eq(ferry_session_truncate(f, N_PROMPT), 0);
    greedy(f, got, N_NEW);
    ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: the step after truncate differs", name);

    /* a cancel asked for while nothing runs stops the next call, once */
    ferry_session_cancel(f);
    int32_t token;
    ck_assert_int_eq(ferry_session_step(f, &token), FERRY_ERR_CANCEL);
    ck_assert_int_eq(ferry_session_truncate(f, N_PROMPT), 0);
    greedy(f, got, N_NEW);
    ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: a cancel changed the words", name);
    ferry_session_free(f);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* What cannot be cut where one likes, and how far before a prompt's end it can be come back to. */
static const struct {
    const char *name;
    int n_tail;
} come_back[] = {{"gpt-oss", 0}, {"gemma3", 0}, {"qwen3next", 4}, {"qwen35", 4}};
enum { N_COME_BACK = sizeof come_back / sizeof *come_back };

/* An answer is made anew from the prompt's last token, or the last few. */
START_TEST(regenerating_runs_the_prompt_again)
{
    enum { N_PROMPT = 100, N_ANSWER = 110 };
    const char *name = come_back[_i].name;
    const int n_again = come_back[_i].n_tail ? come_back[_i].n_tail : 1;
    struct ferry_engine_opts o = small_opts();
    o.chunk_tok = 128;
    struct ferry_engine *e = open_with(name, &o);
    struct ferry_session *s = session_of(e);
    int32_t want[N_ANSWER], got[N_ANSWER];
    struct ferry_stats before, after;

    ck_assert_int_eq(ferry_session_append(s, ids, N_PROMPT, NULL, NULL), 0);
    greedy(s, want, N_ANSWER);
    for (int i = 0; i < 2; i++) {
        ferry_session_stats(s, &before);
        ck_assert_int_eq(ferry_session_truncate(s, N_PROMPT - 1), 0);
        ck_assert_int_eq(ferry_session_append(s, ids + N_PROMPT - 1, 1, NULL, NULL), 0);
        ferry_session_stats(s, &after);
        ck_assert_uint_eq(after.n_prompt - before.n_prompt, n_again);
        greedy(s, got, N_ANSWER);
        ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: other words", name);
    }
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* A template leaves out what the answer thought, so the next turn begins behind the prompt: layers with windows have let go of what lies
 * before that, but for what is kept so that the prompt need not be run again. */
START_TEST(next_turn_runs_the_prompt_again)
{
    enum { N_PROMPT = 100, N_ANSWER = 110, N_NEW = 20 };
    const char *name = come_back[_i].name;
    struct ferry_engine_opts o = small_opts();
    o.n_sessions = 2;
    o.chunk_tok = 128;
    struct ferry_engine *e = open_with(name, &o);
    struct ferry_session *s = session_of(e), *fresh = session_of(e);
    int32_t answer[N_ANSWER], want[N_NEW], got[N_NEW];
    struct ferry_stats before, after;

    ck_assert_int_eq(ferry_session_append(s, ids, N_PROMPT, NULL, NULL), 0);
    greedy(s, answer, N_ANSWER);
    ferry_session_stats(s, &before);
    ck_assert_int_eq(ferry_session_truncate(s, N_PROMPT + 1), 0);
    ck_assert_int_eq(ferry_session_append(s, ids, 6, NULL, NULL), 0);
    ferry_session_stats(s, &after);
    ck_assert_uint_eq(after.n_prompt - before.n_prompt, come_back[_i].n_tail + 1 + 6);
    greedy(s, got, N_NEW);

    ck_assert_int_eq(ferry_session_append(fresh, ids, N_PROMPT, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_append(fresh, answer, 1, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_append(fresh, ids, 6, NULL, NULL), 0);
    greedy(fresh, want, N_NEW);
    ck_assert_msg(memcmp(want, got, sizeof want) == 0, "%s: other words", name);
    ferry_session_free(fresh);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* What a prompt asks for an answer with may end in an opened thought, which the next turn leaves out, too. */
START_TEST(turn_without_the_thought_s_opening_runs_the_prompt_again)
{
    enum { N_PROMPT = 100, N_ANSWER = 20, N_CUT = 4, N_NEW = 20 };
    struct ferry_engine_opts o = small_opts();
    struct ferry_engine *e = open_with("qwen35moe", &o);
    struct ferry_session *s = session_of(e);
    int32_t answer[N_ANSWER], want[N_NEW], got[N_NEW];
    struct ferry_stats before, after;

    ck_assert_int_eq(ferry_session_append(s, ids, N_PROMPT - N_CUT, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_append(s, ids + 30, 40, NULL, NULL), 0);
    greedy(s, want, N_NEW);
    ck_assert_int_eq(ferry_session_truncate(s, 0), 0);
    ck_assert_int_eq(ferry_session_append(s, ids, N_PROMPT, NULL, NULL), 0);
    for (int turn = 0; turn < 2; turn++) { /* once more, edited: one further back is run from the start */
        greedy(s, answer, N_ANSWER);
        ferry_session_stats(s, &before);
        ck_assert_int_eq(ferry_session_truncate(s, N_PROMPT - N_CUT), 0);
        ck_assert_int_eq(ferry_session_append(s, ids + 30, 40, NULL, NULL), 0);
        ferry_session_stats(s, &after);
        ck_assert_uint_eq(after.n_prompt - before.n_prompt, turn ? N_PROMPT - N_CUT + 40 : 40);
        greedy(s, got, N_NEW);
        ck_assert_msg(memcmp(want, got, sizeof want) == 0, "turn %d: other words", turn);
    }
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

static void copy_file(const char *from, const char *to)
{
    static char all[1 << 20];
    FILE *in = fopen(from, "rb"), *out = fopen(to, "wb");

    ck_assert(in && out);
    size_t n = fread(all, 1, sizeof all, in);
    ck_assert(n > 0 && n < sizeof all && fwrite(all, 1, n, out) == n);
    fclose(in);
    ck_assert_int_eq(fclose(out), 0);
}

/* The file is found to be another when all layers have been run: nothing of the step counts, and no record is a step ahead. */
START_TEST(failed_step_leaves_records_a_step_ahead)
{
    static float want[N_VOCAB], got[N_VOCAB];
    const char path[] = TEST_BUILD_DIR "/t_session-record.gguf";
    const struct timespec then[2] = {{1000, 0}, {1000, 0}}, later[2] = {{2000, 0}, {2000, 0}};
    struct ferry_engine_opts o = small_opts();
    struct ferry_engine *e = NULL;

    copy_file(model_path(_i ? "qwen35" : "qwen3next"), path);
    ck_assert_int_eq(utimensat(AT_FDCWD, path, then, 0), 0);
    o.io = "mmap";
    ck_assert_msg(ferry_engine_open(path, &o, &e) == 0, "%s", ferry_error());
    struct ferry_session *s = session_of(e);
    ck_assert_int_eq(ferry_session_append(s, ids, 80, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids + 80, 1, true, want), 0);
    for (int n_before = 0; n_before <= 70; n_before += 35) {
        ck_assert_int_eq(ferry_session_truncate(s, 0), 0);
        ck_assert_int_eq(ferry_session_append(s, ids, (size_t)n_before, NULL, NULL), 0);
        ck_assert_int_eq(utimensat(AT_FDCWD, path, later, 0), 0);
        ck_assert_int_lt(ferry_session_append(s, ids + n_before, 10, NULL, NULL), 0);
        ck_assert_uint_eq(ferry_session_n_tokens(s), (size_t)n_before);
        ck_assert_int_eq(utimensat(AT_FDCWD, path, then, 0), 0);
        ck_assert_int_eq(ferry_session_append(s, ids + n_before, (size_t)(80 - n_before), NULL, NULL), 0);
        ck_assert_int_eq(ferry_session_logits(s, ids + 80, 1, true, got), 0);
        ck_assert_mem_eq(want, got, sizeof want);
    }
    ferry_session_free(s);
    ferry_engine_close(e);
    unlink(path);
}
END_TEST

static bool stop_after_one(size_t done, size_t total, void *arg)
{
    (void)total;
    *(size_t *)arg = done;
    return false;
}

START_TEST(stopped_prompt_loses_what_was_run)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_engine *e = open_with("llama", &o);
    struct ferry_session *s = session_of(e);
    size_t done = 0;
    ck_assert_int_eq(ferry_session_append(s, ids, N_TOK, stop_after_one, &done), FERRY_ERR_CANCEL);
    ck_assert_uint_eq(done, 64);
    ck_assert_uint_eq(ferry_session_n_tokens(s), 64);
    ck_assert_int_eq(memcmp(ferry_session_tokens(s), ids, 64 * sizeof *ids), 0);
    ck_assert_int_eq(ferry_session_append(s, ids + 64, N_TOK - 64, NULL, NULL), 0);
    ck_assert_uint_eq(ferry_session_n_tokens(s), N_TOK);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

START_TEST(context_limit_is_crossed)
{
    struct ferry_engine_opts o = small_opts();
    o.n_ctx = 128;
    struct ferry_engine *e = open_with("llama", &o);
    struct ferry_session *s = session_of(e), *second = NULL;
    int32_t token = 0;
    ck_assert_int_eq(ferry_session_step(s, &token), FERRY_ERR_STATE);
    ck_assert_int_eq(ferry_session_append(s, ids, 129, NULL, NULL), FERRY_ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "129"));
    ck_assert_uint_eq(ferry_session_n_tokens(s), 0);
    ck_assert_int_eq(ferry_session_append(s, ids, 127, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_step(s, &token), 0);
    ck_assert_int_eq(ferry_session_step(s, &token), FERRY_ERR_LIMIT);
    ck_assert_uint_eq(ferry_session_n_tokens(s), 128);
    ck_assert_int_eq(ferry_session_make(e, NULL, &second), FERRY_ERR_LIMIT);
    int32_t bad = N_VOCAB;
    ck_assert_int_eq(ferry_session_truncate(s, 10), 0);
    ck_assert_int_eq(ferry_session_append(s, &bad, 1, NULL, NULL), FERRY_ERR_ARG);
    ck_assert_uint_eq(ferry_session_n_tokens(s), 10);
    ck_assert_int_eq(ferry_session_truncate(s, 11), FERRY_ERR_ARG);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* ---- the plan tells the truth ---- */

static uint64_t plan_number(const char *json, const char *name)
{
    const char *p = strstr(json, name);
    ck_assert_msg(p != NULL, "no %s in %s", name, json);
    return strtoull(p + strlen(name), NULL, 10);
}

START_TEST(bytes_differ_from_the_plans)
{
    const char *name = _i < 2 ? "mixed" : "qwen3next";
    struct ferry_engine_opts o = small_opts();
    o.expert_ram_bytes = _i % 2 ? least_slots(name) + 50000 : 0;
    o.n_sessions = 2;
    struct ferry_engine *e = open_with(name, &o);
    struct ferry_session *s = session_of(e);
    struct ferry_stats st;
    char *json = NULL;
    ferry_session_stats(s, &st);
    ck_assert_int_eq(ferry_engine_plan(e, true, &json), 0);
    char want[64];
    ck_assert_uint_eq(plan_number(json, "\"kv\":") + (_i < 2 ? 0 : plan_number(json, "\"recurrent\":")),
                      mem_live_bytes(MEM_KV));
    snprintf(want, sizeof want, "\"scratch\": %llu,", (unsigned long long)mem_live_bytes(MEM_SCRATCH));
    ck_assert_msg(strstr(json, want) != NULL, "%s not in %s", want, json);
    ck_assert_uint_eq(st.kv_bytes, mem_live_bytes(MEM_KV));
    ck_assert_uint_eq(st.scratch_bytes, mem_live_bytes(MEM_SCRATCH));
    struct ferry_info info;
    ferry_engine_info(e, &info);
    ck_assert_uint_eq(info.resident_bytes, mem_live_bytes(MEM_WEIGHTS));
    ck_assert_uint_eq(plan_number(json, "\"dense\":") + plan_number(json, "\"expert\":"), info.resident_bytes);
    ferry_free(json);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* ---- everything fallible fails ---- */

/* Open, chat a little, close; the first error. */
static int whole_life(const char *name, uint64_t expert_ram_bytes)
{
    struct ferry_engine_opts o = small_opts();
    o.expert_ram_bytes = expert_ram_bytes;
    o.n_sessions = 2;
    o.n_threads = 2;
    struct ferry_engine *e = NULL;
    struct ferry_session *s = NULL, *f = NULL;
    struct ferry_message msg = {"user", "the inn"};
    struct ferry_var var = {"m", FERRY_VAR_TEXT, "a name that the template's loop has, too", 0};
    struct ferry_chat_opts chat;
    char *text = NULL;
    int32_t *tokens = NULL, token;
    ferry_chat_opts_init(&chat);
    chat.vars = &var;
    chat.n_vars = 1;
    size_t n = 0;
    int rc = ferry_engine_open(model_path(name), &o, &e);
    if (rc == 0)
        rc = ferry_chat_prompt(e, &msg, 1, &chat, &text);
    if (rc == 0)
        rc = ferry_tokenize(e, text, strlen(text), FERRY_TOKENS_SPECIAL, &tokens, &n);
    if (rc == 0)
        rc = ferry_session_make(e, NULL, &s);
    if (rc == 0)
        rc = ferry_session_append(s, tokens, n, NULL, NULL);
    if (rc == 0)
        rc = ferry_session_fork(s, &f);
    for (int i = 0; rc == 0 && i < 3; i++)
        rc = ferry_session_step(f, &token);
    ferry_session_free(f);
    ferry_session_free(s);
    ferry_free(tokens);
    ferry_free(text);
    ferry_engine_close(e);
    return rc;
}

START_TEST(failed_allocation_leaks_or_breaks_what_follows)
{
    const char *name = _i < 2 ? "qwen3moe" : "qwen35";
    uint64_t before = live_bytes(), expert_ram_bytes = _i == 1 ? least_slots(name) : 0;
    mem_fail_nth(0);
    ck_assert_msg(whole_life(name, expert_ram_bytes) == 0, "%s", ferry_error());
    uint64_t n_calls = mem_n_calls();
    ck_assert_uint_gt(n_calls, 50);
    ck_assert_uint_eq(live_bytes(), before);
    for (uint64_t n = 1; n <= n_calls; n++) {
        mem_fail_nth(n);
        int rc = whole_life(name, expert_ram_bytes);
        mem_fail_nth(0);
        ck_assert_msg(rc == FERRY_ERR_NOMEM, "allocation %llu of %llu: %d, %s", (unsigned long long)n,
                      (unsigned long long)n_calls, rc, ferry_error());
        ck_assert_msg(live_bytes() == before, "allocation %llu of %llu leaks %lld bytes", (unsigned long long)n,
                      (unsigned long long)n_calls, (long long)(live_bytes() - before));
    }
    ck_assert_int_eq(whole_life(name, expert_ram_bytes), 0);
}
END_TEST

START_TEST(step_allocates)
{
    struct ferry_engine_opts o = small_opts();
    const char *name = _i < 2 ? "mixed" : "qwen3next";
    o.expert_ram_bytes = _i == 1 ? least_slots(name) : 0;
    struct ferry_engine *e = open_with(name, &o);
    struct ferry_session *s = session_of(e);
    int32_t out[8];
    ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
    mem_fail_nth(0);
    uint64_t calls = mem_n_calls();
    ck_assert_int_eq(ferry_session_append(s, ids, 100, NULL, NULL), 0);
    greedy(s, out, 8);
    ck_assert_uint_eq(mem_n_calls(), calls);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

struct taker {
    const float *want; /* (N_TOK, N_VOCAB) */
    size_t n, n_most;  /* rows taken, and how many it does not mind */
};

static int take_rows(const float *rows, size_t n_rows, void *arg)
{
    struct taker *t = arg;

    ck_assert_mem_eq(rows, t->want + t->n * N_VOCAB, n_rows * N_VOCAB * sizeof *rows);
    t->n += n_rows;
    return t->n > t->n_most ? FERRY_ERR_IO : 0;
}

/* Whoever keeps no logits needs no memory for them; when he fails, the session has what he was given. */
START_TEST(rows_that_are_taken_need_room)
{
    struct ferry_engine_opts o = small_opts();
    float *want = logits_of("llama", &o, PREFILL);
    struct ferry_engine *e = open_with("llama", &o);
    struct ferry_session *s = session_of(e);
    struct taker all = {want, 0, N_TOK}, few = {want, 0, 20};
    uint64_t calls = mem_n_calls();

    ck_assert_int_eq(ferry_session_each_logits(s, ids, PREFILL, true, take_rows, &all), 0);
    ck_assert_int_eq(ferry_session_each_logits(s, ids + PREFILL, N_TOK - PREFILL, false, take_rows, &all), 0);
    ck_assert_uint_eq(all.n, N_TOK);
    ck_assert_uint_eq(mem_n_calls(), calls);
    ck_assert_int_eq(ferry_session_truncate(s, 0), 0);
    ck_assert_int_eq(ferry_session_each_logits(s, ids, PREFILL, true, take_rows, &few), FERRY_ERR_IO);
    ck_assert_uint_eq(few.n, 2 * o.n_out);
    ck_assert_uint_eq(ferry_session_n_tokens(s), few.n);
    few.n_most = N_TOK;
    ck_assert_int_eq(ferry_session_each_logits(s, ids + few.n, PREFILL - few.n, true, take_rows, &few), 0);
    ck_assert_uint_eq(few.n, PREFILL);
    ferry_session_free(s);
    ferry_engine_close(e);
    free(want);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("session");
    TCase *t = tcase_create("session");
    tcase_set_timeout(t, 300);
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_loop_test(t, logits_differ_from_those_of_outside_programs, 0, N_FAMILIES);
    tcase_add_loop_test(t, bits_depend_on_threads_cuts_isa_or_io, 0, N_EXACT);
    tcase_add_loop_test(t, bits_depend_on_experts_being_read_when_wanted, 0, N_STREAMED);
    tcase_add_test(t, look_ahead_changes_words_or_reads_nothing);
    tcase_add_test(t, trials_change_words);
    tcase_add_test(t, trials_in_a_batch_change_words);
    tcase_add_test(t, traces_tell_other_things_than_the_counters);
    tcase_add_test(t, joint_stack_of_gate_and_up_changes_bits);
    tcase_add_test(t, q8_0_cache_loses_the_thread);
    tcase_add_test(t, blas_prefill_depends_on_the_cut);
    tcase_add_loop_test(t, truncate_fork_or_interruption_changes_the_words, 0, N_EXACT);
    tcase_add_loop_test(t, next_turn_runs_the_prompt_again, 0, N_COME_BACK);
    tcase_add_loop_test(t, regenerating_runs_the_prompt_again, 0, N_COME_BACK);
    tcase_add_test(t, turn_without_the_thought_s_opening_runs_the_prompt_again);
    tcase_add_loop_test(t, failed_step_leaves_records_a_step_ahead, 0, 2);
    tcase_add_test(t, stopped_prompt_loses_what_was_run);
    tcase_add_test(t, context_limit_is_crossed);
    tcase_add_loop_test(t, bytes_differ_from_the_plans, 0, 4);
    tcase_add_loop_test(t, failed_allocation_leaks_or_breaks_what_follows, 0, 3);
    tcase_add_loop_test(t, step_allocates, 0, 3);
    tcase_add_test(t, rows_that_are_taken_need_room);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
