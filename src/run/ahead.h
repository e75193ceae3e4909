/* Guesses which experts the next layer will want, while this one's are computed: the next layer's router on this layer's
 * input, which the residual stream changes little from layer to layer. A guess moves bytes sooner and decides nothing else. */
#ifndef FERRY_RUN_AHEAD_H
#define FERRY_RUN_AHEAD_H

#include <stdint.h>

#include "src/device/device.h"
#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store;

/* Steps of more rows than this (prompts) want nearly all experts: there is nothing to guess. */
#define AHEAD_MAX_ROWS 4

struct ahead {
    const struct model *model; /* view */
    float *x;                  /* own: (n_embd) */
    float *score;              /* own: (n_expert) */
    int32_t *ids;              /* own: (AHEAD_MAX_ROWS * n_expert_used) */
};

/* ERR_NOMEM. A dense model takes nothing. */
int ahead_init(const struct model *m, struct ahead *out);
void ahead_done(struct ahead *a);

/* The experts of the layer after `layer` that these rows of its router's input make likely: *ids, a view until the next call,
 * each once. Returns how many; 0 when nothing can be said: many rows, no such layer, a router of another kind than F32 without
 * selection bias. */
int ahead_guess(struct ahead *a, const struct store *store, int layer, const struct tensor *x, int n_rows,
                const int32_t **ids);

#ifdef __cplusplus
}
#endif
#endif
