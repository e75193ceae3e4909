/* Owns the running of one kernel: fibers for the threads of a block, one block after another, in a seeded order. */
#include "tests/emu/emu.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    MAX_THREADS = 1024,
    WARP = 32,
    STACK_BYTES = 64 * 1024,
    PLAIN_SHARED = 48 * 1024, /* what every card gives a block that does not ask for more */
    MAX_KERNELS = 256,
    MAX_EXCHANGE = 64,
    MAX_ASYNC = 160,
    MAX_BULK = 4096,
    GUARD_BYTES = 64,
    GUARD = 0xa5
};

enum state { READY, AT_BARRIER, AT_WARP, AT_AWAIT, RETURNED };
static const char *const state_names[] = {"is ready", "waits at a barrier", "waits for its warp",
                                          "waits for the kernels before", "has returned"};

struct async {
    void *dst;
    const void *src;
    unsigned bytes;
    int group;
};

/* The copies of a thread that are under way. */
struct copies {
    struct async async[MAX_ASYNC];
    int n, group;
};

struct emu_here emu_here;

/* Of each thread, what switching looks at, close together. A fiber is made once and lives the lives of one thread of each block. */
static void *sps[MAX_THREADS]; /* where its stack ends, while it does not run */
static unsigned char states[MAX_THREADS];
static struct copies copies[MAX_THREADS];
static char (*stacks)[STACK_BYTES]; /* made once, kept */
static int n_fibers;                /* so many are made */
static int current;                 /* the thread that runs */
static int n_threads;               /* of the block that runs */
static bool lands_at_once;          /* copies of the block that runs do, instead of when they are waited for */
static const struct emu_launch *running;
static char shared[EMU_MAX_SHARED + GUARD_BYTES] __attribute__((aligned(128)));

/* What lanes bring to an exchange, by turns in the one and in the other: nobody brings to the next but one before all have been at the
 * next, and so have looked at this. */
static struct exchange {
    char brought[2][WARP * MAX_EXCHANGE] __attribute__((aligned(16)));
    unsigned bytes; /* that each brings */
    int n, turn;    /* so many lanes are there */
} exchanges[MAX_THREADS / WARP];

/* ---- switching ---- */

static void thread_main(void);

#if defined(__x86_64__)

/* Push what a call keeps, swap stacks, pop. */
void emu_grid_switch(void **save_sp, void *load_sp);
__asm__(".text\n"
        ".globl emu_grid_switch\n"
        ".type emu_grid_switch, @function\n"
        "emu_grid_switch:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
        "    ret\n"
        ".size emu_grid_switch, .-emu_grid_switch\n");

static void *scheduler_sp;

static void fiber_make(int t)
{
    /* Tops are shifted against each other, or all of them would meet in the same few sets of the L1 cache. */
    uintptr_t top = ((uintptr_t)stacks[t] + STACK_BYTES - (uintptr_t)(t % 32) * 128) & ~(uintptr_t)15;
    void **sp = (void **)top;
    *--sp = NULL; /* where thread_main would return to: keeps the stack aligned as after a call */
    *--sp = (void *)(uintptr_t)thread_main;
    for (int i = 0; i < 6; i++)
        *--sp = NULL;
    sps[t] = sp;
}

#else

#include <ucontext.h>

static ucontext_t contexts[MAX_THREADS], scheduler_context;
static void *scheduler_sp = &scheduler_context;

static void emu_grid_switch(void **save_sp, void *load_sp)
{
    swapcontext(*save_sp, load_sp);
}

static void fiber_make(int t)
{
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = stacks[t];
    contexts[t].uc_stack.ss_size = STACK_BYTES;
    contexts[t].uc_link = &scheduler_context;
    makecontext(&contexts[t], thread_main, 0);
    sps[t] = &contexts[t];
}

#endif

static struct emu_dim dim_of(unsigned t, struct emu_dim d)
{
    return (struct emu_dim){t % d.x, t / d.x % d.y, t / d.x / d.y};
}

/* Thread t goes on. save_sp: of who runs until now. */
static void go_on(int t, void **save_sp)
{
    bool is_line = running->block.y == 1 && running->block.z == 1;

    current = t;
    emu_here.thread_idx = is_line ? (struct emu_dim){(unsigned)t, 0, 0} : dim_of((unsigned)t, running->block);
    emu_grid_switch(save_sp, sps[t]);
}

/* The thread that runs does not go on: the one behind it does, without a way round by the scheduler, if it can. */
static void leave(enum state state)
{
    int me = current, next = me + 1 < n_threads ? me + 1 : 0;

    states[me] = (unsigned char)state;
    if (states[next] == READY)
        go_on(next, &sps[me]);
    else
        emu_grid_switch(&sps[me], scheduler_sp);
}

static void thread_main(void)
{
    for (;;) {
        struct copies *c = &copies[current];
        c->group = 0;
        running->call(running->closure);
        if (c->n)
            emu_die("%s: a thread returned with copies under way", running->name);
        leave(RETURNED);
    }
}

/* ---- what kernels call ---- */

void emu_barrier(void)
{
    leave(AT_BARRIER);
}

void emu_await(void)
{
    if (emu_early_is_begun())
        leave(AT_AWAIT);
}

/* The last lane that comes goes on at once. */
const void *emu_warp(const void *mine, unsigned bytes)
{
    int me = current, first = me / WARP * WARP;
    struct exchange *x = &exchanges[me / WARP];
    char *brought = x->brought[x->turn];

    if (bytes > MAX_EXCHANGE)
        emu_die("%s: %u bytes in a warp exchange", running->name, bytes);
    if (x->n == 0)
        x->bytes = bytes;
    if (x->bytes != bytes)
        emu_die("%s: lanes of a warp exchange %u and %u bytes", running->name, bytes, x->bytes);
    memcpy(brought + (unsigned)(me - first) * bytes, mine, bytes);
    if (++x->n < WARP) {
        leave(AT_WARP);
        return brought;
    }
    x->n = 0;
    x->turn = !x->turn;
    memset(states + first, READY, WARP);
    return brought;
}

void emu_async_copy(void *dst, const void *src, unsigned bytes)
{
    struct copies *c = &copies[current];

    if (bytes != 4 && bytes != 8 && bytes != 16)
        emu_die("%s: an asynchronous copy of %u bytes", running->name, bytes);
    if ((uintptr_t)dst % bytes || (uintptr_t)src % bytes)
        emu_die("%s: an asynchronous copy of %u bytes that is not aligned to as many", running->name, bytes);
    if (c->n == MAX_ASYNC)
        emu_die("%s: more than %d asynchronous copies of a thread", running->name, MAX_ASYNC);
    c->async[c->n++] = (struct async){dst, emu_early_source(src), bytes, c->group};
    if (lands_at_once)
        memcpy(dst, emu_early_source(src), bytes);
}

void emu_async_commit(void)
{
    copies[current].group++;
}

void emu_async_wait(int n_left)
{
    struct copies *c = &copies[current];
    int n = 0;

    for (int i = 0; i < c->n; i++) {
        struct async a = c->async[i];
        if (a.group >= c->group - n_left)
            c->async[n++] = a;
        else if (!lands_at_once)
            memcpy(a.dst, a.src, a.bytes);
    }
    c->n = n;
}

static struct bulk {
    void *dst;
    const void *src;
    uint32_t bytes;
    const struct emu_landing *landing;
} bulks[MAX_BULK]; /* of the block, under way */
static int n_bulks;

void emu_landing_init(struct emu_landing *l)
{
    *l = (struct emu_landing){.n_uses = 0};
}

void emu_landing_expect(struct emu_landing *l, uint32_t bytes)
{
    if (l->bytes || !bytes)
        emu_die("%s: %u bytes are expected where %u still are", running->name, bytes, l->bytes);
    l->bytes = bytes;
}

void emu_bulk_copy(void *dst, const void *src, uint32_t bytes, struct emu_landing *l)
{
    if ((uintptr_t)dst % 16 || (uintptr_t)src % 16 || bytes % 16 || !bytes)
        emu_die("%s: a bulk copy of %u bytes, or of its addresses, is not a multiple of 16", running->name, bytes);
    if (n_bulks == MAX_BULK)
        emu_die("%s: more than %d bulk copies of a block", running->name, MAX_BULK);
    bulks[n_bulks++] = (struct bulk){dst, emu_early_source(src), bytes, l};
    if (lands_at_once)
        memcpy(dst, emu_early_source(src), bytes);
}

void emu_landing_wait(struct emu_landing *l, uint32_t is_odd)
{
    uint32_t bytes = 0;
    int n = 0;

    if (l->n_uses % 2 != is_odd)
        return; /* over */
    for (int i = 0; i < n_bulks; i++)
        bytes += bulks[i].landing == l ? bulks[i].bytes : 0;
    if (!l->bytes || bytes != l->bytes)
        emu_die("%s: %u bytes are under way where %u are waited for", running->name, bytes, l->bytes);
    for (int i = 0; i < n_bulks; i++) {
        if (bulks[i].landing != l)
            bulks[n++] = bulks[i];
        else if (!lands_at_once)
            memcpy(bulks[i].dst, bulks[i].src, bulks[i].bytes);
    }
    n_bulks = n;
    *l = (struct emu_landing){.n_uses = l->n_uses + 1};
}

/* ---- one block ---- */

static int count(enum state state)
{
    int n = 0;
    for (int t = 0; t < n_threads; t++)
        n += states[t] == state;
    return n;
}

static void stuck(void)
{
    int waits = 0, other = 0;

    while (states[waits] == RETURNED)
        waits++;
    while (other < n_threads - 1 && states[other] == states[waits])
        other++;
    emu_die("%s: block (%u, %u, %u): thread %d %s, but thread %d %s", running->name, emu_here.block_idx.x,
            emu_here.block_idx.y, emu_here.block_idx.z, waits, state_names[states[waits]], other,
            state_names[states[other]]);
}

/* The first thread from t on, all round, that can go on, or -1. */
static int next_ready(int t)
{
    const unsigned char *found = memchr(states + t, READY, (size_t)(n_threads - t));
    if (!found)
        found = memchr(states, READY, (size_t)t);
    return found ? (int)(found - states) : -1;
}

/* Nobody goes on before the kernels ahead have ended: they have. */
static void end_early(void)
{
    emu_early_end();
    for (int t = 0; t < n_threads; t++)
        if (states[t] == AT_AWAIT)
            states[t] = READY;
}

/* Run the threads from meeting to meeting until all have returned. first: who goes first. */
static void block_run(int first)
{
    memset(states, READY, (size_t)n_threads);
    for (int next = first;;) {
        go_on(next, &scheduler_sp);
        next = next_ready(current);
        if (next >= 0)
            continue;
        if (count(AT_AWAIT) && emu_early_is_begun()) {
            end_early();
            next = next_ready(first);
            continue;
        }
        if (count(RETURNED) == n_threads)
            return;
        if (count(AT_BARRIER) != n_threads)
            stuck();
        memset(states, READY, (size_t)n_threads);
        next = first;
    }
}

/* So many there are, at least. */
static void fibers_make(int n)
{
    if (!stacks) {
        stacks = mmap(NULL, sizeof *stacks * MAX_THREADS, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED)
            emu_die("no memory for the stacks of %d threads", MAX_THREADS);
    }
    for (; n_fibers < n; n_fibers++)
        fiber_make(n_fibers);
}

/* Kernels that have asked for more shared memory, and how much. */
static struct {
    const void *kernel;
    size_t bytes;
} allowed[MAX_KERNELS];
static int n_allowed;

void emu_grid_allow(const void *kernel, size_t shared_bytes)
{
    int i = 0;

    while (i < n_allowed && allowed[i].kernel != kernel)
        i++;
    if (i == MAX_KERNELS)
        emu_die("more than %d kernels ask for shared memory", MAX_KERNELS);
    n_allowed += i == n_allowed;
    allowed[i].kernel = kernel;
    allowed[i].bytes = shared_bytes;
}

static size_t most_shared(const void *kernel)
{
    for (int i = 0; i < n_allowed; i++)
        if (allowed[i].kernel == kernel)
            return allowed[i].bytes;
    return PLAIN_SHARED;
}

static void shared_make(size_t bytes)
{
    memset(shared, 0xff, bytes);
    memset(shared + bytes, GUARD, GUARD_BYTES);
}

static void shared_check(size_t bytes)
{
    for (int i = 0; i < GUARD_BYTES; i++)
        if ((unsigned char)shared[bytes + (size_t)i] != GUARD)
            emu_die("%s: wrote past its %zu bytes of shared memory", running->name, bytes);
}

/* ---- the grid ---- */

static unsigned gcd(unsigned a, unsigned b)
{
    return b ? gcd(b, a % b) : a;
}

void emu_grid_run(const struct emu_launch *l)
{
    unsigned n = l->block.x * l->block.y * l->block.z, n_blocks = l->grid.x * l->grid.y * l->grid.z;

    if (n == 0 || n > MAX_THREADS || n % WARP)
        emu_die("%s: %u threads in a block", l->name, n);
    if (l->grid.y > 65535 || l->grid.z > 65535)
        emu_die("%s: a grid of %u x %u x %u", l->name, l->grid.x, l->grid.y, l->grid.z);
    if (l->shared_bytes > most_shared(l->kernel))
        emu_die("%s: %zu bytes of shared memory", l->name, l->shared_bytes);
    fibers_make((int)n);
    n_threads = (int)n;
    running = l;
    if (!l->is_early)
        emu_early_keep();
    emu_here.block_dim = l->block;
    emu_here.grid_dim = l->grid;
    emu_here.shared = shared;
    /* Any step without a common divisor visits all blocks. */
    unsigned step = 1 + emu_random(n_blocks), at = emu_random(n_blocks);
    while (gcd(step, n_blocks) != 1)
        step++;
    for (unsigned i = 0; i < n_blocks; i++) {
        emu_here.block_idx = dim_of(at, l->grid);
        shared_make(l->shared_bytes);
        lands_at_once = emu_random(2);
        if (i == 0 && l->is_early)
            emu_early_begin();
        block_run((int)emu_random(n));
        if (emu_early_is_begun()) /* no thread has waited */
            emu_early_end();
        if (n_bulks)
            emu_die("%s: %d bulk copies are under way when the block ends", l->name, n_bulks);
        shared_check(l->shared_bytes);
        at = (unsigned)(((uint64_t)at + step) % n_blocks);
    }
}
