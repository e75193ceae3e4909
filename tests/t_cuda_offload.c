/* Experts that are copied to the emulated GPU for a step: no bit of the logits may differ from the CPU's, whichever way experts go, in
 * whichever order streams run, and whatever fails. */
#include "tests/cuda_engine.h"

#include "src/base/mem.h"

#include <unistd.h>

static const char *const moe_models[] = {"qwen2moe", "qwen3moe", "qwen3moe-fused", "mixtral",
                                         "dots1",    "olmoe",    "mixed"};
enum { N_MOE_MODELS = sizeof moe_models / sizeof *moe_models };

static char plan_path[] = TEST_BUILD_DIR "/t_cuda_offload-XXXXXX";

static void leave(void)
{
    unlink(plan_path);
}

/* Options of a saved plan by which the GPU holds so many quarters of the experts and has n_landing places for others. (These models'
 * experts together are smaller than what the driver rounds up by, so that no --vram would give such a plan.) */
static struct ferry_engine_opts copying_of(const char *name, const char *io, int quarters, int n_landing,
                                           const char *copies)
{
    struct ferry_engine_opts o = split_of(name, 0), saved = opts_of(NULL);
    char *text;

    o.io = io;
    struct ferry_engine *e = open_with(name, &o);
    ck_assert_int_eq(ferry_engine_plan(e, true, &text), 0);
    ferry_engine_close(e);
    emu_set_vram(SIZE_MAX);
    json_t *plan = json_loads(text, 0, NULL), *gpu = json_object_get(plan, "gpu"),
           *bytes = json_object_get(gpu, "bytes");
    ferry_free(text);
    json_int_t n_all = json_integer_value(json_object_get(gpu, "of_experts"));
    json_int_t budget = json_integer_value(json_object_get(bytes, "budget")) + (json_int_t)(16 * MIB);
    json_object_set_new(gpu, "experts", json_integer(n_all * quarters / 4));
    json_object_set_new(gpu, "landings", json_integer(n_landing));
    json_object_set_new(gpu, "copies", json_string(copies));
    json_object_set_new(bytes, "budget", json_integer(budget));
    if (plan_path[strlen(plan_path) - 1] == 'X')
        close(mkstemp(plan_path));
    ck_assert_int_eq(json_dump_file(plan, plan_path, 0), 0);
    json_decref(plan);
    saved.device = "cuda:0";
    saved.plan_path = plan_path;
    return saved;
}

/* All misses are copied: the CPU computes none. */
START_TEST(copied_experts_change_bits)
{
    const char *name = moe_models[_i];
    struct ferry_engine_opts cpu = opts_of("cpu");
    float *want = logits_of(name, &cpu);

    for (int n_landing = 1; n_landing < 8;
         n_landing *= 2) { /* fewer than a layer has experts: places are used again in it */
        struct ferry_engine_opts gpu = copying_of(name, "pread", n_landing / 2, n_landing, "always");
        float *got = logits_of(name, &gpu);
        must_equal(want, got, name);
        ck_assert_uint_gt(last_stats.copied_experts, 0);
        ck_assert_uint_eq(last_stats.host_expert_rows, 0);
        ck_assert_uint_eq(last_stats.cpu_experts, 0);
        ck_assert_uint_gt(last_stats.copy_bytes, 0);
        ck_assert_int_eq(emu_n_live(), 0);
        free(got);
    }
    free(want);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("cuda_offload");
    TCase *tc = tcase_create("cuda_offload");

    tcase_add_checked_fixture(tc, setup, leave);
    tcase_set_timeout(tc, 240);
    tcase_add_loop_test(tc, copied_experts_change_bits, 0, N_MOE_MODELS);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}
