/* How long a step would take, by the virtual clock of the emulated runtime, against arithmetic: whole engines walk the tiny models of
 * tests/data/models with a GPU, a host and a way between them of given rates. What overlaps is then what the schedule lets overlap. */
#include "tests/emu/emu.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "cuda/launch.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/plan/cost.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/session.h"
#include "src/run/store.h"
#include "tests/cuda_devices.h"
#include "tests/cuda_times.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_VOCAB = 288, N_TOK = 24, N_CTX = 128, MAX_LAYERS = 8 };

static struct {
    double host_rate;
    bool by_rows; /* products take their time for each row: a prompt's, all of it in one step */
    uint64_t gpu_ns[MAX_LAYERS], host_ns[MAX_LAYERS]; /* of a token's experts, on either side */
    uint64_t piece_ns;                                /* what the host takes to stage a piece of an expert that moves */
    int n_pieces;                                     /* of a token */
} walk;

/* ---- the devices, timed ---- */

static uint64_t kernel_ns(const struct emu_launch *l, void *arg)
{
    const struct cu_mat_args *a = (const struct cu_mat_args *)((const char *)l->closure + l->args_off);
    uint64_t ns = product_ns(l);

    (void)arg;
    return ns && walk.by_rows ? ns / (uint64_t)matrices_of(a) * (uint64_t)a->n_place : ns;
}

static uint64_t experts_ns(const struct op *op, const struct rows *rows, double rate)
{
    const bool is_seen = op->p.moe.experts != NULL;
    const int n_experts = is_seen ? op->p.moe.n_experts : op->p.moe.k; /* a token's, if the GPU looks them up */
    uint64_t ns = 0;
    int n_rows = is_seen ? 0 : rows->n * op->p.moe.k;

    ck_assert(is_seen || walk.by_rows || rows->n == 1);
    for (int e = 0; is_seen && e < n_experts; e++)
        n_rows += op->p.moe.experts[e].n;
    for (int i = 0; i < 3; i++)
        ns += ns_of((double)op->w[i]->stride[1] * (double)op->w[i]->ne[1], rate) *
              (uint64_t)(walk.by_rows ? n_rows : n_experts);
    return ns;
}

static int run_gpu(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    for (int i = 0; i < n_ops; i++)
        if (ops[i].kind == OP_MOE)
            walk.gpu_ns[ops[i].layer] += experts_ns(&ops[i], rows, GPU_RATE);
    return cuda_device_ops.run(dev, ops, n_ops, rows);
}

static int run_host(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    for (int i = 0; i < n_ops; i++) {
        uint64_t ns = experts_ns(&ops[i], rows, walk.host_rate);
        ck_assert_int_eq(ops[i].kind, OP_MOE);
        walk.host_ns[ops[i].layer] += ns;
        emu_host_works(ns);
    }
    return cpu_device_ops.run(dev, ops, n_ops, rows);
}

static int bring_piece(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    emu_host_works(walk.piece_ns);
    walk.n_pieces++;
    return cuda_device_ops.bring(dev, dst, src, bytes);
}

/* ---- an engine by hand ---- */

static struct {
    struct device_ops gpu_ops, cpu_ops;
    struct machine machine;
    struct model *model;
    struct plan plan;
    struct device *gpu, *cpu;
    struct store *store;
    struct cache *cache;
    struct exec *exec;
    struct session *session;
} rooms;

/* All weights are of 4 bytes. What is no product takes no time. */
static void know_prompts(struct machine *m, double host_rate)
{
    const double gpu = 2 * GPU_RATE / sizeof(float), host = 2 * host_rate / sizeof(float);

    m->n_cores = 1;
    m->gpu_bytes_per_s = 1e30;
    m->gpu_prompt = (struct machine_gpu_prompt){.floats = {gpu, gpu}, .attn_unit_s = 1e-30};
    m->kernels[QUANT_F32] = (struct machine_kernel){host_rate, host, host, host};
}

static void plan_for(uint64_t vram_bytes, double host_rate)
{
    struct plan_opts o = {.n_ctx = N_CTX,
                          .n_seq = 1,
                          .n_out = 1,
                          .n_threads = 1,
                          .chunk_tok = walk.by_rows ? N_CTX : 16,
                          .io = PLAN_IO_PREAD,
                          .no_pin = true,
                          .vram_bytes = vram_bytes,
                          .copies = PLAN_COPIES_NEVER};
    struct machine *machine = &rooms.machine;

    ck_assert_int_eq(machine_find(machine), 0);
    machine->gpu_bytes_per_s = GPU_RATE;
    machine->pcie_bytes_per_s = PCIE_RATE;
    machine->mem_bytes_per_s = host_rate;
    machine->n_mem = 0;
    if (walk.by_rows)
        know_prompts(machine, host_rate);
    struct plan_in in = {machine, rooms.model, &o, &cpu_device_ops, &cuda_device_ops};
    ck_assert_msg(plan_make(&in, &rooms.plan) == 0, "%s", err_text());
}

/* So many quarters of the experts on the GPU, the others in the host's memory. */
static void make_rooms(const char *name, int quarters, double host_rate)
{
    struct kv_shape shape;
    char path[1024];

    memset(&rooms, 0, sizeof rooms);
    snprintf(path, sizeof path, "%s/models/%s.gguf", TEST_DATA_DIR, name);
    ck_assert_int_eq(model_open(path, NULL, &rooms.model), 0);
    plan_for(1 * GIB, host_rate);
    uint64_t expert_bytes = rooms.plan.gpu.expert_bytes;
    plan_for(rooms.plan.gpu.total_bytes - expert_bytes + expert_bytes * (uint64_t)quarters / 4, host_rate);
    open_devices(&rooms.plan, rooms.model, false, &rooms.gpu, &rooms.cpu);
    own_ops(rooms.gpu, &rooms.gpu_ops);
    own_ops(rooms.cpu, &rooms.cpu_ops);
    rooms.gpu_ops.run = run_gpu;
    rooms.gpu_ops.bring = bring_piece;
    rooms.cpu_ops.run = run_host;
    struct store_args store = {.model = rooms.model, .plan = &rooms.plan, .device = rooms.gpu};
    ck_assert_msg(store_open(&store, &rooms.store) == 0, "%s", err_text());
    ck_assert_int_eq(model_kv_shape(rooms.model, rooms.plan.kv_type, 0, &shape, NULL), 0);
    struct cache_args cache = {
        .shape = &shape, .n_seq = 1, .n_ctx = N_CTX, .chunk_tok = (int)rooms.plan.chunk_tok, .device = rooms.gpu};
    ck_assert_int_eq(cache_open(&cache, &rooms.cache), 0);
    struct offload_rates rates;
    cost_gpu_rates(&rooms.machine, 1, &rates);
    struct exec_args exec = {.model = rooms.model,
                             .plan = &rooms.plan,
                             .device = rooms.gpu,
                             .host = rooms.cpu,
                             .store = rooms.store,
                             .rates = &rates,
                             .clock = emu_now_ns};
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

/* What a token took, and what it would have taken had nothing overlapped. */
struct times {
    uint64_t ns, sum_ns, up_ns, host_ns, gpu_expert_ns,
        both_ns; /* both: for each layer the shorter of both sides' experts */
    uint64_t stage_ns;
};

static struct times time_tokens(const int32_t *tokens, size_t n)
{
    struct emu_rates r = {.kernel_ns = kernel_ns};
    float logits[N_VOCAB];
    struct times t = {0};

    r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = PCIE_RATE;
    memset(walk.gpu_ns, 0, sizeof walk.gpu_ns);
    memset(walk.host_ns, 0, sizeof walk.host_ns);
    walk.n_pieces = 0;
    emu_clock(&r);
    int rc = n > 1 ? session_append(rooms.session, tokens, n, NULL, NULL)
                   : session_logits(rooms.session, tokens, 1, false, logits);
    ck_assert_msg(rc == 0, "%s", err_text());
    t.ns = emu_now_ns();
    t.up_ns = emu_busy_ns(EMU_UP);
    for (int i = 0; i < rooms.model->hp.n_layer; i++) {
        t.host_ns += walk.host_ns[i];
        t.gpu_expert_ns += walk.gpu_ns[i];
        t.both_ns += walk.gpu_ns[i] < walk.host_ns[i] ? walk.gpu_ns[i] : walk.host_ns[i];
    }
    t.stage_ns = (uint64_t)walk.n_pieces * walk.piece_ns;
    t.sum_ns = emu_busy_ns(EMU_COMPUTE) + t.up_ns + emu_busy_ns(EMU_DOWN) + t.host_ns + t.stage_ns;
    emu_clock(NULL);
    return t;
}

static struct times time_token(int32_t token)
{
    return time_tokens(&token, 1);
}

/* ---- what overlaps ---- */

static const char *const models[] = {"qwen3moe", "mixtral", "olmoe"};
/* The host beside the GPU: much slower, so that the GPU's experts are hidden; as fast; faster, so that its own are. */
static const double host_rates[] = {GPU_RATE / 4, GPU_RATE, GPU_RATE * 4};
enum { N_MODELS = sizeof models / sizeof *models, N_RATES = sizeof host_rates / sizeof *host_rates };

/* In each layer the longer of both sides' experts counts and the shorter is hidden, all of it; nothing else is but for what goes
 * up. */
START_TEST(sides_of_a_layer_wait_for_each_other)
{
    uint64_t both_ns = 0;

    walk.host_rate = host_rates[_i % N_RATES];
    make_rooms(models[_i / N_RATES], 2, walk.host_rate);
    for (int n = 0; n < N_TOK; n++) {
        struct times t = time_token(10 + 11 * n % 200);
        uint64_t hidden_ns = t.sum_ns - t.ns;
        ck_assert_uint_gt(t.host_ns + t.gpu_expert_ns, 0);
        ck_assert_msg(hidden_ns >= t.both_ns && hidden_ns <= t.both_ns + t.up_ns,
                      "token %d: %lu ns of %lu were hidden; %lu could be, and %lu of what goes up", n,
                      (unsigned long)hidden_ns, (unsigned long)t.sum_ns, (unsigned long)t.both_ns,
                      (unsigned long)t.up_ns);
        both_ns += t.both_ns;
    }
    ck_assert_uint_gt(both_ns, 0);
    leave_rooms();
}
END_TEST

/* What the plan counts and the kernels here do not: norms, biases, the row of the embedding. */
static double uncounted_s(const struct model *m)
{
    double bytes = (double)m->weights[m->w[ROLE_TOKEN_EMBD]].t.stride[1];

    for (int i = 0; i < m->n_weights; i++)
        bytes += m->weights[i].t.ne[1] == 1 ? (double)tensor_bytes(&m->weights[i].t) : 0;
    return bytes / GPU_RATE;
}

/* All experts on one side: then the plan's prediction is no average, and the walk takes that long. */
START_TEST(plan_predicts_another_speed)
{
    int quarters = _i % 2 ? 4 : 0;

    walk.host_rate = GPU_RATE / 4;
    make_rooms(models[_i / 2], quarters, walk.host_rate);
    ck_assert(rooms.plan.decode_tok_per_s > 0);
    for (int n = 0; n < 4; n++) {
        struct times t = time_token(10 + n);
        double walked_s = (double)t.ns * 1e-9, told_s = 1 / rooms.plan.decode_tok_per_s;
        ck_assert_msg(fabs(walked_s - told_s) <= uncounted_s(rooms.model) + (double)t.up_ns * 1e-9,
                      "%g s predicted, %g s walked", told_s, walked_s);
        ck_assert(quarters ? t.host_ns == 0 : t.gpu_expert_ns == 0);
    }
    leave_rooms();
}
END_TEST

/* A prompt of as many tokens as the context has, 32 rows or more for each expert. Where both sides have experts, who is the slower one in a
 * layer is the router's affair, so there what was walked takes the place of the average. */
START_TEST(plan_predicts_other_prompts)
{
    const int quarters = _i % 3 * 2;
    int32_t tokens[N_CTX];

    walk.host_rate = GPU_RATE / 4;
    walk.by_rows = true;
    make_rooms(models[_i / 3], quarters, walk.host_rate);
    const struct hparams *hp = &rooms.model->hp;
    const struct plan_gpu *gpu = &rooms.plan.gpu;
    for (int i = 0; i < N_CTX; i++)
        tokens[i] = 10 + 11 * i % 200;
    ck_assert_int_ge(N_CTX * hp->n_expert_used, 32 * hp->n_expert);
    ck_assert(rooms.plan.prefill_tok_per_s > 0);
    struct times t = time_tokens(tokens, N_CTX);
    /* one row of logits, which counts as nothing where memory is infinitely fast */
    double head_bytes = (double)tensor_bytes(&rooms.model->weights[rooms.model->w[ROLE_OUTPUT]].t);
    double told_s = N_CTX / rooms.plan.prefill_tok_per_s + head_bytes / GPU_RATE, walked_s = (double)t.ns * 1e-9;
    double row_s = (double)model_expert_bytes(rooms.model, 0) * N_CTX * hp->n_expert_used / GPU_RATE;
    double share = (double)gpu->n_experts / gpu->n_all_experts, slower_s = row_s * fmax(share, 4 * (1 - share));
    told_s += (double)(t.host_ns + t.gpu_expert_ns - t.both_ns) * 1e-9 - hp->n_layer * slower_s;
    ck_assert(quarters == 2 || fabs((double)(t.host_ns + t.gpu_expert_ns) * 1e-9 - hp->n_layer * slower_s) < 1e-6);
    double logits_s = N_VOCAB * sizeof(float) / PCIE_RATE; /* they come down, not the best of them for each row */
    ck_assert_msg(fabs(walked_s - told_s) <= (double)t.up_ns * 1e-9 + logits_s,
                  "%.9g s predicted, %.9g s walked, %g of it up", told_s, walked_s, (double)t.up_ns * 1e-9);
    leave_rooms();
}
END_TEST

/* ---- moves ---- */

/* The same word, until its experts have moved to the GPU. Staging them takes no time of a step: all of it is hidden where the router is
 * waited for that long. Where a piece takes longer than any wait, a layer begins one at most. */
START_TEST(moves_are_not_hidden)
{
    bool is_short = _i == 0;
    struct store_stats stats;
    int n_pieces = 0;

    walk.host_rate = GPU_RATE / 4;
    walk.piece_ns = is_short ? 100000 : 1000000000;
    make_rooms("qwen3moe", 1, walk.host_rate);
    for (int n = 0; n < 60; n++) {
        ck_assert_int_eq(session_truncate(rooms.session, 0), 0);
        struct times t = time_token(10);
        uint64_t hidden_ns = t.sum_ns - t.ns, all_ns = t.both_ns + (is_short ? t.stage_ns : 0);
        n_pieces += walk.n_pieces;
        ck_assert_msg(hidden_ns >= all_ns && (!is_short || hidden_ns <= all_ns + t.up_ns),
                      "token %d: %lu ns were hidden; %lu of experts could be, %lu of moves", n,
                      (unsigned long)hidden_ns, (unsigned long)t.both_ns, (unsigned long)t.stage_ns);
        ck_assert(is_short || walk.n_pieces <= rooms.model->hp.n_layer);
    }
    store_stats(rooms.store, &stats);
    ck_assert_uint_ge(stats.n_moves, 2);
    ck_assert_int_ge(n_pieces, 3 * (int)stats.n_moves);
    walk.piece_ns = 0;
    leave_rooms();
}
END_TEST

/* ---- copies in the background ---- */

/* A copy in the background of a step costs what it takes longer than the step; one in its order is paid for. Ratios of copy and
 * step. */
static const double ratios[] = {0.25, 1, 2};

START_TEST(background_copy_is_not_hidden)
{
    void *room = NULL, *from = NULL;

    walk.host_rate = GPU_RATE;
    make_rooms("qwen3moe", 4, walk.host_rate);
    struct times alone = time_token(5);
    uint64_t copy_bytes = (uint64_t)(ratios[_i] * (double)alone.ns * 1e-9 * PCIE_RATE),
             copy_ns = ns_of((double)copy_bytes, PCIE_RATE);
    ck_assert_int_eq(rooms.gpu->ops->alloc(rooms.gpu, copy_bytes, &room), 0);
    ck_assert_int_eq(rooms.gpu->ops->alloc_host(rooms.gpu, copy_bytes, &from), 0);
    for (int in_order = 0; in_order < 2; in_order++) {
        struct emu_rates r = {.kernel_ns = kernel_ns};
        float logits[N_VOCAB];
        int32_t token = 5;
        bool is_there;
        r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = PCIE_RATE;
        ck_assert_int_eq(session_truncate(rooms.session, 0), 0);
        emu_clock(&r);
        ck_assert_int_eq((in_order ? rooms.gpu->ops->upload : rooms.gpu->ops->bring)(rooms.gpu, room, from, copy_bytes),
                         0);
        ck_assert_int_eq(session_logits(rooms.session, &token, 1, false, logits), 0);
        if (!in_order)
            ck_assert_int_eq(rooms.gpu->ops->brought(rooms.gpu, true, &is_there), 0);
        uint64_t most_ns = in_order ? copy_ns + alone.ns : copy_ns > alone.ns ? copy_ns : alone.ns;
        ck_assert_msg(emu_now_ns() >= most_ns - alone.up_ns && emu_now_ns() <= most_ns + alone.up_ns,
                      "%lu ns together, %lu alone, the copy %lu", (unsigned long)emu_now_ns(), (unsigned long)alone.ns,
                      (unsigned long)copy_ns);
        emu_clock(NULL);
    }
    rooms.gpu->ops->release_host(rooms.gpu, from);
    rooms.gpu->ops->release(rooms.gpu, room);
    leave_rooms();
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("cuda_clock");
    TCase *tc = tcase_create("cuda_clock");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, sides_of_a_layer_wait_for_each_other, 0, N_MODELS * N_RATES);
    tcase_add_loop_test(tc, plan_predicts_another_speed, 0, N_MODELS * 2);
    tcase_add_loop_test(tc, plan_predicts_other_prompts, 0, N_MODELS * 3);
    tcase_add_loop_test(tc, moves_are_not_hidden, 0, 2);
    tcase_add_loop_test(tc, background_copy_is_not_hidden, 0, sizeof ratios / sizeof *ratios);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
