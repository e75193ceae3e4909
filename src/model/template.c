/* The template's public calls, and the walk through its tree that writes a prompt. */
#include "src/model/template_in.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/tok_in.h"

typedef struct template_node node; /* lint: the tree's type stands in every line here */
typedef struct template_val val;   /* lint: the value's type stands in every line here */
typedef struct template_str str;   /* lint: as above */

/* Keeps the 2 KiB of a call's arguments out of the frames of other nodes: evaluation nests TEMPLATE_MAX_CALLS deep. */
#define NOINLINE __attribute__((noinline))

static int eval(struct template_render *r, const node *n, val *out);

/* What a list of statements ended with. */
enum jump { JUMP_NONE, JUMP_BREAK, JUMP_CONTINUE };
static int run(struct template_render *r, const node *n, enum jump *jump);

/* ---- names ---- */

static int set_name(struct template_render *r, const str *name, const val *v)
{
    val key = template_val_str(name->p, name->n);
    return template_val_put(r, &r->scope->vars, &key, v);
}

static int push_scope(struct template_render *r, struct template_scope *up)
{
    int rc = 0;
    struct template_scope *s = template_mem_get(&r->mem, sizeof *s, &rc);
    if (!s)
        return rc;
    *s = (struct template_scope){.up = up};
    r->scope = s;
    return 0;
}

static int get_name(struct template_render *r, const str *name, val *out)
{
    for (const struct template_scope *s = r->scope; s; s = s->up) {
        const val *v = template_val_get(&s->vars, name->p, name->n);
        int rc = template_val_spend(r, s->vars.n);
        if (rc)
            return rc;
        if (v) {
            *out = *v;
            return 0;
        }
    }
    int func = template_method_func(name);
    *out = func >= 0 ? (val){.kind = VAL_FUNC, .u.i = func} : template_val_undef(*name);
    return 0;
}

static int assign(struct template_render *r, const node *target, const val *v)
{
    if (target->kind == NODE_NAME)
        return set_name(r, &target->s, v);
    if (target->kind == NODE_LIST) {
        const struct template_list *list;
        size_t i = 0;
        int rc = template_val_items(r, target->line, v, &list);
        for (const node *t = target->kid[0]; rc == 0 && t; t = t->next, i++)
            rc = i < list->n ? assign(r, t, &list->v[i])
                             : err(ERR_FORMAT, "chat template, line %d: too few values for the names", t->line);
        if (rc == 0 && i < list->n)
            rc = err(ERR_FORMAT, "chat template, line %d: more values than names", target->line);
        return rc;
    }
    val space;
    int rc = eval(r, target->kid[0], &space);
    if (rc)
        return rc;
    if (space.kind != VAL_SPACE)
        return err(ERR_FORMAT, "chat template, line %d: an attribute of %s is set; only a namespace has any",
                   target->line, template_val_kind_name(&space));
    val key = template_val_str(target->s.p, target->s.n);
    return template_val_put(r, space.u.dict, &key, v);
}

/* ---- operators ---- */

static int misfit(const node *n, const val *a, const val *b)
{
    if (a->kind == VAL_UNDEF || b->kind == VAL_UNDEF) {
        const str *s = a->kind == VAL_UNDEF ? &a->u.s : &b->u.s;
        return err(ERR_FORMAT, "chat template, line %d: '%.*s' is undefined", n->line, (int)(s->n < 40 ? s->n : 40),
                   s->p);
    }
    return err(ERR_FORMAT, "chat template, line %d: no such operation on %s and %s", n->line, template_val_kind_name(a),
               template_val_kind_name(b));
}

static int overflow(const node *n)
{
    return err(ERR_LIMIT, "chat template, line %d: a number is too large", n->line);
}

static int power(const node *n, int64_t base, int64_t exp, int64_t *out)
{
    *out = 1;
    for (; exp > 0; exp--) {
        if (__builtin_mul_overflow(*out, base, out))
            return overflow(n);
        if (*out == 0 || (*out == 1 && base == 1))
            return 0;
        if (base == -1)
            exp = exp % 2 ? 1 : 2;
    }
    return 0;
}

static int int_math(const node *n, int64_t a, int64_t b, val *out)
{
    int64_t i = 0;
    bool bad = false;
    if ((n->op == OP_DIV || n->op == OP_FLOOR || n->op == OP_MOD) && b == 0)
        return err(ERR_FORMAT, "chat template, line %d: division by zero", n->line);
    switch (n->op) {
    case OP_ADD:
        bad = __builtin_add_overflow(a, b, &i);
        break;
    case OP_SUB:
        bad = __builtin_sub_overflow(a, b, &i);
        break;
    case OP_MUL:
        bad = __builtin_mul_overflow(a, b, &i);
        break;
    case OP_DIV:
        *out = (val){.kind = VAL_FLOAT, .u.f = (double)a / (double)b};
        return 0;
    case OP_FLOOR:
    case OP_MOD:
        bad = a == INT64_MIN && b == -1;
        if (bad)
            break;
        i = a % b; /* Python's: the sign of b */
        if (i && (i < 0) != (b < 0))
            i += b;
        i = n->op == OP_MOD ? i : (a - i) / b;
        break;
    default:
        if (b < 0) {
            *out = (val){.kind = VAL_FLOAT, .u.f = pow((double)a, (double)b)};
            return 0;
        }
        bad = power(n, a, b, &i) != 0;
    }
    *out = template_val_int(i);
    return bad ? overflow(n) : 0;
}

static int float_math(const node *n, double a, double b, val *out)
{
    double f;
    if ((n->op == OP_DIV || n->op == OP_FLOOR || n->op == OP_MOD) && b == 0)
        return err(ERR_FORMAT, "chat template, line %d: division by zero", n->line);
    f = n->op == OP_ADD     ? a + b
        : n->op == OP_SUB   ? a - b
        : n->op == OP_MUL   ? a * b
        : n->op == OP_DIV   ? a / b
        : n->op == OP_FLOOR ? floor(a / b)
        : n->op == OP_MOD   ? a - b * floor(a / b)
                            : pow(a, b);
    *out = (val){.kind = VAL_FLOAT, .u.f = f};
    return 0;
}

static int join2(struct template_render *r, const str *a, const str *b, val *out)
{
    int rc = template_val_spend(r, a->n + b->n);
    if (rc)
        return rc;
    char *p = template_mem_get(&r->mem, a->n + b->n + 1, &rc);
    if (!p)
        return rc;
    if (a->n)
        memcpy(p, a->p, a->n);
    if (b->n)
        memcpy(p + a->n, b->p, b->n);
    *out = template_val_str(p, a->n + b->n);
    return 0;
}

/* "x" * 3 */
static int repeat(struct template_render *r, const node *n, const str *s, int64_t times, val *out)
{
    if (times < 0 || s->n == 0)
        times = 0;
    if (times && (uint64_t)times > TEMPLATE_MAX_OUT / s->n)
        return err(ERR_LIMIT, "chat template, line %d: a text %" PRId64 " times", n->line, times);
    int rc = template_val_spend(r, s->n * (size_t)times);
    char *p = rc == 0 ? template_mem_get(&r->mem, s->n * (size_t)times + 1, &rc) : NULL;
    if (!p)
        return rc;
    for (int64_t i = 0; i < times; i++)
        memcpy(p + (size_t)i * s->n, s->p, s->n);
    *out = template_val_str(p, s->n * (size_t)times);
    return 0;
}

static int join_lists(struct template_render *r, const val *a, const val *b, val *out)
{
    size_t n = a->u.list->n;
    int rc = template_val_list(r, n + b->u.list->n, out);
    if (rc)
        return rc;
    if (n)
        memcpy(out->u.list->v, a->u.list->v, n * sizeof *a);
    if (b->u.list->n)
        memcpy(out->u.list->v + n, b->u.list->v, b->u.list->n * sizeof *b);
    out->is_tuple = a->is_tuple;
    return 0;
}

static bool is_number(const val *v)
{
    return v->kind == VAL_INT || v->kind == VAL_BOOL || v->kind == VAL_FLOAT;
}

static int eval_binary(struct template_render *r, const node *n, val *out)
{
    val a, b;
    str x, y;
    int rc = eval(r, n->kid[0], &a);
    if (rc == 0)
        rc = eval(r, n->kid[1], &b);
    if (rc)
        return rc;
    if (n->op == OP_CAT) {
        rc = template_val_text(r, &a, &x);
        if (rc == 0)
            rc = template_val_text(r, &b, &y);
        return rc ? rc : join2(r, &x, &y, out);
    }
    if (is_number(&a) && is_number(&b)) {
        if (a.kind != VAL_FLOAT && b.kind != VAL_FLOAT)
            return int_math(n, a.u.i, b.u.i, out);
        return float_math(n, a.kind == VAL_FLOAT ? a.u.f : (double)a.u.i, b.kind == VAL_FLOAT ? b.u.f : (double)b.u.i,
                          out);
    }
    if (n->op == OP_ADD && a.kind == VAL_STR && b.kind == VAL_STR)
        return join2(r, &a.u.s, &b.u.s, out);
    if (n->op == OP_ADD && a.kind == VAL_LIST && b.kind == VAL_LIST)
        return join_lists(r, &a, &b, out);
    if (n->op == OP_MUL && a.kind == VAL_STR && b.kind == VAL_INT)
        return repeat(r, n, &a.u.s, b.u.i, out);
    if (n->op == OP_MUL && a.kind == VAL_INT && b.kind == VAL_STR)
        return repeat(r, n, &b.u.s, a.u.i, out);
    return misfit(n, &a, &b);
}

static int compare(struct template_render *r, const node *n, const val *a, const val *b, bool *yes)
{
    int rc;
    switch (n->op) {
    case OP_EQ:
    case OP_NE:
        rc = template_val_equal(r, a, b, yes);
        *yes ^= n->op == OP_NE;
        return rc;
    case OP_IN:
    case OP_NOT_IN:
        rc = template_val_in(r, n->line, a, b, yes);
        *yes ^= n->op == OP_NOT_IN;
        return rc;
    default:
        rc = n->op == OP_LT || n->op == OP_GE ? template_val_less(r, n->line, a, b, yes)
                                              : template_val_less(r, n->line, b, a, yes);
        *yes ^= n->op == OP_LE || n->op == OP_GE;
        return rc;
    }
}

static int eval_compare(struct template_render *r, const node *n, val *out)
{
    val a, b;
    bool yes = true;
    int rc = eval(r, n->kid[0], &a);
    for (const node *c = n->kid[1]; c && yes && rc == 0; c = c->next) {
        rc = eval(r, c->kid[0], &b);
        if (rc == 0)
            rc = compare(r, c, &a, &b, &yes);
        a = b;
    }
    *out = template_val_bool(yes);
    return rc;
}

/* ---- parts of values ---- */

/* Characters from to to of a text. */
static val chars_between(const str *s, int64_t from, int64_t to)
{
    size_t at = 0, start = 0;
    int64_t i = 0;
    for (; i < to && at < s->n; i++) {
        if (i == from)
            start = at;
        at += template_val_char(s->p + at, s->n - at);
    }
    return from < i ? template_val_str(s->p + start, at - start) : template_val_str("", 0);
}

static int eval_item(struct template_render *r, const node *n, val *out)
{
    val of, key;
    int rc = eval(r, n->kid[0], &of);
    if (rc == 0)
        rc = eval(r, n->kid[1], &key);
    if (rc)
        return rc;
    *out = template_val_undef((str){"an item", 7});
    if (key.kind == VAL_STR)
        return template_lib_attr(&of, &key.u.s, out);
    if (of.kind == VAL_UNDEF)
        return template_lib_attr(&of, &(str){"item", 4}, out);
    if (key.kind != VAL_INT || (of.kind != VAL_LIST && of.kind != VAL_STR))
        return 0;
    int64_t len = (int64_t)(of.kind == VAL_STR ? template_val_chars(&of.u.s) : of.u.list->n);
    int64_t i = key.u.i < 0 ? key.u.i + len : key.u.i;
    if (i >= 0 && i < len)
        *out = of.kind == VAL_STR ? chars_between(&of.u.s, i, i + 1) : of.u.list->v[i];
    return template_val_spend(r, of.kind == VAL_STR ? of.u.s.n : 0);
}

/* A bound of a slice, as Python clips it. */
static int bound(struct template_render *r, const node *n, int64_t def, int64_t low, int64_t high, int64_t len,
                 int64_t *out)
{
    val v = {.kind = VAL_NONE};
    int rc = n ? eval(r, n, &v) : 0;
    *out = def;
    if (rc || v.kind == VAL_NONE)
        return rc;
    if (v.kind != VAL_INT)
        return err(ERR_FORMAT, "chat template, line %d: %s as a bound", n->line, template_val_kind_name(&v));
    int64_t i = v.u.i < 0 ? (v.u.i < -len ? low : v.u.i + len) : v.u.i;
    *out = i < low ? low : i > high ? high : i;
    return 0;
}

/* Every by-th item from from on, count of them; of a text, its characters. */
static int stride(struct template_render *r, const node *n, const val *of, int64_t from, int64_t by, int64_t count,
                  val *out)
{
    const struct template_list *list;
    struct template_buf buf = {.max_bytes = TEMPLATE_MAX_OUT};
    val picked;
    int rc = template_val_items(r, n->line, of, &list);
    if (rc == 0)
        rc = template_val_list(r, (size_t)count, &picked);
    for (int64_t i = 0; rc == 0 && i < count; i++) {
        picked.u.list->v[i] = list->v[from + i * by];
        if (of->kind == VAL_STR)
            rc = template_mem_add(&buf, list->v[from + i * by].u.s.p, list->v[from + i * by].u.s.n);
    }
    if (rc == 0 && of->kind == VAL_STR)
        rc = template_val_copy(r, buf.p ? buf.p : "", buf.n, out);
    else if (rc == 0) {
        *out = picked;
        out->is_tuple = of->is_tuple;
    }
    mem_free(buf.p);
    return rc;
}

static int eval_slice(struct template_render *r, const node *n, val *out)
{
    val of, step = template_val_int(1);
    int64_t from = 0, to = 0;
    int rc = eval(r, n->kid[0], &of);
    if (rc == 0 && n->kid[3])
        rc = eval(r, n->kid[3], &step);
    if (rc == 0 && (step.kind != VAL_INT || step.u.i == 0 || step.u.i > INT32_MAX || step.u.i < -INT32_MAX))
        rc = err(ERR_FORMAT, "chat template, line %d: the step of a slice", n->line);
    if (rc == 0 && of.kind != VAL_LIST && of.kind != VAL_STR)
        rc = err(ERR_FORMAT, "chat template, line %d: a slice of %s", n->line, template_val_kind_name(&of));
    if (rc)
        return rc;
    int64_t len = (int64_t)(of.kind == VAL_STR ? template_val_chars(&of.u.s) : of.u.list->n), by = step.u.i;
    rc = bound(r, n->kid[1], by > 0 ? 0 : len - 1, by > 0 ? 0 : -1, by > 0 ? len : len - 1, len, &from);
    if (rc == 0)
        rc = bound(r, n->kid[2], by > 0 ? len : -1, by > 0 ? 0 : -1, by > 0 ? len : len - 1, len, &to);
    if (rc == 0)
        rc = template_val_spend(r, of.kind == VAL_STR ? of.u.s.n : 0);
    if (rc)
        return rc;
    if (of.kind == VAL_STR && by == 1) {
        *out = chars_between(&of.u.s, from, to);
        return 0;
    }
    int64_t span = by > 0 ? to - from : from - to, width = by > 0 ? by : -by;
    return stride(r, n, &of, from, by, span > 0 ? (span + width - 1) / width : 0, out);
}

static int eval_list(struct template_render *r, const node *n, val *out)
{
    size_t count = 0, i = 0;
    for (const node *k = n->kid[0]; k; k = k->next)
        count++;
    int rc = template_val_list(r, count, out);
    for (const node *k = n->kid[0]; k && rc == 0; k = k->next)
        rc = eval(r, k, &out->u.list->v[i++]);
    out->is_tuple = n->op == 1;
    return rc;
}

static int eval_dict(struct template_render *r, const node *n, val *out)
{
    int rc = 0;
    struct template_dict *dict = template_mem_get(&r->mem, sizeof *dict, &rc);
    if (!dict)
        return rc;
    *dict = (struct template_dict){0};
    for (const node *k = n->kid[0]; k && rc == 0; k = k->next->next) {
        val key, v;
        rc = eval(r, k, &key);
        if (rc == 0)
            rc = eval(r, k->next, &v);
        if (rc == 0)
            rc = template_val_put(r, dict, &key, &v);
    }
    *out = (val){.kind = VAL_DICT, .u.dict = dict};
    return rc;
}

/* ---- calls ---- */

static int eval_args(struct template_render *r, const node *args, int line, struct template_call *call)
{
    int rc = 0;
    call->line = line;
    call->n = call->n_named = 0;
    for (const node *a = args; a && rc == 0; a = a->next) {
        val v;
        rc = eval(r, a->kid[0], &v);
        if (rc)
            break;
        if (a->s.n) {
            call->name[call->n_named] = a->s;
            call->named[call->n_named++] = v;
        } else {
            call->v[call->n++] = v;
        }
    }
    return rc;
}

/* Run statements with their text going into a value. */
static int capture(struct template_render *r, const node *body, enum jump *jump, val *out)
{
    struct template_buf buf = {.max_bytes = TEMPLATE_MAX_OUT}, *old = r->out;
    r->out = &buf;
    int rc = run(r, body, jump);
    r->out = old;
    if (rc == 0)
        rc = template_val_copy(r, buf.p ? buf.p : "", buf.n, out);
    mem_free(buf.p);
    return rc;
}

static const val *named(const struct template_call *call, const str *name)
{
    for (int i = 0; i < call->n_named; i++)
        if (call->name[i].n == name->n && memcmp(call->name[i].p, name->p, name->n) == 0)
            return &call->named[i];
    return NULL;
}

static int call_macro(struct template_render *r, const struct template_macro *macro, const struct template_call *call,
                      val *out)
{
    struct template_scope *old = r->scope;
    enum jump jump = JUMP_NONE;
    int i = 0, rc = push_scope(r, macro->scope);
    for (const node *param = macro->node->kid[0]; param && rc == 0; param = param->next, i++) {
        val v = template_val_undef(param->s);
        const val *given = i < call->n ? &call->v[i] : named(call, &param->s);
        if (given)
            v = *given;
        else if (param->kid[0])
            rc = eval(r, param->kid[0], &v);
        if (rc == 0)
            rc = set_name(r, &param->s, &v);
    }
    if (rc == 0 && i < call->n)
        rc = err(ERR_FORMAT, "chat template, line %d: %d arguments, the macro takes %d", call->line, call->n, i);
    if (rc == 0)
        rc = capture(r, macro->node->kid[1], &jump, out);
    r->scope = old;
    return rc;
}

NOINLINE static int eval_call(struct template_render *r, const node *n, val *out)
{
    struct template_call call;
    const node *what = n->kid[0];
    bool method = what->kind == NODE_ATTR, found = false;
    val f;
    int rc = eval(r, method ? what->kid[0] : what, &f);
    if (rc == 0)
        rc = eval_args(r, n->kid[1], n->line, &call);
    if (rc == 0 && method) {
        const val self = f;
        rc = template_method_call(r, &self, &what->s, &call, &found, out);
        if (found || rc)
            return rc;
        rc = template_lib_attr(&self, &what->s, &f);
        if (rc == 0 && f.kind == VAL_UNDEF)
            rc = err(ERR_UNSUPPORTED, "chat template, line %d: %s has no method '%.*s' here", n->line,
                     template_val_kind_name(&self), (int)(what->s.n < 40 ? what->s.n : 40), what->s.p);
    }
    if (rc)
        return rc;
    if (f.kind == VAL_MACRO)
        return call_macro(r, f.u.macro, &call, out);
    if (f.kind == VAL_FUNC)
        return template_method_global(r, (int)f.u.i, &call, out);
    if (f.kind == VAL_UNDEF)
        return err(ERR_UNSUPPORTED, "chat template, line %d: there is no function '%.*s'", n->line,
                   (int)(f.u.s.n < 40 ? f.u.s.n : 40), f.u.s.p);
    return err(ERR_FORMAT, "chat template, line %d: %s is called", n->line, template_val_kind_name(&f));
}

NOINLINE static int eval_filter(struct template_render *r, const node *n, val *out)
{
    struct template_call call;
    val in;
    int rc = eval(r, n->kid[0], &in);
    if (rc == 0)
        rc = eval_args(r, n->kid[1], n->line, &call);
    return rc ? rc : template_lib_filter(r, &n->s, &in, &call, out);
}

NOINLINE static int eval_test(struct template_render *r, const node *n, val *out)
{
    struct template_call call;
    val in;
    bool yes = false;
    int rc = eval(r, n->kid[0], &in);
    if (rc == 0)
        rc = eval_args(r, n->kid[1], n->line, &call);
    if (rc == 0)
        rc = template_lib_test(r, &n->s, &in, &call, &yes);
    *out = template_val_bool(yes != (n->op == 1));
    return rc;
}

static int eval_cond(struct template_render *r, const node *n, val *out)
{
    val cond;
    int rc = eval(r, n->kid[0], &cond);
    if (rc)
        return rc;
    const node *pick = template_val_true(&cond) ? n->kid[1] : n->kid[2];
    if (pick)
        return eval(r, pick, out);
    *out = template_val_undef((str){"an if without else", 18});
    return 0;
}

static int eval_sign(const node *n, val *v)
{
    if (!is_number(v))
        return misfit(n, v, v);
    if (v->kind == VAL_FLOAT)
        v->u.f = n->kind == NODE_NEG ? -v->u.f : v->u.f;
    else if (v->u.i == INT64_MIN)
        return overflow(n);
    else
        *v = template_val_int(n->kind == NODE_NEG ? -v->u.i : v->u.i);
    return 0;
}

static int eval_kind(struct template_render *r, const node *n, val *out)
{
    int rc;
    switch (n->kind) {
    case NODE_CONST:
        *out = n->val;
        return 0;
    case NODE_NAME:
        return get_name(r, &n->s, out);
    case NODE_CAPTURED:
        *out = *r->captured;
        return 0;
    case NODE_LIST:
        return eval_list(r, n, out);
    case NODE_DICT:
        return eval_dict(r, n, out);
    case NODE_ATTR: {
        val of;
        rc = eval(r, n->kid[0], &of);
        return rc ? rc : template_lib_attr(&of, &n->s, out);
    }
    case NODE_ITEM:
        return eval_item(r, n, out);
    case NODE_SLICE:
        return eval_slice(r, n, out);
    case NODE_CALL:
        return eval_call(r, n, out);
    case NODE_FILTER:
        return eval_filter(r, n, out);
    case NODE_TEST:
        return eval_test(r, n, out);
    case NODE_BINARY:
        return eval_binary(r, n, out);
    case NODE_CMP:
        return eval_compare(r, n, out);
    case NODE_AND:
    case NODE_OR: /* the value of one of the two, as in Python */
        rc = eval(r, n->kid[0], out);
        return rc || template_val_true(out) == (n->kind == NODE_OR) ? rc : eval(r, n->kid[1], out);
    case NODE_NOT:
        rc = eval(r, n->kid[0], out);
        *out = template_val_bool(rc == 0 && !template_val_true(out));
        return rc;
    case NODE_COND:
        return eval_cond(r, n, out);
    default: /* NODE_NEG, NODE_POS */
        rc = eval(r, n->kid[0], out);
        return rc ? rc : eval_sign(n, out);
    }
}

static int enter(struct template_render *r, const node *n)
{
    if (r->n_calls >= TEMPLATE_MAX_CALLS)
        return err(ERR_LIMIT, "chat template, line %d: calls nested deeper than %d", n->line, TEMPLATE_MAX_CALLS);
    r->n_calls++;
    return template_val_spend(r, 0);
}

static int eval(struct template_render *r, const node *n, val *out)
{
    *out = (val){.kind = VAL_NONE};
    int rc = enter(r, n);
    if (rc)
        return rc;
    rc = eval_kind(r, n, out);
    r->n_calls--;
    return rc;
}

/* ---- statements ---- */

static int run_if(struct template_render *r, const node *n, enum jump *jump)
{
    for (; n; n = n->kid[2]) {
        val cond = template_val_bool(true);
        int rc = n->kid[0] ? eval(r, n->kid[0], &cond) : 0;
        if (rc || template_val_true(&cond))
            return rc ? rc : run(r, n->kid[1], jump);
    }
    return 0;
}

/* The items that a loop's "if" lets through. */
static int choose(struct template_render *r, const node *n, const struct template_list **list,
                  struct template_scope *up)
{
    val chosen, cond;
    size_t count = 0;
    int rc = template_val_list(r, (*list)->n, &chosen);
    for (size_t i = 0; rc == 0 && i < (*list)->n; i++) {
        rc = push_scope(r, up);
        if (rc == 0)
            rc = assign(r, n->kid[0], &(*list)->v[i]);
        if (rc == 0)
            rc = eval(r, n->kid[4], &cond);
        if (rc == 0 && template_val_true(&cond))
            chosen.u.list->v[count++] = (*list)->v[i];
    }
    r->scope = up;
    if (rc)
        return rc;
    chosen.u.list->n = count;
    *list = chosen.u.list;
    return 0;
}

static int run_loop(struct template_render *r, const node *n, const struct template_list *list,
                    struct template_scope *up)
{
    static const str loop_name = {"loop", 4};
    enum jump jump = JUMP_NONE;
    int rc = 0;
    struct template_loop *loop = template_mem_get(&r->mem, sizeof *loop, &rc);
    if (!loop)
        return rc;
    *loop = (struct template_loop){.items = list};
    val loop_val = {.kind = VAL_LOOP, .u.loop = loop};
    for (size_t i = 0; rc == 0 && i < list->n && jump != JUMP_BREAK; i++) {
        loop->index = i;
        jump = JUMP_NONE;
        rc = push_scope(r, up); /* what an iteration sets is gone in the next */
        if (rc == 0)
            rc = assign(r, n->kid[0], &list->v[i]);
        if (rc == 0)
            rc = set_name(r, &loop_name, &loop_val);
        if (rc == 0)
            rc = run(r, n->kid[2], &jump);
    }
    r->scope = up;
    return rc;
}

static int run_for(struct template_render *r, const node *n, enum jump *jump)
{
    struct template_scope *up = r->scope;
    const struct template_list *list;
    val what;
    int rc = eval(r, n->kid[1], &what);
    if (rc == 0)
        rc = template_val_items(r, n->line, &what, &list);
    if (rc == 0 && n->kid[4])
        rc = choose(r, n, &list, up);
    if (rc)
        return rc;
    return list->n ? run_loop(r, n, list, up) : run(r, n->kid[3], jump);
}

static int run_capture(struct template_render *r, const node *n, enum jump *jump)
{
    val text;
    const val *old = r->captured;
    int rc = capture(r, n->kid[1], jump, &text);
    if (rc == 0 && n->kid[2]) {
        val raw = text;
        r->captured = &raw;
        rc = eval(r, n->kid[2], &text);
        r->captured = old;
    }
    if (rc)
        return rc;
    return n->kid[0] ? assign(r, n->kid[0], &text) : template_val_write(r, r->out, &text, false);
}

static int run_macro(struct template_render *r, const node *n)
{
    int rc = 0;
    struct template_macro *macro = template_mem_get(&r->mem, sizeof *macro, &rc);
    if (!macro)
        return rc;
    *macro = (struct template_macro){.node = n, .scope = r->scope};
    return set_name(r, &n->s, &(val){.kind = VAL_MACRO, .u.macro = macro});
}

static int run_one(struct template_render *r, const node *n, enum jump *jump)
{
    val v;
    int rc;
    switch (n->kind) {
    case NODE_DATA:
        return template_mem_add(r->out, n->s.p, n->s.n);
    case NODE_OUT:
        rc = eval(r, n->kid[0], &v);
        return rc ? rc : template_val_write(r, r->out, &v, false);
    case NODE_IF:
        return run_if(r, n, jump);
    case NODE_FOR:
        return run_for(r, n, jump);
    case NODE_SET:
        rc = eval(r, n->kid[1], &v);
        return rc ? rc : assign(r, n->kid[0], &v);
    case NODE_CAPTURE:
        return run_capture(r, n, jump);
    case NODE_MACRO:
        return run_macro(r, n);
    case NODE_GROUP:
        return run(r, n->kid[0], jump);
    default:
        *jump = n->kind == NODE_BREAK ? JUMP_BREAK : JUMP_CONTINUE;
        return 0;
    }
}

static int run(struct template_render *r, const node *n, enum jump *jump)
{
    int rc = 0;
    for (; n && rc == 0 && *jump == JUMP_NONE; n = n->next) {
        rc = enter(r, n);
        if (rc)
            break;
        rc = run_one(r, n, jump);
        r->n_calls--;
    }
    return rc;
}

/* ---- public ---- */

/* A copy with plain newlines, and without the last one, as Jinja reads a template. */
static char *copy_source(struct template_mem *mem, const char *text, size_t bytes, size_t *n, int *rc)
{
    char *p = template_mem_get(mem, bytes + 1, rc), *to = p;
    if (!p)
        return NULL;
    for (size_t i = 0; i < bytes; i++) {
        if (text[i] == '\r' && i + 1 < bytes && text[i + 1] == '\n')
            continue;
        *to++ = (char)(text[i] == '\r' ? '\n' : text[i]);
    }
    if (to > p && to[-1] == '\n')
        to--;
    *n = (size_t)(to - p);
    return p;
}

int template_make(const char *text, size_t bytes, struct template_code **out)
{
    struct template_token *tokens = NULL;
    int n_tokens = 0, rc = 0;
    size_t n = 0;
    if (bytes > TEMPLATE_MAX_SOURCE)
        return err(ERR_LIMIT, "chat template: %zu bytes, at most %zu", bytes, TEMPLATE_MAX_SOURCE);
    if (!tok_stream_is_utf8(text, bytes))
        return err(ERR_FORMAT, "chat template: it is not UTF-8");
    struct template_code *t = mem_zalloc(1, sizeof *t, MEM_OTHER);
    if (!t)
        return err(ERR_NOMEM, "chat template");
    t->mem.max_bytes = TEMPLATE_MAX_MEM;
    char *source = copy_source(&t->mem, text, bytes, &n, &rc);
    if (rc == 0)
        rc = template_lex_run(source, n, &tokens, &n_tokens);
    if (rc == 0)
        rc = template_parse_run(t, tokens);
    mem_free(tokens);
    if (rc)
        template_free(t);
    else
        *out = t;
    return rc;
}

void template_free(struct template_code *t)
{
    if (!t)
        return;
    template_mem_done(&t->mem);
    mem_free(t);
}

static int set_var(struct template_render *r, const char *name, val v)
{
    const str s = {name, strlen(name)};
    return set_name(r, &s, &v);
}

static val text_or_empty(const char *text)
{
    return template_val_str(text ? text : "", text ? strlen(text) : 0);
}

static int set_messages(struct template_render *r)
{
    const struct template_args *a = r->args;
    static const char *const keys[] = {"role", "content"};
    val list;
    int rc = template_val_list(r, (size_t)a->n_messages, &list);
    for (int i = 0; i < a->n_messages && rc == 0; i++) {
        const char *const texts[] = {a->messages[i].role, a->messages[i].content};
        struct template_dict *d = template_mem_get(&r->mem, sizeof *d, &rc);
        if (!d)
            return rc;
        *d = (struct template_dict){0};
        for (int k = 0; k < 2 && rc == 0; k++) {
            val key = text_or_empty(keys[k]), v = text_or_empty(texts[k]);
            rc = template_val_put(r, d, &key, &v);
        }
        list.u.list->v[i] = (val){.kind = VAL_DICT, .u.dict = d};
    }
    return rc ? rc : set_var(r, "messages", list);
}

static int set_vars(struct template_render *r)
{
    const struct template_args *a = r->args;
    const val none = {.kind = VAL_NONE};
    int rc = set_messages(r);
    if (rc == 0)
        rc = set_var(r, "add_generation_prompt", template_val_bool(a->add_generation_prompt));
    if (rc == 0)
        rc = set_var(r, "bos_token", text_or_empty(a->bos));
    if (rc == 0)
        rc = set_var(r, "eos_token", text_or_empty(a->eos));
    if (rc == 0)
        rc = set_var(r, "tools", none); /* there, but none: as Hugging Face calls templates */
    if (rc == 0)
        rc = set_var(r, "documents", none);
    for (int i = 0; i < a->n_vars && rc == 0; i++) {
        const struct template_var *var = &a->vars[i];
        val v = none;
        if (var->kind == TEMPLATE_BOOL || var->kind == TEMPLATE_INT)
            v = (val){.kind = var->kind == TEMPLATE_BOOL ? VAL_BOOL : VAL_INT, .u.i = var->integer};
        else if (var->kind == TEMPLATE_STRING)
            v = text_or_empty(var->string);
        rc = set_var(r, var->name, v);
    }
    return rc;
}

/* Statements and items are lists, so that only the depth of the text, which is bounded, nests calls here. */
static bool names(const struct template_node *n, const char *name)
{
    for (; n; n = n->next) {
        if (n->kind == NODE_NAME && template_val_is(&n->s, name))
            return true;
        for (size_t i = 0; i < sizeof n->kid / sizeof *n->kid; i++)
            if (names(n->kid[i], name))
                return true;
    }
    return false;
}

bool template_reads(const struct template_code *t, const char *name)
{
    return names(t->body, name);
}

int template_render(const struct template_code *t, const struct template_args *args, char **text, size_t *n_bytes)
{
    struct template_buf out = {.max_bytes = TEMPLATE_MAX_OUT};
    struct template_render r = {.args = args, .mem.max_bytes = TEMPLATE_MAX_MEM, .out = &out};
    enum jump jump = JUMP_NONE;
    int rc = push_scope(&r, NULL);
    if (rc == 0)
        rc = set_vars(&r);
    if (rc == 0)
        rc = run(&r, t->body, &jump);
    if (rc == 0)
        rc = template_mem_add(&out, "", 0); /* so that an empty prompt is a text, too */
    template_mem_done(&r.mem);
    if (rc) {
        mem_free(out.p);
        return rc;
    }
    *text = out.p;
    *n_bytes = out.n;
    return 0;
}
