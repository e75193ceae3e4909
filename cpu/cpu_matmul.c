/* MATMUL: activations are quantized once per row and form, then tiles of weight rows times blocks of tokens are claimed.
 * How it is cut depends on the machine and the step; no result does (kern.h).
 * With DEVICE_PREFILL_BLAS the first n_prompt rows go through blas.h instead, in items of their own. */
#include "cpu/walk.h"

#include "cpu/blas.h"

#include "src/base/size.h"

/* A claim costs about 0.1 us and 8 KiB of weights about 1 us at the memory speed of one core; 64 KiB stay in the L2 cache
 * next to the activations while the tokens of a block pass by. */
#define TILE_MIN_BYTES (8 * KIB)
#define TILE_MAX_BYTES (64 * KIB)
/* Claims per worker that even out who is late. */
#define TILES_PER_WORKER 12
/* Kernels take weight rows in groups; a tile that is no multiple leaves them a slow rest. */
#define TILE_ROW_STEP 32
/* Activations of one block of tokens: what the L2 cache of a small core holds beside the weights. */
#define BLOCK_BYTES (384 * KIB)
#define BLOCK_TOK_STEP 16

/* Items of OpenBLAS tiles per worker that even out who is late, if the tokens allow it. */
#define BLAS_ITEMS 4

enum { N_FORM = 4 }; /* values of enum quant_act */

static enum quant_act form_of(const struct op *op, int i)
{
    return quant_info((int)op->w[i]->type)->act;
}

/* Where the rows of every form that the op needs start in the shared scratch; returns the bytes of all. */
static uint64_t place_forms(const struct op *op, int n_rows, uint64_t *off, bool *is_used)
{
    uint64_t bytes = 0;

    for (int form = 0; form < N_FORM; form++) {
        off[form] = bytes;
        is_used[form] = false;
        for (int i = 0; i < op->n_w; i++)
            is_used[form] |= form_of(op, i) == (enum quant_act)form;
        if (is_used[form])
            bytes += (uint64_t)n_rows * kern_act_bytes((enum quant_act)form, op->src[0]->ne[0]);
    }
    return bytes;
}

static struct walk_need need(const struct op *op, int n_rows, int n_threads)
{
    uint64_t off[N_FORM];
    bool is_used[N_FORM];

    (void)n_threads;
    uint64_t own_bytes = KERN_MAT_SCRATCH_BYTES > BLAS_SCRATCH_BYTES ? KERN_MAT_SCRATCH_BYTES : BLAS_SCRATCH_BYTES;
    return (struct walk_need){own_bytes, place_forms(op, n_rows, off, is_used)};
}

/* A router's logits decide which experts a row gets, so they come from float dots for every row. */
static bool is_router(const struct walk *w, const struct op *op)
{
    for (const struct op *later = op + 1; later < w->ops + w->n_ops && later <= op + 3; later++)
        if (later->kind == OP_ROUTE && later->src[0]->data == op->dst[0]->data)
            return true;
    return false;
}

/* Rows that go through OpenBLAS. Rows picked for their logits are few, and would mostly be padding. */
static int n_blas_rows(const struct walk *w, const struct op *op)
{
    if (w->prefill != DEVICE_PREFILL_BLAS || op->rows != OP_ROWS_ALL || is_router(w, op))
        return 0;
    return w->rows->n_prompt < w->rows->n ? w->rows->n_prompt : w->rows->n;
}

static void prepare(const struct walk *w, int worker, const struct op *op, int begin, int end)
{
    uint64_t off[N_FORM];
    bool is_used[N_FORM];
    int64_t n_cols = op->src[0]->ne[0];

    (void)worker;
    place_forms(op, walk_n(w, op), off, is_used);
    begin = begin < n_blas_rows(w, op) ? n_blas_rows(w, op) : begin;
    for (int form = 0; form < N_FORM; form++) {
        uint64_t stride = kern_act_bytes((enum quant_act)form, n_cols);
        for (int i = begin; i < end && is_used[form]; i++)
            w->kern->act_row((enum quant_act)form, tensor_row(op->src[0], i),
                             w->shared + off[form] + (uint64_t)i * stride, n_cols);
    }
}

/* How one weight matrix is cut. */
struct cut {
    int64_t n_tiles;
    int tile_rows, n_blocks, block_tok;
};

static int64_t n_cut(const struct cut *c)
{
    return c->n_tiles * c->n_blocks;
}

/* The rows after the first n_blas. */
static struct cut cut_weight(const struct walk *w, const struct op *op, int i, uint64_t all_bytes, int n_blas)
{
    const struct tensor *weight = op->w[i];
    uint64_t tile_bytes = all_bytes / (uint64_t)(w->n_threads * TILES_PER_WORKER);
    uint64_t act_bytes = kern_act_bytes(form_of(op, i), weight->ne[0]);
    int n_tok = walk_n(w, op) - n_blas;
    struct cut c;

    tile_bytes = tile_bytes < TILE_MIN_BYTES   ? TILE_MIN_BYTES
                 : tile_bytes > TILE_MAX_BYTES ? TILE_MAX_BYTES
                                               : tile_bytes;
    c.tile_rows = (int)size_up(tile_bytes / weight->stride[1] + 1, TILE_ROW_STEP);
    c.n_tiles = (weight->ne[1] + c.tile_rows - 1) / c.tile_rows;
    c.block_tok = (int)size_up(BLOCK_BYTES / act_bytes + 1, BLOCK_TOK_STEP);
    c.n_blocks = (n_tok + c.block_tok - 1) / c.block_tok;
    return c;
}

static void run_tile(const struct walk *w, int worker, const struct op *op, int i, const struct cut *c, int64_t item,
                     int n_blas)
{
    const struct tensor *weight = op->w[i];
    uint64_t off[N_FORM], stride = kern_act_bytes(form_of(op, i), weight->ne[0]);
    bool is_used[N_FORM];
    int n_tok = walk_n(w, op), tok = n_blas + (int)(item % c->n_blocks) * c->block_tok;
    int64_t row = item / c->n_blocks * c->tile_rows, n_rows = weight->ne[1] - row;

    place_forms(op, n_tok, off, is_used);
    struct kern_mat_args args = {
        .w = tensor_row(weight, row),
        .w_stride = weight->stride[1],
        .n_rows = n_rows < c->tile_rows ? (int)n_rows : c->tile_rows,
        .x = w->shared + off[form_of(op, i)] + (uint64_t)tok * stride,
        .x_stride = stride,
        .n_tok = n_tok - tok < c->block_tok ? n_tok - tok : c->block_tok,
        .n_cols = weight->ne[0],
        .dst = (float *)tensor_row(op->dst[i], tok) + row,
        .dst_stride = (int64_t)(op->dst[i]->stride[1] / sizeof(float)),
        .scratch = walk_own(w, worker),
    };
    w->kern->mat[weight->type](&args);
}

static int blas_tiles(const struct walk *w, int n_blas)
{
    int n = 0;

    for (int tok = 0; tok < n_blas; tok = blas_tile_end(w->rows->pos, w->rows->seq, tok, n_blas))
        n++;
    return n;
}

/* Weight rows of one item times all tokens, so that the rows are dequantized once; with few such items, times a part.
 * Blocks of tokens are counted in tiles here. */
static struct cut cut_blas(const struct walk *w, const struct op *op, int i, int n_tok_tiles)
{
    int64_t n_tiles = (op->w[i]->ne[1] + BLAS_ROWS - 1) / BLAS_ROWS, n_wanted = (int64_t)BLAS_ITEMS * w->n_threads;
    int64_t n_blocks = (n_wanted + n_tiles - 1) / n_tiles;
    struct cut c = {.n_tiles = n_tiles, .tile_rows = BLAS_ROWS};

    n_blocks = n_blocks < n_tok_tiles ? n_blocks : n_tok_tiles;
    c.block_tok = n_blocks ? (int)((n_tok_tiles + n_blocks - 1) / n_blocks) : 1;
    c.n_blocks = (n_tok_tiles + c.block_tok - 1) / c.block_tok;
    return c;
}

/* The row at which tile number `tile` begins. */
static int tile_begin(const struct walk *w, int n_blas, int tile)
{
    int tok = 0;

    for (int i = 0; i < tile && tok < n_blas; i++)
        tok = blas_tile_end(w->rows->pos, w->rows->seq, tok, n_blas);
    return tok;
}

static void run_blas(const struct walk *w, int worker, const struct op *op, int i, const struct cut *c, int64_t item,
                     int n_blas)
{
    const struct tensor *weight = op->w[i];
    int tile = (int)(item % c->n_blocks) * c->block_tok;
    int tok = tile_begin(w, n_blas, tile);
    int64_t row = item / c->n_blocks * c->tile_rows, n_rows = weight->ne[1] - row;
    struct blas_args args = {
        .type = weight->type,
        .w = tensor_row(weight, row),
        .w_stride = weight->stride[1],
        .n_rows = n_rows < c->tile_rows ? (int)n_rows : c->tile_rows,
        .x = tensor_row(op->src[0], tok),
        .x_stride = (int64_t)(op->src[0]->stride[1] / sizeof(float)),
        .n_tok = tile_begin(w, n_blas, tile + c->block_tok) - tok,
        .pos = w->rows->pos + tok,
        .seq = w->rows->seq + tok,
        .n_cols = weight->ne[0],
        .dst = (float *)tensor_row(op->dst[i], tok) + row,
        .dst_stride = (int64_t)(op->dst[i]->stride[1] / sizeof(float)),
        .scratch = walk_own(w, worker),
    };
    blas_rows(&args);
}

static void run(const struct walk *w, int worker, const struct op *op)
{
    int n_blas = n_blas_rows(w, op), n_tok_tiles = blas_tiles(w, n_blas);
    struct cut blas[OP_MAX_IO], dots[OP_MAX_IO];
    uint64_t all_bytes = 0;
    int64_t n_items = 0, item;

    for (int i = 0; i < op->n_w; i++)
        all_bytes += (uint64_t)op->w[i]->ne[1] * op->w[i]->stride[1];
    for (int i = 0; i < op->n_w; i++) {
        blas[i] = cut_blas(w, op, i, n_tok_tiles);
        dots[i] = cut_weight(w, op, i, all_bytes, n_blas);
        n_items += n_cut(&blas[i]) + n_cut(&dots[i]);
    }
    while ((item = pool_claim(w->pool, worker, n_items)) < n_items) {
        int i = 0;
        for (; item >= n_cut(&blas[i]) + n_cut(&dots[i]); i++)
            item -= n_cut(&blas[i]) + n_cut(&dots[i]);
        if (item < n_cut(&blas[i]))
            run_blas(w, worker, op, i, &blas[i], item, n_blas);
        else
            run_tile(w, worker, op, i, &dots[i], item - n_cut(&blas[i]), n_blas);
    }
}

const struct walk_shared cpu_matmul_shared = {.need = need, .prepare = prepare, .run = run};
