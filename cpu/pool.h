/* A team of threads that do one job together: worker 0 is the caller, the others wait between jobs. */
#ifndef FERRY_CPU_POOL_H
#define FERRY_CPU_POOL_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct pool;

typedef void pool_fn(int worker, void *arg);

/* Most threads of a team. */
#define POOL_MAX_THREADS 1024

/* Start n_threads - 1 threads; with `pin` every worker gets a core of its own among those that the calling thread may run
 * on, as long as there are enough. pool_close() ends them. ERR_ARG, ERR_NOMEM, ERR_LIMIT when a thread cannot be made. */
int pool_open(int n_threads, bool pin, struct pool **out);

/* Jobs come after something else that takes some 100 us: wait for the next one awake as long as they do, where there is a core for each
 * worker. Where they come later, waiting is as short as else. */
void pool_stay_awake(struct pool *pool);

/* End the threads and free the team. Takes NULL. Not from inside a job. */
void pool_close(struct pool *pool);

int pool_n_threads(const struct pool *pool);

/* Every worker runs fn(worker, arg); returns when all have. The caller is worker 0, and is pinned only meanwhile, so that
 * threads it makes elsewhere inherit nothing. Allocates nothing. One thread at a time. */
void pool_run(struct pool *pool, pool_fn *fn, void *arg);

/* Inside a job: wait until all workers are here. Whoever comes last runs serial(its number, arg) (may be NULL) while the
 * others still wait: work too small to share costs no barrier of its own. Claims begin anew. */
void pool_barrier(struct pool *pool, int worker, pool_fn *serial, void *arg);

/* Inside a job: one of the items [0, n) that nobody has claimed since the last barrier; n when none is left. A worker gets
 * its own n / n_threads neighbours in order, so that it reads weights as one stream, and then what others have not begun.
 * Between two barriers all workers claim from the same n; not from within `serial`. */
int64_t pool_claim(struct pool *pool, int worker, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
