/* How a grammar is put together: pieces of network with one way in and one way out (K. Thompson, "Regular Expression Search Algorithm",
 * CACM 11(6), 1968), joined bottom-up. Its parsers use this. The first error is kept, and later calls do nothing. */
#ifndef FERRY_MODEL_GRAMMAR_BUILD_H
#define FERRY_MODEL_GRAMMAR_BUILD_H

#include "src/model/grammar.h"

#ifdef __cplusplus
extern "C" {
#endif

struct grammar_build {
    struct grammar *g; /* own, until finish */
    int rc;            /* of the first error; 0: none */
};

/* Where it begins to be, its way in and its way out, which leads nowhere yet. A piece is joined to others once. */
struct grammar_piece {
    uint32_t first, entry, exit;
};

/* A set of characters: ranges of code points. */
#define GRAMMAR_BUILD_MAX_RANGES 512
struct grammar_set {
    uint32_t lo[GRAMMAR_BUILD_MAX_RANGES], hi[GRAMMAR_BUILD_MAX_RANGES]; /* (n) */
    int n;
};

/* lo <= hi. false: there is no room for another range. */
bool grammar_build_add(struct grammar_set *set, uint32_t lo, uint32_t hi);
void grammar_build_invert(struct grammar_set *set);
/* Of what is in the set, keep what lies in lo to hi (or, keep false, beside it). */
void grammar_build_clip(struct grammar_set *set, uint32_t lo, uint32_t hi, bool keep);
bool grammar_build_has(const struct grammar_set *set, uint32_t c);

void grammar_build_init(struct grammar_build *b);
void grammar_build_done(struct grammar_build *b); /* after finish, too */

/* A rule that is not defined yet; name (n_bytes): copied, NULL: none. */
uint32_t grammar_build_rule(struct grammar_build *b, const char *name, size_t n_bytes);
/* It is this. Takes the piece. */
void grammar_build_define(struct grammar_build *b, uint32_t rule, struct grammar_piece p);
bool grammar_build_is_defined(const struct grammar_build *b, uint32_t rule);

struct grammar_piece grammar_build_empty(struct grammar_build *b);
struct grammar_piece grammar_build_text(struct grammar_build *b, const char *bytes, size_t n);
struct grammar_piece grammar_build_byte(struct grammar_build *b, uint8_t lo, uint8_t hi);
/* One character of a set that is not empty. */
struct grammar_piece grammar_build_chars(struct grammar_build *b, const struct grammar_set *set);
struct grammar_piece grammar_build_call(struct grammar_build *b, uint32_t rule);

/* x, then y. */
struct grammar_piece grammar_build_seq(struct grammar_build *b, struct grammar_piece x, struct grammar_piece y);
/* x or y. */
struct grammar_piece grammar_build_alt(struct grammar_build *b, struct grammar_piece x, struct grammar_piece y);
/* x, least to most times; most UINT32_MAX: any number. */
struct grammar_piece grammar_build_repeat(struct grammar_build *b, struct grammar_piece x, uint32_t least,
                                          uint32_t most);

/* Keep an error with its text, as err(), unless there is one already. Returns the one that is kept. */
int grammar_build_fail(struct grammar_build *b, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* With rule root as what a text is, check everything and give the grammar away. ERR_FORMAT names the rule: it is not defined, derives no
 * text, or calls itself before a byte was read. */
int grammar_build_finish(struct grammar_build *b, uint32_t root, struct grammar **out);

#ifdef __cplusplus
}
#endif
#endif
