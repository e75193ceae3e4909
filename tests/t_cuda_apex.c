/* The choice between GPU only and overlap, as the plan makes it and as it turns while a batch runs, against engines that walk a tiny model:
 * with the virtual clock of the emulated runtime, sequences of which one has its pages in the host's memory, and a host that is a little
 * faster and a little slower than where the choice turns, or not at all what the plan thought. */
#define GIVEN 330
#define DRAWN 170
#include "tests/cuda_jobs.h"

#include "tests/run_suite.h"

#include <math.h>

/* Seconds of a step in which the first n sequences decode a token; its logits (n, N_VOCAB). Nothing is committed. */
static double step_s(int n, float *out)
{
    const float *logits;

    batch_clear(&rooms.batch);
    for (int seq = 0; seq < n; seq++)
        add_rows(seq, POS, 1, 1);
    rooms.n_host_rows = 0;
    time_on(PCIE_RATE);
    ck_assert_msg(exec_run(rooms.exec, &rooms.batch, NULL, &logits) == 0, "%s", err_text());
    double s = (double)emu_now_ns() * 1e-9;
    time_off();
    memcpy(out, logits, sizeof *out * N_VOCAB * (size_t)n);
    for (int seq = 0; seq < n; seq++)
        ck_assert_int_eq(cache_truncate(rooms.seqs[seq], POS), POS);
    ck_assert_int_eq(rooms.n_host_rows, n > N_GPU ? rooms.model->hp.n_layer : 0);
    return s;
}

/* What the plan counts and the kernels here do not: norms, the row of the embedding; and what goes up with a step. */
static double uncounted_s(void)
{
    const struct model *m = rooms.model;
    double bytes = (double)m->weights[m->w[ROLE_TOKEN_EMBD]].t.stride[1];

    for (int i = 0; i < m->n_weights; i++)
        bytes += m->weights[i].t.ne[1] == 1 ? (double)tensor_bytes(&m->weights[i].t) : 0;
    return bytes / GPU_RATE + 20e3 / PCIE_RATE;
}

/* Of a step without the host's sequence and one with it the better one is chosen, for a host that is 3 % slower or faster than where
 * they are equal; each takes as long as is told; and rows say the same in both. */
START_TEST(choice_is_not_what_the_clock_says)
{
    static float alone[N_GPU * N_VOCAB], all[N_SEQ * N_VOCAB], before[N_SEQ * N_VOCAB];
    int n_chosen[APEX_N_WAYS] = {0};
    double turn_rate = 0;

    make_rooms(NULL);
    const double gpu_s = step_s(N_GPU, alone), row_s = rooms.model->hp.n_layer * rooms.row_bytes / GPU_RATE;
    /* Equal where 3 tokens take 3 / 2 of the time of two: linear layers, and the host's row. */
    turn_rate = row_s * GPU_RATE / (gpu_s * N_SEQ / N_GPU - (gpu_s - N_GPU * row_s));
    const double rates[] = {GPU_RATE * 4, turn_rate * 1.03, turn_rate * 0.97, turn_rate / 20};
    for (int i = 0; i < 4; i++) {
        struct apex_profile profile;
        struct apex_choice choice;
        rooms.machine.mem_bytes_per_s = rates[i];
        ck_assert(cost_gpu_apex(&rooms.in, &rooms.plan, POS + 1, &profile));
        ck_assert_int_eq(profile.n_gpu, N_GPU);
        ck_assert_int_eq(profile.n_host, N_SEQ - N_GPU);
        apex_choose(&profile, &choice);
        double all_s = step_s(N_SEQ, all), told_s = apex_predict(&profile, APEX_OVERLAP, N_SEQ - N_GPU).s;
        ck_assert_msg(fabs(all_s - told_s) <= uncounted_s(), "overlap: %g s predicted, %g s walked", told_s, all_s);
        ck_assert_msg(fabs(gpu_s - choice.time[APEX_GPU_ONLY].s) <= uncounted_s(),
                      "GPU only: %g s predicted, %g s walked", choice.time[APEX_GPU_ONLY].s, gpu_s);
        bool is_overlap_better = N_SEQ / all_s > N_GPU / gpu_s;
        ck_assert_int_eq(choice.runs, is_overlap_better ? APEX_OVERLAP : APEX_GPU_ONLY);
        ck_assert_int_eq(is_overlap_better, i < 2);
        n_chosen[choice.runs]++;
        ck_assert_mem_eq(all, alone, sizeof alone);
        if (i > 0)
            ck_assert_mem_eq(all, before, sizeof all);
        memcpy(before, all, sizeof all);
    }
    ck_assert_int_eq(n_chosen[APEX_OVERLAP], 2);
    ck_assert_int_eq(n_chosen[APEX_GPU_ONLY], 2);
    for (int i = 0; i < N_SEQ * N_VOCAB; i++)
        ck_assert(isfinite(all[i]));
    leave_rooms();
}
END_TEST

/* ---- while a batch runs ---- */

/* Seconds a token of both ways, where there was a whole trial: as computed, of the clock's rates. */
static void check_times(const struct tier *t)
{
    struct apex_profile profile;

    ck_assert(cost_gpu_apex(&rooms.in, &rooms.plan, POS + 1, &profile));
    double on_s = apex_predict(&profile, APEX_OVERLAP, N_SEQ - N_GPU).s / N_SEQ,
           off_s = apex_predict(&profile, APEX_GPU_ONLY, 0).s / N_GPU;
    if (t->on_s <= 0)
        return;
    ck_assert_double_eq_tol(t->on_s, on_s, uncounted_s() / N_SEQ);
    ck_assert_double_eq_tol(t->off_s, off_s, uncounted_s() / N_GPU);
}

/* Whoever asks is told once. */
static void check_news(const struct jobs *jobs, const struct tier *t)
{
    char news[256];
    uint32_t n_seen = 0;

    jobs_news(jobs, &n_seen, news, sizeof news);
    ck_assert_int_eq(strstr(news, "they wait for their pages to come back from now on") != NULL,
                     t->n_changes && t->is_off);
    ck_assert_int_eq(strstr(news, "they run beside the others from now on") != NULL, t->n_changes && !t->is_off);
    ck_assert_uint_eq(n_seen, t->n_changes);
    ck_assert_str_eq(jobs_news(jobs, &n_seen, news, sizeof news), "");
}

/* A step in which a call of the runtime may fail; it is tried again then. */
static void step_with(struct jobs *jobs, int fail_nth)
{
    emu_fail_nth(fail_nth);
    int rc = jobs_step(jobs);
    emu_fail_nth(0);
    ck_assert_msg(rc == 0 || (rc == ERR_DEVICE && fail_nth), "%s", err_text());
}

/* All answer together; the plan lets the one whose pages the GPU does not hold wait, or not. In every fifth step some call fails, or none
 * does. */
static void answer(bool waits, double host_rate, bool fails, struct jobs_stats *stats, struct cache_back_stats *back)
{

    make_rooms(&(struct cache_args){.back_steps = 3, .back_bytes = MIB});
    rooms.plan.gpu.kv_waits = waits;
    rooms.machine.mem_bytes_per_s = host_rate;
    struct jobs *jobs = open_jobs();
    time_on(PCIE_RATE);
    for (int i = 1; i == 1 || stats->n_running + stats->n_waiting > 0; i++) {
        step_with(jobs, fails && i % 5 == 0 ? 1 + i % 80 : 0);
        jobs_stats(jobs, stats);
    }
    time_off();
    take_answers(jobs);
    if (!fails)
        check_times(&stats->ways.waits);
    check_news(jobs, &stats->ways.waits);
    cache_back_stats(rooms.cache, back);
    jobs_close(jobs);
    leave_rooms();
}

/* By the clock the host is as the plan thought, or not: then the choice turns while the batch runs, and both ways are measured to take
 * what is computed for them. Whoever waited has his pages on the GPU when he goes on. Nobody says anything else for it. */
START_TEST(choice_stays_when_the_clock_says_otherwise)
{
    static const double rates[] = {GPU_RATE * 4, GPU_RATE / 100};
    static int32_t first[N_SEQ][ANSWER_TOK];
    struct cache_back_stats back;
    struct jobs_stats s;

    for (int i = 0; i < 4; i++) {
        bool waits = i / 2, is_slow = i % 2;
        emu_seed((uint64_t)i + 1);
        answer(waits, rates[is_slow], false, &s, &back);
        if (i == 0)
            memcpy(first, said, sizeof first);
        ck_assert_mem_eq(first, said, sizeof first);
        ck_assert_uint_ge(s.ways.waits.n_trials, 1);
        ck_assert_int_eq(s.ways.waits.is_off, is_slow);
        ck_assert_uint_eq(s.ways.waits.n_changes, waits != is_slow);
        ck_assert_uint_gt(s.n_sat_out, 0);
        ck_assert_int_eq(s.n_sat_out > 2 * TIER_TIMED + 2 * TIER_WARM, is_slow || waits);
        ck_assert_uint_eq(back.n_back, 1);
        ck_assert_uint_eq(back.n_out, 0);
    }
}
END_TEST

/* Steps that fail count for nothing, wherever the pages are by then, and are no trial. */
START_TEST(failed_steps_of_a_batch_say_something_else)
{
    static int32_t first[N_SEQ][ANSWER_TOK];
    struct cache_back_stats back;
    struct jobs_stats s;

    answer(false, GPU_RATE / 100, false, &s, &back);
    memcpy(first, said, sizeof first);
    answer(false, GPU_RATE / 100, true, &s, &back);
    ck_assert_mem_eq(first, said, sizeof first);
    ck_assert(s.ways.waits.is_off);
    ck_assert_uint_eq(back.n_back, 1);
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("cuda_apex");
    TCase *tc = tcase_create("cuda_apex");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, choice_is_not_what_the_clock_says);
    tcase_add_test(tc, choice_stays_when_the_clock_says_otherwise);
    tcase_add_test(tc, failed_steps_of_a_batch_say_something_else);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
