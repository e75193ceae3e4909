/* While a model runs: is what the plan predicted what is measured? When it was wrong, rates are corrected, and the few choices that can
 * change between two steps are tried against what is in force, in short turns; what is clearly faster stays, all else is undone. No
 * choice changes a result. Pure: it is fed with counters and says what to use, so that tests can be its clock. */
#ifndef FERRY_PLAN_REFIT_H
#define FERRY_PLAN_REFIT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/plan/plan.h"
#include "src/plan/tune.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Work that a prediction is held against: so long, and TUNE_LEAST_TOK tokens. The first such window finds slots empty and is
 * not counted. */
#define REFIT_WATCH_NS UINT64_C(2000000000)

/* Wrong is what is off by more than TUNE_CLOSE in two windows in a row, alike; once rates were corrected, by more than this: they
 * are measured ones now, and contexts grow. */
#define REFIT_AGAIN 0.2

/* A turn of a trial; a trial has twelve, in the order ABBA, so that a steady drift favours nobody. */
#define REFIT_TURN_NS UINT64_C(250000000)
enum { REFIT_TURN_TOK = 4, REFIT_PAIRS = 6 };

/* B stays if it won five of the six pairs (by chance: one in nine) and all in all was 3 % faster. */
#define REFIT_GAIN 1.03
enum { REFIT_WINS = 5 };

/* Trials cost what the losers lose: there are none for so long after the last. */
#define REFIT_REST_NS UINT64_C(60000000000)

enum { REFIT_MAX_TRIALS = 8 };

struct refit_trial {
    struct plan_pace pace;
    double gain; /* speed, as a share of that without it */
    bool is_kept;
};

struct refit {
    struct plan now;       /* what is expected: the plan, corrected by what was measured */
    struct plan_pace pace; /* to be used now */
    struct plan_pace best; /* outside of a trial's turns */
    int n_used;            /* experts of a layer that a token needs */
    bool is_on, is_trying;
    struct tune_seen begun; /* totals when the window or turn began */
    /* Watching */
    uint32_t n_windows;
    int n_wrong;     /* windows in a row */
    double wrong_s;  /* a token, in the last of them */
    bool takes_next; /* what the next window measures is what is expected from then on */
    uint64_t rest_until_ns;
    /* Trying */
    int candidate, n_turns, n_won;
    double turn_s, sum_s[2]; /* a token: in the turn before; without the candidate, with it */
    /* For people */
    uint32_t n_refits;
    struct tune last;                            /* what was off when rates were corrected last */
    struct refit_trial trials[REFIT_MAX_TRIALS]; /* of the last round */
    int n_trials;
};

/* p is copied; n_used: experts of a layer that a token needs. A plan without predictions is never wrong. */
void refit_init(struct refit *r, const struct plan *p, int n_used);

/* After a generated token: the totals of all so far. Returns whether r->pace is another one than before, to be used from the
 * next token on. */
bool refit_feed(struct refit *r, const struct tune_seen *total);

/* One line, without its end, for a person; "" when nothing was corrected. Returns buf. */
const char *refit_text(const struct refit *r, char *buf, size_t buf_bytes);

#ifdef __cplusplus
}
#endif
#endif
