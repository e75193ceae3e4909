/* Many prompts answered together. Every job is in one place: the list of those who wait (oldest first), the array of those who
 * run (oldest first), or the list of those who are done. Between steps a running job has cache_len(seq) tokens run, of n_tok;
 * what is missing is run next, and where nothing is missing but one token, that one is a decode row. */
#include "src/run/jobs.h"

#include <string.h>

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/batch.h"
#include "src/run/cache.h"
#include "src/run/cache_back.h"
#include "src/run/exec.h"
#include "src/run/prefix.h"
#include "src/run/sched.h"
#include "src/run/spill.h"

/* Hidden states are taken from the executor by so many rows: enough that a GPU's copies are not many small ones. */
enum { HIDDEN_ROWS = 64 };

struct job {
    struct prefix_user user; /* first: a user is found again as its job */
    struct job *next;        /* view: in its list */
    uint64_t id;
    int32_t *token; /* own: (cap_tok) given, then drawn */
    size_t n_tok, n_given, n_scored, cap_tok;
    struct sample_state sample;
    struct answer answer;
    struct constraint *constraint; /* held; NULL: none */
    struct constraint_at at;
    struct embed embed;
    bool normalize;
    int64_t stop_at;        /* somebody waits there for the pages; 0: nowhere */
    int64_t most_run;       /* how far it came before it gave its pages back */
    struct spilled spilled; /* its pages, meanwhile; dropped with the spill, which outlives no job */
    size_t n_shared;
    uint32_t n_preempted;
    uint64_t submit_ns, start_ns, end_ns;
};

struct job_list {
    struct job *first, **last; /* view; last: where the next one is hung in */
};

struct jobs {
    struct jobs_args args; /* views; plan not used after open */
    int n_most;            /* jobs that run at once */
    int64_t n_ctx;
    struct sched_limits limits;
    struct prefix *prefix; /* own, as all below */
    struct spill *spill;   /* NULL: who gives its pages back is run again */
    struct sample *sample; /* one scratch for all; states are with the jobs */
    struct batch batch;
    struct job **running;    /* (n_most) oldest first */
    struct sched_seq *turns; /* (n_most) of the running */
    int n_running;
    struct job_list waiting, finished;
    uint64_t rows_ns; /* what the rows of all steps took, without what pages took that were spilled */
    float *hidden;    /* own: (HIDDEN_ROWS, n_embd); NULL: nobody wanted an embedding yet */
    uint64_t last_id;
    int cancel; /* written by jobs_interrupt, read by exec */
    struct jobs_stats stats;
};

/* ---- lists ---- */

static void push(struct job_list *list, struct job *job)
{
    job->next = NULL;
    *list->last = job;
    list->last = &job->next;
}

static void push_front(struct job_list *list, struct job *job)
{
    job->next = list->first;
    if (!list->first)
        list->last = &job->next;
    list->first = job;
}

/* Take out the one that *at points to. */
static struct job *take(struct job_list *list, struct job **at)
{
    struct job *job = *at;
    *at = job->next;
    if (!*at)
        list->last = at;
    job->next = NULL;
    return job;
}

static struct job *take_id(struct job_list *list, uint64_t id)
{
    for (struct job **at = &list->first; *at; at = &(*at)->next)
        if ((*at)->id == id)
            return take(list, at);
    return NULL;
}

void jobs_free(struct job *job)
{
    if (!job)
        return;
    embed_done(&job->embed);
    answer_done(&job->answer);
    constraint_drop(job->constraint);
    mem_free(job->token);
    mem_free(job);
}

/* ---- open and close ---- */

static int least(int a, int b)
{
    return a < b ? a : b;
}

static int open_spill(struct jobs *j, const struct jobs_args *args, const struct plan *plan)
{
    if (!cache_can_shorten(args->cache))
        return err(ERR_UNSUPPORTED, "pages of a model with %s cannot be spilled",
                   cache_has_records(args->cache) ? "recurrent layers" : "sliding windows");
    j->args.spill_dir = NULL;
    return spill_open(&(struct spill_args){.dir = args->spill_dir, .cache = args->cache, .chunk_tok = plan->chunk_tok},
                      &j->spill);
}

int jobs_open(const struct jobs_args *args, struct jobs **out)
{
    const struct plan *plan = args->plan;
    struct sample_opts greedy;

    *out = NULL;
    struct jobs *j = mem_zalloc(1, sizeof *j, MEM_META);
    if (!j)
        return err(ERR_NOMEM, "a batch of prompts");
    j->args = *args;
    j->args.plan = NULL;
    j->args.clock = args->clock ? args->clock : clock_ns;
    ways_init(&j->stats.ways, plan);
    j->n_ctx = plan->n_ctx;
    j->n_most = least(least((int)plan->n_seq, (int)plan->n_out), (int)plan->chunk_tok);
    j->limits = (struct sched_limits){(int)plan->chunk_tok, (int)plan->chunk_tok - j->n_most, (int)plan->n_out};
    if (j->limits.chunk_tok < 1)
        j->limits.chunk_tok = 1;
    j->waiting.last = &j->waiting.first;
    j->finished.last = &j->finished.first;
    sample_opts_init(&greedy);
    int rc = prefix_open(args->cache, &j->prefix);
    if (rc == 0 && args->spill_dir)
        rc = open_spill(j, args, plan);
    if (rc == 0)
        rc = sample_make(&greedy, args->n_vocab, &j->sample);
    if (rc == 0)
        rc = batch_init(&j->batch, (int)plan->chunk_tok, j->n_most);
    if (rc == 0) {
        j->running = mem_zalloc((size_t)j->n_most, sizeof *j->running, MEM_META);
        j->turns = mem_zalloc((size_t)j->n_most, sizeof *j->turns, MEM_META);
        if (!j->running || !j->turns)
            rc = err(ERR_NOMEM, "a batch of %d prompts", j->n_most);
    }
    if (rc < 0) {
        jobs_close(j);
        return rc;
    }
    *out = j;
    return 0;
}

/* Of a job that has not begun, or waits to go on. */
static void free_waiting(struct jobs *j, struct job *job)
{
    if (job->spilled.place)
        spill_drop(j->spill, &job->spilled);
    jobs_free(job);
}

void jobs_close(struct jobs *j)
{
    if (!j)
        return;
    for (int i = 0; i < j->n_running; i++) {
        prefix_leave(j->prefix, &j->running[i]->user, true);
        jobs_free(j->running[i]);
    }
    while (j->waiting.first)
        free_waiting(j, take(&j->waiting, &j->waiting.first));
    while (j->finished.first)
        jobs_free(take(&j->finished, &j->finished.first));
    mem_free(j->hidden);
    mem_free(j->turns);
    mem_free(j->running);
    batch_done(&j->batch);
    sample_free(j->sample);
    spill_close(j->spill);
    prefix_close(j->prefix);
    mem_free(j);
}

/* ---- coming and going ---- */

static int check_request(const struct jobs *j, const struct jobs_request *r)
{
    if (r->n_tok == 0)
        return err(ERR_ARG, "the prompt is empty");
    if (r->n_scored >= r->n_tok)
        return err(ERR_ARG, "%zu tokens to score of %zu: at least one has to stand before them", r->n_scored, r->n_tok);
    if (r->n_scored && r->pooling != EMBED_NONE)
        return err(ERR_ARG, "a request is either scored or pooled");
    if (r->constraint && (r->n_scored || r->pooling != EMBED_NONE))
        return err(ERR_ARG, "a grammar is for answers; this request is %s", r->n_scored ? "scored" : "pooled");
    if (r->n_tok > (size_t)j->n_ctx - (r->pooling == EMBED_NONE))
        return err(ERR_LIMIT, "the prompt takes %zu tokens, the context holds %lld (--ctx N makes it larger)", r->n_tok,
                   (long long)j->n_ctx);
    for (size_t i = 0; i < r->n_tok; i++)
        if (r->tokens[i] < 0 || r->tokens[i] >= j->args.n_vocab)
            return err(ERR_ARG, "token %d of a vocabulary of %d", r->tokens[i], j->args.n_vocab);
    return 0;
}

/* What pooling takes beside the job. */
static int make_pool(struct jobs *j, struct job *job, const struct jobs_request *r)
{
    size_t n_embd = (size_t)j->args.n_embd;

    if (r->pooling != EMBED_NONE && !j->hidden) {
        j->hidden = mem_alloc(HIDDEN_ROWS * n_embd * sizeof *j->hidden, MEM_META);
        if (!j->hidden)
            return err(ERR_NOMEM, "hidden states of %d rows", HIDDEN_ROWS);
    }
    job->normalize = r->normalize;
    return embed_init(&job->embed, r->pooling, j->args.n_embd);
}

int jobs_submit(struct jobs *j, const struct jobs_request *r, uint64_t *id)
{
    int rc = check_request(j, r);
    if (rc == 0)
        rc = sample_reset(j->sample, &r->sample);
    if (rc < 0)
        return rc;
    struct job *job = mem_zalloc(1, sizeof *job, MEM_OTHER);
    if (!job)
        return err(ERR_NOMEM, "a prompt of %zu tokens", r->n_tok);
    sample_get(j->sample, &job->sample);
    job->n_tok = job->n_given = job->cap_tok = r->n_tok;
    job->n_scored = r->n_scored;
    job->token = mem_alloc(r->n_tok * sizeof *job->token, MEM_OTHER);
    rc = job->token ? answer_init(&job->answer, &r->rules, j->args.tok)
                    : err(ERR_NOMEM, "a prompt of %zu tokens", r->n_tok);
    if (rc == 0)
        rc = make_pool(j, job, r);
    if (rc < 0) {
        jobs_free(job);
        return rc;
    }
    memcpy(job->token, r->tokens, r->n_tok * sizeof *job->token);
    job->constraint = constraint_hold(r->constraint);
    job->at = (struct constraint_at){.thought = r->thought, .ignores_end = r->rules.ignore_end};
    job->id = *id = ++j->last_id;
    job->submit_ns = clock_ns();
    push(&j->waiting, job);
    j->stats.n_waiting++;
    return 0;
}

static struct job *remove_running(struct jobs *j, int i)
{
    struct job *job = j->running[i];

    j->n_running--;
    memmove(&j->running[i], &j->running[i + 1], (size_t)(j->n_running - i) * sizeof *j->running);
    memmove(&j->turns[i], &j->turns[i + 1], (size_t)(j->n_running - i) * sizeof *j->turns);
    return job;
}

bool jobs_cancel(struct jobs *j, uint64_t id)
{
    struct job *job = take_id(&j->waiting, id);

    if (job) {
        j->stats.n_waiting--;
        free_waiting(j, job);
        return true;
    }
    if ((job = take_id(&j->finished, id))) {
        j->stats.n_finished--;
    } else {
        for (int i = 0; i < j->n_running && !job; i++)
            if (j->running[i]->id == id) {
                job = remove_running(j, i);
                prefix_leave(j->prefix, &job->user, false);
            }
    }
    jobs_free(job);
    return job != NULL;
}

bool jobs_has_begun(const struct jobs *j, uint64_t id)
{
    for (int i = 0; i < j->n_running; i++)
        if (j->running[i]->id == id)
            return true;
    for (const struct job *job = j->finished.first; job; job = job->next)
        if (job->id == id)
            return true;
    for (const struct job *job = j->waiting.first; job; job = job->next)
        if (job->id == id)
            return job->start_ns != 0;
    return false;
}

static void finish(struct jobs *j, int i)
{
    struct job *job = remove_running(j, i);

    prefix_leave(j->prefix, &job->user, false);
    job->end_ns = clock_ns();
    push(&j->finished, job);
    j->stats.n_finished++;
}

struct job *jobs_take(struct jobs *j)
{
    if (!j->finished.first)
        return NULL;
    j->stats.n_finished--;
    return take(&j->finished, &j->finished.first);
}

/* ---- who begins ---- */

/* Tokens that have to be run before anything is known: of those that are scored, the last is only looked up. */
static int64_t n_to_run(const struct job *job)
{
    return (int64_t)job->n_tok - (job->n_scored > 0);
}

/* Tokens whose pages others may share with it: the rows behind them give logits, or hidden states, which pages do not hold. */
static int64_t n_sharable(const struct job *job)
{
    if (job->embed.pooling == EMBED_MEAN)
        return 0;
    return (int64_t)job->n_given - 1 - (int64_t)job->n_scored;
}

/* Does somebody compute what this job begins with? Then it waits, and where a sequence cannot be shortened, its forerunner stops at
 * the place. */
static bool waits_for_another(struct jobs *j, const struct job *job, int64_t *n_now)
{
    struct prefix_match match;

    prefix_look(j->prefix, job->token, n_sharable(job), &match);
    *n_now = match.n_now;
    if (!match.maker)
        return false;
    struct job *maker = (struct job *)match.maker;
    if (!cache_can_shorten(j->args.cache) &&
        (maker->stop_at <= cache_len(maker->user.seq) || match.n_soon < maker->stop_at))
        maker->stop_at = match.n_soon;
    return true;
}

static int begin(struct jobs *j, struct job **at)
{
    struct job *job = *at;
    int rc = prefix_join(j->prefix, job->token, n_sharable(job), &job->user);

    if (rc < 0)
        return rc;
    take(&j->waiting, at);
    j->stats.n_waiting--;
    int64_t len = cache_len(job->user.seq);
    if (job->spilled.place)
        j->stats.n_spill_failed += spill_load(j->spill, &job->spilled, job->user.seq) < 0;
    if (!job->start_ns) {
        job->start_ns = clock_ns();
        job->n_shared = (size_t)len;
    }
    j->stats.n_shared += (uint64_t)len;
    job->stop_at = 0;
    j->running[j->n_running++] = job;
    if (j->n_running > j->stats.most_running)
        j->stats.most_running = j->n_running;
    return 0;
}

/* Let those begin for whom there is room. Who waits for another's pages is passed over; who waits for room is not. Nobody takes the GPU's
 * pages from those who have begun and wait for them. */
static int admit(struct jobs *j)
{
    if (j->stats.ways.is_waiting && j->n_running > 0)
        return 0;
    for (struct job **at = &j->waiting.first; *at && j->n_running < j->n_most;) {
        int64_t n_now;
        if (waits_for_another(j, *at, &n_now)) {
            at = &(*at)->next;
            continue;
        }
        if (!sched_admits(n_to_run(*at) - n_now, cache_free_tok(j->args.cache), j->n_running)) {
            if (prefix_shrink(j->prefix)) /* maybe what it would have shared: look again */
                continue;
            break;
        }
        int rc = begin(j, at);
        if (rc == ERR_LIMIT && j->n_running > 0)
            break;
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- one step ---- */

static bool is_in_prompt(const struct job *job)
{
    return cache_len(job->user.seq) < (int64_t)job->n_given;
}

/* Prompts are run in any case: their rows do not wait for the host's pages, which come up. */
static bool may_wait(const struct job *job)
{
    return !is_in_prompt(job) && cache_back_may_come(job->user.seq);
}

static void choose_ways(struct jobs *j)
{
    struct ways_step step = {0};

    for (int i = 0; i < j->n_running; i++) {
        const struct job *job = j->running[i];
        step.n_far += may_wait(job);
        step.has_prompt = step.has_prompt || is_in_prompt(job);
        step.n_host += !is_in_prompt(job) && cache_back_n_far(job->user.seq) > 0;
    }
    step.n_near = j->n_running - step.n_far;
    ways_begin(&j->stats.ways, &step);
}

static void plan_turns(struct jobs *j)
{
    for (int i = 0; i < j->n_running; i++) {
        const struct job *job = j->running[i];
        int64_t len = cache_len(job->user.seq), n_given = (int64_t)job->n_given;
        struct sched_seq *s = &j->turns[i];
        *s = (struct sched_seq){.len = len, .n_tok = n_to_run(job), .waits = j->stats.ways.is_waiting && may_wait(job)};
        s->first_out = job->n_scored ? n_sharable(job) : s->n_tok - (job->embed.pooling == EMBED_NONE);
        /* Given and drawn tokens are different kinds of rows (batch.h). */
        s->cut = len < n_given ? n_given : 0;
        if (job->stop_at > len && (s->cut == 0 || job->stop_at < s->cut))
            s->cut = job->stop_at;
    }
    sched_rows(j->turns, j->n_running, &j->limits);
}

/* Is it likely to take less time to keep the pages of len positions and get them back than to run those again? */
static bool is_spilling_cheaper(const struct jobs *j, int64_t len)
{
    double n_rows = (double)(j->stats.n_prompt + j->stats.n_drawn + j->stats.n_rerun);

    return spill_ns(j->spill, len) * n_rows <= (double)len * (double)j->rows_ns;
}

static void keep_pages(struct jobs *j, struct job *job, int64_t len)
{
    if (!j->spill || len == 0 || !is_spilling_cheaper(j, len))
        return;
    if (spill_save(j->spill, job->user.seq, &job->spilled) == 0)
        j->stats.n_spilled++;
    else
        j->stats.n_spill_failed++;
}

/* The youngest gives its pages back and waits before all others. */
static void preempt(struct jobs *j)
{
    struct job *job = remove_running(j, j->n_running - 1);
    int64_t len = cache_len(job->user.seq);

    if (len > job->most_run)
        job->most_run = len;
    keep_pages(j, job, len);
    prefix_leave(j->prefix, &job->user, true);
    job->n_preempted++;
    j->stats.n_preempted++;
    push_front(&j->waiting, job);
    j->stats.n_waiting++;
}

/* Reserve pages for every turn, the oldest first. For the youngest alone nobody gives way: it sits the step out. */
static int make_room(struct jobs *j)
{
    for (int i = 0; i < j->n_running; i++) {
        struct cache_seq *seq = j->running[i]->user.seq;
        int n_rows = j->turns[i].n_rows;
        while (!cache_has_room(seq, n_rows)) {
            if (prefix_shrink(j->prefix))
                continue;
            if (i == j->n_running - 1)
                break;
            preempt(j);
        }
        if (i > 0 && !cache_has_room(seq, n_rows)) {
            j->turns[i].n_rows = j->turns[i].n_out = 0;
            continue;
        }
        int rc = cache_reserve(seq, n_rows);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static bool has_rows(const struct jobs *j)
{
    for (int i = 0; i < j->n_running; i++)
        if (j->turns[i].n_rows > 0)
            return true;
    return false;
}

/* Who runs how many rows, in reserved pages. Where those who do not wait find no room, nobody waits: the oldest always goes on. */
static int settle_turns(struct jobs *j)
{
    choose_ways(j);
    plan_turns(j);
    int rc = make_room(j);
    if (rc < 0 || has_rows(j))
        return rc;
    ways_let_all(&j->stats.ways);
    plan_turns(j);
    return make_room(j);
}

static bool is_prompt_turn(const struct jobs *j, int i)
{
    return j->turns[i].len < (int64_t)j->running[i]->n_given;
}

static bool has_prompt_turn(const struct jobs *j)
{
    for (int i = 0; i < j->n_running; i++)
        if (j->turns[i].n_rows > 0 && is_prompt_turn(j, i))
            return true;
    return false;
}

/* Does the job's vector want the hidden state of this position? One that gave its pages back, or whose step failed, comes by
 * positions again that it has taken. */
static bool wants_hidden(const struct job *job, int64_t pos)
{
    if (job->embed.pooling == EMBED_LAST)
        return pos == (int64_t)job->n_given - 1 && job->embed.n_tok == 0;
    return job->embed.pooling == EMBED_MEAN && pos == job->embed.n_tok;
}

static bool wants_any_hidden(const struct job *job, const struct sched_seq *s)
{
    return wants_hidden(job, s->len + s->n_rows - 1) ||
           (job->embed.pooling == EMBED_MEAN && job->embed.n_tok < s->len + s->n_rows);
}

/* How many of the best logits are enough for a job; 0: all are wanted. */
static int n_top_of(struct jobs *j, const struct job *job)
{
    if (job->n_scored || job->answer.rules.n_top >= 0 || job->constraint)
        return 0;
    sample_put(j->sample, &job->sample);
    return sample_n_top(j->sample, (int64_t)job->n_tok);
}

/* Which sequences are the step's second half: of those that draw and have pages in the host's memory as many as have half of them
 * (apex.h); beside a prompt, which the GPU is busy with, all. Those that are run again have many rows, and stay. */
static void halve(struct jobs *j)
{
    int64_t n_all = 0, n_first = 0;
    bool has_first = false;

    for (int i = 0; i < j->n_running; i++) {
        struct sched_seq *s = &j->turns[i];
        int64_t n = s->n_rows == 1 && !is_prompt_turn(j, i) ? cache_back_n_far(j->running[i]->user.seq) : 0;
        s->is_second = j->stats.ways.is_halved && n > 0;
        n_all += s->is_second ? n : 0;
        has_first = has_first || (s->n_rows > 0 && !s->is_second);
    }
    if (has_prompt_turn(j))
        return;
    for (int i = 0; i < j->n_running; i++) {
        struct sched_seq *s = &j->turns[i];
        int64_t n = s->is_second ? cache_back_n_far(j->running[i]->user.seq) : 0;
        if (n == 0 || (has_first && 2 * (n_first + n) > n_all))
            continue;
        n_first += n;
        s->is_second = false;
        has_first = true;
    }
}

/* In which order rows stand: those of given tokens before those of drawn ones, and of these a second half last. */
enum { RANK_PROMPT, RANK_DRAWN, RANK_SECOND, N_RANKS };

static int rank_of(const struct jobs *j, int i)
{
    return is_prompt_turn(j, i) ? RANK_PROMPT : j->turns[i].is_second ? RANK_SECOND : RANK_DRAWN;
}

static void fill_batch(struct jobs *j)
{
    batch_clear(&j->batch);
    halve(j);
    for (int i = 0; i < j->n_running; i++)
        if (j->turns[i].n_rows > 0 && wants_any_hidden(j->running[i], &j->turns[i]))
            j->batch.wants_hidden = true;
    for (int rank = 0; rank < N_RANKS; rank++)
        for (int i = 0; i < j->n_running; i++) {
            const struct sched_seq *s = &j->turns[i];
            const struct job *job = j->running[i];
            if (s->n_rows == 0 || rank_of(j, i) != rank)
                continue;
            batch_add(&j->batch, job->user.seq, job->token + s->len, s->n_rows, (int32_t)s->len, s->n_out,
                      rank == RANK_PROMPT);
            j->batch.n_second += rank == RANK_SECOND ? s->n_rows : 0;
            if (s->n_out > 0)
                batch_set_top(&j->batch, n_top_of(j, job));
        }
}

static bool add_token(struct job *job, int32_t token)
{
    if (job->n_tok == job->cap_tok) {
        size_t cap = job->cap_tok + job->cap_tok / 2 + 32;
        int32_t *p = mem_realloc(job->token, cap * sizeof *p, MEM_OTHER);
        if (!p)
            return false;
        job->token = p;
        job->cap_tok = cap;
    }
    job->token[job->n_tok++] = token;
    return true;
}

static int follow(struct job *job)
{
    return constraint_follow(job->constraint, &job->at, job->token + job->n_given, job->n_tok - job->n_given);
}

static int draw_token(struct jobs *j, struct job *job, const struct sample_row *row, int32_t *token)
{
    struct constraint_view view = {job->constraint, &job->at};
    struct sample_filter filter = constraint_filter(&view);

    if (!job->constraint)
        return sample_draw_row(j->sample, row, job->token, (int64_t)job->n_tok, token);
    int rc = follow(job);
    return rc ? rc : sample_draw_allowed(j->sample, row, &filter, job->token, (int64_t)job->n_tok, token);
}

/* By its grammar nothing may follow: an end token would be all that is left to draw. */
static void finish_if_whole(struct job *job)
{
    int rc = follow(job);

    if (rc < 0 && job->answer.end == ANSWER_GOES_ON)
        answer_fail(&job->answer, rc);
    else if (rc == 0 && constraint_is_done(job->constraint, &job->at))
        answer_finish(&job->answer, ANSWER_STOP);
}

/* From row `out` of the step's logits. */
static void draw(struct jobs *j, struct job *job, int out)
{
    struct sample_row row;
    int32_t token;

    exec_row(j->args.exec, out, &row);
    sample_put(j->sample, &job->sample);
    int rc = draw_token(j, job, &row, &token);
    sample_get(j->sample, &job->sample);
    if (rc == 0 && !add_token(job, token))
        rc = err(ERR_NOMEM, "an answer of %zu tokens", job->n_tok);
    if (rc < 0) {
        answer_fail(&job->answer, rc);
        return;
    }
    j->stats.n_drawn++;
    answer_take(&job->answer, token, row.logit, j->args.n_vocab);
    if (job->constraint && (job->answer.end == ANSWER_GOES_ON || job->answer.end == ANSWER_LENGTH))
        finish_if_whole(job);
    if (job->answer.end == ANSWER_GOES_ON && (int64_t)job->n_tok >= j->n_ctx)
        answer_finish(&job->answer, ANSWER_CONTEXT);
}

/* Logits (n_out) of the last rows of a turn; the first is row `out` of the step's. */
static void use_logits(struct jobs *j, int i, int out)
{
    struct job *job = j->running[i];
    const struct sched_seq *s = &j->turns[i];
    int64_t end = s->len + s->n_rows;

    if (!job->n_scored) {
        draw(j, job, out);
        return;
    }
    for (int64_t pos = end - s->n_out; pos < end && job->answer.end == ANSWER_GOES_ON; pos++, out++) {
        struct sample_row row;
        exec_row(j->args.exec, out, &row);
        /* One that gave its pages back has been here before. */
        if ((size_t)pos + 1 - (job->n_given - job->n_scored) == job->answer.n_tok)
            answer_score(&job->answer, job->token[pos + 1], row.logit, j->args.n_vocab);
    }
    if (end == n_to_run(job) && job->answer.end == ANSWER_GOES_ON)
        answer_finish(&job->answer, ANSWER_SCORED);
}

/* Take the hidden states of a turn whose first row of the step is `row`. */
static int pool_turn(struct jobs *j, int i, int row)
{
    struct job *job = j->running[i];
    const struct sched_seq *s = &j->turns[i];

    for (int first = 0; first < s->n_rows && wants_any_hidden(job, s); first += HIDDEN_ROWS) {
        int n = least(s->n_rows - first, HIDDEN_ROWS);
        int rc = exec_hidden(j->args.exec, row + first, n, j->hidden);
        if (rc < 0)
            return rc;
        for (int k = 0; k < n; k++)
            if (wants_hidden(job, s->len + first + k))
                embed_add(&job->embed, j->hidden + (size_t)k * (size_t)j->args.n_embd);
    }
    return 0;
}

/* Before the step counts: copying may fail. Turns stand as in fill_batch. */
static int pool(struct jobs *j)
{
    int row = 0, rc = 0;

    for (int rank = 0; rank < N_RANKS; rank++)
        for (int i = 0; i < j->n_running; i++) {
            if (rank_of(j, i) != rank)
                continue;
            if (rc == 0)
                rc = pool_turn(j, i, row);
            row += j->turns[i].n_rows;
        }
    return rc;
}

static void count_rows(struct jobs *j, int i)
{
    const struct job *job = j->running[i];
    const struct sched_seq *s = &j->turns[i];
    int64_t again = (s->len + s->n_rows < job->most_run ? s->len + s->n_rows : job->most_run) - s->len;

    if (again > 0)
        j->stats.n_rerun += (uint64_t)again;
    if (is_prompt_turn(j, i))
        j->stats.n_prompt += (uint64_t)(s->n_rows - (again > 0 ? again : 0));
}

static void finish_pooled(struct job *job)
{
    embed_finish(&job->embed, job->normalize);
    answer_finish(&job->answer, ANSWER_POOLED);
}

/* The step's rows count from here on. */
static void commit(struct jobs *j)
{
    int out = 0;

    for (int rank = 0; rank < N_RANKS; rank++)
        for (int i = 0; i < j->n_running; i++) {
            const struct sched_seq *s = &j->turns[i];
            if (s->n_rows == 0 || rank_of(j, i) != rank)
                continue;
            cache_commit(j->running[i]->user.seq, s->n_rows);
            count_rows(j, i);
            if (s->n_out > 0)
                use_logits(j, i, out);
            if (j->running[i]->embed.pooling != EMBED_NONE && s->len + s->n_rows == s->n_tok)
                finish_pooled(j->running[i]);
            out += s->n_out;
        }
    for (int i = 0; i < j->n_running;) {
        if (j->running[i]->answer.end != ANSWER_GOES_ON)
            finish(j, i);
        else
            i++;
    }
}

static void count_time(struct jobs *j, uint64_t ns)
{
    j->rows_ns += ns;
    ways_end(&j->stats.ways, (double)ns * 1e-9 / j->batch.n_rows);
    for (int i = 0; i < j->n_running; i++)
        j->stats.n_sat_out += j->turns[i].waits;
}

int jobs_step(struct jobs *j)
{
    const float *logits;

    if (__atomic_exchange_n(&j->cancel, 0, __ATOMIC_RELAXED))
        return err(ERR_CANCEL, "stopped before a step");
    uint64_t start_ns = clock_ns();
    int rc = admit(j);
    if (rc < 0 || j->n_running == 0)
        return rc;
    if (cache_back_wants_room(j->args.cache))
        prefix_leave_device(j->prefix);
    rc = settle_turns(j);
    if (rc < 0)
        return rc;
    fill_batch(j);
    uint64_t rows_start_ns = j->args.clock();
    rc = exec_run(j->args.exec, &j->batch, &j->cancel, &logits);
    if (rc == 0 && j->batch.wants_hidden)
        rc = pool(j);
    if (rc < 0) {
        __atomic_store_n(&j->cancel, 0, __ATOMIC_RELAXED);
        return rc;
    }
    count_time(j, j->args.clock() - rows_start_ns);
    commit(j);
    j->stats.n_steps++;
    j->stats.step_ns += clock_ns() - start_ns;
    return 0;
}

void jobs_interrupt(struct jobs *j)
{
    __atomic_store_n(&j->cancel, 1, __ATOMIC_RELAXED);
}

/* ---- facts ---- */

void jobs_facts(const struct job *job, struct jobs_facts *out)
{
    *out = (struct jobs_facts){.id = job->id,
                               .answer = &job->answer,
                               .embedding = job->answer.end == ANSWER_POOLED ? job->embed.value : NULL,
                               .n_embd = job->embed.n_embd,
                               .n_given = job->n_given,
                               .n_shared = job->n_shared,
                               .n_preempted = job->n_preempted,
                               .wait_ns = job->start_ns - job->submit_ns,
                               .run_ns = job->end_ns - job->start_ns};
}

void jobs_stats(const struct jobs *j, struct jobs_stats *out)
{
    *out = j->stats;
    out->n_running = j->n_running;
}

const char *jobs_news(const struct jobs *j, uint32_t *n_seen, char *buf, size_t buf_bytes)
{
    return ways_news(&j->stats.ways, n_seen, buf, buf_bytes);
}
