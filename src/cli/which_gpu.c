/* Owns the meaning of a device's name, and whether there is one. */
#include "src/cli/which_gpu.h"

#ifdef FERRY_HAVE_CUDA
#include "cuda/cuda.h"
#endif
#include "src/base/err.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static bool has_gpu(void)
{
#ifdef FERRY_HAVE_CUDA
    uint64_t free_bytes, total_bytes;
    bool is_there = cuda_memory(0, &free_bytes, &total_bytes) == 0;
    err_clear();
    return is_there;
#else
    return false;
#endif
}

int which_gpu(const char *device, int *number)
{
    int end = 0;

    *number = WHICH_GPU_NONE;
    if (!strcmp(device, "cpu"))
        return 0;
    if (!strcmp(device, "auto")) {
        *number = has_gpu() ? 0 : WHICH_GPU_NONE;
        return 0;
    }
    if (sscanf(device, "cuda:%4d%n", number, &end) != 1 || device[end] || *number < 0)
        return err(ERR_ARG, "--device %.40s: expected auto, cpu or cuda:N", device);
#ifdef FERRY_HAVE_CUDA
    return 0;
#else
    return err(ERR_UNSUPPORTED, "device cuda:%d: this ferry was built without CUDA", *number);
#endif
}
