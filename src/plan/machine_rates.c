/* What has been measured: lookups between the measured points, and the machine to and from JSON. */
#include "src/plan/machine.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- lookups ---- */

bool machine_has_kernels(const struct machine *m)
{
    for (int type = 0; type < QUANT_ID_END; type++) {
        if (m->kernels[type].token_bytes_per_s > 0)
            return true;
    }
    return false;
}

double machine_mem_at(const struct machine *m, int n_threads)
{
    int i = 0;

    if (!m->n_mem)
        return m->mem_bytes_per_s;
    while (i < m->n_mem && m->mem[i].n_threads < n_threads)
        i++;
    if (i == m->n_mem)
        return m->mem[i - 1].bytes_per_s;
    const struct machine_mem *b = &m->mem[i], *a = i ? b - 1 : b;
    double part = a == b ? 1 : (double)(n_threads - a->n_threads) / (b->n_threads - a->n_threads);
    return a->bytes_per_s + part * (b->bytes_per_s - a->bytes_per_s);
}

/* NULL: it was not measured. */
static const struct machine_disk *used_disk(const struct machine *m)
{
    return m->disk >= 0 && m->disk < m->n_disks ? &m->disks[m->disk] : NULL;
}

double machine_disk_at(const struct machine *m, double block_bytes, double depth)
{
    const struct machine_disk *d = used_disk(m);
    const struct machine_disk_rate *below = NULL, *above = NULL;
    double nearest = INFINITY;

    if (!d || !d->n_rates)
        return m->disk_bytes_per_s;
    for (int i = 0; i < d->n_rates; i++)
        nearest = fmin(nearest, fabs(log(block_bytes / (double)d->rates[i].block_bytes)));
    for (int i = 0; i < d->n_rates; i++) {
        const struct machine_disk_rate *r = &d->rates[i];
        if (fabs(log(block_bytes / (double)r->block_bytes)) > nearest)
            continue;
        if (r->depth <= depth && (!below || r->depth > below->depth))
            below = r;
        if (r->depth >= depth && (!above || r->depth < above->depth))
            above = r;
    }
    if (!below || !above || below == above)
        return (below ? below : above)->bytes_per_s;
    double part = (depth - below->depth) / (above->depth - below->depth);
    return below->bytes_per_s + part * (above->bytes_per_s - below->bytes_per_s);
}

int machine_disk_depth(const struct machine *m, double block_bytes, double share)
{
    const struct machine_disk *d = used_disk(m);
    double best = 0;
    int depth = 0;

    for (int i = 0; d && i < d->n_rates; i++)
        best = fmax(best, machine_disk_at(m, block_bytes, d->rates[i].depth));
    for (int i = 0; d && i < d->n_rates; i++)
        if ((!depth || d->rates[i].depth < depth) && machine_disk_at(m, block_bytes, d->rates[i].depth) >= share * best)
            depth = (int)d->rates[i].depth;
    return depth;
}

double machine_beside_disk_s(const struct machine *m, bool is_token, double compute_s, double disk_s)
{
    const struct machine_disk *d = used_disk(m);
    double share = !d ? 0 : is_token ? d->token_share : d->many_share;

    if (share <= 0 || share >= 1 || !(disk_s > 0))
        return compute_s;
    return fmin(compute_s / share, compute_s + (1 - share) * disk_s);
}

static int find_disk(const struct machine *m, const char *id)
{
    for (int i = 0; i < m->n_disks; i++) {
        if (!strcmp(m->disks[i].id, id))
            return i;
    }
    return -1;
}

void machine_disk_use(struct machine *m, const char *id)
{
    m->disk = find_disk(m, id);
    m->disk_bytes_per_s = 0;
    for (int i = 0; m->disk >= 0 && i < m->disks[m->disk].n_rates; i++)
        m->disk_bytes_per_s = fmax(m->disk_bytes_per_s, m->disks[m->disk].rates[i].bytes_per_s);
}

void machine_disk_put(struct machine *m, const struct machine_disk *disk)
{
    int at = find_disk(m, disk->id);

    if (at < 0 && m->n_disks < MACHINE_MAX_DISK) {
        at = m->n_disks++;
    } else if (at < 0) {
        memmove(m->disks, m->disks + 1, (MACHINE_MAX_DISK - 1) * sizeof *m->disks);
        at = MACHINE_MAX_DISK - 1;
    }
    m->disks[at] = *disk;
    machine_disk_use(m, disk->id);
}

void machine_use_gpu(struct machine *m, const char *id)
{
    if (m->gpu_id[0] && strcmp(m->gpu_id, id) != 0) {
        m->gpu_bytes_per_s = m->pcie_bytes_per_s = 0;
        m->gpu_prompt = (struct machine_gpu_prompt){0};
        m->gpu_id[0] = '\0';
    }
}

int machine_take_rates(const char *profile, const char *path, struct machine *m)
{
    struct machine saved;
    char id[40];

    int rc = machine_from_json(profile, &saved);
    if (rc || saved.identity != m->identity)
        return rc;
    m->mem_bytes_per_s = saved.mem_bytes_per_s;
    m->gpu_bytes_per_s = saved.gpu_bytes_per_s;
    m->pcie_bytes_per_s = saved.pcie_bytes_per_s;
    m->gpu_prompt = saved.gpu_prompt;
    memcpy(m->gpu_id, saved.gpu_id, sizeof m->gpu_id);
    m->n_mem = saved.n_mem;
    memcpy(m->mem, saved.mem, sizeof m->mem);
    /* Kernels of another build or a masked instruction set have other rates. */
    if (!strcmp(saved.isa, m->isa)) {
        memcpy(m->kernels, saved.kernels, sizeof m->kernels);
        memcpy(m->ops, saved.ops, sizeof m->ops);
        m->run_s = saved.run_s;
        m->draw_s = saved.draw_s;
    }
    m->n_disks = saved.n_disks;
    memcpy(m->disks, saved.disks, sizeof m->disks);
    if (path && machine_disk_id(path, id) == 0)
        machine_disk_use(m, id);
    else
        err_clear();
    return 0;
}

/* ---- to JSON ---- */

/* A whole number that is no limit reads null. */
static json_t *size_value(uint64_t bytes)
{
    return bytes == UINT64_MAX ? json_null() : json_integer((json_int_t)bytes);
}

static void set_disks(json_t *o, const struct machine *m)
{
    json_t *disks = json_array();

    for (int i = 0; i < m->n_disks; i++) {
        const struct machine_disk *d = &m->disks[i];
        json_t *rates = json_array();
        for (int k = 0; k < d->n_rates; k++)
            json_array_append_new(rates,
                                  json_pack("{s:I, s:i, s:f}", "block_bytes", (json_int_t)d->rates[k].block_bytes,
                                            "depth", d->rates[k].depth, "bytes_per_s", d->rates[k].bytes_per_s));
        json_array_append_new(disks,
                              json_pack("{s:s, s:b, s:f, s:f, s:o}", "id", d->id, "direct", d->is_direct, "token_share",
                                        d->token_share, "many_share", d->many_share, "rates", rates));
    }
    json_object_set_new(o, "disks", disks);
}

static void set_rates(json_t *o, const struct machine *m)
{
    json_t *memory = json_array(), *kernels = json_object(), *ops = json_object();

    for (int i = 0; i < m->n_mem; i++)
        json_array_append_new(
            memory, json_pack("{s:i, s:f}", "threads", m->mem[i].n_threads, "bytes_per_s", m->mem[i].bytes_per_s));
    for (int type = 0; type < QUANT_ID_END; type++) {
        const struct machine_kernel *k = &m->kernels[type];
        if (k->token_bytes_per_s > 0)
            json_object_set_new(kernels, quant_info(type)->name,
                                json_pack("{s:f, s:f, s:f, s:f}", "token_bytes_per_s", k->token_bytes_per_s,
                                          "some_ops_per_s", k->some_ops_per_s, "few_ops_per_s", k->few_ops_per_s,
                                          "many_ops_per_s", k->many_ops_per_s));
    }
    for (int kind = 0; kind < OP_N_KIND; kind++) {
        if (m->ops[kind].op_s > 0 || m->ops[kind].unit_s > 0)
            json_object_set_new(ops, device_op_name((enum op_kind)kind),
                                json_pack("{s:f, s:f}", "op_s", m->ops[kind].op_s, "unit_s", m->ops[kind].unit_s));
    }
    json_object_set_new(o, "memory", memory);
    json_object_set_new(o, "kernels", kernels);
    json_object_set_new(o, "ops", ops);
    json_object_set_new(o, "run_s", json_real(m->run_s));
    json_object_set_new(o, "draw_s", json_real(m->draw_s));
    set_disks(o, m);
}

static void set_gpu(json_t *o, const struct machine *m)
{
    const struct machine_gpu_prompt *p = &m->gpu_prompt;

    if (m->gpu_bytes_per_s > 0)
        json_object_set_new(o, "gpu_bytes_per_s", json_real(m->gpu_bytes_per_s));
    if (m->pcie_bytes_per_s > 0)
        json_object_set_new(o, "pcie_bytes_per_s", json_real(m->pcie_bytes_per_s));
    if (m->gpu_id[0])
        json_object_set_new(o, "gpu", json_string(m->gpu_id));
    if (p->ints.many_ops_per_s > 0)
        json_object_set_new(o, "gpu_prompt",
                            json_pack("{s:f, s:f, s:f, s:f, s:f}", "int_few_ops_per_s", p->ints.few_ops_per_s,
                                      "int_many_ops_per_s", p->ints.many_ops_per_s, "float_few_ops_per_s",
                                      p->floats.few_ops_per_s, "float_many_ops_per_s", p->floats.many_ops_per_s,
                                      "attention_unit_s", p->attn_unit_s));
}

int machine_to_json(const struct machine *m, char **out)
{
    *out = NULL;
    json_t *o =
        json_pack("{s:s, s:s, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:f, s:f}", "cpu", m->cpu_name, "isa",
                  m->isa, "cores", m->n_cores, "numa_nodes", m->n_numa, "numa_mask", size_value(m->numa_nodes),
                  "l2_bytes", size_value(m->l2_bytes), "l3_bytes", size_value(m->l3_bytes), "ram_total_bytes",
                  size_value(m->ram_total_bytes), "ram_limit_bytes", size_value(m->ram_limit_bytes), "ram_free_bytes",
                  size_value(m->ram_free_bytes), "memlock_bytes", size_value(m->memlock_bytes), "uring", m->has_uring,
                  "mem_bytes_per_s", m->mem_bytes_per_s, "disk_bytes_per_s", m->disk_bytes_per_s);
    if (o)
        set_rates(o, m);
    if (o)
        set_gpu(o, m);
    const size_t flags = JSON_INDENT(2) | JSON_REAL_PRECISION(17);
    size_t n = o ? json_dumpb(o, NULL, 0, flags) : 0;
    char *text = n ? mem_alloc(n + 1, MEM_OTHER) : NULL;

    if (text && json_dumpb(o, text, n, flags) != n) { /* for want of memory of its own */
        mem_free(text);
        text = NULL;
    }
    if (text)
        text[n] = '\0';
    json_decref(o);
    *out = text;
    return text ? 0 : err(ERR_NOMEM, "a machine as text");
}

static int read_text(const json_t *o, const char *name, char *out, size_t out_bytes)
{
    const char *s = json_string_value(json_object_get(o, name));

    if (!s || strlen(s) >= out_bytes)
        return err(ERR_FORMAT, "machine: \"%s\" has to be a text of at most %zu bytes", name, out_bytes - 1);
    snprintf(out, out_bytes, "%s", s);
    return 0;
}

static int read_size(const json_t *o, const char *name, uint64_t *out)
{
    const json_t *v = json_object_get(o, name);

    if (json_is_null(v)) {
        *out = UINT64_MAX;
        return 0;
    }
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return err(ERR_FORMAT, "machine: \"%s\" has to be a number of bytes, or null", name);
    *out = (uint64_t)json_integer_value(v);
    return 0;
}

static int read_count(const json_t *o, const char *name, int least, int *out)
{
    const json_t *v = json_object_get(o, name);

    if (!json_is_integer(v) || json_integer_value(v) < least || json_integer_value(v) > 65536)
        return err(ERR_FORMAT, "machine: \"%s\" has to be a whole number from %d to 65536", name, least);
    *out = (int)json_integer_value(v);
    return 0;
}

static int read_rate(const json_t *o, const char *name, double *out)
{
    const json_t *v = json_object_get(o, name);

    if (!json_is_number(v) || !(json_number_value(v) >= 0))
        return err(ERR_FORMAT, "machine: \"%s\" has to be a rate of at least 0", name);
    *out = json_number_value(v);
    return 0;
}

/* ---- rates from JSON; what an older profile lacks is not known ---- */

static int read_memory(const json_t *list, struct machine *m)
{
    size_t i;
    json_t *v;

    json_array_foreach(list, i, v)
    {
        if (m->n_mem == MACHINE_MAX_MEM)
            return err(ERR_FORMAT, "machine: \"memory\" has more than %d rates", MACHINE_MAX_MEM);
        struct machine_mem *r = &m->mem[m->n_mem++];
        int rc = read_count(v, "threads", i ? r[-1].n_threads + 1 : 1, &r->n_threads);
        rc = rc ? rc : read_rate(v, "bytes_per_s", &r->bytes_per_s);
        if (rc)
            return rc;
    }
    return 0;
}

static int read_kernels(json_t *list, struct machine *m)
{
    const char *name;
    json_t *v;

    json_object_foreach(list, name, v)
    {
        const struct quant_info *info = quant_find(name);
        if (!info) /* of a newer ferry */
            continue;
        struct machine_kernel *k = &m->kernels[info->type];
        int rc = read_rate(v, "token_bytes_per_s", &k->token_bytes_per_s);
        rc = rc ? rc : read_rate(v, "few_ops_per_s", &k->few_ops_per_s);
        rc = rc ? rc : read_rate(v, "many_ops_per_s", &k->many_ops_per_s);
        if (!rc && json_object_get(v, "some_ops_per_s"))
            rc = read_rate(v, "some_ops_per_s", &k->some_ops_per_s);
        if (rc)
            return rc;
    }
    return 0;
}

static int read_ops(json_t *list, struct machine *m)
{
    for (int kind = 0; kind < OP_N_KIND; kind++) {
        const json_t *v = json_object_get(list, device_op_name((enum op_kind)kind));
        int rc = v ? read_rate(v, "op_s", &m->ops[kind].op_s) : 0;
        rc = rc || !v ? rc : read_rate(v, "unit_s", &m->ops[kind].unit_s);
        if (rc)
            return rc;
    }
    return 0;
}

static int read_disk(const json_t *o, struct machine_disk *d)
{
    const json_t *list = json_object_get(o, "rates");
    size_t i;
    json_t *v;

    int rc = read_text(o, "id", d->id, sizeof d->id);
    d->is_direct = json_is_true(json_object_get(o, "direct"));
    if (!rc && json_object_get(o, "token_share"))
        rc = read_rate(o, "token_share", &d->token_share);
    if (!rc && json_object_get(o, "many_share"))
        rc = read_rate(o, "many_share", &d->many_share);
    json_array_foreach(list, i, v)
    {
        if (!rc && i == MACHINE_MAX_DISK_RATE)
            rc = err(ERR_FORMAT, "machine: a disk has more than %d rates", MACHINE_MAX_DISK_RATE);
        if (rc)
            break;
        struct machine_disk_rate *r = &d->rates[d->n_rates++];
        rc = read_size(v, "block_bytes", &r->block_bytes);
        rc = rc ? rc : read_count(v, "depth", 1, &r->depth);
        rc = rc ? rc : read_rate(v, "bytes_per_s", &r->bytes_per_s);
    }
    return rc;
}

static int read_rates(const json_t *o, struct machine *m)
{
    const json_t *disks = json_object_get(o, "disks");
    size_t i;
    json_t *v;

    int rc = read_memory(json_object_get(o, "memory"), m);
    rc = rc ? rc : read_kernels(json_object_get(o, "kernels"), m);
    rc = rc ? rc : read_ops(json_object_get(o, "ops"), m);
    if (!rc && json_object_get(o, "run_s"))
        rc = read_rate(o, "run_s", &m->run_s);
    if (!rc && json_object_get(o, "draw_s"))
        rc = read_rate(o, "draw_s", &m->draw_s);
    json_array_foreach(disks, i, v)
    {
        if (!rc && i == MACHINE_MAX_DISK)
            rc = err(ERR_FORMAT, "machine: more than %d disks", MACHINE_MAX_DISK);
        if (rc)
            break;
        rc = read_disk(v, &m->disks[m->n_disks++]);
    }
    m->disk = -1;
    return rc;
}

static int read_gpu_prompt(const json_t *o, struct machine_gpu_prompt *p)
{
    int rc = read_rate(o, "int_few_ops_per_s", &p->ints.few_ops_per_s);

    rc = rc ? rc : read_rate(o, "int_many_ops_per_s", &p->ints.many_ops_per_s);
    rc = rc ? rc : read_rate(o, "float_few_ops_per_s", &p->floats.few_ops_per_s);
    rc = rc ? rc : read_rate(o, "float_many_ops_per_s", &p->floats.many_ops_per_s);
    return rc ? rc : read_rate(o, "attention_unit_s", &p->attn_unit_s);
}

/* Where one was measured or described. */
static int read_gpu(const json_t *o, struct machine *m)
{
    const json_t *prompt = json_object_get(o, "gpu_prompt");
    int rc = 0;

    if (json_object_get(o, "gpu_bytes_per_s"))
        rc = read_rate(o, "gpu_bytes_per_s", &m->gpu_bytes_per_s);
    if (!rc && json_object_get(o, "pcie_bytes_per_s"))
        rc = read_rate(o, "pcie_bytes_per_s", &m->pcie_bytes_per_s);
    if (!rc && json_object_get(o, "gpu"))
        rc = read_text(o, "gpu", m->gpu_id, sizeof m->gpu_id);
    return rc || !prompt ? rc : read_gpu_prompt(prompt, &m->gpu_prompt);
}

static int read_machine(const json_t *o, struct machine *m)
{
    int rc = read_text(o, "cpu", m->cpu_name, sizeof m->cpu_name);

    rc = rc ? rc : read_text(o, "isa", m->isa, sizeof m->isa);
    rc = rc ? rc : read_count(o, "cores", 1, &m->n_cores);
    rc = rc ? rc : read_count(o, "numa_nodes", 0, &m->n_numa);
    if (!rc && json_object_get(o, "numa_mask")) /* older profiles do not speak of it */
        rc = read_size(o, "numa_mask", &m->numa_nodes);
    rc = rc ? rc : read_size(o, "l2_bytes", &m->l2_bytes);
    rc = rc ? rc : read_size(o, "l3_bytes", &m->l3_bytes);
    rc = rc ? rc : read_size(o, "ram_total_bytes", &m->ram_total_bytes);
    rc = rc ? rc : read_size(o, "ram_limit_bytes", &m->ram_limit_bytes);
    rc = rc ? rc : read_size(o, "ram_free_bytes", &m->ram_free_bytes);
    rc = rc ? rc : read_size(o, "memlock_bytes", &m->memlock_bytes);
    if (!rc && !json_is_boolean(json_object_get(o, "uring")))
        rc = err(ERR_FORMAT, "machine: \"uring\" has to be true or false");
    m->has_uring = json_is_true(json_object_get(o, "uring"));
    rc = rc ? rc : read_rate(o, "mem_bytes_per_s", &m->mem_bytes_per_s);
    rc = rc ? rc : read_rate(o, "disk_bytes_per_s", &m->disk_bytes_per_s);
    rc = rc ? rc : read_gpu(o, m);
    return rc ? rc : read_rates(o, m);
}

int machine_from_json(const char *text, struct machine *out)
{
    struct machine m = {0};
    json_error_t e;
    json_t *o = json_loads(text, 0, &e);

    if (!o)
        return err(ERR_FORMAT, "machine: line %d: %s", e.line, e.text);
    int rc = read_machine(o, &m);
    json_decref(o);
    if (rc)
        return rc;
    machine_identify(&m);
    *out = m;
    return 0;
}
