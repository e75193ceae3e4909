/* Names of ops. */
#include "src/device/device.h"

const char *device_op_name(enum op_kind kind)
{
    static const char *const names[OP_N_KIND] = {
#define OP(NAME, text) text,
#include "src/device/ops.def"
#undef OP
    };
    return (unsigned)kind < OP_N_KIND ? names[kind] : "?";
}
