/* Owns the choice for each layer, and what is known of costs. */
#include "src/run/moe_split.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/run/landing.h"
#include "src/run/store.h"

#include <string.h>

_Static_assert((int)MOE_SPLIT_N_MARKS == (int)PLAN_LAYER_FENCES, "marks are the device's first fences");

static int open_landing(struct moe_split *s)
{
    if (!s->gpu.n_landing || s->gpu.copies == PLAN_COPIES_NEVER)
        return 0;
    return landing_open(&(struct landing_args){.model = s->a.model,
                                               .dev = s->a.dev,
                                               .n = (int)s->gpu.n_landing,
                                               .first_fence = PLAN_LAYER_FENCES,
                                               .clock = s->a.clock,
                                               .copy = &s->copy,
                                               .stage = &s->stage},
                        &s->landing);
}

int moe_split_init(struct moe_split *s, const struct moe_split_args *a)
{
    size_t n = (size_t)a->model->hp.n_expert;

    *s = (struct moe_split){.a = *a, .gpu = a->plan->gpu};
    offload_fit_init(&s->cpu, &a->rates->cpu);
    offload_fit_init(&s->gpu_fit, &a->rates->gpu);
    offload_fit_init(&s->copy, &a->rates->copy);
    offload_fit_init(&s->stage, &a->rates->stage);
    offload_fit_init(&s->read, &a->rates->read);
    s->lend = mem_zalloc(n, sizeof *s->lend, MEM_META);
    s->landed = mem_zalloc(n, sizeof *s->landed, MEM_META);
    s->landed_at = mem_zalloc(n, sizeof *s->landed_at, MEM_META);
    s->miss_ids = mem_zalloc(n, sizeof *s->miss_ids, MEM_META);
    s->misses = mem_zalloc(n, sizeof *s->misses, MEM_META);
    s->order = mem_zalloc(n, sizeof *s->order, MEM_META);
    s->is_copied = mem_zalloc(n, sizeof *s->is_copied, MEM_META);
    bool has_room = s->lend && s->landed && s->landed_at && s->miss_ids && s->misses && s->order && s->is_copied;
    int rc = has_room ? open_landing(s) : err(ERR_NOMEM, "sharing %zu experts", n);
    if (rc)
        moe_split_done(s);
    return rc;
}

void moe_split_done(struct moe_split *s)
{
    landing_close(s->landing);
    mem_free(s->is_copied);
    mem_free(s->order);
    mem_free(s->misses);
    mem_free(s->miss_ids);
    mem_free(s->landed_at);
    mem_free(s->landed);
    mem_free(s->lend);
    memset(s, 0, sizeof *s);
}

/* ---- measuring ---- */

int moe_split_mark(struct moe_split *s, enum moe_split_mark mark)
{
    return s->a.dev->ops->fence(s->a.dev, DEVICE_OPS, (int)mark);
}

int moe_split_is_routed(struct moe_split *s, bool *is_routed)
{
    return s->a.dev->ops->passed(s->a.dev, MOE_SPLIT_ROUTED, false, is_routed);
}

void moe_split_saw_hits(struct moe_split *s, double mib, double mib_rows)
{
    s->seen.has_hits = true;
    s->seen.hits_mib = mib;
    s->seen.hits_rows = mib_rows;
}

void moe_split_saw_copied(struct moe_split *s, double mib, double mib_rows)
{
    s->seen.has_copied = true;
    s->seen.copied_mib = mib;
    s->seen.copied_rows = mib_rows;
}

void moe_split_saw_cpu(struct moe_split *s, double mib, double mib_rows, uint64_t ns)
{
    offload_fit_add(&s->cpu, mib, mib_rows, (double)ns * 1e-9);
}

static int span(struct moe_split *s, enum moe_split_mark from, enum moe_split_mark to, double *seconds)
{
    uint64_t ns;
    int rc = s->a.dev->ops->span_ns(s->a.dev, (int)from, (int)to, &ns);
    *seconds = (double)ns * 1e-9;
    return rc;
}

static int settle_gpu(struct moe_split *s)
{
    double hits_s = 0, copied_s = 0, layer_s = 0;
    int rc = s->seen.has_hits ? span(s, MOE_SPLIT_HITS_FROM, MOE_SPLIT_HITS_TO, &hits_s) : 0;

    if (!rc && s->seen.has_copied)
        rc = span(s, MOE_SPLIT_COPIED_FROM, MOE_SPLIT_COPIED_TO, &copied_s);
    if (!rc)
        rc = span(s, MOE_SPLIT_LAYER_FROM, MOE_SPLIT_LAYER_TO, &layer_s);
    if (hits_s > 0)
        offload_fit_add(&s->gpu_fit, s->seen.hits_mib, s->seen.hits_rows, hits_s);
    if (copied_s > 0)
        offload_fit_add(&s->gpu_fit, s->seen.copied_mib, s->seen.copied_rows, copied_s);
    if (layer_s > 0) {
        s->stats.predicted_s += s->seen.predicted_s;
        s->stats.measured_s += layer_s;
    }
    return rc;
}

static void settle_disk(struct moe_split *s)
{
    struct store_stats now;

    store_stats(s->a.store, &now);
    uint64_t bytes = now.disk_bytes - s->disk_bytes, ns = now.disk_busy_ns - s->disk_ns;
    if (bytes && ns)
        offload_fit_add(&s->read, (double)bytes / (double)MIB, 0, (double)ns * 1e-9);
    s->disk_bytes = now.disk_bytes;
    s->disk_ns = now.disk_busy_ns;
}

int moe_split_settle(struct moe_split *s)
{
    if (!s->seen.is_open)
        return 0;
    s->seen.is_open = false;
    settle_disk(s);
    return settle_gpu(s);
}

void moe_split_abandon(struct moe_split *s)
{
    s->seen.is_open = false;
    if (s->landing) /* copies that no op waits for may still read the host's memory, or have failed */
        landing_forget(s->landing);
}

/* ---- the choice ---- */

static struct offload_rates rates_now(const struct moe_split *s)
{
    return (struct offload_rates){.cpu = offload_fit_cost(&s->cpu),
                                  .gpu = offload_fit_cost(&s->gpu_fit),
                                  .copy = offload_fit_cost(&s->copy),
                                  .stage = offload_fit_cost(&s->stage),
                                  .read = offload_fit_cost(&s->read)};
}

static bool can_copy(const struct moe_split *s)
{
    return s->landing && !s->is_off;
}

/* Who is where: s->lend, landed, misses; what the GPU will compute in any case. */
static int sort_out(struct moe_split *s, const struct moe_split_layer *layer, struct offload_layer *out)
{
    double mib = (double)model_expert_bytes(s->a.model, layer->layer) / (double)MIB;
    int n_misses = 0;
    struct store_expert e;

    s->n_lend = s->n_landed = s->n_on_device = 0;
    for (int i = 0; i < layer->n; i++) {
        int32_t id = layer->ids[i];
        int place = can_copy(s) ? landing_find(s->landing, layer->layer, id) : -1;
        enum store_place where = store_where(s->a.store, layer->layer, id);
        s->is_copied[id] = false;
        if (where != STORE_ON_DEVICE && place >= 0) {
            landing_keep(s->landing, place);
            s->landed[s->n_landed] = id;
            s->landed_at[s->n_landed++] = place;
        } else {
            s->lend[s->n_lend++] = id;
        }
        if (where == STORE_ON_DEVICE || place >= 0) {
            s->n_on_device += where == STORE_ON_DEVICE;
            out->hit_mib += mib;
            out->hit_rows += mib * layer->n_rows[id];
            continue;
        }
        s->miss_ids[n_misses] = id;
        bool is_there = store_peek(s->a.store, layer->layer, id, &e);
        s->misses[n_misses++] = (struct offload_expert){.mib = mib,
                                                        .rows = layer->n_rows[id],
                                                        .on_disk = where == STORE_ON_DISK,
                                                        .is_pinned = is_there && e.is_pinned};
        s->stats.n_read += where == STORE_ON_DISK;
    }
    return n_misses;
}

int moe_split_choose(struct moe_split *s, const struct moe_split_layer *layer)
{
    struct offload_layer l = {.row_mib = layer->row_mib, .misses = s->misses};
    struct offload_rates rates = rates_now(s);
    struct offload_choice choice;

    if (s->landing)
        landing_begin(s->landing);
    l.n = sort_out(s, layer, &l);
    l.most_copies = can_copy(s) ? l.n : 0;
    offload_order(&l, s->order);
    if (s->gpu.copies == PLAN_COPIES_ALWAYS)
        offload_walk(&rates, &l, s->order, l.most_copies, &choice);
    else
        offload_choose(&rates, &l, s->order, &choice);
    s->n_copies = choice.n_copies;
    for (int i = 0; i < s->n_copies; i++)
        s->is_copied[s->miss_ids[s->order[i]]] = true;
    s->stats.n_gpu += (uint64_t)(layer->n - l.n);
    s->stats.n_copied += (uint64_t)s->n_copies;
    s->stats.n_cpu += (uint64_t)(l.n - s->n_copies);
    memset(&s->seen, 0, sizeof s->seen);
    s->seen.predicted_s = choice.s;
    s->seen.is_open = true;
    return moe_split_mark(s, MOE_SPLIT_LAYER_FROM);
}

/* As many as the layer before found worth it. */
static int most_ahead(const struct moe_split *s)
{
    return can_copy(s) ? s->n_copies + s->n_landed : 0;
}

bool moe_split_sends_ahead(const struct moe_split *s)
{
    return most_ahead(s) > 0;
}

int moe_split_send_ahead(struct moe_split *s, int layer, const int32_t *likely, int n)
{
    struct store_expert e;
    bool is_routed = false;
    int rc = 0, n_left = most_ahead(s), place = 0;

    for (int i = 0; i < n && n_left > 0 && place >= 0 && !rc; i++) {
        if (landing_find(s->landing, layer, likely[i]) >= 0 ||
            store_where(s->a.store, layer, likely[i]) == STORE_ON_DEVICE ||
            !store_peek(s->a.store, layer, likely[i], &e))
            continue;
        rc = moe_split_is_routed(s, &is_routed);
        if (rc || is_routed)
            break;
        e.is_pinned = false; /* no loan holds it */
        rc = landing_send(s->landing, layer, &e, true, false, &place);
        n_left--;
    }
    return rc;
}
