/* Messages between ranks and the lines that they give each other, over a link that lives in this process: what arrives is what was
 * sent, in its order, and whatever is wrong is said. Over MPI: tests/batch_mpi. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/batch_rank.h"
#include "src/model/json_room.h"
#include "src/cli/team.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { N_BOX = 64, MOST_BYTES = 4096 };

/* Messages to everybody: each rank of the tests sends to itself. */
static struct {
    char bytes[MOST_BYTES];
    size_t n;
    int from;
} box[N_BOX];
static int n_sent, n_taken, n_slow, n_ranks = 2, aborted;
static bool closed;

static void open_link(int *rank, int *n)
{
    *rank = 0;
    *n = n_ranks;
}

static void close_link(int status)
{
    (void)status;
    closed = true;
}

static void abort_link(int status)
{
    aborted = status;
}

static void put(const void *p, size_t n, int from)
{
    ck_assert_int_lt(n_sent, N_BOX);
    ck_assert_uint_le(n, MOST_BYTES);
    memcpy(box[n_sent].bytes, p, n);
    box[n_sent].n = n;
    box[n_sent++].from = from;
}

static void send_bytes(int to, const void *p, size_t n, struct team_request *out)
{
    put(p, n, to);
    *out = (struct team_request){0};
}

static bool is_done(struct team_request *request)
{
    (void)request;
    return n_slow == 0 || n_slow-- == 0;
}

static bool look(int *from, size_t *n)
{
    if (n_taken == n_sent)
        return false;
    *from = box[n_taken].from;
    *n = box[n_taken].n;
    return true;
}

/* Of rank lost_rank no more messages come than those before message lost_at. */
static int lost_rank = -1, lost_at;

static bool take(void *p, size_t n)
{
    int i = n_taken++;
    memcpy(p, box[i].bytes, n);
    return box[i].from != lost_rank || i < lost_at;
}

static int lost(void)
{
    int k = n_taken > lost_at ? lost_rank : -1;
    lost_rank = k >= 0 ? -1 : lost_rank;
    return k;
}

static struct team_link fake = {TEAM_LINK_VERSION, open_link, close_link, abort_link, send_bytes,
                                is_done,           look,      take,       lost};

/* Under valgrind all tests are in one process. */
static void setup(void)
{
    n_sent = n_taken = n_slow = aborted = lost_at = 0;
    n_ranks = 2;
    closed = false;
    lost_rank = -1;
    fake.version = TEAM_LINK_VERSION;
}

START_TEST(letters_are_lost_or_change)
{
    struct team t = {0};
    struct team_message m;
    bool got;
    uint64_t before = live_bytes();
    ck_assert_int_eq(team_join(&t, &fake, 2), 0);
    ck_assert(!team_is_alone(&t));
    ck_assert_int_eq(team_receive(&t, &m, &got), 0);
    ck_assert(!got);
    n_slow = 5; /* the link keeps letters for a while */
    for (int i = 0; i < 20; i++) {
        char text[40];
        struct team_head head = {.kind = TEAM_LINE, .number = (uint64_t)i, .bits = 1ull << i, .stats = {.n_prompt = 7}};
        memset(text, 'a' + i, sizeof text);
        ck_assert_int_eq(team_send(&t, 1, &head, text, (size_t)i), 0);
    }
    for (int i = 0; i < 20; i++) {
        ck_assert_int_eq(team_receive(&t, &m, &got), 0);
        ck_assert(got);
        ck_assert_int_eq(m.from, 1);
        ck_assert_uint_eq(m.head.number, (uint64_t)i);
        ck_assert_uint_eq(m.head.bits, 1ull << i);
        ck_assert_uint_eq(m.head.stats.n_prompt, 7);
        ck_assert_uint_eq(m.n_bytes, (size_t)i);
        for (int k = 0; k < i; k++)
            ck_assert_int_eq(m.text[k], 'a' + i);
        ck_assert_int_eq(m.text[i], '\0');
    }
    n_slow = 3;
    ck_assert_int_eq(team_send(&t, 1, &(struct team_head){.kind = TEAM_END}, NULL, 0), 0);
    team_close(&t, true, 0);
    ck_assert(closed && !aborted);
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

START_TEST(rubbish_is_taken)
{
    struct team t = {0};
    struct team_message m;
    bool got;
    ck_assert_int_eq(team_join(&t, &fake, 2), 0);
    put("short", 5, 1);
    ck_assert_int_eq(team_receive(&t, &m, &got), FERRY_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "5 bytes from rank 1"));
    put(&(struct team_head){.kind = TEAM_WANT}, sizeof(struct team_head), 2);
    ck_assert_int_eq(team_receive(&t, &m, &got), FERRY_ERR_FORMAT);
    ck_assert_int_eq(team_send(&t, 1, &(struct team_head){0}, "", (size_t)1 << 31), FERRY_ERR_LIMIT);
    ck_assert_int_eq(team_refuse("kind %d", 9), FERRY_ERR_STATE);
    ck_assert_str_eq(err_text(), "kind 9");
    team_close(&t, false, 3);
    ck_assert_int_eq(aborted, 3);
}
END_TEST

START_TEST(loss_of_a_rank_is_not_told_once)
{
    struct team t = {0};
    struct team_message m;
    bool got;
    ck_assert_int_eq(team_join(&t, &fake, 2), 0);
    lost_rank = 1;
    lost_at = 1;
    put(&(struct team_head){.kind = TEAM_WANT, .number = 3}, sizeof(struct team_head), 1);
    put(&(struct team_head){.kind = TEAM_WANT, .number = 4}, sizeof(struct team_head), 1); /* lost on its way */
    ck_assert_int_eq(team_receive(&t, &m, &got), 0);
    ck_assert(got && m.head.kind == TEAM_WANT && m.head.number == 3);
    ck_assert_int_eq(team_receive(&t, &m, &got), 0);
    ck_assert(got && m.head.kind == TEAM_LOST);
    ck_assert_int_eq(m.from, 1);
    ck_assert_uint_eq(m.n_bytes, 0);
    ck_assert_int_eq(team_receive(&t, &m, &got), 0);
    ck_assert(!got);
    put(&(struct team_head){.kind = TEAM_LOST}, sizeof(struct team_head), 1);
    ck_assert_int_eq(team_receive(&t, &m, &got), FERRY_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "rank 1 says that it is lost"));
    team_close(&t, true, 0);
}
END_TEST

START_TEST(another_launcher_or_module_is_taken)
{
    struct team t = {0};
    n_ranks = 1;
    ck_assert_int_eq(team_join(&t, &fake, 4), FERRY_ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "one of 4 processes, of which MPI knows 1"));
    team_close(&t, false, 1);
    t = (struct team){0};
    n_ranks = 2;
    fake.version++;
    ck_assert_int_eq(team_join(&t, &fake, 2), FERRY_ERR_UNSUPPORTED);
    team_close(&t, false, 1);
    ck_assert_int_eq(team_open(&t, &(struct conf){.n_ranks = 1}), 0);
    ck_assert(team_is_alone(&t));
    ck_assert_int_eq(team_hungriest(&t), 0);
    team_close(&t, true, 0);
}
END_TEST

START_TEST(failed_allocation_leaks_or_loses)
{
    uint64_t before = live_bytes();
    bool reached = true;
    for (uint64_t n = 1; reached; n++) {
        struct team t = {0};
        struct team_message m;
        bool got = false;
        int n_told = 0;
        mem_fail_nth(n);
        while (team_join(&t, &fake, 2))
            n_told++;
        while (team_send(&t, 1, &(struct team_head){.number = 5}, "text", 4))
            n_told++;
        while (team_receive(&t, &m, &got))
            n_told++;
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        ck_assert(got && m.head.number == 5 && !strcmp(m.text, "text"));
        ck_assert_int_eq(n_told, reached);
        team_close(&t, true, 0);
        ck_assert_uint_eq(live_bytes(), before);
        ck_assert(reached || n > 2);
    }
}
END_TEST

START_TEST(the_wrong_one_is_fed)
{
    struct team t = {0};
    struct ferry_batch_stats st = {.n_running = 1, .n_prompt = 10};
    n_ranks = 4;
    ck_assert_int_eq(team_join(&t, &fake, 4), 0);
    ck_assert_int_eq(team_hungriest(&t), 0);
    t.member[3].n_wanted = 2;
    t.member[1].n_wanted = 1;
    ck_assert_int_eq(team_hungriest(&t), 3);
    t.member[1].n_wanted = 3;
    ck_assert_int_eq(team_hungriest(&t), 1);
    for (int k = 1; k < 4; k++)
        t.member[k].stats = (struct ferry_batch_stats){.n_running = 2, .n_prompt = 100};
    team_add_stats(&t, &st);
    ck_assert_uint_eq(st.n_running, 7);
    ck_assert_uint_eq(st.n_prompt, 310);
    team_close(&t, true, 0);
}
END_TEST

/* ---- lines ---- */

static const struct conf conf = {.temperature = 0.8,
                                 .top_k = 40,
                                 .top_p = 0.95,
                                 .repeat_penalty = 1,
                                 .n_tokens = 8,
                                 .normalize = "l2",
                                 .quiet = true};

/* Both ranks in one: what rank 0 gives comes back to be taken. */
static int give_and_take(struct batch_run *r, uint64_t number)
{
    int rc = batch_rank_give_line(r, 1, number, "{\"a\":1}", 7);

    return rc ? rc : batch_rank_hear_first(r);
}

static void drop_lines(struct batch_run *r)
{
    batch_rank_drop_given(r);
    batch_rank_drop_held(r);
    team_close(&r->team, true, 0);
}

static uint64_t last_of(const struct batch_queue *q)
{
    const struct batch_given *g = q->first;
    while (g->next)
        g = g->next;
    return g->number;
}

/* What each allocation is for, as its failure says, and how many lines are held and given by then. */
static const struct {
    const char *says;
    uint64_t n_held, n_given;
} short_of[] = {
    {"the lines of other ranks: 2 x ", 0, 0}, {"a line of the input: 1 x ", 0, 0},
    {"a message of 7 bytes", 1, 0},           {"a text of ", 1, 0},
    {"a line of the input: 1 x ", 1, 0},      {NULL, 1, 1},
};

START_TEST(line_without_memory_leaks_or_is_half_in_a_queue)
{
    uint64_t before = live_bytes();
    struct batch_run r = {.conf = &conf, .n_asked = 2};
    ck_assert_int_eq(team_join(&r.team, &fake, 2), 0);
    mem_fail_nth((uint64_t)_i + 1);
    int rc = batch_rank_make_held(&r);
    if (!rc)
        rc = give_and_take(&r, 7);
    uint64_t n_calls = mem_n_calls();
    mem_fail_nth(0);
    if (short_of[_i].says) {
        ck_assert_int_eq(rc, FERRY_ERR_NOMEM);
        ck_assert_msg(strstr(err_text(), short_of[_i].says) != NULL, "%s", err_text());
        ck_assert_uint_eq(n_calls, (uint64_t)_i + 1);
    } else {
        ck_assert_int_eq(rc, 0);
        ck_assert_uint_eq(n_calls, (uint64_t)_i); /* nothing was left out above */
    }
    ck_assert_uint_eq(r.held ? r.held[1].n : 0, short_of[_i].n_held);
    ck_assert_uint_eq(r.given.n, short_of[_i].n_given);
    ck_assert(r.held || batch_rank_make_held(&r) == 0);
    ck_assert_int_eq(give_and_take(&r, 8), 0);
    ck_assert_uint_eq(r.held[1].n, short_of[_i].n_held + 1);
    ck_assert_uint_eq(last_of(&r.held[1]), 8);
    ck_assert_uint_eq(last_of(&r.given), 8);
    drop_lines(&r);
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

/* A line that waits at rank 0, with memory that fails at its nth use from then on; whether it was reached. */
static bool give_up_without(uint64_t n, struct ferry_engine *e, struct ferry_batch *b)
{
    static const char text[] = "{\"prompt\":\"hello\"}";
    struct batch_pending pending[BATCH_MAX_N] = {{0}};
    struct batch_run r = {.conf = &conf, .engine = e, .batch = b, .pending = pending, .n_pending = BATCH_MAX_N};
    struct batch_group *g = mem_zalloc(1, sizeof *g, MEM_OTHER);
    ck_assert_int_eq(team_join(&r.team, &fake, 2), 0);
    ck_assert_int_eq(batch_rank_make_held(&r), 0);
    ck_assert_int_eq(batch_line_read(&conf, text, sizeof text - 1, 1, &g->line), 0);
    ck_assert_msg(batch_run_begin_line(&r, g) == 0 && r.n_flying == 1, "%s", err_text());
    r.team.member[1].n_wanted = 1;
    mem_fail_nth(n);
    int rc = batch_rank_share(&r, false);
    bool reached = mem_n_calls() >= n;
    mem_fail_nth(0);
    ck_assert_int_eq(rc, reached ? FERRY_ERR_NOMEM : 0);
    ck_assert_msg(!reached || strstr(err_text(), " bytes") != NULL, "%s", err_text());
    ck_assert_uint_ge(r.n_flying + r.held[1].n, 1); /* it is not gone */
    ck_assert(reached || (!r.n_flying && r.held[1].first->number == 1 && r.team.member[1].got_end));
    if (r.n_flying) {
        batch_run_withdraw(&r, g);
        batch_run_free_group(g);
    }
    drop_lines(&r);
    return reached;
}

START_TEST(line_that_is_given_up_leaks_or_is_lost)
{
    struct ferry_engine_opts o;
    struct ferry_engine *e;
    struct ferry_batch *b;
    ferry_engine_opts_init(&o);
    o.n_ctx = 64;
    o.n_threads = 1;
    o.no_pin = true;
    o.n_batch = 2;
    ck_assert_msg(ferry_engine_open(TEST_DATA_DIR "/cli/tiny.gguf", &o, &e) == 0, "%s", err_text());
    ck_assert_int_eq(ferry_batch_make(e, &b), 0);
    uint64_t before = live_bytes(), n = 1;
    for (; give_up_without(n, e, b); n++)
        ck_assert_uint_eq(live_bytes(), before);
    ck_assert_uint_eq(live_bytes(), before);
    ck_assert_uint_gt(n, 4);
    ferry_batch_free(b);
    ferry_engine_close(e);
}
END_TEST

int main(void)
{
    json_room_begin();
    Suite *suite = suite_create("team");
    TCase *t = tcase_create("team");
    tcase_add_checked_fixture(t, setup, NULL);
    tcase_add_test(t, letters_are_lost_or_change);
    tcase_add_test(t, rubbish_is_taken);
    tcase_add_test(t, loss_of_a_rank_is_not_told_once);
    tcase_add_test(t, another_launcher_or_module_is_taken);
    tcase_add_test(t, failed_allocation_leaks_or_loses);
    tcase_add_test(t, the_wrong_one_is_fed);
    tcase_add_loop_test(t, line_without_memory_leaks_or_is_half_in_a_queue, 0,
                        (int)(sizeof short_of / sizeof *short_of));
    tcase_add_test(t, line_that_is_given_up_leaks_or_is_lost);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
