/* From logits to a token: penalties, then greedy or (top-k, top-p, min-p, temperature, draw). One sampler per session.
 * Order as most tools have it: penalties; top-k; top-p; min-p; temperature; draw. top-p and min-p look at probabilities
 * as they are at temperature 1. temperature 0 is the exact argmax after penalties, of equals the lowest id. A logit that is
 * not finite is never drawn. Same seed, logits and history: same tokens, on every machine (our own generator). */
#ifndef FERRY_RUN_SAMPLE_H
#define FERRY_RUN_SAMPLE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct sample_opts {
    float temperature; /* 0: greedy */
    int top_k;         /* 0: off */
    float top_p;       /* the fewest best tokens that together have this probability; 1: off */
    float min_p;       /* tokens with at least this times the best one's probability; 0: off */
    /* Once for each different token in the window: its logit is divided by this if above 0, else multiplied; 1: off */
    float repeat_penalty;
    /* and then goes down by the first, and by the second for each time the token is there; 0: off */
    float presence_penalty, frequency_penalty;
    int penalty_window; /* last tokens looked at; -1: all */
    uint64_t seed;
};

struct sample; /* sampler: options, random state, scratch of n_vocab */

/* Defaults: greedy, everything off, window 64, seed 0. */
void sample_opts_init(struct sample_opts *opts);

/* All memory is taken here. ERR_ARG names the option out of range and its value; ERR_NOMEM. */
int sample_make(const struct sample_opts *opts, int n_vocab, struct sample **out);
void sample_free(struct sample *s); /* takes NULL */

/* A copy with its own random state (continuing from the same point). */
int sample_copy(const struct sample *s, struct sample **out);

/* New options, random state from opts->seed. ERR_ARG leaves the old ones. */
int sample_reset(struct sample *s, const struct sample_opts *opts);

/* What makes a sampler draw as it does, without its scratch: many sequences share one sampler in turn. get gives it as it is now,
 * put goes on from there. */
struct sample_state {
    struct sample_opts opts;
    uint64_t rng[4];
};
void sample_get(const struct sample *s, struct sample_state *out);
void sample_put(struct sample *s, const struct sample_state *state);

/* log of the sum of e^logit: a token's log-probability is its logit less this. NaN logits count as absent. */
double sample_log_sum(const float *logits, int n_vocab);

/* Logits to draw from: all of the vocabulary's, or the best ones. Views. */
struct sample_row {
    int n;
    const int32_t *id;  /* (n) rising; NULL: n is n_vocab, and each logit's place is its id */
    const float *logit; /* (n) */
};

/* How many of the best logits (greatest first, of equal ones the lower id; those that are not finite left out) give the token that all
 * of them give, for a sequence of n_history tokens; 0: all are wanted, or nearly. At most DEVICE_MAX_TOP_K. */
int sample_n_top(const struct sample *s, int64_t n_history);

/* Draw from a row, which is not changed; history (n_history): the sequence's tokens so far, for penalties
 * (ids outside the vocabulary do not count). The same token and random numbers from all logits, and from sample_n_top() of them or more.
 * Never allocates. ERR_FORMAT when no logit is finite (a broken model): says how many were NaN. */
int sample_draw_row(struct sample *s, const struct sample_row *row, const int32_t *history, int64_t n_history,
                    int32_t *token);

/* Which tokens may be drawn. */
struct sample_filter {
    int (*allows)(void *arg, int32_t id); /* 1: this one, 0: not; or a negative code */
    int (*all)(void *arg,
               const uint64_t **bits); /* all at once: bit id % 64 of word id / 64; view; or a negative code */
    void *arg;
};

/* The same from a row of all logits, as if it held those of allowed tokens alone: penalties, cuts and temperature see no others. The best
 * are asked about first, and all only where those do not settle it. ERR_STATE: no allowed token has a finite logit; codes of the filter. */
int sample_draw_allowed(struct sample *s, const struct sample_row *row, const struct sample_filter *filter,
                        const int32_t *history, int64_t n_history, int32_t *token);

/* The same from all logits (n_vocab). */
int sample_draw(struct sample *s, const float *logits, const int32_t *history, int64_t n_history, int32_t *token);

#ifdef __cplusplus
}
#endif
#endif
