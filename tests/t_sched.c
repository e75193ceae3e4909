/* Who runs in the next step: the arithmetic alone. Expected numbers are worked out by hand. */
#include "src/run/sched.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdlib.h>

enum { MOST = 8 };

static struct sched_seq decoding(int64_t len)
{
    return (struct sched_seq){.len = len, .n_tok = len + 1, .first_out = len};
}

static struct sched_seq reading(int64_t len, int64_t n_tok)
{
    return (struct sched_seq){.len = len, .n_tok = n_tok, .first_out = n_tok - 1};
}

static void must_be(const struct sched_seq *s, int i, int n_rows, int n_out)
{
    ck_assert_msg(s[i].n_rows == n_rows && s[i].n_out == n_out, "sequence %d: %d rows, %d of logits; not %d and %d", i,
                  s[i].n_rows, s[i].n_out, n_rows, n_out);
}

START_TEST(long_prompt_stalls_those_who_are_answered)
{
    struct sched_seq s[] = {reading(0, 10000), decoding(50), decoding(7), reading(3, 20)};
    const struct sched_limits limits = {.n_rows = 100, .chunk_tok = 96, .n_out = 4};
    sched_rows(s, 4, &limits);
    must_be(s, 1, 1, 1);
    must_be(s, 2, 1, 1);
    must_be(s, 0, 96, 0);
    must_be(s, 3, 0, 0);
}
END_TEST

START_TEST(chunk_goes_to_others_than_the_oldest)
{
    struct sched_seq s[] = {reading(0, 10), reading(0, 30), reading(0, 100), decoding(1)};
    const struct sched_limits limits = {.n_rows = 68, .chunk_tok = 64, .n_out = 4};
    sched_rows(s, 4, &limits);
    must_be(s, 0, 10, 1);
    must_be(s, 1, 30, 1);
    must_be(s, 2, 24, 0);
    must_be(s, 3, 1, 1);
}
END_TEST

START_TEST(step_goes_beyond_a_cut)
{
    struct sched_seq s[] = {reading(10, 90), reading(70, 90), reading(40, 90)};
    const struct sched_limits limits = {.n_rows = 200, .chunk_tok = 200, .n_out = 3};
    for (int i = 0; i < 3; i++)
        s[i].cut = 70;
    sched_rows(s, 3, &limits);
    must_be(s, 0, 60, 0);
    must_be(s, 1, 20, 1); /* a cut that was passed counts no more */
    must_be(s, 2, 30, 0);
}
END_TEST

/* Scoring: tokens 20 to 39 give logits, five rows of them are left beside the one that decodes. */
START_TEST(more_logits_than_a_step_has)
{
    struct sched_seq s[] = {reading(0, 40), decoding(9)};
    const struct sched_limits limits = {.n_rows = 64, .chunk_tok = 62, .n_out = 6};
    s[0].first_out = 20;
    sched_rows(s, 2, &limits);
    must_be(s, 0, 25, 5);
    must_be(s, 1, 1, 1);
    s[0].len = 25;
    sched_rows(s, 2, &limits);
    must_be(s, 0, 5, 5);
    s[0].len = 39;
    sched_rows(s, 2, &limits);
    must_be(s, 0, 1, 1);
}
END_TEST

static uint32_t draw(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*state >> 33);
}

/* Whatever the numbers are: limits hold, nobody who decodes sits out, somebody runs, and rows are tokens that there are. */
START_TEST(some_mix_breaks_a_promise)
{
    uint64_t state = 7;
    for (int round = 0; round < 20000; round++) {
        struct sched_seq s[MOST];
        int n = 1 + (int)(draw(&state) % MOST), n_rows = 0, n_out = 0, chunk = 0;
        struct sched_limits limits = {.chunk_tok = 1 + (int)(draw(&state) % 100), .n_out = n + (int)(draw(&state) % 4)};
        limits.n_rows = limits.chunk_tok + n;
        for (int i = 0; i < n; i++) {
            int64_t len = draw(&state) % 300;
            s[i] = draw(&state) % 2 ? decoding(len) : reading(len, len + 1 + draw(&state) % 500);
            if (draw(&state) % 4 == 0)
                s[i].first_out = draw(&state) % 400;
            s[i].cut = draw(&state) % 400;
        }
        sched_rows(s, n, &limits);
        for (int i = 0; i < n; i++) {
            bool decodes = s[i].n_tok - s[i].len == 1;
            ck_assert_msg(s[i].n_rows >= 0 && s[i].len + s[i].n_rows <= s[i].n_tok && s[i].n_out <= s[i].n_rows,
                          "round %d, sequence %d: %d rows, %d of logits", round, i, s[i].n_rows, s[i].n_out);
            ck_assert_msg(!decodes || s[i].n_rows == 1, "round %d: %d was being answered and sat out", round, i);
            n_rows += s[i].n_rows;
            n_out += s[i].n_out;
            chunk += decodes ? 0 : s[i].n_rows;
        }
        ck_assert_msg(n_rows > 0 && n_rows <= limits.n_rows && n_out <= limits.n_out && chunk <= limits.chunk_tok,
                      "round %d: %d rows, %d of logits, %d in the chunk", round, n_rows, n_out, chunk);
    }
}
END_TEST

START_TEST(room_is_given_twice)
{
    ck_assert(sched_admits(100000, 0, 0)); /* alone it always may begin */
    ck_assert(sched_admits(100, 164, 1));  /* half a page for each of two */
    ck_assert(!sched_admits(101, 164, 1));
    ck_assert(!sched_admits(100, 164, 2));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("sched");
    TCase *t = tcase_create("sched");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, long_prompt_stalls_those_who_are_answered);
    tcase_add_test(t, chunk_goes_to_others_than_the_oldest);
    tcase_add_test(t, step_goes_beyond_a_cut);
    tcase_add_test(t, more_logits_than_a_step_has);
    tcase_add_test(t, some_mix_breaks_a_promise);
    tcase_add_test(t, room_is_given_twice);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
