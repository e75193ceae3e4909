/* The team: barriers, claims, where threads run, and what happens when they cannot be made. */
#include <check.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cpu/cpu.h"
#include "cpu/pool.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

static int fail_thread; /* the nth pthread_create from now on fails; 0: none */

/* Stands before the library's own. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *), void *arg)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

    if (fail_thread && --fail_thread == 0)
        return EAGAIN;
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return real(thread, attr, fn, arg);
}

enum { N_PHASES = 200, N_ITEMS = 50 };

/* Phases in which every item is added to by whoever claims it, and after which one worker checks them all. */
struct job {
    struct pool *pool;
    int n_threads;
    int items[N_ITEMS];
    int n_serial, n_wrong;
    atomic_int n_ran;
};

static void check_items(int worker, void *arg)
{
    struct job *j = arg;

    (void)worker;
    j->n_serial++;
    for (int i = 0; i < N_ITEMS; i++)
        j->n_wrong += j->items[i] != j->n_serial;
}

static void work(int worker, void *arg)
{
    struct job *j = arg;

    atomic_fetch_add(&j->n_ran, 1);
    for (int phase = 0; phase < N_PHASES; phase++) {
        for (int64_t i; (i = pool_claim(j->pool, worker, N_ITEMS)) < N_ITEMS;)
            j->items[i]++; /* not atomic: claimed once, and the barrier orders the phases */
        pool_barrier(j->pool, worker, check_items, j);
    }
}

START_TEST(barrier_lets_nobody_pass_early_and_claims_give_each_item_once)
{
    static const int n_threads[] = {1, 2, 3, 5, 9};

    for (size_t t = 0; t < sizeof n_threads / sizeof *n_threads; t++) {
        struct job j = {.n_threads = n_threads[t]};
        ck_assert_int_eq(pool_open(n_threads[t], true, &j.pool), 0);
        ck_assert_int_eq(pool_n_threads(j.pool), n_threads[t]);
        for (int round = 1; round <= 5; round++) {
            pool_run(j.pool, work, &j);
            ck_assert_int_eq(atomic_load(&j.n_ran), round * n_threads[t]);
            ck_assert_int_eq(j.n_serial, round * N_PHASES);
            ck_assert_int_eq(j.n_wrong, 0);
            if (round == 3)
                usleep(2000); /* the workers have gone to sleep by the next job */
        }
        pool_close(j.pool);
    }
}
END_TEST

struct few {
    struct pool *pool;
    int64_t n;
    atomic_int claimed[16];
};

static void claim_few(int worker, void *arg)
{
    struct few *f = arg;

    for (int64_t i; (i = pool_claim(f->pool, worker, f->n)) < f->n;)
        atomic_fetch_add(&f->claimed[i], 1);
}

START_TEST(jobs_without_barriers_and_with_few_items_give_each_item_once)
{
    for (int n_threads = 1; n_threads <= 7; n_threads += 3) {
        struct few f = {.n = 0};
        int want[16] = {0};
        ck_assert_int_eq(pool_open(n_threads, false, &f.pool), 0);
        for (int round = 0; round < 300; round++) {
            f.n = round * 7 % 17; /* none, fewer than threads, more */
            pool_run(f.pool, claim_few, &f);
            for (int i = 0; i < 16; i++) {
                want[i] += i < f.n;
                ck_assert_int_eq(atomic_load(&f.claimed[i]), want[i]);
            }
        }
        pool_close(f.pool);
    }
}
END_TEST

static void note_cpu(int worker, void *arg)
{
    cpu_set_t *sets = arg;
    sched_getaffinity(0, sizeof sets[worker], &sets[worker]);
}

START_TEST(workers_are_pinned_to_cores_of_their_own_and_the_caller_only_meanwhile)
{
    cpu_set_t before, after, sets[8], both;
    struct pool *pool;

    sched_getaffinity(0, sizeof before, &before);
    int n = CPU_COUNT(&before) < 8 ? CPU_COUNT(&before) : 8;
    ck_assert_int_eq(pool_open(n, true, &pool), 0);
    pool_run(pool, note_cpu, sets);
    sched_getaffinity(0, sizeof after, &after);
    ck_assert(CPU_EQUAL(&before, &after));
    for (int i = 0; i < n; i++) {
        ck_assert_int_eq(CPU_COUNT(&sets[i]), 1);
        CPU_AND(&both, &sets[i], &before);
        ck_assert_int_eq(CPU_COUNT(&both), 1);
        for (int other = 0; other < i; other++)
            ck_assert(!CPU_EQUAL(&sets[i], &sets[other]));
    }
    pool_close(pool);
    ck_assert_int_eq(pool_open(n, false, &pool), 0);
    pool_run(pool, note_cpu, sets);
    for (int i = 0; i < n; i++)
        ck_assert(CPU_EQUAL(&sets[i], &before));
    pool_close(pool);
}
END_TEST

START_TEST(affinity_of_the_process_is_respected)
{
    cpu_set_t before, one, sets[2];
    struct pool *pool;

    sched_getaffinity(0, sizeof before, &before);
    CPU_ZERO(&one);
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0 && !CPU_COUNT(&one); cpu--)
        if (CPU_ISSET(cpu, &before))
            CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    for (int n = 1; n <= 2; n++) { /* two workers on one CPU: nobody is pinned, nobody hangs */
        ck_assert_int_eq(pool_open(n, true, &pool), 0);
        pool_run(pool, note_cpu, sets);
        for (int i = 0; i < n; i++)
            ck_assert(CPU_EQUAL(&sets[i], &one));
        pool_close(pool);
    }
    sched_setaffinity(0, sizeof before, &before);
}
END_TEST

START_TEST(thread_that_cannot_be_made_ends_the_others)
{
    uint64_t before = live_bytes();
    struct cpu_opts opts = {.n_threads = 4, .pin = true, .prefill = DEVICE_PREFILL_BLAS};
    struct device *dev;

    for (int nth = 1; nth <= 3; nth++) {
        fail_thread = nth;
        ck_assert_int_eq(cpu_open(&opts, &dev), ERR_LIMIT);
        ck_assert_ptr_null(dev);
        ck_assert_ptr_nonnull(strstr(err_text(), "of 4"));
        ck_assert_uint_eq(live_bytes(), before);
    }
    fail_thread = 0;
    ck_assert_int_eq(cpu_open(&opts, &dev), 0);
    dev->ops->close(dev);
    cpu_device_ops.close(NULL);
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

START_TEST(open_without_memory_leaks_nothing)
{
    uint64_t before = live_bytes();
    struct cpu_opts opts = {.n_threads = 3, .prefill = DEVICE_PREFILL_BLAS};
    struct device *dev = NULL;
    uint64_t nth = 0;
    double rate;
    int rc;

    do {
        mem_fail_nth(++nth);
        rc = cpu_open(&opts, &dev);
        ck_assert(rc == 0 || rc == ERR_NOMEM);
        ck_assert(rc == 0 || live_bytes() == before);
    } while (rc < 0);
    ck_assert_uint_gt(nth, 3);
    mem_fail_nth(0);
    dev->ops->close(dev);
    for (nth = 1; nth <= 4; nth++) {
        mem_fail_nth(nth);
        ck_assert_int_eq(cpu_read_rate(2, 1 << 20, 1, &rate), ERR_NOMEM);
        ck_assert_uint_eq(live_bytes(), before);
    }
    mem_fail_nth(0);
}
END_TEST

START_TEST(impossible_options_are_refused)
{
    struct device *dev;
    double rate;

    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 0}, &dev), ERR_ARG);
    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = POOL_MAX_THREADS + 1}, &dev), ERR_ARG);
    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 1, .isa = "z80"}, &dev), ERR_UNSUPPORTED);
    ck_assert_int_eq(cpu_read_rate(1, 100, 1, &rate), ERR_ARG);
    ck_assert_int_eq(cpu_read_rate(1, 1 << 20, 0, &rate), ERR_ARG);
    ck_assert_int_eq(cpu_read_rate(2, 8 << 20, 2, &rate), 0);
    ck_assert(rate > 1e8 && rate < 1e13);
}
END_TEST

START_TEST(steps_that_do_not_fit_are_refused_and_the_device_lives_on)
{
    struct tensor x = tensor_make(QUANT_F32, 32, 4, 1, NULL), w = tensor_make(QUANT_Q8_0, 32, 5, 1, NULL);
    struct tensor y = tensor_make(QUANT_F32, 5, 4, 1, NULL);
    struct op op = {.kind = OP_MATMUL, .n_w = 1, .dst = {&y}, .src = {&x}, .w = {&w}};
    struct rows rows = {.n = 4};
    struct device *dev;

    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 2}, &dev), 0);
    uint64_t bytes = dev->ops->scratch_bytes(&op, 1, 4, 2);
    char *scratch = mem_alloc(bytes, MEM_SCRATCH);
    ck_assert(dev->ops->can(&op));
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), ERR_ARG); /* no memory bound */
    x.data = mem_zalloc(4, 128, MEM_OTHER);
    w.data = mem_zalloc(5, 34, MEM_OTHER);
    y.data = mem_zalloc(4, 20, MEM_OTHER);
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), ERR_LIMIT); /* no scratch */
    ck_assert_int_eq(dev->ops->set_scratch(dev, scratch + 8, bytes - 8), ERR_ARG);
    ck_assert_int_eq(dev->ops->set_scratch(dev, scratch, bytes - 64), 0);
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), ERR_LIMIT);
    ck_assert_int_eq(dev->ops->set_scratch(dev, scratch, bytes), 0);
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), 0);
    rows.n = 5;
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), ERR_ARG); /* more rows than the tensors have */
    ck_assert_ptr_nonnull(strstr(err_text(), "matmul"));
    rows.n = 0;
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), 0);
    w.ne[0] = 64;
    rows.n = 4;
    ck_assert(!dev->ops->can(&op));
    ck_assert_int_eq(dev->ops->run(dev, &op, 1, &rows), ERR_ARG);
    dev->ops->close(dev);
    mem_free(x.data);
    mem_free(w.data);
    mem_free(y.data);
    mem_free(scratch);
}
END_TEST

START_TEST(time_is_told_by_op_and_forgotten_on_demand)
{
    struct tensor x = tensor_make(QUANT_F32, 4096, 4, 1, NULL);
    struct op op = {.kind = OP_SOFTCAP, .dst = {&x}, .src = {&x}, .p.scale.f = 2.0f};
    uint64_t ns[OP_N_KIND], scratch_bytes;
    struct device *dev;

    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 2, .isa = "ref"}, &dev), 0);
    ck_assert_str_eq(cpu_isa_used(dev), "ref");
    scratch_bytes = dev->ops->scratch_bytes(&op, 1, 4, 2);
    void *scratch = mem_alloc(scratch_bytes, MEM_SCRATCH);
    x.data = mem_zalloc(4, 4096 * sizeof(float), MEM_OTHER);
    ck_assert_int_eq(dev->ops->set_scratch(dev, scratch, scratch_bytes), 0);
    for (int n = 1; n <= 4; n += 3) {
        ck_assert_int_eq(dev->ops->run(dev, &op, 1, &(struct rows){.n = n}), 0);
        dev->ops->op_ns(dev, ns, true);
        ck_assert_uint_gt(ns[OP_SOFTCAP], 1000);
        ck_assert_uint_eq(ns[OP_MATMUL], 0);
        dev->ops->op_ns(dev, ns, false);
        ck_assert_uint_eq(ns[OP_SOFTCAP], 0);
    }
    dev->ops->close(dev);
    mem_free(x.data);
    mem_free(scratch);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cpu_pool");
    TCase *tc = tcase_create("cpu_pool");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, barrier_lets_nobody_pass_early_and_claims_give_each_item_once);
    tcase_add_test(tc, jobs_without_barriers_and_with_few_items_give_each_item_once);
    tcase_add_test(tc, workers_are_pinned_to_cores_of_their_own_and_the_caller_only_meanwhile);
    tcase_add_test(tc, affinity_of_the_process_is_respected);
    tcase_add_test(tc, thread_that_cannot_be_made_ends_the_others);
    tcase_add_test(tc, open_without_memory_leaks_nothing);
    tcase_add_test(tc, impossible_options_are_refused);
    tcase_add_test(tc, steps_that_do_not_fit_are_refused_and_the_device_lives_on);
    tcase_add_test(tc, time_is_told_by_op_and_forgotten_on_demand);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
