/* Owns the letters that are on their way, and what rank 0 knows of the others. */
#include "src/cli/team.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define REST_NS 1000000

struct team_letter {
    struct team_letter *next; /* own */
    struct team_request request;
    char bytes[]; /* as they are sent */
};

/* ---- beginning and end ---- */

/* The module lies beside the program while both are in their build folder, and where make install put it. */
static void *load(const char **why)
{
    char self[PATH_MAX], path[PATH_MAX + 32];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    void *module = NULL;

    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash) {
        *slash = '\0';
        snprintf(path, sizeof path, "%s/.libs/ferry-mpi.so", self);
        if (access(path, F_OK) == 0)
            module = dlopen(path, RTLD_NOW | RTLD_GLOBAL); /* MPI's own modules look for its symbols */
        else
            module = dlopen(FERRY_MODULE_DIR "/ferry-mpi.so", RTLD_NOW | RTLD_GLOBAL);
    }
    *why = module ? NULL : dlerror();
    return module;
}

int team_join(struct team *t, const struct team_link *link, uint32_t n_expected)
{
    if (link->version != TEAM_LINK_VERSION)
        return err(ERR_UNSUPPORTED, "the MPI module is of version %d, not %d", link->version, TEAM_LINK_VERSION);
    t->link = link;
    link->open(&t->rank, &t->n_ranks);
    if ((uint32_t)t->n_ranks != n_expected)
        return err(ERR_STATE,
                   "started as one of %" PRIu32 " processes, of which MPI knows %d: ferry's MPI module and the "
                   "launcher do not fit together (with srun: --mpi=pmix)",
                   n_expected, t->n_ranks);
    t->member = mem_zalloc((size_t)t->n_ranks, sizeof *t->member, MEM_OTHER);
    return t->member ? 0 : err(ERR_NOMEM, "the state of %d ranks", t->n_ranks);
}

int team_open(struct team *t, const struct conf *conf)
{
    const char *why;

    *t = (struct team){.n_ranks = 1};
    if (conf->n_ranks <= 1)
        return 0;
    t->module = load(&why);
    if (!t->module)
        return err(ERR_UNSUPPORTED,
                   "one of %" PRIu32 " processes, but there is no MPI module (configure --with-mpi): %s", conf->n_ranks,
                   why ? why : "where is the program?");
    const struct team_link *link = dlsym(t->module, TEAM_LINK_SYMBOL);
    return link ? team_join(t, link, conf->n_ranks) : err(ERR_UNSUPPORTED, "the MPI module has no " TEAM_LINK_SYMBOL);
}

/* Forget the letters that have arrived. */
static void drop_sent(struct team *t)
{
    for (struct team_letter **at = &t->letters; *at;) {
        struct team_letter *letter = *at;
        if (!t->link->is_done(&letter->request)) {
            at = &letter->next;
            continue;
        }
        *at = letter->next;
        mem_free(letter);
    }
}

void team_close(struct team *t, bool is_orderly, int status)
{
    if (t->link && !is_orderly)
        t->link->abort(status);
    while (t->letters) {
        drop_sent(t);
        if (t->letters)
            team_rest();
    }
    if (t->link)
        t->link->close(status);
    text_done(&t->inbox);
    mem_free(t->member);
    /* The module stays loaded: MPI leaves handlers behind that run at exit. */
    *t = (struct team){0};
}

/* ---- messages ---- */

int team_send(struct team *t, int to, const struct team_head *head, const char *text, size_t n_bytes)
{
    drop_sent(t);
    if (n_bytes > INT_MAX - sizeof *head)
        return err(ERR_LIMIT, "a message of %zu bytes", n_bytes);
    struct team_letter *letter = mem_alloc(sizeof *letter + sizeof *head + n_bytes, MEM_OTHER);
    if (!letter)
        return err(ERR_NOMEM, "a message of %zu bytes", n_bytes);
    memcpy(letter->bytes, head, sizeof *head);
    if (n_bytes)
        memcpy(letter->bytes + sizeof *head, text, n_bytes);
    letter->next = t->letters;
    t->letters = letter;
    t->link->send(to, letter->bytes, sizeof *head + n_bytes, &letter->request);
    return 0;
}

static int hear_of_loss(struct team *t, struct team_message *out, bool *got)
{
    int who = t->link->lost();

    *got = who >= 0;
    if (*got)
        *out = (struct team_message){.head.kind = TEAM_LOST, .from = who, .text = ""};
    return 0;
}

int team_receive(struct team *t, struct team_message *out, bool *got)
{
    size_t n;

    drop_sent(t);
    *got = t->link->look(&out->from, &n);
    if (!*got)
        return hear_of_loss(t, out, got);
    int rc = text_resize(&t->inbox, n);
    if (rc)
        return rc;
    *got = t->link->take(t->inbox.p, n);
    if (!*got)
        return hear_of_loss(t, out, got);
    if (n < sizeof out->head || out->from < 0 || out->from >= t->n_ranks)
        return err(ERR_FORMAT, "a message of %zu bytes from rank %d", n, out->from);
    memcpy(&out->head, t->inbox.p, sizeof out->head);
    if (out->head.kind == TEAM_LOST)
        return err(ERR_FORMAT, "rank %d says that it is lost", out->from);
    out->text = t->inbox.p + sizeof out->head;
    out->n_bytes = n - sizeof out->head;
    return 0;
}

int team_refuse(const char *fmt, ...)
{
    char text[512];
    va_list args;

    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    return err(ERR_STATE, "%s", text);
}

void team_rest(void)
{
    nanosleep(&(struct timespec){.tv_nsec = REST_NS}, NULL);
}

/* ---- what rank 0 knows ---- */

int team_hungriest(const struct team *t)
{
    int best = 0;

    for (int k = 1; k < t->n_ranks; k++)
        if (t->member[k].n_wanted > (best ? t->member[best].n_wanted : 0))
            best = k;
    return best;
}

void team_add_stats(const struct team *t, struct ferry_batch_stats *own)
{
    for (int k = 1; k < t->n_ranks && t->member; k++) {
        const struct ferry_batch_stats *st = &t->member[k].stats;
        own->n_running += st->n_running;
        own->most_running += st->most_running;
        own->n_prompt += st->n_prompt;
        own->n_generated += st->n_generated;
        own->n_shared += st->n_shared;
        own->n_preempted += st->n_preempted;
        own->n_rerun += st->n_rerun;
        own->n_spilled += st->n_spilled;
        own->n_sat_out += st->n_sat_out;
        own->n_halved += st->n_halved;
        own->n_spill_failed += st->n_spill_failed;
    }
}
