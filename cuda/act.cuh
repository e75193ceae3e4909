/* Rows of activations as codes of 8 bits: the codes of a row, then one of these for each 32 or 256 of them (cpu/kern_act.h has the
 * arithmetic). */
#ifndef FERRY_CUDA_ACT_CUH
#define FERRY_CUDA_ACT_CUH

#include "cuda/device.cuh"

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

#endif
