/* What the files of the schema converter share; nobody else includes this. */
#ifndef FERRY_MODEL_GRAMMAR_SCHEMA_IN_H
#define FERRY_MODEL_GRAMMAR_SCHEMA_IN_H

#include <jansson.h>

#include "src/model/grammar_build.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rules that all schemas share. */
struct grammar_values {
    struct grammar_build *b; /* view */
    uint32_t space, letter;  /* white space between values; a character of a string */
    uint32_t value, object;  /* any JSON value; any object */
};

/* A number's bounds, each a whole number. */
struct grammar_bounds {
    bool has_least, has_most, is_least_open, is_most_open; /* open: the bound itself is left out */
    int64_t least, most;
};

/* Digits that a number has at most, before the point and behind it: any reader keeps so many, and so does a double. */
#define GRAMMAR_VALUE_DIGITS 15
#define GRAMMAR_VALUE_MOST INT64_C(999999999999999)

void grammar_value_init(struct grammar_values *v, struct grammar_build *b);

struct grammar_piece grammar_value_space(struct grammar_values *v);
struct grammar_piece grammar_value_any(struct grammar_values *v);
struct grammar_piece grammar_value_object(struct grammar_values *v);
struct grammar_piece grammar_value_string(struct grammar_values *v, uint32_t least, uint32_t most);

/* The key of an object that is none of names (n); these are put in order. */
struct grammar_piece grammar_value_other_key(struct grammar_values *v, const char **names, size_t n);

/* The key of an object. */
struct grammar_piece grammar_value_name(struct grammar_values *v, const char *name);

/* Exactly this value, its members in their order. jansson nests values no deeper than the stack takes. */
struct grammar_piece grammar_value_literal(struct grammar_values *v, const json_t *value);

/* ERR_FORMAT: no number is within the bounds; they are at most GRAMMAR_VALUE_MOST in size. */
struct grammar_piece grammar_value_integer(struct grammar_values *v, const struct grammar_bounds *bounds);
struct grammar_piece grammar_value_number(struct grammar_values *v, const struct grammar_bounds *bounds);

/* A string of a format: date, time, date-time, uuid. false: not known. */
bool grammar_value_format(struct grammar_values *v, const char *name, struct grammar_piece *out);

#ifdef __cplusplus
}
#endif
#endif
