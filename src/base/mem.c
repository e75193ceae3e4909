/* Owns the counters of live bytes per purpose. A small block carries its size and tag in a header of one cache line in
 * front of it, so that mem_free() needs no arguments and the alignment of 64 holds; mapped memory carries nothing. */
#define _GNU_SOURCE 1
#include "src/base/mem.h"

#include "src/base/size.h"

#include <assert.h>
#include <linux/mempolicy.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ALIGN = 64 };

#define PAGE_BYTES (4 * KIB)
#define HUGE_BYTES (2 * MIB)
/* Larger requests are never meant: the address space of x86-64 and arm64 user processes ends at 2^47 or 2^48. */
#define MAX_BYTES ((uint64_t)1 << 48)

/* Marks a live block, so that a double free or a foreign pointer stops at once. */
#define LIVE_MARK UINT64_C(0x6665727279206d65)

struct block {
    _Alignas(ALIGN) uint64_t mark;
    uint64_t bytes; /* as asked */
    enum mem_tag tag;
};
_Static_assert(sizeof(struct block) == ALIGN, "the header keeps the block behind it aligned");

static struct {
    _Atomic uint64_t live_bytes, peak_bytes;
} counters[MEM_N_TAG];

static _Atomic uint64_t n_calls, fail_at;

static bool is_failing(void)
{
    uint64_t call = atomic_fetch_add_explicit(&n_calls, 1, memory_order_relaxed) + 1;
    return call == atomic_load_explicit(&fail_at, memory_order_relaxed);
}

static void count_add(enum mem_tag tag, uint64_t bytes)
{
    uint64_t live = atomic_fetch_add_explicit(&counters[tag].live_bytes, bytes, memory_order_relaxed) + bytes;
    uint64_t peak = atomic_load_explicit(&counters[tag].peak_bytes, memory_order_relaxed);

    while (live > peak && !atomic_compare_exchange_weak_explicit(&counters[tag].peak_bytes, &peak, live,
                                                                 memory_order_relaxed, memory_order_relaxed))
        ;
}

static void count_sub(enum mem_tag tag, uint64_t bytes)
{
    atomic_fetch_sub_explicit(&counters[tag].live_bytes, bytes, memory_order_relaxed);
}

static struct block *block_of(void *p)
{
    struct block *b = (struct block *)((char *)p - sizeof(struct block));
    assert(b->mark == LIVE_MARK);
    return b;
}

void *mem_alloc(size_t bytes, enum mem_tag tag)
{
    void *raw;

    if (is_failing() || bytes > MAX_BYTES || posix_memalign(&raw, ALIGN, sizeof(struct block) + bytes))
        return NULL;
    struct block *b = raw;
    b->mark = LIVE_MARK;
    b->bytes = bytes;
    b->tag = tag;
    count_add(tag, bytes);
    return b + 1;
}

void *mem_zalloc(size_t n, size_t item_bytes, enum mem_tag tag)
{
    uint64_t bytes;

    if (!size_mul(n, item_bytes, &bytes))
        bytes = UINT64_MAX; /* refused below, and counted as a call like every other */
    void *p = mem_alloc((size_t)bytes, tag);
    if (p)
        memset(p, 0, (size_t)bytes);
    return p;
}

void *mem_realloc(void *p, size_t bytes, enum mem_tag tag)
{
    /* realloc(3) would lose the alignment, so the bytes always move. */
    void *fresh = mem_alloc(bytes, tag);

    if (fresh && p) {
        uint64_t old_bytes = block_of(p)->bytes;
        memcpy(fresh, p, old_bytes < bytes ? (size_t)old_bytes : bytes);
        mem_free(p);
    }
    return fresh;
}

char *mem_strdup(const char *s, enum mem_tag tag)
{
    size_t bytes = strlen(s) + 1;
    char *copy = mem_alloc(bytes, tag);

    if (copy)
        memcpy(copy, s, bytes);
    return copy;
}

void mem_free(void *p)
{
    if (!p)
        return;
    struct block *b = block_of(p);
    count_sub(b->tag, b->bytes);
    b->mark = 0;
    free(b);
}

static uint64_t mapped_bytes(uint64_t bytes)
{
    return bytes ? size_up(bytes, PAGE_BYTES) : PAGE_BYTES;
}

void *mem_map(uint64_t bytes, enum mem_tag tag)
{
    if (is_failing() || bytes > MAX_BYTES)
        return NULL;
    bytes = mapped_bytes(bytes);
    /* The kernel aligns to its small page; what sticks out beside the huge-page boundaries is given back. */
    uint64_t spare = bytes >= HUGE_BYTES ? HUGE_BYTES - PAGE_BYTES : 0;
    char *raw = mmap(NULL, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    if (spare) {
        uint64_t head = size_up((uintptr_t)raw, HUGE_BYTES) - (uintptr_t)raw;
        if (head)
            munmap(raw, head);
        if (spare - head)
            munmap(raw + head + bytes, spare - head);
        raw += head;
        madvise(raw, bytes, MADV_HUGEPAGE); /* a wish: kernels without huge pages say EINVAL */
    }
    count_add(tag, bytes);
    return raw;
}

void mem_unmap(void *p, uint64_t bytes, enum mem_tag tag)
{
    if (!p)
        return;
    bytes = mapped_bytes(bytes);
    munmap(p, bytes);
    count_sub(tag, bytes);
}

bool mem_place(void *p, uint64_t bytes, enum mem_spread spread, uint64_t nodes)
{
    const unsigned long mask[] = {nodes, 0}; /* the kernel takes one bit less than it is told of */

    return syscall(SYS_mbind, p, mapped_bytes(bytes), spread == MEM_BOUND ? MPOL_BIND : MPOL_INTERLEAVE, mask,
                   8 * sizeof nodes + 1, 0) == 0;
}

uint64_t mem_live_bytes(enum mem_tag tag)
{
    return atomic_load_explicit(&counters[tag].live_bytes, memory_order_relaxed);
}

uint64_t mem_peak_bytes(enum mem_tag tag)
{
    return atomic_load_explicit(&counters[tag].peak_bytes, memory_order_relaxed);
}

const char *mem_tag_name(enum mem_tag tag)
{
    static const char *const names[MEM_N_TAG] = {
        [MEM_META] = "meta",   [MEM_WEIGHTS] = "weights", [MEM_KV] = "kv",       [MEM_SCRATCH] = "scratch",
        [MEM_STAGE] = "stage", [MEM_TOK] = "tok",         [MEM_OTHER] = "other",
    };
    return names[tag];
}

void mem_fail_nth(uint64_t n)
{
    atomic_store(&n_calls, 0);
    atomic_store(&fail_at, n);
}

uint64_t mem_n_calls(void)
{
    return atomic_load(&n_calls);
}
