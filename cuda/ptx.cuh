/* All that a plain C++ compiler cannot read, each beside a plain twin that keeps its delay: tensor-core products, what loads and packs
 * their factors, and asynchronous copies into shared memory, by 16 bytes or in bulk. Before sm_80 there are no asynchronous copies: they
 * are plain ones there. */
#ifndef FERRY_CUDA_PTX_CUH
#define FERRY_CUDA_PTX_CUH

#include "cuda/device.cuh"

/* What a lane holds of A (16 x 16, rows) and B (16 x 8, columns): pairs of halves. */
struct cu_frag_a {
    uint32_t x[4];
};

struct cu_frag_b {
    uint32_t x[2];
};

/* Added to an integer below 2^22 it makes the bits of a float, 1.5 * 2^23 more than it. */
#define CU_MAGIC 0x4b400000

static __device__ inline float cu_of_magic(int bits)
{
    return cu_f32_of_bits((uint32_t)bits) - 12582912.0f;
}

#ifdef __CUDACC__

/* Four matrices of 8 x 8 halves in shared memory: lane i says where row i % 8 of matrix i / 8 begins, a multiple of 16 bytes. Word m of
 * a lane is of matrix m: row lane / 4, columns 2 * (lane % 4) and + 1. */
static __device__ inline void cu_load_matrices(const uint16_t *row, uint32_t x[4])
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)));
}

/* Both rounded to the nearest half; low in the lower 16 bits. */
static __device__ inline uint32_t cu_pack_halves(float low, float high)
{
    uint32_t x;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
    x = cu_f32_to_half(low) | (uint32_t)cu_f32_to_half(high) << 16;
#endif
    return x;
}

/* acc (16 x 8) += A B of signed bytes, A (16 x 16) with rows lane / 4 in a0 and 8 below in a1, B (16 x 8) with column lane / 4 in b, each
 * 4 bytes from lane % 4 * 4 on; acc as in cu_mma. */
static __device__ inline void cu_imma16(int *acc, uint32_t a0, uint32_t a1, uint32_t b)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
                 : "r"(a0), "r"(a1), "r"(b));
#else
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(acc[0]), "+r"(acc[1])
                 : "r"(a0), "r"(b));
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(acc[2]), "+r"(acc[3])
                 : "r"(a1), "r"(b));
#endif
}

/* acc (16 x 8) += A B; acc[0], acc[1]: row lane / 4, columns 2 * (lane % 4) and + 1; acc[2], acc[3]: 8 rows below. */
static __device__ inline void cu_mma(float *acc, const struct cu_frag_a *a, const struct cu_frag_b *b)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a->x[0]), "r"(a->x[1]), "r"(a->x[2]), "r"(a->x[3]), "r"(b->x[0]), "r"(b->x[1]));
#else
    for (int half = 0; half < 2; half++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                     : "r"(a->x[2 * half]), "r"(a->x[2 * half + 1]), "r"(b->x[half]));
#endif
}

/* 16 bytes from device to shared memory; there when waited for. */
static __device__ inline void cu_async_copy16(void *dst, const void *src)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(dst)), "l"(src)
                 : "memory");
#else
    *static_cast<int4 *>(dst) = *static_cast<const int4 *>(src);
#endif
}

/* What was asked for since the last call is a group. */
static __device__ inline void cu_async_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Until at most the N latest groups of this thread are under way. */
template <int N> static __device__ inline void cu_async_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* Bytes that one thread brings into shared memory in one piece (compute capability 9.0), and where they are counted: a landing is used
 * again and again, each time by one cu_landing_expect() of all bytes and copies of as many; its uses are even and odd in turn, as those who
 * wait say. Addresses and sizes are multiples of 16 bytes. */
struct cu_landing {
    uint64_t state;
};

#if __CUDA_ARCH__ >= 900
#define CU_HAS_BULK(wanted) true
#else
#define CU_HAS_BULK(wanted) false
#endif

/* Of what all lanes of a warp have. */
static __device__ inline uint32_t cu_sum_of_warp(uint32_t x)
{
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(CU_ALL_LANES, x);
#else
    for (int step = 16; step; step /= 2)
        x += (uint32_t)cu_shfl_xor((int)x, step);
    return x;
#endif
}

static __device__ inline uint32_t cu_shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* By one thread, before others of its warp use it. */
static __device__ inline void cu_landing_init(struct cu_landing *l)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(cu_shared_address(l)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

static __device__ inline void cu_landing_expect(struct cu_landing *l, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cu_shared_address(l)), "r"(bytes)
                 : "memory");
#endif
}

static __device__ inline void cu_bulk_copy(void *dst, const void *src, uint32_t bytes, struct cu_landing *l)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     cu_shared_address(dst)),
                 "l"(src), "r"(bytes), "r"(cu_shared_address(l))
                 : "memory");
#endif
}

/* All lanes of a warp. */
static __device__ inline void cu_landing_wait(struct cu_landing *l, uint32_t is_odd)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n"
                 ".reg .pred there;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
                 "@!there bra again;\n"
                 "}" ::"r"(cu_shared_address(l)),
                 "r"(is_odd)
                 : "memory");
#endif
}

/* ---- products of warpgroups ---- */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CU_HAS_WGMMA 1
#else
#define CU_HAS_WGMMA 0
#endif

/* What this thread has stored in shared memory, and what its cu_async_copy16 has brought, the products of warpgroups may read behind the
 * next barrier, and bulk copies may overwrite. */
static __device__ inline void cu_async_publish()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/* B of four products: a tile of (N, 64) halves. A column's 64 are 128 bytes in pieces of 16, piece p of column c at p ^ (c & 7), and
 * the tile begins at a multiple of 1024 bytes. */
struct cu_group_tile {
    uint64_t at;
};

static __device__ inline struct cu_group_tile cu_group_tile_of(const uint16_t *tile)
{
    /* 1024 bytes from 8 columns to the next; swizzled by 128 bytes */
    return {(uint64_t)(cu_shared_address(tile) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
            (uint64_t)1 << 62};
}

#if CU_HAS_WGMMA
#define CU_4_SUMS(i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define CU_16_SUMS(i) CU_4_SUMS(i), CU_4_SUMS(i + 4), CU_4_SUMS(i + 8), CU_4_SUMS(i + 12)
#endif

/* Four warps, the first of them a multiple of four, multiply A (64 x 16), 16 rows in each warp's registers, by B (16 x N) in shared memory
 * and go on meanwhile: between cu_group_begin() and cu_group_end() stand products, and neither their A nor the sums are touched until
 * cu_group_wait(). Words of A are those of cu_frag_a. x[4 * n + i]: row lane / 4 + i / 2 * 8 of the warp's, column
 * 8 * n + lane % 4 * 2 + i % 2. */
template <int N> struct cu_group_sums {
    float x[N / 2];
};

template <int N> static __device__ inline void cu_group_begin(struct cu_group_sums<N> *sums, uint32_t a[][4], int n)
{
#if CU_HAS_WGMMA
    CU_UNROLL
    for (int i = 0; i < n; i++) /* A is there before what follows, whatever else the compiler moves */
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
    (void)sums;
}

/* By columns [16 which, 16 which + 16) of a tile that lies so many halves, a multiple of 512, behind b's. */
template <int N>
static __device__ inline void cu_group_mul(struct cu_group_sums<N> *sums, const uint32_t a[4], struct cu_group_tile b,
                                           int behind, int which)
{
#if CU_HAS_WGMMA
    float *x = sums->x;
    const uint64_t at = b.at + (uint64_t)(behind / 8 + which * 2); /* in units of 16 bytes */
    static_assert(N == 64 || N == 128, "a width that nobody uses");

    if constexpr (N == 128)
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
            "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
            "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
            "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, "
            "1, 0;"
            : CU_16_SUMS(0), CU_16_SUMS(16), CU_16_SUMS(32), CU_16_SUMS(48)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at));
    else
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
            "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
            "%31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
            : CU_16_SUMS(0), CU_16_SUMS(16)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(at));
#endif
}

template <int N> static __device__ inline void cu_group_end(struct cu_group_sums<N> *sums)
{
#if CU_HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
    (void)sums;
}

template <int N> static __device__ inline void cu_group_wait(struct cu_group_sums<N> *sums)
{
#if CU_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
    (void)sums;
}

#else

#define CU_HAS_BULK(wanted) (wanted)
#define CU_HAS_WGMMA 1

struct cu_landing {
    struct emu_landing state;
};

static inline uint32_t cu_sum_of_warp(uint32_t x)
{
    const uint32_t *all = static_cast<const uint32_t *>(emu_warp(&x, sizeof x));
    uint32_t sum = 0;

    for (int lane = 0; lane < 32; lane++)
        sum += all[lane];
    return sum;
}

static inline void cu_landing_init(struct cu_landing *l)
{
    emu_landing_init(&l->state);
}

static inline void cu_landing_expect(struct cu_landing *l, uint32_t bytes)
{
    emu_landing_expect(&l->state, bytes);
}

static inline void cu_bulk_copy(void *dst, const void *src, uint32_t bytes, struct cu_landing *l)
{
    emu_bulk_copy(dst, src, bytes, &l->state);
}

static inline void cu_landing_wait(struct cu_landing *l, uint32_t is_odd)
{
    cu_syncwarp(); /* who expects them has said so */
    emu_landing_wait(&l->state, is_odd);
}

static inline void cu_async_publish()
{
}

/* Products wait until somebody waits for them, and read shared memory then. */
template <int N> struct cu_group_sums {
    float x[N / 2];
    struct {
        uint32_t a[4][4]; /* of the four lanes that share this one's rows */
        const uint16_t *tile;
        int which;
    } waiting[8];
    int n;
};

template <int N> static inline void cu_group_begin(struct cu_group_sums<N> *, uint32_t[][4], int)
{
}

struct cu_group_tile {
    const uint16_t *at;
};

static inline struct cu_group_tile cu_group_tile_of(const uint16_t *tile)
{
    return {tile};
}

template <int N>
static inline void cu_group_mul(struct cu_group_sums<N> *sums, const uint32_t a[4], struct cu_group_tile b, int behind,
                                int which)
{
    const uint32_t(*all)[4] = static_cast<const uint32_t(*)[4]>(emu_warp(a, 4 * sizeof *a));
    const int first = (int)threadIdx.x % 32 / 4 * 4;

    memcpy(sums->waiting[sums->n].a, all[first], sizeof sums->waiting->a);
    sums->waiting[sums->n].tile = b.at + behind;
    sums->waiting[sums->n++].which = which;
}

template <int N> static inline void cu_group_end(struct cu_group_sums<N> *)
{
}

template <int N> static inline void cu_group_wait(struct cu_group_sums<N> *sums)
{
    for (int which = 0; which < sums->n; which++) {
        const uint16_t *tile = sums->waiting[which].tile;
        float a[2][16], b[16];

        for (int i = 0; i < 32; i++) /* A(8 row, k): lane k % 8 / 2, word row + k / 8 * 2 */
            a[i / 16][i % 16] =
                cu_half_to_f32((uint16_t)(sums->waiting[which].a[i % 8 / 2][i / 16 + i % 16 / 8 * 2] >> i % 2 * 16));
        for (int i = 0; i < N / 4; i++) {
            const int col = i / 2 * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
            for (int k = 0; k < 16; k++) {
                int piece = sums->waiting[which].which * 2 + k / 8;
                b[k] = cu_half_to_f32(tile[col * 64 + (piece ^ (col & 7)) * 8 + k % 8]);
            }
            for (int row = 0; row < 2; row++)
                for (int k = 0; k < 16; k++)
                    sums->x[i / 2 * 4 + row * 2 + i % 2] += a[row][k] * b[k];
        }
    }
    sums->n = 0;
}

static inline void cu_load_matrices(const uint16_t *row, uint32_t x[4])
{
    const uint16_t *const *rows = static_cast<const uint16_t *const *>(emu_warp(&row, sizeof row));
    int lane = (int)threadIdx.x % 32;

    for (int m = 0; m < 4; m++)
        memcpy(&x[m], rows[8 * m + lane / 4] + lane % 4 * 2, sizeof x[m]);
}

static inline uint32_t cu_pack_halves(float low, float high)
{
    return cu_f32_to_half(low) | (uint32_t)cu_f32_to_half(high) << 16;
}

/* Products of halves are exact in floats; the sum's order is one of those that tensor cores may have. */
static inline void cu_mma(float *acc, const struct cu_frag_a *a, const struct cu_frag_b *b)
{
    struct {
        struct cu_frag_a a;
        struct cu_frag_b b;
    } mine = {*a, *b};
    const unsigned bytes = sizeof mine;
    const char *all = static_cast<const char *>(emu_warp(&mine, bytes));
    int lane = (int)threadIdx.x % 32;

    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            /* A(row, k): lane row % 8 * 4 + k % 8 / 2, word row / 8 + k / 8 * 2; B(k, col): lane col * 4 + k % 8 / 2. */
            int at = k % 8 / 2;
            const uint32_t *wa = reinterpret_cast<const uint32_t *>(all + (unsigned)(row % 8 * 4 + at) * bytes);
            const uint32_t *wb = reinterpret_cast<const uint32_t *>(all + (unsigned)(col * 4 + at) * bytes) + 4;
            float x = cu_half_to_f32((uint16_t)(wa[row / 8 + k / 8 * 2] >> k % 2 * 16));
            float y = cu_half_to_f32((uint16_t)(wb[k / 8] >> k % 2 * 16));
            acc[i] += x * y;
        }
    }
}

static inline void cu_imma16(int *acc, uint32_t a0, uint32_t a1, uint32_t b)
{
    const uint32_t mine[3] = {a0, a1, b};
    const uint32_t *all = static_cast<const uint32_t *>(emu_warp(mine, sizeof mine));
    int lane = (int)threadIdx.x % 32;

    for (int i = 0; i < 4; i++)
        for (int at = 0; at < 4; at++) /* a row's, and a column's, 16 bytes are in 4 lanes */
            acc[i] = cu_dp4a((int)all[(lane / 4 * 4 + at) * 3 + i / 2],
                             (int)all[((lane % 4 * 2 + i % 2) * 4 + at) * 3 + 2], acc[i]);
}

static inline void cu_async_copy16(void *dst, const void *src)
{
    emu_async_copy(dst, src, 16);
}

static inline void cu_async_commit()
{
    emu_async_commit();
}

template <int N> static inline void cu_async_wait()
{
    emu_async_wait(N);
}

#endif

#endif
