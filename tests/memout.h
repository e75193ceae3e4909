/* Files written to memory behind out_ops: any call can be made to fail, writes can come short. */
#ifndef FERRY_TESTS_MEMOUT_H
#define FERRY_TESTS_MEMOUT_H

#include "io/out.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MEMOUT_MAX = 16 };

struct memout {
    char path[128];      /* "": never named */
    unsigned char *data; /* own */
    uint64_t bytes;
    int n_published;
};

struct memouts {
    struct memout files[MEMOUT_MAX];
    int n_files, n_open;
    uint64_t max_write_bytes;  /* 0: as asked */
    uint64_t n_calls, fail_at; /* of all but close and remove; the fail_at-th says ENOSPC (0: none) */
    pthread_mutex_t lock;
};

static inline int memout_call(struct memouts *m)
{
    pthread_mutex_lock(&m->lock);
    int sys = ++m->n_calls == m->fail_at ? -ENOSPC : 0;
    pthread_mutex_unlock(&m->lock);
    return sys;
}

static inline int memout_create(void *ctx, const char *path, void **out)
{
    struct memouts *m = (struct memouts *)ctx;
    int sys = memout_call(m);

    (void)path;
    if (sys || m->n_files == MEMOUT_MAX)
        return sys ? sys : -ENFILE;
    *out = &m->files[m->n_files++];
    m->n_open++;
    return 0;
}

static inline int memout_resize(void *ctx, void *handle, uint64_t bytes)
{
    struct memout *f = (struct memout *)handle;
    int sys = memout_call((struct memouts *)ctx);

    if (sys)
        return sys;
    f->data = (unsigned char *)calloc(1, bytes + !bytes);
    f->bytes = bytes;
    return f->data ? 0 : -ENOMEM;
}

static inline int64_t memout_write_at(void *ctx, void *handle, uint64_t off, const void *src, uint64_t bytes)
{
    struct memouts *m = (struct memouts *)ctx;
    struct memout *f = (struct memout *)handle;
    int sys = memout_call(m);

    if (sys)
        return sys;
    if (off > f->bytes || bytes > f->bytes - off)
        return -EFBIG; /* the writer said how long the file is */
    if (m->max_write_bytes && bytes > m->max_write_bytes)
        bytes = m->max_write_bytes;
    memcpy(f->data + off, src, bytes);
    return (int64_t)bytes;
}

static inline int memout_sync(void *ctx, void *handle)
{
    (void)handle;
    return memout_call((struct memouts *)ctx);
}

static inline int memout_publish(void *ctx, void *handle, const char *path)
{
    struct memout *f = (struct memout *)handle;
    int sys = memout_call((struct memouts *)ctx);

    if (sys)
        return sys;
    snprintf(f->path, sizeof f->path, "%s", path);
    f->n_published++;
    return 0;
}

static inline int memout_remove(void *ctx, const char *path)
{
    struct memouts *m = (struct memouts *)ctx;

    for (int i = 0; i < m->n_files; i++) {
        if (!strcmp(m->files[i].path, path)) {
            m->files[i].path[0] = '\0';
            return 0;
        }
    }
    return -ENOENT;
}

static inline void memout_close(void *ctx, void *handle)
{
    (void)handle;
    ((struct memouts *)ctx)->n_open--;
}

/* m, all zeros, is a view for as long as the result is used. */
static inline struct out_ops memout_ops(struct memouts *m)
{
    struct out_ops ops;

    pthread_mutex_init(&m->lock, NULL);
    ops.ctx = m;
    ops.create = memout_create;
    ops.resize = memout_resize;
    ops.write_at = memout_write_at;
    ops.sync = memout_sync;
    ops.publish = memout_publish;
    ops.remove = memout_remove;
    ops.close = memout_close;
    return ops;
}

static inline int memout_n_named(const struct memouts *m)
{
    int n = 0;

    for (int i = 0; i < m->n_files; i++)
        n += m->files[i].path[0] != '\0';
    return n;
}

static inline void memout_done(struct memouts *m)
{
    for (int i = 0; i < m->n_files; i++)
        free(m->files[i].data);
    pthread_mutex_destroy(&m->lock);
}

#endif
