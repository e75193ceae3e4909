/* cuBLAS, looked for when the bench runs: neither needed to build nor to run. Its functions are declared here as NVIDIA documents
 * them; it multiplies column by column. */
#include "tests/gpu/bench.h"

#include <dlfcn.h>
#include <stdio.h>

/* cublasOperation_t, cudaDataType_t, cublasComputeType_t, cublasGemmAlgo_t */
enum { OP_N = 0, OP_T = 1, HALF = 2, COMPUTE_32F = 68, ALGO_DEFAULT = -1 };

struct blas {
    void *library, *handle;
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*set_stream)(void *handle, cudaStream_t stream);
    int (*gemm)(void *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int a_type,
                int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc,
                int compute, int algo);
};

struct product {
    const struct blas *blas;
    int n_rows, n_cols, n_tok;
    void *w, *x, *y;
};

static bool find(struct blas *l, const char *name, void *fn)
{
    void *at = dlsym(l->library, name);

    *(void **)fn = at;
    return at != NULL;
}

static bool open_blas(struct blas *l)
{
    static const char *const names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};

    for (size_t i = 0; i < sizeof names / sizeof *names && !l->library; i++)
        l->library = dlopen(names[i], RTLD_NOW);
    if (!l->library)
        return false;
    return find(l, "cublasCreate_v2", &l->create) && find(l, "cublasDestroy_v2", &l->destroy) &&
           find(l, "cublasSetStream_v2", &l->set_stream) && find(l, "cublasGemmEx", &l->gemm) &&
           l->create(&l->handle) == 0;
}

static cudaError_t run(const struct bench *b, void *ctx, int i)
{
    const struct product *p = ctx;
    const float one = 1, zero = 0;

    (void)b;
    (void)i;
    int rc = p->blas->gemm(p->blas->handle, OP_T, OP_N, p->n_rows, p->n_tok, p->n_cols, &one, p->w, HALF, p->n_cols,
                           p->x, HALF, p->n_cols, &zero, p->y, HALF, p->n_rows, COMPUTE_32F, ALGO_DEFAULT);
    return rc ? cudaErrorUnknown : cudaSuccess;
}

double bench_blas(struct bench *b, int n_rows, int n_cols, int n_tok)
{
    struct blas l = {.library = NULL};
    struct product p = {&l, n_rows, n_cols, n_tok, NULL, NULL, NULL};
    uint64_t at = 0, w_bytes = (uint64_t)n_rows * (uint64_t)n_cols * 2;
    double s = 0;
    int rc = bench_take(b, &at, w_bytes, &p.w);

    rc = rc ? rc : bench_take(b, &at, (uint64_t)n_tok * (uint64_t)n_cols * 2, &p.x);
    rc = rc ? rc : bench_take(b, &at, (uint64_t)n_tok * (uint64_t)n_rows * 2, &p.y);
    if (!rc && open_blas(&l) && l.set_stream(l.handle, b->stream) == 0)
        rc = bench_time(b, run, &p, 8, &s);
    if (l.handle)
        l.destroy(l.handle);
    if (l.library)
        dlclose(l.library);
    if (rc)
        fprintf(stderr, "cuBLAS refused %d x %d x %d\n", n_rows, n_cols, n_tok);
    return rc ? 0 : s;
}
