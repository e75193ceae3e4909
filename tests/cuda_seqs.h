/* Sequences of an engine made by hand, of whose pages the GPU that the emulated runtime plays holds a part, with times of its clock: what
 * attention reads over the rates of either side's memory, and weights. Each suite that includes it is a program of its own. lint: C, as
 * Check's suites are */
#ifndef FERRY_TESTS_CUDA_SEQS_H
#define FERRY_TESTS_CUDA_SEQS_H

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
#include "tests/cuda_devices.h"
#include "tests/cuda_times.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Three sequences (or SEQS, which a suite may define before) of one segment each, of which POS positions are filled; the GPU holds two,
 * until one of them ends. */
#ifndef SEQS
#define SEQS 3
#endif
static const char *rooms_model = "llama"; /* of the next engine, as what follows */
static struct trace *rooms_trace;

enum { N_VOCAB = 288, N_SEQ = SEQS, N_GPU = 2, N_CTX = 512, POS = 430, CHUNK = 86 };

static struct {
    struct device_ops cpu_ops, gpu_ops;
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
    /* Rows whose pages lie with the GPU, of each attention that was queued there and has not begun, as a ring. */
    int n_gpu_rows[256];
    unsigned n_queued, n_begun;
    bool is_timed;
    int n_host_rows; /* that the host computed, of all layers */
} rooms;

/* ---- the devices, timed ---- */

static uint64_t kernel_ns(const struct emu_launch *l, void *arg)
{
    (void)arg;
    if (!strstr(l->name, "attn"))
        return product_ns(l);
    ck_assert_uint_lt(rooms.n_begun, rooms.n_queued);
    return ns_of(rooms.n_gpu_rows[rooms.n_begun++ % 256] * rooms.row_bytes, GPU_RATE);
}

static int count_rows(const struct op *op, const struct rows *rows)
{
    int n = 0;

    for (int i = 0; i < rows->n; i++)
        n += rows->seqs[rows->seq[i]].page[op->p.attn.group][0] != NULL;
    return n;
}

static int run_gpu(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    for (int i = 0; i < n_ops && rooms.is_timed; i++)
        if (ops[i].kind == OP_ATTN_STATES || ops[i].kind == OP_ATTENTION)
            rooms.n_gpu_rows[rooms.n_queued++ % 256] = count_rows(&ops[i], rows);
    int rc = cuda_device_ops.run(dev, ops, n_ops, rows);
    if (rc < 0) /* nothing is under way any more */
        rooms.n_begun = rooms.n_queued;
    return rc;
}

static int run_host(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    for (int i = 0; i < n_ops; i++)
        if (ops[i].kind == OP_ATTN_STATES) {
            int n = count_rows(&ops[i], rows);
            if (!emu_is_real()) /* there time is real, too */
                emu_host_works(ns_of(n * rooms.row_bytes, rooms.machine.mem_bytes_per_s));
            rooms.n_host_rows += n;
        }
    return cpu_device_ops.run(dev, ops, n_ops, rows);
}

/* From now on the emulated runtime has a clock, at 0; until time_off(). Nothing is under way. */
static void time_on(double pcie_rate)
{
    struct emu_rates r = {.kernel_ns = kernel_ns};

    r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = pcie_rate;
    rooms.n_begun = rooms.n_queued;
    rooms.is_timed = true;
    emu_clock(&r);
}

static void time_off(void)
{
    emu_clock(NULL);
    rooms.is_timed = false;
}

/* ---- an engine by hand ---- */

static void make_plan(void)
{
    struct kv_shape shape;

    rooms.opts = (struct plan_opts){.n_ctx = N_CTX,
                                    .n_seq = N_SEQ,
                                    .n_out = N_SEQ,
                                    .kv_tok = N_SEQ * N_CTX,
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

/* back: what cache_args say of coming back; NULL: nothing does. */
static void make_rooms(const struct cache_args *back)
{
    struct kv_shape shape;
    char path[1024];

    memset(&rooms, 0, sizeof rooms);
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, rooms_model);
    ck_assert_int_eq(model_open(path, NULL, &rooms.model), 0);
    make_plan();
    const struct model_layer *l = &rooms.model->layers[0];
    rooms.row_bytes =
        (POS + 1.0) * l->n_head_kv * (rooms.model->hp.head_dim_k + rooms.model->hp.head_dim_v) * 2; /* F16 */
    open_devices(&rooms.plan, rooms.model, false, &rooms.gpu, &rooms.cpu);
    own_ops(rooms.gpu, &rooms.gpu_ops);
    own_ops(rooms.cpu, &rooms.cpu_ops);
    rooms.gpu_ops.run = run_gpu;
    rooms.cpu_ops.run = run_host;
    struct store_args store = {.model = rooms.model, .plan = &rooms.plan, .device = rooms.gpu};
    ck_assert_msg(store_open(&store, &rooms.store) == 0, "%s", err_text());
    ck_assert_int_eq(model_kv_shape(rooms.model, rooms.plan.kv_type, 0, &shape, NULL), 0);
    struct cache_args cache = {.shape = &shape,
                               .n_seq = N_SEQ,
                               .n_ctx = N_CTX,
                               .chunk_tok = CHUNK,
                               .n_tables = 3 * N_SEQ,
                               .device = rooms.gpu,
                               .dev_tok = rooms.plan.gpu.kv_tok,
                               .back_steps = back ? back->back_steps : 0,
                               .back_bytes = back ? back->back_bytes : 0};
    ck_assert_int_eq(cache_open(&cache, &rooms.cache), 0);
    struct exec_args exec = {.model = rooms.model,
                             .plan = &rooms.plan,
                             .device = rooms.gpu,
                             .host = rooms.cpu,
                             .store = rooms.store,
                             .trace = rooms_trace,
                             .clock = emu_is_real() ? NULL : emu_now_ns};
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

#endif
