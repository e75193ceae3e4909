/* The kernels for the emulated runtime, by a plain C++ compiler. */
#include "cuda/k_permute.cu"
