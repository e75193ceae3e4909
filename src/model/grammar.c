/* What a grammar owns. How it is made: grammar_build.c, grammar_check.c. */
#include "src/model/grammar.h"

#include "src/base/mem.h"

void grammar_free(struct grammar *g)
{
    if (!g)
        return;
    for (uint32_t i = 0; i < g->n_rules; i++)
        mem_free(g->rule[i].name);
    mem_free(g->rule_of_rank);
    mem_free(g->rule);
    mem_free(g->node);
    mem_free(g);
}
