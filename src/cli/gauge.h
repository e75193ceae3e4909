/* How fast this machine computes: every op of a model on the CPU device, as a step would run it. */
#ifndef FERRY_CLI_GAUGE_H
#define FERRY_CLI_GAUGE_H

#include "src/plan/machine.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { GAUGE_MAX_PASSES = 15 };

/* Measure with all of m's cores and fill in m->kernels, m->ops, m->run_s and m->draw_s, from the middle of what n_passes over all of them
 * give. A pass takes some four seconds; pool_bytes of memory should be several times the last cache. ERR_NOMEM, ERR_ARG, what the device
 * says. */
int gauge_run(struct machine *m, uint64_t pool_bytes, int n_passes);

/* How much of that is left while the disk of m (one of m->disks, of the file or folder `path`) reads as fast as it can: fill in its
 * token_share and many_share. Takes some five seconds, and pool_bytes twice. ERR_NOMEM, ERR_IO, what the device says. */
int gauge_beside_disk(struct machine *m, uint64_t pool_bytes, const char *path);

/* Weights of any type: numbers whose scales are ordinary. bytes: a multiple of 8. */
void gauge_fill(void *p, uint64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
