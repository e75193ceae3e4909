/* The public face of grammars: model/grammar and run/constraint, over the vocabulary's texts, which are put in order for the first. */
#include "src/ferry.h"

#include "src/base/err.h"
#include "src/ferry_in.h"
#include "src/model/grammar.h"
#include "src/model/model.h"
#include "src/model/tok_trie.h"
#include "src/run/constraint.h"
#include "src/run/session.h"

_Static_assert((int)FERRY_THOUGHT_NONE == (int)CONSTRAINT_NO_THOUGHT &&
                   (int)FERRY_THOUGHT_MAY == (int)CONSTRAINT_MAY_THINK &&
                   (int)FERRY_THOUGHT_AMID == (int)CONSTRAINT_AMID_THOUGHT,
               "public thoughts are the internal ones");

/* The handle is the constraint itself: nothing is added to it. */
static struct constraint *inner(struct ferry_grammar *g)
{
    return (struct constraint *)g;
}

static int read_grammar(enum ferry_grammar_kind kind, const char *text, size_t n_bytes, struct grammar **out)
{
    if (kind == FERRY_GRAMMAR_GBNF)
        return grammar_gbnf(text, n_bytes, out);
    if (kind == FERRY_GRAMMAR_JSON_SCHEMA)
        return n_bytes ? grammar_schema(text, n_bytes, out) : grammar_schema_object(out);
    return err(ERR_ARG, "grammar kind %d", (int)kind);
}

int ferry_grammar_make(struct ferry_engine *e, enum ferry_grammar_kind kind, const char *text, size_t n_bytes,
                       struct ferry_grammar **out)
{
    struct constraint *c = NULL;
    struct grammar *g = NULL;

    *out = NULL;
    if (!e->tok)
        return err(ERR_STATE, "a grammar needs the vocabulary (ids_only)");
    int rc = read_grammar(kind, text, n_bytes, &g);
    if (rc == 0 && !e->trie && (rc = tok_trie_make(e->tok, &e->trie)) < 0)
        grammar_free(g);
    if (rc == 0)
        rc = constraint_make(g, e->tok, e->trie, e->model->hp.n_vocab, &c);
    *out = (struct ferry_grammar *)c;
    return rc;
}

void ferry_grammar_free(struct ferry_grammar *g)
{
    constraint_drop(inner(g));
}

void ferry_session_grammar(struct ferry_session *fs, struct ferry_grammar *g, enum ferry_thought thought)
{
    session_constrain(fs->s, inner(g), (enum constraint_thought)thought);
}

int ferry_session_is_whole(struct ferry_session *fs, bool *out)
{
    return session_is_whole(fs->s, out);
}
