/* The io_uring reader against the file's bytes, with answers of the system replaced by short ones and errors. Skipped
 * where io_uring is not to be had. */
#include "io/ring.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FILE_BYTES = 3 * 1000 * 1000 + 77, MAX_READ = 200000, DEPTH = 16, SEED = 20261123 };

static char path[sizeof TEST_BUILD_DIR + 32];
static unsigned char *truth; /* (FILE_BYTES) */

/* A file of noise where O_DIRECT is likely to work: beside the build, not on a memory file system. */
static void make_file(void)
{
    uint64_t x = SEED;

    snprintf(path, sizeof path, "%s/t_ring-XXXXXX", TEST_BUILD_DIR);
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    truth = malloc(FILE_BYTES);
    for (size_t i = 0; i < FILE_BYTES; i++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        truth[i] = (unsigned char)(x >> 56);
    }
    ck_assert_int_eq(write(fd, truth, FILE_BYTES), FILE_BYTES);
    close(fd);
}

static void drop_file(void)
{
    unlink(path);
    free(truth);
}

static uint64_t live_bytes(void)
{
    return mem_live_bytes(MEM_META) + mem_live_bytes(MEM_STAGE);
}

static int n_open_files(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

/* The nth answer from now on is replaced, for a bad place also that of the read's repetitions. */
struct fault {
    int countdown, res; /* res: -errno, or a number of bytes that the answer is cut to */
    bool is_bad_place;
    uint64_t off; /* of the read whose answer was replaced */
};

static int answer(void *arg, uint64_t off, int res)
{
    struct fault *f = arg;
    if (f->is_bad_place && f->countdown < 0 && off == f->off)
        return f->res;
    if (f->countdown < 1 || --f->countdown)
        return res;
    if (f->is_bad_place)
        f->countdown = -1;
    f->off = off;
    return f->res >= 0 && res >= 0 ? (res < f->res ? res : f->res) : f->res;
}

static struct ring_args args_of(const struct ring_file *file, struct fault *fault)
{
    return (struct ring_args){.depth = DEPTH, .files = file, .n_files = 1, .fault = answer, .fault_arg = fault};
}

/* Where reads go: n slots in one piece of memory. */
struct slots {
    char *base; /* own */
    uint64_t slot_bytes;
    int n;
    bool is_taken[DEPTH];
};

static void make_slots(struct slots *s, int n, uint64_t bytes)
{
    *s = (struct slots){.slot_bytes = size_up(bytes, RING_ALIGN), .n = n};
    s->base = mem_map((uint64_t)n * s->slot_bytes, MEM_STAGE);
    ck_assert_ptr_nonnull(s->base);
}

static void drop_slots(struct slots *s)
{
    for (int i = 0; i < s->n; i++)
        ck_assert(!s->is_taken[i]);
    mem_unmap(s->base, (uint64_t)s->n * s->slot_bytes, MEM_STAGE);
}

/* -1: all are taken. */
static int take_slot(struct slots *s)
{
    for (int i = 0; i < s->n; i++)
        if (!s->is_taken[i]) {
            s->is_taken[i] = true;
            return i;
        }
    return -1;
}

static void *slot_at(const struct slots *s, int i)
{
    return s->base + (uint64_t)i * s->slot_bytes;
}

/* n random reads, up to DEPTH at once; returns how many failed. Each good one is compared with the truth. */
static int read_random(struct ring *r, struct slots *s, int n)
{
    struct {
        uint64_t off, bytes;
    } want[DEPTH];
    int slots_busy = 0, n_failed = 0, n_started = 0;

    while (n_started < n || slots_busy) {
        struct ring_read batch[DEPTH];
        int n_batch = 0, slot;
        while (n_started < n && (slot = take_slot(s)) >= 0) {
            want[slot].off = (uint64_t)rand() % FILE_BYTES;
            want[slot].bytes = (uint64_t)rand() % MAX_READ + 1;
            if (rand() % 8 == 0 || want[slot].bytes > FILE_BYTES - want[slot].off)
                want[slot].bytes = FILE_BYTES - want[slot].off < MAX_READ ? FILE_BYTES - want[slot].off : MAX_READ;
            batch[n_batch++] =
                (struct ring_read){0, want[slot].off, want[slot].bytes, slot_at(s, slot), (uint64_t)slot};
            n_started++;
            slots_busy++;
        }
        ck_assert_int_eq(ring_submit(r, batch, n_batch), 0);
        ck_assert_int_eq(ring_n_in_flight(r), slots_busy);
        struct ring_done done[5];
        int n_done;
        ck_assert_int_eq(ring_wait(r, 2, done, 5, &n_done), 0);
        ck_assert_int_ge(n_done, slots_busy < 2 ? slots_busy : 2);
        for (int i = 0; i < n_done; i++) {
            uint64_t got = done[i].tag;
            if (done[i].rc)
                n_failed++;
            else
                ck_assert_mem_eq(done[i].data, truth + want[got].off, want[got].bytes);
            ck_assert(s->is_taken[got]);
            s->is_taken[got] = false;
            slots_busy--;
        }
    }
    return n_failed;
}

/* _i: 0 O_DIRECT where there is, 1 through the page cache, 2 with a registered arena. */
START_TEST(random_reads_equal_the_file)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring *r;
    struct slots s;
    struct ring_info info;
    uint64_t before = live_bytes();
    int n_open = n_open_files();

    srand(SEED);
    make_file();
    make_slots(&s, DEPTH, ring_slot_bytes(RING_ALIGN - 1, MAX_READ));
    args.is_buffered = _i == 1;
    args.arena = _i == 2 ? s.base : NULL;
    args.arena_bytes = DEPTH * s.slot_bytes;
    ck_assert_int_eq(ring_open(&args, &r), 0);
    ring_info(r, &info);
    ck_assert(_i != 1 || info.n_direct == 0);
    ck_assert(_i == 2 || !info.has_fixed_arena);
    ck_assert_int_eq(read_random(r, &s, 300), 0);
    ring_close(r);
    drop_slots(&s);
    drop_file();
    ck_assert_uint_eq(live_bytes(), before);
    ck_assert_int_eq(n_open_files(), n_open);
}
END_TEST

/* Cut to these many bytes, or made to fail in a way that passes. */
static const int passing_faults[] = {4096, 8192, 5000, 100000, -EINTR, -EAGAIN, -EIO, -ENOMEM};
enum { N_PASSING = sizeof passing_faults / sizeof *passing_faults, FIRST_REPEATED = 6 };

START_TEST(short_and_interrupted_answers_are_resumed)
{
    struct ring_file file = {path, NULL};
    struct fault fault = {.res = passing_faults[_i % N_PASSING]};
    struct ring_args args = args_of(&file, &fault);
    struct ring_info info;
    struct ring *r;
    struct slots s;
    uint64_t n_faults = 0;

    srand(SEED + (unsigned)_i);
    make_file();
    args.is_buffered = _i >= N_PASSING;
    make_slots(&s, 1, ring_slot_bytes(1, MAX_READ));
    ck_assert_int_eq(ring_open(&args, &r), 0);
    for (int i = 0; i < 20; i++) {
        /* Aligned and at least 12288 bytes, so that no cut is less than a block on its way. */
        struct ring_read read = {0, (uint64_t)(i * 8192), (uint64_t)(12288 + rand() % 150000), slot_at(&s, 0), 5};
        struct ring_done done;
        int n_done;
        fault.countdown = 1 + i % 2;
        memset(slot_at(&s, 0), 0, MAX_READ);
        ck_assert_int_eq(ring_submit(r, &read, 1), 0);
        ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), 0);
        ck_assert_int_eq(n_done, 1);
        ck_assert_msg(done.rc == 0, "%s", err_text());
        ck_assert_uint_eq(done.tag, 5);
        ck_assert_mem_eq(done.data, truth + read.off, read.bytes);
        n_faults += fault.countdown == 0;
    }
    ring_info(r, &info);
    ck_assert_uint_eq(info.n_repeats, _i % N_PASSING >= FIRST_REPEATED ? n_faults : 0);
    ck_assert_uint_ge(n_faults, 10);
    ring_close(r);
    drop_slots(&s);
    drop_file();
}
END_TEST

START_TEST(failed_read_names_file_offset_and_reason_and_spares_the_others)
{
    struct ring_file file = {path, NULL};
    struct fault fault = {.countdown = 7, .res = -EIO, .is_bad_place = true};
    struct ring_args args = args_of(&file, &fault);
    struct ring_info info;
    struct ring *r;
    struct slots s;

    srand(SEED);
    make_file();
    make_slots(&s, DEPTH, ring_slot_bytes(RING_ALIGN - 1, MAX_READ));
    ck_assert_int_eq(ring_open(&args, &r), 0);
    ck_assert_int_eq(read_random(r, &s, 40), 1);
    ck_assert_ptr_nonnull(strstr(err_text(), path));
    ck_assert_ptr_nonnull(strstr(err_text(), "Input/output error"));

    struct ring_read read = {0, 123456, 1000, slot_at(&s, 0), 0};
    struct ring_done done;
    int n_done;
    fault.countdown = 1;
    ck_assert_int_eq(ring_submit(r, &read, 1), 0);
    ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), 0);
    ck_assert_int_eq(done.rc, ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "reading 1000 bytes at offset 123456: Input/output error"));
    ring_info(r, &info);
    ck_assert_uint_eq(info.n_repeats, 2);
    ck_assert_int_eq(read_random(r, &s, 20), 0);
    ring_close(r);
    drop_slots(&s);
    drop_file();
}
END_TEST

START_TEST(file_cut_after_opening_ends_in_an_error)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring *r;
    struct slots s;
    struct ring_done done;
    int n_done;

    make_file();
    args.is_buffered = _i;
    make_slots(&s, 1, ring_slot_bytes(0, 100000));
    ck_assert_int_eq(ring_open(&args, &r), 0);
    ck_assert_int_eq(truncate(path, 50001), 0);
    struct ring_read read = {0, 4096, 100000, slot_at(&s, 0), 0};
    ck_assert_int_eq(ring_submit(r, &read, 1), 0);
    ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), 0);
    ck_assert_int_eq(n_done, 1);
    ck_assert_int_eq(done.rc, ERR_IO);
    ck_assert_msg(strstr(err_text(), "100000 bytes at offset 4096: the file ends at 50001") != NULL, "%s", err_text());
    ring_close(r);
    drop_slots(&s);
    drop_file();
}
END_TEST

START_TEST(impossible_reads_are_refused_before_any_is_started)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring *r;
    struct slots s;

    make_file();
    make_slots(&s, 1, 8192);
    ck_assert_int_eq(ring_open(&args, &r), 0);
    struct ring_read reads[DEPTH + 1];
    for (int i = 0; i <= DEPTH; i++)
        reads[i] = (struct ring_read){0, 0, 1, slot_at(&s, 0), 0};
    ck_assert_int_eq(ring_submit(r, reads, DEPTH + 1), ERR_LIMIT);
    reads[1].file = 1;
    ck_assert_int_eq(ring_submit(r, reads, 2), ERR_ARG);
    reads[1] = (struct ring_read){0, FILE_BYTES - 1, 2, slot_at(&s, 0), 0};
    ck_assert_int_eq(ring_submit(r, reads, 2), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "2 bytes at offset 3000076 of a file of 3000077"));
    reads[1] = (struct ring_read){0, UINT64_MAX, 2, slot_at(&s, 0), 0};
    ck_assert_int_eq(ring_submit(r, reads, 2), ERR_ARG);
    reads[1] = (struct ring_read){0, 0, 0, slot_at(&s, 0), 0};
    ck_assert_int_eq(ring_submit(r, reads, 2), ERR_ARG);
    reads[1] = (struct ring_read){0, 0, 1, (char *)slot_at(&s, 0) + 8, 0};
    ck_assert_int_eq(ring_submit(r, reads, 2), ERR_ARG);
    ck_assert_int_eq(ring_n_in_flight(r), 0);
    ring_close(r);
    drop_slots(&s);
    args.depth = 0;
    ck_assert_int_eq(ring_open(&args, &r), ERR_ARG);
    drop_file();
}
END_TEST

START_TEST(another_file_than_the_one_looked_at_is_refused)
{
    struct file *f;
    struct ring *r;

    make_file();
    ck_assert_int_eq(file_open(path, NULL, &f), 0);
    struct file_id then = *file_identity(f);
    struct ring_file file = {path, &then};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    ck_assert_int_eq(ring_open(&args, &r), 0);
    ring_close(r);
    ck_assert_int_eq(truncate(path, 10000), 0);
    ck_assert_int_eq(ring_open(&args, &r), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "10000 bytes, were 3000077"));
    ck_assert_ptr_null(r);
    file_close(f);
    unlink(path);
    ck_assert_int_eq(ring_open(&args, &r), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "No such file"));
    drop_file();
}
END_TEST

static void *wake_soon(void *arg)
{
    usleep(20000);
    ring_wake(arg);
    return NULL;
}

/* While *arg is set, "again" to everything: the read stays in flight. */
static int hold_back(void *arg, uint64_t off, int res)
{
    (void)off;
    return *(bool *)arg ? -EAGAIN : res;
}

START_TEST(wake_ends_a_wait_for_a_read_that_does_not_come)
{
    struct ring_file file = {path, NULL};
    bool is_held = true;
    struct ring_args args = {.depth = 1, .files = &file, .n_files = 1, .fault = hold_back, .fault_arg = &is_held};
    struct ring *r;
    pthread_t t;
    struct ring_done done;
    int n_done;
    void *slot = mem_map(8192, MEM_STAGE);
    struct ring_read read = {0, 0, 1, slot, 9};

    make_file();
    ck_assert_int_eq(ring_open(&args, &r), 0);
    ck_assert_int_eq(ring_submit(r, &read, 1), 0);
    ring_wake(r); /* before the wait: the next one returns */
    ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), 0);
    ck_assert_int_eq(n_done, 0);
    ck_assert_int_eq(pthread_create(&t, NULL, wake_soon, r), 0);
    ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), 0);
    ck_assert_int_eq(n_done, 0);
    pthread_join(t, NULL);
    is_held = false;
    ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), 0);
    ck_assert_int_eq(n_done, 1);
    ck_assert_int_eq(done.rc, 0);
    ck_assert_uint_eq(done.tag, 9);
    ck_assert_int_eq(*(unsigned char *)done.data, truth[0]);
    ring_close(r);
    mem_unmap(slot, 8192, MEM_STAGE);
    drop_file();
}
END_TEST

START_TEST(pipe_cannot_be_read_at_offsets)
{
    int fds[2];
    char by_fd[64];
    struct ring *r;

    ck_assert_int_eq(pipe(fds), 0);
    snprintf(by_fd, sizeof by_fd, "/proc/self/fd/%d", fds[0]);
    struct ring_file file = {by_fd, NULL};
    struct ring_args args = {.depth = 1, .files = &file, .n_files = 1, .is_buffered = true};
    ck_assert_int_eq(ring_open(&args, &r), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "cannot be read at offsets"));
    close(fds[0]);
    close(fds[1]);
}
END_TEST

START_TEST(every_allocation_may_fail_without_leaking)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring *r = NULL;
    void *arena = mem_map(8192, MEM_STAGE);
    uint64_t before = live_bytes();
    int n_open = n_open_files(), rc = ERR_NOMEM;

    make_file();
    args.arena = arena;
    args.arena_bytes = 8192;
    for (uint64_t n = 1; n < 50 && rc; n++) {
        mem_fail_nth(n);
        rc = ring_open(&args, &r);
        mem_fail_nth(0);
        if (rc) {
            ck_assert_int_eq(rc, ERR_NOMEM);
            ck_assert_uint_eq(live_bytes(), before);
            ck_assert_int_eq(n_open_files(), n_open);
        }
    }
    ck_assert_int_eq(rc, 0);
    ring_close(r);
    ck_assert_uint_eq(live_bytes(), before);
    mem_unmap(arena, 8192, MEM_STAGE);
    drop_file();
}
END_TEST

/* From now on the system answers a call with an error; false: this kernel has no filters, there is nothing to show. Only in a process
 * of its own (Check forks): it cannot be taken back. */
static bool forbid(unsigned call, int with_errno)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)with_errno),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof code[0], code};

    return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static const struct {
    int with_errno;
    const char *says;
} refusals[] = {{EPERM, "not permitted"}, {ENOSYS, "no io_uring"}, {ENOMEM, "locked memory"}, {EMFILE, "open files"}};

START_TEST(forbidden_io_uring_is_said_clearly)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring *r;

    make_file();
    if (forbid(SYS_io_uring_setup, refusals[_i].with_errno)) {
        ck_assert_int_eq(ring_open(&args, &r), ERR_UNSUPPORTED);
        ck_assert_msg(strstr(err_text(), refusals[_i].says) != NULL, "%s", err_text());
        ck_assert_ptr_nonnull(strstr(err_text(), "pread"));
    }
    drop_file();
}
END_TEST

/* An ordinary user may lock 8 MiB, and other things of his may have them already. */
START_TEST(memory_that_cannot_be_locked_stops_reading)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring_info info;
    struct ring *r;
    struct slots s;

    srand(SEED);
    make_file();
    make_slots(&s, DEPTH, ring_slot_bytes(RING_ALIGN - 1, MAX_READ));
    args.arena = s.base;
    args.arena_bytes = DEPTH * s.slot_bytes;
    if (forbid(SYS_io_uring_register, ENOMEM)) {
        ck_assert_int_eq(ring_open(&args, &r), 0);
        ring_info(r, &info);
        ck_assert(!info.has_fixed_arena && !info.has_fixed_files);
        ck_assert_int_eq(read_random(r, &s, 100), 0);
        ring_close(r);
    }
    drop_slots(&s);
    drop_file();
}
END_TEST

START_TEST(system_that_takes_no_reads_is_waited_for_for_ever)
{
    struct ring_file file = {path, NULL};
    struct fault none = {0};
    struct ring_args args = args_of(&file, &none);
    struct ring *r;
    struct ring_done done;
    int n_done;
    void *slot = mem_map(8192, MEM_STAGE);
    struct ring_read read = {0, 0, 1, slot, 9};

    make_file();
    ck_assert_int_eq(ring_open(&args, &r), 0);
    if (forbid(SYS_io_uring_enter, _i ? EBUSY : EAGAIN)) {
        ck_assert_int_eq(ring_submit(r, &read, 1), 0);
        ck_assert_int_eq(ring_wait(r, 1, &done, 1, &n_done), ERR_IO);
        ck_assert_int_eq(n_done, 0);
        ck_assert_ptr_nonnull(strstr(err_text(), "waiting for 1 reads"));
    }
    ring_close(r);
    mem_unmap(slot, 8192, MEM_STAGE);
    drop_file();
}
END_TEST

static bool has_io_uring(void)
{
    struct ring_file file = {"/proc/self/exe", NULL};
    struct ring_args args = {.depth = 1, .files = &file, .n_files = 1};
    struct ring *r;
    bool has = !ring_open(&args, &r);

    ring_close(r);
    return has;
}

int main(void)
{
    Suite *suite = suite_create("ring");
    TCase *tc = tcase_create("ring");

    if (!has_io_uring()) {
        printf("skipped: %s\n", err_text());
        return 77;
    }
    tcase_add_loop_test(tc, random_reads_equal_the_file, 0, 3);
    tcase_add_loop_test(tc, short_and_interrupted_answers_are_resumed, 0, 2 * N_PASSING);
    tcase_add_test(tc, failed_read_names_file_offset_and_reason_and_spares_the_others);
    tcase_add_loop_test(tc, file_cut_after_opening_ends_in_an_error, 0, 2);
    tcase_add_test(tc, impossible_reads_are_refused_before_any_is_started);
    tcase_add_test(tc, another_file_than_the_one_looked_at_is_refused);
    tcase_add_test(tc, wake_ends_a_wait_for_a_read_that_does_not_come);
    tcase_add_test(tc, pipe_cannot_be_read_at_offsets);
    tcase_add_test(tc, every_allocation_may_fail_without_leaking);
    tcase_add_loop_test(tc, forbidden_io_uring_is_said_clearly, 0, 4);
    tcase_add_test(tc, memory_that_cannot_be_locked_stops_reading);
    tcase_add_loop_test(tc, system_that_takes_no_reads_is_waited_for_for_ever, 0, 2);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
