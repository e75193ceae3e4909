/* What people see on stderr: messages, and the progress of long work. */
#ifndef FERRY_CLI_TERM_H
#define FERRY_CLI_TERM_H

#include <stdbool.h>
#include <stdint.h>

#include "src/cli/conf.h"

#ifdef __cplusplus
extern "C" {
#endif

/* "ferry: text" for an error code, then the exit status: 130 for ERR_CANCEL, else 1. */
int term_fail(int code);

/* The same for wrong usage that the table cannot see; 2. */
int term_usage(const struct conf *conf, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* A line that is rewritten in place on a terminal, and a plain line every few seconds elsewhere. Quiet, or done within half a
 * second: nothing is shown. */
struct term_progress {
    const char *what; /* view: "loading", "reading the prompt" */
    const char *unit; /* view: "tokens"; NULL: bytes */
    bool quiet, shown;
    uint64_t start_ns, last_ns;
};

void term_progress_begin(struct term_progress *p, const struct conf *conf, const char *what, const char *unit);
void term_progress_at(struct term_progress *p, uint64_t done, uint64_t total);
void term_progress_text(struct term_progress *p, const char *text); /* the same, with words of one's own */
void term_progress_end(struct term_progress *p);                    /* wipes the line */

#ifdef __cplusplus
}
#endif
#endif
