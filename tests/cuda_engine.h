/* Engines on the tiny models of tests/data/models whose GPU the emulated runtime plays: opening them, and what they must give. Each
 * suite that includes it is a program of its own. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_CUDA_ENGINE_H
#define FERRY_TESTS_CUDA_ENGINE_H

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "io/file.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "src/plan/cost.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/session.h"
#include "src/run/store.h"
#include "tests/cuda_devices.h"
#include "tests/cuda_open.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PREFILL = 130, N_NEW = 64 };

/* What is counted for the driver's rounding: 2 MiB for each of 6 pieces, and for landings if there are any. */
#define ROUNDING_BYTES (12 * MIB)
#define LANDING_ROUNDING_BYTES (2 * MIB)

/* Device memory is what the plan says to the byte, and no experts more would fit. */
static void check_bytes(const struct ferry_engine *e, const struct ferry_engine_opts *o)
{
    uint64_t rounding_bytes = ROUNDING_BYTES + (fact_of(e, "landings", NULL) ? LANDING_ROUNDING_BYTES : 0);
    ck_assert_uint_eq(emu_device_bytes() + rounding_bytes, fact_of(e, "bytes", "total"));
    if (o->vram_bytes)
        ck_assert_uint_le(fact_of(e, "bytes", "total"), o->vram_bytes);
}

static struct ferry_stats last_stats; /* of the session that logits_of ran */

/* Logits of ids: the first PREFILL as a prompt, the rest one by one. Caller frees. */
static inline float *logits_of(const char *name, const struct ferry_engine_opts *o)
{
    float *out = malloc(sizeof(float) * N_TOK * N_VOCAB);
    struct ferry_engine *e = open_with(name, o);
    struct ferry_session *s = session_of(e);

    if (strcmp(o->device, "cpu") != 0)
        check_bytes(e, o);
    emu_in_step(true);
    ck_assert_msg(ferry_session_logits(s, ids, PREFILL, true, out) == 0, "%s", ferry_error());
    ck_assert_msg(ferry_session_logits(s, ids + PREFILL, N_TOK - PREFILL, false, out + PREFILL * N_VOCAB) == 0, "%s",
                  ferry_error());
    emu_in_step(false);
    ferry_session_stats(s, &last_stats);
    ferry_session_free(s);
    ferry_engine_close(e);
    return out;
}

static void must_equal(const float *want, const float *got, const char *name)
{
    for (int i = 0; i < N_TOK * N_VOCAB; i++)
        if (memcmp(&want[i], &got[i], sizeof *want)) /* Check writes down each assertion that it passes */
            ck_abort_msg("%s: row %d, logit %d: %.9g instead of %.9g", name, i / N_VOCAB, i % N_VOCAB, (double)got[i],
                         (double)want[i]);
}

/* GPU memory for all but experts, and for so many quarters of those. */
static uint64_t vram_for(const char *name, int quarters)
{
    static char last_name[32]; /* tests ask for the same one again and again */
    static uint64_t expert_bytes, bytes;

    if (strcmp(name, last_name)) {
        struct ferry_engine_opts o = copies_nothing("cuda:0");
        struct ferry_engine *e = open_with(name, &o);
        expert_bytes = fact_of(e, "bytes", "expert");
        bytes = fact_of(e, "bytes", "total") - expert_bytes;
        ferry_engine_close(e);
        snprintf(last_name, sizeof last_name, "%s", name);
    }
    return bytes + expert_bytes * (uint64_t)quarters / 4;
}

/* Options of the split number `quarters`, nothing copied; the emulated GPU has no byte more than the plan may use. */
static inline struct ferry_engine_opts split_of(const char *name, int quarters)
{
    struct ferry_engine_opts o = copies_nothing("cuda:0");
    o.vram_bytes = vram_for(name, quarters);
    emu_set_vram(o.vram_bytes);
    return o;
}

/* ---- an engine's rooms by hand ---- */

static struct {
    struct file_ops ops;
    struct model *model;
    struct plan plan;
    struct device *gpu, *cpu;
    struct device_ops cpu_ops; /* the CPU's, but for what a test puts there */
    struct store *store;
    struct cache *cache;
    struct exec *exec;
    struct session *session;
    int fail_at, n_reads; /* the read that fails; 0: none */
    uint64_t fail_off;    /* 0: it has failed twice, or not yet */
} rooms;

/* The nth read, and its repetition. */
static bool fails(uint64_t off)
{
    if (++rooms.n_reads == rooms.fail_at) {
        rooms.fail_off = off;
        return true;
    }
    bool is_repeat = rooms.fail_at && off == rooms.fail_off;
    rooms.fail_off = is_repeat ? 0 : rooms.fail_off;
    return is_repeat;
}

static int64_t read_at(void *ctx, void *handle, uint64_t off, void *dst, uint64_t bytes)
{
    if (fails(off))
        return -EIO;
    return file_plain.read_at(ctx, handle, off, dst, bytes);
}

static int read_fault(void *arg, uint64_t off, int res)
{
    (void)arg;
    return fails(off) ? -EIO : res;
}

struct rooms_args {
    const char *name;
    enum plan_io io;
    int quarters;     /* of the experts that lie on the GPU */
    int n_ctx, n_seq; /* of a sequence, and how many have a cache; 0: 256, 1 */
    int n_beside;     /* of them, that a step may have; 0: 2 */
    bool no_graphs;
    uint64_t slot_bytes; /* of the host's slots; 0: room for two experts */
    int n_landing;       /* places for copied experts; 0: none are copied */
    enum plan_copies copies;
    uint64_t pin_bytes;                /* of the slots */
    const struct offload_rates *rates; /* NULL: the machine's */
    uint64_t (*clock)(void);           /* NULL: the real one */
    /* NULL: the CPU's own */
    int (*cpu_run)(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows);
};

/* GPU memory for all but experts, and for so many quarters of those. */
static void plan_rooms(const struct machine *machine, struct plan_opts *o, int quarters)
{
    struct plan_in in = {machine, rooms.model, o, &cpu_device_ops, &cuda_device_ops};

    o->vram_bytes = GIB;
    ck_assert_msg(plan_make(&in, &rooms.plan) == 0, "%s", err_text());
    uint64_t expert_bytes = rooms.plan.gpu.expert_bytes;
    o->vram_bytes = rooms.plan.gpu.total_bytes - expert_bytes + expert_bytes * (uint64_t)quarters / 4;
    ck_assert_msg(plan_make(&in, &rooms.plan) == 0, "%s", err_text());
}

static void make_rooms(const struct rooms_args *a)
{
    const int n_ctx = a->n_ctx ? a->n_ctx : 256, n_seq = a->n_seq ? a->n_seq : 1;
    struct plan_opts o = {.n_ctx = (uint32_t)n_ctx, /* all else as copies_nothing() has it */
                          .n_seq = (uint32_t)(a->n_beside ? a->n_beside : 2),
                          .n_out = 16,
                          .n_threads = 1,
                          .chunk_tok = 64,
                          .io = a->io,
                          .no_pin = true,
                          .copies = PLAN_COPIES_NEVER};
    struct machine machine;
    struct kv_shape shape;
    char path[1024];

    memset(&rooms, 0, sizeof rooms);
    rooms.ops = file_plain;
    rooms.ops.read_at = read_at;
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, a->name);
    ck_assert_int_eq(model_open(path, NULL, &rooms.model), 0);
    ck_assert_int_eq(machine_find(&machine), 0);
    if (rooms.model->hp.n_expert)
        o.expert_ram_bytes = a->slot_bytes ? a->slot_bytes : 72 * KIB;
    plan_rooms(&machine, &o, a->quarters);
    rooms.plan.gpu.n_landing = (uint32_t)a->n_landing;
    rooms.plan.gpu.copies = a->copies;
    rooms.plan.gpu.pin_bytes = a->pin_bytes;
    open_devices(&rooms.plan, rooms.model, a->no_graphs, &rooms.gpu, &rooms.cpu);
    own_ops(rooms.cpu, &rooms.cpu_ops);
    rooms.cpu_ops.run = a->cpu_run ? a->cpu_run : rooms.cpu_ops.run;
    struct store_args store = {.model = rooms.model,
                               .plan = &rooms.plan,
                               .device = rooms.gpu,
                               .ops = a->io == PLAN_IO_PREAD ? &rooms.ops : NULL,
                               .read_fault = read_fault};
    ck_assert_msg(store_open(&store, &rooms.store) == 0, "%s", err_text());
    ck_assert_int_eq(model_kv_shape(rooms.model, rooms.plan.kv_type, 0, &shape, NULL), 0);
    struct cache_args cache = {.shape = &shape, .n_seq = n_seq, .n_ctx = n_ctx, .chunk_tok = 64, .device = rooms.gpu};
    ck_assert_int_eq(cache_open(&cache, &rooms.cache), 0);
    struct offload_rates rates;
    cost_gpu_rates(&machine, 1, &rates);
    struct exec_args exec = {.model = rooms.model,
                             .plan = &rooms.plan,
                             .device = rooms.gpu,
                             .host = rooms.cpu,
                             .store = rooms.store,
                             .rates = a->rates ? a->rates : &rates,
                             .clock = a->clock};
    ck_assert_int_eq(exec_open(&exec, &rooms.exec), 0);
    struct sample_opts greedy = {.temperature = 0, .top_p = 1, .repeat_penalty = 1};
    struct session_args session = {
        .exec = rooms.exec, .cache = rooms.cache, .plan = &rooms.plan, .n_vocab = N_VOCAB, .sample = &greedy};
    ck_assert_msg(session_make(&session, &rooms.session) == 0, "%s", err_text());
}

static void leave_rooms(void)
{
    session_free(rooms.session);
    exec_close(rooms.exec);
    cache_close(rooms.cache);
    store_close(rooms.store);
    rooms.cpu->ops->close(rooms.cpu);
    rooms.gpu->ops->close(rooms.gpu);
    model_close(rooms.model);
    ck_assert_int_eq(emu_n_live(), 0);
}

#endif
