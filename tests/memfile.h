/* Files in memory behind file_ops, for tests and fuzz entries: any read can be made to fail or come short. */
#ifndef FERRY_TESTS_MEMFILE_H
#define FERRY_TESTS_MEMFILE_H

#include "io/file.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum { MEMFILE_MAX = 8 };

struct memfile {
    const char *path; /* view */
    const void *data; /* view */
    uint64_t bytes;
    int64_t mtime_ns;
};

struct memfiles {
    struct memfile files[MEMFILE_MAX];
    int n_files;
    int n_open;
    uint64_t max_read_bytes; /* 0: as asked */
    uint64_t n_calls,
        fail_at;      /* of open, identify, read_at; the fail_at-th says EIO (0: none), if it is a read the next, too */
    bool is_passing;  /* only the fail_at-th */
    bool fails_again; /* the read before this call has failed */
    uint64_t changes_at; /* the changes_at-th call finds the files written to (0: none) */
    uint64_t read_end;   /* the furthest byte that was read */
};

static inline int memfile_call(struct memfiles *m)
{
    m->n_calls++;
    if (m->n_calls == m->changes_at) {
        for (int i = 0; i < m->n_files; i++)
            m->files[i].mtime_ns++;
    }
    return m->n_calls == m->fail_at ? -EIO : 0;
}

static inline int memfile_open(void *ctx, const char *path, void **out)
{
    struct memfiles *m = (struct memfiles *)ctx;
    int sys = memfile_call(m);

    for (int i = 0; i < m->n_files && !sys; i++) {
        if (strcmp(m->files[i].path, path) == 0) {
            *out = &m->files[i];
            m->n_open++;
            return 0;
        }
    }
    return sys ? sys : -ENOENT;
}

static inline int memfile_identify(void *ctx, void *handle, struct file_id *out)
{
    struct memfiles *m = (struct memfiles *)ctx;
    const struct memfile *f = (const struct memfile *)handle;
    int sys = memfile_call(m);

    if (sys)
        return sys;
    out->dev = 7;
    out->ino = (uint64_t)(f - m->files) + 1;
    out->bytes = f->bytes;
    out->mtime_ns = f->mtime_ns;
    return 0;
}

static inline int64_t memfile_read_at(void *ctx, void *handle, uint64_t off, void *dst, uint64_t bytes)
{
    struct memfiles *m = (struct memfiles *)ctx;
    const struct memfile *f = (const struct memfile *)handle;
    int sys = memfile_call(m);

    if (m->fails_again)
        sys = -EIO;
    m->fails_again = sys && !m->fails_again && !m->is_passing;
    if (sys)
        return sys;
    if (off >= f->bytes)
        return 0;
    if (bytes > f->bytes - off)
        bytes = f->bytes - off;
    if (m->max_read_bytes && bytes > m->max_read_bytes)
        bytes = m->max_read_bytes;
    memcpy(dst, (const char *)f->data + off, (size_t)bytes);
    if (off + bytes > m->read_end)
        m->read_end = off + bytes;
    return (int64_t)bytes;
}

static inline void memfile_close(void *ctx, void *handle)
{
    (void)handle;
    ((struct memfiles *)ctx)->n_open--;
}

/* m is a view for as long as the result is used. */
static inline struct file_ops memfile_ops(struct memfiles *m)
{
    struct file_ops ops;

    memset(&ops, 0, sizeof ops);
    ops.ctx = m;
    ops.open = memfile_open;
    ops.identify = memfile_identify;
    ops.read_at = memfile_read_at;
    ops.close = memfile_close;
    return ops;
}

static inline void memfile_add(struct memfiles *m, const char *path, const void *data, uint64_t bytes)
{
    struct memfile *f = &m->files[m->n_files++];

    f->path = path;
    f->data = data;
    f->bytes = bytes;
    f->mtime_ns = 1000;
}

#endif
