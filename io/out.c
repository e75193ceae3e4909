/* Owns files while they are written: loops, error texts, and that nothing half stays behind. */
#define _GNU_SOURCE 1
#include "io/out.h"

#include "io/file.h"
#include "src/base/err.h"
#include "src/base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct out {
    const struct out_ops *ops; /* view; NULL until there is a handle */
    void *handle;              /* own, through ops */
    char *path;                /* own */
    bool is_published;
};

/* Linux writes at most 2^31 - 4096 bytes a call. */
#define MAX_WRITE_BYTES (UINT64_C(1) << 30)
#define MAX_NAMES 100 /* left-overs of killed runs with the same process number, where names are needed */

/* ---- the system ---- */

struct plain {
    int fd;
    char *temporary; /* own: its name while it has one that is not its own; NULL else */
};

static char *temporary_name(const char *path, int n)
{
    size_t bytes = strlen(path) + 48;
    char *name = mem_alloc(bytes, MEM_OTHER);

    if (name)
        snprintf(name, bytes, "%s.%ld-%d.part", path, (long)getpid(), n);
    return name;
}

/* The folder that path lies in, opened; -errno. */
static int open_folder(const char *path, int flags, mode_t mode)
{
    const char *slash = strrchr(path, '/');
    char *folder = mem_strdup(slash ? path : ".", MEM_OTHER);
    int fd;

    if (!folder)
        return -ENOMEM;
    if (slash)
        folder[slash == path ? 1 : slash - path] = '\0';
    fd = open(folder, flags | O_CLOEXEC, mode);
    fd = fd < 0 ? -errno : fd;
    mem_free(folder);
    return fd;
}

/* Naming such a file goes through /proc. */
static bool can_be_named(int fd)
{
    char link[64];

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return access(link, F_OK) == 0;
}

static int open_named(struct plain *p, const char *path)
{
    for (int n = 0; n < MAX_NAMES; n++) {
        p->temporary = temporary_name(path, n);
        if (!p->temporary)
            return -ENOMEM;
        p->fd = open(p->temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (p->fd >= 0)
            return 0;
        int sys = -errno;
        mem_free(p->temporary);
        p->temporary = NULL;
        if (sys != -EEXIST)
            return sys;
    }
    return -EEXIST;
}

/* What can only fail at the end should fail now, before hours of work. */
static int check_target(const char *path)
{
    struct stat st;

    if (stat(path, &st))
        return errno == ENOENT ? 0 : -errno;
    return S_ISDIR(st.st_mode) ? -EISDIR : S_ISREG(st.st_mode) ? 0 : -EINVAL;
}

static int plain_create(void *ctx, const char *path, void **out_handle)
{
    (void)ctx;
    int sys = check_target(path);
    struct plain *p = sys ? NULL : mem_zalloc(1, sizeof *p, MEM_OTHER);

    if (!p)
        return sys ? sys : -ENOMEM;
    p->fd = open_folder(path, O_TMPFILE | O_RDWR, 0666);
    if (p->fd >= 0 && !can_be_named(p->fd)) {
        close(p->fd);
        p->fd = -EOPNOTSUPP;
    }
    sys = p->fd < 0 ? p->fd : 0;
    /* EISDIR: kernels and file systems that do not know the flag see a folder opened for writing */
    if (sys == -EOPNOTSUPP || sys == -EISDIR || sys == -EINVAL)
        sys = open_named(p, path);
    if (sys) {
        mem_free(p);
        return sys;
    }
    *out_handle = p;
    return 0;
}

static int plain_resize(void *ctx, void *handle, uint64_t bytes)
{
    (void)ctx;
    struct plain *p = handle;

    if (bytes && fallocate(p->fd, 0, 0, (off_t)bytes) && errno != EOPNOTSUPP && errno != ENOSYS)
        return -errno;
    return ftruncate(p->fd, (off_t)bytes) ? -errno : 0;
}

static int64_t plain_write_at(void *ctx, void *handle, uint64_t off, const void *src, uint64_t bytes)
{
    (void)ctx;
    ssize_t n = pwrite(((struct plain *)handle)->fd, src, (size_t)bytes, (off_t)off);
    return n < 0 ? -errno : n;
}

static int plain_sync(void *ctx, void *handle)
{
    (void)ctx;
    return fsync(((struct plain *)handle)->fd) ? -errno : 0;
}

/* Where no file is in the way the nameless one takes its place at once; rename is what replaces. */
static int name_it(struct plain *p, const char *path)
{
    char link[64];
    int sys = 0;

    snprintf(link, sizeof link, "/proc/self/fd/%d", p->fd);
    if (!linkat(AT_FDCWD, link, AT_FDCWD, path, AT_SYMLINK_FOLLOW))
        return 0;
    sys = -errno;
    for (int n = 0; n < MAX_NAMES && sys == -EEXIST; n++) {
        p->temporary = temporary_name(path, n);
        if (!p->temporary)
            return -ENOMEM;
        if (!linkat(AT_FDCWD, link, AT_FDCWD, p->temporary, AT_SYMLINK_FOLLOW))
            return 0;
        sys = -errno;
        mem_free(p->temporary);
        p->temporary = NULL;
    }
    return sys;
}

static int plain_publish(void *ctx, void *handle, const char *path)
{
    (void)ctx;
    struct plain *p = handle;
    int sys = p->temporary ? 0 : name_it(p, path);

    if (sys)
        return sys;
    if (p->temporary && rename(p->temporary, path))
        return -errno;
    mem_free(p->temporary);
    p->temporary = NULL;
    int folder = open_folder(path, O_RDONLY | O_DIRECTORY, 0);
    sys = folder < 0 ? folder : 0;
    if (!sys && fsync(folder) && errno != EINVAL) /* EINVAL: a file system whose folders need none */
        sys = -errno;
    if (folder >= 0)
        close(folder);
    if (sys)
        unlink(path); /* a name that a power failure may take back is none */
    return sys;
}

static int plain_remove(void *ctx, const char *path)
{
    (void)ctx;
    return unlink(path) ? -errno : 0;
}

static void plain_close(void *ctx, void *handle)
{
    struct plain *p = handle;

    (void)ctx;
    close(p->fd); /* what a late write error could say, sync has said */
    if (p->temporary)
        unlink(p->temporary);
    mem_free(p->temporary);
    mem_free(p);
}

const struct out_ops out_plain = {
    .create = plain_create,
    .resize = plain_resize,
    .write_at = plain_write_at,
    .sync = plain_sync,
    .publish = plain_publish,
    .remove = plain_remove,
    .close = plain_close,
};

/* ---- files ---- */

int out_open(const char *path, uint64_t bytes, const struct out_ops *ops, struct out **out)
{
    struct out *o = mem_zalloc(1, sizeof *o, MEM_OTHER);
    char *own_path = mem_strdup(path, MEM_OTHER);
    int rc = 0, sys;

    *out = NULL;
    if (!o || !own_path) {
        mem_free(o);
        mem_free(own_path);
        return err(ERR_NOMEM, "%s: a handle of %zu bytes", path, sizeof *o);
    }
    o->path = own_path;
    ops = ops ? ops : &out_plain;
    if (bytes > INT64_MAX)
        rc = err(ERR_LIMIT, "%s: %" PRIu64 " bytes are more than a file can have", path, bytes);
    else if ((sys = ops->create(ops->ctx, path, &o->handle)))
        rc = err(ERR_IO, "%s: cannot be written: %s", path, file_reason(sys));
    else
        o->ops = ops;
    if (!rc && (sys = ops->resize(ops->ctx, o->handle, bytes)))
        rc = err(ERR_IO, "%s: no room for its %" PRIu64 " bytes: %s", path, bytes, file_reason(sys));
    if (rc) {
        out_close(o);
        return rc;
    }
    *out = o;
    return 0;
}

int out_write(struct out *o, uint64_t off, const void *src, uint64_t bytes)
{
    uint64_t done = 0;

    while (done < bytes) {
        uint64_t want = bytes - done < MAX_WRITE_BYTES ? bytes - done : MAX_WRITE_BYTES;
        int64_t n = o->ops->write_at(o->ops->ctx, o->handle, off + done, (const char *)src + done, want);
        if (n == -EINTR || n == -EAGAIN)
            continue;
        if (n <= 0)
            return err(ERR_IO, "%s: writing %" PRIu64 " bytes at offset %" PRIu64 " failed at %" PRIu64 ": %s", o->path,
                       bytes, off, off + done, file_reason(n ? n : -EIO));
        done += (uint64_t)n;
    }
    return 0;
}

int out_sync(struct out *o)
{
    int sys = o->ops->sync(o->ops->ctx, o->handle);
    return sys ? err(ERR_IO, "%s: could not be brought to the disk: %s", o->path, file_reason(sys)) : 0;
}

int out_publish(struct out *o)
{
    int sys = o->ops->publish(o->ops->ctx, o->handle, o->path);

    if (sys)
        return err(ERR_IO, "%s: could not be given its name: %s", o->path, file_reason(sys));
    o->is_published = true;
    return 0;
}

void out_retract(struct out *o)
{
    if (o->is_published)
        o->ops->remove(o->ops->ctx, o->path); /* its own failure would hide why this is done */
    o->is_published = false;
}

void out_close(struct out *o)
{
    if (!o)
        return;
    if (o->ops)
        o->ops->close(o->ops->ctx, o->handle);
    mem_free(o->path);
    mem_free(o);
}
