/* From logits to tokens: numpy's draws (tests/gen/sample_vectors.py), arithmetic and statistics. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/sample.h"
#include "tests/run_suite.h"

#include <check.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_VOCAB = 100, MAX_HISTORY = 64, N_CASES = 15 };

struct vector {
    char name[32];
    int n_vocab, n_history, n_kept, n_tokens;
    struct sample_opts opts;
    float logits[MAX_VOCAB];
    int32_t history[MAX_HISTORY], kept[MAX_VOCAB], tokens[MAX_VOCAB];
};

static int read_ids(char *line, const char *what, int32_t *ids, int max)
{
    int n = 0;

    ck_assert(!strncmp(line, what, strlen(what)));
    for (char *p = line + strlen(what), *end; strtol(p, &end, 10), end != p; p = end) {
        ck_assert_int_lt(n, max);
        ids[n++] = (int32_t)strtol(p, NULL, 10);
    }
    return n;
}

static void read_vector(int i, struct vector *v)
{
    static char line[8192];
    FILE *f = fopen(TEST_DATA_DIR "/sample/draws.txt", "r");

    ck_assert_ptr_nonnull(f);
    for (int skip = 0; skip < 5 * i; skip++)
        ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    memset(v, 0, sizeof *v);
    struct sample_opts *o = &v->opts;
    ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    ck_assert_int_eq(sscanf(line, "case %31s %d %f %d %f %f %f %f %f %d %" SCNu64, v->name, &v->n_vocab,
                            &o->temperature, &o->top_k, &o->top_p, &o->min_p, &o->repeat_penalty, &o->presence_penalty,
                            &o->frequency_penalty, &o->penalty_window, &o->seed),
                     11);
    ck_assert_int_le(v->n_vocab, MAX_VOCAB);
    ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    v->n_history = read_ids(line, "history", v->history, MAX_HISTORY);
    ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    char *p = line + strlen("logits");
    for (int k = 0; k < v->n_vocab; k++)
        v->logits[k] = strtof(p, &p);
    ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    v->n_kept = read_ids(line, "kept", v->kept, MAX_VOCAB);
    ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    v->n_tokens = read_ids(line, "tokens", v->tokens, MAX_VOCAB);
    fclose(f);
    ck_assert_int_gt(v->n_kept, 0);
    ck_assert_int_eq(v->n_tokens, 24);
}

static struct sample *make(const struct sample_opts *o, int n_vocab)
{
    struct sample *s;
    ck_assert_int_eq(sample_make(o, n_vocab, &s), 0);
    return s;
}

static int32_t draw(struct sample *s, const float *logits)
{
    int32_t token = -1;
    int rc = sample_draw(s, logits, NULL, 0, &token);

    if (rc) /* a passing ck_assert() writes to a file: too slow for loops of draws */
        ck_abort_msg("draw: %s", err_text());
    return token;
}

START_TEST(draws_are_numpys)
{
    static struct vector v;
    float before[MAX_VOCAB];

    read_vector(_i, &v);
    struct sample *s = make(&v.opts, v.n_vocab);
    memcpy(before, v.logits, sizeof before);
    for (int i = 0; i < v.n_tokens; i++) {
        int32_t token;
        ck_assert_int_eq(sample_draw(s, v.logits, v.history, v.n_history, &token), 0);
        ck_assert_msg(token == v.tokens[i], "%s: draw %d is %d, should be %d", v.name, i, token, v.tokens[i]);
    }
    ck_assert(!memcmp(before, v.logits, sizeof before));
    sample_free(s);
}
END_TEST

START_TEST(exactly_numpys_candidates_are_drawn)
{
    static struct vector v;
    int n_drawn[MAX_VOCAB] = {0}, kept = 0;

    read_vector(_i, &v);
    v.opts.temperature = 1e6f; /* does not change what is kept, but makes all of it about equally likely */
    struct sample *s = make(&v.opts, v.n_vocab);
    for (int i = 0; i < 3000; i++) {
        int32_t token;
        int rc = sample_draw(s, v.logits, v.history, v.n_history, &token);
        if (rc || token < 0 || token >= v.n_vocab)
            ck_abort_msg("%s: %d, token %d", v.name, rc, token);
        n_drawn[token]++;
    }
    for (int id = 0; id < v.n_vocab; id++) {
        bool is_kept = kept < v.n_kept && v.kept[kept] == id;
        ck_assert_msg(is_kept == (n_drawn[id] > 0), "%s: token %d was drawn %d times, should be %s", v.name, id,
                      n_drawn[id], is_kept ? "kept" : "cut");
        kept += is_kept;
    }
    sample_free(s);
}
END_TEST

START_TEST(greedy_takes_the_lowest_of_equal_best)
{
    float logits[] = {-1, 3, -2, 3, 2.9999998f, 3};
    struct sample_opts o;

    sample_opts_init(&o);
    struct sample *s = make(&o, 6);
    ck_assert_int_eq(draw(s, logits), 1);
    logits[1] = NAN;
    ck_assert_int_eq(draw(s, logits), 3);
    logits[3] = INFINITY;
    ck_assert_int_eq(draw(s, logits), 5);
    logits[5] = -INFINITY;
    ck_assert_int_eq(draw(s, logits), 4);
    sample_free(s);
}
END_TEST

/* 3 / 2 = 1.5 and -1 * 2 = -2: divided above 0, multiplied below; once, however often the token was there. */
START_TEST(repeat_penalty_counts_a_token_once)
{
    static const int32_t history[] = {0, 0, 0, 2};
    const float logits[] = {3, 1.4f, -1, -1.9f};
    struct sample_opts o;
    int32_t token;

    sample_opts_init(&o);
    o.repeat_penalty = 2;
    struct sample *s = make(&o, 4);
    ck_assert_int_eq(sample_draw(s, logits, history, 4, &token), 0);
    ck_assert_int_eq(token, 0); /* 1.5 */
    o.repeat_penalty = 2.2f;
    ck_assert_int_eq(sample_reset(s, &o), 0);
    ck_assert_int_eq(sample_draw(s, logits, history, 4, &token), 0);
    ck_assert_int_eq(token, 1); /* 1.36 < 1.4 */
    sample_free(s);
    s = make(&o, 2);
    static const int32_t second[] = {0};
    ck_assert_int_eq(sample_draw(s, logits + 2, second, 1, &token), 0);
    ck_assert_int_eq(token, 1); /* -2.2 < -1.9 */
    sample_free(s);
}
END_TEST

START_TEST(frequency_penalty_counts_every_time_presence_once)
{
    static const int32_t history[] = {9, 0, 0, 1, 0, -3, 1000}; /* two ids that are none */
    const float logits[] = {10, 9, 7.6f, 0, 0, 0, 0, 0, 0, 0};
    struct sample_opts o;
    int32_t token;

    sample_opts_init(&o);
    o.frequency_penalty = 0.5f;
    o.presence_penalty = 0.25f;
    struct sample *s = make(&o, 10);
    ck_assert_int_eq(sample_draw(s, logits, history, 7, &token), 0);
    ck_assert_int_eq(token, 0); /* 10 - 1.5 - 0.25 = 8.25, 9 - 0.5 - 0.25 = 8.25 */
    o.presence_penalty = 1;
    ck_assert_int_eq(sample_reset(s, &o), 0);
    ck_assert_int_eq(sample_draw(s, logits, history, 7, &token), 0);
    ck_assert_int_eq(token, 2); /* 7.5, 7.5, 7.6 */
    o.penalty_window = 3;       /* 0 once; 1 no more */
    ck_assert_int_eq(sample_reset(s, &o), 0);
    ck_assert_int_eq(sample_draw(s, logits, history, 7, &token), 0);
    ck_assert_int_eq(token, 1);
    o.penalty_window = 0;
    ck_assert_int_eq(sample_reset(s, &o), 0);
    ck_assert_int_eq(sample_draw(s, logits, history, 7, &token), 0);
    ck_assert_int_eq(token, 0);
    sample_free(s);
}
END_TEST

START_TEST(logits_without_a_number_are_an_error)
{
    float logits[5] = {NAN, -INFINITY, NAN, INFINITY, NAN};
    static const int32_t history[] = {0, 1, 3};
    struct sample_opts o;
    int32_t token;

    sample_opts_init(&o);
    o.temperature = (float)(_i & 1);
    o.repeat_penalty = _i & 2 ? 1.5f : 1;
    o.top_k = 2;
    o.top_p = 0.5f;
    struct sample *s = make(&o, 5);
    ck_assert_int_eq(sample_draw(s, logits, history, 3, &token), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "3 are NaN"));
    logits[4] = -3e38f;
    ck_assert_int_eq(sample_draw(s, logits, history, 3, &token), 0);
    ck_assert_int_eq(token, 4);
    sample_free(s);
}
END_TEST

START_TEST(extreme_numbers_do_not_break_a_draw)
{
    const float logits[] = {-3.4e38f, 3.4e38f, -3.4e38f, 1e-45f, 3.4e38f};
    struct sample_opts o;

    sample_opts_init(&o);
    o.temperature = 1e-45f;
    o.top_p = 0.999f;
    struct sample *s = make(&o, 5);
    for (int i = 0; i < 20; i++) {
        int32_t token = draw(s, logits);
        ck_assert(token == 1 || token == 4);
    }
    o.temperature = 3e38f;
    o.top_p = 1;
    ck_assert_int_eq(sample_reset(s, &o), 0);
    for (int i = 0; i < 20; i++)
        ck_assert_int_ge(draw(s, logits), 0);
    o.top_k = 1;
    ck_assert_int_eq(sample_reset(s, &o), 0);
    ck_assert_int_eq(draw(s, logits), 1);
    sample_free(s);
}
END_TEST

/* 16 tokens with probabilities 1/136 to 16/136; the 0.9999 quantile of chi-square with 15 degrees of freedom is 44.26
 * (scipy.stats.chi2.ppf). The seed is fixed, so that this passes always or never. */
START_TEST(draws_follow_the_probabilities)
{
    enum { N = 100000 };
    float logits[16];
    int n_drawn[16] = {0};
    double chi2 = 0;
    struct sample_opts o;

    for (int i = 0; i < 16; i++)
        logits[i] = logf((float)(i + 1));
    sample_opts_init(&o);
    o.temperature = 1;
    o.seed = 42;
    struct sample *s = make(&o, 16);
    for (int i = 0; i < N; i++)
        n_drawn[draw(s, logits)]++;
    for (int i = 0; i < 16; i++) {
        double want = N * (i + 1) / 136.0;
        chi2 += (n_drawn[i] - want) * (n_drawn[i] - want) / want;
    }
    ck_assert_double_lt(chi2, 44.26);
    sample_free(s);
}
END_TEST

START_TEST(copy_continues_from_the_same_point)
{
    static struct vector v;

    read_vector(0, &v);
    struct sample *s = make(&v.opts, v.n_vocab), *copy;
    for (int i = 0; i < 5; i++)
        draw(s, v.logits);
    ck_assert_int_eq(sample_copy(s, &copy), 0);
    for (int i = 5; i < 24; i++)
        ck_assert_int_eq(draw(s, v.logits), v.tokens[i]);
    for (int i = 5; i < 24; i++)
        ck_assert_int_eq(draw(copy, v.logits), v.tokens[i]);
    ck_assert_int_eq(sample_reset(s, &v.opts), 0);
    ck_assert_int_eq(draw(s, v.logits), v.tokens[0]);
    sample_free(copy);
    sample_free(s);
}
END_TEST

/* A value for each option that is out of range, and the word that the error must have. */
static const struct {
    struct sample_opts o;
    const char *word;
} bad_opts[] = {
    {{.temperature = -0.1f, .top_p = 1, .repeat_penalty = 1}, "temperature is -0.1"},
    {{.temperature = NAN, .top_p = 1, .repeat_penalty = 1}, "temperature"},
    {{.temperature = INFINITY, .top_p = 1, .repeat_penalty = 1}, "temperature"},
    {{.top_k = -1, .top_p = 1, .repeat_penalty = 1}, "top-k is -1"},
    {{.top_p = 1.5f, .repeat_penalty = 1}, "top-p is 1.5"},
    {{.top_p = NAN, .repeat_penalty = 1}, "top-p"},
    {{.top_p = 1, .min_p = -1, .repeat_penalty = 1}, "min-p is -1"},
    {{.top_p = 1, .repeat_penalty = 0}, "repeat penalty is 0"},
    {{.top_p = 1, .repeat_penalty = 1, .presence_penalty = NAN}, "presence"},
    {{.top_p = 1, .repeat_penalty = 1, .frequency_penalty = INFINITY}, "frequency"},
    {{.top_p = 1, .repeat_penalty = 1, .penalty_window = -2}, "window is -2"},
};

START_TEST(options_out_of_range_are_refused)
{
    struct sample_opts good = {.temperature = 1, .top_p = 1, .repeat_penalty = 1, .seed = 1};
    static const float logits[8];
    struct sample *s, *other;

    ck_assert_int_eq(sample_make(&bad_opts[_i].o, 8, &s), ERR_ARG);
    ck_assert_ptr_null(s);
    ck_assert_msg(strstr(err_text(), bad_opts[_i].word), "%s", err_text());
    s = make(&good, 8);
    other = make(&good, 8);
    ck_assert_int_eq(sample_reset(s, &bad_opts[_i].o), ERR_ARG);
    for (int i = 0; i < 10; i++)
        ck_assert_int_eq(draw(s, logits), draw(other, logits));
    sample_free(s);
    sample_free(other);
}
END_TEST

START_TEST(every_failing_allocation_is_survived)
{
    struct sample_opts o;
    struct sample *s, *copy;
    uint64_t before = mem_live_bytes(MEM_SCRATCH);

    sample_opts_init(&o);
    ck_assert_int_eq(sample_make(&o, 0, &s), ERR_ARG);
    mem_fail_nth(1);
    ck_assert_int_eq(sample_make(&o, 1000, &s), ERR_NOMEM);
    ck_assert_ptr_null(s);
    s = make(&o, 1000);
    mem_fail_nth(1);
    ck_assert_int_eq(sample_copy(s, &copy), ERR_NOMEM);
    ck_assert_ptr_null(copy);
    mem_fail_nth(0);
    sample_free(s);
    sample_free(NULL);
    ck_assert_uint_eq(mem_live_bytes(MEM_SCRATCH), before);
}
END_TEST

START_TEST(draw_takes_no_memory)
{
    static struct vector v;
    int32_t token;

    read_vector(9, &v);
    v.opts.repeat_penalty = 1.1f;
    struct sample *s = make(&v.opts, v.n_vocab);
    mem_fail_nth(1);
    ck_assert_int_eq(sample_draw(s, v.logits, v.history, v.n_history, &token), 0);
    ck_assert_uint_eq(mem_n_calls(), 0);
    mem_fail_nth(0);
    sample_free(s);
}
END_TEST

static void naive_kept(const float *x, int n, int k, uint8_t *kept)
{
    memset(kept, 0, (size_t)n);
    for (int i = 0; i < k; i++) {
        int best = -1;
        for (int id = 0; id < n; id++)
            if (!kept[id] && (best < 0 || x[id] > x[best]))
                best = id;
        kept[best] = 1;
    }
}

/* Logits that differ in their last bits only, or span many powers of ten, fall into few or many bins. */
START_TEST(top_k_of_crowded_logits_is_exact)
{
    enum { N = 3000 };
    static float x[N];
    static uint8_t kept[N];
    int n_drawn[N] = {0};
    uint64_t rng = 99 + (uint64_t)_i;
    struct sample_opts o;

    for (int i = 0; i < N; i++) {
        rng = rng * 6364136223846793005u + 1442695040888963407u;
        uint32_t r = (uint32_t)(rng >> 40);
        x[i] =
            _i % 2 ? 1 + (float)(r % 500) * 0x1p-23f : ldexpf((float)(int)(r % 2001) - 1000, (int)(r / 2001 % 60) - 30);
    }
    int k = 1 + (int)(rng >> 33) % 200;
    naive_kept(x, N, k, kept);
    sample_opts_init(&o);
    o.temperature = 3e38f;
    o.top_k = k;
    struct sample *s = make(&o, N);
    for (int i = 0; i < 60 * k; i++)
        n_drawn[draw(s, x)]++;
    for (int id = 0; id < N; id++)
        if ((n_drawn[id] > 0) != kept[id])
            ck_abort_msg("seed %d, k %d: token %d (%a) drawn %d times, should be %s", 99 + _i, k, id, (double)x[id],
                         n_drawn[id], kept[id] ? "kept" : "cut");
    sample_free(s);
}
END_TEST

/* A logit with its place: better ones first, of equal ones the first. */
struct placed {
    float logit;
    int32_t id;
};

static int is_worse(const void *a, const void *b)
{
    const struct placed *x = a, *y = b;

    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : (x->id > y->id) - (x->id < y->id);
}

static int is_later(const void *a, const void *b)
{
    const struct placed *x = a, *y = b;

    return (x->id > y->id) - (x->id < y->id);
}

/* Rows of all lengths around a block's, with few different numbers or many, of which some are none: the best is the one that sorting finds,
 * and of the k best the one is drawn that would be drawn of them alone. */
START_TEST(blocks_of_a_row_hide_candidates)
{
    enum { MOST = 1000 };
    static const int lengths[] = {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 640, 641, MOST};
    static const float odd[] = {NAN, INFINITY, -INFINITY, -0.0f, 3e38f, -3e38f};
    static float logits[MOST], best[MOST];
    static struct placed sorted[MOST];
    static int32_t ids[MOST];

    for (int round = 0; round < 200; round++) {
        int n = lengths[round % 13], n_finite = 0, n_kinds = round % 3 ? 1 << 20 : 4;
        struct sample_opts o;
        struct sample *s;
        int32_t got, want;
        for (int i = 0; i < n; i++) {
            uint32_t x = (uint32_t)(round * 1000 + i) * 2654435761u;
            x ^= x >> 15;
            logits[i] = x % 11 == 0 ? odd[x / 11 % 6] : (float)(x * 2246822519u % (uint32_t)n_kinds) / 3;
            if (isfinite(logits[i]))
                sorted[n_finite++] = (struct placed){logits[i], i};
        }
        if (n_finite == 0)
            continue;
        qsort(sorted, (size_t)n_finite, sizeof *sorted, is_worse);
        sample_opts_init(&o);
        ck_assert_int_eq(sample_make(&o, MOST, &s), 0);
        ck_assert_int_eq(sample_draw_row(s, &(struct sample_row){.n = n, .logit = logits}, NULL, 0, &got), 0);
        ck_assert_int_eq(got, sorted[0].id);
        for (int k = 1; k < 12; k += 2) {
            int n_best = k < n_finite ? k : n_finite;
            qsort(sorted, (size_t)n_finite, sizeof *sorted, is_worse);
            qsort(sorted, (size_t)n_best, sizeof *sorted, is_later);
            for (int i = 0; i < n_best; i++) {
                best[i] = sorted[i].logit;
                ids[i] = sorted[i].id;
            }
            o = (struct sample_opts){.temperature = 1e6f, .top_p = 1, .repeat_penalty = 1, .seed = (uint64_t)round};
            ck_assert_int_eq(sample_reset(s, &o), 0);
            ck_assert_int_eq(
                sample_draw_row(s, &(struct sample_row){.n = n_best, .id = ids, .logit = best}, NULL, 0, &want), 0);
            o.top_k = k;
            ck_assert_int_eq(sample_reset(s, &o), 0);
            ck_assert_int_eq(sample_draw_row(s, &(struct sample_row){.n = n, .logit = logits}, NULL, 0, &got), 0);
            ck_assert_msg(got == want, "round %d, the best %d of %d: %d instead of %d", round, k, n, got, want);
        }
        sample_free(s);
    }
}
END_TEST

/* ---- from the best logits alone ---- */

enum { WIDE = 700, LONG = 90 };

/* A row of the n best of x (n_vocab) by arithmetic: how many are better than each. */
static struct sample_row best_row(const float *x, int n_vocab, int n, int32_t *ids, float *logits)
{
    struct sample_row row = {.id = ids, .logit = logits};

    for (int i = 0; i < n_vocab; i++) {
        int n_better = 0;
        for (int k = 0; k < n_vocab; k++)
            n_better += isfinite(x[k]) && (x[k] > x[i] || (x[k] == x[i] && k < i));
        if (!isfinite(x[i]) || n_better >= n)
            continue;
        ids[row.n] = i;
        logits[row.n++] = x[i];
    }
    return row;
}

static uint64_t next(uint64_t *rng)
{
    *rng = *rng * 6364136223846793005u + 1442695040888963407u;
    return *rng >> 33;
}

/* Few different values or many, some not finite. */
static void fill_any(float *x, int n, uint64_t *rng)
{
    static const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 3e38f, -3e38f};
    unsigned n_values = next(rng) % 3 ? 100000 : 7;

    for (int i = 0; i < n; i++)
        x[i] = next(rng) % 40 ? (float)(next(rng) % n_values) / (float)n_values * 20 - 12 : special[next(rng) % 7];
}

static struct sample_opts any_opts(uint64_t *rng)
{
    struct sample_opts o;

    sample_opts_init(&o);
    o.temperature = next(rng) % 3 ? 0.3f + (float)(next(rng) % 20) / 10 : 0;
    o.top_k = (int)(next(rng) % 60);
    o.top_p = next(rng) % 2 ? 1.0f : (float)(next(rng) % 100) / 100;
    o.min_p = next(rng) % 2 ? 0.0f : (float)(next(rng) % 50) / 100;
    o.repeat_penalty = next(rng) % 2 ? 1.0f : 1 + (float)(next(rng) % 10) / 10;
    o.presence_penalty = next(rng) % 2 ? 0.0f : (float)(next(rng) % 20) / 5;
    o.frequency_penalty = next(rng) % 3 ? 0.0f : (float)(next(rng) % 20) / 5;
    o.penalty_window = (int)(next(rng) % 70) - 1;
    o.seed = next(rng);
    return o;
}

START_TEST(best_logits_give_another_token)
{
    static float x[WIDE], logits[WIDE];
    static int32_t ids[WIDE], history[LONG];
    uint64_t rng = 1000 + (uint64_t)_i;
    int n_tops = 0;

    for (int round = 0; round < 40; round++) {
        int n_vocab = 300 + (int)(next(&rng) % (WIDE - 300)), n_history = (int)(next(&rng) % LONG);
        struct sample_opts o = any_opts(&rng);
        struct sample *all = make(&o, n_vocab), *best = make(&o, n_vocab);
        fill_any(x, n_vocab, &rng);
        for (int i = 0; i < n_history; i++) /* often those that would be drawn; some outside of the vocabulary */
            history[i] = (int32_t)(next(&rng) % (unsigned)(n_vocab + 5)) - 2;
        int n = sample_n_top(all, n_history);
        n_tops += n > 0;
        for (int more = 0; n > 0 && more < 30; more += 29) {
            struct sample_row row = best_row(x, n_vocab, n + more, ids, logits);
            for (int i = 0; i < 10; i++) {
                struct sample_state state[2];
                int32_t want = -1, got = -2;
                int rc = sample_draw(all, x, history, n_history, &want);
                if (rc || sample_draw_row(best, &row, history, n_history, &got) || want != got)
                    ck_abort_msg("seed %d, round %d, %d best of %d: token %d, not %d", 1000 + _i, round, n + more,
                                 n_vocab, got, want);
                sample_get(all, &state[0]);
                sample_get(best, &state[1]);
                if (memcmp(state[0].rng, state[1].rng, sizeof state[0].rng))
                    ck_abort_msg("seed %d, round %d: other random numbers", 1000 + _i, round);
            }
        }
        sample_free(all);
        sample_free(best);
    }
    ck_assert_int_gt(n_tops, 15);
}
END_TEST

static const struct {
    float temperature;
    int top_k;
    float repeat, presence, frequency;
    int window, n_history, n_top;
} tops[] = {
    {0, 0, 1, 0, 0, 64, 1000, 1},           {0, 50, 1, 0, 0, 64, 1000, 1},     {1, 40, 1, 0, 0, 64, 1000, 40},
    {1, 0, 1, 0, 0, 64, 1000, 0},           {1, 256, 1, 0, 0, 64, 1000, 256},  {1, 257, 1, 0, 0, 64, 1000, 0},
    {0, 0, 1.1f, 0, 0, 64, 1000, 65},       {0, 0, 1.1f, 0, 0, 64, 10, 11},    {1, 40, 1, 0.5f, 0, 64, 1000, 104},
    {1, 40, 1, 0, 0.5f, 200, 1000, 240},    {1, 40, 1, 0, 0.5f, 217, 1000, 0}, {1, 40, 1.1f, 0, 0, -1, 216, 256},
    {1, 40, 1.1f, 0, 0, -1, 217, 0},        {0, 0, 1.1f, 0, 0, 0, 1000, 1},    {1, 40, 0.9f, 0, 0, 64, 1000, 0},
    {0, 0, 1, -0.1f, 0, 64, 1000, 0},       {0, 0, 1, 0, -0.1f, 64, 1000, 0},  {1, INT32_MAX, 1, 0, 0, 64, 1000, 0},
    {1, 256, 1.1f, 0, 0, -1, INT32_MAX, 0},
};

START_TEST(fewer_or_more_logits_are_wanted_than_suffice)
{
    struct sample_opts o;

    sample_opts_init(&o);
    o.temperature = tops[_i].temperature;
    o.top_k = tops[_i].top_k;
    o.repeat_penalty = tops[_i].repeat;
    o.presence_penalty = tops[_i].presence;
    o.frequency_penalty = tops[_i].frequency;
    o.penalty_window = tops[_i].window;
    struct sample *s = make(&o, 5000);
    ck_assert_int_eq(sample_n_top(s, tops[_i].n_history), tops[_i].n_top);
    sample_free(s);
    s = make(&o, 2); /* all of them take no more room */
    ck_assert_int_eq(sample_n_top(s, tops[_i].n_history), 0);
    sample_free(s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("sample");
    TCase *tc = tcase_create("sample");

    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, draws_are_numpys, 0, N_CASES);
    tcase_add_loop_test(tc, exactly_numpys_candidates_are_drawn, 0, N_CASES);
    tcase_add_test(tc, greedy_takes_the_lowest_of_equal_best);
    tcase_add_test(tc, repeat_penalty_counts_a_token_once);
    tcase_add_test(tc, frequency_penalty_counts_every_time_presence_once);
    tcase_add_loop_test(tc, logits_without_a_number_are_an_error, 0, 4);
    tcase_add_test(tc, extreme_numbers_do_not_break_a_draw);
    tcase_add_test(tc, draws_follow_the_probabilities);
    tcase_add_test(tc, copy_continues_from_the_same_point);
    tcase_add_loop_test(tc, options_out_of_range_are_refused, 0, (int)(sizeof bad_opts / sizeof bad_opts[0]));
    tcase_add_test(tc, every_failing_allocation_is_survived);
    tcase_add_test(tc, draw_takes_no_memory);
    tcase_add_loop_test(tc, top_k_of_crowded_logits_is_exact, 0, 6);
    tcase_add_test(tc, blocks_of_a_row_hide_candidates);
    tcase_add_loop_test(tc, best_logits_give_another_token, 0, 10);
    tcase_add_loop_test(tc, fewer_or_more_logits_are_wanted_than_suffice, 0, (int)(sizeof tops / sizeof *tops));
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
