/* The choice between GPU only and overlap against engines that walk a tiny model: with the virtual clock of the emulated runtime, sequences
 * of which one has its pages in the host's memory, and a host that is a little faster and a little slower than where the choice turns. */
#include "tests/emu/emu.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "cuda/launch.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "src/plan/cost.h"
#include "src/plan/plan_in.h"
#include "src/run/batch.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/store.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Three sequences of one segment each; the GPU holds two. */
enum { N_VOCAB = 288, N_SEQ = 3, N_GPU = 2, N_CTX = 512, POS = 400, CHUNK = 100 };
/* Slow ones, so that a nanosecond is nothing; the way is so fast that what crosses is little beside what is computed. */
#define GPU_RATE 1e6
#define PCIE_RATE 1e9

static struct {
    struct device_ops cpu_ops;
    struct machine machine;
    struct model *model;
    struct plan plan;
    struct plan_opts opts;
    struct plan_in in;
    struct device *gpu, *cpu;
    struct store *store;
    struct cache *cache;
    struct cache_seq *seqs[N_SEQ];
    struct exec *exec;
    struct batch batch;
    double row_bytes; /* that attention of a row reads in a layer */
    int n_host_rows;  /* that the host computed */
} rooms;

static uint64_t ns_of(double bytes, double rate)
{
    return (uint64_t)(bytes * 1e9 / rate + 0.5);
}

/* ---- the devices, timed ---- */

static uint64_t kernel_ns(const struct emu_launch *l, void *arg)
{
    const struct cu_mat_args *a = (const struct cu_mat_args *)((const char *)l->closure + l->args_off);

    (void)arg;
    if (strstr(l->name, "attn"))
        return ns_of(N_GPU * rooms.row_bytes, GPU_RATE);
    if (!strstr(l->name, "gemv") && !strstr(l->name, "gemm_int"))
        return 0;
    ck_assert_uint_eq(l->closure_bytes - l->args_off, sizeof *a);
    int n_rows = a->n_rows;
    for (int i = 0; i < a->n_more; i++)
        n_rows += a->more[i].n_rows;
    return ns_of((double)a->w_stride * n_rows, GPU_RATE);
}

static int run_host(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    for (int i = 0; i < n_ops; i++)
        if (ops[i].kind == OP_ATTN_STATES) {
            emu_host_works(ns_of((N_SEQ - N_GPU) * rooms.row_bytes, rooms.machine.mem_bytes_per_s));
            rooms.n_host_rows++;
        }
    return cpu_device_ops.run(dev, ops, n_ops, rows);
}

/* ---- an engine by hand ---- */

static void make_plan(void)
{
    struct kv_shape shape;

    rooms.opts = (struct plan_opts){.n_ctx = N_CTX,
                                    .n_seq = N_SEQ,
                                    .n_out = N_SEQ,
                                    .n_threads = 1,
                                    .chunk_tok = CHUNK,
                                    .io = PLAN_IO_PREAD,
                                    .no_pin = true,
                                    .vram_bytes = GIB};
    ck_assert_int_eq(machine_find(&rooms.machine), 0);
    rooms.machine.gpu_bytes_per_s = GPU_RATE;
    rooms.machine.pcie_bytes_per_s = PCIE_RATE;
    rooms.machine.n_mem = 0;
    rooms.in = (struct plan_in){&rooms.machine, rooms.model, &rooms.opts, &cpu_device_ops, &cuda_device_ops};
    ck_assert_msg(plan_make(&rooms.in, &rooms.plan) == 0, "%s", err_text());
    rooms.plan.gpu.kv_tok = N_GPU * N_CTX; /* so little a cache would not pay for what two sides need */
    rooms.plan.gpu.stage_rows = 1000;
    ck_assert_int_eq(plan_count(&rooms.in, &shape, &rooms.plan), 0);
    ck_assert(plan_has_host_kv(&rooms.plan));
}

static void add_rows(int seq, int first, int n, int n_logits)
{
    int32_t tokens[CHUNK];

    for (int i = 0; i < n; i++)
        tokens[i] = (seq * 91 + (first + i) * 7 + (first + i) / 50) % 200 + 10;
    ck_assert_int_eq(cache_reserve(rooms.seqs[seq], n), 0);
    batch_add(&rooms.batch, rooms.seqs[seq], tokens, n, first, n_logits, n > 1);
}

static void fill_caches(void)
{
    const float *logits;

    for (int seq = 0; seq < N_SEQ; seq++) {
        ck_assert_int_eq(cache_seq_make(rooms.cache, &rooms.seqs[seq]), 0);
        for (int first = 0; first < POS; first += CHUNK) {
            batch_clear(&rooms.batch);
            add_rows(seq, first, CHUNK, 0);
            ck_assert_msg(exec_run(rooms.exec, &rooms.batch, NULL, &logits) == 0, "%s", err_text());
            cache_commit(rooms.seqs[seq], CHUNK);
        }
    }
}

static void make_rooms(void)
{
    struct kv_shape shape;

    memset(&rooms, 0, sizeof rooms);
    ck_assert_int_eq(model_open(TEST_DATA_DIR "/models/llama.gguf", NULL, &rooms.model), 0);
    make_plan();
    const struct model_layer *l = &rooms.model->layers[0];
    rooms.row_bytes =
        (POS + 1.0) * l->n_head_kv * (rooms.model->hp.head_dim_k + rooms.model->hp.head_dim_v) * 2; /* F16 */
    struct cuda_opts cuda;
    memset(&cuda, 0, sizeof cuda);
    plan_device_step(&rooms.plan, rooms.model, &cuda.most);
    ck_assert_int_eq(cuda_open(&cuda, &rooms.gpu), 0);
    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 1}, &rooms.cpu), 0);
    rooms.cpu_ops = cpu_device_ops;
    rooms.cpu_ops.run = run_host;
    rooms.cpu->ops = &rooms.cpu_ops;
    struct store_args store = {.model = rooms.model, .plan = &rooms.plan, .device = rooms.gpu};
    ck_assert_msg(store_open(&store, &rooms.store) == 0, "%s", err_text());
    ck_assert_int_eq(model_kv_shape(rooms.model, rooms.plan.kv_type, 0, &shape, NULL), 0);
    struct cache_args cache = {.shape = &shape,
                               .n_seq = N_SEQ,
                               .n_ctx = N_CTX,
                               .chunk_tok = CHUNK,
                               .device = rooms.gpu,
                               .dev_tok = rooms.plan.gpu.kv_tok};
    ck_assert_int_eq(cache_open(&cache, &rooms.cache), 0);
    struct exec_args exec = {.model = rooms.model,
                             .plan = &rooms.plan,
                             .device = rooms.gpu,
                             .host = rooms.cpu,
                             .store = rooms.store,
                             .clock = emu_now_ns};
    ck_assert_msg(exec_open(&exec, &rooms.exec) == 0, "%s", err_text());
    ck_assert_int_eq(batch_init(&rooms.batch, CHUNK, N_SEQ), 0);
    rooms.machine.mem_bytes_per_s = GPU_RATE;
    fill_caches();
}

static void leave_rooms(void)
{
    batch_done(&rooms.batch);
    exec_close(rooms.exec);
    for (int seq = 0; seq < N_SEQ; seq++)
        cache_seq_free(rooms.seqs[seq]);
    cache_close(rooms.cache);
    store_close(rooms.store);
    rooms.cpu->ops->close(rooms.cpu);
    rooms.gpu->ops->close(rooms.gpu);
    model_close(rooms.model);
    ck_assert_int_eq(emu_n_live(), 0);
}

/* Seconds of a step in which the first n sequences decode a token; its logits (n, N_VOCAB). Nothing is committed. */
static double step_s(int n, float *out)
{
    struct emu_rates r = {.kernel_ns = kernel_ns};
    const float *logits;

    r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = PCIE_RATE;
    batch_clear(&rooms.batch);
    for (int seq = 0; seq < n; seq++)
        add_rows(seq, POS, 1, 1);
    rooms.n_host_rows = 0;
    emu_clock(&r);
    ck_assert_msg(exec_run(rooms.exec, &rooms.batch, NULL, &logits) == 0, "%s", err_text());
    double s = (double)emu_now_ns() * 1e-9;
    emu_clock(NULL);
    memcpy(out, logits, sizeof *out * N_VOCAB * (size_t)n);
    for (int seq = 0; seq < n; seq++)
        ck_assert_int_eq(cache_truncate(rooms.seqs[seq], POS), POS);
    ck_assert_int_eq(rooms.n_host_rows, n > N_GPU ? rooms.model->hp.n_layer : 0);
    return s;
}

/* What the plan counts and the kernels here do not: norms, the row of the embedding; and what goes up with a step. */
static double uncounted_s(void)
{
    const struct model *m = rooms.model;
    double bytes = (double)m->weights[m->w[ROLE_TOKEN_EMBD]].t.stride[1];

    for (int i = 0; i < m->n_weights; i++)
        bytes += m->weights[i].t.ne[1] == 1 ? (double)tensor_bytes(&m->weights[i].t) : 0;
    return bytes / GPU_RATE + 20e3 / PCIE_RATE;
}

/* Of a step without the host's sequence and one with it the better one is chosen, for a host that is 3 % slower or faster than where
 * they are equal; each takes as long as is told; and rows say the same in both. */
START_TEST(choice_is_not_what_the_clock_says)
{
    static float alone[N_GPU * N_VOCAB], all[N_SEQ * N_VOCAB], before[N_SEQ * N_VOCAB];
    int n_chosen[APEX_N_WAYS] = {0};
    double turn_rate = 0;

    make_rooms();
    const double gpu_s = step_s(N_GPU, alone), row_s = rooms.model->hp.n_layer * rooms.row_bytes / GPU_RATE;
    /* Equal where 3 tokens take 3 / 2 of the time of two: linear layers, and the host's row. */
    turn_rate = row_s * GPU_RATE / (gpu_s * N_SEQ / N_GPU - (gpu_s - N_GPU * row_s));
    const double rates[] = {GPU_RATE * 4, turn_rate * 1.03, turn_rate * 0.97, turn_rate / 20};
    for (int i = 0; i < 4; i++) {
        struct apex_profile profile;
        struct apex_choice choice;
        rooms.machine.mem_bytes_per_s = rates[i];
        ck_assert(cost_gpu_apex(&rooms.in, &rooms.plan, POS + 1, &profile));
        ck_assert_int_eq(profile.n_gpu, N_GPU);
        ck_assert_int_eq(profile.n_host, N_SEQ - N_GPU);
        apex_choose(&profile, &choice);
        double all_s = step_s(N_SEQ, all), told_s = apex_predict(&profile, APEX_OVERLAP, N_SEQ - N_GPU).s;
        ck_assert_msg(fabs(all_s - told_s) <= uncounted_s(), "overlap: %g s predicted, %g s walked", told_s, all_s);
        ck_assert_msg(fabs(gpu_s - choice.time[APEX_GPU_ONLY].s) <= uncounted_s(),
                      "GPU only: %g s predicted, %g s walked", choice.time[APEX_GPU_ONLY].s, gpu_s);
        bool is_overlap_better = N_SEQ / all_s > N_GPU / gpu_s;
        ck_assert_int_eq(choice.runs, is_overlap_better ? APEX_OVERLAP : APEX_GPU_ONLY);
        ck_assert_int_eq(is_overlap_better, i < 2);
        n_chosen[choice.runs]++;
        ck_assert_mem_eq(all, alone, sizeof alone);
        if (i > 0)
            ck_assert_mem_eq(all, before, sizeof all);
        memcpy(before, all, sizeof all);
    }
    ck_assert_int_eq(n_chosen[APEX_OVERLAP], 2);
    ck_assert_int_eq(n_chosen[APEX_GPU_ONLY], 2);
    for (int i = 0; i < N_SEQ * N_VOCAB; i++)
        ck_assert(isfinite(all[i]));
    leave_rooms();
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("cuda_apex");
    TCase *tc = tcase_create("cuda_apex");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, choice_is_not_what_the_clock_says);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
