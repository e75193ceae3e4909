/* Filters and tests: those of Jinja that chat templates use. One row each; what has no row is refused by its name. */
#include "src/model/template_in.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"

typedef struct template_val val; /* lint: the value's type stands in every line here */
typedef struct template_str str; /* lint: as above */

const val *template_lib_arg(const struct template_call *call, int i, const char *name)
{
    if (i >= 0 && i < call->n)
        return &call->v[i];
    for (int k = 0; k < call->n_named; k++)
        if (template_val_is(&call->name[k], name))
            return &call->named[k];
    return NULL;
}

static bool flag(const struct template_call *call, int i, const char *name)
{
    const val *v = template_lib_arg(call, i, name);
    return v && template_val_true(v);
}

int template_lib_int(const struct template_call *call, int i, const char *name, int64_t *out)
{
    const val *v = template_lib_arg(call, i, name);
    if (!v || v->kind == VAL_NONE)
        return 0;
    if (v->kind != VAL_INT && v->kind != VAL_BOOL)
        return err(ERR_FORMAT, "chat template, line %d: '%s' is %s, not an integer", call->line, name,
                   template_val_kind_name(v));
    *out = v->u.i;
    return 0;
}

static int str_arg(const struct template_call *call, int i, const char *name, str *out)
{
    const val *v = template_lib_arg(call, i, name);
    if (!v || v->kind != VAL_STR)
        return err(ERR_FORMAT, "chat template, line %d: '%s' is %s, not a string", call->line, name,
                   v ? template_val_kind_name(v) : "missing");
    *out = v->u.s;
    return 0;
}

#define FILTER(name) \
    static int name(struct template_render *r, const val *in, const struct template_call *call, val *out)
#define BUF                           \
    {                                 \
        .max_bytes = TEMPLATE_MAX_OUT \
    }

/* ---- text ---- */

enum letter_case { UPPER, LOWER, CAPITALIZE, TITLE };

static int change_case(struct template_render *r, const val *in, enum letter_case to, val *out)
{
    str s;
    struct template_buf buf = BUF;
    bool begins = true;
    int rc = template_val_text(r, in, &s);
    for (size_t at = 0; rc == 0 && at < s.n;) {
        utf8proc_int32_t c;
        utf8proc_uint8_t text[4];
        size_t len = template_val_char(s.p + at, s.n - at), ignored;
        if (utf8proc_iterate((const utf8proc_uint8_t *)s.p + at, (utf8proc_ssize_t)len, &c) <= 0) {
            rc = template_mem_add(&buf, s.p + at++, 1);
            continue;
        }
        bool up = to == UPPER || (to != LOWER && begins);
        utf8proc_ssize_t n = utf8proc_encode_char(up ? utf8proc_toupper(c) : utf8proc_tolower(c), text);
        rc = template_mem_add(&buf, (const char *)text, (size_t)n);
        begins = to == TITLE && (template_val_space(s.p + at, len, &ignored) || (c < 128 && strchr("-({[<", c)));
        at += len;
    }
    return template_val_take(r, &buf, rc, out);
}

FILTER(f_upper)
{
    (void)call;
    return change_case(r, in, UPPER, out);
}

FILTER(f_lower)
{
    (void)call;
    return change_case(r, in, LOWER, out);
}

FILTER(f_capitalize)
{
    (void)call;
    return change_case(r, in, CAPITALIZE, out);
}

FILTER(f_title)
{
    (void)call;
    return change_case(r, in, TITLE, out);
}

FILTER(f_string)
{
    str s;
    (void)call;
    int rc = template_val_text(r, in, &s);
    if (rc == 0)
        *out = template_val_str(s.p, s.n);
    return rc;
}

FILTER(f_trim)
{
    str s, chars = {NULL, 0};
    const val *v = template_lib_arg(call, 0, "chars");
    bool given = v && v->kind != VAL_NONE;
    int rc = template_val_text(r, in, &s);
    if (rc == 0 && given)
        rc = str_arg(call, 0, "chars", &chars);
    if (rc == 0) {
        s = template_val_strip(s, given ? &chars : NULL, true, true);
        *out = template_val_str(s.p, s.n);
    }
    return rc ? rc : template_val_spend(r, s.n * (chars.n + 1));
}

FILTER(f_replace)
{
    const str name = {"replace", 7};
    str s;
    bool found;
    int rc = template_val_text(r, in, &s);
    val text = template_val_str(s.p, s.n);
    return rc ? rc : template_method_call(r, &text, &name, call, &found, out);
}

FILTER(f_indent)
{
    str s;
    int64_t width = 4;
    const val *w = template_lib_arg(call, 0, "width");
    bool blank = flag(call, 2, "blank"), text_width = w && w->kind == VAL_STR;
    str pad = text_width ? w->u.s : (str){" ", 1};
    struct template_buf buf = BUF;
    int rc = template_val_text(r, in, &s);
    if (rc == 0 && !text_width)
        rc = template_lib_int(call, 0, "width", &width);
    if (rc == 0 && (width < 0 || width > 1000))
        rc = err(ERR_LIMIT, "chat template, line %d: indent by %lld", call->line, (long long)width);
    bool due = flag(call, 1, "first");
    for (size_t at = 0; rc == 0 && at <= s.n; at++) {
        bool empty = at == s.n || s.p[at] == '\n';
        for (int64_t i = 0; rc == 0 && due && (blank || !empty || at == 0) && i < (text_width ? 1 : width); i++)
            rc = template_mem_add(&buf, pad.p, pad.n);
        if (rc == 0 && at < s.n)
            rc = template_mem_add(&buf, s.p + at, 1);
        due = at < s.n && s.p[at] == '\n';
    }
    return template_val_take(r, &buf, rc, out);
}

FILTER(f_tojson)
{
    struct template_buf buf = BUF;
    int64_t indent = -1;
    int rc = template_lib_int(call, -1, "indent", &indent);
    if (rc == 0 && template_lib_arg(call, -1, "separators"))
        rc = err(ERR_UNSUPPORTED, "chat template, line %d: tojson with 'separators' is not supported", call->line);
    if (rc == 0 && indent > 100)
        rc = err(ERR_LIMIT, "chat template, line %d: indent by %lld", call->line, (long long)indent);
    if (rc == 0)
        rc = template_val_json(r, &buf, in, (int)indent, flag(call, -1, "sort_keys"));
    return template_val_take(r, &buf, rc, out);
}

FILTER(f_same)
{
    (void)r;
    (void)call;
    *out = *in;
    return 0;
}

/* ---- numbers ---- */

FILTER(f_int)
{
    const val *def = template_lib_arg(call, 0, "default");
    (void)r;
    *out = def ? *def : template_val_int(0);
    if (in->kind == VAL_INT || in->kind == VAL_BOOL)
        *out = template_val_int(in->u.i);
    else if (in->kind == VAL_FLOAT && fabs(in->u.f) < 9e18)
        *out = template_val_int((int64_t)in->u.f);
    else if (in->kind == VAL_STR && in->u.s.n && in->u.s.n < 20) {
        char text[24], *end;
        memcpy(text, in->u.s.p, in->u.s.n);
        text[in->u.s.n] = 0;
        long long i = strtoll(text, &end, 10);
        if (*end == 0)
            *out = template_val_int(i);
    }
    return 0;
}

FILTER(f_float)
{
    const val *def = template_lib_arg(call, 0, "default");
    (void)r;
    *out = def ? *def : (val){.kind = VAL_FLOAT, .u.f = 0};
    if (in->kind == VAL_INT || in->kind == VAL_BOOL)
        *out = (val){.kind = VAL_FLOAT, .u.f = (double)in->u.i};
    else if (in->kind == VAL_FLOAT)
        *out = *in;
    else if (in->kind == VAL_STR && in->u.s.n && in->u.s.n < 60) {
        char text[64], *end;
        memcpy(text, in->u.s.p, in->u.s.n);
        text[in->u.s.n] = 0;
        double f = strtod(text, &end);
        if (*end == 0)
            *out = (val){.kind = VAL_FLOAT, .u.f = f};
    }
    return 0;
}

FILTER(f_abs)
{
    (void)r;
    *out = *in;
    if (in->kind == VAL_FLOAT)
        out->u.f = fabs(in->u.f);
    else if (in->kind != VAL_INT || in->u.i == INT64_MIN)
        return err(ERR_FORMAT, "chat template, line %d: abs of %s", call->line, template_val_kind_name(in));
    else if (in->u.i < 0)
        out->u.i = -in->u.i;
    return 0;
}

/* ---- collections ---- */

FILTER(f_length)
{
    int rc = template_val_spend(r, in->kind == VAL_STR ? in->u.s.n : 0);
    switch (in->kind) {
    case VAL_UNDEF:
        *out = template_val_int(0);
        return rc;
    case VAL_STR:
        *out = template_val_int((int64_t)template_val_chars(&in->u.s));
        return rc;
    case VAL_LIST:
        *out = template_val_int((int64_t)in->u.list->n);
        return rc;
    case VAL_DICT:
        *out = template_val_int((int64_t)in->u.dict->n);
        return rc;
    default:
        return err(ERR_FORMAT, "chat template, line %d: %s has no length", call->line, template_val_kind_name(in));
    }
}

FILTER(f_default)
{
    const val *def = template_lib_arg(call, 0, "default_value");
    bool missing = in->kind == VAL_UNDEF || (flag(call, 1, "boolean") && !template_val_true(in));
    (void)r;
    *out = !missing ? *in : def ? *def : template_val_str("", 0);
    return 0;
}

static int pick(struct template_render *r, const val *in, const struct template_call *call, bool last, val *out)
{
    const struct template_list *list;
    int rc = template_val_items(r, call->line, in, &list);
    if (rc == 0)
        *out = list->n ? list->v[last ? list->n - 1 : 0] : template_val_undef((str){"first or last of nothing", 24});
    return rc;
}

FILTER(f_first)
{
    return pick(r, in, call, false, out);
}

FILTER(f_last)
{
    return pick(r, in, call, true, out);
}

/* A fresh list that may be changed. */
static int copy_list(struct template_render *r, const val *in, const struct template_call *call, val *out)
{
    const struct template_list *list;
    int rc = template_val_items(r, call->line, in, &list);
    if (rc == 0)
        rc = template_val_list(r, list->n, out);
    if (rc == 0 && list->n)
        memcpy(out->u.list->v, list->v, list->n * sizeof *list->v);
    return rc;
}

FILTER(f_list)
{
    return copy_list(r, in, call, out);
}

FILTER(f_reverse)
{
    int rc = copy_list(r, in, call, out);
    for (size_t i = 0; rc == 0 && i < out->u.list->n / 2; i++) {
        val *a = &out->u.list->v[i], *b = &out->u.list->v[out->u.list->n - 1 - i], t = *a;
        *a = *b;
        *b = t;
    }
    if (rc || in->kind != VAL_STR)
        return rc;
    struct template_buf buf = BUF;
    for (size_t i = 0; rc == 0 && i < out->u.list->n; i++)
        rc = template_mem_add(&buf, out->u.list->v[i].u.s.p, out->u.list->v[i].u.s.n);
    return template_val_take(r, &buf, rc, out);
}

/* An attribute path like "function.name". */
static int path(const val *v, const val *name, val *out)
{
    *out = *v;
    if (name->kind != VAL_STR)
        return err(ERR_UNSUPPORTED, "chat template: %s as the name of an attribute", template_val_kind_name(name));
    str rest = name->u.s;
    for (;;) {
        const char *dot = rest.n ? memchr(rest.p, '.', rest.n) : NULL;
        str part = {rest.p, dot ? (size_t)(dot - rest.p) : rest.n};
        val of = *out;
        int rc = template_lib_attr(&of, &part, out);
        if (rc || !dot)
            return rc;
        rest.n -= part.n + 1;
        rest.p = dot + 1;
    }
}

FILTER(f_join)
{
    const struct template_list *list;
    const val *sep = template_lib_arg(call, 0, "d"), *attr = template_lib_arg(call, 1, "attribute");
    struct template_buf buf = BUF;
    int rc = template_val_items(r, call->line, in, &list);
    for (size_t i = 0; rc == 0 && i < list->n; i++) {
        val item = list->v[i];
        if (i && sep)
            rc = template_val_write(r, &buf, sep, false);
        if (rc == 0 && attr)
            rc = path(&list->v[i], attr, &item);
        if (rc == 0)
            rc = template_val_write(r, &buf, &item, false);
    }
    return template_val_take(r, &buf, rc, out);
}

static int pair_list(struct template_render *r, const val *in, val *out)
{
    int rc = template_val_list(r, in->u.dict->n, out);
    for (size_t i = 0; rc == 0 && i < in->u.dict->n; i++) {
        val *item = &out->u.list->v[i];
        rc = template_val_list(r, 2, item);
        if (rc)
            break;
        item->is_tuple = true;
        item->u.list->v[0] = in->u.dict->pair[i].key;
        item->u.list->v[1] = in->u.dict->pair[i].val;
    }
    return rc;
}

FILTER(f_items)
{
    if (in->kind == VAL_UNDEF)
        return template_val_list(r, 0, out);
    if (in->kind != VAL_DICT)
        return err(ERR_FORMAT, "chat template, line %d: %s has no items", call->line, template_val_kind_name(in));
    return pair_list(r, in, out);
}

FILTER(f_dictsort)
{
    if (in->kind != VAL_DICT)
        return err(ERR_FORMAT, "chat template, line %d: %s has no items", call->line, template_val_kind_name(in));
    const val *by = template_lib_arg(call, 1, "by");
    bool by_value = by && by->kind == VAL_STR && template_val_is(&by->u.s, "value");
    size_t n = in->u.dict->n;
    int rc = pair_list(r, in, out);
    val *rows = rc == 0 ? template_mem_get(&r->mem, n * 2 * sizeof *rows, &rc) : NULL;
    for (size_t i = 0; rows && i < n; i++) { /* order, pair */
        rows[2 * i] = out->u.list->v[i].u.list->v[by_value];
        rows[2 * i + 1] = out->u.list->v[i];
    }
    if (rc == 0)
        rc = template_val_sort(r, call->line, rows, n, 2, !flag(call, 0, "case_sensitive"));
    bool backwards = flag(call, 2, "reverse");
    for (size_t i = 0; rc == 0 && i < n; i++)
        out->u.list->v[backwards ? n - 1 - i : i] = rows[2 * i + 1];
    return rc;
}

FILTER(f_sort)
{
    const val *attr = template_lib_arg(call, 2, "attribute");
    int rc = copy_list(r, in, call, out);
    size_t n = rc == 0 ? out->u.list->n : 0;
    val *rows = rc == 0 ? template_mem_get(&r->mem, n * 2 * sizeof *rows, &rc) : NULL;
    for (size_t i = 0; rc == 0 && i < n; i++) {
        rows[2 * i] = rows[2 * i + 1] = out->u.list->v[i];
        if (attr)
            rc = path(&out->u.list->v[i], attr, &rows[2 * i]);
    }
    if (rc == 0)
        rc = template_val_sort(r, call->line, rows, n, 2, !flag(call, 1, "case_sensitive"));
    bool backwards = flag(call, 0, "reverse");
    for (size_t i = 0; rc == 0 && i < n; i++)
        out->u.list->v[backwards ? n - 1 - i : i] = rows[2 * i + 1];
    return rc;
}

FILTER(f_unique)
{
    const struct template_list *list;
    size_t n = 0;
    int rc = template_val_items(r, call->line, in, &list);
    if (rc == 0)
        rc = template_val_list(r, list->n, out);
    for (size_t i = 0; rc == 0 && i < list->n; i++) {
        bool seen = false;
        for (size_t k = 0; rc == 0 && k < n && !seen; k++)
            rc = template_val_equal(r, &out->u.list->v[k], &list->v[i], &seen);
        if (!seen)
            out->u.list->v[n++] = list->v[i];
    }
    if (rc == 0)
        out->u.list->n = n;
    return rc;
}

/* What map and the selecting filters walk: for Jinja none, 0 and the like are empty there. */
static int items_or_none(struct template_render *r, const val *in, const struct template_call *call,
                         const struct template_list **list)
{
    static const struct template_list empty = {NULL, 0};
    *list = &empty;
    return template_val_true(in) ? template_val_items(r, call->line, in, list) : 0;
}

/* The call without its first n arguments. */
static struct template_call *shift(struct template_render *r, const struct template_call *call, int n, int *rc)
{
    struct template_call *rest = template_mem_get(&r->mem, sizeof *rest, rc);
    if (!rest)
        return NULL;
    *rest = *call;
    rest->n = call->n > n ? call->n - n : 0;
    if (rest->n)
        memmove(rest->v, call->v + n, (size_t)rest->n * sizeof *rest->v);
    return rest;
}

FILTER(f_map)
{
    const struct template_list *list;
    const val *attr = template_lib_arg(call, -1, "attribute"), *def = template_lib_arg(call, -1, "default");
    str name = {NULL, 0};
    struct template_call *rest = NULL;
    int rc = items_or_none(r, in, call, &list);
    if (rc == 0)
        rc = template_val_list(r, list->n, out);
    if (rc == 0 && !attr) {
        rc = str_arg(call, 0, "filter", &name);
        if (rc == 0)
            rest = shift(r, call, 1, &rc);
    }
    for (size_t i = 0; rc == 0 && i < list->n; i++) {
        val *to = &out->u.list->v[i];
        rc = attr ? path(&list->v[i], attr, to) : template_lib_filter(r, &name, &list->v[i], rest, to);
        if (rc == 0 && attr && def && to->kind == VAL_UNDEF)
            *to = *def;
    }
    return rc;
}

/* select, reject, selectattr, rejectattr */
static int choose(struct template_render *r, const val *in, const struct template_call *call, bool by_attr, bool keep,
                  val *out)
{
    const struct template_list *list;
    str test = {"true", 4};
    size_t n = 0;
    int rc = items_or_none(r, in, call, &list);
    struct template_call *rest = rc == 0 ? shift(r, call, 1 + by_attr, &rc) : NULL;
    bool given = call->n > by_attr;
    if (rc == 0 && by_attr && !call->n)
        rc = err(ERR_FORMAT, "chat template, line %d: no attribute given", call->line);
    if (rc == 0 && given)
        rc = str_arg(call, by_attr, "test", &test);
    if (rc == 0)
        rc = template_val_list(r, list->n, out);
    for (size_t i = 0; rc == 0 && i < list->n; i++) {
        val v = list->v[i];
        bool yes = false;
        if (by_attr)
            rc = path(&list->v[i], &call->v[0], &v);
        if (rc == 0 && given)
            rc = template_lib_test(r, &test, &v, rest, &yes);
        else
            yes = template_val_true(&v);
        if (yes == keep)
            out->u.list->v[n++] = list->v[i];
    }
    if (rc == 0)
        out->u.list->n = n;
    return rc;
}

FILTER(f_select)
{
    return choose(r, in, call, false, true, out);
}

FILTER(f_reject)
{
    return choose(r, in, call, false, false, out);
}

FILTER(f_selectattr)
{
    return choose(r, in, call, true, true, out);
}

FILTER(f_rejectattr)
{
    return choose(r, in, call, true, false, out);
}

static const struct {
    const char *name;
    int (*run)(struct template_render *, const val *, const struct template_call *, val *);
} filters[] = {
    {"abs", f_abs},
    {"capitalize", f_capitalize},
    {"count", f_length},
    {"d", f_default},
    {"default", f_default},
    {"dictsort", f_dictsort},
    {"first", f_first},
    {"float", f_float},
    {"indent", f_indent},
    {"int", f_int},
    {"items", f_items},
    {"join", f_join},
    {"last", f_last},
    {"length", f_length},
    {"list", f_list},
    {"lower", f_lower},
    {"map", f_map},
    {"reject", f_reject},
    {"rejectattr", f_rejectattr},
    {"replace", f_replace},
    {"reverse", f_reverse},
    {"safe", f_same},
    {"select", f_select},
    {"selectattr", f_selectattr},
    {"sort", f_sort},
    {"string", f_string},
    {"title", f_title},
    {"tojson", f_tojson},
    {"trim", f_trim},
    {"unique", f_unique},
    {"upper", f_upper},
};

static int find_filter(const str *name)
{
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (template_val_is(name, filters[i].name))
            return (int)i;
    return -1;
}

static int unsupported(const struct template_call *call, const char *what, const str *name)
{
    return err(ERR_UNSUPPORTED, "chat template, line %d: the %s '%.*s' is not supported", call->line, what,
               (int)(name->n < 40 ? name->n : 40), name->p);
}

int template_lib_filter(struct template_render *r, const str *name, const val *in, const struct template_call *call,
                        val *out)
{
    int filter = find_filter(name);
    int rc = filter < 0 ? unsupported(call, "filter", name) : template_val_spend(r, 0);
    if (rc == 0 && r->n_calls >= TEMPLATE_MAX_CALLS) /* a filter may call a filter: map('map', 'map', ...) */
        return err(ERR_LIMIT, "chat template, line %d: calls nested deeper than %d", call->line, TEMPLATE_MAX_CALLS);
    r->n_calls++;
    if (rc == 0)
        rc = filters[filter].run(r, in, call, out);
    r->n_calls--;
    return rc;
}

/* ---- tests ---- */

enum test {
    T_DEFINED,
    T_UNDEFINED,
    T_NONE,
    T_BOOLEAN,
    T_TRUE,
    T_FALSE,
    T_INTEGER,
    T_FLOAT,
    T_NUMBER,
    T_STRING,
    T_MAPPING,
    T_SEQUENCE,
    T_ITERABLE,
    T_CALLABLE,
    T_ODD,
    T_EVEN,
    T_DIVISIBLE,
    T_EQ,
    T_NE,
    T_LT,
    T_LE,
    T_GT,
    T_GE,
    T_IN,
    T_SAME,
    T_LOWER,
    T_UPPER
};

static const struct {
    const char *name;
    enum test test;
} tests[] = {
    {"defined", T_DEFINED},
    {"undefined", T_UNDEFINED},
    {"none", T_NONE},
    {"boolean", T_BOOLEAN},
    {"true", T_TRUE},
    {"false", T_FALSE},
    {"integer", T_INTEGER},
    {"float", T_FLOAT},
    {"number", T_NUMBER},
    {"string", T_STRING},
    {"mapping", T_MAPPING},
    {"sequence", T_SEQUENCE},
    {"iterable", T_ITERABLE},
    {"callable", T_CALLABLE},
    {"odd", T_ODD},
    {"even", T_EVEN},
    {"divisibleby", T_DIVISIBLE},
    {"eq", T_EQ},
    {"equalto", T_EQ},
    {"==", T_EQ},
    {"ne", T_NE},
    {"!=", T_NE},
    {"lt", T_LT},
    {"<", T_LT},
    {"lessthan", T_LT},
    {"le", T_LE},
    {"<=", T_LE},
    {"gt", T_GT},
    {">", T_GT},
    {"greaterthan", T_GT},
    {"ge", T_GE},
    {">=", T_GE},
    {"in", T_IN},
    {"sameas", T_SAME},
    {"lower", T_LOWER},
    {"upper", T_UPPER},
};

static int find_test(const str *name)
{
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++)
        if (template_val_is(name, tests[i].name))
            return (int)i;
    return -1;
}

/* Tests that only look at what kind of thing a value is. */
static bool is_kind(enum test test, const val *v)
{
    enum template_val_kind k = v->kind;
    switch (test) {
    case T_DEFINED:
        return k != VAL_UNDEF;
    case T_UNDEFINED:
        return k == VAL_UNDEF;
    case T_NONE:
        return k == VAL_NONE;
    case T_BOOLEAN:
        return k == VAL_BOOL;
    case T_TRUE:
        return k == VAL_BOOL && v->u.i;
    case T_FALSE:
        return k == VAL_BOOL && !v->u.i;
    case T_INTEGER:
        return k == VAL_INT;
    case T_FLOAT:
        return k == VAL_FLOAT;
    case T_NUMBER:
        return k == VAL_INT || k == VAL_FLOAT || k == VAL_BOOL;
    case T_STRING:
        return k == VAL_STR;
    case T_MAPPING:
        return k == VAL_DICT;
    case T_SEQUENCE: /* as Python: what has a length and can be indexed */
        return k == VAL_STR || k == VAL_LIST || k == VAL_DICT || k == VAL_UNDEF;
    case T_ITERABLE:
        return k == VAL_STR || k == VAL_LIST || k == VAL_DICT || k == VAL_UNDEF || k == VAL_LOOP;
    default:
        return k == VAL_MACRO || k == VAL_FUNC; /* T_CALLABLE */
    }
}

static int test_order(struct template_render *r, enum test test, const val *v, const val *other, int line, bool *out)
{
    bool swap = test == T_GT || test == T_LE, negate = test == T_LE || test == T_GE;
    int rc = swap ? template_val_less(r, line, other, v, out) : template_val_less(r, line, v, other, out);
    *out ^= negate;
    return rc;
}

static int test_number(enum test test, const val *v, const struct template_call *call, bool *out)
{
    int64_t by = 2;
    int rc = test == T_DIVISIBLE ? template_lib_int(call, 0, "num", &by) : 0;
    if (rc)
        return rc;
    if ((v->kind != VAL_INT && v->kind != VAL_BOOL) || by == 0)
        return err(ERR_FORMAT, "chat template, line %d: %s divided by %lld", call->line, template_val_kind_name(v),
                   (long long)by);
    *out = (by == -1 || v->u.i % by == 0) != (test == T_ODD);
    return 0;
}

static int test_case(struct template_render *r, enum test test, const val *v, bool *out)
{
    val changed, text;
    str s;
    int rc = template_val_text(r, v, &s);
    if (rc == 0)
        rc = change_case(r, v, test == T_LOWER ? LOWER : UPPER, &changed);
    if (rc)
        return rc;
    text = template_val_str(s.p, s.n);
    return template_val_equal(r, &text, &changed, out);
}

int template_lib_test(struct template_render *r, const str *name, const val *in, const struct template_call *call,
                      bool *out)
{
    int row = find_test(name);
    int rc = row < 0 ? unsupported(call, "test", name) : template_val_spend(r, 0);
    *out = false;
    if (rc)
        return rc;
    enum test test = tests[row].test;
    if (test <= T_CALLABLE) {
        *out = is_kind(test, in);
        return 0;
    }
    if (test <= T_DIVISIBLE)
        return test_number(test, in, call, out);
    if (test >= T_LOWER)
        return test_case(r, test, in, out);
    const val *other = template_lib_arg(call, 0, "other");
    if (!other)
        return err(ERR_FORMAT, "chat template, line %d: the test '%s' needs an argument", call->line, tests[row].name);
    if (test == T_IN)
        return template_val_in(r, call->line, in, other, out);
    if (test != T_EQ && test != T_NE && test != T_SAME)
        return test_order(r, test, in, other, call->line, out);
    rc = template_val_equal(r, in, other, out);
    *out ^= test == T_NE;
    *out &= test != T_SAME || in->kind == other->kind;
    return rc;
}

/* ---- attributes ---- */

static val loop_attr(const struct template_loop *loop, const str *name)
{
    size_t i = loop->index, n = loop->items->n;
    if (template_val_is(name, "index"))
        return template_val_int((int64_t)i + 1);
    if (template_val_is(name, "index0"))
        return template_val_int((int64_t)i);
    if (template_val_is(name, "revindex"))
        return template_val_int((int64_t)(n - i));
    if (template_val_is(name, "revindex0"))
        return template_val_int((int64_t)(n - i) - 1);
    if (template_val_is(name, "first"))
        return template_val_bool(i == 0);
    if (template_val_is(name, "last"))
        return template_val_bool(i + 1 == n);
    if (template_val_is(name, "length"))
        return template_val_int((int64_t)n);
    if (template_val_is(name, "previtem") && i > 0)
        return loop->items->v[i - 1];
    if (template_val_is(name, "nextitem") && i + 1 < n)
        return loop->items->v[i + 1];
    return template_val_undef(*name);
}

int template_lib_attr(const val *v, const str *name, val *out)
{
    const val *found = NULL;
    if (v->kind == VAL_UNDEF)
        return err(ERR_FORMAT, "chat template: '%.*s' is undefined, so it has no '%.*s'",
                   (int)(v->u.s.n < 40 ? v->u.s.n : 40), v->u.s.p, (int)(name->n < 40 ? name->n : 40), name->p);
    if (v->kind == VAL_LOOP) {
        *out = loop_attr(v->u.loop, name);
        return 0;
    }
    if (v->kind == VAL_DICT || v->kind == VAL_SPACE)
        found = template_val_get(v->u.dict, name->p, name->n);
    *out = found ? *found : template_val_undef(*name);
    return 0;
}
