/* Steps in halves: the CPU attends to rows of one half while the GPU that the emulated runtime plays computes the other. By a virtual clock
 * they take as long as a walk from event to event says; bits are those of whole steps, in whatever order streams run and whatever fails;
 * and a batch goes over to them, or away from them, as its steps show. */
#define SEQS 7
#include "tests/cuda_jobs.h"

#include "src/run/trace.h"
#include "tests/run_suite.h"

#include <math.h>

/* Of the host's sequences two go with the GPU's, three are the second half. */
enum { N_HOST = N_SEQ - N_GPU, N_SECOND = 3 };

static float whole[N_SEQ * N_VOCAB], halves[N_SEQ * N_VOCAB];

static void add_all(int n_second)
{
    batch_clear(&rooms.batch);
    for (int seq = 0; seq < N_SEQ; seq++)
        add_rows(seq, POS, 1, 1);
    rooms.batch.n_second = n_second;
}

static void forget_all(void)
{
    for (int seq = 0; seq < N_SEQ; seq++)
        ck_assert_int_eq(cache_truncate(rooms.seqs[seq], POS), POS);
}

/* Every sequence draws: the logits (N_SEQ, N_VOCAB). Nothing is committed. */
static int step(int n_second, float *out)
{
    const float *logits;

    add_all(n_second);
    int rc = exec_run(rooms.exec, &rooms.batch, NULL, &logits);
    if (rc == 0)
        memcpy(out, logits, sizeof *out * N_SEQ * N_VOCAB);
    forget_all();
    return rc;
}

static double timed_step_s(int n_second, float *out)
{
    struct exec_stats before, after;

    exec_stats(rooms.exec, &before);
    time_on(PCIE_RATE);
    ck_assert_msg(step(n_second, out) == 0, "%s", err_text());
    double s = (double)emu_now_ns() * 1e-9;
    time_off();
    exec_stats(rooms.exec, &after);
    ck_assert_uint_eq(after.n_halved - before.n_halved, n_second > 0);
    return s;
}

/* ---- time ---- */

static double weight_s(enum role role, int layer)
{
    int w = layer < 0 ? rooms.model->w[role] : rooms.model->layers[layer].w[role];
    return (double)tensor_bytes(&rooms.model->weights[w].t) / GPU_RATE;
}

/* Of a layer: what its attention waits for, and what waits for that. */
static double pre_s(int layer)
{
    return weight_s(ROLE_ATTN_Q, layer) + weight_s(ROLE_ATTN_K, layer) + weight_s(ROLE_ATTN_V, layer);
}

static double post_s(int layer)
{
    return weight_s(ROLE_ATTN_OUT, layer) + weight_s(ROLE_FFN_GATE, layer) + weight_s(ROLE_FFN_UP, layer) +
           weight_s(ROLE_FFN_DOWN, layer);
}

/* What the walk leaves out: norms and the row of the embedding, twice; what goes up and down. */
static double uncounted_s(void)
{
    const struct model *m = rooms.model;
    double bytes = (double)m->weights[m->w[ROLE_TOKEN_EMBD]].t.stride[1];

    for (int i = 0; i < m->n_weights; i++)
        bytes += m->weights[i].t.ne[1] == 1 ? (double)tensor_bytes(&m->weights[i].t) : 0;
    return 2 * bytes / GPU_RATE + 60e3 / PCIE_RATE;
}

/* The GPU does one thing after another, in the order in which the host comes to queue them: up to the attention of one half, and then, when
 * the host has attended to the other, on with that. */
static double walk_halves_s(double attend_s, double first_s, double second_s)
{
    const int n_layer = rooms.model->hp.n_layer;
    double gpu = 0, host = 0, first = 0, second = 0; /* when these are free; when attention of either half is done */

    for (int layer = 0; layer < n_layer; layer++) {
        gpu = fmax(gpu, first) + (layer > 0 ? post_s(layer - 1) : 0) + pre_s(layer);
        double first_from = gpu;
        gpu += attend_s;
        gpu = fmax(gpu, second) + (layer > 0 ? post_s(layer - 1) : 0) + pre_s(layer);
        first = host = fmax(host, first_from) + first_s;
        second = host = fmax(host, gpu) + second_s;
    }
    gpu = fmax(gpu, first) + post_s(n_layer - 1);
    return fmax(gpu, second) + post_s(n_layer - 1) + weight_s(ROLE_OUTPUT, -1);
}

/* For hosts from one that takes next to no time to one that is better left out: halves take as long as the walk says, and, but for what
 * filling and emptying a pipeline of so few layers is told to take, as the plan does, which knows when whole steps are better; and rows say
 * the same. */
START_TEST(halves_take_another_time)
{
    static const double rates[] = {40, 4, 1.5, 1, 0.5, 0.01};
    int n_chosen[APEX_N_WAYS] = {0};

    make_rooms(NULL);
    const double row_s = rooms.row_bytes / GPU_RATE, n_layer = rooms.model->hp.n_layer;
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        struct apex_profile profile;
        struct apex_choice choice;
        rooms.machine.mem_bytes_per_s = rates[i] * GPU_RATE;
        ck_assert(cost_gpu_apex(&rooms.in, &rooms.plan, POS + 1, &profile));
        ck_assert_int_eq(profile.n_gpu, N_GPU);
        ck_assert_int_eq(profile.n_host, N_HOST);
        apex_choose(&profile, &choice);
        double seq_s = profile.host_seq_s / n_layer, whole_s = timed_step_s(0, whole);
        double halves_s = timed_step_s(N_SECOND, halves);
        double walked_s = walk_halves_s(N_GPU * row_s, (N_HOST - N_SECOND) * seq_s, N_SECOND * seq_s);
        double told_s = apex_predict(&profile, APEX_PIPELINING, N_HOST).s;
        ck_assert_msg(fabs(halves_s - walked_s) < uncounted_s(), "rate %g: %g s instead of %g", rates[i], halves_s,
                      walked_s);
        ck_assert_msg(fabs(halves_s - told_s) <
                          (profile.gpu_linear_s + profile.host_linear_s) / n_layer + uncounted_s(),
                      "rate %g: %g s instead of the %g that were told", rates[i], halves_s, told_s);
        ck_assert_int_eq(apex_all(&profile).s == told_s, halves_s < whole_s);
        ck_assert_mem_eq(whole, halves, sizeof whole);
        n_chosen[choice.runs]++;
    }
    for (int way = 0; way < APEX_N_WAYS; way++)
        ck_assert_int_gt(n_chosen[way], 0);
    leave_rooms();
}
END_TEST

/* ---- order ---- */

/* A dense model, and mixtures whose experts are all the GPU's. */
static const char *const models[] = {"llama", "mixtral", "qwen3moe"};
enum { N_MODELS = sizeof models / sizeof *models };

static void make_rooms_of(const char *model)
{
    rooms_model = model;
    make_rooms(NULL);
    ck_assert(plan_has_halves(&rooms.plan));
}

START_TEST(order_of_streams_changes_bits)
{
    make_rooms_of(models[_i]);
    ck_assert_int_eq(step(0, whole), 0);
    for (uint64_t seed = 1; seed < 9; seed++)
        for (int n_second = 1; n_second <= N_HOST; n_second += 2) {
            emu_seed(seed);
            emu_starve((enum emu_engine)(seed % (EMU_N_ENGINES + 1)));
            ck_assert_msg(step(n_second, halves) == 0, "%s", err_text());
            ck_assert_mem_eq(whole, halves, sizeof whole);
        }
    leave_rooms();
}
END_TEST

/* A step with other tokens, so that what a wait that was left out lets through is wrong. */
static void say_others(void)
{
    const float *logits;

    add_all(N_SECOND);
    for (int i = 0; i < N_SEQ; i++)
        rooms.batch.token[i] += 40;
    ck_assert_int_eq(exec_run(rooms.exec, &rooms.batch, NULL, &logits), 0);
    forget_all();
}

/* Each half of a layer merges what the CPU sent when that is there, however long it takes. Were one of these waits left out, it would merge
 * what was sent the last time. */
START_TEST(dropped_wait_is_not_seen)
{
    make_rooms_of(models[_i]);
    const int n_waits = 2 * rooms.model->hp.n_layer;
    ck_assert_int_eq(step(0, whole), 0);
    emu_starve(EMU_UP);
    for (int wait = 0; wait <= n_waits; wait++) { /* 0: none is dropped */
        say_others();
        emu_drop_wait(wait);
        ck_assert_int_eq(step(N_SECOND, halves), 0);
        emu_drop_wait(0);
        ck_assert_msg((memcmp(whole, halves, sizeof whole) != 0) == (wait > 0), "wait %d", wait);
    }
    leave_rooms();
}
END_TEST

static int forgotten_fence;

static int forgetful_passed(struct device *dev, int f, bool wait, bool *is_passed)
{
    *is_passed = true;
    return f == forgotten_fence ? 0 : cuda_device_ops.passed(dev, f, wait, is_passed);
}

/* The CPU waits for the queries of the half that it attends to, each half for its own. */
START_TEST(forgotten_queries_are_not_missed)
{
    make_rooms(NULL);
    ck_assert_int_eq(step(0, whole), 0);
    rooms.gpu_ops.passed = forgetful_passed;
    for (forgotten_fence = 0; forgotten_fence < PLAN_ATTN_FENCES; forgotten_fence++) {
        bool is_seen = false;
        for (uint64_t seed = 1; seed <= 50 && !is_seen; seed++) {
            say_others();
            emu_seed(seed);
            ck_assert_int_eq(step(N_SECOND, halves), 0);
            is_seen = memcmp(whole, halves, sizeof whole) != 0;
        }
        ck_assert_msg(is_seen, "fence %d", forgotten_fence);
    }
    ck_assert_int_eq(step(N_SECOND, halves), 0);
    ck_assert_mem_eq(whole, halves, sizeof whole);
    leave_rooms();
}
END_TEST

/* ---- failure ---- */

START_TEST(failed_call_spoils_the_next_step)
{
    bool failed = true;
    int n = 0;

    make_rooms_of(models[_i]);
    ck_assert_int_eq(step(0, whole), 0);
    while (failed) {
        emu_seed((uint64_t)++n);
        emu_fail_nth(n);
        int rc = step(N_SECOND, halves);
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        ck_assert(rc == ERR_DEVICE ? failed : rc == 0);
        if (rc < 0)
            ck_assert_int_eq(step(n % 2 ? N_SECOND : 0, halves), 0); /* at once again, over what may be under way */
        ck_assert_mem_eq(whole, halves, sizeof whole);
    }
    ck_assert_int_gt(n, 60);
    leave_rooms();
}
END_TEST

/* A trace that keeps which experts were wanted has the host look at each layer's routers, of both halves. */
START_TEST(trace_of_wanted_experts_changes_bits)
{
    struct exec_stats before, after;

    for (int i = 0; i < 2; i++) {
        if (i)
            ck_assert_int_eq(trace_open(&(struct trace_args){.n_ids = 1 << 16}, &rooms_trace), 0);
        make_rooms_of("qwen3moe");
        exec_stats(rooms.exec, &before);
        ck_assert_int_eq(step(i ? N_SECOND : 0, i ? halves : whole), 0);
        exec_stats(rooms.exec, &after);
        ck_assert_uint_eq(after.n_halved - before.n_halved, (uint64_t)i);
        leave_rooms();
    }
    ck_assert_mem_eq(whole, halves, sizeof whole);
    trace_close(rooms_trace);
}
END_TEST

static int cancel, n_runs, cancel_at;

static int cancelling_run(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    cancel |= ++n_runs == cancel_at;
    return run_gpu(dev, ops, n_ops, rows);
}

START_TEST(cancelled_step_spoils_the_next)
{
    const float *logits;
    int n_cancelled = 0;

    make_rooms(NULL);
    ck_assert_int_eq(step(0, whole), 0);
    rooms.gpu_ops.run = cancelling_run;
    for (cancel_at = 1; cancel_at < 100; cancel_at++) {
        n_runs = cancel = 0;
        add_all(N_SECOND);
        int rc = exec_run(rooms.exec, &rooms.batch, &cancel, &logits);
        forget_all();
        if (rc == 0)
            break;
        ck_assert_int_eq(rc, ERR_CANCEL);
        n_cancelled++;
        cancel = 0;
        ck_assert_int_eq(step(N_SECOND, halves), 0);
        ck_assert_mem_eq(whole, halves, sizeof whole);
    }
    ck_assert_int_gt(n_cancelled, 8);
    leave_rooms();
}
END_TEST

/* ---- while a batch runs ---- */

static int32_t first_said[N_SEQ][ANSWER_TOK];

/* All answer together, beside a host of that rate; returns how many steps were run in halves. */
static uint64_t answer(bool begins_halved, double host_rate, struct jobs_stats *stats)
{
    struct exec_stats before, after;

    make_rooms(NULL);
    rooms.plan.gpu.halves = begins_halved;
    rooms.machine.mem_bytes_per_s = host_rate;
    struct jobs *jobs = open_jobs();
    exec_stats(rooms.exec, &before);
    time_on(PCIE_RATE);
    do {
        ck_assert_msg(jobs_step(jobs) == 0, "%s", err_text());
        jobs_stats(jobs, stats);
    } while (stats->n_running + stats->n_waiting > 0);
    time_off();
    exec_stats(rooms.exec, &after);
    take_answers(jobs);
    jobs_close(jobs);
    leave_rooms();
    return after.n_halved - before.n_halved;
}

/* Whoever asks is told once. */
static void check_news(const struct ways *w)
{
    uint32_t n_seen = 0;
    char news[256];

    ways_news(w, &n_seen, news, sizeof news);
    ck_assert_int_eq(strstr(news, "they are run in halves from now on") != NULL,
                     w->halves.n_changes && !w->halves.is_off);
    ck_assert_int_eq(strstr(news, "they are whole from now on") != NULL, w->halves.n_changes && w->halves.is_off);
    ck_assert_str_eq(ways_news(w, &n_seen, news, sizeof news), "");
}

/* Beside a host nearly as fast as the GPU halves bring more, beside a faster one whole steps; however a batch begins, it goes over to what
 * is better, and nobody says anything else for it. */
START_TEST(batch_keeps_to_the_worse_way)
{
    static const double rates[] = {GPU_RATE * 0.8, GPU_RATE * 6};

    for (int i = 0; i < 4; i++) {
        bool begins_halved = i / 2, is_quick = i % 2;
        struct jobs_stats s;
        emu_seed((uint64_t)i + 1);
        uint64_t n_halved = answer(begins_halved, rates[is_quick], &s);
        if (i == 0)
            memcpy(first_said, said, sizeof said);
        ck_assert_mem_eq(first_said, said, sizeof said);
        ck_assert_uint_ge(s.ways.halves.n_trials, 1);
        ck_assert_int_eq(s.ways.halves.is_off, is_quick);
        ck_assert_uint_eq(s.ways.halves.n_changes, begins_halved == is_quick);
        ck_assert_int_eq(s.ways.halves.off_s < s.ways.halves.on_s, is_quick);
        ck_assert(!s.ways.waits.is_off);
        ck_assert_int_eq(2 * n_halved > s.n_steps, !is_quick && begins_halved);
        check_news(&s.ways);
    }
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("cuda_halves");
    TCase *tc = tcase_create("cuda_halves");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, halves_take_another_time);
    tcase_add_loop_test(tc, order_of_streams_changes_bits, 0, N_MODELS);
    tcase_add_loop_test(tc, dropped_wait_is_not_seen, 0, N_MODELS);
    tcase_add_test(tc, forgotten_queries_are_not_missed);
    tcase_add_loop_test(tc, failed_call_spoils_the_next_step, 0, 2);
    tcase_add_test(tc, trace_of_wanted_experts_changes_bits);
    tcase_add_test(tc, cancelled_step_spoils_the_next);
    tcase_add_test(tc, batch_keeps_to_the_worse_way);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
