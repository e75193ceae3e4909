/* Which GPU an engine finds, and what it says where there is none that it can use. */
#include "src/ferry.h"

#include "tests/emu/emu.h"
#include "tests/run_suite.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_VOCAB = 288 };

static int try_open(const char *device, struct ferry_engine **e)
{
    struct ferry_engine_opts o;

    ferry_engine_opts_init(&o);
    o.n_ctx = 64;
    o.n_threads = 1;
    o.no_pin = true;
    o.io = "pread";
    o.device = device;
    return ferry_engine_open(TEST_DATA_DIR "/models/llama.gguf", &o, e);
}

/* The logits of one word, and whether the GPU gave them. */
static bool run_on_gpu(const char *device, float logits[N_VOCAB])
{
    struct ferry_engine *e;
    struct ferry_session *s;
    uint64_t n_launches = emu_n_launches();
    int32_t word = 7;

    ck_assert_msg(try_open(device, &e) == 0, "%s", ferry_error());
    ck_assert_int_eq(ferry_session_make(e, NULL, &s), 0);
    ck_assert_int_eq(ferry_session_logits(s, &word, 1, false, logits), 0);
    ferry_session_free(s);
    ferry_engine_close(e);
    ck_assert_int_eq(emu_n_live(), 0);
    return emu_n_launches() > n_launches;
}

static const struct {
    int driver, n_gpus;
    const char *says; /* NULL: there is one that works */
} machines[] = {
    {CUDART_VERSION, 1, NULL},
    {CUDART_VERSION + 10, 2, NULL},
    {0, 1, "this machine has no NVIDIA driver"},
    {12020, 1, "the driver is one for CUDA 12.2; this ferry was built with 13.0"},
    {CUDART_VERSION, 0, "there is no GPU 0; GPUs found: 0"},
};

/* "auto" is the GPU where there is one that works, the CPU where there is none; "cuda:0" says why there is none. */
START_TEST(machine_is_not_what_it_is_taken_for)
{
    float want[N_VOCAB], got[N_VOCAB];
    struct ferry_engine *e;

    ck_assert(!run_on_gpu("cpu", want));
    emu_set_driver(machines[_i].driver);
    emu_set_gpus(machines[_i].n_gpus);
    ck_assert_int_eq(run_on_gpu("auto", got), !machines[_i].says);
    ck_assert_mem_eq(want, got, sizeof got);
    if (!machines[_i].says) {
        ck_assert(run_on_gpu("cuda:0", got));
        return;
    }
    ck_assert_int_eq(try_open("cuda:0", &e), FERRY_ERR_DEVICE);
    ck_assert_ptr_null(e);
    ck_assert_msg(strstr(ferry_error(), machines[_i].says) != NULL, "%s", ferry_error());
}
END_TEST

/* Whatever call of looking for it fails, "auto" goes on without. */
START_TEST(failed_search_ends_the_program)
{
    float want[N_VOCAB], got[N_VOCAB];
    int n = 1;

    ck_assert(!run_on_gpu("cpu", want));
    for (bool is_gpu = false; !is_gpu && n < 20; n++) {
        emu_fail_nth(n);
        struct ferry_engine *e;
        int rc = try_open("auto", &e);
        emu_fail_nth(0);
        ck_assert(rc == 0 || rc == FERRY_ERR_DEVICE || rc == FERRY_ERR_NOMEM);
        is_gpu = rc != 0; /* it was found, and the call that failed was one of those after that */
        ferry_engine_close(e);
        ck_assert_int_eq(emu_n_live(), 0);
    }
    ck_assert_int_ge(n, 6); /* driver, number, choosing, major, minor, memory */
    ck_assert_int_lt(n, 20);
    ck_assert(run_on_gpu("auto", got));
    ck_assert_mem_eq(want, got, sizeof got);
}
END_TEST

static void setup(void)
{
    emu_reset(1);
}

int main(void)
{
    Suite *suite = suite_create("cuda_find");
    TCase *tc = tcase_create("cuda_find");

    tcase_add_checked_fixture(tc, setup, NULL);
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, machine_is_not_what_it_is_taken_for, 0, sizeof machines / sizeof *machines);
    tcase_add_test(tc, failed_search_ends_the_program);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
