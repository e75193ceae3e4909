/* Bytes that grow, and whole files as such. */
#ifndef FERRY_CLI_TEXT_H
#define FERRY_CLI_TEXT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct text {
    char *p; /* own: n_bytes and a NUL; NULL while empty and fresh */
    size_t n_bytes, cap_bytes;
};

/* Append; on failure the text is as before. ERR_NOMEM. */
int text_add(struct text *t, const void *bytes, size_t n_bytes);
/* Make it n_bytes long, whatever they are; what was there is lost. ERR_NOMEM. */
int text_resize(struct text *t, size_t n_bytes);
void text_clear(struct text *t); /* empty, memory kept */
void text_done(struct text *t);

/* As a C string: "" when empty. View until the next change. */
const char *text_str(const struct text *t);

/* Append all of a file; "-" is stdin. ERR_IO, ERR_NOMEM, ERR_LIMIT (over max_bytes). */
int text_read(struct text *t, const char *path, uint64_t max_bytes);

/* ERR_FORMAT, with `what` and the place, if the text holds a zero byte: messages end there. */
int text_check(const struct text *t, const char *what);

/* n_bytes from p as a terminal may see them: control bytes become '?', newlines spaces. Cut at out_bytes - 1. */
void text_printable(const char *p, size_t n_bytes, char *out, size_t out_bytes);

#ifdef __cplusplus
}
#endif
#endif
