/* Experts: rows grouped by expert, so that each weight is read once for up to CU_GEMV_TOK of them. The matrices are those of
 * k_matmul.cu; here is the order of things and the room between them. */
#include "cuda/launch.h"

#include "cuda/device.cuh"
#include "cuda/mat.cuh"

enum { N_FORM = 4 };

/* Where things lie in scratch. */
struct layout {
    uint64_t x_off[N_FORM],
        x_bytes[N_FORM];       /* (n_rows) in each form that gate and up read; 0: not used, or floats, as x is */
    uint64_t gate_off, up_off; /* (n_slots, n_ff) floats, by place */
    uint64_t h_off, h_bytes;   /* (n_slots) in the form that down reads */
    uint64_t total_bytes;
};

static uint64_t place(struct layout *l, uint64_t bytes)
{
    uint64_t off = l->total_bytes;
    l->total_bytes += (bytes + 255) & ~(uint64_t)255;
    return off;
}

static enum quant_act form_of(enum quant_type type)
{
    return quant_info((int)type)->act;
}

static struct layout layout_of(const struct cu_moe_args *a)
{
    struct layout l = {};
    uint64_t n_slots = (uint64_t)a->n_rows * (uint64_t)a->k, ff_bytes = (uint64_t)a->n_ff * sizeof(float);

    for (int i = CU_GATE; i <= CU_UP; i++) {
        enum quant_act form = form_of(a->type[i]);
        if (form == QUANT_ACT_F32 || l.x_bytes[form])
            continue;
        l.x_bytes[form] = cu_act_bytes(form, a->n_embd);
        l.x_off[form] = place(&l, (uint64_t)a->n_rows * l.x_bytes[form]);
    }
    l.gate_off = place(&l, n_slots * ff_bytes);
    l.up_off = place(&l, n_slots * ff_bytes);
    l.h_bytes = cu_act_bytes(form_of(a->type[CU_DOWN]), a->n_ff);
    l.h_off = place(&l, n_slots * l.h_bytes);
    return l;
}

uint64_t cu_moe_scratch_bytes(const struct cu_moe_args *a)
{
    return layout_of(a).total_bytes;
}

/* Can one launch multiply with gate and up? */
static bool has_both_at_once(const struct cu_moe_args *a)
{
    return a->type[CU_GATE] == a->type[CU_UP] && a->w_stride[CU_GATE] == a->w_stride[CU_UP];
}

/* Gate and up of every place: at once where one launch can do both. */
static cudaError_t gate_and_up(const struct cu_moe_args *a, const struct layout *l, cudaStream_t stream)
{
    char *s = static_cast<char *>(a->scratch);
    float *to[2] = {reinterpret_cast<float *>(s + l->gate_off), reinterpret_cast<float *>(s + l->up_off)};
    bool at_once = has_both_at_once(a);
    cudaError_t e = cudaSuccess;

    for (int i = CU_GATE; i <= (at_once ? CU_GATE : CU_UP) && !e; i++) {
        struct cu_mat_args m = cu_mat_of_expert(a, i);
        enum quant_act form = form_of(a->type[i]);
        m.x = form == QUANT_ACT_F32 ? static_cast<const void *>(a->x) : s + l->x_off[form];
        m.x_stride = form == QUANT_ACT_F32 ? (uint64_t)a->x_stride * sizeof(float) : l->x_bytes[form];
        m.x_row = a->slot;
        m.x_div = a->k;
        m.dst = to[i];
        m.dst_stride = a->n_ff;
        m.n_more = at_once;
        m.more[0] = {NULL, to[CU_UP], m.dst_stride, m.n_rows};
        e = cu_gemv(&m, stream);
    }
    return e;
}

/* act(gate) * up in the form that down reads, times down. */
static cudaError_t down(const struct cu_moe_args *a, const struct layout *l, cudaStream_t stream)
{
    char *s = static_cast<char *>(a->scratch);
    struct cu_act_args h = {};
    struct cu_mat_args m = cu_mat_of_expert(a, CU_DOWN);

    h.act = form_of(a->type[CU_DOWN]);
    h.n_rows = a->n_place;
    h.width = h.x_stride = a->n_ff;
    h.x = reinterpret_cast<const float *>(s + l->gate_off);
    h.up = reinterpret_cast<const float *>(s + l->up_off);
    h.glu = a->act;
    h.out = s + l->h_off;
    h.out_stride = l->h_bytes;
    cudaError_t e = cu_act(&h, stream);
    m.x = h.out;
    m.x_stride = h.out_stride;
    m.dst = a->dst;
    m.dst_stride = a->dst_stride;
    m.dst_row = a->slot;
    return e ? e : cu_gemv(&m, stream);
}

/* Rows of floats for a product: codes of blocks of 256 the kernel makes by itself, which is soon done, where two such rows leave half of
 * what a block may have to weights (a block's sets may be of two experts); others are made first, at `out`. */
static cudaError_t give_rows(struct cu_mat_args *m, const float *x, int n_rows, void *out, cudaStream_t stream)
{
    struct cu_act_args code = {};

    code.act = form_of(m->type);
    code.n_rows = n_rows;
    code.width = code.x_stride = m->n_cols;
    code.x = x;
    code.out = out;
    code.out_stride = cu_act_bytes(code.act, code.width);
    if (code.act == QUANT_ACT_Q8X256 && 4 * code.out_stride <= cu_gemv_most_bytes(&m->card)) {
        m->code = code;
        return cudaSuccess;
    }
    m->x = out;
    m->x_stride = code.out_stride;
    return cu_act(&code, stream);
}

/* Of a single row: what gate and up give becomes act(gate) * up before it leaves the kernel. */
static cudaError_t one_row(const struct cu_moe_args *a, const struct layout *l, cudaStream_t stream)
{
    char *s = static_cast<char *>(a->scratch);
    float *h = reinterpret_cast<float *>(s + l->gate_off);
    struct cu_mat_args up = cu_mat_of_expert(a, CU_GATE), down = cu_mat_of_expert(a, CU_DOWN);

    up.dst = h;
    up.dst_stride = a->n_ff;
    up.n_more = 1;
    up.more[0] = {NULL, h, a->n_ff, up.n_rows};
    up.is_glu = true;
    up.glu = a->act;
    cudaError_t e = give_rows(&up, a->x, 1, s + l->x_off[form_of(up.type)], stream);
    up.x_stride = 0; /* all places read the one row */
    if (!e)
        e = cu_gemv(&up, stream);
    down.dst = a->dst;
    down.dst_stride = a->dst_stride;
    down.dst_row = a->slot;
    if (!e)
        e = give_rows(&down, h, a->n_place, s + l->h_off, stream);
    return e ? e : cu_gemv(&down, stream);
}

static bool is_one_row(const struct cu_moe_args *a)
{
    for (int i = 0; i < 3; i++)
        if (form_of(a->type[i]) == QUANT_ACT_F32)
            return false;
    return a->n_rows == 1 && a->tile_tok == 1 && has_both_at_once(a) && a->lie_alike;
}

int cu_moe_forms(const struct cu_moe_args *a, struct cu_act_args form[CU_MOE_FORMS])
{
    const struct layout l = layout_of(a);
    int n = 0;

    for (int f = 0; f < N_FORM && !is_one_row(a); f++) {
        if (!l.x_bytes[f])
            continue;
        struct cu_act_args x = {};
        x.act = (enum quant_act)f;
        x.n_rows = a->n_rows;
        x.width = a->n_embd;
        x.x = a->x;
        x.x_stride = a->x_stride;
        x.out = static_cast<char *>(a->scratch) + l.x_off[f];
        x.out_stride = l.x_bytes[f];
        form[n++] = x;
    }
    return n;
}

cudaError_t cu_moe(const struct cu_moe_args *a, cudaStream_t stream)
{
    const struct layout l = layout_of(a);

    if (is_one_row(a))
        return one_row(a, &l, stream);
    cudaError_t e = gate_and_up(a, &l, stream);
    return e ? e : down(a, &l, stream);
}
