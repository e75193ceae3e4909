/* ferry bench: speed of prefill and decode, and the share of what memory gives, measured in the same run. */
#include "src/cli/cmd.h"

#include "cpu/cpu.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/profile.h"
#include "src/cli/stop.h"
#include "src/cli/talk.h"
#include "src/cli/term.h"
#include "src/ferry.h"
#include "src/plan/plan.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>

enum { MAX_REPS = 1000, ROOF_REPS = 5 };
#define ROOF_BYTES (512 * MIB)

struct bench {
    const struct conf *conf; /* view */
    struct talk talk;
    struct ferry_batch *batch; /* own; NULL: the tests are talk.session's */
    struct machine machine;
    double roof_bytes_per_s;
    uint64_t random; /* state of the draws */
    int32_t *tokens; /* own: room for the longer test, or the depth */
    float *logits;   /* own: (n_vocab) */
};

/* What one test gave. */
struct result {
    char name[48];
    double tokens_per_s, least, most; /* median, slowest, fastest */
    double ram_bytes_per_tok, disk_bytes_per_tok;
    double predicted; /* by the plan; 0: not known, or not for so many tokens */
    double disk_wait_s_per_tok;
    double hit_share;  /* of the experts wanted, in memory or on their way; NAN: none were wanted */
    bool memory_bound; /* one token at a time: weights are read for each */
};

/* splitmix64, a published generator: good enough to pick tokens, the same everywhere. */
static uint64_t draw(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void draw_tokens(struct bench *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        b->tokens[i] = (int32_t)(draw(&b->random) % b->talk.info.n_vocab);
}

/* ---- one repetition ---- */

/* What a repetition took, or where the counters stood. */
struct lap {
    uint64_t ns, n_tok, ram_bytes, disk_bytes, disk_wait_ns, n_hits, n_misses;
};

static void look(const struct bench *b, struct lap *out)
{
    if (b->batch) {
        struct ferry_batch_stats s;
        ferry_batch_stats(b->batch, &s);
        *out = (struct lap){0, 0, s.weight_bytes, s.disk_bytes, s.disk_wait_ns, s.expert_hits, s.expert_misses};
    } else {
        struct ferry_stats s;
        ferry_session_stats(b->talk.session, &s);
        *out = (struct lap){.ram_bytes = s.weight_bytes_prompt + s.weight_bytes_generate,
                            .disk_bytes = s.disk_bytes,
                            .disk_wait_ns = s.disk_wait_ns,
                            .n_hits = s.expert_hits,
                            .n_misses = s.expert_misses};
    }
    out->ns = clock_ns();
}

/* What it took since from, for n_tok tokens. */
static struct lap lap_since(const struct bench *b, const struct lap *from, uint64_t n_tok)
{
    struct lap to;

    look(b, &to);
    return (struct lap){to.ns - from->ns + 1,
                        n_tok,
                        to.ram_bytes - from->ram_bytes,
                        to.disk_bytes - from->disk_bytes,
                        to.disk_wait_ns - from->disk_wait_ns,
                        to.n_hits - from->n_hits,
                        to.n_misses - from->n_misses};
}

static void lap_add(struct lap *sum, const struct lap *one)
{
    sum->ns += one->ns;
    sum->n_tok += one->n_tok;
    sum->ram_bytes += one->ram_bytes;
    sum->disk_bytes += one->disk_bytes;
    sum->disk_wait_ns += one->disk_wait_ns;
    sum->n_hits += one->n_hits;
    sum->n_misses += one->n_misses;
}

static int run_prompt(struct bench *b, size_t n)
{
    return ferry_session_append(b->talk.session, b->tokens, n, NULL, NULL);
}

/* Given tokens, one by one, as if they had been drawn: what they are must not depend on the answer. */
static int run_generate(struct bench *b, size_t n)
{
    int rc = 0;

    for (size_t i = 0; i < n && !rc; i++)
        rc = stop_asked() ? err(ERR_CANCEL, "interrupted")
                          : ferry_session_logits(b->talk.session, b->tokens + i, 1, false, b->logits);
    return rc;
}

/* Tokens that are there before a test begins; once, since each repetition takes back only its own. */
static int fill_depth(struct bench *b)
{
    size_t n = b->conf->bench_depth;

    if (!n)
        return 0;
    draw_tokens(b, n);
    return run_prompt(b, n);
}

/* Back to the depth. Where a sliding window has let go of what the next token needs, the step that is not counted runs it
 * again. */
static int rewind_session(struct bench *b)
{
    size_t n = b->conf->bench_depth;
    int rc = ferry_session_truncate(b->talk.session, n ? n - 1 : 0);

    draw_tokens(b, 1);
    return rc || !n ? rc : run_prompt(b, 1);
}

static int session_lap(struct bench *b, size_t n, bool generate, struct lap *out)
{
    struct lap from;
    int rc = rewind_session(b);

    draw_tokens(b, n);
    look(b, &from);
    if (!rc)
        rc = generate ? run_generate(b, n) : run_prompt(b, n);
    *out = lap_since(b, &from, n);
    return rc;
}

/* ---- the same of many sequences ---- */

/* A sequence of drawn tokens whose answer goes on for max_tok, almost evenly drawn from the likeliest 40: what is drawn must not settle. */
static int submit(struct bench *b, size_t n, size_t max_tok)
{
    struct ferry_sample_opts sample;
    struct ferry_request q;
    uint64_t id;

    ferry_sample_opts_init(&sample);
    sample.temperature = 100;
    sample.top_k = 40;
    sample.seed = draw(&b->random);
    ferry_request_init(&q);
    draw_tokens(b, n);
    q.tokens = b->tokens;
    q.n_tokens = n;
    q.max_tokens = max_tok;
    q.ignore_eos = true;
    q.sample = &sample;
    return ferry_batch_submit(b->batch, &q, &id);
}

static int submit_all(struct bench *b, size_t n, size_t max_tok)
{
    int rc = 0;

    for (uint32_t i = 0; i < b->conf->n_sequences && !rc; i++)
        rc = submit(b, n, max_tok);
    return rc;
}

/* A step, or an answer that is finished: then *n_done counts on. */
static int poll(struct bench *b, uint32_t *n_done)
{
    struct ferry_answer *a = NULL;
    int rc = stop_asked() ? err(ERR_CANCEL, "interrupted") : ferry_batch_poll(b->batch, &a);

    if (a && a->finish == FERRY_FINISH_FAILED)
        rc = err(a->status, "%s", a->error);
    *n_done += a != NULL;
    ferry_answer_free(a);
    return rc;
}

/* From the first step until each has its first token. */
static int prompts_lap(struct bench *b, size_t n, struct lap *out)
{
    uint32_t n_done = 0, n_seq = b->conf->n_sequences;
    struct lap from;
    int rc = submit_all(b, n, 1);

    look(b, &from);
    while (!rc && n_done < n_seq)
        rc = poll(b, &n_done);
    *out = lap_since(b, &from, (uint64_t)n * n_seq);
    return rc;
}

/* From where each has its first token until one of them has all: steps of a row of each. */
static int answers_lap(struct bench *b, size_t n, struct lap *out)
{
    uint32_t n_done = 0, n_seq = b->conf->n_sequences;
    struct ferry_batch_stats st;
    struct lap from;
    int rc = submit_all(b, 1, n + 1);

    ferry_batch_stats(b->batch, &st);
    uint64_t first = st.n_generated + n_seq;
    while (!rc && st.n_generated < first && !n_done) {
        rc = poll(b, &n_done);
        ferry_batch_stats(b->batch, &st);
    }
    if (!rc && n_done)
        return err(ERR_LIMIT, "answers of %zu tokens are too short for %" PRIu32 " sequences to run together", n,
                   n_seq);
    first = st.n_generated;
    look(b, &from);
    while (!rc && !n_done) {
        rc = poll(b, &n_done);
        ferry_batch_stats(b->batch, &st);
    }
    *out = lap_since(b, &from, st.n_generated - first);
    while (!rc && n_done < n_seq)
        rc = poll(b, &n_done);
    if (!rc && (st.n_preempted || st.most_running < n_seq))
        rc = err(ERR_LIMIT,
                 "%" PRIu32 " sequences do not run together: %" PRIu32 " did, and gave pages back %" PRIu64 " times",
                 n_seq, st.most_running, st.n_preempted);
    return rc;
}

/* ---- a test ---- */

static void name_test(const struct bench *b, const char *what, size_t n, struct result *out)
{
    int used = b->batch ? snprintf(out->name, sizeof out->name, "s%" PRIu32, b->conf->n_sequences) : 0;
    char *end = out->name + used;
    size_t room = sizeof out->name - (size_t)used;

    if (b->conf->bench_depth)
        snprintf(end, room, "%s%zu@%" PRIu32, what, n, b->conf->bench_depth);
    else
        snprintf(end, room, "%s%zu", what, n);
}

/* By the plan; of a session its beginning, of a batch a token each. */
static double predicted(const struct bench *b, size_t n, bool generate)
{
    struct ferry_batch_speed speed = {0};

    if (b->batch && generate)
        ferry_batch_speed(b->batch, &speed);
    if (b->batch || !b->talk.info.is_measured || b->conf->bench_depth)
        return speed.predicted_tok_per_s;
    if (generate)
        return b->talk.info.predicted_decode_tok_per_s;
    return n == PLAN_PROMPT_TOK ? b->talk.info.predicted_prefill_tok_per_s : 0;
}

/* Warm-up, then the repetitions; each begins at the same depth and draws tokens of its own. */
static int measure(struct bench *b, const char *what, size_t n, bool generate, struct result *out)
{
    size_t n_reps = b->conf->n_reps;
    double rates[MAX_REPS];
    struct lap sum = {0};

    name_test(b, what, n, out);
    for (size_t rep = 0; rep <= n_reps; rep++) {
        struct lap lap;
        int rc = !b->batch  ? session_lap(b, n, generate, &lap)
                 : generate ? answers_lap(b, n, &lap)
                            : prompts_lap(b, n, &lap);
        if (rc)
            return rc;
        if (!rep)
            continue;
        lap_add(&sum, &lap);
        rates[rep - 1] = (double)lap.n_tok * 1e9 / (double)lap.ns;
        if (!b->conf->quiet)
            fprintf(stderr, "%s, %zu of %zu: %.2f tokens/s\n", out->name, rep, n_reps, rates[rep - 1]);
    }
    out->tokens_per_s = clock_median(rates, n_reps);
    out->least = rates[0];
    out->most = rates[n_reps - 1];
    out->memory_bound = generate;
    out->predicted = predicted(b, n, generate);
    double n_tok = (double)sum.n_tok, n_wanted = (double)(sum.n_hits + sum.n_misses);
    out->ram_bytes_per_tok = (double)sum.ram_bytes / n_tok;
    out->disk_bytes_per_tok = (double)sum.disk_bytes / n_tok;
    out->disk_wait_s_per_tok = (double)sum.disk_wait_ns * 1e-9 / n_tok;
    out->hit_share = n_wanted > 0 ? (double)sum.n_hits / n_wanted : NAN;
    return 0;
}

/* ---- reports ---- */

static double roof_share(const struct bench *b, const struct result *r)
{
    return b->roof_bytes_per_s > 0 ? r->tokens_per_s * r->ram_bytes_per_tok / b->roof_bytes_per_s : 0;
}

static void print_text(const struct bench *b, const struct result *results, int n)
{
    const struct ferry_info *info = &b->talk.info;

    printf("%s (%s), %" PRIu32 " threads, %s; memory gives %.1f GB/s\n", info->name, info->architecture,
           info->n_threads, info->isa, b->roof_bytes_per_s / 1e9);
    printf("%-10s %12s %22s %12s %14s %12s\n", "test", "tokens/s", "slowest .. fastest", "predicted", "MB a token",
           "of memory");
    for (int i = 0; i < n; i++) {
        const struct result *r = &results[i];
        printf("%-10s %12.2f %11.2f ..%9.2f", r->name, r->tokens_per_s, r->least, r->most);
        if (r->predicted > 0)
            printf(" %12.2f", r->predicted);
        else
            printf(" %12s", "-");
        printf(" %14.2f", r->ram_bytes_per_tok / 1e6);
        if (r->memory_bound)
            printf(" %10.1f %%\n", 100 * roof_share(b, r));
        else
            printf(" %12s\n", "-");
    }
    for (int i = 0; i < n; i++) {
        const struct result *r = &results[i];
        if (r->disk_bytes_per_tok > 0)
            printf("%-10s %12.2f MB a token from disk, waited %.1f ms for them; of the experts wanted %.1f %% were "
                   "there\n",
                   r->name, r->disk_bytes_per_tok / 1e6, r->disk_wait_s_per_tok * 1e3, 100 * r->hit_share);
    }
}

static json_t *json_result(const struct bench *b, const struct result *r)
{
    json_t *roof = json_pack("{s:s}", "bound", r->memory_bound ? "memory" : "compute");

    /* What arithmetic could give at most was not measured. */
    json_object_set_new(roof, "fraction", r->memory_bound ? json_real(roof_share(b, r)) : json_null());
    json_t *o =
        json_pack("{s:s, s:f, s:f, s:f, s:{s:f, s:f, s:f}, s:o}", "name", r->name, "tokens_per_s", r->tokens_per_s,
                  "slowest_tokens_per_s", r->least, "fastest_tokens_per_s", r->most, "bytes_per_token", "ram",
                  r->ram_bytes_per_tok, "disk", r->disk_bytes_per_tok, "pcie", 0.0, "roof", roof);
    json_object_set_new(o, "disk_wait_s_per_token", json_real(r->disk_wait_s_per_tok));
    json_object_set_new(o, "expert_hit_share", isnan(r->hit_share) ? json_null() : json_real(r->hit_share));
    json_object_set_new(o, "predicted_tokens_per_s", r->predicted > 0 ? json_real(r->predicted) : json_null());
    return o;
}

static int print_json(const struct bench *b, const struct result *results, int n)
{
    char *plan = NULL, *machine = NULL;
    int rc = ferry_engine_plan(b->talk.engine, true, &plan);

    if (!rc)
        rc = machine_to_json(&b->machine, &machine);
    if (rc)
        goto out;
    json_t *o = json_object(), *tests = json_array();
    json_object_set_new(o, "model", json_string(b->talk.info.name));
    json_object_set_new(o, "file", json_string(b->conf->model));
    json_object_set_new(o, "isa", json_string(b->talk.info.isa));
    json_object_set_new(o, "threads", json_integer(b->talk.info.n_threads));
    json_object_set_new(o, "machine", json_loads(machine, 0, NULL));
    json_object_set_new(o, "plan", json_loads(plan, 0, NULL));
    for (int i = 0; i < n; i++)
        json_array_append_new(tests, json_result(b, &results[i]));
    json_object_set_new(o, "tests", tests);
    if (json_dumpf(o, stdout, JSON_INDENT(2)))
        rc = err(ERR_NOMEM, "the report as JSON");
    json_decref(o);
    putchar('\n');
out:
    ferry_free(plan);
    mem_free(machine);
    return rc;
}

/* ---- the whole ---- */

/* An engine for a batch, in place of one with a session. */
static int open_batch(struct bench *b, uint32_t n_ctx)
{
    const struct conf *conf = b->conf;
    struct term_progress progress;
    struct ferry_engine_opts opts = talk_engine_opts(conf, n_ctx, 0, &progress);
    char *profile = NULL;
    int rc = profile_path(conf, &profile);

    if (rc)
        return rc;
    opts.n_batch = conf->n_sequences;
    opts.batch_tok = n_ctx;
    opts.profile_path = profile;
    b->talk.conf = conf;
    stop_begin();
    term_progress_begin(&progress, conf, "loading", NULL);
    rc = ferry_engine_open(conf->model, &opts, &b->talk.engine);
    term_progress_end(&progress);
    mem_free(profile);
    if (!rc)
        rc = ferry_batch_make(b->talk.engine, &b->batch);
    if (rc)
        return rc;
    ferry_engine_info(b->talk.engine, &b->talk.info);
    stop_watch_batch(b->batch);
    return 0;
}

static int open_bench(struct bench *b)
{
    const struct conf *conf = b->conf;
    uint32_t longest = conf->bench_prompt > conf->bench_generate ? conf->bench_prompt : conf->bench_generate;
    /* A sequence of a batch begins with a token, and draws one before it is timed. */
    uint64_t n_ctx = (uint64_t)conf->bench_depth + longest + (conf->n_sequences ? 2 : 0);
    uint64_t n_tokens = longest > conf->bench_depth ? longest : conf->bench_depth;

    if (n_ctx > UINT32_MAX)
        return err(ERR_LIMIT, "a depth of %" PRIu32 " and %" PRIu32 " tokens", conf->bench_depth, longest);
    uint32_t opened = conf->n_ctx ? conf->n_ctx : (uint32_t)n_ctx;
    int rc = conf->n_sequences ? open_batch(b, opened) : talk_open(conf, opened, 1, &b->talk);
    if (rc)
        return rc;
    if (n_ctx > b->talk.info.n_ctx)
        return err(ERR_LIMIT, "tests of %" PRIu32 " tokens at a depth of %" PRIu32 " do not fit a context of %" PRIu32,
                   longest, conf->bench_depth, b->talk.info.n_ctx);
    b->tokens = mem_zalloc(n_tokens, sizeof *b->tokens, MEM_OTHER);
    b->logits = mem_zalloc(b->talk.info.n_vocab, sizeof *b->logits, MEM_OTHER);
    b->random = conf->seed;
    return b->tokens && b->logits ? 0 : err(ERR_NOMEM, "%" PRIu64 " tokens", n_tokens);
}

/* The roof: before the model fills memory, with the same number of threads. */
static int measure_roof(struct bench *b)
{
    int rc = profile_find(&b->machine);
    int n_threads = b->conf->n_threads ? (int)b->conf->n_threads : b->machine.n_cores;

    if (!rc)
        rc = cpu_read_rate(n_threads, ROOF_BYTES, ROOF_REPS, &b->roof_bytes_per_s);
    b->machine.mem_bytes_per_s = b->roof_bytes_per_s;
    return rc;
}

int cmd_bench(const struct conf *conf)
{
    struct bench b = {.conf = conf};
    struct result results[2] = {0};
    int n = 0;

    if (!conf->bench_prompt && !conf->bench_generate)
        return term_usage(conf, "has nothing to measure: -p and -n are both 0");
    if (conf->n_sequences && conf->bench_depth)
        return term_usage(conf, "--depth is of a session: sequences of a batch begin with the test");
    int rc = measure_roof(&b);
    if (rc)
        return term_fail(rc);
    rc = open_bench(&b);
    if (!rc)
        rc = fill_depth(&b);
    if (!rc && conf->bench_prompt)
        rc = measure(&b, "pp", conf->bench_prompt, false, &results[n++]);
    if (!rc && conf->bench_generate)
        rc = measure(&b, "tg", conf->bench_generate, true, &results[n++]);
    if (!rc)
        rc = talk_trace(&b.talk);
    if (!rc && conf->json)
        rc = print_json(&b, results, n);
    else if (!rc)
        print_text(&b, results, n);
    mem_free(b.tokens);
    mem_free(b.logits);
    ferry_batch_free(b.batch);
    talk_close(&b.talk);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
