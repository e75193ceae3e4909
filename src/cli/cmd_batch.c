/* ferry batch: many prompts, answered together, into a file that survives whatever ends the run. */
#include "src/cli/cmd.h"

#include "src/cli/batch_rank.h"
#include "src/cli/batch_record.h"
#include "src/cli/batch_run.h"
#include "src/cli/profile.h"
#include "src/cli/stop.h"
#include "src/cli/talk.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* Requests that wait beside those that run: enough to find equal beginnings, few enough to take no memory. */
enum { WAITING_PER_SEQUENCE = 2 };

static double since(const struct timespec *t)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - t->tv_sec) + (double)(now.tv_nsec - t->tv_nsec) * 1e-9;
}

static void all_stats(const struct batch_run *r, struct ferry_batch_stats *out)
{
    ferry_batch_stats(r->batch, out);
    team_add_stats(&r->team, out);
}

/* ---- what is said on the way ---- */

struct state {
    uint64_t done, total;
    double tokens_per_s; /* of answers; where there are none, of prompts */
    double left_s;       /* < 0: not known */
};

static bool makes_answers(const struct conf *conf)
{
    return !conf->score && !conf->embed;
}

static struct state state_of(const struct batch_run *r)
{
    struct ferry_batch_stats st;
    double s = since(&r->start);
    struct state out = {.done = r->out.n_done, .total = r->n_expected + (r->in.n_requests - r->n_read), .left_s = -1};

    all_stats(r, &st);
    if (s > 0)
        out.tokens_per_s = (double)(makes_answers(r->conf) ? st.n_generated : st.n_prompt) / s;
    if (out.done > r->n_had && out.total >= out.done)
        out.left_s = s * (double)(out.total - out.done) / (double)(out.done - r->n_had);
    return out;
}

static json_t *rate(double tok_per_s)
{
    return tok_per_s > 0 ? json_real(tok_per_s) : json_null();
}

/* Steps of as many answers as run at once here, which is what the plan predicts. A run's tokens_per_s is of all steps and ranks. */
static json_t *full_steps(const struct batch_run *r)
{
    struct ferry_batch_speed speed;

    ferry_batch_speed(r->batch, &speed);
    return json_pack("{s:I, s:o, s:o}", "answers", (json_int_t)r->info.n_batch, "tokens_per_s",
                     rate(speed.measured_tok_per_s), "predicted_tokens_per_s", rate(speed.predicted_tok_per_s));
}

static void say_json(struct batch_run *r, bool end)
{
    struct ferry_batch_stats st;
    struct state s = state_of(r);

    if (!end && since(&r->last_json) < 1)
        return;
    clock_gettime(CLOCK_MONOTONIC, &r->last_json);
    all_stats(r, &st);
    json_t *o =
        json_pack("{s:I, s:I, s:I, s:f, s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:b}", "done", (json_int_t)s.done, "total",
                  (json_int_t)s.total, "failed", (json_int_t)r->n_failed, "tokens_per_s", s.tokens_per_s, "running",
                  (int)st.n_running, "prompt_tokens", (json_int_t)st.n_prompt, "shared_tokens", (json_int_t)st.n_shared,
                  "generated_tokens", (json_int_t)st.n_generated, "preempted", (json_int_t)st.n_preempted,
                  "rerun_tokens", (json_int_t)st.n_rerun, "spilled", (json_int_t)st.n_spilled, "end", end);
    json_object_set_new(o, "seconds_left", s.left_s >= 0 ? json_real(s.left_s) : json_null());
    json_object_set_new(o, "full_steps", full_steps(r));
    json_dumpf(o, stderr, JSON_COMPACT | JSON_REAL_PRECISION(6));
    fputc('\n', stderr);
    json_decref(o);
}

static void say_progress(struct batch_run *r)
{
    char line[160], left[32] = "";

    if (r->conf->json) {
        say_json(r, false);
        return;
    }
    struct state s = state_of(r);
    if (s.left_s >= 0)
        snprintf(left, sizeof left, ", %.0f s left", s.left_s);
    snprintf(line, sizeof line, "%" PRIu64 " of %" PRIu64 " answers, %.1f tokens/s%s", s.done, s.total, s.tokens_per_s,
             left);
    term_progress_text(&r->progress, line);
}

static void say_end(struct batch_run *r)
{
    struct ferry_batch_stats st;
    struct state s = state_of(r);
    uint32_t n_seen = 0, n_waits_seen = 0;
    char news[1024];

    if (r->conf->json) {
        say_json(r, true);
        return;
    }
    term_progress_end(&r->progress);
    if (r->conf->quiet)
        return;
    all_stats(r, &st);
    fprintf(stderr, "[%" PRIu64 " of %" PRIu64 " answers", s.done, s.total);
    if (r->n_had)
        fprintf(stderr, ", %" PRIu64 " of them there before", r->n_had);
    if (r->n_failed)
        fprintf(stderr, ", %" PRIu64 " failed", r->n_failed);
    fprintf(stderr, "; prompt %" PRIu64 " tokens run, %" PRIu64 " shared", st.n_prompt, st.n_shared);
    if (makes_answers(r->conf))
        fprintf(stderr, "; answers %" PRIu64 " tokens", st.n_generated);
    fprintf(stderr, ", %.1f tokens/s; at most %" PRIu32 " together", s.tokens_per_s, st.most_running);
    if (st.n_preempted)
        fprintf(stderr, "; memory short %" PRIu64 " times, %" PRIu64 " tokens run again", st.n_preempted, st.n_rerun);
    if (st.n_spilled || st.n_spill_failed)
        fprintf(stderr, ", pages kept on disk %" PRIu64 " times", st.n_spilled);
    if (st.n_spill_failed)
        fprintf(stderr, " (failed %" PRIu64 " times)", st.n_spill_failed);
    if (st.n_sat_out)
        fprintf(stderr, "; steps sat out for pages in the host's memory: %" PRIu64, st.n_sat_out);
    if (st.n_halved)
        fprintf(stderr, "; steps in halves: %" PRIu64, st.n_halved);
    fputs("]\n", stderr);
    if (ferry_batch_review(r->batch, news, sizeof news)[0])
        fprintf(stderr, "[steps of %" PRIu32 " answers at once: %s]\n", r->info.n_batch, news);
    if (ferry_engine_refit(r->engine, news, sizeof news)[0])
        fprintf(stderr, "[%s]\n", news);
    if (ferry_engine_gpu_news(r->engine, &n_seen, news, sizeof news)[0])
        fprintf(stderr, "ferry: %s\n", news);
    if (ferry_batch_news(r->batch, &n_waits_seen, news, sizeof news)[0])
        fprintf(stderr, "ferry: %s\n", news);
}

/* Have a line answered by rank `to`, which may be this one. */
static int place_line(struct batch_run *r, int to, uint64_t number, const char *text, size_t n_bytes)
{
    struct batch_group *g = NULL;

    r->there = batch_out_done(&r->out, number);
    int rc = batch_run_open_line(r, text, n_bytes, number, &g);
    if (!g || !to)
        return g ? batch_run_begin_line(r, g) : rc;
    batch_run_free_group(g);
    return batch_rank_give_line(r, to, number, text, n_bytes);
}

/* Read on while somebody has room, what was lost first: others before oneself, because they have nothing else. */
static int read_on(struct batch_run *r)
{
    int rc = 0;

    while (!rc && (r->again.n || !r->no_more)) {
        int to = team_hungriest(&r->team);
        bool more;
        if (!to && !batch_run_has_room(r))
            break;
        struct batch_given *again = batch_rank_next_again(r);
        if (again) {
            rc = place_line(r, to, again->number, again->text, again->n_bytes);
            ferry_free(again);
            continue;
        }
        rc = batch_in_next(&r->in, &r->line, &more);
        r->no_more = !more;
        if (!rc && more)
            rc = place_line(r, to, r->in.number, text_str(&r->line), r->line.n_bytes);
    }
    return rc;
}

/* ---- the whole ---- */

static void say_stopping(const struct batch_run *r)
{
    if (!r->conf->quiet && r->n_flying)
        fprintf(stderr, "\nferry: finishing %zu answers; once more to stop at once\n", r->n_flying);
}

/* Rank 0, or the one process that there is. */
static int work(struct batch_run *r)
{
    bool stopping = false;
    int rc = 0;

    while (!rc) {
        if (stop_asked() && !stopping) {
            stopping = true;
            batch_run_drop_waiting(r);
            say_stopping(r);
        }
        rc = batch_rank_hear_others(r);
        if (!rc && !stopping)
            rc = read_on(r);
        if (!rc && (r->no_more || stopping))
            rc = batch_rank_share(r, stopping);
        if (rc || (!r->n_flying && ((r->no_more && !r->again.n) || stopping) && batch_rank_are_others_gone(r)))
            break;
        if (r->n_flying)
            rc = batch_run_poll(r);
        else
            team_rest();
        say_progress(r);
    }
    r->is_orderly = !rc;
    int sync = batch_out_sync(&r->out);
    return rc ? rc : sync ? sync : stopping || batch_rank_was_other_stopped(r) ? FERRY_ERR_CANCEL : 0;
}

/* A rank that is given its lines. One that is stopped says so, and waits for the end so that no message is left over. */
static int work_for_first(struct batch_run *r)
{
    bool stopping = false, said_bye = false;
    int rc = 0;

    while (!rc && !(said_bye && r->no_more)) {
        if (stop_asked() && !stopping) {
            stopping = true;
            batch_run_drop_waiting(r);
        }
        rc = batch_rank_hear_first(r);
        if (stopping)
            batch_rank_drop_given(r);
        else if (!rc)
            rc = batch_rank_take_given(r);
        if (!rc && !said_bye && !r->n_flying && !r->given.n && (r->no_more || stopping)) {
            rc = batch_run_tell(r, &(struct team_head){.kind = TEAM_BYE, .number = stopping}, NULL, 0);
            said_bye = true;
        }
        if (!rc && r->n_flying)
            rc = batch_run_poll(r);
        else if (!rc)
            team_rest();
    }
    r->is_orderly = !rc;
    return rc ? rc : stopping ? FERRY_ERR_CANCEL : 0;
}

/* Variables of the chat template, as JSON. */
static json_t *about_vars(const struct vars *vars)
{
    json_t *o = json_object();

    for (size_t i = 0; i < vars->n; i++) {
        const struct ferry_var *v = &vars->v[i];
        json_object_set_new(o, v->name,
                            v->kind == FERRY_VAR_TEXT   ? json_string(v->text)
                            : v->kind == FERRY_VAR_BOOL ? json_boolean(v->number)
                                                        : json_integer((json_int_t)v->number));
    }
    return o;
}

/* What an answer depends on: a run that differs in it is another run. plan: the engine's, which need not be made from the options
 * (--plan). */
static json_t *about(const struct batch_run *r, const json_t *plan)
{
    const struct conf *c = r->conf;
    char hash[24], identity[24];

    snprintf(hash, sizeof hash, "%016" PRIx64, r->in.hash);
    snprintf(identity, sizeof identity, "%016" PRIx64, r->info.identity);
    json_t *options = json_pack(
        "{s:f, s:I, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:i, s:s, s:s, s:s, s:b, s:s, s:s}", "temp", c->temperature,
        "top-k", (json_int_t)c->top_k, "top-p", c->top_p, "min-p", c->min_p, "repeat-penalty", c->repeat_penalty,
        "presence-penalty", c->presence_penalty, "frequency-penalty", c->frequency_penalty, "penalty-window",
        (json_int_t)c->penalty_window, "seed", (json_int_t)c->seed, "max-tokens", (json_int_t)c->n_tokens, "ctx",
        (int)r->info.n_ctx, "kv-type", json_string_value(json_object_get(plan, "kv_type")), "prefill",
        json_string_value(json_object_get(plan, "prefill")), "order", c->order, "score", c->score, "embed",
        c->embed ? c->embed : "none", "normalize", c->normalize);
    json_object_set_new(options, "template-var", about_vars(&c->vars));
    json_object_set_new(options, c->grammar ? "grammar" : "json-schema",
                        r->wish.is_wanted ? json_stringn(r->wish.text, r->wish.n_bytes) : json_null());
    json_object_set_new(options, c->grammar ? "json-schema" : "grammar", json_null());
    return json_pack("{s:{s:s}, s:{s:I, s:I, s:s}, s:{s:s, s:s}, s:o}", "ferry", "version", ferry_version(), "input",
                     "bytes", (json_int_t)r->in.n_bytes, "lines", (json_int_t)r->in.n_lines, "hash", hash, "model",
                     "name", r->info.name, "identity", identity, "options", options);
}

static int make_about(struct batch_run *r)
{
    char *text = NULL;
    int rc = ferry_engine_plan(r->engine, true, &text);

    if (rc)
        return rc;
    json_t *plan = json_loads(text, 0, NULL);
    r->about = about(r, plan);
    json_decref(plan);
    ferry_free(text);
    return batch_record_made(r->about, "what the answers depend on");
}

static int open_output(struct batch_run *r)
{
    int rc = batch_out_open(&r->out, r->conf, r->about, r->in.n_lines);

    r->n_had = r->out.n_done;
    if (rc || r->conf->quiet)
        return rc;
    if (r->out.n_cut)
        fprintf(stderr, "ferry: %s: %" PRIu64 " bytes of a torn end were cut off\n", r->conf->output, r->out.n_cut);
    if (r->out.resumed)
        fprintf(stderr, "ferry: going on: %" PRIu64 " answers are there\n", r->n_had);
    return 0;
}

/* Positions that a sequence of this input is likely to take: a token is about four bytes of text, half of a line is not text. */
static uint32_t expected_tok(const struct batch_run *r)
{
    enum { ANSWER_TOK = 256, LEAST_TOK = 64 };
    uint64_t line_bytes = r->in.n_requests ? r->in.n_bytes / r->in.n_requests : 0;
    uint64_t answer_tok = !makes_answers(r->conf) ? 0 : r->conf->n_tokens ? r->conf->n_tokens : ANSWER_TOK;
    uint64_t n = line_bytes / 4 + answer_tok;

    return n < LEAST_TOK ? LEAST_TOK : n < UINT32_MAX / 2 ? (uint32_t)n : UINT32_MAX / 2;
}

/* Lines may want several answers, but memory for sequences that will never be is taken from experts. */
static uint32_t most_sequences(const struct batch_run *r)
{
    enum { SEVERAL = 32 };
    uint64_t n = r->in.n_requests < SEVERAL ? SEVERAL : r->in.n_requests;

    return n < UINT32_MAX ? (uint32_t)n : UINT32_MAX;
}

/* The engine's options, with the rates that ferry probe saved; r->profile holds their path. */
static int batch_opts(struct batch_run *r, struct ferry_engine_opts *o)
{
    int rc = profile_path(r->conf, &r->profile);

    if (rc)
        return rc;
    *o = talk_engine_opts(r->conf, r->conf->n_ctx, 0, &r->progress);
    o->n_batch = r->conf->n_sequences ? r->conf->n_sequences : FERRY_BATCH_AUTO;
    o->batch_tok = r->seq_tok;
    o->batch_most = most_sequences(r);
    o->profile_path = r->profile;
    o->spill_dir = r->conf->spill;
    return 0;
}

/* What is wrong with the grammar of all requests is said before any is answered. */
static int read_grammar(struct batch_run *r)
{
    struct ferry_grammar *unused;
    int rc = grammars_read(r->conf, &r->grammar_text, &r->wish);

    return rc ? rc : grammars_get(&r->grammars, r->engine, &r->wish, &unused);
}

static int open_engine(struct batch_run *r)
{
    struct ferry_engine_opts o;
    int rc = batch_opts(r, &o);

    if (rc)
        return rc;
    term_progress_begin(&r->progress, r->conf, "loading", NULL);
    rc = ferry_engine_open(r->conf->model, &o, &r->engine);
    term_progress_end(&r->progress);
    if (rc)
        return rc;
    ferry_engine_info(r->engine, &r->info);
    struct ferry_chat_opts chat = vars_opts(&r->conf->vars);
    rc = chat.n_vars ? ferry_chat_check(r->engine, &chat) : 0;
    if (rc)
        return rc;
    rc = read_grammar(r);
    if (rc)
        return rc;
    r->n_pending = (size_t)r->info.n_batch * (1 + WAITING_PER_SEQUENCE) + BATCH_MAX_N;
    r->pending = batch_in_zalloc(r->n_pending, sizeof *r->pending, "the requests in flight");
    if (!r->pending)
        return FERRY_ERR_NOMEM;
    rc = make_about(r);
    return rc ? rc : ferry_batch_make(r->engine, &r->batch);
}

static int run_other(struct batch_run *r)
{
    int rc = batch_rank_wait_for_hello(r);

    if (!rc)
        rc = open_engine(r);
    if (!rc)
        rc = batch_rank_say_ready(r);
    if (rc)
        return rc;
    stop_watch_batch(r->batch);
    return work_for_first(r);
}

static int run_first(struct batch_run *r)
{
    int rc = batch_in_open(&r->in, r->conf->input);

    r->seq_tok = rc ? 0 : expected_tok(r);
    if (!rc)
        rc = batch_rank_make_held(r);
    if (!rc)
        rc = batch_rank_say_hello(r);
    if (!rc)
        rc = open_engine(r);
    if (!rc)
        rc = open_output(r);
    if (rc)
        return rc;
    stop_watch_batch(r->batch);
    clock_gettime(CLOCK_MONOTONIC, &r->start);
    r->last_json = r->start;
    term_progress_begin(&r->progress, r->conf, "answering", NULL);
    rc = work(r);
    say_end(r);
    return rc;
}

static void close_all(struct batch_run *r)
{
    stop_end();
    for (size_t i = 0; i < r->n_pending && r->pending; i++)
        if (r->pending[i].id && --r->pending[i].group->n_left == 0)
            batch_run_free_group(r->pending[i].group);
    batch_rank_drop_given(r);
    batch_rank_drop_held(r);
    json_decref(r->about);
    ferry_free(r->pending);
    ferry_free(r->profile);
    batch_out_close(&r->out);
    ferry_batch_free(r->batch);
    grammars_done(&r->grammars);
    text_done(&r->grammar_text);
    ferry_engine_close(r->engine);
    batch_in_close(&r->in);
    text_done(&r->line);
}

static int explain(struct batch_run *r)
{
    struct ferry_engine_opts o;
    char *text = NULL;
    int rc = r->conf->input ? batch_in_open(&r->in, r->conf->input) : 0;

    r->seq_tok = rc ? 0 : expected_tok(r);
    if (!rc)
        rc = batch_opts(r, &o);
    if (!rc)
        rc = ferry_batch_explain(r->conf->model, &o, &text);
    if (!rc)
        fputs(text, stdout);
    ferry_free(text);
    ferry_free(r->profile);
    batch_in_close(&r->in);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}

int cmd_batch(const struct conf *conf)
{
    struct batch_run r = {.conf = conf};
    struct conf silent = *conf;

    if (conf->explain)
        return explain(&r);
    if (!conf->input || !conf->output)
        return term_usage(conf, "wants an input and an output: -i IN.jsonl -o OUT.jsonl");
    if (conf->embed && conf->score)
        return term_usage(conf, "--embed and --score ask for different things");
    if (conf->embed && conf->vars.n)
        return term_usage(conf, "--embed knows no --template-var: no template is wrapped around what it reads");
    if ((conf->embed || conf->score) && (conf->grammar || conf->json_schema))
        return term_usage(conf, "--embed and --score make no answers, which a grammar is for");
    if (grammars_conflict(conf))
        return term_usage(conf, grammars_conflict(conf));
    int rc = team_open(&r.team, conf);
    if (r.team.rank) {
        silent.quiet = true; /* rank 0 speaks for all */
        silent.json = false;
        r.conf = &silent;
    }
    stop_begin();
    if (!rc)
        rc = r.team.rank ? run_other(&r) : run_first(&r);
    close_all(&r);
    if (rc && r.team.rank)
        fprintf(stderr, "rank %d: ", r.team.rank);
    int status = rc ? term_fail(rc) : CONF_EXIT_DONE;
    team_close(&r.team, r.is_orderly, status);
    return status;
}
