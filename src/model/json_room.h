/* jansson's memory comes from base/mem, so that it is counted (MEM_OTHER), tests can make it run out, and text that is no JSON is not
 * mixed up with text for which there was no memory: jansson says the same of both. */
#ifndef FERRY_MODEL_JSON_ROOM_H
#define FERRY_MODEL_JSON_ROOM_H

#include <jansson.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Before the first use of jansson in the process. */
void json_room_begin(void);

/* Parse text (n_bytes) with flags as json_loadb has them; *out: the caller's. ERR_FORMAT says what is wrong and where; ERR_NOMEM.
 * Any thread. */
int json_room_parse(const char *text, size_t n_bytes, size_t flags, json_t **out);

#ifdef __cplusplus
}
#endif
#endif
