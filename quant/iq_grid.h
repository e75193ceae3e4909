/* Code-books of the IQ types: an index chooses a row of 8 (IQ1, IQ2) or 4 (IQ3) small integers. Element i of a row is byte i
 * of the word from the low end: magnitudes, except for IQ1 (shared by IQ1_S and IQ1_M), where it is -1, 0 or 1 as int8_t. */
#ifndef FERRY_QUANT_IQ_GRID_H
#define FERRY_QUANT_IQ_GRID_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

extern const uint64_t iq_grid_iq2_xxs[256];
extern const uint64_t iq_grid_iq2_xs[512];
extern const uint64_t iq_grid_iq2_s[1024];
extern const uint32_t iq_grid_iq3_xxs[256];
extern const uint32_t iq_grid_iq3_s[512];
extern const uint64_t iq_grid_iq1_s[2048];

/* The 16 levels of IQ4_NL and IQ4_XS. */
extern const int8_t iq_grid_iq4_levels[16];

/* Sign bits of 8 elements from their 7-bit index: the number of negative ones is even, so the eighth bit is a parity. */
static inline uint8_t iq_grid_signs(uint32_t index)
{
    return (uint8_t)(index | (uint32_t)__builtin_parity(index) << 7);
}

#ifdef __cplusplus
}
#endif
#endif
