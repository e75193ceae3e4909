/* A plan as people read it, and as JSON that can be saved, edited and read back. What JSON says about bytes is never
 * believed: choices are read, bytes are counted anew. */
#include "src/plan/cost.h"
#include "src/plan/plan_in.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* A screenful; longer names are cut where they come in. */
struct text {
    char buf[8192];
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

static const char *const io_names[] = {"auto", "uring", "pread", "mmap"};
static const char *const prefill_names[] = {"int", "blas"};
static const char *const copies_names[] = {"auto", "never", "always"};

/* ---- for people ---- */

/* Machines of one node have nothing to say. */
static void say_numa(struct text *t, const struct plan *p, const struct machine *m)
{
    static const char *const how[] = {"left to the system", "in turn on nodes", "on node"};

    if (m->n_numa < 2)
        return;
    say(t, "NUMA       %d nodes; weights in memory: %s", m->n_numa, how[p->numa]);
    for (int node = 0; node < 64; node++)
        if (p->numa_nodes >> node & 1)
            say(t, " %d", node);
    if (p->numa == PLAN_NUMA_LEFT && p->io == PLAN_IO_MMAP)
        say(t, ", as mapped files are");
    else if (p->numa == PLAN_NUMA_LEFT)
        say(t, ", which does not let this process place memory");
    say(t, "\n");
}

static void say_subject(struct text *t, const struct plan *p, const struct plan_in *in)
{
    const struct model *m = in->model;
    const struct machine *machine = in->machine;
    char total[32], limit[32], free_now[32];

    say(t, "model      %.80s: %s, %d layers, width %d, vocabulary %d", m->name, model_arch(m), m->hp.n_layer,
        m->hp.n_embd, m->hp.n_vocab);
    if (m->hp.n_expert)
        say(t, ", %d of %d experts a token", m->hp.n_expert_used, m->hp.n_expert);
    say(t, "\nmachine    %s: %d cores, memory %s", machine->cpu_name, machine->n_cores,
        size_format(machine->ram_total_bytes, total, sizeof total));
    if (machine->ram_limit_bytes < machine->ram_total_bytes)
        say(t, ", limited to %s", size_format(machine->ram_limit_bytes, limit, sizeof limit));
    if (machine->n_numa > 1)
        say(t, ", %d NUMA nodes", machine->n_numa);
    say(t, ", free %s\n", size_format(machine->ram_free_bytes, free_now, sizeof free_now));
    say(t, "compute    %" PRIu32 " threads%s, kernels %s, prefill %s, %" PRIu32 " tokens a step\n", p->n_threads,
        p->pin ? " on cores of their own" : "", p->isa[0] ? p->isa : "the best there is", prefill_names[p->prefill],
        p->chunk_tok);
    say_numa(t, p, machine);
}

static void say_part(struct text *t, const char *what, uint64_t bytes, uint64_t budget_bytes, const char *note)
{
    char size[32];

    say(t, "  %-18s %10s", what, size_format(bytes, size, sizeof size));
    if (budget_bytes)
        say(t, " %6.1f %%", 100 * (double)bytes / (double)budget_bytes);
    say(t, "%s%s\n", note[0] ? "   " : "", note);
}

static void say_bytes(struct text *t, const struct plan *p, const char *what, uint64_t bytes, const char *note)
{
    say_part(t, what, bytes, p->budget_bytes, note);
}

/* What the cache is for. */
static void note_kv(const struct plan *p, char *out, size_t out_bytes)
{
    const char *kv_type = p->kv_type == QUANT_Q8_0 ? "q8_0" : "f16";

    if (p->kv_tok)
        snprintf(out, out_bytes, "%" PRIu32 " positions for %" PRIu32 " sequences together, %s", p->kv_tok, p->n_seq,
                 kv_type);
    else
        snprintf(out, out_bytes, "%" PRIu32 " positions x %" PRIu32 " session%s, %s", p->n_ctx, p->n_seq,
                 p->n_seq == 1 ? "" : "s", kv_type);
}

static const char *note_records(const struct plan *p, char *out, size_t out_bytes)
{
    snprintf(out, out_bytes, "%d records of %" PRIu32 " session%s", (int)model_kv_records(p->n_seq, p->kv_tok > 0),
             p->n_seq, p->n_seq == 1 ? "" : "s");
    return out;
}

static void say_vram(struct text *t, const struct plan *p, const struct plan_in *in)
{
    const struct plan_gpu *g = &p->gpu;
    char kv[128], experts[64], layers[64], records[64];

    if (plan_has_host_kv(p))
        snprintf(kv, sizeof kv, "%" PRIu32 " positions, attention computed there", g->kv_tok);
    else
        note_kv(p, kv, sizeof kv);
    snprintf(experts, sizeof experts, "%" PRIu32 " of %" PRIu32 ", computed there", g->n_experts, g->n_all_experts);
    snprintf(layers, sizeof layers, "of layers %" PRIu32 " to %d, and the head", g->first_layer,
             in->model->hp.n_layer - 1);
    say(t, "\nmemory of GPU %-4" PRIu32 "          size  of budget\n", g->number);
    say_part(t, "dense weights", g->dense_bytes, g->budget_bytes, plan_has_host_layers(p) ? layers : "");
    if (g->n_all_experts)
        say_part(t, "experts", g->expert_bytes, g->budget_bytes, experts);
    if (g->n_landing) {
        snprintf(experts, sizeof experts, "for %" PRIu32 " experts that are copied for a step", g->n_landing);
        say_part(t, "landings", g->landing_bytes, g->budget_bytes, experts);
    }
    say_part(t, "KV cache", g->kv_bytes, g->budget_bytes, kv);
    if (g->record_bytes)
        say_part(t, "recurrent state", g->record_bytes, g->budget_bytes, note_records(p, records, sizeof records));
    if (plan_has_lift(p)) {
        snprintf(layers, sizeof layers, "for the CPU's layers, in steps of %" PRIu32 " rows or more", g->lift_rows);
        say_part(t, "weights coming up", g->lift_bytes, g->budget_bytes, layers);
    }
    say_part(t, "scratch", g->scratch_bytes, g->budget_bytes, "activations of a step");
    say_part(t, "driver and tables", g->own_bytes, g->budget_bytes, "what goes up with a step, and rounding");
    say_part(t, "together", g->total_bytes, g->budget_bytes, "");
    say_part(t, "budget", g->budget_bytes, g->budget_bytes, "");
}

/* Of which layers, as people count them. */
static void note_layers(const struct plan *p, char *out, size_t out_bytes)
{
    if (p->gpu.first_layer == 1)
        snprintf(out, out_bytes, "layer 0");
    else
        snprintf(out, out_bytes, "layers 0 to %" PRIu32, p->gpu.first_layer - 1);
}

static void say_host_layers(struct text *t, const struct plan *p)
{
    char layers[32], note[96];

    note_layers(p, layers, sizeof layers);
    snprintf(note, sizeof note, "of the embedding and %s, computed by the CPU%s", layers,
             p->look_ahead && plan_is_split(p) ? "; copies of routers" : "");
    say_bytes(t, p, "dense weights", p->dense_bytes, note);
}

static void say_memory(struct text *t, const struct plan *p, const struct plan_in *in)
{
    const char *how = p->io == PLAN_IO_MMAP    ? "mapped: the system may drop and read them again"
                      : p->io == PLAN_IO_URING ? "read by io_uring into memory of our own"
                                               : "read by pread into memory of our own";
    char kv[128], records[64];

    note_kv(p, kv, sizeof kv);
    if (p->has_gpu)
        say_vram(t, p, in);
    say(t, "\nmemory                      size  of budget\n");
    if (!p->has_gpu)
        say_bytes(t, p, "dense weights", p->dense_bytes, how);
    else if (plan_has_host_layers(p))
        say_host_layers(t, p);
    else if (p->dense_bytes)
        say_bytes(t, p, "copies", p->dense_bytes,
                  !p->look_ahead ? "of experts' biases"
                  : plan_bias_bytes(in->model, (int)p->gpu.first_layer) > 0
                      ? "of routers, for looking ahead, and of experts' biases"
                      : "of routers, for looking ahead");
    if (p->slot_ram_bytes) {
        char slots[96];
        snprintf(slots, sizeof slots, "%" PRIu32 " for %" PRIu32 " experts, read by %s when they are wanted",
                 p->n_slots, p->n_slot_experts, p->io == PLAN_IO_URING ? "io_uring" : "pread");
        say_bytes(t, p, "expert slots", p->expert_bytes, slots);
    } else if (in->model->hp.n_expert && !p->has_gpu) {
        say_bytes(t, p, "expert weights", p->expert_bytes, how);
    }
    if (!p->has_gpu)
        say_bytes(t, p, "KV cache", p->kv_bytes, kv);
    else if (plan_has_host_kv(p))
        say_bytes(t, p, "KV cache", p->kv_bytes, "the rest of it, pinned");
    else if (plan_has_host_layers(p))
        say_bytes(t, p, "KV cache", p->kv_bytes, "of the CPU's layers, pinned");
    if (p->record_bytes)
        say_bytes(t, p, "recurrent state", p->record_bytes, note_records(p, records, sizeof records));
    say_bytes(t, p, "scratch", p->scratch_bytes,
              !p->has_gpu               ? "activations of a step"
              : plan_has_host_layers(p) ? "activations of the CPU's layers, and what passes between both sides"
              : plan_has_host_kv(p)     ? "what attention and experts read and give, and the logits"
              : plan_is_split(p)        ? "what experts read and give, and the logits"
              : in->model->hp.n_expert  ? "the logits, and which experts are wanted"
                                        : "the logits");
    if (p->stage_bytes)
        say_bytes(t, p, "to and from GPU", p->stage_bytes, "buffers, most of them pinned");
    say_bytes(t, p, "header and tables", p->meta_bytes,
              p->has_gpu ? "an estimate, and one of the driver" : "an estimate");
    if (p->trace_bytes)
        say_bytes(t, p, "traces", p->trace_bytes, "kept until the end, because they were asked for");
    say_bytes(t, p, "together", p->total_bytes, "");
    say_bytes(t, p, "budget", p->budget_bytes, "");
}

/* The rate of tokens, or that it is the most there can be, or what would have to be known. */
static void say_rate(struct text *t, const char *what, double tok_per_s, bool is_measured, const char *unknown)
{
    if (tok_per_s > 0)
        say(t, "  %-11s %s %.3g tokens/s", what, is_measured ? "about" : "at most", tok_per_s);
    else
        say(t, "  %-11s not known: %s", what, unknown);
}

/* Would those of several sequences that the GPU has no pages for better wait? A batch begins so, and goes on as measured steps say. */
static void say_sequences(struct text *t, const struct plan *p, const struct plan_in *in)
{
    struct apex_profile profile;
    struct apex_choice choice;
    char line[512];
    double seq_tok = p->kv_tok ? (double)p->kv_tok / p->n_seq : p->n_ctx;

    if (!plan_has_host_kv(p) || p->n_seq < 2 || !cost_gpu_apex(in, p, seq_tok / 2, &profile))
        return;
    apex_choose(&profile, &choice);
    apex_explain(&profile, &choice, line, sizeof line);
    say(t, "  of %" PRIu32 " sequences, half way: %s%s\n", p->n_seq, line,
        p->kv_tok ? "; measured steps may say otherwise while a batch runs" : "");
}

/* What attention over a cache on both sides reads for a token, which predictions for an empty context leave out. */
static void say_full_context(struct text *t, const struct plan *p, const struct plan_in *in)
{
    char gpu[32], host[32];
    double kv_s = cost_gpu_kv_s(in, p);

    say(t, "\n              a full context adds %s of keys and values, read by the GPU, and %s by the CPU meanwhile",
        size_format(p->gpu.kv_bytes / p->n_seq, gpu, sizeof gpu),
        size_format(p->kv_bytes / p->n_seq, host, sizeof host));
    if (kv_s > 0)
        say(t, ": %.3g ms", 1e3 * kv_s);
    if (kv_s > 0 && p->decode_tok_per_s > 0)
        say(t, ", at most %.3g tokens/s", 1 / (1 / p->decode_tok_per_s + kv_s));
}

static void say_decode(struct text *t, const struct plan *p, const struct plan_in *in)
{
    const struct machine *m = in->machine;
    bool is_measured = plan_is_measured(p, m);
    char size[32], missed[32];

    say_rate(t, "decode", p->decode_tok_per_s, is_measured,
             p->has_gpu
                 ? "ferry probe measures the rates (--gpu-rate, --pcie, --mem-rate and --disk of ferry plan say them)"
             : m->mem_bytes_per_s > 0 ? "the rate of the disk (ferry probe measures it)"
                                      : "the rate of memory (ferry probe measures it)");
    say(t, "\n              %s of weights a token (empty context)",
        size_format(p->decode_bytes_per_tok, size, sizeof size));
    if (p->slot_ram_bytes)
        say(t, ", of them %s from disk: %.0f %% of the experts have a slot",
            size_format(p->missed_bytes_per_tok, missed, sizeof missed), 100.0 * p->n_slots / p->n_slot_experts);
    if (p->decode_tok_per_s > 0 && is_measured)
        say(t, "\n              %.3g ms for what every token needs, %.3g for experts", 1e3 * p->decode_dense_s,
            1e3 * p->decode_expert_s);
    if (p->decode_tok_per_s > 0 && p->decode_disk_s > 0)
        say(t, "%s%.3g ms for reading%s", is_measured ? ", " : "\n              ", 1e3 * p->decode_disk_s,
            p->slot_ram_bytes && p->io == PLAN_IO_URING ? ", meanwhile" : "");
    if (p->decode_tok_per_s > 0 && !is_measured && m->mem_bytes_per_s > 0)
        say(t, "\n              memory gives %.3g GB/s", m->mem_bytes_per_s / 1e9);
    if (p->has_gpu)
        say(t, "\n              to the GPU %s a token, from it %s",
            size_format(p->gpu.up_bytes_per_tok, size, sizeof size),
            size_format(p->gpu.down_bytes_per_tok, missed, sizeof missed));
    if (p->gpu.copy_bytes_per_tok)
        say(t, ", experts copied to it %s", size_format(p->gpu.copy_bytes_per_tok, size, sizeof size));
    if (p->gpu.host_layers_s > 0)
        say(t, "\n              %.3g ms of a token for the CPU's layers, then %.3g for the GPU's",
            1e3 * p->gpu.host_layers_s, 1e3 * (1 / p->decode_tok_per_s - p->gpu.host_layers_s));
    if (plan_has_host_kv(p))
        say_full_context(t, p, in);
    say(t, "\n");
}

static void say_prefill(struct text *t, const struct plan *p, const struct plan_in *in)
{
    char missed[32];

    say_rate(t, "prefill", p->prefill_tok_per_s, !p->has_gpu,
             p->has_gpu && p->prefill == DEVICE_PREFILL_BLAS
                 ? "of a GPU, ferry probe measures prompts with --prefill int alone"
             : p->has_gpu ? "the rates of prompts on this GPU, and of kernels (ferry probe measures them)"
                          : "the rates of kernels (ferry probe measures it)");
    say(t, "\n              prompt of %" PRIu32 " tokens",
        p->n_ctx < PLAN_PROMPT_TOK ? p->n_ctx : (uint32_t)PLAN_PROMPT_TOK);
    if (p->prefill_missed_bytes)
        say(t, ", %s from disk for it", size_format(p->prefill_missed_bytes, missed, sizeof missed));
    say(t, "\n");
    if (p->load_s > 0)
        say(t, "  loading     %.3g s: the disk gives %.3g GB/s\n", p->load_s, in->machine->disk_bytes_per_s / 1e9);
    if (p->first_token_s > 0)
        say(t, "  first token %.3g s after the start, for a question of %d tokens\n", p->first_token_s,
            PLAN_QUESTION_TOK);
}

/* How much the unknown router matters: the same plan with favourites. */
static int say_skew(struct text *t, const struct plan *p, const struct plan_in *in)
{
    const double usual = 0.35;
    struct plan other = *p;

    if (!p->slot_ram_bytes || p->decode_tok_per_s <= 0)
        return 0;
    if (p->skew > 0) {
        say(t, "  assumed: a router with favourites, --skew %.3g\n", p->skew);
        return 0;
    }
    other.skew = usual;
    int rc = cost_predict(in, &other);
    if (!rc)
        say(t,
            "  assumed: every expert is wanted equally often, so that most is read. A router with favourites (--skew "
            "%.2g)\n"
            "              decodes %.3g tokens/s\n",
            usual, other.decode_tok_per_s);
    return rc;
}

static int say_speed(struct text *t, const struct plan *p, const struct plan_in *in)
{
    say(t, "\nspeed, predicted\n");
    say_decode(t, p, in);
    say_prefill(t, p, in);
    if (plan_has_kernels(p, in->machine) && in->machine->draw_s <= 0)
        say(t, "  (by an older ferry's rates, which promise batches too much: ferry probe measures them anew)\n");
    return say_skew(t, p, in);
}

/* Known where probe has measured that disk. */
static bool lacks_direct(const struct machine *m)
{
    return m->disk >= 0 && m->disk < m->n_disks && !m->disks[m->disk].is_direct;
}

static void say_why_gpu(struct text *t, const struct plan *p, const struct plan_in *in)
{
    char size[32], layers[32];

    say(t, "  GPU memory %s: %s\n", size_format(p->gpu.budget_bytes, size, sizeof size),
        in->opts && in->opts->vram_bytes ? "asked for" : "what is free, less a sixteenth (256 MiB at least)");
    if (plan_has_host_layers(p)) {
        note_layers(p, layers, sizeof layers);
        say(t,
            "  layers: not all fit the GPU. The CPU holds and computes the embedding and %s, as few as can be, first; "
            "what\n"
            "  comes out goes up (%s a token), the GPU does the other %d and the head\n",
            layers, size_format((uint64_t)in->model->hp.n_embd * sizeof(float), size, sizeof size),
            in->model->hp.n_layer - (int)p->gpu.first_layer);
    }
    if (plan_has_lift(p))
        say(t,
            "  prompts: in steps of %" PRIu32
            " rows or more the GPU computes those layers, too, and their weights come "
            "up for it;\n"
            "  the CPU would take longer\n",
            p->gpu.lift_rows);
    if (plan_is_split(p))
        say(t, "  experts: the GPU holds and computes what fits beside the rest, as evenly over the layers as it goes; "
               "the CPU\n"
               "  computes the others meanwhile, from slots in what is left of memory\n");
    if (p->gpu.n_landing)
        say(t, "  copies: of the others those go to the GPU for a step that are computed sooner so, %s\n",
            p->gpu.copies == PLAN_COPIES_ALWAYS ? "as was asked for: as many as there is room for"
                                                : "by what both ways are measured to take");
    if (plan_has_host_kv(p)) {
        const bool has_experts = p->gpu.n_all_experts > 0 && !plan_is_split(p);
        char kv[128];
        note_kv(p, kv, sizeof kv);
        say(t,
            "  KV cache: %s do not fit beside the dense weights%s. The GPU holds what fits,\n"
            "  the CPU computes attention over the rest meanwhile; for a sequence with %" PRIu32
            " rows or more in a step\n"
            "  (a prompt) the rest comes up, segment by segment, while the one before is computed with\n",
            kv, has_experts ? " and the experts, of which each step of so many rows wants nearly all" : "",
            p->gpu.stage_rows);
        say_sequences(t, p, in);
    }
    if (p->gpu.moves)
        say(t, "  moves: an expert that is wanted clearly more often than one on the GPU takes its place, in the "
               "background\n");
    say(t, "  of GPUs ferry has met an H200 alone: what another card gives is said from its rates\n");
}

static void say_why(struct text *t, const struct plan *p, const struct plan_in *in)
{
    uint32_t usual = plan_default_ctx(in->model);
    bool asked_ctx = in->opts && in->opts->n_ctx, asked_io = in->opts && in->opts->io != PLAN_IO_AUTO;
    int n_train = in->model->hp.n_ctx_train;
    double missing = plan_missing_share(p);
    char size[32];

    say(t, "\nwhy\n");
    if (asked_ctx)
        say(t, "  context %" PRIu32 ": asked for", p->n_ctx);
    else if (p->n_ctx < usual)
        say(t, "  context LOWERED from %" PRIu32 " to %" PRIu32 ": the longest that fits", usual, p->n_ctx);
    else
        say(t, "  context %" PRIu32 ": %s", p->n_ctx,
            n_train > 0 && (uint32_t)n_train == p->n_ctx ? "what the model was trained on"
                                                         : "the most that is taken unasked");
    if (n_train > 0 && p->n_ctx > (uint32_t)n_train)
        say(t, "; beyond the %d that the model was trained on", n_train);
    say(t, "\n  budget %s: %s\n", size_format(p->budget_bytes, size, sizeof size),
        in->opts && in->opts->ram_bytes ? "asked for" : "what is free, less a sixteenth (256 MiB at least)");
    if (p->has_gpu)
        say_why_gpu(t, p, in);
    if (p->unused.decode_tok_per_s > 0)
        say(t,
            "  GPU %" PRIu32 " IS NOT USED: with it, all but %" PRIu32 " of %d layers there, at most %.3g tokens/s are "
            "decoded; the CPU\n"
            "  alone is no slower\n",
            p->unused.number, p->unused.first_layer, in->model->hp.n_layer, p->unused.decode_tok_per_s);
    if (p->slot_ram_bytes && in->opts && in->opts->expert_ram_bytes)
        say(t, "  expert slots of %s at most: asked for\n", size_format(p->slot_ram_bytes, size, sizeof size));
    else if (p->slot_ram_bytes && !p->has_gpu)
        say(t, "  expert slots: the experts do not fit beside the rest, and get what is left of the budget\n");
    if (p->look_ahead)
        say(t,
            "  look-ahead: the %" PRIu32
            " experts that the next layer will likeliest want are read while the disk would be "
            "idle\n",
            p->pace.n_ahead);
    if (p->io == PLAN_IO_MMAP && !asked_io)
        say(t, "  mapped: the weights do not fit beside the rest, and the file's own pages can be dropped again\n");
    if (p->io == PLAN_IO_URING && lacks_direct(in->machine))
        say(t, "  through the page cache: the file system has no O_DIRECT\n");
    if (p->io == PLAN_IO_PREAD && !asked_io)
        say(t, "  read by pread: this machine has no io_uring, or forbids it\n");
    if (missing > 0)
        say(t,
            "  %.0f %% of the weights have no room: every one that is wanted and absent stops the step for a page "
            "fault%s.\n"
            "  The prediction takes all bytes for equally likely to be absent.\n",
            100 * missing, in->model->hp.n_expert ? " (experts above all)" : "");
}

int plan_explain(const struct plan *plan, const struct plan_in *in, char **out)
{
    struct text t = {.n = 0};

    say_subject(&t, plan, in);
    say_memory(&t, plan, in);
    *out = NULL;
    int rc = say_speed(&t, plan, in);
    if (rc)
        return rc;
    say_why(&t, plan, in);
    *out = mem_strdup(t.buf, MEM_OTHER);
    return *out ? 0 : err(ERR_NOMEM, "a plan as text: %zu bytes", t.n);
}

/* ---- JSON ---- */

#define PLAN_FORMAT 1

static void set_id(json_t *o, const char *name, uint64_t id)
{
    char hex[24];

    /* Text, because JSON's numbers end at 2^53 in many programs. */
    snprintf(hex, sizeof hex, "%016" PRIx64, id);
    json_object_set_new(o, name, json_string(hex));
}

static json_t *bytes_of(const struct plan *p)
{
    json_t *o = json_object();

    json_object_set_new(o, "dense", json_integer((json_int_t)p->dense_bytes));
    json_object_set_new(o, "expert", json_integer((json_int_t)p->expert_bytes));
    json_object_set_new(o, "kv", json_integer((json_int_t)p->kv_bytes));
    if (p->record_bytes)
        json_object_set_new(o, "recurrent", json_integer((json_int_t)p->record_bytes));
    json_object_set_new(o, "scratch", json_integer((json_int_t)p->scratch_bytes));
    json_object_set_new(o, "stage", json_integer((json_int_t)p->stage_bytes));
    json_object_set_new(o, "meta_estimate", json_integer((json_int_t)p->meta_bytes));
    if (p->trace_bytes)
        json_object_set_new(o, "trace", json_integer((json_int_t)p->trace_bytes));
    json_object_set_new(o, "total", json_integer((json_int_t)p->total_bytes));
    json_object_set_new(o, "budget", json_integer((json_int_t)p->budget_bytes));
    return o;
}

static const char *const numa_names[] = {"left", "interleaved", "bound"};

static json_t *gpu_of(const struct plan *p)
{
    const struct plan_gpu *g = &p->gpu;
    json_t *o = json_object(), *bytes = json_object();

    json_object_set_new(o, "number", json_integer(g->number));
    if (plan_has_host_layers(p))
        json_object_set_new(o, "first_layer", json_integer(g->first_layer));
    if (plan_has_host_layers(p))
        json_object_set_new(o, "lift_rows", json_integer(g->lift_rows));
    json_object_set_new(o, "experts", json_integer(g->n_experts));
    json_object_set_new(o, "moves", json_boolean(g->moves));
    json_object_set_new(o, "copies", json_string(copies_names[g->copies]));
    json_object_set_new(o, "landings", json_integer(g->n_landing));
    json_object_set_new(o, "pin", json_integer((json_int_t)g->pin_bytes));
    json_object_set_new(o, "of_experts", json_integer(g->n_all_experts));
    if (plan_has_host_kv(p)) {
        json_object_set_new(o, "kv_tok", json_integer(g->kv_tok));
        json_object_set_new(o, "stage_rows", json_integer(g->stage_rows));
        json_object_set_new(o, "kv_waits", json_boolean(g->kv_waits));
        json_object_set_new(o, "halves", json_boolean(g->halves));
    }
    json_object_set_new(bytes, "dense", json_integer((json_int_t)g->dense_bytes));
    json_object_set_new(bytes, "expert", json_integer((json_int_t)g->expert_bytes));
    json_object_set_new(bytes, "landing", json_integer((json_int_t)g->landing_bytes));
    json_object_set_new(bytes, "lift", json_integer((json_int_t)g->lift_bytes));
    json_object_set_new(bytes, "kv", json_integer((json_int_t)g->kv_bytes));
    if (g->record_bytes)
        json_object_set_new(bytes, "recurrent", json_integer((json_int_t)g->record_bytes));
    json_object_set_new(bytes, "scratch", json_integer((json_int_t)g->scratch_bytes));
    json_object_set_new(bytes, "driver_and_tables", json_integer((json_int_t)g->own_bytes));
    json_object_set_new(bytes, "total", json_integer((json_int_t)g->total_bytes));
    json_object_set_new(bytes, "budget", json_integer((json_int_t)g->budget_bytes));
    json_object_set_new(o, "bytes", bytes);
    json_object_set_new(o, "down_bytes_per_token", json_integer((json_int_t)g->down_bytes_per_tok));
    json_object_set_new(o, "up_bytes_per_token", json_integer((json_int_t)g->up_bytes_per_tok));
    json_object_set_new(o, "copy_bytes_per_token", json_integer((json_int_t)g->copy_bytes_per_tok));
    json_object_set_new(o, "host_layers_s", json_real(g->host_layers_s));
    return o;
}

static json_t *unused_of(const struct plan_unused *unused)
{
    json_t *o = json_object();

    json_object_set_new(o, "number", json_integer(unused->number));
    json_object_set_new(o, "first_layer", json_integer(unused->first_layer));
    json_object_set_new(o, "decode_tokens_per_s", json_real(unused->decode_tok_per_s));
    return o;
}

static json_t *json_of(const struct plan *p)
{
    json_t *o = json_object(), *predicted = json_object();

    json_object_set_new(o, "ferry_plan", json_integer(PLAN_FORMAT));
    set_id(o, "machine_id", p->machine_id);
    set_id(o, "model_id", p->model_id);
    json_object_set_new(o, "threads", json_integer(p->n_threads));
    json_object_set_new(o, "ctx", json_integer(p->n_ctx));
    json_object_set_new(o, "sessions", json_integer(p->n_seq));
    if (p->kv_tok)
        json_object_set_new(o, "kv_tok", json_integer(p->kv_tok));
    json_object_set_new(o, "chunk_tok", json_integer(p->chunk_tok));
    json_object_set_new(o, "logit_rows", json_integer(p->n_out));
    json_object_set_new(o, "kv_type", json_string(p->kv_type == QUANT_Q8_0 ? "q8_0" : "f16"));
    json_object_set_new(o, "io", json_string(io_names[p->io]));
    json_object_set_new(o, "expert_ram", json_integer((json_int_t)p->slot_ram_bytes));
    json_object_set_new(o, "look_ahead", json_boolean(p->look_ahead));
    if (p->pace.n_reads) {
        json_object_set_new(o, "ahead_experts", json_integer(p->pace.n_ahead));
        json_object_set_new(o, "reads_in_flight", json_integer(p->pace.n_reads));
    }
    json_object_set_new(o, "router_skew", json_real(p->skew));
    json_object_set_new(o, "prefill", json_string(prefill_names[p->prefill]));
    json_object_set_new(o, "isa", json_string(p->isa));
    json_object_set_new(o, "pin", json_boolean(p->pin));
    json_object_set_new(o, "numa", json_string(numa_names[p->numa])); /* found anew when it is read back */
    json_object_set_new(o, "bytes", bytes_of(p));
    if (p->has_gpu)
        json_object_set_new(o, "gpu", gpu_of(p));
    if (p->unused.decode_tok_per_s > 0)
        json_object_set_new(o, "unused_gpu", unused_of(&p->unused));
    json_object_set_new(predicted, "decode_bytes_per_token", json_integer((json_int_t)p->decode_bytes_per_tok));
    if (p->slot_ram_bytes) {
        json_object_set_new(predicted, "missed_bytes_per_token", json_integer((json_int_t)p->missed_bytes_per_tok));
        json_object_set_new(predicted, "prefill_missed_bytes", json_integer((json_int_t)p->prefill_missed_bytes));
    }
    json_object_set_new(predicted, "decode_tokens_per_s", json_real(p->decode_tok_per_s));
    json_object_set_new(predicted, "decode_dense_s", json_real(p->decode_dense_s));
    json_object_set_new(predicted, "decode_expert_s", json_real(p->decode_expert_s));
    json_object_set_new(predicted, "decode_disk_s", json_real(p->decode_disk_s));
    json_object_set_new(predicted, "prefill_tokens_per_s", json_real(p->prefill_tok_per_s));
    json_object_set_new(predicted, "load_s", json_real(p->load_s));
    json_object_set_new(predicted, "first_token_s", json_real(p->first_token_s));
    json_object_set_new(o, "predicted", predicted);
    return o;
}

int plan_to_json(const struct plan *plan, char **out)
{
    const size_t flags = JSON_INDENT(2) | JSON_REAL_PRECISION(17);
    json_t *o = json_of(plan);
    size_t n = json_dumpb(o, NULL, 0, flags);
    char *text = n ? mem_alloc(n + 1, MEM_OTHER) : NULL;

    if (text && json_dumpb(o, text, n, flags) != n) { /* for want of memory of its own */
        mem_free(text);
        text = NULL;
    }
    if (text)
        text[n] = '\0';
    json_decref(o);
    *out = text;
    return text ? 0 : err(ERR_NOMEM, "a plan as JSON");
}

/* Reading stops at the first field that is wrong: rc says so to those after it. */
struct reader {
    const json_t *o;
    int rc;
};

static void read_count(struct reader *r, const char *name, uint32_t *out)
{
    const json_t *v = json_object_get(r->o, name);
    json_int_t x = json_integer_value(v);

    if (r->rc)
        return;
    if (!json_is_integer(v) || x < 1 || x > INT32_MAX)
        r->rc = err(ERR_FORMAT, "plan: \"%s\" has to be a whole number from 1 to %d", name, INT32_MAX);
    else
        *out = (uint32_t)x;
}

static void read_choice(struct reader *r, const char *name, const char *const *names, int first, int n, int *out)
{
    const char *s = json_string_value(json_object_get(r->o, name));

    if (r->rc)
        return;
    for (int i = first; s && i < n; i++) {
        if (!strcmp(s, names[i])) {
            *out = i;
            return;
        }
    }
    r->rc = err(ERR_FORMAT, "plan: \"%s\" is \"%.40s\", which is none that ferry knows", name, s ? s : "missing");
}

static void read_id(struct reader *r, const char *name, const char *of_what, uint64_t want)
{
    const char *s = json_string_value(json_object_get(r->o, name));
    char hex[24];

    if (r->rc)
        return;
    snprintf(hex, sizeof hex, "%016" PRIx64, want);
    if (!s)
        r->rc = err(ERR_FORMAT, "plan: \"%s\" is missing", name);
    else if (strcmp(s, hex))
        r->rc =
            err(ERR_STATE, "the plan was made for another %s: its %s is %.40s, this one's %s", of_what, name, s, hex);
}

static void read_budget(struct reader *r, uint64_t *out)
{
    const json_t *v = json_object_get(json_object_get(r->o, "bytes"), "budget");

    if (r->rc)
        return;
    if (!json_is_integer(v) || json_integer_value(v) < 1)
        r->rc = err(ERR_FORMAT, "plan: \"bytes\": \"budget\" has to be a number of bytes");
    else
        *out = (uint64_t)json_integer_value(v);
}

/* Plans without slots need not speak of them. */
static void read_slots(struct reader *r, const struct plan_in *in, enum plan_io io, uint64_t *out)
{
    const json_t *v = json_object_get(r->o, "expert_ram");

    *out = 0;
    if (r->rc || !v)
        return;
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        r->rc = err(ERR_FORMAT, "plan: \"expert_ram\" has to be a number of bytes; 0: all experts in memory");
    else if (json_integer_value(v) && (io == PLAN_IO_MMAP || !in->model->expert_bytes))
        r->rc = err(ERR_FORMAT, "plan: \"expert_ram\" has to be 0 for a model that is mapped or has no experts");
    else
        *out = (uint64_t)json_integer_value(v);
}

static uint64_t read_whole(struct reader *r, const json_t *o, const char *name, json_int_t most)
{
    const json_t *v = json_object_get(o, name);
    json_int_t x = json_integer_value(v);

    if (!r->rc && (!json_is_integer(v) || x < 0 || x > most))
        r->rc =
            err(ERR_FORMAT, "plan: of the GPU: \"%s\" has to be a whole number from 0 to %lld", name, (long long)most);
    return r->rc ? 0 : (uint64_t)x;
}

static int read_copies(struct reader *r, const json_t *gpu)
{
    struct reader inner = {.o = gpu, .rc = r->rc};
    int copies = 0;

    read_choice(&inner, "copies", copies_names, 0, 3, &copies);
    r->rc = inner.rc;
    return copies;
}

/* Plans for the CPU alone do not speak of it. */
static void read_gpu(struct reader *r, const struct plan_in *in, struct plan *p)
{
    const json_t *v = json_object_get(r->o, "gpu");

    if (r->rc || !v)
        return;
    if (!in->gpu) {
        r->rc = err(ERR_UNSUPPORTED, "the plan is for a GPU, and this ferry was built without CUDA");
        return;
    }
    p->has_gpu = true;
    p->gpu.number = (uint32_t)read_whole(r, v, "number", INT32_MAX);
    if (json_object_get(v, "first_layer"))
        p->gpu.first_layer = (uint32_t)read_whole(r, v, "first_layer", in->model->hp.n_layer - 1);
    if (json_object_get(v, "lift_rows"))
        p->gpu.lift_rows = (uint32_t)read_whole(r, v, "lift_rows", INT32_MAX);
    if (!r->rc && p->gpu.lift_rows && (in->model->hp.n_expert || model_has_records(in->model)))
        r->rc = err(ERR_FORMAT, "plan: \"gpu\": \"lift_rows\" has to be 0: the model has %s",
                    in->model->hp.n_expert ? "experts" : "recurrent layers");
    p->gpu.n_experts = (uint32_t)read_whole(r, v, "experts", INT32_MAX);
    p->gpu.moves = json_is_true(json_object_get(v, "moves"));
    p->gpu.n_landing = (uint32_t)read_whole(r, v, "landings", PLAN_MOST_LANDING);
    p->gpu.pin_bytes = read_whole(r, v, "pin", INT64_MAX);
    p->gpu.copies = (enum plan_copies)read_copies(r, v);
    p->gpu.budget_bytes = read_whole(r, json_object_get(v, "bytes"), "budget", INT64_MAX);
    if (json_object_get(v, "kv_tok")) {
        p->gpu.kv_tok = (uint32_t)read_whole(r, v, "kv_tok", INT32_MAX);
        p->gpu.stage_rows = (uint32_t)read_whole(r, v, "stage_rows", INT32_MAX);
        p->gpu.kv_waits = json_is_true(json_object_get(v, "kv_waits"));
        p->gpu.halves = json_is_true(json_object_get(v, "halves"));
    }
    if (!r->rc && p->gpu.kv_tok % DEVICE_ATTN_SEGMENT_TOK)
        r->rc = err(ERR_FORMAT, "plan: \"gpu\": \"kv_tok\" has to be a multiple of %d", DEVICE_ATTN_SEGMENT_TOK);
    if (!r->rc && p->io == PLAN_IO_MMAP)
        r->rc = err(ERR_FORMAT, "plan: \"io\" has to be \"uring\" or \"pread\" with a GPU");
}

/* It only is told again. */
static void read_unused(struct reader *r, const struct plan_in *in, struct plan_unused *out)
{
    const json_t *v = json_object_get(r->o, "unused_gpu");

    if (r->rc || !v)
        return;
    out->number = (uint32_t)read_whole(r, v, "number", INT32_MAX);
    out->first_layer = (uint32_t)read_whole(r, v, "first_layer", in->model->hp.n_layer - 1);
    out->decode_tok_per_s = json_number_value(json_object_get(v, "decode_tokens_per_s"));
}

/* Older plans do not speak of it. */
static void read_skew(struct reader *r, double *out)
{
    const json_t *v = json_object_get(r->o, "router_skew");

    *out = json_number_value(v);
    if (!r->rc && v && !(json_is_number(v) && *out >= 0 && *out <= PLAN_MAX_SKEW))
        r->rc = err(ERR_FORMAT, "plan: \"router_skew\" has to be a number from 0 to %d", PLAN_MAX_SKEW);
}

/* Older plans do not speak of it. */
static uint32_t read_pace_of(struct reader *r, const char *name, json_int_t least, json_int_t most, uint32_t usual)
{
    const json_t *v = json_object_get(r->o, name);
    json_int_t x = json_integer_value(v);

    if (v && !r->rc && (!json_is_integer(v) || x < least || x > most))
        r->rc = err(ERR_FORMAT, "plan: \"%s\" has to be a whole number from %lld to %lld", name, (long long)least,
                    (long long)most);
    return v && !r->rc ? (uint32_t)x : usual;
}

static void read_pace(struct reader *r, const struct plan_in *in, struct plan *p)
{
    p->pace = plan_usual_pace(in, p);
    if (!p->pace.n_reads)
        return;
    p->pace.n_reads = read_pace_of(r, "reads_in_flight", PLAN_LEAST_READS, PLAN_MAX_READS, p->pace.n_reads);
    if (p->look_ahead)
        p->pace.n_ahead = read_pace_of(r, "ahead_experts", 0, in->model->hp.n_expert_used, p->pace.n_ahead);
}

static int read_plan(const json_t *o, const struct plan_in *in, struct plan *p)
{
    static const char *const kv_names[] = {"f16", "q8_0"};
    struct reader r = {o, 0};
    const char *isa = json_string_value(json_object_get(o, "isa"));
    int kv = 0, io = 0, prefill = 0;

    if (json_integer_value(json_object_get(o, "ferry_plan")) != PLAN_FORMAT)
        return err(ERR_FORMAT, "this is no plan of ferry: \"ferry_plan\" has to be %d", PLAN_FORMAT);
    read_id(&r, "machine_id", "machine", in->machine->identity);
    read_id(&r, "model_id", "model", in->model->identity);
    read_count(&r, "threads", &p->n_threads);
    read_count(&r, "ctx", &p->n_ctx);
    read_count(&r, "sessions", &p->n_seq);
    if (json_object_get(o, "kv_tok"))
        read_count(&r, "kv_tok", &p->kv_tok);
    read_count(&r, "chunk_tok", &p->chunk_tok);
    read_count(&r, "logit_rows", &p->n_out);
    read_choice(&r, "kv_type", kv_names, 0, 2, &kv);
    read_choice(&r, "io", io_names, PLAN_IO_URING, PLAN_IO_MMAP + 1, &io);
    read_choice(&r, "prefill", prefill_names, 0, 2, &prefill);
    read_budget(&r, &p->budget_bytes);
    read_slots(&r, in, (enum plan_io)io, &p->slot_ram_bytes);
    read_skew(&r, &p->skew);
    if (!r.rc && (!isa || strlen(isa) >= sizeof p->isa))
        r.rc = err(ERR_FORMAT, "plan: \"isa\" has to be a text of at most %zu bytes", sizeof p->isa - 1);
    if (!r.rc && !json_is_boolean(json_object_get(o, "pin")))
        r.rc = err(ERR_FORMAT, "plan: \"pin\" has to be true or false");
    if (!r.rc && ((p->chunk_tok > p->n_ctx && !p->kv_tok) || p->n_out > p->chunk_tok))
        r.rc = err(ERR_FORMAT,
                   "plan: ctx %" PRIu32 ", chunk_tok %" PRIu32 ", logit_rows %" PRIu32 ": each at most the one before",
                   p->n_ctx, p->chunk_tok, p->n_out);
    if (r.rc)
        return r.rc;
    snprintf(p->isa, sizeof p->isa, "%s", isa);
    p->machine_id = in->machine->identity;
    p->model_id = in->model->identity;
    p->kv_type = kv ? QUANT_Q8_0 : QUANT_F16;
    p->io = (enum plan_io)io;
    p->prefill = (enum device_prefill)prefill;
    p->pin = json_is_true(json_object_get(o, "pin"));
    p->look_ahead = json_is_true(json_object_get(o, "look_ahead"));
    read_gpu(&r, in, p);
    if (!p->has_gpu)
        read_unused(&r, in, &p->unused);
    read_pace(&r, in, p);
    return r.rc;
}

static uint64_t most_bytes_of(const struct machine *m)
{
    return m->ram_limit_bytes < m->ram_total_bytes ? m->ram_limit_bytes : m->ram_total_bytes;
}

/* Nobody thought of a trace when the plan was saved, and what it is to show is that very plan: nothing gives way to it. What the budget
 * lacks for it lies beside it, where the machine allows so much. */
static void take_trace_aside(struct plan *p, const struct machine *m)
{
    uint64_t need_bytes = plan_must_fit_bytes(p);

    if (need_bytes > p->budget_bytes && need_bytes - p->budget_bytes <= p->trace_bytes &&
        need_bytes <= most_bytes_of(m))
        p->budget_bytes = need_bytes;
}

static int check_machine(const struct plan *p, const struct machine *m)
{
    uint64_t most_bytes = most_bytes_of(m);
    char a[32], b[32];

    if (p->has_gpu && m->vram_total_bytes && p->gpu.budget_bytes > m->vram_free_bytes)
        return err(ERR_LIMIT, "the plan's budget of GPU memory is %s, GPU %" PRIu32 " has %s free",
                   size_format(p->gpu.budget_bytes, a, sizeof a), p->gpu.number,
                   size_format(m->vram_free_bytes, b, sizeof b));
    if (p->budget_bytes <= most_bytes)
        return 0;
    return err(ERR_LIMIT, "the plan's budget is %s, this machine allows %s", size_format(p->budget_bytes, a, sizeof a),
               size_format(most_bytes, b, sizeof b));
}

int plan_from_json(const char *text, const struct plan_in *in, struct plan *out)
{
    struct kv_shape shape;
    struct plan p;
    json_error_t e;
    json_t *o = json_loads(text, 0, &e);

    if (!o)
        return err(ERR_FORMAT, "plan: line %d: %s", e.line, e.text);
    memset(&p, 0, sizeof p);
    p.trace_bytes = in->opts ? in->opts->trace_bytes : 0;
    int rc = read_plan(o, in, &p);
    json_decref(o);
    if (!rc)
        rc = check_machine(&p, in->machine);
    if (!rc)
        rc = plan_count(in, &shape, &p);
    if (!rc)
        take_trace_aside(&p, in->machine);
    if (!rc)
        rc = plan_check(in, &p);
    if (rc)
        return rc;
    memcpy(out, &p, sizeof p);
    return 0;
}
