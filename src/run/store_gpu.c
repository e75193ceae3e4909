/* Owns the device's memory for weights and says who lies where in it. A layer's places are those of its stacks' first matrices, all
 * equally large, so that any expert of the layer may lie in any of them; at open they are filled with the first experts. Then
 * experts move to where they are wanted: one at a time is copied over one that is wanted clearly less (evict_is_warmer()), through
 * pinned memory, piece by piece while the host has nothing else to do. Who loses his place is in the host's
 * slots, where those are enough for all, or is read when he is wanted again. */
#include "src/run/store_gpu.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/layout.h"
#include "src/run/evict.h"
#include "src/run/store_load.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Uses fade to a half in so many steps. Longer than in the host's slots, because a move costs more than a read that has to be made
 * anyway, and the counts have to tell favourites from accidents. A move reads an expert once on the host and carries it once, which is
 * some two uses by the host; counts that differ by ten in some 92 steps (64 / ln 2), the least that evict_is_warmer() takes for no
 * accident, have paid for it after twenty. */
enum { HALF_STEPS = 64 };

/* Staged at a time. A core takes some 10 us for it, which is what a step waits at most for a piece that was begun when the router was all
 * but done; the runtime's call that sends it off takes a few. */
#define PIECE_BYTES (128 * KIB)

enum move_phase {
    MOVE_NONE,
    MOVE_STAGING, /* chosen, and sent as far as `matrix` and `sent` say */
    MOVE_ENDING,  /* the device may still copy from `pinned` */
};

struct store_gpu {
    const struct model *model; /* view */
    struct device *dev;        /* view */
    void *memory;              /* own: (layout.bytes) on the device */
    struct model_span span;    /* its layers */
    struct layout layout;
    int *n_experts;   /* own: (n_layer) places */
    int *layer_first; /* own: (n_layer) index into place_of */
    int *place_of;    /* own: (experts of all layers) -1: none */
    int *expert_at;   /* own: the same room, by place: who lies there; -1: nobody */
    double *heat;     /* own: the same room, by expert: evict.h */
    uint64_t *wanted; /* own: the same room: number of the last loan that wanted it */
    uint64_t n_loans, n_steps;
    int last_layer;
    bool moves;   /* experts move */
    char *pinned; /* own, alloc_host: room for one expert */
    struct {
        enum move_phase phase;
        int layer, expert, place; /* expert -1: it was given up, and nobody will lie there */
        int matrix;               /* the next piece is of this one */
        uint64_t sent, staged;    /* bytes: of this matrix; of all, which is where in `pinned` the next piece goes */
    } move;
    uint64_t n_moves, move_bytes; /* that have come to their end; that were staged */
};

static int n_stacked(const struct model *m, int layer)
{
    int stack = m->layers[layer].w[ROLE_EXPERT_GATE];
    return stack < 0 ? 0 : (int)m->weights[stack].t.ne[2];
}

/* Who lies where: the first experts of each layer. */
static int place(struct store_gpu *g, const struct plan *plan)
{
    const struct model *m = g->model;
    size_t n_layer = (size_t)m->hp.n_layer, n_all = (size_t)plan->gpu.n_all_experts + plan->gpu.n_host_experts;

    g->n_experts = mem_zalloc(n_layer, sizeof *g->n_experts, MEM_META);
    g->layer_first = mem_zalloc(n_layer, sizeof *g->layer_first, MEM_META);
    g->place_of = mem_zalloc(n_all, sizeof *g->place_of, MEM_META);
    g->expert_at = mem_zalloc(n_all, sizeof *g->expert_at, MEM_META);
    g->heat = mem_zalloc(n_all, sizeof *g->heat, MEM_META);
    g->wanted = mem_zalloc(n_all, sizeof *g->wanted, MEM_META);
    if (!g->n_experts || !g->layer_first || !g->place_of || !g->expert_at || !g->heat || !g->wanted)
        return err(ERR_NOMEM, "places of %zu experts", n_all);
    layout_share(m, (int)plan->gpu.first_layer, plan->gpu.n_experts, g->n_experts);
    int first = 0;
    for (int layer = 0; layer < m->hp.n_layer; layer++) {
        g->layer_first[layer] = first;
        for (int expert = 0; expert < n_stacked(m, layer); expert++, first++) {
            g->place_of[first] = g->expert_at[first] = expert < g->n_experts[layer] ? expert : -1;
            g->heat[first] = -INFINITY;
        }
    }
    return layout_init_part(m, g->span, g->n_experts, &g->layout);
}

static int load(struct store_gpu *g, const struct store_gpu_args *a, uint64_t *load_bytes)
{
    void *stage = mem_map(PLAN_STAGE_BYTES, MEM_STAGE);
    int rc =
        stage ? g->dev->ops->alloc(g->dev, g->layout.bytes, &g->memory)
              : err(ERR_NOMEM, "a buffer of %" PRIu64 " bytes for weights on their way to the GPU", PLAN_STAGE_BYTES);

    if (!rc)
        rc = store_load_run(&(struct store_load){.args = a->args,
                                                 .layout = &g->layout,
                                                 .files = a->files,
                                                 .n_files = a->n_files,
                                                 .memory = stage,
                                                 .dev = g->dev,
                                                 .dev_memory = g->memory},
                            a->args->plan->io, load_bytes);
    if (!rc)
        rc = g->dev->ops->sync(g->dev);
    mem_unmap(stage, PLAN_STAGE_BYTES, MEM_STAGE);
    return rc;
}

static int take_pinned(struct store_gpu *g)
{
    void *pinned;
    int rc = g->dev->ops->alloc_host(g->dev, plan_gpu_move_bytes(g->model), &pinned);
    g->pinned = pinned;
    return rc;
}

int store_gpu_open(const struct store_gpu_args *a, uint64_t *load_bytes, struct store_gpu **out)
{
    struct store_gpu *g = mem_zalloc(1, sizeof *g, MEM_META);

    *out = NULL;
    if (!g)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *g);
    g->model = a->args->model;
    g->span = plan_span(a->args->plan, g->model, PLAN_MAIN);
    g->dev = a->args->device;
    g->moves = a->args->plan->gpu.moves;
    int rc = place(g, a->args->plan);
    if (!rc)
        rc = load(g, a, load_bytes);
    if (!rc && g->moves)
        rc = take_pinned(g);
    if (rc) {
        store_gpu_close(g);
        return rc;
    }
    *out = g;
    return 0;
}

void store_gpu_close(struct store_gpu *g)
{
    if (!g)
        return;
    bool is_there;
    if (g->move.phase != MOVE_NONE)
        g->dev->ops->brought(g->dev, true, &is_there);
    g->dev->ops->release_host(g->dev, g->pinned);
    g->dev->ops->release(g->dev, g->memory);
    layout_done(&g->layout);
    mem_free(g->wanted);
    mem_free(g->heat);
    mem_free(g->expert_at);
    mem_free(g->place_of);
    mem_free(g->layer_first);
    mem_free(g->n_experts);
    mem_free(g);
}

const void *store_gpu_weight(const struct store_gpu *g, int weight)
{
    if (!model_span_has(g->model, g->span, weight))
        return NULL;
    return (const char *)g->memory + g->layout.weight_off[weight];
}

uint64_t store_gpu_bytes(const struct store_gpu *g)
{
    return g->layout.bytes;
}

int store_gpu_n_experts(const struct store_gpu *g, int layer)
{
    return g->n_experts[layer];
}

static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};

/* Where the matrices of an expert in that place are. */
static void *matrix_at(const struct store_gpu *g, int layer, int place, int i)
{
    int stack = g->model->layers[layer].w[stacks[i]];
    return (char *)g->memory + g->layout.weight_off[stack] + (uint64_t)place * g->model->weights[stack].t.stride[2];
}

bool store_gpu_find(const struct store_gpu *g, int layer, int expert, struct store_expert *out)
{
    int place = g->place_of[g->layer_first[layer] + expert];

    if (place < 0)
        return false;
    out->expert = expert;
    out->on_device = true;
    out->is_pinned = false;
    for (int i = 0; i < 3; i++)
        out->w[i] = matrix_at(g, layer, place, i);
    return true;
}

/* ---- moves ---- */

void store_gpu_begin(struct store_gpu *g, int layer, const int32_t *ids, int n)
{
    if (!g->moves)
        return;
    g->n_steps += layer <= g->last_layer; /* layers come in order: another step has begun */
    g->last_layer = layer;
    g->n_loans++;
    for (int i = 0; i < n; i++) {
        int key = g->layer_first[layer] + ids[i];
        g->wanted[key] = g->n_loans;
        g->heat[key] = evict_heat_of(g->heat[key], g->n_steps, HALF_STEPS);
    }
}

/* The place whose expert is wanted least and is not on loan; an empty one before all; -1: none. */
static int coldest_place(const struct store_gpu *g, int layer)
{
    int first = g->layer_first[layer], best = -1;

    for (int place = 0; place < g->n_experts[layer]; place++) {
        int expert = g->expert_at[first + place];
        if (expert < 0)
            return place;
        if (g->wanted[first + expert] != g->n_loans &&
            (best < 0 || g->heat[first + expert] < g->heat[first + g->expert_at[first + best]]))
            best = place;
    }
    return best;
}

void store_gpu_offer(struct store_gpu *g, int layer, int expert)
{
    if (!g->moves || g->move.phase != MOVE_NONE)
        return;
    int first = g->layer_first[layer], place = coldest_place(g, layer);
    if (place < 0)
        return;
    int cold = g->expert_at[first + place];
    if (!evict_is_warmer(g->heat[first + expert], cold < 0 ? -INFINITY : g->heat[first + cold], g->n_steps, HALF_STEPS))
        return;
    g->move.phase = MOVE_STAGING;
    g->move.layer = layer;
    g->move.expert = expert;
    g->move.place = place;
    g->move.matrix = 0;
    g->move.sent = g->move.staged = 0;
}

/* Nobody has that place any more, and somebody will. False: the last loan wants who is there, so that queued ops may read it. Those of
 * earlier loans do not: the host has waited for them before the last one began. */
static bool vacate(struct store_gpu *g)
{
    int first = g->layer_first[g->move.layer], cold = g->expert_at[first + g->move.place];

    if (cold >= 0 && g->wanted[first + cold] == g->n_loans)
        return false;
    if (cold >= 0)
        g->place_of[first + cold] = -1;
    g->expert_at[first + g->move.place] = -1;
    return true;
}

/* The place stays empty, if it was vacated. */
static void give_up(struct store_gpu *g)
{
    g->move.phase = g->move.staged ? MOVE_ENDING : MOVE_NONE;
    g->move.expert = -1;
}

static int send_piece(struct store_gpu *g, const struct store_expert *e)
{
    int layer = g->move.layer, i = g->move.matrix;
    uint64_t all = model_matrix_bytes(&g->model->weights[g->model->layers[layer].w[stacks[i]]]);
    uint64_t left = all - g->move.sent, bytes = left < PIECE_BYTES ? left : PIECE_BYTES;
    char *stage = g->pinned + g->move.staged;

    memcpy(stage, (const char *)e->w[i] + g->move.sent, bytes);
    int rc = g->dev->ops->bring(g->dev, (char *)matrix_at(g, layer, g->move.place, i) + g->move.sent, stage, bytes);
    if (rc) { /* nobody knows what lies there */
        g->move.phase = MOVE_NONE;
        return rc;
    }
    g->move_bytes += bytes;
    g->move.staged += bytes;
    g->move.sent += bytes;
    if (g->move.sent == all) {
        g->move.sent = 0;
        g->move.matrix++;
    }
    g->move.phase = g->move.matrix < 3 ? MOVE_STAGING : MOVE_ENDING;
    return 0;
}

/* What was under way is in its place, if it is. */
static int end_move(struct store_gpu *g)
{
    bool is_there;
    int rc = g->dev->ops->brought(g->dev, false, &is_there);

    if (rc) /* as in send_piece() */
        g->move.phase = MOVE_NONE;
    if (rc || !is_there)
        return rc;
    g->move.phase = MOVE_NONE;
    if (g->move.expert < 0)
        return 0;
    int first = g->layer_first[g->move.layer];
    g->place_of[first + g->move.expert] = g->move.place;
    g->expert_at[first + g->move.place] = g->move.expert;
    g->n_moves++;
    return 0;
}

bool store_gpu_is_moving(const struct store_gpu *g)
{
    return g->move.phase != MOVE_NONE;
}

bool store_gpu_wants(const struct store_gpu *g, int *layer, int *expert)
{
    *layer = g->move.layer;
    *expert = g->move.expert;
    return g->move.phase == MOVE_STAGING;
}

int store_gpu_move_on(struct store_gpu *g, const struct store_expert *e, bool *is_more)
{
    int rc = 0;

    if (g->move.phase == MOVE_STAGING) {
        if (e && (g->move.staged || vacate(g)))
            rc = send_piece(g, e);
        else
            give_up(g);
    } else if (g->move.phase == MOVE_ENDING) {
        rc = end_move(g);
    }
    *is_more = rc == 0 && g->move.phase == MOVE_STAGING;
    return rc;
}

void store_gpu_stats(const struct store_gpu *g, struct store_stats *out)
{
    out->n_moves = g->n_moves;
    out->move_bytes = g->move_bytes;
}
