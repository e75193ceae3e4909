/* What GPU there is: its facts as one JSON object on stdout. Exit status 77: none, with the reason on stderr. */
#include "src/base/err.h"

#include "cuda/cuda.h"

#include <cuda_runtime_api.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>

enum { NO_GPU = 77 };

#ifdef FERRY_TESTS_EMU_CUDA_RUNTIME_API_H
/* A rehearsal on the emulated runtime, which has no name and no clock. */
static int add_facts(int ordinal, json_t *o)
{
    (void)ordinal;
    return json_object_set_new(o, "name", json_string("the emulated runtime"));
}
#else
static int add_facts(int ordinal, json_t *o)
{
    struct cudaDeviceProp p;
    int driver = 0, runtime = 0, mem_khz = 0;
    cudaError_t e = cudaGetDeviceProperties(&p, ordinal);

    if (!e)
        e = cudaDriverGetVersion(&driver);
    if (!e)
        e = cudaRuntimeGetVersion(&runtime);
    if (!e)
        e = cudaDeviceGetAttribute(&mem_khz, cudaDevAttrMemoryClockRate, ordinal);
    if (e)
        return err(ERR_DEVICE, "CUDA: facts of GPU %d: %s", ordinal, cudaGetErrorString(e));
    json_object_set_new(o, "name", json_string(p.name));
    json_object_set_new(o, "compute_capability", json_real(p.major + p.minor / 10.0));
    json_object_set_new(o, "multiprocessors", json_integer(p.multiProcessorCount));
    json_object_set_new(o, "l2_bytes", json_integer(p.l2CacheSize));
    json_object_set_new(o, "driver", json_integer(driver));
    json_object_set_new(o, "runtime", json_integer(runtime));
    /* Two transfers a clock, where the driver tells the clock at all. */
    json_object_set_new(o, "described_bytes_per_s", json_real(2e3 * mem_khz * (p.memoryBusWidth / 8)));
    return 0;
}
#endif

int main(void)
{
    uint64_t free_bytes = 0, total_bytes = 0;
    int rc = cuda_memory(0, &free_bytes, &total_bytes);

    if (rc) {
        fprintf(stderr, "no GPU that ferry can use: %s\n", err_text());
        return NO_GPU;
    }
    json_t *o =
        json_pack("{s:I, s:I}", "vram_bytes", (json_int_t)total_bytes, "vram_free_bytes", (json_int_t)free_bytes);
    rc = add_facts(0, o);
    if (rc)
        fprintf(stderr, "%s\n", err_text());
    else if (json_dumpf(o, stdout, JSON_INDENT(2)))
        rc = ERR_IO;
    putchar('\n');
    json_decref(o);
    return rc ? 1 : 0;
}
