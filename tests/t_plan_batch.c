/* The number of sequences of a batch, on machines that do not exist. The model is the head of a mixture of experts
 * (tests/gen/plan_heads.py); what a point must say is worked out here from the model's own numbers. */
#include "src/plan/plan_batch.h"

#include "tests/plan_machine.h"
#include "tests/run_suite.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/plan/cost.h"

#include <check.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct model *model, *dense;

static void setup(void)
{
    model = open_head("moe", (uint64_t)1 << 40);
    dense = open_head("dense", (uint64_t)1 << 40);
}

static void teardown(void)
{
    model_close(dense);
    model_close(model);
}

static int make(const struct machine *m, uint64_t ram_bytes, uint32_t n_seq, struct plan_batch *b, struct plan *p)
{
    struct plan_opts o = {.ram_bytes = ram_bytes, .n_ctx = 1024};
    struct plan_in in = {.machine = m, .model = model, .opts = &o, .cpu = &device};
    return plan_batch_make(&in, &(struct plan_batch_opts){.n_seq = n_seq, .seq_tok = 512}, b, p);
}

static uint64_t all_experts(void)
{
    uint64_t sum = 0;
    for (int layer = 0; layer < model->hp.n_layer; layer++)
        sum += (uint64_t)model->hp.n_expert * model_expert_bytes(model, layer);
    return sum;
}

START_TEST(point_says_what_is_not_so)
{
    const struct machine m = machine_of(512 * GIB);
    struct plan_batch b;
    struct plan p;
    ck_assert_msg(make(&m, 0, 0, &b, &p) == 0, "%s", err_text());
    ck_assert(b.has_rates);
    for (int i = 0; i < b.n_points; i++) {
        const struct plan_batch_point *at = &b.points[i];
        double share = (double)model->hp.n_expert_used / model->hp.n_expert;
        double want = (double)all_experts() * (1 - pow(1 - share, at->n_seq));
        ck_assert(at->fits);
        ck_assert_msg(fabs((double)at->expert_bytes - want) <= 1 + want * 1e-9,
                      "%u sequences want %" PRIu64 ", not %.0f", at->n_seq, at->expert_bytes, want);
        ck_assert_uint_eq(at->missed_bytes, 0); /* all are held */
        double step_s = fmax(fmax(at->memory_s, at->disk_s), at->compute_s);
        ck_assert(fabs(at->tok_per_s * step_s - at->n_seq) < 1e-6 * at->n_seq);
        ck_assert(i == 0 || at->memory_s > b.points[i - 1].memory_s);
        ck_assert(i == 0 || at->compute_s > b.points[i - 1].compute_s);
    }
    ck_assert_uint_eq(p.n_seq, b.points[b.chosen].n_seq);
    ck_assert_uint_eq(p.n_out, p.n_seq);
    ck_assert_uint_eq(p.chunk_tok, 512 + p.n_seq);
    ck_assert_uint_eq(p.kv_tok, 512 * p.n_seq);
    /* every number before the chosen one is slower; none behind it is 5 % faster */
    for (int i = 0; i < b.n_points; i++)
        ck_assert(i < b.chosen ? b.points[i].tok_per_s < b.points[b.chosen].tok_per_s
                               : b.points[i].tok_per_s <= 1.05 * b.points[b.chosen].tok_per_s);
}
END_TEST

/* Kernels by which a weight takes WEIGHT_S and ROW_S for each row, attention KEY_S for each element of a query and a key, and drawing
 * LOGIT_S for each logit. */
#define WEIGHT_S 4e-11
#define ROW_S 1e-11
#define KEY_S 1e-10
#define LOGIT_S 1e-8

static struct machine measured_machine(void)
{
    struct machine m = machine_of(512 * GIB);

    m.mem_bytes_per_s = 1e15;
    for (int type = 0; type < QUANT_ID_END; type++) {
        if (!quant_info(type))
            continue;
        double weight_bytes = (double)quant_row_bytes((enum quant_type)type, 256) / 256;
        m.kernels[type] =
            (struct machine_kernel){.token_bytes_per_s = weight_bytes / (WEIGHT_S + ROW_S),
                                    .some_ops_per_s = 2 * MACHINE_SOME_ROWS / (WEIGHT_S + MACHINE_SOME_ROWS * ROW_S),
                                    .few_ops_per_s = 2 * MACHINE_FEW_ROWS / (WEIGHT_S + MACHINE_FEW_ROWS * ROW_S),
                                    .many_ops_per_s = 2 * MACHINE_MANY_ROWS / (WEIGHT_S + MACHINE_MANY_ROWS * ROW_S)};
    }
    m.ops[OP_ADD].op_s = 1e-15; /* an op without a rate is taken for one of these */
    m.ops[OP_ATTENTION].unit_s = KEY_S;
    m.draw_s = LOGIT_S;
    return m;
}

/* Of the dense model, that a token is multiplied with: it has no head of its own. */
static double weights_of_token(void)
{
    double n = 0;

    ck_assert_int_eq(dense->w[ROLE_OUTPUT], dense->w[ROLE_TOKEN_EMBD]);
    for (int i = 0; i < dense->n_weights; i++) {
        const struct tensor *t = &dense->weights[i].t;
        n += t->ne[1] == 1 ? 0 : (double)(t->ne[0] * t->ne[1]); /* norms and biases are added */
    }
    return n;
}

/* Every sequence multiplies with all weights, the head too, and looks back at its own positions only; the weights are read once. */
START_TEST(measured_kernels_are_not_asked)
{
    const struct machine m = measured_machine();
    struct plan_opts o = {.n_ctx = 1024, .n_threads = (uint32_t)m.n_cores};
    struct plan_in in = {.machine = &m, .model = dense, .opts = &o, .cpu = &device};
    struct plan_batch b;
    struct plan p;
    double weights = weights_of_token(), keys = 0;

    for (int i = 0; i < dense->hp.n_layer; i++)
        keys += (512 / 2 + 1) * dense->layers[i].n_head * (dense->hp.head_dim_k + dense->hp.head_dim_v);
    ck_assert_int_eq(plan_batch_make(&in, &(struct plan_batch_opts){.seq_tok = 512}, &b, &p), 0);
    ck_assert(b.has_rates);
    for (int i = 0; i < b.n_points; i++) {
        double n = b.points[i].n_seq,
               step_s = weights * (WEIGHT_S + n * ROW_S) + n * keys * KEY_S + n * dense->hp.n_vocab * LOGIT_S;
        ck_assert_double_eq_tol(b.points[i].tok_per_s * step_s / n, 1, 1e-6);
        ck_assert_double_eq_tol(b.points[i].compute_s / step_s, 1, 1e-6);
    }
}
END_TEST

/* Without kernels' rates arithmetic is a guess, but of all that is multiplied. */
START_TEST(head_is_not_multiplied)
{
    struct machine m = machine_of(512 * GIB);
    struct plan_opts o = {.n_ctx = 1024, .n_threads = 1};
    struct plan_in in = {.machine = &m, .model = dense, .opts = &o, .cpu = &device};
    struct plan_batch b;
    struct plan p;
    ck_assert_int_eq(plan_batch_make(&in, &(struct plan_batch_opts){.seq_tok = 512}, &b, &p), 0);
    double one_s = b.points[1].compute_s - b.points[0].compute_s; /* 100e9 a second are counted on, with AVX2 */
    ck_assert_double_eq_tol(one_s * 100e9 / (2 * weights_of_token()), 1, 1e-3); /* norms are in there */
}
END_TEST

/* Too little memory for the experts: more pages leave fewer slots, and the disk has its share. */
START_TEST(full_step_is_expected_otherwise_than_predicted)
{
    const struct plan_batch_point at = {
        .n_seq = 8, .missed_bytes = 800, .memory_s = 0.5, .disk_s = 4, .compute_s = 2, .tok_per_s = 2};
    struct plan p = {.decode_tok_per_s = 7, .decode_dense_s = 7, .decode_expert_s = 7, .missed_bytes_per_tok = 7};
    plan_batch_expect(&at, &p);
    ck_assert_double_eq(p.decode_tok_per_s, 2);
    ck_assert_double_eq(p.decode_dense_s + p.decode_expert_s,
                        0.25); /* of a token; the half second that is left is waited */
    ck_assert_uint_eq(p.missed_bytes_per_tok, 100);
}
END_TEST

/* As of a saved plan, or where a rate is not known. */
START_TEST(nothing_predicted_divides_by_zero)
{
    struct plan p = {.decode_tok_per_s = 7, .decode_dense_s = 7};
    plan_batch_expect(&(struct plan_batch_point){0}, &p);
    ck_assert_double_eq(p.decode_tok_per_s, 0);
}
END_TEST

START_TEST(pages_take_nothing_from_slots)
{
    uint64_t ram = all_experts() / 2 + 300 * MIB;
    const struct machine m = machine_of(ram);
    struct plan_batch b;
    struct plan p;
    ck_assert_msg(make(&m, ram, 0, &b, &p) == 0, "%s", err_text());
    for (int i = 0; i < b.n_points && b.points[i].fits; i++) {
        const struct plan_batch_point *at = &b.points[i];
        ck_assert_uint_gt(at->missed_bytes, 0);
        ck_assert(fabs(at->disk_s * 2e9 - (double)at->missed_bytes) <= 1);
        ck_assert_uint_le(at->kv_bytes + at->slot_bytes, ram);
        ck_assert(i == 0 || at->slot_bytes <= b.points[i - 1].slot_bytes);
    }
    ck_assert_uint_lt(b.points[8].slot_bytes, b.points[0].slot_bytes);
    ck_assert_uint_gt(p.slot_ram_bytes, 0);
    ck_assert_uint_gt(p.n_seq, 1);
}
END_TEST

/* Where pages crowd out the least slots there are, mapping the file would promise reads for nothing. */
START_TEST(mapping_passes_for_memory)
{
    struct machine m = machine_of(512 * GIB);
    struct plan_batch b;
    struct plan p;
    ck_assert_int_eq(make(&m, 0, 0, &b, &p), 0);
    uint64_t ram = b.points[b.n_points - 1].kv_bytes + 200 * MIB; /* tables and scratch */
    ck_assert_msg(make(&m, ram, 0, &b, &p) == 0, "%s", err_text());
    ck_assert(!b.points[b.n_points - 1].fits);
    ck_assert(b.points[0].fits);
    ck_assert_int_ne(p.io, PLAN_IO_MMAP);
    ck_assert_uint_gt(p.slot_ram_bytes, 0);
    ck_assert_msg(make(&m, ram, 256, &b, &p) == 0, "%s", err_text()); /* asked for: as it can be had */
    ck_assert_int_eq(p.io, PLAN_IO_MMAP);
}
END_TEST

START_TEST(more_sequences_than_requests)
{
    static const uint32_t want[] = {1, 2, 4, 5};
    struct machine m = machine_of(512 * GIB);
    struct plan_opts o = {.n_ctx = 1024};
    struct plan_in in = {.machine = &m, .model = model, .opts = &o, .cpu = &device};
    struct plan_batch b;
    struct plan p;
    ck_assert_int_eq(plan_batch_make(&in, &(struct plan_batch_opts){.most_seq = 5, .seq_tok = 512}, &b, &p), 0);
    ck_assert_int_eq(b.n_points, 4);
    for (int i = 0; i < b.n_points; i++)
        ck_assert_uint_eq(b.points[i].n_seq, want[i]);
    ck_assert_uint_le(p.n_seq, 5);
}
END_TEST

START_TEST(unknown_rates_are_guessed)
{
    struct machine m = machine_of(512 * GIB);
    struct plan_batch b;
    struct plan p;
    char *text = NULL;
    m.mem_bytes_per_s = 0;
    ck_assert_int_eq(make(&m, 0, 0, &b, &p), 0);
    ck_assert(!b.has_rates);
    ck_assert_uint_eq(p.n_seq, 32);
    ck_assert_int_eq(plan_batch_explain(&b, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, ">        32"));
    ck_assert_ptr_nonnull(strstr(text, "ferry probe"));
    mem_free(text);
    mem_fail_nth(1);
    ck_assert_int_eq(plan_batch_explain(&b, &text), ERR_NOMEM);
    mem_fail_nth(0);
    ck_assert_int_eq(make(&m, 0, 7, &b, &p), 0); /* asked for */
    ck_assert_uint_eq(p.n_seq, 7);
    ck_assert_int_eq(b.n_points, 1);
}
END_TEST

START_TEST(too_little_memory_is_not_told)
{
    struct machine m = machine_of(64 * GIB);
    struct plan_batch b;
    struct plan p;
    struct plan_opts o = {.ram_bytes = 30 * MIB, .n_ctx = 1024, .io = PLAN_IO_PREAD};
    struct plan_in in = {.machine = &m, .model = model, .opts = &o, .cpu = &device};
    ck_assert_int_eq(plan_batch_make(&in, &(struct plan_batch_opts){.seq_tok = 512}, &b, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "does not fit"));
}
END_TEST

static void own_bytes(const struct device_step *most, struct device_own *out)
{
    (void)most;
    *out = (struct device_own){.dev_bytes = 1000, .host_bytes = 1000, .n_allocs = 1};
}

static const struct device_ops gpu = {
    .name = "gpu", .can = can, .scratch_bytes = scratch_bytes, .own_bytes = own_bytes};
static struct machine gpu_machine;
static struct plan_opts gpu_opts;
static struct plan_in gpu_in;

/* Sequences of up to 16384 positions of a model on a GPU with so much memory beside dense weights, scratch and tables as n of them
 * take. Rates of 0 are not known. */
static void make_gpu(const struct model *m, double n, double gpu_rate, double mem_rate, struct plan_batch *b,
                     struct plan *p)
{
    struct plan_batch_opts opts = {.n_seq = 1, .seq_tok = 16384};

    gpu_machine = machine_of(512 * GIB);
    gpu_machine.gpu_bytes_per_s = gpu_rate;
    gpu_machine.pcie_bytes_per_s = gpu_rate / 20;
    gpu_machine.mem_bytes_per_s = mem_rate > 0 ? mem_rate : gpu_machine.mem_bytes_per_s;
    gpu_opts = (struct plan_opts){.n_ctx = 16384, .vram_bytes = 100 * GIB};
    gpu_in = (struct plan_in){.machine = &gpu_machine, .model = m, .opts = &gpu_opts, .cpu = &device, .gpu = &gpu};
    ck_assert_msg(plan_batch_make(&gpu_in, &opts, b, p) == 0, "%s", err_text());
    gpu_opts.vram_bytes =
        p->gpu.total_bytes - p->gpu.expert_bytes + (uint64_t)((n - 1) * (double)p->gpu.kv_bytes) + 16 * MIB;
    opts.n_seq = 0;
    ck_assert_msg(plan_batch_make(&gpu_in, &opts, b, p) == 0, "%s", err_text());
}

/* Sequences that would bring pages beyond the GPU are not begun unasked; a single one may have them. */
START_TEST(more_sequences_drive_the_cache_from_the_gpu)
{
    struct plan_batch b;
    struct plan p;

    make_gpu(model, 2.5, 0, 0, &b, &p);
    ck_assert(b.points[0].fits && b.points[1].fits && !b.points[2].fits); /* 1, 2, 4 */
    ck_assert(!plan_has_host_kv(&p));
    make_gpu(model, 0.5, 0, 0, &b, &p);
    ck_assert(b.points[0].fits && !b.points[1].fits);
    ck_assert_int_eq(b.chosen, 0);
    ck_assert_uint_eq(p.n_seq, 1);
    ck_assert(plan_has_host_kv(&p));
    ck_assert_uint_eq(b.points[0].kv_bytes, p.kv_bytes + p.gpu.kv_bytes);
}
END_TEST

static bool explains(const struct plan_batch *b, const char *words)
{
    char *text;

    ck_assert_int_eq(plan_batch_explain(b, &text), 0);
    bool has = strstr(text, words) != NULL;
    if (!has)
        fputs(text, stderr);
    mem_free(text);
    return has;
}

/* The point at which more sequences than the GPU has pages for were first weighed. */
static const struct plan_batch_point *weighed_in(const struct plan_batch *b)
{
    for (int i = 0; i < b->n_points; i++)
        if (b->points[i].n_weighed)
            return &b->points[i];
    ck_abort_msg("all sequences fit the GPU");
    return NULL;
}

/* Beside a slow CPU a batch keeps to those that the GPU has pages for, of which no candidate need know; beside a fast one others join. */
START_TEST(choice_does_not_follow_the_cpu)
{
    struct plan_batch slow, fast;
    struct plan p;

    make_gpu(dense, 11.5, 400e9, 1e9, &slow, &p);
    ck_assert(slow.has_rates);
    const struct plan_batch_point *at = weighed_in(&slow);
    ck_assert_uint_eq(at->n_weighed, 16); /* 8 fit */
    ck_assert_int_eq(at->choice.runs, APEX_GPU_ONLY);
    ck_assert_uint_eq(at->n_seq, (uint32_t)at->profile.n_gpu);
    ck_assert(at->n_seq == 10 || at->n_seq == 11); /* attention on two sides takes room, too */
    ck_assert_ptr_eq(at, &slow.points[slow.chosen]);
    ck_assert(!plan_has_host_kv(&p));
    ck_assert_uint_eq(p.n_seq, at->n_seq);
    ck_assert(explains(&slow, ": GPU only"));
    for (int i = slow.chosen + 1; i < slow.n_points; i++)
        ck_assert(!slow.points[i].fits);
    make_gpu(dense, 11.5, 400e9, 100e9, &fast, &p);
    at = weighed_in(&fast);
    ck_assert_uint_eq(at->n_weighed, 16);
    ck_assert_int_eq(at->choice.runs, APEX_OVERLAP);
    ck_assert_uint_eq(at->n_seq, (uint32_t)(at->profile.n_gpu + at->choice.time[APEX_OVERLAP].n_host));
    ck_assert(plan_has_host_kv(&p));
    ck_assert_uint_gt(p.n_seq, slow.points[slow.chosen].n_seq);
    ck_assert(fast.points[fast.chosen].tok_per_s > slow.points[slow.chosen].tok_per_s);
    ck_assert(explains(&fast, ": overlap"));
}
END_TEST

/* The profile of a step in figures of the model: dense weights and wanted experts once, keys and values where they lie. */
START_TEST(profile_of_a_step_is_another)
{
    struct plan_batch b;
    struct apex_profile a;
    struct plan p;

    make_gpu(dense, 11.5, 400e9, 100e9, &b, &p);
    ck_assert(plan_has_host_kv(&p));
    const double pos = 4096, n = p.n_seq, share = p.gpu.kv_tok / (n * 16384);
    double read_bytes = 0; /* of all sequences, F16 */
    for (int i = 0; i < dense->hp.n_layer; i++)
        read_bytes += n * pos * dense->layers[i].n_head_kv * (dense->hp.head_dim_k + dense->hp.head_dim_v) * 2;
    ck_assert(cost_gpu_apex(&gpu_in, &p, pos, &a));
    ck_assert_int_eq(a.n_gpu + a.n_host, (int)p.n_seq);
    ck_assert_int_eq(a.n_gpu, (int)(p.gpu.kv_tok / 16384));
    ck_assert_double_eq_tol(a.attend_s, read_bytes * share / 400e9, 1e-9);
    ck_assert_double_eq_tol(a.n_host * a.host_seq_s, read_bytes * (1 - share) / 100e9, 1e-9);
    double row_s = ((double)p.gpu.down_bytes_per_tok + (double)p.gpu.up_bytes_per_tok) / 20e9;
    ck_assert_double_eq_tol(a.both_linear_s, p.decode_dense_s + (n - 1) * row_s, 1e-9);
    double q = 0, kv = 0, heads = 0;
    for (int i = 0; i < dense->hp.n_layer; i++) {
        q += dense->layers[i].n_head * dense->hp.head_dim_k;
        kv += dense->layers[i].n_head_kv * (dense->hp.head_dim_k + dense->hp.head_dim_v);
        heads += dense->layers[i].n_head;
    }
    ck_assert_double_eq_tol(a.down_s, n * (q + kv) * 4 / 20e9, 1e-12);
    ck_assert_double_eq_tol(a.up_s, a.n_host * 8 * heads * (dense->hp.head_dim_v + 2) * 4 / 20e9, 1e-12);
    /* A CPU whose arithmetic is slower than its memory */
    double units = n * pos * heads * (dense->hp.head_dim_k + dense->hp.head_dim_v) * (1 - share);
    gpu_machine.ops[OP_ATTENTION].unit_s = 1e-9;
    ck_assert(cost_gpu_apex(&gpu_in, &p, pos, &a));
    ck_assert_double_eq_tol(a.n_host * a.host_seq_s, units * 1e-9, 1e-9);
    gpu_machine.mem_bytes_per_s = 0;
    gpu_machine.n_mem = 0;
    ck_assert(!cost_gpu_apex(&gpu_in, &p, pos, &a));
}
END_TEST

/* Experts are read as many as all rows want. */
START_TEST(rows_want_other_experts)
{
    double share = (double)model->hp.n_expert_used / model->hp.n_expert;
    struct plan_batch b;
    struct apex_profile a;
    struct plan p;

    make_gpu(model, 2.5, 400e9, 20e9, &b, &p);
    ck_assert_int_eq(plan_batch_make(&gpu_in, &(struct plan_batch_opts){.n_seq = 2, .seq_tok = 16384}, &b, &p), 0);
    ck_assert(plan_is_split(&p));
    ck_assert(cost_gpu_apex(&gpu_in, &p, 100, &a));
    double row_s = ((double)p.gpu.down_bytes_per_tok + (double)p.gpu.up_bytes_per_tok) / 20e9;
    double experts_s = fmax(p.decode_expert_s, p.decode_disk_s) * (1 - pow(1 - share, 2)) / share;
    ck_assert_double_eq_tol(a.both_linear_s, p.decode_dense_s + row_s + experts_s, 1e-9);
    ck_assert_int_eq(a.n_host, 0);
    ck_assert_double_eq(a.gpu_linear_s, a.both_linear_s);
}
END_TEST

/* A CPU nearly as fast as the GPU: pipelining is best, and the plan says so. */
START_TEST(pipelining_is_passed_over)
{
    struct plan_batch b;
    struct plan p;
    char *text;

    make_gpu(dense, 2.5, 400e9, 300e9, &b, &p);
    const struct plan_batch_point *at = &b.points[b.chosen];
    ck_assert(explains(&b, ": pipelining\n"));
    ck_assert_int_eq(at->choice.runs, APEX_PIPELINING);
    ck_assert_double_eq_tol(at->tok_per_s, at->choice.time[APEX_PIPELINING].tok_per_s,
                            0.05 * at->tok_per_s); /* that counts anew */
    ck_assert(p.gpu.halves);
    ck_assert(!p.gpu.kv_waits);
    /* As many as were asked for are run, and the plan says what is thought of it. */
    ck_assert_int_eq(plan_batch_make(&gpu_in, &(struct plan_batch_opts){.n_seq = 8, .seq_tok = 16384}, &b, &p), 0);
    ck_assert_uint_eq(p.n_seq, 8);
    ck_assert(plan_has_host_kv(&p));
    ck_assert_int_eq(plan_explain(&p, &gpu_in, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "of 8 sequences, half way: 2 on the GPU alone"));
    ck_assert_ptr_nonnull(strstr(text, ": pipelining;"));
    mem_free(text);
}
END_TEST

/* n sequences of up to seq_tok positions of the mixture, whose cache is larger than a GPU that has room for all but it and `gib` beside. */
static void ask_mixture(uint32_t n, uint32_t seq_tok, double gib, struct plan_batch *b, struct plan *p)
{
    const struct plan_batch_opts opts = {.n_seq = n, .seq_tok = seq_tok};

    make_gpu(model, 1, 400e9, 50e9, b, p);
    gpu_opts.n_ctx = seq_tok;
    gpu_opts.vram_bytes = 200 * GIB;
    ck_assert_msg(plan_batch_make(&gpu_in, &opts, b, p) == 0, "%s", err_text());
    ck_assert(!plan_is_split(p) && !plan_has_host_kv(p) && !plan_has_halves(p));
    gpu_opts.vram_bytes = p->gpu.total_bytes - p->gpu.kv_bytes + (uint64_t)(gib * (double)GIB);
    ck_assert_msg(plan_batch_make(&gpu_in, &opts, b, p) == 0, "%s", err_text());
    ck_assert(plan_has_host_kv(p));
    ck_assert_uint_le(p->gpu.total_bytes, p->gpu.budget_bytes);
}

static bool plan_says(const struct plan *p, const char *words)
{
    char *text;

    ck_assert_int_eq(plan_explain(p, &gpu_in, &text), 0);
    bool has = strstr(text, words) != NULL;
    if (!has)
        fputs(text, stderr);
    mem_free(text);
    return has;
}

/* A cache that does not fit the GPU even without experts leaves them no room; but many rows want nearly all of those, in each step, and of
 * their pages only what they have filled. Then all experts lie there, and steps may be run in halves. Of few rows with long contexts it is
 * the other way round. */
START_TEST(experts_give_way_to_empty_pages)
{
    struct plan_batch b;
    struct plan p, again;
    char *text;

    ask_mixture(64, 8192, 1.75, &b, &p);
    ck_assert_uint_eq(p.gpu.n_experts, p.gpu.n_all_experts);
    ck_assert(!plan_is_split(&p) && plan_has_halves(&p) && !p.look_ahead);
    ck_assert_uint_eq(p.gpu.n_landing, 0);
    ck_assert_uint_eq(p.slot_ram_bytes, 0);
    double wanted_bytes =
        (double)all_experts() * (1 - pow(1 - (double)model->hp.n_expert_used / model->hp.n_expert, 64));
    ck_assert(b.points[0].tok_per_s > 1.03 * 64 / (wanted_bytes / 50e9)); /* if the host computed them */
    ck_assert(plan_says(&p, "beside the dense weights and the experts"));
    ck_assert(plan_says(&p, "of 64 sequences, half way: 36 on the GPU alone") && plan_says(&p, ", pipelining with "));
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    ck_assert_msg(plan_from_json(text, &gpu_in, &again) == 0, "%s", err_text());
    ck_assert(again.gpu.total_bytes == p.gpu.total_bytes && plan_has_halves(&again));
    mem_free(text);

    ask_mixture(2, 131072, 0.25, &b, &p);
    ck_assert(plan_is_split(&p) && !plan_has_halves(&p));
    ck_assert(plan_says(&p, ", no pipelining where the CPU has experts: "));
}
END_TEST

/* As many as were asked for run, whether it pays or not: where GPU only is better, those wait at first whose pages are the host's. A saved
 * plan says so, too. */
START_TEST(sequences_begin_the_other_way)
{
    for (int is_slow = 0; is_slow < 2; is_slow++) {
        struct plan_batch b;
        struct plan p, again;
        char *text;
        make_gpu(dense, 2.5, 400e9, is_slow ? 1e9 : 300e9, &b, &p);
        ck_assert_int_eq(plan_batch_make(&gpu_in, &(struct plan_batch_opts){.n_seq = 8, .seq_tok = 16384}, &b, &p), 0);
        ck_assert(plan_has_host_kv(&p));
        ck_assert_int_eq(p.gpu.kv_waits, is_slow);
        ck_assert_int_eq(p.gpu.halves, !is_slow);
        ck_assert_int_eq(plan_explain(&p, &gpu_in, &text), 0);
        ck_assert_ptr_nonnull(strstr(text, "; measured steps may say otherwise while a batch runs"));
        ck_assert_int_eq(strstr(text, ": GPU only;") != NULL, is_slow);
        mem_free(text);
        ck_assert_int_eq(plan_to_json(&p, &text), 0);
        ck_assert_msg(plan_from_json(text, &gpu_in, &again) == 0, "%s", err_text());
        ck_assert_int_eq(again.gpu.kv_waits, is_slow);
        ck_assert_int_eq(again.gpu.halves, !is_slow);
        mem_free(text);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("plan_batch");
    TCase *t = tcase_create("plan_batch");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, point_says_what_is_not_so);
    tcase_add_test(t, measured_kernels_are_not_asked);
    tcase_add_test(t, head_is_not_multiplied);
    tcase_add_test(t, full_step_is_expected_otherwise_than_predicted);
    tcase_add_test(t, nothing_predicted_divides_by_zero);
    tcase_add_test(t, pages_take_nothing_from_slots);
    tcase_add_test(t, mapping_passes_for_memory);
    tcase_add_test(t, more_sequences_than_requests);
    tcase_add_test(t, more_sequences_drive_the_cache_from_the_gpu);
    tcase_add_test(t, choice_does_not_follow_the_cpu);
    tcase_add_test(t, profile_of_a_step_is_another);
    tcase_add_test(t, rows_want_other_experts);
    tcase_add_test(t, pipelining_is_passed_over);
    tcase_add_test(t, experts_give_way_to_empty_pages);
    tcase_add_test(t, sequences_begin_the_other_way);
    tcase_add_test(t, unknown_rates_are_guessed);
    tcase_add_test(t, too_little_memory_is_not_told);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
