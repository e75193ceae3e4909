/* Ctrl-C (SIGINT) and SIGTERM: what runs is asked to stop, and is kept. */
#ifndef FERRY_CLI_STOP_H
#define FERRY_CLI_STOP_H

#include <stdbool.h>

#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

/* From now on a signal sets stop_asked() and cancels the session of stop_watch(). Three in a row end the program at once: a
 * disk that hangs must not hold its user. One pair at a time; stop_end puts back what was there. Main thread. */
void stop_begin(void);
void stop_end(void);

/* The session that a signal cancels; NULL: none. */
void stop_watch(struct ferry_session *session);

/* The batch whose step the second signal, or a SIGTERM, cancels: after the first, what runs may be finished. NULL: none. */
void stop_watch_batch(struct ferry_batch *batch);

bool stop_asked(void);
/* SIGTERM came: not only this answer, the program shall end. */
bool stop_for_good(void);
void stop_clear(void); /* forgets SIGINT only */

#ifdef __cplusplus
}
#endif
#endif
