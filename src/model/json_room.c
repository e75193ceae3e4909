/* Owns the way jansson asks for memory, and the count of what it was refused. */
#include "src/model/json_room.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <stdint.h>

static _Thread_local uint64_t n_refused;

static void *take(size_t bytes)
{
    void *p = mem_alloc(bytes, MEM_OTHER);

    n_refused += !p;
    return p;
}

void json_room_begin(void)
{
    json_set_alloc_funcs(take, mem_free);
}

int json_room_parse(const char *text, size_t n_bytes, size_t flags, json_t **out)
{
    uint64_t n_before = n_refused;
    json_error_t e;

    *out = json_loadb(text, n_bytes, flags, &e);
    if (n_refused != n_before) { /* jansson goes on where a text could not grow, and leaves out a byte of it */
        json_decref(*out);
        *out = NULL;
        return err(ERR_NOMEM, "reading %zu bytes of JSON", n_bytes);
    }
    if (*out)
        return 0;
    if (e.line > 1)
        return err(ERR_FORMAT, "not JSON: %s (line %d, column %d)", e.text, e.line, e.column);
    return err(ERR_FORMAT, "not JSON: %s (byte %d)", e.text, e.position);
}
