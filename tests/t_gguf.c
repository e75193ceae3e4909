/* GGUF headers: what the `gguf` package wrote, hostile files (each row below is one check of the parser), failing reads
 * and allocations. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "tests/memfile.h"

#include <check.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- a writer that can be told to lie ---- */

struct bytes {
    unsigned char p[1 << 14];
    size_t n;
};

static void put(struct bytes *b, uint64_t v, int n)
{
    ck_assert_uint_le(b->n + 8, sizeof b->p);
    for (int i = 0; i < n; i++)
        b->p[b->n++] = (unsigned char)(v >> (8 * i));
}

static void put_n(struct bytes *b, const void *p, size_t n)
{
    ck_assert_uint_le(b->n + n, sizeof b->p);
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

static void put_str(struct bytes *b, const char *s)
{
    put(b, strlen(s), 8);
    put_n(b, s, strlen(s));
}

struct maker {
    uint64_t magic, version, n_keys, n_tensors;
    struct bytes keys, tensors;
    uint64_t align, data_bytes; /* behind the header */
};

static void key(struct maker *m, const char *name, enum gguf_type type)
{
    put_str(&m->keys, name);
    put(&m->keys, type, 4);
    m->n_keys++;
}

static void key_u32(struct maker *m, const char *name, uint32_t v)
{
    key(m, name, GGUF_U32);
    put(&m->keys, v, 4);
}

static void key_str(struct maker *m, const char *name, const char *v)
{
    key(m, name, GGUF_STRING);
    put_str(&m->keys, v);
}

static void key_array(struct maker *m, const char *name, enum gguf_type type, uint64_t n)
{
    key(m, name, GGUF_ARRAY);
    put(&m->keys, type, 4);
    put(&m->keys, n, 8);
}

static void tensor(struct maker *m, const char *name, int type, uint64_t ne0, uint64_t ne1, uint64_t off)
{
    put_str(&m->tensors, name);
    put(&m->tensors, 2, 4);
    put(&m->tensors, ne0, 8);
    put(&m->tensors, ne1, 8);
    put(&m->tensors, (uint64_t)type, 4);
    put(&m->tensors, off, 8);
    m->n_tensors++;
}

static void tensor3(struct maker *m, const char *name, uint64_t ne0, uint64_t ne1, uint64_t ne2, uint64_t off)
{
    put_str(&m->tensors, name);
    put(&m->tensors, 3, 4);
    put(&m->tensors, ne0, 8);
    put(&m->tensors, ne1, 8);
    put(&m->tensors, ne2, 8);
    put(&m->tensors, QUANT_F32, 4);
    put(&m->tensors, off, 8);
    m->n_tensors++;
}

/* A small valid model: 2 tensors, 4 tokens. */
static void make_valid(struct maker *m)
{
    memset(m, 0, sizeof *m);
    m->magic = 0x46554747;
    m->version = 3;
    m->align = 32;
    m->data_bytes = 4 * 64 + 2 * 34;
    key_str(m, "general.architecture", "llama");
    key_u32(m, "llama.block_count", 1);
    key_array(m, "tokenizer.ggml.tokens", GGUF_STRING, 4);
    put_str(&m->keys, "<s>");
    put_str(&m->keys, "a");
    put_str(&m->keys, "");
    put_str(&m->keys, "bc");
    key_array(m, "tokenizer.ggml.scores", GGUF_F32, 4);
    put(&m->keys, 0, 8);
    put(&m->keys, 0, 8);
    tensor(m, "x.weight", QUANT_F32, 32, 2, 0);
    tensor(m, "y.weight", QUANT_Q8_0, 64, 1, 256);
}

/* The file, padded as its alignment says. */
static void make_file(const struct maker *m, struct bytes *out)
{
    static const unsigned char zeros[4096];

    out->n = 0;
    put(out, m->magic, 4);
    put(out, m->version, 4);
    put(out, m->n_tensors, 8);
    put(out, m->n_keys, 8);
    put_n(out, m->keys.p, m->keys.n);
    put_n(out, m->tensors.p, m->tensors.n);
    if (m->align && m->align <= sizeof zeros && out->n % m->align)
        put_n(out, zeros, (size_t)(m->align - out->n % m->align));
    put_n(out, zeros, (size_t)m->data_bytes);
}

static int open_bytes(const struct bytes *b, struct gguf **g)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);

    memfile_add(&files, "m.gguf", b->p, b->n);
    int rc = gguf_open("m.gguf", &ops, g);
    ck_assert_int_eq(files.n_open, 0);
    return rc;
}

/* ---- hostile files: what is done to the valid one, and what the error has to name ---- */

#define HOSTILE(name) static void name(struct maker *m)

HOSTILE(wrong_magic)
{
    m->magic = 0x4c4d4747;
}
HOSTILE(version_1)
{
    m->version = 1;
}
HOSTILE(version_4)
{
    m->version = 4;
}
HOSTILE(big_endian)
{
    m->version = 0x03000000;
}
HOSTILE(more_keys_than_bytes)
{
    m->n_keys = UINT64_MAX;
}
HOSTILE(more_tensors_than_bytes)
{
    m->n_tensors = (uint64_t)1 << 60;
}
HOSTILE(one_key_more_than_there_is)
{
    /* The tensor's entry is then read as a key: name "x.weight", type 2 (its dimensions), ... */
    m->n_keys++;
}
HOSTILE(string_longer_than_file)
{
    key(m, "evil.str", GGUF_STRING);
    put(&m->keys, (uint64_t)1 << 40, 8);
}
HOSTILE(string_length_wraps)
{
    key(m, "evil.str", GGUF_STRING);
    put(&m->keys, UINT64_MAX - 3, 8);
}
HOSTILE(key_name_longer_than_file)
{
    put(&m->keys, UINT64_MAX, 8);
    m->n_keys++;
}
HOSTILE(key_name_empty)
{
    key_u32(m, "", 1);
}
HOSTILE(key_name_with_zero_byte)
{
    put(&m->keys, 4, 8);
    put_n(&m->keys, "a\0bc", 4);
    put(&m->keys, GGUF_U8, 4);
    put(&m->keys, 1, 1);
    m->n_keys++;
}
HOSTILE(value_of_unknown_type)
{
    key(m, "evil.type", (enum gguf_type)13);
    put(&m->keys, 0, 8);
}
HOSTILE(array_of_unknown_type)
{
    key_array(m, "evil.array", (enum gguf_type)77, 1);
    put(&m->keys, 0, 8);
}
HOSTILE(array_larger_than_file)
{
    key_array(m, "evil.array", GGUF_U32, 1000000);
}
HOSTILE(array_size_wraps)
{
    key_array(m, "evil.array", GGUF_F64, ((uint64_t)1 << 61) + 1);
}
HOSTILE(array_of_strings_larger_than_file)
{
    key_array(m, "evil.array", GGUF_STRING, (uint64_t)1 << 32);
}
HOSTILE(string_in_array_longer_than_file)
{
    key_array(m, "evil.array", GGUF_STRING, 2);
    put_str(&m->keys, "ok");
    put(&m->keys, 0x7fffffff, 8);
}
HOSTILE(array_of_arrays_larger_than_file)
{
    key_array(m, "evil.array", GGUF_ARRAY, (uint64_t)1 << 60);
}
HOSTILE(arrays_nested_without_end)
{
    key_array(m, "evil.array", GGUF_ARRAY, 1);
    for (int i = 0; i < 100; i++) {
        put(&m->keys, GGUF_ARRAY, 4);
        put(&m->keys, 1, 8);
    }
}
HOSTILE(bool_that_is_neither)
{
    key(m, "evil.bool", GGUF_BOOL);
    put(&m->keys, 2, 1);
}
HOSTILE(bool_in_array_that_is_neither)
{
    key_array(m, "evil.bools", GGUF_BOOL, 3);
    put(&m->keys, 0xff0001, 3);
}
HOSTILE(key_twice)
{
    key_u32(m, "evil.twice", 1);
    key_u32(m, "evil.twice", 2);
}
HOSTILE(alignment_not_a_power_of_two)
{
    key_u32(m, "general.alignment", 24);
}
HOSTILE(alignment_zero)
{
    key_u32(m, "general.alignment", 0);
}
HOSTILE(alignment_too_small)
{
    key_u32(m, "general.alignment", 4);
}
HOSTILE(alignment_beyond_32_bits)
{
    key(m, "general.alignment", GGUF_U64);
    put(&m->keys, (uint64_t)1 << 40, 8);
}
HOSTILE(alignment_of_wrong_type)
{
    key_str(m, "general.alignment", "32");
}
HOSTILE(alignment_negative)
{
    key(m, "general.alignment", GGUF_I32);
    put(&m->keys, (uint32_t)-32, 4);
}
HOSTILE(scores_of_another_length)
{
    m->keys.n -= 16;
    put(&m->keys, 0, 4);
    m->keys.p[m->keys.n - 4 - 8] = 1; /* the count */
}
HOSTILE(token_types_of_another_length)
{
    key_array(m, "tokenizer.ggml.token_type", GGUF_I32, 5);
    for (int i = 0; i < 5; i++)
        put(&m->keys, 1, 4);
}
HOSTILE(tensor_name_too_long)
{
    tensor(m, "a123456789b123456789c123456789d123456789e123456789f123456789g123", QUANT_F32, 1, 1, 0);
}
HOSTILE(tensor_name_with_zero_byte)
{
    tensor(m, "zero.weight", QUANT_F32, 1, 1, 0);
    m->tensors.p[m->tensors.n - 32 - 3] = 0;
}
HOSTILE(tensor_twice)
{
    m->data_bytes += 512;
    tensor(m, "x.weight", QUANT_F32, 8, 1, 512);
}
HOSTILE(five_dimensions)
{
    put_str(&m->tensors, "evil.weight");
    put(&m->tensors, 5, 4);
    for (int i = 0; i < 6; i++)
        put(&m->tensors, 1, 8);
    m->n_tensors++;
}
HOSTILE(four_billion_dimensions)
{
    put_str(&m->tensors, "evil.weight");
    put(&m->tensors, UINT32_MAX, 4);
    for (int i = 0; i < 6; i++)
        put(&m->tensors, 1, 8);
    m->n_tensors++;
}
HOSTILE(no_dimensions)
{
    put_str(&m->tensors, "evil.weight");
    put(&m->tensors, 0, 4);
    put(&m->tensors, 0, 8);
    put(&m->tensors, 0, 8);
    m->n_tensors++;
}
HOSTILE(dimension_zero)
{
    tensor(m, "evil.weight", QUANT_F32, 32, 0, 0);
}
HOSTILE(dimension_negative)
{
    tensor(m, "evil.weight", QUANT_F32, 32, (uint64_t)-5, 0);
}
HOSTILE(elements_wrap)
{
    tensor(m, "evil.weight", QUANT_F32, (uint64_t)1 << 33, (uint64_t)1 << 33, 0);
}
HOSTILE(elements_of_three_dimensions_wrap)
{
    tensor3(m, "evil.weight", (uint64_t)1 << 22, (uint64_t)1 << 22, (uint64_t)1 << 22, 0);
}
HOSTILE(bytes_wrap)
{
    /* 2^62 elements fit in 63 bits, their 2^64 bytes do not in 64. */
    tensor(m, "evil.weight", QUANT_F32, (uint64_t)1 << 31, (uint64_t)1 << 31, 0);
}
HOSTILE(unknown_tensor_type)
{
    tensor(m, "evil.weight", 99, 32, 1, 0);
}
HOSTILE(removed_tensor_type)
{
    tensor(m, "evil.weight", 4, 32, 1, 0);
}
HOSTILE(tensor_type_beyond_int)
{
    tensor(m, "evil.weight", -1, 32, 1, 0);
}
HOSTILE(row_not_whole_blocks)
{
    tensor(m, "evil.weight", QUANT_Q4_K, 288, 1, 0);
}
HOSTILE(offset_not_aligned)
{
    m->data_bytes += 512;
    tensor(m, "evil.weight", QUANT_F32, 8, 1, 520);
}
HOSTILE(offset_behind_the_end)
{
    tensor(m, "evil.weight", QUANT_F32, 8, 1, 1 << 20);
}
HOSTILE(offset_wraps)
{
    tensor(m, "evil.weight", QUANT_F32, 8, 1, UINT64_MAX - 31);
}
HOSTILE(tensor_longer_than_file)
{
    tensor(m, "evil.weight", QUANT_F32, 32, 100, 512);
}
HOSTILE(tensor_one_byte_longer_than_file)
{
    m->data_bytes--;
}
HOSTILE(tensors_overlap)
{
    tensor(m, "evil.weight", QUANT_F32, 8, 1, 224);
}
HOSTILE(tensors_at_the_same_place)
{
    tensor(m, "evil.weight", QUANT_F32, 64, 1, 0);
}
HOSTILE(expert_count_against_stack)
{
    key_u32(m, "llama.expert_count", 8);
    m->data_bytes = 1 << 12;
    tensor3(m, "blk.0.ffn_up_exps.weight", 8, 8, 7, 512);
}
HOSTILE(expert_count_against_router)
{
    key_u32(m, "llama.expert_count", 8);
    m->data_bytes = 1 << 12;
    tensor(m, "blk.0.ffn_gate_inp.weight", QUANT_F32, 8, 9, 512);
}
HOSTILE(expert_count_against_bias)
{
    key_u32(m, "llama.expert_count", 8);
    m->data_bytes = 1 << 12;
    tensor(m, "blk.0.exp_probs_b.bias", QUANT_F32, 16, 1, 512);
}
HOSTILE(more_experts_used_than_there_are)
{
    key_u32(m, "llama.expert_count", 8);
    key_u32(m, "llama.expert_used_count", 9);
}
HOSTILE(expert_count_of_wrong_type)
{
    key_str(m, "llama.expert_count", "8");
}
HOSTILE(split_without_count)
{
    key_u32(m, "split.no", 3);
}
HOSTILE(split_count_beyond_any)
{
    key_u32(m, "split.count", 100000);
}
HOSTILE(split_file_with_a_plain_name)
{
    key_u32(m, "split.no", 0);
    key_u32(m, "split.count", 2);
}
HOSTILE(escapes_in_names)
{
    tensor(m, "\033[2Jevil", 99, 32, 1, 0);
}

static const struct {
    const char *name;
    void (*make)(struct maker *m);
    int rc;
    const char *text[3]; /* all of them are in the error */
} hostile[] = {
#define ROW(name, ...)           \
    {                            \
#name, name, __VA_ARGS__ \
    }
    ROW(wrong_magic, ERR_FORMAT, {"0x4c4d4747", "GGUF"}),
    ROW(version_1, ERR_UNSUPPORTED, {"version 1", "2 and 3"}),
    ROW(version_4, ERR_UNSUPPORTED, {"version 4"}),
    ROW(big_endian, ERR_UNSUPPORTED, {"big-endian", "0x03000000"}),
    ROW(more_keys_than_bytes, ERR_FORMAT, {"18446744073709551615 keys in"}),
    ROW(more_tensors_than_bytes, ERR_FORMAT, {"1152921504606846976 tensors in"}),
    ROW(one_key_more_than_there_is, ERR_FORMAT, {"tensor 1 of 2", "562949953421312 bytes"}), /* 2 << 48: out of step */
    ROW(string_longer_than_file, ERR_FORMAT, {"key \"evil.str\"", "1099511627776 bytes"}),
    ROW(string_length_wraps, ERR_FORMAT, {"key \"evil.str\"", "18446744073709551612 bytes"}),
    ROW(key_name_longer_than_file, ERR_FORMAT, {"key 5 of 5", "18446744073709551615 bytes"}),
    ROW(key_name_empty, ERR_FORMAT, {"key 5 of 5", "has 0 bytes", "1 to 65535"}),
    ROW(key_name_with_zero_byte, ERR_FORMAT, {"key \"a?bc\"", "zero byte at 1"}),
    ROW(value_of_unknown_type, ERR_FORMAT, {"key \"evil.type\"", "type 13", "0 to 12"}),
    ROW(array_of_unknown_type, ERR_FORMAT, {"key \"evil.array\"", "type 77", "0 to 12"}),
    ROW(array_larger_than_file, ERR_FORMAT, {"key \"evil.array\"", "1000000 elements of type u32"}),
    ROW(array_size_wraps, ERR_FORMAT, {"key \"evil.array\"", "2305843009213693953 elements of type f64"}),
    ROW(array_of_strings_larger_than_file, ERR_FORMAT, {"key \"evil.array\"", "4294967296 elements of type str"}),
    ROW(string_in_array_longer_than_file, ERR_FORMAT, {"key \"evil.array\"", "2147483647 bytes"}),
    ROW(array_of_arrays_larger_than_file, ERR_FORMAT,
        {"key \"evil.array\"", "1152921504606846976 elements of type arr"}),
    ROW(arrays_nested_without_end, ERR_LIMIT, {"key \"evil.array\"", "nested deeper than 4"}),
    ROW(bool_that_is_neither, ERR_FORMAT, {"key \"evil.bool\"", "is 2"}),
    ROW(bool_in_array_that_is_neither, ERR_FORMAT, {"key \"evil.bools\"", "element 2", "is 255"}),
    ROW(key_twice, ERR_FORMAT, {"key \"evil.twice\" is there twice"}),
    ROW(alignment_not_a_power_of_two, ERR_FORMAT, {"key \"general.alignment\" is 24"}),
    ROW(alignment_zero, ERR_FORMAT, {"key \"general.alignment\" is 0"}),
    ROW(alignment_too_small, ERR_FORMAT, {"key \"general.alignment\" is 4"}),
    ROW(alignment_beyond_32_bits, ERR_FORMAT, {"key \"general.alignment\" is 1099511627776"}),
    ROW(alignment_of_wrong_type, ERR_FORMAT, {"key \"general.alignment\"", "type str", "integer"}),
    ROW(alignment_negative, ERR_FORMAT, {"key \"general.alignment\" is -32"}),
    ROW(scores_of_another_length, ERR_FORMAT, {"key \"tokenizer.ggml.scores\" has 1 ", "tokenizer.ggml.tokens\" 4"}),
    ROW(token_types_of_another_length, ERR_FORMAT, {"key \"tokenizer.ggml.token_type\" has 5 ", "tokens\" 4"}),
    ROW(tensor_name_too_long, ERR_FORMAT, {"tensor 3 of 3", "64 bytes", "1 to 63"}),
    ROW(tensor_name_with_zero_byte, ERR_FORMAT, {"tensor \"zero.wei?ht\"", "zero byte at 8"}),
    ROW(tensor_twice, ERR_FORMAT, {"tensor \"x.weight\" is there twice"}),
    ROW(five_dimensions, ERR_FORMAT, {"tensor \"evil.weight\"", "5 dimensions", "1 to 4"}),
    ROW(four_billion_dimensions, ERR_FORMAT, {"tensor \"evil.weight\"", "4294967295 dimensions"}),
    ROW(no_dimensions, ERR_FORMAT, {"tensor \"evil.weight\"", "0 dimensions"}),
    ROW(dimension_zero, ERR_FORMAT, {"tensor \"evil.weight\"", "dimension 1 is 0"}),
    ROW(dimension_negative, ERR_FORMAT, {"tensor \"evil.weight\"", "dimension 1 is 18446744073709551611"}),
    ROW(elements_wrap, ERR_FORMAT, {"tensor \"evil.weight\"", "2^63 elements", "dimension 1 is 8589934592"}),
    ROW(elements_of_three_dimensions_wrap, ERR_FORMAT, {"tensor \"evil.weight\"", "dimension 2 is 4194304"}),
    ROW(bytes_wrap, ERR_FORMAT, {"tensor \"evil.weight\"", "4611686018427387904 elements of F32", "2^64 bytes"}),
    ROW(unknown_tensor_type, ERR_UNSUPPORTED, {"tensor \"evil.weight\"", "type id 99"}),
    ROW(removed_tensor_type, ERR_UNSUPPORTED, {"tensor \"evil.weight\"", "type id 4 "}),
    ROW(tensor_type_beyond_int, ERR_UNSUPPORTED, {"tensor \"evil.weight\"", "type id 4294967295"}),
    ROW(row_not_whole_blocks, ERR_FORMAT, {"tensor \"evil.weight\"", "288 elements", "Q4_K blocks of 256"}),
    ROW(offset_not_aligned, ERR_FORMAT, {"tensor \"evil.weight\"", "offset 520", "alignment 32"}),
    ROW(offset_behind_the_end, ERR_FORMAT, {"tensor \"evil.weight\"", "32 bytes at offset 1048576"}),
    ROW(offset_wraps, ERR_FORMAT, {"tensor \"evil.weight\"", "offset 18446744073709551584"}),
    ROW(tensor_longer_than_file, ERR_FORMAT, {"tensor \"evil.weight\"", "12800 bytes at offset 512"}),
    ROW(tensor_one_byte_longer_than_file, ERR_FORMAT, {"tensor \"y.weight\"", "68 bytes at offset 256"}),
    ROW(tensors_overlap, ERR_FORMAT, {"tensor \"x.weight\"", "overlap", "\"evil.weight\""}),
    ROW(tensors_at_the_same_place, ERR_FORMAT, {"\"x.weight\"", "overlap", "\"evil.weight\""}),
    ROW(expert_count_against_stack, ERR_FORMAT,
        {"\"blk.0.ffn_up_exps.weight\"", "is 7", "\"llama.expert_count\" is 8"}),
    ROW(expert_count_against_router, ERR_FORMAT,
        {"\"blk.0.ffn_gate_inp.weight\"", "is 9", "\"llama.expert_count\" is 8"}),
    ROW(expert_count_against_bias, ERR_FORMAT, {"\"blk.0.exp_probs_b.bias\"", "is 16", "\"llama.expert_count\" is 8"}),
    ROW(more_experts_used_than_there_are, ERR_FORMAT,
        {"\"llama.expert_used_count\" is 9", "\"llama.expert_count\" only 8"}),
    ROW(expert_count_of_wrong_type, ERR_FORMAT, {"key \"llama.expert_count\"", "type str", "integer"}),
    ROW(split_without_count, ERR_FORMAT, {"key \"split.no\" is 3", "\"split.count\" of 1"}),
    ROW(split_count_beyond_any, ERR_LIMIT, {"key \"split.count\" is 100000", "99999"}),
    ROW(split_file_with_a_plain_name, ERR_FORMAT, {"\"split.count\" are 0 and 2", "-00001-of-00002.gguf"}),
    ROW(escapes_in_names, ERR_UNSUPPORTED, {"tensor \"?[2Jevil\"", "type id 99"}),
};

static uint64_t live_bytes(void)
{
    return mem_live_bytes(MEM_META);
}

START_TEST(hostile_file_is_refused_by_name_and_numbers)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    uint64_t before = live_bytes();

    make_valid(&m);
    hostile[_i].make(&m);
    make_file(&m, &file);
    int rc = open_bytes(&file, &g);
    ck_assert_msg(rc == hostile[_i].rc, "%s: %d: %s", hostile[_i].name, rc, err_text());
    ck_assert_ptr_null(g);
    ck_assert_msg(strncmp(err_text(), "m.gguf: ", 8) == 0, "%s: %s", hostile[_i].name, err_text());
    for (int i = 0; i < 3 && hostile[_i].text[i]; i++)
        ck_assert_msg(strstr(err_text(), hostile[_i].text[i]) != NULL, "%s: no '%s' in: %s", hostile[_i].name,
                      hostile[_i].text[i], err_text());
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

START_TEST(file_cut_anywhere_is_refused)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    uint64_t before = live_bytes();

    make_valid(&m);
    make_file(&m, &file);
    for (size_t n = file.n; n-- > 0;) {
        /* A copy that ends where it ends: a sanitizer sees any step beyond. */
        struct memfiles files = {0};
        struct file_ops ops = memfile_ops(&files);
        unsigned char *cut = malloc(n + !n);
        memcpy(cut, file.p, n);
        memfile_add(&files, "m.gguf", cut, n);
        int rc = gguf_open("m.gguf", &ops, &g);
        ck_assert_msg(rc == ERR_FORMAT, "cut to %zu bytes: %d: %s", n, rc, err_text());
        ck_assert_uint_eq(live_bytes(), before);
        free(cut);
    }
}
END_TEST

START_TEST(header_beyond_every_model_is_refused_before_it_is_read)
{
    /* A terabyte of holes, as a sparse file has: an array that fits in the file, but in no memory. */
    struct maker m;
    struct bytes file;
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;

    make_valid(&m);
    key_array(&m, "evil.array", GGUF_U8, (uint64_t)1 << 39);
    make_file(&m, &file);
    unsigned char *room = calloc(1, 1 << 20);
    memcpy(room, file.p, file.n);
    memfile_add(&files, "m.gguf", room, (uint64_t)1 << 40);
    ck_assert_int_eq(gguf_open("m.gguf", &ops, &g), ERR_LIMIT);
    ck_assert_uint_le(files.read_end, 1 << 18);
    ck_assert_ptr_nonnull(strstr(err_text(), "key \"evil.array\""));
    ck_assert_ptr_nonnull(strstr(err_text(), "549755813888"));
    free(room);
}
END_TEST

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
    key(m, "split.no", GGUF_U16);
    put(&m->keys, no, 2);
    key(m, "split.count", GGUF_U16);
    put(&m->keys, count, 2);
    key(m, "split.tensors.count", GGUF_I32);
    put(&m->keys, (uint32_t)n_tensors, 4);
}

/* Two parts, the second with split.no `no` and a tensor called `name`; opened by the first. */
static int open_split(uint16_t no, uint16_t count, int32_t n_tensors, const char *name, const char *second_path)
{
    static struct bytes files_bytes[2];
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct maker m;
    struct gguf *g;
    uint64_t before = live_bytes();

    make_valid(&m);
    split_keys(&m, 0, 2, n_tensors);
    make_file(&m, &files_bytes[0]);
    memset(&m, 0, sizeof m);
    m.magic = 0x46554747;
    m.version = 3;
    m.align = 32;
    m.data_bytes = 32;
    split_keys(&m, no, count, n_tensors);
    tensor(&m, name, QUANT_F32, 8, 1, 0);
    make_file(&m, &files_bytes[1]);
    memfile_add(&files, "dir/m-00001-of-00002.gguf", files_bytes[0].p, files_bytes[0].n);
    memfile_add(&files, second_path, files_bytes[1].p, files_bytes[1].n);
    int rc = gguf_open("dir/m-00001-of-00002.gguf", &ops, &g);
    if (!rc)
        gguf_close(g);
    ck_assert_int_eq(files.n_open, 0);
    ck_assert_uint_eq(live_bytes(), before);
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

    make_valid(&m);
    m.tensors.n = m.n_tensors = m.data_bytes = 0;
    m.version = 2 + _i;
    m.align = 0; /* ends with its last key, which is a string: its NUL lies behind the file's bytes */
    key_str(&m, "last", "word");
    make_file(&m, &file);
    ck_assert_msg(open_bytes(&file, &g) == 0, "%s", err_text());
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

    make_file(&m, &file);
    ck_assert_int_eq(open_bytes(&file, &g), 0);
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

    make_valid(&m);
    key_array(&m, "t.nested", GGUF_ARRAY, 3);
    put(&m.keys, GGUF_I16, 4);
    put(&m.keys, 2, 8);
    put(&m.keys, 0xfffe0001, 4); /* 1, -2 */
    put(&m.keys, GGUF_STRING, 4);
    put(&m.keys, 3, 8);
    put_str(&m.keys, "one");
    put_str(&m.keys, "");
    put_str(&m.keys, "three");
    put(&m.keys, GGUF_ARRAY, 4);
    put(&m.keys, 2, 8);
    put(&m.keys, GGUF_BOOL, 4);
    put(&m.keys, 0, 8);
    put(&m.keys, GGUF_U8, 4);
    put(&m.keys, 1, 8);
    put(&m.keys, 9, 1);
    key_u32(&m, "t.behind", 5);
    make_file(&m, &file);
    ck_assert_msg(open_bytes(&file, &g) == 0, "%s", err_text());
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

    make_valid(&m);
    key_array(&m, "t.u64s", GGUF_U64, 2);
    put(&m.keys, INT64_MAX, 8);
    put(&m.keys, (uint64_t)INT64_MAX + 1, 8);
    make_file(&m, &file);
    ck_assert_int_eq(open_bytes(&file, &g), 0);
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

    make_valid(&m);
    key_u32(&m, "llama.expert_count", 8);
    key_u32(&m, "llama.expert_used_count", 8);
    m.data_bytes = 1 << 12;
    tensor3(&m, "blk.0.ffn_up_exps.weight", 8, 8, 8, 512);
    tensor(&m, "blk.0.ffn_gate_inp.weight", QUANT_F32, 8, 8, 2560);
    tensor(&m, "blk.0.ffn_gate_inp_shexp.weight", QUANT_F32, 8, 1, 3072); /* of the shared expert: no count */
    make_file(&m, &file);
    ck_assert_msg(open_bytes(&file, &g) == 0, "%s", err_text());
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

    make_valid(&m);
    make_file(&m, &file);
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

    make_valid(&m);
    m.tensors.n = m.n_tensors = 0;
    tensor(&m, "huge.weight", QUANT_F16, (uint64_t)1 << 30, 5, 0);
    make_file(&m, &file);
    unsigned char *room = calloc(1, 1 << 20);
    memcpy(room, file.p, file.n);
    memfile_add(&files, "m.gguf", room, (uint64_t)11 << 30);
    ck_assert_msg(gguf_open("m.gguf", &ops, &g) == 0, "%s", err_text());
    ck_assert_uint_eq(gguf_tensor(g, 0)->bytes, (uint64_t)10 << 30);
    ck_assert_uint_le(files.read_end, 1 << 18);
    ck_assert_uint_lt(live_bytes(), 1 << 16); /* nor kept */
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
    key_str(&m, "first", "stays");
    key_array(&m, "tokenizer.ggml.tokens", GGUF_STRING, N);
    m.n_keys = 3; /* the third is written below */
    make_file(&m, &file);
    memcpy(p, file.p, n = file.n);
    for (int i = 0; i < N; i++) {
        int len = snprintf(want, sizeof want, "tok%d", i);
        p[n] = (unsigned char)len;
        memcpy(p + n + 8, want, (size_t)len);
        n += 8 + (size_t)len;
    }
    m.keys.n = 0;
    key_u32(&m, "last", 99);
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

    make_valid(&m);
    make_file(&m, &file);
    memfile_add(&files, "m.gguf", file.p, file.n);
    ck_assert_int_eq(gguf_open("m.gguf", &ops, &g), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "m.gguf: the file was written to"));
}
END_TEST

static struct memfiles split_files(struct bytes both[2])
{
    struct memfiles files = {.max_read_bytes = 100};
    struct maker m;

    make_valid(&m);
    split_keys(&m, 0, 2, 4);
    make_file(&m, &both[0]);
    memset(&m, 0, sizeof m);
    m.magic = 0x46554747;
    m.version = 3;
    m.align = 32;
    m.data_bytes = 1024;
    split_keys(&m, 1, 2, 4);
    tensor(&m, "z.weight", QUANT_F32, 8, 1, 0);
    tensor(&m, "w.weight", QUANT_F32, 8, 1, 32);
    make_file(&m, &both[1]);
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
    uint64_t before = live_bytes(), n;
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
            ck_assert_msg(live_bytes() == before, "allocation %lu leaks", (unsigned long)n);
        }
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_uint_gt(n, 15);
    ck_assert_int_eq(gguf_n_tensors(g), 4);
    gguf_close(g);
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

START_TEST(every_read_may_fail_without_leaking)
{
    static struct bytes both[2];
    struct memfiles files = split_files(both);
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;
    uint64_t before = live_bytes(), n;
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
            ck_assert_msg(live_bytes() == before, "call %lu leaks", (unsigned long)n);
        }
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_uint_gt(n, 15);
    gguf_close(g);
    ck_assert_uint_eq(live_bytes(), before);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gguf");
    TCase *tc = tcase_create("gguf");
    int n_failed;

    tcase_add_loop_test(tc, hostile_file_is_refused_by_name_and_numbers, 0, (int)(sizeof hostile / sizeof hostile[0]));
    tcase_add_test(tc, file_cut_anywhere_is_refused);
    tcase_add_test(tc, header_beyond_every_model_is_refused_before_it_is_read);
    tcase_add_test(tc, every_value_type_is_read);
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
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
