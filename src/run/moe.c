/* The MoE op's host side. Grouping by expert means each expert's weights are read once a step, whatever the number of rows. With a
 * device that holds some of the experts, both compute at once and meet before the combine. */
#include "src/run/moe.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "src/base/size.h"
#include "src/run/landing.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/program.h"
#include "src/run/store.h"
#include "src/run/trace.h"

static bool has_memory(const struct moe *moe)
{
    return moe->dev->ops->alloc != NULL;
}

/* Where scales of a layer's experts are (3, n_expert). */
static float *scales_of(const struct moe *moe, int layer)
{
    return moe->scales + (size_t)layer * 3 * (size_t)moe->n_expert;
}

/* The host asks for them in every step, so it keeps them. */
static int take_scales(struct moe *moe, const struct program *p)
{
    const struct model *m = moe->model;
    int rc = 0;

    for (int i = 0; i < p->n_ops; i++) {
        const struct op *op = &p->ops[i];
        for (int j = 0; op->kind == OP_MOE && j < 3 && !rc; j++) {
            if (!op->w[3 + j])
                continue;
            size_t n = (size_t)m->hp.n_layer * 3 * (size_t)moe->n_expert;
            if (!moe->scales && !(moe->scales = mem_zalloc(n, sizeof *moe->scales, MEM_META)))
                return err(ERR_NOMEM, "scales of %d layers' experts", m->hp.n_layer);
            rc = store_copy_weight(moe->store, (int)(op->w[3 + j] - p->weights),
                                   scales_of(moe, op->layer) + (size_t)j * (size_t)moe->n_expert);
        }
    }
    return rc;
}

/* Where biases of a layer's products lie for the host (3). */
static const float **host_bias_of(const struct moe *moe, int layer)
{
    return moe->host_bias + (size_t)layer * 3;
}

/* The host's own of what lies in the device's memory, for the experts that it computes. */
static int take_biases(struct moe *moe, const struct program *p)
{
    const uint64_t bytes = moe->host ? plan_bias_bytes(moe->model, p->span.first) : 0;
    int rc = 0;

    if (!bytes)
        return 0;
    moe->host_bias = mem_zalloc((size_t)moe->model->hp.n_layer * 3, sizeof *moe->host_bias, MEM_META);
    moe->biases = mem_alloc(bytes, MEM_WEIGHTS);
    if (!moe->host_bias || !moe->biases)
        return err(ERR_NOMEM, "biases of experts: %" PRIu64 " bytes", bytes);
    float *room = moe->biases;
    for (int i = 0; i < p->n_ops; i++) {
        const struct op *op = &p->ops[i];
        for (int j = 0; op->kind == OP_MOE && j < 3 && !rc; j++) {
            if (!op->w[6 + j])
                continue;
            host_bias_of(moe, op->layer)[j] = room;
            rc = store_copy_weight(moe->store, (int)(op->w[6 + j] - p->weights), room);
            room += tensor_bytes(op->w[6 + j]) / sizeof *room;
        }
    }
    return rc;
}

static int take_host_memory(struct moe *moe, const struct program *p)
{
    struct program_host bytes;
    void *chosen = NULL, *x = NULL, *y = NULL;
    int rc = 0;

    program_host_bytes(p, &bytes);
    if (has_memory(moe))
        rc = moe->dev->ops->alloc_host(moe->dev, bytes.ids_bytes, &chosen);
    if (rc == 0 && moe->host)
        rc = moe->dev->ops->alloc_host(moe->dev, bytes.x_bytes, &x);
    if (rc == 0 && moe->host)
        rc = moe->dev->ops->alloc_host(moe->dev, bytes.y_bytes, &y);
    moe->chosen = chosen;
    moe->x = x;
    moe->y = y;
    return rc;
}

int moe_init(struct moe *moe, const struct moe_args *a)
{
    const struct model *m = a->program->model;
    const int n_expert = m->hp.n_expert, k = m->hp.n_expert_used;
    *moe = (struct moe){.model = m, .store = a->store, .dev = a->dev, .host = a->host, .trace = a->trace};
    if (n_expert == 0)
        return 0;
    const size_t n = (size_t)n_expert, n_slots = (size_t)a->program->n_rows * (size_t)k;
    moe->n_expert = n_expert;
    moe->k = k;
    moe->look_ahead = a->look_ahead;
    int rc = moe->look_ahead
                 ? ahead_init(m, a->program->span, a->store, a->host ? a->host : a->dev, a->n_ahead, &moe->ahead)
                 : 0;
    moe->n_slots = mem_zalloc(n, sizeof *moe->n_slots, MEM_META);
    moe->first = mem_zalloc(n, sizeof *moe->first, MEM_META);
    moe->ids = mem_zalloc(n, sizeof *moe->ids, MEM_META);
    moe->slot = mem_zalloc(n_slots, sizeof *moe->slot, MEM_META);
    moe->is_host = mem_zalloc(n, sizeof *moe->is_host, MEM_META);
    moe->groups = mem_zalloc(n, sizeof *moe->groups, MEM_META);
    moe->given = mem_zalloc(n, sizeof *moe->given, MEM_META);
    moe->up = mem_zalloc(n, sizeof *moe->up, MEM_META);
    moe->there = mem_zalloc(n, sizeof *moe->there, MEM_META);
    moe->places = mem_zalloc(n, sizeof *moe->places, MEM_META);
    moe->clock = a->clock;
    moe->likely_layer = -1;
    if (rc == 0 && !(moe->n_slots && moe->first && moe->ids && moe->slot && moe->is_host && moe->groups && moe->given &&
                     moe->up && moe->there && moe->places))
        rc = err(ERR_NOMEM, "grouping %zu rows by %d experts", n_slots, n_expert);
    if (rc == 0)
        rc = take_scales(moe, a->program);
    if (rc == 0)
        rc = take_biases(moe, a->program);
    if (rc == 0)
        rc = take_host_memory(moe, a->program);
    if (rc == 0 && moe->host)
        rc = moe_split_init(
            &moe->split,
            &(struct moe_split_args){
                .model = m, .store = a->store, .dev = a->dev, .plan = a->plan, .rates = a->rates, .clock = a->clock});
    if (rc < 0)
        moe_done(moe);
    return rc;
}

void moe_done(struct moe *moe)
{
    if (moe->dev && has_memory(moe)) {
        moe->dev->ops->release_host(moe->dev, moe->y);
        moe->dev->ops->release_host(moe->dev, moe->x);
        moe->dev->ops->release_host(moe->dev, moe->chosen);
    }
    moe_split_done(&moe->split);
    ahead_done(&moe->ahead);
    mem_free(moe->biases);
    mem_free(moe->host_bias);
    mem_free(moe->scales);
    mem_free(moe->places);
    mem_free(moe->there);
    mem_free(moe->up);
    mem_free(moe->given);
    mem_free(moe->groups);
    mem_free(moe->is_host);
    mem_free(moe->slot);
    mem_free(moe->ids);
    mem_free(moe->first);
    mem_free(moe->n_slots);
    memset(moe, 0, sizeof *moe);
}

/* Counting sort of the slots by expert; returns how many experts are used, or an error. */
static int group(struct moe *moe, const struct tensor *ids, int n_rows, int layer)
{
    memset(moe->n_slots, 0, (size_t)moe->n_expert * sizeof *moe->n_slots);
    for (int row = 0; row < n_rows; row++) {
        const int32_t *id = tensor_row(ids, row);
        for (int rank = 0; rank < moe->k; rank++) {
            if (id[rank] < 0 || id[rank] >= moe->n_expert)
                return err(ERR_FORMAT, "layer %d: the router chose expert %d of %d", layer, id[rank], moe->n_expert);
            moe->n_slots[id[rank]]++;
        }
    }
    int n_ids = 0, n = 0;
    for (int expert = 0; expert < moe->n_expert; expert++) {
        moe->first[expert] = n;
        n += moe->n_slots[expert];
        if (moe->n_slots[expert] > 0)
            moe->ids[n_ids++] = expert;
        moe->n_slots[expert] = 0;
    }
    for (int row = 0; row < n_rows; row++) {
        const int32_t *id = tensor_row(ids, row);
        for (int rank = 0; rank < moe->k; rank++)
            moe->slot[moe->first[id[rank]] + moe->n_slots[id[rank]]++] = row * moe->k + rank;
    }
    return n_ids;
}

/* What is added to product j of an expert, where it is computed; NULL: nothing. */
static const float *bias_of(const struct moe *moe, const struct op *op, int j, int expert, bool by_host)
{
    const struct tensor *t = op->w[6 + j];
    const float *all = !t ? NULL : by_host ? host_bias_of(moe, op->layer)[j] : t->data;
    return all ? all + t->ne[0] * expert : NULL;
}

/* Experts (n) as groups of rows. */
static void fill_groups(struct moe *moe, const struct op *op, const struct store_expert *given, int n, bool by_host)
{
    for (int i = 0; i < n; i++) {
        const struct store_expert *e = &given[i];
        struct op_expert *group = &moe->groups[i];
        group->first = moe->first[e->expert];
        group->n = moe->n_slots[e->expert];
        for (int j = 0; j < 3; j++) {
            const float *scales = op->w[3 + j] ? scales_of(moe, op->layer) + (size_t)j * (size_t)moe->n_expert : NULL;
            group->w[j] = e->w[j];
            group->scale[j] = scales ? scales[e->expert] : 1;
            group->bias[j] = bias_of(moe, op, j, e->expert, by_host);
        }
    }
}

/* Compute experts (n), on the device whose memory they are in. */
static int compute(struct moe *moe, const struct op *op, const struct rows *rows, const struct store_expert *given,
                   int n)
{
    bool by_host = moe->host && !given[0].on_device;
    struct device *dev = by_host ? moe->host : moe->dev;
    struct tensor x = *op->src[0], ids = *op->src[1], y = *op->dst[0];
    struct op step = *op;

    fill_groups(moe, op, given, n, by_host);
    for (int i = 0; i < n; i++)
        moe->is_host[given[i].expert] = by_host;
    if (by_host) {
        x.data = moe->x;
        ids.data = moe->chosen;
        y.data = moe->y;
        step.src[0] = &x;
        step.src[1] = &ids;
        step.dst[0] = &y;
    }
    step.p.moe.experts = moe->groups;
    step.p.moe.n_experts = n;
    step.p.moe.slot = moe->slot;
    if (!trace_has_timeline(moe->trace))
        return dev->ops->run(dev, &step, 1, rows);
    struct trace_event event = {.what = TRACE_EXPERTS, .layer = op->layer, .id = n, .begin_ns = clock_ns()};
    int rc = dev->ops->run(dev, &step, 1, rows);
    event.end_ns = clock_ns();
    trace_add(moe->trace, &event);
    return rc;
}

static bool is_split_layer(const struct moe *moe, int layer)
{
    return moe->host && !store_is_on_device(moe->store, layer);
}

/* Until the router has chosen, stage what moves to the device. */
static int move_on(struct moe *moe, int layer)
{
    struct trace_event event = {.what = TRACE_MOVE, .layer = layer};
    bool is_routed = false, is_more = true;
    int rc = 0;

    event.begin_ns = trace_has_timeline(moe->trace) ? clock_ns() : 0;
    for (; rc == 0 && is_more; event.id++) {
        rc = moe_split_is_routed(&moe->split, &is_routed);
        if (rc || is_routed)
            break;
        rc = store_move_on(moe->store, &is_more);
    }
    event.end_ns = trace_has_timeline(moe->trace) ? clock_ns() : 0;
    if (event.id > 0)
        trace_add(moe->trace, &event);
    return rc;
}

/* What was put off until now, unless there is no time for it now either. */
static int guess_late(struct moe *moe)
{
    bool is_routed = true;
    int rc = moe_split_is_routed(&moe->split, &is_routed);

    int n = rc || is_routed ? 0 : ahead_guess(&moe->ahead, &moe->later, &moe->likely);
    moe->n_likely = n < 0 ? 0 : n;
    moe->later.n_rows = 0;
    return n < 0 ? n : rc;
}

/* The host is about to wait for a layer's router. What can be done meanwhile: send likely experts to the device for this step, move others
 * there for good. */
static int use_wait(struct moe *moe, int layer)
{
    bool is_likely = moe->likely_layer == layer, is_moving = store_is_moving(moe->store);
    int rc = is_likely || is_moving ? moe_split_mark(&moe->split, MOE_SPLIT_ROUTED) : 0;

    moe->likely_layer = -1;
    if (rc == 0 && is_likely && moe->later.n_rows > 0)
        rc = guess_late(moe);
    if (rc == 0 && is_likely)
        rc = moe_split_send_ahead(&moe->split, layer, moe->likely, moe->n_likely);
    if (rc == 0 && is_moving)
        rc = move_on(moe, layer);
    return rc;
}

/* What the host has to know of the layer: the router's choice, and what its own experts read. One wait for both, and use is made of it. */
static int bring_down(struct moe *moe, const struct op *op, const struct rows *rows)
{
    struct device *dev = moe->dev;
    bool is_split = is_split_layer(moe, op->layer);
    uint64_t ids_bytes = op->src[1]->stride[1] * (uint64_t)rows->n;
    uint64_t x_bytes = is_split ? op->src[0]->stride[1] * (uint64_t)rows->n : 0;
    struct trace_event event = {.what = TRACE_DOWN, .layer = op->layer, .id = rows->n, .bytes = ids_bytes + x_bytes};

    event.begin_ns = trace_has_timeline(moe->trace) ? clock_ns() : 0;
    int rc = dev->ops->fetch(dev, moe->chosen, op->src[1]->data, ids_bytes);
    if (rc == 0 && is_split)
        rc = dev->ops->fetch(dev, moe->x, op->src[0]->data, x_bytes);
    if (rc == 0 && is_split)
        rc = use_wait(moe, op->layer);
    if (rc == 0)
        rc = dev->ops->sync(dev);
    if (rc == 0 && moe->host)
        rc = moe_split_settle(&moe->split);
    if (rc < 0)
        return rc;
    moe->stats.down_bytes += event.bytes;
    event.end_ns = trace_has_timeline(moe->trace) ? clock_ns() : 0;
    trace_add(moe->trace, &event);
    return 0;
}

/* The host's rows, each to its own place, in runs of neighbours. The device may still compute its own. */
static int bring_up(struct moe *moe, const struct op *op, const struct rows *rows)
{
    struct device *dev = moe->dev;
    const uint64_t row_bytes = op->dst[0]->stride[1];
    const int n_slots = rows->n * moe->k;
    struct trace_event event = {.what = TRACE_UP, .layer = op->layer};
    int rc = 0;

    event.begin_ns = trace_has_timeline(moe->trace) ? clock_ns() : 0;
    for (int slot = 0, end; slot < n_slots && rc == 0; slot = end + 1) {
        for (end = slot; end < n_slots && moe->is_host[moe->chosen[end]];)
            end++;
        if (end == slot)
            continue;
        uint64_t off = (uint64_t)slot * row_bytes, bytes = (uint64_t)(end - slot) * row_bytes;
        rc = dev->ops->send(dev, (char *)op->dst[0]->data + off, (const char *)moe->y + off, bytes);
        event.id += end - slot;
        event.bytes += bytes;
    }
    if (rc == 0 && event.id > 0)
        rc = dev->ops->meet(dev);
    if (rc < 0)
        return rc;
    moe->stats.up_bytes += event.bytes;
    moe->stats.n_host_rows += (uint64_t)event.id;
    event.end_ns = trace_has_timeline(moe->trace) ? clock_ns() : 0;
    if (event.id > 0)
        trace_add(moe->trace, &event);
    return 0;
}

/* Would a token of a layer, on average, want an expert from disk? A router of a MiB (128 experts, 2048 wide) keeps a core busy for some
 * 130 us, which is paid by the disk's time for one. */
static bool is_read_for(const struct moe *moe, int layer)
{
    return store_n_on_disk(moe->store, layer) * moe->k >= moe->n_expert;
}

/* Tell the store what the next layer will likely want, if the rows that this one's router read are in the host's memory. Beside a device
 * that is what the device waits for, so where no reads are to be saved the router is asked when the host waits for the device, or
 * not at all. */
static int look_ahead(struct moe *moe, const struct op *op, int n_rows, int n_ids)
{
    struct tensor x = *op->src[0];
    struct ahead_from from = {op->layer, &x, n_rows, n_ids};
    const int32_t *likely;

    moe->likely_layer = -1;
    moe->later.n_rows = 0;
    if (has_memory(moe))
        x.data = is_split_layer(moe, op->layer) ? moe->x : NULL;
    if (!x.data)
        return 0;
    if (moe->host && ahead_asks_router(&from) && !is_read_for(moe, op->layer + 1)) {
        store_hint(moe->store, op->layer + 1, NULL, 0); /* the one before is over */
        if (!moe_split_sends_ahead(&moe->split))
            return 0;
        ahead_keep(&moe->ahead, &from, &moe->later_x);
        moe->later = from;
        moe->likely_layer = op->layer + 1;
        return 0;
    }
    int n = ahead_guess(&moe->ahead, &from, &likely);
    if (n > 0)
        store_hint(moe->store, op->layer + 1, likely, n);
    moe->likely = likely;
    moe->n_likely = n;
    moe->likely_layer = n > 0 ? op->layer + 1 : -1;
    return n < 0 ? n : 0;
}

/* Borrow and compute; what is there is computed while the rest is on its way. */
static int run_loan(struct moe *moe, const struct op *op, const struct rows *rows, struct store_lease *lease, int n_ids)
{
    int rc = store_lease(moe->store, op->layer, moe->ids, n_ids, lease), n_given = 1;

    if (rc == 0 && moe->look_ahead)
        rc = look_ahead(moe, op, rows->n, n_ids);
    while (rc == 0 && n_given > 0) {
        rc = store_next(moe->store, lease, true, moe->given, moe->n_expert, &n_given);
        if (rc == 0 && n_given > 0)
            rc = compute(moe, op, rows, moe->given, n_given);
    }
    return rc;
}

/* ---- experts on both sides ---- */

/* MiB of experts (n), and times their rows. */
struct amount {
    double mib, mib_rows;
};

static struct amount amount_of(const struct moe *moe, int layer, const struct store_expert *given, int n)
{
    double mib = (double)model_expert_bytes(moe->model, layer) / (double)MIB;
    struct amount sum = {n * mib, 0};

    for (int i = 0; i < n; i++)
        sum.mib_rows += mib * moe->n_slots[given[i].expert];
    return sum;
}

/* What lies on the device, or has landed there. */
static int run_hits(struct moe *moe, const struct op *op, const struct rows *rows, struct store_lease *lease)
{
    struct moe_split *s = &moe->split;
    int n = 0, n_given = 0, rc = 0;

    for (; n < s->n_landed && rc == 0; n++)
        rc = landing_use(s->landing, s->landed_at[n], &moe->given[n]);
    if (rc == 0 && s->n_on_device)
        rc = store_next(moe->store, lease, false, moe->given + n, moe->n_expert - n, &n_given);
    n += n_given;
    if (rc < 0 || n == 0)
        return rc;
    struct amount sum = amount_of(moe, op->layer, moe->given, n);
    rc = moe_split_mark(s, MOE_SPLIT_HITS_FROM);
    if (rc == 0)
        rc = compute(moe, op, rows, moe->given, n);
    if (rc == 0)
        rc = moe_split_mark(s, MOE_SPLIT_HITS_TO);
    moe_split_saw_hits(s, sum.mib, sum.mib_rows);
    for (int i = 0; i < s->n_landed && rc == 0; i++)
        rc = landing_used(s->landing, s->landed_at[i]);
    return rc;
}

/* Copy as many of moe->up (*n_up) as there are places, from the end, and compute them there. wait: for one at least, if there is a
 * place at all. *n: how many. */
static int run_copied(struct moe *moe, const struct op *op, const struct rows *rows, const struct store_lease *lease,
                      bool wait, int *n_up, int *n)
{
    struct moe_split *s = &moe->split;
    struct store_expert *there = moe->there;
    int rc = 0, place = 0;

    for (*n = 0; *n < *n_up && rc == 0; ++*n) {
        struct store_expert *e = &moe->up[*n_up - 1 - *n];
        e->is_pinned = e->is_pinned && store_keep(moe->store, lease, e->expert);
        rc = landing_send(s->landing, op->layer, e, false, wait && *n == 0, &place);
        if (rc < 0 || place < 0)
            break;
        moe->places[*n] = place;
    }
    *n_up -= *n;
    if (rc < 0 || *n == 0)
        return rc;
    for (int i = 0; i < *n && rc == 0; i++)
        rc = landing_use(s->landing, moe->places[i], &there[i]);
    struct amount sum = amount_of(moe, op->layer, there, *n);
    if (rc == 0)
        rc = moe_split_mark(s, MOE_SPLIT_COPIED_FROM);
    if (rc == 0)
        rc = compute(moe, op, rows, there, *n);
    if (rc == 0)
        rc = moe_split_mark(s, MOE_SPLIT_COPIED_TO);
    moe_split_saw_copied(s, sum.mib, sum.mib_rows);
    for (int i = 0; i < *n && rc == 0; i++)
        rc = landing_used(s->landing, moe->places[i]);
    return rc;
}

static int run_cpu(struct moe *moe, const struct op *op, const struct rows *rows, const struct store_expert *given,
                   int n)
{
    struct amount sum = amount_of(moe, op->layer, given, n);
    uint64_t from_ns = moe->clock();
    int rc = compute(moe, op, rows, given, n);

    if (rc == 0)
        moe_split_saw_cpu(&moe->split, sum.mib, sum.mib_rows, moe->clock() - from_ns);
    return rc;
}

/* Experts in the host's memory (n_given): some go to the device, the CPU computes the others while they travel. When all places are
 * under way it computes a part of its own before it looks for free ones again. */
static int run_host(struct moe *moe, const struct op *op, const struct rows *rows, const struct store_lease *lease,
                    int n_given)
{
    struct moe_split *s = &moe->split;
    int n_up = 0, n_cpu = 0, done = 0, n = 0, rc = 0;

    for (int i = 0; i < n_given; i++) {
        struct store_expert e = moe->given[i];
        if (s->is_copied[e.expert])
            moe->up[n_up++] = e;
        else
            moe->given[n_cpu++] = e;
    }
    const int n_all_up = n_up;
    while (rc == 0 && (n_up > 0 || done < n_cpu)) {
        bool is_idle = done == n_cpu;
        n = 0;
        if (n_up > 0)
            rc = run_copied(moe, op, rows, lease, is_idle, &n_up, &n);
        assert(rc < 0 || n > 0 || !is_idle); /* what has been computed keeps no place */
        int part = n_up > 0 ? (n_cpu - done) / (1 + n_up / (int)s->gpu.n_landing) : n_cpu - done;
        part = part < 1 && done < n_cpu ? 1 : part;
        if (rc == 0 && part > 0)
            rc = run_cpu(moe, op, rows, moe->given + done, part);
        done += part;
    }
    if (rc == 0) {
        store_offer(moe->store, lease, moe->given, n_cpu);
        store_offer(moe->store, lease, moe->up, n_all_up);
    }
    return rc;
}

static int run_split(struct moe *moe, const struct op *op, const struct rows *rows, struct store_lease *lease,
                     int n_ids)
{
    struct moe_split *s = &moe->split;
    int n_given = 1;
    int rc = moe_split_choose(s, &(struct moe_split_layer){.layer = op->layer,
                                                           .n = n_ids,
                                                           .ids = moe->ids,
                                                           .n_rows = moe->n_slots,
                                                           .row_mib = (double)op->dst[0]->stride[1] / (double)MIB});
    if (rc == 0)
        rc = store_lease(moe->store, op->layer, s->lend, s->n_lend, lease);
    if (rc == 0 && moe->look_ahead)
        rc = look_ahead(moe, op, rows->n, n_ids);
    if (rc == 0)
        rc = run_hits(moe, op, rows, lease);
    while (rc == 0 && n_given > 0) {
        rc = store_next(moe->store, lease, true, moe->given, moe->n_expert, &n_given);
        if (rc == 0 && n_given > 0)
            rc = run_host(moe, op, rows, lease, n_given);
    }
    if (rc == 0)
        rc = bring_up(moe, op, rows);
    if (rc == 0)
        rc = moe_split_mark(s, MOE_SPLIT_LAYER_TO);
    return rc;
}

static int run_chosen(struct moe *moe, const struct op *op, const struct rows *rows, uint64_t *expert_bytes)
{
    struct tensor ids = *op->src[1];
    struct store_lease lease = {0};

    if (has_memory(moe))
        ids.data = moe->chosen;
    int n_ids = group(moe, &ids, rows->n, op->layer), rc;
    if (n_ids < 0)
        return n_ids;
    *expert_bytes += (uint64_t)n_ids * model_expert_bytes(moe->model, op->layer);
    moe->stats.n_rows += (uint64_t)rows->n * (uint64_t)moe->k;
    trace_wanted(moe->trace, op->layer, moe->ids, n_ids);
    rc = is_split_layer(moe, op->layer) ? run_split(moe, op, rows, &lease, n_ids)
                                        : run_loan(moe, op, rows, &lease, n_ids);
    store_release(moe->store, &lease);
    return rc;
}

int moe_run(struct moe *moe, const struct op *op, const struct rows *rows, uint64_t *expert_bytes)
{
    int rc = has_memory(moe) ? bring_down(moe, op, rows) : 0;

    if (rc == 0)
        rc = run_chosen(moe, op, rows, expert_bytes);
    if (rc < 0 && moe->host)
        moe_split_abandon(&moe->split);
    return rc;
}

bool moe_wants_host(const struct moe *moe, const struct op *op)
{
    return trace_has_wanted(moe->trace) || !has_memory(moe) || !store_is_on_device(moe->store, op->layer);
}

void moe_count_unseen(struct moe *moe, const struct op *op, int n_rows, uint64_t *expert_bytes)
{
    const uint64_t n_slots = (uint64_t)n_rows * (uint64_t)moe->k, n_expert = (uint64_t)moe->n_expert;

    *expert_bytes += (n_slots < n_expert ? n_slots : n_expert) * model_expert_bytes(moe->model, op->layer);
    moe->stats.n_rows += n_slots;
}

void moe_use_gpu(struct moe *moe, bool use)
{
    moe->split.is_off = !use;
    store_use_device(moe->store, use);
}
