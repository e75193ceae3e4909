/* Model files written anew: the writer, importance matrices, and quantization from file to file. */
#include "cpu/pool.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "src/model/gguf_write.h"
#include "src/model/imatrix.h"
#include "src/model/quantize.h"
#include "tests/memfile.h"
#include "tests/memout.h"
#include "tests/raw.h"
#include "tests/run_suite.h"

#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t seed;

static float next_float(void) /* -1..1 */
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(seed >> 32) / 2147483648.0f;
}

static uint64_t live_bytes(void)
{
    return mem_live_bytes(MEM_META) + mem_live_bytes(MEM_OTHER) + mem_live_bytes(MEM_SCRATCH);
}

/* ---- a source ----
 * A model of two experts: a norm, a router, an odd matrix, a matrix, and a stack whose experts are alike. Written byte for byte here,
 * so that the writer under test has no part in it. */

enum { COLUMNS = 256, ROWS = 3, N_SOURCE = 6 };
static const struct {
    const char *name;
    int n_dims;
    uint64_t ne[3];
} source_tensors[N_SOURCE] = {
    {"output_norm.weight", 1, {COLUMNS, 1, 1}},          {"blk.0.ffn_gate_inp.weight", 2, {COLUMNS, 2, 1}},
    {"blk.0.attn_q.weight", 2, {96, ROWS, 1}},           {"blk.0.attn_k.weight", 2, {COLUMNS, ROWS, 1}},
    {"blk.0.ffn_up_exps.weight", 3, {COLUMNS, ROWS, 2}}, {"token_embd.weight", 2, {COLUMNS, ROWS, 1}},
};
static float source_floats[N_SOURCE][2 * ROWS * COLUMNS];

static uint64_t source_count(int i)
{
    return source_tensors[i].ne[0] * source_tensors[i].ne[1] * source_tensors[i].ne[2];
}

static void make_source(struct raw *r)
{
    uint64_t off = 0;

    seed = 11;
    r->n = 0;
    raw_put(r, "GGUF", 4);
    raw_u32(r, 3);
    raw_u64(r, N_SOURCE);
    raw_u64(r, 6);
    raw_text(r, "general.architecture"), raw_u32(r, GGUF_STRING), raw_text(r, "llama");
    raw_text(r, "llama.block_count"), raw_u32(r, GGUF_U32), raw_u32(r, 1);
    raw_text(r, "llama.expert_count"), raw_u32(r, GGUF_U32), raw_u32(r, 2);
    raw_text(r, "general.file_type"), raw_u32(r, GGUF_U32), raw_u32(r, 0);
    raw_text(r, "quantize.imatrix.file"), raw_u32(r, GGUF_STRING), raw_text(r, "of an earlier run");
    raw_text(r, "tags"), raw_u32(r, GGUF_ARRAY), raw_u32(r, GGUF_STRING), raw_u64(r, 2), raw_text(r, "a"),
        raw_text(r, "");
    for (int i = 0; i < N_SOURCE; i++) {
        raw_text(r, source_tensors[i].name);
        raw_u32(r, (uint32_t)source_tensors[i].n_dims);
        for (int d = 0; d < source_tensors[i].n_dims; d++)
            raw_u64(r, source_tensors[i].ne[d]);
        raw_u32(r, QUANT_F32);
        raw_u64(r, off);
        off += source_count(i) * 4; /* all multiples of 32 */
    }
    while (r->n % 32)
        raw_put(r, "", 1);
    for (int i = 0; i < N_SOURCE; i++) {
        for (uint64_t k = 0; k < source_count(i); k++)
            source_floats[i][k] = next_float();
        if (source_tensors[i].n_dims == 3)
            memcpy(source_floats[i] + ROWS * COLUMNS, source_floats[i], ROWS * COLUMNS * 4);
        raw_put(r, source_floats[i], source_count(i) * 4);
    }
}

/* ---- importance of the source: of attn_k, and of each expert of the stack ---- */

static float importance[3][COLUMNS]; /* attn_k, expert 0, expert 1 */

static void make_importance(void)
{
    seed = 5;
    for (int k = 0; k < COLUMNS; k++) {
        importance[0][k] = (float)(1 + k % 7); /* whole numbers, so that sums and quotients are exact */
        importance[1][k] = k % 2 ? 64.0f : 1.0f;
        importance[2][k] = k % 2 ? 1.0f : 64.0f;
    }
}

static void put_dat_entry(struct raw *r, const char *name, int calls, const float *values, int n)
{
    raw_u32(r, (uint32_t)strlen(name));
    raw_put(r, name, strlen(name));
    raw_u32(r, (uint32_t)calls);
    raw_u32(r, (uint32_t)n);
    for (int k = 0; k < n; k++) {
        float v = values[k] * (float)calls;
        raw_put(r, &v, 4);
    }
}

static void make_dat(struct raw *r)
{
    make_importance();
    r->n = 0;
    raw_u32(r, 2);
    put_dat_entry(r, "blk.0.attn_k.weight", 4, importance[0], COLUMNS);
    put_dat_entry(r, "blk.0.ffn_up_exps.weight", 2, importance[1], 2 * COLUMNS);
    raw_u32(r, 9);
    raw_u32(r, 5);
    raw_put(r, "a.txt", 5);
}

static void put_tensor_2d(struct raw *r, const char *name, uint64_t ne0, uint64_t ne1, uint64_t off)
{
    raw_text(r, name);
    raw_u32(r, 2);
    raw_u64(r, ne0);
    raw_u64(r, ne1);
    raw_u32(r, QUANT_F32);
    raw_u64(r, off);
}

static void put_scaled(struct raw *r, const float *values, float by, int n)
{
    for (int k = 0; k < n; k++) {
        float v = values[k] * by;
        raw_put(r, &v, 4);
    }
}

static void put_padded(struct raw *r, const float *values, int n)
{
    raw_put(r, values, (size_t)n * 4);
    while (r->n % 32)
        raw_put(r, "", 1);
}

static void make_gguf_imatrix(struct raw *r, float last_count)
{
    const float four = 4, counts[2] = {2, last_count};

    make_importance();
    r->n = 0;
    raw_put(r, "GGUF", 4);
    raw_u32(r, 3);
    raw_u64(r, 4);
    raw_u64(r, 2);
    raw_text(r, "imatrix.chunk_count"), raw_u32(r, GGUF_U32), raw_u32(r, 9);
    raw_text(r, "imatrix.datasets"), raw_u32(r, GGUF_ARRAY), raw_u32(r, GGUF_STRING), raw_u64(r, 1),
        raw_text(r, "a.txt");
    put_tensor_2d(r, "blk.0.attn_k.weight.in_sum2", COLUMNS, 1, 0);
    put_tensor_2d(r, "blk.0.attn_k.weight.counts", 1, 1, 1024);
    put_tensor_2d(r, "blk.0.ffn_up_exps.weight.in_sum2", COLUMNS, 2, 1056);
    put_tensor_2d(r, "blk.0.ffn_up_exps.weight.counts", 1, 2, 1056 + 2048);
    while (r->n % 32)
        raw_put(r, "", 1);
    put_scaled(r, importance[0], 4, COLUMNS);
    put_padded(r, &four, 1);
    put_scaled(r, importance[1], 2, COLUMNS);
    put_scaled(r, importance[2], last_count, COLUMNS);
    put_padded(r, counts, 2);
}

/* ---- runs ---- */

struct bed {
    struct raw model, imatrix;
    struct memfiles in;
    struct file_ops in_ops;
    struct memouts out;
    struct out_ops out_ops;
};

static struct bed bed;

static void setup(void)
{
    memset(&bed, 0, sizeof bed);
    make_source(&bed.model);
    make_gguf_imatrix(&bed.imatrix, 3);
    memfile_add(&bed.in, "m.gguf", bed.model.p, bed.model.n);
    memfile_add(&bed.in, "im.gguf", bed.imatrix.p, bed.imatrix.n);
    bed.in_ops = memfile_ops(&bed.in);
    bed.out_ops = memout_ops(&bed.out);
}

static void teardown(void)
{
    memout_done(&bed.out);
}

static void on_pool(void *pool, void (*fn)(int worker, void *arg), void *arg)
{
    pool_run(pool, fn, arg);
}

struct wish {
    const char *type, *imatrix;
    bool pure;
    uint64_t part_bytes;
    struct pool *pool;
    bool (*progress)(void *arg, uint64_t done, uint64_t total);
};

/* All that a front end does: open, choose, run. */
static int do_it(const struct wish *wish)
{
    struct gguf *g = NULL;
    struct imatrix *im = NULL;
    struct quantize *q = NULL;
    int rc = gguf_open("m.gguf", &bed.in_ops, &g);

    if (!rc && wish->imatrix)
        rc = imatrix_open(wish->imatrix, &bed.in_ops, &im);
    if (!rc) {
        struct quantize_args args = {.gguf = g,
                                     .in_ops = &bed.in_ops,
                                     .recipe = recipe_find(wish->type),
                                     .pure = wish->pure,
                                     .imatrix = im,
                                     .imatrix_path = wish->imatrix,
                                     .part_bytes = wish->part_bytes};
        rc = quantize_make(&args, &q);
    }
    if (!rc) {
        struct quantize_run run = {.path = "q.gguf",
                                   .out_ops = &bed.out_ops,
                                   .n_threads = wish->pool ? pool_n_threads(wish->pool) : 1,
                                   .team = wish->pool ? on_pool : NULL,
                                   .team_arg = wish->pool,
                                   .progress = wish->progress};
        rc = quantize_run(q, &run);
    }
    quantize_free(q);
    imatrix_close(im);
    gguf_close(g);
    return rc;
}

static void must_do(const struct wish *wish)
{
    int rc = do_it(wish);
    ck_assert_msg(!rc, "%s: %s", wish->type, err_text());
    ck_assert_int_eq(bed.out.n_open, 0);
}

/* The result, read back by the checked reader. */
static struct gguf *read_back(struct memfiles *files, struct file_ops *ops)
{
    struct gguf *g;

    memset(files, 0, sizeof *files);
    for (int i = 0; i < bed.out.n_files; i++)
        memfile_add(files, bed.out.files[i].path, bed.out.files[i].data, bed.out.files[i].bytes);
    *ops = memfile_ops(files);
    int rc = gguf_open(bed.out.files[0].path, ops, &g);
    ck_assert_msg(!rc, "the result: %s", err_text());
    return g;
}

static const unsigned char *bytes_of(const struct gguf *g, const char *name, const struct gguf_tensor **t)
{
    *t = gguf_find_tensor(g, name);
    ck_assert_msg(*t != NULL, "no tensor %s", name);
    return bed.out.files[(*t)->file].data + (*t)->off;
}

/* ---- what becomes of keys and tensors ---- */

START_TEST(metadata_is_lost_or_stale)
{
    struct memfiles files;
    struct file_ops ops;
    struct gguf_array tags;
    struct gguf_str s;
    uint64_t u;

    must_do(&(struct wish){.type = "Q4_0", .imatrix = "im.gguf"});
    struct gguf *g = read_back(&files, &ops);
    ck_assert(!gguf_u64(g, "general.file_type", &u) && u == 2); /* llama.h: MOSTLY_Q4_0 */
    ck_assert(!gguf_u64(g, "general.quantization_version", &u) && u == 2);
    ck_assert(!gguf_u64(g, "llama.expert_count", &u) && u == 2);
    ck_assert(!gguf_str(g, "quantize.imatrix.file", &s) && !strcmp(s.p, "im.gguf"));
    ck_assert(!gguf_str(g, "quantize.imatrix.dataset", &s) && !strcmp(s.p, "a.txt"));
    ck_assert(!gguf_u64(g, "quantize.imatrix.entries_count", &u) && u == 2);
    ck_assert(!gguf_u64(g, "quantize.imatrix.chunks_count", &u) && u == 9);
    ck_assert(!gguf_array(g, "tags", GGUF_WANT_STRING, &tags) && tags.n == 2);
    ck_assert_uint_eq(gguf_at_str(&tags, 0).n_bytes, 1);
    ck_assert_uint_eq(gguf_at_str(&tags, 1).n_bytes, 0);
    gguf_close(g);
}
END_TEST

START_TEST(stale_importance_is_claimed)
{
    struct memfiles files;
    struct file_ops ops;

    must_do(&(struct wish){.type = "Q4_0"});
    struct gguf *g = read_back(&files, &ops);
    ck_assert_ptr_null(gguf_find(g, "quantize.imatrix.file"));
    gguf_close(g);
}
END_TEST

START_TEST(norm_or_router_is_quantized)
{
    struct memfiles files;
    struct file_ops ops;
    const struct gguf_tensor *t;

    must_do(&(struct wish){.type = "Q2_K"});
    struct gguf *g = read_back(&files, &ops);
    for (int i = 0; i < 2; i++) {
        const unsigned char *p = bytes_of(g, source_tensors[i].name, &t);
        ck_assert_int_eq(t->type, QUANT_F32);
        ck_assert(!memcmp(p, source_floats[i], t->bytes));
    }
    gguf_close(g);
}
END_TEST

START_TEST(row_that_does_not_fit_is_not_given_smaller_blocks)
{
    static const struct {
        const char *type;
        enum quant_type odd, even; /* of rows of 96 and of 256 */
    } rows[] = {
        {"Q2_K_S", QUANT_Q4_0, QUANT_Q2_K}, {"Q3_K_S", QUANT_Q4_0, QUANT_Q3_K}, {"Q4_K_S", QUANT_Q5_0, QUANT_Q4_K},
        {"Q5_K_S", QUANT_Q5_1, QUANT_Q5_K}, {"Q6_K", QUANT_Q8_0, QUANT_Q6_K},   {"IQ4_XS", QUANT_IQ4_NL, QUANT_IQ4_XS},
        {"Q8_0", QUANT_Q8_0, QUANT_Q8_0},   {"F16", QUANT_F16, QUANT_F16},
    };
    struct memfiles files;
    struct file_ops ops;
    const struct gguf_tensor *t;

    must_do(&(struct wish){.type = rows[_i].type});
    struct gguf *g = read_back(&files, &ops);
    bytes_of(g, "blk.0.attn_q.weight", &t);
    ck_assert_int_eq(t->type, rows[_i].odd);
    bytes_of(g, "blk.0.attn_k.weight", &t);
    ck_assert_int_eq(t->type, rows[_i].even);
    gguf_close(g);
}
END_TEST

/* Without importance the bytes are those of quant/, which t_quant holds against the package. */
START_TEST(block_is_not_what_quant_makes_of_it)
{
    struct memfiles files;
    struct file_ops ops;
    const struct gguf_tensor *t;
    static const char *const types[] = {"Q4_0",   "Q4_1", "Q5_0",   "Q5_1",   "Q8_0",  "Q2_K", "Q3_K_S",
                                        "Q4_K_S", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "F16",  "BF16"};
    const struct recipe *recipe = recipe_find(types[_i]);
    unsigned char want[2 * ROWS * COLUMNS * 4];

    must_do(&(struct wish){.type = types[_i], .pure = true});
    struct gguf *g = read_back(&files, &ops);
    for (int i = 3; i < N_SOURCE; i++) {
        const unsigned char *p = bytes_of(g, source_tensors[i].name, &t);
        ck_assert_int_eq(t->type, recipe->type);
        ck_assert_uint_eq(t->bytes, quant_row_bytes(recipe->type, (int64_t)source_count(i)));
        quant_info((int)recipe->type)->from_float(source_floats[i], want, (int64_t)source_count(i));
        ck_assert(!memcmp(p, want, t->bytes));
    }
    gguf_close(g);
}
END_TEST

/* The two experts are alike: only their importance tells them apart. */
START_TEST(expert_gets_the_importance_of_another)
{
    struct memfiles files;
    struct file_ops ops;
    const struct gguf_tensor *t;
    unsigned char want[ROWS * COLUMNS];
    static const char *const types[] = {"Q4_0", "Q5_1", "Q2_K", "Q3_K_S", "Q4_K_S", "IQ4_XS", "MXFP4"};
    const struct recipe *recipe = recipe_find(types[_i]);
    const struct quant_info *info = quant_info((int)recipe->type);
    size_t n = quant_row_bytes(recipe->type, COLUMNS);

    must_do(&(struct wish){.type = types[_i], .pure = true, .imatrix = "im.gguf"});
    struct gguf *g = read_back(&files, &ops);
    const unsigned char *p = bytes_of(g, "blk.0.ffn_up_exps.weight", &t);
    for (int expert = 0; expert < 2; expert++)
        for (int row = 0; row < ROWS; row++, p += n) {
            info->fit(source_floats[4] + row * COLUMNS, importance[1 + expert], want, COLUMNS);
            ck_assert_msg(!memcmp(p, want, n), "%s: expert %d row %d", types[_i], expert, row);
        }
    p = bytes_of(g, "blk.0.ffn_up_exps.weight", &t);
    ck_assert(memcmp(p, p + ROWS * n, ROWS * n) != 0);
    gguf_close(g);
}
END_TEST

/* An expert that no token came to has counts of 0: all its columns count alike. */
START_TEST(unseen_expert_is_spoilt)
{
    struct memfiles files;
    struct file_ops ops;
    const struct gguf_tensor *t;
    unsigned char want[ROWS * COLUMNS];
    size_t n = quant_row_bytes(QUANT_Q4_K, COLUMNS);

    make_gguf_imatrix(&bed.imatrix, 0);
    must_do(&(struct wish){.type = "Q4_K_S", .pure = true, .imatrix = "im.gguf"});
    struct gguf *g = read_back(&files, &ops);
    const unsigned char *p = bytes_of(g, "blk.0.ffn_up_exps.weight", &t);
    quant_info(QUANT_Q4_K)->from_float(source_floats[4], want, ROWS * COLUMNS);
    ck_assert(!memcmp(p + ROWS * n, want, ROWS * n));
    gguf_close(g);
}
END_TEST

START_TEST(threads_change_bytes)
{
    struct pool *pool;
    struct memouts first;

    must_do(&(struct wish){.type = "Q4_K_M", .imatrix = "im.gguf"});
    first = bed.out;
    memset(&bed.out, 0, sizeof bed.out);
    bed.out_ops = memout_ops(&bed.out);
    bed.out.max_write_bytes = 100; /* short writes are resumed */
    ck_assert_int_eq(pool_open(3, false, &pool), 0);
    must_do(&(struct wish){.type = "Q4_K_M", .imatrix = "im.gguf", .pool = pool});
    pool_close(pool);
    ck_assert_uint_eq(first.files[0].bytes, bed.out.files[0].bytes);
    ck_assert(!memcmp(first.files[0].data, bed.out.files[0].data, first.files[0].bytes));
    memout_done(&first);
}
END_TEST

/* ---- parts ---- */

START_TEST(parts_are_not_the_whole)
{
    struct memfiles files;
    struct file_ops ops;
    struct memouts whole;
    const struct gguf_tensor *a, *b;
    uint64_t u;

    must_do(&(struct wish){.type = "Q8_0"});
    whole = bed.out;
    memset(&bed.out, 0, sizeof bed.out);
    bed.out_ops = memout_ops(&bed.out);
    must_do(&(struct wish){.type = "Q8_0", .part_bytes = 3000});
    ck_assert_int_gt(bed.out.n_files, 1);
    struct gguf *g = read_back(&files, &ops);
    ck_assert_int_eq(gguf_n_parts(g), bed.out.n_files);
    ck_assert(!gguf_u64(g, "split.tensors.count", &u) && u == N_SOURCE);
    for (int i = 0; i < bed.out.n_files; i++) {
        char name[64];
        snprintf(name, sizeof name, "q-%05d-of-%05d.gguf", i + 1, bed.out.n_files);
        ck_assert_str_eq(bed.out.files[i].path, name);
        ck_assert_uint_le(bed.out.files[i].bytes, 3000);
    }
    struct memouts parts = bed.out;
    for (int i = 0; i < N_SOURCE; i++) {
        bed.out = parts;
        const unsigned char *p = bytes_of(g, source_tensors[i].name, &a);
        struct memfiles one = {0};
        memfile_add(&one, "w.gguf", whole.files[0].data, whole.files[0].bytes);
        struct file_ops one_ops = memfile_ops(&one);
        struct gguf *w;
        ck_assert_int_eq(gguf_open("w.gguf", &one_ops, &w), 0);
        bed.out = whole;
        ck_assert(!memcmp(p, bytes_of(w, source_tensors[i].name, &b), a->bytes));
        gguf_close(w);
    }
    bed.out = parts;
    gguf_close(g);
    memout_done(&whole);
}
END_TEST

START_TEST(split_source_is_read_in_part)
{
    struct memfiles files;
    struct file_ops ops;
    const struct gguf_tensor *t;

    must_do(&(struct wish){.type = "F32", .part_bytes = 4000});
    struct gguf *parts = read_back(&files, &ops);
    ck_assert_int_gt(gguf_n_parts(parts), 1);
    struct quantize_args args = {.gguf = parts, .in_ops = &ops, .recipe = recipe_find("F32")};
    struct quantize *q;
    struct memouts out = {0};
    struct out_ops out_ops = memout_ops(&out);
    struct quantize_run run = {.path = "w.gguf", .out_ops = &out_ops, .n_threads = 1};
    ck_assert_int_eq(quantize_make(&args, &q), 0);
    ck_assert_int_eq(quantize_run(q, &run), 0);
    quantize_free(q);
    gguf_close(parts);
    memout_done(&bed.out);
    bed.out = out;
    struct gguf *g = read_back(&files, &ops);
    ck_assert_int_eq(gguf_n_parts(g), 1);
    ck_assert_ptr_null(gguf_find(g, "split.count"));
    for (int i = 0; i < N_SOURCE; i++) {
        const unsigned char *p = bytes_of(g, source_tensors[i].name, &t);
        ck_assert(!memcmp(p, source_floats[i], source_count(i) * 4));
    }
    gguf_close(g);
}
END_TEST

/* ---- failures ---- */

static void must_have_nothing(uint64_t before, const char *what, uint64_t n)
{
    ck_assert_msg(memout_n_named(&bed.out) == 0, "%s %" PRIu64 ": a file has a name", what, n);
    ck_assert_msg(bed.out.n_open == 0 && bed.in.n_open == 0, "%s %" PRIu64 ": a file is open", what, n);
    ck_assert_msg(live_bytes() == before, "%s %" PRIu64 ": %" PRIu64 " bytes left", what, n, live_bytes() - before);
    ck_assert(err_text()[0]);
    memout_done(&bed.out);
    memset(&bed.out, 0, sizeof bed.out);
    bed.out_ops = memout_ops(&bed.out);
}

static const struct wish hard = {.type = "Q4_K_M", .imatrix = "im.gguf", .part_bytes = 3000};

START_TEST(failed_write_leaves_something)
{
    uint64_t before = live_bytes(), n;
    int rc = ERR_IO;

    for (n = 1; rc; n++) {
        bed.out.fail_at = n;
        rc = do_it(&hard);
        if (rc) {
            ck_assert_int_eq(rc, ERR_IO);
            ck_assert_ptr_nonnull(strstr(err_text(), "No space left"));
            must_have_nothing(before, "write", n);
        }
    }
    ck_assert_uint_gt(n, 12); /* some of create, resize, write, sync and publish for at least two parts */
    ck_assert_int_gt(memout_n_named(&bed.out), 1);
}
END_TEST

START_TEST(failed_read_leaves_something)
{
    uint64_t before = live_bytes(), n;
    int rc = ERR_IO;

    for (n = 1; rc; n++) {
        bed.in.n_calls = 0;
        bed.in.fail_at = n;
        rc = do_it(&hard);
        /* one question is whether the target is the input: a file that cannot be opened there is none */
        if (rc) {
            ck_assert_int_eq(rc, ERR_IO);
            must_have_nothing(before, "read", n);
        }
    }
    ck_assert_uint_gt(n, 12); /* three opens alone are six */
}
END_TEST

START_TEST(failed_allocation_leaves_something)
{
    uint64_t before = live_bytes(), n;
    int rc = ERR_NOMEM;

    mem_fail_nth(0);
    ck_assert_int_eq(do_it(&hard), 0);
    uint64_t n_calls = mem_n_calls();
    memout_done(&bed.out);
    memset(&bed.out, 0, sizeof bed.out);
    bed.out_ops = memout_ops(&bed.out);
    for (n = 1; n <= n_calls; n++) {
        mem_fail_nth(n);
        rc = do_it(&hard);
        mem_fail_nth(0);
        if (!rc) { /* the look at what is in the target's place alone does without */
            memout_done(&bed.out);
            memset(&bed.out, 0, sizeof bed.out);
            bed.out_ops = memout_ops(&bed.out);
            continue;
        }
        ck_assert_msg(rc == ERR_NOMEM, "allocation %" PRIu64 ": %s", n, err_text());
        must_have_nothing(before, "allocation", n);
    }
}
END_TEST

START_TEST(input_changed_meanwhile_is_not_noticed)
{
    uint64_t before = live_bytes();

    ck_assert_int_eq(do_it(&(struct wish){.type = "Q8_0"}), 0);
    uint64_t n_calls = bed.in.n_calls;
    memout_done(&bed.out);
    memset(&bed.out, 0, sizeof bed.out);
    bed.out_ops = memout_ops(&bed.out);
    bed.in.n_calls = 0;
    bed.in.changes_at = n_calls; /* the last look at it */
    ck_assert_int_eq(do_it(&(struct wish){.type = "Q8_0"}), ERR_STATE);
    must_have_nothing(before, "change", 0);
}
END_TEST

static bool stop_at_once(void *arg, uint64_t done, uint64_t total)
{
    (void)arg;
    ck_assert_uint_gt(done, 0);
    ck_assert_uint_le(done, total);
    return false;
}

START_TEST(stopped_run_leaves_something)
{
    uint64_t before = live_bytes();

    ck_assert_int_eq(do_it(&(struct wish){.type = "Q8_0", .progress = stop_at_once}), ERR_CANCEL);
    must_have_nothing(before, "stop", 0);
}
END_TEST

static void spoil(int tensor, float v)
{
    size_t at = bed.model.n;

    for (int i = N_SOURCE - 1; i >= tensor; i--)
        at -= source_count(i) * 4;
    memcpy(bed.model.p + at + 40, &v, 4);
}

START_TEST(nan_and_overflow_become_weights)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY, 1e6f};

    spoil(3, bad[_i]);
    int rc = do_it(&(struct wish){.type = "F16"});
    ck_assert_int_eq(rc, bad[_i] == 1e6f ? ERR_LIMIT : ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "blk.0.attn_k.weight"));
    ck_assert_int_eq(memout_n_named(&bed.out), 0);
}
END_TEST

/* ---- importance matrices ---- */

static int open_bytes(const void *p, size_t n, struct imatrix **im)
{
    static struct memfiles files; /* a view of the result */
    static struct file_ops ops;

    files = (struct memfiles){0};
    memfile_add(&files, "i", p, n);
    ops = memfile_ops(&files);
    return imatrix_open("i", &ops, im);
}

START_TEST(dat_and_gguf_differ)
{
    struct imatrix *im;
    float got[COLUMNS];
    bool is_known;

    if (_i == 0)
        make_dat(&bed.imatrix);
    int rc = open_bytes(bed.imatrix.p, bed.imatrix.n, &im);
    ck_assert_msg(!rc, "%s", err_text());
    ck_assert_int_eq(imatrix_n_entries(im), 2);
    ck_assert_uint_eq(imatrix_n_chunks(im), 9);
    ck_assert_str_eq(imatrix_dataset(im), "a.txt");
    ck_assert_ptr_null(imatrix_find(im, "blk.0.attn_q.weight"));
    const struct imatrix_entry *k = imatrix_find(im, "blk.0.attn_k.weight");
    const struct imatrix_entry *up = imatrix_find(im, "blk.0.ffn_up_exps.weight");
    ck_assert(k && up);
    ck_assert_uint_eq(imatrix_n_values(k), COLUMNS);
    ck_assert_uint_eq(imatrix_n_values(up), 2 * COLUMNS);
    ck_assert(!imatrix_read(im, k, 0, COLUMNS, got, &is_known) && is_known);
    ck_assert(!memcmp(got, importance[0], sizeof got));
    for (uint64_t expert = 0; expert < 2; expert++) {
        ck_assert(!imatrix_read(im, up, expert, COLUMNS, got, &is_known) && is_known);
        ck_assert(!memcmp(got, importance[1 + expert], sizeof got));
    }
    imatrix_close(im);
}
END_TEST

START_TEST(dat_cut_anywhere_is_taken)
{
    struct raw whole;
    struct imatrix *im;
    uint64_t before = live_bytes();

    make_dat(&whole);
    for (size_t n = 0; n < whole.n; n++) {
        unsigned char *cut = malloc(n + !n);
        memcpy(cut, whole.p, n);
        int rc = open_bytes(cut, n, &im);
        if (n == whole.n - 13 || n == whole.n - 9) /* early files end before the chunks, or before the data set */
            imatrix_close(im);
        else
            ck_assert_msg(rc == ERR_FORMAT && err_text()[0], "cut to %zu: %d", n, rc);
        ck_assert_uint_eq(live_bytes(), before);
        free(cut);
    }
}
END_TEST

/* One number of the .dat changed: where, to what, what the message says. */
static const struct {
    size_t off;
    uint32_t v;
    const char *says;
} lies[] = {
    {0, 0, "0 entries"},
    {0, 0x7fffffff, "2147483647 entries"},
    {0, 0xffffffff, "-1 entries"},
    {4, 0xffffffff, "a name of -1 bytes"},
    {4, 0x7fffffff, "a name of 2147483647 bytes"},
    {8, 0, "zero byte"},
    {31, 0, "has 0 values"},
    {31, 0x40000000, "has 1073741824 values"},
    {31, 0x80000000, "has -2147483648 values"},
    {35, 0x7fc00000, "nan"},
    {35, 0x7f800000, "inf"},
    {35, 0xbf800000, "-1"},
};

START_TEST(lie_in_a_dat_is_believed)
{
    struct raw r;
    struct imatrix *im;
    uint64_t before = live_bytes();

    make_dat(&r);
    memcpy(r.p + lies[_i].off, &lies[_i].v, 4);
    ck_assert_int_eq(open_bytes(r.p, r.n, &im), ERR_FORMAT);
    ck_assert_msg(strstr(err_text(), lies[_i].says) != NULL, "no \"%s\" in: %s", lies[_i].says, err_text());
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

START_TEST(entry_twice_is_taken)
{
    struct raw r = {.n = 0};
    struct imatrix *im;
    const float one = 1;

    raw_u32(&r, 2);
    put_dat_entry(&r, "a", 1, &one, 1);
    put_dat_entry(&r, "a", 1, &one, 1);
    ck_assert_int_eq(open_bytes(r.p, r.n, &im), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "\"a\" is there twice"));
}
END_TEST

START_TEST(model_is_taken_for_an_importance_matrix)
{
    struct imatrix *im;

    ck_assert_int_eq(open_bytes(bed.model.p, bed.model.n, &im), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "in_sum2"));
}
END_TEST

START_TEST(importance_of_another_shape_is_used)
{
    struct raw r = {.n = 0};
    const float few[8] = {1, 1, 1, 1, 1, 1, 1, 1};

    raw_u32(&r, 1);
    put_dat_entry(&r, "blk.0.attn_k.weight", 1, few, 8);
    memfile_add(&bed.in, "other.dat", r.p, r.n);
    ck_assert_int_eq(do_it(&(struct wish){.type = "Q4_0", .imatrix = "other.dat"}), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "has 8 values, the tensor 256"));
}
END_TEST

/* ---- the writer ---- */

START_TEST(impossible_tensor_is_written)
{
    struct gguf_write *w;
    const int64_t good[] = {256, 2}, odd[] = {255, 2}, none[] = {0, 2}, huge[] = {INT64_MAX / 256 * 256, INT64_MAX};
    char name[80];

    memset(name, 'x', 64);
    name[64] = '\0';
    ck_assert_int_eq(gguf_write_make(&w), 0);
    ck_assert_int_eq(gguf_write_tensor(w, "a", QUANT_Q4_K, 2, odd), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, "a", QUANT_Q4_K, 2, none), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, "a", QUANT_Q4_K, 2, huge), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, "a", QUANT_Q4_K, 5, good), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, "a", (enum quant_type)4, 2, good), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, "", QUANT_Q4_K, 2, good), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, name, QUANT_Q4_K, 2, good), ERR_ARG);
    ck_assert_int_eq(gguf_write_tensor(w, name + 1, QUANT_Q4_K, 2, good), 0);
    ck_assert_int_eq(gguf_write_tensor(w, name + 1, QUANT_Q4_K, 2, good), 0);
    ck_assert_int_eq(gguf_write_layout(w, 0), ERR_ARG); /* there twice */
    gguf_write_free(w);
}
END_TEST

/* ---- files of the system ---- */

static const char folder_pattern[] = TEST_BUILD_DIR "/t_quantize-XXXXXX";
static char folder[sizeof folder_pattern];

static int n_entries(void)
{
    DIR *dir = opendir(folder);
    int n = -2; /* . and .. */

    ck_assert_ptr_nonnull(dir);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void make_folder(void)
{
    setup();
    memcpy(folder, folder_pattern, sizeof folder); /* anew: without forks all tests see one */
    ck_assert_ptr_nonnull(mkdtemp(folder));
}

static void remove_folder(void)
{
    char line[512];

    teardown();
    snprintf(line, sizeof line, "rm -rf '%s'", folder);
    ck_assert_int_eq(system(line), 0);
}

static void path_in_folder(char *path, size_t room)
{
    snprintf(path, room, "%s/o.gguf", folder);
}

static void must_hold(const char *path, const char *text)
{
    char got[32] = "";
    FILE *f = fopen(path, "rb");

    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fread(got, 1, sizeof got - 1, f), strlen(text));
    fclose(f);
    ck_assert_str_eq(got, text);
}

START_TEST(old_file_is_gone_before_the_new_one_is_whole)
{
    struct out *o;
    char path[256];

    path_in_folder(path, sizeof path);
    for (int round = 0; round < 3; round++) { /* nothing there; replaced; given up */
        ck_assert_int_eq(out_open(path, 3, NULL, &o), 0);
        ck_assert_int_eq(out_write(o, 0, round ? "new" : "old", 3), 0);
        if (round)
            must_hold(path, round == 1 ? "old" : "new");
        ck_assert_int_eq(out_sync(o), 0);
        if (round < 2)
            ck_assert_int_eq(out_publish(o), 0);
        out_close(o);
        must_hold(path, round ? "new" : "old");
        ck_assert_int_eq(n_entries(), 1);
    }
    struct stat st;
    mode_t mask = umask(0);
    umask(mask);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0666 & ~mask);
}
END_TEST

/* Where the file system has nameless files, which a killed process takes along. */
START_TEST(killed_process_leaves_a_file)
{
    char path[256];
    int ready[2], status;
    int fd = open(folder, O_TMPFILE | O_RDWR, 0600);

    if (fd < 0)
        return;
    close(fd);
    path_in_folder(path, sizeof path);
    ck_assert_int_eq(pipe(ready), 0);
    pid_t pid = fork();
    if (!pid) {
        struct out *o;
        char byte = out_open(path, 1 << 20, NULL, &o) || out_write(o, 0, "half", 4) ? 'n' : 'y';
        if (write(ready[1], &byte, 1) == 1)
            pause();
        _exit(1);
    }
    char byte;
    ck_assert_int_eq(read(ready[0], &byte, 1), 1);
    ck_assert_int_eq(byte, 'y');
    kill(pid, SIGKILL);
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    close(ready[0]);
    close(ready[1]);
    ck_assert_int_eq(n_entries(), 0);
}
END_TEST

START_TEST(target_that_cannot_be_is_found_out_late)
{
    struct out *o;
    char path[256];

    snprintf(path, sizeof path, "%s/no/o.gguf", folder);
    ck_assert_int_eq(out_open(path, 3, NULL, &o), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "No such file"));
    ck_assert_int_eq(out_open(folder, 3, NULL, &o), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "directory"));
    ck_assert_int_eq(out_open("/dev/null", 3, NULL, &o), ERR_IO);
    ck_assert_int_eq(n_entries(), 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("quantize");
    TCase *t = tcase_create("files"), *im = tcase_create("imatrix"), *sys = tcase_create("system");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, metadata_is_lost_or_stale);
    tcase_add_test(t, stale_importance_is_claimed);
    tcase_add_test(t, norm_or_router_is_quantized);
    tcase_add_loop_test(t, row_that_does_not_fit_is_not_given_smaller_blocks, 0, 8);
    tcase_add_loop_test(t, block_is_not_what_quant_makes_of_it, 0, 14);
    tcase_add_loop_test(t, expert_gets_the_importance_of_another, 0, 7);
    tcase_add_test(t, unseen_expert_is_spoilt);
    tcase_add_test(t, threads_change_bytes);
    tcase_add_test(t, parts_are_not_the_whole);
    tcase_add_test(t, split_source_is_read_in_part);
    tcase_add_test(t, failed_write_leaves_something);
    tcase_add_test(t, failed_read_leaves_something);
    tcase_add_test(t, failed_allocation_leaves_something);
    tcase_add_test(t, input_changed_meanwhile_is_not_noticed);
    tcase_add_test(t, stopped_run_leaves_something);
    tcase_add_loop_test(t, nan_and_overflow_become_weights, 0, 4);
    tcase_add_test(t, impossible_tensor_is_written);
    tcase_add_checked_fixture(im, setup, teardown);
    tcase_add_loop_test(im, dat_and_gguf_differ, 0, 2);
    tcase_add_test(im, dat_cut_anywhere_is_taken);
    tcase_add_loop_test(im, lie_in_a_dat_is_believed, 0, (int)(sizeof lies / sizeof *lies));
    tcase_add_test(im, entry_twice_is_taken);
    tcase_add_test(im, model_is_taken_for_an_importance_matrix);
    tcase_add_test(im, importance_of_another_shape_is_used);
    tcase_add_checked_fixture(sys, make_folder, remove_folder);
    tcase_add_test(sys, old_file_is_gone_before_the_new_one_is_whole);
    tcase_add_test(sys, killed_process_leaves_a_file);
    tcase_add_test(sys, target_that_cannot_be_is_found_out_late);
    suite_add_tcase(s, t);
    suite_add_tcase(s, im);
    suite_add_tcase(s, sys);
    return run_suite(s);
}
