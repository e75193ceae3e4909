/* Owns the measuring: a made model's ops, memory full of numbers for their weights, and the clock. What counts is the middle of
 * some moments, seconds apart: the best one of a machine that is shared promises what no run keeps. */
#include "src/cli/gauge.h"

#include "cpu/cpu.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/shape.h"
#include "src/model/program.h"
#include "src/plan/cost.h"
#include "src/run/sample.h"

#include <math.h>
#include <string.h>

enum {
    MANY = MACHINE_MANY_ROWS,
    N_IN = 2048,  /* columns of the matrices: the width of many models, a multiple of every block */
    N_OUT = 1024, /* rows */
    MAX_OPS = 512,
    N_TINY = 64, /* ops that do next to nothing, to see what an op costs by itself */
    N_SAME = 8,  /* runs of one op in a list */
    MAX_EXPERTS = 64,
    N_TURNS = 12,
    N_DRAWN = 1 << 17, /* logits to draw from: about as many as today's vocabularies have */
    SHARE_ROWS = 64,   /* about what an expert has of a prompt */
    SHARE_OPS = 96,    /* three times what most caches hold */
};

/* Of computing alone, and of computing while a disk reads. */
#define SPELL_NS UINT64_C(80000000)

/* How a matmul of a type is timed. Workers wait for each other after each matrix: with many rows that is to be as rare as in a prompt's
 * step. With few rows reading still counts, so that no cache may hold the matrices; with many it does not. */
static const struct {
    int n_rows; /* of activations */
    int n_ops;  /* matrices, at most */
    int n_out;  /* rows of each */
} type_steps[] = {
    {1, MAX_OPS, N_OUT}, {MACHINE_SOME_ROWS, 24, 4 * N_OUT}, {MACHINE_FEW_ROWS, 24, 4 * N_OUT}, {MANY, 1, 4 * N_OUT}};
enum { N_TYPE_STEPS = sizeof type_steps / sizeof *type_steps };

/* One matrix of the largest type. */
#define LEAST_POOL_BYTES ((uint64_t)N_IN * 4 * N_OUT * sizeof(float))

/* All ops there are but the rare ones: a dense layer, then one with experts and a shared one. */
static const struct shape shape = {.name = "gauge",
                                   .arch = "dots1",
                                   .n_layer = 2,
                                   .n_embd = N_IN,
                                   .n_head = 32,
                                   .n_head_kv = 4,
                                   .head_dim = 128,
                                   .n_expert = MAX_EXPERTS,
                                   .n_used = 8,
                                   .n_ff = 768,
                                   .n_dense = 1,
                                   .n_vocab = 2048,
                                   .n_ctx = 4096};

struct gauge {
    struct machine *m;  /* view */
    struct device *dev; /* own, as all below */
    struct model *model;
    struct program *program; /* of MANY rows */
    char *pool;              /* (pool_bytes) weights */
    uint64_t pool_bytes, scratch_bytes, pages_bytes;
    void *arena, *scratch, *pages;
    struct op *ops;            /* (MAX_OPS) the list that is timed */
    struct tensor *tensors;    /* (MAX_OPS) weights of a list */
    struct tensor x, y;        /* views: what its matmuls read and write */
    void **page;               /* (MANY / DEVICE_PAGE_TOK) */
    int32_t *ids;              /* (4 * MANY): token, pos, seq, out_row */
    int32_t *slot;             /* (MANY * n_used) */
    struct op_expert *experts; /* (MAX_OPS) */
    struct kv_seq seq;
    struct sample *sample;
    int pass;
    size_t n_passes;
    /* Seconds of a list in each pass: one tiny op and N_TINY; matmuls; other ops with one row and with MANY */
    double draw_s[GAUGE_MAX_PASSES], tiny_s[2][GAUGE_MAX_PASSES], type_s[QUANT_ID_END][N_TYPE_STEPS][GAUGE_MAX_PASSES],
        op_s[OP_N_KIND][2][GAUGE_MAX_PASSES];
};

/* ---- set-up ---- */

/* Scales are ordinary numbers whatever the type: halves from 1/8 to 2, floats from 2^-31 to 1, no byte of an exponent is large. */
void gauge_fill(void *p, uint64_t bytes)
{
    uint64_t x = 1, *words = p;

    for (uint64_t i = 0; i < bytes / sizeof x; i++) {
        x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407); /* Knuth's MMIX */
        words[i] = (x & UINT64_C(0x0f0f0f0f0f0f0f0f)) | UINT64_C(0x3030303030303030);
    }
}

static int take_memory(struct gauge *g, uint64_t pool_bytes)
{
    const struct program *p = g->program;
    const struct device_ops *ops = g->dev->ops;
    int n_pages = MANY / DEVICE_PAGE_TOK;

    g->pool_bytes = pool_bytes;
    g->scratch_bytes = size_up(ops->scratch_bytes(p->ops, p->n_ops, MANY, g->m->n_cores), 64);
    g->pages_bytes = (uint64_t)n_pages * p->kv.page_bytes[0];
    g->pool = mem_map(pool_bytes, MEM_OTHER);
    g->arena = mem_map(p->arena_bytes, MEM_OTHER);
    g->scratch = mem_map(g->scratch_bytes, MEM_OTHER);
    g->pages = mem_map(g->pages_bytes, MEM_OTHER);
    g->ops = mem_zalloc(MAX_OPS, sizeof *g->ops, MEM_OTHER);
    g->tensors = mem_zalloc(MAX_OPS, sizeof *g->tensors, MEM_OTHER);
    g->page = mem_zalloc((size_t)n_pages, sizeof *g->page, MEM_OTHER);
    g->ids = mem_zalloc(4 * MANY, sizeof *g->ids, MEM_OTHER);
    g->slot = mem_zalloc((size_t)MANY * (size_t)shape.n_used, sizeof *g->slot, MEM_OTHER);
    g->experts = mem_zalloc(MAX_OPS, sizeof *g->experts, MEM_OTHER);
    if (!g->pool || !g->arena || !g->scratch || !g->pages || !g->ops || !g->tensors || !g->page || !g->ids ||
        !g->slot || !g->experts)
        return err(ERR_NOMEM, "measuring kernels: %llu MiB", (unsigned long long)(pool_bytes / MIB));
    for (int i = 0; i < n_pages; i++)
        g->page[i] = (char *)g->pages + (uint64_t)i * p->kv.page_bytes[0];
    g->seq.page[0] = g->page;
    for (int i = 0; i < MANY; i++)
        g->ids[MANY + i] = i; /* positions; tokens, sequences and rows of logits are 0 */
    gauge_fill(g->pool, pool_bytes);
    gauge_fill(g->arena, p->arena_bytes);
    return ops->set_scratch(g->dev, g->scratch, g->scratch_bytes);
}

static void close_gauge(struct gauge *g)
{
    sample_free(g->sample);
    mem_free(g->experts);
    mem_free(g->slot);
    mem_free(g->ids);
    mem_free(g->page);
    mem_free(g->tensors);
    mem_free(g->ops);
    mem_unmap(g->pages, g->pages_bytes, MEM_OTHER);
    mem_unmap(g->scratch, g->scratch_bytes, MEM_OTHER);
    mem_unmap(g->arena, g->program ? g->program->arena_bytes : 0, MEM_OTHER);
    mem_unmap(g->pool, g->pool_bytes, MEM_OTHER);
    program_free(g->program);
    model_close(g->model);
    if (g->dev)
        g->dev->ops->close(g->dev);
}

static int open_gauge(struct gauge *g, struct machine *m, uint64_t pool_bytes)
{
    *g = (struct gauge){.m = m};
    int rc = cpu_open(&(struct cpu_opts){.n_threads = m->n_cores, .pin = true}, &g->dev);
    if (!rc)
        rc = shape_open(&shape, &g->model);
    if (!rc)
        rc = program_make(&(struct program_args){.model = g->model, .n_rows = MANY, .n_out = 1, .kv_type = QUANT_F16},
                          &g->program);
    if (!rc)
        rc = take_memory(g, pool_bytes);
    if (!rc) /* as ferry draws where nobody says otherwise */
        rc = sample_make(
            &(struct sample_opts){
                .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1},
            N_DRAWN, &g->sample);
    if (rc)
        return rc;
    program_bind_arena(g->program, g->arena);
    for (int i = 0; i < g->model->n_weights; i++)
        g->program->weights[i].data = g->pool;
    return 0;
}

/* ---- the clock ---- */

static int run_ops(struct gauge *g, int n_ops, int n_rows)
{
    const struct rows rows = {.n = n_rows,
                              .n_out = 1,
                              .n_prompt = n_rows,
                              .token = g->ids,
                              .pos = g->ids + MANY,
                              .seq = g->ids + 2 * (size_t)MANY,
                              .out_row = g->ids + 3 * (size_t)MANY,
                              .seqs = &g->seq};
    return g->dev->ops->run(g->dev, g->ops, n_ops, &rows);
}

/* Seconds of one run of the first n_ops of the list with n_rows rows, when another has warmed caches and woken threads. */
static int time_ops(struct gauge *g, int n_ops, int n_rows, double *out_s)
{
    int rc = run_ops(g, n_ops, n_rows);
    if (rc)
        return rc;
    uint64_t start_ns = clock_ns();
    rc = run_ops(g, n_ops, n_rows);
    *out_s = (double)(clock_ns() - start_ns) * 1e-9;
    return rc;
}

/* ---- matmul ---- */

/* A list of matmuls over fresh weights: as many as the pool holds, at most n; returns how many. */
static int list_matmuls(struct gauge *g, enum quant_type type, int n_out, int n)
{
    uint64_t bytes = quant_row_bytes(type, N_IN) * (uint64_t)n_out, room_bytes = size_up(bytes, 64);

    g->x = tensor_make(QUANT_F32, N_IN, MANY, 1, (char *)g->arena + g->program->reg_off[ARCH_X]);
    g->y = tensor_make(QUANT_F32, n_out, MANY, 1, (char *)g->arena + g->program->reg_off[ARCH_Y]); /* the widest */
    int n_fit = (int)(g->pool_bytes / room_bytes);
    n = n < n_fit ? n : n_fit;
    n = n < MAX_OPS ? n : MAX_OPS;
    for (int i = 0; i < n; i++) {
        g->tensors[i] = tensor_make(type, N_IN, n_out, 1, g->pool + (uint64_t)i * room_bytes);
        g->ops[i] = (struct op){.kind = OP_MATMUL, .n_w = 1};
        g->ops[i].src[0] = &g->x;
        g->ops[i].dst[0] = &g->y;
        g->ops[i].w[0] = &g->tensors[i];
    }
    return n;
}

/* One op that does next to nothing, and many. */
static int gauge_tiny(struct gauge *g)
{
    double *s[2] = {&g->tiny_s[0][g->pass], &g->tiny_s[1][g->pass]};

    int n = list_matmuls(g, QUANT_Q8_0, 8, N_TINY);
    int rc = time_ops(g, 1, 1, s[0]);
    return rc ? rc : time_ops(g, n, 1, s[1]);
}

/* What a matmul costs beside its weights, and what calling the device costs. */
static void settle_tiny(struct gauge *g)
{
    int n = list_matmuls(g, QUANT_Q8_0, 8, N_TINY);
    double one_s = clock_median(g->tiny_s[0], g->n_passes),
           op_s = (clock_median(g->tiny_s[1], g->n_passes) - one_s) / (n - 1);

    g->m->ops[OP_MATMUL].op_s = op_s > 0 ? op_s : 0;
    g->m->run_s = one_s > op_s ? one_s - op_s : 0;
}

static int gauge_type(struct gauge *g, enum quant_type type)
{
    int rc = 0;

    for (int i = 0; i < N_TYPE_STEPS && !rc; i++) {
        int n = list_matmuls(g, type, type_steps[i].n_out, type_steps[i].n_ops);
        if (!g->dev->ops->can(&g->ops[0]))
            return 0;
        rc = time_ops(g, n, type_steps[i].n_rows, &g->type_s[type][i][g->pass]);
    }
    return rc;
}

static void settle_type(struct gauge *g, enum quant_type type)
{
    double weights_per_s[N_TYPE_STEPS];

    for (int i = 0; i < N_TYPE_STEPS; i++) {
        int n = list_matmuls(g, type, type_steps[i].n_out, type_steps[i].n_ops);
        double s = clock_median(g->type_s[type][i], g->n_passes), own_s = g->m->run_s + n * g->m->ops[OP_MATMUL].op_s;
        if (s <= 0) /* the device cannot */
            return;
        weights_per_s[i] = (double)n * N_IN * type_steps[i].n_out / (s > 2 * own_s ? s - own_s : s / 2);
    }
    g->m->kernels[type] = (struct machine_kernel){
        .token_bytes_per_s = weights_per_s[0] / N_IN * (double)quant_row_bytes(type, N_IN),
        .some_ops_per_s = 2 * weights_per_s[1] * MACHINE_SOME_ROWS,
        .few_ops_per_s = 2 * weights_per_s[2] * MACHINE_FEW_ROWS,
        .many_ops_per_s = 2 * weights_per_s[3] * MANY,
    };
}

static bool is_weight(int type)
{
    const struct quant_info *info = quant_info(type);
    return info && info->act != QUANT_ACT_NONE;
}

/* ---- the other ops ---- */

/* Rows go round the experts; each op of the list has experts of its own, as far as the pool goes. */
static int list_moe(struct gauge *g, const struct op *op, int n_rows)
{
    int n_slots = n_rows * shape.n_used, n_experts = n_slots < MAX_EXPERTS ? n_slots : MAX_EXPERTS;
    int n_ops = MAX_EXPERTS / n_experts;
    uint64_t off = 0;

    for (int i = 0; i < n_slots; i++)
        g->slot[i] = i;
    for (int e = 0; e < n_ops * n_experts; e++) {
        int in_op = e % n_experts, first = (int)((int64_t)n_slots * in_op / n_experts);
        g->experts[e] = (struct op_expert){.scale = {1, 1, 1}, .first = first};
        g->experts[e].n = (int)((int64_t)n_slots * (in_op + 1) / n_experts) - first;
        for (int i = 0; i < 3; i++) {
            uint64_t bytes = size_up(op->w[i]->stride[2], 64);
            off = off + bytes <= g->pool_bytes ? off : 0;
            g->experts[e].w[i] = g->pool + off;
            off += bytes;
        }
    }
    for (int i = 0; i < n_ops; i++) {
        g->ops[i] = *op;
        g->ops[i].p.moe.experts = g->experts + (size_t)i * (size_t)n_experts;
        g->ops[i].p.moe.n_experts = n_experts;
        g->ops[i].p.moe.slot = g->slot;
    }
    return n_ops;
}

static int list_op(struct gauge *g, const struct op *op, int n_rows)
{
    if (op->kind == OP_MOE)
        return list_moe(g, op, n_rows);
    for (int i = 0; i < N_SAME; i++)
        g->ops[i] = *op;
    return N_SAME;
}

/* One of each kind. */
static const struct op *next_op(const struct gauge *g, bool *is_done, int *i)
{
    for (; *i < g->program->n_ops; ++*i) {
        const struct op *op = &g->program->ops[*i];
        if (op->rows != OP_ROWS_ALL || op->kind == OP_MATMUL || op->kind == OP_GET_ROWS || is_done[op->kind])
            continue;
        is_done[op->kind] = true;
        return op;
    }
    return NULL;
}

static int gauge_op(struct gauge *g, const struct op *op)
{
    int rc = time_ops(g, list_op(g, op, 1), 1, &g->op_s[op->kind][0][g->pass]);
    return rc ? rc : time_ops(g, list_op(g, op, MANY), MANY, &g->op_s[op->kind][1][g->pass]);
}

/* Seconds of one op, of a list that took list_s, without the weights that it reads. */
static double op_alone_s(struct gauge *g, const struct op *op, int n_rows, double list_s)
{
    int n = list_op(g, op, n_rows);
    double s = (list_s - g->m->run_s) / n;

    if (op->kind != OP_MOE)
        return s;
    for (int e = 0; e < g->ops[0].p.moe.n_experts; e++)
        for (int i = 0; i < 3; i++)
            s -= cost_matmul_s(g->m, g->m->n_cores, op->w[i], g->experts[e].n);
    return s;
}

static void settle_op(struct gauge *g, const struct op *op)
{
    struct machine_op *out = &g->m->ops[op->kind];
    double one_s = op_alone_s(g, op, 1, clock_median(g->op_s[op->kind][0], g->n_passes));
    double many_s = op_alone_s(g, op, MANY, clock_median(g->op_s[op->kind][1], g->n_passes));
    double one = cost_op_units(op, 1, 0), many = cost_op_units(op, MANY, 0);

    out->unit_s = many_s > one_s ? (many_s - one_s) / (many - one) : 0;
    out->op_s = one_s > one * out->unit_s ? one_s - one * out->unit_s : 0;
}

/* ---- drawing ---- */

/* From numbers of the pool, each time others. */
static int gauge_draw(struct gauge *g)
{
    const float *logits = (const float *)g->pool;
    uint64_t start_ns = 0;
    int32_t token;
    int rc = 0;

    for (int i = 0; i < 2 && !rc; i++) { /* the first warms caches */
        start_ns = clock_ns();
        rc = sample_draw(g->sample, logits + (size_t)i * N_DRAWN, NULL, 0, &token);
    }
    g->draw_s[g->pass] = (double)(clock_ns() - start_ns) * 1e-9 / N_DRAWN;
    return rc;
}

static int run_pass(struct gauge *g)
{
    bool is_done[OP_N_KIND] = {false};
    int i = 0;

    int rc = gauge_tiny(g);
    if (!rc)
        rc = gauge_draw(g);
    for (int type = 0; type < QUANT_ID_END && !rc; type++)
        rc = is_weight(type) ? gauge_type(g, (enum quant_type)type) : 0;
    for (const struct op *op; !rc && (op = next_op(g, is_done, &i));)
        rc = gauge_op(g, op);
    return rc;
}

static void settle(struct gauge *g)
{
    bool is_done[OP_N_KIND] = {false};
    int i = 0;

    settle_tiny(g);
    g->m->draw_s = clock_median(g->draw_s, g->n_passes);
    for (int type = 0; type < QUANT_ID_END; type++)
        if (is_weight(type))
            settle_type(g, (enum quant_type)type);
    for (const struct op *op; (op = next_op(g, is_done, &i));)
        settle_op(g, op);
}

int gauge_run(struct machine *m, uint64_t pool_bytes, int n_passes)
{
    struct gauge g;

    if (n_passes < 1 || n_passes > GAUGE_MAX_PASSES)
        return err(ERR_ARG, "kernels measured %d times; 1 to %d can be", n_passes, GAUGE_MAX_PASSES);
    memset(m->kernels, 0, sizeof m->kernels);
    memset(m->ops, 0, sizeof m->ops);
    int rc = open_gauge(&g, m, pool_bytes > LEAST_POOL_BYTES ? pool_bytes : LEAST_POOL_BYTES);
    for (g.n_passes = (size_t)n_passes; !rc && g.pass < n_passes; g.pass++)
        rc = run_pass(&g);
    if (!rc)
        settle(&g);
    close_gauge(&g);
    return rc;
}

/* ---- beside a disk that reads ---- */

/* Seconds of a run of the list of n_ops matmuls with n_rows rows, on average over a while. */
static int spend(struct gauge *g, int n_rows, int n_ops, double *out_s)
{
    uint64_t start_ns = clock_ns(), ns = 0;
    int n = 0, rc = 0;

    for (; !rc && ns < SPELL_NS; n++) {
        rc = run_ops(g, n_ops, n_rows);
        ns = clock_ns() - start_ns;
    }
    *out_s = (double)ns * 1e-9 / n;
    return rc;
}

/* The speed of matmuls while the disk reads, as a share of that while it does not; by turns, since machines change every second. */
static int gauge_share(struct gauge *g, struct machine_reader *reader, int n_rows, int n_ops, double *out)
{
    double alone_s = 0, beside_s = 0, s = 0;
    int rc = 0;

    n_ops = list_matmuls(g, QUANT_Q4_K, N_OUT, n_ops);
    for (int turn = 0; turn < N_TURNS && !rc; turn++) {
        rc = spend(g, n_rows, n_ops, &s);
        alone_s += s;
        if (!rc)
            rc = machine_reader_go(reader);
        if (!rc)
            rc = spend(g, n_rows, n_ops, &s);
        beside_s += s;
        int rest_rc = machine_reader_rest(reader);
        rc = rc ? rc : rest_rc;
    }
    *out = fmin(alone_s / beside_s, 1);
    return rc;
}

int gauge_beside_disk(struct machine *m, uint64_t pool_bytes, const char *path)
{
    struct machine_disk *disk = &m->disks[m->disk];
    struct machine_reader *reader = NULL;
    struct gauge g;

    int rc = open_gauge(&g, m, pool_bytes > LEAST_POOL_BYTES ? pool_bytes : LEAST_POOL_BYTES);
    if (!rc)
        rc = machine_reader_open(path, g.pool_bytes, &reader);
    if (!rc)
        rc = gauge_share(&g, reader, 1, MAX_OPS, &disk->token_share);
    if (!rc)
        rc = gauge_share(&g, reader, SHARE_ROWS, SHARE_OPS, &disk->many_share);
    machine_reader_close(reader);
    close_gauge(&g);
    return rc;
}
