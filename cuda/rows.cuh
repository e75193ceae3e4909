/* What is done to a row by itself, by the arithmetic of cpu/kern_ref.c. Threads that work on one row are a crew; the kernels that have
 * crews are k_rows.cu's. */
#ifndef FERRY_CUDA_ROWS_CUH
#define FERRY_CUDA_ROWS_CUH

#include "cuda/device.cuh"
#include "cuda/math.cuh"

/* Thread `me` of n, whole warps; they lie in block `block` of n_blocks of the same row. */
struct cu_crew {
    int me, n, block, n_blocks;
};

/* The step's row that an op's row stands for. */
static __device__ inline int cu_step_row(const struct cu_step *s, int i)
{
    return s->out_row ? s->out_row[i] : i;
}

/* ---- elementwise ---- */

/* Elements that a thread fetches before it writes the first: what is under way at once. */
enum { CU_ROW_BATCH = 4 };

/* Where the second argument comes from. */
enum cu_row_second { CU_B_NONE, CU_B_SAME, CU_B_WEIGHT, CU_B_SCALAR };

template <int KIND> struct cu_row_fn;

template <> struct cu_row_fn<CU_ROW_ADD> {
    static constexpr int SECOND = CU_B_SAME;
    static __device__ inline float of(const struct cu_rows_args *, float a, float b)
    {
        return a + b;
    }
};

template <> struct cu_row_fn<CU_ROW_ADD_BIAS> {
    static constexpr int SECOND = CU_B_WEIGHT;
    static __device__ inline float of(const struct cu_rows_args *, float a, float b)
    {
        return a + b;
    }
};

template <> struct cu_row_fn<CU_ROW_SCALE> {
    static constexpr int SECOND = CU_B_NONE;
    static __device__ inline float of(const struct cu_rows_args *p, float a, float)
    {
        return a * (p->w ? p->w[0] : p->f);
    }
};

template <> struct cu_row_fn<CU_ROW_SOFTCAP> {
    static constexpr int SECOND = CU_B_NONE;
    static __device__ inline float of(const struct cu_rows_args *p, float a, float)
    {
        return cu_softcap(a, p->f);
    }
};

template <> struct cu_row_fn<CU_ROW_GLU> {
    static constexpr int SECOND = CU_B_SAME;
    static __device__ inline float of(const struct cu_rows_args *p, float a, float b)
    {
        return cu_glu_of(p->act, a, b);
    }
};

template <> struct cu_row_fn<CU_ROW_GATE> {
    static constexpr int SECOND = CU_B_SCALAR;
    static __device__ inline float of(const struct cu_rows_args *, float a, float b)
    {
        return a * cu_sigmoid(b);
    }
};

template <> struct cu_row_fn<CU_ROW_GATE_EACH> {
    static constexpr int SECOND = CU_B_SAME;
    static __device__ inline float of(const struct cu_rows_args *, float a, float b)
    {
        return a * cu_sigmoid(b);
    }
};

/* dst may be a or b. */
template <int KIND>
static __device__ inline void cu_row_elements(const struct cu_rows_args *p, int64_t i, struct cu_crew crew)
{
    typedef cu_row_fn<KIND> f;
    const float *row_a = p->a + i * p->a_stride;
    const float *row_b = f::SECOND == CU_B_WEIGHT ? p->w : f::SECOND == CU_B_NONE ? NULL : p->b + i * p->b_stride;
    float *dst = p->dst + i * p->dst_stride;

    for (int64_t first = crew.me; first < p->width; first += CU_ROW_BATCH * (int64_t)crew.n) {
        float a[CU_ROW_BATCH], b[CU_ROW_BATCH];
        CU_UNROLL
        for (int j = 0; j < CU_ROW_BATCH; j++) {
            int64_t c = first + j * (int64_t)crew.n;
            bool is_in = c < p->width;
            a[j] = is_in ? row_a[c] : 0.0f;
            b[j] = f::SECOND == CU_B_NONE || !is_in ? 0.0f : row_b[f::SECOND == CU_B_SCALAR ? 0 : c];
        }
        CU_UNROLL
        for (int j = 0; j < CU_ROW_BATCH; j++)
            if (first + j * (int64_t)crew.n < p->width)
                dst[first + j * (int64_t)crew.n] = f::of(p, a[j], b[j]);
    }
}

/* Of up to so many ranks at once. */
enum { CU_COMBINE_RANKS = 8 };

static __device__ inline void cu_row_combine(const struct cu_rows_args *p, int64_t i, struct cu_crew crew)
{
    const float *gates = p->b + i * p->b_stride, *rows = p->a + i * p->len * p->a_stride;

    for (int64_t c = crew.me; c < p->width; c += crew.n) {
        float acc = 0.0f;
        for (int64_t first = 0; first < p->len; first += CU_COMBINE_RANKS) {
            float x[CU_COMBINE_RANKS], gate[CU_COMBINE_RANKS];
            CU_UNROLL
            for (int r = 0; r < CU_COMBINE_RANKS; r++) {
                bool is_in = first + r < p->len;
                x[r] = is_in ? rows[(first + r) * p->a_stride + c] : 0.0f;
                gate[r] = is_in ? gates[first + r] : 0.0f;
            }
            CU_UNROLL
            for (int r = 0; r < CU_COMBINE_RANKS; r++)
                if (first + r < p->len)
                    acc = first + r ? fmaf(gate[r], x[r], acc) : x[r] * gate[r];
        }
        p->dst[i * p->dst_stride + c] = acc;
    }
}

static __device__ inline void cu_row_split(const struct cu_split_args *p, int64_t row, struct cu_crew crew)
{
    const float *x = p->x + row * p->x_stride;
    const int group = (int)(p->width / p->p.n_groups);

    for (int64_t c = crew.me; c < p->width; c += crew.n) {
        int64_t at[CU_SPLIT_TO] = {}; /* where the part's values begin */
        int part = 0, in = (int)(c % group);
        for (; in >= p->p.len[part]; in -= p->p.len[part++])
            at[p->p.to[part]] += (int64_t)p->p.len[part] * p->p.n_groups;
        int to = p->p.to[part];
        p->dst[to][row * p->dst_stride[to] + at[to] + c / group * p->p.len[part] + in] = x[c];
    }
}

/* A thread for each pair. */
static __device__ inline void cu_row_rope(const struct cu_rope_args *p, int64_t row, struct cu_crew crew)
{
    int half = p->p.n_rot / 2, apart = p->p.neox ? half : 1;
    int first = p->p.at_end ? p->p.head_dim - p->p.n_rot : 0, src_first = p->p.at_end ? p->src_dim - p->p.n_rot : 0;
    const float *table = p->table + row * p->table_stride;

    for (int at = crew.me; at < half * p->p.n_head; at += crew.n) {
        int head = at / half, i = at % half;
        int pair = i * (p->p.neox ? 1 : 2);
        float *x = p->x + row * p->x_stride + (int64_t)head * p->p.head_dim + first + pair;
        const float *src = p->src + row * p->src_stride + (p->p.from_one ? 0 : head * p->src_dim) + src_first + pair;
        float c = table[i], s = table[half + i], a = src[0], b = src[apart];
        x[0] = a * c - b * s;
        x[apart] = a * s + b * c;
    }
}

/* ---- norm ---- */

/* Values of a group in shared memory at once; groups up to NARROW have 16 threads each, of any block, wider ones a whole block. */
enum { CU_N_LANE = 16, CU_NORM_CHUNK = 4096, CU_NORM_NARROW = 256 };

/* dst = a * f * w over [0, n); n_threads from number me on. */
static __device__ inline void cu_norm_scale(const float *a, const float *w, float f, float *dst, int64_t n, int me,
                                            int n_threads)
{
    for (int64_t first = me; first < n; first += CU_ROW_BATCH * (int64_t)n_threads) {
        float x[CU_ROW_BATCH], by[CU_ROW_BATCH];
        CU_UNROLL
        for (int j = 0; j < CU_ROW_BATCH; j++) {
            int64_t k = first + j * (int64_t)n_threads;
            x[j] = k < n ? a[k] : 0.0f;
            by[j] = k < n ? w[k] : 0.0f;
        }
        CU_UNROLL
        for (int j = 0; j < CU_ROW_BATCH; j++)
            if (first + j * (int64_t)n_threads < n)
                dst[first + j * (int64_t)n_threads] = x[j] * f * by[j];
    }
}

static __device__ inline void cu_norm_narrow(const struct cu_rows_args *p, int64_t i, struct cu_crew crew)
{
    int n_groups = (int)(p->width / p->len), lane = crew.me % CU_N_LANE;

    /* Warps stay whole: the group of one half may be missing. */
    for (int pair = crew.me / 32; 2 * pair < n_groups; pair += crew.n / 32) {
        int group = 2 * pair + crew.me / CU_N_LANE % 2;
        bool is_in = group < n_groups;
        int64_t at = (is_in ? group : 0) * p->len;
        const float *a = p->a + i * p->a_stride + at;
        float sum = 0.0f;
        CU_UNROLL_BY(8)
        for (int64_t k = lane; k < p->len; k += CU_N_LANE)
            sum = fmaf(a[k], a[k], sum);
        sum = cu_tree16_shfl(sum);
        if (is_in)
            cu_norm_scale(a, p->w, 1.0f / sqrtf(sum / (float)p->len + p->f), p->dst + i * p->dst_stride + at, p->len,
                          lane, CU_N_LANE);
    }
}

/* As above: 16 threads for each head. */
static __device__ inline void cu_row_l2(const struct cu_l2_args *p, int64_t i, struct cu_crew crew)
{
    const int lane = crew.me % CU_N_LANE, dim = p->p.head_dim;

    for (int pair = crew.me / 32; 2 * pair < p->p.n_head; pair += crew.n / 32) {
        int head = 2 * pair + crew.me / CU_N_LANE % 2;
        bool is_in = head < p->p.n_head;
        float *x = p->x + i * p->x_stride + (int64_t)(is_in ? head : 0) * dim, sum = 0.0f;
        CU_UNROLL_BY(8)
        for (int k = lane; k < dim; k += CU_N_LANE)
            sum = fmaf(x[k], x[k], sum);
        float f = 1.0f / sqrtf(cu_tree16_shfl(sum) + p->p.eps);
        for (int k = lane; is_in && k < dim; k += CU_N_LANE)
            x[k] *= f;
    }
}

/* The sum of squares has 16 lanes whose order is fixed, so only 16 threads add; all of the block fetch. shared: CU_NORM_CHUNK + CU_N_LANE
 * floats. */
static __device__ inline void cu_norm_wide(const struct cu_rows_args *p, int64_t i, struct cu_crew crew, float *shared)
{
    float *lane = shared + CU_NORM_CHUNK;
    int me = (int)threadIdx.x, n_threads = (int)blockDim.x;

    for (int64_t group = crew.block; group < p->width / p->len; group += crew.n_blocks) {
        const float *a = p->a + i * p->a_stride + group * p->len;
        float sum = 0.0f;
        for (int64_t first = 0; first < p->len; first += CU_NORM_CHUNK) {
            int n = p->len - first < CU_NORM_CHUNK ? (int)(p->len - first) : (int)CU_NORM_CHUNK;
            CU_UNROLL_BY(4)
            for (int k = me; k < n; k += n_threads)
                shared[k] = a[first + k];
            __syncthreads();
            if (me < CU_N_LANE)
                sum = cu_lane_dot(shared, shared, me, n, sum);
            __syncthreads();
        }
        if (me < CU_N_LANE)
            lane[me] = sum;
        __syncthreads();
        if (me == 0)
            lane[0] = 1.0f / sqrtf(cu_tree16(lane) / (float)p->len + p->f);
        __syncthreads();
        cu_norm_scale(a, p->w, lane[0], p->dst + i * p->dst_stride + group * p->len, p->len, me, n_threads);
        __syncthreads(); /* before the next group is fetched */
    }
}

/* ---- route: the first warp of the crew ---- */

/* Like exp_sum of kern_ref.c over n values of shared memory. */
static __device__ inline float cu_exp_sum(float *x, float m, int n)
{
    float sum = 0.0f;

    for (int e = (int)threadIdx.x; e < n; e += 32)
        x[e] = cu_exp(x[e] - m);
    cu_syncwarp();
    if (threadIdx.x < CU_N_LANE)
        for (int e = (int)threadIdx.x; e < n; e += CU_N_LANE)
            sum += x[e];
    sum = cu_tree16_shfl(sum);
    float lower = cu_shfl_xor(sum, 16);
    return threadIdx.x < CU_N_LANE ? sum : lower;
}

static __device__ inline void cu_softmax(float *x, int n)
{
    float m = -CU_INFINITY;

    for (int e = (int)threadIdx.x; e < n; e += 32)
        m = cu_max(x[e], m);
    for (int step = 16; step; step /= 2)
        m = cu_max(cu_shfl_xor(m, step), m);
    float sum = cu_exp_sum(x, m, n);
    for (int e = (int)threadIdx.x; e < n; e += 32)
        x[e] /= sum;
    cu_syncwarp();
}

/* What the selection compares, as a number: a NaN loses against everything, of equals the lower id comes first. Never 0. */
static __device__ inline uint64_t cu_rank_of(float x, int id)
{
    uint32_t bits = cu_bits_of_f32(x + 0.0f); /* zeros of either sign are equal */
    uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)(x == x ? order : 0) << 32 | (0xffffffffu - (uint32_t)id);
}

/* The lane's best that is not taken; 0: none. */
static __device__ inline uint64_t cu_lane_best(const float *select, const char *taken, int n)
{
    uint64_t best = 0;

    CU_UNROLL_BY(4)
    for (int e = (int)threadIdx.x; e < n; e += 32) {
        uint64_t rank = taken[e] ? 0 : cu_rank_of(select[e], e);
        best = rank > best ? rank : best;
    }
    return best;
}

/* The best of all lanes' best: its id. */
static __device__ inline int cu_best_expert(uint64_t best)
{
    for (int step = 16; step; step /= 2) {
        uint32_t high = (uint32_t)cu_shfl_xor((int)(best >> 32), step), low = (uint32_t)cu_shfl_xor((int)best, step);
        uint64_t other = (uint64_t)high << 32 | low;
        best = other > best ? other : best;
    }
    return (int)(0xffffffffu - (uint32_t)best);
}

/* The gates (k) in shared memory, a lane for each; all of them add up, in the order of the reference. */
static __device__ inline float cu_weighed(const struct op_route *p, const float *gates, int r)
{
    float gate = gates[r], sum = 0.0f;

    for (int i = 0; p->normalize && i < p->k; i++)
        sum += gates[i];
    sum = sum < 6.103515625e-5f ? 6.103515625e-5f : sum;
    return (p->normalize ? gate / sum : gate) * p->scale;
}

/* Is what the selection compares not the score itself? */
static inline __host__ __device__ bool cu_route_has_select(const struct cu_route_args *a)
{
    return a->bias || a->p.n_group;
}

/* A group's score: the sum of its two best, a lane for each group. */
static __device__ inline void cu_score_groups(const struct op_route *p, const float *select, float *sums)
{
    int len = p->n_expert / p->n_group;

    for (int g = (int)threadIdx.x; g < p->n_group; g += 32) {
        const float *x = select + g * len;
        uint64_t best = 0, second = 0;
        for (int e = 0; e < len; e++) {
            uint64_t rank = cu_rank_of(x[e], e);
            second = rank > best ? best : rank > second ? rank : second;
            best = rank > best ? rank : best;
        }
        sums[g] = x[0xffffffffu - (uint32_t)best] + x[0xffffffffu - (uint32_t)second];
    }
    cu_syncwarp();
}

/* Selection scores of all experts but those of the best groups become -INFINITY. sums: (n_group). */
static __device__ inline void cu_choose_groups(const struct op_route *p, float *select, float *sums)
{
    int len = p->n_expert / p->n_group;

    cu_score_groups(p, select, sums);
    for (int g = (int)threadIdx.x; g < p->n_group; g += 32) {
        int n_better = 0;
        for (int other = 0; other < p->n_group; other++)
            n_better += cu_rank_of(sums[other], other) > cu_rank_of(sums[g], g);
        for (int e = g * len; n_better >= p->n_group_used && e < (g + 1) * len; e++)
            select[e] = -CU_INFINITY;
    }
    cu_syncwarp();
}

static_assert(9 * CU_ROUTE_MAX_EXPERTS + 4 * (CU_ROUTE_MAX_USED + DEVICE_MAX_EXPERT_GROUPS) <= 48 * 1024,
              "more than a block has without asking");

static inline __host__ __device__ size_t cu_route_shared_bytes(const struct cu_route_args *a)
{
    size_t n = (size_t)a->p.n_expert;
    return ((cu_route_has_select(a) ? 2 : 1) * n + (size_t)(a->p.k + a->p.n_group)) * sizeof(float) + n;
}

/* shared: cu_route_shared_bytes(). Threads of a crew are those of its block. */
static __device__ inline void cu_row_route(const struct cu_route_args *a, int64_t i, struct cu_crew crew, float *shared)
{
    /* (n_expert), gates (k), sums (n_group), select (n_expert) if it is not the score, taken (n_expert) */
    int n = a->p.n_expert, lane = crew.me;
    const bool has_select = cu_route_has_select(a);
    float *score = shared, *gates = score + n, *sums = gates + a->p.k,
          *select = has_select ? sums + a->p.n_group : score;
    char *taken = reinterpret_cast<char *>(sums + a->p.n_group + (has_select ? n : 0));
    const float *logits = a->logits + i * a->logits_stride;

    if (crew.me >= 32)
        return;
    for (int e = lane; e < n; e += 32) {
        score[e] = a->p.fn == OP_ROUTE_SIGMOID ? cu_sigmoid(logits[e]) : logits[e];
        taken[e] = 0;
    }
    cu_syncwarp();
    if (a->p.fn == OP_ROUTE_SOFTMAX)
        cu_softmax(score, n);
    if (has_select)
        for (int e = lane; e < n; e += 32)
            select[e] = a->bias ? score[e] + a->bias[e] : score[e];
    cu_syncwarp();
    if (a->p.n_group)
        cu_choose_groups(&a->p, select, sums);
    uint64_t best = cu_lane_best(select, taken, n);
    for (int rank = 0; rank < a->p.k; rank++) {
        int id = cu_best_expert(best);
        if (lane == id % 32) { /* whose it was */
            a->ids[i * a->ids_stride + rank] = id;
            gates[rank] = score[id];
            taken[id] = 1;
            best = cu_lane_best(select, taken, n);
        }
    }
    cu_syncwarp();
    if (a->p.fn == OP_ROUTE_SOFTMAX_TOPK)
        cu_softmax(gates, a->p.k);
    for (int r = lane; r < a->p.k; r += 32)
        a->gates[i * a->gates_stride + r] = cu_weighed(&a->p, gates, r);
}

#endif
