/* What `ferry probe` measures of kernels: all of them, whichever allocation fails on the way. */
#include "src/cli/gauge.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The least pool there is, for one matrix of the largest type: rates are those of a cache then, but there. */
START_TEST(no_kernel_is_left_out_and_no_memory_leaks_nothing)
{
    struct machine m = {.n_cores = 1};
    uint64_t before_bytes = live_bytes();
    int rc = ERR_NOMEM;

    for (uint64_t n = 1; rc; n++) {
        mem_fail_nth(n);
        rc = gauge_run(&m, 8 * MIB, 2);
        ck_assert_uint_eq(live_bytes(), before_bytes);
        ck_assert_msg(rc == 0 || rc == ERR_NOMEM, "%s", err_text());
        ck_assert_uint_lt(n, 1000);
    }
    mem_fail_nth(0);
    ck_assert_int_eq(gauge_run(&m, 8 * MIB, 0), ERR_ARG);
    ck_assert_int_eq(gauge_run(&m, 8 * MIB, GAUGE_MAX_PASSES + 1), ERR_ARG);
    for (int type = 0; type < QUANT_ID_END; type++) {
        const struct quant_info *info = quant_info(type);
        const struct machine_kernel *k = &m.kernels[type];
        bool is_weight = info && info->act != QUANT_ACT_NONE;
        ck_assert_int_eq(k->token_bytes_per_s > 0, is_weight);
        ck_assert_int_eq(k->few_ops_per_s > 0, is_weight);
        ck_assert_int_eq(k->some_ops_per_s > 0, is_weight);
        ck_assert_int_eq(k->many_ops_per_s > 0, is_weight);
        ck_assert(isfinite(k->token_bytes_per_s + k->some_ops_per_s + k->few_ops_per_s + k->many_ops_per_s));
    }
    ck_assert(isfinite(m.draw_s) && m.draw_s > 0);
    static const enum op_kind dear[] = {OP_ATTENTION, OP_RMS_NORM, OP_ROPE, OP_GLU, OP_ROUTE, OP_COMBINE};
    for (size_t i = 0; i < sizeof dear / sizeof *dear; i++)
        ck_assert_msg(m.ops[dear[i]].unit_s > 0, "%s", device_op_name(dear[i]));
    for (int kind = 0; kind < OP_N_KIND; kind++) {
        ck_assert(isfinite(m.ops[kind].op_s) && m.ops[kind].op_s >= 0);
        ck_assert(isfinite(m.ops[kind].unit_s) && m.ops[kind].unit_s >= 0);
    }
}
END_TEST

/* A share is one of a whole, whatever the machine does meanwhile. */
START_TEST(computing_beside_a_disk_is_lost)
{
    struct machine m = {.n_cores = 1, .n_disks = 1};
    char path[] = TEST_BUILD_DIR "/t_gauge-XXXXXX";
    uint64_t before_bytes = live_bytes();
    int fd = mkstemp(path);

    ck_assert_int_ge(fd, 0);
    void *data = calloc(1, 2 * MIB); /* a hole would be read by processors alone */
    ck_assert_int_eq(write(fd, data, 2 * MIB), (ssize_t)(2 * MIB));
    free(data);
    mem_fail_nth(1); /* the others of both parts fail in the tests of these */
    ck_assert_int_eq(gauge_beside_disk(&m, 8 * MIB, path), ERR_NOMEM);
    mem_fail_nth(0);
    ck_assert_uint_eq(live_bytes(), before_bytes);
    ck_assert_msg(gauge_beside_disk(&m, 8 * MIB, path) == 0, "%s", err_text());
    ck_assert(m.disks[0].token_share > 0 && m.disks[0].token_share <= 1);
    ck_assert(m.disks[0].many_share > 0 && m.disks[0].many_share <= 1);
    close(fd);
    unlink(path);
    ck_assert_int_eq(gauge_beside_disk(&m, 8 * MIB, path), ERR_IO);
    ck_assert_uint_eq(live_bytes(), before_bytes);
}
END_TEST

int main(void)
{
    if (getenv("FERRY_TESTS_VALGRIND")) {
        puts("what is measured until it is steady has no end under valgrind");
        return 77;
    }
    Suite *s = suite_create("gauge");
    TCase *t = tcase_create("gauge");

    tcase_set_timeout(t, 300);
    tcase_add_test(t, no_kernel_is_left_out_and_no_memory_leaks_nothing);
    tcase_add_test(t, computing_beside_a_disk_is_lost);
    suite_add_tcase(s, t);
    return run_suite(s);
}
