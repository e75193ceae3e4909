/* Whether the GPU shall compute experts at all, by measured step times. Now and then the other way is tried for a few steps, fairly:
 * before it and after it as many steps are timed the usual way, the first steps after each change do not count (slots have to fill),
 * and only steps with equally many rows are compared. It has to win twice in a row, by TIER_CLEAR, before anything is changed, which
 * holds for both directions. Trials that lose come ever more seldom. A pure state: times come in, so tests can invent them. */
#ifndef FERRY_RUN_TIER_H
#define FERRY_RUN_TIER_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Not measured on a GPU yet: 5 % is what medians of 5 steps differ by on a busy laptop. */
#define TIER_CLEAR 0.05

enum {
    TIER_TIMED = 5,         /* steps that count, of each part of a trial: their median does */
    TIER_WARM = 2,          /* steps after a change that do not */
    TIER_FIRST = 64,        /* comparable steps until the first trial; twice as many after each that lost */
    TIER_LONGEST = 1 << 14, /* but no more than that */
    TIER_AGAIN = 8,         /* until the one that has to confirm a first win */
    TIER_GIVE_UP = 3,       /* a step of a trial that takes so many times the usual one ends it */
    TIER_MOST_ROWS = 8,     /* steps of more rows are prompts: no two are alike */
};

enum tier_part { TIER_WAIT, TIER_BEFORE, TIER_OTHER, TIER_AFTER };

struct tier {
    bool is_off; /* the GPU computes no experts, outside of trials */
    enum tier_part part;
    int n_rows;                                 /* of the steps that are compared */
    int n_warm, n_timed;                        /* of this part */
    int n_wins;                                 /* trials in a row that the other way won */
    uint32_t n_wait, interval;                  /* comparable steps since the last trial; until the next */
    double timed[TIER_TIMED], usual_s, other_s; /* medians */
    /* For people: medians of the last whole trial, of both ways; 0: there was none. Changes so far. */
    double on_s, off_s;
    uint32_t n_trials, n_changes;
};

void tier_init(struct tier *t);

/* A step of n_rows begins: shall the GPU compute experts in it? */
bool tier_begin(struct tier *t, int n_rows);

/* That step is over, after so many seconds. One that failed is not told. */
void tier_end(struct tier *t, int n_rows, double seconds);

#ifdef __cplusplus
}
#endif
#endif
