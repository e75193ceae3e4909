/* Places in a device's memory for experts that are copied there for one step, each with a twin in pinned memory that it passes through.
 * A copy is queued beside the ops and waited for by those alone that read it. What has landed stays until its place is taken by
 * another, so it may be found again. Exec thread. */
#ifndef FERRY_RUN_LANDING_H
#define FERRY_RUN_LANDING_H

#include <stdbool.h>
#include <stdint.h>

#include "src/device/device.h"
#include "src/model/model.h"
#include "src/plan/offload.h"

#ifdef __cplusplus
extern "C" {
#endif

struct landing;
struct store_expert;

struct landing_args {
    const struct model *model; /* view until close, as the device */
    struct device *dev;
    int n;                   /* places; 1 at least */
    int first_fence;         /* the device's fences from here on are used: PLAN_LANDING_FENCES for each place */
    uint64_t (*clock)(void); /* nanoseconds */
    struct offload_fit *copy, *stage; /* view until close: what copies are seen to take goes there */
};

/* Makes a few copies for their times. ERR_NOMEM, ERR_DEVICE. */
int landing_open(const struct landing_args *args, struct landing **out);
void landing_close(struct landing *l); /* takes NULL; waits for what is under way */

/* A layer's experts will be computed; the device has done all that was queued before. No place is kept any more. */
void landing_begin(struct landing *l);

/* The place of an expert that is there, or on its way; -1: it has none. */
int landing_find(const struct landing *l, int layer, int expert);

/* Keep it as it is until the ops that read it are queued (landing_used). */
void landing_keep(struct landing *l, int place);

/* Copy an expert of the host's memory: by way of pinned memory, so that what e points to may be changed on return, or, if
 * e->is_pinned, from where it lies, which then has to stay as it is until the device is done with the layer, or after a failure until
 * its place is taken again. Its place is kept. *place: -1 when every place is kept, or still filled by a copy that is under way; wait:
 * until one of those is over. ERR_DEVICE: the expert has no place. */
int landing_send(struct landing *l, int layer, const struct store_expert *e, bool is_ahead, bool wait, int *place);

/* Ops that are queued from here on find it at out->w. */
int landing_use(struct landing *l, int place, struct store_expert *out);

/* All ops that read it are queued. */
int landing_used(struct landing *l, int place);

/* Nobody knows any more what lies where: the layer was not walked to its end. */
void landing_forget(struct landing *l);

struct landing_stats {
    uint64_t n_copies, bytes;        /* experts copied */
    uint64_t n_direct;               /* of these, from where they lay */
    uint64_t n_ahead, n_ahead_found; /* of these, sent ahead; and then wanted */
};
void landing_stats(const struct landing *l, struct landing_stats *out);

#ifdef __cplusplus
}
#endif
#endif
