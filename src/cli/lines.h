/* Lines from the user: edited and remembered on a terminal, read plainly elsewhere. */
#ifndef FERRY_CLI_LINES_H
#define FERRY_CLI_LINES_H

#include <stdbool.h>

#include "src/cli/conf.h"
#include "src/cli/text.h"

#ifdef __cplusplus
extern "C" {
#endif

struct lines;

enum lines_got {
    LINES_MESSAGE,   /* a line, or several joined */
    LINES_END,       /* no more input */
    LINES_CLEARED,   /* Ctrl-C (stop.h): what was typed is dropped */
    LINES_INTERRUPT, /* Ctrl-C with nothing typed */
};

/* The editor takes over stdin and stdout if both are a terminal; its history is STATE/ferry/history. ERR_NOMEM. */
int lines_open(const struct conf *conf, struct lines **out);
void lines_close(struct lines *l); /* saves the history; takes NULL */

bool lines_is_terminal(const struct lines *l);

/* The next message, without its last newline: a line; lines joined where one ends in a backslash; or all between two """.
 * ERR_NOMEM, ERR_IO. */
int lines_read(struct lines *l, struct text *out, enum lines_got *got);

#ifdef __cplusplus
}
#endif
#endif
