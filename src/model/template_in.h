/* What the files of the chat template share: syntax tree, values, memory; nobody else includes this. */
#ifndef FERRY_MODEL_TEMPLATE_IN_H
#define FERRY_MODEL_TEMPLATE_IN_H

#include "src/model/template.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bounds on hostile templates. Real ones stay two orders of magnitude below. */
#define TEMPLATE_MAX_SOURCE ((size_t)1 << 20)
#define TEMPLATE_MAX_DEPTH 200               /* of nesting in the text, and of the tree */
#define TEMPLATE_MAX_CALLS 1000              /* nested evaluations: depth of the tree times macros in macros */
#define TEMPLATE_MAX_MEM ((size_t)256 << 20) /* all values of one rendering */
#define TEMPLATE_MAX_OUT ((size_t)64 << 20)
#define TEMPLATE_MAX_STEPS 50000000
#define TEMPLATE_MAX_ARGS 32

struct template_str {
    const char *p;
    size_t n;
};

/* ---- memory (template_mem.c): blocks that are freed all at once ---- */
struct template_mem {
    struct template_block *head; /* own */
    char *at;
    size_t left, total, max_bytes;
};

/* Aligned to 16, not cleared; NULL with err() set: ERR_NOMEM, or ERR_LIMIT past max_bytes. *rc says which. */
void *template_mem_get(struct template_mem *mem, size_t bytes, int *rc);
void template_mem_done(struct template_mem *mem);

/* A growing text. */
struct template_buf {
    char *p; /* own: mem_free() */
    size_t n, cap, max_bytes;
};
int template_mem_add(struct template_buf *buf, const char *p, size_t n);

/* ---- tokens (template_lex.c) ---- */
enum template_token_kind {
    TOKEN_DATA,
    TOKEN_VAR,
    TOKEN_VAR_END,
    TOKEN_BLOCK,
    TOKEN_BLOCK_END,
    TOKEN_NAME,
    TOKEN_STRING,
    TOKEN_INT,
    TOKEN_FLOAT,
    TOKEN_OP,
    TOKEN_EOF
};
struct template_token {
    enum template_token_kind kind;
    int line;
    struct template_str s; /* text; of a string, without the quotes and still escaped */
};
/* *tokens is the caller's (mem_free()), its texts are views of source, which must stay. */
int template_lex_run(const char *source, size_t n, struct template_token **tokens, int *n_tokens);

/* ---- values ---- */
enum template_val_kind {
    VAL_UNDEF,
    VAL_NONE,
    VAL_BOOL,
    VAL_INT,
    VAL_FLOAT,
    VAL_STR,
    VAL_LIST,
    VAL_DICT,
    VAL_SPACE,
    VAL_LOOP,
    VAL_MACRO,
    VAL_FUNC
};

struct template_val {
    enum template_val_kind kind;
    bool is_tuple; /* LIST: prints with round brackets */
    union {
        int64_t i; /* BOOL, INT; FUNC: which */
        double f;
        struct template_str s; /* STR; UNDEF: the name that was looked for */
        struct template_list *list;
        struct template_dict *dict; /* DICT, SPACE (namespace) */
        struct template_loop *loop;
        const struct template_macro *macro;
    } u;
};

struct template_list {
    struct template_val *v; /* (n) */
    size_t n;
};

struct template_pair {
    struct template_val key, val;
};

struct template_dict {
    struct template_pair *pair; /* (n), in order of arrival */
    size_t n, cap;
};

struct template_loop {
    const struct template_list *items;
    size_t index;
};

/* ---- the tree (template_parse.c) ---- */
enum template_node_kind {
    /* statements */
    NODE_DATA,    /* s */
    NODE_OUT,     /* kid 0 */
    NODE_IF,      /* kid 0 condition (NULL: else), 1 body, 2 next branch */
    NODE_FOR,     /* kid 0 target, 1 what, 2 body, 3 else; cond in kid 4 */
    NODE_SET,     /* kid 0 target, 1 value */
    NODE_CAPTURE, /* kid 0 target or NULL (then it is written), 1 body, 2 filters round NODE_CAPTURED or NULL */
    NODE_MACRO,   /* s name, kid 0 parameters (NODE_ARG), 1 body */
    NODE_GROUP,   /* kid 0 body */
    NODE_BREAK,
    NODE_CONTINUE,
    /* expressions */
    NODE_CONST, /* val */
    NODE_NAME,  /* s */
    NODE_CAPTURED,
    NODE_LIST,   /* kid 0 items; op 1: a tuple */
    NODE_DICT,   /* kid 0 keys and values in turn */
    NODE_ATTR,   /* kid 0, s */
    NODE_ITEM,   /* kid 0, kid 1 */
    NODE_SLICE,  /* kid 0; 1 to 3: bounds and step or NULL */
    NODE_CALL,   /* kid 0; 1 arguments (NODE_ARG) */
    NODE_FILTER, /* kid 0; s; 1 arguments */
    NODE_TEST,   /* the same; op 1: negated */
    NODE_ARG,    /* s name or empty, kid 0 value */
    NODE_BINARY, /* op; kid 0, 1 */
    NODE_CMP,    /* kid 0; 1: list of NODE_CMP with op and kid 0 */
    NODE_AND,
    NODE_OR,
    NODE_NOT,
    NODE_NEG,
    NODE_POS,
    NODE_COND, /* kid 0 condition, 1 then, 2 else or NULL */
};

enum template_op {
    OP_ADD = 1,
    OP_SUB,
    OP_MUL,
    OP_DIV,
    OP_FLOOR,
    OP_MOD,
    OP_POW,
    OP_CAT,
    OP_EQ,
    OP_NE,
    OP_LT,
    OP_LE,
    OP_GT,
    OP_GE,
    OP_IN,
    OP_NOT_IN
};

struct template_node {
    enum template_node_kind kind;
    int op, line, depth;
    struct template_str s;
    struct template_val val;
    struct template_node *kid[5];
    struct template_node *next; /* in a list of statements, items or arguments */
};

struct template_code {
    struct template_mem mem;
    struct template_node *body;
};

int template_parse_run(struct template_code *code, const struct template_token *tokens);

/* ---- rendering ---- */
struct template_scope {
    struct template_scope *up;
    struct template_dict vars;
};

struct template_macro {
    const struct template_node *node;
    struct template_scope *scope; /* where it was defined */
};

struct template_render {
    const struct template_args *args;
    struct template_mem mem;
    struct template_buf *out; /* where text goes now */
    struct template_scope *scope;
    const struct template_val *captured;
    int64_t n_steps;
    int n_calls;
};

struct template_call {
    int line;
    int n, n_named;
    struct template_val v[TEMPLATE_MAX_ARGS];
    struct template_str name[TEMPLATE_MAX_ARGS]; /* (n_named) */
    struct template_val named[TEMPLATE_MAX_ARGS];
};

/* template_val.c. Those that return int give err() codes. */
struct template_val template_val_str(const char *p, size_t n);
struct template_val template_val_int(int64_t i);
struct template_val template_val_bool(bool b);
struct template_val template_val_undef(struct template_str name);
bool template_val_is(const struct template_str *s, const char *text);
bool template_val_true(const struct template_val *v);
size_t template_val_char(const char *p, size_t n);                 /* bytes of the character at p; 1 for a bad byte */
size_t template_val_chars(const struct template_str *s);           /* characters */
bool template_val_space(const char *p, size_t n, size_t *n_bytes); /* is the character at p white space? */
struct template_str template_val_strip(struct template_str s, const struct template_str *chars, bool left, bool right);
const char *template_val_kind_name(const struct template_val *v);
int template_val_spend(struct template_render *r, size_t n); /* n bytes or items of work */
int template_val_copy(struct template_render *r, const char *p, size_t n, struct template_val *out);
/* A finished text as a value, unless rc tells that it failed; buf is freed either way. Returns rc, or the copy's. */
int template_val_take(struct template_render *r, struct template_buf *buf, int rc, struct template_val *out);
int template_val_list(struct template_render *r, size_t n, struct template_val *out);
int template_val_put(struct template_render *r, struct template_dict *dict, const struct template_val *key,
                     const struct template_val *val);
const struct template_val *template_val_get(const struct template_dict *dict, const char *p, size_t n);
int template_val_equal(struct template_render *r, const struct template_val *a, const struct template_val *b,
                       bool *out);
int template_val_less(struct template_render *r, int line, const struct template_val *a, const struct template_val *b,
                      bool *out);
int template_val_in(struct template_render *r, int line, const struct template_val *a, const struct template_val *b,
                    bool *out);
int template_val_write(struct template_render *r, struct template_buf *buf, const struct template_val *v,
                       bool quoted); /* str(), repr() */
int template_val_json(struct template_render *r, struct template_buf *buf, const struct template_val *v, int indent,
                      bool sorted);
int template_val_text(struct template_render *r, const struct template_val *v, struct template_str *out); /* str() */
/* The elements of anything that can be walked: a list itself, keys, characters; undefined has none. */
int template_val_items(struct template_render *r, int line, const struct template_val *v,
                       const struct template_list **out);
int template_val_sort(struct template_render *r, int line, struct template_val *v, size_t n, size_t stride,
                      bool any_case);

/* template_lib.c */
int template_lib_filter(struct template_render *r, const struct template_str *name, const struct template_val *in,
                        const struct template_call *call, struct template_val *out);
int template_lib_test(struct template_render *r, const struct template_str *name, const struct template_val *in,
                      const struct template_call *call, bool *out);
int template_lib_attr(const struct template_val *v, const struct template_str *name, struct template_val *out);
const struct template_val *template_lib_arg(const struct template_call *call, int i, const char *name);
/* An integer argument; *out keeps its default where none is given. ERR_FORMAT for another kind. */
int template_lib_int(const struct template_call *call, int i, const char *name, int64_t *out);

/* template_method.c: methods of strings and dicts; *found false: no such method */
int template_method_call(struct template_render *r, const struct template_val *self, const struct template_str *name,
                         const struct template_call *call, bool *found, struct template_val *out);
int template_method_func(const struct template_str *name);
int template_method_global(struct template_render *r, int func, const struct template_call *call,
                           struct template_val *out);

#ifdef __cplusplus
}
#endif
#endif
