/* Ranks of a run of several processes: rank 0 gives out lines and takes records in; the others ask and answer. */
#ifndef FERRY_CLI_BATCH_RANK_H
#define FERRY_CLI_BATCH_RANK_H

#include <stdbool.h>

#include "src/cli/batch_run.h"

#ifdef __cplusplus
extern "C" {
#endif

/* All: codes of team_send and team_receive; ERR_STATE for a message that makes no sense. Rank 0, alone or not: */

/* Room for what each rank will have been given and not answered. ERR_NOMEM. */
int batch_rank_make_held(struct batch_run *r);
void batch_rank_drop_held(struct batch_run *r); /* with what is in there, and what waits to be answered again */

/* Before the model is loaded: what the others cannot know of the input. ERR_NOMEM. */
int batch_rank_say_hello(struct batch_run *r);

/* Let rank `to` answer a line. */
int batch_rank_give_line(struct batch_run *r, int to, uint64_t number, const char *text, size_t n_bytes);

/* Take all messages. A rank that is lost leaves its lines to be answered again. ERR_STATE: another rank has another model or options;
 * ERR_IO: the output. */
int batch_rank_hear_others(struct batch_run *r);

/* A line of a rank that is lost, or NULL; own: ferry_free(). */
struct batch_given *batch_rank_next_again(struct batch_run *r);

/* The input is at its end, or (stopping) nothing more shall begin: who still wants lines is given those that wait here, and whoever
 * cannot get any more is told. */
int batch_rank_share(struct batch_run *r, bool stopping);
bool batch_rank_are_others_gone(const struct batch_run *r);
bool batch_rank_was_other_stopped(const struct batch_run *r);

/* The others: */

/* Wait for rank 0's; then load the model, and say so. */
int batch_rank_wait_for_hello(struct batch_run *r);
int batch_rank_say_ready(struct batch_run *r);

/* Take all messages; no_more: the end was among them. */
int batch_rank_hear_first(struct batch_run *r);

/* Begin what was given while there is room, and ask for more in good time. ERR_NOMEM. */
int batch_rank_take_given(struct batch_run *r);
void batch_rank_drop_given(struct batch_run *r);

#ifdef __cplusplus
}
#endif
#endif
