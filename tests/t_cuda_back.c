/* KV pages that come back from the host's memory to the GPU that the emulated runtime plays, where there was no room when they were
 * written. No bit may depend on when they do, and steps are the shorter for it. */
#include "tests/cuda_seqs.h"
#include "tests/run_suite.h"

enum { PAGE_TOK = 64, N_WHOLE = POS / PAGE_TOK, N_PAGES = N_WHOLE + 1, BACK_STEPS = 3, N_STEPS = 24 };

static uint64_t page_bytes(void)
{
    return cache_page_bytes(rooms.cache, 0);
}

static struct cache_back_stats back_stats(void)
{
    struct cache_back_stats s;

    cache_back_stats(rooms.cache, &s);
    return s;
}

static bool is_far(int seq)
{
    struct kv_seq view;

    return cache_view_host(rooms.seqs[seq], &view);
}

/* Rooms in which n_pages may come in a step; 0: nothing comes back. */
static void make_rooms_of(int n_pages)
{
    struct kv_shape shape;
    struct model *m;

    ck_assert_int_eq(model_open(TEST_DATA_DIR "/models/llama.gguf", NULL, &m), 0);
    ck_assert_int_eq(model_kv_shape(m, QUANT_F16, 0, &shape, NULL), 0);
    make_rooms(&(struct cache_args){.back_steps = n_pages ? BACK_STEPS : 0,
                                    .back_bytes = (uint64_t)n_pages * shape.page_bytes[0]});
    model_close(m);
    ck_assert(!is_far(0) && !is_far(1) && is_far(2));
}

static void end_seq(int seq)
{
    cache_seq_free(rooms.seqs[seq]);
    rooms.seqs[seq] = NULL;
}

/* A step in which those that there are from `first` on decode a token; their logits (N_SEQ, N_VOCAB). Nothing is committed. */
static int step(int first, float *out)
{
    const float *logits;

    batch_clear(&rooms.batch);
    for (int seq = first; seq < N_SEQ; seq++)
        if (rooms.seqs[seq])
            add_rows(seq, (int)cache_len(rooms.seqs[seq]), 1, 1);
    emu_in_step(true);
    int rc = exec_run(rooms.exec, &rooms.batch, NULL, &logits);
    emu_in_step(false);
    if (rc == 0)
        memcpy(out, logits, sizeof *out * N_VOCAB * (size_t)rooms.batch.n_rows);
    return rc;
}

static void must_step(int first, float *out)
{
    ck_assert_msg(step(first, out) == 0, "%s", err_text());
}

/* ---- bits ---- */

/* What becomes of the sequence whose pages are the host's, in the middle of their way: nothing, it loses some words, of a page that was not
 * sent or of one that was; it ends; a fork of it goes on beside it. */
enum fate { GOES_ON, LOSES_LITTLE, LOSES_MUCH, ENDS, FORKS, N_FATES };

static void meet_fate(enum fate fate)
{
    switch (fate) {
    case GOES_ON:
    case N_FATES:
        return;
    case LOSES_LITTLE:
        ck_assert_int_eq(cache_truncate(rooms.seqs[2], POS - 5), POS - 5);
        return;
    case LOSES_MUCH:
        ck_assert_int_eq(cache_truncate(rooms.seqs[2], 100), 100);
        return;
    case ENDS:
        end_seq(2);
        return;
    case FORKS:
        ck_assert_int_eq(cache_fork(rooms.seqs[2], &rooms.seqs[0]), 0);
        return;
    }
}

/* What all say after the first has ended: (N_STEPS, N_SEQ, N_VOCAB). */
static void walk(int n_pages, enum fate fate, float *out)
{
    make_rooms_of(n_pages);
    end_seq(0);
    memset(out, 0, sizeof *out * N_STEPS * N_SEQ * N_VOCAB);
    for (int i = 0; i < N_STEPS; i++) {
        if (i == 2) /* two of three pairs were sent */
            meet_fate(fate);
        must_step(0, out + (size_t)i * N_SEQ * N_VOCAB);
        for (int seq = 0; seq < N_SEQ; seq++)
            if (rooms.seqs[seq])
                cache_commit(rooms.seqs[seq], 1);
    }
}

static float want[N_STEPS * N_SEQ * N_VOCAB], got[N_STEPS * N_SEQ * N_VOCAB];

START_TEST(pages_that_come_back_change_bits)
{
    const enum fate fate = (enum fate)_i;
    const bool is_given_up = fate == LOSES_MUCH || fate == ENDS;

    walk(0, fate, want);
    ck_assert_uint_eq(back_stats().bytes, 0);
    ck_assert_int_eq(rooms.seqs[2] && is_far(2), fate != ENDS);
    leave_rooms();
    for (uint64_t seed = 1; seed < 3; seed++) {
        emu_seed(seed);
        walk(2, fate, got);
        ck_assert_mem_eq(want, got, sizeof want);
        struct cache_back_stats s = back_stats();
        ck_assert_uint_eq(s.bytes, s.n_pages * page_bytes());
        ck_assert_uint_eq(s.n_out, 0);
        ck_assert_uint_eq(s.n_given_up, is_given_up);
        ck_assert_uint_eq(s.n_back, fate != ENDS);
        ck_assert(fate == ENDS || !is_far(2));
        ck_assert_int_eq(fate == FORKS,
                         rooms.seqs[0] && is_far(0)); /* no longer the same pages, and no room for both */
        leave_rooms();
    }
}
END_TEST

/* ---- the same segment again and again ---- */

static char saved[N_PAGES][1 << 17], nothing[1 << 17];
static float alone[2 * N_VOCAB], now[2 * N_VOCAB];

static void reserve_to(int seq, int n)
{
    while (cache_len(rooms.seqs[seq]) < n) {
        int64_t left = n - cache_len(rooms.seqs[seq]), chunk = left < CHUNK ? left : CHUNK;
        ck_assert_msg(cache_reserve(rooms.seqs[seq], chunk) == 0, "%s", err_text());
        cache_commit(rooms.seqs[seq], chunk);
    }
}

/* The last one's pages in the host's memory again, and room on the GPU. */
static void make_far(void)
{
    end_seq(2);
    ck_assert_int_eq(cache_seq_make(rooms.cache, &rooms.seqs[0]), 0);
    reserve_to(0, N_CTX);
    for (int slot = 0; slot < DEVICE_SEGMENT_PAGES; slot++) /* nothing of what comes lies there already */
        ck_assert_int_eq(cache_load_page(rooms.seqs[0], 0, slot, nothing), 0);
    ck_assert_int_eq(cache_seq_make(rooms.cache, &rooms.seqs[2]), 0);
    reserve_to(2, POS);
    ck_assert(is_far(2));
    for (int slot = 0; slot < N_PAGES; slot++)
        ck_assert_int_eq(cache_load_page(rooms.seqs[2], 0, slot, saved[slot]), 0);
    end_seq(0);
}

/* Rooms, and what the two that stay say. */
static void make_saved_rooms(int n_pages)
{
    make_rooms_of(n_pages);
    ck_assert_uint_le(page_bytes(), sizeof saved[0]);
    for (int slot = 0; slot < N_PAGES; slot++)
        ck_assert_int_eq(cache_save_page(rooms.seqs[2], 0, slot, saved[slot]), 0);
    memset(nothing, -1, sizeof nothing);
    must_step(1, alone);
    end_seq(0);
}

/* Whatever fails: the step that it fails in counts for nothing, what all say is what they said, and in the end the pages are there. */
START_TEST(failed_call_loses_pages)
{
    bool failed = true;
    int n = 0, n_given_up = 0;

    make_saved_rooms(N_PAGES);
    while (failed) {
        make_far();
        struct cache_back_stats from = back_stats();
        emu_seed((uint64_t)++n);
        emu_fail_nth(n);
        for (int i = 0; i < 40 && back_stats().n_back == from.n_back; i++) {
            int rc = step(1, now);
            ck_assert(rc == 0 || rc == ERR_DEVICE);
            if (rc == 0)
                ck_assert_mem_eq(now, alone, sizeof now);
        }
        failed = emu_n_calls() >= n;
        emu_fail_nth(0);
        n_given_up += (int)(back_stats().n_given_up - from.n_given_up);
        ck_assert_uint_eq(back_stats().n_back, from.n_back + 1);
        must_step(1, now);
        ck_assert_mem_eq(now, alone, sizeof now);
        ck_assert(!is_far(2));
    }
    ck_assert_int_gt(n, 100);
    ck_assert_int_ge(n_given_up, N_PAGES);
    leave_rooms();
}
END_TEST

static int say_there(struct device *dev, bool wait, bool *is_there)
{
    (void)dev;
    (void)wait;
    *is_there = true;
    return 0;
}

/* Were pages used without a look whether they are there, some order of the streams would show it. */
START_TEST(forgotten_wait_is_not_seen)
{
    int n_wrong = 0, n_right = 0;

    make_saved_rooms(N_PAGES);
    for (uint64_t seed = 1; seed <= 200 && !(n_wrong && n_right); seed++) {
        bool is_wrong = false;
        rooms.gpu_ops.brought = cuda_device_ops.brought;
        make_far();
        uint64_t n_back = back_stats().n_back;
        emu_seed(seed);
        rooms.gpu_ops.brought = say_there;
        while (back_stats().n_back == n_back)
            must_step(1, now);
        is_wrong = memcmp(now, alone, sizeof now) != 0;
        n_wrong += is_wrong;
        n_right += !is_wrong;
        ck_assert_int_eq(rooms.gpu_ops.sync(rooms.gpu), 0);
    }
    ck_assert_msg(n_wrong && n_right, "%d wrong, %d right", n_wrong, n_right);
    rooms.gpu_ops.brought = cuda_device_ops.brought;
    leave_rooms();
}
END_TEST

/* ---- who goes first ---- */

/* A sequence and its fork, to whom nobody promised pages because neither ran, grow while a segment is on its way to the pages that they
 * need: it is given up, and theirs need not leave. */
START_TEST(coming_segment_drives_another_away)
{
    make_saved_rooms(1);
    make_far();
    ck_assert_int_eq(cache_truncate(rooms.seqs[1], 100), 100);
    ck_assert_int_eq(cache_fork(rooms.seqs[1], &rooms.seqs[0]), 0);
    while (back_stats().n_pages == 0) {
        ck_assert_int_eq(cache_reserve(rooms.seqs[2], 1), 0);
        ck_assert_int_eq(cache_back_step(rooms.cache), 0);
    }
    reserve_to(1, N_CTX);
    ck_assert(!is_far(1));
    ck_assert_uint_eq(back_stats().n_given_up, 1);
    ck_assert_uint_eq(back_stats().n_out, 0);
    ck_assert_int_eq(cache_pages_used(rooms.cache, 0), N_PAGES + DEVICE_SEGMENT_PAGES + 1);
    leave_rooms();
}
END_TEST

/* Room that who runs has begun to fill is no room: the segment that would come would drive his away, and come back. */
START_TEST(promised_pages_are_taken)
{
    make_saved_rooms(N_PAGES);
    make_far();
    ck_assert_int_eq(cache_truncate(rooms.seqs[1], 100), 100);
    ck_assert_int_eq(cache_fork(rooms.seqs[1], &rooms.seqs[0]), 0);
    ck_assert_int_eq(cache_reserve(rooms.seqs[0], 60), 0); /* two pages, and one that both share */
    for (int i = 0; i < 20; i++) {
        for (int seq = 0; seq < N_SEQ; seq++)
            ck_assert_int_eq(cache_reserve(rooms.seqs[seq], 1), 0);
        ck_assert_int_eq(cache_back_step(rooms.cache), 0);
        ck_assert(i < BACK_STEPS || cache_back_wants_room(rooms.cache));
    }
    ck_assert_uint_eq(back_stats().n_pages, 0);
    end_seq(0);
    for (int i = 0; i < 2; i++) { /* it has waited long enough */
        ck_assert_int_eq(cache_reserve(rooms.seqs[2], 1), 0);
        ck_assert_int_eq(cache_back_step(rooms.cache), 0);
    }
    ck_assert_uint_ge(back_stats().n_pages, N_WHOLE);
    leave_rooms();
}
END_TEST

/* Two that wait for their turn hold the same pages: one copy does for both. */
START_TEST(shared_pages_come_twice)
{
    bool is_there;

    make_saved_rooms(N_PAGES);
    make_far();
    ck_assert_int_eq(cache_fork(rooms.seqs[2], &rooms.seqs[0]), 0);
    while (back_stats().n_back == 0) {
        ck_assert_int_eq(cache_reserve(rooms.seqs[0], 0), 0);
        ck_assert_int_eq(cache_reserve(rooms.seqs[2], 0), 0);
        ck_assert_int_eq(cache_back_step(rooms.cache), 0);
        ck_assert_int_eq(rooms.gpu_ops.brought(rooms.gpu, true, &is_there), 0);
    }
    ck_assert(!is_far(0) && !is_far(2));
    ck_assert_uint_eq(back_stats().n_pages, N_PAGES);
    ck_assert_int_eq(cache_pages_used(rooms.cache, 0), 2 * N_PAGES);
    end_seq(0);
    must_step(1, now);
    ck_assert_mem_eq(now, alone, sizeof now);
    leave_rooms();
}
END_TEST

/* The host has not computed with it for as long as the copy takes. */
START_TEST(segment_comes_too_soon)
{
    make_saved_rooms(N_PAGES);
    end_seq(2);
    ck_assert_int_eq(cache_back_step(rooms.cache), 0);
    ck_assert_int_eq(cache_seq_make(rooms.cache, &rooms.seqs[2]), 0);
    make_far();
    for (int i = 0; i <= BACK_STEPS; i++) {
        ck_assert_uint_eq(back_stats().n_pages, 0);
        must_step(1, now);
    }
    ck_assert_uint_eq(back_stats().n_pages, N_WHOLE);
    leave_rooms();
}
END_TEST

/* Nobody asks for the pages of one that does not run. */
START_TEST(idle_sequence_comes_back)
{
    make_rooms_of(N_PAGES);
    end_seq(0);
    for (int i = 0; i < 20; i++) {
        ck_assert_int_eq(cache_reserve(rooms.seqs[1], 1), 0);
        ck_assert_int_eq(cache_back_step(rooms.cache), 0);
    }
    ck_assert_uint_eq(back_stats().n_pages, 0);
    ck_assert(cache_back_may_come(rooms.seqs[2]) && !cache_back_may_come(rooms.seqs[1]));
    leave_rooms();
}
END_TEST

/* ---- anything in any order ---- */

enum { N_TABLES = 6, MOST_TOK = 1024, N_SLOTS = MOST_TOK / PAGE_TOK };

/* What each page of a sequence has to hold: the number of the write that was the last. */
static struct {
    struct cache *cache;
    struct cache_seq *seq[N_TABLES];
    uint64_t wrote[N_TABLES][N_SLOTS], n_writes;
    char *page; /* own: (a page) */
} any;

static void grow(int i, int64_t n)
{
    int64_t len = cache_len(any.seq[i]);

    if (len + n > MOST_TOK)
        return;
    bool has_room = cache_has_room(any.seq[i], n);
    ck_assert_int_eq(cache_reserve(any.seq[i], n), has_room ? 0 : ERR_LIMIT);
    for (int64_t slot = len / PAGE_TOK; has_room && slot * PAGE_TOK < len + n; slot++) {
        memcpy(any.page, &any.n_writes, sizeof any.n_writes);
        any.wrote[i][slot] = any.n_writes++;
        ck_assert_int_eq(cache_load_page(any.seq[i], 0, slot, any.page), 0);
    }
    cache_commit(any.seq[i], has_room ? n : 0);
}

static void change(int i, int what)
{
    int other = rand() % N_TABLES;

    if (!any.seq[i])
        ck_assert_int_eq(cache_seq_make(any.cache, &any.seq[i]), 0);
    if (what < 10) {
        grow(i, 1 + rand() % 100);
    } else if (what < 12) {
        cache_truncate(any.seq[i], rand() % (cache_len(any.seq[i]) + 1));
    } else if (what < 13 || other == i) {
        cache_seq_free(any.seq[i]);
        any.seq[i] = NULL;
    } else {
        cache_seq_free(any.seq[other]);
        ck_assert_int_eq(cache_fork(any.seq[i], &any.seq[other]), 0);
        memcpy(any.wrote[other], any.wrote[i], sizeof any.wrote[i]);
    }
}

/* All that it holds is what was written last, and each segment lies on one side. */
static void must_hold(int i)
{
    struct kv_seq near, far;
    uint64_t mark;

    cache_view(any.seq[i], &near);
    cache_view_host(any.seq[i], &far);
    for (int64_t slot = 0; slot * PAGE_TOK < cache_len(any.seq[i]); slot++) {
        int64_t first = slot - slot % DEVICE_SEGMENT_PAGES;
        ck_assert((near.page[0][slot] != NULL) == (near.page[0][first] != NULL));
        ck_assert((far.page[0][slot] != NULL) == (near.page[0][first] == NULL));
        ck_assert_int_eq(cache_save_page(any.seq[i], 0, slot, any.page), 0);
        memcpy(&mark, any.page, sizeof mark);
        ck_assert_uint_eq(mark, any.wrote[i][slot]);
    }
}

/* Sequences grow, fork, become shorter and end in any order while segments come and go: none loses a word, and no page is lost. */
START_TEST(some_order_loses_a_page)
{
    struct kv_shape shape;
    struct cache_back_stats s;
    bool is_there;

    make_rooms_of(0);
    memset(&any, 0, sizeof any);
    ck_assert_int_eq(model_kv_shape(rooms.model, QUANT_F16, 0, &shape, NULL), 0);
    any.page = calloc(1, shape.page_bytes[0]);
    ck_assert_int_eq(cache_open(&(struct cache_args){.shape = &shape,
                                                     .n_seq = 3,
                                                     .n_ctx = MOST_TOK,
                                                     .chunk_tok = 100,
                                                     .n_tables = N_TABLES,
                                                     .device = rooms.gpu,
                                                     .dev_tok = 3 * DEVICE_ATTN_SEGMENT_TOK,
                                                     .back_steps = 1,
                                                     .back_bytes = 3 * shape.page_bytes[0]},
                                &any.cache),
                     0);
    srand(7);
    for (int n = 0; n < 4000; n++) {
        change(rand() % N_TABLES, rand() % 15);
        if (rand() % 3 == 0)
            ck_assert_int_eq(cache_back_step(any.cache), 0);
        int i = rand() % N_TABLES;
        if (any.seq[i])
            must_hold(i);
    }
    for (int i = 0; i < N_TABLES; i++)
        cache_seq_free(any.seq[i]);
    ck_assert_int_eq(rooms.gpu_ops.brought(rooms.gpu, true, &is_there), 0);
    ck_assert_int_eq(cache_back_step(any.cache), 0); /* what was on its way for nobody */
    ck_assert_int_eq(cache_pages_used(any.cache, 0), 0);
    cache_back_stats(any.cache, &s);
    ck_assert_uint_gt(s.n_back, 20);
    ck_assert_uint_gt(s.n_given_up, 5);
    ck_assert_uint_gt(s.n_out, 20);
    cache_close(any.cache);
    free(any.page);
    leave_rooms();
}
END_TEST

/* ---- time ---- */

/* What goes up with a step, and what the kernels' times leave out. */
#define SLACK_S 1e-3

static double timed_step_s(double pcie_rate)
{
    time_on(pcie_rate);
    must_step(1, now);
    double s = (double)emu_now_ns() * 1e-9;
    time_off();
    return s;
}

/* While pages come, two a step, a step takes as long as before, though each copy takes a tenth of it; with the last of the segment, for
 * which the step waits, so much longer; from then on the GPU attends to both rows for the time of two of its own, instead of the host for
 * that of four. What was copied is what is there: each page once. */
START_TEST(coming_pages_take_time_of_steps)
{
    enum { PER_STEP = 2, N_SENDS = N_WHOLE / PER_STEP };
    double s, usual_s = 0;

    make_rooms_of(PER_STEP);
    const double row_s = rooms.row_bytes / GPU_RATE, n_layer = rooms.model->hp.n_layer;
    rooms.machine.mem_bytes_per_s = GPU_RATE / 4;
    usual_s = timed_step_s(PCIE_RATE); /* no room yet */
    const double page_s = usual_s / 10, pcie_rate = (double)page_bytes() / page_s;
    usual_s = timed_step_s(pcie_rate);
    end_seq(0);
    for (int i = 0; i < N_SENDS; i++) {
        s = timed_step_s(pcie_rate);
        ck_assert_uint_eq(back_stats().n_pages, PER_STEP * (unsigned)(i + 1));
        ck_assert_msg(s < usual_s + PER_STEP * page_s / 2, "%g s a step with two pages of %g s, %g s without", s,
                      page_s, usual_s);
    }
    s = timed_step_s(pcie_rate);
    ck_assert_uint_eq(back_stats().n_back, 1);
    double after_s = timed_step_s(pcie_rate);
    ck_assert_double_eq_tol(s, after_s + page_s, SLACK_S);
    ck_assert_double_eq_tol(timed_step_s(PCIE_RATE) + 2 * n_layer * row_s, usual_s, usual_s / 20);
    ck_assert_uint_eq(back_stats().bytes, N_PAGES * page_bytes());
    leave_rooms();
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

static TCase *add_case(Suite *suite, const char *name)
{
    TCase *tc = tcase_create(name);

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 240);
    suite_add_tcase(suite, tc);
    return tc;
}

int main(void)
{
    Suite *suite = suite_create("cuda_back");
    TCase *bits = add_case(suite, "bits"), *turns = add_case(suite, "turns");

    tcase_add_loop_test(bits, pages_that_come_back_change_bits, 0, N_FATES);
    tcase_add_test(bits, failed_call_loses_pages);
    if (!emu_is_real()) /* hardware may be quick enough for nobody to see it */
        tcase_add_test(bits, forgotten_wait_is_not_seen);
    tcase_add_test(turns, coming_segment_drives_another_away);
    tcase_add_test(turns, promised_pages_are_taken);
    tcase_add_test(turns, shared_pages_come_twice);
    tcase_add_test(turns, segment_comes_too_soon);
    tcase_add_test(turns, idle_sequence_comes_back);
    tcase_add_test(turns, some_order_loses_a_page);
    if (!emu_is_real()) /* rates that the test chooses */
        tcase_add_test(turns, coming_pages_take_time_of_steps);
    return run_suite(suite);
}
