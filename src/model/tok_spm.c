/* SentencePiece as llama and gemma use it: spaces become U+2581, neighbours merge into the token with the best score until
 * none is left, and what is no token is written in byte tokens. */
#include "src/model/tok_in.h"

#include <math.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"

#define MARK "\xe2\x96\x81" /* U+2581, stands for a space */
#define MARK_BYTES 3

static int hex(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* A token's text with spaces in place of the marks. */
static int unmark(struct tok *tok, int32_t id)
{
    const struct tok_span text = tok->text[id];
    int rc = tok_map_room(tok, text.n);
    if (rc)
        return rc;
    const char *p = tok->arena + text.off;
    char *tail = tok->arena + tok->arena_bytes;
    uint32_t n = 0;
    for (uint32_t i = 0; i < text.n;) {
        bool mark = text.n - i >= MARK_BYTES && memcmp(p + i, MARK, MARK_BYTES) == 0;
        tail[n++] = mark ? ' ' : p[i];
        i += mark ? MARK_BYTES : 1;
    }
    tok->piece[id] = (struct tok_span){.off = (uint32_t)tok->arena_bytes, .n = n};
    tok->arena_bytes += n;
    return 0;
}

static int add_piece(struct tok *tok, int32_t id)
{
    const struct tok_span text = tok->text[id];
    const char *p = tok->arena + text.off;
    unsigned attr = tok->attr[id];
    if (attr & (TOK_ATTR_CONTROL | TOK_ATTR_USER | TOK_ATTR_UNKNOWN))
        tok->piece[id] = text;
    else if (attr & TOK_ATTR_NORMAL)
        return unmark(tok, id);
    else if (attr & TOK_ATTR_BYTE) {
        if (text.n != 6 || memcmp(p, "<0x", 3) || p[5] != '>' || hex(p[3]) < 0 || hex(p[4]) < 0)
            return err(ERR_FORMAT, "tokenizer.ggml.tokens[%d]: a byte token, but not of the form <0xFF>", (int)id);
        return tok_map_keep(tok, &(char){(char)(hex(p[3]) * 16 + hex(p[4]))}, 1, &tok->piece[id]);
    }
    return 0;
}

int tok_spm_init(struct tok *tok, const struct tok_source *src)
{
    int rc = 0;
    if (!src->scores)
        return err(ERR_FORMAT, "tokenizer.ggml.scores is missing: a 'llama' vocabulary needs them");
    tok->score = mem_zalloc((size_t)tok->n_vocab, sizeof *tok->score, MEM_TOK);
    if (!tok->score)
        return err(ERR_NOMEM, "tokenizer: %d scores", (int)tok->n_vocab);
    for (int32_t id = 0; id < tok->n_vocab && rc == 0; id++) {
        if (isnan(src->scores[id]))
            return err(ERR_FORMAT, "tokenizer.ggml.scores[%d] is not a number", (int)id);
        tok->score[id] = src->scores[id] + 0.0f; /* no negative zero: equal scores must order alike */
        rc = add_piece(tok, id);
    }
    for (int b = 0; b < 256 && rc == 0; b++) {
        static const char digit[] = "0123456789ABCDEF";
        const char name[6] = {'<', '0', 'x', digit[b >> 4], digit[b & 15], '>'};
        tok->byte_id[b] = tok_find(tok, name, sizeof name);
        if (tok->byte_id[b] == TOK_NONE)
            tok->byte_id[b] = tok_find(tok, &(char){(char)b}, 1);
        if (tok->byte_id[b] == TOK_NONE)
            tok->byte_id[b] = tok->unk;
    }
    return rc;
}

/* The best score first. */
static bool pair_score(const struct tok_work *work, const struct tok_sym *left, const struct tok_sym *right,
                       uint32_t *order, int32_t *result)
{
    const struct tok *tok = work->tok;
    uint32_t n = left->n + right->n;
    if (n > tok->max_text_bytes)
        return false;
    int32_t id = tok_find(tok, work->text + left->off, n);
    if (id == TOK_NONE)
        return false;
    uint32_t bits;
    memcpy(&bits, &tok->score[id], sizeof bits);
    *order = bits & 0x80000000u ? bits : ~(bits | 0x80000000u); /* falling floats as rising integers */
    *result = id;
    return true;
}

static int emit(struct tok_work *work, const struct tok_sym *sym)
{
    int rc = 0;
    int32_t id = tok_find(work->tok, work->text + sym->off, sym->n);
    if (id != TOK_NONE)
        return tok_work_id(work, id);
    for (uint32_t i = 0; i < sym->n && rc == 0; i++) {
        id = work->tok->byte_id[(unsigned char)work->text[sym->off + i]];
        if (id != TOK_NONE)
            rc = tok_work_id(work, id);
    }
    return rc;
}

static int encode_marked(struct tok_work *work, const char *text, size_t n)
{
    int rc = 0;
    work->text = text;
    work->n_sym = 0;
    for (size_t at = 0; at < n && rc == 0;) {
        utf8proc_int32_t c;
        utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(n - at), &c);
        uint32_t step = len > 0 ? (uint32_t)len : 1;
        rc = tok_work_sym(work, (uint32_t)at, step, TOK_NONE);
        at += step;
    }
    if (rc == 0)
        rc = tok_work_merge(work, pair_score);
    for (int32_t i = n ? 0 : -1; i >= 0 && rc == 0; i = work->sym[i].next)
        rc = emit(work, &work->sym[i]);
    work->text = NULL;
    return rc;
}

int tok_spm_encode(struct tok_work *work, const char *text, size_t n, bool prefix)
{
    size_t n_spaces = prefix;
    for (size_t i = 0; i < n; i++)
        n_spaces += text[i] == ' ';
    size_t bytes = n + (prefix ? 1 : 0) + n_spaces * (MARK_BYTES - 1);
    char *marked = mem_alloc(bytes, MEM_TOK);
    if (!marked)
        return err(ERR_NOMEM, "tokenizing: %zu bytes", bytes);
    char *out = marked;
    if (prefix) {
        memcpy(out, MARK, MARK_BYTES);
        out += MARK_BYTES;
    }
    for (size_t i = 0; i < n; i++) {
        if (text[i] == ' ') {
            memcpy(out, MARK, MARK_BYTES);
            out += MARK_BYTES;
        } else {
            *out++ = text[i];
        }
    }
    int rc = encode_marked(work, marked, bytes);
    mem_free(marked);
    return rc;
}
