/* Grammars against llama.cpp's (tests/gen/grammar_vectors.py), schemas against the jsonschema package (tests/gen/schema_vectors.py), and
 * both against texts that mean harm. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "src/model/grammar.h"
#include "src/model/grammar_walk.h"
#include "src/model/json_room.h"
#include "src/model/tok.h"
#include "src/model/tok_trie.h"
#include "src/run/constraint.h"
#include "tests/live_bytes.h"
#include "tests/run_suite.h"

#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static json_t *load(const char *name)
{
    char path[1024];
    json_error_t e;
    snprintf(path, sizeof path, "%s/grammar/%s", TEST_DATA_DIR, name);
    json_t *root = json_load_file(path, 0, &e);
    ck_assert_msg(root != NULL, "%s:%d: %s", path, e.line, e.text);
    return root;
}

static struct tok *open_vocab(struct tok_trie **trie)
{
    struct gguf *g = NULL;
    struct tok *tok = NULL;
    ck_assert_msg(gguf_open(TEST_DATA_DIR "/grammar/vocab.gguf", NULL, &g) == 0, "%s", err_text());
    ck_assert_msg(tok_from_gguf(g, &tok) == 0, "%s", err_text());
    gguf_close(g);
    ck_assert_int_eq(tok_trie_make(tok, trie), 0);
    return tok;
}

static int make(const char *text, struct grammar **g)
{
    err_clear();
    return grammar_gbnf(text, strlen(text), g);
}

/* How far a text goes in a grammar: its length, or the first byte that does not fit; -1 - length: all fits, and it is whole. */
static long walk(const struct grammar *g, const char *text, size_t n)
{
    struct grammar_walk *w;
    ck_assert_int_eq(grammar_walk_make(g, &w), 0);
    int32_t state = grammar_walk_start(w, g->root);
    size_t i = 0;
    for (; i < n && state != GRAMMAR_WALK_DEAD; i++) {
        state = grammar_walk_step(w, state, (uint8_t)text[i]);
        ck_assert_msg(state >= 0, "%s", err_text());
    }
    long out = state == GRAMMAR_WALK_DEAD ? (long)i - 1 : grammar_walk_accepts(w, state) ? -1 - (long)n : (long)n;
    grammar_walk_free(w);
    return out;
}

static bool accepts(const struct grammar *g, const char *text)
{
    return walk(g, text, strlen(text)) < 0;
}

/* ---- against llama.cpp ---- */

static bool is_in(const json_t *ranges, int id)
{
    for (size_t i = 0; i < json_array_size(ranges); i++)
        if (id >= json_integer_value(json_array_get(json_array_get(ranges, i), 0)) &&
            id <= json_integer_value(json_array_get(json_array_get(ranges, i), 1)))
            return true;
    return false;
}

static void check_step(struct constraint_view *v, const struct tok *tok, const json_t *step, const char *grammar,
                       size_t i)
{
    struct sample_filter f = constraint_filter(v);
    const uint64_t *bits;
    for (int32_t id = 1; id < tok_n_vocab(tok); id++) { /* llama.cpp never takes the zero byte, which is token 0 */
        bool want = tok_is_eog(tok, id) ? json_is_true(json_object_get(step, "end"))
                                        : is_in(json_object_get(step, "allowed"), id);
        ck_assert_msg(f.allows(f.arg, id) == want, "%s: token %d at step %zu should be %d", grammar, id, i, want);
    }
    ck_assert_int_eq(f.all(f.arg, &bits), 0);
    for (int32_t id = 0; id < tok_n_vocab(tok); id++)
        ck_assert_int_eq(bits[id / 64] >> id % 64 & 1, f.allows(f.arg, id));
}

START_TEST(next_tokens_are_not_those_of_llama_cpp)
{
    struct tok_trie *trie;
    struct tok *tok = open_vocab(&trie);
    json_t *cases = load("gbnf.json"), *c, *steps, *step;
    size_t i, k, n, n_steps = 0;
    json_array_foreach(cases, i, c)
    {
        const char *text = json_string_value(json_object_get(c, "grammar"));
        struct constraint *constraint;
        struct grammar *g;
        ck_assert_msg(make(text, &g) == 0, "%s: %s", text, err_text());
        ck_assert_int_eq(constraint_make(g, tok, trie, tok_n_vocab(tok), &constraint), 0);
        json_array_foreach(json_object_get(c, "walks"), k, steps)
        {
            int32_t token[32];
            struct constraint_at at = {.thought = CONSTRAINT_NO_THOUGHT};
            struct constraint_view view = {constraint, &at};
            json_array_foreach(steps, n, step)
            {
                ck_assert_msg(constraint_follow(constraint, &at, token, n) == 0, "%s", err_text());
                check_step(&view, tok, step, text, n);
                token[n] = (int32_t)json_integer_value(json_object_get(step, "token"));
                n_steps++;
            }
        }
        constraint_drop(constraint);
    }
    ck_assert_uint_gt(n_steps, 500);
    json_decref(cases);
    tok_trie_free(trie);
    tok_free(tok);
}
END_TEST

/* ---- against jsonschema ---- */

START_TEST(document_is_taken_that_the_schema_does_not_hold_of)
{
    json_t *cases = load("schema.json"), *c, *text;
    size_t i, k, n = 0;
    json_array_foreach(cases, i, c)
    {
        char *schema = json_dumps(json_object_get(c, "schema"), JSON_ENCODE_ANY);
        struct grammar *g;
        ck_assert_msg(grammar_schema(schema, strlen(schema), &g) == 0, "%s: %s", schema, err_text());
        json_array_foreach(json_object_get(c, "must"), k, text)
            ck_assert_msg(accepts(g, json_string_value(text)), "%s: %s", schema, json_string_value(text));
        json_array_foreach(json_object_get(c, "never"), k, text)
        {
            ck_assert_msg(!accepts(g, json_string_value(text)), "%s: not %s", schema, json_string_value(text));
            n++;
        }
        grammar_free(g);
        free(schema);
    }
    ck_assert_uint_gt(n, 1000);
    json_decref(cases);
}
END_TEST

START_TEST(any_object_is_none)
{
    struct grammar *g;
    ck_assert_int_eq(grammar_schema_object(&g), 0);
    ck_assert(accepts(g, "{}"));
    ck_assert(accepts(g, "{\n  \"a\": [1, {\"b\": -0.5e3}, \"\\u00e9\\ud83d\\ude00\"],\n  \"\": null\n}"));
    ck_assert(!accepts(g, "[]"));
    ck_assert(!accepts(g, "{\"a\": \"\\ud83d\"}"));
    ck_assert(!accepts(g, "{\"a\": 01}"));
    grammar_free(g);
}
END_TEST

/* ---- what is refused ---- */

START_TEST(wrong_grammar_is_taken_or_not_said_where)
{
    static const struct {
        const char *text;
        int code;
        const char *says;
    } rows[] = {
        {"", ERR_FORMAT, "no rule \"root\""},
        {"root = \"a\"", ERR_FORMAT, "line 1, column 6: ::= is expected"},
        {"root ::= \"a\"\nb ::= [z-a]", ERR_FORMAT, "line 2, column 8: the range ends before it begins"},
        {"root ::= \"é\\q\"", ERR_FORMAT, "line 1, column 13: there is no such escape"},
        {"root ::= \"a", ERR_FORMAT, "line 1, column 12: the text ends"},
        {"root ::= [a", ERR_FORMAT, "line 1, column 12: the text ends"},
        {"root ::= (\"a\"", ERR_FORMAT, "line 1, column 14: a ) is missing"},
        {"root ::= \"a\")", ERR_FORMAT, "line 1, column 13: this is not expected"},
        {"root ::= *", ERR_FORMAT, "line 1, column 10: nothing stands before *"},
        {"root ::= \"a\"{3,2}", ERR_FORMAT, "at least 3 and at most 2"},
        {"root ::= \"a\"{2", ERR_FORMAT, "a } is missing"},
        {"root ::= \"a\"{9999999}", ERR_LIMIT, "more than 1000000 times"},
        {"root ::= []", ERR_FORMAT, "no character is in []"},
        {"root ::= \"\\ud800\"", ERR_FORMAT, "U+D800 is no character"},
        {"root ::= \"\\xg0\"", ERR_FORMAT, "hexadecimal"},
        {"root ::= \"\xff\"", ERR_FORMAT, "no UTF-8"},
        {"root ::= <think> \"a\"", ERR_UNSUPPORTED, "line 1, column 10: tokens"},
        {"root ::= !<[7]>", ERR_UNSUPPORTED, "tokens"},
        {"root ::= a_b", ERR_FORMAT, "line 1, column 11: this is not expected"},
        {"root ::= \"a\"\nroot ::= \"b\"", ERR_FORMAT, "line 2, column 1: rule \"root\" is defined twice"},
        {"root ::= a", ERR_FORMAT, "rule \"a\" is called, but not defined"},
        {"root ::= root \"a\" | \"b\"", ERR_FORMAT, "rule \"root\" calls itself before anything was read"},
        {"root ::= n a\nn ::= \"\" | \"x\"\na ::= (n n root)* \"b\"", ERR_FORMAT, "left recursion"},
        {"root ::= \"a\" root", ERR_FORMAT, "rule \"root\" derives no text"},
        {"root ::= \"a\" | b\nb ::= \"c\" d\nd ::= \"(\" b \")\"", ERR_FORMAT, "derives no text"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint64_t live = live_bytes();
        struct grammar *g = (struct grammar *)1;
        ck_assert_msg(make(rows[i].text, &g) == rows[i].code, "%s: %s", rows[i].text, err_text());
        ck_assert_ptr_null(g);
        ck_assert_msg(strstr(err_text(), rows[i].says) != NULL, "%s: %s", rows[i].text, err_text());
        ck_assert_uint_eq(live_bytes(), live);
    }
}
END_TEST

START_TEST(keyword_is_passed_over)
{
    static const struct {
        const char *text;
        int code;
        const char *says;
    } rows[] = {
        {"{", ERR_FORMAT, "not JSON"},
        {"[1]", ERR_FORMAT, "at #: a schema has to be an object"},
        {"{\"type\":\"object\",\"properties\":{\"n\":{\"multipleOf\":3}}}", ERR_UNSUPPORTED,
         "at #/properties/n: \"multipleOf\" is not supported"},
        {"{\"$defs\":{\"x\":{\"not\":{}}},\"items\":{\"$ref\":\"#/$defs/x\"}}", ERR_UNSUPPORTED,
         "at #/$defs/x: \"not\" is not supported"},
        {"{\"nullable\":true}", ERR_UNSUPPORTED, "\"nullable\""},
        {"{\"type\":\"float\"}", ERR_FORMAT, "\"type\" has to be"},
        {"{\"type\":\"array\",\"uniqueItems\":true}", ERR_UNSUPPORTED, "\"uniqueItems\""},
        {"{\"items\":[{}]}", ERR_UNSUPPORTED, "prefixItems"},
        {"{\"contains\":{}}", ERR_UNSUPPORTED, "\"contains\""},
        {"{\"patternProperties\":{}}", ERR_UNSUPPORTED, "\"patternProperties\""},
        {"{\"format\":\"email\"}", ERR_UNSUPPORTED, "\"format\": \"email\""},
        {"{\"type\":\"string\",\"format\":\"date\",\"minLength\":3}", ERR_UNSUPPORTED, "only one is supported"},
        {"{\"pattern\":\"(?=a)\"}", ERR_UNSUPPORTED, "at #: the pattern, at byte 3"},
        {"{\"pattern\":\"a\\\\b\"}", ERR_UNSUPPORTED, "the escape \\b"},
        {"{\"pattern\":\"(a)\\\\1\"}", ERR_UNSUPPORTED, "the escape \\1"},
        {"{\"pattern\":\"(^a)\"}", ERR_UNSUPPORTED, "^ is supported at the very beginning"},
        {"{\"pattern\":\"a)\"}", ERR_FORMAT, "a ) without its ("},
        {"{\"pattern\":\"(a\"}", ERR_FORMAT, "a ) is missing"},
        {"{\"pattern\":\"[z-a]\"}", ERR_FORMAT, "the range ends before it begins"},
        {"{\"pattern\":\"+\"}", ERR_FORMAT, "nothing stands before +"},
        {"{\"pattern\":\"[]\"}", ERR_FORMAT, "a set of the pattern is empty"},
        {"{\"type\":\"number\",\"minimum\":0.5}", ERR_UNSUPPORTED, "\"minimum\" that is no whole number"},
        {"{\"type\":\"integer\",\"minimum\":5,\"maximum\":4}", ERR_FORMAT, "no number is within the bounds"},
        {"{\"type\":\"integer\",\"maximum\":1e20}", ERR_UNSUPPORTED, "digits"},
        {"{\"minimum\":true}", ERR_FORMAT, "\"minimum\" has to be a number"},
        {"{\"minLength\":-1}", ERR_FORMAT, "\"minLength\" has to be a whole number"},
        {"{\"maxItems\":1e9}", ERR_LIMIT, "\"maxItems\" is 1000000000"},
        {"{\"minItems\":2,\"prefixItems\":[{}],\"items\":false}", ERR_FORMAT, "\"minItems\" is 2"},
        {"{\"enum\":[]}", ERR_FORMAT, "no value of \"enum\""},
        {"{\"enum\":[1],\"type\":\"string\"}", ERR_FORMAT, "no value of \"enum\" is of the type"},
        {"{\"enum\":[\"a\"],\"minLength\":3}", ERR_UNSUPPORTED, "\"minLength\" beside \"enum\""},
        {"{\"anyOf\":[{}],\"properties\":{}}", ERR_UNSUPPORTED, "\"properties\" beside \"anyOf\""},
        {"{\"anyOf\":[]}", ERR_FORMAT, "\"anyOf\" has to be a list"},
        {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}", ERR_UNSUPPORTED,
         "schemas 0 and 1 may both hold"},
        {"{\"allOf\":[{},{}]}", ERR_UNSUPPORTED, "\"allOf\" of 2"},
        {"{\"$ref\":\"other.json#/x\"}", ERR_UNSUPPORTED, "only pointers within the schema"},
        {"{\"$ref\":\"#/$defs/y\"}", ERR_FORMAT, "\"#/$defs/y\" is not there"},
        {"{\"$ref\":\"#\"}", ERR_FORMAT, "rule \"#\" derives no text"},
        {"{\"properties\":{\"a\":{\"$ref\":\"#/$defs/b\"}},\"$defs\":{\"b\":{\"properties\":{\"c\":{\"$ref\":\"#/$defs/"
         "b\"}},"
         "\"required\":[\"c\"]}}}",
         ERR_FORMAT, "rule \"#/$defs/b\" derives no text"},
        {"{\"$defs\":{\"a\":{\"anyOf\":[{\"$ref\":\"#/$defs/a\"},{\"type\":\"null\"}]}},\"$ref\":\"#/$defs/a\"}",
         ERR_FORMAT, "rule \"#/$defs/a\" calls itself"},
        {"{\"properties\":{\"a\":false}}", ERR_FORMAT, "at #/properties/a: nothing can stand here"},
        {"{\"required\":[\"b\"],\"additionalProperties\":false}", ERR_FORMAT, "\"b\" is required"},
        {"{\"required\":\"b\"}", ERR_FORMAT, "\"required\" a list"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint64_t live = live_bytes();
        struct grammar *g = (struct grammar *)1;
        ck_assert_msg(grammar_schema(rows[i].text, strlen(rows[i].text), &g) == rows[i].code, "%s: %s", rows[i].text,
                      err_text());
        ck_assert_ptr_null(g);
        ck_assert_msg(strstr(err_text(), rows[i].says) != NULL, "%s: %s", rows[i].text, err_text());
        ck_assert_uint_eq(live_bytes(), live);
    }
}
END_TEST

/* ---- what means harm ---- */

static char *repeat(const char *what, size_t n)
{
    size_t len = strlen(what);
    char *s = malloc(n * len + 1);
    for (size_t i = 0; i < n; i++)
        memcpy(s + i * len, what, len);
    s[n * len] = '\0';
    return s;
}

static char *join(const char *a, const char *b, const char *c)
{
    char *s = malloc(strlen(a) + strlen(b) + strlen(c) + 1);
    return strcat(strcat(strcpy(s, a), b), c);
}

START_TEST(deep_or_large_grammar_takes_the_stack_or_all_memory)
{
    static const struct {
        const char *before, *what, *behind;
        size_t n;
        int code;
    } rows[] = {
        {"root ::= ", "(", "", 1000000, ERR_LIMIT},
        {"root ::= ", "\"ab\" ", "", 600000, ERR_LIMIT},
        {"root ::= \"a\"", "{1000}", "", 7, 0}, /* a rule for each */
        {"root ::= \"a\"", "{1000000}", "", 1, ERR_LIMIT},
        {"root ::= \"a\" | \"a", "\\\\", "\"", 2000000, ERR_LIMIT},
        {"root ::= \"a\"\n", "b::=b b\n", "", 1, ERR_FORMAT},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char *many = repeat(rows[i].what, rows[i].n), *text = join(rows[i].before, many, rows[i].behind);
        struct grammar *g;
        ck_assert_msg(make(text, &g) == rows[i].code, "row %zu: %s", i, err_text());
        grammar_free(g);
        free(text);
        free(many);
    }
    char *many = repeat("{\"items\":", 70), *end = repeat("}", 70), *text = join(many, "{}", end);
    struct grammar *g;
    ck_assert_int_eq(grammar_schema(text, strlen(text), &g), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "more than 64 schemas within each other"));
    free(text);
    free(end);
    free(many);
}
END_TEST

/* A chain of rules, each of which calls the next: no recursion over it, and time that goes with its length. */
START_TEST(long_chain_of_rules_takes_the_stack)
{
    enum { N = 100000 };
    char *text = malloc(N * 40), *at = text;
    struct grammar *g;
    at += sprintf(at, "root ::= r0\n");
    for (int i = 0; i < N; i++)
        at += sprintf(at, "r%d ::= \"a\"? r%d\n", i, i + 1);
    sprintf(at, "r%d ::= \"b\"\n", N);
    ck_assert_msg(make(text, &g) == 0, "%s", err_text());
    struct grammar_walk *w;
    ck_assert_int_eq(grammar_walk_make(g, &w), 0);
    /* All of them are entered before the first byte: more places than are kept. */
    ck_assert_int_eq(grammar_walk_start(w, g->root), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err_text(), "too ambiguous"));
    grammar_walk_free(w);
    grammar_free(g);
    free(text);
}
END_TEST

/* Two ways on at each byte; a recognizer that keeps stacks apart has 2^n of them. */
START_TEST(ambiguous_grammar_takes_all_time)
{
    enum { N = 2000 };
    char *as = repeat("a", N), *bcs = repeat("bc", N / 2), *text = join(as, "d", bcs);
    struct grammar *g;
    ck_assert_int_eq(make("root ::= \"a\" root \"b\" | \"a\" root \"c\" | \"d\"", &g), 0);
    ck_assert(accepts(g, text));
    ck_assert_int_eq(walk(g, text, 2 * N), 2 * N);
    text[2 * N] = 'x';
    ck_assert_int_eq(walk(g, text, 2 * N + 1), 2 * N);
    grammar_free(g);
    ck_assert_int_eq(
        make("root ::= s s s s s s s s s s s s s s s s s s s s \"!\"\ns ::= [a-z]* | s2\ns2 ::= \"a\"*", &g), 0);
    ck_assert_int_eq(walk(g, as, N), N);
    grammar_free(g);
    free(text);
    free(bcs);
    free(as);
}
END_TEST

/* A list that calls itself at its end takes no more room for being long. */
START_TEST(long_list_takes_room)
{
    enum { N = 100000 };
    char *text = repeat("a,", N);
    struct grammar *g;
    struct grammar_walk *w;
    ck_assert_int_eq(make("root ::= item \",\" root | item\nitem ::= \"a\" | \"(\" root \")\"", &g), 0);
    ck_assert_int_eq(grammar_walk_make(g, &w), 0);
    int32_t state = grammar_walk_start(w, g->root);
    for (int i = 0; i < 2 * N; i++)
        state = grammar_walk_step(w, state, (uint8_t)text[i]);
    ck_assert_int_gt(state, 0);
    ck_assert_uint_lt(w->states.n, 10);
    grammar_walk_free(w);
    grammar_free(g);
    free(text);
}
END_TEST

/* Nested so deep that states are forgotten on the way: whoever follows his text anew stands where he stood. */
START_TEST(forgotten_states_change_what_may_come)
{
    enum { N = 340000 };
    struct tok_trie *trie;
    struct tok *tok = open_vocab(&trie);
    struct constraint *c;
    struct grammar *g;
    int32_t *token = malloc(N * sizeof *token);
    struct constraint_at at = {.thought = CONSTRAINT_NO_THOUGHT}, early = at;
    struct constraint_view view = {c, &at}, early_view = {c, &early};
    ck_assert_int_eq(make("root ::= \"(\" root \")\" | \"[\" root \"]\" | \"x\"", &g), 0);
    ck_assert_int_eq(constraint_make(g, tok, trie, tok_n_vocab(tok), &c), 0);
    view.c = early_view.c = c;
    int32_t open[2] = {tok_find(tok, "(", 1), tok_find(tok, "[", 1)};
    int32_t close[2] = {tok_find(tok, ")", 1), tok_find(tok, "]", 1)};
    int n = 0;
    for (; n < N / 2 - 1; n++) {
        token[n] = open[n * 7 % 5 > 2];
        if (n % 1000 == 0)
            ck_assert_msg(constraint_follow(c, &at, token, (size_t)n) == 0, "%s", err_text());
        if (n == 10)
            ck_assert_int_eq(constraint_follow(c, &early, token, (size_t)n), 0);
    }
    token[n++] = tok_find(tok, "x", 1);
    uint32_t first_epoch = early.epoch;
    for (int i = n - 2; i >= 0; i--) {
        token[n] = close[token[i] == open[1]];
        if (n % 10007 == 0 || i == 0) {
            ck_assert_msg(constraint_follow(c, &at, token, (size_t)n) == 0, "%s", err_text());
            struct sample_filter f = constraint_filter(&view);
            ck_assert_int_eq(f.allows(f.arg, token[n]), 1);
            ck_assert_int_eq(f.allows(f.arg, close[token[i] != open[1]]), 0);
        }
        n++;
    }
    ck_assert_int_eq(constraint_follow(c, &at, token, (size_t)n), 0);
    ck_assert(constraint_is_done(c, &at));
    ck_assert_uint_ne(at.epoch, first_epoch);
    ck_assert_int_eq(constraint_follow(c, &early, token, 10), 0);
    ck_assert_uint_ne(early.epoch, first_epoch);
    struct sample_filter f = constraint_filter(&early_view);
    ck_assert_int_eq(f.allows(f.arg, open[0]), 1);
    ck_assert_int_eq(f.allows(f.arg, close[0]), 0);
    constraint_drop(c);
    tok_trie_free(trie);
    tok_free(tok);
    free(token);
}
END_TEST

/* ---- without memory ---- */

static const char schema_text[] = "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"string\",\"maxLength\":40},"
                                  "\"b\":{\"$ref\":\"#/$defs/t\"},\"c\":{\"type\":"
                                  "[\"number\",\"null\"],\"minimum\":-3,\"maximum\":777},\"d\":{\"pattern\":\"^a{2,70}["
                                  "^b]\"}},\"required\":[\"z\",\"b\"],"
                                  "\"additionalProperties\":{\"enum\":[1,\"x\",2.5,{\"k\":[]}]},\"$defs\":{\"t\":{"
                                  "\"type\":\"array\",\"prefixItems\":[{\"const\":true}],"
                                  "\"items\":{\"anyOf\":[{\"$ref\":\"#/$defs/t\"},{\"format\":\"date\"}]}}}}";

static const char gbnf_text[] =
    "root ::= (item \",\"){2,70} name?\nitem ::= [a-zé-ü日] | \"(\" root \")\" | name\nname ::= \"n\" [0-9]{1,3}\n";

/* All that a grammar is used for, with one allocation that fails; 0 or the code. */
static int use(bool is_schema, const struct tok *tok, const struct tok_trie *trie)
{
    struct constraint *c = NULL;
    struct grammar *g = NULL;
    struct constraint_at at = {.thought = CONSTRAINT_NO_THOUGHT};
    int rc = is_schema ? grammar_schema(schema_text, sizeof schema_text - 1, &g)
                       : grammar_gbnf(gbnf_text, sizeof gbnf_text - 1, &g);
    if (rc)
        return rc;
    rc = constraint_make(g, tok, trie, tok_n_vocab(tok), &c);
    if (rc)
        return rc;
    struct constraint_view view = {c, &at};
    struct sample_filter f = constraint_filter(&view);
    const char *text = is_schema ? "{\"a\": \"xyz\", \"b\": [true, [true, \"2024-01-01\"]]" : "a,n7,(a,b,),";
    int32_t token[64];
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i++)
        token[i] = (uint8_t)text[i];
    for (size_t i = 0; i <= n && !rc; i += 3) {
        const uint64_t *bits;
        rc = constraint_follow(c, &at, token, i);
        if (!rc)
            rc = f.all(f.arg, &bits);
    }
    constraint_drop(c);
    return rc;
}

START_TEST(failed_allocation_leaks_or_is_taken_for_a_wrong_text)
{
    struct tok_trie *trie;
    struct tok *tok = open_vocab(&trie);
    bool reached = true;
    json_room_begin();
    ck_assert_msg(use(_i, tok, trie) == 0, "%s", err_text());
    for (uint64_t n = 1; reached; n++) {
        uint64_t live = live_bytes();
        mem_fail_nth(n);
        int rc = use(_i, tok, trie);
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        ck_assert_msg(rc == (reached ? ERR_NOMEM : 0), "allocation %llu: %d, %s", (unsigned long long)n, rc,
                      err_text());
        ck_assert_msg(live_bytes() == live, "allocation %llu leaks", (unsigned long long)n);
        ck_assert(reached || n > 30);
    }
    tok_trie_free(trie);
    reached = true;
    for (uint64_t n = 1; reached; n++) {
        mem_fail_nth(n);
        int rc = tok_trie_make(tok, &trie);
        reached = mem_n_calls() >= n;
        mem_fail_nth(0);
        ck_assert_int_eq(rc, reached ? ERR_NOMEM : 0);
    }
    tok_trie_free(trie);
    tok_free(tok);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("grammar");
    TCase *t = tcase_create("grammar");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, next_tokens_are_not_those_of_llama_cpp);
    tcase_add_test(t, document_is_taken_that_the_schema_does_not_hold_of);
    tcase_add_test(t, any_object_is_none);
    tcase_add_test(t, wrong_grammar_is_taken_or_not_said_where);
    tcase_add_test(t, keyword_is_passed_over);
    tcase_add_test(t, deep_or_large_grammar_takes_the_stack_or_all_memory);
    tcase_add_test(t, long_chain_of_rules_takes_the_stack);
    tcase_add_test(t, ambiguous_grammar_takes_all_time);
    tcase_add_test(t, long_list_takes_room);
    tcase_add_test(t, forgotten_states_change_what_may_come);
    tcase_add_loop_test(t, failed_allocation_leaks_or_is_taken_for_a_wrong_text, 0, 2);
    suite_add_tcase(suite, t);
    return run_suite(suite);
}
