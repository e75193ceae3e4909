/* A short list of grammars by their text, so that ten thousand requests with one schema make it once. */
#include "src/cli/grammars.h"

#include <string.h>

/* As the library reads them. */
#define MAX_BYTES ((uint64_t)4 << 20)

const char *grammars_conflict(const struct conf *conf)
{
    return conf->grammar && conf->json_schema ? "--grammar and --json-schema both say what an answer has to be" : NULL;
}

int grammars_read(const struct conf *conf, struct text *text, struct grammars_wish *out)
{
    *out = (struct grammars_wish){.kind = conf->grammar ? FERRY_GRAMMAR_GBNF : FERRY_GRAMMAR_JSON_SCHEMA};
    if (!conf->grammar && !conf->json_schema)
        return 0;
    int rc = text_read(text, conf->grammar ? conf->grammar : conf->json_schema, MAX_BYTES);
    /* A file without a word is no wish for any object. */
    if (!rc && !text->n_bytes)
        rc = text_add(text, " ", 1);
    out->is_wanted = true;
    out->text = text_str(text);
    out->n_bytes = text->n_bytes;
    return rc;
}

static void done_one(struct grammars_one *one)
{
    ferry_grammar_free(one->grammar);
    text_done(&one->text);
    *one = (struct grammars_one){.grammar = NULL};
}

static bool is_wish(const struct grammars_one *one, const struct grammars_wish *wish)
{
    return one->grammar && one->kind == wish->kind && one->text.n_bytes == wish->n_bytes &&
           !memcmp(text_str(&one->text), wish->text, wish->n_bytes);
}

/* Let number i be the one used last. */
static void move_up(struct grammars *g, size_t i)
{
    struct grammars_one one = g->one[i];

    memmove(g->one + 1, g->one, i * sizeof *g->one);
    g->one[0] = one;
}

int grammars_get(struct grammars *g, struct ferry_engine *engine, const struct grammars_wish *wish,
                 struct ferry_grammar **out)
{
    struct grammars_one made = {.kind = wish->kind};
    size_t i = 0;

    *out = NULL;
    if (!wish->is_wanted)
        return 0;
    while (i < GRAMMARS_KEPT && !is_wish(&g->one[i], wish))
        i++;
    if (i == GRAMMARS_KEPT) {
        int rc = text_add(&made.text, wish->text, wish->n_bytes);
        if (!rc)
            rc = ferry_grammar_make(engine, wish->kind, wish->text, wish->n_bytes, &made.grammar);
        if (rc) {
            done_one(&made);
            return rc;
        }
        i = GRAMMARS_KEPT - 1;
        done_one(&g->one[i]);
        g->one[i] = made;
    }
    move_up(g, i);
    *out = g->one[0].grammar;
    return 0;
}

void grammars_done(struct grammars *g)
{
    for (size_t i = 0; i < GRAMMARS_KEPT; i++)
        done_one(&g->one[i]);
}
