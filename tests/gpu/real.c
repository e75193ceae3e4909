/* Owns the counting of what a test asks of a runtime that knows nothing of tests. The linker sends every call of ferry's host code
 * and kernels through the functions here (--wrap): they count it, let the nth one fail, hold memory, pinned memory too, to a limit, fill
 * fresh memory with NaN, and end the process where a step allocates, frees, pins or waits for the whole device. One host thread. */
#include "tests/gpu/real.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ALLOCS = 1024 };

struct alloc {
    void *ptr; /* NULL: not used */
    size_t bytes;
    bool is_registered; /* the host's own memory: cudaHostRegister; else the device's */
};
static struct alloc allocs[MAX_ALLOCS];
static size_t vram_bytes = SIZE_MAX, device_bytes, pinned_most = SIZE_MAX, registered_bytes;
static int driver = -1; /* its version, where a test says so */
static int n_host, n_streams, n_events, n_graphs, n_gpus, fail_at, n_calls;
static uint64_t n_launches;
static bool in_step, is_capturing;
static cudaError_t launch_error; /* of a launch that failed here: the runtime has not heard of it */

/* The runtime's own functions, as the linker names them. */
#define REAL(name) __real_##name
#define WRAP(name) __wrap_##name
cudaError_t REAL(cudaDriverGetVersion)(int *version);
cudaError_t REAL(cudaGetDeviceCount)(int *count);
cudaError_t REAL(cudaSetDevice)(int device);
cudaError_t REAL(cudaDeviceGetAttribute)(int *value, enum cudaDeviceAttr attr, int device);
cudaError_t REAL(cudaFuncGetAttributes)(struct cudaFuncAttributes *attr, const void *kernel);
cudaError_t REAL(cudaFuncSetAttribute)(const void *kernel, enum cudaFuncAttribute attr, int value);
cudaError_t REAL(cudaMemGetInfo)(size_t *free, size_t *total);
cudaError_t REAL(cudaDeviceSynchronize)(void);
cudaError_t REAL(cudaGetLastError)(void);
cudaError_t REAL(cudaMalloc)(void **ptr, size_t bytes);
cudaError_t REAL(cudaFree)(void *ptr);
cudaError_t REAL(cudaHostAlloc)(void **ptr, size_t bytes, unsigned flags);
cudaError_t REAL(cudaFreeHost)(void *ptr);
cudaError_t REAL(cudaHostRegister)(void *ptr, size_t bytes, unsigned flags);
cudaError_t REAL(cudaHostUnregister)(void *ptr);
cudaError_t REAL(cudaMemcpyAsync)(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                                  cudaStream_t stream);
cudaError_t REAL(cudaMemsetAsync)(void *dst, int value, size_t bytes, cudaStream_t stream);
cudaError_t REAL(cudaStreamCreateWithFlags)(cudaStream_t *stream, unsigned flags);
cudaError_t REAL(cudaStreamDestroy)(cudaStream_t stream);
cudaError_t REAL(cudaStreamSynchronize)(cudaStream_t stream);
cudaError_t REAL(cudaStreamWaitEvent)(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t REAL(cudaEventCreateWithFlags)(cudaEvent_t *event, unsigned flags);
cudaError_t REAL(cudaEventDestroy)(cudaEvent_t event);
cudaError_t REAL(cudaEventRecord)(cudaEvent_t event, cudaStream_t stream);
cudaError_t REAL(cudaEventQuery)(cudaEvent_t event);
cudaError_t REAL(cudaEventSynchronize)(cudaEvent_t event);
cudaError_t REAL(cudaEventElapsedTime)(float *ms, cudaEvent_t start, cudaEvent_t end);
cudaError_t REAL(cudaStreamBeginCapture)(cudaStream_t stream, enum cudaStreamCaptureMode mode);
cudaError_t REAL(cudaStreamEndCapture)(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t REAL(cudaGraphInstantiate)(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t REAL(cudaGraphLaunch)(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t REAL(cudaGraphExecDestroy)(cudaGraphExec_t exec);
cudaError_t REAL(cudaGraphDestroy)(cudaGraph_t graph);

cudaError_t WRAP(cudaDriverGetVersion)(int *version);
cudaError_t WRAP(cudaGetDeviceCount)(int *count);
cudaError_t WRAP(cudaSetDevice)(int device);
cudaError_t WRAP(cudaDeviceGetAttribute)(int *value, enum cudaDeviceAttr attr, int device);
cudaError_t WRAP(cudaFuncGetAttributes)(struct cudaFuncAttributes *attr, const void *kernel);
cudaError_t WRAP(cudaFuncSetAttribute)(const void *kernel, enum cudaFuncAttribute attr, int value);
cudaError_t WRAP(cudaMemGetInfo)(size_t *free, size_t *total);
cudaError_t WRAP(cudaDeviceSynchronize)(void);
cudaError_t WRAP(cudaGetLastError)(void);
cudaError_t WRAP(cudaMalloc)(void **ptr, size_t bytes);
cudaError_t WRAP(cudaFree)(void *ptr);
cudaError_t WRAP(cudaHostAlloc)(void **ptr, size_t bytes, unsigned flags);
cudaError_t WRAP(cudaFreeHost)(void *ptr);
cudaError_t WRAP(cudaHostRegister)(void *ptr, size_t bytes, unsigned flags);
cudaError_t WRAP(cudaHostUnregister)(void *ptr);
cudaError_t WRAP(cudaMemcpyAsync)(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                                  cudaStream_t stream);
cudaError_t WRAP(cudaMemsetAsync)(void *dst, int value, size_t bytes, cudaStream_t stream);
cudaError_t WRAP(cudaStreamCreateWithFlags)(cudaStream_t *stream, unsigned flags);
cudaError_t WRAP(cudaStreamDestroy)(cudaStream_t stream);
cudaError_t WRAP(cudaStreamSynchronize)(cudaStream_t stream);
cudaError_t WRAP(cudaStreamWaitEvent)(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t WRAP(cudaEventCreateWithFlags)(cudaEvent_t *event, unsigned flags);
cudaError_t WRAP(cudaEventDestroy)(cudaEvent_t event);
cudaError_t WRAP(cudaEventRecord)(cudaEvent_t event, cudaStream_t stream);
cudaError_t WRAP(cudaEventQuery)(cudaEvent_t event);
cudaError_t WRAP(cudaEventSynchronize)(cudaEvent_t event);
cudaError_t WRAP(cudaEventElapsedTime)(float *ms, cudaEvent_t start, cudaEvent_t end);
cudaError_t WRAP(cudaStreamBeginCapture)(cudaStream_t stream, enum cudaStreamCaptureMode mode);
cudaError_t WRAP(cudaStreamEndCapture)(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t WRAP(cudaGraphInstantiate)(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t WRAP(cudaGraphLaunch)(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t WRAP(cudaGraphExecDestroy)(cudaGraphExec_t exec);
cudaError_t WRAP(cudaGraphDestroy)(cudaGraph_t graph);

static void __attribute__((noreturn)) die(const char *what)
{
    fprintf(stderr, "CUDA under test: %s\n", what);
    abort();
}

static void no_step(const char *what)
{
    if (in_step)
        die(what);
}

static bool fails(void)
{
    return ++n_calls == fail_at;
}

/* ---- what tests turn ---- */

void real_reset(uint64_t seed)
{
    (void)seed;
    if (real_n_live())
        die("something is left over of the test before");
    vram_bytes = pinned_most = SIZE_MAX;
    n_gpus = fail_at = n_calls = 0;
    n_launches = 0;
    in_step = false;
    driver = -1;
    launch_error = cudaSuccess;
}

void real_seed(uint64_t seed)
{
    (void)seed;
}

void real_drop_wait(int n)
{
    (void)n;
}

bool real_drops_wait(void)
{
    return false;
}

void real_starve(enum emu_engine engine)
{
    (void)engine;
}

bool real_is_real(void)
{
    return true;
}

void real_set_vram(size_t bytes)
{
    vram_bytes = bytes;
}

void real_set_pinned(size_t bytes)
{
    pinned_most = bytes;
}

void real_set_gpus(int n)
{
    n_gpus = n;
}

/* The card is the one that is there. */
void real_set_card(int capability, int n_multiprocessors, int shared_bytes)
{
    (void)capability, (void)n_multiprocessors, (void)shared_bytes;
}

void real_set_code(int capability)
{
    (void)capability;
}

void real_set_driver(int version)
{
    driver = version;
}

void real_fail_nth(int n)
{
    fail_at = n;
    n_calls = 0;
}

int real_n_calls(void)
{
    return n_calls;
}

void real_in_step(bool is_in)
{
    in_step = is_in;
}

size_t real_device_bytes(void)
{
    return device_bytes;
}

uint64_t real_n_launches(void)
{
    return n_launches;
}

int real_n_live(void)
{
    int n = n_host + n_streams + n_events + n_graphs; /* graphs: executable ones, too */

    for (int i = 0; i < MAX_ALLOCS; i++)
        n += allocs[i].ptr != NULL;
    return n;
}

/* ---- the virtual clock: tests of it ask emu_is_real() first ---- */

static const char no_clock[] = "a virtual clock is the emulator's alone";

void real_clock(const struct emu_rates *rates)
{
    (void)rates;
    die(no_clock);
}

uint64_t real_now_ns(void)
{
    die(no_clock);
}

void real_host_works(uint64_t ns)
{
    (void)ns;
    die(no_clock);
}

/* ---- devices: where a test wants more GPUs than there are, several numbers mean one ---- */

cudaError_t WRAP(cudaDriverGetVersion)(int *version)
{
    cudaError_t e = REAL(cudaDriverGetVersion)(version);

    if (fails())
        return cudaErrorUnknown;
    *version = driver < 0 ? *version : driver;
    return e;
}

cudaError_t WRAP(cudaGetDeviceCount)(int *count)
{
    cudaError_t e = REAL(cudaGetDeviceCount)(count);

    if (fails())
        return cudaErrorNoDevice;
    if (driver >= 0 && driver < CUDART_VERSION)
        return cudaErrorInsufficientDriver;
    *count = e == cudaSuccess ? (n_gpus ? n_gpus : 1) : *count;
    return e;
}

static int device_of(int number)
{
    int n = 0;

    if (REAL(cudaGetDeviceCount)(&n) || n < 1 || number < 0 || number >= (n_gpus ? n_gpus : 1))
        return number < 0 ? number : number + n; /* none */
    return number % n;
}

cudaError_t WRAP(cudaSetDevice)(int device)
{
    return fails() ? cudaErrorUnknown : REAL(cudaSetDevice)(device_of(device));
}

cudaError_t WRAP(cudaDeviceGetAttribute)(int *value, enum cudaDeviceAttr attr, int device)
{
    return fails() ? cudaErrorUnknown : REAL(cudaDeviceGetAttribute)(value, attr, device_of(device));
}

cudaError_t WRAP(cudaFuncGetAttributes)(struct cudaFuncAttributes *attr, const void *kernel)
{
    return fails() ? cudaErrorUnknown : REAL(cudaFuncGetAttributes)(attr, kernel);
}

cudaError_t WRAP(cudaFuncSetAttribute)(const void *kernel, enum cudaFuncAttribute attr, int value)
{
    return fails() ? cudaErrorUnknown : REAL(cudaFuncSetAttribute)(kernel, attr, value);
}

cudaError_t WRAP(cudaMemGetInfo)(size_t *free_bytes, size_t *total_bytes)
{
    if (fails())
        return cudaErrorUnknown;
    cudaError_t e = REAL(cudaMemGetInfo)(free_bytes, total_bytes);
    if (e || vram_bytes == SIZE_MAX)
        return e;
    size_t left = vram_bytes > device_bytes ? vram_bytes - device_bytes : 0;
    *free_bytes = *free_bytes < left ? *free_bytes : left;
    *total_bytes = *total_bytes < vram_bytes ? *total_bytes : vram_bytes;
    return cudaSuccess;
}

cudaError_t WRAP(cudaDeviceSynchronize)(void)
{
    no_step("cudaDeviceSynchronize inside a step");
    return REAL(cudaDeviceSynchronize)();
}

/* ---- memory ---- */

/* The NaN of fresh memory. */
static cudaError_t poison(void *ptr, size_t bytes)
{
    cudaStream_t stream;
    cudaError_t e = REAL(cudaStreamCreateWithFlags)(&stream, cudaStreamNonBlocking);

    if (e)
        return e;
    e = bytes ? REAL(cudaMemsetAsync)(ptr, 0xff, bytes, stream) : cudaSuccess;
    if (!e)
        e = REAL(cudaStreamSynchronize)(stream);
    REAL(cudaStreamDestroy)(stream);
    return e;
}

static struct alloc *alloc_slot(void)
{
    for (int i = 0; i < MAX_ALLOCS; i++)
        if (!allocs[i].ptr)
            return &allocs[i];
    die("too many allocations");
}

static struct alloc *alloc_of(const void *ptr, bool is_registered)
{
    for (int i = 0; i < MAX_ALLOCS; i++)
        if (allocs[i].ptr == ptr && allocs[i].is_registered == is_registered)
            return &allocs[i];
    return NULL;
}

cudaError_t WRAP(cudaMalloc)(void **ptr, size_t bytes)
{
    no_step("cudaMalloc inside a step");
    *ptr = NULL;
    if (fails() || device_bytes > vram_bytes || bytes > vram_bytes - device_bytes)
        return cudaErrorMemoryAllocation;
    struct alloc *a = alloc_slot();
    cudaError_t e = REAL(cudaMalloc)(ptr, bytes ? bytes : 1);
    if (!e)
        e = poison(*ptr, bytes);
    if (e)
        return e;
    *a = (struct alloc){.ptr = *ptr, .bytes = bytes};
    device_bytes += bytes;
    return cudaSuccess;
}

cudaError_t WRAP(cudaFree)(void *ptr)
{
    struct alloc *a = ptr ? alloc_of(ptr, false) : NULL;

    no_step("cudaFree inside a step");
    if (!ptr)
        return cudaSuccess;
    if (!a)
        die("cudaFree of what cudaMalloc did not give");
    device_bytes -= a->bytes;
    a->ptr = NULL;
    return REAL(cudaFree)(ptr);
}

cudaError_t WRAP(cudaHostAlloc)(void **ptr, size_t bytes, unsigned flags)
{
    no_step("cudaHostAlloc inside a step");
    *ptr = NULL;
    if (fails())
        return cudaErrorMemoryAllocation;
    cudaError_t e = REAL(cudaHostAlloc)(ptr, bytes, flags);
    if (!e)
        memset(*ptr, 0xff, bytes);
    n_host += !e;
    return e;
}

cudaError_t WRAP(cudaFreeHost)(void *ptr)
{
    no_step("cudaFreeHost inside a step");
    n_host -= ptr != NULL;
    return ptr ? REAL(cudaFreeHost)(ptr) : cudaSuccess;
}

cudaError_t WRAP(cudaHostRegister)(void *ptr, size_t bytes, unsigned flags)
{
    no_step("cudaHostRegister inside a step");
    if (fails())
        return cudaErrorUnknown;
    if (registered_bytes > pinned_most || bytes > pinned_most - registered_bytes)
        return cudaErrorMemoryAllocation;
    struct alloc *a = alloc_slot();
    cudaError_t e = REAL(cudaHostRegister)(ptr, bytes, flags);
    if (e)
        return e;
    *a = (struct alloc){.ptr = ptr, .bytes = bytes, .is_registered = true};
    registered_bytes += bytes;
    return cudaSuccess;
}

cudaError_t WRAP(cudaHostUnregister)(void *ptr)
{
    struct alloc *a = ptr ? alloc_of(ptr, true) : NULL;

    no_step("cudaHostUnregister inside a step");
    if (!a)
        die("cudaHostUnregister of what is not registered");
    registered_bytes -= a->bytes;
    a->ptr = NULL;
    return REAL(cudaHostUnregister)(ptr);
}

/* ---- streams and events ---- */

cudaError_t WRAP(cudaMemcpyAsync)(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                                  cudaStream_t stream)
{
    return fails() ? cudaErrorUnknown : REAL(cudaMemcpyAsync)(dst, src, bytes, kind, stream);
}

cudaError_t WRAP(cudaMemsetAsync)(void *dst, int value, size_t bytes, cudaStream_t stream)
{
    return fails() ? cudaErrorUnknown : REAL(cudaMemsetAsync)(dst, value, bytes, stream);
}

cudaError_t WRAP(cudaStreamCreateWithFlags)(cudaStream_t *stream, unsigned flags)
{
    *stream = NULL;
    cudaError_t e = fails() ? cudaErrorUnknown : REAL(cudaStreamCreateWithFlags)(stream, flags);
    n_streams += !e;
    return e;
}

cudaError_t WRAP(cudaStreamDestroy)(cudaStream_t stream)
{
    n_streams--;
    return REAL(cudaStreamDestroy)(stream);
}

cudaError_t WRAP(cudaStreamSynchronize)(cudaStream_t stream)
{
    cudaError_t e = REAL(cudaStreamSynchronize)(stream);
    return fails() ? cudaErrorUnknown : e;
}

cudaError_t WRAP(cudaStreamWaitEvent)(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    return fails() ? cudaErrorUnknown : REAL(cudaStreamWaitEvent)(stream, event, flags);
}

cudaError_t WRAP(cudaEventCreateWithFlags)(cudaEvent_t *event, unsigned flags)
{
    *event = NULL;
    cudaError_t e = fails() ? cudaErrorUnknown : REAL(cudaEventCreateWithFlags)(event, flags);
    n_events += !e;
    return e;
}

cudaError_t WRAP(cudaEventDestroy)(cudaEvent_t event)
{
    n_events--;
    return REAL(cudaEventDestroy)(event);
}

cudaError_t WRAP(cudaEventRecord)(cudaEvent_t event, cudaStream_t stream)
{
    return fails() ? cudaErrorUnknown : REAL(cudaEventRecord)(event, stream);
}

cudaError_t WRAP(cudaEventQuery)(cudaEvent_t event)
{
    return fails() ? cudaErrorUnknown : REAL(cudaEventQuery)(event);
}

cudaError_t WRAP(cudaEventSynchronize)(cudaEvent_t event)
{
    cudaError_t e = REAL(cudaEventSynchronize)(event);
    return fails() ? cudaErrorUnknown : e;
}

cudaError_t WRAP(cudaEventElapsedTime)(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    *ms = 0;
    return fails() ? cudaErrorUnknown : REAL(cudaEventElapsedTime)(ms, start, end);
}

/* ---- graphs ---- */

cudaError_t WRAP(cudaStreamBeginCapture)(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    cudaError_t e = fails() ? cudaErrorUnknown : REAL(cudaStreamBeginCapture)(stream, mode);
    is_capturing = !e;
    return e;
}

/* Where it fails here the stream is as if the runtime's own had failed: captured no longer, and there is no graph. */
cudaError_t WRAP(cudaStreamEndCapture)(cudaStream_t stream, cudaGraph_t *graph)
{
    cudaError_t e = REAL(cudaStreamEndCapture)(stream, graph);

    is_capturing = false;
    n_graphs += *graph != NULL;
    if (!fails())
        return e;
    if (*graph)
        WRAP(cudaGraphDestroy)(*graph);
    *graph = NULL;
    return cudaErrorUnknown;
}

cudaError_t WRAP(cudaGraphInstantiate)(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    *exec = NULL;
    cudaError_t e = fails() ? cudaErrorMemoryAllocation : REAL(cudaGraphInstantiate)(exec, graph, flags);
    n_graphs += !e;
    return e;
}

cudaError_t WRAP(cudaGraphLaunch)(cudaGraphExec_t exec, cudaStream_t stream)
{
    n_launches++;
    return fails() ? cudaErrorLaunchFailure : REAL(cudaGraphLaunch)(exec, stream);
}

cudaError_t WRAP(cudaGraphExecDestroy)(cudaGraphExec_t exec)
{
    n_graphs--;
    return REAL(cudaGraphExecDestroy)(exec);
}

cudaError_t WRAP(cudaGraphDestroy)(cudaGraph_t graph)
{
    n_graphs--;
    return REAL(cudaGraphDestroy)(graph);
}

/* ---- launches ---- */

cudaError_t WRAP(cudaGetLastError)(void)
{
    cudaError_t e = launch_error;

    launch_error = cudaSuccess;
    return e ? e : REAL(cudaGetLastError)();
}

static bool launch_fails(void)
{
    n_launches += !is_capturing; /* what is captured is not launched */
    if (!fails())
        return false;
    launch_error = cudaErrorLaunchFailure;
    return true;
}

#ifdef FERRY_TESTS_EMU_CUDA_RUNTIME_API_H /* a rehearsal: the emulated runtime takes the GPU's place */

cudaError_t REAL(emu_launch)(const struct emu_launch *launch, cudaStream_t stream);
cudaError_t WRAP(emu_launch)(const struct emu_launch *launch, cudaStream_t stream);

cudaError_t WRAP(emu_launch)(const struct emu_launch *launch, cudaStream_t stream)
{
    return launch_fails() ? WRAP(cudaGetLastError)() : REAL(emu_launch)(launch, stream);
}

#else

/* What nvcc's objects call; which of them is its version's affair, and the linker finds no other then. */
cudaError_t REAL(cudaLaunchKernel)(const void *f, dim3 grid, dim3 block, void **args, size_t bytes, cudaStream_t stream)
    __attribute__((weak));
cudaError_t REAL(__cudaLaunchKernel)(void *f, dim3 grid, dim3 block, void **args, size_t bytes, cudaStream_t stream)
    __attribute__((weak));
cudaError_t WRAP(cudaLaunchKernel)(const void *f, dim3 grid, dim3 block, void **args, size_t bytes,
                                   cudaStream_t stream);
cudaError_t WRAP(__cudaLaunchKernel)(void *f, dim3 grid, dim3 block, void **args, size_t bytes, cudaStream_t stream);

cudaError_t WRAP(cudaLaunchKernel)(const void *f, dim3 grid, dim3 block, void **args, size_t bytes, cudaStream_t stream)
{
    return launch_fails() ? cudaErrorLaunchFailure : REAL(cudaLaunchKernel)(f, grid, block, args, bytes, stream);
}

cudaError_t REAL(cudaLaunchKernelExC)(const cudaLaunchConfig_t *config, const void *f, void **args);
cudaError_t WRAP(cudaLaunchKernelExC)(const cudaLaunchConfig_t *config, const void *f, void **args);

cudaError_t WRAP(cudaLaunchKernelExC)(const cudaLaunchConfig_t *config, const void *f, void **args)
{
    return launch_fails() ? cudaErrorLaunchFailure : REAL(cudaLaunchKernelExC)(config, f, args);
}

cudaError_t WRAP(__cudaLaunchKernel)(void *f, dim3 grid, dim3 block, void **args, size_t bytes, cudaStream_t stream)
{
    return launch_fails() ? cudaErrorLaunchFailure : REAL(__cudaLaunchKernel)(f, grid, block, args, bytes, stream);
}

#endif
