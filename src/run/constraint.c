/* Owns the way from tokens to places in a grammar, and what tokens lead on from them. */
#include "src/run/constraint.h"

#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar.h"
#include "src/model/grammar_walk.h"
#include "src/model/tok.h"
#include "src/model/tok_trie.h"

/* Sets of allowed tokens that are kept: a draw without top-k wants the whole set, and an answer is mostly in few places (in a string, in
 * white space). Of 150,000 tokens one takes 19 KB. */
enum { N_MASKS = 32 };

/* What passes before the sentence begins: texts that have to come, one after the other, and anything before each. */
enum { STAGE_SENTENCE, STAGE_THOUGHT, STAGE_CHANNEL, STAGE_MESSAGE };

static const struct {
    const char *mark; /* its first character does not come again in it */
    int next;
} stages[] = {
    [STAGE_SENTENCE] = {NULL, STAGE_SENTENCE},
    [STAGE_THOUGHT] = {"</think>", STAGE_SENTENCE},
    [STAGE_CHANNEL] = {"<|channel|>final", STAGE_MESSAGE},
    [STAGE_MESSAGE] = {"<|message|>", STAGE_SENTENCE},
};

/* A place amid an answer. state < 0: a code, what went wrong. */
struct place {
    int stage, n_matched; /* of the stage's mark */
    int32_t state;
};

struct mask {
    bool is_used;
    struct place place;
    uint64_t *bit; /* own: (n_vocab / 64 + 1) */
};

struct constraint {
    struct grammar *grammar;   /* own */
    struct grammar_walk *walk; /* own */
    const struct tok *tok;
    const struct tok_trie *trie;
    int n_vocab, n_holders;
    int32_t think; /* the token <think>; TOK_NONE */
    int32_t *end;  /* own: (n_ends) tokens that end an answer */
    int n_ends;
    int first_stage;
    struct place *way; /* own: (trie->max_depth + 1) of a walk over the trie */
    struct mask mask[N_MASKS];
    int next_mask;
    uint32_t mask_epoch;
};

static bool has_token(const struct tok *tok, const char *text)
{
    return tok_find(tok, text, strlen(text)) != TOK_NONE;
}

static int find_ends(struct constraint *c)
{
    int n = 0;

    for (int32_t token = 0; token < tok_n_vocab(c->tok); token++)
        n += tok_is_eog(c->tok, token);
    c->end = mem_alloc((size_t)n * sizeof *c->end, MEM_OTHER);
    if (!c->end)
        return err(ERR_NOMEM, "an answer's grammar");
    for (int32_t token = 0; token < tok_n_vocab(c->tok); token++)
        if (tok_is_eog(c->tok, token))
            c->end[c->n_ends++] = token;
    return 0;
}

int constraint_make(struct grammar *grammar, const struct tok *tok, const struct tok_trie *trie, int n_vocab,
                    struct constraint **out)
{
    struct constraint *c = mem_zalloc(1, sizeof *c, MEM_OTHER);

    *out = NULL;
    if (!c) {
        grammar_free(grammar);
        return err(ERR_NOMEM, "an answer's grammar");
    }
    *c = (struct constraint){.grammar = grammar, .tok = tok, .trie = trie, .n_vocab = n_vocab, .n_holders = 1};
    c->think = has_token(tok, "</think>") ? tok_find(tok, "<think>", 7) : TOK_NONE;
    c->first_stage = has_token(tok, "<|channel|>") ? STAGE_CHANNEL : STAGE_THOUGHT;
    c->way = mem_alloc(((size_t)trie->max_depth + 1) * sizeof *c->way, MEM_OTHER);
    int rc = c->way ? find_ends(c) : err(ERR_NOMEM, "an answer's grammar");
    if (!rc)
        rc = grammar_walk_make(grammar, &c->walk);
    if (rc) {
        constraint_drop(c);
        return rc;
    }
    *out = c;
    return 0;
}

struct constraint *constraint_hold(struct constraint *c)
{
    if (c)
        c->n_holders++;
    return c;
}

void constraint_drop(struct constraint *c)
{
    if (!c || --c->n_holders > 0)
        return;
    for (int i = 0; i < N_MASKS; i++)
        mem_free(c->mask[i].bit);
    grammar_walk_free(c->walk);
    grammar_free(c->grammar);
    mem_free(c->way);
    mem_free(c->end);
    mem_free(c);
}

/* ---- steps ---- */

static struct place step(struct constraint *c, struct place p, uint8_t byte)
{
    const char *mark = stages[p.stage].mark;

    if (p.stage == STAGE_SENTENCE) {
        p.state = grammar_walk_step(c->walk, p.state, byte);
        return p;
    }
    p.n_matched = byte == (uint8_t)mark[p.n_matched] ? p.n_matched + 1 : byte == (uint8_t)mark[0];
    if (mark[p.n_matched])
        return p;
    p.n_matched = 0;
    if (stages[p.stage].next == STAGE_SENTENCE) {
        bool thought = p.stage == STAGE_THOUGHT;
        p.state = grammar_walk_start(c->walk, thought ? c->grammar->behind : c->grammar->root);
    }
    p.stage = stages[p.stage].next;
    return p;
}

/* Can the answer go on from there? */
static bool is_alive(struct place p)
{
    return p.stage != STAGE_SENTENCE || p.state != GRAMMAR_WALK_DEAD;
}

static bool has_failed(struct place p)
{
    return p.stage == STAGE_SENTENCE && p.state < 0;
}

static bool may_think(const struct constraint *c, const struct constraint_at *at)
{
    return at->thought == CONSTRAINT_MAY_THINK && at->n_tok == 0 && c->think != TOK_NONE;
}

/* Where a token leads that is no end token. */
static struct place lead(struct constraint *c, const struct constraint_at *at, int32_t token)
{
    struct place p = {at->stage, at->n_matched, at->state};
    const char *bytes = "";
    int n = 0;

    if (may_think(c, at) && token == c->think)
        return (struct place){.stage = STAGE_THOUGHT};
    bool is_text = token >= 0 && token < tok_n_vocab(c->tok) && tok_trie_has(c->trie, token);
    if (p.stage == STAGE_SENTENCE && !is_text)
        return (struct place){.state = GRAMMAR_WALK_DEAD};
    if (token >= 0 && token < tok_n_vocab(c->tok))
        tok_piece(c->tok, token, &bytes, &n);
    for (int i = 0; i < n && is_alive(p) && !has_failed(p); i++)
        p = step(c, p, (uint8_t)bytes[i]);
    return p;
}

static int begin(struct constraint *c, struct constraint_at *at)
{
    bool rests = at->thought == CONSTRAINT_AMID_THOUGHT;
    int32_t state = rests ? GRAMMAR_WALK_DEAD : grammar_walk_start(c->walk, c->grammar->root);

    if (state < 0)
        return state;
    at->epoch = c->walk->epoch;
    at->n_tok = 0;
    at->stage = rests ? c->first_stage : STAGE_SENTENCE;
    at->n_matched = 0;
    at->state = state;
    at->is_known = true;
    return 0;
}

int constraint_follow(struct constraint *c, struct constraint_at *at, const int32_t *token, size_t n)
{
    struct constraint_at now = *at;
    int rc = 0;

    grammar_walk_tidy(c->walk);
    if (!now.is_known || now.epoch != c->walk->epoch || n < now.n_tok)
        rc = begin(c, &now);
    for (; now.n_tok < n && !rc; now.n_tok++) {
        if (tok_is_eog(c->tok, token[now.n_tok])) /* a caller goes on behind an end: nothing of the sentence */
            continue;
        struct place p = lead(c, &now, token[now.n_tok]);
        if (has_failed(p))
            rc = p.state;
        else if (!is_alive(p))
            rc = err(ERR_ARG, "token %zu of the answer, %d, is not what the grammar allows", now.n_tok,
                     token[now.n_tok]);
        now.stage = p.stage;
        now.n_matched = p.n_matched;
        now.state = p.state;
    }
    if (!rc)
        *at = now;
    return rc;
}

bool constraint_is_done(const struct constraint *c, const struct constraint_at *at)
{
    return at->stage == STAGE_SENTENCE && grammar_walk_accepts(c->walk, at->state) &&
           !grammar_walk_goes_on(c->walk, at->state);
}

/* ---- candidates ---- */

static bool may_end(const struct constraint *c, const struct constraint_at *at)
{
    return !at->ignores_end && at->stage == STAGE_SENTENCE && grammar_walk_accepts(c->walk, at->state);
}

static int allows(void *arg, int32_t token)
{
    const struct constraint_view *v = arg;

    if (token >= tok_n_vocab(v->c->tok))
        return 0;
    if (tok_is_eog(v->c->tok, token))
        return may_end(v->c, v->at);
    struct place p = lead(v->c, v->at, token);
    return has_failed(p) ? p.state : is_alive(p);
}

static void set_bit(uint64_t *bit, int32_t token, bool is_set)
{
    uint64_t one = UINT64_C(1) << token % 64;

    bit[token / 64] = is_set ? bit[token / 64] | one : bit[token / 64] & ~one;
}

/* The tokens of the trie that go on a sentence. */
static int mark_sentence(struct constraint *c, int32_t state, uint64_t *bit)
{
    const struct tok_trie *t = c->trie;

    c->way[0] = (struct place){.state = state};
    for (int32_t node = 1; node < t->n_nodes;) {
        int depth = t->depth[node];
        int32_t to = grammar_walk_step(c->walk, c->way[depth - 1].state, t->byte[node]);
        if (to < 0)
            return to;
        if (to == GRAMMAR_WALK_DEAD) {
            node = t->end[node];
            continue;
        }
        c->way[depth].state = to;
        for (int32_t i = t->first[node]; i < t->first[node + 1]; i++)
            set_bit(bit, t->id[i], true);
        node++;
    }
    return 0;
}

/* While the constraint rests: all but what ends the thought and goes on wrongly. */
static int mark_thought(struct constraint_view *v, uint64_t *bit)
{
    for (int32_t token = 0; token < tok_n_vocab(v->c->tok); token++) {
        int rc = allows(v, token);
        if (rc < 0)
            return rc;
        set_bit(bit, token, rc);
    }
    return 0;
}

static bool is_same(const struct mask *m, const struct constraint_at *at)
{
    return m->is_used && m->place.stage == at->stage && m->place.n_matched == at->n_matched &&
           m->place.state == at->state;
}

static int find_mask(struct constraint_view *v, struct mask **out)
{
    struct constraint *c = v->c;
    size_t bytes = ((size_t)c->n_vocab / 64 + 1) * sizeof(uint64_t);

    if (c->mask_epoch != c->walk->epoch)
        for (int i = 0; i < N_MASKS; i++)
            c->mask[i].is_used = false;
    c->mask_epoch = c->walk->epoch;
    for (int i = 0; i < N_MASKS; i++)
        if (is_same(&c->mask[i], v->at)) {
            *out = &c->mask[i];
            return 0;
        }
    struct mask *m = *out = &c->mask[c->next_mask];
    c->next_mask = (c->next_mask + 1) % N_MASKS;
    m->is_used = false;
    if (!m->bit && !(m->bit = mem_alloc(bytes, MEM_OTHER)))
        return err(ERR_NOMEM, "tokens that a grammar allows");
    memset(m->bit, 0, bytes);
    int rc = v->at->stage == STAGE_SENTENCE ? mark_sentence(c, v->at->state, m->bit) : mark_thought(v, m->bit);
    if (rc < 0)
        return rc;
    m->is_used = true;
    m->place = (struct place){v->at->stage, v->at->n_matched, v->at->state};
    return 0;
}

static int all(void *arg, const uint64_t **bits)
{
    struct constraint_view *v = arg;
    struct mask *m = NULL;
    int rc = find_mask(v, &m);

    *bits = NULL;
    if (rc)
        return rc;
    /* What a place alone does not say. */
    for (int i = 0; i < v->c->n_ends; i++)
        set_bit(m->bit, v->c->end[i], may_end(v->c, v->at));
    if (v->c->think != TOK_NONE && v->at->stage == STAGE_SENTENCE)
        set_bit(m->bit, v->c->think, may_think(v->c, v->at));
    *bits = m->bit;
    return 0;
}

struct sample_filter constraint_filter(struct constraint_view *view)
{
    return (struct sample_filter){.allows = allows, .all = all, .arg = view};
}
