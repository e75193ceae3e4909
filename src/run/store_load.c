/* Owns the order in which weights are read at open: all ranges, in the files' order, in large pieces that begin at block
 * boundaries of both file and memory, so that nothing is copied on the way. On their way to a device pieces stay in a buffer
 * until they have gone up, while the next ones are read. */
#include "src/run/store_load.h"

#include "io/ring.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <inttypes.h>

#define PIECE_BYTES (4 * MIB) /* cost of a call and of a progress report is then lost in that of the bytes */

/* Reads in flight: an NVMe disk comes to its rate with about 8 of 1 to 2 MiB. */
enum { DEPTH = 8 };
#define RING_PIECE_BYTES (1 * MIB)

_Static_assert(DEPTH *RING_PIECE_BYTES <= PLAN_STAGE_BYTES && PIECE_BYTES <= PLAN_STAGE_BYTES,
               "what is under way to a device has room");

/* What is still to be read: from pos on in range r. */
struct walk {
    const struct store_load *l;
    int r;
    uint64_t pos, piece_bytes;
    uint64_t done_bytes, total_bytes;
};

struct piece {
    int file;
    uint64_t off, bytes;
    uint64_t memory_off; /* of its place */
    char *dst;           /* where it is read to: there, or the buffer */
};

/* A file that is whole ends no earlier than its last weight; one that is not makes the read fail. */
static uint64_t read_end(const struct store_load *l, const struct layout_range *r)
{
    uint64_t file_bytes = file_identity(l->files[r->file])->bytes;
    uint64_t end = file_bytes > r->data_end ? file_bytes : r->data_end;
    return r->end < end ? r->end : end;
}

static void walk_init(struct walk *w, const struct store_load *l, uint64_t piece_bytes)
{
    *w = (struct walk){.l = l, .piece_bytes = piece_bytes};
    for (int r = 0; r < l->layout->n_ranges; r++)
        w->total_bytes += read_end(l, &l->layout->ranges[r]) - l->layout->ranges[r].off;
    if (l->layout->n_ranges)
        w->pos = l->layout->ranges[0].off;
}

/* stage: which part of the buffer it shall pass through. */
static bool walk_next(struct walk *w, int stage, struct piece *p)
{
    const struct store_load *l = w->l;

    if (w->r == l->layout->n_ranges)
        return false;
    const struct layout_range *r = &l->layout->ranges[w->r];
    uint64_t left = read_end(l, r) - w->pos;
    *p = (struct piece){.file = r->file,
                        .off = w->pos,
                        .bytes = left < w->piece_bytes ? left : w->piece_bytes,
                        .memory_off = r->memory_off + (w->pos - r->off)};
    p->dst = l->memory + (l->dev ? (uint64_t)stage * w->piece_bytes : p->memory_off);
    w->pos += p->bytes;
    if (p->bytes == left && ++w->r < l->layout->n_ranges)
        w->pos = l->layout->ranges[w->r].off;
    return true;
}

static int report(struct walk *w, uint64_t bytes)
{
    const struct store_args *a = w->l->args;

    w->done_bytes += bytes;
    if (a->progress && !a->progress(w->done_bytes, w->total_bytes, a->progress_arg))
        return err(ERR_CANCEL, "loading was stopped after %" PRIu64 " of %" PRIu64 " bytes", w->done_bytes,
                   w->total_bytes);
    return 0;
}

/* A piece has been read. */
static int take(struct walk *w, const struct piece *p)
{
    const struct store_load *l = w->l;
    int rc = l->dev ? l->dev->ops->upload(l->dev, l->dev_memory + p->memory_off, p->dst, p->bytes) : 0;

    return rc ? rc : report(w, p->bytes);
}

static int load_pread(struct walk *w)
{
    struct piece p;
    int rc = report(w, 0);

    while (!rc && walk_next(w, 0, &p)) {
        rc = file_read(w->l->files[p.file], p.off, p.dst, p.bytes);
        if (!rc)
            rc = take(w, &p);
    }
    return rc;
}

static int open_ring(const struct store_load *l, struct ring **out)
{
    struct ring_file *files = mem_zalloc((size_t)l->n_files, sizeof *files, MEM_META);

    if (!files)
        return err(ERR_NOMEM, "names of %d files", l->n_files);
    for (int i = 0; i < l->n_files; i++)
        files[i] = (struct ring_file){.path = file_path(l->files[i]), .then = file_identity(l->files[i])};
    /* The arena is not registered: the kernel would clear and pin all of it before the first read. */
    int rc = ring_open(&(struct ring_args){.depth = DEPTH,
                                           .files = files,
                                           .n_files = l->n_files,
                                           .fault = l->args->read_fault,
                                           .fault_arg = l->args->read_fault_arg},
                       out);
    mem_free(files);
    return rc;
}

static int submit(struct ring *ring, const struct piece *p, int tag)
{
    return ring_submit(
        ring,
        &(struct ring_read){.file = p->file, .off = p->off, .bytes = p->bytes, .slot = p->dst, .tag = (uint64_t)tag},
        1);
}

static void count_repeats(const struct store_load *l, const struct ring *ring)
{
    struct ring_info info;

    if (!ring)
        return;
    ring_info(ring, &info);
    file_add_repeats(l->files[0], info.n_repeats); /* whose they are does not matter: the store adds up all files */
}

static int load_ring(struct walk *w)
{
    struct ring_done done[DEPTH];
    struct piece flying[DEPTH];
    int idle[DEPTH], n_idle = 0; /* of flying */
    struct ring *ring = NULL;
    int rc = report(w, 0);

    while (n_idle < DEPTH)
        idle[n_idle] = n_idle, n_idle++;
    if (!rc)
        rc = open_ring(w->l, &ring);
    while (!rc) {
        int n_done = 0;
        while (!rc && n_idle && walk_next(w, idle[n_idle - 1], &flying[idle[n_idle - 1]])) {
            n_idle--;
            rc = submit(ring, &flying[idle[n_idle]], idle[n_idle]);
        }
        if (rc || !ring_n_in_flight(ring))
            break;
        rc = ring_wait(ring, 1, done, DEPTH, &n_done);
        for (int i = 0; i < n_done && !rc; i++) {
            rc = done[i].rc; /* the text is that of the last failed read, which is as good */
            if (!rc)
                rc = take(w, &flying[done[i].tag]);
            idle[n_idle++] = (int)done[i].tag;
        }
    }
    count_repeats(w->l, ring);
    ring_close(ring);
    return rc;
}

int store_load_place(const struct plan *plan, void *memory, uint64_t bytes)
{
    enum mem_spread spread = plan->numa == PLAN_NUMA_BOUND ? MEM_BOUND : MEM_INTERLEAVED;

    if (plan->numa == PLAN_NUMA_LEFT || mem_place(memory, bytes, spread, plan->numa_nodes))
        return 0;
    return err(ERR_UNSUPPORTED, "%" PRIu64 " bytes of weights cannot be placed on NUMA nodes (mask %#" PRIx64 ")",
               bytes, plan->numa_nodes);
}

int store_load_run(const struct store_load *l, enum plan_io io, uint64_t *bytes)
{
    struct walk w;

    walk_init(&w, l, io == PLAN_IO_URING ? RING_PIECE_BYTES : PIECE_BYTES);
    int rc = io == PLAN_IO_URING ? load_ring(&w) : load_pread(&w);
    *bytes = w.done_bytes;
    return rc;
}
