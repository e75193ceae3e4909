/* Kernels of cuda/ on shapes of models that people run, each on memory that the L2 cache does not hold. What they are measured by:
 * a kernel that only reads, one that only multiplies. */
#include "tests/gpu/bench.h"

#include "cuda/launch.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "tests/gpu/roof.h"

#include <stdio.h>
#include <string.h>

/* ---- roofs ---- */

struct roof {
    cudaError_t (*launch)(const struct roof_args *a, cudaStream_t stream);
    struct roof_args args;
};

static cudaError_t run_roof(const struct bench *b, void *ctx, int i)
{
    const struct roof *r = ctx;

    (void)i;
    return r->launch(&r->args, b->stream);
}

int bench_kernels_roofs(struct bench *b)
{
    const int n_blocks = b->card.n_multiprocessors * 8, n_rounds = b->is_quick ? 8 : 100000;
    const uint64_t read_bytes = b->dev_bytes / 2 / 16 * 16;
    struct roof roofs[3] = {
        {roof_read,
         {.in = b->dev, .out = (uint32_t *)(b->dev + read_bytes), .n_bytes = read_bytes, .n_blocks = n_blocks}},
        {roof_dp4a, {.out = (uint32_t *)b->dev, .n_rounds = n_rounds, .n_blocks = n_blocks}},
        {roof_mma, {.out = (uint32_t *)b->dev, .n_rounds = n_rounds, .n_blocks = n_blocks}},
    };
    static const char *const names[3] = {"read memory", "integer dots", "tensor cores"};
    const double n_threads = (double)n_blocks * ROOF_THREADS;
    const double work[3] = {(double)read_bytes, n_threads * ROOF_DP4A_OPS * n_rounds,
                            n_threads / 32 * ROOF_MMA_FLOPS * n_rounds};
    double *to[3] = {&b->read_bytes_per_s, &b->dp4a_ops_per_s, &b->mma_flops_per_s};
    int rc = 0;

    for (int i = 0; i < 3 && !rc; i++) {
        double s = 0;
        rc = bench_time(b, run_roof, &roofs[i], 1, &s);
        if (!rc) {
            *to[i] = work[i] / s;
            json_object_set_new(bench_row(b, "roof", names[i], s), "per_s", json_real(*to[i]));
        }
    }
    return rc;
}

static void add_share(json_t *row, const char *unit, double per_s, double roof)
{
    json_object_set_new(row, unit, json_real(per_s));
    json_object_set_new(row, "of_roof", json_real(roof > 0 ? per_s / roof : 0));
}

/* ---- one matrix times rows ---- */

struct product {
    struct cu_mat_args a;
    bool is_gemm;
    uint64_t w_bytes;
    const char *first; /* of n_mats matrices, one behind the other */
    int n_mats;
};

static cudaError_t run_product(const struct bench *b, void *ctx, int i)
{
    const struct product *p = ctx;
    struct cu_mat_args a = p->a;

    a.w = p->first + (uint64_t)(i % p->n_mats) * p->w_bytes;
    return p->is_gemm ? cu_gemm(&a, b->stream) : cu_gemv(&a, b->stream);
}

/* Rows of random floats in the form that the product reads; its result; then as many matrices as there is room for. */
static int place_product(struct bench *b, enum quant_type type, int n_rows, int n_cols, int n_tok, struct product *p)
{
    uint64_t at = 0, x_bytes = (uint64_t)n_cols * sizeof(float);
    enum quant_act act = p->is_gemm ? QUANT_ACT_F32 : quant_info((int)type)->act;
    uint64_t form_bytes = p->is_gemm ? cu_half_bytes(n_cols) : cu_act_bytes(act, n_cols);
    void *books = NULL, *x = NULL, *form = NULL, *dst = NULL, *w = NULL;
    int rc = bench_take(b, &at, sizeof(struct cu_books), &books);

    rc = rc ? rc : bench_take(b, &at, (uint64_t)n_tok * x_bytes, &x);
    rc = rc ? rc : bench_take(b, &at, (uint64_t)n_tok * form_bytes, &form);
    rc = rc ? rc : bench_take(b, &at, (uint64_t)n_tok * (uint64_t)n_rows * sizeof(float), &dst);
    p->w_bytes = size_up((uint64_t)n_rows * quant_row_bytes(type, n_cols), 256);
    rc = rc ? rc : bench_take(b, &at, p->w_bytes, &w);
    if (rc)
        return rc;
    p->first = w;
    p->n_mats = 1 + (int)((b->dev_bytes - at) / p->w_bytes);
    int n_cold = 1 + (int)(b->cold_bytes / p->w_bytes);
    p->n_mats = p->n_mats < n_cold ? p->n_mats : n_cold;
    struct cu_act_args f = {.act = act, .n_rows = n_tok, .width = n_cols, .x = x, .x_stride = n_cols, .out = form};
    f.out_stride = form_bytes;
    f.by_lanes = p->is_gemm && b->card.has_wgmma;
    p->a = (struct cu_mat_args){
        .card = b->card, .books = books, .type = type, .n_cols = n_cols, .n_rows = n_rows, .x = form};
    p->a.w_stride = quant_row_bytes(type, n_cols);
    p->a.x_stride = form_bytes;
    p->a.dst = dst;
    p->a.dst_stride = n_rows;
    p->a.n_place = n_tok;
    p->a.tile_tok = p->is_gemm ? cu_gemm_tile_tok(&b->card, type, n_rows, n_tok) : n_tok == 1 ? 1 : CU_GEMM_INT_TOK;
    return bench_failed(p->is_gemm ? cu_half(&f, b->stream) : cu_act(&f, b->stream), "activations");
}

static const enum quant_type types[] = {
#define T(NAME, text, id, len, bytes, act, fn) QUANT_##NAME,
#include "quant/types.def"
#undef T
};
enum { N_TYPES = sizeof types / sizeof *types };

/* Decode: one row, matrices of 64 MiB, or of what the card reads in 60 us: what begins and ends a kernel is then a small part. */
static int bench_gemv(struct bench *b, enum quant_type type)
{
    const int n_cols = b->is_quick ? 512 : 4096;
    const uint64_t row_bytes = quant_row_bytes(type, n_cols);
    const double bytes = b->read_bytes_per_s * 60e-6 > 64 * MIB ? b->read_bytes_per_s * 60e-6 : 64 * MIB;
    const int n_rows = b->is_quick ? 32 : (int)(bytes / (double)row_bytes + 1);
    struct product p = {.is_gemm = false};
    double s = 0;
    int rc = place_product(b, type, n_rows, n_cols, 1, &p);

    if (!rc)
        rc = bench_time_step(b, run_product, &p, b->is_quick ? 2 : 8, &s); /* two and two again: cold all the same */
    if (rc)
        return rc;
    json_t *row = bench_row(b, "gemv", quant_info((int)type)->name, s);
    add_share(row, "bytes_per_s", (double)n_rows * (double)row_bytes / s, b->read_bytes_per_s);
    json_object_set_new(row, "cold_matrices", json_integer(p.n_mats));
    return 0;
}

/* Prefill: the same product by tensor cores on halves and on integers, and by cuBLAS on halves. */
static int bench_gemm(struct bench *b, enum quant_type type, bool by_tensor_cores)
{
    const int n_cols = b->is_quick ? 256 : 4096, n_rows = b->is_quick ? 64 : 4096, n_tok = b->is_quick ? 64 : 512;
    const double flops = 2.0 * n_rows * n_cols * n_tok;
    struct product p = {.is_gemm = by_tensor_cores};
    double s = 0;
    char what[64];
    int rc = place_product(b, type, n_rows, n_cols, n_tok, &p);

    if (!rc)
        rc = bench_time(b, run_product, &p, p.n_mats, &s);
    if (rc)
        return rc;
    snprintf(what, sizeof what, "%s %dx%dx%d", quant_info((int)type)->name, n_rows, n_cols, n_tok);
    json_t *row = bench_row(b, by_tensor_cores ? "gemm" : "gemm by dots", what, s);
    add_share(row, "flops_per_s", flops / s, b->mma_flops_per_s);
    double blas_s = by_tensor_cores ? bench_blas(b, n_rows, n_cols, n_tok) : 0;
    json_object_set_new(row, "of_cublas_f16", blas_s > 0 ? json_real(blas_s / s) : json_null());
    json_object_set_new(row, "tile_tok", json_integer(p.a.tile_tok));
    return 0;
}

/* ---- experts ---- */

/* One layer's chosen experts of Qwen3-30B-A3B, other experts each time: the launch that multiplies with all their gates and ups, the one
 * with all their downs, or both. */
enum { MOE_K = 8, MOE_SETS = 64, MOE_UP = 0, MOE_DOWN = 2, MOE_BOTH };

struct moe {
    struct cu_moe_args a;
    const struct cu_expert *sets; /* device: (n_sets, MOE_K) */
    int n_sets, part;
};

/* The launch of matrix `part` alone, as cu_moe() makes it. */
static struct cu_mat_args launch_of(const struct moe *m, const struct cu_expert *experts)
{
    const struct cu_moe_args *a = &m->a;
    const bool is_up = m->part == MOE_UP;
    struct cu_mat_args l = {
        .card = a->card, .books = a->books, .type = a->type[m->part], .w_stride = a->w_stride[m->part]};

    l.n_cols = is_up ? a->n_embd : a->n_ff;
    l.n_rows = (int)(is_up ? a->n_ff : a->n_out);
    l.n_place = a->n_place;
    l.tile_tok = 1;
    l.tiles = a->tiles;
    l.n_tiles = a->n_tiles;
    l.experts = experts;
    l.which = m->part;
    l.code = (struct cu_act_args){
        .act = QUANT_ACT_Q8X256, .n_rows = is_up ? 1 : MOE_K, .width = l.n_cols, .x_stride = l.n_cols};
    l.code.x = is_up ? a->x : a->scratch;
    l.dst = is_up ? a->scratch : a->dst;
    l.dst_stride = l.n_rows;
    if (is_up) {
        l.n_more = 1;
        l.more[0] = (struct cu_mat_more){.dst = l.dst, .dst_stride = l.dst_stride, .n_rows = l.n_rows};
        l.is_glu = true;
        l.glu = a->act;
    }
    return l;
}

static cudaError_t run_moe(const struct bench *b, void *ctx, int i)
{
    const struct moe *m = ctx;
    const struct cu_expert *experts = m->sets + i % m->n_sets * MOE_K;
    struct cu_moe_args a = m->a;

    if (m->part != MOE_BOTH) {
        struct cu_mat_args l = launch_of(m, experts);
        return cu_gemv(&l, b->stream);
    }
    a.experts = experts;
    return cu_moe(&a, b->stream);
}

static uint64_t matrix_bytes(const struct cu_moe_args *a, int i)
{
    return size_up(a->w_stride[i] * (uint64_t)(i == 2 ? a->n_out : a->n_ff), 256);
}

/* Experts behind `at`, and the lists that name them; those are written here and copied. */
static int place_experts(struct bench *b, uint64_t at, struct moe *m)
{
    static struct cu_expert sets[MOE_SETS][MOE_K];
    static int32_t slot[MOE_K];
    static struct cu_tile tiles[MOE_K];
    void *dev_sets = NULL, *dev_slot = NULL, *dev_tiles = NULL, *w = NULL;
    int rc = bench_take(b, &at, sizeof sets, &dev_sets);

    rc = rc ? rc : bench_take(b, &at, sizeof slot, &dev_slot);
    rc = rc ? rc : bench_take(b, &at, sizeof tiles, &dev_tiles);
    for (m->n_sets = 0; m->n_sets < MOE_SETS && !rc; m->n_sets++)
        for (int e = 0; e < MOE_K && !rc; e++)
            for (int i = 0; i < 3 && !rc; i++) {
                rc = bench_take(b, &at, matrix_bytes(&m->a, i), &w);
                sets[m->n_sets][e].w[i] = w;
                sets[m->n_sets][e].scale[i] = 1;
            }
    if (rc) /* the last set was not whole */
        m->n_sets--;
    if (m->n_sets < 1)
        return rc;
    for (int e = 0; e < MOE_K; e++) {
        slot[e] = e;
        tiles[e] = (struct cu_tile){e, e, 1};
    }
    cudaError_t err = cudaMemcpyAsync(dev_sets, sets, sizeof sets, cudaMemcpyHostToDevice, b->stream);
    if (!err)
        err = cudaMemcpyAsync(dev_slot, slot, sizeof slot, cudaMemcpyHostToDevice, b->stream);
    if (!err)
        err = cudaMemcpyAsync(dev_tiles, tiles, sizeof tiles, cudaMemcpyHostToDevice, b->stream);
    m->sets = dev_sets;
    m->a.slot = dev_slot;
    m->a.tiles = dev_tiles;
    return bench_failed(err, "experts");
}

static int place_moe(struct bench *b, struct moe *m)
{
    struct cu_moe_args *a = &m->a;
    void *books = NULL, *x = NULL, *dst = NULL;
    uint64_t at = 0;

    a->n_embd = a->n_out = b->is_quick ? 256 : 2048;
    a->n_ff = b->is_quick ? 256 : 768;
    for (int i = 0; i < 3; i++)
        a->w_stride[i] = quant_row_bytes(a->type[i], i == 2 ? a->n_ff : a->n_embd);
    a->x_stride = a->dst_stride = a->n_embd;
    a->n_place = a->n_tiles = MOE_K;
    a->tile_tok = 1;
    a->lie_alike = true;
    int rc = bench_take(b, &at, sizeof(struct cu_books), &books);
    rc = rc ? rc : bench_take(b, &at, (uint64_t)a->n_embd * sizeof(float), &x);
    rc = rc ? rc : bench_take(b, &at, (uint64_t)a->n_out * MOE_K * sizeof(float), &dst);
    rc = rc ? rc : bench_take(b, &at, cu_moe_scratch_bytes(a), &a->scratch);
    a->card = b->card;
    a->books = books;
    a->x = x;
    a->dst = dst;
    return rc ? rc : place_experts(b, at, m);
}

static int bench_moe(struct bench *b, enum quant_type down, int part, const char *what)
{
    struct moe m = {.a = {.type = {QUANT_Q4_K, QUANT_Q4_K, down}, .act = OP_ACT_SILU, .k = MOE_K, .n_rows = 1},
                    .part = part};
    const struct cu_moe_args *a = &m.a;
    double s = 0, bytes = 0;
    int rc = place_moe(b, &m);

    for (int i = 0; i < 3; i++)
        if (part == MOE_BOTH || (part == MOE_DOWN) == (i == 2))
            bytes += (double)a->w_stride[i] * (double)(i == 2 ? a->n_out : a->n_ff) * MOE_K;
    if (!rc)
        rc = bench_time_step(b, run_moe, &m, m.n_sets, &s);
    if (rc)
        return rc;
    json_t *row = bench_row(b, "grouped experts", what, s);
    add_share(row, "bytes_per_s", bytes / s, b->read_bytes_per_s);
    json_object_set_new(row, "cold_sets", json_integer(m.n_sets));
    return 0;
}

static int bench_moes(struct bench *b)
{
    int rc = bench_moe(b, QUANT_Q6_K, MOE_UP, "gate, up: Q4_K");

    rc = rc ? rc : bench_moe(b, QUANT_Q6_K, MOE_DOWN, "down: Q6_K");
    rc = rc ? rc : bench_moe(b, QUANT_Q4_K, MOE_DOWN, "down: Q4_K");
    rc = rc ? rc : bench_moe(b, QUANT_Q6_K, MOE_BOTH, "all: Q4_K Q4_K Q6_K");
    return rc ? rc : bench_moe(b, QUANT_Q4_K, MOE_BOTH, "all: Q4_K");
}

/* Prefill: rows of a prompt, each with MOE_K of all experts of such a layer, drawn at random: some experts have many, some few. */
enum { ALL_EXPERTS = 128, PROMPT_ROWS = 512, PROMPT_SLOTS = PROMPT_ROWS * MOE_K };

struct prompt {
    struct cu_expert experts[ALL_EXPERTS];
    struct cu_tile tiles[ALL_EXPERTS + PROMPT_SLOTS / CU_GEMM_TOK];
    int32_t slot[PROMPT_SLOTS];
};

static void draw_slots(struct cu_moe_args *a, int n_expert, struct prompt *p)
{
    static uint8_t of[PROMPT_SLOTS];
    const int n_slots = a->n_rows * a->k;
    uint32_t random = 1;

    for (int s = 0; s < n_slots; s++) {
        random = random * 1664525u + 1013904223u;
        of[s] = (uint8_t)((random >> 16) % (uint32_t)n_expert);
    }
    for (int e = 0; e < n_expert; e++) {
        int first = a->n_place;
        for (int s = 0; s < n_slots; s++)
            if (of[s] == e)
                p->slot[a->n_place++] = s;
        for (int at = first; at < a->n_place; at += a->tile_tok)
            p->tiles[a->n_tiles++] =
                (struct cu_tile){e, at, a->n_place - at < a->tile_tok ? a->n_place - at : a->tile_tok};
    }
}

/* The experts' matrices, rows in and out, scratch, and the lists. */
static int place_prompt(struct bench *b, int n_expert, struct cu_moe_args *a)
{
    static struct prompt lists;
    const uint64_t n_slots = (uint64_t)a->n_rows * (uint64_t)a->k;
    void *books = NULL, *x = NULL, *dst = NULL, *dev = NULL, *w = NULL;
    uint64_t at = 0;
    int rc = bench_take(b, &at, sizeof(struct cu_books), &books);

    rc = rc ? rc : bench_take(b, &at, (uint64_t)a->n_rows * (uint64_t)a->n_embd * sizeof(float), &x);
    rc = rc ? rc : bench_take(b, &at, n_slots * (uint64_t)a->n_out * sizeof(float), &dst);
    uint64_t gemm_bytes = cu_moe_gemm_scratch_bytes(a), dots_bytes = cu_moe_scratch_bytes(a);
    rc = rc ? rc : bench_take(b, &at, gemm_bytes > dots_bytes ? gemm_bytes : dots_bytes, &a->scratch);
    rc = rc ? rc : bench_take(b, &at, sizeof lists, &dev);
    for (int e = 0; e < n_expert && !rc; e++)
        for (int i = 0; i < 3 && !rc; i++) {
            rc = bench_take(b, &at, matrix_bytes(a, i), &w);
            lists.experts[e].w[i] = w;
            lists.experts[e].scale[i] = 1;
        }
    if (rc)
        return rc;
    draw_slots(a, n_expert, &lists);
    a->card = b->card;
    a->books = books;
    a->x = x;
    a->dst = dst;
    a->experts = ((struct prompt *)dev)->experts;
    a->tiles = ((struct prompt *)dev)->tiles;
    a->slot = ((struct prompt *)dev)->slot;
    return bench_failed(cudaMemcpyAsync(dev, &lists, sizeof lists, cudaMemcpyHostToDevice, b->stream), "experts");
}

static cudaError_t run_grouped_gemm(const struct bench *b, void *ctx, int i)
{
    (void)i;
    return cu_moe_gemm(ctx, b->stream);
}

static cudaError_t run_grouped_dots(const struct bench *b, void *ctx, int i)
{
    (void)i;
    return cu_moe(ctx, b->stream);
}

/* By tensor cores on halves, or by integer dots, whose tensor cores give the CPU's bits. */
static int bench_grouped_gemm(struct bench *b, bool by_dots)
{
    const int n_expert = b->is_quick ? 4 : ALL_EXPERTS;
    struct cu_moe_args a = {.type = {QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, .act = OP_ACT_SILU, .k = MOE_K};
    double s = 0;

    a.n_rows = b->is_quick ? 10 : PROMPT_ROWS;
    a.n_embd = a.n_out = a.x_stride = a.dst_stride = b->is_quick ? 256 : 2048;
    a.n_ff = b->is_quick ? 256 : 768;
    for (int i = 0; i < 3; i++)
        a.w_stride[i] = quant_row_bytes(a.type[i], i == 2 ? a.n_ff : a.n_embd);
    a.tile_tok =
        by_dots ? CU_GEMM_INT_TOK : cu_gemm_tile_tok(&b->card, a.type[0], a.n_ff * n_expert, a.n_rows * a.k / n_expert);
    int rc = place_prompt(b, n_expert, &a);
    if (!rc)
        rc = bench_time(b, by_dots ? run_grouped_dots : run_grouped_gemm, &a, 1, &s);
    if (rc)
        return rc;
    json_t *row = bench_row(b, by_dots ? "grouped by dots" : "grouped gemm", "512 rows, Qwen3-30B", s);
    add_share(row, "flops_per_s", 6.0 * a.n_place * (double)a.n_embd * (double)a.n_ff / s, b->mma_flops_per_s);
    json_object_set_new(row, "tile_tok", json_integer(a.tile_tok));
    return 0;
}

/* ---- the best logits ---- */

/* Rows as long as Qwen3's vocabulary, where the head's product has just left them, as a step finds them. */
static cudaError_t run_top(const struct bench *b, void *ctx, int i)
{
    (void)i;
    return cu_top(ctx, b->stream);
}

static int bench_top(struct bench *b, int n_rows, int k)
{
    struct cu_top_args a = {.n = n_rows, .k = k, .width = b->is_quick ? 5000 : 151936};
    uint64_t at = 0, row_bytes = (uint64_t)a.width * sizeof(float);
    void *x = NULL, *dst = NULL, *scratch = NULL;
    char what[64];
    double s = 0;
    int rc = bench_take(b, &at, (uint64_t)n_rows * row_bytes, &x);

    rc = rc ? rc : bench_take(b, &at, (uint64_t)(n_rows * 2 * k) * sizeof(int32_t), &dst);
    rc = rc ? rc : bench_take(b, &at, cu_top_scratch_bytes(n_rows, a.width, k), &scratch);
    a.x = x;
    a.x_stride = a.width;
    a.dst = dst;
    a.dst_stride = 2 * k;
    a.scratch = scratch;
    rc = rc ? rc : bench_time_step(b, run_top, &a, b->is_quick ? 2 : 8, &s);
    if (rc)
        return rc;
    snprintf(what, sizeof what, "%d of %d rows", k, n_rows);
    add_share(bench_row(b, "top k", what, s), "bytes_per_s", (double)n_rows * (double)row_bytes / s,
              b->read_bytes_per_s);
    return 0;
}

static int bench_tops(struct bench *b)
{
    static const int k[] = {1, 64, DEVICE_MAX_TOP_K};
    int rc = 0;

    for (size_t i = 0; i < sizeof k / sizeof *k && !rc; i++) {
        rc = bench_top(b, 1, k[i]);
        if (!rc)
            rc = bench_top(b, b->is_quick ? 2 : 16, k[i]);
    }
    return rc;
}

/* ---- attention ---- */

enum { HEADS = 32, HEADS_KV = 4, HEAD_DIM = 128, MAX_PAGES = 512, SEGMENTS = 32 };

/* One row over n_pos positions of pages that lie one behind the other; another set of pages each time. */
struct attention {
    struct cu_attn_args a;
    void *const *const *tables; /* device: (n_sets, DEVICE_MAX_GROUPS) */
    int n_sets;
};

static cudaError_t run_attention(const struct bench *b, void *ctx, int i)
{
    const struct attention *t = ctx;
    struct cu_attn_args a = t->a;

    a.step.page = t->tables + i % t->n_sets * DEVICE_MAX_GROUPS;
    cudaError_t e = cu_attn(&a, b->stream);
    return e || !a.states ? e : cu_attn_merge(&a, b->stream);
}

/* Tables of n_sets sets of pages, of which the first stands at `pages`. */
static int place_pages(struct bench *b, uint64_t at, int n_pages, uint64_t page_bytes, struct attention *t)
{
    enum { MAX_SETS = 32 };
    static void *page[MAX_SETS][MAX_PAGES], *table[MAX_SETS][DEVICE_MAX_GROUPS];
    void *dev_page = NULL, *dev_table = NULL, *first = NULL;
    uint64_t set_bytes = (uint64_t)n_pages * page_bytes;
    int rc = bench_take(b, &at, sizeof page, &dev_page);

    rc = rc ? rc : bench_take(b, &at, sizeof table, &dev_table);
    for (t->n_sets = 0; t->n_sets < MAX_SETS && !rc; t->n_sets++) {
        rc = bench_take(b, &at, set_bytes, &first);
        for (int i = 0; i < n_pages && !rc; i++)
            page[t->n_sets][i] = (char *)first + (uint64_t)i * page_bytes;
        table[t->n_sets][0] = (char *)dev_page + (uint64_t)t->n_sets * sizeof page[0];
    }
    if (rc)
        t->n_sets--;
    if (t->n_sets < 1)
        return rc;
    cudaError_t e = cudaMemcpyAsync(dev_page, page, sizeof page, cudaMemcpyHostToDevice, b->stream);
    if (!e)
        e = cudaMemcpyAsync(dev_table, table, sizeof table, cudaMemcpyHostToDevice, b->stream);
    t->tables = dev_table;
    return bench_failed(e, "pages");
}

/* n rows at the end of n_pos positions: their places, queries and results. */
static int place_rows(struct bench *b, uint64_t *at, int n, int n_pos, struct cu_attn_args *a)
{
    static int32_t pos[512], seq[512];
    void *dev_pos = NULL, *dev_seq = NULL, *q = NULL, *dst = NULL, *states = NULL, *sums = NULL;
    const uint64_t row_bytes = HEADS * HEAD_DIM * sizeof(float), state_bytes = HEADS * (HEAD_DIM + 2) * sizeof(float);
    int rc = bench_take(b, at, sizeof pos, &dev_pos);

    rc = rc ? rc : bench_take(b, at, sizeof seq, &dev_seq);
    rc = rc ? rc : bench_take(b, at, (uint64_t)n * row_bytes, &q);
    rc = rc ? rc : bench_take(b, at, (uint64_t)n * row_bytes, &dst);
    rc = rc ? rc : bench_take(b, at, SEGMENTS * state_bytes, &states);
    rc = rc ? rc : bench_take(b, at, state_bytes, &sums);
    if (rc)
        return rc;
    for (int i = 0; i < n; i++)
        pos[i] = n_pos - n + i;
    cudaError_t e = cudaMemcpyAsync(dev_pos, pos, sizeof pos, cudaMemcpyHostToDevice, b->stream);
    if (!e)
        e = cudaMemcpyAsync(dev_seq, seq, sizeof seq, cudaMemcpyHostToDevice, b->stream);
    a->step.pos = dev_pos;
    a->step.seq = dev_seq;
    a->n = n;
    a->q = q;
    a->dst = dst;
    a->q_stride = a->dst_stride = HEADS * HEAD_DIM;
    a->n_segments = (n_pos + DEVICE_ATTN_SEGMENT_TOK - 1) / DEVICE_ATTN_SEGMENT_TOK;
    if (n == 1 && a->n_segments > 1) {
        a->states = states;
        a->sums = sums;
        a->is_last = true;
    }
    return bench_failed(e, "rows");
}

static int bench_attention(struct bench *b, enum quant_type kv_type, int n, int n_pos)
{
    const uint64_t half_bytes = size_up((uint64_t)HEADS_KV * DEVICE_PAGE_TOK * quant_row_bytes(kv_type, HEAD_DIM), 64);
    const int n_pages = (n_pos + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK;
    struct attention t = {.a = {.p = {.n_head = HEADS,
                                      .n_head_kv = HEADS_KV,
                                      .head_dim_k = HEAD_DIM,
                                      .head_dim_v = HEAD_DIM,
                                      .scale = 0.1f,
                                      .kv_type = kv_type,
                                      .v_off = half_bytes}}};
    uint64_t at = 0;
    double s = 0;
    char what[64];

    t.a.tile_rows = cu_attn_tile_rows(&t.a.p, 0);
    int rc = place_rows(b, &at, n, n_pos, &t.a);
    if (!rc)
        rc = place_pages(b, at, n_pages, 2 * half_bytes, &t);
    if (!rc)
        rc = bench_time(b, run_attention, &t, t.n_sets, &s);
    if (rc)
        return rc;
    snprintf(what, sizeof what, "%s, %d at %d", quant_info((int)kv_type)->name, n, n_pos);
    json_t *row = bench_row(b, "attention", what, s);
    double keys = n * (n_pos - (n - 1) / 2.0);
    if (n == 1)
        add_share(row, "bytes_per_s", (double)n_pages * 2 * (double)half_bytes / s, b->read_bytes_per_s);
    else
        add_share(row, "flops_per_s", 4.0 * HEADS * HEAD_DIM * keys / s, b->mma_flops_per_s);
    return 0;
}

int bench_kernels(struct bench *b)
{
    static const enum quant_type gemm_types[] = {QUANT_Q4_K, QUANT_Q6_K, QUANT_Q8_0, QUANT_MXFP4, QUANT_F16};
    static const enum quant_type kv_types[] = {QUANT_F16, QUANT_Q8_0};
    int rc = 0;

    for (int i = 0; i < N_TYPES && !rc; i++)
        rc = bench_gemv(b, types[i]);
    if (!rc)
        rc = bench_tops(b);
    if (!rc)
        rc = bench_moes(b);
    if (!rc)
        rc = bench_grouped_gemm(b, false);
    if (!rc)
        rc = bench_grouped_gemm(b, true);
    for (size_t i = 0; i < sizeof gemm_types / sizeof *gemm_types && !rc; i++) {
        rc = bench_gemm(b, gemm_types[i], true);
        if (!rc && gemm_types[i] != QUANT_F16)
            rc = bench_gemm(b, gemm_types[i], false);
    }
    for (size_t i = 0; i < sizeof kv_types / sizeof *kv_types && !rc; i++) {
        rc = bench_attention(b, kv_types[i], 1, b->is_quick ? 640 : 16384);
        if (!rc)
            rc = bench_attention(b, kv_types[i], b->is_quick ? 4 : 512, b->is_quick ? 64 : 2048);
    }
    return rc;
}
