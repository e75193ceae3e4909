/* Rows of activations as codes of 8 bits, and how floats become such: the codes of a row, then one of these for each 32 or 256 of them
 * (cpu/kern_act.h has the arithmetic). */
#ifndef FERRY_CUDA_ACT_CUH
#define FERRY_CUDA_ACT_CUH

#include "cuda/device.cuh"
#include "cuda/mat.cuh"
#include "cuda/math.cuh"
#include "cuda/rows.cuh"

struct cu_act_s32 {
    float d;
    int32_t sum;
};

struct cu_act_s256 {
    float d;
    int16_t sub[8];
    int16_t sum16[16]; /* of sub * code */
};

static __device__ inline const struct cu_act_s32 *cu_act_s32_of(const void *row, int64_t n)
{
    return reinterpret_cast<const struct cu_act_s32 *>(static_cast<const char *>(row) + n);
}

static __device__ inline const struct cu_act_s256 *cu_act_s256_of(const void *row, int64_t n)
{
    return reinterpret_cast<const struct cu_act_s256 *>(static_cast<const char *>(row) + n);
}

/* ---- coding ---- */

static __device__ inline int cu_larger(int a, int b)
{
    return a > b ? a : b;
}

static __device__ inline int cu_sum_of_lanes(int x, int n_lanes)
{
    for (int step = n_lanes / 2; step; step /= 2)
        x += cu_shfl_xor(x, step);
    return x;
}

static __device__ inline bool cu_is_finite(float x)
{
    return x <= 3.40282346638528859812e+38f;
}

/* The largest code out of four that leaves the least sum of squared errors over the warp's 32 values (cpu/kern_act.h). */
static __device__ inline float cu_top_of(float x, float amax)
{
    const float factors[4] = {1.0f, 16129.0f / 15876, 16129.0f / 15625, 16129.0f / 15376};
    float best = 0.0f, least = CU_INFINITY;

    for (int i = 0; i < 4; i++) {
        float top = 127.0f - (float)i, y = x * (top / amax), e = y - rintf(y);
        float upper = cu_shfl_xor(e, 16), low = threadIdx.x % 32 < 16 ? e : upper,
              high = threadIdx.x % 32 < 16 ? upper : e;
        float sum = cu_tree16_shfl(fmaf(high, high, fmaf(low, low, 0.0f))) * factors[i];
        if (sum < least) {
            least = sum;
            best = top;
        }
    }
    return best;
}

/* Value k of row i of what is to be coded. */
static __device__ inline float cu_act_value(const struct cu_act_args *a, int64_t i, int64_t k)
{
    int64_t at = i * a->x_stride + k;
    return a->up ? cu_glu_of(a->glu, a->x[at], a->up[at]) : a->x[at];
}

/* A warp for each 32 values. */
static __device__ inline void cu_act_x32(const struct cu_act_args *a, int64_t i, struct cu_crew crew)
{
    char *row = static_cast<char *>(a->out) + (uint64_t)i * a->out_stride;

    for (int64_t k = crew.me; k < a->width; k += crew.n) {
        float x = cu_act_value(a, i, k), amax = cu_amax_of_warp(x);
        bool fits = cu_is_finite(amax), is_zero = fits && !cu_is_finite(127.0f / amax);
        float top = cu_top_of(x, amax); /* not used where amax is no finite number */
        top = fits && !is_zero ? top : 0.0f;
        float inv = top != 0.0f ? top / amax : 0.0f;
        int q = inv != 0.0f ? (int)rintf(x * inv) : 0, sum = cu_sum_of_lanes(q, 32);

        row[k] = (char)q;
        if (k % 32 == 0) {
            struct cu_act_s32 *s = reinterpret_cast<struct cu_act_s32 *>(row + a->width) + k / 32;
            s->d = top != 0.0f ? amax / top : is_zero ? 0.0f : amax;
            s->sum = sum;
        }
    }
}

/* 8 neighbours from number k of row i on: in two pieces where they lie so. */
static __device__ inline void cu_act_values8(const struct cu_act_args *a, int64_t i, int64_t k, float x[8])
{
    const float *from = a->x + i * a->x_stride + k;

    if (a->up || reinterpret_cast<uintptr_t>(from) % 16) {
        CU_UNROLL
        for (int e = 0; e < 8; e++)
            x[e] = cu_act_value(a, i, k + e);
        return;
    }
    CU_UNROLL
    for (int e = 0; e < 8; e += 4) {
        struct cu_word16 four = cu_load16(from + e);
        memcpy(x + e, four.x, sizeof four.x);
    }
}

/* A warp for each 256 values: a lane has 8 neighbours, so that what it needs of others comes in few exchanges. */
static __device__ inline void cu_act_x256(const struct cu_act_args *a, int64_t i, struct cu_crew crew)
{
    const float top = 127.0f * 8, sub_max = 8.0f;
    char *row = static_cast<char *>(a->out) + (uint64_t)i * a->out_stride;
    int lane = crew.me % 32;

    for (int64_t block = crew.me / 32; block < a->width / 256; block += crew.n / 32) {
        struct cu_act_s256 *s = reinterpret_cast<struct cu_act_s256 *>(row + a->width) + block;
        float x[8];
        int mine = 0, most, sum16 = 0; /* magnitudes as integers: a NaN is the largest */
        struct alignas(8) eight {
            uint8_t code[8];
        } codes;

        cu_act_values8(a, i, 256 * block + 8 * lane, x);
        CU_UNROLL
        for (int k = 0; k < 8; k++)
            mine = cu_larger(mine, (int)(cu_bits_of_f32(x[k]) & 0x7fffffff));
        mine = cu_larger(mine, cu_shfl_xor(mine, 1));
        mine = cu_larger(mine, cu_shfl_xor(mine, 2)); /* of 32 values */
        most = cu_larger(mine, cu_shfl_xor(mine, 4));
        most = cu_larger(most, cu_shfl_xor(most, 8));
        most = cu_larger(most, cu_shfl_xor(most, 16)); /* of all */
        float amax = cu_f32_of_bits((uint32_t)most), inv = top / amax;
        bool fits = cu_is_finite(amax), has_codes = fits && cu_is_finite(inv);
        float steps = has_codes ? ceilf(cu_f32_of_bits((uint32_t)mine) * (sub_max / amax)) : 1.0f;
        int sub = steps < 1.0f ? 1 : steps > sub_max ? 8 : (int)steps;
        float factor = has_codes ? inv / (float)sub : 0.0f;
        CU_UNROLL
        for (int k = 0; k < 8; k++) {
            int q = factor != 0.0f ? (int)rintf(x[k] * factor) : 0;
            codes.code[k] = (uint8_t)q;
            sum16 += q;
        }
        sum16 += cu_shfl_xor(sum16, 1);
        *reinterpret_cast<struct eight *>(row + 256 * block + 8 * lane) = codes;
        if (lane % 4 == 0)
            s->sub[lane / 4] = (int16_t)sub;
        if (lane % 2 == 0)
            s->sum16[lane / 2] = (int16_t)(sub * sum16);
        if (lane == 0)
            s->d = has_codes ? amax / top : fits ? 0.0f : amax;
    }
}

static __device__ inline void cu_row_act(const struct cu_act_args *a, int64_t i, struct cu_crew crew)
{
    if (a->act == QUANT_ACT_Q8X32)
        cu_act_x32(a, i, crew);
    else if (a->act == QUANT_ACT_Q8X256)
        cu_act_x256(a, i, crew);
    else
        for (int64_t k = crew.me; k < a->width; k += crew.n)
            reinterpret_cast<float *>(static_cast<char *>(a->out) + (uint64_t)i * a->out_stride)[k] =
                cu_act_value(a, i, k);
}

#endif
