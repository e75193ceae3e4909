/* One run of ferry batch: lines that become requests, and answers that become records. Whose lines they are, and where records go,
 * differs between rank 0 (or the one process there is) and other ranks (batch_rank.h). */
#ifndef FERRY_CLI_BATCH_RUN_H
#define FERRY_CLI_BATCH_RUN_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "src/cli/batch_in.h"
#include "src/cli/batch_line.h"
#include "src/cli/batch_out.h"
#include "src/cli/conf.h"
#include "src/cli/grammars.h"
#include "src/cli/team.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A line of which answers are on their way. */
struct batch_group {
    struct batch_line line; /* own */
    unsigned n_left, n_submitted;
    json_t *choices; /* own: of the OpenAI form, by index */
    uint64_t n_prompt, n_completion;
    int failed; /* code of an answer that failed */
    char error[256];
};

struct batch_pending {
    uint64_t id; /* 0: free */
    struct batch_group *group;
    unsigned index;
};

/* A line that rank 0 has given away: kept by both sides until it is begun, or answered. */
struct batch_given {
    struct batch_given *next; /* own */
    uint64_t number, there;
    size_t n_bytes;
    char text[];
};

/* First come, first taken. */
struct batch_queue {
    struct batch_given *first, **end; /* own; end: where the next one is linked, if there is a first */
    uint64_t n;
};

struct batch_run {
    const struct conf *conf;     /* view */
    struct team team;            /* own */
    struct ferry_engine *engine; /* own, as all below */
    struct ferry_batch *batch;
    struct ferry_info info;
    struct batch_in in;
    struct batch_out out;
    json_t *about; /* what answers depend on: see batch_out_open */
    struct text line;
    struct grammars grammars;
    struct grammars_wish wish; /* what the options want of answers: view of grammar_text */
    struct text grammar_text;
    struct batch_pending *pending; /* (n_pending) */
    char *profile;                 /* path of what ferry probe saved; NULL: nothing */
    size_t n_pending, n_flying;
    bool no_more;     /* the input is at its end */
    uint64_t there;   /* of the line that is being taken: its records that are there already */
    uint32_t seq_tok; /* positions that a sequence is expected to take */
    /* Rank 0: what each rank (n_ranks) has been given and not answered, and what nobody will answer who had it */
    struct batch_queue *held, again;
    /* Of a rank that is given its lines */
    struct batch_queue given;
    uint64_t n_asked;
    bool is_orderly;                  /* stopped or not, everything that the ranks have to say to each other is said */
    uint64_t n_read, n_expected;      /* lines read; records that they give */
    uint64_t n_had;                   /* records of earlier runs */
    uint64_t n_failed;                /* records that say why there is no answer */
    struct timespec start, last_json; /* of the work, the model loaded */
    struct term_progress progress;
};

/* Look at a line that was read, or is taken again; run->there says which of its records are there. One that is bad gets its records of
 * error here. *g: own, NULL when nothing is left to do for it. ERR_NOMEM, ERR_IO. */
int batch_run_open_line(struct batch_run *r, const char *text, size_t n_bytes, uint64_t number, struct batch_group **g);

/* Submit what a line asks; takes the group. Needs batch_run_has_room(). ERR_NOMEM, ERR_IO. */
int batch_run_begin_line(struct batch_run *r, struct batch_group *g);

/* Is there room for all that one line may ask? */
bool batch_run_has_room(const struct batch_run *r);

/* Run a step and write the record of an answer, if one is finished. Codes of ferry_batch_poll; ERR_NOMEM, ERR_IO. */
int batch_run_poll(struct batch_run *r);

/* What waits is dropped; what runs is finished. */
void batch_run_drop_waiting(struct batch_run *r);

/* Drop what was submitted of a group; the group stays. */
void batch_run_withdraw(struct batch_run *r, struct batch_group *g);
void batch_run_free_group(struct batch_group *g); /* takes NULL */

/* A message of this rank to rank 0, with its counters. As team_send. */
int batch_run_tell(struct batch_run *r, struct team_head *head, const char *text, size_t n_bytes);

#ifdef __cplusplus
}
#endif
#endif
