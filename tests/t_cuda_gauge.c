/* What `ferry probe` measures of a GPU, which the emulated runtime plays with a clock: the rates that this goes by, whichever call fails
 * on the way. */
#include "src/cli/gauge_gpu.h"

#include "cuda/cuda.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "src/cli/gauge.h"
#include "tests/cuda_devices.h"
#include "tests/cuda_times.h"
#include "tests/run_suite.h"

#include <math.h>
#include <stdio.h>

enum {
    N_IN = 4096,
    N_HEAD_DIM = 128,
    POOL_BYTES = 64 * 1024,
    LEAST_BYTES = 2 * N_IN * 2, /* two rows in 16 bits */
    N_PASSES = 3,
    ATTENTION_NS = 1000000
};

static uint64_t kernel_ns(const struct emu_launch *l, void *arg)
{
    (void)arg;
    return strstr(l->name, "attn") ? ATTENTION_NS : product_ns(l);
}

/* Of matrices that are read once, however many rows there are. */
static double ops_per_s(double n_rows, double weight_bytes)
{
    return 2 * n_rows / weight_bytes * GPU_RATE;
}

static void must_be_about(double got, double want)
{
    ck_assert_double_eq_tol(got, want, 1e-4 * want);
}

/* A prompt's rows take emulated kernels a while: the first alone stands for them where only the calls count. */
static int run_first_row(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    struct rows first = *rows;

    first.n = first.n_prompt = 1;
    return cuda_device_ops.run(dev, ops, n_ops, &first);
}

static struct device *open_gpu(void)
{
    const struct cuda_opts opts = {.most = gauge_gpu_step};
    struct device *dev;

    ck_assert_msg(cuda_open(&opts, &dev) == 0, "%s", err_text());
    return dev;
}

static struct device *open_gpu_of_one_row(struct device_ops *ops)
{
    struct device *dev = open_gpu();

    own_ops(dev, ops);
    ops->run = run_first_row;
    return dev;
}

static void close_gpu(struct device *dev)
{
    dev->ops->close(dev);
    ck_assert_int_eq(emu_n_live(), 0);
}

START_TEST(rates_are_not_the_clocks)
{
    struct emu_rates r = {.kernel_ns = kernel_ns};
    struct gauge_gpu_rates got;
    struct device *dev = open_gpu();

    r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = PCIE_RATE;
    emu_clock(&r);
    ck_assert_msg(gauge_gpu(dev, POOL_BYTES, N_PASSES, &got) == 0, "%s", err_text());
    emu_clock(NULL);
    must_be_about(got.mem_bytes_per_s, GPU_RATE);
    must_be_about(got.up_bytes_per_s, PCIE_RATE);
    must_be_about(got.prompt.ints.few_ops_per_s, ops_per_s(MACHINE_GPU_FEW_ROWS, 4.5 / 8));
    must_be_about(got.prompt.ints.many_ops_per_s, ops_per_s(MACHINE_GPU_MANY_ROWS, 4.5 / 8));
    must_be_about(got.prompt.floats.few_ops_per_s, ops_per_s(MACHINE_GPU_FEW_ROWS, 2));
    must_be_about(got.prompt.floats.many_ops_per_s, ops_per_s(MACHINE_GPU_MANY_ROWS, 2));
    /* One head, its query and its value: each row sees itself and all before it. */
    double units = MACHINE_GPU_MANY_ROWS * (MACHINE_GPU_MANY_ROWS + 1) / 2.0 * 2 * N_HEAD_DIM;
    must_be_about(got.prompt.attn_unit_s, ATTENTION_NS * 1e-9 / units);
    close_gpu(dev);
}
END_TEST

START_TEST(timeless_gpu_is_infinitely_fast)
{
    struct gauge_gpu_rates got;
    struct device *dev = open_gpu();

    emu_clock(&(struct emu_rates){.op_ns = 0});
    ck_assert_int_eq(gauge_gpu(dev, POOL_BYTES, N_PASSES, &got), ERR_DEVICE);
    ck_assert_ptr_nonnull(strstr(err_text(), "does not tell how long"));
    emu_clock(NULL);
    close_gpu(dev);
}
END_TEST

START_TEST(senseless_measuring_is_tried)
{
    struct gauge_gpu_rates got;
    struct device *dev = open_gpu();

    ck_assert_int_eq(gauge_gpu(dev, POOL_BYTES, 0, &got), ERR_ARG);
    ck_assert_int_eq(gauge_gpu(dev, POOL_BYTES, GAUGE_MAX_PASSES + 1, &got), ERR_ARG);
    ck_assert_int_eq(gauge_gpu(dev, LEAST_BYTES - 1, N_PASSES, &got), ERR_ARG);
    close_gpu(dev);
}
END_TEST

/* As few rows of weights as may be, fewer than the block that is carried to them could fill. */
START_TEST(small_pool_is_filled_from_beyond_its_block)
{
    struct emu_rates r = {.kernel_ns = kernel_ns};
    struct gauge_gpu_rates got;
    struct device_ops ops;

    for (uint64_t pool_bytes = LEAST_BYTES; pool_bytes < 32 * 1024; pool_bytes += 5001) {
        struct device *dev = open_gpu_of_one_row(&ops);
        r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = PCIE_RATE;
        emu_clock(&r);
        ck_assert_msg(gauge_gpu(dev, pool_bytes, 1, &got) == 0, "%s", err_text());
        emu_clock(NULL);
        ck_assert_double_eq_tol(got.up_bytes_per_s, PCIE_RATE, 1e-3 * PCIE_RATE);
        close_gpu(dev);
    }
}
END_TEST

START_TEST(failed_call_leaves_something)
{
    bool failed = true;
    int n = 0;

    while (failed) {
        struct emu_rates r = {.op_ns = 10};
        struct gauge_gpu_rates got;
        struct device_ops ops;
        struct device *dev = open_gpu_of_one_row(&ops);
        emu_clock(&r);
        emu_fail_nth(++n);
        int rc = gauge_gpu(dev, LEAST_BYTES, 1, &got);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        emu_clock(NULL);
        ck_assert_msg(rc == 0 || ((rc == ERR_DEVICE || rc == ERR_NOMEM) && failed), "%d: %s", n, err_text());
        close_gpu(dev);
    }
    ck_assert_int_gt(n, 100);
}
END_TEST

/* A GPU is known again; another is another. */
START_TEST(gpus_have_one_name)
{
    char a[CUDA_ID_BYTES], b[CUDA_ID_BYTES], text[CUDA_ID_BYTES];

    ck_assert_int_eq(cuda_id(0, a), 0);
    emu_set_card(8, 24, 100 * 1024);
    ck_assert_int_eq(cuda_id(0, b), 0);
    ck_assert_str_ne(a, b);
    snprintf(text, sizeof text, "compute capability 8.0, 24 multiprocessors, 1 GiB");
    ck_assert_str_eq(b, text);
    emu_set_card(8, 30, 100 * 1024);
    ck_assert_int_eq(cuda_id(0, a), 0);
    ck_assert_str_ne(a, b);
    ck_assert_int_eq(cuda_id(1, a), ERR_DEVICE);
    for (int n = 1; n <= 3; n++) {
        emu_fail_nth(n);
        ck_assert_int_eq(cuda_id(0, a), ERR_DEVICE);
        emu_fail_nth(0);
    }
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("cuda_gauge");
    TCase *tc = tcase_create("cuda_gauge");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, rates_are_not_the_clocks);
    tcase_add_test(tc, timeless_gpu_is_infinitely_fast);
    tcase_add_test(tc, senseless_measuring_is_tried);
    tcase_add_test(tc, small_pool_is_filled_from_beyond_its_block);
    tcase_add_test(tc, failed_call_leaves_something);
    tcase_add_test(tc, gpus_have_one_name);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
