/* One vector for a whole sequence, from the hidden states of its tokens. Positions are taken in ascending order and summed in
 * double, one by one, so that the vector does not depend on how the sequence was cut into steps. */
#ifndef FERRY_RUN_EMBED_H
#define FERRY_RUN_EMBED_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum embed_pooling { EMBED_NONE, EMBED_MEAN, EMBED_LAST };

struct embed {
    enum embed_pooling pooling;
    int n_embd;
    int64_t n_tok; /* positions taken so far */
    double *sum;   /* own: (n_embd), of mean */
    float *value;  /* own: (n_embd) */
};

/* EMBED_NONE takes no memory. ERR_NOMEM. */
int embed_init(struct embed *e, enum embed_pooling pooling, int n_embd);
void embed_done(struct embed *e); /* takes a zeroed one, or one whose init failed */

/* The hidden states (n_embd) of the next position. */
void embed_add(struct embed *e, const float *hidden);

/* Make value the mean, or the last one; normalize: of length 1 (a vector of zeros stays as it is). After at least one position. */
void embed_finish(struct embed *e, bool normalize);

#ifdef __cplusplus
}
#endif
#endif
