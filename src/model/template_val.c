/* Values of a template and what Python does with them: truth, equality, order, str(), repr(), JSON. */
#include "src/model/template_in.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"
#include "src/base/mem.h"

typedef struct template_val val; /* lint: the value's type stands in every line here */

#define MAX_NEST 100 /* of lists in lists, when one is compared or printed */

val template_val_str(const char *p, size_t n)
{
    return (val){.kind = VAL_STR, .u.s = {p, n}};
}

val template_val_int(int64_t i)
{
    return (val){.kind = VAL_INT, .u.i = i};
}

val template_val_bool(bool b)
{
    return (val){.kind = VAL_BOOL, .u.i = b};
}

val template_val_undef(struct template_str name)
{
    return (val){.kind = VAL_UNDEF, .u.s = name};
}

bool template_val_is(const struct template_str *s, const char *text)
{
    return s->n == strlen(text) && memcmp(s->p, text, s->n) == 0;
}

const char *template_val_kind_name(const val *v)
{
    static const char *const names[] = {"undefined", "none",      "a boolean",   "an integer", "a float", "a string",
                                        "a list",    "a mapping", "a namespace", "the loop",   "a macro", "a function"};
    return names[v->kind];
}

bool template_val_true(const val *v)
{
    switch (v->kind) {
    case VAL_UNDEF:
    case VAL_NONE:
        return false;
    case VAL_BOOL:
    case VAL_INT:
        return v->u.i != 0;
    case VAL_FLOAT:
        return v->u.f != 0;
    case VAL_STR:
        return v->u.s.n != 0;
    case VAL_LIST:
        return v->u.list->n != 0;
    case VAL_DICT:
        return v->u.dict->n != 0;
    default:
        return true;
    }
}

int template_val_spend(struct template_render *r, size_t n)
{
    /* 16 bytes looked at cost as much as one node of the tree */
    r->n_steps += 1 + (int64_t)(n / 16);
    if (r->n_steps > TEMPLATE_MAX_STEPS)
        return err(ERR_LIMIT, "chat template: over %d steps", TEMPLATE_MAX_STEPS);
    return 0;
}

/* ---- text ---- */

size_t template_val_char(const char *p, size_t n)
{
    utf8proc_int32_t c;
    utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)n, &c);
    return len > 0 ? (size_t)len : 1;
}

size_t template_val_chars(const struct template_str *s)
{
    size_t n = 0;
    for (size_t at = 0; at < s->n; at += template_val_char(s->p + at, s->n - at))
        n++;
    return n;
}

/* Python's str.isspace. */
bool template_val_space(const char *p, size_t n, size_t *n_bytes)
{
    utf8proc_int32_t c;
    utf8proc_ssize_t len = utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)n, &c);
    if (len <= 0)
        return false;
    *n_bytes = (size_t)len;
    const utf8proc_property_t *prop = utf8proc_get_property(c);
    return prop->category == UTF8PROC_CATEGORY_ZS || prop->bidi_class == UTF8PROC_BIDI_CLASS_WS ||
           prop->bidi_class == UTF8PROC_BIDI_CLASS_B || prop->bidi_class == UTF8PROC_BIDI_CLASS_S;
}

/* Is the character at p one of chars (NULL: white space)? */
static bool is_among(const char *p, size_t n, const struct template_str *chars, size_t *n_bytes)
{
    if (!chars)
        return template_val_space(p, n, n_bytes);
    *n_bytes = template_val_char(p, n);
    for (size_t at = 0, len; at < chars->n; at += len) {
        len = template_val_char(chars->p + at, chars->n - at);
        if (len == *n_bytes && memcmp(chars->p + at, p, len) == 0)
            return true;
    }
    return false;
}

struct template_str template_val_strip(struct template_str s, const struct template_str *chars, bool left, bool right)
{
    size_t len;
    while (left && s.n && is_among(s.p, s.n, chars, &len)) {
        s.p += len;
        s.n -= len;
    }
    while (right && s.n) {
        size_t back = 1;
        while (back < s.n && back < 4 && ((unsigned char)s.p[s.n - back] & 0xc0) == 0x80)
            back++;
        if (!is_among(s.p + s.n - back, back, chars, &len) || len != back)
            break;
        s.n -= back;
    }
    return s;
}

int template_val_copy(struct template_render *r, const char *p, size_t n, val *out)
{
    int rc = template_val_spend(r, n);
    char *q = rc == 0 ? template_mem_get(&r->mem, n + 1, &rc) : NULL;
    if (!q)
        return rc;
    if (n)
        memcpy(q, p, n);
    q[n] = 0;
    *out = template_val_str(q, n);
    return 0;
}

int template_val_take(struct template_render *r, struct template_buf *buf, int rc, val *out)
{
    if (rc == 0)
        rc = template_val_copy(r, buf->p ? buf->p : "", buf->n, out);
    mem_free(buf->p);
    return rc;
}

/* ---- lists and dicts ---- */

int template_val_list(struct template_render *r, size_t n, val *out)
{
    int rc = template_val_spend(r, n * 16);
    struct template_list *list = rc == 0 ? template_mem_get(&r->mem, sizeof *list, &rc) : NULL;
    if (!list)
        return rc;
    if (n > TEMPLATE_MAX_MEM / sizeof *list->v)
        return err(ERR_LIMIT, "chat template: a list of %zu", n);
    list->v = template_mem_get(&r->mem, n * sizeof *list->v, &rc);
    if (!list->v)
        return rc;
    list->n = n;
    *out = (val){.kind = VAL_LIST, .u.list = list};
    return 0;
}

static bool is_key(const val *key, const char *p, size_t n)
{
    return key->kind == VAL_STR && key->u.s.n == n && memcmp(key->u.s.p, p, n) == 0;
}

const val *template_val_get(const struct template_dict *dict, const char *p, size_t n)
{
    for (size_t i = 0; i < dict->n; i++)
        if (is_key(&dict->pair[i].key, p, n))
            return &dict->pair[i].val;
    return NULL;
}

int template_val_put(struct template_render *r, struct template_dict *dict, const val *key, const val *v)
{
    int rc = template_val_spend(r, dict->n);
    for (size_t i = 0; i < dict->n && rc == 0; i++) {
        bool same;
        rc = template_val_equal(r, &dict->pair[i].key, key, &same);
        if (rc == 0 && same) {
            dict->pair[i].val = *v;
            return 0;
        }
    }
    if (rc == 0 && dict->n == dict->cap) {
        size_t cap = dict->cap ? dict->cap * 2 : 4;
        struct template_pair *pair = template_mem_get(&r->mem, cap * sizeof *pair, &rc);
        if (!pair)
            return rc;
        if (dict->n)
            memcpy(pair, dict->pair, dict->n * sizeof *pair);
        dict->pair = pair;
        dict->cap = cap;
    }
    if (rc == 0)
        dict->pair[dict->n++] = (struct template_pair){*key, *v};
    return rc;
}

int template_val_items(struct template_render *r, int line, const val *v, const struct template_list **out)
{
    val list;
    size_t n = v->kind == VAL_STR ? template_val_chars(&v->u.s) : v->kind == VAL_DICT ? v->u.dict->n : 0;
    if (v->kind == VAL_LIST) {
        *out = v->u.list;
        return 0;
    }
    if (v->kind != VAL_STR && v->kind != VAL_DICT && v->kind != VAL_UNDEF)
        return err(ERR_FORMAT, "chat template, line %d: %s cannot be walked through", line, template_val_kind_name(v));
    int rc = template_val_list(r, n, &list);
    if (rc)
        return rc;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (v->kind == VAL_DICT) {
            list.u.list->v[i] = v->u.dict->pair[i].key;
            continue;
        }
        size_t len = template_val_char(v->u.s.p + at, v->u.s.n - at);
        list.u.list->v[i] = template_val_str(v->u.s.p + at, len);
        at += len;
    }
    *out = list.u.list;
    return 0;
}

/* ---- comparison ---- */

static bool is_number(const val *v)
{
    return v->kind == VAL_BOOL || v->kind == VAL_INT || v->kind == VAL_FLOAT;
}

static double as_double(const val *v)
{
    return v->kind == VAL_FLOAT ? v->u.f : (double)v->u.i;
}

static int too_deep(void)
{
    return err(ERR_LIMIT, "chat template: lists nested deeper than %d", MAX_NEST);
}

static int equal_at(struct template_render *r, const val *a, const val *b, int nest, bool *out);

static int equal_dicts(struct template_render *r, const struct template_dict *a, const struct template_dict *b,
                       int nest, bool *out)
{
    int rc = 0;
    *out = a->n == b->n;
    for (size_t i = 0; i < a->n && *out && rc == 0; i++) {
        bool found = false;
        for (size_t k = 0; k < b->n && !found && rc == 0; k++) {
            rc = equal_at(r, &a->pair[i].key, &b->pair[k].key, nest, &found);
            if (rc == 0 && found)
                rc = equal_at(r, &a->pair[i].val, &b->pair[k].val, nest, out);
        }
        *out &= found;
    }
    return rc;
}

static int equal_at(struct template_render *r, const val *a, const val *b, int nest, bool *out)
{
    int rc = nest > MAX_NEST ? too_deep() : template_val_spend(r, a->kind == VAL_STR ? a->u.s.n : 0);
    *out = false;
    if (rc)
        return rc;
    if (is_number(a) && is_number(b)) {
        *out = a->kind != VAL_FLOAT && b->kind != VAL_FLOAT ? a->u.i == b->u.i : as_double(a) == as_double(b);
        return 0;
    }
    if (a->kind != b->kind)
        return 0;
    switch (a->kind) {
    case VAL_STR:
        *out = a->u.s.n == b->u.s.n && memcmp(a->u.s.p, b->u.s.p, a->u.s.n) == 0;
        return 0;
    case VAL_LIST:
        *out = a->is_tuple == b->is_tuple && a->u.list->n == b->u.list->n;
        for (size_t i = 0; i < a->u.list->n && *out && rc == 0; i++)
            rc = equal_at(r, &a->u.list->v[i], &b->u.list->v[i], nest + 1, out);
        return rc;
    case VAL_DICT:
        return equal_dicts(r, a->u.dict, b->u.dict, nest + 1, out);
    case VAL_SPACE:
        *out = a->u.dict == b->u.dict;
        return 0;
    case VAL_MACRO:
        *out = a->u.macro == b->u.macro;
        return 0;
    case VAL_FUNC:
        *out = a->u.i == b->u.i;
        return 0;
    default:
        *out = true;
        return 0;
    }
}

int template_val_equal(struct template_render *r, const val *a, const val *b, bool *out)
{
    return equal_at(r, a, b, 0, out);
}

int template_val_less(struct template_render *r, int line, const val *a, const val *b, bool *out)
{
    if (is_number(a) && is_number(b)) {
        *out = a->kind != VAL_FLOAT && b->kind != VAL_FLOAT ? a->u.i < b->u.i : as_double(a) < as_double(b);
        return template_val_spend(r, 0);
    }
    if (a->kind != VAL_STR || b->kind != VAL_STR)
        return err(ERR_FORMAT, "chat template, line %d: %s and %s have no order", line, template_val_kind_name(a),
                   template_val_kind_name(b));
    size_t n = a->u.s.n < b->u.s.n ? a->u.s.n : b->u.s.n;
    int c = n ? memcmp(a->u.s.p, b->u.s.p, n) : 0; /* bytes of UTF-8 order as code points do */
    *out = c ? c < 0 : a->u.s.n < b->u.s.n;
    return template_val_spend(r, n);
}

int template_val_in(struct template_render *r, int line, const val *a, const val *b, bool *out)
{
    const struct template_list *list;
    *out = false;
    if (b->kind == VAL_STR) {
        if (a->kind != VAL_STR)
            return err(ERR_FORMAT, "chat template, line %d: %s cannot be in a string", line, template_val_kind_name(a));
        *out = a->u.s.n == 0 || memmem(b->u.s.p, b->u.s.n, a->u.s.p, a->u.s.n);
        return template_val_spend(r, b->u.s.n);
    }
    int rc = template_val_items(r, line, b, &list);
    for (size_t i = 0; rc == 0 && i < list->n && !*out; i++)
        rc = template_val_equal(r, a, &list->v[i], out);
    return rc;
}

/* Case-blind order of texts, as Jinja sorts. */
static int compare_folded(const struct template_str *a, const struct template_str *b)
{
    size_t i = 0, k = 0;
    while (i < a->n && k < b->n) {
        utf8proc_int32_t x, y;
        utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)a->p + i, (utf8proc_ssize_t)(a->n - i), &x);
        utf8proc_ssize_t m = utf8proc_iterate((const utf8proc_uint8_t *)b->p + k, (utf8proc_ssize_t)(b->n - k), &y);
        x = n > 0 ? utf8proc_tolower(x) : 0xfffd;
        y = m > 0 ? utf8proc_tolower(y) : 0xfffd;
        if (x != y)
            return x < y ? -1 : 1;
        i += n > 0 ? (size_t)n : 1;
        k += m > 0 ? (size_t)m : 1;
    }
    return (i < a->n) - (k < b->n);
}

static int less(struct template_render *r, int line, const val *a, const val *b, bool any_case, bool *out)
{
    if (!any_case || a->kind != VAL_STR || b->kind != VAL_STR)
        return template_val_less(r, line, a, b, out);
    *out = compare_folded(&a->u.s, &b->u.s) < 0;
    return template_val_spend(r, a->u.s.n);
}

/* Merge sort (stable) of n entries of stride values each, ordered by the first. */
int template_val_sort(struct template_render *r, int line, val *v, size_t n, size_t stride, bool any_case)
{
    int rc = 0;
    if (n < 2)
        return 0;
    val *tmp = template_mem_get(&r->mem, n * stride * sizeof *tmp, &rc);
    if (!tmp)
        return rc;
    for (size_t width = 1; width < n && rc == 0; width *= 2) {
        for (size_t from = 0; from < n && rc == 0; from += 2 * width) {
            size_t mid = from + width < n ? from + width : n, end = mid + width < n ? mid + width : n;
            size_t i = from, k = mid;
            for (size_t to = from; to < end && rc == 0; to++) {
                bool right = i == mid;
                if (i < mid && k < end)
                    rc = less(r, line, &v[k * stride], &v[i * stride], any_case, &right);
                memcpy(&tmp[to * stride], &v[(right ? k : i) * stride], stride * sizeof *v);
                k += right;
                i += !right;
            }
        }
        if (rc == 0)
            memcpy(v, tmp, n * stride * sizeof *v);
    }
    return rc;
}

/* ---- writing ---- */

static int put(struct template_buf *buf, const char *text)
{
    return template_mem_add(buf, text, strlen(text));
}

static int write_float(struct template_buf *buf, double f)
{
    char text[64];
    if (f != f)
        return put(buf, "nan");
    if (f - f != 0)
        return put(buf, f > 0 ? "inf" : "-inf");
    for (int digits = 1; digits <= 17; digits++) { /* the shortest that reads back */
        snprintf(text, sizeof text, "%.*e", digits - 1, f);
        if (strtod(text, NULL) == f) {
            int exp = atoi(strchr(text, 'e') + 1);
            if (exp >= -4 && exp < 16)
                snprintf(text, sizeof text, "%.*f", digits - 1 - exp > 1 ? digits - 1 - exp : 1, f);
            break;
        }
    }
    return put(buf, text);
}

static int write_number(struct template_buf *buf, const val *v)
{
    char text[32];
    if (v->kind == VAL_FLOAT)
        return write_float(buf, v->u.f);
    snprintf(text, sizeof text, "%lld", (long long)v->u.i);
    return put(buf, text);
}

/* repr() of a string; of what Python escapes, the control characters. */
static int write_quoted(struct template_buf *buf, const struct template_str *s)
{
    char quote = memchr(s->p, '\'', s->n) && !memchr(s->p, '"', s->n) ? '"' : '\'';
    int rc = template_mem_add(buf, &quote, 1);
    for (size_t i = 0; i < s->n && rc == 0; i++) {
        char c = s->p[i], text[8] = {c, 0};
        if (c == quote || c == '\\')
            snprintf(text, sizeof text, "\\%c", c);
        else if (c == '\n' || c == '\r' || c == '\t')
            snprintf(text, sizeof text, "\\%c", c == '\n' ? 'n' : c == '\r' ? 'r' : 't');
        else if ((unsigned char)c < 32 || c == 127)
            snprintf(text, sizeof text, "\\x%02x", (unsigned)c);
        rc = template_mem_add(buf, text, text[1] ? strlen(text) : 1);
    }
    return rc ? rc : template_mem_add(buf, &quote, 1);
}

static int write_at(struct template_render *r, struct template_buf *buf, const val *v, bool quoted, int nest);

static int write_list(struct template_render *r, struct template_buf *buf, const val *v, int nest)
{
    size_t n = v->u.list->n;
    int rc = put(buf, v->is_tuple ? "(" : "[");
    for (size_t i = 0; i < n && rc == 0; i++) {
        rc = i ? put(buf, ", ") : 0;
        if (rc == 0)
            rc = write_at(r, buf, &v->u.list->v[i], true, nest);
    }
    return rc ? rc : put(buf, v->is_tuple ? (n == 1 ? ",)" : ")") : "]");
}

static int write_dict(struct template_render *r, struct template_buf *buf, const struct template_dict *d, int nest)
{
    int rc = put(buf, "{");
    for (size_t i = 0; i < d->n && rc == 0; i++) {
        rc = i ? put(buf, ", ") : 0;
        if (rc == 0)
            rc = write_at(r, buf, &d->pair[i].key, true, nest);
        if (rc == 0)
            rc = put(buf, ": ");
        if (rc == 0)
            rc = write_at(r, buf, &d->pair[i].val, true, nest);
    }
    return rc ? rc : put(buf, "}");
}

static int write_at(struct template_render *r, struct template_buf *buf, const val *v, bool quoted, int nest)
{
    int rc = nest > MAX_NEST ? too_deep() : template_val_spend(r, 0);
    if (rc)
        return rc;
    switch (v->kind) {
    case VAL_UNDEF:
        return quoted ? put(buf, "Undefined") : 0;
    case VAL_NONE:
        return put(buf, "None");
    case VAL_BOOL:
        return put(buf, v->u.i ? "True" : "False");
    case VAL_INT:
    case VAL_FLOAT:
        return write_number(buf, v);
    case VAL_STR:
        return quoted ? write_quoted(buf, &v->u.s) : template_mem_add(buf, v->u.s.p, v->u.s.n);
    case VAL_LIST:
        return write_list(r, buf, v, nest + 1);
    case VAL_DICT:
        return write_dict(r, buf, v->u.dict, nest + 1);
    default:
        return err(ERR_UNSUPPORTED, "chat template: %s has no text", template_val_kind_name(v));
    }
}

int template_val_write(struct template_render *r, struct template_buf *buf, const val *v, bool quoted)
{
    return write_at(r, buf, v, quoted, 0);
}

int template_val_text(struct template_render *r, const val *v, struct template_str *out)
{
    if (v->kind == VAL_STR) {
        *out = v->u.s;
        return 0;
    }
    struct template_buf buf = {.max_bytes = TEMPLATE_MAX_OUT};
    val copy;
    int rc = template_val_write(r, &buf, v, false);
    if (rc == 0)
        rc = template_val_copy(r, buf.p ? buf.p : "", buf.n, &copy);
    if (rc == 0)
        *out = copy.u.s;
    mem_free(buf.p);
    return rc;
}

/* ---- JSON, as Python's json.dumps(ensure_ascii=False) ---- */

static int json_string(struct template_buf *buf, const struct template_str *s)
{
    int rc = put(buf, "\"");
    for (size_t i = 0; i < s->n && rc == 0; i++) {
        static const char from[] = "\n\r\t\b\f\"\\", to[] = "nrtbf\"\\";
        char c = s->p[i], text[8];
        const char *at = c ? strchr(from, c) : NULL;
        if (at)
            snprintf(text, sizeof text, "\\%c", to[at - from]);
        else if ((unsigned char)c < 32)
            snprintf(text, sizeof text, "\\u%04x", (unsigned)c);
        rc = at || (unsigned char)c < 32 ? put(buf, text) : template_mem_add(buf, &c, 1);
    }
    return rc ? rc : put(buf, "\"");
}

static int json_break(struct template_buf *buf, int indent, int nest)
{
    int rc = put(buf, "\n");
    for (int i = 0; i < indent * nest && rc == 0; i++)
        rc = put(buf, " ");
    return rc;
}

struct json {
    struct template_render *r;
    struct template_buf *buf;
    int indent; /* -1: on one line */
    bool sorted;
};

static int json_at(const struct json *j, const val *v, int nest);

static int json_items(const struct json *j, const val *v, int nest)
{
    bool dict = v->kind == VAL_DICT;
    size_t n = dict ? v->u.dict->n : v->u.list->n;
    val *pair = NULL;
    int rc = put(j->buf, dict ? "{" : "[");
    if (dict && rc == 0) {
        pair = template_mem_get(&j->r->mem, n * 2 * sizeof *pair, &rc);
        for (size_t i = 0; i < n && pair; i++) {
            pair[2 * i] = v->u.dict->pair[i].key;
            pair[2 * i + 1] = v->u.dict->pair[i].val;
        }
        if (rc == 0 && j->sorted)
            rc = template_val_sort(j->r, 0, pair, n, 2, false);
    }
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (i)
            rc = put(j->buf, j->indent >= 0 ? "," : ", ");
        if (rc == 0 && j->indent >= 0)
            rc = json_break(j->buf, j->indent, nest);
        if (rc == 0 && dict && pair[2 * i].kind != VAL_STR)
            rc = err(ERR_UNSUPPORTED, "chat template: %s as a key of JSON", template_val_kind_name(&pair[2 * i]));
        if (rc == 0 && dict)
            rc = json_string(j->buf, &pair[2 * i].u.s);
        if (rc == 0 && dict)
            rc = put(j->buf, ": ");
        if (rc == 0)
            rc = json_at(j, dict ? &pair[2 * i + 1] : &v->u.list->v[i], nest);
    }
    if (rc == 0 && n && j->indent >= 0)
        rc = json_break(j->buf, j->indent, nest - 1);
    return rc ? rc : put(j->buf, dict ? "}" : "]");
}

static int json_at(const struct json *j, const val *v, int nest)
{
    int rc = nest > MAX_NEST ? too_deep() : template_val_spend(j->r, 0);
    if (rc)
        return rc;
    switch (v->kind) {
    case VAL_NONE:
        return put(j->buf, "null");
    case VAL_BOOL:
        return put(j->buf, v->u.i ? "true" : "false");
    case VAL_INT:
    case VAL_FLOAT:
        return write_number(j->buf, v);
    case VAL_STR:
        return json_string(j->buf, &v->u.s);
    case VAL_LIST:
    case VAL_DICT:
        return json_items(j, v, nest + 1);
    default:
        return err(ERR_FORMAT, "chat template: %s cannot be JSON", template_val_kind_name(v));
    }
}

int template_val_json(struct template_render *r, struct template_buf *buf, const val *v, int indent, bool sorted)
{
    const struct json j = {r, buf, indent, sorted};
    return json_at(&j, v, 0);
}
