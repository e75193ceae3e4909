/* Which tokens an answer's grammar allows next. Where an answer stands is a function of its tokens: it can be worked out anew at any time,
 * and nothing of it has to be kept.
 *
 * While an answer is amid a thought the constraint rests: all tokens may come but those that end the answer. The sentence begins behind
 * </think>, or at most two line feeds later; in channels (gpt-oss) behind the <|message|> of the final one. */
#ifndef FERRY_RUN_CONSTRAINT_H
#define FERRY_RUN_CONSTRAINT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/run/sample.h"

#ifdef __cplusplus
extern "C" {
#endif

struct constraint; /* a grammar, held against a vocabulary; shared by sequences. One thread */
struct grammar;
struct tok;
struct tok_trie;

enum constraint_thought {
    CONSTRAINT_NO_THOUGHT,   /* the sentence begins at once */
    CONSTRAINT_MAY_THINK,    /* a first token <think> begins a thought, if the vocabulary has it */
    CONSTRAINT_AMID_THOUGHT, /* the answer begins amid one */
};

/* Takes the grammar, also when it fails; tok and trie: views that outlive the constraint. n_vocab: of the logits. ERR_NOMEM. */
int constraint_make(struct grammar *grammar, const struct tok *tok, const struct tok_trie *trie, int n_vocab,
                    struct constraint **out);

/* Counted: whoever holds it drops it. Both take NULL. */
struct constraint *constraint_hold(struct constraint *c);
void constraint_drop(struct constraint *c);

/* Where an answer stands. A value. */
struct constraint_at {
    enum constraint_thought thought;
    bool ignores_end; /* end tokens are no candidates */
    bool is_known;    /* what follows was worked out */
    uint32_t epoch;
    size_t n_tok; /* tokens that were followed */
    int stage, n_matched;
    int32_t state;
};

/* Bring it up to date with an answer's n tokens. ERR_ARG: they are no beginning of a sentence; ERR_LIMIT, ERR_NOMEM: as before. */
int constraint_follow(struct constraint *c, struct constraint_at *at, const int32_t *token, size_t n);

/* Is the sentence whole, and can nothing more come? Up to date. */
bool constraint_is_done(const struct constraint *c, const struct constraint_at *at);

/* The candidates of the next draw; views until the next call. Up to date. */
struct constraint_view {
    struct constraint *c;
    const struct constraint_at *at;
};
struct sample_filter constraint_filter(struct constraint_view *view);

#ifdef __cplusplus
}
#endif
#endif
