/* Inside cuda/: one op onto the stream. */
#ifndef FERRY_CUDA_OPS_H
#define FERRY_CUDA_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "cuda/launch.h"
#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What the ops of one call of run share. */
struct ops_run {
    cudaStream_t stream;
    const struct rows *rows; /* host */
    struct cu_step step;     /* the same in device memory; out_row is NULL */
    const int32_t *out_row;  /* device */
    const struct cu_books *books;
    char *scratch; /* device */
    enum device_prefill prefill;
    const struct op *ops; /* view: the whole list of this call */
    int n_ops;
    /* The lists of the call's MOE op, in device memory; a call has one at most. */
    const struct cu_expert *experts;
    const struct cu_tile *tiles;
    const int32_t *slot;
    int n_tiles, n_place;
};

/* Has it kernels for the op's types and shapes? */
bool ops_can(const struct op *op);

/* Device memory that the op needs beside its tensors, with at most that many rows. */
uint64_t ops_scratch_bytes(const struct op *op, int n_rows);

/* Queue all of run->ops in order. What the runtime said; *what: of which op, if it was an error. */
cudaError_t ops_launch(const struct ops_run *run, const char **what);

/* Experts whose rows are many share their weights among so many of them. */
int ops_tile_tok(int n_rows);

#ifdef __cplusplus
}
#endif
#endif
