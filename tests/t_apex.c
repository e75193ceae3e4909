/* The way of a decode step with more sequences than the GPU holds, by arithmetic: golden cases, the ends of the range, and every division
 * of the host's sequences walked event by event. */
#include "src/plan/apex.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static void is_near(double got, double want)
{
    ck_assert_msg(fabs(got - want) <= 1e-9 * fabs(want), "%.12g instead of %.12g", got, want);
}

/* As APEX has it: linear layers take as long for any number of rows, and nothing crosses. */
static struct apex_profile paper(double linear_s, double attend_s, int n_gpu, double host_seq_s, int n_host)
{
    return (struct apex_profile){.n_gpu = n_gpu,
                                 .n_host = n_host,
                                 .has_halves = true,
                                 .gpu_linear_s = linear_s,
                                 .host_linear_s = linear_s,
                                 .both_linear_s = linear_s,
                                 .attend_s = attend_s,
                                 .host_seq_s = host_seq_s};
}

/* T_l / T_a = 2, and the GPU attends to 89 sequences while the CPU attends to 5: N_G / N_C = 17.8, where 2 * 2 + 3 + 1 / 2 is the most. */
START_TEST(golden_case_is_pipelined)
{
    const struct apex_profile p = paper(10, 5, 89, 1, 1000);
    struct apex_choice c;

    is_near(apex_most_ratio(10, 5), 7.5);
    apex_choose(&p, &c);
    ck_assert_int_eq(c.runs, APEX_OVERLAP);
    is_near(c.time[APEX_GPU_ONLY].s, 15);
    is_near(c.time[APEX_GPU_ONLY].tok_per_s, 89 / 15.0);
    ck_assert_int_eq(c.time[APEX_GPU_ONLY].n_host, 0);
    is_near(c.time[APEX_OVERLAP].s, 15); /* five are free */
    is_near(c.time[APEX_OVERLAP].tok_per_s, 94 / 15.0);
    ck_assert_int_eq(c.time[APEX_OVERLAP].n_host, 5);
    is_near(c.time[APEX_PIPELINING].s, 25);
    is_near(c.time[APEX_PIPELINING].tok_per_s, (89 + 25) / 25.0);
    ck_assert_int_eq(c.time[APEX_PIPELINING].n_host, 25);
    ck_assert(c.time[APEX_PIPELINING].tok_per_s < c.time[APEX_GPU_ONLY].tok_per_s);
}
END_TEST

/* A CPU as quick as the GPU: pipelining is best; where the CPU has experts, the better of the others runs. */
START_TEST(quick_cpu_is_refused)
{
    struct apex_profile p = paper(10, 5, 50, 0.1, 1000);
    struct apex_choice c;

    apex_choose(&p, &c);
    ck_assert_int_eq(c.runs, APEX_PIPELINING);
    is_near(c.time[APEX_PIPELINING].tok_per_s, (50 + 250) / 25.0);
    is_near(apex_all(&p).tok_per_s, fmax(1050 / 110.0, 1050 / 100.0)); /* the CPU's time binds */
    p.has_halves = false;
    apex_choose(&p, &c);
    ck_assert_int_eq(c.time[APEX_PIPELINING].n_host, 0);
    ck_assert_double_eq(c.time[APEX_PIPELINING].tok_per_s, 0);
    is_near(apex_all(&p).tok_per_s, 1050 / 110.0);
    ck_assert_int_eq(c.runs, APEX_OVERLAP);
    ck_assert_int_eq(c.time[APEX_OVERLAP].n_host, 1000); /* past what is hidden each one more is still a gain */
    is_near(c.time[APEX_OVERLAP].tok_per_s, 1050 / 110.0);
}
END_TEST

START_TEST(nothing_in_host_memory_is_waited_for)
{
    struct apex_choice c;

    apex_choose(&(struct apex_profile){.n_gpu = 8,
                                       .has_halves = true,
                                       .gpu_linear_s = 2,
                                       .host_linear_s = 1,
                                       .both_linear_s = 3,
                                       .attend_s = 1,
                                       .down_s = 1,
                                       .up_s = 1},
                &c);
    ck_assert_int_eq(c.runs, APEX_GPU_ONLY);
    for (int way = 0; way < APEX_N_WAYS; way++) {
        ck_assert_int_eq(c.time[way].n_host, 0);
        is_near(c.time[way].tok_per_s, 8 / 3.0);
    }
}
END_TEST

START_TEST(nothing_on_the_gpu_stops_all)
{
    struct apex_profile p = paper(2, 0, 0, 1, 4);
    struct apex_choice c;

    apex_choose(&p, &c);
    ck_assert_double_eq(c.time[APEX_GPU_ONLY].tok_per_s, 0);
    ck_assert_int_eq(c.runs, APEX_PIPELINING);
    is_near(c.time[APEX_OVERLAP].tok_per_s, 4 / 6.0);
    is_near(c.time[APEX_PIPELINING].tok_per_s,
            4 / 4.0); /* two halves, whose linear layers and attention take 2 s each */
}
END_TEST

/* Times at which ways are equal: the one that needs less is taken; a hair beside them, the better one. */
START_TEST(ties_are_broken_elsewhere)
{
    struct apex_profile p = paper(2, 1, 6, 1.5, 1); /* 6 in 3 s, 7 in 3.5 s */
    struct apex_choice c;

    apex_choose(&p, &c);
    is_near(c.time[APEX_OVERLAP].tok_per_s, c.time[APEX_GPU_ONLY].tok_per_s);
    ck_assert_int_eq(c.runs, APEX_GPU_ONLY);
    p.host_seq_s = 1.499;
    apex_choose(&p, &c);
    ck_assert_int_eq(c.runs, APEX_OVERLAP);
    p.up_s = 0.002; /* what crosses counts as much */
    apex_choose(&p, &c);
    ck_assert_int_eq(c.runs, APEX_GPU_ONLY);
    p.up_s = 0;
    p.down_s = 0.002;
    apex_choose(&p, &c);
    ck_assert_int_eq(c.runs, APEX_GPU_ONLY);
    p = paper(1, 1, 1, 1, 3); /* overlap: 2 in 2 s, 4 in 4; pipelining: 4 in 3 */
    p.host_linear_s = 2;      /* 4 in 4 */
    apex_choose(&p, &c);
    is_near(c.time[APEX_PIPELINING].tok_per_s, 1);
    ck_assert_int_eq(c.runs, APEX_OVERLAP);
    ck_assert_int_eq(c.time[APEX_OVERLAP].n_host, 1); /* of equals the fewest */
}
END_TEST

/* What is left out is said; where attention takes the GPU no time there is no ratio to tell. */
START_TEST(text_hides_what_was_thought)
{
    struct apex_profile p = paper(10, 5, 50, 0.1, 1000);
    struct apex_choice c;
    char line[512], little[20];

    apex_choose(&p, &c);
    apex_explain(&p, &c, line, sizeof line);
    ck_assert_str_eq(
        line, "50 on the GPU alone 3.33 tokens/s, overlap with 1000 in memory 9.55, pipelining with 250 12 (the GPU "
              "attends 1 times as fast; pipelining beats GPU only below 7.5): pipelining");
    apex_explain(&p, &c, little, sizeof little);
    ck_assert_int_eq(strlen(little), sizeof little - 1);
    ck_assert_int_eq(strncmp(little, line, sizeof little - 1), 0);
    p.has_halves = false;
    apex_choose(&p, &c);
    apex_explain(&p, &c, line, sizeof line);
    ck_assert_str_eq(line, "50 on the GPU alone 3.33 tokens/s, overlap with 1000 in memory 9.55, no pipelining where "
                           "the CPU has experts: overlap");
    p = paper(2, 0, 0, 1, 4);
    apex_choose(&p, &c);
    apex_explain(&p, &c, line, sizeof line);
    ck_assert_ptr_null(strstr(line, "attends"));
}
END_TEST

START_TEST(names_are_mixed_up)
{
    ck_assert_str_eq(apex_name(APEX_GPU_ONLY), "GPU only");
    ck_assert_str_eq(apex_name(APEX_PIPELINING), "pipelining");
    ck_assert_str_eq(apex_name(APEX_OVERLAP), "overlap");
}
END_TEST

/* ---- every case of some, walked ---- */

static uint64_t state;

static double draw(double least, double most)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return least + (most - least) * (double)(state >> 11) / 9007199254740992.0;
}

/* The paper's inequality is that of the predicted rates, so many sequences that one more or less is nothing. */
START_TEST(inequality_and_rates_disagree)
{
    int n_pays = 0;

    state = 20250603;
    for (int i = 0; i < 2000; i++) {
        double linear_s = draw(0.1, 4), attend_s = draw(0.1, 4), host_seq_s = draw(1e-6, 2e-5);
        struct apex_profile p = paper(linear_s, attend_s, 1000000, host_seq_s, 100000000);
        struct apex_choice c;
        double ratio = p.n_gpu / attend_s * host_seq_s, most = apex_most_ratio(linear_s, attend_s);
        apex_choose(&p, &c);
        if (fabs(ratio - most) < 1e-3 * most)
            continue;
        bool pays = c.time[APEX_PIPELINING].tok_per_s > c.time[APEX_GPU_ONLY].tok_per_s;
        ck_assert_msg(pays == (ratio < most), "T_l %g, T_a %g: N_G / N_C %g, at most %g, but %d", linear_s, attend_s,
                      ratio, most, pays);
        n_pays += pays;
    }
    ck_assert(n_pays > 200 && n_pays < 1800);
}
END_TEST

enum { N_LAYERS = 200, MOST_HOST = 12 };

/* One thing after another, from the later of when it is free and when all that is needed is there. */
static double work(double *free_at, double ready, double s)
{
    *free_at = fmax(*free_at, ready) + s;
    return *free_at;
}

/* Seconds of a layer in the long run: all meet in each. */
static double walk_overlap(const struct apex_profile *p, int n_host)
{
    double gpu = 0, cpu = 0, done = 0;

    for (int layer = 0; layer < N_LAYERS; layer++) {
        double linear = work(&gpu, done, n_host ? p->both_linear_s : p->gpu_linear_s);
        double there = linear + (n_host ? p->down_s : 0);
        done = work(&gpu, there, p->attend_s);
        if (n_host)
            done = fmax(done, work(&cpu, there, n_host * p->host_seq_s) + p->up_s);
    }
    return done / N_LAYERS;
}

/* Two halves in turn; the first has the GPU's sequences and n_first of the host's. A half's next layer wants all of its attention. */
static double walk_pipelining(const struct apex_profile *p, int n_first, int n_second)
{
    double gpu = 0, cpu = 0, first = 0, second = 0, begin = 0;

    for (int layer = 0; layer < 2 * N_LAYERS; layer++) {
        if (layer == N_LAYERS) /* the pipe is full */
            begin = gpu;
        double linear =
            work(&gpu, first, p->gpu_linear_s + p->down_s); /* what goes down goes with the GPU's own work */
        double host_done = work(&cpu, linear, n_first * p->host_seq_s);
        first = fmax(work(&gpu, linear, p->attend_s), host_done);
        linear = work(&gpu, second, p->host_linear_s);
        second = work(&cpu, linear, n_second * p->host_seq_s);
    }
    return (gpu - begin) / N_LAYERS;
}

static struct apex_profile draw_profile(void)
{
    struct apex_profile p = {.n_gpu = (int)draw(0, 20), .n_host = (int)draw(0, MOST_HOST + 1), .has_halves = true};

    p.gpu_linear_s = draw(0.1, 3);
    p.host_linear_s = draw(0.1, 3);
    p.both_linear_s = fmax(p.gpu_linear_s, p.host_linear_s) + draw(0, 0.5);
    p.attend_s = p.n_gpu * draw(0.01, 0.3);
    p.host_seq_s = draw(0.02, 1.5);
    p.down_s = draw(0, 0.1);
    p.up_s = draw(0, 0.2);
    return p;
}

/* What is predicted is what the walk takes, and the way that is run is the best of all numbers of sequences. */
START_TEST(walk_finds_a_better_way)
{
    int n_chosen[APEX_N_WAYS] = {0};

    state = 17;
    for (int i = 0; i < 3000; i++) {
        const struct apex_profile p = draw_profile();
        double best[APEX_N_WAYS] = {p.n_gpu / (p.gpu_linear_s + p.attend_s), 0, 0};
        struct apex_choice c;
        apex_choose(&p, &c);
        for (int n_host = 1; n_host <= p.n_host; n_host++) {
            double overlap_s = walk_overlap(&p, n_host);
            double pipelined_s = walk_pipelining(&p, n_host / 2, n_host - n_host / 2);
            double told_s = apex_predict(&p, APEX_PIPELINING, n_host).s;
            is_near(apex_predict(&p, APEX_OVERLAP, n_host).s, overlap_s);
            ck_assert_msg(fabs(pipelined_s - told_s) < 1e-9 * told_s,
                          "profile %d, %d of the host's: %g s walked, %g predicted", i, n_host, pipelined_s, told_s);
            best[APEX_OVERLAP] = fmax(best[APEX_OVERLAP], (p.n_gpu + n_host) / overlap_s);
            best[APEX_PIPELINING] = fmax(best[APEX_PIPELINING], (p.n_gpu + n_host) / told_s);
        }
        for (int way = 0; way < APEX_N_WAYS; way++)
            ck_assert_double_ge(c.time[way].tok_per_s, best[way] * (1 - 1e-9));
        is_near(c.time[c.runs].tok_per_s, fmax(best[APEX_GPU_ONLY], fmax(best[APEX_OVERLAP], best[APEX_PIPELINING])));
        n_chosen[c.runs]++;
    }
    for (int way = 0; way < APEX_N_WAYS; way++)
        ck_assert_int_gt(n_chosen[way], 100);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("apex");
    TCase *tc = tcase_create("apex");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, golden_case_is_pipelined);
    tcase_add_test(tc, quick_cpu_is_refused);
    tcase_add_test(tc, nothing_in_host_memory_is_waited_for);
    tcase_add_test(tc, nothing_on_the_gpu_stops_all);
    tcase_add_test(tc, ties_are_broken_elsewhere);
    tcase_add_test(tc, text_hides_what_was_thought);
    tcase_add_test(tc, names_are_mixed_up);
    tcase_add_test(tc, inequality_and_rates_disagree);
    tcase_add_test(tc, walk_finds_a_better_way);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
