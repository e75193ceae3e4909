/* A model without weights, and a device and a machine that do not exist: what plans are asked with. Each suite that includes it is a
 * program of its own. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_PLAN_MACHINE_H
#define FERRY_TESTS_PLAN_MACHINE_H

#include "src/base/err.h"
#include "src/base/size.h"
#include "src/plan/plan.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The head NAME.head of tests/gen/plan_heads.py, and a hole up to file_bytes where the weights would be. */
static struct model *open_head(const char *name, uint64_t file_bytes)
{
    char from[512], to[] = TEST_BUILD_DIR "/plan_machine-XXXXXX", buf[16384];
    struct model *m = NULL;

    snprintf(from, sizeof from, "%s/plan/%s.head", TEST_DATA_DIR, name);
    FILE *f = fopen(from, "rb");
    ck_assert_ptr_nonnull(f);
    size_t n = fread(buf, 1, sizeof buf, f);
    fclose(f);
    int fd = mkstemp(to);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, buf, n), (ssize_t)n);
    ck_assert_int_eq(ftruncate(fd, (off_t)file_bytes), 0);
    close(fd);
    int rc = model_open(to, NULL, &m);
    unlink(to);
    ck_assert_msg(rc == 0, "%s: %s", name, err_text());
    return m;
}

static enum op_kind lacking = OP_N_KIND;

static bool can(const struct op *op)
{
    return op->kind != lacking;
}

static uint64_t scratch_bytes(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    (void)ops;
    (void)n_ops;
    return (uint64_t)n_rows * 100 + (uint64_t)n_threads * 10000;
}

static const struct device_ops device = {.name = "cpu", .can = can, .scratch_bytes = scratch_bytes};

static struct machine machine_of(uint64_t ram_bytes)
{
    struct machine m = {.cpu_name = "Invented 9000",
                        .isa = "avx2",
                        .n_cores = 6,
                        .n_numa = 1,
                        .ram_total_bytes = ram_bytes,
                        .ram_limit_bytes = UINT64_MAX,
                        .ram_free_bytes = ram_bytes,
                        .memlock_bytes = 8 * MIB,
                        .has_uring = true,
                        .mem_bytes_per_s = 20e9,
                        .disk_bytes_per_s = 2e9};
    machine_identify(&m);
    return m;
}

#endif
