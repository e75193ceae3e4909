/* Kernels of recurrent layers, written once for every width of kern_math.h: a file of vectors includes this behind its V, load_n and
 * store_n (the first n lanes). Each column is computed alone, so that no width changes a bit. */
#ifndef FERRY_CPU_KERN_RECORD_H
#define FERRY_CPU_KERN_RECORD_H

#include "cpu/kern.h"
#include "cpu/kern_math.h"

#if !defined KERN_MATH_AVX2 && !defined KERN_MATH_AVX512

enum { V = 1 };

static inline kern_v load_n(const float *x, int64_t n)
{
    (void)n;
    return *x;
}

static inline void store_n(float *x, kern_v v, int64_t n)
{
    (void)n;
    *x = v;
}

#endif

static inline void gate_v(const float *a, const float *g, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += V)
        store_n(out + i, kern_v_mul(load_n(a + i, n - i), kern_v_sigmoid(load_n(g + i, n - i))), n - i);
}

static inline void conv_v(const struct kern_conv_args *a)
{
    for (int i = 0; i < a->n; i += V) {
        int64_t n = a->n - i;
        kern_v y = kern_v_mul(load_n(a->w + i, n), load_n(a->x[0] + i, n));
        for (int j = 1; j < a->k; j++)
            y = kern_v_fma(load_n(a->w + j * a->n + i, n), load_n(a->x[j] + i, n), y);
        store_n(a->out + i, kern_v_silu(y), n);
    }
}

/* Chains c and c + 2, then 0 and 1. */
static inline kern_v chains_sum(const kern_v *chain)
{
    return kern_v_add(kern_v_add(chain[0], chain[2]), kern_v_add(chain[1], chain[3]));
}

/* What four rows of S from number i on, of n columns from number j on, know of k: each is a chain of its own. */
static inline void delta_known(const struct kern_delta_args *a, int i, int n_rows, int j, int64_t n, kern_v *chain)
{
    const kern_v decay = kern_v_set(a->decay);
    const float *from = a->from + i * a->stride + j;

    for (int c = 0; c < n_rows; c++)
        chain[c] = kern_v_fma(kern_v_mul(load_n(from + c * a->stride, n), decay), kern_v_set(a->k[i + c]), chain[c]);
}

/* The same rows learn d, and what they then recall for q. */
static inline void delta_learn(const struct kern_delta_args *a, int i, int n_rows, int j, int64_t n, kern_v d,
                               kern_v *chain)
{
    const kern_v decay = kern_v_set(a->decay);
    const float *from = a->from + i * a->stride + j;
    float *to = a->to + i * a->stride + j;

    for (int c = 0; c < n_rows; c++) {
        kern_v s = kern_v_mul(load_n(from + c * a->stride, n), decay);
        s = kern_v_fma(kern_v_set(a->k[i + c]), d, s);
        store_n(to + c * a->stride, s, n);
        chain[c] = kern_v_fma(s, kern_v_set(a->q[i + c]), chain[c]);
    }
}

/* n columns from number j on: V of them, or the last ones. */
static inline void delta_lanes(const struct kern_delta_args *a, int j, int64_t n)
{
    const kern_v zero = kern_v_set(0.0f);
    const int n_four = a->head_dim_k / 4 * 4, n_rest = a->head_dim_k - n_four;
    kern_v chain[4] = {zero, zero, zero, zero};

    for (int i = 0; i < n_four; i += 4)
        delta_known(a, i, 4, j, n, chain);
    delta_known(a, n_four, n_rest, j, n, chain);
    kern_v d = kern_v_mul(kern_v_sub(load_n(a->v + j, n), chains_sum(chain)), kern_v_set(a->beta));
    chain[0] = chain[1] = chain[2] = chain[3] = zero;
    for (int i = 0; i < n_four; i += 4)
        delta_learn(a, i, 4, j, n, d, chain);
    delta_learn(a, n_four, n_rest, j, n, d, chain);
    store_n(a->out + j, kern_v_mul(chains_sum(chain), kern_v_set(a->scale)), n);
}

static inline void delta_v(const struct kern_delta_args *a)
{
    int j = 0;

    for (; j + V <= a->n; j += V)
        delta_lanes(a, j, V);
    if (j < a->n)
        delta_lanes(a, j, a->n - j);
}

#endif
