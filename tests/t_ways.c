/* Which ways steps of a batch go, by invented times. */
#include "src/run/ways.h"

#include "src/plan/plan.h"
#include "tests/run_suite.h"

#include <check.h>
#include <string.h>

/* A plan with pages on both sides that allows halves, or not. */
static struct plan plan_of(bool allows_halves, bool begins_halved, bool begins_waiting)
{
    struct plan p = {.has_gpu = true, .n_seq = 8, .kv_tok = allows_halves ? 4096 : 0};

    p.gpu.kv_tok = 1024;
    p.gpu.halves = begins_halved;
    p.gpu.kv_waits = begins_waiting;
    return p;
}

static const struct ways_step both = {.n_near = 3, .n_far = 4, .n_host = 4};

/* Steps that take these times a row by what they do. */
static void run(struct ways *w, const struct ways_step *s, int n, double waiting_s, double halved_s, double whole_s)
{
    for (int i = 0; i < n; i++) {
        ways_begin(w, s);
        ck_assert(!w->is_waiting || !w->is_halved);
        ck_assert(w->waits.part == TIER_WAIT || w->halves.part == TIER_WAIT); /* one trial at a time */
        ways_end(w, w->is_waiting ? waiting_s : w->is_halved ? halved_s : whole_s);
    }
}

START_TEST(worse_way_is_kept)
{
    static const struct {
        double waiting_s, halved_s, whole_s;
        bool waits, halves;
    } cases[] = {{3, 1, 2, false, true}, {3, 2, 1, false, false}, {1, 2, 3, true, true}, {1, 3, 2, true, false}};

    for (int i = 0; i < 4; i++)
        for (int start = 0; start < 4; start++) {
            const struct plan p = plan_of(true, start & 1, start & 2);
            struct ways w;
            ways_init(&w, &p);
            run(&w, &both, 2000, cases[i].waiting_s, cases[i].halved_s, cases[i].whole_s);
            ck_assert_int_eq(w.waits.is_off, cases[i].waits);
            if (!cases[i].waits) /* of those who wait nobody makes a half */
                ck_assert_int_eq(!w.halves.is_off, cases[i].halves);
            ck_assert_uint_gt(w.waits.n_trials, 0);
        }
}
END_TEST

START_TEST(nobody_is_left)
{
    static const struct ways_step steps[] = {
        {.n_near = 0, .n_far = 4, .n_host = 4}, {.n_near = 5, .n_far = 0, .n_host = 2}, {.n_near = 1, .n_host = 1}};
    const struct plan p = plan_of(true, true, true);
    struct ways w;

    ways_init(&w, &p);
    for (int i = 0; i < 3; i++) {
        ways_begin(&w, &steps[i]);
        ck_assert(!w.is_waiting);
        ck_assert_int_eq(w.is_halved, i < 2); /* one row has no halves */
    }
    ways_begin(&w, &both);
    ck_assert(w.is_waiting);
    ways_let_all(&w);
    ck_assert(!w.is_waiting);
    ck_assert_int_eq(w.waits_kind, TIER_NO_KIND);
}
END_TEST

/* Steps with prompts, and of plans without halves, are run as they are, and compared with nothing. */
START_TEST(unlike_steps_are_compared)
{
    const struct ways_step prompt = {.n_near = 3, .n_far = 4, .n_host = 4, .has_prompt = true};
    struct plan p = plan_of(true, true, false);
    struct ways w;

    ways_init(&w, &p);
    run(&w, &prompt, 1000, 1, 3, 2);
    ck_assert(w.is_halved);
    ck_assert_uint_eq(w.waits.n_trials + w.halves.n_trials, 0);
    p = plan_of(false, true, false);
    ways_init(&w, &p);
    run(&w, &both, 1000, 3, 1, 2);
    ck_assert(!w.is_halved);
    ck_assert_uint_eq(w.halves.n_trials, 0);
    ck_assert_uint_gt(w.waits.n_trials, 0);
}
END_TEST

/* Whoever waits does so in all steps from some place on; before, nobody could, and a trial of halves had begun, which nothing ends now. */
START_TEST(trial_that_cannot_go_on_holds_up_the_other)
{
    const struct ways_step all_far = {.n_near = 0, .n_far = 4, .n_host = 4}, all_near = {.n_near = 4, .n_host = 2};
    const struct plan waiting = plan_of(true, true, true), p = plan_of(true, false, false);
    struct ways w;

    ways_init(&w, &waiting);
    run(&w, &all_far, TIER_FIRST + 3, 3, 1, 2);
    ck_assert_int_eq(w.halves.part, TIER_BEFORE);
    run(&w, &both, 2000, 3, 1, 2);
    ck_assert_uint_gt(w.waits.n_trials, 0);
    ck_assert(!w.waits.is_off);
    ways_init(&w, &p); /* the other way round: one of waiting, and then there is nobody who may */
    run(&w, &both, TIER_FIRST + 3, 3, 1, 2);
    ck_assert_int_eq(w.waits.part, TIER_BEFORE);
    run(&w, &all_near, 2000, 3, 1, 2);
    ck_assert_uint_gt(w.halves.n_trials, 0);
    ck_assert(!w.halves.is_off);
}
END_TEST

/* No room for those who would not wait, whenever that is tried. */
START_TEST(trial_without_room_holds_up_the_other)
{
    const struct plan p = plan_of(true, false, false);
    struct ways w;

    ways_init(&w, &p);
    for (int i = 0; i < 2000; i++) {
        ways_begin(&w, &both);
        if (w.is_waiting)
            ways_let_all(&w);
        ways_end(&w, w.is_halved ? 1 : 2);
    }
    ck_assert_uint_eq(w.waits.n_trials, 0);
    ck_assert_uint_gt(w.halves.n_trials, 0);
    ck_assert(!w.halves.is_off);
}
END_TEST

/* For waiting no two steps in a row are alike, for halves all are. */
START_TEST(trial_of_changing_steps_holds_up_the_other)
{
    static const struct ways_step steps[] = {{.n_near = 3, .n_far = 4, .n_host = 5},
                                             {.n_near = 4, .n_far = 3, .n_host = 5}};
    const struct plan p = plan_of(true, false, false);
    struct ways w;

    ways_init(&w, &p);
    for (int i = 0; i < 1000; i++)
        run(&w, &steps[i % 2], 1, 3, 1, 2);
    ck_assert_uint_eq(w.waits.n_trials, 0);
    ck_assert_uint_gt(w.halves.n_trials, 0);
    ck_assert(!w.halves.is_off);
}
END_TEST

START_TEST(news_are_not_those_of_the_last_change)
{
    const struct plan p = plan_of(true, false, false);
    uint32_t n_seen = 0;
    struct ways w;
    char news[256];

    ways_init(&w, &p);
    ck_assert_str_eq(ways_news(&w, &n_seen, news, sizeof news), "");
    run(&w, &both, 500, 3, 1, 2);
    ck_assert_ptr_nonnull(strstr(ways_news(&w, &n_seen, news, sizeof news), "bring 1 tokens/s, whole ones 0.5"));
    ck_assert_ptr_nonnull(strstr(news, "run in halves from now on"));
    ck_assert_str_eq(ways_news(&w, &n_seen, news, sizeof news), "");
    run(&w, &both, 2000, 0.25, 1, 2);
    ck_assert_ptr_nonnull(strstr(ways_news(&w, &n_seen, news, sizeof news), "they wait for their pages"));
    ck_assert_uint_eq(n_seen, 2);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ways");
    TCase *tc = tcase_create("ways");

    tcase_add_test(tc, worse_way_is_kept);
    tcase_add_test(tc, nobody_is_left);
    tcase_add_test(tc, unlike_steps_are_compared);
    tcase_add_test(tc, trial_that_cannot_go_on_holds_up_the_other);
    tcase_add_test(tc, trial_without_room_holds_up_the_other);
    tcase_add_test(tc, trial_of_changing_steps_holds_up_the_other);
    tcase_add_test(tc, news_are_not_those_of_the_last_change);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
