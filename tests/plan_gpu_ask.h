/* The same with a GPU that only says what it would take, and a deep model that does not fit one. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_PLAN_GPU_ASK_H
#define FERRY_TESTS_PLAN_GPU_ASK_H

#include "tests/plan_ask.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/shape.h"
#include "src/plan/plan.h"

#define GPU_OWN_BYTES 70000
#define GPU_ALLOCS 3

static uint64_t gpu_scratch_row_bytes;

static void gpu_own_bytes(const struct device_step *most, struct device_own *out)
{
    *out = (struct device_own){.dev_bytes = GPU_OWN_BYTES + 8 * (uint64_t)most->n_ctx * (uint64_t)most->n_seqs,
                               .host_bytes = 12345,
                               .n_allocs = GPU_ALLOCS};
}

static uint64_t gpu_scratch_bytes(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    (void)ops;
    (void)n_ops;
    (void)n_threads;
    return (uint64_t)n_rows * gpu_scratch_row_bytes + 1;
}

static const struct device_ops gpu = {
    .name = "gpu", .can = can, .scratch_bytes = gpu_scratch_bytes, .own_bytes = gpu_own_bytes};

static struct plan_in *ask_gpu(int model, uint64_t ram_bytes, uint64_t vram_bytes)
{
    ask(model, ram_bytes);
    in.gpu = &gpu;
    opts.vram_bytes = vram_bytes;
    gpu_scratch_row_bytes = 1000;
    return &in;
}

/* 40 dense layers of Q4_K and Q6_K, wide enough for a layer to be worth more than what a piece of memory is rounded up by. */
static const struct shape deep = {.name = "deep",
                                  .arch = "dots1",
                                  .n_layer = 40,
                                  .n_embd = 2048,
                                  .n_head = 16,
                                  .n_head_kv = 4,
                                  .head_dim = 128,
                                  .n_ff = 8192,
                                  .n_dense = 40,
                                  .n_vocab = 2048,
                                  .n_ctx = 4096};

/* The plan that was asked for, after each of its allocations has failed in turn and left nothing. */
static void plan_in_spite_of_failures(struct plan *p)
{
    const uint64_t live_bytes = mem_live_bytes(MEM_META);
    int rc = ERR_NOMEM;

    for (uint64_t n = 1; rc; n++) {
        mem_fail_nth(n);
        rc = plan_make(&in, p);
        ck_assert_msg(rc == 0 || rc == ERR_NOMEM, "allocation %d: %s", (int)n, err_text());
        ck_assert_uint_eq(mem_live_bytes(MEM_META), live_bytes);
        ck_assert_uint_lt(n, 1000);
    }
    mem_fail_nth(0);
}

#endif
