/* Owns the measuring of a GPU: matrices that fill a pool, rows of activations, pages, a block of pinned memory, two fences. Products are
 * timed with two types, the commonest of those that integer dots multiply, and one of those that float dots do: others of either
 * kind run the same kernels but for the unpacking. */
#include "src/cli/gauge_gpu.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "src/cli/gauge.h"
#include "src/plan/cost.h"

#include <inttypes.h>
#include <string.h>

enum {
    N_IN = 4096, /* columns of a matrix: what many models have */
    MAX_OPS = 64,
    LEAST_OPS = 2,
    MANY = MACHINE_GPU_MANY_ROWS,
    HEAD_DIM = 128,
    HEADS_KV = 8, /* query heads that share one of keys and values */
    N_PAGES = MANY / DEVICE_PAGE_TOK,
    FROM = 0, /* fences */
    TO = 1
};

/* Of all activations there may be. */
#define ROWS_BYTES ((uint64_t)MANY * N_IN * sizeof(float))

/* Of the block, all of which is carried if the pool has room for it. */
#define BLOCK_BYTES (4 * ROWS_BYTES)

const struct device_step gauge_gpu_step = {.n_rows = MANY, .n_seqs = 1, .n_ctx = MANY, .n_fences = 2};

/* What products are timed with. A row is bound by reading weights. Of a few rows a launch has as many blocks as of a layer's experts: so
 * many rows of weights that results fill what there is for them. Of many the GPU is full with what a layer's matrices have, and which are
 * cached does not matter. */
enum { LIST_ROW, LIST_FEW, LIST_MANY, N_LISTS };
static const struct {
    int n_rows, n_ops; /* of activations; matrices, at most */
    int n_out;         /* rows of each, at most */
} lists[N_LISTS] = {
    [LIST_ROW] = {1, MAX_OPS, N_IN},
    [LIST_FEW] = {MACHINE_GPU_FEW_ROWS, 8, MANY *N_IN / MACHINE_GPU_FEW_ROWS},
    [LIST_MANY] = {MANY, 8, N_IN},
};

struct gauge_gpu {
    struct device *dev;                           /* view */
    void *pool, *scratch, *x, *y, *pages, *block; /* own: (pool_bytes), (scratch_bytes), (ROWS_BYTES), the same;
                                                   * (N_PAGES, page_bytes); (BLOCK_BYTES) pinned */
    uint64_t pool_bytes, carry_bytes, page_bytes;
    int n_passes, n_rows, n_ops; /* of the list that is timed: rows of activations, ops */
    struct op ops[MAX_OPS];
    struct tensor w[MAX_OPS], x_rows, y_rows;
    int32_t zeros[MANY], pos[MANY];
    void *page[N_PAGES];
    struct kv_seq seq;
};

/* As many matrices as the pool holds, at least LEAST_OPS: of fewer rows where it is small. */
static void list_products(struct gauge_gpu *g, enum quant_type type, int list)
{
    const uint64_t row_bytes = quant_row_bytes(type, N_IN), n_most = g->pool_bytes / row_bytes / LEAST_OPS;
    const int n_out = n_most < (uint64_t)lists[list].n_out ? (int)n_most : lists[list].n_out;
    const uint64_t n_fit = g->pool_bytes / (row_bytes * (uint64_t)n_out);

    g->n_rows = lists[list].n_rows;
    g->n_ops = n_fit < (uint64_t)lists[list].n_ops ? (int)n_fit : lists[list].n_ops;
    g->x_rows = tensor_make(QUANT_F32, N_IN, g->n_rows, 1, g->x);
    g->y_rows = tensor_make(QUANT_F32, n_out, g->n_rows, 1, g->y);
    for (int i = 0; i < g->n_ops; i++) {
        g->w[i] = tensor_make(type, N_IN, n_out, 1, (char *)g->pool + row_bytes * (uint64_t)n_out * (uint64_t)i);
        g->ops[i] = (struct op){.kind = OP_MATMUL, .n_w = 1};
        g->ops[i].src[0] = &g->x_rows;
        g->ops[i].dst[0] = &g->y_rows;
        g->ops[i].w[0] = &g->w[i];
    }
}

/* A prompt that attends to itself, with as many heads as a matrix has results for. */
static void list_attention(struct gauge_gpu *g)
{
    list_products(g, QUANT_Q4_K, LIST_MANY);
    const int n_wanted = (int)g->y_rows.ne[0] / HEAD_DIM, n_head_kv = n_wanted > HEADS_KV ? n_wanted / HEADS_KV : 1;
    const int n_head = n_wanted > HEADS_KV ? n_head_kv * HEADS_KV : 1;
    const uint64_t v_off = (uint64_t)n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(QUANT_F16, HEAD_DIM);

    g->page_bytes = 2 * v_off;
    g->n_ops = 1;
    g->x_rows = tensor_make(QUANT_F32, (int64_t)n_head * HEAD_DIM, MANY, 1, g->x);
    g->y_rows = tensor_make(QUANT_F32, (int64_t)n_head * HEAD_DIM, MANY, 1, g->y);
    g->ops[0] = (struct op){.kind = OP_ATTENTION};
    g->ops[0].src[0] = &g->x_rows;
    g->ops[0].dst[0] = &g->y_rows;
    g->ops[0].p.attn = (struct op_attn){.n_head = n_head,
                                        .n_head_kv = n_head_kv,
                                        .head_dim_k = HEAD_DIM,
                                        .head_dim_v = HEAD_DIM,
                                        .scale = 0.0883883476f, /* 1 / sqrt(HEAD_DIM) */
                                        .kv_type = QUANT_F16,
                                        .v_off = v_off};
}

static uint64_t scratch_bytes(struct gauge_gpu *g)
{
    const struct device_ops *ops = g->dev->ops;

    list_attention(g);
    uint64_t attn_bytes = ops->scratch_bytes(g->ops, 1, MANY, 1), most_bytes = attn_bytes;
    for (int list = 0; list < N_LISTS; list++) {
        list_products(g, QUANT_Q4_K, list);
        uint64_t bytes = ops->scratch_bytes(g->ops, g->n_ops, g->n_rows, 1);
        most_bytes = bytes > most_bytes ? bytes : most_bytes;
    }
    return size_up(most_bytes, 64);
}

static int take_memory(struct gauge_gpu *g)
{
    const struct device_ops *ops = g->dev->ops;
    const uint64_t bytes = scratch_bytes(g);
    int rc = ops->alloc(g->dev, g->pool_bytes, &g->pool);

    if (rc == 0)
        rc = ops->alloc(g->dev, ROWS_BYTES, &g->x);
    if (rc == 0)
        rc = ops->alloc(g->dev, ROWS_BYTES, &g->y);
    if (rc == 0)
        rc = ops->alloc(g->dev, N_PAGES * g->page_bytes, &g->pages);
    if (rc == 0)
        rc = ops->alloc(g->dev, bytes, &g->scratch);
    if (rc == 0)
        rc = ops->set_scratch(g->dev, g->scratch, bytes);
    if (rc == 0)
        rc = ops->alloc_host(g->dev, BLOCK_BYTES, &g->block);
    if (rc < 0)
        return rc;
    for (int i = 0; i < MANY; i++)
        g->pos[i] = i;
    for (int i = 0; i < N_PAGES; i++)
        g->page[i] = (char *)g->pages + (uint64_t)i * g->page_bytes;
    g->seq.page[0] = g->page;
    return 0;
}

static void give_memory(struct gauge_gpu *g)
{
    const struct device_ops *ops = g->dev->ops;

    ops->release_host(g->dev, g->block);
    ops->release(g->dev, g->scratch);
    ops->release(g->dev, g->pages);
    ops->release(g->dev, g->y);
    ops->release(g->dev, g->x);
    ops->release(g->dev, g->pool);
}

/* The block again and again, which may be shorter. */
static int fill_from_block(struct gauge_gpu *g, void *dst, uint64_t bytes)
{
    int rc = 0;

    for (uint64_t off = 0, n; off < bytes && rc == 0; off += n) {
        n = bytes - off < BLOCK_BYTES ? bytes - off : BLOCK_BYTES;
        rc = g->dev->ops->upload(g->dev, (char *)dst + off, g->block, n);
    }
    return rc;
}

/* Ordinary numbers everywhere: a GPU that has little to do may be quicker. */
static int fill(struct gauge_gpu *g)
{
    gauge_fill(g->block, BLOCK_BYTES);
    int rc = fill_from_block(g, g->pool, g->pool_bytes);

    if (rc == 0)
        rc = fill_from_block(g, g->x, ROWS_BYTES);
    return rc ? rc : fill_from_block(g, g->pages, N_PAGES * g->page_bytes);
}

static int run_ops(struct gauge_gpu *g)
{
    const struct rows rows = {
        .n = g->n_rows, .n_prompt = g->n_rows, .token = g->zeros, .pos = g->pos, .seq = g->zeros, .seqs = &g->seq};

    return g->dev->ops->run(g->dev, g->ops, g->n_ops, &rows);
}

static int carry(struct gauge_gpu *g)
{
    return g->dev->ops->carry(g->dev, g->pool, g->block, g->carry_bytes);
}

/* Seconds of what a queue is given, from when it begins. */
static int time_it(struct gauge_gpu *g, enum device_queue queue, int give(struct gauge_gpu *g), double *out_s)
{
    const struct device_ops *ops = g->dev->ops;
    bool is_passed;
    uint64_t ns = 0;
    int rc = ops->fence(g->dev, queue, FROM);

    if (rc == 0)
        rc = give(g);
    if (rc == 0)
        rc = ops->fence(g->dev, queue, TO);
    if (rc == 0)
        rc = ops->passed(g->dev, TO, true, &is_passed);
    if (rc == 0)
        rc = ops->span_ns(g->dev, FROM, TO, &ns);
    *out_s = (double)ns * 1e-9;
    return rc;
}

/* Seconds in the middle of some passes; the first, which is not counted, makes graphs and wakes clocks. */
static int middle(struct gauge_gpu *g, enum device_queue queue, int give(struct gauge_gpu *g), const char *what,
                  double *out_s)
{
    double s[GAUGE_MAX_PASSES], first_s;
    int rc = time_it(g, queue, give, &first_s);

    for (int i = 0; i < g->n_passes && rc == 0; i++)
        rc = time_it(g, queue, give, &s[i]);
    if (rc < 0)
        return rc;
    *out_s = clock_median(s, (size_t)g->n_passes);
    return *out_s > 0 ? 0 : err(ERR_DEVICE, "the GPU's clock does not tell how long %s take", what);
}

/* Multiplications and additions a second. */
static int gauge_products(struct gauge_gpu *g, enum quant_type type, int list, double *ops_per_s)
{
    double s;

    list_products(g, type, list);
    int rc = middle(g, DEVICE_OPS, run_ops, "products", &s);
    if (rc == 0)
        *ops_per_s = 2.0 * g->n_ops * g->n_rows * (double)(g->w[0].ne[0] * g->w[0].ne[1]) / s;
    return rc;
}

static int gauge_type(struct gauge_gpu *g, enum quant_type type, struct machine_gpu_products *out)
{
    int rc = gauge_products(g, type, LIST_FEW, &out->few_ops_per_s);
    return rc ? rc : gauge_products(g, type, LIST_MANY, &out->many_ops_per_s);
}

static int gauge_attention(struct gauge_gpu *g, double *unit_s)
{
    double s;

    list_attention(g);
    int rc = middle(g, DEVICE_OPS, run_ops, "queries", &s);
    if (rc == 0)
        *unit_s = s / cost_op_units(&g->ops[0], MANY, 0);
    return rc;
}

static int gauge_memory(struct gauge_gpu *g, struct gauge_gpu_rates *out)
{
    double mem_s, up_s;

    list_products(g, QUANT_Q4_K, LIST_ROW);
    int rc = middle(g, DEVICE_OPS, run_ops, "weights", &mem_s);
    if (rc == 0)
        rc = middle(g, DEVICE_COPIES, carry, "copies", &up_s);
    if (rc < 0)
        return rc;
    out->mem_bytes_per_s = (double)g->n_ops * (double)tensor_bytes(&g->w[0]) / mem_s;
    out->up_bytes_per_s = (double)g->carry_bytes / up_s;
    return 0;
}

static int gauge_all(struct gauge_gpu *g, struct gauge_gpu_rates *out)
{
    int rc = take_memory(g);

    if (rc == 0)
        rc = fill(g);
    if (rc == 0)
        rc = gauge_memory(g, out);
    if (rc == 0)
        rc = gauge_type(g, QUANT_Q4_K, &out->prompt.ints);
    if (rc == 0)
        rc = gauge_type(g, QUANT_F16, &out->prompt.floats);
    return rc ? rc : gauge_attention(g, &out->prompt.attn_unit_s);
}

int gauge_gpu(struct device *dev, uint64_t pool_bytes, int n_passes, struct gauge_gpu_rates *out)
{
    const uint64_t least_bytes = LEAST_OPS * quant_row_bytes(QUANT_F16, N_IN);
    struct gauge_gpu g = {.dev = dev, .pool_bytes = pool_bytes, .n_passes = n_passes};

    *out = (struct gauge_gpu_rates){0};
    if (n_passes < 1 || n_passes > GAUGE_MAX_PASSES || pool_bytes < least_bytes)
        return err(ERR_ARG, "a GPU measured %d times with %" PRIu64 " bytes; 1 to %d times, and %" PRIu64 " or more",
                   n_passes, pool_bytes, GAUGE_MAX_PASSES, least_bytes);
    g.carry_bytes = pool_bytes < BLOCK_BYTES ? pool_bytes : BLOCK_BYTES;
    int rc = gauge_all(&g, out);
    give_memory(&g);
    return rc;
}
