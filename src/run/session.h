/* One conversation: its tokens, its cache, its sampler. Tokens that it holds but has not run yet are "pending": a drawn token
 * is run by the next step or append, so that the last one of an answer costs nothing. */
#ifndef FERRY_RUN_SESSION_H
#define FERRY_RUN_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/plan/plan.h"
#include "src/run/constraint.h"
#include "src/run/sample.h"

#ifdef __cplusplus
extern "C" {
#endif

struct session;
struct cache;
struct exec;

struct session_args {
    struct exec *exec; /* view, outlives the session; as cache */
    struct cache *cache;
    const struct plan *plan; /* copied: sizes of a step */
    int n_vocab;
    const struct sample_opts *sample; /* copied; NULL: greedy */
};

struct session_stats {
    uint64_t n_prompt, n_generated; /* tokens run as given, and as drawn */
    uint64_t prompt_ns, generate_ns;
    uint64_t prompt_weight_bytes, generate_weight_bytes;
};

/* ERR_LIMIT when as many sessions as planned are alive; ERR_ARG (sampler); ERR_NOMEM. */
int session_make(const struct session_args *args, struct session **out);
void session_free(struct session *s); /* takes NULL */

/* Called between chunks; false stops. */
typedef bool session_progress(size_t done, size_t total, void *arg);

/* Run all pending tokens, then these. ERR_LIMIT if they would pass n_ctx (nothing is done). After ERR_CANCEL or another error
 * the session holds the tokens that were run. */
int session_append(struct session *s, const int32_t *tokens, size_t n, session_progress *progress, void *arg);

/* Takes the logits of so many more tokens: (n_rows, n_vocab), view until it returns. An error ends the run, and is what comes of it. */
typedef int session_take(const float *rows, size_t n_rows, void *arg);

/* Run these tokens one chunk at a time (prompt) or one by one, and let take have each one's logits. */
int session_each_logits(struct session *s, const int32_t *tokens, size_t n, bool prompt, session_take *take, void *arg);

/* The same; the logits are written to out (n, n_vocab). */
int session_logits(struct session *s, const int32_t *tokens, size_t n, bool prompt, float *out);

/* Draw a token and hold it, pending. ERR_STATE without any token, ERR_LIMIT when n_ctx tokens are held. */
int session_step(struct session *s, int32_t *token);

size_t session_n_tokens(const struct session *s);
const int32_t *session_tokens(const struct session *s); /* view until the next call that changes the session */

/* Keep the first n tokens (n beyond the end: ERR_ARG). */
int session_truncate(struct session *s, size_t n);

/* The same tokens and (shared) pages, and a sampler that goes on from the same point. ERR_LIMIT, ERR_NOMEM. */
int session_fork(const struct session *s, struct session **out);

int session_sample(struct session *s, const struct sample_opts *opts); /* ERR_ARG */

/* From here on the session's tokens are an answer that a grammar holds for; tokens that are appended belong to it. c is held, in place
 * of an earlier one; NULL: nothing holds. */
void session_constrain(struct session *s, struct constraint *c, enum constraint_thought thought);

/* Is the answer whole by its grammar, so that nothing but an end token can come? ERR_ARG: a token that was appended does not fit;
 * ERR_LIMIT, ERR_NOMEM. */
int session_is_whole(struct session *s, bool *out);

/* Make the running, or else the next, append, logits or step return ERR_CANCEL soon. Safe in a signal handler; any thread. */
void session_cancel(struct session *s);

void session_stats(const struct session *s, struct session_stats *out);

#ifdef __cplusplus
}
#endif
#endif
