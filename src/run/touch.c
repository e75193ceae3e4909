/* Owns a thread that asks for memory before it is needed. */
#include "src/run/touch.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/mman.h>

/* Asked for at once: eight huge pages, so that touch_stop is answered soon. */
#define STEP_BYTES (16 * MIB)

#ifndef MADV_POPULATE_WRITE /* Linux 5.14; older kernels say EINVAL, and the thread ends */
#define MADV_POPULATE_WRITE 23
#endif

struct touch {
    pthread_t thread;
    char *memory; /* view */
    uint64_t bytes;
    bool is_stopping; /* atomic */
};

static void *run(void *arg)
{
    struct touch *t = arg;
    uint64_t done_bytes = 0;

    /* Of this thread alone; refused or not, it is only a question of who waits for whom. */
    pthread_setschedparam(pthread_self(), SCHED_IDLE, &(struct sched_param){0});
    while (done_bytes < t->bytes && !__atomic_load_n(&t->is_stopping, __ATOMIC_RELAXED)) {
        uint64_t left = t->bytes - done_bytes, bytes = left < STEP_BYTES ? left : STEP_BYTES;
        if (madvise(t->memory + done_bytes, bytes, MADV_POPULATE_WRITE))
            break; /* whoever needs the memory will be told what is wrong */
        done_bytes += bytes;
    }
    return NULL;
}

int touch_start(void *memory, uint64_t bytes, struct touch **out)
{
    *out = NULL;
    struct touch *t = mem_zalloc(1, sizeof *t, MEM_META);
    if (!t)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *t);
    t->memory = memory;
    t->bytes = bytes;
    if (pthread_create(&t->thread, NULL, run, t))
        mem_free(t);
    else
        *out = t;
    return 0;
}

void touch_stop(struct touch *t)
{
    if (!t)
        return;
    __atomic_store_n(&t->is_stopping, true, __ATOMIC_RELAXED);
    /* Now somebody waits: on a busy machine an idle thread might not run for seconds. */
    pthread_setschedparam(t->thread, SCHED_OTHER, &(struct sched_param){0});
    pthread_join(t->thread, NULL);
    mem_free(t);
}
