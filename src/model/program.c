/* Lowers a family's list of ops into struct op with shapes, and lays its activations out in one arena. */
#include "src/model/program.h"

#include <inttypes.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

/* Registers start at cache lines, so that no two workers write into one. */
#define REG_ALIGN 64

struct lower {
    struct program *p;
    const struct model *m;
    int cap_ops, cap_views;
    const struct op_attn *attn;     /* (n_layer) */
    int width[ARCH_N_REG];          /* of what a register holds now; 0: nothing yet */
    uint64_t reg_bytes[ARCH_N_REG]; /* the most it ever holds */
};

static int64_t reg_rows(const struct lower *lo, enum arch_reg reg)
{
    if (reg == ARCH_OUT || reg == ARCH_LOGITS || reg == ARCH_TOP)
        return lo->p->n_out;
    if (reg == ARCH_Y)
        return (int64_t)lo->p->n_rows * lo->m->hp.n_expert_used;
    return lo->p->n_rows;
}

/* The view of a register with its present width; made once per (register, width). */
static struct tensor *view_of(struct lower *lo, enum arch_reg reg)
{
    struct program *p = lo->p;
    for (int i = 0; i < p->n_views; i++)
        if (p->view_reg[i] == reg && p->views[i].ne[0] == lo->width[reg])
            return &p->views[i];
    if (p->n_views == lo->cap_views)
        return NULL;
    struct tensor *t = &p->views[p->n_views];
    *t = tensor_make(reg == ARCH_IDS || reg == ARCH_TOP ? QUANT_I32 : QUANT_F32, lo->width[reg], reg_rows(lo, reg), 1,
                     NULL);
    p->view_reg[p->n_views++] = reg;
    uint64_t bytes = tensor_bytes(t);
    if (bytes > lo->reg_bytes[reg])
        lo->reg_bytes[reg] = bytes;
    return t;
}

/* The rope table of a layer's kind stands for ARCH_ROPE0. */
static enum arch_reg real_reg(const struct lower *lo, enum arch_reg reg, int layer)
{
    return reg == ARCH_ROPE0 && layer >= 0 && lo->m->layers[layer].window > 0 ? ARCH_ROPE1 : reg;
}

static int weight_index(const struct lower *lo, enum role role, int layer)
{
    if (role == ROLE_NONE)
        return -1;
    int w = layer >= 0 ? lo->m->layers[layer].w[role] : -1;
    return w >= 0 ? w : lo->m->w[role];
}

/* Of a head of MATMUL_HEADS' results: queries and keys have a rotated part behind what is multiplied. */
static int head_width(const struct hparams *hp, enum arch_reg dst, const struct tensor *w)
{
    return dst == ARCH_QL || dst == ARCH_K ? hp->head_dim_k : (int)w->ne[1];
}

static bool is_head(const struct model *m, int64_t width)
{
    return width == m->hp.head_dim_k || (m->hp.delta.n_conv && width == m->hp.delta.head_dim_v);
}

/* How a row is cut: two vectors of each head, or what older files of qwen3next have of each key head. */
static struct op_split split_of(const struct lower *lo, enum role w, int layer)
{
    const struct hparams *hp = &lo->m->hp;
    const struct model_delta *d = &hp->delta;
    const int n_share = d->n_conv ? d->n_head_v / d->n_head_k : 0, n_value = n_share * d->head_dim_v;

    if (w == ROLE_DELTA_QKVZ)
        return (struct op_split){d->n_head_k, 4, {d->head_dim_k, d->head_dim_k, n_value, n_value}, {0, 0, 0, 1}};
    if (w == ROLE_DELTA_BA)
        return (struct op_split){d->n_head_k, 2, {n_share, n_share}, {0, 1}};
    return (struct op_split){lo->m->layers[layer].n_head, 2, {hp->head_dim_k, hp->head_dim_k}, {0, 1}};
}

static int split_width(const struct op_split *p, int dst)
{
    int width = 0;

    for (int i = 0; i < p->n_parts; i++)
        width += p->to[i] == dst ? p->len[i] * p->n_groups : 0;
    return width;
}

/* What the op's results are wide, from its sources and weights; 0 when they do not fit together. */
static int dst_width(const struct lower *lo, const struct arch_op *a, int i, int src_width, const struct tensor *w,
                     int layer)
{
    const struct hparams *hp = &lo->m->hp;
    switch (a->kind) {
    case OP_MATMUL:
        return w && w->ne[0] == src_width ? (int)w->ne[1] : 0;
    case OP_MATMUL_HEADS:
        return w ? lo->m->layers[layer].n_head * head_width(hp, a->dst[i], w) : 0;
    case OP_ROPE:
        return a->dst[i] == a->src[0] ? src_width : lo->m->layers[layer].n_head * hp->head_dim_k;
    case OP_RMS_NORM:
        /* over the whole row, head by head, or what is compressed of it */
        return w && (w->ne[0] == src_width || (is_head(lo->m, w->ne[0]) && src_width % w->ne[0] == 0) ||
                     (hp->n_lora_kv && w->ne[0] + hp->n_rot == src_width))
                   ? src_width
                   : 0;
    case OP_ADD_BIAS:
        return w && w->ne[0] == src_width ? src_width : 0;
    case OP_ADD:
    case OP_GLU:
        return lo->width[a->src[1]] == src_width ? src_width : 0;
    case OP_ATTENTION:
        return lo->m->layers[layer].n_head * hp->head_dim_v;
    case OP_SPLIT: {
        const struct op_split p = split_of(lo, a->when, layer);
        return split_width(&p, 0) + split_width(&p, 1) == src_width ? split_width(&p, i) : 0;
    }
    case OP_CONV:
        return w && w->ne[1] == src_width ? src_width : 0;
    case OP_DELTA_NET:
        return hp->delta.n_head_v * hp->delta.head_dim_v;
    case OP_ROUTE:
        return src_width == hp->n_expert && i < 2 ? hp->n_expert_used : 0;
    case OP_MOE:
    case OP_COMBINE:
        return hp->n_embd;
    case OP_TOP_K:
        return 2 * DEVICE_MAX_TOP_K;
    default:
        return src_width;
    }
}

/* Layers before it are the host's: the span itself, or those before it. */
static int first_of_device(const struct model *m, struct model_span span)
{
    return span.end < m->hp.n_layer ? span.end : span.first;
}

static void set_params(const struct lower *lo, const struct arch_op *a, struct op *op, int layer, int src_width)
{
    const struct hparams *hp = &lo->m->hp;
    const bool is_in_place = a->dst[0] == a->src[0];
    switch (op->kind) {
    case OP_EMBED:
        op->p.scale.f = hp->embd_scale;
        break;
    case OP_RMS_NORM:
        op->p.norm.eps = hp->norm_eps;
        break;
    case OP_GLU:
        op->p.glu.act = hp->act;
        break;
    case OP_SCALE:
        op->p.scale.f = op->w[0] ? 1.0f : hp->residual_scale;
        break;
    case OP_ROPE:
        op->p.rope = (struct op_rope){.n_head = is_in_place ? src_width / hp->head_dim_k : lo->m->layers[layer].n_head,
                                      .head_dim = hp->head_dim_k,
                                      .n_rot = hp->n_rot,
                                      .neox = hp->rope_neox,
                                      .at_end = hp->n_lora_kv > 0,
                                      .from_one = a->src[0] == ARCH_LATENT && !is_in_place};
        break;
    case OP_MATMUL_HEADS:
        op->p.heads = (struct op_heads){lo->m->layers[layer].n_head, a->src[0] == ARCH_LATENT};
        break;
    case OP_KV_APPEND:
    case OP_ATTENTION:
        op->p.attn = lo->attn[layer]; /* group and offsets */
        op->p.attn.n_head = lo->m->layers[layer].n_head;
        op->p.attn.n_head_kv = lo->m->layers[layer].n_head_kv;
        op->p.attn.head_dim_k = hp->head_dim_k;
        op->p.attn.head_dim_v = hp->head_dim_v;
        op->p.attn.scale = hp->attn_scale;
        op->p.attn.softcap = hp->attn_softcap;
        op->p.attn.window = lo->m->layers[layer].window;
        op->p.attn.kv_type = lo->p->kv.type;
        break;
    case OP_SPLIT:
        op->p.split = split_of(lo, a->when, layer);
        break;
    case OP_L2_NORM:
        op->p.l2 = (struct op_l2){2 * hp->delta.n_head_k, hp->delta.head_dim_k, hp->norm_eps};
        break;
    case OP_CONV:
        op->p.conv.off = model_kv_record_off(lo->m, layer, first_of_device(lo->m, lo->p->span));
        break;
    case OP_DELTA_NET:
        op->p.delta = (struct op_delta){.n_head_k = hp->delta.n_head_k,
                                        .n_head_v = hp->delta.n_head_v,
                                        .head_dim_k = hp->delta.head_dim_k,
                                        .head_dim_v = hp->delta.head_dim_v,
                                        .is_tiled = lo->m->arch->is_tiled,
                                        .off = model_kv_record_off(lo->m, layer, first_of_device(lo->m, lo->p->span)) +
                                               model_kv_conv_bytes(lo->m)};
        break;
    case OP_ROUTE:
        op->p.route = (struct op_route){.n_expert = hp->n_expert,
                                        .k = hp->n_expert_used,
                                        .fn = hp->route_fn,
                                        .normalize = hp->route_normalize,
                                        .scale = hp->route_scale,
                                        .n_group = hp->n_group,
                                        .n_group_used = hp->n_group_used};
        break;
    case OP_MOE:
        op->p.moe = (struct op_moe){.k = hp->n_expert_used, .act = hp->act};
        break;
    default:
        break;
    }
}

/* Append one op; its parameters beyond set_params are the caller's to fill in. */
static int lower_op(struct lower *lo, const struct arch_op *a, int layer, enum op_rows rows, struct op **out)
{
    struct program *p = lo->p;
    if (p->n_ops == lo->cap_ops)
        return err(ERR_LIMIT, "program: more than %d ops", lo->cap_ops);
    struct op *op = &p->ops[p->n_ops];
    *op = (struct op){.kind = a->kind, .rows = rows, .layer = layer};

    int src_width = 0;
    for (int i = 0; i < OP_MAX_IO && a->src[i] != ARCH_NONE; i++) {
        enum arch_reg reg = real_reg(lo, a->src[i], layer);
        if (i == 0)
            src_width = lo->width[reg];
        if (!(op->src[i] = view_of(lo, reg)))
            return err(ERR_LIMIT, "program: more than %d activations", lo->cap_views);
    }
    for (int i = 0; i < OP_MAX_IO; i++) {
        int w = weight_index(lo, a->w[i], layer);
        if (w >= 0)
            op->w[i] = &p->weights[w], op->n_w = i + 1;
    }
    set_params(lo, a, op, layer, src_width);
    for (int i = 0; i < OP_MAX_IO && a->dst[i] != ARCH_NONE; i++) {
        if (a->kind != OP_EMBED && a->kind != OP_ROPE_TABLE)
            lo->width[a->dst[i]] = dst_width(lo, a, i, src_width, op->w[i], layer);
        if (lo->width[a->dst[i]] <= 0)
            return err(ERR_FORMAT, "layer %d: shapes of %s do not fit: row of %d, weight %s", layer,
                       device_op_name(a->kind), src_width,
                       weight_index(lo, a->w[i], layer) >= 0 ? lo->m->weights[weight_index(lo, a->w[i], layer)].name
                                                             : "-");
        if (!(op->dst[i] = view_of(lo, a->dst[i])))
            return err(ERR_LIMIT, "program: more than %d activations", lo->cap_views);
    }
    p->n_ops++;
    p->n_moe += a->kind == OP_MOE;
    if (out)
        *out = op;
    return 0;
}

static int lower_head(struct lower *lo)
{
    const struct model *m = lo->m;
    int rc = 0;
    lo->width[ARCH_X] = m->hp.n_embd;
    lo->p->x = view_of(lo, ARCH_X);
    if (lo->p->span.first == 0)
        rc = lower_op(lo, &(struct arch_op){.kind = OP_EMBED, .dst = {ARCH_X}, .w = {ROLE_TOKEN_EMBD}}, -1, OP_ROWS_ALL,
                      NULL);
    for (int kind = 0; rc == 0 && kind < 2; kind++) {
        if (!m->rope[kind].freq)
            continue;
        enum arch_reg reg = kind ? ARCH_ROPE1 : ARCH_ROPE0;
        struct op *op;
        lo->width[reg] = m->hp.n_rot;
        rc = lower_op(lo, &(struct arch_op){.kind = OP_ROPE_TABLE, .dst = {reg}}, -1, OP_ROWS_ALL, &op);
        if (rc == 0)
            op->p.rope_table = (struct op_rope_table){.freq = m->rope[kind].freq, .mscale = m->rope[kind].mscale};
    }
    return rc;
}

static int lower_layer(struct lower *lo, int layer)
{
    const struct arch *arch = lo->m->arch;
    bool is_recurrent = lo->m->layers[layer].is_recurrent;
    const struct arch_op *ops = is_recurrent ? arch->recurrent : arch->layer;
    int n_ops = is_recurrent ? arch->n_recurrent_ops : arch->n_layer_ops;
    for (int i = 0; i < n_ops; i++) {
        const struct arch_op *a = &ops[i];
        if (a->when != ROLE_NONE && lo->m->layers[layer].w[a->when] < 0)
            continue;
        if (a->kind == OP_ROPE && lo->m->layers[layer].is_unrotated)
            continue;
        int rc = lower_op(lo, a, layer, OP_ROWS_ALL, NULL);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* The op is made like others, then taken out of the list. */
static int lower_hidden(struct lower *lo)
{
    static const struct arch_op norm = ARCH_NORM(ARCH_X, ARCH_X, ROLE_OUTPUT_NORM);
    struct op *op;
    int rc = lower_op(lo, &norm, -1, OP_ROWS_ALL, &op);

    if (rc < 0)
        return rc;
    lo->p->hidden = *op;
    *op = (struct op){0};
    lo->p->n_ops--;
    return 0;
}

static int lower_scale(struct lower *lo, enum op_kind kind, float f)
{
    struct op *op;
    int rc =
        lower_op(lo, &(struct arch_op){.kind = kind, .dst = {ARCH_LOGITS}, .src = {ARCH_LOGITS}}, -1, OP_ROWS_OUT, &op);
    if (rc == 0)
        op->p.scale.f = f;
    return rc;
}

static int lower_tail(struct lower *lo, bool has_top)
{
    const struct hparams *hp = &lo->m->hp;
    static const struct arch_op tail[] = {
        {.kind = OP_GET_ROWS, .dst = {ARCH_OUT}, .src = {ARCH_X}},
        ARCH_NORM(ARCH_OUT, ARCH_OUT, ROLE_OUTPUT_NORM),
        {.kind = OP_MATMUL, .dst = {ARCH_LOGITS}, .src = {ARCH_OUT}, .w = {ROLE_OUTPUT}},
    };
    static const struct arch_op bias = ARCH_BIAS_IF(ARCH_LOGITS, ROLE_OUTPUT_BIAS);
    static const struct arch_op top = {.kind = OP_TOP_K, .dst = {ARCH_TOP}, .src = {ARCH_LOGITS}};
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < sizeof tail / sizeof *tail; i++)
        rc = lower_op(lo, &tail[i], -1, OP_ROWS_OUT, NULL);
    if (rc == 0 && lo->m->w[ROLE_OUTPUT_BIAS] >= 0)
        rc = lower_op(lo, &bias, -1, OP_ROWS_OUT, NULL);
    if (rc == 0 && hp->logit_scale != 1.0f)
        rc = lower_scale(lo, OP_SCALE, hp->logit_scale);
    if (rc == 0 && hp->logit_softcap != 0.0f)
        rc = lower_scale(lo, OP_SOFTCAP, hp->logit_softcap);
    if (rc == 0)
        lo->p->logits = view_of(lo, ARCH_LOGITS);
    if (rc == 0 && has_top)
        rc = lower_op(lo, &top, -1, OP_ROWS_OUT, &lo->p->top);
    return rc;
}

static void lay_out(struct lower *lo)
{
    uint64_t off = 0;
    for (int reg = 0; reg < ARCH_N_REG; reg++) {
        lo->p->reg_off[reg] = off;
        off += size_up(lo->reg_bytes[reg], REG_ALIGN);
    }
    lo->p->arena_bytes = off;
}

static int lower(struct lower *lo, bool has_top)
{
    const struct model_span span = lo->p->span;
    bool is_last = span.end == lo->m->hp.n_layer;
    int rc = lower_head(lo);
    for (int layer = span.first; rc == 0 && layer < span.end; layer++)
        rc = lower_layer(lo, layer);
    if (rc == 0 && is_last)
        rc = lower_tail(lo, has_top);
    if (rc == 0 && is_last)
        rc = lower_hidden(lo);
    if (rc == 0)
        lay_out(lo);
    return rc;
}

int program_make(const struct program_args *args, struct program **out)
{
    const struct model *m = args->model;
    const int n_layer = m->hp.n_layer;
    if (args->n_rows < 1 || args->n_out < 1 || args->n_out > args->n_rows)
        return err(ERR_ARG, "a step of %d rows with %d rows of logits", args->n_rows, args->n_out);

    const int n_layer_ops =
        m->arch->n_recurrent_ops > m->arch->n_layer_ops ? m->arch->n_recurrent_ops : m->arch->n_layer_ops;
    struct lower lo = {.m = m, .cap_ops = n_layer * n_layer_ops + 12, .cap_views = 2 * ARCH_N_REG + 4 * n_layer};
    struct program *p = lo.p = mem_zalloc(1, sizeof *p, MEM_META);
    struct op_attn *attn = mem_zalloc((size_t)n_layer, sizeof *attn, MEM_META);
    lo.attn = attn;
    int rc = 0;
    if (p) {
        p->model = m;
        p->span = args->span.end ? args->span : model_all(m);
        p->n_rows = args->n_rows;
        p->n_out = args->n_out;
        p->ops = mem_zalloc((size_t)lo.cap_ops, sizeof *p->ops, MEM_META);
        p->views = mem_zalloc((size_t)lo.cap_views, sizeof *p->views, MEM_META);
        p->view_reg = mem_zalloc((size_t)lo.cap_views, sizeof *p->view_reg, MEM_META);
        p->weights = mem_zalloc((size_t)m->n_weights, sizeof *p->weights, MEM_META);
    }
    if (!p || !attn || !p->ops || !p->views || !p->view_reg || !p->weights) {
        rc = err(ERR_NOMEM, "program of %d ops", lo.cap_ops);
        goto out;
    }
    for (int i = 0; i < m->n_weights; i++)
        p->weights[i] = m->weights[i].t;
    rc = model_kv_shape(m, args->kv_type, first_of_device(m, p->span), &p->kv, attn);
    if (rc == 0)
        rc = lower(&lo, args->has_top);
out:
    mem_free(attn);
    if (rc < 0) {
        program_free(p);
        p = NULL;
    }
    *out = p;
    return rc;
}

void program_free(struct program *p)
{
    if (!p)
        return;
    mem_free(p->weights);
    mem_free(p->view_reg);
    mem_free(p->views);
    mem_free(p->ops);
    mem_free(p);
}

void program_bind_arena(struct program *p, void *arena)
{
    for (int i = 0; i < p->n_views; i++)
        p->views[i].data = (char *)arena + p->reg_off[p->view_reg[i]];
}

void program_host_bytes(const struct program *p, struct program_host *out)
{
    *out = (struct program_host){.x_bytes = 0};
    for (int i = 0; i < p->n_ops; i++) {
        const struct op *op = &p->ops[i];
        if (op->kind != OP_MOE)
            continue;
        *out = (struct program_host){.x_bytes = tensor_bytes(op->src[0]),
                                     .ids_bytes = tensor_bytes(op->src[1]),
                                     .y_bytes = tensor_bytes(op->dst[0])};
        return; /* all layers' are alike: they share the registers */
    }
}
