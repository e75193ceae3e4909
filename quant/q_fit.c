/* Scales and codes for the least weighted squared error, by trial: for a fixed scale the best codes are the nearest ones, for
 * fixed codes the best scale (and minimum) is a linear least-squares solution. Some 24 or 48 starting scales around the one
 * that spans the largest element go through both. Integer scales are then chosen among the neighbours of the rounded ones,
 * with codes made again for what will really be stored, and the super-block's half scales are solved for once more.
 *
 * Eight trials go through at once, as the compiler's vectors, each with sums of its own: the processor's width changes no
 * bit. Elements are brought to magnitudes below 1 by a power of two and weights to at most 1, so that float sums can neither
 * overflow nor lose what matters. */
#include "quant/q_fit.h"
#include "quant/q_impl.h"

#include <math.h>
#include <stdbool.h>

enum { LANES = 8 };
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t lane_mask __attribute__((vector_size(4 * LANES)));

/* Functions that take lanes are inline, so that nobody sees how they would be passed (hence -Wno-psabi for this folder). */
#define INLINE static inline __attribute__((always_inline))

/* The entries are compiled twice, for any x86-64 and for vectors of 8 floats, and the loader picks one. Sanitizers do not
 * stand what picks. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ENTRY __attribute__((target_clones("default", "avx2")))
#else
#define ENTRY
#endif

/* Trial scales span the largest element with the outermost level moved by up to about one gap, in tenths. */
#define N_TRIALS 16
#define TRIAL_STEP 0.15f

#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding and taking it away rounds to nearest, halves to even */

static const lanes ramp = {0, 1, 2, 3, 4, 5, 6, 7};

INLINE lanes all(float x)
{
    lanes first = {x};
    return __builtin_shufflevector(first, first, 0, 0, 0, 0, 0, 0, 0, 0); /* so written, compilers see one broadcast */
}

INLINE lanes pick(lane_mask where, lanes a, lanes b)
{
    return (lanes)(((lane_mask)a & where) | ((lane_mask)b & ~where));
}

/* To the nearest integer within lo..hi. */
INLINE lanes round_clamped(lanes v, lanes lo, lanes hi)
{
    v = pick(v > lo, v, lo);
    v = pick(v < hi, v, hi);
    return (v + all(ROUNDER)) - all(ROUNDER);
}

INLINE lanes inverses(lanes d)
{
    return (lanes)((lane_mask)(1.0f / d) & ((d > 1e-37f) | (d < -1e-37f)));
}

/* The lane with the least value, the first of several; NaN is none. */
INLINE int least(lanes v)
{
    int best = 0;
    for (int l = 1; l < LANES; l++)
        best = v[l] < v[best] || v[best] != v[best] ? l : best;
    return best;
}

/* ---- a block, made fit for float sums ---- */

struct block {
    float unit; /* what elements were multiplied with: a power of two */
    float x[Q_FIT_LEN], w[Q_FIT_LEN], wx[Q_FIT_LEN];
};

static void take_weights(struct block *b, const float *weights, int n)
{
    float peak = 0.0f;

    for (int k = 0; weights && k < n; k++)
        peak = weights[k] > peak ? weights[k] : peak;
    bool is_even = !(peak > 0x1p-100f) || !(peak < INFINITY);
    float scale = is_even ? 0.0f : 1.0f / peak;
    for (int k = 0; k < n; k++)
        b->w[k] = is_even ? 1.0f : weights[k] * scale;
}

static void take(struct block *b, const float *x, const float *weights, int n)
{
    float peak = 0.0f;
    int exponent = 0;

    for (int k = 0; k < n; k++) {
        float a = fabsf(x[k]);
        peak = a > peak && a < INFINITY ? a : peak;
    }
    if (peak > 0.0f)
        frexpf(peak, &exponent);
    b->unit = ldexpf(1.0f, exponent < -126 ? 126 : -exponent);
    take_weights(b, weights, n);
    for (int k = 0; k < n; k++) { /* a NaN or an infinity becomes something: what is not promised */
        float v = x[k] * b->unit;
        b->x[k] = v >= -1.0f ? (v <= 1.0f ? v : 1.0f) : -1.0f;
        b->wx[k] = b->w[k] * b->x[k];
    }
}

/* A group of a block. */
struct span {
    const float *x, *w, *wx; /* view (n) */
    int n;
};

INLINE struct span group_of(const struct block *b, int group, int n)
{
    return (struct span){b->x + group * n, b->w + group * n, b->wx + group * n, n};
}

INLINE float inverse(float d)
{
    return fabsf(d) > 1e-37f ? 1.0f / d : 0.0f;
}

static float peak_of(const float *x, int n)
{
    float peak = 0.0f;
    for (int k = 0; k < n; k++)
        if (fabsf(x[k]) > fabsf(peak))
            peak = x[k];
    return peak;
}

/* ---- levels ---- */

static int level_of(const struct q_levels *levels, int index)
{
    return levels->table ? levels->table[index] : levels->lo + index;
}

/* Levels made ready for lanes. */
struct ready {
    lanes lo, hi; /* the outermost */
    bool is_table;
    lanes middle[16], gap[16]; /* between a level and the one before it; from 1 on */
};

INLINE struct ready make_ready(const struct q_levels *levels)
{
    struct ready r;
    r.lo = all((float)level_of(levels, 0));
    r.hi = all((float)level_of(levels, levels->n - 1));
    r.is_table = levels->table != NULL;
    for (int i = 1; r.is_table && i < 16; i++) {
        r.middle[i] = all(0.5f * (float)(levels->table[i - 1] + levels->table[i]));
        r.gap[i] = all((float)(levels->table[i] - levels->table[i - 1]));
    }
    return r;
}

/* The levels nearest to v, the lower of two. Of a table: the lowest, and each gap whose middle lies below. */
INLINE lanes nearest(const struct ready *r, lanes v)
{
    if (!r->is_table)
        return round_clamped(v, r->lo, r->hi);
    lanes q = r->lo;
    for (int i = 1; i < 16; i++)
        q += (lanes)((lane_mask)r->gap[i] & (v > r->middle[i]));
    return q;
}

static int index_of(const struct q_levels *levels, float v)
{
    int index = 0;

    if (!levels->table)
        return q_round_clamp(v, levels->lo, levels->lo + levels->n - 1) - levels->lo;
    for (int half = levels->n / 2; half > 0; half /= 2) {
        const int8_t *right = levels->table + index + half;
        index += 2.0f * v > (float)(right[-1] + right[0]) ? half : 0;
    }
    return index;
}

/* The scale, of either sign, for which scale * level comes closest. 0 for zeros. */
INLINE float fit_scale(const struct q_levels *levels, const struct ready *r, struct span s)
{
    float peak = peak_of(s.x, s.n);
    lanes best = all(0.0f), best_gain = all(0.0f); /* gain: how much squared error the best multiple takes away */
    int n_ends = levels->n > 16 ? 1 : 2;           /* with many levels it hardly matters which end the peak is put on */

    if (peak == 0.0f)
        return 0.0f;
    for (int t = 0; t < n_ends * N_TRIALS; t += LANES) {
        float outer = (float)level_of(levels, t < N_TRIALS ? 0 : levels->n - 1);
        lanes step = ramp + (float)(t % N_TRIALS - N_TRIALS / 2);
        lanes id = (outer + step * (TRIAL_STEP * levels->end_gap)) * inverse(peak);
        lanes xq = all(0.0f), qq = all(0.0f);
        for (int k = 0; k < s.n; k++) {
            lanes q = nearest(r, all(s.x[k]) * id);
            xq += all(s.wx[k]) * q;
            qq += all(s.w[k]) * (q * q);
        }
        lanes scale = xq * inverses(qq), gain = scale * xq;
        lane_mask is_better = gain > best_gain;
        best = pick(is_better, scale, best);
        best_gain = pick(is_better, gain, best_gain);
    }
    return best[least(-best_gain)];
}

/* Errors of the levels nearest to x / d, for 8 scales. */
INLINE lanes errors_of(const struct ready *r, struct span s, lanes d)
{
    lanes sum = all(0.0f), id = inverses(d);

    for (int k = 0; k < s.n; k++) {
        lanes e = all(s.x[k]) - d * nearest(r, all(s.x[k]) * id);
        sum += all(s.w[k]) * (e * e);
    }
    return sum;
}

static void put_codes(const struct q_levels *levels, struct span s, float d, uint8_t *code)
{
    float id = inverse(d);

    for (int k = 0; k < s.n; k++)
        code[k] = (uint8_t)index_of(levels, s.x[k] * id);
}

ENTRY uint16_t q_fit_block(const struct q_levels *levels, const float *x, const float *weights, uint8_t *code)
{
    struct ready r = make_ready(levels);
    struct block b;

    take(&b, x, weights, 32);
    struct span s = group_of(&b, 0, 32);
    uint16_t d = quant_f32_to_f16(fit_scale(levels, &r, s) / b.unit);
    put_codes(levels, s, q_half(d) * b.unit, code);
    return d;
}

/* ---- super-blocks of signed scales ---- */

/* The integer scale of each group, and its codes, for a d. Returns the error. */
INLINE float settle_signed(struct q_fit_signed *fit, const struct ready *r, const struct block *b, const float *ideal)
{
    float d = q_half(fit->d) * b->unit, id = inverse(d), sum = 0.0f;

    for (int group = 0; group < Q_FIT_LEN / fit->group_len; group++) {
        struct span s = group_of(b, group, fit->group_len);
        int near = q_round_clamp(ideal[group] * id, fit->scale_lo, fit->scale_hi);
        lanes scales = round_clamped((float)(near - 3) + ramp, all((float)fit->scale_lo), all((float)fit->scale_hi));
        lanes errors = errors_of(r, s, d * scales);
        int best = least(errors);
        fit->scale[group] = (int)scales[best];
        put_codes(fit->levels, s, d * scales[best], fit->code + group * fit->group_len);
        sum += errors[best];
    }
    return sum;
}

/* The best d for the scales and codes that there are. */
static uint16_t refit_signed(const struct q_fit_signed *fit, const struct block *b)
{
    float xq = 0.0f, qq = 0.0f;

    for (int k = 0; k < Q_FIT_LEN; k++) {
        float q = (float)(fit->scale[k / fit->group_len] * level_of(fit->levels, fit->code[k]));
        xq += b->wx[k] * q;
        qq += b->w[k] * (q * q);
    }
    return qq > 0.0f ? quant_f32_to_f16(xq / qq / b->unit) : fit->d;
}

ENTRY void q_fit_signed(struct q_fit_signed *fit, const float *x, const float *weights)
{
    int n_groups = Q_FIT_LEN / fit->group_len;
    struct ready r = make_ready(fit->levels);
    float ideal[Q_FIT_MAX_GROUPS];
    struct block b;

    take(&b, x, weights, Q_FIT_LEN);
    for (int group = 0; group < n_groups; group++)
        ideal[group] = fit_scale(fit->levels, &r, group_of(&b, group, fit->group_len));
    /* the low end has one step more than the high one: the largest scale goes there */
    fit->d = quant_f32_to_f16(peak_of(ideal, n_groups) / (float)fit->scale_lo / b.unit);
    float error = settle_signed(fit, &r, &b, ideal);
    struct q_fit_signed other = *fit;
    other.d = refit_signed(fit, &b);
    if (other.d != fit->d && settle_signed(&other, &r, &b, ideal) < error)
        *fit = other;
}

/* ---- a scale and a minimum ---- */

struct line {
    float scale, min; /* value = scale * code + min */
};

struct lines {
    lanes scale, min;
};

/* Weighted sums over a group that do not depend on codes. */
struct moments {
    float w, x, xx;
};

static struct moments moments_of(struct span s)
{
    struct moments m = {0.0f, 0.0f, 0.0f};

    for (int k = 0; k < s.n; k++) {
        m.w += s.w[k];
        m.x += s.wx[k];
        m.xx += s.wx[k] * s.x[k];
    }
    return m;
}

/* The least-squares lines through the codes that trial lines give; returns the errors with those, infinite where there is no
 * such line. is_below: a minimum above zero cannot be stored, so it is zero then. */
INLINE lanes lines_through(struct span s, const struct moments *m, struct lines trial, int top, bool is_below,
                           struct lines *out)
{
    lanes q1 = all(0.0f), q2 = q1, xq = q1, inv = inverses(trial.scale);

    for (int k = 0; k < s.n; k++) {
        lanes q = round_clamped((all(s.x[k]) - trial.min) * inv, all(0.0f), all((float)top));
        lanes wq = all(s.w[k]) * q;
        q1 += wq;
        q2 += wq * q;
        xq += all(s.wx[k]) * q;
    }
    lanes det = m->w * q2 - q1 * q1, none = all(INFINITY);
    lane_mask is_line = det > 1e-5f * m->w * q2; /* else one code alone, but for rounding */
    out->scale = (m->w * xq - q1 * m->x) / det;
    out->min = (q2 * m->x - q1 * xq) / det;
    if (is_below) {
        lane_mask is_above = out->min > 0.0f;
        out->scale = pick(is_above, xq / q2, out->scale);
        out->min = (lanes)((lane_mask)out->min & ~is_above);
    }
    return pick(is_line & (out->scale >= 0.0f), m->xx - out->scale * xq - out->min * m->x, none);
}

INLINE struct line fit_line(struct span s, int top, bool is_below)
{
    struct moments m = moments_of(s);
    float min = is_below ? 0.0f : s.x[0], max = min; /* zero is spanned where the minimum cannot be above it */
    for (int k = 0; k < s.n; k++) {
        min = s.x[k] < min ? s.x[k] : min;
        max = s.x[k] > max ? s.x[k] : max;
    }
    struct lines best = {all((max - min) / (float)top), all(min)}, other;
    lanes least_errors = all(INFINITY);
    for (int t = 0; t < N_TRIALS; t += LANES) {
        lanes span = (float)top + (ramp + (float)(t - N_TRIALS / 2)) * TRIAL_STEP;
        lanes errors = lines_through(s, &m, (struct lines){(max - min) / span, all(min)}, top, is_below, &other);
        lane_mask is_better = errors < least_errors;
        least_errors = pick(is_better, errors, least_errors);
        best.scale = pick(is_better, other.scale, best.scale);
        best.min = pick(is_better, other.min, best.min);
    }
    /* Once more from there: codes nearest to the solved lines, and lines through those. */
    lanes errors = lines_through(s, &m, best, top, is_below, &other);
    lane_mask is_better = errors < least_errors;
    best.scale = pick(is_better, other.scale, best.scale);
    best.min = pick(is_better, other.min, best.min);
    int l = least(pick(is_better, errors, least_errors));
    return (struct line){best.scale[l], best.min[l]};
}

INLINE lanes line_errors(struct span s, struct lines line, int top)
{
    lanes sum = all(0.0f), inv = inverses(line.scale);

    for (int k = 0; k < s.n; k++) {
        lanes q = round_clamped((all(s.x[k]) - line.min) * inv, all(0.0f), all((float)top));
        lanes e = all(s.x[k]) - (line.scale * q + line.min);
        sum += all(s.w[k]) * (e * e);
    }
    return sum;
}

static void put_line_codes(struct span s, struct line line, int top, uint8_t *code)
{
    float inv = inverse(line.scale);

    for (int k = 0; k < s.n; k++)
        code[k] = (uint8_t)q_round_clamp((s.x[k] - line.min) * inv, 0, top);
}

ENTRY uint16_t q_fit_block_min(int top, const float *x, const float *weights, uint8_t *code, uint16_t *m)
{
    struct block b;

    take(&b, x, weights, 32);
    struct span s = group_of(&b, 0, 32);
    struct line line = fit_line(s, top, false);
    uint16_t d = quant_f32_to_f16(line.scale / b.unit);
    *m = quant_f32_to_f16(line.min / b.unit);
    put_line_codes(s, (struct line){q_half(d) * b.unit, q_half(*m) * b.unit}, top, code);
    return d;
}

/* ---- super-blocks of scales and minimums ---- */

/* Where to look around the rounded scale and minimum: 3 scales with 5 minimums each, and the middle again. */
static const lanes near_scales[2] = {{-1, -1, -1, -1, -1, 0, 0, 0}, {0, 0, 1, 1, 1, 1, 1, 0}};
static const lanes near_mins[2] = {{-2, -1, 0, 1, 2, -2, -1, 0}, {1, 2, -2, -1, 0, 1, 2, 0}};

/* The integer scale and minimum of a group among those, then its codes. Returns the error. */
INLINE float settle_line(struct q_fit_min *fit, const struct block *b, int group, struct line ideal)
{
    struct span s = group_of(b, group, fit->group_len);
    float d = q_half(fit->d) * b->unit, dmin = q_half(fit->dmin) * b->unit, best = INFINITY;
    float near_scale = (float)q_round_clamp(ideal.scale * inverse(d), 0, fit->scale_top);
    float near_min = (float)q_round_clamp(-ideal.min * inverse(dmin), 0, fit->scale_top);
    lanes top = all((float)fit->scale_top);

    for (int i = 0; i < 2; i++) {
        lanes scales = round_clamped(near_scale + near_scales[i], all(0.0f), top);
        lanes mins = round_clamped(near_min + near_mins[i], all(0.0f), top);
        lanes errors = line_errors(s, (struct lines){d * scales, -dmin * mins}, fit->top);
        int l = least(errors);
        if (errors[l] < best) {
            best = errors[l];
            fit->scale[group] = (int)scales[l];
            fit->min[group] = (int)mins[l];
        }
    }
    struct line line = {d * (float)fit->scale[group], -dmin * (float)fit->min[group]};
    put_line_codes(s, line, fit->top, fit->code + group * fit->group_len);
    return best;
}

INLINE float settle_min(struct q_fit_min *fit, const struct block *b, const struct line *ideal)
{
    float sum = 0.0f;

    for (int group = 0; group < Q_FIT_LEN / fit->group_len; group++)
        sum += settle_line(fit, b, group, ideal[group]);
    return sum;
}

/* The best d and dmin for the scales, minimums and codes that there are. */
static void refit_min(struct q_fit_min *fit, const struct block *b)
{
    float pp = 0.0f, pm = 0.0f, mm = 0.0f, xp = 0.0f, xm = 0.0f;

    for (int k = 0; k < Q_FIT_LEN; k++) {
        int group = k / fit->group_len;
        float p = (float)(fit->scale[group] * fit->code[k]), m = (float)fit->min[group];
        pp += b->w[k] * (p * p);
        pm += b->w[k] * (p * m);
        mm += b->w[k] * (m * m);
        xp += b->wx[k] * p;
        xm += b->wx[k] * m;
    }
    double det = (double)pp * (double)mm - (double)pm * (double)pm;
    if (!(det > 1e-5 * (double)pp * (double)mm))
        return;
    double d = ((double)mm * (double)xp - (double)pm * (double)xm) / det;
    double dmin = ((double)pm * (double)xp - (double)pp * (double)xm) / det;
    if (d <= 0.0 || dmin <= 0.0)
        return;
    fit->d = quant_f32_to_f16((float)d / b->unit);
    fit->dmin = quant_f32_to_f16((float)dmin / b->unit);
}

ENTRY void q_fit_min(struct q_fit_min *fit, const float *x, const float *weights)
{
    int n_groups = Q_FIT_LEN / fit->group_len;
    struct line ideal[Q_FIT_MAX_GROUPS];
    float max_scale = 0.0f, max_min = 0.0f;
    struct block b;

    take(&b, x, weights, Q_FIT_LEN);
    for (int group = 0; group < n_groups; group++) {
        ideal[group] = fit_line(group_of(&b, group, fit->group_len), fit->top, true);
        max_scale = ideal[group].scale > max_scale ? ideal[group].scale : max_scale;
        max_min = -ideal[group].min > max_min ? -ideal[group].min : max_min;
    }
    fit->d = quant_f32_to_f16(max_scale / (float)fit->scale_top / b.unit);
    fit->dmin = quant_f32_to_f16(max_min / (float)fit->scale_top / b.unit);
    float error = settle_min(fit, &b, ideal);
    struct q_fit_min other = *fit;
    refit_min(&other, &b);
    if ((other.d != fit->d || other.dmin != fit->dmin) && settle_min(&other, &b, ideal) < error)
        *fit = other;
}
