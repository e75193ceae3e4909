/* What a prompt takes with a GPU, by arithmetic: plans for machines that do not exist, of models without weights. What a case is not
 * about is infinitely fast. */
#include "tests/plan_gpu_ask.h"
#include "tests/run_suite.h"

#include "src/plan/cost.h"

#include <math.h>

#define NO_TIME 1e30 /* units a second */
#define INTS_FEW 1e12
#define INTS_MANY 1e13
#define FLOATS 4e11
#define ATTN_UNIT 2e-12
#define CPU_OPS 1e11
#define PCIE 1e10

/* MOE: 3 layers of Qwen3-30B-A3B. */
enum { N_TOK = 512, N_LAYERS = 3, N_EMBD = 2048, N_Q = 4096, N_KV = 512, N_FF = 768, N_EXPERT = 128, N_USED = 8 };
#define EXPERT_WEIGHTS (3.0 * N_EMBD * N_FF)
#define EXPERT_BYTES (EXPERT_WEIGHTS / 3 / 256 * (144 + 144 + 210))
#define DENSE_WEIGHTS (N_EMBD * (2.0 * N_Q + 2 * N_KV))

static void ask_prompt(int model, uint64_t ram_bytes, uint64_t vram_bytes)
{
    ask_gpu(model, ram_bytes, vram_bytes);
    opts.n_ctx = 2048;
    machine.gpu_bytes_per_s = machine.pcie_bytes_per_s = machine.mem_bytes_per_s = machine.disk_bytes_per_s = NO_TIME;
    machine.gpu_prompt = (struct machine_gpu_prompt){{INTS_FEW, INTS_MANY}, {FLOATS, FLOATS}, ATTN_UNIT};
    for (int type = 0; type < QUANT_ID_END; type++)
        machine.kernels[type] = (struct machine_kernel){CPU_OPS, CPU_OPS, CPU_OPS, CPU_OPS};
}

static double prompt_s(struct plan *p)
{
    ck_assert_msg(plan_make(&in, p) == 0, "%s", err_text());
    ck_assert(p->has_gpu);
    return p->prefill_tok_per_s > 0 ? N_TOK / p->prefill_tok_per_s : 0;
}

/* Of n rows of quantized weights. One row takes no time here. */
static double ints_s(double weights, double n)
{
    double few = 2 * weights * 32 / INTS_FEW, many = 2 * weights * 512 / INTS_MANY;
    return n <= 32 ? few * (n - 1) / 31 : few + (n - 32) / 480 * (many - few);
}

static double distinct(double n)
{
    return N_EXPERT * (1 - pow(1 - (double)N_USED / N_EXPERT, n));
}

/* All but a layer's experts in steps of so many rows. A router's time is proportional to rows. */
static double dense_s(double n)
{
    double router_s = 2.0 * N_EMBD * N_EXPERT * N_TOK / FLOATS;
    double attn_s = N_TOK * (N_TOK + 1) / 2.0 * 2 * N_Q * ATTN_UNIT;

    return N_TOK / n * ints_s(DENSE_WEIGHTS, n) + router_s + attn_s;
}

static void must_take(double got_s, double want_s)
{
    ck_assert_double_eq_tol(got_s, want_s, 1e-6 * want_s);
}

START_TEST(gpu_with_all_experts_takes_another_time)
{
    struct plan p;

    for (uint32_t n = 64; n <= N_TOK; n *= 2) {
        ask_prompt(MOE, 8 * GIB, 8 * GIB);
        opts.chunk_tok = n;
        double s = prompt_s(&p), experts_s = distinct(n) * ints_s(EXPERT_WEIGHTS, n * N_USED / distinct(n));
        ck_assert(!plan_is_split(&p));
        must_take(s, N_LAYERS * (dense_s(n) + N_TOK / n * experts_s));
        ck_assert_uint_eq(p.prefill_missed_bytes, 0);
    }
    ck_assert(explains(&p, "prefill     at most"));
}
END_TEST

/* After loading a question is one step; what has no slot for certain is read for it. */
START_TEST(first_answer_comes_at_another_time)
{
    enum { N = 21 };
    const double n_wanted = distinct(N);
    struct plan p;

    ask_prompt(MOE, 8 * GIB, 8 * GIB);
    machine.disk_bytes_per_s = 1e9;
    prompt_s(&p);
    double step_s = ints_s(DENSE_WEIGHTS, N) + 2.0 * N_EMBD * N_EXPERT * 32 * (N - 1) / 31 / FLOATS +
                    N * (N + 1) / 2.0 * 2 * N_Q * ATTN_UNIT + n_wanted * ints_s(EXPERT_WEIGHTS, N * N_USED / n_wanted);
    ck_assert_double_gt(p.load_s, 0);
    must_take(p.first_token_s - p.load_s, N_LAYERS * step_s);
    ask_prompt(MOE, 900 * MIB, 512 * MIB);
    machine.disk_bytes_per_s = 1e9;
    machine.gpu_prompt = (struct machine_gpu_prompt){{NO_TIME, NO_TIME}, {NO_TIME, NO_TIME}, 1 / NO_TIME};
    opts.n_ctx = 512;
    prompt_s(&p);
    ck_assert_uint_lt(p.n_slots, p.n_slot_experts);
    double read_s = N_LAYERS * n_wanted * (1 - (double)p.gpu.n_experts / p.gpu.n_all_experts) * EXPERT_BYTES / 1e9;
    ck_assert_double_ge(p.first_token_s - p.load_s, read_s * 0.999);
    ck_assert_double_le(p.first_token_s - p.load_s, read_s * 1.1);
    ck_assert(explains(&p, "first token"));
}
END_TEST

/* Where arithmetic takes no time, weights and rows of activations have to be read and written all the same: DENSE, layer by layer. */
START_TEST(memory_takes_no_time)
{
    const double embd = 896, kv = 128, ff = 4864, rot = 64, bytes_per_s = 1e9;
    double row = 2 * embd + (2 * embd + 4 * kv) + (2 * embd + rot) + (2 * kv + rot) + 2 * kv; /* a norm, biases, RoPE */
    struct plan p;

    row += 3 * embd + 2 * embd + 3 * ff + 3 * embd; /* the sum, a norm, the gate's product, the sum */
    ask_prompt(DENSE, 8 * GIB, 8 * GIB);
    opts.chunk_tok = N_TOK / 2;
    machine.gpu_prompt = (struct machine_gpu_prompt){{NO_TIME, NO_TIME}, {NO_TIME, NO_TIME}, 1 / NO_TIME};
    machine.gpu_bytes_per_s = bytes_per_s;
    double s = prompt_s(&p);
    double rows_s = N_TOK * (4 * row + embd + rot) * 4 / bytes_per_s; /* the embedding, a table of angles */
    double weights_s = 2 * (double)fact("dense", "decode_bytes") / bytes_per_s;
    ck_assert_double_gt(s, rows_s);
    /* norms and biases are read, but not counted, and once a step there is a row of logits */
    ck_assert_double_eq_tol(s, rows_s + weights_s, 2 * (4 * (2 * 3 * embd + 2048) + 4 * 4 * (3 * embd + 4 * kv)) / 1e9);
}
END_TEST

/* Some of MOE's experts on the GPU, all others in slots; what is not about experts takes no time. */
static double split_s(enum plan_copies copies, struct plan *p)
{
    opts.copies = copies;
    opts.n_ctx = 512;
    return prompt_s(p);
}

static double n_misses(const struct plan *p)
{
    return distinct(N_TOK) * (1 - (double)p->gpu.n_experts / p->gpu.n_all_experts);
}

/* One expert, with its share of the rows. */
static double host_expert_s(void)
{
    return 2 * EXPERT_WEIGHTS * N_TOK * N_USED / distinct(N_TOK) / CPU_OPS;
}

START_TEST(sides_of_a_split_prompt_add_up)
{
    struct plan p;

    ask_prompt(MOE, 8 * GIB, 512 * MIB);
    machine.gpu_prompt = (struct machine_gpu_prompt){{NO_TIME, NO_TIME}, {NO_TIME, NO_TIME}, 1 / NO_TIME};
    double s = split_s(PLAN_COPIES_NEVER, &p);
    must_take(s, N_LAYERS * n_misses(&p) * host_expert_s());
    /* By PCIe rows go down, the host's come up, and copies go. */
    machine.pcie_bytes_per_s = PCIE;
    double down_s = N_TOK * N_LAYERS * (N_USED * 4 + N_EMBD * 4) / PCIE + N_TOK * 8 / PCIE;
    s = split_s(PLAN_COPIES_NEVER, &p);
    double up_s = N_LAYERS * n_misses(&p) / distinct(N_TOK) * N_TOK * N_USED * N_EMBD * 4 / PCIE;
    must_take(s, N_LAYERS * n_misses(&p) * host_expert_s() + down_s + up_s);
    s = split_s(PLAN_COPIES_ALWAYS, &p);
    double copy_s = EXPERT_BYTES / PCIE;
    must_take(s, N_LAYERS * n_misses(&p) * copy_s + down_s);
    /* Both ways at once: FreeToken's share of copies, to a 64th of the misses, the fewer rows that come up aside. */
    s = split_s(PLAN_COPIES_AUTO, &p);
    double h = host_expert_s(), both_s = N_LAYERS * n_misses(&p) * h * copy_s / (h + copy_s);
    ck_assert_double_ge(s, both_s + down_s);
    ck_assert_double_le(s, both_s + down_s + up_s + N_LAYERS * n_misses(&p) * fmax(h, copy_s) / 64);
    /* The GPU is the slowest: all that it has and what was copied. */
    machine.gpu_prompt.ints = (struct machine_gpu_products){1e9, 1e9};
    s = split_s(PLAN_COPIES_ALWAYS, &p);
    double all_s = distinct(N_TOK) * 2 * EXPERT_WEIGHTS * N_TOK * N_USED / distinct(N_TOK) / 1e9;
    must_take(s, N_LAYERS * (all_s + 2 * DENSE_WEIGHTS * N_TOK / 1e9) + down_s);
}
END_TEST

/* While the router is waited for, as many are sent as find a landing; unpinned ones cost the host a copy of its own. */
START_TEST(copies_wait_for_the_router)
{
    struct plan p;

    ask_prompt(MOE, 8 * GIB, 512 * MIB);
    machine.gpu_prompt = (struct machine_gpu_prompt){{NO_TIME, NO_TIME}, {NO_TIME, NO_TIME}, 1.0};
    machine.pcie_bytes_per_s = PCIE;
    double s = split_s(PLAN_COPIES_ALWAYS, &p), copy_s = EXPERT_BYTES / PCIE;
    double attn_s = N_TOK * (N_TOK + 1) / 2.0 * 2 * N_Q,
           down_s = N_TOK * (N_LAYERS * (N_USED * 4 + N_EMBD * 4) + 8) / PCIE;
    ck_assert_uint_eq(p.gpu.n_landing, 2 * N_USED);
    ck_assert_double_eq_tol(s - N_LAYERS * attn_s, N_LAYERS * (n_misses(&p) - 2 * N_USED) * copy_s + down_s, 1e-3);
    machine.gpu_prompt.attn_unit_s = 10 * copy_s / attn_s; /* there is time for 10 */
    s = split_s(PLAN_COPIES_ALWAYS, &p);
    must_take(s, N_LAYERS * n_misses(&p) * copy_s + down_s);
    opts.io = PLAN_IO_PREAD; /* nobody looks ahead */
    s = split_s(PLAN_COPIES_ALWAYS, &p);
    must_take(s, N_LAYERS * (n_misses(&p) + 10) * copy_s + down_s);
    opts.io = PLAN_IO_AUTO;
    /* Memory that is slow to copy in, half of it pinned: the host is last. */
    machine.gpu_prompt.attn_unit_s = 1 / NO_TIME;
    machine.mem_bytes_per_s = PCIE / 10;
    s = split_s(PLAN_COPIES_ALWAYS, &p);
    double pinned = fmin((double)p.gpu.pin_bytes / (double)p.expert_bytes, 1);
    ck_assert_double_lt(pinned, 1);
    must_take(s, N_LAYERS * n_misses(&p) * (1 - pinned) * 2 * EXPERT_BYTES / (PCIE / 10) + down_s);
}
END_TEST

/* With fewer slots than experts the rest is read, all the time where reads are asked for ahead. */
START_TEST(prompt_reads_other_experts)
{
    static const enum plan_io ios[] = {PLAN_IO_URING, PLAN_IO_PREAD};
    struct plan p;

    for (int i = 0; i < 2; i++) {
        ask_prompt(MOE, 8 * GIB, 512 * MIB);
        opts.io = ios[i];
        opts.expert_ram_bytes = 300 * MIB;
        opts.chunk_tok = N_TOK;
        machine.disk_bytes_per_s = 1e9;
        machine.gpu_prompt = (struct machine_gpu_prompt){{NO_TIME, NO_TIME}, {NO_TIME, NO_TIME}, 1 / NO_TIME};
        double s = split_s(PLAN_COPIES_NEVER, &p);
        double n_read = N_LAYERS * n_misses(&p) * (1 - (double)p.n_slots / p.n_slot_experts);
        double read_s = n_read * EXPERT_BYTES / 1e9, host_s = N_LAYERS * n_misses(&p) * host_expert_s();
        ck_assert_uint_lt(p.n_slots, p.n_slot_experts);
        ck_assert_double_eq_tol((double)p.prefill_missed_bytes, n_read * EXPERT_BYTES, 2);
        must_take(s, i ? host_s + read_s : fmax(host_s, read_s));
        machine.disk_bytes_per_s = 0;
        ck_assert_double_eq(split_s(PLAN_COPIES_NEVER, &p), 0);
    }
}
END_TEST

/* Of `deep` the GPU has half. The CPU computes its own, or their weights come up. */
#define DEEP_WEIGHTS (2048.0 * (2 * 2048 + 2 * 512 + 3 * 8192))

static double products_bytes(const struct model *m, int n_layers)
{
    double sum = 0;

    for (int layer = 0; layer < n_layers; layer++)
        for (int role = 0; role < ROLE_N; role++) {
            int i = m->layers[layer].w[role];
            sum += i >= 0 && m->weights[i].t.ne[1] > 1 ? (double)tensor_bytes(&m->weights[i].t) : 0;
        }
    return sum;
}

START_TEST(lifted_prompt_takes_another_time)
{
    struct model *m;
    struct plan p, whole;
    char *text;

    ask_prompt(DENSE, 64 * GIB, 64 * GIB);
    ck_assert_msg(shape_open(&deep, &m) == 0, "%s", err_text());
    in.model = m;
    opts.n_ctx = N_TOK;
    prompt_s(&whole);
    opts.vram_bytes = whole.gpu.total_bytes - whole.gpu.dense_bytes / 2;
    machine.gpu_prompt.attn_unit_s = 1 / NO_TIME;
    machine.pcie_bytes_per_s = PCIE / 10;
    double s = prompt_s(&p), n = p.gpu.first_layer, gpu_s = 40 * ints_s(DEEP_WEIGHTS, N_TOK);
    ck_assert(plan_has_lift(&p));
    /* Weights come up while all is computed: first that takes longer. Rows pass, of the embedding, of queries, keys and values, and of what
     * comes of them; in the end a token. */
    double up_s = products_bytes(m, (int)n) / machine.pcie_bytes_per_s, last_s = N_TOK * 8 / machine.pcie_bytes_per_s;
    must_take(s, up_s + (1 - n / 40) * gpu_s + last_s);
    machine.pcie_bytes_per_s = 10 * PCIE;
    s = prompt_s(&p);
    double rows_s = N_TOK * (n * (2048 + 2 * 512 + 2048) + 2048) * 4 / (10 * PCIE);
    must_take(s, rows_s + gpu_s + last_s / 100);
    /* The CPU does it alone. */
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    ck_assert_int_eq(plan_from_json(edited(text, "lift_rows", "0"), &in, &p), 0);
    mem_free(text);
    double cpu_s = n * 2 * DEEP_WEIGHTS * N_TOK / CPU_OPS, cross_s = N_TOK * 2048 * 4 / (10 * PCIE);
    must_take(N_TOK / p.prefill_tok_per_s, cpu_s + cross_s + (1 - n / 40) * gpu_s + last_s / 100);
    model_close(m);
}
END_TEST

/* Whatever is lacking: then nothing is said. */
START_TEST(prompt_is_guessed)
{
    struct plan p;

    ask_prompt(MOE, 8 * GIB, 512 * MIB);
    opts.n_ctx = 512;
    double *const rates[] = {&machine.gpu_bytes_per_s,
                             &machine.pcie_bytes_per_s,
                             &machine.gpu_prompt.ints.few_ops_per_s,
                             &machine.gpu_prompt.ints.many_ops_per_s,
                             &machine.gpu_prompt.floats.few_ops_per_s,
                             &machine.gpu_prompt.floats.many_ops_per_s,
                             &machine.gpu_prompt.attn_unit_s,
                             &machine.mem_bytes_per_s,
                             &machine.kernels[QUANT_Q6_K].token_bytes_per_s};
    ck_assert_double_gt(prompt_s(&p), 0);
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        double was = *rates[i];
        *rates[i] = 0;
        ck_assert_double_eq(prompt_s(&p), 0);
        ck_assert(explains(&p, "prefill     not known: the rates of prompts on this GPU"));
        *rates[i] = was;
    }
    opts.prefill = DEVICE_PREFILL_BLAS;
    ck_assert_double_eq(prompt_s(&p), 0);
    ck_assert(explains(&p, "prefill     not known: of a GPU, ferry probe measures prompts with --prefill int alone"));
    opts.prefill = DEVICE_PREFILL_INT;
    machine.kernels[QUANT_Q6_K].token_bytes_per_s = 0;
    opts.vram_bytes = 8 * GIB; /* the CPU computes nothing */
    ck_assert_double_gt(prompt_s(&p), 0);
}
END_TEST

/* Activations of a step take the place of experts: then smaller steps may be sooner done. */
START_TEST(usual_step_takes_the_room_of_experts)
{
    struct plan p;

    ask_prompt(MOE, 8 * GIB, 900 * MIB);
    gpu_scratch_row_bytes = MIB;
    machine.gpu_bytes_per_s = 2e11;
    machine.mem_bytes_per_s = 2e10;
    machine.pcie_bytes_per_s = PCIE;
    ck_assert_double_gt(prompt_s(&p), 0);
    ck_assert_uint_eq(p.chunk_tok, 256);
    machine.gpu_prompt.attn_unit_s = 0;
    ck_assert_double_eq(prompt_s(&p), 0);
    ck_assert_uint_eq(p.chunk_tok, 512);
}
END_TEST

/* A GPU that decodes no faster may still be worth it for prompts. */
START_TEST(gpu_that_is_for_prompts_is_left)
{
    struct plan p;

    for (int has_prompts = 0; has_prompts < 2; has_prompts++) {
        ask_prompt(DENSE, 8 * GIB, 8 * GIB);
        opts.n_ctx = 512;
        prompt_s(&p);
        opts.vram_bytes = p.gpu.total_bytes - 1;
        machine.gpu_bytes_per_s = 1.9e10;
        for (int type = 0; type < QUANT_ID_END; type++)
            machine.kernels[type].token_bytes_per_s = 2e10;
        machine.gpu_prompt.attn_unit_s *= has_prompts;
        ck_assert_int_eq(plan_make(&in, &p), 0);
        ck_assert_int_eq(p.has_gpu, has_prompts);
    }
}
END_TEST

START_TEST(no_memory_for_a_prompt_leaks_something)
{
    struct plan p;

    ask_prompt(MOE, 8 * GIB, 512 * MIB);
    opts.chunk_tok = 512;
    plan_in_spite_of_failures(&p);
    ck_assert_double_gt(p.prefill_tok_per_s, 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("plan_gpu_prompt");
    TCase *t = tcase_create("plan_gpu_prompt");

    tcase_add_unchecked_fixture(t, setup, teardown);
    tcase_add_test(t, gpu_with_all_experts_takes_another_time);
    tcase_add_test(t, first_answer_comes_at_another_time);
    tcase_add_test(t, memory_takes_no_time);
    tcase_add_test(t, sides_of_a_split_prompt_add_up);
    tcase_add_test(t, copies_wait_for_the_router);
    tcase_add_test(t, prompt_reads_other_experts);
    tcase_add_test(t, lifted_prompt_takes_another_time);
    tcase_add_test(t, prompt_is_guessed);
    tcase_add_test(t, usual_step_takes_the_room_of_experts);
    tcase_add_test(t, gpu_that_is_for_prompts_is_left);
    tcase_add_test(t, no_memory_for_a_prompt_leaks_something);
    suite_add_tcase(s, t);
    return run_suite(s);
}
