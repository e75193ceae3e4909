/* After real work: what was predicted against what was measured, and which rate was off. Pure. */
#ifndef FERRY_PLAN_TUNE_H
#define FERRY_PLAN_TUNE_H

#include <stddef.h>
#include <stdint.h>

#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Generated tokens and what they took. */
struct tune_seen {
    uint64_t n_tok, ns;
    uint64_t disk_bytes, disk_wait_ns; /* read for them; time in which nothing could be computed for want of them */
};

enum tune_off { TUNE_OFF_NONE, TUNE_OFF_COMPUTE, TUNE_OFF_MISSES, TUNE_OFF_DISK };

struct tune {
    double predicted_tok_per_s, measured_tok_per_s;
    enum tune_off
        off; /* what made the larger part of the difference; NONE: less than TUNE_CLOSE, or nothing was predicted */
    /* Measured over predicted: seconds of computing, bytes read, seconds of waiting for a byte. 1 where there is none. */
    double compute, misses, disk;
};

/* Predictions are promised to a fifth; half of that is close. */
#define TUNE_CLOSE 0.1

/* Work of fewer tokens tells little: the first ones find caches cold and slots empty. */
enum { TUNE_LEAST_TOK = 8 };

void tune_compare(const struct plan *p, const struct tune_seen *seen, struct tune *out);

/* One line, without its end, for a person; "" when nothing was predicted or too little was seen. Returns buf. */
const char *tune_text(const struct plan *p, const struct tune *t, char *buf, size_t buf_bytes);

#ifdef __cplusplus
}
#endif
#endif
