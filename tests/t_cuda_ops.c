/* Every op of ops.def on the CUDA device over the emulated runtime, against the plain C kernels on the CPU, bit for bit; experts are
 * t_cuda_moe.c's, and what tensor cores do is t_cuda_gemm.c's. */
#include "tests/cuda_pair.h"
#include "tests/run_suite.h"

#include "cuda/launch.h"

#include <float.h>

/* ---- rows ---- */

START_TEST(embed_differs)
{
    static const int32_t token[] = {4, 0, 6, 4};
    enum quant_type type = weight_types[_i];
    struct tensor w = t_codes(type, 512, 7, 1), out = t_apart(512, 5, 3);
    struct op op = {.kind = OP_EMBED, .dst = {&out}, .w = {&w}, .p.scale.f = 3.25f};

    same_result(&op, 1, &(struct rows){.n = 4, .token = token}, quant_info((int)type)->name);
    t_done(&out);
    t_free(&w);
}
END_TEST

START_TEST(embed_of_rows_that_want_logits_differs)
{
    static const int32_t token[] = {4, 0, 6, 5}, out_row[] = {3, 1};
    struct tensor w = t_codes(QUANT_Q4_K, 256, 7, 1), out = t_apart(256, 4, 3);
    struct op op = {.kind = OP_EMBED, .rows = OP_ROWS_OUT, .dst = {&out}, .w = {&w}, .p.scale.f = 1};

    same_result(&op, 1, &(struct rows){.n = 4, .n_out = 2, .token = token, .out_row = out_row}, "embed");
    t_done(&out);
    t_free(&w);
}
END_TEST

static void norm_case(int64_t width, int64_t len, bool in_place)
{
    struct tensor x = t_apart(width, 4, 5), y = t_apart(width, 4, 1), w = t_make(QUANT_F32, len, 1, 1);
    struct op op = {.kind = OP_RMS_NORM, .dst = {in_place ? &x : &y}, .src = {&x}, .w = {&w}, .p.norm.eps = 1e-2f};

    same_result(&op, 1, &(struct rows){.n = 3}, "norm");
    t_done(&x);
    t_done(&y);
    t_free(&w);
}

START_TEST(norm_differs)
{
    norm_case(257, 257, false);
    norm_case(9000, 9000, true); /* three pieces */
    norm_case(192, 64, true);
    norm_case(21, 7, false);
    norm_case(1, 1, false);
}
END_TEST

struct elementwise {
    enum op_kind kind;
    float f;
    enum op_act act;
    int64_t b_width; /* of src1; -1: the row's; 0: none */
    int64_t w_width;
};

static const struct elementwise elementwise[] = {
    {OP_ADD, 0, OP_ACT_SILU, -1, 0},      {OP_ADD_BIAS, 0, OP_ACT_SILU, 0, -1},  {OP_SCALE, 1.5f, OP_ACT_SILU, 0, 0},
    {OP_SCALE, 9, OP_ACT_SILU, 0, 1},     {OP_SOFTCAP, 0.5f, OP_ACT_SILU, 0, 0}, {OP_GLU, 0, OP_ACT_SILU, -1, 0},
    {OP_GLU, 0, OP_ACT_GELU_TANH, -1, 0}, {OP_GLU, 0, OP_ACT_SWIGLU_OAI, -1, 0}, {OP_GATE, 0, OP_ACT_SILU, 1, 0},
    {OP_GATE, 0, OP_ACT_SILU, -1, 0},
};

/* Values of every size, some not finite. */
static void fill_wild(struct tensor *t)
{
    static const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, 88.8f, -104.5f, 3e38f};

    for (int64_t row = 0; row < t->ne[1]; row++)
        for (int64_t i = 0; i < t->ne[0]; i++)
            t_f32(t, row)[i] = i % 7 == 3 ? special[rnd_int(9)] : rnd() * exp2f((float)rnd_int(16) - 8);
}

static void elementwise_case(const struct elementwise *e, int64_t width, bool in_place)
{
    struct tensor a = t_apart(width, 4, 3), y = t_apart(width, 4, 2);
    struct tensor b = t_apart(e->b_width < 0 ? width : 1, 4, 1),
                  w = t_make(QUANT_F32, e->w_width < 0 ? width : 1, 1, 1);
    struct op op = {.kind = e->kind,
                    .dst = {in_place ? &a : &y},
                    .src = {&a, e->b_width ? &b : NULL},
                    .w = {e->w_width ? &w : NULL}};

    fill_wild(&a);
    fill_wild(&b);
    if (e->kind == OP_GLU)
        op.p.glu.act = e->act;
    else
        op.p.scale.f = e->f;
    same_result(&op, 1, &(struct rows){.n = 3}, device_op_name(e->kind));
    t_done(&a);
    t_done(&y);
    t_done(&b);
    t_free(&w);
}

START_TEST(elementwise_op_differs)
{
    for (size_t e = 0; e < sizeof elementwise / sizeof *elementwise; e++) {
        elementwise_case(&elementwise[e], 301, false);
        elementwise_case(&elementwise[e], 64, true);
        elementwise_case(&elementwise[e], 1, true);
    }
}
END_TEST

static void rope_case(bool neox, int head_dim, int n_rot, bool at_end)
{
    enum { N = 3, HEADS = 5 };
    static const int32_t pos[N] = {0, 17, 70000};
    double freq[64];
    struct tensor table = t_make(QUANT_F32, n_rot, N, 1), x = t_apart(HEADS * head_dim, N, 3);
    struct op ops[2] = {
        {.kind = OP_ROPE_TABLE, .dst = {&table}, .p.rope_table = {freq, 1.25f}},
        {.kind = OP_ROPE, .dst = {&x}, .src = {&x, &table}, .p.rope = {HEADS, head_dim, n_rot, neox, at_end, false}},
    };

    for (int i = 0; i < n_rot / 2; i++)
        freq[i] = pow(10000, -2.0 * i / n_rot);
    same_result(ops, 2, &(struct rows){.n = N, .pos = pos}, "rope");
    t_free(&table);
    t_done(&x);
}

/* From heads of another size, or from one to all. */
static void rope_over_case(int head_dim, int src_dim, int n_rot, bool from_one)
{
    enum { N = 3, HEADS = 5 };
    struct tensor table = t_make(QUANT_F32, n_rot, N, 1), y = t_apart(HEADS * head_dim, N, 3),
                  x = t_apart((from_one ? 1 : HEADS) * src_dim, N, 2);
    struct op op = {
        .kind = OP_ROPE, .dst = {&y}, .src = {&x, &table}, .p.rope = {HEADS, head_dim, n_rot, false, true, from_one}};

    same_result(&op, 1, &(struct rows){.n = N}, "rope of a part");
    t_free(&table);
    t_done(&x);
    t_done(&y);
}

START_TEST(part_of_a_head_differs)
{
    rope_over_case(96, 64, 32, false);
    rope_over_case(64, 96, 32, true);
    rope_over_case(20, 37, 6, false);
    norm_case(96, 64, true);
    norm_case(330, 300, true); /* by a whole block */
}
END_TEST

START_TEST(rope_differs)
{
    rope_case(true, 128, 128, false);
    rope_case(false, 64, 64, false);
    rope_case(true, 96, 40, false);
    rope_case(false, 20, 10, false);
    rope_case(false, 96, 32, true);
}
END_TEST

static void route_case(enum op_route_fn fn, int n_expert, int k, bool has_bias, bool normalize, int broken, int n_group,
                       int n_group_used)
{
    struct tensor x = t_apart(n_expert, 6, 1), ids = t_make(QUANT_I32, k, 6, 1), gates = t_apart(k, 6, 2),
                  bias = t_make(QUANT_F32, n_expert, 1, 1);
    struct op op = {.kind = OP_ROUTE,
                    .dst = {&ids, &gates},
                    .src = {&x},
                    .w = {has_bias ? &bias : NULL},
                    .p.route = {n_expert, k, fn, normalize, 2.5f, n_group, n_group_used}};

    for (int row = 0; row < 6; row++)
        for (int e = 0; e < n_expert; e++) {
            t_f32(&x, row)[e] *= 4;
            if (broken && row < 3) /* equal ones, and no numbers */
                t_f32(&x, row)[e] = row == 0 ? 1.0f : row == 1 ? NAN : (float)(e % 3) * 0.5f;
        }
    same_result(&op, 1, &(struct rows){.n = 6}, "route");
    t_done(&x);
    t_free(&ids);
    t_done(&gates);
    t_free(&bias);
}

START_TEST(route_differs)
{
    static const enum op_route_fn fns[] = {OP_ROUTE_SOFTMAX, OP_ROUTE_SOFTMAX_TOPK, OP_ROUTE_SIGMOID};
    for (int f = 0; f < 3; f++)
        for (int broken = 0; broken < 2; broken++) {
            route_case(fns[f], 8, 2, false, true, broken, 0, 0);
            route_case(fns[f], 128, 8, true, false, broken, 0, 0);
            route_case(fns[f], 37, 37, true, true, broken, 0, 0);
            route_case(fns[f], 300, 10, false, false, broken, 0, 0);
            route_case(fns[f], 256, 8, true, true, broken, 8, 4);
            route_case(fns[f], 60, 6, false, false, broken, 6, 3);
            route_case(fns[f], 160, 6, true, true, broken, 40, 5); /* more groups than lanes */
        }
}
END_TEST

/* What a row needs of a block's shared memory grows with the experts and with those that it gets. */
START_TEST(route_to_too_many_is_taken)
{
    static const int used[] = {CU_ROUTE_MAX_USED, CU_ROUTE_MAX_USED + 1};

    route_case(OP_ROUTE_SIGMOID, CU_ROUTE_MAX_EXPERTS, CU_ROUTE_MAX_USED, true, true, 0, DEVICE_MAX_EXPERT_GROUPS,
               DEVICE_MAX_EXPERT_GROUPS);
    for (int i = 0; i < 2; i++) {
        struct tensor x = t_make(QUANT_F32, CU_ROUTE_MAX_EXPERTS, 1, 1), ids = t_make(QUANT_I32, used[i], 1, 1),
                      gates = t_make(QUANT_F32, used[i], 1, 1);
        struct op op = {.kind = OP_ROUTE,
                        .dst = {&ids, &gates},
                        .src = {&x},
                        .p.route = {.n_expert = CU_ROUTE_MAX_EXPERTS, .k = used[i], .scale = 1}};
        ck_assert_int_eq(cuda_device_ops.can(&op), i == 0);
        t_free(&x);
        t_free(&ids);
        t_free(&gates);
    }
}
END_TEST

/* Rows of one kind each: any values, few different ones, all equal, zeros of either sign, hardly any or no finite ones. */
static void fill_to_rank(struct tensor *x)
{
    static const float special[] = {NAN, INFINITY, -INFINITY, -NAN};

    for (int64_t row = 0; row < x->ne[1]; row++)
        for (int64_t i = 0; i < x->ne[0]; i++) {
            float *v = &t_f32(x, row)[i];
            *v = row % 7 == 1   ? (float)rnd_int(5) - 2
                 : row % 7 == 2 ? -1.5f
                 : row % 7 == 3 ? (rnd_int(2) ? 0.0f : -0.0f)
                 : row % 7 == 4 ? (i % 97 == 5 ? -3e38f : special[rnd_int(4)])
                 : row % 7 == 5 ? special[i % 4]
                 : row % 7 == 6 ? (float)-i
                                : *v;
            if (row % 7 == 0 && rnd_int(50) == 0)
                *v = special[rnd_int(4)];
        }
}

static void top_k_case(int64_t n_vocab, int k, int n)
{
    struct tensor x = t_apart(n_vocab, n, 3), y = t_make(QUANT_I32, 2 * k, n, 1);
    static const int32_t out_row[16] = {0};
    struct op op = {.kind = OP_TOP_K, .rows = OP_ROWS_OUT, .dst = {&y}, .src = {&x}};
    char what[64];

    snprintf(what, sizeof what, "top %d of %d", k, (int)n_vocab);
    fill_to_rank(&x);
    same_result(&op, 1, &(struct rows){.n = n, .n_out = n, .out_row = out_row}, what);
    t_done(&x);
    t_free(&y);
}

START_TEST(top_k_differs)
{
    static const int ks[] = {1, 2, 40, 64, 100, DEVICE_MAX_TOP_K};
    int k = ks[_i];

    top_k_case(1, k, 1);
    top_k_case(37, k, 7);
    top_k_case(1000, k, 7);
    top_k_case(2048, k, 3);
    top_k_case(2049, k, 2);
    top_k_case(5000, k, 7);  /* slices of a chunk or two */
    top_k_case(40007, k, 3); /* as many as there may be, of several chunks */
}
END_TEST

START_TEST(top_k_of_too_many_is_taken)
{
    struct tensor x = t_make(QUANT_F32, 1000, 1, 1), y = t_make(QUANT_I32, 2 * DEVICE_MAX_TOP_K + 2, 1, 1);
    struct op op = {.kind = OP_TOP_K, .dst = {&y}, .src = {&x}};

    ck_assert(!cuda_device_ops.can(&op));
    y.ne[0] = 2 * DEVICE_MAX_TOP_K;
    ck_assert(cuda_device_ops.can(&op));
    y.ne[0] = 3;
    ck_assert(!cuda_device_ops.can(&op));
    y.ne[0] = 2 * DEVICE_MAX_TOP_K + 2;
    t_free(&x);
    t_free(&y);
}
END_TEST

START_TEST(combine_or_get_rows_differs)
{
    static const int32_t out_row[] = {1, 4};
    struct tensor y = t_apart(301, 5 * 4, 1), gates = t_apart(4, 5, 3), out = t_apart(301, 5, 7);
    struct op combine = {.kind = OP_COMBINE, .dst = {&out}, .src = {&y, &gates}};
    struct op get = {.kind = OP_GET_ROWS, .rows = OP_ROWS_OUT, .dst = {&out}, .src = {&y}};

    same_result(&combine, 1, &(struct rows){.n = 5}, "combine");
    same_result(&get, 1, &(struct rows){.n = 5, .n_out = 2, .out_row = out_row}, "get_rows");
    t_done(&y);
    t_done(&gates);
    t_done(&out);
}
END_TEST

/* ---- matmul ---- */

/* The forms of activations at their edges: zeros, one large value, equal ones, what is not finite, what is tiny. */
static void fill_rows(struct tensor *x)
{
    for (int64_t row = 0; row < x->ne[1]; row++)
        for (int64_t i = 0; i < x->ne[0]; i++) {
            float *v = &t_f32(x, row)[i];
            switch (row % 9) {
            case 2:
                *v = 0;
                break;
            case 3:
                *v = i % 3 ? 1.5f : -1.5f;
                break;
            case 4:
                *v = i == 5 ? 1e30f : *v;
                break;
            case 5:
                *v *= 1e-39f;
                break;
            case 6:
                *v = i == x->ne[0] - 1 ? INFINITY : *v;
                break;
            case 7:
                *v = i == 33 % x->ne[0] ? NAN : *v * exp2f((float)(i % 20));
                break;
            default:
                break;
            }
        }
}

static void matmul_case(enum quant_type type, int64_t n_cols, int64_t n_rows, int n, int w_apart)
{
    const struct quant_info *info = quant_info((int)type);
    struct tensor w = t_codes(type, n_cols + (int64_t)w_apart * info->block_len, n_rows, 1);
    struct tensor x = t_apart(n_cols, n, 4), y = t_apart(n_rows, n, 3);
    struct op op = {.kind = OP_MATMUL, .dst = {&y}, .src = {&x}, .w = {&w}, .n_w = 1};
    char what[64];

    w.ne[0] = n_cols;
    fill_rows(&x);
    snprintf(what, sizeof what, "%s %d x %d, %d rows", info->name, (int)n_cols, (int)n_rows, n);
    same_result(&op, 1, &(struct rows){.n = n}, what);
    w.ne[0] = n_cols + (int64_t)w_apart * info->block_len;
    t_free(&w);
    t_done(&x);
    t_done(&y);
}

/* A matrix for each head, which has 8 values more than are multiplied, and 4 more than are written; is_shared: all heads read the same. */
static void heads_case(enum quant_type type, int64_t n_cols, int64_t n_rows, int n_head, int n, bool is_shared)
{
    struct tensor w = t_codes(type, n_cols, n_rows, n_head), y = t_make(QUANT_F32, n_head * (n_rows + 4), n, 1);
    struct tensor x = t_make(QUANT_F32, (is_shared ? 1 : n_head) * (n_cols + 8), n, 1);
    struct op op = {.kind = OP_MATMUL_HEADS,
                    .dst = {&y},
                    .src = {&x},
                    .w = {&w},
                    .n_w = 1,
                    .p.heads = {.n_head = n_head, .is_shared = is_shared}};

    same_result(&op, 1, &(struct rows){.n = n}, quant_info((int)type)->name);
    t_free(&w);
    t_free(&x);
    t_free(&y);
}

START_TEST(product_of_each_head_differs)
{
    enum quant_type type = weight_types[_i];
    int64_t least = quant_info((int)type)->act == QUANT_ACT_Q8X256 ? 256 : 64;

    heads_case(type, least, 40, 5, 1, false);
    heads_case(type, least, 19, 3, 9, false);
    heads_case(type, 2 * least, 37, 3, 20, true); /* tiles of tensor cores */
    heads_case(type, 2 * least, 130, 2, 70, false);
}
END_TEST

START_TEST(product_on_another_card_differs)
{
    enum quant_type type = weight_types[_i % N_WEIGHT_TYPES];

    emu_seed((uint64_t)_i);
    pair_use_card(_i / N_WEIGHT_TYPES);
    matmul_case(type, 512, 130, 1, 1); /* rows so short that lanes have several */
    matmul_case(type, 1024, 70, 1, 0);
    matmul_case(type, 2816, 77, 1, 0); /* chunks of columns, the last of them short */
    matmul_case(type, 768, 60, 5, 0);
    matmul_case(type, 2304, 19, 12, 1); /* tiles of places, the last of them short */
}
END_TEST

START_TEST(product_differs)
{
    enum quant_type type = weight_types[_i];
    const struct quant_info *info = quant_info((int)type);
    int64_t least = info->act == QUANT_ACT_Q8X256 ? 256
                    : info->block_len == 64       ? 64
                    : info->act == QUANT_ACT_F32  ? 1
                                                  : 32;

    for (uint64_t seed = 1; seed <= 2; seed++) {
        rnd_seed(seed);
        emu_seed(seed);
        matmul_case(type, least, 9, 1, 0);
        matmul_case(type, least * 3, 16, 9, 2);
        matmul_case(type, 1280, 21, 1, 0); /* a warp's 1024 columns and a part */
        matmul_case(type, 1280, 5, 8, 1);
    }
    matmul_case(type, 4864, 2, 1, 0); /* more than one fold */
    matmul_case(type, 256, 33, 18, 0);
    matmul_case(type, 768, 133, 70, 1); /* tiles of the tensor cores, and parts of them */
}
END_TEST

/* Ops of single rows one after another, more than share a launch, each of them after another that it needs; then what a product takes.
 * group: of the second norm. */
static void chain_case(int n, int width, int group, enum quant_type type)
{
    enum { N_EXPERT = 24, K = 4, HEAD_DIM = 32 };
    struct tensor x = t_apart(width, n, 5), y = t_apart(width, n, 1), z = t_make(QUANT_F32, width, n, 1),
                  out = t_make(QUANT_F32, N_EXPERT, n, 1), ids = t_make(QUANT_I32, K, n, 1),
                  gates = t_make(QUANT_F32, K, n, 1), one = t_make(QUANT_F32, 1, n, 1),
                  table = t_make(QUANT_F32, HEAD_DIM, n, 1), by = t_make(QUANT_F32, width, 1, 1),
                  by_group = t_make(QUANT_F32, group, 1, 1), w = t_codes(type, width, N_EXPERT, 1);
    const struct op ops[] = {
        {.kind = OP_ADD, .dst = {&y}, .src = {&x, &y}},
        {.kind = OP_RMS_NORM, .dst = {&z}, .src = {&y}, .w = {&by}, .p.norm.eps = 1e-6f},
        {.kind = OP_RMS_NORM, .dst = {&z}, .src = {&z}, .w = {&by_group}, .p.norm.eps = 1e-6f},
        {.kind = OP_SCALE, .dst = {&z}, .src = {&z}, .p.scale.f = 3},
        {.kind = OP_ADD_BIAS, .dst = {&z}, .src = {&z}, .w = {&by}},
        {.kind = OP_ROPE,
         .dst = {&z},
         .src = {&z, &table},
         .p.rope = {.n_head = width / HEAD_DIM, .head_dim = HEAD_DIM, .n_rot = HEAD_DIM, .neox = true}},
        {.kind = OP_GLU, .dst = {&x}, .src = {&z, &y}},
        {.kind = OP_GATE, .dst = {&x}, .src = {&x, &one}},
        {.kind = OP_SOFTCAP, .dst = {&z}, .src = {&x}, .p.scale.f = 5},
        {.kind = OP_MATMUL, .dst = {&out}, .src = {&z}, .w = {&w}, .n_w = 1},
        {.kind = OP_ROUTE,
         .dst = {&ids, &gates},
         .src = {&out},
         .p.route = {.n_expert = N_EXPERT, .k = K, .normalize = true, .scale = 1}},
    };

    same_result(ops, sizeof ops / sizeof *ops, &(struct rows){.n = n}, "a chain");
    struct tensor *all[] = {&z, &out, &ids, &gates, &one, &table, &by, &by_group, &w};
    t_done(&x);
    t_done(&y);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        t_free(all[i]);
}

START_TEST(rows_that_share_a_launch_differ)
{
    chain_case(1, 256, 32, QUANT_Q4_K);
    chain_case(8, 256, 256, QUANT_Q8_0);
    chain_case(9, 256, 32, QUANT_Q4_K); /* one more than share a launch */
    chain_case(2, 2560, 512, QUANT_Q6_K);
    chain_case(1, 8192, 128, QUANT_F32);
    chain_case(1, 8448, 8448, QUANT_Q4_K); /* too wide to */
}
END_TEST

/* Matrices of equal types share a launch, up to three. */
static const enum quant_type shared[][4] = {{QUANT_F32, QUANT_Q8_0, QUANT_Q4_K, QUANT_Q6_K},
                                            {QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K, QUANT_Q6_K},
                                            {QUANT_Q8_0, QUANT_Q8_0, QUANT_Q8_0, QUANT_Q8_0},
                                            {QUANT_F16, QUANT_F16, QUANT_F16, QUANT_F32}};
enum { N_SHARED = sizeof shared / sizeof *shared };

START_TEST(products_that_share_their_rows_differ)
{
    static const int n_rows[] = {1, 11, 90};
    static const int32_t out_row[] = {9, 2, 3};
    const int N = n_rows[_i / N_SHARED];
    const enum quant_type *types = shared[_i % N_SHARED];
    struct tensor x = t_make(QUANT_F32, 512, N, 1), w[4], y[4];
    struct op op = {.kind = OP_MATMUL, .src = {&x}, .n_w = 4};

    for (int i = 0; i < 4; i++) {
        w[i] = t_codes(types[i], 512, i == 1 ? 133 : 10 + 3 * i, 1);
        y[i] = t_make(QUANT_F32, w[i].ne[1], N, 1);
        op.dst[i] = &y[i];
        op.w[i] = &w[i];
    }
    same_result(&op, 1, &(struct rows){.n = N}, "four");
    op.rows = OP_ROWS_OUT;
    if (N > 9)
        same_result(&op, 1, &(struct rows){.n = N, .n_out = 3, .out_row = out_row},
                    "four of the rows that want logits");
    for (int i = 0; i < 4; i++) {
        t_free(&w[i]);
        t_free(&y[i]);
    }
    t_free(&x);
}
END_TEST

/* ---- attention ---- */

struct attn_case {
    int n_head, n_head_kv, head_dim_k, head_dim_v, window;
    float softcap;
    enum quant_type kv_type;
    int n_pos[2]; /* of two sequences */
    int n_q[2];   /* their last rows, which are appended and ask */
};

/* Positions before those of the step hold random bytes that are numbers. */
static void fill_pages(struct seq_pages *s, enum quant_type type)
{
    uint64_t bytes = (uint64_t)s->n_pages * s->page_bytes;

    for (uint64_t at = 0; at + 2 <= bytes; at += 2) {
        uint16_t h = quant_f32_to_f16(rnd());
        memcpy(s->memory + at, &h, sizeof h);
    }
    for (uint64_t at = 64; type == QUANT_Q8_0 && at + 34 <= bytes; at += 34)
        for (int i = 2; i < 34; i++)
            s->memory[at + (uint64_t)i] = (char)rnd_bits();
}

/* What an attention case runs on, here and there. */
struct attn_world {
    struct op_attn a;
    int n, n_seqs;
    struct tensor q, k, v, y, sinks;
    struct seq_pages s[2];
    struct kv_seq here[2], away[2];
    void **table[2];
    int32_t *pos, *seq; /* (n) */
};

static void attn_world_make(struct attn_world *w, const struct attn_case *c, bool v_in_k, struct pair *p)
{
    struct op_attn a = {.n_head = c->n_head,
                        .n_head_kv = c->n_head_kv,
                        .head_dim_k = c->head_dim_k,
                        .head_dim_v = c->head_dim_v,
                        .scale = 0.7f,
                        .softcap = c->softcap,
                        .window = c->window,
                        .group = 1,
                        .kv_type = c->kv_type,
                        .k_off = 64,
                        .v_in_k = v_in_k};
    uint64_t k_bytes = (uint64_t)c->n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(c->kv_type, c->head_dim_k);
    a.v_off = v_in_k ? a.k_off : 64 + (k_bytes + 63) / 64 * 64;
    uint64_t page_bytes =
        v_in_k ? 64 + k_bytes
               : a.v_off + (uint64_t)c->n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(c->kv_type, c->head_dim_v);
    int n = c->n_q[0] + c->n_q[1];

    *w = (struct attn_world){.a = a, .n = n, .n_seqs = c->n_q[1] ? 2 : 1};
    w->q = t_apart((int64_t)c->n_head * c->head_dim_k, n, 4);
    w->k = t_apart((int64_t)c->n_head_kv * c->head_dim_k, n, 1);
    w->v = t_apart((int64_t)c->n_head_kv * c->head_dim_v, n, 2);
    w->y = t_apart((int64_t)c->n_head * c->head_dim_v, n, 3);
    w->sinks = t_make(QUANT_F32, c->n_head, 1, 1);
    w->pos = malloc((size_t)n * sizeof *w->pos);
    w->seq = malloc((size_t)n * sizeof *w->seq);
    page_bytes = (page_bytes + 63) / 64 * 64;
    for (int i = 0, row = 0; i < w->n_seqs; i++) {
        w->s[i] = seq_pages_make((c->n_pos[i] + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK, page_bytes, 1);
        fill_pages(&w->s[i], c->kv_type);
        mirror(p, w->s[i].memory, (uint64_t)w->s[i].n_pages * page_bytes);
        w->here[i] = w->away[i] = w->s[i].view;
        w->table[i] = malloc((size_t)w->s[i].n_pages * sizeof *w->table[i]);
        for (int64_t page = 0; page < w->s[i].n_pages; page++)
            w->table[i][page] = there(p, w->s[i].page[page]);
        w->away[i].page[1] = w->table[i];
        for (int k_row = c->n_pos[i] - c->n_q[i]; k_row < c->n_pos[i]; k_row++, row++)
            w->pos[row] = k_row, w->seq[row] = i;
    }
}

static void attn_world_free(struct attn_world *w)
{
    for (int i = 0; i < w->n_seqs; i++) {
        seq_pages_free(&w->s[i]);
        free(w->table[i]);
    }
    t_done(&w->q);
    t_done(&w->k);
    t_done(&w->v);
    t_done(&w->y);
    t_free(&w->sinks);
    free(w->pos);
    free(w->seq);
}

static void attn_run(const struct attn_case *c, bool has_sinks, bool v_in_k)
{
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    struct attn_world w;

    attn_world_make(&w, c, v_in_k, &p);
    const struct tensor *sinks = has_sinks ? &w.sinks : NULL;
    struct op ops[2] = {{.kind = OP_KV_APPEND, .src = {&w.k, v_in_k ? NULL : &w.v}, .p.attn = w.a},
                        {.kind = OP_ATTENTION, .dst = {&w.y}, .src = {&w.q}, .w = {sinks}, .p.attn = w.a}};
    mirror_ops(&p, ops, 2);
    struct rows rows = {.n = w.n, .pos = w.pos, .seq = w.seq, .seqs = w.away};
    ck_assert_msg(run_there(&p, ops, 2, &rows) == 0, "%s", err_text());
    rows.seqs = w.here;
    run_here(ops, 2, &rows);
    same_memory(&p, "attention");
    pair_close(&p);
    attn_world_free(&w);
}

static const struct attn_case attn_cases[] = {
    {4, 2, 32, 32, 0, 0, QUANT_F16, {1, 0}, {1, 0}},         {4, 2, 64, 32, 0, 0, QUANT_F16, {150, 0}, {150, 0}},
    {3, 1, 32, 64, 0, 30, QUANT_F16, {70, 129}, {3, 2}},     {8, 2, 64, 64, 20, 0, QUANT_F16, {200, 90}, {40, 33}},
    {2, 2, 128, 128, 0, 0, QUANT_Q8_0, {65, 64}, {7, 9}},    {16, 1, 32, 32, 100, 5, QUANT_Q8_0, {330, 0}, {5, 0}},
    {4, 1, 256, 256, 0, 0, QUANT_F16, {130, 0}, {11, 0}},    /* keys in two tiles */
    {4, 4, 32, 32, 0, 0, QUANT_F16, {1100, 0}, {1, 0}},      /* three segments, split */
    {4, 2, 32, 32, 600, 0, QUANT_Q8_0, {1500, 700}, {2, 3}}, /* not all rows see as many */
    {2, 1, 32, 32, 0, 0, QUANT_F16, {1100, 0}, {90, 0}},     /* the same, walked by one block */
    {1, 1, 32, 32, 0, 0, QUANT_F16, {16500, 0}, {1, 0}},     /* 33 segments: more than are split at once */
    {8, 2, 128, 128, 0, 0, QUANT_Q8_0, {1100, 0}, {1, 0}},   {8, 1, 128, 128, 0, 0, QUANT_F16, {600, 0}, {1, 0}},
    {16, 1, 128, 96, 0, 0, QUANT_F16, {200, 0}, {3, 0}},     {8, 2, 128, 128, 0, 0, QUANT_Q8_0, {150, 90}, {60, 30}},
    {4, 1, 128, 96, 90, 20, QUANT_F16, {260, 0}, {70, 0}},   {32, 1, 64, 64, 0, 0, QUANT_Q8_0, {70, 0}, {1, 0}},
    {7, 1, 64, 64, 0, 0, QUANT_Q8_0, {100, 0}, {2, 0}},      {8, 1, 256, 256, 0, 0, QUANT_Q8_0, {100, 0}, {3, 0}},
    {8, 1, 256, 256, 0, 0, QUANT_F16, {130, 0}, {17, 0}},    {12, 2, 192, 128, 0, 0, QUANT_F16, {130, 0}, {33, 0}},
    {2, 1, 512, 32, 0, 0, QUANT_F16, {130, 0}, {2, 0}},      {2, 2, 40, 320, 0, 0, QUANT_F16, {70, 0}, {2, 0}},
    {5, 1, 100, 50, 0, 0, QUANT_F16, {140, 0}, {20, 0}},     {2, 1, 7, 9, 0, 0, QUANT_F16, {70, 0}, {9, 0}},
};

static const struct attn_case sink_cases[] = {
    {8, 1, 64, 64, 0, 0, QUANT_F16, {150, 70}, {40, 1}},
    {8, 2, 64, 64, 128, 0, QUANT_Q8_0, {700, 0}, {1, 0}},
    {8, 1, 64, 64, 0, 0, QUANT_F16, {1100, 600}, {1, 2}}, /* by segment */
    {4, 2, 64, 64, 0, 0, QUANT_F16, {1100, 0}, {90, 0}},  /* walked by one block */
};

START_TEST(attention_differs)
{
    rnd_seed((uint64_t)_i + 1);
    emu_seed((uint64_t)_i + 1);
    attn_run(&attn_cases[_i], false, false);
}
END_TEST

/* All heads share one that is keys and values; 576 and 512 values on cards of which each gives a block another room. */
static const struct attn_case latent_cases[] = {
    {4, 1, 96, 64, 0, 0, QUANT_F16, {150, 70}, {40, 1}},    {20, 1, 96, 64, 0, 0, QUANT_Q8_0, {130, 0}, {3, 0}},
    {128, 1, 64, 32, 0, 0, QUANT_F16, {70, 65}, {2, 9}},    {40, 1, 96, 64, 0, 0, QUANT_F16, {600, 0}, {1, 0}},
    {3, 1, 70, 64, 0, 0, QUANT_F16, {66, 0}, {2, 0}}, /* rows that 8 bytes do not divide, which sanitizers see */
    {16, 1, 576, 512, 0, 0, QUANT_F16, {70, 0}, {1, 0}},    {4, 1, 576, 512, 0, 0, QUANT_Q8_0, {130, 0}, {9, 0}},
    {34, 2, 576, 512, 0, 0, QUANT_Q8_0, {530, 66}, {1, 2}}, {3, 1, 580, 516, 0, 0, QUANT_F16, {66, 0}, {2, 0}},
};
enum { N_LATENT_CASES = sizeof latent_cases / sizeof *latent_cases, N_FEW_LATENTS = 5 };

START_TEST(attention_to_latents_differs)
{
    rnd_seed((uint64_t)_i + 1);
    emu_seed((uint64_t)_i + 1);
    pair_use_card(_i / N_LATENT_CASES);
    attn_run(&latent_cases[_i % N_LATENT_CASES], false, true);
}
END_TEST

START_TEST(attention_with_sinks_differs)
{
    rnd_seed((uint64_t)_i + 1);
    emu_seed((uint64_t)_i + 1);
    attn_run(&sink_cases[_i], true, false);
}
END_TEST

/* The pages of some segments, as one of two memories has them: those of bit `side` of a pattern that differs by sequence. */
static void half_of(const struct attn_world *w, const struct kv_seq *whole, int side, void **tables[2],
                    struct kv_seq *out)
{
    for (int i = 0; i < w->n_seqs; i++) {
        out[i] = whole[i];
        out[i].page[1] = tables[i];
        for (int64_t page = 0; page < w->s[i].n_pages; page++) {
            int at = (int)(page / DEVICE_SEGMENT_PAGES), is_far = (0x2cb59 >> (at + i) % 18) & 1;
            tables[i][page] = is_far == side ? whole[i].page[1][page] : NULL;
        }
    }
}

static void run_either(struct pair *p, const struct op *ops, int n_ops, const struct rows *rows, bool is_there)
{
    if (is_there)
        ck_assert_msg(run_there(p, ops, n_ops, rows) == 0, "%s", err_text());
    else
        run_here(ops, n_ops, rows);
}

/* Segments that lie in two memories, `wave` of them at a time: each side's states, merged, on the GPU and here; then the same in
 * one op here. */
static void parts_run(const struct attn_case *c, int wave, bool v_in_k)
{
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    struct attn_world w;

    attn_world_make(&w, c, v_in_k, &p);
    const struct tensor *sinks = wave == 2 ? &w.sinks : NULL;
    int most = c->n_pos[0] > c->n_pos[1] ? c->n_pos[0] : c->n_pos[1];
    int n_segments = (most + DEVICE_ATTN_SEGMENT_TOK - 1) / DEVICE_ATTN_SEGMENT_TOK;
    int64_t state = (int64_t)c->n_head * (c->head_dim_v + 2);
    struct tensor states = t_apart(state, (int64_t)w.n * wave, 3), sums = t_apart(state, w.n, 2);
    struct tensor whole = t_apart(w.y.ne[0], w.n, 3);
    struct op ops[3] = {{.kind = OP_KV_APPEND, .src = {&w.k, v_in_k ? NULL : &w.v}, .p.attn = w.a},
                        {.kind = OP_ATTN_STATES, .dst = {&states}, .src = {&w.q}, .p.attn = w.a},
                        {.kind = OP_ATTN_MERGE, .dst = {&w.y, &sums}, .src = {&states}, .w = {sinks}, .p.attn = w.a}};
    struct op one = {.kind = OP_ATTENTION, .dst = {&whole}, .src = {&w.q}, .w = {sinks}, .p.attn = w.a};

    mirror_ops(&p, ops, 3);
    ops[0].p.attn.is_part = true;
    for (int is_there = 0; is_there < 2; is_there++) {
        void **tables[2][2];
        struct kv_seq halves[2][2];
        struct rows rows[2];
        for (int side = 0; side < 2; side++) {
            for (int i = 0; i < w.n_seqs; i++)
                tables[side][i] = malloc((size_t)w.s[i].n_pages * sizeof(void *));
            half_of(&w, is_there ? w.away : w.here, side, tables[side], halves[side]);
            rows[side] = (struct rows){.n = w.n, .pos = w.pos, .seq = w.seq, .seqs = halves[side]};
        }
        for (int first = 0; first < n_segments; first += wave) {
            for (int i = 0; i < 3; i++)
                ops[i].p.attn.first = first, ops[i].p.attn.n_segments = wave;
            ops[2].p.attn.is_last = first + wave >= n_segments;
            for (int side = 0; side < 2; side++)
                run_either(&p, ops, 2, &rows[side], is_there);
            run_either(&p, &ops[2], 1, &rows[0], is_there);
        }
        for (int i = 0; i < 2 * w.n_seqs; i++)
            free(tables[i % 2][i / 2]);
    }
    same_memory(&p, "parts of attention");
    run_here(&one, 1, &(struct rows){.n = w.n, .pos = w.pos, .seq = w.seq, .seqs = w.here});
    for (int i = 0; i < w.n; i++)
        ck_assert_mem_eq(tensor_row(&whole, i), tensor_row(&w.y, i), (size_t)w.y.ne[0] * sizeof(float));
    pair_close(&p);
    attn_world_free(&w);
    t_done(&states);
    t_done(&sums);
    t_done(&whole);
}

static const struct attn_case parts_cases[] = {
    {4, 2, 32, 32, 0, 0, QUANT_F16, {1, 0}, {1, 0}},
    {8, 2, 32, 64, 0, 30, QUANT_Q8_0, {1500, 700}, {2, 3}}, /* not all rows see as many */
    {4, 4, 64, 32, 0, 0, QUANT_F16, {1100, 0}, {90, 0}},    /* some rows see nothing of the last segment */
    {4, 1, 32, 32, 0, 0, QUANT_Q8_0, {530, 1025}, {70, 3}}, /* a tile of two sequences, over the edge of a segment */
    {1, 1, 32, 32, 0, 0, QUANT_F16, {5000, 0}, {1, 0}},
    {2, 1, 48, 300, 0, 0, QUANT_F16, {1100, 0}, {2, 0}},
    {20, 1, 96, 64, 0, 0, QUANT_F16, {1100, 530}, {2, 3}}, /* from here on values are among keys */
    {3, 1, 600, 544, 0, 0, QUANT_F16, {600, 0}, {1, 0}},   /* columns in two slices */
};
enum { N_PARTS_CASES = sizeof parts_cases / sizeof *parts_cases, N_WAVES = 3 };

START_TEST(parts_of_attention_are_not_the_whole)
{
    static const int waves[N_WAVES] = {1, 2, 16};
    rnd_seed((uint64_t)_i + 1);
    emu_seed((uint64_t)_i + 1);
    parts_run(&parts_cases[_i / N_WAVES], waves[_i % N_WAVES], _i / N_WAVES >= N_PARTS_CASES - 2);
}
END_TEST

/* ---- when it fails ---- */

START_TEST(failed_open_leaves_something)
{
    struct cuda_opts opts = {.most = {.n_rows = 4, .n_seqs = 1, .n_ctx = 64}};
    int n = 1, rc = -1;

    for (; rc < 0; n++) {
        struct device *dev;
        emu_fail_nth(n);
        rc = cuda_open(&opts, &dev);
        int n_calls = emu_n_calls();
        emu_fail_nth(0);
        if (rc < 0)
            ck_assert_ptr_null(dev);
        else
            dev->ops->close(dev);
        ck_assert_int_eq(emu_n_live(), 0);
        ck_assert(rc == 0 || rc == ERR_DEVICE || rc == ERR_NOMEM);
        ck_assert_int_ge(n_calls, rc < 0 ? n : n - 1);
    }
    ck_assert_int_gt(n, 15); /* 4 slots of 3 calls, and others */
}
END_TEST

START_TEST(more_rows_than_a_grid_has_are_taken)
{
    struct device *dev;
    ck_assert_int_eq(cuda_open(&(struct cuda_opts){.most = {.n_rows = 65536, .n_seqs = 1, .n_ctx = 64}}, &dev),
                     ERR_LIMIT);
    ck_assert_int_eq(
        cuda_open(
            &(struct cuda_opts){.most = {.n_rows = 8192, .n_seqs = 1, .n_ctx = 64, .n_expert = 9, .n_expert_used = 8}},
            &dev),
        ERR_LIMIT);
    ck_assert_int_eq(cuda_open(&(struct cuda_opts){.most = {.n_rows = 65535, .n_seqs = 1, .n_ctx = 64}}, &dev), 0);
    dev->ops->close(dev);
}
END_TEST

START_TEST(failed_step_is_not_told_or_spoils_the_next)
{
    static const int32_t token[] = {1, 2};
    struct tensor w = t_codes(QUANT_Q8_0, 64, 4, 1), x = t_make(QUANT_F32, 64, 2, 1), y = t_make(QUANT_F32, 4, 2, 1);
    struct op ops[2] = {{.kind = OP_EMBED, .dst = {&x}, .w = {&w}, .p.scale.f = 1},
                        {.kind = OP_MATMUL, .dst = {&y}, .src = {&x}, .w = {&w}, .n_w = 1}};
    struct rows rows = {.n = 2, .token = token};
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    int rc = ERR_DEVICE;

    mirror_ops(&p, ops, 2);
    ck_assert_int_eq(run_there(&p, ops, 2, &rows), 0);
    run_here(ops, 2, &rows);
    for (int n = 1; rc; n++) {
        emu_fail_nth(n);
        rc = run_there(&p, ops, 2, &rows);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_DEVICE);
        ck_assert_int_eq(run_there(&p, ops, 2, &rows), 0);
        same_memory(&p, "after a failure");
    }
    pair_close(&p);
    t_free(&w);
    t_free(&x);
    t_free(&y);
}
END_TEST

START_TEST(rows_lie_where_their_blocks_cannot_be_read)
{
    static const struct {
        enum quant_type type;
        uint64_t step; /* that divides where any block of it begins: of its bytes, up to 16 */
    } cases[] = {{QUANT_Q8_0, 2},  {QUANT_Q2_K, 4},  {QUANT_IQ4_XS, 8},
                 {QUANT_Q4_K, 16}, {QUANT_Q5_K, 16}, {QUANT_F32, 4}};

    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        struct tensor w = tensor_make(cases[i].type, 256, 5, 1, NULL), x = tensor_make(QUANT_F32, 256, 1, 1, NULL),
                      y = tensor_make(QUANT_F32, 5, 1, 1, NULL);
        struct op op = {.kind = OP_MATMUL, .dst = {&y}, .src = {&x}, .w = {&w}, .n_w = 1};
        w.stride[1] += cases[i].step;
        ck_assert(cuda_device_ops.can(&op));
        w.stride[1] -= cases[i].step / 2;
        ck_assert(!cuda_device_ops.can(&op));
    }
}
END_TEST

START_TEST(weights_are_read_where_they_cannot_be)
{
    struct tensor w = t_codes(QUANT_Q4_K, 256, 5, 1), x = t_make(QUANT_F32, 256, 1, 1), y = t_make(QUANT_F32, 5, 1, 1);
    struct op op = {.kind = OP_MATMUL, .dst = {&y}, .src = {&x}, .w = {&w}, .n_w = 1};
    struct pair p = pair_open(DEVICE_PREFILL_INT);

    mirror_ops(&p, &op, 1);
    ck_assert_int_eq(run_there(&p, &op, 1, &(struct rows){.n = 1}), 0);
    char *data = w.data;
    w.data = data + 8;
    ck_assert_int_eq(run_there(&p, &op, 1, &(struct rows){.n = 1}), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "general.alignment"));
    w.data = data;
    pair_close(&p);
    t_free(&w);
    t_free(&x);
    t_free(&y);
}
END_TEST

START_TEST(too_large_a_step_is_run)
{
    struct tensor a = t_make(QUANT_F32, 8, 300, 1);
    struct op op = {.kind = OP_ADD, .dst = {&a}, .src = {&a, &a}};
    int32_t *token = calloc(3000, sizeof *token);
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    struct rows rows = {.n = 301, .token = token};

    mirror_ops(&p, &op, 1);
    ck_assert_int_eq(run_there(&p, &op, 1, &rows), ERR_ARG); /* more than the tensor has */
    pair_close(&p);
    p = pair_open(DEVICE_PREFILL_INT);
    p.cuda->ops->close(p.cuda);
    ck_assert_int_eq(cuda_open(&(struct cuda_opts){.most = {.n_rows = 1, .n_seqs = 1, .n_ctx = 64}}, &p.cuda), 0);
    mirror_ops(&p, &op, 1);
    rows = (struct rows){.n = 300, .token = token, .pos = token, .seq = token};
    ck_assert_int_eq(run_there(&p, &op, 1, &rows), ERR_LIMIT); /* more than it was opened for */
    pair_close(&p);
    free(token);
    t_free(&a);
}
END_TEST

/* What a driver has compiled from the PTX of an older card: no kernel of it waits on its own. */
START_TEST(code_of_an_older_card_begins_early)
{
    struct tensor w = t_codes(QUANT_Q4_K, 512, 9, 1), x = t_make(QUANT_F32, 512, 1, 1), y = t_make(QUANT_F32, 9, 1, 1);
    struct op ops[2] = {{.kind = OP_MATMUL, .dst = {&y}, .src = {&x}, .w = {&w}, .n_w = 1},
                        {.kind = OP_ADD, .dst = {&y}, .src = {&y, &y}}};

    emu_set_card(10, 4, EMU_MAX_SHARED);
    emu_set_code(7);
    same_result(ops, 2, &(struct rows){.n = 1}, "code for 7.5 on a card of 10.0");
    t_free(&w);
    t_free(&x);
    t_free(&y);
}
END_TEST

/* Two ways of asking for the code that runs: where there are products of warpgroups, it is for 9.0. */
START_TEST(code_for_the_card_is_taken_for_an_older_one_s)
{
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    bool is_of_90 = false, has_wgmma = false;

    ck_assert_int_eq(cu_is_code_of_90(&is_of_90), cudaSuccess);
    ck_assert_int_eq(cu_gemm_has_wgmma(&has_wgmma), cudaSuccess);
    ck_assert(is_of_90 || !has_wgmma);
    pair_close(&p);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_ops");
    TCase *few = tcase_create("few"), *tc = tcase_create("cuda_ops"); /* few: what a sanitizer can bear */
    const int n_cards = emu_is_real() ? 1 : (int)N_PAIR_CARDS;        /* there is one kind */

    tcase_add_checked_fixture(few, pair_setup, NULL);
    tcase_set_timeout(few, 120);
    tcase_add_test(few, embed_of_rows_that_want_logits_differs);
    tcase_add_test(few, norm_differs);
    tcase_add_test(few, rope_differs);
    tcase_add_test(few, part_of_a_head_differs);
    tcase_add_test(few, route_differs);
    tcase_add_test(few, route_to_too_many_is_taken);
    tcase_add_loop_test(few, attention_to_latents_differs, 0, N_FEW_LATENTS);
    tcase_add_loop_test(few, top_k_differs, 0, 6);
    tcase_add_test(few, combine_or_get_rows_differs);
    tcase_add_test(few, rows_that_share_a_launch_differ);
    tcase_add_loop_test(few, products_that_share_their_rows_differ, 0, 3 * N_SHARED);
    tcase_add_loop_test(few, attention_differs, 0, 4);
    tcase_add_loop_test(few, attention_with_sinks_differs, 0, sizeof sink_cases / sizeof *sink_cases);
    suite_add_tcase(suite, few);
    tcase_add_checked_fixture(tc, pair_setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, embed_differs, 0, N_WEIGHT_TYPES);
    tcase_add_test(tc, elementwise_op_differs);
    tcase_add_test(tc, top_k_of_too_many_is_taken);
    tcase_add_loop_test(tc, product_differs, 0, N_WEIGHT_TYPES);
    tcase_add_loop_test(tc, product_on_another_card_differs, 0, n_cards * N_WEIGHT_TYPES);
    tcase_add_loop_test(tc, parts_of_attention_are_not_the_whole, 0, N_PARTS_CASES * N_WAVES);
    tcase_add_loop_test(tc, attention_differs, 4, sizeof attn_cases / sizeof *attn_cases);
    tcase_add_loop_test(tc, attention_to_latents_differs, N_FEW_LATENTS, n_cards * N_LATENT_CASES);
    tcase_add_loop_test(tc, product_of_each_head_differs, 0, N_WEIGHT_TYPES);
    tcase_add_test(tc, failed_open_leaves_something);
    tcase_add_test(tc, more_rows_than_a_grid_has_are_taken);
    tcase_add_test(tc, failed_step_is_not_told_or_spoils_the_next);
    tcase_add_test(tc, code_of_an_older_card_begins_early);
    tcase_add_test(tc, code_for_the_card_is_taken_for_an_older_one_s);
    tcase_add_test(tc, rows_lie_where_their_blocks_cannot_be_read);
    tcase_add_test(tc, weights_are_read_where_they_cannot_be);
    tcase_add_test(tc, too_large_a_step_is_run);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
