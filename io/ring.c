/* Owns one io_uring, the descriptors it reads, and the reads in flight. Whose slots they fill is the caller's. */
#define _GNU_SOURCE 1
#include "io/ring.h"

#include "src/base/err.h"

#include <stddef.h>

uint64_t ring_slot_bytes(uint64_t off, uint64_t bytes)
{
    return off % RING_ALIGN + bytes + (RING_ALIGN - 1) - (off + bytes + RING_ALIGN - 1) % RING_ALIGN;
}

#ifdef HAVE_LIBURING

#include "src/base/mem.h"
#include "src/base/size.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <liburing.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

/* One request; the kernel takes less than 2^31 bytes, and registers memory in pieces of at most 2^30. */
#define MAX_REQUEST_BYTES (1 * GIB)
#define WAKE_TAG UINTPTR_MAX

/* A submission is tried so often, a millisecond apart, before the ring counts as broken. */
enum { MAX_REFUSED = 1000 };

struct open_file {
    int fd;
    bool is_direct;
    uint64_t bytes;
    char *path; /* own */
};

struct op {
    struct ring_read read;
    uint64_t begin, end; /* what is asked of the system: read.off and its end, rounded out for O_DIRECT */
    uint64_t done_bytes; /* from begin on */
    bool is_repeat;      /* it has failed once */
};

struct ring {
    struct io_uring uring;
    bool has_uring;
    struct open_file *files; /* own: (n_files) */
    int n_files;
    struct op *ops; /* own: (depth) */
    int *free_ops;  /* own: (depth), n_free of them valid */
    int depth, n_free;
    int wake_fd;
    bool is_woken;
    char *arena; /* view; NULL: not registered */
    uint64_t arena_bytes;
    bool has_fixed_files;
    uint64_t n_repeats;
    int n_refused; /* submissions, one after the other */
    int (*fault)(void *arg, uint64_t off, int res);
    void *fault_arg;
};

/* ---- open ---- */

/* Does O_DIRECT really read here? Some file systems take the flag and refuse the read. */
static bool can_read_direct(int fd)
{
    _Alignas(RING_ALIGN) char block[RING_ALIGN];

    return pread(fd, block, sizeof block, 0) >= 0 || errno != EINVAL;
}

static int open_file(struct open_file *f, const struct ring_file *want, bool is_buffered)
{
    struct file_id now;
    int sys;

    f->path = mem_strdup(want->path, MEM_META);
    if (!f->path)
        return err(ERR_NOMEM, "%s: its name", want->path);
    if (!is_buffered) {
        f->fd = open(want->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_DIRECT);
        f->is_direct = f->fd >= 0 && can_read_direct(f->fd);
        if (f->fd >= 0 && !f->is_direct)
            close(f->fd);
    }
    if (!f->is_direct)
        f->fd = open(want->path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (f->fd < 0)
        return err(ERR_IO, "%s: cannot open: %s", want->path, file_reason(-errno));
    sys = file_identify(f->fd, &now);
    if (sys)
        return err(ERR_IO, "%s: cannot be read at offsets: %s", want->path, file_reason(sys));
    f->bytes = now.bytes;
    return want->then ? file_compare(want->path, &now, want->then) : 0;
}

/* Both registrations save work per read and are not needed: without them the same reads are asked for plainly. */
static int register_all(struct ring *r, const struct ring_args *args)
{
    int *fds = mem_alloc((size_t)r->n_files * sizeof *fds, MEM_META);
    if (!fds)
        return err(ERR_NOMEM, "io_uring: a table of %d files", r->n_files);
    for (int i = 0; i < r->n_files; i++)
        fds[i] = r->files[i].fd;
    r->has_fixed_files = !io_uring_register_files(&r->uring, fds, (unsigned)r->n_files);
    mem_free(fds);

    if (!args->arena || !args->arena_bytes)
        return 0;
    uint64_t n_pieces = (args->arena_bytes - 1) / MAX_REQUEST_BYTES + 1;
    struct iovec *pieces = mem_alloc((size_t)n_pieces * sizeof *pieces, MEM_META);
    if (!pieces)
        return err(ERR_NOMEM, "io_uring: a table of %" PRIu64 " buffers", n_pieces);
    for (uint64_t i = 0; i < n_pieces; i++) {
        uint64_t at = i * MAX_REQUEST_BYTES, left = args->arena_bytes - at;
        pieces[i].iov_base = (char *)args->arena + at;
        pieces[i].iov_len = (size_t)(left < MAX_REQUEST_BYTES ? left : MAX_REQUEST_BYTES);
    }
    /* The kernel knows the lock limit, and whether this process is bound by it. */
    if (!io_uring_register_buffers(&r->uring, pieces, (unsigned)n_pieces)) {
        r->arena = args->arena;
        r->arena_bytes = args->arena_bytes;
    }
    mem_free(pieces);
    return 0;
}

/* One request of the queue; there is always room: a ring has a place for each op and for the wake-up. */
static struct io_uring_sqe *next_request(struct ring *r)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&r->uring);

    assert(sqe);
    return sqe;
}

/* Waits for the event descriptor, without a buffer that the kernel might fill after ring_close. */
static void arm_wake(struct ring *r)
{
    struct io_uring_sqe *sqe = next_request(r);

    io_uring_prep_poll_add(sqe, r->wake_fd, POLLIN);
    io_uring_sqe_set_data(sqe, (void *)WAKE_TAG);
}

static int open_uring(struct ring *r)
{
    int sys = io_uring_queue_init((unsigned)r->depth + 1, &r->uring, 0);

    if (sys == -EPERM || sys == -EACCES)
        return err(
            ERR_UNSUPPORTED,
            "io_uring is not permitted here (a sandbox, or sysctl kernel.io_uring_disabled); read by pread instead");
    if (sys == -ENOSYS)
        return err(ERR_UNSUPPORTED, "this kernel has no io_uring; read by pread instead");
    if (sys == -ENOMEM || sys == -EMFILE || sys == -ENFILE)
        return err(
            ERR_UNSUPPORTED,
            "io_uring: a queue of %d reads passes a limit (locked memory: ulimit -l, or open files): %s; read by "
            "pread instead",
            r->depth, file_reason(sys));
    if (sys)
        return err(ERR_IO, "io_uring: a queue of %d reads: %s", r->depth, file_reason(sys));
    r->has_uring = true;
    r->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (r->wake_fd < 0)
        return err(ERR_IO, "io_uring: an event descriptor: %s", file_reason(-errno));
    arm_wake(r);
    return 0;
}

int ring_open(const struct ring_args *args, struct ring **out)
{
    struct ring *r;
    int rc;

    *out = NULL;
    if (args->depth < 1 || args->depth > 4096 || args->n_files < 1)
        return err(ERR_ARG, "io_uring: a depth of %d (1 to 4096), %d files", args->depth, args->n_files);
    r = mem_zalloc(1, sizeof *r, MEM_META);
    if (!r)
        return err(ERR_NOMEM, "io_uring: a handle of %zu bytes", sizeof *r);
    r->depth = r->n_free = args->depth;
    r->wake_fd = -1;
    r->fault = args->fault;
    r->fault_arg = args->fault_arg;
    r->files = mem_zalloc((size_t)args->n_files, sizeof *r->files, MEM_META);
    r->ops = mem_zalloc((size_t)r->depth, sizeof *r->ops, MEM_META);
    r->free_ops = mem_alloc((size_t)r->depth * sizeof *r->free_ops, MEM_META);
    if (!r->files || !r->ops || !r->free_ops) {
        rc = err(ERR_NOMEM, "io_uring: tables of %d files and %d reads", args->n_files, args->depth);
        goto out;
    }
    for (int i = 0; i < r->depth; i++)
        r->free_ops[i] = i;
    if ((rc = open_uring(r)))
        goto out;
    for (int i = 0; i < args->n_files; i++) {
        r->files[i].fd = -1;
        r->n_files = i + 1;
        if ((rc = open_file(&r->files[i], &args->files[i], args->is_buffered)))
            goto out;
    }
    if ((rc = register_all(r, args)))
        goto out;
    *out = r;
    return 0;
out:
    ring_close(r);
    return rc;
}

void ring_close(struct ring *r)
{
    struct ring_done done;
    int n_done;

    if (!r)
        return;
    /* The kernel still writes to the slots of reads in flight. */
    while (r->n_free < r->depth && !ring_wait(r, 1, &done, 1, &n_done))
        ;
    if (r->has_uring)
        io_uring_queue_exit(&r->uring);
    if (r->wake_fd >= 0)
        close(r->wake_fd);
    for (int i = 0; i < r->n_files; i++) {
        if (r->files[i].fd >= 0)
            close(r->files[i].fd);
        mem_free(r->files[i].path);
    }
    mem_free(r->files);
    mem_free(r->ops);
    mem_free(r->free_ops);
    mem_free(r);
}

/* ---- reads ---- */

static int check_read(const struct ring *r, const struct ring_read *read)
{
    if (read->file < 0 || read->file >= r->n_files)
        return err(ERR_ARG, "read of file %d of %d", read->file, r->n_files);
    const struct open_file *f = &r->files[read->file];
    if (!read->bytes || read->off > f->bytes || read->bytes > f->bytes - read->off)
        return err(ERR_ARG, "%s: read of %" PRIu64 " bytes at offset %" PRIu64 " of a file of %" PRIu64, f->path,
                   read->bytes, read->off, f->bytes);
    if ((uintptr_t)read->slot % RING_ALIGN)
        return err(ERR_ARG, "%s: read into a slot at %p, which is no multiple of %d", f->path, read->slot, RING_ALIGN);
    return 0;
}

/* Put what is left of an op into the queue. */
static void queue_op(struct ring *r, int i)
{
    const struct op *op = &r->ops[i];
    struct io_uring_sqe *sqe = next_request(r);
    uint64_t off = op->begin + op->done_bytes, left = op->end - off;
    unsigned bytes = (unsigned)(left < MAX_REQUEST_BYTES ? left : MAX_REQUEST_BYTES);
    char *dst = (char *)op->read.slot + op->begin % RING_ALIGN + op->done_bytes;
    int fd = r->has_fixed_files ? op->read.file : r->files[op->read.file].fd;
    uint64_t at = (uint64_t)((uintptr_t)dst - (uintptr_t)r->arena); /* wraps below the arena: then it is no index */

    if (r->arena && at < r->arena_bytes && bytes <= r->arena_bytes - at &&
        at / MAX_REQUEST_BYTES == (at + bytes - 1) / MAX_REQUEST_BYTES)
        io_uring_prep_read_fixed(sqe, fd, dst, bytes, off, (int)(at / MAX_REQUEST_BYTES));
    else
        io_uring_prep_read(sqe, fd, dst, bytes, off);
    if (r->has_fixed_files)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, (void *)(uintptr_t)i);
}

/* The system has no memory for a request now, or wants its answers to be taken first. */
static bool is_short_of_room(int sys)
{
    return sys == -EAGAIN || sys == -EBUSY;
}

int ring_submit(struct ring *r, const struct ring_read *reads, int n)
{
    int rc, sys;

    if (n > r->n_free)
        return err(ERR_LIMIT, "io_uring: %d reads more, with %d of %d in flight", n, r->depth - r->n_free, r->depth);
    for (int i = 0; i < n; i++) {
        if ((rc = check_read(r, &reads[i])))
            return rc;
    }
    for (int i = 0; i < n; i++) {
        const struct ring_read *read = &reads[i];
        int at = r->free_ops[--r->n_free];
        bool is_direct = r->files[read->file].is_direct;
        r->ops[at] = (struct op){.read = *read, .begin = read->off, .end = read->off + read->bytes};
        if (is_direct) {
            r->ops[at].begin -= read->off % RING_ALIGN;
            r->ops[at].end = size_up(r->ops[at].end, RING_ALIGN);
        }
        queue_op(r, at);
    }
    /* Whatever the kernel does not take now stays queued, and ring_wait asks again. */
    do
        sys = io_uring_submit(&r->uring);
    while (sys == -EINTR);
    if (sys < 0 && !is_short_of_room(sys))
        return err(ERR_IO, "io_uring: submitting %d reads: %s", n, file_reason(sys));
    return 0;
}

/* The system's answer to an op: has it come to its end (true), or does it go on? *rc: how it ended. */
static bool take_answer(struct ring *r, int i, int res, int *rc)
{
    struct op *op = &r->ops[i];
    const struct open_file *f = &r->files[op->read.file];
    uint64_t wanted_end = op->read.off + op->read.bytes, reached;

    *rc = 0;
    if (r->fault)
        res = r->fault(r->fault_arg, op->read.off, res);
    if (res == -EINTR || res == -EAGAIN)
        return false;
    if (res < 0 && !op->is_repeat) {
        op->is_repeat = true;
        r->n_repeats++;
        return false;
    }
    if (res < 0) {
        *rc = err(ERR_IO, "%s: reading %" PRIu64 " bytes at offset %" PRIu64 ": %s", f->path, op->read.bytes,
                  op->read.off, file_reason(res));
        return true;
    }
    reached = op->begin + op->done_bytes + (uint64_t)res;
    if (reached >= wanted_end)
        return true;
    /* O_DIRECT goes on at whole blocks only; less than one is what is left at the end of a file that was cut. */
    uint64_t go_on = f->is_direct ? reached - reached % RING_ALIGN : reached;
    if (go_on <= op->begin + op->done_bytes) {
        *rc = err(ERR_IO, "%s: reading %" PRIu64 " bytes at offset %" PRIu64 ": the file ends at %" PRIu64, f->path,
                  op->read.bytes, op->read.off, reached);
        return true;
    }
    op->done_bytes = go_on - op->begin;
    return false;
}

/* Take what the system has finished, without waiting. */
static void reap(struct ring *r, struct ring_done *done, int n_max, int *n_done)
{
    struct io_uring_cqe *cqe;

    while (*n_done < n_max && !io_uring_peek_cqe(&r->uring, &cqe)) {
        uintptr_t tag = (uintptr_t)io_uring_cqe_get_data(cqe);
        int res = cqe->res, rc;
        io_uring_cqe_seen(&r->uring, cqe);
        if (tag == WAKE_TAG) {
            eventfd_t n_wakes;
            eventfd_read(r->wake_fd, &n_wakes);
            r->is_woken = true;
            arm_wake(r);
        } else if (take_answer(r, (int)tag, res, &rc)) {
            const struct ring_read *read = &r->ops[tag].read;
            done[(*n_done)++] = (struct ring_done){read->tag, rc, (char *)read->slot + read->off % RING_ALIGN};
            r->free_ops[r->n_free++] = (int)tag;
        } else {
            queue_op(r, (int)tag);
        }
    }
}

/* May the refused submission be tried again? Not for ever: where nothing is in flight, nothing will make room. */
static bool is_worth_trying(struct ring *r, int sys)
{
    if (sys >= 0 || sys == -EINTR) {
        r->n_refused = 0;
        return true;
    }
    if (!is_short_of_room(sys) || ++r->n_refused > MAX_REFUSED)
        return false;
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    return true;
}

int ring_wait(struct ring *r, int n_min, struct ring_done *done, int n_max, int *n_done)
{
    int n_in_flight = ring_n_in_flight(r), sys;

    *n_done = 0;
    if (n_min > n_max)
        n_min = n_max;
    if (n_min > n_in_flight)
        n_min = n_in_flight;
    for (;;) {
        reap(r, done, n_max, n_done);
        bool is_enough = *n_done >= n_min || r->is_woken;
        /* What goes on after a short read has been queued by reap and must reach the system even when nobody waits. */
        sys = is_enough ? (io_uring_sq_ready(&r->uring) ? io_uring_submit(&r->uring) : 0)
                        : io_uring_submit_and_wait(&r->uring, 1);
        if (!is_worth_trying(r, sys))
            return err(ERR_IO, "io_uring: waiting for %d reads: %s", n_in_flight, file_reason(sys));
        if (is_enough)
            break;
    }
    r->is_woken = false;
    return 0;
}

void ring_wake(struct ring *r)
{
    eventfd_write(r->wake_fd, 1); /* fails only when 2^64 - 1 wakes are pending: then one more changes nothing */
}

int ring_n_in_flight(const struct ring *r)
{
    return r->depth - r->n_free;
}

void ring_info(const struct ring *r, struct ring_info *out)
{
    *out = (struct ring_info){
        .has_fixed_files = r->has_fixed_files, .has_fixed_arena = r->arena != NULL, .n_repeats = r->n_repeats};
    for (int i = 0; i < r->n_files; i++)
        out->n_direct += r->files[i].is_direct;
}

#else /* built where liburing is not: ring_open always refuses, so the rest is never reached */

int ring_open(const struct ring_args *args, struct ring **out)
{
    (void)args;
    *out = NULL;
    return err(ERR_UNSUPPORTED, "ferry was built without liburing; read by pread instead");
}

void ring_close(struct ring *r)
{
    (void)r;
}

int ring_submit(struct ring *r, const struct ring_read *reads, int n)
{
    (void)r;
    (void)reads;
    (void)n;
    return err(ERR_UNSUPPORTED, "ferry was built without liburing");
}

int ring_wait(struct ring *r, int n_min, struct ring_done *done, int n_max, int *n_done)
{
    (void)r;
    (void)n_min;
    (void)done;
    (void)n_max;
    *n_done = 0;
    return err(ERR_UNSUPPORTED, "ferry was built without liburing");
}

void ring_wake(struct ring *r)
{
    (void)r;
}

int ring_n_in_flight(const struct ring *r)
{
    (void)r;
    return 0;
}

void ring_info(const struct ring *r, struct ring_info *out)
{
    (void)r;
    *out = (struct ring_info){0};
}

#endif
