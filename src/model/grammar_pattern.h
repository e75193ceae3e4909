/* Regular expressions as pieces of a grammar: of ECMA-262's those that describe a regular language without looking around. */
#ifndef FERRY_MODEL_GRAMMAR_PATTERN_H
#define FERRY_MODEL_GRAMMAR_PATTERN_H

#include "src/model/grammar_build.h"

#ifdef __cplusplus
extern "C" {
#endif

enum grammar_pattern_kind {
    GRAMMAR_PATTERN_BYTES, /* the text as a whole, as it is */
    GRAMMAR_PATTERN_JSON, /* what a JSON string holds, as its characters are written there; ^ and $ say where it may not go on */
};

/* Characters, escapes (\d \w \s \S \t \n \r \f \v \xHH \uHHHH), sets, ., groups, |, * + ? {m,n}; a lazy quantifier is the same as its twin.
 * \d, \w and \s are ASCII; \S leaves out all white space of Unicode. ERR_FORMAT and ERR_UNSUPPORTED say at which byte. */
struct grammar_piece grammar_pattern(struct grammar_build *b, enum grammar_pattern_kind kind, const char *text,
                                     size_t n);

#ifdef __cplusplus
}
#endif
#endif
