/* The io_uring reader: many reads in flight, without a thread for each and, where the file system allows it, without
 * the page cache (O_DIRECT). One thread owns a ring and calls everything but ring_wake. Short reads are settled here, and a read
 * that failed is asked for once more; what the bytes are for is known above. Where io_uring is not to be had,
 * ring_open says so and the plan reads by pread. */
#ifndef FERRY_IO_RING_H
#define FERRY_IO_RING_H

#include <stdbool.h>
#include <stdint.h>

#include "io/file.h"

#ifdef __cplusplus
extern "C" {
#endif

/* O_DIRECT moves whole blocks of this size to addresses that are a multiple of it. 4 KiB is the most that common disks
 * and file systems ask for; those that want more are read through the page cache. */
#define RING_ALIGN 4096

struct ring;

struct ring_file {
    const char *path;           /* copied */
    const struct file_id *then; /* what an earlier open saw; another file is refused. NULL: any */
};

struct ring_args {
    int depth;                     /* reads in flight at most */
    const struct ring_file *files; /* (n_files) */
    int n_files;
    bool is_buffered; /* do not ask for O_DIRECT */
    void *arena;      /* where most slots lie, RING_ALIGN-aligned; registered if the lock limit allows. NULL: none */
    uint64_t arena_bytes;
    /* Tests: gets what the system said of the read at this offset (bytes or -errno), returns what it shall have said: no more
     * bytes. */
    int (*fault)(void *arg, uint64_t off, int res);
    void *fault_arg;
};

struct ring_read {
    int file;            /* index into files */
    uint64_t off, bytes; /* bytes > 0, all inside the file */
    void *slot;          /* RING_ALIGN-aligned, ring_slot_bytes(off, bytes) long; a loan until the read is done */
    uint64_t tag;        /* comes back */
};

struct ring_done {
    uint64_t tag;
    int rc;     /* 0, or ERR_IO: it failed twice; the text of ring_wait's last failed read is err_text() */
    void *data; /* where byte `off` lies: slot + off % RING_ALIGN, so that O_DIRECT need not copy */
};

struct ring_info {
    int n_direct; /* files read by O_DIRECT */
    bool has_fixed_files, has_fixed_arena;
    uint64_t n_repeats; /* reads so far that failed and were asked for once more */
};

/* Room that a read needs: it is rounded out to RING_ALIGN at both ends. */
uint64_t ring_slot_bytes(uint64_t off, uint64_t bytes);

/* ERR_UNSUPPORTED: no io_uring here (old kernel, forbidden, built without, its queue passes the limits of memory or handles);
 * ERR_STATE: a file changed; ERR_IO, ERR_NOMEM, ERR_ARG. */
int ring_open(const struct ring_args *args, struct ring **out);
void ring_close(struct ring *r); /* takes NULL; waits for what is in flight */

/* Start n reads, all or none; never waits for them. ERR_LIMIT when more than depth would be in flight; ERR_ARG. */
int ring_submit(struct ring *r, const struct ring_read *reads, int n);

/* Up to n_max finished reads, in the order they finished. Sleeps until there are n_min (or all, if fewer are in flight),
 * or somebody calls ring_wake. A failed read does not fail the call. ERR_IO when the ring itself broke, or the system took no
 * read for a second (its memory for requests is short). */
int ring_wait(struct ring *r, int n_min, struct ring_done *done, int n_max, int *n_done);

/* Let the owner return from ring_wait, or from its next one: there is work to submit. Any thread. */
void ring_wake(struct ring *r);

int ring_n_in_flight(const struct ring *r); /* submitted and not yet given out by ring_wait */
void ring_info(const struct ring *r, struct ring_info *out);

#ifdef __cplusplus
}
#endif
#endif
