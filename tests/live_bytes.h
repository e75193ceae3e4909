/* What a leak is seen by. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_LIVE_BYTES_H
#define FERRY_TESTS_LIVE_BYTES_H

#include "src/base/mem.h"

/* Bytes alive now, under all tags. */
static inline uint64_t live_bytes(void)
{
    uint64_t sum = 0;

    for (int tag = 0; tag < MEM_N_TAG; tag++)
        sum += mem_live_bytes((enum mem_tag)tag);
    return sum;
}

#endif
