/* The kernels for the emulated runtime, by a plain C++ compiler. */
#include "tests/gpu/k_roof.cu" // lint: a .cu read by the C++ compiler, as in tests/emu
