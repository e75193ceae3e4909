/* How fast a disk gives large blocks: several threads, each with one read in flight, past the page cache. */
#include "src/plan/machine.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Eight reads of 1 MiB in flight fill an NVMe disk's queues; more gave nothing on the disks measured for the design. */
enum { N_THREADS = 8, N_ROUNDS = 3 };
#define BLOCK_BYTES MIB
#define MAX_BYTES GIB
#define MADE_BYTES (512 * MIB)

struct disk_job {
    int fd;
    uint64_t n_blocks;
    atomic_uint_fast64_t next;
    atomic_int error; /* errno of a read that failed */
    char *buf;        /* view: (N_THREADS, BLOCK_BYTES) */
};

struct disk_worker {
    struct disk_job *job;
    char *buf;
};

static void *read_blocks(void *arg)
{
    struct disk_worker *w = arg;
    struct disk_job *job = w->job;

    for (;;) {
        uint64_t block = atomic_fetch_add(&job->next, 1);
        if (block >= job->n_blocks || atomic_load(&job->error))
            return NULL;
        for (uint64_t done = 0; done < BLOCK_BYTES;) {
            ssize_t n = pread(job->fd, w->buf + done, BLOCK_BYTES - done, (off_t)(block * BLOCK_BYTES + done));
            if (n <= 0 && !(n < 0 && errno == EINTR)) {
                atomic_store(&job->error, n < 0 ? errno : EIO);
                return NULL;
            }
            done += n > 0 ? (uint64_t)n : 0;
        }
    }
}

/* One pass over the blocks; 0 or an errno. */
static int read_round(struct disk_job *job, uint64_t *ns)
{
    pthread_t threads[N_THREADS];
    struct disk_worker workers[N_THREADS];
    int n_made = 0;

    atomic_store(&job->next, 0);
    uint64_t start_ns = clock_ns();
    for (; n_made < N_THREADS; n_made++) {
        workers[n_made] = (struct disk_worker){job, job->buf + (uint64_t)n_made * BLOCK_BYTES};
        if (pthread_create(&threads[n_made], NULL, read_blocks, &workers[n_made]))
            break;
    }
    for (int i = 0; i < n_made; i++)
        pthread_join(threads[i], NULL);
    *ns = clock_ns() - start_ns;
    return n_made ? atomic_load(&job->error) : EAGAIN;
}

static int measure(int fd, uint64_t file_bytes, const char *path, double *out)
{
    uint64_t bytes = file_bytes < MAX_BYTES ? file_bytes : MAX_BYTES, ns, best_ns = UINT64_MAX;
    struct disk_job job = {.fd = fd, .n_blocks = bytes / BLOCK_BYTES};
    int reason = 0;

    if (!job.n_blocks)
        return err(ERR_ARG, "%s: %" PRIu64 " bytes are too few to measure a disk with; 1 MiB at least", path,
                   file_bytes);
    job.buf = mem_map(N_THREADS * BLOCK_BYTES, MEM_STAGE);
    if (!job.buf)
        return err(ERR_NOMEM, "reading the disk: %" PRIu64 " bytes", N_THREADS * BLOCK_BYTES);
    for (int round = 0; round < N_ROUNDS && !reason; round++) {
        /* Without O_DIRECT the kernel's own copy has to go first. */
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        reason = read_round(&job, &ns);
        if (ns < best_ns)
            best_ns = ns;
    }
    mem_unmap(job.buf, N_THREADS * BLOCK_BYTES, MEM_STAGE);
    if (reason)
        return err(ERR_IO, "%s: read: %s", path, strerror(reason));
    *out = (double)(job.n_blocks * BLOCK_BYTES) * 1e9 / (double)(best_ns ? best_ns : 1);
    return 0;
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
    block = mem_map(BLOCK_BYTES, MEM_STAGE);
    if (!block)
        return err(ERR_NOMEM, "writing to %s: %" PRIu64 " bytes", dir, BLOCK_BYTES);
    int rc = 0;
    for (uint64_t i = 0; i < MADE_BYTES / BLOCK_BYTES && !rc; i++) {
        /* Blocks differ, so that a file system that compresses has something to read. */
        for (uint64_t k = 0; k < BLOCK_BYTES / sizeof k; k++)
            memcpy(block + k * sizeof k, &(uint64_t){(i * BLOCK_BYTES + k) * UINT64_C(0x9e3779b97f4a7c15)}, sizeof k);
        if (write(*fd, block, BLOCK_BYTES) != (ssize_t)BLOCK_BYTES)
            rc = err(ERR_IO, "%s: %" PRIu64 " bytes cannot be written: %s", dir, MADE_BYTES,
                     errno ? strerror(errno) : "no room");
    }
    if (!rc && fsync(*fd))
        rc = err(ERR_IO, "%s: %s", dir, strerror(errno));
    mem_unmap(block, BLOCK_BYTES, MEM_STAGE);
    return rc;
}

int machine_disk_rate(const char *path, double *out_bytes_per_s, bool *direct)
{
    struct stat st;
    int rc = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &st))
        rc = err(ERR_IO, "%s: %s", path, strerror(errno));
    if (!rc && S_ISDIR(st.st_mode)) {
        close(fd);
        rc = make_file(path, &fd);
        st.st_size = (off_t)MADE_BYTES;
    } else if (!rc && !S_ISREG(st.st_mode)) {
        rc = err(ERR_ARG, "%s is neither a file nor a folder", path);
    }
    if (!rc) {
        int flags = fcntl(fd, F_GETFL);
        *direct = flags >= 0 && !fcntl(fd, F_SETFL, flags | O_DIRECT);
        rc = measure(fd, (uint64_t)st.st_size, path, out_bytes_per_s);
    }
    if (fd >= 0)
        close(fd);
    return rc;
}
