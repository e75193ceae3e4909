/* Owns the order of what host and device do for a layer whose pages lie on two sides. A step's rows are cut into stretches, each of
 * which goes one of three ways:
 *   by the device: sequences whose pages are all there, by the ops of the program;
 *   by both:       sequences with few rows. Queries, keys and values come down, the host computes the states of its segments while the
 *                  device computes its own, and they go up to their places among them;
 *   staged:        sequences with many rows. Arithmetic would keep the host busy for longer than its pages need to come up, so they
 *                  do, a wave of segments at a time, in two halves of a stage.
 * Which segments a wave has, who computed them and where they lie changes no bit: each is folded from its own keys alone, and merged
 * in its turn. */
#include "src/run/attn.h"

#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/batch.h"
#include "src/run/cache.h"

enum way { BY_DEVICE, BY_BOTH, STAGED };

/* A stretch of rows, as both sides see it. */
struct attn_job {
    struct attn *a;
    struct rows rows; /* (n) of the step's; seqs is set for each run */
    int group, n_segments;
    struct tensor q, k, v, out, states, sums; /* on the device; v: where the op has one */
    struct tensor host_q, host_k, host_v, host_states;
    struct op append, attend, fold, merge; /* on the device: the program's two, and ATTN_STATES, ATTN_MERGE */
    struct op host_append, host_fold;
};

int attn_init(struct attn *a, const struct attn_args *args)
{
    const struct device_ops *ops = args->dev->ops;
    void *dev_memory = NULL, *host_memory = NULL;

    *a = (struct attn){.dev = args->dev,
                       .host = args->host,
                       .program = args->program,
                       .stage_rows = args->stage_rows,
                       .n_seqs = args->n_seqs,
                       .fence = args->fence,
                       .n_pages = (args->n_ctx + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK};
    attn_shape_of(a->program, &a->shape);
    size_t n_seqs = (size_t)a->n_seqs;
    a->on_host = mem_zalloc(n_seqs, sizeof *a->on_host, MEM_META);
    a->staged = mem_zalloc(n_seqs, sizeof *a->staged, MEM_META);
    a->has_host = mem_zalloc(n_seqs, sizeof *a->has_host, MEM_META);
    a->table = mem_zalloc((size_t)a->n_pages, sizeof *a->table, MEM_META);
    a->job = mem_zalloc(1, sizeof *a->job, MEM_META);
    int rc = a->on_host && a->staged && a->has_host && a->table && a->job
                 ? 0
                 : err(ERR_NOMEM, "views of %d sequences' pages on two sides", a->n_seqs);
    if (rc == 0)
        rc = ops->alloc(a->dev, a->shape.dev_bytes, &dev_memory);
    a->dev_memory = dev_memory;
    if (rc == 0)
        rc = ops->alloc_host(a->dev, a->shape.host_bytes, &host_memory);
    a->host_memory = host_memory;
    if (rc < 0)
        attn_done(a);
    return rc;
}

void attn_done(struct attn *a)
{
    if (a->dev) {
        a->dev->ops->release_host(a->dev, a->host_memory);
        a->dev->ops->release(a->dev, a->dev_memory);
    }
    mem_free(a->job);
    mem_free(a->table);
    mem_free(a->has_host);
    mem_free(a->staged);
    mem_free(a->on_host);
    memset(a, 0, sizeof *a);
}

void attn_begin(struct attn *a, const struct batch *batch, int first_seq, int end_seq, const struct kv_seq *on_dev)
{
    a->on_dev = on_dev;
    a->is_split = a->is_open = false;
    for (int i = first_seq; i < end_seq; i++) {
        a->has_host[i] = cache_view_host(batch->seqs[i], &a->on_host[i]);
        a->is_split = a->is_split || a->has_host[i];
    }
}

/* ---- a stretch ---- */

static struct tensor rows_of(const struct tensor *t, int first, int n)
{
    struct tensor rows = *t;

    rows.data = tensor_row(t, first);
    rows.ne[1] = n;
    return rows;
}

/* The same rows in the host's part. */
static struct tensor on_host(const struct tensor *t, char *data)
{
    struct tensor rows = *t;

    rows.data = data;
    return rows;
}

static void make_tensors(struct attn_job *j, const struct op *ops, int first)
{
    const struct attn *a = j->a;
    const struct op_attn *p = &ops[1].p.attn;
    const int64_t state_len = (int64_t)p->n_head * (p->head_dim_v + 2);

    j->k = rows_of(ops[0].src[0], first, j->rows.n);
    if (ops[0].src[1])
        j->v = rows_of(ops[0].src[1], first, j->rows.n);
    j->q = rows_of(ops[1].src[0], first, j->rows.n);
    j->out = rows_of(ops[1].dst[0], first, j->rows.n);
    j->states = tensor_make(QUANT_F32, state_len, a->shape.n_places, 1, a->dev_memory + a->shape.states_off);
    j->sums = tensor_make(QUANT_F32, state_len, j->rows.n, 1, a->dev_memory + a->shape.sums_off);
    j->host_q = on_host(&j->q, a->host_memory + a->shape.q_off);
    j->host_k = on_host(&j->k, a->host_memory + a->shape.k_off);
    j->host_v = on_host(&j->v, a->host_memory + a->shape.v_off);
    j->host_states = on_host(&j->states, a->host_memory + a->shape.host_states_off);
}

/* The op of the same parameters with other tensors. */
static struct op op_of(const struct op *like, enum op_kind kind, const struct tensor *dst, const struct tensor *src)
{
    struct op op = *like;

    op.kind = kind;
    op.dst[0] = dst;
    op.src[0] = src;
    return op;
}

/* Rows [first, first + n) of the step. ops: KV_APPEND, ATTENTION. The job is not to be moved: ops point into it. */
static void job_make(struct attn_job *j, struct attn *a, const struct op *ops, const struct rows *rows, int first,
                     int n)
{
    *j = (struct attn_job){.a = a, .rows = {.n = n}, .group = ops[0].p.attn.group};
    j->rows.token = rows->token + first;
    j->rows.pos = rows->pos + first;
    j->rows.seq = rows->seq + first;
    for (int i = 0; i < n; i++) {
        int seen = j->rows.pos[i] / DEVICE_ATTN_SEGMENT_TOK + 1;
        j->n_segments = seen > j->n_segments ? seen : j->n_segments;
    }
    make_tensors(j, ops, first);
    j->append = op_of(&ops[0], OP_KV_APPEND, NULL, &j->k);
    j->append.src[1] = ops[0].src[1] ? &j->v : NULL;
    j->attend = op_of(&ops[1], OP_ATTENTION, &j->out, &j->q);
    j->fold = op_of(&ops[1], OP_ATTN_STATES, &j->states, &j->q);
    j->merge = op_of(&ops[1], OP_ATTN_MERGE, &j->out, &j->states);
    j->merge.dst[1] = &j->sums;
    j->host_append = op_of(&ops[0], OP_KV_APPEND, NULL, &j->host_k);
    j->host_append.src[1] = ops[0].src[1] ? &j->host_v : NULL;
    j->host_append.p.attn.is_part = true;
    j->host_fold = op_of(&ops[1], OP_ATTN_STATES, &j->host_states, &j->host_q);
}

static void set_wave(struct attn_job *j, int first, int n)
{
    struct op *ops[3] = {&j->fold, &j->merge, &j->host_fold};

    for (int i = 0; i < 3; i++) {
        ops[i]->p.attn.first = first;
        ops[i]->p.attn.n_segments = n;
        ops[i]->p.attn.is_last = first + n >= j->n_segments;
    }
}

/* Ops a and b (NULL: none), on the device or the host, with these pages. */
static int run(struct attn_job *j, struct device *dev, const struct kv_seq *seqs, const struct op *a,
               const struct op *b)
{
    struct op ops[2];
    int n = 0;

    if (a)
        ops[n++] = *a;
    if (b)
        ops[n++] = *b;
    j->rows.seqs = seqs;
    return dev->ops->run(dev, ops, n, &j->rows);
}

static int fetch(struct attn_job *j, const struct tensor *host, const struct tensor *t)
{
    struct device *dev = j->a->dev;
    uint64_t bytes = t->stride[1] * (uint64_t)j->rows.n;

    j->a->stats.down_bytes += bytes;
    return dev->ops->fetch(dev, host->data, t->data, bytes);
}

static int fetch_kv(struct attn_job *j)
{
    int rc = fetch(j, &j->host_k, &j->k);
    return rc || !j->append.src[1] ? rc : fetch(j, &j->host_v, &j->v);
}

static bool is_on_host(const struct attn_job *j, int i, int64_t page)
{
    void *const *table = j->a->on_host[j->rows.seq[i]].page[j->group];
    return table && table[page];
}

/* ---- by the device ---- */

static int run_by_device(struct attn_job *j)
{
    return run(j, j->a->dev, j->a->on_dev, &j->append, &j->attend);
}

/* ---- by both ---- */

/* Has the host computed place s * n + i of the wave? */
static bool is_host_state(const struct attn_job *j, int place)
{
    int i = place % j->rows.n, segment = j->fold.p.attn.first + place / j->rows.n;

    return j->rows.pos[i] / DEVICE_ATTN_SEGMENT_TOK >= segment &&
           is_on_host(j, i, (int64_t)segment * DEVICE_SEGMENT_PAGES);
}

/* The host's states, each to its own place among the device's, in runs of neighbours. */
static int send_states(struct attn_job *j)
{
    struct device *dev = j->a->dev;
    const uint64_t state_bytes = j->states.stride[1];
    const int n_places = j->fold.p.attn.n_segments * j->rows.n;
    int rc = 0, n_sent = 0;

    for (int place = 0, end; place < n_places && rc == 0; place = end + 1) {
        for (end = place; end < n_places && is_host_state(j, end);)
            end++;
        if (end > place)
            rc = dev->ops->send(dev, tensor_row(&j->states, place), tensor_row(&j->host_states, place),
                                (uint64_t)(end - place) * state_bytes);
        n_sent += end - place;
    }
    j->a->stats.n_host_segments += (uint64_t)n_sent;
    j->a->stats.up_bytes += (uint64_t)n_sent * state_bytes;
    return rc == 0 && n_sent > 0 ? dev->ops->meet(dev) : rc;
}

/* Queue the device's segments of a wave. */
static int begin_wave(struct attn_job *j, int first)
{
    const int most = (int)(j->a->shape.n_places / j->rows.n), left = j->n_segments - first;

    set_wave(j, first, left < most ? left : most);
    return run(j, j->a->dev, j->a->on_dev, first == 0 ? &j->append : NULL, &j->fold);
}

/* The host computes its own meanwhile, and then all are merged. */
static int end_wave(struct attn_job *j)
{
    struct attn *a = j->a;
    int rc = run(j, a->host, a->on_host, j->fold.p.attn.first == 0 ? &j->host_append : NULL, &j->host_fold);

    if (rc == 0)
        rc = send_states(j);
    return rc ? rc : run(j, a->dev, a->on_dev, &j->merge, NULL);
}

/* All that the host need not wait for. */
static int begin_by_both(struct attn_job *j)
{
    const struct device_ops *ops = j->a->dev->ops;
    int rc = fetch(j, &j->host_q, &j->q);

    if (rc == 0)
        rc = fetch_kv(j);
    if (rc == 0)
        rc = ops->fence(j->a->dev, DEVICE_OPS, j->a->fence);
    j->append.p.attn.is_part = true;
    return rc ? rc : begin_wave(j, 0);
}

static int end_by_both(struct attn_job *j)
{
    const struct device_ops *ops = j->a->dev->ops;
    bool is_there;
    int rc = ops->passed(j->a->dev, j->a->fence, true, &is_there);

    if (rc == 0)
        rc = end_wave(j);
    while (rc == 0 && !j->fold.p.attn.is_last) {
        rc = ops->sync(j->a->dev); /* the last wave's states are read by its merge, and the host's by their copy */
        if (rc == 0)
            rc = begin_wave(j, j->fold.p.attn.first + j->fold.p.attn.n_segments);
        if (rc == 0)
            rc = end_wave(j);
    }
    return rc;
}

/* ---- staged: the rows are of one sequence ---- */

/* Keys and values of the rows whose pages are the host's. */
static int append_on_host(struct attn_job *j)
{
    bool is_there;
    int rc = j->a->dev->ops->passed(j->a->dev, j->a->fence, true, &is_there);
    return rc ? rc : run(j, j->a->host, j->a->on_host, &j->host_append, NULL);
}

/* One page of the layer up to the stage; the table says so as the kernels look at it: from a page's start. */
static int send_page(struct attn_job *j, int64_t page, char *to)
{
    const struct op_attn *p = &j->fold.p.attn;
    const char *from = j->a->on_host[j->rows.seq[0]].page[j->group][page];
    uint64_t bytes = attn_shape_page_bytes(p);

    j->a->table[page] = (void *)((uintptr_t)to - p->k_off);
    j->a->stats.up_bytes += bytes;
    return j->a->dev->ops->send(j->a->dev, to, from + p->k_off, bytes);
}

/* Segments that go together: some of the device's, and up to one of the host's, which fills half of the stage. */
struct wave {
    int first, end;
    bool is_staged; /* some of its pages came up */
};

static struct wave wave_from(const struct attn_job *j, int first)
{
    const int room = (int)(j->a->shape.n_places / j->rows.n);
    struct wave w = {.first = first, .end = first};

    for (bool has_host = false; w.end < j->n_segments && w.end - first < room; w.end++) {
        if (!is_on_host(j, 0, (int64_t)w.end * DEVICE_SEGMENT_PAGES))
            continue;
        if (has_host)
            break;
        has_host = true;
    }
    return w;
}

/* The host's pages of a wave up to half of the stage. *has_appended: the rows' own keys are in their pages. */
static int send_wave(struct attn_job *j, struct wave *w, char *half, bool *has_appended)
{
    const int64_t last = j->rows.pos[j->rows.n - 1] / DEVICE_PAGE_TOK, own = j->rows.pos[0] / DEVICE_PAGE_TOK;
    int64_t begin = (int64_t)w->first * DEVICE_SEGMENT_PAGES, end = (int64_t)w->end * DEVICE_SEGMENT_PAGES;
    int rc = 0;

    for (int64_t page = begin; page < end && page <= last && rc == 0; page++) {
        if (!is_on_host(j, 0, page))
            continue;
        if (page >= own && !*has_appended) {
            rc = append_on_host(j);
            *has_appended = true;
        }
        if (rc == 0)
            rc = send_page(j, page, half + (uint64_t)(page % DEVICE_SEGMENT_PAGES) * j->a->shape.stage_page_bytes);
        j->a->stats.n_staged_segments += page % DEVICE_SEGMENT_PAGES == 0 ? (uint64_t)j->rows.n : 0;
        w->is_staged = true;
    }
    return rc;
}

/* The sequence's pages as the device shall see them: its own, and the host's as they come up. */
static void make_table(struct attn_job *j)
{
    struct attn *a = j->a;
    const int seq = j->rows.seq[0];
    const size_t n_pages = (size_t)(j->rows.pos[j->rows.n - 1] / DEVICE_PAGE_TOK) + 1;

    memcpy(a->staged, a->on_dev, (size_t)a->n_seqs * sizeof *a->staged);
    memcpy(a->table, a->on_dev[seq].page[j->group], n_pages * sizeof *a->table);
    a->staged[seq].page[j->group] = a->table;
}

/* While a wave is computed with, the next one comes up to the other half: its copies are queued before the wave's ops, so that they
 * wait only for those of the wave before, which read that half. */
static int run_waves(struct attn_job *j)
{
    struct attn *a = j->a;
    const struct device_ops *ops = a->dev->ops;
    char *half = a->dev_memory + a->shape.stage_off, *other = half + a->shape.half_bytes, *swap;
    bool has_appended = false;
    struct wave w = wave_from(j, 0);
    int rc = send_wave(j, &w, half, &has_appended);

    while (w.first < j->n_segments && rc == 0) {
        struct wave next = wave_from(j, w.end);
        if (w.is_staged)
            rc = ops->meet(a->dev);
        if (rc == 0)
            rc = send_wave(j, &next, other, &has_appended);
        set_wave(j, w.first, w.end - w.first);
        if (rc == 0)
            rc = run(j, a->dev, a->staged, &j->fold, &j->merge);
        if (rc == 0)
            rc = ops->send_after(a->dev);
        w = next;
        swap = half, half = other, other = swap;
    }
    return rc;
}

static int run_staged(struct attn_job *j)
{
    make_table(j);
    j->append.p.attn.is_part = true;
    int rc = fetch_kv(j);
    if (rc == 0)
        rc = j->a->dev->ops->fence(j->a->dev, DEVICE_OPS, j->a->fence);
    if (rc == 0)
        rc = run(j, j->a->dev, j->a->on_dev, &j->append, NULL);
    return rc ? rc : run_waves(j);
}

/* ---- the step ---- */

/* Rows from `first` on that are of one sequence. */
static int rows_of_seq(const struct rows *rows, int first)
{
    int n = 1;

    while (first + n < rows->n && rows->seq[first + n] == rows->seq[first])
        n++;
    return n;
}

static enum way way_of(const struct attn *a, const struct rows *rows, int first)
{
    if (rows_of_seq(rows, first) < a->stage_rows)
        return BY_BOTH;
    return a->has_host[rows->seq[first]] ? STAGED : BY_DEVICE;
}

/* How many rows from `first` on go one way together. */
static int stretch_of(const struct attn *a, const struct rows *rows, int first)
{
    enum way way = way_of(a, rows, first);
    int n = rows_of_seq(rows, first);

    while (way != STAGED && first + n < rows->n && way_of(a, rows, first + n) == way &&
           n + rows_of_seq(rows, first + n) <= a->shape.n_places)
        n += rows_of_seq(rows, first + n);
    return n;
}

static void count_dev(struct attn *a, const struct op *op, const struct rows *rows)
{
    for (int i = 0; i < rows->n; i++)
        for (int64_t at = 0; at <= rows->pos[i] / DEVICE_ATTN_SEGMENT_TOK; at++)
            a->stats.n_dev_segments +=
                a->on_dev[rows->seq[i]].page[op->p.attn.group][at * DEVICE_SEGMENT_PAGES] != NULL;
}

/* What was sent must not come in the middle of the next step. */
static int stop(struct attn *a, int rc)
{
    a->is_open = false;
    if (rc < 0 && a->dev->ops->meet(a->dev) == 0)
        a->dev->ops->sync(a->dev);
    return rc;
}

int attn_start(struct attn *a, const struct op *ops, const struct rows *rows)
{
    int rc = 0;

    for (int first = 0, n; first < rows->n && rc == 0; first += n) {
        n = stretch_of(a, rows, first);
        job_make(a->job, a, ops, rows, first, n);
        switch (way_of(a, rows, first)) {
        case BY_DEVICE:
            rc = run_by_device(a->job);
            break;
        case BY_BOTH:
            rc = begin_by_both(a->job);
            a->is_open = first + n == rows->n;
            if (rc == 0 && !a->is_open)
                rc = end_by_both(a->job);
            break;
        case STAGED:
            rc = run_staged(a->job);
            break;
        }
    }
    count_dev(a, &ops[1], rows);
    return rc < 0 ? stop(a, rc) : 0;
}

int attn_finish(struct attn *a)
{
    bool is_open = a->is_open;

    a->is_open = false;
    return is_open ? stop(a, end_by_both(a->job)) : 0;
}
