/* The module through which ferry batch uses MPI: point-to-point messages alone, polled. Built by configure --with-mpi. */
#include "src/cli/team_link.h"

#include <mpi.h>
#include <string.h>

_Static_assert(sizeof(MPI_Request) <= sizeof(struct team_request), "a request has room for MPI's");

extern const struct team_link mpi_link;

static MPI_Message looked_at;

static void open_link(int *rank, int *n_ranks)
{
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, rank);
    MPI_Comm_size(MPI_COMM_WORLD, n_ranks);
}

static void close_link(void)
{
    MPI_Finalize();
}

static void abort_link(int status)
{
    MPI_Abort(MPI_COMM_WORLD, status);
}

static void send_bytes(int to, const void *p, size_t n, struct team_request *out)
{
    MPI_Request request;

    MPI_Isend(p, (int)n, MPI_BYTE, to, 0, MPI_COMM_WORLD, &request);
    memcpy(out, &request, sizeof request);
}

static bool is_done(struct team_request *request)
{
    MPI_Request r;
    int done;

    memcpy(&r, request, sizeof r);
    MPI_Test(&r, &done, MPI_STATUS_IGNORE);
    memcpy(request, &r, sizeof r);
    return done;
}

static bool look(int *from, size_t *n)
{
    MPI_Status status;
    int there, n_bytes;

    MPI_Improbe(MPI_ANY_SOURCE, 0, MPI_COMM_WORLD, &there, &looked_at, &status);
    if (!there)
        return false;
    MPI_Get_count(&status, MPI_BYTE, &n_bytes);
    *from = status.MPI_SOURCE;
    *n = (size_t)n_bytes;
    return true;
}

static void take(void *p, size_t n)
{
    MPI_Mrecv(p, (int)n, MPI_BYTE, &looked_at, MPI_STATUS_IGNORE);
}

const struct team_link mpi_link = {TEAM_LINK_VERSION, open_link, close_link, abort_link,
                                   send_bytes,        is_done,   look,       take};
