/* Owns the arithmetic of time. A step's time is the sum of its ops', each a count times a rate that probe measured; reading
 * experts overlaps with computing them. */
#include "src/plan/cost.h"

#include "src/base/size.h"
#include "src/plan/plan_in.h"

#include <math.h>
#include <string.h>

/* Reads of an expert. */
enum { N_MATRICES = 3 };

/* What a fault of a mapped file reads: the system's usual read-ahead. */
#define FAULT_BYTES (128 * KIB)

/* ---- pieces ---- */

/* A line through what was measured at two numbers of rows. */
static double line_s(double n_rows, double from, double from_s, double to, double to_s)
{
    return from_s + (n_rows - from) / (to - from) * (to_s - from_s);
}

/* Affine between the numbers of rows at which the kernel was measured, and on beyond the last. some_s 0: not measured there. */
static double rows_s(double n_rows, double one_s, double some_s, double few_s, double many_s)
{
    const double some = MACHINE_SOME_ROWS, few = MACHINE_FEW_ROWS, many = MACHINE_MANY_ROWS;

    if (n_rows <= some && some_s > 0)
        return line_s(n_rows, 1, one_s, some, some_s);
    if (n_rows <= few)
        return some_s > 0 ? line_s(n_rows, some, some_s, few, few_s) : line_s(n_rows, 1, one_s, few, few_s);
    return line_s(n_rows, few, few_s, many, fmax(many_s, few_s));
}

double cost_matmul_s(const struct machine *m, int n_threads, const struct tensor *w, double n_rows)
{
    const struct machine_kernel *k = &m->kernels[w->type];
    double bytes = (double)w->ne[1] * (double)w->stride[1], weights = (double)(w->ne[0] * w->ne[1]);
    double part = n_threads < m->n_cores ? (double)n_threads / m->n_cores : 1;

    if (k->token_bytes_per_s <= 0)
        return -1;
    double one_s = bytes / (k->token_bytes_per_s * part);
    double some_s = k->some_ops_per_s > 0 ? 2 * weights * MACHINE_SOME_ROWS / (k->some_ops_per_s * part) : 0;
    double few_s = 2 * weights * MACHINE_FEW_ROWS / (k->few_ops_per_s * part);
    double many_s = 2 * weights * MACHINE_MANY_ROWS / (k->many_ops_per_s * part);
    return rows_s(n_rows < 1 ? 1 : n_rows, one_s, some_s, few_s, many_s);
}

double cost_read_s(const struct machine *m, const struct plan *p, double expert_bytes, double n)
{
    double reads = fmin(n * N_MATRICES, p->pace.n_reads);

    if (p->io == PLAN_IO_PREAD) /* one matrix after the other */
        reads = 1;
    return n * expert_bytes / machine_disk_at(m, expert_bytes / N_MATRICES, reads);
}

int cost_n_matrices(const struct op *op)
{
    return op->kind == OP_MATMUL ? 1 : op->kind == OP_MATMUL_HEADS ? op->p.heads.n_head : 0;
}

double cost_op_units(const struct op *op, double n_rows, double pos)
{
    const struct op_attn *a = &op->p.attn;
    double keys = pos + (n_rows + 1) / 2;

    switch (op->kind) {
    case OP_ATTENTION:
    case OP_ATTN_STATES:
        if (a->window && keys > a->window)
            keys = a->window;
        return n_rows * keys * a->n_head * (a->head_dim_k + a->head_dim_v);
    case OP_KV_APPEND:
        return n_rows * a->n_head_kv * (a->head_dim_k + (a->v_in_k ? 0 : a->head_dim_v));
    case OP_MOE:
        return n_rows * op->p.moe.k * (double)(op->w[0]->ne[0] + op->w[0]->ne[1]);
    case OP_COMBINE:
        return n_rows * (double)(op->src[1]->ne[0] * op->dst[0]->ne[0]);
    case OP_ROUTE:
        return n_rows * (double)op->src[0]->ne[0];
    case OP_CONV:
        return n_rows * (double)(op->w[0]->ne[0] * op->w[0]->ne[1]);
    case OP_DELTA_NET: /* S is read twice and written once for each row, as much as ADD does for a value */
        return n_rows * op->p.delta.head_dim_k * (double)op->dst[0]->ne[0];
    default:
        return n_rows * (double)op->dst[0]->ne[0];
    }
}

/* Reading a recurrent layer's record and writing the next, once for each sequence of the step. */
static double record_s(const struct cost_args *a, const struct op *op, double n_rows)
{
    double bytes = 2.0 * sizeof(float) * op->p.delta.head_dim_k * (double)op->dst[0]->ne[0];
    double rate = machine_mem_at(a->machine, (int)a->plan->n_threads);

    return rate > 0 ? bytes * (a->is_batch ? n_rows : 1) / rate : 0;
}

/* An op beside its weights. What was not measured is taken for as dear as the plainest. */
static double op_s(const struct cost_args *a, const struct op *op, double n_rows)
{
    const struct machine *m = a->machine;
    const struct machine_op *k = &m->ops[op->kind];

    if (cost_n_matrices(op))
        return m->ops[OP_MATMUL].op_s;
    if (k->op_s <= 0 && k->unit_s <= 0)
        k = &m->ops[OP_ADD];
    double s =
        k->op_s + k->unit_s * (a->is_batch ? n_rows * cost_op_units(op, 1, a->pos) : cost_op_units(op, n_rows, a->pos));
    return op->kind == OP_DELTA_NET ? fmax(s, record_s(a, op, n_rows)) : s;
}

/* ---- experts ---- */

/* One layer's experts in a step. */
struct experts {
    double n, rows;   /* different ones, rows of each */
    double compute_s; /* of all */
    double hits;      /* share of them that is in a slot */
    double bytes;     /* of one */
};

/* One token: how many of its experts are absent is binomial. Those that are there are computed while the others come; the
 * last to come is computed when it has come. By pread nothing overlaps. compute_s: of it, computing at the speed that reading leaves. */
static double token_layer_s(const struct cost_args *a, const struct experts *x, double *compute_s)
{
    int k = (int)lrint(x->n);
    double sum = 0, chance = pow(x->hits, k); /* of no miss */

    if (x->hits <= 0)
        chance = 0;
    for (int n = 0; n <= k; n++) {
        double disk_s = cost_read_s(a->machine, a->plan, x->bytes, n), s = x->compute_s, beside_s = s;
        if (a->plan->io == PLAN_IO_PREAD) {
            s += disk_s;
        } else if (n) {
            beside_s = machine_beside_disk_s(a->machine, true, s, disk_s);
            s = fmax(beside_s, disk_s + x->compute_s / k);
        }
        if (x->hits <= 0)
            chance = n == k;
        sum += chance * s;
        *compute_s += chance * beside_s;
        if (n < k && x->hits > 0)
            chance *= (double)(k - n) / (n + 1) * (1 - x->hits) / x->hits;
    }
    return sum;
}

/* A prompt: so many experts that the ends do not matter. */
static double prompt_layer_s(const struct cost_args *a, const struct experts *x)
{
    double disk_s = cost_read_s(a->machine, a->plan, x->bytes, x->n * (1 - x->hits));

    if (a->plan->io == PLAN_IO_PREAD)
        return x->compute_s + disk_s;
    return fmax(machine_beside_disk_s(a->machine, false, x->compute_s, disk_s), disk_s);
}

/* Of experts that a prompt chunk wants, slots keep those that they hold (evict.h). A token finds what is wanted most. */
static double hits_of(const struct cost_args *a, const struct cost_router *router)
{
    const struct plan *p = a->plan;
    double share = p->n_slot_experts ? (double)p->n_slots / p->n_slot_experts : 1;

    if (!p->slot_ram_bytes)
        return 1;
    if (a->is_cold)
        return 0;
    return a->n_rows > 1 ? fmin(share, 1) : cost_router_hits(router, share);
}

static int experts_of(const struct cost_args *a, const struct op *op, const struct cost_router *router, double hits,
                      struct experts *out)
{
    *out = (struct experts){.n = router->k, .rows = 1, .hits = hits};
    if (a->n_rows > 1) {
        out->n = cost_router_distinct(router, a->n_rows);
        out->rows = a->n_rows * router->k / out->n;
    }
    out->compute_s = op_s(a, op, a->n_rows);
    for (int i = 0; i < N_MATRICES; i++) {
        double s = cost_matmul_s(a->machine, (int)a->plan->n_threads, op->w[i], out->rows);
        if (s < 0)
            return -1;
        out->compute_s += out->n * s;
        out->bytes += (double)op->w[i]->ne[1] * (double)op->w[i]->stride[1];
    }
    return 0;
}

/* ---- a step ---- */

/* Mapped weights that pass the budget come again from disk by page faults: small reads, one a thread. Without knowing which will be
 * wanted, every byte is as likely to be absent as another. */
static void add_faults(const struct cost_args *a, double bytes, struct cost_step *out)
{
    double missing = plan_missing_share(a->plan);

    if (missing <= 0)
        return;
    out->missed_bytes = missing * bytes;
    out->disk_s = out->missed_bytes / machine_disk_at(a->machine, FAULT_BYTES, a->plan->n_threads);
    out->s += out->disk_s;
}

/* Of experts in slots, read from disk. */
static double missed_bytes(const struct cost_args *a, const struct cost_router *router, double hits)
{
    double n = a->n_rows > 1 ? cost_router_distinct(router, a->n_rows) : router->k, sum = 0;

    for (int layer = a->program->span.first; layer < a->program->span.end; layer++)
        sum += n * (1 - hits) * (double)model_expert_bytes(a->program->model, layer);
    return sum;
}

/* All that can be said of a token without rates of kernels: what memory and disk allow at most. */
static void token_roof(const struct cost_args *a, struct cost_step *out)
{
    const struct model *m = a->program->model;
    const struct model_span span = a->program->span;
    double bytes = (double)model_decode_bytes(m, span), expert_bytes = 0;
    double rate = machine_mem_at(a->machine, (int)a->plan->n_threads);

    if (rate <= 0)
        return;
    for (int layer = span.first; layer < span.end; layer++)
        expert_bytes += m->hp.n_expert_used * (double)model_expert_bytes(m, layer);
    enum plan_part part = span.end < m->hp.n_layer ? PLAN_BEFORE : PLAN_MAIN;
    out->dense_s = (bytes - expert_bytes + cost_record_bytes(m, a->plan, part)) / rate;
    out->expert_s = expert_bytes / rate;
    out->disk_s = out->missed_bytes > 0 ? out->missed_bytes / a->machine->disk_bytes_per_s : 0;
    out->s = out->dense_s + fmax(out->expert_s, out->disk_s);
}

static bool lacks_disk(const struct cost_args *a)
{
    return a->machine->disk_bytes_per_s <= 0 && (a->plan->slot_ram_bytes || plan_missing_share(a->plan) > 0);
}

/* Calls of the device: the op list is cut at experts and, in long steps, between layers (run/exec_walk.c). */
static double runs_s(const struct cost_args *a)
{
    const struct program *p = a->program;
    int n_layer = a->n_rows > 8 ? p->span.end - p->span.first : 0;

    return (1 + n_layer + 2 * p->n_moe) * a->machine->run_s;
}

/* Asking each layer's router about the one before, for a token (run/ahead.h). Nobody asks those that cannot be asked. */
static double asking_s(const struct cost_args *a)
{
    const struct model *m = a->program->model;
    const struct model_span span = a->program->span;
    double sum = 0;

    if (a->n_rows > 1 || !a->plan->look_ahead || !a->plan->pace.n_ahead)
        return 0;
    for (int layer = span.first + 1; layer < span.end; layer++) {
        const int *roles = m->layers[layer].w, w = roles[ROLE_ROUTER];
        if (w < 0 || m->weights[w].t.type != QUANT_F32 || roles[ROLE_ROUTER_SELECT_BIAS] >= 0)
            continue;
        double s = cost_matmul_s(a->machine, (int)a->plan->n_threads, &m->weights[w].t, 1);
        sum += fmax(s, 0) + a->machine->ops[OP_MATMUL].op_s + a->machine->run_s;
    }
    return sum;
}

/* Each sequence draws its token when the head has been multiplied, one after the other; what is drawn behind a prompt does not count. */
static double draws_s(const struct cost_args *a)
{
    const struct program *p = a->program;
    bool has_head = p->span.end == p->model->hp.n_layer;

    return has_head && (a->is_batch || a->n_rows <= 1) ? a->n_rows * p->model->hp.n_vocab * a->machine->draw_s : 0;
}

static int add_op(const struct cost_args *a, const struct op *op, const struct cost_router *router, double hits,
                  struct cost_step *out)
{
    double n_rows = op->rows == OP_ROWS_OUT && !a->is_batch ? 1 : a->n_rows;
    struct experts x;

    if (op->kind == OP_MOE) {
        if (experts_of(a, op, router, hits, &x))
            return -1;
        double compute_s = 0, s = a->n_rows > 1 ? prompt_layer_s(a, &x) : token_layer_s(a, &x, &compute_s);
        out->expert_s += a->n_rows > 1 ? x.compute_s : compute_s;
        out->disk_s += hits < 1 ? cost_read_s(a->machine, a->plan, x.bytes, x.n * (1 - hits)) : 0;
        out->s += s;
        return 0;
    }
    double s = op_s(a, op, n_rows);
    for (int i = 0; i < op->n_w && cost_n_matrices(op); i++) {
        double w_s = cost_matmul_s(a->machine, (int)a->plan->n_threads, op->w[i], n_rows);
        if (w_s < 0)
            return -1;
        s += cost_n_matrices(op) * w_s;
    }
    out->dense_s += s;
    out->s += s;
    return 0;
}

/* The ops' times added up; nothing where a rate is lacking. */
static void add_ops(const struct cost_args *a, const struct cost_router *router, double hits, struct cost_step *out)
{
    double bytes = out->missed_bytes;

    for (int i = 0; i < a->program->n_ops; i++) {
        if (add_op(a, &a->program->ops[i], router, hits, out)) {
            *out = (struct cost_step){.missed_bytes = bytes};
            return;
        }
    }
    double besides_s = runs_s(a) + asking_s(a) + draws_s(a);
    out->dense_s += besides_s;
    out->s += besides_s;
    if (a->n_rows > 1 && a->plan->look_ahead) { /* the next layer's are read while this one is computed */
        double compute_s = out->dense_s + out->expert_s;
        out->s = fmax(machine_beside_disk_s(a->machine, false, compute_s, out->disk_s), out->disk_s);
    }
}

int cost_step(const struct cost_args *a, struct cost_step *out)
{
    const struct hparams *hp = &a->program->model->hp;
    const struct plan *p = a->plan;
    struct cost_router router = {.k = 1};
    double hits = 1;
    int rc = 0;

    *out = (struct cost_step){.s = 0};
    if (hp->n_expert)
        rc = cost_router_init(hp->n_expert, hp->n_expert_used, p->skew, &router);
    if (rc)
        return rc;
    if (hp->n_expert) {
        hits = hits_of(a, &router);
        out->missed_bytes = missed_bytes(a, &router, hits);
    }
    if (!lacks_disk(a) && plan_has_kernels(p, a->machine))
        add_ops(a, &router, hits, out);
    else if (!lacks_disk(a) && a->n_rows <= 1)
        token_roof(a, out);
    cost_router_done(&router);
    if (out->s > 0 && p->io == PLAN_IO_MMAP)
        add_faults(a, (double)(a->n_rows > 1 ? p->dense_bytes + p->expert_bytes : p->decode_bytes_per_tok), out);
    return 0;
}

/* ---- a plan ---- */

/* A prompt that has the machine to itself, chunk after chunk. */
static int predict_prompt(struct cost_args *a, struct plan *p)
{
    double n = p->n_ctx < PLAN_PROMPT_TOK ? p->n_ctx : PLAN_PROMPT_TOK, all_s = 0, missed_bytes = 0;
    struct cost_step step;

    for (double pos = 0; pos < n; pos += a->n_rows) {
        a->pos = pos;
        a->n_rows = fmin(p->chunk_tok, n - pos);
        int rc = cost_step(a, &step);
        if (rc)
            return rc;
        all_s = step.s > 0 && all_s >= 0 ? all_s + step.s : -1;
        missed_bytes += step.missed_bytes;
    }
    p->prefill_tok_per_s = all_s > 0 ? n / all_s : 0;
    p->prefill_missed_bytes = (uint64_t)missed_bytes;
    return 0;
}

/* A short question to a program that has just been started. */
static int predict_first(struct cost_args *a, struct plan *p)
{
    struct cost_step step;

    a->pos = 0;
    a->n_rows = PLAN_QUESTION_TOK;
    a->is_cold = true;
    int rc = cost_step(a, &step);
    p->first_token_s = !rc && step.s > 0 && p->load_s > 0 ? p->load_s + step.s : 0;
    return rc;
}

static int predict_token(struct cost_args *a, struct plan *p)
{
    struct cost_step step;

    a->n_rows = 1;
    int rc = cost_step(a, &step);
    if (rc)
        return rc;
    p->missed_bytes_per_tok = (uint64_t)step.missed_bytes;
    p->decode_tok_per_s = step.s > 0 ? 1 / step.s : 0;
    p->decode_dense_s = step.dense_s;
    p->decode_expert_s = step.expert_s;
    p->decode_disk_s = step.disk_s;
    return 0;
}

int cost_predict(const struct plan_in *in, struct plan *p)
{
    struct program *program;

    if (p->has_gpu)
        return cost_gpu_predict(in, p);
    const uint64_t load_bytes = p->dense_bytes + (p->slot_ram_bytes ? 0 : p->expert_bytes);

    p->decode_bytes_per_tok = model_decode_bytes(in->model, model_all(in->model));
    p->load_s = in->machine->disk_bytes_per_s > 0
                    ? (double)load_bytes * (1 - plan_missing_share(p)) / in->machine->disk_bytes_per_s
                    : 0;
    int rc = plan_program(p, in->model, PLAN_MAIN, &program);
    if (rc)
        return rc;
    struct cost_args a = {.machine = in->machine, .plan = p, .program = program};
    rc = predict_token(&a, p);
    if (!rc)
        rc = predict_prompt(&a, p);
    if (!rc)
        rc = predict_first(&a, p);
    program_free(program);
    return rc;
}

int cost_batch_step(const struct plan_in *in, const struct plan *p, double pos, struct cost_step *out)
{
    struct program *program;
    int rc = plan_program(p, in->model, PLAN_MAIN, &program);

    if (rc)
        return rc;
    rc = cost_step(
        &(struct cost_args){
            .machine = in->machine, .plan = p, .program = program, .n_rows = p->n_seq, .pos = pos, .is_batch = true},
        out);
    program_free(program);
    return rc;
}

double cost_position_bytes(const struct model *m, const struct plan *p, enum plan_part part)
{
    struct kv_shape shape;
    double sum = 0;

    if (model_kv_shape(m, p->kv_type, (int)p->gpu.first_layer, &shape, NULL) < 0)
        return 0; /* there would be no plan */
    for (int group = 0; group < shape.n_groups; group++)
        if (shape.on_host[group] == (part == PLAN_BEFORE))
            sum += (double)shape.page_bytes[group] / DEVICE_PAGE_TOK;
    return sum;
}

double cost_record_bytes(const struct model *m, const struct plan *p, enum plan_part part)
{
    struct kv_shape shape;

    if (model_kv_shape(m, p->kv_type, (int)p->gpu.first_layer, &shape, NULL) < 0)
        return 0; /* as above */
    return 2.0 * (double)(part == PLAN_BEFORE ? shape.host_record_bytes : shape.record_bytes);
}
