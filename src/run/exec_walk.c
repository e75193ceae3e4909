/* Walks the op list. The list is cut where the host has to act: before each OP_MOE (experts are borrowed), unless the device has
 * them all and looks them up by itself, and, in steps of many rows, between layers, so that a cancelled prompt does not run on for a
 * whole chunk. Where a plan leaves the first layers to the CPU, they are a list of their own, walked before the device's; what comes
 * out of it goes up. A step in halves walks the device's list twice, from attention to attention in turn: while the host attends to
 * rows of one half, the device has the other half's to do. */
#include "src/run/exec_in.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/run/trace.h"

/* Steps of more rows than this look at the cancel flag between layers; a shorter one is over soon enough. */
#define CANCEL_ROWS 8

/* A walk down a part's list. */
struct walk {
    struct part *part;
    struct rows rows; /* some of the step's */
    int at;           /* the op that comes next */
    bool is_half;     /* it stops behind each attention, for the other one */
    bool is_over;     /* at the end, or at what is for rows that want logits, and there are none */
};

/* Is the KV_APPEND at op i one whose pages lie on two sides? */
static bool is_two_sided(const struct part *part, int i)
{
    return attn_wants(&part->attn, &part->program->ops[i]);
}

/* Does the other half come next, behind this op? */
static bool is_stop(const struct walk *w, const struct op *op)
{
    return w->is_half && op->kind == OP_ATTENTION && op->p.attn.window == 0;
}

/* Has the host to see which experts were chosen? */
static bool wants_host(const struct walk *w, const struct op *op)
{
    return op->kind == OP_MOE && moe_wants_host(w->part->moe, op);
}

/* Where the segment that starts at op `first` ends. */
static int segment_end(const struct exec *e, const struct walk *w, int first)
{
    const struct program *p = w->part->program;
    bool has_stops = w->rows.n > CANCEL_ROWS && !w->is_half;
    int i = first;
    if (is_two_sided(w->part, first))
        return first + 2;
    for (; i < p->n_ops; i++) {
        const struct op *op = &p->ops[i];
        if (op->rows == OP_ROWS_OUT && w->rows.n_out == 0)
            return i;
        if (op == p->top && e->top.ne[0] == 0)
            return i;
        if (i > first && (wants_host(w, op) || is_two_sided(w->part, i) || is_stop(w, op - 1) ||
                          (has_stops && op->layer != p->ops[first].layer)))
            return i;
        if (wants_host(w, op))
            return i + 1;
    }
    return i;
}

int exec_walk_dense(struct exec *e, const struct part *part, const struct op *ops, int n, const struct rows *rows)
{
    struct device *dev = part->dev;
    if (!trace_has_timeline(e->trace))
        return dev->ops->run(dev, ops, n, rows);
    struct trace_event event = {.what = TRACE_DENSE, .layer = ops->layer, .id = rows->n, .begin_ns = clock_ns()};
    int rc = dev->ops->run(dev, ops, n, rows);
    event.end_ns = clock_ns();
    trace_add(e->trace, &event);
    return rc;
}

/* Ops up to `end`, of which the host need see nothing. */
static int run_segment(struct exec *e, const struct walk *w, int end)
{
    const struct op *ops = w->part->program->ops;
    int rc = exec_walk_dense(e, w->part, &ops[w->at], end - w->at, &w->rows);

    for (int i = w->at; i < end && rc == 0; i++)
        if (ops[i].kind == OP_MOE)
            moe_count_unseen(w->part->moe, &ops[i], w->rows.n, &e->stats.expert_bytes);
    return rc;
}

/* On to where the host has something to do for attention (attn_finish), or the other half comes next, or to the end. */
static int walk_on(struct exec *e, struct walk *w, const int *cancel)
{
    struct part *part = w->part;
    const struct program *p = part->program;

    while (!w->is_over) {
        const struct op *op = &p->ops[w->at];
        int end = w->at < p->n_ops ? segment_end(e, w, w->at) : w->at;
        if (end == w->at) {
            w->is_over = true;
            break;
        }
        if (cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED))
            return err(ERR_CANCEL, "stopped in layer %d", op->layer);
        int rc = wants_host(w, op)           ? moe_run(part->moe, op, &w->rows, &e->stats.expert_bytes)
                 : is_two_sided(part, w->at) ? attn_start(&part->attn, op, &w->rows)
                                             : run_segment(e, w, end);
        if (rc < 0)
            return rc;
        w->at = end;
        if (part->attn.is_open || is_stop(w, &p->ops[end - 1]))
            break;
    }
    return 0;
}

static struct walk walk_of(struct part *part, const struct rows *rows)
{
    struct walk w = {.part = part, .rows = *rows};

    w.rows.seqs = part->seqs;
    return w;
}

static int walk(struct exec *e, struct walk *w, const int *cancel)
{
    int rc = 0;

    while (rc == 0 && !w->is_over) {
        rc = walk_on(e, w, cancel);
        if (rc == 0)
            rc = attn_finish(&w->part->attn);
    }
    return rc;
}

/* The last n_second rows apart from the others. In each turn of the loop the host attends for one half, which the device then goes on with
 * up to its next attention; meanwhile the device does what the turn before gave it for the other half. Where both are over, the second's
 * results join the first's, before what is for all rows: the head's weights are read once. */
static int walk_halves(struct exec *e, const struct rows *step, int n_second, const int *cancel)
{
    const struct tensor *x = e->main.program->x, *from = e->half.program->x;
    struct walk halves[2] = {walk_of(&e->main, step), walk_of(&e->half, step)}, *first = &halves[0];
    const int n_first = step->n - n_second;
    struct rows *rows = &halves[1].rows;
    int rc = 0;

    halves[0].is_half = halves[1].is_half = true;
    first->rows.n = n_first;
    first->rows.n_out = rows->n_out = rows->n_prompt = 0;
    first->rows.n_prompt = step->n_prompt < n_first ? step->n_prompt : n_first;
    rows->n = n_second;
    rows->token += n_first;
    rows->pos += n_first;
    rows->seq += n_first;
    for (int i = 0; rc == 0 && !(halves[0].is_over && halves[1].is_over); i ^= 1) {
        rc = attn_finish(&halves[i].part->attn);
        if (rc == 0)
            rc = walk_on(e, &halves[i], cancel);
    }
    if (rc == 0)
        rc = e->main.dev->ops->copy(e->main.dev, tensor_row(x, n_first), from->data,
                                    from->stride[1] * (uint64_t)n_second);
    if (rc < 0) {
        if (e->main.dev->ops->meet(e->main.dev) == 0) /* of the other half something may be on its way up */
            e->main.dev->ops->sync(e->main.dev);
        return rc;
    }
    e->stats.n_halved++;
    *first = (struct walk){.part = &e->main, .rows = *step, .at = first->at};
    first->rows.seqs = e->main.seqs;
    return walk(e, first, cancel);
}

/* What came out of the host's layers to where the device's begin. Nothing is queued there: a step ends with a wait. */
static int bring_up(struct exec *e, int n_rows, int n_second)
{
    const struct tensor *from = e->before.program->x, *to = e->main.program->x;
    struct device *dev = e->main.dev;
    struct trace_event event = {.what = TRACE_UP,
                                .layer = e->main.program->span.first,
                                .id = n_rows,
                                .bytes = from->stride[1] * (uint64_t)n_rows,
                                .begin_ns = e->trace ? clock_ns() : 0};
    int n_first = n_rows - n_second;
    int rc = dev->ops->send(dev, to->data, from->data, from->stride[1] * (uint64_t)n_first);

    if (rc == 0 && n_second)
        rc = dev->ops->send(dev, e->half.program->x->data, tensor_row(from, n_first),
                            from->stride[1] * (uint64_t)n_second);
    if (rc == 0)
        rc = dev->ops->meet(dev);
    if (rc < 0)
        return rc;
    e->stats.up_bytes += event.bytes;
    event.end_ns = e->trace ? clock_ns() : 0;
    trace_add(e->trace, &event);
    return 0;
}

/* The same where the device computes the host's layers: there the result already is. */
static int walk_lifted(struct exec *e, const struct rows *step, int n_second, const int *cancel)
{
    const struct tensor *from = e->lift.program->x, *to = e->main.program->x;
    const struct walk before = walk_of(&e->before, step);
    struct device *dev = e->main.dev;
    int rc = lift_run(&e->lift, &before.rows, cancel);

    if (rc == 0 && n_second)
        rc = dev->ops->copy(dev, e->half.program->x->data, tensor_row(from, step->n - n_second),
                            from->stride[1] * (uint64_t)n_second);
    if (rc == 0 && to->data != from->data)
        rc = dev->ops->copy(dev, to->data, from->data, from->stride[1] * (uint64_t)step->n);
    return rc;
}

int exec_walk(struct exec *e, const struct rows *rows, int n_second, const int *cancel)
{
    struct walk all = walk_of(&e->main, rows);
    int rc = 0;

    if (e->before.program && lift_is_on(&e->lift) && rows->n >= e->lift_rows) {
        rc = walk_lifted(e, rows, n_second, cancel);
    } else if (e->before.program) {
        struct walk before = walk_of(&e->before, rows);
        rc = walk(e, &before, cancel);
        if (rc == 0)
            rc = bring_up(e, rows->n, n_second);
    }
    if (rc < 0)
        return rc;
    return n_second ? walk_halves(e, rows, n_second, cancel) : walk(e, &all, cancel);
}
