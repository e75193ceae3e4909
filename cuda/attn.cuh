/* What both kernels of attention share: pages, rows of a cache, states of segments. */
#ifndef FERRY_CUDA_ATTN_CUH
#define FERRY_CUDA_ATTN_CUH

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/math.cuh"

enum { PAGE = DEVICE_PAGE_TOK, SEGMENT = DEVICE_ATTN_SEGMENT_TOK };

static __device__ inline int step_row(const struct cu_step *s, int i)
{
    return s->out_row ? s->out_row[i] : i;
}

static __device__ inline const void *const *page_table(const struct cu_step *s, int row, int group)
{
    return s->page[s->seq[row] * DEVICE_MAX_GROUPS + group];
}

/* Rows of a cache type, anywhere at an even address. */
template <int TYPE> struct kv;

template <> struct kv<QUANT_F16> {
    static __device__ __host__ inline int row_bytes(int head_dim)
    {
        return 2 * head_dim;
    }

    /* x[j] = element first + j * STEP; all N lie in one block of 32. */
    template <int N, int STEP> static __device__ inline void read(const char *row, int first, float *x)
    {
        const uint16_t *h = reinterpret_cast<const uint16_t *>(row) + first;
        for (int j = 0; j < N; j++)
            x[j] = cu_half_to_f32(h[j * STEP]);
    }

    /* Eight, which lie at a multiple of 16. */
    static __device__ inline void read_eight(const char *row, int first, float *x)
    {
        struct cu_word16 w = cu_load16(row + 2 * first);
        for (int j = 0; j < 8; j++)
            x[j] = cu_half_to_f32((uint16_t)(w.x[j / 2] >> j % 2 * 16));
    }

    /* Two, which lie at a multiple of 4. */
    static __device__ inline void read_two(const char *row, int first, float *x)
    {
        uint32_t w = cu_load_word(row + 2 * first);
        x[0] = cu_half_to_f32((uint16_t)w);
        x[1] = cu_half_to_f32((uint16_t)(w >> 16));
    }

    /* Four elements from `first` on, which lie at a multiple of 8 bytes. */
    static __device__ inline void read_four(const char *row, int first, float *x)
    {
        struct alignas(8) four {
            uint16_t h[4];
        } all = *reinterpret_cast<const struct four *>(row + 2 * first);
        for (int j = 0; j < 4; j++)
            x[j] = cu_half_to_f32(all.h[j]);
    }
};

template <> struct kv<QUANT_Q8_0> {
    static __device__ __host__ inline int row_bytes(int head_dim)
    {
        return head_dim / 32 * 34;
    }

    template <int N, int STEP> static __device__ inline void read(const char *row, int first, float *x)
    {
        const uint8_t *block = reinterpret_cast<const uint8_t *>(row) + first / 32 * 34;
        float d = cu_half_at(block);
        for (int j = 0; j < N; j++)
            x[j] = d * code(block[2 + first % 32 + j * STEP]);
    }

    static __device__ inline void read_four(const char *row, int first, float *x)
    {
        const uint16_t *block = reinterpret_cast<const uint16_t *>(row) + first / 32 * 17;
        const uint16_t *codes = block + 1 + first % 32 / 2;
        float d = cu_half_to_f32(block[0]);
        for (int j = 0; j < 4; j++)
            x[j] = d * code((uint8_t)(codes[j / 2] >> j % 2 * 8));
    }

    static __device__ inline void read_eight(const char *row, int first, float *x)
    {
        const uint8_t *block = reinterpret_cast<const uint8_t *>(row) + first / 32 * 34;
        float d = cu_half_at(block);
        uint32_t w[2];
        cu_load_words<2>(block + 2 + first % 32, w);
        for (int j = 0; j < 8; j++)
            x[j] = d * code((uint8_t)(w[j / 4] >> j % 4 * 8));
    }

    static __device__ inline void read_two(const char *row, int first, float *x)
    {
        const uint8_t *block = reinterpret_cast<const uint8_t *>(row) + first / 32 * 34;
        float d = cu_half_at(block);
        uint32_t w = cu_u16(block + 2 + first % 32);
        x[0] = d * code((uint8_t)w);
        x[1] = d * code((uint8_t)(w >> 8));
    }

  private:
    /* (float)(int8_t)byte by one exact sum: conversions run at a quarter of its rate. 2^23 + 128 is taken from 2^23 + 128 + code. */
    static __device__ inline float code(uint8_t byte)
    {
        return cu_f32_of_bits(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f;
    }
};

/* ---- states ---- */

/* One value of a later segment's state onto the sum. */
struct merger {
    float f, f_sum, m;
};

static __device__ inline struct merger merger_of(float m, float m_sum)
{
    float both = cu_max(m, m_sum);
    struct merger g = {cu_exp(m - both), cu_exp(m_sum - both), both};
    return g;
}

static __device__ inline bool is_fresh(float m, float l)
{
    return m == -CU_INFINITY && l == 0.0f;
}

/* Of segment `segment` of the launch. */
static __device__ inline float *state_of(const struct cu_attn_args *a, int i, int head, int segment)
{
    return a->states + i * a->state_row + head * a->state_head + segment * a->state_segment;
}

#endif
