/* Inside cpu/: matmul through OpenBLAS, for the plan's option DEVICE_PREFILL_BLAS only. */
#ifndef FERRY_CPU_BLAS_H
#define FERRY_CPU_BLAS_H

#include <stdint.h>

#include "quant/quant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Every call to sgemm has this one shape, padded with zeros: OpenBLAS picks its kernels by shape, and so a row's bits could
 * change with the number of its neighbours. They also change with the row's place in the tile (its Haswell kernels add in
 * another order from column 6 of 12 on), so a tile holds 64 positions of one sequence from an absolute multiple of 64 on,
 * each at its own place. 64 x 128 x 512 reaches 62 GFLOP/s on a Zen 3 core where 512 x 512 x 512 reaches
 * 70 and 64 x 64 x 512 reaches 56 (OpenBLAS 0.3.21, best of 7); 64 tokens waste little on short prompts. */
#define BLAS_TOK 64
#define BLAS_ROWS 128
#define BLAS_COLS 512
#define BLAS_SCRATCH_BYTES ((BLAS_TOK * BLAS_COLS + BLAS_ROWS * BLAS_COLS + BLAS_TOK * BLAS_ROWS) * sizeof(float))

/* dst[t * dst_stride + r] = x_t . w_r for r < n_rows <= BLAS_ROWS, t < n_tok. */
struct blas_args {
    enum quant_type type; /* of w; to_float must exist */
    const void *w;        /* first weight row, raw layout */
    uint64_t w_stride;    /* bytes between weight rows */
    int n_rows;
    const float *x;           /* first activation row */
    int64_t x_stride;         /* floats */
    int n_tok;                /* any number, but no part of a tile: see blas_tile_end() */
    const int32_t *pos, *seq; /* (n_tok) of each row */
    int64_t n_cols;
    float *dst;
    int64_t dst_stride; /* floats */
    void *scratch;      /* (BLAS_SCRATCH_BYTES), 64-byte aligned, of the calling thread */
};
void blas_rows(const struct blas_args *args);

/* One past the last row of the tile that row `tok` of n_tok begins. */
int blas_tile_end(const int32_t *pos, const int32_t *seq, int tok, int n_tok);

/* Make OpenBLAS compute in the calling thread alone (its setting is process-wide), and take the buffers that it keeps for
 * each thread, so that later calls allocate nothing. Each worker calls it once, with scratch as above. */
void blas_start(void *scratch);

#ifdef __cplusplus
}
#endif
#endif
