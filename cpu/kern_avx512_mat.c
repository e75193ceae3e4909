/* AVX-512 matmul: the two tables, and the walk over tiles (kern_avx512_mat.h). */
#include "cpu/kern_avx512_mat.h"

/* Columns packed at a time: of 32 rows they take half of a first-level cache of 32 KiB, beside the activations. With few
 * tokens a tile is read once or twice, and the smaller the sooner. */
#define CHUNK_COLS 512
#define CHUNK_COLS_FEW 256
#define FEW_TOK 4
#define TILE_ROWS 32

_Static_assert(2 * (CHUNK_COLS / 32) * sizeof(struct avx512_t32) <= KERN_MAT_SCRATCH_BYTES, "packed tile");
_Static_assert(2 * (CHUNK_COLS / 256) * sizeof(struct avx512_t256) <= KERN_MAT_SCRATCH_BYTES, "packed tile");

struct walk {
    const struct kern_mat_args *a;
    const struct avx512_type *type;
    avx512_run *const *run; /* by size */
    int row, n_rows;        /* of this tile, at most 32 */
    int64_t col;
    int n_cols; /* of this chunk */
    int tile_cols;
    size_t group_bytes;
};

static void pack_chunk(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    for (int group = 0; group * 16 < w->n_rows; group++) {
        struct avx512_pack p = {.col = w->col, .n_cols = w->n_cols, .ahead = TILE_ROWS * (int64_t)a->w_stride};
        p.tile = (char *)a->scratch + (size_t)group * w->group_bytes;
        for (int r = 0; r < 16; r++) {
            int row = group * 16 + r < w->n_rows ? group * 16 + r : w->n_rows - 1;
            p.row[r] = (const uint8_t *)a->w + (uint64_t)(w->row + row) * a->w_stride;
        }
        w->type->pack(&p);
    }
}

/* All tokens times the packed chunk. */
static void multiply_chunk(const struct walk *w)
{
    const struct kern_mat_args *a = w->a;
    struct avx512_step s = {.n_block = w->n_cols / w->tile_cols, .col = w->col, .n_cols = a->n_cols};
    bool is_pair = w->n_rows > 16; /* else the second group is the first again, and nothing of it is stored */
    s.off = w->type->off;
    s.tile[0] = a->scratch;
    s.tile[1] = (const char *)a->scratch + (is_pair ? w->group_bytes : 0);
    s.mask[0] = is_pair ? 0xffff : (uint16_t)((1u << w->n_rows) - 1);
    s.mask[1] = is_pair ? (uint16_t)((1u << (w->n_rows - 16)) - 1) : 0;
    s.acc_stride = a->dst_stride;
    s.is_first = w->col == 0;
    for (int tok = 0, n_tok; tok < a->n_tok; tok += n_tok) {
        int left = a->n_tok - tok, size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        n_tok = 1 << size;
        for (int t = 0; t < n_tok; t++)
            s.x[t] = (const char *)a->x + (uint64_t)(tok + t) * a->x_stride;
        s.acc = a->dst + tok * a->dst_stride + w->row;
        w->run[size](&s);
    }
}

static void run_tiles(const struct kern_mat_args *a, enum quant_type type, avx512_run *const run[][AVX512_N_SIZE])
{
    struct walk w = {.a = a, .type = &kern_avx512_pack[type]};
    bool is_t256 = quant_info((int)type)->act == QUANT_ACT_Q8X256;
    int chunk = a->n_tok <= FEW_TOK ? CHUNK_COLS_FEW : CHUNK_COLS;
    w.run = run[w.type->form];
    w.tile_cols = is_t256 ? 256 : 32;
    w.group_bytes = (size_t)(chunk / w.tile_cols) * (is_t256 ? sizeof(struct avx512_t256) : sizeof(struct avx512_t32));
    for (w.row = 0; w.row < a->n_rows; w.row += TILE_ROWS) {
        w.n_rows = a->n_rows - w.row < TILE_ROWS ? a->n_rows - w.row : TILE_ROWS;
        for (w.col = 0; w.col < a->n_cols; w.col += chunk) {
            w.n_cols = (int)(a->n_cols - w.col < chunk ? a->n_cols - w.col : chunk);
            pack_chunk(&w);
            multiply_chunk(&w);
        }
    }
}

static void mat_int(const struct kern_mat_args *a, enum quant_type type)
{
    if (a->n_tok == 1 && kern_avx512_vec[type])
        kern_avx512_vec[type](a);
    else
        run_tiles(a, type, kern_avx512_run);
}

static void mat_int_vnni(const struct kern_mat_args *a, enum quant_type type)
{
    if (a->n_tok == 1 && kern_avx512vnni_vec[type])
        kern_avx512vnni_vec[type](a);
    else
        run_tiles(a, type, kern_avx512vnni_run);
}

/* clang-format off */
#define INT_TYPES(X)                                                                                                  \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(IQ4_NL) X(MXFP4) X(NVFP4) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K)       \
    X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M) X(IQ4_XS) X(TQ1_0) X(TQ2_0)
/* clang-format on */

#define INT_FN(NAME)                                       \
    static void mat_##NAME(const struct kern_mat_args *a)  \
    {                                                      \
        mat_int(a, QUANT_##NAME);                          \
    }                                                      \
    static void vnni_##NAME(const struct kern_mat_args *a) \
    {                                                      \
        mat_int_vnni(a, QUANT_##NAME);                     \
    }
INT_TYPES(INT_FN)

/* clang-format off */
#define FLOAT_ENTRIES                   \
    [QUANT_F32] = kern_avx512_mat_f32,  \
    [QUANT_F16] = kern_avx512_mat_f16,  \
    [QUANT_BF16] = kern_avx512_mat_bf16,
#define MAT_ENTRY(NAME) [QUANT_##NAME] = mat_##NAME,
#define VNNI_ENTRY(NAME) [QUANT_##NAME] = vnni_##NAME,

kern_mat *const kern_avx512_mat_table[QUANT_ID_END] = {FLOAT_ENTRIES INT_TYPES(MAT_ENTRY)};
kern_mat *const kern_avx512vnni_mat_table[QUANT_ID_END] = {FLOAT_ENTRIES INT_TYPES(VNNI_ENTRY)};
/* clang-format on */
