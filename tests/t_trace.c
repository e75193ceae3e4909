/* The timeline and the list of wanted experts: what is kept, what a full one does, and what is written down. */
#include "src/run/trace.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/run/touch.h"
#include "tests/run_suite.h"

#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char path[sizeof TEST_BUILD_DIR + 32];

static void name_file(void)
{
    snprintf(path, sizeof path, "%s/t_trace-XXXXXX", TEST_BUILD_DIR);
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static const char *text_of_file(void)
{
    static char text[4096];
    FILE *f = fopen(path, "r");
    ck_assert_ptr_nonnull(f);
    text[fread(text, 1, sizeof text - 1, f)] = '\0';
    fclose(f);
    return text;
}

START_TEST(list_of_wanted_experts_is_not_what_was_wanted)
{
    static const int32_t a[] = {3, 0, 127}, b[] = {5};
    struct trace *t;

    name_file();
    ck_assert_int_eq(trace_open(&(struct trace_args){.n_ids = 9}, &t), 0); /* 2, 2 + 3, 2: the last id does not fit */
    ck_assert(!trace_has_timeline(t));
    trace_step(t, 1);
    trace_wanted(t, 2, a, 3);
    trace_step(t, 512);
    ck_assert_int_eq(trace_write_wanted(t, path), 0);
    ck_assert_str_eq(text_of_file(), "step 1\n2 3 0 127\nstep 512\n");
    trace_wanted(t, 3, b, 1);
    trace_step(t, 1); /* would fit, but there is no telling what came before */
    ck_assert_int_eq(trace_write_wanted(t, path), 0);
    ck_assert_str_eq(text_of_file(), "step 1\n2 3 0 127\nstep 512\nfull\n");
    trace_close(t);
    unlink(path);
}
END_TEST

/* Of five events a ring of four keeps the last four; times count from the earliest beginning among them. */
START_TEST(timeline_keeps_other_events_than_the_last)
{
    struct trace *t;
    json_error_t why;
    json_t *all, *e;
    int n_x = 0, n_begin = 0, n_end = 0;
    size_t i;

    name_file();
    ck_assert_int_eq(trace_open(&(struct trace_args){.n_events = 4}, &t), 0);
    trace_add(t, &(struct trace_event){TRACE_STEP, 9, 9, 1000, 2000, 0});
    trace_add(t, &(struct trace_event){TRACE_DENSE, 0, 1, 11000, 12000, 0});
    trace_add(t, &(struct trace_event){TRACE_WAIT, 1, 0, 12000, 14000, 0});
    trace_add(t, &(struct trace_event){TRACE_READ, 1, 7, 10000, 14000, 4096});
    trace_add(t, &(struct trace_event){TRACE_AHEAD, 2, 6, 13000, 15500, 8192});
    ck_assert_int_eq(trace_write(t, path), 0);
    all = json_load_file(path, 0, &why);
    ck_assert_msg(all != NULL, "%s", why.text);
    json_array_foreach(json_object_get(all, "traceEvents"), i, e)
    {
        const char *ph = json_string_value(json_object_get(e, "ph")),
                   *name = json_string_value(json_object_get(e, "name"));
        double ts = json_number_value(json_object_get(e, "ts"));
        const json_t *args = json_object_get(e, "args");
        ck_assert_int_ne(json_integer_value(json_object_get(args, "layer")), 9);
        n_x += !strcmp(ph, "X");
        if (!strcmp(name, "wait")) {
            ck_assert_double_eq(ts, 2);
            ck_assert_double_eq(json_number_value(json_object_get(e, "dur")), 2);
        }
        if (!strcmp(ph, "b")) {
            n_begin++;
            ck_assert_double_eq(ts, !strcmp(name, "read") ? 0 : 3);
            ck_assert_int_eq(json_integer_value(json_object_get(args, "bytes")), !strcmp(name, "read") ? 4096 : 8192);
        }
        if (!strcmp(ph, "e")) {
            n_end++;
            ck_assert_double_eq(ts, !strcmp(name, "read") ? 4 : 5.5);
        }
    }
    ck_assert_int_eq(n_x, 2);
    ck_assert_int_eq(n_begin, 2);
    ck_assert_int_eq(n_end, 2);
    json_decref(all);
    trace_close(t);
    unlink(path);
}
END_TEST

START_TEST(no_trace_is_not_the_same_as_an_empty_one)
{
    static const int32_t a[] = {1};

    ck_assert(!trace_has_timeline(NULL));
    trace_add(NULL, &(struct trace_event){TRACE_STEP, 0, 0, 0, 0, 0});
    trace_step(NULL, 1);
    trace_wanted(NULL, 0, a, 1);
    trace_close(NULL);
}
END_TEST

START_TEST(file_that_cannot_be_written_is_not_an_error)
{
    struct trace *t;

    ck_assert_int_eq(trace_open(&(struct trace_args){.n_events = 2, .n_ids = 8}, &t), 0);
    trace_add(t, &(struct trace_event){TRACE_STEP, 0, 1, 0, 1, 0});
    trace_step(t, 1);
    ck_assert_int_eq(trace_write(t, "/nowhere/at/all"), ERR_IO);
    ck_assert_ptr_nonnull(strstr(err_text(), "/nowhere/at/all"));
    ck_assert_int_eq(trace_write_wanted(t, "/nowhere/at/all"), ERR_IO);
    if (access("/dev/full", W_OK) == 0) {
        ck_assert_int_eq(trace_write(t, "/dev/full"), ERR_IO);
        ck_assert_int_eq(trace_write_wanted(t, "/dev/full"), ERR_IO);
    }
    trace_close(t);
}
END_TEST

START_TEST(failed_allocation_of_a_trace_leaks)
{
    uint64_t before = mem_live_bytes(MEM_OTHER);

    for (uint64_t n = 1; n <= 4; n++) {
        struct trace *t;
        mem_fail_nth(n);
        int rc = trace_open(&(struct trace_args){.n_events = 2, .n_ids = 8}, &t);
        mem_fail_nth(0);
        ck_assert_int_eq(rc, n <= 3 ? ERR_NOMEM : 0);
        trace_close(t);
        ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), before);
    }
}
END_TEST

/* What was written before and meanwhile stays; stopping at once is as good as waiting. */
START_TEST(touching_changes_memory)
{
    enum { BYTES = 64 << 20 };
    unsigned char *p = mem_map(BYTES, MEM_OTHER);
    struct touch *touch;

    ck_assert_ptr_nonnull(p);
    for (int round = 0; round < 3; round++) {
        p[round * 5000] = 77;
        ck_assert_int_eq(touch_start(p, BYTES, &touch), 0);
        for (size_t i = BYTES - 4096; i > BYTES / 2; i -= 4096)
            p[i] = (unsigned char)(i >> 12);
        touch_stop(touch);
        for (size_t i = BYTES - 4096; i > BYTES / 2; i -= 4096)
            ck_assert_uint_eq(p[i], (unsigned char)(i >> 12));
        ck_assert_uint_eq(p[round * 5000], 77);
        ck_assert_uint_eq(p[round * 5000 + 1], 0);
    }
    mem_fail_nth(1);
    ck_assert_int_eq(touch_start(p, BYTES, &touch), ERR_NOMEM);
    mem_fail_nth(0);
    ck_assert_ptr_null(touch);
    touch_stop(NULL);
    mem_unmap(p, BYTES, MEM_OTHER);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("trace");
    TCase *tc = tcase_create("trace");

    tcase_add_test(tc, list_of_wanted_experts_is_not_what_was_wanted);
    tcase_add_test(tc, timeline_keeps_other_events_than_the_last);
    tcase_add_test(tc, no_trace_is_not_the_same_as_an_empty_one);
    tcase_add_test(tc, file_that_cannot_be_written_is_not_an_error);
    tcase_add_test(tc, failed_allocation_of_a_trace_leaks);
    tcase_add_test(tc, touching_changes_memory);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
