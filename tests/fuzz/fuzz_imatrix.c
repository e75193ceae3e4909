/* Any bytes as an importance matrix: opening ends in one or an error; every value of it is finite and not below 0, and nothing
 * stays behind. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/imatrix.h"
#include "tests/fuzz/fuzz.h"
#include "tests/memfile.h"

#include <math.h>
#include <stdlib.h>

static void look_at(const struct imatrix *im, const char *name)
{
    const struct imatrix_entry *entry = imatrix_find(im, name);
    bool is_known;

    if (!entry)
        return;
    uint64_t n = imatrix_n_values(entry);
    for (uint64_t n_experts = 1; n_experts <= 3; n_experts++) {
        if (n % n_experts)
            continue;
        float *values = malloc(n / n_experts * sizeof *values);
        if (imatrix_read(im, entry, n_experts - 1, n / n_experts, values, &is_known))
            abort(); /* memory does not fail to be read */
        for (uint64_t k = 0; is_known && k < n / n_experts; k++)
            if (!(values[k] >= 0.0f))
                abort();
        free(values);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct imatrix *im;

    memfile_add(&files, "i", data, n);
    if (!imatrix_open("i", &ops, &im)) {
        if (imatrix_n_entries(im) < 1)
            abort();
        look_at(im, "blk.0.attn_k.weight");
        look_at(im, "blk.0.ffn_up_exps.weight");
        imatrix_close(im);
    } else if (!err_text()[0]) {
        abort();
    }
    if (mem_live_bytes(MEM_META) || mem_live_bytes(MEM_SCRATCH) || files.n_open)
        abort();
    return 0;
}
