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
    char isa[16]; /* best kernel table it can run; "" until someone who knows the back ends says */
    int n_cores;  /* that this process may use: affinity, cgroup cpu quota (rounded up), no SMT siblings */
    int n_numa;
    uint64_t l2_bytes, l3_bytes; /* of one cache; 0: none or not known */
    uint64_t ram_total_bytes;
    uint64_t ram_limit_bytes; /* cgroup limit (v1 or v2, the tightest of the path); UINT64_MAX: none */
    uint64_t ram_free_bytes;  /* may be taken now: min(MemAvailable, limit - used + reclaimable cache) */
    bool has_uring;           /* io_uring can be used */
    uint64_t memlock_bytes;   /* RLIMIT_MEMLOCK; UINT64_MAX: none */
    /* Measured by probe or described; 0: not known */
    double mem_bytes_per_s;  /* read by all cores */
    double disk_bytes_per_s; /* of the model's file system, O_DIRECT where it has it */
    uint64_t identity;       /* hash of what names the machine: CPU, cores, RAM size; not of rates */
};

/* Look at this machine: hwloc, /proc, cgroup files. Rates stay 0, isa stays "". ERR_IO, ERR_NOMEM. */
int machine_find(struct machine *out);

/* The part that lies in files: memory sizes and limits, and the cpu quota, which lowers m->n_cores (as it came in). root stands
 * before /proc and /sys/fs/cgroup: "" for this machine, a made tree for tests. ERR_IO when there is no /proc/meminfo. */
int machine_find_limits(const char *root, struct machine *m);

/* Set identity from what names the machine; for described and invented ones. */
void machine_identify(struct machine *m);

/* What the disk of `path` gives to large reads past the page cache, best of a few rounds: a file is read (at most 1 GiB of it),
 * in a folder one of 512 MiB is made and deleted. Takes seconds. *direct: O_DIRECT worked; without it the rate may be that of
 * the page cache. ERR_IO, ERR_NOMEM, ERR_ARG for a file under 1 MiB. */
int machine_disk_rate(const char *path, double *out_bytes_per_s, bool *direct);

/* To and from JSON (a profile that `ferry probe` saves under the user's cache folder). text: caller frees with mem_free.
 * ERR_FORMAT names the field, ERR_NOMEM. */
int machine_to_json(const struct machine *m, char **out);
int machine_from_json(const char *text, struct machine *out);

#ifdef __cplusplus
}
#endif
#endif
