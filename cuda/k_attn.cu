/* Keys and values into pages, and attention over pages, in the order of cpu/kern_ref.c: pages of 64 keys are folded one after
 * another into (o, m, l), which begin anew with each segment; segments are merged in ascending order. A block has some rows of
 * one sequence and one KV head; what the heads that share it and the rows have in common is read once.
 * Few rows: a block for each segment, states through device memory, cu_attn_merge. Many rows: a block walks all segments. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/math.cuh"

enum { THREADS = 128, PAGE = DEVICE_PAGE_TOK, SEGMENT = DEVICE_ATTN_SEGMENT_TOK, MAX_Q = 16, SHARED_BYTES = 48 * 1024 };

static __device__ inline int step_row(const struct cu_step *s, int i)
{
    return s->out_row ? s->out_row[i] : i;
}

static __device__ inline const void *const *page_table(const struct cu_step *s, int row, int group)
{
    return s->page[s->seq[row] * DEVICE_MAX_GROUPS + group];
}

template <int TYPE> struct kv;

template <> struct kv<QUANT_F16> {
    static __device__ inline int64_t row_bytes(int head_dim)
    {
        return 2 * (int64_t)head_dim;
    }
    static __device__ inline float at(const char *row, int i)
    {
        return cu_half_to_f32(reinterpret_cast<const uint16_t *>(row)[i]);
    }
};

template <> struct kv<QUANT_Q8_0> {
    static __device__ inline int64_t row_bytes(int head_dim)
    {
        return (int64_t)head_dim / 32 * 34;
    }
    static __device__ inline float at(const char *row, int i)
    {
        const uint8_t *block = reinterpret_cast<const uint8_t *>(row) + i / 32 * 34;
        return cu_half_at(block) * (float)(int8_t)block[2 + i % 32];
    }
};

/* ---- append ---- */

/* A thread for each element of a row of keys, then of values: blockIdx.y is the row, blockIdx.z 0 for keys. */
template <int TYPE> static __global__ void append(const struct cu_append_args a)
{
    bool is_v = blockIdx.z != 0;
    int dim = is_v ? a.p.head_dim_v : a.p.head_dim_k, e = (int)(blockIdx.x * THREADS + threadIdx.x);
    int row = step_row(&a.step, (int)blockIdx.y), head = e / dim, i = e % dim, pos = a.step.pos[row];
    const void *page = page_table(&a.step, row, a.p.group)[pos / PAGE];
    bool is_in = head < a.p.n_head_kv && page; /* no page: the position lies in the host's memory */
    const float *from = is_v ? a.v + blockIdx.y * a.v_stride : a.k + blockIdx.y * a.k_stride;
    float x = is_in ? from[e] : 0.0f;
    int64_t row_bytes = kv<TYPE>::row_bytes(dim);
    char *out = static_cast<char *>(const_cast<void *>(page)) + (is_v ? a.p.v_off : a.p.k_off) +
                ((int64_t)head * PAGE + pos % PAGE) * row_bytes;

    if (TYPE == QUANT_F16) {
        if (is_in)
            reinterpret_cast<uint16_t *>(out)[i] = cu_f32_to_half(x);
        return;
    }
    float amax = fabsf(x); /* a NaN does not count */
    amax = amax == amax ? amax : 0.0f;
    for (int step = 16; step; step /= 2)
        amax = cu_max(cu_shfl_xor(amax, step), amax);
    if (!is_in)
        return;
    float f = amax > 0.0f ? 127.0f / amax : 0.0f;
    uint8_t *block = reinterpret_cast<uint8_t *>(out) + i / 32 * 34;
    block[2 + i % 32] = (uint8_t)(int8_t)rintf(cu_min(cu_max(x * f, -127.0f), 127.0f));
    if (i % 32 == 0)
        *reinterpret_cast<uint16_t *>(block) = cu_f32_to_half(amax / 127.0f);
}

cudaError_t cu_kv_append(const struct cu_append_args *a, cudaStream_t stream)
{
    int dim = a->p.head_dim_k > a->p.head_dim_v ? a->p.head_dim_k : a->p.head_dim_v;
    dim3 grid((unsigned)((a->p.n_head_kv * dim + THREADS - 1) / THREADS), (unsigned)a->n, 2);

    if (a->p.kv_type == QUANT_F16)
        return CU_LAUNCH((append<QUANT_F16>), grid, dim3(THREADS), 0, stream, *a);
    return CU_LAUNCH((append<QUANT_Q8_0>), grid, dim3(THREADS), 0, stream, *a);
}

/* ---- what a block keeps in shared memory ---- */

/* struct block, but for the keys. */
static int fixed_bytes(const struct op_attn *p, int n_q)
{
    return n_q * (p->head_dim_k + 2 * p->head_dim_v + PAGE + 5) * (int)sizeof(float);
}

/* Rows of a tile are one more float apart than a row is long: threads of neighbouring keys then read different banks. */
static int tile_bytes(const struct op_attn *p, int n_keys)
{
    return n_keys * (p->head_dim_k + 1) * (int)sizeof(float);
}

int cu_attn_tile_rows(const struct op_attn *p)
{
    int n_group = p->n_head / p->n_head_kv, rows = MAX_Q / n_group;

    if (n_group > MAX_Q)
        return 0;
    while (rows > 1 && fixed_bytes(p, rows * n_group) + tile_bytes(p, 16) > SHARED_BYTES)
        rows--;
    return fixed_bytes(p, rows * n_group) + tile_bytes(p, 1) > SHARED_BYTES ? 0 : rows;
}

/* One block's views. Query v is row v / n_group, head v % n_group of the KV head. */
struct block {
    const struct cu_attn_args *a;
    int n_group, n_q, key_tile, head;
    int i0, n_rows;      /* rows [i0, i0 + n_rows) of the op, of one sequence */
    float *q;            /* (n_q, head_dim_k) */
    float *p;            /* (n_q, PAGE): scores, then weights */
    float *o, *m, *l;    /* (n_q, head_dim_v), (n_q), (n_q): the segment */
    float *os, *ms, *ls; /* what segments before gave */
    float *old;          /* (n_q) what a page's o is to be multiplied by */
    float *keys;         /* (key_tile, head_dim_k + 1) */
};

static __device__ inline int pos_of(const struct block *b, int i)
{
    return b->a->step.pos[step_row(&b->a->step, i)];
}

static __device__ inline int first_seen(const struct block *b, int pos)
{
    int first = pos - b->a->p.window + 1;
    return b->a->p.window && first > 0 ? first : 0;
}

/* Keys of the page from position `first` on that query v sees: [*begin, *end). */
static __device__ inline bool sees(const struct block *b, int v, int first, int *begin, int *end)
{
    int pos = pos_of(b, b->i0 + v / b->n_group), low = first_seen(b, pos) - first, high = pos + 1 - first;
    *begin = low > 0 ? low : 0;
    *end = high < PAGE ? high : (int)PAGE;
    return *begin < *end;
}

static __device__ inline const char *rows_of_page(const struct block *b, int page, uint64_t off, int64_t row_bytes)
{
    const char *base =
        static_cast<const char *>(page_table(&b->a->step, step_row(&b->a->step, b->i0), b->a->p.group)[page]);
    return base + off + (int64_t)b->head * PAGE * row_bytes;
}

static __device__ inline void reset(float *o, float *m, float *l, int n_q, int head_dim)
{
    for (int i = (int)threadIdx.x; i < n_q * head_dim; i += THREADS)
        o[i] = 0.0f;
    for (int v = (int)threadIdx.x; v < n_q; v += THREADS) {
        m[v] = -CU_INFINITY;
        l[v] = 0.0f;
    }
}

/* q . k by 16 lanes in one thread. */
static __device__ inline float dot(const float *q, const float *k, int n)
{
    float lane[16] = {};
    int i = 0;

    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++)
            lane[l] = fmaf(q[i + l], k[i + l], lane[l]);
    for (int l = 0; l < 16; l++)
        if (i + l < n)
            lane[l] = fmaf(q[i + l], k[i + l], lane[l]);
    return cu_tree16(lane);
}

/* Scores of keys [k0, k0 + key_tile) of a page against all queries. */
template <int TYPE> static __device__ inline void score_tile(const struct block *b, const char *k, int first, int k0)
{
    int dim = b->a->p.head_dim_k, n_key = PAGE - k0 < b->key_tile ? (int)PAGE - k0 : b->key_tile;
    int64_t row_bytes = kv<TYPE>::row_bytes(dim);

    int low, last_low, high, begin, end; /* keys that nobody sees are never written: not read either */
    sees(b, 0, first, &low, &high);
    sees(b, b->n_q - 1, first, &last_low, &end);
    for (int i = (int)threadIdx.x; i < n_key * dim; i += THREADS) {
        int key = k0 + i / dim;
        if (key >= low && key < end)
            b->keys[i / dim * (dim + 1) + i % dim] = kv<TYPE>::at(k + key * row_bytes, i % dim);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < n_key * b->n_q; i += THREADS) {
        int key = i % n_key, v = i / n_key;
        float s = -CU_INFINITY;
        if (sees(b, v, first, &begin, &end) && k0 + key >= begin && k0 + key < end) {
            s = dot(b->q + v * dim, b->keys + key * (dim + 1), dim) * b->a->p.scale;
            s = b->a->p.softcap != 0.0f ? cu_softcap(s, b->a->p.softcap) : s;
        }
        b->p[v * PAGE + k0 + key] = s;
    }
    __syncthreads();
}

/* Scores into weights, m and l; old[v] = what o is to be multiplied by. A query that sees nothing of the page stays. */
static __device__ inline void weigh(const struct block *b, int first)
{
    int v = (int)threadIdx.x, begin, end;
    bool is_in = v < b->n_q && sees(b, v, first, &begin, &end);

    if (is_in) {
        float m = -CU_INFINITY;
        for (int key = 0; key < PAGE; key++)
            m = cu_max(b->p[v * PAGE + key], m);
        m = cu_max(m, b->m[v]);
        b->old[v] = cu_exp(b->m[v] - m);
        b->m[v] = m;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < b->n_q * PAGE; i += THREADS)
        if (sees(b, i / PAGE, first, &begin, &end))
            b->p[i] = cu_exp(b->p[i] - b->m[i / PAGE]);
    __syncthreads();
    if (is_in) {
        float lane[16] = {};
        for (int key = 0; key < PAGE; key++)
            lane[key % 16] += b->p[v * PAGE + key];
        b->l[v] = b->l[v] * b->old[v] + cu_tree16(lane);
    }
}

/* o = o * old + weights . V: a thread has some columns of all queries. */
template <int TYPE> static __device__ inline void add_values(const struct block *b, const char *values, int first)
{
    int dim = b->a->p.head_dim_v;
    int64_t row_bytes = kv<TYPE>::row_bytes(dim);

    for (int c = (int)threadIdx.x; c < dim; c += THREADS)
        for (int v = 0; v < b->n_q; v++) {
            int begin, end;
            if (!sees(b, v, first, &begin, &end))
                continue;
            float o = b->o[v * dim + c] * b->old[v];
            for (int key = begin; key < end; key++)
                o = fmaf(b->p[v * PAGE + key], kv<TYPE>::at(values + key * row_bytes, c), o);
            b->o[v * dim + c] = o;
        }
}

template <int TYPE> static __device__ inline void fold_page(const struct block *b, int page)
{
    const struct op_attn *p = &b->a->p;
    const char *k = rows_of_page(b, page, p->k_off, kv<TYPE>::row_bytes(p->head_dim_k));
    const char *v = rows_of_page(b, page, p->v_off, kv<TYPE>::row_bytes(p->head_dim_v));

    for (int k0 = 0; k0 < PAGE; k0 += b->key_tile)
        score_tile<TYPE>(b, k, page * PAGE, k0);
    weigh(b, page * PAGE);
    __syncthreads();
    add_values<TYPE>(b, v, page * PAGE);
    __syncthreads();
}

/* ---- states ---- */

/* One value of a later segment's state onto the sum. */
struct merger {
    float f, f_sum, m;
};

static __device__ inline struct merger merger_of(float m, float m_sum)
{
    float both = cu_max(m, m_sum);
    struct merger g = {cu_exp(m - both), cu_exp(m_sum - both), both};
    return g;
}

/* Merge the segment into the sum and begin anew; rows that saw nothing of it stay. */
static __device__ inline void end_segment(const struct block *b)
{
    int dim = b->a->p.head_dim_v;

    for (int i = (int)threadIdx.x; i < b->n_q * dim; i += THREADS) {
        int v = i / dim;
        if (b->m[v] == -CU_INFINITY && b->l[v] == 0.0f)
            continue;
        struct merger g = merger_of(b->m[v], b->ms[v]);
        b->os[i] = fmaf(b->o[i], g.f, b->os[i] * g.f_sum);
    }
    __syncthreads();
    int v = (int)threadIdx.x;
    if (v < b->n_q && !(b->m[v] == -CU_INFINITY && b->l[v] == 0.0f)) {
        struct merger g = merger_of(b->m[v], b->ms[v]);
        b->ms[v] = g.m;
        b->ls[v] = fmaf(b->l[v], g.f, b->ls[v] * g.f_sum);
    }
    __syncthreads();
    reset(b->o, b->m, b->l, b->n_q, dim);
    __syncthreads();
}

static __device__ inline void write_rows(const struct block *b)
{
    int dim = b->a->p.head_dim_v;

    for (int i = (int)threadIdx.x; i < b->n_q * dim; i += THREADS) {
        int v = i / dim, head = b->head * b->n_group + v % b->n_group;
        float *dst = b->a->dst + (int64_t)(b->i0 + v / b->n_group) * b->a->dst_stride;
        dst[(int64_t)head * dim + i % dim] = b->os[i] * (1.0f / b->ls[v]);
    }
}

/* Of segment `segment` of the launch. */
static __device__ inline float *state_of(const struct cu_attn_args *a, int i, int head, int segment)
{
    return a->states + i * a->state_row + head * a->state_head + segment * a->state_segment;
}

/* Of the rows that see something of the segment, which begins at position `first`. */
static __device__ inline void write_states(const struct block *b, int segment, int first)
{
    int len = b->a->p.head_dim_v + 2;

    for (int i = (int)threadIdx.x; i < b->n_q * len; i += THREADS) {
        int v = i / len, at = i % len, row = b->i0 + v / b->n_group;
        float *s = state_of(b->a, row, b->head * b->n_group + v % b->n_group, segment);
        if (pos_of(b, row) >= first)
            s[at] = at < len - 2 ? b->o[v * (len - 2) + at] : at == len - 2 ? b->m[v] : b->l[v];
    }
}

/* ---- the kernels ---- */

struct job {
    struct cu_attn_args a;
    int key_tile;
};

static __device__ inline struct block block_of(const struct job *j, float *shared)
{
    const struct op_attn *p = &j->a.p;
    struct block b = {};

    b.a = &j->a;
    b.n_group = p->n_head / p->n_head_kv;
    b.key_tile = j->key_tile;
    b.head = (int)blockIdx.y;
    int n = b.n_group * j->a.tile_rows;
    b.q = shared;
    b.p = b.q + n * p->head_dim_k;
    b.o = b.p + n * PAGE;
    b.os = b.o + n * p->head_dim_v;
    b.m = b.os + n * p->head_dim_v;
    b.l = b.m + n;
    b.ms = b.l + n;
    b.ls = b.ms + n;
    b.old = b.ls + n;
    b.keys = b.old + n;
    return b;
}

/* Rows [i0, i0 + n_rows), which are of one sequence: their queries, and a fresh state. */
static __device__ inline void begin_rows(struct block *b, int i0, int n_rows)
{
    int dim = b->a->p.head_dim_k, row_len = b->n_group * dim;

    b->i0 = i0;
    b->n_rows = n_rows;
    b->n_q = n_rows * b->n_group;
    for (int i = (int)threadIdx.x; i < n_rows * row_len; i += THREADS)
        b->q[i] = b->a->q[(int64_t)(i0 + i / row_len) * b->a->q_stride + (int64_t)b->head * row_len + i % row_len];
    reset(b->o, b->m, b->l, b->n_q, b->a->p.head_dim_v);
    reset(b->os, b->ms, b->ls, b->n_q, b->a->p.head_dim_v);
    __syncthreads();
}

/* All that the rows see. */
template <int TYPE> static __device__ inline void walk(const struct block *b)
{
    int begin = first_seen(b, pos_of(b, b->i0)) / PAGE, end = pos_of(b, b->i0 + b->n_rows - 1) / PAGE + 1;
    const int per = SEGMENT / PAGE;

    while (begin < end) {
        int stop = (begin / per + 1) * per < end ? (begin / per + 1) * per : end;
        for (; begin < stop; begin++)
            fold_page<TYPE>(b, begin);
        end_segment(b);
    }
    write_rows(b);
    __syncthreads();
}

/* Rows of the tile from `first` to `end` that are of one sequence. */
static __device__ inline int run_of_rows(const struct cu_attn_args *a, int first, int end)
{
    int n = 1, seq = a->step.seq[step_row(&a->step, first)];

    while (first + n < end && a->step.seq[step_row(&a->step, first + n)] == seq)
        n++;
    return n;
}

static __device__ inline int tile_end(const struct cu_attn_args *a)
{
    int end = ((int)blockIdx.x + 1) * a->tile_rows;
    return end < a->n ? end : a->n;
}

/* blockIdx: x a tile of rows, y the KV head. */
template <int TYPE> static __global__ void attn(const struct job j)
{
    CU_SHARED_DYN(float, shared);
    struct block b = block_of(&j, shared);

    for (int first = (int)blockIdx.x * j.a.tile_rows, n; first < tile_end(&j.a); first += n) {
        n = run_of_rows(&j.a, first, tile_end(&j.a));
        begin_rows(&b, first, n);
        walk<TYPE>(&b);
    }
}

/* One segment of the rows that began. With a window there is one row: segments are counted from the first that it sees. */
template <int TYPE> static __device__ inline void walk_segment(const struct block *b)
{
    int seen = first_seen(b, pos_of(b, b->i0)), last = pos_of(b, b->i0 + b->n_rows - 1) / PAGE;
    int segment = seen / SEGMENT + b->a->first + (int)blockIdx.z;
    int begin = segment * (SEGMENT / PAGE), end = begin + SEGMENT / PAGE < last + 1 ? begin + SEGMENT / PAGE : last + 1;

    begin = begin > seen / PAGE ? begin : seen / PAGE;
    if (begin >= end || !page_table(&b->a->step, step_row(&b->a->step, b->i0), b->a->p.group)[begin])
        return; /* behind all rows, or in the host's memory */
    for (int page = begin; page < end; page++)
        fold_page<TYPE>(b, page);
    write_states(b, (int)blockIdx.z, segment * SEGMENT);
}

/* blockIdx: x a tile of rows, y the KV head, z the segment of those of this launch. */
template <int TYPE> static __global__ void attn_segment(const struct job j)
{
    CU_SHARED_DYN(float, shared);
    struct block b = block_of(&j, shared);

    for (int first = (int)blockIdx.x * j.a.tile_rows, n; first < tile_end(&j.a); first += n) {
        n = run_of_rows(&j.a, first, tile_end(&j.a));
        begin_rows(&b, first, n);
        walk_segment<TYPE>(&b);
        __syncthreads(); /* before the next rows' states begin anew */
    }
}

cudaError_t cu_attn(const struct cu_attn_args *a, cudaStream_t stream)
{
    struct job j = {*a, PAGE};
    int fixed = fixed_bytes(&a->p, j.a.tile_rows * (a->p.n_head / a->p.n_head_kv));
    while (fixed + tile_bytes(&a->p, j.key_tile) > SHARED_BYTES)
        j.key_tile--;
    size_t bytes = (size_t)(fixed + tile_bytes(&a->p, j.key_tile));
    dim3 grid((unsigned)((a->n + j.a.tile_rows - 1) / j.a.tile_rows), (unsigned)a->p.n_head_kv,
              a->states ? (unsigned)a->n_segments : 1);

    if (a->p.kv_type == QUANT_F16)
        return a->states ? CU_LAUNCH((attn_segment<QUANT_F16>), grid, dim3(THREADS), bytes, stream, j)
                         : CU_LAUNCH((attn<QUANT_F16>), grid, dim3(THREADS), bytes, stream, j);
    return a->states ? CU_LAUNCH((attn_segment<QUANT_Q8_0>), grid, dim3(THREADS), bytes, stream, j)
                     : CU_LAUNCH((attn<QUANT_Q8_0>), grid, dim3(THREADS), bytes, stream, j);
}

/* blockIdx: x the row, y the head. */
static __global__ void merge(const struct cu_attn_args a)
{
    int pos = a.step.pos[step_row(&a.step, (int)blockIdx.x)], dim = a.p.head_dim_v;
    int seen = a.p.window && pos - a.p.window + 1 > 0 ? pos - a.p.window + 1 : 0;
    int left = pos / SEGMENT - seen / SEGMENT + 1 - a.first, n = left < a.n_segments ? left : a.n_segments;
    float *sum = a.sums + blockIdx.x * a.sum_stride + (int64_t)blockIdx.y * (dim + 2);
    float *dst = a.dst + blockIdx.x * a.dst_stride + (int64_t)blockIdx.y * dim;
    float m = a.first ? sum[dim] : -CU_INFINITY, l = a.first ? sum[dim + 1] : 0.0f;

    __syncthreads();                                            /* before the first thread writes m and l */
    for (int c = (int)threadIdx.x; c < dim + 1; c += THREADS) { /* one more than columns: that thread keeps m and l */
        float o = a.first && c < dim ? sum[c] : 0.0f, mc = m, lc = l;
        for (int i = 0; i < n; i++) {
            const float *s = state_of(&a, (int)blockIdx.x, (int)blockIdx.y, i);
            struct merger g = merger_of(s[dim], mc);
            mc = g.m;
            lc = fmaf(s[dim + 1], g.f, lc * g.f_sum);
            o = c < dim ? fmaf(s[c], g.f, o * g.f_sum) : 0.0f;
        }
        if (c < dim)
            sum[c] = o;
        else
            sum[dim] = mc, sum[dim + 1] = lc;
        if (a.is_last && c < dim)
            dst[c] = o * (1.0f / lc);
    }
}

cudaError_t cu_attn_merge(const struct cu_attn_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((merge), dim3((unsigned)a->n, (unsigned)a->p.n_head), dim3(THREADS), 0, stream, *a);
}
