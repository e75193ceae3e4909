/* The host's layers, computed by the device for a step of many rows: arithmetic on the host would take longer than their weights need to
 * come up. They do, a product's while the one before is computed; attention stays with the host, where the pages lie. */
#ifndef FERRY_RUN_LIFT_H
#define FERRY_RUN_LIFT_H

#include <stdbool.h>

#include "src/device/device.h"
#include "src/model/lift_shape.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store;
struct trace;

struct lift_stats {
    uint64_t n_steps;
    uint64_t weight_bytes;         /* that came up */
    uint64_t down_bytes, up_bytes; /* rows: queries, keys and values; what goes in, and attention's results */
};

struct lift {
    struct device *dev, *host;          /* views */
    const struct program *host_program; /* view: the same ops, in the host's memory */
    struct program *program;            /* own: bound to the device's memory; NULL: layers are not lifted */
    int *products;                      /* own: (shape.n_products) their ops */
    const struct store *store;          /* view */
    struct trace *trace;                /* view; may be NULL */
    struct lift_shape shape;
    char *memory;          /* own, the device's: (shape.bytes) */
    void *pinned;          /* view: the weights in the host's memory, if they are pinned; else NULL */
    uint64_t pinned_bytes; /* of them */
    int first_fence;
    int n_sent; /* products of this step whose weights are on their way, or there */
    struct lift_stats stats;
};

struct lift_args {
    struct program *program;            /* taken over, also on failure: of the host's layers, not bound */
    const struct program *host_program; /* view until lift_done, as all here; bound */
    struct device *dev, *host;
    const struct store *store;
    struct trace *trace; /* may be NULL */
    void *arena;         /* of the device: (program->arena_bytes) */
    int first_fence;     /* of LIFT_FENCES that nobody else uses */
};
enum { LIFT_FENCES = 2 * LIFT_ROOMS };

/* ERR_NOMEM, ERR_DEVICE. Where the system does not let the weights be pinned, lift_is_on says no. */
int lift_init(struct lift *l, const struct lift_args *args);
void lift_done(struct lift *l);

static inline bool lift_is_on(const struct lift *l)
{
    return l->pinned != NULL;
}

/* Run all ops. rows: with the host's pages; keys and values go there. The result is at program->x, queued. cancel as exec_run's. What the
 * devices say; then ops may be queued until the device is waited for. */
int lift_run(struct lift *l, const struct rows *rows, const int *cancel);

#ifdef __cplusplus
}
#endif
#endif
