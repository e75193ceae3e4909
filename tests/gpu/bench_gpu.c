/* bench_gpu [--quick]: copies, kernels and how well both overlap, on GPU 0, as one JSON object on stdout. Exit status 77: there is no
 * GPU. Times are the GPU's own, between events; each is a median. */
#include "tests/gpu/bench.h"

#include "cuda/cuda.h"
#include "cuda/ops.h"
#include "src/base/err.h"
#include "src/base/size.h"
#ifdef FERRY_TESTS_EMU_CUDA_RUNTIME_API_H
#include "tests/emu/emu.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NO_GPU = 77, N_TIMES = 5 };
/* Room: a gigabyte and a half where the card has it. */
#define MOST_BYTES (1536 * MIB)
#define HOST_BYTES (256 * MIB)
#define QUICK_BYTES (4 * MIB)

int bench_failed(cudaError_t e, const char *what)
{
    return e ? err(ERR_DEVICE, "CUDA: %s: %s", what, cudaGetErrorString(e)) : 0;
}

int bench_take(const struct bench *b, uint64_t *at, uint64_t bytes, void **out)
{
    uint64_t first = size_up(*at, 256);

    if (first > b->dev_bytes || bytes > b->dev_bytes - first)
        return err(ERR_LIMIT, "%llu bytes of the GPU's memory are too little for this",
                   (unsigned long long)b->dev_bytes);
    *out = b->dev + first;
    *at = first + bytes;
    return 0;
}

json_t *bench_row(struct bench *b, const char *name, const char *what, double s)
{
    json_t *row = json_pack("{s:s, s:s, s:f}", "name", name, "what", what, "seconds", s);
    fprintf(stderr, "%-16s %-24s %10.1f us\n", name, what, s * 1e6);
    json_array_append_new(b->rows, row);
    return row;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static cudaError_t time_once(struct bench *b, bench_fn *fn, void *ctx, int n, double *s)
{
    float ms = 0;
    cudaError_t e = cudaEventRecord(b->from, b->stream);

    for (int i = 0; i < n && !e; i++)
        e = fn(b, ctx, i);
    if (!e)
        e = cudaEventRecord(b->to, b->stream);
    if (!e)
        e = cudaEventSynchronize(b->to);
    if (!e)
        e = cudaEventElapsedTime(&ms, b->from, b->to);
    *s = (double)ms / 1e3 / n;
    return e;
}

int bench_time(struct bench *b, bench_fn *fn, void *ctx, int n, double *s)
{
    double times[N_TIMES];
    cudaError_t e = time_once(b, fn, ctx, n, s);

    for (int i = 0; i < N_TIMES && !e; i++)
        e = time_once(b, fn, ctx, n, &times[i]);
    if (e)
        return bench_failed(e, "timing");
    qsort(times, N_TIMES, sizeof *times, by_value);
    *s = times[N_TIMES / 2];
    return 0;
}

static cudaError_t capture(struct bench *b, bench_fn *fn, void *ctx, int n, cudaGraphExec_t *exec)
{
    cudaGraph_t graph = NULL;
    cudaError_t e = cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal);

    if (e)
        return e;
    cu_overlap = b->card.has_bulk ? CU_OVERLAP_FIRST : CU_OVERLAP_NONE;
    for (int i = 0; i < n && !e; i++)
        e = fn(b, ctx, i);
    cu_overlap = CU_OVERLAP_NONE;
    cudaError_t ended = cudaStreamEndCapture(b->stream, &graph); /* in any case */
    e = e ? e : ended;
    if (!e)
        e = cudaGraphInstantiate(exec, graph, 0);
    if (graph)
        cudaGraphDestroy(graph);
    return e;
}

static cudaError_t run_graph(const struct bench *b, void *ctx, int i)
{
    (void)i;
    return cudaGraphLaunch(*(cudaGraphExec_t *)ctx, b->stream);
}

int bench_time_step(struct bench *b, bench_fn *fn, void *ctx, int n, double *s)
{
    cudaGraphExec_t exec = NULL;
    int rc = bench_failed(capture(b, fn, ctx, n, &exec), "a graph");

    if (!rc)
        rc = bench_time(b, run_graph, &exec, 1, s);
    if (exec)
        cudaGraphExecDestroy(exec);
    *s /= n;
    return rc;
}

/* ---- open and close ---- */

static int make_streams(struct bench *b)
{
    cudaError_t e = cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking);

    if (!e)
        e = cudaStreamCreateWithFlags(&b->copy, cudaStreamNonBlocking);
    if (!e)
        e = cudaEventCreateWithFlags(&b->from, cudaEventDefault);
    if (!e)
        e = cudaEventCreateWithFlags(&b->to, cudaEventDefault);
    if (!e)
        e = cudaEventCreateWithFlags(&b->copied, cudaEventDisableTiming);
    return bench_failed(e, "streams");
}

/* Random bytes: zeros are multiplied with less power, and so faster. */
static cudaError_t fill(struct bench *b)
{
    uint64_t random = 1;
    cudaError_t e = cudaSuccess;

    for (uint64_t i = 0; i < b->host_bytes / 8; i++) {
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407;
        memcpy(b->host + 8 * i, &random, sizeof random);
    }
    for (uint64_t at = 0; at < b->dev_bytes && !e; at += b->host_bytes) {
        uint64_t n = b->dev_bytes - at < b->host_bytes ? b->dev_bytes - at : b->host_bytes;
        e = cudaMemcpyAsync(b->dev + at, b->host, n, cudaMemcpyHostToDevice, b->stream);
    }
    return e ? e : cudaStreamSynchronize(b->stream);
}

static int make_room(struct bench *b, uint64_t free_bytes)
{
    int l2_bytes = 0;
    cudaError_t e = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0);

    if (!e)
        e = ops_card(0, DEVICE_PREFILL_BLAS, &b->card);
    b->dev_bytes = free_bytes / 4 * 3 < MOST_BYTES ? free_bytes / 4 * 3 : MOST_BYTES;
    b->host_bytes = b->is_quick ? QUICK_BYTES : HOST_BYTES;
    b->dev_bytes = b->is_quick ? QUICK_BYTES : b->dev_bytes;
    b->cold_bytes = b->is_quick ? 1 : 4 * (uint64_t)l2_bytes > 256 * MIB ? 4 * (uint64_t)l2_bytes : 256 * MIB;
    if (!e)
        e = cudaMalloc((void **)&b->dev, b->dev_bytes);
    if (!e)
        e = cudaHostAlloc((void **)&b->host, b->host_bytes, cudaHostAllocDefault);
    return bench_failed(e ? e : fill(b), "room to work in");
}

static void close_bench(struct bench *b)
{
    cudaFree(b->dev);
    cudaFreeHost(b->host);
    if (b->from)
        cudaEventDestroy(b->from);
    if (b->to)
        cudaEventDestroy(b->to);
    if (b->copied)
        cudaEventDestroy(b->copied);
    if (b->copy)
        cudaStreamDestroy(b->copy);
    if (b->stream)
        cudaStreamDestroy(b->stream);
}

/* ---- a rehearsal ---- */

#ifdef FERRY_TESTS_EMU_CUDA_RUNTIME_API_H
static uint64_t thread_ns(const struct emu_launch *l, void *arg)
{
    (void)arg;
    return (uint64_t)l->grid.x * l->grid.y * l->grid.z * l->block.x;
}

/* A card that copies 10 GB/s each way and takes a nanosecond for each thread. */
static const char *rehearse(void)
{
    struct emu_rates r = {.op_ns = 1000, .kernel_ns = thread_ns};
    r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = r.bytes_per_s[EMU_COMPUTE] = 1e10;
    emu_clock(&r);
    return "the virtual clock of tests/emu: no figure here says anything about a GPU";
}
#else
static const char *rehearse(void)
{
    return "GPU";
}
#endif

static int print(const struct bench *b, const char *clock)
{
    json_t *o = json_pack("{s:s, s:b, s:{s:f, s:f, s:f, s:f, s:f}, s:O}", "clock", clock, "quick", b->is_quick, "roofs",
                          "read_bytes_per_s", b->read_bytes_per_s, "dp4a_ops_per_s", b->dp4a_ops_per_s,
                          "mma_flops_per_s", b->mma_flops_per_s, "up_bytes_per_s", b->up_bytes_per_s,
                          "down_bytes_per_s", b->down_bytes_per_s, "rows", b->rows);
    int rc = o && !json_dumpf(o, stdout, JSON_INDENT(2)) ? 0 : err(ERR_NOMEM, "the report as JSON");
    putchar('\n');
    json_decref(o);
    return rc;
}

int main(int argc, char **argv)
{
    struct bench b = {.is_quick = argc == 2 && !strcmp(argv[1], "--quick"), .rows = json_array()};
    uint64_t free_bytes = 0, total_bytes = 0;

    if (argc > 2 || (argc == 2 && !b.is_quick)) {
        fprintf(stderr, "bench_gpu [--quick]\n");
        return 2;
    }
    if (cuda_memory(0, &free_bytes, &total_bytes)) {
        fprintf(stderr, "no GPU that ferry can use: %s\n", err_text());
        return NO_GPU;
    }
    const char *clock = rehearse();
    int rc = make_streams(&b);
    if (!rc)
        rc = make_room(&b, free_bytes);
    if (!rc)
        rc = bench_copy_rates(&b);
    if (!rc)
        rc = bench_kernels_roofs(&b);
    if (!rc)
        rc = bench_kernels(&b);
    if (!rc)
        rc = bench_copy_overlap(&b);
    if (!rc)
        rc = print(&b, clock);
    if (rc)
        fprintf(stderr, "%s\n", err_text());
    close_bench(&b);
    json_decref(b.rows);
    return rc ? 1 : 0;
}
