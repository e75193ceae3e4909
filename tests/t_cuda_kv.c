/* Engines whose KV cache does not fit the memory of the GPU that the emulated runtime plays: pages lie there and in the host's
 * memory. No bit may differ from the CPU's, whatever lies where and in whatever order streams run. */
#include "src/ferry.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/run/batch.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/store.h"
#include "tests/cuda_open.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEGMENT = 512, LAST = 12 };

static int32_t words[8192];

static void setup(void)
{
    start();
    for (int i = 0; i < 8192; i++) /* no two segments alike */
        words[i] = ids[(i + i / N_TOK * 7) % N_TOK];
}

static struct ferry_engine_opts opts_of(const char *device)
{
    return opts_for(device, 32768, 128);
}

/* Options with GPU memory for n_segments of the cache and nothing else that could lie elsewhere; the emulated GPU has not a byte
 * more. o: without vram_bytes. */
static void spill(const char *name, int n_segments, struct ferry_engine_opts *o)
{
    struct ferry_engine *e = open_with(name, o);
    uint64_t least_bytes = fact_of(e, "bytes", "total") - fact_of(e, "bytes", "expert");

    uint64_t none;
    ck_assert(!find_fact(e, "kv_tok", NULL, &none));
    ferry_engine_close(e);
    o->vram_bytes = least_bytes - 3 * MIB; /* one piece of memory more, rounded up, and what it holds */
    e = open_with(name, o);
    uint64_t kv_tok = fact_of(e, "kv_tok", NULL), kv_bytes = fact_of(e, "bytes", "kv");
    ck_assert_uint_gt(kv_tok, 0);
    o->vram_bytes = fact_of(e, "bytes", "total") - fact_of(e, "bytes", "expert") - kv_bytes +
                    kv_bytes / (kv_tok / SEGMENT) * (uint64_t)n_segments + 4 * KIB; /* kv_bytes are rounded up to it */
    ferry_engine_close(e);
    emu_set_vram(o->vram_bytes);
    e = open_with(name, o);
    ck_assert_uint_eq(fact_of(e, "kv_tok", NULL), (uint64_t)n_segments * SEGMENT);
    ck_assert_uint_eq(fact_of(e, "experts", NULL), 0);
    /* What is counted for the driver's rounding: 2 MiB for each of 7 pieces, a batch's second half two more; all else to the byte. */
    o->vram_bytes = fact_of(e, "bytes", "total");
    ck_assert_uint_eq(emu_device_bytes() + (o->n_batch > 1 ? 18 : 14) * MIB, o->vram_bytes);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
    emu_set_vram(o->vram_bytes);
}

static struct ferry_stats last_stats;

/* Logits (LAST, N_VOCAB) of the last words of n: the others as a prompt, these one by one. */
static void logits_of(const char *name, const struct ferry_engine_opts *o, int n, float *out)
{
    struct ferry_engine *e = open_with(name, o);
    struct ferry_session *s = session_of(e);

    emu_in_step(true);
    ck_assert_msg(ferry_session_append(s, words, (size_t)(n - LAST), NULL, NULL) == 0, "%s", ferry_error());
    ck_assert_msg(ferry_session_logits(s, words + n - LAST, LAST, false, out) == 0, "%s", ferry_error());
    emu_in_step(false);
    ferry_session_stats(s, &last_stats);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}

static void must_equal(const float *want, const float *got, int n_rows)
{
    for (int i = 0; i < n_rows * N_VOCAB; i++)
        if (memcmp(&want[i], &got[i], sizeof *want))
            ck_abort_msg("row %d, logit %d: %.9g instead of %.9g", i / N_VOCAB, i % N_VOCAB, (double)got[i],
                         (double)want[i]);
}

START_TEST(context_beyond_the_gpu_changes_bits)
{
    static const struct {
        const char *name, *kv_type;
        int n_segments, n;
    } cases[] = {{"llama", "f16", 1, 1300},          {"qwen3moe", "q8_0", 1, 1100},
                 {"deepseek2", "f16", 1, 1300},      {"deepseek2-lite", "q8_0", 1, 1100},
                 {"deepseek2-old", "q8_0", 1, 1100}, {"qwen3next", "f16", 1, 1100}};
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");
    static float here[LAST * N_VOCAB], there[LAST * N_VOCAB];

    cpu.kv_type = gpu.kv_type = cases[_i].kv_type;
    spill(cases[_i].name, cases[_i].n_segments, &gpu);
    logits_of(cases[_i].name, &cpu, cases[_i].n, here);
    logits_of(cases[_i].name, &gpu, cases[_i].n, there);
    must_equal(here, there, LAST);
    ck_assert_uint_gt(last_stats.gpu_segments, 0);
    ck_assert_uint_gt(last_stats.host_segments, 0);
    ck_assert_uint_gt(last_stats.staged_segments, 0);
}
END_TEST

/* ---- one step behind a long beginning ---- */

/* Rows of a step: one is computed with by both sides, of many the host's pages come up. */
enum { N_MANY = 8, BEHIND = 3 * SEGMENT + 70 };

static float want[N_MANY * N_VOCAB], got[N_MANY * N_VOCAB];

/* An engine's rooms, with one sequence of BEHIND words. */
struct rooms {
    struct model *model;
    struct plan plan;
    struct device *gpu, *cpu;
    struct store *store;
    struct cache *cache;
    struct cache_seq *seq;
    struct exec *exec;
    struct batch batch;
};

/* stage_rows: instead of the plan's; 0: those. */
static void open_rooms(struct rooms *r, const char *name, const struct ferry_engine_opts *o, int stage_rows)
{
    struct plan_opts opts = {.n_ctx = o->n_ctx,
                             .n_seq = 1,
                             .n_out = N_MANY,
                             .n_threads = 1,
                             .chunk_tok = 128,
                             .io = PLAN_IO_PREAD,
                             .no_pin = true,
                             .vram_bytes = o->vram_bytes};
    bool has_gpu = o->vram_bytes > 0;
    struct machine machine;
    struct kv_shape shape;
    char path[1024];

    *r = (struct rooms){.gpu = NULL};
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    ck_assert_int_eq(model_open(path, NULL, &r->model), 0);
    ck_assert_int_eq(machine_find(&machine), 0);
    struct plan_in in = {&machine, r->model, &opts, &cpu_device_ops, has_gpu ? &cuda_device_ops : NULL};
    ck_assert_msg(plan_make(&in, &r->plan) == 0, "%s", err_text());
    if (stage_rows)
        r->plan.gpu.stage_rows = (uint32_t)stage_rows;
    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 1}, &r->cpu), 0);
    struct cuda_opts cuda = {.ordinal = 0};
    plan_device_step(&r->plan, r->model, &cuda.most);
    if (has_gpu)
        ck_assert_int_eq(cuda_open(&cuda, &r->gpu), 0);
    struct store_args store = {.model = r->model, .plan = &r->plan, .device = r->gpu};
    ck_assert_msg(store_open(&store, &r->store) == 0, "%s", err_text());
    ck_assert_int_eq(model_kv_shape(r->model, r->plan.kv_type, 0, &shape, NULL), 0);
    struct cache_args cache = {.shape = &shape,
                               .n_seq = 1,
                               .n_ctx = o->n_ctx,
                               .chunk_tok = 128,
                               .device = has_gpu ? r->gpu : r->cpu,
                               .dev_tok = has_gpu ? SEGMENT : 0};
    ck_assert_int_eq(cache_open(&cache, &r->cache), 0);
    struct exec_args exec = {.model = r->model, .plan = &r->plan, .store = r->store};
    exec.device = has_gpu ? r->gpu : r->cpu;
    exec.host = has_gpu ? r->cpu : NULL;
    ck_assert_int_eq(exec_open(&exec, &r->exec), 0);
    ck_assert_int_eq(batch_init(&r->batch, 128, 1), 0);
    ck_assert_int_eq(cache_seq_make(r->cache, &r->seq), 0);
}

static void close_rooms(struct rooms *r)
{
    batch_done(&r->batch);
    exec_close(r->exec);
    cache_seq_free(r->seq);
    cache_close(r->cache);
    store_close(r->store);
    if (r->gpu)
        r->gpu->ops->close(r->gpu);
    r->cpu->ops->close(r->cpu);
    model_close(r->model);
}

/* The next n words; their logits are wanted of the last n_logits. Nothing is committed. */
static int run_words(struct rooms *r, int n, int n_logits, const float **logits)
{
    int32_t len = (int32_t)cache_len(r->seq);
    int rc = cache_reserve(r->seq, n);

    batch_clear(&r->batch);
    batch_add(&r->batch, r->seq, words + len, n, len, n_logits, n > 1);
    return rc ? rc : exec_run(r->exec, &r->batch, NULL, logits);
}

/* What the CPU has in its pages after BEHIND words goes into the GPU's and the host's, and what it says to the last N_MANY of n_rows
 * more into `want`. */
static void open_behind(struct rooms *r, const char *name, int stage_rows, int n_rows)
{
    static char page[1 << 20];
    struct ferry_engine_opts o = opts_of("cuda:0");
    struct rooms cpu;
    const float *logits;

    o.n_sessions = 1;
    o.n_out = N_MANY;
    spill(name, 1, &o);
    open_rooms(r, name, &o, stage_rows);
    ck_assert_uint_eq(r->plan.gpu.kv_tok, SEGMENT);
    o.vram_bytes = 0;
    open_rooms(&cpu, name, &o, 0);
    for (int n = 0, chunk; n < BEHIND; n += chunk) {
        chunk = BEHIND - n < 128 ? BEHIND - n : 128;
        ck_assert_msg(run_words(&cpu, chunk, 0, &logits) == 0, "%s", err_text());
        cache_commit(cpu.seq, chunk);
        ck_assert_int_eq(cache_reserve(r->seq, chunk), 0);
        cache_commit(r->seq, chunk);
    }
    for (int64_t slot = 0; slot <= BEHIND / 64; slot++) {
        ck_assert_uint_le(cache_page_bytes(cpu.cache, 0), sizeof page);
        ck_assert_int_eq(cache_save_page(cpu.seq, 0, slot, page), 0);
        ck_assert_int_eq(cache_load_page(r->seq, 0, slot, page), 0);
        ck_assert_int_eq(r->gpu->ops->sync(r->gpu), 0);
    }
    ck_assert_int_eq(run_words(&cpu, n_rows, N_MANY, &logits), 0);
    memcpy(want, logits, sizeof want);
    close_rooms(&cpu);
}

/* A step of n rows on the GPU. */
static int step_of(struct rooms *r, int n)
{
    const float *logits;
    int n_logits = n < N_MANY ? n : N_MANY;

    memset(got, 0, sizeof got);
    ck_assert_int_eq(cache_truncate(r->seq, BEHIND), BEHIND);
    emu_in_step(true);
    int rc = run_words(r, n, n_logits, &logits);
    emu_in_step(false);
    if (rc == 0)
        memcpy(got, logits, sizeof *got * N_VOCAB * (size_t)n_logits);
    return rc;
}

/* What a step of n rows has to move: of the four segments that they see one is the GPU's, and the rows lie in the last. */
static void check_crossings(const struct rooms *r, const struct exec_stats *from, const struct exec_stats *to, int n)
{
    const struct hparams *hp = &r->model->hp;
    const struct model_layer *l = &r->model->layers[0];
    const uint64_t n_layer = (uint64_t)hp->n_layer, n_rows = (uint64_t)n;
    const uint64_t q = (uint64_t)l->n_head * (uint64_t)hp->head_dim_k, state = q + 2 * (uint64_t)l->n_head;
    const uint64_t kv = 2 * (uint64_t)l->n_head_kv * (uint64_t)hp->head_dim_k; /* both as wide */
    const uint64_t n_pages = (BEHIND + n_rows - 1) / 64 + 1 - SEGMENT / 64;
    bool is_staged = n > 1;

    ck_assert_uint_eq(to->down_bytes - from->down_bytes,
                      4 * (n_rows * N_VOCAB + n_layer * n_rows * (is_staged ? kv : q + kv)));
    ck_assert_uint_eq(to->up_bytes - from->up_bytes,
                      n_layer * (is_staged ? n_pages * 64 * kv * 2 : 4 * 3 * n_rows * state));
    ck_assert_uint_eq(to->n_dev_segments - from->n_dev_segments, n_layer * n_rows);
    ck_assert_uint_eq(to->n_host_segments - from->n_host_segments, is_staged ? 0 : 3 * n_layer * n_rows);
    ck_assert_uint_eq(to->n_staged_segments - from->n_staged_segments, is_staged ? 3 * n_layer * n_rows : 0);
}

START_TEST(order_of_streams_changes_bits)
{
    struct rooms r;

    open_behind(&r, "llama", 0, N_MANY);
    for (uint64_t seed = 1; seed < 9; seed++)
        for (int n = 1; n <= N_MANY; n += N_MANY - 1) {
            struct exec_stats from, to;
            emu_seed(seed);
            exec_stats(r.exec, &from);
            ck_assert_msg(step_of(&r, n) == 0, "%s", err_text());
            exec_stats(r.exec, &to);
            must_equal(want, got, n);
            check_crossings(&r, &from, &to, n);
        }
    close_rooms(&r);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

/* So many rows that a wave has room for two of the four segments, whoever computes with the host's. */
START_TEST(several_waves_change_bits)
{
    enum { N_ROWS = 100 };
    static const int stage_rows[] = {2, 1000};
    struct exec_stats stats;
    struct rooms r;

    open_behind(&r, "llama", stage_rows[_i], N_ROWS);
    for (uint64_t seed = 1; seed < 4; seed++) {
        emu_seed(seed);
        ck_assert_msg(step_of(&r, N_ROWS) == 0, "%s", err_text());
        must_equal(want, got, N_MANY);
    }
    exec_stats(r.exec, &stats);
    ck_assert_int_eq(stats.n_host_segments > 0, _i == 1);
    ck_assert_int_eq(stats.n_staged_segments > 0, _i == 0);
    close_rooms(&r);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

/* Each wait that orders the sides in the first layer: were it left out, some order of the streams would put the merge before the host's
 * states, a kernel before the pages that it reads, or pages over those that a kernel still reads; what is there instead is of another
 * layer. The fourth wait of a staged layer has nothing left to protect in so short a context, and is not among them. */
START_TEST(dropped_wait_is_not_seen)
{
    static const struct {
        int n_rows, wait;
    } cases[] = {{1, 1}, {N_MANY, 1}, {N_MANY, 2}, {N_MANY, 3}, {N_MANY, 5}, {N_MANY, 6}};
    enum {
        N_SEEDS = 600
    }; /* to see the merge too early takes one of 64 orders: all that comes before it has to be drawn first */
    struct rooms r;

    open_behind(&r, "llama", 0, N_MANY);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int n = cases[i].n_rows, n_wrong = 0, n_right = 0;
        for (uint64_t seed = 1; seed <= N_SEEDS && !(n_wrong && n_right); seed++) {
            emu_seed(seed);
            emu_drop_wait(cases[i].wait);
            ck_assert_int_eq(step_of(&r, n), 0);
            emu_drop_wait(0);
            bool is_wrong = memcmp(got, want, sizeof *got * N_VOCAB * (size_t)n) != 0;
            n_wrong += is_wrong;
            n_right += !is_wrong; /* by luck some orders are right: that is why there are seeds */
        }
        ck_assert_msg(n_wrong && n_right, "%d rows, wait %d: %d wrong, %d right", n, cases[i].wait, n_wrong, n_right);
    }
    close_rooms(&r);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

START_TEST(failed_call_in_a_step_spoils_the_sequence)
{
    const int n_rows = _i ? N_MANY : 1;
    bool failed = true;
    struct rooms r;
    int n = 0;

    open_behind(&r, "llama", 0, N_MANY);
    while (failed) {
        emu_seed((uint64_t)++n);
        emu_fail_nth(n);
        int rc = step_of(&r, n_rows);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert(rc == ERR_DEVICE ? failed : rc == 0);
        if (rc == 0) /* a graph was refused, and gone round */
            must_equal(want, got, n_rows);
        if (rc == 0 || n % (n_rows > 1 ? 16 : 4))
            continue;
        ck_assert_int_eq(step_of(&r, n_rows), 0); /* at once again, over what may be under way */
        must_equal(want, got, n_rows);
    }
    ck_assert_int_gt(n, 40);
    close_rooms(&r);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

START_TEST(failed_call_at_open_leaves_something)
{
    struct ferry_engine_opts gpu = opts_of("cuda:0");
    int rc = -1, n = 1;

    spill("llama", 1, &gpu);
    for (; rc < 0; n++) {
        struct ferry_engine *e;
        emu_fail_nth(_i ? 0 : n);
        mem_fail_nth(_i ? (uint64_t)n : 0);
        rc = try_open("llama", &gpu, &e);
        emu_fail_nth(0);
        mem_fail_nth(0);
        ck_assert_msg(rc == 0 || rc == FERRY_ERR_NOMEM || rc == FERRY_ERR_DEVICE, "call %d: %s", n, ferry_error());
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
        for (int tag = 0; tag < MEM_N_TAG; tag++)
            ck_assert_uint_eq(mem_live_bytes((enum mem_tag)tag), 0);
    }
    ck_assert_int_gt(n, 30);
}
END_TEST

/* ---- several sequences ---- */

/* A session and one that was forked off it in the middle of a segment, which both go on to fill: what they share lay with the GPU, and
 * there is no room there for both. */
static void forks_say(const struct ferry_engine_opts *o, float *out)
{
    struct ferry_engine *e = open_with("llama", o);
    struct ferry_session *s = session_of(e), *fork;

    ck_assert_int_eq(ferry_session_append(s, words, 300, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_fork(s, &fork), 0);
    for (int i = 0; i < 5; i++) {
        ck_assert_msg(ferry_session_append(fork, words + 1000 + 100 * i, 90, NULL, NULL) == 0, "%s", ferry_error());
        ck_assert_msg(ferry_session_append(s, words + 2000 + 100 * i, 90, NULL, NULL) == 0, "%s", ferry_error());
    }
    ck_assert_int_eq(ferry_session_logits(fork, ids, 2, false, out), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids, 2, false, out + 2 * N_VOCAB), 0);
    ferry_session_stats(s, &last_stats);
    ferry_session_free(fork);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}

START_TEST(fork_between_two_memories_changes_bits)
{
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");

    spill("llama", 1, &gpu);
    forks_say(&cpu, want);
    forks_say(&gpu, got);
    must_equal(want, got, 4);
    ck_assert_uint_gt(last_stats.gpu_segments, 0);
    ck_assert_uint_gt(last_stats.host_segments, 0);
}
END_TEST

/* Two sessions, of which the second finds no room on the GPU; the first ends; words of the second in two rounds: (2 * LAST, N_VOCAB). */
static void second_says(const struct ferry_engine_opts *o, float *out, struct ferry_stats stats[2])
{
    struct ferry_engine *e = open_with("llama", o);
    struct ferry_session *s = session_of(e), *second = session_of(e);

    ck_assert_int_eq(ferry_session_append(s, words, 300, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_append(second, words + 1000, 300, NULL, NULL), 0);
    ferry_session_free(s);
    for (int round = 0; round < 2; round++) {
        emu_in_step(true);
        for (int i = 0; i < LAST; i++)
            ck_assert_int_eq(
                ferry_session_logits(second, ids + round * LAST + i, 1, false, out + (round * LAST + i) * N_VOCAB), 0);
        emu_in_step(false);
        ferry_session_stats(second, &stats[round]);
    }
    ferry_session_free(second);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}

START_TEST(pages_stay_with_the_host_when_a_session_ends)
{
    static float here[2 * LAST * N_VOCAB], there[2 * LAST * N_VOCAB];
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");
    struct ferry_stats stats[2];

    spill("llama", 1, &gpu);
    second_says(&cpu, here, stats);
    second_says(&gpu, there, stats);
    must_equal(here, there, 2 * LAST);
    ck_assert_uint_gt(stats[0].host_segments, 0);
    ck_assert_uint_eq(stats[0].returned_segments, 1);
    ck_assert_uint_gt(stats[0].returned_bytes, 0);
    ck_assert_uint_eq(stats[0].left_segments, 0);
    ck_assert_uint_eq(stats[1].host_segments, stats[0].host_segments);
    ck_assert_uint_eq(stats[1].returned_segments, 1);
}
END_TEST

enum { N_PROMPTS = 4, ANSWER_TOK = 40 };

static struct ferry_batch_stats batch_stats; /* of the last batch */

/* Greedy answers to prompts of 330 to 630 words, of which some begin alike, three at a time. */
static void answers_of(const char *name, const struct ferry_engine_opts *o, int32_t answers[N_PROMPTS][ANSWER_TOK])
{
    struct ferry_engine *e = open_with(name, o);
    struct ferry_batch *b;
    struct ferry_answer *a;
    uint64_t id[N_PROMPTS];

    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    for (int i = 0; i < N_PROMPTS; i++) {
        struct ferry_request r;
        ferry_request_init(&r);
        r.tokens = words + (i == 3 ? 900 : 0);
        r.n_tokens = (size_t)(330 + 100 * i);
        r.max_tokens = ANSWER_TOK;
        r.ignore_eos = true;
        ck_assert_msg(ferry_batch_submit(b, &r, &id[i]) == 0, "%s", ferry_error());
    }
    for (int n = 0; n < N_PROMPTS;) {
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        for (int i = 0; a && i < N_PROMPTS; i++)
            if (a->id == id[i]) {
                ck_assert_uint_eq(a->n_tokens, ANSWER_TOK);
                memcpy(answers[i], a->tokens, sizeof answers[i]);
            }
        n += a != NULL;
        ferry_answer_free(a);
    }
    ferry_batch_stats(b, &batch_stats);
    ferry_batch_free(b);
    struct ferry_session *s = session_of(e); /* any says what the engine has done */
    ferry_session_stats(s, &last_stats);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}

START_TEST(batch_between_two_memories_says_something_else)
{
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0");
    int32_t here[N_PROMPTS][ANSWER_TOK], there[N_PROMPTS][ANSWER_TOK];

    cpu.n_batch = gpu.n_batch = 3;
    cpu.batch_tok = gpu.batch_tok = 32768;
    spill("llama", 2, &gpu);
    answers_of("llama", &cpu, here);
    answers_of("llama", &gpu, there);
    ck_assert_mem_eq(here, there, sizeof here);
    ck_assert_uint_gt(last_stats.gpu_segments, 0);
    ck_assert_uint_gt(last_stats.host_segments, 0);
    ck_assert_uint_gt(last_stats.staged_segments, 0);
}
END_TEST

/* The rates of this machine, as a profile; what a file of it is called. */
static const char *profile_with(double mem_rate)
{
    static const char path[] = TEST_BUILD_DIR "/t_cuda_kv-profile";
    struct machine m;
    char *text;

    ck_assert_int_eq(machine_find(&m), 0);
    m.mem_bytes_per_s = mem_rate;
    m.gpu_bytes_per_s = m.pcie_bytes_per_s = 1e9;
    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
    mem_free(text);
    return path;
}

/* The plan of an engine with other choices for its GPU (JSON), in a file. */
static const char *plan_with(const struct ferry_engine *e, const char *choices)
{
    static const char path[] = TEST_BUILD_DIR "/t_cuda_kv-plan";
    char *text;

    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    json_t *plan = json_loads(text, 0, NULL), *others = json_loads(choices, 0, NULL);
    ck_assert_int_eq(json_object_update(json_object_get(plan, "gpu"), others), 0);
    json_decref(others);
    ck_assert_int_eq(json_dump_file(plan, path, 0), 0);
    json_decref(plan);
    ferry_free(text);
    return path;
}

/* How many sequences run at once follows the rates of a profile: beside a slow CPU those that the GPU has pages for, beside a fast one
 * more. What they answer does not, wherever their pages come to lie. */
START_TEST(sequences_beyond_the_gpu_say_something_else)
{
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0"), saved = opts_of(NULL);
    int32_t here[N_PROMPTS][ANSWER_TOK], there[N_PROMPTS][ANSWER_TOK];
    uint64_t kv_tok;

    cpu.n_batch = gpu.n_batch = 2;
    cpu.batch_tok = gpu.batch_tok = 16384;
    answers_of("llama", &cpu, here);
    struct ferry_engine *e = open_with("llama", &gpu);
    gpu.vram_bytes = fact_of(e, "bytes", "total") + 7 * MIB; /* a third sequence, were there no more */
    ferry_engine_close(e);
    gpu.n_batch = FERRY_BATCH_AUTO;
    gpu.batch_most = 4;
    gpu.profile_path = profile_with(1e6);
    e = open_with("llama", &gpu);
    ck_assert(!find_fact(e, "kv_tok", NULL, &kv_tok));
    ferry_engine_close(e);
    answers_of("llama", &gpu, there);
    ck_assert_mem_eq(here, there, sizeof here);
    ck_assert_uint_eq(last_stats.host_segments, 0);
    gpu.profile_path = profile_with(1e9);
    e = open_with("llama", &gpu);
    ck_assert(find_fact(e, "kv_tok", NULL, &kv_tok));
    ck_assert_uint_ge(kv_tok, 2 * 16384);
    saved.plan_path = plan_with(e, "{\"kv_tok\": 1024}");
    ferry_engine_close(e);
    answers_of("llama", &gpu, there);
    ck_assert_mem_eq(here, there, sizeof here);
    answers_of("llama", &saved, there); /* short prompts: all in the GPU's pages, had it not fewer */
    ck_assert_mem_eq(here, there, sizeof here);
    ck_assert_uint_gt(last_stats.host_segments, 0);
    remove(gpu.profile_path);
    remove(saved.plan_path);
}
END_TEST

/* Steps in halves, with windows and without, with prompts in the first half and without: nobody says anything else for it. */
START_TEST(halves_say_something_else)
{
    static const char *const names[] = {"llama", "gemma2", "qwen2", "deepseek2-dense", "qwen35"};
    struct ferry_engine_opts cpu = opts_of("cpu"), gpu = opts_of("cuda:0"), saved = opts_of(NULL);
    int32_t here[N_PROMPTS][ANSWER_TOK], there[N_PROMPTS][ANSWER_TOK];
    const char *name = names[_i];

    cpu.n_batch = gpu.n_batch = 3;
    cpu.batch_tok = gpu.batch_tok = 32768;
    spill(name, 1, &gpu);
    answers_of(name, &cpu, here);
    struct ferry_engine *e = open_with(name, &gpu);
    saved.plan_path = plan_with(e, "{\"halves\": true}");
    ferry_engine_close(e);
    emu_seed((uint64_t)_i + 2);
    answers_of(name, &saved, there);
    ck_assert_mem_eq(here, there, sizeof here);
    ck_assert_uint_ge(batch_stats.n_halved, ANSWER_TOK);
    ck_assert_uint_lt(batch_stats.n_halved, batch_stats.n_steps);
    ck_assert_uint_gt(last_stats.gpu_segments, 0);
    ck_assert_uint_gt(last_stats.host_segments, 0);
    answers_of(name, &gpu, there); /* the plan's are whole, rates being unknown */
    ck_assert_mem_eq(here, there, sizeof here);
    ck_assert_uint_eq(batch_stats.n_halved, 0);
    remove(saved.plan_path);
}
END_TEST

/* ---- the plan ---- */

START_TEST(plan_does_not_say_what_lies_where)
{
    char path[] = TEST_BUILD_DIR "/t_cuda_kv-XXXXXX", *text;
    struct ferry_engine_opts gpu = opts_of("cuda:0"), saved = opts_of(NULL);

    spill("llama", 3, &gpu);
    struct ferry_engine *e = open_with("llama", &gpu);
    ck_assert_int_eq(ferry_engine_plan(e, false, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "1536 positions, attention computed there"));
    ck_assert_ptr_nonnull(strstr(text, "the rest of it, pinned"));
    ck_assert_ptr_nonnull(strstr(text, "do not fit beside the dense weights"));
    ferry_free(text);
    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    ferry_engine_close(e);
    FILE *f = fdopen(mkstemp(path), "w");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
    ferry_free(text);
    saved.plan_path = path;
    e = open_with("llama", &saved);
    ck_assert_uint_eq(fact_of(e, "kv_tok", NULL), 3 * SEGMENT);
    ck_assert_uint_eq(emu_device_bytes() + 14 * MIB, fact_of(e, "bytes", "total"));
    ferry_engine_close(e);
    remove(path);
}
END_TEST

/* A byte less than one segment beside the rest: then layers are the CPU's, and, as not one fits with its whole cache, that of the others is
 * shared. */
START_TEST(plan_without_room_for_a_segment_is_another)
{
    struct ferry_engine_opts gpu = opts_of("cuda:0");
    struct ferry_engine *e;

    spill("llama", 1, &gpu);
    gpu.vram_bytes--;
    e = open_with("llama", &gpu);
    ck_assert_uint_eq(fact_of(e, "first_layer", NULL), 1);
    ck_assert_uint_ge(fact_of(e, "kv_tok", NULL), SEGMENT);
    ferry_engine_close(e);
    gpu.vram_bytes = MIB;
    ck_assert_int_eq(try_open("llama", &gpu, &e), FERRY_ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "does not fit GPU 0"));
}
END_TEST

static TCase *add_case(Suite *suite, const char *name)
{
    TCase *tc = tcase_create(name);

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 240);
    suite_add_tcase(suite, tc);
    return tc;
}

int main(void)
{
    Suite *suite = suite_create("cuda_kv");
    TCase *context = add_case(suite, "context"), *step = add_case(suite, "step"), *drop = add_case(suite, "drop"),
          *fail = add_case(suite, "fail");
    TCase *several = add_case(suite, "several"), *plan = add_case(suite, "plan");

    tcase_add_loop_test(context, context_beyond_the_gpu_changes_bits, 0, 6);
    tcase_add_test(step, order_of_streams_changes_bits);
    tcase_add_loop_test(step, several_waves_change_bits, 0, 2);
    if (!emu_is_real()) /* hardware may be quick enough for nobody to see it */
        tcase_add_test(drop, dropped_wait_is_not_seen);
    tcase_add_loop_test(fail, failed_call_in_a_step_spoils_the_sequence, 0, 2);
    tcase_add_test(several, fork_between_two_memories_changes_bits);
    tcase_add_test(several, pages_stay_with_the_host_when_a_session_ends);
    tcase_add_test(several, batch_between_two_memories_says_something_else);
    tcase_add_test(several, sequences_beyond_the_gpu_say_something_else);
    tcase_add_loop_test(several, halves_say_something_else, 0, 5);
    tcase_add_loop_test(plan, failed_call_at_open_leaves_something, 0, 2);
    tcase_add_test(plan, plan_does_not_say_what_lies_where);
    tcase_add_test(plan, plan_without_room_for_a_segment_is_another);
    return run_suite(suite);
}
