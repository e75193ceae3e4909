/* Attention of single rows, the bits of k_attn.cu: what a segment's pages have of each other is little, so that all is done at once.
 * Scores do not depend on other pages: a warp has each page. Then every page's weights want the largest score so far, which is known
 * for all pages then; only the sums over values go key by key, one for each query and column. */
#include "cuda/launch.h"

#include "cuda/attn.cuh"
#include "cuda/device.cuh"
#include "cuda/math.cuh"

/* A block has N_Q heads of a KV head at most, and a segment of one row. */
enum { N_PAGES = SEGMENT / PAGE, THREADS = 32 * N_PAGES, N_Q = 4, MAX_DIM = 256, BATCH = 16, AT_ONCE = 8 };

struct row_job {
    struct cu_attn_args a;
    int n_group, n_splits; /* heads of a KV head; blocks for them */
};

struct row_shared {
    alignas(16) float q[N_Q][MAX_DIM];
    alignas(16) float p[N_Q][SEGMENT];                               /* scores, then weights */
    float most[N_Q][N_PAGES], sum[N_Q][N_PAGES], old[N_Q][N_PAGES]; /* of each page */
};

/* What one block works on. */
struct row_block {
    const struct cu_attn_args *a;
    int i, head, head_kv, n_q;    /* the op's row; its first head */
    int pos, seen;                /* positions [seen, pos] are seen */
    int segment, begin, end;      /* pages of the segment that are seen; begin - its first: first_page */
    const void *const *page;
};

static __device__ inline struct row_block block_of(const struct row_job *j)
{
    struct row_block b = {};
    int split = (int)blockIdx.y % j->n_splits, row = step_row(&j->a.step, (int)blockIdx.x);

    b.a = &j->a;
    b.i = (int)blockIdx.x;
    b.head_kv = (int)blockIdx.y / j->n_splits;
    b.head = b.head_kv * j->n_group + split * N_Q;
    b.n_q = j->n_group - split * N_Q < N_Q ? j->n_group - split * N_Q : (int)N_Q;
    b.pos = j->a.step.pos[row];
    b.seen = j->a.p.window && b.pos >= j->a.p.window ? b.pos - j->a.p.window + 1 : 0;
    b.segment = b.seen / SEGMENT + j->a.first + (int)blockIdx.z;
    b.begin = b.segment * N_PAGES > b.seen / PAGE ? b.segment * N_PAGES : b.seen / PAGE;
    b.end = (b.segment + 1) * N_PAGES < b.pos / PAGE + 1 ? (b.segment + 1) * N_PAGES : b.pos / PAGE + 1;
    b.page = page_table(&j->a.step, row, j->a.p.group);
    return b;
}

/* Rows of the block's KV head in a page. */
static __device__ inline const char *rows_of(const struct row_block *b, int page, uint64_t off, int row_bytes)
{
    const char *p = static_cast<const char *>(b->page[page]) + off;
    return CU_GLOBAL(p) + (int64_t)b->head_kv * PAGE * row_bytes;
}

/* Eight of the 16 lanes of a key's dot with each query; then, with the neighbour's, the sums of all. */
template <int TYPE>
static __device__ inline void dots(const struct row_shared *s, const char *row, int dim, bool is_in, float *out)
{
    int half = (int)threadIdx.x % 2 * 8;
    float acc[N_Q][8] = {};

    CU_UNROLL_BY(4)
    for (int c = 0; c < dim; c += 16) {
        float x[8] = {};
        if (is_in)
            kv<TYPE>::read_eight(row, c + half, x);
        CU_UNROLL
        for (int v = 0; v < N_Q; v++) {
            CU_UNROLL
            for (int e = 0; e < 8; e++)
                acc[v][e] = fmaf(s->q[v][c + half + e], x[e], acc[v][e]);
        }
    }
    CU_UNROLL
    for (int v = 0; v < N_Q; v++) {
        CU_UNROLL
        for (int e = 0; e < 8; e++)
            acc[v][e] += cu_shfl_xor(acc[v][e], 1);
        CU_UNROLL
        for (int step = 4; step; step /= 2) {
            CU_UNROLL
            for (int e = 0; e < step; e++)
                acc[v][e] += acc[v][e + step];
        }
        out[v] = acc[v][0];
    }
}

/* The warp's page: scores, and the largest of each query. */
template <int TYPE>
static __device__ inline void score(const struct row_block *b, struct row_shared *s, int page, int at)
{
    const struct op_attn *p = &b->a->p;
    int lane = (int)threadIdx.x % 32, row_bytes = kv<TYPE>::row_bytes(p->head_dim_k);
    const char *rows = rows_of(b, page, p->k_off, row_bytes);
    float most[N_Q] = {-CU_INFINITY, -CU_INFINITY, -CU_INFINITY, -CU_INFINITY};

    for (int first = 0; first < PAGE; first += BATCH) {
        int key = first + lane / 2, pos = page * PAGE + key;
        bool is_in = pos >= b->seen && pos <= b->pos;
        float x[N_Q];
        dots<TYPE>(s, rows + key * row_bytes, p->head_dim_k, is_in, x);
        CU_UNROLL
        for (int v = 0; v < N_Q; v++) {
            x[v] *= p->scale;
            x[v] = p->softcap != 0.0f ? cu_softcap(x[v], p->softcap) : x[v];
            x[v] = is_in ? x[v] : -CU_INFINITY;
            most[v] = cu_max(x[v], most[v]);
            if (lane % 2 == 0)
                s->p[v][at * PAGE + key] = x[v];
        }
    }
    CU_UNROLL
    for (int v = 0; v < N_Q; v++) {
        CU_UNROLL
        for (int step = 16; step > 1; step /= 2)
            most[v] = cu_max(cu_shfl_xor(most[v], step), most[v]);
        if (lane == 0)
            s->most[v][at] = most[v];
    }
}

/* The warp's page: weights, their sums, and what the sums before are to be multiplied by. */
static __device__ inline void weigh(struct row_shared *s, int at)
{
    int lane = (int)threadIdx.x % 32;

    for (int v = 0; v < N_Q; v++) {
        float before = -CU_INFINITY, w[2], *p = &s->p[v][at * PAGE + lane];
        for (int i = 0; i < at; i++)
            before = cu_max(s->most[v][i], before);
        float m = cu_max(s->most[v][at], before);
        for (int i = 0; i < 2; i++)
            p[32 * i] = w[i] = cu_exp(p[32 * i] - m);
        /* Lane l of 16 adds keys l, l + 16, l + 32, l + 48 up. */
        float second = cu_shfl_xor(w[0], 16), last = cu_shfl_xor(w[1], 16);
        float sum = cu_tree16_shfl(0.0f + w[0] + second + w[1] + last);
        if (lane == 0) {
            s->sum[v][at] = sum;
            s->old[v][at] = cu_exp(before - m);
        }
    }
}

/* Two queries' sums over two columns. */
struct sums {
    float o[2][2];
};

/* N keys' values onto them, loads first. */
template <int TYPE, int N>
static __device__ inline void add_values(const char *row, int row_bytes, int c, const float *p, struct sums *t)
{
    float x[N][2];

    CU_UNROLL
    for (int i = 0; i < N; i++)
        kv<TYPE>::read_two(row + i * row_bytes, c, x[i]);
    CU_UNROLL
    for (int i = 0; i < N; i++) {
        CU_UNROLL
        for (int k = 0; k < 4; k++)
            t->o[k / 2][k % 2] = fmaf(p[k / 2 * SEGMENT + i], x[i][k % 2], t->o[k / 2][k % 2]);
    }
}

/* Columns c and c + 1 of queries v and v + 1 over all pages. */
template <int TYPE>
static __device__ inline struct sums sum_values(const struct row_block *b, const struct row_shared *s, int v, int c)
{
    int row_bytes = kv<TYPE>::row_bytes(b->a->p.head_dim_v);
    struct sums t = {};

    for (int page = b->begin; page < b->end; page++) {
        int at = page - b->begin, first = b->seen - page * PAGE, last = b->pos - page * PAGE;
        const char *rows = rows_of(b, page, b->a->p.v_off, row_bytes);
        const float *p = &s->p[v][at * PAGE];
        int key = first > 0 ? first : 0, end = last + 1 < PAGE ? last + 1 : (int)PAGE;
        for (int k = 0; k < 4; k++)
            t.o[k / 2][k % 2] *= s->old[v + k / 2][at];
        for (; key + AT_ONCE <= end; key += AT_ONCE)
            add_values<TYPE, AT_ONCE>(rows + key * row_bytes, row_bytes, c, p + key, &t);
        for (; key < end; key++)
            add_values<TYPE, 1>(rows + key * row_bytes, row_bytes, c, p + key, &t);
    }
    return t;
}

/* The largest score of query v, and the sum of its weights. */
static __device__ inline void state_of_row(const struct row_shared *s, int v, int n_pages, float *m, float *l)
{
    *m = -CU_INFINITY;
    *l = 0.0f;
    for (int at = 0; at < n_pages; at++) {
        *m = cu_max(s->most[v][at], *m);
        *l = *l * s->old[v][at] + s->sum[v][at];
    }
}

/* The segment's state; or, where it is the only one, the result: as if it were merged into nothing. */
static __device__ inline void put_sums(const struct row_block *b, const struct row_shared *s, int v, int c,
                                       const struct sums *t)
{
    int dim = b->a->p.head_dim_v;

    for (int k = 0; k < 2 && v + k < b->n_q; k++) {
        float m, l, *to;
        state_of_row(s, v + k, b->end - b->begin, &m, &l);
        if (b->a->states) {
            to = state_of(b->a, b->i, b->head + v + k, (int)blockIdx.z);
            to[c] = t->o[k][0];
            to[c + 1] = t->o[k][1];
            if (c == 0) {
                to[dim] = m;
                to[dim + 1] = l;
            }
            continue;
        }
        struct merger g = merger_of(m, -CU_INFINITY);
        bool has = !is_fresh(m, l);
        float inv = 1.0f / (has ? fmaf(l, g.f, 0.0f * g.f_sum) : 0.0f);
        to = b->a->dst + (int64_t)b->i * b->a->dst_stride + (int64_t)(b->head + v + k) * dim;
        for (int i = 0; i < 2; i++)
            to[c + i] = (has ? fmaf(t->o[k][i], g.f, 0.0f * g.f_sum) : 0.0f) * inv;
    }
}

/* blockIdx: x the row, y the KV head and N_Q of its heads, z the segment of those of this launch. */
template <int TYPE> static __global__ void attn_row(const struct row_job j)
{
    CU_SHARED_DYN(struct row_shared, s);
    struct row_block b = block_of(&j);
    int dim = j.a.p.head_dim_k, at = (int)threadIdx.x / 32;

    if (b.begin >= b.end || !b.page[b.begin])
        return; /* behind the row, or in the host's memory */
    for (int i = (int)threadIdx.x; i < N_Q * dim; i += THREADS) {
        int v = i / dim < b.n_q ? i / dim : 0; /* queries that are not there are the first */
        s->q[i / dim][i % dim] = j.a.q[(int64_t)b.i * j.a.q_stride + (int64_t)(b.head + v) * dim + i % dim];
    }
    __syncthreads();
    if (b.begin + at < b.end)
        score<TYPE>(&b, s, b.begin + at, at);
    __syncthreads();
    if (b.begin + at < b.end)
        weigh(s, at);
    __syncthreads();
    int n_pairs = j.a.p.head_dim_v / 2;
    for (int i = (int)threadIdx.x; i < n_pairs * ((b.n_q + 1) / 2); i += THREADS) {
        int v = i / n_pairs * 2, c = i % n_pairs * 2;
        struct sums t = sum_values<TYPE>(&b, s, v, c);
        put_sums(&b, s, v, c, &t);
    }
}

bool cu_attn_is_by_row(const struct cu_attn_args *a)
{
    const struct op_attn *p = &a->p;

    return (a->states || a->n_segments == 1) && p->head_dim_k % 16 == 0 && p->head_dim_k <= MAX_DIM &&
           p->head_dim_v % 2 == 0 && p->head_dim_v <= MAX_DIM;
}

cudaError_t cu_attn_row(const struct cu_attn_args *a, cudaStream_t stream)
{
    struct row_job j = {*a, a->p.n_head / a->p.n_head_kv, 0};

    j.n_splits = (j.n_group + N_Q - 1) / N_Q;
    dim3 grid((unsigned)a->n, (unsigned)(a->p.n_head_kv * j.n_splits), a->states ? (unsigned)a->n_segments : 1);
    if (a->p.kv_type == QUANT_F16)
        return CU_LAUNCH((attn_row<QUANT_F16>), grid, dim3(THREADS), sizeof(struct row_shared), stream, j);
    return CU_LAUNCH((attn_row<QUANT_Q8_0>), grid, dim3(THREADS), sizeof(struct row_shared), stream, j);
}
