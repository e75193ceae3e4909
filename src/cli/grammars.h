/* The grammar that options name, and those of a batch's requests, which mostly are the same few. */
#ifndef FERRY_CLI_GRAMMARS_H
#define FERRY_CLI_GRAMMARS_H

#include <stddef.h>

#include "src/cli/conf.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What an answer has to be. */
struct grammars_wish {
    bool is_wanted; /* false: any text */
    enum ferry_grammar_kind kind;
    const char *text; /* (n_bytes); empty, as a schema: any JSON object */
    size_t n_bytes;
};

#define GRAMMARS_KEPT 16

struct grammars_one {
    struct ferry_grammar *grammar; /* own, as text; NULL: free */
    enum ferry_grammar_kind kind;
    struct text text;
};

/* Zeros: none were made. */
struct grammars {
    struct grammars_one one[GRAMMARS_KEPT]; /* the one used last first */
};

/* Is more than one way named? Then what is wrong with that; NULL: nothing. */
const char *grammars_conflict(const struct conf *conf);

/* What --grammar or --json-schema wants: its file goes to text, which the wish is a view of. ERR_IO, ERR_LIMIT, ERR_NOMEM. */
int grammars_read(const struct conf *conf, struct text *text, struct grammars_wish *out);

/* The grammar of a wish: made, or found again. *out: a view until the next call; NULL: none is wanted. Codes of ferry_grammar_make. */
int grammars_get(struct grammars *g, struct ferry_engine *engine, const struct grammars_wish *wish,
                 struct ferry_grammar **out);

void grammars_done(struct grammars *g); /* before the engine is closed */

#ifdef __cplusplus
}
#endif
#endif
