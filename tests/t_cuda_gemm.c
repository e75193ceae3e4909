/* Products by tensor cores (--prefill blas) on the CUDA device over the emulated runtime, against doubles within derived bounds;
 * weights as halves to the bit. */
#include "tests/cuda_pair.h"
#include "tests/run_suite.h"

#include "cuda/launch.h"
#include "quant/iq_grid.h"
#include "src/base/size.h"

/* ---- one matrix ---- */

/* What a product of tensor cores may differ by: each factor is rounded to a half (2^-11 of it, or 2^-25 where it is subnormal; rows are
 * scaled so that this matters for weights alone), products are exact, and the sum's roundings, in any order, are n * 2^-23 of the
 * sum of magnitudes: tensor cores cut off instead of rounding. */
static double bound_of(double sum_abs, double sum_abs_x, int64_t n_cols)
{
    return sum_abs * (2.002 * 0x1p-11 + (double)n_cols * 0x1p-23) + 0x1p-25 * 1.001 * sum_abs_x;
}

static void gemm_case(enum quant_type type, int64_t n_cols, int64_t n_rows, int n, int n_prompt)
{
    struct tensor w = t_codes(type, n_cols, n_rows, 1), x = t_apart(n_cols, n, 4), y = t_apart(n_rows, n, 3);
    struct op op = {.kind = OP_MATMUL, .dst = {&y}, .src = {&x}, .w = {&w}, .n_w = 1};
    struct rows rows = {.n = n, .n_prompt = n_prompt};
    struct pair p = pair_open(DEVICE_PREFILL_BLAS);

    for (int64_t i = 0; i < n_cols; i++)
        t_f32(&x, n - 1)[i] *= 1e9f; /* past the largest half */
    mirror_ops(&p, &op, 1);
    ck_assert_msg(run_there(&p, &op, 1, &rows) == 0, "%s", err_text());
    float *got = mem_alloc(tensor_bytes(&y), MEM_OTHER);
    ck_assert_int_eq(p.cuda->ops->download(p.cuda, got, there(&p, y.data), tensor_bytes(&y)), 0);
    run_here(&op, 1, &rows);
    for (int64_t r = 0; r < n_rows; r++) {
        float *row = t_row_floats(&w, 0, r);
        for (int t = 0; t < n; t++) {
            double sum = 0, sum_abs = 0, sum_abs_x = 0, is = (double)got[t * (int64_t)(y.stride[1] / 4) + r];
            for (int64_t i = 0; i < n_cols; i++) {
                double xi = (double)t_f32(&x, t)[i];
                sum += (double)row[i] * xi;
                sum_abs += fabs((double)row[i] * xi);
                sum_abs_x += fabs(xi);
            }
            double bound = bound_of(sum_abs, sum_abs_x, n_cols);
            if (t >= n_prompt)
                ck_assert_msg(is == (double)t_f32(&y, t)[r], "generated row %d differs: %g", t, is);
            else
                ck_assert_msg(fabs(is - sum) <= bound, "%s row %d of token %d: %g instead of %g +- %g",
                              quant_info((int)type)->name, (int)r, t, is, sum, bound);
        }
        mem_free(row);
    }
    mem_free(got);
    pair_close(&p);
    t_free(&w);
    t_done(&x);
    t_done(&y);
}

/* With wgmma, and on a card that has none; a GPU is what it is. */
enum { N_CARDS = 2 };

static void use_card(int i)
{
    if (i)
        emu_set_card(8, 4, EMU_MAX_SHARED);
}

/* Columns that fill no step of 64 or 128, or one and a half of them, where the type's blocks allow it. */
START_TEST(tensor_cores_multiply_wrongly)
{
    enum quant_type type = weight_types[_i % N_WEIGHT_TYPES];
    int len = quant_info((int)type)->block_len;

    use_card(_i / N_WEIGHT_TYPES);

    gemm_case(type, 256, 70, 5, 5);
    gemm_case(type, 512, 64, 67, 66);
    gemm_case(type, len > 64 ? 256 : 64, 129, 130, 130); /* large tiles, of which three are not full */
    if (len <= 32) {
        gemm_case(type, 96, 130, 130, 129);
        gemm_case(type, 416, 66, 70, 70);
        gemm_case(type, 32, 3, 17, 17);
    }
}
END_TEST

START_TEST(tensor_cores_lose_their_place_in_long_rows)
{
    static const enum quant_type types[] = {QUANT_Q4_K, QUANT_Q6_K, QUANT_Q8_0, QUANT_MXFP4, QUANT_F16, QUANT_NVFP4};

    use_card(_i);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        gemm_case(types[i], 2048, 65, 1, 1);
        gemm_case(types[i], 2048, 130, 130, 130);
    }
}
END_TEST

/* A kernel: of mma or of wgmma, and the card that it is made to believe in, which decides how many rows a block has. */
struct way {
    const char *name;
    int tile_tok;
    struct cu_card card;
};

static const struct way ways[] = {
    {"small tiles", CU_GEMM_TOK, {.n_multiprocessors = 1}},
    {"large tiles", CU_GEMM_TOK_MANY, {.n_multiprocessors = 1}},
    {"warpgroups, small tiles", CU_GEMM_TOK, {.n_multiprocessors = 1000, .has_wgmma = true}},
    {"warpgroups, tiles of more rows", CU_GEMM_TOK, {.n_multiprocessors = 1, .has_wgmma = true}},
    {"warpgroups, large tiles", CU_GEMM_TOK_MANY, {.n_multiprocessors = 1, .has_wgmma = true}},
};
enum { N_WAYS = sizeof ways / sizeof *ways };

/* Has the GPU that is there such a kernel, and so much shared memory? */
static bool has_way(const struct way *w, enum quant_type type)
{
    struct cu_card card = {.n_multiprocessors = 1};
    int major = 0;
    bool has_wgmma = false;

    ck_assert_int_eq(cudaDeviceGetAttribute(&card.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), 0);
    ck_assert_int_eq(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), 0);
    if (major == 9)
        ck_assert_int_eq(cu_gemm_has_wgmma(&has_wgmma), 0);
    if (w->card.has_wgmma)
        return has_wgmma;
    return w->tile_tok == CU_GEMM_TOK || cu_gemm_tile_tok(&card, type, 128, 128) == CU_GEMM_TOK_MANY;
}

/* The launchers themselves: which kernel an op gets depends on the card. room: halves of x, then books. */
static void multiply(struct pair *p, const struct tensor *w, const struct tensor *x, const struct tensor *y, char *room,
                     const struct way *way)
{
    const uint64_t x_bytes = cu_half_bytes(w->ne[0]);
    struct cu_act_args h = {.act = QUANT_ACT_F32, .n_rows = (int)x->ne[1], .width = w->ne[0], .x = there(p, x->data)};
    struct cu_mat_args m = {.type = w->type, .w = there(p, w->data), .w_stride = w->stride[1], .n_cols = w->ne[0]};
    cudaStream_t stream;

    h.x_stride = (int64_t)(x->stride[1] / sizeof(float));
    h.out = there(p, room + sizeof(struct cu_books));
    h.out_stride = x_bytes;
    h.by_lanes = way->card.has_wgmma;
    m.card = way->card;
    m.books = there(p, room);
    m.n_rows = (int)w->ne[1];
    m.x = h.out;
    m.x_stride = x_bytes;
    m.dst = there(p, y->data);
    m.dst_stride = (int64_t)(y->stride[1] / sizeof(float));
    m.n_place = (int)x->ne[1];
    m.tile_tok = way->tile_tok;
    ck_assert_int_eq(p->cuda->ops->sync(p->cuda), 0); /* what was mirrored is there */
    ck_assert_int_eq(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ck_assert_int_eq(cu_half(&h, stream), cudaSuccess);
    ck_assert_int_eq(cu_gemm(&m, stream), cudaSuccess);
    ck_assert_int_eq(cudaStreamSynchronize(stream), cudaSuccess);
    ck_assert_int_eq(cudaStreamDestroy(stream), cudaSuccess);
}

static char *make_room(uint64_t halves_bytes)
{
    char *room = mem_zalloc(1, sizeof(struct cu_books) + halves_bytes, MEM_OTHER);
    struct cu_books *books = (struct cu_books *)(void *)room;

    memcpy(books->iq2_xxs, iq_grid_iq2_xxs, sizeof books->iq2_xxs);
    memcpy(books->iq2_xs, iq_grid_iq2_xs, sizeof books->iq2_xs);
    memcpy(books->iq2_s, iq_grid_iq2_s, sizeof books->iq2_s);
    memcpy(books->iq1_s, iq_grid_iq1_s, sizeof books->iq1_s);
    memcpy(books->iq3_xxs, iq_grid_iq3_xxs, sizeof books->iq3_xxs);
    memcpy(books->iq3_s, iq_grid_iq3_s, sizeof books->iq3_s);
    return room;
}

static void check_picked(const struct tensor *w, const struct tensor *y, int first, const char *what)
{
    for (int64_t r = 0; r < w->ne[1]; r++) {
        float *row = t_row_floats(w, 0, r);
        for (int64_t t = 0; t < y->ne[1]; t++) {
            int64_t col = (first + t) % w->ne[0];
            float is = t_f32(y, t)[r], should = quant_f16_to_f32(quant_f32_to_f16(row[col]));
            ck_assert_msg(is == should, "%s: element %d of row %d: %.9g instead of %.9g", what, (int)col, (int)r,
                          (double)is, (double)should);
        }
        mem_free(row);
    }
}

/* x picks one column for each token, so that results are the weights as halves. The matrix begins `skew` bytes behind where an
 * allocation does, and ends where it ends. */
static void picked_weights(enum quant_type type, int64_t n_cols, int64_t n_rows, int n_tok, int first, uint64_t skew)
{
    struct tensor w = t_codes(type, n_cols, n_rows, 1), moved_w = w, x = t_make(QUANT_F32, n_cols, n_tok, 1),
                  y = t_make(QUANT_F32, n_rows, n_tok, 1);
    const uint64_t bytes = tensor_bytes(&w) + skew, halves_bytes = (uint64_t)n_tok * cu_half_bytes(n_cols);
    char *matrix = mem_zalloc(1, bytes, MEM_OTHER), *room = make_room(halves_bytes), what[80];
    struct pair p = pair_open(DEVICE_PREFILL_BLAS);

    memcpy(matrix + skew, w.data, tensor_bytes(&w));
    moved_w.data = matrix + skew;
    memset(x.data, 0, tensor_bytes(&x));
    for (int t = 0; t < n_tok; t++)
        t_f32(&x, t)[(first + t) % n_cols] = 1;
    mirror(&p, matrix, bytes);
    mirror(&p, room, sizeof(struct cu_books) + halves_bytes);
    mirror_tensor(&p, &x);
    mirror_tensor(&p, &y);
    for (const struct way *way = ways; way < ways + N_WAYS; way++) {
        if (!has_way(way, type))
            continue;
        memset(y.data, 0xff, tensor_bytes(&y));
        ck_assert_int_eq(p.cuda->ops->upload(p.cuda, there(&p, y.data), y.data, tensor_bytes(&y)), 0);
        multiply(&p, &moved_w, &x, &y, room, way);
        ck_assert_int_eq(p.cuda->ops->download(p.cuda, y.data, there(&p, y.data), tensor_bytes(&y)), 0);
        snprintf(what, sizeof what, "%s, %d bytes askew, %s", quant_info((int)type)->name, (int)skew, way->name);
        check_picked(&w, &y, first, what);
    }
    pair_close(&p);
    mem_free(matrix);
    mem_free(room);
    t_free(&w);
    t_free(&x);
    t_free(&y);
}

START_TEST(a_weight_is_rounded_twice_or_not_the_one_that_was_meant)
{
    enum quant_type type = weight_types[_i];
    const struct quant_info *info = quant_info((int)type);
    uint64_t step = type == QUANT_F32 ? 4 : type == QUANT_MXFP4 ? 1 : 2;

    picked_weights(type, 256, 130, 200, 0, 0);
    picked_weights(type, 512, 65, 130, 224, 7 * step);
    picked_weights(type, info->block_len > 32 ? 256 : 96, 65, 64, 40, 3 * step);
}
END_TEST

/* The same sums whatever the tile, and whatever rows stand beside: small tiles get the first rows only. */
START_TEST(bits_depend_on_the_tile)
{
    struct tensor w = t_codes(QUANT_Q8_0, 480, 130, 1), x = t_make(QUANT_F32, 480, 130, 1),
                  y[2] = {t_make(QUANT_F32, 130, 130, 1), t_make(QUANT_F32, 130, 130, 1)}, few = x;
    const uint64_t halves_bytes = 130 * cu_half_bytes(480);
    char *room = make_room(halves_bytes);
    struct pair p = pair_open(DEVICE_PREFILL_BLAS);

    few.ne[1] = 40;
    mirror(&p, room, sizeof(struct cu_books) + halves_bytes);
    mirror_tensor(&p, &w);
    mirror_tensor(&p, &x);
    mirror_tensor(&p, &y[0]);
    mirror_tensor(&p, &y[1]);
    for (const struct way *way = ways, *large = ways; way < ways + N_WAYS; way++) {
        while (large->tile_tok != CU_GEMM_TOK_MANY || large->card.has_wgmma != way->card.has_wgmma)
            large++;
        if (!has_way(way, QUANT_Q8_0) || !has_way(large, QUANT_Q8_0))
            continue;
        multiply(&p, &w, &x, &y[0], room, large);
        multiply(&p, &w, &few, &y[1], room, way);
        for (int i = 0; i < 2; i++)
            ck_assert_int_eq(p.cuda->ops->download(p.cuda, y[i].data, there(&p, y[i].data), tensor_bytes(&y[i])), 0);
        for (int t = 0; t < 40; t++)
            ck_assert_msg(memcmp(t_f32(&y[0], t), t_f32(&y[1], t), 130 * sizeof(float)) == 0, "%s: row %d", way->name,
                          t);
    }
    pair_close(&p);
    mem_free(room);
    t_free(&w);
    t_free(&x);
    t_free(&y[0]);
    t_free(&y[1]);
}
END_TEST

START_TEST(tiles_do_not_fit_the_card)
{
    const struct cu_card h100 = {.n_multiprocessors = 132, .shared_bytes = 227 * 1024};
    const struct cu_card laptop = {.n_multiprocessors = 24, .shared_bytes = 99 * 1024};
    const struct cu_card groups = {.n_multiprocessors = 132, .shared_bytes = 227 * 1024, .has_wgmma = true};

    for (int i = 0; i < N_WEIGHT_TYPES; i++) {
        ck_assert_int_eq(cu_gemm_tile_tok(&h100, weight_types[i], 4096, 512), CU_GEMM_TOK_MANY);
        ck_assert_int_eq(cu_gemm_tile_tok(&h100, weight_types[i], 1024, 512), CU_GEMM_TOK); /* 32 blocks for 132 */
        ck_assert_int_eq(cu_gemm_tile_tok(&laptop, weight_types[i], 64, 512), CU_GEMM_TOK);
    }
    ck_assert_int_eq(cu_gemm_tile_tok(&groups, QUANT_Q4_K, 4096, 512), CU_GEMM_TOK_MANY);
    ck_assert_int_eq(cu_gemm_tile_tok(&groups, QUANT_Q4_K, 2048, 512), CU_GEMM_TOK); /* 128 of 128 x 64 instead of 64 */
    ck_assert_int_eq(cu_gemm_tile_tok(&groups, QUANT_Q4_K, 1024, 512), CU_GEMM_TOK);
    ck_assert_int_eq(cu_gemm_tile_tok(&groups, QUANT_Q4_K, 768 * 128, 32), CU_GEMM_TOK);
    ck_assert_int_eq(cu_gemm_tile_tok(&laptop, QUANT_Q6_K, 4096, 512),
                     CU_GEMM_TOK); /* more shared memory than it has */
}
END_TEST

/* ---- experts ---- */

enum spread { EVENLY, ONE_HAS_ALL, ONE_HAS_ONE };

struct moe_case {
    enum quant_type type[3];
    int n_tok, n_prompt, n_expert, k;
    int64_t n_embd, n_ff, n_out;
    enum spread spread;
};

static const struct moe_case moe_cases[] = {
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, 100, 90, 5, 2, 256, 256, 77, EVENLY}, /* some rows are generated */
    {{QUANT_Q8_0, QUANT_MXFP4, QUANT_F16}, 150, 150, 4, 2, 64, 96, 64, ONE_HAS_ALL},
    {{QUANT_Q4_0, QUANT_Q5_K, QUANT_IQ3_S}, 200, 200, 3, 1, 256, 256, 256, ONE_HAS_ONE}, /* large tiles */
    {{QUANT_Q8_0, QUANT_Q8_0, QUANT_Q8_0}, 30, 30, 4, 2, 64, 64, 64, EVENLY},            /* too few rows for it */
};

enum { N_MOE_CASES = sizeof moe_cases / sizeof *moe_cases };

static int expert_of(const struct moe_case *c, int slot)
{
    int tok = slot / c->k, rank = slot % c->k;

    if (c->spread == ONE_HAS_ALL && rank == 0)
        return 2;
    if (c->spread == ONE_HAS_ONE)
        return tok == 0 ? 0 : tok % 8 == 1 ? 1 : 2;
    return (tok * 7 + rank) % c->n_expert;
}

/* Slots grouped by expert, with generated rows first: nothing says that slots of an expert rise. bias: (3) a row for each expert, of which
 * the first one's have none. */
static int group(const struct moe_case *c, const struct tensor w[3], const struct tensor bias[3],
                 struct op_expert *experts, int32_t *slot)
{
    int n = 0, n_experts = 0;

    for (int e = 0; e < c->n_expert; e++) {
        struct op_expert x = {.first = n};
        for (int i = 0; i < 3; i++) {
            x.w[i] = tensor_slice(&w[i], e);
            x.scale[i] = e == 1 ? 1.0f : 0.5f + 0.25f * (float)(e + i);
            x.bias[i] = e ? t_f32(&bias[i], e) : NULL;
        }
        for (int s = c->n_tok * c->k - 1; s >= 0; s--)
            if (expert_of(c, s) == e)
                slot[n++] = s;
        x.n = n - x.first;
        if (x.n)
            experts[n_experts++] = x;
    }
    return n_experts;
}

/* A value and what the device's may differ from it by. */
struct about {
    double x, e;
};

/* Row r of the expert's matrix number i, one of the stack w, times x, whose largest is max; x's own uncertainties pass through. What of x
 * is 2^28 times smaller than the largest is subnormal as a half, and off by 2^-39 of the largest. */
static struct about product_of(const struct tensor *w, const struct op_expert *expert, int i_mat, int slice, int64_t r,
                               const struct about *x)
{
    const double scale = (double)expert->scale[i_mat], bias = expert->bias[i_mat] ? (double)expert->bias[i_mat][r] : 0;
    float *row = t_row_floats(w, slice, r);
    double sum = 0, passed = 0, sum_abs = 0, sum_abs_x = 0, max = 0, sum_abs_w = 0;

    for (int64_t i = 0; i < w->ne[0]; i++) {
        double wi = (double)row[i], most = fabs(x[i].x) + x[i].e;
        sum += wi * x[i].x;
        passed += fabs(wi) * x[i].e;
        sum_abs += fabs(wi) * most;
        sum_abs_x += most;
        sum_abs_w += fabs(wi);
        max = most > max ? most : max;
    }
    mem_free(row);
    double e = passed + bound_of(sum_abs, sum_abs_x, w->ne[0] + 2) + sum_abs_w * max * 0x1p-39; /* + 2: the factors' */
    double y = sum * scale + bias;
    return (struct about){y, e * scale + (bias != 0 ? (fabs(y) + e * scale) * 0x1p-23 : 0)};
}

/* silu(gate) * up. |silu'| < 1.1, and the device's own silu is within 2^-19 of it. */
static struct about hidden_of(struct about gate, struct about up)
{
    double silu = gate.x / (1 + exp(-gate.x)), e = 1.1 * gate.e + fabs(silu) * 0x1p-19 + 0x1p-126;

    return (struct about){silu * up.x, fabs(silu) * up.e + fabs(up.x) * e + e * up.e + fabs(silu * up.x) * 0x1p-23};
}

static void check_slot(const struct moe_case *c, const struct tensor w[3], const float *x, int e,
                       const struct op_expert *expert, const float *got)
{
    struct about *in = mem_alloc((size_t)(c->n_embd + c->n_ff) * sizeof *in, MEM_OTHER), *h = in + c->n_embd;

    for (int64_t i = 0; i < c->n_embd; i++)
        in[i] = (struct about){(double)x[i], 0};
    for (int64_t i = 0; i < c->n_ff; i++)
        h[i] = hidden_of(product_of(&w[0], expert, 0, e, i, in), product_of(&w[1], expert, 1, e, i, in));
    for (int64_t i = 0; i < c->n_out; i++) {
        struct about y = product_of(&w[2], expert, 2, e, i, h);
        ck_assert_msg(fabs((double)got[i] - y.x) <= y.e, "expert %d, element %d: %g instead of %g +- %g", e, (int)i,
                      (double)got[i], y.x, y.e);
    }
    mem_free(in);
}

/* A model's activations and weights are small, and silu of what is not would hide everything. */
static void tame(struct tensor *x, int64_t n_embd)
{
    for (int64_t row = 0; row < x->ne[1]; row++)
        for (int64_t i = 0; i < n_embd; i++)
            t_f32(x, row)[i] *= 0x1p-6f;
}

START_TEST(experts_by_tensor_cores_differ)
{
    const struct moe_case *c = &moe_cases[_i % N_MOE_CASES];
    struct tensor w[3] = {t_codes(c->type[0], c->n_embd, c->n_ff, c->n_expert),
                          t_codes(c->type[1], c->n_embd, c->n_ff, c->n_expert),
                          t_codes(c->type[2], c->n_ff, c->n_out, c->n_expert)};
    struct tensor x = t_apart(c->n_embd, c->n_tok, 4), y = t_apart(c->n_out, (int64_t)c->n_tok * c->k, 3);
    const bool by_gemm = c->n_prompt * c->k >= 16 * c->n_expert;
    struct op_expert experts[8], away[8];
    int32_t *slot = mem_alloc((size_t)(c->n_tok * c->k) * sizeof *slot, MEM_OTHER);
    struct tensor bias[3] = {t_make(QUANT_F32, c->n_ff, c->n_expert, 1), t_make(QUANT_F32, c->n_ff, c->n_expert, 1),
                             t_make(QUANT_F32, c->n_out, c->n_expert, 1)};
    int n_experts = group(c, w, bias, experts, slot);
    struct op op = {.kind = OP_MOE,
                    .dst = {&y},
                    .src = {&x},
                    .w = {&w[0], &w[1], &w[2], NULL, NULL, NULL, &bias[0], &bias[1], &bias[2]}};
    struct rows rows = {.n = c->n_tok, .n_prompt = c->n_prompt};
    use_card(_i / N_MOE_CASES);
    struct pair p = pair_open(DEVICE_PREFILL_BLAS);

    tame(&x, c->n_embd);
    for (int i = 0; i < 3; i++)
        tame(&bias[i], bias[i].ne[0]);
    mirror_ops(&p, &op, 1);
    for (int e = 0; e < n_experts; e++) {
        away[e] = experts[e];
        for (int i = 0; i < 3; i++) {
            away[e].w[i] = there(&p, experts[e].w[i]);
            away[e].bias[i] = experts[e].bias[i] ? there(&p, experts[e].bias[i]) : NULL;
        }
    }
    for (int part = 0; part < 2; part++) { /* the last one, then the others */
        op.p.moe =
            (struct op_moe){c->k, OP_ACT_SILU, away + (part ? 0 : n_experts - 1), part ? n_experts - 1 : 1, slot};
        ck_assert_msg(run_there(&p, &op, 1, &rows) == 0, "%s", err_text());
    }
    float *got = mem_alloc(tensor_bytes(&y), MEM_OTHER);
    ck_assert_int_eq(p.cuda->ops->download(p.cuda, got, there(&p, y.data), tensor_bytes(&y)), 0);
    op.p.moe = (struct op_moe){c->k, OP_ACT_SILU, experts, n_experts, slot};
    run_here(&op, 1, &rows);
    const int64_t apart = (int64_t)(y.stride[1] / sizeof(float));
    for (int e = 0; e < n_experts; e++)
        for (int i = experts[e].first; i < experts[e].first + experts[e].n; i++) {
            const int s = slot[i], id = expert_of(c, s);
            if (s + 1 < c->n_tok * c->k) /* between rows */
                ck_assert_mem_eq(got + s * apart + c->n_out, t_f32(&y, s) + c->n_out, 3 * sizeof(float));
            if (!by_gemm || s / c->k >= c->n_prompt)
                ck_assert_mem_eq(got + s * apart, t_f32(&y, s), (size_t)c->n_out * sizeof(float));
            else if (i % 7 == 0 || i < 3 || experts[e].n == 1)
                check_slot(c, w, t_f32(&x, s / c->k), id, &experts[e], got + s * apart);
        }
    mem_free(got);
    pair_close(&p);
    for (int i = 0; i < 3; i++) {
        t_free(&w[i]);
        t_free(&bias[i]);
    }
    t_done(&x);
    t_done(&y);
    mem_free(slot);
}
END_TEST

/* ---- when it fails ---- */

START_TEST(failed_open_leaves_something)
{
    struct cuda_opts opts = {.most = {.n_rows = 4, .n_seqs = 1, .n_ctx = 64}, .prefill = DEVICE_PREFILL_BLAS};
    int rc = -1, n = 1;

    for (; rc < 0; n++) {
        struct device *dev;
        emu_fail_nth(n);
        rc = cuda_open(&opts, &dev);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_DEVICE || rc == ERR_NOMEM);
        if (rc == 0)
            dev->ops->close(dev);
        ck_assert_int_eq(emu_n_live(), 0);
    }
    ck_assert_int_gt(n, 40); /* each type's kernels ask for shared memory */
}
END_TEST

int main(void)
{
    const int n_cards = emu_is_real() ? 1 : N_CARDS;
    Suite *suite = suite_create("cuda_gemm");
    TCase *tc = tcase_create("cuda_gemm");

    tcase_add_checked_fixture(tc, pair_setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, tensor_cores_multiply_wrongly, 0, n_cards * N_WEIGHT_TYPES);
    tcase_add_loop_test(tc, tensor_cores_lose_their_place_in_long_rows, 0, n_cards);
    tcase_add_loop_test(tc, a_weight_is_rounded_twice_or_not_the_one_that_was_meant, 0, N_WEIGHT_TYPES);
    tcase_add_test(tc, bits_depend_on_the_tile);
    tcase_add_test(tc, tiles_do_not_fit_the_card);
    tcase_add_loop_test(tc, experts_by_tensor_cores_differ, 0, n_cards * N_MOE_CASES);
    tcase_add_test(tc, failed_open_leaves_something);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
