/* Owns the places, their pinned twins, and who lies in which. Which experts are copied is moe_split.c's to say. */
#include "src/run/landing.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/plan/plan.h"
#include "src/run/store.h"

#include <string.h>

/* A place's fences: its copy begins, has ended; the ops that read it are done. */
enum { FENCE_FROM, FENCE_TO, FENCE_READ };

enum { N_TRIES = 6 };

struct place {
    int layer, expert; /* of what lies here or is on its way; expert -1: nothing */
    bool is_kept;      /* it must not be overwritten: not used yet */
    bool is_ahead;     /* sent before anybody asked for it, and not wanted so far */
    bool is_on_way;    /* its pinned twin may still be read */
    bool is_read;      /* ops that read it may still run */
    double mib;        /* of the copy */
};

struct landing {
    struct landing_args a;
    char *memory, *pinned; /* own: (n, room_bytes) on the device; alloc_host, the same */
    uint64_t room_bytes;
    struct place *places; /* own: (n) */
    int next;             /* where the search for a place begins: the oldest goes first */
    struct landing_stats stats;
};

static int fence_of(const struct landing *l, int place, int which)
{
    return l->a.first_fence + place * PLAN_LANDING_FENCES + which;
}

/* A copy of what lies in the first place's twin, for its time. */
static int try_copy(struct landing *l, uint64_t bytes)
{
    struct device *dev = l->a.dev;
    bool is_over;
    uint64_t ns;
    int rc = dev->ops->fence(dev, DEVICE_COPIES, fence_of(l, 0, FENCE_FROM));

    if (!rc)
        rc = dev->ops->carry(dev, l->memory, l->pinned, bytes);
    if (!rc)
        rc = dev->ops->fence(dev, DEVICE_COPIES, fence_of(l, 0, FENCE_TO));
    if (!rc)
        rc = dev->ops->passed(dev, fence_of(l, 0, FENCE_TO), true, &is_over);
    if (!rc)
        rc = dev->ops->span_ns(dev, fence_of(l, 0, FENCE_FROM), fence_of(l, 0, FENCE_TO), &ns);
    if (!rc && ns)
        offload_fit_add(l->a.copy, (double)bytes / (double)MIB, 0, (double)ns * 1e-9);
    return rc;
}

/* What a copy takes has to be known before the first one is made: small ones and large ones in turn. */
static int try_copies(struct landing *l)
{
    int rc = 0;

    memset(l->pinned, 0, l->room_bytes);
    for (int i = 0; i < N_TRIES && !rc; i++)
        rc = try_copy(l, i % 2 ? l->room_bytes : PLAN_ROOM_ALIGN);
    return rc;
}

int landing_open(const struct landing_args *args, struct landing **out)
{
    struct landing *l = mem_zalloc(1, sizeof *l, MEM_META);
    void *memory = NULL, *pinned = NULL;

    *out = NULL;
    if (!l)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *l);
    l->a = *args;
    l->room_bytes = plan_gpu_room_bytes(args->model);
    l->places = mem_zalloc((size_t)args->n, sizeof *l->places, MEM_META);
    int rc = l->places ? 0 : err(ERR_NOMEM, "places for %d experts", args->n);
    if (!rc)
        rc = args->dev->ops->alloc(args->dev, (uint64_t)args->n * l->room_bytes, &memory);
    l->memory = memory;
    if (!rc)
        rc = args->dev->ops->alloc_host(args->dev, (uint64_t)args->n * l->room_bytes, &pinned);
    l->pinned = pinned;
    if (!rc) {
        landing_forget(l);
        rc = try_copies(l);
    }
    if (rc) {
        landing_close(l);
        return rc;
    }
    *out = l;
    return 0;
}

void landing_close(struct landing *l)
{
    bool is_passed;

    if (!l)
        return;
    for (int i = 0; l->places && i < l->a.n; i++)
        if (l->places[i].is_on_way)
            l->a.dev->ops->passed(l->a.dev, fence_of(l, i, FENCE_TO), true, &is_passed);
    l->a.dev->ops->release_host(l->a.dev, l->pinned);
    l->a.dev->ops->release(l->a.dev, l->memory);
    mem_free(l->places);
    mem_free(l);
}

void landing_forget(struct landing *l)
{
    for (int i = 0; i < l->a.n; i++)
        l->places[i] = (struct place){.expert = -1, .is_on_way = l->places[i].is_on_way, .mib = l->places[i].mib};
}

void landing_begin(struct landing *l)
{
    for (int i = 0; i < l->a.n; i++)
        l->places[i].is_read = l->places[i].is_kept = false;
}

void landing_keep(struct landing *l, int place)
{
    l->places[place].is_kept = true;
}

int landing_find(const struct landing *l, int layer, int expert)
{
    for (int i = 0; i < l->a.n; i++)
        if (l->places[i].expert == expert && l->places[i].layer == layer)
            return i;
    return -1;
}

/* ---- copies ---- */

static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};

static uint64_t matrix_bytes(const struct landing *l, int layer, int i)
{
    return model_matrix_bytes(&l->a.model->weights[l->a.model->layers[layer].w[stacks[i]]]);
}

/* Where matrix i lies in a room; of 3: where the next would. */
static uint64_t matrix_off(const struct landing *l, int layer, int i)
{
    uint64_t off = 0;
    for (int k = 0; k < i; k++)
        off += size_up(matrix_bytes(l, layer, k), PLAN_ROOM_ALIGN);
    return off;
}

/* Is the copy into this place over? Then what it took is known. */
static int end_copy(struct landing *l, int place, bool wait)
{
    struct device *dev = l->a.dev;
    struct place *p = &l->places[place];
    bool is_over;
    uint64_t ns;
    int rc = dev->ops->passed(dev, fence_of(l, place, FENCE_TO), wait, &is_over);

    if (rc || !is_over)
        return rc;
    p->is_on_way = false;
    rc = dev->ops->span_ns(dev, fence_of(l, place, FENCE_FROM), fence_of(l, place, FENCE_TO), &ns);
    if (!rc && ns)
        offload_fit_add(l->a.copy, p->mib, 0, (double)ns * 1e-9);
    return rc;
}

/* The oldest place that may be overwritten and whose pinned twin is free; -1: none is. wait: for the first that is not kept. */
static int find_place(struct landing *l, bool wait, int *place)
{
    *place = -1;
    for (int i = 0; i < l->a.n; i++) {
        int at = (l->next + i) % l->a.n;
        struct place *p = &l->places[at];
        if (p->is_kept)
            continue;
        int rc = p->is_on_way ? end_copy(l, at, wait) : 0;
        if (rc)
            return rc;
        if (p->is_on_way)
            continue;
        *place = at;
        l->next = (at + 1) % l->a.n;
        return 0;
    }
    return 0;
}

static void fill_twin(struct landing *l, int place, int layer, const struct store_expert *e)
{
    char *to = l->pinned + (uint64_t)place * l->room_bytes;
    uint64_t from_ns = l->a.clock();

    for (int i = 0; i < 3; i++)
        memcpy(to + matrix_off(l, layer, i), e->w[i], matrix_bytes(l, layer, i));
    offload_fit_add(l->a.stage, l->places[place].mib, 0, (double)(l->a.clock() - from_ns) * 1e-9);
}

/* From the twin as one piece, or each matrix from where it lies. */
static int carry(struct landing *l, int place, int layer, const struct store_expert *e)
{
    struct device *dev = l->a.dev;
    uint64_t off = (uint64_t)place * l->room_bytes;
    int rc = 0;

    if (!e->is_pinned)
        return dev->ops->carry(dev, l->memory + off, l->pinned + off,
                               matrix_off(l, layer, 2) + matrix_bytes(l, layer, 2));
    for (int i = 0; i < 3 && !rc; i++)
        rc = dev->ops->carry(dev, l->memory + off + matrix_off(l, layer, i), e->w[i], matrix_bytes(l, layer, i));
    return rc;
}

static int queue_copy(struct landing *l, int place, int layer, const struct store_expert *e)
{
    struct device *dev = l->a.dev;
    int rc = 0;

    if (l->places[place].is_read)
        rc = dev->ops->follow(dev, DEVICE_COPIES, fence_of(l, place, FENCE_READ));
    if (!rc)
        rc = dev->ops->fence(dev, DEVICE_COPIES, fence_of(l, place, FENCE_FROM));
    if (!rc)
        rc = carry(l, place, layer, e);
    return rc ? rc : dev->ops->fence(dev, DEVICE_COPIES, fence_of(l, place, FENCE_TO));
}

int landing_send(struct landing *l, int layer, const struct store_expert *e, bool is_ahead, bool wait, int *place)
{
    int rc = find_place(l, wait, place);

    if (rc || *place < 0)
        return rc;
    struct place *p = &l->places[*place];
    uint64_t bytes = model_expert_bytes(l->a.model, layer);
    p->expert = -1;
    p->mib = (double)bytes / (double)MIB;
    if (!e->is_pinned)
        fill_twin(l, *place, layer, e);
    rc = queue_copy(l, *place, layer, e);
    if (rc)
        return rc;
    *p = (struct place){
        .layer = layer, .expert = e->expert, .is_kept = true, .is_ahead = is_ahead, .is_on_way = true, .mib = p->mib};
    l->stats.n_copies++;
    l->stats.n_ahead += is_ahead;
    l->stats.n_direct += e->is_pinned;
    l->stats.bytes += bytes;
    return 0;
}

int landing_use(struct landing *l, int place, struct store_expert *out)
{
    struct place *p = &l->places[place];

    out->expert = p->expert;
    out->on_device = true;
    for (int i = 0; i < 3; i++)
        out->w[i] = l->memory + (uint64_t)place * l->room_bytes + matrix_off(l, p->layer, i);
    l->stats.n_ahead_found += p->is_ahead;
    p->is_ahead = false;
    return l->a.dev->ops->follow(l->a.dev, DEVICE_OPS, fence_of(l, place, FENCE_TO));
}

int landing_used(struct landing *l, int place)
{
    struct place *p = &l->places[place];

    p->is_kept = false;
    p->is_read = true;
    return l->a.dev->ops->fence(l->a.dev, DEVICE_OPS, fence_of(l, place, FENCE_READ));
}

void landing_stats(const struct landing *l, struct landing_stats *out)
{
    *out = l->stats;
}
