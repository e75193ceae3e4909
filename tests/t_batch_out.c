/* The output of ferry batch and its journal: what is somebody else's, and what memory that runs out leaves of one's own. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/batch_out.h"
#include "src/cli/batch_record.h"
#include "src/model/json_room.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { N_LINES = 4, MOST_BYTES = 4096 };

static char folder[256], output[300], side[320];
static json_t *about;

static void setup(void)
{
    snprintf(folder, sizeof folder, "%s/t_batch_out-XXXXXX", TEST_BUILD_DIR);
    ck_assert_ptr_nonnull(mkdtemp(folder));
    snprintf(output, sizeof output, "%s/o", folder);
    snprintf(side, sizeof side, "%s.ferry", output);
    about = json_pack("{s:{s:s}, s:{s:s}, s:{s:s}, s:{s:i}}", "ferry", "version", "1", "input", "hash", "abc", "model",
                      "name", "m", "options", "top-k", 40);
    ck_assert_ptr_nonnull(about);
}

static void teardown(void)
{
    json_decref(about);
    unlink(output);
    unlink(side);
    rmdir(folder);
}

static struct conf conf_of(const char *order, bool restart)
{
    return (struct conf){.output = output, .order = order, .restart = restart};
}

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(text, 1, strlen(text), f), strlen(text));
    fclose(f);
}

/* The bytes of a file as a string; "(none)" where there is no file. */
static const char *get(const char *path, char *buf)
{
    FILE *f = fopen(path, "rb");

    strcpy(buf, "(none)");
    if (!f)
        return buf;
    buf[fread(buf, 1, MOST_BYTES - 1, f)] = '\0';
    fclose(f);
    return buf;
}

static const char *const foreign[] = {"dear diary", "dear diary\n", "{\"a\": 1}\n", "{\"ferry\":{\"version\":\"1\"}}\n",
                                      "{\"ferry\":{} and so on\n"};
enum { N_FOREIGN = sizeof foreign / sizeof *foreign };

/* Whatever the options say, and whether there is an output or not. */
START_TEST(foreign_journal_is_overwritten)
{
    bool has_output = _i / N_FOREIGN % 2;
    struct conf conf = conf_of("any", _i / N_FOREIGN / 2);
    struct batch_out o;
    char buf[MOST_BYTES];

    put(side, foreign[_i % N_FOREIGN]);
    if (has_output)
        put(output, "my results\n");
    ck_assert_int_eq(batch_out_open(&o, &conf, about, N_LINES), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), side));
    ck_assert_ptr_nonnull(strstr(err_text(), "left as it is"));
    batch_out_close(&o);
    ck_assert_str_eq(get(side, buf), foreign[_i % N_FOREIGN]);
    ck_assert_str_eq(get(output, buf), has_output ? "my results\n" : "(none)");
}
END_TEST

/* A run that answered three of four lines; in order, so that the journal keeps two of them. */
static void run_some(void)
{
    struct conf conf = conf_of("input", false);
    struct batch_out o;

    ck_assert_msg(batch_out_open(&o, &conf, about, N_LINES) == 0, "%s", err_text());
    for (uint64_t line = 1; line <= N_LINES; line++)
        ck_assert_int_eq(batch_out_expect(&o, line, 1), 0);
    static const uint64_t done[] = {1, 3, 4};
    for (size_t i = 0; i < sizeof done / sizeof *done; i++) {
        char record[100];
        int n = snprintf(record, sizeof record, "{\"text\":\"a\",\"stats\":{\"line\":%d,\"index\":0}}", (int)done[i]);
        ck_assert_int_eq(batch_out_add(&o, (struct batch_key){done[i], 0}, record, (size_t)n), 0);
    }
    batch_out_close(&o);
}

START_TEST(memory_that_runs_out_cuts_records_off)
{
    struct conf conf = conf_of("input", false);
    struct batch_out o;
    char was[2][MOST_BYTES], is[MOST_BYTES];
    uint64_t before = mem_live_bytes(MEM_OTHER), n = 1;
    int rc = ERR_NOMEM;

    run_some();
    get(output, was[0]);
    get(side, was[1]);
    for (; rc && n < 1000; n++) {
        mem_fail_nth(n);
        rc = batch_out_open(&o, &conf, about, N_LINES);
        mem_fail_nth(0);
        if (!rc)
            ck_assert_uint_eq(o.n_done, 3);
        else
            ck_assert_msg(rc == ERR_NOMEM, "allocation %d: %d, %s", (int)n, rc, err_text());
        batch_out_close(&o);
        ck_assert_str_eq(get(output, is), was[0]);
        ck_assert_str_eq(get(side, is), was[1]);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), before);
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_uint_gt(n, 40);
}
END_TEST

/* From nothing: a journal that was begun says what it is of, or there is none. */
START_TEST(journal_is_begun_without_its_description)
{
    struct conf conf = conf_of("any", false);
    struct batch_out o;
    char is[MOST_BYTES];
    int rc = ERR_NOMEM;

    for (uint64_t n = 1; rc && n < 1000; n++) {
        mem_fail_nth(n);
        rc = batch_out_open(&o, &conf, about, N_LINES);
        mem_fail_nth(0);
        ck_assert(rc == 0 || rc == ERR_NOMEM);
        batch_out_close(&o);
        get(side, is);
        ck_assert_msg(rc == 0 || !strcmp(is, "") || !strcmp(is, "(none)"), "allocation %d: %s", (int)n, is);
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_msg(strstr(is, "\"ferry_batch\":1}\n") != NULL, "%s", is);
    ck_assert_ptr_nonnull(strstr(is, "\"top-k\":40"));
}
END_TEST

/* The journal is of this run, but the output is not: lost only where that is asked for. */
START_TEST(output_that_was_replaced_is_cut)
{
    struct conf conf = conf_of("input", _i);
    struct batch_out o;
    char is[MOST_BYTES];

    run_some();
    put(output, "something else\n");
    int rc = batch_out_open(&o, &conf, about, N_LINES);
    ck_assert_int_eq(rc, _i ? 0 : ERR_STATE);
    if (rc)
        ck_assert_ptr_nonnull(strstr(err_text(), "--restart"));
    batch_out_close(&o);
    ck_assert_str_eq(get(output, is), _i ? "" : "something else\n");
}
END_TEST

/* An output of an earlier version, whose journal knows less: what was not given is no change. */
START_TEST(option_that_is_new_stops_a_resumed_run)
{
    struct conf conf = conf_of("input", false);
    struct batch_out o;

    run_some();
    json_t *options = json_object_get(about, "options");
    ck_assert_int_eq(json_object_set_new(options, "grammar", json_null()), 0);
    ck_assert_int_eq(json_object_set_new(options, "template-var", json_object()), 0);
    ck_assert_msg(batch_out_open(&o, &conf, about, N_LINES) == 0, "%s", err_text());
    ck_assert_uint_eq(o.n_done, 3);
    batch_out_close(&o);
    ck_assert_int_eq(json_object_set_new(options, "template-var", json_pack("{s:b}", "enable_thinking", 0)), 0);
    ck_assert_int_eq(batch_out_open(&o, &conf, about, N_LINES), ERR_STATE);
    ck_assert_ptr_nonnull(strstr(err_text(), "template-var was nothing, is {\"enable_thinking\":false}"));
    batch_out_close(&o);
}
END_TEST

/* A grammar, say. */
START_TEST(long_option_is_told_as_what_lay_in_memory)
{
    char text[600], want[602], is[160];

    for (int shift = 0; shift < 2; shift++) {
        memset(text, 'a', (size_t)shift);
        for (size_t i = (size_t)shift; i + 2 < sizeof text; i += 2)
            memcpy(text + i, "\xc3\xa9", 3);
        json_t *v = json_string(text);
        ck_assert_ptr_nonnull(v);
        memset(is, '#', sizeof is);
        batch_record_brief(v, is, sizeof is);
        snprintf(want, sizeof want, "\"%s", text);
        want[shift ? 158 : 159] = '\0'; /* no half character */
        ck_assert_str_eq(is, want);
        mem_fail_nth(1);
        batch_record_brief(v, is, sizeof is);
        mem_fail_nth(0);
        ck_assert_str_eq(is, "(no memory)");
        json_decref(v);
    }
}
END_TEST

/* jansson says the same of both. */
START_TEST(json_without_memory_is_no_json)
{
    static const char text[] =
        "{\"a\": [1, \"two\", {\"three\": 3.5}], \"b\": null, \"a name that has to grow\": \"a text as well\"}";
    json_t *v, *want = json_loads(text, 0, NULL);
    uint64_t n = 1;
    int rc = ERR_NOMEM;

    for (; rc && n < 100; n++) {
        mem_fail_nth(n);
        rc = json_room_parse(text, sizeof text - 1, 0, &v);
        mem_fail_nth(0);
        ck_assert_msg(rc == 0 || rc == ERR_NOMEM, "allocation %d: %s", (int)n, err_text());
        ck_assert_msg(rc || json_equal(v, want), "allocation %d: something was left out", (int)n);
        json_decref(v);
    }
    ck_assert_int_eq(rc, 0);
    ck_assert_uint_gt(n, 8);
    json_decref(want);
    ck_assert_int_eq(json_room_parse("{\"a\": ", 6, 0, &v), ERR_FORMAT);
    ck_assert_ptr_null(v);
    ck_assert_ptr_nonnull(strstr(err_text(), "not JSON"));
}
END_TEST

int main(void)
{
    json_room_begin();
    Suite *suite = suite_create("batch_out");
    TCase *tc = tcase_create("batch_out");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, foreign_journal_is_overwritten, 0, 4 * N_FOREIGN);
    tcase_add_test(tc, memory_that_runs_out_cuts_records_off);
    tcase_add_test(tc, journal_is_begun_without_its_description);
    tcase_add_loop_test(tc, output_that_was_replaced_is_cut, 0, 2);
    tcase_add_test(tc, option_that_is_new_stops_a_resumed_run);
    tcase_add_test(tc, long_option_is_told_as_what_lay_in_memory);
    tcase_add_test(tc, json_without_memory_is_no_json);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
