/* Every op of ops.def on the CPU device, on each kernel table that the machine has, against plain double arithmetic. */
#include "tests/cpu_step.h"
#include "tests/run_suite.h"

#include "src/device/device_check.h"

#include <float.h>

static const char *const *isas; /* names this machine can run, NULL-terminated */

/* |got - want| <= n roundings of the largest value that took part. */
static void near(float got, double want, double n_eps, double magnitude, const char *what)
{
    double bound = n_eps * (double)FLT_EPSILON * fmax(fabs(want), magnitude) + 1e-37;
    ck_assert_msg(fabs((double)got - want) <= bound, "%s: %.9g instead of %.9g (allowed %.3g)", what, (double)got, want,
                  bound);
}

static void run_one(const char *isa, const struct op *op, const struct rows *rows)
{
    struct fixture f = fixture_open(isa, 2, DEVICE_PREFILL_INT);
    fixture_run(&f, op, 1, rows);
    fixture_close(&f);
}

#define FOR_ISAS(isa) for (const char *isa = isas[_i]; isa; isa = NULL)

START_TEST(embed_takes_the_row_of_the_token_and_scales_it)
{
    static const enum quant_type types[] = {QUANT_F32, QUANT_F16, QUANT_Q8_0, QUANT_Q4_K};
    static const int32_t token[] = {4, 0, 6};

    FOR_ISAS(isa) for (size_t t = 0; t < sizeof types / sizeof *types; t++)
    {
        struct tensor w = t_weight(types[t], 256, 7, 1), out = t_make(QUANT_F32, 256, 3, 1);
        struct rows rows = {.n = 3, .token = token};
        struct op op = {.kind = OP_EMBED, .dst = {&out}, .w = {&w}, .p.scale.f = 3.25f};
        run_one(isa, &op, &rows);
        for (int i = 0; i < 3; i++) {
            float *x = t_row_floats(&w, 0, token[i]);
            for (int k = 0; k < 256; k++)
                near(t_f32(&out, i)[k], 3.25 * (double)x[k], 1, 0, "embed");
            mem_free(x);
        }
        t_free(&w);
        t_free(&out);
    }
}
END_TEST

static void norm_case(const char *isa, int64_t width, int64_t len, bool in_place)
{
    struct tensor x = t_make(QUANT_F32, width, 3, 1), w = t_make(QUANT_F32, len, 1, 1),
                  y = t_make(QUANT_F32, width, 3, 1);
    struct op op = {.kind = OP_RMS_NORM, .dst = {in_place ? &x : &y}, .src = {&x}, .w = {&w}, .p.norm.eps = 1e-2f};
    struct rows rows = {.n = 3};
    double *want = malloc((size_t)(3 * width) * sizeof *want);

    for (int64_t i = 0; i < 3; i++) {
        for (int64_t g = 0; g < width; g += len) {
            double sum = 0;
            for (int64_t k = 0; k < len; k++)
                sum += (double)t_f32(&x, i)[g + k] * (double)t_f32(&x, i)[g + k];
            for (int64_t k = 0; k < len; k++)
                want[i * width + g + k] =
                    (double)t_f32(&x, i)[g + k] / sqrt(sum / (double)len + (double)1e-2f) * (double)t_f32(&w, 0)[k];
        }
    }
    run_one(isa, &op, &rows);
    for (int64_t i = 0; i < 3; i++)
        for (int64_t k = 0; k < width; k++) /* the sum's roundings are halved by the root: n/16 + 4 for the tree */
            near(t_f32(op.dst[0], i)[k], want[i * width + k], 8 + (double)len / 32, 0, "norm");
    free(want);
    t_free(&x);
    t_free(&w);
    t_free(&y);
}

START_TEST(rms_norm_is_over_the_row_or_each_head)
{
    FOR_ISAS(isa)
    {
        norm_case(isa, 257, 257, false);
        norm_case(isa, 256, 256, true);
        norm_case(isa, 192, 64, true);
        norm_case(isa, 21, 7, false);
    }
}
END_TEST

/* Elements under one scale of an activation row in this type's form; 0 for float weights. */
static int act_len(const struct quant_info *info)
{
    return info->act == QUANT_ACT_Q8X256 ? 256 : info->act == QUANT_ACT_Q8X32 ? 32 : 0;
}

/* dot of a weight row and x, and how far quantized activations may be off: half a step each, and float roundings. */
static double dot_bound(const struct tensor *w, int64_t slice, int64_t row, const float *x, double *bound)
{
    float *weights = t_row_floats(w, slice, row);
    int len = act_len(quant_info((int)w->type));
    double sum = 0, step = 0;

    *bound = 1e-30;
    for (int64_t k = 0; k < w->ne[0]; k++) {
        double amax = 0;
        for (int64_t i = k; len && k % len == 0 && i < k + len; i++)
            amax = fmax(amax, fabs((double)x[i]));
        step = len && k % len == 0 ? amax / 127 : step;
        sum += (double)weights[k] * (double)x[k];
        *bound += fabs((double)weights[k]) * (0.501 * step + 40 * (double)FLT_EPSILON * fabs((double)x[k]) + 1e-9);
    }
    mem_free(weights);
    return sum;
}

static void check_matmul(const struct op *op, int n)
{
    for (int i = 0; i < op->n_w; i++) {
        for (int t = 0; t < n; t++) {
            for (int64_t r = 0; r < op->w[i]->ne[1]; r++) {
                double bound, want = dot_bound(op->w[i], 0, r, t_f32(op->src[0], t), &bound);
                float got = t_f32(op->dst[i], t)[r];
                ck_assert_msg(fabs((double)got - want) <= bound, "w%d %s row %d tok %d: %g instead of %g +- %g", i,
                              quant_info((int)op->w[i]->type)->name, (int)r, t, (double)got, want, bound);
            }
        }
    }
}

START_TEST(matmul_of_four_types_that_share_their_source)
{
    FOR_ISAS(isa) for (int n = 1; n <= 70; n += 23)
    {
        struct tensor x = t_make(QUANT_F32, 512, n, 1);
        struct tensor w[4] = {t_weight(QUANT_F32, 512, 19, 1), t_weight(QUANT_Q8_0, 512, 40, 1),
                              t_weight(QUANT_Q4_K, 512, 33, 1), t_weight(QUANT_F16, 512, 1, 1)};
        struct tensor y[4];
        struct op op = {.kind = OP_MATMUL, .src = {&x}, .n_w = 4};
        struct rows rows = {.n = n};
        for (int i = 0; i < 4; i++) {
            y[i] = t_make(QUANT_F32, w[i].ne[1], n, 1);
            op.dst[i] = &y[i];
            op.w[i] = &w[i];
        }
        run_one(isa, &op, &rows);
        check_matmul(&op, n);
        for (int i = 0; i < 4; i++) {
            t_free(&w[i]);
            t_free(&y[i]);
        }
        t_free(&x);
    }
}
END_TEST

static double silu(double x)
{
    return x / (1 + exp(-x));
}

static double gelu(double x)
{
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

/* One elementwise op: what comes out for a and b. */
struct elementwise {
    enum op_kind kind;
    union {
        float f;
        enum op_act act;
    } p;
    double (*want)(double a, double b);
    bool has_b, b_is_weight, b_is_scalar;
};

static double want_add(double a, double b)
{
    return a + b;
}

static double want_product(double a, double b)
{
    return a * b;
}

static double want_scale(double a, double b)
{
    (void)b;
    return a * 1.5;
}

static double want_softcap(double a, double b)
{
    (void)b;
    return 0.5 * tanh(a / 0.5);
}

static double want_silu(double a, double b)
{
    return silu(a) * b;
}

static double want_gelu(double a, double b)
{
    return gelu(a) * b;
}

static double want_oai(double a, double b)
{
    return fmin(a, 7) * sigmoid(1.702 * fmin(a, 7)) * (fmax(-7, fmin(b, 7)) + 1);
}

static double want_gate(double a, double b)
{
    return a * sigmoid(b);
}

static const struct elementwise elementwise[] = {
    {OP_ADD, {0}, want_add, true, false, false},
    {OP_ADD_BIAS, {0}, want_add, true, true, false},
    {OP_SCALE, {.f = 1.5f}, want_scale, false, false, false},
    {OP_SCALE, {.f = 9.0f}, want_product, true, true, true},
    {OP_SOFTCAP, {.f = 0.5f}, want_softcap, false, false, false},
    {OP_GLU, {.act = OP_ACT_SILU}, want_silu, true, false, false},
    {OP_GLU, {.act = OP_ACT_GELU_TANH}, want_gelu, true, false, false},
    {OP_GLU, {.act = OP_ACT_SWIGLU_OAI}, want_oai, true, false, false},
    {OP_GATE, {0}, want_gate, true, false, true},
    {OP_GATE, {0}, want_gate, true, false, false},
};

static void elementwise_case(const char *isa, const struct elementwise *e, int64_t width, bool in_place)
{
    struct tensor a = t_make(QUANT_F32, width, 3, 1), y = t_make(QUANT_F32, width, 3, 1);
    struct tensor b = t_make(QUANT_F32, e->b_is_scalar ? 1 : width, e->b_is_weight ? 1 : 3, 1);
    struct op op = {.kind = e->kind,
                    .dst = {in_place ? &a : &y},
                    .src = {&a, e->has_b && !e->b_is_weight ? &b : NULL},
                    .w = {e->b_is_weight ? &b : NULL}};
    struct rows rows = {.n = 3};
    double *want = malloc((size_t)(3 * width) * sizeof *want);

    if (e->kind == OP_GLU)
        op.p.glu.act = e->p.act;
    else
        op.p.scale.f = e->p.f;
    for (int64_t i = 0; i < 3; i++)
        for (int64_t k = 0; k < width; k++)
            want[i * width + k] =
                e->want((double)t_f32(&a, i)[k], (double)t_f32(&b, e->b_is_weight ? 0 : i)[e->b_is_scalar ? 0 : k]);
    run_one(isa, &op, &rows);
    for (int64_t i = 0; i < 3; i++)
        for (int64_t k = 0; k < width; k++)
            near(t_f32(op.dst[0], i)[k], want[i * width + k], 8, 0, device_op_name(e->kind));
    free(want);
    t_free(&a);
    t_free(&b);
    t_free(&y);
}

START_TEST(elementwise_ops_with_tails_and_in_place)
{
    FOR_ISAS(isa) for (size_t e = 0; e < sizeof elementwise / sizeof *elementwise; e++)
    {
        elementwise_case(isa, &elementwise[e], 101, false);
        elementwise_case(isa, &elementwise[e], 64, true);
        elementwise_case(isa, &elementwise[e], 5, true);
    }
}
END_TEST

static void rope_case(const char *isa, bool neox, int head_dim, int n_rot)
{
    enum { N = 3, HEADS = 3 };
    static const int32_t pos[N] = {0, 17, 70000};
    double freq[64];
    struct tensor table = t_make(QUANT_F32, n_rot, N, 1), x = t_make(QUANT_F32, HEADS * head_dim, N, 1);
    struct op ops[2] = {
        {.kind = OP_ROPE_TABLE, .dst = {&table}, .p.rope_table = {freq, 1.25f}},
        {.kind = OP_ROPE,
         .dst = {&x},
         .src = {&x, &table},
         .p.rope = {.n_head = HEADS, .head_dim = head_dim, .n_rot = n_rot, .neox = neox}},
    };
    struct rows rows = {.n = N, .pos = pos};
    float *before = malloc((size_t)(N * HEADS * head_dim) * sizeof *before);

    memcpy(before, x.data, (size_t)(N * HEADS * head_dim) * sizeof *before);
    for (int i = 0; i < n_rot / 2; i++)
        freq[i] = pow(10000, -2.0 * i / n_rot);
    struct fixture f = fixture_open(isa, 2, DEVICE_PREFILL_INT);
    fixture_run(&f, ops, 2, &rows);
    fixture_close(&f);
    for (int i = 0; i < N; i++) {
        for (int h = 0; h < HEADS; h++) {
            const float *a = before + (i * HEADS + h) * head_dim, *b = t_f32(&x, i) + h * head_dim;
            for (int k = 0; k < n_rot / 2; k++) {
                int first = neox ? k : 2 * k, second = neox ? k + n_rot / 2 : 2 * k + 1;
                double c = 1.25 * cos(pos[i] * freq[k]), s = 1.25 * sin(pos[i] * freq[k]);
                near(b[first], (double)a[first] * c - (double)a[second] * s, 4, 2, "rope first");
                near(b[second], (double)a[first] * s + (double)a[second] * c, 4, 2, "rope second");
            }
            ck_assert_mem_eq(a + n_rot, b + n_rot, (size_t)(head_dim - n_rot) * sizeof *a);
        }
    }
    free(before);
    t_free(&table);
    t_free(&x);
}

START_TEST(rope_turns_pairs_of_both_kinds_and_leaves_the_rest)
{
    FOR_ISAS(isa)
    {
        rope_case(isa, true, 64, 64);
        rope_case(isa, false, 64, 64);
        rope_case(isa, true, 96, 40);
        rope_case(isa, false, 20, 10);
        rope_case(isa, true, 20, 10);
    }
}
END_TEST

/* One attention set-up: keys of a sequence at positions 0..n_pos-1, queries at the last n_q of them. */
struct attn_case {
    int n_head, n_head_kv, head_dim_k, head_dim_v, window;
    float softcap;
    enum quant_type kv_type;
    int n_pos, n_q;
    float sink; /* of the first head, each other's is 1 more; 0: there are none */
};

/* What is in the page at key pos, as floats, by the block types' own conversion. */
static float *page_floats(const struct seq_pages *s, const struct op_attn *p, int pos, int head, bool is_v)
{
    int dim = is_v ? p->head_dim_v : p->head_dim_k;
    uint64_t row_bytes = quant_row_bytes(p->kv_type, dim);
    float *x = mem_alloc((size_t)dim * sizeof *x, MEM_OTHER);
    const char *page = (char *)s->page[pos / DEVICE_PAGE_TOK] + (is_v ? p->v_off : p->k_off);
    quant_info((int)p->kv_type)
        ->to_float(page + ((uint64_t)head * DEVICE_PAGE_TOK + (uint64_t)pos % DEVICE_PAGE_TOK) * row_bytes, x, dim);
    return x;
}

/* Double attention of one query; *magnitude is the largest |v| seen. sink: one score more, of no key; -INFINITY: none. */
static void attend(const struct seq_pages *s, const struct op_attn *p, int pos, int head, const float *q, double sink,
                   double *out, double *magnitude)
{
    double m = sink, l, score[2048];
    int first = p->window && pos >= p->window ? pos - p->window + 1 : 0, head_kv = head / (p->n_head / p->n_head_kv);

    for (int key = first; key <= pos; key++) {
        float *k = page_floats(s, p, key, head_kv, false);
        double sum = 0;
        for (int i = 0; i < p->head_dim_k; i++)
            sum += (double)q[i] * (double)k[i];
        sum *= (double)p->scale;
        score[key] = p->softcap != 0 ? (double)p->softcap * tanh(sum / (double)p->softcap) : sum;
        m = fmax(m, score[key]);
        mem_free(k);
    }
    l = exp(sink - m);
    memset(out, 0, (size_t)p->head_dim_v * sizeof *out);
    for (int key = first; key <= pos; key++) {
        float *v = page_floats(s, p, key, head_kv, true);
        double w = exp(score[key] - m);
        l += w;
        for (int i = 0; i < p->head_dim_v; i++) {
            out[i] += w * (double)v[i];
            *magnitude = fmax(*magnitude, fabs((double)v[i]));
        }
        mem_free(v);
    }
    for (int i = 0; i < p->head_dim_v; i++)
        out[i] /= l;
}

static void check_written(const struct seq_pages *s, const struct op_attn *p, const struct tensor *x, int n_pos,
                          bool is_v)
{
    int dim = is_v ? p->head_dim_v : p->head_dim_k;

    for (int pos = 0; pos < n_pos; pos++) {
        for (int head = 0; head < p->n_head_kv; head++) {
            float *got = page_floats(s, p, pos, head, is_v);
            const float *want = t_f32(x, pos) + head * dim;
            for (int i = 0; i < dim; i++) {
                double amax = 0;
                for (int b = i / 32 * 32; b < i / 32 * 32 + 32 && b < dim; b++)
                    amax = fmax(amax, fabs((double)want[b]));
                /* half a step, and the half-precision scale's rounding times 127 steps; a half has 11 bits */
                double bound = p->kv_type == QUANT_Q8_0 ? amax / 127 * (0.501 + 127 * 0x1p-11)
                                                        : fabs((double)want[i]) * 0x1p-11 + 0x1p-25;
                ck_assert_msg(fabs((double)got[i] - (double)want[i]) <= bound, "pos %d head %d element %d: %g for %g",
                              pos, head, i, (double)got[i], (double)want[i]);
            }
            mem_free(got);
        }
    }
}

static void attn_run(const char *isa, const struct attn_case *c)
{
    struct op_attn p = {.n_head = c->n_head,
                        .n_head_kv = c->n_head_kv,
                        .head_dim_k = c->head_dim_k,
                        .head_dim_v = c->head_dim_v,
                        .scale = 0.7f,
                        .softcap = c->softcap,
                        .window = c->window,
                        .group = 1,
                        .kv_type = c->kv_type,
                        .k_off = 64};
    p.v_off = p.k_off + (uint64_t)p.n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(p.kv_type, p.head_dim_k);
    uint64_t page_bytes =
        p.v_off + (uint64_t)p.n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(p.kv_type, p.head_dim_v) + 64;
    struct seq_pages s = seq_pages_make(c->n_pos / DEVICE_PAGE_TOK + 1, page_bytes, 1);
    struct tensor k = t_make(QUANT_F32, (int64_t)p.n_head_kv * p.head_dim_k, c->n_pos, 1);
    struct tensor v = t_make(QUANT_F32, (int64_t)p.n_head_kv * p.head_dim_v, c->n_pos, 1);
    struct tensor q = t_make(QUANT_F32, (int64_t)p.n_head * p.head_dim_k, c->n_q, 1);
    struct tensor out = t_make(QUANT_F32, (int64_t)p.n_head * p.head_dim_v, c->n_q, 1);
    int32_t *pos = calloc((size_t)c->n_pos, sizeof *pos), *seq = calloc((size_t)c->n_pos, sizeof *seq);
    struct op write = {.kind = OP_KV_APPEND, .src = {&k, &v}, .p.attn = p};
    struct tensor sinks = t_make(QUANT_F32, p.n_head, 1, 1);
    struct op read = {
        .kind = OP_ATTENTION, .dst = {&out}, .src = {&q}, .w = {c->sink != 0 ? &sinks : NULL}, .p.attn = p};
    double *want = malloc((size_t)p.head_dim_v * sizeof *want), magnitude = 0;

    for (int h = 0; h < p.n_head; h++)
        t_f32(&sinks, 0)[h] = c->sink + (float)h;
    for (int i = 0; i < c->n_pos; i++)
        pos[i] = i;
    run_one(isa, &write, &(struct rows){.n = c->n_pos, .pos = pos, .seq = seq, .seqs = &s.view});
    check_written(&s, &p, &k, c->n_pos, false);
    check_written(&s, &p, &v, c->n_pos, true);
    run_one(isa, &read, &(struct rows){.n = c->n_q, .pos = pos + c->n_pos - c->n_q, .seq = seq, .seqs = &s.view});
    for (int i = 0; i < c->n_q; i++) {
        for (int h = 0; h < p.n_head; h++) {
            double sink = c->sink != 0 ? (double)t_f32(&sinks, 0)[h] : -INFINITY;
            attend(&s, &p, pos[c->n_pos - c->n_q + i], h, t_f32(&q, i) + h * p.head_dim_k, sink, want, &magnitude);
            /* scores up to 20 with a relative error of 20 eps: weights off by 400 eps, and sums of at most n/16 + 20 */
            for (int d = 0; d < p.head_dim_v; d++)
                near(t_f32(&out, i)[h * p.head_dim_v + d], want[d], 200 + c->n_pos / 4.0, magnitude, "attention");
        }
    }
    free(want);
    free(pos);
    free(seq);
    t_free(&k);
    t_free(&v);
    t_free(&q);
    t_free(&out);
    t_free(&sinks);
    seq_pages_free(&s);
}

static const struct attn_case attn_cases[] = {
    {4, 2, 64, 64, 0, 0, QUANT_F16, 1, 1, 0},
    {4, 2, 64, 64, 0, 0, QUANT_F16, 65, 65, 0},
    {4, 4, 64, 32, 0, 0, QUANT_Q8_0, 130, 5, 0},
    {6, 2, 20, 12, 0, 0, QUANT_F16, 100, 37, 0},
    {4, 1, 32, 96, 70, 0, QUANT_F16, 200, 200, 0},
    {8, 1, 128, 128, 0, 3.0f, QUANT_Q8_0, 77, 3, 0},
    {2, 1, 64, 64, 0, 0, QUANT_F16, 1100, 1, 0}, /* split by segment */
    {2, 1, 64, 64, 0, 0, QUANT_Q8_0, 1100, 40, 0},
    {2, 1, 64, 64, 600, 2.0f, QUANT_F16, 1300, 1, 0},
    {2, 2, 64, 64, 1, 0, QUANT_F16, 70, 9, 0},
    {4, 2, 64, 64, 0, 0, QUANT_F16, 70, 70, 2},
    {8, 1, 64, 64, 30, 0, QUANT_Q8_0, 200, 90, -3}, /* sinks: beside keys, below them, */
    {2, 1, 64, 64, 0, 0, QUANT_F16, 1100, 1, 5},
    {2, 1, 64, 64, 0, 0, QUANT_F16, 70, 3, 200}, /* by segment, and far above */
};

START_TEST(attention_sees_the_right_keys_and_weighs_them)
{
    FOR_ISAS(isa) for (size_t c = 0; c < sizeof attn_cases / sizeof *attn_cases; c++) attn_run(isa, &attn_cases[c]);
}
END_TEST

/* Two sequences whose segments lie in two memories, those of bit `side` of a pattern here: the states of both, merged some segments at
 * a time, are what one op gives, to the bit. */
static void parts_run(const char *isa, int n_threads, int wave)
{
    enum { N_POS = 1700, N_Q = 5, HEADS = 4, DIM = 32 };
    struct op_attn p = {.n_head = HEADS,
                        .n_head_kv = 2,
                        .head_dim_k = DIM,
                        .head_dim_v = DIM,
                        .scale = 0.7f,
                        .kv_type = QUANT_F16,
                        .v_off = 2 * DEVICE_PAGE_TOK * DIM * 2};
    struct seq_pages s = seq_pages_make(N_POS / DEVICE_PAGE_TOK + 1, 2 * p.v_off, 0);
    struct tensor k = t_make(QUANT_F32, 2 * DIM, N_POS, 1), v = t_make(QUANT_F32, 2 * DIM, N_POS, 1);
    struct tensor q = t_make(QUANT_F32, HEADS * DIM, N_Q, 1), whole = t_make(QUANT_F32, HEADS * DIM, N_Q, 1);
    struct tensor parts = t_make(QUANT_F32, HEADS * DIM, N_Q, 1), sums = t_make(QUANT_F32, HEADS * (DIM + 2), N_Q, 1);
    struct tensor states = t_make(QUANT_F32, HEADS * (DIM + 2), (int64_t)N_Q * wave, 1);
    int32_t pos[N_POS], seq[N_POS] = {0}, q_pos[N_Q] = {3, 511, 512, 1500, N_POS - 1};
    struct op write = {.kind = OP_KV_APPEND, .src = {&k, &v}, .p.attn = p};
    struct tensor sinks = t_make(QUANT_F32, HEADS, 1, 1);
    const struct tensor *sink = wave > 1 ? &sinks : NULL;
    struct op ops[3] = {{.kind = OP_ATTENTION, .dst = {&whole}, .src = {&q}, .w = {sink}, .p.attn = p},
                        {.kind = OP_ATTN_STATES, .dst = {&states}, .src = {&q}, .p.attn = p},
                        {.kind = OP_ATTN_MERGE, .dst = {&parts, &sums}, .src = {&states}, .w = {sink}, .p.attn = p}};
    void **half[2];
    struct kv_seq view[2] = {{.page = {NULL}}, {.page = {NULL}}};
    struct fixture f = fixture_open(isa, n_threads, DEVICE_PREFILL_INT);

    for (int side = 0; side < 2; side++) {
        half[side] = calloc((size_t)s.n_pages, sizeof *half[side]);
        view[side].page[0] = half[side];
        for (int64_t page = 0; page < s.n_pages; page++)
            half[side][page] = (0x5 >> page / DEVICE_SEGMENT_PAGES & 1) == side ? s.page[page] : NULL;
    }
    for (int i = 0; i < N_POS; i++)
        pos[i] = i;
    write.p.attn.is_part = true;
    for (int side = 0; side < 2; side++) /* each writes what lies with it, and nothing else */
        fixture_run(&f, &write, 1, &(struct rows){.n = N_POS, .pos = pos, .seq = seq, .seqs = &view[side]});
    struct rows rows = {.n = N_Q, .pos = q_pos, .seq = seq, .seqs = &s.view};
    fixture_run(&f, ops, 1, &rows);
    for (int first = 0; first < 4; first += wave) {
        for (int i = 1; i < 3; i++)
            ops[i].p.attn.first = first, ops[i].p.attn.n_segments = wave;
        ops[2].p.attn.is_last = first + wave >= 4;
        for (int side = 0; side < 2; side++) {
            rows.seqs = &view[side];
            fixture_run(&f, &ops[1], 1, &rows);
        }
        fixture_run(&f, &ops[2], 1, &rows);
    }
    ck_assert_mem_eq(parts.data, whole.data, tensor_bytes(&whole));
    fixture_close(&f);
    free(half[0]);
    free(half[1]);
    t_free(&k);
    t_free(&v);
    t_free(&q);
    t_free(&whole);
    t_free(&parts);
    t_free(&sums);
    t_free(&states);
    t_free(&sinks);
    seq_pages_free(&s);
}

START_TEST(parts_of_attention_are_not_the_whole)
{
    FOR_ISAS(isa) for (int wave = 1; wave < 6; wave += 2) parts_run(isa, 1 + wave % 3, wave);
}
END_TEST

/* A segment of which some pages are here and some are not, and segments that cannot be. */
START_TEST(torn_segment_is_folded)
{
    struct tensor q = t_make(QUANT_F32, 32, 1, 1), out = t_make(QUANT_F32, 34, 2, 1);
    struct seq_pages s = seq_pages_make(10, 64 * 64 * 2, 0);
    int32_t pos = 600, seq = 0;
    struct rows rows = {.n = 1, .pos = &pos, .seq = &seq, .seqs = &s.view};
    struct op op = {.kind = OP_ATTN_STATES, .dst = {&out}, .src = {&q}};

    op.p.attn = (struct op_attn){
        .n_head = 1, .n_head_kv = 1, .head_dim_k = 32, .head_dim_v = 32, .kv_type = QUANT_F16, .v_off = 64 * 64};
    op.p.attn.n_segments = 2;
    ck_assert(device_check_shapes(&op));
    ck_assert_int_eq(device_check_step(&op, &rows), 0);
    void *page = s.page[3];
    s.page[3] = NULL;
    ck_assert_int_eq(device_check_step(&op, &rows), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "no page for positions from 192"));
    s.page[0] = NULL; /* the first is elsewhere: so are all */
    ck_assert_int_eq(device_check_step(&op, &rows), 0);
    s.page[3] = page;
    op.p.attn.n_segments = 3; /* states for two */
    ck_assert_int_eq(device_check_step(&op, &rows), ERR_ARG);
    op.p.attn.n_segments = 0;
    ck_assert_int_eq(device_check_step(&op, &rows), ERR_ARG);
    op.p.attn.n_segments = 1;
    op.p.attn.first = -1;
    ck_assert_int_eq(device_check_step(&op, &rows), ERR_ARG);
    op.p.attn.window = 5;
    ck_assert(!device_check_shapes(&op));
    t_free(&q);
    t_free(&out);
    seq_pages_free(&s);
}
END_TEST

/* The chosen ids by plain selection on doubles; gates by the formulas of device.h. */
static void route_want(const struct op_route *p, const float *logits, const float *bias, int32_t *ids, double *gates)
{
    double score[64], select[64], m = -INFINITY, sum = 0;

    for (int e = 0; e < p->n_expert; e++)
        m = fmax(m, (double)logits[e]);
    for (int e = 0; e < p->n_expert; e++)
        sum += exp((double)logits[e] - m);
    for (int e = 0; e < p->n_expert; e++) {
        double x = (double)logits[e];
        score[e] = p->fn == OP_ROUTE_SOFTMAX ? exp(x - m) / sum : p->fn == OP_ROUTE_SIGMOID ? sigmoid(x) : x;
        select[e] = score[e] + (bias ? (double)bias[e] : 0);
    }
    for (int r = 0; r < p->k; r++) {
        ids[r] = -1;
        for (int e = 0; e < p->n_expert; e++)
            if (select[e] > -INFINITY && (ids[r] < 0 || select[e] > select[ids[r]]))
                ids[r] = e;
        gates[r] = score[ids[r]];
        select[ids[r]] = -INFINITY;
    }
    sum = 0;
    for (int r = 0; r < p->k; r++)
        sum += p->fn == OP_ROUTE_SOFTMAX_TOPK ? exp(gates[r] - gates[0]) : gates[r];
    for (int r = 0; r < p->k; r++) {
        if (p->fn == OP_ROUTE_SOFTMAX_TOPK)
            gates[r] = exp(gates[r] - score[ids[0]]) / sum;
        else if (p->normalize)
            gates[r] /= sum;
        gates[r] *= (double)p->scale;
    }
}

static void route_case(const char *isa, struct op_route route, bool has_bias)
{
    struct tensor logits = t_make(QUANT_F32, route.n_expert, 4, 1), bias = t_make(QUANT_F32, route.n_expert, 1, 1);
    struct tensor ids = t_make(QUANT_I32, route.k, 4, 1), gates = t_make(QUANT_F32, route.k, 4, 1);
    struct op op = {
        .kind = OP_ROUTE, .dst = {&ids, &gates}, .src = {&logits}, .w = {has_bias ? &bias : NULL}, .p.route = route};
    int32_t want_ids[64];
    double want_gates[64];

    run_one(isa, &op, &(struct rows){.n = 4});
    for (int i = 0; i < 4; i++) {
        route_want(&route, t_f32(&logits, i), has_bias ? t_f32(&bias, 0) : NULL, want_ids, want_gates);
        ck_assert_mem_eq(tensor_row(&ids, i), want_ids, (size_t)route.k * sizeof *want_ids);
        for (int r = 0; r < route.k; r++)
            near(t_f32(&gates, i)[r], want_gates[r], 16, 0, "gate");
    }
    t_free(&logits);
    t_free(&bias);
    t_free(&ids);
    t_free(&gates);
}

static struct op_route route_of(int n_expert, int k, int fn, bool normalize, float scale)
{
    return (struct op_route){
        .n_expert = n_expert, .k = k, .fn = (enum op_route_fn)fn, .normalize = normalize, .scale = scale};
}

START_TEST(route_picks_and_weighs_by_each_rule)
{
    FOR_ISAS(isa) for (int fn = OP_ROUTE_SOFTMAX; fn <= OP_ROUTE_SIGMOID; fn++)
    {
        for (int normalize = 0; normalize < 2; normalize++) {
            route_case(isa, route_of(37, 6, fn, normalize, 1.0f), false);
            route_case(isa, route_of(8, 8, fn, normalize, 2.5f), false);
            route_case(isa, route_of(64, 1, fn, normalize, 1.0f), fn == OP_ROUTE_SIGMOID);
        }
        route_case(isa, route_of(37, 6, fn, false, 1.0f), true);
    }
}
END_TEST

START_TEST(route_of_equal_or_broken_logits_gives_each_id_once)
{
    FOR_ISAS(isa)
    {
        struct tensor logits = t_make(QUANT_F32, 9, 5, 1), ids = t_make(QUANT_I32, 4, 5, 1),
                      gates = t_make(QUANT_F32, 4, 5, 1);
        struct op op = {.kind = OP_ROUTE,
                        .dst = {&ids, &gates},
                        .src = {&logits},
                        .p.route = {9, 4, OP_ROUTE_SOFTMAX_TOPK, true, 1.0f}};
        for (int e = 0; e < 9; e++) {
            t_f32(&logits, 0)[e] = 1.0f;
            t_f32(&logits, 1)[e] = NAN;
            t_f32(&logits, 2)[e] = e == 3 ? 1.0f : NAN;
            t_f32(&logits, 3)[e] = e == 3 ? INFINITY : -INFINITY;
            t_f32(&logits, 4)[e] = e % 2 ? 2.0f : 1.0f;
        }
        for (op.p.route.fn = OP_ROUTE_SOFTMAX; op.p.route.fn <= OP_ROUTE_SIGMOID; op.p.route.fn++) {
            run_one(isa, &op, &(struct rows){.n = 5});
            for (int i = 0; i < 5; i++) {
                int32_t *id = tensor_row(&ids, i);
                for (int r = 0; r < 4; r++) {
                    ck_assert(id[r] >= 0 && id[r] < 9);
                    for (int before = 0; before < r; before++)
                        ck_assert_int_ne(id[before], id[r]);
                }
            }
            static const int32_t equal[4] = {0, 1, 2, 3}, odd[4] = {1, 3, 5, 7};
            ck_assert_mem_eq(tensor_row(&ids, 0), equal, sizeof equal);
            ck_assert_mem_eq(tensor_row(&ids, 4), odd, sizeof odd);
        }
        op.p.route.fn = OP_ROUTE_SOFTMAX_TOPK;
        run_one(isa, &op, &(struct rows){.n = 5});
        ck_assert_int_eq(((int32_t *)tensor_row(&ids, 2))[0], 3);
        t_free(&logits);
        t_free(&ids);
        t_free(&gates);
    }
}
END_TEST

/* What a file says the products of expert e with its matrix i are to be multiplied by. */
static float moe_scale(int e, int i)
{
    return e % 3 == i ? 1.25f : 1.0f;
}

/* n tokens, k of n_expert each: slots grouped by expert. */
struct groups {
    struct op_expert experts[16];
    int32_t *slot;
    int n_experts;
};

/* bias: (3) a row for each expert, or NULL. */
static struct groups groups_make(const int32_t *ids, int n_slots, const struct tensor w[3], const struct tensor *bias)
{
    struct groups g = {.slot = malloc((size_t)n_slots * sizeof *g.slot)};
    int n = 0;

    for (int e = 0; e < w[0].ne[2]; e++) {
        struct op_expert *x = &g.experts[g.n_experts];
        *x = (struct op_expert){.first = n};
        for (int i = 0; i < 3; i++) {
            x->w[i] = tensor_slice(&w[i], e);
            x->scale[i] = moe_scale(e, i);
            x->bias[i] = bias ? t_f32(&bias[i], e) : NULL;
        }
        for (int s = 0; s < n_slots; s++)
            if (ids[s] == e)
                g.slot[n++] = s;
        x->n = n - x->first;
        g.n_experts += x->n > 0;
    }
    return g;
}

struct moe_case {
    enum quant_type type[3];
    int n_tok, n_expert, k, n_embd, n_ff;
    bool one_takes_all;
    enum op_act act;
    bool has_bias;
};

static void moe_ids(const struct moe_case *c, int32_t *ids)
{
    for (int t = 0; t < c->n_tok; t++)
        for (int r = 0; r < c->k; r++)
            ids[t * c->k + r] = c->one_takes_all ? (r == 0 ? 2 : r == 2 ? 0 : r) : (t * 7 + r * 3) % c->n_expert;
}

/* act(gate, up) and how far it may be off. */
static double hidden_of(enum op_act act, double gate, double gate_off, double up, double up_off, double *off)
{
    if (act == OP_ACT_SWIGLU_OAI) { /* the gated one is steepest at 1.1, and up is only cut */
        *off = 1.13 * gate_off * (fabs(up) + 1 + up_off) + fabs(want_oai(gate, 0)) * up_off;
        return want_oai(gate, up);
    }
    *off = 1.13 * gate_off * (fabs(up) + up_off) + fabs(silu(gate)) * up_off; /* silu is steepest at 1.1 */
    return silu(gate) * up;
}

/* One slot's result in doubles, with how far it may be off: each matmul's bound carried on through the next. */
static void moe_check_slot(const struct op *op, const struct tensor w[3], const float *x, int32_t expert,
                           const float *const bias[3], const float *got)
{
    int64_t n_ff = w[0].ne[1];
    float *h = malloc((size_t)n_ff * sizeof *h);
    double *off = malloc((size_t)n_ff * sizeof *off);

    for (int64_t f = 0; f < n_ff; f++) {
        double gate_off, up_off, gate = dot_bound(&w[0], expert, f, x, &gate_off),
                                 up = dot_bound(&w[1], expert, f, x, &up_off);
        gate *= (double)moe_scale(expert, 0), gate_off *= (double)moe_scale(expert, 0);
        up *= (double)moe_scale(expert, 1), up_off *= (double)moe_scale(expert, 1);
        gate += bias[0] ? (double)bias[0][f] : 0, up += bias[1] ? (double)bias[1][f] : 0;
        h[f] = (float)hidden_of(op->p.moe.act, gate, gate_off, up, up_off, &off[f]);
    }
    for (int64_t r = 0; r < w[2].ne[1]; r++) {
        double bound, want = dot_bound(&w[2], expert, r, h, &bound);
        float *weights = t_row_floats(&w[2], expert, r);
        for (int64_t f = 0; f < n_ff; f++) /* 1.5: the step of quantized h grows with its error */
            bound += 1.5 * fabs((double)weights[f]) * off[f] + 1e-5 * fabs((double)weights[f] * (double)h[f]);
        mem_free(weights);
        want *= (double)moe_scale(expert, 2), bound *= (double)moe_scale(expert, 2);
        want += bias[2] ? (double)bias[2][r] : 0, bound += bias[2] ? fabs((double)bias[2][r]) * 0x1p-22 : 0;
        ck_assert_msg(fabs((double)got[r] - want) <= bound, "expert %d row %d: %g instead of %g +- %g", expert, (int)r,
                      (double)got[r], want, bound);
    }
    free(h);
    free(off);
}

static void moe_run(const char *isa, const struct moe_case *c)
{
    struct tensor w[3] = {t_weight(c->type[0], c->n_embd, c->n_ff, c->n_expert),
                          t_weight(c->type[1], c->n_embd, c->n_ff, c->n_expert),
                          t_weight(c->type[2], c->n_ff, c->n_embd, c->n_expert)};
    int n_slots = c->n_tok * c->k;
    struct tensor x = t_make(QUANT_F32, c->n_embd, c->n_tok, 1), y = t_make(QUANT_F32, c->n_embd, n_slots, 1);
    struct tensor parts = t_make(QUANT_F32, c->n_embd, n_slots, 1);
    struct tensor bias[3] = {t_make(QUANT_F32, c->n_ff, c->n_expert, 1), t_make(QUANT_F32, c->n_ff, c->n_expert, 1),
                             t_make(QUANT_F32, c->n_embd, c->n_expert, 1)};
    int32_t *ids = malloc((size_t)n_slots * sizeof *ids);
    struct rows rows = {.n = c->n_tok};

    moe_ids(c, ids);
    struct groups g = groups_make(ids, n_slots, w, c->has_bias ? bias : NULL);
    struct op op = {.kind = OP_MOE,
                    .dst = {&y},
                    .src = {&x},
                    .w = {&w[0], &w[1], &w[2]},
                    .p.moe = {c->k, c->act, g.experts, g.n_experts, g.slot}};
    for (int i = 0; i < 3 && c->has_bias; i++)
        op.w[6 + i] = &bias[i];
    for (int i = 0; i < 3; i++)
        w[i].ne[3] = 1;
    run_one(isa, &op, &rows);
    for (int s = 0; s<n_slots; s += n_slots> 20 ? 7 : 1) {
        const float *own[3] = {NULL};
        for (int i = 0; i < 3 && c->has_bias; i++)
            own[i] = t_f32(&bias[i], ids[s]);
        moe_check_slot(&op, w, t_f32(&x, s / c->k), ids[s], own, t_f32(&y, s));
    }
    /* The same in two calls, last experts first: nothing else may be written, and no bit may differ. */
    memset(parts.data, 0x7f, tensor_bytes(&parts));
    op.dst[0] = &parts;
    op.p.moe.experts = g.experts + g.n_experts / 2;
    op.p.moe.n_experts = g.n_experts - g.n_experts / 2;
    run_one(isa, &op, &rows);
    for (int i = 0; i < g.experts[g.n_experts / 2].first; i++)
        ck_assert_int_eq(*(unsigned char *)tensor_row(&parts, g.slot[i]), 0x7f);
    op.p.moe.experts = g.experts;
    op.p.moe.n_experts = g.n_experts / 2;
    run_one(isa, &op, &rows);
    ck_assert_mem_eq(parts.data, y.data, tensor_bytes(&y));
    for (int i = 0; i < 3; i++) {
        t_free(&w[i]);
        t_free(&bias[i]);
    }
    t_free(&x);
    t_free(&y);
    t_free(&parts);
    free(ids);
    free(g.slot);
}

static const struct moe_case moe_cases[] = {
    {{QUANT_F32, QUANT_F32, QUANT_F32}, 5, 4, 2, 48, 80, false, OP_ACT_SILU, false},
    {{QUANT_Q4_K, QUANT_Q4_K, QUANT_Q8_0}, 1, 8, 3, 256, 96, false, OP_ACT_SILU, false},
    {{QUANT_Q8_0, QUANT_Q4_K, QUANT_F16}, 70, 6, 2, 256, 33, false, OP_ACT_SILU, false},
    {{QUANT_Q8_0, QUANT_Q8_0, QUANT_Q4_K}, 150, 4, 3, 64, 256, true, OP_ACT_SILU, false},
    {{QUANT_MXFP4, QUANT_MXFP4, QUANT_MXFP4}, 1, 8, 4, 160, 96, false, OP_ACT_SWIGLU_OAI, true},
    {{QUANT_MXFP4, QUANT_Q8_0, QUANT_MXFP4}, 90, 5, 2, 96, 160, true, OP_ACT_SWIGLU_OAI, true},
};

START_TEST(moe_computes_each_slot_by_its_expert_in_one_call_or_several)
{
    FOR_ISAS(isa) for (size_t c = 0; c < sizeof moe_cases / sizeof *moe_cases; c++) moe_run(isa, &moe_cases[c]);
}
END_TEST

START_TEST(combine_adds_the_ranks_in_order)
{
    FOR_ISAS(isa)
    {
        struct tensor y = t_make(QUANT_F32, 37, 3 * 4, 1), gates = t_make(QUANT_F32, 4, 3, 1),
                      out = t_make(QUANT_F32, 37, 3, 1);
        struct op op = {.kind = OP_COMBINE, .dst = {&out}, .src = {&y, &gates}};
        run_one(isa, &op, &(struct rows){.n = 3});
        for (int i = 0; i < 3; i++) {
            for (int d = 0; d < 37; d++) {
                float acc = t_f32(&gates, i)[0] * t_f32(&y, i * 4)[d];
                for (int r = 1; r < 4; r++)
                    acc = fmaf(t_f32(&gates, i)[r], t_f32(&y, i * 4 + r)[d], acc);
                ck_assert(acc == t_f32(&out, i)[d]);
            }
        }
        t_free(&y);
        t_free(&gates);
        t_free(&out);
    }
}
END_TEST

START_TEST(get_rows_copies_the_rows_that_want_logits)
{
    FOR_ISAS(isa)
    {
        static const int32_t out_row[] = {1, 4};
        struct tensor x = t_make(QUANT_F32, 37, 5, 1), out = t_make(QUANT_F32, 37, 2, 1);
        struct op op = {.kind = OP_GET_ROWS, .rows = OP_ROWS_OUT, .dst = {&out}, .src = {&x}};
        run_one(isa, &op, &(struct rows){.n = 5, .n_out = 2, .out_row = out_row});
        for (int i = 0; i < 2; i++)
            ck_assert_mem_eq(t_f32(&out, i), t_f32(&x, out_row[i]), 37 * sizeof(float));
        t_free(&x);
        t_free(&out);
    }
}
END_TEST

START_TEST(top_k_takes_the_lower_of_equal_ids_and_no_broken_value)
{
    enum { N = 8, K = 3 };
    static const float x[5][N] = {
        {1, 5, -2, 5, 3, 5, 5, 0},
        {NAN, INFINITY, -3e38f, -INFINITY, NAN, 2, NAN, -NAN},
        {-1, -0.0f, 0.0f, -0.0f, -1, -1, -1, -1},
        {NAN, INFINITY, -INFINITY, NAN, NAN, INFINITY, NAN, NAN},
        {9, 8, 7, 10, -1, -2, -3, -4},
    };
    static const int32_t ids[5][K] = {{1, 3, 5}, {2, 5, -1}, {1, 2, 3}, {-1, -1, -1}, {0, 1, 3}};

    FOR_ISAS(isa)
    {
        static const int32_t out_row[5] = {0};
        struct tensor logits = t_make(QUANT_F32, N, 5, 1), best = t_make(QUANT_I32, 2 * K, 5, 1);
        struct op op = {.kind = OP_TOP_K, .rows = OP_ROWS_OUT, .dst = {&best}, .src = {&logits}};
        memcpy(logits.data, x, sizeof x);
        run_one(isa, &op, &(struct rows){.n = 5, .n_out = 5, .out_row = out_row});
        for (int i = 0; i < 5; i++) {
            float want[K] = {0};
            for (int r = 0; r < K; r++)
                want[r] = ids[i][r] < 0 ? 0.0f : x[i][ids[i][r]];
            ck_assert_mem_eq(tensor_row(&best, i), ids[i], sizeof ids[i]);
            ck_assert_mem_eq((int32_t *)tensor_row(&best, i) + K, want, sizeof want);
        }
        t_free(&logits);
        t_free(&best);
    }
}
END_TEST

static void add_isa_tests(TCase *tc, int n_isas)
{
    tcase_add_loop_test(tc, embed_takes_the_row_of_the_token_and_scales_it, 0, n_isas);
    tcase_add_loop_test(tc, rms_norm_is_over_the_row_or_each_head, 0, n_isas);
    tcase_add_loop_test(tc, matmul_of_four_types_that_share_their_source, 0, n_isas);
    tcase_add_loop_test(tc, elementwise_ops_with_tails_and_in_place, 0, n_isas);
    tcase_add_loop_test(tc, rope_turns_pairs_of_both_kinds_and_leaves_the_rest, 0, n_isas);
    tcase_add_loop_test(tc, attention_sees_the_right_keys_and_weighs_them, 0, n_isas);
    tcase_add_loop_test(tc, parts_of_attention_are_not_the_whole, 0, n_isas);
    tcase_add_test(tc, torn_segment_is_folded);
    tcase_add_loop_test(tc, route_picks_and_weighs_by_each_rule, 0, n_isas);
    tcase_add_loop_test(tc, route_of_equal_or_broken_logits_gives_each_id_once, 0, n_isas);
    tcase_add_loop_test(tc, moe_computes_each_slot_by_its_expert_in_one_call_or_several, 0, n_isas);
    tcase_add_loop_test(tc, combine_adds_the_ranks_in_order, 0, n_isas);
    tcase_add_loop_test(tc, get_rows_copies_the_rows_that_want_logits, 0, n_isas);
    tcase_add_loop_test(tc, top_k_takes_the_lower_of_equal_ids_and_no_broken_value, 0, n_isas);
}

int main(void)
{
    const char *usable[8] = {NULL};
    int n_isas = 0;

    for (const char *const *name = cpu_isa_names(); *name; name++)
        if (cpu_isa_has(*name))
            usable[n_isas++] = *name;
    isas = usable;
    Suite *suite = suite_create("cpu_ops");
    TCase *tc = tcase_create("cpu_ops");
    tcase_set_timeout(tc, 60);
    add_isa_tests(tc, n_isas);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
