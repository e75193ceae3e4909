/* Owns the way from a line to its records. */
#include "src/cli/batch_run.h"

#include "src/cli/batch_record.h"

#include <stdio.h>
#include <string.h>

/* ---- records ---- */

/* A message of this rank to rank 0, with its counters. */
int batch_run_tell(struct batch_run *r, struct team_head *head, const char *text, size_t n_bytes)
{
    if (r->batch)
        ferry_batch_stats(r->batch, &head->stats);
    return team_send(&r->team, 0, head, text, n_bytes);
}

static int write_record(struct batch_run *r, struct batch_key key, json_t *record, bool is_error)
{
    size_t n;
    char *text;
    int rc = batch_record_text(record, &text, &n);

    if (!rc && r->team.rank)
        rc = batch_run_tell(
            r, &(struct team_head){.kind = TEAM_RECORD, .number = key.line, .index = key.index, .bits = is_error}, text,
            n);
    else if (!rc)
        rc = batch_out_add(&r->out, key, text, n);
    r->n_failed += !rc && is_error;

    json_decref(record);
    ferry_free(text);
    return rc;
}

/* A line, or one of its answers, that has none: said in the output, and the run goes on. */
static int write_error(struct batch_run *r, const struct batch_line *line, unsigned index, int code, const char *text)
{
    struct batch_key key = {line->number, line->form == BATCH_OPENAI ? 0 : index};

    return write_record(r, key, batch_record_error(line, key.index, code, text), true);
}

void batch_run_free_group(struct batch_group *g)
{
    if (!g)
        return;
    json_decref(g->choices);
    batch_line_done(&g->line);
    ferry_free(g);
}

static int finish_openai(struct batch_run *r, struct batch_group *g, const struct ferry_answer *last)
{
    if (g->failed == FERRY_ERR_CANCEL) /* dropped: a resumed run answers it */
        return 0;
    if (g->failed)
        return write_error(r, &g->line, 0, g->failed, g->error);
    return write_record(r, (struct batch_key){g->line.number, 0},
                        batch_record_openai(&g->line, r->conf, r->info.name, json_incref(g->choices), g->n_prompt,
                                            g->n_completion, batch_record_stats(&g->line, 0, last)),
                        false);
}

static int take_answer(struct batch_run *r, struct batch_group *g, unsigned index, const struct ferry_answer *a)
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
            rc = write_record(r, (struct batch_key){g->line.number, index}, part, false);
    }
    return rc || g->n_left || !is_openai ? rc : finish_openai(r, g, a);
}

/* ---- requests ---- */

static int submit_one(struct batch_run *r, struct batch_group *g, const int32_t *tokens, size_t n_tokens,
                      size_t n_scored, unsigned index)
{
    const struct grammars_wish *wish = g->line.has_wish ? &g->line.wish : &r->wish;
    struct ferry_sample_opts sample = g->line.sample;
    struct ferry_request q;
    struct batch_pending *p = r->pending;

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
    q.thought = g->line.thought;
    if (r->conf->embed)
        q.pooling = !strcmp(r->conf->embed, "mean") ? FERRY_POOLING_MEAN : FERRY_POOLING_LAST;
    q.normalize = !strcmp(r->conf->normalize, "l2");
    while (p->id)
        p++;
    int rc = grammars_get(&r->grammars, r->engine, wish, &q.grammar);
    if (!rc)
        rc = ferry_batch_submit(r->batch, &q, &p->id);
    if (rc) {
        p->id = 0;
        return rc;
    }
    p->group = g;
    p->index = index;
    g->n_left++;
    g->n_submitted++;
    r->n_flying++;
    return 0;
}

static bool wants(const struct batch_run *r, const struct batch_line *line, unsigned index)
{
    return !(r->there >> (line->form == BATCH_OPENAI ? 0 : index) & 1);
}

static int submit_answers(struct batch_run *r, struct batch_group *g)
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

static int submit_inputs(struct batch_run *r, struct batch_group *g)
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

/* Drop what was submitted of a group; the group stays. */
void batch_run_withdraw(struct batch_run *r, struct batch_group *g)
{
    for (size_t i = 0; i < r->n_pending; i++)
        if (r->pending[i].id && r->pending[i].group == g) {
            ferry_batch_cancel(r->batch, r->pending[i].id);
            r->pending[i].id = 0;
            r->n_flying--;
            g->n_left--;
            g->n_submitted--;
        }
}

/* Submit the answers of a line that are not there yet. On failure those that were submitted are dropped again. */
static int submit_line(struct batch_run *r, struct batch_group *g)
{
    int rc = r->conf->embed ? submit_inputs(r, g) : submit_answers(r, g);

    if (rc)
        batch_run_withdraw(r, g);
    return rc;
}

static bool wants_any(const struct batch_run *r, const struct batch_line *line)
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
static int refuse_line(struct batch_run *r, const struct batch_line *line, int code)
{
    char text[1024];
    int rc = 0;

    snprintf(text, sizeof text, "%s", ferry_error());
    for (unsigned i = 0; i < batch_record_count(line) && !rc; i++)
        if (wants(r, line, i))
            rc = write_error(r, line, i, code, text);
    return rc;
}

/* What a line is that has just been read, or comes back from a rank that is lost; or a record that says what is wrong with it. *g NULL:
 * nothing is left to do. */
int batch_run_open_line(struct batch_run *r, const char *text, size_t n_bytes, uint64_t number, struct batch_group **g)
{
    *g = batch_in_zalloc(1, sizeof **g, "a line of the input");
    if (!*g)
        return FERRY_ERR_NOMEM;
    int rc = 0, bad = batch_line_read(r->conf, text, n_bytes, number, &(*g)->line);
    if (bad)
        (*g)->line.n = 1; /* what it asked for is not known */
    if (bad)
        rc = is_of_line(bad) ? refuse_line(r, &(*g)->line, bad) : bad;
    if (!r->team.rank && !rc && number > r->out.n_read) {
        r->n_read++;
        r->n_expected += batch_record_count(&(*g)->line);
        rc = batch_out_expect(&r->out, number, batch_record_count(&(*g)->line));
    }
    if (rc || bad || !wants_any(r, &(*g)->line)) {
        batch_run_free_group(*g);
        *g = NULL;
    }
    return rc;
}

/* Answer it here. Takes the group. */
int batch_run_begin_line(struct batch_run *r, struct batch_group *g)
{
    g->choices = g->line.form == BATCH_OPENAI ? json_array() : NULL;
    for (unsigned i = 0; g->choices && i < g->line.n; i++)
        json_array_append_new(g->choices, json_null());
    int rc = submit_line(r, g);
    if (rc && is_of_line(rc))
        rc = refuse_line(r, &g->line, rc);
    if (rc || !g->n_left)
        batch_run_free_group(g);
    return rc;
}

/* Is there room for all that one line may ask? */
bool batch_run_has_room(const struct batch_run *r)
{
    return r->n_flying + BATCH_MAX_N <= r->n_pending;
}

int batch_run_poll(struct batch_run *r)
{
    struct ferry_answer *a = NULL;
    struct batch_pending *p = r->pending;
    int rc = ferry_batch_poll(r->batch, &a);

    if (rc || !a)
        return rc;
    while (p->id != a->id)
        p++;
    p->id = 0;
    r->n_flying--;
    rc = take_answer(r, p->group, p->index, a);
    if (!p->group->n_left)
        batch_run_free_group(p->group);
    ferry_answer_free(a);
    return rc;
}

/* What waits is dropped; what runs is finished, and what is finished gets its record. */
void batch_run_drop_waiting(struct batch_run *r)
{
    for (size_t i = 0; i < r->n_pending; i++) {
        struct batch_pending *p = &r->pending[i];
        if (!p->id || ferry_batch_has_begun(r->batch, p->id) || ferry_batch_cancel(r->batch, p->id))
            continue;
        p->id = 0;
        r->n_flying--;
        p->group->failed = FERRY_ERR_CANCEL;
        if (--p->group->n_left == 0)
            batch_run_free_group(p->group);
    }
}
