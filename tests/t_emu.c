/* The emulated CUDA runtime: what it must catch, caught. Kernels here are plain functions of one thread. */
#include "tests/emu/emu.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 256, WARP = 32, N_SEEDS = 40 };

#ifdef HAVE_ASAN
/* The signal of a forbidden read is what a test waits for. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "handle_segv=0";
}
#endif

static cudaStream_t stream_make(void)
{
    cudaStream_t s;
    ck_assert_int_eq(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), cudaSuccess);
    return s;
}

static float *device_make(size_t n)
{
    void *p;
    ck_assert_int_eq(cudaMalloc(&p, n * sizeof(float)), cudaSuccess);
    return p;
}

static float *pinned_make(size_t n)
{
    void *p;
    ck_assert_int_eq(cudaHostAlloc(&p, n * sizeof(float), cudaHostAllocDefault), cudaSuccess);
    return p;
}

/* What every kernel here gets. */
struct args {
    float *out;
    const float *in;
    int way;
};

static void launch(void (*call)(const void *), struct args args, unsigned n_blocks, size_t shared_bytes, cudaStream_t s)
{
    struct emu_launch l = {.name = "kernel of t_emu",
                           .grid = {n_blocks, 1, 1},
                           .block = {N, 1, 1},
                           .shared_bytes = shared_bytes,
                           .call = call,
                           .closure = &args,
                           .closure_bytes = sizeof args};
    ck_assert_int_eq(emu_launch(&l, s), cudaSuccess);
}

static void download(float *host, const float *dev, size_t n, cudaStream_t s)
{
    ck_assert_int_eq(cudaMemcpyAsync(host, dev, n * sizeof *host, cudaMemcpyDeviceToHost, s), cudaSuccess);
    ck_assert_int_eq(cudaStreamSynchronize(s), cudaSuccess);
}

/* ---- streams and events ---- */

static void twice(const void *p)
{
    const struct args *a = p;
    unsigned i = emu_here.block_idx.x * N + emu_here.thread_idx.x;
    a->out[i] = 2 * a->in[i];
}

enum { N_PIECES = 5, MAX_BUFFERS = 2 };

/* The way of every engine with a copy stream: a few pieces go through one or two buffers. The copy waits until the buffer was read,
 * the kernel until it was filled. drop: the wait to leave out; 0: none. Returns how many results are wrong. */
static int pipeline(uint64_t seed, int n_buffers, int drop)
{
    const int n_waits = 2 * N_PIECES - n_buffers;
    cudaStream_t copy = stream_make(), compute = stream_make();
    float *host = pinned_make(N_PIECES * N), *back = pinned_make(N_PIECES * N), *out = device_make(N_PIECES * N);
    float *buffer = device_make(MAX_BUFFERS * N);
    cudaEvent_t filled[MAX_BUFFERS], read[MAX_BUFFERS];
    int n_wrong = 0;

    for (int i = 0; i < n_buffers; i++) {
        cudaEventCreateWithFlags(&filled[i], cudaEventDisableTiming);
        cudaEventCreateWithFlags(&read[i], cudaEventDisableTiming);
    }
    for (int i = 0; i < N_PIECES * N; i++)
        host[i] = (float)i;
    emu_seed(seed);
    emu_drop_wait(drop);
    for (int i = 0; i < N_PIECES; i++) {
        int b = i % n_buffers;
        if (i >= n_buffers)
            cudaStreamWaitEvent(copy, read[b], 0);
        cudaMemcpyAsync(buffer + b * N, host + i * N, N * sizeof *host, cudaMemcpyHostToDevice, copy);
        cudaEventRecord(filled[b], copy);
        cudaStreamWaitEvent(compute, filled[b], 0);
        launch(twice, (struct args){out + i * N, buffer + b * N, 0}, 1, 0, compute);
        cudaEventRecord(read[b], compute);
    }
    emu_drop_wait(0);
    ck_assert_int_le(drop, n_waits);
    download(back, out, N_PIECES * N, compute);
    for (int i = 0; i < N_PIECES * N; i++)
        n_wrong += !(back[i] == 2 * (float)i);
    for (int i = 0; i < n_buffers; i++) {
        cudaEventDestroy(filled[i]);
        cudaEventDestroy(read[i]);
    }
    cudaFree(buffer);
    cudaFree(out);
    cudaFreeHost(back);
    cudaFreeHost(host);
    cudaStreamDestroy(compute);
    cudaStreamDestroy(copy);
    return n_wrong;
}

/* Copies up that may not run before nothing else can are too late for each kernel that does not wait for them, by whatever seed. */
START_TEST(starved_engine_comes_in_time)
{
    emu_starve(EMU_UP);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        ck_assert_int_eq(pipeline(seed, 2, 0), 0);
        ck_assert_int_gt(pipeline(seed, 2, 1), 0); /* the first kernel's wait */
    }
    emu_starve(EMU_N_ENGINES);
}
END_TEST

START_TEST(orders_that_events_allow_change_a_result)
{
    for (uint64_t seed = 1; seed <= N_SEEDS; seed++)
        ck_assert_msg(pipeline(seed, 2, 0) == 0, "seed %d", (int)seed);
}
END_TEST

/* Which waits there are: filled 0, filled 1, then read and filled in turn. */
START_TEST(left_out_wait_goes_unnoticed)
{
    int n_noticed = 0;
    for (uint64_t seed = 1; seed <= N_SEEDS; seed++)
        n_noticed += pipeline(seed, 2, _i) > 0;
    ck_assert_msg(n_noticed > 0, "wait %d was left out, and no seed of %d showed it", _i, N_SEEDS);
}
END_TEST

START_TEST(queued_work_runs_before_somebody_waits)
{
    cudaStream_t s = stream_make();
    float *host = pinned_make(N), *dev = device_make(N);
    cudaEvent_t event;

    host[0] = 1;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    cudaMemcpyAsync(dev, host, sizeof *host, cudaMemcpyHostToDevice, s);
    cudaEventRecord(event, s);
    ck_assert_int_eq(cudaEventQuery(event), cudaErrorNotReady);
    host[0] = 2; /* too early: the copy reads pinned memory when it runs */
    cudaEventSynchronize(event);
    ck_assert_int_eq(cudaEventQuery(event), cudaSuccess);
    download(host, dev, 1, s);
    ck_assert(host[0] == 2);
    cudaEventDestroy(event);
    cudaFreeHost(host);
    cudaFree(dev);
    cudaStreamDestroy(s);
}
END_TEST

/* ---- memory ---- */

START_TEST(fresh_memory_is_a_number)
{
    cudaStream_t s = stream_make();
    float *host = pinned_make(N), *dev = device_make(N);

    memset(host, 0, N * sizeof *host);
    download(host, dev, N, s);
    for (int i = 0; i < N; i++)
        ck_assert(isnan(host[i]));
    cudaFreeHost(host);
    cudaFree(dev);
    cudaStreamDestroy(s);
}
END_TEST

START_TEST(host_reads_device_memory)
{
    float *dev = device_make(N);
    volatile float x = *(volatile float *)dev;
    (void)x;
}
END_TEST

START_TEST(limit_of_memory_is_passed)
{
    void *a, *b;

    emu_set_vram(1000);
    ck_assert_int_eq(cudaMalloc(&a, 600), cudaSuccess);
    ck_assert_int_eq(cudaMalloc(&b, 600), cudaErrorMemoryAllocation);
    ck_assert_ptr_null(b);
    ck_assert_uint_eq(emu_device_bytes(), 600);
    cudaFree(a);
    ck_assert_int_eq(cudaMalloc(&b, 600), cudaSuccess);
    cudaFree(b);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

START_TEST(nth_call_succeeds)
{
    void *p;

    emu_fail_nth(2);
    ck_assert_int_eq(cudaMalloc(&p, 8), cudaSuccess);
    cudaFree(p);
    ck_assert_int_eq(cudaMalloc(&p, 8), cudaErrorMemoryAllocation);
    ck_assert_int_eq(emu_n_calls(), 2);
    ck_assert_int_eq(cudaMalloc(&p, 8), cudaSuccess);
    cudaFree(p);
}
END_TEST

static void write_one_more(const void *p)
{
    const struct args *a = p;
    if (emu_here.thread_idx.x == 0)
        a->out[N] = 1;
}

START_TEST(write_past_the_end_goes_unnoticed)
{
    cudaStream_t s = stream_make();
    float *dev = device_make(N);

    launch(write_one_more, (struct args){dev, NULL, 0}, 1, 0, s);
    cudaStreamSynchronize(s);
    cudaFree(dev);
}
END_TEST

START_TEST(copy_past_the_end_goes_unnoticed)
{
    cudaStream_t s = stream_make();
    float *dev = device_make(N), *host = pinned_make(N + 1);
    cudaMemcpyAsync(dev, host, (N + 1) * sizeof *host, cudaMemcpyHostToDevice, s);
}
END_TEST

/* ---- inside a step ---- */

static void step_malloc(float *dev)
{
    void *p;
    (void)dev;
    cudaMalloc(&p, 8);
}

static void step_free(float *dev)
{
    cudaFree(dev);
}

static void step_wait_for_all(float *dev)
{
    (void)dev;
    cudaDeviceSynchronize();
}

/* To memory that is not pinned: the driver waits for it. */
static void step_download(float *dev)
{
    float host[N];
    cudaMemcpyAsync(host, dev, sizeof host, cudaMemcpyDeviceToHost, stream_make());
}

static void (*const in_step[])(float *) = {step_malloc, step_free, step_wait_for_all, step_download};

START_TEST(what_a_step_must_not_do_goes_unnoticed)
{
    float *dev = device_make(N);
    emu_in_step(true);
    in_step[_i](dev);
}
END_TEST

/* ---- threads ---- */

/* out[block] = sum of the block's part of in: first by warps, then over shared memory. */
static void sum(const void *p)
{
    const struct args *a = p;
    unsigned t = emu_here.thread_idx.x;
    float x = a->in[emu_here.block_idx.x * N + t], *part = (float *)emu_here.shared;

    for (unsigned step = WARP / 2; step; step /= 2) {
        const float *all = emu_warp(&x, sizeof x);
        x += all[t % WARP ^ step];
    }
    if (t % WARP == 0)
        part[t / WARP] = x;
    emu_barrier();
    if (t == 0) {
        for (int i = 1; i < N / WARP; i++)
            x += part[i];
        a->out[emu_here.block_idx.x] = x;
    }
}

START_TEST(exchanges_and_barriers_mix_up_threads)
{
    enum { BLOCKS = 7 };
    cudaStream_t s = stream_make();
    float *host = pinned_make(BLOCKS * N), *in = device_make(BLOCKS * N), *out = device_make(BLOCKS);

    for (int i = 0; i < BLOCKS * N; i++)
        host[i] = (float)i;
    cudaMemcpyAsync(in, host, BLOCKS * N * sizeof *host, cudaMemcpyHostToDevice, s);
    for (uint64_t seed = 1; seed < 10; seed++) {
        emu_seed(seed);
        launch(sum, (struct args){out, in, 0}, BLOCKS, N / WARP * sizeof(float), s);
        download(host, out, BLOCKS, s);
        for (int b = 0; b < BLOCKS; b++) /* of 256 numbers from 256 b on; all sums are whole and below 2^24 */
            ck_assert(host[b] == (float)(N * b * N + N * (N - 1) / 2));
    }
    ck_assert_uint_eq(emu_n_launches(), 9);
    cudaFreeHost(host);
    cudaFree(in);
    cudaFree(out);
    cudaStreamDestroy(s);
}
END_TEST

/* Bulk copies that would never be there, or that nobody waits for. */
static void land(const struct args *a, int way)
{
    struct emu_landing *l = (struct emu_landing *)(emu_here.shared + 48);

    emu_landing_init(l);
    if (way != 6) /* 6: nothing is expected */
        emu_landing_expect(l, way == 7 ? 16 : 32);
    if (way == 8)
        emu_landing_expect(l, 32);
    emu_bulk_copy(emu_here.shared, way == 9 ? (const char *)a->in + 8 : (const char *)a->in, way == 10 ? 24 : 32, l);
    if (way != 11)
        emu_landing_wait(l, 0);
}

/* One way each of being wrong. */
static void misbehave(const void *p)
{
    const struct args *a = p;
    unsigned t = emu_here.thread_idx.x;

    if (a->way == 0 && t != 77) /* a thread returns before a barrier */
        emu_barrier();
    if (a->way == 1 && t % WARP != 3) /* a lane stays away from an exchange */
        emu_warp(&t, sizeof t);
    if (a->way == 2) /* some wait at a barrier, a warp elsewhere */
        (void)(t < WARP ? emu_warp(&t, sizeof t) : (emu_barrier(), NULL));
    if (a->way == 3) /* shared memory ends at 64 bytes */
        emu_here.shared[64] = 1;
    if (a->way == 4) { /* a copy that nobody waits for */
        emu_async_copy(emu_here.shared, a->in, 16);
        emu_async_commit();
    }
    if (a->way == 5)
        emu_async_copy(emu_here.shared + 4, a->in, 16);
    if (a->way >= 6 && t == 0)
        land(a, a->way);
}
enum { N_WAYS = 12 };

START_TEST(misbehaving_threads_go_unnoticed)
{
    cudaStream_t s = stream_make();
    float *dev = device_make(N);
    launch(misbehave, (struct args){dev, dev, _i}, 1, 64, s);
    cudaStreamSynchronize(s);
    exit(0);
}
END_TEST

/* out[0] before waiting, out[1] after one group, out[2] after all. */
static void copy_late(const void *p)
{
    const struct args *a = p;
    float *x = (float *)emu_here.shared;

    if (emu_here.thread_idx.x)
        return;
    for (int i = 0; i < 2; i++) {
        emu_async_copy(x + 4 * i, a->in + 4 * i, 16);
        emu_async_commit();
    }
    a->out[0] = x[0];
    emu_async_wait(1);
    a->out[1] = x[0];
    a->out[2] = x[4];
    emu_async_wait(0);
    a->out[3] = x[4];
}

/* What a kernel that reads 0, 1, 2, ... asynchronously gives (n_out), by every seed; in some runs, and not in all, its first result comes
 * before the number is there. */
static void run_late(void (*kernel)(const void *), size_t shared_bytes, size_t n_out,
                     void (*check)(const float *out, bool is_late))
{
    cudaStream_t s = stream_make();
    float *host = pinned_make(N), *in = device_make(N), *out = device_make(N);
    int n_late = 0;

    for (int i = 0; i < N; i++)
        host[i] = (float)i;
    cudaMemcpyAsync(in, host, N * sizeof *host, cudaMemcpyHostToDevice, s);
    for (uint64_t seed = 1; seed <= N_SEEDS; seed++) {
        emu_seed(seed);
        launch(kernel, (struct args){out, in, 0}, 1, shared_bytes, s);
        download(host, out, n_out, s);
        bool is_late = isnan(host[0]);
        check(host, is_late);
        n_late += is_late;
    }
    ck_assert(n_late > 0 && n_late < N_SEEDS);
    cudaFreeHost(host);
    cudaFree(in);
    cudaFree(out);
    cudaStreamDestroy(s);
}

static void check_copied(const float *out, bool is_late)
{
    ck_assert(is_late == isnan(out[2]) && (is_late || (out[0] == 0 && out[2] == 4)));
    ck_assert(out[1] == 0 && out[3] == 4);
}

START_TEST(asynchronous_copies_come_when_nobody_expects_them)
{
    run_late(copy_late, 32, 4, check_copied);
}
END_TEST

/* Two uses of a landing; out[i]: before, after the first wait, after another wait for it, after the second. */
static void land_late(const void *p)
{
    const struct args *a = p;
    float *x = (float *)emu_here.shared;
    struct emu_landing *l = (struct emu_landing *)(emu_here.shared + 48);

    if (emu_here.thread_idx.x)
        return;
    emu_landing_init(l);
    for (uint32_t i = 0; i < 2; i++) {
        emu_landing_expect(l, 32);
        emu_bulk_copy(x, a->in + 8 * i, 16, l);
        emu_bulk_copy(x + 4, a->in + 8 * i + 4, 16, l);
        a->out[4 * i] = x[7];
        emu_landing_wait(l, i);
        a->out[4 * i + 1] = x[7];
        emu_landing_wait(l, i);
        a->out[4 * i + 2] = x[0];
    }
}

static void check_landed(const float *out, bool is_late)
{
    ck_assert(is_late ? out[4] == 7 : out[0] == 7 && out[4] == 15);
    ck_assert(out[1] == 7 && out[2] == 0 && out[5] == 15 && out[6] == 8);
}

START_TEST(bulk_copies_come_when_nobody_expects_them)
{
    run_late(land_late, 64, 8, check_landed);
}
END_TEST

/* ---- early kernels ---- */

/* out[0]: read before the kernel ahead has ended; [1]: asked for then; [2]: asked for in bulk; [3]: read behind that. */
static void read_early(const void *p)
{
    const struct args *a = p;
    float *x = (float *)emu_here.shared;
    struct emu_landing *l = (struct emu_landing *)(emu_here.shared + 32);
    float early = a->in[0];

    if (emu_here.thread_idx.x) {
        emu_await();
        return;
    }
    emu_landing_init(l);
    emu_landing_expect(l, 16);
    emu_bulk_copy(x, a->in, 16, l);
    emu_async_copy(x + 4, a->in, 16);
    emu_async_commit();
    emu_await();
    emu_async_wait(0);
    emu_landing_wait(l, 0);
    a->out[0] = early;
    a->out[1] = x[4];
    a->out[2] = x[0];
    a->out[3] = a->in[0];
}

START_TEST(kernel_that_begins_early_sees_what_is_not_there_yet)
{
    cudaStream_t s = stream_make();
    float *host = pinned_make(N), *in = device_make(N), *twice_in = device_make(N), *out = device_make(N);

    for (int i = 0; i < N; i++)
        host[i] = 5;
    cudaMemcpyAsync(in, host, N * sizeof *host, cudaMemcpyHostToDevice, s);
    cudaMemcpyAsync(twice_in, host, N * sizeof *host, cudaMemcpyHostToDevice, s);
    launch(twice, (struct args){twice_in, in, 0}, 1, 0, s);
    struct args args = {out, twice_in, 0};
    struct emu_launch l = {.name = "early kernel of t_emu",
                           .grid = {1, 1, 1},
                           .block = {N, 1, 1},
                           .shared_bytes = 64,
                           .call = read_early,
                           .closure = &args,
                           .closure_bytes = sizeof args,
                           .is_early = true};
    ck_assert_int_eq(emu_launch(&l, s), cudaSuccess);
    download(host, out, 4, s);
    ck_assert(host[0] == 5 && host[1] == 5 && host[2] == 5 && host[3] == 10);
    l.is_early = false;
    ck_assert_int_eq(emu_launch(&l, s), cudaSuccess);
    download(host, out, 4, s);
    ck_assert(host[0] == 10 && host[1] == 10 && host[2] == 10 && host[3] == 10);
    cudaFreeHost(host);
    cudaFree(in);
    cudaFree(twice_in);
    cudaFree(out);
    cudaStreamDestroy(s);
}
END_TEST

/* ---- graphs ---- */

/* The kernels of three launches: b = 2 a, c = 2 b, a = 2 c. */
static cudaGraphExec_t three_kernels(float *a, float *b, float *c, cudaStream_t s)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;

    ck_assert_int_eq(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    launch(twice, (struct args){b, a, 0}, 1, 0, s);
    launch(twice, (struct args){c, b, 0}, 1, 0, s);
    launch(twice, (struct args){a, c, 0}, 1, 0, s);
    ck_assert_int_eq(cudaStreamEndCapture(s, &graph), cudaSuccess);
    ck_assert_int_eq(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    ck_assert_int_eq(cudaGraphDestroy(graph), cudaSuccess);
    return exec;
}

/* What is captured does not run; what is launched runs in the stream's order, as often as it was launched, be the graph destroyed or
 * not. */
START_TEST(graph_runs_when_it_was_not_launched)
{
    cudaStream_t s = stream_make(), other = stream_make();
    float *host = pinned_make(N), *a = device_make(N), *b = device_make(N), *c = device_make(N);
    int n_live = emu_n_live();

    host[7] = 1;
    cudaMemcpyAsync(a, host, N * sizeof *host, cudaMemcpyHostToDevice, s);
    emu_in_step(true);
    cudaGraphExec_t exec = three_kernels(a, b, c, s);
    ck_assert_int_eq(emu_n_live(), n_live + 1);
    launch(twice, (struct args){c, c, 0}, 1, 0, other); /* another stream goes on meanwhile */
    download(host, a, N, s);
    ck_assert(host[7] == 1);
    ck_assert_uint_le(emu_n_launches(), 1);
    cudaStreamSynchronize(other);
    for (int i = 0; i < 2; i++)
        ck_assert_int_eq(cudaGraphLaunch(exec, s), cudaSuccess);
    cudaGraphExecDestroy(exec);
    download(host, a, N, s);
    emu_in_step(false);
    ck_assert(host[7] == 64);
    ck_assert_uint_eq(emu_n_launches(), 3); /* a graph is one */
    cudaFree(c);
    cudaFree(b);
    cudaFree(a);
    cudaFreeHost(host);
    cudaStreamDestroy(other);
    cudaStreamDestroy(s);
    ck_assert_int_eq(emu_n_live(), 0);
}
END_TEST

/* What a captured stream cannot be asked for. */
static cudaError_t ask(int way, float *dev, float *host, cudaEvent_t event, cudaStream_t s)
{
    switch (way) {
    case 0:
        return cudaMemcpyAsync(dev, host, sizeof *dev, cudaMemcpyHostToDevice, s);
    case 1:
        return cudaMemsetAsync(dev, 0, sizeof *dev, s);
    case 2:
        return cudaEventRecord(event, s);
    case 3:
        return cudaStreamWaitEvent(s, event, 0);
    case 4:
        return cudaStreamSynchronize(s);
    default:
        return cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
    }
}
enum { N_ASKED = 6 };

/* It is refused, there is no graph, and the stream is as before. */
START_TEST(captured_stream_does_what_it_cannot)
{
    cudaStream_t s = stream_make();
    float *host = pinned_make(N), *dev = device_make(N);
    cudaEvent_t event;
    cudaGraph_t graph;

    host[0] = 3;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    int n_live = emu_n_live();
    ck_assert_int_eq(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    launch(twice, (struct args){dev, dev, 0}, 1, 0, s);
    ck_assert_int_eq(ask(_i, dev, host, event, s), cudaErrorStreamCaptureUnsupported);
    ck_assert_int_eq(cudaStreamEndCapture(s, &graph), cudaErrorStreamCaptureInvalidated);
    ck_assert_ptr_null(graph);
    ck_assert_int_eq(cudaStreamEndCapture(s, &graph), cudaErrorInvalidValue);
    ck_assert_int_eq(emu_n_live(), n_live);
    cudaMemcpyAsync(dev, host, N * sizeof *host, cudaMemcpyHostToDevice, s);
    launch(twice, (struct args){dev, dev, 0}, 1, 0, s);
    download(host, dev, N, s);
    ck_assert(host[0] == 6);
    cudaEventDestroy(event);
    cudaFree(dev);
    cudaFreeHost(host);
    cudaStreamDestroy(s);
}
END_TEST

START_TEST(capture_lets_memory_be_taken)
{
    void *p;

    cudaStreamBeginCapture(stream_make(), cudaStreamCaptureModeThreadLocal);
    cudaMalloc(&p, 8);
}
END_TEST

/* Each call of making and launching a graph fails in turn; nothing is left, and the stream is not captured any more. */
START_TEST(failed_call_of_a_graph_leaves_something)
{
    static const cudaError_t says[] = {cudaErrorUnknown, cudaErrorUnknown, cudaErrorMemoryAllocation,
                                       cudaErrorLaunchFailure};
    cudaStream_t s = stream_make();
    int n_live = emu_n_live();
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;

    emu_fail_nth(1 + _i);
    cudaError_t e = cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
    if (!e)
        e = cudaStreamEndCapture(s, &graph);
    if (!e)
        e = cudaGraphInstantiate(&exec, graph, 0);
    if (!e)
        e = cudaGraphLaunch(exec, s);
    ck_assert_int_eq(e, says[_i]);
    ck_assert_int_eq(emu_n_calls(), 1 + _i);
    ck_assert_int_eq(graph != NULL, _i > 1);
    ck_assert_int_eq(exec != NULL, _i > 2);
    if (exec)
        cudaGraphExecDestroy(exec);
    if (graph)
        cudaGraphDestroy(graph);
    ck_assert_int_eq(emu_n_live(), n_live);
    ck_assert_int_eq(cudaStreamSynchronize(s), cudaSuccess);
    cudaStreamDestroy(s);
}
END_TEST

/* ---- the virtual clock ---- */

/* One piece of the pipeline comes up in (up_ns) and takes the kernel so long; going down takes nothing. */
struct speeds {
    uint64_t up_ns, kernel_ns;
};

static uint64_t kernel_ns(const struct emu_launch *l, void *arg)
{
    ck_assert_str_eq(l->name, "kernel of t_emu");
    ck_assert_ptr_nonnull(((const struct args *)l->closure)->out);
    return ((const struct speeds *)arg)->kernel_ns;
}

static void clock_of(struct speeds *s)
{
    struct emu_rates r = {.kernel_ns = kernel_ns, .arg = s};
    r.bytes_per_s[EMU_UP] = (double)(N * sizeof(float)) * 1e9 / (double)s->up_ns;
    emu_clock(&r);
}

/* Pieces through n_buffers; what it must take: where the copy is shorter it is hidden but for the first, where it is longer the kernel
 * is but for the last, and with one buffer nothing is. */
static const struct {
    struct speeds speeds;
    int n_buffers;
    uint64_t ns;
} golden[] = {
    {{1000, 3000}, 2, 1000 + N_PIECES * 3000},  {{3000, 1000}, 2, N_PIECES * 3000 + 1000},
    {{2000, 2000}, 2, (N_PIECES + 1) * 2000},   {{1000, 3000}, 1, N_PIECES *(1000 + 3000)},
    {{3000, 1000}, 1, N_PIECES *(3000 + 1000)},
};

START_TEST(schedule_takes_another_time)
{
    struct speeds speeds = golden[_i].speeds;

    clock_of(&speeds);
    ck_assert_int_eq(pipeline(1, golden[_i].n_buffers, 0), 0);
    ck_assert_uint_eq(emu_now_ns(), golden[_i].ns);
    ck_assert_uint_eq(emu_busy_ns(EMU_UP), N_PIECES * speeds.up_ns);
    ck_assert_uint_eq(emu_busy_ns(EMU_COMPUTE), N_PIECES * speeds.kernel_ns);
    ck_assert_uint_eq(emu_busy_ns(EMU_DOWN), 0);
}
END_TEST

/* One buffer, and the second copy does not wait until it was read: that copy is hidden then, which the clock shows. (Whether the result
 * is wrong is what seeds show.) */
START_TEST(forgotten_wait_costs_as_much)
{
    struct speeds speeds = {1000, 3000};

    clock_of(&speeds);
    pipeline(1, 1, 2);
    ck_assert_uint_eq(emu_now_ns(), N_PIECES * (1000 + 3000) - 1000);
}
END_TEST

/* Two streams, one engine each way. */
START_TEST(engine_does_two_things_at_once)
{
    enum { MANY = 1000 };
    cudaStream_t s[2] = {stream_make(), stream_make()};
    float *host = pinned_make(2 * MANY), *dev = device_make(2 * MANY);
    struct emu_rates r = {.op_ns = 10};
    float ms;
    cudaEvent_t from, to;

    r.bytes_per_s[EMU_UP] = r.bytes_per_s[EMU_DOWN] = r.bytes_per_s[EMU_COMPUTE] = 4e9; /* a float each nanosecond */
    emu_clock(&r);
    cudaEventCreateWithFlags(&from, cudaEventDefault);
    cudaEventCreateWithFlags(&to, cudaEventDefault);
    ck_assert_int_eq(cudaEventElapsedTime(&ms, from, to), cudaErrorInvalidValue);
    cudaEventRecord(from, s[1]);
    for (int i = 0; i < 2; i++)
        cudaMemcpyAsync(dev + i * MANY, host, MANY * sizeof *host, cudaMemcpyHostToDevice, s[i]);
    cudaMemcpyAsync(host + MANY, dev, MANY * sizeof *host, cudaMemcpyDeviceToHost, s[0]); /* beside the second one up */
    cudaEventRecord(to, s[1]);
    ck_assert_int_eq(cudaEventElapsedTime(&ms, from, to), cudaErrorNotReady);
    cudaStreamSynchronize(s[1]);
    ck_assert_uint_eq(emu_now_ns(), 2 * (MANY + 10));
    ck_assert_int_eq(cudaEventElapsedTime(&ms, from, to), cudaSuccess);
    ck_assert_float_eq(ms, 2 * (MANY + 10) * 1e-6f);
    cudaStreamSynchronize(s[0]);
    ck_assert_uint_eq(emu_now_ns(), 2 * (MANY + 10));
    cudaMemcpyAsync(dev, dev + MANY, MANY * sizeof *dev, cudaMemcpyDeviceToDevice, s[0]);
    cudaMemsetAsync(dev + MANY, 0, MANY * sizeof *dev, s[1]);
    cudaStreamSynchronize(s[0]);
    cudaStreamSynchronize(s[1]);
    ck_assert_uint_eq(emu_now_ns(), 4 * (MANY + 10));
    ck_assert_uint_eq(emu_busy_ns(EMU_COMPUTE), 2 * (MANY + 10));
    cudaEventDestroy(from);
    cudaEventDestroy(to);
    cudaFreeHost(host);
    cudaFree(dev);
    cudaStreamDestroy(s[0]);
    cudaStreamDestroy(s[1]);
}
END_TEST

/* A graph takes what its kernels take. */
START_TEST(graph_takes_another_time_than_its_kernels)
{
    cudaStream_t s = stream_make();
    float *a = device_make(N), *b = device_make(N), *c = device_make(N);
    struct speeds speeds = {1000, 3000};

    clock_of(&speeds);
    cudaGraphExec_t exec = three_kernels(a, b, c, s);
    cudaStreamSynchronize(s);
    ck_assert_uint_eq(emu_now_ns(), 0);
    cudaGraphLaunch(exec, s);
    cudaStreamSynchronize(s);
    ck_assert_uint_eq(emu_now_ns(), 3 * 3000);
    cudaGraphExecDestroy(exec);
    cudaFree(c);
    cudaFree(b);
    cudaFree(a);
    cudaStreamDestroy(s);
}
END_TEST

/* The host works meanwhile: only what is longer counts, and an event is not there before its time. */
START_TEST(host_waits_for_what_it_has_overlapped)
{
    cudaStream_t s = stream_make();
    float *host = pinned_make(N), *dev = device_make(N);
    struct speeds speeds = {1000, 0};
    cudaEvent_t event;

    clock_of(&speeds);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    for (int round = 0; round < 2; round++) {
        uint64_t begin = emu_now_ns(), work = round ? 1700 : 400;
        cudaMemcpyAsync(dev, host, N * sizeof *host, cudaMemcpyHostToDevice, s);
        cudaEventRecord(event, s);
        ck_assert_int_eq(cudaEventQuery(event), cudaErrorNotReady);
        emu_host_works(work);
        ck_assert_int_eq(cudaEventQuery(event), round ? cudaSuccess : cudaErrorNotReady);
        cudaEventSynchronize(event);
        ck_assert_uint_eq(emu_now_ns() - begin, round ? 1700 : 1000);
    }
    cudaEventDestroy(event);
    cudaFreeHost(host);
    cudaFree(dev);
    cudaStreamDestroy(s);
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("emu");
    TCase *tc = tcase_create("emu");
    enum { N_WAITS = 8 };

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_add_test(tc, orders_that_events_allow_change_a_result);
    tcase_add_test(tc, starved_engine_comes_in_time);
    tcase_add_loop_test(tc, left_out_wait_goes_unnoticed, 1, N_WAITS + 1);
    tcase_add_test(tc, queued_work_runs_before_somebody_waits);
    tcase_add_test(tc, fresh_memory_is_a_number);
    tcase_add_test_raise_signal(tc, host_reads_device_memory, SIGSEGV);
    tcase_add_test(tc, limit_of_memory_is_passed);
    tcase_add_test(tc, nth_call_succeeds);
    tcase_add_test_raise_signal(tc, write_past_the_end_goes_unnoticed, SIGABRT);
    tcase_add_test_raise_signal(tc, copy_past_the_end_goes_unnoticed, SIGABRT);
    tcase_add_loop_test_raise_signal(tc, what_a_step_must_not_do_goes_unnoticed, SIGABRT, 0,
                                     sizeof in_step / sizeof *in_step);
    tcase_add_test(tc, exchanges_and_barriers_mix_up_threads);
    tcase_add_loop_test_raise_signal(tc, misbehaving_threads_go_unnoticed, SIGABRT, 0, N_WAYS);
    tcase_add_test(tc, asynchronous_copies_come_when_nobody_expects_them);
    tcase_add_test(tc, bulk_copies_come_when_nobody_expects_them);
    tcase_add_test(tc, kernel_that_begins_early_sees_what_is_not_there_yet);
    tcase_add_test(tc, graph_runs_when_it_was_not_launched);
    tcase_add_loop_test(tc, captured_stream_does_what_it_cannot, 0, N_ASKED);
    tcase_add_test_raise_signal(tc, capture_lets_memory_be_taken, SIGABRT);
    tcase_add_loop_test(tc, failed_call_of_a_graph_leaves_something, 0, 4);
    tcase_add_loop_test(tc, schedule_takes_another_time, 0, sizeof golden / sizeof *golden);
    tcase_add_test(tc, forgotten_wait_costs_as_much);
    tcase_add_test(tc, engine_does_two_things_at_once);
    tcase_add_test(tc, graph_takes_another_time_than_its_kernels);
    tcase_add_test(tc, host_waits_for_what_it_has_overlapped);
    suite_add_tcase(suite, tc);
    freopen("/dev/null", "w", stderr); /* the texts of those that must die */
    return run_suite(suite);
}
