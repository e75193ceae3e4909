/* Owns the order of copies and ops. Weights come up on the queue of copies: those of the nth product into its room, once the product two
 * before has read what was there. On the queue of ops a product follows its weights. So copies never wait for more than the
 * device computes, and while the host attends, two products' weights travel. */
#include "src/run/lift.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/run/store.h"
#include "src/run/trace.h"

#include <inttypes.h>
#include <string.h>

/* ---- laying out ---- */

static const void *host_weight(const struct lift *l, const struct tensor *w)
{
    return store_host_weight(l->store, (int)(w - l->program->weights));
}

/* Weights of an op to their places from *off on; upload: now, and for good. */
static int place(struct lift *l, const struct op *op, uint64_t *off, bool upload)
{
    int rc = 0;

    for (int i = 0; i < OP_MAX_IO && rc == 0; i++) {
        const struct tensor *w = lift_shape_weight(op, i);
        if (!w)
            continue;
        l->program->weights[w - l->program->weights].data = l->memory + *off;
        *off += size_up(tensor_bytes(w), LIFT_ALIGN);
        if (upload)
            rc = l->dev->ops->upload(l->dev, w->data, host_weight(l, w), tensor_bytes(w));
    }
    return rc;
}

static int bind_weights(struct lift *l)
{
    uint64_t small_off = 0;
    int n = 0, rc = 0;

    for (int i = 0; i < l->program->n_ops && rc == 0; i++) {
        const struct op *op = &l->program->ops[i];
        if (!lift_shape_is_product(op)) {
            rc = place(l, op, &small_off, true);
            continue;
        }
        uint64_t off = l->shape.small_bytes + (uint64_t)(n % LIFT_ROOMS) * l->shape.room_bytes;
        l->products[n++] = i;
        rc = place(l, op, &off, false);
    }
    return rc;
}

/* All of the host's dense weights lie in one piece. */
static int pin(struct lift *l)
{
    void *memory;
    bool is_pinned;

    store_host_memory(l->store, &memory, &l->pinned_bytes);
    int rc = l->dev->ops->pin(l->dev, memory, l->pinned_bytes, &is_pinned);
    if (rc == 0 && is_pinned)
        l->pinned = memory;
    return rc;
}

int lift_init(struct lift *l, const struct lift_args *args)
{
    *l = (struct lift){.dev = args->dev,
                       .host = args->host,
                       .host_program = args->host_program,
                       .program = args->program,
                       .store = args->store,
                       .trace = args->trace,
                       .first_fence = args->first_fence};
    void *memory = NULL;

    lift_shape_of(l->program, &l->shape);
    program_bind_arena(l->program, args->arena);
    l->products = mem_zalloc((size_t)l->shape.n_products, sizeof *l->products, MEM_META);
    int rc = l->products ? l->dev->ops->alloc(l->dev, l->shape.bytes, &memory)
                         : err(ERR_NOMEM, "a list of %d products", l->shape.n_products);
    l->memory = memory;
    if (rc == 0)
        rc = bind_weights(l);
    if (rc == 0)
        rc = pin(l);
    if (rc < 0)
        lift_done(l);
    return rc;
}

void lift_done(struct lift *l)
{
    if (l->pinned)
        l->dev->ops->unpin(l->dev, l->pinned);
    if (l->dev)
        l->dev->ops->release(l->dev, l->memory);
    mem_free(l->products);
    program_free(l->program);
    memset(l, 0, sizeof *l);
}

/* ---- weights ---- */

static int fence_there(const struct lift *l, int product) /* passed when its weights are in their room */
{
    return l->first_fence + product % LIFT_ROOMS;
}

static int fence_read(const struct lift *l, int product) /* passed when nobody reads them any more */
{
    return l->first_fence + LIFT_ROOMS + product % LIFT_ROOMS;
}

/* Rows that go up meanwhile take their turn between two pieces: a tenth of a millisecond by 16 lanes of PCIe 4, and few calls. */
#define PIECE_BYTES (2 * MIB)

static int carry(struct lift *l, const struct tensor *w)
{
    const char *from = host_weight(l, w);
    const uint64_t bytes = tensor_bytes(w);
    int rc = 0;

    for (uint64_t off = 0, n; off < bytes && rc == 0; off += n) {
        n = bytes - off < PIECE_BYTES ? bytes - off : PIECE_BYTES;
        rc = l->dev->ops->carry(l->dev, (char *)w->data + off, from + off, n);
    }
    l->stats.weight_bytes += bytes;
    return rc;
}

/* The next product's weights, once their room is free. */
static int send_next(struct lift *l)
{
    const struct device_ops *ops = l->dev->ops;
    const int product = l->n_sent;
    int rc = 0;

    if (product == l->shape.n_products)
        return 0;
    const struct op *op = &l->program->ops[l->products[product]];
    if (product >= LIFT_ROOMS)
        rc = ops->follow(l->dev, DEVICE_COPIES, fence_read(l, product));
    for (int i = 0; i < op->n_w && rc == 0; i++)
        rc = carry(l, op->w[i]);
    l->n_sent++;
    return rc ? rc : ops->fence(l->dev, DEVICE_COPIES, fence_there(l, product));
}

static int run_product(struct lift *l, int product, const struct rows *rows)
{
    const struct device_ops *ops = l->dev->ops;
    int rc = ops->follow(l->dev, DEVICE_OPS, fence_there(l, product));

    if (rc == 0)
        rc = ops->run(l->dev, &l->program->ops[l->products[product]], 1, rows);
    if (rc == 0)
        rc = ops->fence(l->dev, DEVICE_OPS, fence_read(l, product));
    return rc ? rc : send_next(l);
}

/* ---- rows ---- */

static struct trace_event begin(const struct lift *l, enum trace_what what, int layer, int n_rows)
{
    return (struct trace_event){
        .what = what, .layer = layer, .id = n_rows, .begin_ns = trace_has_timeline(l->trace) ? clock_ns() : 0};
}

static void end(struct lift *l, struct trace_event *event)
{
    event->end_ns = trace_has_timeline(l->trace) ? clock_ns() : 0;
    trace_add(l->trace, event);
}

/* To where no queued op reads or writes; those behind it wait. */
static int send(struct lift *l, const struct op *op, const struct tensor *host, int n)
{
    const struct tensor *t = op->dst[0];
    struct trace_event event = begin(l, TRACE_UP, op->layer, n);
    int rc;

    event.bytes = t->stride[1] * (uint64_t)n;
    rc = l->dev->ops->send(l->dev, t->data, host->data, event.bytes);
    if (rc == 0)
        rc = l->dev->ops->meet(l->dev);
    if (rc < 0)
        return rc;
    l->stats.up_bytes += event.bytes;
    end(l, &event);
    return 0;
}

/* What KV_APPEND and ATTENTION, here[0] and here[1], read. */
static int fetch(struct lift *l, const struct op *here, const struct op *there, int n)
{
    const struct tensor *host[] = {here[0].src[0], here[0].src[1], here[1].src[0]};
    const struct tensor *t[] = {there[0].src[0], there[0].src[1], there[1].src[0]};
    struct trace_event event = begin(l, TRACE_DOWN, here->layer, n);
    int rc = 0;

    for (int i = 0; i < 3 && rc == 0; i++) {
        if (!t[i]) /* values are part of keys */
            continue;
        uint64_t bytes = t[i]->stride[1] * (uint64_t)n;
        rc = l->dev->ops->fetch(l->dev, host[i]->data, t[i]->data, bytes);
        event.bytes += bytes;
    }
    if (rc == 0)
        rc = l->dev->ops->fetched(l->dev);
    if (rc < 0)
        return rc;
    l->stats.down_bytes += event.bytes;
    end(l, &event);
    return 0;
}

/* KV_APPEND and ATTENTION, ops i and i + 1. */
static int attend(struct lift *l, int i, const struct rows *rows)
{
    const struct op *here = &l->host_program->ops[i], *there = &l->program->ops[i];
    int rc = fetch(l, here, there, rows->n);

    if (rc == 0) {
        struct trace_event event = begin(l, TRACE_DENSE, here->layer, rows->n);
        rc = l->host->ops->run(l->host, here, 2, rows);
        end(l, &event);
    }
    return rc ? rc : send(l, &there[1], here[1].dst[0], rows->n);
}

/* ---- a step ---- */

static bool is_plain(const struct op *op)
{
    return !lift_shape_is_product(op) && op->kind != OP_KV_APPEND;
}

/* Ops from i on that nothing has to be done for. */
static int n_plain(const struct lift *l, int i)
{
    int n = 0;

    while (i + n < l->program->n_ops && is_plain(&l->program->ops[i + n]))
        n++;
    return n;
}

/* The table lies with the host: rows of it go up. */
static int embed(struct lift *l, const struct rows *rows)
{
    const struct op *here = &l->host_program->ops[0];
    int rc = l->host->ops->run(l->host, here, 1, rows);

    return rc ? rc : send(l, &l->program->ops[0], here->dst[0], rows->n);
}

/* Nothing comes up any more. */
static int stop(struct lift *l, int rc)
{
    bool is_there;

    if (l->n_sent > 0)
        l->dev->ops->passed(l->dev, fence_there(l, l->n_sent - 1), true, &is_there);
    return rc;
}

int lift_run(struct lift *l, const struct rows *rows, const int *cancel)
{
    const struct program *p = l->program;
    int product = 0, rc = embed(l, rows); /* before all weights: what goes up goes one after the other */

    l->n_sent = 0;
    for (int i = 0; i < LIFT_ROOMS && rc == 0; i++)
        rc = send_next(l);
    for (int i = 1, n; i < p->n_ops && rc == 0; i += n) {
        n = 1;
        if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED)) {
            rc = err(ERR_CANCEL, "stopped in layer %d", p->ops[i].layer);
        } else if (lift_shape_is_product(&p->ops[i])) {
            rc = run_product(l, product++, rows);
        } else if (p->ops[i].kind == OP_KV_APPEND) {
            n = 2;
            rc = attend(l, i, rows);
        } else {
            n = n_plain(l, i);
            rc = l->dev->ops->run(l->dev, &p->ops[i], n, rows);
        }
    }
    l->stats.n_steps += rc == 0;
    return rc ? stop(l, rc) : 0;
}
