/* What products of both kinds share: the matrix and the places of a block (launch.h: cu_mat_args), sizes of rows. */
#ifndef FERRY_CUDA_MAT_CUH
#define FERRY_CUDA_MAT_CUH

#include "cuda/device.cuh"
#include "cuda/launch.h"

static inline uint64_t cu_up16(uint64_t bytes)
{
    return (bytes + 15) & ~(uint64_t)15;
}

/* Over a warp: a NaN, compared as integers, is the largest magnitude. */
static __device__ inline float cu_amax_of_warp(float x)
{
    int bits = (int)(cu_bits_of_f32(x) & 0x7fffffff);

    for (int step = 16; step; step /= 2) {
        int other = cu_shfl_xor(bits, step);
        bits = other > bits ? other : bits;
    }
    return cu_f32_of_bits((uint32_t)bits);
}

/* What a block works on: its matrix and its places. */
struct cu_work {
    const uint8_t *w;
    float *dst;
    int64_t dst_stride;
    int n_rows;
    float scale;
    const float *bias; /* (n_rows) or NULL */
    int first, n;      /* places */
};

/* Of tile `tile` (where no tiles are listed: of tile_tok places), with matrix number `which`. */
static __device__ inline struct cu_work cu_work_at(const struct cu_mat_args *a, int tile, int which)
{
    struct cu_work k = {static_cast<const uint8_t *>(a->w),
                        a->dst,
                        a->dst_stride,
                        a->n_rows,
                        1.0f,
                        NULL,
                        tile * a->tile_tok,
                        a->tile_tok};

    for (int i = 0; i < CU_MAT_MORE; i++) /* indexed by what the compiler knows: arguments stay where they are */
        if (which == i + 1) {
            k.w = static_cast<const uint8_t *>(a->more[i].w);
            k.dst = a->more[i].dst;
            k.dst_stride = a->more[i].dst_stride;
            k.n_rows = a->more[i].n_rows;
        }
    int64_t expert = -1; /* of the stack */
    if (a->tiles) {
        struct cu_tile t = a->tiles[tile];
        k.first = t.first;
        k.n = t.n;
        if (a->experts) {
            k.w = static_cast<const uint8_t *>(a->experts[t.expert].w[a->which + which]);
            k.scale = a->experts[t.expert].scale[a->which + which];
            k.bias = a->experts[t.expert].bias[a->which + which];
        } else {
            expert = t.expert;
        }
    } else if (a->ids) {
        expert = a->ids[tile];
        k.n = 1;
    } else {
        if (a->n_heads) {
            const int head_tiles = (a->n_place + a->tile_tok - 1) / a->tile_tok, head = tile / head_tiles;
            k.w += head * a->w_head;
            k.first -= head * head_tiles * a->tile_tok;
            k.n = a->n_place - k.first < k.n ? a->n_place - k.first : k.n;
            k.first = k.first * a->n_heads + head;
        } else if (k.first + k.n > a->n_place) {
            k.n = a->n_place - k.first;
        }
    }
    if (expert >= 0) {
        const struct cu_stack s = which ? a->stack[1] : a->stack[0];
        k.w = static_cast<const uint8_t *>(s.w) + (uint64_t)expert * s.stride;
        k.scale = s.scale ? s.scale[expert] : 1.0f;
        k.bias = s.bias ? s.bias + expert * k.n_rows : NULL;
    }
    k.w = CU_GLOBAL(k.w);
    return k;
}

/* Before cu_work_at: which experts it is about may have been found out by a kernel of this call. */
static __device__ inline void cu_await_ids(const struct cu_mat_args *a)
{
    if (a->ids || a->n_listed)
        cu_await();
}

/* Has the block nothing to do? Grids have blocks for as many tiles as could be; those that there are come first. */
static __device__ inline bool cu_is_unlisted(const struct cu_mat_args *a)
{
    return a->n_listed && (int)blockIdx.y >= *a->n_listed;
}

/* Of a grid of (blocks of a matrix, tiles, matrices). */
static __device__ inline struct cu_work cu_work_of(const struct cu_mat_args *a)
{
    return cu_work_at(a, (int)blockIdx.y, (int)blockIdx.z);
}

/* Number i of a tile's places. */
static __device__ inline int cu_nth_place(const struct cu_mat_args *a, int first, int i)
{
    return first + i + i * a->skip;
}

static __device__ inline const void *cu_x_of(const struct cu_mat_args *a, int place)
{
    int row = a->x_row ? a->x_row[place] : place;
    return static_cast<const char *>(a->x) + (uint64_t)(a->x_div ? row / a->x_div : row) * a->x_stride;
}

/* A product of the matrix's row `row`, times its scale, plus its bias. */
static __device__ inline float cu_finished(float scale, const float *bias, int row, float x)
{
    x = scale != 1.0f ? x * scale : x;
    return bias ? x + bias[row] : x;
}

/* The row of dst. */
static __device__ inline int cu_place_of(const struct cu_mat_args *a, int place)
{
    return a->dst_row ? a->dst_row[place] : place;
}

static __device__ inline float *cu_dst_of(const struct cu_mat_args *a, const struct cu_work *k, int place, int row)
{
    return k->dst + cu_place_of(a, place) * k->dst_stride + row;
}

static __device__ inline void cu_put(const struct cu_mat_args *a, const struct cu_work *k, int place, int row, float x)
{
    *cu_dst_of(a, k, place, row) = cu_finished(k->scale, k->bias, row, x);
}

/* Rows of the matrix that has most. */
static inline int cu_most_rows(const struct cu_mat_args *a)
{
    int most = a->n_rows;
    for (int i = 0; i < a->n_more; i++)
        most = a->more[i].n_rows > most ? a->more[i].n_rows : most;
    return most;
}

static inline unsigned cu_n_tiles(const struct cu_mat_args *a)
{
    int n = (a->n_place + a->tile_tok - 1) / a->tile_tok;
    return (unsigned)(a->tiles ? a->n_tiles : a->n_heads ? n * a->n_heads : n);
}

/* An expert's matrices, in the order of cu_expert.w. */
enum { CU_GATE, CU_UP, CU_DOWN };

/* Products of all listed places with one of their experts' matrices; what is read and written is the caller's to say. */
static inline struct cu_mat_args cu_mat_of_expert(const struct cu_moe_args *a, int which)
{
    struct cu_mat_args m = {};

    m.card = a->card;
    m.books = a->books;
    m.type = a->type[which];
    m.w_stride = a->w_stride[which];
    m.n_cols = which == CU_DOWN ? a->n_ff : a->n_embd;
    m.n_rows = (int)(which == CU_DOWN ? a->n_out : a->n_ff);
    m.n_place = a->n_place;
    m.tile_tok = a->tile_tok;
    m.tiles = a->tiles;
    m.n_tiles = a->n_tiles;
    m.n_listed = a->n_listed;
    m.experts = a->experts;
    m.which = which;
    m.ids = a->ids;
    m.stack[0] = a->stack[which];
    if (which == CU_GATE)
        m.stack[1] = a->stack[CU_UP];
    return m;
}

#endif
