/* Owns the slots that experts are read into, which expert lies where, and the reads in flight. Who goes is evict.c's to say,
 * how large slots are model/slot_shape.h's, and how bytes come from disk io/'s.
 *
 * A slot is free, being filled, or whole. It is held while it is being filled and while the loan wants it: from store_lease
 * until the store_next after the one that gave it. So a loan may be larger than the slots are. */
#include "src/run/store_slots.h"

#include "io/ring.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/layout.h"
#include "src/model/slot_shape.h"
#include "src/run/adapt.h"
#include "src/run/evict.h"
#include "src/run/store_load.h"
#include "src/run/touch.h"
#include "src/run/trace.h"

#include <assert.h>
#include <math.h>

enum { N_MATRICES = 3 };

/* While reads wait for a place in the queue, so many experts are given out at once: then the caller is back soon to start more. */
#define GIVE_AT_ONCE 4

/* What was read ahead is held until its loan begins: at most this part of the slots, so that loans have room. */
enum { AHEAD_PART = 2 };

/* Reads in flight at most where most of the next layer's experts are hinted at, as behind a chunk of a prompt: nobody starts more until
 * that layer's loan, so they have to last for its attention. */
enum { LAYER_READS = 128 };

/* For loans of a prompt at least so many: who computes many rows is away for long. */
enum { LARGE_READS = 32 };

/* An expert is begun with fewer than that in flight. */
enum { RING_DEPTH = LAYER_READS - 1 + N_MATRICES };
_Static_assert((int)LAYER_READS >= (int)PLAN_MAX_READS, "the ring holds both");

/* What a device copies from is held until the next loan: a quarter at most, beside what is read ahead. */
enum { KEEP_PART = 4 };

/* Memory is pinned in such pieces: a system that gives less gives the first ones. */
#define PIN_BYTES (64 * MIB)

_Static_assert(RING_ALIGN == LAYOUT_BLOCK_BYTES, "slots are counted in the blocks that are read");

enum want { WANT_WAITING, WANT_COMING, WANT_READY, WANT_GIVEN };

struct slot {
    char *memory;              /* view: of its place in the slots' memory */
    const void *w[N_MATRICES]; /* view: into memory */
    int layer;                 /* of the expert that lies here or is on its way; valid where key >= 0 */
    int key;                   /* index of that expert in slot_of; -1: none, or one that could not be read */
    int want;                  /* index in the loan; -1: not wanted by it */
    int n_reads;               /* in flight */
    bool is_hint;              /* read because of a hint, and not wanted by a loan yet */
    bool is_kept;              /* a device copies from it: it stays held until the next loan */
    bool is_ahead;     /* hinted at, and the loan that will likely want it has not begun: it stays held until then */
    uint64_t begin_ns; /* when it began to be filled, if there is a trace */
    struct evict_slot when_free; /* what evict shall know of it once it is not held */
};

/* What a class of slots knows of the uses of its experts. */
struct class_use {
    struct adapt *adapt; /* own */
    int half;            /* index in adapt_half_steps: the one that is in force */
};

struct store_slots {
    const struct model *model; /* view */
    struct file *const *files; /* view */
    struct trace *trace;       /* view; may be NULL */
    struct slot_shape shape;
    char *memory;             /* own: (shape.bytes) */
    struct touch *touch;      /* own */
    struct slot *slots;       /* own: (shape.n_slots), class after class */
    struct evict_slot *evict; /* own: (shape.n_slots) beside slots */
    int *class_first;         /* own: (shape.n_classes) index into slots */
    int *layer_first;         /* own: (n_layer) index into slot_of and n_uses */
    int *n_lying;             /* own: (n_layer) slots with experts of it, those that are on their way too */
    int n_keys;               /* experts of the layers that have slots, those on a GPU too */
    int *slot_of;             /* own: (n_keys) index into slots; -1: absent */
    uint32_t *n_uses;         /* own: (n_keys) loans that wanted it so far */
    uint32_t *n_layer_loans;  /* own: (n_layer) */
    double *heat;             /* own: (ADAPT_N, n_keys) evict.h */
    struct class_use *uses;   /* own: (shape.n_classes) */
    int *rank_of;             /* own: (n_layer) of a layer among those of its class */
    enum want *wants;         /* own: (most experts of a layer) beside the loan's ids */
    struct device *dev;       /* view; NULL: nothing is pinned */
    uint64_t pinned_bytes;    /* of memory, from its beginning */
    int *kept;                /* own: (n_slots) n_kept slots */
    int n_kept;
    int *given; /* own: (most experts of a layer) n_given slots that the last store_slots_next gave out */
    int n_given;
    int32_t *hints; /* own: (most experts of a layer) n_hints, those before next_hint done with */
    int n_hints, next_hint, hint_layer;
    int n_ahead;       /* read because of the present hint */
    struct ring *ring; /* own; NULL: read by pread */
    int n_reads;       /* the pace: with so many in flight another expert is not begun */
    bool is_lent, is_large;
    bool is_opening;   /* loans are not counted */
    int first_waiting; /* no want before it is WAITING */
    uint64_t n_loans, n_steps;
    int last_layer;           /* of the last loan */
    uint64_t busy_since_ns;   /* valid while reads are in flight */
    struct store_stats stats; /* of it, what store_slots_stats adds */
};

/* ---- open ---- */

static int open_ring(struct store_slots *s, const struct store_slots_args *a)
{
    struct ring_file *files = mem_zalloc((size_t)a->n_files, sizeof *files, MEM_META);

    if (!files)
        return err(ERR_NOMEM, "names of %d files", a->n_files);
    for (int i = 0; i < a->n_files; i++)
        files[i] = (struct ring_file){.path = file_path(a->files[i]), .then = file_identity(a->files[i])};
    /* The arena is not registered: the kernel would clear and pin all of it before the first token. */
    int rc = ring_open(&(struct ring_args){.depth = RING_DEPTH,
                                           .files = files,
                                           .n_files = a->n_files,
                                           .fault = a->args->read_fault,
                                           .fault_arg = a->args->read_fault_arg},
                       &s->ring);
    mem_free(files);
    return rc;
}

/* Of a layer that has slots; 0: it has none. */
static int n_stacked(const struct store_slots *s, int layer)
{
    if (s->shape.class_of[layer] < 0)
        return 0;
    return (int)s->model->weights[s->model->layers[layer].w[ROLE_EXPERT_GATE]].t.ne[2];
}

static int most_experts(const struct store_slots *s)
{
    int most = 0;

    for (int layer = 0; layer < s->model->hp.n_layer; layer++)
        most = n_stacked(s, layer) > most ? n_stacked(s, layer) : most;
    return most;
}

static int count_keys(const struct store_slots *s)
{
    int n = 0;

    for (int layer = 0; layer < s->model->hp.n_layer; layer++)
        n += n_stacked(s, layer);
    return n;
}

static int take_memory(struct store_slots *s)
{
    size_t n_slots = (size_t)s->shape.n_slots, most = (size_t)most_experts(s);
    size_t n_keys = (size_t)(s->n_keys = count_keys(s));

    s->memory = mem_map(s->shape.bytes, MEM_WEIGHTS);
    s->slots = mem_zalloc(n_slots, sizeof *s->slots, MEM_META);
    s->evict = mem_zalloc(n_slots, sizeof *s->evict, MEM_META);
    s->class_first = mem_zalloc((size_t)s->shape.n_classes, sizeof *s->class_first, MEM_META);
    s->layer_first = mem_zalloc((size_t)s->model->hp.n_layer, sizeof *s->layer_first, MEM_META);
    s->n_lying = mem_zalloc((size_t)s->model->hp.n_layer, sizeof *s->n_lying, MEM_META);
    s->slot_of = mem_zalloc(n_keys, sizeof *s->slot_of, MEM_META);
    s->n_uses = mem_zalloc(n_keys, sizeof *s->n_uses, MEM_META);
    s->n_layer_loans = mem_zalloc((size_t)s->model->hp.n_layer, sizeof *s->n_layer_loans, MEM_META);
    s->heat = mem_zalloc(ADAPT_N * n_keys, sizeof *s->heat, MEM_META);
    s->uses = mem_zalloc((size_t)s->shape.n_classes, sizeof *s->uses, MEM_META);
    s->rank_of = mem_zalloc((size_t)s->model->hp.n_layer, sizeof *s->rank_of, MEM_META);
    s->wants = mem_zalloc(most, sizeof *s->wants, MEM_META);
    s->given = mem_zalloc(most, sizeof *s->given, MEM_META);
    s->kept = mem_zalloc(n_slots, sizeof *s->kept, MEM_META);
    s->hints = mem_zalloc(most, sizeof *s->hints, MEM_META);
    if (s->memory && s->slots && s->evict && s->class_first && s->layer_first && s->n_lying && s->slot_of &&
        s->n_uses && s->n_layer_loans && s->heat && s->uses && s->rank_of && s->wants && s->given && s->kept &&
        s->hints)
        return 0;
    return err(ERR_NOMEM, "%zu expert slots of %llu bytes together", n_slots, (unsigned long long)s->shape.bytes);
}

static void number(struct store_slots *s)
{
    char *p = s->memory;
    int slot = 0, expert = 0;

    for (int i = 0; i < s->shape.n_classes; i++) {
        s->class_first[i] = slot;
        for (int k = 0; k < s->shape.classes[i].n_slots; k++, p += s->shape.classes[i].slot_bytes)
            s->slots[slot++] = (struct slot){.memory = p, .key = -1, .want = -1};
    }
    for (int layer = 0; layer < s->model->hp.n_layer; layer++) {
        s->layer_first[layer] = expert;
        expert += n_stacked(s, layer);
    }
    for (int i = 0; i < s->n_keys; i++)
        s->slot_of[i] = -1;
    for (int i = 0; i < ADAPT_N * s->n_keys; i++)
        s->heat[i] = -INFINITY;
}

static int open_uses(struct store_slots *s)
{
    int rc = 0;

    for (int class = 0; class < s->shape.n_classes && !rc; class ++) {
        int n_layers = 0, most = 0;
        for (int layer = 0; layer < s->model->hp.n_layer; layer++) {
            if (s->shape.class_of[layer] != class)
                continue;
            s->rank_of[layer] = n_layers++;
            most = n_stacked(s, layer) > most ? n_stacked(s, layer) : most;
        }
        rc = adapt_open(s->shape.classes[class].n_slots, n_layers, most, &s->uses[class].adapt);
    }
    return rc;
}

/* Slots for the experts that no GPU holds. */
static int make_shape(struct store_slots *s, const struct plan *plan)
{
    int *n_away = mem_zalloc((size_t)s->model->hp.n_layer, sizeof *n_away, MEM_META);

    if (!n_away)
        return err(ERR_NOMEM, "experts of %d layers", s->model->hp.n_layer);
    if (plan->has_gpu)
        layout_share(s->model, (int)plan->gpu.first_layer, plan->gpu.n_experts, n_away);
    int rc = slot_shape_init(s->model, n_away, plan->slot_ram_bytes, &s->shape);
    mem_free(n_away);
    return rc;
}

/* As much of the slots as the plan says and the system gives; the rest is copied through memory that is. */
static int pin(struct store_slots *s, const struct plan *plan)
{
    uint64_t most = plan->gpu.pin_bytes < s->shape.bytes ? plan->gpu.pin_bytes : s->shape.bytes;
    bool is_pinned = true;
    int rc = 0;

    while (!rc && is_pinned && s->pinned_bytes < most) {
        uint64_t left = most - s->pinned_bytes, bytes = left < PIN_BYTES ? left : PIN_BYTES;
        rc = s->dev->ops->pin(s->dev, s->memory + s->pinned_bytes, bytes, &is_pinned);
        s->pinned_bytes += !rc && is_pinned ? bytes : 0;
    }
    return rc;
}

static void unpin(struct store_slots *s)
{
    for (uint64_t at = 0; at < s->pinned_bytes; at += PIN_BYTES)
        s->dev->ops->unpin(s->dev, s->memory + at);
}

int store_slots_open(const struct store_slots_args *a, struct store_slots **out)
{
    const struct plan *plan = a->args->plan;
    struct store_slots *s = mem_zalloc(1, sizeof *s, MEM_META);

    *out = NULL;
    if (!s)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *s);
    s->model = a->args->model;
    s->files = a->files;
    s->trace = a->args->trace;
    s->n_reads = plan->pace.n_reads ? (int)plan->pace.n_reads : PLAN_MAX_READS;
    int rc = make_shape(s, plan);
    if (!rc)
        rc = take_memory(s);
    if (!rc)
        rc = store_load_place(plan, s->memory, s->shape.bytes);
    if (!rc)
        number(s);
    if (!rc)
        rc = open_uses(s);
    s->dev = plan->has_gpu ? a->args->device : NULL;
    if (!rc && s->dev)
        rc = pin(s, plan);
    if (!rc && plan->io == PLAN_IO_URING)
        rc = open_ring(s, a);
    if (!rc)
        rc = touch_start(s->memory, s->shape.bytes, &s->touch);
    if (rc) {
        store_slots_close(s);
        return rc;
    }
    *out = s;
    return 0;
}

void store_slots_close(struct store_slots *s)
{
    if (!s)
        return;
    touch_stop(s->touch);
    ring_close(s->ring);
    unpin(s);
    mem_free(s->kept);
    mem_free(s->hints);
    mem_free(s->given);
    mem_free(s->wants);
    mem_free(s->rank_of);
    for (int class = 0; s->uses && class < s->shape.n_classes; class ++)
        adapt_close(s->uses[class].adapt);
    mem_free(s->uses);
    mem_free(s->heat);
    mem_free(s->n_layer_loans);
    mem_free(s->n_uses);
    mem_free(s->slot_of);
    mem_free(s->n_lying);
    mem_free(s->layer_first);
    mem_free(s->class_first);
    mem_free(s->evict);
    mem_free(s->slots);
    mem_unmap(s->memory, s->shape.bytes, MEM_WEIGHTS);
    slot_shape_done(&s->shape);
    mem_free(s);
}

/* ---- slots ---- */

static const struct weight *stack_of(const struct store_slots *s, int layer, int matrix)
{
    static const enum role stacks[N_MATRICES] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};
    return &s->model->weights[s->model->layers[layer].w[stacks[matrix]]];
}

static int index_of(const struct store_slots *s, const struct slot *slot)
{
    return (int)(slot - s->slots);
}

static void set_free(struct store_slots *s, struct slot *slot)
{
    if (slot->key >= 0) {
        s->slot_of[slot->key] = -1;
        s->n_lying[slot->layer]--;
    }
    slot->key = slot->want = -1;
    slot->is_hint = slot->is_ahead = false;
    slot->when_free = (struct evict_slot){.state = EVICT_FREE};
    s->evict[index_of(s, slot)] = slot->when_free;
}

/* The loan needs it no more; what is still being filled stays held until it is whole. */
static void let_go(struct store_slots *s, struct slot *slot)
{
    slot->want = -1;
    if (!slot->n_reads && !slot->is_ahead && !slot->is_kept)
        s->evict[index_of(s, slot)] = slot->when_free;
}

static double heat_of(const struct store_slots *s, int layer, int key)
{
    return s->heat[s->uses[s->shape.class_of[layer]].half * s->n_keys + key];
}

static uint32_t n_unwanted(const struct store_slots *s, int layer, int key)
{
    return s->n_layer_loans[layer] - s->n_uses[key];
}

/* A loan wants this expert. */
static void count_use(struct store_slots *s, int key)
{
    s->n_uses[key]++;
    for (int i = 0; i < ADAPT_N; i++) {
        double *heat = &s->heat[i * s->n_keys + key];
        *heat = evict_heat_of(*heat, s->n_steps, adapt_half_steps[i]);
    }
}

/* Another half-life is better of late: those that lie in slots are told from each other by it from now on. */
static void set_half(struct store_slots *s, int class, int half)
{
    int first = s->class_first[class], n = s->shape.classes[class].n_slots;

    s->uses[class].half = half;
    for (int i = first; i < first + n; i++) {
        struct slot *slot = &s->slots[i];
        if (slot->key >= 0)
            s->evict[i].heat = slot->when_free.heat = heat_of(s, slot->layer, slot->key);
    }
}

static void hold(struct store_slots *s, struct slot *slot, int want)
{
    s->stats.n_hint_hits += slot->is_hint;
    s->stats.hint_hit_bytes += slot->is_hint ? model_expert_bytes(s->model, slot->layer) : 0;
    slot->is_hint = slot->is_ahead = false;
    slot->want = want;
    s->evict[index_of(s, slot)].state = EVICT_HELD;
    if (!s->is_large)
        slot->when_free = (struct evict_slot){.state = EVICT_KEPT, .at = s->n_loans};
    slot->when_free.n_unwanted = n_unwanted(s, slot->layer, slot->key);
    slot->when_free.heat = heat_of(s, slot->layer, slot->key);
}

/* What a layer may keep of large loans: one layer's is computed while the next one's comes, so two layers may be there whole. All it has,
 * where that would take more than a quarter of the slots, or nothing comes while another computes. */
static int share_of(const struct store_slots *s, const struct slot_class *c)
{
    int n_experts = c->n_experts / c->n_layers, n_whole = 2 * n_experts;

    return s->ring && c->n_slots >= 4 * n_whole ? (c->n_slots - n_whole) / (c->n_layers - 2) : n_experts;
}

/* For a large loan: of layers that hold more than their share, what passes. -1: nothing. */
static int choose_surplus(const struct store_slots *s, int class)
{
    const struct slot_class *c = &s->shape.classes[class];
    const struct evict_slot *evict = &s->evict[s->class_first[class]];
    const int share = share_of(s, c);
    int best = -1;

    for (int i = 0; i < c->n_slots; i++) {
        if (evict[i].state == EVICT_PASSING && s->n_lying[s->slots[s->class_first[class] + i].layer] > share &&
            (best < 0 || evict_goes_before(&evict[i], &evict[best])))
            best = i;
    }
    return best;
}

/* Take a slot for an expert: NULL when all of its size are held. */
static struct slot *take_slot(struct store_slots *s, int layer, int expert)
{
    int class = s->shape.class_of[layer], first = s->class_first[class];
    int at = s->is_large ? choose_surplus(s, class) : -1;

    if (at < 0)
        at = evict_choose(&s->evict[first], s->shape.classes[class].n_slots);
    if (at < 0)
        return NULL;
    struct slot *slot = &s->slots[first + at];
    set_free(s, slot);
    slot->layer = layer;
    slot->key = s->layer_first[layer] + expert;
    s->slot_of[slot->key] = first + at;
    s->n_lying[layer]++;
    s->evict[first + at].state = EVICT_HELD;
    slot->begin_ns = trace_has_timeline(s->trace) ? clock_ns() : 0;
    return slot;
}

static struct slot *take_wanted_slot(struct store_slots *s, const struct store_lease *lease, int want)
{
    struct slot *slot = take_slot(s, lease->layer, lease->ids[want]);

    if (slot) {
        slot->when_free = (struct evict_slot){.state = EVICT_PASSING, .at = s->n_loans};
        hold(s, slot, want);
        s->wants[want] = WANT_COMING;
    }
    return slot;
}

/* Where its matrices are in the files and shall be in memory. */
static void place_reads(struct store_slots *s, struct slot *slot, struct ring_read *reads)
{
    char *p = slot->memory;
    int expert = slot->key - s->layer_first[slot->layer];

    for (int i = 0; i < N_MATRICES; i++) {
        const struct weight *w = stack_of(s, slot->layer, i);
        uint64_t bytes = model_matrix_bytes(w), off = w->off + (uint64_t)expert * w->t.stride[2];
        reads[i] = (struct ring_read){
            .file = w->file, .off = off, .bytes = bytes, .slot = p, .tag = (uint64_t)index_of(s, slot)};
        slot->w[i] = p + off % RING_ALIGN;
        p += slot_shape_matrix_bytes(bytes);
    }
}

/* It could not be read. The loan may ask for it again; its memory is free once nothing is written to it any more. */
static void give_up(struct store_slots *s, struct slot *slot)
{
    if (slot->want >= 0) {
        s->wants[slot->want] = WANT_WAITING;
        if (slot->want < s->first_waiting)
            s->first_waiting = slot->want;
    }
    int n_reads = slot->n_reads;
    set_free(s, slot);
    if (n_reads)
        s->evict[index_of(s, slot)].state = EVICT_HELD;
}

static void tell(struct store_slots *s, const struct slot *slot)
{
    if (!trace_has_timeline(s->trace))
        return;
    trace_add(s->trace, &(struct trace_event){.what = slot->is_hint ? TRACE_AHEAD : TRACE_READ,
                                              .layer = slot->layer,
                                              .id = slot->key - s->layer_first[slot->layer],
                                              .begin_ns = slot->begin_ns,
                                              .end_ns = clock_ns(),
                                              .bytes = model_expert_bytes(s->model, slot->layer)});
}

/* All its bytes have come. What was read of a file that is no longer the one whose header was read is of no use. */
static int take_whole(struct store_slots *s, struct slot *slot)
{
    int rc = 0;

    tell(s, slot);
    for (int i = 0; i < N_MATRICES && !rc; i++) {
        struct file *f = s->files[stack_of(s, slot->layer, i)->file];
        if (i == 0 || f != s->files[stack_of(s, slot->layer, i - 1)->file])
            rc = file_check(f, file_identity(f));
        s->stats.disk_bytes += model_matrix_bytes(stack_of(s, slot->layer, i));
    }
    if (rc)
        give_up(s, slot);
    else if (slot->want >= 0)
        s->wants[slot->want] = WANT_READY;
    else
        let_go(s, slot);
    return rc;
}

/* ---- reading through the ring ---- */

/* A loan's error is one of a read that this loan wants; others were asked for by one that is over. */
static int take_done(struct store_slots *s, const struct ring_done *done, int n)
{
    int failed_rc = 0, changed_rc = 0;

    for (int i = 0; i < n; i++) {
        struct slot *slot = &s->slots[done[i].tag];
        bool is_wanted = slot->want >= 0;
        slot->n_reads--;
        if (slot->key < 0) { /* given up before */
            if (!slot->n_reads)
                set_free(s, slot);
        } else if (done[i].rc) {
            give_up(s, slot);
            failed_rc = is_wanted ? done[i].rc : failed_rc;
        } else if (!slot->n_reads) {
            int rc = take_whole(s, slot);
            changed_rc = rc && is_wanted ? rc : changed_rc;
        }
    }
    return changed_rc ? changed_rc : failed_rc; /* the later of the two has left its text */
}

static int reap(struct store_slots *s, int n_min)
{
    struct ring_done done[PLAN_MAX_READS];
    int n;
    int rc = ring_wait(s->ring, n_min, done, PLAN_MAX_READS, &n);
    int done_rc = take_done(s, done, n);

    if (n && !ring_n_in_flight(s->ring))
        s->stats.disk_busy_ns += clock_ns() - s->busy_since_ns;
    return done_rc ? done_rc : rc;
}

static int submit(struct store_slots *s, struct slot *slot)
{
    struct ring_read reads[N_MATRICES];
    int n_before = ring_n_in_flight(s->ring);

    if (!n_before)
        s->busy_since_ns = clock_ns();
    place_reads(s, slot, reads);
    int rc = ring_submit(s->ring, reads, N_MATRICES);
    slot->n_reads = ring_n_in_flight(s->ring) - n_before; /* a ring that broke may have taken them nevertheless */
    if (rc)
        give_up(s, slot);
    return rc;
}

static bool find_waiting(struct store_slots *s, const struct store_lease *lease)
{
    while (s->first_waiting < lease->n && s->wants[s->first_waiting] != WANT_WAITING)
        s->first_waiting++;
    return s->first_waiting < lease->n;
}

/* Those of the last hint are no more held than others are. */
static void let_hints_go(struct store_slots *s)
{
    for (int i = 0; i < s->next_hint; i++) {
        int at = s->slot_of[s->layer_first[s->hint_layer] + s->hints[i]];
        if (at >= 0 && s->slots[at].is_ahead) {
            s->slots[at].is_ahead = false;
            let_go(s, &s->slots[at]);
        }
    }
    s->n_hints = s->next_hint = s->n_ahead = 0;
}

/* An expert that will likely be wanted. False: no slot is to be had. */
static bool submit_hint(struct store_slots *s, int expert, int *rc)
{
    int key = s->layer_first[s->hint_layer] + expert, at = s->slot_of[key];
    struct slot *slot = at >= 0 ? &s->slots[at] : take_slot(s, s->hint_layer, expert);

    if (!slot)
        return false;
    slot->is_ahead = true;
    s->n_ahead++;
    s->evict[index_of(s, slot)].state = EVICT_HELD;
    if (at >= 0)
        return true;
    slot->is_hint = true;
    slot->when_free = (struct evict_slot){.state = s->is_large ? EVICT_PASSING : EVICT_KEPT,
                                          .n_unwanted = n_unwanted(s, s->hint_layer, key),
                                          .heat = heat_of(s, s->hint_layer, key),
                                          .at = s->n_loans};
    s->stats.n_hint_reads++;
    s->stats.hint_bytes += model_expert_bytes(s->model, s->hint_layer);
    *rc = submit(s, slot);
    return true;
}

static int most_reads(const struct store_slots *s)
{
    return s->is_large && s->n_reads < LARGE_READS ? LARGE_READS : s->n_reads;
}

static void submit_hints(struct store_slots *s)
{
    int most = s->shape.classes[s->shape.class_of[s->hint_layer]].n_slots / AHEAD_PART;
    int n_reads = 2 * s->n_hints > n_stacked(s, s->hint_layer) ? LAYER_READS : most_reads(s);
    int rc = 0; /* a ring that broke is told by the next read that somebody wants */

    while (!rc && ring_n_in_flight(s->ring) < n_reads && s->next_hint < s->n_hints && s->n_ahead < most &&
           submit_hint(s, s->hints[s->next_hint], &rc))
        s->next_hint++;
}

/* Start as many reads as there are places and slots. */
static int submit_waiting(struct store_slots *s, const struct store_lease *lease)
{
    int rc = 0;

    while (!rc && s->ring && ring_n_in_flight(s->ring) < most_reads(s) && find_waiting(s, lease)) {
        struct slot *slot = take_wanted_slot(s, lease, s->first_waiting);
        if (!slot)
            break;
        rc = submit(s, slot);
    }
    if (!rc && s->ring && s->n_hints && !find_waiting(s, lease))
        submit_hints(s);
    return rc;
}

/* ---- reading by pread ---- */

static int read_one(struct store_slots *s, const struct store_lease *lease)
{
    struct ring_read reads[N_MATRICES];
    int rc = 0;

    if (!find_waiting(s, lease))
        return 0;
    struct slot *slot = take_wanted_slot(s, lease, s->first_waiting);
    assert(slot); /* what the loan holds has been given out, and that was let go */
    place_reads(s, slot, reads);
    for (int i = 0; i < N_MATRICES && !rc; i++)
        rc = file_read(s->files[reads[i].file], reads[i].off, (void *)slot->w[i], reads[i].bytes);
    if (rc)
        give_up(s, slot);
    return rc ? rc : take_whole(s, slot);
}

/* ---- loans ---- */

/* What passes goes by how often it was not wanted, and that a large loan did not want it counts from now on. */
static void tell_unwanted(struct store_slots *s, int layer)
{
    for (int expert = 0; expert < n_stacked(s, layer); expert++) {
        int key = s->layer_first[layer] + expert, at = s->slot_of[key];
        if (at >= 0)
            s->evict[at].n_unwanted = s->slots[at].when_free.n_unwanted = n_unwanted(s, layer, key);
    }
}

/* What the loan says of the experts' use, before any slot is looked for. */
static void count_uses(struct store_slots *s, const struct store_lease *lease)
{
    int class = s->shape.class_of[lease->layer];

    s->n_layer_loans[lease->layer]++;
    for (int i = 0; i < lease->n; i++)
        count_use(s, s->layer_first[lease->layer] + lease->ids[i]);
    if (s->is_large) {
        tell_unwanted(s, lease->layer);
        return;
    }
    int half = adapt_loan(s->uses[class].adapt, s->n_steps, s->rank_of[lease->layer], lease->ids, lease->n);
    if (half != s->uses[class].half)
        set_half(s, class, half);
}

/* How many of those that the loan wants had been guessed? To hint at a whole layer is no guess. */
static void count_guesses(struct store_slots *s, const struct store_lease *lease)
{
    if (!s->n_hints || s->hint_layer != lease->layer || s->n_hints == n_stacked(s, lease->layer))
        return;
    s->stats.n_guessed += (uint64_t)lease->n;
    for (int i = 0; i < lease->n; i++)
        for (int k = 0; k < s->n_hints; k++)
            s->stats.n_guessed_rightly += s->hints[k] == lease->ids[i];
}

int store_slots_lease(struct store_slots *s, const struct store_lease *lease)
{
    const struct slot_class *class = &s->shape.classes[s->shape.class_of[lease->layer]];

    if (s->is_lent)
        return err(ERR_STATE, "experts of layer %d: those of another layer are still on loan", lease->layer);
    while (s->n_kept) {
        struct slot *slot = &s->slots[s->kept[--s->n_kept]];
        slot->is_kept = false;
        if (slot->want < 0)
            let_go(s, slot);
    }
    s->is_lent = true;
    s->is_large = (int64_t)lease->n * class->n_layers > class->n_slots;
    s->n_loans++;
    s->n_steps += lease->layer <= s->last_layer; /* layers come in order: another step has begun */
    s->last_layer = lease->layer;
    s->n_given = s->first_waiting = 0;
    if (!s->is_opening)
        count_uses(s, lease);
    count_guesses(s, lease);
    for (int i = 0; i < lease->n; i++) {
        int key = s->layer_first[lease->layer] + lease->ids[i], at = s->slot_of[key];
        s->wants[i] = WANT_WAITING;
        if (at >= 0) {
            hold(s, &s->slots[at], i);
            s->wants[i] = s->slots[at].n_reads ? WANT_COMING : WANT_READY;
        }
        *(at >= 0 ? &s->stats.n_expert_hits : &s->stats.n_expert_misses) += 1;
    }
    let_hints_go(s); /* but those that this loan holds now */
    int rc = submit_waiting(s, lease);
    if (rc)
        store_slots_release(s, lease);
    return rc;
}

/* Is all of the slot's memory pinned, as one piece? Pieces begin where slots do not. */
static bool is_pinned(const struct store_slots *s, const struct slot *slot)
{
    int class = s->shape.class_of[slot->layer];
    uint64_t off = (uint64_t)(slot->memory - s->memory), end = off + s->shape.classes[class].slot_bytes;
    return end <= s->pinned_bytes && off / PIN_BYTES == (end - 1) / PIN_BYTES;
}

static int give(struct store_slots *s, struct store_lease *lease, struct store_expert *out, int max)
{
    int n = 0;

    if (find_waiting(s, lease) && max > GIVE_AT_ONCE)
        max = GIVE_AT_ONCE;
    for (int i = 0; i < lease->n && n < max; i++) {
        if (s->wants[i] != WANT_READY)
            continue;
        int at = s->slot_of[s->layer_first[lease->layer] + lease->ids[i]];
        out[n].expert = lease->ids[i];
        out[n].on_device = false;
        out[n].is_pinned = is_pinned(s, &s->slots[at]);
        for (int k = 0; k < N_MATRICES; k++)
            out[n].w[k] = s->slots[at].w[k];
        s->wants[i] = WANT_GIVEN;
        s->given[s->n_given++] = at;
        n++;
    }
    lease->n_given += n;
    return n;
}

static int wait_for_one(struct store_slots *s, const struct store_lease *lease)
{
    uint64_t start_ns = clock_ns();
    assert(!s->ring || ring_n_in_flight(s->ring));
    int rc = s->ring ? reap(s, 1) : read_one(s, lease);
    uint64_t end_ns = clock_ns();
    s->stats.disk_wait_ns += end_ns - start_ns;
    s->stats.disk_busy_ns += s->ring ? 0 : end_ns - start_ns;
    trace_add(s->trace, &(struct trace_event){TRACE_WAIT, lease->layer, 0, start_ns, end_ns, 0});
    return rc;
}

int store_slots_next(struct store_slots *s, struct store_lease *lease, bool wait, struct store_expert *out, int max,
                     int *n_out)
{
    int rc = 0;

    *n_out = 0;
    while (s->n_given)
        let_go(s, &s->slots[s->given[--s->n_given]]);
    if (s->ring && ring_n_in_flight(s->ring))
        rc = reap(s, 0);
    for (;;) {
        if (!rc)
            rc = submit_waiting(s, lease);
        if (rc)
            return rc;
        *n_out = give(s, lease, out, max);
        if (*n_out || !wait || max < 1 || lease->n_given == lease->n)
            return 0;
        rc = wait_for_one(s, lease);
    }
}

/* ---- while opening ---- */

bool store_slots_have_room(const struct store_slots *s, const int *n_experts)
{
    for (int class = 0; class < s->shape.n_classes; class ++) {
        int64_t n = 0;
        for (int layer = 0; layer < s->model->hp.n_layer; layer++)
            n += s->shape.class_of[layer] == class ? n_experts[layer] : 0;
        if (n > s->shape.classes[class].n_slots)
            return false;
    }
    return true;
}

int store_slots_read(struct store_slots *s, int layer, const int32_t *ids, int n)
{
    struct store_lease lease = {.layer = layer, .n = n, .ids = ids, .open = true};
    struct store_expert given[GIVE_AT_ONCE];
    int n_given;

    s->is_opening = true;
    int rc = store_slots_lease(s, &lease);
    if (rc)
        return rc;
    while (!rc && lease.n_given < n)
        rc = store_slots_next(s, &lease, true, given, GIVE_AT_ONCE, &n_given);
    store_slots_release(s, &lease);
    return rc;
}

uint64_t store_slots_begin(struct store_slots *s)
{
    uint64_t bytes = s->stats.disk_bytes;

    s->stats = (struct store_stats){0};
    s->is_opening = false;
    return bytes;
}

/* ---- beside loans ---- */

bool store_slots_peek(const struct store_slots *s, int layer, int expert, struct store_expert *out)
{
    int at = s->shape.class_of[layer] < 0 ? -1 : s->slot_of[s->layer_first[layer] + expert];

    if (at < 0 || s->slots[at].n_reads)
        return false;
    out->expert = expert;
    out->on_device = false;
    out->is_pinned = is_pinned(s, &s->slots[at]);
    for (int k = 0; k < N_MATRICES; k++)
        out->w[k] = s->slots[at].w[k];
    return true;
}

bool store_slots_keep(struct store_slots *s, int layer, int expert)
{
    const struct slot_class *class = &s->shape.classes[s->shape.class_of[layer]];
    int at = s->slot_of[s->layer_first[layer] + expert];

    if (at < 0 || s->slots[at].is_kept)
        return at >= 0;
    if (s->n_kept >= class->n_slots / KEEP_PART)
        return false;
    s->kept[s->n_kept++] = at;
    s->slots[at].is_kept = true;
    return true;
}

void store_slots_hint(struct store_slots *s, int layer, const int32_t *ids, int n)
{
    let_hints_go(s);
    if (!s->ring || layer < 0 || layer >= s->model->hp.n_layer || s->shape.class_of[layer] < 0)
        return;
    int n_experts = (int)stack_of(s, layer, 0)->t.ne[2];
    for (int i = 0; i < n && s->n_hints < n_experts; i++) {
        if (ids[i] >= 0 && ids[i] < n_experts)
            s->hints[s->n_hints++] = ids[i];
    }
    s->hint_layer = layer;
}

int store_slots_favourites(const struct store_slots *s, int layer, int n, int32_t *ids)
{
    const uint32_t *n_uses = s->n_uses + s->layer_first[layer];
    int n_ids = 0;

    for (int expert = 0; n > 0 && expert < n_stacked(s, layer); expert++) {
        if (!n_uses[expert] || (n_ids == n && n_uses[expert] <= n_uses[ids[n - 1]]))
            continue;
        int at = n_ids < n ? n_ids++ : n - 1;
        for (; at > 0 && n_uses[ids[at - 1]] < n_uses[expert]; at--)
            ids[at] = ids[at - 1];
        ids[at] = expert;
    }
    return n_ids;
}

void store_slots_set_reads(struct store_slots *s, int n)
{
    assert(n >= PLAN_LEAST_READS && n <= PLAN_MAX_READS);
    s->n_reads = n;
}

void store_slots_release(struct store_slots *s, const struct store_lease *lease)
{
    for (int i = 0; i < lease->n; i++) {
        int at = s->slot_of[s->layer_first[lease->layer] + lease->ids[i]];
        if (at >= 0 && s->slots[at].want == i)
            let_go(s, &s->slots[at]);
    }
    s->n_given = 0;
    s->is_lent = false;
}

void store_slots_stats(const struct store_slots *s, struct store_stats *stats)
{
    stats->resident_bytes += s->shape.bytes;
    stats->pinned_bytes += s->pinned_bytes;
    stats->disk_bytes += s->stats.disk_bytes;
    stats->disk_wait_ns += s->stats.disk_wait_ns;
    stats->disk_busy_ns += s->stats.disk_busy_ns;
    stats->n_expert_hits += s->stats.n_expert_hits;
    stats->n_expert_misses += s->stats.n_expert_misses;
    stats->n_hint_reads += s->stats.n_hint_reads;
    stats->n_hint_hits += s->stats.n_hint_hits;
    stats->hint_bytes += s->stats.hint_bytes;
    stats->hint_hit_bytes += s->stats.hint_hit_bytes;
    stats->n_guessed += s->stats.n_guessed;
    stats->n_guessed_rightly += s->stats.n_guessed_rightly;
    if (s->ring) {
        struct ring_info info;
        ring_info(s->ring, &info);
        stats->n_repeats += info.n_repeats;
    }
}
