/* Strings to numbers, and the arena that keeps the strings of a tokenizer. */
#include "src/model/tok_in.h"

#include <string.h>

#include "src/base/err.h"

static uint32_t hash(const char *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a, then a mix so that the low bits may be used alone */
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)p[i]) * 0x100000001b3u;
    h ^= h >> 32;
    h *= 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32);
}

static int make_slots(struct tok_map *map, uint64_t n)
{
    map->slot = mem_alloc(n * sizeof *map->slot, MEM_TOK);
    if (!map->slot)
        return err(ERR_NOMEM, "tokenizer: table of %llu slots", (unsigned long long)n);
    memset(map->slot, 0xff, n * sizeof *map->slot);
    map->mask = (uint32_t)(n - 1);
    return 0;
}

int tok_map_init(struct tok_map *map, int64_t n_keys)
{
    uint64_t n = 16;
    while (n < (uint64_t)n_keys * 2)
        n *= 2;
    map->n_used = 0;
    return make_slots(map, n);
}

void tok_map_done(struct tok_map *map)
{
    mem_free(map->slot);
    map->slot = NULL;
}

/* The slot that holds the string, or the empty one where it belongs. At least half of the slots are empty. */
static uint32_t find(const struct tok_map *map, const char *arena, const struct tok_span *key, const char *p, size_t n)
{
    uint32_t at = hash(p, n) & map->mask;
    for (; map->slot[at] >= 0; at = (at + 1) & map->mask) {
        const struct tok_span *k = &key[map->slot[at]];
        if (k->n == n && memcmp(arena + k->off, p, n) == 0)
            break;
    }
    return at;
}

int32_t tok_map_get(const struct tok_map *map, const char *arena, const struct tok_span *key, const char *p, size_t n)
{
    return map->slot[find(map, arena, key, p, n)];
}

/* Twice the slots. */
static int grow(struct tok_map *map, const char *arena, const struct tok_span *key)
{
    int32_t *old = map->slot;
    uint32_t n_old = map->mask + 1;
    int rc = make_slots(map, (uint64_t)n_old * 2);
    if (rc) {
        map->slot = old;
        return rc;
    }
    for (uint32_t i = 0; i < n_old; i++)
        if (old[i] >= 0)
            map->slot[find(map, arena, key, arena + key[old[i]].off, key[old[i]].n)] = old[i];
    mem_free(old);
    return 0;
}

int tok_map_put(struct tok_map *map, const char *arena, const struct tok_span *key, int32_t id)
{
    int rc = map->n_used > map->mask / 2 ? grow(map, arena, key) : 0;
    if (rc)
        return rc;
    int32_t *slot = &map->slot[find(map, arena, key, arena + key[id].off, key[id].n)];
    if (*slot < 0) {
        *slot = id;
        map->n_used++;
    }
    return 0;
}

int tok_map_room(struct tok *tok, uint64_t n)
{
    if (n > UINT32_MAX - tok->arena_bytes)
        return err(ERR_LIMIT, "tokenizer: its strings take over 4 GiB");
    uint64_t cap = tok->arena_cap ? tok->arena_cap : 4096;
    while (cap < tok->arena_bytes + n)
        cap *= 2;
    if (cap == tok->arena_cap)
        return 0;
    char *arena = mem_realloc(tok->arena, cap, MEM_TOK);
    if (!arena)
        return err(ERR_NOMEM, "tokenizer: %llu bytes of strings", (unsigned long long)cap);
    tok->arena = arena;
    tok->arena_cap = cap;
    return 0;
}

int tok_map_keep(struct tok *tok, const char *p, size_t n, struct tok_span *out)
{
    int rc = tok_map_room(tok, n);
    if (rc)
        return rc;
    if (n)
        memcpy(tok->arena + tok->arena_bytes, p, n);
    *out = (struct tok_span){.off = (uint32_t)tok->arena_bytes, .n = (uint32_t)n};
    tok->arena_bytes += n;
    return 0;
}
