/* The row-local ops: row i of the result needs row i of the arguments and nothing else of the step. */
#include "cpu/walk.h"

#include "cpu/kern_math.h"

#include <math.h>
#include <string.h>

/* One op and the rows [begin, end) of its row set. */
struct job {
    const struct walk *w;
    const struct kern_table *kern;
    const struct op *op;
    int worker, begin, end;
};

typedef void rows_fn(const struct job *j);

static float *dst_row(const struct job *j, int i)
{
    return tensor_row(j->op->dst[0], i);
}

static const float *src_row(const struct job *j, int n_src, int i)
{
    return tensor_row(j->op->src[n_src], i);
}

static void embed(const struct job *j)
{
    const struct tensor *w = j->op->w[0];
    const struct quant_info *info = quant_info((int)w->type);

    for (int i = j->begin; i < j->end; i++) {
        float *x = dst_row(j, i);
        info->to_float(tensor_row(w, j->w->rows->token[walk_row(j->w, j->op, i)]), x, w->ne[0]);
        j->kern->scale(x, j->op->p.scale.f, x, w->ne[0]);
    }
}

static void rms_norm(const struct job *j)
{
    const struct tensor *w = j->op->w[0];
    int64_t len = w->ne[0];

    for (int i = j->begin; i < j->end; i++)
        for (int64_t at = 0; at + len <= j->op->src[0]->ne[0]; at += len)
            j->kern->rms_norm(src_row(j, 0, i) + at, w->data, j->op->p.norm.eps, dst_row(j, i) + at, len);
}

static void add(const struct job *j)
{
    for (int i = j->begin; i < j->end; i++)
        j->kern->add(src_row(j, 0, i), src_row(j, 1, i), dst_row(j, i), j->op->dst[0]->ne[0]);
}

static void add_bias(const struct job *j)
{
    for (int i = j->begin; i < j->end; i++)
        j->kern->add(src_row(j, 0, i), j->op->w[0]->data, dst_row(j, i), j->op->dst[0]->ne[0]);
}

static void scale(const struct job *j)
{
    float f = j->op->w[0] ? *(const float *)j->op->w[0]->data : j->op->p.scale.f;

    for (int i = j->begin; i < j->end; i++)
        j->kern->scale(src_row(j, 0, i), f, dst_row(j, i), j->op->dst[0]->ne[0]);
}

static void softcap(const struct job *j)
{
    for (int i = j->begin; i < j->end; i++)
        j->kern->softcap(src_row(j, 0, i), j->op->p.scale.f, dst_row(j, i), j->op->dst[0]->ne[0]);
}

static void glu(const struct job *j)
{
    for (int i = j->begin; i < j->end; i++)
        j->kern->glu(j->op->p.glu.act, src_row(j, 0, i), src_row(j, 1, i), dst_row(j, i), j->op->dst[0]->ne[0]);
}

static void gate(const struct job *j)
{
    bool is_one = j->op->src[1]->ne[0] == 1 && j->op->src[0]->ne[0] > 1;

    for (int i = j->begin; i < j->end && !is_one; i++)
        j->kern->gate(src_row(j, 0, i), src_row(j, 1, i), dst_row(j, i), j->op->dst[0]->ne[0]);
    for (int i = j->begin; i < j->end && is_one; i++)
        j->kern->scale(src_row(j, 0, i), kern_v_sigmoid(*src_row(j, 1, i)), dst_row(j, i), j->op->dst[0]->ne[0]);
}

static void split_row(const struct job *j, int row)
{
    const struct op_split *p = &j->op->p.split;
    int64_t at[OP_MAX_IO] = {0}; /* how far each dst is filled */
    int off = 0, group = 0;

    for (int i = 0; i < p->n_parts; i++)
        group += p->len[i];
    for (int i = 0; i < p->n_parts; off += p->len[i++]) {
        const float *from = src_row(j, 0, row) + off;
        float *to = (float *)tensor_row(j->op->dst[p->to[i]], row) + at[p->to[i]];
        for (int g = 0; g < p->n_groups; g++)
            memcpy(to + (int64_t)g * p->len[i], from + (int64_t)g * group, (size_t)p->len[i] * sizeof *to);
        at[p->to[i]] += (int64_t)p->n_groups * p->len[i];
    }
}

static void split(const struct job *j)
{
    for (int i = j->begin; i < j->end; i++)
        split_row(j, i);
}

static void l2_norm(const struct job *j)
{
    const struct op_l2 *p = &j->op->p.l2;

    for (int i = j->begin; i < j->end; i++)
        for (int head = 0; head < p->n_head; head++) {
            float *x = dst_row(j, i) + (int64_t)head * p->head_dim;
            j->kern->scale(x, 1.0f / sqrtf(j->kern->sum_sq(x, p->head_dim) + p->eps), x, p->head_dim);
        }
}

static void rope_table(const struct job *j)
{
    const struct op_rope_table *p = &j->op->p.rope_table;
    int64_t half = j->op->dst[0]->ne[0] / 2;

    for (int i = j->begin; i < j->end; i++) {
        double pos = j->w->rows->pos[walk_row(j->w, j->op, i)];
        float *out = dst_row(j, i);
        for (int64_t k = 0; k < half; k++) {
            out[k] = (float)(cos(pos * p->freq[k]) * (double)p->mscale);
            out[half + k] = (float)(sin(pos * p->freq[k]) * (double)p->mscale);
        }
    }
}

static void rope(const struct job *j)
{
    const struct op_rope *p = &j->op->p.rope;
    const bool is_copied = j->op->dst[0]->data != j->op->src[0]->data;
    const int64_t src_dim = j->op->src[0]->ne[0] / (p->from_one ? 1 : p->n_head);
    const int64_t at = p->at_end ? p->head_dim - p->n_rot : 0, src_at = p->at_end ? src_dim - p->n_rot : 0;

    for (int i = j->begin; i < j->end; i++) {
        float *x = dst_row(j, i) + at;
        for (int head = 0; head < p->n_head && is_copied; head++)
            memcpy(x + (int64_t)head * p->head_dim, src_row(j, 0, i) + (p->from_one ? 0 : head * src_dim) + src_at,
                   (size_t)p->n_rot * sizeof *x);
        j->kern->rope(p, x, src_row(j, 1, i));
    }
}

/* Row i's vectors of every head (head_dim) into the page at its position. */
static void append(const struct job *j, int i, const float *x, int head_dim, uint64_t off)
{
    const struct op_attn *p = &j->op->p.attn;
    int row = walk_row(j->w, j->op, i);
    int32_t pos = j->w->rows->pos[row];
    uint64_t row_bytes = quant_row_bytes(p->kv_type, head_dim), in_page = (uint64_t)(pos % DEVICE_PAGE_TOK);

    for (int head = 0; head < p->n_head_kv; head++) {
        char *rows = walk_page(j->w, p, row, pos / DEVICE_PAGE_TOK, off, head, row_bytes);
        j->kern->kv_write(p->kv_type, x + (int64_t)head * head_dim, rows + row_bytes * in_page, head_dim);
    }
}

static void kv_append(const struct job *j)
{
    const struct op_attn *p = &j->op->p.attn;

    for (int i = j->begin; i < j->end; i++) {
        if (p->is_part && !walk_has_page(j->w, p, walk_row(j->w, j->op, i)))
            continue;
        append(j, i, src_row(j, 0, i), p->head_dim_k, p->k_off);
        if (!p->v_in_k)
            append(j, i, src_row(j, 1, i), p->head_dim_v, p->v_off);
    }
}

/* The segments that row i sees of those given, one head. s: (n_segments) o, m, l, `stride` floats apart. */
static void merge_head(const struct job *j, int i, const float *s, int64_t stride, float *sum)
{
    const struct op_attn *p = &j->op->p.attn;
    const int dim = p->head_dim_v, seen = j->w->rows->pos[walk_row(j->w, j->op, i)] / DEVICE_ATTN_SEGMENT_TOK + 1;
    const int n = seen - p->first < p->n_segments ? seen - p->first : p->n_segments;

    if (p->first == 0) {
        memset(sum, 0, (size_t)(dim + 2) * sizeof *sum);
        sum[dim] = -INFINITY;
    }
    for (int segment = 0; segment < n; segment++, s += stride)
        j->kern->attn_merge(s, s[dim], s[dim + 1], sum, &sum[dim], &sum[dim + 1], dim);
}

static void attn_merge(const struct job *j)
{
    const struct op_attn *p = &j->op->p.attn;
    const int dim = p->head_dim_v;
    const int64_t stride = (int64_t)walk_n(j->w, j->op) * (int64_t)(j->op->src[0]->stride[1] / sizeof(float));

    for (int i = j->begin; i < j->end; i++)
        for (int head = 0; head < p->n_head; head++) {
            float *sum = (float *)tensor_row(j->op->dst[1], i) + (int64_t)head * (dim + 2);
            merge_head(j, i, src_row(j, 0, i) + (int64_t)head * (dim + 2), stride, sum);
            if (p->is_last)
                j->kern->scale(sum, cpu_attn_factor(j->op, head, sum[dim], sum[dim + 1]),
                               dst_row(j, i) + (int64_t)head * dim, dim);
        }
}

/* What the selection compares: a NaN loses against everything, and of equals the lower id comes first. */
static bool is_better(float a, float b)
{
    return a > b || (a == a && b != b);
}

/* The k best of select (n), in falling order, none twice. */
static void pick(const float *select, int n, int k, int32_t *ids)
{
    for (int rank = 0; rank < k; rank++) {
        int best = -1;
        for (int e = 0; e < n; e++) {
            bool is_taken = false;
            for (int r = 0; r < rank && !is_taken; r++)
                is_taken = ids[r] == e;
            if (!is_taken && (best < 0 || is_better(select[e], select[best])))
                best = e;
        }
        ids[rank] = best;
    }
}

/* Scores of all experts from logits (n), in place; SOFTMAX_TOPK selects by the logits themselves. */
static void score(const struct job *j, float *x, int n)
{
    if (j->op->p.route.fn == OP_ROUTE_SOFTMAX)
        j->kern->softmax(x, n);
    else if (j->op->p.route.fn == OP_ROUTE_SIGMOID)
        for (int e = 0; e < n; e++)
            x[e] = kern_v_sigmoid(x[e]);
}

/* Selection scores of all experts but those of the best groups become -INFINITY. */
static void choose_groups(const struct op_route *p, float *select)
{
    int32_t groups[DEVICE_MAX_EXPERT_GROUPS], best[2];
    float sums[DEVICE_MAX_EXPERT_GROUPS];
    bool is_chosen[DEVICE_MAX_EXPERT_GROUPS] = {false};
    const int len = p->n_expert / p->n_group;

    for (int g = 0; g < p->n_group; g++) {
        pick(select + g * len, len, 2, best);
        sums[g] = select[g * len + best[0]] + select[g * len + best[1]];
    }
    pick(sums, p->n_group, p->n_group_used, groups);
    for (int i = 0; i < p->n_group_used; i++)
        is_chosen[groups[i]] = true;
    for (int e = 0; e < p->n_expert; e++)
        select[e] = is_chosen[e / len] ? select[e] : -INFINITY;
}

static void weigh(const struct job *j, float *gates, int k)
{
    const struct op_route *p = &j->op->p.route;

    if (p->fn == OP_ROUTE_SOFTMAX_TOPK)
        j->kern->softmax(gates, k);
    if (p->normalize) {
        float sum = 0.0f;
        for (int r = 0; r < k; r++)
            sum += gates[r];
        sum = sum < 0x1p-14f ? 0x1p-14f : sum; /* the smallest normal half: models were trained with this floor */
        for (int r = 0; r < k; r++)
            gates[r] /= sum;
    }
    for (int r = 0; r < k; r++)
        gates[r] *= p->scale;
}

static void route(const struct job *j)
{
    const struct op_route *p = &j->op->p.route;
    int n = p->n_expert;
    float *scores = walk_own(j->w, j->worker), *select = scores;

    for (int i = j->begin; i < j->end; i++) {
        int32_t *ids = tensor_row(j->op->dst[0], i);
        float *gates = tensor_row(j->op->dst[1], i);
        memcpy(scores, src_row(j, 0, i), (size_t)n * sizeof *scores);
        score(j, scores, n);
        if (j->op->w[0] || p->n_group) {
            select = scores + CPU_ROWS_MAX_EXPERTS;
            memcpy(select, scores, (size_t)n * sizeof *scores);
        }
        if (j->op->w[0])
            j->kern->add(scores, j->op->w[0]->data, select, n);
        if (p->n_group)
            choose_groups(p, select);
        pick(select, n, p->k, ids);
        for (int r = 0; r < p->k; r++)
            gates[r] = scores[ids[r]];
        weigh(j, gates, p->k);
    }
}

static void combine(const struct job *j)
{
    int64_t width = j->op->dst[0]->ne[0];
    int k = (int)j->op->src[1]->ne[0];

    for (int i = j->begin; i < j->end; i++) {
        const float *gates = src_row(j, 1, i);
        j->kern->scale(src_row(j, 0, i * k), gates[0], dst_row(j, i), width);
        for (int r = 1; r < k; r++)
            j->kern->axpy(gates[r], src_row(j, 0, i * k + r), dst_row(j, i), width);
    }
}

static void get_rows(const struct job *j)
{
    for (int i = j->begin; i < j->end; i++)
        memcpy(dst_row(j, i), src_row(j, 0, j->w->rows->out_row[i]), (size_t)j->op->dst[0]->ne[0] * sizeof(float));
}

/* The k best of x (n) that are finite: their ids, best first. Gives how many there are. */
static int best_of(const float *x, int64_t n, int32_t *ids, int k)
{
    int n_found = 0;

    for (int32_t i = 0; i < n; i++) {
        if (!isfinite(x[i]) || (n_found == k && !(x[i] > x[ids[k - 1]])))
            continue;
        int at = n_found < k ? n_found++ : k - 1;
        for (; at > 0 && x[i] > x[ids[at - 1]]; at--)
            ids[at] = ids[at - 1];
        ids[at] = i;
    }
    return n_found;
}

static void sort_ids(int32_t *ids, int n)
{
    for (int i = 1; i < n; i++) {
        int32_t id = ids[i];
        int at = i;
        for (; at > 0 && ids[at - 1] > id; at--)
            ids[at] = ids[at - 1];
        ids[at] = id;
    }
}

static void top_k(const struct job *j)
{
    int k = (int)(j->op->dst[0]->ne[0] / 2);

    for (int i = j->begin; i < j->end; i++) {
        const float *x = src_row(j, 0, i);
        int32_t *ids = tensor_row(j->op->dst[0], i), *bits = ids + k;
        int n = best_of(x, j->op->src[0]->ne[0], ids, k);
        sort_ids(ids, n);
        for (int r = 0; r < k; r++) {
            ids[r] = r < n ? ids[r] : -1;
            bits[r] = 0;
            if (r < n)
                memcpy(&bits[r], &x[ids[r]], sizeof *bits);
        }
    }
}

static rows_fn *const fns[OP_N_KIND] = {
    [OP_EMBED] = embed,       [OP_RMS_NORM] = rms_norm,   [OP_ADD] = add,
    [OP_ADD_BIAS] = add_bias, [OP_SCALE] = scale,         [OP_SOFTCAP] = softcap,
    [OP_GLU] = glu,           [OP_GATE] = gate,           [OP_ROPE_TABLE] = rope_table,
    [OP_ROPE] = rope,         [OP_KV_APPEND] = kv_append, [OP_ROUTE] = route,
    [OP_COMBINE] = combine,   [OP_GET_ROWS] = get_rows,   [OP_ATTN_MERGE] = attn_merge,
    [OP_TOP_K] = top_k,       [OP_SPLIT] = split,         [OP_L2_NORM] = l2_norm,
};

void cpu_rows_run(const struct walk *w, int worker, const struct op *op, int begin, int end)
{
    struct job j = {w, w->kern, op, worker, begin, end};
    fns[op->kind](&j);
}
