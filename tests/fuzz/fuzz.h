/* A fuzz entry has libFuzzer's name, so that one file serves `make fuzz` (clang) and the corpus run of `make check`. */
#ifndef FERRY_TESTS_FUZZ_H
#define FERRY_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* Takes any n bytes; returns 0; aborts where something promised does not hold. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#endif
