/* Many prompts at once on the tiny models of tests/data/models: each has to say, bit for bit, what a session alone says, whatever
 * its company, the memory, and what was taken from it on the way. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { N_IDS = 150, N_VOCAB = 288, N_REQ = 32, MOST_TOK = 90 };

static int32_t ids[N_IDS];

static void setup(void)
{
    FILE *f = fopen(TEST_DATA_DIR "/models/ids.txt", "r");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_IDS; i++)
        ck_assert_int_eq(fscanf(f, "%d", &ids[i]), 1);
    fclose(f);
}

static struct ferry_engine_opts small_opts(void)
{
    struct ferry_engine_opts o;
    ferry_engine_opts_init(&o);
    o.n_ctx = 256;
    o.n_threads = 1;
    o.no_pin = true;
    o.io = "pread";
    return o;
}

static struct ferry_engine *open_with(const char *name, const struct ferry_engine_opts *o)
{
    char path[1024];
    struct ferry_engine *e = NULL;
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    ck_assert_msg(ferry_engine_open(path, o, &e) == 0, "%s: %s", name, ferry_error());
    return e;
}

/* One request: a stretch of ids, or two, so that some begin alike, and a way of drawing. */
struct req {
    int32_t token[N_IDS];
    size_t n_tok, max_tok;
    bool ignore_eos;
    struct ferry_sample_opts sample;
};

struct said {
    int32_t token[MOST_TOK];
    size_t n;
    bool ended; /* by the model */
};

/* Of every three, one shares 70 tokens with the others of its kind, one shares 20, one nothing. */
static struct req req_of(int i)
{
    struct req r = {.max_tok = 1 + (size_t)(i * 7) % MOST_TOK, .ignore_eos = i % 4 != 0};
    size_t n_same = i % 3 == 0 ? 70 : i % 3 == 1 ? 20 : 0, n_own = 1 + (size_t)(i * 13) % 60;
    for (size_t k = 0; k < n_same; k++)
        r.token[r.n_tok++] = ids[k + (size_t)(i % 3) * 5];
    for (size_t k = 0; k < n_own; k++)
        r.token[r.n_tok++] = ids[(k * 3 + (size_t)i * 11) % N_IDS];
    ferry_sample_opts_init(&r.sample);
    if (i % 2) {
        r.sample.temperature = 0.5f + 0.1f * (float)(i % 9);
        r.sample.seed = (uint64_t)i;
        r.sample.top_k = i % 5 * 10;
        r.sample.top_p = i % 7 ? 1.0f : 0.9f;
        r.sample.repeat_penalty = i % 11 ? 1.0f : 1.3f;
    }
    return r;
}

/* What a session alone says. */
static struct said say_alone(struct ferry_engine *e, const struct req *r)
{
    struct said out = {.n = 0};
    struct ferry_session *s = NULL;
    ck_assert_msg(ferry_session_make(e, &r->sample, &s) == 0, "%s", ferry_error());
    ck_assert_int_eq(ferry_session_append(s, r->token, r->n_tok, NULL, NULL), 0);
    while (out.n < r->max_tok) {
        int32_t token;
        ck_assert_msg(ferry_session_step(s, &token) == 0, "%s", ferry_error());
        if (!r->ignore_eos && ferry_token_is_end(e, token)) {
            out.ended = true;
            break;
        }
        out.token[out.n++] = token;
    }
    ferry_session_free(s);
    return out;
}

static uint64_t submit(struct ferry_batch *b, const struct req *r)
{
    struct ferry_request q;
    uint64_t id = 0;
    ferry_request_init(&q);
    q.tokens = r->token;
    q.n_tokens = r->n_tok;
    q.max_tokens = r->max_tok;
    q.ignore_eos = r->ignore_eos;
    q.sample = &r->sample;
    ck_assert_msg(ferry_batch_submit(b, &q, &id) == 0, "%s", ferry_error());
    return id;
}

static void must_be(const struct ferry_answer *a, const struct said *want, const char *what, int i)
{
    ck_assert_msg(a->n_tokens == want->n && memcmp(a->tokens, want->token, want->n * sizeof *a->tokens) == 0,
                  "%s, prompt %d: other words than alone (%zu tokens, not %zu)", what, i, a->n_tokens, want->n);
    ck_assert_msg(a->finish == (want->ended ? FERRY_FINISH_STOP : FERRY_FINISH_LENGTH), "%s, prompt %d: end %d", what,
                  i, (int)a->finish);
}

struct way {
    const char *name;
    uint32_t n_batch, batch_tok, chunk_tok;
    int late; /* so many are submitted at first, the others one by one */
    const char *spill_dir;
};

/* Runs all requests in this way and compares. */
static struct ferry_batch_stats run_way(const char *model, const struct way *w, const struct req *reqs,
                                        const struct said *want)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_batch *b = NULL;
    struct ferry_batch_stats st;
    char what[80];
    uint64_t first = 0;
    int n_in = 0, n_out = 0;

    snprintf(what, sizeof what, "%s, %s", model, w->name);
    o.n_batch = w->n_batch;
    o.batch_tok = w->batch_tok;
    o.chunk_tok = w->chunk_tok;
    o.spill_dir = w->spill_dir;
    struct ferry_engine *e = open_with(model, &o);
    ck_assert_msg(ferry_batch_make(e, &b) == 0, "%s", ferry_error());
    for (; n_in < w->late; n_in++)
        first = n_in ? (submit(b, &reqs[n_in]), first) : submit(b, &reqs[n_in]);
    for (int step = 0; n_out < N_REQ; step++) {
        struct ferry_answer *a = NULL;
        ck_assert_msg(step < 100000, "%s: no end", what);
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s: %s", what, ferry_error());
        if (n_in < N_REQ) {
            uint64_t id = submit(b, &reqs[n_in++]);
            first = first ? first : id;
        }
        if (!a)
            continue;
        must_be(a, &want[a->id - first], what, (int)(a->id - first));
        ferry_answer_free(a);
        n_out++;
    }
    ferry_batch_stats(b, &st);
    ck_assert_uint_eq(st.n_waiting + st.n_running + st.n_finished, 0);
    ferry_batch_free(b);
    ferry_engine_close(e);
    return st;
}

static const char *const exact_models[] = {"mixed",     "gemma3",        "qwen2moe",  "llama-yarn",
                                           "deepseek2", "deepseek2-old", "qwen3next", "qwen35"};
enum { N_EXACT = sizeof exact_models / sizeof *exact_models };

START_TEST(company_changes_the_words)
{
    static const struct way ways[] = {
        {"all at once", 32, 256, 0, N_REQ, NULL},   {"five at a time", 5, 256, 33, N_REQ, NULL},
        {"one at a time", 1, 256, 64, 1, NULL},     {"coming and going", 8, 256, 16, 3, NULL},
        {"little memory", 16, 24, 40, N_REQ, NULL}, {"hardly any memory", 32, 1, 512, N_REQ, NULL},
    };
    const char *model = exact_models[_i];
    struct ferry_engine_opts o = small_opts();
    static struct req reqs[N_REQ];
    static struct said want[N_REQ];
    struct ferry_engine *e = open_with(model, &o);
    size_t n_prompt = 0;
    for (int i = 0; i < N_REQ; i++) {
        reqs[i] = req_of(i);
        want[i] = say_alone(e, &reqs[i]);
        n_prompt += reqs[i].n_tok;
    }
    ferry_engine_close(e);
    for (size_t k = 0; k < sizeof ways / sizeof *ways; k++) {
        struct ferry_batch_stats st = run_way(model, &ways[k], reqs, want);
        ck_assert_uint_le(st.most_running, ways[k].n_batch);
        ck_assert_msg(st.n_preempted || ways[k].batch_tok >= 256 || k == 5,
                      "%s: memory was not short (%llu of %llu pages)", ways[k].name,
                      (unsigned long long)st.kv_pages_used, (unsigned long long)st.kv_pages);
        ck_assert_msg(st.n_preempted || st.n_prompt + st.n_shared == n_prompt, "%llu run and %llu shared of %zu",
                      (unsigned long long)st.n_prompt, (unsigned long long)st.n_shared, n_prompt);
        ck_assert_msg(k == 0 ? st.n_shared >= 70 * 10 : true, "shared only %llu", (unsigned long long)st.n_shared);
    }
}
END_TEST

/* Pages that are given back are kept in a file, or not where that takes longer: with neither way, nor when the disk is full, does a
 * word change. The first time nothing is known of the disk, and it is tried. */
START_TEST(spilling_changes_the_words)
{
    static const struct way ways[] = {{"little memory, spilled", 16, 24, 40, N_REQ, TEST_BUILD_DIR},
                                      {"hardly any memory, spilled", 32, 1, 512, N_REQ, TEST_BUILD_DIR},
                                      {"spilled in small steps", 8, 24, 3, 3, TEST_BUILD_DIR}};
    static const char *const models[] = {"mixed", "qwen2moe", "llama-yarn", "deepseek2"};
    struct ferry_engine_opts o = small_opts();
    static struct req reqs[N_REQ];
    static struct said want[N_REQ];
    struct rlimit limit;
    struct ferry_engine *e = open_with(models[_i], &o);
    for (int i = 0; i < N_REQ; i++) {
        reqs[i] = req_of(i);
        want[i] = say_alone(e, &reqs[i]);
    }
    ferry_engine_close(e);
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    for (int full = 0; full < 2; full++)
        for (size_t k = 0; k < sizeof ways / sizeof *ways; k++) {
            rlim_t most = limit.rlim_cur;
            limit.rlim_cur = full ? 100 : most;
            ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
            struct ferry_batch_stats st = run_way(models[_i], &ways[k], reqs, want);
            limit.rlim_cur = most;
            ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
            ck_assert_uint_gt(st.n_preempted, 0);
            ck_assert_uint_le(st.n_spilled, st.n_preempted);
            if (full)
                ck_assert(st.n_spilled == 0 && st.n_spill_failed > 0);
            else
                ck_assert(st.n_spilled > 0 && st.n_spill_failed == 0);
        }
}
END_TEST

/* A request whose pages are in the file is dropped, and so is a batch; no window or record can be spilled, and no folder be missing. */
START_TEST(spilled_request_cannot_go)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_batch *b = NULL;
    struct ferry_batch_stats st = {0};
    uint64_t id[8];
    o.n_batch = 8;
    o.batch_tok = 1;
    o.spill_dir = TEST_BUILD_DIR;
    struct ferry_engine *e = open_with("mixed", &o);
    for (int drop_all = 0; drop_all < 2; drop_all++) {
        ck_assert_int_eq(ferry_batch_make(e, &b), 0);
        for (int i = 0; i < 8; i++) {
            struct req r = req_of(i * 3 + 2);
            r.max_tok = MOST_TOK;
            r.ignore_eos = true;
            id[i] = submit(b, &r);
        }
        struct ferry_answer *a = NULL;
        do
            ck_assert_int_eq(ferry_batch_poll(b, &a), 0);
        while ((ferry_batch_stats(b, &st), st.n_spilled == 0) && !a);
        ck_assert_uint_gt(st.n_spilled, 0);
        ferry_answer_free(a);
        for (int i = 0; i < 8 && !drop_all; i++)
            ferry_batch_cancel(b, id[i]);
        ferry_batch_free(b);
    }
    ferry_engine_close(e);
    for (int i = 0; i < 2; i++) {
        e = open_with(i ? "qwen35" : "gemma3", &o);
        ck_assert_int_eq(ferry_batch_make(e, &b), FERRY_ERR_UNSUPPORTED);
        ck_assert_ptr_nonnull(strstr(ferry_error(), i ? "recurrent layers" : "sliding windows"));
        ferry_engine_close(e);
    }
    o.spill_dir = "/no/such/folder";
    e = open_with("mixed", &o);
    ck_assert_int_eq(ferry_batch_make(e, &b), FERRY_ERR_IO);
    ck_assert_ptr_null(b);
    ferry_engine_close(e);
}
END_TEST

/* ---- shared beginnings ---- */

/* 64 prompts of 128 equal tokens and 6 of their own: the equal ones are run once, whatever number of them runs together. */
START_TEST(shared_beginning_is_run_for_each)
{
    static const uint32_t batches[] = {4, 16, 64, 16};
    static const char *const names[] = {"llama", "gemma3", "llama",
                                        "qwen35moe"}; /* the second has windows, the last records */
    enum { N = 64, SAME = 128, OWN = 6 };
    struct ferry_engine_opts o = small_opts();
    struct ferry_batch *b = NULL;
    struct ferry_batch_stats st;
    o.n_batch = batches[_i];
    o.chunk_tok = 50;
    struct ferry_engine *e = open_with(names[_i], &o);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    for (int i = 0; i < N; i++) {
        struct req r = {.n_tok = SAME + OWN, .max_tok = 3, .ignore_eos = true};
        ferry_sample_opts_init(&r.sample);
        memcpy(r.token, ids, SAME * sizeof *ids);
        for (int k = 0; k < OWN; k++)
            r.token[SAME + k] = 10 + (i * 7 + k * k + (k == 0) * i) % 250;
        submit(b, &r);
    }
    for (int n = 0; n < N;) {
        struct ferry_answer *a = NULL;
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        n += a != NULL;
        ferry_answer_free(a);
    }
    ferry_batch_stats(b, &st);
    ck_assert_uint_eq(st.n_prompt + st.n_shared, N * (SAME + OWN));
    ck_assert_msg(st.n_prompt <= SAME + N * OWN, "%llu prompt tokens were run; %d are enough",
                  (unsigned long long)st.n_prompt, SAME + N * OWN);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

/* ---- scores and log-probabilities ---- */

/* Of given tokens: worked out here, in double, from the logits of a session. */
START_TEST(score_is_not_that_of_the_logits)
{
    enum { N_TOK = 90, N_SCORED = 37 };
    static float logits[N_TOK * N_VOCAB];
    struct ferry_engine_opts o = small_opts();
    struct ferry_session *s = NULL;
    struct ferry_batch *b = NULL;
    struct ferry_answer *a = NULL;
    struct ferry_request q;
    uint64_t id;
    o.n_batch = 4;
    o.chunk_tok = 29;
    struct ferry_engine *e = open_with(_i ? "qwen35moe" : "mixed", &o);
    ck_assert_int_eq(ferry_session_make(e, NULL, &s), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids, 4, true, logits), 0);
    for (int i = 4; i < N_TOK; i++)
        ck_assert_int_eq(ferry_session_logits(s, ids + i, 1, false, logits + (size_t)i * N_VOCAB), 0);
    ferry_session_free(s);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    ferry_request_init(&q);
    q.tokens = ids;
    q.n_tokens = N_TOK;
    q.n_scored = N_SCORED;
    q.logprobs = 3;
    ck_assert_msg(ferry_batch_submit(b, &q, &id) == 0, "%s", ferry_error());
    while (!a)
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
    ck_assert_int_eq(a->finish, FERRY_FINISH_SCORED);
    ck_assert_uint_eq(a->n_tokens, N_SCORED);
    ck_assert_int_eq(a->n_top, 3);
    size_t n_greedy = 0;
    for (int i = 0; i < N_SCORED; i++) {
        const float *row = logits + (size_t)(N_TOK - N_SCORED + i - 1) * N_VOCAB;
        int32_t token = ids[N_TOK - N_SCORED + i], best = 0;
        double sum = 0;
        for (int v = 0; v < N_VOCAB; v++) {
            sum += exp((double)row[v] - 20);
            best = row[v] > row[best] ? v : best;
        }
        double want = row[token] - (log(sum) + 20);
        ck_assert_int_eq(a->tokens[i], token);
        ck_assert_int_eq(a->top_tokens[3 * i], best);
        ck_assert(a->top_logprobs[3 * i] >= a->top_logprobs[3 * i + 1]);
        /* one rounding to float, and a few of double sums of 288 */
        ck_assert_msg(fabs(a->logprobs[i] - want) <= fabs(want) * 0x1p-23 + 1e-12, "token %d: %g, not %g", i,
                      a->logprobs[i], want);
        n_greedy += best == token;
    }
    ck_assert_uint_eq(a->n_greedy, n_greedy);
    ferry_answer_free(a);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

/* ---- limits, cancelling, failing ---- */

START_TEST(bad_request_is_taken_or_breaks_the_batch)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_batch *b = NULL;
    struct req r = req_of(0), bad;
    struct ferry_request q;
    uint64_t id;
    struct ferry_engine *e = open_with("llama", &o);
    ck_assert_int_eq(ferry_batch_make(e, &b), FERRY_ERR_STATE);
    ferry_engine_close(e);
    o.n_batch = 2;
    e = open_with("llama", &o);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    ferry_request_init(&q);
    q.tokens = r.token;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG); /* empty */
    q.n_tokens = 10;
    q.n_scored = 10;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG); /* nothing stands before what is scored */
    q.n_scored = 0;
    bad = r;
    bad.token[3] = N_VOCAB;
    q.tokens = bad.token;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);
    static int32_t long_prompt[256];
    q.tokens = long_prompt;
    q.n_tokens = 256;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "256"));
    r.sample.temperature = -1;
    q.tokens = r.token;
    q.n_tokens = 5;
    q.sample = &r.sample;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);

    /* 255 tokens leave room for one more */
    q.sample = NULL;
    q.tokens = long_prompt;
    q.n_tokens = 255;
    q.ignore_eos = true;
    struct ferry_answer *a = NULL;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), 0);
    while (!a)
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
    ck_assert_int_eq(a->finish, FERRY_FINISH_CONTEXT);
    ck_assert_uint_eq(a->n_tokens, 1);
    ferry_answer_free(a);
    ck_assert_int_eq(ferry_batch_poll(b, &a), 0);
    ck_assert_ptr_null(a);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

/* Several end in one step, and are given one by one: until then they are no longer of those that can be dropped in favour of others. */
START_TEST(finished_counts_as_not_begun)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_batch *b = NULL;
    struct ferry_answer *a = NULL;
    struct ferry_batch_stats st;
    uint64_t id[4];
    o.n_batch = 3;
    o.batch_tok = 256;
    struct ferry_engine *e = open_with("mixed", &o);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    for (int i = 0; i < 4; i++) {
        struct req r = {.n_tok = 2, .max_tok = 1, .ignore_eos = true};
        r.token[0] = ids[2 * i];
        r.token[1] = ids[2 * i + 1];
        ferry_sample_opts_init(&r.sample);
        id[i] = submit(b, &r);
        ck_assert(!ferry_batch_has_begun(b, id[i]));
    }
    while (!a)
        ck_assert_int_eq(ferry_batch_poll(b, &a), 0);
    ferry_batch_stats(b, &st);
    ck_assert_uint_eq(st.n_finished, 2);
    ck_assert_uint_eq(a->id, id[0]);
    ck_assert(!ferry_batch_has_begun(b, id[0])); /* given */
    ck_assert(ferry_batch_has_begun(b, id[1]));
    ck_assert(ferry_batch_has_begun(b, id[2]));
    ck_assert(!ferry_batch_has_begun(b, id[3]));
    ferry_answer_free(a);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

START_TEST(cancel_or_interrupt_changes_the_others)
{
    struct ferry_engine_opts o = small_opts();
    struct ferry_batch *b = NULL;
    struct ferry_batch_stats st;
    struct req reqs[6];
    struct said want[6];
    uint64_t id[6];
    o.n_batch = 3;
    o.batch_tok = 256;
    struct ferry_engine *e = open_with("mixed", &o);
    for (int i = 0; i < 6; i++) {
        reqs[i] = req_of(i + 5);
        want[i] = say_alone(e, &reqs[i]);
    }
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    for (int i = 0; i < 6; i++)
        id[i] = submit(b, &reqs[i]);
    struct ferry_answer *a = NULL;
    ferry_batch_interrupt(b);
    ck_assert_int_eq(ferry_batch_poll(b, &a), FERRY_ERR_CANCEL);
    ck_assert_int_eq(ferry_batch_poll(b, &a), 0);
    ck_assert(ferry_batch_has_begun(b, id[0]));
    ck_assert(!ferry_batch_has_begun(b, id[5]));
    ck_assert_int_eq(ferry_batch_cancel(b, id[0]), 0); /* runs */
    ck_assert_int_eq(ferry_batch_cancel(b, id[4]), 0); /* waits */
    ck_assert_int_eq(ferry_batch_cancel(b, id[4]), FERRY_ERR_ARG);
    for (int n = 0, step = 0; n < 4; step++) {
        if (step % 7 == 3)
            ferry_batch_interrupt(b);
        int rc = ferry_batch_poll(b, &a);
        ck_assert(rc == 0 || rc == FERRY_ERR_CANCEL);
        if (!a)
            continue;
        int i = (int)(a->id - id[0]);
        must_be(a, &want[i], "after a cancel", i);
        ferry_answer_free(a);
        n++;
    }
    ferry_batch_stats(b, &st);
    ck_assert_uint_eq(st.n_waiting + st.n_running + st.n_finished, 0);
    submit(b, &reqs[0]);
    submit(b, &reqs[1]);
    ck_assert_int_eq(ferry_batch_poll(b, &a), 0);
    ferry_answer_free(a);
    ferry_batch_free(b); /* with one that runs */
    ferry_engine_close(e);
}
END_TEST

/* The nth allocation of a batch's life fails, for each n: whatever call it hits says so, the next try goes on, and every answer
 * is the right one or says that it failed. */
START_TEST(failed_allocation_changes_or_leaks)
{
    enum { N = 4 };
    struct ferry_engine_opts o = small_opts();
    struct req reqs[N];
    struct said want[N];
    o.n_batch = 2;
    struct ferry_engine *e = open_with("llama", &o);
    for (int i = 0; i < N; i++) {
        reqs[i] = req_of(i * 3);
        reqs[i].max_tok = 40;
        want[i] = say_alone(e, &reqs[i]);
    }
    uint64_t before = live_bytes();
    bool reached = true;
    for (uint64_t n = 1; reached; n++) {
        struct ferry_batch *b = NULL;
        uint64_t id[N] = {0};
        int n_told = 0, n_done = 0, n_in = 0;
        mem_fail_nth(n);
        while (!b)
            n_told += ferry_batch_make(e, &b) == FERRY_ERR_NOMEM;
        while (n_in < N) {
            struct ferry_request q;
            ferry_request_init(&q);
            q.tokens = reqs[n_in].token;
            q.n_tokens = reqs[n_in].n_tok;
            q.max_tokens = reqs[n_in].max_tok;
            q.ignore_eos = reqs[n_in].ignore_eos;
            q.sample = &reqs[n_in].sample;
            int rc = ferry_batch_submit(b, &q, &id[n_in]);
            n_told += rc == FERRY_ERR_NOMEM;
            n_in += rc == 0;
        }
        while (n_done < N) {
            struct ferry_answer *a = NULL;
            int rc = ferry_batch_poll(b, &a);
            ck_assert(rc == 0 || rc == FERRY_ERR_NOMEM);
            n_told += rc < 0;
            if (!a)
                continue;
            int i = 0;
            while (id[i] != a->id)
                i++;
            if (a->finish == FERRY_FINISH_FAILED) {
                ck_assert_int_eq(a->status, FERRY_ERR_NOMEM);
                ck_assert_int_gt((int)strlen(a->error), 0);
                n_told++;
            } else {
                must_be(a, &want[i], "without memory once", i);
            }
            ferry_answer_free(a);
            n_done++;
        }
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        /* The tree does without a place that it has no memory for: nobody need be told. */
        ck_assert_msg(n_told == 1 || !reached, "allocation %llu: told %d times", (unsigned long long)n, n_told);
        ferry_batch_free(b);
        ck_assert_msg(live_bytes() == before, "allocation %llu leaks", (unsigned long long)n);
        ck_assert(reached || n > 30);
    }
    ferry_engine_close(e);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("batch");
    TCase *t = tcase_create("batch");
    tcase_set_timeout(t, 300);
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_loop_test(t, company_changes_the_words, 0, N_EXACT);
    tcase_add_loop_test(t, spilling_changes_the_words, 0, 4);
    tcase_add_test(t, spilled_request_cannot_go);
    tcase_add_loop_test(t, shared_beginning_is_run_for_each, 0, 4);
    tcase_add_loop_test(t, score_is_not_that_of_the_logits, 0, 2);
    tcase_add_test(t, bad_request_is_taken_or_breaks_the_batch);
    tcase_add_test(t, finished_counts_as_not_begun);
    tcase_add_test(t, cancel_or_interrupt_changes_the_others);
    tcase_add_test(t, failed_allocation_changes_or_leaks);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
