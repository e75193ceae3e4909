/* Seconds and bytes of one placement: pure arithmetic on a plan, the ops of its model and the rates of a machine. Fits
 * nothing to runs: every number comes from the machine (probe) or is counted. */
#ifndef FERRY_PLAN_COST_H
#define FERRY_PLAN_COST_H

#include "src/model/program.h"
#include "src/plan/apex.h"
#include "src/plan/offload.h"
#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- pieces ---- */

/* n_rows rows (as an average: need not be whole) times one matrix, on n_threads; without what the op costs by itself.
 * Negative: the kernel's rate is not known. */
double cost_matmul_s(const struct machine *m, int n_threads, const struct tensor *w, double n_rows);

/* Matrices of each of an op's weights that all its rows are multiplied with; 0: of none. Experts do not count. */
int cost_n_matrices(const struct op *op);

/* What an op's own time grows with: elements of its result; query-key elements of attention, for rows that follow `pos` others. */
double cost_op_units(const struct op *op, double n_rows, double pos);

/* Reading n experts (as an average) from disk, at the plan's pace. */
double cost_read_s(const struct machine *m, const struct plan *p, double expert_bytes, double n);

/* How a router with n_expert experts of which k are chosen spreads its choice. skew: its rows differ in length by exp(skew * z),
 * z normal; 0: all experts alike (tools/make-synthetic --router-skew makes such routers). Choices are taken for independent
 * from token to token. */
struct cost_router {
    double *chosen; /* own: (n_expert) how likely a token wants it; their sum is k */
    int n_expert, k;
};
int cost_router_init(int n_expert, int k, double skew, struct cost_router *out); /* ERR_NOMEM */
void cost_router_done(struct cost_router *r);

/* The share of wanted experts found in slots for `share` of all, those with the least faded counts of uses going first, as in the store
 * (run/evict.h), long after the start: a slot has who is above the count that as many as there are slots exceed, on average. */
double cost_router_hits(const struct cost_router *r, double share);

/* Different experts that n_rows tokens want, on average. */
double cost_router_distinct(const struct cost_router *r, double n_rows);

/* ---- a step ---- */

struct cost_step {
    double dense_s, expert_s; /* computing */
    double disk_s;            /* reading, at the rate for so many reads in flight */
    double s;                 /* together, with what overlaps; 0: not known */
    double missed_bytes;      /* read from disk */
};

struct cost_args {
    const struct machine *machine;
    const struct plan *plan;       /* counted: bytes, slots, io */
    const struct program *program; /* of any number of rows */
    double n_rows, pos;            /* rows of the step, positions before them */
    bool is_cold;                  /* slots are empty */
    bool is_batch;                 /* each row is the next token of another sequence and gives logits; else one does */
};

/* ERR_NOMEM. */
int cost_step(const struct cost_args *args, struct cost_step *out);

/* ---- a GPU that is described ---- */

struct cost_gpu {
    uint64_t vram_bytes;
    double bytes_per_s, pcie_bytes_per_s; /* of its memory; 0: not known */
};

struct cost_gpu_plan {
    uint64_t dense_bytes, kv_bytes, expert_bytes; /* what it would hold */
    double hits;                                  /* share of a token's experts found in it */
    double decode_tok_per_s;                      /* 0: a rate is not known */
};

/* What such a GPU would hold beside the plan for the CPU, and bytes over rates: an estimate that no kernel stands behind.
 * ERR_NOMEM. */
int cost_gpu_plan(const struct cost_gpu *gpu, const struct plan_in *in, const struct plan *p,
                  struct cost_gpu_plan *out);

/* What is thought of the ways that a split layer's experts can go, before they are measured: bytes over the machine's rates, where it knows
 * them, with fixed costs that are common for such hardware. */
void cost_gpu_rates(const struct machine *m, int n_threads, struct offload_rates *out);

/* The predictions of a plan with a GPU: what crosses to it and back, and, where the rates of both sides are known, the most that
 * bytes over rates allow. ERR_NOMEM, codes of program_make(). */
int cost_gpu_predict(const struct plan_in *in, struct plan *p);

/* Of them a prompt's, where probe has measured prompts on the GPU (machine.gpu_prompt) and the CPU's kernels, as far as the plan has the
 * CPU compute; the others have been predicted. ERR_NOMEM, codes of program_make(). */
int cost_gpu_prompt(const struct plan_in *in, struct plan *p);

/* Fill in the plan's predictions. ERR_NOMEM, codes of program_make(). */
int cost_predict(const struct plan_in *in, struct plan *p);

/* A step in which each of the plan's n_seq sequences decodes a token behind pos others, for a plan without a GPU. ERR_NOMEM, codes of
 * program_make(). */
int cost_batch_step(const struct plan_in *in, const struct plan *p, double pos, struct cost_step *out);

/* Keys and values that a row reads of each position before it, in bytes, all layers of a part together; windows count as if they had no
 * end. */
double cost_position_bytes(const struct model *m, const struct plan *p, enum plan_part part);

/* What a step of a sequence reads and writes of recurrent layers' records, in bytes, all layers of a part together. */
double cost_record_bytes(const struct model *m, const struct plan *p, enum plan_part part);

/* A step in which each of the plan's n_seq sequences decodes a token behind pos others (on average), for a plan with a GPU: bytes over
 * rates, and attention on the CPU no quicker than probe measured it. A sequence counts as the GPU's if all of its pages may lie there. The
 * GPU's arithmetic is taken to hide behind its memory. false: a rate is not known. */
bool cost_gpu_apex(const struct plan_in *in, const struct plan *p, double pos, struct apex_profile *out);

/* From how many rows of a step on the CPU takes longer for the products of its layers before the GPU's than their weights need to come up:
 * a power of two; 0: none that a step may have. Where a rate is not known, 32, from which on most CPUs are bound by arithmetic. */
uint32_t cost_gpu_lift_rows(const struct plan_in *in, const struct plan *p);

/* How a batch begins, by what half way would bring more tokens: do sequences wait whose pages the GPU does not hold (gpu.kv_waits), or are
 * steps run in halves (gpu.halves)? Neither, too, where a rate is not known. */
void cost_gpu_way(const struct plan_in *in, struct plan *p);

/* Seconds that a token's attention adds at a full context of one sequence, where the cache lies on both sides of a GPU's plan: each
 * reads its pages at its rate of memory, both at once. 0: a rate is not known. */
double cost_gpu_kv_s(const struct plan_in *in, const struct plan *p);

#ifdef __cplusplus
}
#endif
#endif
