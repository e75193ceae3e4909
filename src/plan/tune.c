/* Owns the comparison. A token's predicted seconds are computing, and what of the reading is not hidden behind it; each is
 * held against what was measured. */
#include "src/plan/tune.h"

#include <math.h>
#include <stdio.h>

static double compute_s(const struct plan *p)
{
    return p->decode_dense_s + p->decode_expert_s;
}

/* Predicted waiting: what a token takes beyond computing. */
static double wait_s(const struct plan *p)
{
    return fmax(1 / p->decode_tok_per_s - compute_s(p), 0);
}

static double ratio(double measured, double predicted)
{
    return predicted > 0 && measured > 0 ? measured / predicted : 1;
}

void tune_compare(const struct plan *p, const struct tune_seen *seen, struct tune *out)
{
    *out = (struct tune){.predicted_tok_per_s = p->decode_tok_per_s, .compute = 1, .misses = 1, .disk = 1};
    if (!seen->n_tok || !seen->ns)
        return;
    double n = (double)seen->n_tok, s = (double)seen->ns * 1e-9 / n, waited_s = (double)seen->disk_wait_ns * 1e-9 / n;
    out->measured_tok_per_s = 1 / s;
    if (p->decode_tok_per_s <= 0 || seen->n_tok < TUNE_LEAST_TOK)
        return;
    out->compute = ratio(s - waited_s, compute_s(p));
    out->misses = ratio((double)seen->disk_bytes / n, (double)p->missed_bytes_per_tok);
    out->disk = ratio(waited_s, wait_s(p) * out->misses);
    if (fabs(s * p->decode_tok_per_s - 1) <= TUNE_CLOSE)
        return;
    /* Seconds that each of the three adds or saves. */
    double by[] = {[TUNE_OFF_NONE] = 0,
                   [TUNE_OFF_COMPUTE] = (out->compute - 1) * compute_s(p),
                   [TUNE_OFF_MISSES] = (out->misses - 1) * wait_s(p),
                   [TUNE_OFF_DISK] = (out->disk - 1) * out->misses * wait_s(p)};
    for (int i = TUNE_OFF_COMPUTE; i <= TUNE_OFF_DISK; i++) {
        if (fabs(by[i]) > fabs(by[out->off]))
            out->off = (enum tune_off)i;
    }
}

static int say_off(const struct plan *p, const struct tune *t, char *buf, size_t buf_bytes)
{
    switch (t->off) {
    case TUNE_OFF_COMPUTE:
        return snprintf(buf, buf_bytes, "; computing took %.2f of the predicted %.3g ms", t->compute,
                        1e3 * compute_s(p));
    case TUNE_OFF_MISSES:
        return snprintf(buf, buf_bytes, "; %.2f of the predicted %.3g MB a token were read", t->misses,
                        (double)p->missed_bytes_per_tok / 1e6);
    case TUNE_OFF_DISK:
        return snprintf(buf, buf_bytes, "; a byte from disk was waited for %.2f of the predicted time", t->disk);
    default:
        return 0;
    }
}

const char *tune_text(const struct plan *p, const struct tune *t, char *buf, size_t buf_bytes)
{
    buf[0] = '\0';
    if (t->predicted_tok_per_s <= 0 || t->measured_tok_per_s <= 0)
        return buf;
    int n = snprintf(buf, buf_bytes, "predicted %.3g tokens/s, measured %.3g (%+.0f %%)", t->predicted_tok_per_s,
                     t->measured_tok_per_s, 100 * (t->measured_tok_per_s / t->predicted_tok_per_s - 1));
    if (n > 0 && (size_t)n < buf_bytes)
        say_off(p, t, buf + n, buf_bytes - (size_t)n);
    return buf;
}
