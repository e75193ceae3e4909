/* The module through which ferry batch uses MPI: point-to-point messages alone, polled. Built by configure --with-mpi. Where MPI has
 * User Level Failure Mitigation (Bland et al. 2013, doi:10.1177/1094342013488238; Open MPI 5: mpirun --with-ft ulfm), a job outlives its
 * processes: an operation with one that is lost fails, and is the only kind that may. */
#include "src/cli/team_link.h"

#include <mpi.h>
#if defined(OPEN_MPI) && defined(__has_include)
#if __has_include(<mpi-ext.h>)
#include <mpi-ext.h>
#endif
#endif
#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(MPI_Request) <= sizeof(struct team_request), "a request has room for MPI's");

extern const struct team_link mpi_link;

enum { MOST_RANKS = 65536 };
enum fate { PRESENT, LOST, LOST_AND_SAID };

static MPI_Message looked_at;
static unsigned char fates[MOST_RANKS];
static int me, n, last; /* rank; ranks; the one whose message came last */

#ifdef MPIX_ERR_PROC_FAILED
/* Called for each error: what is no loss of a process ends the job. */
static void hear_error(MPI_Comm *comm, int *code, ...)
{
    char text[MPI_MAX_ERROR_STRING];
    int class, n_text;

    MPI_Error_class(*code, &class);
    if (class == MPIX_ERR_PROC_FAILED)
        return;
    MPI_Error_string(*code, text, &n_text);
    fprintf(stderr, "ferry: MPI: %s\n", text);
    MPI_Abort(*comm, 1);
}
#endif

static void open_link(int *rank, int *n_ranks)
{
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, rank);
    MPI_Comm_size(MPI_COMM_WORLD, n_ranks);
    me = *rank;
    n = *n_ranks;
    if (n > MOST_RANKS) {
        fprintf(stderr, "ferry: %d processes; the most is %d\n", n, MOST_RANKS);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
#ifdef MPIX_ERR_PROC_FAILED
    MPI_Errhandler handler;
    MPI_Comm_create_errhandler(hear_error, &handler);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, handler);
    MPI_Errhandler_free(&handler);
#endif
}

static bool is_any_lost(void)
{
    for (int k = 0; k < n; k++)
        if (fates[k] != PRESENT)
            return true;
    return false;
}

/* MPI_Finalize of Open MPI 5.0 hangs now and then after a loss. */
static void close_link(int status)
{
    if (me == 0 && is_any_lost())
        MPI_Abort(MPI_COMM_WORLD, status);
    MPI_Finalize();
}

static void abort_link(int status)
{
    MPI_Abort(MPI_COMM_WORLD, status);
}

static void send_bytes(int to, const void *p, size_t n_bytes, struct team_request *out)
{
    MPI_Request request = MPI_REQUEST_NULL;

    if (fates[to] == PRESENT && MPI_Isend(p, (int)n_bytes, MPI_BYTE, to, 0, MPI_COMM_WORLD, &request))
        request = MPI_REQUEST_NULL;
    memcpy(out, &request, sizeof request);
}

static bool is_done(struct team_request *request)
{
    MPI_Request r;
    int done;

    memcpy(&r, request, sizeof r);
    if (MPI_Test(&r, &done, MPI_STATUS_IGNORE))
        done = 1; /* with whom it was sent to */
    memcpy(request, &r, sizeof r);
    return done;
}

/* Asked one by one, in turns: only a named source says that it is lost. */
static bool look(int *from, size_t *n_bytes)
{
    for (int i = 1; i <= n; i++) {
        MPI_Status status;
        int there, count, k = (last + i) % n;
        if (fates[k] != PRESENT)
            continue;
        if (MPI_Improbe(k, 0, MPI_COMM_WORLD, &there, &looked_at, &status)) {
            fates[k] = LOST;
            continue;
        }
        if (!there)
            continue;
        MPI_Get_count(&status, MPI_BYTE, &count);
        *from = last = k;
        *n_bytes = (size_t)count;
        return true;
    }
    return false;
}

static bool take(void *p, size_t n_bytes)
{
    return MPI_Mrecv(p, (int)n_bytes, MPI_BYTE, &looked_at, MPI_STATUS_IGNORE) == MPI_SUCCESS;
}

static int lost(void)
{
    for (int k = 0; k < n; k++)
        if (fates[k] == LOST) {
            fates[k] = LOST_AND_SAID;
            return k;
        }
    return -1;
}

const struct team_link mpi_link = {TEAM_LINK_VERSION, open_link, close_link, abort_link, send_bytes,
                                   is_done,           look,      take,       lost};
