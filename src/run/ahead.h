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

/* The router is asked for steps of so many rows. Prompts, from so many rows on, want nearly all experts, or those that were wanted often
 * before: with independent choices 7 to 9 of 10 of these are wanted again. Between the two, wrong guesses cost more than the little
 * time that the disk has left. */
enum { AHEAD_MAX_ROWS = 4, AHEAD_PROMPT_ROWS = 64 };

struct ahead {
    const struct model *model; /* view */
    const struct store *store; /* view */
    struct model_span span;    /* whose layers */
    struct device *dev;        /* view: multiplies, in the host's memory */
    int n_likely;              /* of a row's experts so many are named, the likeliest; may be changed between steps */
    const float **router; /* own: (n_layer) views of (n_expert, n_embd) in the host's memory; NULL: cannot be asked */
    const float *
        *bias; /* own: (n_layer) the same of (n_expert), which is added to what the router says; NULL: there is none */
    const float **norm; /* own: (n_layer) the same of (n_embd), which the router reads behind; NULL: there is none */
    float *copies;      /* own: (plan_ahead_bytes()) where weights lie in a device's memory; else NULL */
    float *x, *kept;    /* own: (AHEAD_MAX_ROWS, n_embd) */
    float *score;       /* own: (AHEAD_MAX_ROWS, n_expert) */
    int32_t *ids;       /* own: (n_expert, and AHEAD_MAX_ROWS * n_expert_used) */
};

/* For the layers of a span. The store is looked at, now and by guesses; its weights are views. cpu: a device
 * whose memory is the host's, with scratch for a MATMUL of AHEAD_MAX_ROWS rows by a router. ERR_NOMEM; ERR_DEVICE where weights have to
 * be copied from one. A dense model takes nothing. */
int ahead_init(const struct model *m, struct model_span span, const struct store *store, struct device *cpu,
               int n_likely, struct ahead *out);
void ahead_done(struct ahead *a);

/* What is known of a layer when its router has chosen. */
struct ahead_from {
    int layer;
    const struct tensor *x; /* its router's input, view, in the host's memory: (n_rows, n_embd) */
    int n_rows, n_ids;      /* n_ids: different experts chosen */
};

/* The experts of the layer after this one that are likely: *ids, a view until the next call, each once. Returns how many. Behind a few
 * rows, what the router names; behind a layer that wanted nearly all, all; behind another layer of a prompt, as many as that wanted,
 * of those wanted most so far (not beside a device). 0 when nothing can be said: other numbers of rows, no such layer among the span's,
 * a router of another kind than F32 without selection bias. < 0: what the device says. */
int ahead_guess(struct ahead *a, const struct ahead_from *from, const int32_t **ids);

/* Would ahead_guess ask the router, which takes its time? Otherwise it only counts. */
bool ahead_asks_router(const struct ahead_from *from);

/* Copy the rows of *from, at most AHEAD_MAX_ROWS of F32, and let it name them there until the next call: for a guess later on, when
 * there is time for it. */
void ahead_keep(struct ahead *a, struct ahead_from *from, struct tensor *rows);

#ifdef __cplusplus
}
#endif
#endif
