/* Owns the threads, where they run, and how they wait for one another. What they compute is the job's business. */
#include "cpu/pool.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"

#include <hwloc.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A futex wake and the sleep before it cost 5-50 us; the work between two barriers of a decode step is 20-500 us. With
 * fewer cores than threads the one waited for cannot run while we spin, so the spin is as good as none. */
#define SPIN_NS 40000
#define SPIN_CROWDED_NS 1000
/* Where jobs come after something else: what a GPU of 200 GB/s takes for a layer's dense weights, and some more. */
#define AWAKE_NS 400000

/* The largest CPU number + 1 that fits our masks; machines beyond it run unpinned. */
#define MAX_CPUS 8192
#define MASK_BYTES (MAX_CPUS / 8)
struct mask {
    cpu_set_t set[MAX_CPUS / CPU_SETSIZE];
};

/* A number that threads wait to see changed. A line of its own: waiting must not slow down who writes beside it. */
struct signal {
    _Alignas(64) _Atomic uint32_t value;
    _Atomic int n_sleeping;
};

/* How many items of a worker's share are claimed. Barriers come between an even pass and an odd one: a worker that arrives
 * sets its own count of the next pass to 0, which nobody has looked at since the barrier before. */
struct share {
    _Alignas(64) _Atomic int64_t n_claimed[2];
};

struct worker {
    struct pool *pool; /* view */
    pthread_t thread;
    int number;
    int cpu; /* -1: not pinned */
};

struct pool {
    struct signal job;  /* changes when there is a new job */
    struct signal pass; /* changes when a barrier opens */
    _Alignas(64) _Atomic int n_arrived;
    _Alignas(64) pool_fn *fn; /* NULL: go home */
    void *arg;
    uint64_t spin_ns;
    _Atomic uint64_t awake_ns; /* 0, or for how long to wait awake for a job where the last one came as soon */
    int n_threads, n_started;
    struct worker *workers; /* (n_threads), own */
    struct share *shares;   /* (n_threads), own */
};

static void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void signal_wait(struct signal *s, uint32_t old, uint64_t spin_ns)
{
    uint64_t until_ns = 0;

    for (unsigned i = 0;; i++) {
        if (atomic_load_explicit(&s->value, memory_order_acquire) != old)
            return;
        cpu_relax();
        if (i % 32 == 31) { /* the clock costs as much as a pause */
            uint64_t now_ns = clock_ns();
            if (!until_ns)
                until_ns = now_ns + spin_ns;
            else if (now_ns > until_ns)
                break;
        }
    }
    atomic_fetch_add(&s->n_sleeping, 1);
    while (atomic_load(&s->value) == old)
        syscall(SYS_futex, &s->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&s->n_sleeping, 1);
}

/* Sequentially consistent like the add and load in signal_wait(): either we see the sleeper or it sees the new value. */
static void signal_change(struct signal *s)
{
    atomic_fetch_add(&s->value, 1);
    if (atomic_load(&s->n_sleeping))
        syscall(SYS_futex, &s->value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

int64_t pool_claim(struct pool *pool, int worker, int64_t n)
{
    uint32_t pass = atomic_load_explicit(&pool->pass.value, memory_order_relaxed);

    for (int i = 0, who = worker; i < pool->n_threads; i++, who = who + 1 < pool->n_threads ? who + 1 : 0) {
        _Atomic int64_t *n_claimed = &pool->shares[who].n_claimed[pass % 2];
        int64_t begin = n * who / pool->n_threads, end = n * (who + 1) / pool->n_threads;
        if (begin + atomic_load_explicit(n_claimed, memory_order_relaxed) >= end)
            continue; /* without writing to a line that all look at */
        int64_t item = begin + atomic_fetch_add_explicit(n_claimed, 1, memory_order_relaxed);
        if (item < end)
            return item;
    }
    return n;
}

void pool_barrier(struct pool *pool, int worker, pool_fn *serial, void *arg)
{
    uint32_t pass = atomic_load_explicit(&pool->pass.value, memory_order_relaxed);

    atomic_store_explicit(&pool->shares[worker].n_claimed[(pass + 1) % 2], 0, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->n_arrived, 1, memory_order_acq_rel) < pool->n_threads - 1) {
        signal_wait(&pool->pass, pass, pool->spin_ns);
        return;
    }
    if (serial)
        serial(worker, arg);
    atomic_store_explicit(&pool->n_arrived, 0, memory_order_relaxed);
    signal_change(&pool->pass);
}

/* Keep the calling thread on one CPU. A refusal only costs speed. */
static void pin_to(int cpu)
{
    struct mask mask;

    CPU_ZERO_S(MASK_BYTES, mask.set);
    CPU_SET_S((size_t)cpu, MASK_BYTES, mask.set);
    (void)sched_setaffinity(0, MASK_BYTES, mask.set);
}

static void *worker_main(void *arg)
{
    struct worker *me = arg;
    struct pool *pool = me->pool;
    uint64_t spin_ns = pool->spin_ns;
    uint32_t job = 0;

    if (me->cpu >= 0)
        pin_to(me->cpu);
    for (;;) {
        uint64_t from_ns = clock_ns();
        signal_wait(&pool->job, job++, spin_ns);
        uint64_t awake_ns = pool->awake_ns;
        spin_ns = clock_ns() - from_ns < awake_ns ? awake_ns : pool->spin_ns;
        if (!pool->fn)
            return NULL;
        pool->fn(me->number, pool->arg);
        pool_barrier(pool, me->number, NULL, NULL);
    }
}

void pool_run(struct pool *pool, pool_fn *fn, void *arg)
{
    struct mask old;
    bool is_pinned = pool->workers[0].cpu >= 0 && sched_getaffinity(0, MASK_BYTES, old.set) == 0;

    if (is_pinned)
        pin_to(pool->workers[0].cpu);
    pool->fn = fn;
    pool->arg = arg;
    if (pool->n_threads > 1)
        signal_change(&pool->job);
    fn(0, arg);
    pool_barrier(pool, 0, NULL, NULL);
    if (is_pinned)
        (void)sched_setaffinity(0, MASK_BYTES, old.set);
}

/* Allowed CPUs into cpus (max): the first hardware thread of every core, then the second ones, … Returns how many. */
static int list_cpus(hwloc_topology_t topology, const struct mask *allowed, int *cpus, int max)
{
    int n = 0, n_cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);

    for (unsigned sibling = 0, n_found = 1; n_found; sibling++) {
        n_found = 0;
        for (int core = 0; core < n_cores; core++) {
            hwloc_obj_t obj = hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, (unsigned)core);
            hwloc_obj_t pu = hwloc_get_obj_inside_cpuset_by_type(topology, obj->cpuset, HWLOC_OBJ_PU, sibling);
            if (!pu)
                continue;
            n_found++;
            if (n < max && pu->os_index < MAX_CPUS && CPU_ISSET_S((size_t)pu->os_index, MASK_BYTES, allowed->set))
                cpus[n++] = (int)pu->os_index;
        }
    }
    return n;
}

/* A CPU for every worker; none where there are more workers than CPUs or the machine cannot be asked. */
static void place_workers(struct pool *pool, int *cpus)
{
    hwloc_topology_t topology;
    struct mask allowed;
    int n = 0;

    if (sched_getaffinity(0, MASK_BYTES, allowed.set) < 0 || hwloc_topology_init(&topology) < 0)
        return;
    hwloc_topology_set_all_types_filter(topology, HWLOC_TYPE_FILTER_KEEP_NONE);
    hwloc_topology_set_type_filter(topology, HWLOC_OBJ_CORE, HWLOC_TYPE_FILTER_KEEP_ALL);
    if (hwloc_topology_load(topology) == 0)
        n = list_cpus(topology, &allowed, cpus, pool->n_threads);
    hwloc_topology_destroy(topology);
    for (int i = 0; n == pool->n_threads && i < n; i++)
        pool->workers[i].cpu = cpus[i];
}

static int start_threads(struct pool *pool)
{
    for (; pool->n_started < pool->n_threads; pool->n_started++) {
        struct worker *w = &pool->workers[pool->n_started];
        int e = w->number ? pthread_create(&w->thread, NULL, worker_main, w) : 0;
        if (e)
            return err(ERR_LIMIT, "thread %d of %d cannot be started: %s", w->number + 1, pool->n_threads, strerror(e));
    }
    return 0;
}

int pool_open(int n_threads, bool pin, struct pool **out)
{
    struct mask allowed;
    int rc, *cpus = NULL;

    *out = NULL;
    if (n_threads < 1 || n_threads > POOL_MAX_THREADS)
        return err(ERR_ARG, "%d threads: 1 to %d are possible", n_threads, POOL_MAX_THREADS);
    struct pool *pool = mem_zalloc(1, sizeof *pool, MEM_OTHER);
    if (pool) {
        pool->workers = mem_zalloc((size_t)n_threads, sizeof *pool->workers, MEM_OTHER);
        pool->shares = mem_zalloc((size_t)n_threads, sizeof *pool->shares, MEM_OTHER);
        cpus = mem_zalloc((size_t)n_threads, sizeof *cpus, MEM_OTHER);
    }
    if (!pool || !pool->workers || !pool->shares || !cpus) {
        rc = err(ERR_NOMEM, "a team of %d threads", n_threads);
        goto out;
    }
    pool->n_threads = n_threads;
    for (int i = 0; i < n_threads; i++)
        pool->workers[i] = (struct worker){.pool = pool, .number = i, .cpu = -1};
    bool is_crowded =
        sched_getaffinity(0, MASK_BYTES, allowed.set) < 0 || CPU_COUNT_S(MASK_BYTES, allowed.set) < n_threads;
    pool->spin_ns = is_crowded ? SPIN_CROWDED_NS : SPIN_NS;
    if (pin && !is_crowded)
        place_workers(pool, cpus);
    rc = start_threads(pool);
out:
    mem_free(cpus);
    if (rc < 0)
        pool_close(pool);
    else
        *out = pool;
    return rc;
}

void pool_stay_awake(struct pool *pool)
{
    if (pool->spin_ns == SPIN_NS)
        pool->awake_ns = AWAKE_NS;
}

void pool_close(struct pool *pool)
{
    if (!pool)
        return;
    if (pool->n_started > 1) {
        pool->fn = NULL;
        signal_change(&pool->job);
        for (int i = 1; i < pool->n_started; i++)
            pthread_join(pool->workers[i].thread, NULL);
    }
    mem_free(pool->workers);
    mem_free(pool->shares);
    mem_free(pool);
}

int pool_n_threads(const struct pool *pool)
{
    return pool->n_threads;
}
