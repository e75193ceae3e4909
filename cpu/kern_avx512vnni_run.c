/* The micro-kernels of kern_avx512_run.c with VNNI. */
#define AVX512_VNNI
#include "cpu/kern_avx512_run.c"
