/* Plans with a GPU, for machines that do not exist, of models without weights. */
#include "tests/plan_gpu_ask.h"
#include "tests/run_suite.h"

#include "src/plan/cost.h"

#include <math.h>

/* 3 layers of 128 experts: gate and up 2048 x 768 of Q4_K (144 bytes for 256), down 768 x 2048 of Q6_K (210). */
enum { N_EXPERTS = 384 };
#define EXPERT_BYTES ((uint64_t)2048 * 768 / 256 * (144 + 144 + 210))

static uint64_t gpu_sum(const struct plan *p)
{
    const struct plan_gpu *g = &p->gpu;
    return g->dense_bytes + g->expert_bytes + g->landing_bytes + g->lift_bytes + g->kv_bytes + g->scratch_bytes +
           g->own_bytes;
}

START_TEST(every_byte_of_a_gpu_has_a_purpose)
{
    struct plan p;

    ck_assert_int_eq(plan_make(ask_gpu(MOE, 8 * GIB, 512 * MIB), &p), 0);
    ck_assert(p.has_gpu);
    ck_assert_uint_eq(p.gpu.total_bytes, gpu_sum(&p));
    ck_assert_uint_le(p.gpu.total_bytes, 512 * MIB);
    ck_assert_uint_eq(p.gpu.kv_bytes, fact("moe", "kv_8192_f16"));
    ck_assert_uint_eq(p.gpu.own_bytes, GPU_OWN_BYTES + 8 * 8192 + (5 + GPU_ALLOCS) * 2 * MIB);
    ck_assert_uint_eq(p.gpu.n_landing, 2 * 8); /* twice what a token wants of a layer */
    ck_assert_uint_eq(p.gpu.landing_bytes, 16 * EXPERT_BYTES);
    ck_assert_uint_eq(p.gpu.pin_bytes,
                      p.expert_bytes < GIB ? p.expert_bytes : GIB); /* of 8 GiB a quarter, but no more than that */
    ck_assert_uint_ge(p.gpu.scratch_bytes, (uint64_t)p.chunk_tok * 1000 + 1);
    /* As many experts as fit: whole ones, and not one more. Stacks begin and end inside blocks of 4 KiB. */
    ck_assert_uint_eq(p.gpu.n_all_experts, N_EXPERTS);
    ck_assert_uint_gt(p.gpu.n_experts, 0);
    uint64_t bytes = p.gpu.n_experts * EXPERT_BYTES;
    ck_assert_uint_ge(p.gpu.expert_bytes + 9 * 4096, bytes);
    ck_assert_uint_le(p.gpu.expert_bytes, bytes + 9 * 2 * 4096);
    ck_assert_uint_gt(p.gpu.total_bytes + EXPERT_BYTES, 512 * MIB);
    /* The host has room for all, so that they may change places. */
    ck_assert_uint_eq(p.n_slots, N_EXPERTS);
    ck_assert_uint_eq(p.n_slot_experts, p.n_slots);
    /* They are read at the start, those of the GPU twice. */
    ck_assert_double_eq_tol(p.load_s, (double)(p.gpu.dense_bytes + p.gpu.expert_bytes + p.expert_bytes) / 2e9, 1e-9);
    ck_assert_uint_eq(p.dense_bytes, 3 * (128 + 1) * 2048 * sizeof(float)); /* routers, norms */
    ck_assert_uint_eq(p.kv_bytes, 0);
    ck_assert_uint_eq(p.stage_bytes, 8 * MIB + 12345 + 17 * EXPERT_BYTES); /* one of them moves, 16 are copied */
    ck_assert_uint_eq(p.total_bytes, sum(&p));
    ck_assert(p.look_ahead);
    ck_assert(explains(&p, "memory of GPU 0"));
    char words[64];
    snprintf(words, sizeof words, "%" PRIu32 " of 384, computed there", p.gpu.n_experts);
    ck_assert(explains(&p, words));
}
END_TEST

/* One byte of the GPU's memory decides over an expert, one of the host's over a slot. */
START_TEST(gpu_gets_another_number_of_experts_than_fits)
{
    struct plan p, less;

    ck_assert_int_eq(plan_make(ask_gpu(MOE, 8 * GIB, 512 * MIB), &p), 0);
    opts.vram_bytes = p.gpu.total_bytes;
    ck_assert_int_eq(plan_make(&in, &less), 0);
    ck_assert_uint_eq(less.gpu.n_experts, p.gpu.n_experts);
    opts.vram_bytes--;
    ck_assert_int_eq(plan_make(&in, &less), 0);
    ck_assert_uint_eq(less.gpu.n_experts, p.gpu.n_experts - 1);
    /* Everything fits: the host has no slots, and nothing to compute */
    opts.vram_bytes = 4 * GIB;
    ck_assert_int_eq(plan_make(&in, &less), 0);
    ck_assert_uint_eq(less.gpu.n_experts, N_EXPERTS);
    ck_assert(!plan_is_split(&less));
    ck_assert_uint_eq(less.slot_ram_bytes, 0);
    ck_assert(!less.look_ahead);
    ck_assert_uint_lt(less.scratch_bytes, p.scratch_bytes);
    /* a row of logits, or the best of them; but it still looks at which experts a step wants: 8 numbers a row */
    uint64_t logits_bytes = (uint64_t)in.model->hp.n_vocab * sizeof(float);
    ck_assert_uint_eq(less.scratch_bytes, size_up(logits_bytes, 4096) + size_up(DEVICE_MAX_TOP_K * 8, 4096) +
                                              size_up(less.chunk_tok * 8 * sizeof(int32_t), 4096));
    ck_assert_uint_eq(less.gpu.up_bytes_per_tok, 0);
    /* Little memory: slots for some of the others */
    opts.vram_bytes = 512 * MIB;
    opts.ram_bytes = p.total_bytes - p.expert_bytes / 2;
    ck_assert_int_eq(plan_make(&in, &less), 0);
    ck_assert_uint_eq(less.gpu.n_experts, p.gpu.n_experts);
    ck_assert_uint_lt(less.n_slots, p.n_slots);
    ck_assert_uint_le(less.total_bytes, opts.ram_bytes);
    ck_assert_uint_gt(less.total_bytes + 2 * EXPERT_BYTES, opts.ram_bytes);
}
END_TEST

START_TEST(gpu_that_is_too_small_is_refused_with_the_numbers)
{
    struct plan p;
    char size[32];

    ck_assert_int_eq(plan_make(ask_gpu(DENSE, 8 * GIB, 0), &p), ERR_ARG); /* nobody knows how much it has */
    machine.vram_total_bytes = 8 * GIB;
    machine.vram_free_bytes = 6 * GIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.budget_bytes, 6 * GIB - 6 * GIB / 16);
    opts.vram_bytes = 6 * GIB + 1;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "GPU 0 has 6 GiB free"));
    opts.vram_bytes = 6 * GIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    /* A context that nobody asked for is lowered; one that somebody asked for is not. */
    opts.vram_bytes = p.gpu.total_bytes - p.gpu.kv_bytes / 2;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_lt(p.n_ctx, 8192);
    ck_assert_uint_ge(p.n_ctx, 4096);
    ck_assert(explains(&p, "LOWERED from 8192"));
    /* Of less than two segments of it the GPU has to hold all, at least of one of four layers. */
    opts.n_ctx = 512;
    opts.vram_bytes = MIB;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), size_format(fact("dense", "kv_8192_f16") / 16 / 4, size, sizeof size)));
    ck_assert_ptr_nonnull(
        strstr(err_text(), "does not fit GPU 0, even with all experts elsewhere and no more than 1 layer"));
    opts.n_ctx = 0;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    /* and the host's memory is as tight as ever */
    opts.vram_bytes = 4 * GIB;
    opts.ram_bytes = 64 * MIB;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "64 MiB allowed"));
    opts.ram_bytes = 0;
    opts.io = PLAN_IO_MMAP;
    ck_assert_int_eq(plan_make(&in, &p), ERR_UNSUPPORTED);
}
END_TEST

/* As many segments of 512 positions as fit, and all others in the host's memory. */
START_TEST(cache_beyond_a_gpu_is_not_shared)
{
    const uint64_t kv_bytes = 4 * fact("dense", "kv_8192_f16"), segment_bytes = kv_bytes / 64;
    struct plan whole, p, other;
    char *text;

    ask_gpu(DENSE, 8 * GIB, 6 * GIB);
    opts.n_ctx = 32768;
    ck_assert_int_eq(plan_make(&in, &whole), 0);
    ck_assert_uint_eq(whole.gpu.kv_tok, 0);
    ck_assert(!plan_has_host_kv(&whole));
    opts.vram_bytes = whole.gpu.total_bytes - kv_bytes / 2;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.n_ctx, 32768);
    ck_assert_uint_eq(p.gpu.kv_tok % 512, 0);
    ck_assert_uint_gt(p.gpu.kv_tok, 512);
    ck_assert_uint_lt(p.gpu.kv_tok, 16384); /* what attention on two sides needs has to have room, too */
    ck_assert_uint_eq(p.gpu.kv_bytes, p.gpu.kv_tok / 512 * segment_bytes);
    ck_assert_uint_eq(p.kv_bytes, kv_bytes - p.gpu.kv_bytes);
    ck_assert_uint_le(p.gpu.total_bytes, opts.vram_bytes);
    ck_assert_uint_gt(p.gpu.total_bytes + segment_bytes, opts.vram_bytes);
    ck_assert_uint_eq(p.gpu.total_bytes, gpu_sum(&p));
    ck_assert_uint_eq(p.total_bytes, sum(&p));
    ck_assert_uint_eq(p.gpu.own_bytes, whole.gpu.own_bytes + 2 * MIB); /* one piece of memory more */
    ck_assert_uint_gt(p.gpu.scratch_bytes, whole.gpu.scratch_bytes);
    ck_assert_uint_gt(p.scratch_bytes, whole.scratch_bytes);
    ck_assert_uint_eq(p.gpu.stage_rows, 4); /* rates are not known */
    ck_assert(explains(&p, "positions, attention computed there"));
    ck_assert(explains(&p, "32768 positions x 1 session, f16 do not fit"));
    /* It comes back, and more cannot be asked of it. */
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    memset(&other, 0x55, sizeof other);
    ck_assert_msg(plan_from_json(text, &in, &other) == 0, "%s", err_text());
    ck_assert_int_eq(memcmp(&p, &other, sizeof p), 0);
    ck_assert_int_eq(plan_from_json(edited(text, "kv_tok", "512"), &in, &other), 0);
    ck_assert_uint_eq(other.gpu.kv_bytes, segment_bytes);
    ck_assert_int_eq(plan_from_json(edited(text, "kv_tok", "32256"), &in, &other), ERR_LIMIT);
    ck_assert_int_eq(plan_from_json(edited(text, "kv_tok", "500"), &in, &other), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "stage_rows", "-1"), &in, &other), ERR_FORMAT);
    mem_free(text);
    /* The host's share is the host's to refuse. */
    opts.ram_bytes = p.total_bytes - 1;
    ck_assert_int_eq(plan_make(&in, &other), ERR_LIMIT);
    opts.ram_bytes = p.total_bytes;
    ck_assert_int_eq(plan_make(&in, &other), 0);
    opts.kv_type = QUANT_Q8_0;
    ck_assert_int_eq(plan_make(&in, &other), 0);
    ck_assert_uint_gt(other.gpu.kv_tok, p.gpu.kv_tok);
    /* Experts go first. */
    ask_gpu(MOE, 8 * GIB, 4 * GIB);
    opts.n_ctx = 32768;
    ck_assert_int_eq(plan_make(&in, &whole), 0);
    opts.vram_bytes = whole.gpu.total_bytes - whole.gpu.expert_bytes - 8 * MIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert(plan_has_host_kv(&p));
    ck_assert_uint_eq(p.gpu.n_experts, 0);
}
END_TEST

/* Pages come up from where computing with them takes the CPU longer than copying: a key of a layer of n heads with as many of keys and
 * values as pages hold. */
START_TEST(pages_come_up_for_other_rows_than_pays)
{
    const struct model *m = models[DENSE];
    struct plan p;

    ask_gpu(DENSE, 8 * GIB, 6 * GIB);
    opts.n_ctx = 32768;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    opts.vram_bytes = p.gpu.total_bytes - p.gpu.kv_bytes / 2;
    machine.pcie_bytes_per_s = 10e9;
    double values = m->hp.head_dim_k + m->hp.head_dim_v, up_s = m->layers[0].n_head_kv * values * 2 / 10e9;
    machine.ops[OP_ATTENTION].unit_s = up_s / 10.5 / (m->layers[0].n_head * values);
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.stage_rows, 10);
    /* A full context is read by both sides, each at its rate. */
    ck_assert_double_eq(cost_gpu_kv_s(&in, &p), 0);
    machine.gpu_bytes_per_s = 1e12;
    double kv_s = fmax((double)p.gpu.kv_bytes / 1e12, (double)p.kv_bytes / machine.mem_bytes_per_s);
    ck_assert_double_eq_tol(cost_gpu_kv_s(&in, &p), kv_s, 1e-12);
    char words[64];
    snprintf(words, sizeof words, "by the CPU meanwhile: %.3g ms", 1e3 * kv_s);
    ck_assert(explains(&p, words));
    machine.ops[OP_ATTENTION].unit_s *= 100; /* a generated row stays with the CPU all the same */
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.stage_rows, 2);
}
END_TEST

/* One token: all but experts from the GPU's memory, then the slower of the GPU's experts, the host's, and the disk; and what
 * crosses. */
START_TEST(speed_with_a_gpu_is_another)
{
    struct plan p;

    ask_gpu(MOE, 8 * GIB, 512 * MIB);
    machine.gpu_bytes_per_s = 200e9;
    machine.pcie_bytes_per_s = 10e9;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert(!plan_is_measured(&p, &machine));
    double routed = 3 * 8 * (double)EXPERT_BYTES, dense = (double)fact("moe", "decode_bytes") - routed;
    double share = (double)p.gpu.n_experts / N_EXPERTS;
    uint64_t down = 3 * (8 * 4 + 2048 * 4) + 8; /* the best logit and its id */
    ck_assert_uint_eq(p.gpu.down_bytes_per_tok, down);
    double host = (1 - share) * 20 / (20 + 10); /* memory against PCIe: the rest is copied */
    double up = 3 * 8 * host * 2048 * 4;
    ck_assert_double_eq_tol((double)p.gpu.up_bytes_per_tok, up, 8 * 2048 * 4); /* layers may differ by one expert */
    double crossing_s = ((double)down + (double)p.gpu.up_bytes_per_tok) / 10e9;
    double s = dense / 200e9 + crossing_s + host * routed / 20e9;
    ck_assert_double_eq_tol(1 / p.decode_tok_per_s, s, 1e-9);
    ck_assert_double_eq_tol((double)p.gpu.copy_bytes_per_tok, (1 - share - host) * routed, 2);
    opts.copies = PLAN_COPIES_NEVER;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.n_landing, 0);
    ck_assert_uint_eq(p.gpu.pin_bytes, 0);
    ck_assert_uint_eq(p.gpu.landing_bytes, 0);
    share = (double)p.gpu.n_experts / N_EXPERTS;
    s = dense / 200e9 + ((double)down + (double)p.gpu.up_bytes_per_tok) / 10e9 + (1 - share) * routed / 20e9;
    ck_assert_double_eq_tol(1 / p.decode_tok_per_s, s, 1e-9);
    ck_assert_uint_eq(p.gpu.copy_bytes_per_tok, 0);
    opts.copies = PLAN_COPIES_ALWAYS;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.up_bytes_per_tok, 0);
    share = (double)p.gpu.n_experts / N_EXPERTS;
    s = dense / 200e9 + (double)down / 10e9 + (1 - share) * routed / 10e9;
    ck_assert_double_eq_tol(1 / p.decode_tok_per_s, s, 1e-9);
    opts.copies = PLAN_COPIES_AUTO;
    ck_assert_uint_eq(p.missed_bytes_per_tok, 0);
    ck_assert(explains(&p, "at most"));
    machine.pcie_bytes_per_s = 0;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_double_eq(p.decode_tok_per_s, 0);
    ck_assert(explains(&p, "--gpu-rate, --pcie"));
}
END_TEST

START_TEST(saved_plan_with_a_gpu_comes_back_another)
{
    struct plan p, back;
    char *text;

    ck_assert_int_eq(plan_make(ask_gpu(MOE, 8 * GIB, 512 * MIB), &p), 0);
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    memset(&back, 0x55, sizeof back);
    ck_assert_msg(plan_from_json(text, &in, &back) == 0, "%s", err_text());
    ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
    ck_assert_int_eq(plan_from_json(edited(text, "experts", "3"), &in, &back), 0);
    ck_assert_uint_lt(back.gpu.total_bytes, p.gpu.total_bytes);
    ck_assert_int_eq(plan_from_json(edited(text, "experts", "200"), &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "GPU 0"));
    ck_assert_int_eq(plan_from_json(edited(text, "experts", "385"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "experts", "-1"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "number", "\"one\""), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "copies", "\"sometimes\""), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "landings", "-1"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "landings", "4097"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "landings", "100"), &in, &back), ERR_LIMIT);
    ck_assert_int_eq(plan_from_json(edited(text, "landings", "3"), &in, &back), 0);
    ck_assert_uint_eq(back.gpu.landing_bytes, 3 * EXPERT_BYTES);
    ck_assert_int_eq(plan_from_json(edited(text, "expert_ram", "0"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "io", "\"mmap\""), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "look_ahead", "false"), &in, &back), 0);
    ck_assert_uint_eq(back.dense_bytes, 0);
    ck_assert_uint_eq(p.pace.n_ahead, 4); /* half of a token's eight */
    ck_assert_uint_eq(back.pace.n_ahead, 0);
    ck_assert_uint_eq(back.pace.n_reads, p.pace.n_reads);
    ck_assert_int_eq(plan_from_json(edited(text, "ahead_experts", "8"), &in, &back), 0);
    ck_assert_uint_eq(back.pace.n_ahead, 8);
    ck_assert_int_eq(plan_from_json(edited(text, "ahead_experts", "9"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "reads_in_flight", "12"), &in, &back), 0);
    ck_assert_uint_eq(back.pace.n_reads, 12);
    ck_assert_int_eq(plan_from_json(edited(text, "reads_in_flight", "65"), &in, &back), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(text, "reads_in_flight", "0"), &in, &back), ERR_FORMAT);
    machine.vram_total_bytes = GIB;
    machine.vram_free_bytes = 100 * MIB;
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "100 MiB free"));
    in.gpu = NULL;
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_UNSUPPORTED);
    mem_free(text);
}
END_TEST

/* ---- layers that do not fit ---- */

/* Of DENSE, Q8_0 (34 bytes for 32) but for norms and biases: a layer; the embedding, which is the head, too. */
#define LAYER_BYTES \
    ((uint64_t)(2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864) / 32 * 34 + 4 * (896 + 128 + 128 + 2 * 896))
#define EMBD_BYTES ((uint64_t)896 * 2048 / 32 * 34)
enum { N_LAYERS = 4 };

/* Weights that lie together begin and end inside blocks of 4 KiB. */
static void must_be_near(uint64_t bytes, uint64_t want)
{
    ck_assert_uint_ge(bytes, want);
    ck_assert_uint_le(bytes, want + 4 * 4096);
}

/* A plan in which n layers of DENSE are the CPU's, by a byte. */
static void leave_layers(uint32_t n, struct plan *p)
{
    ask_gpu(DENSE, 8 * GIB, 4 * GIB);
    opts.n_ctx = 512;
    ck_assert_int_eq(plan_make(&in, p), 0);
    for (uint32_t i = 1; i <= n; i++) {
        opts.vram_bytes = p->gpu.total_bytes - 1;
        ck_assert_int_eq(plan_make(&in, p), 0);
        ck_assert_uint_eq(p->gpu.first_layer, i);
    }
}

START_TEST(layers_that_do_not_fit_are_lost)
{
    const uint64_t kv_bytes = fact("dense", "kv_8192_f16") / 16;
    struct plan whole, p, back;
    char *text, words[128];

    leave_layers(0, &whole);
    ck_assert(!plan_has_host_layers(&whole));
    must_be_near(whole.gpu.dense_bytes, N_LAYERS * LAYER_BYTES + EMBD_BYTES + 4 * 896);
    for (uint32_t n = 1; n < N_LAYERS; n++) {
        leave_layers(n, &p);
        ck_assert(plan_has_host_layers(&p));
        must_be_near(p.gpu.dense_bytes, (N_LAYERS - n) * LAYER_BYTES + EMBD_BYTES + 4 * 896);
        must_be_near(p.dense_bytes, n * LAYER_BYTES + EMBD_BYTES);
        ck_assert_uint_eq(p.gpu.kv_bytes, kv_bytes / N_LAYERS * (N_LAYERS - n));
        ck_assert_uint_eq(p.kv_bytes, kv_bytes / N_LAYERS * n);
        ck_assert_uint_eq(p.gpu.total_bytes, gpu_sum(&p));
        ck_assert_uint_eq(p.total_bytes, sum(&p));
        ck_assert_uint_gt(p.scratch_bytes, whole.scratch_bytes + (uint64_t)p.chunk_tok * 896 * sizeof(float));
        ck_assert_uint_eq(p.gpu.up_bytes_per_tok, 896 * sizeof(float));
        ck_assert_uint_eq(p.gpu.down_bytes_per_tok, whole.gpu.down_bytes_per_tok);
        snprintf(words, sizeof words, n > 1 ? "embedding and layers 0 to %" PRIu32 : "embedding and layer %" PRIu32,
                 n - 1);
        ck_assert(explains(&p, words));
        ck_assert_int_eq(plan_to_json(&p, &text), 0);
        memset(&back, 0x55, sizeof back);
        ck_assert_msg(plan_from_json(text, &in, &back) == 0, "%s", err_text());
        ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
        mem_free(text);
    }
    opts.vram_bytes = p.gpu.total_bytes - 1;
    ck_assert_int_eq(plan_make(&in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "1 B too much"));
    /* What the host then has to hold is the host's to refuse. */
    opts.vram_bytes = p.gpu.total_bytes;
    opts.ram_bytes = p.total_bytes;
    ck_assert_int_eq(plan_make(&in, &back), 0);
    opts.ram_bytes--;
    ck_assert_int_eq(plan_make(&in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "1 B too much. Weights"));
}
END_TEST

/* The context that a plan takes unasked is not the price for another layer on the GPU; for the host's memory it is lowered as ever. */
START_TEST(layers_on_the_cpu_shorten_the_context)
{
    struct plan p, less;

    leave_layers(2, &p);
    opts.n_ctx = 0;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.n_ctx, 8192);
    ck_assert_uint_ge(p.gpu.first_layer, 2);
    opts.ram_bytes = p.total_bytes - p.kv_bytes / 2;
    ck_assert_int_eq(plan_make(&in, &less), 0);
    ck_assert_uint_eq(less.gpu.first_layer, p.gpu.first_layer);
    ck_assert_uint_lt(less.n_ctx, 8192);
    /* Where one layer's cache does not fit, it is shared. */
    leave_layers(3, &p);
    opts.n_ctx = 32768;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.first_layer, 3);
    ck_assert_uint_ge(p.gpu.kv_tok, 512);
    ck_assert_uint_lt(p.gpu.kv_tok, 32768);
    ck_assert_uint_eq(p.kv_bytes + p.gpu.kv_bytes, 4 * fact("dense", "kv_8192_f16"));
}
END_TEST

/* ---- layers that do not fit, lifted ---- */

static uint64_t up(uint64_t bytes)
{
    return size_up(bytes, 256);
}

/* Half of the layers on the GPU: the others' weights have two rooms there, each for a gate and an up, and their norms a place. From how
 * many rows on follows the rates. */
static bool can_but_layer_0(const struct op *op)
{
    return op->layer != 0;
}

/* A plan that was written by hand: the CPU has the layer that the GPU cannot run. */
static void check_unable_gpu(const char *text)
{
    struct device_ops unable = gpu;
    struct plan back;

    unable.can = can_but_layer_0;
    in.gpu = &unable;
    ck_assert_int_eq(plan_from_json(edited(text, "lift_rows", "0"), &in, &back), 0);
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "the gpu cannot run"));
    in.gpu = &gpu;
}

START_TEST(lifted_layers_take_other_memory)
{
    struct model *m;
    struct plan whole, p, back;
    char *text;

    ask_gpu(DENSE, 64 * GIB, 64 * GIB);
    ck_assert_msg(shape_open(&deep, &m) == 0, "%s", err_text());
    in.model = m;
    opts.n_ctx = 512;
    ck_assert_int_eq(plan_make(&in, &whole), 0);
    ck_assert_uint_eq(whole.gpu.lift_bytes, 0);
    opts.vram_bytes = whole.gpu.total_bytes - whole.gpu.dense_bytes / 2;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert(plan_has_lift(&p));
    const struct tensor *gate = &m->weights[m->layers[0].w[ROLE_FFN_GATE]].t;
    uint64_t norms = 2 * up(2048 * 4) + 2 * up(128 * 4); /* of a layer; of queries and keys a head's */
    ck_assert_uint_eq(p.gpu.lift_bytes, 2 * 2 * up(tensor_bytes(gate)) + p.gpu.first_layer * norms);
    ck_assert_uint_eq(p.gpu.total_bytes, gpu_sum(&p));
    ck_assert_uint_le(p.gpu.total_bytes, opts.vram_bytes);
    ck_assert_uint_eq(p.gpu.lift_rows, 32); /* nothing was measured */
    ck_assert(explains(&p, "for the CPU's layers, in steps of 32 rows or more"));
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    memset(&back, 0x55, sizeof back);
    ck_assert_msg(plan_from_json(text, &in, &back) == 0, "%s", err_text());
    ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
    ck_assert_int_eq(plan_from_json(edited(text, "lift_rows", "0"), &in, &back), 0);
    ck_assert_uint_eq(back.gpu.lift_bytes, 0);
    ck_assert_uint_lt(back.gpu.total_bytes, p.gpu.total_bytes);
    check_unable_gpu(text);
    mem_free(text);
    /* A byte is copied in 1 / 10 ns; 16 rows of a weight (less than a byte) take 16 * 2 / 100e9 s each: from 8 rows on longer. */
    machine.pcie_bytes_per_s = 10e9;
    for (int type = 0; type < QUANT_ID_END; type++)
        machine.kernels[type] = (struct machine_kernel){20e9, 100e9, 100e9, 100e9};
    ck_assert_int_eq(plan_make(&in, &p), 0);
    double bytes = (double)tensor_bytes(gate), n = (double)gate->ne[0] * (double)gate->ne[1];
    uint32_t rows = p.gpu.lift_rows;
    ck_assert(rows > 1 && rows <= 16);
    ck_assert(rows * 2 * n / 100e9 > 0.8 * bytes / 10e9 && rows * n / 100e9 < 1.2 * bytes / 10e9);
    machine.pcie_bytes_per_s = 1e6; /* never */
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.lift_rows, 0);
    model_close(m);
}
END_TEST

/* One after the other: the CPU's layers by its memory's rate, the GPU's by its own, and a row that goes up. */
START_TEST(speed_with_layers_on_the_cpu_is_another)
{
    struct plan p, alone;
    char words[64];

    leave_layers(2, &p);
    ck_assert_double_eq(p.decode_tok_per_s, 0);
    machine.gpu_bytes_per_s = 256e9;
    machine.pcie_bytes_per_s = 12e9;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.first_layer, 2);
    double before_s = 2 * (double)LAYER_BYTES / 20e9;
    double gpu_s = ((double)fact("dense", "decode_bytes") - 2 * (double)LAYER_BYTES) / 256e9;
    ck_assert_double_eq_tol(p.gpu.host_layers_s, before_s, 1e-9);
    ck_assert_double_eq_tol(1 / p.decode_tok_per_s, before_s + gpu_s + (896 * 4 + 8) / 12e9, 1e-9);
    snprintf(words, sizeof words, "%.3g ms of a token for the CPU's layers", 1e3 * before_s);
    ck_assert(explains(&p, words));
    ck_assert_double_eq_tol(p.load_s, (double)(p.dense_bytes + p.gpu.dense_bytes) / 2e9, 1e-9);
    in.gpu = NULL;
    ck_assert_int_eq(plan_make(&in, &alone), 0);
    ck_assert_double_lt(alone.decode_tok_per_s, p.decode_tok_per_s);
}
END_TEST

/* A GPU whose memory is no faster than the CPU's has nothing to give. */
START_TEST(gpu_that_makes_it_slower_is_used)
{
    struct plan p, back;
    char *text;

    leave_layers(2, &p);
    machine.gpu_bytes_per_s = 15e9;
    machine.pcie_bytes_per_s = 12e9;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert(!p.has_gpu);
    ck_assert_uint_eq(p.unused.first_layer, 2);
    ck_assert_double_gt(p.unused.decode_tok_per_s, 0);
    ck_assert_double_le(p.unused.decode_tok_per_s, p.decode_tok_per_s);
    ck_assert(explains(&p, "GPU 0 IS NOT USED: with it, all but 2 of 4 layers there"));
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    memset(&back, 0x55, sizeof back);
    ck_assert_msg(plan_from_json(text, &in, &back) == 0, "%s", err_text());
    ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
    mem_free(text);
    ck_assert_int_eq(plan_compare(&p, &in, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "with the GPU"));
    ck_assert_ptr_nonnull(strstr(text, "decodes no faster"));
    mem_free(text);
    opts.vram_bytes = 4 * GIB; /* all layers: who asks for a GPU that holds the model gets it */
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert(p.has_gpu);
}
END_TEST

/* Experts of the CPU's layers have slots beside those that the GPU's have no places for. */
START_TEST(experts_of_layers_on_the_cpu_are_lost)
{
    struct plan p, all;
    char *text;

    ask_gpu(MOE, 8 * GIB, 4 * GIB);
    opts.n_ctx = 512;
    ck_assert_int_eq(plan_make(&in, &all), 0);
    opts.vram_bytes = all.gpu.total_bytes - all.gpu.expert_bytes - 1;
    machine.gpu_bytes_per_s = 256e9;
    machine.pcie_bytes_per_s = 12e9;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.gpu.first_layer, 1);
    ck_assert_uint_eq(p.gpu.n_all_experts, N_EXPERTS / 3 * 2);
    ck_assert_uint_eq(p.gpu.n_host_experts, N_EXPERTS / 3);
    ck_assert_uint_gt(p.gpu.n_experts, 0); /* the layer's place */
    ck_assert_uint_eq(p.n_slot_experts, N_EXPERTS);
    ck_assert_uint_eq(p.n_slots, N_EXPERTS);
    ck_assert_uint_eq(p.total_bytes, sum(&p));
    double routed = 8 * (double)EXPERT_BYTES, all_bytes = (double)fact("moe", "decode_bytes");
    double head_bytes = 2048.0 * 2048 / 256 * 210 + 4 * 2048, dense = (all_bytes - head_bytes) / 3 - routed;
    ck_assert_double_eq_tol(p.gpu.host_layers_s, (dense + routed) / 20e9, 1e-9);
    ck_assert_double_gt(p.decode_tok_per_s, 0);
    ck_assert(explains(&p, "layer 0, computed by the CPU; copies of routers"));
    /* The GPU may have all experts of its layers, and the CPU slots for those of its own. */
    opts.vram_bytes = 4 * GIB;
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    char *edit = edited(text, "experts", "256"), more[8192];
    mem_free(text);
    snprintf(more, sizeof more, "%s", edit);
    edit = edited(more, "landings", "0");
    snprintf(more, sizeof more, "%s", edit);
    const char *at = strstr(more, "\"budget\": "), *last = at;
    while ((at = strstr(last + 1, "\"budget\": ")))
        last = at;
    ck_assert_ptr_nonnull(last);
    memset((char *)(uintptr_t)last + strlen("\"budget\": "), '9', 9); /* the GPU's: 953 MiB at least */
    ck_assert_msg(plan_from_json(more, &in, &p) == 0, "%s", err_text());
    ck_assert(!plan_is_split(&p));
    ck_assert(plan_has_host_experts(&p));
    ck_assert(p.look_ahead);
    must_be_near(p.dense_bytes, (uint64_t)dense + 2048 * 2048 / 256 * 144);
    ck_assert_int_eq(plan_from_json(edited(more, "experts", "257"), &in, &p), ERR_FORMAT);
    ck_assert_int_eq(plan_from_json(edited(more, "expert_ram", "0"), &in, &p), ERR_FORMAT);
}
END_TEST

START_TEST(other_plans_forget_the_gpu)
{
    struct plan p;
    char *text;

    ck_assert_int_eq(plan_make(ask_gpu(MOE, 8 * GIB, 512 * MIB), &p), 0);
    ck_assert_int_eq(plan_compare(&p, &in, &text), 0);
    ck_assert_ptr_nonnull(strstr(text, "--device cpu"));
    ck_assert_ptr_null(strstr(text, "mmap"));
    mem_free(text);
}
END_TEST

START_TEST(no_memory_with_a_gpu_leaks_something)
{
    struct plan p;

    ask_gpu(MOE, 8 * GIB, _i ? 110 * MIB : 512 * MIB);
    machine.gpu_bytes_per_s = 1e9;
    machine.pcie_bytes_per_s = 12e9;
    plan_in_spite_of_failures(&p);
    ck_assert_int_eq(p.has_gpu, !_i); /* layers do not fit, and the GPU is no faster at the others */
}
END_TEST

int main(void)
{
    Suite *s = suite_create("plan_gpu");
    TCase *t = tcase_create("plan_gpu");

    tcase_add_unchecked_fixture(t, setup, teardown);
    tcase_add_test(t, every_byte_of_a_gpu_has_a_purpose);
    tcase_add_test(t, gpu_gets_another_number_of_experts_than_fits);
    tcase_add_test(t, gpu_that_is_too_small_is_refused_with_the_numbers);
    tcase_add_test(t, cache_beyond_a_gpu_is_not_shared);
    tcase_add_test(t, pages_come_up_for_other_rows_than_pays);
    tcase_add_test(t, speed_with_a_gpu_is_another);
    tcase_add_test(t, saved_plan_with_a_gpu_comes_back_another);
    tcase_add_test(t, layers_that_do_not_fit_are_lost);
    tcase_add_test(t, lifted_layers_take_other_memory);
    tcase_add_test(t, layers_on_the_cpu_shorten_the_context);
    tcase_add_test(t, speed_with_layers_on_the_cpu_is_another);
    tcase_add_test(t, gpu_that_makes_it_slower_is_used);
    tcase_add_test(t, experts_of_layers_on_the_cpu_are_lost);
    tcase_add_test(t, other_plans_forget_the_gpu);
    tcase_add_loop_test(t, no_memory_with_a_gpu_leaks_something, 0, 2);
    suite_add_tcase(s, t);
    return run_suite(s);
}
