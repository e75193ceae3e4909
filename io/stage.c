/* Owns the slots' memory and hold counts. Filling them is the ring's, emptying the store's. */
#include "io/stage.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <assert.h>
#include <inttypes.h>
#include <stdatomic.h>

struct stage {
    const struct stage_alloc *alloc; /* view */
    void *raw;                       /* own, through alloc */
    uint64_t raw_bytes, slot_bytes;
    char *base; /* view: the first aligned byte of raw */
    int n_slots;
    _Atomic int n_holds[]; /* (n_slots) */
};

static void *plain_alloc(void *ctx, uint64_t bytes)
{
    (void)ctx;
    return mem_map(bytes, MEM_STAGE);
}

static void plain_free(void *ctx, void *p, uint64_t bytes)
{
    (void)ctx;
    mem_unmap(p, bytes, MEM_STAGE);
}

const struct stage_alloc stage_plain = {.alloc = plain_alloc, .free = plain_free};

uint64_t stage_bytes(int n_slots, uint64_t slot_bytes)
{
    uint64_t bytes;

    /* One more page than the slots: the allocator may give any alignment. */
    if (!size_align(slot_bytes, STAGE_ALIGN, &bytes) || !size_mul(bytes, (uint64_t)n_slots, &bytes) ||
        !size_add(bytes, STAGE_ALIGN, &bytes))
        return 0;
    return bytes;
}

int stage_open(const struct stage_alloc *alloc, int n_slots, uint64_t slot_bytes, struct stage **out)
{
    *out = NULL;
    if (n_slots < 1 || !slot_bytes)
        return err(ERR_ARG, "stage of %d slots of %" PRIu64 " bytes", n_slots, slot_bytes);
    uint64_t bytes = stage_bytes(n_slots, slot_bytes);
    if (!bytes)
        return err(ERR_LIMIT, "stage of %d slots of %" PRIu64 " bytes is larger than 2^64", n_slots, slot_bytes);
    struct stage *s = mem_zalloc(1, sizeof *s + (size_t)n_slots * sizeof s->n_holds[0], MEM_META);
    if (!s)
        return err(ERR_NOMEM, "stage: table of %d slots", n_slots);
    s->alloc = alloc ? alloc : &stage_plain;
    s->raw = s->alloc->alloc(s->alloc->ctx, bytes);
    if (!s->raw) {
        mem_free(s);
        return err(ERR_NOMEM, "stage: %d slots of %" PRIu64 " bytes", n_slots, slot_bytes);
    }
    s->raw_bytes = bytes;
    s->slot_bytes = size_up(slot_bytes, STAGE_ALIGN);
    s->base = (char *)s->raw + (size_up((uintptr_t)s->raw, STAGE_ALIGN) - (uintptr_t)s->raw);
    s->n_slots = n_slots;
    *out = s;
    return 0;
}

void stage_close(struct stage *s)
{
    if (!s)
        return;
    assert(stage_n_free(s) == s->n_slots);
    s->alloc->free(s->alloc->ctx, s->raw, s->raw_bytes);
    mem_free(s);
}

int stage_take(struct stage *s)
{
    for (int slot = 0; slot < s->n_slots; slot++) {
        int none = 0;
        if (atomic_compare_exchange_strong_explicit(&s->n_holds[slot], &none, 1, memory_order_acquire,
                                                    memory_order_relaxed))
            return slot;
    }
    return -1;
}

void stage_hold(struct stage *s, int slot)
{
    int before = atomic_fetch_add_explicit(&s->n_holds[slot], 1, memory_order_relaxed);
    assert(before > 0);
    (void)before;
}

void stage_release(struct stage *s, int slot)
{
    /* Release pairs with the acquire in stage_take: the next owner sees no late access of this one. */
    int before = atomic_fetch_sub_explicit(&s->n_holds[slot], 1, memory_order_acq_rel);
    assert(before > 0);
    (void)before;
}

void *stage_slot(const struct stage *s, int slot)
{
    assert(slot >= 0 && slot < s->n_slots);
    return s->base + (uint64_t)slot * s->slot_bytes;
}

int stage_n_free(const struct stage *s)
{
    int n_free = 0;

    for (int slot = 0; slot < s->n_slots; slot++)
        n_free += !atomic_load_explicit(&s->n_holds[slot], memory_order_relaxed);
    return n_free;
}

void *stage_base(const struct stage *s)
{
    return s->base;
}
