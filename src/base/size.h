/* Sizes in bytes: units and arithmetic that says when it overflows. */
#ifndef FERRY_BASE_SIZE_H
#define FERRY_BASE_SIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KIB ((uint64_t)1 << 10)
#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)

/* *out = a * b, a + b, or x rounded up to a multiple of align (a power of two); false, and *out untouched, on overflow. */
static inline bool size_mul(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t r;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline bool size_add(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t r;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline bool size_align(uint64_t x, uint64_t align, uint64_t *out)
{
    uint64_t r;
    if (__builtin_add_overflow(x, align - 1, &r))
        return false;
    *out = r & ~(align - 1);
    return true;
}

/* x rounded up to a multiple of align, for values known to be far from the end of the range. */
static inline uint64_t size_up(uint64_t x, uint64_t align)
{
    return (x + align - 1) & ~(align - 1);
}

/* Read "512M", "8G", "1.5GiB", "4096" (bytes); units K M G T are powers of 1024, with or without B or iB. ERR_ARG. */
int size_parse(const char *text, uint64_t *out_bytes);

/* Write "17.3 GiB", "512 MiB", "80 B" into buf; returns buf. */
const char *size_format(uint64_t bytes, char *buf, size_t buf_bytes);

#ifdef __cplusplus
}
#endif
#endif
