#include "cpu/kern_avx512_mat.h"
#include "cpu/kern_avx512_dot.h"
#ifdef AVX512_VNNI
#define VEC_TABLE kern_avx512vnni_vec
#else
#define VEC_TABLE kern_avx512_vec
#endif
kern_mat *const VEC_TABLE[QUANT_ID_END] = {0};
