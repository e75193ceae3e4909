/* Weights in memory: the bytes of the file, whatever way they are read, and whatever goes wrong on the way. */
#include "src/run/store.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "src/model/layout.h"
#include "tests/live_bytes.h"
#include "tests/memfile.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* A model by hand in one file of noise. Rows of 1024 Q4_0 values take 576 bytes, of 512 take 288. Blocks of 4096:
 *   4096..12288       weights 1 and 2
 *   1048576..8130560  the stacks 3 to 5
 *   8998912..9003008  weight 0; the file ends at 9000028
 * The rest belongs to nobody. */
enum { FILE_BYTES = 9000028, N_WEIGHTS = 6, N_EXPERT = 8, EXPERT_BYTES = 512 * 576 };
enum { HELD_BYTES = 8192 + 7081984 + 4096, READ_BYTES = 8192 + 7081984 + 1116 };

static const enum plan_io ios[] = {PLAN_IO_PREAD, PLAN_IO_MMAP, PLAN_IO_URING};

static struct {
    struct model m;
    struct model_layer layers[2];
    struct weight weights[N_WEIGHTS];
    struct plan plan;
    unsigned char *data; /* (FILE_BYTES) */
    char path[sizeof TEST_BUILD_DIR + 32];
} by_hand;

static void put_weight(int i, const char *name, uint64_t off, struct tensor t, bool is_expert)
{
    struct weight *w = &by_hand.weights[i];

    snprintf(w->name, sizeof w->name, "%s", name);
    w->t = t;
    w->off = off;
    w->is_expert = is_expert;
}

static void make_model(enum plan_io io)
{
    uint64_t x = 20261123;

    memset(&by_hand.m, 0, sizeof by_hand.m);
    by_hand.m.layers = by_hand.layers;
    by_hand.m.weights = by_hand.weights;
    by_hand.m.n_weights = N_WEIGHTS;
    by_hand.m.hp.n_layer = 2;
    by_hand.m.path = by_hand.path;
    memset(by_hand.weights, 0, sizeof by_hand.weights);
    memset(by_hand.layers, -1, sizeof by_hand.layers); /* no weights of any role */
    put_weight(0, "last", 9000000, tensor_make(QUANT_F32, 7, 1, 1, NULL), false);
    put_weight(1, "first", 8000, tensor_make(QUANT_F32, 100, 10, 1, NULL), false);
    put_weight(2, "second", 12000, tensor_make(QUANT_F32, 64, 1, 1, NULL), false);
    for (int i = 0; i < 3; i++) {
        int64_t n_in = i < 2 ? 1024 : 512, n_out = i < 2 ? 512 : 1024;
        put_weight(3 + i, "stack", 1048608 + (uint64_t)i * N_EXPERT * EXPERT_BYTES,
                   tensor_make(QUANT_Q4_0, n_in, n_out, N_EXPERT, NULL), true);
    }
    by_hand.layers[1].w[ROLE_EXPERT_GATE] = 3;
    by_hand.layers[1].w[ROLE_EXPERT_UP] = 4;
    by_hand.layers[1].w[ROLE_EXPERT_DOWN] = 5;
    memset(&by_hand.plan, 0, sizeof by_hand.plan);
    by_hand.plan.io = io;
    by_hand.data = malloc(FILE_BYTES);
    for (size_t i = 0; i < FILE_BYTES; i++) {
        x = x * UINT64_C(6364136223846793005) + 1442695040888963407u;
        by_hand.data[i] = (unsigned char)(x >> 56);
    }
    snprintf(by_hand.path, sizeof by_hand.path, "in memory");
}

static void write_file(uint64_t bytes)
{
    snprintf(by_hand.path, sizeof by_hand.path, "%s/t_store-XXXXXX", TEST_BUILD_DIR);
    int fd = mkstemp(by_hand.path);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, by_hand.data, bytes), (ssize_t)bytes);
    close(fd);
}

static void drop_model(void)
{
    if (strchr(by_hand.path, '/'))
        unlink(by_hand.path);
    free(by_hand.data);
}

static int n_open_files(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static int open_store(const struct file_ops *ops, struct store **out)
{
    struct store_args args = {.model = &by_hand.m, .plan = &by_hand.plan, .ops = ops};
    return store_open(&args, out);
}

/* Where there is no io_uring, what cannot be tested is left out; t_ring says so by being skipped. */
static bool is_refused(int rc)
{
    return by_hand.plan.io == PLAN_IO_URING && rc == ERR_UNSUPPORTED;
}

static void check_bytes(struct store *s)
{
    struct store_lease lease = {0};
    struct store_expert e[N_EXPERT];
    int32_t ids[N_EXPERT];
    int n;

    for (int i = 0; i < 3; i++)
        ck_assert_mem_eq(store_weight(s, i), by_hand.data + by_hand.weights[i].off,
                         layout_weight_bytes(&by_hand.weights[i]));
    for (int i = 3; i < 6; i++)
        ck_assert_ptr_null(store_weight(s, i));
    for (int i = 0; i < N_EXPERT; i++)
        ids[i] = N_EXPERT - 1 - i;
    ck_assert_int_eq(store_lease(s, 1, ids, N_EXPERT, &lease), 0);
    ck_assert_int_eq(store_next(s, &lease, true, e, N_EXPERT, &n), 0);
    ck_assert_int_eq(n, N_EXPERT);
    for (int i = 0; i < N_EXPERT; i++) {
        ck_assert_int_eq(e[i].expert, ids[i]);
        for (int k = 0; k < 3; k++)
            ck_assert_mem_eq(e[i].w[k], by_hand.data + 1048608 + (size_t)(k * N_EXPERT + ids[i]) * EXPERT_BYTES,
                             EXPERT_BYTES);
    }
    store_release(s, &lease);
}

START_TEST(unused_stretches_take_no_memory)
{
    struct layout l;

    make_model(PLAN_IO_PREAD);
    ck_assert_int_eq(layout_init(&by_hand.m, &l), 0);
    ck_assert_int_eq(l.n_ranges, 3);
    ck_assert_uint_eq(l.ranges[0].off, 4096);
    ck_assert_uint_eq(l.ranges[0].end, 12288);
    ck_assert_uint_eq(l.ranges[0].data_end, 12256);
    ck_assert_uint_eq(l.ranges[1].off, 1048576);
    ck_assert_uint_eq(l.ranges[1].end, 8130560);
    ck_assert_uint_eq(l.ranges[1].memory_off, 8192);
    ck_assert_uint_eq(l.ranges[2].off, 8998912);
    ck_assert_uint_eq(l.ranges[2].end, 9003008);
    ck_assert_uint_eq(l.bytes, HELD_BYTES);
    for (int i = 0; i < N_WEIGHTS; i++)
        ck_assert_uint_eq(l.weight_off[i] % LAYOUT_BLOCK_BYTES, by_hand.weights[i].off % LAYOUT_BLOCK_BYTES);
    layout_done(&l);
    ck_assert_uint_eq(store_bytes(&by_hand.m, PLAN_IO_PREAD), HELD_BYTES);
    ck_assert_uint_eq(store_bytes(&by_hand.m, PLAN_IO_URING), HELD_BYTES);
    ck_assert_uint_eq(store_bytes(&by_hand.m, PLAN_IO_MMAP), 0);
    mem_fail_nth(1);
    ck_assert_uint_eq(store_bytes(&by_hand.m, PLAN_IO_PREAD), UINT64_MAX);
    mem_fail_nth(0);
    by_hand.weights[0].off = UINT64_MAX - 10;
    ck_assert_int_eq(layout_init(&by_hand.m, &l), ERR_LIMIT);
    drop_model();
}
END_TEST

START_TEST(weights_are_the_files_bytes)
{
    make_model(ios[_i]);
    write_file(FILE_BYTES);
    uint64_t before = live_bytes(), weights = mem_live_bytes(MEM_WEIGHTS);
    int n_files = n_open_files();
    struct store *s;
    struct store_stats stats;

    int rc = open_store(NULL, &s);
    if (!is_refused(rc)) {
        ck_assert_int_eq(rc, 0);
        ck_assert_uint_eq(mem_live_bytes(MEM_WEIGHTS) - weights, store_bytes(&by_hand.m, ios[_i]));
        check_bytes(s);
        store_stats(s, &stats);
        ck_assert_uint_eq(stats.load_bytes, ios[_i] == PLAN_IO_MMAP ? 0 : READ_BYTES);
        ck_assert_uint_eq(stats.resident_bytes, ios[_i] == PLAN_IO_MMAP ? 0 : HELD_BYTES);
        ck_assert_uint_gt(stats.load_ns, 0);
        ck_assert_uint_eq(stats.disk_bytes, 0);
        if (ios[_i] != PLAN_IO_MMAP)
            ck_assert_int_eq(n_open_files(), n_files);
    }
    store_close(s);
    store_close(NULL);
    ck_assert_uint_eq(live_bytes(), before);
    ck_assert_int_eq(n_open_files(), n_files);
    drop_model();
}
END_TEST

START_TEST(loan_gives_each_expert_once)
{
    static const int32_t ids[] = {5, 0, 7};
    static const int32_t bad[][1] = {{-1}, {N_EXPERT}};
    struct store_lease lease = {0};
    struct store_expert e[3];
    struct store *s;
    int n;

    make_model(PLAN_IO_MMAP);
    write_file(FILE_BYTES);
    ck_assert_int_eq(open_store(NULL, &s), 0);
    ck_assert_int_eq(store_lease(s, 0, ids, 3, &lease), ERR_ARG);
    ck_assert_int_eq(store_lease(s, 2, ids, 3, &lease), ERR_ARG);
    ck_assert_int_eq(store_lease(s, -1, ids, 3, &lease), ERR_ARG);
    ck_assert_int_eq(store_lease(s, 1, bad[0], 1, &lease), ERR_ARG);
    ck_assert_int_eq(store_lease(s, 1, bad[1], 1, &lease), ERR_ARG);
    ck_assert_ptr_nonnull(strstr(err_text(), "8"));
    store_release(s, &lease); /* of a loan that failed */

    ck_assert_int_eq(store_lease(s, 1, ids, 3, &lease), 0);
    ck_assert_int_eq(store_next(s, &lease, false, e, 2, &n), 0);
    ck_assert_int_eq(n, 2);
    ck_assert_int_eq(e[0].expert, 5);
    ck_assert_int_eq(e[1].expert, 0);
    ck_assert_int_eq(store_next(s, &lease, true, e, 2, &n), 0);
    ck_assert_int_eq(n, 1);
    ck_assert_int_eq(e[0].expert, 7);
    ck_assert_int_eq(store_next(s, &lease, true, e, 2, &n), 0);
    ck_assert_int_eq(n, 0);
    store_release(s, &lease);

    ck_assert_int_eq(store_lease(s, 1, ids, 1, &lease), 0); /* not walked to its end */
    store_release(s, &lease);
    ck_assert_int_eq(store_lease(s, 1, ids, 0, &lease), 0);
    ck_assert_int_eq(store_next(s, &lease, true, e, 2, &n), 0);
    ck_assert_int_eq(n, 0);
    store_release(s, &lease);
    store_close(s);
    drop_model();
}
END_TEST

struct seen {
    uint64_t n_calls, stop_at, last, total;
    bool is_odd;
};

static bool keep_progress(uint64_t done, uint64_t total, void *arg)
{
    struct seen *seen = arg;

    seen->is_odd |= done < seen->last || done > total || (seen->n_calls && total != seen->total);
    seen->last = done;
    seen->total = total;
    return ++seen->n_calls != seen->stop_at;
}

START_TEST(loading_can_be_stopped_at_every_report)
{
    make_model(ios[_i]);
    write_file(FILE_BYTES);
    uint64_t before = live_bytes(), n_calls = UINT64_MAX;
    int n_files = n_open_files();

    for (uint64_t stop_at = 0; stop_at <= n_calls; stop_at++) {
        struct seen seen = {.stop_at = stop_at};
        struct store_args args = {
            .model = &by_hand.m, .plan = &by_hand.plan, .progress = keep_progress, .progress_arg = &seen};
        struct store *s;
        int rc = store_open(&args, &s);

        if (is_refused(rc))
            break;
        ck_assert(!seen.is_odd);
        if (stop_at == 0) { /* never: how many reports there are */
            ck_assert_int_eq(rc, 0);
            ck_assert_uint_eq(seen.last, READ_BYTES);
            ck_assert_uint_eq(seen.total, READ_BYTES);
            n_calls = seen.n_calls;
            ck_assert_uint_ge(n_calls, 4);
        } else {
            ck_assert_int_eq(rc, ERR_CANCEL);
            ck_assert_ptr_null(s);
        }
        store_close(s);
        ck_assert_uint_eq(live_bytes(), before);
        ck_assert_int_eq(n_open_files(), n_files);
    }
    drop_model();
}
END_TEST

START_TEST(short_reads_are_resumed)
{
    struct memfiles files = {.max_read_bytes = 100003};
    struct file_ops ops = memfile_ops(&files);
    struct store *s;

    make_model(PLAN_IO_PREAD);
    memfile_add(&files, "in memory", by_hand.data, FILE_BYTES);
    ck_assert_int_eq(open_store(&ops, &s), 0);
    check_bytes(s);
    ck_assert_int_eq(files.n_open, 0); /* nobody reads the file after open */
    store_close(s);
    drop_model();
}
END_TEST

START_TEST(every_failing_call_of_the_file_is_told)
{
    struct memfiles files = {.max_read_bytes = 1000000};
    struct file_ops ops = memfile_ops(&files);
    struct store *s;

    make_model(PLAN_IO_PREAD);
    memfile_add(&files, "in memory", by_hand.data, FILE_BYTES);
    uint64_t before = live_bytes();
    ck_assert_int_eq(open_store(&ops, &s), 0);
    store_close(s);
    uint64_t n_calls = files.n_calls;
    ck_assert_uint_gt(n_calls, 10);
    for (uint64_t n = 1; n <= n_calls; n++) {
        files.n_calls = 0;
        files.fail_at = n;
        ck_assert_int_eq(open_store(&ops, &s), ERR_IO);
        ck_assert_ptr_null(s);
        ck_assert_ptr_nonnull(strstr(err_text(), "in memory"));
        ck_assert_int_eq(files.n_open, 0);
        ck_assert_uint_eq(live_bytes(), before);
    }
    files.fail_at = 0;
    ck_assert_int_eq(open_store(&ops, &s), 0);
    check_bytes(s);
    store_close(s);
    drop_model();
}
END_TEST

/* A read that fails once and is well when it is repeated: the weights are right, and it is counted. */
START_TEST(fault_that_passes_stops_loading_or_is_hidden)
{
    struct memfiles files = {.max_read_bytes = 1000000, .is_passing = true};
    struct file_ops ops = memfile_ops(&files);
    struct store_stats stats;
    struct store *s;
    uint64_t n_repeats = 0;

    make_model(PLAN_IO_PREAD);
    memfile_add(&files, "in memory", by_hand.data, FILE_BYTES);
    ck_assert_int_eq(open_store(&ops, &s), 0);
    store_close(s);
    uint64_t n_calls = files.n_calls;
    for (uint64_t n = 1; n <= n_calls; n++) {
        files.n_calls = 0;
        files.fail_at = n;
        int rc = open_store(&ops, &s);
        ck_assert(rc == 0 || rc == ERR_IO); /* ERR_IO: it was no read */
        if (rc)
            continue;
        check_bytes(s);
        store_stats(s, &stats);
        ck_assert_uint_eq(stats.n_repeats, 1);
        n_repeats++;
        store_close(s);
    }
    ck_assert_uint_ge(n_repeats, FILE_BYTES / 1000000 - 1);
    drop_model();
}
END_TEST

/* The first read of io_uring fails so often. */
struct first_fault {
    int n_left;
    uint64_t off; /* of that read; 0: it has not come yet */
};

static int first_fails(void *arg, uint64_t off, int res)
{
    struct first_fault *f = arg;

    f->off = f->off ? f->off : off;
    return off == f->off && f->n_left-- > 0 ? -EIO : res;
}

START_TEST(fault_of_the_ring_while_loading_is_hidden)
{
    for (int n_faults = 1; n_faults <= 2; n_faults++) {
        struct first_fault fault = {n_faults, 0};
        struct store_stats stats;
        struct store *s;

        make_model(PLAN_IO_URING);
        write_file(FILE_BYTES);
        struct store_args args = {
            .model = &by_hand.m, .plan = &by_hand.plan, .read_fault = first_fails, .read_fault_arg = &fault};
        int rc = store_open(&args, &s);
        if (!is_refused(rc) && n_faults == 1) {
            ck_assert_int_eq(rc, 0);
            check_bytes(s);
            store_stats(s, &stats);
            ck_assert_uint_eq(stats.n_repeats, 1);
        } else if (!is_refused(rc)) {
            ck_assert_int_eq(rc, ERR_IO);
            ck_assert_ptr_nonnull(strstr(err_text(), by_hand.path));
        }
        store_close(s);
        drop_model();
    }
}
END_TEST

/* A node that no machine has. */
START_TEST(memory_that_cannot_be_placed_is_placed_elsewhere)
{
    struct store *s;

    make_model(PLAN_IO_PREAD);
    write_file(FILE_BYTES);
    uint64_t before = live_bytes();
    by_hand.plan.numa = _i ? PLAN_NUMA_BOUND : PLAN_NUMA_INTERLEAVED;
    by_hand.plan.numa_nodes = UINT64_C(1) << 63;
    ck_assert_int_eq(open_store(NULL, &s), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "NUMA"));
    ck_assert_uint_eq(live_bytes(), before);
    by_hand.plan.numa_nodes = 1; /* every machine has it; a sandbox may refuse all the same */
    int rc = open_store(NULL, &s);
    ck_assert(rc == 0 || rc == ERR_UNSUPPORTED);
    if (!rc)
        check_bytes(s);
    store_close(s);
    drop_model();
}
END_TEST

START_TEST(mapped_file_that_was_written_to_is_not_noticed)
{
    const struct timespec later[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    struct store *s;

    make_model(PLAN_IO_MMAP);
    write_file(FILE_BYTES);
    ck_assert_int_eq(open_store(NULL, &s), 0);
    ck_assert_int_eq(store_check(s), 0);
    int fd = open(by_hand.path, O_WRONLY);
    ck_assert_int_ge(fd, 0);
    if (_i)
        ck_assert_int_eq(ftruncate(fd, 100), 0);
    else
        ck_assert_int_eq(pwrite(fd, "other", 5, 9000), 5);
    if (!_i)
        ck_assert_int_eq(futimens(fd, later), 0); /* clocks of files are coarse */
    close(fd);
    ck_assert_int_eq(store_check(s), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), by_hand.path));
    store_close(s);
    drop_model();
}
END_TEST

START_TEST(file_that_changes_while_it_is_read_is_refused)
{
    struct memfiles files = {.max_read_bytes = 1000000};
    struct file_ops ops = memfile_ops(&files);
    struct store *s;

    make_model(PLAN_IO_PREAD);
    memfile_add(&files, "in memory", by_hand.data, FILE_BYTES);
    ck_assert_int_eq(open_store(&ops, &s), 0);
    store_close(s);
    uint64_t n_calls = files.n_calls;
    for (uint64_t n = 3; n <= n_calls; n++) { /* after open and the first look */
        files.n_calls = 0;
        files.changes_at = n;
        ck_assert_int_eq(open_store(&ops, &s), ERR_STATE);
        ck_assert_ptr_null(s);
    }
    drop_model();
}
END_TEST

START_TEST(truncated_file_is_an_error_not_a_signal)
{
    static const uint64_t bytes[] = {FILE_BYTES - 1, 8998912, 8126496, 8126000, 4096, 100};
    struct store *s;

    make_model(ios[_i % 3]);
    write_file(bytes[_i / 3]);
    uint64_t before = live_bytes();
    ck_assert_int_eq(open_store(NULL, &s), ERR_IO);
    ck_assert_ptr_null(s);
    ck_assert_ptr_nonnull(strstr(err_text(), by_hand.path));
    ck_assert_uint_eq(live_bytes(), before);
    drop_model();
}
END_TEST

static bool cut_file(uint64_t done, uint64_t total, void *arg)
{
    (void)total;
    return !done || truncate(arg, 100) == 0;
}

START_TEST(file_cut_while_it_is_read_is_an_error)
{
    make_model(ios[_i]);
    write_file(FILE_BYTES);
    uint64_t before = live_bytes();
    int n_files = n_open_files();
    struct store_args args = {
        .model = &by_hand.m, .plan = &by_hand.plan, .progress = cut_file, .progress_arg = by_hand.path};
    struct store *s;
    int rc = store_open(&args, &s);

    /* Where all was already on its way, the last look at the file finds it. */
    ck_assert(rc == ERR_IO || rc == ERR_STATE || is_refused(rc));
    ck_assert_ptr_null(s);
    ck_assert_uint_eq(live_bytes(), before);
    ck_assert_int_eq(n_open_files(), n_files);
    drop_model();
}
END_TEST

START_TEST(missing_file_is_told)
{
    struct store *s;

    make_model(ios[_i]);
    snprintf(by_hand.path, sizeof by_hand.path, "%s/t_store-none", TEST_BUILD_DIR);
    ck_assert_int_eq(open_store(NULL, &s), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "t_store-none"));
    drop_model();
    make_model(ios[_i]);
    write_file(FILE_BYTES);
    by_hand.weights[4].file = 1;
    ck_assert_int_eq(open_store(NULL, &s), ERR_FORMAT);
    drop_model();
}
END_TEST

START_TEST(file_that_cannot_be_mapped_is_told)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct store *s;

    make_model(PLAN_IO_MMAP);
    memfile_add(&files, "in memory", by_hand.data, FILE_BYTES);
    ck_assert_int_eq(open_store(&ops, &s), ERR_UNSUPPORTED);
    ck_assert_int_eq(files.n_open, 0);
    drop_model();
}
END_TEST

START_TEST(every_failing_allocation_is_survived)
{
    make_model(ios[_i]);
    write_file(FILE_BYTES);
    uint64_t before = live_bytes(), n = 1;
    int n_files = n_open_files();

    for (;; n++) {
        struct store *s;
        mem_fail_nth(n);
        int rc = open_store(NULL, &s);
        bool reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        if (is_refused(rc)) {
            drop_model();
            return;
        }
        ck_assert_int_eq(rc, reached ? ERR_NOMEM : 0);
        ck_assert_int_eq(!s, reached);
        if (!reached)
            check_bytes(s);
        store_close(s);
        ck_assert_uint_eq(live_bytes(), before);
        ck_assert_int_eq(n_open_files(), n_files);
        if (!reached)
            break;
    }
    ck_assert_uint_gt(n, 6);
    drop_model();
}
END_TEST

/* ---- a split model ---- */

#define SPLIT(n) TEST_DATA_DIR "/gguf/split-0000" #n "-of-00002.gguf"

static unsigned char split_data[2][4096];

static void read_split(struct memfiles *files)
{
    static const char *const paths[] = {SPLIT(1), SPLIT(2)};

    for (int i = 0; i < 2; i++) {
        FILE *f = fopen(paths[i], "rb");
        ck_assert_ptr_nonnull(f);
        size_t n = fread(split_data[i], 1, sizeof split_data[i], f);
        fclose(f);
        memfile_add(files, paths[i], split_data[i], n);
    }
}

/* All tensors of both parts as weights. */
static void model_of_split(const struct file_ops *ops, struct model *m, struct weight *weights)
{
    memset(m, 0, sizeof *m);
    ck_assert_int_eq(gguf_open(SPLIT(1), ops, &m->gguf), 0);
    m->path = by_hand.path;
    m->weights = weights;
    m->n_weights = gguf_n_tensors(m->gguf);
    ck_assert_int_eq(m->n_weights, 4);
    for (int i = 0; i < m->n_weights; i++) {
        const struct gguf_tensor *t = gguf_tensor(m->gguf, i);
        weights[i] = (struct weight){
            .layer = -1, .file = t->file, .off = t->off, .t = tensor_make(t->type, t->ne[0], t->ne[1], t->ne[2], NULL)};
        snprintf(weights[i].name, sizeof weights[i].name, "%s", t->name);
    }
}

START_TEST(parts_of_a_split_model_are_all_read)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct weight weights[4];
    struct model m;
    struct store *s;

    read_split(&files);
    model_of_split(&ops, &m, weights);
    struct plan plan = {.io = PLAN_IO_PREAD};
    struct store_args args = {.model = &m, .plan = &plan, .ops = &ops};
    ck_assert_int_eq(store_open(&args, &s), 0);
    for (int i = 0; i < 4; i++)
        ck_assert_mem_eq(store_weight(s, i), split_data[weights[i].file] + weights[i].off,
                         layout_weight_bytes(&weights[i]));
    ck_assert_int_ne(weights[0].file, weights[3].file);
    store_close(s);
    for (int i = 0; i < 2; i++) { /* either part changed since its header was read */
        files.files[i].mtime_ns++;
        ck_assert_int_eq(store_open(&args, &s), ERR_STATE);
        ck_assert_ptr_null(s);
        files.files[i].mtime_ns--;
        files.files[i].bytes--;
        ck_assert_int_eq(store_open(&args, &s), ERR_STATE);
        files.files[i].bytes++;
    }
    ck_assert_int_eq(files.n_open, 0);
    gguf_close(m.gguf);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("store");
    TCase *tc = tcase_create("store");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, unused_stretches_take_no_memory);
    tcase_add_loop_test(tc, weights_are_the_files_bytes, 0, 3);
    tcase_add_test(tc, loan_gives_each_expert_once);
    tcase_add_loop_test(tc, loading_can_be_stopped_at_every_report, 0, 1);
    tcase_add_loop_test(tc, loading_can_be_stopped_at_every_report, 2, 3);
    tcase_add_test(tc, short_reads_are_resumed);
    tcase_add_test(tc, every_failing_call_of_the_file_is_told);
    tcase_add_test(tc, file_that_changes_while_it_is_read_is_refused);
    tcase_add_test(tc, fault_that_passes_stops_loading_or_is_hidden);
    tcase_add_test(tc, fault_of_the_ring_while_loading_is_hidden);
    tcase_add_loop_test(tc, memory_that_cannot_be_placed_is_placed_elsewhere, 0, 2);
    tcase_add_loop_test(tc, mapped_file_that_was_written_to_is_not_noticed, 0, 2);
    tcase_add_loop_test(tc, truncated_file_is_an_error_not_a_signal, 0, 18);
    tcase_add_loop_test(tc, file_cut_while_it_is_read_is_an_error, 0, 1);
    tcase_add_loop_test(tc, file_cut_while_it_is_read_is_an_error, 2, 3);
    tcase_add_loop_test(tc, missing_file_is_told, 0, 3);
    tcase_add_test(tc, file_that_cannot_be_mapped_is_told);
    tcase_add_loop_test(tc, every_failing_allocation_is_survived, 0, 3);
    tcase_add_test(tc, parts_of_a_split_model_are_all_read);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
