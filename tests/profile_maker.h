/* A profile as ferry probe saves it, of rates that no machine has. Each suite that includes it is a program of its own. lint: C, as
 * Check's suites are */
#ifndef FERRY_TESTS_PROFILE_MAKER_H
#define FERRY_TESTS_PROFILE_MAKER_H

#include "cpu/cpu.h"
#include "src/base/mem.h"
#include "src/plan/machine.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

/* A profile of this machine and the model's disk by which everything takes next to no time, so that the plan's predictions are wrong. */
static void write_profile(const char *path, const char *model)
{
    struct machine m;
    struct machine_disk disk = {.is_direct = true, .n_rates = 1, .rates = {{4096, 1, 1e10}}};
    char *text;
    FILE *f = fopen(path, "w");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_eq(machine_find(&m), 0);
    const char *const *isa = cpu_isa_names();
    while (!cpu_isa_has(*isa))
        isa++;
    strcpy(m.isa, *isa);
    m.mem_bytes_per_s = 1e11;
    for (int type = 0; type < QUANT_ID_END; type++)
        if (quant_info(type))
            m.kernels[type] = (struct machine_kernel){1e11, 1e13, 1e13, 1e13};
    for (int kind = 0; kind < OP_N_KIND; kind++)
        m.ops[kind] = (struct machine_op){1e-9, 1e-12};
    ck_assert_int_eq(machine_disk_id(model, disk.id), 0);
    machine_disk_put(&m, &disk);
    ck_assert_int_eq(machine_to_json(&m, &text), 0);
    fputs(text, f);
    fclose(f);
    mem_free(text);
}

#endif
