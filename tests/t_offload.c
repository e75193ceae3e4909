/* Who computes a layer's misses, by arithmetic: golden walks, the places where the choice turns, the known formula as the case that it
 * is, and what is learnt from measured times. */
#include "src/plan/offload.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>

enum { MOST = 64 };

static const struct offload_cost nothing = {0, 0, 0};

static struct offload_choice choose(const struct offload_rates *r, const struct offload_layer *layer)
{
    struct offload_choice c;
    int order[MOST];

    offload_order(layer, order);
    offload_choose(r, layer, order, &c);
    return c;
}

static struct offload_choice walk(const struct offload_rates *r, const struct offload_layer *layer, int n_copies)
{
    struct offload_choice c;
    int order[MOST];

    offload_order(layer, order);
    offload_walk(r, layer, order, n_copies, &c);
    return c;
}

static void is_near(double got, double want)
{
    ck_assert_msg(fabs(got - want) <= 1e-9 * fabs(want) + 1e-15, "%.12g instead of %.12g", got, want);
}

/* Experts of 2 MiB. CPU: 1 ms an expert and 0.5 ms a call; PCIe: 0.4 ms an expert and 0.1 a copy; the GPU: 0.1 ms an expert and 0.2 a
 * call; a row of the CPU's experts goes up in no time but a copy's 0.1 ms. */
static const struct offload_rates plain = {.cpu = {.call_s = 0.5e-3, .mib_s = 0.5e-3},
                                           .copy = {.call_s = 0.1e-3, .mib_s = 0.2e-3},
                                           .gpu = {.call_s = 0.2e-3, .mib_s = 0.05e-3}};
static const struct offload_expert alike[MOST] = {{2, 1, false, false}, {2, 1, false, false}, {2, 1, false, false},
                                                  {2, 1, false, false}, {2, 1, false, false}, {2, 1, false, false},
                                                  {2, 1, false, false}, {2, 1, false, false}};

START_TEST(walk_is_not_what_a_pencil_says)
{
    const struct offload_layer layer = {.misses = alike, .n = 4, .most_copies = 4, .hit_mib = 8, .hit_rows = 8};
    static const double cpu_ms[] = {4.6, 3.6, 2.6, 1.6, 0}; /* 0.5 + n + 0.1 */
    static const double gpu_ms[] = {
        0.6, /* hits alone: 0.2 + 8 * 0.05 */
        0.9, /* they end at 0.6, the copy at 0.5; then 0.3 */
        1.4, /* copies end at 1.0, then 0.2 + 0.2 */
        2.0, /* 1.5 + 0.5 */
        2.6  /* 2.0 + 0.6 */
    };

    for (int n = 0; n <= 4; n++) {
        struct offload_choice c = walk(&plain, &layer, n);
        is_near(c.cpu_s, cpu_ms[n] * 1e-3);
        is_near(c.gpu_s, gpu_ms[n] * 1e-3);
        is_near(c.s, fmax(cpu_ms[n], gpu_ms[n]) * 1e-3);
    }
    struct offload_choice c = choose(&plain, &layer);
    ck_assert_int_eq(c.n_copies, 3);
    is_near(c.s, 2.0e-3);
    is_near(c.alone_s, 4.6e-3);
}
END_TEST

/* One miss: on the CPU 0.5 + 1 + 0.1 ms; as a copy 0.1 + 2 c + 0.3. The turn is at c = 0.6 ms for a MiB. */
START_TEST(one_miss_turns_elsewhere)
{
    const struct offload_layer layer = {.misses = alike, .n = 1, .most_copies = 4};
    struct offload_rates r = plain;

    r.copy.mib_s = 0.599e-3;
    ck_assert_int_eq(choose(&r, &layer).n_copies, 1);
    r.copy.mib_s = 0.601e-3;
    ck_assert_int_eq(choose(&r, &layer).n_copies, 0);
}
END_TEST

/* Hits that take the GPU longer than everything leave it free of copies that win nothing; equal times take fewer copies. */
START_TEST(copies_that_win_nothing_are_made)
{
    struct offload_layer layer = {.misses = alike, .n = 2, .most_copies = 4, .hit_mib = 1000, .hit_rows = 1000};

    ck_assert_int_eq(choose(&plain, &layer).n_copies, 0);
    layer.n = 0;
    struct offload_choice c = choose(&plain, &layer);
    ck_assert_int_eq(c.n_copies, 0);
    is_near(c.s, 50.2e-3);
    layer = (struct offload_layer){.misses = alike, .n = 4, .most_copies = 4};
    ck_assert_int_eq(choose(&(struct offload_rates){.cpu = nothing}, &layer).n_copies, 0);
}
END_TEST

START_TEST(more_is_copied_than_there_is_room_for)
{
    struct offload_layer layer = {.misses = alike, .n = 8, .most_copies = 0};

    for (layer.most_copies = 0; layer.most_copies < 5; layer.most_copies++)
        ck_assert_int_eq(choose(&plain, &layer).n_copies, layer.most_copies);
    layer.most_copies = 100;
    layer.n = 1;
    ck_assert_int_eq(choose(&plain, &layer).n_copies, 1);
}
END_TEST

/* Pageable memory: the CPU's own copying comes before its computing, and before PCIe. 2 copies: staged at 0.8 and 1.6, there at
 * 1.3 and 2.1, computed at 2.5; the CPU: 1.6 + 0.5 + 2 + 0.1. */
START_TEST(staging_costs_nothing)
{
    const struct offload_layer layer = {.misses = alike, .n = 4, .most_copies = 4};
    struct offload_rates r = plain;

    r.stage = (struct offload_cost){.mib_s = 0.4e-3};
    struct offload_choice c = walk(&r, &layer, 2);
    is_near(c.cpu_s, 4.2e-3);
    is_near(c.gpu_s, 2.5e-3);
    r.stage.mib_s = 0.45e-3; /* 0.9 ms an expert, computing 1: 4.6, 4.5, 4.4, 4.3; all four 3.6, and 1.1 on the GPU */
    ck_assert_int_eq(choose(&r, &layer).n_copies, 3);
    is_near(choose(&r, &layer).s, 4.3e-3);
    struct offload_expert pinned[4] = {alike[0], alike[1], alike[2], alike[3]}; /* the walk without staging */
    for (int i = 0; i < 4; i++)
        pinned[i].is_pinned = true;
    const struct offload_layer direct = {.misses = pinned, .n = 4, .most_copies = 4};
    is_near(walk(&r, &direct, 2).cpu_s, walk(&plain, &layer, 2).cpu_s);
    is_near(walk(&r, &direct, 2).gpu_s, walk(&plain, &layer, 2).gpu_s);
    r.stage.mib_s = 0.55e-3; /* 1.1 ms: the CPU had better compute them */
    ck_assert_int_eq(choose(&r, &layer).n_copies, 0);
}
END_TEST

/* A prompt: an expert with many rows costs the CPU much more and a copy the same. */
START_TEST(short_prompts_are_copied_or_long_ones_not)
{
    struct offload_expert misses[4];
    struct offload_layer layer = {.misses = misses, .n = 4, .most_copies = 4};
    struct offload_rates r = {.cpu = {.mib_s = 0.05e-3, .row_s = 0.02e-3}, .copy = {.mib_s = 0.4e-3}};
    static const int rows[] = {1, 4, 16, 64}, want[] = {0, 1, 2, 3};

    /* The CPU takes 0.1 + 0.04 * rows ms an expert, a copy 0.8. 1 row: all four are done in 0.56; 4: 1.04 without, 0.8 with one;
     * 16: 2.22 with one, 1.6 with two; 64: 5.3 with two, 2.66 with three, 3.2 with four. */
    for (int n = 0; n < 4; n++) {
        for (int i = 0; i < 4; i++)
            misses[i] = (struct offload_expert){2, rows[n], false, false};
        ck_assert_int_eq(choose(&r, &layer).n_copies, want[n]);
    }
}
END_TEST

START_TEST(order_is_not_most_rows_first)
{
    static const struct offload_expert misses[] = {{2, 1, true, false}, {2, 3, true, false},  {2, 3, false, false},
                                                   {2, 9, true, false}, {2, 1, false, false}, {2, 3, false, false}};
    static const int want[] = {3, 2, 5, 1, 4, 0};
    int order[6];

    offload_order(&(struct offload_layer){.misses = misses, .n = 6}, order);
    ck_assert_mem_eq(order, want, sizeof want);
}
END_TEST

/* What has to be read comes every 3 ms. The CPU computes what is in memory meanwhile; copying the first of those that come is no help,
 * the last one decides: computed by the CPU it is done 1.5 ms after it came (and its row 0.1 later), copied 0.8. */
START_TEST(disk_is_not_waited_for)
{
    static const struct offload_expert misses[] = {{2, 1, false, false}, {2, 1, true, false}, {2, 1, true, false}};
    const struct offload_layer layer = {.misses = misses, .n = 3, .most_copies = 3};
    struct offload_rates r = plain;

    r.read = (struct offload_cost){.mib_s = 1.5e-3};
    is_near(walk(&r, &layer, 0).cpu_s, 7.6e-3); /* 1.5; 3 + 1.5; 6 + 1.5; 0.1 */
    is_near(walk(&r, &layer, 1).gpu_s, 0.8e-3);
    is_near(walk(&r, &layer, 3).gpu_s, 6.8e-3);
    struct offload_choice c = choose(&r, &layer);
    ck_assert_int_eq(c.n_copies, 3);
    is_near(c.s, 6.8e-3);
}
END_TEST

/* FreeToken's formula, with rates as bytes a second. */
static double formula(double b_pcie, double b_cpu, int m)
{
    double f = b_pcie / (b_pcie + b_cpu), low = floor(f * m), best = INFINITY;

    for (double n = low; n <= low + 1 && n <= m; n++)
        best = fmin(best, fmax(n * (1 - f), (m - n) * f));
    return best / (1 - f); /* in units of one copy */
}

START_TEST(formula_is_not_a_case_of_it)
{
    for (int seed = 0; seed < 2000; seed++) {
        srand((unsigned)seed);
        double copy_s = (1 + rand() % 1000) * 1e-6, cpu_s = (1 + rand() % 1000) * 1e-6;
        int m = 1 + rand() % 8;
        const struct offload_rates r = {.cpu = {.mib_s = cpu_s}, .copy = {.mib_s = copy_s}};
        const struct offload_layer layer = {.misses = alike, .n = m, .most_copies = m};
        struct offload_choice c = choose(&r, &layer);
        double want = formula(1 / copy_s, 1 / cpu_s, m) * 2 * copy_s;
        ck_assert_msg(fabs(c.s - want) < 1e-9 * want, "seed %d: %d of %d copies take %g s, the formula's %g", seed,
                      c.n_copies, m, c.s, want);
    }
}
END_TEST

/* ---- fitting ---- */

static double exact(const struct offload_cost *c, double mib, double mib_rows)
{
    return c->call_s + c->mib_s * mib + c->row_s * mib_rows;
}

static const struct offload_cost truth = {30e-6, 80e-6, 5e-6}, guess = {10e-6, 100e-6, 1e-6};

START_TEST(unseen_costs_are_not_the_prior)
{
    struct offload_fit f;

    offload_fit_init(&f, &guess);
    struct offload_cost c = offload_fit_cost(&f);
    ck_assert_mem_eq(&c, &guess, sizeof c);
    for (int i = 0; i < 100; i++) /* copies have no rows */
        offload_fit_add(&f, 1 + i % 5, 0, exact(&truth, 1 + i % 5, 0));
    c = offload_fit_cost(&f);
    ck_assert_double_eq(c.row_s, guess.row_s);
    ck_assert_double_eq_tol(c.mib_s, truth.mib_s, 2e-6);
}
END_TEST

START_TEST(costs_are_not_found_again)
{
    struct offload_fit f;

    offload_fit_init(&f, &guess);
    for (int i = 0; i < 200; i++) {
        double mib = 1 + i % 7, rows = 1 + i % 11;
        offload_fit_add(&f, mib, mib * rows, exact(&truth, mib, mib * rows));
    }
    struct offload_cost c = offload_fit_cost(&f);
    for (double mib = 1; mib < 8; mib++) /* within what a prior of 0.1 observations among 46 pulls */
        ck_assert_double_eq_tol(exact(&c, mib, mib * 5), exact(&truth, mib, mib * 5),
                                0.02 * exact(&truth, mib, mib * 5));
}
END_TEST

/* Steps of one row: bytes and rows come together always. What is predicted for such steps is right nevertheless, and no cost is
 * negative. */
START_TEST(rows_that_always_are_one_spoil_the_fit)
{
    struct offload_fit f;

    offload_fit_init(&f, &guess);
    for (int i = 0; i < 200; i++)
        offload_fit_add(&f, 1 + i % 3, 1 + i % 3, exact(&truth, 1 + i % 3, 1 + i % 3));
    struct offload_cost c = offload_fit_cost(&f);
    for (int mib = 1; mib < 4; mib++)
        ck_assert_double_eq_tol(exact(&c, mib, mib), exact(&truth, mib, mib), 0.02 * exact(&truth, mib, mib));
    ck_assert_double_ge(c.call_s, 0);
    ck_assert_double_ge(c.mib_s, 0);
    ck_assert_double_ge(c.row_s, 0);
}
END_TEST

/* A call of 4 MiB takes 10 times as long from some moment on, and later as before. */
START_TEST(change_of_speed_is_not_learnt)
{
    struct offload_fit f;
    const double slow[] = {1, 10, 1};

    offload_fit_init(&f, &guess);
    for (int phase = 0; phase < 3; phase++) {
        for (int i = 0; i < 5 * OFFLOAD_HALF; i++)
            offload_fit_add(&f, 4, 4, slow[phase] * exact(&truth, 4, 4));
        struct offload_cost c = offload_fit_cost(&f);
        ck_assert_double_eq_tol(exact(&c, 4, 4) / (slow[phase] * exact(&truth, 4, 4)), 1, phase == 2 ? 0.4 : 0.1);
    }
}
END_TEST

START_TEST(one_hiccup_is_believed)
{
    struct offload_fit f;

    offload_fit_init(&f, &truth);
    for (int i = 0; i < 100; i++)
        offload_fit_add(&f, 4, 4, exact(&truth, 4, 4));
    offload_fit_add(&f, 4, 4, 1); /* a second: three thousand times as long */
    struct offload_cost c = offload_fit_cost(&f);
    ck_assert_double_le(exact(&c, 4, 4), 1.1 * exact(&truth, 4, 4)); /* twice as long, once in 46 */
}
END_TEST

START_TEST(cost_is_negative_or_no_number)
{
    for (int seed = 0; seed < 500; seed++) {
        struct offload_fit f;
        srand((unsigned)seed);
        offload_fit_init(&f, seed % 2 ? &guess : &nothing);
        for (int i = 0; i < 1 + seed % 40; i++) {
            double mib = (rand() % 4) * 0.7, rows = rand() % 3;
            offload_fit_add(&f, mib, mib * rows, (rand() % 1000) * 1e-6);
            struct offload_cost c = offload_fit_cost(&f);
            ck_assert_msg(c.call_s >= 0 && c.mib_s >= 0 && c.row_s >= 0 && isfinite(c.call_s + c.mib_s + c.row_s),
                          "seed %d: %g %g %g", seed, c.call_s, c.mib_s, c.row_s);
        }
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("offload");
    TCase *tc = tcase_create("offload");

    tcase_add_test(tc, walk_is_not_what_a_pencil_says);
    tcase_add_test(tc, one_miss_turns_elsewhere);
    tcase_add_test(tc, copies_that_win_nothing_are_made);
    tcase_add_test(tc, more_is_copied_than_there_is_room_for);
    tcase_add_test(tc, staging_costs_nothing);
    tcase_add_test(tc, short_prompts_are_copied_or_long_ones_not);
    tcase_add_test(tc, order_is_not_most_rows_first);
    tcase_add_test(tc, disk_is_not_waited_for);
    tcase_add_test(tc, formula_is_not_a_case_of_it);
    tcase_add_test(tc, unseen_costs_are_not_the_prior);
    tcase_add_test(tc, costs_are_not_found_again);
    tcase_add_test(tc, rows_that_always_are_one_spoil_the_fit);
    tcase_add_test(tc, change_of_speed_is_not_learnt);
    tcase_add_test(tc, one_hiccup_is_believed);
    tcase_add_test(tc, cost_is_negative_or_no_number);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
