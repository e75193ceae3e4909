/* The public face of text and tokens: model/tok, and the chat template, which is parsed when it is first asked for. */
#include "src/ferry.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry_in.h"
#include "src/model/gguf.h"
#include "src/model/model.h"
#include "src/model/template.h"
#include "src/model/tok.h"

#include <limits.h>
#include <string.h>
#include <time.h>

struct ferry_stream {
    struct tok_stream stream;
};

static int need_vocabulary(const struct ferry_engine *e)
{
    return e->tok ? 0 : err(ERR_STATE, "%s was opened without its vocabulary (ids_only)", e->model->path);
}

/* On failure the list is freed. */
static int add_token(int32_t **list, int64_t *n, int32_t token)
{
    int32_t *p = mem_realloc(*list, ((size_t)*n + 1) * sizeof *p, MEM_OTHER);
    if (!p) {
        mem_free(*list);
        *list = NULL;
        return err(ERR_NOMEM, "%lld tokens", (long long)*n + 1);
    }
    p[(*n)++] = token;
    *list = p;
    return 0;
}

int ferry_tokenize(const struct ferry_engine *e, const char *text, size_t n_bytes, int flags, int32_t **out,
                   size_t *n_out)
{
    unsigned f = flags & FERRY_TOKENS_SPECIAL ? TOK_SPECIAL : 0;
    int64_t n = 0;
    int rc = need_vocabulary(e);
    if (rc == 0 && (flags & FERRY_TOKENS_BOS) && tok_add_bos(e->tok))
        f |= TOK_BOS;
    if (rc == 0)
        rc = tok_encode(e->tok, text, n_bytes, f, out, &n);
    if (rc == 0 && (flags & FERRY_TOKENS_EOS) && tok_add_eos(e->tok))
        rc = add_token(out, &n, tok_eos(e->tok));
    *n_out = rc == 0 ? (size_t)n : 0;
    return rc;
}

int ferry_token_text(const struct ferry_engine *e, int32_t token, const char **out, size_t *n_bytes)
{
    int n = 0;
    *n_bytes = 0;
    *out = "";
    int rc = need_vocabulary(e);
    if (rc == 0 && tok_type_of(e->tok, token) != TOK_TYPE_CONTROL)
        rc = tok_piece(e->tok, token, out, &n);
    if (rc == 0)
        *n_bytes = (size_t)n;
    return rc;
}

bool ferry_token_is_end(const struct ferry_engine *e, int32_t token)
{
    return e->tok && tok_is_eog(e->tok, token);
}

int ferry_stream_make(const struct ferry_engine *e, struct ferry_stream **out)
{
    *out = NULL;
    int rc = need_vocabulary(e);
    if (rc < 0)
        return rc;
    struct ferry_stream *s = mem_zalloc(1, sizeof *s, MEM_OTHER);
    rc = s ? tok_stream_init(&s->stream, e->tok, 0) : err(ERR_NOMEM, "a text stream");
    if (rc < 0) {
        mem_free(s);
        return rc;
    }
    *out = s;
    return 0;
}

int ferry_stream_push(struct ferry_stream *s, int32_t token, const char **out, size_t *n_bytes)
{
    int n = 0;
    int rc = tok_stream_push(&s->stream, token, out, &n);
    *n_bytes = rc == 0 ? (size_t)n : 0;
    return rc;
}

int ferry_stream_finish(struct ferry_stream *s, const char **out, size_t *n_bytes)
{
    int n = 0;
    tok_stream_finish(&s->stream, out, &n);
    *n_bytes = (size_t)n;
    return 0;
}

void ferry_stream_free(struct ferry_stream *s)
{
    if (!s)
        return;
    tok_stream_done(&s->stream);
    mem_free(s);
}

static int chat_template(const struct ferry_engine *engine, const struct template_code **out)
{
    struct ferry_engine *e = (struct ferry_engine *)engine; /* the parsed template is a cache, not state */
    if (!e->chat) {
        if (!gguf_find(e->model->gguf, "tokenizer.chat_template"))
            return err(ERR_UNSUPPORTED, "%s has no chat template; plain continuation works (ferry run --raw)",
                       e->model->path);
        struct gguf_str text;
        int rc = gguf_str(e->model->gguf, "tokenizer.chat_template", &text);
        if (rc == 0)
            rc = template_make(text.p, text.n_bytes, &e->chat);
        if (rc < 0)
            return rc;
    }
    *out = e->chat;
    return 0;
}

/* A token as the vocabulary spells it, as a string that the caller frees; "" for none. */
static char *token_name(const struct ferry_engine *e, int32_t token)
{
    const char *p = "";
    int n = 0;
    if (token >= 0 && tok_text(e->tok, token, &p, &n) < 0)
        return NULL;
    char *s = mem_alloc((size_t)n + 1, MEM_OTHER);
    if (s) {
        memcpy(s, p, (size_t)n);
        s[n] = '\0';
    }
    return s;
}

/* ---- an answer's parts ---- */

static bool has_token(const struct ferry_engine *e, const char *text)
{
    return e->tok && tok_find(e->tok, text, strlen(text)) != TOK_NONE;
}

/* Behind the first place of what in [at, end); NULL: nowhere. */
static const char *behind(const char *at, const char *end, const char *what)
{
    const char *found = memmem(at, (size_t)(end - at), what, strlen(what));
    return found ? found + strlen(what) : NULL;
}

static bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

/* [at, end) without the white space around it. */
static const char *trim(const char *at, const char *end, size_t *n)
{
    while (at < end && is_space(*at))
        at++;
    while (end > at && is_space(end[-1]))
        end--;
    *n = (size_t)(end - at);
    return at;
}

/* Where the last of an answer's channels that speaks to the reader begins to, and where its name does (end: it never came to that). Behind
 * the name may stand what it is written in: "final <|constrain|>json". */
static const char *final_channel(const char *at, const char *end, const char **name)
{
    static const char final[] = "<|channel|>final";
    const char *last = NULL, *said;

    *name = end;
    while ((at = behind(at, end, final)) && (said = behind(at, end, "<|message|>"))) {
        *name = at - strlen(final);
        last = said;
    }
    return last;
}

/* A single thought loses the names around it; what passes between several channels is left as it came. */
static void split_channels(const char *at, const char *end, struct ferry_reply *out)
{
    static const char begin[] = "<|channel|>analysis<|message|>", next[] = "<|end|><|start|>assistant";
    const char *until, *said = final_channel(at, end, &until);

    out->said = said ? said : end;
    out->n_said = (size_t)(end - out->said);
    if ((size_t)(until - at) >= strlen(begin) && !memcmp(at, begin, strlen(begin)))
        at += strlen(begin);
    if ((size_t)(until - at) >= strlen(next) && !memcmp(until - strlen(next), next, strlen(next)))
        until -= strlen(next);
    out->thought = trim(at, until, &out->n_thought);
}

/* Behind <think>, if the answer begins with it; NULL if it does not. */
static const char *thought_begin(bool begins_amid, const char *at, const char *end)
{
    static const char open[] = "<think>";
    size_t n;
    const char *first = trim(at, end, &n);

    if (n >= strlen(open) && !memcmp(first, open, strlen(open)))
        return first + strlen(open);
    return begins_amid ? at : NULL;
}

void ferry_reply_split(const struct ferry_engine *e, bool begins_amid, const char *text, size_t n_bytes,
                       struct ferry_reply *out)
{
    const char *end = text + n_bytes, *begin, *close;

    *out = (struct ferry_reply){.thought = text, .said = text, .n_said = n_bytes};
    if (has_token(e, "<|channel|>") && behind(text, end, "<|channel|>")) {
        split_channels(text, end, out);
    } else if (has_token(e, "</think>") && (begin = thought_begin(begins_amid, text, end))) {
        close = behind(begin, end, "</think>");
        out->thought = trim(begin, close ? close - strlen("</think>") : end, &out->n_thought);
        out->said = close ? close : end;
        while (out->said < end && is_space(*out->said))
            out->said++;
        out->n_said = (size_t)(end - out->said);
    }
}

bool ferry_reply_begins_amid(const struct ferry_engine *e, const char *prompt)
{
    static const char open[] = "<think>";
    size_t n;
    const char *first = trim(prompt, prompt + strlen(prompt), &n);

    return has_token(e, open) && n >= strlen(open) && !memcmp(first + n - strlen(open), open, strlen(open));
}

/* [at, at + n), but for the white space around it, ends with this. */
static bool ends_with(const char *at, size_t n, const char *what)
{
    size_t n_trimmed, n_what = strlen(what);
    const char *first = trim(at, at + n, &n_trimmed);

    return n_trimmed >= n_what && !memcmp(first + n_trimmed - n_what, what, n_what);
}

enum ferry_thought ferry_thought_of(const struct ferry_engine *e, const char *prompt)
{
    size_t n = strlen(prompt);

    if (has_token(e, "<|channel|>")) /* a prompt that is in a channel already names the final one */
        return ends_with(prompt, n, "<|message|>") ? FERRY_THOUGHT_NONE : FERRY_THOUGHT_AMID;
    if (!has_token(e, "</think>") || ends_with(prompt, n, "</think>"))
        return FERRY_THOUGHT_NONE;
    return ferry_reply_begins_amid(e, prompt) ? FERRY_THOUGHT_AMID : FERRY_THOUGHT_MAY;
}

/* ---- conversations ---- */

/* Of an answer in channels what it says to the reader: templates want that alone back, and refuse the rest. */
static const char *said(const struct ferry_engine *e, const struct ferry_message *m)
{
    const char *end = m->content + strlen(m->content);

    if (strcmp(m->role, "assistant") != 0 || !has_token(e, "<|channel|>") || !behind(m->content, end, "<|channel|>"))
        return m->content;
    const char *name, *last = final_channel(m->content, end, &name);
    return last ? last : "";
}

void ferry_chat_opts_init(struct ferry_chat_opts *opts)
{
    *opts = (struct ferry_chat_opts){.struct_bytes = sizeof *opts};
}

static int read_opts(const struct ferry_chat_opts *in, struct ferry_chat_opts *out)
{
    ferry_chat_opts_init(out);
    if (in && in->struct_bytes > sizeof *out)
        return err(ERR_ARG, "chat options of %zu bytes; this library knows %zu", in->struct_bytes, sizeof *out);
    if (in)
        memcpy(out, in, in->struct_bytes);
    return out->n_vars > INT_MAX ? err(ERR_LIMIT, "%zu variables of a chat template", out->n_vars) : 0;
}

static int check_vars(const struct template_code *code, const struct ferry_chat_opts *o)
{
    static const char *const own[] = {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools",
                                      "documents"};

    for (size_t i = 0; i < o->n_vars; i++) {
        const char *name = o->vars[i].name;
        for (size_t k = 0; k < sizeof own / sizeof *own; k++)
            if (!strcmp(name, own[k]))
                return err(ERR_ARG, "a chat template's %s is the conversation's own", name);
        if (!template_reads(code, name))
            return err(ERR_ARG, "the model's chat template reads no variable \"%.60s\"", name);
    }
    return 0;
}

int ferry_chat_check(const struct ferry_engine *e, const struct ferry_chat_opts *opts)
{
    const struct template_code *code = NULL;
    struct ferry_chat_opts o;
    int rc = read_opts(opts, &o);

    if (rc == 0)
        rc = chat_template(e, &code);
    return rc < 0 ? rc : check_vars(code, &o);
}

static struct template_var var_of(const struct ferry_var *v)
{
    static const enum template_kind kinds[] = {
        [FERRY_VAR_TEXT] = TEMPLATE_STRING, [FERRY_VAR_INT] = TEMPLATE_INT, [FERRY_VAR_BOOL] = TEMPLATE_BOOL};

    return (struct template_var){.name = v->name, .kind = kinds[v->kind], .integer = v->number, .string = v->text};
}

/* messages, o: checked. */
static int render(const struct ferry_engine *e, const struct template_code *code, const struct ferry_message *messages,
                  size_t n, const struct ferry_chat_opts *o, char **out)
{
    char *bos = token_name(e, tok_bos(e->tok)), *eos = token_name(e, tok_eos(e->tok));
    struct template_message *list = mem_zalloc(n, sizeof *list, MEM_OTHER);
    struct template_var *vars = mem_zalloc(o->n_vars, sizeof *vars, MEM_OTHER);
    size_t n_bytes;
    int rc = bos && eos && list && vars ? 0 : err(ERR_NOMEM, "a conversation of %zu messages", n);

    for (size_t i = 0; !rc && i < n; i++)
        list[i] = (struct template_message){messages[i].role, said(e, &messages[i])};
    for (size_t i = 0; !rc && i < o->n_vars; i++)
        vars[i] = var_of(&o->vars[i]);
    if (!rc)
        rc = template_render(code,
                             &(struct template_args){.messages = list,
                                                     .n_messages = (int)n,
                                                     .add_generation_prompt = !o->no_generation,
                                                     .bos = bos,
                                                     .eos = eos,
                                                     .vars = vars,
                                                     .n_vars = (int)o->n_vars,
                                                     .now_s = (int64_t)time(NULL)},
                             out, &n_bytes);
    mem_free(vars);
    mem_free(list);
    mem_free(eos);
    mem_free(bos);
    return rc;
}

int ferry_chat_prompt(const struct ferry_engine *e, const struct ferry_message *messages, size_t n,
                      const struct ferry_chat_opts *opts, char **out)
{
    const struct template_code *code = NULL;
    struct ferry_chat_opts o;

    *out = NULL;
    int rc = read_opts(opts, &o);
    if (rc == 0)
        rc = need_vocabulary(e);
    if (rc == 0)
        rc = chat_template(e, &code);
    if (rc == 0)
        rc = n > INT_MAX ? err(ERR_LIMIT, "%zu messages", n) : check_vars(code, &o);
    return rc < 0 ? rc : render(e, code, messages, n, &o, out);
}
