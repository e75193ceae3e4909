/* Owns which weights stay and which come up. */
#include "src/model/lift_shape.h"

#include "src/base/size.h"

const struct tensor *lift_shape_weight(const struct op *op, int i)
{
    return op->kind == OP_EMBED ? NULL : op->w[i];
}

bool lift_shape_is_product(const struct op *op)
{
    return op->kind == OP_MATMUL || op->kind == OP_MATMUL_HEADS;
}

static uint64_t weights_bytes(const struct op *op)
{
    uint64_t bytes = 0;

    for (int i = 0; i < OP_MAX_IO; i++) {
        const struct tensor *w = lift_shape_weight(op, i);
        bytes += w ? size_up(tensor_bytes(w), LIFT_ALIGN) : 0;
    }
    return bytes;
}

void lift_shape_of(const struct program *p, struct lift_shape *out)
{
    *out = (struct lift_shape){.n_products = 0};
    for (int i = 0; i < p->n_ops; i++) {
        uint64_t bytes = weights_bytes(&p->ops[i]);
        if (!lift_shape_is_product(&p->ops[i])) {
            out->small_bytes += bytes;
            continue;
        }
        out->n_products++;
        out->room_bytes = bytes > out->room_bytes ? bytes : out->room_bytes;
    }
    out->bytes = out->small_bytes + LIFT_ROOMS * out->room_bytes;
}

uint64_t lift_shape_up_bytes(const struct program *p)
{
    uint64_t bytes = 0;

    for (int i = 0; i < p->n_ops; i++)
        bytes += lift_shape_is_product(&p->ops[i]) ? weights_bytes(&p->ops[i]) : 0;
    return bytes;
}
