/* How fast a disk gives blocks of some sizes: threads with one read in flight each, at scattered places, past the page cache. */
#include "src/plan/machine.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { MAX_THREADS = 32, N_ROUNDS = 2 };
#define MAX_BLOCK_BYTES MIB
#define MADE_BYTES (512 * MIB)
/* Long enough that starting 32 threads does not show, short enough that all of it takes a few seconds. */
#define STEP_NS UINT64_C(150000000)
/* Disks of virtual machines, and of flash that is cached or grows hot, give more for a moment than they give for long. */
#define LASTING_NS UINT64_C(3000000000)
enum { LASTING_DEPTH = 16 };

/* Matrices of experts have 0.3 to 2 MiB and lie apart; one layer's wait together. Faults read less at a time. */
static const struct machine_disk_rate steps[] = {
    {128 * KIB, 1, 0}, {128 * KIB, 2, 0}, {128 * KIB, 8, 0},  {128 * KIB, 32, 0}, {512 * KIB, 1, 0}, {512 * KIB, 2, 0},
    {512 * KIB, 4, 0}, {512 * KIB, 8, 0}, {512 * KIB, 16, 0}, {512 * KIB, 32, 0}, {MIB, 1, 0},       {MIB, 2, 0},
    {MIB, 4, 0},       {MIB, 8, 0},       {MIB, 16, 0},       {MIB, 32, 0},
};
enum { N_STEPS = sizeof steps / sizeof *steps };
_Static_assert(sizeof steps <= sizeof((struct machine_disk *)0)->rates, "a disk's rates have to hold them");

struct disk_job {
    int fd;
    uint64_t block_bytes, n_blocks;
    uint64_t most; /* blocks that are read at most */
    atomic_uint_fast64_t end_ns;
    atomic_uint_fast64_t *next, n_read;
    atomic_int error; /* errno of a read that failed */
};

struct disk_worker {
    struct disk_job *job;
    char *buf; /* view: (n_places * MAX_BLOCK_BYTES) */
    int n_places;
};

/* Places far apart that come back late: steps of the golden ratio go round all blocks. */
static uint64_t place_of(const struct disk_job *job, uint64_t i)
{
    uint64_t step = (uint64_t)((double)job->n_blocks * 0.6180339887498949) | 1;
    return i * step % job->n_blocks * job->block_bytes;
}

static void *read_blocks(void *arg)
{
    struct disk_worker *w = arg;
    struct disk_job *job = w->job;

    while (!atomic_load(&job->error) && clock_ns() < atomic_load(&job->end_ns) &&
           atomic_load(&job->n_read) < job->most) {
        uint64_t at = atomic_fetch_add(job->next, 1), off = place_of(job, at);
        char *place = w->buf + at % (uint64_t)w->n_places * MAX_BLOCK_BYTES;
        for (uint64_t done = 0; done < job->block_bytes;) {
            ssize_t n = pread(job->fd, place + done, job->block_bytes - done, (off_t)(off + done));
            if (n <= 0 && !(n < 0 && errno == EINTR)) {
                atomic_store(&job->error, n < 0 ? errno : EIO);
                return NULL;
            }
            done += n > 0 ? (uint64_t)n : 0;
        }
        atomic_fetch_add(&job->n_read, 1);
    }
    return NULL;
}

/* Threads that read until end_ns, which may be set meanwhile. */
struct disk_readers {
    pthread_t threads[MAX_THREADS];
    struct disk_worker workers[MAX_THREADS];
    int n;
};

/* Into buf (n_threads * n_places * MAX_BLOCK_BYTES). */
static void start_readers(struct disk_job *job, int n_threads, char *buf, int n_places, struct disk_readers *r)
{
    atomic_store(&job->n_read, 0);
    atomic_store(&job->error, 0);
    for (r->n = 0; r->n < n_threads; r->n++) {
        r->workers[r->n] = (struct disk_worker){job, buf + (uint64_t)(r->n * n_places) * MAX_BLOCK_BYTES, n_places};
        if (pthread_create(&r->threads[r->n], NULL, read_blocks, &r->workers[r->n]))
            break;
    }
}

/* 0 or an errno. */
static int join_readers(struct disk_job *job, struct disk_readers *r)
{
    for (int i = 0; i < r->n; i++)
        pthread_join(r->threads[i], NULL);
    return r->n ? atomic_load(&job->error) : EAGAIN;
}

/* One block size with one number of threads, for ns; 0 or an errno. */
static int read_step(struct disk_job *job, int n_threads, uint64_t ns_of_step, char *buf, double *bytes_per_s)
{
    struct disk_readers readers;
    uint64_t start_ns = clock_ns();

    atomic_store(&job->end_ns, start_ns + ns_of_step);
    start_readers(job, n_threads, buf, 1, &readers);
    int reason = join_readers(job, &readers);
    uint64_t ns = clock_ns() - start_ns;
    *bytes_per_s = (double)(atomic_load(&job->n_read) * job->block_bytes) * 1e9 / (double)(ns ? ns : 1);
    return reason;
}

static struct disk_job job_of(int fd, uint64_t file_bytes, uint64_t block_bytes, atomic_uint_fast64_t *next)
{
    struct disk_job job = {.fd = fd, .block_bytes = block_bytes, .n_blocks = file_bytes / block_bytes, .next = next};

    job.most = 2 * job.n_blocks;
    /* Without O_DIRECT the kernel's own copy has to go first. */
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    return job;
}

/* No rate is above what the disk gives for seconds. */
static int cap_rates(struct disk_job *job, char *buf, struct machine_disk *out)
{
    double rate;
    int reason = read_step(job, LASTING_DEPTH, LASTING_NS, buf, &rate);

    for (int i = 0; i < out->n_rates && !reason; i++)
        if (out->rates[i].bytes_per_s > rate)
            out->rates[i].bytes_per_s = rate;
    return reason;
}

static int measure(int fd, uint64_t file_bytes, const char *path, struct machine_disk *out)
{
    /* Begins anywhere: what the last probe read may still lie in a cache below us, such as that of a virtual machine's host. */
    atomic_uint_fast64_t next = clock_ns() % UINT32_MAX;
    double rate;
    int reason = 0;

    char *buf = mem_map(MAX_THREADS * MAX_BLOCK_BYTES, MEM_STAGE);
    if (!buf)
        return err(ERR_NOMEM, "reading the disk: %" PRIu64 " bytes", MAX_THREADS * MAX_BLOCK_BYTES);
    memcpy(out->rates, steps, sizeof steps);
    out->n_rates = N_STEPS;
    for (int i = 0; i < N_ROUNDS * N_STEPS && !reason; i++) {
        struct machine_disk_rate *r = &out->rates[i % N_STEPS];
        struct disk_job job = job_of(fd, file_bytes, r->block_bytes, &next);
        reason = read_step(&job, r->depth, STEP_NS, buf, &rate);
        r->bytes_per_s += rate / N_ROUNDS;
    }
    if (!reason) {
        struct disk_job job = job_of(fd, file_bytes, MAX_BLOCK_BYTES, &next);
        reason = cap_rates(&job, buf, out);
    }
    mem_unmap(buf, MAX_THREADS * MAX_BLOCK_BYTES, MEM_STAGE);
    return reason ? err(ERR_IO, "%s: read: %s", path, strerror(reason)) : 0;
}

/* A file of MADE_BYTES in the folder that has no name any more once it is open. */
static int make_file(const char *dir, int *fd)
{
    char path[4096];
    int n = snprintf(path, sizeof path, "%s/.ferry-probe-XXXXXX", dir);
    char *block;

    if (n < 0 || (size_t)n >= sizeof path)
        return err(ERR_ARG, "the path %.60s... is too long", dir);
    *fd = mkostemp(path, O_CLOEXEC);
    if (*fd < 0)
        return err(ERR_IO, "%s: no file can be made there: %s", dir, strerror(errno));
    unlink(path);
    block = mem_map(MAX_BLOCK_BYTES, MEM_STAGE);
    if (!block)
        return err(ERR_NOMEM, "writing to %s: %" PRIu64 " bytes", dir, MAX_BLOCK_BYTES);
    int rc = 0;
    for (uint64_t i = 0; i < MADE_BYTES / MAX_BLOCK_BYTES && !rc; i++) {
        /* Blocks differ, so that a file system that compresses has something to read. */
        for (uint64_t k = 0; k < MAX_BLOCK_BYTES / sizeof k; k++)
            memcpy(block + k * sizeof k, &(uint64_t){(i * MAX_BLOCK_BYTES + k) * UINT64_C(0x9e3779b97f4a7c15)},
                   sizeof k);
        if (write(*fd, block, MAX_BLOCK_BYTES) != (ssize_t)MAX_BLOCK_BYTES)
            rc = err(ERR_IO, "%s: %" PRIu64 " bytes cannot be written: %s", dir, MADE_BYTES,
                     errno ? strerror(errno) : "no room");
    }
    if (!rc && fsync(*fd))
        rc = err(ERR_IO, "%s: %s", dir, strerror(errno));
    mem_unmap(block, MAX_BLOCK_BYTES, MEM_STAGE);
    return rc;
}

int machine_disk_id(const char *path, char id[40])
{
    struct statfs fs;
    struct stat st;
    uint64_t fsid;

    if (statfs(path, &fs) || stat(path, &st))
        return err(ERR_IO, "%s: %s", path, strerror(errno));
    /* The file system's own number outlives a reboot; those that have none are told apart by their device. */
    memcpy(&fsid, &fs.f_fsid, sizeof fsid);
    snprintf(id, 40, "%" PRIx64 "-%016" PRIx64, (uint64_t)fs.f_type & UINT32_MAX, fsid ? fsid : (uint64_t)st.st_dev);
    return 0;
}

/* A file, or one made in a folder, for reading past the page cache where that can be. */
static int open_disk(const char *path, int *fd, uint64_t *bytes, bool *is_direct)
{
    struct stat st;
    int rc = 0;

    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0 || fstat(*fd, &st))
        return err(ERR_IO, "%s: %s", path, strerror(errno));
    *bytes = (uint64_t)st.st_size;
    if (S_ISDIR(st.st_mode)) {
        close(*fd);
        *fd = -1;
        rc = make_file(path, fd);
        *bytes = MADE_BYTES;
    } else if (!S_ISREG(st.st_mode)) {
        return err(ERR_ARG, "%s is neither a file nor a folder", path);
    }
    if (rc)
        return rc;
    if (*bytes < MAX_BLOCK_BYTES)
        return err(ERR_ARG, "%s: %" PRIu64 " bytes are too few to measure a disk with; 1 MiB at least", path, *bytes);
    int flags = fcntl(*fd, F_GETFL);
    *is_direct = flags >= 0 && !fcntl(*fd, F_SETFL, flags | O_DIRECT);
    return 0;
}

int machine_disk_measure(const char *path, struct machine_disk *out)
{
    uint64_t bytes;
    int fd = -1;

    *out = (struct machine_disk){.n_rates = 0};
    int rc = machine_disk_id(path, out->id);
    if (!rc)
        rc = open_disk(path, &fd, &bytes, &out->is_direct);
    if (!rc)
        rc = measure(fd, bytes, path, out);
    if (fd >= 0)
        close(fd);
    return rc;
}

/* ---- reads in the background ---- */

struct machine_reader {
    int fd;
    char *path, *buf; /* own; of buf (MAX_THREADS * n_places * MAX_BLOCK_BYTES) */
    int n_places;
    atomic_uint_fast64_t next;
    struct disk_job job;
    struct disk_readers readers; /* n: 0 while nothing reads */
};

static uint64_t buf_bytes(const struct machine_reader *r)
{
    return (uint64_t)r->n_places * MAX_THREADS * MAX_BLOCK_BYTES;
}

int machine_reader_open(const char *path, uint64_t ram_bytes, struct machine_reader **out)
{
    struct machine_reader *r = mem_zalloc(1, sizeof *r, MEM_OTHER);
    uint64_t bytes = 0;
    bool is_direct;

    *out = NULL;
    if (!r)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *r);
    r->n_places = (int)(ram_bytes / (MAX_THREADS * MAX_BLOCK_BYTES));
    r->n_places = r->n_places < 1 ? 1 : r->n_places;
    int rc = open_disk(path, &r->fd, &bytes, &is_direct);
    if (!rc && (!(r->path = mem_strdup(path, MEM_OTHER)) || !(r->buf = mem_map(buf_bytes(r), MEM_STAGE))))
        rc = err(ERR_NOMEM, "reading the disk: %" PRIu64 " bytes", buf_bytes(r));
    if (rc) {
        machine_reader_close(r);
        return rc;
    }
    memset(r->buf, 1, buf_bytes(r)); /* the system clears pages when they are touched first, which is not reading */
    atomic_store(&r->next, clock_ns() % UINT32_MAX);
    r->job = job_of(r->fd, bytes, MAX_BLOCK_BYTES, &r->next);
    r->job.most = UINT64_MAX;
    *out = r;
    return 0;
}

int machine_reader_go(struct machine_reader *r)
{
    assert(!r->readers.n);
    atomic_store(&r->job.end_ns, UINT64_MAX);
    start_readers(&r->job, MAX_THREADS, r->buf, r->n_places, &r->readers);
    return r->readers.n ? 0 : err(ERR_LIMIT, "%s: no thread that reads could be started", r->path);
}

int machine_reader_rest(struct machine_reader *r)
{
    if (!r->readers.n)
        return 0;
    atomic_store(&r->job.end_ns, 0);
    int reason = join_readers(&r->job, &r->readers);
    r->readers.n = 0;
    return reason ? err(ERR_IO, "%s: read: %s", r->path, strerror(reason)) : 0;
}

void machine_reader_close(struct machine_reader *r)
{
    if (!r)
        return;
    if (machine_reader_rest(r))
        err_clear();
    if (r->fd >= 0)
        close(r->fd);
    mem_unmap(r->buf, buf_bytes(r), MEM_STAGE);
    mem_free(r->path);
    mem_free(r);
}
