/* Ops of recurrent layers: they read and write a record of each sequence. A stretch is a sequence's rows of the step; stretches are cut
 * into columns, which workers take, and each walks its columns down the rows. */
#include "cpu/walk.h"

#include "cpu/kern_math.h"

#include <math.h>
#include <string.h>

/* Columns of an item: of CONV few enough that a row keeps all cores busy; of DELTA_NET so many that a row of S is whole cache lines. */
enum { CONV_COLUMNS = 128, DELTA_COLUMNS = 64 };

struct stretches {
    int n;
    int first[]; /* (n + 1) rows */
};

static struct walk_need need(const struct op *op, int n_rows, int n_threads)
{
    (void)op, (void)n_threads;
    return (struct walk_need){(DEVICE_MAX_CONV + 1) * CONV_COLUMNS * sizeof(float),
                              sizeof(struct stretches) + ((uint64_t)n_rows + 1) * sizeof(int)};
}

static void begin(const struct walk *w, int worker, const struct op *op)
{
    struct stretches *s = (struct stretches *)(void *)w->shared;
    const int32_t *seq = w->rows->seq;

    (void)worker, (void)op;
    s->n = 0;
    for (int row = 0; row < w->rows->n; row++)
        if (row == 0 || seq[row] != seq[row - 1])
            s->first[s->n++] = row;
    s->first[s->n] = w->rows->n;
}

/* An item: columns [col, col + n) of part `part` of rows [first, end). */
struct item {
    int first, end, part, col, n;
    const float *from; /* the records, at the layer's place; from is NULL where the sequence begins */
    float *to;
};

/* Which item that is of a list in which each stretch has n_parts parts of `width` columns. */
static struct item item_at(const struct walk *w, int64_t number, int n_parts, int width, int most, uint64_t off)
{
    const struct stretches *s = (const struct stretches *)(const void *)w->shared;
    int n_blocks = (width + most - 1) / most, stretch = (int)(number / ((int64_t)n_parts * n_blocks));
    struct item it = {.first = s->first[stretch], .end = s->first[stretch + 1]};
    const struct kv_seq *seq = &w->rows->seqs[w->rows->seq[it.first]];

    it.part = (int)(number / n_blocks % n_parts);
    it.col = (int)(number % n_blocks) * most;
    it.n = width - it.col < most ? width - it.col : most;
    it.from = seq->record ? (const float *)(const void *)(seq->record + off) : NULL;
    it.to = (float *)(void *)(seq->next_record + off);
    return it;
}

static int64_t n_items(const struct walk *w, int n_parts, int width, int most)
{
    return (int64_t)((const struct stretches *)(const void *)w->shared)->n * n_parts * ((width + most - 1) / most);
}

/* ---- CONV ---- */

/* The item's columns of `row`; of one before the first, what the record has. */
static const float *conv_row(const struct op *op, const struct item *it, int row, const float *zeros)
{
    const int64_t channels = op->src[0]->ne[0];
    const int kept = (int)op->w[0]->ne[0] - 1;

    if (row >= it->first)
        return (const float *)tensor_row(op->src[0], row) + it->col;
    return it->from ? it->from + (kept + row - it->first) * channels + it->col : zeros;
}

static void conv_item(const struct walk *w, const struct op *op, const struct item *it, float *own)
{
    const int k = (int)op->w[0]->ne[0];
    const float *weights = (const float *)op->w[0]->data + (int64_t)it->col * k;
    float *zeros = own + (int64_t)k * it->n;
    struct kern_conv_args args = {.w = own, .k = k, .n = it->n};

    memset(zeros, 0, (size_t)it->n * sizeof *zeros);
    for (int i = 0; i < it->n; i++)
        for (int j = 0; j < k; j++)
            own[j * it->n + i] = weights[i * k + j];
    for (int row = it->first; row < it->end; row++) {
        for (int j = 0; j < k; j++)
            args.x[j] = conv_row(op, it, row - k + 1 + j, zeros);
        args.out = (float *)tensor_row(op->dst[0], row) + it->col;
        w->kern->conv(&args);
    }
    for (int j = 0; j < k - 1; j++)
        memcpy(it->to + j * op->src[0]->ne[0] + it->col, conv_row(op, it, it->end - k + 1 + j, zeros),
               (size_t)it->n * sizeof *zeros);
}

static void conv_run(const struct walk *w, int worker, const struct op *op)
{
    int width = (int)op->src[0]->ne[0];
    int64_t n = n_items(w, 1, width, CONV_COLUMNS);

    for (int64_t i; (i = pool_claim(w->pool, worker, n)) < n;) {
        struct item it = item_at(w, i, 1, width, CONV_COLUMNS, op->p.conv.off);
        conv_item(w, op, &it, walk_own(w, worker));
    }
}

/* ---- DELTA_NET ---- */

static float value_of(const struct op *op, int n_src, int row, int head)
{
    return ((const float *)tensor_row(op->src[n_src], row))[head];
}

static void delta_row(const struct walk *w, const struct op *op, const struct item *it, int row, const float *from,
                      float *to)
{
    const struct op_delta *p = &op->p.delta;
    const float *x = tensor_row(op->src[0], row), *bias = op->w[0]->data, *rate = op->w[1]->data;
    const int head = it->part, head_k = p->is_tiled ? head % p->n_head_k : head / (p->n_head_v / p->n_head_k);
    const int64_t keys = (int64_t)p->n_head_k * p->head_dim_k, out = (int64_t)head * p->head_dim_v + it->col;

    w->kern->delta(&(struct kern_delta_args){
        .head_dim_k = p->head_dim_k,
        .n = it->n,
        .from = from,
        .to = to,
        .stride = p->head_dim_v,
        .q = x + (int64_t)head_k * p->head_dim_k,
        .k = x + keys + (int64_t)head_k * p->head_dim_k,
        .v = x + 2 * keys + out,
        .decay = kern_v_exp(rate[head] * kern_v_softplus(value_of(op, 1, row, head) + bias[head])),
        .beta = kern_v_sigmoid(value_of(op, 2, row, head)),
        .scale = 1.0f / sqrtf((float)p->head_dim_k),
        .out = (float *)tensor_row(op->dst[0], row) + out});
}

static void delta_item(const struct walk *w, const struct op *op, const struct item *it)
{
    const struct op_delta *p = &op->p.delta;
    const int64_t at = (int64_t)it->part * p->head_dim_k * p->head_dim_v + it->col;
    float *to = it->to + at;

    for (int i = 0; i < p->head_dim_k && !it->from; i++)
        memset(to + (int64_t)i * p->head_dim_v, 0, (size_t)it->n * sizeof *to);
    for (int row = it->first; row < it->end; row++)
        delta_row(w, op, it, row, it->from && row == it->first ? it->from + at : to, to);
}

static void delta_run(const struct walk *w, int worker, const struct op *op)
{
    const struct op_delta *p = &op->p.delta;
    int64_t n = n_items(w, p->n_head_v, p->head_dim_v, DELTA_COLUMNS);

    for (int64_t i; (i = pool_claim(w->pool, worker, n)) < n;) {
        struct item it = item_at(w, i, p->n_head_v, p->head_dim_v, DELTA_COLUMNS, p->off);
        delta_item(w, op, &it);
    }
}

const struct walk_shared cpu_record_conv = {.need = need, .begin = begin, .run = conv_run};

const struct walk_shared cpu_record_delta = {.need = need, .begin = begin, .run = delta_run};
