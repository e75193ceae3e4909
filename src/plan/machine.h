/* What we have: a value without handles. Found on this machine, described on the command line, or invented by a test. */
#ifndef FERRY_PLAN_MACHINE_H
#define FERRY_PLAN_MACHINE_H

#include <stdbool.h>
#include <stdint.h>

#include "quant/quant.h"
#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MACHINE_MAX_MEM = 16, MACHINE_MAX_DISK = 4, MACHINE_MAX_DISK_RATE = 24 };

/* Numbers of rows at which a matmul is measured besides one: the least at which weights are unpacked for all of them, as many as a batch of
 * chats or an expert's share of a prompt has, and a prompt's. */
enum { MACHINE_SOME_ROWS = 4, MACHINE_FEW_ROWS = 16, MACHINE_MANY_ROWS = 256 };

/* Memory read by so many threads. */
struct machine_mem {
    int n_threads;
    double bytes_per_s;
};

/* Matmul with weights of one type, by all cores, of weights that no cache holds. 0: not known. */
struct machine_kernel {
    double token_bytes_per_s;             /* one row: weight bytes */
    double few_ops_per_s, many_ops_per_s; /* MACHINE_FEW_ROWS, MACHINE_MANY_ROWS rows: multiplications and additions */
    double some_ops_per_s;                /* MACHINE_SOME_ROWS rows */
};

/* Another op, by all cores: op_s + units * unit_s (cost_op_units()). Of MATMUL and MOE: beside the weights' time. */
struct machine_op {
    double op_s, unit_s;
};

/* Products of a prompt's step on a GPU. A tile of its tensor cores has 64 rows and costs as much with fewer: half of that is what an
 * expert with a tile of its own has on average, and lines from there on count the tiles of experts whose numbers of rows differ. */
enum { MACHINE_GPU_FEW_ROWS = 32, MACHINE_GPU_MANY_ROWS = 512 };
struct machine_gpu_products {
    double few_ops_per_s, many_ops_per_s; /* MACHINE_GPU_FEW_ROWS, MACHINE_GPU_MANY_ROWS rows */
};

/* What a prompt costs a GPU with DEVICE_PREFILL_INT. 0: not known. */
struct machine_gpu_prompt {
    struct machine_gpu_products ints, floats; /* of weights that integer dots multiply (Q4_K), and float dots (F16) */
    double attn_unit_s;                       /* of attention, a query-key element (cost_op_units()) */
};

struct machine_disk_rate {
    uint64_t block_bytes;
    int depth; /* reads in flight */
    double bytes_per_s;
};

/* One file system. */
struct machine_disk {
    char id[40];    /* names it (machine_disk_id()) */
    bool is_direct; /* O_DIRECT works; without it, rates may be those of the page cache */
    /* While it reads, matmuls of one row and of many have this share of their speed: what reads takes processors and memory, too. 0: not
     * known */
    double token_share, many_share;
    int n_rates;
    struct machine_disk_rate rates[MACHINE_MAX_DISK_RATE];
};

struct machine {
    char cpu_name[96];
    char isa[16]; /* best kernel table it can run; "" until someone who knows the back ends says */
    int n_cores;  /* that this process may use: affinity, cgroup cpu quota (rounded up), no SMT siblings */
    int n_numa;
    uint64_t
        numa_nodes; /* bit i: node i has memory, and cores that this process may use; 0: memory cannot be placed here */
    uint64_t l2_bytes, l3_bytes; /* of one cache; 0: none or not known */
    uint64_t ram_total_bytes;
    uint64_t ram_limit_bytes; /* cgroup limit (v1 or v2, the tightest of the path); UINT64_MAX: none */
    uint64_t ram_free_bytes;  /* may be taken now: min(MemAvailable, limit - used + reclaimable cache) */
    bool has_uring;           /* io_uring can be used */
    uint64_t memlock_bytes;   /* RLIMIT_MEMLOCK; UINT64_MAX: none */
    uint64_t vram_total_bytes,
        vram_free_bytes; /* of the GPU that shall compute; 0: none, or not known. Whoever lists devices says */
    /* Measured by probe or described; 0: not known */
    double gpu_bytes_per_s, pcie_bytes_per_s; /* of the GPU's memory, of the way to it */
    struct machine_gpu_prompt gpu_prompt;     /* never described */
    char gpu_id[64];         /* that they were measured on (cuda_id()); "": they are of any, being described */
    double mem_bytes_per_s;  /* read by all cores */
    double disk_bytes_per_s; /* of the model's file system: large reads, many in flight */
    int n_mem, n_disks;
    struct machine_mem mem[MACHINE_MAX_MEM]; /* by rising n_threads */
    struct machine_kernel kernels[QUANT_ID_END];
    struct machine_op ops[OP_N_KIND];
    double run_s;  /* that calling the CPU device takes beside the ops */
    double draw_s; /* that drawing a token takes for each of its logits, by one core */
    struct machine_disk disks[MACHINE_MAX_DISK];
    int disk;          /* index of the model's; -1: not known */
    uint64_t identity; /* hash of what names the machine: CPU, cores, RAM size; not of rates */
};

/* Look at this machine: hwloc, /proc, cgroup files. Rates stay 0, isa stays "". ERR_IO, ERR_NOMEM. */
int machine_find(struct machine *out);

/* The part that is the topology: cores, caches, NUMA nodes. synthetic: as hwloc describes machines that are not there
 * (hwloc_topology_set_synthetic()), for tests; NULL: this machine. ERR_IO, ERR_NOMEM, ERR_ARG. */
int machine_find_topology(const char *synthetic, struct machine *m);

/* The part that lies in files: memory sizes and limits, and the cpu quota, which lowers m->n_cores (as it came in). root stands
 * before /proc and /sys/fs/cgroup: "" for this machine, a made tree for tests. ERR_IO when there is no /proc/meminfo. */
int machine_find_limits(const char *root, struct machine *m);

/* Set identity from what names the machine; for described and invented ones. */
void machine_identify(struct machine *m);

/* What the disk of `path` gives to reads at scattered places past the page cache, by block size and reads in flight: a file is
 * read (at most 4 GiB of it), in a folder one of 512 MiB is made and deleted. Takes seconds. ERR_IO, ERR_NOMEM, ERR_ARG for a
 * file under 1 MiB. */
int machine_disk_measure(const char *path, struct machine_disk *out);

/* Reads that go on in the background, of the disk of `path` (a file or folder as above), as fast as it gives, so that one can see what
 * else a machine does meanwhile. It goes into some ram_bytes of memory, 32 MiB at least, in turn: caches hide what it costs if that is
 * little. After _rest nothing reads until the next _go. ERR_IO (of what was read, too), ERR_NOMEM, ERR_ARG, ERR_LIMIT: no thread. */
struct machine_reader;
int machine_reader_open(const char *path, uint64_t ram_bytes, struct machine_reader **out); /* nothing reads yet */
int machine_reader_go(struct machine_reader *r);
int machine_reader_rest(struct machine_reader *r);
void machine_reader_close(struct machine_reader *r); /* NULL is fine */

/* A name for the file system that a file or folder is on, which stays the same as long as that is mounted. ERR_IO. */
int machine_disk_id(const char *path, char id[40]);

/* Keep a measured disk (in place of what was known of it, or of the oldest), and make it the model's. */
void machine_disk_put(struct machine *m, const struct machine_disk *disk);

/* Make the disk of that id the model's, if its rates are known; otherwise the machine's disk rate is not known. */
void machine_disk_use(struct machine *m, const char *id);

/* The model's disk, read in such blocks with so many in flight: between what was measured. disk_bytes_per_s where that is all
 * that is known; 0: nothing is. */
double machine_disk_at(const struct machine *m, double block_bytes, double depth);

/* The fewest reads of such blocks in flight, of those that were measured, that bring this share of the disk's best rate. 0: none was. */
int machine_disk_depth(const struct machine *m, double block_bytes, double share);

/* Seconds that computing takes which would take compute_s by itself, if the model's disk reads for disk_s of it. is_token: one row at a
 * time. */
double machine_beside_disk_s(const struct machine *m, bool is_token, double compute_s, double disk_s);

/* Memory read by n threads: between what was measured. */
double machine_mem_at(const struct machine *m, int n_threads);

/* Has the cost of kernels been measured? */
bool machine_has_kernels(const struct machine *m);

/* The GPU that shall compute: what was measured on another is not known of it. id: fewer bytes than gpu_id has. */
void machine_use_gpu(struct machine *m, const char *id);

/* Take the rates of a saved profile (machine_to_json) if it is of this very machine; m stays as it is if it is another's.
 * path: a file on the model's disk. ERR_FORMAT names the field, ERR_NOMEM. */
int machine_take_rates(const char *profile, const char *path, struct machine *m);

/* To and from JSON (a profile that `ferry probe` saves under the user's cache folder). text: caller frees with mem_free.
 * ERR_FORMAT names the field, ERR_NOMEM. */
int machine_to_json(const struct machine *m, char **out);
int machine_from_json(const char *text, struct machine *out);

#ifdef __cplusplus
}
#endif
#endif
