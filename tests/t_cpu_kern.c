/* The float kernels of every table that this machine can run: the same bits as the plain C ones, nothing written beside the
 * result; and how far the plain C polynomials are from libm. (Matmul kernels: kernels.c.) */
#include "tests/cpu_step.h"
#include "tests/run_suite.h"

#include <inttypes.h>

#include "cpu/isa.h"
#include "cpu/kern.h"
#include "cpu/kern_math.h"

/* ---- polynomials against libm ---- */

/* Units in the last place of want that got is off; a subnormal's unit is that of the smallest. */
static double ulps(float got, double want)
{
    int e;

    if ((double)got == want || (float)want == got)
        return 0;
    frexp(want, &e);
    return fabs((double)got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

typedef float approx_fn(float x);
typedef double exact_fn(double x);

static float approx_exp(float x)
{
    return kern_v_exp(x);
}

static float approx_tanh(float x)
{
    return kern_v_tanh(x);
}

static float approx_sigmoid(float x)
{
    return kern_v_sigmoid(x);
}

static float approx_silu(float x)
{
    return kern_v_silu(x);
}

static float approx_gelu(float x)
{
    return kern_v_gelu_tanh(x);
}

static float approx_softplus(float x)
{
    return kern_v_softplus(x);
}

static double exact_softplus(double x)
{
    return log1p(exp(-fabs(x))) + fmax(x, 0);
}

static double exact_sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double exact_silu(double x)
{
    return x / (1 + exp(-x));
}

static double exact_gelu(double x)
{
    /* (1 + tanh u) / 2 = 1 / (1 + e^-2u): the first form cancels in double, too */
    return x / (1 + exp(-2 * 0.79788456080286535588 * (x + 0.044715 * x * x * x)));
}

/* Every 997th float of both signs with |x| in [lo, hi]: 997 is odd, so all low bits occur. */
static double worst_ulps(approx_fn *approx, exact_fn *exact, float lo, float hi)
{
    uint32_t begin, end;
    double worst = 0;

    memcpy(&begin, &lo, sizeof begin);
    memcpy(&end, &hi, sizeof end);
    for (uint32_t bits = begin; bits <= end; bits += 997) {
        for (uint32_t sign = 0; sign < 2; sign++) {
            float x = float_of(bits | sign << 31);
            worst = fmax(worst, ulps(approx(x), exact((double)x)));
        }
    }
    return worst;
}

static const struct {
    const char *name;
    approx_fn *approx;
    exact_fn *exact;
    float lo, hi;
    double most_ulps;
} math_cases[] = {
    /* one rounding in the sum 1 + q, one in q itself at 0.4 of that size, one for subnormals */
    {"exp", approx_exp, exp, 0, 104, 1.5},
    /* numerator and denominator two roundings each, and the quotient's */
    {"tanh", approx_tanh, tanh, 0, 100, 3},
    /* exp, the sum and the quotient; below -87 e^-x overflows before the quotient is subnormal */
    {"sigmoid", approx_sigmoid, exact_sigmoid, 0, 87, 2.5},
    {"silu", approx_silu, exact_silu, 0, 87, 2.5},
    /* exp, the quotient twice in the series' first term, and the last sum */
    {"softplus", approx_softplus, exact_softplus, 0, 87, 4},
    /* the argument's three roundings are magnified by its size, which is 11 at most here: 11 * 1.5, or twice that in units
     * of the last place, and those of silu */
    {"gelu", approx_gelu, exact_gelu, 0, 4, 36},
};

START_TEST(polynomials_stay_within_their_error_of_libm)
{
    double worst = worst_ulps(math_cases[_i].approx, math_cases[_i].exact, math_cases[_i].lo, math_cases[_i].hi);
    ck_assert_msg(worst <= math_cases[_i].most_ulps, "%s: %.2f ulp", math_cases[_i].name, worst);
}
END_TEST

START_TEST(polynomials_at_the_ends_of_the_range)
{
    ck_assert(kern_v_exp(-INFINITY) == 0 && kern_v_exp(-200.0f) == 0 && kern_v_exp(0.0f) == 1 &&
              kern_v_exp(-0.0f) == 1);
    ck_assert(isinf(kern_v_exp(INFINITY)) && isinf(kern_v_exp(89.0f)) && isinf(kern_v_exp(1e30f)));
    ck_assert(kern_v_exp(-103.0f) > 0);
    ck_assert(kern_v_tanh(INFINITY) == 1 && kern_v_tanh(-INFINITY) == -1 && kern_v_tanh(1e30f) == 1);
    ck_assert(signbit(kern_v_tanh(-0.0f)) && kern_v_tanh(-0.0f) == 0 && kern_v_tanh(1e-40f) > 0);
    ck_assert(kern_v_sigmoid(INFINITY) == 1 && kern_v_sigmoid(-INFINITY) == 0);
    ck_assert(kern_v_silu(-200.0f) == 0 && kern_v_silu(200.0f) == 200 && kern_v_gelu_tanh(-200.0f) == 0);
    ck_assert(isnan(kern_v_exp(NAN)) && isnan(kern_v_tanh(NAN)) && isnan(kern_v_sigmoid(NAN)));
    ck_assert(kern_v_softplus(INFINITY) == INFINITY && kern_v_softplus(-INFINITY) == 0 && isnan(kern_v_softplus(NAN)));
    ck_assert(isnan(kern_v_silu(NAN)) && isnan(kern_v_gelu_tanh(NAN)));
    /* cut at 7 and -7: 7 * 8 / (1 + e^-11.914), 7 * -6 times the same */
    const double gated = 7 / (1 + exp(-1.702 * 7));
    ck_assert(fabs((double)kern_v_swiglu_oai(100, 100) - gated * 8) < 1e-4);
    ck_assert(fabs((double)kern_v_swiglu_oai(100, -100) + gated * 6) < 1e-4);
    ck_assert(fabs((double)kern_v_swiglu_oai(-100, 3)) < 1e-30);
    ck_assert(isnan(kern_v_swiglu_oai(NAN, 1)) && isnan(kern_v_swiglu_oai(1, NAN)));
}
END_TEST

/* ---- every table against the plain C one ---- */

enum { MAX_LEN = 300, N_BUF = 4, BUF = MAX_LEN + 64 };

static const struct kern_table *table; /* the one under test */

/* Inputs and one output, each with its own misalignment. */
static float in[3][BUF];

static const float specials[] = {0.0f,    -0.0f, INFINITY, -INFINITY, NAN,   1e-42f,
                                 -1e-42f, 3e38f, -3e38f,   1e-20f,    88.0f, -104.0f};

static void fill(bool is_special)
{
    for (int b = 0; b < 3; b++)
        for (int i = 0; i < BUF; i++)
            in[b][i] = is_special && rnd_int(4) == 0 ? specials[rnd_int(12)] : rnd() * 8;
}

/* Equal bits, or NaN both: which NaN comes out of two is not in the contract. */
static bool same(float a, float b)
{
    return !memcmp(&a, &b, sizeof a) || (isnan(a) && isnan(b));
}

typedef void call_fn(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n);

/* The call's output (n) by both tables. `begins`: what out holds before. */
static void compare(const char *name, call_fn *call, int64_t n, int shift, const float *begins)
{
    enum { PAD = 16 };
    float want[BUF + 2 * PAD], got[BUF + 2 * PAD];

    for (int i = 0; i < BUF + 2 * PAD; i++)
        want[i] = got[i] = 12345.0f;
    if (begins) {
        memcpy(want + PAD + shift, begins, (size_t)n * sizeof *want);
        memcpy(got + PAD + shift, begins, (size_t)n * sizeof *got);
    }
    call(&kern_ref, in[0] + shift, in[1] + 1, want + PAD + shift, n);
    call(table, in[0] + shift, in[1] + 1, got + PAD + shift, n);
    for (int i = 0; i < BUF + 2 * PAD; i++)
        ck_assert_msg(same(want[i], got[i]), "%s %s n %" PRId64 " shift %d: element %d is %.9g instead of %.9g",
                      table->isa, name, n, shift, i - PAD - shift, (double)got[i], (double)want[i]);
}

static void call_dot(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    if (n)
        *out = t->dot(a, b, n);
}

static void call_sum_sq(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    (void)b;
    if (n)
        *out = t->sum_sq(a, n);
}

static void call_norm(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->rms_norm(a, b, 1e-5f, out, n);
}

static void call_add(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->add(a, b, out, n);
}

static void call_scale(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->scale(a, b[0], out, n);
}

static void call_silu(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->glu(OP_ACT_SILU, a, b, out, n);
}

static void call_gelu(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->glu(OP_ACT_GELU_TANH, a, b, out, n);
}

static void call_oai(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->glu(OP_ACT_SWIGLU_OAI, a, b, out, n);
}

static void call_softcap(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    (void)b;
    t->softcap(a, 3.0f, out, n);
}

static void call_axpy(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    t->axpy(b[0], a, out, n);
}

static void call_softmax(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    (void)a;
    (void)b;
    t->softmax(out, n);
}

static void call_merge(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    if (n > 2) /* the last two of out are m and l */
        t->attn_merge(a, b[0], b[1], out, out + n - 2, out + n - 1, n - 2);
}

static void call_rope(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    int head_dim = (int)n / 2, n_rot = head_dim - head_dim % 2 - (head_dim > 6 ? 2 : 0);
    struct op_rope p = {.n_head = 2, .head_dim = head_dim, .n_rot = n_rot, .neox = a[0] > 0};
    if (n_rot > 0)
        t->rope(&p, out, b);
}

/* Halves and back. */
static void call_f16(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    uint16_t h[BUF];
    (void)b;
    t->kv_write(QUANT_F16, a, h, n);
    t->kv_read(QUANT_F16, h, out, n);
}

/* Blocks and back; the bytes are compared as well, as small floats. */
static void call_q8_0(const struct kern_table *t, const float *a, const float *b, float *out, int64_t n)
{
    uint8_t blocks[BUF / 32 * 34 + 34];
    int64_t whole = n / 32 * 32;
    (void)b;
    t->kv_write(QUANT_Q8_0, a, blocks, whole);
    t->kv_read(QUANT_Q8_0, blocks, out, whole);
    for (int64_t i = whole; i < n; i++)
        out[i] = whole ? blocks[(i - whole) % (whole / 32 * 34)] : 0;
}

static const struct {
    const char *name;
    call_fn *call;
    bool has_begins;
} calls[] = {
    {"dot", call_dot, false},   {"sum_sq", call_sum_sq, false},  {"rms_norm", call_norm, false},
    {"add", call_add, false},   {"scale", call_scale, false},    {"silu", call_silu, false},
    {"gelu", call_gelu, false}, {"oai", call_oai, false},        {"softcap", call_softcap, false},
    {"axpy", call_axpy, true},  {"softmax", call_softmax, true}, {"attn_merge", call_merge, true},
    {"rope", call_rope, true},  {"f16 rows", call_f16, false},   {"q8_0 rows", call_q8_0, false},
};

START_TEST(row_kernels_give_the_bits_of_the_plain_ones)
{
    static const int64_t lens[] = {0, 1, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 100, 256, 257, MAX_LEN};

    for (const char *const *name = cpu_isa_names(); *name; name++) {
        if (!cpu_isa_has(*name))
            continue;
        ck_assert_int_eq(isa_choose(*name, &table), 0);
        for (size_t c = 0; c < sizeof calls / sizeof *calls; c++) {
            for (size_t n = 0; n < sizeof lens / sizeof *lens; n++) {
                for (int round = 0; round < 8; round++) {
                    rnd_seed(c * 1000 + n * 10 + (unsigned)round);
                    fill(round % 2);
                    compare(calls[c].name, calls[c].call, lens[n], round, calls[c].has_begins ? in[2] : NULL);
                }
            }
        }
    }
}
END_TEST

/* ---- attention over one page ---- */

struct page_case {
    int n_q, head_dim_k, head_dim_v, key_begin, key_end;
    float softcap;
    enum quant_type type;
    int v_row; /* 0: head_dim_v */
};

static const struct page_case page_cases[] = {
    {1, 64, 64, 0, 64, 0, QUANT_F16, 0},     {3, 128, 128, 0, 64, 0, QUANT_Q8_0, 0},
    {7, 64, 64, 5, 23, 2.5f, QUANT_F16, 0},  {2, 20, 12, 0, 1, 0, QUANT_F16, 0},
    {4, 256, 256, 63, 64, 0, QUANT_F16, 0},  {2, 96, 32, 1, 62, 30.0f, QUANT_Q8_0, 0},
    {5, 13, 37, 3, 50, 0, QUANT_F16, 0},     {1, 80, 80, 0, 33, 0, QUANT_F16, 0},
    {3, 576, 512, 0, 64, 0, QUANT_F16, 576}, {8, 96, 64, 3, 60, 0, QUANT_Q8_0, 96},
    {5, 80, 37, 0, 50, 0, QUANT_F16, 80},
};

/* One page after another into the state out (n_q * (head_dim_v + 2)). */
static void fold_pages(const struct kern_table *t, const struct page_case *c, const float *q, const void *k,
                       const void *v, enum quant_type type, float *out)
{
    int head_dim = c->head_dim_k > c->head_dim_v ? c->head_dim_k : c->head_dim_v;
    uint64_t scratch_bytes = (uint64_t)KERN_ATTN_SCRATCH(c->n_q, head_dim) * sizeof(float);
    struct kern_attn_args args = {.q = q,
                                  .n_q = c->n_q,
                                  .q_stride = c->head_dim_k,
                                  .o_stride = c->head_dim_v,
                                  .head_dim_k = c->head_dim_k,
                                  .head_dim_v = c->head_dim_v,
                                  .v_row = c->v_row ? c->v_row : c->head_dim_v,
                                  .scale = 0.3f,
                                  .softcap = c->softcap,
                                  .kv_type = type,
                                  .k = k,
                                  .v = v,
                                  .key_begin = c->key_begin,
                                  .key_end = c->key_end,
                                  .o = out,
                                  .m = out + c->n_q * c->head_dim_v,
                                  .l = out + c->n_q * (c->head_dim_v + 1),
                                  .scratch = guarded_make(scratch_bytes)};

    memset(out, 0, (size_t)(c->n_q * (c->head_dim_v + 2)) * sizeof *out);
    for (int i = 0; i < c->n_q; i++)
        args.m[i] = -INFINITY;
    args.next_k = k;
    args.next_v = v;
    t->attn_page(&args);
    args.next_k = args.next_v = NULL;
    args.key_begin = 0; /* a second page with all keys on top */
    args.key_end = DEVICE_PAGE_TOK;
    t->attn_page(&args);
    guarded_free(args.scratch, scratch_bytes);
}

static void page_run(const struct page_case *c)
{
    int n_k = DEVICE_PAGE_TOK * c->head_dim_k, n_v = DEVICE_PAGE_TOK * (c->v_row ? c->v_row : c->head_dim_v),
        n_out = c->n_q * (c->head_dim_v + 2);
    struct tensor k = t_make(QUANT_F32, n_k, 1, 1), v = t_make(QUANT_F32, n_v, 1, 1),
                  q = t_make(QUANT_F32, c->n_q * c->head_dim_k, 1, 1);
    struct tensor kq = t_make(c->type, n_k, 1, 1), vq = t_make(c->type, n_v, 1, 1);
    float *want = malloc((size_t)n_out * sizeof *want), *got = guarded_make((size_t)n_out * sizeof *got);

    kern_ref.kv_write(c->type, k.data, kq.data, n_k);
    kern_ref.kv_write(c->type, v.data, vq.data, n_v);
    kern_ref.kv_read(c->type, kq.data, k.data, n_k);
    kern_ref.kv_read(c->type, vq.data, v.data, n_v);
    fold_pages(&kern_ref, c, q.data, kq.data, vq.data, c->type, want);
    fold_pages(table, c, q.data, kq.data, vq.data, c->type, got);
    ck_assert_mem_eq(want, got, (size_t)n_out * sizeof *got);
    fold_pages(table, c, q.data, k.data, v.data, QUANT_F32, got); /* as converted before */
    ck_assert_mem_eq(want, got, (size_t)n_out * sizeof *got);
    for (int i = 0; i < n_out; i++)
        ck_assert(isfinite(want[i]));
    free(want);
    guarded_free(got, (uint64_t)n_out * sizeof *got);
    t_free(&k);
    t_free(&v);
    t_free(&q);
    t_free(&kq);
    t_free(&vq);
}

START_TEST(attention_kernels_give_the_bits_of_the_plain_one)
{
    for (const char *const *name = cpu_isa_names(); *name; name++) {
        if (!cpu_isa_has(*name))
            continue;
        ck_assert_int_eq(isa_choose(*name, &table), 0);
        for (size_t c = 0; c < sizeof page_cases / sizeof *page_cases; c++) {
            rnd_seed(c);
            page_run(&page_cases[c]);
        }
    }
}
END_TEST

START_TEST(unknown_instruction_set_is_refused_by_name)
{
    const struct kern_table *t;

    ck_assert_int_eq(isa_choose("avx1024", &t), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err_text(), "avx1024"));
    ck_assert(!isa_has("avx1024") && isa_has("ref"));
    ck_assert_int_eq(isa_choose(NULL, &t), 0);
    ck_assert(isa_has(t->isa));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cpu_kern");
    TCase *tc = tcase_create("cpu_kern");

    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, polynomials_stay_within_their_error_of_libm, 0,
                        (int)(sizeof math_cases / sizeof *math_cases));
    tcase_add_test(tc, polynomials_at_the_ends_of_the_range);
    tcase_add_test(tc, row_kernels_give_the_bits_of_the_plain_ones);
    tcase_add_test(tc, attention_kernels_give_the_bits_of_the_plain_one);
    tcase_add_test(tc, unknown_instruction_set_is_refused_by_name);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
