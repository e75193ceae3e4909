/* What --device means to subcommands that look at a GPU without an engine. */
#ifndef FERRY_CLI_WHICH_GPU_H
#define FERRY_CLI_WHICH_GPU_H

#ifdef __cplusplus
extern "C" {
#endif

enum { WHICH_GPU_NONE = -1 };

/* "cuda:N" to N, "cpu" to WHICH_GPU_NONE, "auto" to 0 if a GPU is there that can be used. ERR_ARG; ERR_UNSUPPORTED: a GPU is named, and
 * ferry was built without CUDA. */
int which_gpu(const char *device, int *number);

#ifdef __cplusplus
}
#endif
#endif
