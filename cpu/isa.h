/* Which kernel table this machine gets. */
#ifndef FERRY_CPU_ISA_H
#define FERRY_CPU_ISA_H

#include <stdbool.h>

#include "cpu/kern.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Names of the tables compiled in, best first, NULL-terminated. Static data. */
const char *const *isa_names(void);

/* Compiled in, and this machine (CPU and operating system) can run it. */
bool isa_has(const char *name);

/* The table of that name, or the best one for NULL. ERR_UNSUPPORTED when the machine lacks it or nobody knows the name. */
int isa_choose(const char *name, const struct kern_table **out);

#ifdef __cplusplus
}
#endif
#endif
