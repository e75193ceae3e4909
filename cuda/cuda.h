/* The CUDA device: implements src/device/device.h on one GPU, or on the emulated runtime of tests/emu. */
#ifndef FERRY_CUDA_CUDA_H
#define FERRY_CUDA_CUDA_H

#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

struct cuda_opts {
    int ordinal;                 /* of the GPU */
    struct device_step most;     /* which the room for what goes up with each step is made for */
    enum device_prefill prefill; /* BLAS: prompt rows go through the tensor cores */
    bool no_graphs; /* short steps, too, are launched kernel by kernel: the same bits, more work for the host */
};

/* Memory of a GPU, as its driver sees it now, with the context that ferry works in already made. ERR_DEVICE, ERR_UNSUPPORTED. */
int cuda_memory(int ordinal, uint64_t *free_bytes, uint64_t *total_bytes);

/* What tells it from others when rates that were measured are looked at again: "compute capability 8.9, 24 multiprocessors, 8 GiB".
 * Errors as above. */
enum { CUDA_ID_BYTES = 64 };
int cuda_id(int ordinal, char id[CUDA_ID_BYTES]);

/* ERR_DEVICE (no driver, no such GPU, the driver's own words), ERR_UNSUPPORTED (too old a GPU), ERR_LIMIT (n_rows times the
 * experts of a row pass 65535), ERR_NOMEM. */
int cuda_open(const struct cuda_opts *opts, struct device **out);

/* The device's functions, without opening it: what a planner asks. */
extern const struct device_ops cuda_device_ops;

#ifdef __cplusplus
}
#endif
#endif
