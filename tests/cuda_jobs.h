/* A batch on an engine made by hand (cuda_seqs.h): requests whose answers are told apart. A suite may say before how many tokens are
 * given (GIVEN) and drawn (DRAWN). lint: C, as Check's suites are */
#ifndef FERRY_TESTS_CUDA_JOBS_H
#define FERRY_TESTS_CUDA_JOBS_H

#include "src/run/jobs.h"
#include "tests/cuda_seqs.h"

#ifndef GIVEN
#define GIVEN 250
#endif
#ifndef DRAWN
#define DRAWN 200
#endif
enum { GIVEN_TOK = GIVEN, ANSWER_TOK = DRAWN };

static int32_t said[N_SEQ][ANSWER_TOK];

static void submit(struct jobs *jobs, int seq)
{
    int32_t tokens[GIVEN_TOK];
    struct jobs_request r = {
        .tokens = tokens, .n_tok = GIVEN_TOK, .rules = {.max_tok = ANSWER_TOK, .ignore_end = true}};
    uint64_t id;

    for (int i = 0; i < GIVEN_TOK; i++)
        tokens[i] = (seq * 91 + i * 7 + i / 50) % 200 + 10;
    sample_opts_init(&r.sample);
    ck_assert_msg(jobs_submit(jobs, &r, &id) == 0, "%s", err_text());
    ck_assert_uint_eq(id, (uint64_t)seq + 1);
}

/* The engine's own sequences make room for a batch of as many, that waits to begin. Its clock is the emulator's. */
static struct jobs *open_jobs(void)
{
    struct jobs_args args = {.exec = rooms.exec,
                             .cache = rooms.cache,
                             .plan = &rooms.plan,
                             .n_vocab = N_VOCAB,
                             .n_embd = rooms.model->hp.n_embd,
                             .clock = emu_now_ns};
    struct jobs *jobs;

    for (int seq = 0; seq < N_SEQ; seq++) {
        cache_seq_free(rooms.seqs[seq]);
        rooms.seqs[seq] = NULL;
    }
    ck_assert_int_eq(jobs_open(&args, &jobs), 0);
    for (int seq = 0; seq < N_SEQ; seq++)
        submit(jobs, seq);
    return jobs;
}

static void take_answers(struct jobs *jobs)
{
    struct jobs_facts f;
    struct job *job;

    while ((job = jobs_take(jobs))) {
        jobs_facts(job, &f);
        ck_assert_uint_eq(f.answer->n_tok, ANSWER_TOK);
        memcpy(said[f.id - 1], f.answer->token, sizeof said[0]);
        jobs_free(job);
    }
}

#endif
