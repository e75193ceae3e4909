/* Owns the slots of name tables. */
#include "src/model/table.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <inttypes.h>
#include <string.h>

static const char *table_name(const struct table *t, uint64_t i)
{
    return *(const char *const *)((const char *)t->items + i * t->item_bytes);
}

static uint64_t table_hash(const char *name)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325); /* FNV-1a */

    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * UINT64_C(0x100000001b3);
    return h ^ h >> 32; /* the mask looks at low bits only */
}

/* The slot of name, or the empty one where it belongs. */
static uint32_t *table_slot(const struct table *t, const char *name)
{
    uint64_t i = table_hash(name) & t->mask;

    while (t->slots[i] && strcmp(table_name(t, t->slots[i] - 1), name) != 0)
        i = (i + 1) & t->mask;
    return &t->slots[i];
}

int table_init(struct table *t, const void *items, uint64_t n, size_t item_bytes, const char **twice)
{
    uint64_t n_slots = 16;

    while (n_slots < 2 * n)
        n_slots *= 2;
    t->slots = mem_zalloc((size_t)n_slots, sizeof t->slots[0], MEM_META);
    if (!t->slots)
        return err(ERR_NOMEM, "a table of %" PRIu64 " names", n);
    t->mask = n_slots - 1;
    t->items = items;
    t->item_bytes = item_bytes;
    *twice = NULL;
    for (uint64_t i = 0; i < n; i++) {
        uint32_t *slot = table_slot(t, table_name(t, i));
        if (*slot)
            *twice = table_name(t, i);
        else
            *slot = (uint32_t)i + 1;
    }
    return 0;
}

void table_done(struct table *t)
{
    mem_free(t->slots);
    *t = (struct table){0};
}

const void *table_find(const struct table *t, const char *name)
{
    uint32_t slot = *table_slot(t, name);

    return slot ? (const char *)t->items + (slot - 1) * t->item_bytes : NULL;
}
