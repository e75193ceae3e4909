/* What a line of a batch's input asks: JSON first, then tokens. A field that is not known is an error of that line: an answer that
 * ignores half of what was asked would be wrong without anybody noticing. */
#include "src/cli/batch_line.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/json_room.h"
#include "src/cli/text.h"

#include <stddef.h>
#include <string.h>

/* ---- fields ---- */

enum field_kind {
    IS_SIZE,
    IS_REAL,
    IS_INT,
    IS_FLAG,
    IS_SEED,
    IS_STOP,
    IS_LOGPROBS,
    IS_TOP_LOGPROBS,
    IS_PASSED_OVER,
    IS_FALSE,
    IS_FLOAT_FORMAT,
    IS_VAR,
    IS_VARS,
    IS_GRAMMAR,
    IS_SCHEMA,
    IS_RESPONSE_FORMAT
};

struct field {
    const char *name;
    enum field_kind kind;
    size_t offset; /* in struct batch_line */
    double min, max;
};

#define AT(member) offsetof(struct batch_line, member)

/* Options of a request. What is passed over says nothing about the answer. */
static const struct field fields[] = {
    {"max_tokens", IS_SIZE, AT(max_tokens), 1, INT32_MAX},
    {"max_completion_tokens", IS_SIZE, AT(max_tokens), 1, INT32_MAX},
    {"n", IS_INT, AT(n), 1, BATCH_MAX_N},
    {"temperature", IS_REAL, AT(sample.temperature), 0, 100},
    {"top_p", IS_REAL, AT(sample.top_p), 0, 1},
    {"min_p", IS_REAL, AT(sample.min_p), 0, 1},
    {"top_k", IS_INT, AT(sample.top_k), 0, INT32_MAX},
    {"seed", IS_SEED, AT(sample.seed), 0, 0},
    {"repeat_penalty", IS_REAL, AT(sample.repeat_penalty), 0.01, 100},
    {"repetition_penalty", IS_REAL, AT(sample.repeat_penalty), 0.01, 100},
    {"presence_penalty", IS_REAL, AT(sample.presence_penalty), -100, 100},
    {"frequency_penalty", IS_REAL, AT(sample.frequency_penalty), -100, 100},
    {"penalty_window", IS_INT, AT(sample.penalty_window), -1, INT32_MAX},
    {"ignore_eos", IS_FLAG, AT(ignore_eos), 0, 0},
    {"stop", IS_STOP, 0, 0, 0},
    {"logprobs", IS_LOGPROBS, 0, 0, 100},
    {"top_logprobs", IS_TOP_LOGPROBS, 0, 0, 100},
    {"reasoning_effort", IS_VAR, 0, 0, 0},
    {"chat_template_kwargs", IS_VARS, 0, 0, 0},
    {"grammar", IS_GRAMMAR, 0, 0, 0},
    {"json_schema", IS_SCHEMA, 0, 0, 0},
    {"response_format", IS_RESPONSE_FORMAT, 0, 0, 0},
    {"model", IS_PASSED_OVER, 0, 0, 0},
    {"user", IS_PASSED_OVER, 0, 0, 0},
    {"metadata", IS_PASSED_OVER, 0, 0, 0},
    {"store", IS_PASSED_OVER, 0, 0, 0},
    {"stream", IS_FALSE, 0, 0, 0},
    {"echo", IS_FALSE, 0, 0, 0},
    {NULL, IS_FALSE, 0, 0, 0},
};

/* And of one that is embedded. */
static const struct field embed_fields[] = {
    {"encoding_format", IS_FLOAT_FORMAT, 0, 0, 0},
    {"model", IS_PASSED_OVER, 0, 0, 0},
    {"user", IS_PASSED_OVER, 0, 0, 0},
    {"metadata", IS_PASSED_OVER, 0, 0, 0},
    {NULL, IS_FALSE, 0, 0, 0},
};

static int read_stop(struct batch_line *line, const json_t *v)
{
    size_t n = json_is_array(v) ? json_array_size(v) : 1;

    if (n > sizeof line->stop / sizeof *line->stop)
        return err(ERR_FORMAT, "\"stop\": %zu texts; at most %zu", n, sizeof line->stop / sizeof *line->stop);
    for (size_t i = 0; i < n; i++) {
        const json_t *s = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_string(s) || !json_string_length(s) || strlen(json_string_value(s)) != json_string_length(s))
            return err(ERR_FORMAT, "\"stop\" has to be a text or a list of texts, none empty");
        line->stop[line->n_stop++] = json_string_value(s);
    }
    return 0;
}

static int bad_number(const struct field *f)
{
    return err(ERR_FORMAT, "\"%s\" has to be a%s number from %g to %g", f->name, f->kind == IS_REAL ? "" : " whole",
               f->min, f->max);
}

static int read_number(struct batch_line *line, const struct field *f, const json_t *v)
{
    void *at = (char *)line + f->offset;
    double x = json_number_value(v);

    if (!json_is_number(v) || !(x >= f->min && x <= f->max) || (f->kind != IS_REAL && !json_is_integer(v)))
        return bad_number(f);
    if (f->kind == IS_REAL)
        *(float *)at = (float)x;
    else if (f->kind == IS_SIZE)
        *(size_t *)at = (size_t)json_integer_value(v);
    else
        *(int32_t *)at = (int32_t)json_integer_value(v);
    return 0;
}

/* OpenAI's chat form says true and how many in top_logprobs; its completions form, and the short one, a number. */
static int read_logprobs(struct batch_line *line, const struct field *f, const json_t *v)
{
    if (f->kind == IS_LOGPROBS && json_is_boolean(v)) {
        if (json_is_true(v) && line->logprobs < 0)
            line->logprobs = 0;
        return 0;
    }
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > (json_int_t)f->max)
        return bad_number(f);
    line->logprobs = (int)json_integer_value(v);
    return 0;
}

static int read_var(struct batch_line *line, const char *name, const json_t *v)
{
    struct ferry_var var = {.name = name};

    if (json_is_string(v) && strlen(json_string_value(v)) == json_string_length(v)) {
        var.kind = FERRY_VAR_TEXT;
        var.text = json_string_value(v);
    } else if (json_is_boolean(v) || json_is_integer(v)) {
        var.kind = json_is_boolean(v) ? FERRY_VAR_BOOL : FERRY_VAR_INT;
        var.number = json_is_boolean(v) ? json_is_true(v) : json_integer_value(v);
    } else {
        return err(ERR_FORMAT, "\"%.60s\" of the chat template has to be a text, a whole number, true or false", name);
    }
    return vars_put(&line->vars, &var);
}

static int read_vars(struct batch_line *line, const struct field *f, const json_t *object)
{
    const char *name;
    json_t *v;

    if (!json_is_object(object))
        return err(ERR_FORMAT, "\"%s\" has to be an object", f->name);
    json_object_foreach((json_t *)object, name, v)
    {
        int rc = read_var(line, name, v);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- what the answer has to be ---- */

static int put_wish(struct batch_line *line, const struct grammars_wish *wish)
{
    if (line->has_wish)
        return err(ERR_FORMAT, "of \"grammar\", \"json_schema\" and \"response_format\" only one can be there");
    line->has_wish = true;
    line->wish = *wish;
    return 0;
}

static int read_grammar(struct batch_line *line, const json_t *v)
{
    if (!json_is_string(v))
        return err(ERR_FORMAT, "\"grammar\" has to be a text");
    return put_wish(line, &(struct grammars_wish){.is_wanted = true,
                                                  .kind = FERRY_GRAMMAR_GBNF,
                                                  .text = json_string_value(v),
                                                  .n_bytes = json_string_length(v)});
}

static int read_schema(struct batch_line *line, const json_t *v)
{
    size_t n = json_dumpb(v, NULL, 0, JSON_ENCODE_ANY | JSON_COMPACT), n_written = 0;

    if (line->schema)
        return put_wish(line, &line->wish); /* refused */
    line->schema = n ? mem_alloc(n + 1, MEM_OTHER) : NULL;
    if (line->schema)
        n_written = json_dumpb(v, line->schema, n, JSON_ENCODE_ANY | JSON_COMPACT);
    if (!n || n_written != n)
        return err(ERR_NOMEM, "a JSON schema of %zu bytes", n);
    line->schema[n] = '\0';
    return put_wish(line,
                    &(struct grammars_wish){
                        .is_wanted = true, .kind = FERRY_GRAMMAR_JSON_SCHEMA, .text = line->schema, .n_bytes = n});
}

/* As OpenAI's service takes it; what else stands there would not hold. */
static int read_response_format(struct batch_line *line, const json_t *v)
{
    const char *name;
    json_t *member;

    json_object_foreach((json_t *)v, name, member)
    {
        if (strcmp(name, "type") && strcmp(name, "json_schema") && !json_is_null(member))
            return err(ERR_FORMAT, "\"%.60s\" in \"response_format\" is not supported", name);
    }
    const char *type = json_string_value(json_object_get(v, "type"));
    const json_t *schema = json_object_get(json_object_get(v, "json_schema"), "schema");

    if (type && !strcmp(type, "text"))
        return put_wish(line, &(struct grammars_wish){.is_wanted = false});
    if (type && !strcmp(type, "json_object"))
        return put_wish(line,
                        &(struct grammars_wish){.is_wanted = true, .kind = FERRY_GRAMMAR_JSON_SCHEMA, .text = ""});
    if (!type || strcmp(type, "json_schema"))
        return err(ERR_FORMAT, "\"response_format\" has to have a \"type\": text, json_object or json_schema");
    return schema
               ? read_schema(line, schema)
               : err(ERR_FORMAT, "\"response_format\" of type json_schema has no \"json_schema\": {\"schema\": ...}");
}

static int read_field(struct batch_line *line, const struct field *f, const json_t *v)
{
    switch (f->kind) {
    case IS_SIZE:
    case IS_REAL:
    case IS_INT:
        return read_number(line, f, v);
    case IS_FLAG:
        if (!json_is_boolean(v))
            return err(ERR_FORMAT, "\"%s\" has to be true or false", f->name);
        line->ignore_eos = json_is_true(v);
        return 0;
    case IS_SEED:
        if (!json_is_integer(v) || json_integer_value(v) < 0)
            return err(ERR_FORMAT, "\"seed\" has to be a whole number, 0 or more");
        line->sample.seed = (uint64_t)json_integer_value(v);
        line->has_seed = true;
        return 0;
    case IS_STOP:
        return read_stop(line, v);
    case IS_LOGPROBS:
    case IS_TOP_LOGPROBS:
        return read_logprobs(line, f, v);
    case IS_FALSE:
        return json_is_true(v) ? err(ERR_FORMAT, "\"%s\": true is not supported", f->name) : 0;
    case IS_FLOAT_FORMAT:
        return json_is_string(v) && !strcmp(json_string_value(v), "float")
                   ? 0
                   : err(ERR_FORMAT, "\"%s\" has to be \"float\"; nothing else is supported", f->name);
    case IS_VAR:
        return read_var(line, f->name, v);
    case IS_VARS:
        return read_vars(line, f, v);
    case IS_GRAMMAR:
        return read_grammar(line, v);
    case IS_SCHEMA:
        return read_schema(line, v);
    case IS_RESPONSE_FORMAT:
        return read_response_format(line, v);
    case IS_PASSED_OVER:
        break;
    }
    return 0;
}

static bool is_among(const char *name, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(*names, name))
            return true;
    return false;
}

/* All members but those of names, which the form itself has. */
static int read_fields(const struct conf *conf, struct batch_line *line, const json_t *object, const char *const *names)
{
    const char *name;
    json_t *v;

    json_object_foreach((json_t *)object, name, v)
    {
        const struct field *f = conf->embed ? embed_fields : fields;
        if (is_among(name, names) || json_is_null(v))
            continue;
        while (f->name && strcmp(f->name, name))
            f++;
        if (!f->name)
            return err(ERR_FORMAT, "\"%.60s\" is not supported", name);
        int rc = read_field(line, f, v);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- forms ---- */

/* What is asked about, which the forms look at by themselves; "id" stands beside it in the short form. */
static const char *const subjects[] = {"id", "messages", "prompt", "completion", "input", NULL};

/* Where OpenAI's service would take the body, and what decided that. */
static int check_url(const struct conf *conf, const struct batch_line *line, const char *url)
{
    const char *with = conf->embed ? "--embed" : line->is_chat ? "messages" : "a prompt";
    const char *want = conf->embed ? "/v1/embeddings" : line->is_chat ? "/v1/chat/completions" : "/v1/completions";

    return url && strcmp(url, want) ? err(ERR_FORMAT, "\"url\" is \"%.60s\"; with %s it has to be %s", url, with, want)
                                    : 0;
}

static int read_openai(const struct conf *conf, struct batch_line *line)
{
    static const char *const outer[] = {"custom_id", "method", "url", "body", NULL};
    const char *method = json_string_value(json_object_get(line->root, "method"));
    const char *url = json_string_value(json_object_get(line->root, "url")), *name;
    json_t *v;

    line->form = BATCH_OPENAI;
    line->id = json_object_get(line->root, "custom_id");
    line->body = json_object_get(line->root, "body");
    json_object_foreach(line->root, name, v) if (!is_among(name, outer)) return err(
        ERR_FORMAT, "\"%.60s\" is not supported beside \"body\"", name);
    if (!json_is_string(line->id))
        return err(ERR_FORMAT, "\"custom_id\" has to be a text");
    if (method && strcmp(method, "POST"))
        return err(ERR_FORMAT, "\"method\" is \"%.40s\"; only POST is known", method);
    if (!json_is_object(line->body))
        return err(ERR_FORMAT, "\"body\" has to be an object");
    line->is_chat = json_object_get(line->body, "messages") != NULL;
    int rc = check_url(conf, line, url);
    return rc ? rc : read_fields(conf, line, line->body, subjects + 1);
}

static int read_short(const struct conf *conf, struct batch_line *line)
{

    line->form = BATCH_SHORT;
    line->id = json_object_get(line->root, "id");
    line->body = line->root;
    if (line->id && !json_is_string(line->id) && !json_is_integer(line->id))
        return err(ERR_FORMAT, "\"id\" has to be a text or a whole number");
    line->is_chat = json_object_get(line->root, "messages") != NULL;
    return read_fields(conf, line, line->root, subjects);
}

static void set_defaults(const struct conf *conf, struct batch_line *line)
{
    struct ferry_sample_opts *s = &line->sample;

    ferry_sample_opts_init(s);
    s->temperature = (float)conf->temperature;
    s->top_k = (int32_t)conf->top_k;
    s->top_p = (float)conf->top_p;
    s->min_p = (float)conf->min_p;
    s->repeat_penalty = (float)conf->repeat_penalty;
    s->presence_penalty = (float)conf->presence_penalty;
    s->frequency_penalty = (float)conf->frequency_penalty;
    s->penalty_window = (int32_t)conf->penalty_window;
    line->max_tokens = conf->n_tokens;
    line->n = 1;
    line->logprobs = -1;
}

static bool is_tokens(const json_t *v)
{
    return json_is_array(v) && json_is_integer(json_array_get(v, 0));
}

/* A text, a list of token ids, or a list of such. */
static int check_input(struct batch_line *line)
{
    const json_t *input = json_object_get(line->body, "input");
    bool is_list = json_is_array(input) && !is_tokens(input);
    size_t n = is_list ? json_array_size(input) : 1;

    if (json_object_get(line->body, "prompt") || line->is_chat || json_object_get(line->body, "completion"))
        return err(ERR_FORMAT, "--embed wants an \"input\" and nothing else to read");
    if (!json_is_string(input) && !json_is_array(input))
        return err(ERR_FORMAT, "\"input\" has to be a text, a list of token ids, or a list of such");
    if (n < 1 || n > BATCH_MAX_N)
        return err(ERR_FORMAT, "\"input\" is a list of %zu; 1 to %d are supported", n, BATCH_MAX_N);
    line->n = (unsigned)n;
    return 0;
}

static int check_prompt(const struct batch_line *line, const struct conf *conf)
{
    if (json_object_get(line->body, "input"))
        return err(ERR_FORMAT, "\"input\" is for --embed");
    bool has_prompt = json_object_get(line->body, "prompt") != NULL;
    bool has_completion = json_object_get(line->body, "completion") != NULL;

    if (has_prompt == line->is_chat)
        return err(ERR_FORMAT, "one of \"prompt\" and \"messages\" is wanted");
    if (conf->score != has_completion)
        return err(ERR_FORMAT, conf->score ? "--score wants a \"completion\"" : "\"completion\" is for --score");
    if (line->vars.n && !line->is_chat)
        return err(ERR_FORMAT, "\"%s\" is for the chat template, which \"messages\" go through", line->vars.v[0].name);
    if (line->wish.is_wanted && conf->score)
        return err(ERR_FORMAT, "a grammar is for answers, of which --score makes none");
    if (conf->score && line->n != 1)
        return err(ERR_FORMAT, "\"n\" has to be 1 with --score");
    return 0;
}

int batch_line_read(const struct conf *conf, const char *text, size_t n_bytes, uint64_t number, struct batch_line *out)
{
    *out = (struct batch_line){.number = number};
    set_defaults(conf, out);
    int rc = json_room_parse(text, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &out->root);
    if (rc)
        return rc;
    if (!json_is_object(out->root))
        return err(ERR_FORMAT, "not a JSON object");
    bool is_openai = json_object_get(out->root, "body") || json_object_get(out->root, "custom_id");
    rc = is_openai ? read_openai(conf, out) : read_short(conf, out);
    if (rc)
        return rc;
    return conf->embed ? check_input(out) : check_prompt(out, conf);
}

void batch_line_done(struct batch_line *line)
{
    json_decref(line->root);
    vars_done(&line->vars);
    mem_free(line->schema);
    *line = (struct batch_line){0};
}

/* ---- tokens ---- */

/* What a message says: a text, or a list of parts that are texts. */
static int add_content(struct text *t, const json_t *content)
{
    size_t i;
    json_t *part;

    if (json_is_string(content))
        return text_add(t, json_string_value(content), json_string_length(content));
    if (!json_is_array(content))
        return err(ERR_FORMAT, "\"content\" of a message has to be a text or a list of text parts");
    json_array_foreach((json_t *)content, i, part)
    {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *said = json_object_get(part, "text");
        if (!type || strcmp(type, "text") || !json_is_string(said))
            return err(ERR_FORMAT, "part %zu of a message is no text; nothing else is supported", i + 1);
        int rc = text_add(t, json_string_value(said), json_string_length(said));
        if (rc)
            return rc;
    }
    return 0;
}

static int read_messages(const json_t *list, struct ferry_message *messages, struct text *contents)
{
    size_t i;
    json_t *m;

    json_array_foreach((json_t *)list, i, m)
    {
        const char *role = json_string_value(json_object_get(m, "role"));
        if (!role)
            return err(ERR_FORMAT, "message %zu has no \"role\"", i + 1);
        int rc = add_content(&contents[i], json_object_get(m, "content"));
        if (!rc)
            rc = text_check(&contents[i], "a message");
        if (rc)
            return rc;
        messages[i] = (struct ferry_message){role, text_str(&contents[i])};
    }
    return 0;
}

/* The conversation as the model's template lays it out. */
static int chat_text(struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                     struct text *out)
{
    const json_t *list = json_object_get(line->body, "messages");
    size_t n = json_array_size(list);
    struct vars vars = {0};
    char *prompt = NULL;

    if (!n)
        return err(ERR_FORMAT, "\"messages\" has to be a list that is not empty");
    struct ferry_message *messages = mem_zalloc(n, sizeof *messages, MEM_OTHER);
    struct text *contents = mem_zalloc(n, sizeof *contents, MEM_OTHER);
    int rc = messages && contents ? read_messages(list, messages, contents) : err(ERR_NOMEM, "%zu messages", n);
    if (!rc)
        rc = vars_add(&vars, &conf->vars);
    if (!rc)
        rc = vars_add(&vars, &line->vars);
    struct ferry_chat_opts o = vars_opts(&vars);
    if (!rc)
        rc = ferry_chat_prompt(engine, messages, n, &o, &prompt);
    if (!rc)
        rc = text_add(out, prompt, strlen(prompt));
    line->begins_amid = !rc && ferry_reply_begins_amid(engine, prompt);
    line->thought = rc ? FERRY_THOUGHT_NONE : ferry_thought_of(engine, prompt);
    vars_done(&vars);
    for (size_t i = 0; contents && i < n; i++)
        text_done(&contents[i]);
    ferry_free(prompt);
    mem_free(contents);
    mem_free(messages);
    return rc;
}

static int given_tokens(const char *name, const json_t *list, int32_t **tokens, size_t *n_tokens)
{
    size_t n = json_array_size(list);
    int32_t *ids = mem_alloc(n * sizeof *ids, MEM_OTHER);

    if (!ids)
        return err(ERR_NOMEM, "%zu tokens", n);
    *tokens = ids;
    *n_tokens = n;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            return err(ERR_FORMAT, "\"%s\" has to be a text or a list of token ids", name);
        ids[i] = (int32_t)json_integer_value(v);
    }
    return 0;
}

/* How a completion's tokens are told from the prompt's: the whole is tokenized, and what the prompt alone takes is its share. */
static int add_completion(const struct batch_line *line, const struct ferry_engine *engine, struct text *whole,
                          int flags, int32_t **tokens, size_t *n_tokens, size_t *n_scored)
{
    const json_t *completion = json_object_get(line->body, "completion");
    size_t n_prompt = *n_tokens;

    if (!json_is_string(completion) || !json_string_length(completion))
        return err(ERR_FORMAT, "\"completion\" has to be a text that is not empty");
    ferry_free(*tokens);
    *tokens = NULL;
    int rc = text_add(whole, json_string_value(completion), json_string_length(completion));
    if (!rc)
        rc = ferry_tokenize(engine, text_str(whole), whole->n_bytes, flags, tokens, n_tokens);
    if (!rc && (*n_tokens <= n_prompt || !n_prompt))
        rc = err(ERR_FORMAT, "the completion adds no token to the prompt, or the prompt has none");
    *n_scored = rc ? 0 : *n_tokens - n_prompt;
    return rc;
}

int batch_line_tokens(struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                      int32_t **tokens, size_t *n_tokens, size_t *n_scored)
{
    const json_t *prompt = json_object_get(line->body, "prompt");
    int flags = line->is_chat ? FERRY_TOKENS_SPECIAL : FERRY_TOKENS_BOS, rc;
    struct text whole = {0};

    *tokens = NULL;
    *n_tokens = *n_scored = 0;
    if (line->is_chat)
        rc = chat_text(line, conf, engine, &whole);
    else if (json_is_array(prompt) && !conf->score)
        return given_tokens("prompt", prompt, tokens, n_tokens);
    else if (json_is_string(prompt))
        rc = text_add(&whole, json_string_value(prompt), json_string_length(prompt));
    else
        rc = err(ERR_FORMAT, "\"prompt\" has to be a text%s", conf->score ? "" : " or a list of token ids");
    if (!rc)
        rc = ferry_tokenize(engine, text_str(&whole), whole.n_bytes, flags, tokens, n_tokens);
    if (!rc && conf->score)
        rc = add_completion(line, engine, &whole, flags, tokens, n_tokens, n_scored);
    text_done(&whole);
    return rc;
}

int batch_line_input(const struct batch_line *line, const struct ferry_engine *engine, unsigned index, int32_t **tokens,
                     size_t *n_tokens)
{
    const json_t *input = json_object_get(line->body, "input");

    *tokens = NULL;
    *n_tokens = 0;
    if (json_is_array(input) && !is_tokens(input))
        input = json_array_get(input, index);
    if (json_is_array(input))
        return given_tokens("input", input, tokens, n_tokens);
    if (!json_is_string(input))
        return err(ERR_FORMAT, "\"input\" %u has to be a text or a list of token ids", index);
    return ferry_tokenize(engine, json_string_value(input), json_string_length(input),
                          FERRY_TOKENS_BOS | FERRY_TOKENS_EOS, tokens, n_tokens);
}

uint64_t batch_line_seed(const struct batch_line *line, const struct conf *conf, unsigned index)
{
    return line->has_seed ? line->sample.seed + index : conf->seed + (line->number - 1) * BATCH_MAX_N + index;
}
