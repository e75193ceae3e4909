/* Writing files that appear whole or not at all: the bytes go to a file that has no name yet, and it gets its name when all of
 * them are on the disk. `struct out_ops` is how the system is asked, so that tests plug in one that fails. */
#ifndef FERRY_IO_OUT_H
#define FERRY_IO_OUT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One way to ask the system. Results are the system's own: 0 or a count where it worked, else -errno. write_at: any thread,
 * several at once on one handle; the others: one thread. */
struct out_ops {
    void *ctx; /* view: passed to each call */
    /* A new file that nobody sees at path yet. */
    int (*create)(void *ctx, const char *path, void **out_handle);
    /* Its length, and the room for it on the disk where the file system can promise that. */
    int (*resize)(void *ctx, void *handle, uint64_t bytes);
    int64_t (*write_at)(void *ctx, void *handle, uint64_t off, const void *src, uint64_t bytes);
    int (*sync)(void *ctx, void *handle);
    /* Name it path, in the place of what was there. */
    int (*publish)(void *ctx, void *handle, const char *path);
    int (*remove)(void *ctx, const char *path);
    void (*close)(void *ctx, void *handle); /* one that was not published is gone */
};

/* The system's files. Without a name (O_TMPFILE) where the file system has that, so that even a killed process leaves
 * nothing; elsewhere beside path as "path.PID-N.part". */
extern const struct out_ops out_plain;

struct out;

/* Begin a file of that many bytes, zeros until written. ops is a view until out_close; NULL means out_plain. ERR_IO,
 * ERR_NOMEM. */
int out_open(const char *path, uint64_t bytes, const struct out_ops *ops, struct out **out);

/* All of bytes at off. Any thread. ERR_IO, with path, offset, bytes and the system's reason. */
int out_write(struct out *o, uint64_t off, const void *src, uint64_t bytes);

/* Everything written is on the disk afterwards; then give the file its name. ERR_IO. */
int out_sync(struct out *o);
int out_publish(struct out *o);

/* Takes NULL. Without out_publish nothing stays behind. */
void out_close(struct out *o);

/* Take away a published file again: part of a set that did not become whole. */
void out_retract(struct out *o);

#ifdef __cplusplus
}
#endif
#endif
