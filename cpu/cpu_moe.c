/* MOE: every listed expert computes down(act(gate(x), up(x))) for its slots. Slots stand grouped by expert in op_moe.slot;
 * scratch rows follow that order, so that an expert's rows are neighbours for the kernels:
 *   1 quantize the slots' source rows           3 quantize the hidden rows
 *   2 gate and up, act(gate, up)                4 down, into the rows of the slots
 * Steps 2 and 4 are cut in items of (expert, weight rows, tokens): an expert that got nearly all tokens is shared out, too. */
#include "cpu/walk.h"

#include "src/base/size.h"

#include <string.h>

/* Tokens and weight rows of one item at most: the results of an item wait in a worker's scratch. */
#define ITEM_TOK 64
#define ITEM_ROWS 64
/* With so few items per worker the pieces are smaller: 16 rows of a small expert are still 8 KiB and more. */
#define FEW_ITEMS 8
#define ITEM_ROWS_FEW 16
/* Rows quantized per claim. */
#define CLAIM_ROWS 4

enum { GATE, UP, DOWN, N_FORM = 4 };

/* Where things lie in shared scratch, and how the work is cut. */
struct layout {
    uint64_t x_off[N_FORM];    /* (n_slots) rows of d in each form that gate and up read */
    uint64_t x_bytes[N_FORM];  /* of one row; 0: form not used */
    uint64_t h_off, h_bytes;   /* (n_slots) rows of ff */
    uint64_t hq_off, hq_bytes; /* the same, quantized for down */
    uint64_t up_off, down_off; /* (n_expert + 1) int64: first item of each listed expert */
    uint64_t total_bytes;
};

static enum quant_act form_of(const struct op *op, int i)
{
    return quant_info((int)op->w[i]->type)->act;
}

static uint64_t place(uint64_t *total, uint64_t bytes)
{
    uint64_t off = *total;
    *total = size_up(off + bytes, 64);
    return off;
}

static struct layout layout_of(const struct op *op, int n_rows)
{
    struct layout l = {0};
    uint64_t n_slots = (uint64_t)n_rows * (uint64_t)op->p.moe.k;
    uint64_t items_bytes = (uint64_t)(op->w[0]->ne[2] + 1) * sizeof(int64_t);
    int64_t n_embd = op->w[GATE]->ne[0], n_ff = op->w[DOWN]->ne[0];

    for (int i = GATE; i <= UP; i++) {
        enum quant_act form = form_of(op, i);
        if (l.x_bytes[form])
            continue;
        l.x_bytes[form] = kern_act_bytes(form, n_embd);
        l.x_off[form] = place(&l.total_bytes, n_slots * l.x_bytes[form]);
    }
    l.h_bytes = size_up((uint64_t)n_ff * sizeof(float), 64);
    l.h_off = place(&l.total_bytes, n_slots * l.h_bytes);
    l.hq_bytes = kern_act_bytes(form_of(op, DOWN), n_ff);
    l.hq_off = place(&l.total_bytes, n_slots * l.hq_bytes);
    l.up_off = place(&l.total_bytes, items_bytes);
    l.down_off = place(&l.total_bytes, items_bytes);
    return l;
}

static struct walk_need need(const struct op *op, int n_rows, int n_threads)
{
    (void)n_threads;
    return (struct walk_need){KERN_MAT_SCRATCH_BYTES + ITEM_TOK * ITEM_ROWS * sizeof(float),
                              layout_of(op, n_rows).total_bytes};
}

/* One MOE being run by one worker. */
struct job {
    const struct walk *w;
    const struct op *op;
    const struct op_moe *p;
    struct layout l;
    int worker, n_rows;
    int item_rows[2];  /* of gate and up; of down */
    int64_t *items[2]; /* view, shared: (n_experts + 1) */
};

static int64_t n_items(const struct op_expert *e, int64_t n_out, int item_rows)
{
    return (int64_t)((e->n + ITEM_TOK - 1) / ITEM_TOK) * ((n_out + item_rows - 1) / item_rows);
}

static int choose_item_rows(const struct job *j, int64_t n_out)
{
    int64_t n = 0;

    for (int e = 0; e < j->p->n_experts; e++)
        n += n_items(&j->p->experts[e], n_out, ITEM_ROWS);
    return n < (int64_t)FEW_ITEMS * j->w->n_threads ? ITEM_ROWS_FEW : ITEM_ROWS;
}

static struct job job_of(const struct walk *w, int worker, const struct op *op)
{
    struct job j = {.w = w, .op = op, .p = &op->p.moe, .worker = worker, .n_rows = walk_n(w, op)};

    j.l = layout_of(op, j.n_rows);
    j.item_rows[0] = choose_item_rows(&j, op->w[GATE]->ne[1]);
    j.item_rows[1] = choose_item_rows(&j, op->w[DOWN]->ne[1]);
    j.items[0] = (int64_t *)(w->shared + j.l.up_off);
    j.items[1] = (int64_t *)(w->shared + j.l.down_off);
    return j;
}

/* Step 1 for place `at` of the slot order. */
static void quantize_x(const struct job *j, int64_t at)
{
    const float *x = tensor_row(j->op->src[0], j->p->slot[at] / j->p->k);

    for (int form = 0; form < N_FORM; form++)
        if (j->l.x_bytes[form])
            j->w->kern->act_row((enum quant_act)form, x,
                                j->w->shared + j->l.x_off[form] + (uint64_t)at * j->l.x_bytes[form],
                                j->op->src[0]->ne[0]);
}

static void quantize_h(const struct job *j, int64_t at)
{
    j->w->kern->act_row(form_of(j->op, DOWN), (const float *)(j->w->shared + j->l.h_off + (uint64_t)at * j->l.h_bytes),
                        j->w->shared + j->l.hq_off + (uint64_t)at * j->l.hq_bytes, j->op->w[DOWN]->ne[0]);
}

typedef void place_fn(const struct job *j, int64_t at);

/* fn for the places of the listed experts, of which those before `begin` and from `end` on are left out. */
static void for_places(const struct job *j, place_fn *fn, int64_t begin, int64_t end)
{
    int64_t first = 0;

    for (int e = 0; e < j->p->n_experts && first < end; first += j->p->experts[e++].n)
        for (int64_t i = begin > first ? begin - first : 0; i < j->p->experts[e].n && first + i < end; i++)
            fn(j, j->p->experts[e].first + i);
}

/* fn for every place, claimed by the workers in small runs. */
static void share_places(const struct job *j, place_fn *fn)
{
    int64_t n_places = 0, n_runs, run;

    for (int e = 0; e < j->p->n_experts; e++)
        n_places += j->p->experts[e].n;
    n_runs = (n_places + CLAIM_ROWS - 1) / CLAIM_ROWS;
    while ((run = pool_claim(j->w->pool, j->worker, n_runs)) < n_runs)
        for_places(j, fn, run * CLAIM_ROWS, (run + 1) * CLAIM_ROWS);
}

/* One row only: all slots read the same activations, which stand at place 0. */
static bool is_single(const struct job *j)
{
    return j->n_rows == 1;
}

static void begin(const struct walk *w, int worker, const struct op *op)
{
    struct job j = job_of(w, worker, op);

    for (int side = 0; side < 2; side++) {
        int64_t n_out = op->w[side ? DOWN : GATE]->ne[1];
        j.items[side][0] = 0;
        for (int e = 0; e < j.p->n_experts; e++)
            j.items[side][e + 1] = j.items[side][e] + n_items(&j.p->experts[e], n_out, j.item_rows[side]);
    }
    if (is_single(&j) && j.p->n_experts) {
        const float *x = tensor_row(op->src[0], 0);
        for (int form = 0; form < N_FORM; form++)
            if (j.l.x_bytes[form])
                w->kern->act_row((enum quant_act)form, x, w->shared + j.l.x_off[form], op->src[0]->ne[0]);
    }
}

/* One piece of work: rows [row, row + n_rows) of an expert's matrices for the slots [at, at + n_tok) of the slot order. */
struct piece {
    const struct op_expert *e;
    int64_t row, at;
    int n_rows, n_tok;
};

static struct piece piece_of(const struct job *j, int side, int64_t item)
{
    const int64_t *items = j->items[side];
    int64_t n_out = j->op->w[side ? DOWN : GATE]->ne[1];
    int lo = 0, hi = j->p->n_experts;

    while (hi - lo > 1) { /* items[lo] <= item < items[hi] */
        int mid = (lo + hi) / 2;
        if (items[mid] <= item)
            lo = mid;
        else
            hi = mid;
    }
    struct piece p = {.e = &j->p->experts[lo]};
    int64_t n_blocks = (p.e->n + ITEM_TOK - 1) / ITEM_TOK, in_expert = item - items[lo];
    int64_t tok = in_expert % n_blocks * ITEM_TOK;
    p.row = in_expert / n_blocks * j->item_rows[side];
    p.at = p.e->first + tok;
    p.n_rows = (int)(n_out - p.row < j->item_rows[side] ? n_out - p.row : j->item_rows[side]);
    p.n_tok = p.e->n - tok < ITEM_TOK ? (int)(p.e->n - tok) : ITEM_TOK;
    return p;
}

/* Matrix i of the piece, times its scale, plus its bias. */
static void multiply(const struct job *j, const struct piece *p, int i, const void *x, uint64_t x_stride, float *dst,
                     int64_t dst_stride)
{
    const struct tensor *w = j->op->w[i];
    struct kern_mat_args args = {
        .w = (const char *)p->e->w[i] + (uint64_t)p->row * w->stride[1],
        .w_stride = w->stride[1],
        .n_rows = p->n_rows,
        .x = x,
        .x_stride = x_stride,
        .n_tok = p->n_tok,
        .n_cols = w->ne[0],
        .dst = dst,
        .dst_stride = dst_stride,
        .scratch = walk_own(j->w, j->worker),
    };
    j->w->kern->mat[w->type](&args);
    if (p->e->scale[i] != 1.0f)
        for (int t = 0; t < p->n_tok; t++)
            j->w->kern->scale(dst + t * dst_stride, p->e->scale[i], dst + t * dst_stride, p->n_rows);
    if (p->e->bias[i])
        for (int t = 0; t < p->n_tok; t++)
            j->w->kern->add(dst + t * dst_stride, p->e->bias[i] + p->row, dst + t * dst_stride, p->n_rows);
}

/* The worker's room for the results of an item (ITEM_TOK, ITEM_ROWS). */
static float *results_of(const struct job *j)
{
    return (float *)((char *)walk_own(j->w, j->worker) + KERN_MAT_SCRATCH_BYTES);
}

static void run_up(const struct job *j, const struct piece *p)
{
    float *h = (float *)(j->w->shared + j->l.h_off + (uint64_t)p->at * j->l.h_bytes) + p->row, *up = results_of(j);
    int64_t h_stride = (int64_t)(j->l.h_bytes / sizeof(float));

    for (int i = GATE; i <= UP; i++) {
        enum quant_act form = form_of(j->op, i);
        const char *x = j->w->shared + j->l.x_off[form] + (is_single(j) ? 0 : (uint64_t)p->at * j->l.x_bytes[form]);
        multiply(j, p, i, x, j->l.x_bytes[form], i == GATE ? h : up, i == GATE ? h_stride : ITEM_ROWS);
    }
    for (int t = 0; t < p->n_tok; t++)
        j->w->kern->glu(j->p->act, h + t * h_stride, up + t * ITEM_ROWS, h + t * h_stride, p->n_rows);
}

static void run_down(const struct job *j, const struct piece *p)
{
    float *y = results_of(j);

    multiply(j, p, DOWN, j->w->shared + j->l.hq_off + (uint64_t)p->at * j->l.hq_bytes, j->l.hq_bytes, y, ITEM_ROWS);
    for (int t = 0; t < p->n_tok; t++)
        memcpy((float *)tensor_row(j->op->dst[0], j->p->slot[p->at + t]) + p->row, y + t * ITEM_ROWS,
               (size_t)p->n_rows * sizeof *y);
}

static void run_pieces(const struct job *j, int side)
{
    int64_t n = j->items[side][j->p->n_experts];

    for (int64_t item; (item = pool_claim(j->w->pool, j->worker, n)) < n;) {
        struct piece p = piece_of(j, side, item);
        if (side)
            run_down(j, &p);
        else
            run_up(j, &p);
    }
}

static void quantize_h_alone(int worker, void *arg)
{
    (void)worker;
    for_places(arg, quantize_h, 0, INT64_MAX);
}

static void run(const struct walk *w, int worker, const struct op *op)
{
    struct job j = job_of(w, worker, op);

    if (!is_single(&j)) {
        share_places(&j, quantize_x);
        pool_barrier(w->pool, worker, NULL, NULL);
    }
    run_pieces(&j, 0);
    if (is_single(&j)) { /* k rows at most: not worth a barrier */
        pool_barrier(w->pool, worker, quantize_h_alone, &j);
    } else {
        pool_barrier(w->pool, worker, NULL, NULL);
        share_places(&j, quantize_h);
        pool_barrier(w->pool, worker, NULL, NULL);
    }
    run_pieces(&j, 1);
}

const struct walk_shared cpu_moe_shared = {.need = need, .begin = begin, .run = run};
