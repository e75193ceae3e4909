/* The one-token kernels of kern_avx512_vec.c with VNNI. */
#define AVX512_VNNI
#include "cpu/kern_avx512_vec.c"
