/* How fast a GPU is, by its own clock: its memory, the way to it, and what a prompt costs it. */
#ifndef FERRY_CLI_GAUGE_GPU_H
#define FERRY_CLI_GAUGE_GPU_H

#include "src/device/device.h"
#include "src/plan/machine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a device has to be opened for to be measured. */
extern const struct device_step gauge_gpu_step;

struct gauge_gpu_rates {
    double
        mem_bytes_per_s; /* of weights that products of one row read, none of them cached, one after another as in a step */
    double up_bytes_per_s; /* from pinned memory */
    struct machine_gpu_prompt prompt;
};

/* The middle of n_passes (at most GAUGE_MAX_PASSES) each; a pass takes milliseconds, on a slow GPU some tenths of a second. pool_bytes of
 * its memory should be several times its last cache; some 50 MiB are taken beside. dev: one with memory of its own that was opened for
 * gauge_gpu_step and DEVICE_PREFILL_INT, on which nothing is under way. ERR_NOMEM, ERR_ARG, ERR_DEVICE. */
int gauge_gpu(struct device *dev, uint64_t pool_bytes, int n_passes, struct gauge_gpu_rates *out);

#ifdef __cplusplus
}
#endif
#endif
