/* The curve over the number of sequences. A step reads dense weights once and each expert that any of its tokens wants once;
 * reading, the disk and arithmetic go on beside each other, so the longest of the three is the step. */
#include "src/plan/plan_batch.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/plan/cost.h"
#include "src/plan/plan_in.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { CHUNK_TOK = 512, SEQ_TOK = 512, UNASKED = 32 };

/* Where no kernel was measured: multiplications and additions that a core does in a step of many rows, all that goes with them
 * included, and the rows whose time a tile of weights costs before the first of them is multiplied (unpacking). Rounded down from
 * batches of SmolLM2 and Qwen2.5-1.5B on Zen 4 and prefill on Zen 3 (tests/results/batch.md, README.md). */
static const struct {
    const char *isa;
    double ops_per_s;
} core_rates[] = {{"avx512vnni", 150e9}, {"avx512", 100e9}, {"avx2", 100e9}, {"ref", 2e9}};
#define TILE_ROWS 8

/* More sequences are taken only where they bring this much. */
#define LEAST_GAIN 1.05

static const uint32_t candidates[] = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256};
enum { N_CANDIDATES = sizeof candidates / sizeof *candidates };

static double ops_per_s(const struct plan *p)
{
    for (size_t i = 0; i < sizeof core_rates / sizeof *core_rates; i++)
        if (!strcmp(core_rates[i].isa, p->isa))
            return core_rates[i].ops_per_s * p->n_threads;
    return 0;
}

/* Bytes of experts that n tokens want together, if every expert is wanted equally often. */
static double wanted_bytes(const struct model *m, uint32_t n)
{
    double sum = 0;

    if (!m->hp.n_expert)
        return 0;
    double share = (double)m->hp.n_expert_used / m->hp.n_expert;
    double n_wanted = m->hp.n_expert * (1 - pow(1 - share, n));
    for (int layer = 0; layer < m->hp.n_layer; layer++)
        sum += n_wanted * (double)model_expert_bytes(m, layer);
    return sum;
}

/* Multiplications and additions for one token: two for each weight that it meets. */
static double token_ops(const struct model *m)
{
    double n = 0, share = m->hp.n_expert ? (double)m->hp.n_expert_used / m->hp.n_expert : 0;

    for (int i = 0; i < m->n_weights; i++) {
        const struct weight *w = &m->weights[i];
        double values = (double)w->t.ne[0] * (double)w->t.ne[1] * (double)w->t.ne[2];
        /* Rows of the embedding table are looked up; as the head it is multiplied. */
        if (i != m->w[ROLE_TOKEN_EMBD] || i == m->w[ROLE_OUTPUT])
            n += w->is_expert ? values * share : values;
    }
    return 2 * n;
}

/* By the rates of a GPU; false: they are not known. */
static bool predict_gpu(const struct plan_in *in, const struct plan *p, uint32_t seq_tok, struct plan_batch_point *at)
{
    if (!cost_gpu_apex(in, p, seq_tok / 2.0, &at->profile)) /* on average half way */
        return false;
    struct apex_time t = apex_all(&at->profile);
    at->memory_s = t.s;
    at->tok_per_s = t.tok_per_s;
    return true;
}

static double position_bytes(const struct model *m, const struct plan *p)
{
    return cost_position_bytes(m, p, PLAN_BEFORE) + cost_position_bytes(m, p, PLAN_MAIN);
}

/* By kernels that probe measured; reading what they read takes its time in any case. tok_per_s stays 0 where one was not. */
static int predict_measured(const struct plan_in *in, const struct plan *p, uint32_t seq_tok,
                            struct plan_batch_point *at)
{
    struct cost_step step;

    if (!plan_is_measured(p, in->machine))
        return 0;
    int rc = cost_batch_step(in, p, seq_tok / 2.0, &step); /* on average half way */
    if (rc || step.s <= 0)
        return rc;
    at->disk_s = step.disk_s;
    at->missed_bytes = (uint64_t)step.missed_bytes;
    at->compute_s = step.dense_s + step.expert_s;
    at->tok_per_s = at->n_seq / fmax(step.s, at->memory_s);
    return 0;
}

static int predict(const struct plan_in *in, const struct plan *p, uint32_t seq_tok, struct plan_batch_point *at)
{
    const struct machine *machine = in->machine;
    double dense_bytes = (double)p->decode_bytes_per_tok - wanted_bytes(in->model, 1);
    double experts = wanted_bytes(in->model, at->n_seq);
    double missing = p->slot_ram_bytes ? 1 - (double)p->n_slots / p->n_slot_experts : plan_missing_share(p);
    double kv_bytes = (double)at->n_seq * seq_tok / 2 * position_bytes(in->model, p); /* on average half way */
    double record_bytes = at->n_seq * cost_record_bytes(in->model, p, PLAN_MAIN);

    at->kv_bytes = p->kv_bytes + p->gpu.kv_bytes + p->record_bytes + p->gpu.record_bytes;
    at->slot_bytes = p->expert_bytes;
    at->expert_bytes = (uint64_t)experts;
    at->missed_bytes = (uint64_t)(experts * missing);
    if (machine->disk_bytes_per_s > 0)
        at->disk_s = experts * missing / machine->disk_bytes_per_s;
    if (predict_gpu(in, p, seq_tok, at))
        return 0;
    if (machine->mem_bytes_per_s > 0)
        at->memory_s = (dense_bytes + experts + kv_bytes + record_bytes) / machine->mem_bytes_per_s;
    int rc = predict_measured(in, p, seq_tok, at);
    if (rc || at->tok_per_s > 0)
        return rc;
    if (ops_per_s(p) > 0)
        at->compute_s = (at->n_seq + TILE_ROWS) * token_ops(in->model) / ops_per_s(p);
    bool known = at->memory_s > 0 && at->compute_s > 0 && (missing == 0 || at->disk_s > 0);
    double step_s = fmax(fmax(at->memory_s, at->disk_s), at->compute_s);
    at->tok_per_s = known && step_s > 0 ? at->n_seq / step_s : 0;
    return 0;
}

/* Every sequence has a row of its own beside the chunk, and gives logits. It holds whole pages: sequences that begin together come
 * to their last page together. */
static struct plan_opts opts_of(const struct plan_in *in, uint32_t n_seq, uint32_t seq_tok)
{
    struct plan_opts o = in->opts ? *in->opts : (struct plan_opts){0};
    uint64_t kv_tok = (uint64_t)n_seq * size_up(seq_tok, DEVICE_PAGE_TOK);

    o.chunk_tok = (o.chunk_tok ? o.chunk_tok : CHUNK_TOK) + n_seq;
    o.n_seq = o.n_out = n_seq;
    o.kv_tok = kv_tok < INT32_MAX ? (uint32_t)kv_tok : INT32_MAX;
    return o;
}

static int try_point(const struct plan_in *in, uint32_t n_seq, uint32_t seq_tok, struct plan_batch_point *at,
                     struct plan *plan)
{
    struct plan_opts o = opts_of(in, n_seq, seq_tok);
    struct plan_in one = *in;

    one.opts = &o;
    *at = (struct plan_batch_point){.n_seq = n_seq};
    int rc = plan_make(&one, plan);
    bool is_thrashing = rc == 0 && plan->io == PLAN_IO_MMAP && o.io != PLAN_IO_MMAP && plan_missing_share(plan) > 0;
    at->fits = rc == 0 && !is_thrashing;
    if (at->fits)
        return predict(in, plan, seq_tok, at);
    return rc == ERR_LIMIT ? 0 : rc;
}

/* Of more sequences than the GPU has pages for: as many as pay. least: those of the point before. */
static int lower_point(const struct plan_in *in, uint32_t least, uint32_t seq_tok, struct plan_batch_point *at,
                       struct plan *plan)
{
    const struct plan_batch_point weighed = *at;
    struct apex_choice choice;

    at->fits = false;
    if (weighed.profile.n_gpu + weighed.profile.n_host == 0) /* rates are not known */
        return 0;
    apex_choose(&weighed.profile, &choice);
    uint32_t n_seq = (uint32_t)(weighed.profile.n_gpu + choice.time[choice.runs].n_host);
    int rc = 0;
    if (n_seq == weighed.n_seq)
        *at = weighed;
    else if (n_seq > least)
        rc = try_point(in, n_seq, seq_tok, at, plan);
    at->n_weighed = weighed.n_seq;
    at->profile = weighed.profile;
    at->choice = choice;
    return rc;
}

static int choose(const struct plan_batch *b)
{
    int best = -1;

    for (int i = 0; i < b->n_points; i++) {
        const struct plan_batch_point *at = &b->points[i];
        if (!at->fits)
            continue;
        if (best < 0 || (b->has_rates && at->tok_per_s > LEAST_GAIN * b->points[best].tok_per_s) ||
            (!b->has_rates && at->n_seq <= UNASKED))
            best = i;
    }
    return best;
}

/* The bound itself is a candidate. */
static uint32_t candidate(const struct plan_batch_opts *opts, int i)
{
    return opts->most_seq && candidates[i] > opts->most_seq ? opts->most_seq : candidates[i];
}

static int n_candidates(const struct plan_batch_opts *opts)
{
    int n = 1;

    while (n < N_CANDIDATES && candidate(opts, n) > candidate(opts, n - 1))
        n++;
    return n;
}

int plan_batch_make(const struct plan_in *in, const struct plan_batch_opts *opts, struct plan_batch *out,
                    struct plan *plan)
{
    uint32_t seq_tok = opts->seq_tok ? opts->seq_tok : SEQ_TOK;

    memset(out, 0, sizeof *out);
    out->n_points = opts->n_seq ? 1 : n_candidates(opts);
    out->has_rates = true;
    for (int i = 0; i < out->n_points; i++) {
        int rc = try_point(in, opts->n_seq ? opts->n_seq : candidate(opts, i), seq_tok, &out->points[i], plan);
        /* More sequences than the fewest have to pay where attention leaves the GPU for them. */
        if (rc == 0 && i > 0 && out->points[i].fits && plan_has_host_kv(plan))
            rc = lower_point(in, out->points[i - 1].n_seq, seq_tok, &out->points[i], plan);
        if (rc < 0)
            return rc;
        if (out->points[i].fits && out->points[i].tok_per_s == 0)
            out->has_rates = false;
    }
    out->chosen = choose(out);
    struct plan_opts o = opts_of(in, out->points[out->chosen < 0 ? 0 : out->chosen].n_seq, seq_tok);
    struct plan_in one = *in;
    one.opts = &o;
    return plan_make(&one, plan); /* where nothing fits, this says why */
}

void plan_batch_expect(const struct plan_batch_point *at, struct plan *plan)
{
    plan->decode_tok_per_s = at->tok_per_s;
    if (at->tok_per_s <= 0)
        return;
    plan->decode_dense_s = fmax(at->memory_s, at->compute_s) / at->n_seq;
    plan->decode_expert_s = 0; /* they are in there */
    plan->missed_bytes_per_tok = at->missed_bytes / at->n_seq;
}

/* ---- for people ---- */

struct text {
    char buf[4096];
    size_t n;
};

static void say(struct text *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void say(struct text *t, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    int n = vsnprintf(t->buf + t->n, sizeof t->buf - t->n, fmt, args);
    va_end(args);
    if (n > 0)
        t->n += (size_t)n < sizeof t->buf - t->n ? (size_t)n : sizeof t->buf - t->n - 1;
}

static void say_point(struct text *t, const struct plan_batch_point *at, bool chosen)
{
    char kv[32], slots[32], wanted[32], missed[32];

    if (!at->fits) {
        say(t, "  %9" PRIu32 "  %s\n", at->n_seq, at->n_weighed ? "no more would run than before" : "does not fit");
        return;
    }
    say(t, "%c %9" PRIu32 " %10s %10s %12s %10s", chosen ? '>' : ' ', at->n_seq,
        size_format(at->kv_bytes, kv, sizeof kv), size_format(at->slot_bytes, slots, sizeof slots),
        size_format(at->expert_bytes, wanted, sizeof wanted), size_format(at->missed_bytes, missed, sizeof missed));
    if (at->tok_per_s > 0)
        say(t, " %8.3f %8.3f %8.3f %9.1f\n", at->memory_s, at->disk_s, at->compute_s, at->tok_per_s);
    else
        say(t, " %8s %8s %8s %9s\n", "-", "-", "-", "-");
}

/* What was thought of sequences whose cache does not fit the GPU: where they were first too many, and of those that were taken. */
static void say_weighed(struct text *t, const struct plan_batch *b)
{
    char line[512];
    bool is_first = true;

    for (int i = 0; i < b->n_points; i++) {
        const struct plan_batch_point *at = &b->points[i];
        if (!at->n_weighed || (!is_first && i != b->chosen))
            continue;
        apex_explain(&at->profile, &at->choice, line, sizeof line);
        say(t, "of %" PRIu32 ": %s\n", at->n_weighed, line);
        is_first = false;
    }
}

int plan_batch_explain(const struct plan_batch *b, char **out)
{
    struct text t = {.n = 0};

    say(&t, "  %9s %10s %10s %12s %10s %8s %8s %8s %9s\n", "sequences", "KV cache", "experts", "experts/step",
        "from disk", "memory s", "disk s", "compute", "tokens/s");
    for (int i = 0; i < b->n_points; i++)
        say_point(&t, &b->points[i], i == b->chosen);
    say_weighed(&t, b);
    if (!b->has_rates)
        say(&t, "no prediction: rates of memory, disk or kernels are not known (ferry probe measures them)\n");
    else
        say(&t, "a step takes the longest of memory, disk and compute; > is where more sequences bring under %.0f %%\n",
            100 * (LEAST_GAIN - 1));
    *out = mem_strdup(t.buf, MEM_OTHER);
    return *out ? 0 : err(ERR_NOMEM, "the curve of a batch");
}
