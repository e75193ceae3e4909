/* Owns the list of kernel tables and the question whether this machine has what one needs. */
#include "cpu/isa.h"

#include "src/base/err.h"

#ifdef CPU_HAVE_AVX2
#include <cpuid.h>
#endif
#include <stddef.h>
#include <string.h>

static bool has_ref(void)
{
    return true;
}

#ifdef CPU_HAVE_AVX2
/* clang 14 does not know "f16c" in __builtin_cpu_supports(). */
static bool has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

/* The compiler's run-time library asks cpuid and xgetbv: the operating system must keep the upper halves, too. */
static bool has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
#endif

#ifdef CPU_HAVE_AVX512
/* Some functions of these tables are those of AVX2. */
static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_avx512vnni(void)
{
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}
#endif

/* Best first. */
static const struct {
    const struct kern_table *table;
    bool (*has)(void);
} isas[] = {
#ifdef CPU_HAVE_AVX512
    {&kern_avx512vnni, has_avx512vnni},
    {&kern_avx512, has_avx512},
#endif
#ifdef CPU_HAVE_AVX2
    {&kern_avx2, has_avx2},
#endif
    {&kern_ref, has_ref},
};

static const char *const names[] = {
#ifdef CPU_HAVE_AVX512
    "avx512vnni", "avx512",
#endif
#ifdef CPU_HAVE_AVX2
    "avx2",
#endif
    "ref",        NULL,
};

_Static_assert(sizeof isas / sizeof *isas + 1 == sizeof names / sizeof *names, "a name for every table");

const char *const *isa_names(void)
{
    return names;
}

bool isa_has(const char *name)
{
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
        if (!strcmp(name, isas[i].table->isa))
            return isas[i].has();
    return false;
}

int isa_choose(const char *name, const struct kern_table **out)
{
    for (size_t i = 0; i < sizeof isas / sizeof *isas; i++) {
        if (name ? strcmp(name, isas[i].table->isa) : !isas[i].has())
            continue;
        if (!isas[i].has())
            return err(ERR_UNSUPPORTED, "this machine cannot run the kernels for %s", name);
        *out = isas[i].table;
        return 0;
    }
    return err(ERR_UNSUPPORTED, "no kernels for the instruction set %s", name);
}
