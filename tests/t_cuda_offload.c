/* Experts that are copied to the emulated GPU for a step: no bit of the logits may differ from the CPU's, whichever way experts go, in
 * whichever order streams run, and whatever fails. */
#include "tests/cuda_engine.h"
#include "tests/run_suite.h"

#include "src/base/clock.h"
#include "src/base/mem.h"

#include <unistd.h>

static const char *const moe_models[] = {
    "qwen2moe",  "qwen3moe",      "qwen3moe-fused", "mixtral",    "dots1",        "olmoe",       "mixed",
    "gpt-oss",   "gpt-oss-mxfp4", "glm4moe",        "minimax-m2", "ernie4_5-moe", "hunyuan-moe", "qwen3vlmoe",
    "deepseek2", "deepseek2-old", "bailingmoe2",    "qwen3next",  "qwen35moe"};
enum { N_MOE_MODELS = sizeof moe_models / sizeof *moe_models };

static char plan_path[] = TEST_BUILD_DIR "/t_cuda_offload-XXXXXX";

static void leave(void)
{
    unlink(plan_path);
}

/* Options of a saved plan by which the GPU holds so many quarters of the experts and has n_landing places for others. (These models'
 * experts together are smaller than what the driver rounds up by, so that no --vram would give such a plan.) */
static struct ferry_engine_opts copying_of(const char *name, const char *io, int quarters, int n_landing,
                                           const char *copies)
{
    struct ferry_engine_opts o = split_of(name, 0), saved = copies_nothing(NULL);
    char *text;

    o.io = io;
    struct ferry_engine *e = open_with(name, &o);
    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    ferry_engine_close(e);
    emu_set_vram(SIZE_MAX);
    json_t *plan = json_loads(text, 0, NULL), *gpu = json_object_get(plan, "gpu"),
           *bytes = json_object_get(gpu, "bytes");
    ferry_free(text);
    json_int_t n_all = json_integer_value(json_object_get(gpu, "of_experts"));
    json_int_t budget = json_integer_value(json_object_get(bytes, "budget")) + (json_int_t)(16 * MIB);
    json_object_set_new(gpu, "experts", json_integer(n_all * quarters / 4));
    json_object_set_new(gpu, "landings", json_integer(n_landing));
    json_object_set_new(gpu, "copies", json_string(copies));
    json_object_set_new(gpu, "pin", json_integer(n_landing % 2 ? 1 << 30 : 0));
    json_object_set_new(bytes, "budget", json_integer(budget));
    if (plan_path[strlen(plan_path) - 1] == 'X')
        close(mkstemp(plan_path));
    ck_assert_int_eq(json_dump_file(plan, plan_path, 0), 0);
    json_decref(plan);
    saved.device = "cuda:0";
    saved.plan_path = plan_path;
    return saved;
}

/* All misses are copied: the CPU computes none. */
START_TEST(copied_experts_change_bits)
{
    const char *name = moe_models[_i];
    struct ferry_engine_opts cpu = copies_nothing("cpu");
    float *want = logits_of(name, &cpu);

    /* 1 to 3 landings are fewer than a layer has experts: places are used again in it. */
    struct ferry_engine_opts gpu = copying_of(name, "pread", _i % 3, 1 + _i % 3, "always");
    float *got = logits_of(name, &gpu);
    must_equal(want, got, name);
    ck_assert_uint_gt(last_stats.copied_experts, 0);
    ck_assert_uint_eq(last_stats.host_expert_rows, 0);
    ck_assert_uint_eq(last_stats.cpu_experts, 0);
    ck_assert_uint_gt(last_stats.copy_bytes, 0);
    ck_assert_int_eq(emu_n_live(), 0);
    free(got);
    free(want);
}
END_TEST

static float *want_of(const char *name)
{
    struct ferry_engine_opts cpu = copies_nothing("cpu");
    return logits_of(name, &cpu);
}

/* Half of the experts lie on the GPU, the host has slots for all, misses are copied through n_landing places. */
static struct rooms_args copying_rooms(enum plan_io io, int n_landing, enum plan_copies copies)
{
    return (struct rooms_args){.name = "qwen3moe",
                               .quarters = 2,
                               .io = io,
                               .slot_bytes = 16 * 24 * KIB,
                               .n_landing = n_landing,
                               .copies = copies};
}

START_TEST(order_of_streams_changes_bits_of_copied_experts)
{
    float *want = want_of("qwen3moe"), *got = malloc(sizeof(float) * N_TOK * N_VOCAB);

    for (uint64_t seed = 1; seed < 9; seed++) {
        struct rooms_args a = copying_rooms(PLAN_IO_URING, 1 + (int)seed % 4, PLAN_COPIES_ALWAYS);
        a.pin_bytes = seed % 2 ? GIB : 0;
        make_rooms(&a);
        emu_seed(seed);
        emu_in_step(true);
        ck_assert_int_eq(session_logits(rooms.session, ids, PREFILL, true, got), 0);
        ck_assert_int_eq(session_logits(rooms.session, ids + PREFILL, N_TOK - PREFILL, false, got + PREFILL * N_VOCAB),
                         0);
        emu_in_step(false);
        must_equal(want, got, "qwen3moe");
        leave_rooms();
    }
    free(got);
    free(want);
}
END_TEST

/* Slots for few of the experts, copied from where they lie: a slot that is filled again while a copy reads it changes bits. */
START_TEST(slot_that_is_copied_from_is_filled_again)
{
    float *want = want_of("qwen3moe"), *got = malloc(sizeof(float) * N_TOK * N_VOCAB);

    for (uint64_t seed = 1; seed < 7; seed++) {
        struct rooms_args a = copying_rooms(seed % 2 ? PLAN_IO_URING : PLAN_IO_PREAD, 3,
                                            seed % 3 ? PLAN_COPIES_ALWAYS : PLAN_COPIES_AUTO);
        struct exec_stats stats;
        a.quarters = 0;
        a.slot_bytes = 8 * 24 * KIB;
        a.pin_bytes = GIB;
        make_rooms(&a);
        emu_seed(seed);
        ck_assert_int_eq(session_logits(rooms.session, ids, 40, true, got), 0);
        ck_assert_int_eq(session_logits(rooms.session, ids + 40, 40, false, got + 40 * N_VOCAB), 0);
        ck_assert_mem_eq(want, got, 80 * N_VOCAB * sizeof *got);
        exec_stats(rooms.exec, &stats);
        ck_assert(a.copies == PLAN_COPIES_AUTO || stats.landing.n_direct > 10);
        ck_assert(a.copies == PLAN_COPIES_AUTO || stats.landing.n_direct < stats.landing.n_copies);
        leave_rooms();
    }
    free(got);
    free(want);
}
END_TEST

/* A system that pins nothing: everything takes the detour, and says so. */
START_TEST(refused_pin_is_an_error)
{
    float *want = want_of("qwen3moe"), got[12 * N_VOCAB];
    struct rooms_args a = copying_rooms(PLAN_IO_PREAD, 2, PLAN_COPIES_ALWAYS);
    struct store_stats store;
    struct exec_stats stats;

    a.pin_bytes = GIB;
    emu_set_pinned(_i ? SIZE_MAX : 4096);
    make_rooms(&a);
    ck_assert_int_eq(session_logits(rooms.session, ids, 12, true, got), 0);
    ck_assert_mem_eq(want, got, sizeof got);
    store_stats(rooms.store, &store);
    exec_stats(rooms.exec, &stats);
    ck_assert(_i ? store.pinned_bytes > 0 : store.pinned_bytes == 0);
    ck_assert(_i ? stats.landing.n_direct > 0 : stats.landing.n_direct == 0);
    ck_assert_uint_gt(stats.landing.n_copies, 0);
    leave_rooms();
    free(want);
}
END_TEST

/* A prompt's next layer will want nearly all experts: those that are in memory travel while its router is waited for, and are found
 * there. */
START_TEST(next_layers_experts_are_not_sent_ahead)
{
    float *want = want_of("qwen3moe"), *got = malloc(sizeof(float) * N_TOK * N_VOCAB);
    struct rooms_args a = copying_rooms(PLAN_IO_URING, 8, PLAN_COPIES_ALWAYS);
    struct exec_stats first, second;

    make_rooms(&a);
    ck_assert_int_eq(session_logits(rooms.session, ids, 64, true, got), 0);
    ck_assert_mem_eq(want, got, 64 * N_VOCAB * sizeof *got);
    exec_stats(rooms.exec, &first); /* the first chunk found the slots empty */
    ck_assert_int_eq(session_logits(rooms.session, ids + 64, 64, true, got), 0);
    ck_assert_mem_eq(want + 64 * N_VOCAB, got, 64 * N_VOCAB * sizeof *got);
    exec_stats(rooms.exec, &second);
    ck_assert_uint_gt(second.landing.n_ahead, first.landing.n_ahead);
    ck_assert_uint_gt(second.landing.n_ahead_found, first.landing.n_ahead_found);
    ck_assert_uint_le(second.landing.n_ahead_found, second.landing.n_ahead);
    leave_rooms();
    a.copies = PLAN_COPIES_NEVER; /* whoever copies nothing sends nothing ahead */
    make_rooms(&a);
    ck_assert_int_eq(session_logits(rooms.session, ids, 128, true, got), 0);
    exec_stats(rooms.exec, &first);
    ck_assert_uint_eq(first.landing.n_copies, 0);
    leave_rooms();
    free(got);
    free(want);
}
END_TEST

/* A token's next layer is guessed at, to be read ahead, only where experts are on disk (its hint shows in what is counted of guesses), and
 * to be sent ahead only where copies are made. */
START_TEST(router_is_not_asked_for_experts_on_disk)
{
    static float got[N_VOCAB];
    struct rooms_args a = copying_rooms(PLAN_IO_URING, 2, _i ? PLAN_COPIES_ALWAYS : PLAN_COPIES_NEVER);
    struct store_stats before, after;

    a.slot_bytes = 6 * 24 * KIB; /* less than what the device has not */
    make_rooms(&a);
    store_stats(rooms.store, &before);
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(session_logits(rooms.session, ids + i, 1, false, got), 0);
    store_stats(rooms.store, &after);
    ck_assert_uint_gt(after.n_guessed, before.n_guessed);
    leave_rooms();
}
END_TEST

/* Where there is room for all that the device has not, they are there before the first token. */
START_TEST(router_is_asked_in_vain)
{
    static float got[64 * N_VOCAB];
    float *want = want_of("qwen3moe");
    struct rooms_args a = copying_rooms(PLAN_IO_URING, 2, _i ? PLAN_COPIES_ALWAYS : PLAN_COPIES_NEVER);
    struct store_stats before, after;
    struct exec_stats first, second;

    a.slot_bytes = 16 * 24 * KIB;
    make_rooms(&a);
    store_stats(rooms.store, &before);
    ck_assert_uint_eq(before.disk_bytes, 0);
    ck_assert_uint_eq(before.n_expert_misses, 0);
    for (int layer = 0; layer < rooms.model->hp.n_layer; layer++)
        ck_assert_int_eq(store_n_on_disk(rooms.store, layer), 0);
    ck_assert_int_eq(session_logits(rooms.session, ids, 64, true, got), 0);
    ck_assert_mem_eq(want, got, 64 * N_VOCAB * sizeof *got);
    exec_stats(rooms.exec, &first);
    for (int i = 64; i < 80; i++) {
        ck_assert_int_eq(session_logits(rooms.session, ids + i, 1, false, got), 0);
        ck_assert_mem_eq(want + i * N_VOCAB, got, N_VOCAB * sizeof *got);
        if (i == 64)
            store_stats(rooms.store, &before); /* the prompt's last hint is forgotten by now */
    }
    exec_stats(rooms.exec, &second);
    store_stats(rooms.store, &after);
    ck_assert_uint_eq(after.n_guessed, before.n_guessed);
    ck_assert(_i ? second.landing.n_ahead > first.landing.n_ahead : second.landing.n_ahead == 0);
    ck_assert(!_i || second.landing.n_ahead_found > first.landing.n_ahead_found);
    leave_rooms();
    free(want);
}
END_TEST

/* With one place, each copy but the first waits until the experts before it were read, and each expert until its copy is there. A wait
 * that is left out has to be seen, in some order of the streams. */
START_TEST(dropped_wait_of_a_copy_is_not_seen)
{
    enum { N_SEEDS = 48, N_ROWS = 12 };
    float *want = want_of("qwen3moe"), got[N_ROWS * N_VOCAB];
    struct rooms_args a = copying_rooms(PLAN_IO_PREAD, 1, PLAN_COPIES_ALWAYS);
    int n_wrong = 0;

    a.quarters = 0; /* the GPU has nothing else to do before */
    for (uint64_t seed = 1; seed <= N_SEEDS; seed++) {
        make_rooms(&a);
        emu_seed(seed);
        emu_drop_wait(1 + _i);
        ck_assert_int_eq(session_logits(rooms.session, ids, N_ROWS, true, got), 0);
        emu_drop_wait(0);
        n_wrong += memcmp(got, want, sizeof got) != 0;
        leave_rooms();
    }
    ck_assert_int_gt(n_wrong, 0);
    free(want);
}
END_TEST

/* ---- what fails ---- */

START_TEST(failed_call_at_open_with_landings_leaves_something)
{
    struct ferry_engine_opts gpu = copying_of("qwen3moe", "pread", 2, 3, "always");
    int rc = -1, n = 1;

    for (bool failed = true; failed; n++) { /* a refused pin is no error: so it goes on until no call is the nth */
        struct ferry_engine *e;
        emu_fail_nth(n);
        rc = try_open("qwen3moe", &gpu, &e);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == FERRY_ERR_NOMEM || rc == FERRY_ERR_DEVICE);
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_int_gt(n, 20);
    rc = -1;
    for (uint64_t i = 1; rc < 0; i++) {
        struct ferry_engine *e;
        mem_fail_nth(i);
        rc = try_open("qwen3moe", &gpu, &e);
        mem_fail_nth(0);
        ck_assert(rc == 0 || rc == FERRY_ERR_NOMEM);
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
        for (int tag = 0; tag < MEM_N_TAG; tag++)
            ck_assert_uint_eq(mem_live_bytes((enum mem_tag)tag), 0);
    }
}
END_TEST

/* Every call of a step fails once: it is told, and the session then goes on as if nothing had been, with places whose content nobody
 * trusts. */
START_TEST(failed_call_of_a_copying_step_spoils_the_session)
{
    float *want = want_of("qwen3moe"), got[10 * N_VOCAB];
    struct rooms_args a = copying_rooms(PLAN_IO_URING, 2, PLAN_COPIES_ALWAYS);
    int rc = -1, n = 1, n_failed = 0;

    a.pin_bytes = _i ? GIB : 0;
    make_rooms(&a);
    emu_seed((uint64_t)_i + 1);
    ck_assert_int_eq(session_logits(rooms.session, ids, 10, true, got), 0);
    for (; rc < 0 || n < 30; n += n < 60 ? 1 : 7) {
        int n_rows = 4 - n % 3;
        ck_assert_int_eq(session_truncate(rooms.session, 10), 0);
        emu_fail_nth(n);
        rc = session_logits(rooms.session, ids + 10, n_rows, true, got);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_DEVICE);
        n_failed += rc < 0;
        if (rc < 0 && n % 3) {
            ck_assert_int_eq(session_truncate(rooms.session, 10), 0);
            ck_assert_int_eq(session_logits(rooms.session, ids + 10, n_rows, true, got), 0);
        }
        if (rc == 0 || n % 3)
            ck_assert_mem_eq(want + 10 * N_VOCAB, got, (size_t)n_rows * N_VOCAB * sizeof *got);
    }
    ck_assert_int_gt(n_failed, 60);
    leave_rooms();
    free(want);
}
END_TEST

/* ---- by the clock ---- */

/* The virtual device: 1 GB/s up and down, a microsecond for each copy and each kernel. The CPU takes its own time for each expert. */
static uint64_t cpu_expert_ns;

static int cpu_run(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    emu_host_works(cpu_expert_ns * (uint64_t)ops[0].p.moe.n_experts);
    return cpu_device_ops.run(dev, ops, n_ops, rows);
}

static void set_clock(uint64_t op_ns, uint64_t expert_ns)
{
    const struct emu_rates rates = {.bytes_per_s = {[EMU_UP] = 1e9, [EMU_DOWN] = 1e9, [EMU_COMPUTE] = 100e9},
                                    .op_ns = op_ns};
    emu_clock(&rates);
    cpu_expert_ns = expert_ns;
}

/* Generate so many tokens; each has the CPU's bits. */
static void run_tokens(const float *want, int from, int to)
{
    static float got[N_VOCAB];

    for (int i = from; i < to; i++) {
        ck_assert_int_eq(session_logits(rooms.session, ids + i, 1, false, got), 0);
        ck_assert_mem_eq(want + i * N_VOCAB, got, sizeof got);
    }
}

/* An expert's copy takes some 5 us, and computing it a dozen kernels. A CPU that needs 1 us computes all; one that needs 15 shares them
 * with the GPU; one that needs 2000 gets none. What is predicted for a layer is what it takes, within a fifth: the GPU's calls differ by
 * what kernels they launch. */
START_TEST(choice_is_not_what_the_clock_says)
{
    static const uint64_t expert_ns[] = {1000, 15000, 2000000};
    float *want = want_of("qwen3moe");
    struct rooms_args a = copying_rooms(PLAN_IO_PREAD, 4, PLAN_COPIES_AUTO);
    struct exec_stats from, to;

    a.clock = emu_now_ns;
    a.cpu_run = cpu_run;
    set_clock(1000, expert_ns[_i]);
    make_rooms(&a);
    run_tokens(want, 0, 30);
    exec_stats(rooms.exec, &from);
    run_tokens(want, 30, 60);
    exec_stats(rooms.exec, &to);
    uint64_t n_copied = to.split.n_copied - from.split.n_copied, n_cpu = to.split.n_cpu - from.split.n_cpu;
    double ratio = (to.split.predicted_s - from.split.predicted_s) / (to.split.measured_s - from.split.measured_s);
    ck_assert_uint_gt(n_copied + n_cpu, 20);
    ck_assert_msg(_i == 0 ? n_copied == 0 : n_copied > 0, "%d copied", (int)n_copied);
    ck_assert_msg(_i == 2 ? n_cpu == 0 : n_cpu > 0, "%d by the CPU", (int)n_cpu);
    ck_assert_msg(ratio > 0.8 && ratio < 1.2, "predicted %g of what was measured", ratio);
    emu_clock(NULL);
    leave_rooms();
    free(want);
}
END_TEST

/* A machine whose PCIe gets slow while it runs: copies end, by what they are seen to take. */
START_TEST(slow_link_is_not_noticed)
{
    float *want = want_of("qwen3moe");
    struct rooms_args a = copying_rooms(PLAN_IO_PREAD, 4, PLAN_COPIES_AUTO);
    struct exec_stats at[3];

    a.clock = emu_now_ns;
    a.cpu_run = cpu_run;
    set_clock(1000, 100000);
    make_rooms(&a);
    run_tokens(want, 0, 20);
    exec_stats(rooms.exec, &at[0]);
    emu_clock(&(struct emu_rates){.bytes_per_s = {[EMU_UP] = 1e7, [EMU_DOWN] = 1e9}, .op_ns = 1000});
    run_tokens(want, 20, 50);
    exec_stats(rooms.exec, &at[1]);
    run_tokens(want, 50, 64);
    exec_stats(rooms.exec, &at[2]);
    ck_assert_uint_gt(at[0].split.n_copied, 10);
    /* Each one that is still made, because three misses together are worth a try, says again what it costs. */
    ck_assert_uint_le(at[2].split.n_copied - at[1].split.n_copied, 2);
    emu_clock(NULL);
    leave_rooms();
    free(want);
}
END_TEST

/* A GPU whose every kernel takes a millisecond beside a CPU that needs nothing for an expert: it is left out, and says so; the other
 * way round it is not. Words are the same. */
START_TEST(gpu_that_loses_goes_on)
{
    float *want = want_of("qwen3moe");
    struct rooms_args a = copying_rooms(PLAN_IO_PREAD, 2, PLAN_COPIES_AUTO);
    struct exec_stats stats, later;
    bool is_slow = _i == 0;

    a.clock = emu_now_ns;
    a.cpu_run = cpu_run;
    set_clock(is_slow ? 1000000 : 10, is_slow ? 10 : 1000000);
    make_rooms(&a);
    run_tokens(want, 0, 130);
    exec_stats(rooms.exec, &stats);
    ck_assert(stats.tier.is_off == is_slow);
    ck_assert_uint_eq(stats.tier.n_changes, is_slow);
    ck_assert_uint_ge(stats.tier.n_trials, 1);
    ck_assert(!is_slow || stats.tier.off_s < stats.tier.on_s);
    run_tokens(want, 130, N_TOK);
    exec_stats(rooms.exec, &later);
    ck_assert(is_slow == (later.split.n_gpu == stats.split.n_gpu));
    emu_clock(NULL);
    leave_rooms();
    free(want);
}
END_TEST

/* Each kernel takes a millisecond, what the CPU computes no time. Whoever asks is told once. */
START_TEST(news_of_the_gpu_are_not_told)
{
    struct ferry_engine_opts gpu = copying_of("qwen3moe", "pread", 3, 2, "auto");
    set_clock(1000000, 0);
    clock_pretend(emu_now_ns);
    struct ferry_engine *e = open_with("qwen3moe", &gpu);
    struct ferry_session *s = session_of(e);
    struct ferry_stats stats = {.n_prompt = 0};
    uint32_t n_seen = 0;
    char news[256] = "";
    float *got = malloc(sizeof(float) * N_VOCAB);

    for (int i = 0; i < 250 && !stats.gpu_switches; i++) {
        ck_assert_str_eq(ferry_engine_gpu_news(e, &n_seen, news, sizeof news), "");
        ck_assert_int_eq(ferry_session_logits(s, ids + i % N_TOK, 1, false, got), 0);
        ferry_session_stats(s, &stats);
    }
    ck_assert(stats.gpu_experts_off);
    ck_assert(stats.step_without_gpu_s < stats.step_with_gpu_s);
    ck_assert_ptr_nonnull(
        strstr(ferry_engine_gpu_news(e, &n_seen, news, sizeof news), "the GPU computes none from now on"));
    ck_assert_str_eq(ferry_engine_gpu_news(e, &n_seen, news, sizeof news), "");
    free(got);
    ferry_session_free(s);
    ferry_engine_close(e);
    clock_pretend(NULL);
    emu_clock(NULL);
}
END_TEST

/* What is counted is what the emulator ran. */
START_TEST(launches_are_not_counted)
{
    struct rooms_args a = copying_rooms(PLAN_IO_PREAD, 2, PLAN_COPIES_ALWAYS);
    struct exec_stats stats;
    float got[N_VOCAB];

    make_rooms(&a);
    ck_assert_int_eq(session_logits(rooms.session, ids, 1, false, got), 0);
    exec_stats(rooms.exec, &stats);
    ck_assert_uint_gt(stats.n_launches, 30);
    uint64_t ran = emu_n_launches() - stats.n_launches; /* what other engines of this test launched */
    ck_assert_int_eq(session_logits(rooms.session, ids + 1, 1, false, got), 0);
    exec_stats(rooms.exec, &stats);
    ck_assert_uint_eq(emu_n_launches(), stats.n_launches + ran);
    leave_rooms();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_offload");
    /* CK_RUN_CASE chooses one of them. */
    TCase *tc = tcase_create("copies"), *failures = tcase_create("failures"), *times = tcase_create("times");
    TCase *const all[] = {tc, failures, times};

    for (int i = 0; i < 3; i++) {
        tcase_add_checked_fixture(all[i], start, leave);
        tcase_set_timeout(all[i], 240);
        suite_add_tcase(suite, all[i]);
    }
    tcase_add_loop_test(tc, copied_experts_change_bits, 0, N_MOE_MODELS);
    tcase_add_test(tc, order_of_streams_changes_bits_of_copied_experts);
    tcase_add_test(tc, slot_that_is_copied_from_is_filled_again);
    tcase_add_loop_test(tc, refused_pin_is_an_error, 0, 2);
    tcase_add_test(tc, next_layers_experts_are_not_sent_ahead);
    tcase_add_loop_test(tc, router_is_asked_in_vain, 0, 2);
    tcase_add_loop_test(tc, router_is_not_asked_for_experts_on_disk, 0, 2);
    if (!emu_is_real()) /* hardware may be quick enough for nobody to see it */
        tcase_add_loop_test(tc, dropped_wait_of_a_copy_is_not_seen, 0, 4);
    tcase_add_test(failures, failed_call_at_open_with_landings_leaves_something);
    tcase_add_loop_test(failures, failed_call_of_a_copying_step_spoils_the_session, 0, 2);
    if (!emu_is_real()) { /* rates that tests choose */
        tcase_add_loop_test(times, choice_is_not_what_the_clock_says, 0, 3);
        tcase_add_test(times, slow_link_is_not_noticed);
        tcase_add_loop_test(times, gpu_that_loses_goes_on, 0, 2);
        tcase_add_test(times, news_of_the_gpu_are_not_told);
    }
    tcase_add_test(times, launches_are_not_counted);
    return run_suite(suite);
}
