/* Experts that are read when they are wanted. Nobody but store.c and store_slots.c includes this. */
#ifndef FERRY_RUN_STORE_SLOTS_H
#define FERRY_RUN_STORE_SLOTS_H

#include "io/file.h"
#include "src/run/store.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store_slots;

struct store_slots_args {
    const struct store_args *args; /* view: while opening */
    struct file *const *files;     /* view until close: (n_files) */
    int n_files;
};

/* Make the slots that the plan's slot_ram_bytes give. ERR_UNSUPPORTED (no io_uring), ERR_NOMEM, ERR_LIMIT, ERR_STATE, ERR_IO. */
int store_slots_open(const struct store_slots_args *args, struct store_slots **out);
void store_slots_close(struct store_slots *s); /* takes NULL; waits for what is in flight */

/* Is there a slot for each of n_experts[layer] experts of every layer? */
bool store_slots_have_room(const struct store_slots *s, const int *n_experts);

/* While opening: read experts of a layer. Nobody wants them yet, so they are not counted as loans are. Errors as store_slots_next. */
int store_slots_read(struct store_slots *s, int layer, const int32_t *ids, int n);

/* Opening is over: what was counted so far is forgotten. Returns the bytes that were read. */
uint64_t store_slots_begin(struct store_slots *s);

/* What store.h says of store_lease, store_next and store_release; lease->layer and ids have been checked. */
int store_slots_lease(struct store_slots *s, const struct store_lease *lease);
int store_slots_next(struct store_slots *s, struct store_lease *lease, bool wait, struct store_expert *out, int max,
                     int *n_out);
bool store_slots_peek(const struct store_slots *s, int layer, int expert, struct store_expert *out);
bool store_slots_keep(struct store_slots *s, int layer, int expert);
void store_slots_hint(struct store_slots *s, int layer, const int32_t *ids, int n);
int store_slots_favourites(const struct store_slots *s, int layer, int n, int32_t *ids);
void store_slots_set_reads(struct store_slots *s, int n);
void store_slots_release(struct store_slots *s, const struct store_lease *lease);

/* Add what the slots hold, and what they read, to *stats. */
void store_slots_stats(const struct store_slots *s, struct store_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
