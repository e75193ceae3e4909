/* Owns the measuring of a GPU: matrices of the commonest type that fill a pool, one row, a block of pinned memory, two fences. */
#include "src/cli/gauge_gpu.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "src/cli/gauge.h"

#include <inttypes.h>
#include <string.h>

enum {
    N_IN = 4096, /* columns and, at most, rows of a matrix: what many models have */
    MAX_OPS = 64,
    LEAST_OPS = 2,
    FROM = 0, /* fences */
    TO = 1
};

#define BLOCK_BYTES (32 * MIB)

const struct device_step gauge_gpu_step = {.n_rows = 1, .n_seqs = 1, .n_ctx = DEVICE_PAGE_TOK, .n_fences = 2};

struct gauge_gpu {
    struct device *dev;                   /* view */
    void *pool, *scratch, *x, *y, *block; /* own: (pool_bytes), (scratch_bytes), (N_IN), (N_IN); (block_bytes) pinned */
    uint64_t pool_bytes, block_bytes;
    int n_ops;
    struct op ops[MAX_OPS];
    struct tensor w[MAX_OPS], x_row, y_row;
};

/* As many matrices as the pool holds, at least LEAST_OPS: of fewer rows where it is small. */
static void list_ops(struct gauge_gpu *g)
{
    const uint64_t row_bytes = quant_row_bytes(QUANT_Q4_K, N_IN), n_rows = g->pool_bytes / row_bytes / LEAST_OPS;
    const int n_out = n_rows < N_IN ? (int)n_rows : N_IN;

    g->n_ops = (int)(g->pool_bytes / (row_bytes * (uint64_t)n_out));
    g->n_ops = g->n_ops < MAX_OPS ? g->n_ops : MAX_OPS;
    g->x_row = tensor_make(QUANT_F32, N_IN, 1, 1, g->x);
    g->y_row = tensor_make(QUANT_F32, n_out, 1, 1, g->y);
    for (int i = 0; i < g->n_ops; i++) {
        g->w[i] = tensor_make(QUANT_Q4_K, N_IN, n_out, 1, (char *)g->pool + row_bytes * (uint64_t)n_out * (uint64_t)i);
        g->ops[i] = (struct op){.kind = OP_MATMUL, .n_w = 1};
        g->ops[i].src[0] = &g->x_row;
        g->ops[i].dst[0] = &g->y_row;
        g->ops[i].w[0] = &g->w[i];
    }
}

static int take_memory(struct gauge_gpu *g)
{
    const struct device_ops *ops = g->dev->ops;
    int rc = ops->alloc(g->dev, g->pool_bytes, &g->pool);

    if (rc == 0)
        rc = ops->alloc(g->dev, N_IN * sizeof(float), &g->x);
    if (rc == 0)
        rc = ops->alloc(g->dev, N_IN * sizeof(float), &g->y);
    if (rc < 0)
        return rc;
    list_ops(g);
    uint64_t scratch_bytes = size_up(ops->scratch_bytes(g->ops, g->n_ops, 1, 1), 64);
    rc = ops->alloc(g->dev, scratch_bytes, &g->scratch);
    if (rc == 0)
        rc = ops->set_scratch(g->dev, g->scratch, scratch_bytes);
    return rc ? rc : ops->alloc_host(g->dev, g->block_bytes, &g->block);
}

static void give_memory(struct gauge_gpu *g)
{
    const struct device_ops *ops = g->dev->ops;

    ops->release_host(g->dev, g->block);
    ops->release(g->dev, g->scratch);
    ops->release(g->dev, g->y);
    ops->release(g->dev, g->x);
    ops->release(g->dev, g->pool);
}

/* The block again and again, which may be shorter. */
static int fill_from_block(struct gauge_gpu *g, void *dst, uint64_t bytes)
{
    int rc = 0;

    for (uint64_t off = 0, n; off < bytes && rc == 0; off += n) {
        n = bytes - off < g->block_bytes ? bytes - off : g->block_bytes;
        rc = g->dev->ops->upload(g->dev, (char *)dst + off, g->block, n);
    }
    return rc;
}

/* Ordinary numbers everywhere: a GPU that has little to do may be quicker. */
static int fill(struct gauge_gpu *g)
{
    gauge_fill(g->block, g->block_bytes);
    int rc = fill_from_block(g, g->pool, g->pool_bytes);
    return rc ? rc : fill_from_block(g, g->x, N_IN * sizeof(float));
}

static int run_ops(struct gauge_gpu *g)
{
    static const int32_t zero;

    return g->dev->ops->run(g->dev, g->ops, g->n_ops,
                            &(struct rows){.n = 1, .token = &zero, .pos = &zero, .seq = &zero});
}

static int carry(struct gauge_gpu *g)
{
    return g->dev->ops->carry(g->dev, g->pool, g->block, g->block_bytes);
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

/* Bytes a second in the middle of some passes; the first, which is not counted, makes graphs and wakes clocks. */
static int rate(struct gauge_gpu *g, enum device_queue queue, int give(struct gauge_gpu *g), uint64_t bytes,
                int n_passes, double *out)
{
    double s[GAUGE_MAX_PASSES], first_s;
    int rc = time_it(g, queue, give, &first_s);

    for (int i = 0; i < n_passes && rc == 0; i++)
        rc = time_it(g, queue, give, &s[i]);
    if (rc < 0)
        return rc;
    double middle_s = clock_median(s, (size_t)n_passes);
    if (middle_s <= 0)
        return err(ERR_DEVICE, "the GPU's clock does not tell how long %" PRIu64 " bytes take", bytes);
    *out = (double)bytes / middle_s;
    return 0;
}

int gauge_gpu(struct device *dev, uint64_t pool_bytes, int n_passes, struct gauge_gpu_rates *out)
{
    const uint64_t least_bytes = LEAST_OPS * quant_row_bytes(QUANT_Q4_K, N_IN);
    struct gauge_gpu g = {.dev = dev, .pool_bytes = pool_bytes, .block_bytes = BLOCK_BYTES};

    *out = (struct gauge_gpu_rates){0};
    if (n_passes < 1 || n_passes > GAUGE_MAX_PASSES || pool_bytes < least_bytes)
        return err(ERR_ARG, "a GPU measured %d times with %" PRIu64 " bytes; 1 to %d times, and %" PRIu64 " or more",
                   n_passes, pool_bytes, GAUGE_MAX_PASSES, least_bytes);
    if (g.block_bytes > pool_bytes)
        g.block_bytes = pool_bytes / 8 * 8;
    int rc = take_memory(&g);
    if (rc == 0)
        rc = fill(&g);
    if (rc == 0)
        rc = rate(&g, DEVICE_OPS, run_ops, (uint64_t)g.n_ops * tensor_bytes(&g.w[0]), n_passes, &out->mem_bytes_per_s);
    if (rc == 0)
        rc = rate(&g, DEVICE_COPIES, carry, g.block_bytes, n_passes, &out->up_bytes_per_s);
    give_memory(&g);
    return rc;
}
