/* The end of every suite's main. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_RUN_SUITE_H
#define FERRY_TESTS_RUN_SUITE_H

#include <check.h>

/* Run its tests, as CK_VERBOSITY has it, and free it; main's status: 0 if all passed. */
static inline int run_suite(Suite *suite)
{
    SRunner *runner = srunner_create(suite);

    srunner_run_all(runner, CK_ENV);
    int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed ? 1 : 0;
}

#endif
