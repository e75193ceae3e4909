/* Tokens that are more than text: which ones end an answer, and where text spells one.
 * GGUF files leave part of this to the names of tokens; the names are facts of the model families' tokenizer files. */
#include "src/model/tok_in.h"

#include <stdlib.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/log.h"

/* What a well-known name means. */
enum role {
    IS_EOG = 1,
    IS_EOT = 2,
    IS_EOM = 4,
    IS_FIM_PAD = 8,
    IS_FIM_REP = 16,
    IS_FIM_SEP = 32,
    IS_FIM = 64,
    IS_SHOWN = 128
};

/* Within one role the earlier row wins. */
static const struct {
    const char *text;
    unsigned role;
} names[] = {
    {"<|eot_id|>", IS_EOT | IS_EOG},      /* Llama 3 */
    {"<|im_end|>", IS_EOT | IS_EOG},      /* ChatML */
    {"<|end|>", IS_EOT | IS_EOG},         /* Phi-3 */
    {"<end_of_turn>", IS_EOT | IS_EOG},   /* Gemma */
    {"<|endoftext|>", IS_EOT | IS_EOG},   /* GPT-2 and descendants */
    {"<|end_of_text|>", IS_EOT | IS_EOG}, /* Granite, Llama 3 */
    {"<EOT>", IS_EOT | IS_EOG},
    {"_<EOT>", IS_EOT | IS_EOG},
    {"[EOT]", IS_EOT | IS_EOG},                 /* Kimi */
    {"<｜end▁of▁sentence｜>", IS_EOT | IS_EOG}, /* DeepSeek */
    {"<end_of_utterance>", IS_EOT | IS_EOG},    /* SmolDocling */
    {"<|eom_id|>", IS_EOM | IS_EOG},            /* Llama 3.1 */
    {"<|return|>", IS_EOG},                     /* gpt-oss */
    {"<|call|>", IS_EOG},
    {"<|flush|>", IS_EOG}, /* Solar */
    {"<|calls|>", IS_EOG},
    {"</s>", IS_EOG},
    {"[EOS]", IS_EOG},
    {"<eos>", IS_EOG},
    {"<turn|>", IS_EOG}, /* Gemma 4 */
    {"<|tool_response>", IS_EOG},
    {"[e~[", IS_EOG},            /* MiniMax */
    {"<|fim_pad|>", IS_FIM_PAD}, /* Qwen */
    {"<fim-pad>", IS_FIM_PAD},
    {"<fim_pad>", IS_FIM_PAD}, /* Granite */
    {"<PAD>", IS_FIM_PAD},
    {"[PAD]", IS_FIM_PAD},
    {"<|fim_repo|>", IS_FIM_REP},
    {"<|repo_name|>", IS_FIM_REP},
    {"<fim-repo>", IS_FIM_REP},
    {"<REPO>", IS_FIM_REP},
    {"<reponame>", IS_FIM_REP},
    {"<|file_sep|>", IS_FIM_SEP},
    {"<|fim_prefix|>", IS_FIM},
    {"<fim-prefix>", IS_FIM},
    {"<fim_prefix>", IS_FIM},
    {"<｜fim▁begin｜>", IS_FIM},
    {"<|fim_suffix|>", IS_FIM},
    {"<fim-suffix>", IS_FIM},
    {"<fim_suffix>", IS_FIM},
    {"<｜fim▁hole｜>", IS_FIM},
    {"<|fim_middle|>", IS_FIM},
    {"<fim-middle>", IS_FIM},
    {"<fim_middle>", IS_FIM},
    {"<｜fim▁end｜>", IS_FIM},
    {"<|channel|>", IS_SHOWN}, /* gpt-oss: its answers are read by these */
    {"<|message|>", IS_SHOWN},
    {"<|start|>", IS_SHOWN},
    {"<|constrain|>", IS_SHOWN},
};

static int32_t by_name(const struct tok *tok, const char *text)
{
    return tok_find(tok, text, strlen(text));
}

static void set_attr(struct tok *tok, int32_t id, unsigned attr)
{
    if (id != TOK_NONE)
        tok->attr[id] = (uint16_t)(tok->attr[id] | attr);
}

static void clear_attr(struct tok *tok, int32_t id, unsigned attr)
{
    if (id != TOK_NONE)
        tok->attr[id] = (uint16_t)(tok->attr[id] & ~attr);
}

/* Fill an id that the file left open, from the first name that the vocabulary has; such a token counts as control. */
static void adopt(struct tok *tok, int32_t *id, unsigned role)
{
    for (size_t i = 0; i < sizeof names / sizeof *names && *id == TOK_NONE; i++)
        if (names[i].role & role) {
            *id = by_name(tok, names[i].text);
            set_attr(tok, *id, TOK_ATTR_CONTROL);
        }
}

static void apply_names(struct tok *tok)
{
    adopt(tok, &tok->eot, IS_EOT);
    adopt(tok, &tok->eom, IS_EOM);
    adopt(tok, &tok->fim_pad, IS_FIM_PAD);
    adopt(tok, &tok->fim_rep, IS_FIM_REP);
    adopt(tok, &tok->fim_sep, IS_FIM_SEP);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int32_t id = by_name(tok, names[i].text);
        if (id == TOK_NONE)
            continue;
        if (names[i].role & IS_EOG)
            set_attr(tok, id, TOK_ATTR_EOG | TOK_ATTR_CONTROL);
        if (names[i].role & IS_FIM)
            set_attr(tok, id, TOK_ATTR_CONTROL);
        if (names[i].role & IS_SHOWN)
            tok->attr[id] = TOK_ATTR_USER;
    }
}

static void find_eog(struct tok *tok)
{
    const int32_t ids[] = {tok->eos, tok->eot, tok->eom, tok->fim_pad, tok->fim_rep, tok->fim_sep};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++)
        set_attr(tok, ids[i], TOK_ATTR_EOG);

    /* Where a family has its own names for the end of an answer, <|end|> only ends a part of it. */
    bool call = tok_is_eog(tok, by_name(tok, "<|call|>")) || tok_is_eog(tok, by_name(tok, "<|calls|>"));
    bool last = tok_is_eog(tok, by_name(tok, "<|return|>")) || tok_is_eog(tok, by_name(tok, "<|flush|>"));
    int32_t end = by_name(tok, "<|end|>");
    if (call && last && end != TOK_NONE)
        tok->attr[end] = TOK_ATTR_USER;

    /* Gemma 4 has </s> as a piece of HTML. */
    int32_t s = by_name(tok, "</s>");
    if (s != TOK_NONE && tok_is_eog(tok, by_name(tok, "<|tool_response>")))
        tok->attr[s] = TOK_ATTR_NORMAL;
}

/* Phi-3's special tokens swallow the white space behind them, except these; the GGUF says it by the model's name alone. */
static void apply_strip(struct tok *tok, const char *model_name)
{
    static const char *const plain[] = {"<unk>", "<s>", "<|endoftext|>"};
    char low[64] = "";
    for (size_t i = 0; model_name && model_name[i] && i < sizeof low - 1; i++)
        low[i] = (char)(model_name[i] >= 'A' && model_name[i] <= 'Z' ? model_name[i] + 32 : model_name[i]);
    if (!strstr(low, "phi-3") && !strstr(low, "phi3"))
        return;
    for (int32_t i = 0; i < tok->n_special; i++)
        set_attr(tok, tok->special[i], TOK_ATTR_RSTRIP);
    set_attr(tok, by_name(tok, "</s>"), TOK_ATTR_RSTRIP);
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++)
        clear_attr(tok, by_name(tok, plain[i]), TOK_ATTR_RSTRIP);
}

struct entry {
    const char *p;
    uint32_t n;
    int32_t id;
};

static int by_text(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    int c = memcmp(x->p, y->p, x->n < y->n ? x->n : y->n);
    if (c == 0)
        c = x->n < y->n ? -1 : x->n > y->n;
    if (c == 0)
        c = x->id < y->id ? -1 : 1;
    return c;
}

/* The table of texts, in byte order: a position of the input narrows it down byte by byte. */
static int build_table(struct tok *tok)
{
    const unsigned is_special = TOK_ATTR_CONTROL | TOK_ATTR_USER | TOK_ATTR_UNKNOWN;
    int32_t n = 0;
    for (int32_t id = 0; id < tok->n_vocab; id++)
        n += tok->attr[id] & is_special && tok->text[id].n;
    struct entry *entry = mem_zalloc((size_t)n, sizeof *entry, MEM_TOK);
    tok->special = mem_zalloc((size_t)n, sizeof *tok->special, MEM_TOK);
    if (!entry || !tok->special) {
        mem_free(entry);
        return err(ERR_NOMEM, "tokenizer: %d special tokens", (int)n);
    }
    int32_t at = 0;
    for (int32_t id = 0; id < tok->n_vocab; id++)
        if (tok->attr[id] & is_special && tok->text[id].n)
            entry[at++] = (struct entry){tok->arena + tok->text[id].off, tok->text[id].n, id};
    qsort(entry, (size_t)n, sizeof *entry, by_text);
    at = 0;
    for (int byte = 0; byte <= 256; byte++) {
        while (at < n && (unsigned char)entry[at].p[0] < byte)
            at++;
        tok->special_from[byte] = at;
    }
    for (int32_t i = 0; i < n; i++)
        tok->special[i] = entry[i].id;
    tok->n_special = n;
    mem_free(entry);
    return 0;
}

int tok_special_init(struct tok *tok, const char *model_name)
{
    apply_names(tok);
    find_eog(tok);
    int rc = build_table(tok);
    if (rc == 0)
        apply_strip(tok, model_name);
    return rc;
}

static bool is_wanted(const struct tok *tok, int32_t id, unsigned flags)
{
    return flags & TOK_SPECIAL || !(tok->attr[id] & (TOK_ATTR_CONTROL | TOK_ATTR_UNKNOWN));
}

/* The first entry of special[lo..hi), all alike in their first at bytes, whose byte there is >= byte. Texts that end before
 * come first. */
static int32_t lower(const struct tok *tok, int32_t lo, int32_t hi, uint32_t at, int byte)
{
    while (lo < hi) {
        int32_t mid = lo + (hi - lo) / 2;
        const struct tok_span *t = &tok->text[tok->special[mid]];
        if (t->n <= at || (unsigned char)tok->arena[t->off + at] < byte)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest special token that starts at p and is shorter than limit; TOK_NONE. */
static int32_t longest(const struct tok *tok, const char *p, uint32_t n, uint32_t limit, unsigned flags)
{
    int32_t best = TOK_NONE;
    int32_t lo = tok->special_from[(unsigned char)*p], hi = tok->special_from[(unsigned char)*p + 1];
    for (uint32_t at = 1; lo < hi; at++) {
        if (at >= limit)
            break;
        int32_t id =
            tok->special[lo]; /* the shortest of its kind; equal texts all stand here, the first is the lowest id */
        if (tok->text[id].n == at && is_wanted(tok, id, flags))
            best = id;
        if (at >= n)
            break;
        lo = lower(tok, lo, hi, at, (unsigned char)p[at]);
        hi = lower(tok, lo, hi, at, (unsigned char)p[at] + 1);
    }
    return best;
}

static int push_longest(struct tok_work *work, const char *text, uint32_t n, uint32_t at, uint32_t limit,
                        unsigned flags)
{
    int32_t id = longest(work->tok, text + at, n - at, limit, flags);
    if (id == TOK_NONE)
        return 0;
    uint32_t len = work->tok->text[id].n;
    const struct tok_node node = {.key = (uint64_t)(UINT32_MAX - len) << 32 | at, .result = id, .n = len};
    return tok_work_push(work, &node);
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

enum { FREE, TAKEN, DROPPED }; /* a byte of the text: nobody's, in a special token, swallowed by one */

struct hit {
    uint32_t off;
    int32_t id;
};

static int by_off(const void *a, const void *b)
{
    const struct hit *x = a, *y = b;
    return x->off < y->off ? -1 : x->off > y->off;
}

static void take(const struct tok *tok, const char *text, uint32_t n, const struct tok_node *node, char *state)
{
    uint32_t at = (uint32_t)node->key, end = at + node->n;
    memset(state + at, TAKEN, node->n);
    if (tok->attr[node->result] & TOK_ATTR_LSTRIP)
        for (; at > 0 && state[at - 1] == FREE && is_space(text[at - 1]); at--)
            state[at - 1] = DROPPED;
    if (tok->attr[node->result] & TOK_ATTR_RSTRIP)
        for (; end < n && state[end] == FREE && is_space(text[end]); end++)
            state[end] = DROPPED;
}

/* Choose the special tokens: longer ones first, then from left to right, none over another. Every position keeps one
 * candidate in the heap, the longest that may still fit. *hits grows as needed and is the caller's, on failure too. */
static int choose(struct tok_work *work, const char *text, uint32_t n, unsigned flags, char *state, struct hit **hits,
                  int64_t *n_hits)
{
    int64_t cap = 0;
    struct tok_node node;
    int rc = 0;
    while (rc == 0 && tok_work_pop(work, &node)) {
        uint32_t at = (uint32_t)node.key;
        if (state[at] != FREE)
            continue;
        /* What was taken before is at least as long, so an overlap shows at one of the two ends. */
        if (state[at + node.n - 1] != FREE) {
            rc = push_longest(work, text, n, at, node.n, flags);
            continue;
        }
        if (*n_hits == cap) {
            cap = cap ? cap * 2 : 64;
            struct hit *h = mem_realloc(*hits, (size_t)cap * sizeof *h, MEM_TOK);
            if (!h)
                return err(ERR_NOMEM, "tokenizing: %lld special tokens", (long long)cap);
            *hits = h;
        }
        (*hits)[(*n_hits)++] = (struct hit){at, node.result};
        take(work->tok, text, n, &node, state);
    }
    return rc;
}

/* Fragments from the hits and the state of each byte. */
static int64_t lay_out(const struct tok *tok, uint32_t n, const char *state, const struct hit *hits, int64_t n_hits,
                       struct tok_frag *frag)
{
    int64_t n_frags = 0;
    uint32_t at = 0;
    for (int64_t i = 0; i <= n_hits; i++) {
        uint32_t end = i < n_hits ? hits[i].off : n;
        uint32_t from = at, to = end;
        while (from < to && state && state[from] == DROPPED)
            from++;
        while (from < to && state && state[to - 1] == DROPPED)
            to--;
        if (from < to)
            frag[n_frags++] = (struct tok_frag){from, to - from, TOK_NONE};
        if (i == n_hits)
            break;
        frag[n_frags++] = (struct tok_frag){end, tok->text[hits[i].id].n, hits[i].id};
        at = end + tok->text[hits[i].id].n;
    }
    return n_frags;
}

int tok_special_cut(struct tok_work *work, const char *text, uint32_t n, unsigned flags, struct tok_frag **frags,
                    int64_t *n_frags)
{
    char *state = NULL;
    struct hit *hits = NULL;
    int64_t n_hits = 0;
    int rc = 0;
    *frags = NULL;
    work->n_heap = 0;
    for (uint32_t at = 0; at < n && rc == 0; at++)
        rc = push_longest(work, text, n, at, UINT32_MAX, flags);
    if (rc == 0 && work->n_heap) {
        state = mem_zalloc(n, 1, MEM_TOK);
        rc = state ? choose(work, text, n, flags, state, &hits, &n_hits) : err(ERR_NOMEM, "tokenizing: %u bytes", n);
    }
    if (rc)
        goto out;
    if (n_hits)
        qsort(hits, (size_t)n_hits, sizeof *hits, by_off);
    *frags = mem_alloc((size_t)(2 * n_hits + 1) * sizeof **frags, MEM_TOK);
    if (!*frags)
        rc = err(ERR_NOMEM, "tokenizing: %lld special tokens", (long long)n_hits);
    else
        *n_frags = lay_out(work->tok, n, state, hits, n_hits, *frags);
out:
    mem_free(state);
    mem_free(hits);
    return rc;
}
