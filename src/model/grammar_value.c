/* JSON's values as pieces of a grammar. White space stands behind brackets, colons and commas, as models write it: none, a space, or a line
 * feed and at most 32 spaces or tabs. */
#include "src/model/grammar_schema_in.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar_pattern.h"

/* What recursion over a name may take of the stack. */
enum { MAX_NAME_BYTES = 256 };

/* Of a key without escapes. */
#define ANY_LETTERS "[^\"\\\\\\x00-\\x1f]*"

static struct grammar_piece by_pattern(struct grammar_values *v, const char *pattern)
{
    return grammar_pattern(v->b, GRAMMAR_PATTERN_BYTES, pattern, strlen(pattern));
}

static struct grammar_piece text(struct grammar_values *v, const char *s)
{
    return grammar_build_text(v->b, s, strlen(s));
}

static struct grammar_piece seq(struct grammar_values *v, struct grammar_piece x, struct grammar_piece y)
{
    return grammar_build_seq(v->b, x, y);
}

void grammar_value_init(struct grammar_values *v, struct grammar_build *b)
{
    *v = (struct grammar_values){
        .b = b, .space = GRAMMAR_NONE, .letter = GRAMMAR_NONE, .value = GRAMMAR_NONE, .object = GRAMMAR_NONE};
}

struct grammar_piece grammar_value_space(struct grammar_values *v)
{
    if (v->space == GRAMMAR_NONE) {
        v->space = grammar_build_rule(v->b, NULL, 0);
        grammar_build_define(v->b, v->space, by_pattern(v, "( |\\n[ \\t]{0,32})?"));
    }
    return grammar_build_call(v->b, v->space);
}

/* ---- strings ---- */

/* A character of a string: as it is or escaped, of two surrogates the pair alone. */
static struct grammar_piece letter(struct grammar_values *v)
{
    static const char pattern[] =
        "[^\"\\\\\\x00-\\x1f]|\\\\([\"\\\\/bfnrt]|u([0-9a-cA-CefEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}|"
        "[dD][89abAB][0-9a-fA-F]{2}\\\\u[dD][c-fC-F][0-9a-fA-F]{2}))";

    if (v->letter == GRAMMAR_NONE) {
        v->letter = grammar_build_rule(v->b, NULL, 0);
        grammar_build_define(v->b, v->letter, by_pattern(v, pattern));
    }
    return grammar_build_call(v->b, v->letter);
}

struct grammar_piece grammar_value_string(struct grammar_values *v, uint32_t least, uint32_t most)
{
    struct grammar_piece begin = text(v, "\"");
    struct grammar_piece letters = grammar_build_repeat(v->b, letter(v), least, most);

    return seq(v, seq(v, begin, letters), text(v, "\""));
}

/* Any text without escapes, then what ends the key. */
static struct grammar_piece plain_letters(struct grammar_values *v, const struct grammar_set *first)
{
    struct grammar_piece x = grammar_build_chars(v->b, first);

    return seq(v, x, by_pattern(v, ANY_LETTERS));
}

static uint32_t char_at(const char *p, size_t *n)
{
    utf8proc_int32_t c = 0;
    utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)strlen(p), &c);

    *n = len > 0 ? (size_t)len : 1; /* JSON's texts are UTF-8 */
    return (uint32_t)c;
}

/* What comes behind the first `at` bytes of names (n, in order, all with the same beginning) and makes another name. */
static struct grammar_piece differs(struct grammar_values *v, const char **names, size_t n, size_t at)
{
    struct grammar_set other = {.n = 0};
    bool is_name = !names[0][at], has_room = true;
    size_t from = is_name, n_char, end;

    grammar_build_add(&other, '"', '"');
    grammar_build_add(&other, '\\', '\\');
    grammar_build_add(&other, 0, 0x1f);
    for (size_t i = from; i < n; i++) {
        uint32_t c = char_at(names[i] + at, &n_char);
        has_room = grammar_build_add(&other, c, c) && has_room;
    }
    if (!has_room)
        grammar_build_fail(v->b, ERR_LIMIT, "names of properties go on in too many ways");
    grammar_build_invert(&other);
    struct grammar_piece all = plain_letters(v, &other);
    if (!is_name)
        all = grammar_build_alt(v->b, all, grammar_build_empty(v->b));
    for (size_t i = from; i < n && !v->b->rc; i = end) {
        char_at(names[i] + at, &n_char);
        for (end = i + 1; end < n && !strncmp(names[end] + at, names[i] + at, n_char);)
            end++;
        struct grammar_piece same = grammar_build_text(v->b, names[i] + at, n_char);
        all = grammar_build_alt(v->b, all, seq(v, same, differs(v, names + i, end - i, at + n_char)));
    }
    return all;
}

/* Names that a key without escapes can be; in order. */
static size_t keep_plain(const char **names, size_t n)
{
    size_t n_kept = 0;

    for (size_t i = 0; i < n; i++) {
        const char *c = names[i];
        while ((uint8_t)*c >= 0x20 && *c != '"' && *c != '\\')
            c++;
        if (!*c)
            names[n_kept++] = names[i];
    }
    return n_kept;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

struct grammar_piece grammar_value_other_key(struct grammar_values *v, const char **names, size_t n)
{
    size_t n_plain = keep_plain(names, n);

    if (!n)
        return grammar_value_string(v, 0, UINT32_MAX);
    qsort(names, n_plain, sizeof *names, by_text);
    for (size_t i = 0; i < n_plain; i++)
        if (strlen(names[i]) > MAX_NAME_BYTES)
            grammar_build_fail(v->b, ERR_LIMIT, "the name of a property has %zu bytes, more than %d, beside others",
                               strlen(names[i]), MAX_NAME_BYTES);
    struct grammar_piece begin = text(v, "\"");
    begin = seq(v, begin, n_plain && !v->b->rc ? differs(v, names, n_plain, 0) : by_pattern(v, ANY_LETTERS));
    return seq(v, begin, text(v, "\""));
}

/* The shortest form that reads back as the same number. */
static struct grammar_piece real_literal(struct grammar_values *v, double x)
{
    char s[40];

    for (int n = GRAMMAR_VALUE_DIGITS; n <= 17; n++) {
        snprintf(s, sizeof s, "%.*g", n, x);
        if (strtod(s, NULL) == x)
            break;
    }
    return text(v, s);
}

/* A text, a whole number, or a word. */
static struct grammar_piece plain_literal(struct grammar_values *v, const json_t *value)
{
    struct grammar_piece x = {0, 0, 0};
    size_t flags = JSON_ENCODE_ANY | JSON_COMPACT;
    size_t n = json_dumpb(value, NULL, 0, flags);
    char *s = n ? mem_alloc(n, MEM_OTHER) : NULL;

    if (s && json_dumpb(value, s, n, flags) == n)
        x = grammar_build_text(v->b, s, n);
    else
        grammar_build_fail(v->b, ERR_NOMEM, "a value of a JSON schema");
    mem_free(s);
    return x;
}

/* A comma, but before the first. */
static struct grammar_piece next_item(struct grammar_values *v, struct grammar_piece all, bool is_first)
{
    return is_first ? all : seq(v, seq(v, all, text(v, ",")), grammar_value_space(v));
}

static struct grammar_piece array_literal(struct grammar_values *v, const json_t *value)
{
    struct grammar_piece all = text(v, "[");

    all = seq(v, all, grammar_value_space(v));
    for (size_t i = 0; i < json_array_size(value) && !v->b->rc; i++) {
        all = next_item(v, all, i == 0);
        all = seq(v, all, grammar_value_literal(v, json_array_get(value, i)));
    }
    if (json_array_size(value))
        all = seq(v, all, grammar_value_space(v));
    return seq(v, all, text(v, "]"));
}

struct grammar_piece grammar_value_name(struct grammar_values *v, const char *name)
{
    struct grammar_piece x = {0, 0, 0};
    json_t *key = json_string(name);

    if (key)
        x = plain_literal(v, key);
    else
        grammar_build_fail(v->b, ERR_NOMEM, "the name of a property");
    json_decref(key);
    return x;
}

static struct grammar_piece object_literal(struct grammar_values *v, const json_t *value)
{
    struct grammar_piece all = text(v, "{");
    bool is_first = true;
    const char *name;
    json_t *one;

    all = seq(v, all, grammar_value_space(v));
    json_object_foreach((json_t *)value, name, one)
    {
        all = next_item(v, all, is_first);
        all = seq(v, all, grammar_value_name(v, name));
        all = seq(v, all, text(v, ":"));
        all = seq(v, all, grammar_value_space(v));
        all = seq(v, all, grammar_value_literal(v, one));
        is_first = false;
    }
    if (!is_first)
        all = seq(v, all, grammar_value_space(v));
    return seq(v, all, text(v, "}"));
}

struct grammar_piece grammar_value_literal(struct grammar_values *v, const json_t *value)
{
    if (json_is_real(value))
        return real_literal(v, json_real_value(value));
    if (json_is_array(value))
        return array_literal(v, value);
    return json_is_object(value) ? object_literal(v, value) : plain_literal(v, value);
}

/* ---- any value ---- */

/* begin space (item ("," space item)*  space)? end */
static struct grammar_piece list(struct grammar_values *v, const char *begin, uint32_t item, const char *end)
{
    struct grammar_piece all = text(v, begin);

    all = seq(v, all, grammar_value_space(v));
    struct grammar_piece items = grammar_build_call(v->b, item);
    struct grammar_piece more = text(v, ",");
    more = seq(v, more, grammar_value_space(v));
    more = seq(v, more, grammar_build_call(v->b, item));
    items = seq(v, items, grammar_build_repeat(v->b, more, 0, UINT32_MAX));
    items = seq(v, items, grammar_value_space(v));
    all = seq(v, all, grammar_build_repeat(v->b, items, 0, 1));
    return seq(v, all, text(v, end));
}

struct grammar_piece grammar_value_object(struct grammar_values *v)
{
    if (v->object == GRAMMAR_NONE) {
        uint32_t member = grammar_build_rule(v->b, NULL, 0);
        v->object = grammar_build_rule(v->b, NULL, 0);
        struct grammar_piece pair = grammar_value_string(v, 0, UINT32_MAX);
        pair = seq(v, pair, text(v, ":"));
        pair = seq(v, pair, grammar_value_space(v));
        pair = seq(v, pair, grammar_value_any(v));
        grammar_build_define(v->b, member, pair);
        grammar_build_define(v->b, v->object, list(v, "{", member, "}"));
    }
    return grammar_build_call(v->b, v->object);
}

struct grammar_piece grammar_value_any(struct grammar_values *v)
{
    static const struct grammar_bounds none = {.has_least = false};

    if (v->value == GRAMMAR_NONE) {
        v->value = grammar_build_rule(v->b, NULL, 0);
        struct grammar_piece x = by_pattern(v, "true|false|null");
        x = grammar_build_alt(v->b, x, grammar_value_string(v, 0, UINT32_MAX));
        x = grammar_build_alt(v->b, x, grammar_value_number(v, &none));
        x = grammar_build_alt(v->b, x, list(v, "[", v->value, "]"));
        x = grammar_build_alt(v->b, x, grammar_value_object(v));
        grammar_build_define(v->b, v->value, x);
    }
    return grammar_build_call(v->b, v->value);
}

/* ---- numbers ---- */

static struct grammar_piece digits(struct grammar_values *v, uint32_t least, uint32_t most)
{
    return grammar_build_repeat(v->b, grammar_build_byte(v->b, '0', '9'), least, most);
}

static bool is_all(const char *s, char c)
{
    return s[strspn(s, (const char[]){c, '\0'})] == '\0';
}

/* Texts of as many digits as lo and hi have, from lo to hi. */
static struct grammar_piece between(struct grammar_values *v, const char *lo, const char *hi)
{
    static const char zeros[] = "000000000000000", nines[] = "999999999999999";
    size_t n = strlen(lo);

    if (is_all(lo, '0') && is_all(hi, '9'))
        return digits(v, (uint32_t)n, (uint32_t)n);
    if (*lo == *hi) {
        struct grammar_piece first = grammar_build_text(v->b, lo, 1);
        return seq(v, first, between(v, lo + 1, hi + 1));
    }
    const char *most = nines + sizeof nines - n, *least = zeros + sizeof zeros - n; /* of n - 1 digits */
    struct grammar_piece all = grammar_build_text(v->b, lo, 1);
    all = seq(v, all, between(v, lo + 1, most));
    if (*hi - *lo > 1) {
        struct grammar_piece middle = grammar_build_byte(v->b, (uint8_t)(*lo + 1), (uint8_t)(*hi - 1));
        all = grammar_build_alt(v->b, all, seq(v, middle, digits(v, (uint32_t)n - 1, (uint32_t)n - 1)));
    }
    struct grammar_piece last = grammar_build_text(v->b, hi, 1);
    return grammar_build_alt(v->b, all, seq(v, last, between(v, least, hi + 1)));
}

static int n_digits(int64_t x)
{
    int n = 1;

    for (; x >= 10; x /= 10)
        n++;
    return n;
}

static void put(int64_t x, char out[GRAMMAR_VALUE_DIGITS + 1])
{
    int n = n_digits(x);

    out[n] = '\0';
    for (; n > 0; x /= 10)
        out[--n] = (char)('0' + x % 10);
}

/* Whole numbers from lo to hi, 0 <= lo <= hi. */
static struct grammar_piece whole(struct grammar_values *v, int64_t lo, int64_t hi)
{
    struct grammar_piece all = {0, 0, 0};
    bool has_any = false;

    for (int64_t first = 0, last = 9; first <= hi; first = last + 1, last = last * 10 + 9) {
        char from[GRAMMAR_VALUE_DIGITS + 1], to[GRAMMAR_VALUE_DIGITS + 1];
        if (last < lo)
            continue;
        put(lo > first ? lo : first, from);
        put(hi < last ? hi : last, to);
        struct grammar_piece x = between(v, from, to);
        all = has_any ? grammar_build_alt(v->b, all, x) : x;
        has_any = true;
    }
    return all;
}

static struct grammar_piece negative(struct grammar_values *v,
                                     struct grammar_piece (*sized)(struct grammar_values *,
                                                                   const struct grammar_bounds *),
                                     const struct grammar_bounds *size)
{
    struct grammar_piece minus = text(v, "-");

    return seq(v, minus, sized(v, size));
}

/* All of bounds, those at least 0 and those below apart: of both the size is made by `sized`. */
static struct grammar_piece signed_by(struct grammar_values *v, const struct grammar_bounds *in,
                                      struct grammar_piece (*sized)(struct grammar_values *,
                                                                    const struct grammar_bounds *))
{
    int64_t least = in->has_least ? in->least : -GRAMMAR_VALUE_MOST,
            most = in->has_most ? in->most : GRAMMAR_VALUE_MOST;
    bool open_least = in->has_least && in->is_least_open, open_most = in->has_most && in->is_most_open;
    struct grammar_bounds up = {.least = least > 0 ? least : 0,
                                .most = most,
                                .is_least_open = open_least && least >= 0,
                                .is_most_open = open_most};
    struct grammar_bounds down = {.least = most < 0 ? -most : 0,
                                  .most = -least,
                                  .is_least_open = open_most && most <= 0,
                                  .is_most_open = open_least};
    bool has_up = most > 0 || (most == 0 && !open_most), has_down = least < 0;

    if (least > most || (least == most && (open_least || open_most))) {
        grammar_build_fail(v->b, ERR_FORMAT, "no number is within the bounds");
        return (struct grammar_piece){0, 0, 0};
    }
    if (!has_down)
        return sized(v, &up);
    struct grammar_piece below = negative(v, sized, &down);
    return has_up ? grammar_build_alt(v->b, below, sized(v, &up)) : below;
}

static struct grammar_piece integer_size(struct grammar_values *v, const struct grammar_bounds *size)
{
    return whole(v, size->least, size->most);
}

struct grammar_piece grammar_value_integer(struct grammar_values *v, const struct grammar_bounds *bounds)
{
    struct grammar_bounds closed = *bounds;

    closed.least += bounds->has_least && bounds->is_least_open;
    closed.most -= bounds->has_most && bounds->is_most_open;
    closed.is_least_open = closed.is_most_open = false;
    return signed_by(v, &closed, integer_size);
}

/* A point, and least to most digits behind it. */
static struct grammar_piece fraction(struct grammar_values *v, uint32_t most)
{
    struct grammar_piece point = text(v, ".");

    return seq(v, point, digits(v, 1, most));
}

static struct grammar_piece zero_fraction(struct grammar_values *v, uint32_t most)
{
    struct grammar_piece point = text(v, ".");

    return seq(v, point, grammar_build_repeat(v->b, grammar_build_byte(v->b, '0', '0'), 1, most));
}

/* A point and digits that are not all 0. */
static struct grammar_piece some_fraction(struct grammar_values *v, uint32_t most)
{
    struct grammar_piece all = {0, 0, 0};

    for (uint32_t n_zeros = 0; n_zeros < most; n_zeros++) {
        struct grammar_piece x = text(v, ".");
        x = seq(v, x, grammar_build_repeat(v->b, grammar_build_byte(v->b, '0', '0'), n_zeros, n_zeros));
        x = seq(v, x, grammar_build_byte(v->b, '1', '9'));
        x = seq(v, x, digits(v, 0, most - 1 - n_zeros));
        all = n_zeros ? grammar_build_alt(v->b, all, x) : x;
    }
    return all;
}

static struct grammar_piece with_fraction(struct grammar_values *v, int64_t lo, int64_t hi, uint32_t most)
{
    struct grammar_piece x = whole(v, lo, hi);

    return seq(v, x, grammar_build_repeat(v->b, fraction(v, most), 0, 1));
}

/* So few digits behind the point of what lies beside a bound that is left out, that no reader rounds it onto the bound. */
static uint32_t n_exact(int64_t bound)
{
    int n = GRAMMAR_VALUE_DIGITS - n_digits(bound);

    return n > 0 ? (uint32_t)n : 1;
}

static struct grammar_piece number_size(struct grammar_values *v, const struct grammar_bounds *size)
{
    uint32_t most = size->is_most_open ? n_exact(size->most) : GRAMMAR_VALUE_DIGITS;
    int64_t first = size->least + size->is_least_open;
    struct grammar_piece all = {0, 0, 0};
    bool has_any = false;

    if (size->is_least_open) {
        all = whole(v, size->least, size->least);
        all = seq(v, all, some_fraction(v, n_exact(size->most)));
        has_any = true;
    }
    if (first < size->most) {
        struct grammar_piece x = with_fraction(v, first, size->most - 1, most);
        all = has_any ? grammar_build_alt(v->b, all, x) : x;
        has_any = true;
    }
    if (!size->is_most_open) {
        struct grammar_piece x = whole(v, size->most, size->most);
        x = seq(v, x, grammar_build_repeat(v->b, zero_fraction(v, most), 0, 1));
        all = has_any ? grammar_build_alt(v->b, all, x) : x;
    }
    return all;
}

struct grammar_piece grammar_value_number(struct grammar_values *v, const struct grammar_bounds *bounds)
{
    if (bounds->has_least || bounds->has_most)
        return signed_by(v, bounds, number_size);
    return by_pattern(v, "-?(0|[1-9][0-9]{0,14})(\\.[0-9]{1,15})?([eE][-+]?[0-9]{1,2})?");
}

/* ---- formats: of RFC 3339 and RFC 4122. The 29th of February is left out, because not every year has one ---- */

#define DATE                                                                                      \
    "[1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|" \
    "02-(0[1-9]|1[0-9]|2[0-8]))"
#define TIME "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[-+]([01][0-9]|2[0-3]):[0-5][0-9])"
#define HEX "[0-9a-fA-F]"

bool grammar_value_format(struct grammar_values *v, const char *name, struct grammar_piece *out)
{
    static const struct {
        const char *name, *pattern;
    } formats[] = {
        {"date", "\"" DATE "\""},
        {"time", "\"" TIME "\""},
        {"date-time", "\"" DATE "T" TIME "\""},
        {"uuid", "\"" HEX "{8}-" HEX "{4}-" HEX "{4}-" HEX "{4}-" HEX "{12}\""},
    };

    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (!strcmp(formats[i].name, name)) {
            *out = by_pattern(v, formats[i].pattern);
            return true;
        }
    return false;
}
