/* Filling the store's memory at open. Nobody but store.c and store_load.c includes this. */
#ifndef FERRY_RUN_STORE_LOAD_H
#define FERRY_RUN_STORE_LOAD_H

#include "io/file.h"
#include "src/model/layout.h"
#include "src/run/store.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store_load {
    const struct store_args *args; /* view */
    const struct layout *layout;   /* view */
    struct file *const *files;     /* view: (n_files) */
    int n_files;
    /* View: (layout.bytes) LAYOUT_BLOCK_BYTES-aligned, where weights shall lie; with dev: (PLAN_STAGE_BYTES), which they pass through */
    char *memory;
    struct device *dev; /* view; NULL: the weights' place is memory */
    char *dev_memory;   /* view: (layout.bytes) of dev: their place */
};

/* Lay memory for weights (mapped, not written to yet) on the NUMA nodes of the plan. ERR_UNSUPPORTED: the system refuses it, though it
 * had not when the machine was looked at. */
int store_load_place(const struct plan *plan, void *memory, uint64_t bytes);

/* Read every range of the layout into its place. ERR_DEVICE; *bytes: how many were read. ERR_IO, ERR_CANCEL, ERR_UNSUPPORTED (no
 * io_uring), ERR_STATE, ERR_NOMEM. */
int store_load_run(const struct store_load *l, enum plan_io io, uint64_t *bytes);

#ifdef __cplusplus
}
#endif
#endif
