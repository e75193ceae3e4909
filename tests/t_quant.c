/* Block types against the numpy code of the `gguf` package (tests/gen/quant_vectors.py) and against arithmetic. */
#include "quant/quant.h"
#include "tests/run_suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_SUM_BYTES (1 << 17)
#define N_SUM_FLOATS (256 * 256)
#define N_SAMPLE 2048 /* in floats.f32 */
#define GUARD 0xa5

static const struct {
    const char *name;
    int id, len, bytes;
} rows[] = {
#define T(NAME, text, id, len, bytes, act, fn) {text, id, len, bytes},
#include "quant/types.def"
#undef T
};
#define N_ROWS ((int)(sizeof rows / sizeof rows[0]))

/* ---- files and random numbers ------------------------------------------------------------------------------------ */

/* Own. NULL where there is no such file. */
static void *read_data(const char *name, const char *end, size_t *n_bytes)
{
    char path[512];
    snprintf(path, sizeof path, "%s/quant/%s%s", TEST_DATA_DIR, name, end);
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    fseek(f, 0, SEEK_END);
    *n_bytes = (size_t)ftell(f);
    rewind(f);
    void *data = malloc(*n_bytes + 1);
    ck_assert_uint_eq(fread(data, 1, *n_bytes, f), *n_bytes);
    ((char *)data)[*n_bytes] = '\0';
    fclose(f);
    return data;
}

static void *must_read_data(const char *name, const char *end, size_t *n_bytes)
{
    void *data = read_data(name, end, n_bytes);
    ck_assert_msg(data != NULL, "no vector %s%s: run tests/gen/quant_vectors.py", name, end);
    return data;
}

static uint64_t next_word(uint64_t *state) /* splitmix64, as in the generator */
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static void random_bytes(uint8_t *out, size_t n, uint64_t seed)
{
    for (size_t k = 0; k < n; k += 8) {
        uint64_t w = next_word(&seed);
        memcpy(out + k, &w, n - k < 8 ? n - k : 8);
    }
}

/* Runs of 256 of one magnitude each; all values are exact in float. */
static void random_floats(float *out, int n, uint64_t seed)
{
    for (int run = 0; run < n / 256; run++) {
        uint64_t w = next_word(&seed);
        double scale = ldexp(1.0, (int)(w % 24) - 33);
        int shift = (w >> 32 & 3) == 0 ? 100000 : 0;
        if ((w >> 40 & 15) == 0)
            scale = 0.0;
        for (int k = 0; k < 256; k++) {
            w = next_word(&seed);
            int total = (int)(w & 0xffff) + (int)(w >> 16 & 0xffff) + (int)(w >> 32 & 0xffff) + (int)(w >> 48) - 131070;
            *out++ = (float)((total + shift) * scale + 0.0); /* no -0 */
        }
    }
}

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return isnan(x) ? 0x7fc00000 : bits; /* which NaN it is depends on the processor */
}

static void sum_add(uint64_t *sum, uint32_t word)
{
    *sum = (*sum ^ word) * 0x100000001b3;
}
#define SUM_START 0xcbf29ce484222325

/* The line of one type in the file `sums`; false if there is none. */
static bool find_sums(const char *name, int *id, int *len, int *bytes, char to[32], char from[32])
{
    size_t n_bytes;
    char *text = must_read_data("sums", "", &n_bytes), row[32];
    bool found = false;
    for (char *line = strtok(text, "\n"); line && !found; line = strtok(NULL, "\n"))
        found = sscanf(line, "%31s %d %d %d %31s %31s", row, id, len, bytes, to, from) == 6 && !strcmp(row, name);
    free(text);
    return found;
}

/* ---- blocks to floats --------------------------------------------------------------------------------------------- */

START_TEST(blocks_differ_from_package)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    size_t n_raw, n_want;
    void *raw = must_read_data(info->name, ".blocks", &n_raw);
    float *want = must_read_data(info->name, ".f32", &n_want);
    size_t n = n_raw / (size_t)info->block_bytes * (size_t)info->block_len;
    ck_assert_uint_eq(n_want, n * sizeof *want);
    ck_assert_uint_eq(quant_row_bytes(info->type, (int64_t)n), n_raw);

    float *got = malloc((n + 1) * sizeof *got);
    got[n] = 12345.0f;
    info->to_float(raw, got, (int64_t)n);

    for (size_t k = 0; k < n; k++)
        ck_assert_msg(bits_of(got[k]) == bits_of(want[k]), "%s element %zu: %a, want %a", info->name, k, (double)got[k],
                      (double)want[k]);
    ck_assert_msg(got[n] == 12345.0f, "%s wrote past its end", info->name);
    free(got);
    free(want);
    free(raw);
}
END_TEST

START_TEST(code_book_entry_wrong)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    int id, len, bytes;
    char to[32], from[32], got[32];
    ck_assert_msg(find_sums(info->name, &id, &len, &bytes, to, from), "no line %s in sums", info->name);
    ck_assert_int_eq(id, (int)info->type);
    ck_assert_int_eq(len, info->block_len);
    ck_assert_int_eq(bytes, info->block_bytes);

    int n_blocks = N_SUM_BYTES / bytes;
    uint8_t *raw = malloc((size_t)(n_blocks * bytes));
    float *x = malloc((size_t)(n_blocks * len) * sizeof *x);
    random_bytes(raw, (size_t)(n_blocks * bytes), (uint64_t)id);
    info->to_float(raw, x, n_blocks * len);
    uint64_t sum = SUM_START;
    for (int k = 0; k < n_blocks * len; k++)
        sum_add(&sum, bits_of(x[k]));
    snprintf(got, sizeof got, "%016llx", (unsigned long long)sum);
    ck_assert_msg(!strcmp(got, to), "%s: sum over %d random blocks %s, want %s", info->name, n_blocks, got, to);
    free(x);
    free(raw);
}
END_TEST

/* ---- floats to blocks --------------------------------------------------------------------------------------------- */

static void must_equal_blocks(const struct quant_info *info, const uint8_t *got, const uint8_t *want, size_t n_bytes)
{
    for (size_t k = 0; k < n_bytes; k++)
        ck_assert_msg(got[k] == want[k], "%s block %zu byte %zu: %02x, want %02x", info->name,
                      k / (size_t)info->block_bytes, k % (size_t)info->block_bytes, got[k], want[k]);
}

START_TEST(quantizer_differs_from_package)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    int id, len, bytes;
    char to[32], from[32], got_sum[32];
    size_t n_want = 0, n_floats;
    uint8_t *want = read_data(info->name, ".packed", &n_want);
    ck_assert(find_sums(info->name, &id, &len, &bytes, to, from));
    ck_assert_int_eq(want != NULL, strcmp(from, "-") != 0);
    if (!want)
        return;
    ck_assert_msg(info->from_float != NULL, "%s has no quantizer, but the package has", info->name);
    ck_assert_uint_eq(n_want, quant_row_bytes(info->type, N_SAMPLE));

    float *x = must_read_data("floats", ".f32", &n_floats);
    ck_assert_uint_eq(n_floats, N_SAMPLE * sizeof *x);
    uint8_t *got = malloc(n_want + 1);
    got[n_want] = GUARD;
    info->from_float(x, got, N_SAMPLE);
    must_equal_blocks(info, got, want, n_want);
    ck_assert_msg(got[n_want] == GUARD, "%s wrote past its end", info->name);

    size_t n_many = quant_row_bytes(info->type, N_SUM_FLOATS);
    float *many = malloc(N_SUM_FLOATS * sizeof *many);
    uint8_t *packed = malloc(n_many);
    random_floats(many, N_SUM_FLOATS, 7);
    info->from_float(many, packed, N_SUM_FLOATS);
    uint64_t sum = SUM_START;
    for (size_t k = 0; k < n_many; k++)
        sum_add(&sum, packed[k]);
    snprintf(got_sum, sizeof got_sum, "%016llx", (unsigned long long)sum);
    ck_assert_msg(!strcmp(got_sum, from), "%s: sum over %d random floats %s, want %s", info->name, N_SUM_FLOATS,
                  got_sum, from);
    free(packed);
    free(many);
    free(got);
    free(x);
    free(want);
}
END_TEST

/* The plain way into the storage of each type that the package cannot quantize: each group's largest element (or range)
 * decides its scale, scales are rounded to the integers or halves that the type has, codes are the nearest. A quantizer that
 * searches has to do at least as well. */
static const struct plain {
    const char *name;
    enum { SIGNED, LEVELS, WITH_MIN, E4M3 } kind;
    int group, lo, hi, scale_lo, scale_hi; /* scale_lo 0: the scale is a half itself */
} plains[] = {
    {"Q2_K", WITH_MIN, 16, 0, 3, 0, 15},        {"Q3_K", SIGNED, 16, -4, 3, -32, 31},
    {"Q4_K", WITH_MIN, 32, 0, 15, 0, 63},       {"Q5_K", WITH_MIN, 32, 0, 31, 0, 63},
    {"Q6_K", SIGNED, 16, -32, 31, -128, 127},   {"IQ4_NL", LEVELS, 32, -127, 113, 0, 0},
    {"IQ4_XS", LEVELS, 32, -127, 113, -32, 31}, {"NVFP4", E4M3, 16, -6, 6, 0, 0},
};

static double to_half(double x)
{
    return (double)quant_f16_to_f32(quant_f32_to_f16((float)x));
}

static double clamp(double x, double lo, double hi)
{
    return x < lo ? lo : x > hi ? hi : x;
}

static double nearest_in(const double *list, int n, double x)
{
    double best = list[0];
    for (int k = 1; k < n; k++)
        if (fabs(list[k] - x) < fabs(best - x))
            best = list[k];
    return best;
}

/* x / d to the nearest thing that a code can say. */
static double plain_code(const struct plain *p, double v)
{
    static const double uneven[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    static const double e2m1[] = {-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6};
    switch (p->kind) {
    case LEVELS:
        return nearest_in(uneven, 16, v);
    case E4M3:
        return nearest_in(e2m1, 15, v);
    default:
        return clamp(rint(v), p->lo, p->hi);
    }
}

static double plain_e4m3(double x)
{
    double list[127];
    for (int code = 0; code < 127; code++)
        list[code] = code < 8 ? ldexp(code, -9) : ldexp(8 + code % 8, code / 8 - 10);
    return nearest_in(list, 127, x);
}

/* Squared error of the plain way over 256 elements. */
static double plain_error(const struct plain *p, const float *x)
{
    double scale[16], min[16] = {0}, top_scale = 0.0, top_min = 0.0, sum = 0.0;
    for (int k = 0; k < 256; k++) {
        int group = k / p->group;
        if (k % p->group == 0) {
            double peak = 0.0, low = 0.0, high = 0.0;
            for (int i = k; i < k + p->group; i++) {
                peak = fabs((double)x[i]) > fabs(peak) ? (double)x[i] : peak;
                low = fmin(low, (double)x[i]);
                high = fmax(high, (double)x[i]);
            }
            scale[group] = p->kind == WITH_MIN ? (high - low) / p->hi : p->kind == E4M3 ? fabs(peak) / 6 : peak / p->lo;
            min[group] = p->kind == WITH_MIN ? low : 0.0;
            top_scale = fabs(scale[group]) > fabs(top_scale) ? scale[group] : top_scale;
            top_min = fmin(top_min, min[group]);
        }
    }
    double d = p->kind == WITH_MIN ? to_half(top_scale / p->scale_hi)
               : p->scale_lo       ? to_half(top_scale / p->scale_lo)
                                   : 0.0;
    double dmin = p->kind == WITH_MIN ? to_half(-top_min / p->scale_hi) : 0.0;
    for (int k = 0; k < 256; k++) {
        double s = scale[k / p->group], m = 0.0;
        if (p->kind == E4M3)
            s = plain_e4m3(s);
        else if (!p->scale_hi)
            s = to_half(s);
        else
            s = d == 0.0 ? 0.0 : d * clamp(rint(s / d), p->scale_lo, p->scale_hi);
        if (dmin > 0.0)
            m = -dmin * clamp(rint(-min[k / p->group] / dmin), 0, p->scale_hi);
        double v = s == 0.0 ? m : s * plain_code(p, ((double)x[k] - m) / s) + m;
        sum += (v - (double)x[k]) * (v - (double)x[k]);
    }
    return sum;
}

static const struct plain *find_plain(const char *name)
{
    for (size_t k = 0; k < sizeof plains / sizeof plains[0]; k++)
        if (!strcmp(plains[k].name, name))
            return &plains[k];
    return NULL;
}

START_TEST(quantizer_worse_than_plain_rounding)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    const struct plain *plain = find_plain(info->name);
    size_t n_bytes;
    void *packed_by_package = read_data(info->name, ".packed", &n_bytes);
    ck_assert_msg(!info->from_float || packed_by_package || plain, "%s: nothing to hold its quantizer against",
                  info->name);
    free(packed_by_package);
    if (!plain || !info->from_float)
        return;
    enum { N = 64 * 256 };
    float *x = malloc(N * sizeof *x), *back = malloc(N * sizeof *back);
    void *blocks = malloc(quant_row_bytes(info->type, N));
    random_floats(x, N, 11);
    info->from_float(x, blocks, N);
    info->to_float(blocks, back, N);

    double ratio_sum = 0.0;
    int n_runs = 0;
    for (int run = 0; run < N / 256; run++) {
        const float *a = x + run * 256, *b = back + run * 256;
        double ours = 0.0, theirs = plain_error(plain, a);
        for (int k = 0; k < 256; k++)
            ours += ((double)b[k] - (double)a[k]) * ((double)b[k] - (double)a[k]);
        if (theirs == 0.0) {
            ck_assert_msg(ours == 0.0, "%s run %d: plain rounding is exact", info->name, run);
            continue;
        }
        ratio_sum += ours / theirs;
        n_runs++;
    }
    ck_assert_msg(n_runs > 0 && ratio_sum <= n_runs, "%s: squared error is %.3f of plain rounding's", info->name,
                  ratio_sum / n_runs);
    free(blocks);
    free(back);
    free(x);
}
END_TEST

static double weighted_error(const float *x, const float *y, const float *weights, int n)
{
    double sum = 0.0;
    for (int k = 0; k < n; k++)
        sum += (double)weights[k] * ((double)y[k] - (double)x[k]) * ((double)y[k] - (double)x[k]);
    return sum;
}

/* What counts more has to come out closer than where all count alike. */
START_TEST(weights_do_not_help)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    enum { N = 64 * 256 };
    if (!info->fit)
        return;
    float *x = malloc(N * sizeof *x), *back = malloc(N * sizeof *back), *weights = malloc(N * sizeof *weights);
    void *blocks = malloc(quant_row_bytes(info->type, N));
    uint64_t seed = 17;
    random_floats(x, N, 13);
    for (int k = 0; k < N; k++) /* a few columns that carry nearly all, as activations have */
        weights[k] = next_word(&seed) % 16 == 0 ? 100.0f : 0.5f + (float)(next_word(&seed) % 8) / 8;
    info->from_float(x, blocks, N);
    info->to_float(blocks, back, N);
    double even = weighted_error(x, back, weights, N);
    info->fit(x, weights, blocks, N);
    info->to_float(blocks, back, N);
    double fitted = weighted_error(x, back, weights, N);
    ck_assert_msg(fitted < even, "%s: weighted error %g, without weights %g", info->name, fitted, even);
    free(blocks);
    free(weights);
    free(back);
    free(x);
}
END_TEST

/* Only weights' ratios count, and of none all count alike. */
START_TEST(size_of_weights_matters)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    static const float sizes[] = {1.0f, 0x1p90f, 0x1p-90f, 0.0f};
    float x[512], weights[512];
    uint8_t want[2048], got[2048];
    if (!info->fit)
        return;
    random_floats(x, 512, 19);
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 512; k++)
            weights[k] = sizes[i];
        info->fit(x, weights, i ? got : want, 512);
        ck_assert_msg(!i || !memcmp(got, want, quant_row_bytes(info->type, 512)), "%s: weights of %g", info->name,
                      (double)sizes[i]);
    }
    for (int k = 0; k < 512; k++)
        weights[k] = (float)(1 + k % 5);
    info->fit(x, weights, want, 512);
    for (int k = 0; k < 512; k++)
        weights[k] *= 0x1p40f;
    info->fit(x, weights, got, 512);
    ck_assert(!memcmp(got, want, quant_row_bytes(info->type, 512)));
}
END_TEST

START_TEST(constant_row_is_lost)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    static const float constants[] = {0.0f, 1.0f, -1.0f, 0.7f, -300.0f};
    if (!info->from_float)
        return;
    for (size_t c = 0; c < sizeof constants / sizeof constants[0]; c++) {
        float x[512], back[512];
        uint8_t blocks[2048];
        for (int k = 0; k < 512; k++)
            x[k] = constants[c];
        info->from_float(x, blocks, 512);
        info->to_float(blocks, back, 512);
        /* The constant gets an outermost level, so only the scale is rounded: a half, by 2^-11; E4M3, by 2^-4; and MXFP4's
         * power of two leaves the two bits of E2M1, which clip 7 to 6 at worst: 2^-2. */
        double tol = !strcmp(info->name, "MXFP4") ? 0.25 : !strcmp(info->name, "NVFP4") ? 0x1p-4 : 0x1p-11;
        if (!strcmp(info->name, "BF16"))
            tol = 0x1p-8;
        for (int k = 0; k < 512; k++)
            ck_assert_msg(fabs((double)back[k] - (double)x[k]) <= tol * fabs((double)x[k]), "%s: %g became %g",
                          info->name, (double)x[k], (double)back[k]);
    }
}
END_TEST

/* What comes out is unspecified; the sanitizers and the guard bytes watch how. */
START_TEST(absurd_floats_break_quantizer)
{
    const struct quant_info *info = quant_info(rows[_i].id);
    const float absurd[] = {NAN,    -NAN,    INFINITY, -INFINITY, 3e38f, -3e38f,
                            1e-45f, -1e-45f, 1e-39f,   65520.0f,  1e-8f, 0.0f};
    enum { N_ABSURD = sizeof absurd / sizeof absurd[0] };
    if (!info->from_float)
        return;
    uint64_t seed = 5;
    for (int kind = 0; kind < 2 * N_ABSURD; kind++) {
        float x[256], back[256];
        size_t n_bytes = quant_row_bytes(info->type, 256);
        uint8_t *blocks = malloc(n_bytes + 1);
        for (int k = 0; k < 256; k++) /* first one kind alone, then all kinds mixed with one in the first place */
            x[k] =
                kind < N_ABSURD ? absurd[kind] : absurd[k ? next_word(&seed) % N_ABSURD : (unsigned)(kind - N_ABSURD)];
        blocks[n_bytes] = GUARD;
        info->from_float(x, blocks, 256);
        info->to_float(blocks, back, 256);
        ck_assert_uint_eq(blocks[n_bytes], GUARD);
        if (info->fit) {
            float weights[256];
            for (int k = 0; k < 256; k++)
                weights[k] = k % 3 ? 3e38f : k % 2 ? 1e-45f : 0.0f;
            info->fit(x, weights, blocks, 256);
            ck_assert_uint_eq(blocks[n_bytes], GUARD);
        }
        free(blocks);
    }
}
END_TEST

/* ---- 16-bit floats: every value, and both sides of every rounding boundary ------------------------------------------ */

static double half_value(int h) /* of a non-negative finite half, 0x7c00 standing for 2^16 */
{
    return h < 0x400 ? ldexp(h, -24) : ldexp(0x400 + (h & 0x3ff), (h >> 10) - 25);
}

START_TEST(half_has_wrong_value)
{
    for (int h = 0; h < 0x7c00; h++) {
        ck_assert(quant_f16_to_f32((uint16_t)h) == (float)half_value(h));
        ck_assert(quant_f16_to_f32((uint16_t)(h | 0x8000)) == -(float)half_value(h));
    }
    ck_assert(signbit(quant_f16_to_f32(0x8000)));
    ck_assert(quant_f16_to_f32(0x7c00) == INFINITY && quant_f16_to_f32(0xfc00) == -INFINITY);
    for (int h = 0x7c01; h < 0x8000; h++)
        ck_assert(isnan(quant_f16_to_f32((uint16_t)h)) && isnan(quant_f16_to_f32((uint16_t)(h | 0x8000))));
}
END_TEST

static void must_round_to_half(float x, int want)
{
    ck_assert_msg(quant_f32_to_f16(x) == want && quant_f32_to_f16(-x) == (want | 0x8000), "%a: %04x, want %04x",
                  (double)x, quant_f32_to_f16(x), want);
}

START_TEST(float_rounds_to_wrong_half)
{
    for (int h = 0; h < 0x7c00; h++) {
        float mid = (float)((half_value(h) + half_value(h + 1)) / 2); /* exact: one bit more than a half has */
        must_round_to_half((float)half_value(h), h);
        must_round_to_half(nextafterf(mid, 0.0f), h);
        must_round_to_half(mid, h + (h & 1));
        must_round_to_half(nextafterf(mid, INFINITY), h + 1);
    }
    must_round_to_half(1e38f, 0x7c00);
    must_round_to_half(INFINITY, 0x7c00);
    must_round_to_half(1e-45f, 0);
}
END_TEST

START_TEST(nan_becomes_number)
{
    for (uint32_t payload = 1; payload < 0x800000; payload = payload * 2 + 1)
        for (uint32_t low = 0; low < 23; low++) {
            uint32_t bits = 0x7f800000 | payload >> low;
            float x;
            if (!(bits & 0x7fffff))
                continue;
            memcpy(&x, &bits, sizeof x);
            ck_assert(isnan(quant_f16_to_f32(quant_f32_to_f16(x))));
            ck_assert(isnan(quant_bf16_to_f32(quant_f32_to_bf16(x))));
        }
}
END_TEST

START_TEST(bfloat_rounds_wrong)
{
    for (uint32_t h = 0; h < 0x7f80; h++) {
        uint32_t bits = h << 16;
        float x;
        for (int offset = -1; offset <= 1; offset++) { /* around the middle between h and the next one */
            uint32_t near = bits + 0x8000 + (uint32_t)offset;
            memcpy(&x, &near, sizeof x);
            uint32_t want = offset < 0 ? h : offset > 0 ? h + 1 : h + (h & 1);
            ck_assert_uint_eq(quant_f32_to_bf16(x), want);
            ck_assert_uint_eq(quant_f32_to_bf16(-x), want | 0x8000);
        }
        memcpy(&x, &bits, sizeof x);
        ck_assert_uint_eq(quant_f32_to_bf16(x), h);
        ck_assert(quant_bf16_to_f32((uint16_t)h) == x && quant_bf16_to_f32((uint16_t)(h | 0x8000)) == -x);
    }
    ck_assert_uint_eq(quant_f32_to_bf16(INFINITY), 0x7f80);
    ck_assert_uint_eq(quant_f32_to_bf16(-INFINITY), 0xff80);
}
END_TEST

/* ---- the table ----------------------------------------------------------------------------------------------------- */

START_TEST(type_is_not_found)
{
    for (int row = 0; row < N_ROWS; row++) {
        const struct quant_info *info = quant_info(rows[row].id);
        ck_assert(info && info == quant_find(rows[row].name));
        ck_assert_str_eq(info->name, rows[row].name);
        ck_assert(info->to_float != NULL);
        ck_assert_int_ne((int)info->act, QUANT_ACT_NONE);
    }
    ck_assert_ptr_eq(quant_find("q4_k"), quant_info(QUANT_Q4_K));
    ck_assert_ptr_null(quant_find("Q4_9"));
    ck_assert_ptr_null(quant_find(""));
    static const int known_without_floats[] = {QUANT_I8, QUANT_I16, QUANT_I32, QUANT_I64, QUANT_F64};
    static const int bytes[] = {1, 2, 4, 8, 8};
    for (int k = 0; k < 5; k++) {
        const struct quant_info *info = quant_info(known_without_floats[k]);
        ck_assert(info && !info->to_float && info->act == QUANT_ACT_NONE);
        ck_assert_uint_eq(quant_row_bytes(info->type, 7), (uint64_t)(7 * bytes[k]));
    }
}
END_TEST

START_TEST(unknown_id_is_accepted)
{
    static const int unknown[] = {-1, 4, 5, 9, 15, 31, 33, 36, 38, QUANT_ID_END, 1 << 30};
    for (size_t k = 0; k < sizeof unknown / sizeof unknown[0]; k++)
        ck_assert_ptr_null(quant_info(unknown[k]));
    for (int row = 0; row < N_ROWS; row++)
        ck_assert_int_lt(rows[row].id, QUANT_ID_END);
}
END_TEST

START_TEST(row_bytes_overflow_32_bits)
{
    ck_assert_uint_eq(quant_row_bytes(QUANT_Q4_K, (int64_t)1 << 40), ((uint64_t)1 << 32) * 144);
    ck_assert_uint_eq(quant_row_bytes(QUANT_Q4_K, 0), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("quant");
    TCase *to = tcase_create("to_float"), *from = tcase_create("from_float"), *f16 = tcase_create("16-bit floats");
    TCase *table = tcase_create("table");
    tcase_set_timeout(from, 60);
    tcase_add_loop_test(to, blocks_differ_from_package, 0, N_ROWS);
    tcase_add_loop_test(to, code_book_entry_wrong, 0, N_ROWS);
    tcase_add_loop_test(from, quantizer_differs_from_package, 0, N_ROWS);
    tcase_add_loop_test(from, quantizer_worse_than_plain_rounding, 0, N_ROWS);
    tcase_add_loop_test(from, weights_do_not_help, 0, N_ROWS);
    tcase_add_loop_test(from, size_of_weights_matters, 0, N_ROWS);
    tcase_add_loop_test(from, constant_row_is_lost, 0, N_ROWS);
    tcase_add_loop_test(from, absurd_floats_break_quantizer, 0, N_ROWS);
    tcase_add_test(f16, half_has_wrong_value);
    tcase_add_test(f16, float_rounds_to_wrong_half);
    tcase_add_test(f16, nan_becomes_number);
    tcase_add_test(f16, bfloat_rounds_wrong);
    tcase_add_test(table, type_is_not_found);
    tcase_add_test(table, unknown_id_is_accepted);
    tcase_add_test(table, row_bytes_overflow_32_bits);
    suite_add_tcase(suite, to);
    suite_add_tcase(suite, from);
    suite_add_tcase(suite, f16);
    suite_add_tcase(suite, table);
    return run_suite(suite);
}
