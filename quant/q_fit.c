/* Scales and codes for the least weighted squared error, by trial: for a fixed scale the best codes are the nearest ones, for
 * fixed codes the best scale (and minimum) is a linear least-squares solution. Some 20 or 40 starting scales around the one
 * that spans the largest element go through both. Integer scales are then chosen among the neighbours of the rounded ones,
 * with codes made again for what will really be stored, and the super-block's half scales are solved for once more.
 *
 * Elements are brought to magnitudes below 1 by a power of two and weights below 1, so that float sums can neither overflow nor lose what
 * matters. They go through in lanes of 8, each with sums of its own: compilers make vectors of that, and the result does not
 * depend on which. */
#include "quant/q_fit.h"
#include "quant/q_impl.h"

#include <math.h>
#include <stdbool.h>

enum { LANES = 8 };

/* Trial scales span the largest element with the outermost level moved by up to one gap, in tenths. */
#define N_TRIALS_SIDE 10
#define TRIAL_STEP 0.1f

/* Refinements of a super-block's half scales: the third changed nothing in the fourth digit of the error. */
#define N_REFITS 2

#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding and taking it away rounds to nearest, halves to even */

/* ---- a block, made fit for float sums ---- */

struct block {
    int n;      /* a multiple of LANES */
    float unit; /* what elements were multiplied with: a power of two */
    float x[Q_FIT_LEN], w[Q_FIT_LEN], wx[Q_FIT_LEN];
};

static void take_weights(struct block *b, const float *weights)
{
    float peak = 0.0f;

    for (int k = 0; weights && k < b->n; k++)
        peak = weights[k] > peak ? weights[k] : peak;
    bool is_even = !(peak > 0x1p-100f) || !(peak < INFINITY);
    for (int k = 0; k < b->n; k++)
        b->w[k] = is_even ? 1.0f : weights[k] / peak;
}

static void take(struct block *b, const float *x, const float *weights, int n)
{
    float peak = 0.0f;
    int exponent = 0;

    b->n = n;
    for (int k = 0; k < n; k++) {
        float a = fabsf(x[k]);
        peak = a > peak && a < INFINITY ? a : peak;
    }
    if (peak > 0.0f)
        frexpf(peak, &exponent);
    b->unit = ldexpf(1.0f, exponent < -126 ? 126 : -exponent);
    take_weights(b, weights);
    for (int k = 0; k < n; k++) { /* a NaN or an infinity becomes something: what is not promised */
        float v = x[k] * b->unit;
        b->x[k] = v >= -1.0f ? (v <= 1.0f ? v : 1.0f) : -1.0f;
        b->wx[k] = b->w[k] * b->x[k];
    }
}

static float sum_of(const float lanes[LANES])
{
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

static float inverse(float d)
{
    float id = d == 0.0f ? 0.0f : 1.0f / d;
    return fabsf(id) < INFINITY ? id : 0.0f;
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

/* The levels nearest to LANES numbers, the lower of two. */
static inline void round_lanes(const struct q_levels *levels, const float *v, float *q)
{
    float lo = (float)levels->lo, hi = (float)(levels->lo + levels->n - 1);

    for (int l = 0; l < LANES; l++) {
        float c = v[l] > lo ? v[l] : lo;
        c = c < hi ? c : hi;
        q[l] = (c + ROUNDER) - ROUNDER;
    }
}

/* The same for a table: the lowest level, and each gap that lies below. */
static inline void look_up_lanes(const struct q_levels *levels, const float *v, float *q)
{
    for (int l = 0; l < LANES; l++)
        q[l] = (float)levels->table[0];
    for (int i = 1; i < 16; i++) {
        float middle = 0.5f * (float)(levels->table[i - 1] + levels->table[i]);
        float gap = (float)(levels->table[i] - levels->table[i - 1]);
        for (int l = 0; l < LANES; l++)
            q[l] += v[l] > middle ? gap : 0.0f;
    }
}

static inline void nearest_lanes(const struct q_levels *levels, const float *x, float id, float *q)
{
    float v[LANES];

    for (int l = 0; l < LANES; l++)
        v[l] = x[l] * id;
    if (levels->table)
        look_up_lanes(levels, v, q);
    else
        round_lanes(levels, v, q);
}

static int index_of(const struct q_levels *levels, float level)
{
    int index = 0;

    if (!levels->table)
        return (int)level - levels->lo;
    while (index < levels->n - 1 && (float)levels->table[index] < level)
        index++;
    return index;
}

/* Elements from..from + n of a block, as an interval. */
struct span {
    const struct block *b;
    int from, n;
};

/* How much error the best multiple of the levels nearest to x / d takes away; *scale is that multiple. */
static float gain_of(const struct q_levels *levels, struct span s, float d, float *scale)
{
    const float *x = s.b->x + s.from, *w = s.b->w + s.from, *wx = s.b->wx + s.from;
    float xq[LANES] = {0}, qq[LANES] = {0}, q[LANES], id = inverse(d);

    for (int k = 0; k < s.n; k += LANES) {
        nearest_lanes(levels, x + k, id, q);
        for (int l = 0; l < LANES; l++) {
            xq[l] += wx[k + l] * q[l];
            qq[l] += w[k + l] * (q[l] * q[l]);
        }
    }
    float a = sum_of(xq), b = sum_of(qq);
    *scale = b > 0.0f ? a / b : 0.0f;
    return *scale * a;
}

/* The scale, of either sign, for which scale * level comes closest. 0 for zeros. */
static float fit_scale(const struct q_levels *levels, struct span s)
{
    float peak = peak_of(s.b->x + s.from, s.n), best = 0.0f, best_gain = 0.0f;
    int n_ends = levels->n > 16 ? 1 : 2; /* with many levels it hardly matters which end the peak is put on */

    for (int end = 0; end < n_ends; end++)
        for (int t = -N_TRIALS_SIDE; t <= N_TRIALS_SIDE; t++) {
            float outer = (float)level_of(levels, end ? levels->n - 1 : 0) + (float)t * TRIAL_STEP * levels->end_gap;
            float scale, gain = gain_of(levels, s, peak / outer, &scale);
            if (gain > best_gain) {
                best_gain = gain;
                best = scale;
            }
        }
    return best;
}

static float error_of(const struct q_levels *levels, struct span s, float d)
{
    const float *x = s.b->x + s.from, *w = s.b->w + s.from;
    float sum[LANES] = {0}, q[LANES], id = inverse(d);

    for (int k = 0; k < s.n; k += LANES) {
        nearest_lanes(levels, x + k, id, q);
        for (int l = 0; l < LANES; l++) {
            float e = x[k + l] - d * q[l];
            sum[l] += w[k + l] * (e * e);
        }
    }
    return sum_of(sum);
}

static void put_codes(const struct q_levels *levels, struct span s, float d, uint8_t *code)
{
    float q[LANES], id = inverse(d);

    for (int k = 0; k < s.n; k += LANES) {
        nearest_lanes(levels, s.b->x + s.from + k, id, q);
        for (int l = 0; l < LANES; l++)
            code[k + l] = (uint8_t)index_of(levels, q[l]);
    }
}

uint16_t q_fit_block(const struct q_levels *levels, const float *x, const float *weights, uint8_t *code)
{
    struct block b;

    take(&b, x, weights, 32);
    struct span all = {&b, 0, 32};
    uint16_t d = quant_f32_to_f16(fit_scale(levels, all) / b.unit);
    put_codes(levels, all, q_half(d) * b.unit, code);
    return d;
}

/* ---- super-blocks of signed scales ---- */

/* The integer scale of each group, and its codes, for a d. Returns the error. */
static float settle_signed(struct q_fit_signed *fit, const struct block *b, const float *ideal)
{
    float d = q_half(fit->d) * b->unit, id = inverse(d), sum = 0.0f;

    for (int group = 0; group < Q_FIT_LEN / fit->group_len; group++) {
        struct span s = {b, group * fit->group_len, fit->group_len};
        int near = q_round_clamp(ideal[group] * id, fit->scale_lo, fit->scale_hi);
        float best = INFINITY;
        fit->scale[group] = near;
        for (int scale = near - 1; scale <= near + 1; scale++) {
            if (scale < fit->scale_lo || scale > fit->scale_hi)
                continue;
            float e = error_of(fit->levels, s, d * (float)scale);
            if (e < best) {
                best = e;
                fit->scale[group] = scale;
            }
        }
        put_codes(fit->levels, s, d * (float)fit->scale[group], fit->code + s.from);
        sum += best;
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

void q_fit_signed(struct q_fit_signed *fit, const float *x, const float *weights)
{
    int n_groups = Q_FIT_LEN / fit->group_len;
    float ideal[Q_FIT_MAX_GROUPS];
    struct block b;

    take(&b, x, weights, Q_FIT_LEN);
    for (int group = 0; group < n_groups; group++)
        ideal[group] = fit_scale(fit->levels, (struct span){&b, group * fit->group_len, fit->group_len});
    /* the low end has one step more than the high one: the largest scale goes there */
    fit->d = quant_f32_to_f16(peak_of(ideal, n_groups) / (float)fit->scale_lo / b.unit);
    float error = settle_signed(fit, &b, ideal);
    for (int i = 0; i < N_REFITS; i++) {
        struct q_fit_signed other = *fit;
        other.d = refit_signed(fit, &b);
        float e = other.d == fit->d ? error : settle_signed(&other, &b, ideal);
        if (!(e < error))
            break;
        *fit = other;
        error = e;
    }
}

/* ---- a scale and a minimum ---- */

struct line {
    float scale, min; /* value = scale * code + min */
};

static inline void codes_of_lanes(const float *x, struct line line, float inv, float top, float *q)
{
    for (int l = 0; l < LANES; l++) {
        float v = (x[l] - line.min) * inv;
        v = v > 0.0f ? v : 0.0f;
        v = v < top ? v : top;
        q[l] = (v + ROUNDER) - ROUNDER;
    }
}

static float error_line(struct span s, struct line line, int top)
{
    const float *x = s.b->x + s.from, *w = s.b->w + s.from;
    float sum[LANES] = {0}, q[LANES], inv = inverse(line.scale);

    for (int k = 0; k < s.n; k += LANES) {
        codes_of_lanes(x + k, line, inv, (float)top, q);
        for (int l = 0; l < LANES; l++) {
            float e = x[k + l] - (line.scale * q[l] + line.min);
            sum[l] += w[k + l] * (e * e);
        }
    }
    return sum_of(sum);
}

/* Weighted sums over a group that do not depend on codes. */
struct moments {
    float w, x;
};

static struct moments moments_of(struct span s)
{
    struct moments m = {0.0f, 0.0f};

    for (int k = s.from; k < s.from + s.n; k++) {
        m.w += s.b->w[k];
        m.x += s.b->wx[k];
    }
    return m;
}

/* The least-squares line through the codes that a trial line gives. is_below: a minimum above zero cannot be stored: then zero. */
static struct line line_through(struct span s, struct moments m, struct line trial, int top, bool is_below)
{
    const float *x = s.b->x + s.from, *w = s.b->w + s.from, *wx = s.b->wx + s.from;
    float q1[LANES] = {0}, q2[LANES] = {0}, xq[LANES] = {0}, q[LANES], inv = inverse(trial.scale);

    for (int k = 0; k < s.n; k += LANES) {
        codes_of_lanes(x + k, trial, inv, (float)top, q);
        for (int l = 0; l < LANES; l++) {
            float wq = w[k + l] * q[l];
            q1[l] += wq;
            q2[l] += wq * q[l];
            xq[l] += wx[k + l] * q[l];
        }
    }
    double a = (double)sum_of(q1), b = (double)sum_of(q2), c = (double)sum_of(xq);
    double det = (double)m.w * b - a * a;
    if (det <= 1e-12 * (double)m.w * b)
        return trial;
    struct line line = {(float)(((double)m.w * c - a * (double)m.x) / det), (float)((b * (double)m.x - a * c) / det)};
    if (is_below && line.min > 0.0f)
        line = (struct line){(float)(c / b), 0.0f};
    return line;
}

static struct line fit_line(struct span s, int top, bool is_below)
{
    const float *x = s.b->x + s.from;
    struct moments m = moments_of(s);
    float min = is_below ? 0.0f : x[0], max = min; /* zero is spanned where the minimum cannot be above it */
    for (int k = 0; k < s.n; k++) {
        min = x[k] < min ? x[k] : min;
        max = x[k] > max ? x[k] : max;
    }
    struct line best = {0.0f, min};
    float best_error = error_line(s, best, top);
    for (int t = -N_TRIALS_SIDE; t <= N_TRIALS_SIDE; t++) {
        struct line trial = {(max - min) / ((float)top + (float)t * TRIAL_STEP), min};
        struct line line = line_through(s, m, trial, top, is_below);
        float e = line.scale >= 0.0f ? error_line(s, line, top) : INFINITY;
        if (e < best_error) {
            best_error = e;
            best = line;
        }
    }
    return best;
}

static void put_line_codes(struct span s, struct line line, int top, uint8_t *code)
{
    float q[LANES], inv = inverse(line.scale);

    for (int k = 0; k < s.n; k += LANES) {
        codes_of_lanes(s.b->x + s.from + k, line, inv, (float)top, q);
        for (int l = 0; l < LANES; l++)
            code[k + l] = (uint8_t)q[l];
    }
}

uint16_t q_fit_block_min(int top, const float *x, const float *weights, uint8_t *code, uint16_t *m)
{
    struct block b;

    take(&b, x, weights, 32);
    struct span all = {&b, 0, 32};
    struct line line = fit_line(all, top, false);
    uint16_t d = quant_f32_to_f16(line.scale / b.unit);
    *m = quant_f32_to_f16(line.min / b.unit);
    put_line_codes(all, (struct line){q_half(d) * b.unit, q_half(*m) * b.unit}, top, code);
    return d;
}

/* ---- super-blocks of scales and minimums ---- */

/* The integer scale and minimum of a group among the neighbours of the rounded ones, then its codes. Returns the error. */
static float settle_line(struct q_fit_min *fit, struct span s, int group, struct line ideal)
{
    float d = q_half(fit->d) * s.b->unit, dmin = q_half(fit->dmin) * s.b->unit, best = INFINITY;
    int near_scale = q_round_clamp(ideal.scale * inverse(d), 0, fit->scale_top);
    int near_min = q_round_clamp(-ideal.min * inverse(dmin), 0, fit->scale_top);

    fit->scale[group] = near_scale;
    fit->min[group] = near_min;
    for (int scale = near_scale - 1; scale <= near_scale + 1; scale++)
        for (int min = near_min - 1; min <= near_min + 1; min++) {
            if (scale < 0 || scale > fit->scale_top || min < 0 || min > fit->scale_top)
                continue;
            float e = error_line(s, (struct line){d * (float)scale, -dmin * (float)min}, fit->top);
            if (e < best) {
                best = e;
                fit->scale[group] = scale;
                fit->min[group] = min;
            }
        }
    struct line line = {d * (float)fit->scale[group], -dmin * (float)fit->min[group]};
    put_line_codes(s, line, fit->top, fit->code + s.from);
    return best;
}

static float settle_min(struct q_fit_min *fit, const struct block *b, const struct line *ideal)
{
    float sum = 0.0f;

    for (int group = 0; group < Q_FIT_LEN / fit->group_len; group++)
        sum += settle_line(fit, (struct span){b, group * fit->group_len, fit->group_len}, group, ideal[group]);
    return sum;
}

/* The best d and dmin for the scales, minimums and codes that there are. */
static void refit_min(struct q_fit_min *fit, const struct block *b)
{
    double pp = 0.0, pm = 0.0, mm = 0.0, xp = 0.0, xm = 0.0;

    for (int k = 0; k < Q_FIT_LEN; k++) {
        int group = k / fit->group_len;
        float p = (float)(fit->scale[group] * fit->code[k]), m = (float)fit->min[group];
        pp += (double)(b->w[k] * (p * p));
        pm += (double)(b->w[k] * (p * m));
        mm += (double)(b->w[k] * (m * m));
        xp += (double)(b->wx[k] * p);
        xm += (double)(b->wx[k] * m);
    }
    double det = pp * mm - pm * pm;
    if (det <= 1e-9 * pp * mm)
        return;
    double d = (mm * xp - pm * xm) / det, dmin = (pm * xp - pp * xm) / det;
    if (d <= 0.0 || dmin <= 0.0)
        return;
    fit->d = quant_f32_to_f16((float)d / b->unit);
    fit->dmin = quant_f32_to_f16((float)dmin / b->unit);
}

void q_fit_min(struct q_fit_min *fit, const float *x, const float *weights)
{
    int n_groups = Q_FIT_LEN / fit->group_len;
    struct line ideal[Q_FIT_MAX_GROUPS];
    float max_scale = 0.0f, max_min = 0.0f;
    struct block b;

    take(&b, x, weights, Q_FIT_LEN);
    for (int group = 0; group < n_groups; group++) {
        ideal[group] = fit_line((struct span){&b, group * fit->group_len, fit->group_len}, fit->top, true);
        max_scale = ideal[group].scale > max_scale ? ideal[group].scale : max_scale;
        max_min = -ideal[group].min > max_min ? -ideal[group].min : max_min;
    }
    fit->d = quant_f32_to_f16(max_scale / (float)fit->scale_top / b.unit);
    fit->dmin = quant_f32_to_f16(max_min / (float)fit->scale_top / b.unit);
    float error = settle_min(fit, &b, ideal);
    for (int i = 0; i < N_REFITS; i++) {
        struct q_fit_min other = *fit;
        refit_min(&other, &b);
        bool is_same = other.d == fit->d && other.dmin == fit->dmin;
        float e = is_same ? error : settle_min(&other, &b, ideal);
        if (!(e < error))
            break;
        *fit = other;
        error = e;
    }
}
