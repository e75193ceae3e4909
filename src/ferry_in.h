/* Between the files of the public API: what an engine owns. */
#ifndef FERRY_FERRY_IN_H
#define FERRY_FERRY_IN_H

#include "src/ferry.h"
#include "src/plan/machine.h"
#include "src/plan/plan.h"
#include "src/plan/plan_batch.h"
#include "src/plan/refit.h"
#include "src/run/sample.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ferry_engine {
    struct machine machine;
    struct plan plan;
    struct plan_batch_point batch; /* with plan.kv_tok: what was predicted of it; tok_per_s 0: nothing */
    struct model *model;           /* own, as all below */
    struct tok *tok;               /* NULL: ids only */
    struct tok_trie *trie;         /* made with the first grammar; NULL: not yet */
    struct trace *trace;           /* NULL: not kept */
    struct store *store;
    struct device *device;
    struct device *host; /* the CPU beside a GPU that holds some of the experts; otherwise NULL */
    char isa[48];        /* who computes, for people */
    struct cache *cache;
    struct exec *exec;
    struct refit refit;
    struct tune_seen seen; /* generated so far: by sessions, or in full steps of a batch */
    bool trace_experts;
    char *spill_dir;            /* own; NULL: none */
    struct template_code *chat; /* made when first asked for; NULL: not yet */
};

struct ferry_session {
    struct ferry_engine *engine; /* view */
    struct session *s;           /* own */
};

/* Tokens were generated between two totals: hold them against what was predicted. */
void ferry_see(struct ferry_engine *e, const struct tune_seen *before, const struct tune_seen *after);

/* Sampler options as the rooms below have them. ERR_ARG: the caller's struct is larger than ours. */
int ferry_sample_options(const struct ferry_sample_opts *in, struct sample_opts *out);

#ifdef __cplusplus
}
#endif
#endif
