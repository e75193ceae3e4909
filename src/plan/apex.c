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

/* Before the first attention the CPU has nothing to do, and behind the last one the GPU has nothing to hide it behind: about half of the
 * linear layers of one layer, each. */
static double fill_s(const struct apex_profile *p)
{
    return p->n_layers > 0 ? (p->gpu_linear_s + p->host_linear_s - 2 * p->tail_s) / 2 / p->n_layers : 0;
}

/* Two halves take turns: the GPU with what is linear in one, then its own attention, then the other's linear layers; the CPU with the
 * host's sequences of the one, while the GPU has the other's to do. So in the long run a layer takes the longest of what the GPU does, what
 * the CPU does, and what has to come one after the other in either half. What goes down goes in the order of the GPU's work. */
static double pipelined_s(const struct apex_profile *p, int n_host)
{
    double first_s = n_host / 2 * p->host_seq_s, second_s = (n_host - n_host / 2) * p->host_seq_s;
    double linear_s = p->gpu_linear_s - p->tail_s + p->down_s, host_linear_s = p->host_linear_s - p->tail_s;
    double gpu_s = linear_s + p->attend_s + host_linear_s;

    return p->tail_s + fill_s(p) +
           fmax(fmax(gpu_s, first_s + second_s), fmax(linear_s + first_s, host_linear_s + second_s));
}

struct apex_time apex_predict(const struct apex_profile *p, enum apex_way way, int n_host)
{
    struct apex_time t = {.n_host = way == APEX_GPU_ONLY ? 0 : n_host};

    if (t.n_host <= 0) /* whichever way it is called */
        t.s = p->gpu_linear_s + p->attend_s;
    else if (way == APEX_OVERLAP)
        t.s = p->both_linear_s + p->down_s + fmax(p->attend_s, t.n_host * p->host_seq_s + p->up_s);
    else
        t.s = pipelined_s(p, t.n_host);
    t.tok_per_s = p->n_gpu + t.n_host > 0 ? (p->n_gpu + t.n_host) / t.s : 0;
    return t;
}

static double rate(const struct apex_profile *p, enum apex_way way, int n_host)
{
    return apex_predict(p, way, n_host).tok_per_s;
}

/* The best of first, first + 2, ... of the host's sequences. A step takes the longest of some affine functions of their number, as long as
 * halves are equal, or one larger by one; so the rate is the least of some that only rise or only fall with it: it rises up to some
 * place, and from there it falls. */
static int best_from(const struct apex_profile *p, enum apex_way way, int first)
{
    int lo = 0, hi = (p->n_host - first) / 2;

    while (lo < hi) {
        int mid = lo + (hi - lo) / 2, n = first + 2 * mid;
        if (rate(p, way, n + 2) > rate(p, way, n))
            lo = mid + 1;
        else
            hi = mid;
    }
    return first + 2 * lo;
}

/* At least one takes part, if there are any. */
static struct apex_time best_time(const struct apex_profile *p, enum apex_way way)
{
    if (way == APEX_GPU_ONLY || p->n_host < 2)
        return apex_predict(p, way, p->n_host);
    int odd = best_from(p, way, 1), even = best_from(p, way, 2);
    bool is_odd = rate(p, way, odd) > rate(p, way, even) || (rate(p, way, odd) == rate(p, way, even) && odd < even);
    return apex_predict(p, way, is_odd ? odd : even);
}

void apex_choose(const struct apex_profile *p, struct apex_choice *out)
{
    static const enum apex_way ways[] = {APEX_OVERLAP, APEX_PIPELINING};

    *out = (struct apex_choice){.runs = APEX_GPU_ONLY};
    out->time[APEX_GPU_ONLY] = best_time(p, APEX_GPU_ONLY);
    for (int i = 0; i < (p->has_halves ? 2 : 1); i++) {
        out->time[ways[i]] = best_time(p, ways[i]);
        if (out->time[ways[i]].tok_per_s > out->time[out->runs].tok_per_s)
            out->runs = ways[i];
    }
}

struct apex_time apex_all(const struct apex_profile *p)
{
    struct apex_time whole = apex_predict(p, APEX_OVERLAP, p->n_host),
                     halves = apex_predict(p, APEX_PIPELINING, p->n_host);

    return p->has_halves && halves.tok_per_s > whole.tok_per_s ? halves : whole;
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
    char ratio[128], halves[192] = "no pipelining where the CPU has experts";

    explain_ratio(p, ratio, sizeof ratio);
    if (p->has_halves)
        snprintf(halves, sizeof halves, "pipelining with %d %.3g%s", t[APEX_PIPELINING].n_host,
                 t[APEX_PIPELINING].tok_per_s, ratio);
    snprintf(out, out_bytes, "%d on the GPU alone %.3g tokens/s, overlap with %d in memory %.3g, %s: %s", p->n_gpu,
             t[APEX_GPU_ONLY].tok_per_s, t[APEX_OVERLAP].n_host, t[APEX_OVERLAP].tok_per_s, halves, apex_name(c->runs));
}
