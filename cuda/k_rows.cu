/* Ops whose row i of the result needs row i of the arguments and nothing else of the step, by the arithmetic of cpu/kern_ref.c. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/math.cuh"

__thread uint64_t cu_launched;
__thread struct cu_key *cu_noting;

enum { THREADS = 256, NORM_CHUNK = 4096, N_LANE = 16 };

static dim3 grid_of(int64_t width, int n)
{
    return dim3((unsigned)((width + THREADS - 1) / THREADS), (unsigned)n);
}

static __device__ inline int64_t column()
{
    return (int64_t)blockIdx.x * THREADS + threadIdx.x;
}

/* The step's row that an op's row stands for. */
static __device__ inline int step_row(const struct cu_step *s, int i)
{
    return s->out_row ? s->out_row[i] : i;
}

/* ---- elementwise: one thread an element, blockIdx.y the row ---- */

struct f_add {
    static __device__ inline float of(const struct cu_rows_args *, float a, float b)
    {
        return a + b;
    }
};

struct f_scale {
    static __device__ inline float of(const struct cu_rows_args *p, float a, float)
    {
        return a * (p->w ? p->w[0] : p->f);
    }
};

struct f_softcap {
    static __device__ inline float of(const struct cu_rows_args *p, float a, float)
    {
        return cu_softcap(a, p->f);
    }
};

struct f_glu {
    static __device__ inline float of(const struct cu_rows_args *p, float a, float b)
    {
        return cu_glu_of(p->act, a, b);
    }
};

struct f_gate {
    static __device__ inline float of(const struct cu_rows_args *, float a, float b)
    {
        return a * cu_sigmoid(b);
    }
};

/* Where the second argument comes from. */
enum second { NONE, SAME, WEIGHT, SCALAR };

template <typename F, int SECOND> static __global__ void elementwise(const struct cu_rows_args p)
{
    int64_t c = column(), i = blockIdx.y;

    if (c >= p.width)
        return;
    float b = 0.0f;
    if (SECOND == SAME)
        b = p.b[i * p.b_stride + c];
    if (SECOND == WEIGHT)
        b = p.w[c];
    if (SECOND == SCALAR)
        b = p.b[i * p.b_stride];
    p.dst[i * p.dst_stride + c] = F::of(&p, p.a[i * p.a_stride + c], b);
}

cudaError_t cu_add(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((elementwise<f_add, SAME>), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_add_bias(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((elementwise<f_add, WEIGHT>), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_scale(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((elementwise<f_scale, NONE>), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_softcap(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((elementwise<f_softcap, NONE>), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_glu(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((elementwise<f_glu, SAME>), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

cudaError_t cu_gate(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((elementwise<f_gate, SCALAR>), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

static __global__ void combine(const struct cu_rows_args p)
{
    int64_t c = column(), i = blockIdx.y;

    if (c >= p.width)
        return;
    const float *gates = p.b + i * p.b_stride, *rows = p.a + i * p.len * p.a_stride + c;
    float acc = rows[0] * gates[0];
    for (int64_t rank = 1; rank < p.len; rank++)
        acc = fmaf(gates[rank], rows[rank * p.a_stride], acc);
    p.dst[i * p.dst_stride + c] = acc;
}

cudaError_t cu_combine(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((combine), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

static __global__ void get_rows(const struct cu_rows_args p)
{
    int64_t c = column(), i = blockIdx.y;

    if (c < p.width)
        p.dst[i * p.dst_stride + c] = p.a[p.row[i] * p.a_stride + c];
}

cudaError_t cu_get_rows(const struct cu_rows_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((get_rows), grid_of(a->width, a->n), dim3(THREADS), 0, stream, *a);
}

/* ---- norm ---- */

/* A block for each group. The sum of squares has 16 lanes whose order is fixed, so only 16 threads add; all of them fetch. */
static __global__ void rms_norm(const struct cu_rows_args p)
{
    CU_SHARED_DYN(float, x); /* (NORM_CHUNK), then the lanes */
    float *lane = x + NORM_CHUNK, sum = 0.0f;
    const float *a = p.a + blockIdx.y * p.a_stride + blockIdx.x * p.len;
    float *dst = p.dst + blockIdx.y * p.dst_stride + blockIdx.x * p.len;

    for (int64_t first = 0; first < p.len; first += NORM_CHUNK) {
        int64_t n = p.len - first < NORM_CHUNK ? p.len - first : (int64_t)NORM_CHUNK;
        for (int64_t k = threadIdx.x; k < n; k += blockDim.x)
            x[k] = a[first + k];
        __syncthreads();
        if (threadIdx.x < N_LANE)
            for (int64_t k = threadIdx.x; k < n; k += N_LANE)
                sum = fmaf(x[k], x[k], sum);
        __syncthreads();
    }
    if (threadIdx.x < N_LANE)
        lane[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
        lane[0] = 1.0f / sqrtf(cu_tree16(lane) / (float)p.len + p.f);
    __syncthreads();
    for (int64_t k = threadIdx.x; k < p.len; k += blockDim.x)
        dst[k] = a[k] * lane[0] * p.w[k];
}

cudaError_t cu_rms_norm(const struct cu_rows_args *a, cudaStream_t stream)
{
    unsigned n_threads = a->len <= 128 ? 32 : THREADS;
    return CU_LAUNCH((rms_norm), dim3((unsigned)(a->width / a->len), (unsigned)a->n), dim3(n_threads),
                     (NORM_CHUNK + N_LANE) * sizeof(float), stream, *a);
}

/* ---- embed ---- */

/* A thread for each 32 elements. */
template <int TYPE> static __global__ void embed(const struct cu_embed_args p)
{
    int64_t at = column();

    if (at >= p.width / 32)
        return;
    int32_t token = p.step.token[step_row(&p.step, (int)blockIdx.y)];
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

    if (k >= p.n_freq)
        return;
    double angle = p.step.pos[step_row(&p.step, (int)blockIdx.y)] * p.freq[k];
    float *dst = p.dst + blockIdx.y * p.dst_stride;
    dst[k] = (float)(cos(angle) * (double)p.mscale);
    dst[p.n_freq + k] = (float)(sin(angle) * (double)p.mscale);
}

cudaError_t cu_rope_table(const struct cu_rope_table_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((rope_table), grid_of(a->n_freq, a->n), dim3(THREADS), 0, stream, *a);
}

/* A thread for each pair. */
static __global__ void rope(const struct cu_rope_args p)
{
    int half = p.p.n_rot / 2, at = (int)column();

    if (at >= half * p.p.n_head)
        return;
    int head = at / half, i = at % half;
    float *x = p.x + blockIdx.y * p.x_stride + (int64_t)head * p.p.head_dim + i * (p.p.neox ? 1 : 2);
    const float *table = p.table + blockIdx.y * p.table_stride;
    float c = table[i], s = table[half + i];
    int apart = p.p.neox ? half : 1;
    float a = x[0], b = x[apart];
    x[0] = a * c - b * s;
    x[apart] = a * s + b * c;
}

cudaError_t cu_rope(const struct cu_rope_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((rope), grid_of((int64_t)a->p.n_rot / 2 * a->p.n_head, a->n), dim3(THREADS), 0, stream, *a);
}

/* ---- route: a warp for each row ---- */

/* Like exp_sum of kern_ref.c over n values of shared memory. */
static __device__ inline float exp_sum(float *x, float m, int n)
{
    float sum = 0.0f;

    for (int e = (int)threadIdx.x; e < n; e += 32)
        x[e] = cu_exp(x[e] - m);
    cu_syncwarp();
    if (threadIdx.x < N_LANE)
        for (int e = (int)threadIdx.x; e < n; e += N_LANE)
            sum += x[e];
    sum = cu_tree16_shfl(sum);
    float lower = cu_shfl_xor(sum, 16);
    return threadIdx.x < N_LANE ? sum : lower;
}

static __device__ inline void softmax(float *x, int n)
{
    float m = -CU_INFINITY;

    for (int e = (int)threadIdx.x; e < n; e += 32)
        m = cu_max(x[e], m);
    for (int step = 16; step; step /= 2)
        m = cu_max(cu_shfl_xor(m, step), m);
    float sum = exp_sum(x, m, n);
    for (int e = (int)threadIdx.x; e < n; e += 32)
        x[e] /= sum;
    cu_syncwarp();
}

/* What the selection compares: a NaN loses against everything, of equals the lower id comes first; id < 0: none. */
static __device__ inline bool is_before(float a, int a_id, float b, int b_id)
{
    if (a_id < 0 || b_id < 0)
        return a_id >= 0;
    if (a > b || (a == a && b != b))
        return true;
    return !(b > a || (b == b && a != a)) && a_id < b_id;
}

/* The best that is not taken; all lanes get its id. */
static __device__ inline int pick(const float *select, const char *taken, int n)
{
    float best = 0.0f;
    int id = -1;

    for (int e = (int)threadIdx.x; e < n; e += 32)
        if (!taken[e] && is_before(select[e], e, best, id)) {
            best = select[e];
            id = e;
        }
    for (int step = 16; step; step /= 2) {
        float other = cu_shfl_xor(best, step);
        int other_id = cu_shfl_xor(id, step);
        if (is_before(other, other_id, best, id)) {
            best = other;
            id = other_id;
        }
    }
    return id;
}

/* The gates (k) in shared memory: one thread, in the order of the reference. */
static __device__ inline void weigh(const struct op_route *p, float *gates)
{
    if (p->normalize) {
        float sum = 0.0f;
        for (int r = 0; r < p->k; r++)
            sum += gates[r];
        sum = sum < 6.103515625e-5f ? 6.103515625e-5f : sum;
        for (int r = 0; r < p->k; r++)
            gates[r] /= sum;
    }
    for (int r = 0; r < p->k; r++)
        gates[r] *= p->scale;
}

static __global__ void route(const struct cu_route_args a)
{
    CU_SHARED_DYN(float, score); /* (n_expert), gates (k), select (n_expert) if there is a bias, taken (n_expert) */
    int n = a.p.n_expert, lane = (int)threadIdx.x;
    float *gates = score + n, *select = a.bias ? gates + a.p.k : score;
    char *taken = reinterpret_cast<char *>(gates + a.p.k + (a.bias ? n : 0));
    const float *logits = a.logits + blockIdx.x * a.logits_stride;

    for (int e = lane; e < n; e += 32) {
        score[e] = a.p.fn == OP_ROUTE_SIGMOID ? cu_sigmoid(logits[e]) : logits[e];
        taken[e] = 0;
    }
    cu_syncwarp();
    if (a.p.fn == OP_ROUTE_SOFTMAX)
        softmax(score, n);
    if (a.bias)
        for (int e = lane; e < n; e += 32)
            select[e] = score[e] + a.bias[e];
    cu_syncwarp();
    for (int rank = 0; rank < a.p.k; rank++) {
        int id = pick(select, taken, n);
        if (lane == 0) {
            a.ids[blockIdx.x * a.ids_stride + rank] = id;
            gates[rank] = score[id];
            taken[id] = 1;
        }
        cu_syncwarp();
    }
    if (a.p.fn == OP_ROUTE_SOFTMAX_TOPK)
        softmax(gates, a.p.k);
    if (lane == 0)
        weigh(&a.p, gates);
    cu_syncwarp();
    for (int r = lane; r < a.p.k; r += 32)
        a.gates[blockIdx.x * a.gates_stride + r] = gates[r];
}

cudaError_t cu_route(const struct cu_route_args *a, cudaStream_t stream)
{
    size_t n = (size_t)a->p.n_expert, bytes = ((a->bias ? 2 : 1) * n + (size_t)a->p.k) * sizeof(float) + n;
    return CU_LAUNCH((route), dim3((unsigned)a->n), dim3(32), bytes, stream, *a);
}

/* ---- from the host's memory ---- */

struct alignas(16) word16 {
    uint32_t x[4];
};

static __global__ void pull(const struct cu_pull_args a)
{
    uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;

    if (i < a.n_bytes / sizeof(struct word16))
        static_cast<struct word16 *>(a.dst)[i] = static_cast<const struct word16 *>(a.src)[i];
}

cudaError_t cu_pull(const struct cu_pull_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((pull), grid_of((int64_t)(a->n_bytes / sizeof(struct word16)), 1), dim3(THREADS), 0, stream, *a);
}
