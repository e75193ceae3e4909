/* Owns open files for reading: loops, error texts and identity. How the system is asked is file_ops's. */
#define _GNU_SOURCE 1
#include "io/file.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct file {
    const struct file_ops *ops; /* view */
    void *handle;               /* own, through ops */
    char *path;                 /* own */
    const void *mapped;         /* own, through ops; NULL until asked for */
    uint64_t n_repeats;         /* atomic */
    struct file_id id;
};

/* Linux reads at most 2^31 - 4096 bytes a call; whole MiB keep later parts of a long read aligned. */
#define MAX_READ_BYTES (UINT64_C(1) << 30)

/* ---- the system ---- */

/* A descriptor is kept in the pointer itself; one more, so that 0 is not NULL. */
static int fd_of(const void *handle)
{
    return (int)((intptr_t)handle - 1);
}

static int plain_open(void *ctx, const char *path, void **out_handle)
{
    (void)ctx;
    /* O_NONBLOCK: a FIFO is refused below, not waited for; it means nothing to a regular file. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    *out_handle = (void *)((intptr_t)fd + 1);
    return 0;
}

int file_identify(int fd, struct file_id *out)
{
    struct stat st;

    if (fstat(fd, &st))
        return -errno;
    off_t bytes = st.st_size;
    if (S_ISDIR(st.st_mode))
        return -EISDIR;
    if (S_ISBLK(st.st_mode))
        bytes = lseek(fd, 0, SEEK_END);
    else if (!S_ISREG(st.st_mode))
        return -ESPIPE; /* a pipe or terminal cannot be read at offsets */
    if (bytes < 0)
        return -errno;
    *out = (struct file_id){.dev = st.st_dev,
                            .ino = st.st_ino,
                            .bytes = (uint64_t)bytes,
                            .mtime_ns = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec};
    return 0;
}

static int plain_identify(void *ctx, void *handle, struct file_id *out)
{
    (void)ctx;
    return file_identify(fd_of(handle), out);
}

static int64_t plain_read_at(void *ctx, void *handle, uint64_t off, void *dst, uint64_t bytes)
{
    (void)ctx;
    ssize_t n = pread(fd_of(handle), dst, (size_t)bytes, (off_t)off);
    return n < 0 ? -errno : n;
}

static int plain_map(void *ctx, void *handle, uint64_t bytes, const void **out)
{
    (void)ctx;
    void *p = mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, fd_of(handle), 0);
    if (p == MAP_FAILED)
        return -errno;
    *out = p;
    return 0;
}

static void plain_unmap(void *ctx, const void *p, uint64_t bytes)
{
    (void)ctx;
    munmap((void *)(uintptr_t)p, (size_t)bytes);
}

static void plain_close(void *ctx, void *handle)
{
    (void)ctx;
    close(fd_of(handle)); /* nothing was written: there is nothing to lose */
}

const struct file_ops file_plain = {
    .open = plain_open,
    .identify = plain_identify,
    .read_at = plain_read_at,
    .map = plain_map,
    .unmap = plain_unmap,
    .close = plain_close,
};

/* ---- files ---- */

const char *file_reason(int64_t minus_errno)
{
    const char *text = strerrordesc_np((int)-minus_errno);
    return text ? text : "unknown error";
}

int file_open(const char *path, const struct file_ops *ops, struct file **out)
{
    struct file *f = mem_zalloc(1, sizeof *f, MEM_META);
    char *own_path = mem_strdup(path, MEM_META);
    int rc, sys;

    *out = NULL;
    if (!f || !own_path) {
        mem_free(f);
        mem_free(own_path);
        return err(ERR_NOMEM, "%s: a handle of %zu bytes", path, sizeof *f);
    }
    f->ops = ops ? ops : &file_plain;
    f->path = own_path;
    sys = f->ops->open(f->ops->ctx, path, &f->handle);
    if (sys) {
        rc = err(ERR_IO, "%s: cannot open: %s", path, file_reason(sys));
        f->ops = NULL;
        goto out;
    }
    sys = f->ops->identify(f->ops->ctx, f->handle, &f->id);
    if (sys) {
        rc = err(ERR_IO, "%s: cannot be read at offsets: %s", path, file_reason(sys));
        goto out;
    }
    *out = f;
    return 0;
out:
    file_close(f);
    return rc;
}

void file_close(struct file *f)
{
    if (!f)
        return;
    if (f->mapped)
        f->ops->unmap(f->ops->ctx, f->mapped, f->id.bytes);
    if (f->ops)
        f->ops->close(f->ops->ctx, f->handle);
    mem_free(f->path);
    mem_free(f);
}

const char *file_path(const struct file *f)
{
    return f->path;
}

const struct file_id *file_identity(const struct file *f)
{
    return &f->id;
}

bool file_is_same(const struct file_id *a, const struct file_id *b)
{
    return a->dev == b->dev && a->ino == b->ino && a->bytes == b->bytes && a->mtime_ns == b->mtime_ns;
}

uint64_t file_n_repeats(const struct file *f)
{
    return __atomic_load_n(&f->n_repeats, __ATOMIC_RELAXED);
}

void file_add_repeats(struct file *f, uint64_t n)
{
    __atomic_add_fetch(&f->n_repeats, n, __ATOMIC_RELAXED);
}

int file_read(struct file *f, uint64_t off, void *dst, uint64_t bytes)
{
    uint64_t done = 0;
    bool is_repeat = false;

    if (off > INT64_MAX || bytes > INT64_MAX - off)
        return err(ERR_ARG, "%s: %" PRIu64 " bytes at offset %" PRIu64 " lie beyond any file", f->path, bytes, off);
    while (done < bytes) {
        uint64_t want = bytes - done < MAX_READ_BYTES ? bytes - done : MAX_READ_BYTES;
        int64_t n = f->ops->read_at(f->ops->ctx, f->handle, off + done, (char *)dst + done, want);
        if (n == -EINTR || n == -EAGAIN)
            continue;
        if (n < 0 && !is_repeat) {
            is_repeat = true;
            file_add_repeats(f, 1);
            continue;
        }
        if (n < 0)
            return err(ERR_IO, "%s: reading %" PRIu64 " bytes at offset %" PRIu64 " failed at %" PRIu64 ": %s", f->path,
                       bytes, off, off + done, file_reason(n));
        if (n == 0)
            return err(ERR_IO, "%s: reading %" PRIu64 " bytes at offset %" PRIu64 ": the file ends at %" PRIu64,
                       f->path, bytes, off, off + done);
        done += (uint64_t)n;
    }
    return 0;
}

int file_compare(const char *path, const struct file_id *now, const struct file_id *then)
{
    if (now->dev != then->dev || now->ino != then->ino)
        return err(ERR_STATE, "%s: another file took its place (inode %" PRIu64 ", was %" PRIu64 ")", path, now->ino,
                   then->ino);
    if (now->bytes != then->bytes)
        return err(ERR_STATE, "%s: the file was changed: %" PRIu64 " bytes, were %" PRIu64, path, now->bytes,
                   then->bytes);
    if (now->mtime_ns != then->mtime_ns)
        return err(ERR_STATE, "%s: the file was written to (time of change %" PRId64 " ns, was %" PRId64 " ns)", path,
                   now->mtime_ns, then->mtime_ns);
    return 0;
}

int file_check(struct file *f, const struct file_id *then)
{
    struct file_id now;
    int sys = f->ops->identify(f->ops->ctx, f->handle, &now);

    if (sys)
        return err(ERR_IO, "%s: cannot be looked at again: %s", f->path, file_reason(sys));
    return file_compare(f->path, &now, then);
}

int file_map(struct file *f, const void **out)
{
    int sys = 0;

    if (!f->id.bytes)
        return err(ERR_UNSUPPORTED, "%s: an empty file cannot be mapped", f->path);
    if (!f->mapped)
        sys = f->ops->map ? f->ops->map(f->ops->ctx, f->handle, f->id.bytes, &f->mapped) : -ENOTSUP;
    if (sys)
        return err(sys == -ENOTSUP || sys == -ENODEV ? ERR_UNSUPPORTED : ERR_IO, "%s: cannot map %" PRIu64 " bytes: %s",
                   f->path, f->id.bytes, file_reason(sys));
    *out = f->mapped;
    return 0;
}
