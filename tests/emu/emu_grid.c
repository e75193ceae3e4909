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
    MAX_ASYNC = 64,
    GUARD_BYTES = 64,
    GUARD = 0xa5
};

enum state { READY, AT_BARRIER, AT_WARP, RETURNED };
static const char *const state_names[] = {"is ready", "waits at a barrier", "waits for its warp", "has returned"};

struct async {
    void *dst;
    const void *src;
    unsigned bytes;
    int group;
};

struct fiber {
    void *sp;
    unsigned exchange_bytes;
    struct async async[MAX_ASYNC];
    int n_async, group;
};

struct emu_here emu_here;

static struct fiber fibers[MAX_THREADS];
/* Beside them, so that a look at all threads touches few lines: what each of them does, and how many of each warp are at an exchange. */
static unsigned char states[MAX_THREADS];
static unsigned char n_at_warp[MAX_THREADS / WARP];
static char (*stacks)[STACK_BYTES]; /* made once, kept */
static void *scheduler_sp;
static struct fiber *current;
static const struct emu_launch *running;
static char shared[EMU_MAX_SHARED + GUARD_BYTES] __attribute__((aligned(128)));
/* What lanes bring to an exchange, and what they take away: a lane may bring its next before a slower one has looked. */
static char brought[MAX_THREADS][MAX_EXCHANGE], taken[MAX_THREADS * MAX_EXCHANGE] __attribute__((aligned(16)));

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

static void fiber_make(int t)
{
    /* Tops are shifted against each other, or all of them would meet in the same few sets of the L1 cache. */
    uintptr_t top = ((uintptr_t)stacks[t] + STACK_BYTES - (uintptr_t)(t % 32) * 128) & ~(uintptr_t)15;
    void **sp = (void **)top;
    *--sp = NULL; /* where thread_main would return to: keeps the stack aligned as after a call */
    *--sp = (void *)(uintptr_t)thread_main;
    for (int i = 0; i < 6; i++)
        *--sp = NULL;
    fibers[t].sp = sp;
}

#else

#include <ucontext.h>

static ucontext_t contexts[MAX_THREADS], scheduler_context;

static void emu_grid_switch(void **save_sp, void *load_sp)
{
    ucontext_t *from = save_sp == &scheduler_sp ? &scheduler_context : &contexts[current - fibers];
    ucontext_t *to = save_sp == &scheduler_sp ? load_sp : &scheduler_context;
    swapcontext(from, to);
}

static void fiber_make(int t)
{
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = stacks[t];
    contexts[t].uc_stack.ss_size = STACK_BYTES;
    contexts[t].uc_link = &scheduler_context;
    makecontext(&contexts[t], thread_main, 0);
    fibers[t].sp = &contexts[t];
}

#endif

static void leave(enum state state)
{
    states[current - fibers] = (unsigned char)state;
    emu_grid_switch(&current->sp, scheduler_sp);
}

static void thread_main(void)
{
    running->call(running->closure);
    if (current->n_async)
        emu_die("%s: a thread returned with copies under way", running->name);
    leave(RETURNED);
}

/* ---- what kernels call ---- */

void emu_barrier(void)
{
    leave(AT_BARRIER);
}

const void *emu_warp(const void *mine, unsigned bytes)
{
    long t = current - fibers;

    if (bytes > MAX_EXCHANGE)
        emu_die("%s: %u bytes in a warp exchange", running->name, bytes);
    memcpy(brought[t], mine, bytes);
    current->exchange_bytes = bytes;
    leave(AT_WARP);
    return taken + t / WARP * WARP * MAX_EXCHANGE;
}

void emu_async_copy(void *dst, const void *src, unsigned bytes)
{
    if (bytes != 4 && bytes != 8 && bytes != 16)
        emu_die("%s: an asynchronous copy of %u bytes", running->name, bytes);
    if ((uintptr_t)dst % bytes || (uintptr_t)src % bytes)
        emu_die("%s: an asynchronous copy of %u bytes that is not aligned to as many", running->name, bytes);
    if (current->n_async == MAX_ASYNC)
        emu_die("%s: more than %d asynchronous copies of a thread", running->name, MAX_ASYNC);
    current->async[current->n_async++] = (struct async){dst, src, bytes, current->group};
}

void emu_async_commit(void)
{
    current->group++;
}

void emu_async_wait(int n_left)
{
    int n = 0;

    for (int i = 0; i < current->n_async; i++) {
        struct async a = current->async[i];
        if (a.group < current->group - n_left)
            memcpy(a.dst, a.src, a.bytes);
        else
            current->async[n++] = a;
    }
    current->n_async = n;
}

/* ---- one block ---- */

static struct emu_dim dim_of(unsigned t, struct emu_dim d)
{
    return (struct emu_dim){t % d.x, t / d.x % d.y, t / d.x / d.y};
}

static void fiber_run(int t)
{
    bool is_line = running->block.y == 1 && running->block.z == 1;

    current = &fibers[t];
    emu_here.thread_idx = is_line ? (struct emu_dim){(unsigned)t, 0, 0} : dim_of((unsigned)t, running->block);
    emu_grid_switch(&scheduler_sp, current->sp);
}

/* Thread t has come to an exchange: let its warp go on if it was the last. */
static void meet_warp(int t)
{
    int first = t / WARP * WARP;
    unsigned bytes = fibers[first].exchange_bytes;

    if (++n_at_warp[t / WARP] < WARP)
        return;
    n_at_warp[t / WARP] = 0;
    for (int i = first; i < first + WARP; i++) {
        if (fibers[i].exchange_bytes != bytes)
            emu_die("%s: lanes of a warp exchange %u and %u bytes", running->name, bytes, fibers[i].exchange_bytes);
        memcpy(taken + first * MAX_EXCHANGE + (unsigned)(i - first) * bytes, brought[i], bytes);
        states[i] = READY;
    }
}

static int count(int n, enum state state)
{
    int n_in = 0;
    for (int t = 0; t < n; t++)
        n_in += states[t] == state;
    return n_in;
}

static void stuck(int n)
{
    int waits = 0, other = 0;

    while (states[waits] == RETURNED)
        waits++;
    while (other < n - 1 && states[other] == states[waits])
        other++;
    emu_die("%s: block (%u, %u, %u): thread %d %s, but thread %d %s", running->name, emu_here.block_idx.x,
            emu_here.block_idx.y, emu_here.block_idx.z, waits, state_names[states[waits]], other,
            state_names[states[other]]);
}

/* Run the threads from meeting to meeting until all have returned. first: who goes first. */
static void block_run(int n, int first)
{
    for (int t = 0; t < n; t++) {
        states[t] = READY;
        fibers[t].n_async = fibers[t].group = 0;
        fiber_make(t);
    }
    memset(n_at_warp, 0, sizeof n_at_warp);
    for (;;) {
        bool moved = false;
        for (int i = 0; i < n; i++) {
            int t = i + first < n ? i + first : i + first - n;
            if (states[t] != READY)
                continue;
            moved = true;
            fiber_run(t);
            if (states[t] == AT_WARP)
                meet_warp(t);
        }
        if (moved)
            continue;
        if (count(n, RETURNED) == n)
            return;
        if (count(n, AT_BARRIER) != n)
            stuck(n);
        memset(states, READY, (size_t)n);
    }
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
    unsigned n_threads = l->block.x * l->block.y * l->block.z, n_blocks = l->grid.x * l->grid.y * l->grid.z;

    if (n_threads == 0 || n_threads > MAX_THREADS || n_threads % WARP)
        emu_die("%s: %u threads in a block", l->name, n_threads);
    if (l->grid.y > 65535 || l->grid.z > 65535)
        emu_die("%s: a grid of %u x %u x %u", l->name, l->grid.x, l->grid.y, l->grid.z);
    if (l->shared_bytes > most_shared(l->kernel))
        emu_die("%s: %zu bytes of shared memory", l->name, l->shared_bytes);
    if (!stacks) {
        stacks = mmap(NULL, sizeof *stacks * MAX_THREADS, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED)
            emu_die("no memory for the stacks of %d threads", MAX_THREADS);
    }
    running = l;
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
        block_run((int)n_threads, (int)emu_random(n_threads));
        shared_check(l->shared_bytes);
        at = (unsigned)(((uint64_t)at + step) % n_blocks);
    }
}
