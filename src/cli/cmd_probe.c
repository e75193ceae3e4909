/* ferry probe: memory by number of threads, cores, kernels, a disk, a GPU; saved for plans. */
#include "src/cli/cmd.h"

#include "cpu/cpu.h"
#ifdef FERRY_HAVE_CUDA
#include "cuda/cuda.h"
#endif
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/gauge.h"
#include "src/cli/gauge_gpu.h"
#include "src/cli/profile.h"
#include "src/cli/term.h"
#include "src/cli/which_gpu.h"

#include <jansson.h>
#include <stdio.h>

/* Far more than any cache, and no burden to a machine with little memory free. */
#define READ_BYTES GIB
#define READ_LEAST_BYTES (64 * MIB)
enum { N_REPS = 9, N_PASSES = 7 };

/* Weights that kernels are measured with: several times the last cache of most machines. */
#define POOL_BYTES (128 * MIB)

/* The same of a GPU: the largest last caches have 72 to 96 MiB. */
#define GPU_POOL_BYTES (512 * MIB)

struct probe {
    struct machine machine;
    const char *disk_path; /* view; NULL: not measured */
    char *saved_to;        /* own; NULL: not saved */
};

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static int measure_memory(const struct conf *conf, struct probe *p)
{
    struct machine *m = &p->machine;
    uint64_t bytes = least(m->ram_free_bytes / 4, READ_BYTES);

    if (bytes < READ_LEAST_BYTES)
        bytes = READ_LEAST_BYTES;
    m->n_mem = 0;
    /* 1, 2, 4, ... and all: where the curve bends shows how many threads decoding can use. */
    for (int n = 1; m->n_mem < MACHINE_MAX_MEM; n = 2 * n < m->n_cores ? 2 * n : m->n_cores) {
        struct machine_mem *r = &m->mem[m->n_mem];
        if (!conf->quiet)
            fprintf(stderr, "memory, %d thread%s: ", n, n == 1 ? "" : "s");
        r->n_threads = n;
        int rc = cpu_read_rate(n, bytes, N_REPS, &r->bytes_per_s);
        if (rc)
            return rc;
        if (!conf->quiet)
            fprintf(stderr, "%.1f GB/s\n", r->bytes_per_s / 1e9);
        m->n_mem++;
        if (n >= m->n_cores)
            break;
    }
    m->mem_bytes_per_s = m->mem[m->n_mem - 1].bytes_per_s;
    return 0;
}

static int measure_kernels(const struct conf *conf, struct probe *p)
{
    uint64_t bytes = p->machine.l3_bytes > POOL_BYTES / 4 ? 4 * p->machine.l3_bytes : POOL_BYTES;

    bytes = least(bytes, p->machine.ram_free_bytes / 4);
    if (!conf->quiet)
        fprintf(stderr, "kernels: ");
    int rc = gauge_run(&p->machine, bytes, N_PASSES);
    if (!rc && conf->model)
        rc = gauge_beside_disk(&p->machine, bytes, conf->model);
    if (!conf->quiet)
        fprintf(stderr, rc ? "failed\n" : "done\n");
    return rc;
}

static int measure_disk(const struct conf *conf, struct probe *p)
{
    struct machine_disk disk;

    if (!conf->model)
        return 0;
    if (!conf->quiet)
        fprintf(stderr, "disk of %s: ", conf->model);
    int rc = machine_disk_measure(conf->model, &disk);
    if (!rc)
        machine_disk_put(&p->machine, &disk);
    if (!conf->quiet)
        fprintf(stderr, rc ? "failed\n" : "%.2f GB/s%s\n", p->machine.disk_bytes_per_s / 1e9,
                disk.is_direct ? "" : " (through the page cache: the file system has no O_DIRECT)");
    p->disk_path = conf->model;
    return rc;
}

/* A GPU that is not here is described; then none is measured. */
static bool describe_gpu(const struct conf *conf, struct machine *m)
{
    if (conf->gpu_bytes_per_s <= 0 && conf->pcie_bytes_per_s <= 0)
        return false;
    if (m->gpu_id[0]) /* what was measured is of another */
        m->gpu_bytes_per_s = m->pcie_bytes_per_s = 0;
    m->gpu_prompt = (struct machine_gpu_prompt){0};
    m->gpu_id[0] = '\0';
    if (conf->gpu_bytes_per_s > 0)
        m->gpu_bytes_per_s = conf->gpu_bytes_per_s;
    if (conf->pcie_bytes_per_s > 0)
        m->pcie_bytes_per_s = conf->pcie_bytes_per_s;
    return true;
}

#ifdef FERRY_HAVE_CUDA
static int measure_this_gpu(int number, struct machine *m)
{
    const struct cuda_opts opts = {.ordinal = number, .most = gauge_gpu_step};
    struct gauge_gpu_rates rates;
    struct device *dev = NULL;
    char id[CUDA_ID_BYTES];

    int rc = cuda_memory(number, &m->vram_free_bytes, &m->vram_total_bytes);
    if (!rc)
        rc = cuda_id(number, id);
    if (!rc)
        rc = cuda_open(&opts, &dev);
    if (!rc)
        rc = gauge_gpu(dev, least(m->vram_free_bytes / 4, GPU_POOL_BYTES), N_PASSES, &rates);
    if (dev)
        dev->ops->close(dev);
    if (rc)
        return rc;
    m->gpu_bytes_per_s = rates.mem_bytes_per_s;
    m->pcie_bytes_per_s = rates.up_bytes_per_s;
    m->gpu_prompt = rates.prompt;
    snprintf(m->gpu_id, sizeof m->gpu_id, "%s", id);
    return 0;
}
#endif

static int measure_gpu(const struct conf *conf, struct probe *p)
{
    struct machine *m = &p->machine;
    int number, rc = which_gpu(conf->device ? conf->device : "auto", &number);

    if (rc || describe_gpu(conf, m) || number == WHICH_GPU_NONE)
        return rc;
#ifdef FERRY_HAVE_CUDA
    if (!conf->quiet)
        fprintf(stderr, "GPU %d: ", number);
    rc = measure_this_gpu(number, m);
    if (!conf->quiet && rc)
        fprintf(stderr, "failed\n");
    else if (!conf->quiet)
        fprintf(stderr, "%.0f GB/s, the way to it %.1f GB/s\n", m->gpu_bytes_per_s / 1e9, m->pcie_bytes_per_s / 1e9);
    if (rc)
        return err(rc, "%s (--device cpu leaves the GPU out)", err_text());
#endif
    return 0;
}

static int print_json(const struct probe *p)
{
    char *text = NULL;
    int rc = machine_to_json(&p->machine, &text);

    if (rc)
        return rc;
    json_t *o = json_loads(text, 0, NULL), *isas = json_array();
    mem_free(text);
    for (const char *const *name = cpu_isa_names(); *name; name++) {
        if (cpu_isa_has(*name))
            json_array_append_new(isas, json_string(*name));
    }
    json_object_set_new(o, "isas", isas);
    json_object_set_new(o, "saved_to", p->saved_to ? json_string(p->saved_to) : json_null());
    int failed = json_dumpf(o, stdout, JSON_INDENT(2));
    json_decref(o);
    putchar('\n');
    return failed ? err(ERR_NOMEM, "the report as JSON") : 0;
}

/* One row of a matmul is bound by reading the weights, many are by arithmetic. */
static void print_kernels(const struct machine *m)
{
    printf("\nmatmul by weight type, %d thread%s\n  %-8s %10s %12s %12s %12s\n", m->n_cores, m->n_cores == 1 ? "" : "s",
           "", "1 row", "4 rows", "16 rows", "256 rows");
    for (int type = 0; type < QUANT_ID_END; type++) {
        const struct machine_kernel *k = &m->kernels[type];
        if (k->token_bytes_per_s > 0)
            printf("  %-8s %5.1f GB/s %6.0f Gop/s %6.0f Gop/s %6.0f Gop/s\n", quant_info(type)->name,
                   k->token_bytes_per_s / 1e9, k->some_ops_per_s / 1e9, k->few_ops_per_s / 1e9,
                   k->many_ops_per_s / 1e9);
    }
    printf("other ops, beside their weights (calling the device %.1f us)\n", m->run_s * 1e6);
    for (int kind = 0; kind < OP_N_KIND; kind++) {
        if (m->ops[kind].op_s > 0 || m->ops[kind].unit_s > 0)
            printf("  %-12s %6.1f us and %8.4f ns an element\n", device_op_name((enum op_kind)kind),
                   m->ops[kind].op_s * 1e6, m->ops[kind].unit_s * 1e9);
    }
    printf("  %-12s %20.4f ns a logit\n\n", "draw", m->draw_s * 1e9);
}

static void print_disk(const struct machine *m, bool is_new)
{
    if (m->disk < 0) {
        printf("disk       not measured: name a file or folder on it\n");
        return;
    }
    const struct machine_disk *d = &m->disks[m->disk];
    printf("disk       %.2f GB/s%s%s\n", m->disk_bytes_per_s / 1e9,
           d->is_direct ? ", O_DIRECT" : ", through the page cache: no O_DIRECT there",
           is_new ? "" : " (measured earlier)");
    for (int i = 0; i < d->n_rates; i++) {
        bool is_first = !i || d->rates[i].block_bytes != d->rates[i - 1].block_bytes;
        if (is_first)
            printf("%s  %5.0f KiB a read, in flight:", i ? "\n" : "", (double)d->rates[i].block_bytes / 1024);
        printf("  %d %.2f", d->rates[i].depth, d->rates[i].bytes_per_s / 1e9);
    }
    printf("  GB/s\n");
    if (d->token_share > 0 && d->many_share > 0)
        printf("           while it reads, matmuls have %.0f %% of their speed with one row, %.0f %% with many\n",
               100 * d->token_share, 100 * d->many_share);
}

static void print_gpu_prompt(const struct machine_gpu_prompt *prompt)
{
    const struct machine_gpu_products *ints = &prompt->ints, *floats = &prompt->floats;

    if (ints->many_ops_per_s <= 0)
        return;
    printf(
        "           of a prompt: quantized products %.0f Gop/s with %d rows, %.0f with %d; of floats %.0f and %.0f;\n"
        "           attention %.5f ns an element\n",
        ints->few_ops_per_s / 1e9, MACHINE_GPU_FEW_ROWS, ints->many_ops_per_s / 1e9, MACHINE_GPU_MANY_ROWS,
        floats->few_ops_per_s / 1e9, floats->many_ops_per_s / 1e9, prompt->attn_unit_s * 1e9);
}

static void print_text(const struct probe *p)
{
    const struct machine *m = &p->machine;
    char a[32], b[32];

    printf("cpu        %s, %d cores for ferry, %d NUMA node%s\n", m->cpu_name, m->n_cores, m->n_numa,
           m->n_numa == 1 ? "" : "s");
    printf("caches     L2 %s, L3 %s\n", size_format(m->l2_bytes, a, sizeof a), size_format(m->l3_bytes, b, sizeof b));
    printf("kernels   ");
    for (const char *const *name = cpu_isa_names(); *name; name++)
        printf(" %s%s", *name, cpu_isa_has(*name) ? "" : " (not on this CPU)");
    printf("\nmemory     %s, %s free", size_format(m->ram_total_bytes, a, sizeof a),
           size_format(m->ram_free_bytes, b, sizeof b));
    if (m->ram_limit_bytes < m->ram_total_bytes)
        printf(", limited to %s", size_format(m->ram_limit_bytes, a, sizeof a));
    printf("\n");
    for (int i = 0; i < m->n_mem; i++)
        printf("           %.1f GB/s read by %d thread%s\n", m->mem[i].bytes_per_s / 1e9, m->mem[i].n_threads,
               m->mem[i].n_threads == 1 ? "" : "s");
    printf("locking    %s, io_uring %s\n",
           m->memlock_bytes == UINT64_MAX ? "no limit" : size_format(m->memlock_bytes, a, sizeof a),
           m->has_uring ? "yes" : "no");
    print_kernels(m);
    print_disk(m, p->disk_path != NULL);
    const char *how = m->gpu_id[0] ? m->gpu_id : "as described";
    if (m->gpu_bytes_per_s > 0)
        printf("GPU        memory %.1f GB/s (%s)\n", m->gpu_bytes_per_s / 1e9, how);
    if (m->pcie_bytes_per_s > 0)
        printf("PCIe       %.1f GB/s\n", m->pcie_bytes_per_s / 1e9);
    print_gpu_prompt(&m->gpu_prompt);
    if (p->saved_to)
        printf("saved to   %s\n", p->saved_to);
}

int cmd_probe(const struct conf *conf)
{
    struct probe p = {0};
    int rc = profile_find(&p.machine);

    /* A disk's rates from an earlier run stay good when this one measures another or none; a broken profile is about to be
     * replaced. */
    if (!rc && profile_load(conf, conf->model ? conf->model : ".", &p.machine))
        err_clear();
    if (!rc)
        rc = measure_gpu(conf, &p); /* first: it may not be there */
    if (!rc)
        rc = measure_disk(conf, &p); /* nor this */
    if (!rc)
        rc = measure_memory(conf, &p);
    if (!rc)
        rc = measure_kernels(conf, &p);
    if (!rc && conf->cache_dir)
        rc = profile_save(conf, &p.machine, &p.saved_to);
    if (!rc && conf->json)
        rc = print_json(&p);
    else if (!rc)
        print_text(&p);
    mem_free(p.saved_to);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
