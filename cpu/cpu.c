/* Owns the device handle: the team, the kernel table and the scratch. The walk itself is walk.c. */
#include "cpu/cpu.h"

#include "cpu/blas.h"
#include "cpu/cpu_can.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/walk.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/device/device_check.h"

#include <inttypes.h>
#include <string.h>

struct cpu {
    struct device device;          /* first: the handle */
    struct pool *pool;             /* own */
    const struct kern_table *kern; /* view */
    enum device_prefill prefill;
    char *scratch; /* view */
    uint64_t scratch_bytes;
    uint64_t ns[OP_N_KIND];
};

static struct cpu *cpu_of(struct device *dev)
{
    return (struct cpu *)dev;
}

/* The most that one op needs; every worker's part starts at a multiple of 64. */
static struct walk_need need_of(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    struct walk_need most = {KERN_MAT_SCRATCH_BYTES, 0};

    for (int i = 0; i < n_ops; i++) {
        const struct walk_shared *shared = walk_shared(ops[i].kind);
        if (!shared)
            continue;
        struct walk_need n = shared->need(&ops[i], n_rows, n_threads);
        most.own_bytes = n.own_bytes > most.own_bytes ? n.own_bytes : most.own_bytes;
        most.shared_bytes = n.shared_bytes > most.shared_bytes ? n.shared_bytes : most.shared_bytes;
    }
    most.own_bytes = size_up(most.own_bytes, 64);
    most.shared_bytes = size_up(most.shared_bytes, 64);
    return most;
}

static uint64_t scratch_bytes(const struct op *ops, int n_ops, int n_rows, int n_threads)
{
    struct walk_need need = need_of(ops, n_ops, n_rows, n_threads);
    return (uint64_t)n_threads * need.own_bytes + need.shared_bytes;
}

static int set_scratch(struct device *dev, void *scratch, uint64_t bytes)
{
    if ((uintptr_t)scratch % 64)
        return err(ERR_ARG, "CPU scratch is not 64-byte aligned");
    cpu_of(dev)->scratch = scratch;
    cpu_of(dev)->scratch_bytes = bytes;
    return 0;
}

static int check(const struct op *ops, int n_ops, const struct rows *rows)
{
    for (int i = 0; i < n_ops; i++) {
        if (!cpu_can(&ops[i]))
            return err(ERR_ARG, "the CPU cannot run %s of layer %d with these types and shapes",
                       device_op_name(ops[i].kind), ops[i].layer);
        int rc = device_check_step(&ops[i], rows);
        if (rc < 0)
            return rc;
        if (ops[i].kind == OP_MOE && !ops[i].p.moe.experts)
            return err(ERR_ARG, "%s of layer %d: the CPU wants its experts listed", device_op_name(ops[i].kind),
                       ops[i].layer);
    }
    return 0;
}

static int run(struct device *dev, const struct op *ops, int n_ops, const struct rows *rows)
{
    struct cpu *cpu = cpu_of(dev);
    int rc = check(ops, n_ops, rows);

    if (rc < 0)
        return rc;
    if (cpu->prefill == DEVICE_PREFILL_BLAS && (rows->n_prompt < 0 || rows->n_prompt > rows->n))
        return err(ERR_ARG, "a step of %d rows with %d prompt rows", rows->n, rows->n_prompt);
    int n_threads = pool_n_threads(cpu->pool), n_rows = rows->n > rows->n_out ? rows->n : rows->n_out;
    struct walk_need need = need_of(ops, n_ops, n_rows, n_threads);
    uint64_t own_bytes = (uint64_t)n_threads * need.own_bytes;
    if (own_bytes + need.shared_bytes > cpu->scratch_bytes)
        return err(ERR_LIMIT, "CPU scratch: %" PRIu64 " bytes given, %" PRIu64 " needed for %d rows",
                   cpu->scratch_bytes, own_bytes + need.shared_bytes, n_rows);
    struct walk walk = {
        .kern = cpu->kern,
        .pool = cpu->pool,
        .n_threads = n_threads,
        .prefill = cpu->prefill,
        .ops = ops,
        .n_ops = n_ops,
        .rows = rows,
        .own = cpu->scratch,
        .own_bytes = need.own_bytes,
        .shared = cpu->scratch + own_bytes,
    };
    pool_run(cpu->pool, walk_worker, &walk);
    for (int i = 0; i < OP_N_KIND; i++)
        cpu->ns[i] += walk.ns[i];
    return 0;
}

static int sync_device(struct device *dev)
{
    (void)dev; /* run() returns when all is done */
    return 0;
}

static void op_ns(const struct device *dev, uint64_t *ns, bool reset)
{
    struct cpu *cpu = (struct cpu *)(uintptr_t)dev; /* the counters are not what const promises */

    memcpy(ns, cpu->ns, sizeof cpu->ns);
    if (reset)
        memset(cpu->ns, 0, sizeof cpu->ns);
}

static void close_device(struct device *dev)
{
    if (!dev)
        return;
    pool_close(cpu_of(dev)->pool);
    mem_free(dev);
}

const struct device_ops cpu_device_ops = {
    .name = "cpu",
    .can = cpu_can,
    .scratch_bytes = scratch_bytes,
    .set_scratch = set_scratch,
    .run = run,
    .sync = sync_device,
    .op_ns = op_ns,
    .close = close_device,
};

static void start_blas(int worker, void *scratch)
{
    blas_start((char *)scratch + (uint64_t)worker * BLAS_SCRATCH_BYTES);
}

/* Each worker makes its first call to OpenBLAS now, so that no step allocates. */
static int prepare_blas(struct cpu *cpu)
{
    uint64_t bytes = (uint64_t)pool_n_threads(cpu->pool) * BLAS_SCRATCH_BYTES;
    void *scratch = mem_alloc(bytes, MEM_SCRATCH);

    if (!scratch)
        return err(ERR_NOMEM, "OpenBLAS tiles: %" PRIu64 " bytes", bytes);
    pool_run(cpu->pool, start_blas, scratch);
    mem_free(scratch);
    return 0;
}

int cpu_open(const struct cpu_opts *opts, struct device **out)
{
    *out = NULL;
    struct cpu *cpu = mem_zalloc(1, sizeof *cpu, MEM_OTHER);
    if (!cpu)
        return err(ERR_NOMEM, "the CPU device: %zu bytes", sizeof *cpu);
    cpu->device.ops = &cpu_device_ops;
    cpu->prefill = opts->prefill;
    int rc = isa_choose(opts->isa, &cpu->kern);
    if (rc == 0)
        rc = pool_open(opts->n_threads, opts->pin, &cpu->pool);
    if (rc == 0 && opts->is_beside_gpu)
        pool_stay_awake(cpu->pool);
    if (rc == 0 && opts->prefill == DEVICE_PREFILL_BLAS)
        rc = prepare_blas(cpu);
    if (rc < 0)
        close_device(&cpu->device);
    else
        *out = &cpu->device;
    return rc;
}

const char *const *cpu_isa_names(void)
{
    return isa_names();
}

bool cpu_isa_has(const char *name)
{
    return isa_has(name);
}

const char *cpu_isa_used(const struct device *dev)
{
    return ((const struct cpu *)dev)->kern->isa;
}
