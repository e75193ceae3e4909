/* Bytes that grow: files written by hand, so that what writes them elsewhere has no part in a test. */
#ifndef FERRY_TESTS_RAW_H
#define FERRY_TESTS_RAW_H

#include "src/model/gguf.h"

#include <check.h>
#include <stdint.h>
#include <string.h>

struct raw {
    unsigned char p[1 << 16];
    size_t n;
};

static inline void raw_put(struct raw *r, const void *p, size_t n)
{
    ck_assert_uint_le(r->n + n, sizeof r->p);
    memcpy(r->p + r->n, p, n);
    r->n += n;
}

static inline void raw_u32(struct raw *r, uint32_t v)
{
    raw_put(r, &v, 4);
}

static inline void raw_u64(struct raw *r, uint64_t v)
{
    raw_put(r, &v, 8);
}

static inline void raw_text(struct raw *r, const char *s)
{
    raw_u64(r, strlen(s));
    raw_put(r, s, strlen(s));
}

static inline void raw_key_u32(struct raw *r, const char *name, uint32_t v)
{
    raw_text(r, name);
    raw_u32(r, GGUF_U32);
    raw_u32(r, v);
}

#endif
