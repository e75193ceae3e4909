/* exp, tanh, sigmoid, silu and gelu as polynomials, and the tree that adds 16 lanes, written once for every width: a file
 * that defines KERN_MATH_AVX2 first gets kern_v as 8 floats, KERN_MATH_AVX512 as 16, any other as 1. Each step is one
 * operation rounded once (the build has -ffp-contract=off), so that all widths give the same bits. NaN comes out where NaN
 * went in.
 * Against libm (tests/t_cpu_kern.c, every 997th float): exp 1.0 units in the last place, tanh 2.2, sigmoid 2.1, silu 2.0. */
#ifndef FERRY_CPU_KERN_MATH_H
#define FERRY_CPU_KERN_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "src/device/device.h"

#if defined KERN_MATH_AVX2

#include <immintrin.h>

typedef __m256 kern_v;

static inline kern_v kern_v_set(float x)
{
    return _mm256_set1_ps(x);
}

static inline kern_v kern_v_fma(kern_v a, kern_v b, kern_v c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline kern_v kern_v_add(kern_v a, kern_v b)
{
    return _mm256_add_ps(a, b);
}

static inline kern_v kern_v_sub(kern_v a, kern_v b)
{
    return _mm256_sub_ps(a, b);
}

static inline kern_v kern_v_mul(kern_v a, kern_v b)
{
    return _mm256_mul_ps(a, b);
}

static inline kern_v kern_v_div(kern_v a, kern_v b)
{
    return _mm256_div_ps(a, b);
}

/* a > b ? a : b, so b where one is NaN. */
static inline kern_v kern_v_max(kern_v a, kern_v b)
{
    return _mm256_max_ps(a, b);
}

static inline kern_v kern_v_min(kern_v a, kern_v b)
{
    return _mm256_min_ps(a, b);
}

static inline kern_v kern_v_abs(kern_v x)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
}

/* |x| with the sign of s. */
static inline kern_v kern_v_copysign(kern_v x, kern_v s)
{
    kern_v sign = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign, x), _mm256_and_ps(sign, s));
}

/* 2^n and 2^(n/2) * 2^(n - n/2) as two factors, for n in the low bits of a float that had 1.5 * 2^23 added. */
static inline void kern_v_exp2i(kern_v magic, kern_v *half, kern_v *rest)
{
    __m256i n = _mm256_sub_epi32(_mm256_castps_si256(magic), _mm256_set1_epi32(0x4b400000));
    __m256i n_half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
    *half = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n_half, bias), 23));
    *rest = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, n_half), bias), 23));
}

#elif defined KERN_MATH_AVX512

#include <immintrin.h>

typedef __m512 kern_v;

static inline kern_v kern_v_set(float x)
{
    return _mm512_set1_ps(x);
}

static inline kern_v kern_v_fma(kern_v a, kern_v b, kern_v c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline kern_v kern_v_add(kern_v a, kern_v b)
{
    return _mm512_add_ps(a, b);
}

static inline kern_v kern_v_sub(kern_v a, kern_v b)
{
    return _mm512_sub_ps(a, b);
}

static inline kern_v kern_v_mul(kern_v a, kern_v b)
{
    return _mm512_mul_ps(a, b);
}

static inline kern_v kern_v_div(kern_v a, kern_v b)
{
    return _mm512_div_ps(a, b);
}

/* a > b ? a : b, so b where one is NaN. */
static inline kern_v kern_v_max(kern_v a, kern_v b)
{
    return _mm512_max_ps(a, b);
}

static inline kern_v kern_v_min(kern_v a, kern_v b)
{
    return _mm512_min_ps(a, b);
}

static inline kern_v kern_v_abs(kern_v x)
{
    return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x);
}

/* |x| with the sign of s. */
static inline kern_v kern_v_copysign(kern_v x, kern_v s)
{
    kern_v sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign, x), _mm512_and_ps(sign, s));
}

/* 2^n and 2^(n/2) * 2^(n - n/2) as two factors, for n in the low bits of a float that had 1.5 * 2^23 added. */
static inline void kern_v_exp2i(kern_v magic, kern_v *half, kern_v *rest)
{
    __m512i n = _mm512_sub_epi32(_mm512_castps_si512(magic), _mm512_set1_epi32(0x4b400000));
    __m512i n_half = _mm512_srai_epi32(n, 1), bias = _mm512_set1_epi32(127);
    *half = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n_half, bias), 23));
    *rest = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_sub_epi32(n, n_half), bias), 23));
}

#else

typedef float kern_v;

static inline kern_v kern_v_set(float x)
{
    return x;
}

static inline kern_v kern_v_fma(kern_v a, kern_v b, kern_v c)
{
    return fmaf(a, b, c);
}

static inline kern_v kern_v_add(kern_v a, kern_v b)
{
    return a + b;
}

static inline kern_v kern_v_sub(kern_v a, kern_v b)
{
    return a - b;
}

static inline kern_v kern_v_mul(kern_v a, kern_v b)
{
    return a * b;
}

static inline kern_v kern_v_div(kern_v a, kern_v b)
{
    return a / b;
}

/* b where one is NaN. */
static inline kern_v kern_v_max(kern_v a, kern_v b)
{
    return a > b ? a : b;
}

static inline kern_v kern_v_min(kern_v a, kern_v b)
{
    return a < b ? a : b;
}

static inline kern_v kern_v_abs(kern_v x)
{
    return fabsf(x);
}

/* |x| with the sign of s. */
static inline kern_v kern_v_copysign(kern_v x, kern_v s)
{
    return copysignf(x, s);
}

/* 2^(n/2) and 2^(n - n/2) as two factors, for n in the low bits of a float that had 1.5 * 2^23 added. */
static inline void kern_v_exp2i(kern_v magic, kern_v *half, kern_v *rest)
{
    uint32_t bits, half_bits, rest_bits;

    memcpy(&bits, &magic, sizeof bits);
    uint32_t n = bits - 0x4b400000u;
    uint32_t n_half = n >> 1 | (n & 0x80000000u); /* an arithmetic shift */
    half_bits = (n_half + 127) << 23;
    rest_bits = (n - n_half + 127) << 23;
    memcpy(half, &half_bits, sizeof half_bits);
    memcpy(rest, &rest_bits, sizeof rest_bits);
}

#endif

/* x = n ln 2 + r: *q = e^r - 1 by its Taylor series (r <= 0.347: the first term left out, r^8/8!, is below 2^-27 of r),
 * and 2^n as two factors, so that results that are subnormal or overflow are rounded once, in the last product. */
static inline void kern_v_exp_parts(kern_v x, kern_v *q, kern_v *half, kern_v *rest)
{
    const kern_v shift = kern_v_set(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    kern_v magic = kern_v_fma(x, kern_v_set(0x1.715476p+0f), shift);
    kern_v n = kern_v_sub(magic, shift);
    /* ln 2 in two parts: the upper has 15 bits, so n times it is exact. */
    kern_v r = kern_v_fma(n, kern_v_set(-0x1.62e4p-1f), x);
    r = kern_v_fma(n, kern_v_set(-0x1.7f7d1cp-20f), r);
    kern_v p = kern_v_set(1.0f / 5040.0f);
    p = kern_v_fma(p, r, kern_v_set(1.0f / 720.0f));
    p = kern_v_fma(p, r, kern_v_set(1.0f / 120.0f));
    p = kern_v_fma(p, r, kern_v_set(1.0f / 24.0f));
    p = kern_v_fma(p, r, kern_v_set(1.0f / 6.0f));
    p = kern_v_fma(p, r, kern_v_set(0.5f));
    *q = kern_v_fma(kern_v_mul(p, r), r, r);
    kern_v_exp2i(magic, half, rest);
}

/* e^x; 0 below -104 (half of the smallest subnormal), infinity above 89. */
static inline kern_v kern_v_exp(kern_v x)
{
    kern_v q, half, rest;

    x = kern_v_min(kern_v_set(89.0f), kern_v_max(kern_v_set(-104.0f), x));
    kern_v_exp_parts(x, &q, &half, &rest);
    return kern_v_mul(kern_v_mul(kern_v_add(q, kern_v_set(1.0f)), half), rest);
}

/* (e^2|x| - 1) / (e^2|x| + 1) with the sign of x: precise near 0 too, because e^r - 1 is never rounded at 1. */
static inline kern_v kern_v_tanh(kern_v x)
{
    kern_v q, half, rest, one = kern_v_set(1.0f);
    kern_v y = kern_v_min(kern_v_set(20.0f), kern_v_abs(x)); /* tanh is 1 from 9.02 on */

    kern_v_exp_parts(kern_v_add(y, y), &q, &half, &rest);
    kern_v two_n = kern_v_mul(half, rest);
    kern_v e = kern_v_fma(two_n, q, kern_v_sub(two_n, one));
    return kern_v_copysign(kern_v_div(e, kern_v_add(e, kern_v_set(2.0f))), x);
}

/* 1 / (1 + e^-x) */
static inline kern_v kern_v_sigmoid(kern_v x)
{
    kern_v one = kern_v_set(1.0f);
    return kern_v_div(one, kern_v_add(one, kern_v_exp(kern_v_sub(kern_v_set(0.0f), x))));
}

/* x sigmoid(x) */
static inline kern_v kern_v_silu(kern_v x)
{
    return kern_v_div(x, kern_v_add(kern_v_set(1.0f), kern_v_exp(kern_v_sub(kern_v_set(0.0f), x))));
}

/* log(1 + e^x) = max(x, 0) + log1p(t), t = e^-|x|; of t <= 1 by the series of 2 atanh(s), s = t / (2 + t) <= 1/3: the first term left out,
 * s^17/17, is below 2^-29 of s. */
static inline kern_v kern_v_softplus(kern_v x)
{
    const kern_v zero = kern_v_set(0.0f);
    kern_v t = kern_v_exp(kern_v_sub(zero, kern_v_abs(x)));
    kern_v s = kern_v_div(t, kern_v_add(t, kern_v_set(2.0f))), s2 = kern_v_mul(s, s);
    kern_v p = kern_v_set(1.0f / 15.0f);
    p = kern_v_fma(p, s2, kern_v_set(1.0f / 13.0f));
    p = kern_v_fma(p, s2, kern_v_set(1.0f / 11.0f));
    p = kern_v_fma(p, s2, kern_v_set(1.0f / 9.0f));
    p = kern_v_fma(p, s2, kern_v_set(1.0f / 7.0f));
    p = kern_v_fma(p, s2, kern_v_set(1.0f / 5.0f));
    p = kern_v_fma(p, s2, kern_v_set(1.0f / 3.0f));
    p = kern_v_fma(kern_v_mul(p, s2), s, s);
    return kern_v_fma(kern_v_set(2.0f), p, kern_v_max(x, zero));
}

/* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), by the identity (1 + tanh u)/2 = sigmoid(2u). */
static inline kern_v kern_v_gelu_tanh(kern_v x)
{
    const kern_v c = kern_v_set(-1.5957691216057308f); /* -2 sqrt(2/pi) */
    kern_v cubic = kern_v_mul(kern_v_fma(kern_v_mul(kern_v_set(0.044715f), x), x, kern_v_set(1.0f)), x);
    return kern_v_div(x, kern_v_add(kern_v_set(1.0f), kern_v_exp(kern_v_mul(c, cubic))));
}

/* x sigmoid(1.702 x) (u + 1), of an x of 7 at most and a u between -7 and 7. */
static inline kern_v kern_v_swiglu_oai(kern_v x, kern_v u)
{
    const kern_v one = kern_v_set(1.0f), limit = kern_v_set(7.0f);
    x = kern_v_min(limit, x);
    u = kern_v_max(kern_v_set(-7.0f), kern_v_min(limit, u));
    kern_v gated = kern_v_div(x, kern_v_add(one, kern_v_exp(kern_v_mul(kern_v_set(-1.702f), x))));
    return kern_v_mul(gated, kern_v_add(u, one));
}

/* OP_GLU of a gate and an up. */
static inline kern_v kern_v_glu(enum op_act act, kern_v gate, kern_v up)
{
    if (act == OP_ACT_SWIGLU_OAI)
        return kern_v_swiglu_oai(gate, up);
    return kern_v_mul(act == OP_ACT_SILU ? kern_v_silu(gate) : kern_v_gelu_tanh(gate), up);
}

/* cap tanh(x / cap) */
static inline kern_v kern_v_softcap(kern_v x, kern_v cap)
{
    return kern_v_mul(cap, kern_v_tanh(kern_v_div(x, cap)));
}

#endif
