/* Owns what a prompt takes with a GPU: its steps, one after the other. Every op takes its count times a rate that probe measured, on the
 * GPU, the CPU, PCIe or the disk; what works at once counts as the longest. That nobody waits for anything else makes it the most that
 * there can be. */
#include "src/plan/cost.h"

#include "src/base/err.h"
#include "src/plan/plan_in.h"

#include <math.h>

enum {
    N_MATRICES = 3,
    N_TRIED = 64 /* so many parts of the misses, each copied or not, are tried: more experts than most layers have */
};

struct prompt {
    const struct machine *m;
    const struct plan *p;
    struct program *main, *before; /* own; before: of the CPU's layers, NULL: there are none */
    struct cost_router router;     /* own */
    double on_gpu, hits;           /* of the experts of the GPU's layers: there; of the others: in slots */
    double pinned;                 /* of what lies in those */
    double n_rows, pos;            /* the step's */
};

/* A step's. */
struct sums {
    double s, dense_s; /* all that is waited for; since the last experts */
    double disk_s, missed_bytes;
};

/* ---- one op on the GPU ---- */

static double between(double n, double from, double from_s, double to, double to_s)
{
    return from_s + (n - from) / (to - from) * (to_s - from_s);
}

static const struct machine_gpu_products *rates_of(const struct machine *m, const struct tensor *w)
{
    bool is_float = quant_info((int)w->type)->act == QUANT_ACT_F32;
    return is_float ? &m->gpu_prompt.floats : &m->gpu_prompt.ints;
}

static double weight_bytes(const struct tensor *w)
{
    return (double)w->ne[1] * (double)w->stride[1];
}

/* Affine in rows between what was measured. Types differ in bytes and in how they are unpacked, hardly in arithmetic. */
static double product_s(const struct machine *m, const struct tensor *w, double n_rows)
{
    const struct machine_gpu_products *k = rates_of(m, w);
    const double few = MACHINE_GPU_FEW_ROWS, many = MACHINE_GPU_MANY_ROWS, n_ops = 2.0 * (double)(w->ne[0] * w->ne[1]);
    double one_s = weight_bytes(w) / m->gpu_bytes_per_s, few_s = fmax(n_ops * few / k->few_ops_per_s, one_s);

    if (n_rows <= few)
        return between(fmax(n_rows, 1), 1, one_s, few, few_s);
    return between(n_rows, few, few_s, many, fmax(n_ops * many / k->many_ops_per_s, few_s));
}

/* Activations that an op reads and writes for a row. */
static double row_bytes(const struct op *op)
{
    double n = op->kind == OP_COMBINE ? (double)((op->src[1]->ne[0] - 1) * op->src[0]->ne[0]) : 0;

    for (int i = 0; i < OP_MAX_IO; i++)
        n += (op->dst[i] ? (double)op->dst[i]->ne[0] : 0) + (op->src[i] ? (double)op->src[i]->ne[0] : 0);
    return n * sizeof(float);
}

/* What is neither a product nor attention is bound by memory. */
static double gpu_op_s(const struct prompt *a, const struct op *op)
{
    const double n_rows = op->rows == OP_ROWS_OUT ? 1 : a->n_rows;
    double s = 0;

    if (op->kind == OP_ATTENTION)
        return cost_op_units(op, n_rows, a->pos) * a->m->gpu_prompt.attn_unit_s;
    if (!cost_n_matrices(op))
        return n_rows * row_bytes(op) / a->m->gpu_bytes_per_s;
    for (int i = 0; i < op->n_w; i++)
        s += cost_n_matrices(op) * product_s(a->m, op->w[i], n_rows);
    return s;
}

/* ---- a layer's experts ---- */

struct experts {
    double n, n_misses; /* different ones that the step wants; that the GPU does not have */
    double bytes;       /* of one */
    double gpu_s, host_s, copy_s,
        stage_s;   /* one computed by either, its rows gone up; copied; through pinned memory before that */
    double disk_s; /* reading those that are in no slot */
    double idle_s; /* before the router has chosen, which copies use that are sent ahead */
};

static void experts_of(const struct prompt *a, const struct op *op, struct experts *x)
{
    const struct machine *m = a->m;
    const double n = cost_router_distinct(&a->router, a->n_rows), rows = a->n_rows * a->router.k / n;
    const double row_s = m->ops[OP_MOE].unit_s * (double)(op->w[0]->ne[0] + op->w[0]->ne[1]);

    *x = (struct experts){.n = n, .n_misses = n * (1 - a->on_gpu)};
    x->host_s = rows * (row_s + (double)op->dst[0]->ne[0] * sizeof(float) / m->pcie_bytes_per_s);
    for (int i = 0; i < N_MATRICES; i++) {
        x->bytes += weight_bytes(op->w[i]);
        x->gpu_s += product_s(m, op->w[i], rows);
        x->host_s += cost_matmul_s(m, (int)a->p->n_threads, op->w[i], rows);
    }
    x->copy_s = x->bytes / m->pcie_bytes_per_s;
    x->stage_s = 2 * x->bytes / machine_mem_at(m, (int)a->p->n_threads); /* read and written */
}

/* n_copies of the misses go to the GPU, with look-ahead some of them while the router is waited for, as many as there are landings. */
static double sides_s(const struct prompt *a, const struct experts *x, double n_copies)
{
    double n_most = a->p->look_ahead ? fmin(a->p->gpu.n_landing, n_copies * a->hits) : 0;
    double n_ahead = fmin(x->idle_s / fmax(x->copy_s, x->stage_s), n_most);
    double host_s = (x->n_misses - n_copies) * x->host_s + (n_copies - n_ahead) * (1 - a->pinned) * x->stage_s;
    double gpu_s = (x->n - x->n_misses + n_copies) * x->gpu_s;

    if (a->p->io == PLAN_IO_PREAD)
        host_s += x->disk_s;
    else
        host_s = machine_beside_disk_s(a->m, false, host_s, x->disk_s);
    return fmax(fmax(host_s, gpu_s), (n_copies - n_ahead) * x->copy_s);
}

/* As offload.h chooses, by rates: the number of copies with which the later side is done first. */
static double layer_s(const struct prompt *a, const struct experts *x)
{
    const enum plan_copies copies = a->p->gpu.n_landing ? a->p->gpu.copies : PLAN_COPIES_NEVER;

    if (x->n_misses <= 0)
        return x->n * x->gpu_s;
    double least_s = sides_s(a, x, copies == PLAN_COPIES_ALWAYS ? x->n_misses : 0);
    for (int i = 1; i <= N_TRIED && copies == PLAN_COPIES_AUTO; i++)
        least_s = fmin(least_s, sides_s(a, x, x->n_misses * i / N_TRIED));
    return least_s;
}

/* Experts are read for the layer, or, with look-ahead, all the time. */
static void add_experts(const struct prompt *a, const struct op *op, struct sums *t)
{
    struct experts x;

    experts_of(a, op, &x);
    x.idle_s = t->dense_s;
    double n_read = x.n_misses * (1 - a->hits);
    if (n_read > 0)
        x.disk_s = cost_read_s(a->m, a->p, x.bytes, n_read);
    double s = layer_s(a, &x);
    t->s += a->p->look_ahead || a->p->io == PLAN_IO_PREAD ? s : fmax(s, x.disk_s);
    t->disk_s += x.disk_s;
    t->dense_s = 0;
}

/* ---- the CPU's layers before the GPU's ---- */

/* The GPU computes them: weights come up meanwhile. The CPU looks the embedding up, and attends to what comes down to it. */
static double lifted_s(const struct prompt *a)
{
    const struct machine *m = a->m;
    double s = 0, up_bytes = 0;

    for (int i = 0; i < a->before->n_ops; i++) {
        const struct op *op = &a->before->ops[i];
        bool is_host = op->kind == OP_EMBED || op->kind == OP_KV_APPEND || op->kind == OP_ATTENTION;
        for (int k = 0; cost_n_matrices(op) && k < op->n_w; k++)
            up_bytes += cost_n_matrices(op) * weight_bytes(op->w[k]);
        if (is_host)
            s += m->ops[op->kind].op_s + m->ops[op->kind].unit_s * cost_op_units(op, a->n_rows, a->pos) +
                 a->n_rows * row_bytes(op) / m->pcie_bytes_per_s;
        else
            s += gpu_op_s(a, op);
    }
    return fmax(s, up_bytes / m->pcie_bytes_per_s);
}

static int before_s(const struct prompt *a, struct sums *t)
{
    struct cost_args args = {.machine = a->m, .plan = a->p, .program = a->before, .n_rows = a->n_rows, .pos = a->pos};
    struct cost_step step;

    if (plan_has_lift(a->p) && a->n_rows >= a->p->gpu.lift_rows) {
        t->s += lifted_s(a);
        return 0;
    }
    int rc = cost_step(&args, &step);
    t->s += step.s + a->n_rows * (double)a->before->x->ne[0] * sizeof(float) / a->m->pcie_bytes_per_s;
    t->missed_bytes += step.missed_bytes;
    return rc;
}

/* ---- a prompt ---- */

/* Of the GPU's layers. */
static double missed_bytes(const struct prompt *a)
{
    double n = a->main->n_moe ? cost_router_distinct(&a->router, a->n_rows) : 0, sum = 0;

    for (int layer = a->main->span.first; layer < a->main->span.end; layer++)
        sum += n * (1 - a->on_gpu) * (1 - a->hits) * (double)model_expert_bytes(a->main->model, layer);
    return sum;
}

static int add_step(const struct prompt *a, struct sums *t)
{
    struct sums gpu = {.s = a->n_rows * (double)a->p->gpu.down_bytes_per_tok / a->m->pcie_bytes_per_s};
    int rc = a->before ? before_s(a, t) : 0;

    for (int i = 0; i < a->main->n_ops; i++) {
        const struct op *op = &a->main->ops[i];
        if (op->kind == OP_MOE) {
            add_experts(a, op, &gpu);
            continue;
        }
        double s = gpu_op_s(a, op);
        gpu.s += s;
        gpu.dense_s += s;
    }
    t->s += a->p->look_ahead ? fmax(gpu.s, gpu.disk_s) : gpu.s;
    t->missed_bytes += missed_bytes(a);
    return rc;
}

static bool knows_products(const struct machine *m, const struct program *program)
{
    for (int i = 0; i < program->n_ops; i++) {
        const struct op *op = &program->ops[i];
        int n_w = cost_n_matrices(op) ? op->n_w : op->kind == OP_MOE ? N_MATRICES : 0;
        for (int k = 0; k < n_w; k++)
            if (rates_of(m, op->w[k])->many_ops_per_s <= 0 || rates_of(m, op->w[k])->few_ops_per_s <= 0)
                return false;
    }
    return true;
}

/* Does the CPU multiply only with types that were measured? */
static bool knows_host(const struct prompt *a, const struct program *program, bool only_experts)
{
    for (int i = 0; i < program->n_ops; i++) {
        const struct op *op = &program->ops[i];
        int n_w = op->kind == OP_MOE ? N_MATRICES : cost_n_matrices(op) && !only_experts ? op->n_w : 0;
        for (int k = 0; k < n_w; k++)
            if (cost_matmul_s(a->m, (int)a->p->n_threads, op->w[k], 1) < 0)
                return false;
    }
    return plan_has_kernels(a->p, a->m);
}

static bool knows_all(const struct prompt *a)
{
    const struct machine *m = a->m;

    return a->p->prefill == DEVICE_PREFILL_INT && m->gpu_bytes_per_s > 0 && m->pcie_bytes_per_s > 0 &&
           m->gpu_prompt.attn_unit_s > 0 && knows_products(m, a->main) &&
           (!plan_is_split(a->p) || (knows_host(a, a->main, true) && machine_mem_at(m, (int)a->p->n_threads) > 0)) &&
           (!a->before || (knows_host(a, a->before, false) && knows_products(m, a->before))) &&
           (a->hits >= 1 || m->disk_bytes_per_s > 0);
}

static int open_prompt(const struct plan_in *in, const struct plan *p, struct prompt *a)
{
    const struct hparams *hp = &in->model->hp;
    int rc = plan_program(p, in->model, PLAN_MAIN, &a->main);

    if (rc == 0 && plan_has_host_layers(p))
        rc = plan_program(p, in->model, PLAN_BEFORE, &a->before);
    if (rc == 0 && hp->n_expert)
        rc = cost_router_init(hp->n_expert, hp->n_expert_used, p->skew, &a->router);
    if (p->gpu.n_all_experts)
        a->on_gpu = (double)p->gpu.n_experts / p->gpu.n_all_experts;
    if (p->n_slot_experts)
        a->hits = fmin((double)p->n_slots / p->n_slot_experts, 1);
    if (p->expert_bytes)
        a->pinned = fmin((double)p->gpu.pin_bytes / (double)p->expert_bytes, 1);
    return rc;
}

static void close_prompt(struct prompt *a)
{
    cost_router_done(&a->router);
    program_free(a->before);
    program_free(a->main);
}

/* A short question to a program that has just been started: slots are empty, unless there is one for each expert. */
static int predict_first(struct prompt *a, struct plan *p)
{
    struct sums t = {0};

    a->pos = 0;
    a->n_rows = PLAN_QUESTION_TOK;
    a->hits = a->hits < 1 ? 0 : 1;
    int rc = add_step(a, &t);
    p->first_token_s = rc == 0 && p->load_s > 0 ? p->load_s + t.s : 0;
    return rc;
}

int cost_gpu_prompt(const struct plan_in *in, struct plan *p)
{
    const double n = p->n_ctx < PLAN_PROMPT_TOK ? p->n_ctx : PLAN_PROMPT_TOK;
    struct prompt a = {.m = in->machine, .p = p, .router = {.k = 1}, .on_gpu = 1, .hits = 1};
    struct sums t = {0};
    int rc = open_prompt(in, p, &a);
    bool is_known = rc == 0 && knows_all(&a);

    for (double pos = 0; pos < n && rc == 0; pos += a.n_rows) {
        a.pos = pos;
        a.n_rows = fmin(p->chunk_tok, n - pos);
        if (is_known)
            rc = add_step(&a, &t);
    }
    if (rc == 0 && is_known) {
        p->prefill_tok_per_s = n / t.s;
        p->prefill_missed_bytes = (uint64_t)t.missed_bytes;
        rc = predict_first(&a, p);
    }
    close_prompt(&a);
    return rc;
}
