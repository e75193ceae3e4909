/* Opening engines on the tiny models of tests/data/models, whose GPU the emulated runtime plays, and asking their plans. Each suite that
 * includes it is a program of its own. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_CUDA_OPEN_H
#define FERRY_TESTS_CUDA_OPEN_H

#include "src/ferry.h"
#include "tests/emu/emu.h"

#include <check.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

enum { N_TOK = 150, N_VOCAB = 288 };

static int32_t ids[N_TOK];

static void start(void)
{
    FILE *f = fopen(TEST_DATA_DIR "/models/ids.txt", "r");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_TOK; i++)
        ck_assert_int_eq(fscanf(f, "%d", &ids[i]), 1);
    fclose(f);
    emu_reset(1);
}

static struct ferry_engine_opts opts_for(const char *device, uint32_t n_ctx, uint32_t chunk_tok)
{
    struct ferry_engine_opts o;
    ferry_engine_opts_init(&o);
    o.n_ctx = n_ctx;
    o.n_threads = 1;
    o.n_out = 16;
    o.chunk_tok = chunk_tok;
    o.n_sessions = 2;
    o.no_pin = true;
    o.io = "pread";
    o.device = device;
    return o;
}

/* The same, with experts that are not on the GPU never copied there. */
static inline struct ferry_engine_opts copies_nothing(const char *device)
{
    struct ferry_engine_opts o = opts_for(device, 256, 64);
    o.copies = "never";
    return o;
}

static int try_open(const char *name, const struct ferry_engine_opts *o, struct ferry_engine **e)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    return ferry_engine_open(path, o, e);
}

static struct ferry_engine *open_with(const char *name, const struct ferry_engine_opts *o)
{
    struct ferry_engine *e;
    ck_assert_msg(try_open(name, o, &e) == 0, "%s: %s", name, ferry_error());
    return e;
}

static struct ferry_session *session_of(struct ferry_engine *e)
{
    struct ferry_session *s = NULL;
    ck_assert_msg(ferry_session_make(e, NULL, &s) == 0, "%s", ferry_error());
    return s;
}

/* Greedy tokens after 20 ids, of a session and of one that was forked off it in the middle: words (2, n). */
static inline void greedy_words(const char *name, const struct ferry_engine_opts *o, int n, int32_t *words)
{
    struct ferry_engine *e = open_with(name, o);
    struct ferry_sample_opts greedy;
    struct ferry_session *s, *fork;

    ferry_sample_opts_init(&greedy);
    greedy.temperature = 0;
    ck_assert_int_eq(ferry_session_make(e, &greedy, &s), 0);
    emu_in_step(true);
    ck_assert_int_eq(ferry_session_append(s, ids, 20, NULL, NULL), 0);
    for (int i = 0; i < n / 2; i++)
        ck_assert_msg(ferry_session_step(s, &words[i]) == 0, "%s", ferry_error());
    ck_assert_int_eq(ferry_session_fork(s, &fork), 0);
    for (int i = n / 2; i < n; i++) { /* both write into a page that they share */
        ck_assert_int_eq(ferry_session_step(s, &words[i]), 0);
        ck_assert_int_eq(ferry_session_step(fork, &words[n + i]), 0);
    }
    emu_in_step(false);
    ferry_session_free(fork);
    ferry_session_free(s);
    ferry_engine_close(e);
}

/* Hold so many of ids. A run that fails leaves no more than was run: with recurrent layers that may be less than was there. */
static inline void come_to(struct ferry_session *s, size_t len)
{
    size_t n = ferry_session_n_tokens(s);

    if (n > len)
        ck_assert_int_eq(ferry_session_truncate(s, len), 0);
    else
        ck_assert_int_eq(ferry_session_append(s, ids + n, len - n, NULL, NULL), 0);
}

/* A prompt's row after ten others, launch by launch (else: t_cuda_graph): every call of its step fails in turn, `least` or more of them;
 * the session then goes on as if nothing had been. */
static inline void fail_each_call_of_a_step(struct ferry_session *s, int least)
{
    float want[N_VOCAB], got[N_VOCAB];
    bool failed = true;
    int n = 1;

    ck_assert_int_eq(ferry_session_append(s, ids, 10, NULL, NULL), 0);
    ck_assert_int_eq(ferry_session_logits(s, ids + 10, 1, true, want), 0);
    size_t len = ferry_session_n_tokens(s) - 1;
    for (; failed; n++) {
        come_to(s, len);
        emu_seed((uint64_t)n);
        emu_fail_nth(n);
        int rc = ferry_session_logits(s, ids + 10, 1, true, got);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert_int_eq(rc, failed ? FERRY_ERR_DEVICE : 0);
        if (!failed || n % 3)
            continue;
        come_to(s, len); /* at once again, over what may be under way */
        ck_assert_int_eq(ferry_session_logits(s, ids + 10, 1, true, got), 0);
        ck_assert_mem_eq(want, got, sizeof want);
    }
    ck_assert_mem_eq(want, got, sizeof want);
    ck_assert_int_gt(n, least);
}

/* What an engine's plan says of the GPU: "experts", "bytes" "total"...; false: nothing. */
static bool find_fact(const struct ferry_engine *e, const char *key, const char *part, uint64_t *value)
{
    char *text;
    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    json_t *plan = json_loads(text, 0, NULL), *v = json_object_get(json_object_get(plan, "gpu"), key);
    v = part ? json_object_get(v, part) : v;
    bool is_there = json_is_integer(v);
    *value = (uint64_t)json_integer_value(v);
    json_decref(plan);
    ferry_free(text);
    return is_there;
}

static uint64_t fact_of(const struct ferry_engine *e, const char *key, const char *part)
{
    uint64_t value;
    ck_assert_msg(find_fact(e, key, part, &value), "the plan has no %s %s", key, part ? part : "");
    return value;
}

enum { PAIR_BYTES = 8, ROW_BYTES = N_VOCAB * 4 };

/* What comes down with a token all of whose logits are asked for; the plan counts the best of them, with its id. */
static inline uint64_t down_with_row(const struct ferry_engine *e)
{
    return fact_of(e, "down_bytes_per_token", NULL) - PAIR_BYTES + ROW_BYTES;
}

#endif
