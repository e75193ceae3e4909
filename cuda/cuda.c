/* Owns the device handle: its streams, its memory, and what goes up with each call of run. One stream holds everything but what
 * the host computes meanwhile: that goes up on a stream of its own, and meets the ops at an event. What a call needs (tokens,
 * positions, page tables, experts) is written into a slot of pinned memory, used again when its call is done, and fetched from there
 * to the one place on the device where the ops of every call find it. */
#include "cuda/cuda.h"

#include "cuda/graph.h"
#include "cuda/ops.h"
#include "quant/iq_grid.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/device/device_check.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

/* Calls under way before the host waits for the first: a step of a dense model is one call. */
enum { N_SLOTS = 4 };

/* Steps of so many rows without a prompt's come again and again, and are so short that launching takes as long as computing: attention
 * is split by segments up to as many. */
enum { GRAPH_ROWS = 8 };

/* Rows, and of experts slots, are counted by the second dimension of grids. */
enum { MAX_ROWS = 65535 };

/* Downloads pass through pinned memory in pieces. */
#define DOWN_BYTES (256 * KIB)

struct slot {
    char *host;       /* own: (slot_bytes), pinned */
    cudaEvent_t done; /* own */
};

struct cuda {
    struct device device; /* first: the handle */
    struct cuda_opts opts;
    cudaStream_t stream, up, back,
        copies; /* own, as all below: ops and copies that follow their order; sent beside them; brought; carried */
    cudaEvent_t sent, brought; /* all that was sent before the last meet; all that was brought */
    cudaEvent_t *fences;       /* (opts.most.n_fences) with times */
    cudaEvent_t down_done;     /* all that was fetched */
    cudaEvent_t queued;        /* what was queued before the last send_after */
    struct slot slots[N_SLOTS];
    char *said; /* (slot_bytes) on the device: what the call says whose ops run */
    uint64_t slot_bytes, n_calls, n_launches;
    struct graph_cache graphs;
    char *down; /* pinned (DOWN_BYTES) */
    struct cu_books *books;
    struct cu_card card;
    char *scratch; /* view */
    uint64_t scratch_bytes;
};

static struct cuda *cuda_of(struct device *dev)
{
    return (struct cuda *)dev;
}

static int failed(cudaError_t e, const char *what)
{
    return e ? err(ERR_DEVICE, "CUDA: %s: %s", what, cudaGetErrorString(e)) : 0;
}

/* Which GPU a thread means is its own affair: calls may come from another one than opened the device, or behind code that has chosen
 * another GPU. */
static cudaError_t choose(const struct cuda *c)
{
    return cudaSetDevice(c->opts.ordinal);
}

/* ---- memory ---- */

static int dev_alloc(struct device *dev, uint64_t bytes, void **out)
{
    cudaError_t e = choose(cuda_of(dev));
    if (!e) /* kernels read words of which the last bytes may be nobody's */
        e = cudaMalloc(out, size_up(bytes, 16));
    if (!e)
        return 0;
    *out = NULL;
    cudaGetLastError(); /* an error that was told is not told again by the next launch */
    return e == cudaErrorMemoryAllocation ? err(ERR_NOMEM, "%" PRIu64 " bytes on the GPU", bytes)
                                          : failed(e, "cudaMalloc");
}

static void dev_release(struct device *dev, void *ptr)
{
    choose(cuda_of(dev)); /* if that fails there is nobody to tell, as with what follows */
    cudaFree(ptr);
}

static int upload(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, c->stream);
    return failed(e, "upload");
}

static int download(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);

    for (uint64_t at = 0; at < bytes; at += DOWN_BYTES) {
        uint64_t n = bytes - at < DOWN_BYTES ? bytes - at : DOWN_BYTES;
        cudaError_t e = choose(c);
        if (!e)
            e = cudaMemcpyAsync(c->down, (const char *)src + at, n, cudaMemcpyDeviceToHost, c->stream);
        if (!e)
            e = cudaStreamSynchronize(c->stream);
        if (e)
            return failed(e, "download");
        memcpy((char *)dst + at, c->down, n);
    }
    return 0;
}

static int alloc_host(struct device *dev, uint64_t bytes, void **out)
{
    cudaError_t e = choose(cuda_of(dev));
    if (!e)
        e = cudaHostAlloc(out, bytes, cudaHostAllocDefault);
    if (!e)
        return 0;
    *out = NULL;
    cudaGetLastError();
    return e == cudaErrorMemoryAllocation
               ? err(ERR_NOMEM, "%" PRIu64 " bytes of pinned memory, which the GPU copies from", bytes)
               : failed(e, "cudaHostAlloc");
}

static void release_host(struct device *dev, void *ptr)
{
    choose(cuda_of(dev));
    cudaFreeHost(ptr);
}

static void wait_for_all(struct cuda *c)
{
    cudaStreamSynchronize(c->up);
    cudaStreamSynchronize(c->copies);
    cudaStreamSynchronize(c->stream);
}

/* What was queued must not run on into memory that the caller takes back. */
static int stop(struct cuda *c, cudaError_t e, const char *what)
{
    if (e)
        wait_for_all(c);
    return failed(e, what);
}

static int fetch(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, c->stream);
    if (!e)
        e = cudaEventRecord(c->down_done, c->stream);
    return stop(c, e, "fetch");
}

static int fetched(struct device *dev)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaEventSynchronize(c->down_done);
    return stop(c, e, "fetch");
}

static int send_up(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, c->up);
    return stop(c, e, "send");
}

static int bring(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, c->back);
    if (!e)
        e = cudaEventRecord(c->brought, c->back);
    if (e)
        cudaStreamSynchronize(c->back);
    return stop(c, e, "bring");
}

static int brought(struct device *dev, bool wait, bool *is_there)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = wait ? cudaEventSynchronize(c->brought) : cudaEventQuery(c->brought);
    *is_there = e == cudaSuccess;
    if (e == cudaErrorNotReady) {
        cudaGetLastError(); /* that was an answer, which the next launch shall not be told */
        return 0;
    }
    if (e)
        cudaStreamSynchronize(c->back);
    return failed(e, "bring");
}

/* What `later` is given from here on comes after all that `earlier` holds now. */
static int put_after(struct cuda *c, cudaStream_t later, cudaStream_t earlier, cudaEvent_t event, const char *what)
{
    cudaError_t e = choose(c);

    if (!e)
        e = cudaEventRecord(event, earlier);
    if (!e)
        e = cudaStreamWaitEvent(later, event, 0);
    return stop(c, e, what);
}

static int meet(struct device *dev)
{
    struct cuda *c = cuda_of(dev);

    return put_after(c, c->stream, c->up, c->sent, "meet");
}

static int send_after(struct device *dev)
{
    struct cuda *c = cuda_of(dev);

    return put_after(c, c->up, c->stream, c->queued, "send after");
}

/* ---- what is carried, and fences ---- */

/* What a refusal leaves behind shows in the next call: a few bytes are fetched, for which nobody waits but this. */
static int pin(struct device *dev, void *p, uint64_t bytes, bool *is_pinned)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    *is_pinned = !e && !cudaHostRegister(p, bytes, cudaHostRegisterDefault);
    if (e || *is_pinned)
        return failed(e, "pin");
    cudaGetLastError(); /* as in alloc_host() */
    e = cudaMemcpyAsync(c->down, c->books, 64, cudaMemcpyDeviceToHost, c->stream);
    if (!e)
        e = cudaStreamSynchronize(c->stream);
    return failed(e, "after memory could not be pinned");
}

static void unpin(struct device *dev, void *p)
{
    choose(cuda_of(dev));
    cudaHostUnregister(p);
}

static int carry(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, c->copies);
    return stop(c, e, "carry");
}

static cudaStream_t queue_of(const struct cuda *c, enum device_queue queue)
{
    return queue == DEVICE_OPS ? c->stream : c->copies;
}

static int check_fence(const struct cuda *c, int f)
{
    return f >= 0 && f < c->opts.most.n_fences
               ? 0
               : err(ERR_ARG, "fence %d; CUDA was opened for %d", f, c->opts.most.n_fences);
}

static int fence(struct device *dev, enum device_queue queue, int f)
{
    struct cuda *c = cuda_of(dev);
    int rc = check_fence(c, f);

    if (rc < 0)
        return rc;
    cudaError_t e = choose(c);
    if (!e)
        e = cudaEventRecord(c->fences[f], queue_of(c, queue));
    return stop(c, e, "fence");
}

static int follow(struct device *dev, enum device_queue queue, int f)
{
    struct cuda *c = cuda_of(dev);
    int rc = check_fence(c, f);

    if (rc < 0)
        return rc;
    cudaError_t e = choose(c);
    if (!e)
        e = cudaStreamWaitEvent(queue_of(c, queue), c->fences[f], 0);
    return stop(c, e, "follow");
}

static int passed(struct device *dev, int f, bool wait, bool *is_passed)
{
    struct cuda *c = cuda_of(dev);
    int rc = check_fence(c, f);

    *is_passed = false;
    if (rc < 0)
        return rc;
    cudaError_t e = choose(c);
    if (!e)
        e = wait ? cudaEventSynchronize(c->fences[f]) : cudaEventQuery(c->fences[f]);
    *is_passed = e == cudaSuccess;
    if (e == cudaErrorNotReady) {
        cudaGetLastError(); /* as in brought() */
        return 0;
    }
    return stop(c, e, "fence");
}

static int span_ns(struct device *dev, int from, int to, uint64_t *ns)
{
    struct cuda *c = cuda_of(dev);
    int rc = check_fence(c, from);
    float ms = 0;

    *ns = 0;
    if (rc == 0)
        rc = check_fence(c, to);
    if (rc < 0)
        return rc;
    cudaError_t e = choose(c);
    if (!e)
        e = cudaEventElapsedTime(&ms, c->fences[from], c->fences[to]);
    *ns = ms > 0 ? (uint64_t)((double)ms * 1e6) : 0;
    return stop(c, e, "time");
}

static uint64_t n_launches(const struct device *dev)
{
    return ((const struct cuda *)dev)->n_launches;
}

static int copy(struct device *dev, void *dst, const void *src, uint64_t bytes)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, c->stream);
    return failed(e, "copy");
}

/* ---- what goes up with a call ---- */

/* Fills a slot; places are the same on both sides. What changes from token to token though the launches do not, page tables, is packed
 * last: the addresses of all else are then the same again, and launches find their graph. */
struct packer {
    char *host, *dev; /* (bytes) */
    uint64_t bytes, used;
    bool is_full;
};

/* The same bytes on both sides. */
struct place {
    void *host, *dev;
};

/* Room for bytes; host is NULL when there is none left. */
static struct place pack(struct packer *p, uint64_t bytes)
{
    uint64_t at = size_up(p->used, 64);

    p->is_full = p->is_full || bytes > p->bytes || at > p->bytes - bytes;
    if (p->is_full)
        return (struct place){NULL, NULL};
    p->used = at + bytes;
    return (struct place){p->host + at, p->dev + at};
}

/* A copy of bytes, of which the device's address is returned; NULL for NULL. */
static void *pack_copy(struct packer *p, const void *x, uint64_t bytes)
{
    struct place at = x ? pack(p, bytes) : (struct place){NULL, NULL};

    if (at.host && bytes)
        memcpy(at.host, x, bytes);
    return at.dev;
}

static const int32_t *pack_ints(struct packer *p, const int32_t *x, int n)
{
    return pack_copy(p, x, (uint64_t)n * sizeof *x);
}

static int64_t pages_of(int64_t n_tok)
{
    return (n_tok + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK;
}

/* Positions of a sequence as far as the step's rows reach. */
static int64_t reach_of(const struct rows *rows, int seq)
{
    int64_t n_tok = 0;

    for (int i = 0; i < rows->n; i++)
        if (rows->seq[i] == seq && rows->pos[i] >= n_tok)
            n_tok = (int64_t)rows->pos[i] + 1;
    return n_tok;
}

static void *const *const *pack_pages(struct packer *p, const struct rows *rows, int n_seqs)
{
    struct place at = pack(p, (uint64_t)n_seqs * DEVICE_MAX_GROUPS * sizeof(void *));
    void **tables = at.host;

    for (int i = 0; i < n_seqs * DEVICE_MAX_GROUPS && !p->is_full; i++) {
        void *const *table = rows->seqs[i / DEVICE_MAX_GROUPS].page[i % DEVICE_MAX_GROUPS];
        uint64_t n_pages = (uint64_t)pages_of(reach_of(rows, i / DEVICE_MAX_GROUPS));
        tables[i] = n_pages ? pack_copy(p, table, n_pages * sizeof *table) : NULL;
    }
    return at.dev;
}

/* Each sequence's records before and after the step. */
static void *const *pack_records(struct packer *p, const struct rows *rows, int n_seqs)
{
    struct place at = pack(p, (uint64_t)n_seqs * 2 * sizeof(void *));
    const void **records = at.host;

    for (int i = 0; i < n_seqs && !p->is_full; i++) {
        records[2 * i] = rows->seqs[i].record;
        records[2 * i + 1] = rows->seqs[i].next_record;
    }
    return at.dev;
}

/* Where each sequence's rows begin, and the end of all. */
static const int32_t *pack_stretches(struct packer *p, const struct rows *rows, int *n_stretches)
{
    int n = 0, at = 0;

    for (int i = 0; i < rows->n; i++)
        n += i == 0 || rows->seq[i] != rows->seq[i - 1];
    struct place place = pack(p, ((uint64_t)n + 1) * sizeof(int32_t));
    int32_t *first = place.host;
    for (int i = 0; i < rows->n && !p->is_full; i++)
        if (i == 0 || rows->seq[i] != rows->seq[i - 1])
            first[at++] = i;
    if (!p->is_full)
        first[n] = rows->n;
    *n_stretches = n;
    return place.dev;
}

/* Slots [first, end) that expert e has. */
static int n_slots_of(const struct op_moe *m, int e, int first, int end)
{
    int n = 0;

    for (int i = m->experts[e].first; i < m->experts[e].first + m->experts[e].n; i++)
        n += m->slot[i] >= first && m->slot[i] < end;
    return n;
}

/* Slots [first, end) of the listed experts, by expert, and tiles of them; tile_tok is 0: as integer dots want it for n_rows rows. */
static void pack_slots(struct packer *p, const struct op_moe *m, int first, int end, int n_rows, struct ops_slots *out)
{
    for (int e = 0; e < m->n_experts; e++)
        out->n_place += n_slots_of(m, e, first, end);
    if (out->tile_tok == 0)
        out->tile_tok = ops_tile_tok(n_rows, out->n_place, m->n_experts);
    for (int e = 0; e < m->n_experts; e++)
        out->n_tiles += (n_slots_of(m, e, first, end) + out->tile_tok - 1) / out->tile_tok;
    struct place slots = pack(p, (uint64_t)out->n_place * sizeof(int32_t));
    struct place tiles = pack(p, (uint64_t)out->n_tiles * sizeof(struct cu_tile));
    int32_t *slot = slots.host;
    struct cu_tile *tile = tiles.host;
    out->slot = slots.dev;
    out->tiles = tiles.dev;
    for (int e = 0, n = 0; e < m->n_experts && !p->is_full; e++) {
        int begin = n;
        for (int i = m->experts[e].first; i < m->experts[e].first + m->experts[e].n; i++)
            if (m->slot[i] >= first && m->slot[i] < end)
                slot[n++] = m->slot[i];
        for (int at = begin; at < n; at += out->tile_tok)
            *tile++ = (struct cu_tile){e, at, n - at < out->tile_tok ? n - at : out->tile_tok};
    }
}

/* Experts, and the slots of their rows. */
static void pack_moe(struct packer *p, const struct op *op, int n_rows, struct ops_run *run)
{
    const struct op_moe *m = &op->p.moe;
    int n_gemm = ops_moe_gemm_rows(run, op, &run->gemm.tile_tok) * m->k;

    pack_slots(p, m, n_gemm, INT_MAX, n_rows, &run->dots);
    if (n_gemm)
        pack_slots(p, m, 0, n_gemm, n_rows, &run->gemm);
    struct place at = pack(p, (uint64_t)m->n_experts * sizeof(struct cu_expert));
    struct cu_expert *experts = at.host;
    run->experts = at.dev;
    for (int e = 0; e < m->n_experts && !p->is_full; e++)
        for (int i = 0; i < 3; i++) {
            experts[e].w[i] = m->experts[e].w[i];
            experts[e].bias[i] = m->experts[e].bias[i];
            experts[e].scale[i] = m->experts[e].scale[i];
        }
}

static uint64_t slot_bytes_of(const struct device_step *o)
{
    uint64_t n_rows = (uint64_t)o->n_rows, n_seqs = (uint64_t)o->n_seqs, n_slots = n_rows * (uint64_t)o->n_expert_used;
    uint64_t rows = 4 * size_up(n_rows * sizeof(int32_t), 64);
    uint64_t table = size_up((uint64_t)pages_of(o->n_ctx) * sizeof(void *), 64) + 64;
    uint64_t experts = (uint64_t)o->n_expert * sizeof(struct cu_expert) +
                       n_slots * (sizeof(struct cu_tile) + sizeof(int32_t)) + 5 * UINT64_C(64);
    uint64_t records = size_up(n_seqs * 2 * sizeof(void *), 64) + size_up((n_seqs + 1) * sizeof(int32_t), 64);
    return size_up(rows + n_seqs * DEVICE_MAX_GROUPS * table + experts + records + 256, 64);
}

/* ---- run ---- */

static int n_seqs_of(const struct rows *rows)
{
    int n = 0;
    for (int i = 0; rows->seq && i < rows->n; i++)
        n = rows->seq[i] >= n ? rows->seq[i] + 1 : n;
    return n;
}

static int check(const struct cuda *c, const struct op *ops, int n_ops, const struct rows *rows)
{
    int n_moe = 0;

    for (int i = 0; i < n_ops; i++) {
        if (!ops_can(&ops[i]))
            return err(ERR_ARG, "CUDA cannot run %s of layer %d with these types and shapes",
                       device_op_name(ops[i].kind), ops[i].layer);
        if (!ops_can_read(&ops[i]))
            return err(ERR_UNSUPPORTED,
                       "CUDA cannot read weights of %s of layer %d where they lie: a file whose "
                       "general.alignment is less than 16 has to be written anew",
                       device_op_name(ops[i].kind), ops[i].layer);
        int rc = device_check_step(&ops[i], rows);
        if (rc < 0)
            return rc;
        n_moe += ops[i].kind == OP_MOE && ops[i].p.moe.experts;
        if (ops[i].kind == OP_MOE && ops[i].p.moe.k > MAX_ROWS / (rows->n > 0 ? rows->n : 1))
            return err(ERR_LIMIT, "%d experts of each of %d rows; CUDA takes %d in all", ops[i].p.moe.k, rows->n,
                       MAX_ROWS);
        uint64_t bytes = ops_scratch_bytes(&ops[i], rows->n > rows->n_out ? rows->n : rows->n_out);
        if (bytes > c->scratch_bytes)
            return err(ERR_LIMIT, "CUDA scratch: %" PRIu64 " bytes given, %" PRIu64 " needed for %s of %d rows",
                       c->scratch_bytes, bytes, device_op_name(ops[i].kind), rows->n);
    }
    if (rows->n > c->opts.most.n_rows)
        return err(ERR_LIMIT, "a step of %d rows; CUDA was opened for %d", rows->n, c->opts.most.n_rows);
    return n_moe > 1 ? err(ERR_ARG, "%d ops with lists of experts in one call; CUDA takes one", n_moe) : 0;
}

static bool is_of_pages(enum op_kind kind)
{
    return kind == OP_KV_APPEND || kind == OP_ATTENTION || kind == OP_ATTN_STATES;
}

/* Write the slot and queue its way up. A kernel fetches it: the engine that copies up does one copy after another, so that a copy
 * would come behind all that is being brought in the background, and the step with it. */
static int send(struct cuda *c, const struct op *ops, int n_ops, const struct rows *rows, struct ops_run *run)
{
    struct packer p = {.host = c->slots[c->n_calls % N_SLOTS].host, .dev = c->said, .bytes = c->slot_bytes};
    bool wants_pages = false, wants_records = false;

    run->step.token = pack_ints(&p, rows->token, rows->n);
    run->step.pos = pack_ints(&p, rows->pos, rows->n);
    run->step.seq = pack_ints(&p, rows->seq, rows->n);
    run->out_row = pack_ints(&p, rows->out_row, rows->n_out);
    for (int i = 0; i < n_ops; i++) {
        wants_pages = wants_pages || is_of_pages(ops[i].kind);
        wants_records = wants_records || ops[i].kind == OP_CONV || ops[i].kind == OP_DELTA_NET;
        if (ops[i].kind == OP_MOE && ops[i].p.moe.experts)
            pack_moe(&p, &ops[i], rows->n, run);
    }
    if (wants_records) {
        run->step.record = pack_records(&p, rows, n_seqs_of(rows));
        run->step.stretch = pack_stretches(&p, rows, &run->n_stretches);
    }
    if (wants_pages)
        run->step.page = pack_pages(&p, rows, n_seqs_of(rows));
    if (p.is_full)
        return err(ERR_LIMIT, "a step of %d rows needs more than the %" PRIu64 " bytes that CUDA was opened for",
                   rows->n, c->slot_bytes);
    struct cu_pull_args pull = {p.dev, p.host, size_up(p.used, 16)};
    return p.used ? failed(cu_pull(&pull, c->stream), "rows") : 0;
}

static int run(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    struct cuda *c = cuda_of(dev);
    const struct slot *slot = &c->slots[c->n_calls % N_SLOTS];
    struct ops_run r = {.stream = c->stream,
                        .rows = rows,
                        .books = c->books,
                        .scratch = c->scratch,
                        .prefill = c->opts.prefill,
                        .card = c->card,
                        .ops = ops,
                        .n_ops = n_ops};
    const uint64_t launched = cu_launched;
    int rc = check(c, ops, n_ops, rows);

    if (rc == 0)
        rc = failed(choose(c), "choosing the GPU");
    if (rc == 0) /* the call that had the slot last fetches from it */
        rc = failed(cudaEventSynchronize(slot->done), "wait");
    if (rc == 0)
        rc = send(c, ops, n_ops, rows, &r);
    if (rc == 0) {
        const char *what = "nothing";
        bool is_short = !c->opts.no_graphs && rows->n <= GRAPH_ROWS && rows->n_prompt == 0;
        cudaError_t e = is_short ? graph_launch(&c->graphs, &r, &what) : ops_launch(&r, &what);
        rc = failed(e, what);
    }
    c->n_launches += cu_launched - launched;
    if (rc == 0)
        rc = failed(cudaEventRecord(slot->done, c->stream), "record");
    if (rc < 0)
        wait_for_all(c); /* as in stop() */
    else
        c->n_calls++;
    return rc;
}

static int sync_device(struct device *dev)
{
    struct cuda *c = cuda_of(dev);
    cudaError_t e = choose(c);

    if (!e)
        e = cudaStreamSynchronize(c->stream);
    return failed(e, "step");
}

static uint64_t scratch_bytes(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    uint64_t most = 256;

    (void)n_threads;
    for (int i = 0; i < n_ops; i++) {
        uint64_t bytes = ops_scratch_bytes(&ops[i], n_rows);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static int set_scratch(struct device *dev, void *scratch, uint64_t bytes)
{
    if ((uintptr_t)scratch % 256)
        return err(ERR_ARG, "CUDA scratch is not 256-byte aligned");
    cuda_of(dev)->scratch = scratch;
    cuda_of(dev)->scratch_bytes = bytes;
    return 0;
}

/* Ops run when the host has gone on: their times are not known here. */
static void op_ns(const struct device *dev, uint64_t *ns, bool reset)
{
    (void)dev;
    (void)reset;
    memset(ns, 0, OP_N_KIND * sizeof *ns);
}

/* Graphs are not counted: what they take is the driver's to say, and it may refuse them (graph.h). */
static void own_bytes(const struct device_step *most, struct device_own *out)
{
    uint64_t slot_bytes = slot_bytes_of(most);

    *out = (struct device_own){.dev_bytes = sizeof(struct cu_books) + slot_bytes,
                               .host_bytes = DOWN_BYTES + N_SLOTS * slot_bytes,
                               .n_allocs = 2};
}

/* ---- open and close ---- */

static void close_device(struct device *dev)
{
    struct cuda *c = cuda_of(dev);

    if (!c)
        return;
    if (c->stream) /* the first thing that is made */
        choose(c);
    if (c->copies)
        cudaStreamSynchronize(c->copies);
    if (c->back)
        cudaStreamSynchronize(c->back);
    if (c->up)
        cudaStreamSynchronize(c->up);
    if (c->stream)
        cudaStreamSynchronize(c->stream);
    for (int i = 0; c->fences && i < c->opts.most.n_fences; i++)
        if (c->fences[i])
            cudaEventDestroy(c->fences[i]);
    mem_free(c->fences);
    graph_done(&c->graphs);
    cudaFree(c->said);
    cudaFree(c->books);
    cudaFreeHost(c->down);
    for (int i = 0; i < N_SLOTS; i++) {
        if (c->slots[i].done)
            cudaEventDestroy(c->slots[i].done);
        cudaFreeHost(c->slots[i].host);
    }
    if (c->sent)
        cudaEventDestroy(c->sent);
    if (c->brought)
        cudaEventDestroy(c->brought);
    if (c->copies)
        cudaStreamDestroy(c->copies);
    if (c->down_done)
        cudaEventDestroy(c->down_done);
    if (c->queued)
        cudaEventDestroy(c->queued);
    if (c->back)
        cudaStreamDestroy(c->back);
    if (c->up)
        cudaStreamDestroy(c->up);
    if (c->stream)
        cudaStreamDestroy(c->stream);
    mem_free(c);
}

/* How many GPUs the driver sees. */
static int count_gpus(int *n)
{
    int driver = 0;
    cudaError_t e = cudaDriverGetVersion(&driver);

    if (!e && driver == 0)
        return err(ERR_DEVICE, "CUDA: this machine has no NVIDIA driver");
    if (!e)
        e = cudaGetDeviceCount(n);
    if (e == cudaErrorInsufficientDriver)
        return err(ERR_DEVICE, "CUDA: the driver is one for CUDA %d.%d; this ferry was built with %d.%d", driver / 1000,
                   driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return failed(e, "looking for GPUs");
}

/* *capability: 90 for 9.0 */
static int find_gpu(int ordinal, int *capability)
{
    int n = 0, major = 0, minor = 0, rc = count_gpus(&n);

    if (rc)
        return rc;
    if (ordinal < 0 || ordinal >= n)
        return err(ERR_DEVICE, "CUDA: there is no GPU %d; GPUs found: %d", ordinal, n);
    cudaError_t e = cudaSetDevice(ordinal);
    if (!e)
        e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
    if (!e)
        e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
    if (e)
        return failed(e, "choosing the GPU");
    *capability = major * 10 + minor;
    if (*capability < 75)
        return err(ERR_UNSUPPORTED, "CUDA: GPU %d has compute capability %d.%d; 7.5 is the least", ordinal, major,
                   minor);
    return 0;
}

int cuda_memory(int ordinal, uint64_t *free_bytes, uint64_t *total_bytes)
{
    size_t free_now = 0, total = 0;
    int capability = 0, rc = find_gpu(ordinal, &capability);

    if (rc == 0)
        rc = failed(cudaMemGetInfo(&free_now, &total), "asking for its memory");
    *free_bytes = free_now;
    *total_bytes = total;
    return rc;
}

int cuda_id(int ordinal, char id[CUDA_ID_BYTES])
{
    int capability = 0, n_multiprocessors = 0, rc = find_gpu(ordinal, &capability);
    size_t free_now = 0, total = 0;

    if (rc == 0)
        rc = failed(cudaMemGetInfo(&free_now, &total), "asking for its memory");
    if (rc == 0)
        rc = failed(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, ordinal),
                    "asking for its multiprocessors");
    if (rc == 0)
        snprintf(id, CUDA_ID_BYTES, "compute capability %d.%d, %d multiprocessors, %d GiB", capability / 10,
                 capability % 10, n_multiprocessors, (int)((total + GIB / 2) / GIB));
    return rc;
}

static int make_slots(struct cuda *c)
{
    cudaError_t e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);

    if (!e)
        e = cudaStreamCreateWithFlags(&c->up, cudaStreamNonBlocking);
    if (!e)
        e = cudaStreamCreateWithFlags(&c->back, cudaStreamNonBlocking);
    if (!e)
        e = cudaStreamCreateWithFlags(&c->copies, cudaStreamNonBlocking);
    if (!e)
        e = cudaEventCreateWithFlags(&c->sent, cudaEventDisableTiming);
    if (!e)
        e = cudaEventCreateWithFlags(&c->brought, cudaEventDisableTiming);
    if (!e)
        e = cudaEventCreateWithFlags(&c->down_done, cudaEventDisableTiming);
    if (!e)
        e = cudaEventCreateWithFlags(&c->queued, cudaEventDisableTiming);
    c->slot_bytes = slot_bytes_of(&c->opts.most);
    for (int i = 0; i < N_SLOTS && !e; i++) {
        e = cudaHostAlloc((void **)&c->slots[i].host, c->slot_bytes, cudaHostAllocDefault);
        if (!e)
            e = cudaEventCreateWithFlags(&c->slots[i].done, cudaEventDisableTiming);
    }
    if (!e)
        e = cudaMalloc((void **)&c->said, c->slot_bytes);
    if (!e)
        e = cudaHostAlloc((void **)&c->down, DOWN_BYTES, cudaHostAllocDefault);
    if (e == cudaErrorMemoryAllocation)
        return err(ERR_NOMEM, "CUDA: %" PRIu64 " bytes for what goes up with a step, and %d times as many pinned",
                   c->slot_bytes, N_SLOTS);
    return failed(e, "making a stream");
}

static int make_fences(struct cuda *c)
{
    int n = c->opts.most.n_fences;
    cudaError_t e = cudaSuccess;

    c->fences = mem_zalloc((size_t)n, sizeof(cudaEvent_t), MEM_OTHER);
    if (!c->fences)
        return err(ERR_NOMEM, "CUDA: %d fences", n);
    for (int i = 0; i < n && !e; i++)
        e = cudaEventCreateWithFlags(&c->fences[i], cudaEventDefault);
    return failed(e, "making a fence");
}

static int send_books(struct cuda *c)
{
    struct cu_books *books = mem_alloc(sizeof *books, MEM_OTHER);
    void *dev = NULL;

    if (!books)
        return err(ERR_NOMEM, "code-books: %zu bytes", sizeof *books);
    memcpy(books->iq2_xxs, iq_grid_iq2_xxs, sizeof books->iq2_xxs);
    memcpy(books->iq2_xs, iq_grid_iq2_xs, sizeof books->iq2_xs);
    memcpy(books->iq2_s, iq_grid_iq2_s, sizeof books->iq2_s);
    memcpy(books->iq1_s, iq_grid_iq1_s, sizeof books->iq1_s);
    memcpy(books->iq3_xxs, iq_grid_iq3_xxs, sizeof books->iq3_xxs);
    memcpy(books->iq3_s, iq_grid_iq3_s, sizeof books->iq3_s);
    int rc = dev_alloc(&c->device, sizeof *books, &dev);
    c->books = dev;
    if (rc == 0)
        rc = upload(&c->device, dev, books, sizeof *books);
    if (rc == 0)
        rc = sync_device(&c->device);
    mem_free(books);
    return rc;
}

int cuda_open(const struct cuda_opts *opts, struct device **out)
{
    *out = NULL;
    const struct device_step *most = &opts->most;
    int per_row = most->n_expert_used > 0 ? most->n_expert_used : 1;
    if (most->n_rows < 1 || most->n_rows > MAX_ROWS / per_row)
        return err(ERR_LIMIT, "steps of %d rows with %d experts each; CUDA takes 1 to %d rows", most->n_rows,
                   most->n_expert_used, MAX_ROWS / per_row);
    struct cuda *c = mem_zalloc(1, sizeof *c, MEM_OTHER);
    if (!c)
        return err(ERR_NOMEM, "the CUDA device: %zu bytes", sizeof *c);
    c->device.ops = &cuda_device_ops;
    c->opts = *opts;
    int capability = 0, rc = find_gpu(opts->ordinal, &capability);
    if (rc == 0)
        rc = make_slots(c);
    if (rc == 0)
        rc = make_fences(c);
    if (rc == 0)
        rc = send_books(c);
    if (rc == 0)
        rc = failed(ops_card(opts->ordinal, opts->prefill, &c->card), "asking for shared memory");
    if (rc < 0)
        close_device(&c->device);
    else
        *out = &c->device;
    return rc;
}

const struct device_ops cuda_device_ops = {
    .name = "cuda",
    .can = ops_can,
    .scratch_bytes = scratch_bytes,
    .set_scratch = set_scratch,
    .run = run,
    .sync = sync_device,
    .alloc = dev_alloc,
    .release = dev_release,
    .upload = upload,
    .download = download,
    .copy = copy,
    .own_bytes = own_bytes,
    .alloc_host = alloc_host,
    .release_host = release_host,
    .fetch = fetch,
    .send = send_up,
    .meet = meet,
    .fetched = fetched,
    .send_after = send_after,
    .bring = bring,
    .brought = brought,
    .pin = pin,
    .unpin = unpin,
    .carry = carry,
    .fence = fence,
    .follow = follow,
    .passed = passed,
    .span_ns = span_ns,
    .n_launches = n_launches,
    .op_ns = op_ns,
    .close = close_device,
};
