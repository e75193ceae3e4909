/* Rows of keys and values as they lie in pages, and how they get there. */
#ifndef FERRY_CUDA_KV_CUH
#define FERRY_CUDA_KV_CUH

#include "cuda/dequant.cuh"
#include "cuda/device.cuh"
#include "cuda/rows.cuh"

static __device__ inline const void *const *cu_page_table(const struct cu_step *s, int row, int group)
{
    return s->page[s->seq[row] * DEVICE_MAX_GROUPS + group];
}

/* Rows of a cache type, anywhere at an even address. */
template <int TYPE> struct cu_kv;

template <> struct cu_kv<QUANT_F16> {
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

template <> struct cu_kv<QUANT_Q8_0> {
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

  private:
    /* (float)(int8_t)byte by one exact sum: conversions run at a quarter of its rate. 2^23 + 128 is taken from 2^23 + 128 + code. */
    static __device__ inline float code(uint8_t byte)
    {
        return cu_f32_of_bits(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f;
    }
};

/* op_attn_v_row, which is the host's. */
static __device__ inline int cu_v_row(const struct op_attn *p)
{
    return p->v_in_k ? p->head_dim_k : p->head_dim_v;
}

/* Keys, or values: a thread for each element. Blocks of Q8_0 are warps. */
template <int TYPE>
static __device__ inline void cu_kv_write(const struct cu_append_args *a, int64_t i, struct cu_crew crew, bool is_v)
{
    int dim = is_v ? a->p.head_dim_v : a->p.head_dim_k, n = a->p.n_head_kv * dim, row = cu_step_row(&a->step, (int)i);
    int pos = a->step.pos[row];
    const void *page = cu_page_table(&a->step, row, a->p.group)[pos / DEVICE_PAGE_TOK];
    const float *from = is_v ? a->v + i * a->v_stride : a->k + i * a->k_stride;
    int64_t row_bytes = cu_kv<TYPE>::row_bytes(dim);
    char *first = static_cast<char *>(const_cast<void *>(page)) + (is_v ? a->p.v_off : a->p.k_off);

    if (!page) /* the position lies in the host's memory */
        return;
    for (int e = crew.me; e - crew.me % 32 < n; e += crew.n) {
        bool is_in = e < n;
        float x = is_in ? from[e] : 0.0f;
        char *out = first + ((int64_t)(e / dim) * DEVICE_PAGE_TOK + pos % DEVICE_PAGE_TOK) * row_bytes;
        if (TYPE == QUANT_F16) {
            if (is_in)
                reinterpret_cast<uint16_t *>(out)[e % dim] = cu_f32_to_half(x);
            continue;
        }
        float amax = fabsf(x); /* a NaN does not count */
        amax = amax == amax ? amax : 0.0f;
        for (int step = 16; step; step /= 2)
            amax = cu_max(cu_shfl_xor(amax, step), amax);
        float f = amax > 0.0f ? 127.0f / amax : 0.0f;
        uint8_t *block = reinterpret_cast<uint8_t *>(out) + e % dim / 32 * 34;
        if (!is_in)
            continue;
        block[2 + e % dim % 32] = (uint8_t)(int8_t)rintf(cu_min(cu_max(x * f, -127.0f), 127.0f));
        if (e % dim % 32 == 0)
            *reinterpret_cast<uint16_t *>(block) = cu_f32_to_half(amax / 127.0f);
    }
}

static __device__ inline void cu_row_append(const struct cu_append_args *a, int64_t i, struct cu_crew crew)
{
    for (int is_v = 0; is_v < (a->p.v_in_k ? 1 : 2); is_v++)
        if (a->p.kv_type == QUANT_F16)
            cu_kv_write<QUANT_F16>(a, i, crew, is_v);
        else
            cu_kv_write<QUANT_Q8_0>(a, i, crew, is_v);
}

#endif
