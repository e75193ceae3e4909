/* OP_MOE on the CUDA device over the emulated runtime, against the plain C kernels on the CPU, bit for bit: experts that are listed, and
 * those that the device looks up by itself. What tensor cores do is t_cuda_gemm.c's. */
#include "cuda/launch.h"
#include "tests/cuda_pair.h"
#include "tests/run_suite.h"

/* ---- experts that are listed ---- */

struct moe_case {
    enum quant_type type[3];
    int n_tok, n_expert, k;
    int64_t n_embd, n_ff;
    bool one_takes_all; /* rank 0 is always expert 2 */
    int up_apart;       /* rows of nobody between one expert's up and the next one's */
    bool is_oai;        /* gpt-oss': its gated unit, and biases but for expert 2 */
};

static const struct moe_case moe_cases[] = {
    {{QUANT_F32, QUANT_F32, QUANT_F32}, 5, 4, 2, 48, 80, false, 0, false},
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q8_0}, 1, 8, 3, 256, 96, false, 0, false},
    {{QUANT_Q8_0, QUANT_Q4_K, QUANT_F16}, 70, 6, 2, 256, 33, false, 0, false},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_Q6_K}, 40, 4, 3, 64, 256, true, 0, false},
    /* A single row, whose gate and up become one in the kernel: rows that it codes itself, or that are coded before. */
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, 1, 8, 5, 2304, 768, false, 0, false},
    {{QUANT_Q6_K, QUANT_Q6_K, QUANT_Q4_K}, 1, 8, 8, 512, 256, false, 0, false},
    {{QUANT_IQ3_S, QUANT_IQ3_S, QUANT_Q5_1}, 1, 8, 3, 256, 224, false, 0, false},
    {{QUANT_Q8_0, QUANT_Q8_0, QUANT_Q3_K}, 1, 4, 2, 96, 1280, false, 0, false},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_MXFP4}, 1, 4, 3, 1088, 160, false, 0, false},
    {{QUANT_NVFP4, QUANT_NVFP4, QUANT_Q4_K}, 1, 8, 1, 320, 512, false, 0, false},
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q2_K}, 5, 4, 3, 512, 512, false, 0, false},
    /* Two rows of codes are more than some cards give a block. */
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, 1, 3, 3, 256, 22016, false, 0, false},
    /* Gate and up of an expert begin at different places of 16 bytes. */
    {{QUANT_Q8_0, QUANT_Q8_0, QUANT_Q8_0}, 1, 8, 8, 96, 160, false, 1, false},
    {{QUANT_Q6_K, QUANT_Q6_K, QUANT_Q4_K}, 1, 8, 5, 2304, 256, false, 3, false},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_MXFP4}, 1, 8, 4, 160, 96, false, 0, true},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_Q8_0}, 3, 8, 4, 96, 160, false, 0, true},
    {{QUANT_MXFP4, QUANT_Q8_0, QUANT_MXFP4}, 90, 5, 2, 96, 160, true, 0, true},
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_F16}, 1, 4, 3, 512, 96, false, 0, true},
    {{QUANT_F16, QUANT_BF16, QUANT_F32}, 20, 4, 2, 64, 96, false, 0, true},
};

enum { N_MOE_CASES = sizeof moe_cases / sizeof *moe_cases };

/* Slots grouped by expert, experts in falling order; those left out have no slots. bias: (3) a row for each expert. */
static int group(const struct moe_case *c, const struct tensor w[3], const struct tensor bias[3],
                 struct op_expert *experts, int32_t *slot)
{
    int n = 0, n_experts = 0;

    for (int e = c->n_expert - 1; e >= 0; e--) {
        struct op_expert x = {.first = n};
        for (int i = 0; i < 3; i++) {
            x.w[i] = tensor_slice(&w[i], e);
            x.scale[i] = e == 1 ? 1.0f : 0.5f + (float)(e + i);
            x.bias[i] = c->is_oai && e != 2 ? t_f32(&bias[i], e) : NULL;
        }
        for (int s = 0; s < c->n_tok * c->k; s++) {
            int rank = s % c->k, id = c->one_takes_all ? (rank == 0   ? 2
                                                          : rank == 2 ? 0
                                                                      : rank)
                                                       : (s / c->k * 7 + rank) % c->n_expert;
            if (id == e)
                slot[n++] = s;
        }
        x.n = n - x.first;
        if (x.n)
            experts[n_experts++] = x;
    }
    return n_experts;
}

START_TEST(experts_differ)
{
    const struct moe_case *c = &moe_cases[_i % N_MOE_CASES];
    struct tensor w[3] = {t_codes(c->type[0], c->n_embd, c->n_ff, c->n_expert),
                          t_codes(c->type[1], c->n_embd, c->n_ff + c->up_apart, c->n_expert),
                          t_codes(c->type[2], c->n_ff, c->n_embd, c->n_expert)};
    struct tensor x = t_apart(c->n_embd, c->n_tok, 4), y = t_apart(c->n_embd, (int64_t)c->n_tok * c->k, 3);
    struct tensor bias[3] = {t_make(QUANT_F32, c->n_ff, c->n_expert, 1), t_make(QUANT_F32, c->n_ff, c->n_expert, 1),
                             t_make(QUANT_F32, c->n_embd, c->n_expert, 1)};
    struct op_expert experts[8], away[8];
    int32_t *slot = malloc((size_t)(c->n_tok * c->k) * sizeof *slot);
    w[1].ne[1] = c->n_ff;
    int n_experts = group(c, w, bias, experts, slot), n_half = n_experts / 2;
    struct op op = {
        .kind = OP_MOE, .dst = {&y}, .src = {&x}, .w = {w, w + 1, w + 2, 0, 0, 0, bias, bias + 1, bias + 2}};
    struct rows rows = {.n = c->n_tok};
    pair_use_card(_i / N_MOE_CASES);
    struct pair p = pair_open(DEVICE_PREFILL_INT);

    mirror_ops(&p, &op, 1);
    for (int e = 0; e < n_experts; e++) {
        away[e] = experts[e];
        for (int i = 0; i < 3; i++)
            away[e].w[i] = there(&p, experts[e].w[i]);
        for (int i = 0; i < 3 && experts[e].bias[i]; i++)
            away[e].bias[i] = there(&p, experts[e].bias[i]);
    }
    /* First some of them, so that what is not listed must stay; then the others. */
    for (int part = 0; part < 2; part++) {
        int first = part ? 0 : n_half, n = part ? n_half : n_experts - n_half;
        op.p.moe = (struct op_moe){c->k, c->is_oai ? OP_ACT_SWIGLU_OAI : OP_ACT_SILU, away + first, n, slot};
        ck_assert_msg(run_there(&p, &op, 1, &rows) == 0, "%s", err_text());
        op.p.moe.experts = experts + first;
        run_here(&op, 1, &rows);
        same_memory(&p, "experts");
    }
    pair_close(&p);
    w[1].ne[1] += c->up_apart;
    for (int i = 0; i < 3; i++) {
        t_free(&w[i]);
        t_free(&bias[i]);
    }
    t_done(&x);
    t_done(&y);
    free(slot);
}
END_TEST

/* ---- experts that the device looks up ---- */

struct ids_case {
    enum quant_type type[3];
    int n_expert, k;
    int64_t n_embd, n_ff;
    int up_apart;  /* rows of nobody between one expert's up and the next one's */
    bool is_fused; /* each expert's gate and up are one matrix of the file */
    bool has_scales;
    bool is_oai; /* gpt-oss' gated unit, and biases */
};

static const struct ids_case ids_cases[] = {
    {{QUANT_F32, QUANT_F32, QUANT_F32}, 6, 3, 48, 80, 0, false, true, true},
    {{QUANT_F16, QUANT_F16, QUANT_F32}, 4, 2, 64, 96, 0, true, false, false},
    {{QUANT_F16, QUANT_BF16, QUANT_F16}, 5, 4, 64, 96, 0, false, true, true},
    {{QUANT_Q8_0, QUANT_F32, QUANT_Q4_K}, 5, 2, 96, 256, 0, false, true, false}, /* forms of three kinds */
    {{QUANT_Q4_K, QUANT_Q6_K, QUANT_Q8_0}, 8, 3, 512, 96, 0, false, false, true},
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_F16},
     4,
     3,
     512,
     96,
     0,
     true,
     true,
     true}, /* gate and up become one where down's form is coded alone */
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, 8, 5, 2304, 768, 0, false, false, false},
    {{QUANT_Q6_K, QUANT_Q6_K, QUANT_Q4_K}, 8, 8, 512, 256, 0, true, true, false},
    {{QUANT_IQ3_S, QUANT_IQ3_S, QUANT_Q5_1}, 8, 3, 256, 224, 0, false, true, true},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_MXFP4}, 8, 4, 160, 96, 0, false, false, true},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_Q8_0}, 4, 1, 1088, 160, 0, true, true, true},
    {{QUANT_NVFP4, QUANT_NVFP4, QUANT_Q2_K}, 8, 2, 320, 512, 0, false, true, false},
    /* Gate and up of an expert begin at different places of 16 bytes; of the second, those of the first expert do not. */
    {{QUANT_Q8_0, QUANT_Q8_0, QUANT_Q8_0}, 8, 8, 96, 160, 1, false, true, true},
    {{QUANT_Q6_K, QUANT_Q6_K, QUANT_Q4_K}, 8, 5, 2304, 256, 3, false, false, true},
    {{QUANT_Q8_0, QUANT_Q8_0, QUANT_Q3_K},
     4,
     2,
     96,
     256,
     8,
     true,
     true,
     false}, /* and where rows of nobody follow one matrix of both */
};

enum { N_IDS_CASES = sizeof ids_cases / sizeof *ids_cases, N_STACKS = 9 };

/* A layer's stacks: w0 to w8 of its op. */
struct stacks {
    struct tensor w[N_STACKS], all[N_STACKS]; /* all: what has memory */
};

static void stacks_make(struct stacks *s, const struct ids_case *c)
{
    const int64_t widths[3] = {c->n_ff, c->n_ff, c->n_embd};

    memset(s, 0, sizeof *s);
    for (int i = 0; i < 3; i++) {
        const int64_t n_in = i == 2 ? c->n_ff : c->n_embd, apart = i == 1 ? c->up_apart : 0;
        if (c->is_fused && i == 1) {
            s->w[1] = s->w[0];
            s->w[1].data = tensor_row(&s->w[0], c->n_ff);
            continue;
        }
        const int64_t n_rows = c->is_fused && i == 0 ? 2 * c->n_ff + c->up_apart : widths[i] + apart;
        s->w[i] = s->all[i] = t_codes(c->type[i], n_in, n_rows, c->n_expert);
        s->w[i].ne[1] = widths[i];
    }
    for (int i = 0; i < 3; i++) {
        if (c->has_scales)
            s->w[3 + i] = s->all[3 + i] = t_make(QUANT_F32, c->n_expert, 1, 1);
        if (c->has_scales && i != 1)
            t_f32(&s->w[3 + i], 0)[1] = 1.0f;
        if (c->is_oai && !(c->has_scales && i == 1)) /* all or some */
            s->w[6 + i] = s->all[6 + i] = t_make(QUANT_F32, widths[i], c->n_expert, 1);
    }
}

static void stacks_free(struct stacks *s)
{
    for (int i = 0; i < N_STACKS; i++)
        if (s->all[i].data)
            t_free(&s->all[i]);
}

static void stacks_give(const struct stacks *s, struct op *op)
{
    for (int i = 0; i < N_STACKS; i++)
        op->w[i] = s->w[i].data ? &s->w[i] : NULL;
}

/* The experts that the op's ids name for n rows, listed, ascending; how many. An id that is no expert's is left out. */
static int list(const struct op *op, int n, struct op_expert *experts, int32_t *slot)
{
    const int n_slots = n * op->p.moe.k, n_expert = (int)op->w[0]->ne[2];
    const int32_t *chosen = op->src[1]->data;
    int n_experts = 0, first = 0;

    for (int e = 0; e < n_expert; e++) {
        struct op_expert x = {.first = first};
        for (int s = 0; s < n_slots; s++)
            if (chosen[s] == e)
                slot[first++] = s;
        x.n = first - x.first;
        if (x.n == 0)
            continue;
        for (int i = 0; i < 3; i++) {
            x.w[i] = tensor_slice(op->w[i], e);
            x.scale[i] = op->w[3 + i] ? t_f32(op->w[3 + i], 0)[e] : 1.0f;
            x.bias[i] = op->w[6 + i] ? t_f32(op->w[6 + i], e) : NULL;
        }
        experts[n_experts++] = x;
    }
    return n_experts;
}

/* The same with the device's addresses. */
static void move_list(const struct pair *p, struct op_expert *experts, int n)
{
    for (int e = 0; e < n; e++)
        for (int i = 0; i < 3; i++) {
            experts[e].w[i] = there(p, experts[e].w[i]);
            experts[e].bias[i] = experts[e].bias[i] ? there(p, experts[e].bias[i]) : NULL;
        }
}

enum { MOST_EXPERTS = 64, MOST_SLOTS = 1024 };

/* n rows, one op after another on the CPU, experts listed once their router has run. */
static void run_here_listed(const struct op *ops, int n_ops, int n)
{
    static struct op_expert experts[MOST_EXPERTS];
    static int32_t slot[MOST_SLOTS];

    for (int i = 0; i < n_ops; i++) {
        struct op op = ops[i];
        if (op.kind == OP_MOE) {
            op.p.moe.n_experts = list(&ops[i], n, experts, slot);
            op.p.moe.experts = experts;
            op.p.moe.slot = slot;
        }
        run_here(&op, 1, &(struct rows){.n = n});
    }
}

static void refill(struct pair *p, struct tensor *t)
{
    for (int64_t row = 0; row < t->ne[1]; row++)
        for (int64_t i = 0; i < t->ne[0]; i++)
            t_f32(t, row)[i] = rnd();
    ck_assert_int_eq(p->cuda->ops->upload(p->cuda, there(p, t->data), t->data, tensor_bytes(t)), 0);
}

static struct tensor ids_make(int n_expert, int k, int n)
{
    struct tensor ids = t_make(QUANT_I32, k, n, 1);
    for (int i = 0; i < n * k; i++)
        ((int32_t *)ids.data)[i] = n_expert - 1 - (i / k + i % k) % n_expert;
    return ids;
}

/* Rows of a step: single ones, short steps, and those in which a tile is for many. */
static int rows_of(int i_case, int i_card, bool is_one)
{
    static const int n_rows[] = {2, 8, 3, 9};
    return is_one ? 1 : n_rows[(i_case + i_card) % 4];
}

/* Two layers in one call, whose routers are in it, too: what the second reads is the first's result. Each further call chooses others;
 * the second is captured, and from the third on a graph runs. */
static void look_up(const struct ids_case *c, int n)
{
    const struct rows rows = {.n = n};
    const struct op_route route = {.n_expert = c->n_expert, .k = c->k, .normalize = true, .scale = 1.5f};
    const struct op_moe by_ids = {.k = c->k, .act = c->is_oai ? OP_ACT_SWIGLU_OAI : OP_ACT_SILU};
    struct stacks stacks[2];
    struct tensor x = t_apart(c->n_embd, n, 4), z = t_make(QUANT_F32, c->n_embd, n, 1),
                  out = t_make(QUANT_F32, c->n_embd, n, 1), logits = t_make(QUANT_F32, c->n_expert, n, 1),
                  logits2 = t_make(QUANT_F32, c->n_expert, n, 1), ids = ids_make(c->n_expert, c->k, n),
                  ids2 = ids_make(c->n_expert, c->k, n), gates = t_make(QUANT_F32, c->k, n, 1),
                  gates2 = t_make(QUANT_F32, c->k, n, 1), y = t_apart(c->n_embd, (int64_t)n * c->k, 3),
                  y2 = t_apart(c->n_embd, (int64_t)n * c->k, 1), norm = t_make(QUANT_F32, c->n_embd, 1, 1),
                  router = t_codes(QUANT_F32, c->n_embd, c->n_expert, 1);
    struct op ops[] = {
        {.kind = OP_ROUTE, .dst = {&ids, &gates}, .src = {&logits}, .p.route = route},
        {.kind = OP_MOE, .dst = {&y}, .src = {&x, &ids}, .p.moe = by_ids},
        {.kind = OP_COMBINE, .dst = {&z}, .src = {&y, &gates}},
        {.kind = OP_RMS_NORM, .dst = {&z}, .src = {&z}, .w = {&norm}, .p.norm.eps = 1e-6f},
        {.kind = OP_MATMUL, .dst = {&logits2}, .src = {&z}, .w = {&router}, .n_w = 1},
        {.kind = OP_ROUTE, .dst = {&ids2, &gates2}, .src = {&logits2}, .p.route = route},
        {.kind = OP_MOE, .dst = {&y2}, .src = {&z, &ids2}, .p.moe = by_ids},
        {.kind = OP_COMBINE, .dst = {&out}, .src = {&y2, &gates2}},
    };
    enum { N_OPS = sizeof ops / sizeof *ops };

    struct pair p = pair_open(DEVICE_PREFILL_INT);
    for (int layer = 0; layer < 2; layer++) {
        stacks_make(&stacks[layer], c);
        stacks_give(&stacks[layer], &ops[layer ? 6 : 1]);
        for (int i = 0; i < N_STACKS; i++) /* whole, with what lies between */
            if (stacks[layer].all[i].data)
                mirror_tensor(&p, &stacks[layer].all[i]);
    }
    mirror_ops(&p, ops, N_OPS);
    for (int i = 0; i < N_OPS; i++)
        ck_assert(p.cuda->ops->can(&ops[i]));
    for (int call = 0; call < 4; call++) {
        refill(&p, &x);
        refill(&p, &logits);
        ck_assert_msg(run_there(&p, ops, N_OPS, &rows) == 0, "%s", err_text());
        run_here_listed(ops, N_OPS, n);
        same_memory(&p, "experts by their ids");
        ck_assert(isfinite(t_f32(&out, 0)[0]));
    }
    pair_close(&p);
    struct tensor *all[] = {&z, &out, &logits, &logits2, &ids, &ids2, &gates, &gates2, &norm, &router};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        t_free(all[i]);
    for (int layer = 0; layer < 2; layer++)
        stacks_free(&stacks[layer]);
    t_done(&x);
    t_done(&y);
    t_done(&y2);
}

START_TEST(experts_that_the_device_looks_up_differ)
{
    const int i_case = _i % N_IDS_CASES, i_card = _i / 2 / N_IDS_CASES;

    pair_use_card(i_card);
    look_up(&ids_cases[i_case], rows_of(i_case, i_card, _i / N_IDS_CASES % 2 == 0));
}
END_TEST

/* So many rows that experts have tiles of 64, or several; few experts, for an emulator's sake. */
START_TEST(experts_that_the_device_looks_up_for_a_prompt_differ)
{
    static const struct ids_case cases[] = {
        {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, 3, 2, 256, 256, 0, false, true, false},
        {{QUANT_MXFP4, QUANT_MXFP4, QUANT_MXFP4}, 32, 4, 64, 96, 0, false, false, true},
        {{QUANT_Q8_0, QUANT_F16, QUANT_Q8_0}, 5, 3, 64, 64, 0, false, true, true},
        {{QUANT_Q4_K, QUANT_Q6_K, QUANT_IQ4_NL}, 2, 1, 256, 64, 0, false, false, false},
    };
    static const int n_rows[] = {40, 200};

    pair_use_card(_i / 2);
    look_up(&cases[_i / 2], n_rows[_i % 2]);
}
END_TEST

/* Of one call: some by their ids, then others that are listed, then those by their ids again. */
START_TEST(listed_experts_beside_others_differ)
{
    const struct ids_case *c = &ids_cases[_i / 2];
    struct stacks stacks;
    const struct rows rows = {.n = _i % 2 ? 3 : 1};
    struct tensor x = t_make(QUANT_F32, c->n_embd, rows.n, 1), ids = ids_make(c->n_expert, c->k, rows.n), y[3];
    struct op_expert away[8];
    int32_t slot[24];
    struct op ops[3];
    struct pair p = pair_open(DEVICE_PREFILL_INT);

    stacks_make(&stacks, c);
    for (int i = 0; i < 3; i++) {
        y[i] = t_apart(c->n_embd, (int64_t)rows.n * c->k, i);
        ops[i] = (struct op){.kind = OP_MOE, .dst = {&y[i]}, .src = {&x, &ids}, .p.moe = {.k = c->k}};
        stacks_give(&stacks, &ops[i]);
    }
    for (int i = 0; i < N_STACKS; i++)
        if (stacks.all[i].data)
            mirror_tensor(&p, &stacks.all[i]);
    mirror_ops(&p, ops, 3);
    const int n_listed = list(&ops[1], rows.n, away, slot); /* in another order than the ids */
    move_list(&p, away, n_listed);
    ops[1].p.moe = (struct op_moe){.k = c->k, .experts = away, .n_experts = n_listed, .slot = slot};
    ck_assert_msg(run_there(&p, ops, 3, &rows) == 0, "%s", err_text());
    run_here_listed(ops, 3, rows.n);
    same_memory(&p, "listed experts beside others");
    ops[2].p.moe = ops[1].p.moe;
    ck_assert_int_eq(run_there(&p, ops, 3, &rows), ERR_ARG); /* two lists */
    pair_close(&p);
    stacks_free(&stacks);
    t_free(&x);
    t_free(&ids);
    for (int i = 0; i < 3; i++)
        t_done(&y[i]);
}
END_TEST

START_TEST(scales_or_biases_of_other_experts_are_taken)
{
    static const struct ids_case c = {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q8_0}, 4, 2, 256, 96, 0, false, true, true};
    struct stacks stacks;
    struct tensor x = t_make(QUANT_F32, c.n_embd, 1, 1), y = t_make(QUANT_F32, c.n_embd, c.k, 1),
                  ids = ids_make(c.n_expert, c.k, 1);
    struct op op = {.kind = OP_MOE, .dst = {&y}, .src = {&x, &ids}, .p.moe = {.k = c.k}};

    stacks_make(&stacks, &c);
    stacks_give(&stacks, &op);
    ck_assert(cuda_device_ops.can(&op));
    for (int i = 3; i < N_STACKS; i++) {
        stacks.w[i].ne[0]--;
        ck_assert(!op.w[i] || !cuda_device_ops.can(&op));
        stacks.w[i].ne[0]++;
    }
    stacks.w[8].stride[1] += sizeof(float); /* rows apart */
    ck_assert(!cuda_device_ops.can(&op));
    stacks.w[8].stride[1] -= sizeof(float);
    ck_assert(cuda_device_ops.can(&op));
    stacks_free(&stacks);
    t_free(&x);
    t_free(&y);
    t_free(&ids);
}
END_TEST

/* What op->p.moe lists no experts for, and is not to be run. */
START_TEST(experts_that_nobody_listed_are_run)
{
    static const struct ids_case c = {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q8_0}, 4, 2, 256, 96, 0, false, true, true};
    struct stacks stacks;
    struct tensor x = t_make(QUANT_F32, c.n_embd, 2, 1), y = t_make(QUANT_F32, c.n_embd, (int64_t)2 * c.k, 1),
                  ids = t_make(QUANT_I32, c.k, 2, 1);
    struct op op = {.kind = OP_MOE, .dst = {&y}, .src = {&x, &ids}, .p.moe = {.k = c.k}};
    struct rows one = {.n = 1};
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    struct fixture f = fixture_open("ref", 1, DEVICE_PREFILL_INT);

    for (int i = 0; i < 2 * c.k; i++)
        ((int32_t *)ids.data)[i] = i % c.k;
    stacks_make(&stacks, &c);
    stacks_give(&stacks, &op);
    mirror_ops(&p, &op, 1);
    ck_assert_int_eq(run_there(&p, &op, 1, &one), 0);
    ck_assert_int_eq(run_there(&p, &op, 1, &(struct rows){.n = 2}), ERR_LIMIT); /* the scratch is one row's */
    ck_assert_int_eq(run_there(&p, &op, 1, &(struct rows){.n = 3}), ERR_ARG);   /* there are two */
    ck_assert_int_eq(f.dev->ops->run(f.dev, &op, 1, &one), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "listed"));

    struct tensor many_y = y, many_ids = ids; /* more places than a grid has */
    struct op many = op;
    many.p.moe.k = 40000;
    many_ids.ne[0] = many.p.moe.k;
    many_y.ne[1] = 2 * many_ids.ne[0];
    many.dst[0] = &many_y;
    many.src[1] = &many_ids;
    ck_assert_int_eq(run_there(&p, &many, 1, &(struct rows){.n = 2}), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "40000 experts of each of 2 rows; CUDA takes 65535 in all"));

    struct op wrong = op;
    wrong.src[1] = NULL;
    ck_assert_int_eq(run_there(&p, &wrong, 1, &one), ERR_ARG);
    ids.ne[0] = c.k - 1; /* fewer than the op has */
    ck_assert_int_eq(run_there(&p, &op, 1, &one), ERR_ARG);
    ids.ne[0] = c.k;
    stacks.w[1].stride[2] += 8; /* experts of which some cannot be read where they lie */
    ck_assert_int_eq(run_there(&p, &op, 1, &one), ERR_UNSUPPORTED);
    stacks.w[1].stride[2] -= 8;
    for (int i = 3; i < N_STACKS; i++) { /* a scale or a bias without memory is not none */
        if (!op.w[i])
            continue;
        void *data = stacks.w[i].data;
        stacks.w[i].data = NULL;
        ck_assert_int_eq(run_there(&p, &op, 1, &one), ERR_ARG);
        stacks.w[i].data = data;
    }
    ck_assert_int_eq(run_there(&p, &op, 1, &one), 0);
    fixture_close(&f);
    pair_close(&p);
    stacks_free(&stacks);
    t_free(&x);
    t_free(&y);
    t_free(&ids);
}
END_TEST

/* ---- lists that a kernel makes ---- */

enum choice { ANY, ALIKE, DIFFERENT, ONE_HAS_ALL_ROWS, FEW, HOSTILE, N_CHOICES };

static int32_t choose(enum choice choice, int slot, int k, int n_expert)
{
    static const int32_t hostile[] = {-1, INT32_MIN, INT32_MAX};
    const int any = rnd_int(n_expert);

    switch (choice) {
    case ALIKE:
        return n_expert - 1;
    case DIFFERENT:
        return slot % n_expert;
    case ONE_HAS_ALL_ROWS:
        return slot % k == k / 2 ? n_expert / 2 : any;
    case FEW:
        return any / 7 * 7;
    case HOSTILE:
        return slot % 5 == 1 ? hostile[slot % 3] : slot % 5 == 3 ? n_expert : any;
    default:
        return any;
    }
}

struct permute_case {
    int n_rows, k, n_expert;
};

static const struct permute_case permute_cases[] = {
    {1, 1, 1},    {2, 8, 128},   {8, 8, 128},   {8, 2, 8},      {3, 4, 32},   {33, 6, 64},     {77, 4, 60},
    {64, 22, 33}, {150, 8, 256}, {600, 8, 128}, {600, 10, 512}, {9, 8, 4096}, {300, 16, 4095},
};

enum { N_PERMUTE_CASES = sizeof permute_cases / sizeof *permute_cases, UNTOUCHED = 0x5a5a5a5a, N_BEHIND = 16 };

/* What belongs in a list: expert by expert, slots ascending, cut by tile_tok. Returns the tiles. */
static int expected_list(const int32_t *ids, const struct cu_permute_list *l, int n_expert, int32_t *slot,
                         struct cu_tile *tiles)
{
    int n = 0, n_tiles = 0;

    for (int e = 0; e < n_expert; e++) {
        const int begin = n;
        for (int s = l->first; s < l->end; s++)
            if (ids[s] == e)
                slot[n++] = s;
        for (int at = begin; at < n; at += l->tile_tok)
            tiles[n_tiles++] = (struct cu_tile){e, at, n - at < l->tile_tok ? n - at : l->tile_tok};
    }
    return n_tiles;
}

/* memory of the device that holds UNTOUCHED. */
static void *untouched_there(struct device *dev, uint64_t n_words, void **room)
{
    int32_t *words = mem_alloc(n_words * sizeof *words, MEM_OTHER);

    for (uint64_t i = 0; i < n_words; i++)
        words[i] = UNTOUCHED;
    ck_assert_int_eq(dev->ops->alloc(dev, n_words * sizeof *words, room), 0);
    ck_assert_int_eq(dev->ops->upload(dev, *room, words, n_words * sizeof *words), 0);
    mem_free(words);
    return *room;
}

/* The device's words are those, and behind them nothing was touched. */
static void same_words(struct device *dev, const void *there, const void *want, uint64_t n, uint64_t n_room)
{
    int32_t *got = mem_alloc(n_room * sizeof *got, MEM_OTHER);

    ck_assert_int_eq(dev->ops->download(dev, got, there, n_room * sizeof *got), 0);
    ck_assert_mem_eq(got, want, n * sizeof *got);
    for (uint64_t i = n; i < n_room; i++)
        ck_assert_int_eq(got[i], UNTOUCHED);
    mem_free(got);
}

enum { TILE_WORDS = sizeof(struct cu_tile) / sizeof(int32_t) };

static void check_lists(const struct permute_case *c, enum choice choice, int cut, int tile_tok)
{
    const int n = c->n_rows * c->k;
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    struct device *dev = p.cuda;
    struct tensor ids = t_make(QUANT_I32, c->k, c->n_rows, 1);
    struct cu_permute_args a = {.k = c->k, .n_expert = c->n_expert, .ids_stride = c->k};
    int32_t *slot = mem_alloc((size_t)n * sizeof *slot, MEM_OTHER), *chosen = ids.data;
    struct cu_tile *tiles = mem_alloc((size_t)n * sizeof *tiles, MEM_OTHER);
    void *slot_room[2], *tile_room[2], *count_room;
    uint64_t n_words[2];
    cudaStream_t stream;

    for (int s = 0; s < n; s++)
        chosen[s] = choose(choice, s, c->k, c->n_expert);
    mirror_tensor(&p, &ids);
    a.ids = there(&p, ids.data);
    untouched_there(dev, CU_PERMUTE_LISTS + N_BEHIND, &count_room);
    for (int i = 0; i < 2; i++) {
        const int first = i ? cut : 0, end = i ? n : cut, tok = i ? tile_tok : CU_GEMM_TOK_MANY;
        const uint64_t most = (uint64_t)cu_permute_most_tiles(end - first, c->n_expert, tok);
        if (first == end)
            continue;
        struct cu_permute_list *l = &a.list[a.n_lists];
        n_words[a.n_lists] = most * TILE_WORDS + N_BEHIND;
        *l = (struct cu_permute_list){.first = first, .end = end, .tile_tok = tok};
        l->slot = untouched_there(dev, (uint64_t)(end - first) + N_BEHIND, &slot_room[a.n_lists]);
        l->tiles = untouched_there(dev, n_words[a.n_lists], &tile_room[a.n_lists]);
        l->n_tiles = (int32_t *)count_room + a.n_lists++;
    }
    ck_assert_int_eq(dev->ops->sync(dev), 0);
    ck_assert_int_eq(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    ck_assert_int_eq(cu_permute(&a, stream), cudaSuccess);
    ck_assert_int_eq(cudaStreamSynchronize(stream), cudaSuccess);
    ck_assert_int_eq(cudaStreamDestroy(stream), cudaSuccess);
    int32_t counts[CU_PERMUTE_LISTS];
    for (int i = 0; i < a.n_lists; i++) {
        const struct cu_permute_list *l = &a.list[i];
        const int n_tiles = counts[i] = expected_list(chosen, l, c->n_expert, slot, tiles);
        const uint64_t n_slots = n_tiles ? (uint64_t)(tiles[n_tiles - 1].first + tiles[n_tiles - 1].n) : 0;
        ck_assert_int_le(n_tiles, cu_permute_most_tiles(l->end - l->first, c->n_expert, l->tile_tok));
        same_words(dev, l->slot, slot, n_slots, (uint64_t)(l->end - l->first) + N_BEHIND);
        same_words(dev, l->tiles, tiles, (uint64_t)n_tiles * TILE_WORDS, n_words[i]);
    }
    same_words(dev, count_room, counts, (uint64_t)a.n_lists, CU_PERMUTE_LISTS + N_BEHIND);
    for (int i = 0; i < a.n_lists; i++) {
        dev->ops->release(dev, slot_room[i]);
        dev->ops->release(dev, tile_room[i]);
    }
    dev->ops->release(dev, count_room);
    pair_close(&p);
    t_free(&ids);
    mem_free(slot);
    mem_free(tiles);
}

/* As one list, and as two. */
START_TEST(kernel_lists_other_slots)
{
    const struct permute_case *c = &permute_cases[_i];
    const int n = c->n_rows * c->k;

    for (int choice = 0; choice < N_CHOICES; choice++) {
        emu_seed((uint64_t)choice);
        check_lists(c, (enum choice)choice, 0, CU_GEMV_TOK);
        check_lists(c, (enum choice)choice, n / 3 / c->k * c->k, CU_GEMM_INT_TOK);
    }
}
END_TEST

/* As many tiles as there is room for, and no fewer, if experts' last tiles have a slot each. */
START_TEST(room_for_tiles_is_not_what_they_take)
{
    static const int shape[][4] = {/* slots, experts, tile_tok, tiles */
                                   {8, 4, 8, 4},
                                   {64, 128, 8, 64},
                                   {128 + 800, 128, 8, 228},
                                   {1, 9, 64, 1}};

    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        ck_assert_int_eq(cu_permute_most_tiles(shape[i][0], shape[i][1], shape[i][2]), shape[i][3]);
}
END_TEST

/* Ids of nobody's making: equal ones in a row, all rows' alike, and such as are no expert's, whose slots stay as they are. */
START_TEST(odd_ids_change_other_slots)
{
    static const struct ids_case cases[] = {
        {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q8_0}, 4, 2, 256, 96, 0, false, true, true},
        {{QUANT_F16, QUANT_F16, QUANT_F32}, 4, 2, 64, 96, 0, false, false, false},
    };
    static const int n_rows[] = {3, 80};
    const struct ids_case *c = &cases[_i / 2 % 2];
    const int n = n_rows[_i % 2];
    const enum choice choice = (enum choice[]){ALIKE, ONE_HAS_ALL_ROWS, HOSTILE}[_i / 4];
    struct stacks stacks;
    struct tensor x = t_make(QUANT_F32, c->n_embd, n, 1), y = t_apart(c->n_embd, (int64_t)n * c->k, 3),
                  ids = ids_make(c->n_expert, c->k, n);
    struct op op = {.kind = OP_MOE, .dst = {&y}, .src = {&x, &ids}, .p.moe = {.k = c->k}};
    struct pair p = pair_open(DEVICE_PREFILL_INT);

    for (int s = 0; s < n * c->k; s++)
        ((int32_t *)ids.data)[s] = choose(choice, s, c->k, c->n_expert);
    stacks_make(&stacks, c);
    stacks_give(&stacks, &op);
    mirror_ops(&p, &op, 1);
    ck_assert_msg(run_there(&p, &op, 1, &(struct rows){.n = n}) == 0, "%s", err_text());
    run_here_listed(&op, 1, n);
    same_memory(&p, "experts by odd ids");
    pair_close(&p);
    stacks_free(&stacks);
    t_free(&x);
    t_free(&ids);
    t_done(&y);
}
END_TEST

/* With --prefill blas, of a step with rows that are no prompt's. */
START_TEST(prompt_by_tensor_cores_has_other_bits_where_a_kernel_lists)
{
    static const struct ids_case cases[] = {
        {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q6_K}, 4, 2, 256, 256, 0, false, true, true},
        {{QUANT_MXFP4, QUANT_Q8_0, QUANT_F16}, 6, 3, 96, 160, 0, false, false, false},
    };
    const struct ids_case *c = &cases[_i % 2];
    const int n_prompt = 70, n = _i / 2 % 2 ? n_prompt : n_prompt + 3;
    const struct rows rows = {.n = n, .n_prompt = n_prompt};
    struct stacks stacks;
    struct tensor x = t_make(QUANT_F32, c->n_embd, n, 1), ids = ids_make(c->n_expert, c->k, n), y[2];
    struct op_expert experts[MOST_EXPERTS];
    int32_t slot[MOST_SLOTS];
    struct op ops[2];

    if (_i / 4)
        emu_set_card(8, 4, EMU_MAX_SHARED); /* no products of warpgroups */
    struct pair p = pair_open(DEVICE_PREFILL_BLAS);
    stacks_make(&stacks, c);
    for (int i = 0; i < 2; i++) {
        y[i] = t_make(QUANT_F32, c->n_embd, (int64_t)n * c->k, 1);
        ops[i] = (struct op){.kind = OP_MOE, .dst = {&y[i]}, .src = {&x, &ids}, .p.moe = {.k = c->k}};
        stacks_give(&stacks, &ops[i]);
    }
    for (int s = 0; s < n * c->k; s++) /* expert 0 has most, the last none */
        ((int32_t *)ids.data)[s] = s % c->k ? 1 + rnd_int(c->n_expert - 2) : 0;
    mirror_ops(&p, ops, 2);
    ops[1].p.moe.n_experts = list(&ops[1], n, experts, slot);
    move_list(&p, experts, ops[1].p.moe.n_experts);
    ops[1].p.moe.experts = experts;
    ops[1].p.moe.slot = slot;
    ck_assert_msg(run_there(&p, ops, 2, &rows) == 0, "%s", err_text());
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(p.cuda->ops->download(p.cuda, y[i].data, there(&p, y[i].data), tensor_bytes(&y[i])), 0);
    ck_assert_mem_eq(y[0].data, y[1].data, tensor_bytes(&y[0]));
    run_here_listed(&ops[0], 1, n); /* where dots make them all */
    const size_t dots_from = (size_t)n_prompt * (size_t)c->k * y[0].stride[1];
    ck_assert_mem_eq((char *)y[0].data + dots_from, (char *)y[1].data + dots_from, tensor_bytes(&y[0]) - dots_from);
    ck_assert(memcmp(y[0].data, y[1].data, dots_from) != 0);
    pair_close(&p);
    stacks_free(&stacks);
    t_free(&x);
    t_free(&ids);
    t_free(&y[0]);
    t_free(&y[1]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_moe");
    TCase *few = tcase_create("few"), *tc = tcase_create("cuda_moe"); /* few: what a sanitizer can bear */
    const int n_cards = emu_is_real() ? 1 : (int)N_PAIR_CARDS;        /* there is one kind */

    tcase_add_checked_fixture(few, pair_setup, NULL);
    tcase_set_timeout(few, 120);
    tcase_add_loop_test(few, experts_differ, 0, N_MOE_CASES);
    tcase_add_loop_test(few, experts_that_the_device_looks_up_differ, 0, 2 * N_IDS_CASES);
    tcase_add_loop_test(few, experts_that_the_device_looks_up_for_a_prompt_differ, 0, 8);
    tcase_add_loop_test(few, listed_experts_beside_others_differ, 0, 2 * N_IDS_CASES);
    tcase_add_loop_test(few, kernel_lists_other_slots, 0, N_PERMUTE_CASES);
    tcase_add_loop_test(few, odd_ids_change_other_slots, 0, 12);
    tcase_add_loop_test(few, prompt_by_tensor_cores_has_other_bits_where_a_kernel_lists, 0, emu_is_real() ? 4 : 8);
    suite_add_tcase(suite, few);
    tcase_add_checked_fixture(tc, pair_setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, experts_differ, N_MOE_CASES, n_cards * N_MOE_CASES);
    tcase_add_loop_test(tc, experts_that_the_device_looks_up_differ, 2 * N_IDS_CASES, n_cards * 2 * N_IDS_CASES);
    tcase_add_test(tc, room_for_tiles_is_not_what_they_take);
    tcase_add_test(tc, scales_or_biases_of_other_experts_are_taken);
    tcase_add_test(tc, experts_that_nobody_listed_are_run);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
