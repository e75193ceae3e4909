/* Draws among allowed tokens against draws from rows in which the others are not there, where a sentence begins behind a thought, and
 * answers by a grammar alone, together, and after they had to give way. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/batch_line.h"
#include "src/cli/grammars.h"
#include "src/ferry.h"
#include "src/model/grammar.h"
#include "src/model/json_room.h"
#include "src/model/tok.h"
#include "src/model/tok_trie.h"
#include "src/run/constraint.h"
#include "src/run/sample.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- draws ---- */

enum { N_VOCAB = 20000 };

static uint64_t rng;

static double uniform(void)
{
    rng = rng * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(rng >> 11) / 9007199254740992.0;
}

struct some {
    uint64_t bit[N_VOCAB / 64 + 1];
    int n_asked, n_asked_all;
};

static int allows(void *arg, int32_t id)
{
    struct some *s = arg;
    s->n_asked++;
    return s->bit[id / 64] >> id % 64 & 1;
}

static int all(void *arg, const uint64_t **bits)
{
    struct some *s = arg;
    s->n_asked_all++;
    *bits = s->bit;
    return 0;
}

static const struct sample_opts ways[] = {
    {.top_p = 1, .repeat_penalty = 1, .penalty_window = 64},
    {.top_p = 1, .repeat_penalty = 1.5f, .presence_penalty = 1, .penalty_window = 64},
    {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1, .penalty_window = 64},
    {.temperature = 1.5f,
     .top_k = 5,
     .top_p = 1,
     .repeat_penalty = 0.7f,
     .frequency_penalty = 0.5f,
     .penalty_window = -1},
    {.temperature = 1, .top_p = 1, .repeat_penalty = 1, .penalty_window = 64},
    {.temperature = 0.7f, .top_p = 0.8f, .min_p = 0.1f, .repeat_penalty = 1.1f, .penalty_window = 8},
    {.temperature = 1, .top_k = 3000, .top_p = 1, .repeat_penalty = 1, .penalty_window = 64},
};
enum { N_WAYS = sizeof ways / sizeof *ways };

/* Rows as models give them, flat ones with many equal logits, and ones with holes; all, many, few, one of the tokens allowed. */
START_TEST(token_is_drawn_that_is_not_allowed_or_others_count)
{
    static float row[N_VOCAB], holes[N_VOCAB];
    static struct some some;
    const struct sample_filter filter = {allows, all, &some};
    static const double shares[] = {1, 0.9, 0.3, 0.01, 0.001, 0};
    int32_t history[50];
    int n_lazy = 0, n_whole = 0;
    rng = 3;
    for (int round = 0; round < 400; round++) {
        const struct sample_opts *o = &ways[round % N_WAYS];
        struct sample_opts opts = *o;
        struct sample *a, *b;
        double share = shares[round / N_WAYS % 6];
        int last = (int)(uniform() * N_VOCAB);
        opts.seed = (uint64_t)round;
        memset(&some, 0, sizeof some);
        for (int i = 0; i < N_VOCAB; i++) {
            row[i] = round % 5 == 0 ? (float)(int)(uniform() * 4)
                                    : (float)(8 * sqrt(-log(uniform() + 1e-9)) * cos(7 * uniform()));
            if (uniform() < 0.01)
                row[i] = i % 2 ? NAN : -INFINITY;
            bool is_allowed = uniform() < share || i == last;
            if (i == last)
                row[i] = 1;
            some.bit[i / 64] |= (uint64_t)is_allowed << i % 64;
            holes[i] = is_allowed ? row[i] : -INFINITY;
        }
        for (int i = 0; i < 50; i++)
            history[i] = (int32_t)(uniform() * (i % 3 ? 100 : N_VOCAB));
        ck_assert_int_eq(sample_make(&opts, N_VOCAB, &a), 0);
        ck_assert_int_eq(sample_make(&opts, N_VOCAB, &b), 0);
        for (int draw = 0; draw < 4; draw++) {
            int32_t got = -1, want = -2;
            const struct sample_row all_logits = {.n = N_VOCAB, .logit = row};
            ck_assert_int_eq(sample_draw(a, holes, history, 50, &want), 0);
            ck_assert_msg(sample_draw_allowed(b, &all_logits, &filter, history, 50, &got) == 0, "%s", err_text());
            ck_assert_msg(got == want, "round %d draw %d: %d, not %d", round, draw, got, want);
        }
        n_whole += some.n_asked_all > 0;
        n_lazy += some.n_asked_all == 0;
        sample_free(a);
        sample_free(b);
    }
    ck_assert_int_gt(n_lazy, 50);
    ck_assert_int_gt(n_whole, 50);
}
END_TEST

static int fails(void *arg, int32_t id)
{
    (void)arg;
    (void)id;
    return ERR_LIMIT;
}

static int fails_for_all(void *arg, const uint64_t **bits)
{
    (void)arg;
    (void)bits;
    return ERR_NOMEM;
}

START_TEST(nothing_to_draw_is_drawn)
{
    static float row[N_VOCAB];
    static struct some some;
    struct sample_filter filter = {allows, all, &some};
    const struct sample_row r = {.n = N_VOCAB, .logit = row};
    struct sample *s;
    int32_t token;
    ck_assert_int_eq(sample_make(&ways[_i], N_VOCAB, &s), 0);
    ck_assert_int_eq(sample_draw_allowed(s, &r, &filter, NULL, 0, &token), ERR_STATE);
    some.bit[5] = 1;
    row[5 * 64] = NAN;
    ck_assert_int_eq(sample_draw_allowed(s, &r, &filter, NULL, 0, &token), ERR_STATE);
    filter.all = fails_for_all;
    ck_assert_int_eq(sample_draw_allowed(s, &r, &filter, NULL, 0, &token), ERR_NOMEM);
    for (int i = 0; i < N_VOCAB; i++)
        row[i] = (float)(i % 1000);
    filter.allows = fails;
    int rc = sample_draw_allowed(s, &r, &filter, NULL, 0, &token);
    ck_assert(rc == ERR_LIMIT || rc == ERR_NOMEM);
    sample_free(s);
}
END_TEST

/* ---- thoughts ---- */

/* Tokens as byte-level BPE spells them. */
static const char *const think_tokens[] = {
    "<think>", "</think>", "{",       "}",  "x",    "\xc4\x8a", "\xc4\x8a\xc4\x8a",
    "<end>",   "</",       "think>{", "th", "ink>", "{}",       "{}x"};
static const int32_t think_types[] = {4, 4, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1};
enum { OPEN, CLOSE, BRACE, BRACES_END, X, LF, LF2, END, SLASH, THINK_BRACE, TH, INK, BRACES, BRACES_X, N_THINK };

static const char *const channel_tokens[] = {
    "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|constrain|>", "final",
    "analysis",    "json",        "{}",        "x",       "\xc4\xa0",   "assistant",     "<|call|>"};
static const int32_t channel_types[] = {3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 3};
enum {
    CHANNEL,
    MESSAGE,
    START,
    PART_END,
    RETURN,
    CONSTRAIN,
    FINAL,
    ANALYSIS,
    JSON,
    DONE,
    LETTER,
    SPACE,
    ASSISTANT,
    CALL,
    N_CHANNEL
};

struct setting {
    struct tok *tok;
    struct tok_trie *trie;
    struct constraint *c;
};

static struct setting set_up(const char *const *tokens, const int32_t *types, int n, int end, const char *text)
{
    struct setting s;
    struct tok_source src;
    struct tok_str list[32];
    struct grammar *g;
    tok_source_init(&src);
    for (int i = 0; i < n; i++)
        list[i] = (struct tok_str){tokens[i], strlen(tokens[i])};
    src.model = "gpt2";
    src.pre = "gpt-2";
    src.n_tokens = src.n_types = n;
    src.tokens = list;
    src.types = types;
    src.eos = end;
    ck_assert_msg(tok_make(&src, &s.tok) == 0, "%s", err_text());
    ck_assert_int_eq(tok_trie_make(s.tok, &s.trie), 0);
    ck_assert_int_eq(grammar_gbnf(text, strlen(text), &g), 0);
    ck_assert_int_eq(constraint_make(g, s.tok, s.trie, n, &s.c), 0);
    return s;
}

static void tear_down(struct setting *s)
{
    constraint_drop(s->c);
    tok_trie_free(s->trie);
    tok_free(s->tok);
}

/* Which tokens may come behind these, a bit for each; by asking one by one, and for all. */
static unsigned next(struct setting *s, enum constraint_thought thought, const int32_t *token, size_t n)
{
    struct constraint_at at = {.thought = thought};
    struct constraint_view view = {s->c, &at};
    const uint64_t *bits;
    unsigned out = 0;
    ck_assert_msg(constraint_follow(s->c, &at, token, n) == 0, "%s", err_text());
    struct sample_filter f = constraint_filter(&view);
    for (int32_t id = 0; id < tok_n_vocab(s->tok); id++)
        out |= (unsigned)f.allows(f.arg, id) << id;
    ck_assert_int_eq(f.all(f.arg, &bits), 0);
    ck_assert_uint_eq(bits[0], out);
    return out;
}

#define BIT(id) (1u << (id))
#define NEXT(thought, ...) \
    next(&s, thought, (const int32_t[]){__VA_ARGS__}, sizeof(int32_t[]){__VA_ARGS__} / sizeof(int32_t))

START_TEST(thought_is_held_against_the_grammar_or_goes_on_for_ever)
{
    const unsigned all_but_end = BIT(N_THINK) - 1 - BIT(END), sentence = BIT(BRACE) | BIT(BRACES);
    struct setting s = set_up(think_tokens, think_types, N_THINK, END, "root ::= \"{\" \"\\n\"* \"}\"");
    /* No thought: marks of one are no text. */
    ck_assert_uint_eq(next(&s, CONSTRAINT_NO_THOUGHT, NULL, 0), sentence);
    /* One may come, but only first. */
    ck_assert_uint_eq(next(&s, CONSTRAINT_MAY_THINK, NULL, 0), sentence | BIT(OPEN));
    ck_assert_uint_eq(NEXT(CONSTRAINT_MAY_THINK, BRACE), BIT(BRACES_END) | BIT(LF) | BIT(LF2));
    ck_assert_uint_eq(NEXT(CONSTRAINT_MAY_THINK, OPEN), all_but_end);
    /* Amid one all may come but an end, and what ends the thought and goes on wrongly. */
    ck_assert_uint_eq(next(&s, CONSTRAINT_AMID_THOUGHT, NULL, 0), all_but_end);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, X, BRACES_X, OPEN), all_but_end);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, X, SLASH), all_but_end);
    /* Behind it, however it was spelt, the sentence begins, at most two line feeds later. */
    const unsigned begins = sentence | BIT(LF) | BIT(LF2);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, X, CLOSE), begins);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, SLASH, TH, INK), begins);
    ck_assert_uint_eq(NEXT(CONSTRAINT_MAY_THINK, OPEN, X, X, CLOSE, LF), sentence | BIT(LF));
    ck_assert_uint_eq(NEXT(CONSTRAINT_MAY_THINK, OPEN, X, X, CLOSE, LF2), sentence);
    ck_assert_uint_eq(NEXT(CONSTRAINT_MAY_THINK, OPEN, X, SLASH, THINK_BRACE), BIT(BRACES_END) | BIT(LF) | BIT(LF2));
    ck_assert_uint_eq(NEXT(CONSTRAINT_MAY_THINK, OPEN, CLOSE, BRACES), BIT(END));
    tear_down(&s);
    /* "think>{" ends the thought and does not begin this sentence. */
    s = set_up(think_tokens, think_types, N_THINK, END, "root ::= \"x\"");
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, SLASH), all_but_end & ~BIT(THINK_BRACE));
    tear_down(&s);
}
END_TEST

START_TEST(channel_before_the_final_one_is_held_against_the_grammar)
{
    const unsigned all_but_ends = BIT(N_CHANNEL) - 1 - BIT(RETURN) - BIT(CALL);
    struct setting s = set_up(channel_tokens, channel_types, N_CHANNEL, RETURN, "root ::= \"{}\"");
    ck_assert_uint_eq(next(&s, CONSTRAINT_NO_THOUGHT, NULL, 0), BIT(DONE));
    ck_assert_uint_eq(next(&s, CONSTRAINT_MAY_THINK, NULL, 0), BIT(DONE)); /* there is no <think> */
    ck_assert_uint_eq(next(&s, CONSTRAINT_AMID_THOUGHT, NULL, 0), all_but_ends);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, CHANNEL, ANALYSIS, MESSAGE, LETTER), all_but_ends);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, CHANNEL, ANALYSIS, MESSAGE, FINAL, MESSAGE), all_but_ends);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, CHANNEL, FINAL), all_but_ends);
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, CHANNEL, FINAL, MESSAGE), BIT(DONE));
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, CHANNEL, ANALYSIS, MESSAGE, LETTER, PART_END, START, ASSISTANT,
                           CHANNEL, FINAL, SPACE, CONSTRAIN, JSON, MESSAGE),
                      BIT(DONE));
    ck_assert_uint_eq(NEXT(CONSTRAINT_AMID_THOUGHT, CHANNEL, FINAL, MESSAGE, DONE), BIT(RETURN) | BIT(CALL));
    tear_down(&s);
}
END_TEST

static struct ferry_engine *open_file(const char *name)
{
    struct ferry_engine *e = NULL;
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.gguf", TEST_DATA_DIR, name);
    ck_assert_msg(ferry_engine_open(path, NULL, &e) == 0, "%s", ferry_error());
    return e;
}

START_TEST(model_may_not_think_before_a_sentence)
{
    struct ferry_engine *thinker = open_file("cli/thinks"), *channels = open_file("models/gpt-oss"),
                        *plain = open_file("models/qwen3moe");
    ck_assert_int_eq(ferry_thought_of(thinker, "<|start|>assistant\n"), FERRY_THOUGHT_MAY);
    ck_assert_int_eq(ferry_thought_of(thinker, ""), FERRY_THOUGHT_MAY);
    ck_assert_int_eq(ferry_thought_of(thinker, "<think>\n\n</think>\n\n"), FERRY_THOUGHT_NONE);
    ck_assert_int_eq(ferry_thought_of(thinker, "x<think> \n"), FERRY_THOUGHT_AMID);
    ck_assert_int_eq(ferry_thought_of(channels, "<|start|>assistant"), FERRY_THOUGHT_AMID);
    ck_assert_int_eq(ferry_thought_of(channels, "<|start|>assistant<|channel|>final<|message|>"), FERRY_THOUGHT_NONE);
    ck_assert_int_eq(ferry_thought_of(plain, "x<think> \n"), FERRY_THOUGHT_NONE);
    ferry_engine_close(plain);
    ferry_engine_close(channels);
    ferry_engine_close(thinker);
}
END_TEST

START_TEST(token_that_does_not_fit_is_followed)
{
    struct setting s = set_up(think_tokens, think_types, N_THINK, END, "root ::= \"{\" \"}\"");
    struct constraint_at at = {.thought = CONSTRAINT_NO_THOUGHT}, was;
    const int32_t token[] = {BRACE, X, BRACES_END};
    ck_assert_int_eq(constraint_follow(s.c, &at, token, 1), 0);
    was = at;
    ck_assert_int_eq(constraint_follow(s.c, &at, token, 2), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "token 1 of the answer"));
    ck_assert(!memcmp(&at, &was, sizeof at));
    ck_assert(!constraint_is_done(s.c, &at));
    at.is_known = false;
    ck_assert_int_eq(constraint_follow(s.c, &at, (const int32_t[]){BRACES}, 1), 0);
    ck_assert(constraint_is_done(s.c, &at));
    tear_down(&s);
}
END_TEST

/* ---- answers ---- */

enum { N_REQ = 10, MOST = 80 };

static const char *const texts[] = {
    "root ::= word (\" \" word){3,20} \".\"\nword ::= [a-z]{1,6} | \"he\" [a-z]*",
    "root ::= \"[\" (root (\",\" root)*)? \"]\" | [0-9]{1,4}", "root ::= [^a-z]{5,30}", NULL, /* none */
};

static struct ferry_engine *open_tiny(uint32_t n_batch, uint32_t batch_tok)
{
    struct ferry_engine_opts o;
    struct ferry_engine *e = NULL;
    ferry_engine_opts_init(&o);
    o.n_ctx = 256;
    o.n_threads = 1;
    o.no_pin = true;
    o.io = "pread";
    o.n_sessions = 2;
    o.n_batch = n_batch;
    o.batch_tok = batch_tok;
    ck_assert_msg(ferry_engine_open(TEST_DATA_DIR "/cli/tiny.gguf", &o, &e) == 0, "%s", ferry_error());
    return e;
}

static void make_all(struct ferry_engine *e, struct ferry_grammar *g[4])
{
    for (int i = 0; i < 4; i++) {
        g[i] = NULL;
        if (texts[i])
            ck_assert_msg(ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, texts[i], strlen(texts[i]), &g[i]) == 0, "%s",
                          ferry_error());
    }
}

static void free_all(struct ferry_grammar *g[4])
{
    for (int i = 0; i < 4; i++)
        ferry_grammar_free(g[i]);
}

struct said {
    int32_t token[MOST];
    size_t n;
    bool is_whole;
};

static struct ferry_sample_opts opts_of(int i)
{
    struct ferry_sample_opts o;
    ferry_sample_opts_init(&o);
    o.temperature = i % 3 ? 1.5f : 0;
    o.top_k = i % 3 == 1 ? 0 : 20;
    o.repeat_penalty = i % 4 == 1 ? 1.3f : 1;
    o.seed = (uint64_t)i;
    return o;
}

static size_t prompt_of(int i, int32_t *token)
{
    size_t n = 3 + (size_t)(i * 17) % 100;
    for (size_t k = 0; k < n; k++)
        token[k] = (int32_t)((k * 7 + (size_t)(i % 2 ? i : 0)) % 250);
    return n;
}

static size_t most_of(int i)
{
    return 20 + (size_t)(i * 13) % (MOST - 20);
}

/* Go on with the answer of a session until it has n tokens, or ends. */
static void go_on(struct ferry_engine *e, struct ferry_session *s, size_t n, struct said *out)
{
    while (out->n < n && !out->is_whole) {
        int32_t token;
        ck_assert_msg(ferry_session_step(s, &token) == 0, "%s", ferry_error());
        if (ferry_token_is_end(e, token)) {
            out->is_whole = true;
            break;
        }
        out->token[out->n++] = token;
        ck_assert_int_eq(ferry_session_is_whole(s, &out->is_whole), 0);
    }
}

static struct ferry_session *begin(struct ferry_engine *e, int i, struct ferry_grammar *g)
{
    struct ferry_sample_opts o = opts_of(i);
    struct ferry_session *s;
    int32_t prompt[256];
    size_t n = prompt_of(i, prompt);
    ck_assert_msg(ferry_session_make(e, &o, &s) == 0, "%s", ferry_error());
    ck_assert_int_eq(ferry_session_append(s, prompt, n, NULL, NULL), 0);
    ferry_session_grammar(s, g, FERRY_THOUGHT_NONE);
    return s;
}

static struct said say_alone(struct ferry_engine *e, int i, struct ferry_grammar *g)
{
    struct said out = {.n = 0};
    struct ferry_session *s = begin(e, i, g);
    go_on(e, s, most_of(i), &out);
    ferry_session_free(s);
    return out;
}

static int submit(struct ferry_batch *b, int i, struct ferry_grammar *g, uint64_t *id)
{
    struct ferry_sample_opts o = opts_of(i);
    struct ferry_request q;
    int32_t prompt[256];
    ferry_request_init(&q);
    q.tokens = prompt;
    q.n_tokens = prompt_of(i, prompt);
    q.max_tokens = most_of(i);
    q.sample = &o;
    q.grammar = g;
    q.logprobs = i % 5 == 2 ? 3 : -1;
    return ferry_batch_submit(b, &q, id);
}

static void must_be(const struct ferry_answer *a, const struct said *want, int i)
{
    ck_assert_msg(a->n_tokens == want->n && !memcmp(a->tokens, want->token, want->n * sizeof *a->tokens),
                  "request %d: other words than alone (%zu tokens, not %zu)", i, a->n_tokens, want->n);
    ck_assert_msg(a->finish == (want->is_whole ? FERRY_FINISH_STOP : FERRY_FINISH_LENGTH), "request %d: end %d", i,
                  (int)a->finish);
}

/* Alone, together, and where memory is short, so that requests are computed again. */
START_TEST(company_or_giving_way_changes_what_a_grammar_says)
{
    struct ferry_engine *e = open_tiny(4, _i ? 16 : 256);
    struct ferry_grammar *g[4];
    struct ferry_batch *b;
    struct ferry_batch_stats st;
    static struct said want[N_REQ];
    uint64_t first = 0, id;
    int n_whole = 0;
    make_all(e, g);
    for (int i = 0; i < N_REQ; i++) {
        want[i] = say_alone(e, i, g[i % 4]);
        n_whole += want[i].is_whole;
    }
    ck_assert_int_gt(n_whole, 0);
    ck_assert_int_lt(n_whole, N_REQ);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    for (int i = 0; i < N_REQ; i++) {
        ck_assert_msg(submit(b, i, g[i % 4], &id) == 0, "%s", ferry_error());
        first = i ? first : id;
    }
    free_all(g); /* requests hold them */
    for (int n = 0; n < N_REQ;) {
        struct ferry_answer *a;
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
        if (!a)
            continue;
        must_be(a, &want[a->id - first], (int)(a->id - first));
        ferry_answer_free(a);
        n++;
    }
    ferry_batch_stats(b, &st);
    ck_assert_msg(_i == 1 || st.n_shared > 0, "nothing was shared");
    ck_assert_msg(_i == 0 || st.n_preempted > 0, "nobody gave way");
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

/* What a session drew is drawn again after it went back, by a fork, and with a grammar that is named anew. */
START_TEST(going_back_or_forking_changes_what_a_grammar_says)
{
    struct ferry_engine *e = open_tiny(0, 0);
    struct ferry_grammar *g[4];
    make_all(e, g);
    for (int i = 0; i < 3; i++) {
        struct ferry_session *s = begin(e, 3 * i, g[i]), *fork; /* greedy */
        struct said want = {.n = 0}, got;
        size_t n_prompt = ferry_session_n_tokens(s);
        go_on(e, s, 24, &want);
        size_t half = want.n / 2;
        ck_assert_int_eq(ferry_session_truncate(s, n_prompt + half), 0);
        ck_assert_int_eq(ferry_session_fork(s, &fork), 0);
        got = want;
        got.n = half;
        got.is_whole = false;
        go_on(e, fork, 24, &got);
        ck_assert(!memcmp(&got, &want, sizeof got));
        ferry_session_free(fork);
        got.n = half;
        got.is_whole = false;
        go_on(e, s, 24, &got);
        ck_assert(!memcmp(&got, &want, sizeof got));
        ck_assert_int_eq(ferry_session_truncate(s, n_prompt), 0);
        ferry_session_grammar(s, g[i], FERRY_THOUGHT_NONE);
        got.n = 0;
        got.is_whole = false;
        go_on(e, s, 24, &got);
        ck_assert(!memcmp(&got, &want, sizeof got));
        ferry_session_free(s);
    }
    free_all(g);
    ferry_engine_close(e);
}
END_TEST

static void append(struct ferry_engine *e, struct ferry_session *s, const char *text)
{
    int32_t *ids;
    size_t n;
    ck_assert_int_eq(ferry_tokenize(e, text, strlen(text), 0, &ids, &n), 0);
    ck_assert_int_eq(ferry_session_append(s, ids, n, NULL, NULL), 0);
    ferry_free(ids);
}

START_TEST(appended_words_that_do_not_fit_are_gone_on_with)
{
    struct ferry_engine *e = open_tiny(0, 0);
    struct ferry_grammar *g[4];
    make_all(e, g);
    struct ferry_session *s = begin(e, 0, g[1]);
    int32_t token;
    const char *text;
    size_t n;
    bool is_whole;
    append(e, s, "[1,");
    ck_assert_int_eq(ferry_session_is_whole(s, &is_whole), 0);
    ck_assert(!is_whole);
    ck_assert_int_eq(ferry_session_step(s, &token), 0);
    ck_assert_int_eq(ferry_token_text(e, token, &text, &n), 0);
    ck_assert(n == 1 && strchr("[0123456789", *text));
    ck_assert_int_eq(ferry_session_truncate(s, ferry_session_n_tokens(s) - 1), 0);
    append(e, s, "7,,");
    ck_assert_int_eq(ferry_session_step(s, &token), FERRY_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ferry_error(), "token 5 of the answer"));
    ck_assert_int_eq(ferry_session_is_whole(s, &is_whole), FERRY_ERR_ARG);
    ck_assert_int_eq(ferry_session_truncate(s, ferry_session_n_tokens(s) - 1), 0);
    append(e, s, "88]");
    ck_assert_int_eq(ferry_session_is_whole(s, &is_whole), 0);
    ck_assert(is_whole);
    ck_assert_int_eq(ferry_session_step(s, &token), 0);
    ck_assert(ferry_token_is_end(e, token));
    ferry_session_grammar(s, NULL, FERRY_THOUGHT_NONE);
    ck_assert_int_eq(ferry_session_step(s, &token), 0);
    ferry_session_free(s);
    free_all(g);
    ferry_engine_close(e);
}
END_TEST

START_TEST(grammar_is_taken_where_there_can_be_none)
{
    struct ferry_engine *e = open_tiny(2, 256);
    struct ferry_grammar *g = NULL;
    struct ferry_batch *b;
    struct ferry_request q;
    const int32_t prompt[] = {1, 2, 3};
    uint64_t id;
    ck_assert_int_eq(ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, "x", 1, &g), FERRY_ERR_FORMAT);
    ck_assert_ptr_null(g);
    ck_assert_int_eq(ferry_grammar_make(e, (enum ferry_grammar_kind)7, "x", 1, &g), FERRY_ERR_ARG);
    ck_assert_int_eq(ferry_grammar_make(e, FERRY_GRAMMAR_JSON_SCHEMA, "", 0, &g), 0);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    ferry_request_init(&q);
    q.tokens = prompt;
    q.n_tokens = 3;
    q.grammar = g;
    q.n_scored = 1;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);
    q.n_scored = 0;
    q.pooling = FERRY_POOLING_LAST;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);
    q.pooling = FERRY_POOLING_NONE;
    q.thought = (enum ferry_thought)9;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);
    ferry_batch_free(b);
    ferry_grammar_free(g);
    ferry_grammar_free(NULL);
    ferry_engine_close(e);
    struct ferry_engine_opts o;
    ferry_engine_opts_init(&o);
    o.ids_only = true;
    o.n_ctx = 64;
    o.no_pin = true;
    ck_assert_int_eq(ferry_engine_open(TEST_DATA_DIR "/cli/tiny.gguf", &o, &e), 0);
    ck_assert_int_eq(ferry_grammar_make(e, FERRY_GRAMMAR_JSON_SCHEMA, "", 0, &g), FERRY_ERR_STATE);
    ferry_engine_close(e);
}
END_TEST

/* With ignore_eos end tokens are none: only a sentence that is whole ends an answer. */
START_TEST(ignored_end_ends_an_answer_early)
{
    struct ferry_engine *e = open_tiny(2, 256);
    struct ferry_grammar *g;
    struct ferry_batch *b;
    struct ferry_answer *a = NULL;
    struct ferry_request q;
    const int32_t prompt[] = {1, 2, 3};
    uint64_t id;
    static const char text[] = "root ::= [ab]{0,30}";
    ck_assert_int_eq(ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, text, sizeof text - 1, &g), 0);
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    ferry_request_init(&q);
    q.tokens = prompt;
    q.n_tokens = 3;
    q.grammar = g;
    q.ignore_eos = true;
    q.max_tokens = _i ? 30 : 10;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), 0);
    while (!a)
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
    ck_assert_uint_eq(a->n_tokens, q.max_tokens);
    ck_assert_uint_eq(a->n_bytes, q.max_tokens);
    ck_assert_int_eq(a->finish,
                     _i ? FERRY_FINISH_STOP : FERRY_FINISH_LENGTH); /* whole with the last token that it may have */
    ferry_answer_free(a);
    ferry_batch_free(b);
    ferry_grammar_free(g);
    ferry_engine_close(e);
}
END_TEST

/* The nth allocation fails: a call says so, or the answer that it hits, and what follows is as ever. */
START_TEST(failed_allocation_changes_answers_or_leaks)
{
    enum { N = 3 };
    struct ferry_engine *e = open_tiny(2, 256);
    struct said want[N];
    struct ferry_grammar *g;
    ck_assert_int_eq(ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, texts[0], strlen(texts[0]), &g),
                     0); /* and the vocabulary's trie */
    for (int i = 0; i < N; i++)
        want[i] = say_alone(e, i, g);
    ferry_grammar_free(g);
    uint64_t before = live_bytes();
    bool reached = true;
    for (uint64_t n = 1; reached; n++) {
        struct ferry_batch *b = NULL;
        uint64_t id[N] = {0};
        int n_told = 0;
        g = NULL;
        mem_fail_nth(n);
        while (!g)
            n_told += ferry_grammar_make(e, FERRY_GRAMMAR_GBNF, texts[0], strlen(texts[0]), &g) == FERRY_ERR_NOMEM;
        while (!b)
            n_told += ferry_batch_make(e, &b) == FERRY_ERR_NOMEM;
        for (int i = 0; i < N;) {
            int rc = submit(b, i, g, &id[i]);
            n_told += rc == FERRY_ERR_NOMEM;
            i += rc == 0;
        }
        for (int n_done = 0; n_done < N;) {
            struct ferry_answer *a = NULL;
            n_told += ferry_batch_poll(b, &a) == FERRY_ERR_NOMEM;
            if (!a)
                continue;
            int i = 0;
            while (id[i] != a->id)
                i++;
            if (a->finish == FERRY_FINISH_FAILED) {
                ck_assert_int_eq(a->status, FERRY_ERR_NOMEM);
                n_told++;
            } else {
                must_be(a, &want[i], i);
            }
            ferry_answer_free(a);
            n_done++;
        }
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        ck_assert_msg(n_told == 1 || !reached, "allocation %llu: told %d times", (unsigned long long)n, n_told);
        ferry_batch_free(b);
        ferry_grammar_free(g);
        ck_assert_msg(live_bytes() == before, "allocation %llu leaks", (unsigned long long)n);
        ck_assert(reached || n > 30);
    }
    ferry_engine_close(e);
}
END_TEST

/* ---- grammars that the program keeps ---- */

static struct grammars_wish wish_of(const char *text, enum ferry_grammar_kind kind)
{
    return (struct grammars_wish){.is_wanted = true, .kind = kind, .text = text, .n_bytes = strlen(text)};
}

START_TEST(grammar_of_another_text_is_found)
{
    struct ferry_engine *e = open_tiny(0, 0);
    struct ferry_grammar *g, *again, *other;
    struct grammars kept = {0};
    struct grammars_wish none = {.is_wanted = false};
    ck_assert_int_eq(grammars_get(&kept, e, &none, &g), 0);
    ck_assert_ptr_null(g);
    for (int i = 0; i < 3 * GRAMMARS_KEPT; i++) {
        char text[40];
        struct grammars_wish any = wish_of("", FERRY_GRAMMAR_JSON_SCHEMA), wish;
        snprintf(text, sizeof text, "root ::= \"%d\"", i);
        wish = wish_of(text, FERRY_GRAMMAR_GBNF);
        ck_assert_int_eq(grammars_get(&kept, e, &any, &other), 0);
        ck_assert_int_eq(grammars_get(&kept, e, &wish, &g), 0);
        ck_assert_ptr_ne(g, other);
        ck_assert_int_eq(grammars_get(&kept, e, &any, &again), 0); /* used each time: never let go */
        ck_assert_ptr_eq(again, other);
        ck_assert_int_eq(grammars_get(&kept, e, &wish, &again), 0);
        ck_assert_ptr_eq(again, g);
    }
    struct grammars_wish wrong = wish_of("root", FERRY_GRAMMAR_GBNF),
                         schema = wish_of("true", FERRY_GRAMMAR_JSON_SCHEMA);
    ck_assert_int_eq(grammars_get(&kept, e, &wrong, &g), FERRY_ERR_FORMAT);
    ck_assert_ptr_null(g);
    ck_assert_int_eq(grammars_get(&kept, e, &schema, &g), 0);
    grammars_done(&kept);
    ferry_engine_close(e);
}
END_TEST

/* A line with a schema, and the grammar it wants. */
static int read_line(struct ferry_engine *e)
{
    static const char text[] =
        "{\"prompt\":\"x\",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":"
        "{\"enum\":[\"a text that is long enough to grow\",2]}}}}";
    const struct conf conf = {.temperature = 1, .repeat_penalty = 1};
    struct grammars kept = {0};
    struct ferry_grammar *g = NULL;
    struct batch_line line;
    int rc = batch_line_read(&conf, text, sizeof text - 1, 1, &line);
    if (!rc)
        rc = grammars_get(&kept, e, &line.wish, &g);
    batch_line_done(&line);
    grammars_done(&kept);
    return rc;
}

START_TEST(failed_allocation_of_a_line_leaks)
{
    struct ferry_engine *e = open_tiny(0, 0);
    bool reached = true;
    json_room_begin();
    ck_assert_int_eq(read_line(e), 0);
    for (uint64_t n = 1; reached; n++) {
        uint64_t live = live_bytes();
        mem_fail_nth(n);
        int rc = read_line(e);
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        ck_assert_msg(rc == (reached ? ERR_NOMEM : 0), "allocation %llu: %d, %s", (unsigned long long)n, rc,
                      err_text());
        ck_assert_msg(live_bytes() == live, "allocation %llu leaks", (unsigned long long)n);
        ck_assert(reached || n > 30);
    }
    ferry_engine_close(e);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("constraint");
    TCase *t = tcase_create("constraint");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, token_is_drawn_that_is_not_allowed_or_others_count);
    tcase_add_loop_test(t, nothing_to_draw_is_drawn, 0, N_WAYS);
    tcase_add_test(t, thought_is_held_against_the_grammar_or_goes_on_for_ever);
    tcase_add_test(t, channel_before_the_final_one_is_held_against_the_grammar);
    tcase_add_test(t, model_may_not_think_before_a_sentence);
    tcase_add_test(t, token_that_does_not_fit_is_followed);
    tcase_add_loop_test(t, company_or_giving_way_changes_what_a_grammar_says, 0, 2);
    tcase_add_test(t, going_back_or_forking_changes_what_a_grammar_says);
    tcase_add_test(t, appended_words_that_do_not_fit_are_gone_on_with);
    tcase_add_test(t, grammar_is_taken_where_there_can_be_none);
    tcase_add_loop_test(t, ignored_end_ends_an_answer_early, 0, 2);
    tcase_add_test(t, failed_allocation_changes_answers_or_leaks);
    tcase_add_test(t, grammar_of_another_text_is_found);
    tcase_add_test(t, failed_allocation_of_a_line_leaks);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
