/* The MoE op's host side. Grouping by expert means each expert's weights are read once a step, whatever the number of rows. */
#include "src/run/moe.h"

#include <string.h>

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/store.h"
#include "src/run/trace.h"

int moe_init(struct moe *moe, const struct model *m, int n_rows, bool look_ahead, struct trace *trace)
{
    const int n_expert = m->hp.n_expert, k = m->hp.n_expert_used;
    memset(moe, 0, sizeof *moe);
    if (n_expert == 0)
        return 0;
    const size_t n = (size_t)n_expert, n_slots = (size_t)n_rows * (size_t)k;
    moe->n_expert = n_expert;
    moe->k = k;
    moe->n_rows = n_rows;
    moe->look_ahead = look_ahead;
    moe->trace = trace;
    int rc = look_ahead ? ahead_init(m, &moe->ahead) : 0;
    if (rc < 0)
        return rc;
    moe->n_slots = mem_zalloc(n, sizeof *moe->n_slots, MEM_META);
    moe->first = mem_zalloc(n, sizeof *moe->first, MEM_META);
    moe->ids = mem_zalloc(n, sizeof *moe->ids, MEM_META);
    moe->slot = mem_zalloc(n_slots, sizeof *moe->slot, MEM_META);
    moe->chosen = mem_zalloc(n_slots, sizeof *moe->chosen, MEM_META);
    moe->groups = mem_zalloc(n, sizeof *moe->groups, MEM_META);
    moe->given = mem_zalloc(n, sizeof *moe->given, MEM_META);
    if (moe->n_slots && moe->first && moe->ids && moe->slot && moe->chosen && moe->groups && moe->given)
        return 0;
    moe_done(moe);
    return err(ERR_NOMEM, "grouping %zu rows by %d experts", n_slots, n_expert);
}

void moe_done(struct moe *moe)
{
    ahead_done(&moe->ahead);
    mem_free(moe->given);
    mem_free(moe->groups);
    mem_free(moe->chosen);
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

/* What an expert's product is multiplied by. */
static int read_scale(struct device *dev, const struct tensor *scale, int expert, float *out)
{
    const float *at = scale ? (const float *)scale->data + expert : NULL;
    *out = 1.0f;
    if (at && dev->ops->download)
        return dev->ops->download(dev, out, at, sizeof *out);
    if (at)
        *out = *at;
    return 0;
}

/* Compute the experts that were given. */
static int compute(struct moe *moe, struct device *dev, const struct op *op, const struct rows *rows, int n_given)
{
    for (int i = 0; i < n_given; i++) {
        const struct store_expert *e = &moe->given[i];
        struct op_expert *group = &moe->groups[i];
        group->first = moe->first[e->expert];
        group->n = moe->n_slots[e->expert];
        for (int j = 0; j < 3; j++) {
            group->w[j] = e->w[j];
            int rc = read_scale(dev, op->w[3 + j], e->expert, &group->scale[j]);
            if (rc < 0)
                return rc;
        }
    }
    struct op step = *op;
    step.p.moe.experts = moe->groups;
    step.p.moe.n_experts = n_given;
    step.p.moe.slot = moe->slot;
    if (!trace_has_timeline(moe->trace))
        return dev->ops->run(dev, &step, 1, rows);
    struct trace_event event = {.what = TRACE_EXPERTS, .layer = op->layer, .id = n_given, .begin_ns = clock_ns()};
    int rc = dev->ops->run(dev, &step, 1, rows);
    event.end_ns = clock_ns();
    trace_add(moe->trace, &event);
    return rc;
}

int moe_run(struct moe *moe, const struct model *m, struct store *store, struct device *dev, const struct op *op,
            const struct rows *rows, uint64_t *expert_bytes)
{
    struct tensor ids = *op->src[1];
    int rc = 0;
    if (dev->ops->download) {
        ids.data = moe->chosen;
        rc = dev->ops->download(dev, ids.data, op->src[1]->data, ids.stride[1] * (uint64_t)rows->n);
    }
    int n_ids = rc < 0 ? rc : group(moe, &ids, rows->n, op->layer);
    if (n_ids < 0)
        return n_ids;
    *expert_bytes += (uint64_t)n_ids * model_expert_bytes(m, op->layer);

    trace_wanted(moe->trace, op->layer, moe->ids, n_ids);
    struct store_lease lease = {0};
    rc = store_lease(store, op->layer, moe->ids, n_ids, &lease);
    if (rc == 0 && moe->look_ahead) {
        const int32_t *likely;
        int n = ahead_guess(&moe->ahead, store, &(struct ahead_from){op->layer, op->src[0], rows->n, n_ids}, &likely);
        if (n > 0)
            store_hint(store, op->layer + 1, likely, n);
    }
    int n_given = 1;
    while (rc == 0 && n_given > 0) {
        /* What is there is computed while the rest is on its way. */
        rc = store_next(store, &lease, true, moe->given, moe->n_expert, &n_given);
        if (rc == 0 && n_given > 0)
            rc = compute(moe, dev, op, rows, n_given);
    }
    store_release(store, &lease);
    return rc;
}
