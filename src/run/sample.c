/* Owns the way from a row of logits, or the best of them, to one token, and the random numbers it takes. Leaves to others where logits
 * come from and what a token means.
 *
 * The same draw on every machine: sums are taken in a fixed order, in double; exp is a polynomial of this file (libm's
 * differs between systems in the last bit, and one bit can turn a draw); the generator is ours. Nothing is ever sorted, so
 * that a draw takes the same few passes over the vocabulary whatever the logits are. Where few are wanted of a long row, the best of each
 * block of it say first which blocks have any. */
#include "src/run/sample.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/device/device.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

/* A block is a few cache lines; lanes are compared side by side. */
enum { N_BINS = 4096, BLOCK = 64, LANES = 16 };

struct sample {
    struct sample_opts opts;
    int n_vocab;
    uint64_t rng[4];
    /* The candidates, by rising id: (n) are used. All own, in the same block. */
    int n;
    float *logit;    /* (n_vocab) */
    int32_t *id;     /* (n_vocab) */
    double *weight;  /* (n_vocab) e^(logit - max), scaled by temperature at last */
    float max;       /* best logit among them */
    int32_t *n_seen; /* (n_vocab) how often a token was seen; zero but in penalize() */
    double *bin;     /* (N_BINS) */
    float *peak;     /* (n_blocks(n_vocab)) of a row's blocks, the best logit that is finite; -INFINITY: none is */
};

static int n_blocks(int n)
{
    return (n + BLOCK - 1) / BLOCK;
}

void sample_opts_init(struct sample_opts *opts)
{
    *opts = (struct sample_opts){.top_p = 1, .repeat_penalty = 1, .penalty_window = 64};
}

/* ---- random numbers: xoshiro256** 1.0 seeded by splitmix64 (D. Blackman, S. Vigna, https://prng.di.unimi.it/, public
 * domain) ---- */

static uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static uint64_t rotl(uint64_t x, int k)
{
    return (x << k) | (x >> (64 - k));
}

static uint64_t xoshiro256ss(uint64_t s[4])
{
    uint64_t result = rotl(s[1] * 5, 7) * 9, t = s[1] << 17;

    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl(s[3], 45);
    return result;
}

static void seed_rng(struct sample *s)
{
    uint64_t state = s->opts.seed;

    for (int i = 0; i < 4; i++)
        s->rng[i] = splitmix64(&state);
}

/* 0 <= u < 1, a multiple of 2^-53. */
static double draw_unit(struct sample *s)
{
    return (double)(xoshiro256ss(s->rng) >> 11) * 0x1p-53;
}

/* ---- exp ---- */

/* e^x for x <= 0, by operations that IEEE 754 rounds in one way only. x = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor
 * polynomial of degree 13: the first term left out is below 2^-57. Relative error under 2^-51; 0 below 2^-1022. */
static double exp_neg(double x)
{
    static const double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33; /* fdlibm's split of ln 2 */
    double power;

    if (!(x > -708)) /* also what temperature / a tiny number made infinite */
        return 0;
    int n = (int)(x * 1.4426950408889634 - 0.5);
    double r = (x - n * ln2_hi) - n * ln2_lo;
    /* Estrin's order: pairs, then pairs of pairs, so that the steps need not wait for each other. */
    double r2 = r * r, r4 = r2 * r2;
    double p0 = 1 + r, p2 = 1.0 / 2 + r * (1.0 / 6), p4 = 1.0 / 24 + r * (1.0 / 120), p6 = 1.0 / 720 + r * (1.0 / 5040);
    double p8 = 1.0 / 40320 + r * (1.0 / 362880), p10 = 1.0 / 3628800 + r * (1.0 / 39916800);
    double p12 = 1.0 / 479001600 + r * (1.0 / 6227020800);
    double sum = (p0 + r2 * p2) + r4 * ((p4 + r2 * p6) + r4 * ((p8 + r2 * p10) + r4 * p12));
    uint64_t bits = (uint64_t)(n + 1023) << 52; /* 2^n; n >= -1022 */
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}

/* ---- options ---- */

static int check_opts(const struct sample_opts *o)
{
    if (!(o->temperature >= 0) || !isfinite(o->temperature))
        return err(ERR_ARG, "temperature is %g; it must be 0 or more", (double)o->temperature);
    if (o->top_k < 0)
        return err(ERR_ARG, "top-k is %d; it must be 0 (off) or more", o->top_k);
    if (!(o->top_p >= 0 && o->top_p <= 1))
        return err(ERR_ARG, "top-p is %g; it must be between 0 and 1 (off)", (double)o->top_p);
    if (!(o->min_p >= 0 && o->min_p <= 1))
        return err(ERR_ARG, "min-p is %g; it must be between 0 (off) and 1", (double)o->min_p);
    if (!(o->repeat_penalty > 0) || !isfinite(o->repeat_penalty))
        return err(ERR_ARG, "repeat penalty is %g; it must be more than 0 (1: off)", (double)o->repeat_penalty);
    if (!isfinite(o->presence_penalty))
        return err(ERR_ARG, "presence penalty is %g; it must be a number (0: off)", (double)o->presence_penalty);
    if (!isfinite(o->frequency_penalty))
        return err(ERR_ARG, "frequency penalty is %g; it must be a number (0: off)", (double)o->frequency_penalty);
    if (o->penalty_window < -1)
        return err(ERR_ARG, "penalty window is %d; it must be -1 (all tokens), 0 (off) or more", o->penalty_window);
    return 0;
}

int sample_make(const struct sample_opts *opts, int n_vocab, struct sample **out)
{
    int rc = check_opts(opts);

    *out = NULL;
    if (rc)
        return rc;
    if (n_vocab < 1)
        return err(ERR_ARG, "sampler for %d tokens; there must be at least 1", n_vocab);
    /* Doubles first: everything in the block is then aligned to its size. */
    size_t n = (size_t)n_vocab;
    size_t bytes = sizeof(struct sample) + (n + N_BINS) * sizeof(double) + n * (sizeof(float) + 2 * sizeof(int32_t)) +
                   (size_t)n_blocks(n_vocab) * sizeof(float);
    struct sample *s = mem_zalloc(1, bytes, MEM_META);
    if (!s)
        return err(ERR_NOMEM, "sampler for %d tokens: %zu bytes", n_vocab, bytes);
    s->opts = *opts;
    s->n_vocab = n_vocab;
    s->weight = (double *)(s + 1);
    s->bin = s->weight + n;
    s->logit = (float *)(s->bin + N_BINS);
    s->id = (int32_t *)(s->logit + n);
    s->n_seen = s->id + n;
    s->peak = (float *)(s->n_seen + n);
    seed_rng(s);
    *out = s;
    return 0;
}

void sample_free(struct sample *s)
{
    mem_free(s);
}

int sample_copy(const struct sample *s, struct sample **out)
{
    int rc = sample_make(&s->opts, s->n_vocab, out);

    if (!rc)
        memcpy((*out)->rng, s->rng, sizeof s->rng);
    return rc;
}

int sample_reset(struct sample *s, const struct sample_opts *opts)
{
    int rc = check_opts(opts);

    if (rc)
        return rc;
    s->opts = *opts;
    seed_rng(s);
    return 0;
}

void sample_get(const struct sample *s, struct sample_state *out)
{
    out->opts = s->opts;
    memcpy(out->rng, s->rng, sizeof out->rng);
}

void sample_put(struct sample *s, const struct sample_state *state)
{
    s->opts = state->opts;
    memcpy(s->rng, state->rng, sizeof s->rng);
}

/* ---- penalties ---- */

static bool has_penalties(const struct sample_opts *o)
{
    return o->penalty_window && (o->repeat_penalty != 1 || o->presence_penalty != 0 || o->frequency_penalty != 0);
}

/* Can no logit rise by them? */
static bool is_penalty_a_loss(const struct sample_opts *o)
{
    return o->repeat_penalty >= 1 && o->presence_penalty >= 0 && o->frequency_penalty >= 0;
}

/* Where a row has the logit of an id; -1: nowhere. */
static int place_of(const struct sample_row *row, int32_t id)
{
    int first = 0, end = row->n;

    if (!row->id)
        return id;
    while (first < end) {
        int middle = first + (end - first) / 2;
        if (row->id[middle] < id)
            first = middle + 1;
        else
            end = middle;
    }
    return first < row->n && row->id[first] == id ? first : -1;
}

/* Copy the row's logits, and once for each different token of the window: a logit above 0 is divided by the repeat penalty, another is
 * multiplied; then how often the token was seen times the frequency penalty, and the presence penalty, are taken off. */
static void penalize(struct sample *s, const struct sample_row *row, const int32_t *history, int64_t n_history)
{
    const struct sample_opts *o = &s->opts;
    int64_t first = o->penalty_window >= 0 && n_history > o->penalty_window ? n_history - o->penalty_window : 0;
    int n_ids = 0;

    memcpy(s->logit, row->logit, (size_t)row->n * sizeof *s->logit);
    for (int64_t i = first; i < n_history; i++) {
        int32_t id = history[i];
        if (id < 0 || id >= s->n_vocab)
            continue;
        if (s->n_seen[id]++ == 0)
            s->id[n_ids++] = id;
    }
    for (int i = 0; i < n_ids; i++) {
        int32_t id = s->id[i];
        int at = place_of(row, id), n_seen = s->n_seen[id];
        s->n_seen[id] = 0;
        if (at < 0)
            continue;
        float x = s->logit[at];
        x = x > 0 ? x / o->repeat_penalty : x * o->repeat_penalty;
        s->logit[at] = x - (float)n_seen * o->frequency_penalty - o->presence_penalty;
    }
}

/* ---- candidates ---- */

static int no_candidate(const struct sample_row *row)
{
    int n_nan = 0;

    for (int i = 0; i < row->n; i++)
        n_nan += isnan(row->logit[i]) != 0;
    return err(ERR_FORMAT, "the model's %d logits hold no finite number (%d are NaN)", row->n, n_nan);
}

static int32_t id_at(const struct sample_row *row, int i)
{
    return row->id ? row->id[i] : i;
}

static float peak_of(const float *x, int n)
{
    float lane[LANES], peak = -INFINITY;
    int i = 0;

    for (int k = 0; k < LANES; k++)
        lane[k] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) /* no NaN is more than anything */
            lane[k] = (x[i + k] > lane[k]) & (x[i + k] <= FLT_MAX) ? x[i + k] : lane[k];
    for (; i < n; i++)
        peak = x[i] > peak && x[i] <= FLT_MAX ? x[i] : peak;
    for (int k = 0; k < LANES; k++)
        peak = lane[k] > peak ? lane[k] : peak;
    return peak;
}

static void find_peaks(struct sample *s, const struct sample_row *row)
{
    for (int i = 0; i < row->n; i += BLOCK)
        s->peak[i / BLOCK] = peak_of(row->logit + i, row->n - i < BLOCK ? row->n - i : BLOCK);
}

/* Of equals the first. */
static int draw_greedy(struct sample *s, const struct sample_row *row, int32_t *token)
{
    int block = 0, i;

    find_peaks(s, row);
    for (int b = 1; b < n_blocks(row->n); b++)
        if (s->peak[b] > s->peak[block])
            block = b;
    if (s->peak[block] == -INFINITY)
        return no_candidate(row);
    for (i = block * BLOCK; row->logit[i] != s->peak[block];)
        i++;
    *token = id_at(row, i);
    return 0;
}

/* All finite logits that are at least `least` become candidates, by rising id. peaks: the row's are there. The row's logits may be
 * s->logit: nothing moves up. */
static void gather(struct sample *s, const struct sample_row *row, float least, bool peaks)
{
    int n = 0;

    s->max = -INFINITY;
    for (int i = 0; i < row->n; i++) {
        float x = row->logit[i];
        if (peaks && i % BLOCK == 0 && s->peak[i / BLOCK] < least) {
            i += BLOCK - 1;
            continue;
        }
        if (!isfinite(x) || x < least)
            continue;
        s->id[n] = id_at(row, i);
        s->logit[n++] = x;
        if (x > s->max)
            s->max = x;
    }
    s->n = n;
}

static void weigh(struct sample *s, double temperature)
{
    for (int i = 0; i < s->n; i++)
        s->weight[i] = exp_neg(((double)s->logit[i] - s->max) / temperature);
}

/* ---- cuts ---- */

/* Smaller for larger logits, equal for equal ones (adding 0 makes +0 of -0). */
static uint32_t key_of(float logit)
{
    uint32_t bits;

    logit += 0.0f;
    memcpy(&bits, &logit, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

/* Add up, from the best of n logits downwards and of equal ones by rising place, their values (each 1 where value is NULL)
 * until the sum is at least want (> 0); the place that made it so, or the last where rounding leaves want unreached.
 * A radix selection: what lies in the bins above the one where the sum crosses is never put in order. */
static int find_last(struct sample *s, const float *logit, int n, const double *value, double want)
{
    static const struct {
        int shift;
        uint32_t mask;
    } digits[] = {{20, 0xfff}, {10, 0x3ff}, {0, 0x3ff}};
    uint32_t prefix = 0, prefix_mask = 0;
    double above = 0; /* sum of all better than the bins looked at; below want */
    int last = 0;

    for (int d = 0; d < 3; d++) {
        uint32_t bin = 0, max_bin = 0;
        memset(s->bin, 0, (digits[d].mask + 1) * sizeof *s->bin);
        for (int i = 0; i < n; i++) {
            uint32_t key = key_of(logit[i]), at = key >> digits[d].shift & digits[d].mask;
            if ((key & prefix_mask) != prefix)
                continue;
            s->bin[at] += value ? value[i] : 1;
            if (at > max_bin)
                max_bin = at;
        }
        for (; bin < max_bin && above + s->bin[bin] < want; bin++)
            above += s->bin[bin];
        prefix |= bin << digits[d].shift;
        prefix_mask |= digits[d].mask << digits[d].shift;
    }
    for (int i = 0; i < n && above < want; i++)
        if (key_of(logit[i]) == prefix) {
            above += value ? value[i] : 1;
            last = i;
        }
    return last;
}

/* Candidates among which the k best of the row are: k blocks whose best is at least so much have k logits that are. */
static void gather_best(struct sample *s, const struct sample_row *row, int k)
{
    bool peaks = k < n_blocks(row->n);
    float least = -INFINITY;

    if (peaks) {
        find_peaks(s, row);
        least = s->peak[find_last(s, s->peak, n_blocks(row->n), NULL, k)];
    }
    gather(s, row, least, peaks);
}

static void keep(struct sample *s, int i, int *n)
{
    s->id[*n] = s->id[i];
    s->weight[*n] = s->weight[i];
    s->logit[(*n)++] = s->logit[i];
}

/* Drop what is worse than candidate `last`. */
static void cut_behind(struct sample *s, int last)
{
    float logit = s->logit[last];
    int n = 0;

    for (int i = 0; i < s->n; i++)
        if (s->logit[i] > logit || (s->logit[i] == logit && i <= last))
            keep(s, i, &n);
    s->n = n;
}

/* Keep the k best. */
static void cut_top_k(struct sample *s, int k)
{
    if (s->n > k)
        cut_behind(s, find_last(s, s->logit, s->n, NULL, k));
}

/* Keep the fewest of the best that together weigh at least top_p of all. The weights must be those of temperature 1. */
static void cut_top_p(struct sample *s, double top_p)
{
    double total = 0;

    for (int i = 0; i < s->n; i++)
        total += s->weight[i];
    /* The best weighs 1: where nothing is asked for, it alone stays. */
    cut_behind(s, find_last(s, s->logit, s->n, s->weight, top_p > 0 ? total * top_p : 1));
}

/* Keep what weighs at least min_p times the best. */
static void cut_min_p(struct sample *s, double min_p)
{
    int n = 0;

    for (int i = 0; i < s->n; i++)
        if (s->weight[i] >= min_p)
            keep(s, i, &n);
    s->n = n;
}

static int32_t draw_weighted(struct sample *s)
{
    double total = 0, sum = 0;
    int last = 0;

    for (int i = 0; i < s->n; i++)
        total += s->weight[i];
    double want = draw_unit(s) * total;
    for (int i = 0; i < s->n; i++) {
        sum += s->weight[i];
        if (sum > want)
            return s->id[i];
        if (s->weight[i] > 0)
            last = i;
    }
    /* draw_unit() is below 1, but its product with total may round up to it. */
    return s->id[last];
}

/* The k best with penalties that only take off are among the k + n best without them, if n tokens have a penalty: k of those have none,
 * and a token that is not among them was behind these k already. */
int sample_n_top(const struct sample *s, int64_t n_history)
{
    const struct sample_opts *o = &s->opts;
    int64_t n = o->temperature == 0 ? 1 : o->top_k, n_seen = 0;

    if (n == 0)
        return 0;
    if (has_penalties(o)) {
        if (!is_penalty_a_loss(o))
            return 0;
        n_seen = o->penalty_window >= 0 && n_history > o->penalty_window ? o->penalty_window : n_history;
    }
    /* Each comes with its id. */
    return n > DEVICE_MAX_TOP_K - n_seen || 2 * (n + n_seen) >= s->n_vocab ? 0 : (int)(n + n_seen);
}

/* Candidates that are there already: cuts, temperature, draw. */
static int32_t draw_gathered(struct sample *s)
{
    const struct sample_opts *o = &s->opts;

    if (o->top_k)
        cut_top_k(s, o->top_k);
    if (o->top_p < 1 || o->min_p > 0)
        weigh(s, 1);
    if (o->top_p < 1)
        cut_top_p(s, o->top_p);
    if (o->min_p > 0)
        cut_min_p(s, o->min_p);
    weigh(s, o->temperature);
    return draw_weighted(s);
}

/* The row with penalties, in s->logit; or as it is. */
static struct sample_row penalized(struct sample *s, const struct sample_row *row, const int32_t *history,
                                   int64_t n_history)
{
    struct sample_row from = *row;

    if (has_penalties(&s->opts)) {
        penalize(s, row, history, n_history);
        from.logit = s->logit;
    }
    return from;
}

int sample_draw_row(struct sample *s, const struct sample_row *row, const int32_t *history, int64_t n_history,
                    int32_t *token)
{
    const struct sample_opts *o = &s->opts;
    struct sample_row from = penalized(s, row, history, n_history);

    if (o->temperature == 0)
        return draw_greedy(s, &from, token);
    if (o->top_k)
        gather_best(s, &from, o->top_k);
    else
        gather(s, &from, -INFINITY, false);
    if (!s->n)
        return no_candidate(&from);
    *token = draw_gathered(s);
    return 0;
}

/* ---- of allowed tokens alone ---- */

/* Drop candidates that are not allowed. */
static int keep_allowed(struct sample *s, const struct sample_filter *filter)
{
    int n = 0;

    s->max = -INFINITY;
    for (int i = 0; i < s->n; i++) {
        int rc = filter->allows(filter->arg, s->id[i]);
        if (rc < 0)
            return rc;
        if (!rc)
            continue;
        s->max = s->logit[i] > s->max ? s->logit[i] : s->max;
        s->id[n] = s->id[i];
        s->logit[n++] = s->logit[i];
    }
    s->n = n;
    return 0;
}

static void gather_marked(struct sample *s, const struct sample_row *row, const uint64_t *bits)
{
    int n = 0;

    s->max = -INFINITY;
    for (int at = 0; at < row->n; at += 64)
        for (uint64_t left = bits[at / 64]; left; left &= left - 1) {
            int i = at + __builtin_ctzll(left);
            if (i >= row->n || !isfinite(row->logit[i]))
                continue;
            s->id[n] = i;
            s->logit[n++] = row->logit[i];
            s->max = row->logit[i] > s->max ? row->logit[i] : s->max;
        }
    s->n = n;
}

/* Candidates that are at least as good as some logit are an upper part of all. If `want` of it are allowed, the best `want` allowed ones
 * are among them; otherwise all have to be asked for. */
static int gather_allowed(struct sample *s, const struct sample_row *row, const struct sample_filter *filter,
                          const int32_t *history, int64_t n_history)
{
    enum { MORE = 64, MANY = 1024 };
    const int want = s->opts.temperature == 0 ? 1 : s->opts.top_k;
    struct sample_row from = penalized(s, row, history, n_history);
    const uint64_t *bits;

    if (want > 0 && want <= MANY) {
        gather_best(s, &from, want + MORE);
        int rc = s->n <= 4 * (want + MORE) ? keep_allowed(s, filter) : 0;
        if (rc < 0 || (s->n >= want && s->n <= 4 * (want + MORE)))
            return rc;
        from = penalized(s, row, history, n_history); /* candidates were put in its place */
    }
    int rc = filter->all(filter->arg, &bits);
    if (rc == 0)
        gather_marked(s, &from, bits);
    return rc;
}

int sample_draw_allowed(struct sample *s, const struct sample_row *row, const struct sample_filter *filter,
                        const int32_t *history, int64_t n_history, int32_t *token)
{
    int best = 0, rc = gather_allowed(s, row, filter, history, n_history);

    if (rc < 0)
        return rc;
    if (!s->n)
        return err(ERR_STATE,
                   "none of %d tokens may come next: nothing that is allowed begins so, or its logit is no number",
                   s->n_vocab);
    if (s->opts.temperature > 0) {
        *token = draw_gathered(s);
        return 0;
    }
    while (s->logit[best] != s->max)
        best++;
    *token = s->id[best];
    return 0;
}

int sample_draw(struct sample *s, const float *logits, const int32_t *history, int64_t n_history, int32_t *token)
{
    return sample_draw_row(s, &(struct sample_row){.n = s->n_vocab, .logit = logits}, history, n_history, token);
}

double sample_log_sum(const float *logits, int n_vocab)
{
    float max = -INFINITY;
    double sum = 0;

    for (int i = 0; i < n_vocab; i++)
        if (logits[i] > max)
            max = logits[i];
    if (!isfinite(max))
        return (double)max;
    for (int i = 0; i < n_vocab; i++)
        if (!isnan(logits[i]))
            sum += exp_neg((double)logits[i] - max);
    return log(sum) + max;
}
