/* Any bytes as a JSON Schema: they are read, or refused with a text; what was read can be followed, and never into a place that no text
 * comes out of; nothing stays behind. */
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/fuzz_walk.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint64_t live = mem_live_bytes(MEM_OTHER);
    struct grammar *g;

    err_clear();
    int rc = grammar_schema((const char *)data, n, &g);
    if (rc ? g || !*err_text() : !g)
        abort();
    if (!rc)
        fuzz_walk(g, data, n);
    grammar_free(g);
    if (mem_live_bytes(MEM_OTHER) != live)
        abort();
    return 0;
}
