/* The matmul kernels of every table that this machine can run, against the plain C ones bit for bit; those against double
 * arithmetic on dequantized numbers. Every weight type, from the tables themselves: a new type needs no new test.
 *
 *   kernels [--isa NAME] [--type TYPE] [--seed N]          the tests
 *   kernels --bench [--isa NAME] [--type TYPE]             speed of one thread, after a check of the result */
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cpu/isa.h"
#include "cpu/kern_act.h"
#include "cpu/kern_mat.h"
#include "quant/quant.h"

#define MAX_ROWS 33
#define MAX_TOKS 33
#define DST_STRIDE (MAX_ROWS + 4)
#define GUARD_BYTES 64
#define GUARD 0xa5

static uint64_t seed = 1, rng_state;
static int n_failed;

static uint32_t rng(void)
{
    rng_state += 0x9e3779b97f4a7c15u;
    uint64_t z = rng_state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

static float uniform(float lo, float hi)
{
    return lo + (hi - lo) * ((float)(rng() >> 8) * 0x1p-24f);
}

/* ---- weights --------------------------------------------------------------------------------------------------------- */

/* Bytes of codes and sub-scales; float scales are ordinary but for RAW, where they too are anything (also not finite). */
enum fill { FILL_RANDOM, FILL_ZERO, FILL_FF, FILL_80, FILL_7F, FILL_RAW, FILL_N };
static const char *const fill_names[] = {"random", "bytes 00", "bytes ff", "bytes 80", "bytes 7f", "raw bytes"};

/* Places of the half scales in a block; -1: none. */
static void half_places(enum quant_type type, int place[2])
{
    place[0] = 0;
    place[1] = -1;
    switch (type) {
    case QUANT_Q4_1:
    case QUANT_Q5_1:
    case QUANT_Q4_K:
    case QUANT_Q5_K:
        place[1] = 2;
        break;
    case QUANT_Q2_K:
        place[0] = 80, place[1] = 82;
        break;
    case QUANT_Q3_K:
        place[0] = 108;
        break;
    case QUANT_Q6_K:
        place[0] = 208;
        break;
    case QUANT_TQ1_0:
        place[0] = 52;
        break;
    case QUANT_TQ2_0:
        place[0] = 64;
        break;
    case QUANT_IQ1_M:
    case QUANT_MXFP4:
    case QUANT_NVFP4:
        place[0] = -1;
        break;
    default:
        break;
    }
}

static void ordinary_scales(enum quant_type type, uint8_t *block)
{
    int place[2];
    half_places(type, place);
    for (int i = 0; i < 2; i++)
        if (place[i] >= 0) {
            uint16_t h = quant_f32_to_f16(uniform(-0.25f, 1.0f));
            memcpy(block + place[i], &h, 2);
        }
    if (type == QUANT_MXFP4)
        block[0] = (uint8_t)(120 + rng() % 16);
    if (type == QUANT_IQ1_M) { /* a half from 0.5 to 1: its four nibbles stand on top of four words */
        uint32_t h = 0x3800 | (rng() & 0x3ff);
        for (int i = 0; i < 4; i++)
            block[49 + 2 * i] = (uint8_t)((block[49 + 2 * i] & 15) | (h >> 4 * i & 15) << 4);
    }
}

static void fill_block(const struct quant_info *info, enum fill fill, uint8_t *block)
{
    static const int bytes[FILL_N] = {-1, 0x00, 0xff, 0x80, 0x7f, -1};
    for (int i = 0; i < info->block_bytes; i++)
        block[i] = (uint8_t)(bytes[fill] >= 0 ? bytes[fill] : (int)(rng() & 255));
    if (fill == FILL_RAW)
        return;
    if (info->block_len > 1) {
        ordinary_scales(info->type, block);
    } else {
        float x = fill == FILL_ZERO ? 0.0f : fill == FILL_RANDOM ? uniform(-1, 1) : uniform(-1e4f, 1e4f);
        float aligned;
        info->from_float(&x, &aligned, 1);
        memcpy(block, &aligned, (size_t)info->block_bytes);
    }
}

/* n bytes that end where memory ends, so that reading on is a fault. */
struct fence {
    char *map;
    size_t map_bytes;
    void *data;
};

static struct fence fence_make(size_t n)
{
    struct fence f;
    size_t page = 4096, body = (n + page - 1) / page * page;
    f.map_bytes = body + page;
    f.map = mmap(NULL, f.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f.map == MAP_FAILED || mprotect(f.map + body, page, PROT_NONE)) {
        perror("kernels: mmap");
        exit(1);
    }
    f.data = f.map + body - n;
    return f;
}

static void fence_free(struct fence *f)
{
    munmap(f->map, f->map_bytes);
}

/* ---- one problem ----------------------------------------------------------------------------------------------------- */

struct problem {
    const struct quant_info *info;
    int64_t n_cols;
    uint64_t w_stride, x_stride;
    struct fence w, x; /* (MAX_ROWS) weight rows, (MAX_TOKS) activation rows in the type's form */
    float *x_float;    /* (MAX_TOKS, n_cols) */
    float *want;       /* (MAX_TOKS, MAX_ROWS): of the reference */
    float *dst;        /* (MAX_TOKS, DST_STRIDE) with guards at both ends */
    char *scratch;     /* with a guard behind */
};

static void activations(struct problem *p, enum fill fill)
{
    for (int t = 0; t < MAX_TOKS; t++)
        for (int64_t k = 0; k < p->n_cols; k++) {
            float *x = &p->x_float[t * p->n_cols + k];
            *x = uniform(-2, 2);
            if (t % 8 == 3) /* the largest codes, of one sign or of both */
                *x = t % 16 == 3 && k % 3 == 0 ? -1.5f : 1.5f;
            if (t % 8 == 5)
                *x = 0.0f;
            if (fill == FILL_RAW && t % 8 == 6) /* subnormal, infinite, not a number */
                *x = t < 8 ? *x * 1e-40f : k == p->n_cols / 2 ? (t < 16 ? INFINITY : NAN) : *x;
        }
}

static struct problem problem_make(const struct quant_info *info, int n_blocks, enum fill fill, int stride_extra)
{
    struct problem p = {.info = info, .n_cols = (int64_t)n_blocks * info->block_len};
    uint64_t row_bytes = quant_row_bytes(info->type, p.n_cols);
    p.w_stride = row_bytes + (uint64_t)stride_extra;
    p.x_stride = kern_act_bytes(info->act, p.n_cols) + 64;
    p.w = fence_make((MAX_ROWS - 1) * p.w_stride + row_bytes);
    p.x = fence_make(MAX_TOKS * p.x_stride);
    p.x_float = malloc((size_t)(MAX_TOKS * p.n_cols) * sizeof(float));
    p.want = malloc(MAX_TOKS * MAX_ROWS * sizeof(float));
    p.dst = malloc(MAX_TOKS * DST_STRIDE * sizeof(float) + 2 * GUARD_BYTES);
    p.scratch = aligned_alloc(64, KERN_MAT_SCRATCH_BYTES + GUARD_BYTES);
    for (int r = 0; r < MAX_ROWS; r++)
        for (int b = 0; b < n_blocks; b++)
            fill_block(info, fill, (uint8_t *)p.w.data + (uint64_t)r * p.w_stride + (uint64_t)(b * info->block_bytes));
    activations(&p, fill);
    for (int t = 0; t < MAX_TOKS; t++)
        kern_ref_act_row(info->act, p.x_float + t * p.n_cols, (char *)p.x.data + (uint64_t)t * p.x_stride, p.n_cols);
    return p;
}

static void problem_free(struct problem *p)
{
    fence_free(&p->w);
    fence_free(&p->x);
    free(p->x_float);
    free(p->want);
    free(p->dst);
    free(p->scratch);
}

static struct kern_mat_args args_of(const struct problem *p, int row, int n_rows, int tok, int n_tok)
{
    struct kern_mat_args a = {.w_stride = p->w_stride, .n_rows = n_rows, .x_stride = p->x_stride, .n_tok = n_tok};
    a.w = (char *)p->w.data + (uint64_t)row * p->w_stride;
    a.x = (char *)p->x.data + (uint64_t)tok * p->x_stride;
    a.n_cols = p->n_cols;
    a.dst = (float *)((char *)p->dst + GUARD_BYTES);
    a.dst_stride = DST_STRIDE;
    a.scratch = p->scratch;
    return a;
}

static void want_make(struct problem *p)
{
    struct kern_mat_args a = args_of(p, 0, MAX_ROWS, 0, MAX_TOKS);
    a.dst = p->want;
    a.dst_stride = MAX_ROWS;
    kern_ref.mat[p->info->type](&a);
}

/* Any NaN is as good as another: which one an operation on two gives is not fixed. */
static bool same_bits(float a, float b)
{
    return (isnan(a) && isnan(b)) || !memcmp(&a, &b, sizeof a);
}

static void fail(const struct quant_info *info, const char *what, const char *how, int row, int tok, double got,
                 double want)
{
    if (++n_failed <= 20)
        printf("FAIL %s: %s (%s): row %d, token %d: %.9g, want %.9g (seed %" PRIu64 ")\n", info->name, what, how, row,
               tok, got, want, seed);
}

/* Run rows and tokens of the problem, and hold them, and everything around them, against what must be there. */
static bool run_part(struct problem *p, kern_mat *mat, int row, int n_rows, int tok, int n_tok, const char *what,
                     const char *how)
{
    size_t dst_bytes = MAX_TOKS * DST_STRIDE * sizeof(float) + 2 * GUARD_BYTES;
    memset(p->dst, GUARD, dst_bytes);
    memset(p->scratch + KERN_MAT_SCRATCH_BYTES, GUARD, GUARD_BYTES);
    struct kern_mat_args a = args_of(p, row, n_rows, tok, n_tok);
    mat(&a);
    for (int t = 0; t < n_tok; t++)
        for (int r = 0; r < n_rows; r++) {
            float *got = &a.dst[t * DST_STRIDE + r], want = p->want[(tok + t) * MAX_ROWS + row + r];
            if (!same_bits(*got, want)) {
                fail(p->info, what, how, row + r, tok + t, *got, want);
                return false;
            }
            memset(got, GUARD, sizeof *got);
        }
    for (size_t i = 0; i < dst_bytes; i++)
        if (((uint8_t *)p->dst)[i] != GUARD) {
            fail(p->info, "wrote beside dst", how, n_rows, n_tok, (double)i, 0);
            return false;
        }
    for (int i = 0; i < GUARD_BYTES; i++)
        if ((uint8_t)p->scratch[KERN_MAT_SCRATCH_BYTES + i] != GUARD) {
            fail(p->info, "wrote past scratch", how, n_rows, n_tok, i, 0);
            return false;
        }
    return true;
}

/* ---- tests: each takes one type and one table ------------------------------------------------------------------------- */

static const int sizes[] = {1, 2, 3, 5, 7, 8, 9, 16, 17, 33};
#define N_SIZES (int)(sizeof sizes / sizeof *sizes)

/* Blocks that make a row of about n columns; floats take odd lengths. */
static int blocks_of(const struct quant_info *info, int n)
{
    return info->block_len == 1 ? n + n % 7 : n < info->block_len ? 1 : n / info->block_len;
}

/* Row and token counts that leave tails, at any alignment of the weights. */
static void tails_and_strides(const struct quant_info *info, const struct kern_table *table)
{
    static const int cols[] = {32, 256, 512, 1408}, extra[] = {0, 1, 2, 7};
    for (int c = 0; c < 4; c++) {
        struct problem p = problem_make(info, blocks_of(info, cols[c]), FILL_RANDOM, extra[c]);
        want_make(&p);
        bool ok = true;
        for (int i = 0; i < N_SIZES * N_SIZES && ok; i++)
            ok = run_part(&p, table->mat[info->type], 0, sizes[i / N_SIZES], 0, sizes[i % N_SIZES], "differs from ref",
                          "tails");
        problem_free(&p);
    }
}

/* Each token alone and each row alone give the bits that they give in company. */
static void neighbours_change_bits(const struct quant_info *info, const struct kern_table *table)
{
    struct problem p = problem_make(info, blocks_of(info, 800), FILL_RANDOM, 0);
    want_make(&p);
    bool ok = run_part(&p, table->mat[info->type], 0, MAX_ROWS, 0, MAX_TOKS, "differs from ref", "together");
    for (int t = 0; t < MAX_TOKS && ok; t++)
        ok = run_part(&p, table->mat[info->type], 0, MAX_ROWS, t, 1, "differs from ref", "one token");
    for (int r = 0; r < MAX_ROWS && ok; r++)
        ok = run_part(&p, table->mat[info->type], r, 1, 0, MAX_TOKS, "differs from ref", "one row");
    if (ok)
        run_part(&p, table->mat[info->type], 0, 0, 0, MAX_TOKS, "differs from ref", "no rows");
    if (ok)
        run_part(&p, table->mat[info->type], 0, MAX_ROWS, 0, 0, "differs from ref", "no tokens");
    problem_free(&p);
}

/* The largest codes and sub-scales, scales of any bits, activations that are not finite. */
static void extreme_bytes_wrap(const struct quant_info *info, const struct kern_table *table)
{
    for (enum fill fill = FILL_ZERO; fill < FILL_N; fill++) {
        struct problem p = problem_make(info, blocks_of(info, 512), fill, 0);
        want_make(&p);
        run_part(&p, table->mat[info->type], 0, MAX_ROWS, 0, MAX_TOKS, "differs from ref", fill_names[fill]);
        run_part(&p, table->mat[info->type], 0, MAX_ROWS, 3, 1, "differs from ref", fill_names[fill]);
        problem_free(&p);
    }
}

static void act_row_differs(const struct quant_info *info, const struct kern_table *table)
{
    struct problem p = problem_make(info, blocks_of(info, 1024), FILL_RAW, 0);
    uint64_t bytes = kern_act_bytes(info->act, p.n_cols);
    char *got = aligned_alloc(64, bytes + 64), *want = aligned_alloc(64, bytes + 64);
    for (int t = 0; t < MAX_TOKS; t++) {
        memset(got, GUARD, bytes + 64);
        memset(want, GUARD, bytes + 64);
        kern_ref_act_row(info->act, p.x_float + t * p.n_cols, want, p.n_cols);
        table->act_row(info->act, p.x_float + t * p.n_cols, got, p.n_cols);
        if (memcmp(got, want, bytes + 64) || (uint8_t)got[bytes] != GUARD)
            fail(info, "activation row differs from ref", "", 0, t, 0, 0);
    }
    free(got);
    free(want);
    problem_free(&p);
}

/* Sum of |w x| with a block's minima apart from its codes, since they may cancel in w; and roundings on the way. */
static double bound_of(const struct problem *p, int row, int tok, const float *w, const float *x)
{
    const struct kern_mat_layout *layout = kern_ref_mat_layout(p->info->type);
    double sum_abs = 0;
    int64_t n_round = p->n_cols / 16 + 5; /* floats: one a fmaf of a lane, and the tree */
    if (!layout) {
        for (int64_t k = 0; k < p->n_cols; k++)
            sum_abs += fabs((double)w[k] * x[k]);
        return (double)n_round * (double)FLT_EPSILON * sum_abs;
    }
    struct kern_mat_block b;
    const char *at = (const char *)p->w.data + (uint64_t)row * p->w_stride;
    for (int64_t part = 0; part < p->n_cols / layout->part_len; part++) {
        layout->unpack(at + part / layout->n_part * layout->block_bytes, (int)(part % layout->n_part), &b);
        for (int k = 0; k < layout->part_len; k++) {
            double xa = fabs((double)x[part * layout->part_len + k]);
            sum_abs += fabs((double)b.d * b.scale[k / 16] * b.q[k]) * xa;
            sum_abs += layout->has_min ? fabs((double)b.m * b.min[k / 16]) * xa : 0;
        }
    }
    (void)tok;
    n_round =
        2 * (p->n_cols / layout->part_len) + 2 + 4; /* fmafs; scale product and integer sum; to_float's own steps */
    return (double)n_round * (double)FLT_EPSILON * sum_abs;
}

/* One dequantized activation row. */
static void act_floats(const struct problem *p, int tok, float *out)
{
    const char *row = (const char *)p->x.data + (uint64_t)tok * p->x_stride;
    struct kern_act_x32 a = kern_act_x32(row, p->n_cols);
    struct kern_act_x256 b = kern_act_x256(row, p->n_cols);
    for (int64_t k = 0; k < p->n_cols; k++)
        switch (p->info->act) {
        case QUANT_ACT_Q8X32:
            out[k] = a.s[k / 32].d * (float)a.q[k];
            break;
        case QUANT_ACT_Q8X256:
            out[k] = b.s[k / 256].d * (float)(b.s[k / 256].sub[k % 256 / 32] * b.q[k]);
            break;
        default:
            out[k] = ((const float *)row)[k];
        }
}

static void ref_is_no_dot_product(const struct quant_info *info, const struct kern_table *table)
{
    if (table != &kern_ref)
        return;
    struct problem p = problem_make(info, blocks_of(info, 1024), FILL_RANDOM, 3);
    float *w = malloc((size_t)p.n_cols * sizeof *w), *x = malloc((size_t)p.n_cols * sizeof *x);
    want_make(&p);
    uint8_t *row = malloc(quant_row_bytes(info->type, p.n_cols) + 64);
    for (int t = 0; t < MAX_TOKS; t += 4)
        for (int r = 0; r < MAX_ROWS; r += 3) {
            memcpy(row, (char *)p.w.data + (uint64_t)r * p.w_stride, quant_row_bytes(info->type, p.n_cols));
            info->to_float(row, w, p.n_cols);
            act_floats(&p, t, x);
            double sum = 0;
            for (int64_t k = 0; k < p.n_cols; k++)
                sum += (double)w[k] * x[k];
            double got = p.want[t * MAX_ROWS + r];
            if (!(fabs(got - sum) <= bound_of(&p, r, t, w, x)))
                fail(info, "ref is not the dot product", "", r, t, got, sum);
        }
    free(row);
    free(w);
    free(x);
    problem_free(&p);
}

/* How many scales d a code of column k counts. */
static int sub_of(const struct kern_act_x256 *b, int len, int64_t k)
{
    return len == 32 ? 1 : b->s[k / 256].sub[k % 256 / 32];
}

/* Codes within half a step of what they stand for, and the sums beside them right. */
static void act_row_is_not_nearest(const struct quant_info *info, const struct kern_table *table)
{
    if (info->act == QUANT_ACT_F32)
        return;
    struct problem p = problem_make(info, blocks_of(info, 1024), FILL_RANDOM, 0);
    int len = info->act == QUANT_ACT_Q8X32 ? 32 : 256;
    char *row = aligned_alloc(64, p.x_stride);
    for (int t = 0; t < 8; t++) {
        const float *x = p.x_float + t * p.n_cols;
        table->act_row(info->act, x, row, p.n_cols);
        struct kern_act_x32 a = kern_act_x32(row, p.n_cols);
        struct kern_act_x256 b = kern_act_x256(row, p.n_cols);
        const int16_t *q16 = len == 32 ? a.q16 : b.q16;
        for (int64_t k = 0; k < p.n_cols; k++) {
            int sub = sub_of(&b, len, k);
            double d = (double)(len == 32 ? a.s[k / 32].d : b.s[k / 256].d) * sub;
            double err = fabs((double)a.q[k] * d - (double)x[k]);
            if (err > 0.5 * d + 130 * d * (double)FLT_EPSILON || q16[kern_act_q16_place(k)] != sub * a.q[k])
                fail(info, "activation code", "", (int)k, t, a.q[k], x[k] / d);
            if (sub < 1 || sub > KERN_ACT_SUB_MAX)
                fail(info, "activation sub-scale", "", (int)k, t, sub, 0);
        }
        for (int64_t j = 0; j < p.n_cols / 32; j++) {
            int half[2] = {0, 0}, sub = sub_of(&b, len, j * 32);
            for (int k = 0; k < 32; k++)
                half[k / 16] += sub * a.q[j * 32 + k];
            const struct kern_act_s256 *s = &b.s[j / 8];
            int j8 = (int)(j % 8);
            bool ok = len == 32 ? a.s[j].sum == half[0] + half[1]
                                : s->sum32[j8] == half[0] + half[1] && s->sum16[2 * j8] == half[0] &&
                                      s->sum16[2 * j8 + 1] == half[1];
            if (!ok)
                fail(info, "sum of activation codes", "", (int)j, t, 0, half[0] + half[1]);
        }
    }
    free(row);
    problem_free(&p);
}

static void (*const tests[])(const struct quant_info *, const struct kern_table *) = {
    act_row_is_not_nearest, ref_is_no_dot_product,  act_row_differs,
    tails_and_strides,      neighbours_change_bits, extreme_bytes_wrap,
};

/* ---- bench ------------------------------------------------------------------------------------------------------------ */

#define BENCH_COLS 2048
#define BENCH_ROWS 256
#define BENCH_TOKS 512
#define BENCH_COLD_BYTES (64u << 20) /* twice the largest cache of the machines at hand */
#define BENCH_TILE 32

struct bench {
    const struct quant_info *info;
    uint64_t row_bytes, x_stride;
    int n_rows;
    char *w, *x, *scratch;
    float *dst;
};

/* Time of this thread alone: others may share the core. */
static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Seconds of one pass over rows of the matrix, in tiles as a pool of workers takes them; the best of n. */
static double bench_pass(const struct bench *b, kern_mat *mat, int n_rows, int n_tok, int n)
{
    double best = INFINITY;
    for (int rep = 0; rep < n; rep++) {
        uint64_t start = cpu_ns();
        for (int row = 0; row < n_rows; row += BENCH_TILE) {
            struct kern_mat_args a = {.w_stride = b->row_bytes, .x = b->x, .x_stride = b->x_stride, .n_tok = n_tok};
            a.w = b->w + (uint64_t)row * b->row_bytes;
            a.n_rows = n_rows - row < BENCH_TILE ? n_rows - row : BENCH_TILE;
            a.n_cols = BENCH_COLS;
            a.dst = b->dst + row;
            a.dst_stride = n_rows;
            a.scratch = b->scratch;
            mat(&a);
        }
        best = fmin(best, (double)(cpu_ns() - start) * 1e-9);
    }
    return best;
}

static bool bench_is_right(const struct bench *b, kern_mat *mat)
{
    float want[64], got[64];
    struct kern_mat_args a = {.w = b->w, .w_stride = b->row_bytes, .n_rows = 16, .x = b->x, .x_stride = b->x_stride};
    a.n_tok = 4;
    a.n_cols = BENCH_COLS;
    a.dst_stride = 16;
    a.scratch = b->scratch;
    a.dst = want;
    kern_ref.mat[b->info->type](&a);
    a.dst = got;
    mat(&a);
    for (int i = 0; i < 64; i++)
        if (!same_bits(want[i], got[i]))
            return false;
    return true;
}

static void bench_type(const struct quant_info *info, const struct kern_table *table)
{
    struct bench b = {.info = info, .row_bytes = quant_row_bytes(info->type, BENCH_COLS)};
    b.n_rows = (int)(BENCH_COLD_BYTES / b.row_bytes);
    b.x_stride = kern_act_bytes(info->act, BENCH_COLS);
    b.w = aligned_alloc(64, BENCH_COLD_BYTES);
    b.x = aligned_alloc(64, BENCH_TOKS * b.x_stride);
    b.scratch = aligned_alloc(64, KERN_MAT_SCRATCH_BYTES);
    b.dst = malloc((size_t)(b.n_rows > BENCH_ROWS * BENCH_TOKS ? b.n_rows : BENCH_ROWS * BENCH_TOKS) * sizeof(float));
    for (int64_t i = 0; i < (int64_t)(16 * b.row_bytes); i += info->block_bytes)
        fill_block(info, FILL_RANDOM, (uint8_t *)b.w + i);
    for (int r = 16; r < b.n_rows; r++)
        memcpy(b.w + (uint64_t)r * b.row_bytes, b.w + (uint64_t)(r - 16) * b.row_bytes, b.row_bytes);
    float x[BENCH_COLS];
    for (int t = 0; t < BENCH_TOKS; t++) {
        for (int k = 0; k < BENCH_COLS; k++)
            x[k] = uniform(-2, 2);
        kern_ref_act_row(info->act, x, b.x + (uint64_t)t * b.x_stride, BENCH_COLS);
    }
    kern_mat *mat = table->mat[info->type], *ref = kern_ref.mat[info->type];
    double gemv = bench_pass(&b, mat, b.n_rows, 1, 3), gemm = bench_pass(&b, mat, BENCH_ROWS, BENCH_TOKS, 3);
    double few = bench_pass(&b, mat, BENCH_ROWS * 4, 4, 5);
    double ref_gemv = bench_pass(&b, ref, 512, 1, 1) / 512 * b.n_rows, ref_gemm = bench_pass(&b, ref, 32, 64, 1) * 64;
    double gop = 2e-9 * BENCH_COLS * BENCH_ROWS;
    printf("%-8s %-5s  GEMV %6.2f GB/s (ref x %5.1f)   GEMM 4 tokens %6.1f, 512 tokens %6.1f GOP/s (ref x %5.1f)\n",
           info->name, bench_is_right(&b, mat) ? "right" : "WRONG",
           1e-9 * (double)b.n_rows * (double)b.row_bytes / gemv, ref_gemv / gemv, gop * 4 * 4 / few,
           gop * BENCH_TOKS / gemm, ref_gemm / gemm);
    fflush(stdout);
    free(b.w);
    free(b.x);
    free(b.scratch);
    free(b.dst);
}

/* ---- main ------------------------------------------------------------------------------------------------------------- */

struct opts {
    const char *isa, *type;
    bool bench;
};

static int opts_parse(struct opts *o, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        bool has_value = i + 1 < argc;
        if (!strcmp(argv[i], "--bench"))
            o->bench = true;
        else if (!strcmp(argv[i], "--isa") && has_value)
            o->isa = argv[++i];
        else if (!strcmp(argv[i], "--type") && has_value)
            o->type = argv[++i];
        else if (!strcmp(argv[i], "--seed") && has_value)
            seed = strtoull(argv[++i], NULL, 10);
        else
            return -1;
    }
    return o->type && !quant_find(o->type) ? -1 : 0;
}

static void run_table(const struct kern_table *table, const struct opts *o)
{
    for (int id = 0; id < QUANT_ID_END; id++) {
        const struct quant_info *info = quant_info(id);
        if (!info || info->act == QUANT_ACT_NONE || (o->type && info != quant_find(o->type)))
            continue;
        if (!table->mat[id]) {
            fail(info, "no kernel", table->isa, 0, 0, 0, 0);
            continue;
        }
        rng_state = seed;
        if (o->bench)
            bench_type(info, table);
        for (size_t i = 0; !o->bench && i < sizeof tests / sizeof *tests; i++)
            tests[i](info, table);
    }
}

int main(int argc, char **argv)
{
    struct opts o = {0};
    if (opts_parse(&o, argc, argv)) {
        fprintf(stderr, "usage: kernels [--bench] [--isa NAME] [--type TYPE] [--seed N]\n");
        return 2;
    }
    int n_run = 0;
    for (const char *const *name = isa_names(); *name; name++) {
        const struct kern_table *table;
        if ((o.isa ? strcmp(o.isa, *name) : o.bench && !strcmp("ref", *name)) || isa_choose(*name, &table))
            continue;
        int failed_before = n_failed;
        run_table(table, &o);
        printf("%s: %s\n", *name, n_failed == failed_before ? "ok" : "FAILED");
        n_run++;
    }
    if (!n_run) {
        printf("skipped: this machine cannot run %s\n", o.isa ? o.isa : "any table");
        return 77;
    }
    return n_failed ? 1 : 0;
}
