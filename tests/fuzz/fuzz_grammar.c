/* Any bytes as a grammar in GBNF: they are read, or refused with a text; what was read can be followed, and never into a place that no
 * text comes out of; nothing stays behind. */
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/fuzz_walk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    fuzz_walk_any(grammar_gbnf, data, n);
    return 0;
}
