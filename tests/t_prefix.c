/* Shared beginnings, on a cache whose pages are marked instead of computed: every position of a sequence holds a number that
 * its tokens up to there give, so that a page of the wrong beginning is seen. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/model.h"
#include "src/run/cache.h"
#include "src/run/prefix.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = DEVICE_PAGE_TOK, N_CTX = 640, CHUNK = 640 };

static struct cache *cache;
static struct prefix *tree;

/* Positions of 4 bytes in pages of 256; window 0: one group that keeps everything. */
static void open_with(int n_seq, int n_tables, int64_t pool_tok, int window)
{
    struct kv_shape shape = {.n_groups = window ? 2 : 1, .page_bytes = {256, window ? 256 : 0}, .window = {0, window}};
    struct cache_args args = {.shape = &shape,
                              .n_seq = n_seq,
                              .n_ctx = N_CTX,
                              .chunk_tok = CHUNK,
                              .pool_tok = pool_tok,
                              .n_tables = n_tables};
    ck_assert_int_eq(cache_open(&args, &cache), 0);
    ck_assert_int_eq(prefix_open(cache, &tree), 0);
}

static void close_both(void)
{
    prefix_close(tree);
    ck_assert_int_eq(cache_pages_used(cache, 0), 0);
    cache_close(cache);
}

static uint32_t mark_of(const int32_t *token, int64_t pos)
{
    uint32_t h = 2166136261u;
    for (int64_t i = 0; i <= pos; i++)
        h = (h ^ (uint32_t)token[i]) * 16777619u;
    return h;
}

static uint32_t *place(const struct cache_seq *s, int group, int64_t pos)
{
    struct kv_seq view;
    cache_view(s, &view);
    uint32_t *page = view.page[group][pos / PAGE];
    return page ? page + pos % PAGE : NULL;
}

/* "Run" the tokens of a user up to position end. */
static void run_to(struct prefix_user *u, const int32_t *token, int64_t end, int n_groups)
{
    int64_t len = cache_len(u->seq);
    ck_assert_msg(cache_reserve(u->seq, end - len) == 0, "%s", err_text());
    for (int64_t pos = len; pos < end; pos++)
        for (int group = 0; group < n_groups; group++)
            *place(u->seq, group, pos) = mark_of(token, pos);
    cache_commit(u->seq, end - len);
}

/* Everything that a sequence still sees belongs to its own tokens. */
static void must_hold(const struct prefix_user *u, const int32_t *token, int n_groups, int window)
{
    int64_t len = cache_len(u->seq);
    for (int group = 0; group < n_groups; group++)
        for (int64_t pos = group && len >= window ? len - window + 1 : 0; pos < len; pos++) {
            const uint32_t *at = place(u->seq, group, pos);
            if (!at || *at != mark_of(token, pos)) /* Check writes down each assertion that it passes */
                ck_abort_msg("group %d: position %lld of %lld is another's", group, (long long)pos, (long long)len);
        }
}

/* Prompts: n_same equal tokens, then their own. */
static void make_prompt(int32_t *token, int64_t n_same, int64_t n, int who)
{
    for (int64_t i = 0; i < n; i++)
        token[i] = i < n_same ? (int32_t)i : (int32_t)(1000 * (who + 1) + i);
}

START_TEST(equal_beginning_is_computed_twice)
{
    int32_t a[300], b[300];
    struct prefix_user ua, ub;
    struct prefix_match m;
    open_with(4, 12, 0, 0);
    make_prompt(a, 200, 300, 0);
    make_prompt(b, 200, 250, 1);
    ck_assert_int_eq(prefix_join(tree, a, 300, &ua), 0);
    ck_assert_int_eq(cache_len(ua.seq), 0);

    /* on the way: the second may wait for 200 */
    run_to(&ua, a, 100, 1);
    prefix_look(tree, b, 250, &m);
    ck_assert_int_eq(m.n_now, 100);
    ck_assert_int_eq(m.n_soon, 200);
    ck_assert_ptr_eq(m.maker, &ua);

    /* there: it shares exactly 200, in the middle of a page, and writes into its own copy */
    run_to(&ua, a, 300, 1);
    prefix_look(tree, b, 250, &m);
    ck_assert_int_eq(m.n_now, 200);
    ck_assert_int_eq(m.n_soon, 0);
    int64_t before = cache_pages_used(cache, 0);
    ck_assert_int_eq(prefix_join(tree, b, 250, &ub), 0);
    ck_assert_int_eq(cache_len(ub.seq), 200);
    ck_assert_int_eq(cache_pages_used(cache, 0), before);
    run_to(&ub, b, 250, 1);
    ck_assert_int_eq(cache_pages_used(cache, 0), before + 1);
    must_hold(&ua, a, 1, 0);
    must_hold(&ub, b, 1, 0);
    prefix_leave(tree, &ua, false);
    must_hold(&ub, b, 1, 0);
    prefix_leave(tree, &ub, false);
    close_both();
}
END_TEST

START_TEST(pages_of_those_who_left_are_lost)
{
    int32_t a[300], b[300];
    struct prefix_user u;
    open_with(2, 6, 0, 0);
    make_prompt(a, 200, 300, 0);
    make_prompt(b, 200, 300, 1);
    ck_assert_int_eq(prefix_join(tree, a, 300, &u), 0);
    run_to(&u, a, 300, 1);
    prefix_leave(tree, &u, false);
    ck_assert_int_eq(cache_pages_used(cache, 0), 4); /* 256 of 300: whole pages */
    ck_assert_int_eq(prefix_join(tree, b, 300, &u), 0);
    ck_assert_int_eq(cache_len(u.seq), 200);
    run_to(&u, b, 300, 1);
    must_hold(&u, b, 1, 0);
    prefix_leave(tree, &u, true);
    while (prefix_shrink(tree)) {
    }
    ck_assert_int_eq(cache_pages_used(cache, 0), 0);
    ck_assert_int_eq(prefix_join(tree, a, 300, &u), 0);
    ck_assert_int_eq(cache_len(u.seq), 0);
    prefix_leave(tree, &u, false);
    close_both();
}
END_TEST

/* A window cannot be shortened: the forerunner is met exactly at the place, and the tree keeps that place. */
START_TEST(window_gives_pages_that_are_gone)
{
    enum { WINDOW = 70 };
    int32_t a[500], b[500];
    struct prefix_user ua, ub, uc;
    struct prefix_match m;
    open_with(4, 12, 0, WINDOW);
    make_prompt(a, 200, 500, 0);
    make_prompt(b, 200, 500, 1);
    ck_assert_int_eq(prefix_join(tree, a, 500, &ua), 0);
    run_to(&ua, a, 200, 2);
    ck_assert_int_eq(prefix_join(tree, b, 500, &ub), 0);
    ck_assert_int_eq(cache_len(ub.seq), 200);
    run_to(&ua, a, 500, 2);
    run_to(&ub, b, 500, 2);
    must_hold(&ua, a, 2, WINDOW);
    must_hold(&ub, b, 2, WINDOW);
    prefix_leave(tree, &ua, false);
    prefix_leave(tree, &ub, false);

    make_prompt(b, 200, 500, 2);
    prefix_look(tree, b, 500, &m);
    ck_assert_int_eq(m.n_now, 200);
    ck_assert_int_eq(prefix_join(tree, b, 500, &uc), 0);
    run_to(&uc, b, 500, 2);
    must_hold(&uc, b, 2, WINDOW);

    /* 150 tokens in common: nobody stopped there, and nobody can go back */
    make_prompt(a, 150, 500, 3);
    prefix_look(tree, a, 500, &m);
    ck_assert_int_eq(m.n_now, 0);
    prefix_leave(tree, &uc, false);
    close_both();
}
END_TEST

START_TEST(tree_without_tables_refuses_or_leaks)
{
    int32_t t[100];
    struct prefix_user u[3];
    open_with(3, 3, 0, 0);
    for (int i = 0; i < 3; i++) {
        make_prompt(t, 80, 100, i);
        ck_assert_int_eq(prefix_join(tree, t, 100, &u[i]), 0);
        run_to(&u[i], t, 100, 1);
        must_hold(&u[i], t, 1, 0);
    }
    struct prefix_user more;
    ck_assert_int_eq(prefix_join(tree, t, 100, &more), ERR_LIMIT);
    ck_assert_ptr_null(more.seq);
    for (int i = 0; i < 3; i++)
        prefix_leave(tree, &u[i], false);
    ck_assert_int_eq(prefix_join(tree, t, 100, &more), 0);
    ck_assert_int_ge(cache_len(more.seq), PAGE);
    prefix_leave(tree, &more, false);
    close_both();
}
END_TEST

START_TEST(failed_allocation_leaves_half_a_tree)
{
    int32_t a[300], b[300];
    struct prefix_user ua, ub;
    uint64_t meta = mem_live_bytes(MEM_META);
    for (uint64_t n = 1;; n++) {
        open_with(4, 12, 0, 0);
        make_prompt(a, 200, 300, 0);
        make_prompt(b, 200, 250, 1);
        ck_assert_int_eq(prefix_join(tree, a, 300, &ua), 0);
        run_to(&ua, a, 300, 1);
        mem_fail_nth(n);
        int rc = prefix_join(tree, b, 250, &ub);
        bool reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        if (reached) {
            ck_assert_int_eq(rc, ERR_NOMEM);
            ck_assert_int_eq(prefix_join(tree, b, 250, &ub), 0);
        }
        ck_assert_int_eq(cache_len(ub.seq), 200);
        run_to(&ub, b, 250, 1);
        must_hold(&ua, a, 1, 0);
        must_hold(&ub, b, 1, 0);
        prefix_leave(tree, &ua, false);
        prefix_leave(tree, &ub, false);
        close_both();
        ck_assert_uint_eq(mem_live_bytes(MEM_META), meta);
        if (!reached) {
            ck_assert_uint_ge(n, 4);
            break;
        }
    }
}
END_TEST

/* ---- anything ---- */

static uint32_t draw(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(*state >> 33);
}

/* Prompts over two letters, so that they part everywhere; pages are short at times. Seeds 0 to 19, even ones with windows. */
START_TEST(some_order_of_events_mixes_pages)
{
    enum { N_USER = 6, LEN = 300, WINDOW = 100 };
    static int32_t token[N_USER][LEN];
    struct prefix_user user[N_USER] = {{0}};
    int64_t n[N_USER];
    uint64_t state = (uint64_t)_i + 1;
    int n_groups = _i % 2 ? 1 : 2;

    open_with(N_USER, 2 * N_USER, 1500, n_groups == 2 ? WINDOW : 0);
    for (int round = 0; round < 3000; round++) {
        int i = (int)(draw(&state) % N_USER);
        struct prefix_user *u = &user[i];
        if (!u->leaf) {
            n[i] = 1 + draw(&state) % (LEN - 1);
            for (int k = 0; k < LEN; k++)
                token[i][k] = draw(&state) % 40 == 0;
            if (draw(&state) % 2)
                memcpy(token[i], token[(i + 1) % N_USER], (size_t)(draw(&state) % LEN) * sizeof(int32_t));
            ck_assert_msg(prefix_join(tree, token[i], n[i], u) == 0, "round %d: %s", round, err_text());
            ck_assert_int_le(cache_len(u->seq), n[i]);
        } else if (draw(&state) % 5 == 0) {
            prefix_leave(tree, u, draw(&state) % 3 == 0);
            continue;
        } else {
            int64_t len = cache_len(u->seq), more = draw(&state) % 90;
            if (len + more > LEN)
                more = LEN - len;
            while (!cache_has_room(u->seq, more) && prefix_shrink(tree)) {
            }
            if (cache_has_room(u->seq, more))
                run_to(u, token[i], len + more, n_groups);
        }
        must_hold(u, token[i], n_groups, WINDOW);
    }
    for (int i = 0; i < N_USER; i++) {
        if (user[i].leaf)
            must_hold(&user[i], token[i], n_groups, WINDOW);
        prefix_leave(tree, &user[i], false);
    }
    close_both();
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("prefix");
    TCase *t = tcase_create("prefix");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, equal_beginning_is_computed_twice);
    tcase_add_test(t, pages_of_those_who_left_are_lost);
    tcase_add_test(t, window_gives_pages_that_are_gone);
    tcase_add_test(t, tree_without_tables_refuses_or_leaks);
    tcase_add_test(t, failed_allocation_leaves_half_a_tree);
    tcase_add_loop_test(t, some_order_of_events_mixes_pages, 0, 20);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
