/* How the processes of one run reach each other: what a module (mpi_link.c) fills in and team.c loads, so that ferry itself links
 * no MPI. An error of the system below ends the whole job, as MPI does unless told otherwise, but for the loss of another process where
 * the system below goes on without it. One thread. */
#ifndef FERRY_CLI_TEAM_LINK_H
#define FERRY_CLI_TEAM_LINK_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TEAM_LINK_VERSION = 2 };

/* A message on its way, in the module's own terms. */
struct team_request {
    union {
        void *align;
        char bytes[32];
    } u;
};

struct team_link {
    int version; /* TEAM_LINK_VERSION */
    void (*open)(int *rank, int *n_ranks);
    /* After all messages were taken: wait for the other processes. Where one was lost, process 0, which is the last to have anything to
     * do, ends the job with the status instead: they could wait for ever. */
    void (*close)(int status);
    void (*abort)(int status); /* end all processes of the job, this one included */

    /* Begin to send n bytes, at most INT_MAX; never waits. p stays as it is until is_done. To a process that is lost: nowhere. */
    void (*send)(int to, const void *p, size_t n, struct team_request *out);
    bool (*is_done)(struct team_request *request);

    /* Is there a message? Then from whom, and how long; the next take gets that one, or false if its sender was lost on the way. */
    bool (*look)(int *from, size_t *n);
    bool (*take)(void *p, size_t n);

    /* A process that look has found to be lost, each once; -1: none. No message of it comes any more. */
    int (*lost)(void);
};

/* The one symbol of a module. */
#define TEAM_LINK_SYMBOL "mpi_link"

#ifdef __cplusplus
}
#endif
#endif
