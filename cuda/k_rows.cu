/* Kernels for ops whose row i of the result needs row i of the arguments and nothing else of the step (what they do: rows.cuh, act.cuh,
 * kv.cuh), alone or several in one launch; and what a step says, fetched from pinned memory. */
#include "cuda/launch.h"

#include "cuda/act.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/kv.cuh"
#include "cuda/rows.cuh"

__thread uint64_t cu_launched;
__thread struct cu_key *cu_noting;
__thread enum cu_overlap cu_overlap;

/* CHAIN: threads of a block that has a row to itself. */
enum { THREADS = 256, CHAIN = 512, LINE_FLOATS = 32 };

static dim3 grid_of(int64_t width, int n)
{
    return dim3((unsigned)((width + THREADS - 1) / THREADS), (unsigned)n);
}

static __device__ inline int64_t column()
{
    return (int64_t)blockIdx.x * THREADS + threadIdx.x;
}

/* ---- one op ---- */

static bool is_wide_norm(const struct cu_row_op *op)
{
    return op->kind == CU_ROW_NORM && op->u.rows.len > CU_NORM_NARROW;
}

static size_t shared_bytes(const struct cu_row_op *op)
{
    if (is_wide_norm(op))
        return (CU_NORM_CHUNK + CU_N_LANE) * sizeof(float);
    return op->kind == CU_ROW_ROUTE ? cu_route_shared_bytes(&op->u.route) : 0;
}

template <int KIND>
static __device__ inline void do_row(const struct cu_row_op *op, int64_t i, struct cu_crew crew, float *shared)
{
    constexpr int ELEMENT = KIND < CU_ROW_COMBINE ? KIND : (int)CU_ROW_ADD; /* not used where it is no such */

    if (KIND == CU_ROW_COMBINE)
        cu_row_combine(&op->u.rows, i, crew);
    else if (KIND == CU_ROW_NORM && op->u.rows.len > CU_NORM_NARROW)
        cu_norm_wide(&op->u.rows, i, crew, shared);
    else if (KIND == CU_ROW_NORM)
        cu_norm_narrow(&op->u.rows, i, crew);
    else if (KIND == CU_ROW_ROPE)
        cu_row_rope(&op->u.rope, i, crew);
    else if (KIND == CU_ROW_ROUTE)
        cu_row_route(&op->u.route, i, crew, shared);
    else if (KIND == CU_ROW_APPEND)
        cu_row_append(&op->u.append, i, crew);
    else if (KIND == CU_ROW_ACT)
        cu_row_act(&op->u.act, i, crew);
    else if (KIND == CU_ROW_L2)
        cu_row_l2(&op->u.l2, i, crew);
    else if (KIND == CU_ROW_SPLIT)
        cu_row_split(&op->u.split, i, crew);
    else
        cu_row_elements<ELEMENT>(&op->u.rows, i, crew);
}

/* Weights, which are there before any kernel of the call, on their way while that waits. */
static __device__ inline void fetch_weights(const struct cu_row_op *op, struct cu_crew crew)
{
    if (op->kind != CU_ROW_NORM && op->kind != CU_ROW_ADD_BIAS)
        return;
    int64_t n = op->kind == CU_ROW_NORM ? op->u.rows.len : op->u.rows.width;
    for (int64_t at = crew.me * (int64_t)LINE_FLOATS; at < n; at += crew.n * (int64_t)LINE_FLOATS)
        cu_prefetch(op->u.rows.w + at);
}

#define ROW_KINDS(F)    \
    F(CU_ROW_ADD)       \
    F(CU_ROW_ADD_BIAS)  \
    F(CU_ROW_SCALE)     \
    F(CU_ROW_SOFTCAP)   \
    F(CU_ROW_GLU)       \
    F(CU_ROW_GATE)      \
    F(CU_ROW_GATE_EACH) \
    F(CU_ROW_COMBINE)   \
    F(CU_ROW_NORM) F(CU_ROW_ROPE) F(CU_ROW_ROUTE) F(CU_ROW_APPEND) F(CU_ROW_ACT) F(CU_ROW_L2) F(CU_ROW_SPLIT)

/* blockIdx.y is the row. */
template <int KIND> static __global__ void row(const struct cu_row_op op)
{
    CU_SHARED_DYN(float, shared);
    struct cu_crew crew = {(int)(blockIdx.x * blockDim.x + threadIdx.x), (int)(gridDim.x * blockDim.x), (int)blockIdx.x,
                           (int)gridDim.x};

    fetch_weights(&op, crew);
    cu_await();
    do_row<KIND>(&op, blockIdx.y, crew, shared);
}

/* Threads that have something to do for a row. */
static int64_t threads_of(const struct cu_row_op *op)
{
    const struct op_attn *p = &op->u.append.p;

    switch (op->kind) {
    case CU_ROW_NORM:
        return op->u.rows.width / op->u.rows.len * (is_wide_norm(op) ? (int)THREADS : (int)CU_N_LANE);
    case CU_ROW_ROPE:
        return (int64_t)op->u.rope.p.n_rot / 2 * op->u.rope.p.n_head;
    case CU_ROW_ROUTE:
        return 32;
    case CU_ROW_APPEND:
        return (int64_t)p->n_head_kv * (p->head_dim_k > p->head_dim_v ? p->head_dim_k : p->head_dim_v);
    case CU_ROW_ACT:
        return op->u.act.act == QUANT_ACT_Q8X256 ? op->u.act.width / 8 : op->u.act.width;
    case CU_ROW_L2:
        return (int64_t)op->u.l2.p.n_head * CU_N_LANE;
    case CU_ROW_SPLIT:
        return op->u.split.width;
    default:
        return op->u.rows.width;
    }
}

cudaError_t cu_row_alone(const struct cu_row_op *op, int n_rows, cudaStream_t stream)
{
    dim3 grid = grid_of(threads_of(op), n_rows), block(op->kind == CU_ROW_ROUTE ? 32 : THREADS);

    switch (op->kind) {
#define CASE(KIND) \
    case KIND:     \
        return CU_LAUNCH((row<KIND>), grid, block, shared_bytes(op), stream, *op);
        ROW_KINDS(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}

uint64_t cu_act_bytes(enum quant_act act, int64_t n)
{
    uint64_t n_elem = (uint64_t)n;

    if (act == QUANT_ACT_Q8X32)
        return cu_up16(n_elem + n_elem / 32 * sizeof(struct cu_act_s32));
    if (act == QUANT_ACT_Q8X256)
        return cu_up16(n_elem + n_elem / 256 * sizeof(struct cu_act_s256));
    return cu_up16(n_elem * sizeof(float));
}

cudaError_t cu_act(const struct cu_act_args *a, cudaStream_t stream)
{
    struct cu_row_op op = {};

    op.kind = CU_ROW_ACT;
    op.u.act = *a;
    return cu_row_alone(&op, a->n_rows, stream);
}

/* ---- several ---- */

static __global__ void CU_BOUNDS(CHAIN, 1) chain(const CU_ARGS struct cu_chain c)
{
    CU_SHARED_DYN(float, shared);
    struct cu_crew crew = {(int)threadIdx.x, (int)blockDim.x, 0, 1};

    for (int i = 0; i < c.n_ops; i++)
        fetch_weights(&c.op[i], crew);
    cu_await();
    for (int i = 0; i < c.n_ops; i++) {
        if (i)
            __syncthreads();
        switch (c.op[i].kind) {
#define CASE(KIND)                                        \
    case KIND:                                            \
        do_row<KIND>(&c.op[i], blockIdx.x, crew, shared); \
        break;
            ROW_KINDS(CASE)
#undef CASE
        default:
            break;
        }
    }
}

cudaError_t cu_chain(const struct cu_chain *c, cudaStream_t stream)
{
    size_t bytes = 0;
    int64_t n_threads = 32;

    for (int i = 0; i < c->n_ops; i++) {
        size_t more = shared_bytes(&c->op[i]);
        int64_t wanted = (threads_of(&c->op[i]) + 31) / 32 * 32;
        bytes = more > bytes ? more : bytes;
        n_threads = wanted > n_threads ? wanted : n_threads;
    }
    return CU_LAUNCH((chain), dim3((unsigned)c->n_rows),
                     dim3(n_threads < CHAIN ? (unsigned)n_threads : (unsigned)CHAIN), bytes, stream, *c);
}

/* ---- rows of the step ---- */

static __global__ void get_rows(const struct cu_rows_args p)
{
    int64_t c = column(), i = blockIdx.y;

    cu_await();
    if (c < p.width)
        p.dst[i * p.dst_stride + c] = p.a[p.row[i] * p.a_stride + c];
}

cudaError_t cu_get_rows(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((get_rows), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

/* ---- embed ---- */

/* A thread for each 32 elements. */
template <int TYPE> static __global__ void embed(const struct cu_embed_args p)
{
    int64_t at = column();

    cu_await();
    if (at >= p.width / 32)
        return;
    int32_t token = p.step.token[cu_step_row(&p.step, (int)blockIdx.y)];
    float *dst = p.dst + blockIdx.y * p.dst_stride + 32 * at, x[32];
    cu_row<TYPE>::load32(static_cast<const char *>(p.w) + (uint64_t)token * p.w_stride, at, p.books, x);
    for (int e = 0; e < 32; e++)
        dst[e] = x[e] * p.f;
}

cudaError_t cu_embed(const struct cu_embed_args *a, cudaStream_t stream)
{
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return CU_LAUNCH((embed<QUANT_##NAME>), grid_of(a->width / 32, a->n), dim3(THREADS), 0, stream, *a);
        CU_QUANT_TYPES(CASE)
        CU_FLOAT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}

/* ---- rope ---- */

static __global__ void rope_table(const struct cu_rope_table_args p)
{
    int k = (int)column();

    cu_await();
    if (k >= p.n_freq)
        return;
    double angle = p.step.pos[cu_step_row(&p.step, (int)blockIdx.y)] * p.freq[k];
    float *dst = p.dst + blockIdx.y * p.dst_stride;
    dst[k] = (float)(cos(angle) * (double)p.mscale);
    dst[p.n_freq + k] = (float)(sin(angle) * (double)p.mscale);
}

cudaError_t cu_rope_table(const struct cu_rope_table_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((rope_table), grid_of(a->n_freq, a->n), dim3(THREADS), 0, stream, *a);
}

/* ---- from the host's memory ---- */

struct alignas(16) word16 {
    uint32_t x[4];
};

static __global__ void pull(const struct cu_pull_args a)
{
    uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;

    cu_await();
    if (i < a.n_bytes / sizeof(struct word16))
        static_cast<struct word16 *>(a.dst)[i] = static_cast<const struct word16 *>(a.src)[i];
}

cudaError_t cu_is_code_of_90(bool *is)
{
    struct cudaFuncAttributes of = {};
    cudaError_t e = cudaFuncGetAttributes(&of, reinterpret_cast<const void *>(pull));

    *is = e == cudaSuccess && of.ptxVersion >= 90;
    return e;
}

cudaError_t cu_pull(const struct cu_pull_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((pull), grid_of((int64_t)(a->n_bytes / sizeof(struct word16)), 1), dim3(THREADS), 0, stream, *a);
}
