/* Size of an activation row; every kernel table makes the same form. */
#include "cpu/kern_act.h"

#include "cpu/kern.h"
#include "src/base/size.h"

uint64_t kern_act_bytes(enum quant_act act, int64_t n)
{
    uint64_t n_elem = (uint64_t)n;
    switch (act) {
    case QUANT_ACT_Q8X32:
        return size_up(3 * n_elem + n_elem / 32 * sizeof(struct kern_act_s32), 64);
    case QUANT_ACT_Q8X256:
        return size_up(3 * n_elem + n_elem / 256 * sizeof(struct kern_act_s256), 64);
    case QUANT_ACT_F32:
    case QUANT_ACT_NONE:
        break;
    }
    return size_up(4 * n_elem, 64);
}
