/* The seam between the kernels and whoever compiles them: nvcc, or a plain C++ compiler on the emulated runtime. Kernels use
 * what stands here and what both languages share. Products and sums are rounded one by one unless fmaf is written (nvcc gets
 * --fmad=false), so that both give the bits of cpu/kern_ref.c. */
#ifndef FERRY_CUDA_DEVICE_CUH
#define FERRY_CUDA_DEVICE_CUH

#include "cuda/launch.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* 16 bytes in one piece. */
struct alignas(16) cu_word16 {
    uint32_t x[4];
};

/* ---- noting launches (host) ---- */

/* Each step can be undone: a word that differs leaves both halves different, until another one happens to make up for it in both. */
static inline void cu_key_add(struct cu_key *key, const void *p, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) {
        uint64_t word = 0, *h = key->half;
        memcpy(&word, static_cast<const char *>(p) + at, bytes - at < sizeof word ? bytes - at : sizeof word);
        h[0] = (h[0] ^ word) * UINT64_C(0x9e3779b97f4a7c15);
        h[0] ^= h[0] >> 32;
        h[1] = ((h[1] << 23 | h[1] >> 41) + word) * UINT64_C(0xd6e8feb86659fd93);
        h[1] ^= h[1] >> 29;
    }
}

/* Padding between arguments is nobody's: cleared where the compiler can do it, as gcc and nvcc do; elsewhere it may make equal launches
 * look different, which costs time. */
template <typename A> static inline void cu_clear_padding(A *args)
{
#ifdef __has_builtin
#if __has_builtin(__builtin_clear_padding)
    __builtin_clear_padding(args);
#endif
#endif
    (void)args;
}

/* Compilers do not know which member of a union is there: what is padding of it, what stands before the union, and what lies behind the
 * member is nobody's. */
template <typename A> static inline void cu_clear_beside(struct cu_row_op *op, A *member)
{
    memset(reinterpret_cast<char *>(&op->kind) + sizeof op->kind, 0, offsetof(struct cu_row_op, u) - sizeof op->kind);
    memset(reinterpret_cast<char *>(&op->u) + sizeof *member, 0, sizeof op->u - sizeof *member);
    cu_clear_padding(member);
}

static inline void cu_clear_padding(struct cu_row_op *op)
{
    switch (op->kind) {
    case CU_ROW_ROPE:
        return cu_clear_beside(op, &op->u.rope);
    case CU_ROW_ROUTE:
        return cu_clear_beside(op, &op->u.route);
    case CU_ROW_APPEND:
        return cu_clear_beside(op, &op->u.append);
    case CU_ROW_ACT:
        return cu_clear_beside(op, &op->u.act);
    case CU_ROW_L2:
        return cu_clear_beside(op, &op->u.l2);
    case CU_ROW_SPLIT:
        return cu_clear_beside(op, &op->u.split);
    default:
        return cu_clear_beside(op, &op->u.rows);
    }
}

static inline void cu_clear_padding(struct cu_chain *chain)
{
    for (int i = 0; i < chain->n_ops; i++)
        cu_clear_padding(&chain->op[i]);
    memset(chain->op + chain->n_ops, 0, sizeof chain->op - (size_t)chain->n_ops * sizeof *chain->op);
}

/* If launches are noted: that one of a kernel is. D: dim3. */
template <typename A, typename D>
static inline bool cu_note(void (*kernel)(A), D grid, D block, size_t bytes, const A &args)
{
    if (!cu_noting)
        return false;
    A copy = args;
    const uint64_t head[] = {
        sizeof args, reinterpret_cast<uint64_t>(kernel), grid.x, grid.y, grid.z, block.x, block.y, block.z, bytes};
    cu_clear_padding(&copy);
    cu_key_add(cu_noting, head, sizeof head);
    cu_key_add(cu_noting, &copy, sizeof copy);
    cu_noting->n++;
    return true;
}

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

template <typename A>
static inline cudaError_t cu_launch(void (*kernel)(A), dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                                    const A &args)
{
    if (cu_note(kernel, grid, block, bytes, args))
        return cudaSuccess;
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid, block, bytes, stream, &early, cu_overlap == CU_OVERLAP_REST ? 1u : 0u};
    void *arg = const_cast<void *>(static_cast<const void *>(&args));
    cu_launched++;
    cu_overlap = cu_overlap == CU_OVERLAP_FIRST ? CU_OVERLAP_REST : cu_overlap;
    cudaError_t e = cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(kernel), &arg);
    if (e)
        cudaGetLastError(); /* told once */
    return e;
}

/* The line of memory that this lies in is on its way. */
static __device__ inline void cu_prefetch(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* The first thing of every kernel, but for what needs nothing of the kernels before it: the next one may be brought up, and goes on from
 * here when those before it have ended and what they wrote can be read. A thread may call it again. */
static __device__ inline void cu_await()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* May come earlier: the next kernel may be brought up from now on, if all blocks have said so. */
static __device__ inline void cu_let_next()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#define CU_STRIP(...) __VA_ARGS__
/* kernel in parentheses; args: the one POD argument of a kernel. Gives a cudaError_t, and is counted or noted (launch.h). */
#define CU_LAUNCH(kernel, grid, block, bytes, stream, args) cu_launch(CU_STRIP kernel, grid, block, bytes, stream, args)
/* All shared memory is dynamic: (bytes) of the launch, cut by hand. */
#define CU_SHARED_DYN(T, name)                              \
    extern __shared__ __align__(16) char cu_shared_bytes[]; \
    T *name = reinterpret_cast<T *>(cu_shared_bytes)

/* At most so many threads a block; so many blocks at once on a multiprocessor should have registers. */
#define CU_BOUNDS(n_threads, n_blocks) __launch_bounds__(n_threads, n_blocks)
/* An argument that a kernel indexes: where it lies, not copied for each thread. */
#define CU_ARGS __grid_constant__

#define CU_ALL_LANES 0xffffffffu
/* The pointer, of which the compiler learns that it is one into device memory: one that was read from there could be any. */
#define CU_GLOBAL(p) (__builtin_assume(__isGlobal(p)), p)
/* Before a loop whose body stands as often as it runs; or so many times. */
#define CU_UNROLL _Pragma("unroll")
#define CU_UNROLL_BY(n) CU_PRAGMA(unroll n)
#define CU_PRAGMA(text) _Pragma(#text)

static __device__ inline int cu_shfl_xor(int x, int mask)
{
    return __shfl_xor_sync(CU_ALL_LANES, x, mask);
}

static __device__ inline float cu_shfl_xor(float x, int mask)
{
    return __shfl_xor_sync(CU_ALL_LANES, x, mask);
}

/* Lane `from`'s. */
static __device__ inline float cu_shfl(float x, int from)
{
    return __shfl_sync(CU_ALL_LANES, x, from);
}

static __device__ inline int cu_shfl(int x, int from)
{
    return __shfl_sync(CU_ALL_LANES, x, from);
}

/* The lanes of the warp, a bit each, that brought the same. */
static __device__ inline uint32_t cu_match(int x)
{
    return __match_any_sync(CU_ALL_LANES, x);
}

static __device__ inline int cu_n_bits(uint32_t x)
{
    return __popc(x);
}

static __device__ inline void cu_syncwarp()
{
    __syncwarp();
}

static __device__ inline int cu_dp4a(int a, int b, int sum)
{
    return __dp4a(a, b, sum);
}

/* The bytes of a are unsigned. */
static __device__ inline int cu_dp4a_u8(uint32_t a, int b, int sum)
{
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
    return d;
}

/* sum + two signed 16-bit numbers of a times the lower two unsigned bytes of b; or the upper two. */
static __device__ inline int cu_dp2a_low(uint32_t a, uint32_t b, int sum)
{
    int d;
    asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
    return d;
}

static __device__ inline int cu_dp2a_high(uint32_t a, uint32_t b, int sum)
{
    int d;
    asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
    return d;
}

/* Byte i of the result is that of b:a which nibble i of `which`, below 8, names. */
static __device__ inline uint32_t cu_byte_perm(uint32_t a, uint32_t b, uint32_t which)
{
    return __byte_perm(a, b, which);
}

/* The same, but that nibbles of the lower half of `which` may be 8 or more: there byte i is 0 or 255, the highest bit of the byte that the
 * other three bits name. What the upper half of `which` holds does not matter. */
static __device__ inline uint32_t cu_byte_or_sign(uint32_t a, uint32_t b, uint32_t which)
{
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
    return d;
}

/* N words at any address: those that hold them, shifted together. Bytes beside them in the outer words are read, too. */
template <int N> static __device__ inline void cu_load_words(const uint8_t *p, uint32_t *out)
{
    unsigned shift = (unsigned)(reinterpret_cast<uintptr_t>(p) & 3) * 8;
    const uint32_t *from = reinterpret_cast<const uint32_t *>(p - shift / 8);
    uint32_t word = from[0];
    CU_UNROLL
    for (int i = 0; i < N; i++) {
        uint32_t next = i < N - 1 || shift ? from[i + 1] : 0;
        out[i] = __funnelshift_r(word, next, shift);
        word = next;
    }
}

/* N words in shared memory, from bit `further` of p on, which is below 8, where the word behind them can be read, too: it is, wherever they
 * begin, which costs less than to ask. */
template <int N> static __device__ inline void cu_load_shared_words(const uint8_t *p, uint32_t *out, int further = 0)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(p);
    const uint32_t *from = static_cast<const uint32_t *>(__cvta_shared_to_generic(at & ~3u));
    uint32_t word = from[0];
    CU_UNROLL
    for (int i = 0; i < N; i++) {
        uint32_t next = from[i + 1];
        out[i] = __funnelshift_r(word, next, at * 8 + further); /* by what it is more than a multiple of 32 */
        word = next;
    }
}

static __device__ inline float cu_half_to_f32(uint16_t h)
{
    return __half2float(__ushort_as_half(h));
}

static __device__ inline uint16_t cu_f32_to_half(float x)
{
    return __half_as_ushort(__float2half_rn(x));
}

#else

#include <emu.h> /* the emulated runtime's folder is on the path of such builds */

#include "quant/quant.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define CU_BOUNDS(n_threads, n_blocks)
#define CU_ARGS
#define CU_GLOBAL(p) (p)
#define CU_UNROLL
#define CU_UNROLL_BY(n)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz)
    {
    }
};

#define threadIdx (emu_here.thread_idx)
#define blockIdx (emu_here.block_idx)
#define blockDim (emu_here.block_dim)
#define gridDim (emu_here.grid_dim)
#define __syncthreads() emu_barrier()

template <typename A> struct cu_closure {
    void (*kernel)(A);
    A args;
};

template <typename A> void cu_closure_call(const void *p)
{
    const cu_closure<A> *c = static_cast<const cu_closure<A> *>(p);
    c->kernel(c->args);
}

template <typename A>
cudaError_t cu_closure_launch(const char *name, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                              void (*kernel)(A), const A &args)
{
    if (cu_note(kernel, grid, block, bytes, args))
        return cudaSuccess;
    cu_launched++;
    cu_closure<A> c = {kernel, args};
    struct emu_launch l = {
        name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, bytes, cu_closure_call<A>, &c, sizeof c, 0, NULL,
        false};
    l.args_off = (size_t)(reinterpret_cast<const char *>(&c.args) - reinterpret_cast<const char *>(&c));
    l.kernel = reinterpret_cast<const void *>(kernel);
    l.is_early = cu_overlap == CU_OVERLAP_REST;
    cu_overlap = cu_overlap == CU_OVERLAP_FIRST ? CU_OVERLAP_REST : cu_overlap;
    return emu_launch(&l, stream);
}

#define CU_STRIP(...) __VA_ARGS__
#define CU_LAUNCH(kernel, grid, block, bytes, stream, args) \
    cu_closure_launch(#kernel, grid, block, bytes, stream, CU_STRIP kernel, args)
#define CU_SHARED_DYN(T, name) T *name = reinterpret_cast<T *>(emu_here.shared)

template <typename T> static inline T cu_shfl_xor(T x, int mask)
{
    const T *all = static_cast<const T *>(emu_warp(&x, sizeof x));
    return all[(threadIdx.x % 32) ^ (unsigned)mask];
}

template <typename T> static inline T cu_shfl(T x, int from)
{
    return static_cast<const T *>(emu_warp(&x, sizeof x))[from];
}

static inline uint32_t cu_match(int x)
{
    const int *all = static_cast<const int *>(emu_warp(&x, sizeof x));
    uint32_t alike = 0;
    for (int i = 0; i < 32; i++)
        alike |= (uint32_t)(all[i] == x) << i;
    return alike;
}

static inline int cu_n_bits(uint32_t x)
{
    return __builtin_popcount(x);
}

static inline void cu_prefetch(const void *)
{
}

static inline void cu_await()
{
    emu_await();
}

static inline void cu_let_next()
{
}

static inline void cu_syncwarp()
{
    int nothing = 0;
    emu_warp(&nothing, sizeof nothing);
}

static inline int cu_dp4a(int a, int b, int sum)
{
    for (int i = 0; i < 32; i += 8)
        sum += (int8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
}

static inline int cu_dp4a_u8(uint32_t a, int b, int sum)
{
    for (int i = 0; i < 32; i += 8)
        sum += (uint8_t)(a >> i) * (int8_t)(b >> i);
    return sum;
}

static inline int cu_dp2a_low(uint32_t a, uint32_t b, int sum)
{
    return sum + (int16_t)a * (int)(b & 255) + (int16_t)(a >> 16) * (int)(b >> 8 & 255);
}

static inline int cu_dp2a_high(uint32_t a, uint32_t b, int sum)
{
    return cu_dp2a_low(a, b >> 16, sum);
}

static inline uint32_t cu_byte_perm(uint32_t a, uint32_t b, uint32_t which)
{
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++)
        out |= (uint32_t)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return out;
}

static inline uint32_t cu_byte_or_sign(uint32_t a, uint32_t b, uint32_t which)
{
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t nibble = which >> 4 * i & 15, byte = (uint32_t)(both >> (nibble & 7) * 8 & 255);
        out |= (nibble < 8 ? byte : byte >> 7 ? 255 : 0) << 8 * i;
    }
    return out;
}

template <int N> static inline void cu_load_words(const uint8_t *p, uint32_t *out)
{
    memcpy(out, p, 4 * N);
}

template <int N> static inline void cu_load_shared_words(const uint8_t *p, uint32_t *out, int further = 0)
{
    memcpy(out, p, 4 * N);
    for (int i = 0; i < N && further; i++) /* of the last word's last byte nobody wants more */
        out[i] = out[i] >> further | (i < N - 1 ? out[i + 1] << (32 - further) : 0);
}

static inline float cu_half_to_f32(uint16_t h)
{
    return quant_f16_to_f32(h);
}

static inline uint16_t cu_f32_to_half(float x)
{
    return quant_f32_to_f16(x);
}

#endif

/* N floats that are read and written at once: aligned to all of their bytes. */
template <int N> struct alignas(4 * N) cu_floats {
    float x[N];
};

static __device__ inline float cu_f32_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static __device__ inline uint32_t cu_bits_of_f32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* 4 bytes, 8, or 16; as many divide the address. */
static __device__ inline uint32_t cu_load_word(const void *p)
{
    return *static_cast<const uint32_t *>(p);
}

static __device__ inline void cu_load8(const void *p, uint32_t *out)
{
    struct alignas(8) two {
        uint32_t x[2];
    } w = *static_cast<const struct two *>(p);
    out[0] = w.x[0];
    out[1] = w.x[1];
}

static __device__ inline struct cu_word16 cu_load16(const void *p)
{
    return *static_cast<const struct cu_word16 *>(p);
}

/* An even number N of words at an address that 8 divides, or 16 where N is 4 or more. */
template <int N> static __device__ inline void cu_load_wide(const void *p, uint32_t *out)
{
    for (int at = 0; at < N / 4 * 4; at += 4) {
        struct cu_word16 w = cu_load16(static_cast<const char *>(p) + 4 * at);
        for (int i = 0; i < 4; i++)
            out[at + i] = w.x[i];
    }
    if (N % 4)
        cu_load8(static_cast<const char *>(p) + 4 * (N / 4 * 4), out + N / 4 * 4);
}

/* a - b in each byte. */
static __device__ inline uint32_t cu_sub4(uint32_t a, uint32_t b)
{
    const uint32_t top = 0x80808080u;
    return ((a | top) - (b & ~top)) ^ ((a ^ ~b) & top);
}

#endif
