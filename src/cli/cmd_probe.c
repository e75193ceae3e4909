/* ferry probe: memory by number of threads, cores, kernels, a disk; saved for ferry plan. */
#include "src/cli/cmd.h"

#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/profile.h"
#include "src/cli/term.h"

#include <jansson.h>
#include <stdio.h>

/* Far more than any cache, and no burden to a machine with little memory free. */
#define READ_BYTES GIB
#define READ_LEAST_BYTES (64 * MIB)
enum { N_REPS = 5, MAX_COUNTS = 16 };

struct probe {
    struct machine machine;
    int n_counts;
    int threads[MAX_COUNTS];
    double bytes_per_s[MAX_COUNTS];
    const char *disk_path; /* view; NULL: not measured */
    bool disk_direct;
    char *saved_to; /* own; NULL: not saved */
};

static int measure_memory(const struct conf *conf, struct probe *p)
{
    struct machine *m = &p->machine;
    uint64_t bytes = m->ram_free_bytes / 4 < READ_BYTES ? m->ram_free_bytes / 4 : READ_BYTES;
    int rc = 0;

    if (bytes < READ_LEAST_BYTES)
        bytes = READ_LEAST_BYTES;
    /* 1, 2, 4, ... and all: where the curve bends shows how many threads decoding can use. */
    for (int n = 1; !rc && p->n_counts < MAX_COUNTS; n = 2 * n < m->n_cores ? 2 * n : m->n_cores) {
        if (!conf->quiet)
            fprintf(stderr, "memory, %d thread%s: ", n, n == 1 ? "" : "s");
        rc = cpu_read_rate(n, bytes, N_REPS, &p->bytes_per_s[p->n_counts]);
        if (rc)
            break;
        if (!conf->quiet)
            fprintf(stderr, "%.1f GB/s\n", p->bytes_per_s[p->n_counts] / 1e9);
        p->threads[p->n_counts++] = n;
        if (n >= m->n_cores)
            break;
    }
    if (!rc)
        m->mem_bytes_per_s = p->bytes_per_s[p->n_counts - 1];
    return rc;
}

static int measure_disk(const struct conf *conf, struct probe *p)
{
    if (!conf->model)
        return 0;
    if (!conf->quiet)
        fprintf(stderr, "disk of %s: ", conf->model);
    int rc = machine_disk_rate(conf->model, &p->machine.disk_bytes_per_s, &p->disk_direct);
    if (!conf->quiet)
        fprintf(stderr, rc ? "failed\n" : "%.2f GB/s%s\n", p->machine.disk_bytes_per_s / 1e9,
                p->disk_direct ? "" : " (through the page cache: the file system has no O_DIRECT)");
    p->disk_path = conf->model;
    return rc;
}

static int print_json(const struct probe *p)
{
    char *text = NULL;
    int rc = machine_to_json(&p->machine, &text);

    if (rc)
        return rc;
    json_t *o = json_loads(text, 0, NULL), *memory = json_array(), *isas = json_array();
    mem_free(text);
    for (int i = 0; i < p->n_counts; i++)
        json_array_append_new(memory,
                              json_pack("{s:i, s:f}", "threads", p->threads[i], "bytes_per_s", p->bytes_per_s[i]));
    for (const char *const *name = cpu_isa_names(); *name; name++) {
        if (cpu_isa_has(*name))
            json_array_append_new(isas, json_string(*name));
    }
    json_object_set_new(o, "memory", memory);
    json_object_set_new(o, "isas", isas);
    if (p->disk_path)
        json_object_set_new(o, "disk",
                            json_pack("{s:s, s:b, s:f}", "path", p->disk_path, "direct", p->disk_direct, "bytes_per_s",
                                      p->machine.disk_bytes_per_s));
    json_object_set_new(o, "saved_to", p->saved_to ? json_string(p->saved_to) : json_null());
    int failed = json_dumpf(o, stdout, JSON_INDENT(2));
    json_decref(o);
    putchar('\n');
    return failed ? err(ERR_NOMEM, "the report as JSON") : 0;
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
    for (int i = 0; i < p->n_counts; i++)
        printf("           %.1f GB/s read by %d thread%s\n", p->bytes_per_s[i] / 1e9, p->threads[i],
               p->threads[i] == 1 ? "" : "s");
    printf("locking    %s, io_uring %s\n",
           m->memlock_bytes == UINT64_MAX ? "no limit" : size_format(m->memlock_bytes, a, sizeof a),
           m->has_uring ? "yes" : "no");
    if (m->disk_bytes_per_s > 0)
        printf("disk       %.2f GB/s%s\n", m->disk_bytes_per_s / 1e9, p->disk_path ? "" : " (measured earlier)");
    else
        printf("disk       not measured: name a file or folder on it\n");
    if (p->saved_to)
        printf("saved to   %s\n", p->saved_to);
}

int cmd_probe(const struct conf *conf)
{
    struct probe p = {0};
    int rc = profile_find(&p.machine);

    /* The disk's rate from an earlier run stays good when this one measures none; a broken profile is about to be replaced. */
    if (!rc && profile_load(conf, &p.machine))
        err_clear();
    if (!rc)
        rc = measure_memory(conf, &p);
    if (!rc)
        rc = measure_disk(conf, &p);
    if (!rc && conf->cache_dir)
        rc = profile_save(conf, &p.machine, &p.saved_to);
    if (!rc && conf->json)
        rc = print_json(&p);
    else if (!rc)
        print_text(&p);
    mem_free(p.saved_to);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
