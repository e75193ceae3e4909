/* Methods of strings and dicts, and the functions that templates call by name. */
#include "src/model/template_in.h"

#include <string.h>
#include <time.h>

#include "src/base/err.h"

typedef struct template_val val; /* lint: the value's type stands in every line here */
typedef struct template_str str; /* lint: as above */

#define METHOD(name) \
    static int name(struct template_render *r, const val *self, const struct template_call *call, val *out)

static int need_str(const struct template_call *call, int i, str *out)
{
    if (i >= call->n || call->v[i].kind != VAL_STR)
        return err(ERR_FORMAT, "chat template, line %d: argument %d is %s, not a string", call->line, i + 1,
                   i < call->n ? template_val_kind_name(&call->v[i]) : "missing");
    *out = call->v[i].u.s;
    return 0;
}

/* ---- strings ---- */

static int strip(struct template_render *r, const val *self, const struct template_call *call, bool left, bool right,
                 val *out)
{
    str chars = {"", 0}, s;
    bool given = call->n && call->v[0].kind != VAL_NONE;
    int rc = given ? need_str(call, 0, &chars) : 0;
    if (rc == 0)
        rc = template_val_spend(r, self->u.s.n * chars.n);
    if (rc)
        return rc;
    s = template_val_strip(self->u.s, given ? &chars : NULL, left, right);
    *out = template_val_str(s.p, s.n);
    return 0;
}

METHOD(m_strip)
{
    return strip(r, self, call, true, true, out);
}

METHOD(m_lstrip)
{
    return strip(r, self, call, true, false, out);
}

METHOD(m_rstrip)
{
    return strip(r, self, call, false, true, out);
}

/* The first needle in s from at on, or s.n. */
static size_t find(const str *s, size_t at, const str *needle)
{
    const char *p = at <= s->n ? memmem(s->p + at, s->n - at, needle->p, needle->n) : NULL;
    return p ? (size_t)(p - s->p) : s->n;
}

/* The last needle that ends at end or before; *found is set. */
static int find_back(struct template_render *r, const str *s, size_t end, const str *needle, bool *found, size_t *at)
{
    int rc = 0;
    *found = false;
    for (size_t i = end; i >= needle->n && rc == 0 && !*found; i--) {
        rc = template_val_spend(r, needle->n);
        *at = i - needle->n;
        *found = memcmp(s->p + *at, needle->p, needle->n) == 0;
    }
    return rc;
}

struct parts {
    val *v; /* (cap), in the arena */
    size_t n, cap;
};

static int add_part(struct template_render *r, struct parts *parts, const char *p, size_t n)
{
    int rc = template_val_spend(r, n);
    if (rc == 0 && parts->n == parts->cap) {
        size_t cap = parts->cap ? parts->cap * 2 : 8;
        val *v = template_mem_get(&r->mem, cap * sizeof *v, &rc);
        if (!v)
            return rc;
        if (parts->n)
            memcpy(v, parts->v, parts->n * sizeof *v);
        parts->v = v;
        parts->cap = cap;
    }
    if (rc == 0)
        parts->v[parts->n++] = template_val_str(p, n);
    return rc;
}

static int finish_parts(struct template_render *r, const struct parts *parts, int rc, bool backwards, val *out)
{
    if (rc == 0)
        rc = template_val_list(r, parts->n, out);
    for (size_t i = 0; rc == 0 && i < parts->n; i++)
        out->u.list->v[i] = parts->v[backwards ? parts->n - 1 - i : i];
    return rc;
}

static int split_space(struct template_render *r, str s, int64_t max, val *out)
{
    struct parts parts = {0};
    size_t len;
    int rc = 0;
    for (;;) {
        s = template_val_strip(s, NULL, true, false);
        if (s.n == 0 || rc)
            break;
        size_t n = 0;
        while (n < s.n && !template_val_space(s.p + n, s.n - n, &len))
            n += template_val_char(s.p + n, s.n - n);
        if (max >= 0 && (int64_t)parts.n == max)
            n = template_val_strip(s, NULL, false, true).n;
        rc = add_part(r, &parts, s.p, n);
        s.p += n;
        s.n -= n;
    }
    return finish_parts(r, &parts, rc, false, out);
}

static int split(struct template_render *r, const val *self, const struct template_call *call, bool back, val *out)
{
    const val *by = template_lib_arg(call, 0, "sep");
    const str *s = &self->u.s;
    struct parts parts = {0};
    int64_t max = -1; /* or any below 0: no limit */
    size_t from = 0, end = s->n, at;
    bool more = back;
    int rc = template_lib_int(call, 1, "maxsplit", &max);
    if (rc == 0 && (!by || by->kind == VAL_NONE)) {
        if (back && max >= 0)
            return err(ERR_UNSUPPORTED, "chat template, line %d: rsplit at white space with a limit", call->line);
        return split_space(r, *s, max, out);
    }
    if (rc == 0 && (by->kind != VAL_STR || by->u.s.n == 0))
        rc = err(ERR_FORMAT, "chat template, line %d: split by %s", call->line,
                 by->kind == VAL_STR ? "nothing" : template_val_kind_name(by));
    while (rc == 0 && more && (max < 0 || (int64_t)parts.n < max)) {
        rc = find_back(r, s, end, &by->u.s, &more, &at);
        if (rc || !more)
            break;
        rc = add_part(r, &parts, s->p + at + by->u.s.n, end - at - by->u.s.n);
        end = at;
    }
    while (rc == 0 && !back && (max < 0 || (int64_t)parts.n < max) && (at = find(s, from, &by->u.s)) < s->n) {
        rc = add_part(r, &parts, s->p + from, at - from);
        from = at + by->u.s.n;
    }
    if (rc == 0)
        rc = add_part(r, &parts, s->p + from, end - from);
    return finish_parts(r, &parts, rc, back, out);
}

METHOD(m_split)
{
    return split(r, self, call, false, out);
}

METHOD(m_rsplit)
{
    return split(r, self, call, true, out);
}

METHOD(m_splitlines)
{
    struct parts parts = {0};
    str s = self->u.s;
    int rc = 0;
    if (call->n)
        return err(ERR_UNSUPPORTED, "chat template, line %d: splitlines with arguments", call->line);
    while (rc == 0 && s.n) {
        const char *nl = memchr(s.p, '\n', s.n);
        size_t n = nl ? (size_t)(nl - s.p) : s.n;
        rc = add_part(r, &parts, s.p, n && nl && s.p[n - 1] == '\r' ? n - 1 : n);
        n += nl != NULL;
        s.p += n;
        s.n -= n;
    }
    return finish_parts(r, &parts, rc, false, out);
}

/* startswith and endswith; the argument may be a tuple. */
static int edge(struct template_render *r, const val *self, const struct template_call *call, bool end, val *out)
{
    const val *arg = call->n ? &call->v[0] : NULL;
    size_t n = arg && arg->kind == VAL_LIST ? arg->u.list->n : 1;
    bool yes = false;
    for (size_t i = 0; i < n && !yes; i++) {
        const val *v = arg && arg->kind == VAL_LIST ? &arg->u.list->v[i] : arg;
        if (!v || v->kind != VAL_STR)
            return err(ERR_FORMAT, "chat template, line %d: %s where a string should be", call->line,
                       v ? template_val_kind_name(v) : "nothing");
        size_t len = v->u.s.n;
        int rc = template_val_spend(r, len);
        if (rc)
            return rc;
        yes = len <= self->u.s.n && memcmp(self->u.s.p + (end ? self->u.s.n - len : 0), v->u.s.p, len) == 0;
    }
    *out = template_val_bool(yes);
    return 0;
}

METHOD(m_startswith)
{
    return edge(r, self, call, false, out);
}

METHOD(m_endswith)
{
    return edge(r, self, call, true, out);
}

/* removeprefix and removesuffix */
static int cut(const val *self, const struct template_call *call, bool end, val *out)
{
    str s = self->u.s, part = {"", 0};
    int rc = need_str(call, 0, &part);
    if (rc)
        return rc;
    if (part.n <= s.n && memcmp(s.p + (end ? s.n - part.n : 0), part.p, part.n) == 0) {
        s.p += end ? 0 : part.n;
        s.n -= part.n;
    }
    *out = template_val_str(s.p, s.n);
    return 0;
}

METHOD(m_removeprefix)
{
    (void)r;
    return cut(self, call, false, out);
}

METHOD(m_removesuffix)
{
    (void)r;
    return cut(self, call, true, out);
}

METHOD(m_replace)
{
    const str *s = &self->u.s;
    str old = {"", 0}, new = old;
    int64_t max = -1;
    struct template_buf buf = {.max_bytes = TEMPLATE_MAX_OUT};
    size_t from = 0, at;
    int rc = need_str(call, 0, &old);
    if (rc == 0)
        rc = need_str(call, 1, &new);
    if (rc == 0)
        rc = template_lib_int(call, 2, "count", &max);
    if (rc == 0 && old.n == 0)
        rc = err(ERR_UNSUPPORTED, "chat template, line %d: replace of an empty text", call->line);
    for (int64_t n = 0; rc == 0 && (max < 0 || n < max) && (at = find(s, from, &old)) < s->n; n++) {
        rc = template_mem_add(&buf, s->p + from, at - from);
        if (rc == 0)
            rc = template_mem_add(&buf, new.p, new.n);
        from = at + old.n;
    }
    if (rc == 0)
        rc = template_mem_add(&buf, s->p + from, s->n - from);
    return template_val_take(r, &buf, rc, out);
}

static int by_filter(struct template_render *r, const char *name, const val *self, const struct template_call *call,
                     val *out)
{
    const str filter = {name, strlen(name)};
    return template_lib_filter(r, &filter, self, call, out);
}

METHOD(m_upper)
{
    return by_filter(r, "upper", self, call, out);
}

METHOD(m_lower)
{
    return by_filter(r, "lower", self, call, out);
}

METHOD(m_capitalize)
{
    return by_filter(r, "capitalize", self, call, out);
}

METHOD(m_title)
{
    return by_filter(r, "title", self, call, out);
}

/* sep.join(list) */
METHOD(m_join)
{
    const struct template_list *list;
    struct template_buf buf = {.max_bytes = TEMPLATE_MAX_OUT};
    if (call->n != 1)
        return err(ERR_FORMAT, "chat template, line %d: join needs one list", call->line);
    int rc = template_val_items(r, call->line, &call->v[0], &list);
    for (size_t i = 0; rc == 0 && i < list->n; i++) {
        if (i)
            rc = template_mem_add(&buf, self->u.s.p, self->u.s.n);
        if (rc == 0 && list->v[i].kind != VAL_STR)
            rc = err(ERR_FORMAT, "chat template, line %d: join of %s", call->line, template_val_kind_name(&list->v[i]));
        if (rc == 0)
            rc = template_mem_add(&buf, list->v[i].u.s.p, list->v[i].u.s.n);
    }
    return template_val_take(r, &buf, rc, out);
}

static int position(struct template_render *r, const val *self, const struct template_call *call, bool back, val *out)
{
    str part = {"", 0};
    size_t at = 0;
    bool found = false;
    int rc = need_str(call, 0, &part);
    if (rc == 0 && call->n > 1)
        rc = err(ERR_UNSUPPORTED, "chat template, line %d: find with a range", call->line);
    if (rc == 0)
        rc = template_val_spend(r, self->u.s.n);
    if (rc == 0 && back)
        rc = find_back(r, &self->u.s, self->u.s.n, &part, &found, &at);
    if (rc)
        return rc;
    if (!back) {
        const char *p = memmem(self->u.s.p, self->u.s.n, part.p, part.n);
        found = p != NULL;
        at = p ? (size_t)(p - self->u.s.p) : 0;
    }
    const str before = {self->u.s.p, at};
    *out = template_val_int(found ? (int64_t)template_val_chars(&before) : -1);
    return 0;
}

METHOD(m_find)
{
    return position(r, self, call, false, out);
}

METHOD(m_rfind)
{
    return position(r, self, call, true, out);
}

METHOD(m_count)
{
    str part = {"", 0};
    int64_t n = 0;
    int rc = need_str(call, 0, &part);
    if (rc == 0)
        rc = template_val_spend(r, self->u.s.n);
    if (rc == 0 && part.n == 0)
        rc = err(ERR_UNSUPPORTED, "chat template, line %d: count of an empty text", call->line);
    for (size_t at = 0; rc == 0 && (at = find(&self->u.s, at, &part)) < self->u.s.n; at += part.n)
        n++;
    *out = template_val_int(n);
    return rc;
}

/* str.format with plain fields: {}, {0}, {name}. */
METHOD(m_format)
{
    const str *s = &self->u.s;
    struct template_buf buf = {.max_bytes = TEMPLATE_MAX_OUT};
    int next = 0, rc = 0;
    for (size_t at = 0; rc == 0 && at < s->n; at++) {
        char c = s->p[at];
        if ((c != '{' && c != '}') || (at + 1 < s->n && s->p[at + 1] == c)) {
            at += c == '{' || c == '}';
            rc = template_mem_add(&buf, &c, 1);
            continue;
        }
        const char *close = c == '{' ? memchr(s->p + at, '}', s->n - at) : NULL;
        char name[64] = "";
        size_t len = close ? (size_t)(close - s->p) - at - 1 : sizeof name;
        if (len >= sizeof name || memchr(s->p + at, ':', len + 1) || memchr(s->p + at, '!', len + 1))
            rc = err(ERR_UNSUPPORTED, "chat template, line %d: this form of format()", call->line);
        else {
            memcpy(name, s->p + at + 1, len);
            bool is_number = len == 1 && *name >= '0' && *name <= '9';
            const val *v = template_lib_arg(call, len == 0 ? next++ : is_number ? *name - '0' : -1, name);
            rc = v ? template_val_write(r, &buf, v, false)
                   : err(ERR_FORMAT, "chat template, line %d: format() lacks '%s'", call->line, name);
        }
        at += len + 1;
    }
    return template_val_take(r, &buf, rc, out);
}

METHOD(m_isdigit)
{
    bool yes = self->u.s.n > 0;
    (void)call;
    for (size_t i = 0; i < self->u.s.n && yes; i++)
        yes = self->u.s.p[i] >= '0' && self->u.s.p[i] <= '9';
    *out = template_val_bool(yes);
    return template_val_spend(r, self->u.s.n);
}

/* ---- dicts ---- */

METHOD(m_get)
{
    (void)r;
    const val *found = call->n && call->v[0].kind == VAL_STR
                           ? template_val_get(self->u.dict, call->v[0].u.s.p, call->v[0].u.s.n)
                           : NULL;
    const val *def = template_lib_arg(call, 1, "default");
    *out = found ? *found : def ? *def : (val){.kind = VAL_NONE};
    return 0;
}

METHOD(m_items)
{
    return by_filter(r, "items", self, call, out);
}

static int column(struct template_render *r, const val *self, bool keys, val *out)
{
    int rc = template_val_list(r, self->u.dict->n, out);
    for (size_t i = 0; rc == 0 && i < self->u.dict->n; i++)
        out->u.list->v[i] = keys ? self->u.dict->pair[i].key : self->u.dict->pair[i].val;
    return rc;
}

METHOD(m_keys)
{
    (void)call;
    return column(r, self, true, out);
}

METHOD(m_values)
{
    (void)call;
    return column(r, self, false, out);
}

static const struct {
    enum template_val_kind of;
    const char *name;
    int (*run)(struct template_render *, const val *, const struct template_call *, val *);
} methods[] = {
    {VAL_STR, "strip", m_strip},
    {VAL_STR, "lstrip", m_lstrip},
    {VAL_STR, "rstrip", m_rstrip},
    {VAL_STR, "split", m_split},
    {VAL_STR, "rsplit", m_rsplit},
    {VAL_STR, "splitlines", m_splitlines},
    {VAL_STR, "startswith", m_startswith},
    {VAL_STR, "endswith", m_endswith},
    {VAL_STR, "removeprefix", m_removeprefix},
    {VAL_STR, "removesuffix", m_removesuffix},
    {VAL_STR, "replace", m_replace},
    {VAL_STR, "upper", m_upper},
    {VAL_STR, "lower", m_lower},
    {VAL_STR, "capitalize", m_capitalize},
    {VAL_STR, "title", m_title},
    {VAL_STR, "join", m_join},
    {VAL_STR, "find", m_find},
    {VAL_STR, "rfind", m_rfind},
    {VAL_STR, "count", m_count},
    {VAL_STR, "format", m_format},
    {VAL_STR, "isdigit", m_isdigit},
    {VAL_DICT, "get", m_get},
    {VAL_DICT, "items", m_items},
    {VAL_DICT, "keys", m_keys},
    {VAL_DICT, "values", m_values},
};

int template_method_call(struct template_render *r, const val *self, const str *name, const struct template_call *call,
                         bool *found, val *out)
{
    *found = false;
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (methods[i].of == self->kind && template_val_is(name, methods[i].name)) {
            int rc = template_val_spend(r, self->kind == VAL_STR ? self->u.s.n : self->u.dict->n);
            *found = true;
            return rc ? rc : methods[i].run(r, self, call, out);
        }
    return 0;
}

/* ---- functions ---- */

enum func { FUNC_RAISE, FUNC_STRFTIME, FUNC_NAMESPACE, FUNC_RANGE, FUNC_DICT };

static const char *const funcs[] = {"raise_exception", "strftime_now", "namespace", "range", "dict"};

int template_method_func(const str *name)
{
    for (size_t i = 0; i < sizeof funcs / sizeof *funcs; i++)
        if (template_val_is(name, funcs[i]))
            return (int)i;
    return -1;
}

static int raise_exception(struct template_render *r, const struct template_call *call)
{
    str s = {"", 0};
    int rc = call->n ? template_val_text(r, &call->v[0], &s) : 0;
    return rc ? rc
              : err(ERR_ARG, "the chat template refuses this conversation: %.*s", (int)(s.n < 500 ? s.n : 500), s.p);
}

static int strftime_now(struct template_render *r, const struct template_call *call, val *out)
{
    char format[128], text[512] = "";
    str s = {"", 0};
    struct tm tm;
    time_t now = (time_t)r->args->now_s;
    int rc = need_str(call, 0, &s);
    if (rc)
        return rc;
    if (s.n >= sizeof format || memchr(s.p, 0, s.n) || !gmtime_r(&now, &tm))
        return err(ERR_FORMAT, "chat template, line %d: this time cannot be written", call->line);
    memcpy(format, s.p, s.n);
    format[s.n] = 0;
    size_t n = strftime(text, sizeof text, format, &tm);
    return template_val_copy(r, text, n, out);
}

static int make_dict(struct template_render *r, const struct template_call *call, enum template_val_kind kind, val *out)
{
    int rc = 0;
    struct template_dict *dict = template_mem_get(&r->mem, sizeof *dict, &rc);
    if (!dict)
        return rc;
    *dict = (struct template_dict){0};
    if (call->n > 1 || (call->n == 1 && call->v[0].kind != VAL_DICT))
        return err(ERR_FORMAT, "chat template, line %d: namespace() and dict() take one mapping", call->line);
    for (size_t i = 0; rc == 0 && call->n && i < call->v[0].u.dict->n; i++)
        rc = template_val_put(r, dict, &call->v[0].u.dict->pair[i].key, &call->v[0].u.dict->pair[i].val);
    for (int i = 0; rc == 0 && i < call->n_named; i++) {
        val key = template_val_str(call->name[i].p, call->name[i].n);
        rc = template_val_put(r, dict, &key, &call->named[i]);
    }
    *out = (val){.kind = kind, .u.dict = dict};
    return rc;
}

static int range(struct template_render *r, const struct template_call *call, val *out)
{
    int64_t a[3] = {0, 0, 1};
    if (call->n < 1 || call->n > 3)
        return err(ERR_FORMAT, "chat template, line %d: range() takes 1 to 3 numbers", call->line);
    for (int i = 0; i < call->n; i++) {
        if (call->v[i].kind != VAL_INT || call->v[i].u.i > 1000000 || call->v[i].u.i < -1000000)
            return err(ERR_LIMIT, "chat template, line %d: range() of %s, or beyond a million", call->line,
                       template_val_kind_name(&call->v[i]));
        a[call->n == 1 ? 1 : i] = call->v[i].u.i;
    }
    if (a[2] == 0)
        return err(ERR_FORMAT, "chat template, line %d: range() with step 0", call->line);
    int64_t span = a[2] > 0 ? a[1] - a[0] : a[0] - a[1], step = a[2] > 0 ? a[2] : -a[2];
    int64_t n = span > 0 ? (span + step - 1) / step : 0;
    int rc = template_val_list(r, (size_t)n, out);
    for (int64_t i = 0; rc == 0 && i < n; i++)
        out->u.list->v[i] = template_val_int(a[0] + i * a[2]);
    return rc;
}

int template_method_global(struct template_render *r, int func, const struct template_call *call, val *out)
{
    switch ((enum func)func) {
    case FUNC_RAISE:
        return raise_exception(r, call);
    case FUNC_STRFTIME:
        return strftime_now(r, call, out);
    case FUNC_NAMESPACE:
        return make_dict(r, call, VAL_SPACE, out);
    case FUNC_RANGE:
        return range(r, call, out);
    default:
        return make_dict(r, call, VAL_DICT, out);
    }
}
