/* The CPU device: a team of threads that walks an op list together. Implements src/device/device.h. */
#ifndef FERRY_CPU_CPU_H
#define FERRY_CPU_CPU_H

#include "src/device/device.h"

#ifdef __cplusplus
extern "C" {
#endif

struct cpu_opts {
    int n_threads;   /* >= 1; worker 0 is the thread that calls run */
    const char *isa; /* NULL: the best the machine has; else the name of a kernel table ("ref", "avx2", …) */
    bool pin;        /* pin workers to cores of the allowed set through hwloc */
    enum device_prefill prefill;
    bool is_beside_gpu; /* between two of its jobs a GPU has one: the team stays awake for longer */
};

/* Start the team. ERR_UNSUPPORTED for an ISA the machine lacks, ERR_NOMEM, ERR_LIMIT when threads cannot be made. */
int cpu_open(const struct cpu_opts *opts, struct device **out);

/* The device's functions, without opening it: what a planner asks. */
extern const struct device_ops cpu_device_ops;

/* Names of the kernel tables compiled in, best first, NULL-terminated; whether this machine can run one; which one runs. */
const char *const *cpu_isa_names(void);
bool cpu_isa_has(const char *name);
const char *cpu_isa_used(const struct device *dev);

/* Walk over `bytes` of memory with n_threads and say how many bytes a second were read: the best of n_reps. For probe. */
int cpu_read_rate(int n_threads, uint64_t bytes, int n_reps, double *out_bytes_per_s);

#ifdef __cplusplus
}
#endif
#endif
