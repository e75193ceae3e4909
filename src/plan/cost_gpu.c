/* What a GPU does: bytes over rates. First one that is only described, in front of the plan for the CPU, where ferry has no back
 * end for it; then a plan with one. Layers' dense weights and the KV cache first, then slots for experts;
 * what is not there is computed on the CPU or goes over PCIe, both at once. */
#include "src/plan/cost.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/layout.h"

#include <math.h>

/* The driver's context, and room for a step: what a small one leaves on an 8 GiB card. */
#define OTHER_BYTES (512 * MIB)

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Of the experts' bytes of a token: what is neither in the GPU nor in memory has to come from disk first. */
static double token_s(const struct cost_gpu *gpu, const struct plan_in *in, const struct plan *p,
                      const struct cost_gpu_plan *g, double dense_bytes, double expert_bytes, double missed)
{
    const struct machine *m = in->machine;
    double held = p->dense_bytes ? (double)g->dense_bytes / (double)p->dense_bytes : 1;
    double rest_bytes = expert_bytes * (1 - g->hits);
    double disk_bytes = expert_bytes * missed;

    if (m->mem_bytes_per_s <= 0 || gpu->bytes_per_s <= 0 || (disk_bytes > 0 && m->disk_bytes_per_s <= 0))
        return 0;
    double gpu_s = (dense_bytes * held + expert_bytes * g->hits) / gpu->bytes_per_s;
    double cpu_s = dense_bytes * (1 - held) / m->mem_bytes_per_s;
    double rest_s = rest_bytes / (m->mem_bytes_per_s + gpu->pcie_bytes_per_s);
    return gpu_s + cpu_s + fmax(rest_s, disk_bytes > 0 ? disk_bytes / m->disk_bytes_per_s : 0);
}

int cost_gpu_plan(const struct cost_gpu *gpu, const struct plan_in *in, const struct plan *p, struct cost_gpu_plan *out)
{
    const struct hparams *hp = &in->model->hp;
    uint64_t left_bytes = gpu->vram_bytes > OTHER_BYTES ? gpu->vram_bytes - OTHER_BYTES : 0;
    uint64_t all_expert_bytes = in->model->expert_bytes;
    double expert_bytes = 0, missed = 0; /* a token's; the share of it in no tier */

    *out = (struct cost_gpu_plan){.hits = 0};
    out->dense_bytes = least(p->dense_bytes, left_bytes);
    left_bytes -= out->dense_bytes;
    out->kv_bytes = least(p->kv_bytes, left_bytes);
    left_bytes -= out->kv_bytes;
    out->expert_bytes = least(all_expert_bytes, left_bytes);
    if (all_expert_bytes) {
        struct cost_router router;
        int rc = cost_router_init(hp->n_expert, hp->n_expert_used, p->skew, &router);
        if (rc)
            return rc;
        double share = (double)out->expert_bytes / (double)all_expert_bytes;
        out->hits = cost_router_hits(&router, share);
        if (p->slot_ram_bytes)
            missed = 1 - cost_router_hits(&router, share + (double)p->n_slots / p->n_slot_experts);
        cost_router_done(&router);
        for (int layer = 0; layer < hp->n_layer; layer++)
            expert_bytes += hp->n_expert_used * (double)model_expert_bytes(in->model, layer);
    }
    double s = token_s(gpu, in, p, out, (double)p->decode_bytes_per_tok - expert_bytes, expert_bytes, missed);
    out->decode_tok_per_s = s > 0 ? 1 / s : 0;
    return 0;
}

/* ---- a plan with a GPU ---- */

/* Which experts of a layer lie on the GPU has nothing to do with the router's favourites, so a token finds them there in proportion
 * to their number. The host's slots keep what is wanted most. */
struct shares {
    double gpu, host, copied; /* of a token's experts: there; computed by the host; copied there for it */
    double disk;              /* of the latter two, read from disk first */
};

/* What of the misses is copied, when both ways shall end at once: FreeToken's f (offload.h). While running, each layer is decided by what
 * is measured; this is for a prediction by bytes over rates. */
static double copied_share(const struct plan_in *in, const struct plan *p)
{
    double pcie = in->machine->pcie_bytes_per_s, cpu = machine_mem_at(in->machine, (int)p->n_threads);

    if (!p->gpu.n_landing || p->gpu.copies == PLAN_COPIES_NEVER)
        return 0;
    if (p->gpu.copies == PLAN_COPIES_ALWAYS)
        return 1;
    return pcie > 0 && cpu > 0 ? pcie / (pcie + cpu) : 0;
}

static int shares_of(const struct plan_in *in, const struct plan *p, struct shares *out)
{
    const struct hparams *hp = &in->model->hp;
    struct cost_router router;

    *out = (struct shares){.gpu = 1};
    if (!plan_is_split(p))
        return 0;
    int rc = cost_router_init(hp->n_expert, hp->n_expert_used, p->skew, &router);
    if (rc)
        return rc;
    out->gpu = (double)p->gpu.n_experts / p->gpu.n_all_experts;
    out->host = 1 - out->gpu;
    out->disk = out->host * (1 - cost_router_hits(&router, (double)p->n_slots / p->n_slot_experts));
    out->copied = out->host * copied_share(in, p);
    out->host -= out->copied;
    cost_router_done(&router);
    return 0;
}

/* Down: of each layer that the host has experts of the router's choice and the rows that they read; the best logit with its id. Up:
 * what comes out of the host's layers, and the rows that its experts give, but not of those that are copied. */
static int count_crossings(const struct model *m, const struct shares *share, struct plan *p)
{
    double host_share = share->host > 0 ? share->host / (share->host + share->copied) : 0;
    const struct hparams *hp = &m->hp;
    uint64_t row_bytes = (uint64_t)hp->n_embd * sizeof(float),
             ids_bytes = (uint64_t)hp->n_expert_used * sizeof(int32_t);
    double up_rows = plan_has_host_layers(p);
    int *n_expert = mem_zalloc((size_t)hp->n_layer, sizeof *n_expert, MEM_META);

    if (!n_expert)
        return err(ERR_NOMEM, "experts of %d layers", hp->n_layer);
    layout_share(m, (int)p->gpu.first_layer, p->gpu.n_experts, n_expert);
    p->gpu.down_bytes_per_tok = sizeof(int32_t) + sizeof(float);
    for (int layer = (int)p->gpu.first_layer; layer < hp->n_layer; layer++) {
        int stack = m->layers[layer].w[ROLE_EXPERT_GATE];
        if (stack < 0)
            continue;
        double n_all = (double)m->weights[stack].t.ne[2], n_host = n_all - n_expert[layer];
        p->gpu.down_bytes_per_tok += n_host > 0 ? ids_bytes + row_bytes : 0;
        up_rows += hp->n_expert_used * n_host / n_all * host_share;
    }
    p->gpu.up_bytes_per_tok = (uint64_t)(up_rows * (double)row_bytes + 0.5);
    mem_free(n_expert);
    return 0;
}

static double routed_bytes(const struct model *m, struct model_span span)
{
    double sum = 0;

    for (int layer = span.first; layer < span.end; layer++)
        sum += m->hp.n_expert_used * (double)model_expert_bytes(m, layer);
    return sum;
}

/* A token in the host's layers, as a plan without a GPU has it. */
static int predict_before(const struct plan_in *in, const struct plan *p, struct cost_step *out)
{
    struct program *program;

    *out = (struct cost_step){.s = 0};
    if (!plan_has_host_layers(p))
        return 0;
    int rc = plan_program(p, in->model, PLAN_BEFORE, &program);
    if (rc)
        return rc;
    rc = cost_step(&(struct cost_args){.machine = in->machine, .plan = p, .program = program, .n_rows = 1}, out);
    program_free(program);
    return rc;
}

/* Are all rates known that the plan's speed depends on? */
static bool knows_rates(const struct machine *m, const struct plan *p, const struct shares *share,
                        const struct cost_step *before)
{
    return m->gpu_bytes_per_s > 0 && m->pcie_bytes_per_s > 0 &&
           (share->host <= 0 || machine_mem_at(m, (int)p->n_threads) > 0) &&
           (share->disk <= 0 || m->disk_bytes_per_s > 0) && (!plan_has_host_layers(p) || before->s > 0);
}

/* One after the other: the host's layers, what every token needs of the GPU's, their experts. */
static void predict_token(const struct plan_in *in, const struct shares *share, const struct cost_step *before,
                          struct plan *p)
{
    const struct machine *m = in->machine;
    const struct model_span span = plan_span(p, in->model, PLAN_MAIN);
    const double routed = routed_bytes(in->model, span), rate = machine_mem_at(m, (int)p->n_threads);
    double dense_bytes = (double)model_decode_bytes(in->model, span) - routed;
    double cross_bytes = (double)p->gpu.down_bytes_per_tok + (double)p->gpu.up_bytes_per_tok;
    dense_bytes += cost_record_bytes(in->model, p, PLAN_MAIN);
    double dense_s = dense_bytes / m->gpu_bytes_per_s + cross_bytes / m->pcie_bytes_per_s;
    double disk_s = share->disk > 0 ? share->disk * routed / m->disk_bytes_per_s : 0;
    double expert_s =
        fmax((share->gpu + share->copied) * routed / m->gpu_bytes_per_s,
             fmax(share->copied * routed / m->pcie_bytes_per_s, share->host > 0 ? share->host * routed / rate : 0));

    p->gpu.host_layers_s = before->s;
    p->decode_dense_s = before->dense_s + dense_s;
    p->decode_expert_s = before->expert_s + expert_s;
    p->decode_disk_s = before->disk_s + disk_s;
    p->decode_tok_per_s = 1 / (before->s + dense_s + fmax(expert_s, disk_s));
}

int cost_gpu_predict(const struct plan_in *in, struct plan *p)
{
    const struct machine *m = in->machine;
    const double routed = routed_bytes(in->model, plan_span(p, in->model, PLAN_MAIN));
    /* Experts that have slots for certain are read at the start (store.c). */
    const uint64_t slot_bytes = p->n_slots == p->n_slot_experts ? p->expert_bytes : 0;
    const uint64_t host_bytes = plan_has_host_layers(p) ? p->dense_bytes : 0;
    const uint64_t load_bytes = p->gpu.dense_bytes + p->gpu.expert_bytes + host_bytes + slot_bytes;
    struct cost_step before;
    struct shares share;

    p->decode_bytes_per_tok = model_decode_bytes(in->model, model_all(in->model));
    p->load_s = m->disk_bytes_per_s > 0 ? (double)load_bytes / m->disk_bytes_per_s : 0;
    int rc = shares_of(in, p, &share);
    if (!rc)
        rc = count_crossings(in->model, &share, p);
    if (!rc)
        rc = predict_before(in, p, &before);
    if (rc)
        return rc;
    p->gpu.copy_bytes_per_tok = (uint64_t)(share.copied * routed);
    p->missed_bytes_per_tok = (uint64_t)(share.disk * routed + before.missed_bytes);
    if (knows_rates(m, p, &share, &before))
        predict_token(in, &share, &before, p);
    return cost_gpu_prompt(in, p);
}

/* ---- experts of a split layer ---- */

static double mib_s(double bytes_per_s, double usual_bytes_per_s)
{
    return (double)MIB / (bytes_per_s > 0 ? bytes_per_s : usual_bytes_per_s);
}

void cost_gpu_rates(const struct machine *m, int n_threads, struct offload_rates *out)
{
    /* Two channels of memory, 8 lanes of PCIe 4, a GPU of 8 GB, an NVMe disk; waking threads, queueing four kernels, a copy, a read. They
     * only say where measuring begins. A row costs the CPU an eighth of reading the weights, where arithmetic binds (probe: 16 rows at
     * 3 times one row's time), a GPU a sixteenth. */
    double cpu = mib_s(machine_mem_at(m, n_threads), 20e9), gpu = mib_s(m->gpu_bytes_per_s, 250e9);

    *out = (struct offload_rates){.cpu = {10e-6, cpu * 7 / 8, cpu / 8},
                                  .gpu = {30e-6, gpu * 15 / 16, gpu / 16},
                                  .copy = {10e-6, mib_s(m->pcie_bytes_per_s, 12e9), 0},
                                  .stage = {1e-6, 2 * cpu, 0}, /* read and written */
                                  .read = {100e-6, mib_s(m->disk_bytes_per_s, 1.5e9), 0}};
}

double cost_gpu_kv_s(const struct plan_in *in, const struct plan *p)
{
    const struct machine *m = in->machine;
    double rate = machine_mem_at(m, (int)p->n_threads), n_seq = p->n_seq;

    if (m->gpu_bytes_per_s <= 0 || rate <= 0)
        return 0;
    double before_bytes = cost_position_bytes(in->model, p, PLAN_BEFORE) * p->n_ctx; /* of a sequence */
    double host_bytes = fmax((double)p->kv_bytes / n_seq - before_bytes, 0);
    return before_bytes / rate + fmax((double)p->gpu.kv_bytes / n_seq / m->gpu_bytes_per_s, host_bytes / rate);
}

/* ---- layers before the GPU's, in steps of many rows ---- */

enum { USUAL_LIFT_ROWS = 32 };

/* Of all matrices of those layers. */
static double products_s(const struct plan_in *in, const struct plan *p, double n_rows, double *bytes)
{
    const struct model *m = in->model;
    double sum_s = 0;

    *bytes = 0;
    for (int layer = 0; layer < (int)p->gpu.first_layer; layer++)
        for (int role = 0; role < ROLE_N; role++) {
            int i = m->layers[layer].w[role];
            if (i < 0 || m->weights[i].t.ne[1] == 1)
                continue;
            sum_s += cost_matmul_s(in->machine, (int)p->n_threads, &m->weights[i].t, n_rows);
            *bytes += (double)tensor_bytes(&m->weights[i].t);
        }
    return sum_s;
}

uint32_t cost_gpu_lift_rows(const struct plan_in *in, const struct plan *p)
{
    double bytes, pcie = in->machine->pcie_bytes_per_s;

    if (pcie <= 0 || products_s(in, p, 1, &bytes) <= 0)
        return p->chunk_tok < USUAL_LIFT_ROWS ? 0 : USUAL_LIFT_ROWS;
    for (uint32_t n = 2; n <= p->chunk_tok; n *= 2)
        if (products_s(in, p, n, &bytes) > bytes / pcie)
            return n;
    return 0;
}

/* ---- many sequences ---- */

/* Different experts that n rows want, for each that one does, if all are wanted equally often. */
static double distinct(const struct hparams *hp, int n)
{
    double share = hp->n_expert ? (double)hp->n_expert_used / hp->n_expert : 1;
    return (1 - pow(1 - share, n)) / share;
}

/* All but attention in the GPU's layers, for n rows behind pos positions: weights are read once, experts as many as are wanted, and what
 * crosses crosses for each row. */
static double linear_s(const struct plan_in *in, const struct plan *p, int n, double pos)
{
    double cross_s =
        ((double)p->gpu.down_bytes_per_tok + (double)p->gpu.up_bytes_per_tok) / in->machine->pcie_bytes_per_s;
    double attend_s = 0; /* in the host's layers */
    double record_s = cost_record_bytes(in->model, p, PLAN_MAIN) / in->machine->gpu_bytes_per_s;

    if (plan_has_host_layers(p)) {
        double mem_rate = machine_mem_at(in->machine, (int)p->n_threads);
        attend_s = n * pos * cost_position_bytes(in->model, p, PLAN_BEFORE) / mem_rate;
        record_s += cost_record_bytes(in->model, p, PLAN_BEFORE) / mem_rate;
    }
    return p->decode_dense_s - cross_s + n * cross_s + (n - 1) * record_s + attend_s +
           fmax(p->decode_expert_s, p->decode_disk_s) * distinct(&in->model->hp, n);
}

/* Of one row behind pos positions, all layers of a span: elements of queries, keys and values; of the states of its segments; query-key
 * elements of attention (cost_op_units()). */
static void row_values(const struct model *m, struct model_span span, double pos, double *qkv, double *states,
                       double *units)
{
    const double dim_k = m->hp.head_dim_k, dim_v = m->hp.head_dim_v, n_segments = ceil(pos / DEVICE_ATTN_SEGMENT_TOK);

    *qkv = *states = *units = 0;
    for (int i = span.first; i < span.end; i++) {
        const struct model_layer *l = &m->layers[i];
        if (l->is_recurrent)
            continue;
        *qkv += l->n_head * dim_k + l->n_head_kv * (dim_k + (m->hp.kv_is_latent ? 0 : dim_v));
        *states += n_segments * l->n_head * (dim_v + 2);
        *units += pos * l->n_head * (dim_k + dim_v);
    }
}

/* So many sequences' positions the GPU has pages for. The host's pool is larger than the rest, because segments begin anywhere. */
static double n_on_gpu(const struct plan *p)
{
    double seq_tok = p->kv_tok ? (double)p->kv_tok / p->n_seq : p->n_ctx;

    return plan_has_host_kv(p) ? fmin(p->gpu.kv_tok / seq_tok, p->n_seq) : p->n_seq;
}

bool cost_gpu_apex(const struct plan_in *in, const struct plan *p, double pos, struct apex_profile *out)
{
    const struct machine *m = in->machine;
    const double mem_rate = machine_mem_at(m, (int)p->n_threads), n_seq = p->n_seq;
    double host_share = 1 - n_on_gpu(p) / n_seq, qkv, states, units;

    if (!p->has_gpu || p->decode_tok_per_s <= 0 || ((host_share > 0 || plan_has_host_layers(p)) && mem_rate <= 0))
        return false;
    *out = (struct apex_profile){.n_gpu = (int)n_on_gpu(p)};
    double kv_bytes = n_seq * pos * cost_position_bytes(in->model, p, PLAN_MAIN);
    out->n_host = (int)p->n_seq - out->n_gpu;
    out->has_halves = plan_has_halves(p);
    out->n_layers = in->model->hp.n_layer - (int)p->gpu.first_layer;
    out->gpu_linear_s = linear_s(in, p, out->n_gpu, pos);
    out->host_linear_s = linear_s(in, p, out->n_host, pos);
    out->both_linear_s = linear_s(in, p, (int)p->n_seq, pos);
    out->tail_s = (double)tensor_bytes(&in->model->weights[in->model->w[ROLE_OUTPUT]].t) / m->gpu_bytes_per_s +
                  p->gpu.host_layers_s;
    out->attend_s = kv_bytes * (1 - host_share) / m->gpu_bytes_per_s;
    if (out->n_host == 0)
        return true;
    row_values(in->model, plan_span(p, in->model, PLAN_MAIN), pos, &qkv, &states, &units);
    double unit_s = m->ops[OP_ATTENTION].unit_s;
    out->host_seq_s = fmax(kv_bytes / mem_rate, n_seq * units * unit_s) * host_share / out->n_host;
    out->down_s = n_seq * qkv * sizeof(float) / m->pcie_bytes_per_s;
    out->up_s = out->n_host * states * sizeof(float) / m->pcie_bytes_per_s;
    return true;
}

void cost_gpu_way(const struct plan_in *in, struct plan *p)
{
    struct apex_profile profile;
    struct apex_choice choice;

    if (!p->kv_tok || !plan_has_host_kv(p) || !cost_gpu_apex(in, p, (double)p->kv_tok / p->n_seq / 2, &profile))
        return;
    apex_choose(&profile, &choice);
    p->gpu.kv_waits = profile.n_gpu > 0 && choice.runs == APEX_GPU_ONLY;
    p->gpu.halves = choice.runs == APEX_PIPELINING;
}
