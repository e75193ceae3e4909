/* A regular expression by recursive descent. Between anchors a text is the pattern, without them it holds it. */
#include "src/model/grammar_pattern.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"

/* Groups within groups; how often a thing may be said to come. */
enum { MAX_DEPTH = 100, MAX_TIMES = 100000 };

struct pattern {
    struct grammar_build *b; /* view */
    enum grammar_pattern_kind kind;
    const char *text, *at, *end; /* views */
    int depth;
};

static int fail(struct pattern *p, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static int fail(struct pattern *p, int code, const char *fmt, ...)
{
    char what[256];
    va_list args;

    if (p->b->rc)
        return p->b->rc;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return grammar_build_fail(p->b, code, "the pattern, at byte %zu: %s", (size_t)(p->at - p->text) + 1, what);
}

static char peek(const struct pattern *p)
{
    return p->at < p->end ? *p->at : '\0';
}

static bool take(struct pattern *p, char c)
{
    if (p->at >= p->end || *p->at != c)
        return false;
    p->at++;
    return true;
}

/* ---- sets ---- */

static void add(struct pattern *p, struct grammar_set *set, uint32_t lo, uint32_t hi)
{
    if (!grammar_build_add(set, lo, hi))
        fail(p, ERR_LIMIT, "more than %d ranges", GRAMMAR_BUILD_MAX_RANGES - 2);
}

/* White space of Unicode, and what else any language's \s knows. */
static void add_all_space(struct pattern *p, struct grammar_set *set)
{
    static const uint32_t ranges[][2] = {{0x09, 0x0d},     {0x1c, 0x20},     {0x85, 0x85},     {0xa0, 0xa0},
                                         {0x1680, 0x1680}, {0x2000, 0x200a}, {0x2028, 0x2029}, {0x202f, 0x202f},
                                         {0x205f, 0x205f}, {0x3000, 0x3000}, {0xfeff, 0xfeff}};

    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        add(p, set, ranges[i][0], ranges[i][1]);
}

/* Add what \d and its like stand for; false: it is none of them. */
static bool add_named(struct pattern *p, struct grammar_set *set, char name)
{
    struct grammar_set space = {.n = 0};

    switch (name) {
    case 'w':
        add(p, set, 'a', 'z');
        add(p, set, 'A', 'Z');
        add(p, set, '_', '_');
        add(p, set, '0', '9');
        return true;
    case 'd':
        add(p, set, '0', '9');
        return true;
    case 's':
        add(p, set, '\t', '\r');
        add(p, set, ' ', ' ');
        return true;
    case 'S':
        add_all_space(p, &space);
        grammar_build_invert(&space);
        for (int i = 0; i < space.n; i++)
            add(p, set, space.lo[i], space.hi[i]);
        return true;
    default:
        return false;
    }
}

static uint32_t take_hex(struct pattern *p, int n)
{
    uint32_t c = 0;

    for (int i = 0; i < n; i++, p->at++) {
        char x = peek(p);
        int digit = x >= '0' && x <= '9'                     ? x - '0'
                    : (x | 0x20) >= 'a' && (x | 0x20) <= 'f' ? (x | 0x20) - 'a' + 10
                                                             : -1;
        if (digit < 0) {
            fail(p, ERR_FORMAT, "%d hexadecimal digits are expected", n);
            return 0;
        }
        c = c << 4 | (uint32_t)digit;
    }
    if (c >= 0xd800 && c <= 0xdfff)
        fail(p, ERR_UNSUPPORTED, "half of a surrogate pair; write the character itself");
    return c;
}

/* Behind a backslash, of what is one character. */
static uint32_t take_escape(struct pattern *p)
{
    static const char names[] = "tnrfv", values[] = "\t\n\r\f\v";
    char c = peek(p);
    const char *name = c ? strchr(names, c) : NULL;

    if (name) {
        p->at++;
        return (uint32_t)values[name - names];
    }
    if (take(p, 'x'))
        return take_hex(p, 2);
    if (take(p, 'u'))
        return take_hex(p, 4);
    if (!c || !strchr("^$\\.*+?()[]{}|/-\"'`~!@#%&=:;,<> _", c)) {
        fail(p, ERR_UNSUPPORTED, "the escape \\%c is not supported", c > ' ' && c < 127 ? c : ' ');
        return 0;
    }
    p->at++;
    return (uint32_t)c;
}

static uint32_t take_char(struct pattern *p)
{
    utf8proc_int32_t c = 0;
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)p->at, (utf8proc_ssize_t)(p->end - p->at), &c);

    if (n <= 0)
        fail(p, ERR_FORMAT, "%s", p->at < p->end ? "this is no UTF-8" : "it ends too early");
    p->at += n > 0 ? n : 0;
    return (uint32_t)c;
}

static uint32_t take_class_char(struct pattern *p)
{
    return take(p, '\\') ? take_escape(p) : take_char(p);
}

static void take_class(struct pattern *p, struct grammar_set *set)
{
    bool is_not = take(p, '^');

    while (!p->b->rc && !take(p, ']')) {
        if (p->end - p->at >= 2 && *p->at == '\\' && add_named(p, set, p->at[1])) {
            p->at += 2;
            continue;
        }
        uint32_t lo = take_class_char(p), hi = lo;
        if (p->end - p->at >= 2 && p->at[0] == '-' && p->at[1] != ']') {
            p->at++;
            hi = take_class_char(p);
        }
        if (hi < lo)
            fail(p, ERR_FORMAT, "the range ends before it begins");
        else if (!p->b->rc)
            add(p, set, lo, hi);
    }
    if (is_not)
        grammar_build_invert(set);
}

/* ---- characters as JSON writes them ---- */

static struct grammar_piece either(struct grammar_build *b, struct grammar_piece all, bool has_any,
                                   struct grammar_piece x)
{
    return has_any ? grammar_build_alt(b, all, x) : x;
}

/* In a JSON string: most as they are; of control characters those that have a short escape, the others do not come. */
static struct grammar_piece in_json(struct grammar_build *b, const struct grammar_set *set)
{
    static const char plain[] = "\"\\\b\f\n\r\t", escaped[] = "\"\\bfnrt";
    struct grammar_set raw = *set;
    struct grammar_piece all = {0, 0, 0};
    bool has_any = false;

    grammar_build_clip(&raw, 0, 0x1f, false);
    grammar_build_clip(&raw, '"', '"', false);
    grammar_build_clip(&raw, '\\', '\\', false);
    if (raw.n) {
        all = grammar_build_chars(b, &raw);
        has_any = true;
    }
    for (int i = 0; plain[i]; i++) {
        const char text[] = {'\\', escaped[i]};
        if (!grammar_build_has(set, (uint32_t)plain[i]))
            continue;
        all = either(b, all, has_any, grammar_build_text(b, text, 2));
        has_any = true;
    }
    if (!has_any)
        grammar_build_fail(b, ERR_FORMAT, "a set of the pattern is empty");
    return all;
}

static struct grammar_piece one_of(struct pattern *p, const struct grammar_set *set)
{
    return p->kind == GRAMMAR_PATTERN_JSON ? in_json(p->b, set) : grammar_build_chars(p->b, set);
}

static struct grammar_piece anything(struct pattern *p)
{
    static const struct grammar_set all = {.lo = {0}, .hi = {0x10ffff}, .n = 1};

    return grammar_build_repeat(p->b, one_of(p, &all), 0, UINT32_MAX);
}

/* ---- sequences ---- */

static struct grammar_piece alternatives(struct pattern *p);

static struct grammar_piece group(struct pattern *p)
{
    struct grammar_piece x = {0, 0, 0};

    if (++p->depth > MAX_DEPTH)
        fail(p, ERR_LIMIT, "more than %d groups within each other", MAX_DEPTH);
    if (take(p, '?') && !take(p, ':'))
        fail(p, ERR_UNSUPPORTED, "of groups with ? only (?:...) is supported");
    if (!p->b->rc)
        x = alternatives(p);
    if (!p->b->rc && !take(p, ')'))
        fail(p, ERR_FORMAT, "a ) is missing");
    p->depth--;
    return x;
}

static struct grammar_piece atom(struct pattern *p)
{
    struct grammar_set set = {.n = 0};

    if (take(p, '('))
        return group(p);
    if (peek(p) && strchr("*+?{", peek(p)))
        fail(p, ERR_FORMAT, "nothing stands before %c to be repeated", peek(p));
    else if (peek(p) && strchr("^$", peek(p)))
        fail(p, ERR_UNSUPPORTED, "%c is supported at the very beginning or end of an alternative only", peek(p));
    else if (take(p, '[')) {
        take_class(p, &set);
    } else if (take(p, '.')) { /* all but ends of lines */
        add(p, &set, '\n', '\n');
        add(p, &set, '\r', '\r');
        add(p, &set, 0x2028, 0x2029);
        grammar_build_invert(&set);
    } else if (p->end - p->at >= 2 && *p->at == '\\' && add_named(p, &set, p->at[1])) {
        p->at += 2;
    } else {
        uint32_t c = take_class_char(p);
        add(p, &set, c, c);
    }
    return one_of(p, &set);
}

static uint32_t take_number(struct pattern *p)
{
    const char *from = p->at;
    uint32_t x = 0;

    while (peek(p) >= '0' && peek(p) <= '9' && x <= MAX_TIMES)
        x = x * 10 + (uint32_t)(*p->at++ - '0');
    if (p->at == from)
        fail(p, ERR_FORMAT, "a number is expected");
    if (x > MAX_TIMES)
        fail(p, ERR_LIMIT, "more than %d times", MAX_TIMES);
    return x;
}

static struct grammar_piece quantified(struct pattern *p)
{
    struct grammar_piece x = atom(p);
    uint32_t least = 0, most = UINT32_MAX;

    if (take(p, '+')) {
        least = 1;
    } else if (take(p, '?')) {
        most = 1;
    } else if (take(p, '{')) {
        least = most = take_number(p);
        if (take(p, ','))
            most = peek(p) == '}' ? UINT32_MAX : take_number(p);
        if (!take(p, '}'))
            fail(p, ERR_FORMAT, "a } is missing");
        if (most < least)
            fail(p, ERR_FORMAT, "at least %" PRIu32 " and at most %" PRIu32 " times", least, most);
    } else if (!take(p, '*')) {
        return x;
    }
    take(p, '?'); /* lazy: the same texts */
    return grammar_build_repeat(p->b, x, least, most);
}

static bool is_last_anchor(const struct pattern *p)
{
    return p->depth == 0 && p->kind == GRAMMAR_PATTERN_JSON && peek(p) == '$' &&
           (p->at + 1 == p->end || p->at[1] == '|');
}

static struct grammar_piece sequence(struct pattern *p)
{
    bool is_outer = p->depth == 0 && p->kind == GRAMMAR_PATTERN_JSON;
    struct grammar_piece all = is_outer && !take(p, '^') ? anything(p) : grammar_build_empty(p->b);

    while (!p->b->rc && p->at < p->end && *p->at != '|' && *p->at != ')' && !is_last_anchor(p))
        all = grammar_build_seq(p->b, all, quantified(p));
    if (is_outer && !take(p, '$'))
        all = grammar_build_seq(p->b, all, anything(p));
    return all;
}

static struct grammar_piece alternatives(struct pattern *p)
{
    struct grammar_piece all = sequence(p);

    while (!p->b->rc && take(p, '|'))
        all = grammar_build_alt(p->b, all, sequence(p));
    return all;
}

struct grammar_piece grammar_pattern(struct grammar_build *b, enum grammar_pattern_kind kind, const char *text,
                                     size_t n)
{
    struct pattern p = {.b = b, .kind = kind, .text = text, .at = text, .end = text + n};
    struct grammar_piece x = {0, 0, 0};

    if (!b->rc)
        x = alternatives(&p);
    if (!b->rc && p.at < p.end)
        fail(&p, ERR_FORMAT, "a ) without its (");
    return x;
}
