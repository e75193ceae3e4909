/* A step's slots by expert, and tiles of them: the lists that products of experts want, made where the router's choice lies, so that the
 * host need not see it. A counting sort by one block: experts ascend, and of each its slots; no atomics, no order of warps shows. */
#include "cuda/launch.h"

#include "cuda/device.cuh"

/* Each warp counts for itself; there are as many as that leaves room for. */
enum { MOST_WARPS = 32, SHARED_BYTES = 48 * 1024 };

/* The arguments, and what the block shares. */
struct crew {
    const struct cu_permute_args *a;
    const struct cu_permute_list *l;
    int n_warps;
    int *counts;    /* (n_warps, n_expert) slots of a warp's; then, how many come before those */
    int *first;     /* (n_expert + 1) where an expert's slots begin */
    uint16_t *tile; /* (n_expert) and its tiles: a step has fewer than 2^16 slots */
};

static __device__ inline struct crew crew_of(const struct cu_permute_args *a, const struct cu_permute_list *l,
                                             int *shared)
{
    const int n_warps = (int)blockDim.x / 32;
    int *const first = shared + n_warps * a->n_expert;

    return {a, l, n_warps, shared, first, reinterpret_cast<uint16_t *>(first + a->n_expert + 1)};
}

/* Of the lane's slot: its expert; -1: there is none. */
static __device__ inline int expert_at(const struct crew *c, int slot, int end)
{
    if (slot >= end)
        return -1;
    const int row = slot / c->a->k;
    const int id = c->a->ids[row * c->a->ids_stride + (slot - row * c->a->k)];
    return id >= 0 && id < c->a->n_expert ? id : -1;
}

/* A warp's share of the slots: neighbours, of which it takes 32 at a time. */
static __device__ inline void share_of(const struct crew *c, int *first, int *end)
{
    const int n = c->l->end - c->l->first, each = (n + 32 * c->n_warps - 1) / (32 * c->n_warps) * 32;

    *first = c->l->first + (int)threadIdx.x / 32 * each;
    *end = *first + each < c->l->end ? *first + each : c->l->end;
}

static __device__ inline void count(const struct crew *c)
{
    const int lane = (int)threadIdx.x % 32;
    int *const mine = c->counts + (int)threadIdx.x / 32 * c->a->n_expert;
    int first, end;

    share_of(c, &first, &end);
    for (int at = first; at < end; at += 32) {
        const int id = expert_at(c, at + lane, end);
        const uint32_t alike = cu_match(id);
        if (id >= 0 && (alike & ((1u << lane) - 1)) == 0) /* the first of those that are alike */
            mine[id] += cu_n_bits(alike);
        cu_syncwarp();
    }
}

/* Of each expert, how many slots earlier warps have; c->first: how many all have. */
static __device__ inline void add_warps_up(const struct crew *c)
{
    const int n = c->a->n_expert;

    for (int e = (int)threadIdx.x; e < n; e += (int)blockDim.x) {
        int sum = 0;
        for (int warp = 0; warp < c->n_warps; warp++) {
            const int more = c->counts[warp * n + e];
            c->counts[warp * n + e] = sum;
            sum += more;
        }
        c->first[e] = sum;
    }
}

/* What lower lanes have. */
static __device__ inline int before_lane(int mine)
{
    const int lane = (int)threadIdx.x % 32;
    int sum = mine;

    for (int step = 1; step < 32; step *= 2) {
        const int other = cu_shfl(sum, lane >= step ? lane - step : lane);
        sum += lane >= step ? other : 0;
    }
    return sum - mine;
}

static __device__ inline int n_tiles_of(const struct crew *c, int n)
{
    return (n + c->l->tile_tok - 1) / c->l->tile_tok;
}

/* From numbers of slots to where they begin, by one warp: neighbouring experts to a lane. */
static __device__ inline void add_experts_up(const struct crew *c)
{
    const int n = c->a->n_expert, each = (n + 31) / 32, from = (int)threadIdx.x * each;
    const int end = from + each < n ? from + each : n;
    int n_slots = 0, n_tiles = 0;

    for (int e = from; e < end; e++) {
        n_slots += c->first[e];
        n_tiles += n_tiles_of(c, c->first[e]);
    }
    int slot = before_lane(n_slots), tile = before_lane(n_tiles);
    for (int e = from; e < end; e++) {
        const int mine = c->first[e];
        c->first[e] = slot;
        c->tile[e] = (uint16_t)tile;
        slot += mine;
        tile += n_tiles_of(c, mine);
    }
    if (threadIdx.x == 31) { /* whether it has experts or not, it knows what all have */
        c->first[n] = slot;
        *c->l->n_tiles = tile;
    }
}

static __device__ inline void cut(const struct crew *c)
{
    for (int e = (int)threadIdx.x; e < c->a->n_expert; e += (int)blockDim.x) {
        struct cu_tile *to = c->l->tiles + c->tile[e];
        for (int at = c->first[e], end = c->first[e + 1]; at < end; at += c->l->tile_tok)
            *to++ = {e, at, end - at < c->l->tile_tok ? end - at : c->l->tile_tok};
    }
}

static __device__ inline void place(const struct crew *c)
{
    const int lane = (int)threadIdx.x % 32;
    int *const mine = c->counts + (int)threadIdx.x / 32 * c->a->n_expert;
    int first, end;

    share_of(c, &first, &end);
    for (int at = first; at < end; at += 32) {
        const int id = expert_at(c, at + lane, end);
        const uint32_t alike = cu_match(id);
        const int before = cu_n_bits(alike & ((1u << lane) - 1));
        if (id >= 0)
            c->l->slot[c->first[id] + mine[id] + before] = at + lane;
        cu_syncwarp(); /* all of them have read how many there were */
        if (id >= 0 && before == 0)
            mine[id] += cu_n_bits(alike);
        cu_syncwarp();
    }
}

/* A block for each list. */
static __global__ void CU_BOUNDS(32 * MOST_WARPS, 1) permute(const CU_ARGS struct cu_permute_args a)
{
    CU_SHARED_DYN(int, shared);
    const struct crew c = crew_of(&a, &a.list[blockIdx.x], shared);

    for (int i = (int)threadIdx.x; i < c.n_warps * a.n_expert; i += (int)blockDim.x)
        c.counts[i] = 0;
    __syncthreads();
    cu_await();
    count(&c);
    __syncthreads();
    add_warps_up(&c);
    __syncthreads();
    if (threadIdx.x < 32)
        add_experts_up(&c);
    __syncthreads();
    cut(&c);
    place(&c);
}

/* Each expert has at least one slot for its first tile, and tile_tok for each further one. */
int cu_permute_most_tiles(int n_slots, int n_expert, int tile_tok)
{
    const int n_first = n_slots < n_expert ? n_slots : n_expert;
    return n_first + (n_slots - n_first) / tile_tok;
}

static size_t shared_bytes(int n_warps, int n_expert)
{
    return (size_t)(n_warps + 1) * (size_t)n_expert * sizeof(int) + sizeof(int) + (size_t)n_expert * sizeof(uint16_t);
}

cudaError_t cu_permute(const struct cu_permute_args *a, cudaStream_t stream)
{
    int n_slots = 0, n_warps = MOST_WARPS;

    for (int i = 0; i < a->n_lists; i++)
        n_slots = a->list[i].end - a->list[i].first > n_slots ? a->list[i].end - a->list[i].first : n_slots;
    n_warps = n_warps < (n_slots + 31) / 32 ? n_warps : (n_slots + 31) / 32;
    while (n_warps > 1 && shared_bytes(n_warps, a->n_expert) > SHARED_BYTES)
        n_warps--;
    return CU_LAUNCH((permute), dim3((unsigned)a->n_lists), dim3(32 * (unsigned)n_warps),
                     shared_bytes(n_warps, a->n_expert), stream, *a);
}
