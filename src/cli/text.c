/* Growing bytes for the front ends, whose memory is counted like any other. */
#include "src/cli/text.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* Room for n_bytes more and a NUL. */
static int reserve(struct text *t, size_t n_bytes)
{
    size_t need = t->n_bytes + n_bytes + 1;

    if (need < n_bytes)
        return err(ERR_NOMEM, "a text of more than %zu bytes", SIZE_MAX);
    if (need > t->cap_bytes) {
        size_t cap = t->cap_bytes < SIZE_MAX / 2 && need < 2 * t->cap_bytes ? 2 * t->cap_bytes : need;
        char *p = mem_realloc(t->p, cap, MEM_OTHER);
        if (!p)
            return err(ERR_NOMEM, "a text of %zu bytes", cap);
        t->p = p;
        t->cap_bytes = cap;
    }
    return 0;
}

int text_resize(struct text *t, size_t n_bytes)
{
    text_clear(t);
    int rc = reserve(t, n_bytes);
    if (rc)
        return rc;
    t->n_bytes = n_bytes;
    t->p[n_bytes] = '\0';
    return 0;
}

int text_add(struct text *t, const void *bytes, size_t n_bytes)
{
    int rc = reserve(t, n_bytes);

    if (rc)
        return rc;
    if (n_bytes)
        memcpy(t->p + t->n_bytes, bytes, n_bytes);
    t->n_bytes += n_bytes;
    t->p[t->n_bytes] = '\0';
    return 0;
}

void text_clear(struct text *t)
{
    t->n_bytes = 0;
    if (t->p)
        t->p[0] = '\0';
}

void text_done(struct text *t)
{
    mem_free(t->p);
    *t = (struct text){0};
}

const char *text_str(const struct text *t)
{
    return t->p ? t->p : "";
}

int text_read(struct text *t, const char *path, uint64_t max_bytes)
{
    char block[16384];
    bool is_stdin = !strcmp(path, "-");
    FILE *f = is_stdin ? stdin : fopen(path, "rbe");
    int rc = 0;

    if (!f)
        return err(ERR_IO, "%s: %s", path, strerror(errno));
    errno = 0;
    for (size_t n; !rc && (n = fread(block, 1, sizeof block, f)) > 0;) {
        if (t->n_bytes + n > max_bytes)
            rc = err(ERR_LIMIT, "%s: more than %" PRIu64 " bytes", is_stdin ? "stdin" : path, max_bytes);
        else
            rc = text_add(t, block, n);
    }
    if (!rc && ferror(f))
        rc = err(ERR_IO, "%s: %s", is_stdin ? "stdin" : path, errno ? strerror(errno) : "cannot be read");
    if (!is_stdin)
        fclose(f);
    return rc;
}

int text_check(const struct text *t, const char *what)
{
    const char *zero = memchr(text_str(t), 0, t->n_bytes);

    return zero
               ? err(ERR_FORMAT, "%s has a zero byte after %zu of %zu bytes; a message is text (--raw takes any bytes)",
                     what, (size_t)(zero - text_str(t)), t->n_bytes)
               : 0;
}

/* How many of n bytes are whole characters, when the last one may be cut. */
static size_t whole_characters(const char *p, size_t n)
{
    size_t start = n;

    while (start && n - start < 4 && ((unsigned char)p[start - 1] & 0xc0) == 0x80)
        start--;
    if (!start)
        return n;
    unsigned char lead = (unsigned char)p[start - 1];
    size_t want = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    return n - (start - 1) < want ? start - 1 : n;
}

void text_printable(const char *p, size_t n_bytes, char *out, size_t out_bytes)
{
    size_t n = n_bytes < out_bytes - 1 ? n_bytes : whole_characters(p, out_bytes - 1);

    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)p[i];
        out[i] = c == '\n' || c == '\t' ? ' ' : c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    out[n] = '\0';
}
