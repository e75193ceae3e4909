/* The planner: chooses what was left open, counts every byte by purpose and holds the sum against the budget. A GPU's part is
 * plan_gpu.c's. Pure arithmetic on machine, model and options; plan_text.c writes plans down and reads them. */
#include "src/plan/plan.h"

#include "src/base/err.h"
#include "src/base/size.h"
#include "src/model/gguf.h"
#include "src/model/layout.h"
#include "src/model/program.h"
#include "src/model/slot_shape.h"
#include "src/plan/cost.h"
#include "src/plan/plan_in.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Left alone where no --ram is given: the rest of the system moves, too. A sixteenth of 8 GiB is half a GiB. */
#define MARGIN_SHIFT 4
#define MARGIN_LEAST_BYTES (256 * MIB)
#define DEFAULT_CTX 8192
/* Rows of a prefill step: enough that each weight read serves many rows, few enough that Ctrl-C is answered soon. */
#define DEFAULT_CHUNK 512
/* Pages are asked of the system in these. */
#define MAP_BYTES 4096

/* ---- bytes by purpose ---- */

/* Pages of one side. */
static uint64_t kv_bytes(const struct kv_shape *shape, const struct plan *p,
                         int64_t pages(const struct kv_shape *s, int group, const struct kv_pool *pool))
{
    const struct kv_pool pool = {.n_seq = p->n_seq,
                                 .n_ctx = p->n_ctx,
                                 .chunk_tok = p->chunk_tok,
                                 .pool_tok = p->kv_tok,
                                 .dev_tok = p->has_gpu ? p->gpu.kv_tok : 0};
    uint64_t sum = 0, bytes;

    for (int group = 0; group < shape->n_groups; group++) {
        int64_t n_pages = pages(shape, group, &pool);
        if (n_pages < 0 || !size_mul((uint64_t)n_pages, shape->page_bytes[group], &bytes) ||
            !size_add(sum, bytes, &sum))
            return UINT64_MAX;
    }
    return size_align(sum, MAP_BYTES, &sum) ? sum : UINT64_MAX;
}

uint64_t plan_kv_bytes(const struct kv_shape *shape, const struct plan *p)
{
    return kv_bytes(shape, p, model_kv_dev_pages);
}

uint64_t plan_kv_host_bytes(const struct kv_shape *shape, const struct plan *p)
{
    return kv_bytes(shape, p, model_kv_host_pages);
}

uint64_t plan_record_bytes(uint64_t record_bytes, const struct plan *p)
{
    uint64_t bytes;

    return size_mul((uint64_t)model_kv_records(p->n_seq, p->kv_tok > 0), record_bytes, &bytes) &&
                   size_align(bytes, MAP_BYTES, &bytes)
               ? bytes
               : UINT64_MAX;
}

static int check_op(const struct program *program, const struct op *op, const struct device_ops *dev)
{
    const struct tensor *w = op->w[0];
    ptrdiff_t weight = w ? w - program->weights : -1;

    if (dev->can(op))
        return 0;
    return err(ERR_UNSUPPORTED, "the %s cannot run %s of layer %d%s%s%s%s", dev->name, device_op_name(op->kind),
               op->layer, w ? ", tensor " : "", w ? program->model->weights[weight].name : "", w ? " of type " : "",
               w ? quant_info((int)w->type)->name : "");
}

struct model_span plan_span(const struct plan *p, const struct model *m, enum plan_part part)
{
    int border = p->has_gpu ? (int)p->gpu.first_layer : 0;

    return part == PLAN_BEFORE ? (struct model_span){0, border} : (struct model_span){border, m->hp.n_layer};
}

int plan_program(const struct plan *p, const struct model *m, enum plan_part part, struct program **out)
{
    bool is_half = part == PLAN_HALF; /* a row of each sequence at most, none of logits */

    return program_make(&(struct program_args){.model = m,
                                               .n_rows = (int)(is_half ? p->n_seq : p->chunk_tok),
                                               .n_out = is_half ? 1 : (int)p->n_out,
                                               .kv_type = p->kv_type,
                                               .has_top = p->has_gpu, /* logits lie in the host's memory otherwise */
                                               .span = plan_span(p, m, part)},
                        out);
}

/* Every op must be one that its device runs (experts of a GPU's layers: both devices). */
static int check_ops(const struct plan_in *in, const struct program *program, bool by_gpu)
{
    int rc = 0;

    for (int i = 0; i < program->n_ops && !rc; i++) {
        const struct op *op = &program->ops[i];
        if (by_gpu)
            rc = check_op(program, op, in->gpu);
        if (!rc && (!by_gpu || op->kind == OP_MOE))
            rc = check_op(program, op, in->cpu);
    }
    return rc;
}

/* What activations and the devices' own scratch take. */
static int count_scratch(const struct plan_in *in, struct plan *p)
{
    struct program *program, *before = NULL, *half = NULL;
    int rc = plan_program(p, in->model, PLAN_MAIN, &program);

    if (!rc)
        rc = check_ops(in, program, p->has_gpu);
    if (!rc && plan_has_host_layers(p))
        rc = plan_program(p, in->model, PLAN_BEFORE, &before);
    if (!rc && before)
        rc = check_ops(in, before, false);
    if (!rc && before && plan_has_lift(p))
        rc = check_ops(in, before, true);
    if (!rc && plan_has_halves(p))
        rc = plan_program(p, in->model, PLAN_HALF, &half);
    if (!rc && p->has_gpu)
        plan_gpu_scratch(in, program, before, half, p);
    else if (!rc)
        p->scratch_bytes =
            size_up(program->arena_bytes, MAP_BYTES) +
            size_up(in->cpu->scratch_bytes(program->ops, program->n_ops, (int)p->chunk_tok, (int)p->n_threads),
                    MAP_BYTES);
    program_free(half);
    program_free(before);
    program_free(program);
    return rc;
}

/* Slots for experts, and the dense weights as layout.h says. */
static int count_slots(const struct model *m, struct plan *p)
{
    struct slot_shape slots;
    struct layout layout;
    int rc = slot_shape_init(m, NULL, p->slot_ram_bytes, &slots);

    if (rc)
        return rc;
    p->expert_bytes = slots.bytes;
    p->n_slots = (uint32_t)slots.n_slots;
    p->n_slot_experts = (uint32_t)slots.n_experts;
    slot_shape_done(&slots);
    rc = layout_init_dense(m, model_all(m), &layout);
    if (rc)
        return rc;
    p->dense_bytes = layout.bytes;
    layout_done(&layout);
    return 0;
}

/* Mapped, weights take what they are; held in memory, they lie as layout.h says, and dense ones stand for its rounding. */
int plan_count_weights(const struct model *m, struct plan *p)
{
    struct layout layout;
    uint64_t all_bytes = 0;

    if (p->has_gpu)
        return plan_gpu_weights(m, p);

    p->expert_bytes = 0;
    p->n_slots = p->n_slot_experts = 0;
    if (p->slot_ram_bytes)
        return count_slots(m, p);
    for (int i = 0; i < m->n_weights; i++) {
        all_bytes += layout_weight_bytes(&m->weights[i]);
        if (m->weights[i].is_expert)
            p->expert_bytes += layout_weight_bytes(&m->weights[i]);
    }
    if (p->io != PLAN_IO_MMAP) {
        int rc = layout_init(m, &layout);
        if (rc)
            return rc;
        all_bytes = layout.bytes;
        layout_done(&layout);
    }
    p->dense_bytes = all_bytes - p->expert_bytes;
    return 0;
}

/* What the driver of a GPU keeps in the process: what an idle one is commonly seen to take. */
#define DRIVER_BYTES (256 * MIB)

/* The kernel's own page tables for memory, which a cgroup counts: 8 bytes for each small page. */
#define PAGE_TABLE_PART (MAP_BYTES / 8)

/* The header is kept, the tokenizer makes tables of about three times its size, and every thread has a stack; the program and
 * its libraries are files, some of whose pages stay. */
static uint64_t meta_bytes(const struct model *m, const struct plan *p)
{
    uint64_t header_bytes = m->gguf ? gguf_header_bytes(m->gguf) : 0;
    uint64_t mapped_bytes = p->dense_bytes + p->expert_bytes + p->scratch_bytes;

    if (!size_add(mapped_bytes, p->kv_bytes, &mapped_bytes) || !size_add(mapped_bytes, p->record_bytes, &mapped_bytes))
        mapped_bytes = UINT64_MAX;
    return 4 * header_bytes + 96 * MIB + (uint64_t)p->n_threads * 256 * KIB + mapped_bytes / PAGE_TABLE_PART +
           (p->has_gpu ? DRIVER_BYTES : 0);
}

static void count_rest(const struct model *m, struct plan *p)
{
    /* Weights are read straight to their places, but for those on their way to a GPU. */
    if (!p->has_gpu)
        p->stage_bytes = 0;
    p->meta_bytes = meta_bytes(m, p);
    p->total_bytes =
        p->dense_bytes + p->expert_bytes + p->scratch_bytes + p->stage_bytes + p->meta_bytes + p->trace_bytes;
    if (!size_add(p->total_bytes, p->kv_bytes, &p->total_bytes) ||
        !size_add(p->total_bytes, p->record_bytes, &p->total_bytes))
        p->total_bytes = UINT64_MAX;
}

uint64_t plan_must_fit_bytes(const struct plan *p)
{
    return p->io == PLAN_IO_MMAP ? p->total_bytes - p->dense_bytes - p->expert_bytes : p->total_bytes;
}

const char *plan_say_records(uint64_t record_bytes, char *out, size_t out_bytes)
{
    char bytes[32];

    snprintf(out, out_bytes, "%s%s", record_bytes ? ", recurrent state " : "",
             record_bytes ? size_format(record_bytes, bytes, sizeof bytes) : "");
    return out;
}

int plan_refuse(const struct plan *p, const struct plan_in *in)
{
    if (p->has_gpu && p->gpu.total_bytes > p->gpu.budget_bytes)
        return plan_gpu_refuse(p, in);

    char b[7][32], records[64];
    const char *mapped = p->io == PLAN_IO_MMAP ? " (mapped: not counted)" : "";
    uint64_t need_bytes = plan_must_fit_bytes(p);

    return err(
        ERR_LIMIT,
        "%s does not fit: %s wanted, %s allowed, %s too much. Weights %s%s, KV cache %s (%" PRIu32
        " positions x %" PRIu32 ")%s, scratch %s, reading, tables and traces %s",
        in->model->name, size_format(need_bytes, b[0], sizeof b[0]), size_format(p->budget_bytes, b[1], sizeof b[1]),
        size_format(need_bytes - p->budget_bytes, b[2], sizeof b[2]),
        size_format(p->dense_bytes + p->expert_bytes, b[3], sizeof b[3]), mapped,
        size_format(p->kv_bytes, b[4], sizeof b[4]), p->n_ctx, p->n_seq,
        plan_say_records(p->record_bytes, records, sizeof records), size_format(p->scratch_bytes, b[5], sizeof b[5]),
        size_format(p->stage_bytes + p->meta_bytes + p->trace_bytes, b[6], sizeof b[6]));
}

/* ---- choices ---- */

uint32_t plan_default_ctx(const struct model *m)
{
    int n = m->hp.n_ctx_train;
    return n > 0 && n < DEFAULT_CTX ? (uint32_t)n : DEFAULT_CTX;
}

static uint32_t or_else(uint32_t wanted, uint32_t choice)
{
    return wanted ? wanted : choice;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static int choose_budget(const struct machine *machine, const struct plan_opts *o, struct plan *p)
{
    char a[32], b[32];
    uint64_t most_bytes =
        machine->ram_limit_bytes < machine->ram_total_bytes ? machine->ram_limit_bytes : machine->ram_total_bytes;
    uint64_t free_bytes = machine->ram_free_bytes, margin_bytes = free_bytes >> MARGIN_SHIFT;

    if (o->ram_bytes > most_bytes)
        return err(ERR_LIMIT, "%s of memory asked for; this machine%s %s", size_format(o->ram_bytes, a, sizeof a),
                   machine->ram_limit_bytes < machine->ram_total_bytes ? " allows this process" : " has",
                   size_format(most_bytes, b, sizeof b));
    if (margin_bytes < MARGIN_LEAST_BYTES)
        margin_bytes = MARGIN_LEAST_BYTES;
    p->budget_bytes = o->ram_bytes ? o->ram_bytes : free_bytes > margin_bytes ? free_bytes - margin_bytes : 0;
    return 0;
}

static int check_opts(const struct plan_opts *o)
{
    const struct quant_info *kv = quant_info((int)o->kv_type);

    if (o->kv_type != QUANT_F32 && o->kv_type != QUANT_F16 && o->kv_type != QUANT_Q8_0)
        return err(ERR_ARG, "a KV cache of type %s: F16 and Q8_0 are known", kv ? kv->name : "?");
    if (o->n_ctx > INT32_MAX || o->n_seq > INT32_MAX || o->chunk_tok > INT32_MAX || o->n_threads > INT32_MAX)
        return err(ERR_ARG,
                   "context %" PRIu32 ", sequences %" PRIu32 ", chunk %" PRIu32 ", threads %" PRIu32
                   ": at most %d each",
                   o->n_ctx, o->n_seq, o->chunk_tok, o->n_threads, INT32_MAX);
    if (o->expert_ram_bytes && o->io == PLAN_IO_MMAP)
        return err(ERR_ARG, "memory for experts cannot be set where the file is mapped: the system decides there");
    if (!(o->skew >= 0 && o->skew <= PLAN_MAX_SKEW))
        return err(ERR_ARG, "a router's skew of %g: 0 to %d", o->skew, PLAN_MAX_SKEW);
    if ((unsigned)o->io > PLAN_IO_MMAP || (unsigned)o->prefill > DEVICE_PREFILL_BLAS)
        return err(ERR_ARG, "way of reading %d, of prefill %d: not known", (int)o->io, (int)o->prefill);
    return 0;
}

/* Where the cores lie, which may be fewer nodes than there are. Mapped weights are the page cache's, which lies where it was read. */
static void choose_numa(const struct machine *m, struct plan *p)
{
    bool is_one = !(m->numa_nodes & (m->numa_nodes - 1));

    p->numa = PLAN_NUMA_LEFT;
    p->numa_nodes = 0;
    if (m->n_numa < 2 || !m->numa_nodes || p->io == PLAN_IO_MMAP)
        return;
    p->numa = is_one ? PLAN_NUMA_BOUND : PLAN_NUMA_INTERLEAVED;
    p->numa_nodes = m->numa_nodes;
}

static int choose(const struct plan_in *in, const struct plan_opts *o, struct plan *p)
{
    int rc = check_opts(o);

    if (!rc && o->expert_ram_bytes && !in->model->expert_bytes)
        rc = err(ERR_ARG, "memory for experts: %s has none", in->model->name);
    if (rc)
        return rc;
    memset(p, 0, sizeof *p); /* padding too: same inputs, same bytes */
    p->machine_id = in->machine->identity;
    p->model_id = in->model->identity;
    p->n_threads = or_else(o->n_threads, in->machine->n_cores > 0 ? (uint32_t)in->machine->n_cores : 1);
    p->n_ctx = or_else(o->n_ctx, plan_default_ctx(in->model));
    p->n_seq = or_else(o->n_seq, 1);
    p->chunk_tok = or_else(o->chunk_tok, DEFAULT_CHUNK);
    p->kv_type = o->kv_type == QUANT_Q8_0 ? QUANT_Q8_0 : QUANT_F16;
    p->io = o->io != PLAN_IO_AUTO ? o->io : in->machine->has_uring ? PLAN_IO_URING : PLAN_IO_PREAD;
    p->slot_ram_bytes = o->expert_ram_bytes;
    p->prefill = o->prefill;
    p->skew = o->skew;
    p->pin = !o->no_pin;
    p->trace_bytes = o->trace_bytes;
    p->kv_tok = o->kv_tok;
    if (!p->kv_tok)
        p->chunk_tok = least(p->chunk_tok, p->n_ctx);
    p->n_out = least(or_else(o->n_out, 1), p->chunk_tok);
    snprintf(p->isa, sizeof p->isa, "%s", o->isa[0] ? o->isa : in->machine->isa);
    rc = choose_budget(in->machine, o, p);
    return rc || !in->gpu ? rc : plan_gpu_choose(in, o, p);
}

bool plan_fits(const struct plan *p)
{
    return plan_must_fit_bytes(p) <= p->budget_bytes && (!p->has_gpu || p->gpu.total_bytes <= p->gpu.budget_bytes);
}

void plan_set_ctx(const struct plan_in *in, const struct kv_shape *shape, uint32_t n_ctx, struct plan *p)
{
    p->n_ctx = n_ctx;
    p->kv_bytes = p->has_gpu ? plan_kv_host_bytes(shape, p) : plan_kv_bytes(shape, p);
    p->record_bytes = plan_record_bytes(p->has_gpu ? shape->host_record_bytes : shape->record_bytes, p);
    if (p->has_gpu)
        plan_gpu_total(in, shape, p);
    count_rest(in->model, p);
}

bool plan_lower_ctx(const struct plan_in *in, const struct kv_shape *shape, uint32_t floor, struct plan *p)
{
    uint32_t was = p->n_ctx, lo = floor > p->chunk_tok || p->kv_tok ? floor : p->chunk_tok, hi = was;

    lo = (lo + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK;
    hi /= DEVICE_PAGE_TOK;
    if (lo > hi)
        return false;
    plan_set_ctx(in, shape, lo * DEVICE_PAGE_TOK, p);
    if (!plan_fits(p)) {
        plan_set_ctx(in, shape, was, p);
        return false;
    }
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo + 1) / 2;
        plan_set_ctx(in, shape, mid * DEVICE_PAGE_TOK, p);
        if (plan_fits(p))
            lo = mid;
        else
            hi = mid - 1;
    }
    plan_set_ctx(in, shape, lo * DEVICE_PAGE_TOK, p);
    return true;
}

uint64_t plan_slot_room(const struct plan *p)
{
    return p->expert_bytes + (p->budget_bytes - p->total_bytes) / (PAGE_TABLE_PART + 1) * PAGE_TABLE_PART;
}

static int set_slots(const struct plan_in *in, const struct kv_shape *shape, uint64_t ram_bytes, struct plan *p)
{
    p->slot_ram_bytes = ram_bytes;
    int rc = plan_count_weights(in->model, p);
    if (!rc)
        plan_set_ctx(in, shape, p->n_ctx, p);
    return rc;
}

/* Dense weights resident, slots for experts in all that is left of the budget, if that holds what a token needs of a layer.
 * Otherwise the plan stays without slots. */
static int try_slots(const struct plan_in *in, const struct plan_opts *o, const struct kv_shape *shape, struct plan *p)
{
    struct slot_shape least;

    if (p->io == PLAN_IO_MMAP || p->slot_ram_bytes || !in->model->expert_bytes)
        return 0;
    int rc = slot_shape_init(in->model, NULL, 0, &least);
    if (rc)
        return rc;
    uint64_t least_bytes = least.bytes;
    slot_shape_done(&least);
    rc = set_slots(in, shape, least_bytes, p);
    if (rc)
        return rc;
    if (plan_fits(p) || (!o->n_ctx && plan_lower_ctx(in, shape, PLAN_LEAST_CTX, p)))
        return set_slots(in, shape, plan_slot_room(p), p);
    return set_slots(in, shape, 0, p);
}

/* Ways out, mildest first: a shorter context (if nobody asked for one), slots for experts, the weights mapped, mapped with a
 * context that is no use for much. */
static int fit(const struct plan_in *in, const struct plan_opts *o, struct kv_shape *shape, struct plan *p)
{
    struct plan first;
    int rc;

    if (p->has_gpu)
        return plan_gpu_fit(in, o, shape, p);
    plan_set_ctx(in, shape, p->n_ctx, p);
    if (plan_fits(p) || (!o->n_ctx && plan_lower_ctx(in, shape, PLAN_LEAST_CTX, p)))
        return 0;
    rc = try_slots(in, o, shape, p);
    if (rc || plan_fits(p))
        return rc;
    first = *p;
    if (o->io == PLAN_IO_AUTO && !o->expert_ram_bytes) {
        p->io = PLAN_IO_MMAP;
        rc = plan_count_weights(in->model, p);
        if (rc)
            return rc;
        plan_set_ctx(in, shape, p->n_ctx, p);
        if (plan_fits(p) || (!o->n_ctx && plan_lower_ctx(in, shape, DEVICE_PAGE_TOK, p)))
            return 0;
    }
    if (!o->n_ctx && p->io != PLAN_IO_MMAP && plan_lower_ctx(in, shape, DEVICE_PAGE_TOK, p))
        return 0;
    struct plan *told = p->io == PLAN_IO_MMAP ? p : &first;
    if (!o->n_ctx) /* say what would have been enough */
        plan_set_ctx(in, shape, least(told->n_ctx, (uint32_t)size_up(told->chunk_tok, DEVICE_PAGE_TOK)), told);
    return plan_refuse(told, in);
}

/* ---- predictions ---- */

/* Mapped weights that pass the budget are read again from disk. Without knowing which experts will be wanted, every byte is as
 * likely to be absent as another. */
double plan_missing_share(const struct plan *p)
{
    uint64_t weights_bytes = p->dense_bytes + p->expert_bytes, others_bytes = p->total_bytes - weights_bytes;

    if (p->total_bytes <= p->budget_bytes || !weights_bytes)
        return 0;
    uint64_t room_bytes = p->budget_bytes > others_bytes ? p->budget_bytes - others_bytes : 0;
    return 1 - (double)room_bytes / (double)weights_bytes;
}

bool plan_has_kernels(const struct plan *p, const struct machine *m)
{
    return machine_has_kernels(m) && (!p->isa[0] || !strcmp(p->isa, m->isa));
}

bool plan_is_measured(const struct plan *p, const struct machine *m)
{
    return !p->has_gpu && plan_has_kernels(p, m);
}

int plan_count(const struct plan_in *in, struct kv_shape *shape, struct plan *p)
{
    int rc = model_kv_shape(in->model, p->kv_type, (int)p->gpu.first_layer, shape, NULL);

    if (!rc)
        rc = plan_count_weights(in->model, p);
    if (!rc)
        rc = count_scratch(in, p);
    if (rc)
        return rc;
    plan_set_ctx(in, shape, p->n_ctx, p);
    return 0;
}

int plan_check(const struct plan_in *in, struct plan *p)
{
    choose_numa(in->machine, p);
    if (!plan_fits(p))
        return plan_refuse(p, in);
    if (p->has_gpu && !plan_has_host_experts(p) && p->look_ahead)
        return err(ERR_FORMAT, "plan: \"look_ahead\" has to be false: the GPU holds all experts");
    if (p->has_gpu && !plan_is_split(p) && p->gpu.n_landing)
        return err(ERR_FORMAT, "plan: \"landings\" has to be 0: the GPU holds all experts");
    if (plan_has_host_experts(p) && !p->slot_ram_bytes)
        return err(ERR_FORMAT,
                   "plan: \"expert_ram\" has to be more than 0: the GPU holds %" PRIu32 " of %" PRIu32 " experts",
                   p->gpu.n_experts, p->gpu.n_all_experts + p->gpu.n_host_experts);
    return cost_predict(in, p);
}

/* A disk serves all that is in flight side by side, so what is wanted now comes the later, the more was asked for ahead of it. As many,
 * then, as bring the disk near its rate, and one more; an expert, three reads, is begun with fewer in flight (tests/results/stream.md).
 * Where nothing was measured: what an NVMe disk wants for reads of 0.5 to 2 MiB. */
#define FULL_RATE 0.9
#define USUAL_READS 12

static uint32_t usual_reads(const struct plan_in *in)
{
    double block_bytes = 0;

    for (int layer = 0; layer < in->model->hp.n_layer && block_bytes <= 0; layer++)
        block_bytes = (double)model_expert_bytes(in->model, layer) / 3;
    int n = machine_disk_depth(in->machine, block_bytes, FULL_RATE);
    return n ? (uint32_t)least(n + 1, PLAN_MAX_READS) : USUAL_READS;
}

/* All of a token's experts are guessed at: the likelier half mostly lies in slots. A GPU is sent that half only, absent or not. */
struct plan_pace plan_usual_pace(const struct plan_in *in, const struct plan *p)
{
    const uint32_t k = (uint32_t)in->model->hp.n_expert_used;

    if (!p->slot_ram_bytes || p->io != PLAN_IO_URING)
        return (struct plan_pace){0};
    return (struct plan_pace){!p->look_ahead ? 0 : p->has_gpu ? (k + 1) / 2 : k, usual_reads(in)};
}

static int make(const struct plan_in *in, const struct plan_opts *o, struct plan *p)
{
    struct kv_shape shape;

    int rc = choose(in, o, p);
    if (!rc)
        rc = plan_count(in, &shape, p);
    if (!rc)
        rc = fit(in, o, &shape, p);
    if (rc)
        return rc;
    if (!p->has_gpu) /* by pread a read is waited for: there is no idle time to use */
        p->look_ahead = p->slot_ram_bytes && p->io == PLAN_IO_URING;
    p->pace = plan_usual_pace(in, p);
    choose_numa(in->machine, p);
    rc = cost_predict(in, p);
    if (!rc)
        cost_gpu_way(in, p);
    return rc;
}

/* Where experts are read, a step of more rows reads them for more tokens at once, and a smaller one leaves memory for slots. The
 * usual stays unless another is clearly faster: 3 % is what predictions cannot tell apart. */
static int choose_chunk(const struct plan_in *in, const struct plan_opts *o, struct plan *p)
{
    static const uint32_t others[] = {DEFAULT_CHUNK / 2, 2 * DEFAULT_CHUNK};

    if (o->chunk_tok || !p->slot_ram_bytes || plan_turn_s(p) <= 0)
        return 0;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        struct plan_opts wish = *o;
        struct plan other;
        wish.chunk_tok = others[i];
        int rc = make(in, &wish, &other);
        if (rc == ERR_NOMEM)
            return rc;
        if (rc == 0 && other.n_ctx >= p->n_ctx && plan_turn_s(&other) > 0 &&
            plan_turn_s(&other) < 0.97 * plan_turn_s(p))
            memcpy(p, &other, sizeof *p);
    }
    err_clear();
    return 0;
}

/* Tokens/s of the best way that a batch's steps can go, half way to what its sequences may have; 0: not known. */
static double batch_rate(const struct plan_in *in, const struct plan *p)
{
    struct apex_profile profile;
    struct apex_choice choice;

    if (!cost_gpu_apex(in, p, (double)p->kv_tok / p->n_seq / 2, &profile))
        return 0;
    apex_choose(&profile, &choice);
    return choice.time[choice.runs].tok_per_s;
}

/* A batch's cache that does not fit the GPU leaves no room there for experts. To have them all there, and fewer pages, may be better: a
 * step of many rows wants nearly all experts, but of pages only those that are filled. */
static int choose_experts(const struct plan_in *in, const struct plan_opts *o, struct plan *p)
{
    struct plan_opts wish = *o;
    struct plan other;

    if (!p->kv_tok || !plan_has_host_kv(p) || !plan_is_split(p) || batch_rate(in, p) <= 0)
        return 0;
    wish.experts_first = true;
    int rc = make(in, &wish, &other);
    if (rc == ERR_NOMEM)
        return rc;
    if (rc == 0 && other.n_ctx >= p->n_ctx && batch_rate(in, &other) > 1.03 * batch_rate(in, p))
        memcpy(p, &other, sizeof *p);
    err_clear();
    return 0;
}

int plan_make_with_gpu(const struct plan_in *in, struct plan *out)
{
    static const struct plan_opts your_choice;
    const struct plan_opts *o = in->opts ? in->opts : &your_choice;
    struct plan p;

    int rc = make(in, o, &p);
    if (!rc)
        rc = choose_chunk(in, o, &p);
    if (!rc)
        rc = choose_experts(in, o, &p);
    if (rc)
        return rc;
    memcpy(out, &p, sizeof p);
    return 0;
}

/* It decodes no slower and, where prompts are known, is no later done with a chat's turn. */
static bool is_no_slower(const struct plan *alone, const struct plan *p)
{
    double alone_s = plan_turn_s(alone), s = plan_turn_s(p);

    return alone->decode_tok_per_s >= p->decode_tok_per_s && !(s > 0 && alone_s > s);
}

/* Layers that do not fit a GPU are the CPU's; where it is no slower at the others, all are. What the CPU's layers take is predicted alike
 * with a GPU and without. */
static int leave_gpu(const struct plan_in *in, struct plan *p)
{
    struct plan_in alone = *in;
    struct plan other;

    alone.gpu = NULL;
    int rc = plan_make_with_gpu(&alone, &other);
    if (rc == ERR_NOMEM)
        return rc;
    if (rc == 0 && other.n_ctx >= p->n_ctx && is_no_slower(&other, p)) {
        other.unused = (struct plan_unused){p->gpu.number, p->gpu.first_layer, p->decode_tok_per_s};
        memcpy(p, &other, sizeof *p);
    }
    err_clear();
    return 0;
}

int plan_make(const struct plan_in *in, struct plan *out)
{
    struct plan p;
    int rc = plan_make_with_gpu(in, &p);

    if (!rc && plan_has_host_layers(&p) && p.decode_tok_per_s > 0)
        rc = leave_gpu(in, &p);
    if (rc)
        return rc;
    memcpy(out, &p, sizeof p);
    return 0;
}
