/* Owns the records of recurrent layers. A sequence has the one that its length belongs to, while positions are reserved one that the step
 * writes to, and the one of its mark. No step writes to what it reads: so a step that failed needs nothing taken back, and sequences that
 * are equal so far, or a mark, share a record without a copy. */
#include "src/run/cache_in.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <assert.h>
#include <inttypes.h>

/* As cache.c rounds its pools. */
#define MAP_BYTES (4 * KIB)

static uint64_t bytes_of(int64_t n, uint64_t record_bytes)
{
    uint64_t bytes;

    return size_mul((uint64_t)n, record_bytes, &bytes) && size_align(bytes, MAP_BYTES, &bytes) ? bytes : UINT64_MAX;
}

uint64_t cache_record_bytes(const struct cache_args *args)
{
    return bytes_of(model_kv_records(args->n_seq, args->pool_tok > 0), args->shape->record_bytes);
}

uint64_t cache_record_host_bytes(const struct cache_args *args)
{
    return bytes_of(model_kv_records(args->n_seq, args->pool_tok > 0), args->shape->host_record_bytes);
}

int cache_record_init(struct cache *c, const struct cache_args *args)
{
    struct cache_records *r = &c->records;

    r->bytes[CACHE_NEAR] = args->shape->record_bytes;
    r->bytes[CACHE_FAR] = args->shape->host_record_bytes;
    if (!r->bytes[CACHE_NEAR] && !r->bytes[CACHE_FAR])
        return 0;
    r->n = (int32_t)model_kv_records(args->n_seq, args->pool_tok > 0);
    r->n_ref = mem_zalloc(2 * (size_t)r->n, sizeof *r->n_ref, MEM_META);
    if (!r->n_ref)
        return ERR_NOMEM;
    r->free_record = r->n_ref + r->n;
    for (r->n_free = 0; r->n_free < r->n; r->n_free++)
        r->free_record[r->n_free] = r->n - 1 - r->n_free; /* the first is on top */
    for (int side = 0; side < CACHE_N_SIDES; side++)
        r->memory[side] = r->bytes[side] ? c->memory[side] + c->bytes[side] : NULL;
    return 0;
}

void cache_record_done(struct cache *c)
{
    mem_free(c->records.n_ref);
}

static void drop(struct cache_seq *s, enum cache_record which)
{
    struct cache_records *r = &s->c->records;
    int32_t i = s->record[which];

    s->record[which] = CACHE_NO_RECORD;
    if (i != CACHE_NO_RECORD && --r->n_ref[i] == 0)
        r->free_record[r->n_free++] = i;
}

static void share(const struct cache_seq *from, enum cache_record which, struct cache_seq *s, enum cache_record to)
{
    int32_t i = from->record[which];

    if (i != CACHE_NO_RECORD)
        s->c->records.n_ref[i]++;
    drop(s, to);
    s->record[to] = i;
}

void cache_record_begin(struct cache_seq *s)
{
    for (int which = 0; which < CACHE_N_RECORDS; which++)
        s->record[which] = CACHE_NO_RECORD;
}

void cache_record_end(struct cache_seq *s)
{
    for (int which = 0; which < CACHE_N_RECORDS; which++)
        drop(s, (enum cache_record)which);
}

bool cache_record_has_room(const struct cache_seq *s)
{
    return s->c->records.n == 0 || s->record[CACHE_NEXT] != CACHE_NO_RECORD || s->c->records.n_free > 0;
}

void cache_record_reserve(struct cache_seq *s)
{
    struct cache_records *r = &s->c->records;

    if (r->n == 0 || s->record[CACHE_NEXT] != CACHE_NO_RECORD)
        return;
    assert(r->n_free > 0);
    int32_t i = r->free_record[--r->n_free];
    r->n_ref[i] = 1;
    s->record[CACHE_NEXT] = i;
}

void cache_record_commit(struct cache_seq *s, bool counts)
{
    if (counts)
        share(s, CACHE_NEXT, s, CACHE_NOW);
    drop(s, CACHE_NEXT);
}

void cache_record_mark(struct cache_seq *s)
{
    share(s, CACHE_NOW, s, CACHE_MARKED);
}

void cache_record_unmark(struct cache_seq *s)
{
    drop(s, CACHE_MARKED);
}

void cache_record_go_back(struct cache_seq *s, int64_t n)
{
    drop(s, CACHE_NEXT);
    if (n == 0)
        drop(s, CACHE_NOW);
    else if (n < s->len)
        share(s, CACHE_MARKED, s, CACHE_NOW);
}

void cache_record_fork(const struct cache_seq *s, struct cache_seq *copy)
{
    share(s, CACHE_NOW, copy, CACHE_NOW);
}

static char *place(const struct cache_seq *s, enum cache_record which, enum cache_side side)
{
    const struct cache_records *r = &s->c->records;
    int32_t i = s->record[which];

    return i == CACHE_NO_RECORD || !r->memory[side] ? NULL : r->memory[side] + (uint64_t)i * r->bytes[side];
}

void cache_record_view(const struct cache_seq *s, enum cache_side side, struct kv_seq *out)
{
    out->record = place(s, CACHE_NOW, side);
    out->next_record = place(s, CACHE_NEXT, side);
}
