/* Owns the order of things inside a walk: which ops form a chain, where the barriers stand, and the clock.
 * All workers go through this code with the same op list and come to the same barriers. */
#include "cpu/walk.h"

#include "src/base/clock.h"

#include <stddef.h>

/* What happens between one shared op and the next. */
struct turn {
    struct walk *w;
    const struct op *finish; /* the shared op before; NULL: none */
    int begin, end;          /* the chain */
    const struct op *next;   /* the shared op after; NULL: another chain, or the end */
};

/* Bytes an op touches of one tensor, with what tells whether two ops mean the same row by the same bytes. */
struct extent {
    const char *begin, *end;
    uint64_t row_bytes;
};

static struct extent extent_of(const struct walk *w, const struct op *op, const struct tensor *t, int rows_per_row)
{
    uint64_t row_bytes = t->stride[1] * (uint64_t)rows_per_row;
    const char *data = t->data;

    return (struct extent){data, data + row_bytes * (uint64_t)walk_n(w, op), row_bytes};
}

static int src_per_row(const struct op *op, int i)
{
    if (op->kind == OP_ATTN_MERGE)
        return op->p.attn.n_segments;
    return op->kind == OP_COMBINE && i == 0 ? (int)op->src[1]->ne[0] : 1;
}

/* A chain may not reuse memory under another row length: a worker would write rows that another has still to read. */
static bool is_crossing(struct extent a, struct extent b)
{
    return a.begin < b.end && b.begin < a.end && (a.begin != b.begin || a.row_bytes != b.row_bytes);
}

/* Activations of an op: dst first, then src. */
static int list_extents(const struct walk *w, const struct op *op, struct extent *out)
{
    int n = 0;

    if (op->kind != OP_MATMUL &&
        op->kind != OP_MATMUL_HEADS) /* of a matmul only the prepare step belongs to the chain */
        for (int i = 0; i < OP_MAX_IO && op->dst[i]; i++)
            out[n++] = extent_of(w, op, op->dst[i], 1);
    for (int i = 0; i < OP_MAX_IO && op->src[i]; i++)
        out[n++] = extent_of(w, op, op->src[i], src_per_row(op, i));
    return n;
}

static bool can_join(const struct walk *w, int begin, int end, const struct op *op)
{
    struct extent mine[2 * OP_MAX_IO], theirs[2 * OP_MAX_IO];

    if (begin == end)
        return true;
    if (op->rows != w->ops[begin].rows || op->kind == OP_GET_ROWS)
        return false;
    if (walk_n(w, op) <= 1)
        return true;
    if (w->ops[begin].kind == OP_GET_ROWS) /* reads rows of others, which the next op could overwrite */
        return false;
    int n_mine = list_extents(w, op, mine);
    for (int i = begin; i < end; i++) {
        int n_theirs = list_extents(w, &w->ops[i], theirs);
        for (int a = 0; a < n_mine; a++)
            for (int b = 0; b < n_theirs; b++)
                if (is_crossing(mine[a], theirs[b]))
                    return false;
    }
    return true;
}

/* The turn that starts at op i. Ops without rows are walked over. */
static struct turn turn_at(struct walk *w, const struct op *finish, int i)
{
    struct turn t = {.w = w, .finish = finish, .begin = i, .end = i};

    while (t.end < w->n_ops) {
        const struct op *op = &w->ops[t.end];
        const struct walk_shared *shared = walk_shared(op->kind);
        if (t.begin == t.end && walk_n(w, op) == 0) {
            t.begin = ++t.end;
            continue;
        }
        if (shared && walk_n(w, op) > 0 && (!shared->prepare || can_join(w, t.begin, t.end, op))) {
            t.next = op;
            break;
        }
        if (shared || !can_join(w, t.begin, t.end, op))
            break;
        t.end++;
    }
    return t;
}

static void run_chain(const struct turn *t, int worker, int begin, int end, uint64_t *ns)
{
    uint64_t last_ns = clock_ns();

    for (int i = t->begin; i < t->end; i++) {
        cpu_rows_run(t->w, worker, &t->w->ops[i], begin, end);
        uint64_t now_ns = clock_ns();
        if (ns)
            ns[t->w->ops[i].kind] += now_ns - last_ns;
        last_ns = now_ns;
    }
    if (t->next && walk_shared(t->next->kind)->prepare) {
        walk_shared(t->next->kind)->prepare(t->w, worker, t->next, begin, end);
        if (ns)
            ns[t->next->kind] += clock_ns() - last_ns;
    }
}

static void finish_serial(int worker, void *arg)
{
    const struct turn *t = arg;

    if (t->finish && walk_shared(t->finish->kind)->finish)
        walk_shared(t->finish->kind)->finish(t->w, worker, t->finish);
}

static void begin_serial(int worker, void *arg)
{
    const struct turn *t = arg;

    if (t->next && walk_shared(t->next->kind)->begin)
        walk_shared(t->next->kind)->begin(t->w, worker, t->next);
}

static void turn_serial(int worker, void *arg)
{
    const struct turn *t = arg;
    const struct op *first = t->begin < t->end ? &t->w->ops[t->begin] : t->next;

    finish_serial(worker, arg);
    uint64_t begin_ns = clock_ns();
    if (first)
        run_chain(t, worker, 0, walk_n(t->w, first), t->w->ns);
    t->w->serial_ns += clock_ns() - begin_ns;
    begin_serial(worker, arg);
}

/* A chain of more than one row is worth a second barrier; then the workers share it, each with its block of rows. */
static bool is_shared_chain(const struct turn *t)
{
    const struct op *first = t->begin < t->end ? &t->w->ops[t->begin] : t->next;
    bool has_work = t->begin < t->end || (t->next && walk_shared(t->next->kind)->prepare);

    return has_work && walk_n(t->w, first) > 1;
}

/* Add what has passed since *last_ns to an op's time, without what a chain run by one worker has already counted. */
static void lap(struct walk *w, const struct op *op, uint64_t *last_ns, uint64_t *last_serial_ns)
{
    uint64_t now_ns = clock_ns();

    if (op)
        w->ns[op->kind] += now_ns - *last_ns - (w->serial_ns - *last_serial_ns);
    *last_ns = now_ns;
    *last_serial_ns = w->serial_ns;
}

static void share_chain(struct turn *t, int worker)
{
    const struct walk *w = t->w;
    int n = walk_n(w, t->begin < t->end ? &w->ops[t->begin] : t->next);
    int begin = (int)((int64_t)n * worker / w->n_threads), end = (int)((int64_t)n * (worker + 1) / w->n_threads);

    run_chain(t, worker, begin, end, worker ? NULL : t->w->ns);
}

void walk_worker(int worker, void *arg)
{
    struct walk *w = arg;
    const struct op *finish = NULL;
    uint64_t last_ns = clock_ns(), last_serial_ns = w->serial_ns;

    for (int i = 0; i < w->n_ops || finish;) {
        struct turn t = turn_at(w, finish, i);
        if (is_shared_chain(&t)) {
            pool_barrier(w->pool, worker, finish_serial, &t);
            if (!worker)
                lap(w, finish, &last_ns, &last_serial_ns);
            share_chain(&t, worker);
            if (!worker)
                lap(w, NULL, &last_ns, &last_serial_ns);
            if (t.next)
                pool_barrier(w->pool, worker, begin_serial, &t);
        } else {
            pool_barrier(w->pool, worker, turn_serial, &t);
            if (!worker)
                lap(w, finish, &last_ns, &last_serial_ns);
        }
        if (t.next)
            walk_shared(t.next->kind)->run(w, worker, t.next);
        finish = t.next;
        i = t.next ? t.end + 1 : t.end;
    }
}

const struct walk_shared *walk_shared(enum op_kind kind)
{
    switch (kind) {
    case OP_MATMUL:
        return &cpu_matmul_shared;
    case OP_MATMUL_HEADS:
        return &cpu_heads_shared;
    case OP_ATTENTION:
        return &cpu_attn_shared;
    case OP_ATTN_STATES:
        return &cpu_attn_states_shared;
    case OP_MOE:
        return &cpu_moe_shared;
    case OP_CONV:
        return &cpu_record_conv;
    case OP_DELTA_NET:
        return &cpu_record_delta;
    default:
        return NULL;
    }
}
