/* When the GPU is left out, by invented step times. */
#include "src/run/tier.h"
#include "tests/run_suite.h"

#include <check.h>

/* Run n steps of n_rows that take on_s with the GPU's experts and off_s without; returns how many were without. */
static int run(struct tier *t, int n, int n_rows, double on_s, double off_s)
{
    int n_off = 0;

    for (int i = 0; i < n; i++) {
        bool on = tier_begin(t, n_rows);
        n_off += !on;
        tier_end(t, n_rows, on ? on_s : off_s);
    }
    return n_off;
}

/* Steps of a whole trial. */
enum { TRIAL = 3 * TIER_TIMED + 2 * TIER_WARM };

START_TEST(gpu_that_wins_is_switched_off)
{
    struct tier t;

    tier_init(&t, false);
    ck_assert_int_eq(run(&t, TIER_FIRST + TIER_TIMED, 1, 0.010, 0.020), 0);
    ck_assert_int_eq(run(&t, TRIAL - TIER_TIMED, 1, 0.010, 0.020), TIER_WARM + TIER_TIMED);
    ck_assert_uint_eq(t.n_trials, 1);
    ck_assert_uint_eq(t.interval, 2 * TIER_FIRST);
    ck_assert_double_eq(t.on_s, 0.010);
    ck_assert_double_eq(t.off_s, 0.020);
    run(&t, 100000, 1, 0.010, 0.020);
    ck_assert(!t.is_off && t.n_changes == 0);
    ck_assert_uint_eq(t.interval, TIER_LONGEST);
}
END_TEST

/* It takes two trials; then it stays off while that is better, is tried again, and comes back when the GPU is. */
START_TEST(gpu_that_loses_stays_on)
{
    struct tier t;

    tier_init(&t, false);
    run(&t, TIER_FIRST + TRIAL, 1, 0.020, 0.010);
    ck_assert(!t.is_off);
    run(&t, TIER_AGAIN + TRIAL, 1, 0.020, 0.010);
    ck_assert(t.is_off);
    ck_assert_uint_eq(t.n_changes, 1);
    ck_assert_int_eq(run(&t, TIER_FIRST, 1, 0.020, 0.010), TIER_FIRST);
    run(&t, 10000, 1, 0.020, 0.010);
    ck_assert(t.is_off);
    run(&t, 2 * TIER_LONGEST + 2 * TRIAL, 1, 0.005, 0.010);
    ck_assert(!t.is_off);
    ck_assert_uint_eq(t.n_changes, 2);
}
END_TEST

START_TEST(difference_of_nothing_switches)
{
    struct tier t;

    tier_init(&t, false);
    run(&t, 20000, 1, 0.0100, 0.0096); /* 4 % */
    ck_assert_uint_eq(t.n_changes, 0);
    tier_init(&t, false);
    run(&t, 20000, 1, 0.0100, 0.0094); /* 6 % */
    ck_assert_uint_eq(t.n_changes, 1);
    ck_assert(t.is_off);
}
END_TEST

/* One trial that wins, by accident, and one that does not. */
START_TEST(one_lucky_trial_switches)
{
    struct tier t;

    tier_init(&t, false);
    for (int i = 0; i < 10; i++) {
        run(&t, TIER_FIRST + TRIAL, 1, 0.020, 0.010);
        run(&t, TIER_LONGEST + 2 * TRIAL, 1, 0.010, 0.020);
    }
    ck_assert_uint_eq(t.n_changes, 0);
}
END_TEST

/* The machine is slow while the usual way is timed first, for another reason. */
START_TEST(slow_moment_decides)
{
    struct tier t;

    tier_init(&t, false);
    for (int i = 0; i < 2; i++) {
        run(&t, i ? TIER_AGAIN + TIER_TIMED : TIER_FIRST + TIER_TIMED, 1, 0.030, 0.030);
        run(&t, TRIAL - TIER_TIMED, 1, 0.010, 0.012);
    }
    ck_assert_uint_eq(t.n_changes, 0);
    ck_assert_uint_ge(t.n_trials, 1);
}
END_TEST

/* Steps of other numbers of rows, and prompts, are no comparison. */
START_TEST(steps_of_different_rows_are_compared)
{
    struct tier t;

    tier_init(&t, false);
    for (int i = 0; i < 3000; i++)
        run(&t, 3, 1 + i % 2, 0.020, 0.001);
    ck_assert_uint_eq(t.n_trials, 0);
    tier_init(&t, false);
    ck_assert_int_eq(run(&t, 3000, TIER_NO_KIND, 0.020, 0.001), 0);
    ck_assert_uint_eq(t.n_trials, 0);
    run(&t, TIER_FIRST + TIER_TIMED + 1, 1, 0.020, 0.010); /* in the middle of the other way a prompt comes */
    ck_assert_int_eq(t.part, TIER_OTHER);
    ck_assert(tier_begin(&t, TIER_NO_KIND));
    tier_end(&t, TIER_NO_KIND, 5);
    ck_assert_int_eq(t.part, TIER_OTHER);
}
END_TEST

/* Steps that take for ever are not taken five times. */
START_TEST(hopeless_trial_goes_on)
{
    struct tier t;

    tier_init(&t, false);
    ck_assert_int_eq(run(&t, TIER_FIRST + TRIAL, 1, 0.010, 0.500), TIER_WARM + 1);
    ck_assert_uint_eq(t.n_trials, 1);
    ck_assert_int_eq(t.part, TIER_WAIT);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tier");
    TCase *tc = tcase_create("tier");

    tcase_add_test(tc, gpu_that_wins_is_switched_off);
    tcase_add_test(tc, gpu_that_loses_stays_on);
    tcase_add_test(tc, difference_of_nothing_switches);
    tcase_add_test(tc, one_lucky_trial_switches);
    tcase_add_test(tc, slow_moment_decides);
    tcase_add_test(tc, steps_of_different_rows_are_compared);
    tcase_add_test(tc, hopeless_trial_goes_on);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
