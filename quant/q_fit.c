/* Scales and codes for the least squared error, by trial: for a fixed scale the best codes are the nearest ones, for fixed
 * codes the best scale (and minimum) is a linear least-squares solution. Some 20 or 40 starting scales around the one that
 * spans the largest element go through both; afterwards the integer scales are chosen among the neighbours of the rounded
 * ones, with codes made again for what will really be stored. Sums are in double: squares of floats overflow in float. */
#include "quant/q_fit.h"
#include "quant/q_impl.h"

#include <math.h>

/* Trial scales span the largest element with the outermost level moved by up to one gap, in tenths. */
#define N_TRIALS_SIDE 10
#define TRIAL_STEP 0.1f

static int level_of(const struct q_levels *levels, int index)
{
    return levels->table ? levels->table[index] : levels->lo + index;
}

int q_fit_nearest(const struct q_levels *levels, float v)
{
    if (!levels->table)
        return q_round_clamp(v, levels->lo, levels->lo + levels->n - 1) - levels->lo;
    int index = 0;
    for (int half = levels->n / 2; half > 0; half /= 2) {
        const int8_t *right = levels->table + index + half;
        index += 2.0f * v > (float)(right[-1] + right[0]) ? half : 0;
    }
    return index;
}

static float peak_of(const float *x, int n)
{
    float peak = 0.0f;
    for (int k = 0; k < n; k++)
        if (fabsf(x[k]) > fabsf(peak))
            peak = x[k];
    return peak;
}

static float inverse(float d)
{
    return d == 0.0f ? 0.0f : 1.0f / d;
}

/* How much squared error the best multiple of the levels nearest to x / d takes away; *scale is that multiple. */
static double gain_of(const struct q_levels *levels, const float *x, int n, float d, float *scale)
{
    double xq = 0.0, qq = 0.0;
    float id = inverse(d);
    for (int k = 0; k < n; k++) {
        int q = level_of(levels, q_fit_nearest(levels, x[k] * id));
        xq += (double)x[k] * q;
        qq += (double)q * q;
    }
    *scale = qq > 0.0 ? (float)(xq / qq) : 0.0f;
    return qq > 0.0 ? xq * xq / qq : 0.0;
}

float q_fit_scale(const struct q_levels *levels, const float *x, int n)
{
    float peak = peak_of(x, n), best = 0.0f;
    double best_gain = 0.0;
    int n_ends = levels->n > 16 ? 1 : 2; /* with many levels it hardly matters which end the peak is put on */
    for (int end = 0; end < n_ends; end++)
        for (int t = -N_TRIALS_SIDE; t <= N_TRIALS_SIDE; t++) {
            float outer = (float)level_of(levels, end ? levels->n - 1 : 0) + (float)t * TRIAL_STEP * levels->end_gap;
            float scale;
            double gain = gain_of(levels, x, n, peak / outer, &scale);
            if (gain > best_gain) {
                best_gain = gain;
                best = scale;
            }
        }
    return best;
}

static double error_signed(const struct q_levels *levels, const float *x, int n, float d)
{
    double sum = 0.0;
    float id = inverse(d);
    for (int k = 0; k < n; k++) {
        double e = (double)x[k] - (double)d * level_of(levels, q_fit_nearest(levels, x[k] * id));
        sum += e * e;
    }
    return sum;
}

void q_fit_signed(struct q_fit_signed *fit, const float *x)
{
    int n_groups = Q_FIT_LEN / fit->group_len;
    float ideal[Q_FIT_MAX_GROUPS];
    for (int group = 0; group < n_groups; group++)
        ideal[group] = q_fit_scale(fit->levels, x + group * fit->group_len, fit->group_len);

    /* the low end has one step more than the high one: the largest scale goes there */
    fit->d = quant_f32_to_f16(peak_of(ideal, n_groups) / (float)fit->scale_lo);
    float d = q_half(fit->d), id = inverse(d);
    for (int group = 0; group < n_groups; group++) {
        const float *g = x + group * fit->group_len;
        int near = q_round_clamp(ideal[group] * id, fit->scale_lo, fit->scale_hi);
        double best = INFINITY;
        fit->scale[group] = near;
        for (int scale = near - 1; scale <= near + 1; scale++) {
            double e = error_signed(fit->levels, g, fit->group_len, d * (float)scale);
            if (e < best && scale >= fit->scale_lo && scale <= fit->scale_hi) {
                best = e;
                fit->scale[group] = scale;
            }
        }
        float inv = inverse(d * (float)fit->scale[group]);
        for (int k = 0; k < fit->group_len; k++)
            fit->code[group * fit->group_len + k] = (uint8_t)q_fit_nearest(fit->levels, g[k] * inv);
    }
}

struct line {
    float scale, min; /* value = scale * code + min, min <= 0 */
};

static int code_of(float v, struct line line, float inv_scale, int top)
{
    return q_round_clamp((v - line.min) * inv_scale, 0, top);
}

static double error_line(const float *x, int n, struct line line, int top)
{
    double sum = 0.0;
    float inv = inverse(line.scale);
    for (int k = 0; k < n; k++) {
        double e = (double)x[k] - ((double)line.scale * code_of(x[k], line, inv, top) + (double)line.min);
        sum += e * e;
    }
    return sum;
}

/* The least-squares line through the codes that a trial line gives. A minimum above zero cannot be stored: then zero. */
static struct line line_through(const float *x, int n, struct line trial, int top)
{
    double q1 = 0.0, q2 = 0.0, x1 = 0.0, xq = 0.0;
    float inv = inverse(trial.scale);
    for (int k = 0; k < n; k++) {
        int q = code_of(x[k], trial, inv, top);
        q1 += q;
        q2 += (double)q * q;
        x1 += (double)x[k];
        xq += (double)x[k] * q;
    }
    double det = n * q2 - q1 * q1;
    if (det <= 0.0)
        return trial;
    struct line line = {(float)((n * xq - q1 * x1) / det), (float)((q2 * x1 - q1 * xq) / det)};
    if (line.min > 0.0f)
        line = (struct line){(float)(xq / q2), 0.0f};
    return line;
}

static struct line fit_line(const float *x, int n, int top)
{
    float min = 0.0f, max = 0.0f; /* zero is always spanned, because the minimum is not above it */
    for (int k = 0; k < n; k++) {
        min = x[k] < min ? x[k] : min;
        max = x[k] > max ? x[k] : max;
    }
    struct line best = {0.0f, 0.0f};
    double best_error = INFINITY;
    for (int t = -N_TRIALS_SIDE; t <= N_TRIALS_SIDE; t++) {
        struct line trial = {(max - min) / ((float)top + (float)t * TRIAL_STEP), min};
        struct line line = line_through(x, n, trial, top);
        double e = line.scale >= 0.0f ? error_line(x, n, line, top) : INFINITY;
        if (e < best_error) {
            best_error = e;
            best = line;
        }
    }
    return best;
}

/* Choose the integer scale and minimum of a group among the neighbours of the rounded ones, then its codes. */
static void settle_line(struct q_fit_min *fit, int group, const float *x, struct line ideal)
{
    float d = q_half(fit->d), dmin = q_half(fit->dmin);
    int near_scale = q_round_clamp(ideal.scale * inverse(d), 0, fit->scale_top);
    int near_min = q_round_clamp(-ideal.min * inverse(dmin), 0, fit->scale_top);
    double best = INFINITY;
    fit->scale[group] = near_scale;
    fit->min[group] = near_min;
    for (int scale = near_scale - 1; scale <= near_scale + 1; scale++)
        for (int min = near_min - 1; min <= near_min + 1; min++) {
            if (scale < 0 || scale > fit->scale_top || min < 0 || min > fit->scale_top)
                continue;
            double e = error_line(x, fit->group_len, (struct line){d * (float)scale, -dmin * (float)min}, fit->top);
            if (e < best) {
                best = e;
                fit->scale[group] = scale;
                fit->min[group] = min;
            }
        }
    struct line line = {d * (float)fit->scale[group], -dmin * (float)fit->min[group]};
    float inv = inverse(line.scale);
    for (int k = 0; k < fit->group_len; k++)
        fit->code[group * fit->group_len + k] = (uint8_t)code_of(x[k], line, inv, fit->top);
}

void q_fit_min(struct q_fit_min *fit, const float *x)
{
    int n_groups = Q_FIT_LEN / fit->group_len;
    struct line ideal[Q_FIT_MAX_GROUPS];
    float max_scale = 0.0f, max_min = 0.0f;
    for (int group = 0; group < n_groups; group++) {
        ideal[group] = fit_line(x + group * fit->group_len, fit->group_len, fit->top);
        max_scale = ideal[group].scale > max_scale ? ideal[group].scale : max_scale;
        max_min = -ideal[group].min > max_min ? -ideal[group].min : max_min;
    }
    fit->d = quant_f32_to_f16(max_scale / (float)fit->scale_top);
    fit->dmin = quant_f32_to_f16(max_min / (float)fit->scale_top);
    for (int group = 0; group < n_groups; group++)
        settle_line(fit, group, x + group * fit->group_len, ideal[group]);
}
