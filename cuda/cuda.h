/* The CUDA device: implements src/device/device.h on one GPU, or on the emulated runtime of tests/emu. */
#ifndef FERRY_CUDA_CUDA_H
#define FERRY_CUDA_CUDA_H

#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The largest step, which the room for what goes up with each is made for. */
struct cuda_opts {
    int ordinal; /* of the GPU */
    int n_rows, n_seqs;
    int64_t n_ctx;               /* positions of a sequence */
    int n_expert, n_expert_used; /* 0: no experts */
    enum device_prefill prefill; /* BLAS: prompt rows go through the tensor cores */
};

/* ERR_DEVICE (no driver, no such GPU, the driver's own words), ERR_UNSUPPORTED (too old a GPU), ERR_LIMIT (n_rows times the
 * experts of a row pass 65535), ERR_NOMEM. */
int cuda_open(const struct cuda_opts *opts, struct device **out);

/* The device's functions, without opening it: what a planner asks. */
extern const struct device_ops cuda_device_ops;

#ifdef __cplusplus
}
#endif
#endif
