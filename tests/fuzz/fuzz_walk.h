/* What holds of any grammar that was taken: lint: C, as the entries are */
#ifndef FERRY_TESTS_FUZZ_WALK_H
#define FERRY_TESTS_FUZZ_WALK_H

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar.h"
#include "src/model/grammar_walk.h"

#include <stdlib.h>

/* A byte that leads on, the first from `from` on in turn; -1: none, and a code where one failed. */
static inline int fuzz_walk_next(struct grammar_walk *w, int32_t *state, uint8_t from)
{
    for (int i = 0; i < 256; i++) {
        uint8_t byte = (uint8_t)(from + i);
        int32_t to = grammar_walk_step(w, *state, byte);
        if (to < 0)
            return to;
        if (to == GRAMMAR_WALK_DEAD)
            continue;
        *state = to;
        return byte;
    }
    return ERR_STATE;
}

/* Follow it wherever the data's bytes lead: a text that is no whole one can be gone on with, within the bounds. */
static inline void fuzz_walk(const struct grammar *g, const uint8_t *data, size_t n)
{
    struct grammar_walk *w;

    if (grammar_walk_make(g, &w))
        abort();
    int32_t state = grammar_walk_start(w, g->root);
    if (state == GRAMMAR_WALK_DEAD)
        abort();
    for (size_t i = 0; i < n && i < 300 && state > 0; i++) {
        bool goes_on = grammar_walk_goes_on(w, state);
        if (!goes_on && !grammar_walk_accepts(w, state))
            abort();
        int byte = fuzz_walk_next(w, &state, data[i]);
        if (byte == ERR_LIMIT)
            break;
        if ((byte >= 0) != goes_on)
            abort();
        if (byte < 0)
            break;
    }
    grammar_walk_free(w);
}

typedef int fuzz_walk_read(const char *text, size_t n_bytes, struct grammar **out);

/* Any bytes for one of the readers: taken, and then followed, or refused with a text; nothing stays behind. */
static inline void fuzz_walk_any(fuzz_walk_read *read, const uint8_t *data, size_t n)
{
    uint64_t live = mem_live_bytes(MEM_OTHER);
    struct grammar *g;

    err_clear();
    int rc = read((const char *)data, n, &g);
    if (rc ? g || !*err_text() : !g)
        abort();
    if (!rc)
        fuzz_walk(g, data, n);
    grammar_free(g);
    if (mem_live_bytes(MEM_OTHER) != live)
        abort();
}

#endif
