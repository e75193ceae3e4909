/* A conversation as text: what is laid out by the template at every turn. */
#ifndef FERRY_CLI_DIALOG_H
#define FERRY_CLI_DIALOG_H

#include <stddef.h>

#include "src/cli/text.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Turns alternate: the user's are the even ones. */
struct dialog {
    struct text system;             /* empty: none */
    struct text *turns;             /* own: (n), room for cap */
    struct ferry_message *messages; /* own: (cap + 1), made by dialog_messages */
    size_t n, cap;
};

/* Append the next turn. ERR_NOMEM leaves the dialog as it was. */
int dialog_add(struct dialog *d, const char *bytes, size_t n_bytes);
void dialog_keep(struct dialog *d, size_t n); /* forget all but the first n turns */
int dialog_set_system(struct dialog *d, const char *text);

/* System message and turns; views until the next change. ERR_NOMEM. */
int dialog_messages(struct dialog *d, const struct ferry_message **messages, size_t *n);

void dialog_done(struct dialog *d);

#ifdef __cplusplus
}
#endif
#endif
