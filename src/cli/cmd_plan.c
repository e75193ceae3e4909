/* ferry plan: the plan for a file on this machine, or on one that is described. Reads the model's header only. */
#include "src/cli/cmd.h"

#include "cpu/cpu.h"
#ifdef FERRY_HAVE_CUDA
#include "cuda/cuda.h"
#endif
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/profile.h"
#include "src/cli/shape.h"
#include "src/cli/which_gpu.h"
#include "src/cli/term.h"
#include "src/model/model.h"
#include "src/plan/cost.h"
#include "src/plan/plan.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Cores like this machine's, more or fewer of them, and other memory. One token's matmul needs both: it gains by neither alone, and
 * loses by either. A prompt's needs cores. */
static void describe_compute(const struct conf *conf, struct machine *m)
{
    double cores = conf->n_cores ? (double)conf->n_cores / m->n_cores : 1, token = cores;

    if (conf->mem_bytes_per_s > 0 && m->mem_bytes_per_s > 0 && conf->mem_bytes_per_s / m->mem_bytes_per_s < token)
        token = conf->mem_bytes_per_s / m->mem_bytes_per_s;
    for (int type = 0; type < QUANT_ID_END; type++) {
        m->kernels[type].token_bytes_per_s *= token;
        m->kernels[type].some_ops_per_s *= token;
        m->kernels[type].few_ops_per_s *= cores;
        m->kernels[type].many_ops_per_s *= cores;
    }
    for (int kind = 0; kind < OP_N_KIND; kind++)
        m->ops[kind].unit_s /= cores;
    if (conf->n_cores || conf->mem_bytes_per_s > 0)
        for (int i = 0; i < m->n_disks; i++) /* what reading takes from other cores is not known */
            m->disks[i].token_share = m->disks[i].many_share = 0;
    if (conf->n_cores)
        m->n_cores = (int)conf->n_cores;
    if (conf->mem_bytes_per_s > 0) {
        m->n_mem = 0;
        m->mem_bytes_per_s = conf->mem_bytes_per_s;
    }
}

/* This machine, changed by what the user says of another. */
static int make_machine(const struct conf *conf, struct machine *m)
{
    int rc = profile_find(m);

    if (!rc)
        rc = profile_load(conf, shape_find(conf->model) ? "." : conf->model, m);
    if (rc)
        return rc;
    bool described = conf->n_cores || conf->mem_bytes_per_s > 0 || conf->disk_bytes_per_s > 0 ||
                     conf->ram_bytes > m->ram_total_bytes || conf->ram_bytes > m->ram_limit_bytes;
    if (!described)
        return 0;
    snprintf(m->cpu_name, sizeof m->cpu_name, "as described");
    describe_compute(conf, m);
    if (conf->disk_bytes_per_s > 0) {
        m->disk = -1;
        m->disk_bytes_per_s = conf->disk_bytes_per_s;
    }
    if (conf->ram_bytes) {
        m->ram_total_bytes = m->ram_free_bytes = conf->ram_bytes;
        m->ram_limit_bytes = UINT64_MAX;
    }
    machine_identify(m);
    return 0;
}

static enum plan_io io_of(const char *word)
{
    static const char *const names[] = {[PLAN_IO_URING] = "uring", [PLAN_IO_PREAD] = "pread", [PLAN_IO_MMAP] = "mmap"};

    for (int i = PLAN_IO_URING; word && i <= PLAN_IO_MMAP; i++) {
        if (!strcmp(word, names[i]))
            return (enum plan_io)i;
    }
    return PLAN_IO_AUTO;
}

static struct plan_opts make_opts(const struct conf *conf)
{
    struct plan_opts o = {.ram_bytes = conf->ram_bytes,
                          .expert_ram_bytes = conf->expert_ram_bytes,
                          .n_ctx = conf->n_ctx,
                          .chunk_tok = conf->chunk_tok,
                          .n_threads = conf->n_threads,
                          .kv_type = conf->kv_type && !strcmp(conf->kv_type, "q8_0") ? QUANT_Q8_0 : QUANT_F16,
                          .io = io_of(conf->io),
                          .prefill = conf->prefill && !strcmp(conf->prefill, "blas") ? DEVICE_PREFILL_BLAS
                                                                                     : DEVICE_PREFILL_INT,
                          .no_pin = conf->no_pin,
                          .skew = conf->skew};

    snprintf(o.isa, sizeof o.isa, "%s", conf->isa ? conf->isa : "");
    return o;
}

static int check_isa(const char *isa)
{
    if (!isa)
        return 0;
    for (const char *const *name = cpu_isa_names(); *name; name++) {
        if (!strcmp(*name, isa))
            return 0;
    }
    return err(ERR_UNSUPPORTED, "--isa %s: this ferry has no such kernels (see ferry probe)", isa);
}

/* A file, of which the beginning is enough, or the name of a shape where no such file is. */
static int open_model(const char *name, struct model **out)
{
    const struct shape *shape = access(name, F_OK) ? shape_find(name) : NULL;
    return shape ? shape_open(shape, out) : model_open_head(name, NULL, out);
}

/* The GPU that --device names, which need not be there if --vram says how much memory it has. */
static int take_gpu(const struct conf *conf, struct plan_in *in, struct plan_opts *o, struct machine *m)
{
    int number, rc = which_gpu(conf->device ? conf->device : "cpu", &number);

    if (rc || number == WHICH_GPU_NONE)
        return rc;
    o->gpu_number = (uint32_t)number;
    o->vram_bytes = conf->vram_bytes;
    o->copies = !conf->gpu_copies || !strcmp(conf->gpu_copies, "auto") ? PLAN_COPIES_AUTO
                : !strcmp(conf->gpu_copies, "never")                   ? PLAN_COPIES_NEVER
                                                                       : PLAN_COPIES_ALWAYS;
#ifdef FERRY_HAVE_CUDA
    char id[CUDA_ID_BYTES];
    in->gpu = &cuda_device_ops;
    if (cuda_id(number, id) == 0)
        machine_use_gpu(m, id);
    else /* it need not be there */
        err_clear();
    return o->vram_bytes ? 0 : cuda_memory(number, &m->vram_free_bytes, &m->vram_total_bytes);
#else
    (void)in;
    (void)m;
    return 0;
#endif
}

/* What is said of a GPU goes before what was measured. One with other memory computes otherwise, too. */
static void describe_gpu(const struct conf *conf, struct machine *m)
{
    if (conf->gpu_bytes_per_s > 0) {
        m->gpu_bytes_per_s = conf->gpu_bytes_per_s;
        m->gpu_prompt = (struct machine_gpu_prompt){0};
    }
    if (conf->pcie_bytes_per_s > 0)
        m->pcie_bytes_per_s = conf->pcie_bytes_per_s;
}

/* What a described GPU would do, estimated where no plan for it was asked for: the plan itself is the CPU's. */
static int print_gpu(const struct conf *conf, const struct plan_in *in, const struct plan *p)
{
    const struct cost_gpu gpu = {conf->vram_bytes, in->machine->gpu_bytes_per_s, in->machine->pcie_bytes_per_s};
    struct cost_gpu_plan g;
    char a[32], b[32], c[32], d[32];

    if (!conf->vram_bytes || p->has_gpu || in->gpu)
        return 0;
    int rc = cost_gpu_plan(&gpu, in, p, &g);
    if (rc)
        return rc;
    printf("\nGPU of %s: an estimate (with --device cuda:0 a plan for it, where ferry was built with CUDA)\n"
           "  it would hold %s of dense weights, %s of KV cache, %s of experts\n",
           size_format(gpu.vram_bytes, a, sizeof a), size_format(g.dense_bytes, b, sizeof b),
           size_format(g.kv_bytes, c, sizeof c), size_format(g.expert_bytes, d, sizeof d));
    if (g.decode_tok_per_s > 0)
        printf("  decode at most %.3g tokens/s, bytes over rates, %.0f %% of the experts found in it\n",
               g.decode_tok_per_s, 100 * g.hits);
    else
        printf("  decode not known: --gpu-rate, --mem-rate and, below the model's size, --disk are needed\n");
    return 0;
}

static int print_plan(const struct conf *conf, const struct plan_in *in, const struct plan *p)
{
    char *text = NULL, *others = NULL;
    int rc = plan_explain(p, in, &text);

    if (!rc && conf->explain)
        rc = plan_compare(p, in, &others);
    if (!rc)
        printf("%s%s", text, others ? others : "");
    if (!rc)
        rc = print_gpu(conf, in, p);
    mem_free(others);
    mem_free(text);
    return rc;
}

int cmd_plan(const struct conf *conf)
{
    struct machine machine;
    struct model *model = NULL;
    struct plan_opts opts = make_opts(conf);
    struct plan_in in = {.machine = &machine, .opts = &opts, .cpu = &cpu_device_ops};
    struct plan plan;
    char *json = NULL;

    int rc = check_isa(conf->isa);
    if (!rc)
        rc = make_machine(conf, &machine);
    if (!rc)
        rc = take_gpu(conf, &in, &opts, &machine);
    describe_gpu(conf, &machine);
    if (!rc)
        rc = open_model(conf->model, &model);
    in.model = model;
    if (!rc)
        rc = plan_make(&in, &plan);
    if (!rc)
        rc = plan_to_json(&plan, &json);
    if (!rc && conf->save)
        rc = profile_write(conf->save, json);
    if (!rc && conf->json)
        printf("%s\n", json);
    else if (!rc)
        rc = print_plan(conf, &in, &plan);
    mem_free(json);
    model_close(model);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
