/* Which of two ways steps go, by measured times: whether the GPU shall compute experts at all (exec.c), and what a batch does
 * with sequences whose KV pages lie in the host's memory (ways.h). Now and then the other way is tried for a few steps,
 * fairly: before it and after it as many steps are timed the usual way, the first steps after each change do not count (slots have to
 * fill), and only steps of one kind are compared. It has to win twice in a row, by TIER_CLEAR, before anything is changed, which holds for
 * both directions. Trials that lose come ever more seldom. A pure state: times come in, so tests can invent them. */
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
    TIER_ANEW = 4,          /* a trial that began anew so often, because steps were not alike, is left then */
    TIER_NO_KIND = -1,      /* of steps that are like no others */
};

enum tier_part { TIER_WAIT, TIER_BEFORE, TIER_OTHER, TIER_AFTER };

struct tier {
    bool is_off; /* which way, outside of trials */
    enum tier_part part;
    int kind;                                   /* of the steps that are compared */
    int n_warm, n_timed;                        /* of this part */
    int n_anew;                                 /* times that this trial began anew */
    int n_wins;                                 /* trials in a row that the other way won */
    uint32_t n_wait, interval;                  /* comparable steps since the last trial; until the next */
    double timed[TIER_TIMED], usual_s, other_s; /* medians */
    /* For people: medians of the last whole trial, of both ways; 0: there was none. Changes so far. */
    double on_s, off_s;
    uint32_t n_trials, n_changes;
};

void tier_init(struct tier *t, bool is_off);

/* A step of that kind begins: does it go the way that is on? */
bool tier_begin(struct tier *t, int kind);

/* That step is over, after so many seconds (or what they are divided by, where both ways do not get as much done). One that failed is not
 * told. */
void tier_end(struct tier *t, int kind, double seconds);

/* A trial, if one is on, ends without a result; the next one comes when it would after this. */
void tier_leave(struct tier *t);

#ifdef __cplusplus
}
#endif
#endif
