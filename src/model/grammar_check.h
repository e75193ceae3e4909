/* What has to hold of rules that were read, and what follows from them. */
#ifndef FERRY_MODEL_GRAMMAR_CHECK_H
#define FERRY_MODEL_GRAMMAR_CHECK_H

#ifdef __cplusplus
extern "C" {
#endif

struct grammar;

/* Check that each rule is defined, derives a text, and does not call itself before a byte was read; then fill in ranks, classes of bytes
 * and what is nullable, and let nothing lead to a GRAMMAR_SKIP. Time and memory go with the number of nodes. ERR_FORMAT names the rule;
 * ERR_NOMEM. */
int grammar_check(struct grammar *g);

#ifdef __cplusplus
}
#endif
#endif
