/* What happened when: a timeline of the last steps in a ring of fixed size, and the experts that every step wanted. All memory
 * is taken when it is opened; a step only writes to it. A NULL trace takes everything and keeps nothing, so that those who
 * report need not ask. Exec thread. */
#ifndef FERRY_RUN_TRACE_H
#define FERRY_RUN_TRACE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum trace_what {
    TRACE_STEP,    /* a whole step; id: its rows */
    TRACE_DENSE,   /* what lies between two layers' experts, and those that a GPU looks up; layer: the first of it */
    TRACE_EXPERTS, /* experts computed together; id: how many */
    TRACE_WAIT,    /* nothing to compute until a read ends */
    TRACE_DOWN,    /* waiting for a GPU, and for what comes down from it then; id: rows */
    TRACE_UP,      /* queueing what goes up to it; id: rows */
    TRACE_BACK, /* before a step: queueing KV pages that come back to the GPU, and waiting for a segment's last; id: how many */
    TRACE_MOVE,  /* within DOWN: staging what moves to it; id: pieces, and looks whether all have come */
    TRACE_READ,  /* an expert on its way; id: which */
    TRACE_AHEAD, /* the same, because of a hint */
};

struct trace_event {
    enum trace_what what;
    int32_t layer, id;
    uint64_t begin_ns, end_ns, bytes;
};

struct trace_args {
    uint32_t n_events; /* the last so many are kept; 0: no timeline */
    uint32_t n_ids;    /* room for so many ids of wanted experts, and two more numbers a loan; 0: none are kept */
};

struct trace;

/* Memory that it takes. */
uint64_t trace_bytes(const struct trace_args *args);

/* ERR_NOMEM. */
int trace_open(const struct trace_args *args, struct trace **out);
void trace_close(struct trace *t); /* takes NULL */

bool trace_has_timeline(const struct trace *t); /* false for NULL */

void trace_add(struct trace *t, const struct trace_event *e);

/* A step of n_rows begins; a loan of it wants these experts. */
void trace_step(struct trace *t, int n_rows);
bool trace_has_wanted(const struct trace *t); /* does it keep them? false for NULL */
void trace_wanted(struct trace *t, int layer, const int32_t *ids, int n);

/* The timeline as Chrome's trace events (chrome://tracing and Perfetto open it): compute and waiting on one track, the reads in
 * flight on others. ERR_IO. */
int trace_write(const struct trace *t, const char *path);

/* The wanted experts as text: a line "step ROWS" before each step's loans, a line "LAYER ID ID..." for each loan; at the end
 * "full" if room ran out. tools/replay reads it. ERR_IO. */
int trace_write_wanted(const struct trace *t, const char *path);

#ifdef __cplusplus
}
#endif
#endif
