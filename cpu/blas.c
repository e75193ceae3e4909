/* Owns every call to OpenBLAS. Weights are dequantized tile by tile into scratch; the order of additions over columns is
 * that of the column tiles, and inside one whatever the library's kernel for the one fixed shape does. */
#include "cpu/blas.h"

#include <cblas.h>
#include <stdbool.h>
#include <string.h>

struct tiles {
    float *x, *w, *y; /* (BLAS_TOK, BLAS_COLS), (BLAS_ROWS, BLAS_COLS), (BLAS_TOK, BLAS_ROWS) */
};

static struct tiles tiles_in(void *scratch)
{
    struct tiles t;
    t.x = scratch;
    t.w = t.x + BLAS_TOK * BLAS_COLS;
    t.y = t.w + BLAS_ROWS * BLAS_COLS;
    return t;
}

static void multiply(const float *x, int64_t x_stride, const struct tiles *t, float beta)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, BLAS_TOK, BLAS_ROWS, BLAS_COLS, 1.0f, x, (int)x_stride, t->w,
                BLAS_COLS, beta, t->y, BLAS_ROWS);
}

/* Columns [col, col + n) of all rows as floats. */
static void load_w(const struct blas_args *args, int64_t col, int64_t n, float *w)
{
    const struct quant_info *info = quant_info((int)args->type);
    uint64_t off = quant_row_bytes(args->type, col);

    for (int row = 0; row < BLAS_ROWS; row++, w += BLAS_COLS) {
        int64_t n_here = row < args->n_rows ? n : 0;
        if (n_here)
            info->to_float((const char *)args->w + (uint64_t)row * args->w_stride + off, w, n_here);
        memset(w + n_here, 0, (size_t)(BLAS_COLS - n_here) * sizeof *w);
    }
}

int blas_tile_end(const int32_t *pos, const int32_t *seq, int tok, int n_tok)
{
    int end = tok + 1;

    while (end < n_tok && seq[end] == seq[tok] && pos[end] / BLAS_TOK == pos[tok] / BLAS_TOK && pos[end] > pos[end - 1])
        end++;
    return end;
}

/* Rows [tok, end) at their places in x, zeros around them. */
static void pad_x(const struct blas_args *args, int tok, int end, int64_t col, int64_t n, float *x)
{
    memset(x, 0, BLAS_TOK * BLAS_COLS * sizeof *x);
    for (int i = tok; i < end; i++)
        memcpy(x + args->pos[i] % BLAS_TOK * BLAS_COLS, args->x + i * args->x_stride + col, (size_t)n * sizeof *x);
}

/* The tile of rows [tok, end) times the columns that stand in t->w, added to dst where columns came before. */
static void add_tile(const struct blas_args *args, const struct tiles *t, int tok, int end, int64_t col, int64_t n)
{
    size_t bytes = (size_t)args->n_rows * sizeof *args->dst;

    memset(t->y, 0, BLAS_TOK * BLAS_ROWS * sizeof *t->y);
    for (int i = tok; i < end && col; i++)
        memcpy(t->y + args->pos[i] % BLAS_TOK * BLAS_ROWS, args->dst + i * args->dst_stride, bytes);
    if (end - tok == BLAS_TOK && n == BLAS_COLS) {
        multiply(args->x + tok * args->x_stride + col, args->x_stride, t, 1.0f);
    } else {
        pad_x(args, tok, end, col, n, t->x);
        multiply(t->x, BLAS_COLS, t, 1.0f);
    }
    for (int i = tok; i < end; i++)
        memcpy(args->dst + i * args->dst_stride, t->y + args->pos[i] % BLAS_TOK * BLAS_ROWS, bytes);
}

void blas_rows(const struct blas_args *args)
{
    struct tiles t = tiles_in(args->scratch);

    for (int64_t col = 0; col < args->n_cols; col += BLAS_COLS) {
        int64_t n = args->n_cols - col < BLAS_COLS ? args->n_cols - col : BLAS_COLS;
        load_w(args, col, n, t.w);
        for (int tok = 0, end; tok < args->n_tok; tok = end) {
            end = blas_tile_end(args->pos, args->seq, tok, args->n_tok);
            add_tile(args, &t, tok, end, col, n);
        }
    }
}

void blas_start(void *scratch)
{
    struct tiles t = tiles_in(scratch);

    openblas_set_num_threads(1);
    memset(scratch, 0, BLAS_SCRATCH_BYTES);
    multiply(t.x, BLAS_COLS, &t, 0.0f);
}
