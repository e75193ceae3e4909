/* Owns the guess and room for it. What is done with it is the store's business. */
#include "src/run/ahead.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/layout.h"
#include "src/plan/plan.h"
#include "src/run/store.h"

#include <math.h>
#include <string.h>

static bool is_floats(const struct model *m, int w)
{
    return w >= 0 && m->weights[w].t.type == QUANT_F32;
}

/* A layer's weight as float32 in the host's memory, copied to *room if it is not there already; *out NULL: none, or of another type. */
static int take_floats(const struct ahead *a, int w, float **room, const float **out)
{
    *out = NULL;
    if (!is_floats(a->model, w))
        return 0;
    if (!a->copies) {
        *out = store_host_weight(a->store, w);
        return 0;
    }
    float *copy = *room;
    *room += layout_weight_bytes(&a->model->weights[w]) / sizeof *copy;
    *out = copy;
    return store_copy_weight(a->store, w, copy);
}

static int take_routers(struct ahead *a)
{
    float *room = a->copies;
    int rc = 0;

    for (int layer = a->span.first; layer < a->span.end && !rc; layer++) {
        const int *w = a->model->layers[layer].w;
        if (w[ROLE_ROUTER] < 0)
            continue;
        rc = take_floats(a, w[ROLE_ROUTER], &room, &a->router[layer]);
        if (!rc)
            rc = take_floats(a, w[ROLE_ROUTER_BIAS], &room, &a->bias[layer]);
        if (!rc)
            rc = take_floats(a, model_router_norm(a->model, layer), &room, &a->norm[layer]);
    }
    return rc;
}

int ahead_init(const struct model *m, struct model_span span, const struct store *store, struct device *cpu,
               int n_likely, struct ahead *out)
{
    const struct hparams *hp = &m->hp;
    size_t n_layer = (size_t)hp->n_layer;
    bool is_copied = store_has_device(store) && span.end == hp->n_layer; /* the layers before are the host's */

    *out = (struct ahead){.model = m, .store = store, .span = span, .dev = cpu, .n_likely = n_likely};
    if (!hp->n_expert)
        return 0;
    out->router = mem_zalloc(n_layer, sizeof *out->router, MEM_META);
    out->bias = mem_zalloc(n_layer, sizeof *out->bias, MEM_META);
    out->norm = mem_zalloc(n_layer, sizeof *out->norm, MEM_META);
    out->copies = is_copied ? mem_alloc(plan_ahead_bytes(m, span.first), MEM_WEIGHTS) : NULL;
    out->x = mem_zalloc((size_t)hp->n_embd * AHEAD_MAX_ROWS, sizeof *out->x, MEM_META);
    out->kept = mem_zalloc((size_t)hp->n_embd * AHEAD_MAX_ROWS, sizeof *out->kept, MEM_META);
    out->score = mem_zalloc((size_t)hp->n_expert * AHEAD_MAX_ROWS, sizeof *out->score, MEM_META);
    int n_ids = hp->n_expert_used * AHEAD_MAX_ROWS;
    out->ids = mem_zalloc((size_t)(n_ids > hp->n_expert ? n_ids : hp->n_expert), sizeof *out->ids, MEM_META);
    bool has_room = out->router && out->bias && out->norm && (out->copies || !is_copied) && out->x && out->kept &&
                    out->score && out->ids;
    int rc = has_room ? take_routers(out) : err(ERR_NOMEM, "room to look ahead for %d experts", hp->n_expert);
    if (rc)
        ahead_done(out);
    return rc;
}

void ahead_done(struct ahead *a)
{
    mem_free(a->ids);
    mem_free(a->score);
    mem_free(a->kept);
    mem_free(a->x);
    mem_free(a->copies);
    mem_free(a->norm);
    mem_free(a->bias);
    mem_free(a->router);
    *a = (struct ahead){.model = NULL};
}

/* Move the likeliest of a row's experts into ids, behind the n that are there; returns how many there are then. */
static int take_best(struct ahead *a, float *score, int n)
{
    for (int rank = 0; rank < a->n_likely; rank++) {
        int best = 0, i = 0;
        for (int e = 1; e < a->model->hp.n_expert; e++) {
            if (score[e] > score[best])
                best = e;
        }
        score[best] = -INFINITY;
        while (i < n && a->ids[i] != best)
            i++;
        if (i == n)
            a->ids[n++] = best;
    }
    return n;
}

/* Three of four: after a chunk of a prompt that wanted so many, few of the others' reads are in vain. */
static bool is_nearly_all(const struct ahead *a, int n_ids)
{
    return n_ids * 4 >= a->model->hp.n_expert * 3;
}

static int take_all(struct ahead *a)
{
    for (int e = 0; e < a->model->hp.n_expert; e++)
        a->ids[e] = e;
    return a->model->hp.n_expert;
}

/* The rows as if the next layer's norm had scaled them. */
static void take_rows(struct ahead *a, const struct ahead_from *from)
{
    const int n_embd = a->model->hp.n_embd;
    const float *norm = a->norm[from->layer], *next_norm = a->norm[from->layer + 1];

    for (int row = 0; row < from->n_rows; row++) {
        float *x = a->x + (size_t)row * (size_t)n_embd;
        memcpy(x, tensor_row(from->x, row), (size_t)n_embd * sizeof *x);
        for (int i = 0; norm && next_norm && i < n_embd; i++)
            x[i] *= norm[i] != 0 ? next_norm[i] / norm[i] : 0;
    }
}

/* The likelier ones of the next layer by what its router says of these rows. */
static int ask_router(struct ahead *a, const struct ahead_from *from)
{
    const struct hparams *hp = &a->model->hp;
    const float *router = a->router[from->layer + 1];
    int n = 0;

    if (!a->n_likely || !router || from->x->type != QUANT_F32 ||
        a->model->layers[from->layer + 1].w[ROLE_ROUTER_SELECT_BIAS] >= 0)
        return 0;
    take_rows(a, from);
    const struct tensor x = tensor_make(QUANT_F32, hp->n_embd, from->n_rows, 1, a->x);
    const struct tensor w = tensor_make(QUANT_F32, hp->n_embd, hp->n_expert, 1, (void *)(uintptr_t)router);
    const struct tensor y = tensor_make(QUANT_F32, hp->n_expert, from->n_rows, 1, a->score);
    const float *bias = a->bias[from->layer + 1];
    const struct tensor b = tensor_make(QUANT_F32, hp->n_expert, 1, 1, (void *)(uintptr_t)bias);
    const struct op ops[] = {
        {.kind = OP_MATMUL, .layer = from->layer, .n_w = 1, .dst = {&y}, .src = {&x}, .w = {&w}},
        {.kind = OP_ADD_BIAS, .layer = from->layer, .n_w = 1, .dst = {&y}, .src = {&y}, .w = {&b}},
    };
    int rc = a->dev->ops->run(a->dev, ops, bias ? 2 : 1, &(struct rows){.n = from->n_rows});
    if (rc < 0)
        return rc;
    for (int row = 0; row < from->n_rows; row++)
        n = take_best(a, tensor_row(&y, row), n);
    return n;
}

bool ahead_asks_router(const struct ahead_from *from)
{
    return from->n_rows <= AHEAD_MAX_ROWS;
}

int ahead_guess(struct ahead *a, const struct ahead_from *from, const int32_t **ids)
{
    *ids = a->ids;
    if (from->layer + 1 >= a->span.end)
        return 0;
    if (ahead_asks_router(from))
        return ask_router(a, from);
    if (is_nearly_all(a, from->n_ids))
        return take_all(a);
    bool counts = from->n_rows >= AHEAD_PROMPT_ROWS && !a->copies; /* a device's share of the loans is not counted */
    return counts ? store_favourites(a->store, from->layer + 1, from->n_ids, a->ids) : 0;
}

void ahead_keep(struct ahead *a, struct ahead_from *from, struct tensor *rows)
{
    *rows = tensor_make(QUANT_F32, a->model->hp.n_embd, from->n_rows, 1, a->kept);
    for (int row = 0; row < from->n_rows; row++)
        memcpy(tensor_row(rows, row), tensor_row(from->x, row), (size_t)a->model->hp.n_embd * sizeof *a->kept);
    from->x = rows;
}
