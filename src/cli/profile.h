/* What `ferry probe` measured, kept in the user's cache folder between runs. */
#ifndef FERRY_CLI_PROFILE_H
#define FERRY_CLI_PROFILE_H

#include "src/cli/conf.h"
#include "src/plan/machine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* This machine as it is now: sizes and cores found, the kernels it can run, no rates. Codes of machine_find(). */
int profile_find(struct machine *m);

/* Where it is: caller frees with mem_free; NULL when nothing was saved. ERR_NOMEM. */
int profile_path(const struct conf *conf, char **out);

/* Rates that were saved for this very machine (same identity) into m, those of the disk that `model` lies on among them; m stays
 * as it is where nothing was saved. ERR_IO, ERR_FORMAT for a profile that is there and cannot be read. */
int profile_load(const struct conf *conf, const char *model, struct machine *m);

/* Save, replacing what was there at once. *path: caller frees with mem_free. ERR_IO, ERR_NOMEM, ERR_STATE when the environment
 * names no cache folder. */
int profile_save(const struct conf *conf, const struct machine *m, char **path);

/* Write a whole file by way of a temporary one beside it. ERR_IO. */
int profile_write(const char *path, const char *text);

#ifdef __cplusplus
}
#endif
#endif
