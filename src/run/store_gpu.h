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

/* A dense weight's address there; of a stack of experts where its places begin. */
const void *store_gpu_weight(const struct store_gpu *g, int weight);

uint64_t store_gpu_bytes(const struct store_gpu *g);

/* A loan of these experts of a layer begins: what has been brought meanwhile is there from now on. ERR_DEVICE. */
int store_gpu_begin(struct store_gpu *g, int layer, const int32_t *ids, int n);

/* An expert of the present loan has been read and computed by the host: bring it to the device in the background, if it is wanted more
 * than one that has a place there and is not on loan. ERR_DEVICE: whoever had that place has none now. */
int store_gpu_offer(struct store_gpu *g, int layer, const struct store_expert *expert);

uint64_t store_gpu_n_moves(const struct store_gpu *g);

/* Places of a layer. */
int store_gpu_n_experts(const struct store_gpu *g, int layer);

/* Where an expert's matrices are; false: it has no place. */
bool store_gpu_find(const struct store_gpu *g, int layer, int expert, struct store_expert *out);

#ifdef __cplusplus
}
#endif
#endif
