/* Engines of which the GPU that the emulated runtime plays holds the last layers only: the first ones, with the embedding, their pages and
 * experts, are the CPU's. No bit may differ from the CPU's, however many they are and in whatever order streams run. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/model.h"
#include "src/plan/machine.h"
#include "tests/cuda_open.h"
#include "tests/cuda_times.h"
#include "tests/run_suite.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PROMPT = 130, N_NEW = 24 };

/* The least GPU memory with which so many layers are the CPU's. *expert_bytes: of all experts of the others. */
static uint64_t vram_for(const char *name, int n_layers, const struct ferry_engine_opts *like, uint64_t *expert_bytes)
{
    struct ferry_engine_opts o = *like;
    uint64_t first, bytes = 0;

    for (int i = 0; i <= n_layers; i++) {
        struct ferry_engine *e = open_with(name, &o);
        ck_assert_int_eq(find_fact(e, "first_layer", NULL, &first), i > 0);
        ck_assert_uint_eq(i > 0 ? first : 0, (uint64_t)i);
        bytes = fact_of(e, "bytes", "total") - fact_of(e, "bytes", "expert");
        if (i == 0)
            *expert_bytes = fact_of(e, "bytes", "expert");
        o.vram_bytes = bytes - 1;
        ferry_engine_close(e);
    }
    return bytes;
}

/* So many layers on the CPU, and memory for a quarter of all experts with the GPU; the emulated GPU has no byte more. */
static struct ferry_engine_opts layers_of(const char *name, int n_layers, bool has_experts)
{
    struct ferry_engine_opts o = copies_nothing("cuda:0");
    uint64_t expert_bytes;

    o.vram_bytes = vram_for(name, n_layers, &o, &expert_bytes);
    if (has_experts) /* less than what would let another layer in */
        o.vram_bytes += expert_bytes / 4;
    emu_set_vram(o.vram_bytes);
    return o;
}

/* The plan of an engine with other choices (JSON), in a file. */
static const char *plan_with(const struct ferry_engine *e, const char *choices)
{
    static const char path[] = TEST_BUILD_DIR "/t_cuda_layers-plan";
    char *text;

    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    json_t *plan = json_loads(text, 0, NULL), *others = json_loads(choices, 0, NULL);
    ck_assert_int_eq(json_object_update_recursive(plan, others), 0);
    ck_assert_int_eq(json_dump_file(plan, path, 0), 0);
    json_decref(others);
    json_decref(plan);
    ferry_free(text);
    return path;
}

static struct ferry_stats last_stats; /* of the session that logits_of ran */

/* Logits of ids (N_TOK): the first PROMPT as a prompt, the rest one by one. Caller frees. */
static float *logits_of(const char *name, const struct ferry_engine_opts *o)
{
    float *out = malloc(sizeof(float) * N_TOK * N_VOCAB);
    struct ferry_engine *e = open_with(name, o);
    struct ferry_session *s = session_of(e);

    emu_in_step(true);
    ck_assert_msg(ferry_session_logits(s, ids, PROMPT, true, out) == 0, "%s", ferry_error());
    ck_assert_msg(ferry_session_logits(s, ids + PROMPT, N_TOK - PROMPT, false, out + PROMPT * N_VOCAB) == 0, "%s",
                  ferry_error());
    emu_in_step(false);
    ferry_session_stats(s, &last_stats);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
    return out;
}

/* Both have the same logits; the second's statistics are kept. */
static void must_say_the_same(const char *name, const struct ferry_engine_opts *a, const struct ferry_engine_opts *b)
{
    float *want = logits_of(name, a), *got = logits_of(name, b);

    for (int i = 0; i < N_TOK * N_VOCAB; i++)
        if (memcmp(&want[i], &got[i], sizeof *want)) /* Check writes down each assertion that it passes */
            ck_abort_msg("%s: row %d, logit %d: %.9g instead of %.9g", name, i / N_VOCAB, i % N_VOCAB, (double)got[i],
                         (double)want[i]);
    free(got);
    free(want);
}

/* Seven layers of two kinds, of which some have windows; a head that is the embedding, too; experts, some behind a dense layer. */
static const struct {
    const char *name;
    int n_layers;
    bool has_experts;
} splits[] = {
    {"llama", 1, false},      {"gemma2", 1, false},         {"gemma3", 1, false},       {"gemma3", 3, false},
    {"gemma3", 6, false},     {"qwen3", 1, false},          {"mixed", 1, false},        {"qwen2moe", 1, true},
    {"qwen3moe", 1, true},    {"qwen3moe-fused", 1, false}, {"mixtral", 1, false},      {"dots1", 1, true},
    {"olmoe", 1, true},       {"gpt-oss", 1, true},         {"gpt-oss-mxfp4", 2, true}, {"glm4moe", 1, true},
    {"minimax-m2", 1, true},  {"ernie4_5", 1, false},       {"ernie4_5-moe", 1, true},  {"hunyuan-dense", 1, false},
    {"hunyuan-moe", 1, true}, {"seed_oss", 1, false},       {"smollm3", 1, false},      {"qwen3vlmoe", 1, true},
    {"deepseek2", 1, true},   {"deepseek2", 2, true},       {"deepseek2-old", 1, true}, {"qwen3next", 1, true},
    {"qwen3next", 3, true},   {"qwen35", 2, false},         {"qwen35moe", 2, true}};

enum { N_SPLITS = sizeof splits / sizeof *splits };

START_TEST(layers_on_the_cpu_change_bits)
{
    const char *name = splits[_i].name;
    struct ferry_engine_opts cpu = copies_nothing("cpu"),
                             gpu = layers_of(name, splits[_i].n_layers, splits[_i].has_experts);

    must_say_the_same(name, &cpu, &gpu);
    ck_assert_uint_gt(emu_n_launches(), N_TOK - PROMPT); /* it was the GPU */
    ck_assert_uint_gt(last_stats.up_bytes, 0);
    if (splits[_i].has_experts)
        ck_assert_uint_lt(last_stats.host_expert_rows, last_stats.expert_rows);
}
END_TEST

START_TEST(layers_with_a_q8_0_cache_change_bits)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
    uint64_t expert_bytes;

    cpu.kv_type = gpu.kv_type = "q8_0";
    gpu.chunk_tok = gpu.n_out = 7;
    gpu.vram_bytes = vram_for("gemma3", 4, &gpu, &expert_bytes);
    must_say_the_same("gemma3", &cpu, &gpu);
}
END_TEST

START_TEST(another_order_of_streams_changes_bits)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = layers_of("qwen3moe", 1, true);

    for (uint64_t seed = 2; seed < 6; seed++) {
        emu_seed(seed);
        must_say_the_same("qwen3moe", &cpu, &gpu);
    }
}
END_TEST

/* The CPU's layers have slots for few of their experts, which come from disk again and again, with those of the GPU's layers. */
START_TEST(experts_from_disk_change_bits)
{
    static const char *const io[] = {"pread", "uring"};
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = layers_of("qwen3moe", 1, _i % 2);

    gpu.io = io[_i / 2];
    gpu.n_threads = 2;
    gpu.chunk_tok = gpu.n_out = 16;
    gpu.expert_ram_bytes = 72 * KIB; /* three slots */
    must_say_the_same("qwen3moe", &cpu, &gpu);
    ck_assert_uint_gt(last_stats.expert_misses, 2 * 12); /* each of them more than once */
}
END_TEST

/* What the GPU's layers have no places for goes to it for a step. */
START_TEST(copied_experts_change_bits)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
    struct ferry_engine *e = open_with("qwen3moe", &gpu);

    gpu.plan_path = plan_with(e, "{\"gpu\": {\"first_layer\": 1, \"experts\": 4, \"moves\": true, \"landings\": 2, "
                                 "\"copies\": \"always\"}, \"expert_ram\": 1000000}");
    ferry_engine_close(e);
    must_say_the_same("qwen3moe", &cpu, &gpu);
    ck_assert_uint_gt(last_stats.copied_experts, 0);
    unlink(gpu.plan_path);
}
END_TEST

/* ---- lifted ---- */

/* An engine whose GPU computes the last layers, and in steps of `rows` rows or more the first n, too. */
static const char *lifting_plan(const char *name, const struct ferry_engine_opts *o, int n, int rows)
{
    struct ferry_engine *e = open_with(name, o);
    char choices[96];

    snprintf(choices, sizeof choices, "{\"gpu\": {\"first_layer\": %d, \"lift_rows\": %d}}", n, rows);
    const char *path = plan_with(e, choices);
    ferry_engine_close(e);
    return path;
}

static const struct {
    const char *name, *kv_type;
    int n_layers;
} lifts[] = {{"llama", "f16", 1},
             {"gemma2", "f16", 1},
             {"gemma3", "q8_0", 3},
             {"gemma3", "f16", 6},
             {"qwen2", "f16", 1},
             {"qwen3", "q8_0", 1},
             {"granite", "f16", 1},
             {"hunyuan-dense", "f16", 1},
             {"smollm3", "f16", 4},
             {"deepseek2-dense", "f16", 1},
             {"deepseek2-dense", "q8_0", 2},
             {"deepseek2-old-dense", "q8_0", 1}};
enum { N_LIFTS = sizeof lifts / sizeof *lifts };

/* A prompt in eight steps of 16 rows and one of 2, then tokens one by one: steps of many rows are lifted, or all. */
START_TEST(lifted_layers_change_bits)
{
    const char *name = lifts[_i / 2].name;
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");

    cpu.kv_type = gpu.kv_type = lifts[_i / 2].kv_type;
    gpu.plan_path = lifting_plan(name, &gpu, lifts[_i / 2].n_layers, _i % 2 ? 1 : 3);
    must_say_the_same(name, &cpu, &gpu);
    ck_assert_uint_eq(last_stats.lifted_steps, _i % 2 ? 9 + N_TOK - PROMPT : 8);
    ck_assert_uint_gt(last_stats.lifted_bytes, 0);
    unlink(gpu.plan_path);
}
END_TEST

/* Records of the CPU's layers are the host's: no plan has those lifted. */
START_TEST(records_of_the_host_are_lifted)
{
    struct ferry_engine_opts gpu = copies_nothing("cuda:0");
    struct ferry_engine *e;

    gpu.plan_path = lifting_plan("qwen35", &gpu, 1, 2);
    ck_assert_int_eq(try_open("qwen35", &gpu, &e), FERRY_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "recurrent layers"));
    unlink(gpu.plan_path);
    gpu.plan_path = NULL;
    gpu.plan_path = lifting_plan("qwen35", &gpu, 1, 0);
    ferry_engine_close(open_with("qwen35", &gpu));
    unlink(gpu.plan_path);
}
END_TEST

/* The logits of one row of a lifted step after another that left other numbers everywhere; 0: no wait is dropped. false: there is none of
 * that number. */
static bool say_without(struct ferry_session *s, int wait, enum emu_engine late, float *out)
{
    ck_assert_int_eq(ferry_session_truncate(s, 20), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids + 60, 1, false, out), 0);
    ck_assert_int_eq(ferry_session_truncate(s, 20), 0);
    emu_starve(late);
    emu_drop_wait(wait);
    ck_assert_int_eq(ferry_session_logits(s, ids + 20, 1, false, out), 0);
    bool is_there = !emu_drops_wait();
    emu_drop_wait(0);
    emu_starve(EMU_N_ENGINES);
    return is_there;
}

/* Each wait of a lifted step keeps something from being read, or written, too early: in some order, with one of the engines late, that
 * shows. */
START_TEST(dropped_wait_of_a_lifted_step_is_not_seen)
{
    static float want[N_VOCAB], got[N_VOCAB];
    struct ferry_engine_opts gpu = copies_nothing("cuda:0");
    bool is_there = true;
    int wait = 0;

    gpu.plan_path = lifting_plan("gemma3", &gpu, 3, 1);
    struct ferry_engine *e = open_with("gemma3", &gpu);
    struct ferry_session *s = session_of(e);
    ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids + 20, 1, false, want), 0);
    for (; is_there; wait++) {
        bool is_seen = false;
        for (uint64_t seed = 0; seed < 90 && is_there && !is_seen; seed++) {
            emu_seed(seed);
            is_there = say_without(s, wait, (enum emu_engine)(seed % EMU_N_ENGINES), got);
            is_seen = memcmp(want, got, sizeof want) != 0;
        }
        ck_assert_msg(is_seen == (wait > 0 && is_there), "wait %d", wait);
    }
    ck_assert_int_gt(wait, 3 * 6);
    ferry_session_free(s);
    ferry_engine_close(e);
    unlink(gpu.plan_path);
}
END_TEST

static uint64_t kernel_ns(const struct emu_launch *l, void *arg)
{
    (void)arg;
    return product_ns(l);
}

/* Bytes of all matrices that a token is multiplied with, of layers [first, end). */
static double matrix_bytes(const struct model *m, int first, int end)
{
    double sum = 0;

    for (int layer = first; layer < end; layer++)
        for (int role = 0; role < ROLE_N; role++) {
            int w = m->layers[layer].w[role];
            sum += w >= 0 && m->weights[w].t.ne[1] > 1 ? (double)tensor_bytes(&m->weights[w].t) : 0;
        }
    return sum;
}

/* By a virtual clock a lifted step takes as long as its copies, and the last product and the other layers behind them, where copies are
 * slow; where they are quick, as long as all products, and the first one's copy before them. */
START_TEST(copies_of_a_lifted_step_are_waited_for)
{
    enum { N_LIFTED = 4 };
    static const double rates[] = {GPU_RATE / 3, GPU_RATE * 8};
    struct ferry_engine_opts gpu = copies_nothing("cuda:0");
    static float logits[N_VOCAB];
    struct model *m;

    gpu.plan_path = lifting_plan("gemma3", &gpu, N_LIFTED, 1);
    ck_assert_int_eq(model_open(TEST_DATA_DIR "/models/gemma3.gguf", NULL, &m), 0);
    double lifted = matrix_bytes(m, 0, N_LIFTED), last = 0, first = 0;
    double rest = matrix_bytes(m, N_LIFTED, m->hp.n_layer) + (double)tensor_bytes(&m->weights[m->w[ROLE_OUTPUT]].t);
    static const enum role qkv[] = {ROLE_ATTN_Q, ROLE_ATTN_K, ROLE_ATTN_V};
    for (int i = 0; i < 3; i++)
        first += (double)tensor_bytes(&m->weights[m->layers[0].w[qkv[i]]].t);
    last = (double)tensor_bytes(&m->weights[m->layers[N_LIFTED - 1].w[ROLE_FFN_DOWN]].t);
    double piece = (double)tensor_bytes(&m->weights[m->layers[0].w[ROLE_FFN_UP]].t);
    struct ferry_engine *e = open_with("gemma3", &gpu);
    struct ferry_session *s = session_of(e);
    ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
    for (int i = 0; i < 2; i++) {
        struct emu_rates r = {.kernel_ns = kernel_ns};
        r.bytes_per_s[EMU_UP] = rates[i];
        r.bytes_per_s[EMU_DOWN] = PCIE_RATE;
        emu_clock(&r);
        ck_assert_int_eq(ferry_session_logits(s, ids + 20 + i, 1, false, logits), 0);
        double took_s = (double)emu_now_ns() * 1e-9;
        emu_clock(NULL);
        double want_s =
            i == 0 ? lifted / rates[0] + (last + rest) / GPU_RATE : first / rates[1] + (lifted + rest) / GPU_RATE;
        /* Rows that go up, and what is before them on the way: a matrix as small as here is one piece. */
        double rows_s = (1 + N_LIFTED) * ((double)m->hp.n_embd * 4 * 4 + piece) / rates[i];
        ck_assert_msg(took_s >= want_s * (1 - 1e-6) && took_s <= want_s + rows_s + 1e-3, "%g s instead of %g", took_s,
                      want_s);
    }
    ferry_session_free(s);
    ferry_engine_close(e);
    model_close(m);
    unlink(gpu.plan_path);
}
END_TEST

START_TEST(failed_call_of_a_lifted_step_says_something_else)
{
    struct ferry_engine_opts gpu = copies_nothing("cuda:0");

    gpu.plan_path = lifting_plan("gemma3", &gpu, 2, 1);
    struct ferry_engine *e = open_with("gemma3", &gpu);
    struct ferry_session *s = session_of(e);
    fail_each_call_of_a_step(s, 60);
    ferry_session_free(s);
    ferry_engine_close(e);
    unlink(gpu.plan_path);
}
END_TEST

/* Where weights may not be pinned the CPU computes its layers, and whoever asks is told. */
START_TEST(weights_that_are_not_pinned_are_missed)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
    uint32_t n_seen = 0;
    char news[256];

    gpu.plan_path = lifting_plan("llama", &gpu, 1, 1);
    emu_set_pinned(4096);
    must_say_the_same("llama", &cpu, &gpu);
    ck_assert_uint_eq(last_stats.lifted_steps, 0);
    struct ferry_engine *e = open_with("llama", &gpu);
    ck_assert_ptr_nonnull(strstr(ferry_engine_gpu_news(e, &n_seen, news, sizeof news), "does not pin"));
    ck_assert_str_eq(ferry_engine_gpu_news(e, &n_seen, news, sizeof news), "");
    ferry_engine_close(e);
    unlink(gpu.plan_path);
}
END_TEST

START_TEST(greedy_words_differ)
{
    static const char *const names[] = {"gemma3", "mixtral"};
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = layers_of(names[_i], _i ? 1 : 5, false);
    int32_t want[2 * N_NEW] = {0}, got[2 * N_NEW] = {0};

    greedy_words(names[_i], &cpu, N_NEW, want);
    greedy_words(names[_i], &gpu, N_NEW, got);
    ck_assert_mem_eq(want, got, sizeof want);
    ck_assert_mem_eq(got + N_NEW / 2, got + N_NEW + N_NEW / 2, N_NEW / 2 * sizeof *got);
}
END_TEST

/* What the GPU does for a token stays one graph, and the kernel that fetches what the step says. */
START_TEST(token_takes_more_launches)
{
    struct ferry_engine_opts gpu = layers_of("gemma3", 3, false);
    struct ferry_engine *e = open_with("gemma3", &gpu);
    struct ferry_session *s = session_of(e);
    struct ferry_stats from, to;
    float logits[N_VOCAB];

    ck_assert_int_eq(ferry_session_logits(s, ids, 1, false, logits), 0); /* brings the kernels up */
    ck_assert_int_eq(ferry_session_logits(s, ids + 1, 1, false, logits), 0);
    ferry_session_stats(s, &from);
    for (int i = 2; i < 12; i++)
        ck_assert_int_eq(ferry_session_logits(s, ids + i, 1, false, logits), 0);
    ferry_session_stats(s, &to);
    ck_assert_uint_eq(to.launches - from.launches, 2 * 10);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* ---- many prompts ---- */

enum { N_PROMPTS = 5, ANSWER_TOK = 40 };

struct answers {
    int32_t words[N_PROMPTS][ANSWER_TOK];
    float vector[64];
    uint64_t n_spilled, n_spill_failed;
};

/* Greedy answers to prompts that share a beginning, and the last one's vector. */
static void answers_of(const char *name, const struct ferry_engine_opts *o, struct answers *out)
{
    struct ferry_engine *e = open_with(name, o);
    struct ferry_batch_stats stats;
    struct ferry_batch *b;
    struct ferry_answer *a;
    uint64_t id[N_PROMPTS];

    memset(out, 0, sizeof *out);
    ck_assert_msg(ferry_batch_make(e, &b) == 0, "%s", ferry_error());
    for (int i = 0; i < N_PROMPTS; i++) {
        struct ferry_request r;
        ferry_request_init(&r);
        r.tokens = ids;
        r.n_tokens = (size_t)(20 + 7 * i);
        r.max_tokens = ANSWER_TOK;
        r.ignore_eos = true;
        if (i == N_PROMPTS - 1)
            r.pooling = FERRY_POOLING_MEAN;
        ck_assert_msg(ferry_batch_submit(b, &r, &id[i]) == 0, "%s", ferry_error());
    }
    for (int n = 0; n < N_PROMPTS;) {
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        for (int i = 0; a && i < N_PROMPTS; i++)
            if (a->id == id[i] && a->embedding)
                memcpy(out->vector, a->embedding, a->n_embd * sizeof *out->vector);
            else if (a->id == id[i])
                memcpy(out->words[i], a->tokens, sizeof out->words[i]);
        n += a != NULL;
        ferry_answer_free(a);
    }
    ferry_batch_stats(b, &stats);
    out->n_spilled = stats.n_spilled;
    out->n_spill_failed = stats.n_spill_failed;
    ferry_batch_free(b);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}

START_TEST(batch_says_something_else)
{
    static const char *const names[] = {"gemma3", "qwen3moe"};
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
    struct answers want, got;
    uint64_t expert_bytes;

    cpu.n_batch = gpu.n_batch = 3;
    answers_of(names[_i], &cpu, &want);
    gpu.vram_bytes = vram_for(names[_i], _i ? 1 : 4, &gpu, &expert_bytes);
    answers_of(names[_i], &gpu, &got);
    ck_assert_mem_eq(want.words, got.words, sizeof want.words);
    ck_assert_mem_eq(want.vector, got.vector, sizeof want.vector);
}
END_TEST

/* Pages of both sides, for fewer positions than all have together: the youngest give theirs back, to a file. */
START_TEST(spilled_pages_come_back_others)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = copies_nothing("cuda:0");
    struct answers want, got;
    uint64_t expert_bytes;

    cpu.n_batch = gpu.n_batch = 3;
    cpu.batch_tok = gpu.batch_tok = 64; /* a page each; answers need a second one */
    answers_of("llama", &cpu, &want);
    gpu.vram_bytes = vram_for("llama", 1, &gpu, &expert_bytes);
    gpu.spill_dir = TEST_BUILD_DIR;
    answers_of("llama", &gpu, &got);
    ck_assert_mem_eq(want.words, got.words, sizeof want.words);
    ck_assert_uint_gt(got.n_spilled, 0);
    ck_assert_uint_eq(got.n_spill_failed, 0);
}
END_TEST

/* ---- the plan ---- */

/* Memory of the GPU is what the plan says to the byte, but for the driver's rounding: 2 MiB for each of 6 pieces. Of the host's, too: what
 * is not pinned. */
START_TEST(memory_is_not_what_the_plan_says)
{
    struct ferry_engine_opts gpu = layers_of(splits[_i].name, splits[_i].n_layers, splits[_i].has_experts);
    struct ferry_engine *e = open_with(splits[_i].name, &gpu);
    char *text;

    ck_assert_uint_eq(emu_device_bytes() + 12 * MIB, fact_of(e, "bytes", "total"));
    ck_assert_uint_le(fact_of(e, "bytes", "total"), gpu.vram_bytes);
    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    json_t *plan = json_loads(text, 0, NULL), *bytes = json_object_get(plan, "bytes");
    ck_assert_uint_eq(mem_live_bytes(MEM_WEIGHTS), (uint64_t)json_integer_value(json_object_get(bytes, "dense")) +
                                                       (uint64_t)json_integer_value(json_object_get(bytes, "expert")));
    ck_assert_int_gt(
        json_integer_value(json_object_get(bytes, "kv")) + json_integer_value(json_object_get(bytes, "recurrent")), 0);
    json_decref(plan);
    ferry_free(text);
    ferry_engine_close(e);
}
END_TEST

/* Rows that went up, by the timeline. */
static uint64_t sum_ups(const struct ferry_engine *e)
{
    static const char path[] = TEST_BUILD_DIR "/t_cuda_layers-timeline";
    uint64_t sum = 0;
    json_t *event;
    size_t i;

    ck_assert_int_eq(ferry_engine_trace(e, path), 0);
    json_t *timeline = json_load_file(path, 0, NULL), *events = json_object_get(timeline, "traceEvents");
    json_array_foreach(events, i, event)
    {
        const char *name = json_string_value(json_object_get(event, "name"));
        if (name && !strcmp(name, "up"))
            sum += (uint64_t)json_integer_value(json_object_get(json_object_get(event, "args"), "n"));
    }
    json_decref(timeline);
    unlink(path);
    return sum;
}

/* What crosses is what the plan predicts for each token: up goes a row of the CPU's layers, and one for each row of the others' experts
 * that it computes. */
START_TEST(crossings_are_not_those_of_the_plan)
{
    static const char *const names[] = {"gemma3", "qwen3moe", "qwen3moe"};
    enum { N = 10 };
    struct ferry_engine_opts gpu = layers_of(names[_i], _i ? 1 : 3, _i == 2);
    struct ferry_info info;
    struct ferry_stats from, to;
    float logits[N_VOCAB];

    gpu.trace = true;
    struct ferry_engine *e = open_with(names[_i], &gpu);
    struct ferry_session *s = session_of(e);
    ferry_engine_info(e, &info);
    ck_assert_int_eq(ferry_session_append(s, ids, 5, NULL, NULL), 0);
    ferry_session_stats(s, &from);
    for (int i = 5; i < 5 + N; i++)
        ck_assert_int_eq(ferry_session_logits(s, ids + i, 1, false, logits), 0);
    ferry_session_stats(s, &to);
    const uint64_t row_bytes = info.n_embd * sizeof(float), up_bytes = to.up_bytes - from.up_bytes;
    uint64_t n_rows = to.host_expert_rows - from.host_expert_rows; /* of the layer before and the one behind */
    ck_assert_uint_eq(to.down_bytes - from.down_bytes, N * down_with_row(e));
    ck_assert_uint_eq(to.expert_rows - from.expert_rows, (uint64_t)(N * info.n_layer * info.n_expert_used));
    ck_assert_uint_eq(up_bytes, N * row_bytes + (n_rows - (uint64_t)(N * info.n_expert_used)) * row_bytes);
    if (_i < 2) /* then the prediction is no average */
        ck_assert_uint_eq(up_bytes, N * fact_of(e, "up_bytes_per_token", NULL));
    ck_assert_uint_eq(sum_ups(e) * row_bytes, to.up_bytes);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

START_TEST(saved_layers_are_others)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = layers_of("gemma3", 2, false),
                             saved = copies_nothing(NULL);
    struct ferry_engine *e = open_with("gemma3", &gpu);
    char *text;

    ck_assert_int_eq(ferry_engine_plan(e, false, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "of the embedding and layers 0 to 1, computed by the CPU"));
    ck_assert_ptr_nonnull(strstr(text, "of layers 2 to 6, and the head"));
    ck_assert_ptr_nonnull(strstr(text, "the GPU does the other 5"));
    ferry_free(text);
    saved.plan_path = plan_with(e, "{\"gpu\": {\"first_layer\": 7}}");
    struct ferry_engine *other;
    ck_assert_int_eq(try_open("gemma3", &saved, &other), FERRY_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "\"first_layer\" has to be a whole number from 0 to 6"));
    plan_with(e, "{\"gpu\": {\"first_layer\": 1}}");
    ck_assert_int_eq(try_open("gemma3", &saved, &other), FERRY_ERR_LIMIT); /* why there are such layers */
    plan_with(e, "{\"gpu\": {\"first_layer\": 4}}");
    ferry_engine_close(e);
    e = open_with("gemma3", &saved);
    ck_assert_uint_eq(fact_of(e, "first_layer", NULL), 4);
    ferry_engine_close(e);
    saved.device = "cuda:0";
    must_say_the_same("gemma3", &cpu, &saved);
    unlink(saved.plan_path);
}
END_TEST

/* Layers before the GPU's, and of the cache of its own layers only the first segment there, by a plan that says so. */
START_TEST(layers_beside_a_shared_cache_change_bits)
{
    enum { N = 700, LAST = 20 };
    static const char *const names[] = {"llama", "qwen3moe"};
    static const char *const choices[] = {
        "{\"gpu\": {\"first_layer\": 1, \"kv_tok\": 512, \"stage_rows\": 4}}",
        "{\"gpu\": {\"first_layer\": 1, \"kv_tok\": 512, \"stage_rows\": 4, \"experts\": 6}, \"expert_ram\": 1000000}"};
    struct ferry_engine_opts cpu = opts_for("cpu", 2048, 128), gpu = opts_for("cuda:0", 2048, 128);
    static float said[2][LAST * N_VOCAB];
    static int32_t words[N];

    for (int i = 0; i < N; i++) /* no two segments alike */
        words[i] = ids[(i + i / N_TOK * 7) % N_TOK];
    struct ferry_engine *e = open_with(names[_i], &gpu);
    gpu.plan_path = plan_with(e, choices[_i]);
    ferry_engine_close(e);
    for (int has_gpu = 0; has_gpu < 2; has_gpu++) {
        e = open_with(names[_i], has_gpu ? &gpu : &cpu);
        struct ferry_session *s = session_of(e);
        ck_assert_msg(ferry_session_append(s, words, N - LAST, NULL, NULL) == 0, "%s", ferry_error());
        ck_assert_int_eq(ferry_session_logits(s, words + N - LAST, LAST, false, said[has_gpu]), 0);
        ferry_session_stats(s, &last_stats);
        ferry_session_free(s);
        ferry_engine_close(e);
    }
    ck_assert_mem_eq(said[0], said[1], sizeof said[0]);
    ck_assert_uint_gt(last_stats.gpu_segments, 0);
    ck_assert_uint_gt(last_stats.host_segments, 0);
    ck_assert_uint_gt(last_stats.staged_segments, 0);
    unlink(gpu.plan_path);
}
END_TEST

/* Layers before the GPU's, lifted in steps of many rows, of the others' cache a segment or two there, and steps in halves: whatever a saved
 * plan may say at once. stage_rows 1: even single rows have their pages come up. */
static const struct {
    bool gives_back; /* somebody gives pages back */
    const char *name, *choices;
} mixes[] = {
    {true, "llama", "{\"first_layer\": 1, \"lift_rows\": 5, \"kv_tok\": 1024, \"stage_rows\": 4, \"halves\": true}"},
    {true, "llama", "{\"first_layer\": 1, \"lift_rows\": 2, \"kv_tok\": 512, \"stage_rows\": 1, \"halves\": true}"},
    {false, "llama", "{\"first_layer\": 0, \"lift_rows\": 2, \"kv_tok\": 512, \"stage_rows\": 0, \"halves\": true}"},
    {false, "gemma3", "{\"first_layer\": 3, \"lift_rows\": 3, \"kv_tok\": 512, \"stage_rows\": 4, \"halves\": true}"},
    {false, "gemma3",
     "{\"first_layer\": 1, \"lift_rows\": 200, \"kv_tok\": 512, \"stage_rows\": 100, \"halves\": true}"},
    {true, "qwen2", "{\"first_layer\": 1, \"lift_rows\": 1, \"kv_tok\": 512, \"stage_rows\": 2, \"halves\": true}"},
    {true, "granite", "{\"first_layer\": 1, \"lift_rows\": 4, \"kv_tok\": 512, \"stage_rows\": 4, \"halves\": true}"},
};
enum { N_MIXES = sizeof mixes / sizeof *mixes, MIX_SEQS = 6, MIX_TOK = 570, MIX_NEW = 24 };

static struct ferry_engine_opts mix_opts(const char *device)
{
    struct ferry_engine_opts o = opts_for(device, 1024, 128);

    o.n_batch = MIX_SEQS;
    o.batch_tok = 300; /* not enough for all at once: some give their pages back */
    return o;
}

static const char *mix_plan(int i)
{
    struct ferry_engine_opts gpu = mix_opts("cuda:0");
    struct ferry_engine *e = open_with(mixes[i].name, &gpu);
    char choices[256];

    snprintf(choices, sizeof choices, "{\"gpu\": %s}", mixes[i].choices);
    const char *path = plan_with(e, choices);
    ferry_engine_close(e);
    return path;
}

struct mix {
    int32_t words[MIX_SEQS][MIX_NEW];
    float vector[256], logprobs[MIX_NEW];
};

/* What comes out of a request that was finished. */
static void note_answer(const struct ferry_answer *a, struct mix *out)
{
    int i = (int)a->id - 1;

    if (a->embedding)
        memcpy(out->vector, a->embedding, a->n_embd * sizeof *out->vector);
    else
        memcpy(out->words[i], a->tokens, MIX_NEW * sizeof(int32_t));
    if (a->logprobs)
        memcpy(out->logprobs, a->logprobs, sizeof out->logprobs);
}

/* Six requests, two of which share their beginning past the first segment, one is pooled, one scored, and one short. */
static void mix_of(const char *name, const struct ferry_engine_opts *o, struct mix *out,
                   struct ferry_batch_stats *stats)
{
    static int32_t words[MIX_TOK];
    struct ferry_engine *e = open_with(name, o);
    struct ferry_answer *a;
    struct ferry_batch *b;
    uint64_t id;

    memset(out, 0, sizeof *out);
    ck_assert_msg(ferry_batch_make(e, &b) == 0, "%s", ferry_error());
    for (int i = 0; i < MIX_SEQS; i++) {
        struct ferry_request r;
        ferry_request_init(&r);
        for (int k = 0; k < MIX_TOK; k++)
            words[k] = ids[(k + k / N_TOK * 7 + (i == 1 ? 0 : 31 * i)) % N_TOK];
        words[MIX_TOK - 1] = ids[i];
        r.tokens = words;
        r.n_tokens = i == 4 ? 20 : MIX_TOK;
        r.max_tokens = MIX_NEW;
        r.ignore_eos = true;
        r.pooling = i == 3 ? FERRY_POOLING_MEAN : r.pooling;
        r.n_scored = i == 2 ? MIX_NEW : 0;
        ck_assert_msg(ferry_batch_submit(b, &r, &id) == 0, "%s", ferry_error());
        ck_assert_uint_eq(id, (uint64_t)i + 1);
    }
    emu_in_step(true);
    for (int n = 0; n < MIX_SEQS; n += a != NULL) {
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        if (a)
            note_answer(a, out);
        ferry_answer_free(a);
    }
    emu_in_step(false);
    ferry_batch_stats(b, stats);
    ferry_batch_free(b);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}

START_TEST(all_at_once_change_bits)
{
    struct ferry_engine_opts cpu = mix_opts("cpu"), gpu = mix_opts("cuda:0");
    struct ferry_batch_stats stats;
    static struct mix want, got;

    mix_of(mixes[_i].name, &cpu, &want, &stats);
    gpu.plan_path = mix_plan(_i);
    emu_seed((uint64_t)_i + 1);
    mix_of(mixes[_i].name, &gpu, &got, &stats);
    ck_assert_uint_gt(stats.n_halved, 0);
    ck_assert_int_eq(stats.n_preempted > 0, mixes[_i].gives_back);
    ck_assert_mem_eq(&want, &got, sizeof want);
    unlink(gpu.plan_path);
}
END_TEST

/* 2 MiB of rounding for each of 6 pieces, and more for what is on two sides, for halves, and for weights that come up. */
START_TEST(memory_of_all_at_once_is_not_what_the_plan_says)
{
    struct ferry_engine_opts gpu = mix_opts("cuda:0");
    uint64_t first;

    gpu.plan_path = mix_plan(_i);
    struct ferry_engine *e = open_with(mixes[_i].name, &gpu);
    uint64_t n = 6 + 1 + 2 + find_fact(e, "first_layer", NULL, &first);
    ck_assert_uint_eq(emu_device_bytes() + 2 * n * MIB, fact_of(e, "bytes", "total"));
    ferry_engine_close(e);
    unlink(gpu.plan_path);
}
END_TEST

/* By the rates of a profile the CPU is the faster one: then it has all layers, and the engine says so. */
START_TEST(gpu_that_makes_it_slower_is_used)
{
    static const char path[] = TEST_BUILD_DIR "/t_cuda_layers-profile";
    struct ferry_engine_opts gpu = layers_of("gemma3", 3, false);
    struct ferry_info info;
    struct machine m;
    char *text;

    for (int faster = 0; faster < 2; faster++) {
        ck_assert_int_eq(machine_find(&m), 0);
        m.mem_bytes_per_s = 1e9;
        m.gpu_bytes_per_s = faster ? 1e12 : 1e8;
        m.pcie_bytes_per_s = 1e11;
        ck_assert_int_eq(machine_to_json(&m, &text), 0);
        FILE *f = fopen(path, "w");
        ck_assert_ptr_nonnull(f);
        fputs(text, f);
        fclose(f);
        mem_free(text);
        gpu.profile_path = path;
        struct ferry_engine *e = open_with("gemma3", &gpu);
        uint32_t n_seen = 0;
        char news[256];
        ferry_engine_info(e, &info);
        ferry_engine_gpu_news(e, &n_seen, news, sizeof news);
        ck_assert_int_eq(strstr(news, "GPU 0 is not used: with all but 3 of 7 layers") != NULL, !faster);
        ck_assert_str_eq(ferry_engine_gpu_news(e, &n_seen, news, sizeof news), "");
        ck_assert_int_eq(strstr(info.isa, "cuda") != NULL, faster);
        ck_assert_int_eq(emu_n_live() > 0, faster);
        if (!faster) {
            struct ferry_engine_opts saved = copies_nothing("cuda:0");
            struct ferry_engine *other;
            saved.plan_path = plan_with(e, "{}");
            ferry_engine_close(open_with("gemma3", &saved)); /* the same wish, and the same answer */
            emu_set_gpus(2);
            saved.device = "cuda:1";
            ck_assert_int_eq(try_open("gemma3", &saved, &other), FERRY_ERR_STATE);
            unlink(saved.plan_path);
        }
        ferry_engine_close(e);
    }
    remove(path);
}
END_TEST

/* ---- when it does not fit, or fails ---- */

/* One layer and the head have to fit. */
START_TEST(too_small_a_gpu_is_used)
{
    struct ferry_engine_opts gpu = layers_of("gemma3", 6, false);
    struct ferry_engine *e;

    gpu.vram_bytes--;
    ck_assert_int_eq(try_open("gemma3", &gpu, &e), FERRY_ERR_LIMIT);
    ck_assert_ptr_nonnull(
        strstr(ferry_error(), "does not fit GPU 0, even with all experts elsewhere and no more than 1 layer there"));
    ck_assert_ptr_nonnull(strstr(ferry_error(), "1 B too much"));
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

/* The first of the GPU's ops waits for the rows that come up. Without that wait some order of the streams puts it first: if no test could
 * see that, the tests above would prove nothing. */
START_TEST(dropped_wait_is_not_seen)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu"), gpu = layers_of("llama", 1, false);
    float *want = logits_of("llama", &cpu), got[N_VOCAB];
    int n_wrong = 0;
    enum { N_SEEDS = 64 };

    for (uint64_t seed = 1; seed <= N_SEEDS; seed++) {
        struct ferry_engine *e = open_with("llama", &gpu);
        struct ferry_session *s = session_of(e);
        emu_seed(seed);
        emu_drop_wait(1);
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

/* Of a dense model; of experts on both sides, too; and, at open, of all at once. */
static const char *const failing[] = {"gemma3", "qwen3moe", "qwen35moe"};

START_TEST(failed_call_at_open_leaves_something)
{
    const bool is_mix = _i / 2 == 3;
    const char *name = is_mix ? mixes[0].name : failing[_i / 2];
    struct ferry_engine_opts gpu = is_mix ? mix_opts("cuda:0") : layers_of(name, _i / 2 ? 1 : 3, _i / 2);
    int rc = -1, n = 1;

    gpu.plan_path = is_mix ? mix_plan(0) : NULL;

    for (; rc < 0; n++) {
        struct ferry_engine *e;
        emu_fail_nth(_i % 2 ? 0 : n);
        mem_fail_nth(_i % 2 ? (uint64_t)n : 0);
        rc = try_open(name, &gpu, &e);
        emu_fail_nth(0);
        mem_fail_nth(0);
        ck_assert_msg(rc == 0 || rc == FERRY_ERR_NOMEM || rc == FERRY_ERR_DEVICE, "call %d: %s", n, ferry_error());
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
        for (int tag = 0; tag < MEM_N_TAG; tag++)
            ck_assert_msg(mem_live_bytes((enum mem_tag)tag) == 0, "call %d: %s is left", n,
                          mem_tag_name((enum mem_tag)tag));
    }
    ck_assert_int_gt(n, 20);
    if (is_mix)
        unlink(gpu.plan_path);
}
END_TEST

START_TEST(failed_call_in_a_step_spoils_the_session)
{
    const char *name = failing[_i];
    struct ferry_engine_opts gpu = layers_of(name, _i ? 1 : 3, _i);
    struct ferry_engine *e = open_with(name, &gpu);
    struct ferry_session *s = session_of(e);

    fail_each_call_of_a_step(s, 20); /* launches of a few layers */
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

static TCase *add_case(Suite *suite, const char *name)
{
    TCase *tc = tcase_create(name);

    tcase_add_checked_fixture(tc, start, NULL);
    tcase_set_timeout(tc, 240);
    suite_add_tcase(suite, tc);
    return tc;
}

int main(void)
{
    Suite *suite = suite_create("cuda_layers");
    TCase *bits = add_case(suite, "bits"), *many = add_case(suite, "many"), *plan = add_case(suite, "plan"),
          *lifted = add_case(suite, "lifted"), *fail = add_case(suite, "fail");

    tcase_add_loop_test(bits, layers_on_the_cpu_change_bits, 0, N_SPLITS);
    tcase_add_test(bits, layers_with_a_q8_0_cache_change_bits);
    tcase_add_test(bits, another_order_of_streams_changes_bits);
    tcase_add_loop_test(bits, experts_from_disk_change_bits, 0, 4);
    tcase_add_test(bits, copied_experts_change_bits);
    tcase_add_loop_test(lifted, lifted_layers_change_bits, 0, 2 * N_LIFTS);
    tcase_add_test(lifted, records_of_the_host_are_lifted);
    tcase_add_test(lifted, failed_call_of_a_lifted_step_says_something_else);
    tcase_add_test(lifted, weights_that_are_not_pinned_are_missed);
    if (!emu_is_real())
        tcase_add_test(lifted, copies_of_a_lifted_step_are_waited_for);
    if (!emu_is_real())
        tcase_add_test(lifted, dropped_wait_of_a_lifted_step_is_not_seen);
    tcase_add_loop_test(bits, greedy_words_differ, 0, 2);
    tcase_add_test(bits, token_takes_more_launches);
    tcase_add_loop_test(many, batch_says_something_else, 0, 2);
    tcase_add_test(many, spilled_pages_come_back_others);
    tcase_add_loop_test(plan, memory_is_not_what_the_plan_says, 0, N_SPLITS);
    tcase_add_loop_test(plan, crossings_are_not_those_of_the_plan, 0, 3);
    tcase_add_test(plan, gpu_that_makes_it_slower_is_used);
    tcase_add_test(plan, saved_layers_are_others);
    tcase_add_loop_test(plan, layers_beside_a_shared_cache_change_bits, 0, 2);
    tcase_add_test(fail, too_small_a_gpu_is_used);
    if (!emu_is_real()) /* hardware may be quick enough for nobody to see it */
        tcase_add_test(fail, dropped_wait_is_not_seen);
    tcase_add_loop_test(plan, memory_of_all_at_once_is_not_what_the_plan_says, 0, N_MIXES);
    tcase_add_loop_test(many, all_at_once_change_bits, 0, N_MIXES);
    tcase_add_loop_test(fail, failed_call_at_open_leaves_something, 0, 8);
    tcase_add_loop_test(fail, failed_call_in_a_step_spoils_the_session, 0, 3);
    return run_suite(suite);
}
