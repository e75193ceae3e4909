/* The journal. Its end is known here, not to the system: a line is written at the end of the last whole one, so that the rest
 * of a write that failed is overwritten by the next, even where it could not be cut off. */
#include "src/run/journal.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"

#define SYNC_NS UINT64_C(1000000000)
#define READ_BYTES ((size_t)64 << 10)

struct journal {
    struct journal_args args; /* path: own; on_line not used after open */
    int fd;
    uint64_t n_bytes, n_cut;
    uint64_t sync_ns; /* when it was last put on the disk */
    char *line;       /* own: (cap) a line with its end, as it is written or read */
    size_t cap;
};

/* ---- the system ---- */

static int64_t plain_write_at(void *ctx, int fd, const void *p, size_t n_bytes, uint64_t off)
{
    (void)ctx;
    ssize_t n = pwrite(fd, p, n_bytes, (off_t)off);
    return n < 0 ? -errno : n;
}

static int plain_truncate(void *ctx, int fd, uint64_t n_bytes)
{
    (void)ctx;
    return ftruncate(fd, (off_t)n_bytes) < 0 ? -errno : 0;
}

static int plain_sync(void *ctx, int fd)
{
    (void)ctx;
    return fdatasync(fd) < 0 ? -errno : 0;
}

static const struct journal_ops plain = {NULL, plain_write_at, plain_truncate, plain_sync};

static int failed(const struct journal *j, const char *what, int64_t minus_errno)
{
    return err(ERR_IO, "%s: %s at byte %" PRIu64 ": %s", j->args.path, what, j->n_bytes, strerror((int)-minus_errno));
}

/* ---- open ---- */

static int reserve(struct journal *j, size_t n_bytes)
{
    if (n_bytes <= j->cap)
        return 0;
    size_t cap = n_bytes < 2 * j->cap ? 2 * j->cap : n_bytes;
    char *p = mem_realloc(j->line, cap, MEM_OTHER);
    if (!p)
        return err(ERR_NOMEM, "a line of %zu bytes of %s", n_bytes, j->args.path);
    j->line = p;
    j->cap = cap;
    return 0;
}

/* Where the line that holds the name of a new file is: a file that is not in its folder after a power loss is no journal. */
static int sync_folder(const char *path)
{
    char *folder = mem_strdup(path, MEM_OTHER);
    if (!folder)
        return err(ERR_NOMEM, "the name of a folder");
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = '\0';
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    mem_free(folder);
    if (fd < 0)
        return 0; /* a folder that cannot be read cannot be synced either */
    fsync(fd);
    close(fd);
    return 0;
}

static int open_file(struct journal *j)
{
    struct stat st;
    const char *path = j->args.path;

    j->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (j->fd < 0)
        return err(ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(j->fd, &st) < 0)
        return err(ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return err(ERR_UNSUPPORTED, "%s is no regular file: a run could not be resumed", path);
    if (flock(j->fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK ? err(ERR_STATE, "%s: another process is writing it", path)
                                    : err(ERR_IO, "%s: locking: %s", path, strerror(errno));
    return st.st_size == 0 ? sync_folder(path) : 0;
}

static int check_begin(const struct journal *j)
{
    char got[64];
    size_t n_want = strlen(j->args.begin);

    assert(n_want <= sizeof got);
    ssize_t n = pread(j->fd, got, n_want, 0);
    if (n < 0)
        return failed(j, "reading", -errno);
    if (memcmp(got, j->args.begin, (size_t)n))
        return err(ERR_STATE, "%s is there, and was not written by this program: it is left as it is", j->args.path);
    return 0;
}

/* Give on_line the whole lines among the first n bytes of j->line; *left: bytes behind them. */
static int take_lines(struct journal *j, size_t n, size_t *left)
{
    const char *p = j->line, *end = j->line + n, *stop;
    int rc = 0;

    while (p < end && (stop = memchr(p, '\n', (size_t)(end - p)))) {
        rc = j->args.on_line(p, (size_t)(stop - p), j->n_bytes, j->args.arg);
        if (rc < 0)
            break;
        j->n_bytes += (uint64_t)(stop - p) + 1;
        p = stop + 1;
    }
    *left = (size_t)(end - p);
    memmove(j->line, p, *left);
    return rc;
}

static int read_lines(struct journal *j)
{
    size_t held = 0;
    int rc = 0;

    while (rc == 0) {
        rc = reserve(j, held + READ_BYTES);
        if (rc < 0)
            break;
        ssize_t n = pread(j->fd, j->line + held, j->cap - held, (off_t)(j->n_bytes + held));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return failed(j, "reading", -errno);
        if (n == 0)
            break;
        rc = take_lines(j, held + (size_t)n, &held);
    }
    return rc == ERR_FORMAT ? 0 : rc;
}

/* What stands behind the last whole line is nothing. */
static int cut(struct journal *j)
{
    struct stat st;

    if (fstat(j->fd, &st) < 0)
        return failed(j, "looking", -errno);
    j->n_cut = (uint64_t)st.st_size - j->n_bytes;
    int rc = j->n_cut ? j->args.ops->truncate(j->args.ops->ctx, j->fd, j->n_bytes) : 0;
    return rc < 0 ? failed(j, "cutting", rc) : 0;
}

int journal_open(const struct journal_args *args, struct journal **out)
{
    *out = NULL;
    struct journal *j = mem_zalloc(1, sizeof *j, MEM_OTHER);
    if (!j)
        return err(ERR_NOMEM, "a journal");
    j->fd = -1;
    j->args = *args;
    if (!j->args.ops)
        j->args.ops = &plain;
    j->args.path = mem_strdup(args->path, MEM_OTHER);
    int rc = j->args.path ? open_file(j) : err(ERR_NOMEM, "a journal");
    if (rc == 0 && args->begin)
        rc = check_begin(j);
    if (rc == 0)
        rc = read_lines(j);
    if (rc == 0)
        rc = cut(j);
    if (rc < 0) {
        journal_close(j);
        return rc;
    }
    j->sync_ns = clock_ns();
    *out = j;
    return 0;
}

void journal_close(struct journal *j)
{
    if (!j)
        return;
    if (j->fd >= 0)
        close(j->fd);
    mem_free(j->line);
    mem_free((char *)j->args.path);
    mem_free(j);
}

uint64_t journal_n_cut(const struct journal *j)
{
    return j->n_cut;
}

uint64_t journal_n_bytes(const struct journal *j)
{
    return j->n_bytes;
}

/* ---- writing ---- */

static int write_all(struct journal *j, const char *p, size_t n_bytes)
{
    const struct journal_ops *ops = j->args.ops;
    size_t done = 0;

    while (done < n_bytes) {
        int64_t n = ops->write_at(ops->ctx, j->fd, p + done, n_bytes - done, j->n_bytes + done);
        if (n == -EINTR)
            continue;
        if (n <= 0)
            return failed(j, "writing", n < 0 ? n : -ENOSPC);
        done += (size_t)n;
    }
    return 0;
}

int journal_append(struct journal *j, const char *line, size_t n_bytes, uint64_t *off)
{
    int rc = reserve(j, n_bytes + 1);
    if (rc < 0)
        return rc;
    memcpy(j->line, line, n_bytes);
    j->line[n_bytes] = '\n';
    rc = write_all(j, j->line, n_bytes + 1);
    if (rc < 0) {
        /* If this fails too, the next append writes over it, and the next open cuts it off. */
        j->args.ops->truncate(j->args.ops->ctx, j->fd, j->n_bytes);
        return rc;
    }
    if (off)
        *off = j->n_bytes;
    j->n_bytes += n_bytes + 1;
    return clock_ns() - j->sync_ns >= SYNC_NS ? journal_sync(j) : 0;
}

int journal_sync(struct journal *j)
{
    int rc = j->args.ops->sync(j->args.ops->ctx, j->fd);

    j->sync_ns = clock_ns();
    return rc < 0 ? failed(j, "putting on the disk", rc) : 0;
}

int journal_read(struct journal *j, uint64_t off, void *p, size_t n_bytes)
{
    size_t done = 0;

    while (done < n_bytes) {
        ssize_t n = pread(j->fd, (char *)p + done, n_bytes - done, (off_t)(off + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return failed(j, "reading back", n < 0 ? -errno : -EIO);
        done += (size_t)n;
    }
    return 0;
}

int journal_clear(struct journal *j)
{
    int rc = j->args.ops->truncate(j->args.ops->ctx, j->fd, 0);

    if (rc < 0)
        return failed(j, "cutting", rc);
    j->n_bytes = 0;
    return journal_sync(j);
}
