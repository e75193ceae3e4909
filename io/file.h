/* Reading files at offsets. `struct file_ops` is how the system is asked, so that tests plug in one that fails, reads
 * short or changes under the reader; everything above it (loops, error texts, identity) is here once.
 * io/ knows paths, offsets and bytes; what they mean is known above. */
#ifndef FERRY_IO_FILE_H
#define FERRY_IO_FILE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Which file it is, and as of when: a replaced, rewritten or truncated file differs in one of these. */
struct file_id {
    uint64_t dev, ino, bytes;
    int64_t mtime_ns;
};

/* One way to ask the system. Results are the system's own: 0 or a count where it worked, else -errno; file.c makes them
 * into errors with text. Any thread, several at once on one handle. */
struct file_ops {
    void *ctx; /* view: passed to each call */
    int (*open)(void *ctx, const char *path, void **out_handle);
    int (*identify)(void *ctx, void *handle, struct file_id *out);
    /* As pread: may give fewer bytes than asked; 0 at the end of the file. */
    int64_t (*read_at)(void *ctx, void *handle, uint64_t off, void *dst, uint64_t bytes);
    /* The whole file, read-only; NULL here or -ENOTSUP: cannot be mapped. */
    int (*map)(void *ctx, void *handle, uint64_t bytes, const void **out);
    void (*unmap)(void *ctx, const void *p, uint64_t bytes);
    void (*close)(void *ctx, void *handle);
};

/* The system's files: open with O_CLOEXEC, pread, mmap. Regular files and block devices only. */
extern const struct file_ops file_plain;

struct file;

/* Open for reading. ops is a view until file_close; NULL means file_plain. ERR_IO, ERR_NOMEM. */
int file_open(const char *path, const struct file_ops *ops, struct file **out);
void file_close(struct file *f); /* takes NULL */

const char *file_path(const struct file *f);               /* view until file_close */
const struct file_id *file_identity(const struct file *f); /* as it was at open; view until file_close */
bool file_is_same(const struct file_id *a, const struct file_id *b);

/* "No such file or directory" for -ENOENT, whatever the locale. Static text. Any thread. */
const char *file_reason(int64_t minus_errno);

/* Identity of an open descriptor; 0 or -errno, for those who open by themselves. */
int file_identify(int fd, struct file_id *out);

/* ERR_STATE, with what differs, if the file at path, now this one, is not the one it was then. */
int file_compare(const char *path, const struct file_id *now, const struct file_id *then);

/* All of bytes from off, or an error: ERR_IO, with path, offset, bytes and the system's reason. What failed is asked for once
 * more before. Any thread. */
int file_read(struct file *f, uint64_t off, void *dst, uint64_t bytes);

/* How often that was so, and of other readers of the file what they have added. Any thread. */
uint64_t file_n_repeats(const struct file *f);
void file_add_repeats(struct file *f, uint64_t n);

/* Look again: file_compare of the open file as it is now with `then` (file_identity(f), or what an earlier open saw). */
int file_check(struct file *f, const struct file_id *then);

/* Map the whole file read-only; a view until file_close. ERR_UNSUPPORTED where it cannot be mapped, ERR_IO. Bytes that
 * are truncated away later raise SIGBUS when touched. One thread at a time. */
int file_map(struct file *f, const void **out);

#ifdef __cplusplus
}
#endif
#endif
