/* What ops must be like on any device, so that kernels need to check nothing. */
#include "src/device/device_check.h"

#include "src/base/err.h"

#include <inttypes.h>
#include <math.h>
#include <stddef.h>

static bool is_f32(const struct tensor *t)
{
    return t && t->type == QUANT_F32 && t->layout == TENSOR_RAW && t->ne[0] > 0 && t->ne[1] > 0 &&
           t->stride[1] >= (uint64_t)t->ne[0] * sizeof(float) && t->stride[1] % sizeof(float) == 0;
}

static bool is_width(const struct tensor *t, int64_t width)
{
    return is_f32(t) && t->ne[0] == width;
}

static bool is_same(const struct tensor *a, const struct tensor *b)
{
    return is_f32(a) && is_f32(b) && a->ne[0] == b->ne[0];
}

/* A vector of weights: one contiguous row. */
static bool is_vector(const struct tensor *t, int64_t width)
{
    return t && t->type == QUANT_F32 && t->layout == TENSOR_RAW && t->ne[0] == width;
}

/* A matrix (or a stack of them) of any weight type that maps n_in to n_out. */
static bool is_weight(const struct tensor *t, int64_t n_in, int64_t n_out)
{
    const struct quant_info *info = t ? quant_info((int)t->type) : NULL;

    return info && info->act != QUANT_ACT_NONE && t->layout == TENSOR_RAW && n_in > 0 && n_out > 0 &&
           t->ne[0] == n_in && t->ne[1] == n_out && n_in % info->block_len == 0 && n_out <= INT32_MAX &&
           t->stride[1] >= quant_row_bytes(t->type, n_in);
}

/* The quantized forms of activations come in whole blocks. */
static bool is_act_whole(const struct tensor *t)
{
    enum quant_act act = quant_info((int)t->type)->act;
    return t->ne[0] % (act == QUANT_ACT_Q8X256 ? 256 : act == QUANT_ACT_Q8X32 ? 32 : 1) == 0;
}

static bool can_embed(const struct op *op)
{
    const struct tensor *w = op->w[0];
    const struct quant_info *info = w ? quant_info((int)w->type) : NULL;

    return info && info->to_float && w->layout == TENSOR_RAW && w->ne[0] % info->block_len == 0 && w->ne[1] > 0 &&
           is_width(op->dst[0], w->ne[0]);
}

static bool is_in_place(const struct op *op)
{
    return op->dst[0]->data == op->src[0]->data && op->dst[0]->stride[1] == op->src[0]->stride[1];
}

static bool can_rms_norm(const struct op *op)
{
    if (!is_same(op->dst[0], op->src[0]) || !op->w[0] || op->w[0]->ne[0] <= 0 ||
        !is_vector(op->w[0], op->w[0]->ne[0]) || op->w[0]->ne[0] > op->src[0]->ne[0])
        return false;
    return op->src[0]->ne[0] % op->w[0]->ne[0] == 0 || is_in_place(op);
}

static bool can_matmul(const struct op *op)
{
    if (op->n_w < 1 || op->n_w > OP_MAX_IO || !is_f32(op->src[0]))
        return false;
    for (int i = 0; i < op->n_w; i++) {
        if (!is_f32(op->dst[i]) || !is_weight(op->w[i], op->src[0]->ne[0], op->dst[i]->ne[0]) ||
            !is_act_whole(op->w[i]) || op->w[i]->ne[2] != 1)
            return false;
    }
    return true;
}

/* Values of a head of t; 0: it is not n_head of them, one behind the other in rows without gaps. */
static int64_t head_len(const struct tensor *t, int n_head)
{
    bool is_dense = is_f32(t) && t->stride[1] == (uint64_t)t->ne[0] * sizeof(float);
    return is_dense && t->ne[0] % n_head == 0 ? t->ne[0] / n_head : 0;
}

static bool can_matmul_heads(const struct op *op)
{
    const struct op_heads *p = &op->p.heads;

    if (p->n_head < 1 || op->n_w < 1 || op->n_w > OP_MAX_IO)
        return false;
    for (int i = 0; i < op->n_w; i++) {
        const struct tensor *w = op->w[i];
        if (!w || !is_weight(w, w->ne[0], w->ne[1]) || !is_act_whole(w) || w->ne[2] != p->n_head ||
            w->ne[0] > head_len(op->src[0], p->is_shared ? 1 : p->n_head) || w->ne[1] > head_len(op->dst[i], p->n_head))
            return false;
    }
    return true;
}

static bool can_rope_table(const struct op *op)
{
    return is_f32(op->dst[0]) && op->dst[0]->ne[0] % 2 == 0;
}

static bool can_rope(const struct op *op)
{
    const struct op_rope *p = &op->p.rope;

    if (p->n_head <= 0 || p->head_dim <= 0 || p->n_rot <= 0 || p->n_rot % 2 || p->n_rot > p->head_dim ||
        !is_width(op->dst[0], (int64_t)p->n_head * p->head_dim) || !is_width(op->src[1], p->n_rot))
        return false;
    int n_src = p->from_one ? 1 : p->n_head;
    return is_f32(op->src[0]) && op->src[0]->ne[0] % n_src == 0 && op->src[0]->ne[0] / n_src >= p->n_rot;
}

static bool can_attn(const struct op_attn *p)
{
    if (p->kv_type != QUANT_F16 && p->kv_type != QUANT_Q8_0)
        return false;
    int block = quant_info((int)p->kv_type)->block_len;
    return p->n_head > 0 && p->n_head_kv > 0 && p->n_head % p->n_head_kv == 0 && p->head_dim_k > 0 &&
           p->head_dim_v > 0 && p->head_dim_k % block == 0 && p->head_dim_v % block == 0 && p->window >= 0 &&
           p->group >= 0 && p->group < DEVICE_MAX_GROUPS && p->k_off % 64 == 0 && p->v_off % 64 == 0 &&
           (!p->v_in_k || (p->head_dim_v <= p->head_dim_k && p->v_off == p->k_off));
}

static bool can_kv_append(const struct op *op)
{
    const struct op_attn *p = &op->p.attn;

    return can_attn(p) && is_width(op->src[0], (int64_t)p->n_head_kv * p->head_dim_k) &&
           (p->v_in_k ? !op->src[1] : is_width(op->src[1], (int64_t)p->n_head_kv * p->head_dim_v));
}

/* A score for each head that no key has, if there are any. */
static bool can_sinks(const struct op *op)
{
    return !op->w[0] || is_vector(op->w[0], op->p.attn.n_head);
}

static bool can_attention(const struct op *op)
{
    const struct op_attn *p = &op->p.attn;

    return can_attn(p) && can_sinks(op) && is_width(op->src[0], (int64_t)p->n_head * p->head_dim_k) &&
           is_width(op->dst[0], (int64_t)p->n_head * p->head_dim_v);
}

static bool can_attn_states(const struct op *op)
{
    const struct op_attn *p = &op->p.attn;

    return can_attn(p) && p->window == 0 && is_width(op->src[0], (int64_t)p->n_head * p->head_dim_k) &&
           is_width(op->dst[0], (int64_t)p->n_head * (p->head_dim_v + 2));
}

static bool can_attn_merge(const struct op *op)
{
    const struct op_attn *p = &op->p.attn;

    return can_attn(p) && can_sinks(op) && p->window == 0 && is_width(op->dst[0], (int64_t)p->n_head * p->head_dim_v) &&
           is_width(op->dst[1], (int64_t)p->n_head * (p->head_dim_v + 2)) && is_same(op->src[0], op->dst[1]);
}

/* Two of each group make its score, and those chosen hold as many as are wanted. */
static bool can_groups(const struct op_route *p)
{
    return p->n_group == 0 || (p->n_group > 0 && p->n_group <= DEVICE_MAX_EXPERT_GROUPS &&
                               p->n_expert % p->n_group == 0 && p->n_expert / p->n_group >= 2 && p->n_group_used > 0 &&
                               p->n_group_used <= p->n_group && p->k <= p->n_expert / p->n_group * p->n_group_used);
}

/* Where parts go, and how wide what they go to is then. */
static bool can_split(const struct op *op)
{
    const struct op_split *p = &op->p.split;
    int64_t width[OP_MAX_IO] = {0}, group = 0;

    if (p->n_groups < 1 || p->n_parts < 1 || p->n_parts > DEVICE_MAX_PARTS || !is_f32(op->src[0]))
        return false;
    for (int i = 0; i < p->n_parts; i++) {
        if (p->len[i] < 1 || p->to[i] < 0 || p->to[i] >= OP_MAX_IO || op->dst[p->to[i]] == op->src[0])
            return false;
        width[p->to[i]] += (int64_t)p->len[i] * p->n_groups;
        group += p->len[i];
    }
    for (int i = 0; i < OP_MAX_IO; i++)
        if ((i > 0 && width[i] && !width[i - 1]) || (width[i] ? !is_width(op->dst[i], width[i]) : op->dst[i] != NULL))
            return false;
    return op->src[0]->ne[0] == group * p->n_groups;
}

static bool can_conv(const struct op *op)
{
    const struct tensor *w = op->w[0];

    return is_f32(w) && w->ne[0] >= 2 && w->ne[0] <= DEVICE_MAX_CONV &&
           w->stride[1] == (uint64_t)w->ne[0] * sizeof(float) && is_width(op->src[0], w->ne[1]) &&
           is_same(op->dst[0], op->src[0]) && op->dst[0] != op->src[0] && op->p.conv.off % 64 == 0;
}

static bool can_l2_norm(const struct op *op)
{
    const struct op_l2 *p = &op->p.l2;

    return is_same(op->dst[0], op->src[0]) && op->dst[0]->data == op->src[0]->data && p->n_head > 0 &&
           p->head_dim > 0 && (int64_t)p->n_head * p->head_dim <= op->src[0]->ne[0];
}

static bool can_delta_net(const struct op *op)
{
    const struct op_delta *p = &op->p.delta;

    if (p->n_head_k < 1 || p->n_head_v < 1 || p->n_head_v % p->n_head_k || p->head_dim_k < 1 || p->head_dim_v < 1 ||
        p->off % 64)
        return false;
    int64_t keys = (int64_t)p->n_head_k * p->head_dim_k, values = (int64_t)p->n_head_v * p->head_dim_v;
    return is_width(op->src[0], 2 * keys + values) && is_width(op->src[1], p->n_head_v) &&
           is_width(op->src[2], p->n_head_v) && is_width(op->dst[0], values) && op->dst[0] != op->src[0] &&
           is_vector(op->w[0], p->n_head_v) && is_vector(op->w[1], p->n_head_v);
}

static bool can_route(const struct op *op)
{
    const struct op_route *p = &op->p.route;
    const struct tensor *ids = op->dst[0];

    return p->n_expert > 0 && p->k > 0 && p->k <= p->n_expert && can_groups(p) &&
           (p->fn == OP_ROUTE_SOFTMAX || p->fn == OP_ROUTE_SOFTMAX_TOPK || p->fn == OP_ROUTE_SIGMOID) && ids &&
           ids->type == QUANT_I32 && ids->ne[0] == p->k && is_width(op->dst[1], p->k) &&
           is_width(op->src[0], p->n_expert) && (!op->w[0] || is_vector(op->w[0], p->n_expert));
}

/* A number for each expert. */
static bool is_scale_of_experts(const struct op *op, int i)
{
    return !op->w[3 + i] || is_vector(op->w[3 + i], op->w[i]->ne[2]);
}

/* A row for each expert, as wide as what its matrix number i gives, one behind the other. */
static bool is_bias_of_experts(const struct op *op, int i)
{
    const struct tensor *bias = op->w[6 + i];
    return !bias || (is_f32(bias) && bias->ne[0] == op->w[i]->ne[1] && bias->ne[1] == op->w[i]->ne[2] &&
                     bias->stride[1] == (uint64_t)bias->ne[0] * sizeof(float));
}

static bool can_moe(const struct op *op)
{
    if (op->p.moe.k < 1 || !is_f32(op->src[0]) || !op->w[0] || !op->w[1] || !op->w[2])
        return false;
    int64_t n_embd = op->src[0]->ne[0], n_ff = op->w[0]->ne[1];
    for (int i = 0; i < 3; i++)
        if (!is_scale_of_experts(op, i) || !is_bias_of_experts(op, i))
            return false;
    return is_weight(op->w[0], n_embd, n_ff) && is_weight(op->w[1], n_embd, n_ff) &&
           is_weight(op->w[2], n_ff, op->w[2]->ne[1]) && is_act_whole(op->w[0]) && is_act_whole(op->w[1]) &&
           is_act_whole(op->w[2]) && is_width(op->dst[0], op->w[2]->ne[1]) && op->w[0]->ne[2] > 0;
}

static bool can_combine(const struct op *op)
{
    return is_same(op->dst[0], op->src[0]) && is_f32(op->src[1]);
}

static bool can_top_k(const struct op *op)
{
    const struct tensor *dst = op->dst[0];

    return is_f32(op->src[0]) && op->src[0]->ne[0] <= INT32_MAX && dst && dst->type == QUANT_I32 &&
           dst->layout == TENSOR_RAW && dst->ne[0] > 0 && dst->ne[0] % 2 == 0 && dst->ne[0] / 2 <= DEVICE_MAX_TOP_K &&
           dst->stride[1] >= (uint64_t)dst->ne[0] * sizeof(int32_t) && dst->stride[1] % sizeof(int32_t) == 0;
}

bool device_check_shapes(const struct op *op)
{
    switch (op->kind) {
    case OP_EMBED:
        return can_embed(op);
    case OP_RMS_NORM:
        return can_rms_norm(op);
    case OP_MATMUL:
        return can_matmul(op);
    case OP_MATMUL_HEADS:
        return can_matmul_heads(op);
    case OP_ADD:
    case OP_GLU:
        return is_same(op->dst[0], op->src[0]) && is_same(op->dst[0], op->src[1]);
    case OP_ADD_BIAS:
        return is_same(op->dst[0], op->src[0]) && is_vector(op->w[0], op->dst[0]->ne[0]);
    case OP_SCALE:
        return is_same(op->dst[0], op->src[0]) && (!op->w[0] || is_vector(op->w[0], 1));
    case OP_SOFTCAP:
    case OP_GET_ROWS:
        return is_same(op->dst[0], op->src[0]);
    case OP_GATE:
        return is_same(op->dst[0], op->src[0]) && (is_width(op->src[1], 1) || is_same(op->src[1], op->src[0]));
    case OP_SPLIT:
        return can_split(op);
    case OP_ROPE_TABLE:
        return can_rope_table(op);
    case OP_ROPE:
        return can_rope(op);
    case OP_KV_APPEND:
        return can_kv_append(op);
    case OP_ATTENTION:
        return can_attention(op);
    case OP_ATTN_STATES:
        return can_attn_states(op);
    case OP_ATTN_MERGE:
        return can_attn_merge(op);
    case OP_CONV:
        return can_conv(op);
    case OP_L2_NORM:
        return can_l2_norm(op);
    case OP_DELTA_NET:
        return can_delta_net(op);
    case OP_ROUTE:
        return can_route(op);
    case OP_MOE:
        return can_moe(op);
    case OP_COMBINE:
        return can_combine(op);
    case OP_TOP_K:
        return can_top_k(op);
    case OP_N_KIND:
        break;
    }
    return false;
}

/* ---- the step ---- */

static int refuse(const struct op *op, const char *what, int64_t is, int64_t most)
{
    return err(ERR_ARG, "%s of layer %d: %s %" PRId64 ", possible are up to %" PRId64, device_op_name(op->kind),
               op->layer, what, is, most);
}

static int unbound(const struct op *op)
{
    return err(ERR_ARG, "%s of layer %d: a tensor has no memory", device_op_name(op->kind), op->layer);
}

static int step_row(const struct op *op, const struct rows *rows, int i)
{
    return op->rows == OP_ROWS_OUT ? rows->out_row[i] : i;
}

/* Rows of the tensors that stand for one row of the op: those of an expert's results are (token, rank). */
static int64_t dst_per_row(const struct op *op)
{
    return op->kind == OP_MOE ? op->p.moe.k : op->kind == OP_ATTN_STATES ? op->p.attn.n_segments : 1;
}

static int64_t src_per_row(const struct op *op, int i)
{
    if (op->kind == OP_ATTN_MERGE)
        return op->p.attn.n_segments;
    return op->kind == OP_COMBINE && i == 0 ? op->src[1]->ne[0] : 1;
}

/* Every tensor has memory, for as many rows as the step has. */
static int check_tensors(const struct op *op, int n)
{
    for (int i = 0; i < OP_MAX_IO; i++) {
        const struct tensor *dst = op->dst[i], *src = op->src[i], *w = op->w[i];
        if (dst && dst->ne[1] / dst_per_row(op) < n)
            return refuse(op, "rows", n, dst->ne[1] / dst_per_row(op));
        if (src && src->ne[1] / src_per_row(op, i) < n)
            return refuse(op, "rows", n, src->ne[1] / src_per_row(op, i));
        if ((dst && !dst->data) || (src && !src->data) || (w && !w->data && op->kind != OP_MOE))
            return unbound(op);
    }
    return 0;
}

static int check_tokens(const struct op *op, const struct rows *rows, int n)
{
    for (int i = 0; i < n; i++) {
        int32_t token = rows->token[step_row(op, rows, i)];
        if (token < 0 || token >= op->w[0]->ne[1])
            return refuse(op, "token", token, op->w[0]->ne[1] - 1);
    }
    return 0;
}

static int no_page(const struct op *op, int64_t page)
{
    return err(ERR_ARG, "%s of layer %d: no page for positions from %" PRId64, device_op_name(op->kind), op->layer,
               page * DEVICE_PAGE_TOK);
}

static int check_segments(const struct op *op, int n)
{
    const struct op_attn *p = &op->p.attn;

    if (p->first < 0 || p->n_segments < 1 || p->n_segments > INT32_MAX / DEVICE_ATTN_SEGMENT_TOK - p->first)
        return refuse(op, "segments", p->n_segments, INT32_MAX / DEVICE_ATTN_SEGMENT_TOK - p->first);
    return check_tensors(op, n);
}

/* Of each segment all pages that a row sees, or not even the first one. */
static int check_states(const struct op *op, const struct rows *rows, int n)
{
    const struct op_attn *p = &op->p.attn;

    for (int i = 0; i < n; i++) {
        int row = step_row(op, rows, i);
        int64_t last = rows->pos[row] / DEVICE_PAGE_TOK, first = (int64_t)p->first * DEVICE_SEGMENT_PAGES;
        int64_t end = first + (int64_t)p->n_segments * DEVICE_SEGMENT_PAGES;
        void *const *table = rows->seqs[rows->seq[row]].page[p->group];
        if (last < 0)
            return refuse(op, "position", rows->pos[row], INT32_MAX);
        for (int64_t page = first; page <= last && page < end; page++)
            if (!table[page] && table[page - page % DEVICE_SEGMENT_PAGES])
                return no_page(op, page);
    }
    return 0;
}

/* Pages of the positions that an op writes (its own) or reads (all it sees). */
static int check_pages(const struct op *op, const struct rows *rows, int n)
{
    const struct op_attn *p = &op->p.attn;

    for (int i = 0; i < n; i++) {
        int row = step_row(op, rows, i);
        int64_t pos = rows->pos[row], first = pos;
        if (pos < 0)
            return refuse(op, "position", pos, INT32_MAX);
        if (op->kind == OP_ATTENTION)
            first = p->window && pos >= p->window ? pos - p->window + 1 : 0;
        if (i > 0 && rows->seq[row] == rows->seq[step_row(op, rows, i - 1)]) {
            int64_t before = rows->pos[step_row(op, rows, i - 1)];
            if (before >= pos)
                return refuse(op, "position", before, pos - 1);
            first = first < before ? before : first; /* the pages before were looked at for that row */
        }
        for (int64_t page = first / DEVICE_PAGE_TOK; page <= pos / DEVICE_PAGE_TOK; page++)
            if (!p->is_part && !rows->seqs[rows->seq[row]].page[p->group][page])
                return no_page(op, page);
    }
    return 0;
}

/* Rows of a sequence are neighbours in position, which begin where its record ends. */
static int check_records(const struct op *op, const struct rows *rows)
{
    if (op->rows != OP_ROWS_ALL)
        return err(ERR_ARG, "%s of layer %d: runs over some rows of a step", device_op_name(op->kind), op->layer);
    for (int row = 0; row < rows->n; row++) {
        const struct kv_seq *s = &rows->seqs[rows->seq[row]];
        bool is_first = row == 0 || rows->seq[row] != rows->seq[row - 1];
        int64_t pos = rows->pos[row];
        if (!is_first && pos != (int64_t)rows->pos[row - 1] + 1)
            return refuse(op, "position", pos, (int64_t)rows->pos[row - 1] + 1);
        if (is_first && (pos < 0 || (pos > 0) != (s->record != NULL) || !s->next_record || s->next_record == s->record))
            return err(ERR_ARG, "%s of layer %d: no record for position %" PRId64, device_op_name(op->kind), op->layer,
                       pos);
    }
    return 0;
}

static int unlisted(const struct op *op, int n)
{
    return err(ERR_ARG, "%s of layer %d: no experts are listed for %d rows", device_op_name(op->kind), op->layer, n);
}

/* Experts that the device looks up: as many ids as slots, and all that they lead to has memory. */
static int check_unlisted(const struct op *op, int n)
{
    const struct tensor *ids = op->src[1];

    if (!ids || ids->type != QUANT_I32 || ids->ne[0] != op->p.moe.k)
        return unlisted(op, n);
    for (int i = 0; i < OP_MAX_IO; i++)
        if (op->w[i] && !op->w[i]->data)
            return unbound(op);
    return 0;
}

static int check_moe(const struct op *op, int n)
{
    const struct op_moe *p = &op->p.moe;
    int64_t n_slots = (int64_t)n * p->k;

    if (!p->experts)
        return check_unlisted(op, n);
    if (p->n_experts < 0 || p->n_experts > op->w[0]->ne[2])
        return refuse(op, "experts", p->n_experts, op->w[0]->ne[2]);
    for (int e = 0; e < p->n_experts; e++) {
        const struct op_expert *x = &p->experts[e];
        if (x->n < 0 || x->first < 0 || (int64_t)x->first + x->n > n_slots)
            return refuse(op, "slots", (int64_t)x->first + x->n, n_slots);
        if (!x->w[0] || !x->w[1] || !x->w[2])
            return unbound(op);
        for (int i = 0; i < x->n; i++)
            if (p->slot[x->first + i] < 0 || p->slot[x->first + i] >= n_slots)
                return refuse(op, "slot", p->slot[x->first + i], n_slots - 1);
    }
    return 0;
}

static int check_out_rows(const struct op *op, const struct rows *rows)
{
    if (op->rows != OP_ROWS_OUT)
        return err(ERR_ARG, "get_rows of layer %d: does not run over the rows that want logits", op->layer);
    for (int i = 0; i < rows->n_out; i++)
        if (rows->out_row[i] < 0 || rows->out_row[i] >= rows->n || rows->out_row[i] >= op->src[0]->ne[1])
            return refuse(op, "row", rows->out_row[i], rows->n - 1);
    return 0;
}

int device_check_step(const struct op *op, const struct rows *rows)
{
    int n = op->rows == OP_ROWS_OUT ? rows->n_out : rows->n;
    bool has_segments = op->kind == OP_ATTN_STATES || op->kind == OP_ATTN_MERGE;
    int rc = has_segments ? check_segments(op, n) : check_tensors(op, n);

    if (rc < 0)
        return rc;
    switch (op->kind) {
    case OP_EMBED:
        return check_tokens(op, rows, n);
    case OP_KV_APPEND:
    case OP_ATTENTION:
        return check_pages(op, rows, n);
    case OP_ATTN_STATES:
        return check_states(op, rows, n);
    case OP_CONV:
    case OP_DELTA_NET:
        return check_records(op, rows);
    case OP_MOE:
        return check_moe(op, n);
    case OP_GET_ROWS:
        return check_out_rows(op, rows);
    default:
        return 0;
    }
}
