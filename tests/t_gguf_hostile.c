/* Hostile GGUF files: each row is one check of the parser, with what is done to a valid file and what the error has to
 * name. */
#include "src/base/err.h"
#include "tests/gguf_maker.h"
#include "tests/run_suite.h"

#include <stdlib.h>

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
    maker_key(m, "evil.str", GGUF_STRING);
    maker_put(&m->keys, (uint64_t)1 << 40, 8);
}
HOSTILE(string_length_wraps)
{
    maker_key(m, "evil.str", GGUF_STRING);
    maker_put(&m->keys, UINT64_MAX - 3, 8);
}
HOSTILE(key_name_longer_than_file)
{
    maker_put(&m->keys, UINT64_MAX, 8);
    m->n_keys++;
}
HOSTILE(key_name_empty)
{
    maker_key_u32(m, "", 1);
}
HOSTILE(key_name_with_zero_byte)
{
    maker_put(&m->keys, 4, 8);
    maker_put_n(&m->keys, "a\0bc", 4);
    maker_put(&m->keys, GGUF_U8, 4);
    maker_put(&m->keys, 1, 1);
    m->n_keys++;
}
HOSTILE(value_of_unknown_type)
{
    maker_key(m, "evil.type", (enum gguf_type)13);
    maker_put(&m->keys, 0, 8);
}
HOSTILE(array_of_unknown_type)
{
    maker_key_array(m, "evil.array", (enum gguf_type)77, 1);
    maker_put(&m->keys, 0, 8);
}
HOSTILE(array_larger_than_file)
{
    maker_key_array(m, "evil.array", GGUF_U32, 1000000);
}
HOSTILE(array_size_wraps)
{
    maker_key_array(m, "evil.array", GGUF_F64, ((uint64_t)1 << 61) + 1);
}
HOSTILE(array_of_strings_larger_than_file)
{
    maker_key_array(m, "evil.array", GGUF_STRING, (uint64_t)1 << 32);
}
HOSTILE(string_in_array_longer_than_file)
{
    maker_key_array(m, "evil.array", GGUF_STRING, 2);
    maker_put_str(&m->keys, "ok");
    maker_put(&m->keys, 0x7fffffff, 8);
}
HOSTILE(array_of_arrays_larger_than_file)
{
    maker_key_array(m, "evil.array", GGUF_ARRAY, (uint64_t)1 << 60);
}
HOSTILE(arrays_nested_without_end)
{
    maker_key_array(m, "evil.array", GGUF_ARRAY, 1);
    for (int i = 0; i < 100; i++) {
        maker_put(&m->keys, GGUF_ARRAY, 4);
        maker_put(&m->keys, 1, 8);
    }
}
HOSTILE(bool_that_is_neither)
{
    maker_key(m, "evil.bool", GGUF_BOOL);
    maker_put(&m->keys, 2, 1);
}
HOSTILE(bool_in_array_that_is_neither)
{
    maker_key_array(m, "evil.bools", GGUF_BOOL, 3);
    maker_put(&m->keys, 0xff0001, 3);
}
HOSTILE(key_twice)
{
    maker_key_u32(m, "evil.twice", 1);
    maker_key_u32(m, "evil.twice", 2);
}
HOSTILE(alignment_not_a_power_of_two)
{
    maker_key_u32(m, "general.alignment", 24);
}
HOSTILE(alignment_zero)
{
    maker_key_u32(m, "general.alignment", 0);
}
HOSTILE(alignment_too_small)
{
    maker_key_u32(m, "general.alignment", 4);
}
HOSTILE(alignment_beyond_32_bits)
{
    maker_key(m, "general.alignment", GGUF_U64);
    maker_put(&m->keys, (uint64_t)1 << 40, 8);
}
HOSTILE(alignment_of_wrong_type)
{
    maker_key_str(m, "general.alignment", "32");
}
HOSTILE(alignment_negative)
{
    maker_key(m, "general.alignment", GGUF_I32);
    maker_put(&m->keys, (uint32_t)-32, 4);
}
HOSTILE(scores_of_another_length)
{
    m->keys.n -= 16;
    maker_put(&m->keys, 0, 4);
    m->keys.p[m->keys.n - 4 - 8] = 1; /* the count */
}
HOSTILE(token_types_of_another_length)
{
    maker_key_array(m, "tokenizer.ggml.token_type", GGUF_I32, 5);
    for (int i = 0; i < 5; i++)
        maker_put(&m->keys, 1, 4);
}
HOSTILE(tensor_name_too_long)
{
    maker_tensor(m, "a123456789b123456789c123456789d123456789e123456789f123456789g123", QUANT_F32, 1, 1, 0);
}
HOSTILE(tensor_name_with_zero_byte)
{
    maker_tensor(m, "zero.weight", QUANT_F32, 1, 1, 0);
    m->tensors.p[m->tensors.n - 32 - 3] = 0;
}
HOSTILE(tensor_twice)
{
    m->data_bytes += 512;
    maker_tensor(m, "x.weight", QUANT_F32, 8, 1, 512);
}
HOSTILE(five_dimensions)
{
    maker_put_str(&m->tensors, "evil.weight");
    maker_put(&m->tensors, 5, 4);
    for (int i = 0; i < 6; i++)
        maker_put(&m->tensors, 1, 8);
    m->n_tensors++;
}
HOSTILE(four_billion_dimensions)
{
    maker_put_str(&m->tensors, "evil.weight");
    maker_put(&m->tensors, UINT32_MAX, 4);
    for (int i = 0; i < 6; i++)
        maker_put(&m->tensors, 1, 8);
    m->n_tensors++;
}
HOSTILE(no_dimensions)
{
    maker_put_str(&m->tensors, "evil.weight");
    maker_put(&m->tensors, 0, 4);
    maker_put(&m->tensors, 0, 8);
    maker_put(&m->tensors, 0, 8);
    m->n_tensors++;
}
HOSTILE(dimension_zero)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 32, 0, 0);
}
HOSTILE(dimension_negative)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 32, (uint64_t)-5, 0);
}
HOSTILE(elements_wrap)
{
    maker_tensor(m, "evil.weight", QUANT_F32, (uint64_t)1 << 33, (uint64_t)1 << 33, 0);
}
HOSTILE(elements_of_three_dimensions_wrap)
{
    maker_tensor3(m, "evil.weight", (uint64_t)1 << 22, (uint64_t)1 << 22, (uint64_t)1 << 22, 0);
}
HOSTILE(bytes_wrap)
{
    /* 2^62 elements fit in 63 bits, their 2^64 bytes do not in 64. */
    maker_tensor(m, "evil.weight", QUANT_F32, (uint64_t)1 << 31, (uint64_t)1 << 31, 0);
}
HOSTILE(unknown_tensor_type)
{
    maker_tensor(m, "evil.weight", 99, 32, 1, 0);
}
HOSTILE(removed_tensor_type)
{
    maker_tensor(m, "evil.weight", 4, 32, 1, 0);
}
HOSTILE(tensor_type_beyond_int)
{
    maker_tensor(m, "evil.weight", -1, 32, 1, 0);
}
HOSTILE(row_not_whole_blocks)
{
    maker_tensor(m, "evil.weight", QUANT_Q4_K, 288, 1, 0);
}
HOSTILE(offset_not_aligned)
{
    m->data_bytes += 512;
    maker_tensor(m, "evil.weight", QUANT_F32, 8, 1, 520);
}
HOSTILE(offset_behind_the_end)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 8, 1, 1 << 20);
}
HOSTILE(offset_wraps)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 8, 1, UINT64_MAX - 31);
}
HOSTILE(tensor_longer_than_file)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 32, 100, 512);
}
HOSTILE(tensor_one_byte_longer_than_file)
{
    m->data_bytes--;
}
HOSTILE(tensors_overlap)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 8, 1, 224);
}
HOSTILE(tensors_at_the_same_place)
{
    maker_tensor(m, "evil.weight", QUANT_F32, 64, 1, 0);
}
HOSTILE(expert_count_against_stack)
{
    maker_key_u32(m, "llama.expert_count", 8);
    m->data_bytes = 1 << 12;
    maker_tensor3(m, "blk.0.ffn_up_exps.weight", 8, 8, 7, 512);
}
HOSTILE(expert_count_against_router)
{
    maker_key_u32(m, "llama.expert_count", 8);
    m->data_bytes = 1 << 12;
    maker_tensor(m, "blk.0.ffn_gate_inp.weight", QUANT_F32, 8, 9, 512);
}
HOSTILE(expert_count_against_bias)
{
    maker_key_u32(m, "llama.expert_count", 8);
    m->data_bytes = 1 << 12;
    maker_tensor(m, "blk.0.exp_probs_b.bias", QUANT_F32, 16, 1, 512);
}
HOSTILE(more_experts_used_than_there_are)
{
    maker_key_u32(m, "llama.expert_count", 8);
    maker_key_u32(m, "llama.expert_used_count", 9);
}
HOSTILE(expert_count_of_wrong_type)
{
    maker_key_str(m, "llama.expert_count", "8");
}
HOSTILE(split_without_count)
{
    maker_key_u32(m, "split.no", 3);
}
HOSTILE(split_count_beyond_any)
{
    maker_key_u32(m, "split.count", 100000);
}
HOSTILE(split_file_with_a_plain_name)
{
    maker_key_u32(m, "split.no", 0);
    maker_key_u32(m, "split.count", 2);
}
HOSTILE(escapes_in_names)
{
    maker_tensor(m, "\033[2Jevil", 99, 32, 1, 0);
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

START_TEST(hostile_file_is_refused_by_name_and_numbers)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    uint64_t before = maker_live_bytes();

    maker_init(&m);
    hostile[_i].make(&m);
    maker_finish(&m, &file);
    int rc = maker_open_bytes(&file, &g);
    ck_assert_msg(rc == hostile[_i].rc, "%s: %d: %s", hostile[_i].name, rc, err_text());
    ck_assert_ptr_null(g);
    ck_assert_msg(strncmp(err_text(), "m.gguf: ", 8) == 0, "%s: %s", hostile[_i].name, err_text());
    for (int i = 0; i < 3 && hostile[_i].text[i]; i++)
        ck_assert_msg(strstr(err_text(), hostile[_i].text[i]) != NULL, "%s: no '%s' in: %s", hostile[_i].name,
                      hostile[_i].text[i], err_text());
    ck_assert_uint_eq(maker_live_bytes(), before);
}
END_TEST

START_TEST(file_cut_anywhere_is_refused)
{
    struct maker m;
    struct bytes file;
    struct gguf *g;
    uint64_t before = maker_live_bytes();

    maker_init(&m);
    maker_finish(&m, &file);
    for (size_t n = file.n; n-- > 0;) {
        /* A copy that ends where it ends: a sanitizer sees any step beyond. */
        struct memfiles files = {0};
        struct file_ops ops = memfile_ops(&files);
        unsigned char *cut = malloc(n + !n);
        memcpy(cut, file.p, n);
        memfile_add(&files, "m.gguf", cut, n);
        int rc = gguf_open("m.gguf", &ops, &g);
        ck_assert_msg(rc == ERR_FORMAT, "cut to %zu bytes: %d: %s", n, rc, err_text());
        ck_assert_uint_eq(maker_live_bytes(), before);
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

    maker_init(&m);
    maker_key_array(&m, "evil.array", GGUF_U8, (uint64_t)1 << 39);
    maker_finish(&m, &file);
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

int main(void)
{
    Suite *suite = suite_create("gguf_hostile");
    TCase *tc = tcase_create("gguf_hostile");

    tcase_add_loop_test(tc, hostile_file_is_refused_by_name_and_numbers, 0, (int)(sizeof hostile / sizeof hostile[0]));
    tcase_add_test(tc, file_cut_anywhere_is_refused);
    tcase_add_test(tc, header_beyond_every_model_is_refused_before_it_is_read);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
