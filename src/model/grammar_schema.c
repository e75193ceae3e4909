/* JSON Schema into a grammar. Every keyword is a row of a table: one that is not supported is an error, never passed over. Targets of
 * $ref become rules, each once, so a schema may call itself. */
#include "src/model/grammar_schema_in.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/grammar_pattern.h"
#include "src/model/json_room.h"

/* Schemas within schemas; what different $refs lead to; properties of an object; how often items or characters may be said to come. */
enum { MAX_DEPTH = 64, MAX_TARGETS = 4096, MAX_MEMBERS = 4096, MAX_TIMES = 100000, MAX_PATH = 400 };

struct target {
    const json_t *node; /* view */
    const char *name;   /* view: the $ref's text */
    uint32_t rule;
};

struct schema {
    struct grammar_build build;
    struct grammar_values values;
    const json_t *root;
    struct target *target; /* own: (n_targets) */
    uint32_t n_targets, cap_targets;
    char path[MAX_PATH]; /* where the schema stands that is read, as a JSON pointer */
    int depth;
};

static const struct grammar_piece nothing = {0, 0, 0};

static struct grammar_piece schema_of(struct schema *s, const json_t *node);

/* ---- errors ---- */

static void fail(struct schema *s, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static void fail(struct schema *s, int code, const char *fmt, ...)
{
    char what[512];
    va_list args;

    if (s->build.rc)
        return;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    grammar_build_fail(&s->build, code, "JSON schema, at %s: %s", s->path, what);
}

/* Add to the path; what to cut it back to. */
static size_t enter(struct schema *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static size_t enter(struct schema *s, const char *fmt, ...)
{
    size_t n = strlen(s->path);
    va_list args;

    va_start(args, fmt);
    vsnprintf(s->path + n, sizeof s->path - n, fmt, args);
    va_end(args);
    return n;
}

static void leave(struct schema *s, size_t n)
{
    s->path[n] = '\0';
}

/* ---- keywords ---- */

enum group {
    NOTE = 1, /* says nothing about the document */
    REF = 2,
    ENUM = 4,
    COMBINE = 8,
    TYPE = 16,
    STRING = 32,
    NUMBER = 64,
    OBJECT = 128,
    ARRAY = 256,
};

static const struct {
    const char *name;
    unsigned group;
} keywords[] = {
    {"$comment", NOTE},
    {"$defs", NOTE},
    {"$id", NOTE},
    {"$ref", REF},
    {"$schema", NOTE},
    {"additionalProperties", OBJECT},
    {"allOf", COMBINE},
    {"anyOf", COMBINE},
    {"const", ENUM},
    {"default", NOTE},
    {"definitions", NOTE},
    {"deprecated", NOTE},
    {"description", NOTE},
    {"discriminator", NOTE}, /* OpenAPI: which of oneOf it is, which the branches say themselves */
    {"enum", ENUM},
    {"examples", NOTE},
    {"exclusiveMaximum", NUMBER},
    {"exclusiveMinimum", NUMBER},
    {"format", STRING},
    {"items", ARRAY},
    {"maxItems", ARRAY},
    {"maxLength", STRING},
    {"maximum", NUMBER},
    {"minItems", ARRAY},
    {"minLength", STRING},
    {"minimum", NUMBER},
    {"oneOf", COMBINE},
    {"pattern", STRING},
    {"prefixItems", ARRAY},
    {"properties", OBJECT},
    {"readOnly", NOTE},
    {"required", OBJECT},
    {"title", NOTE},
    {"type", TYPE},
    {"uniqueItems", ARRAY},
    {"writeOnly", NOTE},
};

static unsigned group_of(const char *name)
{
    for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
        if (!strcmp(keywords[i].name, name))
            return keywords[i].group;
    return 0;
}

/* The groups that a schema has keywords of. */
static unsigned groups_of(struct schema *s, const json_t *node)
{
    unsigned all = 0;
    const char *name;
    json_t *v;

    json_object_foreach((json_t *)node, name, v)
    {
        unsigned group = group_of(name);
        if (!group)
            fail(s, ERR_UNSUPPORTED, "\"%.60s\" is not supported", name);
        all |= group;
    }
    return all & ~(unsigned)NOTE;
}

/* What a schema goes by, beside which only `may` can stand. */
static void check_alone(struct schema *s, const json_t *node, unsigned group, unsigned may)
{
    const char *name, *main = "";
    json_t *v;

    json_object_foreach((json_t *)node, name, v) if (group_of(name) == group) main = name;
    json_object_foreach((json_t *)node, name, v)
    {
        if (strcmp(name, main) && !(group_of(name) & (may | NOTE)))
            fail(s, ERR_UNSUPPORTED, "\"%.60s\" beside \"%.60s\" is not supported", name, main);
    }
}

/* ---- types ---- */

enum {
    IS_NULL = 1,
    IS_BOOLEAN = 2,
    IS_INTEGER = 4,
    IS_REAL = 8,
    IS_STRING = 16,
    IS_ARRAY = 32,
    IS_OBJECT = 64,
    IS_ANY = 127
};

static unsigned type_named(const char *name)
{
    static const struct {
        const char *name;
        unsigned type;
    } types[] = {
        {"null", IS_NULL},     {"boolean", IS_BOOLEAN}, {"integer", IS_INTEGER}, {"number", IS_INTEGER | IS_REAL},
        {"string", IS_STRING}, {"array", IS_ARRAY},     {"object", IS_OBJECT}};

    for (size_t i = 0; name && i < sizeof types / sizeof *types; i++)
        if (!strcmp(types[i].name, name))
            return types[i].type;
    return 0;
}

static unsigned type_of_value(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return IS_OBJECT;
    case JSON_ARRAY:
        return IS_ARRAY;
    case JSON_STRING:
        return IS_STRING;
    case JSON_INTEGER:
        return IS_INTEGER;
    case JSON_REAL:
        return json_real_value(v) == floor(json_real_value(v)) ? IS_INTEGER : IS_REAL;
    case JSON_NULL:
        return IS_NULL;
    default:
        return IS_BOOLEAN;
    }
}

/* What "type" says; 0: it is none. */
static unsigned named_types(const json_t *v)
{
    unsigned all = 0;

    if (!json_is_array(v))
        return type_named(json_string_value(v));
    for (size_t i = 0; i < json_array_size(v); i++) {
        unsigned type = type_named(json_string_value(json_array_get(v, i)));
        if (!type)
            return 0;
        all |= type;
    }
    return all;
}

/* Which types a schema without $ref, enum or branches allows: without "type", those that it has keywords for. */
static unsigned plain_types(const json_t *node, unsigned groups)
{
    const json_t *type = json_object_get(node, "type");
    unsigned all = groups & STRING ? IS_STRING : 0;

    if (type)
        return named_types(type);
    all |= groups & NUMBER ? IS_INTEGER | IS_REAL : 0;
    all |= groups & OBJECT ? IS_OBJECT : 0;
    all |= groups & ARRAY ? IS_ARRAY : 0;
    return all ? all : IS_ANY;
}

/* ---- numbers that keywords have ---- */

static uint32_t count_of(struct schema *s, const json_t *node, const char *name, uint32_t preset)
{
    const json_t *v = json_object_get(node, name);
    double x = json_number_value(v);

    if (!v)
        return preset;
    if (!json_is_number(v) || x < 0 || x != floor(x))
        fail(s, ERR_FORMAT, "\"%s\" has to be a whole number, 0 or more", name);
    else if (x > MAX_TIMES)
        fail(s, ERR_LIMIT, "\"%s\" is %.0f; at most %d is supported", name, x, MAX_TIMES);
    return s->build.rc ? preset : (uint32_t)x;
}

static void check_counts(struct schema *s, const char *a, uint32_t least, const char *b, uint32_t most)
{
    if (least > most)
        fail(s, ERR_FORMAT, "\"%s\" is %" PRIu32 ", \"%s\" %" PRIu32, a, least, b, most);
}

/* Of two bounds of one side, one open, the tighter. up: they are least ones. is_whole: of integers, so that a fraction can be cut. */
static bool bound_of(struct schema *s, const json_t *node, const char *const names[2], bool up, bool is_whole,
                     int64_t *out, bool *is_open)
{
    bool has = false;
    double best = 0;

    for (int open = 0; open < 2; open++) {
        const json_t *v = json_object_get(node, names[open]);
        double x = json_number_value(v);
        if (!v)
            continue;
        if (!json_is_number(v)) {
            fail(s, ERR_FORMAT, "\"%s\" has to be a number", names[open]);
            continue;
        }
        if (fabs(x) > (double)GRAMMAR_VALUE_MOST)
            fail(s, ERR_UNSUPPORTED, "\"%s\" of more than %d digits is not supported", names[open],
                 GRAMMAR_VALUE_DIGITS);
        bool is_cut = x != floor(x);
        if (is_cut && !is_whole)
            fail(s, ERR_UNSUPPORTED, "\"%s\" that is no whole number is not supported", names[open]);
        x = up ? ceil(x) : floor(x);
        if (has && (up ? x < best : x > best))
            continue;
        /* Of equal ones the open one, which comes last; one that was cut is not reached. */
        *is_open = open && !is_cut;
        best = x;
        has = true;
    }
    *out = s->build.rc ? 0 : (int64_t)best;
    return has;
}

static struct grammar_bounds bounds_of(struct schema *s, const json_t *node, bool is_whole)
{
    static const char *const least[] = {"minimum", "exclusiveMinimum"}, *const most[] = {"maximum", "exclusiveMaximum"};
    struct grammar_bounds b = {.has_least = false};

    b.has_least = bound_of(s, node, least, true, is_whole, &b.least, &b.is_least_open);
    b.has_most = bound_of(s, node, most, false, is_whole, &b.most, &b.is_most_open);
    return b;
}

/* ---- strings ---- */

static struct grammar_piece string_of(struct schema *s, const json_t *node)
{
    const json_t *pattern = json_object_get(node, "pattern"), *format = json_object_get(node, "format");
    bool has_length = json_object_get(node, "minLength") || json_object_get(node, "maxLength");
    struct grammar_piece x = nothing, end;

    if ((pattern != NULL) + (format != NULL) + has_length > 1)
        fail(s, ERR_UNSUPPORTED, "of \"pattern\", \"format\" and a length only one is supported at a time");
    if ((pattern && !json_is_string(pattern)) || (format && !json_is_string(format)))
        fail(s, ERR_FORMAT, "\"%s\" has to be a text", pattern ? "pattern" : "format");
    if (s->build.rc)
        return nothing;
    if (format && !grammar_value_format(&s->values, json_string_value(format), &x))
        fail(s, ERR_UNSUPPORTED, "\"format\": \"%.40s\" is not supported", json_string_value(format));
    if (format)
        return x;
    if (pattern) {
        x = grammar_build_text(&s->build, "\"", 1);
        end = grammar_pattern(&s->build, GRAMMAR_PATTERN_JSON, json_string_value(pattern), json_string_length(pattern));
        x = grammar_build_seq(&s->build, x, end);
        end = grammar_build_text(&s->build, "\"", 1);
        return grammar_build_seq(&s->build, x, end);
    }
    uint32_t least = count_of(s, node, "minLength", 0), most = count_of(s, node, "maxLength", UINT32_MAX);
    check_counts(s, "minLength", least, "maxLength", most);
    return grammar_value_string(&s->values, least, most);
}

/* ---- objects ---- */

struct member {
    const char *name;   /* view */
    const json_t *node; /* view: its schema; NULL: any value */
    bool is_required;
    uint32_t rule;
};

struct members {
    struct member *v;   /* own: (n) */
    const char **names; /* own: (n) */
    size_t n;
};

static void members_done(struct members *m)
{
    mem_free(m->v);
    mem_free(m->names);
}

static bool has_member(const struct members *m, const char *name)
{
    for (size_t i = 0; i < m->n; i++)
        if (!strcmp(m->v[i].name, name))
            return true;
    return false;
}

/* Properties in their order, and what is required beside them. */
static void find_members(struct schema *s, const json_t *node, struct members *m)
{
    json_t *properties = json_object_get(node, "properties"), *required = json_object_get(node, "required"), *v;
    size_t n_most = json_object_size(properties) + json_array_size(required), i;
    const json_t *more = json_object_get(node, "additionalProperties");
    const char *name;

    *m = (struct members){.v = mem_zalloc(n_most, sizeof *m->v, MEM_OTHER),
                          .names = mem_zalloc(n_most, sizeof *m->names, MEM_OTHER)};
    if (!m->v || !m->names)
        grammar_build_fail(&s->build, ERR_NOMEM, "%zu properties of a JSON schema", n_most);
    if (n_most > MAX_MEMBERS)
        fail(s, ERR_LIMIT, "%zu properties; at most %d are supported", n_most, MAX_MEMBERS);
    if ((properties && !json_is_object(properties)) || (required && !json_is_array(required)))
        fail(s, ERR_FORMAT, "\"properties\" has to be an object, \"required\" a list");
    if (s->build.rc)
        return;
    json_object_foreach(properties, name, v) m->v[m->n++] = (struct member){.name = name, .node = v};
    json_array_foreach(required, i, v)
    {
        if (!json_is_string(v))
            fail(s, ERR_FORMAT, "\"required\" has to be a list of names");
        else if (!has_member(m, json_string_value(v)))
            m->v[m->n++] = (struct member){.name = json_string_value(v), .node = json_is_boolean(more) ? NULL : more};
        if (json_is_false(more) && !s->build.rc && !json_object_get(properties, json_string_value(v)))
            fail(s, ERR_FORMAT, "\"%.60s\" is required, but there may be no such property", json_string_value(v));
    }
}

static bool is_required(const json_t *node, const char *name)
{
    const json_t *list = json_object_get(node, "required");

    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *one = json_string_value(json_array_get(list, i));
        if (one && !strcmp(one, name))
            return true;
    }
    return false;
}

/* "name": value, as a rule. */
static uint32_t pair_of(struct schema *s, struct grammar_piece key, const json_t *node, const char *where)
{
    uint32_t rule = grammar_build_rule(&s->build, NULL, 0);
    size_t at = enter(s, "%s", where);
    struct grammar_piece x = grammar_build_text(&s->build, ":", 1);

    x = grammar_build_seq(&s->build, key, x);
    x = grammar_build_seq(&s->build, x, grammar_value_space(&s->values));
    x = grammar_build_seq(&s->build, x, node ? schema_of(s, node) : grammar_value_any(&s->values));
    grammar_build_define(&s->build, rule, x);
    leave(s, at);
    return rule;
}

static struct grammar_piece after_comma(struct schema *s, uint32_t rule)
{
    struct grammar_piece x = grammar_build_text(&s->build, ",", 1);

    x = grammar_build_seq(&s->build, x, grammar_value_space(&s->values));
    return grammar_build_seq(&s->build, x, grammar_build_call(&s->build, rule));
}

/* Members i and on, where one stands before: each with its comma. As a rule, which others go on with. */
static uint32_t rest_of(struct schema *s, const struct member *member, uint32_t next)
{
    uint32_t rule = grammar_build_rule(&s->build, NULL, 0);
    struct grammar_piece x = after_comma(s, member->rule);

    if (!member->is_required)
        x = grammar_build_repeat(&s->build, x, 0, 1);
    x = grammar_build_seq(&s->build, x, grammar_build_call(&s->build, next));
    grammar_build_define(&s->build, rule, x);
    return rule;
}

/* The first member that is there is one of those up to the first required one; the rest follows. may_be_empty: nothing is required. */
static struct grammar_piece members_of(struct schema *s, struct members *m, uint32_t more, bool *may_be_empty)
{
    uint32_t next = grammar_build_rule(&s->build, NULL, 0);
    struct grammar_piece x = grammar_build_empty(&s->build), all = nothing;
    bool has_any = false;

    if (more != GRAMMAR_NONE)
        x = grammar_build_repeat(&s->build, after_comma(s, more), 0, UINT32_MAX);
    grammar_build_define(&s->build, next, x);
    *may_be_empty = true;
    if (more != GRAMMAR_NONE) {
        all = grammar_build_call(&s->build, more);
        all = grammar_build_seq(&s->build, all, grammar_build_call(&s->build, next));
        has_any = true;
    }
    for (size_t i = m->n; i-- > 0 && !s->build.rc;) {
        const struct member *member = &m->v[i];
        x = grammar_build_call(&s->build, member->rule);
        x = grammar_build_seq(&s->build, x, grammar_build_call(&s->build, next));
        if (member->is_required || !has_any)
            all = x;
        else
            all = grammar_build_alt(&s->build, x, all);
        has_any = true;
        *may_be_empty = *may_be_empty && !member->is_required;
        next = rest_of(s, member, next);
    }
    return has_any ? all : grammar_build_empty(&s->build);
}

/* A member that none of the names is; GRAMMAR_NONE: there may be none. */
static uint32_t more_of(struct schema *s, const json_t *node, struct members *m)
{
    const json_t *more = json_object_get(node, "additionalProperties");

    if (more && !json_is_object(more) && !json_is_boolean(more))
        fail(s, ERR_FORMAT, "\"additionalProperties\" has to be a schema");
    if (s->build.rc || json_is_false(more) || (!more && m->n))
        return GRAMMAR_NONE;
    for (size_t i = 0; i < m->n; i++)
        m->names[i] = m->v[i].name;
    struct grammar_piece key = grammar_value_other_key(&s->values, m->names, m->n);
    return pair_of(s, key, json_is_object(more) ? more : NULL, "/additionalProperties");
}

static void make_pairs(struct schema *s, const json_t *node, struct members *m)
{
    for (size_t i = 0; i < m->n && !s->build.rc; i++) {
        struct member *member = &m->v[i];
        char where[MAX_PATH];
        snprintf(where, sizeof where, "/properties/%.60s", member->name);
        member->rule = pair_of(s, grammar_value_name(&s->values, member->name), member->node, where);
        member->is_required = is_required(node, member->name);
    }
}

static struct grammar_piece object_of(struct schema *s, const json_t *node)
{
    struct grammar_piece x, inner, end;
    struct members m;
    bool may_be_empty;

    if (!json_object_get(node, "properties") && !json_object_get(node, "required") &&
        !json_object_get(node, "additionalProperties"))
        return grammar_value_object(&s->values);
    find_members(s, node, &m);
    if (!s->build.rc)
        make_pairs(s, node, &m);
    uint32_t more = more_of(s, node, &m);
    x = grammar_build_text(&s->build, "{", 1);
    x = grammar_build_seq(&s->build, x, grammar_value_space(&s->values));
    if (s->build.rc) {
        members_done(&m);
        return nothing;
    }
    inner = members_of(s, &m, more, &may_be_empty);
    inner = grammar_build_seq(&s->build, inner, grammar_value_space(&s->values));
    if (may_be_empty)
        inner = grammar_build_repeat(&s->build, inner, 0, 1);
    x = grammar_build_seq(&s->build, x, inner);
    end = grammar_build_text(&s->build, "}", 1);
    members_done(&m);
    return grammar_build_seq(&s->build, x, end);
}

/* ---- arrays ---- */

static uint32_t item_of(struct schema *s, const json_t *node, const char *where, size_t i)
{
    uint32_t rule = grammar_build_rule(&s->build, NULL, 0);
    size_t at = i == SIZE_MAX ? enter(s, "/%s", where) : enter(s, "/%s/%zu", where, i);

    grammar_build_define(&s->build, rule, node ? schema_of(s, node) : grammar_value_any(&s->values));
    leave(s, at);
    return rule;
}

/* An item in its place, from the first on with its comma. */
static struct grammar_piece placed_item(struct schema *s, uint32_t rule, bool is_first)
{
    return is_first ? grammar_build_call(&s->build, rule) : after_comma(s, rule);
}

/* Items from number i on, innermost last: (x (y (z ...)?)?)?, where those before `least` are there in any case. */
static struct grammar_piece items_from(struct schema *s, const uint32_t *prefix, size_t n_prefix, uint32_t item,
                                       uint32_t least, uint32_t most)
{
    struct grammar_piece x = grammar_build_empty(&s->build);
    size_t n_own = n_prefix < most ? n_prefix : most;

    if (item != GRAMMAR_NONE && most > n_own) {
        uint32_t left = most == UINT32_MAX ? most : most - (uint32_t)n_own;
        uint32_t need = least > n_own ? least - (uint32_t)n_own : 0;
        if (n_own == 0) { /* the first has no comma */
            x = placed_item(s, item, true);
            struct grammar_piece more = grammar_build_repeat(&s->build, placed_item(s, item, false),
                                                             need ? need - 1 : 0, left == UINT32_MAX ? left : left - 1);
            x = grammar_build_seq(&s->build, x, more);
            return need ? x : grammar_build_repeat(&s->build, x, 0, 1);
        }
        x = grammar_build_repeat(&s->build, placed_item(s, item, false), need, left);
    }
    for (size_t i = n_own; i-- > 0 && !s->build.rc;) {
        struct grammar_piece own = placed_item(s, prefix[i], i == 0);
        x = grammar_build_seq(&s->build, own, x);
        if (i >= least)
            x = grammar_build_repeat(&s->build, x, 0, 1);
    }
    return x;
}

static void check_array(struct schema *s, const json_t *node)
{
    const json_t *prefix = json_object_get(node, "prefixItems"), *items = json_object_get(node, "items");
    const json_t *unique = json_object_get(node, "uniqueItems");

    if (prefix && !json_is_array(prefix))
        fail(s, ERR_FORMAT, "\"prefixItems\" has to be a list of schemas");
    if (json_is_array(items))
        fail(s, ERR_UNSUPPORTED, "\"items\" as a list is not supported: since 2020-12 it is \"prefixItems\"");
    if (unique && !json_is_false(unique))
        fail(s, ERR_UNSUPPORTED, "\"uniqueItems\" is not supported");
}

static struct grammar_piece array_of(struct schema *s, const json_t *node)
{
    const json_t *prefix = json_object_get(node, "prefixItems"), *items = json_object_get(node, "items");
    uint32_t least = count_of(s, node, "minItems", 0), most = count_of(s, node, "maxItems", UINT32_MAX);
    size_t n_prefix = json_array_size(prefix);
    uint32_t *rules = mem_zalloc(n_prefix, sizeof *rules, MEM_OTHER), item = GRAMMAR_NONE;
    struct grammar_piece x, inner, end;

    if (!rules)
        grammar_build_fail(&s->build, ERR_NOMEM, "items of a JSON schema");
    check_array(s, node);
    if (json_is_false(items) && n_prefix < most)
        most = (uint32_t)n_prefix;
    check_counts(s, "minItems", least, json_is_false(items) ? "prefixItems" : "maxItems", most);
    for (size_t i = 0; i < n_prefix && !s->build.rc; i++)
        rules[i] = item_of(s, json_array_get(prefix, i), "prefixItems", i);
    if (!s->build.rc && !json_is_false(items))
        item = item_of(s, items, "items", SIZE_MAX);
    x = grammar_build_text(&s->build, "[", 1);
    x = grammar_build_seq(&s->build, x, grammar_value_space(&s->values));
    inner = s->build.rc ? nothing : items_from(s, rules, n_prefix, item, least, most);
    end = grammar_value_space(&s->values);
    end = grammar_build_seq(&s->build, end, grammar_build_text(&s->build, "]", 1));
    mem_free(rules);
    x = grammar_build_seq(&s->build, x, inner);
    return grammar_build_seq(&s->build, x, end);
}

/* ---- references ---- */

/* Behind '#': names and numbers apart by slashes, in which ~1 is a slash and ~0 a tilde. NULL: there is nothing. */
static const json_t *resolve(const json_t *root, const char *pointer)
{
    const json_t *at = root;
    char name[256];

    while (at && *pointer == '/') {
        size_t n = 0;
        for (pointer++; *pointer && *pointer != '/' && n < sizeof name - 1; pointer++) {
            name[n++] = *pointer;
            if (*pointer == '~' && (pointer[1] == '0' || pointer[1] == '1'))
                name[n - 1] = *++pointer == '0' ? '~' : '/';
        }
        name[n] = '\0';
        if (*pointer && *pointer != '/')
            return NULL; /* a longer name than is looked for */
        bool is_number = n && n < 9 && strspn(name, "0123456789") == n;
        size_t index = 0;
        for (size_t i = 0; is_number && i < n; i++)
            index = index * 10 + (size_t)(name[i] - '0');
        at = json_is_array(at) ? (is_number ? json_array_get(at, index) : NULL) : json_object_get(at, name);
    }
    return *pointer ? NULL : at;
}

static const json_t *target_of(struct schema *s, const json_t *ref)
{
    const char *text = json_string_value(ref);

    if (!text || text[0] != '#' || strchr(text, '%') || (text[1] && text[1] != '/')) {
        fail(s, ERR_UNSUPPORTED,
             "\"$ref\": \"%.80s\" is not supported: only pointers within the schema are, as #/$defs/x",
             text ? text : "");
        return NULL;
    }
    const json_t *node = resolve(s->root, text + 1);
    if (!node)
        fail(s, ERR_FORMAT, "\"$ref\": \"%.80s\" is not there", text);
    return node;
}

/* The rule of what a $ref leads to; it is defined when all that calls it was read. */
static struct grammar_piece reference(struct schema *s, const json_t *ref)
{
    const json_t *node = target_of(s, ref);

    for (uint32_t i = 0; i < s->n_targets; i++)
        if (s->target[i].node == node)
            return grammar_build_call(&s->build, s->target[i].rule);
    if (!s->build.rc && s->n_targets == MAX_TARGETS)
        fail(s, ERR_LIMIT, "more than %d different targets of \"$ref\"", MAX_TARGETS);
    if (!s->build.rc && s->n_targets == s->cap_targets) {
        uint32_t cap = s->cap_targets ? 2 * s->cap_targets : 16;
        struct target *p = mem_realloc(s->target, cap * sizeof *p, MEM_OTHER);
        if (!p)
            grammar_build_fail(&s->build, ERR_NOMEM, "a JSON schema");
        s->target = p ? p : s->target;
        s->cap_targets = p ? cap : s->cap_targets;
    }
    if (s->build.rc)
        return nothing;
    const char *name = json_string_value(ref);
    uint32_t rule = grammar_build_rule(&s->build, name, strlen(name));
    s->target[s->n_targets++] = (struct target){node, name, rule};
    return grammar_build_call(&s->build, rule);
}

/* ---- values and branches ---- */

static struct grammar_piece alternative(struct schema *s, struct grammar_piece all, bool *has_any,
                                        struct grammar_piece x)
{
    all = *has_any ? grammar_build_alt(&s->build, all, x) : x;
    *has_any = true;
    return all;
}

/* "enum" and "const": those that also are of the type. */
static struct grammar_piece listed(struct schema *s, const json_t *node)
{
    const json_t *type = json_object_get(node, "type"), *one = json_object_get(node, "const");
    const json_t *list = json_object_get(node, "enum");
    unsigned types = type ? named_types(type) : IS_ANY;
    struct grammar_piece all = nothing;
    bool has_any = false;

    if (one && list)
        fail(s, ERR_UNSUPPORTED, "\"const\" beside \"enum\" is not supported");
    if (!one && !json_is_array(list))
        fail(s, ERR_FORMAT, "\"enum\" has to be a list");
    for (size_t i = 0; i < (one ? 1 : json_array_size(list)) && !s->build.rc; i++) {
        const json_t *v = one ? one : json_array_get(list, i);
        if (type_of_value(v) & types)
            all = alternative(s, all, &has_any, grammar_value_literal(&s->values, v));
    }
    if (!has_any)
        fail(s, ERR_FORMAT, "no value of \"%s\" is of the type", one ? "const" : "enum");
    return all;
}

struct facts {
    unsigned types;
    const json_t *values; /* a list of all that it may be, or one of them (is_one); NULL: not known */
    bool is_one;
    const json_t *node; /* without $ref */
};

/* What is certain of a schema without reading it all. */
static struct facts facts_of(struct schema *s, const json_t *node)
{
    struct facts f = {.types = IS_ANY, .node = node};
    unsigned groups = 0;
    const char *name;
    json_t *v;

    for (int i = 0; i < MAX_DEPTH && json_object_get(f.node, "$ref") && !s->build.rc; i++)
        f.node = target_of(s, json_object_get(f.node, "$ref"));
    if (!json_is_object(f.node) || json_object_get(f.node, "$ref"))
        return f;
    json_object_foreach((json_t *)f.node, name, v) groups |= group_of(name);
    f.values = json_object_get(f.node, "const");
    f.is_one = f.values != NULL;
    if (!f.values)
        f.values = json_object_get(f.node, "enum");
    if (f.values) {
        f.types = f.is_one ? type_of_value(f.values) : 0;
        for (size_t i = 0; !f.is_one && i < json_array_size(f.values); i++)
            f.types |= type_of_value(json_array_get(f.values, i));
    } else if (!(groups & COMBINE)) {
        f.types = plain_types(f.node, groups);
    }
    return f;
}

static size_t n_values(const struct facts *f)
{
    return f->is_one ? 1 : json_array_size(f->values);
}

static const json_t *value_at(const struct facts *f, size_t i)
{
    return f->is_one ? f->values : json_array_get(f->values, i);
}

static bool is_equal(const json_t *a, const json_t *b)
{
    return json_is_number(a) && json_is_number(b) ? json_number_value(a) == json_number_value(b) : json_equal(a, b);
}

static bool have_other_values(const struct facts *a, const struct facts *b)
{
    enum { MAX_PAIRS = 1 << 20 };

    if (n_values(a) > MAX_PAIRS / (n_values(b) + 1)) /* too many to look at */
        return false;
    for (size_t i = 0; i < n_values(a); i++)
        for (size_t k = 0; k < n_values(b); k++)
            if (is_equal(value_at(a, i), value_at(b, k)))
                return false;
    return true;
}

/* Do both require a property whose values differ? Of the first one's many only some are looked at. */
static bool have_other_members(struct schema *s, const struct facts *a, const struct facts *b)
{
    enum { MAX_NAMES = 256 };
    const json_t *required = json_object_get(a->node, "required"), *mine = json_object_get(a->node, "properties");

    for (size_t i = 0; i < json_array_size(required) && i < MAX_NAMES; i++) {
        const char *name = json_string_value(json_array_get(required, i));
        const json_t *x = name ? json_object_get(mine, name) : NULL;
        const json_t *y = name ? json_object_get(json_object_get(b->node, "properties"), name) : NULL;
        struct facts p = facts_of(s, x), q = facts_of(s, y);
        bool differ = !(p.types & q.types) || (p.values && q.values && have_other_values(&p, &q));
        if (x && y && differ && is_required(b->node, name))
            return true;
    }
    return false;
}

/* Can no value be both? Types that differ say so, values, or a property that both require. */
static bool are_apart(struct schema *s, const json_t *x, const json_t *y)
{
    struct facts a = facts_of(s, x), b = facts_of(s, y);

    if (!(a.types & b.types))
        return true;
    if (a.values && b.values)
        return have_other_values(&a, &b);
    return a.types == IS_OBJECT && b.types == IS_OBJECT && have_other_members(s, &a, &b);
}

static void check_one_of(struct schema *s, const json_t *list)
{
    enum { MAX_BRANCHES = 64 };
    size_t n = json_array_size(list);

    if (n > MAX_BRANCHES)
        fail(s, ERR_LIMIT, "\"oneOf\" of %zu schemas; at most %d are supported", n, MAX_BRANCHES);
    for (size_t i = 0; i < n && !s->build.rc; i++)
        for (size_t k = i + 1; k < n && !s->build.rc; k++)
            if (!are_apart(s, json_array_get(list, i), json_array_get(list, k)))
                fail(s, ERR_UNSUPPORTED,
                     "\"oneOf\": schemas %zu and %zu may both hold, for all that types, values and required properties "
                     "say; "
                     "\"anyOf\" is supported",
                     i, k);
}

static struct grammar_piece branches(struct schema *s, const json_t *node)
{
    static const char *const names[] = {"anyOf", "oneOf", "allOf"};
    const char *name = names[0];
    struct grammar_piece all = nothing;
    bool has_any = false;

    for (int i = 0; i < 3; i++)
        if (json_object_get(node, names[i]))
            name = names[i];
    const json_t *list = json_object_get(node, name);
    if (!json_array_size(list))
        fail(s, ERR_FORMAT, "\"%s\" has to be a list of schemas", name);
    if (!strcmp(name, "allOf") && json_array_size(list) > 1)
        fail(s, ERR_UNSUPPORTED, "\"allOf\" of %zu schemas is not supported", json_array_size(list));
    if (!strcmp(name, "oneOf"))
        check_one_of(s, list);
    for (size_t i = 0; i < json_array_size(list) && !s->build.rc; i++) {
        size_t at = enter(s, "/%s/%zu", name, i);
        all = alternative(s, all, &has_any, schema_of(s, json_array_get(list, i)));
        leave(s, at);
    }
    return all;
}

/* ---- a schema ---- */

static struct grammar_piece typed(struct schema *s, const json_t *node, unsigned groups)
{
    unsigned types = plain_types(node, groups);
    struct grammar_piece all = nothing;
    bool has_any = false;

    if (!types)
        fail(s, ERR_FORMAT, "\"type\" has to be the name of a type, or a list of such");
    if (json_object_get(node, "format") && !(types & IS_STRING))
        fail(s, ERR_UNSUPPORTED, "\"format\" of what is no string is not supported");
    if (s->build.rc)
        return nothing;
    if (types == IS_ANY && !(groups & ~(unsigned)TYPE))
        return grammar_value_any(&s->values);
    if (types & IS_OBJECT)
        all = alternative(s, all, &has_any, object_of(s, node));
    if (types & IS_ARRAY)
        all = alternative(s, all, &has_any, array_of(s, node));
    if (types & IS_STRING)
        all = alternative(s, all, &has_any, string_of(s, node));
    if (types & (IS_INTEGER | IS_REAL)) {
        struct grammar_bounds bounds = bounds_of(s, node, !(types & IS_REAL));
        if (!s->build.rc)
            all = alternative(s, all, &has_any,
                              (types & IS_REAL ? grammar_value_number : grammar_value_integer)(&s->values, &bounds));
    }
    if (types & IS_BOOLEAN)
        all = alternative(s, all, &has_any, grammar_pattern(&s->build, GRAMMAR_PATTERN_BYTES, "true|false", 10));
    if (types & IS_NULL)
        all = alternative(s, all, &has_any, grammar_build_text(&s->build, "null", 4));
    return all;
}

static struct grammar_piece object_schema(struct schema *s, const json_t *node)
{
    unsigned groups = groups_of(s, node);

    if (groups & REF) {
        check_alone(s, node, REF, 0);
        return s->build.rc ? nothing : reference(s, json_object_get(node, "$ref"));
    }
    if (groups & ENUM) {
        check_alone(s, node, ENUM, TYPE | ENUM);
        return s->build.rc ? nothing : listed(s, node);
    }
    if (groups & COMBINE) {
        check_alone(s, node, COMBINE, 0);
        return s->build.rc ? nothing : branches(s, node);
    }
    return s->build.rc ? nothing : typed(s, node, groups);
}

static struct grammar_piece schema_of(struct schema *s, const json_t *node)
{
    struct grammar_piece x = nothing;
    bool was_well = !s->build.rc;

    if (++s->depth > MAX_DEPTH)
        fail(s, ERR_LIMIT, "more than %d schemas within each other; $defs and $ref make it flatter", MAX_DEPTH);
    else if (json_is_true(node))
        x = grammar_value_any(&s->values);
    else if (json_is_false(node))
        fail(s, ERR_FORMAT, "nothing can stand here (false)");
    else if (!json_is_object(node))
        fail(s, ERR_FORMAT, "a schema has to be an object, true or false");
    else
        x = object_schema(s, node);
    s->depth--;
    /* What pieces say that know nothing of schemas gets its place. */
    if (was_well && s->build.rc && s->build.rc != ERR_NOMEM && strncmp(err_text(), "JSON schema", 11))
        s->build.rc = err(s->build.rc, "JSON schema, at %s: %s", s->path, err_text());
    return x;
}

static int convert(struct schema *s, struct grammar **out)
{
    uint32_t root = grammar_build_rule(&s->build, "#", 1);

    strcpy(s->path, "#");
    grammar_build_define(&s->build, root, schema_of(s, s->root));
    for (uint32_t i = 0; i < s->n_targets && !s->build.rc; i++) { /* which may name more of them */
        struct target t = s->target[i];
        snprintf(s->path, sizeof s->path, "%.200s", t.name);
        grammar_build_define(&s->build, t.rule, schema_of(s, t.node));
    }
    return grammar_build_finish(&s->build, root, out);
}

int grammar_schema(const char *text, size_t n_bytes, struct grammar **out)
{
    struct schema s = {.n_targets = 0};
    json_t *root = NULL;

    *out = NULL;
    if (n_bytes > GRAMMAR_MAX_TEXT_BYTES)
        return err(ERR_LIMIT, "a JSON schema of %zu bytes; at most %zu are read", n_bytes, GRAMMAR_MAX_TEXT_BYTES);
    int rc = json_room_parse(text, n_bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &root);
    if (rc < 0)
        return rc == ERR_NOMEM ? rc : err(rc, "JSON schema: %s", err_text());
    s.root = root;
    grammar_build_init(&s.build);
    grammar_value_init(&s.values, &s.build);
    rc = convert(&s, out);
    grammar_build_done(&s.build);
    mem_free(s.target);
    json_decref(root);
    return rc;
}

int grammar_schema_object(struct grammar **out)
{
    struct grammar_build b;
    struct grammar_values v;

    grammar_build_init(&b);
    grammar_value_init(&v, &b);
    uint32_t root = grammar_build_rule(&b, "root", 4);
    grammar_build_define(&b, root, grammar_value_object(&v));
    int rc = grammar_build_finish(&b, root, out);
    grammar_build_done(&b);
    return rc;
}
