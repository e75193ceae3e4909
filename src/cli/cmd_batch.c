/* ferry batch: many prompts, answered together, into a file that survives whatever ends the run. */
#include "src/cli/cmd.h"

#include "src/cli/batch_in.h"
#include "src/cli/batch_line.h"
#include "src/cli/batch_out.h"
#include "src/cli/batch_record.h"
#include "src/cli/profile.h"
#include "src/cli/stop.h"
#include "src/cli/talk.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* Requests that wait beside those that run: enough to find equal beginnings, few enough to take no memory. */
enum { WAITING_PER_SEQUENCE = 2 };

/* A line of which answers are on their way. */
struct group {
    struct batch_line line; /* own */
    unsigned n_left;
    json_t *choices; /* own: of the OpenAI form, by index */
    uint64_t n_prompt, n_completion;
    int failed; /* code of an answer that failed */
    char error[256];
};

struct pending {
    uint64_t id; /* 0: free */
    struct group *group;
    unsigned index;
};

struct run {
    const struct conf *conf;     /* view */
    struct ferry_engine *engine; /* own, as all below */
    struct ferry_batch *batch;
    struct ferry_info info;
    struct batch_in in;
    struct batch_out out;
    struct text line;
    struct pending *pending; /* (n_pending) */
    char *profile;           /* path of what ferry probe saved; NULL: nothing */
    size_t n_pending, n_flying;
    bool no_more;                     /* the input is at its end */
    uint64_t n_read, n_expected;      /* lines read; records that they give */
    uint64_t n_had;                   /* records of earlier runs */
    uint64_t n_failed;                /* records that say why there is no answer */
    struct timespec start, last_json; /* of the work, the model loaded */
    struct term_progress progress;
};

static double since(const struct timespec *t)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)(now.tv_sec - t->tv_sec) + (double)(now.tv_nsec - t->tv_nsec) * 1e-9;
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

static struct state state_of(const struct run *r)
{
    struct ferry_batch_stats st;
    double s = since(&r->start);
    struct state out = {.done = r->out.n_done, .total = r->n_expected + (r->in.n_requests - r->n_read), .left_s = -1};

    ferry_batch_stats(r->batch, &st);
    if (s > 0)
        out.tokens_per_s = (double)(makes_answers(r->conf) ? st.n_generated : st.n_prompt) / s;
    if (out.done > r->n_had)
        out.left_s = s * (double)(out.total - out.done) / (double)(out.done - r->n_had);
    return out;
}

static void say_json(struct run *r, bool end)
{
    struct ferry_batch_stats st;
    struct state s = state_of(r);

    if (!end && since(&r->last_json) < 1)
        return;
    clock_gettime(CLOCK_MONOTONIC, &r->last_json);
    ferry_batch_stats(r->batch, &st);
    json_t *o = json_pack("{s:I, s:I, s:I, s:f, s:i, s:I, s:I, s:I, s:I, s:I, s:b}", "done", (json_int_t)s.done,
                          "total", (json_int_t)s.total, "failed", (json_int_t)r->n_failed, "tokens_per_s",
                          s.tokens_per_s, "running", (int)st.n_running, "prompt_tokens", (json_int_t)st.n_prompt,
                          "shared_tokens", (json_int_t)st.n_shared, "generated_tokens", (json_int_t)st.n_generated,
                          "preempted", (json_int_t)st.n_preempted, "rerun_tokens", (json_int_t)st.n_rerun, "end", end);
    json_object_set_new(o, "seconds_left", s.left_s >= 0 ? json_real(s.left_s) : json_null());
    json_dumpf(o, stderr, JSON_COMPACT | JSON_REAL_PRECISION(6));
    fputc('\n', stderr);
    json_decref(o);
}

static void say_progress(struct run *r)
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

static void say_end(struct run *r)
{
    struct ferry_batch_stats st;
    struct state s = state_of(r);

    if (r->conf->json) {
        say_json(r, true);
        return;
    }
    term_progress_end(&r->progress);
    if (r->conf->quiet)
        return;
    ferry_batch_stats(r->batch, &st);
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
    fputs("]\n", stderr);
}

/* ---- records ---- */

static int write_record(struct run *r, struct batch_key key, json_t *record)
{
    size_t n;
    char *text;
    int rc = batch_record_text(record, &text, &n);

    if (!rc)
        rc = batch_out_add(&r->out, key, text, n);

    json_decref(record);
    ferry_free(text);
    return rc;
}

/* A line, or one of its answers, that has none: said in the output, and the run goes on. */
static int write_error(struct run *r, const struct batch_line *line, unsigned index, int code, const char *text)
{
    struct batch_key key = {line->number, line->form == BATCH_OPENAI ? 0 : index};

    r->n_failed++;
    return write_record(r, key, batch_record_error(line, key.index, code, text));
}

static void free_group(struct group *g)
{
    if (!g)
        return;
    json_decref(g->choices);
    batch_line_done(&g->line);
    ferry_free(g);
}

static int finish_openai(struct run *r, struct group *g, const struct ferry_answer *last)
{
    if (g->failed == FERRY_ERR_CANCEL) /* dropped: a resumed run answers it */
        return 0;
    if (g->failed)
        return write_error(r, &g->line, 0, g->failed, g->error);
    return write_record(r, (struct batch_key){g->line.number, 0},
                        batch_record_openai(&g->line, r->conf, r->info.name, json_incref(g->choices), g->n_prompt,
                                            g->n_completion, batch_record_stats(&g->line, 0, last)));
}

static int take_answer(struct run *r, struct group *g, unsigned index, const struct ferry_answer *a)
{
    bool is_openai = g->line.form == BATCH_OPENAI;
    int rc = 0;

    g->n_left--;
    g->n_prompt = r->conf->embed ? g->n_prompt + a->n_prompt : a->n_prompt; /* each input is one of its own */
    g->n_completion += r->conf->score ? 0 : a->n_tokens;
    if (a->finish == FERRY_FINISH_FAILED && is_openai) {
        g->failed = a->status;
        snprintf(g->error, sizeof g->error, "%s", a->error);
    } else if (a->finish == FERRY_FINISH_FAILED) {
        rc = write_error(r, &g->line, index, a->status, a->error);
    } else {
        json_t *part = batch_record_answer(&g->line, r->conf, r->engine, a, index);
        if (is_openai)
            json_array_set_new(g->choices, index, part);
        else
            rc = write_record(r, (struct batch_key){g->line.number, index}, part);
    }
    return rc || g->n_left || !is_openai ? rc : finish_openai(r, g, a);
}

/* ---- requests ---- */

static int submit_one(struct run *r, struct group *g, const int32_t *tokens, size_t n_tokens, size_t n_scored,
                      unsigned index)
{
    struct ferry_sample_opts sample = g->line.sample;
    struct ferry_request q;
    struct pending *p = r->pending;

    sample.seed = batch_line_seed(&g->line, r->conf, index);
    ferry_request_init(&q);
    q.tokens = tokens;
    q.n_tokens = n_tokens;
    q.n_scored = n_scored;
    q.max_tokens = g->line.max_tokens;
    q.ignore_eos = g->line.ignore_eos;
    q.stop = g->line.stop;
    q.n_stop = g->line.n_stop;
    q.logprobs = g->line.logprobs;
    q.sample = &sample;
    if (r->conf->embed)
        q.pooling = !strcmp(r->conf->embed, "mean") ? FERRY_POOLING_MEAN : FERRY_POOLING_LAST;
    q.normalize = !strcmp(r->conf->normalize, "l2");
    while (p->id)
        p++;
    int rc = ferry_batch_submit(r->batch, &q, &p->id);
    if (rc) {
        p->id = 0;
        return rc;
    }
    p->group = g;
    p->index = index;
    g->n_left++;
    r->n_flying++;
    return 0;
}

static bool wants(const struct run *r, const struct batch_line *line, unsigned index)
{
    return !batch_out_has(&r->out, (struct batch_key){line->number, line->form == BATCH_OPENAI ? 0 : index});
}

static int submit_answers(struct run *r, struct group *g)
{
    int32_t *tokens = NULL;
    size_t n_tokens, n_scored;
    int rc = batch_line_tokens(&g->line, r->conf, r->engine, &tokens, &n_tokens, &n_scored);

    for (unsigned i = 0; i < g->line.n && !rc; i++)
        if (wants(r, &g->line, i))
            rc = submit_one(r, g, tokens, n_tokens, n_scored, i);
    ferry_free(tokens);
    return rc;
}

static int submit_inputs(struct run *r, struct group *g)
{
    int rc = 0;

    for (unsigned i = 0; i < g->line.n && !rc; i++) {
        int32_t *tokens = NULL;
        size_t n_tokens;
        if (!wants(r, &g->line, i))
            continue;
        rc = batch_line_input(&g->line, r->engine, i, &tokens, &n_tokens);
        if (!rc)
            rc = submit_one(r, g, tokens, n_tokens, 0, i);
        ferry_free(tokens);
    }
    return rc;
}

/* Submit the answers of a line that are not there yet. On failure those that were submitted are dropped again. */
static int submit_line(struct run *r, struct group *g)
{
    int rc = r->conf->embed ? submit_inputs(r, g) : submit_answers(r, g);

    for (size_t i = 0; i < r->n_pending && rc; i++)
        if (r->pending[i].id && r->pending[i].group == g) {
            ferry_batch_cancel(r->batch, r->pending[i].id);
            r->pending[i].id = 0;
            r->n_flying--;
        }
    return rc;
}

static bool wants_any(const struct run *r, const struct batch_line *line)
{
    for (unsigned i = 0; i < line->n; i++)
        if (wants(r, line, i))
            return true;
    return false;
}

/* Is this the line's fault, or does it stop the run? */
static bool is_of_line(int rc)
{
    return rc == FERRY_ERR_FORMAT || rc == FERRY_ERR_ARG || rc == FERRY_ERR_LIMIT || rc == FERRY_ERR_UNSUPPORTED;
}

/* Records with the text of the error for each answer of the line that is not there. */
static int refuse_line(struct run *r, const struct batch_line *line, int code)
{
    char text[1024];
    int rc = 0;

    snprintf(text, sizeof text, "%s", ferry_error());
    for (unsigned i = 0; i < batch_record_count(line) && !rc; i++)
        if (wants(r, line, i))
            rc = write_error(r, line, i, code, text);
    return rc;
}

static int take_line(struct run *r)
{
    struct group *g = batch_in_zalloc(1, sizeof *g, "a line of the input");
    if (!g)
        return FERRY_ERR_NOMEM;
    int bad = batch_line_read(r->conf, text_str(&r->line), r->line.n_bytes, r->in.number, &g->line);
    if (bad)
        g->line.n = 1; /* what it asked for is not known */
    r->n_read++;
    r->n_expected += batch_record_count(&g->line);
    int rc = 0;
    if (bad)
        rc = is_of_line(bad) ? refuse_line(r, &g->line, bad) : bad;
    if (!rc)
        rc = batch_out_expect(&r->out, g->line.number, batch_record_count(&g->line));
    if (rc || bad || !wants_any(r, &g->line)) {
        free_group(g);
        return rc;
    }
    g->choices = g->line.form == BATCH_OPENAI ? json_array() : NULL;
    for (unsigned i = 0; g->choices && i < g->line.n; i++)
        json_array_append_new(g->choices, json_null());
    rc = submit_line(r, g);
    if (rc && is_of_line(rc))
        rc = refuse_line(r, &g->line, rc);
    if (rc || !g->n_left)
        free_group(g);
    return rc;
}

/* Read on while there is room for all that one line may ask. */
static int read_on(struct run *r)
{
    int rc = 0;

    while (!rc && !r->no_more && r->n_flying + BATCH_MAX_N <= r->n_pending) {
        bool more;
        rc = batch_in_next(&r->in, &r->line, &more);
        r->no_more = !more;
        if (!rc && more)
            rc = take_line(r);
    }
    return rc;
}

/* ---- the whole ---- */

static int poll(struct run *r)
{
    struct ferry_answer *a = NULL;
    struct pending *p = r->pending;
    int rc = ferry_batch_poll(r->batch, &a);

    if (rc || !a)
        return rc;
    while (p->id != a->id)
        p++;
    p->id = 0;
    r->n_flying--;
    rc = take_answer(r, p->group, p->index, a);
    if (!p->group->n_left)
        free_group(p->group);
    ferry_answer_free(a);
    return rc;
}

/* What waits is dropped; what runs is finished. */
static void drop_waiting(struct run *r)
{
    for (size_t i = 0; i < r->n_pending; i++) {
        struct pending *p = &r->pending[i];
        if (!p->id || ferry_batch_is_running(r->batch, p->id) || ferry_batch_cancel(r->batch, p->id))
            continue;
        p->id = 0;
        r->n_flying--;
        p->group->failed = FERRY_ERR_CANCEL;
        if (--p->group->n_left == 0)
            free_group(p->group);
    }
}

static int work(struct run *r)
{
    bool stopping = false;
    int rc = 0;

    while (!rc) {
        if (stop_asked() && !stopping) {
            stopping = true;
            drop_waiting(r);
            if (!r->conf->quiet && r->n_flying)
                fprintf(stderr, "\nferry: finishing %zu answers; once more to stop at once\n", r->n_flying);
        }
        if (!stopping)
            rc = read_on(r);
        if (rc || (!r->n_flying && (r->no_more || stopping)))
            break;
        rc = poll(r);
        say_progress(r);
    }
    int sync = batch_out_sync(&r->out);
    return rc ? rc : sync ? sync : stopping ? FERRY_ERR_CANCEL : 0;
}

/* What an answer depends on: a run that differs in it is another run. */
static json_t *about(const struct run *r)
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
        (int)r->info.n_ctx, "kv-type", c->kv_type ? c->kv_type : "f16", "prefill", c->prefill ? c->prefill : "int",
        "order", c->order, "score", c->score, "embed", c->embed ? c->embed : "none", "normalize", c->normalize);
    return json_pack("{s:{s:I, s:I, s:s}, s:{s:s, s:s}, s:o}", "input", "bytes", (json_int_t)r->in.n_bytes, "lines",
                     (json_int_t)r->in.n_lines, "hash", hash, "model", "name", r->info.name, "identity", identity,
                     "options", options);
}

static int open_output(struct run *r)
{
    json_t *o = about(r);
    int rc = batch_out_open(&r->out, r->conf, o, r->in.n_lines);

    json_decref(o);
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
static uint32_t expected_tok(const struct run *r)
{
    enum { ANSWER_TOK = 256, LEAST_TOK = 64 };
    uint64_t line_bytes = r->in.n_requests ? r->in.n_bytes / r->in.n_requests : 0;
    uint64_t answer_tok = !makes_answers(r->conf) ? 0 : r->conf->n_tokens ? r->conf->n_tokens : ANSWER_TOK;
    uint64_t n = line_bytes / 4 + answer_tok;

    return n < LEAST_TOK ? LEAST_TOK : n < UINT32_MAX / 2 ? (uint32_t)n : UINT32_MAX / 2;
}

/* The engine's options, with the rates that ferry probe saved; r->profile holds their path. */
static int batch_opts(struct run *r, struct ferry_engine_opts *o)
{
    int rc = profile_path(r->conf, &r->profile);

    if (rc)
        return rc;
    *o = talk_engine_opts(r->conf, r->conf->n_ctx, 0, &r->progress);
    o->n_batch = r->conf->n_sequences ? r->conf->n_sequences : FERRY_BATCH_AUTO;
    o->batch_tok = expected_tok(r);
    o->profile_path = r->profile;
    return 0;
}

static int open_engine(struct run *r)
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
    r->n_pending = (size_t)r->info.n_batch * (1 + WAITING_PER_SEQUENCE) + BATCH_MAX_N;
    r->pending = batch_in_zalloc(r->n_pending, sizeof *r->pending, "the requests in flight");
    return r->pending ? ferry_batch_make(r->engine, &r->batch) : FERRY_ERR_NOMEM;
}

static int run_all(struct run *r)
{
    int rc = batch_in_open(&r->in, r->conf->input);

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

static void close_all(struct run *r)
{
    stop_end();
    for (size_t i = 0; i < r->n_pending && r->pending; i++)
        if (r->pending[i].id && --r->pending[i].group->n_left == 0)
            free_group(r->pending[i].group);
    ferry_free(r->pending);
    ferry_free(r->profile);
    batch_out_close(&r->out);
    ferry_batch_free(r->batch);
    ferry_engine_close(r->engine);
    batch_in_close(&r->in);
    text_done(&r->line);
}

static int explain(struct run *r)
{
    struct ferry_engine_opts o;
    char *text = NULL;
    int rc = r->conf->input ? batch_in_open(&r->in, r->conf->input) : 0;

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
    struct run r = {.conf = conf};

    if (conf->explain)
        return explain(&r);
    if (!conf->input || !conf->output)
        return term_usage(conf, "wants an input and an output: -i IN.jsonl -o OUT.jsonl");
    if (conf->embed && conf->score)
        return term_usage(conf, "--embed and --score ask for different things");
    stop_begin();
    int rc = run_all(&r);
    close_all(&r);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
