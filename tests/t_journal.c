/* The journal: whatever ends a run, whole lines stay, and nothing else. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/journal.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char path[256];

static void setup(void)
{
    snprintf(path, sizeof path, "%s/t_journal_XXXXXX", TEST_BUILD_DIR);
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static void teardown(void)
{
    unlink(path);
}

/* Lines as they were given, one after the other with a '|' behind each. */
struct seen {
    char text[4096];
    int n;
    const char *bad; /* the line that is no record; NULL: none */
};

static int see(const char *line, size_t n_bytes, uint64_t off, void *arg)
{
    struct seen *s = arg;
    (void)off;
    if (s->bad && strlen(s->bad) == n_bytes && memcmp(s->bad, line, n_bytes) == 0)
        return err(ERR_FORMAT, "no record");
    size_t used = strlen(s->text), n = n_bytes < 60 ? n_bytes : 60;
    memcpy(s->text + used, line, n);
    strcpy(s->text + used + n, "|");
    s->n++;
    return 0;
}

static struct journal *open_with(struct seen *s, const struct journal_ops *ops)
{
    struct journal *j = NULL;
    struct journal_args args = {.path = path, .on_line = see, .arg = s, .ops = ops};
    ck_assert_msg(journal_open(&args, &j) == 0, "%s", err_text());
    return j;
}

static void put(const char *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

static void must_be(const char *want)
{
    char got[4096] = "";
    FILE *f = fopen(path, "rb");
    ck_assert_ptr_nonnull(f);
    got[fread(got, 1, sizeof got - 1, f)] = '\0';
    fclose(f);
    ck_assert_str_eq(got, want);
}

static void add(struct journal *j, const char *line)
{
    ck_assert_msg(journal_append(j, line, strlen(line), NULL) == 0, "%s", err_text());
}

/* A file of somebody else is refused, and not a byte of it is lost; a torn first line of our own is cut. */
START_TEST(foreign_file_is_cut)
{
    static const struct {
        const char *bytes, *left;
        int rc;
    } rows[] = {
        {"my notes\nof today\n", "my notes\nof today\n", ERR_STATE},
        {"my notes", "my notes", ERR_STATE},
        {"{\"fe", "", 0},
        {"{\"ferry", "", 0},
        {"{\"ferry\"}\n{\"fe", "{\"ferry\"}\n", 0},
        {"", "", 0},
    };
    struct seen s = {.bad = NULL};
    struct journal *j = NULL;
    put(rows[_i].bytes, strlen(rows[_i].bytes));
    struct journal_args args = {.path = path, .begin = "{\"ferry\"", .on_line = see, .arg = &s};
    ck_assert_int_eq(journal_open(&args, &j), rows[_i].rc);
    if (rows[_i].rc)
        ck_assert_ptr_nonnull(strstr(err_text(), path));
    journal_close(j);
    must_be(rows[_i].left);
}
END_TEST

START_TEST(torn_end_stays)
{
    static const struct {
        const char *bytes;
        size_t n;
        const char *seen, *left;
        uint64_t cut;
    } rows[] = {
        {"", 0, "", "", 0},
        {"one\ntwo\n", 8, "one|two|", "one\ntwo\n", 0},
        {"one\ntw", 6, "one|", "one\n", 2},
        {"tw", 2, "", "", 2},
        {"one\n\0\0\0\0", 8, "one|", "one\n", 4},
        {"one\nBAD\ntwo\n", 12, "one|", "one\n",
         8}, /* a line of zeros or rubbish, and a later one that reached the disk */
        {"\n\none\n", 6, "||one|", "\n\none\n", 0},
    };
    struct seen s = {.bad = "BAD"};
    put(rows[_i].bytes, rows[_i].n);
    struct journal *j = open_with(&s, NULL);
    ck_assert_str_eq(s.text, rows[_i].seen);
    ck_assert_uint_eq(journal_n_cut(j), rows[_i].cut);
    must_be(rows[_i].left);
    add(j, "more");
    journal_close(j);
    char want[64];
    snprintf(want, sizeof want, "%smore\n", rows[_i].left);
    must_be(want);
}
END_TEST

/* Lines longer than what is read at once. */
START_TEST(long_line_is_cut)
{
    enum { LONG = 300000 };
    char *text = malloc(LONG);
    struct seen s = {.n = 0};
    memset(text, 'x', LONG);
    struct journal *j = open_with(&s, NULL);
    uint64_t off;
    add(j, "a");
    ck_assert_int_eq(journal_append(j, text, LONG, &off), 0);
    ck_assert_uint_eq(off, 2);
    add(j, "b");
    journal_close(j);
    j = open_with(&s, NULL);
    ck_assert_int_eq(s.n, 3);
    ck_assert_uint_eq(journal_n_cut(j), 0);
    char *back = malloc(LONG);
    ck_assert_int_eq(journal_read(j, off, back, LONG), 0);
    ck_assert_int_eq(memcmp(back, text, LONG), 0);
    ck_assert_int_eq(journal_read(j, 5 + LONG, back, 1), ERR_IO);
    ck_assert_int_eq(journal_clear(j), 0);
    add(j, "anew");
    journal_close(j);
    must_be("anew\n");
    free(back);
    free(text);
}
END_TEST

START_TEST(two_write_at_once)
{
    struct seen s = {.n = 0};
    struct journal *j = open_with(&s, NULL), *k = NULL;
    struct journal_args args = {.path = path, .on_line = see, .arg = &s};
    ck_assert_int_eq(journal_open(&args, &k), ERR_STATE);
    ck_assert_ptr_null(k);
    journal_close(j);
    j = open_with(&s, NULL);
    journal_close(j);
    args.path = "/dev/null";
    ck_assert_int_eq(journal_open(&args, &k), ERR_UNSUPPORTED);
    args.path = "/nonexistent/folder/file";
    ck_assert_int_eq(journal_open(&args, &k), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "/nonexistent/folder/file"));
}
END_TEST

/* ---- a disk that fails ---- */

struct disk {
    int left; /* calls until one fails; each writes 3 bytes at most */
    int minus_errno;
    bool truncates; /* or that fails as well */
};

static int64_t bad_write(void *ctx, int fd, const void *p, size_t n_bytes, uint64_t off)
{
    struct disk *d = ctx;
    if (d->left-- == 0)
        return d->minus_errno;
    ssize_t n = pwrite(fd, p, n_bytes < 3 ? n_bytes : 3, (off_t)off);
    return n < 0 ? -errno : n;
}

static int bad_truncate(void *ctx, int fd, uint64_t n_bytes)
{
    struct disk *d = ctx;
    if (!d->truncates)
        return -EIO;
    return ftruncate(fd, (off_t)n_bytes) ? -errno : 0;
}

static int bad_sync(void *ctx, int fd)
{
    struct disk *d = ctx;
    (void)fd;
    return d->left-- == 0 ? -EIO : 0;
}

/* The nth write fails, as on a full disk, for each n; with and without the rest being cut off at once. */
START_TEST(full_disk_loses_or_doubles_a_line)
{
    static const char *const lines[] = {"first line", "second", "the third one"};
    for (int n = 0; n < 12; n++) {
        struct disk d = {.left = n, .minus_errno = n % 3 ? -ENOSPC : 0, .truncates = _i};
        const struct journal_ops ops = {&d, bad_write, bad_truncate, bad_sync};
        struct seen s = {.n = 0};
        put("", 0);
        struct journal *j = open_with(&s, &ops);
        int n_there = 0, n_failed = 0;
        for (int i = 0; i < 3; i++) {
            int rc = journal_append(j, lines[i], strlen(lines[i]), NULL);
            if (rc == 0) {
                n_there++;
                continue;
            }
            ck_assert_int_eq(rc, ERR_IO);
            ck_assert_ptr_nonnull(strstr(err_text(), path));
            n_failed++;
            break;
        }
        ck_assert_int_eq(n_failed, 1);
        journal_close(j);
        /* the same again, with room: it goes on behind the last whole line */
        j = open_with(&s, NULL);
        ck_assert_int_eq(s.n, n_there);
        for (int i = n_there; i < 3; i++)
            add(j, lines[i]);
        journal_close(j);
        must_be("first line\nsecond\nthe third one\n");
    }
}
END_TEST

START_TEST(failed_write_stands_before_the_next)
{
    struct disk d = {.left = 2, .minus_errno = -ENOSPC};
    const struct journal_ops ops = {&d, bad_write, bad_truncate, bad_sync};
    struct seen s = {.n = 0};
    struct journal *j = open_with(&s, &ops);
    ck_assert_int_eq(journal_append(j, "aaaaaaaaaaaa", 12, NULL), ERR_IO);
    d.left = 100;
    add(j, "bbbbbbbbbbbb");
    journal_close(j);
    must_be("bbbbbbbbbbbb\n");
}
END_TEST

START_TEST(failed_sync_is_not_told)
{
    struct disk d = {.left = 0, .truncates = true};
    const struct journal_ops ops = {&d, bad_write, bad_truncate, bad_sync};
    struct seen s = {.n = 0};
    struct journal *j = open_with(&s, &ops);
    ck_assert_int_eq(journal_sync(j), ERR_IO);
    d.left = 5;
    ck_assert_int_eq(journal_sync(j), 0);
    d.truncates = false;
    ck_assert_int_eq(journal_clear(j), ERR_IO);
    journal_close(j);
    put("torn", 4);
    struct journal_args args = {.path = path, .on_line = see, .arg = &s, .ops = &ops};
    ck_assert_int_eq(journal_open(&args, &j), ERR_IO);
}
END_TEST

START_TEST(failed_allocation_leaks)
{
    uint64_t before = mem_live_bytes(MEM_OTHER);
    for (uint64_t n = 1;; n++) {
        struct seen s = {.n = 0};
        struct journal *j = NULL;
        struct journal_args args = {.path = path, .on_line = see, .arg = &s};
        char text[200000];
        memset(text, 'x', sizeof text);
        put("one\n", 4);
        mem_fail_nth(n);
        int rc = journal_open(&args, &j);
        if (rc == 0)
            rc = journal_append(j, text, sizeof text, NULL);
        bool reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        journal_close(j);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), before);
        ck_assert_int_eq(rc, reached ? ERR_NOMEM : 0);
        if (!reached) {
            ck_assert_uint_ge(n, 4);
            break;
        }
    }
}
END_TEST

/* A process that is killed while it writes: after each kill the file holds lines 0, 1, 2, … and no more. */
static int count_up(const char *line, size_t n_bytes, uint64_t off, void *arg)
{
    int *n = arg;
    char want[32];
    (void)off;
    snprintf(want, sizeof want, "%d", *n);
    ck_assert_msg(strlen(want) == n_bytes && memcmp(line, want, n_bytes) == 0, "line %d is another", *n);
    (*n)++;
    return 0;
}

/* For the process that is killed: an assertion leaves a mark in Check's file, which both write, and would be torn. */
static int only_count(const char *line, size_t n_bytes, uint64_t off, void *arg)
{
    int *n = arg;
    (void)line;
    (void)n_bytes;
    (void)off;
    (*n)++;
    return 0;
}

START_TEST(killed_writer_leaves_a_hole)
{
    int n = 0;
    for (int round = 0; round < 8; round++) {
        pid_t child = fork();
        ck_assert_int_ge(child, 0);
        if (child == 0) {
            struct journal *j = NULL;
            int next = 0;
            char line[32];
            if (journal_open(&(struct journal_args){.path = path, .on_line = only_count, .arg = &next}, &j))
                _exit(1);
            for (;; next++) {
                snprintf(line, sizeof line, "%d", next);
                journal_append(j, line, strlen(line), NULL);
            }
        }
        usleep(2000 + 1500 * (useconds_t)round);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        struct journal *j = NULL;
        int had = n;
        n = 0;
        ck_assert_msg(journal_open(&(struct journal_args){.path = path, .on_line = count_up, .arg = &n}, &j) == 0, "%s",
                      err_text());
        ck_assert_int_ge(n, had);
        journal_close(j);
    }
    ck_assert_int_gt(n, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("journal");
    TCase *t = tcase_create("journal");
    tcase_set_timeout(t, 60);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, foreign_file_is_cut, 0, 6);
    tcase_add_loop_test(t, torn_end_stays, 0, 7);
    tcase_add_test(t, long_line_is_cut);
    tcase_add_test(t, two_write_at_once);
    tcase_add_loop_test(t, full_disk_loses_or_doubles_a_line, 0, 2);
    tcase_add_test(t, failed_write_stands_before_the_next);
    tcase_add_test(t, failed_sync_is_not_told);
    tcase_add_test(t, failed_allocation_leaks);
    tcase_add_test(t, killed_writer_leaves_a_hole);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
