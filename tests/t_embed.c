/* Embeddings on the tiny models of tests/data/models: against the float reference, and the same bits whatever runs beside them. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry.h"
#include "src/ferry_in.h"
#include "src/run/embed.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_IDS = 150, N_EMBD = 32, MOST_EMBD = 256, N_CTX = 256, N_REQ = 24, N_NEW = 100 };

static int32_t ids[N_IDS];

static void setup(void)
{
    FILE *f = fopen(TEST_DATA_DIR "/models/ids.txt", "r");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_IDS; i++)
        ck_assert_int_eq(fscanf(f, "%d", &ids[i]), 1);
    fclose(f);
}

static struct ferry_engine *open_with(const char *name, uint32_t n_batch, uint32_t batch_tok, uint32_t chunk_tok)
{
    char path[1024];
    struct ferry_engine *e = NULL;
    struct ferry_engine_opts o;
    ferry_engine_opts_init(&o);
    o.n_ctx = N_CTX;
    o.n_threads = 1;
    o.no_pin = true;
    o.io = "pread";
    o.n_batch = n_batch;
    o.batch_tok = batch_tok;
    o.chunk_tok = chunk_tok;
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    ck_assert_msg(ferry_engine_open(path, &o, &e) == 0, "%s: %s", name, ferry_error());
    return e;
}

static struct ferry_batch *batch_of(struct ferry_engine *e)
{
    struct ferry_batch *b = NULL;
    ck_assert_msg(ferry_batch_make(e, &b) == 0, "%s", ferry_error());
    return b;
}

static struct ferry_request request_of(const int32_t *tokens, size_t n, enum ferry_pooling pooling)
{
    struct ferry_request q;
    ferry_request_init(&q);
    q.tokens = tokens;
    q.n_tokens = n;
    q.pooling = pooling;
    q.max_tokens = N_NEW; /* of those that are no embeddings */
    q.ignore_eos = true;
    return q;
}

static uint64_t submit(struct ferry_batch *b, const struct ferry_request *q)
{
    uint64_t id = 0;
    ck_assert_msg(ferry_batch_submit(b, q, &id) == 0, "%s", ferry_error());
    return id;
}

static struct ferry_answer *next(struct ferry_batch *b)
{
    struct ferry_answer *a = NULL;
    for (int step = 0; !a; step++) {
        ck_assert_int_lt(step, 100000);
        ck_assert_msg(ferry_batch_poll(b, &a) == 0, "%s", ferry_error());
    }
    return a;
}

/* ---- against the outside ---- */

static const char *const outside[] = {"llama", "gemma3", "qwen3moe"};

/* The reference is float32 in another order with the same f16 cache: as t_session.c says of logits, a handful of flipped
 * roundings reach 2^-10 of the spread. */
START_TEST(vector_differs_from_the_references)
{
    static float want[2][N_EMBD];
    char path[1024];
    snprintf(path, sizeof path, "%s/models/%s.embed", TEST_DATA_DIR, outside[_i]);
    FILE *f = fopen(path, "rb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fread(want, sizeof(float), 2 * N_EMBD, f), 2 * N_EMBD);
    fclose(f);
    struct ferry_engine *e = open_with(outside[_i], 1, 256, 64);
    struct ferry_batch *b = batch_of(e);
    for (int last = 0; last < 2; last++)
        for (int normalize = 0; normalize < 2; normalize++) {
            struct ferry_request q = request_of(ids, N_IDS, last ? FERRY_POOLING_LAST : FERRY_POOLING_MEAN);
            double square = 0, worst = 0;
            q.normalize = normalize;
            submit(b, &q);
            struct ferry_answer *a = next(b);
            ck_assert_int_eq(a->finish, FERRY_FINISH_POOLED);
            ck_assert_uint_eq(a->n_embd, N_EMBD);
            ck_assert_uint_eq(a->n_tokens, 0);
            ck_assert_uint_eq(a->n_prompt, N_IDS);
            for (int i = 0; i < N_EMBD; i++)
                square += (double)want[last][i] * want[last][i];
            double length = sqrt(square), spread = normalize ? 1 / sqrt(N_EMBD) : length / sqrt(N_EMBD);
            for (int i = 0; i < N_EMBD; i++)
                worst = fmax(worst, fabs(want[last][i] / (normalize ? length : 1) - a->embedding[i]));
            ck_assert_msg(worst <= 0x1p-10 * spread, "%s: off by %g of the spread", outside[_i], worst / spread);
            ferry_answer_free(a);
        }
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

/* ---- no bit depends on ... ---- */

/* Every third one answers; among the others both poolings. All begin alike, so that those who may share do. */
static struct ferry_request mixed_request(int i, int32_t *tokens)
{
    size_t n = 0;
    for (int k = 0; k < 40 + i * 4; k++)
        tokens[n++] = k < 30 ? ids[k] : ids[(k * 3 + i * 11) % N_IDS];
    return request_of(tokens, n,
                      i % 3 == 0   ? FERRY_POOLING_NONE
                      : i % 3 == 1 ? FERRY_POOLING_MEAN
                                   : FERRY_POOLING_LAST);
}

struct result {
    float value[MOST_EMBD];
    size_t n_embd;
    int32_t token[N_NEW];
    size_t n_tok;
};

static struct result result_of(const struct ferry_answer *a)
{
    struct result r = {.n_embd = a->n_embd, .n_tok = a->n_tokens};
    ck_assert(a->finish == FERRY_FINISH_POOLED ? a->n_embd > 0 : a->n_tokens == N_NEW);
    if (a->n_embd)
        memcpy(r.value, a->embedding, a->n_embd * sizeof *r.value);
    if (a->n_tokens)
        memcpy(r.token, a->tokens, a->n_tokens * sizeof *r.token);
    return r;
}

/* How many embeddings had to give their pages back half way. */
static int all_of(struct ferry_batch *b, struct result *out, bool together)
{
    int n_given_back = 0;
    static int32_t tokens[N_IDS];
    uint64_t first = 0;
    for (int i = 0; i < N_REQ; i++) {
        struct ferry_request q = mixed_request(i, tokens);
        uint64_t id = submit(b, &q);
        first = i == 0 ? id : first;
        if (together && i < N_REQ - 1)
            continue;
        for (int n = together ? N_REQ : 1; n > 0; n--) {
            struct ferry_answer *a = next(b);
            out[a->id - first] = result_of(a);
            n_given_back += a->n_preempted > 0 && a->n_embd > 0;
            ferry_answer_free(a);
        }
    }
    return n_given_back;
}

START_TEST(company_changes_a_bit)
{
    static const char *const exact[] = {"mixed", "gemma3", "llama-yarn", "qwen3next"};
    static const struct {
        uint32_t n_batch, batch_tok, chunk_tok;
    } ways[] = {{24, 256, 0}, {5, 256, 33}, {16, 24, 40}, {24, 1, 7}};
    static struct result want[N_REQ], got[N_REQ];
    struct ferry_batch_stats st;
    uint64_t n_shared = 0;
    int n_given_back = 0;

    struct ferry_engine *e = open_with(exact[_i], 1, 256, 64);
    struct ferry_batch *b = batch_of(e);
    all_of(b, want, false);
    ferry_batch_free(b);
    ferry_engine_close(e);
    for (size_t w = 0; w < sizeof ways / sizeof *ways; w++) {
        e = open_with(exact[_i], ways[w].n_batch, ways[w].batch_tok, ways[w].chunk_tok);
        b = batch_of(e);
        n_given_back += all_of(b, got, true);
        ferry_batch_stats(b, &st);
        n_shared += st.n_shared;
        for (int i = 0; i < N_REQ; i++)
            ck_assert_msg(!memcmp(&want[i], &got[i], sizeof *want), "%s, way %zu: request %d differs", exact[_i], w, i);
        ferry_batch_free(b);
        ferry_engine_close(e);
    }
    ck_assert_int_gt(n_given_back, 0);
    ck_assert_uint_gt(n_shared, 0);
}
END_TEST

/* Nothing of the tail is run: it begins with GET_ROWS, which is nowhere else. */
START_TEST(vocabulary_is_multiplied_in_vain)
{
    uint64_t ns[OP_N_KIND];
    struct ferry_engine *e = open_with("llama", 2, 256, 0);
    struct ferry_batch *b = batch_of(e);
    struct ferry_request q = request_of(ids, N_IDS, FERRY_POOLING_MEAN);
    e->device->ops->op_ns(e->device, ns, true);
    submit(b, &q);
    q.pooling = FERRY_POOLING_LAST;
    submit(b, &q);
    ferry_answer_free(next(b));
    ferry_answer_free(next(b));
    e->device->ops->op_ns(e->device, ns, true);
    ck_assert_uint_gt(ns[OP_RMS_NORM], 0);
    ck_assert_uint_eq(ns[OP_GET_ROWS], 0);
    q.pooling = FERRY_POOLING_NONE;
    submit(b, &q);
    ferry_answer_free(next(b));
    e->device->ops->op_ns(e->device, ns, true);
    ck_assert_uint_gt(ns[OP_GET_ROWS], 0);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

START_TEST(vector_of_zeros_becomes_nan)
{
    static const float zeros[4];
    struct embed m;
    ck_assert_int_eq(embed_init(&m, EMBED_MEAN, 4), 0);
    embed_add(&m, zeros);
    embed_finish(&m, true);
    ck_assert_mem_eq(m.value, zeros, sizeof zeros);
    embed_done(&m);
}
END_TEST

/* ---- limits and failures ---- */

START_TEST(bad_request_is_taken)
{
    static int32_t long_prompt[N_CTX + 1];
    uint64_t id;
    struct ferry_engine *e = open_with("llama", 2, 256, 0);
    struct ferry_batch *b = batch_of(e);
    struct ferry_request q = request_of(ids, 10, FERRY_POOLING_MEAN);
    q.n_scored = 3;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);
    q.n_scored = 0;
    q.pooling = (enum ferry_pooling)3;
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_ARG);
    q = request_of(long_prompt, N_CTX + 1, FERRY_POOLING_LAST);
    ck_assert_int_eq(ferry_batch_submit(b, &q, &id), FERRY_ERR_LIMIT);
    q.n_tokens = N_CTX; /* no room for an answer is wanted */
    submit(b, &q);
    struct ferry_answer *a = next(b);
    ck_assert_int_eq(a->finish, FERRY_FINISH_POOLED);
    ferry_answer_free(a);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

START_TEST(failed_allocation_changes_or_leaks)
{
    struct ferry_engine *e = open_with("llama", 2, 256, 0);
    struct ferry_request q = request_of(ids, 70, FERRY_POOLING_MEAN);
    struct ferry_batch *b = batch_of(e);
    submit(b, &q);
    struct ferry_answer *a = next(b);
    struct result want = result_of(a);
    ferry_answer_free(a);
    ferry_batch_free(b);
    uint64_t before = live_bytes();
    bool reached = true;
    for (uint64_t n = 1; reached; n++) {
        int n_told = 0, rc;
        uint64_t id;
        b = NULL;
        a = NULL;
        mem_fail_nth(n);
        while (!b)
            n_told += ferry_batch_make(e, &b) == FERRY_ERR_NOMEM;
        while ((rc = ferry_batch_submit(b, &q, &id)) != 0) {
            ck_assert_int_eq(rc, FERRY_ERR_NOMEM);
            n_told++;
        }
        while (!a)
            n_told += ferry_batch_poll(b, &a) == FERRY_ERR_NOMEM;
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        struct result got = result_of(a);
        ck_assert_msg(!memcmp(&want, &got, sizeof want), "allocation %llu: another vector", (unsigned long long)n);
        ck_assert_int_le(n_told, 1);
        ferry_answer_free(a);
        ferry_batch_free(b);
        ck_assert_msg(live_bytes() == before, "allocation %llu leaks", (unsigned long long)n);
        ck_assert(reached || n > 20);
    }
    ferry_engine_close(e);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("embed");
    TCase *t = tcase_create("embed");
    tcase_set_timeout(t, 300);
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_loop_test(t, vector_differs_from_the_references, 0, (int)(sizeof outside / sizeof *outside));
    tcase_add_loop_test(t, company_changes_a_bit, 0, 4);
    tcase_add_test(t, vocabulary_is_multiplied_in_vain);
    tcase_add_test(t, vector_of_zeros_becomes_nan);
    tcase_add_test(t, bad_request_is_taken);
    tcase_add_test(t, failed_allocation_changes_or_leaks);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
