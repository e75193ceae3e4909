/* MATMUL: activations are quantized once per row and form, then tiles of weight rows times blocks of tokens are claimed.
 * How it is cut depends on the machine and the step; no result does (kern.h). */
#include "cpu/walk.h"

#include "src/base/size.h"

/* A claim costs about 0.1 us and 8 KiB of weights about 1 us at the memory speed of one core; 64 KiB stay in the L2 cache
 * next to the activations while the tokens of a block pass by. */
#define TILE_MIN_BYTES (8 * KIB)
#define TILE_MAX_BYTES (64 * KIB)
/* Claims per worker that even out who is late. */
#define TILES_PER_WORKER 12
/* Kernels take weight rows in groups; a tile that is no multiple leaves them a slow rest. */
#define TILE_ROW_STEP 8
/* Activations of one block of tokens: what the L2 cache of a small core holds beside the weights. */
#define BLOCK_BYTES (384 * KIB)
#define BLOCK_TOK_STEP 16

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
    return (struct walk_need){KERN_MAT_SCRATCH_BYTES, place_forms(op, n_rows, off, is_used)};
}

static void prepare(const struct walk *w, int worker, const struct op *op, int begin, int end)
{
    uint64_t off[N_FORM];
    bool is_used[N_FORM];
    int64_t n_cols = op->src[0]->ne[0];

    (void)worker;
    place_forms(op, walk_n(w, op), off, is_used);
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

static struct cut cut_weight(const struct walk *w, const struct op *op, int i, uint64_t all_bytes)
{
    const struct tensor *weight = op->w[i];
    uint64_t tile_bytes = all_bytes / (uint64_t)(w->n_threads * TILES_PER_WORKER);
    uint64_t act_bytes = kern_act_bytes(form_of(op, i), weight->ne[0]);
    int n_tok = walk_n(w, op);
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

static void run_tile(const struct walk *w, int worker, const struct op *op, int i, const struct cut *c, int64_t item)
{
    const struct tensor *weight = op->w[i];
    uint64_t off[N_FORM], stride = kern_act_bytes(form_of(op, i), weight->ne[0]);
    bool is_used[N_FORM];
    int n_tok = walk_n(w, op), tok = (int)(item % c->n_blocks) * c->block_tok;
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

static void run(const struct walk *w, int worker, const struct op *op)
{
    struct cut cuts[OP_MAX_IO];
    uint64_t all_bytes = 0;
    int64_t first = 0;

    for (int i = 0; i < op->n_w; i++)
        all_bytes += (uint64_t)op->w[i]->ne[1] * op->w[i]->stride[1];
    for (int i = 0; i < op->n_w; i++)
        cuts[i] = cut_weight(w, op, i, all_bytes);
    int64_t item = pool_claim(w->pool);
    for (int i = 0; i < op->n_w; i++) {
        int64_t n_items = cuts[i].n_tiles * cuts[i].n_blocks;
        for (; item < first + n_items; item = pool_claim(w->pool))
            run_tile(w, worker, op, i, &cuts[i], item - first);
        first += n_items;
    }
}

const struct walk_shared cpu_matmul_shared = {.need = need, .prepare = prepare, .run = run};
