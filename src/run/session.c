/* One conversation. Invariant between calls: the cache holds the first cache_len(seq) of n_tokens tokens; the rest is pending;
 * `fresh` says that logits belong to the last token, all having been run. */
#include "src/run/session.h"

#include <string.h>

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/batch.h"
#include "src/run/cache.h"
#include "src/run/exec.h"

struct session {
    struct session_args args; /* exec, cache: views; plan and sample not used after make */
    size_t n_ctx, chunk_tok, n_out;
    bool phases_differ;    /* given and drawn tokens are computed differently (DEVICE_PREFILL_BLAS) */
    struct cache_seq *seq; /* own */
    struct sample *sample; /* own */
    struct batch batch;
    int32_t *tokens; /* own: (n_ctx) */
    size_t n_tokens;
    size_t n_drawn_pending; /* of the pending tokens, how many (the first ones) were drawn: 0 or 1 */
    float *logits;          /* own: (n_vocab) of the last token */
    bool fresh;
    struct constraint *constraint; /* held; NULL: any token may come */
    struct constraint_at at;
    size_t answer; /* which token its answer begins with */
    int cancel;    /* written by session_cancel, read by exec */
    struct session_stats stats;
};

int session_make(const struct session_args *args, struct session **out)
{
    *out = NULL;
    struct session *s = mem_zalloc(1, sizeof *s, MEM_META);
    if (!s)
        return err(ERR_NOMEM, "a session");
    s->args = *args;
    s->n_ctx = args->plan->n_ctx;
    s->chunk_tok = args->plan->chunk_tok;
    s->n_out = args->plan->n_out;
    s->phases_differ = args->plan->prefill == DEVICE_PREFILL_BLAS;
    struct sample_opts greedy;
    sample_opts_init(&greedy);
    int rc = sample_make(args->sample ? args->sample : &greedy, args->n_vocab, &s->sample);
    if (rc == 0)
        rc = batch_init(&s->batch, (int)s->chunk_tok, 1);
    if (rc == 0) {
        s->tokens = mem_zalloc(s->n_ctx, sizeof *s->tokens, MEM_META);
        s->logits = mem_zalloc((size_t)args->n_vocab, sizeof *s->logits, MEM_META);
        if (!s->tokens || !s->logits)
            rc = err(ERR_NOMEM, "a session of %zu tokens", s->n_ctx);
    }
    if (rc == 0)
        rc = cache_seq_make(args->cache, &s->seq);
    if (rc < 0) {
        session_free(s);
        return rc;
    }
    s->args.plan = NULL;
    s->args.sample = NULL;
    *out = s;
    return 0;
}

void session_free(struct session *s)
{
    if (!s)
        return;
    cache_seq_free(s->seq);
    mem_free(s->logits);
    mem_free(s->tokens);
    batch_done(&s->batch);
    sample_free(s->sample);
    constraint_drop(s->constraint);
    mem_free(s);
}

static uint64_t weight_bytes(const struct session *s)
{
    struct exec_stats st;
    exec_stats(s->args.exec, &st);
    return st.weight_bytes;
}

/* Run the next n pending tokens in one step, with logits of the last n_logits; of the last one, n_top of the best are enough (batch.h). */
static int run_step(struct session *s, size_t n, size_t n_logits, int n_top, bool prompt, const float **logits)
{
    int64_t pos = cache_len(s->seq);
    int rc = cache_reserve(s->seq, (int64_t)n);
    if (rc < 0)
        return rc;
    uint64_t t0 = clock_ns(), bytes0 = weight_bytes(s);
    batch_clear(&s->batch);
    batch_add(&s->batch, s->seq, s->tokens + pos, (int)n, (int32_t)pos, (int)n_logits, prompt);
    if (n_logits > 0)
        batch_set_top(&s->batch, n_top);
    rc = exec_run(s->args.exec, &s->batch, &s->cancel, logits);
    if (rc < 0)
        return rc;
    cache_commit(s->seq, (int64_t)n);
    uint64_t ns = clock_ns() - t0, bytes = weight_bytes(s) - bytes0;
    *(prompt ? &s->stats.n_prompt : &s->stats.n_generated) += n;
    *(prompt ? &s->stats.prompt_ns : &s->stats.generate_ns) += ns;
    *(prompt ? &s->stats.prompt_weight_bytes : &s->stats.generate_weight_bytes) += bytes;
    s->n_drawn_pending = 0;
    return 0;
}

static size_t n_pending(const struct session *s)
{
    return s->n_tokens - (size_t)cache_len(s->seq);
}

/* A cancel asked for since the last call counts once, and for whatever runs next. */
static bool take_cancel(struct session *s)
{
    return __atomic_exchange_n(&s->cancel, 0, __ATOMIC_RELAXED) != 0;
}

/* What a failed or cancelled run leaves: the tokens that were run, and no logits. */
static int give_up(struct session *s, int rc)
{
    s->n_tokens = (size_t)cache_len(s->seq);
    s->answer = s->answer < s->n_tokens ? s->answer : s->n_tokens;
    s->at.is_known = false;
    s->n_drawn_pending = 0;
    s->fresh = false;
    __atomic_store_n(&s->cancel, 0, __ATOMIC_RELAXED);
    return rc;
}

/* Where recurrent layers forbid to be cut: a prompt's last tokens are a step of their own, before which the length is marked. The next turn
 * may begin there, if no more than this of what asks for an answer is left out of it then (an opened, or an empty, thought); and the last
 * token can be run again, for another answer. */
enum { MARK_TAIL = 4 };

/* How many of n pending tokens the next step may run. */
static size_t before_mark(struct session *s, bool marks, size_t n)
{
    if (!marks || n < MARK_TAIL)
        return n;
    if (n == MARK_TAIL)
        cache_mark(s->seq);
    return n > MARK_TAIL ? n - MARK_TAIL : n;
}

/* Run everything pending and keep the last token's logits; or, with n_top, no more than what exec_row() has of them now. */
static int run_pending(struct session *s, bool prompt, bool marks, int n_top, session_progress *progress, void *arg)
{
    const size_t total = n_pending(s);
    while (n_pending(s) > 0) {
        size_t n = before_mark(s, marks, n_pending(s));
        bool as_prompt = prompt;
        if (s->n_drawn_pending > 0 && (s->phases_differ || n == 1)) {
            n = 1;
            as_prompt = false;
        }
        if (n > s->chunk_tok)
            n = s->chunk_tok;
        bool last = n == n_pending(s);
        const float *logits;
        int rc = run_step(s, n, last ? 1 : 0, n_top, as_prompt, &logits);
        if (rc < 0)
            return give_up(s, rc);
        if (last && n_top == 0)
            memcpy(s->logits, logits, (size_t)s->args.n_vocab * sizeof *s->logits);
        if (progress && !progress(total - n_pending(s), total, arg) && !last)
            return give_up(s, err(ERR_CANCEL, "stopped after %zu of %zu prompt tokens", total - n_pending(s), total));
    }
    s->fresh = n_top == 0;
    return 0;
}

static int add_tokens(struct session *s, const int32_t *tokens, size_t n)
{
    if (n > s->n_ctx - s->n_tokens)
        return err(ERR_LIMIT, "%zu tokens after %zu: the context holds %zu", n, s->n_tokens, s->n_ctx);
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= s->args.n_vocab)
            return err(ERR_ARG, "token %d of a vocabulary of %d", tokens[i], s->args.n_vocab);
    memcpy(s->tokens + s->n_tokens, tokens, n * sizeof *tokens);
    s->n_tokens += n;
    s->fresh = s->fresh && n == 0;
    return 0;
}

int session_append(struct session *s, const int32_t *tokens, size_t n, session_progress *progress, void *arg)
{
    if (take_cancel(s))
        return err(ERR_CANCEL, "stopped before the first of %zu tokens", n);
    int rc = add_tokens(s, tokens, n);
    const bool has_records = cache_has_records(s->args.cache);
    if (rc == 0)
        rc = run_pending(s, true, has_records, 0, progress, arg);
    if (rc == 0 && !has_records)
        cache_mark(s->seq); /* the next turn may begin here: some templates leave out what an answer thought */
    return rc;
}

int session_each_logits(struct session *s, const int32_t *tokens, size_t n, bool prompt, session_take *take, void *arg)
{
    if (take_cancel(s))
        return err(ERR_CANCEL, "stopped before the first of %zu tokens", n);
    int rc = n_pending(s) > 0 ? run_pending(s, true, false, 0, NULL, NULL) : 0;
    if (rc == 0)
        rc = add_tokens(s, tokens, n);
    if (rc < 0)
        return rc;
    const size_t n_vocab = (size_t)s->args.n_vocab,
                 step = prompt ? (s->n_out < s->chunk_tok ? s->n_out : s->chunk_tok) : 1;
    while (n_pending(s) > 0) {
        size_t m = n_pending(s) < step ? n_pending(s) : step;
        const float *logits;
        rc = run_step(s, m, m, 0, prompt, &logits);
        rc = rc < 0 ? rc : take(logits, m, arg);
        if (rc < 0)
            return give_up(s, rc);
        if (n_pending(s) == 0) {
            memcpy(s->logits, logits + (m - 1) * n_vocab, n_vocab * sizeof *s->logits);
            s->fresh = true;
        }
    }
    return 0;
}

struct copy {
    float *to;
    size_t n_vocab;
};

static int copy_rows(const float *rows, size_t n_rows, void *arg)
{
    struct copy *c = arg;

    memcpy(c->to, rows, n_rows * c->n_vocab * sizeof *rows);
    c->to += n_rows * c->n_vocab;
    return 0;
}

int session_logits(struct session *s, const int32_t *tokens, size_t n, bool prompt, float *out)
{
    return session_each_logits(s, tokens, n, prompt, copy_rows, &(struct copy){out, (size_t)s->args.n_vocab});
}

static int follow(struct session *s)
{
    return constraint_follow(s->constraint, &s->at, s->tokens + s->answer, s->n_tokens - s->answer);
}

static int draw(struct session *s, const struct sample_row *row, int32_t *token)
{
    struct constraint_view view = {s->constraint, &s->at};
    struct sample_filter filter = constraint_filter(&view);

    if (!s->constraint)
        return sample_draw_row(s->sample, row, s->tokens, (int64_t)s->n_tokens, token);
    int rc = follow(s);
    return rc ? rc : sample_draw_allowed(s->sample, row, &filter, s->tokens, (int64_t)s->n_tokens, token);
}

/* How many of the best logits settle the next draw; 0: it wants all. Where nothing can be drawn they are kept, not run again each time. */
static int n_top_of(const struct session *s)
{
    return s->n_tokens < s->n_ctx && !s->constraint ? sample_n_top(s->sample, (int64_t)s->n_tokens) : 0;
}

int session_step(struct session *s, int32_t *token)
{
    struct sample_row row = {.n = s->args.n_vocab, .logit = s->logits};

    if (s->n_tokens == 0)
        return err(ERR_STATE, "nothing to continue: the session is empty");
    if (take_cancel(s))
        return err(ERR_CANCEL, "stopped before token %zu", s->n_tokens);
    if (!s->fresh) {
        if (n_pending(s) == 0) /* run, but its logits are gone: run the last one again */
            cache_truncate(s->seq, (int64_t)s->n_tokens - 1);
        int n_top = n_top_of(s);
        int rc = run_pending(s, true, false, n_top, NULL, NULL);
        if (rc < 0)
            return rc;
        if (n_top > 0)
            exec_row(s->args.exec, 0, &row);
    }
    if (s->n_tokens == s->n_ctx)
        return err(ERR_LIMIT, "the context is full: %zu tokens", s->n_ctx);
    int rc = draw(s, &row, token);
    if (rc < 0)
        return rc;
    s->tokens[s->n_tokens++] = *token;
    s->n_drawn_pending = 1;
    s->fresh = false;
    return 0;
}

size_t session_n_tokens(const struct session *s)
{
    return s->n_tokens;
}

const int32_t *session_tokens(const struct session *s)
{
    return s->tokens;
}

int session_truncate(struct session *s, size_t n)
{
    if (n > s->n_tokens)
        return err(ERR_ARG, "cannot keep %zu of %zu tokens", n, s->n_tokens);
    if (n == s->n_tokens)
        return 0;
    if ((int64_t)n < cache_len(s->seq))
        cache_truncate(s->seq, (int64_t)n);
    s->n_tokens = n;
    s->n_drawn_pending = 0;
    s->fresh = false;
    if (n < s->answer)
        s->answer = n;
    s->at.is_known = false;
    return 0;
}

int session_fork(const struct session *s, struct session **out)
{
    *out = NULL;
    struct session *f = mem_zalloc(1, sizeof *f, MEM_META);
    if (!f)
        return err(ERR_NOMEM, "a session");
    *f = *s;
    f->seq = NULL;
    f->sample = NULL;
    f->tokens = NULL;
    f->logits = NULL;
    f->constraint = constraint_hold(s->constraint);
    f->cancel = 0;
    memset(&f->batch, 0, sizeof f->batch);
    memset(&f->stats, 0, sizeof f->stats);
    int rc = batch_init(&f->batch, s->batch.cap_rows, s->batch.cap_seqs);
    if (rc == 0) {
        f->tokens = mem_zalloc(s->n_ctx, sizeof *f->tokens, MEM_META);
        f->logits = mem_zalloc((size_t)s->args.n_vocab, sizeof *f->logits, MEM_META);
        if (!f->tokens || !f->logits)
            rc = err(ERR_NOMEM, "a session of %zu tokens", s->n_ctx);
    }
    if (rc == 0)
        rc = sample_copy(s->sample, &f->sample);
    if (rc == 0)
        rc = cache_fork(s->seq, &f->seq);
    if (rc < 0) {
        session_free(f);
        return rc;
    }
    memcpy(f->tokens, s->tokens, s->n_tokens * sizeof *f->tokens);
    memcpy(f->logits, s->logits, (size_t)s->args.n_vocab * sizeof *f->logits);
    *out = f;
    return 0;
}

int session_sample(struct session *s, const struct sample_opts *opts)
{
    return sample_reset(s->sample, opts);
}

void session_constrain(struct session *s, struct constraint *c, enum constraint_thought thought)
{
    constraint_hold(c);
    constraint_drop(s->constraint);
    s->constraint = c;
    s->at = (struct constraint_at){.thought = thought};
    s->answer = s->n_tokens;
}

int session_is_whole(struct session *s, bool *out)
{
    int rc = s->constraint ? follow(s) : 0;

    *out = !rc && s->constraint && constraint_is_done(s->constraint, &s->at);
    return rc;
}

void session_cancel(struct session *s)
{
    __atomic_store_n(&s->cancel, 1, __ATOMIC_RELAXED);
}

void session_stats(const struct session *s, struct session_stats *out)
{
    *out = s->stats;
}
