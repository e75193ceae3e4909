/* Tokenizers against the ids that outside programs give (tests/gen/tok_vectors.py), and against files that lie. */
#include "src/base/err.h"
#include "src/base/log.h"
#include "src/base/mem.h"
#include "src/model/tok.h"
#include "tests/run_suite.h"

#include <check.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A vocabulary read from JSON. */
struct vocab {
    json_t *root;
    struct tok_source src;
    struct tok_str *tokens, *merges;
    float *scores;
    int32_t *types;
};

static int64_t id_of(const json_t *root, const char *key)
{
    const json_t *j = json_object_get(root, key);
    return json_is_integer(j) ? json_integer_value(j) : TOK_UNSET;
}

static int flag_of(const json_t *root, const char *key)
{
    const json_t *j = json_object_get(root, key);
    return json_is_boolean(j) ? json_is_true(j) : TOK_UNSET;
}

static struct tok_str *strings(const json_t *array, int64_t *n)
{
    *n = (int64_t)json_array_size(array);
    struct tok_str *s = calloc((size_t)*n + 1, sizeof *s);
    for (int64_t i = 0; i < *n; i++) {
        const json_t *j = json_array_get(array, (size_t)i);
        s[i] = (struct tok_str){json_string_value(j), json_string_length(j)};
    }
    return s;
}

static void vocab_open(struct vocab *v, const char *name)
{
    char path[512];
    json_error_t e;
    snprintf(path, sizeof path, "%s/tok/%s.json", TEST_DATA_DIR, name);
    v->root = json_load_file(path, JSON_ALLOW_NUL, &e);
    ck_assert_msg(v->root != NULL, "%s:%d: %s", path, e.line, e.text);
    struct tok_source *src = &v->src;
    tok_source_init(src);
    src->model = json_string_value(json_object_get(v->root, "model"));
    src->pre = json_string_value(json_object_get(v->root, "pre"));
    src->name = json_string_value(json_object_get(v->root, "name"));
    v->tokens = strings(json_object_get(v->root, "tokens"), &src->n_tokens);
    v->merges = strings(json_object_get(v->root, "merges"), &src->n_merges);
    src->tokens = v->tokens;
    src->merges = v->merges;
    v->types = calloc((size_t)src->n_tokens, sizeof *v->types);
    v->scores = calloc((size_t)src->n_tokens, sizeof *v->scores);
    const char *types = json_string_value(json_object_get(v->root, "types"));
    const json_t *scores = json_object_get(v->root, "scores");
    for (int64_t i = 0; i < src->n_tokens; i++) {
        v->types[i] = types[i] - '0';
        v->scores[i] = (float)json_number_value(json_array_get(scores, (size_t)i));
    }
    src->types = v->types;
    src->n_types = src->n_tokens;
    if (scores) {
        src->scores = v->scores;
        src->n_scores = src->n_tokens;
    }
    src->bos = id_of(v->root, "bos");
    src->eos = id_of(v->root, "eos");
    src->eot = id_of(v->root, "eot");
    src->eom = id_of(v->root, "eom");
    src->unk = id_of(v->root, "unk");
    src->add_bos = flag_of(v->root, "add_bos");
    src->add_eos = flag_of(v->root, "add_eos");
    src->add_space_prefix = flag_of(v->root, "add_space_prefix");
}

static void vocab_close(struct vocab *v)
{
    free(v->tokens);
    free(v->merges);
    free(v->types);
    free(v->scores);
    json_decref(v->root);
}

static struct tok *make(const struct vocab *v)
{
    struct tok *tok = NULL;
    int rc = tok_make(&v->src, &tok);
    ck_assert_msg(rc == 0, "%s", err_text());
    return tok;
}

static void check_case(const struct tok *tok, const char *what, size_t i, const json_t *c)
{
    const json_t *text = json_object_get(c, "text"), *want = json_object_get(c, "ids");
    int32_t *ids = NULL;
    int64_t n = 0;
    unsigned flags = json_integer_value(json_object_get(c, "flags")) ? TOK_SPECIAL : 0;
    int rc = tok_encode(tok, json_string_value(text), json_string_length(text), flags, &ids, &n);
    ck_assert_msg(rc == 0, "%s", err_text());
    bool same = n == (int64_t)json_array_size(want);
    for (int64_t k = 0; k < n && same; k++)
        same = ids[k] == json_integer_value(json_array_get(want, (size_t)k));
    if (!same) {
        fprintf(stderr, "%s case %zu flags %u '%s'\n got", what, i, flags, json_string_value(text));
        for (int64_t k = 0; k < n; k++)
            fprintf(stderr, " %d", (int)ids[k]);
        fprintf(stderr, "\nwant");
        for (size_t k = 0; k < json_array_size(want); k++)
            fprintf(stderr, " %d", (int)json_integer_value(json_array_get(want, k)));
        fprintf(stderr, "\n");
    }
    ck_assert_msg(same, "%s case %zu", what, i);
    mem_free(ids);
}

static const char *const kinds[] = {"command-r", "deepseek-coder", "deepseek-llm", "falcon",  "gpt-2",
                                    "llama-bpe", "llama-spm",      "mpt",          "phi-3",   "qwen2",
                                    "qwen35",    "refact",         "starcoder",    "smollm2", "gemma3"};
#define N_KINDS ((int)(sizeof kinds / sizeof *kinds))

START_TEST(ids_differ_from_the_models_own_tokenizer)
{
    struct vocab v;
    vocab_open(&v, kinds[_i]);
    struct tok *tok = make(&v);
    size_t i;
    json_t *c;
    json_array_foreach(json_object_get(v.root, "cases"), i, c) check_case(tok, kinds[_i], i, c);
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(answers_end_at_other_tokens_than_in_llama_cpp)
{
    struct vocab v;
    vocab_open(&v, kinds[_i]);
    struct tok *tok = make(&v);
    const json_t *eog = json_object_get(v.root, "eog");
    for (int32_t id = 0; id < tok_n_vocab(tok); id++) {
        bool want = false;
        for (size_t k = 0; k < json_array_size(eog); k++)
            want |= json_integer_value(json_array_get(eog, k)) == id;
        ck_assert_msg(tok_is_eog(tok, id) == want, "%s token %d: eog %d", kinds[_i], (int)id, !want);
    }
    ck_assert(!tok_is_eog(tok, -1));
    ck_assert(!tok_is_eog(tok, tok_n_vocab(tok)));
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(pieces_differ_from_llama_cpp)
{
    struct vocab v;
    vocab_open(&v, kinds[_i]);
    struct tok *tok = make(&v);
    size_t i, k;
    json_t *c, *id;
    json_array_foreach(json_object_get(v.root, "decoded"), i, c)
    {
        char hex[4096] = "";
        size_t at = 0;
        json_array_foreach(json_object_get(c, "ids"), k, id)
        {
            const char *p;
            int n;
            ck_assert_int_eq(tok_piece(tok, (int32_t)json_integer_value(id), &p, &n), 0);
            for (int b = 0; b < n && at < sizeof hex - 2; b++, at += 2)
                snprintf(hex + at, 3, "%02x", (unsigned char)p[b]);
        }
        ck_assert_str_eq(hex, json_string_value(json_object_get(c, "hex")));
    }
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(split_of_a_pre_tokenizer_differs)
{
    struct vocab v;
    vocab_open(&v, "splits");
    char last[64] = "?";
    struct tok *tok = NULL;
    size_t i;
    json_t *c;
    log_to(NULL, NULL, LOG_WARN);
    json_array_foreach(json_object_get(v.root, "cases"), i, c)
    {
        v.src.pre = json_string_value(json_object_get(c, "pre"));
        if (strcmp(last, v.src.pre ? v.src.pre : "") != 0) {
            snprintf(last, sizeof last, "%s", v.src.pre ? v.src.pre : "");
            tok_free(tok);
            tok = make(&v);
        }
        check_case(tok, last, i, c);
    }
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(text_does_not_survive_the_way_there_and_back)
{
    static const char text[] = "Hello  world \n\t 123 caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 end ";
    struct vocab v;
    vocab_open(&v, kinds[_i]);
    struct tok *tok = make(&v);
    int32_t *ids;
    int64_t n, n_bytes;
    char *back;
    ck_assert_int_eq(tok_encode(tok, text, sizeof text - 1, 0, &ids, &n), 0);
    ck_assert_int_eq(tok_decode(tok, ids, n, TOK_TRIM, &back, &n_bytes), 0);
    ck_assert_str_eq(back, text);
    ck_assert_int_eq(n_bytes, (int64_t)sizeof text - 1);
    mem_free(back);
    mem_free(ids);
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

/* Feed bytes as byte tokens; what comes out. */
static void stream_bytes(const struct tok *tok, const char *bytes, char *out, bool *whole)
{
    struct tok_stream s;
    size_t at = 0;
    const char *p;
    int n;
    *whole = true;
    ck_assert_int_eq(tok_stream_init(&s, tok, 0), 0);
    for (; *bytes; bytes++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned char)*bytes);
        ck_assert_int_eq(tok_stream_push(&s, tok_find(tok, name, 6), &p, &n), 0);
        memcpy(out + at, p, (size_t)n);
        at += (size_t)n;
        *whole &= n != 1 || (unsigned char)*p < 0x80;
    }
    tok_stream_finish(&s, &p, &n);
    memcpy(out + at, p, (size_t)n);
    out[at + (size_t)n] = 0;
    tok_stream_done(&s);
}

START_TEST(stream_splits_a_character_or_passes_bad_bytes)
{
#define BAD "\xef\xbf\xbd"
    static const struct {
        const char *in, *out;
    } rows[] = {
        {"abc", "abc"},
        {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"},
        {"\xe2\x82\xac!", "\xe2\x82\xac!"},
        {"a\xe2\x82", "a" BAD}, /* never finished */
        {"\xe2\x82x", BAD "x"}, /* broken off */
        {"\xe2\xe2\x82\xac", BAD "\xe2\x82\xac"},
        {"\x80\xff", BAD BAD},
        {"\xc0\xaf", BAD BAD},                 /* long form */
        {"\xed\xa0\x80", BAD BAD BAD},         /* surrogate */
        {"\xf4\x90\x80\x80", BAD BAD BAD BAD}, /* past U+10FFFF */
        {"\xf0\x9f\x98", BAD},
        {"\xf0\x9f\x98\xc3\xa9", BAD "\xc3\xa9"},
        {"", ""},
    };
    struct vocab v;
    vocab_open(&v, "llama-spm");
    struct tok *tok = make(&v);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char out[64];
        bool whole;
        stream_bytes(tok, rows[i].in, out, &whole);
        ck_assert_msg(strcmp(out, rows[i].out) == 0, "row %zu", i);
        ck_assert_msg(whole, "row %zu", i);
    }
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(stream_shows_control_tokens_unasked_or_hides_them_when_asked)
{
    struct vocab v;
    vocab_open(&v, "smollm2");
    struct tok *tok = make(&v);
    int32_t end = tok_find(tok, "<|im_end|>", 10);
    int64_t n_bytes;
    char *text;
    ck_assert_int_ge(end, 0);
    ck_assert_int_eq(tok_type_of(tok, end), TOK_TYPE_CONTROL);
    ck_assert_int_eq(tok_decode(tok, &end, 1, 0, &text, &n_bytes), 0);
    ck_assert_str_eq(text, "");
    mem_free(text);
    ck_assert_int_eq(tok_decode(tok, &end, 1, TOK_SPECIAL, &text, &n_bytes), 0);
    ck_assert_str_eq(text, "<|im_end|>");
    mem_free(text);
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(bos_and_eos_are_missing_or_forced)
{
    struct vocab v;
    vocab_open(&v, "llama-spm");
    struct tok *tok = make(&v);
    int32_t *ids;
    int64_t n;
    ck_assert(tok_add_bos(tok) && !tok_add_eos(tok) && tok_add_space_prefix(tok));
    ck_assert_int_eq(tok_encode(tok, "", 0, TOK_BOS | TOK_EOS, &ids, &n), 0);
    ck_assert_int_eq(n, 2);
    ck_assert_int_eq(ids[0], tok_bos(tok));
    ck_assert_int_eq(ids[1], tok_eos(tok));
    mem_free(ids);
    ck_assert_int_eq(tok_encode(tok, "", 0, 0, &ids, &n), 0);
    ck_assert_int_eq(n, 0);
    ck_assert_ptr_nonnull(ids);
    mem_free(ids);
    tok_free(tok);
    v.src.bos = TOK_NONE;
    tok = make(&v);
    ck_assert_int_eq(tok_encode(tok, "a", 1, TOK_BOS, &ids, &n), ERR_ARG);
    ck_assert(!tok_add_bos(tok));
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(long_inputs_take_quadratic_time)
{
    /* One word, one run of spaces and the like, 1 MB each: with quadratic work a single one takes minutes and Check's
     * time limit ends it. */
    enum { N = 1000000 };
    static const char *const units[] = {"a", " ",    "\n",        "A", "7", "!", "\xcc\x81", "\xe4\xbb\x8a",
                                        "<", "\xff", "\t\xc2\xa0"};
    static const char *const vocabs[] = {"gpt-2",     "llama-bpe", "deepseek-llm", "deepseek-coder",
                                         "llama-spm", "gemma3",    "qwen35"};
    char *text = malloc(N + 8);
    for (size_t k = 0; k < sizeof vocabs / sizeof *vocabs; k++) {
        struct vocab v;
        vocab_open(&v, vocabs[k]);
        struct tok *tok = make(&v);
        size_t len = strlen(units[_i]);
        for (size_t at = 0; at + len <= N; at += len)
            memcpy(text + at, units[_i], len);
        text[N - 1] = 'x'; /* what \s+$ must not look for from everywhere */
        int32_t *ids;
        int64_t n;
        ck_assert_int_eq(tok_encode(tok, text, N, TOK_SPECIAL, &ids, &n), 0);
        ck_assert_int_gt(n, 0);
        mem_free(ids);
        tok_free(tok);
        vocab_close(&v);
    }
    free(text);
}
END_TEST

/* A vocabulary of special tokens that lie over each other; "x" to "z" are plain. */
static struct tok *make_overlaps(void)
{
    static const struct tok_str t[] = {{"x", 1}, {"y", 1}, {"z", 1}, {"xy", 2}, {"yzzz", 4}, {"zz", 2}, {"<s>", 3}};
    static const int32_t types[] = {1, 1, 1, 4, 4, 3, 3};
    struct tok_source src;
    struct tok *tok = NULL;
    tok_source_init(&src);
    src.model = "gpt2";
    src.pre = "gpt-2";
    src.tokens = t;
    src.types = types;
    src.n_tokens = src.n_types = 7;
    ck_assert_int_eq(tok_make(&src, &tok), 0);
    return tok;
}

START_TEST(overlapping_special_tokens_are_taken_in_the_wrong_order)
{
    static const struct {
        const char *text;
        unsigned flags;
        int n, ids[6];
    } rows[] = {
        {"xyzzz", 0, 2, {0, 4}},   /* the longest wins though it starts later */
        {"xyzz", 0, 3, {3, 2, 2}}, /* zz is control: only when asked */
        {"xyzz", TOK_SPECIAL, 2, {3, 5}},
        {"zzz", TOK_SPECIAL, 2, {5, 2}},
        {"x<s>", 0, 1, {0}}, /* '<', 's', '>' are no tokens here: they vanish */
        {"x<s>y", TOK_SPECIAL, 3, {0, 6, 1}},
        {"<s", TOK_SPECIAL, 0, {0}},
    };
    struct tok *tok = make_overlaps();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int32_t *ids;
        int64_t n;
        ck_assert_int_eq(tok_encode(tok, rows[i].text, strlen(rows[i].text), rows[i].flags, &ids, &n), 0);
        ck_assert_msg(n == rows[i].n, "row %zu: %d ids", i, (int)n);
        for (int k = 0; k < rows[i].n; k++)
            ck_assert_msg(ids[k] == rows[i].ids[k], "row %zu id %d", i, k);
        mem_free(ids);
    }
    tok_free(tok);
}
END_TEST

static void refuse(const struct vocab *v, int code, const char *word)
{
    struct tok *tok = NULL;
    uint64_t live = mem_live_bytes(MEM_TOK);
    ck_assert_int_eq(tok_make(&v->src, &tok), code);
    ck_assert_msg(strstr(err_text(), word) != NULL, "'%s' lacks '%s'", err_text(), word);
    ck_assert_ptr_null(tok);
    ck_assert_uint_eq(mem_live_bytes(MEM_TOK), live);
}

START_TEST(lying_vocabulary_is_taken_or_its_key_not_named)
{
    struct vocab v;
    vocab_open(&v, "llama-spm");
    const struct tok_source good = v.src;
    v.src.n_scores--;
    refuse(&v, ERR_FORMAT, "tokenizer.ggml.scores");
    v.src = good;
    v.src.n_types++;
    refuse(&v, ERR_FORMAT, "tokenizer.ggml.token_type");
    v.src = good;
    v.src.n_tokens = 0;
    refuse(&v, ERR_FORMAT, "tokenizer.ggml.tokens");
    v.src = good;
    v.src.bos = good.n_tokens;
    refuse(&v, ERR_FORMAT, "tokenizer.ggml.bos_token_id");
    v.src = good;
    v.src.eos = -7;
    refuse(&v, ERR_FORMAT, "tokenizer.ggml.eos_token_id");
    v.src = good;
    v.src.scores = NULL;
    refuse(&v, ERR_FORMAT, "tokenizer.ggml.scores");
    v.src = good;
    v.src.model = "t5";
    refuse(&v, ERR_UNSUPPORTED, "t5");
    v.src = good;
    v.types[5] = 9;
    refuse(&v, ERR_FORMAT, "token_type[5]");
    v.types[5] = 6;
    v.tokens[5] = (struct tok_str){"<0xg1>", 6};
    refuse(&v, ERR_FORMAT, "tokens[5]");
    v.types[5] = 1;
    v.scores[7] = NAN;
    refuse(&v, ERR_FORMAT, "scores[7]");
    vocab_close(&v);

    vocab_open(&v, "gpt-2");
    v.src.pre = "no-such-split";
    refuse(&v, ERR_UNSUPPORTED, "no-such-split");
    v.src.pre = "gpt-2";
    v.merges[3] = (struct tok_str){"ab", 2};
    refuse(&v, ERR_FORMAT, "merges[3]");
    vocab_close(&v);
}
END_TEST

static char warned[256];

static void catch_warning(enum log_level level, const char *text, void *arg)
{
    (void)level;
    (void)arg;
    snprintf(warned, sizeof warned, "%s", text);
}

START_TEST(missing_pre_tokenizer_is_used_silently)
{
    struct vocab v;
    vocab_open(&v, "gpt-2");
    v.src.pre = NULL;
    log_to(catch_warning, NULL, LOG_WARN);
    struct tok *tok = make(&v);
    ck_assert_ptr_nonnull(strstr(warned, "tokenizer.ggml.pre"));
    ck_assert_str_eq(tok_pre_name(tok), "default");
    tok_free(tok);
    vocab_close(&v);
}
END_TEST

START_TEST(failed_allocation_leaks_or_is_not_reported)
{
    static const char *const vocabs[] = {"gpt-2", "phi-3"};
    static const char text[] = "Hello <|endoftext|> w\xff\xf0\x9f\x98\x80rld \n\n 12345 <s> </s> <0x0A>";
    struct vocab v;
    vocab_open(&v, vocabs[_i]);
    uint64_t live = mem_live_bytes(MEM_TOK);
    bool failed = true;
    for (uint64_t nth = 1; failed; nth++) {
        struct tok *tok = NULL;
        int32_t *ids = NULL;
        int64_t n = 0, n_bytes;
        char *back = NULL;
        mem_fail_nth(nth);
        int rc = tok_make(&v.src, &tok);
        if (rc == 0)
            rc = tok_encode(tok, text, sizeof text - 1, TOK_SPECIAL, &ids, &n);
        if (rc == 0)
            rc = tok_decode(tok, ids, n, 0, &back, &n_bytes);
        failed = mem_n_calls() >= nth;
        mem_fail_nth(0);
        /* a failing JIT allocation of PCRE2 only costs speed */
        ck_assert_msg(rc == 0 || rc == ERR_NOMEM, "call %d: %s", (int)nth, err_text());
        ck_assert(rc == 0 || failed);
        mem_free(back);
        mem_free(ids);
        tok_free(tok);
        ck_assert_msg(mem_live_bytes(MEM_TOK) == live, "call %d leaks", (int)nth);
    }
    vocab_close(&v);
}
END_TEST

START_TEST(id_out_of_range_is_read)
{
    struct tok *tok = make_overlaps();
    const char *p;
    int n;
    int64_t n_bytes;
    char *text = NULL;
    const int32_t bad[] = {7};
    ck_assert_int_eq(tok_piece(tok, 7, &p, &n), ERR_ARG);
    ck_assert_int_eq(tok_text(tok, -1, &p, &n), ERR_ARG);
    ck_assert_int_eq(tok_decode(tok, bad, 1, 0, &text, &n_bytes), ERR_ARG);
    ck_assert_ptr_null(text);
    ck_assert_int_eq(tok_type_of(tok, 99), TOK_TYPE_UNDEFINED);
    ck_assert_int_eq(tok_find(tok, "nothing", 7), TOK_NONE);
    tok_free(tok);
    tok_free(NULL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tok");
    TCase *tc = tcase_create("tok");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, ids_differ_from_the_models_own_tokenizer, 0, N_KINDS);
    tcase_add_loop_test(tc, answers_end_at_other_tokens_than_in_llama_cpp, 0, N_KINDS);
    tcase_add_loop_test(tc, pieces_differ_from_llama_cpp, 0, N_KINDS);
    tcase_add_loop_test(tc, text_does_not_survive_the_way_there_and_back, 0, N_KINDS);
    tcase_add_test(tc, split_of_a_pre_tokenizer_differs);
    tcase_add_test(tc, stream_splits_a_character_or_passes_bad_bytes);
    tcase_add_test(tc, stream_shows_control_tokens_unasked_or_hides_them_when_asked);
    tcase_add_test(tc, bos_and_eos_are_missing_or_forced);
    tcase_add_loop_test(tc, long_inputs_take_quadratic_time, 0, 11);
    tcase_add_test(tc, overlapping_special_tokens_are_taken_in_the_wrong_order);
    tcase_add_test(tc, lying_vocabulary_is_taken_or_its_key_not_named);
    tcase_add_test(tc, missing_pre_tokenizer_is_used_silently);
    tcase_add_loop_test(tc, failed_allocation_leaks_or_is_not_reported, 0, 2);
    tcase_add_test(tc, id_out_of_range_is_read);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
