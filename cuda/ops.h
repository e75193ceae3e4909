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

/* Slots of an MOE op, grouped by expert, and tiles that cut them, in device memory. n_listed: as in cu_mat_args. */
struct ops_slots {
    const int32_t *slot;
    const struct cu_tile *tiles;
    const int32_t *n_listed;
    int n_place, n_tiles, tile_tok;
};

/* What the ops of one call of run share. */
struct ops_run {
    cudaStream_t stream;
    const struct rows *rows; /* host */
    struct cu_step step;     /* the same in device memory; out_row is NULL */
    int n_stretches;         /* of step.stretch */
    const int32_t *out_row;  /* device */
    const struct cu_books *books;
    char *scratch; /* device */
    enum device_prefill prefill;
    struct cu_card card;
    const struct op *ops; /* view: the whole list of this call */
    int n_ops;
    /* The lists of the call's MOE op, in device memory; a call has one at most. */
    const struct cu_expert *experts;
    struct ops_slots dots, gemm; /* those of rows that integer dots multiply, and tensor cores */
};

/* What kernels want to know of a GPU, which is the one chosen; those that are launched with this option get the shared memory that they ask
 * for. */
cudaError_t ops_card(int gpu, enum device_prefill prefill, struct cu_card *card);

/* Has it kernels for the op's types and shapes? */
bool ops_can(const struct op *op);

/* Do the op's weights, its experts' too, lie where kernels can read them? Blocks are read by the largest power of two that divides their
 * size, 16 at most. */
bool ops_can_read(const struct op *op);

/* Device memory that the op needs beside its tensors, with at most that many rows. */
uint64_t ops_scratch_bytes(const struct op *op, int n_rows);

/* Queue all of run->ops in order. What the runtime said; *what: of which op, if it was an error. */
cudaError_t ops_launch(const struct ops_run *run, const char **what);

/* Among how many of n_places places of n_mats matrices each reading of weights is shared by integer dots, in a step of n_rows rows. */
int ops_tile_tok(int n_rows, int n_places, int n_mats);

/* The first so many of a step's rows go through the tensor cores at an MOE op: all of a prompt or none, whichever experts are listed.
 * *tile_tok: among how many of them weights are shared. */
int ops_moe_gemm_rows(const struct ops_run *run, const struct op *op, int *tile_tok);

#ifdef __cplusplus
}
#endif
#endif
