/* Ops of recurrent layers on the CUDA device over the emulated runtime, against the plain C kernels on the CPU, bit for bit: what they
 * give, and the records that they leave. */
#include "tests/cuda_pair.h"
#include "tests/record_step.h"
#include "tests/run_suite.h"

#include "cuda/launch.h"

/* The step's records, as the device has them. */
static struct rows rows_there(const struct pair *p, const struct rec_world *w, struct kv_seq seqs[REC_SEQS])
{
    struct rows rows = w->rows;

    for (int s = 0; s < REC_SEQS; s++) {
        seqs[s].record = w->seqs[s].record ? there(p, w->seqs[s].record) : NULL;
        seqs[s].next_record = there(p, w->seqs[s].next_record);
    }
    rows.seqs = seqs;
    return rows;
}

/* Activations of the step go up; what it leaves stays there for the next. */
static void bring_up(struct pair *p, const struct rec_world *w)
{
    const struct tensor *in[] = {&w->in, &w->in_alpha, &w->in_beta};

    for (size_t i = 0; i < sizeof in / sizeof *in; i++)
        ck_assert_int_eq(p->cuda->ops->upload(p->cuda, there(p, in[i]->data), in[i]->data, tensor_bytes(in[i])), 0);
}

START_TEST(recurrent_layer_differs)
{
    struct rec_world w = rec_make(&rec_shapes[_i]);
    struct pair p = pair_open(DEVICE_PREFILL_INT);
    struct kv_seq seqs[REC_SEQS] = {{.page = {NULL}}};
    struct op ops[REC_OPS];

    rec_ops(&w, ops);
    mirror_ops(&p, ops, REC_OPS);
    for (int i = 0; i < 2 * REC_SEQS; i++)
        mirror(&p, w.record[i / 2][i % 2], w.bytes);
    for (int i = 0; i < REC_N_STEPS; i++) {
        rec_begin(&w, &rec_steps[i]);
        bring_up(&p, &w);
        struct rows rows = rows_there(&p, &w, seqs);
        ck_assert_msg(run_there(&p, ops, REC_OPS, &rows) == 0, "%s", err_text());
        run_here(ops, REC_OPS, &w.rows);
        same_memory(&p, "a recurrent layer");
        rec_end(&w, &rec_steps[i]);
    }
    pair_close(&p);
    rec_free(&w);
}
END_TEST

/* Alone, and one after another in one launch. */
static void rows_case(int n_groups, int len, int n)
{
    struct tensor x = t_apart(2 * n_groups * len, n, 3), a = t_apart(n_groups * len, n, 1),
                  b = t_apart(n_groups * len, n, 2);
    const struct op ops[] = {
        {.kind = OP_SPLIT, .dst = {&a, &b}, .src = {&x}, .p.split = {n_groups, 2, {len, len}, {0, 1}}},
        {.kind = OP_L2_NORM, .dst = {&a}, .src = {&a}, .p.l2 = {n_groups, len, 1e-6f}},
        {.kind = OP_GATE, .dst = {&a}, .src = {&a, &b}},
        {.kind = OP_SPLIT,
         .dst = {&b, &a},
         .src = {&x},
         .p.split = {n_groups, 4, {len / 2, len - len / 2, len - 1, 1}, {1, 1, 0, 0}}},
    };

    for (int i = 0; i < 3; i++)
        same_result(&ops[i], 1, &(struct rows){.n = n}, device_op_name(ops[i].kind));
    same_result(ops, 4, &(struct rows){.n = n}, "one after another");
    t_done(&x);
    t_done(&a);
    t_done(&b);
}

START_TEST(op_of_single_rows_differs)
{
    rows_case(3, 5, 1);
    rows_case(4, 64, 2);
    rows_case(1, 200, 9);
    rows_case(32, 128, 1);
}
END_TEST

START_TEST(heads_larger_than_a_block_holds_are_taken)
{
    static const int dims[] = {CU_DELTA_MAX_DIM, CU_DELTA_MAX_DIM + 1};
    struct pair p = pair_open(DEVICE_PREFILL_INT);

    for (int i = 0; i < 2; i++) {
        struct rec_world w = rec_make(&(struct rec_shape){1, 1, dims[i], 8, 4, false});
        struct op ops[REC_OPS];
        rec_ops(&w, ops);
        ck_assert_int_eq(p.cuda->ops->can(&ops[2]), i == 0);
        rec_free(&w);
    }
    pair_close(&p);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_record");
    TCase *tc = tcase_create("few"); /* what a sanitizer can bear */

    tcase_add_checked_fixture(tc, pair_setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, recurrent_layer_differs, 0, REC_N_SHAPES);
    tcase_add_test(tc, op_of_single_rows_differs);
    tcase_add_test(tc, heads_larger_than_a_block_holds_are_taken);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
