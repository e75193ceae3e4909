/* ferry plan: the plan for a file on this machine, or on one that is described. Reads the model's header only. */
#include "src/cli/cmd.h"

#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/profile.h"
#include "src/cli/term.h"
#include "src/model/model.h"
#include "src/plan/plan.h"

#include <stdio.h>
#include <string.h>

/* This machine, changed by what the user says of another. */
static int make_machine(const struct conf *conf, struct machine *m)
{
    int rc = profile_find(m);

    if (!rc)
        rc = profile_load(conf, m);
    if (rc)
        return rc;
    bool described = conf->n_cores || conf->mem_bytes_per_s > 0 || conf->disk_bytes_per_s > 0 ||
                     conf->ram_bytes > m->ram_total_bytes || conf->ram_bytes > m->ram_limit_bytes;
    if (!described)
        return 0;
    snprintf(m->cpu_name, sizeof m->cpu_name, "as described");
    if (conf->n_cores)
        m->n_cores = (int)conf->n_cores;
    if (conf->mem_bytes_per_s > 0)
        m->mem_bytes_per_s = conf->mem_bytes_per_s;
    if (conf->disk_bytes_per_s > 0)
        m->disk_bytes_per_s = conf->disk_bytes_per_s;
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
                          .no_pin = conf->no_pin};

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

int cmd_plan(const struct conf *conf)
{
    struct machine machine;
    struct model *model = NULL;
    struct plan_opts opts = make_opts(conf);
    struct plan_in in = {.machine = &machine, .opts = &opts, .cpu = &cpu_device_ops};
    struct plan plan;
    char *text = NULL, *json = NULL;

    int rc = check_isa(conf->isa);
    if (!rc)
        rc = make_machine(conf, &machine);
    if (!rc)
        rc = model_open(conf->model, NULL, &model);
    in.model = model;
    if (!rc)
        rc = plan_make(&in, &plan);
    if (!rc)
        rc = plan_to_json(&plan, &json);
    if (!rc && conf->save)
        rc = profile_write(conf->save, json);
    if (!rc && !conf->json)
        rc = plan_explain(&plan, &in, &text);
    if (!rc)
        printf("%s%s", conf->json ? json : text, conf->json ? "\n" : "");
    mem_free(json);
    mem_free(text);
    model_close(model);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
