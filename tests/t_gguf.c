/* GGUF headers: what the `gguf` package wrote, split files, only the header read, failing reads and allocations. Hostile
 * files are t_gguf_hostile's. */
#include "src/base/err.h"
#include "tests/gguf_maker.h"
#include "tests/run_suite.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- good files ---- */

static const char types_path[] = TEST_DATA_DIR "/gguf/types.gguf";
static const char split_path[] = TEST_DATA_DIR "/gguf/split-00001-of-00002.gguf";

static bool is_str(struct gguf_str s, const char *want)
{
    return s.n_bytes == strlen(want) && memcmp(s.p, want, s.n_bytes) == 0;
}

/* Expected values: tests/gen/gguf_files.py. */
START_TEST(every_value_type_is_read)
{
    struct gguf *g;
    uint64_t u;
    int64_t i;
    double f;
    bool b;
    struct gguf_str s;

    ck_assert_int_eq(gguf_open(types_path, NULL, &g), 0);
    ck_assert_int_eq(gguf_version(g), 3);
    ck_assert_int_eq(gguf_u64(g, "t.u8", &u), 0);
    ck_assert_uint_eq(u, 200);
    ck_assert_int_eq(gguf_i64(g, "t.i8", &i), 0);
    ck_assert_int_eq(i, -100);
    ck_assert_int_eq(gguf_u64(g, "t.u16", &u), 0);
    ck_assert_uint_eq(u, 60000);
    ck_assert_int_eq(gguf_i64(g, "t.i16", &i), 0);
    ck_assert_int_eq(i, -30000);
    ck_assert_int_eq(gguf_i64(g, "t.u32", &i), 0);
    ck_assert_int_eq(i, 4000000000);
    ck_assert_int_eq(gguf_i64(g, "t.i32", &i), 0);
    ck_assert_int_eq(i, -2000000000);
    ck_assert_int_eq(gguf_u64(g, "t.u64", &u), 0);
    ck_assert_uint_eq(u, ((uint64_t)1 << 63) + 5);
    ck_assert_int_eq(gguf_i64(g, "t.i64", &i), 0);
    ck_assert_int_eq(i, -((int64_t)1 << 62));
    ck_assert_int_eq(gguf_f64(g, "t.f32", &f), 0);
    ck_assert_double_eq(f, (double)0.1f);
    ck_assert_int_eq(gguf_f64(g, "t.f64", &f), 0);
    ck_assert_double_eq(f, 0.1);
    ck_assert_int_eq(gguf_f64(g, "t.i16", &f), 0);
    ck_assert_double_eq(f, -30000);
    ck_assert_int_eq(gguf_f64(g, "t.u64", &f), 0);
    ck_assert_double_eq(f, 9223372036854775808.0); /* the nearest double */
    ck_assert_int_eq(gguf_bool(g, "t.yes", &b), 0);
    ck_assert(b);
    ck_assert_int_eq(gguf_bool(g, "t.no", &b), 0);
    ck_assert(!b);
    ck_assert_int_eq(gguf_str(g, "t.str", &s), 0);
    ck_assert_uint_eq(s.n_bytes, 7);
    ck_assert_str_eq(s.p, "gr\xc3\xbc\xc3\x9f"
                          "e"); /* a NUL behind it */
    gguf_close(g);
}
END_TEST

START_TEST(every_array_type_is_read)
{
    struct gguf *g;
    struct gguf_array a;

    ck_assert_int_eq(gguf_open(types_path, NULL, &g), 0);
    ck_assert_int_eq(gguf_array(g, "t.ints", GGUF_WANT_INT, &a), 0);
    ck_assert_uint_eq(a.n, 3);
    ck_assert_int_eq(gguf_at_i64(&a, 1), -2);
    ck_assert_int_eq(gguf_array(g, "t.ints", GGUF_WANT_FLOAT, &a), 0);
    ck_assert_double_eq(gguf_at_f64(&a, 1), -2);
    ck_assert_int_eq(gguf_array(g, "t.floats", GGUF_WANT_FLOAT, &a), 0);
    ck_assert_double_eq(gguf_at_f64(&a, 1), -1.5);
    ck_assert_int_eq(gguf_array(g, "t.bools", GGUF_WANT_BOOL, &a), 0);
    ck_assert(gguf_at_bool(&a, 0) && !gguf_at_bool(&a, 1) && gguf_at_bool(&a, 2));
    ck_assert_int_eq(gguf_array(g, "t.u64s", GGUF_WANT_INT, &a), 0);
    ck_assert_int_eq(gguf_at_i64(&a, 1), (int64_t)1 << 40);
    ck_assert_int_eq(gguf_array(g, "tokenizer.ggml.tokens", GGUF_WANT_STRING, &a), 0);
    ck_assert_uint_eq(a.n, 4);
    ck_assert(is_str(gguf_at_str(&a, 0), "<s>"));
    ck_assert(is_str(gguf_at_str(&a, 1), ""));
    ck_assert(is_str(gguf_at_str(&a, 2), "ab\xc3\xa9"));
    ck_assert(is_str(gguf_at_str(&a, 3), "d"));
    gguf_close(g);
}
END_TEST

START_TEST(keys_are_walked_in_the_order_of_the_file)
{
    struct gguf *g;

    ck_assert_int_eq(gguf_open(types_path, NULL, &g), 0);
    ck_assert_int_eq(gguf_n_keys(g), 22);
    ck_assert_str_eq(gguf_key(g, 0)->name, "general.architecture");
    ck_assert_str_eq(gguf_key(g, 2)->name, "t.u8");
    ck_assert_str_eq(gguf_type_name(gguf_key(g, 2)->type), "u8");
    ck_assert_int_eq(gguf_key(g, 15)->type, GGUF_ARRAY);
    ck_assert_int_eq(gguf_key(g, 15)->array.type, GGUF_I32);
    for (int i = 0; i < gguf_n_keys(g); i++)
        ck_assert_ptr_eq(gguf_find(g, gguf_key(g, i)->name), gguf_key(g, i));
    ck_assert_ptr_null(gguf_find(g, "t.u"));
    ck_assert_ptr_null(gguf_find(g, ""));
    gguf_close(g);
}
END_TEST

START_TEST(missing_key_is_told_from_wrong_type)
{
    struct gguf *g;
    uint64_t u = 7;
    int64_t i = 7;
    double f = 7;
    bool b = true;
    struct gguf_str s = {"default", 7};
    struct gguf_array a = {.n = 77};

    ck_assert_int_eq(gguf_open(types_path, NULL, &g), 0);
    ck_assert_int_eq(gguf_opt_u64(g, "no", &u) | gguf_opt_i64(g, "no", &i) | gguf_opt_f64(g, "no", &f), 0);
    ck_assert_int_eq(gguf_opt_bool(g, "no", &b) | gguf_opt_str(g, "no", &s), 0);
    ck_assert_int_eq(gguf_opt_array(g, "no", GGUF_WANT_INT, &a), 0);
    ck_assert_int_eq(gguf_u64(g, "no.key", &u), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "key \"no.key\" is missing"));
    ck_assert_ptr_nonnull(strstr(err_text(), types_path));
    ck_assert_int_eq(gguf_i64(g, "no", &i), ERR_FORMAT);
    ck_assert_int_eq(gguf_f64(g, "no", &f), ERR_FORMAT);
    ck_assert_int_eq(gguf_bool(g, "no", &b), ERR_FORMAT);
    ck_assert_int_eq(gguf_str(g, "no", &s), ERR_FORMAT);
    ck_assert_int_eq(gguf_array(g, "no", GGUF_WANT_INT, &a), ERR_FORMAT);
    ck_assert_int_eq(gguf_opt_u64(g, "t.i8", &u), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "key \"t.i8\" is -100"));
    ck_assert_int_eq(gguf_opt_i64(g, "t.u64", &i), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "key \"t.u64\" is 9223372036854775813"));
    ck_assert_int_eq(gguf_opt_u64(g, "t.f32", &u), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "key \"t.f32\" is of type f32, wanted is one integer"));
    ck_assert_int_eq(gguf_opt_f64(g, "t.str", &f), ERR_FORMAT);
    ck_assert_int_eq(gguf_opt_bool(g, "t.u8", &b), ERR_FORMAT);
    ck_assert_int_eq(gguf_opt_str(g, "t.ints", &s), ERR_FORMAT);
    ck_assert_int_eq(gguf_opt_array(g, "t.str", GGUF_WANT_STRING, &a), ERR_FORMAT);
    ck_assert_int_eq(gguf_opt_array(g, "t.floats", GGUF_WANT_INT, &a), ERR_FORMAT);
    ck_assert_ptr_nonnull(
        strstr(err_text(), "key \"t.floats\" is of type array of f32, wanted is an array of type integer"));
    ck_assert(u == 7 && i == 7 && f == 7 && b && s.n_bytes == 7 && a.n == 77);
    gguf_close(g);
}
END_TEST

START_TEST(tensors_lie_where_the_gguf_package_says)
{
    static const struct {
        const char *name;
        int type, n_dims;
        int64_t ne[4];
        uint64_t off, bytes;
    } want[] = {
        /* GGUFReader of the package: data_offset, n_bytes */
        {"a.weight", QUANT_F32, 2, {64, 3, 1, 1}, 960, 768},
        {"b.weight", QUANT_Q8_0, 2, {64, 3, 1, 1}, 1728, 204},
        {"c.bias", QUANT_F32, 1, {5, 1, 1, 1}, 1984, 20},
        {"d.weight", QUANT_F16, 3, {32, 3, 2, 1}, 2048, 384},
    };
    struct gguf *g;

    ck_assert_int_eq(gguf_open(types_path, NULL, &g), 0);
    ck_assert_int_eq(gguf_n_tensors(g), 4);
    for (int i = 0; i < 4; i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);
        ck_assert_str_eq(t->name, want[i].name);
        ck_assert_int_eq((int)t->type, want[i].type);
        ck_assert_int_eq(t->n_dims, want[i].n_dims);
        ck_assert_mem_eq(t->ne, want[i].ne, sizeof t->ne);
        ck_assert_uint_eq(t->off, want[i].off);
        ck_assert_uint_eq(t->bytes, want[i].bytes);
        ck_assert_int_eq(t->file, 0);
        ck_assert_ptr_eq(gguf_find_tensor(g, want[i].name), t);
    }
    ck_assert_ptr_null(gguf_find_tensor(g, "a"));
    ck_assert_uint_eq(gguf_part(g, 0)->align_bytes, 64);
    ck_assert_uint_eq(gguf_part(g, 0)->bytes, 2432);
    ck_assert_str_eq(gguf_part(g, 0)->path, types_path);
    gguf_close(g);
}
END_TEST

/* _i: which part is named. */
START_TEST(split_model_opens_by_any_of_its_parts)
{
    struct gguf *g;
    char path[sizeof split_path];
    struct gguf_str name;

    strcpy(path, split_path);
    *(strstr(path, "-00001-of") + 5) = (char)('1' + _i);
    ck_assert_msg(gguf_open(path, NULL, &g) == 0, "%s", err_text());
    ck_assert_int_eq(gguf_n_parts(g), 2);
    ck_assert_int_eq(gguf_n_tensors(g), 4);
    ck_assert_str_eq(gguf_part(g, 0)->path, split_path);
    ck_assert_int_eq(gguf_str(g, "general.name", &name), 0); /* a key of the first part */
    ck_assert_str_eq(name.p, "split");
    ck_assert_int_eq(gguf_find_tensor(g, "b.weight")->file, 0);
    ck_assert_uint_eq(gguf_find_tensor(g, "b.weight")->off, 1056);
    ck_assert_int_eq(gguf_find_tensor(g, "d.weight")->file, 1);
    ck_assert_uint_eq(gguf_find_tensor(g, "d.weight")->off, 256);
    ck_assert_uint_eq(gguf_header_bytes(g), gguf_part(g, 0)->header_bytes + gguf_part(g, 1)->header_bytes);
    gguf_close(g);
}
END_TEST

static void split_keys(struct maker *m, uint16_t no, uint16_t count, int32_t n_tensors)
{
    maker_key(m, "split.no", GGUF_U16);
    maker_put(&m->keys, no, 2);
    maker_key(m, "split.count", GGUF_U16);
    maker_put(&m->keys, count, 2);
    maker_key(m, "split.tensors.count", GGUF_I32);
    maker_put(&m->keys, (uint32_t)n_tensors, 4);
}

/* Two parts, the second with split.no `no` and a tensor called `name`; opened by the first. */
static int open_split(uint16_t no, uint16_t count, int32_t n_tensors, const char *name, const char *second_path)
{
    static struct bytes files_bytes[2];
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct maker m;
    struct gguf *g;
    uint64_t before = maker_live_bytes();

    maker_init(&m);
    split_keys(&m, 0, 2, n_tensors);
    maker_finish(&m, &files_bytes[0]);
    memset(&m, 0, sizeof m);
    m.magic = 0x46554747;
    m.version = 3;
    m.align = 32;
    m.data_bytes = 32;
    split_keys(&m, no, count, n_tensors);
    maker_tensor(&m, name, QUANT_F32, 8, 1, 0);
    maker_finish(&m, &files_bytes[1]);
    memfile_add(&files, "dir/m-00001-of-00002.gguf", files_bytes[0].p, files_bytes[0].n);
    memfile_add(&files, second_path, files_bytes[1].p, files_bytes[1].n);
    int rc = gguf_open("dir/m-00001-of-00002.gguf", &ops, &g);
    if (!rc)
        gguf_close(g);
    ck_assert_int_eq(files.n_open, 0);
    ck_assert_uint_eq(maker_live_bytes(), before);
    return rc;
}

START_TEST(split_parts_that_do_not_fit_together_are_refused)
{
    static const char second[] = "dir/m-00002-of-00002.gguf";

    ck_assert_msg(open_split(1, 2, 3, "z.weight", second) == 0, "%s", err_text());
    ck_assert_int_eq(open_split(0, 2, 3, "z.weight", second), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "m-00002-of-00002.gguf"));
    ck_assert_ptr_nonnull(strstr(err_text(), "are 0 and 2, wanted 1 and 2"));
    ck_assert_int_eq(open_split(1, 3, 3, "z.weight", second), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "are 1 and 3, wanted 1 and 2"));
    ck_assert_int_eq(open_split(1, 2, 4, "z.weight", second), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "\"split.tensors.count\" is 4, but the 2 parts have 3"));
    ck_assert_int_eq(open_split(1, 2, 3, "x.weight", second), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "tensor \"x.weight\" is there twice"));
    ck_assert_int_eq(open_split(1, 2, 3, "z.weight", "dir/elsewhere.gguf"), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "dir/m-00002-of-00002.gguf: cannot open"));
}
END_TEST

START_TEST(vocabulary_without_tensors_opens)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    struct gguf_str s;

    maker_init(&m);
    m.tensors.n = m.n_tensors = m.data_bytes = 0;
    m.version = 2 + _i;
    m.align = 0; /* ends with its last key, which is a string: its NUL lies behind the file's bytes */
    maker_key_str(&m, "last", "word");
    maker_finish(&m, &file);
    ck_assert_msg(maker_open_bytes(&file, &g) == 0, "%s", err_text());
    ck_assert_int_eq(gguf_version(g), 2 + _i);
    ck_assert_int_eq(gguf_n_tensors(g), 0);
    ck_assert_ptr_null(gguf_find_tensor(g, "x.weight"));
    ck_assert_int_eq(gguf_str(g, "last", &s), 0);
    ck_assert_str_eq(s.p, "word");
    ck_assert_uint_eq(gguf_header_bytes(g), file.n);
    gguf_close(g);
}
END_TEST

START_TEST(file_without_anything_opens)
{
    struct maker m = {.magic = 0x46554747, .version = 3};
    struct bytes file;
    struct gguf *g;

    maker_finish(&m, &file);
    ck_assert_int_eq(maker_open_bytes(&file, &g), 0);
    ck_assert_int_eq(gguf_n_keys(g) + gguf_n_tensors(g), 0);
    ck_assert_ptr_null(gguf_find(g, "general.architecture"));
    gguf_close(g);
    gguf_close(NULL);
}
END_TEST

START_TEST(nested_arrays_are_walked)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    struct gguf_array a, inner;

    maker_init(&m);
    maker_key_array(&m, "t.nested", GGUF_ARRAY, 3);
    maker_put(&m.keys, GGUF_I16, 4);
    maker_put(&m.keys, 2, 8);
    maker_put(&m.keys, 0xfffe0001, 4); /* 1, -2 */
    maker_put(&m.keys, GGUF_STRING, 4);
    maker_put(&m.keys, 3, 8);
    maker_put_str(&m.keys, "one");
    maker_put_str(&m.keys, "");
    maker_put_str(&m.keys, "three");
    maker_put(&m.keys, GGUF_ARRAY, 4);
    maker_put(&m.keys, 2, 8);
    maker_put(&m.keys, GGUF_BOOL, 4);
    maker_put(&m.keys, 0, 8);
    maker_put(&m.keys, GGUF_U8, 4);
    maker_put(&m.keys, 1, 8);
    maker_put(&m.keys, 9, 1);
    maker_key_u32(&m, "t.behind", 5);
    maker_finish(&m, &file);
    ck_assert_msg(maker_open_bytes(&file, &g) == 0, "%s", err_text());
    ck_assert_int_eq(gguf_array(g, "t.nested", GGUF_WANT_ARRAY, &a), 0);
    ck_assert_uint_eq(a.n, 3);
    inner = gguf_at_array(&a, 0);
    ck_assert_int_eq(inner.type, GGUF_I16);
    ck_assert_int_eq(gguf_at_i64(&inner, 1), -2);
    inner = gguf_at_array(&a, 1);
    ck_assert_uint_eq(inner.n, 3);
    ck_assert(is_str(gguf_at_str(&inner, 2), "three"));
    inner = gguf_at_array(&a, 2);
    ck_assert_uint_eq(gguf_at_array(&inner, 0).n, 0);
    inner = gguf_at_array(&inner, 1);
    ck_assert_int_eq(gguf_at_i64(&inner, 0), 9);
    ck_assert_ptr_nonnull(gguf_find(g, "t.behind"));
    gguf_close(g);
}
END_TEST

START_TEST(integer_beyond_int64_in_an_array_is_refused_by_its_index)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    struct gguf_array a;

    maker_init(&m);
    maker_key_array(&m, "t.u64s", GGUF_U64, 2);
    maker_put(&m.keys, INT64_MAX, 8);
    maker_put(&m.keys, (uint64_t)INT64_MAX + 1, 8);
    maker_finish(&m, &file);
    ck_assert_int_eq(maker_open_bytes(&file, &g), 0);
    ck_assert_int_eq(gguf_array(g, "t.u64s", GGUF_WANT_INT, &a), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "key \"t.u64s\": element 1 is 9223372036854775808"));
    ck_assert_int_eq(gguf_array(g, "t.u64s", GGUF_WANT_FLOAT, &a), 0);
    ck_assert_double_eq(gguf_at_f64(&a, 1), 9223372036854775808.0);
    gguf_close(g);
}
END_TEST

START_TEST(experts_that_agree_are_accepted)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;

    maker_init(&m);
    maker_key_u32(&m, "llama.expert_count", 8);
    maker_key_u32(&m, "llama.expert_used_count", 8);
    m.data_bytes = 1 << 12;
    maker_tensor3(&m, "blk.0.ffn_up_exps.weight", 8, 8, 8, 512);
    maker_tensor(&m, "blk.0.ffn_gate_inp.weight", QUANT_F32, 8, 8, 2560);
    maker_tensor(&m, "blk.0.ffn_gate_inp_shexp.weight", QUANT_F32, 8, 1, 3072); /* of the shared expert: no count */
    maker_finish(&m, &file);
    ck_assert_msg(maker_open_bytes(&file, &g) == 0, "%s", err_text());
    gguf_close(g);
}
END_TEST

/* ---- identity, and only the header is read ---- */

START_TEST(identity_follows_header_size_and_time)
{
    struct maker m;
    struct bytes file;
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;
    uint64_t ids[4];

    maker_init(&m);
    maker_finish(&m, &file);
    memfile_add(&files, "m.gguf", file.p, file.n);
    for (int i = 0; i < 4; i++) {
        if (i == 1)
            files.files[0].mtime_ns++;
        if (i == 2)
            files.files[0].bytes = file.n += 1;
        if (i == 3)
            file.p[24 + 8 + 20 + 4 + 8] ^= 1; /* "llama" becomes "mlama" */
        ck_assert_msg(gguf_open("m.gguf", &ops, &g) == 0, "%s", err_text());
        ids[i] = gguf_identity(g);
        for (int k = 0; k < i; k++)
            ck_assert_uint_ne(ids[i], ids[k]);
        gguf_close(g);
        ck_assert_int_eq(gguf_open("m.gguf", &ops, &g), 0);
        ck_assert_uint_eq(gguf_identity(g), ids[i]);
        gguf_close(g);
    }
}
END_TEST

START_TEST(tensor_data_are_not_read)
{
    /* 10 GiB of tensor behind a small header. */
    struct maker m;
    struct bytes file;
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;

    maker_init(&m);
    m.tensors.n = m.n_tensors = 0;
    maker_tensor(&m, "huge.weight", QUANT_F16, (uint64_t)1 << 30, 5, 0);
    maker_finish(&m, &file);
    unsigned char *room = calloc(1, 1 << 20);
    memcpy(room, file.p, file.n);
    memfile_add(&files, "m.gguf", room, (uint64_t)11 << 30);
    ck_assert_msg(gguf_open("m.gguf", &ops, &g) == 0, "%s", err_text());
    ck_assert_uint_eq(gguf_tensor(g, 0)->bytes, (uint64_t)10 << 30);
    ck_assert_uint_le(files.read_end, 1 << 18);
    ck_assert_uint_lt(maker_live_bytes(), 1 << 16); /* nor kept */
    gguf_close(g);
    free(room);
}
END_TEST

START_TEST(large_vocabulary_is_found_by_index)
{
    /* 150 thousand tokens, whose header grows several times while it is parsed. */
    enum { N = 150000 };
    size_t room = (size_t)N * 20 + 4096, n = 0;
    unsigned char *p = calloc(1, room);
    struct maker m;
    struct bytes file;
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;
    struct gguf_array a;
    char want[16];

    memset(&m, 0, sizeof m);
    m.magic = 0x46554747;
    m.version = 3;
    m.n_keys = 1;
    maker_key_str(&m, "first", "stays");
    maker_key_array(&m, "tokenizer.ggml.tokens", GGUF_STRING, N);
    m.n_keys = 3; /* the third is written below */
    maker_finish(&m, &file);
    memcpy(p, file.p, n = file.n);
    for (int i = 0; i < N; i++) {
        int len = snprintf(want, sizeof want, "tok%d", i);
        p[n] = (unsigned char)len;
        memcpy(p + n + 8, want, (size_t)len);
        n += 8 + (size_t)len;
    }
    m.keys.n = 0;
    maker_key_u32(&m, "last", 99);
    memcpy(p + n, m.keys.p, m.keys.n);
    n += m.keys.n;
    memfile_add(&files, "m.gguf", p, n);
    ck_assert_msg(gguf_open("m.gguf", &ops, &g) == 0, "%s", err_text());
    ck_assert_int_eq(gguf_array(g, "tokenizer.ggml.tokens", GGUF_WANT_STRING, &a), 0);
    ck_assert_uint_eq(a.n, N);
    for (int i = 0; i < N; i += 7) {
        snprintf(want, sizeof want, "tok%d", i);
        ck_assert(is_str(gguf_at_str(&a, (uint64_t)i), want));
    }
    struct gguf_str s;
    uint64_t u;
    ck_assert_int_eq(gguf_str(g, "first", &s), 0);
    ck_assert_str_eq(s.p, "stays");
    ck_assert_int_eq(gguf_u64(g, "last", &u), 0);
    ck_assert_uint_eq(u, 99);
    gguf_close(g);
    free(p);
}
END_TEST

/* ---- everything fallible is made to fail ---- */

START_TEST(file_written_to_while_it_is_read_is_refused)
{
    struct maker m;
    struct bytes file;
    struct memfiles files = {.changes_at = 3};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;

    maker_init(&m);
    maker_finish(&m, &file);
    memfile_add(&files, "m.gguf", file.p, file.n);
    ck_assert_int_eq(gguf_open("m.gguf", &ops, &g), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "m.gguf: the file was written to"));
}
END_TEST

static struct memfiles split_files(struct bytes both[2])
{
    struct memfiles files = {.max_read_bytes = 100};
    struct maker m;

    maker_init(&m);
    split_keys(&m, 0, 2, 4);
    maker_finish(&m, &both[0]);
    memset(&m, 0, sizeof m);
    m.magic = 0x46554747;
    m.version = 3;
    m.align = 32;
    m.data_bytes = 1024;
    split_keys(&m, 1, 2, 4);
    maker_tensor(&m, "z.weight", QUANT_F32, 8, 1, 0);
    maker_tensor(&m, "w.weight", QUANT_F32, 8, 1, 32);
    maker_finish(&m, &both[1]);
    memfile_add(&files, "m-00001-of-00002.gguf", both[0].p, both[0].n);
    memfile_add(&files, "m-00002-of-00002.gguf", both[1].p, both[1].n);
    return files;
}

START_TEST(every_allocation_may_fail_without_leaking)
{
    static struct bytes both[2];
    struct memfiles files = split_files(both);
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;
    uint64_t before = maker_live_bytes(), n;
    int rc = ERR_NOMEM;

    for (n = 1; rc && n < 200; n++) {
        mem_fail_nth(n);
        rc = gguf_open("m-00001-of-00002.gguf", &ops, &g);
        mem_fail_nth(0);
        ck_assert_int_eq(files.n_open, 0);
        if (rc) {
            ck_assert_int_eq(rc, ERR_NOMEM);
            ck_assert_ptr_null(g);
            ck_assert_str_ne(err_text(), "");
            ck_assert_msg(maker_live_bytes() == before, "allocation %lu leaks", (unsigned long)n);
        }
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_uint_gt(n, 15);
    ck_assert_int_eq(gguf_n_tensors(g), 4);
    gguf_close(g);
    ck_assert_uint_eq(maker_live_bytes(), before);
}
END_TEST

START_TEST(every_read_may_fail_without_leaking)
{
    static struct bytes both[2];
    struct memfiles files = split_files(both);
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;
    uint64_t before = maker_live_bytes(), n;
    int rc = ERR_IO;

    for (n = 1; rc && n < 200; n++) {
        files.n_calls = 0;
        files.fail_at = n;
        rc = gguf_open("m-00001-of-00002.gguf", &ops, &g);
        ck_assert_int_eq(files.n_open, 0);
        if (rc) {
            ck_assert_int_eq(rc, ERR_IO);
            ck_assert_ptr_null(g);
            ck_assert_ptr_nonnull(strstr(err_text(), "-of-00002.gguf"));
            ck_assert_ptr_nonnull(strstr(err_text(), "Input/output error"));
            ck_assert_msg(maker_live_bytes() == before, "call %lu leaks", (unsigned long)n);
        }
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_uint_gt(n, 15);
    gguf_close(g);
    ck_assert_uint_eq(maker_live_bytes(), before);
}
END_TEST

START_TEST(head_of_a_file_is_enough)
{
    struct maker m;
    struct bytes whole;
    struct gguf *g = NULL, *head = NULL;
    uint64_t header_bytes;

    maker_init(&m);
    maker_finish(&m, &whole);
    ck_assert_int_eq(maker_open_bytes(&whole, &g), 0);
    header_bytes = gguf_header_bytes(g);
    for (size_t n = 0; n <= whole.n; n++) {
        struct memfiles files = {0};
        struct file_ops ops = memfile_ops(&files);
        uint64_t live_bytes = maker_live_bytes();
        memfile_add(&files, "m.gguf", whole.p, n);
        int rc = gguf_open_head("m.gguf", &ops, &head);
        ck_assert_int_eq(rc, n < header_bytes ? ERR_FORMAT : 0);
        ck_assert_int_eq(files.n_open, 0);
        if (rc) {
            uint64_t here, needed;
            const char *at = strstr(err_text(), "the header is cut: ");
            ck_assert_msg(at != NULL, "%s", err_text());
            ck_assert_int_eq(
                sscanf(at, "the header is cut: %" SCNu64 " bytes are here, at least %" SCNu64, &here, &needed), 2);
            ck_assert_uint_eq(here, n);
            ck_assert_uint_gt(needed, n);
            ck_assert_uint_le(needed, header_bytes);
        } else {
            ck_assert_int_eq(gguf_n_tensors(head), 2);
            ck_assert_uint_eq(gguf_tensor(head, 1)->off, gguf_tensor(g, 1)->off);
            ck_assert_uint_eq(gguf_part(head, 0)->end_bytes, gguf_tensor(g, 1)->off + 2 * 34);
            gguf_close(head);
        }
        ck_assert_uint_eq(maker_live_bytes(), live_bytes);
        /* the whole is wanted otherwise */
        if (n < whole.n) {
            struct bytes cut = whole;
            cut.n = n;
            ck_assert_int_eq(maker_open_bytes(&cut, &head), ERR_FORMAT);
        }
    }
    gguf_close(g);
}
END_TEST

START_TEST(head_that_lies_is_refused)
{
    struct maker m;
    struct bytes b;
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g = NULL;

    maker_init(&m);
    maker_tensor(&m, "z.weight", QUANT_F32, 32, 1, UINT64_MAX - 31); /* past what offsets can be */
    maker_finish(&m, &b);
    memfile_add(&files, "m.gguf", b.p, b.n);
    ck_assert_int_eq(gguf_open_head("m.gguf", &ops, &g), ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(err_text(), "z.weight"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gguf");
    TCase *tc = tcase_create("gguf");

    tcase_add_test(tc, every_value_type_is_read);
    tcase_add_test(tc, head_of_a_file_is_enough);
    tcase_add_test(tc, head_that_lies_is_refused);
    tcase_add_test(tc, every_array_type_is_read);
    tcase_add_test(tc, keys_are_walked_in_the_order_of_the_file);
    tcase_add_test(tc, missing_key_is_told_from_wrong_type);
    tcase_add_test(tc, tensors_lie_where_the_gguf_package_says);
    tcase_add_loop_test(tc, split_model_opens_by_any_of_its_parts, 0, 2);
    tcase_add_test(tc, split_parts_that_do_not_fit_together_are_refused);
    tcase_add_loop_test(tc, vocabulary_without_tensors_opens, 0, 2);
    tcase_add_test(tc, file_without_anything_opens);
    tcase_add_test(tc, nested_arrays_are_walked);
    tcase_add_test(tc, integer_beyond_int64_in_an_array_is_refused_by_its_index);
    tcase_add_test(tc, experts_that_agree_are_accepted);
    tcase_add_test(tc, identity_follows_header_size_and_time);
    tcase_add_test(tc, tensor_data_are_not_read);
    tcase_add_test(tc, large_vocabulary_is_found_by_index);
    tcase_add_test(tc, file_written_to_while_it_is_read_is_refused);
    tcase_add_test(tc, every_allocation_may_fail_without_leaking);
    tcase_add_test(tc, every_read_may_fail_without_leaking);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
