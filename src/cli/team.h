/* The processes of one run of ferry batch (mpirun), and the messages between rank 0, which has the input and the output, and the
 * others, which ask it for lines and give it records. Alone, which is what a run is without mpirun, nothing here does anything. */
#ifndef FERRY_CLI_TEAM_H
#define FERRY_CLI_TEAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/cli/conf.h"
#include "src/cli/team_link.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

enum team_kind {
    TEAM_HELLO = 1, /* 0 to k: number is how many positions a sequence is expected to take */
    TEAM_READY,     /* k to 0: the model is open; text says which, and with which options (JSON) */
    TEAM_WANT,      /* k to 0: room for so many lines more */
    TEAM_LINE,      /* 0 to k: text is line `number`; bits: its records that are there already */
    TEAM_END,       /* 0 to k: there will be no more */
    TEAM_RECORD,    /* k to 0: text is record `index` of line `number`; bits: 1 if it says why there is no answer */
    TEAM_BYE, /* k to 0: everything that it was given has been answered. number: 0, or 1 if it was asked to stop before */
    TEAM_LOST, /* of the link: process `from` is gone, and says nothing more */
};

/* What every message begins with. Ranks are machines of one kind: bytes go as they lie. */
struct team_head {
    uint64_t kind, number, index, bits;
    struct ferry_batch_stats stats; /* k to 0: of k, so far */
};

struct team_message {
    struct team_head head;
    int from;
    const char *text; /* view, until the next team_receive: (n_bytes) and a NUL */
    size_t n_bytes;
};

/* What rank 0 knows of another. */
struct team_member {
    bool got_end, is_gone, was_stopped;
    uint64_t n_wanted; /* lines */
    struct ferry_batch_stats stats;
};

struct team_letter;

struct team {
    const struct team_link *link; /* view; NULL: alone */
    void *module;                 /* own; NULL: the link is not a module's */
    int rank, n_ranks;
    struct team_member *member;  /* own: (n_ranks) */
    struct team_letter *letters; /* own: on their way */
    struct text inbox;
};

/* Load the module and find the others, if conf->n_ranks says that there are some. ERR_UNSUPPORTED: ferry was built without MPI, or
 * the module is of another version; ERR_STATE: MPI knows another number of ranks; ERR_NOMEM. team_close() in any case. */
int team_open(struct team *t, const struct conf *conf);

/* The same over this link, for tests. */
int team_join(struct team *t, const struct team_link *link, uint32_t n_expected);

/* is_orderly: wait until all that was sent has arrived, and for the others. Otherwise the whole job ends with the status, at once. */
void team_close(struct team *t, bool is_orderly, int status);

static inline bool team_is_alone(const struct team *t)
{
    return t->n_ranks <= 1;
}

/* Send a copy; never waits. ERR_NOMEM, ERR_LIMIT (over INT_MAX bytes). */
int team_send(struct team *t, int to, const struct team_head *head, const char *text, size_t n_bytes);

/* Take a message, or learn (TEAM_LOST) that there will be none of a process, if there is one. ERR_NOMEM; ERR_FORMAT: it is none of ours. */
int team_receive(struct team *t, struct team_message *out, bool *got);

/* Set an error's text, for what another rank should not have sent. Returns ERR_STATE. */
int team_refuse(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Nothing to do until a message comes: sleep a moment. */
void team_rest(void);

/* Of ranks 1 and up, the one that wants most lines; 0: nobody wants any. */
int team_hungriest(const struct team *t);

/* Add the others' counters to ours. */
void team_add_stats(const struct team *t, struct ferry_batch_stats *own);

#ifdef __cplusplus
}
#endif
#endif
