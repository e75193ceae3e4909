/* Predicted seconds against arithmetic done elsewhere (tests/gen/cost_facts.py), and what tune makes of measured ones. */
#include "src/plan/cost.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/shape.h"
#include "src/plan/tune.h"
#include "tests/run_suite.h"

#include <check.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The slot of an expert of `moe`: three matrices, each with room for a block at either end. */
#define SLOT_BYTES ((uint64_t)(217 + 217 + 316) * 4096)

static struct model *model;
static struct machine machine;
static struct plan_opts opts;
static struct plan_in in;

static double fact(const char *key)
{
    char word[64];
    double value;

    FILE *f = fopen(TEST_DATA_DIR "/cost/facts.txt", "r");
    ck_assert_ptr_nonnull(f);
    while (fscanf(f, "%63s %lf", word, &value) == 2) {
        if (!strcmp(word, key)) {
            fclose(f);
            return value;
        }
    }
    ck_abort_msg("no %s", key);
}

static bool can(const struct op *op)
{
    (void)op;
    return true;
}

static uint64_t scratch_bytes(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    (void)ops;
    (void)n_ops;
    return (uint64_t)n_rows * (uint64_t)n_threads;
}

static const struct device_ops device = {.name = "cpu", .can = can, .scratch_bytes = scratch_bytes};

/* The machine of cost_facts.py. */
static void setup(void)
{
    machine = (struct machine){.cpu_name = "Invented 9000",
                               .isa = "avx2",
                               .n_cores = 2,
                               .ram_total_bytes = 8 * GIB,
                               .ram_limit_bytes = UINT64_MAX,
                               .ram_free_bytes = 8 * GIB,
                               .has_uring = true,
                               .mem_bytes_per_s = 20e9,
                               .run_s = 7e-6};
    machine.kernels[QUANT_Q4_K] = (struct machine_kernel){8e9, 100e9, 200e9, 0};
    machine.kernels[QUANT_Q6_K] = (struct machine_kernel){6e9, 80e9, 150e9, 0};
    machine.kernels[QUANT_F32] = (struct machine_kernel){16e9, 30e9, 40e9, 0};
    machine.ops[OP_MATMUL].op_s = 2e-6;
    machine.ops[OP_MOE] = (struct machine_op){5e-6, 1e-9};
    machine.ops[OP_ATTENTION].unit_s = 2e-10;
    const struct machine_disk disk = {
        .id = "d", .is_direct = true, .n_rates = 3, .rates = {{MIB, 1, 1e9}, {MIB, 8, 2e9}, {MIB, 32, 4e9}}};
    machine_disk_put(&machine, &disk);
    machine_identify(&machine);
    opts = (struct plan_opts){0};
    ck_assert_int_eq(model_open_head(TEST_DATA_DIR "/plan/moe.head", NULL, &model), 0);
    in = (struct plan_in){&machine, model, &opts, &device, NULL};
}

static void teardown(void)
{
    model_close(model);
}

static struct plan make(void)
{
    struct plan p;

    ck_assert_msg(plan_make(&in, &p) == 0, "%s", err_text());
    return p;
}

static bool says(const char *text, const char *words)
{
    if (strstr(text, words))
        return true;
    fprintf(stderr, "no \"%s\" in:\n%s\n", words, text);
    return false;
}

#define NEAR(a, b) ck_assert_double_eq_tol((a) / (b), 1, 1e-9)

START_TEST(step_is_the_sum_of_its_ops)
{
    struct plan p = make();

    ck_assert(plan_is_measured(&p, &machine));
    ck_assert_uint_eq(p.slot_ram_bytes, 0);
    NEAR(1 / p.decode_tok_per_s, fact("token"));
    NEAR(p.decode_dense_s + p.decode_expert_s, fact("token"));
    ck_assert_double_eq(p.decode_disk_s, 0);
    NEAR(PLAN_PROMPT_TOK / p.prefill_tok_per_s, fact("prompt_512"));
    NEAR(p.load_s, (double)(p.dense_bytes + p.expert_bytes) / 4e9);
}
END_TEST

START_TEST(reading_hides_behind_computing)
{
    opts.expert_ram_bytes = 96 * SLOT_BYTES; /* of 384 */
    struct plan p = make();

    ck_assert_uint_eq(p.n_slots, 96);
    ck_assert_uint_eq(p.pace.n_ahead, 8);  /* all that a token uses */
    ck_assert_uint_eq(p.pace.n_reads, 33); /* eight give half of the rate that 32 do */
    NEAR(1 / p.decode_tok_per_s, fact("token_hits_25"));
    ck_assert_double_eq_tol((double)p.missed_bytes_per_tok / fact("missed_25"), 1, 1e-6);
    NEAR(PLAN_PROMPT_TOK / p.prefill_tok_per_s, fact("prompt_512_hits_25"));
    NEAR(p.first_token_s, p.load_s + fact("prompt_21_cold"));
    struct plan by_layers = p;
    by_layers.look_ahead = false;
    ck_assert_int_eq(cost_predict(&in, &by_layers), 0);
    NEAR(by_layers.first_token_s, p.load_s + fact("prompt_21_cold_by_layers"));
    char *text;
    ck_assert_int_eq(plan_explain(&p, &in, &text), 0);
    ck_assert_ptr_null(strstr(text, "no O_DIRECT"));
    mem_free(text);
    machine.disks[0].is_direct = false;
    machine.n_numa = 2;
    ck_assert_int_eq(plan_explain(&p, &in, &text), 0);
    ck_assert(says(text, "no O_DIRECT"));
    ck_assert(says(text, "2 NUMA nodes"));
    mem_free(text);
    /* by pread nothing hides */
    opts.io = PLAN_IO_PREAD;
    struct plan slow = make();
    ck_assert_double_gt(p.decode_tok_per_s, slow.decode_tok_per_s);
    NEAR(1 / slow.decode_tok_per_s, slow.decode_dense_s + slow.decode_expert_s + slow.decode_disk_s);
    NEAR(slow.decode_disk_s, (double)slow.missed_bytes_per_tok / 1e9);
}
END_TEST

/* What reads takes cores and memory, too: computing is slower meanwhile. */
START_TEST(disk_that_reads_slows_computing)
{
    opts.expert_ram_bytes = 288 * SLOT_BYTES; /* of 384 */
    struct plan before = make();
    machine.disks[0].token_share = 0.8;
    machine.disks[0].many_share = 0.6;
    struct plan p = make();

    ck_assert_uint_eq(p.n_slots, 288);
    NEAR(1 / p.decode_tok_per_s, fact("token_hits_75_share_80"));
    NEAR(PLAN_PROMPT_TOK / p.prefill_tok_per_s, fact("prompt_512_hits_75_share_60"));
    ck_assert_double_lt(p.decode_tok_per_s, before.decode_tok_per_s);
    ck_assert_double_lt(p.prefill_tok_per_s, before.prefill_tok_per_s);
    ck_assert_double_eq_tol(machine_beside_disk_s(&machine, true, 1, 0.5), 1.1, 1e-12);
    ck_assert_double_eq_tol(machine_beside_disk_s(&machine, true, 1, 5), 1.25, 1e-12); /* all of it beside the disk */
    machine.disk = -1;
    ck_assert_double_eq(machine_beside_disk_s(&machine, true, 1, 5), 1); /* nothing is known */
}
END_TEST

START_TEST(half_the_threads_compute_half_as_fast)
{
    struct plan both = make();

    opts.n_threads = 1;
    struct plan one = make();
    double op_s = 10 * 2e-6 + 3 * 5e-6 + 7 * 7e-6, unit_s = 3 * (8 * (2048 + 768) * 1e-9 + 32 * 256 * 2e-10);
    ck_assert_double_eq_tol(1 / one.decode_tok_per_s, 2 / both.decode_tok_per_s - op_s - unit_s, 1e-12);
}
END_TEST

/* A matmul takes what was measured at 1, 4, 16 and 256 rows, and half way between any two the mean of both; of a profile that says nothing
 * of 4 rows, half way between 1 and 16. */
START_TEST(time_of_some_rows_is_another)
{
    const struct tensor w = tensor_make(QUANT_Q4_K, 256, 1000, 1, NULL);
    struct machine_kernel *k = &machine.kernels[QUANT_Q4_K];
    double one_s = 144 * 1000 / 8e9, some_s = 2 * 256e3 * 4 / 50e9, few_s = 2 * 256e3 * 16 / 100e9,
           many_s = 2 * 256e3 * 256 / 200e9;

    NEAR(cost_matmul_s(&machine, 2, &w, 8.5), (one_s + few_s) / 2);
    k->some_ops_per_s = 50e9;
    NEAR(cost_matmul_s(&machine, 2, &w, 1), one_s);
    NEAR(cost_matmul_s(&machine, 2, &w, 2.5), (one_s + some_s) / 2);
    NEAR(cost_matmul_s(&machine, 2, &w, 4), some_s);
    NEAR(cost_matmul_s(&machine, 2, &w, 10), (some_s + few_s) / 2);
    NEAR(cost_matmul_s(&machine, 2, &w, 16), few_s);
    NEAR(cost_matmul_s(&machine, 2, &w, 136), (few_s + many_s) / 2);
}
END_TEST

/* A token is drawn from all logits, one after another in a batch; a prompt's step draws none. */
START_TEST(drawing_takes_no_time)
{
    struct plan p = make();
    struct cost_step with, without;
    struct program *program;

    p.n_seq = 6;
    ck_assert_int_eq(plan_program(&p, model, PLAN_MAIN, &program), 0);
    for (int n_rows = 1; n_rows <= 5; n_rows += 4) {
        struct cost_args a = {.machine = &machine, .plan = &p, .program = program, .n_rows = n_rows};
        machine.draw_s = 0;
        ck_assert_int_eq(cost_step(&a, &without), 0);
        machine.draw_s = 1e-6;
        ck_assert_int_eq(cost_step(&a, &with), 0);
        ck_assert_double_eq_tol(with.s - without.s, n_rows == 1 ? 1e-6 * model->hp.n_vocab : 0, 1e-9);
    }
    ck_assert_int_eq(cost_batch_step(&in, &p, 100, &with), 0);
    machine.draw_s = 0;
    ck_assert_int_eq(cost_batch_step(&in, &p, 100, &without), 0);
    ck_assert_double_eq_tol(with.s - without.s, 6e-6 * model->hp.n_vocab, 1e-9);
    program_free(program);
}
END_TEST

START_TEST(what_was_not_measured_is_not_predicted)
{
    machine.kernels[QUANT_Q6_K] = (struct machine_kernel){0};
    struct plan p = make();
    ck_assert_double_eq(p.decode_tok_per_s, 0);
    ck_assert_double_eq(p.prefill_tok_per_s, 0);
    /* nor are other kernels than those that were */
    machine.kernels[QUANT_Q6_K] = (struct machine_kernel){6e9, 80e9, 150e9, 0};
    snprintf(opts.isa, sizeof opts.isa, "ref");
    p = make();
    ck_assert(!plan_is_measured(&p, &machine));
    ck_assert_double_eq(p.prefill_tok_per_s, 0);
    NEAR(p.decode_tok_per_s, 20e9 / (double)p.decode_bytes_per_tok); /* the roof, marked as such */
    char *text;
    ck_assert_int_eq(plan_explain(&p, &in, &text), 0);
    ck_assert(says(text, "decode      at most"));
    ck_assert(says(text, "prefill     not known"));
    mem_free(text);
}
END_TEST

START_TEST(router_finds_what_a_simulated_cache_finds)
{
    static const double skews[] = {0, 0.35, 0.7};
    static const int slots[] = {32, 51, 77};
    struct cost_router r;
    char key[64];
    double sum = 0;

    ck_assert_int_eq(cost_router_init(128, 8, skews[_i], &r), 0);
    for (int e = 0; e < 128; e++)
        sum += r.chosen[e];
    ck_assert_double_eq_tol(sum, 8, 1e-9);
    for (int i = 0; i < 3; i++) {
        snprintf(key, sizeof key, "hits_%d_%d", (int)lrint(100 * skews[_i]), slots[i]);
        double hits = cost_router_hits(&r, slots[i] / 128.0);
        ck_assert_double_eq_tol(hits, fact(key), 1e-6);
        strcat(key, "_simulated"); /* eight runs: their mean is off by 0.01 or so, the approximation by 0.03 */
        ck_assert_double_eq_tol(hits, fact(key), 0.04);
    }
    snprintf(key, sizeof key, "distinct_%d_100", (int)lrint(100 * skews[_i]));
    ck_assert_double_eq_tol(cost_router_distinct(&r, 100), fact(key), 1e-6);
    ck_assert_double_eq(cost_router_hits(&r, 1), 1);
    cost_router_done(&r);
}
END_TEST

START_TEST(favourites_are_read_less)
{
    opts.expert_ram_bytes = 96 * SLOT_BYTES;
    struct plan even = make();
    char *text;

    ck_assert_int_eq(plan_explain(&even, &in, &text), 0);
    ck_assert(says(text, "every expert is wanted equally often"));
    mem_free(text);
    opts.skew = 0.7;
    struct plan skewed = make();
    ck_assert_uint_lt(skewed.missed_bytes_per_tok, even.missed_bytes_per_tok);
    ck_assert_double_gt(skewed.decode_tok_per_s, even.decode_tok_per_s);
    ck_assert_int_eq(plan_explain(&skewed, &in, &text), 0);
    ck_assert(says(text, "--skew 0.7"));
    mem_free(text);
    opts.skew = 5;
    ck_assert_int_eq(plan_make(&in, &skewed), ERR_ARG);
    opts.skew = NAN;
    ck_assert_int_eq(plan_make(&in, &skewed), ERR_ARG);
}
END_TEST

START_TEST(losing_plans_say_why)
{
    char *text;

    opts.expert_ram_bytes = 96 * SLOT_BYTES;
    opts.ram_bytes = GIB;
    struct plan p = make();
    ck_assert_int_eq(plan_compare(&p, &in, &text), 0);
    ck_assert(says(text, "--io pread"));
    ck_assert(says(text, "slower"));
    ck_assert(says(text, "only half the context"));
    ck_assert(says(text, "rounds the cache"));
    mem_free(text);
    /* one that cannot be is there with its numbers */
    opts.ram_bytes = p.total_bytes;
    p = make();
    ck_assert_int_eq(plan_compare(&p, &in, &text), 0);
    ck_assert(says(text, "--chunk 1024"));
    ck_assert(says(text, "too much"));
    mem_free(text);
}
END_TEST

START_TEST(gpu_holds_what_fits_and_no_more)
{
    struct cost_gpu gpu = {GIB, 256e9, 12e9};
    struct cost_gpu_plan g;
    struct plan p = make();

    ck_assert_int_eq(cost_gpu_plan(&gpu, &in, &p, &g), 0);
    ck_assert_uint_eq(g.dense_bytes, p.dense_bytes);
    ck_assert_uint_eq(g.kv_bytes, p.kv_bytes);
    ck_assert_uint_eq(g.dense_bytes + g.kv_bytes + g.expert_bytes, 512 * MIB);
    double share = (double)g.expert_bytes / (double)model->expert_bytes;
    ck_assert_double_eq_tol(g.hits, share, 1e-6); /* all wanted alike */
    double expert = 3 * 8 * 3059712.0, dense = (double)p.decode_bytes_per_tok - expert;
    double s = (dense + expert * g.hits) / 256e9 + expert * (1 - g.hits) / (20e9 + 12e9);
    NEAR(1 / g.decode_tok_per_s, s);
    gpu.vram_bytes = 512 * MIB;
    ck_assert_int_eq(cost_gpu_plan(&gpu, &in, &p, &g), 0);
    ck_assert_uint_eq(g.dense_bytes + g.kv_bytes + g.expert_bytes, 0);
    NEAR(g.decode_tok_per_s, 1 / (dense / 20e9 + expert / (20e9 + 12e9)));
    gpu.bytes_per_s = 0;
    ck_assert_int_eq(cost_gpu_plan(&gpu, &in, &p, &g), 0);
    ck_assert_double_eq(g.decode_tok_per_s, 0);
}
END_TEST

/* ---- shapes ---- */

START_TEST(shapes_have_the_bytes_of_the_files)
{
    char name[64];
    uint64_t dense_bytes, expert_bytes;
    int n = 0;

    FILE *f = fopen(TEST_DATA_DIR "/cost/shapes.txt", "r");
    ck_assert_ptr_nonnull(f);
    for (; fscanf(f, "%63s %" SCNu64 " %" SCNu64, name, &dense_bytes, &expert_bytes) == 3; n++) {
        struct model *m;
        const struct shape *s = shape_find(name);
        ck_assert_msg(s && shape_open(s, &m) == 0, "%s: %s", name, err_text());
        ck_assert_uint_eq(m->dense_bytes, dense_bytes);
        ck_assert_uint_eq(m->expert_bytes, expert_bytes);
        model_close(m);
    }
    fclose(f);
    ck_assert_int_eq(n, 13);
    ck_assert_ptr_null(shape_find("no-such-shape"));
}
END_TEST

START_TEST(every_shape_opens_or_names_what_is_lacking)
{
    for (const struct shape *s = shape_all(); s->name; s++) {
        struct model *m;
        int rc = shape_open(s, &m);
        ck_assert_msg(rc == 0 || (rc == ERR_UNSUPPORTED && strstr(err_text(), s->arch)), "%s: %s", s->name, err_text());
        model_close(m);
    }
}
END_TEST

/* ---- records ---- */

/* Of Qwen3-Next-80B-A3B 36 layers are recurrent: 3 rows of 8192 inputs and 32 heads of 128 x 128 floats each. */
#define RECORD_BYTES (36 * (3 * 8192 + 32 * 128 * 128) * (uint64_t)4)

/* Memory and time for records are in the plan, whatever the context. */
START_TEST(records_cost_nothing)
{
    struct plan_opts wish = {.n_ctx = 1024, .n_seq = 2, .io = PLAN_IO_URING};
    struct plan_in hybrid = {.machine = &machine, .opts = &wish, .cpu = &device};
    struct cost_step step, without;
    struct model *m;
    struct plan p, longer;
    char *text;

    ck_assert_int_eq(shape_open(shape_find("qwen3-next-80b-a3b"), &m), 0);
    hybrid.model = m;
    ck_assert_msg(plan_make(&hybrid, &p) == 0, "%s", err_text());
    ck_assert_uint_eq(p.record_bytes, (6 * RECORD_BYTES + 4095) / 4096 * 4096);
    uint64_t sum = p.dense_bytes + p.expert_bytes + p.kv_bytes + p.record_bytes + p.scratch_bytes;
    ck_assert_uint_eq(p.total_bytes, sum + p.stage_bytes + p.meta_bytes + p.trace_bytes);
    ck_assert_int_eq(plan_explain(&p, &hybrid, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "recurrent state"));
    ck_assert_ptr_nonnull(strstr(text, "6 records of 2 sessions"));
    mem_free(text);
    wish.n_ctx = 4096;
    ck_assert_int_eq(plan_make(&hybrid, &longer), 0);
    ck_assert_uint_eq(longer.record_bytes, p.record_bytes);
    ck_assert_uint_gt(longer.kv_bytes, p.kv_bytes);
    NEAR(cost_record_bytes(m, &p, PLAN_MAIN), 2.0 * RECORD_BYTES);
    machine.kernels[QUANT_Q5_K] = (struct machine_kernel){7e9, 90e9, 160e9, 0};
    ck_assert_int_eq(cost_batch_step(&hybrid, &p, 10, &step), 0);
    machine.mem_bytes_per_s = 1e30;
    ck_assert_int_eq(cost_batch_step(&hybrid, &p, 10, &without), 0);
    NEAR(step.dense_s - without.dense_s, 2 * 2.0 * 36 * 32 * 128 * 128 * 4 / 20e9);
    wish.n_seq = 100;
    ck_assert_int_eq(plan_make(&hybrid, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "recurrent state 22."));
    model_close(m);
}
END_TEST

/* ---- tune ---- */

static struct tune seen(const struct plan *p, double s, double wait_s, double bytes)
{
    struct tune t;
    const struct tune_seen x = {100, (uint64_t)(s * 1e11), (uint64_t)(bytes * 100), (uint64_t)(wait_s * 1e11)};

    tune_compare(p, &x, &t);
    return t;
}

START_TEST(review_names_what_was_off)
{
    /* 10 tokens/s: 60 ms of computing, 40 ms waiting for 40 MB */
    const struct plan p = {
        .decode_tok_per_s = 10, .decode_dense_s = 0.02, .decode_expert_s = 0.04, .missed_bytes_per_tok = 40000000};
    char text[256];

    struct tune t = seen(&p, 0.105, 0.042, 40e6);
    ck_assert_int_eq(t.off, TUNE_OFF_NONE);
    ck_assert(says(tune_text(&p, &t, text, sizeof text), "predicted 10 tokens/s, measured 9.52 (-5 %)"));
    t = seen(&p, 0.16, 0.04, 40e6);
    ck_assert_int_eq(t.off, TUNE_OFF_COMPUTE);
    ck_assert_double_eq_tol(t.compute, 2, 1e-6);
    ck_assert(says(tune_text(&p, &t, text, sizeof text), "computing took 2.00 of the predicted 60 ms"));
    t = seen(&p, 0.14, 0.08, 80e6);
    ck_assert_int_eq(t.off, TUNE_OFF_MISSES);
    ck_assert_double_eq_tol(t.misses, 2, 1e-6);
    ck_assert(says(tune_text(&p, &t, text, sizeof text), "2.00 of the predicted 40 MB"));
    t = seen(&p, 0.14, 0.08, 40e6);
    ck_assert_int_eq(t.off, TUNE_OFF_DISK);
    ck_assert_double_eq_tol(t.disk, 2, 1e-6);
    ck_assert(says(tune_text(&p, &t, text, sizeof text), "waited for 2.00"));
}
END_TEST

START_TEST(too_little_work_is_no_review)
{
    const struct plan known = {.decode_tok_per_s = 10, .decode_dense_s = 0.1}, unknown = {.decode_tok_per_s = 0};
    struct tune t;
    char text[256] = "x";

    tune_compare(&known, &(struct tune_seen){.n_tok = 0}, &t);
    ck_assert_str_eq(tune_text(&known, &t, text, sizeof text), "");
    tune_compare(&known, &(struct tune_seen){.n_tok = TUNE_LEAST_TOK - 1, .ns = 9000000000}, &t);
    ck_assert_int_eq(t.off, TUNE_OFF_NONE);
    tune_compare(&unknown, &(struct tune_seen){.n_tok = 100, .ns = 9000000000}, &t);
    ck_assert_str_eq(tune_text(&unknown, &t, text, sizeof text), "");
}
END_TEST

START_TEST(no_memory_leaks_nothing)
{
    uint64_t meta_bytes = mem_live_bytes(MEM_META), other_bytes = mem_live_bytes(MEM_OTHER);
    const struct cost_gpu gpu = {GIB, 256e9, 12e9};

    opts.expert_ram_bytes = 96 * SLOT_BYTES;
    for (uint64_t n = 1;; n++) {
        struct cost_gpu_plan g;
        struct plan p;
        struct model *m = NULL;
        char *text = NULL, *others = NULL;
        mem_fail_nth(n);
        int rc = plan_make(&in, &p);
        if (!rc)
            rc = plan_explain(&p, &in, &text);
        if (!rc)
            rc = plan_compare(&p, &in, &others);
        if (!rc)
            rc = cost_gpu_plan(&gpu, &in, &p, &g);
        if (!rc)
            rc = shape_open(shape_find("small-qwen3moe"), &m);
        model_close(m);
        mem_free(text);
        mem_free(others);
        ck_assert_uint_eq(mem_live_bytes(MEM_META), meta_bytes);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), other_bytes);
        if (!rc)
            break;
        ck_assert_int_eq(rc, ERR_NOMEM);
        ck_assert_uint_lt(n, 3000);
    }
    mem_fail_nth(0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cost");
    TCase *t = tcase_create("cost");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, step_is_the_sum_of_its_ops);
    tcase_add_test(t, reading_hides_behind_computing);
    tcase_add_test(t, disk_that_reads_slows_computing);
    tcase_add_test(t, half_the_threads_compute_half_as_fast);
    tcase_add_test(t, time_of_some_rows_is_another);
    tcase_add_test(t, drawing_takes_no_time);
    tcase_add_test(t, what_was_not_measured_is_not_predicted);
    tcase_add_loop_test(t, router_finds_what_a_simulated_cache_finds, 0, 3);
    tcase_add_test(t, favourites_are_read_less);
    tcase_add_test(t, losing_plans_say_why);
    tcase_add_test(t, gpu_holds_what_fits_and_no_more);
    tcase_add_test(t, shapes_have_the_bytes_of_the_files);
    tcase_add_test(t, every_shape_opens_or_names_what_is_lacking);
    tcase_add_test(t, records_cost_nothing);
    tcase_add_test(t, review_names_what_was_off);
    tcase_add_test(t, too_little_work_is_no_review);
    tcase_add_test(t, no_memory_leaks_nothing);
    suite_add_tcase(s, t);
    return run_suite(s);
}
