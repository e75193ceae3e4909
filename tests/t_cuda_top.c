/* Engines whose GPU, played by the emulated runtime, sends down the best logits alone where they are enough: no word may differ from the
 * CPU's, and what comes down is what the plan says. */
#include "tests/cuda_open.h"
#include "tests/run_suite.h"

#include "src/base/err.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GIVEN = 20, N_WORDS = 40 };

/* A way of drawing, and how many of the best logits come down for each word; 0: all of them. */
struct way {
    float temperature;
    int top_k;
    float top_p, min_p, repeat, presence, frequency;
    int window, n_pairs;
};

static const struct way ways[] = {
    {0, 0, 1, 0, 1, 0, 0, 64, 1},
    {0.8f, 40, 1, 0, 1, 0, 0, 64, 64},
    {1.2f, 5, 0.9f, 0.05f, 1, 0, 0, 64, 64},
    {0.8f, 100, 1, 0, 1, 0, 0, 64, 128},
    {0, 0, 1, 0, 1.3f, 0, 0, 64, 64},
    {1, 20, 1, 0, 1.1f, 0.5f, 0.2f, 20, 64},
    {1, 60, 1, 0, 1, 0, 1, 10, 128},
    /* A penalty that lets logits rise, all of a row's chances, more than a kernel finds, and more than half of the vocabulary. */
    {1, 20, 1, 0, 0.8f, 0, 0, 64, 0},
    {0.9f, 0, 0.95f, 0, 1, 0, 0, 64, 0},
    {0.9f, 300, 1, 0, 1, 0, 0, 64, 0},
    {0.9f, 144, 1, 0, 1, 0, 0, 64, 0},
};
enum { N_WAYS = sizeof ways / sizeof *ways };

static struct ferry_sample_opts opts_of(const struct way *w)
{
    struct ferry_sample_opts o;

    ferry_sample_opts_init(&o);
    o.temperature = w->temperature;
    o.top_k = w->top_k;
    o.top_p = w->top_p;
    o.min_p = w->min_p;
    o.repeat_penalty = w->repeat;
    o.presence_penalty = w->presence;
    o.frequency_penalty = w->frequency;
    o.penalty_window = w->window;
    o.seed = 7;
    return o;
}

static uint64_t down_bytes(const struct ferry_session *s)
{
    struct ferry_stats stats;

    ferry_session_stats(s, &stats);
    return stats.down_bytes;
}

static void step(struct ferry_session *s, int32_t *word)
{
    if (ferry_session_step(s, word) < 0)
        ck_abort_msg("%s", ferry_error());
}

/* N_WORDS that a session draws, then 3 after its options changed with the logits of a prompt there, then 3 that a fork draws, and 3
 * from where it goes back to. */
enum { N_ALL = N_WORDS + 9 };

static void words_of(const char *device, const struct way *w, int32_t words[N_ALL])
{
    struct ferry_engine_opts eo = opts_for(device, 256, 64);
    struct ferry_engine *e = open_with("qwen3moe", &eo);
    struct ferry_sample_opts o = opts_of(w), greedy = opts_of(&ways[0]);
    struct ferry_session *s, *fork;
    int n = 0;

    ck_assert_int_eq(ferry_session_make(e, &o, &s), 0);
    emu_in_step(true);
    ck_assert_int_eq(ferry_session_append(s, ids, GIVEN, NULL, NULL), 0);
    step(s, &words[n++]); /* from what came with the prompt: all */
    uint64_t from = down_bytes(s);
    for (; n < N_WORDS; n++)
        step(s, &words[n]);
    if (strcmp(device, "cpu")) {
        uint64_t pairs_bytes = (uint64_t)(w->n_pairs - 1) * PAIR_BYTES; /* the plan counts one */
        uint64_t tok_bytes = w->n_pairs ? fact_of(e, "down_bytes_per_token", NULL) + pairs_bytes : down_with_row(e);
        ck_assert_uint_eq(down_bytes(s) - from, (N_WORDS - 1) * tok_bytes);
    }
    ck_assert_int_eq(ferry_session_sample_opts(s, &greedy), 0);
    ck_assert_int_eq(ferry_session_append(s, ids + GIVEN, 3, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_sample_opts(s, &o), 0);
    for (int i = 0; i < 3; i++)
        step(s, &words[n++]);
    ck_assert_int_eq(ferry_session_fork(s, &fork), 0);
    for (int i = 0; i < 3; i++)
        step(fork, &words[n++]);
    ck_assert_int_eq(ferry_session_truncate(s, GIVEN + 7), 0);
    for (int i = 0; i < 3; i++)
        step(s, &words[n++]);
    emu_in_step(false);
    ferry_session_free(fork);
    ferry_session_free(s);
    ferry_engine_close(e);
}

START_TEST(drawn_words_differ_or_more_comes_down)
{
    int32_t want[N_ALL], got[N_ALL];

    words_of("cpu", &ways[_i], want);
    words_of("cuda:0", &ways[_i], got);
    ck_assert_mem_eq(want, got, sizeof want);
}
END_TEST

/* A row whose tokens a grammar chooses among comes down whole, and the words are the CPU's. */
static void sentence_of(const char *device, const struct way *w, int32_t words[N_WORDS])
{
    static const char text[] = "root ::= (word \" \"){60}\nword ::= [a-z]{1,5} | [^a-z ]{2}";
    struct ferry_engine_opts eo = opts_for(device, 256, 64);
    struct ferry_engine *e = open_with("qwen3moe", &eo);
    struct ferry_sample_opts o = opts_of(w);
    struct ferry_grammar *g;
    struct ferry_session *s;

    ck_assert_msg(ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, text, sizeof text - 1, &g) == 0, "%s", ferry_error());
    ck_assert_int_eq(ferry_session_make(e, &o, &s), 0);
    ck_assert_int_eq(ferry_session_append(s, ids, GIVEN, NULL, NULL), 0);
    ferry_session_grammar(s, g, FERRY_THOUGHT_NONE);
    step(s, &words[0]);
    uint64_t from = down_bytes(s);
    for (int n = 1; n < N_WORDS; n++)
        step(s, &words[n]);
    if (strcmp(device, "cpu"))
        ck_assert_uint_eq(down_bytes(s) - from, (N_WORDS - 1) * down_with_row(e));
    ferry_session_free(s);
    ferry_grammar_free(g);
    ferry_engine_close(e);
}

START_TEST(words_of_a_grammar_differ)
{
    int32_t want[N_WORDS], got[N_WORDS];

    sentence_of("cpu", &ways[_i], want);
    sentence_of("cuda:0", &ways[_i], got);
    ck_assert_mem_eq(want, got, sizeof want);
}
END_TEST

/* All logits are the plan's bytes, but for the pair that is in them. */
START_TEST(rows_of_logits_are_not_counted)
{
    struct ferry_engine_opts eo = opts_for("cuda:0", 256, 64);
    struct ferry_engine *e = open_with("llama", &eo);
    struct ferry_session *s = session_of(e);
    float logits[2 * N_VOCAB];
    int32_t word;

    ck_assert_uint_eq(fact_of(e, "down_bytes_per_token", NULL), PAIR_BYTES); /* no experts */
    ck_assert_int_eq(ferry_session_append(s, ids, 5, NULL, NULL), 0);
    ck_assert_uint_eq(down_bytes(s), ROW_BYTES);
    ck_assert_int_eq(ferry_session_logits(s, ids, 2, false, logits), 0);
    ck_assert_uint_eq(down_bytes(s), 3 * ROW_BYTES);
    step(s, &word);
    ck_assert_uint_eq(down_bytes(s), 3 * ROW_BYTES);
    step(s, &word);
    ck_assert_uint_eq(down_bytes(s), 3 * ROW_BYTES + PAIR_BYTES);
    ferry_session_free(s);
    ferry_engine_close(e);
}
END_TEST

/* ---- many at once ---- */

enum { N_REQUESTS = 8, ANSWER_TOK = 16, N_TOP = 3 };

struct said {
    int32_t token[ANSWER_TOK], top[ANSWER_TOK * N_TOP];
    float logprob[ANSWER_TOK];
};

enum with { WITH_NOTHING, WITH_LOGPROBS, WITH_GRAMMAR };

/* Every way beside others; with log-probabilities every third wants them, and one is judged; with a grammar every second follows it.
 * Answers, in the order of requests; what came down. */
static uint64_t answers_of(const char *device, enum with with, struct said said[N_REQUESTS])
{
    struct ferry_engine_opts eo = opts_for(device, 256, 64);
    static const char text[] = "root ::= [a-z ]{200}";
    const bool want_logprobs = with == WITH_LOGPROBS;
    struct ferry_grammar *g = NULL;
    struct ferry_batch *b;
    struct ferry_session *s;
    uint64_t first = 0, id;

    eo.n_batch = 3;
    struct ferry_engine *e = open_with("llama", &eo);
    memset(said, 0, N_REQUESTS * sizeof *said);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    if (with == WITH_GRAMMAR)
        ck_assert_int_eq(ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, text, sizeof text - 1, &g), 0);
    for (int i = 0; i < N_REQUESTS; i++) {
        struct ferry_sample_opts o = opts_of(&ways[i]);
        struct ferry_request r;
        ferry_request_init(&r);
        r.tokens = ids + i;
        r.n_tokens = (size_t)(20 + 7 * i);
        r.n_scored = want_logprobs && i == 4 ? ANSWER_TOK : 0;
        r.max_tokens = ANSWER_TOK;
        r.ignore_eos = true;
        r.logprobs = want_logprobs && i % 3 == 1 ? N_TOP : -1;
        r.sample = &o;
        r.grammar = i % 2 ? g : NULL;
        ck_assert_msg(ferry_batch_submit(b, &r, &id) == 0, "%s", ferry_error());
        first = i ? first : id;
    }
    ferry_grammar_free(g);
    emu_in_step(true);
    for (int n = 0; n < N_REQUESTS;) {
        struct ferry_answer *a;
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        if (!a)
            continue;
        struct said *to = &said[a->id - first];
        ck_assert_uint_eq(a->n_tokens, ANSWER_TOK);
        memcpy(to->token, a->tokens, sizeof to->token);
        if (a->logprobs)
            memcpy(to->logprob, a->logprobs, sizeof to->logprob);
        if (a->n_top == N_TOP)
            memcpy(to->top, a->top_tokens, sizeof to->top);
        ferry_answer_free(a);
        n++;
    }
    emu_in_step(false);
    ck_assert_int_eq(ferry_session_make(e, NULL, &s), 0); /* the engine's counters */
    uint64_t bytes = down_bytes(s);
    ferry_session_free(s);
    ferry_batch_free(b);
    ferry_engine_close(e);
    return bytes;
}

START_TEST(batch_draws_other_words)
{
    static struct said want[N_REQUESTS], got[N_REQUESTS];

    answers_of("cpu", _i, want);
    uint64_t bytes = answers_of("cuda:0", _i, got);
    for (int i = 0; i < N_REQUESTS; i++)
        ck_assert_msg(!memcmp(&want[i], &got[i], sizeof *want), "request %d", i);
    ck_assert_uint_gt(bytes, 0);
    if (_i == 0) /* nearly all rows are pairs */
        ck_assert_uint_lt(bytes, (uint64_t)N_REQUESTS * ANSWER_TOK * ROW_BYTES);
}
END_TEST

/* ---- when it fails ---- */

/* A drawn word's step, each of its calls in turn; what a graph lacks is made without one, and nobody is told. */
START_TEST(failed_call_while_drawing_spoils_the_session)
{
    struct ferry_engine_opts eo = opts_for("cuda:0", 256, 64);
    struct ferry_engine *e = open_with("llama", &eo);
    struct ferry_sample_opts o = opts_of(&ways[_i]);
    struct ferry_session *s;
    int32_t want[2], got[2];
    int n_told = 0, n = 1;

    o.temperature = 0; /* the same words each time */
    ck_assert_int_eq(ferry_session_make(e, &o, &s), 0);
    ck_assert_int_eq(ferry_session_append(s, ids, 10, NULL, NULL), 0);
    step(s, &want[0]);
    step(s, &want[1]);
    for (bool failed = true; failed; n++) {
        ck_assert_int_eq(ferry_session_truncate(s, 10), 0);
        step(s, &got[0]);
        emu_fail_nth(n);
        int rc = ferry_session_step(s, &got[1]);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert(rc == 0 || (failed && rc == FERRY_ERR_DEVICE));
        ck_assert_int_eq(got[0], want[0]);
        if (rc == 0)
            ck_assert_int_eq(got[1], want[1]);
        n_told += rc < 0;
    }
    ck_assert_int_gt(n_told, 5);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_top");
    TCase *tc = tcase_create("cuda_top");

    tcase_add_checked_fixture(tc, start, NULL);
    tcase_set_timeout(tc, 240);
    tcase_add_loop_test(tc, drawn_words_differ_or_more_comes_down, 0, N_WAYS);
    tcase_add_loop_test(tc, words_of_a_grammar_differ, 0, 3);
    tcase_add_test(tc, rows_of_logits_are_not_counted);
    tcase_add_loop_test(tc, batch_draws_other_words, 0, 3);
    tcase_add_loop_test(tc, failed_call_while_drawing_spoils_the_session, 0, 2);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
