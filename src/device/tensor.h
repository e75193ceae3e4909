/* A tensor is a view: what the numbers are and where they lie. It owns nothing. */
#ifndef FERRY_DEVICE_TENSOR_H
#define FERRY_DEVICE_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "quant/quant.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TENSOR_MAX_DIMS 4

/* How the rows of a weight are arranged. RAW is GGUF's: row after row. */
enum tensor_layout { TENSOR_RAW = 0 };

/* ne[0] is the contiguous dimension (GGUF order): a matrix that maps n_in to n_out has ne = {n_in, n_out, 1, 1}, a stack
 * of expert matrices ne = {n_in, n_out, n_expert, 1}. stride[d] is the bytes between neighbours along dimension d >= 1
 * (stride[0] is unused). Activations are F32 or I32 and have ne = {width, rows, 1, 1}, with ne[1] the most rows a step
 * may have; how many it has is in struct rows. */
struct tensor {
    enum quant_type type;
    enum tensor_layout layout;
    int64_t ne[TENSOR_MAX_DIMS];
    uint64_t stride[TENSOR_MAX_DIMS]; /* bytes */
    void *data;                       /* view: device memory of whoever bound it; NULL while planning */
};

/* A dense tensor with those dimensions (unused ones are 1), strides filled in, data as given. The product must be known
 * to fit (files are checked in gguf.c, activations come from checked hyperparameters). */
struct tensor tensor_make(enum quant_type type, int64_t ne0, int64_t ne1, int64_t ne2, void *data);

/* Bytes from the first element to the end of the last row. */
uint64_t tensor_bytes(const struct tensor *t);

/* Start of row `row` of a matrix; of matrix `i` of a stack. */
static inline void *tensor_row(const struct tensor *t, int64_t row)
{
    return (char *)t->data + (uint64_t)row * t->stride[1];
}

static inline void *tensor_slice(const struct tensor *t, int64_t i)
{
    return (char *)t->data + (uint64_t)i * t->stride[2];
}

#ifdef __cplusplus
}
#endif
#endif
