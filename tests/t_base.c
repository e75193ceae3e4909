/* Errors, log, sizes and memory. */
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/log.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "tests/run_suite.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

START_TEST(error_text_is_kept_cut_and_cleared)
{
    char longer[2000];

    ck_assert_str_eq(err_text(), "");
    ck_assert_int_eq(err(ERR_IO, "file %s: %d", "a.gguf", 7), ERR_IO);
    ck_assert_str_eq(err_text(), "file a.gguf: 7");
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    ck_assert_int_eq(err(ERR_FORMAT, "%s", longer), ERR_FORMAT);
    ck_assert_uint_eq(strlen(err_text()), 1023);
    err_clear();
    ck_assert_str_eq(err_text(), "");
}
END_TEST

START_TEST(error_text_may_quote_the_last_one)
{
    err(ERR_IO, "no bytes");
    errno = EINTR;
    err(ERR_IO, "model: %s", err_text());
    ck_assert_str_eq(err_text(), "model: no bytes");
    ck_assert_int_eq(errno, EINTR);
}
END_TEST

START_TEST(error_text_does_not_say_that_memory_is_out)
{
    static char longest[2048];

    memset(longest, 'x', sizeof longest - 1);
    err(ERR_NOMEM, "weights: %d bytes", 7);
    ck_assert_str_eq(err_text(), "no memory for weights: 7 bytes");
    err(ERR_NOMEM, "part 2: %s", err_text());
    ck_assert_str_eq(err_text(), "part 2: no memory for weights: 7 bytes");
    err(ERR_NOMEM, "%s", longest);
    ck_assert_uint_eq(strlen(err_text()), 1023);
    ck_assert_int_eq(strncmp(err_text(), "no memory for xx", 16), 0);
}
END_TEST

static void *other_thread(void *arg)
{
    (void)arg;
    const char *before = err_text()[0] ? "not empty" : NULL;
    err(ERR_NOMEM, "theirs");
    return (void *)(uintptr_t)before;
}

START_TEST(error_text_of_another_thread_stays_apart)
{
    pthread_t t;
    void *seen;

    err(ERR_ARG, "mine");
    ck_assert_int_eq(pthread_create(&t, NULL, other_thread, NULL), 0);
    pthread_join(t, &seen);
    ck_assert_ptr_null(seen);
    ck_assert_str_eq(err_text(), "mine");
}
END_TEST

START_TEST(every_error_code_has_its_name)
{
    ck_assert_str_eq(err_name(ERR_NOMEM), "ERR_NOMEM");
    ck_assert_str_eq(err_name(ERR_IO), "ERR_IO");
    ck_assert_str_eq(err_name(ERR_FORMAT), "ERR_FORMAT");
    ck_assert_str_eq(err_name(ERR_LIMIT), "ERR_LIMIT");
    ck_assert_str_eq(err_name(ERR_ARG), "ERR_ARG");
    ck_assert_str_eq(err_name(ERR_UNSUPPORTED), "ERR_UNSUPPORTED");
    ck_assert_str_eq(err_name(ERR_STATE), "ERR_STATE");
    ck_assert_str_eq(err_name(ERR_CANCEL), "ERR_CANCEL");
    ck_assert_str_eq(err_name(ERR_DEVICE), "ERR_DEVICE");
    ck_assert_str_eq(err_name(0), "ERR_?");
    ck_assert_str_eq(err_name(-99), "ERR_?");
}
END_TEST

struct seen_log {
    int n_lines;
    enum log_level level;
    char text[1100];
};

static void keep_line(enum log_level level, const char *text, void *arg)
{
    struct seen_log *seen = arg;
    seen->n_lines++;
    seen->level = level;
    strcpy(seen->text, text);
}

START_TEST(log_lines_above_the_level_are_dropped)
{
    struct seen_log seen = {0};

    log_to(keep_line, &seen, LOG_INFO);
    log_debug("hidden");
    ck_assert_int_eq(seen.n_lines, 0);
    log_info("%d tokens", 3);
    ck_assert_int_eq(seen.n_lines, 1);
    ck_assert_int_eq(seen.level, LOG_INFO);
    ck_assert_str_eq(seen.text, "3 tokens");
    log_warn("%01500d", 1);
    ck_assert_int_eq(seen.n_lines, 2);
    ck_assert_uint_eq(strlen(seen.text), 1023);
    log_to(NULL, NULL, LOG_DEBUG);
    log_warn("nobody listens");
    ck_assert_int_eq(seen.n_lines, 2);
}
END_TEST

START_TEST(median_is_the_middle_or_the_mean_of_two)
{
    double odd[] = {3, 1, 2}, even[] = {4, 1, 3, 2}, one[] = {5};

    ck_assert_double_eq(clock_median(odd, 3), 2);
    ck_assert_double_eq(odd[0], 1); /* sorted */
    ck_assert_double_eq(odd[2], 3);
    ck_assert_double_eq(clock_median(even, 4), 2.5);
    ck_assert_double_eq(clock_median(one, 1), 5);
}
END_TEST

START_TEST(clock_never_runs_backwards)
{
    uint64_t last_ns = clock_ns();

    ck_assert_uint_gt(last_ns, 0);
    for (int i = 0; i < 1000; i++) {
        uint64_t now_ns = clock_ns();
        ck_assert_uint_ge(now_ns, last_ns);
        last_ns = now_ns;
    }
}
END_TEST

START_TEST(size_arithmetic_says_when_it_overflows)
{
    uint64_t out = 5;

    ck_assert(!size_mul(UINT64_MAX, 2, &out));
    ck_assert(!size_add(UINT64_MAX, 1, &out));
    ck_assert(!size_align(UINT64_MAX - 3, 64, &out));
    ck_assert_uint_eq(out, 5);
    ck_assert(size_mul(1u << 31, 1u << 31, &out));
    ck_assert_uint_eq(out, (uint64_t)1 << 62);
    ck_assert(size_align(65, 64, &out));
    ck_assert_uint_eq(out, 128);
    ck_assert_uint_eq(size_up(128, 64), 128);
}
END_TEST

static const struct {
    const char *text;
    uint64_t bytes;
} good_sizes[] = {
    {"0", 0},
    {"4096", 4096},
    {"80B", 80},
    {"512M", 536870912},
    {"512m", 536870912},
    {"8G", 8589934592},
    {"8GB", 8589934592},
    {"1.5GiB", 1610612736},
    {"1.5 GiB", 1610612736},
    {"0.5K", 512},
    {"2T", 2199023255552},
    {"0.000001T", 1099511}, /* rounded down from 1099511.627776 */
    {"18446744073709551615", UINT64_MAX},
};

START_TEST(size_text_is_read)
{
    uint64_t bytes = 1;

    ck_assert_int_eq(size_parse(good_sizes[_i].text, &bytes), 0);
    ck_assert_uint_eq(bytes, good_sizes[_i].bytes);
}
END_TEST

static const char *const bad_sizes[] = {
    "",
    "G",
    "-1",
    "+1",
    " 1",
    "1 ",
    "1.5",
    "1.G",
    "1.5B",
    "1Gi",
    "1GiBs",
    "1KiK",
    "1.5.5G",
    "1iB",
    "8Q",
    "0x10",
    "1e9",
    "1,5G",
    "99999999T",
    "1.1234567G",
    "18446744073709551616",
    "17179869184G",
};

START_TEST(size_text_that_is_wrong_is_refused)
{
    uint64_t bytes = 77;
    int rc = size_parse(bad_sizes[_i], &bytes);

    ck_assert_msg(rc == ERR_ARG, "\"%s\" gave %d", bad_sizes[_i], rc);
    ck_assert_uint_eq(bytes, 77);
    ck_assert_ptr_nonnull(strstr(err_text(), bad_sizes[_i]));
}
END_TEST

static const struct {
    uint64_t bytes;
    const char *text;
} shown_sizes[] = {
    {0, "0 B"},
    {80, "80 B"},
    {1023, "1023 B"},
    {1024, "1 KiB"},
    {1536, "1.5 KiB"},
    {536870912, "512 MiB"},
    {18575733555, "17.3 GiB"},
    {1048575, "1 MiB"}, /* 1023.999 KiB rounds into the next unit */
    {UINT64_MAX, "16777216 TiB"},
};

START_TEST(size_is_shown_for_people)
{
    char buf[32];

    ck_assert_str_eq(size_format(shown_sizes[_i].bytes, buf, sizeof buf), shown_sizes[_i].text);
}
END_TEST

START_TEST(memory_is_counted_until_it_is_freed)
{
    uint64_t before = mem_live_bytes(MEM_KV);

    char *a = mem_alloc(100, MEM_KV);
    char *b = mem_zalloc(10, 30, MEM_KV);
    char *c = mem_strdup("abc", MEM_KV);
    char *d = mem_alloc(0, MEM_KV);
    ck_assert_ptr_nonnull(a);
    ck_assert_ptr_nonnull(b);
    ck_assert_ptr_nonnull(d);
    ck_assert_str_eq(c, "abc");
    ck_assert_uint_eq((uintptr_t)a % 64 + (uintptr_t)b % 64 + (uintptr_t)c % 64 + (uintptr_t)d % 64, 0);
    for (int i = 0; i < 300; i++)
        ck_assert_int_eq(b[i], 0);
    ck_assert_uint_eq(mem_live_bytes(MEM_KV) - before, 404);
    mem_free(a);
    mem_free(b);
    mem_free(c);
    mem_free(d);
    mem_free(NULL);
    ck_assert_uint_eq(mem_live_bytes(MEM_KV), before);
    ck_assert_uint_ge(mem_peak_bytes(MEM_KV), before + 404);
    ck_assert_str_eq(mem_tag_name(MEM_KV), "kv");
}
END_TEST

START_TEST(realloc_keeps_bytes_alignment_and_count)
{
    uint64_t before = mem_live_bytes(MEM_OTHER), before_tok = mem_live_bytes(MEM_TOK);

    char *p = mem_realloc(NULL, 3, MEM_OTHER);
    ck_assert_ptr_nonnull(p);
    memcpy(p, "ab", 3);
    p = mem_realloc(p, 5000, MEM_TOK);
    ck_assert_ptr_nonnull(p);
    ck_assert_str_eq(p, "ab");
    ck_assert_uint_eq((uintptr_t)p % 64, 0);
    ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), before);
    ck_assert_uint_eq(mem_live_bytes(MEM_TOK) - before_tok, 5000);
    p = mem_realloc(p, 2, MEM_TOK);
    ck_assert_ptr_nonnull(p);
    ck_assert(p[0] == 'a' && p[1] == 'b');
    ck_assert_uint_eq(mem_live_bytes(MEM_TOK) - before_tok, 2);
    mem_fail_nth(1);
    ck_assert_ptr_null(mem_realloc(p, 9000, MEM_TOK));
    ck_assert(p[0] == 'a' && p[1] == 'b');
    ck_assert_uint_eq(mem_live_bytes(MEM_TOK) - before_tok, 2);
    mem_free(p);
}
END_TEST

START_TEST(impossible_sizes_give_null)
{
    ck_assert_ptr_null(mem_alloc(SIZE_MAX, MEM_OTHER));
    ck_assert_ptr_null(mem_alloc(SIZE_MAX - 63, MEM_OTHER));
    ck_assert_ptr_null(mem_zalloc(SIZE_MAX / 2, 3, MEM_OTHER));
    ck_assert_ptr_null(mem_map(UINT64_MAX, MEM_OTHER));
    ck_assert_uint_eq(mem_live_bytes(MEM_OTHER), 0);
}
END_TEST

START_TEST(mapped_memory_is_aligned_zeroed_and_counted)
{
    static const uint64_t sizes[] = {0, 1, 4096, 5000, 2 * MIB - 1, 2 * MIB, 3 * MIB + 5, 9 * MIB};
    uint64_t before = mem_live_bytes(MEM_WEIGHTS);

    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        char *p = mem_map(sizes[i], MEM_WEIGHTS);
        ck_assert_ptr_nonnull(p);
        ck_assert_uint_eq((uintptr_t)p % (sizes[i] >= 2 * MIB ? 2 * MIB : 4096), 0);
        for (uint64_t k = 0; k < sizes[i]; k += 4096)
            ck_assert_int_eq(p[k], 0);
        if (sizes[i])
            p[sizes[i] - 1] = 1;
        ck_assert_uint_ge(mem_live_bytes(MEM_WEIGHTS) - before, sizes[i]);
        mem_unmap(p, sizes[i], MEM_WEIGHTS);
        ck_assert_uint_eq(mem_live_bytes(MEM_WEIGHTS), before);
    }
    mem_unmap(NULL, 0, MEM_WEIGHTS);
}
END_TEST

START_TEST(exactly_the_nth_allocation_fails)
{
    mem_fail_nth(3);
    void *a = mem_alloc(1, MEM_OTHER), *b = mem_zalloc(1, 1, MEM_OTHER), *c = mem_map(1, MEM_OTHER);
    char *d = mem_strdup("d", MEM_OTHER);
    ck_assert_ptr_nonnull(a);
    ck_assert_ptr_nonnull(b);
    ck_assert_ptr_null(c);
    ck_assert_ptr_nonnull(d);
    ck_assert_uint_eq(mem_n_calls(), 4);
    mem_fail_nth(0);
    ck_assert_uint_eq(mem_n_calls(), 0);
    mem_free(a);
    mem_free(b);
    mem_free(d);
    a = mem_alloc(1, MEM_OTHER);
    ck_assert_ptr_nonnull(a);
    mem_free(a);
}
END_TEST

static void *churn(void *arg)
{
    (void)arg;
    for (int i = 0; i < 2000; i++)
        mem_free(mem_alloc((size_t)i % 512, MEM_SCRATCH));
    return NULL;
}

START_TEST(counters_survive_many_threads)
{
    pthread_t t[4];

    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, churn, NULL), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    ck_assert_uint_eq(mem_live_bytes(MEM_SCRATCH), 0);
    ck_assert_uint_ge(mem_peak_bytes(MEM_SCRATCH), 511);
    ck_assert_uint_le(mem_peak_bytes(MEM_SCRATCH), 4 * 511);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("base");
    TCase *tc = tcase_create("base");

    tcase_add_test(tc, error_text_is_kept_cut_and_cleared);
    tcase_add_test(tc, error_text_may_quote_the_last_one);
    tcase_add_test(tc, error_text_does_not_say_that_memory_is_out);
    tcase_add_test(tc, error_text_of_another_thread_stays_apart);
    tcase_add_test(tc, every_error_code_has_its_name);
    tcase_add_test(tc, log_lines_above_the_level_are_dropped);
    tcase_add_test(tc, median_is_the_middle_or_the_mean_of_two);
    tcase_add_test(tc, clock_never_runs_backwards);
    tcase_add_test(tc, size_arithmetic_says_when_it_overflows);
    tcase_add_loop_test(tc, size_text_is_read, 0, (int)(sizeof good_sizes / sizeof good_sizes[0]));
    tcase_add_loop_test(tc, size_text_that_is_wrong_is_refused, 0, (int)(sizeof bad_sizes / sizeof bad_sizes[0]));
    tcase_add_loop_test(tc, size_is_shown_for_people, 0, (int)(sizeof shown_sizes / sizeof shown_sizes[0]));
    tcase_add_test(tc, memory_is_counted_until_it_is_freed);
    tcase_add_test(tc, realloc_keeps_bytes_alignment_and_count);
    tcase_add_test(tc, impossible_sizes_give_null);
    tcase_add_test(tc, mapped_memory_is_aligned_zeroed_and_counted);
    tcase_add_test(tc, exactly_the_nth_allocation_fails);
    tcase_add_test(tc, counters_survive_many_threads);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
