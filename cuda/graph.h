/* Inside cuda/: CUDA graphs of the launches that one call makes, so that a short step costs one launch between two decisions of the
 * host. Which graph fits is told by the launches themselves: they are noted first, kernels, grids, arguments and all, and a graph is
 * used for the same again. So no address, shape or option that a launch depends on can be overlooked, and nothing has to be taken
 * back when memory or weights move: launches are others then, and an old graph is asked for no more. */
#ifndef FERRY_CUDA_GRAPH_H
#define FERRY_CUDA_GRAPH_H

#include "cuda/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A step of a model of 60 layers, whose experts lie on both sides, has some 80 runs of launches, and others for each number of
 * sequences. */
#define GRAPH_MOST 256

struct graph {
    struct cu_key key;    /* n is 0: not used */
    uint64_t asked_at;    /* the last of the cache's calls that made these launches */
    cudaGraphExec_t exec; /* own; NULL: seen once, or refused */
    bool is_refused;      /* the runtime would not make it */
};

/* Zeros to begin with. Nothing in it is allocated by ferry; the memory that a driver takes for a graph, on the device too, is its own
 * affair. One thread at a time. */
struct graph_cache {
    struct graph graphs[GRAPH_MOST];
    uint64_t n_calls;
};

/* Queue all of run->ops, as ops_launch() does: the first time launch by launch, later as a graph, where one can be had. A graph that
 * the runtime will not make (there is no memory for it) is no error, and not tried again. What run->ops read must lie in memory at the
 * same addresses for launches to be the same. The first time also brings kernels onto the device, which no capture could. */
cudaError_t graph_launch(struct graph_cache *c, const struct ops_run *run, const char **what);

/* Destroy all graphs; none may be under way. */
void graph_done(struct graph_cache *c);

#ifdef __cplusplus
}
#endif
#endif
