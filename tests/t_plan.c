/* Plans for machines that do not exist, of models without weights. */
#include "tests/plan_ask.h"
#include "tests/run_suite.h"

#include "src/run/cache.h"
#include "src/run/store.h"

START_TEST(every_byte_has_a_purpose)
{
    struct plan p;

    ck_assert_int_eq(plan_make(ask(_i, 8 * GIB), &p), 0);
    ck_assert_uint_eq(p.dense_bytes + p.expert_bytes, fact(names[_i], "held_bytes"));
    ck_assert_uint_eq(p.expert_bytes, fact(names[_i], "expert_bytes"));
    ck_assert_uint_eq(p.decode_bytes_per_tok, fact(names[_i], "decode_bytes"));
    ck_assert_uint_eq(p.n_ctx, 8192);
    ck_assert_uint_eq(p.kv_bytes, fact(names[_i], "kv_8192_f16"));
    ck_assert_uint_eq(p.total_bytes, sum(&p));
    ck_assert_uint_ge(p.scratch_bytes, (uint64_t)p.chunk_tok * 100 + 60000);
    ck_assert_uint_eq(p.stage_bytes, 0);
    ck_assert_uint_eq(p.dense_bytes + p.expert_bytes, store_bytes(models[_i], PLAN_IO_URING));
    struct kv_shape shape;
    ck_assert_int_eq(model_kv_shape(models[_i], QUANT_F16, 0, &shape, NULL), 0);
    const struct cache_args cache = {.shape = &shape, .n_seq = 1, .n_ctx = p.n_ctx, .chunk_tok = p.chunk_tok};
    ck_assert_uint_eq(p.kv_bytes, cache_bytes(&cache));
    ck_assert_int_eq(p.io, PLAN_IO_URING);
    ck_assert_int_eq(p.kv_type, QUANT_F16);
    ck_assert_uint_eq(p.n_threads, 6);
    ck_assert_str_eq(p.isa, "avx2");
    ck_assert(p.pin);
    ck_assert(explains(&p, "8192 positions x 1 session, f16"));
}
END_TEST

START_TEST(cache_follows_type_and_sessions)
{
    struct plan p;

    ask(DENSE, 8 * GIB);
    opts.kv_type = QUANT_Q8_0;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.kv_bytes, fact("dense", "kv_8192_q8_0"));
    ask(DENSE, 8 * GIB);
    opts.n_ctx = 100;
    opts.n_seq = 3;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.n_ctx, 100);
    ck_assert_uint_eq(p.chunk_tok, 100);
    ck_assert_uint_eq(p.kv_bytes, fact("dense", "kv_100_f16_x3"));
}
END_TEST

START_TEST(budget_leaves_a_margin_unless_asked_for)
{
    struct plan p;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &p), 0);
    ck_assert_uint_eq(p.budget_bytes, 8 * GIB - 512 * MIB);
    ck_assert_int_eq(plan_make(ask(DENSE, 2 * GIB), &p), 0);
    ck_assert_uint_eq(p.budget_bytes, 2 * GIB - 256 * MIB);
    opts.ram_bytes = 2 * GIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.budget_bytes, 2 * GIB);
    opts.ram_bytes = 2 * GIB + 1;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "this machine has 2 GiB"));
    machine.ram_limit_bytes = GIB;
    opts.ram_bytes = 2 * GIB;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "allows this process 1 GiB"));
}
END_TEST

START_TEST(context_that_nobody_asked_for_is_lowered_in_the_open)
{
    struct plan wide, p;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &wide), 0);
    opts.ram_bytes = wide.total_bytes - wide.kv_bytes / 2 - wide.kv_bytes / 2 / 512; /* and page tables for it */
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.n_ctx, 4096);
    ck_assert_uint_eq(p.total_bytes, opts.ram_bytes);
    ck_assert_int_eq(p.io, PLAN_IO_URING);
    ck_assert(explains(&p, "LOWERED from 8192 to 4096"));
    opts.ram_bytes--;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.n_ctx, 4096 - 64);
}
END_TEST

START_TEST(context_asked_for_is_refused_with_the_numbers)
{
    struct plan p, untouched;
    char size[32];

    ask(DENSE, 512 * MIB);
    opts.n_ctx = 1000000;
    opts.io = PLAN_IO_URING;
    memset(&p, 7, sizeof p);
    untouched = p;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    /* 15625 pages of 131072 bytes: 2 GiB less 49.4 MiB. */
    ck_assert_ptr_nonnull(strstr(err_text(), size_format((uint64_t)15625 * 131072, size, sizeof size)));
    ck_assert_ptr_nonnull(strstr(err_text(), "1000000 positions x 1"));
    ck_assert_ptr_nonnull(strstr(err_text(), "256 MiB allowed"));
    ck_assert_ptr_nonnull(strstr(err_text(), "scratch"));
    ck_assert_int_eq(memcmp(&p, &untouched, sizeof p), 0);
    opts.io = PLAN_IO_AUTO;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
}
END_TEST

START_TEST(weights_that_do_not_fit_are_mapped_and_said_to_be)
{
    struct plan p;
    const double bytes = (double)fact("moe", "decode_bytes");

    ask(MOE, 8 * GIB);
    opts.ram_bytes = GIB;
    opts.io = PLAN_IO_MMAP;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_int_eq(p.io, PLAN_IO_MMAP);
    ck_assert_uint_eq(p.dense_bytes + p.expert_bytes, fact("moe", "mapped_bytes"));
    ck_assert_uint_gt(p.total_bytes, p.budget_bytes);
    ck_assert_uint_eq(p.n_ctx, 8192);
    ck_assert(explains(&p, "page fault (experts above all)"));
    double weights = (double)(p.dense_bytes + p.expert_bytes);
    double missing = 1 - ((double)GIB - ((double)p.total_bytes - weights)) / weights;
    ck_assert_double_eq_tol(1 / p.decode_tok_per_s, bytes / 20e9 + bytes * missing / 2e9, 1e-9);
    /* nor do the slots that a token needs: not even a chosen way of reading helps */
    opts.io = PLAN_IO_AUTO;
    opts.n_ctx = 8192;
    opts.ram_bytes = p.total_bytes - p.dense_bytes - p.expert_bytes + MIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_int_eq(p.io, PLAN_IO_MMAP);
    ck_assert_uint_eq(p.slot_ram_bytes, 0);
    opts.io = PLAN_IO_URING;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "moe does not fit"));
}
END_TEST

START_TEST(experts_that_do_not_fit_get_no_slots)
{
    static const enum plan_io ios[] = {PLAN_IO_AUTO, PLAN_IO_URING, PLAN_IO_PREAD};
    const double bytes = (double)fact("moe", "decode_bytes");
    struct plan p, back;
    char *json;

    ask(MOE, 8 * GIB);
    opts.ram_bytes = GIB;
    for (int i = 0; i < 3; i++) {
        opts.io = ios[i];
        ck_assert_int_eq(plan_make(&in, &p), 0);
        ck_assert_int_eq(p.io, i == 2 ? PLAN_IO_PREAD : PLAN_IO_URING);
        ck_assert_uint_gt(p.n_slots, 0);
        ck_assert_uint_lt(p.n_slots, p.n_slot_experts);
        ck_assert_uint_le(p.total_bytes, GIB);
        ck_assert_uint_gt(p.total_bytes, GIB - 8 * MIB); /* not a large slot more would fit */
        ck_assert_uint_eq(p.total_bytes, sum(&p));
        ck_assert_uint_eq(p.n_ctx, 8192);
    }
    ck_assert(explains(&p, "read by pread when they are wanted"));
    ck_assert(explains(&p, "get what is left of the budget"));

    /* experts' bytes of a token: all but those that are dense */
    const struct model *m = models[MOE];
    double expert = 0;
    for (int layer = 0; layer < m->hp.n_layer; layer++)
        expert += (double)m->hp.n_expert_used * (double)model_expert_bytes(m, layer);
    double memory_s = expert / 20e9, disk_s = (double)p.missed_bytes_per_tok / 2e9;
    ck_assert_double_gt(disk_s, memory_s);
    ck_assert_double_eq_tol(1 / p.decode_tok_per_s, (bytes - expert) / 20e9 + disk_s, 1e-9);
    ck_assert_double_eq_tol(p.load_s, (double)p.dense_bytes / 2e9, 1e-9);
    double missed = 1 - (double)p.n_slots / p.n_slot_experts;
    ck_assert_double_eq_tol((double)p.missed_bytes_per_tok / expert, missed, 0.02); /* slots are whole in each class */

    /* saved, read back, edited */
    ck_assert_int_eq(plan_to_json(&p, &json), 0);
    ck_assert_int_eq(plan_from_json(json, &in, &back), 0);
    ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
    char *at = strstr(json, "\"expert_ram\": ") + strlen("\"expert_ram\": ");
    *at = '1'; /* fewer, or hardly more than there were */
    memset(at + 1, '0', strspn(at + 1, "0123456789"));
    int rc = plan_from_json(json, &in, &back);
    ck_assert(rc == 0 || rc == ERR_LIMIT);
    ck_assert(rc || back.slot_ram_bytes != p.slot_ram_bytes);
    memset(at, ' ', strspn(at, "0123456789"));
    *at = '1';
    ck_assert_int_eq(plan_from_json(json, &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "1 B allowed"));
    mem_free(json);
}
END_TEST

START_TEST(slots_that_are_asked_for_are_not_made)
{
    struct plan p;

    ask(MOE, 8 * GIB);
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.slot_ram_bytes, 0);
    opts.expert_ram_bytes = p.expert_bytes / 2;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.slot_ram_bytes, opts.expert_ram_bytes);
    ck_assert_uint_le(p.expert_bytes, opts.expert_ram_bytes);
    ck_assert_uint_gt(p.n_slots, 0);
    ck_assert(explains(&p, "at most: asked for"));
    opts.io = PLAN_IO_MMAP;
    ck_assert_int_eq(plan_make(&in, &p), ERR_ARG);
    ask(DENSE, 8 * GIB);
    opts.expert_ram_bytes = MIB;
    ck_assert_int_eq(plan_make(&in, &p), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "has none"));
}
END_TEST

START_TEST(nothing_fits_in_nothing)
{
    struct plan p;

    ask(WINDOW, 8 * GIB);
    opts.ram_bytes = MIB;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "1 MiB allowed"));
    ck_assert_ptr_nonnull(strstr(err_text(), "(512 positions x 1)")); /* the shortest that a chunk fits into */
}
END_TEST

START_TEST(speed_is_bytes_over_rate)
{
    struct plan p;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &p), 0);
    ck_assert_double_eq_tol(p.decode_tok_per_s, 20e9 / (double)fact("dense", "decode_bytes"), 1e-6);
    ck_assert_double_eq_tol(p.load_s, (double)fact("dense", "held_bytes") / 2e9, 1e-9);
    /* What an older probe measured is taken, and said to be so. */
    for (int type = 0; type < QUANT_ID_END; type++)
        machine.kernels[type] = (struct machine_kernel){20e9, 100e9, 100e9, 0};
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert(explains(&p, "an older ferry's rates"));
    machine.draw_s = 1e-9;
    ck_assert(!explains(&p, "an older ferry's rates"));
    memset(machine.kernels, 0, sizeof machine.kernels);
    machine.mem_bytes_per_s = machine.disk_bytes_per_s = 0;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_double_eq(p.decode_tok_per_s, 0);
    ck_assert_double_eq(p.load_s, 0);
    ck_assert(explains(&p, "decode      not known: the rate of memory"));
}
END_TEST

START_TEST(machine_without_uring_reads_by_pread)
{
    struct plan p;

    ask(DENSE, 8 * GIB);
    machine.has_uring = false;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_int_eq(p.io, PLAN_IO_PREAD);
    ck_assert(explains(&p, "has no io_uring"));
}
END_TEST

START_TEST(op_that_the_device_lacks_is_named)
{
    struct plan p;

    lacking = OP_MOE;
    int rc = plan_make(ask(MOE, 8 * GIB), &p);
    lacking = OP_N_KIND; /* the next test may run in this process */
    ck_assert_int_eq(rc, ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "moe of layer 0, tensor blk.0.ffn_gate_exps.weight of type Q4_K"));
    lacking = OP_MOE;
    rc = plan_make(ask(DENSE, 8 * GIB), &p);
    lacking = OP_N_KIND;
    ck_assert_int_eq(rc, 0);
}
END_TEST

START_TEST(impossible_options_are_refused)
{
    struct plan p;

    ask(DENSE, 8 * GIB);
    opts.kv_type = QUANT_Q4_K;
    ck_assert_int_eq(plan_make(&in, &p), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "Q4_K"));
    opts.kv_type = QUANT_F16;
    opts.n_ctx = UINT32_MAX;
    ck_assert_int_eq(plan_make(&in, &p), ERR_ARG);
}
END_TEST

START_TEST(same_inputs_same_bytes)
{
    struct plan a, b;

    memset(&a, 0x55, sizeof a);
    memset(&b, 0xaa, sizeof b);
    ck_assert_int_eq(plan_make(ask(_i, 4 * GIB), &a), 0);
    ck_assert_int_eq(plan_make(ask(_i, 4 * GIB), &b), 0);
    ck_assert_int_eq(memcmp(&a, &b, sizeof a), 0);
}
END_TEST

/* ---- JSON ---- */

START_TEST(saved_plan_comes_back_whole)
{
    struct plan p, back;
    char *text;

    ask(_i, 8 * GIB);
    opts.kv_type = QUANT_Q8_0;
    opts.n_seq = 2;
    opts.no_pin = true;
    opts.prefill = DEVICE_PREFILL_BLAS;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    memset(&back, 0x55, sizeof back);
    ck_assert_msg(plan_from_json(text, &in, &back) == 0, "%s", err_text());
    ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
    mem_free(text);
}
END_TEST

START_TEST(plan_for_something_else_is_refused)
{
    struct plan p, back;
    char *text;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &p), 0);
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    ck_assert_int_eq(plan_from_json(text, ask(MOE, 8 * GIB), &back), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "another model"));
    ck_assert_int_eq(plan_from_json(text, ask(DENSE, 9 * GIB), &back), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "another machine"));
    /* The same machine in a tighter group. */
    ask(DENSE, 8 * GIB);
    machine.ram_limit_bytes = GIB;
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "this machine allows 1 GiB"));
    mem_free(text);
}
END_TEST

START_TEST(edited_plan_is_counted_anew)
{
    struct plan p, back;
    char *text;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &p), 0);
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    ck_assert_int_eq(plan_from_json(edited(text, "ctx", "4096"), &in, &back), 0);
    ck_assert_uint_eq(back.kv_bytes, p.kv_bytes / 2);
    ck_assert_int_eq(plan_from_json(edited(text, "total", "1"), &in, &back), 0);
    ck_assert_uint_eq(back.total_bytes, p.total_bytes);
    ck_assert_int_eq(plan_from_json(edited(text, "budget", "1000000"), &in, &back), ERR_LIMIT);
    mem_free(text);
}
END_TEST

static const struct {
    const char *key, *value, *says;
} bad[] = {
    {"ferry_plan", "2", "no plan of ferry"},
    {"threads", "0", "\"threads\""},
    {"ctx", "-1", "\"ctx\""},
    {"ctx", "1e99", "\"ctx\""},
    {"ctx", "3000000000", "\"ctx\""},
    {"chunk_tok", "9000", "chunk_tok 9000"},
    {"logit_rows", "9000", "logit_rows"},
    {"kv_type", "\"q4_0\"", "\"q4_0\""},
    {"io", "\"auto\"", "\"auto\""},
    {"prefill", "null", "missing"},
    {"router_skew", "-1", "\"router_skew\""},
    {"router_skew", "\"much\"", "\"router_skew\""},
    {"isa", "7", "\"isa\""},
    {"isa", "\"0123456789abcdef\"", "\"isa\""},
    {"pin", "1", "\"pin\""},
    {"budget", "\"8G\"", "\"budget\""},
    {"model_id", "null", "\"model_id\""},
};

START_TEST(bad_field_is_named)
{
    struct plan p, back;
    char *text;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &p), 0);
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    ck_assert_int_eq(plan_from_json(edited(text, bad[_i].key, bad[_i].value), &in, &back), ERR_FORMAT);
    ck_assert_msg(strstr(err_text(), bad[_i].says) != NULL, "%s", err_text());
    mem_free(text);
}
END_TEST

START_TEST(cut_text_is_no_plan)
{
    struct plan p, back;
    char *text;

    ck_assert_int_eq(plan_make(ask(DENSE, 8 * GIB), &p), 0);
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    for (size_t n = strlen(text); n-- > 0;) {
        text[n] = '\0';
        ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_FORMAT);
    }
    mem_free(text);
}
END_TEST

START_TEST(no_memory_leaks_nothing)
{
    struct plan p;
    char *text = NULL, *words = NULL;

    ask(MOE, 8 * GIB);
    for (uint64_t n = 1;; n++) {
        uint64_t meta_bytes = mem_live_bytes(MEM_META), other_bytes = mem_live_bytes(MEM_OTHER);
        mem_fail_nth(n);
        int rc = plan_make(&in, &p);
        if (!rc)
            rc = plan_to_json(&p, &text);
        if (!rc)
            rc = plan_explain(&p, &in, &words);
        if (!rc)
            rc = plan_from_json(text, &in, &p);
        mem_free(text);
        mem_free(words);
        text = words = NULL;
        ck_assert_uint_eq(mem_live_bytes(MEM_META), meta_bytes);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), other_bytes);
        if (!rc)
            break;
        ck_assert_int_eq(rc, ERR_NOMEM);
        ck_assert_uint_lt(n, 1000);
    }
    mem_fail_nth(0);
}
END_TEST

/* ---- traces, nodes ---- */

/* What a trace is kept in is memory like any other: slots give way to it. A saved plan stays what it is, and the trace lies beside its
 * budget, but for nothing else, and not beyond what the machine has. */
START_TEST(trace_stands_outside_the_budget)
{
    struct plan p, without, back;
    char *text;

    ask(MOE, GIB);
    opts.expert_ram_bytes = 0;
    ck_assert_int_eq(plan_make(&in, &without), 0);
    opts.trace_bytes = 26 * MIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    ck_assert_uint_eq(p.trace_bytes, 26 * MIB);
    ck_assert_uint_eq(p.total_bytes, sum(&p));
    ck_assert_uint_le(p.total_bytes, p.budget_bytes);
    ck_assert(explains(&p, "traces"));
    opts.ram_bytes = without.total_bytes; /* full to the last byte */
    opts.trace_bytes = 0;
    ck_assert_int_eq(plan_make(&in, &without), 0);
    ck_assert_int_eq(plan_to_json(&without, &text), 0);
    ck_assert_int_eq(plan_from_json(text, &in, &back), 0);
    opts.trace_bytes = 26 * MIB;
    machine.ram_limit_bytes = without.total_bytes + 26 * MIB;
    ck_assert_int_eq(plan_from_json(text, &in, &back), 0);
    ck_assert_uint_eq(back.slot_ram_bytes, without.slot_ram_bytes);
    ck_assert_uint_eq(back.n_ctx, without.n_ctx);
    ck_assert_uint_eq(back.budget_bytes, without.total_bytes + 26 * MIB);
    machine.ram_limit_bytes--;
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "traces"));
    machine.ram_limit_bytes = UINT64_MAX;
    char budget[32];
    snprintf(budget, sizeof budget, "%" PRIu64, without.total_bytes - 1);
    ck_assert_int_eq(plan_from_json(edited(text, "budget", budget), &in, &back), ERR_LIMIT);
    mem_free(text);
}
END_TEST

START_TEST(weights_lie_on_other_nodes_than_the_cores)
{
    static const struct {
        int n_numa;
        uint64_t nodes;
        enum plan_io io;
        enum plan_numa want;
        const char *says; /* NULL: nothing */
    } rows[] = {
        {1, 1, PLAN_IO_PREAD, PLAN_NUMA_LEFT, NULL},
        {2, 3, PLAN_IO_PREAD, PLAN_NUMA_INTERLEAVED, "NUMA       2 nodes; weights in memory: in turn on nodes 0 1\n"},
        {4, 12, PLAN_IO_URING, PLAN_NUMA_INTERLEAVED, "in turn on nodes 2 3\n"},
        {2, 2, PLAN_IO_PREAD, PLAN_NUMA_BOUND, "weights in memory: on node 1\n"},
        {2, 3, PLAN_IO_MMAP, PLAN_NUMA_LEFT, "left to the system, as mapped files are\n"},
        {2, 0, PLAN_IO_PREAD, PLAN_NUMA_LEFT, "left to the system, which does not let this process place memory\n"},
    };
    struct plan p, back;
    char *text;

    ask(MOE, 8 * GIB);
    machine.n_numa = rows[_i].n_numa;
    machine.numa_nodes = rows[_i].nodes;
    opts.io = rows[_i].io;
    ck_assert_msg(plan_make(&in, &p) == 0, "%s", err_text());
    ck_assert_int_eq(p.numa, rows[_i].want);
    ck_assert_uint_eq(p.numa_nodes, rows[_i].want == PLAN_NUMA_LEFT ? 0 : rows[_i].nodes);
    ck_assert(explains(&p, rows[_i].says ? rows[_i].says : "compute"));
    ck_assert(rows[_i].says || !explains(&p, "NUMA"));
    ck_assert_int_eq(plan_to_json(&p, &text), 0);
    ck_assert_int_eq(plan_from_json(text, &in, &back), 0);
    ck_assert_int_eq(memcmp(&p, &back, sizeof p), 0);
    mem_free(text);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("plan");
    TCase *t = tcase_create("plan");

    tcase_add_unchecked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, every_byte_has_a_purpose, 0, N_MODELS);
    tcase_add_test(t, cache_follows_type_and_sessions);
    tcase_add_test(t, budget_leaves_a_margin_unless_asked_for);
    tcase_add_test(t, context_that_nobody_asked_for_is_lowered_in_the_open);
    tcase_add_test(t, context_asked_for_is_refused_with_the_numbers);
    tcase_add_test(t, weights_that_do_not_fit_are_mapped_and_said_to_be);
    tcase_add_test(t, experts_that_do_not_fit_get_no_slots);
    tcase_add_test(t, slots_that_are_asked_for_are_not_made);
    tcase_add_test(t, nothing_fits_in_nothing);
    tcase_add_test(t, speed_is_bytes_over_rate);
    tcase_add_test(t, machine_without_uring_reads_by_pread);
    tcase_add_test(t, op_that_the_device_lacks_is_named);
    tcase_add_test(t, impossible_options_are_refused);
    tcase_add_loop_test(t, same_inputs_same_bytes, 0, N_MODELS);
    tcase_add_loop_test(t, saved_plan_comes_back_whole, 0, N_MODELS);
    tcase_add_test(t, plan_for_something_else_is_refused);
    tcase_add_test(t, edited_plan_is_counted_anew);
    tcase_add_loop_test(t, bad_field_is_named, 0, (int)(sizeof bad / sizeof *bad));
    tcase_add_test(t, cut_text_is_no_plan);
    tcase_add_test(t, no_memory_leaks_nothing);
    tcase_add_test(t, trace_stands_outside_the_budget);
    tcase_add_loop_test(t, weights_lie_on_other_nodes_than_the_cores, 0, 6);
    suite_add_tcase(s, t);
    return run_suite(s);
}
