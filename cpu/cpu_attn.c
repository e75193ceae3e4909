/* ATTENTION over pages. For every row and KV head: within a segment of DEVICE_ATTN_SEGMENT_TOK positions the pages are
 * folded one after another into (o, m, l), which begin anew with the segment; segments are merged in ascending order. Who
 * does that is cut in one of two ways, with the same arithmetic:
 *   many rows: an item is a block of rows of one sequence and a KV head. Its worker walks all pages, converts each to
 *   floats once for the rows of the block, and merges the segments as they end;
 *   few rows: an item is one row, KV head and segment, so that a long context keeps all workers busy. Segments go in waves
 *   of as many as the scratch has slots for, merged by whoever comes last to the barrier. */
#include "cpu/walk.h"

#include "cpu/kern_math.h"
#include "src/base/size.h"

#include <math.h>
#include <string.h>

/* Fewer (row, KV head) pairs than this per worker are split by segment, else the last worker is waited for too long. */
#define SPLIT_PAIRS 2
/* Segments in flight per worker. */
#define SPLIT_SLOTS 8
/* Rows of a block share one conversion of K and V; their states should stay in the L2 cache. */
#define BLOCK_ROWS 16
#define BLOCK_STATE_BYTES (96 * KIB)

/* Query heads that are folded together at most: where all share one KV head (MLA), a row would otherwise be the work of one. */
#define MOST_QUERIES 8

#define PAGES_PER_SEGMENT DEVICE_SEGMENT_PAGES

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Query heads that share a KV head. */
static int n_sharing(const struct op_attn *p)
{
    return p->n_head / p->n_head_kv;
}

/* Query heads of an item: all that share a KV head, or, of many, an equal part. */
static int n_group(const struct op_attn *p)
{
    int n = n_sharing(p), n_parts = 1;

    while (n / n_parts > MOST_QUERIES || n % n_parts)
        n_parts++;
    return n / n_parts;
}

/* Parts of all heads. */
static int n_parts(const struct op_attn *p)
{
    return p->n_head / n_group(p);
}

/* Floats of a state (o, m, l) of a group. */
static int64_t state_len(const struct op_attn *p)
{
    return (int64_t)size_up((uint64_t)n_group(p) * (uint64_t)(p->head_dim_v + 2), 16);
}

static int block_rows(const struct op_attn *p)
{
    int64_t n = (int64_t)(BLOCK_STATE_BYTES / sizeof(float)) / (2 * state_len(p));
    return (int)max64(1, min64(n, BLOCK_ROWS));
}

static bool is_split(const struct walk *w, const struct op *op)
{
    return (int64_t)walk_n(w, op) * n_parts(&op->p.attn) < (int64_t)SPLIT_PAIRS * w->n_threads;
}

static int64_t page_len(int head_dim)
{
    return (int64_t)size_up((uint64_t)DEVICE_PAGE_TOK * (uint64_t)head_dim, 16);
}

static int64_t scratch_len(const struct op_attn *p)
{
    int head_dim = p->head_dim_k > p->head_dim_v ? p->head_dim_k : p->head_dim_v;
    return (int64_t)size_up((uint64_t)KERN_ATTN_SCRATCH(n_group(p), head_dim), 16);
}

static struct walk_need need(const struct op *op, int n_rows, int n_threads)
{
    const struct op_attn *p = &op->p.attn;
    int64_t own = page_len(p->head_dim_k) + page_len(p->head_dim_v) + scratch_len(p) + 2 * block_rows(p) * state_len(p);
    int64_t shared = (int64_t)(SPLIT_SLOTS + SPLIT_PAIRS) * n_threads * state_len(p);
    uint64_t starts_bytes = (uint64_t)(n_rows + 2) * sizeof(int32_t);

    return (struct walk_need){(uint64_t)own * sizeof(float),
                              (uint64_t)shared * sizeof(float) + size_up(starts_bytes, 64)};
}

/* The parts of a state at `s`. */
static float *state_o(float *s)
{
    return s;
}

static float *state_m(const struct op_attn *p, float *s)
{
    return s + n_group(p) * p->head_dim_v;
}

static float *state_l(const struct op_attn *p, float *s)
{
    return state_m(p, s) + n_group(p);
}

static void state_reset(const struct op_attn *p, float *s)
{
    memset(s, 0, (size_t)state_len(p) * sizeof *s);
    for (int q = 0; q < n_group(p); q++)
        state_m(p, s)[q] = -INFINITY;
}

static void state_merge(const struct walk *w, const struct op_attn *p, float *s, float *sum)
{
    for (int q = 0; q < n_group(p); q++)
        w->kern->attn_merge(state_o(s) + q * p->head_dim_v, state_m(p, s)[q], state_l(p, s)[q],
                            state_o(sum) + q * p->head_dim_v, state_m(p, sum) + q, state_l(p, sum) + q, p->head_dim_v);
}

float cpu_attn_factor(const struct op *op, int head, float m, float l)
{
    if (op->w[0])
        l += kern_v_exp(((const float *)op->w[0]->data)[head] - m);
    return 1.0f / l;
}

/* The result of row i (of the op's rows) for the group of `head`. */
static void state_write(const struct walk *w, const struct op *op, int i, int head, float *sum)
{
    const struct op_attn *p = &op->p.attn;
    float *out = (float *)tensor_row(op->dst[0], i) + (int64_t)head * n_group(p) * p->head_dim_v;

    for (int q = 0; q < n_group(p); q++)
        w->kern->scale(state_o(sum) + q * p->head_dim_v,
                       cpu_attn_factor(op, head * n_group(p) + q, state_m(p, sum)[q], state_l(p, sum)[q]),
                       out + q * p->head_dim_v, p->head_dim_v);
}

/* Positions [begin, end) that row i sees. */
struct span {
    int64_t begin, end;
};

static struct span visible(const struct walk *w, const struct op *op, int i)
{
    int64_t pos = w->rows->pos[walk_row(w, op, i)];
    int window = op->p.attn.window;

    return (struct span){window ? max64(0, pos - window + 1) : 0, pos + 1};
}

/* K and V of one page and of the KV head of a part. */
struct page {
    enum quant_type type;
    const void *k, *v;
};

static struct page page_of(const struct walk *w, const struct op *op, int i, int part, int64_t page)
{
    const struct op_attn *p = &op->p.attn;
    int row = walk_row(w, op, i), head = part * n_group(p) / n_sharing(p);

    return (struct page){
        p->kv_type,
        walk_page(w, p, row, page, p->k_off, head, quant_row_bytes(p->kv_type, p->head_dim_k)),
        walk_page(w, p, row, page, p->v_off, head, quant_row_bytes(p->kv_type, op_attn_v_row(p))),
    };
}

/* Fold keys [begin, end) of the page that starts at position `first` into row i's state. next: the page that follows; NULL: none. */
static void fold(const struct walk *w, const struct op *op, int i, int head, const struct page *page,
                 const struct page *next, int64_t first, struct span span, float *s, float *scratch)
{
    const struct op_attn *p = &op->p.attn;
    struct kern_attn_args args = {
        .q = (const float *)tensor_row(op->src[0], i) + (int64_t)head * n_group(p) * p->head_dim_k,
        .n_q = n_group(p),
        .q_stride = p->head_dim_k,
        .o_stride = p->head_dim_v,
        .head_dim_k = p->head_dim_k,
        .head_dim_v = p->head_dim_v,
        .v_row = op_attn_v_row(p),
        .scale = p->scale,
        .softcap = p->softcap,
        .kv_type = page->type,
        .k = page->k,
        .v = page->v,
        .next_k = next ? next->k : NULL,
        .next_v = next ? next->v : NULL,
        .key_begin = (int)max64(0, span.begin - first),
        .key_end = (int)min64(DEVICE_PAGE_TOK, span.end - first),
        .o = state_o(s),
        .m = state_m(p, s),
        .l = state_l(p, s),
        .scratch = scratch,
    };
    if (args.key_begin < args.key_end)
        w->kern->attn_page(&args);
}

/* A worker's scratch: kernel's, K and V of a page as floats, and the states of a block's rows. */
struct own {
    float *scratch, *k, *v, *state, *sum;
};

static struct own own_of(const struct walk *w, int worker, const struct op_attn *p)
{
    struct own own;

    own.scratch = walk_own(w, worker);
    own.k = own.scratch + scratch_len(p);
    own.v = own.k + page_len(p->head_dim_k);
    own.state = own.v + page_len(p->head_dim_v);
    own.sum = own.state + block_rows(p) * state_len(p);
    return own;
}

/* ---- many rows ---- */

/* Starts of the blocks behind the slots in shared scratch: starts[0] of them, then (starts[0] + 1) row numbers. */
static int32_t *starts_of(const struct walk *w, const struct op *op)
{
    int64_t slots_len = (int64_t)(SPLIT_SLOTS + SPLIT_PAIRS) * w->n_threads * state_len(&op->p.attn);
    return (int32_t *)(w->shared + (uint64_t)slots_len * sizeof(float));
}

static void begin_blocks(const struct walk *w, const struct op *op)
{
    int n = walk_n(w, op), n_max = block_rows(&op->p.attn);
    const int32_t *seq = w->rows->seq;
    int32_t *starts = starts_of(w, op) + 1, n_blocks = 0, start = 0;

    for (int i = 0; i < n; i++) {
        if (i == 0 || i - start == n_max || seq[walk_row(w, op, i)] != seq[walk_row(w, op, i - 1)]) {
            start = i;
            starts[n_blocks++] = i;
        }
    }
    starts[n_blocks] = n;
    starts[-1] = n_blocks;
}

/* One page for all rows of a block [begin, end): converted once where there are several. */
static void fold_block(const struct walk *w, const struct op *op, int begin, int end, int head, int64_t number,
                       const struct own *own)
{
    const struct op_attn *p = &op->p.attn;
    struct page page = page_of(w, op, begin, head, number);
    int64_t first = number * DEVICE_PAGE_TOK, len = state_len(p);

    if (end - begin > 1) {
        w->kern->kv_read(p->kv_type, page.k, own->k, (int64_t)DEVICE_PAGE_TOK * p->head_dim_k);
        if (!p->v_in_k)
            w->kern->kv_read(p->kv_type, page.v, own->v, (int64_t)DEVICE_PAGE_TOK * p->head_dim_v);
        page = (struct page){QUANT_F32, own->k, p->v_in_k ? own->k : own->v};
    }
    for (int i = begin; i < end; i++)
        fold(w, op, i, head, &page, NULL, first, visible(w, op, i), own->state + (i - begin) * len, own->scratch);
}

static void run_block(const struct walk *w, int worker, const struct op *op, int begin, int end, int head)
{
    const struct op_attn *p = &op->p.attn;
    struct own own = own_of(w, worker, p);
    struct span all = {visible(w, op, begin).begin, visible(w, op, end - 1).end};
    int64_t len = state_len(p), n_pages = (all.end + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK;

    for (int i = 0; i < end - begin; i++) {
        state_reset(p, own.state + i * len);
        state_reset(p, own.sum + i * len);
    }
    for (int64_t page = all.begin / DEVICE_PAGE_TOK; page < n_pages; page++) {
        fold_block(w, op, begin, end, head, page, &own);
        if ((page + 1) % PAGES_PER_SEGMENT && page + 1 < n_pages)
            continue;
        for (int i = 0; i < end - begin; i++) {
            float *s = own.state + i * len;
            if (state_m(p, s)[0] == -INFINITY && state_l(p, s)[0] == 0.0f)
                continue; /* this row saw nothing of the segment */
            state_merge(w, p, s, own.sum + i * len);
            state_reset(p, s);
        }
    }
    for (int i = begin; i < end; i++)
        state_write(w, op, i, head, own.sum + (i - begin) * len);
}

static void run_blocks(const struct walk *w, int worker, const struct op *op)
{
    const int32_t *starts = starts_of(w, op) + 1;
    int n_head = n_parts(&op->p.attn);
    int64_t n_items = (int64_t)starts[-1] * n_head;

    /* Last blocks first: they see the most keys, and what is claimed late should be short. */
    for (int64_t item; (item = pool_claim(w->pool, worker, n_items)) < n_items;) {
        int64_t block = starts[-1] - 1 - item / n_head;
        run_block(w, worker, op, starts[block], starts[block + 1], (int)(item % n_head));
    }
}

/* ---- few rows ---- */

/* Segments [begin, end) that row i sees some of. */
static struct span segments(const struct walk *w, const struct op *op, int i)
{
    struct span s = visible(w, op, i);
    return (struct span){s.begin / DEVICE_ATTN_SEGMENT_TOK, (s.end - 1) / DEVICE_ATTN_SEGMENT_TOK + 1};
}

/* Segments of a row that one wave holds. */
static int64_t wave_len(const struct walk *w, const struct op *op)
{
    int64_t n_pairs = (int64_t)walk_n(w, op) * n_parts(&op->p.attn);
    return max64(1, (int64_t)SPLIT_SLOTS * w->n_threads / n_pairs);
}

static int64_t n_waves(const struct walk *w, const struct op *op)
{
    int64_t n_segments = 1, len = wave_len(w, op);

    for (int i = 0; i < walk_n(w, op); i++) {
        struct span s = segments(w, op, i);
        n_segments = max64(n_segments, s.end - s.begin);
    }
    return (n_segments + len - 1) / len;
}

static float *sum_of(const struct walk *w, const struct op *op, int64_t pair)
{
    return (float *)w->shared + pair * state_len(&op->p.attn);
}

static float *slot_of(const struct walk *w, const struct op *op, int64_t pair, int64_t in_wave)
{
    int64_t n_pairs = (int64_t)SPLIT_PAIRS * w->n_threads;
    return (float *)w->shared + (n_pairs + pair * wave_len(w, op) + in_wave) * state_len(&op->p.attn);
}

static void run_segment(const struct walk *w, int worker, const struct op *op, int i, int head, int64_t segment,
                        float *state)
{
    struct span span = visible(w, op, i);
    int64_t begin = max64(span.begin / DEVICE_PAGE_TOK, segment * PAGES_PER_SEGMENT);
    int64_t n_pages = (span.end + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK;
    int64_t end = min64(n_pages, (segment + 1) * PAGES_PER_SEGMENT);
    struct own own = own_of(w, worker, &op->p.attn);

    state_reset(&op->p.attn, state);
    for (int64_t number = begin; number < end; number++) {
        struct page page = page_of(w, op, i, head, number), next = page;
        bool has_next = number + 1 < n_pages; /* also that of the next segment, which this worker is likely to run */
        if (has_next)
            next = page_of(w, op, i, head, number + 1);
        fold(w, op, i, head, &page, has_next ? &next : NULL, number * DEVICE_PAGE_TOK, span, state, own.scratch);
    }
}

/* A wave of the split form: (the op, its number) as the barrier's argument. */
struct wave {
    const struct walk *w;
    const struct op *op;
    int64_t number;
};

static void run_wave(const struct wave *v, int worker)
{
    int n_head = n_parts(&v->op->p.attn);
    int64_t len = wave_len(v->w, v->op), n_items = (int64_t)walk_n(v->w, v->op) * n_head * len;

    for (int64_t item; (item = pool_claim(v->w->pool, worker, n_items)) < n_items;) {
        int64_t pair = item / len;
        struct span s = segments(v->w, v->op, (int)(pair / n_head));
        int64_t segment = s.begin + v->number * len + item % len;
        if (segment < s.end)
            run_segment(v->w, worker, v->op, (int)(pair / n_head), (int)(pair % n_head), segment,
                        slot_of(v->w, v->op, pair, item % len));
    }
}

/* Merge the wave's segments; after the last wave write the results. */
static void end_wave(int worker, void *arg)
{
    const struct wave *v = arg;
    int n_head = n_parts(&v->op->p.attn);
    int64_t len = wave_len(v->w, v->op), n_pairs = (int64_t)walk_n(v->w, v->op) * n_head;
    bool is_last = v->number == n_waves(v->w, v->op) - 1;

    (void)worker;
    for (int64_t pair = 0; pair < n_pairs; pair++) {
        struct span s = segments(v->w, v->op, (int)(pair / n_head));
        float *sum = sum_of(v->w, v->op, pair);
        if (v->number == 0)
            state_reset(&v->op->p.attn, sum);
        for (int64_t i = 0; i < len && s.begin + v->number * len + i < s.end; i++)
            state_merge(v->w, &v->op->p.attn, slot_of(v->w, v->op, pair, i), sum);
        if (is_last)
            state_write(v->w, v->op, (int)(pair / n_head), (int)(pair % n_head), sum);
    }
}

/* ---- the op ---- */

static void begin(const struct walk *w, int worker, const struct op *op)
{
    (void)worker;
    if (!is_split(w, op))
        begin_blocks(w, op);
}

static void run(const struct walk *w, int worker, const struct op *op)
{
    if (!is_split(w, op)) {
        run_blocks(w, worker, op);
        return;
    }
    struct wave v = {w, op, 0};
    run_wave(&v, worker);
    for (int64_t n = n_waves(w, op); v.number < n - 1;) {
        pool_barrier(w->pool, worker, end_wave, &v);
        v.number++;
        run_wave(&v, worker);
    }
}

static void finish(const struct walk *w, int worker, const struct op *op)
{
    if (is_split(w, op)) {
        struct wave v = {w, op, n_waves(w, op) - 1};
        end_wave(worker, &v);
    }
}

/* ---- states of some segments, for others to merge ---- */

static struct walk_need states_need(const struct op *op, int n_rows, int n_threads)
{
    return (struct walk_need){need(op, n_rows, n_threads).own_bytes, 0};
}

/* A group's state to where each of its heads has o, m and l together. */
static void write_heads(const struct op_attn *p, float *state, float *out)
{
    for (int q = 0; q < n_group(p); q++, out += p->head_dim_v + 2) {
        memcpy(out, state_o(state) + q * p->head_dim_v, (size_t)p->head_dim_v * sizeof *out);
        out[p->head_dim_v] = state_m(p, state)[q];
        out[p->head_dim_v + 1] = state_l(p, state)[q];
    }
}

/* An item is a row, a KV head and a segment; a row's segments are neighbours, so that a worker's stretch is few streams. */
static void states_run(const struct walk *w, int worker, const struct op *op)
{
    const struct op_attn *p = &op->p.attn;
    int64_t n_items = (int64_t)walk_n(w, op) * n_parts(p) * p->n_segments;
    struct own own = own_of(w, worker, p);

    for (int64_t item; (item = pool_claim(w->pool, worker, n_items)) < n_items;) {
        int64_t in_wave = item % p->n_segments, segment = p->first + in_wave;
        int head = (int)(item / p->n_segments % n_parts(p)), i = (int)(item / p->n_segments / n_parts(p));
        int row = walk_row(w, op, i);
        if (segment * DEVICE_ATTN_SEGMENT_TOK > w->rows->pos[row] ||
            !w->rows->seqs[w->rows->seq[row]].page[p->group][segment * PAGES_PER_SEGMENT])
            continue;
        run_segment(w, worker, op, i, head, segment, own.state);
        float *out = tensor_row(op->dst[0], in_wave * walk_n(w, op) + i);
        write_heads(p, own.state, out + (int64_t)head * n_group(p) * (p->head_dim_v + 2));
    }
}

const struct walk_shared cpu_attn_states_shared = {.need = states_need, .run = states_run};

const struct walk_shared cpu_attn_shared = {.need = need, .begin = begin, .run = run, .finish = finish};
