/* Many prompts at once on the tiny models of tests/data/models: each has to say, bit for bit, what a session alone says, whatever
 * its company, the memory, and what was taken from it on the way. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static const char *const exact_models[] = {"mixed", "gemma3", "qwen2moe", "llama-yarn"};
enum { N_EXACT = sizeof exact_models / sizeof *exact_models };

START_TEST(company_changes_the_words)
{
    static const struct way ways[] = {
        {"all at once", 32, 256, 0, N_REQ},   {"five at a time", 5, 256, 33, N_REQ},
        {"one at a time", 1, 256, 64, 1},     {"coming and going", 8, 256, 16, 3},
        {"little memory", 16, 24, 40, N_REQ}, {"hardly any memory", 32, 1, 512, N_REQ},
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

int main(void)
{
    Suite *suite = suite_create("batch");
    TCase *t = tcase_create("batch");
    tcase_set_timeout(t, 300);
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_loop_test(t, company_changes_the_words, 0, N_EXACT);
    suite_add_tcase(suite, t);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
