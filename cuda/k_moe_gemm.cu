/* Experts of many prompt rows by tensor cores: the order of things and the room between them, as k_moe.cu has them for integer dots.
 * Rows of x are made halves once and looked up by place; products are those of k_gemm.cu. */
#include "cuda/launch.h"

#include "cuda/device.cuh"

enum { THREADS = 256, GATE = 0, UP = 1, DOWN = 2 };

/* Where things lie in scratch. */
struct layout {
    uint64_t x_off, x_bytes; /* (n_rows) as halves */
    uint64_t row_off;        /* (n_place) slot / k */
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
    l.row_off = place(&l, n_place * sizeof(int32_t));
    l.gate_off = place(&l, n_place * ff_bytes);
    l.h_bytes = cu_half_bytes(a->n_ff);
    l.up_off = place(&l, n_place * (ff_bytes > l.h_bytes ? ff_bytes : l.h_bytes));
    return l;
}

uint64_t cu_moe_gemm_scratch_bytes(const struct cu_moe_args *a)
{
    return layout_of(a, (uint64_t)a->n_rows * (uint64_t)a->k).total_bytes;
}

struct place_rows_args {
    const int32_t *slot;
    int32_t *row;
    int n, k;
};

static __global__ void place_rows(const struct place_rows_args a)
{
    int i = (int)(blockIdx.x * THREADS + threadIdx.x);

    if (i < a.n)
        a.row[i] = a.slot[i] / a.k;
}

static cudaError_t product(const struct cu_moe_args *a, int which, struct cu_mat_args m, cudaStream_t stream)
{
    m.books = a->books;
    m.type = a->type[which];
    m.w_stride = a->w_stride[which];
    m.n_cols = which == DOWN ? a->n_ff : a->n_embd;
    m.n_rows = (int)(which == DOWN ? a->n_out : a->n_ff);
    m.n_place = a->n_place;
    m.tile_tok = a->tile_tok;
    m.tiles = a->tiles;
    m.n_tiles = a->n_tiles;
    m.experts = a->experts;
    m.which = which;
    return cu_gemm(&m, stream);
}

static cudaError_t halves(const float *x, int64_t x_stride, int n, int64_t width, void *out, cudaStream_t stream)
{
    struct cu_act_args h = {};

    h.n_rows = n;
    h.width = width;
    h.x = x;
    h.x_stride = x_stride;
    h.out = out;
    h.out_stride = cu_half_bytes(width);
    return cu_half(&h, stream);
}

/* Gate and up of every place, then act(gate) * up where gate was. */
static cudaError_t hidden(const struct cu_moe_args *a, const struct layout *l, cudaStream_t stream)
{
    char *s = static_cast<char *>(a->scratch);
    float *to[2] = {reinterpret_cast<float *>(s + l->gate_off), reinterpret_cast<float *>(s + l->up_off)};
    struct cu_mat_args m = {};
    cudaError_t e = halves(a->x, a->x_stride, a->n_rows, a->n_embd, s + l->x_off, stream);

    m.x = s + l->x_off;
    m.x_stride = l->x_bytes;
    m.x_row = reinterpret_cast<const int32_t *>(s + l->row_off);
    m.dst_stride = a->n_ff;
    for (int i = GATE; i <= UP && !e; i++) {
        m.dst = to[i];
        e = product(a, i, m, stream);
    }
    struct cu_rows_args glu = {};
    glu.n = a->n_place;
    glu.width = glu.dst_stride = glu.a_stride = glu.b_stride = a->n_ff;
    glu.dst = to[0];
    glu.a = to[0];
    glu.b = to[1];
    glu.act = a->act;
    return e ? e : cu_glu(&glu, stream);
}

cudaError_t cu_moe_gemm(const struct cu_moe_args *a, cudaStream_t stream)
{
    struct layout l = layout_of(a, (uint64_t)a->n_place);
    char *s = static_cast<char *>(a->scratch);
    struct place_rows_args rows = {a->slot, reinterpret_cast<int32_t *>(s + l.row_off), a->n_place, a->k};
    struct cu_mat_args m = {};
    cudaError_t e =
        CU_LAUNCH((place_rows), dim3((unsigned)((a->n_place + THREADS - 1) / THREADS)), dim3(THREADS), 0, stream, rows);

    e = e ? e : hidden(a, &l, stream);
    if (!e)
        e = halves(reinterpret_cast<const float *>(s + l.gate_off), a->n_ff, a->n_place, a->n_ff, s + l.up_off, stream);
    m.x = s + l.up_off;
    m.x_stride = l.h_bytes;
    m.dst = a->dst;
    m.dst_stride = a->dst_stride;
    m.dst_row = a->slot;
    return e ? e : product(a, DOWN, m, stream);
}
