/* What one sequence says. Grows as tokens come; without memory the one answer fails, not its company. */
#include "src/run/answer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/sample.h"

int answer_init(struct answer *a, const struct answer_rules *rules, const struct tok *tok)
{
    memset(a, 0, sizeof *a);
    a->rules = *rules;
    a->rules.stop = NULL;
    a->rules.n_stop = 0;
    char **stop = mem_zalloc(rules->n_stop, sizeof *stop, MEM_OTHER);
    a->rules.stop = (const char *const *)stop;
    a->text = mem_zalloc(1, 1, MEM_OTHER);
    a->cap_text = 1;
    int rc = stop && a->text ? 0 : err(ERR_NOMEM, "an answer");
    for (; rc == 0 && a->rules.n_stop < rules->n_stop; a->rules.n_stop++) {
        stop[a->rules.n_stop] = mem_strdup(rules->stop[a->rules.n_stop], MEM_OTHER);
        if (!stop[a->rules.n_stop]) {
            rc = err(ERR_NOMEM, "an answer's stop texts");
            break;
        }
    }
    if (rc == 0 && tok) {
        rc = tok_stream_init(&a->stream, tok, 0);
        a->has_text = rc == 0;
    }
    if (rc < 0)
        answer_done(a);
    return rc;
}

void answer_done(struct answer *a)
{
    for (size_t i = 0; i < a->rules.n_stop; i++)
        mem_free((char *)a->rules.stop[i]);
    mem_free((char **)a->rules.stop);
    tok_stream_done(&a->stream);
    mem_free(a->text);
    mem_free(a->token);
    mem_free(a->logprob);
    mem_free(a->top);
    mem_free(a->top_logprob);
    memset(a, 0, sizeof *a);
}

void answer_fail(struct answer *a, int code)
{
    a->end = ANSWER_FAILED;
    a->status = code;
    snprintf(a->error, sizeof a->error, "%s", err_text());
}

static bool grow(void *at, size_t n, size_t item_bytes)
{
    void *p;
    memcpy(&p, at, sizeof p);
    p = mem_realloc(p, n * item_bytes, MEM_OTHER);
    if (p)
        memcpy(at, &p, sizeof p);
    return p != NULL;
}

/* Room for one more token and what is noted of it. */
static int make_room(struct answer *a)
{
    size_t cap = a->cap_tok ? 2 * a->cap_tok : 32, n_top = a->rules.n_top > 0 ? (size_t)a->rules.n_top : 0;

    if (a->n_tok < a->cap_tok)
        return 0;
    bool ok = grow(&a->token, cap, sizeof *a->token);
    if (ok && a->rules.n_top >= 0)
        ok = grow(&a->logprob, cap, sizeof *a->logprob) && grow(&a->top, cap * n_top, sizeof *a->top) &&
             grow(&a->top_logprob, cap * n_top, sizeof *a->top_logprob);
    if (!ok)
        return err(ERR_NOMEM, "an answer of %zu tokens", cap);
    a->cap_tok = cap;
    return 0;
}

static int add_text(struct answer *a, const char *p, int n)
{
    size_t need = a->n_text + (size_t)n + 1;

    if (need > a->cap_text) {
        size_t cap = need < 2 * a->cap_text ? 2 * a->cap_text : need;
        if (!grow(&a->text, cap, 1))
            return err(ERR_NOMEM, "an answer of %zu bytes", cap);
        a->cap_text = cap;
    }
    if (n > 0)
        memcpy(a->text + a->n_text, p, (size_t)n);
    a->n_text += (size_t)n;
    a->text[a->n_text] = '\0';
    return 0;
}

/* The n best tokens, of equals the lower id first. n is small: each candidate is put in its place. */
static void note_top(const struct answer *a, const float *logits, int n_vocab, double log_sum)
{
    int n = a->rules.n_top, n_found = 0;
    int32_t *id = a->top + a->n_tok * (size_t)n;
    float *value = a->top_logprob + a->n_tok * (size_t)n;

    for (int i = 0; i < n_vocab; i++) {
        if (isnan(logits[i]) || (n_found == n && !(logits[i] > logits[id[n - 1]])))
            continue;
        int at = n_found < n ? n_found++ : n - 1;
        for (; at > 0 && logits[i] > logits[id[at - 1]]; at--)
            id[at] = id[at - 1];
        id[at] = i;
    }
    for (int i = 0; i < n; i++) {
        if (i >= n_found)
            id[i] = -1;
        value[i] = i < n_found ? (float)(logits[id[i]] - log_sum) : -INFINITY;
    }
}

static void note(struct answer *a, int32_t token, const float *logits, int n_vocab)
{
    a->token[a->n_tok] = token;
    if (a->rules.n_top >= 0) {
        double log_sum = sample_log_sum(logits, n_vocab);
        a->logprob[a->n_tok] = (float)(logits[token] - log_sum);
        if (a->rules.n_top > 0)
            note_top(a, logits, n_vocab, log_sum);
    }
    a->n_tok++;
}

/* Cut the text where the first of the stop texts begins that ends behind byte `from`. */
static bool cut_at_stop(struct answer *a, size_t from)
{
    char *first = NULL;

    for (size_t i = 0; i < a->rules.n_stop; i++) {
        size_t n = strlen(a->rules.stop[i]), start = from >= n ? from - n + 1 : 0;
        char *p = n ? memmem(a->text + start, a->n_text - start, a->rules.stop[i], n) : NULL;
        if (p && (!first || p < first))
            first = p;
    }
    if (!first)
        return false;
    a->n_text = (size_t)(first - a->text);
    *first = '\0';
    return true;
}

void answer_take(struct answer *a, int32_t token, const float *logits, int n_vocab)
{
    size_t from = a->n_text;

    if (!a->rules.ignore_end && a->has_text && tok_is_eog(a->stream.tok, token)) {
        answer_finish(a, ANSWER_STOP);
        return;
    }
    int rc = make_room(a);
    if (rc == 0) {
        const char *piece = "";
        int n = 0;
        note(a, token, logits, n_vocab);
        rc = a->has_text ? tok_stream_push(&a->stream, token, &piece, &n) : 0;
        if (rc == 0)
            rc = add_text(a, piece, n);
    }
    if (rc < 0)
        answer_fail(a, rc);
    else if (cut_at_stop(a, from))
        a->end = ANSWER_STOP;
    else if (a->rules.max_tok && a->n_tok >= a->rules.max_tok)
        answer_finish(a, ANSWER_LENGTH);
}

void answer_score(struct answer *a, int32_t token, const float *logits, int n_vocab)
{
    int best = 0, rc = make_room(a);

    if (rc < 0) {
        answer_fail(a, rc);
        return;
    }
    for (int i = 1; i < n_vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    a->n_greedy += best == token;
    note(a, token, logits, n_vocab);
}

void answer_finish(struct answer *a, enum answer_end end)
{
    const char *piece = "";
    int n = 0;
    size_t from = a->n_text;

    a->end = end;
    if (a->has_text)
        tok_stream_finish(&a->stream, &piece, &n);
    int rc = add_text(a, piece, n);
    if (rc < 0)
        answer_fail(a, rc);
    else if (n > 0 && cut_at_stop(a, from))
        a->end = ANSWER_STOP;
}
