/* GBNF into a grammar. The syntax is that of llama.cpp's grammar files; what they say of token ids is refused, because an answer's grammar
 * here is one of its text. */
#include "src/model/grammar.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar_build.h"

/* Groups within groups; how often a thing may be said to come. */
enum { MAX_DEPTH = 200, MAX_TIMES = 1000000 };

struct gbnf {
    const char *text, *at, *end; /* views */
    struct grammar_build build;
    uint32_t *slot; /* own: (mask + 1) rules by name; GRAMMAR_NONE: empty */
    uint32_t mask, n_names;
    int depth;
};

static int fail(struct gbnf *p, const char *at, int code, const char *fmt, ...) __attribute__((format(printf, 4, 5)));

static int fail(struct gbnf *p, const char *at, int code, const char *fmt, ...)
{
    int line = 1, column = 1;
    char what[256];
    va_list args;

    if (p->build.rc)
        return p->build.rc;
    for (const char *c = p->text; c < at; c++) {
        column += ((unsigned char)*c & 0xc0) != 0x80;
        if (*c == '\n') {
            line++;
            column = 1;
        }
    }
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return grammar_build_fail(&p->build, code, "grammar, line %d, column %d: %s", line, column, what);
}

/* The byte at the place; '\0' at the end, and for a zero byte, which nothing takes. */
static char peek(const struct gbnf *p)
{
    return p->at < p->end ? *p->at : '\0';
}

static bool take(struct gbnf *p, char c)
{
    if (p->at >= p->end || *p->at != c)
        return false;
    p->at++;
    return true;
}

static void pass_space(struct gbnf *p, bool lines_too)
{
    while (p->at < p->end) {
        char c = *p->at;
        if (c == '#')
            while (p->at < p->end && *p->at != '\n' && *p->at != '\r')
                p->at++;
        else if (c == ' ' || c == '\t' || (lines_too && (c == '\n' || c == '\r')))
            p->at++;
        else
            break;
    }
}

/* ---- names ---- */

static bool is_name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
}

static uint32_t *slot_of(const struct gbnf *p, const char *name, size_t n)
{
    const struct grammar_rule *rule = p->build.g->rule;
    uint32_t at = 2166136261; /* FNV-1a */

    for (size_t i = 0; i < n; i++)
        at = (at ^ (uint8_t)name[i]) * 16777619;
    for (at &= p->mask; p->slot[at] != GRAMMAR_NONE; at = (at + 1) & p->mask) {
        const char *other = rule[p->slot[at]].name;
        if (!strncmp(other, name, n) && !other[n])
            break;
    }
    return &p->slot[at];
}

static int make_slots(struct gbnf *p, uint32_t n_slots)
{
    uint32_t *old = p->slot, n_old = old ? p->mask + 1 : 0;
    uint32_t *slot = mem_alloc(n_slots * sizeof *slot, MEM_OTHER);

    if (!slot)
        return grammar_build_fail(&p->build, ERR_NOMEM, "names of a grammar's rules");
    memset(slot, 0xff, n_slots * sizeof *slot);
    p->slot = slot;
    p->mask = n_slots - 1;
    for (uint32_t i = 0; i < n_old; i++)
        if (old[i] != GRAMMAR_NONE) {
            const char *name = p->build.g->rule[old[i]].name;
            *slot_of(p, name, strlen(name)) = old[i];
        }
    mem_free(old);
    return 0;
}

/* The rule of this name, which may be defined later. */
static uint32_t rule_of(struct gbnf *p, const char *name, size_t n)
{
    if (p->build.rc || (2 * p->n_names >= p->mask && make_slots(p, p->mask ? 2 * (p->mask + 1) : 64)))
        return 0;
    uint32_t *slot = slot_of(p, name, n);
    if (*slot == GRAMMAR_NONE) {
        uint32_t rule = grammar_build_rule(&p->build, name, n);
        if (p->build.rc)
            return 0;
        *slot = rule;
        p->n_names++;
    }
    return *slot;
}

static size_t take_name(struct gbnf *p, const char **name)
{
    *name = p->at;
    while (is_name_char(peek(p)))
        p->at++;
    if (p->at == *name)
        fail(p, p->at, ERR_FORMAT, "a rule's name is expected, of letters, digits and -");
    return (size_t)(p->at - *name);
}

/* ---- characters ---- */

static uint32_t take_hex(struct gbnf *p, int n)
{
    static const char digits[] = "0123456789abcdef";
    const char *from = p->at;
    uint32_t c = 0;

    for (int i = 0; i < n; i++, p->at++) {
        char x = peek(p);
        const char *digit = x ? strchr(digits, x >= 'A' && x <= 'F' ? x | 0x20 : x) : NULL;
        if (!digit) {
            fail(p, p->at, ERR_FORMAT, "%d hexadecimal digits are expected here", n);
            return 0;
        }
        c = c << 4 | (uint32_t)(digit - digits);
    }
    if (c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff))
        fail(p, from, ERR_FORMAT, "U+%04" PRIX32 " is no character", c);
    return c;
}

static uint32_t take_escape(struct gbnf *p)
{
    char c = peek(p);

    p->at += p->at < p->end;
    switch (c) {
    case 'x':
        return take_hex(p, 2);
    case 'u':
        return take_hex(p, 4);
    case 'U':
        return take_hex(p, 8);
    case 't':
        return '\t';
    case 'r':
        return '\r';
    case 'n':
        return '\n';
    case '\\':
    case '"':
    case '[':
    case ']':
    case '-':
        return (uint32_t)c;
    default:
        fail(p, p->at - 1, ERR_FORMAT,
             "there is no such escape: \\x, \\u, \\U, \\t, \\r, \\n, \\\\, \\\", \\[, \\] and \\- are known");
        return 0;
    }
}

static uint32_t take_char(struct gbnf *p)
{
    utf8proc_int32_t c = 0;

    if (take(p, '\\'))
        return take_escape(p);
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)p->at, (utf8proc_ssize_t)(p->end - p->at), &c);
    if (n <= 0)
        fail(p, p->at, ERR_FORMAT, "%s", p->at < p->end ? "this is no UTF-8" : "the text ends amid this");
    p->at += n > 0 ? n : 0;
    return (uint32_t)c;
}

static struct grammar_piece literal(struct gbnf *p)
{
    struct grammar_piece all = grammar_build_empty(&p->build);

    while (!p->build.rc && !take(p, '"')) {
        utf8proc_uint8_t bytes[4];
        uint32_t c = take_char(p);
        utf8proc_ssize_t n = utf8proc_encode_char((utf8proc_int32_t)c, bytes);
        if (!p->build.rc)
            all = grammar_build_seq(&p->build, all, grammar_build_text(&p->build, (const char *)bytes, (size_t)n));
    }
    return all;
}

static struct grammar_piece class(struct gbnf *p)
{
    const char *from = p->at;
    struct grammar_set set = {.n = 0};
    bool is_not = take(p, '^');

    while (!p->build.rc && !take(p, ']')) {
        const char *at = p->at;
        uint32_t lo = take_char(p), hi = lo;
        if (p->end - p->at >= 2 && p->at[0] == '-' && p->at[1] != ']') {
            p->at++;
            hi = take_char(p);
        }
        if (hi < lo)
            fail(p, at, ERR_FORMAT, "the range ends before it begins");
        else if (!p->build.rc && !grammar_build_add(&set, lo, hi))
            fail(p, at, ERR_LIMIT, "more than %d ranges", GRAMMAR_BUILD_MAX_RANGES - 2);
    }
    if (is_not)
        grammar_build_invert(&set);
    if (!set.n)
        fail(p, from, ERR_FORMAT, "no character is in [] of this");
    return grammar_build_chars(&p->build, &set);
}

static struct grammar_piece any_char(struct gbnf *p)
{
    static const struct grammar_set all = {.lo = {0}, .hi = {0x10ffff}, .n = 1};

    return grammar_build_chars(&p->build, &all);
}

/* ---- sequences ---- */

static struct grammar_piece alternatives(struct gbnf *p, bool is_nested);

static struct grammar_piece group(struct gbnf *p)
{
    if (++p->depth > MAX_DEPTH)
        fail(p, p->at, ERR_LIMIT, "more than %d groups within each other", MAX_DEPTH);
    pass_space(p, true);
    struct grammar_piece x = grammar_build_empty(&p->build);
    if (!p->build.rc)
        x = alternatives(p, true);
    if (!p->build.rc && !take(p, ')'))
        fail(p, p->at, ERR_FORMAT, "a ) is missing, or this is not expected here");
    p->depth--;
    return x;
}

static bool begins_item(char c)
{
    return c == '"' || c == '[' || c == '(' || c == '.' || c == '<' || c == '!' || is_name_char(c);
}

static struct grammar_piece item(struct gbnf *p)
{
    const char *from = p->at, *name;

    if (take(p, '"'))
        return literal(p);
    if (take(p, '['))
        return class(p);
    if (take(p, '('))
        return group(p);
    if (take(p, '.'))
        return any_char(p);
    if (peek(p) == '<' || peek(p) == '!')
        fail(p, from, ERR_UNSUPPORTED, "tokens (<...>) are not supported: a grammar is of text here");
    size_t n = take_name(p, &name);
    return grammar_build_call(&p->build, rule_of(p, name, n));
}

static uint32_t take_number(struct gbnf *p)
{
    const char *from = p->at;
    uint32_t x = 0;

    while (peek(p) >= '0' && peek(p) <= '9' && x <= MAX_TIMES)
        x = x * 10 + (uint32_t)(*p->at++ - '0');
    if (p->at == from)
        fail(p, from, ERR_FORMAT, "a number is expected");
    if (x > MAX_TIMES)
        fail(p, from, ERR_LIMIT, "more than %d times", MAX_TIMES);
    return x;
}

/* Behind the brace. */
static void take_times(struct gbnf *p, bool is_nested, uint32_t *least, uint32_t *most)
{
    const char *from = p->at;

    pass_space(p, is_nested);
    *least = *most = take_number(p);
    pass_space(p, is_nested);
    if (take(p, ',')) {
        pass_space(p, is_nested);
        *most = peek(p) == '}' ? UINT32_MAX : take_number(p);
        pass_space(p, is_nested);
    }
    if (!take(p, '}'))
        fail(p, p->at, ERR_FORMAT, "a } is missing");
    if (*most < *least)
        fail(p, from, ERR_FORMAT, "at least %" PRIu32 " and at most %" PRIu32 " times", *least, *most);
}

static struct grammar_piece repeated(struct gbnf *p, bool is_nested)
{
    struct grammar_piece x = item(p);

    for (pass_space(p, is_nested); !p->build.rc; pass_space(p, is_nested)) {
        uint32_t least = 0, most = UINT32_MAX;
        if (take(p, '+'))
            least = 1;
        else if (take(p, '?'))
            most = 1;
        else if (take(p, '{'))
            take_times(p, is_nested, &least, &most);
        else if (!take(p, '*'))
            break;
        x = grammar_build_repeat(&p->build, x, least, most);
    }
    return x;
}

static struct grammar_piece sequence(struct gbnf *p, bool is_nested)
{
    struct grammar_piece all = grammar_build_empty(&p->build);

    while (!p->build.rc && begins_item(peek(p)))
        all = grammar_build_seq(&p->build, all, repeated(p, is_nested));
    if (peek(p) && strchr("*+?{", peek(p)))
        fail(p, p->at, ERR_FORMAT, "nothing stands before %c to be repeated", peek(p));
    return all;
}

static struct grammar_piece alternatives(struct gbnf *p, bool is_nested)
{
    struct grammar_piece all = sequence(p, is_nested);

    while (!p->build.rc && take(p, '|')) {
        pass_space(p, true);
        all = grammar_build_alt(&p->build, all, sequence(p, is_nested));
    }
    return all;
}

/* ---- rules ---- */

static void rule(struct gbnf *p)
{
    const char *from = p->at, *name;
    size_t n = take_name(p, &name);
    uint32_t id = rule_of(p, name, n);

    pass_space(p, false);
    if (!take(p, ':') || !take(p, ':') || !take(p, '='))
        fail(p, p->at, ERR_FORMAT, "::= is expected behind the name of a rule");
    pass_space(p, true);
    if (grammar_build_is_defined(&p->build, id))
        fail(p, from, ERR_FORMAT, "rule \"%.*s\" is defined twice", (int)(n < 80 ? n : 80), name);
    struct grammar_piece x = grammar_build_empty(&p->build);
    if (!p->build.rc)
        x = alternatives(p, false);
    grammar_build_define(&p->build, id, x);
    if (p->at < p->end && peek(p) != '\n' && peek(p) != '\r')
        fail(p, p->at, ERR_FORMAT, "this is not expected here");
    pass_space(p, true);
}

static int read_all(struct gbnf *p, struct grammar **out)
{
    pass_space(p, true);
    while (p->at < p->end && !p->build.rc)
        rule(p);
    uint32_t root = rule_of(p, "root", 4);
    if (!p->build.rc && !grammar_build_is_defined(&p->build, root))
        grammar_build_fail(&p->build, ERR_FORMAT, "grammar: there is no rule \"root\", which a whole answer is");
    return grammar_build_finish(&p->build, root, out);
}

int grammar_gbnf(const char *text, size_t n_bytes, struct grammar **out)
{
    struct gbnf p = {.text = text, .at = text, .end = text + n_bytes};

    *out = NULL;
    if (n_bytes > GRAMMAR_MAX_TEXT_BYTES)
        return err(ERR_LIMIT, "a grammar of %zu bytes; at most %zu are read", n_bytes, GRAMMAR_MAX_TEXT_BYTES);
    grammar_build_init(&p.build);
    int rc = read_all(&p, out);
    grammar_build_done(&p.build);
    mem_free(p.slot);
    return rc;
}
