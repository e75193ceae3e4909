/* Owns the emulated device: its memory, streams, events, the order in which queued operations run, and their virtual times. */
#include "tests/emu/emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ARENA_BYTES ((size_t)1 << 30)
#define ALIGN_BYTES 256
#define GUARD_BYTES 256
#define GUARD 0xa5
enum { MAX_ALLOCS = 1024, MAX_STREAMS = 16 };

enum kind { COPY, SET, KERNEL, RECORD, WAIT };

struct op {
    enum kind kind;
    void *dst;
    const void *src;
    size_t bytes;
    int value;
    void *staged; /* own: a copy of pageable memory, or of a kernel's closure */
    struct emu_launch launch;
    bool is_inner; /* of a graph, but not its first: no launch of its own */
    cudaEvent_t event;
    uint64_t turn; /* of the event: which of its records is meant */
    enum emu_engine engine;
    uint64_t queued_ns, n; /* when; the how manieth of all */
    struct op *next;
};

struct CUstream_st {
    struct op *head, *tail;
    uint64_t n_queued, n_done;
    uint64_t free_ns; /* when the last of those that have run was done */
    int gpu;
};

struct CUevent_st {
    uint64_t n_recorded, n_done; /* records queued, records run */
    uint64_t done_ns, clock;     /* when the last of those, by the how manieth clock: what was before it is done at 0 */
};

struct alloc {
    char *base; /* NULL: not used */
    size_t bytes;
    bool is_host;
    bool is_registered; /* the host's own memory: cudaHostRegister */
    int gpu;
};

static struct alloc allocs[MAX_ALLOCS];
static cudaStream_t streams[MAX_STREAMS];
static int n_events;
static char *arena; /* (ARENA_BYTES), no access for the host */
static size_t vram_bytes = ARENA_BYTES, device_bytes, pinned_most = SIZE_MAX, registered_bytes;
static uint64_t rng = 1, n_launches;
static int fail_at, n_calls, drop_at;
static bool in_step;
static int n_gpus = 1, gpu; /* gpu: the one chosen */
static int driver = CUDART_VERSION;
/* The virtual clock. */
static bool has_clock;
static uint64_t n_clocks;
static struct emu_rates rates;
static uint64_t now_ns, free_ns[EMU_N_ENGINES], busy_ns[EMU_N_ENGINES], n_ops;

void emu_die(const char *fmt, ...)
{
    va_list ap;

    fprintf(stderr, "emulated CUDA: ");
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, " (seed of the order: state %llu)\n", (unsigned long long)rng);
    abort();
}

uint32_t emu_random(uint32_t n)
{
    rng ^= rng >> 12;
    rng ^= rng << 25;
    rng ^= rng >> 27;
    return (uint32_t)(rng * UINT64_C(0x2545f4914f6cdd1d) >> 32) % n;
}

/* ---- what tests turn ---- */

void emu_seed(uint64_t seed)
{
    rng = seed * UINT64_C(0x9e3779b97f4a7c15) | 1;
}

static const struct card {
    int capability, n_multiprocessors, shared_bytes, code;
} usual_card = {9, 4, EMU_MAX_SHARED, 9};
static struct card card = {9, 4, EMU_MAX_SHARED, 9};
static enum emu_engine starved = EMU_N_ENGINES;

void emu_reset(uint64_t seed)
{
    if (emu_n_live())
        emu_die("%d allocations, streams, events or graphs are left over", emu_n_live());
    emu_seed(seed);
    vram_bytes = ARENA_BYTES;
    pinned_most = SIZE_MAX;
    fail_at = n_calls = drop_at = 0;
    n_launches = 0;
    in_step = false;
    n_gpus = 1;
    gpu = 0;
    card = usual_card;
    driver = CUDART_VERSION;
    starved = EMU_N_ENGINES;
    emu_clock(NULL);
}

bool emu_is_real(void)
{
    return false;
}

void emu_set_vram(size_t bytes)
{
    vram_bytes = bytes < ARENA_BYTES ? bytes : ARENA_BYTES;
}

void emu_set_pinned(size_t bytes)
{
    pinned_most = bytes;
}

void emu_set_gpus(int n)
{
    n_gpus = n;
}

void emu_set_driver(int version)
{
    driver = version;
}

void emu_fail_nth(int n)
{
    fail_at = n;
    n_calls = 0;
}

int emu_n_calls(void)
{
    return n_calls;
}

void emu_in_step(bool is_in)
{
    in_step = is_in;
}

void emu_starve(enum emu_engine engine)
{
    starved = engine;
}

void emu_drop_wait(int n)
{
    drop_at = n;
}

bool emu_drops_wait(void)
{
    return drop_at > 0;
}

size_t emu_device_bytes(void)
{
    return device_bytes;
}

uint64_t emu_n_launches(void)
{
    return n_launches;
}

bool emu_is_device(const void *ptr)
{
    return arena && (const char *)ptr >= arena && (const char *)ptr < arena + ARENA_BYTES;
}

int emu_n_live(void)
{
    int n = n_events + emu_graph_n_live();

    for (int i = 0; i < MAX_ALLOCS; i++)
        n += allocs[i].base != NULL;
    for (int i = 0; i < MAX_STREAMS; i++)
        n += streams[i] != NULL;
    return n;
}

bool emu_fails(void)
{
    return ++n_calls == fail_at;
}

static void no_step(const char *what)
{
    if (in_step)
        emu_die("%s inside a step", what);
    if (emu_graph_is_capturing())
        emu_die("%s while a stream is captured", what);
}

/* ---- memory ---- */

static void open_arena(bool is_open)
{
    if (arena && mprotect(arena, ARENA_BYTES, is_open ? PROT_READ | PROT_WRITE : PROT_NONE))
        emu_die("mprotect of device memory failed");
}

static struct alloc *alloc_of(const void *ptr)
{
    for (int i = 0; i < MAX_ALLOCS; i++)
        if (allocs[i].base && (const char *)ptr >= allocs[i].base &&
            (const char *)ptr < allocs[i].base + allocs[i].bytes)
            return &allocs[i];
    return NULL;
}

static struct alloc *alloc_slot(void)
{
    for (int i = 0; i < MAX_ALLOCS; i++)
        if (!allocs[i].base)
            return &allocs[i];
    emu_die("more than %d allocations", MAX_ALLOCS);
}

/* The lowest place that has room; NULL: none. */
static char *find_place(size_t bytes)
{
    char *at = arena;

    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < MAX_ALLOCS; i++) {
            struct alloc *a = &allocs[i];
            if (a->base && !a->is_host && at < a->base + a->bytes + GUARD_BYTES && a->base < at + bytes + GUARD_BYTES) {
                at += (size_t)(a->base - at) + (a->bytes + GUARD_BYTES + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
                moved = true;
            }
        }
    }
    return bytes + GUARD_BYTES <= (size_t)(arena + ARENA_BYTES - at) ? at : NULL;
}

cudaError_t cudaMalloc(void **ptr, size_t bytes)
{
    no_step("cudaMalloc");
    *ptr = NULL;
    if (!arena) {
        arena = mmap(NULL, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED)
            emu_die("no addresses for device memory");
    }
    char *place = find_place(bytes);
    if (emu_fails() || bytes > vram_bytes - device_bytes || !place)
        return cudaErrorMemoryAllocation;
    *alloc_slot() = (struct alloc){.base = place, .bytes = bytes ? bytes : 1, .gpu = gpu};
    device_bytes += bytes;
    open_arena(true);
    memset(place, 0xff, bytes);
    memset(place + (bytes ? bytes : 1), GUARD, GUARD_BYTES);
    open_arena(false);
    *ptr = place;
    return cudaSuccess;
}

static void check_guard(const struct alloc *a)
{
    for (int i = 0; i < GUARD_BYTES; i++)
        if ((unsigned char)a->base[a->bytes + (size_t)i] != GUARD)
            emu_die("something was written %d bytes past the end of %zu bytes of device memory", i, a->bytes);
}

char *emu_device_span(size_t *bytes)
{
    *bytes = 0;
    for (const struct alloc *a = allocs; a < allocs + MAX_ALLOCS; a++)
        if (a->base && !a->is_host && (size_t)(a->base - arena) + a->bytes > *bytes)
            *bytes = (size_t)(a->base - arena) + a->bytes;
    return arena;
}

static void drain(const cudaStream_t stream, uint64_t n_done);

cudaError_t cudaFree(void *ptr)
{
    struct alloc *a = ptr ? alloc_of(ptr) : NULL;

    no_step("cudaFree");
    if (!ptr)
        return cudaSuccess;
    if (!a || a->base != ptr || a->is_host)
        emu_die("cudaFree of %p, which cudaMalloc did not give", ptr);
    cudaDeviceSynchronize();
    open_arena(true);
    check_guard(a);
    open_arena(false);
    device_bytes -= a->bytes;
    a->base = NULL;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **ptr, size_t bytes, unsigned flags)
{
    (void)flags;
    no_step("cudaHostAlloc");
    *ptr = NULL;
    if (emu_fails())
        return cudaErrorMemoryAllocation;
    char *p = aligned_alloc(4096, (bytes + 4096) / 4096 * 4096);
    if (!p)
        return cudaErrorMemoryAllocation;
    memset(p, 0xff, bytes);
    *alloc_slot() = (struct alloc){.base = p, .bytes = bytes ? bytes : 1, .is_host = true, .gpu = gpu};
    *ptr = p;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *ptr)
{
    struct alloc *a = ptr ? alloc_of(ptr) : NULL;

    no_step("cudaFreeHost");
    if (!ptr)
        return cudaSuccess;
    if (!a || a->base != ptr || !a->is_host || a->is_registered)
        emu_die("cudaFreeHost of %p, which cudaHostAlloc did not give", ptr);
    cudaDeviceSynchronize();
    a->base = NULL;
    free(ptr);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *ptr, size_t bytes, unsigned flags)
{
    (void)flags;
    no_step("cudaHostRegister");
    if (alloc_of(ptr))
        emu_die("cudaHostRegister of memory that is pinned");
    if (emu_fails())
        return cudaErrorUnknown;
    if (bytes > pinned_most - registered_bytes)
        return cudaErrorMemoryAllocation;
    registered_bytes += bytes;
    *alloc_slot() = (struct alloc){.base = ptr, .bytes = bytes, .is_host = true, .is_registered = true, .gpu = gpu};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *ptr)
{
    struct alloc *a = alloc_of(ptr);

    no_step("cudaHostUnregister");
    if (!a || a->base != ptr || !a->is_registered)
        emu_die("cudaHostUnregister of %p, which is not registered", ptr);
    cudaDeviceSynchronize();
    registered_bytes -= a->bytes;
    a->base = NULL;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    if (emu_fails())
        return cudaErrorUnknown;
    *free_bytes = vram_bytes - device_bytes;
    *total_bytes = vram_bytes;
    return cudaSuccess;
}

/* ---- queues ---- */

static void op_run(struct op *op)
{
    switch (op->kind) {
    case COPY:
        memcpy(op->dst, op->staged ? op->staged : op->src, op->bytes);
        break;
    case SET:
        memset(op->dst, op->value, op->bytes);
        break;
    case KERNEL:
        op->launch.closure = op->staged;
        emu_grid_run(&op->launch);
        n_launches += !op->is_inner;
        break;
    case RECORD:
        if (op->event->n_done < op->turn)
            op->event->n_done = op->turn;
        break;
    case WAIT:
        break;
    }
    free(op->staged);
    free(op);
}

static bool is_ready(const struct op *op)
{
    return op && (op->kind != WAIT || op->event->n_done >= op->turn);
}

/* ---- times ---- */

void emu_clock(const struct emu_rates *r)
{
    has_clock = r != NULL;
    n_clocks++;
    rates = r ? *r : (struct emu_rates){.op_ns = 0};
    now_ns = 0;
    memset(free_ns, 0, sizeof free_ns);
    memset(busy_ns, 0, sizeof busy_ns);
    for (int i = 0; i < MAX_STREAMS; i++)
        if (streams[i])
            streams[i]->free_ns = 0;
}

uint64_t emu_now_ns(void)
{
    return now_ns;
}

void emu_host_works(uint64_t ns)
{
    now_ns += ns;
}

uint64_t emu_busy_ns(enum emu_engine engine)
{
    return busy_ns[engine];
}

static uint64_t later(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint64_t done_ns(const cudaEvent_t event)
{
    return event->clock == n_clocks ? event->done_ns : 0;
}

static bool uses_engine(const struct op *op)
{
    return op->kind != RECORD && op->kind != WAIT;
}

/* Since when nothing but its engine keeps the stream's first operation. */
static uint64_t ready_ns(const cudaStream_t s)
{
    uint64_t ns = later(s->free_ns, s->head->queued_ns);
    return s->head->kind == WAIT ? later(ns, done_ns(s->head->event)) : ns;
}

static uint64_t start_ns(const cudaStream_t s)
{
    return uses_engine(s->head) ? later(ready_ns(s), free_ns[s->head->engine]) : ready_ns(s);
}

static uint64_t cost_ns(const struct op *op)
{
    if (!uses_engine(op))
        return 0;
    if (op->kind != KERNEL) {
        double rate = rates.bytes_per_s[op->engine];
        return rates.op_ns + (rate > 0 ? (uint64_t)((double)op->bytes * 1e9 / rate + 0.5) : 0);
    }
    struct emu_launch launch = op->launch;
    launch.closure = op->staged;
    return rates.op_ns + (rates.kernel_ns ? rates.kernel_ns(&launch, rates.arg) : 0);
}

static void pass_time(cudaStream_t s)
{
    const struct op *op = s->head;
    uint64_t cost = cost_ns(op), end = start_ns(s) + cost;

    s->free_ns = end;
    if (op->kind == RECORD) {
        op->event->done_ns = later(done_ns(op->event), end);
        op->event->clock = n_clocks;
    }
    if (!uses_engine(op))
        return;
    free_ns[op->engine] = end;
    busy_ns[op->engine] += cost;
}

static bool is_before(const cudaStream_t a, const cudaStream_t b)
{
    if (start_ns(a) != start_ns(b))
        return start_ns(a) < start_ns(b);
    return ready_ns(a) != ready_ns(b) ? ready_ns(a) < ready_ns(b) : a->head->n < b->head->n;
}

/* ---- whose turn it is ---- */

/* Streams (n) whose first operation may run, of the starved engine or of the others. */
static uint32_t find_ready(bool is_starved, cudaStream_t *ready)
{
    uint32_t n = 0;

    for (int i = 0; i < MAX_STREAMS; i++) {
        const struct op *op = streams[i] ? streams[i]->head : NULL;
        if (is_ready(op) && (uses_engine(op) && op->engine == starved) == is_starved)
            ready[n++] = streams[i];
    }
    return n;
}

/* Of the streams whose first operation may run, one drawn by lot; with a clock the one that begins first. NULL: none may. */
static cudaStream_t choose_stream(void)
{
    cudaStream_t ready[MAX_STREAMS], first;
    uint32_t n = find_ready(false, ready);

    if (!n)
        n = find_ready(true, ready);
    if (!n)
        return NULL;
    if (!has_clock)
        return ready[emu_random(n)];
    first = ready[0];
    for (uint32_t i = 1; i < n; i++)
        first = is_before(ready[i], first) ? ready[i] : first;
    return first;
}

static void run_first(cudaStream_t s)
{
    struct op *op = s->head;

    if (has_clock)
        pass_time(s);
    s->head = op->next;
    s->n_done++;
    op_run(op);
}

/* Run one operation; false: none may run. */
static bool run_any(void)
{
    cudaStream_t s = choose_stream();

    if (s)
        run_first(s);
    return s != NULL;
}

/* With a clock: what has begun by now. */
static void run_begun(void)
{
    open_arena(true);
    for (cudaStream_t s = choose_stream(); s && start_ns(s) <= now_ns; s = choose_stream())
        run_first(s);
    open_arena(false);
}

/* Until that many operations of the stream are done. */
static void drain(const cudaStream_t stream, uint64_t n_done)
{
    if (stream->n_done < n_done) {
        open_arena(true);
        while (stream->n_done < n_done)
            if (!run_any())
                emu_die("a stream waits for an event that cannot come");
        open_arena(false);
    }
    if (has_clock)
        now_ns = later(now_ns, stream->free_ns);
}

int emu_gpu(void)
{
    return gpu;
}

void emu_check_stream(const cudaStream_t stream)
{
    if (!stream)
        emu_die("the default stream waits for all others: use one of your own");
    if (stream->gpu != gpu)
        emu_die("a stream of GPU %d is used while GPU %d is chosen", stream->gpu, gpu);
}

static void enqueue(cudaStream_t stream, const struct op *op)
{
    emu_check_stream(stream);
    struct op *copy = malloc(sizeof *copy);
    if (!copy)
        emu_die("no memory for an operation");
    *copy = *op;
    copy->next = NULL;
    copy->queued_ns = now_ns;
    copy->n = n_ops++;
    if (stream->head)
        stream->tail->next = copy;
    else
        stream->head = copy;
    stream->tail = copy;
    stream->n_queued++;
}

static void *copy_of(const void *p, size_t bytes)
{
    void *copy = malloc(bytes ? bytes : 1);
    if (!copy)
        emu_die("no memory for %zu bytes", bytes);
    memcpy(copy, p, bytes);
    return copy;
}

static bool is_pinned(const void *ptr)
{
    const struct alloc *a = alloc_of(ptr);
    return a && a->is_host;
}

static void check_place(const void *ptr, size_t bytes, bool is_device)
{
    const struct alloc *a = alloc_of(ptr);

    if (is_device != emu_is_device(ptr))
        emu_die("a copy to or from %s memory got an address of the other", is_device ? "device" : "host");
    if (is_device && a && a->gpu != gpu)
        emu_die("memory of GPU %d is used while GPU %d is chosen", a->gpu, gpu);
    if ((is_device && !a) || (a && (size_t)((const char *)ptr - a->base) + bytes > a->bytes))
        emu_die("a copy of %zu bytes leaves its allocation", bytes);
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    struct op op = {.kind = COPY, .dst = dst, .src = src, .bytes = bytes};

    op.engine = kind == cudaMemcpyHostToDevice ? EMU_UP : kind == cudaMemcpyDeviceToHost ? EMU_DOWN : EMU_COMPUTE;

    if (emu_fails())
        return cudaErrorUnknown;
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    if (!bytes)
        return cudaSuccess;
    check_place(dst, bytes, kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice);
    check_place(src, bytes, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice);
    if (kind == cudaMemcpyHostToDevice && !is_pinned(src))
        op.staged = copy_of(src, bytes);
    enqueue(stream, &op);
    if (kind == cudaMemcpyDeviceToHost && !is_pinned(dst)) {
        no_step("a copy to memory that is not pinned, which waits,");
        drain(stream, stream->n_queued);
    }
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t stream)
{
    if (emu_fails())
        return cudaErrorUnknown;
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    check_place(dst, bytes, true);
    enqueue(stream, &(struct op){.kind = SET, .engine = EMU_COMPUTE, .dst = dst, .value = value, .bytes = bytes});
    return cudaSuccess;
}

void emu_queue_kernel(const struct emu_launch *launch, cudaStream_t stream, bool is_inner)
{
    enqueue(stream, &(struct op){.kind = KERNEL,
                                 .engine = EMU_COMPUTE,
                                 .staged = copy_of(launch->closure, launch->closure_bytes),
                                 .launch = *launch,
                                 .is_inner = is_inner});
}

cudaError_t emu_launch(const struct emu_launch *launch, cudaStream_t stream)
{
    if (emu_fails())
        return cudaErrorLaunchFailure;
    if (!launch->grid.x || !launch->grid.y || !launch->grid.z || launch->closure_bytes > 4096)
        return cudaErrorInvalidConfiguration;
    if (launch->is_early && card.code < 9)
        emu_die("%s: may begin early, and does not wait on its own", launch->name);
    if (!emu_graph_takes(stream, launch))
        emu_queue_kernel(launch, stream, false);
    return cudaSuccess;
}

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    *stream = NULL;
    if (emu_fails())
        return cudaErrorUnknown;
    if (flags != cudaStreamNonBlocking)
        emu_die("a stream that waits for the default stream");
    for (int i = 0; i < MAX_STREAMS; i++)
        if (!streams[i]) {
            *stream = streams[i] = calloc(1, sizeof **stream);
            if (!*stream)
                return cudaErrorMemoryAllocation;
            (*stream)->gpu = gpu;
            return cudaSuccess;
        }
    emu_die("more than %d streams", MAX_STREAMS);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    if (emu_graph_refuses(stream))
        emu_die("a stream is destroyed while it is captured");
    drain(stream, stream->n_queued);
    for (int i = 0; i < MAX_STREAMS; i++)
        if (streams[i] == stream)
            streams[i] = NULL;
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    drain(stream, stream->n_queued);
    return emu_fails() ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    no_step("cudaDeviceSynchronize");
    for (int i = 0; i < MAX_STREAMS; i++)
        if (streams[i])
            drain(streams[i], streams[i]->n_queued);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    (void)flags;
    *event = NULL;
    if (emu_fails())
        return cudaErrorUnknown;
    *event = calloc(1, sizeof **event);
    n_events += *event != NULL;
    return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    for (int i = 0; i < MAX_STREAMS; i++) /* what waits in queues points to it */
        if (streams[i])
            drain(streams[i], streams[i]->n_queued);
    free(event);
    n_events--;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    if (emu_fails())
        return cudaErrorUnknown;
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    enqueue(stream, &(struct op){.kind = RECORD, .event = event, .turn = ++event->n_recorded});
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    (void)flags;
    if (emu_fails())
        return cudaErrorUnknown;
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    if (drop_at && --drop_at == 0)
        return cudaSuccess;
    enqueue(stream, &(struct op){.kind = WAIT, .event = event, .turn = event->n_recorded});
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    if (emu_fails())
        return cudaErrorUnknown;
    if (has_clock)
        run_begun();
    bool is_done = event->n_done >= event->n_recorded && (!has_clock || done_ns(event) <= now_ns);
    return is_done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    open_arena(true);
    while (event->n_done < event->n_recorded)
        if (!run_any())
            emu_die("an event is waited for that cannot come");
    open_arena(false);
    if (has_clock)
        now_ns = later(now_ns, done_ns(event));
    return emu_fails() ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    *ms = 0;
    if (emu_fails())
        return cudaErrorUnknown;
    if (!start->n_recorded || !end->n_recorded)
        return cudaErrorInvalidValue;
    if (start->n_done < start->n_recorded || end->n_done < end->n_recorded)
        return cudaErrorNotReady;
    *ms = (float)((double)done_ns(end) - (double)done_ns(start)) / 1e6f;
    return cudaSuccess;
}

/* ---- the rest ---- */

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = driver;
    return emu_fails() ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = n_gpus;
    return emu_fails() ? cudaErrorNoDevice : driver < CUDART_VERSION ? cudaErrorInsufficientDriver : cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    if (emu_fails())
        return cudaErrorUnknown;
    if (device < 0 || device >= n_gpus)
        return cudaErrorInvalidDevice;
    gpu = device;
    return cudaSuccess;
}

void emu_set_card(int capability, int n_multiprocessors, int shared_bytes)
{
    card = (struct card){capability, n_multiprocessors, shared_bytes, capability};
}

void emu_set_code(int capability)
{
    card.code = capability;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attr, int device)
{
    (void)device;
    *value = attr == cudaDevAttrComputeCapabilityMajor         ? card.capability
             : attr == cudaDevAttrMultiProcessorCount          ? card.n_multiprocessors
             : attr == cudaDevAttrL2CacheSize                  ? 4096
             : attr == cudaDevAttrMaxSharedMemoryPerBlockOptin ? card.shared_bytes
                                                               : 0;
    return emu_fails() ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attr, const void *kernel)
{
    (void)kernel;
    attr->maxThreadsPerBlock = 1024;
    attr->ptxVersion = 10 * card.code;
    return emu_fails() ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute attr, int value)
{
    if (emu_fails())
        return cudaErrorUnknown;
    if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > card.shared_bytes)
        return cudaErrorInvalidValue;
    emu_grid_allow(kernel, (size_t)value);
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorNotReady:
        return "device not ready";
    case cudaErrorLaunchFailure:
        return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    case cudaErrorUnknown:
        break;
    }
    return "unknown error";
}
