/* Sizes as people write and read them. Integer arithmetic throughout, so that neither the locale nor rounding can
 * change a budget. */
#include "src/base/size.h"

#include "src/base/err.h"

#include <inttypes.h>
#include <stdio.h>

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Step over K, KB or KiB and the like; false if *p is no unit. Plain B leaves the shift at 0. */
static bool read_unit(const char **p, unsigned *shift)
{
    static const char units[] = "KMGT";
    const char *s = *p;

    *shift = 0;
    for (unsigned i = 0; units[i]; i++) {
        if ((*s & ~0x20) == units[i]) {
            *shift = 10 * (i + 1);
            s++;
            break;
        }
    }
    if (*shift && *s == 'i') {
        if ((s[1] & ~0x20) != 'B')
            return false;
        s++;
    }
    if ((*s & ~0x20) == 'B')
        s++;
    *p = s;
    return true;
}

int size_parse(const char *text, uint64_t *out_bytes)
{
    /* Six digits after the point: a million times 2^40 still fits in 64 bits. */
    static const uint64_t frac_end = 1000000;
    const char *p = text;
    uint64_t whole = 0, frac = 0, frac_unit = frac_end, bytes;
    unsigned shift;

    if (!is_digit(*p))
        return err(ERR_ARG, "\"%s\" is not a size; write for example 512M, 8G or 1.5GiB", text);
    for (; is_digit(*p); p++) {
        if (!size_mul(whole, 10, &whole) || !size_add(whole, (uint64_t)(*p - '0'), &whole))
            return err(ERR_ARG, "the size \"%s\" is larger than 2^64 bytes", text);
    }
    bool has_point = *p == '.';
    if (has_point) {
        for (p++; is_digit(*p) && frac_unit > 1; p++) {
            frac_unit /= 10;
            frac += (uint64_t)(*p - '0') * frac_unit;
        }
    }
    if (*p == ' ' && p[1])
        p++;
    if (!read_unit(&p, &shift) || *p)
        return err(ERR_ARG,
                   "the size \"%s\" ends in \"%s\"; units are K, M, G and T (at most 6 digits after the point)", text,
                   p);
    if (has_point && (!shift || frac_unit == frac_end))
        return err(ERR_ARG, "the size \"%s\" is not a whole number of bytes", text);
    if (!size_mul(whole, (uint64_t)1 << shift, &bytes) || !size_add(bytes, (frac << shift) / frac_end, &bytes))
        return err(ERR_ARG, "the size \"%s\" is larger than 2^64 bytes", text);
    *out_bytes = bytes;
    return 0;
}

const char *size_format(uint64_t bytes, char *buf, size_t buf_bytes)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB"};
    uint64_t unit = KIB, whole, tenths;
    unsigned i = 0;

    if (bytes < KIB) {
        snprintf(buf, buf_bytes, "%" PRIu64 " B", bytes);
        return buf;
    }
    for (;; unit <<= 10, i++) {
        whole = bytes / unit;
        tenths = (bytes % unit * 10 + unit / 2) / unit;
        if (tenths == 10) {
            whole++;
            tenths = 0;
        }
        if (whole < 1024 || i == 3)
            break;
    }
    if (tenths)
        snprintf(buf, buf_bytes, "%" PRIu64 ".%" PRIu64 " %s", whole, tenths, units[i]);
    else
        snprintf(buf, buf_bytes, "%" PRIu64 " %s", whole, units[i]);
    return buf;
}
