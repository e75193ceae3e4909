/* Who holds and who computes what: a value you can print, save, edit and load. Planning touches no device. */
#ifndef FERRY_PLAN_PLAN_H
#define FERRY_PLAN_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "quant/quant.h"
#include "src/base/size.h"
#include "src/device/device.h"
#include "src/model/model.h"
#include "src/plan/machine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How weight bytes come into memory. URING and PREAD read them into anonymous memory of our own; MMAP maps the file. */
enum plan_io { PLAN_IO_AUTO, PLAN_IO_URING, PLAN_IO_PREAD, PLAN_IO_MMAP };

/* How weights that are held in memory lie on the machine's NUMA nodes: there is one, or the system decides; page by page in turn on those
 * whose cores compute, so that all read at the rate of all; on the one whose cores compute. */
enum plan_numa { PLAN_NUMA_LEFT, PLAN_NUMA_INTERLEAVED, PLAN_NUMA_BOUND };
/* Experts that neither lie on the GPU nor are cheaper computed by the CPU go there for a step: when that is sooner (offload.h, by rates
 * that are measured meanwhile), never, or always when there is room. */
enum plan_copies { PLAN_COPIES_AUTO, PLAN_COPIES_NEVER, PLAN_COPIES_ALWAYS };

/* Predictions of prefill are for a prompt of so many tokens (or what the context holds); of the first token after a start, for one that is
 * no more than a question. */
enum { PLAN_PROMPT_TOK = 512, PLAN_QUESTION_TOK = 21 };

/* Weights pass through so much memory on their way to a GPU. */
#define PLAN_STAGE_BYTES (8 * MIB)

/* Past this one expert gets nearly everything. */
enum { PLAN_MAX_SKEW = 4 };

/* With so many reads of experts' matrices in flight another expert's are not begun; it has three. */
enum { PLAN_MAX_READS = 64, PLAN_LEAST_READS = 1 };

/* How experts are read that have slots: what may change between two steps (refit.h), because no result depends on it. */
struct plan_pace {
    uint32_t n_ahead; /* experts of the next layer that are read ahead for a token, the likeliest */
    uint32_t n_reads; /* in flight, enough of them; 0: nothing is read through io_uring while running */
};

struct program;

/* What is wanted; zeros are "your choice". */
struct plan_opts {
    uint64_t ram_bytes;
    uint64_t expert_ram_bytes; /* most for experts; the others are read when they are wanted */
    uint32_t n_ctx, n_seq, chunk_tok, n_out, n_threads;
    enum quant_type kv_type; /* QUANT_F16 or QUANT_Q8_0; QUANT_F32 (0) means F16 */
    enum plan_io io;
    enum device_prefill prefill;
    char isa[16]; /* "": the machine's best */
    bool no_pin;
    double skew; /* how far the router has favourites (cost_router_init()); 0: none, the most that is read */
    /* Sequences of a batch share the KV pool: positions that it holds for all together; 0: n_seq full ones. A step may then have
     * more rows than a sequence has positions. */
    uint32_t kv_tok;
    /* With plan_in.gpu: which GPU, and how much of its memory; 0: what is free, less a margin */
    uint32_t gpu_number;
    uint64_t vram_bytes;
    bool experts_first;   /* all experts of the GPU's layers lie there, and of the cache what then has room */
    uint64_t trace_bytes; /* memory that a trace is kept in (trace_bytes()) */
    enum plan_copies copies;
};

/* What a GPU holds and computes: some layers and what stands behind them, all but some experts, every byte by purpose. */
struct plan_gpu {
    uint32_t number; /* which one */
    uint32_t
        first_layer; /* it and those behind it are the GPU's; those before it, with the embedding, their pages and experts, the CPU's */
    uint32_t
        lift_rows; /* with layers before: from so many rows of a step on the GPU computes those, too, and their weights come up; 0: never */
    uint64_t lift_bytes;               /* that this takes of its memory */
    uint32_t n_experts, n_all_experts; /* so many of the experts of its layers, shared among them (layout_share()) */
    uint32_t n_host_experts;           /* of the layers before */
    bool moves;                        /* which ones changes with use */
    enum plan_copies copies;
    uint32_t
        n_landing; /* places for experts that are copied for a step; as many in pinned memory, where they pass through */
    uint64_t landing_bytes; /* of those places */
    uint64_t
        pin_bytes; /* of the host's slots, from the first on, are pinned if the system lets them, so that copies need no detour */
    uint64_t dense_bytes, expert_bytes; /* weights: a layout_init_part() of its span */
    uint32_t
        kv_tok; /* positions of the cache that it holds of layers without windows, the host the others; 0: all of them */
    uint32_t
        stage_rows; /* with kv_tok: from so many rows of a sequence in a step on, its pages of the host come up in stages */
    bool
        kv_waits; /* with kv_tok: sequences whose pages the host holds wait at first for those whose pages are the GPU's (apex.h) */
    bool halves;            /* with kv_tok: steps are run in halves at first (plan_has_halves) */
    uint64_t kv_bytes;      /* what it holds of the cache */
    uint64_t record_bytes;  /* and of recurrent layers' records */
    uint64_t scratch_bytes; /* activations of a step, and the device's scratch */
    uint64_t own_bytes;     /* what goes up with a step, tables, and what the driver rounds up at most */
    uint64_t total_bytes, budget_bytes;
    /* Predicted, for a token that is drawn greedily: between it and the host (a draw from the k best brings some hundred bytes more, one
     * that wants all logits the row of them); of experts that are copied, beside that */
    uint64_t down_bytes_per_tok, up_bytes_per_tok, copy_bytes_per_tok;
    double host_layers_s; /* of its time, the layers before first_layer; 0: there are none, or a rate is not known */
};

/* A GPU that would have made the model slower: what the plan with it came to. */
struct plan_unused {
    uint32_t number, first_layer;
    double decode_tok_per_s; /* 0: there is none such */
};

struct plan {
    uint64_t machine_id, model_id;
    uint32_t n_threads, n_ctx, n_seq, chunk_tok, n_out;
    uint32_t kv_tok; /* 0: the pool holds n_seq full sequences */
    enum quant_type kv_type;
    enum plan_io io; /* never AUTO */
    enum device_prefill prefill;
    char isa[16];
    bool pin;
    enum plan_numa numa;
    uint64_t numa_nodes;   /* bit i: node i; 0 with PLAN_NUMA_LEFT */
    double skew;           /* assumed of the router, for predictions alone */
    bool look_ahead;       /* with slots: read what the next layer will likely want in the disk's idle time */
    struct plan_pace pace; /* with slots and io_uring; n_ahead 0 without look_ahead */
    /* The GPU's share. What follows it is memory of the host: with a GPU that holds the experts that the GPU does not, in slots, and
     * what computing them takes. */
    bool has_gpu;
    struct plan_gpu gpu;
    struct plan_unused unused; /* without has_gpu */
    /* Every byte by purpose */
    /* weights held in memory (or mapped); of experts that have slots, these. With a GPU: of the CPU's layers, and copies of routers */
    uint64_t dense_bytes, expert_bytes;
    uint64_t slot_ram_bytes; /* what the slots may take; 0: all experts are resident (or mapped), there are no slots */
    uint32_t n_slots, n_slot_experts; /* that many for that many experts; 0 without slots */
    uint64_t
        kv_bytes; /* n_seq sequences of n_ctx positions, or kv_tok positions; whole pages. With a GPU: what that does not hold */
    uint64_t record_bytes;  /* of the same, recurrent layers' records: as many whatever n_ctx is */
    uint64_t scratch_bytes; /* activations of a step, and the device's scratch */
    uint64_t stage_bytes;   /* bounce buffers of the reader */
    uint64_t meta_bytes;    /* header, vocabulary, tables, stacks: an estimate from the header's size, marked so */
    uint64_t trace_bytes;   /* timeline and wanted experts, where they are kept */
    uint64_t total_bytes,
        budget_bytes; /* total may pass the budget with MMAP alone, whose pages the system takes back */
    /* Predicted; 0 where the machine's rates are not known */
    uint64_t decode_bytes_per_tok; /* weights read for one generated token (k of E experts) at an empty context */
    uint64_t missed_bytes_per_tok; /* read from disk for one, and for a prompt of PLAN_PROMPT_TOK */
    uint64_t prefill_missed_bytes;
    double decode_tok_per_s, prefill_tok_per_s; /* without rates of kernels: the most that memory allows, and 0 */
    double decode_dense_s, decode_expert_s;     /* of a token's time: computing */
    double decode_disk_s;                       /* and reading, which overlaps with the experts' */
    double load_s, first_token_s;               /* first: from the start to the first token after a short question */
};

/* Does the CPU compute experts of the GPU's layers? */
static inline bool plan_is_split(const struct plan *p)
{
    return p->has_gpu && p->gpu.n_experts < p->gpu.n_all_experts;
}

/* Does it compute layers of its own, before the GPU's? */
static inline bool plan_has_host_layers(const struct plan *p)
{
    return p->has_gpu && p->gpu.first_layer > 0;
}

/* Does the GPU compute those in steps of many rows? */
static inline bool plan_has_lift(const struct plan *p)
{
    return plan_has_host_layers(p) && p->gpu.lift_rows > 0;
}

/* Are there experts, of either, that only the host's memory holds? They have slots. */
static inline bool plan_has_host_experts(const struct plan *p)
{
    return plan_is_split(p) || (p->has_gpu && p->gpu.n_host_experts > 0);
}

/* Whose layers: those of the device that the plan is for (without a GPU: all), and the CPU's before a GPU's; the first once more, for the
 * second half of a step. */
enum plan_part { PLAN_MAIN, PLAN_BEFORE, PLAN_HALF };
struct model_span plan_span(const struct plan *p, const struct model *m, enum plan_part part);

/* Room for any expert of the model, each matrix on a boundary of PLAN_ROOM_ALIGN. */
#define PLAN_ROOM_ALIGN 256
uint64_t plan_gpu_room_bytes(const struct model *m);

/* The largest step of such an engine, for opening its GPU. A landing has three fences, and a layer PLAN_LAYER_FENCES; then come those of
 * lift.h, and those of attention on two sides, one for each half of a step. */
enum {
    PLAN_MOST_LANDING = 1 << 12,
    PLAN_LANDING_FENCES = 3,
    PLAN_LAYER_FENCES = 7,
    PLAN_ATTN_FENCES = 2,
    PLAN_LIFT_FENCES = 4
};
void plan_device_step(const struct plan *p, const struct model *m, struct device_step *out);
/* Does the host's memory hold a part of the KV cache beside the GPU's? The CPU then computes attention over it. */
static inline bool plan_has_host_kv(const struct plan *p)
{
    return p->has_gpu && p->gpu.kv_tok > 0;
}

/* May steps of a batch be run in halves, of which the CPU attends to one while the GPU computes the other (apex.h)? Not where it has
 * experts of the GPU's layers: it would compute them for both halves, and wait for their routers. */
static inline bool plan_has_halves(const struct plan *p)
{
    return plan_has_host_kv(p) && p->kv_tok > 0 && p->n_seq > 1 && !plan_is_split(p);
}

/* The program of a part. Errors as program_make(). */
int plan_program(const struct plan *p, const struct model *m, enum plan_part part, struct program **out);

/* The CPU's scratch beside a GPU: for the experts that it computes, for attention over the host's pages, and for its own layers (before;
 * NULL: it has none). */
uint64_t plan_host_scratch(const struct plan *p, const struct program *program, const struct program *before,
                           const struct device_ops *cpu);

/* Pinned memory that an expert passes through on its way to the GPU: room for the largest. */
uint64_t plan_gpu_move_bytes(const struct model *m);

/* Copies of routers with their biases, and of the norms before them, that looking ahead takes beside a GPU that has the layers from
 * first_layer on; and of the biases of experts that it shares with the CPU. */
uint64_t plan_ahead_bytes(const struct model *m, int first_layer);
uint64_t plan_bias_bytes(const struct model *m, int first_layer);

/* Were the CPU's kernels measured that it computes with? Are all its predictions of compute such, or only what memory allows at most? */
bool plan_has_kernels(const struct plan *p, const struct machine *m);
bool plan_is_measured(const struct plan *p, const struct machine *m);

/* Everything a plan is made from; the pointers are looked at, not kept. */
struct plan_in {
    const struct machine *machine;
    const struct model *model;
    const struct plan_opts *opts; /* NULL: all "your choice" */
    const struct device_ops *cpu; /* whose scratch arithmetic and abilities count */
    const struct device_ops *gpu; /* the same of a GPU that shall compute what it holds; NULL: none */
};

/* The usual pace of a plan whose slots, io and look_ahead are settled. */
struct plan_pace plan_usual_pace(const struct plan_in *in, const struct plan *p);

/* Pure: same inputs, same plan. With in->gpu it is for that GPU, unless the CPU alone is no slower than with a part of the layers there
 * (unused). ERR_LIMIT when it cannot fit, with the numbers by purpose; ERR_UNSUPPORTED when a device cannot run one of the model's ops
 * (names op, tensor and type) or a GPU's weights shall be mapped; ERR_ARG for impossible options. */
int plan_make(const struct plan_in *in, struct plan *out);

/* Text for a person: sizes by purpose, rates, what was chosen and why; JSON: the whole value. Caller frees with mem_free.
 * ERR_NOMEM. */
int plan_explain(const struct plan *plan, const struct plan_in *in, char **out);
int plan_to_json(const struct plan *plan, char **out);

/* The few other plans that come to mind, as a table: how fast each would be, and why it lost. in->opts is what the plan was made
 * from. Caller frees with mem_free. ERR_NOMEM. */
int plan_compare(const struct plan *plan, const struct plan_in *in, char **out);

/* Read a plan back. It is refused when it names another machine or model, or does not fit (ERR_STATE, ERR_LIMIT, with the
 * numbers). A plan for a GPU wants in->gpu (ERR_UNSUPPORTED), one without leaves it alone. Of in->opts only trace_bytes is looked at: what
 * the budget lacks for them is added to it, up to what the machine allows. */
int plan_from_json(const char *text, const struct plan_in *in, struct plan *out);

#ifdef __cplusplus
}
#endif
#endif
