/* Owns which steps are compared, and when; the trials are tier's. */
#include "src/run/ways.h"

#include "src/plan/plan.h"

#include <stdio.h>

void ways_init(struct ways *w, const struct plan *plan)
{
    *w = (struct ways){.has_halves = plan_has_halves(plan), .waits_kind = TIER_NO_KIND, .halves_kind = TIER_NO_KIND};
    tier_init(&w->waits, plan->gpu.kv_waits);
    tier_init(&w->halves, !plan->gpu.halves);
}

/* Are two numbers alike? As many bits tell. */
static int n_bits(int n)
{
    int bits = 0;

    for (; n; n >>= 1)
        bits++;
    return bits;
}

static int kind_of(int n, int n_host)
{
    return n_bits(n) * 32 + n_bits(n_host);
}

/* A step counts for a choice if both ways are open to it, everybody draws, and the other choice is not on trial. A trial is left when only
 * one way is open to such a step: nobody knows when there will be two again, and meanwhile the other choice would not be tried. */
void ways_begin(struct ways *w, const struct ways_step *s)
{
    const int n_rows = s->n_near + s->n_far;
    bool may_wait = s->n_far > 0 && s->n_near > 0;

    w->waits_kind = w->halves_kind = TIER_NO_KIND;
    if (may_wait && !s->has_prompt && w->halves.part == TIER_WAIT)
        w->waits_kind = kind_of(s->n_near, s->n_far);
    if (!may_wait && !s->has_prompt)
        tier_leave(&w->waits);
    w->is_waiting = !tier_begin(&w->waits, w->waits_kind) && may_wait;
    bool may_halve = w->has_halves && !w->is_waiting && s->n_host > 0 && (n_rows > 1 || s->has_prompt);
    if (may_halve && !s->has_prompt && w->waits.part == TIER_WAIT)
        w->halves_kind = kind_of(n_rows - s->n_host, s->n_host);
    if (!may_halve && !s->has_prompt)
        tier_leave(&w->halves);
    w->is_halved = tier_begin(&w->halves, w->halves_kind) && may_halve;
}

void ways_let_all(struct ways *w)
{
    w->waits_kind = w->halves_kind = TIER_NO_KIND;
    w->is_waiting = false;
    tier_leave(&w->waits); /* nor would there be room soon */
}

void ways_end(struct ways *w, double seconds)
{
    uint32_t n_waits = w->waits.n_changes, n_halves = w->halves.n_changes;

    tier_end(&w->waits, w->waits_kind, seconds);
    tier_end(&w->halves, w->halves_kind, seconds);
    if (w->waits.n_changes != n_waits)
        w->changed = WAYS_WAITS;
    if (w->halves.n_changes != n_halves)
        w->changed = WAYS_HALVES;
}

static void say_waits(const struct tier *t, char *buf, size_t buf_bytes)
{
    snprintf(buf, buf_bytes,
             "with sequences whose pages lie in the host's memory steps bring %.3g tokens/s, without them %.3g: they "
             "%s from now on, until trials say otherwise",
             1 / t->on_s, 1 / t->off_s, t->is_off ? "wait for their pages to come back" : "run beside the others");
}

static void say_halves(const struct tier *t, char *buf, size_t buf_bytes)
{
    snprintf(buf, buf_bytes,
             "steps in halves, of which the CPU attends to one while the GPU computes the other, bring %.3g tokens/s, "
             "whole ones %.3g: they are %s from now on, until trials say otherwise",
             1 / t->on_s, 1 / t->off_s, t->is_off ? "whole" : "run in halves");
}

const char *ways_news(const struct ways *w, uint32_t *n_seen, char *buf, size_t buf_bytes)
{
    uint32_t n_changes = w->waits.n_changes + w->halves.n_changes;

    buf[0] = '\0';
    if (n_changes != *n_seen && w->changed == WAYS_WAITS)
        say_waits(&w->waits, buf, buf_bytes);
    else if (n_changes != *n_seen)
        say_halves(&w->halves, buf, buf_bytes);
    *n_seen = n_changes;
    return buf;
}
