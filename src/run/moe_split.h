/* Layers whose experts GPU and CPU share: which of the misses are copied to the GPU, by what both ways were measured to take
 * (plan/offload.h), and the measuring. moe.c walks the layer as it says. Exec thread. */
#ifndef FERRY_RUN_MOE_SPLIT_H
#define FERRY_RUN_MOE_SPLIT_H

#include "src/device/device.h"
#include "src/model/model.h"
#include "src/plan/offload.h"
#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

struct landing;
struct store;
struct store_expert;

struct moe_split_args {
    const struct model *model; /* view until moe_split_done, as all here */
    struct store *store;
    struct device *dev;
    const struct plan *plan;           /* copied: copies, landings */
    const struct offload_rates *rates; /* copied: what is thought of costs before any is measured */
    uint64_t (*clock)(void);           /* nanoseconds */
};

/* Experts, each counted in every step that wanted it. */
struct moe_split_stats {
    uint64_t n_gpu, n_copied, n_cpu; /* on the GPU already; copied; computed by the CPU */
    uint64_t n_read;                 /* of the latter two, from disk */
    double predicted_s, measured_s;  /* of layers where both are known */
};

/* A layer's marks on the device's clock. */
enum moe_split_mark {
    MOE_SPLIT_LAYER_FROM, /* the choice is made */
    MOE_SPLIT_HITS_FROM,  /* around what lies on the GPU */
    MOE_SPLIT_HITS_TO,
    MOE_SPLIT_COPIED_FROM, /* around the last of what was copied */
    MOE_SPLIT_COPIED_TO,
    MOE_SPLIT_LAYER_TO, /* both sides have met */
    MOE_SPLIT_ROUTED,   /* the router has chosen */
    MOE_SPLIT_N_MARKS
};

struct moe_split {
    struct moe_split_args a;
    struct plan_gpu gpu;     /* the plan's */
    struct landing *landing; /* own; NULL: nothing is ever copied */
    struct offload_fit cpu, gpu_fit, copy, stage, read;
    bool is_off; /* the GPU computes no experts for now */
    /* The layer that is being computed */
    int32_t *lend; /* own: (n_expert) n_lend of its ids that the store shall lend: all but those that have landed */
    int32_t *landed, *landed_at;   /* own: (n_expert) n_landed others, and their places */
    int32_t *miss_ids;             /* own: (n_expert) those that are not on the GPU */
    struct offload_expert *misses; /* own: (n_expert) beside them */
    int *order;                    /* own: (n_expert) */
    bool *is_copied;               /* own: (n_expert) by id: goes to the GPU */
    int n_lend, n_landed, n_on_device, n_copies;
    struct {
        bool is_open, has_hits, has_copied;
        double hits_mib, hits_rows, copied_mib, copied_rows; /* MiB, MiB * rows: what lies between the marks */
        double predicted_s;
    } seen;                       /* measured at the next settle */
    uint64_t disk_bytes, disk_ns; /* the store's, as of the last settle */
    struct moe_split_stats stats;
};

/* ERR_NOMEM, ERR_DEVICE. On failure there is nothing to be done with it. */
int moe_split_init(struct moe_split *s, const struct moe_split_args *args);
void moe_split_done(struct moe_split *s); /* a zeroed one, too */

/* The device has done all that was queued: learn from the last layer's times. ERR_DEVICE. */
int moe_split_settle(struct moe_split *s);

/* What the router chose: ids (n), and by id the rows of each. */
struct moe_split_layer {
    int layer, n;
    const int32_t *ids, *n_rows;
    double row_mib;
};

/* Decide who computes what. ERR_DEVICE. */
int moe_split_choose(struct moe_split *s, const struct moe_split_layer *layer);

int moe_split_mark(struct moe_split *s, enum moe_split_mark mark);

/* Has the device passed the mark ROUTED? ERR_DEVICE. */
int moe_split_is_routed(struct moe_split *s, bool *is_routed);

/* What was just queued between two marks, or computed by the CPU in `ns`. */
void moe_split_saw_hits(struct moe_split *s, double mib, double mib_rows);
void moe_split_saw_copied(struct moe_split *s, double mib, double mib_rows);
void moe_split_saw_cpu(struct moe_split *s, double mib, double mib_rows, uint64_t ns);

/* The layer was not walked to its end. */
void moe_split_abandon(struct moe_split *s);

/* Would moe_split_send_ahead send any? */
bool moe_split_sends_ahead(const struct moe_split *s);

/* Until the router's choice (mark ROUTED) is known, copy those of the likely (n) experts of a layer that are in memory: as many as the
 * layer before found worth it. ERR_DEVICE. */
int moe_split_send_ahead(struct moe_split *s, int layer, const int32_t *likely, int n);

#ifdef __cplusplus
}
#endif
#endif
