/* Inside quant/: choosing scales and codes of one super-block (or one block) for the least squared error, each element's
 * square counting by its weight. Weights are finite and not negative; NULL, or all zero: all alike. */
#ifndef FERRY_QUANT_Q_FIT_H
#define FERRY_QUANT_Q_FIT_H

#include <stdint.h>

/* The integers a code can stand for, ascending: n of them (a power of two) from lo on, or those of a table of 16. */
struct q_levels {
    int n, lo;
    const int8_t *table; /* view (n); NULL: lo, lo + 1, ... */
    float end_gap;       /* distance between the outermost two: how far a trial scale may clip or stretch */
};

#define Q_FIT_LEN 256
#define Q_FIT_MAX_GROUPS 16

/* A block of 32 with a half scale, of either sign: value = d * level. Fills code with level indices, returns d. */
uint16_t q_fit_block(const struct q_levels *levels, const float *x, const float *weights, uint8_t *code);

/* A block of 32 with a half scale and minimum: value = d * code + m, codes 0..top. Returns d. */
uint16_t q_fit_block_min(int top, const float *x, const float *weights, uint8_t *code, uint16_t *m);

/* A super-block of signed scales: value = d * scale * level. */
struct q_fit_signed {
    const struct q_levels *levels;
    int group_len, scale_lo, scale_hi; /* scale_lo < 0 < scale_hi, -scale_lo >= scale_hi */
    uint16_t d;                        /* out, as are the next two */
    int scale[Q_FIT_MAX_GROUPS];
    uint8_t code[Q_FIT_LEN]; /* level indices */
};
void q_fit_signed(struct q_fit_signed *fit, const float *x, const float *weights /* (Q_FIT_LEN) both */);

/* A super-block of unsigned scales and minimums: value = d * scale * code - dmin * min, codes 0..top. */
struct q_fit_min {
    int top, group_len, scale_top;
    uint16_t d, dmin; /* out, as are the next three */
    int scale[Q_FIT_MAX_GROUPS], min[Q_FIT_MAX_GROUPS];
    uint8_t code[Q_FIT_LEN];
};
void q_fit_min(struct q_fit_min *fit, const float *x, const float *weights /* (Q_FIT_LEN) both */);

#endif
