/* What latent attention and groups of experts want of ops on the CPU device, on each kernel table that the machine has: products head by
 * head, rotated parts at the end of heads, values that are a part of keys, a choice of groups. */
#include "tests/cpu_step.h"
#include "tests/run_suite.h"

#include "src/device/device_check.h"

#include <float.h>

static const char *const *isas; /* names this machine can run, NULL-terminated */

static void run_one(const char *isa, int n_threads, const struct op *op, const struct rows *rows)
{
    struct fixture f = fixture_open(isa, n_threads, DEVICE_PREFILL_INT);
    fixture_run(&f, op, 1, rows);
    fixture_close(&f);
}

#define FOR_ISAS(isa) for (const char *isa = isas[_i]; isa; isa = NULL)

/* ---- a matrix for each head ---- */

struct heads_case {
    enum quant_type type[2]; /* the second's product is not asked for where it is F64 */
    int n_in, n_out, n_head, n;
    bool is_shared;
};

static const struct heads_case heads_cases[] = {
    {{QUANT_F32, QUANT_F64}, 20, 19, 3, 1, false},   {{QUANT_Q8_0, QUANT_F64}, 64, 130, 5, 3, false},
    {{QUANT_F16, QUANT_F64}, 96, 70, 2, 70, false},  {{QUANT_Q4_K, QUANT_F64}, 256, 33, 3, 9, false},
    {{QUANT_F32, QUANT_Q8_0}, 64, 65, 3, 7, true},   {{QUANT_Q8_0, QUANT_Q8_0}, 64, 70, 4, 40, true},
    {{QUANT_Q4_K, QUANT_Q8_0}, 256, 64, 2, 1, true}, {{QUANT_Q5_0, QUANT_F64}, 128, 40, 16, 2, false},
};

/* What of a head is not multiplied, and not written. */
enum { BEHIND = 8 };

/* The same product head by head, by MATMUL, from rows that hold one head's part alone. */
static void each_head(const char *isa, const struct heads_case *c, const struct tensor *x, const struct tensor *w,
                      const struct tensor *got)
{
    struct tensor part = t_make(QUANT_F32, c->n_in, c->n, 1), y = t_make(QUANT_F32, c->n_out, c->n, 1);

    for (int head = 0; head < c->n_head; head++) {
        struct tensor one = *w;
        one.data = tensor_slice(w, head);
        one.ne[2] = 1;
        for (int i = 0; i < c->n; i++)
            memcpy(t_f32(&part, i), t_f32(x, i) + (c->is_shared ? 0 : head * (c->n_in + BEHIND)),
                   (size_t)c->n_in * sizeof(float));
        struct op op = {.kind = OP_MATMUL, .n_w = 1, .dst = {&y}, .src = {&part}, .w = {&one}};
        run_one(isa, 1, &op, &(struct rows){.n = c->n});
        for (int i = 0; i < c->n; i++) {
            const float *row = t_f32(got, i) + head * (c->n_out + BEHIND);
            ck_assert_mem_eq(row, t_f32(&y, i), (size_t)c->n_out * sizeof *row);
            for (int k = c->n_out; k < c->n_out + BEHIND; k++)
                ck_assert(row[k] == 7.0f);
        }
    }
    t_free(&part);
    t_free(&y);
}

static void heads_run(const char *isa, int n_threads, const struct heads_case *c)
{
    int n_w = c->type[1] == QUANT_F64 ? 1 : 2;
    struct tensor x = t_make(QUANT_F32, (int64_t)(c->is_shared ? 1 : c->n_head) * (c->n_in + BEHIND), c->n, 1);
    struct tensor w[2], y[2];
    struct op op = {
        .kind = OP_MATMUL_HEADS, .n_w = n_w, .src = {&x}, .p.heads = {.n_head = c->n_head, .is_shared = c->is_shared}};

    for (int i = 0; i < n_w; i++) {
        w[i] = t_weight(c->type[i], c->n_in, c->n_out, c->n_head);
        y[i] = t_make(QUANT_F32, (int64_t)c->n_head * (c->n_out + BEHIND), c->n, 1);
        for (int64_t k = 0; k < c->n * y[i].ne[0]; k++)
            t_f32(&y[i], 0)[k] = 7.0f;
        op.w[i] = &w[i];
        op.dst[i] = &y[i];
    }
    run_one(isa, n_threads, &op, &(struct rows){.n = c->n});
    for (int i = 0; i < n_w; i++) {
        each_head(isa, c, &x, &w[i], &y[i]);
        t_free(&w[i]);
        t_free(&y[i]);
    }
    t_free(&x);
}

START_TEST(head_is_multiplied_with_another_s_matrix)
{
    FOR_ISAS(isa)
    for (size_t c = 0; c < sizeof heads_cases / sizeof *heads_cases; c++)
        heads_run(isa, 1 + (int)c % 3, &heads_cases[c]);
}
END_TEST

/* ---- a part of a head, of a row ---- */

enum { N_POS = 3 };
static const int32_t positions[N_POS] = {0, 17, 70000};

static void rope_case(const char *isa, bool neox, int n_head, int head_dim, int src_dim, int n_rot, bool from_one)
{
    double freq[32];
    struct tensor table = t_make(QUANT_F32, n_rot, N_POS, 1), y = t_make(QUANT_F32, n_head * head_dim, N_POS, 1),
                  x = t_make(QUANT_F32, (from_one ? 1 : n_head) * src_dim, N_POS, 1);
    float *before = malloc(tensor_bytes(&y));
    bool is_in_place = head_dim == src_dim && !from_one;
    struct op ops[2] = {
        {.kind = OP_ROPE_TABLE, .dst = {&table}, .p.rope_table = {freq, 1.25f}},
        {.kind = OP_ROPE,
         .dst = {&y},
         .src = {is_in_place ? &y : &x, &table},
         .p.rope = {n_head, head_dim, n_rot, .neox = neox, .at_end = true, .from_one = from_one}},
    };
    struct fixture f = fixture_open(isa, 2, DEVICE_PREFILL_INT);

    memcpy(before, y.data, tensor_bytes(&y));
    for (int i = 0; i < n_rot / 2; i++)
        freq[i] = pow(10000, -2.0 * i / n_rot);
    fixture_run(&f, ops, 2, &(struct rows){.n = N_POS, .pos = positions});
    fixture_close(&f);
    for (int row = 0; row < N_POS * n_head; row++) {
        int i = row / n_head, head = row % n_head;
        const float *was = before + row * head_dim, *b = t_f32(&y, i) + head * head_dim;
        const float *a =
            is_in_place ? was + head_dim - n_rot : t_f32(&x, i) + (from_one ? 0 : head * src_dim) + src_dim - n_rot;
        ck_assert_mem_eq(b, was, (size_t)(head_dim - n_rot) * sizeof *b);
        for (int k = 0; k < n_rot / 2; k++) {
            int one = neox ? k : 2 * k, two = neox ? k + n_rot / 2 : 2 * k + 1;
            double c = 1.25 * cos(positions[i] * freq[k]), s = 1.25 * sin(positions[i] * freq[k]);
            ck_assert_float_eq_tol(b[head_dim - n_rot + one], (float)((double)a[one] * c - (double)a[two] * s), 1e-6f);
            ck_assert_float_eq_tol(b[head_dim - n_rot + two], (float)((double)a[one] * s + (double)a[two] * c), 1e-6f);
        }
    }
    free(before);
    t_free(&table);
    t_free(&x);
    t_free(&y);
}

START_TEST(rotated_part_is_the_wrong_one)
{
    FOR_ISAS(isa)
    {
        rope_case(isa, false, 3, 96, 96, 32, false); /* in place */
        rope_case(isa, true, 3, 20, 20, 12, false);
        rope_case(isa, false, 5, 96, 64, 32, false); /* heads of another size */
        rope_case(isa, true, 2, 20, 37, 6, false);
        rope_case(isa, false, 4, 64, 96, 32, true); /* one head for all */
        rope_case(isa, false, 1, 64, 96, 32, true);
    }
}
END_TEST

START_TEST(end_of_a_row_is_normed_with_its_beginning)
{
    FOR_ISAS(isa)
    {
        struct tensor x = t_make(QUANT_F32, 96, 4, 1), begin = t_make(QUANT_F32, 64, 4, 1),
                      w = t_make(QUANT_F32, 64, 1, 1);
        struct tensor rest = t_make(QUANT_F32, 32, 4, 1);
        struct op all = {.kind = OP_RMS_NORM, .dst = {&x}, .src = {&x}, .w = {&w}, .p.norm.eps = 1e-2f};
        struct op alone = {.kind = OP_RMS_NORM, .dst = {&begin}, .src = {&begin}, .w = {&w}, .p.norm.eps = 1e-2f};
        for (int i = 0; i < 4; i++) {
            memcpy(t_f32(&begin, i), t_f32(&x, i), 64 * sizeof(float));
            memcpy(t_f32(&rest, i), t_f32(&x, i) + 64, 32 * sizeof(float));
        }
        run_one(isa, 2, &all, &(struct rows){.n = 4});
        run_one(isa, 2, &alone, &(struct rows){.n = 4});
        for (int i = 0; i < 4; i++) {
            ck_assert_mem_eq(t_f32(&x, i), t_f32(&begin, i), 64 * sizeof(float));
            ck_assert_mem_eq(t_f32(&x, i) + 64, t_f32(&rest, i), 32 * sizeof(float));
        }
        t_free(&x);
        t_free(&begin);
        t_free(&rest);
        t_free(&w);
    }
}
END_TEST

/* ---- values that are a part of keys ---- */

struct shared_case {
    int n_head, n_head_kv, head_dim_k, head_dim_v, window;
    enum quant_type kv_type;
    int n_pos, n_q; /* the last n_q positions ask */
};

static const struct shared_case shared_cases[] = {
    {4, 1, 96, 64, 0, QUANT_F16, 1, 1},     {4, 1, 96, 64, 0, QUANT_Q8_0, 130, 70},
    {16, 1, 96, 64, 0, QUANT_F16, 70, 5},   {20, 1, 96, 64, 0, QUANT_Q8_0, 1100, 1},
    {128, 1, 64, 32, 0, QUANT_F16, 530, 2}, {6, 2, 20, 12, 0, QUANT_F16, 100, 37},
    {11, 1, 40, 40, 0, QUANT_F16, 70, 70},  {34, 2, 32, 32, 50, QUANT_F16, 90, 20},
};

/* The op's parameters, with values among the keys, or apart. */
static struct op_attn attn_of(const struct shared_case *c, bool v_in_k, uint64_t *page_bytes)
{
    struct op_attn p = {.n_head = c->n_head,
                        .n_head_kv = c->n_head_kv,
                        .head_dim_k = c->head_dim_k,
                        .head_dim_v = c->head_dim_v,
                        .scale = 0.7f,
                        .window = c->window,
                        .kv_type = c->kv_type,
                        .k_off = 64,
                        .v_in_k = v_in_k};
    uint64_t rows = (uint64_t)p.n_head_kv * DEVICE_PAGE_TOK, k_bytes = rows * quant_row_bytes(p.kv_type, p.head_dim_k);

    p.v_off = v_in_k ? p.k_off : p.k_off + k_bytes;
    *page_bytes = p.k_off + k_bytes + (v_in_k ? 0 : rows * quant_row_bytes(p.kv_type, p.head_dim_v));
    return p;
}

/* One op over all, or parts of it, segments of `wave` at a time; out is (n_q, n_head * head_dim_v). */
static void attend(const char *isa, int n_threads, const struct shared_case *c, bool v_in_k, int wave,
                   const struct tensor *k, const struct tensor *v, const struct tensor *q, const struct tensor *out)
{
    uint64_t page_bytes;
    struct op_attn p = attn_of(c, v_in_k, &page_bytes);
    struct seq_pages s = seq_pages_make(c->n_pos / DEVICE_PAGE_TOK + 1, page_bytes, 0);
    int n_segments = (c->n_pos - 1) / DEVICE_ATTN_SEGMENT_TOK + 1;
    int32_t *pos = calloc((size_t)c->n_pos, sizeof *pos), *seq = calloc((size_t)c->n_pos, sizeof *seq);
    struct tensor sums = t_make(QUANT_F32, (int64_t)c->n_head * (c->head_dim_v + 2), c->n_q, 1);
    struct tensor states = t_make(QUANT_F32, sums.ne[0], (int64_t)c->n_q * (wave ? wave : 1), 1);
    struct op ops[2] = {{.kind = OP_KV_APPEND, .src = {k, v_in_k ? NULL : v}, .p.attn = p},
                        {.kind = OP_ATTENTION, .dst = {out}, .src = {q}, .p.attn = p}};
    struct op fold = {.kind = OP_ATTN_STATES, .dst = {&states}, .src = {q}, .p.attn = p};
    struct op merge = {.kind = OP_ATTN_MERGE, .dst = {out, &sums}, .src = {&states}, .p.attn = p};
    struct rows rows = {.n = c->n_q, .pos = pos + c->n_pos - c->n_q, .seq = seq, .seqs = &s.view};

    for (int i = 0; i < c->n_pos; i++)
        pos[i] = i;
    run_one(isa, n_threads, &ops[0], &(struct rows){.n = c->n_pos, .pos = pos, .seq = seq, .seqs = &s.view});
    if (!wave)
        run_one(isa, n_threads, &ops[1], &rows);
    for (int first = 0; wave && first < n_segments; first += wave) {
        fold.p.attn.first = merge.p.attn.first = first;
        fold.p.attn.n_segments = merge.p.attn.n_segments = wave;
        merge.p.attn.is_last = first + wave >= n_segments;
        run_one(isa, n_threads, &fold, &rows);
        run_one(isa, n_threads, &merge, &rows);
    }
    free(pos);
    free(seq);
    t_free(&sums);
    t_free(&states);
    seq_pages_free(&s);
}

/* Values apart are what t_cpu_ops.c holds against doubles. */
static void shared_run(const char *isa, const struct shared_case *c)
{
    struct tensor k = t_make(QUANT_F32, (int64_t)c->n_head_kv * c->head_dim_k, c->n_pos, 1);
    struct tensor v = t_make(QUANT_F32, (int64_t)c->n_head_kv * c->head_dim_v, c->n_pos, 1);
    struct tensor q = t_make(QUANT_F32, (int64_t)c->n_head * c->head_dim_k, c->n_q, 1);
    struct tensor want = t_make(QUANT_F32, (int64_t)c->n_head * c->head_dim_v, c->n_q, 1),
                  got = t_make(QUANT_F32, want.ne[0], c->n_q, 1);

    for (int i = 0; i < c->n_pos * c->n_head_kv; i++)
        memcpy((float *)v.data + i * c->head_dim_v, (float *)k.data + i * c->head_dim_k,
               (size_t)c->head_dim_v * sizeof(float));
    attend(isa, 1, c, false, 0, &k, &v, &q, &want);
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        memset(got.data, 0xff, tensor_bytes(&got));
        attend(isa, n_threads, c, true, 0, &k, NULL, &q, &got);
        ck_assert_mem_eq(got.data, want.data, tensor_bytes(&want));
    }
    for (int wave = 1; wave < 3 && !c->window; wave++) {
        memset(got.data, 0xff, tensor_bytes(&got));
        attend(isa, wave, c, true, wave, &k, NULL, &q, &got);
        ck_assert_mem_eq(got.data, want.data, tensor_bytes(&want));
    }
    t_free(&k);
    t_free(&v);
    t_free(&q);
    t_free(&want);
    t_free(&got);
}

START_TEST(values_among_keys_are_not_those_apart)
{
    FOR_ISAS(isa)
    for (size_t c = 0; c < sizeof shared_cases / sizeof *shared_cases; c++)
        shared_run(isa, &shared_cases[c]);
}
END_TEST

/* ---- groups of experts ---- */

/* -1: of equal ones the lower; a NaN loses. */
static int best_of(const double *x, const bool *is_away, int n)
{
    int best = -1;

    for (int i = 0; i < n; i++)
        if (!is_away[i] && (best < 0 || x[i] > x[best] || (x[i] == x[i] && x[best] != x[best])))
            best = i;
    return best;
}

static void groups_want(const struct op_route *p, const float *logits, const float *bias, int32_t *ids)
{
    double select[64], sums[64];
    bool is_away[64] = {false}, is_chosen[64] = {false};
    int len = p->n_expert / p->n_group;

    for (int e = 0; e < p->n_expert; e++)
        select[e] = (double)((float)(1 / (1 + exp(-(double)logits[e]))) + bias[e]);
    for (int g = 0; g < p->n_group; g++) {
        int one = best_of(select + g * len, is_away + g * len, len);
        is_away[g * len + one] = true;
        int two = best_of(select + g * len, is_away + g * len, len);
        is_away[g * len + one] = false;
        sums[g] = select[g * len + one] + select[g * len + two];
    }
    for (int i = 0; i < p->n_group_used; i++)
        is_chosen[best_of(sums, is_chosen, p->n_group)] = true;
    for (int e = 0; e < p->n_expert; e++)
        select[e] = is_chosen[e / len] ? select[e] : (double)-INFINITY;
    for (int r = 0; r < p->k; r++) {
        ids[r] = best_of(select, is_away, p->n_expert);
        is_away[ids[r]] = true;
    }
}

static void groups_case(const char *isa, int n_expert, int n_group, int n_used, int k)
{
    struct tensor logits = t_make(QUANT_F32, n_expert, 6, 1), bias = t_make(QUANT_F32, n_expert, 1, 1);
    struct tensor ids = t_make(QUANT_I32, k, 6, 1), gates = t_make(QUANT_F32, k, 6, 1);
    struct op op = {.kind = OP_ROUTE,
                    .dst = {&ids, &gates},
                    .src = {&logits},
                    .w = {&bias},
                    .p.route = {n_expert, k, OP_ROUTE_SIGMOID, false, 1.0f, n_group, n_used}};
    int32_t want[64];

    for (int e = 0; e < n_expert; e++) {
        t_f32(&logits, 4)[e] = 1.0f; /* equal scores; then none */
        t_f32(&logits, 5)[e] = e % 3 ? NAN : t_f32(&logits, 5)[e];
        t_f32(&bias, 0)[e] = (float)(e % 5) * 0.125f;
    }
    run_one(isa, 2, &op, &(struct rows){.n = 6});
    for (int i = 0; i < 6; i++) {
        groups_want(&op.p.route, t_f32(&logits, i), t_f32(&bias, 0), want);
        ck_assert_mem_eq(tensor_row(&ids, i), want, (size_t)k * sizeof *want);
        for (int r = 0; r < k && want[r] >= 0; r++) {
            double gate = 1 / (1 + exp(-(double)t_f32(&logits, i)[want[r]]));
            ck_assert(gate != gate || fabs((double)t_f32(&gates, i)[r] - gate) < 1e-6);
        }
    }
    op.w[0] = NULL; /* without a bias what is compared are the scores themselves, which stay gates */
    memset(bias.data, 0, tensor_bytes(&bias));
    run_one(isa, 1, &op, &(struct rows){.n = 6});
    for (int i = 0; i < 6; i++) {
        groups_want(&op.p.route, t_f32(&logits, i), t_f32(&bias, 0), want);
        ck_assert_mem_eq(tensor_row(&ids, i), want, (size_t)k * sizeof *want);
    }
    t_free(&logits);
    t_free(&bias);
    t_free(&ids);
    t_free(&gates);
}

START_TEST(experts_come_from_groups_that_were_not_chosen)
{
    FOR_ISAS(isa)
    {
        groups_case(isa, 8, 4, 2, 3);
        groups_case(isa, 64, 8, 4, 8);
        groups_case(isa, 60, 4, 1, 6);
        groups_case(isa, 12, 6, 6, 12);
        groups_case(isa, 64, 32, 3, 5);
    }
}
END_TEST

/* ---- what is refused ---- */

START_TEST(shapes_that_do_not_fit_are_taken)
{
    struct tensor x = t_make(QUANT_F32, 64, 2, 1), y = t_make(QUANT_F32, 64, 2, 1), w = t_weight(QUANT_F32, 16, 16, 4);
    struct op heads = {.kind = OP_MATMUL_HEADS, .n_w = 1, .dst = {&y}, .src = {&x}, .w = {&w}, .p.heads = {4, false}};
    struct op_attn attn = {
        .n_head = 2, .n_head_kv = 1, .head_dim_k = 64, .head_dim_v = 32, .kv_type = QUANT_F16, .v_in_k = true};
    struct op append = {.kind = OP_KV_APPEND, .src = {&x}, .p.attn = attn};
    struct op_route groups = {64, 4, OP_ROUTE_SOFTMAX, false, 1.0f, 8, 4};
    struct tensor ids = t_make(QUANT_I32, 4, 2, 1), gates = t_make(QUANT_F32, 4, 2, 1);

    ck_assert(device_check_shapes(&heads));
    heads.p.heads.n_head = 2; /* the stack has 4 */
    ck_assert(!device_check_shapes(&heads));
    heads.p.heads.n_head = 4;
    x.stride[1] += 64; /* rows with gaps */
    ck_assert(!device_check_shapes(&heads));
    x.stride[1] -= 64;
    w.ne[1] = 17; /* more than a head of dst */
    ck_assert(!device_check_shapes(&heads));
    w.ne[1] = 16;
    heads.p.heads.is_shared = true; /* 16 of a row of 64 */
    ck_assert(device_check_shapes(&heads));
    ck_assert(device_check_shapes(&append));
    append.src[1] = &y;
    ck_assert(!device_check_shapes(&append));
    append.src[1] = NULL;
    append.p.attn.v_off = 64;
    ck_assert(!device_check_shapes(&append));
    append.p.attn.v_off = 0;
    append.p.attn.head_dim_v = 65;
    ck_assert(!device_check_shapes(&append));
    struct op route = {.kind = OP_ROUTE, .dst = {&ids, &gates}, .src = {&x}, .p.route = groups};
    ck_assert(device_check_shapes(&route));
    const int wrong[][2] = {{7, 4}, {64, 4}, {8, 0}, {8, 9}, {32, 1}, {-8, 4}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        route.p.route.n_group = wrong[i][0];
        route.p.route.n_group_used = wrong[i][1];
        ck_assert_msg(!device_check_shapes(&route), "%d of %d groups", wrong[i][1], wrong[i][0]);
    }
    t_free(&x);
    t_free(&y);
    t_free(&w);
    t_free(&ids);
    t_free(&gates);
}
END_TEST

static void setup(void)
{
    rnd_seed(1);
}

int main(void)
{
    Suite *suite = suite_create("cpu_latent");
    TCase *tc = tcase_create("cpu_latent");
    static const char *mine[16];
    int n = 0;

    for (const char *const *name = cpu_isa_names(); *name; name++)
        if (cpu_isa_has(*name))
            mine[n++] = *name;
    isas = mine;
    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, head_is_multiplied_with_another_s_matrix, 0, n);
    tcase_add_loop_test(tc, rotated_part_is_the_wrong_one, 0, n);
    tcase_add_loop_test(tc, end_of_a_row_is_normed_with_its_beginning, 0, n);
    tcase_add_loop_test(tc, values_among_keys_are_not_those_apart, 0, n);
    tcase_add_loop_test(tc, experts_come_from_groups_that_were_not_chosen, 0, n);
    tcase_add_test(tc, shapes_that_do_not_fit_are_taken);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
