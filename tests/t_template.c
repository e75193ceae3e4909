/* Chat templates against jinja2 (tests/gen/template_vectors.py), and against templates that mean harm. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/template.h"
#include "tests/run_suite.h"

#include <check.h>
#include <dirent.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOW_S 1763856000

static json_t *load(const char *dir, const char *name)
{
    char path[1024];
    json_error_t e;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &e);
    ck_assert_msg(root != NULL, "%s:%d: %s", path, e.line, e.text);
    return root;
}

/* Render source with the messages of a case; the code of what failed. */
static int render(const json_t *source, const json_t *messages, bool prompt, const json_t *thinking, char **text,
                  size_t *n)
{
    struct template_message m[16];
    struct template_code *t = NULL;
    const struct template_var var = {
        .name = "enable_thinking", .kind = TEMPLATE_BOOL, .integer = json_is_true(thinking)};
    struct template_args args = {.messages = m,
                                 .n_messages = (int)json_array_size(messages),
                                 .add_generation_prompt = prompt,
                                 .bos = "<s>",
                                 .eos = "</s>",
                                 .vars = &var,
                                 .n_vars = thinking != NULL,
                                 .now_s = NOW_S};
    for (int i = 0; i < args.n_messages; i++) {
        const json_t *row = json_array_get(messages, (size_t)i);
        m[i].role = json_string_value(json_object_get(row, "role"));
        m[i].content = json_string_value(json_object_get(row, "content"));
    }
    int rc = template_make(json_string_value(source), json_string_length(source), &t);
    if (rc == 0)
        rc = template_render(t, &args, text, n);
    template_free(t);
    return rc;
}

static void check_case(const char *what, size_t i, const json_t *source, const json_t *messages, const json_t *c)
{
    char *text = NULL;
    size_t n = 0;
    err_clear();
    int rc = render(source, messages, !json_is_false(json_object_get(c, "prompt")), json_object_get(c, "thinking"),
                    &text, &n);
    const json_t *want = json_object_get(c, "text"), *refused = json_object_get(c, "refused");
    if (want) {
        ck_assert_msg(rc == 0, "%s case %zu: %s\n%s", what, i, err_text(),
                      json_string_length(source) < 300 ? json_string_value(source) : "");
        ck_assert_msg(n == json_string_length(want) && memcmp(text, json_string_value(want), n) == 0,
                      "%s case %zu\n%s\n got: %s\nwant: %s", what, i,
                      json_string_length(source) < 300 ? json_string_value(source) : "", text, json_string_value(want));
    } else if (refused) {
        ck_assert_msg(rc == ERR_ARG, "%s case %zu: code %d", what, i, rc);
        ck_assert_msg(strstr(err_text(), json_string_value(refused)) != NULL, "%s case %zu: '%s'", what, i, err_text());
    } else {
        ck_assert_msg(rc < 0 && rc != ERR_NOMEM && *err_text(), "%s case %zu: code %d for %s\n%s\n%s", what, i, rc,
                      json_string_value(json_object_get(c, "error")), json_string_value(source), text ? text : "");
    }
    mem_free(text);
}

static void check_folder(const char *dir)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    int n = 0;
    ck_assert_ptr_nonnull(d);
    while ((e = readdir(d)) != NULL) {
        size_t i;
        json_t *c;
        if (!strstr(e->d_name, ".json") || strcmp(e->d_name, "language.json") == 0)
            continue;
        json_t *root = load(dir, e->d_name);
        json_array_foreach(json_object_get(root, "cases"), i, c)
            check_case(e->d_name, i, json_object_get(root, "source"), json_object_get(c, "messages"), c);
        json_decref(root);
        n++;
    }
    closedir(d);
    ck_assert_int_gt(n, 20);
}

static const char *folder = TEST_DATA_DIR "/template";

START_TEST(prompt_of_a_real_template_differs_from_jinja2)
{
    check_folder(folder);
}
END_TEST

START_TEST(piece_of_the_language_differs_from_jinja2)
{
    json_t *root = load(TEST_DATA_DIR "/template", "language.json");
    size_t i;
    json_t *c;
    json_array_foreach(json_object_get(root, "cases"), i, c)
        check_case("language", i, json_object_get(c, "source"), json_object_get(root, "messages"), c);
    json_decref(root);
}
END_TEST

static int try(const char *source, size_t n)
{
    const struct template_message m = {"user", "hi"};
    const struct template_args args = {.messages = &m, .n_messages = 1, .now_s = NOW_S};
    struct template_code *t = NULL;
    char *text = NULL;
    size_t n_bytes;
    uint64_t live = mem_live_bytes(MEM_OTHER);
    err_clear();
    int rc = template_make(source, n, &t);
    if (rc == 0)
        rc = template_render(t, &args, &text, &n_bytes);
    template_free(t);
    mem_free(text);
    ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), live);
    return rc;
}

START_TEST(hostile_template_takes_all_time_or_memory_or_stack)
{
    static const char *const sources[] = {
        "{% for a in range(1000000) %}{% for b in range(1000000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(500) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% set ns.t = "
        "[ns.t, ns.t] %}{% endfor %}{{ ns.s == ns.t }}",
        "{{ 'a' * 100000000000 }}",
        "{{ 'a' * 60000000 * 60000000 }}",
        "{% for i in range(1000000) %}{{ "
        "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for i in range(1000000) %}{{ 'b' in s }}{% endfor %}",
        "{{ ('a' * 2000000 ~ 'b').rfind('a' * 1000000 ~ 'c') }}",
        "{{ ('a' * 8000000).strip('b' * 1000000 ~ 'a') }}",
        "{{ 2 ** 99999999999 }}",
        "{{ 9223372036854775807 + 1 }}",
        "{{ range(99999999999) }}",
        "{{ [1]|map('map', 'map', 'map')|list }}",
        "{{ 'x'|indent(100000000) }}",
        "{{ 99999999999999999999 }}",
    };
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        int rc = try(sources[i], strlen(sources[i]));
        ck_assert_msg(rc == ERR_LIMIT || (rc == ERR_FORMAT && i == 17), "source %zu: %d %s", i, rc, err_text());
    }
}
END_TEST

START_TEST(deep_nesting_overflows_the_stack)
{
    static const char *const units[] = {"(",    "[",      "{'a':", "-",    "not ",  "x if ",  "a + ", "a.b",
                                        "a[0]", "a|trim", "a(",    "a ~ ", "a or ", "a and ", "f("};
    static const char *const blocks[] = {"{% if 1 %}",      "{% for x in y %}",  "{% macro f() %}",
                                         "{% set x %}",     "{% filter trim %}", "{% if 1 %}{% elif 1 %}",
                                         "{% generation %}"};
    size_t n = 900000;
    char *text = malloc(n + 64);
    for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
        size_t len = strlen(units[u]), at = (size_t)sprintf(text, "{{ ");
        while (at + len < n) {
            memcpy(text + at, units[u] + (u >= 7 && u <= 9 && at > 3 ? 1 : 0), len);
            at += len - (u >= 7 && u <= 9 && at > 3 ? 1 : 0);
        }
        at += (size_t)sprintf(text + at, "a }}");
        ck_assert_msg(try(text, at) < 0, "unit %zu", u);
    }
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
        size_t len = strlen(blocks[b]), at = 0;
        for (; at + len < n; at += len)
            memcpy(text + at, blocks[b], len);
        ck_assert_msg(try(text, at) < 0, "block %zu", b);
    }
    free(text);
}
END_TEST

START_TEST(refusal_does_not_say_what_and_where)
{
    static const struct {
        const char *source, *word, *line;
        int code;
    } rows[] = {
        {"a\nb\n{% include 'x' %}", "include", "line 3", ERR_UNSUPPORTED},
        {"{{ x|wordwrap }}", "wordwrap", "line 1", ERR_UNSUPPORTED},
        {"\n{{ x is filter }}", "filter", "line 2", ERR_UNSUPPORTED},
        {"\n\n{{ f(*x) }}", "'*'", "line 3", ERR_UNSUPPORTED},
        {"{% for x in y recursive %}{% endfor %}", "recursive", "line 1", ERR_UNSUPPORTED},
        {"{# \n #}{{ nosuch(1) }}", "nosuch", "line 2", ERR_UNSUPPORTED},
        {"{{ messages.append(1) }}", "append", "line 1", ERR_UNSUPPORTED},
        {"\n{% if x %}", "elif", "line 2", ERR_FORMAT},
        {"{{ 'a", "string", "line 1", ERR_FORMAT},
        {"{{ a ? b }}", "0x3f", "line 1", ERR_FORMAT},
        {"{{ 1 +\n 'a' }}", "a string", "line 1", ERR_FORMAT},
        {"\xff", "UTF-8", "", ERR_FORMAT},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int rc = try(rows[i].source, strlen(rows[i].source));
        ck_assert_msg(rc == rows[i].code, "row %zu: %d %s", i, rc, err_text());
        ck_assert_msg(strstr(err_text(), rows[i].word) && strstr(err_text(), rows[i].line), "row %zu: %s", i,
                      err_text());
    }
}
END_TEST

START_TEST(failed_allocation_leaks_or_is_not_reported)
{
    json_t *root = load(TEST_DATA_DIR "/template", "Qwen-Qwen3-0.6B.json");
    const json_t *source = json_object_get(root, "source"), *c = json_array_get(json_object_get(root, "cases"), 7);
    uint64_t live = mem_live_bytes(MEM_OTHER);
    bool failed = true;
    for (uint64_t nth = 1; failed; nth++) {
        char *text = NULL;
        size_t n;
        mem_fail_nth(nth);
        int rc = render(source, json_object_get(c, "messages"), true, NULL, &text, &n);
        failed = mem_n_calls() >= nth;
        mem_fail_nth(0);
        ck_assert_int_eq(rc, failed ? ERR_NOMEM : 0);
        mem_free(text);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), live);
    }
    json_decref(root);
}
END_TEST

START_TEST(one_template_cannot_be_rendered_twice)
{
    static const char source[] =
        "{% set x = messages|length %}{% macro f() %}{{ x }}{% endmacro %}{{ f() }}{{ extra }}{{ left }}";
    const struct template_message m[2] = {{"user", "a"}, {"user", "b"}};
    const struct template_var vars[] = {{"extra", TEMPLATE_STRING, 0, "!"}, {"left", TEMPLATE_INT, -3, NULL}};
    struct template_code *t = NULL;
    ck_assert_int_eq(template_make(source, sizeof source - 1, &t), 0);
    for (int n = 2; n >= 0; n--) {
        const struct template_args args = {.messages = m, .n_messages = n, .vars = vars, .n_vars = 2};
        char *text, want[16];
        size_t n_bytes;
        ck_assert_int_eq(template_render(t, &args, &text, &n_bytes), 0);
        snprintf(want, sizeof want, "%d!-3", n);
        ck_assert_str_eq(text, want);
        ck_assert_uint_eq(n_bytes, strlen(want));
        mem_free(text);
    }
    template_free(t);
    template_free(NULL);
}
END_TEST

/* t_template [FOLDER]: other cases than the committed ones, made by the same script */
int main(int argc, char **argv)
{
    if (argc > 1)
        folder = argv[1];
    Suite *suite = suite_create("template");
    TCase *tc = tcase_create("template");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, prompt_of_a_real_template_differs_from_jinja2);
    tcase_add_test(tc, piece_of_the_language_differs_from_jinja2);
    tcase_add_test(tc, hostile_template_takes_all_time_or_memory_or_stack);
    tcase_add_test(tc, deep_nesting_overflows_the_stack);
    tcase_add_test(tc, refusal_does_not_say_what_and_where);
    tcase_add_test(tc, failed_allocation_leaks_or_is_not_reported);
    tcase_add_test(tc, one_template_cannot_be_rendered_twice);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
