/* Which experts stay in memory, and which move to where they are wanted more: the policies alone, on numbers. */
#include "src/run/evict.h"

#include "src/run/adapt.h"
#include "tests/run_suite.h"

#include <check.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Silberschatz, Galvin, Gagne, Operating System Concepts, the chapter on virtual memory: 12 faults of LRU with 3 frames. */
START_TEST(recency_is_not_that_of_the_textbook)
{
    static const int wanted[] = {7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1};
    enum { N = sizeof wanted / sizeof *wanted, N_SLOTS = 3 };
    struct evict_slot slots[N_SLOTS] = {{.state = EVICT_FREE}};
    int in_slot[N_SLOTS] = {-1, -1, -1}, n_faults = 0;

    for (int t = 0; t < N; t++) {
        int at = 0;
        while (at < N_SLOTS && in_slot[at] != wanted[t])
            at++;
        if (at == N_SLOTS) {
            n_faults++;
            at = evict_choose(slots, N_SLOTS);
            in_slot[at] = wanted[t];
        }
        slots[at] = (struct evict_slot){EVICT_KEPT, 1, 0, (uint64_t)t};
    }
    ck_assert_int_eq(n_faults, 12);
}
END_TEST

/* 10 wanted in a circle, 4 slots: recency would never hit. One slot serves those that pass, so 3 of 10 hit in each round. */
START_TEST(circle_larger_than_the_slots_never_hits)
{
    enum { N = 10, N_SLOTS = 4, N_ROUNDS = 5 };
    struct evict_slot slots[N_SLOTS] = {{.state = EVICT_FREE}};
    int in_slot[N_SLOTS] = {-1, -1, -1, -1};

    for (int round = 0; round < N_ROUNDS; round++) {
        int n_hits = 0;
        for (int want = 0; want < N; want++) {
            int at = 0;
            while (at < N_SLOTS && in_slot[at] != want)
                at++;
            if (at < N_SLOTS) {
                n_hits++;
                continue;
            }
            at = evict_choose(slots, N_SLOTS);
            in_slot[at] = want;
            slots[at] = (struct evict_slot){EVICT_PASSING, 0, 0, (uint64_t)(round * N + want)};
        }
        ck_assert_int_eq(n_hits, round ? N_SLOTS - 1 : 0);
    }
}
END_TEST

START_TEST(held_slot_goes_or_free_one_does_not)
{
    struct evict_slot slots[] = {{EVICT_HELD, 0, 0, 0},  {EVICT_KEPT, 4, 2, 9},     {EVICT_KEPT, 5, 2, 9},
                                 {EVICT_KEPT, 1, 2, 10}, {EVICT_PASSING, 7, 9, 99}, {EVICT_FREE, 0, 0, 0},
                                 {EVICT_KEPT, 9, 1, 11}};

    ck_assert_int_eq(evict_choose(slots, 6), 5);
    slots[4].state = slots[5].state = EVICT_HELD;
    ck_assert_int_eq(evict_choose(slots, 7), 6); /* the colder one, though it is the newest */
    slots[4].state = EVICT_PASSING;
    ck_assert_int_eq(evict_choose(slots, 5), 4); /* what passes, before what is kept */
    ck_assert_int_eq(evict_choose(slots, 4), 2); /* equally old: the rarer one */
    ck_assert_int_eq(evict_choose(slots, 1), -1);
    ck_assert_int_eq(evict_choose(slots, 0), -1);
    struct evict_slot passing[] = {{EVICT_PASSING, 1, 0, 7}, {EVICT_PASSING, 2, 0, 5}, {EVICT_PASSING, 1, 0, 8}};
    ck_assert_int_eq(evict_choose(passing, 3), 1); /* the rarer one, though it is older */
    passing[1].state = EVICT_HELD;
    ck_assert_int_eq(evict_choose(passing, 3), 2); /* the newer one */
}
END_TEST

/* Used in steps 0, 4 and 8: 1 + 2 + 4 halves as the exponent says. Once in step 11 is less than that, in step 12 more. */
START_TEST(heat_is_not_the_sum_of_faded_uses)
{
    double often = evict_heat_of(evict_heat_of(evict_heat_of(-INFINITY, 0, 4), 4, 4), 8, 4);

    ck_assert_double_eq_tol(often, log2(1 + 2 + 4), 4 * DBL_EPSILON * 3);
    ck_assert_double_eq(evict_heat_of(-INFINITY, 12, 4), 3);
    ck_assert_double_lt(evict_heat_of(-INFINITY, 11, 4), often);
    ck_assert_double_gt(evict_heat_of(-INFINITY, 12, 4), often);
    ck_assert_double_eq(evict_heat_of(evict_heat_of(-INFINITY, 12, 4), 12, 4), 4);
}
END_TEST

/* Ten uses against none are more than chance, nine are not: (10 - 0)^2 > 9 * 10, 9^2 = 9 * 9. A hundred do not beat eighty, but half
 * of that: 50^2 > 9 * 150. */
START_TEST(accident_is_taken_for_a_favourite)
{
    enum { HALF = 64 };
    double n[101];

    n[0] = -INFINITY;
    for (int i = 1; i <= 100; i++)
        n[i] = evict_heat_of(n[i - 1], 5 * HALF, HALF);
    ck_assert(evict_is_warmer(n[10], n[0], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[9] - 1e-9, n[0], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[100], n[80], 5 * HALF, HALF));
    ck_assert(evict_is_warmer(n[100], n[50], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[50], n[100], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[0], n[0], 5 * HALF, HALF));
    ck_assert(!evict_is_warmer(n[18], n[0], 6 * HALF, HALF)); /* half of them have faded */
}
END_TEST

static uint64_t draw(uint64_t *x)
{
    *x ^= *x << 13, *x ^= *x >> 7, *x ^= *x << 17;
    return *x >> 11;
}

/* Three of twelve favourites and three of the others: with 16 slots only counting over many steps keeps the favourites. */
static void want_favourites(uint64_t *x, int32_t *ids)
{
    for (int i = 0; i < 3; i++) {
        ids[i] = 4 * i + (int32_t)(draw(x) % 4);
        ids[3 + i] = 12 + 50 * i + (int32_t)(draw(x) % 50);
    }
}

/* Two sixes in turn for twelve steps, then two others: whoever counts over many steps keeps what is gone. */
static void want_new_ones(uint64_t step, int32_t *ids)
{
    for (int i = 0; i < 6; i++)
        ids[i] = 12 + (int32_t)(step / 12 * 12 + step % 2 * 6 + (uint64_t)i) % 150;
}

/* Layer 1 of 8 is not among those that are simulated; of one layer, layer 0 is. */
START_TEST(half_life_does_not_follow_what_is_wanted)
{
    struct adapt *one, *many;
    uint64_t x = 88172645463325252u, step = 0;
    int32_t ids[6];
    int half = -1;

    ck_assert_int_eq(adapt_open(16, 1, 162, &one), 0);
    ck_assert_int_eq(adapt_open(8 * 16, 8, 162, &many), 0);
    for (; step < 300; step++) {
        want_favourites(&x, ids);
        half = adapt_loan(one, step, 0, ids, 6);
        ck_assert_int_eq(adapt_loan(many, step, 1, ids, 6), 1);
    }
    ck_assert_int_ge(half, 2);
    for (; step < 330; step++) {
        want_new_ones(step, ids);
        half = adapt_loan(one, step, 0, ids, 6);
    }
    ck_assert_int_lt(half, 2);
    for (; step < 600; step++) {
        want_favourites(&x, ids);
        half = adapt_loan(one, step, 0, ids, 6);
    }
    ck_assert_int_ge(half, 2);
    adapt_close(many);
    adapt_close(one);
}
END_TEST

enum { MOVES_MOST = 128, MOVES_SPAN = 500, MOVES_N_SPANS = 8, MOVES_HALF = 64 };

/* A router's choices: so many a step of all, `favour` of them among n_places favourites. */
struct router {
    int n_experts, n_chosen, n_places;
    double favour;
};

/* What happened in each span of steps. */
struct moves_span {
    int n_moves, n_hits;
};

static int choose(const struct router *r, bool is_other_topic, uint64_t *x)
{
    double u = (double)draw(x) / 9007199254740992.0;

    if (u >= r->favour)
        return (int)((u - r->favour) / (1 - r->favour) * r->n_experts);
    int favourite = (int)(u / r->favour * r->n_places);
    return is_other_topic ? r->n_places / 2 + favourite : r->n_experts - 1 - favourite;
}

/* One move a step at most, from the first of a step's experts that has no place and is wanted clearly more than the least wanted one
 * that has. The favourites, if there are, are not those that are there at first, and become others after half of the spans. */
static void play_moves(const struct router *r, struct moves_span spans[MOVES_N_SPANS])
{
    double heat[MOVES_MOST];
    bool has_place[MOVES_MOST];
    uint64_t x = 88172645463325252u;

    memset(spans, 0, MOVES_N_SPANS * sizeof *spans);
    for (int e = 0; e < r->n_experts; e++) {
        heat[e] = -INFINITY;
        has_place[e] = e < r->n_places;
    }
    for (int step = 0; step < MOVES_N_SPANS * MOVES_SPAN; step++) {
        struct moves_span *span = &spans[step / MOVES_SPAN];
        bool is_wanted[MOVES_MOST] = {false};
        int cold = -1, warm = -1;
        for (int k = 0; k < r->n_chosen;) {
            int e = choose(r, step >= MOVES_N_SPANS / 2 * MOVES_SPAN, &x);
            if (is_wanted[e])
                continue;
            is_wanted[e] = true;
            heat[e] = evict_heat_of(heat[e], (uint64_t)step, MOVES_HALF);
            span->n_hits += has_place[e];
            k++;
        }
        for (int e = 0; e < r->n_experts; e++)
            cold = has_place[e] && !is_wanted[e] && (cold < 0 || heat[e] < heat[cold]) ? e : cold;
        for (int e = 0; e < r->n_experts && warm < 0; e++)
            if (is_wanted[e] && !has_place[e] && evict_is_warmer(heat[e], heat[cold], (uint64_t)step, MOVES_HALF))
                warm = e;
        if (warm < 0)
            continue;
        has_place[warm] = true;
        has_place[cold] = false;
        span->n_moves++;
    }
}

static double share_of_hits(const struct router *r, const struct moves_span *span)
{
    return (double)span->n_hits / (r->n_chosen * MOVES_SPAN);
}

/* Without favourites hardly any expert moves, though every count differs: one in 200 steps of a layer is a fourth of a move for each token
 * of 48 layers. With favourites they end up where the places are, and nearly all of them do so in the first 500 steps, at first and
 * after they have become others; then there is rest again. */
START_TEST(moves_follow_chance_and_not_favourites)
{
    static const struct router routers[] = {{64, 4, 16, 0}, {64, 4, 16, 0.7}, {128, 8, 50, 0}, {128, 8, 50, 0.7},
                                            {32, 4, 12, 0}, {32, 4, 12, 0.6}, {8, 2, 3, 0},    {8, 2, 3, 0.6}};

    for (size_t i = 0; i < sizeof routers / sizeof *routers; i++) {
        const struct router *r = &routers[i];
        struct moves_span spans[MOVES_N_SPANS];
        double by_chance = (double)r->n_places / r->n_experts;
        play_moves(r, spans);
        for (int k = 0; k < MOVES_N_SPANS; k++) {
            bool is_first = k % (MOVES_N_SPANS / 2) == 0, is_last = k % (MOVES_N_SPANS / 2) == MOVES_N_SPANS / 2 - 1;
            double hits = share_of_hits(r, &spans[k]);
            if (r->favour == 0) {
                ck_assert_int_le(spans[k].n_moves, MOVES_SPAN / 200);
                ck_assert_double_eq_tol(hits, by_chance, 0.06);
            } else {
                ck_assert_msg(is_first || hits > r->favour, "router %zu, span %d: %g hits", i, k, hits);
                ck_assert_msg(!is_last || spans[k].n_moves <= MOVES_SPAN / 100, "router %zu, span %d: %d moves", i, k,
                              spans[k].n_moves);
            }
        }
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("evict");
    TCase *tc = tcase_create("evict");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, recency_is_not_that_of_the_textbook);
    tcase_add_test(tc, circle_larger_than_the_slots_never_hits);
    tcase_add_test(tc, held_slot_goes_or_free_one_does_not);
    tcase_add_test(tc, heat_is_not_the_sum_of_faded_uses);
    tcase_add_test(tc, accident_is_taken_for_a_favourite);
    tcase_add_test(tc, half_life_does_not_follow_what_is_wanted);
    tcase_add_test(tc, moves_follow_chance_and_not_favourites);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
