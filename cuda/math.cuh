/* Twins of the scalar functions in cpu/kern_math.h, operation by operation: tests hold them to the same bits. */
#ifndef FERRY_CUDA_MATH_CUH
#define FERRY_CUDA_MATH_CUH

#include "cuda/device.cuh"

#define CU_INFINITY cu_f32_of_bits(0x7f800000u)

/* b where one is NaN. */
static __device__ inline float cu_max(float a, float b)
{
    return a > b ? a : b;
}

static __device__ inline float cu_min(float a, float b)
{
    return a < b ? a : b;
}

static __device__ inline void cu_exp_parts(float x, float *q, float *half, float *rest)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float magic = fmaf(x, 1.44269502162933349609375f, shift);
    float n = magic - shift;
    float r = fmaf(n, -0.693145751953125f, x); /* ln 2 in two parts, the upper of 15 bits */
    r = fmaf(n, -1.428606765330187045037746429443359375e-06f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    *q = fmaf(p * r, r, r);
    uint32_t k = cu_bits_of_f32(magic) - 0x4b400000u;
    uint32_t k_half = k >> 1 | (k & 0x80000000u);
    *half = cu_f32_of_bits((k_half + 127) << 23);
    *rest = cu_f32_of_bits((k - k_half + 127) << 23);
}

static __device__ inline float cu_exp(float x)
{
    float q, half, rest;

    x = cu_min(89.0f, cu_max(-104.0f, x));
    cu_exp_parts(x, &q, &half, &rest);
    return (q + 1.0f) * half * rest;
}

static __device__ inline float cu_tanh(float x)
{
    float q, half, rest, y = cu_min(20.0f, fabsf(x));

    cu_exp_parts(y + y, &q, &half, &rest);
    float two_n = half * rest;
    float e = fmaf(two_n, q, two_n - 1.0f);
    return copysignf(e / (e + 2.0f), x);
}

static __device__ inline float cu_sigmoid(float x)
{
    return 1.0f / (1.0f + cu_exp(0.0f - x));
}

static __device__ inline float cu_silu(float x)
{
    return x / (1.0f + cu_exp(0.0f - x));
}

static __device__ inline float cu_softplus(float x)
{
    float t = cu_exp(0.0f - fabsf(x)), s = t / (t + 2.0f), s2 = s * s;
    float p = 1.0f / 15.0f;
    p = fmaf(p, s2, 1.0f / 13.0f);
    p = fmaf(p, s2, 1.0f / 11.0f);
    p = fmaf(p, s2, 1.0f / 9.0f);
    p = fmaf(p, s2, 1.0f / 7.0f);
    p = fmaf(p, s2, 1.0f / 5.0f);
    p = fmaf(p, s2, 1.0f / 3.0f);
    p = fmaf(p * s2, s, s);
    return fmaf(2.0f, p, cu_max(x, 0.0f));
}

static __device__ inline float cu_gelu_tanh(float x)
{
    float cubic = fmaf(0.044715f * x, x, 1.0f) * x;
    return x / (1.0f + cu_exp(-1.5957691216057308f * cubic));
}

static __device__ inline float cu_softcap(float x, float cap)
{
    return cap * cu_tanh(x / cap);
}

static __device__ inline float cu_swiglu_oai(float gate, float up)
{
    gate = cu_min(7.0f, gate);
    up = cu_max(-7.0f, cu_min(7.0f, up));
    return gate / (1.0f + cu_exp(-1.702f * gate)) * (up + 1.0f);
}

static __device__ inline float cu_glu_of(enum op_act act, float gate, float up)
{
    if (act == OP_ACT_SWIGLU_OAI)
        return cu_swiglu_oai(gate, up);
    return (act == OP_ACT_SILU ? cu_silu(gate) : cu_gelu_tanh(gate)) * up;
}

/* Lanes l and l+8, l+4, l+2, l+1 of 16. */
static __device__ inline float cu_tree16(float *lane)
{
    for (int step = 8; step; step /= 2)
        for (int l = 0; l < step; l++)
            lane[l] += lane[l + step];
    return lane[0];
}

/* The same over 16 neighbouring threads of a warp; every one of them gets the sum. */
static __device__ inline float cu_tree16_shfl(float x)
{
    for (int step = 8; step; step /= 2)
        x += cu_shfl_xor(x, step);
    return x;
}

/* One of 16 lanes' products of n values in shared memory, onto acc: fetched 16 at a time, which a loop that asks each time would not do. */
static __device__ inline float cu_lane_dot(const float *a, const float *b, int lane, int n, float acc)
{
    int k = lane;

    for (; k + 16 * 15 < n; k += 16 * 16) {
        CU_UNROLL
        for (int i = 0; i < 16; i++)
            acc = fmaf(a[k + 16 * i], b[k + 16 * i], acc);
    }
    for (; k < n; k += 16)
        acc = fmaf(a[k], b[k], acc);
    return acc;
}

#endif
