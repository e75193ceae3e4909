/* Files, with a system that fails, reads short and changes files under the reader. */
#include "io/file.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A temporary file of n bytes, byte i being i * 7; the caller unlinks it. */
static char path[64];

static void make_file(size_t n)
{
    strcpy(path, "/tmp/ferry-t_io-XXXXXX");
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    for (size_t i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)(i * 7);
        ck_assert_int_eq(write(fd, &byte, 1), 1);
    }
    close(fd);
}

/* The system's files, broken on request. */
struct broken {
    int open_errno, identify_errno, map_errno;
    int read_errno, n_read_errors; /* the first n_read_errors reads fail so */
    uint64_t max_read_bytes;       /* 0: as asked */
    int n_reads, n_open;
};

static int broken_open(void *ctx, const char *name, void **out)
{
    struct broken *b = ctx;
    if (b->open_errno)
        return -b->open_errno;
    int sys = file_plain.open(NULL, name, out);
    b->n_open += !sys;
    return sys;
}

static int broken_identify(void *ctx, void *handle, struct file_id *out)
{
    struct broken *b = ctx;
    return b->identify_errno ? -b->identify_errno : file_plain.identify(NULL, handle, out);
}

static int64_t broken_read_at(void *ctx, void *handle, uint64_t off, void *dst, uint64_t bytes)
{
    struct broken *b = ctx;
    if (b->n_reads++ < b->n_read_errors)
        return -b->read_errno;
    if (b->max_read_bytes && bytes > b->max_read_bytes)
        bytes = b->max_read_bytes;
    return file_plain.read_at(NULL, handle, off, dst, bytes);
}

static int broken_map(void *ctx, void *handle, uint64_t bytes, const void **out)
{
    struct broken *b = ctx;
    return b->map_errno ? -b->map_errno : file_plain.map(NULL, handle, bytes, out);
}

static void broken_unmap(void *ctx, const void *p, uint64_t bytes)
{
    (void)ctx;
    file_plain.unmap(NULL, p, bytes);
}

static void broken_close(void *ctx, void *handle)
{
    struct broken *b = ctx;
    b->n_open--;
    file_plain.close(NULL, handle);
}

static struct file_ops ops_of(struct broken *b)
{
    return (struct file_ops){b, broken_open, broken_identify, broken_read_at, broken_map, broken_unmap, broken_close};
}

static void check_bytes(const unsigned char *got, size_t off, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ck_assert_uint_eq(got[i], (unsigned char)((off + i) * 7));
}

START_TEST(plain_read_gives_the_bytes_at_the_offset)
{
    unsigned char got[300];
    struct file *f;

    make_file(1000);
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    unlink(path);
    ck_assert_str_eq(file_path(f), path);
    ck_assert_uint_eq(file_identity(f)->bytes, 1000);
    ck_assert_int_eq(file_read(f, 700, got, 300), 0);
    check_bytes(got, 700, 300);
    ck_assert_int_eq(file_read(f, 1000, got, 0), 0);
    file_close(f);
    file_close(NULL);
}
END_TEST

START_TEST(short_and_interrupted_reads_are_resumed)
{
    unsigned char got[200];
    struct broken b = {.max_read_bytes = 3, .read_errno = EINTR, .n_read_errors = 2};
    struct file_ops ops = ops_of(&b);
    struct file *f;

    make_file(500);
    ck_assert_int_eq(file_open(path, &ops, &f), 0);
    unlink(path);
    ck_assert_int_eq(file_read(f, 123, got, 200), 0);
    check_bytes(got, 123, 200);
    ck_assert_int_eq(b.n_reads, 2 + 67); /* 200 / 3 rounded up */
    file_close(f);
    ck_assert_int_eq(b.n_open, 0);
}
END_TEST

START_TEST(read_that_failed_once_is_not_repeated_or_not_counted)
{
    unsigned char got[20];
    struct broken b = {.read_errno = EIO, .n_read_errors = 1};
    struct file_ops ops = ops_of(&b);
    struct file *f;

    make_file(100);
    ck_assert_int_eq(file_open(path, &ops, &f), 0);
    unlink(path);
    ck_assert_uint_eq(file_n_repeats(f), 0);
    ck_assert_int_eq(file_read(f, 57, got, 20), 0);
    check_bytes(got, 57, 20);
    ck_assert_int_eq(b.n_reads, 2);
    ck_assert_uint_eq(file_n_repeats(f), 1);
    ck_assert_int_eq(file_read(f, 57, got, 20), 0);
    ck_assert_uint_eq(file_n_repeats(f), 1);
    file_close(f);
}
END_TEST

START_TEST(read_error_names_path_offset_bytes_and_reason)
{
    char got[20];
    struct broken b = {.read_errno = EIO, .n_read_errors = 2};
    struct file_ops ops = ops_of(&b);
    struct file *f;

    make_file(100);
    ck_assert_int_eq(file_open(path, &ops, &f), 0);
    unlink(path);
    ck_assert_int_eq(file_read(f, 57, got, 20), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), path));
    ck_assert_ptr_nonnull(strstr(err_text(), "20 bytes at offset 57"));
    ck_assert_ptr_nonnull(strstr(err_text(), "Input/output error"));
    ck_assert_int_eq(file_read(f, 57, got, 20), 0);
    file_close(f);
}
END_TEST

START_TEST(read_past_the_end_says_where_the_file_ends)
{
    char got[20];
    struct file *f;

    make_file(100);
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    unlink(path);
    ck_assert_int_eq(file_read(f, 90, got, 20), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "20 bytes at offset 90: the file ends at 100"));
    ck_assert_int_eq(file_read(f, UINT64_MAX - 5, got, 20), ERR_ARG);
    ck_assert_int_eq(file_read(f, INT64_MAX, got, 20), ERR_ARG);
    file_close(f);
}
END_TEST

START_TEST(open_that_fails_names_path_and_reason_and_leaks_nothing)
{
    struct broken no_open = {.open_errno = EACCES}, no_stat = {.identify_errno = EIO};
    struct file_ops ops1 = ops_of(&no_open), ops2 = ops_of(&no_stat);
    uint64_t before = mem_live_bytes(MEM_META);
    struct file *f;

    ck_assert_int_eq(file_open("/nowhere/x.gguf", NULL, &f), ERR_IO);
    ck_assert_str_eq(err_text(), "/nowhere/x.gguf: cannot open: No such file or directory");
    ck_assert_ptr_null(f);
    ck_assert_int_eq(file_open("/tmp", NULL, &f), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "Is a directory"));
    ck_assert_int_eq(file_open("/dev/null", NULL, &f), ERR_IO);
    make_file(1);
    ck_assert_int_eq(file_open(path, &ops1, &f), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "Permission denied"));
    ck_assert_int_eq(file_open(path, &ops2, &f), ERR_IO);
    ck_assert_int_eq(no_stat.n_open, 0);
    for (uint64_t n = 1; n <= 2; n++) {
        mem_fail_nth(n);
        ck_assert_int_eq(file_open(path, NULL, &f), ERR_NOMEM);
    }
    mem_fail_nth(0);
    ck_assert_uint_eq(mem_live_bytes(MEM_META), before);
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    file_close(f);
    unlink(path);
}
END_TEST

START_TEST(fifo_without_a_writer_is_waited_for)
{
    struct file *f = NULL;

    make_file(0);
    unlink(path);
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    int rc = file_open(path, NULL, &f);
    unlink(path);
    ck_assert_int_eq(rc, ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "cannot be read at offsets"));
}
END_TEST

START_TEST(truncated_replaced_and_rewritten_files_are_noticed)
{
    struct file *f, *other;

    make_file(100);
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    ck_assert_int_eq(file_check(f, file_identity(f)), 0);
    ck_assert_int_eq(truncate(path, 40), 0);
    ck_assert_int_eq(file_check(f, file_identity(f)), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "40 bytes, were 100"));

    struct timespec times[2] = {{1000, 0}, {1000, 5}};
    ck_assert_int_eq(truncate(path, 100), 0);
    ck_assert_int_eq(utimensat(AT_FDCWD, path, times, 0), 0);
    ck_assert_int_eq(file_check(f, file_identity(f)), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "1000000000005 ns"));

    /* The old file is still open, so the new one cannot get its inode. */
    unlink(path);
    int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600);
    ck_assert_int_ge(fd, 0);
    close(fd);
    ck_assert_int_eq(file_open(path, NULL, &other), 0);
    ck_assert(!file_is_same(file_identity(f), file_identity(other)));
    ck_assert_int_eq(file_check(other, file_identity(f)), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "another file took its place"));
    file_close(f);
    file_close(other);
    unlink(path);
}
END_TEST

START_TEST(map_shows_the_file_or_says_why_not)
{
    struct broken b = {.map_errno = ENODEV};
    struct file_ops ops = ops_of(&b);
    struct file *f;
    const void *p, *again;

    make_file(5000);
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    ck_assert_int_eq(file_map(f, &p), 0);
    check_bytes(p, 0, 5000);
    ck_assert_int_eq(file_map(f, &again), 0);
    ck_assert_ptr_eq(p, again);
    file_close(f);

    ck_assert_int_eq(file_open(path, &ops, &f), 0);
    ck_assert_int_eq(file_map(f, &p), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "cannot map 5000 bytes: No such device"));
    b.map_errno = ENOMEM;
    ck_assert_int_eq(file_map(f, &p), ERR_IO);
    b.map_errno = 0;
    ck_assert_int_eq(file_map(f, &p), 0);
    file_close(f);

    ck_assert_int_eq(truncate(path, 0), 0);
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    ck_assert_int_eq(file_map(f, &p), ERR_UNSUPPORTED);
    file_close(f);
    unlink(path);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("io");
    TCase *tc = tcase_create("io");

    tcase_add_test(tc, plain_read_gives_the_bytes_at_the_offset);
    tcase_add_test(tc, short_and_interrupted_reads_are_resumed);
    tcase_add_test(tc, read_that_failed_once_is_not_repeated_or_not_counted);
    tcase_add_test(tc, read_error_names_path_offset_bytes_and_reason);
    tcase_add_test(tc, read_past_the_end_says_where_the_file_ends);
    tcase_add_test(tc, open_that_fails_names_path_and_reason_and_leaks_nothing);
    tcase_add_test(tc, fifo_without_a_writer_is_waited_for);
    tcase_add_test(tc, truncated_replaced_and_rewritten_files_are_noticed);
    tcase_add_test(tc, map_shows_the_file_or_says_why_not);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
