/* The machine found by hwloc, its disk's rate, and the value to and from JSON. What cgroups allow is in machine_limits.c;
 * how fast memory is, cpu/ measures. */
#include "src/plan/machine.h"

#include "io/ring.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <hwloc.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

/* ---- the hardware ---- */

/* Cores with at least one hardware thread that this process may run on. */
static int count_cores(hwloc_topology_t topology)
{
    hwloc_bitmap_t allowed = hwloc_bitmap_alloc();
    int n = 0, n_core = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);

    if (!allowed)
        return 1;
    if (hwloc_get_cpubind(topology, allowed, HWLOC_CPUBIND_PROCESS))
        hwloc_bitmap_copy(allowed, hwloc_topology_get_allowed_cpuset(topology));
    for (int i = 0; i < n_core; i++)
        n += hwloc_bitmap_intersects(hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, (unsigned)i)->cpuset, allowed);
    if (!n)
        n = hwloc_bitmap_weight(allowed);
    hwloc_bitmap_free(allowed);
    return n > 0 ? n : 1;
}

static uint64_t cache_bytes(hwloc_topology_t topology, hwloc_obj_type_t type)
{
    hwloc_obj_t o = hwloc_get_obj_by_type(topology, type, 0);
    return o ? o->attr->cache.size : 0;
}

static void read_topology(hwloc_topology_t topology, struct machine *m)
{
    hwloc_obj_t package = hwloc_get_obj_by_type(topology, HWLOC_OBJ_PACKAGE, 0);
    const char *name = package ? hwloc_obj_get_info_by_name(package, "CPUModel") : NULL;

    if (!name)
        name = hwloc_obj_get_info_by_name(hwloc_get_root_obj(topology), "Architecture");
    snprintf(m->cpu_name, sizeof m->cpu_name, "%s", name ? name : "unknown CPU");
    m->n_cores = count_cores(topology);
    m->n_numa = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_NUMANODE);
    m->l2_bytes = cache_bytes(topology, HWLOC_OBJ_L2CACHE);
    m->l3_bytes = cache_bytes(topology, HWLOC_OBJ_L3CACHE);
}

/* Kernels may lack io_uring, containers often forbid it: only trying tells. Out of memory says nothing about either. */
static int try_uring(bool *out)
{
    const struct ring_file self = {.path = "/proc/self/exe"};
    struct ring *ring;

    int rc = ring_open(&(struct ring_args){.depth = 1, .files = &self, .n_files = 1, .is_buffered = true}, &ring);
    *out = rc == 0;
    if (rc == ERR_NOMEM)
        return rc;
    if (rc == 0)
        ring_close(ring);
    else
        err_clear();
    return 0;
}

int machine_find(struct machine *out)
{
    struct machine m = {0};
    struct rlimit memlock;
    hwloc_topology_t topology;

    if (hwloc_topology_init(&topology))
        return err(ERR_NOMEM, "the machine's topology");
    if (hwloc_topology_load(topology)) {
        hwloc_topology_destroy(topology);
        return err(ERR_IO, "hwloc cannot read the machine's topology");
    }
    read_topology(topology, &m);
    hwloc_topology_destroy(topology);

    m.memlock_bytes = UINT64_MAX;
    if (!getrlimit(RLIMIT_MEMLOCK, &memlock) && memlock.rlim_cur != RLIM_INFINITY)
        m.memlock_bytes = memlock.rlim_cur;
    int rc = machine_find_limits("", &m);
    if (rc == 0)
        rc = try_uring(&m.has_uring);
    if (rc < 0)
        return rc;
    machine_identify(&m);
    *out = m;
    return 0;
}

void machine_identify(struct machine *m)
{
    char text[160];
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a, 64 bits */

    snprintf(text, sizeof text, "%s|%d|%" PRIu64, m->cpu_name, m->n_cores, m->ram_total_bytes);
    for (const char *p = text; *p; p++)
        hash = (hash ^ (unsigned char)*p) * UINT64_C(0x100000001b3);
    m->identity = hash;
}

/* ---- JSON ---- */

/* A whole number that is no limit reads null. */
static json_t *size_value(uint64_t bytes)
{
    return bytes == UINT64_MAX ? json_null() : json_integer((json_int_t)bytes);
}

int machine_to_json(const struct machine *m, char **out)
{
    *out = NULL;
    json_t *o = json_pack(
        "{s:s, s:s, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:f, s:f}", "cpu", m->cpu_name, "isa", m->isa, "cores",
        m->n_cores, "numa_nodes", m->n_numa, "l2_bytes", size_value(m->l2_bytes), "l3_bytes", size_value(m->l3_bytes),
        "ram_total_bytes", size_value(m->ram_total_bytes), "ram_limit_bytes", size_value(m->ram_limit_bytes),
        "ram_free_bytes", size_value(m->ram_free_bytes), "memlock_bytes", size_value(m->memlock_bytes), "uring",
        m->has_uring, "mem_bytes_per_s", m->mem_bytes_per_s, "disk_bytes_per_s", m->disk_bytes_per_s);
    const size_t flags = JSON_INDENT(2) | JSON_REAL_PRECISION(17);
    size_t n = o ? json_dumpb(o, NULL, 0, flags) : 0;
    char *text = n ? mem_alloc(n + 1, MEM_OTHER) : NULL;

    if (text) {
        json_dumpb(o, text, n, flags);
        text[n] = '\0';
    }
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

static int read_machine(const json_t *o, struct machine *m)
{
    int rc = read_text(o, "cpu", m->cpu_name, sizeof m->cpu_name);

    rc = rc ? rc : read_text(o, "isa", m->isa, sizeof m->isa);
    rc = rc ? rc : read_count(o, "cores", 1, &m->n_cores);
    rc = rc ? rc : read_count(o, "numa_nodes", 0, &m->n_numa);
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
    return rc ? rc : read_rate(o, "disk_bytes_per_s", &m->disk_bytes_per_s);
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
