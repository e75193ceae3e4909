/* Template text to tokens. White space is handled as Hugging Face sets Jinja up: trim_blocks (the newline behind a %} or #} goes) and
 * lstrip_blocks (so does the indent in front of a {% or {#); - and + at a tag override. */
#include "src/model/template_in.h"

#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"

struct lexer {
    const char *p, *end;
    int line;
    bool line_start;               /* the text behind the last tag begins a line */
    struct template_token *tokens; /* own until handed out */
    int n, cap;
};

static int add(struct lexer *lx, enum template_token_kind kind, const char *p, size_t n)
{
    if (lx->n == lx->cap) {
        int cap = lx->cap ? lx->cap * 2 : 256;
        struct template_token *t = mem_realloc(lx->tokens, (size_t)cap * sizeof *t, MEM_OTHER);
        if (!t)
            return err(ERR_NOMEM, "chat template: %d tokens", cap);
        lx->tokens = t;
        lx->cap = cap;
    }
    lx->tokens[lx->n++] = (struct template_token){kind, lx->line, {p, n}};
    return 0;
}

static void count_lines(struct lexer *lx, const char *from, const char *to)
{
    for (; from < to; from++)
        lx->line += *from == '\n';
}

static void skip_space(struct lexer *lx)
{
    size_t n;
    const char *from = lx->p;
    while (lx->p < lx->end && template_val_space(lx->p, (size_t)(lx->end - lx->p), &n))
        lx->p += n;
    count_lines(lx, from, lx->p);
}

/* Behind a tag's end: sign is the character in front of it. */
static void after_tag(struct lexer *lx, char sign, bool is_block)
{
    const char *from = lx->p;
    if (sign == '-')
        skip_space(lx);
    else if (is_block && sign != '+' && lx->p < lx->end && *lx->p == '\n') {
        lx->p++;
        lx->line++;
    }
    lx->line_start = lx->p > from && lx->p[-1] == '\n';
}

/* The text in front of a tag that begins at tag. */
static int text_before(struct lexer *lx, const char *tag)
{
    const char *from = lx->p, *to = tag;
    char sign = tag + 2 < lx->end ? tag[2] : 0;
    if (sign == '-') {
        struct template_str s = template_val_strip((struct template_str){from, (size_t)(to - from)}, NULL, false, true);
        to = from + s.n;
    } else if (sign != '+' && tag[1] != '{') {
        const char *start = to;
        while (start > from && start[-1] != '\n')
            start--;
        struct template_str s = {start, (size_t)(to - start)};
        if ((start > from || lx->line_start) && template_val_strip(s, NULL, true, false).n == 0)
            to = start;
    }
    int rc = to > from ? add(lx, TOKEN_DATA, from, (size_t)(to - from)) : 0;
    count_lines(lx, from, tag);
    lx->p = tag + 2;
    if (sign == '-' || sign == '+')
        lx->p++;
    return rc;
}

static int comment(struct lexer *lx)
{
    const char *from = lx->p;
    const char *close = memmem(from, (size_t)(lx->end - from), "#}", 2);
    if (!close)
        return err(ERR_FORMAT, "chat template, line %d: the comment has no end", lx->line);
    count_lines(lx, from, close);
    char sign = close > from ? close[-1] : 0;
    lx->p = close + 2;
    after_tag(lx, sign, true);
    return 0;
}

static bool is_name_char(char c, bool first)
{
    return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (unsigned char)c >= 0x80 ||
           (!first && c >= '0' && c <= '9');
}

static int string(struct lexer *lx)
{
    char quote = *lx->p;
    const char *from = ++lx->p;
    while (lx->p < lx->end && *lx->p != quote)
        lx->p += *lx->p == '\\' && lx->p + 1 < lx->end ? 2 : 1;
    if (lx->p >= lx->end)
        return err(ERR_FORMAT, "chat template, line %d: the string has no end", lx->line);
    int rc = add(lx, TOKEN_STRING, from, (size_t)(lx->p - from));
    count_lines(lx, from, lx->p);
    lx->p++;
    return rc;
}

static bool is_digit(const struct lexer *lx, const char *p)
{
    return p < lx->end && *p >= '0' && *p <= '9';
}

static int number(struct lexer *lx)
{
    const char *p = lx->p;
    enum template_token_kind kind = TOKEN_INT;
    while (is_digit(lx, p) || (p < lx->end && *p == '_' && is_digit(lx, p + 1)))
        p++;
    if (p < lx->end && *p == '.' && is_digit(lx, p + 1)) {
        kind = TOKEN_FLOAT;
        for (p++; is_digit(lx, p); p++)
            ;
    }
    if (p < lx->end && (*p == 'e' || *p == 'E')) {
        const char *q = p + 1 + (p + 1 < lx->end && (p[1] == '+' || p[1] == '-'));
        if (is_digit(lx, q)) {
            kind = TOKEN_FLOAT;
            for (p = q; is_digit(lx, p); p++)
                ;
        }
    }
    const char *from = lx->p;
    lx->p = p;
    return add(lx, kind, from, (size_t)(p - from));
}

static int operator(struct lexer *lx)
{
    static const char two[][3] = {"//", "**", "==", "!=", ">=", "<="};
    static const char one[] = "+-/*%~[](){}><=.:|,;";
    for (size_t i = 0; i < sizeof two / sizeof *two; i++)
        if (lx->end - lx->p >= 2 && memcmp(lx->p, two[i], 2) == 0) {
            lx->p += 2;
            return add(lx, TOKEN_OP, lx->p - 2, 2);
        }
    if (!memchr(one, *lx->p, sizeof one - 1))
        return err(ERR_FORMAT, "chat template, line %d: unexpected byte 0x%02x", lx->line, (unsigned char)*lx->p);
    lx->p++;
    return add(lx, TOKEN_OP, lx->p - 1, 1);
}

/* Does the tag end here? close is "}}" or "%}". */
static bool is_end(const struct lexer *lx, const char *close, char *sign)
{
    const char *p = lx->p;
    *sign = 0;
    if (p < lx->end && (*p == '-' || (*p == '+' && *close == '%')))
        *sign = *p++;
    return lx->end - p >= 2 && memcmp(p, close, 2) == 0;
}

/* What stands between {{ and }} or {% and %}. */
static int inside(struct lexer *lx, bool is_block)
{
    const char *close = is_block ? "%}" : "}}";
    int depth = 0, rc = add(lx, is_block ? TOKEN_BLOCK : TOKEN_VAR, lx->p, 0);
    while (rc == 0) {
        char sign;
        skip_space(lx);
        if (lx->p >= lx->end)
            return err(ERR_FORMAT, "chat template, line %d: a tag has no %s", lx->line, close);
        if (depth == 0 && is_end(lx, close, &sign)) {
            rc = add(lx, is_block ? TOKEN_BLOCK_END : TOKEN_VAR_END, lx->p, 0);
            lx->p += 2 + (sign != 0);
            after_tag(lx, sign, is_block);
            return rc;
        }
        char c = *lx->p;
        const char *from = lx->p;
        if (c == '"' || c == '\'')
            rc = string(lx);
        else if (c >= '0' && c <= '9')
            rc = number(lx);
        else if (is_name_char(c, true)) {
            while (lx->p < lx->end && is_name_char(*lx->p, false))
                lx->p++;
            rc = add(lx, TOKEN_NAME, from, (size_t)(lx->p - from));
        } else {
            depth += (c == '(' || c == '[' || c == '{') - (c == ')' || c == ']' || c == '}');
            if (depth < 0)
                return err(ERR_FORMAT, "chat template, line %d: '%c' was never opened", lx->line, c);
            rc = operator(lx);
        }
    }
    return rc;
}

/* The next {{, {% or {#, or the end. */
static const char *next_tag(const struct lexer *lx)
{
    for (const char *p = lx->p; p + 1 < lx->end; p++)
        if (*p == '{' && (p[1] == '{' || p[1] == '%' || p[1] == '#'))
            return p;
    return lx->end;
}

static int scan(struct lexer *lx)
{
    int rc = 0;
    lx->line_start = true;
    while (rc == 0 && lx->p < lx->end) {
        const char *tag = next_tag(lx);
        if (tag == lx->end) {
            rc = add(lx, TOKEN_DATA, lx->p, (size_t)(lx->end - lx->p));
            lx->p = lx->end;
            break;
        }
        rc = text_before(lx, tag);
        if (rc == 0)
            rc = tag[1] == '#' ? comment(lx) : inside(lx, tag[1] == '%');
    }
    return rc == 0 ? add(lx, TOKEN_EOF, lx->end, 0) : rc;
}

int template_lex_run(const char *source, size_t n, struct template_token **tokens, int *n_tokens)
{
    struct lexer lx = {.p = source, .end = source + n, .line = 1};
    int rc = scan(&lx);
    if (rc) {
        mem_free(lx.tokens);
        return rc;
    }
    *tokens = lx.tokens;
    *n_tokens = lx.n;
    return 0;
}
