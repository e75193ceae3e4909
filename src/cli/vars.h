/* Variables for a model's chat template, as options, requests and the chat name them. */
#ifndef FERRY_CLI_VARS_H
#define FERRY_CLI_VARS_H

#include <stddef.h>

#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

#define VARS_MAX 16

/* Zeros: none. */
struct vars {
    struct ferry_var v[VARS_MAX]; /* (n) names and texts: own */
    size_t n;
};

/* Set one, in place of an earlier one of that name; var is copied. ERR_LIMIT past VARS_MAX, ERR_NOMEM. */
int vars_put(struct vars *vars, const struct ferry_var *var);

/* Read "NAME=VALUE": VALUE is true, false, a whole number, or else a text. ERR_ARG; as vars_put. */
int vars_read(struct vars *vars, const char *text);

/* All of from, over those that are there. As vars_put. */
int vars_add(struct vars *vars, const struct vars *from);

void vars_done(struct vars *vars);

/* Options of a prompt with these; view of vars. */
struct ferry_chat_opts vars_opts(const struct vars *vars);

#ifdef __cplusplus
}
#endif
#endif
