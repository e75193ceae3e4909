/* The public face of run/jobs: translates requests and answers. */
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry.h"
#include "src/ferry_in.h"
#include "src/model/model.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/jobs.h"
#include "src/run/store.h"

struct ferry_batch {
    struct ferry_engine *engine; /* view */
    struct jobs *jobs;           /* own */
};

int ferry_batch_make(struct ferry_engine *e, struct ferry_batch **out)
{
    *out = NULL;
    if (!e->plan.kv_tok)
        return err(ERR_STATE, "the engine was opened without a batch (n_batch)");
    struct ferry_batch *b = mem_zalloc(1, sizeof *b, MEM_OTHER);
    if (!b)
        return err(ERR_NOMEM, "a batch of prompts");
    b->engine = e;
    int rc = jobs_open(&(struct jobs_args){.exec = e->exec,
                                           .cache = e->cache,
                                           .tok = e->tok,
                                           .plan = &e->plan,
                                           .spill_dir = e->spill_dir,
                                           .n_vocab = e->model->hp.n_vocab,
                                           .n_embd = e->model->hp.n_embd},
                       &b->jobs);
    if (rc < 0) {
        mem_free(b);
        return rc;
    }
    *out = b;
    return 0;
}

void ferry_batch_free(struct ferry_batch *b)
{
    if (!b)
        return;
    jobs_close(b->jobs);
    mem_free(b);
}

void ferry_request_init(struct ferry_request *request)
{
    *request = (struct ferry_request){.struct_bytes = sizeof *request, .logprobs = -1};
}

int ferry_batch_submit(struct ferry_batch *b, const struct ferry_request *request, uint64_t *id)
{
    static const enum embed_pooling poolings[] = {
        [FERRY_POOLING_NONE] = EMBED_NONE, [FERRY_POOLING_MEAN] = EMBED_MEAN, [FERRY_POOLING_LAST] = EMBED_LAST};
    struct ferry_request r;
    struct sample_opts sample;

    ferry_request_init(&r);
    if (request->struct_bytes > sizeof r)
        return err(ERR_ARG, "a request of %zu bytes; this library knows %zu", request->struct_bytes, sizeof r);
    memcpy(&r, request, request->struct_bytes);
    if (r.n_stop && !b->engine->tok)
        return err(ERR_STATE, "stop texts need the vocabulary (ids_only)");
    if (r.logprobs > b->engine->model->hp.n_vocab)
        return err(ERR_ARG, "%d best tokens of a vocabulary of %d", r.logprobs, b->engine->model->hp.n_vocab);
    int rc = ferry_sample_options(r.sample, &sample);
    if (rc < 0)
        return rc;
    if ((unsigned)r.pooling > FERRY_POOLING_LAST)
        return err(ERR_ARG, "pooling %d", (int)r.pooling);
    if ((unsigned)r.thought > FERRY_THOUGHT_AMID)
        return err(ERR_ARG, "thought %d", (int)r.thought);
    int n_top = r.logprobs < 0 ? (r.n_scored ? 0 : -1) : r.logprobs;
    return jobs_submit(b->jobs,
                       &(struct jobs_request){.tokens = r.tokens,
                                              .n_tok = r.n_tokens,
                                              .n_scored = r.n_scored,
                                              .pooling = poolings[r.pooling],
                                              .normalize = r.normalize,
                                              .rules = {.max_tok = r.max_tokens,
                                                        .ignore_end = r.ignore_eos,
                                                        .stop = r.stop,
                                                        .n_stop = r.n_stop,
                                                        .n_top = n_top},
                                              .sample = sample,
                                              .constraint = (struct constraint *)r.grammar,
                                              .thought = (enum constraint_thought)r.thought},
                       id);
}

static void describe(struct job *job, struct ferry_answer *out)
{
    static const enum ferry_finish finishes[] = {
        [ANSWER_STOP] = FERRY_FINISH_STOP,       [ANSWER_LENGTH] = FERRY_FINISH_LENGTH,
        [ANSWER_CONTEXT] = FERRY_FINISH_CONTEXT, [ANSWER_SCORED] = FERRY_FINISH_SCORED,
        [ANSWER_POOLED] = FERRY_FINISH_POOLED,   [ANSWER_FAILED] = FERRY_FINISH_FAILED};
    struct jobs_facts f;

    jobs_facts(job, &f);
    const struct answer *a = f.answer;
    *out = (struct ferry_answer){.id = f.id,
                                 .finish = finishes[a->end],
                                 .text = a->text,
                                 .n_bytes = a->n_text,
                                 .tokens = a->token,
                                 .n_tokens = a->n_tok,
                                 .n_prompt = f.n_given,
                                 .n_shared = f.n_shared,
                                 .n_greedy = a->n_greedy,
                                 .logprobs = a->logprob,
                                 .top_tokens = a->top,
                                 .top_logprobs = a->top_logprob,
                                 .n_top = a->rules.n_top > 0 ? a->rules.n_top : 0,
                                 .embedding = f.embedding,
                                 .n_embd = f.embedding ? (size_t)f.n_embd : 0,
                                 .status = a->status,
                                 .error = a->error,
                                 .wait_ns = f.wait_ns,
                                 .run_ns = f.run_ns,
                                 .n_preempted = f.n_preempted,
                                 .own = job};
}

static struct tune_seen look(const struct ferry_batch *b, const struct jobs_stats *s)
{
    struct store_stats st;

    store_stats(b->engine->store, &st);
    return (struct tune_seen){
        .n_tok = s->n_drawn, .ns = s->step_ns, .disk_bytes = st.disk_bytes, .disk_wait_ns = st.disk_wait_ns};
}

/* A step. Those in which each sequence of the plan drew a token, and nothing else was run, are held against what was predicted. */
static int step(struct ferry_batch *b)
{
    struct ferry_engine *e = b->engine;
    struct jobs_stats before, after;

    jobs_stats(b->jobs, &before);
    struct tune_seen from = look(b, &before);
    int rc = jobs_step(b->jobs);
    jobs_stats(b->jobs, &after);
    struct tune_seen to = look(b, &after);
    bool is_full = after.n_drawn - before.n_drawn == e->plan.n_seq && after.n_prompt == before.n_prompt &&
                   after.n_rerun == before.n_rerun;
    if (!rc && is_full)
        ferry_see(e, &from, &to);
    return rc;
}

int ferry_batch_poll(struct ferry_batch *b, struct ferry_answer **out)
{
    struct jobs_stats s;

    *out = NULL;
    /* First its memory: an answer that was taken cannot be put back. */
    struct ferry_answer *a = mem_zalloc(1, sizeof *a, MEM_OTHER);
    if (!a)
        return err(ERR_NOMEM, "an answer");
    jobs_stats(b->jobs, &s);
    int rc = s.n_finished ? 0 : step(b);
    struct job *job = rc < 0 ? NULL : jobs_take(b->jobs);
    if (!job) {
        mem_free(a);
        return rc;
    }
    describe(job, a);
    *out = a;
    return 0;
}

void ferry_answer_free(struct ferry_answer *a)
{
    if (!a)
        return;
    jobs_free(a->own);
    mem_free(a);
}

bool ferry_batch_has_begun(const struct ferry_batch *b, uint64_t id)
{
    return jobs_has_begun(b->jobs, id);
}

int ferry_batch_cancel(struct ferry_batch *b, uint64_t id)
{
    return jobs_cancel(b->jobs, id) ? 0 : err(ERR_ARG, "no request %llu", (unsigned long long)id);
}

void ferry_batch_interrupt(struct ferry_batch *b)
{
    jobs_interrupt(b->jobs);
}

/* Full steps against what was predicted of them. */
static void compare(const struct ferry_engine *e, struct plan *expected, struct tune *out)
{
    *expected = e->plan;
    expected->decode_tok_per_s = 0;
    if (plan_is_measured(&e->plan, &e->machine))
        plan_batch_expect(&e->batch, expected);
    tune_compare(expected, &e->seen, out);
}

const char *ferry_batch_review(const struct ferry_batch *b, char *buf, size_t buf_bytes)
{
    struct plan expected;
    struct tune t;

    compare(b->engine, &expected, &t);
    return tune_text(&expected, &t, buf, buf_bytes);
}

const char *ferry_batch_news(const struct ferry_batch *b, uint32_t *n_seen, char *buf, size_t buf_bytes)
{
    return jobs_news(b->jobs, n_seen, buf, buf_bytes);
}

void ferry_batch_speed(const struct ferry_batch *b, struct ferry_batch_speed *out)
{
    struct plan expected;
    struct tune t;

    compare(b->engine, &expected, &t);
    *out = (struct ferry_batch_speed){t.predicted_tok_per_s, t.measured_tok_per_s};
}

void ferry_batch_stats(const struct ferry_batch *b, struct ferry_batch_stats *out)
{
    struct store_stats st;
    struct exec_stats ex;
    struct jobs_stats s;

    store_stats(b->engine->store, &st);
    exec_stats(b->engine->exec, &ex);
    jobs_stats(b->jobs, &s);
    *out = (struct ferry_batch_stats){.n_waiting = (uint32_t)s.n_waiting,
                                      .n_running = (uint32_t)s.n_running,
                                      .n_finished = (uint32_t)s.n_finished,
                                      .most_running = (uint32_t)s.most_running,
                                      .n_steps = s.n_steps,
                                      .step_ns = s.step_ns,
                                      .n_prompt = s.n_prompt,
                                      .n_generated = s.n_drawn,
                                      .n_shared = s.n_shared,
                                      .n_preempted = s.n_preempted,
                                      .n_rerun = s.n_rerun,
                                      .n_spilled = s.n_spilled,
                                      .n_spill_failed = s.n_spill_failed,
                                      .n_sat_out = s.n_sat_out,
                                      .n_halved = ex.n_halved,
                                      .weight_bytes = ex.weight_bytes,
                                      .disk_bytes = st.disk_bytes,
                                      .disk_wait_ns = st.disk_wait_ns,
                                      .expert_hits = st.n_expert_hits,
                                      .expert_misses = st.n_expert_misses};
    for (int group = 0; group < 2; group++) {
        out->kv_pages += (uint64_t)cache_pages(b->engine->cache, group);
        out->kv_pages_used += (uint64_t)cache_pages_used(b->engine->cache, group);
    }
}
