/* Attention over pages, in the order of cpu/kern_ref.c: pages of 64 keys are folded one after
 * another into (o, m, l), which begin anew with each segment; segments are merged in ascending order. A block has some rows of
 * one sequence and one KV head; what the heads that share it and the rows have in common is read once.
 * Few rows: a block for each segment, states through device memory, cu_attn_merge. Many rows: a block walks all segments.
 * Bytes of keys and values come in tiles by asynchronous copies, several tiles ahead; each tile becomes floats in shared memory once
 * for all queries, which are multiplied with it in blocks of registers. */
#include "cuda/launch.h"

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/kv.cuh"
#include "cuda/math.cuh"
#include "cuda/ptx.cuh"

enum { MERGE_THREADS = 128, PAGE = DEVICE_PAGE_TOK, SEGMENT = DEVICE_ATTN_SEGMENT_TOK };

/* Shared memory of a block: what it gets without asking; heads of more than 256 values may ask for more, as much as lets two blocks have
 * room on a multiprocessor of the cards that have most. */
enum { SHARED_BYTES = 48 * 1024, MOST_SHARED = 110 * 1024, WIDE = 512 };

/* ---- how a block is cut ---- */

/* Threads of a block of N queries at most. With few of them a page is little work but for its latency, which more warps hide. */
static constexpr __host__ __device__ int threads_of(int n)
{
    return n == 8 || n == 16 ? 256 : 128;
}

/* That should be on a multiprocessor at once. */
static constexpr __host__ __device__ int blocks_of(int n)
{
    return n == 32 ? 4 : n == 4 ? 3 : 2;
}

/* A block of N queries at most, and W columns of values: what each of its threads has.
 * Scores: 4 of the 16 lanes of Q_SCORE queries x K_SCORE keys. Values: VEC columns each of N_VEC groups, of Q_VALUE queries. */
template <int N, int W> struct cut {
    static constexpr int THREADS = threads_of(N);
    static constexpr int N_KEYS = N == 32 ? 16 : 32; /* that are scored at once */
    static constexpr int Q_SCORE = 4, Q_GROUPS = N / Q_SCORE, K_GROUPS = THREADS / 4 / Q_GROUPS,
                         K_SCORE = N_KEYS / K_GROUPS;
    static constexpr int Q_VALUE = N == 32 ? 8 : 4, V_GROUPS = N / Q_VALUE;
    static constexpr int COLS = W * V_GROUPS / THREADS ? W * V_GROUPS / THREADS : 1; /* of a thread */
    static constexpr int VEC = COLS < 4 ? COLS : 4, N_VEC = COLS / VEC, COL_THREADS = W / COLS;
};

/* Chunks of 16 elements of all rows stand together, (chunk, row, 16), so that those of two neighbouring rows fill all banks. */
enum { CHUNK = 16, MAX_Q = 32 };

/* Shared memory of a block: this, queries (chunk, N, 16), a tile as floats, tiles on their way. A row of scores is a little
 * longer than a page, so that rows begin in different banks. */
enum { P_STRIDE = PAGE + 4 };

template <int N> struct alignas(16) table {
    float p[N * P_STRIDE]; /* scores, then weights */
    float m[N], l[N];      /* the segment */
    float ms[N], ls[N];    /* what segments before gave */
    float old[N];          /* what a page's o is to be multiplied by */
    int pos[N];            /* -1: no such query */
};

/* What the host chooses for an op: which instance, and how shared memory is cut. */
struct shape {
    int n_q, width;          /* N and W of the instance */
    int n_slices;            /* of `width` columns: a block has one of them */
    int tile_keys, n_stages; /* keys of a tile; tiles on their way */
    int tile_at, raw_at;     /* where they begin in shared memory: bytes */
    int raw_bytes;           /* of a tile */
    int bytes;
};

static int larger(int a, int b)
{
    return a > b ? a : b;
}

/* Threads score 32 keys at once; behind a smaller tile is room for what they read and leave out. */
static int tile_len(const struct shape *s, int n_chunks)
{
    int n_keys = n_chunks * s->tile_keys + larger(32 - s->tile_keys, 0);
    return larger(n_keys * CHUNK, s->tile_keys * s->width);
}

static void cut_shared(struct shape *s, const struct op_attn *p, int tile_keys, int n_stages)
{
    int most = larger(p->head_dim_k, p->head_dim_v), n_chunks = (p->head_dim_k + CHUNK - 1) / CHUNK;
    int row_bytes = p->kv_type == QUANT_F16 ? cu_kv<QUANT_F16>::row_bytes(most) : cu_kv<QUANT_Q8_0>::row_bytes(most);
    int table_bytes = s->n_q * (int)sizeof(struct table<4>) / 4;

    s->tile_keys = tile_keys;
    s->n_stages = n_stages;
    s->tile_at = table_bytes + n_chunks * s->n_q * CHUNK * (int)sizeof(float);
    s->raw_at = s->tile_at + tile_len(s, n_chunks) * (int)sizeof(float);
    s->raw_bytes = tile_keys * row_bytes;
    s->bytes = s->raw_at + n_stages * s->raw_bytes;
}

/* The width of the instance. */
static int width_of(const struct op_attn *p)
{
    return p->head_dim_v <= 64 ? 64 : p->head_dim_v <= 128 ? 128 : p->head_dim_v <= 256 ? 256 : (int)WIDE;
}

static int most_shared(int card_bytes)
{
    return card_bytes < SHARED_BYTES ? (int)SHARED_BYTES : card_bytes < MOST_SHARED ? card_bytes : (int)MOST_SHARED;
}

/* For n_q queries at once; false: does not fit. Of 8 keys the bytes are a multiple of 16 whatever the type and head_dim. */
static bool shape_of(const struct op_attn *p, int n_q, int card_bytes, struct shape *s)
{
    static const int tiles[][2] = {{64, 3}, {64, 2}, {32, 3}, {32, 2}, {16, 3}, {16, 2}, {8, 3}, {8, 2}, {8, 1}};

    s->n_q = n_q <= 4 ? 4 : n_q <= 8 ? 8 : n_q <= 16 ? 16 : MAX_Q;
    s->width = width_of(p);
    s->n_slices = (p->head_dim_v + s->width - 1) / s->width;
    if (n_q > MAX_Q || (s->n_q == MAX_Q && s->width >= 256) || larger(p->head_dim_k, p->head_dim_v) > SHARED_BYTES)
        return false;
    for (size_t i = 0; i < sizeof tiles / sizeof *tiles; i++) {
        cut_shared(s, p, tiles[i][0], tiles[i][1]);
        if (s->bytes <= (s->width == WIDE ? most_shared(card_bytes) : (int)SHARED_BYTES))
            return true;
    }
    return false;
}

/* Most queries of a block; 0: not one fits. */
static int most_queries(const struct op_attn *p, int card_bytes)
{
    struct shape s;

    for (int n_q = MAX_Q; n_q >= 4; n_q /= 2)
        if (shape_of(p, n_q, card_bytes, &s))
            return n_q;
    return 0;
}

int cu_attn_tile_rows(const struct op_attn *p, int shared_bytes)
{
    int most = most_queries(p, shared_bytes), n_group = p->n_head / p->n_head_kv;
    struct shape s;

    if (most >= n_group)
        return most / n_group;
    return shape_of(p, n_group, shared_bytes, &s) ? 1 : most > 0;
}

/* Heads that share a KV head are one part, or, where they are too many for a block, several of n_group each. */
struct job {
    struct cu_attn_args a;
    struct shape shape;
    int n_group, n_parts;
};

/* What one block works on. Query v is row v / n_group, head v % n_group of its part. */
struct block {
    const struct job *j;
    char *shared;
    int n_q, part, col;      /* part: of all heads; col: the first column of values of the block's slice */
    int i0;                  /* its first row of the op; rows are of one sequence */
    const void *const *page; /* of that sequence */
};

template <int N> static __device__ inline table<N> *table_of(const struct block *b)
{
    return reinterpret_cast<struct table<N> *>(b->shared);
}

template <int N> static __device__ inline float *queries_of(const struct block *b)
{
    return reinterpret_cast<float *>(b->shared + sizeof(struct table<N>));
}

/* Keys (chunk, tile_keys, 16), or values (tile_keys, W). */
static __device__ inline float *tile_of(const struct block *b)
{
    return reinterpret_cast<float *>(b->shared + b->j->shape.tile_at);
}

static __device__ inline char *raw_of(const struct block *b, int stage)
{
    return b->shared + b->j->shape.raw_at + stage * b->j->shape.raw_bytes;
}

static __device__ inline int n_group(const struct block *b)
{
    return b->j->n_group;
}

static __device__ inline int pos_of(const struct block *b, int i)
{
    return b->j->a.step.pos[cu_step_row(&b->j->a.step, i)];
}

static __device__ inline int first_seen(const struct block *b, int pos)
{
    int window = b->j->a.p.window, first = pos - window + 1;
    return window && first > 0 ? first : 0;
}

/* Keys of the page from position `first` on that a query at pos sees: [*begin, *end). */
static __device__ inline bool sees(const struct block *b, int pos, int first, int *begin, int *end)
{
    int low = first_seen(b, pos) - first, high = pos + 1 - first;
    *begin = low > 0 ? low : 0;
    *end = high < PAGE ? high : (int)PAGE;
    return *begin < *end;
}

/* ---- tiles on their way ---- */

/* The tiles of pages [page, end), for each page those of its keys, then those of its values. T: threads of the block. */
struct fetch {
    int page, end, key;
    bool is_v;
    int stage; /* where the next one goes */
};

template <int TYPE, int T> static __device__ inline void fetch_tile(const struct block *b, struct fetch *f)
{
    const struct shape *s = &b->j->shape;
    const struct op_attn *p = &b->j->a.p;

    if (f->page < f->end) {
        int row_bytes = cu_kv<TYPE>::row_bytes(f->is_v ? cu_v_row(p) : p->head_dim_k);
        const char *src = static_cast<const char *>(b->page[f->page]) + (f->is_v ? p->v_off : p->k_off) +
                          (int64_t)(b->part / b->j->n_parts * PAGE + f->key) * row_bytes;
        char *dst = raw_of(b, f->stage);
        for (int at = (int)threadIdx.x * 16; at < s->tile_keys * row_bytes; at += T * 16)
            cu_async_copy16(dst + at, src + at);
        f->key += s->tile_keys;
        if (f->key == PAGE) {
            f->key = 0;
            f->page += f->is_v;
            f->is_v = !f->is_v;
        }
    }
    cu_async_commit(); /* an empty group where there is none: waits count groups */
    f->stage = f->stage + 1 < s->n_stages ? f->stage + 1 : 0;
}

static __device__ inline void wait_for_oldest(int n_stages)
{
    if (n_stages == 3)
        cu_async_wait<2>();
    else if (n_stages == 2)
        cu_async_wait<1>();
    else
        cu_async_wait<0>();
}

/* In a chunk lanes t, t + 4, t + 8, t + 12 of a dot are neighbours: where element i of it stands. */
static __device__ inline int spread(int i)
{
    return (i & 3) << 2 | i >> 2;
}

/* A lane has four neighbours of a chunk; a warp has 4 chunks of 2 keys, which fill all banks. */
template <int TYPE, int T> static __device__ inline void convert_keys(const struct block *b, const char *raw)
{
    const int step = T / 16;
    int dim = b->j->a.p.head_dim_k, row_bytes = cu_kv<TYPE>::row_bytes(dim), n_keys = b->j->shape.tile_keys;
    int lane = (int)threadIdx.x & 3, first_key = (int)threadIdx.x / 32 * 2 + ((int)threadIdx.x >> 2 & 1);

    for (int at = ((int)threadIdx.x >> 3 & 3) * CHUNK; at < dim; at += 4 * CHUNK) {
        const char *row = raw + first_key * row_bytes;
        float *out = tile_of(b) + at * n_keys + first_key * CHUNK + 4 * lane;
        if (at + CHUNK <= dim) {
            CU_UNROLL_BY(2)
            for (int key = first_key; key < n_keys; key += step, row += step * row_bytes, out += step * CHUNK) {
                struct cu_floats<4> x;
                cu_kv<TYPE>::template read<4, 4>(row, at + lane, x.x);
                *reinterpret_cast<struct cu_floats<4> *>(out) = x;
            }
            continue;
        }
        for (int key = first_key; key < n_keys; key += step, row += step * row_bytes, out += step * CHUNK)
            for (int j = 0; at + lane + 4 * j < dim; j++)
                cu_kv<TYPE>::template read<1, 1>(row, at + lane + 4 * j, out + j);
    }
}

/* A thread has four columns of every so many keys. */
template <int TYPE, int W, int T> static __device__ inline void convert_values(const struct block *b, const char *raw)
{
    const int n_rows = T * 4 / W;
    int dim = b->j->a.p.head_dim_v, row_bytes = cu_kv<TYPE>::row_bytes(cu_v_row(&b->j->a.p)),
        n_keys = b->j->shape.tile_keys;
    int c = (int)threadIdx.x * 4 % W, first_key = (int)threadIdx.x * 4 / W, col = b->col + c;
    const char *row = raw + first_key * row_bytes;
    float *out = tile_of(b) + first_key * W + c;

    if (dim % 4 == 0 && cu_v_row(&b->j->a.p) % 4 == 0 && col < dim) { /* where V is in K, rows are K's */
        CU_UNROLL_BY(4)
        for (int key = first_key; key < n_keys; key += n_rows, row += n_rows * row_bytes, out += n_rows * W) {
            struct cu_floats<4> x;
            cu_kv<TYPE>::read_four(row, col, x.x);
            *reinterpret_cast<struct cu_floats<4> *>(out) = x;
        }
        return;
    }
    for (int key = first_key; key < n_keys; key += n_rows, row += n_rows * row_bytes, out += n_rows * W)
        for (int j = 0; j < 4 && col + j < dim; j++)
            cu_kv<TYPE>::template read<1, 1>(row, col + j, out + j);
}

/* The oldest tile on its way into floats, and the next one on its way into its place. */
template <int TYPE, int W, int T>
static __device__ inline void take_tile(const struct block *b, struct fetch *f, bool is_v)
{
    const char *raw = raw_of(b, f->stage);

    wait_for_oldest(b->j->shape.n_stages);
    __syncthreads(); /* all threads' copies are there, and nobody reads the tile before */
    if (is_v)
        convert_values<TYPE, W, T>(b, raw);
    else
        convert_keys<TYPE, T>(b, raw);
    __syncthreads();
    fetch_tile<TYPE, T>(b, f);
}

/* ---- a page ---- */

/* Four lanes of N_Q queries and N_K keys over one chunk; steps are between theirs. */
template <int N_Q, int Q_STEP, int N_K, int K_STEP>
static __device__ inline void multiply(const float *q, const float *k, float (*acc)[4])
{
    struct cu_floats<4> y[N_K];

    CU_UNROLL
    for (int i = 0; i < N_K; i++)
        y[i] = *reinterpret_cast<const struct cu_floats<4> *>(k + i * K_STEP * CHUNK);
    CU_UNROLL
    for (int i = 0; i < N_Q * N_K; i++) {
        struct cu_floats<4> x = *reinterpret_cast<const struct cu_floats<4> *>(q + i / N_K * Q_STEP * CHUNK);
        CU_UNROLL
        for (int lane = 0; lane < 4; lane++)
            acc[i][lane] = fmaf(x.x[lane], y[i % N_K].x[lane], acc[i][lane]);
    }
}

/* The same over a chunk of n < 16 elements, of which the thread has those of `lane`. */
template <int N_Q, int Q_STEP, int N_K, int K_STEP>
static __device__ inline void multiply_end(const float *q, const float *k, int lane, int n, float (*acc)[4])
{
    CU_UNROLL
    for (int j = 0; j < 4; j++) {
        if (lane + 4 * j >= n)
            break;
        CU_UNROLL
        for (int i = 0; i < N_Q * N_K; i++)
            acc[i][j] = fmaf(q[i / N_K * Q_STEP * CHUNK + j], k[i % N_K * K_STEP * CHUNK + j], acc[i][j]);
    }
}

/* The tree of 16 lanes of 4 * N sums, of which thread t of 4 (bits 2 and 3 of the thread) has lanes t, t + 4, t + 8, t + 12: it
 * gets sums [t * N, t * N + N). */
template <int N> static __device__ inline void add_lanes(float (*acc)[4], float *sum)
{
    float x[4 * N], y[2 * N];
    bool has_upper = threadIdx.x & 8, has_odd = threadIdx.x & 4;

    CU_UNROLL
    for (int i = 0; i < 4 * N; i++)
        x[i] = (acc[i][0] + acc[i][2]) + (acc[i][1] + acc[i][3]);
    CU_UNROLL
    for (int i = 0; i < 2 * N; i++) {
        float other = cu_shfl_xor(has_upper ? x[i] : x[i + 2 * N], 8);
        y[i] = (has_upper ? x[i + 2 * N] : x[i]) + other;
    }
    CU_UNROLL
    for (int i = 0; i < N; i++) {
        float other = cu_shfl_xor(has_odd ? y[i] : y[i + N], 4);
        sum[i] = (has_odd ? y[i + N] : y[i]) + other;
    }
}

static __device__ inline float score_of(const struct op_attn *p, float dot)
{
    float s = dot * p->scale;
    return p->softcap != 0.0f ? cu_softcap(s, p->softcap) : s;
}

/* Which queries and keys a thread scores: neighbouring threads have the same queries, those two apart the same keys, so that
 * what they read at once comes at once. */
template <int N, int W> static __device__ inline void score_place(int *q, int *key)
{
    typedef cut<N, W> c;
    int r = (int)threadIdx.x / 16 * 4 | ((int)threadIdx.x & 3);

    if (c::Q_GROUPS == 1) {
        *q = 0;
        *key = r;
        return;
    }
    *key = (r & 1) | (r >> 2) % (c::K_GROUPS / 2) << 1;
    *q = (r >> 1 & 1) | (r >> 2) / (c::K_GROUPS / 2) << 1;
}

/* Scores of keys [k0, k0 + tile_keys) of the page against all queries. */
template <int N, int W> static __device__ inline void score_tile(const struct block *b, int first, int k0)
{
    typedef cut<N, W> c;
    const struct op_attn *p = &b->j->a.p;
    int tile_keys = b->j->shape.tile_keys, dim = p->head_dim_k;
    int lane = (int)threadIdx.x >> 2 & 3, q0, key0;

    score_place<N, W>(&q0, &key0);
    for (int pass = 0; pass < tile_keys; pass += c::N_KEYS) {
        float acc[c::Q_SCORE * c::K_SCORE][4] = {}, sum[c::K_SCORE];
        const float *q = queries_of<N>(b) + q0 * CHUNK + 4 * lane;
        const float *k = tile_of(b) + (pass + key0) * CHUNK + 4 * lane;
        int left = dim;
        CU_UNROLL_BY(2)
        for (; left >= CHUNK; left -= CHUNK, q += N * CHUNK, k += tile_keys * CHUNK)
            multiply<c::Q_SCORE, c::Q_GROUPS, c::K_SCORE, c::K_GROUPS>(q, k, acc);
        if (left)
            multiply_end<c::Q_SCORE, c::Q_GROUPS, c::K_SCORE, c::K_GROUPS>(q, k, lane, left, acc);
        add_lanes<c::K_SCORE>(acc, sum);
        int v = q0 + lane * c::Q_GROUPS, begin, end;
        sees(b, table_of<N>(b)->pos[v], first, &begin, &end);
        CU_UNROLL
        for (int i = 0; i < c::K_SCORE; i++) {
            int in_tile = pass + key0 + i * c::K_GROUPS, key = k0 + in_tile;
            if (in_tile < tile_keys)
                table_of<N>(b)->p[v * P_STRIDE + key] = key >= begin && key < end ? score_of(p, sum[i]) : -CU_INFINITY;
        }
    }
}

/* Scores into weights, m and l of queries v0, v0 + n_warps, ..: a warp has Q of them; old[v] = what o is to be multiplied
 * by. A query that sees nothing of the page stays. Of zeros of either sign any may be the largest: both weigh the same. */
template <int Q, int N> static __device__ inline void weigh_some(const struct block *b, int first, int v0)
{
    const int n_warps = threads_of(N) / 32;
    struct table<N> *t = table_of<N>(b);
    int lane = (int)threadIdx.x % 32;
    float low[Q], high[Q], m[Q], sum[Q];

    CU_UNROLL
    for (int i = 0; i < Q; i++) {
        low[i] = t->p[(v0 + i * n_warps) * P_STRIDE + lane];
        high[i] = t->p[(v0 + i * n_warps) * P_STRIDE + lane + 32];
        m[i] = cu_max(high[i], cu_max(low[i], -CU_INFINITY));
    }
    CU_UNROLL
    for (int step = 16; step; step /= 2) {
        CU_UNROLL
        for (int i = 0; i < Q; i++)
            m[i] = cu_max(cu_shfl_xor(m[i], step), m[i]);
    }
    CU_UNROLL
    for (int i = 0; i < Q; i++) {
        m[i] = cu_max(m[i], t->m[v0 + i * n_warps]);
        low[i] = cu_exp(low[i] - m[i]);
        high[i] = cu_exp(high[i] - m[i]);
        t->p[(v0 + i * n_warps) * P_STRIDE + lane] = low[i];
        t->p[(v0 + i * n_warps) * P_STRIDE + lane + 32] = high[i];
        float low_16 = cu_shfl_xor(low[i], 16),
              high_16 = cu_shfl_xor(high[i], 16); /* of the key 16 behind, or before */
        sum[i] = low[i] + low_16;
        sum[i] += lane < 16 ? high[i] : high_16;
        sum[i] += lane < 16 ? high_16 : high[i];
    }
    CU_UNROLL
    for (int step = 8; step; step /= 2) {
        CU_UNROLL
        for (int i = 0; i < Q; i++)
            sum[i] += cu_shfl_xor(sum[i], step);
    }
    cu_syncwarp(); /* all lanes have read m */
    /* A lane for each query keeps what came out. */
    CU_UNROLL
    for (int i = 1; i < Q; i++) {
        m[0] = lane == i ? m[i] : m[0];
        sum[0] = lane == i ? sum[i] : sum[0];
    }
    int v = v0 + lane * n_warps, begin, end;
    if (lane >= Q)
        return;
    if (!sees(b, t->pos[v], first, &begin, &end)) {
        t->old[v] = 1.0f;
        return;
    }
    float old = cu_exp(t->m[v] - m[0]);
    t->old[v] = old;
    t->m[v] = m[0];
    t->l[v] = t->l[v] * old + sum[0];
}

template <int N> static __device__ inline void weigh(const struct block *b, int first)
{
    const int n_warps = threads_of(N) / 32, n_at_once = N / n_warps < 4 ? N / n_warps : 4;

    for (int v0 = (int)threadIdx.x / 32; v0 < N; v0 += n_warps * n_at_once) {
        weigh_some<n_at_once, N>(b, first, v0);
    }
}

/* Which query of the block, and which column of its slice, is number i of the thread. */
template <int N, int W> struct place {
    typedef cut<N, W> c;
    int group, first_col;

    __device__ inline place() : group((int)threadIdx.x / c::COL_THREADS), first_col((int)threadIdx.x % c::COL_THREADS)
    {
    }
    __device__ inline bool is_in() const
    {
        return group < c::V_GROUPS;
    }
    __device__ inline int query(int i) const
    {
        return group + i * c::V_GROUPS;
    }
    __device__ inline int col(int i) const
    {
        return first_col * c::VEC + i / c::VEC * c::COL_THREADS * c::VEC + i % c::VEC;
    }
};

/* A thread's part of o. */
template <int N, int W> struct part {
    float o[cut<N, W>::Q_VALUE][cut<N, W>::COLS];
};

/* o += weights . V of keys [k0, k0 + tile_keys) of the page, ascending. IS_WHOLE: all queries see all of the page. */
template <int N, int W, bool IS_WHOLE>
static __device__ inline void add_tile(const struct block *b, int first, int k0, struct part<N, W> *o)
{
    typedef cut<N, W> c;
    place<N, W> mine;

    if (!mine.is_in())
        return;
    const float *rows = tile_of(b) + mine.col(0), *p = table_of<N>(b)->p + mine.query(0) * P_STRIDE + k0;
    for (int key = 0; key < b->j->shape.tile_keys; key += 4, rows += 4 * W, p += 4) {
        CU_UNROLL
        for (int g = 0; g < c::N_VEC; g++) {
            struct cu_floats<c::VEC> x[4];
            CU_UNROLL
            for (int at = 0; at < 4; at++)
                x[at] =
                    *reinterpret_cast<const struct cu_floats<c::VEC> *>(rows + at * W + g * c::COL_THREADS * c::VEC);
            CU_UNROLL
            for (int i = 0; i < c::Q_VALUE; i++) {
                struct cu_floats<4> w = *reinterpret_cast<const struct cu_floats<4> *>(p + i * c::V_GROUPS * P_STRIDE);
                int begin = 0, end = 0;
                if (!IS_WHOLE)
                    sees(b, table_of<N>(b)->pos[mine.query(i)], first, &begin, &end);
                CU_UNROLL
                for (int at = 0; at < 4; at++) {
                    if (!IS_WHOLE && (k0 + key + at < begin || k0 + key + at >= end))
                        continue;
                    CU_UNROLL
                    for (int l = 0; l < c::VEC; l++) {
                        float *sum = &o->o[i][g * c::VEC + l];
                        *sum = fmaf(w.x[at], x[at].x[l], *sum);
                    }
                }
            }
        }
    }
}

template <int N, int W>
static __device__ inline void scale(const float *old, const place<N, W> &mine, struct part<N, W> *o)
{
    typedef cut<N, W> c;

    CU_UNROLL
    for (int i = 0; i < c::Q_VALUE; i++) {
        float f = old[mine.query(i)];
        CU_UNROLL
        for (int k = 0; k < c::COLS; k++)
            o->o[i][k] *= f;
    }
}

template <int TYPE, int N, int W>
static __device__ inline void fold_page(const struct block *b, int page, struct fetch *f, struct part<N, W> *o)
{
    const struct table<N> *t = table_of<N>(b);
    int first = page * PAGE, tile_keys = b->j->shape.tile_keys;
    int last_row = t->pos[b->n_q - 1]; /* rows ascend: the first one ends first, the last one begins last */
    bool is_whole = t->pos[0] >= first + PAGE - 1 && first_seen(b, last_row) <= first;
    place<N, W> mine;

    for (int k0 = 0; k0 < PAGE; k0 += tile_keys) {
        take_tile<TYPE, W, threads_of(N)>(b, f, false);
        score_tile<N, W>(b, first, k0);
    }
    __syncthreads();
    weigh<N>(b, first);
    for (int k0 = 0; k0 < PAGE; k0 += tile_keys) {
        take_tile<TYPE, W, threads_of(N)>(b, f, true);
        if (k0 == 0 && mine.is_in())
            scale(t->old, mine, o);
        if (is_whole)
            add_tile<N, W, true>(b, first, k0, o);
        else
            add_tile<N, W, false>(b, first, k0, o);
    }
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

static __device__ inline bool is_fresh(float m, float l)
{
    return m == -CU_INFINITY && l == 0.0f;
}

template <int N, int W> static __device__ inline void reset(struct part<N, W> *o)
{
    CU_UNROLL
    for (int i = 0; i < cut<N, W>::Q_VALUE * cut<N, W>::COLS; i++)
        o->o[i / cut<N, W>::COLS][i % cut<N, W>::COLS] = 0.0f;
}

static __device__ inline int head_of(const struct block *b, int v)
{
    return b->part * n_group(b) + v % n_group(b);
}

/* Where the block's slice of query v goes. */
static __device__ inline float *dst_of(const struct block *b, int v)
{
    const struct cu_attn_args *a = &b->j->a;
    return a->dst + (int64_t)(b->i0 + v / n_group(b)) * a->dst_stride + head_of(b, v) * a->p.head_dim_v + b->col;
}

/* By what a head's o is multiplied in the end: 1 / l, with what its sink adds to l. */
static __device__ inline float factor_of(const struct cu_attn_args *a, int head, float m, float l)
{
    return 1.0f / (a->sinks ? l + cu_exp(a->sinks[head] - m) : l);
}

/* Merge the segment into the sum, whose o lies in dst, and begin anew; rows that saw nothing of it stay. is_last: divide. */
template <int N, int W>
static __device__ inline void end_segment(const struct block *b, struct part<N, W> *o, bool is_last)
{
    typedef cut<N, W> c;
    struct table<N> *t = table_of<N>(b);
    place<N, W> mine;
    int n_cols = b->j->a.p.head_dim_v - b->col;

    __syncthreads(); /* m and l of all queries are there */
    CU_UNROLL
    for (int i = 0; i < c::Q_VALUE; i++) {
        int v = mine.query(i);
        if (!mine.is_in() || v >= b->n_q)
            continue;
        bool has = !is_fresh(t->m[v], t->l[v]), had = !is_fresh(t->ms[v], t->ls[v]);
        struct merger g = merger_of(t->m[v], t->ms[v]);
        float l = has ? fmaf(t->l[v], g.f, t->ls[v] * g.f_sum) : t->ls[v], *dst = dst_of(b, v);
        float f = is_last ? factor_of(&b->j->a, head_of(b, v), has ? g.m : t->ms[v], l) : 1.0f;
        CU_UNROLL
        for (int k = 0; k < c::COLS; k++) {
            if (mine.col(k) >= n_cols)
                continue;
            float sum = had ? dst[mine.col(k)] : 0.0f;
            sum = has ? fmaf(o->o[i][k], g.f, sum * g.f_sum) : sum;
            dst[mine.col(k)] = is_last ? sum * f : sum;
        }
    }
    __syncthreads();
    int v = (int)threadIdx.x;
    if (v < b->n_q && !is_fresh(t->m[v], t->l[v])) {
        struct merger g = merger_of(t->m[v], t->ms[v]);
        t->ms[v] = g.m;
        t->ls[v] = fmaf(t->l[v], g.f, t->ls[v] * g.f_sum);
        t->m[v] = -CU_INFINITY;
        t->l[v] = 0.0f;
    }
    reset<N, W>(o);
}

/* Of segment `segment` of the launch. */
static __device__ inline float *state_of(const struct cu_attn_args *a, int i, int head, int segment)
{
    return a->states + i * a->state_row + head * a->state_head + segment * a->state_segment;
}

static __device__ inline float *state_of_query(const struct block *b, int v)
{
    return state_of(&b->j->a, b->i0 + v / n_group(b), head_of(b, v), (int)blockIdx.z);
}

/* Of the rows that see something of the segment, which begins at position `first`. */
template <int N, int W>
static __device__ inline void write_states(const struct block *b, const struct part<N, W> *o, int first)
{
    typedef cut<N, W> c;
    const struct table<N> *t = table_of<N>(b);
    place<N, W> mine;
    int dim = b->j->a.p.head_dim_v, v = (int)threadIdx.x;

    __syncthreads(); /* m and l of all queries are there */
    CU_UNROLL
    for (int i = 0; i < c::Q_VALUE; i++) {
        int q = mine.query(i);
        if (!mine.is_in() || q >= b->n_q || t->pos[q] < first)
            continue;
        float *state = state_of_query(b, q) + b->col;
        CU_UNROLL
        for (int k = 0; k < c::COLS; k++)
            if (b->col + mine.col(k) < dim)
                state[mine.col(k)] = o->o[i][k];
    }
    if (v >= b->n_q || b->col != 0 || t->pos[v] < first)
        return;
    state_of_query(b, v)[dim] = t->m[v];
    state_of_query(b, v)[dim + 1] = t->l[v];
}

/* ---- the kernel ---- */

static __device__ inline struct block block_of(const struct job *j, char *shared)
{
    struct block b = {};

    b.j = j;
    b.shared = shared;
    b.part = (int)blockIdx.y / j->shape.n_slices;
    b.col = (int)blockIdx.y % j->shape.n_slices * j->shape.width;
    return b;
}

/* Rows [i0, i0 + n_rows), which are of one sequence: their queries, and a fresh state. */
template <int N> static __device__ inline void begin_rows(struct block *b, int i0, int n_rows)
{
    const struct cu_attn_args *a = &b->j->a;
    struct table<N> *t = table_of<N>(b);
    int dim = a->p.head_dim_k;

    b->i0 = i0;
    b->n_q = n_rows * n_group(b);
    b->page = cu_page_table(&a->step, cu_step_row(&a->step, i0), a->p.group);
    for (int v = (int)threadIdx.x / 32; v < b->n_q; v += threads_of(N) / 32) {
        const float *q = a->q + (int64_t)(i0 + v / n_group(b)) * a->q_stride + (int64_t)head_of(b, v) * dim;
        for (int i = (int)threadIdx.x % 32; i < dim; i += 32)
            queries_of<N>(b)[(i / CHUNK * N + v) * CHUNK + spread(i % CHUNK)] = q[i];
    }
    for (int v = (int)threadIdx.x; v < N; v += threads_of(N)) {
        t->m[v] = t->ms[v] = -CU_INFINITY;
        t->l[v] = t->ls[v] = 0.0f;
        t->pos[v] = v < b->n_q ? pos_of(b, i0 + v / n_group(b)) : -1;
    }
    __syncthreads();
}

/* Pages that the rows see: all, or, with states, those of the block's segment. With a window there is one row then: segments
 * are counted from the first that it sees. None where they lie in the host's memory. */
static __device__ inline void pages_of(const struct block *b, const int *pos, struct fetch *f, int *segment)
{
    const int per = SEGMENT / PAGE;
    int seen = first_seen(b, pos[0]);

    f->page = seen / PAGE;
    f->end = pos[b->n_q - 1] / PAGE + 1;
    if (!b->j->a.states)
        return;
    *segment = seen / SEGMENT + b->j->a.first + (int)blockIdx.z;
    int begin = *segment * per, end = begin + per;
    f->page = begin > f->page ? begin : f->page;
    f->end = end < f->end ? end : f->end;
    if (f->page < f->end && !b->page[f->page])
        f->end = f->page;
}

template <int TYPE, int N, int W> static __device__ inline void walk(const struct block *b)
{
    struct fetch f = {};
    struct part<N, W> o;
    int segment = 0;

    pages_of(b, table_of<N>(b)->pos, &f, &segment);
    int page = f.page, end = f.end;
    if (page >= end)
        return;
    reset<N, W>(&o);
    for (int i = 0; i < b->j->shape.n_stages; i++)
        fetch_tile<TYPE, threads_of(N)>(b, &f);
    for (; page < end; page++) {
        fold_page<TYPE, N, W>(b, page, &f, &o);
        if (!b->j->a.states && ((page + 1) % (SEGMENT / PAGE) == 0 || page + 1 == end))
            end_segment<N, W>(b, &o, page + 1 == end);
    }
    cu_async_wait<0>();
    if (b->j->a.states)
        write_states<N, W>(b, &o, segment * SEGMENT);
}

/* Rows of the tile from `first` to `end` that are of one sequence. */
static __device__ inline int run_of_rows(const struct cu_attn_args *a, int first, int end)
{
    int n = 1, seq = a->step.seq[cu_step_row(&a->step, first)];

    while (first + n < end && a->step.seq[cu_step_row(&a->step, first + n)] == seq)
        n++;
    return n;
}

/* Which tile of rows: of two neighbouring heads one begins at the end, so that tiles that see much and tiles that see little
 * meet on a multiprocessor. */
static __device__ inline int tile_begin(const struct cu_attn_args *a)
{
    unsigned tile = blockIdx.y % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return (int)tile * a->tile_rows;
}

/* blockIdx: x a tile of rows, y the KV head, the part of its heads and the slice of columns, z the segment of those of this launch. */
template <int TYPE, int N, int W> static __global__ void CU_BOUNDS(threads_of(N), blocks_of(N)) attn(const struct job j)
{
    CU_SHARED_DYN(char, shared);

    cu_await();
    struct block b = block_of(&j, shared);
    int begin = tile_begin(&j.a), end = begin + j.a.tile_rows < j.a.n ? begin + j.a.tile_rows : j.a.n;
    for (int first = begin, n; first < end; first += n) {
        n = run_of_rows(&j.a, first, end);
        begin_rows<N>(&b, first, n);
        walk<TYPE, N, W>(&b);
        __syncthreads(); /* before the next rows' states begin anew */
    }
}

template <int TYPE, int N, int W> static cudaError_t launch(const struct job *j, dim3 grid, cudaStream_t stream)
{
    return CU_LAUNCH((attn<TYPE, N, W>), grid, dim3(threads_of(N)), (size_t)j->shape.bytes, stream, *j);
}

template <int TYPE, int N> static cudaError_t launch_width(const struct job *j, dim3 grid, cudaStream_t stream)
{
    const int narrow = N < MAX_Q ? N : 16; /* 32 queries of 256 columns never fit */

    if (j->shape.width == 64)
        return launch<TYPE, N, 64>(j, grid, stream);
    if (j->shape.width == 128 || N == MAX_Q)
        return launch<TYPE, N, 128>(j, grid, stream);
    return j->shape.width == 256 ? launch<TYPE, narrow, 256>(j, grid, stream)
                                 : launch<TYPE, narrow, WIDE>(j, grid, stream);
}

template <int TYPE> static cudaError_t launch_type(const struct job *j, dim3 grid, cudaStream_t stream)
{
    switch (j->shape.n_q) {
    case 4:
        return launch_width<TYPE, 4>(j, grid, stream);
    case 8:
        return launch_width<TYPE, 8>(j, grid, stream);
    case 16:
        return launch_width<TYPE, 16>(j, grid, stream);
    default:
        return launch_width<TYPE, 32>(j, grid, stream);
    }
}

cudaError_t cu_attn(const struct cu_attn_args *a, cudaStream_t stream)
{
    const int n_tiles =
        8; /* at least, where there are as many rows: small tiles beside each other finish before one large one */
    int most = larger(a->n / n_tiles, 1);
    struct job j = {*a, {}, a->p.n_head / a->p.n_head_kv, 1};

    j.a.tile_rows = a->tile_rows < most ? a->tile_rows : most;
    if (!shape_of(&a->p, j.a.tile_rows * j.n_group, a->shared_bytes, &j.shape)) { /* of a single row */
        int n_q = most_queries(&a->p, a->shared_bytes);
        if (!n_q)
            return cudaErrorInvalidValue;
        while (j.n_group / j.n_parts > n_q || j.n_group % j.n_parts)
            j.n_parts++;
        j.n_group /= j.n_parts;
        j.a.tile_rows = 1;
        shape_of(&a->p, j.n_group, a->shared_bytes, &j.shape);
    }
    dim3 grid((unsigned)((a->n + j.a.tile_rows - 1) / j.a.tile_rows),
              (unsigned)(a->p.n_head_kv * j.n_parts * j.shape.n_slices), a->states ? (unsigned)a->n_segments : 1);
    return a->p.kv_type == QUANT_F16 ? launch_type<QUANT_F16>(&j, grid, stream)
                                     : launch_type<QUANT_Q8_0>(&j, grid, stream);
}

template <int TYPE, int N> static cudaError_t allow(int bytes)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(attn<TYPE, N, WIDE>),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

cudaError_t cu_attn_prepare(int shared_bytes)
{
    cudaError_t e = cudaSuccess;

#define ALLOW(N)                                                \
    e = e ? e : allow<QUANT_F16, N>(most_shared(shared_bytes)); \
    e = e ? e : allow<QUANT_Q8_0, N>(most_shared(shared_bytes));
    ALLOW(4)
    ALLOW(8)
    ALLOW(16)
#undef ALLOW
    return e;
}

/* blockIdx: x the row, y the head. */
static __global__ void merge(const struct cu_attn_args a)
{
    cu_await();
    int pos = a.step.pos[cu_step_row(&a.step, (int)blockIdx.x)], dim = a.p.head_dim_v;
    int seen = a.p.window && pos - a.p.window + 1 > 0 ? pos - a.p.window + 1 : 0;
    int left = pos / SEGMENT - seen / SEGMENT + 1 - a.first, n = left < a.n_segments ? left : a.n_segments;
    float *sum = a.sums + blockIdx.x * a.sum_stride + (int64_t)blockIdx.y * (dim + 2);
    float *dst = a.dst + blockIdx.x * a.dst_stride + (int64_t)blockIdx.y * dim;
    float m = a.first ? sum[dim] : -CU_INFINITY, l = a.first ? sum[dim + 1] : 0.0f;

    __syncthreads(); /* before the first thread writes m and l */
    for (int c = (int)threadIdx.x; c < dim + 1;
         c += MERGE_THREADS) { /* one more than columns: that thread keeps m and l */
        float o = a.first && c < dim ? sum[c] : 0.0f, mc = m, lc = l;
        CU_UNROLL_BY(4)
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
            dst[c] = o * factor_of(&a, (int)blockIdx.y, mc, lc);
    }
}

cudaError_t cu_attn_merge(const struct cu_attn_args *a, cudaStream_t stream)
{
    return CU_LAUNCH((merge), dim3((unsigned)a->n, (unsigned)a->p.n_head), dim3(MERGE_THREADS), 0, stream, *a);
}
