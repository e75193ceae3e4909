/* Many prompts answered together: who waits, who runs, who is done. Sequences join and leave at every step; a step runs one
 * row of everyone who is being answered and at most a chunk of prompt rows. When KV pages run out, whoever came last gives
 * its own back, and later gets them from a file or is run again: its tokens and random state are kept, so it says the same. Where
 * a GPU holds a part of the pages, those whose pages it does not hold run beside the others, with the CPU, or wait until theirs are
 * there, whichever way brings more tokens by measured steps (ways.h). One thread. */
#ifndef FERRY_RUN_JOBS_H
#define FERRY_RUN_JOBS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/plan/plan.h"
#include "src/run/answer.h"
#include "src/run/constraint.h"
#include "src/run/embed.h"
#include "src/run/sample.h"
#include "src/run/ways.h"

#ifdef __cplusplus
extern "C" {
#endif

struct jobs;
struct job;
struct cache;
struct exec;

struct jobs_args {
    struct exec *exec; /* this, cache and tok: views, outlive the jobs */
    struct cache *cache;
    const struct tok *tok;   /* NULL: numbers only */
    const struct plan *plan; /* looked at, not kept */
    const char *spill_dir;   /* looked at, not kept: where pages that are given back may be kept; NULL: nowhere */
    int n_vocab, n_embd;
    uint64_t (*clock)(void); /* nanoseconds that rise; NULL: clock_ns() */
};

struct jobs_request {
    const int32_t *tokens; /* (n_tok) copied */
    size_t n_tok;
    size_t n_scored;            /* judge the last n_scored of them instead of drawing more */
    enum embed_pooling pooling; /* do not draw, but make one vector of all tokens; normalize: of length 1 */
    bool normalize;
    struct answer_rules rules;
    struct sample_opts sample;
    struct constraint *constraint; /* held; NULL: any token may come */
    enum constraint_thought thought;
};

/* ERR_NOMEM, ERR_IO (spill_dir), ERR_UNSUPPORTED (spill_dir for a model with sliding windows or recurrent layers). */
int jobs_open(const struct jobs_args *args, struct jobs **out);
void jobs_close(struct jobs *j); /* takes NULL; what waits and runs is dropped */

/* Put a request at the end of those who wait. *id is never 0, and rises. ERR_ARG (empty prompt, a token outside the vocabulary,
 * sampler options, both to be scored and pooled, a grammar for what is not drawn), ERR_LIMIT (longer than a sequence can be, with one
 * position for the answer unless it is pooled), ERR_NOMEM. */
int jobs_submit(struct jobs *j, const struct jobs_request *r, uint64_t *id);

/* Drop a request that waits or runs, or its finished answer. false: there is none of that id. */
bool jobs_cancel(struct jobs *j, uint64_t id);

/* Has it begun, and was it not taken yet? One that gave its pages back has begun, and so has one that is finished. */
bool jobs_has_begun(const struct jobs *j, uint64_t id);

/* Run one step, if anybody waits or runs. After an error (ERR_CANCEL too) nothing of the step counts, and the next call tries
 * again. What exec_run says. */
int jobs_step(struct jobs *j);

/* Make the running, or else the next, step return ERR_CANCEL soon. Safe in a signal handler; any thread. */
void jobs_interrupt(struct jobs *j);

/* The answer that was finished first and is still here, or NULL. Own: jobs_free(). */
struct job *jobs_take(struct jobs *j);
void jobs_free(struct job *job); /* takes NULL */

/* Facts of a job that was taken; views until jobs_free. */
struct jobs_facts {
    uint64_t id;
    const struct answer *answer;
    const float *embedding; /* (n_embd) NULL: not pooled, or failed */
    int n_embd;
    size_t n_given, n_shared; /* prompt tokens; of these, not run because another's pages hold them */
    uint32_t n_preempted;     /* how often it gave its pages back */
    uint64_t wait_ns, run_ns; /* from submit to its first step; from there to its end */
};
void jobs_facts(const struct job *job, struct jobs_facts *out);

struct jobs_stats {
    int n_waiting, n_running, n_finished;
    uint64_t n_steps;
    uint64_t n_prompt, n_drawn; /* tokens run as given; drawn */
    uint64_t n_shared, n_rerun; /* tokens not run because shared; run again after their pages were given back */
    uint64_t n_preempted;
    uint64_t n_spilled, n_spill_failed; /* times that pages were kept, instead of being run again; that this failed */
    uint64_t step_ns;
    int most_running;
    uint64_t n_sat_out; /* times that a sequence waited for a step because its pages lay in the host's memory */
    struct ways ways;   /* whether they wait, and whether steps are run in halves */
};
void jobs_stats(const struct jobs *j, struct jobs_stats *out);

/* ways_news() of stats.ways. */
const char *jobs_news(const struct jobs *j, uint32_t *n_seen, char *buf, size_t buf_bytes);

#ifdef __cplusplus
}
#endif
#endif
