/* Which ways the steps of a batch go, where the GPU holds the pages of some sequences only: do the others sit out until theirs have come
 * back, and is a step run in halves, so that the CPU attends to one while the GPU computes the other (the choice of src/plan/apex.h)?
 * Both begin as the plan says and go on by measured steps, one trial at a time. A pure state: numbers and times come in. */
#ifndef FERRY_RUN_WAYS_H
#define FERRY_RUN_WAYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/run/tier.h"

#ifdef __cplusplus
extern "C" {
#endif

struct plan;

/* Sequences that want a row of the next step. */
struct ways_step {
    int n_near, n_far; /* that draw in any case; that may wait for their pages */
    int n_host;        /* that draw and have pages in the host's memory */
    bool has_prompt;   /* some are being read */
};

enum ways_choice { WAYS_WAITS, WAYS_HALVES };

struct ways {
    struct tier waits, halves;   /* off: they wait; steps are whole. Seconds a row */
    bool has_halves;             /* the plan's */
    int waits_kind, halves_kind; /* of this step, for either's trials */
    bool is_waiting, is_halved;  /* this step */
    enum ways_choice changed;    /* the one that last was */
};

void ways_init(struct ways *w, const struct plan *plan);

/* Before a step: sets is_waiting and is_halved. Nobody waits where nobody would be left. */
void ways_begin(struct ways *w, const struct ways_step *step);

/* Those who do not wait found no room: so nobody waits in this step. */
void ways_let_all(struct ways *w);

/* The step is over, after so many seconds a row. One that failed is not told. */
void ways_end(struct ways *w, double seconds);

/* One line for a person, without its end, when a way has been changed since *n_seen changes, which is brought up to date: what was
 * measured and what is done now. "" when nothing has changed. Returns buf. */
const char *ways_news(const struct ways *w, uint32_t *n_seen, char *buf, size_t buf_bytes);

#ifdef __cplusplus
}
#endif
#endif
