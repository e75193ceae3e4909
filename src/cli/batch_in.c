/* Owns the lines of a batch's input: where they are, how many, and the hash by which a changed input is noticed. */
#include "src/cli/batch_in.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK_BYTES ((size_t)64 << 10)
#define MAX_LINE_BYTES ((size_t)256 << 20)

void *batch_in_zalloc(size_t n, size_t item_bytes, const char *what)
{
    void *p = mem_zalloc(n, item_bytes, MEM_OTHER);

    if (!p)
        err(ERR_NOMEM, "%s: %zu x %zu bytes", what, n, item_bytes);
    return p;
}

/* ---- lines ---- */

static int read_failed(const struct batch_in *in)
{
    return err(ERR_IO, "%s: %s", in->path, errno ? strerror(errno) : "cannot be read");
}

/* stdin can be read once, and is gone through twice. */
static FILE *copy_stdin(char *block)
{
    FILE *copy = tmpfile();

    for (size_t n; copy && (n = fread(block, 1, BLOCK_BYTES, stdin)) > 0;)
        if (fwrite(block, 1, n, copy) != n) {
            fclose(copy);
            return NULL;
        }
    if (copy && (ferror(stdin) || fflush(copy))) {
        fclose(copy);
        return NULL;
    }
    return copy;
}

static int fill(struct batch_in *in)
{
    errno = 0;
    in->at_block = 0;
    in->n_block = fread(in->block, 1, BLOCK_BYTES, in->f);
    return ferror(in->f) ? read_failed(in) : 0;
}

static int rewind_to_start(struct batch_in *in)
{
    errno = 0;
    if (fseeko(in->f, 0, SEEK_SET))
        return read_failed(in);
    in->number = 0;
    in->n_block = in->at_block = 0;
    return 0;
}

static bool is_blank(const struct text *t)
{
    for (size_t i = 0; i < t->n_bytes; i++)
        if (!strchr(" \t\r", t->p[i]) || !t->p[i])
            return false;
    return true;
}

/* One line without its end. *more false: there was nothing but the end of the file. */
static int read_line(struct batch_in *in, struct text *line, bool *more)
{
    *more = false;
    text_clear(line);
    for (;;) {
        if (in->at_block == in->n_block) {
            int rc = fill(in);
            if (rc || !in->n_block) {
                in->number += *more;
                return rc;
            }
        }
        *more = true;
        const char *p = in->block + in->at_block;
        size_t left = in->n_block - in->at_block;
        const char *end = memchr(p, '\n', left);
        size_t n = end ? (size_t)(end - p) : left;
        if (line->n_bytes + n > MAX_LINE_BYTES)
            return err(ERR_LIMIT, "%s: line %" PRIu64 " has more than %zu bytes", in->path, in->number + 1,
                       MAX_LINE_BYTES);
        int rc = text_add(line, p, n);
        if (rc)
            return rc;
        in->at_block += n + (end != NULL);
        if (end) {
            in->number++;
            return 0;
        }
    }
}

int batch_in_next(struct batch_in *in, struct text *line, bool *more)
{
    int rc;

    do
        rc = read_line(in, line, more);
    while (!rc && *more && is_blank(line));
    return rc;
}

static void hash_bytes(struct batch_in *in, const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        in->hash = (in->hash ^ (unsigned char)p[i]) * UINT64_C(0x100000001b3);
}

static int count(struct batch_in *in)
{
    struct text line = {0};
    bool more = true;
    int rc = rewind_to_start(in);

    in->hash = UINT64_C(0xcbf29ce484222325);
    while (!rc && more) {
        rc = read_line(in, &line, &more);
        if (rc || !more)
            break;
        hash_bytes(in, text_str(&line), line.n_bytes);
        hash_bytes(in, "\n", 1);
        in->n_bytes += line.n_bytes + 1;
        in->n_requests += !is_blank(&line);
    }
    in->n_lines = in->number;
    text_done(&line);
    return rc ? rc : rewind_to_start(in);
}

int batch_in_open(struct batch_in *in, const char *path)
{
    bool is_stdin = !strcmp(path, "-");

    *in = (struct batch_in){.path = is_stdin ? "stdin" : path};
    in->block = mem_alloc(BLOCK_BYTES, MEM_OTHER);
    if (!in->block)
        return err(ERR_NOMEM, "reading %s", in->path);
    errno = 0;
    in->f = is_stdin ? copy_stdin(in->block) : fopen(path, "rbe");
    return in->f ? count(in) : read_failed(in);
}

void batch_in_close(struct batch_in *in)
{
    if (in->f)
        fclose(in->f);
    mem_free(in->block);
    *in = (struct batch_in){0};
}
