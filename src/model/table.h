/* Names to the items that bear them. The items are an array of structs whose first member is `const char *name`; it
 * stays where it is as long as the table is used. Read-only once made: any thread. */
#ifndef FERRY_MODEL_TABLE_H
#define FERRY_MODEL_TABLE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Open addressing, at most half full. All zeros is a table that has nothing to free. */
struct table {
    uint32_t *slots; /* own: index + 1, 0 empty; (mask + 1) */
    uint64_t mask;
    const void *items; /* view */
    size_t item_bytes;
};

/* Fill t with n items (below 2^31). *twice: some name that is there twice, of which the table holds the first; NULL if
 * none. ERR_NOMEM. */
int table_init(struct table *t, const void *items, uint64_t n, size_t item_bytes, const char **twice);
void table_done(struct table *t);

/* The item with that name; NULL if none. */
const void *table_find(const struct table *t, const char *name);

#ifdef __cplusplus
}
#endif
#endif
