/* Who attends to the sequences whose keys and values do not fit the GPU, when many are decoded at once: nobody before there is room, or
 * the CPU, where they lie. The choice of APEX (arXiv 2506.03296) between three ways of a step, by profiled times:
 *   GPU only: a step has the sequences whose pages the GPU holds; the others wait;
 *   asymmetric pipelining (as in NEO, arXiv 2411.01142): two half batches, one computed by the GPU while the CPU attends to the other;
 *     weights are read once for each half. The first has the GPU's sequences and half of the host's (src/run/exec.h);
 *   overlap: one batch. CPU and GPU attend at the same time, each to its own pages.
 * Pipelining beats GPU only if and only if N_G / N_C < 2 T_l / T_a + 3 + T_a / T_l, for a CPU that is never idle then.
 *
 * APEX's overlap is asynchronous: the CPU attends to some sequences beside the linear layers of others. Here both sides meet in every layer
 * (src/run/attn.c), so that a sequence gets a token in each step and linear layers hide nothing; that is what is predicted. Pure
 * arithmetic; results never depend on it. */
#ifndef FERRY_PLAN_APEX_H
#define FERRY_PLAN_APEX_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum apex_way { APEX_GPU_ONLY, APEX_PIPELINING, APEX_OVERLAP, APEX_N_WAYS };

/* Of a decode step or of one of its layers: all seconds are of the same. A sequence is one row. */
struct apex_profile {
    int n_gpu, n_host;    /* sequences whose pages the GPU holds; whose pages lie in the host's memory */
    bool has_halves;      /* pipelining can be run (plan_has_halves) */
    int n_layers;         /* that a step goes through; 0: so many that neither the first nor the last counts */
    double gpu_linear_s;  /* T_l: all but attention, for a batch of n_gpu rows; */
    double host_linear_s; /* of n_host rows; */
    double both_linear_s; /* of all. APEX takes the three for equal, as if only reading weights took time */
    double tail_s;     /* of each of these, what is done once for both halves of a step: the host's layers, the head */
    double attend_s;   /* T_a: the GPU's attention for the n_gpu; N_G is n_gpu / attend_s */
    double host_seq_s; /* the CPU's attention for one of the n_host; N_C is 1 / host_seq_s */
    /* What crosses: */
    double down_s; /* queries, keys and values to the host, before anyone attends */
    double up_s;   /* the CPU's results to the GPU, which hides behind its attention, or the other half */
};

struct apex_time {
    int n_host;       /* of the profile's that take part in a step */
    double s;         /* of the step */
    double tok_per_s; /* a token for each sequence of the step; 0 where a step has none */
};

struct apex_choice {
    struct apex_time time
        [APEX_N_WAYS];  /* each with the number of the host's sequences that serves it best; zeros: it cannot be run */
    enum apex_way runs; /* the most tokens/s */
};

/* "GPU only", "pipelining", "overlap". Static. */
const char *apex_name(enum apex_way way);

/* The N_G / N_C below which pipelining beats GPU only, if weights take as long for any number of rows and the CPU is never idle. T_l and
 * T_a, positive. */
double apex_most_ratio(double linear_s, double attend_s);

/* What a step of that way takes in which n_host of the profile's take part (GPU only: none do, whatever is said). */
struct apex_time apex_predict(const struct apex_profile *p, enum apex_way way, int n_host);

/* What one takes in which all do, overlapped or pipelined, whichever is sooner done. */
struct apex_time apex_all(const struct apex_profile *p);

/* Of equals the earlier of GPU only, overlap, pipelining: the one that needs less. */
void apex_choose(const struct apex_profile *p, struct apex_choice *out);

/* One line for people, without its end: what each way would give, and which is run. At most out_bytes, NUL included. */
void apex_explain(const struct apex_profile *p, const struct apex_choice *c, char *out, size_t out_bytes);

#ifdef __cplusplus
}
#endif
#endif
