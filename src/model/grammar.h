/* A grammar: which texts an answer may be. Rules over bytes, each a small network whose edges are bytes and calls of rules (a recursive
 * transition network: W. A. Woods, "Transition Network Grammars for Natural Language Analysis", CACM 13(10), 1970). Characters beyond
 * ASCII are spelled out in UTF-8, so a text may be cut anywhere. Immutable once it is made: any thread. */
#ifndef FERRY_MODEL_GRAMMAR_H
#define FERRY_MODEL_GRAMMAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GRAMMAR_MAX_TEXT_BYTES ((size_t)4 << 20)
#define GRAMMAR_MAX_NODES ((uint32_t)1 << 20)
#define GRAMMAR_NONE UINT32_MAX

enum grammar_kind {
    GRAMMAR_BYTE, /* a byte from lo to hi leads to next */
    GRAMMAR_SKIP, /* to next; in a whole grammar nothing leads to one */
    GRAMMAR_FORK, /* to next and to other */
    GRAMMAR_CALL, /* through rule `other`, then to next */
    GRAMMAR_END,  /* of its rule */
};

struct grammar_node {
    uint8_t kind, lo, hi;
    uint32_t next, other; /* nodes, or a rule; GRAMMAR_NONE: not known yet */
};

struct grammar_rule {
    char *name; /* own; NULL: made on the way, without a name */
    uint32_t entry;
    uint32_t rank; /* who is called before a byte was read has a higher one than the caller */
    bool is_nullable;
};

struct grammar {
    struct grammar_node *node; /* own: (n_nodes) */
    struct grammar_rule *rule; /* own: (n_rules) */
    uint32_t n_nodes, n_rules, cap_nodes, cap_rules;
    uint32_t root;          /* rule: what a whole text is */
    uint32_t behind;        /* rule: the same behind at most two line feeds, as models put them behind a thought */
    uint32_t *rule_of_rank; /* own: (n_rules) */
    /* Bytes that no rule tells apart are of one class. */
    uint8_t class_of[256];
    int n_classes;
};

/* From GBNF, the form of llama.cpp's grammar files (without its matching of token ids). ERR_FORMAT with line and column; rules that
 * call themselves before a byte was read, and rules that derive no text, too. ERR_UNSUPPORTED, ERR_LIMIT, ERR_NOMEM. */
int grammar_gbnf(const char *text, size_t n_bytes, struct grammar **out);

/* From a JSON Schema: a document that the schema holds of. The dialect is 2020-12; what is supported of it says README.md of this folder.
 * ERR_UNSUPPORTED names the keyword and where it stands, as a JSON pointer; ERR_FORMAT, ERR_LIMIT, ERR_NOMEM. */
int grammar_schema(const char *text, size_t n_bytes, struct grammar **out);

/* Any JSON object. */
int grammar_schema_object(struct grammar **out);

void grammar_free(struct grammar *g); /* takes NULL */

#ifdef __cplusplus
}
#endif
#endif
