/* KV pages in a file: what comes back is what was kept, and whatever fails leaves a sequence that is whole, though shorter. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/cache.h"
#include "src/run/spill.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { PAGE = DEVICE_PAGE_TOK, TOK_BYTES = 96, PAGE_BYTES = PAGE * TOK_BYTES, N_CTX = 400, CHUNK = 50 };

/* ---- a cache whose pages hold TOK_BYTES for each position ---- */

static struct cache *open_cache(int n_seq)
{
    struct kv_shape shape = {.type = QUANT_F16, .n_groups = 1, .page_bytes = {PAGE_BYTES}};
    struct cache *c = NULL;
    ck_assert_int_eq(
        cache_open(&(struct cache_args){.shape = &shape, .n_seq = n_seq, .n_ctx = N_CTX, .chunk_tok = CHUNK}, &c), 0);
    return c;
}

static struct cache_seq *make_seq(struct cache *c)
{
    struct cache_seq *s = NULL;
    ck_assert_int_eq(cache_seq_make(c, &s), 0);
    return s;
}

static char *at(const struct cache_seq *s, int64_t pos)
{
    struct kv_seq view;
    cache_view(s, &view);
    return (char *)view.page[0][pos / PAGE] + pos % PAGE * TOK_BYTES;
}

/* Positions [len, to) as sequence `who` has them. */
static void fill(struct cache_seq *s, int64_t to, int who)
{
    while (cache_len(s) < to) {
        int64_t n = to - cache_len(s) < CHUNK ? to - cache_len(s) : CHUNK;
        ck_assert_int_eq(cache_reserve(s, n), 0);
        for (int64_t pos = cache_len(s); pos < cache_len(s) + n; pos++)
            memset(at(s, pos), (int)(who * 31 + pos * 7), TOK_BYTES);
        cache_commit(s, n);
    }
}

static void must_hold(const struct cache_seq *s, int64_t len, int who)
{
    char want[TOK_BYTES];
    ck_assert_int_eq(cache_len(s), len);
    for (int64_t pos = 0; pos < len; pos++) {
        memset(want, (int)(who * 31 + pos * 7), TOK_BYTES);
        if (memcmp(at(s, pos), want, TOK_BYTES))
            ck_abort_msg("position %d of %d differs", (int)pos, (int)len);
    }
}

/* ---- a system that fails, is interrupted, or moves less than was asked ---- */

struct faulty {
    int n_calls, fail_at; /* the nth call; 0: none */
    bool is_slow;         /* every second call is interrupted, the others move 100 bytes at most */
    uint64_t end;         /* of the file */
};

static int64_t before(struct faulty *f, size_t *n_bytes)
{
    if (++f->n_calls == f->fail_at)
        return -ENOSPC;
    if (f->is_slow && f->n_calls % 2)
        return -EINTR;
    if (f->is_slow && *n_bytes > 1000)
        *n_bytes = 1000;
    return 0;
}

static int64_t write_at(void *ctx, int fd, const void *p, size_t n_bytes, uint64_t off)
{
    struct faulty *f = ctx;
    int64_t rc = before(f, &n_bytes);
    if (rc)
        return rc;
    if (off + n_bytes > f->end)
        f->end = off + n_bytes;
    static _Alignas(4096) char block[2 * PAGE_BYTES];
    if (f->is_slow) { /* O_DIRECT takes whole blocks alone */
        off_t start = (off_t)(off & ~UINT64_C(4095));
        ck_assert_int_ge(pread(fd, block, sizeof block, start), 0);
        memcpy(block + (off - (uint64_t)start), p, n_bytes);
        return pwrite(fd, block, (off - (uint64_t)start + n_bytes + 4095) / 4096 * 4096, start) < 0 ? -errno
                                                                                                    : (int64_t)n_bytes;
    }
    return pwrite(fd, p, n_bytes, (off_t)off) < 0 ? -errno : (int64_t)n_bytes;
}

static int64_t read_at(void *ctx, int fd, void *p, size_t n_bytes, uint64_t off)
{
    int64_t rc = before(ctx, &n_bytes);
    if (rc)
        return rc;
    static _Alignas(4096) char block[2 * PAGE_BYTES];
    off_t start = (off_t)(off & ~UINT64_C(4095));
    if (pread(fd, block, sizeof block, start) < 0)
        return -errno;
    memcpy(p, block + (off - (uint64_t)start), n_bytes);
    return (int64_t)n_bytes;
}

static struct spill *open_spill(struct cache *c, const struct spill_ops *ops)
{
    struct spill *s = NULL;
    int rc = spill_open(&(struct spill_args){.dir = TEST_BUILD_DIR, .cache = c, .chunk_tok = CHUNK, .ops = ops}, &s);
    ck_assert_msg(rc == 0, "%s", err_text());
    return s;
}

/* ---- tests ---- */

START_TEST(pages_come_back_changed)
{
    static const int64_t lens[] = {1, 63, 64, 65, 128, 200, N_CTX};
    struct cache *c = open_cache(4);
    struct spill *spill = open_spill(c, NULL);
    struct cache_seq *other = make_seq(c);
    ck_assert(spill_ns(spill, 100) == 0);
    for (size_t i = 0; i < sizeof lens / sizeof *lens; i++) {
        struct spilled kept[2];
        for (int who = 0; who < 2; who++) { /* two at once, one a little longer */
            struct cache_seq *s = make_seq(c);
            fill(s, lens[i] - who * (lens[i] > 1), who);
            ck_assert_int_eq(spill_save(spill, s, &kept[who]), 0);
            must_hold(s, lens[i] - who * (lens[i] > 1), who);
            cache_seq_free(s);
        }
        cache_truncate(other, 0);
        fill(other, N_CTX, 9); /* into the pages that were given back */
        for (int who = 1; who >= 0; who--) {
            struct cache_seq *s = make_seq(c);
            ck_assert_int_eq(spill_load(spill, &kept[who], s), 0);
            must_hold(s, lens[i] - who * (lens[i] > 1), who);
            ck_assert_ptr_null(kept[who].place);
            cache_seq_free(s);
        }
        must_hold(other, N_CTX, 9);
    }
    ck_assert(spill_ns(spill, 100) > 0 && spill_ns(spill, 100) == spill_ns(spill, 128));
    cache_seq_free(other);
    spill_close(spill);
    cache_close(c);
}
END_TEST

/* One that shares its beginning is brought on from there, and the shared pages stay what they are. */
START_TEST(shared_beginning_is_written_over)
{
    struct cache *c = open_cache(4);
    struct spill *spill = open_spill(c, NULL);
    struct cache_seq *s = make_seq(c), *longer, *copy;
    struct spilled kept;
    fill(s, 100, 0);
    ck_assert_int_eq(cache_fork(s, &longer), 0);
    fill(longer, 250, 0);
    ck_assert_int_eq(spill_save(spill, longer, &kept), 0);
    cache_seq_free(longer);
    ck_assert_int_eq(cache_fork(s, &copy), 0);
    fill(s, 130, 5); /* goes on otherwise, in a page that was shared */
    ck_assert_int_eq(spill_load(spill, &kept, copy), 0);
    must_hold(copy, 250, 0);
    cache_truncate(s, 100);
    must_hold(s, 100, 0);
    cache_seq_free(copy);
    cache_seq_free(s);
    spill_close(spill);
    cache_close(c);
}
END_TEST

START_TEST(file_grows_for_ever)
{
    struct faulty f = {0};
    const struct spill_ops ops = {&f, write_at, read_at};
    struct cache *c = open_cache(2);
    struct spill *spill = open_spill(c, &ops);
    struct cache_seq *s = make_seq(c);
    struct spilled kept[3];
    fill(s, N_CTX, 1);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < 3; i++)
            ck_assert_int_eq(spill_save(spill, s, &kept[i]), 0);
        for (int i = 0; i < 3; i++)
            spill_drop(spill, &kept[i]);
    }
    /* pages of 6144 bytes take two blocks */
    ck_assert_uint_eq(f.end, 3 * (uint64_t)((N_CTX + PAGE - 1) / PAGE) * 8192);
    cache_seq_free(s);
    spill_close(spill);
    cache_close(c);
}
END_TEST

START_TEST(short_or_interrupted_calls_lose_bytes)
{
    struct faulty f = {.is_slow = true};
    const struct spill_ops ops = {&f, write_at, read_at};
    struct cache *c = open_cache(2);
    struct spill *spill = open_spill(c, &ops);
    struct cache_seq *s = make_seq(c);
    struct spilled kept;
    fill(s, 150, 3);
    ck_assert_int_eq(spill_save(spill, s, &kept), 0);
    cache_truncate(s, 0);
    fill(s, 150, 4);
    cache_truncate(s, 0);
    ck_assert_int_eq(spill_load(spill, &kept, s), 0);
    must_hold(s, 150, 3);
    cache_seq_free(s);
    spill_close(spill);
    cache_close(c);
}
END_TEST

/* Each call in turn: told, nothing is kept of a save that failed, and a load that failed leaves whole pages before it. */
START_TEST(failed_call_leaves_half_a_page)
{
    static const int64_t whole[] = {0, CHUNK, PAGE, PAGE + CHUNK, 2 * PAGE};
    struct faulty f = {0};
    const struct spill_ops ops = {&f, write_at, read_at};
    struct cache *c = open_cache(2);
    struct spill *spill = open_spill(c, &ops);
    struct cache_seq *s = make_seq(c);
    struct spilled kept;
    for (int n = 1; n <= 8; n++) { /* 150 positions: three writes, and five reads, because of the chunks */
        cache_truncate(s, 0);
        fill(s, 150, n);
        f = (struct faulty){.fail_at = n};
        int rc = spill_save(spill, s, &kept);
        ck_assert_int_eq(rc, n <= 3 ? ERR_IO : 0);
        if (rc) {
            ck_assert_ptr_nonnull(strstr(err_text(), "No space left"));
            ck_assert(!kept.place && !kept.n_places && !kept.len);
            must_hold(s, 150, n);
            continue;
        }
        cache_truncate(s, 0);
        ck_assert_int_eq(spill_load(spill, &kept, s), ERR_IO);
        must_hold(s, whole[n - 4], n);
        ck_assert_ptr_null(kept.place);
    }
    f = (struct faulty){0};
    cache_truncate(s, 0);
    fill(s, 150, 8);
    ck_assert_int_eq(spill_save(spill, s, &kept), 0);
    spill_drop(spill, &kept);
    cache_seq_free(s);
    spill_close(spill);
    cache_close(c);
}
END_TEST

START_TEST(full_pool_is_an_error)
{
    struct kv_shape shape = {.type = QUANT_F16, .n_groups = 1, .page_bytes = {PAGE_BYTES}};
    struct cache *c = NULL;
    ck_assert_int_eq(
        cache_open(
            &(struct cache_args){
                .shape = &shape, .n_seq = 1, .n_ctx = N_CTX, .chunk_tok = CHUNK, .pool_tok = N_CTX, .n_tables = 3},
            &c),
        0);
    struct spill *spill = open_spill(c, NULL);
    struct cache_seq *s = make_seq(c), *other = make_seq(c);
    struct spilled kept;
    fill(s, 200, 1);
    ck_assert_int_eq(spill_save(spill, s, &kept), 0);
    cache_truncate(s, 0);
    fill(other, N_CTX - 2 * PAGE, 2);
    int64_t free_tok = cache_free_tok(c);
    ck_assert_int_eq(spill_load(spill, &kept, s), 0); /* as far as there is room */
    ck_assert_int_eq(cache_len(s), free_tok);
    must_hold(s, free_tok, 1);
    cache_seq_free(other);
    cache_seq_free(s);
    spill_close(spill);
    cache_close(c);
}
END_TEST

START_TEST(failed_allocation_leaks)
{
    struct cache *c = open_cache(2);
    struct cache_seq *s = make_seq(c);
    fill(s, 150, 1);
    uint64_t before_bytes = live_bytes();
    int rc = ERR_NOMEM;
    for (uint64_t n = 1; rc; n++) {
        struct spill *spill = NULL;
        struct spilled kept = {0};
        mem_fail_nth(n);
        rc = spill_open(&(struct spill_args){.dir = TEST_BUILD_DIR, .cache = c, .chunk_tok = CHUNK}, &spill);
        if (rc == 0)
            rc = spill_save(spill, s, &kept);
        mem_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_NOMEM);
        if (spill)
            spill_drop(spill, &kept);
        spill_close(spill);
        ck_assert_uint_eq(live_bytes(), before_bytes);
        ck_assert(rc || n > 3);
    }
    struct spill *none;
    ck_assert_int_eq(spill_open(&(struct spill_args){.dir = "/no/such/folder", .cache = c, .chunk_tok = 1}, &none),
                     ERR_IO);
    ck_assert_ptr_null(none);
    ck_assert_uint_eq(live_bytes(), before_bytes);
    cache_seq_free(s);
    cache_close(c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("spill");
    TCase *t = tcase_create("spill");
    tcase_add_test(t, pages_come_back_changed);
    tcase_add_test(t, shared_beginning_is_written_over);
    tcase_add_test(t, file_grows_for_ever);
    tcase_add_test(t, short_or_interrupted_calls_lose_bytes);
    tcase_add_test(t, failed_call_leaves_half_a_page);
    tcase_add_test(t, full_pool_is_an_error);
    tcase_add_test(t, failed_allocation_leaks);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
