/* Owns the graphs and the choice of which are kept. */
#include "cuda/graph.h"

/* A graph gives its place up when so many calls went by without it. If more are wanted in turn than there are places, those that have
 * one keep it, and the rest is launched plainly: were the oldest always replaced, all would be made anew all the time. */
enum { IDLE_CALLS = 16 * GRAPH_MOST };

static bool is_equal(const struct cu_key *a, const struct cu_key *b)
{
    return a->half[0] == b->half[0] && a->half[1] == b->half[1] && a->n == b->n;
}

static void drop(struct graph *g)
{
    if (g->exec)
        cudaGraphExecDestroy(g->exec); /* if it is under way it runs on */
    *g = (struct graph){.exec = NULL};
}

/* Its place, one that was free, or that of one which is not used any more; NULL: there is none. */
static struct graph *place_of(struct graph_cache *c, const struct cu_key *key)
{
    struct graph *oldest = &c->graphs[0];

    for (struct graph *g = c->graphs; g < c->graphs + GRAPH_MOST; g++) {
        if (is_equal(&g->key, key))
            return g;
        oldest = g->asked_at < oldest->asked_at ? g : oldest;
    }
    if (oldest->key.n && c->n_calls - oldest->asked_at < IDLE_CALLS)
        return NULL;
    drop(oldest);
    return oldest;
}

/* NULL: the runtime will not. Why is not asked: an error that lasts is told by the launches that are made instead. */
static cudaGraphExec_t capture(const struct ops_run *run, const char **what)
{
    const uint64_t launched = cu_launched;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaError_t e = cudaStreamBeginCapture(run->stream, cudaStreamCaptureModeThreadLocal);

    if (!e) {
        e = ops_launch(run, what);
        cudaError_t ended = cudaStreamEndCapture(run->stream, &graph); /* in any case */
        e = e ? e : ended;
    }
    if (!e)
        e = cudaGraphInstantiate(&exec, graph, 0);
    if (graph)
        cudaGraphDestroy(graph);
    cu_launched = launched; /* nothing was */
    if (!e)
        return exec;
    cudaGetLastError(); /* the next launch shall not be told it */
    return NULL;
}

static cudaError_t note(const struct ops_run *run, struct cu_key *key, const char **what)
{
    *key = (struct cu_key){.n = 0};
    cu_noting = key;
    cudaError_t e = ops_launch(run, what);
    cu_noting = NULL;
    return e;
}

/* The graph of these launches, made where they are seen for the second time; NULL: there is none. */
static cudaGraphExec_t exec_of(struct graph_cache *c, const struct ops_run *run, const struct cu_key *key,
                               const char **what)
{
    struct graph *g = place_of(c, key);

    c->n_calls++;
    if (!g)
        return NULL;
    g->asked_at = c->n_calls;
    if (!is_equal(&g->key, key)) {
        g->key = *key;
        return NULL;
    }
    if (!g->exec && !g->is_refused) {
        g->exec = capture(run, what);
        g->is_refused = !g->exec;
    }
    return g->exec;
}

cudaError_t graph_launch(struct graph_cache *c, const struct ops_run *run, const char **what)
{
    struct cu_key key;
    cudaError_t e = note(run, &key, what);

    if (e)
        return e;
    /* A launch alone is none the cheaper for being a graph. */
    cudaGraphExec_t exec = key.n > 1 ? exec_of(c, run, &key, what) : NULL;
    if (!exec)
        return ops_launch(run, what);
    *what = "a graph";
    cu_launched++;
    e = cudaGraphLaunch(exec, run->stream);
    if (e)
        cudaGetLastError(); /* told once, as of a launch */
    return e;
}

void graph_done(struct graph_cache *c)
{
    for (int i = 0; i < GRAPH_MOST; i++)
        drop(&c->graphs[i]);
}
