/* Owns the device's memory for weights and says who lies where in it. A layer's places are those of its stacks' first matrices, all
 * equally large, so that any expert of the layer may lie in any of them; at open they are filled with the first experts. */
#include "src/run/store_gpu.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/layout.h"
#include "src/run/store_load.h"

#include <inttypes.h>

struct store_gpu {
    const struct model *model; /* view */
    struct device *dev;        /* view */
    void *memory;              /* own: (layout.bytes) on the device */
    struct layout layout;
    int *n_experts;   /* own: (n_layer) places */
    int *layer_first; /* own: (n_layer) index into place_of */
    int *place_of;    /* own: (experts of all layers) -1: none */
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
    size_t n_layer = (size_t)m->hp.n_layer;

    g->n_experts = mem_zalloc(n_layer, sizeof *g->n_experts, MEM_META);
    g->layer_first = mem_zalloc(n_layer, sizeof *g->layer_first, MEM_META);
    g->place_of = mem_zalloc(plan->gpu.n_all_experts, sizeof *g->place_of, MEM_META);
    if (!g->n_experts || !g->layer_first || !g->place_of)
        return err(ERR_NOMEM, "places of %" PRIu32 " experts", plan->gpu.n_all_experts);
    layout_share(m, plan->gpu.n_experts, g->n_experts);
    int first = 0;
    for (int layer = 0; layer < m->hp.n_layer; layer++) {
        g->layer_first[layer] = first;
        for (int expert = 0; expert < n_stacked(m, layer); expert++)
            g->place_of[first++] = expert < g->n_experts[layer] ? expert : -1;
    }
    return layout_init_part(m, g->n_experts, &g->layout);
}

static int load(struct store_gpu *g, const struct store_gpu_args *a, uint64_t *load_bytes)
{
    void *stage = mem_map(PLAN_STAGE_BYTES, MEM_STAGE);
    int rc = stage ? g->dev->ops->alloc(g->dev, g->layout.bytes, &g->memory)
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

int store_gpu_open(const struct store_gpu_args *a, uint64_t *load_bytes, struct store_gpu **out)
{
    struct store_gpu *g = mem_zalloc(1, sizeof *g, MEM_META);

    *out = NULL;
    if (!g)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *g);
    g->model = a->args->model;
    g->dev = a->args->device;
    int rc = place(g, a->args->plan);
    if (!rc)
        rc = load(g, a, load_bytes);
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
    g->dev->ops->release(g->dev, g->memory);
    layout_done(&g->layout);
    mem_free(g->place_of);
    mem_free(g->layer_first);
    mem_free(g->n_experts);
    mem_free(g);
}

const void *store_gpu_weight(const struct store_gpu *g, int weight)
{
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

bool store_gpu_find(const struct store_gpu *g, int layer, int expert, struct store_expert *out)
{
    static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};
    int place = g->place_of[g->layer_first[layer] + expert];

    if (place < 0)
        return false;
    out->expert = expert;
    out->on_device = true;
    for (int i = 0; i < 3; i++) {
        int stack = g->model->layers[layer].w[stacks[i]];
        out->w[i] = (const char *)store_gpu_weight(g, stack) + (uint64_t)place * g->model->weights[stack].t.stride[2];
    }
    return true;
}
