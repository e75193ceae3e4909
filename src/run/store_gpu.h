/* Weights in the memory of a device that has its own: dense ones and, of each layer, places for some experts. Nobody but store.c and
 * store_gpu.c includes this. */
#ifndef FERRY_RUN_STORE_GPU_H
#define FERRY_RUN_STORE_GPU_H

#include "io/file.h"
#include "src/run/store.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store_gpu;

struct store_gpu_args {
    const struct store_args *args; /* view: while opening; its model and device until close */
    struct file *const *files;     /* view: while opening: (n_files) */
    int n_files;
};

/* Take the device's memory for what the plan says it holds, and read that into it. *load_bytes: how many were read. ERR_NOMEM,
 * ERR_DEVICE, what store_load_run says. */
int store_gpu_open(const struct store_gpu_args *args, uint64_t *load_bytes, struct store_gpu **out);
void store_gpu_close(struct store_gpu *g); /* takes NULL */

/* A dense weight's address there, NULL: it has none; of a stack of experts where its places begin. */
const void *store_gpu_weight(const struct store_gpu *g, int weight);

uint64_t store_gpu_bytes(const struct store_gpu *g);

/* A loan of these experts of a layer begins. The device is done with what earlier ones lent. */
void store_gpu_begin(struct store_gpu *g, int layer, const int32_t *ids, int n);

/* An expert of the present loan has been read and computed by the host: it shall move to the device, if none does yet and it is wanted
 * clearly more than one that has a place there and is not on loan. */
void store_gpu_offer(struct store_gpu *g, int layer, int expert);

/* Is a move under way, and which expert's bytes are wanted for it? */
bool store_gpu_is_moving(const struct store_gpu *g);
bool store_gpu_wants(const struct store_gpu *g, int *layer, int *expert);

/* Stage and send off one piece of what is wanted (e: where it lies now; NULL: no longer in memory, so that the move is given up), or see
 * whether all of it has come: then it is lent from there from now on. Between loans. *is_more: there are pieces left. ERR_DEVICE:
 * whoever had that place has none now. */
int store_gpu_move_on(struct store_gpu *g, const struct store_expert *e, bool *is_more);

/* Set what *out says of moves. */
void store_gpu_stats(const struct store_gpu *g, struct store_stats *out);

/* Places of a layer. */
int store_gpu_n_experts(const struct store_gpu *g, int layer);

/* Where an expert's matrices are; false: it has no place. */
bool store_gpu_find(const struct store_gpu *g, int layer, int expert, struct store_expert *out);

#ifdef __cplusplus
}
#endif
#endif
