/* Who computes the experts of a layer that are not in the GPU's memory: the CPU, where they lie, or the GPU, after a copy over PCIe.
 * Both work at once and meet once per layer, so the choice is the one whose later side is done first. Pure arithmetic: what things
 * cost comes in, and is fitted to what was measured while both ran (offload_fit). Results never depend on it, only time does.
 *
 * FreeToken (arXiv 2608.16157) divides M misses by f = B_pcie / (B_pcie + B_cpu): it copies the F of {floor(fM), floor(fM) + 1} with
 * the least max(F (1 - f), (M - F) f). That is the case of the walk here in which fixed costs, the GPU's computing, staging, rows and
 * the disk take no time, and all experts are alike. */
#ifndef FERRY_PLAN_OFFLOAD_H
#define FERRY_PLAN_OFFLOAD_H

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Seconds of one call that works on experts of so many MiB: call_s + mib_s * MiB + row_s * (MiB * rows, summed over experts). Reading
 * weights costs by their bytes, computing by bytes times rows. */
struct offload_cost {
    double call_s, mib_s, row_s;
};

struct offload_rates {
    struct offload_cost cpu, gpu; /* computing experts */
    struct offload_cost copy;     /* over PCIe, from pinned memory; row_s is 0 */
    struct offload_cost stage;    /* into pinned memory first, by the CPU; row_s is 0 */
    struct offload_cost read;     /* from disk; row_s is 0 */
};

double offload_seconds(const struct offload_cost *c, double n_calls, double mib, double mib_rows);

/* ---- the choice ---- */

struct offload_expert {
    double mib;
    int rows;       /* tokens of the step that chose it */
    bool on_disk;   /* it has to be read before anything else */
    bool is_pinned; /* it can be copied from where it lies, without staging */
};

/* A layer in a step. */
struct offload_layer {
    const struct offload_expert *misses; /* (n) */
    int n;
    int most_copies;          /* at most so many may be copied; 0: the GPU has no room to put them */
    double hit_mib, hit_rows; /* what the GPU computes in any case: MiB, MiB * rows */
    double row_mib;           /* of one row that the CPU computes, on its way to the GPU */
};

struct offload_choice {
    int n_copies;   /* the first so many of the order are copied */
    double s;       /* predicted: from the choice until both sides are done */
    double cpu_s;   /* the CPU's side of it: staging and computing */
    double gpu_s;   /* the GPU's: hits, copies, what was copied */
    double alone_s; /* predicted without copies */
};

/* The order in which misses would be copied, (n) indices: most rows first, because a copy costs the same for all; of equals what is in
 * memory; then the first. */
void offload_order(const struct offload_layer *layer, int *order);

/* The predicted time of copying the first n_copies of the order. */
void offload_walk(const struct offload_rates *r, const struct offload_layer *layer, const int *order, int n_copies,
                  struct offload_choice *out);

/* The number of copies with the least predicted time; of equals the fewest, which leave PCIe to others. */
void offload_choose(const struct offload_rates *r, const struct offload_layer *layer, const int *order,
                    struct offload_choice *out);

/* ---- fitting ---- */

/* Least squares over what was seen, each observation counting half as much for every OFFLOAD_HALF later ones, with a prior that counts
 * as little (recursive least squares with forgetting and ridge; e.g. Ljung, System Identification, 1999, 11.2). */
#define OFFLOAD_HALF 32

struct offload_fit {
    struct offload_cost prior;
    double n, xx[3][3], xy[3];
    double last[2]; /* how far the last two were off: seconds over expected; 0: there was none */
};

/* Nothing was seen yet: costs are the prior. */
void offload_fit_init(struct offload_fit *f, const struct offload_cost *prior);

/* One call on mib MiB (mib_rows: times rows) took so many seconds. It counts as off by no more than OFFLOAD_JUMP times what the two before
 * it were: a hiccup, when somebody else had the processor, is nearly forgotten, and a change is believed when it is seen twice. */
#define OFFLOAD_JUMP 2
void offload_fit_add(struct offload_fit *f, double mib, double mib_rows, double seconds);

/* What a call costs by now; never negative. */
struct offload_cost offload_fit_cost(const struct offload_fit *f);

#ifdef __cplusplus
}
#endif
#endif
