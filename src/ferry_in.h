/* Between the files of the public API: what an engine owns. */
#ifndef FERRY_FERRY_IN_H
#define FERRY_FERRY_IN_H

#include "src/ferry.h"
#include "src/plan/machine.h"
#include "src/plan/plan.h"
#include "src/run/sample.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ferry_engine {
    struct machine machine;
    struct plan plan;
    struct model *model; /* own, as all below */
    struct tok *tok;     /* NULL: ids only */
    struct trace *trace; /* NULL: not kept */
    struct store *store;
    struct device *device;
    struct device *host; /* the CPU beside a GPU that holds some of the experts; otherwise NULL */
    char isa[48];        /* who computes, for people */
    struct cache *cache;
    struct exec *exec;
    bool trace_experts;
    char *spill_dir;            /* own; NULL: none */
    struct template_code *chat; /* made when first asked for; NULL: not yet */
};

/* Sampler options as the rooms below have them. ERR_ARG: the caller's struct is larger than ours. */
int ferry_sample_options(const struct ferry_sample_opts *in, struct sample_opts *out);

#ifdef __cplusplus
}
#endif
#endif
