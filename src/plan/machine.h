/* What we have: a value without handles. Found on this machine, described on the command line, or invented by a test. */
#ifndef FERRY_PLAN_MACHINE_H
#define FERRY_PLAN_MACHINE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct machine {
    char cpu_name[96];
    char isa[16];                 /* best kernel table it can run */
    int n_cores;                  /* that this process may use: affinity, cgroup cpu quota (rounded up), no SMT siblings */
    int n_numa;
    uint64_t l2_bytes, l3_bytes;
    uint64_t ram_total_bytes;
    uint64_t ram_limit_bytes;     /* cgroup limit (v1 or v2, the tightest of the path); UINT64_MAX: none */
    uint64_t ram_free_bytes;      /* may be taken now: min(MemAvailable, limit - used + reclaimable cache) */
    uint64_t memlock_bytes;       /* RLIMIT_MEMLOCK */
    /* Measured by probe or described; 0: not known */
    double mem_bytes_per_s;       /* read by all cores */
    double disk_bytes_per_s;      /* of the model's file system, O_DIRECT where it has it */
    uint64_t identity;            /* hash of what names the machine: CPU, cores, RAM size; not of rates */
};

/* Look at this machine: hwloc, /proc, cgroup files. Rates stay 0. ERR_IO, ERR_NOMEM. */
int machine_find(struct machine *out);

/* The same from a file tree under `root` instead of "/" for /proc and /sys/fs/cgroup: for tests of the limits. */
int machine_find_limits(const char *root, struct machine *out);

/* Fill in rates: memory by walking `bytes` with all cores, disk by reading `path` (may be NULL: left alone). Takes seconds. */
int machine_probe(struct machine *m, const char *path);

/* To and from JSON (a profile that `ferry probe` saves under the user's cache folder). text: caller frees with mem_free. */
int machine_to_json(const struct machine *m, char **out);
int machine_from_json(const char *text, struct machine *out);

#ifdef __cplusplus
}
#endif
#endif
