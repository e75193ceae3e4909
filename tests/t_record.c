/* Ops of recurrent layers on the CPU device, on each kernel table that the machine has, against double arithmetic; and what their bits may
 * not depend on. */
#include "tests/record_step.h"
#include "tests/run_suite.h"

#include "src/device/device_check.h"

#include <float.h>

static const char *const *isas; /* names this machine can run, NULL-terminated */

/* ---- against double arithmetic ---- */

/* A position of a sequence, from its beginning on: out (values). */
static void want_row(const struct rec_world *w, int seq, int pos, double *out)
{
    const struct rec_shape *s = &w->s;
    const int dim = s->head_dim_k, dim_v = s->head_dim_v;
    double *state = calloc((size_t)(w->values * dim), sizeof *state), *y = calloc((size_t)w->channels, sizeof *y);

    for (int t = 0; t <= pos; t++) {
        const int64_t at = seq * REC_MAX_POS + t;
        for (int64_t c = 0; c < w->channels; c++) {
            y[c] = 0;
            for (int j = 0; j < s->n_conv; j++)
                if (t - s->n_conv + 1 + j >= 0)
                    y[c] += (double)t_f32(&w->conv, c)[j] * (double)t_f32(&w->x, at - s->n_conv + 1 + j)[c];
            y[c] /= 1 + exp(-y[c]);
        }
        for (int head = 0; head < 2 * s->n_head_k; head++) {
            double sum = 1e-6;
            for (int i = 0; i < dim; i++)
                sum += y[head * dim + i] * y[head * dim + i];
            for (int i = 0; i < dim; i++)
                y[head * dim + i] /= sqrt(sum);
        }
        for (int head = 0; head < s->n_head_v; head++) {
            const int of = s->is_tiled ? head % s->n_head_k : head / (s->n_head_v / s->n_head_k);
            const double *q = y + of * dim, *k = y + w->keys + of * dim, *v = y + 2 * w->keys + head * dim_v;
            double *m = state + (int64_t)head * dim * dim_v;
            double soft = log1p(exp((double)t_f32(&w->alpha, at)[head] + (double)t_f32(&w->dt, 0)[head]));
            double decay = exp((double)t_f32(&w->a, 0)[head] * soft);
            double learn = 1 / (1 + exp(-(double)t_f32(&w->beta, at)[head]));
            for (int j = 0; j < dim_v; j++) {
                double known = 0, got = 0;
                for (int i = 0; i < dim; i++)
                    known += (m[i * dim_v + j] *= decay) * k[i];
                for (int i = 0; i < dim; i++)
                    got += (m[i * dim_v + j] += k[i] * learn * (v[j] - known)) * q[i];
                out[head * dim_v + j] = got / sqrt(dim);
            }
        }
    }
    free(y);
    free(state);
}

/* Dots in four chains round dim / 4 times each, S twice a position, of which it forgets some; what goes in is some ten roundings off. */
static void check_row(const struct rec_world *w, int row)
{
    double *want = malloc((size_t)w->values * sizeof *want), most = 0;
    double n_eps = w->s.head_dim_k / 2.0 + 2.0 * (w->pos[row] + 1) + 24;

    want_row(w, w->seq[row], w->pos[row], want);
    for (int64_t i = 0; i < w->values; i++)
        most = fmax(most, fabs(want[i]));
    for (int64_t i = 0; i < w->values; i++)
        ck_assert_msg(fabs((double)t_f32(&w->out, row)[i] - want[i]) <= n_eps * (double)FLT_EPSILON * most,
                      "sequence %d position %d value %d: %.9g instead of %.9g", w->seq[row], w->pos[row], (int)i,
                      (double)t_f32(&w->out, row)[i], want[i]);
    free(want);
}

START_TEST(recalled_differs_from_double_arithmetic)
{
    struct rec_world w = rec_make(&rec_shapes[_i % REC_N_SHAPES]);
    struct fixture f = fixture_open(isas[_i / REC_N_SHAPES], 2, DEVICE_PREFILL_INT);
    struct op ops[REC_OPS];

    rec_ops(&w, ops);
    for (int i = 0; i < REC_N_STEPS; i++) {
        rec_begin(&w, &rec_steps[i]);
        fixture_run(&f, ops, REC_OPS, &w.rows);
        for (int row = 0; row < w.rows.n; row++)
            check_row(&w, row);
        rec_end(&w, &rec_steps[i]);
    }
    fixture_close(&f);
    rec_free(&w);
}
END_TEST

/* ---- no bit depends on ... ---- */

/* What positions gave goes to all (REC_SEQS * REC_MAX_POS, values). */
static void run_step(struct rec_world *w, struct fixture *f, const struct rec_step *step, float *all)
{
    struct op ops[REC_OPS];

    rec_ops(w, ops);
    rec_begin(w, step);
    fixture_run(f, ops, REC_OPS, &w->rows);
    for (int row = 0; row < w->rows.n; row++)
        memcpy(all + (w->seq[row] * REC_MAX_POS + w->pos[row]) * w->values, t_f32(&w->out, row),
               (size_t)w->values * sizeof *all);
    rec_end(w, step);
}

/* Of all steps; caller frees. by_row: a row a step. */
static float *all_of(const struct rec_shape *s, const char *isa, int n_threads, bool by_row)
{
    struct rec_world w = rec_make(s);
    struct fixture f = fixture_open(isa, n_threads, DEVICE_PREFILL_INT);
    float *all = calloc((size_t)(REC_SEQS * REC_MAX_POS * w.values), sizeof *all);

    for (int i = 0; i < REC_N_STEPS; i++) {
        for (int seq = 0; by_row && seq < REC_SEQS; seq++)
            for (int n = 0; n < rec_steps[i].n_rows[seq]; n++)
                run_step(&w, &f, &(struct rec_step){{seq == 0, seq == 1, seq == 2}}, all);
        if (!by_row)
            run_step(&w, &f, &rec_steps[i], all);
    }
    fixture_close(&f);
    rec_free(&w);
    return all;
}

START_TEST(cut_company_threads_or_instructions_change_bits)
{
    const struct rec_shape *s = &rec_shapes[_i % REC_N_SHAPES];
    const size_t bytes = (size_t)(REC_SEQS * REC_MAX_POS) * (size_t)(s->n_head_v * s->head_dim_v) * sizeof(float);
    rnd_seed(5);
    float *want = all_of(s, "ref", 1, true);

    for (int n_threads = 1; n_threads <= 3; n_threads++)
        for (int by_row = 0; by_row < 2; by_row++) {
            rnd_seed(5);
            float *got = all_of(s, isas[_i / REC_N_SHAPES], n_threads, by_row);
            ck_assert_mem_eq(want, got, bytes);
            free(got);
        }
    free(want);
}
END_TEST

/* A step that is run again, because the first time it failed behind this layer, says the same. */
START_TEST(step_writes_what_it_reads)
{
    struct rec_world w = rec_make(&rec_shapes[0]);
    struct fixture f = fixture_open("ref", 1, DEVICE_PREFILL_INT);
    struct op ops[REC_OPS];
    char *before = malloc(w.bytes);

    rec_ops(&w, ops);
    rec_begin(&w, &rec_steps[0]);
    fixture_run(&f, ops, REC_OPS, &w.rows);
    rec_end(&w, &rec_steps[0]);
    memcpy(before, w.record[0][w.now[0]], w.bytes);
    rec_begin(&w, &rec_steps[1]);
    fixture_run(&f, ops, REC_OPS, &w.rows);
    ck_assert_mem_eq(before, w.record[0][w.now[0]], w.bytes);
    fixture_run(&f, ops, REC_OPS, &w.rows);
    check_row(&w, 0);
    free(before);
    fixture_close(&f);
    rec_free(&w);
}
END_TEST

/* ---- split ---- */

START_TEST(part_of_a_row_lands_elsewhere)
{
    static const struct op_split splits[] = {
        {3, 2, {5, 5}, {0, 1}}, {2, 4, {4, 4, 6, 6}, {0, 0, 0, 1}}, {1, 3, {1, 2, 3}, {1, 0, 1}}, {4, 1, {7}, {0}}};
    const struct op_split *p = &splits[_i];
    int width[2] = {0, 0}, group = 0;

    for (int i = 0; i < p->n_parts; i++) {
        width[p->to[i]] += p->n_groups * p->len[i];
        group += p->len[i];
    }
    struct tensor x = t_make(QUANT_F32, (int64_t)group * p->n_groups, 3, 1), y[2];
    struct op op = {.kind = OP_SPLIT, .src = {&x}, .p.split = *p};
    for (int i = 0; i < 2 && width[i]; i++) {
        y[i] = t_make(QUANT_F32, width[i], 3, 1);
        op.dst[i] = &y[i];
    }
    struct fixture f = fixture_open("ref", 2, DEVICE_PREFILL_INT);
    fixture_run(&f, &op, 1, &(struct rows){.n = 3});
    fixture_close(&f);
    for (int row = 0; row < 3; row++)
        for (int part = 0, off = 0, at[2] = {0, 0}; part < p->n_parts; off += p->len[part++])
            for (int g = 0; g < p->n_groups; g++)
                for (int i = 0; i < p->len[part]; i++, at[p->to[part]]++)
                    ck_assert(t_f32(op.dst[p->to[part]], row)[at[p->to[part]]] == t_f32(&x, row)[g * group + off + i]);
    for (int i = 0; i < 2 && width[i]; i++)
        t_free(&y[i]);
    t_free(&x);
}
END_TEST

/* ---- what is refused ---- */

START_TEST(records_that_do_not_fit_the_rows_are_taken)
{
    struct rec_world w = rec_make(&rec_shapes[0]);
    struct op ops[REC_OPS];

    rec_ops(&w, ops);
    for (int i = 0; i < REC_OPS; i += 2) {
        memset(w.len, 0, sizeof w.len);
        rec_begin(&w, &rec_steps[0]);
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), 0);
        w.seqs[1].record = w.record[1][w.now[1]]; /* position 0 has none */
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), ERR_ARG);
        w.seqs[1].record = NULL;
        w.seqs[1].next_record = NULL;
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), ERR_ARG);
        w.len[0] = w.len[1] = 1;
        rec_begin(&w, &rec_steps[0]);
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), 0);
        w.seqs[0].next_record = w.record[0][w.now[0]]; /* it is read */
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), ERR_ARG);
        w.seqs[0] = (struct kv_seq){.next_record = w.record[0][0]}; /* position 1 wants one */
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), ERR_ARG);
        ck_assert_ptr_nonnull(strstr(err_text(), "position 1"));
        rec_begin(&w, &rec_steps[0]);
        w.pos[5]++; /* one is left out */
        ck_assert_int_eq(device_check_step(&ops[i], &w.rows), ERR_ARG);
        ops[i].rows = OP_ROWS_OUT;
        ck_assert_int_eq(device_check_step(&ops[i], &(struct rows){.n = 1}), ERR_ARG);
    }
    rec_free(&w);
}
END_TEST

START_TEST(shapes_that_do_not_fit_are_taken)
{
    struct rec_world w = rec_make(&rec_shapes[3]);
    struct op ops[REC_OPS], bad[10], good;
    int n = 0;

    rec_ops(&w, ops);
    for (int i = 0; i < REC_OPS; i++)
        ck_assert(device_check_shapes(&ops[i]));
    for (int i = 0; i < 10; i++)
        bad[i] = ops[i < 3 ? 0 : i < 5 ? 1 : 2];
    bad[n++].src[0] = &w.out;
    bad[n++].p.conv.off = 4;
    bad[n++].w[0] = &w.dt;
    bad[n++].p.l2.n_head = 1000;
    bad[n++].p.l2.head_dim = 0;
    bad[n++].p.delta.n_head_k = 4;
    bad[n++].p.delta.n_head_v = 0;
    bad[n++].p.delta.head_dim_k = 0;
    bad[n++].src[1] = &w.in;
    bad[n++].dst[0] = &w.in_beta;
    for (int i = 0; i < n; i++)
        ck_assert_msg(!device_check_shapes(&bad[i]), "number %d", i);

    static const struct op_split splits[] = {
        {0, 1, {5}, {0}},       {1, 0, {5}, {0}},        {1, 5, {1}, {0}},
        {1, 2, {5, 0}, {0, 1}}, {1, 2, {5, 5}, {0, -1}}, {1, 2, {5, 5}, {0, OP_MAX_IO}},
        {1, 2, {5, 5}, {0, 2}}, {1, 2, {5, 6}, {0, 1}},  {2, 2, {5, 5}, {0, 1}}};
    struct tensor x = t_make(QUANT_F32, 10, 1, 1), a = t_make(QUANT_F32, 5, 1, 1), b = t_make(QUANT_F32, 5, 1, 1);
    good = (struct op){.kind = OP_SPLIT, .dst = {&a, &b}, .src = {&x}, .p.split = {1, 2, {5, 5}, {0, 1}}};
    ck_assert(device_check_shapes(&good));
    for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
        struct op op = good;
        op.p.split = splits[i];
        ck_assert_msg(!device_check_shapes(&op), "split %d", (int)i);
    }
    t_free(&x);
    t_free(&a);
    t_free(&b);
    rec_free(&w);
}
END_TEST

static void setup(void)
{
    rnd_seed(1);
}

int main(void)
{
    Suite *suite = suite_create("record");
    TCase *tc = tcase_create("ops");
    static const char *usable[16];
    int n_isas = 0;

    for (const char *const *name = cpu_isa_names(); *name; name++)
        if (cpu_isa_has(*name))
            usable[n_isas++] = *name;
    isas = usable;
    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_add_loop_test(tc, recalled_differs_from_double_arithmetic, 0, n_isas * REC_N_SHAPES);
    tcase_add_loop_test(tc, cut_company_threads_or_instructions_change_bits, 0, n_isas * REC_N_SHAPES);
    tcase_add_test(tc, step_writes_what_it_reads);
    tcase_add_loop_test(tc, part_of_a_row_lands_elsewhere, 0, 4);
    tcase_add_test(tc, records_that_do_not_fit_the_rows_are_taken);
    tcase_add_test(tc, shapes_that_do_not_fit_are_taken);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
