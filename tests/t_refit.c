/* Predictions held against a made world whose clock is the test: what is wrong is corrected, what is faster stays, and noise changes
 * nothing. */
#include "src/plan/refit.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a token takes here: computing, and waiting for the bytes read for it. */
struct world {
    double compute_s, wait_s, bytes;
    double noise;         /* of each token: uniform, this share of it to both sides */
    double drift;         /* each token takes so much more than the one before it, as a share */
    double ahead_gain[9]; /* time saved when so many are read ahead, as a share */
    double reads_gain;    /* with PLAN_MAX_READS in flight */
    uint64_t x;           /* random state */
    uint64_t n;           /* tokens so far */
    struct tune_seen total;
};

/* 10 tokens/s: 60 ms computing, 40 ms waiting for 40 MB. */
static struct world usual(void)
{
    return (struct world){.compute_s = 0.06, .wait_s = 0.04, .bytes = 40e6, .x = 88172645463325252u};
}

static struct plan predicted(void)
{
    return (struct plan){.decode_tok_per_s = 10,
                         .decode_dense_s = 0.02,
                         .decode_expert_s = 0.04,
                         .missed_bytes_per_tok = 40000000,
                         .look_ahead = true,
                         .pace = {4, 12}};
}

static double uniform(struct world *w)
{
    w->x ^= w->x << 13, w->x ^= w->x >> 7, w->x ^= w->x << 17;
    return (double)(w->x >> 11) / 9007199254740992.0;
}

/* One token at the pace that is asked for. */
static bool live(struct world *w, struct refit *r)
{
    double gain = w->ahead_gain[r->pace.n_ahead] + (r->pace.n_reads == PLAN_MAX_READS ? w->reads_gain : 0);
    double share = (1 + w->noise * (2 * uniform(w) - 1)) * (1 - gain) * (1 + w->drift * (double)w->n++);

    w->total.n_tok++;
    w->total.ns += (uint64_t)((w->compute_s + w->wait_s) * share * 1e9);
    w->total.disk_wait_ns += (uint64_t)(w->wait_s * share * 1e9);
    w->total.disk_bytes += (uint64_t)w->bytes;
    return refit_feed(r, &w->total);
}

static void live_on(struct world *w, struct refit *r, int n)
{
    while (n--)
        live(w, r);
}

static void must_be_at(const struct refit *r, uint32_t n_ahead, uint32_t n_reads)
{
    ck_assert(!r->is_trying);
    ck_assert_uint_eq(r->pace.n_ahead, n_ahead);
    ck_assert_uint_eq(r->pace.n_reads, n_reads);
}

/* Tokens of 75 to 125 ms, 20 to a window, whose mean has a deviation of 3 %: of a thousand windows two are off by 10 %. */
START_TEST(noise_is_taken_for_a_wrong_prediction)
{
    struct world w = usual();
    struct refit r;
    char text[1024];
    struct plan p = predicted();

    w.noise = 0.25;
    refit_init(&r, &p, 8);
    for (int i = 0; i < 20000; i++)
        ck_assert(!live(&w, &r));
    ck_assert_uint_eq(r.n_refits, 0);
    ck_assert_str_eq(refit_text(&r, text, sizeof text), "");
    must_be_at(&r, 4, 12);
}
END_TEST

/* Somebody else's work, for two seconds. And the first seconds, which find slots empty. */
START_TEST(one_bad_window_is_enough)
{
    struct world w = usual();
    struct refit r;
    struct plan p = predicted();

    refit_init(&r, &p, 8);
    w.wait_s = 0.4;
    live_on(&w, &r, 6);
    w.wait_s = 0.04;
    live_on(&w, &r, 100);
    w.compute_s = 0.2;
    live_on(&w, &r, 9);
    w.compute_s = 0.06;
    live_on(&w, &r, 200);
    ck_assert_uint_eq(r.n_refits, 0);
    must_be_at(&r, 4, 12);
}
END_TEST

START_TEST(wrong_prediction_is_kept_or_losers_are)
{
    struct world w = usual();
    struct refit r;
    char text[1024];
    struct plan p = predicted();
    bool was_tried[9] = {false};

    w.compute_s = 0.12;
    w.noise = 0.1;
    refit_init(&r, &p, 8);
    for (int i = 0; i < 3000; i++) {
        live(&w, &r);
        was_tried[r.pace.n_ahead] = true;
    }
    ck_assert_uint_eq(r.n_refits, 1);
    ck_assert_int_eq(r.last.off, TUNE_OFF_COMPUTE);
    ck_assert_double_eq_tol(r.last.compute, 2, 0.1);
    ck_assert_double_eq_tol(r.now.decode_tok_per_s, 1 / 0.16, 0.3);
    ck_assert_double_eq_tol(r.now.decode_dense_s + r.now.decode_expert_s, 0.12, 0.006);
    ck_assert(was_tried[0] && was_tried[2] && was_tried[8]);
    ck_assert_int_eq(r.n_trials, 5); /* three counts ahead and two of reads, all but what is in force */
    for (int i = 0; i < r.n_trials; i++)
        ck_assert(!r.trials[i].is_kept);
    must_be_at(&r, 4, 12);
    ck_assert_ptr_nonnull(strstr(refit_text(&r, text, sizeof text), "re-fitted 1 time, last because of computing"));
    ck_assert_ptr_nonnull(strstr(text, "undone"));
    ck_assert_ptr_null(strstr(text, "kept"));
}
END_TEST

/* Reading two ahead saves 10 %, all eight costs 20 %, more reads save 6 %: both winners stay, and nothing else. */
START_TEST(what_is_faster_is_undone)
{
    struct world w = usual();
    struct refit r;
    struct plan p = predicted();
    int n_slow = 0;

    w.bytes = 80e6;
    w.wait_s = 0.08;
    w.noise = 0.05;
    w.ahead_gain[2] = 0.1;
    w.ahead_gain[8] = -0.2;
    w.ahead_gain[0] = -0.05;
    w.reads_gain = 0.06;
    refit_init(&r, &p, 8);
    for (int i = 0; i < 3000; i++) {
        live(&w, &r);
        n_slow += r.pace.n_ahead == 8;
    }
    ck_assert_int_eq(r.last.off, TUNE_OFF_MISSES);
    ck_assert_uint_eq(r.n_refits, 1);
    must_be_at(&r, 2, PLAN_MAX_READS);
    for (int i = 0; i < r.n_trials; i++)
        ck_assert_int_eq(r.trials[i].is_kept, r.trials[i].pace.n_reads == PLAN_MAX_READS ||
                                                  (r.trials[i].pace.n_ahead == 2 && r.trials[i].pace.n_reads == 12));
    ck_assert_double_eq_tol(r.now.decode_tok_per_s, 1 / (0.14 * 0.84), 0.3);
    ck_assert_int_le(n_slow, 2 * REFIT_TURN_TOK); /* it was given up after two lost pairs */
}
END_TEST

/* It is slower and slower, 2 % a turn: nobody is to blame. */
START_TEST(drift_makes_a_winner)
{
    struct world w = usual();
    struct refit r;
    struct plan p = predicted();

    w.compute_s = 0.12;
    w.drift = 0.005;
    refit_init(&r, &p, 8);
    for (int i = 0; i < 3000 && r.n_trials < 5; i++)
        live(&w, &r);
    ck_assert_int_eq(r.n_trials, 5);
    for (int i = 0; i < r.n_trials; i++)
        ck_assert_msg(!r.trials[i].is_kept, "%d: %g", i, r.trials[i].gain);
}
END_TEST

/* Clocks fall when it gets hot, and rise again; a disk gets slower. Each time rates are corrected, and trials have to rest. */
START_TEST(changed_rates_are_not_seen)
{
    struct world w = usual();
    struct refit r;
    struct plan p = predicted();

    refit_init(&r, &p, 8);
    live_on(&w, &r, 200);
    ck_assert_uint_eq(r.n_refits, 0);
    w.compute_s *= 1.5;
    live_on(&w, &r, 300);
    ck_assert_uint_eq(r.n_refits, 1);
    ck_assert_int_eq(r.last.off, TUNE_OFF_COMPUTE);
    ck_assert_double_eq_tol(r.last.compute, 1.5, 1e-3);
    ck_assert_int_eq(r.n_trials, 5);
    w.compute_s /= 1.5;
    bool has_moved = false;
    for (int i = 0; i < 100; i++)
        has_moved = live(&w, &r) || has_moved;
    ck_assert_uint_eq(r.n_refits, 2);
    ck_assert_double_eq_tol(r.last.compute, 1 / 1.5, 1e-3);
    ck_assert(!has_moved);
    w.wait_s *= 3;
    live_on(&w, &r, 100);
    ck_assert_uint_eq(r.n_refits, 3);
    ck_assert_int_eq(r.last.off, TUNE_OFF_DISK);
    ck_assert_double_eq_tol(r.now.decode_tok_per_s, 1 / 0.18, 1e-2);
}
END_TEST

/* Nothing was predicted; or all is in memory, and there is nothing to try. */
START_TEST(trials_where_there_is_nothing_to_try)
{
    struct world w = usual();
    struct refit r;
    struct plan p = predicted();

    p.decode_tok_per_s = 0;
    w.compute_s = 1;
    refit_init(&r, &p, 8);
    live_on(&w, &r, 500);
    ck_assert_uint_eq(r.n_refits, 0);
    p = predicted();
    p.pace = (struct plan_pace){0, 0};
    refit_init(&r, &p, 0);
    for (int i = 0; i < 500; i++)
        ck_assert(!live(&w, &r));
    ck_assert_uint_eq(r.n_refits, 1);
    ck_assert_int_eq(r.n_trials, 0);
    p = predicted();
    p.look_ahead = false;
    p.pace.n_ahead = 0;
    refit_init(&r, &p, 8);
    for (int i = 0; i < 500; i++) {
        live(&w, &r);
        ck_assert_uint_eq(r.pace.n_ahead, 0);
    }
    ck_assert_int_eq(r.n_trials, 2); /* other numbers of reads */
}
END_TEST

/* A line that does not fit is cut, not written past its end. */
START_TEST(long_line_leaves_its_room)
{
    struct world w = usual();
    struct refit r;
    struct plan p = predicted();
    char text[64];

    w.compute_s = 0.12;
    refit_init(&r, &p, 8);
    live_on(&w, &r, 1500);
    memset(text, 'x', sizeof text);
    refit_text(&r, text, 40);
    ck_assert_uint_eq(strlen(text), 39);
    ck_assert_int_eq(text[40], 'x');
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("refit");
    TCase *tc = tcase_create("refit");

    tcase_add_test(tc, noise_is_taken_for_a_wrong_prediction);
    tcase_add_test(tc, one_bad_window_is_enough);
    tcase_add_test(tc, wrong_prediction_is_kept_or_losers_are);
    tcase_add_test(tc, what_is_faster_is_undone);
    tcase_add_test(tc, drift_makes_a_winner);
    tcase_add_test(tc, changed_rates_are_not_seen);
    tcase_add_test(tc, trials_where_there_is_nothing_to_try);
    tcase_add_test(tc, long_line_leaves_its_room);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
