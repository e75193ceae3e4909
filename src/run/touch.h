/* Fresh memory is given by the system page by page when it is first written, and cleared; that costs the reading thread as
 * much time as the disk takes, where a virtual machine has to be given the pages, too. So a thread of the lowest priority
 * touches it beforehand, in the time that cores are idle, waiting for the disk. */
#ifndef FERRY_RUN_TOUCH_H
#define FERRY_RUN_TOUCH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct touch;

/* Begin to touch memory (page-aligned, a view until touch_stop) from its start on. What is in it, and what is written to it
 * meanwhile, stays as it is. *out may come out NULL, where the system cannot do it: nothing is the worse for it but time.
 * ERR_NOMEM. */
int touch_start(void *memory, uint64_t bytes, struct touch **out);

/* End it, done or not. Takes NULL. */
void touch_stop(struct touch *t);

#ifdef __cplusplus
}
#endif
#endif
