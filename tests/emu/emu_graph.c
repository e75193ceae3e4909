/* Owns captures and graphs of the emulated runtime: kernels in their order, and nothing else. What else a captured stream is asked
 * for is refused and spoils the capture. One stream is captured at a time. */
#include "tests/emu/emu.h"

#include <stdlib.h>
#include <string.h>

struct kernel {
    struct emu_launch launch; /* its closure: own */
    struct kernel *next;
};

struct CUgraph_st {
    struct kernel *head, *tail;
    int gpu;
};

/* What was captured may be destroyed first: it has kernels of its own. */
struct CUgraphExec_st {
    struct CUgraph_st graph;
};

static int n_live;
static cudaStream_t captured; /* NULL: none */
static cudaGraph_t capture;
static bool is_spoilt;

int emu_graph_n_live(void)
{
    return n_live;
}

bool emu_graph_is_capturing(void)
{
    return captured != NULL;
}

bool emu_graph_refuses(cudaStream_t stream)
{
    if (!stream || stream != captured)
        return false;
    is_spoilt = true;
    return true;
}

/* ---- kernels ---- */

static void append(struct CUgraph_st *graph, const struct emu_launch *launch)
{
    struct kernel *k = malloc(sizeof *k);
    void *closure = malloc(launch->closure_bytes);

    if (!k || !closure)
        emu_die("no memory for a kernel of a graph");
    memcpy(closure, launch->closure, launch->closure_bytes);
    *k = (struct kernel){.launch = *launch};
    k->launch.closure = closure;
    *(graph->head ? &graph->tail->next : &graph->head) = k;
    graph->tail = k;
}

static void clear(struct CUgraph_st *graph)
{
    for (struct kernel *k = graph->head, *next; k; k = next) {
        next = k->next;
        free((void *)k->launch.closure);
        free(k);
    }
}

bool emu_graph_takes(cudaStream_t stream, const struct emu_launch *launch)
{
    if (stream != captured)
        return false;
    append(capture, launch);
    return true;
}

/* ---- the runtime's functions ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    if (emu_fails())
        return cudaErrorUnknown;
    emu_check_stream(stream);
    if (mode != cudaStreamCaptureModeThreadLocal)
        emu_die("a capture that forbids other threads their calls, or leaves this one's unchecked");
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    if (captured)
        emu_die("two captures at once");
    capture = calloc(1, sizeof *capture);
    if (!capture)
        return cudaErrorMemoryAllocation;
    capture->gpu = emu_gpu();
    captured = stream;
    is_spoilt = false;
    n_live++;
    return cudaSuccess;
}

/* Whatever it says, the stream is captured no longer. */
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    cudaError_t e = emu_fails() ? cudaErrorUnknown : is_spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess;

    *graph = NULL;
    emu_check_stream(stream);
    if (stream != captured)
        return cudaErrorInvalidValue;
    captured = NULL;
    if (e)
        cudaGraphDestroy(capture);
    else
        *graph = capture;
    return e;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    *exec = NULL;
    if (emu_fails())
        return cudaErrorMemoryAllocation;
    if (flags)
        emu_die("a flag of graphs that is not emulated");
    *exec = calloc(1, sizeof **exec);
    if (!*exec)
        return cudaErrorMemoryAllocation;
    (*exec)->graph.gpu = graph->gpu;
    for (const struct kernel *k = graph->head; k; k = k->next)
        append(&(*exec)->graph, &k->launch);
    n_live++;
    return cudaSuccess;
}

/* Its kernels run in the stream's order, behind what is queued. */
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    if (emu_fails())
        return cudaErrorLaunchFailure;
    emu_check_stream(stream);
    if (emu_graph_refuses(stream))
        return cudaErrorStreamCaptureUnsupported;
    if (exec->graph.gpu != emu_gpu())
        emu_die("a graph of GPU %d is launched while GPU %d is chosen", exec->graph.gpu, emu_gpu());
    for (const struct kernel *k = exec->graph.head; k; k = k->next)
        emu_queue_kernel(&k->launch, stream, k != exec->graph.head);
    return cudaSuccess;
}

/* What was launched of it runs on: queues have copies. */
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    clear(&exec->graph);
    free(exec);
    n_live--;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    clear(graph);
    free(graph);
    n_live--;
    return cudaSuccess;
}
