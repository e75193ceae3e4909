/* Copies alone, and beside kernels. */
#include "tests/gpu/bench.h"

#include "src/base/err.h"
#include "src/base/size.h"
#include "tests/gpu/roof.h"

#include <stdio.h>

enum { N_RATIOS = 4 };
/* Copy over compute. */
static const double ratios[N_RATIOS] = {0.25, 0.5, 0.9, 1.5};
#define COMPUTE_BYTES (64 * MIB)

struct copy {
    enum cudaMemcpyKind kind;
    uint64_t bytes;
};

static cudaError_t run_copy(const struct bench *b, void *ctx, int i)
{
    const struct copy *c = ctx;
    bool is_up = c->kind == cudaMemcpyHostToDevice;

    (void)i;
    return cudaMemcpyAsync(is_up ? b->dev : b->host, is_up ? b->host : b->dev, c->bytes, c->kind, b->stream);
}

int bench_copy_rates(struct bench *b)
{
    static const char *const names[2] = {"pinned, up", "pinned, down"};
    double *to[2] = {&b->up_bytes_per_s, &b->down_bytes_per_s};
    int rc = 0;

    for (int i = 0; i < 2 && !rc; i++) {
        struct copy c = {i ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, b->host_bytes};
        double s = 0;
        rc = bench_time(b, run_copy, &c, 1, &s);
        if (rc)
            break;
        *to[i] = (double)c.bytes / s;
        json_object_set_new(bench_row(b, "copy", names[i], s), "bytes_per_s", json_real(*to[i]));
    }
    return rc;
}

/* ---- both at once ---- */

/* Kernels that read memory as decoding does, or multiply by tensor cores as prompts do, and a copy of so many bytes on the other
 * stream. */
struct both {
    cudaError_t (*kernel)(const struct roof_args *a, cudaStream_t stream);
    int n_kernels, n_rounds;
    uint64_t kernel_bytes, copy_bytes; /* of one kernel; 0: no copy */
};

/* From the first event to the last, which waits for the other stream: exec's own way of going on after a copy. */
static cudaError_t run_both(const struct bench *b, void *ctx, int i)
{
    const struct both *o = ctx;
    const uint64_t half = b->dev_bytes / 2, most = b->host_bytes < half ? b->host_bytes : half;
    struct roof_args a = {.in = b->dev + half,
                          .out = (uint32_t *)b->dev,
                          .n_bytes = o->kernel_bytes,
                          .n_rounds = o->n_rounds,
                          .n_blocks = b->card.n_multiprocessors * 8};
    cudaError_t e = cudaStreamWaitEvent(b->copy, b->from, 0);

    (void)i;
    for (uint64_t at = 0; at < o->copy_bytes && !e; at += most) {
        uint64_t n = o->copy_bytes - at < most ? o->copy_bytes - at : most;
        e = cudaMemcpyAsync(b->dev, b->host, n, cudaMemcpyHostToDevice, b->copy);
    }
    if (!e)
        e = cudaEventRecord(b->copied, b->copy);
    for (int k = 0; k < o->n_kernels && !e; k++)
        e = o->kernel(&a, b->stream);
    return e ? e : cudaStreamWaitEvent(b->stream, b->copied, 0);
}

static int bench_overlap_with(struct bench *b, const char *name, struct both o)
{
    double compute_s = 0;
    int rc = bench_time(b, run_both, &o, 1, &compute_s);

    for (int i = 0; i < N_RATIOS && !rc; i++) {
        struct both copy = {.kernel = o.kernel}, both = o;
        double copy_s = 0, both_s = 0;
        char what[48];
        both.copy_bytes = copy.copy_bytes = (uint64_t)(ratios[i] * compute_s * b->up_bytes_per_s) + 1;
        rc = bench_time(b, run_both, &copy, 1, &copy_s);
        if (!rc)
            rc = bench_time(b, run_both, &both, 1, &both_s);
        if (rc)
            break;
        snprintf(what, sizeof what, "copy/%s %.2f", name, copy_s / compute_s);
        json_t *row = bench_row(b, "overlap", what, both_s);
        json_object_set_new(row, "copy_s", json_real(copy_s));
        json_object_set_new(row, "compute_s", json_real(compute_s));
        /* Of the copy's time, what the row did not take longer for it. */
        json_object_set_new(row, "hidden_share", json_real((compute_s + copy_s - both_s) / copy_s));
        json_object_set_new(row, "could_be_hidden", json_real(copy_s < compute_s ? 1 : compute_s / copy_s));
    }
    return rc;
}

int bench_copy_overlap(struct bench *b)
{
    struct both reads = {.kernel = roof_read, .n_kernels = b->is_quick ? 2 : 32};
    struct both products = {.kernel = roof_mma, .n_kernels = b->is_quick ? 2 : 8, .n_rounds = b->is_quick ? 2 : 1000};

    reads.kernel_bytes = COMPUTE_BYTES < b->dev_bytes / 2 ? COMPUTE_BYTES : b->dev_bytes / 2;
    int rc = bench_overlap_with(b, "reads", reads);
    return rc ? rc : bench_overlap_with(b, "products", products);
}
