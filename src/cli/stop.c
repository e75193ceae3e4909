/* Owns the handlers of SIGINT and SIGTERM while something runs. */
#include "src/cli/stop.h"

#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

enum { AT_ONCE = 3 };

static _Atomic(struct ferry_session *) watched;
static _Atomic(struct ferry_batch *) watched_batch;
static volatile sig_atomic_t n_asked, for_good;
static struct sigaction old_int, old_term;

static void on_signal(int number)
{
    struct ferry_session *session = atomic_load(&watched);
    struct ferry_batch *batch = atomic_load(&watched_batch);

    n_asked = n_asked + 1;
    if (number == SIGTERM)
        for_good = 1;
    if (n_asked >= AT_ONCE) {
        signal(number, SIG_DFL);
        raise(number);
    }
    if (session)
        ferry_session_cancel(session);
    if (batch && (n_asked > 1 || for_good))
        ferry_batch_interrupt(batch);
}

void stop_begin(void)
{
    /* No SA_RESTART: a read of the keyboard has to come back. */
    struct sigaction action = {.sa_handler = on_signal};

    n_asked = 0;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, &old_int);
    sigaction(SIGTERM, &action, &old_term);
}

void stop_end(void)
{
    stop_watch(NULL);
    stop_watch_batch(NULL);
    sigaction(SIGINT, &old_int, NULL);
    sigaction(SIGTERM, &old_term, NULL);
}

void stop_watch(struct ferry_session *session)
{
    atomic_store(&watched, session);
}

void stop_watch_batch(struct ferry_batch *batch)
{
    atomic_store(&watched_batch, batch);
}

bool stop_asked(void)
{
    return n_asked != 0 || for_good;
}

bool stop_for_good(void)
{
    return for_good;
}

void stop_clear(void)
{
    n_asked = 0;
}
