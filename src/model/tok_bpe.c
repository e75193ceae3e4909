/* Byte-level byte-pair encoding. Vocabulary and merges spell bytes as characters (GPT-2's alphabet: printable Latin-1 stands for
 * itself, the other 68 bytes for U+0100 on); here all is turned back into bytes once, and every string that a merge can see
 * becomes a numbered symbol, so that encoding compares numbers. */
#include "src/model/tok_in.h"

#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"

/* The byte that a character of GPT-2's alphabet stands for, or -1. */
static int alphabet_byte(int32_t c)
{
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 172) || (c >= 174 && c <= 255))
        return c;
    c -= 256; /* then come 0 to 32, 127 to 160 and 173 */
    if (c < 0 || c > 67)
        return -1;
    return c < 33 ? c : c < 67 ? 127 + c - 33 : 173;
}

/* Bytes of a spelling, written to out (room for n); their number, or -1 if it has a character outside the alphabet. */
static int64_t decode(const char *p, size_t n, char *out)
{
    int64_t n_out = 0;
    for (size_t at = 0; at < n;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)p + at, (utf8proc_ssize_t)(n - at), &c);
        int byte = len > 0 ? alphabet_byte(c) : -1;
        if (byte < 0)
            return -1;
        out[n_out++] = (char)byte;
        at += (size_t)len;
    }
    return n_out;
}

/* The n bytes behind the arena's end, as a symbol: a known one, or a new one that keeps them. */
static int intern(struct tok *tok, uint32_t n, int32_t *out)
{
    *out = tok_map_get(&tok->by_sym, tok->arena, tok->sym, tok->arena + tok->arena_bytes, n);
    if (*out != TOK_NONE)
        return 0;
    if (tok->n_sym == tok->cap_sym) {
        int32_t cap = tok->cap_sym + tok->cap_sym / 2 + 64;
        struct tok_span *sym = mem_realloc(tok->sym, (size_t)cap * sizeof *sym, MEM_TOK);
        if (!sym)
            return err(ERR_NOMEM, "tokenizer: %d symbols", (int)cap);
        tok->sym = sym;
        tok->cap_sym = cap;
    }
    *out = tok->n_sym++;
    tok->sym[*out] = (struct tok_span){.off = (uint32_t)tok->arena_bytes, .n = n};
    tok->arena_bytes += n;
    return tok_map_put(&tok->by_sym, tok->arena, tok->sym, *out);
}

static bool is_hex_byte(const char *p, uint32_t n, unsigned *byte)
{
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(p, "<0x", 3) || p[5] != '>')
        return false;
    const char *hi = memchr(digits, p[3], 16), *lo = memchr(digits, p[4], 16);
    if (!hi || !lo)
        return false;
    *byte = (unsigned)(hi - digits) * 16 + (unsigned)(lo - digits);
    return true;
}

/* A token's symbol, if merges can make it, and what it stands for. */
static int add_token(struct tok *tok, int32_t id)
{
    const struct tok_span text = tok->text[id];
    int rc = tok_map_room(tok, text.n);
    if (rc)
        return rc;
    char *tail = tok->arena + tok->arena_bytes;
    int64_t n = text.n ? decode(tok->arena + text.off, text.n, tail) : -1;
    struct tok_span bytes = {.off = (uint32_t)tok->arena_bytes, .n = n < 0 ? 0 : (uint32_t)n};
    if (n == text.n && memcmp(tail, tok->arena + text.off, text.n) == 0)
        bytes = text; /* the usual ASCII word is kept once */
    else
        tok->arena_bytes += bytes.n;
    tok->sym[id] = bytes;

    unsigned attr = tok->attr[id], byte = 0;
    if (attr & (TOK_ATTR_CONTROL | TOK_ATTR_USER | TOK_ATTR_UNKNOWN) || (n < 0 && attr & TOK_ATTR_NORMAL))
        tok->piece[id] = text;
    else if (attr & TOK_ATTR_NORMAL)
        tok->piece[id] = bytes;
    else if (attr & TOK_ATTR_BYTE && is_hex_byte(tok->arena + text.off, text.n, &byte))
        rc = tok_map_keep(tok, &(char){(char)byte}, 1, &tok->piece[id]);
    if (rc == 0 && n >= 0)
        rc = tok_map_put(&tok->by_sym, tok->arena, tok->sym, id);
    return rc;
}

/* One side of a merge as a symbol. *out stays TOK_NONE if the spelling is outside the alphabet: such a merge never applies. */
static int side(struct tok *tok, const char *p, size_t n, int32_t *out)
{
    *out = TOK_NONE;
    int rc = tok_map_room(tok, n);
    if (rc)
        return rc;
    int64_t bytes = decode(p, n, tok->arena + tok->arena_bytes);
    return bytes < 1 ? 0 : intern(tok, (uint32_t)bytes, out);
}

static struct tok_pair *find_pair(const struct tok *tok, int32_t left, int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint64_t h = key * 0x9e3779b97f4a7c15u;
    uint32_t at = (uint32_t)(h >> 32) & tok->pair_mask;
    while (tok->pair[at].key != key && tok->pair[at].key != TOK_NO_PAIR)
        at = (at + 1) & tok->pair_mask;
    return &tok->pair[at];
}

static int add_merge(struct tok *tok, const struct tok_str *merge, int32_t rank)
{
    /* from the second byte: a space in front would belong to the left side */
    const char *gap = merge->n > 1 ? memchr(merge->p + 1, ' ', merge->n - 1) : NULL;
    if (!gap)
        return err(ERR_FORMAT, "tokenizer.ggml.merges[%d]: no space between two parts", (int)rank);
    int32_t left, right, result;
    int rc = side(tok, merge->p, (size_t)(gap - merge->p), &left);
    if (rc == 0)
        rc = side(tok, gap + 1, merge->n - (size_t)(gap - merge->p) - 1, &right);
    if (rc || left == TOK_NONE || right == TOK_NONE)
        return rc;
    rc = tok_map_room(tok, (uint64_t)tok->sym[left].n + tok->sym[right].n);
    if (rc)
        return rc;
    char *tail = tok->arena + tok->arena_bytes;
    memcpy(tail, tok->arena + tok->sym[left].off, tok->sym[left].n);
    memcpy(tail + tok->sym[left].n, tok->arena + tok->sym[right].off, tok->sym[right].n);
    rc = intern(tok, tok->sym[left].n + tok->sym[right].n, &result);
    if (rc)
        return rc;
    struct tok_pair *pair = find_pair(tok, left, right);
    if (pair->key == TOK_NO_PAIR) /* a pair given twice counts by its first rank */
        *pair = (struct tok_pair){(uint64_t)(uint32_t)left << 32 | (uint32_t)right, rank, result};
    return 0;
}

static int add_merges(struct tok *tok, const struct tok_source *src)
{
    uint64_t n = 16;
    while (n < (uint64_t)src->n_merges * 2)
        n *= 2;
    tok->pair = mem_alloc(n * sizeof *tok->pair, MEM_TOK);
    if (!tok->pair)
        return err(ERR_NOMEM, "tokenizer: %lld merges", (long long)src->n_merges);
    for (uint64_t i = 0; i < n; i++)
        tok->pair[i].key = TOK_NO_PAIR;
    tok->pair_mask = (uint32_t)(n - 1);
    int rc = 0;
    for (int64_t i = 0; i < src->n_merges && rc == 0; i++)
        rc = add_merge(tok, &src->merges[i], (int32_t)i);
    return rc;
}

int tok_bpe_init(struct tok *tok, const struct tok_source *src)
{
    int rc = tok_split_init(tok, src->pre);
    if (rc)
        return rc;
    tok->n_sym = tok->cap_sym = tok->n_vocab;
    tok->sym = mem_zalloc((size_t)tok->n_vocab, sizeof *tok->sym, MEM_TOK);
    if (!tok->sym)
        return err(ERR_NOMEM, "tokenizer: %d symbols", (int)tok->n_vocab);
    rc = tok_map_init(&tok->by_sym, tok->n_vocab);
    for (int32_t id = 0; id < tok->n_vocab && rc == 0; id++)
        rc = add_token(tok, id);
    if (rc == 0)
        rc = add_merges(tok, src);
    for (int b = 0; b < 256 && rc == 0; b++)
        tok->byte_id[b] = tok_map_get(&tok->by_sym, tok->arena, tok->sym, &(char){(char)b}, 1);
    return rc;
}

static bool pair_rank(const struct tok_work *work, const struct tok_sym *left, const struct tok_sym *right,
                      uint32_t *order, int32_t *result)
{
    if (left->id == TOK_NONE || right->id == TOK_NONE)
        return false;
    const struct tok_pair *pair = find_pair(work->tok, left->id, right->id);
    if (pair->key == TOK_NO_PAIR)
        return false;
    *order = (uint32_t)pair->rank;
    *result = pair->result;
    return true;
}

/* A symbol that is no token is given by its bytes; a byte that has no token either is unknown, or vanishes. */
static int emit(struct tok_work *work, const char *word, const struct tok_sym *sym)
{
    const struct tok *tok = work->tok;
    int rc = 0;
    if (sym->id >= 0 && sym->id < tok->n_vocab)
        return tok_work_id(work, sym->id);
    for (uint32_t i = 0; i < sym->n && rc == 0; i++) {
        int32_t id = tok->byte_id[(unsigned char)word[sym->off + i]];
        if (id < 0 || id >= tok->n_vocab)
            id = tok->unk;
        if (id != TOK_NONE)
            rc = tok_work_id(work, id);
    }
    return rc;
}

static int encode_word(struct tok_work *work, const char *word, size_t n)
{
    const struct tok *tok = work->tok;
    if (tok->split->whole_words) {
        int32_t id = tok_map_get(&tok->by_sym, tok->arena, tok->sym, word, n);
        if (id >= 0 && id < tok->n_vocab)
            return tok_work_id(work, id);
    }
    int rc = 0;
    work->n_sym = 0;
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = tok_work_sym(work, (uint32_t)i, 1, tok->byte_id[(unsigned char)word[i]]);
    if (rc == 0)
        rc = tok_work_merge(work, pair_rank);
    for (int32_t i = n ? 0 : -1; i >= 0 && rc == 0; i = work->sym[i].next)
        rc = emit(work, word, &work->sym[i]);
    return rc;
}

int tok_bpe_encode(struct tok_work *work, const char *text, size_t n)
{
    char *clean = NULL;
    size_t n_clean = 0;
    int rc = tok_stream_clean(text, n, &clean, &n_clean);
    if (rc == 0)
        rc = tok_split_run(work, clean, n_clean, encode_word);
    mem_free(clean);
    return rc;
}
