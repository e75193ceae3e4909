/* The emulated CUDA runtime: what tests turn, and what kernels compiled by a plain C++ compiler stand on (cuda/device.cuh).
 *
 * A stream is a queue that nothing runs before somebody waits; then operations of all streams run one after another, in a
 * seeded order that streams and events allow, so that a missing event is a wrong order sooner or later. Fresh device and shared
 * memory is NaN. Device memory cannot be touched by host code. A kernel's threads are fibers that meet at barriers and warp
 * exchanges; blocks and threads run in a seeded order. What real hardware would leave undefined ends the process with a
 * message. One host thread. */
#ifndef FERRY_TESTS_EMU_EMU_H
#define FERRY_TESTS_EMU_EMU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h> /* the one in this folder: builds on the emulator have it on their path */

#ifdef __cplusplus
extern "C" {
#endif

/* ---- for tests ---- */

/* What can work at the same time; each does one operation after another. Copies within the device are COMPUTE's. */
enum emu_engine { EMU_UP, EMU_DOWN, EMU_COMPUTE, EMU_N_ENGINES };

/* Forget everything of the tests before: no call fails, default limit, no step. Streams, events and memory must be gone. */
void emu_reset(uint64_t seed);

void emu_seed(uint64_t seed);      /* of the orders */
void emu_set_vram(size_t bytes);   /* cudaMalloc gives no more than this in all; at most 1 GiB */
void emu_set_pinned(size_t bytes); /* cudaHostRegister takes no more than this in all */
void emu_set_gpus(int n);          /* so many GPUs, all alike, of one memory; 1 where nobody says so */
/* Their compute capability (the number before the point), multiprocessors, and most shared memory of a block, at most EMU_MAX_SHARED. */
void emu_set_card(int capability, int n_multiprocessors, int shared_bytes);
void emu_set_code(
    int capability); /* that the kernels are compiled for; the card's own where nobody says so behind emu_set_card() */
void emu_set_driver(
    int version);         /* 1000 * major + 10 * minor; 0: there is none. As new as the runtime where nobody says so */
void emu_fail_nth(int n); /* the nth runtime call from now on (1 = the next) fails once; 0: none */
int emu_n_calls(void);    /* runtime calls since emu_fail_nth() */
void emu_in_step(bool in_step); /* within a step malloc, free and whole-device waits end the process */
/* Operations of that engine run when nothing else may, and not before; EMU_N_ENGINES: all are alike. Without a clock. */
void emu_starve(enum emu_engine engine);
void emu_drop_wait(int n);           /* the nth cudaStreamWaitEvent from now on does nothing; 0: none */
bool emu_drops_wait(void);           /* has it not come to that yet? */
size_t emu_device_bytes(void);       /* device memory alive */
int emu_n_live(void);                /* allocations, streams, events and graphs alive */
uint64_t emu_n_launches(void);       /* launches run since emu_reset(): of kernels, and of graphs of them */
bool emu_is_device(const void *ptr); /* is it in device memory? */
bool emu_is_real(void); /* a runtime that is only counted (tests/gpu/real.h): it follows no seed and drops no wait */

/* ---- for kernels ---- */

struct emu_dim {
    unsigned x, y, z;
};

/* Who runs now. */
struct emu_here {
    struct emu_dim thread_idx, block_idx, block_dim, grid_dim;
    char *shared; /* dynamic shared memory of the block */
};
extern struct emu_here emu_here;

void emu_barrier(void);

/* All 32 lanes of the warp meet and learn what each brought: (32, bytes), valid until the next exchange. bytes <= 64. */
const void *emu_warp(const void *mine, unsigned bytes);

/* The thread goes on when the kernels before this one have ended. Of a kernel that may begin early (emu_launch.is_early) one block sees
 * until then what was in memory when the last began that may not, and what it asks of copies comes from there; the others begin late. */
void emu_await(void);

/* cp.async: a copy that is queued is done at the latest moment that waiting allows, or at once, as the block's lot is. */
void emu_async_copy(void *dst, const void *src, unsigned bytes);
void emu_async_commit(void);
void emu_async_wait(int n_left); /* until at most the n_left latest groups are under way */

/* cp.async.bulk and the barrier that counts its bytes; the copies of a use are done when somebody waits for it, or at once. A use that was
 * not announced, or whose bytes are others than was said, would wait for ever: it ends the process. */
struct emu_landing {
    uint32_t n_uses; /* that are over */
    uint32_t bytes;  /* expected in this one; 0: nothing is */
};
void emu_landing_init(struct emu_landing *l);
void emu_landing_expect(struct emu_landing *l, uint32_t bytes);
void emu_bulk_copy(void *dst, const void *src, uint32_t bytes, struct emu_landing *l);
void emu_landing_wait(struct emu_landing *l, uint32_t is_odd);

struct emu_launch {
    const char *name;
    struct emu_dim grid, block;
    size_t shared_bytes;
    void (*call)(const void *closure); /* one thread's life */
    const void *closure;               /* copied: (closure_bytes) */
    size_t closure_bytes;
    size_t args_off;    /* where in the closure the kernel's argument lies */
    const void *kernel; /* which it is, for cudaFuncSetAttribute; NULL: none that asks for anything */
    bool is_early;      /* it may begin before the kernel ahead of it has ended, and waits by itself */
};
cudaError_t emu_launch(const struct emu_launch *launch, cudaStream_t stream);

/* ---- the virtual clock: how long it would take ---- */

struct emu_rates {
    double bytes_per_s[EMU_N_ENGINES]; /* of copies */
    uint64_t op_ns;                    /* that each copy and each kernel takes besides */
    uint64_t (*kernel_ns)(const struct emu_launch *launch, void *arg); /* how long one takes besides; NULL: nothing */
    void *arg;                                                         /* of kernel_ns: view */
};

/* From now on operations take time, and run in the order in which they would begin: an operation begins when it was queued, its
 * stream has come to it, what it waits for is done and its engine is free; who was ready first gets the engine. Seeds then turn
 * nothing. The time is 0. NULL, or emu_reset(): no clock. rates are copied. */
void emu_clock(const struct emu_rates *rates);
uint64_t emu_now_ns(void);        /* the host's time: calls that wait come back when that is done */
void emu_host_works(uint64_t ns); /* the host computes so long */
uint64_t emu_busy_ns(enum emu_engine engine);

/* ---- between the parts of the emulator ---- */

#define EMU_MAX_SHARED (227 * 1024) /* most shared memory that a block may have */
bool emu_fails(void);               /* counts a call of the runtime: is it the one that fails? */
int emu_gpu(void);                  /* the one chosen */
void emu_check_stream(cudaStream_t stream);
void emu_queue_kernel(const struct emu_launch *launch, cudaStream_t stream, bool is_inner);
bool emu_graph_is_capturing(void);
/* It is captured, and what it is asked for now cannot be captured: that spoils it. */
bool emu_graph_refuses(cudaStream_t stream);
/* It is captured, and the launch with it. */
bool emu_graph_takes(cudaStream_t stream, const struct emu_launch *launch);
int emu_graph_n_live(void);
char *emu_device_span(size_t *bytes); /* where device memory begins, and what of it is in use */
void emu_early_keep(void);            /* memory as it is */
void emu_early_begin(void);           /* memory becomes again what was kept */
bool emu_early_is_begun(void);
void emu_early_end(void);                    /* and what it was before */
const void *emu_early_source(const void *p); /* in between: where what was kept stands, for who reads it later */
void emu_grid_run(const struct emu_launch *launch);
void emu_grid_allow(const void *kernel, size_t shared_bytes); /* so much to its blocks, from now on */
uint32_t emu_random(uint32_t n);                              /* 0..n-1 */
void emu_die(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));

#ifdef __cplusplus
}
#endif
#endif
