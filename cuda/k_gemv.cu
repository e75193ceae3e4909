/* Matrices times few rows by integer dots, the arithmetic of cpu/kern.h bit for bit. Experts are matrices that a tile names.
 *
 * Weights arrive in shared memory while others are multiplied: each warp has stages of its own, into which it brings, ahead of itself, the
 * rows that it will multiply next. So what is under way does not depend on registers, a warp waits for nobody, and in the first stages
 * weights are on their way before what is multiplied with them is there (cu_await). */
#include "cuda/launch.h"

#include "cuda/act.cuh"
#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/lane.cuh"
#include "cuda/mat.cuh"
#include "cuda/ptx.cuh"

/* FEW: sets of a warp. */
enum { MOST_WARPS = 10, STAGES = 2, FEW = 8 };
#define MOST_SHARED (110u * 1024) /* so that two blocks have room, this launch's and the next's */

/* What a warp multiplies at once is a set of rows; of an expert's gate and up that become one, rows of both. Where a row is short, fewer
 * than 32 lanes share it, and other lanes have other rows. What of a set arrives in a stage are all of its columns, rows one behind the
 * other as they lie; or, where they are many, a chunk of columns, row by row. Either way rows of a stage are `pitch` bytes apart, which
 * leaves the same of 16 as their distance in memory: bytes come in aligned sixteens, and all rows begin as far behind one. */
struct cut {
    int width, n_parts;                                   /* lanes that share a row; their parts of it */
    int set_rows, n_spans, n_chunks;                      /* rows of each matrix; matrices, 1 or 2 */
    uint32_t chunk_bytes, last_bytes, pitch, stage_bytes; /* last_bytes: of the last chunk */
    uint32_t span_bytes;                                  /* of a stage, for one matrix's rows */
    int64_t next_set;                  /* from the end of a set's row to the first row of the same warp's next */
    alignas(8) uint32_t magnitudes[4]; /* of struct cu_x */
    int mat_sets[1 + CU_MAT_MORE];     /* sets of each matrix */
    int tile_sets, n_sets;             /* of all matrices of a tile; in all, at most where a kernel lists tiles */
    int block_sets,
        n_longer; /* of a block; the first n_longer have one more; where a kernel lists tiles it divides them */
    /* shared memory: stages first */
    uint32_t book_off, book_bytes;
    uint32_t codes_off, codes_bytes; /* rows that the block codes itself; bytes of one */
    uint32_t terms_off, terms_bytes, terms_stride, sums_off, spots_off, total_bytes;
};

struct gemv_args {
    struct cu_mat_args m;
    struct cut cut;
};

template <int TYPE> struct shape {
    typedef cu_lane<TYPE> type;
    static constexpr int BYTES = cu_block<TYPE>::BYTES,
                         PARTS = cu_block<TYPE>::LEN / type::ELEMENTS; /* lanes of a block */
    static constexpr int ROWS = type::ROWS, LANES = type::LANES, KINDS = type::SECOND == CU_SECOND_NONE ? 1 : 2;
    static constexpr bool IS_ALIGNED = BYTES % 16 == 0, IS_SHARED = LANES > 1;
    static_assert(!IS_SHARED || ROWS <= LANES, "each lane of a block gets one row's sum");
};

/* What a weight block adds to a sum: fmaf(f, sum, acc). Blocks with a minimum (CU_SECOND_MIN) or a second scale add two. */
struct alignas(8) term {
    float f, sum;
};

struct alignas(16) two_terms {
    struct term x[2];
};

/* ---- where a warp is ---- */

/* What it brings next; in shared memory, where all lanes look and one writes. */
struct alignas(16) spot {
    int set, end; /* end: behind the block's last set */
    int chunk, tile;
    int row; /* the set's first */
    struct cu_work k;
    const uint8_t *w; /* the set's first row, from the chunk on */
    int64_t apart;    /* from there to the second matrix's, if the set has rows of two */
    float scale2;     /* of that one */
    const float *bias2;
    const void *x; /* the row of its first place, where the kernel does not code it */
};

static __device__ inline void find(const struct gemv_args *a, struct spot *s)
{
    const struct cut *c = &a->cut;
    int which = 0;

    s->tile = c->tile_sets == c->n_sets ? 0 : s->set / c->tile_sets;
    int at = s->set - s->tile * c->tile_sets;
    if (c->n_spans == 1)
        while (which < a->m.n_more && at >= c->mat_sets[which])
            at -= c->mat_sets[which++];
    s->row = at * c->set_rows;
    s->k = cu_work_at(&a->m, s->tile, which);
    s->w = s->k.w + (uint64_t)s->row * a->m.w_stride;
    s->k.dst = cu_dst_of(&a->m, &s->k, s->k.first, 0);
    s->x = cu_x_of(&a->m, s->k.first);
    if (c->n_spans > 1) {
        struct cu_work second = cu_work_at(&a->m, s->tile, 1);
        s->apart = second.w - s->k.w;
        s->scale2 = second.scale;
        s->bias2 = second.bias;
    }
}

/* From where a warp was to the next chunk; or to the first of its next set, which is looked for where it is another matrix's. */
static __device__ inline void go_on(const struct gemv_args *a, struct spot *s, const struct spot *was)
{
    const struct cut *c = &a->cut;

    s->w = was->w + c->chunk_bytes;
    s->chunk = was->chunk + 1;
    if (was->chunk + 1 < c->n_chunks)
        return;
    s->chunk = 0;
    s->set = was->set + (int)blockDim.x / 32;
    s->row = was->row + (int)blockDim.x / 32 * c->set_rows;
    s->w = was->w + c->chunk_bytes + c->next_set;
    if (s->row >= was->k.n_rows && s->set < was->end)
        find(a, s);
}

/* What is known of a stage when it is multiplied. */
struct label {
    int chunk, left; /* rows of the matrix from the set's first on */
    uint32_t skew;   /* how far behind a multiple of 16 rows begin */
    int place, n;
    float scale, scale2;
    const float *bias, *bias2; /* of the set's first row on; NULL: none */
    int tile;
    const void *x; /* that place's row, where the kernel has not coded it */
    float *dst;    /* of that place, of the set's first row */
    int64_t dst_stride;
};

/* Rows lie behind it. */
struct alignas(16) stage {
    struct label label;
    struct cu_landing landing;
};

/* ---- weights on their way ---- */

/* Whole sixteens that hold n bytes, which begin `skew` behind one; at the end of a matrix only those that hold nothing else behind them. */
template <int TYPE> static __device__ inline uint32_t sixteens(uint32_t skew, uint32_t n, bool is_last)
{
    return shape<TYPE>::IS_ALIGNED ? n : is_last ? (skew + n) & ~15u : (skew + n + 15) & ~15u;
}

/* What of a matrix's last row lies behind the last whole sixteen, fewer than 16 bytes, by itself. */
static __device__ inline void bring_rest(const uint8_t *from, uint32_t done, uint32_t n, char *to)
{
    CU_UNROLL_BY(1)
    for (uint32_t at = done; at < n; at++)
        to[at] = (char)from[at];
}

/* n bytes from `from` on, with what lies beside them, by the warp. */
template <int TYPE> static __device__ inline void bring(const uint8_t *from, uint32_t n, bool is_last, char *to)
{
    const uint32_t lane = threadIdx.x % 32,
                   skew = shape<TYPE>::IS_ALIGNED ? 0 : (uint32_t)(reinterpret_cast<uintptr_t>(from) & 15);
    const uint32_t bytes = sixteens<TYPE>(skew, n, is_last);

    for (uint32_t at = 16 * lane; at < bytes; at += 16 * 32)
        cu_async_copy16(to - skew + at, from - skew + at);
    if (!shape<TYPE>::IS_ALIGNED && is_last && lane == 0)
        bring_rest(from - skew, bytes, skew + n, to - skew);
}

/* Pieces of n bytes for a stage in bulk, of one matrix or two, each sent for by another lane. is_end: the last is its matrix's last. */
template <int TYPE>
static __device__ inline void send(const struct gemv_args *a, const struct spot *s, struct stage *stage, int n_pieces,
                                   uint32_t n, bool is_end)
{
    const struct cut *c = &a->cut;
    const int lane = (int)threadIdx.x % 32, span = lane >= n_pieces, piece = lane - (span ? n_pieces : 0);
    const bool has_one = lane < n_pieces * c->n_spans, is_last = is_end && piece == n_pieces - 1;
    const uint8_t *from = s->w + (span ? s->apart : 0) + (uint32_t)piece * (uint32_t)a->m.w_stride;
    const uint32_t skew = shape<TYPE>::IS_ALIGNED ? 0 : (uint32_t)(reinterpret_cast<uintptr_t>(s->w) & 15),
                   mine = shape<TYPE>::IS_ALIGNED ? 0 : (uint32_t)(reinterpret_cast<uintptr_t>(from) & 15);
    const uint32_t bytes = has_one ? sixteens<TYPE>(mine, n, is_last) : 0;
    const uint32_t all = shape<TYPE>::IS_ALIGNED ? (uint32_t)(n_pieces * c->n_spans) * n : cu_sum_of_warp(bytes);
    char *to = reinterpret_cast<char *>(stage + 1) + skew + (span ? c->span_bytes : 0) + (uint32_t)piece * c->pitch;

    if (lane == 0)
        cu_landing_expect(&stage->landing, all);
    cu_syncwarp(); /* what is expected is said, and what `ahead` said was read */
    if (has_one) {
        cu_bulk_copy(to - mine, from - mine, bytes, &stage->landing);
        if (!shape<TYPE>::IS_ALIGNED && is_last) {
            bring_rest(from - mine, bytes, mine + n, to - mine);
            cu_async_publish(); /* a later bulk copy comes to the same place */
        }
    }
}

/* The rows that `ahead` says into a stage, in one piece where all columns come, else each by itself, and what they are into its label; then
 * the warp goes on. */
template <int TYPE>
static __device__ inline void fetch(const struct gemv_args *a, struct spot *ahead, struct stage *stage)
{
    cu_syncwarp(); /* nobody reads the stage any more, and who went on has said so */
    const struct spot s = *ahead;
    const struct cut *c = &a->cut;
    const bool in_bulk = CU_HAS_BULK(a->m.card.has_bulk), is_last_chunk = s.chunk == c->n_chunks - 1;
    const uint32_t stride = (uint32_t)a->m.w_stride,
                   skew = shape<TYPE>::IS_ALIGNED ? 0 : (uint32_t)(reinterpret_cast<uintptr_t>(s.w) & 15);
    const int lane = (int)threadIdx.x % 32, left = s.k.n_rows - s.row, n_rows = left < c->set_rows ? left : c->set_rows;
    const int n_pieces = c->n_chunks == 1 ? 1 : n_rows;
    const uint32_t n = (is_last_chunk ? c->last_bytes : c->chunk_bytes) + (uint32_t)(n_rows - n_pieces) * stride;
    const bool is_end = is_last_chunk && n_rows == left, is_there = s.set < s.end;
    char *rows = reinterpret_cast<char *>(stage + 1) + skew;

    if (is_there && lane == 0) {
        const float *bias = s.k.bias ? s.k.bias + s.row : NULL, *bias2 = s.bias2 ? s.bias2 + s.row : NULL;
        stage->label = {s.chunk, left,  skew,   s.k.first, s.k.n,           s.k.scale,     s.scale2,
                        bias,    bias2, s.tile, s.x,       s.k.dst + s.row, s.k.dst_stride};
    }
    if (is_there && in_bulk) {
        send<TYPE>(a, &s, stage, n_pieces, n, is_end);
    } else if (is_there) {
        for (int span = 0; span < c->n_spans; span++, rows += c->span_bytes)
            for (int i = 0; i < n_pieces; i++)
                bring<TYPE>(s.w + (span ? s.apart : 0) + (uint32_t)i * stride, n, is_end && i == n_pieces - 1,
                            rows + (uint32_t)i * c->pitch);
    }
    if (!in_bulk) {
        cu_async_commit();
        cu_syncwarp(); /* what `ahead` said was read */
    }
    if (is_there && lane == 0)
        go_on(a, ahead, &s);
}

/* ---- products ---- */

/* Sums over 2 STEP neighbours of what each has for LEFT results. In each step a lane gives half of what it has left away, and gets the
 * other half's: in the end v[0] is the sum of result `of()`. */
template <int STEP, int LEFT> struct lane_sums {
    static __device__ inline int of(int *v)
    {
        const int KEEP = LEFT > 1 ? LEFT / 2 : 1;
        bool is_upper = LEFT > 1 && (threadIdx.x & STEP);

        CU_UNROLL
        for (int i = 0; i < KEEP; i++) {
            int give = is_upper || LEFT == 1 ? v[i] : v[i + KEEP], keep = is_upper ? v[i + KEEP] : v[i];
            v[i] = keep + cu_shfl_xor(give, STEP);
        }
        return (is_upper ? KEEP : 0) + lane_sums<STEP / 2, KEEP>::of(v);
    }
};

template <> struct lane_sums<0, 1> {
    static __device__ inline int of(int *)
    {
        return 0;
    }
};

/* A lane's share of a stage, the same all the time. Its rows are neighbours, or half of them are the first matrix's and the other half lie
 * `jump` bytes further than they would. */
struct share {
    int block, j;       /* of a chunk; which lane of it */
    uint32_t off, jump; /* of its block in its first row, from where the rows begin */
    int first, jump_rows;
    int from; /* the lane with the block before */
};

template <int TYPE> static __device__ inline struct share share_of(const struct cut *c)
{
    typedef shape<TYPE> shape;
    const int lane = (int)threadIdx.x % 32, at = lane % c->width, block = at / shape::PARTS;
    const int rows = shape::ROWS / c->n_spans, first = lane / c->width * rows;
    const uint32_t behind = (uint32_t)(block * shape::BYTES);
    const bool is_there = c->n_chunks > 1 || behind < c->last_bytes; /* else it reads the first block, for nobody */

    return {block,
            at % shape::PARTS,
            (uint32_t)first * c->pitch + (is_there ? behind : 0),
            c->n_spans > 1 ? c->span_bytes - (uint32_t)rows * c->pitch : 0,
            first,
            c->n_spans > 1 ? c->set_rows - rows : 0,
            lane - at + (at + c->width - shape::LANES) % c->width};
}

/* Of a lane's row r: where it lies behind its first, and which of the set's it is. */
template <int TYPE> static __device__ inline uint32_t row_off(const struct cut *c, const struct share *mine, int r)
{
    return (uint32_t)r * c->pitch + (r >= shape<TYPE>::ROWS / 2 ? mine->jump : 0);
}

/* From row r to the next. */
template <int TYPE> static __device__ inline uint32_t row_step(const struct cut *c, const struct share *mine, int r)
{
    return c->pitch + (r == shape<TYPE>::ROWS / 2 - 1 ? mine->jump : 0);
}

template <int TYPE> static __device__ inline int row_number(const struct share *mine, int r)
{
    return mine->first + r + (r >= shape<TYPE>::ROWS / 2 ? mine->jump_rows : 0);
}

/* acc wanders from block to block, in ascending order; where it began it is whole in the end, elsewhere nobody's. */
template <int TYPE>
static __device__ inline float wander(int width, int from, bool is_in, const struct term *first,
                                      const struct term *second, float acc)
{
    const int LANES = shape<TYPE>::LANES;

    CU_UNROLL
    for (int at = 0; at < width; at += LANES) {
        float next = fmaf(first->f, first->sum, acc);
        if (shape<TYPE>::KINDS == 2)
            next = fmaf(second->f, second->sum, next);
        acc = cu_shfl(is_in ? next : acc, from);
    }
    return acc;
}

/* Of types whose blocks several lanes share: each lane of a block gets one row's sum of it. *row: of the set, whose it is. */
template <int TYPE>
static __device__ inline float fold_shared(const struct gemv_args *a, const struct share *mine, const uint8_t *b,
                                           bool is_in, int *first, int *second, float d_x, float acc, int *row)
{
    typedef shape<TYPE> shape;
    float d, m;
    int at = lane_sums<shape::LANES / 2, shape::ROWS>::of(first);

    if (shape::KINDS == 2)
        lane_sums<shape::LANES / 2, shape::ROWS>::of(second);
    shape::type::factors(b + row_off<TYPE>(&a->cut, mine, at), mine->j, a->m.books, &d, &m);
    struct term one = {d * d_x, (float)first[0]}, two = {m * d_x, (float)second[0]};
    *row = mine->block == 0 ? row_number<TYPE>(mine, at) : -1;
    return a->cut.width == 32 ? wander<TYPE>(32, mine->from, is_in, &one, &two, acc)
                              : wander<TYPE>(a->cut.width, mine->from, is_in, &one, &two, acc);
}

/* N terms of a row. */
template <int N> static __device__ inline float sum_of_terms(const struct two_terms *from, float acc)
{
    CU_UNROLL
    for (int k = 0; k < N / 2; k++)
        acc = fmaf(from[k].x[1].f, from[k].x[1].sum, fmaf(from[k].x[0].f, from[k].x[0].sum, acc));
    return acc;
}

/* From a lane's terms of row r to those of its next. */
template <int TYPE>
static __device__ inline uint32_t terms_step(const struct gemv_args *a, const struct share *mine, int r)
{
    return a->cut.terms_stride * (r == shape<TYPE>::ROWS / 2 - 1 ? (uint32_t)mine->jump_rows + 1 : 1);
}

/* Of types with a block for each lane, or less: terms lie side by side in shared memory, and a lane for each row adds them up. */
template <int TYPE>
static __device__ inline float fold_blocks(const struct gemv_args *a, const struct share *mine, const uint8_t *b,
                                           int n_parts, const int *first, const int *second, float d_x,
                                           struct term *terms, float acc, int *row)
{
    typedef shape<TYPE> shape;
    const int lane = (int)threadIdx.x % 32, part = mine->block * shape::PARTS + mine->j;
    const uint32_t stride = a->cut.terms_stride;
    struct term *const mine_first = terms + (uint32_t)mine->first * stride + (uint32_t)(part * shape::KINDS);
    struct term *to = mine_first;

    *row = lane < a->cut.set_rows * a->cut.n_spans ? lane : -1;
    CU_UNROLL
    for (int r = 0; r < shape::ROWS; r++) {
        float d, m;
        shape::type::factors(b, mine->j, a->m.books, &d, &m);
        to[0] = {d * d_x, (float)first[r]};
        if (shape::KINDS == 2)
            to[1] = {m * d_x, (float)second[r]};
        b += row_step<TYPE>(&a->cut, mine, r);
        to += terms_step<TYPE>(a, mine, r);
    }
    if (part >= n_parts) { /* no such block: what adds nothing to any sum, be it -0 */
        to = mine_first;
        CU_UNROLL_BY(1)
        for (int r = 0; r < shape::ROWS; r++) {
            to[0] = to[shape::KINDS - 1] = {0.0f, -0.0f};
            to += terms_step<TYPE>(a, mine, r);
        }
    }
    cu_syncwarp();
    const struct two_terms *from = reinterpret_cast<const struct two_terms *>(terms + (uint32_t)lane * stride);
    const int n_short = *row >= 0 && a->cut.width < 32 ? a->cut.width * shape::KINDS : 0;
    if (*row >= 0 && a->cut.width == 32)
        acc = sum_of_terms<32 * shape::KINDS>(from, acc);
    CU_UNROLL_BY(1)
    for (int i = 0; i < n_short; i += 8)
        acc = sum_of_terms<8>(from + i / 2, acc);
    return acc;
}

/* A stage's rows, which begin at `rows`, times one row of x: the sums go on from acc. *row: whose this lane has, -1: nobody's. */
template <int TYPE>
static __device__ inline float multiply(const struct gemv_args *a, const struct share *mine, const uint8_t *rows,
                                        int chunk, const struct cu_x *x, struct term *terms, float acc, int *row)
{
    typedef shape<TYPE> shape;
    const int left = a->cut.n_parts - chunk * a->cut.width; /* lanes that have something, of those of a row */
    const uint8_t *b = rows + mine->off, *at = b;
    int first[shape::ROWS], second[shape::ROWS];

    CU_UNROLL
    for (int r = 0; r < shape::ROWS; r++) {
        shape::type::dot(at, mine->j, a->m.books, x, &first[r], &second[r]);
        at += row_step<TYPE>(&a->cut, mine, r);
    }
    if (shape::IS_SHARED)
        return fold_shared<TYPE>(a, mine, b, mine->block * shape::PARTS < left, first, second, x->d, acc, row);
    return fold_blocks<TYPE>(a, mine, b, left, first, second, x->d, terms, acc, row);
}

/* The lane's part of a row of x beside a chunk; where there is no such block, of the first. */
template <int TYPE>
static __device__ inline void load_x(const struct gemv_args *a, const struct share *mine, int chunk, const void *row,
                                     struct cu_x *x)
{
    typedef shape<TYPE> shape;
    const int part = chunk * a->cut.width + mine->block * shape::PARTS + mine->j,
              block = part < a->cut.n_parts ? part / shape::PARTS : 0;

    memcpy(x->magnitudes, a->cut.magnitudes, sizeof x->magnitudes);
    shape::type::share::load(row, (int)a->m.n_cols, shape::IS_SHARED ? block : block * shape::PARTS + mine->j, mine->j,
                             x);
}

/* ---- the kernel ---- */

/* Rows of x as codes in shared memory, those of the block's tiles or the only one: a warp for each 256 values. */
static __device__ inline void code_rows(const struct gemv_args *a, int first, int last, char *codes)
{
    const int n_tasks = (int)a->m.code.width / 256;
    struct cu_act_args code = a->m.code;

    if (code.n_rows == 1)
        first = last = 0;
    for (int i = (int)threadIdx.x / 32; i < (last - first + 1) * n_tasks; i += (int)blockDim.x / 32) {
        int row = i / n_tasks;
        struct cu_crew crew = {i % n_tasks * 32 + (int)threadIdx.x % 32, n_tasks * 32, 0, 1};
        code.x = a->m.code.x + (first + row) * code.x_stride;
        code.out = codes + (uint32_t)row * a->cut.codes_bytes;
        cu_act_x256(&code, 0, crew);
    }
}

/* The type's code-book into shared memory: there 32 entries of it are read in some 4 cycles, in the first-level cache in one for each line
 * of 128 bytes. */
template <int TYPE> static __device__ inline void bring_book(const struct cu_books *books, char *to)
{
    const char *from = reinterpret_cast<const char *>(CU_GLOBAL(books)) + cu_book<TYPE>::OFF;
    const int bytes = (int)cu_book<TYPE>::BYTES;

    for (int at = 16 * (int)threadIdx.x; at < bytes; at += 16 * (int)blockDim.x)
        *reinterpret_cast<struct cu_word16 *>(to + at) = cu_load16(from + at);
}

/* A set's sums of one place, whole now: `dst` is where its first row's goes. The label is read where it lies: a copy takes registers. */
template <int TYPE>
static __device__ inline void put(const struct gemv_args *a, const struct label *l, float *dst, int row, float acc)
{
    const int lane = (int)threadIdx.x % 32;
    const bool is_second = row >= a->cut.set_rows;
    const int mine = is_second ? row - a->cut.set_rows : row; /* of its matrix */
    const float *bias = row < 0 || mine >= l->left ? NULL : is_second ? l->bias2 : l->bias;
    float y = cu_finished(is_second ? l->scale2 : l->scale, bias, mine, acc);

    if (a->m.is_glu) {
        float up = cu_shfl(y, shape<TYPE>::IS_SHARED ? lane ^ shape<TYPE>::LANES / 2 : (lane + a->cut.set_rows) % 32);
        y = cu_glu_of(a->m.glu, y, up);
    }
    if (row >= 0 && !is_second && row < l->left)
        dst[row] = y;
}

/* What belongs to a warp. */
struct warp {
    char *stages; /* struct stage and rows */
    struct term *terms;
    float *sums; /* this lane's of place i at [32 i] */
    struct spot *ahead;
};

static __device__ inline struct warp warp_of(const struct cut *c, char *shared)
{
    const uint32_t me = threadIdx.x / 32, lane = threadIdx.x % 32;

    return {shared + me * STAGES * c->stage_bytes,
            reinterpret_cast<struct term *>(shared + c->terms_off + me * c->terms_bytes),
            reinterpret_cast<float *>(shared + c->sums_off) + me * CU_GEMV_TOK * 32 + lane,
            reinterpret_cast<struct spot *>(shared + c->spots_off) + me};
}

static __device__ inline struct stage *stage_of(const struct cut *c, const struct warp *w, int i)
{
    return reinterpret_cast<struct stage *>(w->stages + (uint32_t)i * c->stage_bytes);
}

/* The first stages on their way. */
template <int TYPE>
static __device__ inline void begin(const struct gemv_args *a, const struct warp *w, int set, int end)
{
    if (threadIdx.x % 32 == 0) {
        for (int i = 0; i < STAGES && CU_HAS_BULK(a->m.card.has_bulk); i++)
            cu_landing_init(&stage_of(&a->cut, w, i)->landing);
        *w->ahead = {set, end, 0, 0, 0, {}, NULL, 0, 1.0f, NULL, NULL};
        if (set < end)
            find(a, w->ahead);
    }
    for (int i = 0; i < STAGES; i++)
        fetch<TYPE>(a, w->ahead, stage_of(&a->cut, w, i));
    cu_syncwarp(); /* labels can be read */
}

/* A stage that is there times the label's places; x: the part of the first one's row. acc: what a single place had before, and has then. */
template <int TYPE, bool IS_ONE>
static __device__ inline void multiply_stage(const struct gemv_args *a, const struct warp *w, const struct share *mine,
                                             const struct label *l, const struct stage *stage, struct cu_x *x,
                                             float *acc)
{
    const uint8_t *rows = reinterpret_cast<const uint8_t *>(stage + 1) + (shape<TYPE>::IS_ALIGNED ? 0 : l->skew);
    const bool is_last = l->chunk == a->cut.n_chunks - 1;
    int row;

    if (IS_ONE) {
        *acc = multiply<TYPE>(a, mine, rows, l->chunk, x, w->terms, l->chunk ? *acc : 0.0f, &row);
        if (is_last)
            put<TYPE>(a, &stage->label, l->dst, row, *acc);
    } else {
        for (int i = 0; i < l->n; i++) {
            const int further = cu_place_of(&a->m, cu_nth_place(&a->m, l->place, i)) - cu_place_of(&a->m, l->place);
            cu_syncwarp(); /* nobody reads the last place's terms any more */
            if (i)
                load_x<TYPE>(a, mine, l->chunk, cu_x_of(&a->m, cu_nth_place(&a->m, l->place, i)), x);
            float sum = multiply<TYPE>(a, mine, rows, l->chunk, x, w->terms, l->chunk ? w->sums[32 * i] : 0.0f, &row);
            w->sums[32 * i] = sum;
            if (is_last)
                put<TYPE>(a, &stage->label, l->dst + further * l->dst_stride, row, sum);
        }
    }
}

struct range {
    int first, end;
};

/* Neighbours, as many for each block, or one more for the first blocks. */
static __device__ inline struct range sets_of_block(const struct gemv_args *a)
{
    const int which = (int)blockIdx.x;
    int each = a->cut.block_sets, n_longer = a->cut.n_longer;

    if (a->m.n_listed) {
        const int n_sets = *a->m.n_listed * a->cut.tile_sets;
        each = n_sets / (int)gridDim.x;
        n_longer = n_sets - each * (int)gridDim.x;
    }
    const int first = which * each + (which < n_longer ? which : n_longer);
    return {first, first + each + (which < n_longer)};
}

/* IS_ONE: tile_tok is 1. Each block has neighbouring sets, of which its warps take one after another. */
template <int TYPE, bool IS_ONE>
static __global__ void CU_BOUNDS(32 * MOST_WARPS, 2) gemv(const CU_ARGS struct gemv_args a)
{
    CU_SHARED_DYN(char, shared); /* struct cut says what lies where */
    const struct cut *c = &a.cut;
    cu_let_next();
    cu_await_ids(&a.m);
    const struct range sets = sets_of_block(&a);
    const int first = sets.first, end = sets.end;
    if (first == end) /* fewer sets than there could be */
        return;
    const int set = first + (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    const int n_stages = set < end ? (end - set + n_warps - 1) / n_warps * c->n_chunks : 0;
    const bool is_coded = !IS_ONE || !cu_block<TYPE>::X256 || a.m.code.n_rows == 0;
    const int first_tile = is_coded ? 0 : first / c->tile_sets;
    const struct share mine = share_of<TYPE>(c);
    const struct warp w = warp_of(c, shared);
    float acc = 0.0f;

    begin<TYPE>(&a, &w, set, end);
    bring_book<TYPE>(a.m.books, shared + c->book_off);
    cu_await();
    if (!is_coded)
        code_rows(&a, first_tile, (end - 1) / c->tile_sets, shared + c->codes_off);
    if (!is_coded || cu_book<TYPE>::BYTES)
        __syncthreads();
    for (int n = 0; n < n_stages; n++) {
        const int at = n % STAGES;
        struct stage *stage = stage_of(c, &w, at);
        const struct label l = stage->label;
        const char *coded =
            shared + c->codes_off + (a.m.code.n_rows == 1 ? 0 : l.tile - first_tile) * (int)c->codes_bytes;
        struct cu_x x;

        x.book = reinterpret_cast<const uint32_t *>(shared + c->book_off);
        load_x<TYPE>(&a, &mine, l.chunk, is_coded ? CU_GLOBAL(l.x) : coded, &x); /* while the stage arrives */
        if (CU_HAS_BULK(a.m.card.has_bulk)) {
            cu_landing_wait(&stage->landing, (uint32_t)(n / STAGES % 2));
        } else {
            cu_async_wait<STAGES - 1>();
            cu_syncwarp(); /* what other lanes brought is there, too */
        }
        multiply_stage<TYPE, IS_ONE>(&a, &w, &mine, &l, stage, &x, &acc);
        fetch<TYPE>(&a, w.ahead, stage);
    }
}

/* ---- launches ---- */

/* From one row's n terms to the next's, so that 8 lanes that each read two of another row meet no bank twice. */
static int terms_stride(int n)
{
    return (n + 1) / 2 * 2 + 2;
}

/* Lanes that share a row of n_parts lanes' parts: as few as have room for all of it, but at least `least`. */
static int width_of(int n_parts, int least)
{
    int width = 32;

    while (width / 2 >= n_parts && width / 2 >= least)
        width /= 2;
    return width;
}

template <int TYPE> static struct cut cut_of(const struct cu_mat_args *a)
{
    typedef shape<TYPE> shape;
    const int n_parts = (int)a->n_cols / shape::type::ELEMENTS;
    const uint32_t edge = shape::IS_ALIGNED ? 0 : 15;
    struct cut c = {};

    c.book_bytes = cu_book<TYPE>::BYTES;
    c.magnitudes[0] = cu_magnitudes<TYPE>::A;
    c.magnitudes[1] = cu_magnitudes<TYPE>::B;
    c.magnitudes[2] = cu_magnitudes<TYPE>::C;
    c.magnitudes[3] = cu_magnitudes<TYPE>::D;
    c.width = width_of(n_parts, shape::IS_SHARED ? shape::PARTS : 8);
    c.n_parts = n_parts;
    c.n_spans = a->is_glu ? 2 : 1;
    c.set_rows = shape::ROWS * (32 / c.width) / c.n_spans;
    c.n_chunks = (n_parts + c.width - 1) / c.width;
    c.chunk_bytes = (uint32_t)(c.width / shape::PARTS * shape::BYTES);
    c.last_bytes = (uint32_t)((n_parts - (c.n_chunks - 1) * c.width) / shape::PARTS * shape::BYTES);
    c.pitch = (uint32_t)a->w_stride;
    if (c.n_chunks > 1)
        c.pitch = (uint32_t)cu_up16(c.chunk_bytes + edge) + (uint32_t)(a->w_stride % 16);
    c.span_bytes = (uint32_t)cu_up16((uint32_t)c.set_rows * c.pitch + 2 * edge);
    c.stage_bytes = (uint32_t)sizeof(struct stage) + c.span_bytes * (uint32_t)c.n_spans;
    for (int i = 0; i <= (a->is_glu ? 0 : a->n_more); i++) {
        int n_rows = i && !a->tiles && !a->ids ? a->more[i - 1].n_rows : a->n_rows;
        c.mat_sets[i] = (n_rows + c.set_rows - 1) / c.set_rows;
        c.tile_sets += c.mat_sets[i];
    }
    c.n_sets = c.tile_sets * (int)cu_n_tiles(a);
    c.codes_bytes = a->code.n_rows ? (uint32_t)cu_act_bytes(a->code.act, a->code.width) : 0;
    c.terms_stride = (uint32_t)terms_stride(c.width * shape::KINDS);
    if (!shape::IS_SHARED)
        c.terms_bytes = (uint32_t)(c.set_rows * c.n_spans) * c.terms_stride * (uint32_t)sizeof(struct term);
    return c;
}

/* Room for n_warps in a block, each of n_blocks. */
static void place(const struct cu_mat_args *a, struct cut *c, int n_warps, int n_blocks)
{
    int most_sets = (c->n_sets + n_blocks - 1) / n_blocks,
        most_tiles = (most_sets + c->tile_sets - 2) / c->tile_sets + 1;
    uint32_t n_codes = a->code.n_rows < most_tiles ? (uint32_t)a->code.n_rows : (uint32_t)most_tiles;

    c->block_sets = c->n_sets / n_blocks;
    c->n_longer = c->n_sets % n_blocks;
    c->next_set = (int64_t)(n_warps * c->set_rows) * (int64_t)a->w_stride - (int64_t)c->n_chunks * c->chunk_bytes;
    c->book_off = (uint32_t)(n_warps * STAGES) * c->stage_bytes;
    c->codes_off = c->book_off + c->book_bytes;
    c->terms_off = (uint32_t)cu_up16(c->codes_off + n_codes * c->codes_bytes);
    c->sums_off = (uint32_t)cu_up16(c->terms_off + (uint32_t)n_warps * c->terms_bytes);
    c->spots_off =
        c->sums_off + (a->tile_tok > 1 ? (uint32_t)(n_warps * CU_GEMV_TOK * 32) * (uint32_t)sizeof(float) : 0);
    c->total_bytes = c->spots_off + (uint32_t)n_warps * (uint32_t)sizeof(struct spot);
}

uint32_t cu_gemv_most_bytes(const struct cu_card *card)
{
    return (uint32_t)card->shared_bytes < MOST_SHARED ? (uint32_t)card->shared_bytes : MOST_SHARED;
}

/* One block for each multiprocessor where a warp has few sets, so that the next launch's find room beside them; else two. */
template <int TYPE> static cudaError_t launch(const struct cu_mat_args *a, cudaStream_t stream)
{
    const int n_multi = a->card.n_multiprocessors;
    struct gemv_args args = {*a, cut_of<TYPE>(a)};
    int n_warps = MOST_WARPS, n_blocks;

    for (;; n_warps--) {
        n_blocks = args.cut.n_sets > FEW * n_warps * n_multi ? 2 * n_multi : n_multi;
        n_blocks = n_blocks < args.cut.n_sets ? n_blocks : args.cut.n_sets;
        place(a, &args.cut, n_warps, n_blocks);
        if (args.cut.total_bytes <= cu_gemv_most_bytes(&a->card) || n_warps == 1)
            break;
    }
    dim3 grid((unsigned)n_blocks), block(32 * (unsigned)n_warps);
    if (a->tile_tok == 1)
        return CU_LAUNCH((gemv<TYPE, true>), grid, block, args.cut.total_bytes, stream, args);
    return CU_LAUNCH((gemv<TYPE, false>), grid, block, args.cut.total_bytes, stream, args);
}

cudaError_t cu_gemv_int(const struct cu_mat_args *a, cudaStream_t stream)
{
    switch (a->type) {
#define CASE(NAME)     \
    case QUANT_##NAME: \
        return launch<QUANT_##NAME>(a, stream);
        CU_QUANT_TYPES(CASE)
#undef CASE
    default:
        return cudaErrorInvalidValue;
    }
}

/* More than the 48 KiB of shared memory that a block gets without asking. */
template <int TYPE, bool IS_ONE> static cudaError_t allow(const struct cu_card *card)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(gemv<TYPE, IS_ONE>),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, (int)cu_gemv_most_bytes(card));
}

cudaError_t cu_gemv_prepare(const struct cu_card *card)
{
    cudaError_t e = cudaSuccess;

#define ALLOW(NAME)                              \
    e = e ? e : allow<QUANT_##NAME, true>(card); \
    e = e ? e : allow<QUANT_##NAME, false>(card);
    CU_QUANT_TYPES(ALLOW)
#undef ALLOW
    return e;
}
