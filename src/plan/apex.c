/* Owns the choice between three ways of a decode step. What things cost is the caller's to know. */
#include "src/plan/apex.h"

#include <math.h>
#include <stdio.h>

const char *apex_name(enum apex_way way)
{
    static const char *const names[APEX_N_WAYS] = {"GPU only", "pipelining", "overlap"};
    return names[way];
}

/* GPU only has N_G T_a sequences in T_l + T_a. Pipelining has as many in 2 T_l + T_a, and the CPU's N_C in every second of that. */
double apex_most_ratio(double linear_s, double attend_s)
{
    return 2 * linear_s / attend_s + 3 + attend_s / linear_s;
}

/* The GPU's share of a pipelined step. The CPU attends to some of the host's sequences in either half, so it need never wait: its windows,
 * from the end of a half's linear layers to the beginning of its next, cover the step. */
static double gpu_turn_s(const struct apex_profile *p)
{
    return p->gpu_linear_s + p->host_linear_s + p->attend_s;
}

struct apex_time apex_predict(const struct apex_profile *p, enum apex_way way, int n_host)
{
    struct apex_time t = {.n_host = way == APEX_GPU_ONLY ? 0 : n_host};
    double host_s = t.n_host * p->host_seq_s;

    if (t.n_host <= 0) /* whichever way it is called */
        t.s = p->gpu_linear_s + p->attend_s;
    else if (way == APEX_OVERLAP)
        t.s = p->both_linear_s + p->down_s + fmax(p->attend_s, host_s + p->up_s);
    else
        t.s = fmax(gpu_turn_s(p), host_s);
    t.tok_per_s = p->n_gpu + t.n_host > 0 ? (p->n_gpu + t.n_host) / t.s : 0;
    return t;
}

/* Of the host's sequences, those that the CPU is done with in so many seconds. */
static int done_in(const struct apex_profile *p, double host_s)
{
    return p->n_host * p->host_seq_s > host_s ? (int)(host_s / p->host_seq_s) : p->n_host;
}

/* As long as the CPU takes no longer than the GPU, each sequence more is a gain. From there on the rate only rises or only falls, being a
 * quotient of two affine functions of their number. So the best is on one side of that place, or the last. */
static struct apex_time best_time(const struct apex_profile *p, enum apex_way way)
{
    int n_hidden = done_in(p, way == APEX_OVERLAP ? fmax(p->attend_s - p->up_s, 0) : gpu_turn_s(p));
    const int corners[] = {n_hidden < p->n_host ? n_hidden + 1 : n_hidden, p->n_host};
    struct apex_time best = apex_predict(p, way, n_hidden);

    for (int i = 0; i < 2; i++) {
        struct apex_time t = apex_predict(p, way, corners[i]);
        if (t.tok_per_s > best.tok_per_s)
            best = t;
    }
    return best;
}

void apex_choose(const struct apex_profile *p, struct apex_choice *out)
{
    *out = (struct apex_choice){.runs = APEX_GPU_ONLY};
    for (int way = 0; way < APEX_N_WAYS; way++)
        out->time[way] = best_time(p, (enum apex_way)way);
    if (out->time[APEX_OVERLAP].tok_per_s > out->time[APEX_GPU_ONLY].tok_per_s)
        out->runs = APEX_OVERLAP;
    out->best = out->time[APEX_PIPELINING].tok_per_s > out->time[out->runs].tok_per_s ? APEX_PIPELINING : out->runs;
}

static void explain_ratio(const struct apex_profile *p, char *out, size_t out_bytes)
{
    out[0] = 0;
    if (p->attend_s > 0 && p->gpu_linear_s > 0)
        snprintf(out, out_bytes, " (the GPU attends %.3g times as fast; pipelining beats GPU only below %.3g)",
                 p->n_gpu / p->attend_s * p->host_seq_s, apex_most_ratio(p->gpu_linear_s, p->attend_s));
}

void apex_explain(const struct apex_profile *p, const struct apex_choice *c, char *out, size_t out_bytes)
{
    const struct apex_time *t = c->time;
    char ratio[128];

    explain_ratio(p, ratio, sizeof ratio);
    snprintf(out, out_bytes,
             "%d on the GPU alone %.3g tokens/s, overlap with %d in memory %.3g, pipelining with %d %.3g%s: %s%s",
             p->n_gpu, t[APEX_GPU_ONLY].tok_per_s, t[APEX_OVERLAP].n_host, t[APEX_OVERLAP].tok_per_s,
             t[APEX_PIPELINING].n_host, t[APEX_PIPELINING].tok_per_s, ratio, apex_name(c->runs),
             c->best == APEX_PIPELINING ? ", because ferry has no pipelining" : "");
}
