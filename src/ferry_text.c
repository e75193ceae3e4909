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

/* Of an answer in channels (gpt-oss) what the last of them says to the reader, "" if it never came to that. Templates want that alone
 * back, and refuse the rest. */
static const char *said(const struct ferry_engine *e, const struct ferry_message *m)
{
    static const char channel[] = "<|channel|>", final[] = "<|channel|>final<|message|>";
    const char *last = NULL;

    if (strcmp(m->role, "assistant") != 0 || tok_find(e->tok, channel, strlen(channel)) == TOK_NONE)
        return m->content;
    for (const char *at = m->content; (at = strstr(at, final));)
        last = at += strlen(final);
    return last ? last : strstr(m->content, channel) ? "" : m->content;
}

int ferry_chat_prompt(const struct ferry_engine *e, const struct ferry_message *messages, size_t n, bool add_generation,
                      char **out)
{
    *out = NULL;
    const struct template_code *code = NULL;
    int rc = need_vocabulary(e);
    if (rc == 0)
        rc = chat_template(e, &code);
    if (rc < 0)
        return rc;
    if (n > INT_MAX)
        return err(ERR_LIMIT, "%zu messages", n);
    char *bos = token_name(e, tok_bos(e->tok)), *eos = token_name(e, tok_eos(e->tok));
    struct template_message *list = mem_zalloc(n, sizeof *list, MEM_OTHER);
    if (!bos || !eos || !list) {
        rc = err(ERR_NOMEM, "a conversation of %zu messages", n);
    } else {
        for (size_t i = 0; i < n; i++)
            list[i] = (struct template_message){messages[i].role, said(e, &messages[i])};
        size_t n_bytes;
        rc = template_render(code,
                             &(struct template_args){.messages = list,
                                                     .n_messages = (int)n,
                                                     .add_generation_prompt = add_generation,
                                                     .bos = bos,
                                                     .eos = eos,
                                                     .now_s = (int64_t)time(NULL)},
                             out, &n_bytes);
    }
    mem_free(list);
    mem_free(eos);
    mem_free(bos);
    return rc;
}
