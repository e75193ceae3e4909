/* Owns what an early kernel sees of device memory before it waits: what was there when the last ordinary kernel began, and nothing that
 * kernels have written since. */
#include "tests/emu/emu.h"

#include <stdlib.h>
#include <string.h>

/* MOST_BYTES: with more memory in use than that nothing is kept, for the time that it would take. */
enum { LINE_BYTES = 64, MOST_BYTES = 8 * 1024 * 1024 };

static char *base;         /* where device memory begins */
static char *before, *now; /* own: (bytes) as it was; of lines that are others now, what they are */
static bool *is_other;     /* own: (bytes / LINE_BYTES) */
static size_t bytes, room_bytes;
static bool is_begun;

static void *grown(void *p, size_t n)
{
    p = realloc(p, n);
    if (!p)
        emu_die("no memory for %zu bytes", n);
    return p;
}

void emu_early_keep(void)
{
    base = emu_device_span(&bytes);
    bytes = (bytes + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
    if (bytes > MOST_BYTES)
        bytes = 0;
    if (bytes > room_bytes) {
        before = grown(before, bytes);
        now = grown(now, bytes);
        is_other = grown(is_other, bytes / LINE_BYTES * sizeof *is_other);
        room_bytes = bytes;
    }
    if (bytes)
        memcpy(before, base, bytes);
}

void emu_early_begin(void)
{
    for (size_t line = 0; line < bytes / LINE_BYTES; line++) {
        size_t at = line * LINE_BYTES;
        is_other[line] = memcmp(base + at, before + at, LINE_BYTES) != 0;
        if (!is_other[line])
            continue;
        memcpy(now + at, base + at, LINE_BYTES);
        memcpy(base + at, before + at, LINE_BYTES);
    }
    is_begun = true;
}

bool emu_early_is_begun(void)
{
    return is_begun;
}

void emu_early_end(void)
{
    for (size_t line = 0; line < bytes / LINE_BYTES; line++)
        if (is_other[line])
            memcpy(base + line * LINE_BYTES, now + line * LINE_BYTES, LINE_BYTES);
    is_begun = false;
}

const void *emu_early_source(const void *p)
{
    const char *at = p;

    return is_begun && bytes && at >= base && at < base + bytes ? before + (at - base) : at;
}
