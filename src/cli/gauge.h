/* How fast this machine computes: every op of a model on the CPU device, as a step would run it. */
#ifndef FERRY_CLI_GAUGE_H
#define FERRY_CLI_GAUGE_H

#include "src/plan/machine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Measure with all of m's cores and fill in m->kernels, m->ops and m->run_s. Takes some seconds and pool_bytes of memory,
 * which should be several times the last cache. ERR_NOMEM, what the device says. */
int gauge_run(struct machine *m, uint64_t pool_bytes);

#ifdef __cplusplus
}
#endif
#endif
