/* How many sequences a batch runs at once: each one more shares what a step reads, but takes KV pages that expert slots could
 * have had. */
#ifndef FERRY_PLAN_PLAN_BATCH_H
#define FERRY_PLAN_PLAN_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "src/plan/apex.h"
#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PLAN_BATCH_MOST_POINTS = 16 };

struct plan_batch_opts {
    uint32_t n_seq;    /* 0: choose */
    uint32_t most_seq; /* choose no more than this; 0: no bound */
    uint32_t seq_tok;  /* positions that a sequence is expected to take; 0: 512 */
};

/* One number of sequences: what a step of all of them takes. Seconds are 0 where the machine's rate is not known. */
struct plan_batch_point {
    uint32_t n_seq;
    bool fits;
    uint64_t kv_bytes, slot_bytes;       /* held: KV pages, experts */
    uint64_t expert_bytes, missed_bytes; /* that a step wants of experts, each once; of these, from disk */
    double memory_s, disk_s, compute_s;  /* of a step */
    double tok_per_s;                    /* 0: not known */
    /* Where the cache of more sequences than the fewest does not fit a GPU whose rates are known: so many were weighed (0: none), and
     * n_seq is what of them it pays to run. It does not fit where a point before has as many. */
    uint32_t n_weighed;
    struct apex_profile profile; /* of the weighed ones */
    struct apex_choice choice;
};

struct plan_batch {
    struct plan_batch_point points[PLAN_BATCH_MOST_POINTS];
    int n_points, chosen;
    bool has_rates;
};

/* The plan of a batch. The number of sequences grows as long as the predicted speed does; without rates it is 32, or what
 * fits. What would leave weights no way but to be mapped and read through again and again counts as not fitting, unless mapping
 * is asked for or even one sequence comes to that.
 * With a GPU whose rates are known (machine.h) speeds are by them, memory_s being the step. A number of sequences whose cache does not
 * fit it is lowered to what apex.h says pays: those that fit, or some that the CPU attends to besides. Where rates are not known,
 * none is taken whose cache does not fit, but for the fewest. Pure. As plan_make; ERR_LIMIT when not even one fits. */
int plan_batch_make(const struct plan_in *in, const struct plan_batch_opts *opts, struct plan_batch *out,
                    struct plan *plan);

/* The plan as tune.h and refit.h are to see it: a token of a step in which all sequences are answered, and no prompt is run.
 * Of zeros (a saved plan, rates that are not known) nothing is expected: decode_tok_per_s is 0. */
void plan_batch_expect(const struct plan_batch_point *at, struct plan *plan);

/* The curve as text for a person. Caller frees with mem_free. ERR_NOMEM. */
int plan_batch_explain(const struct plan_batch *b, char **out);

#ifdef __cplusplus
}
#endif
#endif
