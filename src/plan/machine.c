/* The machine found by hwloc. What cgroups allow is in machine_limits.c, rates are in machine_rates.c. */
#include "src/plan/machine.h"

#include "io/ring.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <hwloc.h>
#include <inttypes.h>
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

/* Nodes with memory that lie beside cores which this process may use. The mask holds 64; there are no larger machines of one system. */
static uint64_t find_nodes(hwloc_topology_t topology)
{
    hwloc_bitmap_t allowed = hwloc_bitmap_alloc();
    hwloc_obj_t node = NULL;
    uint64_t nodes = 0;

    if (!allowed)
        return 0;
    if (hwloc_get_cpubind(topology, allowed, HWLOC_CPUBIND_PROCESS))
        hwloc_bitmap_copy(allowed, hwloc_topology_get_allowed_cpuset(topology));
    while ((node = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_NUMANODE, node)))
        if (node->os_index < 64 && node->attr->numanode.local_memory && hwloc_bitmap_intersects(node->cpuset, allowed))
            nodes |= UINT64_C(1) << node->os_index;
    hwloc_bitmap_free(allowed);
    return nodes;
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
    m->numa_nodes = find_nodes(topology);
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

int machine_find_topology(const char *synthetic, struct machine *m)
{
    hwloc_topology_t topology;
    int rc = 0;

    if (hwloc_topology_init(&topology))
        return err(ERR_NOMEM, "the machine's topology");
    if (synthetic && hwloc_topology_set_synthetic(topology, synthetic))
        rc = err(ERR_ARG, "a machine of the form \"%.80s\"", synthetic);
    else if (hwloc_topology_load(topology))
        rc = err(ERR_IO, "hwloc cannot read the machine's topology");
    else
        read_topology(topology, m);
    hwloc_topology_destroy(topology);
    return rc;
}

/* Containers often forbid it: only trying tells. */
static bool can_place(uint64_t nodes)
{
    void *page = mem_map(1, MEM_META);
    bool can = page && mem_place(page, 1, MEM_INTERLEAVED, nodes);

    mem_unmap(page, 1, MEM_META);
    return can;
}

int machine_find(struct machine *out)
{
    struct machine m = {0};
    struct rlimit memlock;

    int rc = machine_find_topology(NULL, &m);
    if (rc < 0)
        return rc;
    if (m.n_numa > 1 && !can_place(m.numa_nodes))
        m.numa_nodes = 0;

    m.memlock_bytes = UINT64_MAX;
    if (!getrlimit(RLIMIT_MEMLOCK, &memlock) && memlock.rlim_cur != RLIM_INFINITY)
        m.memlock_bytes = memlock.rlim_cur;
    rc = machine_find_limits("", &m);
    if (rc == 0)
        rc = try_uring(&m.has_uring);
    if (rc < 0)
        return rc;
    machine_identify(&m);
    m.disk = -1;
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
