/* Owns the trials; whose steps are timed, and what is done about it, is exec's. */
#include "src/run/tier.h"

void tier_init(struct tier *t, bool is_off)
{
    *t = (struct tier){.is_off = is_off, .part = TIER_WAIT, .interval = TIER_FIRST};
}

static void begin_part(struct tier *t, enum tier_part part)
{
    t->part = part;
    t->n_timed = 0;
    t->n_warm = part == TIER_BEFORE ? TIER_WARM : 0; /* before it nothing has changed */
}

void tier_leave(struct tier *t)
{
    if (t->part != TIER_WAIT)
        t->n_wait = 0;
    t->part = TIER_WAIT;
}

/* Steps have become others: no comparison. Where they keep doing so it is left: another trial may be waiting for its end (ways.c). */
static void begin_anew(struct tier *t)
{
    if (t->n_anew++ < TIER_ANEW)
        begin_part(t, TIER_BEFORE);
    else
        tier_leave(t);
}

bool tier_begin(struct tier *t, int kind)
{
    if (kind == TIER_NO_KIND)
        return !t->is_off;
    if (t->part == TIER_WAIT && t->n_wait >= t->interval) {
        t->n_anew = 0;
        begin_part(t, TIER_BEFORE);
    } else if (t->part != TIER_WAIT && kind != t->kind) {
        begin_anew(t);
    }
    t->kind = kind;
    return t->is_off == (t->part == TIER_OTHER);
}

static double median(const double *x)
{
    double sorted[TIER_TIMED];

    for (int i = 0; i < TIER_TIMED; i++) {
        int at = i;
        for (; at > 0 && sorted[at - 1] > x[i]; at--)
            sorted[at] = sorted[at - 1];
        sorted[at] = x[i];
    }
    return sorted[TIER_TIMED / 2];
}

static void end_trial(struct tier *t, bool is_won)
{
    t->n_trials++;
    t->n_wins = is_won ? t->n_wins + 1 : 0;
    if (t->n_wins == 2) {
        t->is_off = !t->is_off;
        t->n_changes++;
        t->n_wins = 0;
        t->interval = TIER_FIRST;
    } else if (is_won) {
        t->interval = TIER_AGAIN;
    } else {
        t->interval = t->interval < TIER_FIRST ? TIER_FIRST : t->interval;
        t->interval = t->interval < TIER_LONGEST ? t->interval * 2 : TIER_LONGEST;
    }
    t->n_wait = 0;
    t->part = TIER_WAIT;
}

/* All steps of a part are timed. */
static void end_part(struct tier *t)
{
    double s = median(t->timed);

    if (t->part == TIER_BEFORE) {
        t->usual_s = s;
        begin_part(t, TIER_OTHER);
    } else if (t->part == TIER_OTHER) {
        t->other_s = s;
        begin_part(t, TIER_AFTER);
    } else {
        if (s < t->usual_s) /* the better of both: something else may have been slow for a while */
            t->usual_s = s;
        t->on_s = t->is_off ? t->other_s : t->usual_s;
        t->off_s = t->is_off ? t->usual_s : t->other_s;
        end_trial(t, t->other_s < t->usual_s * (1 - TIER_CLEAR));
    }
}

void tier_end(struct tier *t, int kind, double seconds)
{
    if (kind == TIER_NO_KIND)
        return;
    if (t->part == TIER_WAIT) {
        t->n_wait++;
        return;
    }
    bool is_hopeless = t->part == TIER_OTHER && seconds > TIER_GIVE_UP * t->usual_s && t->n_warm >= TIER_WARM;
    if (is_hopeless) {
        end_trial(t, false);
    } else if (t->n_warm < TIER_WARM) {
        t->n_warm++;
    } else {
        t->timed[t->n_timed++] = seconds;
        if (t->n_timed == TIER_TIMED)
            end_part(t);
    }
}
