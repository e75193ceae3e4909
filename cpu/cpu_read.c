/* Measures how fast memory can be read: the roof of decoding. Sums of squares, by the widest vectors there are, leave the
 * loads to set the pace. */
#include "cpu/cpu.h"

#include "cpu/isa.h"
#include "cpu/kern.h"
#include "cpu/pool.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <inttypes.h>

/* What a worker takes at a time: far more than a page, far less than its share. */
#define PIECE_BYTES (1 * MIB)
#define PIECE_LEN ((int64_t)(PIECE_BYTES / sizeof(float)))

struct sweep {
    struct pool *pool;
    const struct kern_table *kern;
    float *data;
    uint64_t n_pieces;
    _Alignas(64) float sums[POOL_MAX_THREADS]; /* keeps the loads from being optimised away */
};

static void read_pieces(int worker, void *arg)
{
    struct sweep *s = arg;
    float sum = 0;

    for (int64_t i; (i = pool_claim(s->pool, worker, (int64_t)s->n_pieces)) < (int64_t)s->n_pieces;)
        sum += s->kern->sum_sq(s->data + i * PIECE_LEN, PIECE_LEN);
    s->sums[worker] = sum;
}

/* Every page must be there before the clock starts; each worker touches what it is likely to read. */
static void touch_pieces(int worker, void *arg)
{
    struct sweep *s = arg;

    for (int64_t i; (i = pool_claim(s->pool, worker, (int64_t)s->n_pieces)) < (int64_t)s->n_pieces;)
        for (int64_t at = 0; at < PIECE_LEN; at += 1024)
            s->data[i * PIECE_LEN + at] = 1;
}

int cpu_read_rate(int n_threads, uint64_t bytes, int n_reps, double *out_bytes_per_s)
{
    struct sweep *s = NULL;
    struct pool *pool = NULL;
    const struct kern_table *kern;
    void *data = NULL;
    int rc;

    *out_bytes_per_s = 0;
    bytes = bytes / PIECE_BYTES * PIECE_BYTES;
    if (!bytes || n_reps < 1)
        return err(ERR_ARG, "memory rate: %d sweeps over %" PRIu64 " bytes", n_reps, bytes);
    rc = isa_choose(NULL, &kern);
    if (rc == 0)
        rc = pool_open(n_threads, true, &pool);
    if (rc < 0)
        return rc;
    s = mem_zalloc(1, sizeof *s, MEM_OTHER);
    data = mem_map(bytes, MEM_OTHER);
    if (!s || !data) {
        rc = err(ERR_NOMEM, "memory rate: %" PRIu64 " bytes", bytes);
        goto out;
    }
    *s = (struct sweep){.pool = pool, .kern = kern, .data = data, .n_pieces = bytes / PIECE_BYTES};
    pool_run(pool, touch_pieces, s);
    for (int rep = 0; rep < n_reps; rep++) {
        uint64_t begin_ns = clock_ns();
        pool_run(pool, read_pieces, s);
        double rate = (double)bytes / ((double)(clock_ns() - begin_ns) * 1e-9);
        *out_bytes_per_s = rate > *out_bytes_per_s ? rate : *out_bytes_per_s;
    }
out:
    mem_unmap(data, bytes, MEM_OTHER);
    mem_free(s);
    pool_close(pool);
    return rc;
}
