/* Plans for machines that do not exist, of models without weights. What they must say comes from arithmetic in
 * tests/gen/plan_heads.py. */
#include "src/plan/plan.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/plan/cost.h"
#include "src/run/cache.h"
#include "src/run/store.h"

#include <check.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const names[] = {"dense", "moe", "window"};
enum { DENSE, MOE, WINDOW, N_MODELS };

static struct model *models[N_MODELS];

static uint64_t fact(const char *name, const char *key)
{
    char path[512], line[128], word[64];
    uint64_t value;

    snprintf(path, sizeof path, "%s/plan/%s.txt", TEST_DATA_DIR, name);
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "%63s %" SCNu64, word, &value) == 2 && !strcmp(word, key)) {
            fclose(f);
            return value;
        }
    }
    ck_abort_msg("%s has no %s", path, key);
}

/* The head, and a hole where the weights would be. */
static struct model *open_model(const char *name)
{
    char from[512], to[] = TEST_BUILD_DIR "/t_plan-XXXXXX", buf[16384];
    struct model *m = NULL;

    snprintf(from, sizeof from, "%s/plan/%s.head", TEST_DATA_DIR, name);
    FILE *f = fopen(from, "rb");
    ck_assert_ptr_nonnull(f);
    size_t n = fread(buf, 1, sizeof buf, f);
    fclose(f);
    int fd = mkstemp(to);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, buf, n), (ssize_t)n);
    ck_assert_int_eq(ftruncate(fd, (off_t)fact(name, "file_bytes")), 0);
    close(fd);
    int rc = model_open(to, NULL, &m);
    unlink(to);
    ck_assert_msg(rc == 0, "%s: %s", name, err_text());
    return m;
}

static void setup(void)
{
    for (int i = 0; i < N_MODELS; i++)
        models[i] = open_model(names[i]);
}

static void teardown(void)
{
    for (int i = 0; i < N_MODELS; i++)
        model_close(models[i]);
}

/* ---- a device and a machine ---- */

static enum op_kind lacking = OP_N_KIND;

static bool can(const struct op *op)
{
    return op->kind != lacking;
}

static uint64_t scratch_bytes(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    (void)ops;
    (void)n_ops;
    return (uint64_t)n_rows * 100 + (uint64_t)n_threads * 10000;
}

static const struct device_ops device = {.name = "cpu", .can = can, .scratch_bytes = scratch_bytes};

static struct machine machine_of(uint64_t ram_bytes)
{
    struct machine m = {.cpu_name = "Invented 9000",
                        .isa = "avx2",
                        .n_cores = 6,
                        .n_numa = 1,
                        .ram_total_bytes = ram_bytes,
                        .ram_limit_bytes = UINT64_MAX,
                        .ram_free_bytes = ram_bytes,
                        .memlock_bytes = 8 * MIB,
                        .has_uring = true,
                        .mem_bytes_per_s = 20e9,
                        .disk_bytes_per_s = 2e9};
    machine_identify(&m);
    return m;
}

static struct machine machine;
static struct plan_opts opts;
static struct plan_in in;

static struct plan_in *ask(int model, uint64_t ram_bytes)
{
    machine = machine_of(ram_bytes);
    opts = (struct plan_opts){0};
    in = (struct plan_in){&machine, models[model], &opts, &device, NULL};
    return &in;
}

static uint64_t sum(const struct plan *p)
{
    return p->dense_bytes + p->expert_bytes + p->kv_bytes + p->scratch_bytes + p->stage_bytes + p->meta_bytes +
           p->trace_bytes;
}

static bool explains(const struct plan *p, const char *words)
{
    char *text;

    ck_assert_int_eq(plan_explain(p, &in, &text), 0);
    bool found = strstr(text, words) != NULL;
    if (!found)
        fprintf(stderr, "no \"%s\" in:\n%s", words, text);
    mem_free(text);
    return found;
}

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
    ck_assert_int_eq(model_kv_shape(models[_i], QUANT_F16, &shape, NULL), 0);
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

/* The saved plan with the text after "key": replaced up to the end of its line. */
static char *edited(const char *text, const char *key, const char *value)
{
    static char out[8192];
    char word[64];

    snprintf(word, sizeof word, "\"%s\": ", key);
    const char *at = strstr(text, word);
    ck_assert_msg(at != NULL, "no %s", word);
    size_t n = (size_t)(at - text) + strlen(word);
    const char *rest = text + n + strcspn(text + n, ",\n");
    snprintf(out, sizeof out, "%.*s%s%s", (int)n, text, value, rest);
    return out;
}

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

/* ---- with a GPU ---- */

/* 3 layers of 128 experts: gate and up 2048 x 768 of Q4_K (144 bytes for 256), down 768 x 2048 of Q6_K (210). */
enum { N_EXPERTS = 384 };
#define EXPERT_BYTES ((uint64_t)2048 * 768 / 256 * (144 + 144 + 210))
#define GPU_OWN_BYTES 70000
#define GPU_ALLOCS 3

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
    return (uint64_t)n_rows * 1000 + 1;
}

/* What a trace is kept in is memory like any other: slots give way to it, and a saved plan that is full has no room for it. */
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
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "traces"));
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

static const struct device_ops gpu = {
    .name = "gpu", .can = can, .scratch_bytes = gpu_scratch_bytes, .own_bytes = gpu_own_bytes};

static struct plan_in *ask_gpu(int model, uint64_t ram_bytes, uint64_t vram_bytes)
{
    ask(model, ram_bytes);
    in.gpu = &gpu;
    opts.vram_bytes = vram_bytes;
    return &in;
}

static uint64_t gpu_sum(const struct plan *p)
{
    const struct plan_gpu *g = &p->gpu;
    return g->dense_bytes + g->expert_bytes + g->landing_bytes + g->kv_bytes + g->scratch_bytes + g->own_bytes;
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
    /* The host has room for all others, and nothing of what is there. */
    ck_assert_uint_eq(p.n_slots, N_EXPERTS - p.gpu.n_experts);
    ck_assert_uint_eq(p.n_slot_experts, p.n_slots);
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
    /* a row of logits; but it still looks at which experts a step wants: 8 numbers a row */
    uint64_t logits_bytes = (uint64_t)in.model->hp.n_vocab * sizeof(float);
    ck_assert_uint_eq(less.scratch_bytes,
                      size_up(logits_bytes, 4096) + size_up(less.chunk_tok * 8 * sizeof(int32_t), 4096));
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
    /* Of less than two segments of it the GPU has to hold all. */
    opts.n_ctx = 512;
    opts.vram_bytes = 4 * GIB;
    ck_assert_int_eq(plan_make(&in, &p), 0);
    opts.vram_bytes = p.gpu.total_bytes - 1;
    ck_assert_int_eq(plan_make(&in, &p), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), size_format(fact("dense", "kv_8192_f16") / 16, size, sizeof size)));
    ck_assert_ptr_nonnull(strstr(err_text(), "does not fit GPU 0"));
    opts.n_ctx = 0;
    opts.vram_bytes = MIB;
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
    uint64_t down = 3 * (8 * 4 + 2048 * 4) + (uint64_t)models[MOE]->hp.n_vocab * 4;
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
    ck_assert_int_eq(plan_from_json(edited(text, "reads_in_flight", "2"), &in, &back), ERR_FORMAT);
    machine.vram_total_bytes = GIB;
    machine.vram_free_bytes = 100 * MIB;
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "100 MiB free"));
    in.gpu = NULL;
    ck_assert_int_eq(plan_from_json(text, &in, &back), ERR_UNSUPPORTED);
    mem_free(text);
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
    int rc = ERR_NOMEM;

    ask_gpu(MOE, 8 * GIB, 512 * MIB);
    uint64_t live_bytes = mem_live_bytes(MEM_META);
    for (uint64_t n = 1; rc; n++) {
        mem_fail_nth(n);
        rc = plan_make(&in, &p);
        ck_assert(rc == 0 || rc == ERR_NOMEM);
        ck_assert_uint_eq(mem_live_bytes(MEM_META), live_bytes);
        ck_assert_uint_lt(n, 1000);
    }
    mem_fail_nth(0);
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
    tcase_add_test(t, every_byte_of_a_gpu_has_a_purpose);
    tcase_add_test(t, gpu_gets_another_number_of_experts_than_fits);
    tcase_add_test(t, gpu_that_is_too_small_is_refused_with_the_numbers);
    tcase_add_test(t, cache_beyond_a_gpu_is_not_shared);
    tcase_add_test(t, pages_come_up_for_other_rows_than_pays);
    tcase_add_test(t, speed_with_a_gpu_is_another);
    tcase_add_test(t, saved_plan_with_a_gpu_comes_back_another);
    tcase_add_test(t, other_plans_forget_the_gpu);
    tcase_add_test(t, no_memory_with_a_gpu_leaks_something);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
