/* Token ids back to text, whole characters only. */
#include "src/model/tok_in.h"

#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"

#define BAD "\xef\xbf\xbd" /* U+FFFD */
#define BAD_BYTES 3

/* Bytes of the valid character at p, or 0. */
static size_t char_bytes(const char *p, size_t n)
{
    utf8proc_int32_t c;
    utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)n, &c);
    return len > 0 ? (size_t)len : 0;
}

bool tok_stream_is_utf8(const char *text, size_t n)
{
    for (size_t at = 0, len; at < n; at += len) {
        len = char_bytes(text + at, n - at);
        if (!len)
            return false;
    }
    return true;
}

/* PCRE2's JIT code reads whole vectors: up to this far past the end. */
#define SLACK_BYTES 64

int tok_stream_clean(const char *text, size_t n, char **out, size_t *n_out)
{
    size_t n_bad = 0, at = 0, len;
    for (at = 0; at < n; at += len ? len : 1) {
        len = char_bytes(text + at, n - at);
        n_bad += !len;
    }
    size_t bytes = n + n_bad * (BAD_BYTES - 1);
    char *p = mem_alloc(bytes + SLACK_BYTES, MEM_TOK);
    if (!p)
        return err(ERR_NOMEM, "tokenizing: %zu bytes", bytes);
    *out = p;
    *n_out = bytes;
    memset(p + bytes, 0, SLACK_BYTES);
    if (!n_bad) {
        memcpy(p, text, n);
        return 0;
    }
    for (at = 0; at < n; at += len ? len : 1) {
        len = char_bytes(text + at, n - at);
        memcpy(p, len ? text + at : BAD, len ? len : BAD_BYTES);
        p += len ? len : BAD_BYTES;
    }
    return 0;
}

/* Could the n bytes at p, which are no character, become one with more bytes behind them? */
static bool is_begun(const char *p, size_t n)
{
    char whole[4];
    unsigned char lead = (unsigned char)*p;
    size_t want = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    if (n >= want)
        return false;
    memcpy(whole, p, n);
    /* The second byte decides what the others may be (no long forms, no surrogates, none past U+10FFFF): either end will do. */
    for (int fill = 0x80; fill <= 0xbf; fill += 0x3f) {
        memset(whole + n, fill, want - n);
        if (char_bytes(whole, want) == want)
            return true;
    }
    return false;
}

/* Write text as valid UTF-8: out has room for 3 * n. *n_rest: bytes at the end of text that begin a character. */
static size_t put_clean(const char *text, size_t n, char *out, size_t *n_rest)
{
    char *p = out;
    *n_rest = 0;
    for (size_t at = 0; at < n;) {
        size_t len = char_bytes(text + at, n - at);
        if (len) {
            memcpy(p, text + at, len);
            p += len;
            at += len;
            continue;
        }
        size_t begun = n - at < 3 ? n - at : 3;
        while (begun > 0 && !is_begun(text + at, begun))
            begun--;
        if (begun == n - at) {
            *n_rest = begun;
            break;
        }
        memcpy(p, BAD, BAD_BYTES); /* one for a character that was begun and broken off, as Unicode advises */
        p += BAD_BYTES;
        at += begun ? begun : 1;
    }
    return (size_t)(p - out);
}

int tok_stream_init(struct tok_stream *stream, const struct tok *tok, unsigned flags)
{
    *stream = (struct tok_stream){.tok = tok, .flags = flags};
    /* in: held bytes and one piece; out behind it, each byte at worst a U+FFFD */
    size_t in_bytes = sizeof stream->held + tok->max_piece_bytes;
    stream->buf = mem_alloc(in_bytes * (1 + BAD_BYTES), MEM_TOK);
    if (!stream->buf)
        return err(ERR_NOMEM, "text stream: %zu bytes", in_bytes * (1 + BAD_BYTES));
    return 0;
}

/* What a token adds to the text under these flags. */
static int visible(const struct tok_stream *stream, int32_t id, const char **p, int *n)
{
    int rc = tok_piece(stream->tok, id, p, n);
    if (rc == 0 && !(stream->flags & TOK_SPECIAL) && stream->tok->attr[id] & (TOK_ATTR_CONTROL | TOK_ATTR_UNKNOWN))
        *n = 0;
    return rc;
}

int tok_stream_push(struct tok_stream *stream, int32_t id, const char **text, int *n)
{
    const char *p;
    int n_piece;
    int rc = visible(stream, id, &p, &n_piece);
    if (rc)
        return rc;
    bool trim = stream->flags & TOK_TRIM && stream->tok->add_space_prefix && n_piece > 0 && *p == ' ';
    if (n_piece > 0)
        stream->flags &= ~(unsigned)TOK_TRIM; /* only in front of the text */
    size_t n_in = (size_t)stream->n_held;
    memcpy(stream->buf, stream->held, n_in);
    memcpy(stream->buf + n_in, p + trim, (size_t)n_piece - trim);
    n_in += (size_t)n_piece - trim;
    char *out = stream->buf + sizeof stream->held + stream->tok->max_piece_bytes;
    size_t n_rest;
    *n = (int)put_clean(stream->buf, n_in, out, &n_rest);
    *text = out;
    memcpy(stream->held, stream->buf + n_in - n_rest, n_rest);
    stream->n_held = (int)n_rest;
    return 0;
}

void tok_stream_finish(struct tok_stream *stream, const char **text, int *n)
{
    *text = BAD;
    *n = stream->n_held ? BAD_BYTES : 0;
    stream->n_held = 0;
}

void tok_stream_done(struct tok_stream *stream)
{
    mem_free(stream->buf);
    *stream = (struct tok_stream){0};
}

static int append(char **text, int64_t *n_bytes, int64_t *cap, const char *p, int n)
{
    if (*n_bytes + n + 1 > *cap) {
        int64_t want = (*n_bytes + n + 1) * 2;
        char *q = mem_realloc(*text, (size_t)want, MEM_TOK);
        if (!q)
            return err(ERR_NOMEM, "text of tokens: %lld bytes", (long long)want);
        *text = q;
        *cap = want;
    }
    memcpy(*text + *n_bytes, p, (size_t)n);
    *n_bytes += n;
    (*text)[*n_bytes] = 0;
    return 0;
}

int tok_decode(const struct tok *tok, const int32_t *ids, int64_t n, unsigned flags, char **text, int64_t *n_bytes)
{
    struct tok_stream stream;
    char *out = NULL;
    const char *p = "";
    int64_t cap = 0, total = 0;
    int len = 0;
    int rc = tok_stream_init(&stream, tok, flags);
    for (int64_t i = 0; i < n && rc == 0; i++) {
        rc = tok_stream_push(&stream, ids[i], &p, &len);
        if (rc == 0)
            rc = append(&out, &total, &cap, p, len);
    }
    if (rc == 0) {
        tok_stream_finish(&stream, &p, &len);
        rc = append(&out, &total, &cap, p, len);
    }
    tok_stream_done(&stream);
    if (rc) {
        mem_free(out);
        return rc;
    }
    *text = out;
    *n_bytes = total;
    return 0;
}
