/* The arithmetic of tensor views. */
#include "src/device/tensor.h"

struct tensor tensor_make(enum quant_type type, int64_t ne0, int64_t ne1, int64_t ne2, void *data)
{
    struct tensor t = {.type = type, .layout = TENSOR_RAW, .ne = {ne0, ne1, ne2, 1}, .data = data};
    t.stride[1] = quant_row_bytes(type, ne0);
    t.stride[2] = t.stride[1] * (uint64_t)ne1;
    t.stride[3] = t.stride[2] * (uint64_t)ne2;
    return t;
}

uint64_t tensor_bytes(const struct tensor *t)
{
    uint64_t row = quant_row_bytes(t->type, t->ne[0]);
    uint64_t bytes = row;
    for (int d = 1; d < TENSOR_MAX_DIMS; d++)
        bytes += t->stride[d] * (uint64_t)(t->ne[d] - 1);
    return bytes;
}
