/* How fast uses of experts shall fade (evict.h) is different for every model, text and number of slots. So the slots of some layers are
 * simulated with several half-lives at once, and the one that has missed least of late is used for all: dynamic
 * selection by sampled shadow directories (Qureshi, Jaleel, Patt, Steely, Emer: Adaptive Insertion Policies for High Performance
 * Caching, ISCA 2007, whose sets are layers here). A pure function of the loans, so that a recorded trace can be replayed. */
#ifndef FERRY_RUN_ADAPT_H
#define FERRY_RUN_ADAPT_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ADAPT_N = 4 };

/* Steps after which a use counts half: near recency, which is best where a text keeps to some experts for a while; and near frequency,
 * best where slots are few and the router has favourites. Between them nothing lies that one of them does not come close to
 * (tests/results/stream.md). */
extern const int adapt_half_steps[ADAPT_N];

struct adapt;

/* Slots that n_layers layers of at most n_experts experts each share. ERR_NOMEM. */
int adapt_open(int n_slots, int n_layers, int n_experts, struct adapt **out);
void adapt_close(struct adapt *a); /* takes NULL */

/* A loan of ids (n), small enough to be kept (evict.h), of the layer'th of these layers, in this step (they count up). Returns the index
 * in adapt_half_steps that is to be used from now on. */
int adapt_loan(struct adapt *a, uint64_t step, int layer, const int32_t *ids, int n);

#ifdef __cplusplus
}
#endif
#endif
