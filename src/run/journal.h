/* A file of lines that survives: each whole line is a record, and a run that was killed, or whose disk was full, leaves whole
 * lines and at most one torn end, which the next open cuts off. Knows lines, not what they say. One thread; one process: the
 * file is locked. */
#ifndef FERRY_RUN_JOURNAL_H
#define FERRY_RUN_JOURNAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How the system is asked; tests plug in one that fails. Results are a count or 0, else -errno. */
struct journal_ops {
    void *ctx; /* view: passed to each call */
    int64_t (*write_at)(void *ctx, int fd, const void *p, size_t n_bytes, uint64_t off);
    int (*truncate)(void *ctx, int fd, uint64_t n_bytes);
    int (*sync)(void *ctx, int fd);
};

struct journal;

/* Called at open for each whole line (without its end; off: where it begins). 0: a record; ERR_FORMAT: none, so that it and all
 * behind it are cut off; another error ends the opening. */
typedef int journal_line(const char *line, size_t n_bytes, uint64_t off, void *arg);

struct journal_args {
    const char *path; /* copied */
    /* What the file begins with (its torn end counts as far as it goes): one that does not is somebody else's, and is left as it is.
     * View, while opening; NULL: anything. */
    const char *begin;
    journal_line *on_line;
    void *arg;
    const struct journal_ops *ops; /* view until close; NULL: the system */
};

/* Open, or make an empty one. ERR_IO, ERR_NOMEM, ERR_STATE (another process has it open, or it begins otherwise),
 * ERR_UNSUPPORTED (no regular file), what on_line says. */
int journal_open(const struct journal_args *args, struct journal **out);
void journal_close(struct journal *j); /* without sync; takes NULL */

/* Bytes that were cut off at open. */
uint64_t journal_n_cut(const struct journal *j);

/* Bytes of whole lines. */
uint64_t journal_n_bytes(const struct journal *j);

/* Add a line (n_bytes, no line end in it). Once a second it is also put on the disk (journal_sync). ERR_IO: the file holds what
 * it held before. *off (may be NULL): where the line begins. */
int journal_append(struct journal *j, const char *line, size_t n_bytes, uint64_t *off);

/* Until here everything is to survive a power loss. ERR_IO. */
int journal_sync(struct journal *j);

/* Read bytes back. ERR_IO. */
int journal_read(struct journal *j, uint64_t off, void *p, size_t n_bytes);

/* Forget all lines. ERR_IO. */
int journal_clear(struct journal *j);

#ifdef __cplusplus
}
#endif
#endif
