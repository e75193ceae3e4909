/* Where a text can be in a grammar: a state is all places at once, as in J. Earley's "An Efficient Context-Free Parsing Algorithm" (CACM
 * 13(2), 1970), and a place is a node and a context, which is the set of what may come when its rule has ended. Equal sets are one, so a
 * state is a number, and where a byte leads from it is worked out once. States are kept until they take too much memory; then
 * all are forgotten, and whoever stands in one walks his text again. One thread. */
#ifndef FERRY_MODEL_GRAMMAR_WALK_H
#define FERRY_MODEL_GRAMMAR_WALK_H

#include "src/model/grammar.h"

#ifdef __cplusplus
extern "C" {
#endif

/* No sentence begins so. */
#define GRAMMAR_WALK_DEAD 0

struct grammar_place {
    uint32_t node, context;
};

/* Sets of places that are told apart by number: states, and contexts. */
struct grammar_sets {
    uint32_t *from;              /* own: (n + 1) where a set's places begin */
    struct grammar_place *place; /* own: (from[n]) */
    uint32_t *slot;              /* own: (mask + 1) open addressing; GRAMMAR_NONE: empty */
    uint32_t n, cap, cap_places, mask;
};

/* A place on the list of those to be looked at, or of what may come behind a rule; chained. */
struct grammar_todo {
    struct grammar_place place;
    uint32_t next;
};

struct grammar_walk {
    const struct grammar *g; /* view */
    uint32_t epoch;          /* how often states were forgotten */
    struct grammar_sets states, contexts;
    int32_t *to; /* own: (states.cap, n_classes); < 0: not known yet */
    struct grammar_todo *todo,
        *behind;                  /* own: places of the state that is being made; of the rules that are being called */
    uint32_t *slot;               /* own: of todo, by hash */
    uint32_t *first_behind;       /* own: (n_rules) in behind; GRAMMAR_NONE: not called */
    uint32_t *rank;               /* own: heap of the called rules' ranks */
    struct grammar_place *sorted; /* own */
    uint32_t n_todo, n_behind, n_rank, cap_todo, cap_behind, cap_rank, cap_sorted, slot_mask;
    bool accepts; /* the state that is being made */
    int rc;       /* of making it */
};

/* g (view) outlives it. ERR_NOMEM. */
int grammar_walk_make(const struct grammar *g, struct grammar_walk **out);
void grammar_walk_free(struct grammar_walk *w); /* takes NULL */

/* If states take too much memory, forget them: then the epoch is another, and no state of an earlier one may be used. */
void grammar_walk_tidy(struct grammar_walk *w);

/* The state before the first byte of a text that a rule derives; or a negative code: ERR_NOMEM, ERR_LIMIT. */
int32_t grammar_walk_start(struct grammar_walk *w, uint32_t rule);

/* Where a byte leads that no text came to yet; likewise. */
int32_t grammar_walk_find(struct grammar_walk *w, int32_t state, uint8_t byte);

/* Where a byte leads; a negative code likewise. */
static inline int32_t grammar_walk_step(struct grammar_walk *w, int32_t state, uint8_t byte)
{
    int32_t to = w->to[(uint32_t)state * (uint32_t)w->g->n_classes + w->g->class_of[byte]];

    return to >= 0 ? to : grammar_walk_find(w, state, byte);
}

/* Is what was read a whole text? */
bool grammar_walk_accepts(const struct grammar_walk *w, int32_t state);
/* Can more come? */
bool grammar_walk_goes_on(const struct grammar_walk *w, int32_t state);

#ifdef __cplusplus
}
#endif
#endif
