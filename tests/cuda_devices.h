/* The two devices of an engine made by hand, whose calls a suite may take on their way. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_CUDA_DEVICES_H
#define FERRY_TESTS_CUDA_DEVICES_H

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "src/plan/plan.h"

#include <check.h>
#include <string.h>

/* A GPU for the plan's steps, and a CPU of one thread. */
static inline void open_devices(const struct plan *plan, const struct model *model, bool no_graphs, struct device **gpu,
                                struct device **cpu)
{
    struct cuda_opts opts;

    memset(&opts, 0, sizeof opts);
    opts.no_graphs = no_graphs;
    plan_device_step(plan, model, &opts.most);
    ck_assert_int_eq(cuda_open(&opts, gpu), 0);
    ck_assert_int_eq(cpu_open(&(struct cpu_opts){.n_threads = 1}, cpu), 0);
}

/* From now on the device has functions of its own, in ops, which start as they were. */
static inline void own_ops(struct device *dev, struct device_ops *ops)
{
    *ops = *dev->ops;
    dev->ops = ops;
}

#endif
