/* Whole engines whose GPU the emulated runtime plays, on the tiny models of tests/data/models: no bit of the logits may differ
 * from the CPU's, no word of a greedy answer, and nothing may be left over. */
#include "tests/cuda_engine.h"
#include "tests/run_suite.h"

#include "src/base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const models[] = {
    "llama",        "mixed",        "gemma2",        "gemma3",         "qwen3",         "qwen2moe",    "qwen3moe",
    "mixtral",      "dots1",        "olmoe",         "gpt-oss",        "gpt-oss-mxfp4", "glm4moe",     "minimax-m2",
    "ernie4_5",     "ernie4_5-moe", "hunyuan-dense", "hunyuan-moe",    "seed_oss",      "smollm3",     "qwen2vl",
    "qwen3vl",      "qwen3vlmoe",   "deepseek2",     "deepseek2-lite", "deepseek2-old", "bailingmoe2", "qwen3next",
    "qwen3next-in", "qwen35",       "qwen35moe"};
enum { N_MODELS = sizeof models / sizeof *models };

START_TEST(logits_differ_from_the_cpus)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
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
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
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
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
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

START_TEST(greedy_words_differ)
{
    static const char *const names[] = {"llama", "mixtral"};
    int32_t want[2 * N_NEW] = {0}, got[2 * N_NEW] = {0};

    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");

    greedy_words(names[_i], &cpu, N_NEW, want);
    greedy_words(names[_i], &gpu, N_NEW, got);
    ck_assert_mem_eq(want, got, sizeof want);
    ck_assert_mem_eq(got + N_NEW / 2, got + N_NEW + N_NEW / 2, N_NEW / 2 * sizeof *got);
}
END_TEST

START_TEST(another_order_of_streams_and_threads_changes_bits)
{
    struct ferry_engine_opts gpu = copies_nothing("cuda:0");
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

/* ---- experts on both sides ---- */

static const char *const moe_models[] = {
    "qwen2moe",  "qwen3moe",      "qwen3moe-fused", "mixtral",    "dots1",        "olmoe",       "mixed",
    "gpt-oss",   "gpt-oss-mxfp4", "glm4moe",        "minimax-m2", "ernie4_5-moe", "hunyuan-moe", "qwen3vlmoe",
    "deepseek2", "deepseek2-old", "bailingmoe2",    "qwen3next",  "qwen35moe"};
enum { N_MOE_MODELS = sizeof moe_models / sizeof *moe_models, N_SPLITS = 4 };

START_TEST(split_of_experts_changes_bits)
{
    const char *name = moe_models[_i / N_SPLITS];
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of(name, _i % N_SPLITS);
    float *want = logits_of(name, &cpu), *got = logits_of(name, &gpu);

    must_equal(want, got, name);
    ck_assert_uint_gt(last_stats.host_expert_rows, 0);
    if (_i % N_SPLITS == 0)
        ck_assert_uint_eq(last_stats.host_expert_rows, last_stats.expert_rows);
    else
        ck_assert_uint_lt(last_stats.host_expert_rows, last_stats.expert_rows);
    ck_assert_int_eq(emu_n_live(), 0);
    free(got);
    free(want);
}
END_TEST

/* The host's experts have slots for few of them, and come from disk again and again. */
START_TEST(split_with_experts_from_disk_changes_bits)
{
    static const char *const io[] = {"pread", "uring"};
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of("qwen3moe", 1);
    float *want = logits_of("qwen3moe", &cpu);

    gpu.io = io[_i];
    gpu.n_threads = 2;
    gpu.chunk_tok = gpu.n_out = 16;
    gpu.expert_ram_bytes = 1;
    struct ferry_engine *e;
    ck_assert_int_eq(try_open("qwen3moe", &gpu, &e), FERRY_ERR_LIMIT); /* says how much a token needs */
    ck_assert_ptr_nonnull(strstr(ferry_error(), "a token needs 72 KiB at least"));
    gpu.expert_ram_bytes = 72 * KIB; /* three slots for twelve experts */
    float *got = logits_of("qwen3moe", &gpu);
    must_equal(want, got, "qwen3moe");
    ck_assert_uint_gt(last_stats.expert_misses, 2 * 12); /* each of them more than once */
    if (_i) {                                            /* the next layer's are read ahead, some of them rightly */
        ck_assert_uint_gt(last_stats.hint_reads, 0);
        ck_assert_uint_gt(last_stats.hint_hits, 0);
    }
    free(got);
    free(want);
}
END_TEST

START_TEST(another_order_changes_bits_of_a_split)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of("mixtral", 2);
    float *want = logits_of("mixtral", &cpu);

    for (uint64_t seed = 2; seed < 6; seed++) {
        emu_seed(seed);
        float *got = logits_of("mixtral", &gpu);
        must_equal(want, got, "mixtral");
        free(got);
    }
    free(want);
}
END_TEST

/* The same word 40 times, then another: each has its favourites, which move to the GPU, while others lose their places. No bit is
 * another for it. */
START_TEST(experts_that_move_change_bits)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of("qwen3moe", 1);
    static float want[N_TOK * N_VOCAB], got[N_TOK * N_VOCAB];
    struct ferry_engine *e = open_with("qwen3moe", &cpu);
    struct ferry_session *s = session_of(e);
    struct ferry_stats stats;
    int32_t words[N_TOK];

    for (int i = 0; i < N_TOK; i++)
        words[i] = ids[i / 40];
    ck_assert_int_eq(ferry_session_logits(s, words, N_TOK, false, want), 0);
    ferry_session_free(s);
    ferry_engine_close(e);
    for (uint64_t seed = 1; seed < 4; seed++) {
        struct ferry_stats at[4]; /* after 0, 10, 30, 40 words */
        static const int n_words[5] = {0, 10, 30, 40, N_TOK};
        emu_seed(seed);
        e = open_with("qwen3moe", &gpu);
        s = session_of(e);
        emu_in_step(true);
        for (int i = 0; i < 4; i++) {
            ferry_session_stats(s, &at[i]);
            int first = n_words[i];
            ck_assert_int_eq(
                ferry_session_logits(s, words + first, (size_t)(n_words[i + 1] - first), false, got + first * N_VOCAB),
                0);
        }
        emu_in_step(false);
        must_equal(want, got, "qwen3moe");
        ferry_session_stats(s, &stats);
        ck_assert_uint_ge(stats.expert_moves, 3);
        ck_assert_uint_lt(at[3].host_expert_rows - at[2].host_expert_rows,
                          at[1].host_expert_rows - at[0].host_expert_rows);
        ferry_session_free(s);
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
}
END_TEST

enum { N_PROMPTS = 4, ANSWER_TOK = 12 };

/* Greedy answers to prompts that share a beginning, two at a time. */
static void answers_of(const char *name, const struct ferry_engine_opts *o, int32_t words[N_PROMPTS][ANSWER_TOK])
{
    struct ferry_engine *e = open_with(name, o);
    struct ferry_batch *b;
    struct ferry_answer *a;
    uint64_t id[N_PROMPTS];

    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    for (int i = 0; i < N_PROMPTS; i++) {
        struct ferry_request r;
        ferry_request_init(&r);
        r.tokens = ids;
        r.n_tokens = (size_t)(20 + 7 * i);
        r.max_tokens = ANSWER_TOK;
        r.ignore_eos = true;
        ck_assert_msg(ferry_batch_submit(b, &r, &id[i]) == 0, "%s", ferry_error());
    }
    emu_in_step(
        true); /* and not only in it: nothing that a batch does takes or gives memory of the device, or waits for all of it */
    for (int n = 0; n < N_PROMPTS;) {
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        for (int i = 0; a && i < N_PROMPTS; i++)
            if (a->id == id[i]) {
                ck_assert_uint_eq(a->n_tokens, ANSWER_TOK);
                memcpy(words[i], a->tokens, sizeof words[i]);
            }
        n += a != NULL;
        ferry_answer_free(a);
    }
    emu_in_step(false);
    ferry_batch_free(b);
    ferry_engine_close(e);
}

/* Of experts that both sides have, and of such as are all the GPU's, whose prompts and steps of several rows the host does not look at. */
START_TEST(batch_says_something_else)
{
    static const struct {
        const char *name;
        int quarters;
        uint32_t n_batch;
    } cases[] = {{"qwen3moe", 2, 2}, {"qwen3moe", 4, 4}, {"gpt-oss", 4, 3}, {"mixtral", 4, 2}, {"glm4moe", 4, 4}};
    const char *name = cases[_i].name;
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of(name, cases[_i].quarters);
    int32_t want[N_PROMPTS][ANSWER_TOK], got[N_PROMPTS][ANSWER_TOK];

    cpu.n_batch = gpu.n_batch = cases[_i].n_batch;
    answers_of(name, &cpu, want);
    answers_of(name, &gpu, got);
    ck_assert_mem_eq(want, got, sizeof want);
}
END_TEST

/* What comes down is what the plan predicts for each token; what goes up is a row for each of the host's rows of experts. */
START_TEST(crossings_are_not_those_of_the_plan)
{
    static const int quarters[] = {0, 2, 4};
    struct ferry_engine_opts gpu = split_of("qwen3moe", quarters[_i]);
    struct ferry_engine *e = open_with("qwen3moe", &gpu);
    struct ferry_session *s = session_of(e);
    struct ferry_info info;
    struct ferry_stats from, to;
    float logits[N_VOCAB];

    ferry_engine_info(e, &info);
    ck_assert_str_eq(info.isa, quarters[_i] == 4 ? "cuda" : info.isa);
    ck_assert_int_eq(ferry_session_append(s, ids, 5, NULL, NULL), 0);
    ferry_session_stats(s, &from);
    for (int i = 5; i < 15; i++)
        ck_assert_int_eq(ferry_session_logits(s, ids + i, 1, false, logits), 0);
    ferry_session_stats(s, &to);
    ck_assert_uint_eq(to.down_bytes - from.down_bytes, 10 * down_with_row(e));
    ck_assert_uint_eq(to.expert_rows - from.expert_rows, 10 * info.n_layer * info.n_expert_used);
    ck_assert_uint_eq(to.up_bytes - from.up_bytes,
                      (to.host_expert_rows - from.host_expert_rows) * info.n_embd * sizeof(float));
    if (quarters[_i] == 0) /* then the prediction is no average */
        ck_assert_uint_eq(to.up_bytes - from.up_bytes, 10 * fact_of(e, "up_bytes_per_token", NULL));
    if (quarters[_i] == 4) {
        ck_assert_uint_eq(to.up_bytes, 0);
        ck_assert_int_eq(ferry_session_append(s, ids, 60, NULL, NULL), 0);
        from = to;
        ferry_session_stats(s, &to);
        ck_assert_uint_eq(to.down_bytes - from.down_bytes,
                          ROW_BYTES); /* of a prompt no more than its last row's logits */
        ck_assert_uint_eq(to.expert_rows - from.expert_rows, 60 * info.n_layer * info.n_expert_used);
    }
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* The combine waits for the host's rows at an event. Without that wait some order of the streams puts it first, and it reads rows
 * of another layer, or memory that nobody wrote: if no test could see that, the tests above would prove nothing. The host has all
 * experts here, so that the GPU has nothing to do before the combine. */
START_TEST(dropped_wait_is_not_seen)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of("mixtral", 0);
    float *want = logits_of("mixtral", &cpu), got[N_VOCAB];
    int n_wrong = 0;
    enum { N_SEEDS = 64 };

    for (uint64_t seed = 1; seed <= N_SEEDS; seed++) {
        struct ferry_engine *e = open_with("mixtral", &gpu);
        struct ferry_session *s = session_of(e);
        emu_seed(seed);
        emu_drop_wait(1 + _i); /* of the first layer, of the second */
        ck_assert_int_eq(ferry_session_logits(s, ids, 1, false, got), 0);
        emu_drop_wait(0);
        n_wrong += memcmp(got, want, sizeof got) != 0;
        ferry_session_free(s);
        ferry_engine_close(e);
    }
    ck_assert_int_gt(n_wrong, 0);
    ck_assert_int_lt(n_wrong, N_SEEDS); /* by luck some orders are right: that is why there are seeds */
    free(want);
}
END_TEST

/* A saved plan keeps the split, and is refused where it does not belong. */
START_TEST(saved_split_is_another)
{
    char path[] = TEST_BUILD_DIR "/t_cuda_session-XXXXXX", *text;
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of("mixtral", 2), saved = copies_nothing(NULL);
    struct ferry_engine *e = open_with("mixtral", &gpu);
    uint64_t n_experts = fact_of(e, "experts", NULL);
    char words[64];

    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    ferry_engine_close(e);
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    ferry_free(text);
    saved.plan_path = path;
    e = open_with("mixtral", &saved);
    ck_assert_uint_eq(fact_of(e, "experts", NULL), n_experts);
    ck_assert_int_eq(ferry_engine_plan(e, false, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "memory of GPU 0"));
    snprintf(words, sizeof words, "%d of %d, computed there", (int)n_experts, (int)fact_of(e, "of_experts", NULL));
    ck_assert_ptr_nonnull(strstr(text, words));
    ferry_free(text);
    ferry_engine_close(e);
    cpu.plan_path = path;
    ck_assert_int_eq(try_open("mixtral", &cpu, &e), FERRY_ERR_STATE);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "the plan is for cuda:0, not for cpu"));
    unlink(path);
}
END_TEST

/* Which GPU is chosen is each thread's own affair: another thread than opened the engine has chosen the first one, as this one has
 * after each call here. The emulator ends the process where work goes to a GPU that is not chosen. */
START_TEST(engine_is_bound_to_the_thread_that_opened_it)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = split_of("qwen3moe", 1);
    static float want[N_TOK * N_VOCAB], got[N_VOCAB];
    struct ferry_engine *e = open_with("qwen3moe", &cpu);
    struct ferry_session *s = session_of(e);
    struct ferry_stats stats;
    int32_t words[N_TOK];

    for (int i = 0; i < N_TOK; i++)
        words[i] = ids[i / 40]; /* so that experts move */
    ck_assert_int_eq(ferry_session_logits(s, words, N_TOK, false, want), 0);
    ferry_session_free(s);
    ferry_engine_close(e);
    emu_set_gpus(2);
    gpu.device = "cuda:1";
    e = open_with("qwen3moe", &gpu);
    ck_assert_int_eq(cudaSetDevice(0), cudaSuccess);
    s = session_of(e);
    for (int i = 0; i < N_TOK; i++) {
        ck_assert_int_eq(cudaSetDevice(0), cudaSuccess);
        ck_assert_int_eq(ferry_session_logits(s, words + i, 1, false, got), 0);
        ck_assert_mem_eq(got, want + i * N_VOCAB, sizeof got);
    }
    ferry_session_stats(s, &stats);
    ck_assert_uint_gt(stats.expert_moves, 0);
    ck_assert_int_eq(cudaSetDevice(0), cudaSuccess);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

/* ---- when it does not fit, or fails ---- */

START_TEST(too_little_memory_leaves_something)
{
    struct ferry_engine_opts gpu = copies_nothing("cuda:0");
    struct ferry_engine *e = open_with("llama", &gpu);
    size_t bytes = emu_device_bytes();

    gpu.vram_bytes = fact_of(e, "bytes", "total");
    ferry_engine_close(e);
    for (int i = 1; i < 8; i++) {
        emu_set_vram(bytes * (size_t)i / 8);
        ck_assert_int_eq(try_open("llama", &gpu, &e), FERRY_ERR_LIMIT);
        ck_assert_ptr_nonnull(strstr(ferry_error(), "GPU 0 has"));
        ck_assert_ptr_null(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
    emu_set_vram(gpu.vram_bytes);
    ferry_engine_close(open_with("llama", &gpu));
    gpu.vram_bytes--; /* layers stay with the CPU then: t_cuda_layers */
    e = open_with("llama", &gpu);
    ck_assert_uint_eq(fact_of(e, "first_layer", NULL), 1);
    ferry_engine_close(e);
}
END_TEST

/* The second has biases of its experts and routers, which both sides hold, the last recurrent layers. */
static const char *const failing[] = {"mixtral", "gpt-oss", "qwen3next"};

/* All experts on the GPU; half of them. */
static struct ferry_engine_opts whole_or_split(const char *name, int i)
{
    return i ? split_of(name, 2) : copies_nothing("cuda:0");
}

START_TEST(failed_call_at_open_leaves_something)
{
    const char *name = failing[_i / 2];
    struct ferry_engine_opts gpu = whole_or_split(name, _i % 2);
    int rc = -1;

    for (int n = 1; rc < 0; n++) {
        struct ferry_engine *e;
        emu_fail_nth(n);
        rc = try_open(name, &gpu, &e);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == FERRY_ERR_NOMEM || rc == FERRY_ERR_DEVICE);
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
}
END_TEST

START_TEST(failed_allocation_at_open_leaves_something)
{
    struct ferry_engine_opts gpu = whole_or_split(failing[_i], 1);
    int rc = -1;
    uint64_t n = 1;

    for (; rc < 0; n++) {
        struct ferry_engine *e;
        mem_fail_nth(n);
        rc = try_open(failing[_i], &gpu, &e);
        mem_fail_nth(0);
        ck_assert_msg(rc == 0 || rc == FERRY_ERR_NOMEM, "allocation %d: %s", (int)n, ferry_error());
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
        for (int tag = 0; tag < MEM_N_TAG; tag++)
            ck_assert_msg(mem_live_bytes((enum mem_tag)tag) == 0, "allocation %d: %s is left", (int)n,
                          mem_tag_name((enum mem_tag)tag));
    }
    ck_assert_uint_gt(n, 50);
}
END_TEST

START_TEST(failed_call_in_a_step_spoils_the_session)
{
    const char *name = failing[_i / 2];
    struct ferry_engine_opts gpu = whole_or_split(name, _i % 2);
    struct ferry_engine *e = open_with(name, &gpu);
    struct ferry_session *s = session_of(e);

    fail_each_call_of_a_step(s, 30); /* launches of a few layers */
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

/* ---- the same rooms by hand, with files that fail ---- */

/* Matrix i of an expert, as the file has it. */
static void read_matrix(int layer, int expert, int i, char *out)
{
    static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};
    const struct weight *w = &rooms.model->weights[rooms.model->layers[layer].w[stacks[i]]];
    FILE *f = fopen(rooms.model->path, "rb");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_eq(fseek(f, (long)(w->off + (uint64_t)expert * w->t.stride[2]), SEEK_SET), 0);
    ck_assert_uint_eq(fread(out, model_matrix_bytes(w), 1, f), 1);
    fclose(f);
}

static void check_expert(int layer, const struct store_expert *e)
{
    static char want[64 * KIB], got[64 * KIB];
    uint64_t bytes = model_expert_bytes(rooms.model, layer) / 3; /* all three are equally large */

    for (int i = 0; i < 3; i++) {
        read_matrix(layer, e->expert, i, want);
        if (e->on_device)
            ck_assert_int_eq(rooms.gpu->ops->download(rooms.gpu, got, e->w[i], bytes), 0);
        ck_assert_mem_eq(e->on_device ? got : e->w[i], want, bytes);
    }
}

/* One loan of three experts, each compared with the file, the host's offered. */
static int walk_loan(int layer, const int32_t loan[3], int *n_device)
{
    struct store_lease lease = {0};
    struct store_expert given[8];
    int n = 1, n_given = 0;

    int rc = store_lease(rooms.store, layer, loan, 3, &lease);
    while (rc == 0 && n > 0) {
        rc = store_next(rooms.store, &lease, true, given, 8, &n);
        for (int i = 0; rc == 0 && i < n; i++) {
            *n_device += given[i].on_device;
            check_expert(layer, &given[i]);
        }
        n_given += rc == 0 ? n : 0;
        if (rc == 0 && n > 0 && !given[0].on_device)
            store_offer(rooms.store, &lease, given, n);
    }
    ck_assert(rc < 0 || n_given == 3);
    store_release(rooms.store, &lease);
    return rc;
}

/* What a move gets done between two loans: so many calls at most; fail: which call of the runtime fails. */
static int move_on(int n, int fail)
{
    bool is_more;
    int rc = 0;

    emu_fail_nth(fail);
    for (; n > 0 && rc == 0 && store_is_moving(rooms.store); n--)
        rc = store_move_on(rooms.store, &is_more);
    emu_fail_nth(0);
    return rc;
}

/* Favourites change every 100 steps, calls fail: what a loan gives is what the file says, and experts do move, a piece between loans or
 * two. */
START_TEST(moved_expert_is_not_what_the_file_says)
{
    enum { N_LOANS = 1200 };
    int n_device = 0, n_failed = 0;
    struct store_stats stats;

    make_rooms(&(struct rooms_args){.name = "qwen3moe", .quarters = 2, .io = PLAN_IO_PREAD});
    emu_seed((uint64_t)_i + 1);
    for (int n = 0; n < N_LOANS; n++) {
        int32_t first = (int32_t)(n / 200 % 6), loan[3] = {first, first + 1, first + 2};
        int fail = _i && n % 3 ? 1 + n / 3 % 7 : 0, rc = move_on(n % 4, fail);
        ck_assert_int_eq(walk_loan(n % 2, loan, &n_device), 0);
        ck_assert(rc == 0 || (_i && rc == ERR_DEVICE));
        n_failed += rc < 0;
    }
    store_stats(rooms.store, &stats);
    ck_assert_uint_gt(stats.n_moves, 5);
    ck_assert_int_gt(n_device, N_LOANS * 3 / 4);
    if (_i)
        ck_assert_int_gt(n_failed, 5);
    leave_rooms();
}
END_TEST

/* A move is given up before it begins when the place that it was to have is wanted after all. Later, when the expert has left memory: no
 * slot is held for it, and there are three, which another loan takes after the first of three pieces. Its place stays empty until the
 * next move. */
START_TEST(expert_that_is_read_over_moves_on)
{
    static const int32_t loan[3] = {4, 5, 6};
    struct store_stats stats;
    int n_device = 0;

    make_rooms(&(struct rooms_args){.name = "qwen3moe", .quarters = 2, .io = PLAN_IO_PREAD});
    uint64_t bytes = model_expert_bytes(rooms.model, 0);
    while (!store_is_moving(rooms.store))
        ck_assert_int_eq(walk_loan(0, loan, &n_device), 0);
    ck_assert_int_eq(walk_loan(0, (const int32_t[]){0, 1, 2}, &(int){0}), 0); /* one of them has that place: it stays */
    ck_assert_int_eq(move_on(1, 0), 0);
    ck_assert(!store_is_moving(rooms.store));
    ck_assert_int_eq(store_where(rooms.store, 0, 0), STORE_ON_DEVICE);
    while (!store_is_moving(rooms.store))
        ck_assert_int_eq(walk_loan(0, loan, &n_device), 0);
    ck_assert_int_eq(move_on(1, 0), 0);
    ck_assert_int_eq(walk_loan(1, loan, &n_device), 0);
    ck_assert(store_is_moving(rooms.store));
    ck_assert_int_eq(move_on(2, 0), 0);
    for (int n = 0; store_is_moving(rooms.store); n++) { /* what was sent has to come to its end */
        ck_assert_int_lt(n, 10);
        ck_assert_int_eq(walk_loan(1, (const int32_t[]){0, 1, 2}, &(int){0}), 0);
        ck_assert_int_eq(move_on(1, 0), 0);
    }
    store_stats(rooms.store, &stats);
    ck_assert_uint_eq(stats.n_moves, 0);
    ck_assert_uint_eq(stats.move_bytes, bytes / 3);
    ck_assert_int_eq(n_device, 0);
    for (int n = 0; stats.n_moves == 0; n++) {
        ck_assert_int_lt(n, 10);
        ck_assert_int_eq(walk_loan(0, loan, &n_device), 0);
        ck_assert_int_eq(move_on(3, 0), 0);
        ck_assert_int_eq(walk_loan(1, (const int32_t[]){0, 1, 2}, &(int){0}), 0);
        ck_assert_int_eq(move_on(1, 0), 0);
        store_stats(rooms.store, &stats);
    }
    ck_assert_uint_eq(stats.move_bytes, bytes / 3 + bytes);
    ck_assert_int_eq(walk_loan(0, loan, &n_device), 0);
    ck_assert_int_ge(n_device, 1);
    leave_rooms();
}
END_TEST

/* ---- moves within steps ---- */

enum { N_MOVE_WORDS = 4, MOVE_CONTEXT = 10 };

/* Logits of some words, each behind the same beginning, by the CPU. */
static void want_words(float want[N_MOVE_WORDS][N_VOCAB])
{
    struct ferry_engine_opts cpu = copies_nothing("cpu");
    struct ferry_engine *e = open_with("qwen3moe", &cpu);
    struct ferry_session *s = session_of(e);

    ck_assert_int_eq(ferry_session_append(s, ids, MOVE_CONTEXT, NULL, NULL), 0);
    size_t len = ferry_session_n_tokens(s) - 1;
    for (int i = 0; i < N_MOVE_WORDS; i++) {
        ck_assert_int_eq(ferry_session_truncate(s, len), 0);
        ck_assert_int_eq(ferry_session_logits(s, ids + 20 + 10 * i, 1, false, want[i]), 0);
    }
    ferry_session_free(s);
    ferry_engine_close(e);
}

/* A quarter of the experts on the GPU, slots for all of the others. */
static size_t make_moving_rooms(void)
{
    float logits[MOVE_CONTEXT * N_VOCAB];

    make_rooms(
        &(struct rooms_args){.name = "qwen3moe", .quarters = 1, .io = PLAN_IO_PREAD, .slot_bytes = 16 * 24 * KIB});
    ck_assert_int_eq(session_logits(rooms.session, ids, MOVE_CONTEXT, true, logits), 0);
    return MOVE_CONTEXT - 1;
}

static int run_word(size_t len, int i, float *got)
{
    ck_assert_int_eq(session_truncate(rooms.session, len), 0);
    return session_logits(rooms.session, ids + 20 + 10 * i, 1, false, got);
}

static struct {
    struct device_ops ops;
    bool is_waiting; /* something is fetched, and has not been waited for */
    uint64_t move_bytes;
    int n_pieces;
} wait;

static uint64_t move_bytes_now(void)
{
    struct store_stats stats;
    store_stats(rooms.store, &stats);
    return stats.move_bytes;
}

static int watched_fetch(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    ck_assert_uint_eq(move_bytes_now(), wait.move_bytes); /* nothing since the last wait */
    wait.is_waiting = true;
    return cuda_device_ops.fetch(dev, dst, src, bytes);
}

static int watched_sync(struct device *dev)
{
    wait.move_bytes = move_bytes_now();
    wait.is_waiting = false;
    return cuda_device_ops.sync(dev);
}

static int watched_bring(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    ck_assert(wait.is_waiting);
    wait.n_pieces++;
    return cuda_device_ops.bring(dev, dst, src, bytes);
}

static int watched_brought(struct device *dev, bool is_last, bool *is_there)
{
    ck_assert(wait.is_waiting || is_last);
    return cuda_device_ops.brought(dev, is_last, is_there);
}

/* Between what is fetched of a layer and the wait for it, and nowhere else. */
START_TEST(moves_take_time_outside_of_the_wait)
{
    static float want[N_MOVE_WORDS][N_VOCAB], got[N_VOCAB];
    struct store_stats stats;

    want_words(want);
    size_t len = make_moving_rooms();
    memset(&wait, 0, sizeof wait);
    wait.ops = cuda_device_ops;
    wait.ops.fetch = watched_fetch;
    wait.ops.sync = watched_sync;
    wait.ops.bring = watched_bring;
    wait.ops.brought = watched_brought;
    rooms.gpu->ops = &wait.ops;
    wait.move_bytes = move_bytes_now();
    for (int n = 0; n < 30 * N_MOVE_WORDS; n++) {
        ck_assert_int_eq(run_word(len, n / 30, got), 0);
        ck_assert_mem_eq(want[n / 30], got, sizeof got);
    }
    store_stats(rooms.store, &stats);
    ck_assert_uint_ge(stats.n_moves, 2);
    ck_assert_int_ge(wait.n_pieces, 3 * (int)stats.n_moves); /* its matrices */
    ck_assert_uint_ge(stats.move_bytes, stats.n_moves * model_expert_bytes(rooms.model, 0));
    rooms.gpu->ops = &cuda_device_ops;
    leave_rooms();
}
END_TEST

/* In the step in which an expert moves any call fails, the move's own too; the step that is tried again gives the CPU's bits, and so do
 * those in which the expert moves after all. */
START_TEST(failed_call_while_an_expert_moves_spoils_the_session)
{
    static float want[N_MOVE_WORDS][N_VOCAB], got[N_VOCAB];
    bool failed = true;
    int n = 1 + _i;

    want_words(want);
    for (; failed; n += 3) {
        size_t len = make_moving_rooms();
        emu_seed((uint64_t)n);
        while (!store_is_moving(rooms.store))
            ck_assert_int_eq(run_word(len, 0, got), 0);
        emu_fail_nth(n);
        int rc = run_word(len, 0, got);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert_int_eq(rc, failed ? ERR_DEVICE : 0);
        for (int i = 0; i < 2; i++) {
            ck_assert_int_eq(run_word(len, 0, got), 0);
            ck_assert_mem_eq(want[0], got, sizeof got);
        }
        leave_rooms();
    }
    ck_assert_int_gt(n, 40);
}
END_TEST

/* Hints are advice: of layers without experts, which may stand behind one that has them, of layers and experts that are not there,
 * nothing is read, and loans go on. */
START_TEST(hint_of_what_is_not_there_is_followed)
{
    static const int32_t wild[] = {-1, -1000000, 1 << 30, INT32_MAX};
    static const int layers[] = {-1, -1000000, 1 << 30, INT32_MAX};
    int32_t some[8] = {0, 1, 2, 3, 4, 5, 6, 7}, loan[3] = {0, 1, 2};
    int n_device = 0, moe = 0, dense = -1;
    struct store_stats stats;

    make_rooms(&(struct rooms_args){.name = "dots1", .quarters = 2, .io = PLAN_IO_URING});
    for (int i = 0; i < rooms.model->hp.n_layer; i++)
        *(rooms.model->layers[i].w[ROLE_EXPERT_GATE] < 0 ? &dense : &moe) = i;
    ck_assert_int_ge(dense, 0);
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        store_hint(rooms.store, layers[i], some, 8);
    store_hint(rooms.store, rooms.model->hp.n_layer, some, 8);
    store_hint(rooms.store, dense, some, 8);
    ck_assert_int_eq(walk_loan(moe, loan, &n_device), 0);
    store_hint(rooms.store, moe, wild, sizeof wild / sizeof *wild);
    ck_assert_int_eq(walk_loan(moe, loan, &n_device), 0);
    store_stats(rooms.store, &stats);
    ck_assert_uint_eq(stats.n_hint_reads, 0);
    leave_rooms();
}
END_TEST

/* An expert of the host that cannot be read, while the GPU computes its own: the step says which file and where, and the next one
 * finds all in order. */
START_TEST(failed_read_in_a_layer_spoils_the_session)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu");
    float *want = logits_of("qwen3moe", &cpu), got[12 * N_VOCAB];
    int n_failed = 0;

    make_rooms(&(struct rooms_args){.name = "qwen3moe", .quarters = 2, .io = _i ? PLAN_IO_URING : PLAN_IO_PREAD});
    for (int n = 1; n < 40; n++) {
        ck_assert_int_eq(session_truncate(rooms.session, 0), 0);
        rooms.n_reads = 0;
        rooms.fail_at = n;
        int rc = session_logits(rooms.session, ids, 12, false, got);
        rooms.fail_at = 0;
        ck_assert(rc == 0 || rc == ERR_IO); /* 0: there were fewer reads, or it was one that looked ahead */
        if (rc == 0)
            ck_assert_mem_eq(want, got, sizeof got);
        else
            ck_assert_msg(strstr(err_text(), "qwen3moe.gguf") != NULL, "%s", err_text());
        n_failed += rc < 0;
    }
    ck_assert_int_gt(n_failed, 9); /* three matrices of a few experts */
    ck_assert_int_eq(session_truncate(rooms.session, 0), 0);
    ck_assert_int_eq(session_logits(rooms.session, ids, 12, false, got), 0);
    ck_assert_mem_eq(want, got, sizeof got);
    leave_rooms();
    free(want);
}
END_TEST

/* Embeddings of two prompts together, (2, MOST_EMBD); the nth call of their steps fails, which has to be told once and to change
 * nothing. 0: none. false: there were not so many calls. */
enum { MOST_EMBD = 64 };

static bool embed_two(const char *device, int nth, float *out)
{
    struct ferry_engine_opts o = copies_nothing(device);
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
    for (bool failed = true; failed; n += 29) { /* each takes a whole run: not every call */
        memset(got, 0, sizeof got);
        failed = embed_two("cuda:0", n, got);
        ck_assert_mem_eq(want, got, sizeof want);
    }
    ck_assert_int_gt(n, 30);
}
END_TEST

START_TEST(what_a_gpu_cannot_have_is_taken)
{
    struct ferry_engine_opts o = copies_nothing("cuda:0");
    struct ferry_engine *e;

    o.io = "mmap";
    ck_assert_int_eq(try_open("llama", &o, &e), FERRY_ERR_UNSUPPORTED);
    o = copies_nothing("cuda:1");
    ck_assert_int_eq(try_open("llama", &o, &e), FERRY_ERR_DEVICE);
    static const char *const wrong[] = {"cuda", "cuda:", "cuda:x", "cuda:0x", "gpu", ""};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        o = copies_nothing(wrong[i]);
        ck_assert_int_eq(try_open("llama", &o, &e), FERRY_ERR_ARG);
    }
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_session");
    TCase *tc = tcase_create("cuda_session");

    tcase_add_checked_fixture(tc, start, NULL);
    tcase_set_timeout(tc, 240);
    tcase_add_loop_test(tc, logits_differ_from_the_cpus, 0, N_MODELS);
    tcase_add_test(tc, logits_with_a_q8_0_cache_differ);
    tcase_add_test(tc, prompt_by_tensor_cores_loses_the_thread);
    tcase_add_loop_test(tc, greedy_words_differ, 0, 2);
    tcase_add_test(tc, another_order_of_streams_and_threads_changes_bits);
    tcase_add_loop_test(tc, split_of_experts_changes_bits, 0, N_MOE_MODELS * N_SPLITS);
    tcase_add_loop_test(tc, split_with_experts_from_disk_changes_bits, 0, 2);
    tcase_add_test(tc, another_order_changes_bits_of_a_split);
    tcase_add_test(tc, experts_that_move_change_bits);
    tcase_add_loop_test(tc, batch_says_something_else, 0, 5);
    tcase_add_loop_test(tc, crossings_are_not_those_of_the_plan, 0, 3);
    if (!emu_is_real()) /* hardware may be quick enough for nobody to see it */
        tcase_add_loop_test(tc, dropped_wait_is_not_seen, 0, 2);
    tcase_add_test(tc, saved_split_is_another);
    tcase_add_test(tc, engine_is_bound_to_the_thread_that_opened_it);
    tcase_add_test(tc, too_little_memory_leaves_something);
    tcase_add_loop_test(tc, failed_call_at_open_leaves_something, 0, 6);
    tcase_add_loop_test(tc, failed_allocation_at_open_leaves_something, 0, 3);
    tcase_add_loop_test(tc, failed_call_in_a_step_spoils_the_session, 0, 6);
    tcase_add_loop_test(tc, moved_expert_is_not_what_the_file_says, 0, 2);
    tcase_add_test(tc, expert_that_is_read_over_moves_on);
    tcase_add_test(tc, moves_take_time_outside_of_the_wait);
    tcase_add_loop_test(tc, failed_call_while_an_expert_moves_spoils_the_session, 0, 3);
    tcase_add_test(tc, hint_of_what_is_not_there_is_followed);
    tcase_add_loop_test(tc, failed_read_in_a_layer_spoils_the_session, 0, 2);
    tcase_add_test(tc, embedding_differs_from_the_cpus);
    tcase_add_test(tc, what_a_gpu_cannot_have_is_taken);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
