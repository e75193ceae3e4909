/* Experts of many prompt rows by tensor cores: the order of things and the room between them, as k_moe.cu has them for integer dots.
 * Rows of x are made halves once and looked up by place; products are those of k_gemm.cu. */
#include "cuda/launch.h"

#include "cuda/device.cuh"
#include "cuda/mat.cuh"

/* Where things lie in scratch. */
struct layout {
    uint64_t x_off, x_bytes; /* (n_rows) as halves */
    uint64_t gate_off;       /* (n_place, n_ff) floats */
    uint64_t up_off;         /* the same; then, when gate has both, (n_place) as halves */
    uint64_t h_bytes;
    uint64_t total_bytes;
};

static uint64_t place(struct layout *l, uint64_t bytes)
{
    uint64_t off = l->total_bytes;
    l->total_bytes += (bytes + 255) & ~(uint64_t)255;
    return off;
}

static struct layout layout_of(const struct cu_moe_args *a, uint64_t n_place)
{
    struct layout l = {};
    uint64_t ff_bytes = (uint64_t)a->n_ff * sizeof(float);

    l.x_bytes = cu_half_bytes(a->n_embd);
    l.x_off = place(&l, (uint64_t)a->n_rows * l.x_bytes);
    l.gate_off = place(&l, n_place * ff_bytes);
    l.h_bytes = cu_half_bytes(a->n_ff);
    l.up_off = place(&l, n_place * (ff_bytes > l.h_bytes ? ff_bytes : l.h_bytes));
    return l;
}

uint64_t cu_moe_gemm_scratch_bytes(const struct cu_moe_args *a)
{
    return layout_of(a, (uint64_t)a->n_rows * (uint64_t)a->k).total_bytes;
}

/* n rows of floats, one behind the other, to be made halves. */
static struct cu_act_args halves_of(const struct cu_moe_args *a, const float *x, int n, int64_t width, void *out)
{
    struct cu_act_args h = {};

    h.n_rows = n;
    h.width = width;
    h.x = x;
    h.x_stride = width;
    h.out = out;
    h.out_stride = cu_half_bytes(width);
    h.by_lanes = a->card.has_wgmma;
    return h;
}

/* Gate and up of every place, then act(gate) * up where gate was. */
static cudaError_t hidden(const struct cu_moe_args *a, const struct layout *l, cudaStream_t stream)
{
    char *s = static_cast<char *>(a->scratch);
    float *to[2] = {reinterpret_cast<float *>(s + l->gate_off), reinterpret_cast<float *>(s + l->up_off)};
    struct cu_act_args h = halves_of(a, a->x, a->n_rows, a->n_embd, s + l->x_off);
    h.x_stride = a->x_stride;
    cudaError_t e = cu_half(&h, stream);

    for (int i = CU_GATE; i <= CU_UP && !e; i++) {
        struct cu_mat_args m = cu_mat_of_expert(a, i);
        m.x = s + l->x_off;
        m.x_stride = l->x_bytes;
        m.x_row = a->slot;
        m.x_div = a->k;
        m.dst = to[i];
        m.dst_stride = a->n_ff;
        e = cu_gemm(&m, stream);
    }
    struct cu_row_op op = {};
    struct cu_rows_args *glu = &op.u.rows;
    op.kind = CU_ROW_GLU;
    glu->width = glu->dst_stride = glu->a_stride = glu->b_stride = a->n_ff;
    glu->dst = to[0];
    glu->a = to[0];
    glu->b = to[1];
    glu->act = a->act;
    return e ? e : cu_row_alone(&op, a->n_place, stream);
}

cudaError_t cu_moe_gemm(const struct cu_moe_args *a, cudaStream_t stream)
{
    struct layout l = layout_of(a, (uint64_t)a->n_place);
    char *s = static_cast<char *>(a->scratch);
    struct cu_mat_args m = cu_mat_of_expert(a, CU_DOWN);
    const float *gate = reinterpret_cast<const float *>(s + l.gate_off);
    struct cu_act_args h = halves_of(a, gate, a->n_place, a->n_ff, s + l.up_off);
    cudaError_t e = hidden(a, &l, stream);

    e = e ? e : cu_half(&h, stream);
    m.x = s + l.up_off;
    m.x_stride = l.h_bytes;
    m.dst = a->dst;
    m.dst_stride = a->dst_stride;
    m.dst_row = a->slot;
    return e ? e : cu_gemm(&m, stream);
}
