/* What tokens are as text, by their beginnings: a trie in preorder. Left out are tokens that add no text to an answer, tokens that end one,
 * and those that mark its parts (<think>, <|channel|>). Immutable: any thread. */
#ifndef FERRY_MODEL_TOK_TRIE_H
#define FERRY_MODEL_TOK_TRIE_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct tok;

struct tok_trie {
    int32_t n_nodes, n_ids, max_depth;
    /* Node 0 is the empty text. */
    uint8_t *byte;   /* own: (n_nodes) the last of its text */
    uint16_t *depth; /* own: (n_nodes) bytes of its text */
    int32_t *end;    /* own: (n_nodes) the first node that does not begin with its text */
    int32_t *first;  /* own: (n_nodes + 1) where its tokens begin in id */
    int32_t *id;     /* own: (n_ids) */
    uint64_t *has;   /* own: a bit for each token of the vocabulary: is it here? */
};

/* ERR_LIMIT (a token of more than 65535 bytes), ERR_NOMEM. */
int tok_trie_make(const struct tok *tok, struct tok_trie **out);
void tok_trie_free(struct tok_trie *t); /* takes NULL */

static inline bool tok_trie_has(const struct tok_trie *t, int32_t id)
{
    return t->has[id / 64] >> id % 64 & 1;
}

#ifdef __cplusplus
}
#endif
#endif
