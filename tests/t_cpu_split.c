/* A small transformer of two layers on the CPU device: the bits of its logits may depend neither on the number of threads,
 * nor on how rows were cut into steps, nor on what else was in a step, nor on the instruction set. */
#include "tests/cpu_step.h"
#include "tests/run_suite.h"

enum { N_EMBD = 256, N_HEAD = 4, N_HEAD_KV = 2, HEAD_DIM = 64, N_EXPERT = 6, TOP_K = 2, N_FF = 96, N_VOCAB = 33 };
enum { N_LAYER = 2, MAX_ROWS = 600, N_SEQ = 2, WINDOW = 100, N_KV = N_HEAD_KV * HEAD_DIM, N_PAGES = 10 };

/* Positions of each sequence: the first goes past a segment of attention. */
static const int seq_len[N_SEQ] = {560, 70};

static struct {
    struct tensor embd, norm, q_norm, q, k, v, bias, o, router, gate, up, down, head;
    double freq[HEAD_DIM / 2];
} weights;

static void weights_make(void)
{
    rnd_seed(7);
    weights.embd = t_weight(QUANT_Q8_0, N_EMBD, N_VOCAB, 1);
    weights.norm = t_weight(QUANT_F32, N_EMBD, 1, 1);
    weights.q_norm = t_weight(QUANT_F32, HEAD_DIM, 1, 1);
    weights.q = t_weight(QUANT_Q4_K, N_EMBD, N_EMBD, 1);
    weights.k = t_weight(QUANT_Q8_0, N_EMBD, N_KV, 1);
    weights.v = t_weight(QUANT_F16, N_EMBD, N_KV, 1);
    weights.bias = t_weight(QUANT_F32, N_EMBD, 1, 1);
    weights.o = t_weight(QUANT_Q4_0, N_EMBD, N_EMBD, 1);
    weights.router = t_weight(QUANT_F32, N_EMBD, N_EXPERT, 1);
    weights.gate = t_weight(QUANT_Q4_K, N_EMBD, N_FF, N_EXPERT);
    weights.up = t_weight(QUANT_Q8_0, N_EMBD, N_FF, N_EXPERT);
    weights.down = t_weight(QUANT_Q8_0, N_FF, N_EMBD, N_EXPERT);
    weights.head = t_weight(QUANT_Q4_K, N_EMBD, N_VOCAB, 1);
    for (int i = 0; i < HEAD_DIM / 2; i++)
        weights.freq[i] = pow(10000, -2.0 * i / HEAD_DIM);
}

static void weights_free(void)
{
    struct tensor *all[] = {&weights.embd, &weights.norm, &weights.q_norm, &weights.q,      &weights.k,
                            &weights.v,    &weights.bias, &weights.o,      &weights.router, &weights.gate,
                            &weights.up,   &weights.down, &weights.head};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        t_free(all[i]);
}

/* Activations. `work` is one piece of memory under four widths, as an arena that is reused: a worker that ran ahead into
 * another width would spoil rows of its neighbour. */
struct acts {
    struct tensor x, table, work_d, work_q, work_gates, work_experts, k, v, att, scores, ids, y, out, logits;
};

static struct acts acts_make(void)
{
    struct acts a;

    a.x = t_make(QUANT_F32, N_EMBD, MAX_ROWS, 1);
    a.table = t_make(QUANT_F32, HEAD_DIM, MAX_ROWS, 1);
    a.work_d = t_make(QUANT_F32, N_EMBD, MAX_ROWS, 1);
    a.work_q = tensor_make(QUANT_F32, N_EMBD, MAX_ROWS, 1, a.work_d.data);
    a.work_experts = tensor_make(QUANT_F32, N_EXPERT, MAX_ROWS, 1, a.work_d.data);
    a.work_gates = t_make(QUANT_F32, TOP_K, MAX_ROWS, 1);
    a.k = t_make(QUANT_F32, N_KV, MAX_ROWS, 1);
    a.v = t_make(QUANT_F32, N_KV, MAX_ROWS, 1);
    a.att = t_make(QUANT_F32, N_EMBD, MAX_ROWS, 1);
    a.ids = t_make(QUANT_I32, TOP_K, MAX_ROWS, 1);
    a.y = t_make(QUANT_F32, N_EMBD, MAX_ROWS * TOP_K, 1);
    a.out = t_make(QUANT_F32, N_EMBD, MAX_ROWS, 1);
    a.logits = t_make(QUANT_F32, N_VOCAB, MAX_ROWS, 1);
    return a;
}

static void acts_free(struct acts *a)
{
    struct tensor *all[] = {&a->x,   &a->table, &a->work_d, &a->work_gates, &a->k,     &a->v,
                            &a->att, &a->ids,   &a->y,      &a->out,        &a->logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        t_free(all[i]);
}

/* A whole run: device, cache and the logits of every position. */
struct run {
    struct fixture f;
    struct acts a;
    struct seq_pages pages[N_SEQ];
    struct kv_seq seqs[N_SEQ];
    enum quant_type kv_type;
    float *logits[N_SEQ]; /* (seq_len, N_VOCAB) */
};

static struct op_attn attn_of(const struct run *r, int layer)
{
    uint64_t one = (uint64_t)N_HEAD_KV * DEVICE_PAGE_TOK * quant_row_bytes(r->kv_type, HEAD_DIM);

    return (struct op_attn){.n_head = N_HEAD,
                            .n_head_kv = N_HEAD_KV,
                            .head_dim_k = HEAD_DIM,
                            .head_dim_v = HEAD_DIM,
                            .scale = 0.125f,
                            .softcap = layer ? 0 : 20.0f,
                            .window = layer ? WINDOW : 0,
                            .group = 0,
                            .kv_type = r->kv_type,
                            .k_off = (uint64_t)layer * 2 * one,
                            .v_off = (uint64_t)layer * 2 * one + one};
}

static struct run run_make_prefill(const char *isa, int n_threads, enum quant_type kv_type, enum device_prefill prefill)
{
    struct run r = {.f = fixture_open(isa, n_threads, prefill), .a = acts_make(), .kv_type = kv_type};
    uint64_t page_bytes = (uint64_t)N_LAYER * 2 * N_HEAD_KV * DEVICE_PAGE_TOK * quant_row_bytes(kv_type, HEAD_DIM);

    for (int s = 0; s < N_SEQ; s++) {
        r.pages[s] = seq_pages_make(N_PAGES, page_bytes, 0);
        r.seqs[s] = r.pages[s].view;
        r.logits[s] = calloc((size_t)(seq_len[s] * N_VOCAB), sizeof(float));
    }
    return r;
}

static struct run run_make(const char *isa, int n_threads, enum quant_type kv_type)
{
    return run_make_prefill(isa, n_threads, kv_type, DEVICE_PREFILL_INT);
}

static void run_free(struct run *r)
{
    for (int s = 0; s < N_SEQ; s++) {
        seq_pages_free(&r->pages[s]);
        free(r->logits[s]);
    }
    acts_free(&r->a);
    fixture_close(&r->f);
}

static int list_layer(struct run *r, int layer, struct op *ops)
{
    struct acts *a = &r->a;
    const struct op list[] = {
        {.kind = OP_RMS_NORM, .dst = {&a->work_d}, .src = {&a->x}, .w = {&weights.norm}, .p.norm.eps = 1e-5f},
        {.kind = OP_MATMUL,
         .n_w = 3,
         .dst = {&a->att, &a->k, &a->v},
         .src = {&a->work_d},
         .w = {&weights.q, &weights.k, &weights.v}},
        {.kind = OP_ADD_BIAS, .dst = {&a->att}, .src = {&a->att}, .w = {&weights.bias}},
        {.kind = OP_RMS_NORM, .dst = {&a->work_q}, .src = {&a->att}, .w = {&weights.q_norm}, .p.norm.eps = 1e-5f},
        {.kind = OP_ROPE,
         .dst = {&a->work_q},
         .src = {&a->work_q, &a->table},
         .p.rope = {.n_head = N_HEAD, .head_dim = HEAD_DIM, .n_rot = HEAD_DIM, .neox = true}},
        {.kind = OP_ROPE,
         .dst = {&a->k},
         .src = {&a->k, &a->table},
         .p.rope = {.n_head = N_HEAD_KV, .head_dim = HEAD_DIM, .n_rot = HEAD_DIM}},
        {.kind = OP_KV_APPEND, .src = {&a->k, &a->v}, .p.attn = attn_of(r, layer)},
        {.kind = OP_ATTENTION, .dst = {&a->att}, .src = {&a->work_q}, .p.attn = attn_of(r, layer)},
        {.kind = OP_MATMUL, .n_w = 1, .dst = {&a->out}, .src = {&a->att}, .w = {&weights.o}},
        {.kind = OP_ADD, .dst = {&a->x}, .src = {&a->x, &a->out}},
        {.kind = OP_RMS_NORM, .dst = {&a->out}, .src = {&a->x}, .w = {&weights.norm}, .p.norm.eps = 1e-5f},
        {.kind = OP_MATMUL, .n_w = 1, .dst = {&a->work_experts}, .src = {&a->out}, .w = {&weights.router}},
        {.kind = OP_ROUTE,
         .dst = {&a->ids, &a->work_gates},
         .src = {&a->work_experts},
         .p.route = {.n_expert = N_EXPERT, .k = TOP_K, .normalize = true, .scale = 1.0f}},
        /* work again under another width, in the same chain as the router's logits */
        {.kind = OP_SCALE, .dst = {&a->work_d}, .src = {&a->out}, .p.scale.f = 1.0f},
    };
    memcpy(ops, list, sizeof list);
    return (int)(sizeof list / sizeof *list);
}

static void run_moe(struct run *r, const struct rows *rows)
{
    struct acts *a = &r->a;
    struct op_expert experts[N_EXPERT];
    int32_t slot[MAX_ROWS * TOP_K];
    const int32_t *ids = a->ids.data;
    int n_experts = 0, n = 0;

    for (int e = 0; e < N_EXPERT; e++) {
        struct op_expert x = {
            .w = {tensor_slice(&weights.gate, e), tensor_slice(&weights.up, e), tensor_slice(&weights.down, e)},
            .scale = {1.0f, 1.0f, 1.0f},
            .first = n};
        for (int s = 0; s < rows->n * TOP_K; s++)
            if (ids[s] == e)
                slot[n++] = s;
        x.n = n - x.first;
        if (x.n)
            experts[n_experts++] = x;
    }
    const struct op ops[] = {
        {.kind = OP_MOE,
         .dst = {&a->y},
         .src = {&a->work_d},
         .w = {&weights.gate, &weights.up, &weights.down},
         .p.moe = {TOP_K, OP_ACT_SILU, experts, n_experts, slot}},
        {.kind = OP_COMBINE, .dst = {&a->out}, .src = {&a->y, &a->work_gates}},
        {.kind = OP_ADD, .dst = {&a->x}, .src = {&a->x, &a->out}},
    };
    fixture_run(&r->f, ops, 3, rows);
}

static void run_step(struct run *r, const struct rows *rows)
{
    struct acts *a = &r->a;
    struct op ops[32];
    const struct op begin[] = {
        {.kind = OP_EMBED, .dst = {&a->x}, .w = {&weights.embd}, .p.scale.f = 2.0f},
        {.kind = OP_ROPE_TABLE, .dst = {&a->table}, .p.rope_table = {weights.freq, 1.0f}},
    };
    const struct op end[] = {
        {.kind = OP_GET_ROWS, .rows = OP_ROWS_OUT, .dst = {&a->out}, .src = {&a->x}},
        {.kind = OP_RMS_NORM,
         .rows = OP_ROWS_OUT,
         .dst = {&a->out},
         .src = {&a->out},
         .w = {&weights.norm},
         .p.norm.eps = 1e-5f},
        {.kind = OP_MATMUL, .rows = OP_ROWS_OUT, .n_w = 1, .dst = {&a->logits}, .src = {&a->out}, .w = {&weights.head}},
        {.kind = OP_SOFTCAP, .rows = OP_ROWS_OUT, .dst = {&a->logits}, .src = {&a->logits}, .p.scale.f = 30.0f},
    };

    for (int layer = 0; layer < N_LAYER; layer++) {
        int n = 0;
        if (layer == 0)
            ops[n++] = begin[0], ops[n++] = begin[1];
        n += list_layer(r, layer, ops + n);
        fixture_run(&r->f, ops, n, rows);
        run_moe(r, rows);
    }
    fixture_run(&r->f, end, 4, rows);
    for (int i = 0; i < rows->n_out; i++) {
        int row = rows->out_row[i];
        memcpy(r->logits[rows->seq[row]] + rows->pos[row] * N_VOCAB, t_f32(&a->logits, i), N_VOCAB * sizeof(float));
    }
}

static int32_t token_at(int seq, int pos)
{
    return (int32_t)((pos * 31 + pos / 7 + seq * 5) % N_VOCAB);
}

/* Run all positions of both sequences; every step takes up to max_rows of each, a random number if cuts is set. Every
 * row's logits are asked for. */
static void run_all(struct run *r, int max_rows, bool cuts)
{
    int done[N_SEQ] = {0};
    int32_t token[MAX_ROWS], pos[MAX_ROWS], seq[MAX_ROWS], out_row[MAX_ROWS];

    while (done[0] < seq_len[0] || done[1] < seq_len[1]) {
        int n = 0;
        for (int s = 0; s < N_SEQ; s++) {
            int take = cuts ? rnd_int(max_rows + 1) : max_rows;
            for (int i = 0; i < take && done[s] < seq_len[s] && n < MAX_ROWS; i++, n++) {
                token[n] = token_at(s, done[s]);
                pos[n] = done[s]++;
                seq[n] = s;
                out_row[n] = n;
            }
        }
        struct rows rows = {.n = n,
                            .n_prompt = n,
                            .n_out = n,
                            .token = token,
                            .pos = pos,
                            .seq = seq,
                            .out_row = out_row,
                            .seqs = r->seqs};
        run_step(r, &rows);
    }
}

static void check_same(const struct run *a, const struct run *b, const char *what, int n)
{
    for (int s = 0; s < N_SEQ; s++)
        for (int i = 0; i < seq_len[s] * N_VOCAB; i++) {
            ck_assert_msg(isfinite(a->logits[s][i]), "%s %d: logit %d of position %d is %g", what, n, i % N_VOCAB,
                          i / N_VOCAB, (double)a->logits[s][i]);
            ck_assert_msg(!memcmp(&a->logits[s][i], &b->logits[s][i], sizeof(float)),
                          "%s %d: sequence %d position %d logit %d: %.9g and %.9g", what, n, s, i / N_VOCAB,
                          i % N_VOCAB, (double)a->logits[s][i], (double)b->logits[s][i]);
        }
}

START_TEST(logits_do_not_depend_on_the_number_of_threads)
{
    static const int n_threads[] = {2, 3, 5};
    struct run one = run_make(NULL, 1, QUANT_F16);

    run_all(&one, 64, false);
    for (size_t i = 0; i < sizeof n_threads / sizeof *n_threads; i++) {
        struct run many = run_make(NULL, n_threads[i], QUANT_F16);
        run_all(&many, 64, false);
        check_same(&one, &many, "threads", n_threads[i]);
        run_free(&many);
    }
    run_free(&one);
}
END_TEST

static void cuts_case(enum quant_type kv_type, int n_threads, enum device_prefill prefill)
{
    struct run whole = run_make_prefill(NULL, 2, kv_type, prefill);

    rnd_seed(11);
    run_all(&whole, MAX_ROWS, false);
    for (int max_rows = 3; max_rows <= 200; max_rows += 100) {
        struct run cut = run_make_prefill(NULL, n_threads, kv_type, prefill);
        run_all(&cut, max_rows, true);
        check_same(&whole, &cut, "rows a step", max_rows);
        run_free(&cut);
    }
    run_free(&whole);
}

START_TEST(logits_do_not_depend_on_how_rows_are_cut_into_steps)
{
    cuts_case(QUANT_F16, 2, DEVICE_PREFILL_INT);
    cuts_case(QUANT_Q8_0, 3, DEVICE_PREFILL_INT);
    cuts_case(QUANT_F16, 3, DEVICE_PREFILL_BLAS);
}
END_TEST

START_TEST(logits_do_not_depend_on_the_instruction_set)
{
    struct run ref = run_make("ref", 2, QUANT_Q8_0);

    run_all(&ref, 100, false);
    for (const char *const *isa = cpu_isa_names(); *isa; isa++) {
        if (!cpu_isa_has(*isa))
            continue;
        struct run fast = run_make(*isa, 2, QUANT_Q8_0);
        run_all(&fast, 100, false);
        check_same(&ref, &fast, *isa, 0);
        run_free(&fast);
    }
    run_free(&ref);
}
END_TEST

START_TEST(steps_with_few_or_no_logits_leave_the_others_alone)
{
    struct run all = run_make(NULL, 2, QUANT_F16), last = run_make(NULL, 2, QUANT_F16);
    int32_t token[100], pos[100], seq[100] = {0}, out_row[1];

    run_all(&all, MAX_ROWS, false);
    for (int step = 0; step < 3; step++) {
        int n = step == 2 ? 1 : 30;
        for (int i = 0; i < n; i++) {
            pos[i] = step * 30 + i;
            token[i] = token_at(0, pos[i]);
        }
        out_row[0] = n - 1;
        struct rows rows = {.n = n,
                            .n_out = step ? 1 : 0,
                            .token = token,
                            .pos = pos,
                            .seq = seq,
                            .out_row = out_row,
                            .seqs = last.seqs};
        run_step(&last, &rows);
    }
    for (int p = 59; p <= 60; p++)
        ck_assert_mem_eq(all.logits[0] + p * N_VOCAB, last.logits[0] + p * N_VOCAB, N_VOCAB * sizeof(float));
    run_free(&all);
    run_free(&last);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cpu_split");
    TCase *tc = tcase_create("cpu_split");

    tcase_set_timeout(tc, 120);
    tcase_add_unchecked_fixture(tc, weights_make, weights_free);
    tcase_add_test(tc, logits_do_not_depend_on_the_number_of_threads);
    tcase_add_test(tc, logits_do_not_depend_on_how_rows_are_cut_into_steps);
    tcase_add_test(tc, logits_do_not_depend_on_the_instruction_set);
    tcase_add_test(tc, steps_with_few_or_no_logits_leave_the_others_alone);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
