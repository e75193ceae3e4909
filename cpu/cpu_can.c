/* What the CPU device accepts. Kernels check nothing: whatever passes here must be safe to run. */
#include "cpu/cpu_can.h"

#include "cpu/kern.h"
#include "cpu/walk.h"
#include "src/device/device_check.h"

#include <stddef.h>

static bool has_kernel(const struct tensor *w)
{
    return kern_ref.mat[w->type] != NULL;
}

bool cpu_can(const struct op *op)
{
    if (!device_check_shapes(op))
        return false;
    if (op->kind == OP_ROUTE)
        return op->p.route.n_expert <= CPU_ROWS_MAX_EXPERTS;
    if (op->kind == OP_MOE)
        return op->w[0]->ne[2] <= CPU_ROWS_MAX_EXPERTS && has_kernel(op->w[0]) && has_kernel(op->w[1]) &&
               has_kernel(op->w[2]);
    bool is_matmul = op->kind == OP_MATMUL || op->kind == OP_MATMUL_HEADS;
    for (int i = 0; is_matmul && i < op->n_w; i++)
        if (!has_kernel(op->w[i]))
            return false;
    return true;
}
