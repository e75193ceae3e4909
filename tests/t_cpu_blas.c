/* --prefill blas: prompt rows of a matmul through OpenBLAS, all others as ever. */
#include "tests/cpu_step.h"
#include "tests/run_suite.h"

#include <cblas.h>
#include <dlfcn.h>
#include <float.h>
#include <stdatomic.h>

static atomic_int n_calls, n_other_shapes;

typedef void sgemm_fn(OPENBLAS_CONST enum CBLAS_ORDER order, OPENBLAS_CONST enum CBLAS_TRANSPOSE ta,
                      OPENBLAS_CONST enum CBLAS_TRANSPOSE tb, OPENBLAS_CONST blasint m, OPENBLAS_CONST blasint n,
                      OPENBLAS_CONST blasint k, OPENBLAS_CONST float alpha, OPENBLAS_CONST float *a,
                      OPENBLAS_CONST blasint lda, OPENBLAS_CONST float *b, OPENBLAS_CONST blasint ldb,
                      OPENBLAS_CONST float beta, float *c, OPENBLAS_CONST blasint ldc);

/* Stands before the library's own: counts, and passes on. */
void cblas_sgemm(OPENBLAS_CONST enum CBLAS_ORDER order, OPENBLAS_CONST enum CBLAS_TRANSPOSE ta,
                 OPENBLAS_CONST enum CBLAS_TRANSPOSE tb, OPENBLAS_CONST blasint m, OPENBLAS_CONST blasint n,
                 OPENBLAS_CONST blasint k, OPENBLAS_CONST float alpha, OPENBLAS_CONST float *a,
                 OPENBLAS_CONST blasint lda, OPENBLAS_CONST float *b, OPENBLAS_CONST blasint ldb,
                 OPENBLAS_CONST float beta, float *c, OPENBLAS_CONST blasint ldc)
{
    static _Atomic(sgemm_fn *) real;
    sgemm_fn *fn = atomic_load(&real);

    if (!fn) {
        *(void **)&fn = dlsym(RTLD_NEXT, "cblas_sgemm");
        atomic_store(&real, fn);
    }
    atomic_fetch_add(&n_calls, 1);
    if (m != 64 || n != 128 || k != 512)
        atomic_fetch_add(&n_other_shapes, 1);
    fn(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

enum { N_COLS = 768, N_OUT = 200, MAX_ROWS = 200 };

static int32_t pos[2 * MAX_ROWS], seq[2 * MAX_ROWS]; /* filled by main() */

/* x . w for the rows at x, of which the first n_prompt are prompt. They stand at positions from first_pos on. */
static void matmul_at(struct fixture *f, struct tensor *x, struct tensor *w, struct tensor *y, int n, int n_prompt,
                      int first_pos)
{
    struct op op = {.kind = OP_MATMUL, .n_w = 1, .dst = {y}, .src = {x}, .w = {w}};
    struct rows rows = {.n = n, .n_prompt = n_prompt, .pos = pos + first_pos, .seq = seq};

    fixture_run(f, &op, 1, &rows);
}

static void matmul(struct fixture *f, struct tensor *x, struct tensor *w, struct tensor *y, int n, int n_prompt)
{
    matmul_at(f, x, w, y, n, n_prompt, 0);
}

static const enum quant_type types[] = {QUANT_F32, QUANT_F16, QUANT_BF16, QUANT_Q8_0, QUANT_Q4_K};

START_TEST(default_mode_never_calls_the_library)
{
    struct tensor x = t_make(QUANT_F32, N_COLS, MAX_ROWS, 1), y = t_make(QUANT_F32, N_OUT, MAX_ROWS, 1);
    struct fixture f = fixture_open(NULL, 2, DEVICE_PREFILL_INT);

    n_calls = 0;
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        struct tensor w = t_weight(types[t], N_COLS, N_OUT, 1);
        matmul(&f, &x, &w, &y, MAX_ROWS, MAX_ROWS);
        t_free(&w);
    }
    ck_assert_int_eq(atomic_load(&n_calls), 0);
    fixture_close(&f);
    t_free(&x);
    t_free(&y);
}
END_TEST

START_TEST(prompt_rows_are_right_and_all_calls_have_one_shape)
{
    struct tensor x = t_make(QUANT_F32, N_COLS, MAX_ROWS, 1), y = t_make(QUANT_F32, N_OUT, MAX_ROWS, 1);
    struct fixture f = fixture_open(NULL, 2, DEVICE_PREFILL_BLAS);

    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        struct tensor w = t_weight(types[t], N_COLS, N_OUT, 1);
        n_calls = n_other_shapes = 0;
        matmul(&f, &x, &w, &y, 70, 70);
        ck_assert_int_eq(atomic_load(&n_calls), 2 * 2 * 2); /* tiles of rows, tokens and columns */
        ck_assert_int_eq(n_other_shapes, 0);
        for (int r = 0; r < N_OUT; r += 9) {
            float *weights = t_row_floats(&w, 0, r);
            for (int i = 0; i < 70; i++) {
                double want = 0, sum_abs = 0;
                for (int k = 0; k < N_COLS; k++) {
                    want += (double)weights[k] * (double)t_f32(&x, i)[k];
                    sum_abs += fabs((double)weights[k] * (double)t_f32(&x, i)[k]);
                }
                ck_assert_msg(fabs((double)t_f32(&y, i)[r] - want) <= N_COLS * (double)FLT_EPSILON * sum_abs,
                              "row %d of %d: %g instead of %g", r, i, (double)t_f32(&y, i)[r], want);
            }
            mem_free(weights);
        }
        t_free(&w);
    }
    fixture_close(&f);
    t_free(&x);
    t_free(&y);
}
END_TEST

START_TEST(a_rows_bits_depend_on_no_neighbour_count_or_thread)
{
    struct tensor x = t_make(QUANT_F32, N_COLS, MAX_ROWS, 1), all = t_make(QUANT_F32, N_OUT, MAX_ROWS, 1);
    struct tensor y = t_make(QUANT_F32, N_OUT, MAX_ROWS, 1), w = t_weight(QUANT_Q4_K, N_COLS, N_OUT, 1);
    struct fixture f = fixture_open(NULL, 1, DEVICE_PREFILL_BLAS);

    matmul(&f, &x, &w, &all, MAX_ROWS, MAX_ROWS);
    fixture_close(&f);
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        f = fixture_open(NULL, n_threads, DEVICE_PREFILL_BLAS);
        for (int n = 1; n <= 130; n += 43) {
            int first = n_threads * 3 + n / 7;
            struct tensor part = tensor_make(QUANT_F32, N_COLS, n, 1, t_f32(&x, first));
            matmul_at(&f, &part, &w, &y, n, n, first);
            ck_assert_mem_eq(y.data, t_f32(&all, first), (size_t)n * N_OUT * sizeof(float));
        }
        fixture_close(&f);
    }
    t_free(&x);
    t_free(&y);
    t_free(&all);
    t_free(&w);
}
END_TEST

START_TEST(rows_behind_the_prompt_keep_their_bits)
{
    struct tensor x = t_make(QUANT_F32, N_COLS, MAX_ROWS, 1), w = t_weight(QUANT_Q4_K, N_COLS, N_OUT, 1);
    struct tensor dots = t_make(QUANT_F32, N_OUT, MAX_ROWS, 1), y = t_make(QUANT_F32, N_OUT, MAX_ROWS, 1);
    struct fixture plain = fixture_open(NULL, 2, DEVICE_PREFILL_INT), f = fixture_open(NULL, 2, DEVICE_PREFILL_BLAS);

    matmul(&plain, &x, &w, &dots, MAX_ROWS, 0);
    matmul(&f, &x, &w, &y, MAX_ROWS, 67);
    ck_assert_mem_eq(t_f32(&y, 67), t_f32(&dots, 67), (MAX_ROWS - 67) * N_OUT * sizeof(float));
    ck_assert_mem_ne(t_f32(&y, 0), t_f32(&dots, 0), N_OUT * sizeof(float));
    matmul(&f, &x, &w, &y, MAX_ROWS, 0);
    ck_assert_mem_eq(y.data, dots.data, tensor_bytes(&y));
    fixture_close(&plain);
    fixture_close(&f);
    t_free(&x);
    t_free(&y);
    t_free(&dots);
    t_free(&w);
}
END_TEST

START_TEST(router_logits_stay_float_dots)
{
    enum { N_EXPERT = 8 };
    struct tensor x = t_make(QUANT_F32, N_COLS, MAX_ROWS, 1), w = t_weight(QUANT_F32, N_COLS, N_EXPERT, 1);
    struct tensor y = t_make(QUANT_F32, N_EXPERT, MAX_ROWS, 1), ids = t_make(QUANT_I32, 2, MAX_ROWS, 1);
    struct tensor gates = t_make(QUANT_F32, 2, MAX_ROWS, 1);
    struct op ops[2] = {{.kind = OP_MATMUL, .n_w = 1, .dst = {&y}, .src = {&x}, .w = {&w}},
                        {.kind = OP_ROUTE,
                         .dst = {&ids, &gates},
                         .src = {&y},
                         .p.route = {.n_expert = N_EXPERT, .k = 2, .normalize = true, .scale = 1.0f}}};
    struct fixture f = fixture_open(NULL, 2, DEVICE_PREFILL_BLAS);

    n_calls = 0;
    fixture_run(&f, ops, 2, &(struct rows){.n = MAX_ROWS, .n_prompt = MAX_ROWS, .pos = pos, .seq = seq});
    ck_assert_int_eq(atomic_load(&n_calls), 0);
    fixture_close(&f);
    t_free(&x);
    t_free(&w);
    t_free(&y);
    t_free(&ids);
    t_free(&gates);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cpu_blas");
    TCase *tc = tcase_create("cpu_blas");

    for (int i = 0; i < 2 * MAX_ROWS; i++)
        pos[i] = i;
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, default_mode_never_calls_the_library);
    tcase_add_test(tc, prompt_rows_are_right_and_all_calls_have_one_shape);
    tcase_add_test(tc, a_rows_bits_depend_on_no_neighbour_count_or_thread);
    tcase_add_test(tc, rows_behind_the_prompt_keep_their_bits);
    tcase_add_test(tc, router_logits_stay_float_dots);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
