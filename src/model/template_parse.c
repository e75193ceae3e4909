/* Tokens to a tree. Precedences and statement forms are Jinja's; what is not there is refused with its name and
 * line. A filter or test that ferry lacks is refused when it is reached: many stand in branches for tools, which never are. */
#include "src/model/template_in.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "src/base/err.h"

typedef struct template_node node; /* lint: the tree's type stands in every line here */

struct parser {
    struct template_mem *mem;
    const struct template_token *t; /* the next token */
    int depth;
    int n_loops; /* around here, for break and continue */
};

static int parse_expr(struct parser *p, node **out);
static int parse_or(struct parser *p, node **out);
static int parse_unary(struct parser *p, bool filters, node **out);
static int parse_body(struct parser *p, const char *const *ends, node **out);

static bool is_op(const struct parser *p, const char *op)
{
    return p->t->kind == TOKEN_OP && template_val_is(&p->t->s, op);
}

static bool is_name(const struct parser *p, const char *name)
{
    return p->t->kind == TOKEN_NAME && template_val_is(&p->t->s, name);
}

static bool take_op(struct parser *p, const char *op)
{
    bool yes = is_op(p, op);
    p->t += yes;
    return yes;
}

static bool take_name(struct parser *p, const char *name)
{
    bool yes = is_name(p, name);
    p->t += yes;
    return yes;
}

static int unexpected(const struct parser *p, const char *want)
{
    static const char *const kinds[] = {"text",     "{{",       "}}",       "{%", "%}",     "a name",
                                        "a string", "a number", "a number", "",   "the end"};
    const struct template_token *t = p->t;
    if (t->kind == TOKEN_OP || t->kind == TOKEN_NAME)
        return err(ERR_FORMAT, "chat template, line %d: '%.*s' where %s should be", t->line,
                   (int)(t->s.n < 40 ? t->s.n : 40), t->s.p, want);
    return err(ERR_FORMAT, "chat template, line %d: %s where %s should be", t->line, kinds[t->kind], want);
}

static int unsupported(const struct parser *p, const char *what, const struct template_str *name)
{
    return err(ERR_UNSUPPORTED, "chat template, line %d: the %s '%.*s' is not supported", p->t->line, what,
               (int)(name->n < 40 ? name->n : 40), name->p);
}

static int need_op(struct parser *p, const char *op)
{
    char want[8] = "'";
    strcat(strcat(want, op), "'");
    return take_op(p, op) ? 0 : unexpected(p, want);
}

static int make(struct parser *p, enum template_node_kind kind, node **out)
{
    int rc = 0;
    node *n = template_mem_get(p->mem, sizeof *n, &rc);
    if (!n)
        return rc;
    memset(n, 0, sizeof *n);
    n->kind = kind;
    n->line = p->t->line;
    n->depth = 1;
    *out = n;
    return 0;
}

/* Hang a kid (a list of nodes too) under n. The tree's depth is what bounds the stack when it is walked. */
static int set_kid(node *n, int i, node *kid)
{
    n->kid[i] = kid;
    for (; kid; kid = kid->next)
        if (kid->depth >= n->depth)
            n->depth = kid->depth + 1;
    if (n->depth > TEMPLATE_MAX_DEPTH)
        return err(ERR_LIMIT, "chat template, line %d: nested deeper than %d", n->line, TEMPLATE_MAX_DEPTH);
    return 0;
}

static int make2(struct parser *p, enum template_node_kind kind, node *a, node *b, node **out)
{
    node *n = NULL;
    int rc = make(p, kind, &n);
    if (rc)
        return rc;
    n->line = a ? a->line : n->line; /* where it begins, not where it was understood */
    *out = n;
    rc = set_kid(n, 0, a);
    return rc ? rc : set_kid(n, 1, b);
}

static int enter(struct parser *p)
{
    if (++p->depth > TEMPLATE_MAX_DEPTH)
        return err(ERR_LIMIT, "chat template, line %d: nested deeper than %d", p->t->line, TEMPLATE_MAX_DEPTH);
    return 0;
}

/* ---- literals ---- */

/* Value of up to n digits in base; *used: how many were there. */
static uint32_t digits(const char *p, const char *end, int n, int base, int *used)
{
    uint32_t v = 0;
    for (*used = 0; *used < n && p < end; p++, ++*used) {
        int d = *p >= '0' && *p <= '9' ? *p - '0' : (*p | 32) >= 'a' && (*p | 32) <= 'f' ? (*p | 32) - 'a' + 10 : 99;
        if (d >= base)
            break;
        v = v * (uint32_t)base + (uint32_t)d;
    }
    return v;
}

/* One escape at p, behind its backslash; writes up to 4 bytes to *out. */
static const char *escape(const char *p, const char *end, char **out)
{
    static const char from[] = "ntrabfv\\'\"", to[] = "\n\t\r\a\b\f\v\\'\"";
    const char *simple = memchr(from, *p, sizeof from - 1);
    int used = 0;
    uint32_t c = 0;
    if (simple) {
        *(*out)++ = to[simple - from];
        return p + 1;
    }
    if (*p == '\n')
        return p + 1;
    if (*p == 'x' || *p == 'u' || *p == 'U') {
        int want = *p == 'x' ? 2 : *p == 'u' ? 4 : 8;
        c = digits(p + 1, end, want, 16, &used);
        if (used == want && utf8proc_codepoint_valid((utf8proc_int32_t)c)) {
            *out += utf8proc_encode_char((utf8proc_int32_t)c, (utf8proc_uint8_t *)*out);
            return p + 1 + used;
        }
    } else if (*p >= '0' && *p <= '7') {
        c = digits(p, end, 3, 8, &used);
        *out += utf8proc_encode_char((utf8proc_int32_t)c, (utf8proc_uint8_t *)*out);
        return p + used;
    }
    *(*out)++ = '\\'; /* no escape: it stays as it is */
    *(*out)++ = *p;
    return p + 1;
}

static int parse_string(struct parser *p, node **out)
{
    size_t n = 0;
    for (int i = 0; p->t[i].kind == TOKEN_STRING; i++) /* neighbours join */
        n += p->t[i].s.n;
    int rc = make(p, NODE_CONST, out);
    char *text = rc == 0 ? template_mem_get(p->mem, n + 4, &rc) : NULL;
    if (!text)
        return rc;
    char *to = text;
    for (; p->t->kind == TOKEN_STRING; p->t++) {
        const char *s = p->t->s.p, *end = s + p->t->s.n;
        while (s < end) {
            if (*s == '\\' && s + 1 < end)
                s = escape(s + 1, end, &to);
            else
                *to++ = *s++;
        }
    }
    (*out)->val = template_val_str(text, (size_t)(to - text));
    return 0;
}

static int parse_number(struct parser *p, node **out)
{
    char text[64];
    size_t n = 0;
    for (size_t i = 0; i < p->t->s.n && n < sizeof text - 1; i++)
        if (p->t->s.p[i] != '_')
            text[n++] = p->t->s.p[i];
    text[n] = 0;
    int rc = make(p, NODE_CONST, out);
    if (rc)
        return rc;
    errno = 0;
    if (p->t->kind == TOKEN_FLOAT)
        (*out)->val = (struct template_val){.kind = VAL_FLOAT, .u.f = strtod(text, NULL)};
    else
        (*out)->val = template_val_int(strtoll(text, NULL, 10));
    if (n == sizeof text - 1 || (p->t->kind == TOKEN_INT && errno))
        return err(ERR_LIMIT, "chat template, line %d: the number %s... is too large", p->t->line, text);
    p->t++;
    return 0;
}

/* ---- expressions ---- */

/* Items up to a closing bracket, a comma between two; pairs: "key: value", both into one list. */
static int parse_items(struct parser *p, const char *close, bool pairs, node **list)
{
    node **tail = list;
    int rc = 0;
    while (rc == 0 && !take_op(p, close)) {
        rc = parse_expr(p, tail);
        if (rc == 0 && pairs) {
            tail = &(*tail)->next;
            rc = need_op(p, ":");
            if (rc == 0)
                rc = parse_expr(p, tail);
        }
        if (rc)
            break;
        tail = &(*tail)->next;
        if (!is_op(p, close))
            rc = need_op(p, ",");
    }
    return rc;
}

static int parse_brackets(struct parser *p, enum template_node_kind kind, const char *close, node **out)
{
    node *items = NULL;
    int rc = make(p, kind, out);
    p->t++;
    if (rc == 0)
        rc = parse_items(p, close, kind == NODE_DICT, &items);
    return rc ? rc : set_kid(*out, 0, items);
}

/* "(expr)" or "(a, b)". */
static int parse_round(struct parser *p, node **out)
{
    node *tuple, *first = NULL;
    int rc = make(p, NODE_LIST, &tuple);
    p->t++;
    if (rc == 0 && !is_op(p, ")"))
        rc = parse_expr(p, &first);
    if (rc)
        return rc;
    tuple->op = 1;
    if (first && !is_op(p, ",")) {
        *out = first;
        return need_op(p, ")");
    }
    if (first && take_op(p, ","))
        rc = parse_items(p, ")", false, &first->next);
    else
        rc = need_op(p, ")");
    *out = tuple;
    return rc ? rc : set_kid(tuple, 0, first);
}

static int parse_name(struct parser *p, node **out)
{
    static const struct {
        const char *text;
        enum template_val_kind kind;
        int i;
    } consts[] = {{"true", VAL_BOOL, 1},  {"True", VAL_BOOL, 1}, {"false", VAL_BOOL, 0},
                  {"False", VAL_BOOL, 0}, {"none", VAL_NONE, 0}, {"None", VAL_NONE, 0}};
    int rc = make(p, NODE_NAME, out);
    if (rc)
        return rc;
    (*out)->s = p->t->s;
    for (size_t i = 0; i < sizeof consts / sizeof *consts; i++)
        if (is_name(p, consts[i].text)) {
            (*out)->kind = NODE_CONST;
            (*out)->val = (struct template_val){.kind = consts[i].kind, .u.i = consts[i].i};
        }
    p->t++;
    return 0;
}

static int parse_primary(struct parser *p, node **out)
{
    switch (p->t->kind) {
    case TOKEN_NAME:
        return parse_name(p, out);
    case TOKEN_STRING:
        return parse_string(p, out);
    case TOKEN_INT:
    case TOKEN_FLOAT:
        return parse_number(p, out);
    default:
        break;
    }
    if (is_op(p, "("))
        return parse_round(p, out);
    if (is_op(p, "["))
        return parse_brackets(p, NODE_LIST, "]", out);
    if (is_op(p, "{"))
        return parse_brackets(p, NODE_DICT, "}", out);
    return unexpected(p, "a value");
}

/* Arguments, the opening bracket taken. */
static int parse_args(struct parser *p, node **list)
{
    node **tail = list;
    int rc = 0, n = 0;
    while (rc == 0 && !take_op(p, ")")) {
        if (is_op(p, "*") || is_op(p, "**"))
            return unsupported(p, "argument form", &p->t->s);
        if (++n > TEMPLATE_MAX_ARGS)
            return err(ERR_LIMIT, "chat template, line %d: over %d arguments", p->t->line, TEMPLATE_MAX_ARGS);
        rc = make(p, NODE_ARG, tail);
        if (rc)
            break;
        if (p->t->kind == TOKEN_NAME && p->t[1].kind == TOKEN_OP && template_val_is(&p->t[1].s, "=")) {
            (*tail)->s = p->t->s;
            p->t += 2;
        }
        node *value;
        rc = parse_expr(p, &value);
        if (rc == 0)
            rc = set_kid(*tail, 0, value);
        tail = &(*tail)->next;
        if (rc == 0 && !is_op(p, ")"))
            rc = need_op(p, ",");
    }
    return rc;
}

/* What stands in [ ], that bracket taken. */
static int parse_subscript(struct parser *p, node *of, node **out)
{
    node *part[3] = {NULL};
    bool slice = false;
    int rc = 0, i = 0;
    for (;; i++) {
        if (!is_op(p, ":") && !is_op(p, "]"))
            rc = parse_expr(p, &part[i]);
        if (rc || i == 2 || !take_op(p, ":"))
            break;
        slice = true;
    }
    if (rc == 0)
        rc = need_op(p, "]");
    if (rc == 0 && !slice && !part[0])
        rc = unexpected(p, "an index");
    if (rc == 0)
        rc = make2(p, slice ? NODE_SLICE : NODE_ITEM, of, part[0], out);
    for (i = 1; slice && i < 3 && rc == 0; i++)
        rc = set_kid(*out, i + 1, part[i]);
    return rc;
}

static int parse_call(struct parser *p, node *of, node **out)
{
    node *args = NULL;
    int rc = parse_args(p, &args);
    return rc ? rc : make2(p, NODE_CALL, of, args, out);
}

static int parse_attr(struct parser *p, node *of, node **out)
{
    int rc = make2(p, NODE_ATTR, of, NULL, out);
    if (rc)
        return rc;
    if (p->t->kind == TOKEN_INT) {
        node *index;
        rc = parse_number(p, &index);
        (*out)->kind = NODE_ITEM;
        return rc ? rc : set_kid(*out, 1, index);
    }
    if (p->t->kind != TOKEN_NAME)
        return unexpected(p, "a name");
    (*out)->s = p->t++->s;
    return 0;
}

static int parse_postfix(struct parser *p, node **out)
{
    int rc = 0;
    while (rc == 0) {
        node *of = *out;
        if (take_op(p, "."))
            rc = parse_attr(p, of, out);
        else if (take_op(p, "["))
            rc = parse_subscript(p, of, out);
        else if (take_op(p, "("))
            rc = parse_call(p, of, out);
        else
            break;
    }
    return rc;
}

/* A filter, the | taken. */
static int parse_filter(struct parser *p, node **out)
{
    node *of = *out, *args = NULL;
    if (p->t->kind != TOKEN_NAME)
        return unexpected(p, "a filter");
    struct template_str name = p->t++->s;
    int rc = take_op(p, "(") ? parse_args(p, &args) : 0;
    if (rc == 0)
        rc = make2(p, NODE_FILTER, of, args, out);
    if (rc == 0)
        (*out)->s = name;
    return rc;
}

/* Does a test take the next token as its argument, without brackets? */
static bool is_bare_arg(const struct parser *p)
{
    if (p->t->kind == TOKEN_NAME)
        return !is_name(p, "else") && !is_name(p, "or") && !is_name(p, "and") && !is_name(p, "is") &&
               !is_name(p, "if") && !is_name(p, "not") && !is_name(p, "in");
    return p->t->kind == TOKEN_STRING || p->t->kind == TOKEN_INT || p->t->kind == TOKEN_FLOAT || is_op(p, "[") ||
           is_op(p, "{");
}

/* A test, the "is" taken. */
static int parse_test(struct parser *p, node **out)
{
    node *of = *out, *args = NULL;
    bool negated = take_name(p, "not");
    int rc = 0;
    if (p->t->kind != TOKEN_NAME)
        return unexpected(p, "a test");
    struct template_str name = p->t++->s;
    if (take_op(p, "("))
        rc = parse_args(p, &args);
    else if (is_bare_arg(p)) {
        node *value;
        rc = make(p, NODE_ARG, &args);
        if (rc == 0)
            rc = parse_primary(p, &value);
        if (rc == 0)
            rc = parse_postfix(p, &value);
        if (rc == 0)
            rc = set_kid(args, 0, value);
    }
    if (rc == 0)
        rc = make2(p, NODE_TEST, of, args, out);
    if (rc == 0) {
        (*out)->s = name;
        (*out)->op = negated;
    }
    return rc;
}

static int parse_filters(struct parser *p, node **out)
{
    int rc = 0;
    while (rc == 0) {
        if (take_op(p, "|"))
            rc = parse_filter(p, out);
        else if (take_name(p, "is"))
            rc = parse_test(p, out);
        else if (take_op(p, "("))
            rc = parse_call(p, *out, out);
        else
            break;
    }
    return rc;
}

static int parse_unary(struct parser *p, bool filters, node **out)
{
    int rc = enter(p);
    if (rc)
        return rc;
    bool neg = is_op(p, "-");
    if (neg || is_op(p, "+")) {
        node *of;
        rc = make(p, neg ? NODE_NEG : NODE_POS, out);
        p->t++;
        if (rc == 0)
            rc = parse_unary(p, false, &of);
        if (rc == 0)
            rc = set_kid(*out, 0, of);
    } else {
        rc = parse_primary(p, out);
    }
    if (rc == 0)
        rc = parse_postfix(p, out);
    if (rc == 0 && filters)
        rc = parse_filters(p, out);
    p->depth--;
    return rc;
}

static int binary(struct parser *p, int op, node **out, node *right)
{
    int rc = make2(p, NODE_BINARY, *out, right, out);
    if (rc == 0)
        (*out)->op = op;
    return rc;
}

static int parse_pow(struct parser *p, node **out)
{
    int rc = parse_unary(p, true, out);
    while (rc == 0 && take_op(p, "**")) {
        node *right;
        rc = parse_unary(p, true, &right);
        if (rc == 0)
            rc = binary(p, OP_POW, out, right);
    }
    return rc;
}

/* Left-associative operators, loosest first; level 3 is **. */
static int parse_math(struct parser *p, int level, node **out)
{
    static const struct {
        const char *text;
        int op, level;
    } ops[] = {{"+", OP_ADD, 0}, {"-", OP_SUB, 0},    {"~", OP_CAT, 1}, {"*", OP_MUL, 2},
               {"/", OP_DIV, 2}, {"//", OP_FLOOR, 2}, {"%", OP_MOD, 2}};
    int rc = level == 2 ? parse_pow(p, out) : parse_math(p, level + 1, out);
    for (size_t i = 0; rc == 0 && i < sizeof ops / sizeof *ops;) {
        if (ops[i].level != level || !take_op(p, ops[i].text)) {
            i++;
            continue;
        }
        node *right;
        rc = level == 2 ? parse_pow(p, &right) : parse_math(p, level + 1, &right);
        if (rc == 0)
            rc = binary(p, ops[i].op, out, right);
        i = 0;
    }
    return rc;
}

static int take_compare(struct parser *p)
{
    static const struct {
        const char *text;
        int op;
    } ops[] = {{"==", OP_EQ}, {"!=", OP_NE}, {"<", OP_LT}, {"<=", OP_LE}, {">", OP_GT}, {">=", OP_GE}};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++)
        if (take_op(p, ops[i].text))
            return ops[i].op;
    if (take_name(p, "in"))
        return OP_IN;
    if (is_name(p, "not") && p->t[1].kind == TOKEN_NAME && template_val_is(&p->t[1].s, "in")) {
        p->t += 2;
        return OP_NOT_IN;
    }
    return 0;
}

static int parse_compare(struct parser *p, node **out)
{
    node *list = NULL, **tail = &list;
    int op, rc = parse_math(p, 0, out);
    while (rc == 0 && (op = take_compare(p)) != 0) {
        node *right;
        rc = parse_math(p, 0, &right);
        if (rc == 0)
            rc = make2(p, NODE_CMP, right, NULL, tail);
        if (rc == 0) {
            (*tail)->op = op;
            tail = &(*tail)->next;
        }
    }
    return rc == 0 && list ? make2(p, NODE_CMP, *out, list, out) : rc;
}

static int parse_not(struct parser *p, node **out)
{
    if (!is_name(p, "not"))
        return parse_compare(p, out);
    node *of;
    int rc = enter(p);
    if (rc == 0)
        rc = make(p, NODE_NOT, out);
    p->t++;
    if (rc == 0)
        rc = parse_not(p, &of);
    p->depth--;
    return rc ? rc : set_kid(*out, 0, of);
}

static int parse_and(struct parser *p, node **out)
{
    int rc = parse_not(p, out);
    while (rc == 0 && take_name(p, "and")) {
        node *right;
        rc = parse_not(p, &right);
        if (rc == 0)
            rc = make2(p, NODE_AND, *out, right, out);
    }
    return rc;
}

static int parse_or(struct parser *p, node **out)
{
    int rc = parse_and(p, out);
    while (rc == 0 && take_name(p, "or")) {
        node *right;
        rc = parse_and(p, &right);
        if (rc == 0)
            rc = make2(p, NODE_OR, *out, right, out);
    }
    return rc;
}

/* "a if cond else b", the loosest. */
static int parse_expr(struct parser *p, node **out)
{
    int rc = enter(p);
    if (rc == 0)
        rc = parse_or(p, out);
    while (rc == 0 && take_name(p, "if")) {
        node *cond, *other = NULL, *then = *out;
        rc = parse_or(p, &cond);
        if (rc == 0 && take_name(p, "else"))
            rc = parse_expr(p, &other);
        if (rc == 0)
            rc = make2(p, NODE_COND, cond, then, out);
        if (rc == 0)
            rc = set_kid(*out, 2, other);
    }
    p->depth--;
    return rc;
}

/* An expression that may be a tuple without brackets. */
static int parse_tuple(struct parser *p, node **out)
{
    int rc = parse_expr(p, out);
    if (rc || !is_op(p, ","))
        return rc;
    node *items = *out, **tail = &items->next;
    while (rc == 0 && take_op(p, ",")) {
        if (p->t->kind == TOKEN_BLOCK_END || p->t->kind == TOKEN_VAR_END)
            break;
        rc = parse_expr(p, tail);
        tail = rc ? tail : &(*tail)->next;
    }
    if (rc == 0)
        rc = make2(p, NODE_LIST, items, NULL, out);
    if (rc == 0)
        (*out)->op = 1;
    return rc;
}

/* ---- statements ---- */

static int block_end(struct parser *p)
{
    if (p->t->kind != TOKEN_BLOCK_END)
        return unexpected(p, "%}");
    p->t++;
    return 0;
}

/* What is assigned to: names, one of them maybe with an attribute. */
static int parse_target(struct parser *p, bool attr, node **out)
{
    node *list = NULL, **tail = &list;
    int n = 0, rc = 0;
    do {
        if (p->t->kind != TOKEN_NAME)
            return unexpected(p, "a name");
        rc = parse_name(p, tail);
        if (rc == 0 && (*tail)->kind != NODE_NAME)
            return err(ERR_FORMAT, "chat template, line %d: a constant is assigned to", (*tail)->line);
        if (rc == 0 && attr && take_op(p, ".")) {
            node *of = *tail;
            rc = parse_attr(p, of, tail);
        }
        tail = &(*tail)->next;
        n++;
    } while (rc == 0 && take_op(p, ","));
    *out = list;
    if (rc || n == 1)
        return rc;
    return make2(p, NODE_LIST, list, NULL, out);
}

static int parse_if(struct parser *p, node **out)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    node **branch = out;
    bool more = true;
    int rc = 0;
    while (rc == 0 && more) {
        node *cond = NULL, *body = NULL;
        bool is_else = take_name(p, "else");
        if (!is_else) {
            p->t++; /* "if" or "elif" */
            rc = parse_tuple(p, &cond);
        }
        if (rc == 0)
            rc = block_end(p);
        if (rc == 0)
            rc = parse_body(p, ends, &body);
        if (rc == 0)
            rc = make2(p, NODE_IF, cond, body, branch);
        if (rc)
            break;
        branch = &(*branch)->kid[2];
        more = !take_name(p, "endif");
        if (more && is_else)
            return unexpected(p, "'endif'");
    }
    /* branches hang from each other without counting as depth: rendering walks them in a loop */
    for (node *b = *out; rc == 0 && b; b = b->kid[2])
        if (b->depth > (*out)->depth)
            (*out)->depth = b->depth;
    return rc;
}

static int parse_for(struct parser *p, node **out)
{
    static const char *const ends[] = {"else", "endfor", NULL}, *const end[] = {"endfor", NULL};
    node *target, *what, *cond = NULL, *body = NULL, *other = NULL;
    int rc = make(p, NODE_FOR, out);
    p->t++;
    if (rc == 0)
        rc = parse_target(p, false, &target);
    if (rc == 0 && !take_name(p, "in"))
        rc = unexpected(p, "'in'");
    if (rc == 0)
        rc = parse_or(p, &what);
    if (rc == 0 && take_name(p, "if"))
        rc = parse_expr(p, &cond);
    if (rc == 0 && is_name(p, "recursive"))
        rc = unsupported(p, "loop form", &p->t->s);
    p->n_loops++;
    if (rc == 0 && (rc = block_end(p)) == 0)
        rc = parse_body(p, ends, &body);
    p->n_loops--;
    if (rc == 0 && take_name(p, "else") && (rc = block_end(p)) == 0)
        rc = parse_body(p, end, &other);
    if (rc)
        return rc;
    take_name(p, "endfor");
    node *const kids[] = {target, what, body, other, cond};
    for (int i = 0; i < 5 && rc == 0; i++)
        rc = set_kid(*out, i, kids[i]);
    return rc;
}

/* Filters round what a block has caught. */
static int parse_caught(struct parser *p, node **out)
{
    int rc = make(p, NODE_CAPTURED, out);
    return rc ? rc : parse_filters(p, out);
}

static int capture(struct parser *p, node *target, node *filters, const char *end, node **out)
{
    const char *const ends[] = {end, NULL};
    node *body = NULL;
    int rc = block_end(p);
    if (rc == 0)
        rc = parse_body(p, ends, &body);
    p->t += rc == 0;
    if (rc == 0)
        rc = make2(p, NODE_CAPTURE, target, body, out);
    return rc ? rc : set_kid(*out, 2, filters);
}

static int parse_set(struct parser *p, node **out)
{
    node *target, *value, *filters = NULL;
    p->t++;
    int rc = parse_target(p, true, &target);
    if (rc == 0 && !take_op(p, "=")) {
        if (is_op(p, "|"))
            rc = parse_caught(p, &filters);
        return rc ? rc : capture(p, target, filters, "endset", out);
    }
    if (rc == 0)
        rc = parse_tuple(p, &value);
    return rc ? rc : make2(p, NODE_SET, target, value, out);
}

static int parse_filter_block(struct parser *p, node **out)
{
    node *filters;
    p->t++;
    int rc = make(p, NODE_CAPTURED, &filters);
    if (rc == 0)
        rc = parse_filter(p, &filters);
    if (rc == 0)
        rc = parse_filters(p, &filters);
    return rc ? rc : capture(p, NULL, filters, "endfilter", out);
}

static int parse_macro(struct parser *p, node **out)
{
    static const char *const ends[] = {"endmacro", NULL};
    node *params = NULL, *body = NULL, **tail = &params;
    int n = 0, n_loops = p->n_loops, rc = make(p, NODE_MACRO, out);
    p->t++;
    if (rc == 0 && p->t->kind != TOKEN_NAME)
        rc = unexpected(p, "a name");
    if (rc)
        return rc;
    (*out)->s = p->t++->s;
    rc = need_op(p, "(");
    while (rc == 0 && !take_op(p, ")")) {
        if (p->t->kind != TOKEN_NAME || ++n > TEMPLATE_MAX_ARGS)
            return unexpected(p, "a parameter");
        rc = make(p, NODE_ARG, tail);
        if (rc)
            break;
        (*tail)->s = p->t++->s;
        node *value = NULL;
        if (take_op(p, "="))
            rc = parse_expr(p, &value);
        if (rc == 0)
            rc = set_kid(*tail, 0, value);
        tail = &(*tail)->next;
        if (rc == 0 && !is_op(p, ")"))
            rc = need_op(p, ",");
    }
    p->n_loops = 0;
    if (rc == 0 && (rc = block_end(p)) == 0)
        rc = parse_body(p, ends, &body);
    p->n_loops = n_loops;
    if (rc)
        return rc;
    p->t++;
    rc = set_kid(*out, 0, params);
    return rc ? rc : set_kid(*out, 1, body);
}

/* {% generation %} marks what a model was trained to say; it does nothing to the text. */
static int parse_generation(struct parser *p, node **out)
{
    static const char *const ends[] = {"endgeneration", NULL};
    node *body = NULL;
    p->t++;
    int rc = block_end(p);
    if (rc == 0)
        rc = parse_body(p, ends, &body);
    p->t += rc == 0;
    return rc ? rc : make2(p, NODE_GROUP, body, NULL, out);
}

static int parse_jump(struct parser *p, node **out)
{
    if (!p->n_loops)
        return err(ERR_FORMAT, "chat template, line %d: '%.*s' outside a loop", p->t->line, (int)p->t->s.n, p->t->s.p);
    int rc = make(p, is_name(p, "break") ? NODE_BREAK : NODE_CONTINUE, out);
    p->t++;
    return rc;
}

static int parse_statement(struct parser *p, node **out)
{
    static const struct {
        const char *name;
        int (*parse)(struct parser *, node **);
    } rows[] = {{"if", parse_if},
                {"for", parse_for},
                {"set", parse_set},
                {"macro", parse_macro},
                {"filter", parse_filter_block},
                {"break", parse_jump},
                {"continue", parse_jump},
                {"generation", parse_generation}};
    if (p->t->kind != TOKEN_NAME)
        return unexpected(p, "a statement");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (is_name(p, rows[i].name)) {
            int rc = rows[i].parse(p, out);
            return rc ? rc : block_end(p);
        }
    if (p->t->s.n > 3 && memcmp(p->t->s.p, "end", 3) == 0)
        return unexpected(p, "a statement");
    return unsupported(p, "statement", &p->t->s);
}

static int parse_output(struct parser *p, node **out)
{
    node *value;
    int rc = parse_tuple(p, &value);
    if (rc == 0 && p->t->kind != TOKEN_VAR_END)
        rc = unexpected(p, "}}");
    if (rc)
        return rc;
    p->t++;
    return make2(p, NODE_OUT, value, NULL, out);
}

/* Statements up to one of the ends (its tag opened, its name not taken), or to the end of the text if ends is NULL. */
static int parse_body(struct parser *p, const char *const *ends, node **out)
{
    node **tail = out;
    int rc = enter(p);
    while (rc == 0) {
        if (p->t->kind == TOKEN_EOF) {
            rc = ends ? err(ERR_FORMAT, "chat template, line %d: the end, where '%s' should be", p->t->line, ends[0])
                      : 0;
            break;
        }
        if (p->t->kind == TOKEN_DATA) {
            rc = make(p, NODE_DATA, tail);
            if (rc == 0)
                (*tail)->s = p->t++->s;
        } else if (p->t->kind == TOKEN_VAR) {
            p->t++;
            rc = parse_output(p, tail);
        } else {
            p->t++; /* {% */
            for (int i = 0; ends && ends[i]; i++)
                if (is_name(p, ends[i])) {
                    p->depth--;
                    return 0;
                }
            rc = parse_statement(p, tail);
        }
        if (rc == 0)
            tail = &(*tail)->next;
    }
    p->depth--;
    return rc;
}

int template_parse_run(struct template_code *code, const struct template_token *tokens)
{
    struct parser p = {.mem = &code->mem, .t = tokens};
    return parse_body(&p, NULL, &code->body);
}
