/* The GPU's part of a plan. Dense weights, the cache and the activations of its layers have to be there; experts get what is left, as
 * evenly over the layers as their number allows, because every layer waits for the slower side. The host holds slots for the
 * others. Of a cache that was asked for and does not fit, the GPU holds as much as it can, before any expert: at a full context each
 * byte of it is read for every token, of the experts a part. Where not even the dense weights fit, the first layers are the CPU's, with
 * all that is theirs: as few as can be. The first, because then the embedding, of which a token reads a row, lies with the host, the head,
 * of which it reads all, with the GPU, and rows cross once, upwards, where nobody waits for them. Pure arithmetic. */
#include "src/plan/plan_in.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/attn_shape.h"
#include "src/model/layout.h"
#include "src/model/lift_shape.h"
#include "src/model/slot_shape.h"
#include "src/plan/cost.h"

#include <inttypes.h>

/* Left alone where no --vram is given: a screen and other programs move, too. */
#define MARGIN_SHIFT 4
#define MARGIN_LEAST_BYTES (256 * MIB)
/* The driver gives memory in these. */
#define GRANULE_BYTES (2 * MIB)
/* Pieces of memory beside the device's own: weights, cache, activations, scratch; landings; what attention on two sides needs. */
enum { N_ALLOCS = 4, N_LANDING_ALLOCS = 1, N_HOST_KV_ALLOCS = 1, N_HALF_ALLOCS = 2, N_LIFT_ALLOCS = 1 };
/* Rows of a sequence from which on its pages come up, where the rates are not known. A generated row is always computed on both sides:
 * the CPU reads its memory faster than PCIe does. */
enum { DEFAULT_STAGE_ROWS = 4, LEAST_STAGE_ROWS = 2 };
/* What mem_map rounds up to; pinned memory comes in pages, too. */
#define MAP_BYTES 4096

int plan_gpu_choose(const struct plan_in *in, const struct plan_opts *o, struct plan *p)
{
    uint64_t free_bytes = in->machine->vram_free_bytes, margin_bytes = free_bytes >> MARGIN_SHIFT;
    char a[32], b[32];

    if (o->io == PLAN_IO_MMAP)
        return err(ERR_UNSUPPORTED, "weights that are mapped do not go to a GPU: --io uring or pread reads them");
    if (o->vram_bytes && in->machine->vram_total_bytes && o->vram_bytes > free_bytes)
        return err(ERR_LIMIT, "%s of GPU memory asked for; GPU %" PRIu32 " has %s free",
                   size_format(o->vram_bytes, a, sizeof a), o->gpu_number, size_format(free_bytes, b, sizeof b));
    if (!o->vram_bytes && !in->machine->vram_total_bytes)
        return err(ERR_ARG, "how much memory GPU %" PRIu32 " has is not known: --vram says it", o->gpu_number);
    if (margin_bytes < MARGIN_LEAST_BYTES)
        margin_bytes = MARGIN_LEAST_BYTES;
    p->gpu.copies = o->copies;
    p->has_gpu = p->gpu.moves = true;
    p->look_ahead = p->io == PLAN_IO_URING;
    p->gpu.number = o->gpu_number;
    p->gpu.budget_bytes = o->vram_bytes ? o->vram_bytes : free_bytes > margin_bytes ? free_bytes - margin_bytes : 0;
    return 0;
}

/* ---- bytes ---- */

void plan_device_step(const struct plan *p, const struct model *m, struct device_step *out)
{
    *out = (struct device_step){.n_rows = (int)p->chunk_tok,
                                .n_seqs = (int)p->n_seq,
                                .n_ctx = p->n_ctx,
                                .n_expert = m->hp.n_expert,
                                .n_expert_used = m->hp.n_expert_used};
    if (plan_is_split(p))
        out->n_fences = PLAN_LAYER_FENCES + PLAN_LANDING_FENCES * (int)p->gpu.n_landing;
    if (plan_has_lift(p))
        out->n_fences += PLAN_LIFT_FENCES;
    if (plan_has_host_kv(p))
        out->n_fences += PLAN_ATTN_FENCES;
}

static void own_bytes(const struct plan_in *in, const struct plan *p, struct device_own *out)
{
    struct device_step step;

    plan_device_step(p, in->model, &step);
    in->gpu->own_bytes(&step, out);
}

/* Does the CPU run it for layers whose experts it shares with the GPU? Routers are asked about the layer before (run/ahead). */
static bool is_for_experts(const struct plan *p, const struct program *program, const struct op *op)
{
    if (op->kind == OP_MATMUL && op->layer >= 0 && p->look_ahead)
        return op->w[0] - program->weights == program->model->layers[op->layer].w[ROLE_ROUTER];
    return op->kind == OP_MOE;
}

uint64_t plan_host_scratch(const struct plan *p, const struct program *program, const struct program *before,
                           const struct device_ops *cpu)
{
    uint64_t most = before ? cpu->scratch_bytes(before->ops, before->n_ops, before->n_rows, (int)p->n_threads) : 0;

    for (int i = 0; i < program->n_ops; i++) {
        struct tensor dst;
        struct op op = program->ops[i];
        if (op.kind == OP_ATTENTION && plan_has_host_kv(p) && attn_shape_is_split(&op))
            op = attn_shape_states(&op, program->n_rows, &dst);
        else if (!plan_is_split(p) || !is_for_experts(p, program, &op))
            continue;
        uint64_t bytes = cpu->scratch_bytes(&op, 1, program->n_rows, (int)p->n_threads);
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* What attention over pages of both sides needs for a part's rows. */
static void count_attn(const struct program *program, struct plan *p)
{
    struct attn_shape attn;

    attn_shape_of(program, &attn);
    p->gpu.scratch_bytes += attn.dev_bytes;
    p->scratch_bytes += size_up(attn.host_bytes, MAP_BYTES);
}

void plan_gpu_scratch(const struct plan_in *in, const struct program *program, const struct program *before,
                      const struct program *half, struct plan *p)
{
    struct program_host host;
    uint64_t scratch = in->gpu->scratch_bytes(program->ops, program->n_ops, (int)p->chunk_tok, (int)p->n_threads);
    uint64_t arena_bytes = program->arena_bytes;
    struct lift_shape lift = {.bytes = 0};

    if (plan_has_lift(p)) {
        uint64_t own = in->gpu->scratch_bytes(before->ops, before->n_ops, (int)p->chunk_tok, (int)p->n_threads);
        scratch = own > scratch ? own : scratch;
        arena_bytes = before->arena_bytes > arena_bytes ? before->arena_bytes : arena_bytes;
        lift_shape_of(before, &lift);
    }
    p->gpu.lift_bytes = lift.bytes;
    p->gpu.scratch_bytes = arena_bytes + size_up(scratch, 64);
    program_host_bytes(program, &host);
    p->scratch_bytes = size_up(tensor_bytes(program->logits), MAP_BYTES) +
                       size_up(tensor_bytes(program->top->dst[0]), MAP_BYTES) + size_up(host.ids_bytes, MAP_BYTES);
    if (plan_is_split(p))
        p->scratch_bytes += size_up(host.x_bytes, MAP_BYTES) + size_up(host.y_bytes, MAP_BYTES);
    if (plan_has_host_kv(p))
        count_attn(program, p);
    if (half) {
        p->gpu.scratch_bytes += half->arena_bytes;
        count_attn(half, p);
    }
    if (before)
        p->scratch_bytes += size_up(before->arena_bytes, MAP_BYTES);
    p->scratch_bytes += size_up(plan_host_scratch(p, program, before, in->cpu), MAP_BYTES);
}

static uint32_t count_experts(const struct model *m, struct model_span span)
{
    uint32_t n = 0;

    for (int layer = span.first; layer < span.end; layer++) {
        int stack = m->layers[layer].w[ROLE_EXPERT_GATE];
        n += stack >= 0 ? (uint32_t)m->weights[stack].t.ne[2] : 0;
    }
    return n;
}

static int dense_bytes(const struct model *m, struct model_span span, uint64_t *bytes)
{
    struct layout dense;
    int rc = layout_init_dense(m, span, &dense);

    if (rc)
        return rc;
    *bytes = dense.bytes;
    layout_done(&dense);
    return 0;
}

static int count_vram(const struct model *m, const int *n_expert, struct plan *p)
{
    const struct model_span span = plan_span(p, m, PLAN_MAIN);
    struct plan_gpu *g = &p->gpu;
    struct layout all;
    int rc = dense_bytes(m, span, &g->dense_bytes);

    if (!rc)
        rc = layout_init_part(m, span, n_expert, &all);
    if (rc)
        return rc;
    g->expert_bytes = all.bytes - g->dense_bytes;
    layout_done(&all);
    return 0;
}

/* 0: there is none. */
static uint64_t weight_bytes(const struct model *m, int w)
{
    return w < 0 ? 0 : layout_weight_bytes(&m->weights[w]);
}

/* What the host holds beside experts: the dense weights of its layers, and copies of what lies on the GPU: biases of experts that both
 * compute, routers that are asked about the layer before. */
static int count_host_dense(const struct model *m, struct plan *p)
{
    int rc = dense_bytes(m, plan_span(p, m, PLAN_BEFORE), &p->dense_bytes);

    if (!rc && plan_is_split(p))
        p->dense_bytes += plan_bias_bytes(m, (int)p->gpu.first_layer);
    if (!rc && p->look_ahead && plan_is_split(p))
        p->dense_bytes += plan_ahead_bytes(m, (int)p->gpu.first_layer);
    return rc;
}

static int count_slots(const struct model *m, const int *n_away, struct plan *p)
{
    struct slot_shape slots;
    int rc = slot_shape_init(m, n_away, p->slot_ram_bytes, &slots);

    if (rc)
        return rc;
    p->expert_bytes = slots.bytes;
    p->n_slots = (uint32_t)slots.n_slots;
    p->n_slot_experts = (uint32_t)slots.n_experts;
    slot_shape_done(&slots);
    return 0;
}

int plan_gpu_weights(const struct model *m, struct plan *p)
{
    struct plan_gpu *g = &p->gpu;
    int *n_expert = mem_zalloc((size_t)m->hp.n_layer, sizeof *n_expert, MEM_META);

    if (!n_expert)
        return err(ERR_NOMEM, "experts of %d layers", m->hp.n_layer);
    g->n_all_experts = count_experts(m, plan_span(p, m, PLAN_MAIN));
    g->n_host_experts = count_experts(m, plan_span(p, m, PLAN_BEFORE));
    p->expert_bytes = 0;
    p->n_slots = p->n_slot_experts = 0;
    uint32_t n = layout_share(m, (int)g->first_layer, g->n_experts, n_expert);
    int rc = n == g->n_experts ? count_vram(m, n_expert, p)
                               : err(ERR_FORMAT, "%" PRIu32 " experts on the GPU; its layers have %" PRIu32,
                                     g->n_experts, g->n_all_experts);
    if (!rc)
        rc = count_host_dense(m, p);
    if (!rc && p->slot_ram_bytes && !plan_has_host_experts(p))
        rc = err(ERR_FORMAT, "slots for experts in memory, but the GPU holds all");
    if (!rc && p->slot_ram_bytes)
        rc = count_slots(m, n_expert, p);
    mem_free(n_expert);
    return rc;
}

uint64_t plan_ahead_bytes(const struct model *m, int first_layer)
{
    uint64_t sum = 0;

    for (int layer = first_layer; layer < m->hp.n_layer; layer++) {
        const int *w = m->layers[layer].w;
        if (w[ROLE_ROUTER] >= 0)
            sum += weight_bytes(m, w[ROLE_ROUTER]) + weight_bytes(m, w[ROLE_ROUTER_BIAS]) +
                   weight_bytes(m, model_router_norm(m, layer));
    }
    return sum;
}

uint64_t plan_bias_bytes(const struct model *m, int first_layer)
{
    uint64_t sum = 0;

    for (int layer = first_layer; layer < m->hp.n_layer; layer++) {
        const int *w = m->layers[layer].w;
        sum += weight_bytes(m, w[ROLE_EXPERT_GATE_BIAS]) + weight_bytes(m, w[ROLE_EXPERT_UP_BIAS]) +
               weight_bytes(m, w[ROLE_EXPERT_DOWN_BIAS]);
    }
    return sum;
}

uint64_t plan_gpu_room_bytes(const struct model *m)
{
    static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};
    uint64_t most = 0;

    for (int layer = 0; layer < m->hp.n_layer; layer++) {
        uint64_t bytes = 0;
        for (int i = 0; i < 3; i++) {
            int stack = m->layers[layer].w[stacks[i]];
            bytes += stack < 0 ? 0 : size_up(model_matrix_bytes(&m->weights[stack]), PLAN_ROOM_ALIGN);
        }
        most = bytes > most ? bytes : most;
    }
    return most;
}

uint64_t plan_gpu_move_bytes(const struct model *m)
{
    uint64_t most = 0;

    for (int layer = 0; layer < m->hp.n_layer; layer++) {
        uint64_t bytes = model_expert_bytes(m, layer);
        most = bytes > most ? bytes : most;
    }
    return most;
}

void plan_gpu_total(const struct plan_in *in, const struct kv_shape *shape, struct plan *p)
{
    struct plan_gpu *g = &p->gpu;
    struct device_own own;
    int n_allocs;

    own_bytes(in, p, &own);
    g->kv_bytes = plan_kv_bytes(shape, p);
    g->record_bytes = plan_record_bytes(shape->record_bytes, p);
    g->landing_bytes = g->n_landing * plan_gpu_room_bytes(in->model); /* and as much pinned memory */
    n_allocs = N_ALLOCS + own.n_allocs + (g->n_landing ? N_LANDING_ALLOCS : 0) +
               (plan_has_host_kv(p) ? N_HOST_KV_ALLOCS : 0) + (plan_has_halves(p) ? N_HALF_ALLOCS : 0) +
               (plan_has_lift(p) ? N_LIFT_ALLOCS : 0);
    g->own_bytes = own.dev_bytes + (uint64_t)n_allocs * GRANULE_BYTES;
    g->total_bytes =
        g->dense_bytes + g->expert_bytes + g->landing_bytes + g->lift_bytes + g->scratch_bytes + g->own_bytes;
    if (!size_add(g->total_bytes, g->kv_bytes, &g->total_bytes) ||
        !size_add(g->total_bytes, g->record_bytes, &g->total_bytes))
        g->total_bytes = UINT64_MAX;
    p->stage_bytes =
        PLAN_STAGE_BYTES + own.host_bytes + (g->moves ? plan_gpu_move_bytes(in->model) : 0) + g->landing_bytes;
}

int plan_gpu_refuse(const struct plan *p, const struct plan_in *in)
{
    const struct plan_gpu *g = &p->gpu;
    int n_layers = in->model->hp.n_layer - (int)g->first_layer;
    char b[7][32], records[64];

    return err(ERR_LIMIT,
               "%s does not fit GPU %" PRIu32
               ", even with all experts elsewhere and no more than %d layer%s there: %s wanted, "
               "%s allowed, %s too much. Dense weights %s, KV cache %s (%" PRIu32 " positions x %" PRIu32
               ")%s, scratch %s, driver and tables %s",
               in->model->name, g->number, n_layers, n_layers == 1 ? "" : "s",
               size_format(g->total_bytes, b[0], sizeof b[0]), size_format(g->budget_bytes, b[1], sizeof b[1]),
               size_format(g->total_bytes - g->budget_bytes, b[2], sizeof b[2]),
               size_format(g->dense_bytes, b[3], sizeof b[3]), size_format(g->kv_bytes, b[4], sizeof b[4]), p->n_ctx,
               p->n_seq, plan_say_records(g->record_bytes, records, sizeof records),
               size_format(g->scratch_bytes, b[5], sizeof b[5]), size_format(g->own_bytes, b[6], sizeof b[6]));
}

/* ---- what fits ---- */

/* Steps in halves have activations of their own: where n decides on them, all is counted anew. */
static int set_experts(const struct plan_in *in, struct kv_shape *shape, uint32_t n, struct plan *p)
{
    bool had_halves = plan_has_halves(p);

    p->gpu.n_experts = n;
    if (plan_has_halves(p) != had_halves)
        return plan_count(in, shape, p);
    int rc = plan_gpu_weights(in->model, p);
    if (!rc)
        plan_set_ctx(in, shape, p->n_ctx, p);
    return rc;
}

/* The most experts that fit the GPU. */
static int fill_gpu(const struct plan_in *in, struct kv_shape *shape, struct plan *p)
{
    uint32_t lo = 0, hi = p->gpu.n_all_experts;
    int rc = 0;

    while (!rc && lo < hi) {
        uint32_t mid = lo + (hi - lo + 1) / 2;
        rc = set_experts(in, shape, mid, p);
        if (p->gpu.total_bytes <= p->gpu.budget_bytes)
            lo = mid;
        else
            hi = mid - 1;
    }
    return rc ? rc : set_experts(in, shape, lo, p);
}

/* Places for experts that are copied: twice what a token wants of a layer, so that those of the next layer can be on their way; but at
 * most a quarter of what experts could have instead. */
static int fill_landing(const struct plan_in *in, struct kv_shape *shape, struct plan *p)
{
    uint32_t want = 2 * (uint32_t)in->model->hp.n_expert_used, most = (p->gpu.n_experts + 2) / 4;

    p->gpu.n_landing = want < most ? want : most;
    int rc = p->gpu.n_landing ? fill_gpu(in, shape, p) : 0;
    if (rc || p->gpu.total_bytes <= p->gpu.budget_bytes)
        return rc;
    p->gpu.n_landing = 0;
    return fill_gpu(in, shape, p);
}

/* Slots for what a token needs of a layer. */
static int least_slots(const struct model *m, const struct plan *p, uint64_t *bytes)
{
    struct slot_shape least;
    int *n_away = mem_zalloc((size_t)m->hp.n_layer, sizeof *n_away, MEM_META);

    if (!n_away)
        return err(ERR_NOMEM, "experts of %d layers", m->hp.n_layer);
    layout_share(m, (int)p->gpu.first_layer, p->gpu.n_experts, n_away);
    int rc = slot_shape_init(m, n_away, 0, &least);
    mem_free(n_away);
    if (rc)
        return rc;
    *bytes = least.bytes;
    slot_shape_done(&least);
    return 0;
}

/* Pinning has the system clear and hold memory at once, before the first token, and never take it back: a quarter of what ferry may take,
 * a GiB at most. Not measured on a GPU yet. */
#define PIN_MOST_BYTES GIB
static uint64_t pin_room(const struct plan *p)
{
    uint64_t most = p->budget_bytes / 4 < PIN_MOST_BYTES ? p->budget_bytes / 4 : PIN_MOST_BYTES;

    if (!plan_is_split(p) || !p->gpu.n_landing)
        return 0;
    return p->expert_bytes < most ? p->expert_bytes : most / MAP_BYTES * MAP_BYTES;
}

/* The host's slots: at least what a token needs of a layer, at most all experts that are not on the GPU. */
static int fill_host(const struct plan_in *in, const struct plan_opts *o, struct kv_shape *shape, struct plan *p)
{
    p->slot_ram_bytes = o->expert_ram_bytes;
    int rc = p->slot_ram_bytes ? 0 : least_slots(in->model, p, &p->slot_ram_bytes);

    if (!rc)
        rc = set_experts(in, shape, p->gpu.n_experts, p);
    if (rc || o->expert_ram_bytes || !plan_fits(p))
        return rc;
    p->slot_ram_bytes = plan_slot_room(p);
    return set_experts(in, shape, p->gpu.n_experts, p);
}

/* ---- a cache that does not fit ---- */

/* Positions of the cache of layers without windows; 0: there are none. */
static int64_t full_tok(const struct kv_shape *shape, const struct plan *p)
{
    const struct kv_pool pool = {
        .n_seq = p->n_seq, .n_ctx = p->n_ctx, .chunk_tok = p->chunk_tok, .pool_tok = p->kv_tok};
    return model_kv_pool_pages(shape, 0, &pool) * DEVICE_PAGE_TOK;
}

/* A page of a sequence serves n rows of it: bringing it up takes as long for any number of rows, computing with it n times as long. The
 * numbers are those of one layer, a key and a row; all layers are alike. */
static uint32_t stage_rows(const struct plan_in *in)
{
    const struct model *m = in->model;
    const struct machine *machine = in->machine;
    double unit_s = machine->ops[OP_ATTENTION].unit_s;

    if (machine->pcie_bytes_per_s <= 0 || unit_s <= 0)
        return DEFAULT_STAGE_ROWS;
    double values = (double)m->hp.head_dim_k + m->hp.head_dim_v;
    double up_values = m->hp.kv_is_latent ? m->hp.head_dim_k : values;
    double up_s = m->layers[0].n_head_kv * up_values * 2 / machine->pcie_bytes_per_s; /* F16; Q8_0 is half of it */
    double rows = up_s / (m->layers[0].n_head * values * unit_s);
    return rows < LEAST_STAGE_ROWS ? LEAST_STAGE_ROWS : rows < INT32_MAX ? (uint32_t)rows : INT32_MAX;
}

static void set_kv_tok(const struct plan_in *in, const struct kv_shape *shape, uint32_t n_segments, struct plan *p)
{
    p->gpu.kv_tok = n_segments * DEVICE_ATTN_SEGMENT_TOK;
    plan_set_ctx(in, shape, p->n_ctx, p);
}

static bool fits_gpu(const struct plan *p)
{
    return p->gpu.total_bytes <= p->gpu.budget_bytes;
}

/* The most segments that the GPU can hold; the host at least one. */
static void fill_kv(const struct plan_in *in, const struct kv_shape *shape, struct plan *p)
{
    uint32_t lo = 1, hi = (uint32_t)((full_tok(shape, p) - 1) / DEVICE_ATTN_SEGMENT_TOK);

    while (lo < hi) {
        uint32_t mid = lo + (hi - lo + 1) / 2;
        set_kv_tok(in, shape, mid, p);
        if (fits_gpu(p))
            lo = mid;
        else
            hi = mid - 1;
    }
    set_kv_tok(in, shape, lo, p);
}

/* Share the cache between the GPU, which holds as much as it can, and the host. Where not even a segment fits the GPU, or there is
 * nothing to share, the plan stays as it was. */
static int split_kv(const struct plan_in *in, const struct plan_opts *o, struct kv_shape *shape, struct plan *p)
{
    if (!shape->page_bytes[0] || full_tok(shape, p) <= DEVICE_ATTN_SEGMENT_TOK)
        return 0;
    p->gpu.kv_tok = DEVICE_ATTN_SEGMENT_TOK;
    p->gpu.stage_rows = stage_rows(in);
    int rc = plan_count(in, shape, p);
    if (rc)
        return rc;
    if (!fits_gpu(p)) {
        p->gpu.kv_tok = p->gpu.stage_rows = 0;
        return plan_count(in, shape, p);
    }
    fill_kv(in, shape, p);
    if (!plan_fits(p) && !o->n_ctx && plan_lower_ctx(in, shape, PLAN_LEAST_CTX, p))
        fill_kv(in, shape, p);
    return 0;
}

/* ---- layers that do not fit ---- */

/* lifts: with room for their weights on the GPU. */
static int set_layers(const struct plan_in *in, struct kv_shape *shape, uint32_t first, bool lifts, struct plan *p)
{
    p->gpu.first_layer = first;
    p->gpu.lift_rows = lifts ? cost_gpu_lift_rows(in, p) : 0;
    return plan_count(in, shape, p);
}

/* The fewest layers before the GPU's with which those fit it; where none do, all but one. */
static int leave_fewest(const struct plan_in *in, struct kv_shape *shape, bool lifts, struct plan *p)
{
    uint32_t lo = 1, hi = (uint32_t)in->model->hp.n_layer - 1;
    int rc = 0;

    while (!rc && lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        rc = set_layers(in, shape, mid, lifts, p);
        if (fits_gpu(p))
            hi = mid;
        else
            lo = mid + 1;
    }
    return rc ? rc : set_layers(in, shape, lo, lifts, p);
}

/* Room for the weights of two products costs the GPU about a layer. Prompts gain much by it (not where there are experts, which would
 * stay the CPU's, or recurrent layers, whose records would); but for each token that is drawn a layer less is a layer more of the CPU's, so
 * no more than a tenth of its layers are given for it. */
static int leave_layers(const struct plan_in *in, struct kv_shape *shape, struct plan *p)
{
    const int n_layer = in->model->hp.n_layer;
    int rc = leave_fewest(in, shape, false, p);

    if (rc || !fits_gpu(p) || in->model->hp.n_expert || model_has_records(in->model))
        return rc;
    const uint32_t fewest = p->gpu.first_layer;
    rc = leave_fewest(in, shape, true, p);
    if (!rc && (!fits_gpu(p) || 10 * (n_layer - (int)p->gpu.first_layer) < 9 * (n_layer - (int)fewest)))
        rc = set_layers(in, shape, fewest, false, p);
    return rc;
}

/* All but experts. A cache that is shared costs each of the GPU's layers a wait, so where layers leave, the others have theirs whole,
 * unless not even one can. A context that nobody asked for is then lowered for the host's memory alone: for the GPU's it would save a
 * layer or two, and cost most of the context. */
static int fit_layers(const struct plan_in *in, const struct plan_opts *o, struct kv_shape *shape, struct plan *p)
{
    int rc = 0;

    if (plan_fits(p) || (!o->n_ctx && plan_lower_ctx(in, shape, PLAN_LEAST_CTX, p)))
        return 0;
    rc = split_kv(in, o, shape, p);
    if (rc || fits_gpu(p) || in->model->hp.n_layer < 2 || o->experts_first)
        return rc;
    rc = leave_layers(in, shape, p);
    if (!rc && !fits_gpu(p))
        return split_kv(in, o, shape, p);
    if (!rc && !plan_fits(p) && !o->n_ctx)
        plan_lower_ctx(in, shape, PLAN_LEAST_CTX, p);
    return rc;
}

/* Without what the host computes of the GPU's layers, and, where it has no experts at all, without looking ahead. */
static int keep_experts(const struct plan_in *in, struct kv_shape *shape, struct plan *p)
{
    p->gpu.moves = false;
    p->look_ahead = p->look_ahead && plan_has_host_experts(p);
    return plan_count(in, shape, p);
}

int plan_gpu_fit(const struct plan_in *in, const struct plan_opts *o, struct kv_shape *shape, struct plan *p)
{
    p->slot_ram_bytes = 0;
    int rc = set_experts(in, shape, 0, p);
    if (!rc && o->experts_first)
        rc = set_experts(in, shape, p->gpu.n_all_experts, p);
    if (!rc)
        rc = fit_layers(in, o, shape, p);
    if (rc || !plan_fits(p))
        return rc ? rc : plan_refuse(p, in);
    rc = fill_gpu(in, shape, p);
    if (!rc && plan_is_split(p) && p->gpu.copies != PLAN_COPIES_NEVER)
        rc = fill_landing(in, shape, p);
    if (!rc && !plan_is_split(p))
        rc = keep_experts(in, shape, p);
    if (!rc && plan_has_host_experts(p))
        rc = fill_host(in, o, shape, p);
    p->gpu.pin_bytes = pin_room(p);
    return rc ? rc : plan_fits(p) ? 0 : plan_refuse(p, in);
}
