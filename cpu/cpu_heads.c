/* MATMUL_HEADS: a matrix for each head. Activations are quantized once per form, row and head (per row, where heads share it), then tiles
 * of a head's weight rows times blocks of tokens are claimed. */
#include "cpu/walk.h"

#include "src/base/size.h"

/* A head's matrix is small, some 64 KiB: with so many of its rows at once there are enough tiles, each longer than a claim. */
#define TILE_ROWS 64
/* Activations of one block of tokens: what the L2 cache of a small core holds beside the weights. */
#define BLOCK_BYTES (384 * KIB)

enum { N_FORM = 4 }; /* values of enum quant_act */

/* One of the op's matrices stacks, and how it is cut. */
struct cut {
    int64_t n_tiles, n_blocks; /* of a head; of the step's rows */
    int block_tok;
    uint64_t act_off, act_bytes; /* where its form of the activations begins, and how long a head's row of it is */
};

static enum quant_act form_of(const struct tensor *w)
{
    return quant_info((int)w->type)->act;
}

/* Rows of activations for a row of the step. */
static int n_act(const struct op *op)
{
    return op->p.heads.is_shared ? 1 : op->p.heads.n_head;
}

/* Weights of one form may read different lengths of a row: each has its own codes. Returns the bytes of all. */
static uint64_t cut_all(const struct op *op, int n_rows, struct cut *cut)
{
    uint64_t off = 0;

    for (int i = 0; i < op->n_w; i++) {
        const struct tensor *w = op->w[i];
        struct cut *c = &cut[i];
        c->act_bytes = kern_act_bytes(form_of(w), w->ne[0]);
        bool is_same = i > 0 && form_of(w) == form_of(op->w[i - 1]) && w->ne[0] == op->w[i - 1]->ne[0];
        c->act_off = is_same ? cut[i - 1].act_off : off;
        off += is_same ? 0 : (uint64_t)n_rows * (uint64_t)n_act(op) * c->act_bytes;
        c->n_tiles = (w->ne[1] + TILE_ROWS - 1) / TILE_ROWS;
        c->block_tok = (int)(BLOCK_BYTES / c->act_bytes) + 1;
        c->n_blocks = (n_rows + c->block_tok - 1) / c->block_tok;
    }
    return off;
}

static struct walk_need need(const struct op *op, int n_rows, int n_threads)
{
    struct cut cut[OP_MAX_IO];

    (void)n_threads;
    return (struct walk_need){KERN_MAT_SCRATCH_BYTES, cut_all(op, n_rows, cut)};
}

static void prepare(const struct walk *w, int worker, const struct op *op, int begin, int end)
{
    struct cut cut[OP_MAX_IO];
    int64_t head_len = op->src[0]->ne[0] / n_act(op);

    (void)worker;
    cut_all(op, walk_n(w, op), cut);
    for (int i = 0; i < op->n_w; i++) {
        if (i > 0 && cut[i].act_off == cut[i - 1].act_off)
            continue;
        for (int64_t at = (int64_t)begin * n_act(op); at < (int64_t)end * n_act(op); at++)
            w->kern->act_row(form_of(op->w[i]), (const float *)op->src[0]->data + at * head_len,
                             w->shared + cut[i].act_off + (uint64_t)at * cut[i].act_bytes, op->w[i]->ne[0]);
    }
}

/* Item `item` of weight i. */
static void run_item(const struct walk *w, int worker, const struct op *op, int i, const struct cut *c, int64_t item)
{
    const struct tensor *weight = op->w[i];
    int tok = (int)(item % c->n_blocks) * c->block_tok, left_tok = walk_n(w, op) - tok;
    int64_t row = item / c->n_blocks % c->n_tiles * TILE_ROWS, left_rows = weight->ne[1] - row;
    int64_t head = item / c->n_blocks / c->n_tiles, head_len = op->dst[i]->ne[0] / op->p.heads.n_head;
    int64_t act = (int64_t)tok * n_act(op) + (op->p.heads.is_shared ? 0 : head);
    struct kern_mat_args args = {
        .w = (const char *)tensor_slice(weight, head) + (uint64_t)row * weight->stride[1],
        .w_stride = weight->stride[1],
        .n_rows = left_rows < TILE_ROWS ? (int)left_rows : TILE_ROWS,
        .x = w->shared + c->act_off + (uint64_t)act * c->act_bytes,
        .x_stride = (uint64_t)n_act(op) * c->act_bytes,
        .n_tok = left_tok < c->block_tok ? left_tok : c->block_tok,
        .n_cols = weight->ne[0],
        .dst = (float *)tensor_row(op->dst[i], tok) + head * head_len + row,
        .dst_stride = op->dst[i]->ne[0],
        .scratch = walk_own(w, worker),
    };
    w->kern->mat[weight->type](&args);
}

static void run(const struct walk *w, int worker, const struct op *op)
{
    struct cut cut[OP_MAX_IO];
    int64_t n_of[OP_MAX_IO], n_items = 0;

    cut_all(op, walk_n(w, op), cut);
    for (int i = 0; i < op->n_w; i++) {
        n_of[i] = op->p.heads.n_head * cut[i].n_tiles * cut[i].n_blocks;
        n_items += n_of[i];
    }
    for (int64_t item; (item = pool_claim(w->pool, worker, n_items)) < n_items;) {
        int i = 0;
        for (; item >= n_of[i]; i++)
            item -= n_of[i];
        run_item(w, worker, op, i, &cut[i], item);
    }
}

const struct walk_shared cpu_heads_shared = {.need = need, .prepare = prepare, .run = run};
