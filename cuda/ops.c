/* Owns the way from an op to its launchers: arguments from tensors, activations quantized once for each form, scratch cut. */
#include "cuda/ops.h"

#include "src/base/size.h"
#include "src/device/device_check.h"

#include <math.h>
#include <string.h>

/* Rows up to which attention is split by segment, so that one long sequence keeps the whole GPU busy; segments at once. */
enum { SPLIT_ROWS = 8, SPLIT_SEGMENTS = 32, N_FORM = 4 };

/* Places of a matrix up to which integer dots lane by lane are sooner done than a tile of the tensor cores. */
enum { GEMV_ROWS = 2 * CU_GEMV_TOK };

/* Rows of each expert, on average over all that the model has, from which tensor cores take them: a tile costs as much with few rows
 * as with 64. */
enum { MOE_GEMM_ROWS = 16 };

/* Rows times heads of a launch. */
enum { HEADS_LAUNCH = 32768 };

/* Rows of a step, and their width, up to which ops of single rows share a launch. */
enum { CHAIN_ROWS = 8, CHAIN_WIDTH = 8192 };

/* ---- ops of single rows ---- */

/* Launch what waits. */
static cudaError_t chain_flush(const struct ops_run *r, struct cu_chain *c)
{
    cudaError_t e = cudaSuccess;

    if (c->n_ops == 1)
        e = cu_row_alone(&c->op[0], c->n_rows, r->stream);
    else if (c->n_ops)
        e = cu_chain(c, r->stream);
    *c = (struct cu_chain){.n_ops = 0};
    return e;
}

/* Launch an op over n rows that are `width` wide, or let it wait for the next ones. */
static cudaError_t chain_add(const struct ops_run *r, struct cu_chain *c, const struct cu_row_op *op, int n,
                             int64_t width)
{
    bool may_wait = n <= CHAIN_ROWS && width <= CHAIN_WIDTH;
    cudaError_t e = cudaSuccess;

    if (c->n_ops == CU_CHAIN_OPS || c->n_rows != n || !may_wait)
        e = chain_flush(r, c);
    if (e || !may_wait)
        return e ? e : cu_row_alone(op, n, r->stream);
    c->n_rows = n;
    c->op[c->n_ops++] = *op;
    return cudaSuccess;
}

static int n_of(const struct ops_run *r, const struct op *op)
{
    return op->rows == OP_ROWS_OUT ? r->rows->n_out : r->rows->n;
}

static int n_prompt_of(const struct ops_run *r)
{
    return r->rows->n_prompt < r->rows->n ? r->rows->n_prompt : r->rows->n;
}

static struct cu_step step_of(const struct ops_run *r, const struct op *op)
{
    struct cu_step s = r->step;
    s.out_row = op->rows == OP_ROWS_OUT ? r->out_row : NULL;
    return s;
}

static int64_t stride_of(const struct tensor *t)
{
    return (int64_t)(t->stride[1] / sizeof(float));
}

/* ---- what it can ---- */

/* What divides the address of each row, so that blocks are read as if they lay one behind the other. */
static uint64_t step_of_rows(const struct tensor *w)
{
    int bytes = quant_info((int)w->type)->block_bytes, step = bytes & -bytes; /* the lowest bit */
    return (uint64_t)(step < 16 ? step : 16);
}

static bool is_aligned(const struct tensor *w)
{
    return w->stride[1] % step_of_rows(w) == 0;
}

static bool can_weights(const struct op *op, int n)
{
    for (int i = 0; i < n; i++)
        if (!is_aligned(op->w[i]))
            return false;
    return true;
}

bool ops_can(const struct op *op)
{
    if (!device_check_shapes(op))
        return false;
    switch (op->kind) {
    case OP_EMBED:
        return op->w[0]->ne[0] % 32 == 0 && is_aligned(op->w[0]);
    case OP_MATMUL:
    case OP_MATMUL_HEADS:
        return can_weights(op, op->n_w);
    case OP_MOE:
        return can_weights(op, 3);
    case OP_ROPE_TABLE:
        return op->dst[0]->ne[0] / 2 <= CU_ROPE_MAX_FREQ;
    case OP_ROUTE: /* scores, their biased copy, marks and gates lie in 48 KiB */
        return op->p.route.n_expert <= CU_ROUTE_MAX_EXPERTS && op->p.route.k <= CU_ROUTE_MAX_USED;
    case OP_ATTENTION:
    case OP_ATTN_STATES:
        return cu_attn_tile_rows(&op->p.attn, 0) > 0;
    case OP_SPLIT:
        return !op->dst[CU_SPLIT_TO];
    case OP_DELTA_NET:
        return op->p.delta.head_dim_k <= CU_DELTA_MAX_DIM;
    default:
        return true;
    }
}

static bool is_readable(const struct tensor *w, const void *data)
{
    return (uintptr_t)data % step_of_rows(w) == 0;
}

bool ops_can_read(const struct op *op)
{
    bool is_heads = op->kind == OP_MATMUL_HEADS;
    int n_w = op->kind == OP_MATMUL || is_heads ? op->n_w : op->kind == OP_EMBED;

    for (int i = 0; i < n_w; i++)
        if (!is_readable(op->w[i], op->w[i]->data) || (is_heads && op->w[i]->stride[2] % step_of_rows(op->w[i])))
            return false;
    for (int e = 0; op->kind == OP_MOE && op->p.moe.experts && e < op->p.moe.n_experts; e++)
        for (int i = 0; i < 3; i++)
            if (!is_readable(op->w[i], op->p.moe.experts[e].w[i]))
                return false;
    for (int i = 0; op->kind == OP_MOE && !op->p.moe.experts && i < 3; i++) /* each of a stack */
        if (!is_readable(op->w[i], op->w[i]->data) || op->w[i]->stride[2] % step_of_rows(op->w[i]))
            return false;
    return true;
}

/* ---- rows ---- */

static struct cu_rows_args rows_of(const struct ops_run *r, const struct op *op)
{
    const struct tensor *a = op->src[0], *b = op->src[1];
    struct cu_rows_args x = {.n = n_of(r, op), .width = op->dst[0]->ne[0], .dst = op->dst[0]->data};

    x.dst_stride = stride_of(op->dst[0]);
    x.a = a->data;
    x.a_stride = stride_of(a);
    x.b = b ? b->data : NULL;
    x.b_stride = b ? stride_of(b) : 0;
    x.w = op->w[0] ? op->w[0]->data : NULL;
    return x;
}

static cudaError_t add_rows(const struct ops_run *r, struct cu_chain *c, enum cu_row_kind kind, struct cu_rows_args x)
{
    struct cu_row_op row = {.kind = kind, .u.rows = x};
    return chain_add(r, c, &row, x.n, x.width);
}

static cudaError_t rms_norm(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rows_args x = rows_of(r, op);
    x.f = op->p.norm.eps;
    x.len = op->w[0]->ne[0];
    return add_rows(r, c, CU_ROW_NORM, x);
}

static cudaError_t add(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    return add_rows(r, c, CU_ROW_ADD, rows_of(r, op));
}

static cudaError_t add_bias(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    return add_rows(r, c, CU_ROW_ADD_BIAS, rows_of(r, op));
}

static cudaError_t scale(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rows_args x = rows_of(r, op);
    x.f = op->p.scale.f;
    return add_rows(r, c, CU_ROW_SCALE, x);
}

static cudaError_t softcap(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rows_args x = rows_of(r, op);
    x.f = op->p.scale.f;
    return add_rows(r, c, CU_ROW_SOFTCAP, x);
}

static cudaError_t glu(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rows_args x = rows_of(r, op);
    x.act = op->p.glu.act;
    return add_rows(r, c, CU_ROW_GLU, x);
}

static cudaError_t gate(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    bool is_one = op->src[1]->ne[0] == 1;
    return add_rows(r, c, is_one ? CU_ROW_GATE : CU_ROW_GATE_EACH, rows_of(r, op));
}

static cudaError_t split(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_split_args x = {.p = op->p.split, .x = op->src[0]->data, .width = op->src[0]->ne[0]};

    x.x_stride = stride_of(op->src[0]);
    for (int i = 0; i < CU_SPLIT_TO && op->dst[i]; i++) {
        x.dst[i] = op->dst[i]->data;
        x.dst_stride[i] = stride_of(op->dst[i]);
    }
    struct cu_row_op row = {.kind = CU_ROW_SPLIT, .u.split = x};
    return chain_add(r, c, &row, n_of(r, op), x.width);
}

static cudaError_t l2_norm(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_l2_args x = {.p = op->p.l2, .x = op->dst[0]->data, .x_stride = stride_of(op->dst[0])};
    struct cu_row_op row = {.kind = CU_ROW_L2, .u.l2 = x};
    return chain_add(r, c, &row, n_of(r, op), op->dst[0]->ne[0]);
}

/* A launch of its own: of the ranks' rows a single block would read too much. */
static cudaError_t combine(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rows_args x = rows_of(r, op);
    x.len = op->src[1]->ne[0];
    struct cu_row_op row = {.kind = CU_ROW_COMBINE, .u.rows = x};
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_row_alone(&row, x.n, r->stream);
}

static cudaError_t get_rows(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rows_args x = rows_of(r, op);
    x.row = r->out_row;
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_get_rows(&x, r->stream);
}

static cudaError_t embed(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    const struct tensor *w = op->w[0];
    struct cu_embed_args x = {.books = r->books, .type = w->type, .w = w->data, .w_stride = w->stride[1]};

    x.step = step_of(r, op);
    x.n = n_of(r, op);
    x.width = w->ne[0];
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    x.f = op->p.scale.f;
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_embed(&x, r->stream);
}

static cudaError_t rope_table(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rope_table_args x = {.step = step_of(r, op), .n = n_of(r, op), .mscale = op->p.rope_table.mscale};

    x.n_freq = (int)(op->dst[0]->ne[0] / 2);
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    memcpy(x.freq, op->p.rope_table.freq, (size_t)x.n_freq * sizeof *x.freq);
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_rope_table(&x, r->stream);
}

static cudaError_t rope(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_rope_args x = {.p = op->p.rope, .n = n_of(r, op), .x = op->dst[0]->data, .table = op->src[1]->data};

    x.x_stride = stride_of(op->dst[0]);
    x.src = op->src[0]->data;
    x.src_stride = stride_of(op->src[0]);
    x.src_dim = (int)(op->src[0]->ne[0] / (x.p.from_one ? 1 : x.p.n_head));
    x.table_stride = stride_of(op->src[1]);
    struct cu_row_op row = {.kind = CU_ROW_ROPE, .u.rope = x};
    return chain_add(r, c, &row, x.n, op->dst[0]->ne[0]);
}

static cudaError_t route(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_route_args x = {.p = op->p.route, .n = n_of(r, op), .logits = op->src[0]->data};

    x.bias = op->w[0] ? op->w[0]->data : NULL;
    x.ids = op->dst[0]->data;
    x.gates = op->dst[1]->data;
    x.logits_stride = stride_of(op->src[0]);
    x.ids_stride = stride_of(op->dst[0]);
    x.gates_stride = stride_of(op->dst[1]);
    struct cu_row_op row = {.kind = CU_ROW_ROUTE, .u.route = x};
    return chain_add(r, c, &row, x.n, x.p.n_expert);
}

static int top_k_of(const struct op *op)
{
    return (int)(op->dst[0]->ne[0] / 2);
}

static cudaError_t top_k(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_top_args x = {.n = n_of(r, op), .k = top_k_of(op), .width = op->src[0]->ne[0], .x = op->src[0]->data};

    x.dst = op->dst[0]->data;
    x.x_stride = stride_of(op->src[0]);
    x.dst_stride = stride_of(op->dst[0]);
    x.scratch = (uint64_t *)r->scratch;
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_top(&x, r->stream);
}

static uint64_t top_k_scratch(const struct op *op, int n_rows)
{
    int n = n_rows < op->dst[0]->ne[1]
                ? n_rows
                : (int)op->dst[0]->ne[1]; /* of those that want logits fewer are asked of a step */

    return n > 0 ? cu_top_scratch_bytes(n, op->src[0]->ne[0], top_k_of(op)) : 0;
}

/* ---- attention ---- */

static cudaError_t kv_append(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_append_args x = {.p = op->p.attn, .step = step_of(r, op), .n = n_of(r, op)};

    x.k = op->src[0]->data;
    x.k_stride = stride_of(op->src[0]);
    if (op->src[1]) {
        x.v = op->src[1]->data;
        x.v_stride = stride_of(op->src[1]);
    }
    struct cu_row_op row = {.kind = CU_ROW_APPEND, .u.append = x};
    return chain_add(r, c, &row, x.n, op->src[0]->ne[0]);
}

static uint64_t attn_scratch(const struct op *op, int n_rows)
{
    const struct op_attn *p = &op->p.attn;
    uint64_t n = (uint64_t)(n_rows < SPLIT_ROWS ? n_rows : SPLIT_ROWS) * (uint64_t)p->n_head;
    return n * (SPLIT_SEGMENTS + 1) * (uint64_t)(p->head_dim_v + 2) * sizeof(float);
}

/* Most segments that a row of the step sees. */
static int most_segments(const struct ops_run *r, const struct op *op, int n)
{
    int most = 0, window = op->p.attn.window;

    for (int i = 0; i < n; i++) {
        int32_t pos = r->rows->pos[op->rows == OP_ROWS_OUT ? r->rows->out_row[i] : i];
        int32_t first = window && pos >= window ? pos - window + 1 : 0;
        int segments = pos / DEVICE_ATTN_SEGMENT_TOK - first / DEVICE_ATTN_SEGMENT_TOK + 1;
        most = segments > most ? segments : most;
    }
    return most;
}

static cudaError_t attention(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_attn_args x = {.p = op->p.attn, .step = step_of(r, op), .n = n_of(r, op)};
    int n_segments = x.n <= SPLIT_ROWS ? most_segments(r, op, x.n) : 1;
    cudaError_t e = chain_flush(r, c);

    x.shared_bytes = r->card.shared_bytes;
    x.tile_rows = cu_attn_tile_rows(&x.p, x.shared_bytes);
    x.sinks = op->w[0] ? op->w[0]->data : NULL;
    x.q = op->src[0]->data;
    x.q_stride = stride_of(op->src[0]);
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    if (n_segments == 1)
        return e ? e : cu_attn(&x, r->stream);
    x.tile_rows = 1;
    x.n_segments = n_segments < SPLIT_SEGMENTS ? n_segments : SPLIT_SEGMENTS;
    x.states = (float *)r->scratch;
    x.state_segment = x.p.head_dim_v + 2;
    x.state_head = x.n_segments * x.state_segment;
    x.state_row = x.p.n_head * x.state_head;
    x.sums = x.states + x.n * x.state_row;
    x.sum_stride = x.p.n_head * x.state_segment;
    for (; x.first < n_segments && !e; x.first += x.n_segments) {
        x.is_last = x.first + x.n_segments >= n_segments;
        e = cu_attn(&x, r->stream);
        e = e ? e : cu_attn_merge(&x, r->stream);
    }
    return e;
}

/* Where ops.def has the state of (segment, row, head): rows of a segment are neighbours. */
static void place_states(struct cu_attn_args *x, const struct tensor *states)
{
    x->states = states->data;
    x->first = x->p.first;
    x->n_segments = x->p.n_segments;
    x->state_head = x->p.head_dim_v + 2;
    x->state_row = stride_of(states);
    x->state_segment = x->n * x->state_row;
}

static cudaError_t attn_states(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_attn_args x = {.p = op->p.attn, .step = step_of(r, op), .n = n_of(r, op)};

    place_states(&x, op->dst[0]);
    x.shared_bytes = r->card.shared_bytes;
    x.tile_rows = x.n <= SPLIT_ROWS ? 1 : cu_attn_tile_rows(&x.p, x.shared_bytes);
    x.q = op->src[0]->data;
    x.q_stride = stride_of(op->src[0]);
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_attn(&x, r->stream);
}

static cudaError_t attn_merge(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_attn_args x = {.p = op->p.attn, .step = step_of(r, op), .n = n_of(r, op), .is_last = op->p.attn.is_last};

    place_states(&x, op->src[0]);
    x.sinks = op->w[0] ? op->w[0]->data : NULL;
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    x.sums = op->dst[1]->data;
    x.sum_stride = stride_of(op->dst[1]);
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_attn_merge(&x, r->stream);
}

/* ---- recurrent layers ---- */

static cudaError_t conv(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_conv_args x = {.step = step_of(r, op), .off = op->p.conv.off, .n = n_of(r, op)};

    x.k = (int)op->w[0]->ne[0];
    x.width = op->src[0]->ne[0];
    x.x = op->src[0]->data;
    x.x_stride = stride_of(op->src[0]);
    x.w = op->w[0]->data;
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_conv(&x, r->stream);
}

static cudaError_t delta_net(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_delta_args x = {.p = op->p.delta, .step = step_of(r, op), .n_stretches = r->n_stretches};

    x.x = op->src[0]->data;
    x.x_stride = stride_of(op->src[0]);
    x.alpha = op->src[1]->data;
    x.alpha_stride = stride_of(op->src[1]);
    x.beta = op->src[2]->data;
    x.beta_stride = stride_of(op->src[2]);
    x.bias = op->w[0]->data;
    x.rate = op->w[1]->data;
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    x.scale = 1.0f / sqrtf((float)x.p.head_dim_k);
    cudaError_t e = chain_flush(r, c);
    return e ? e : cu_delta_net(&x, r->stream);
}

/* ---- matmul ---- */

static enum quant_act form_of(const struct tensor *w)
{
    return quant_info((int)w->type)->act;
}

/* Where each form of the activations but floats lies in scratch; returns the bytes of all. */
static uint64_t place_forms(const struct op *op, int n_rows, uint64_t off[N_FORM], bool is_used[N_FORM])
{
    uint64_t bytes = 0;

    memset(is_used, 0, N_FORM * sizeof *is_used);
    for (int i = 0; i < op->n_w; i++)
        is_used[form_of(op->w[i])] = form_of(op->w[i]) != QUANT_ACT_F32; /* those are there */
    for (int form = 0; form < N_FORM; form++) {
        off[form] = bytes;
        if (is_used[form])
            bytes += size_up((uint64_t)n_rows * cu_act_bytes((enum quant_act)form, op->src[0]->ne[0]), 256);
    }
    return bytes;
}

static uint64_t matmul_scratch(const struct op *op, int n_rows)
{
    uint64_t off[N_FORM], halves = size_up((uint64_t)n_rows * cu_half_bytes(op->src[0]->ne[0]), 256);
    bool is_used[N_FORM];
    return place_forms(op, n_rows, off, is_used) + halves;
}

/* A router's logits decide which experts a row gets, so they come from float dots for every row. */
static bool is_router(const struct ops_run *r, const struct op *op)
{
    for (const struct op *later = op + 1; later < r->ops + r->n_ops && later <= op + 3; later++)
        if (later->kind == OP_ROUTE && later->src[0]->data == op->dst[0]->data)
            return true;
    return false;
}

/* The first so many rows go through the tensor cores. */
static int n_gemm_rows(const struct ops_run *r, const struct op *op)
{
    if (r->prefill != DEVICE_PREFILL_BLAS || op->rows != OP_ROWS_ALL || op->src[0]->ne[0] % 32 || is_router(r, op))
        return 0;
    return n_prompt_of(r);
}

/* Rows [first, first + n) of src0 in a form at `out`. */
static struct cu_act_args act_of(const struct op *op, int first, int n, enum quant_act form, void *out)
{
    struct cu_act_args x = {.act = form, .n_rows = n, .width = op->src[0]->ne[0], .out = out};

    x.x = tensor_row(op->src[0], first);
    x.x_stride = stride_of(op->src[0]);
    x.out_stride = cu_act_bytes(form, x.width);
    return x;
}

static struct cu_mat_args mat_of(const struct ops_run *r, const struct op *op, int i, int first, int n)
{
    struct cu_mat_args m = {.books = r->books, .type = op->w[i]->type, .w = op->w[i]->data};

    m.w_stride = op->w[i]->stride[1];
    m.n_cols = op->w[i]->ne[0];
    m.n_rows = (int)op->w[i]->ne[1];
    m.dst = tensor_row(op->dst[i], first);
    m.dst_stride = stride_of(op->dst[i]);
    m.n_place = n;
    m.card = r->card;
    return m;
}

/* Matrices from number i on that one launch can multiply beside m. */
static void take_more(const struct ops_run *r, const struct op *op, int i, int first, struct cu_mat_args *m)
{
    for (; i < op->n_w && m->n_more < CU_MAT_MORE; i++) {
        struct cu_mat_args next = mat_of(r, op, i, first, m->n_place);
        if (next.type != m->type || next.w_stride != m->w_stride)
            return;
        m->more[m->n_more++] = (struct cu_mat_more){next.w, next.dst, next.dst_stride, next.n_rows};
    }
}

static cudaError_t matmul_halves(const struct ops_run *r, const struct op *op, int n, void *halves)
{
    struct cu_act_args x = act_of(op, 0, n, QUANT_ACT_F32, halves);

    x.out_stride = cu_half_bytes(x.width);
    x.by_lanes = r->card.has_wgmma;
    cudaError_t e = cu_half(&x, r->stream);
    for (int i = 0; i < op->n_w && !e; i++) {
        struct cu_mat_args m = mat_of(r, op, i, 0, n);
        m.x = x.out;
        m.x_stride = x.out_stride;
        m.tile_tok = cu_gemm_tile_tok(&r->card, m.type, m.n_rows, n);
        e = cu_gemm(&m, r->stream);
    }
    return e;
}

static cudaError_t matmul(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    uint64_t off[N_FORM];
    bool is_used[N_FORM];
    int first = n_gemm_rows(r, op), n = n_of(r, op) - first;
    uint64_t bytes = place_forms(op, n, off, is_used);
    cudaError_t e = first ? chain_flush(r, c) : cudaSuccess;

    if (first && !e)
        e = matmul_halves(r, op, first, r->scratch + bytes);
    if (n == 0)
        return e;
    for (int form = 0; form < N_FORM && !e; form++)
        if (is_used[form]) {
            struct cu_act_args x = act_of(op, first, n, (enum quant_act)form, r->scratch + off[form]);
            struct cu_row_op row = {.kind = CU_ROW_ACT, .u.act = x};
            e = chain_add(r, c, &row, n, x.width);
        }
    e = e ? e : chain_flush(r, c);
    for (int i = 0, n_taken; i < op->n_w && !e; i += n_taken) {
        struct cu_mat_args m = mat_of(r, op, i, first, n);
        enum quant_act form = form_of(op->w[i]);
        m.x = is_used[form] ? (const void *)(r->scratch + off[form]) : tensor_row(op->src[0], first);
        m.x_stride = is_used[form] ? cu_act_bytes(form, m.n_cols) : op->src[0]->stride[1];
        m.tile_tok = ops_tile_tok(n, n, 1);
        if (form == QUANT_ACT_F32 && m.tile_tok > CU_GEMV_TOK) /* there is no tile of them: more blocks */
            m.tile_tok = CU_GEMV_TOK;
        take_more(r, op, i + 1, first, &m);
        n_taken = 1 + m.n_more;
        e = cu_gemv(&m, r->stream);
    }
    return e;
}

/* ---- a matrix for each head: always by the arithmetic of few rows ---- */

/* Rows of activations for a row of the step. */
static int n_act_of(const struct op *op)
{
    return op->p.heads.is_shared ? 1 : op->p.heads.n_head;
}

/* Rows of the step at once: a launch has so many rows of activations, or tiles, at most. */
static int heads_rows(const struct op *op, int n_rows)
{
    int most = HEADS_LAUNCH / op->p.heads.n_head;
    most = most > 0 ? most : 1;
    return n_rows < most ? n_rows : most;
}

static uint64_t heads_form_bytes(const struct op *op, int i, int n_rows)
{
    enum quant_act form = form_of(op->w[i]);
    return size_up((uint64_t)n_rows * (uint64_t)n_act_of(op) * cu_act_bytes(form, op->w[i]->ne[0]), 256);
}

/* Of one weight at a time. */
static uint64_t heads_scratch(const struct op *op, int n_rows)
{
    uint64_t most = 0;

    for (int i = 0; i < op->n_w; i++) {
        uint64_t bytes = heads_form_bytes(op, i, heads_rows(op, n_rows));
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* The part of each head (of each row, where they share it) that is multiplied with weight i, in its form. */
static cudaError_t heads_act(const struct ops_run *r, const struct op *op, int i, int first, int n,
                             struct cu_mat_args *m)
{
    struct cu_act_args x = {.act = form_of(op->w[i]), .n_rows = n * n_act_of(op), .width = op->w[i]->ne[0]};

    x.x = tensor_row(op->src[0], first);
    x.x_stride = op->src[0]->ne[0] / n_act_of(op);
    x.out = r->scratch;
    x.out_stride = cu_act_bytes(x.act, x.width);
    m->x = r->scratch;
    m->x_stride = x.out_stride;
    if (x.act != QUANT_ACT_F32)
        return cu_act(&x, r->stream);
    m->x = x.x;
    m->x_stride = (uint64_t)x.x_stride * sizeof(float);
    return cudaSuccess;
}

static cudaError_t heads_of_rows(const struct ops_run *r, const struct op *op, int first, int n)
{
    cudaError_t e = cudaSuccess;

    for (int i = 0; i < op->n_w && !e; i++) {
        struct cu_mat_args m = mat_of(r, op, i, first, n);
        m.n_heads = op->p.heads.n_head;
        m.w_head = op->w[i]->stride[2];
        m.skip = m.n_heads - 1;
        m.x_div = op->p.heads.is_shared ? m.n_heads : 0;
        m.dst_stride = op->dst[i]->ne[0] / m.n_heads;
        m.tile_tok = ops_tile_tok(n, n, 1);
        if (form_of(op->w[i]) == QUANT_ACT_F32 && m.tile_tok > CU_GEMV_TOK)
            m.tile_tok = CU_GEMV_TOK;
        e = heads_act(r, op, i, first, n, &m);
        e = e ? e : cu_gemv(&m, r->stream);
    }
    return e;
}

static cudaError_t matmul_heads(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    const int n_all = n_of(r, op), n_once = heads_rows(op, n_all);
    cudaError_t e = chain_flush(r, c);

    for (int first = 0; first < n_all && !e; first += n_once)
        e = heads_of_rows(r, op, first, n_all - first < n_once ? n_all - first : n_once);
    return e;
}

/* ---- experts ---- */

int ops_tile_tok(int n_rows, int n_places, int n_mats)
{
    return n_rows == 1 ? 1 : n_places <= GEMV_ROWS * n_mats ? CU_GEMV_TOK : CU_GEMM_INT_TOK;
}

/* Of what scratch follows from. */
static struct cu_moe_args moe_of(const struct op *op, int n_rows)
{
    struct cu_moe_args x = {.act = op->p.moe.act, .k = op->p.moe.k, .n_rows = n_rows};

    for (int i = 0; i < 3; i++) {
        x.type[i] = op->w[i]->type;
        x.w_stride[i] = op->w[i]->stride[1];
    }
    x.n_embd = op->w[0]->ne[0];
    x.n_ff = op->w[0]->ne[1];
    x.n_out = op->w[2]->ne[1];
    return x;
}

int ops_moe_gemm_rows(const struct ops_run *r, const struct op *op, int *tile_tok)
{
    const struct tensor *const *w = op->w;
    int64_t n_slots = (int64_t)n_prompt_of(r) * op->p.moe.k, n_expert = w[0]->ne[2];

    if (r->prefill != DEVICE_PREFILL_BLAS || op->rows != OP_ROWS_ALL || w[0]->ne[0] % 32 || w[2]->ne[0] % 32 ||
        n_slots < MOE_GEMM_ROWS * n_expert)
        return 0;
    *tile_tok = CU_GEMM_TOK_MANY;
    for (int i = 0; i < 3; i++) {
        int tok = cu_gemm_tile_tok(&r->card, w[i]->type, w[i]->ne[1] * n_expert, (int)(n_slots / n_expert));
        *tile_tok = tok < *tile_tok ? tok : *tile_tok;
    }
    return n_prompt_of(r);
}

/* All of a layer's matrices number i. */
static struct cu_stack stack_of(const struct op *op, int i)
{
    const struct tensor *w = op->w[i], *scale = op->w[3 + i], *bias = op->w[6 + i];
    return (struct cu_stack){w->data, w->stride[2], scale ? scale->data : NULL, bias ? bias->data : NULL};
}

/* Rows of a gate and its up that are multiplied together come by the same aligned sixteens. */
static bool lie_alike(const struct op *op)
{
    const struct op_moe *m = &op->p.moe;

    if (!m->experts)
        return (((uintptr_t)op->w[0]->data ^ (uintptr_t)op->w[1]->data) | (op->w[0]->stride[2] ^ op->w[1]->stride[2])) %
                   16 ==
               0;
    for (int e = 0; e < m->n_experts; e++)
        if (((uintptr_t)m->experts[e].w[0] ^ (uintptr_t)m->experts[e].w[1]) % 16)
            return false;
    return true;
}

static struct cu_moe_args moe_args_of(const struct ops_run *r, const struct op *op)
{
    struct cu_moe_args x = moe_of(op, n_of(r, op));

    x.card = r->card;
    x.books = r->books;
    x.x = op->src[0]->data;
    x.x_stride = stride_of(op->src[0]);
    x.dst = op->dst[0]->data;
    x.dst_stride = stride_of(op->dst[0]);
    x.lie_alike = lie_alike(op);
    x.scratch = r->scratch;
    if (op->p.moe.experts)
        x.experts = r->experts;
    for (int i = 0; i < 3 && !op->p.moe.experts; i++)
        x.stack[i] = stack_of(op, i);
    return x;
}

/* Where lists that a kernel makes lie in scratch: their numbers of tiles, the slots of all, and each one's tiles. */
struct permute_room {
    uint64_t slots_off, tiles_off[CU_PERMUTE_LISTS], total_bytes;
};

static struct permute_room permute_room_of(const struct op *op, int n_rows)
{
    const int n_slots = n_rows * op->p.moe.k, n_expert = (int)op->w[0]->ne[2];
    const uint64_t most_tiles = (uint64_t)cu_permute_most_tiles(n_slots, n_expert, CU_GEMV_TOK); /* of the smallest */
    struct permute_room room = {.slots_off = 256};

    room.total_bytes = room.slots_off + size_up((uint64_t)n_slots * sizeof(int32_t), 256);
    for (int i = 0; i < CU_PERMUTE_LISTS; i++) {
        room.tiles_off[i] = room.total_bytes;
        room.total_bytes += size_up(most_tiles * sizeof(struct cu_tile), 256);
    }
    return room;
}

/* Slots [first, end) as one more list. */
static struct ops_slots permute_add(const struct ops_run *r, const struct op *op, int first, int end, int tile_tok,
                                    struct cu_permute_args *g)
{
    const struct permute_room room = permute_room_of(op, n_of(r, op));
    const int i = g->n_lists++;
    struct cu_permute_list *l = &g->list[i];

    *l = (struct cu_permute_list){.first = first, .end = end, .tile_tok = tile_tok};
    l->n_tiles = (int32_t *)r->scratch + i;
    l->slot = (int32_t *)(r->scratch + room.slots_off) + first;
    l->tiles = (struct cu_tile *)(r->scratch + room.tiles_off[i]);
    return (struct ops_slots){.slot = l->slot,
                              .tiles = l->tiles,
                              .n_listed = l->n_tiles,
                              .n_place = end - first,
                              .n_tiles = cu_permute_most_tiles(end - first, g->n_expert, tile_tok),
                              .tile_tok = tile_tok};
}

/* What a kernel is to list: what the host would if it saw the ids. How many experts they name it cannot know: as many as can be. */
static struct cu_permute_args permute_of(const struct ops_run *r, const struct op *op, struct ops_slots *dots,
                                         struct ops_slots *gemm)
{
    const struct tensor *ids = op->src[1];
    struct cu_permute_args g = {.k = op->p.moe.k, .n_expert = (int)op->w[0]->ne[2], .ids = ids->data};
    const int n_rows = n_of(r, op), n_slots = n_rows * g.k;
    int tile_tok = 0, n_gemm = ops_moe_gemm_rows(r, op, &tile_tok) * g.k, n_dots = n_slots - n_gemm;

    g.ids_stride = stride_of(ids);
    if (n_gemm)
        *gemm = permute_add(r, op, 0, n_gemm, tile_tok, &g);
    tile_tok = ops_tile_tok(n_rows, n_dots, n_dots < g.n_expert ? n_dots : g.n_expert);
    if (n_dots)
        *dots = permute_add(r, op, n_gemm, n_slots, tile_tok, &g);
    return g;
}

static void set_slots(const struct ops_slots *s, struct cu_moe_args *x)
{
    x->slot = s->slot;
    x->n_place = s->n_place;
    x->tiles = s->tiles;
    x->n_listed = s->n_listed;
    x->n_tiles = s->n_tiles;
    x->tile_tok = s->tile_tok;
}

/* Rows in the forms that integer dots read, beside what waits. */
static cudaError_t moe_forms(const struct ops_run *r, const struct cu_moe_args *x, struct cu_chain *c)
{
    struct cu_act_args form[CU_MOE_FORMS];
    const int n = x->n_place ? cu_moe_forms(x, form) : 0;
    cudaError_t e = cudaSuccess;

    for (int i = 0; i < n && !e; i++) {
        struct cu_row_op row = {.kind = CU_ROW_ACT, .u.act = form[i]};
        e = chain_add(r, c, &row, x->n_rows, x->n_embd);
    }
    return e ? e : chain_flush(r, c);
}

/* Products of the slots that were listed, by the host or a kernel, or of one row's, each to its own place. */
static cudaError_t moe(const struct ops_run *r, const struct op *op, struct cu_chain *c)
{
    struct cu_moe_args x = moe_args_of(r, op);
    struct cu_permute_args g = {.n_lists = 0};
    struct ops_slots dots = {.n_place = 0}, gemm = {.n_place = 0};

    if (op->p.moe.experts) {
        dots = r->dots;
        gemm = r->gemm;
    } else if (x.n_rows == 1) {
        x.ids = op->src[1]->data;
        dots = (struct ops_slots){.n_place = x.k, .tile_tok = 1};
    } else {
        g = permute_of(r, op, &dots, &gemm);
        x.scratch = r->scratch + permute_room_of(op, x.n_rows).total_bytes;
    }
    set_slots(&dots, &x);
    cudaError_t e = moe_forms(r, &x, c);
    if (g.n_lists && !e)
        e = cu_permute(&g, r->stream);
    if (dots.n_place && !e)
        e = cu_moe(&x, r->stream);
    set_slots(&gemm, &x);
    return e || !gemm.n_place ? e : cu_moe_gemm(&x, r->stream);
}

/* ---- all ---- */

cudaError_t ops_card(int gpu, enum device_prefill prefill, struct cu_card *card)
{
    int major = 0;
    cudaError_t e = cudaDeviceGetAttribute(&card->n_multiprocessors, cudaDevAttrMultiProcessorCount, gpu);

    if (!e)
        e = cudaDeviceGetAttribute(&card->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu);
    if (!e)
        e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu);
    card->has_bulk = card->has_wgmma = false;
    if (!e)
        e = cu_is_code_of_90(&card->has_bulk);
    if (!e && major == 9 && prefill == DEVICE_PREFILL_BLAS)
        e = cu_gemm_has_wgmma(&card->has_wgmma);
    if (!e)
        e = cu_gemv_prepare(card);
    if (!e)
        e = cu_attn_prepare(card->shared_bytes);
    return e || prefill != DEVICE_PREFILL_BLAS ? e : cu_gemm_prepare(card);
}

uint64_t ops_scratch_bytes(const struct op *op, int n_rows)
{
    if (op->kind == OP_MATMUL)
        return matmul_scratch(op, n_rows);
    if (op->kind == OP_MATMUL_HEADS)
        return heads_scratch(op, n_rows);
    if (op->kind == OP_ATTENTION)
        return attn_scratch(op, n_rows);
    if (op->kind == OP_TOP_K)
        return top_k_scratch(op, n_rows);
    if (op->kind != OP_MOE)
        return 0;
    struct cu_moe_args x = moe_of(op, n_rows);
    uint64_t dots = cu_moe_scratch_bytes(&x), gemm = cu_moe_gemm_scratch_bytes(&x);
    return permute_room_of(op, n_rows).total_bytes + (dots > gemm ? dots : gemm);
}

/* What is not an op of single rows launches what waits before itself. */
typedef cudaError_t launch_fn(const struct ops_run *r, const struct op *op, struct cu_chain *c);

static launch_fn *const fns[OP_N_KIND] = {
    [OP_EMBED] = embed,
    [OP_RMS_NORM] = rms_norm,
    [OP_MATMUL] = matmul,
    [OP_MATMUL_HEADS] = matmul_heads,
    [OP_ADD] = add,
    [OP_ADD_BIAS] = add_bias,
    [OP_SCALE] = scale,
    [OP_SOFTCAP] = softcap,
    [OP_GLU] = glu,
    [OP_GATE] = gate,
    [OP_ROPE_TABLE] = rope_table,
    [OP_ROPE] = rope,
    [OP_KV_APPEND] = kv_append,
    [OP_ATTENTION] = attention,
    [OP_ROUTE] = route,
    [OP_MOE] = moe,
    [OP_COMBINE] = combine,
    [OP_GET_ROWS] = get_rows,
    [OP_TOP_K] = top_k,
    [OP_ATTN_STATES] = attn_states,
    [OP_ATTN_MERGE] = attn_merge,
    [OP_SPLIT] = split,
    [OP_L2_NORM] = l2_norm,
    [OP_CONV] = conv,
    [OP_DELTA_NET] = delta_net,
};

cudaError_t ops_launch(const struct ops_run *run, const char **what)
{
    struct cu_chain chain = {.n_ops = 0};
    cudaError_t e = cudaSuccess;

    cu_overlap = run->card.has_bulk ? CU_OVERLAP_FIRST : CU_OVERLAP_NONE;
    for (const struct op *op = run->ops; op < run->ops + run->n_ops && !e; op++) {
        *what = device_op_name(op->kind);
        e = n_of(run, op) ? fns[op->kind](run, op, &chain) : cudaSuccess;
    }
    e = e ? e : chain_flush(run, &chain);
    cu_overlap = CU_OVERLAP_NONE;
    return e;
}
