/* Records as JSON. Members stand in the order in which people read them; jansson keeps it. */
#include "src/cli/batch_record.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/text.h"
#include "src/model/json_room.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

unsigned batch_record_count(const struct batch_line *line)
{
    return line->form == BATCH_OPENAI ? 1 : line->n;
}

static const char *finish_name(enum ferry_finish finish)
{
    return finish == FERRY_FINISH_STOP ? "stop" : finish == FERRY_FINISH_SCORED ? "scored" : "length";
}

static json_t *id_of(const struct batch_line *line)
{
    return line->id ? json_incref((json_t *)line->id) : json_integer((json_int_t)line->number);
}

/* ---- log-probabilities ---- */

/* JSON has no infinity, which the logarithm of what cannot happen is: it becomes null. */
static json_t *number(float x)
{
    return isfinite(x) ? json_real((double)x) : json_null();
}

/* A token's text may be half a character: then the bytes say what it is. */
static json_t *token_text(const struct ferry_engine *engine, int32_t token, const char **p, size_t *n)
{
    if (ferry_token_text(engine, token, p, n)) {
        *p = "";
        *n = 0;
    }
    json_t *text = json_stringn(*p, *n);
    return text ? text : json_string("\xef\xbf\xbd");
}

static json_t *token_with(const struct ferry_engine *engine, int32_t token, float value)
{
    const char *p;
    size_t n;
    json_t *text = token_text(engine, token, &p, &n), *bytes = json_array();

    for (size_t i = 0; i < n; i++)
        json_array_append_new(bytes, json_integer((unsigned char)p[i]));
    return json_pack("{s:o, s:i, s:o, s:o}", "token", text, "id", (int)token, "logprob", number(value), "bytes", bytes);
}

/* As OpenAI's chat form has them. */
static json_t *content_logprobs(const struct ferry_engine *engine, const struct ferry_answer *a)
{
    json_t *content = json_array();

    for (size_t i = 0; i < a->n_tokens; i++) {
        json_t *one = token_with(engine, a->tokens[i], a->logprobs[i]), *top = json_array();
        for (int k = 0; k < a->n_top; k++) {
            size_t at = i * (size_t)a->n_top + (size_t)k;
            if (a->top_tokens[at] >= 0)
                json_array_append_new(top, token_with(engine, a->top_tokens[at], a->top_logprobs[at]));
        }
        json_object_set_new(one, "top_logprobs", top);
        json_array_append_new(content, one);
    }
    return json_pack("{s:o}", "content", content);
}

static json_t *logprobs_of(const struct ferry_engine *engine, const struct ferry_answer *a)
{
    return a->logprobs ? content_logprobs(engine, a) : json_null();
}

/* ---- answers ---- */

static json_t *usage_of(const struct conf *conf, uint64_t n_prompt, uint64_t n_completion)
{
    if (conf->embed)
        return json_pack("{s:I, s:I}", "prompt_tokens", (json_int_t)n_prompt, "total_tokens", (json_int_t)n_prompt);
    return json_pack("{s:I, s:I, s:I}", "prompt_tokens", (json_int_t)n_prompt, "completion_tokens",
                     (json_int_t)n_completion, "total_tokens", (json_int_t)(n_prompt + n_completion));
}

static json_t *score_of(const struct ferry_answer *a)
{
    json_t *logprobs = json_array();
    double sum = 0;

    for (size_t i = 0; i < a->n_tokens; i++) {
        sum += (double)a->logprobs[i];
        json_array_append_new(logprobs, number(a->logprobs[i]));
    }
    return json_pack("{s:o, s:b, s:I, s:o}", "logprob", isfinite(sum) ? json_real(sum) : json_null(), "is_greedy",
                     a->n_greedy == a->n_tokens, "tokens", (json_int_t)a->n_tokens, "token_logprobs", logprobs);
}

static json_t *vector_of(const struct ferry_answer *a)
{
    json_t *values = json_array();

    for (size_t i = 0; i < a->n_embd; i++)
        json_array_append_new(values, number(a->embedding[i]));
    return values;
}

/* What a chat's answer is apart from what the model thought before; otherwise, all of it. */
static struct ferry_reply reply_of(const struct batch_line *line, const struct ferry_engine *engine,
                                   const struct ferry_answer *a)
{
    struct ferry_reply r = {.said = a->text, .n_said = a->n_bytes};

    if (line->is_chat && a->text)
        ferry_reply_split(engine, line->begins_amid, a->text, a->n_bytes, &r);
    return r;
}

/* A member of its own, where there is a thought. */
static void add_thought(json_t *o, const struct ferry_reply *r)
{
    if (r->n_thought)
        json_object_set_new(o, "reasoning_content", json_stringn(r->thought, r->n_thought));
}

static json_t *short_answer(const struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                            const struct ferry_answer *a, unsigned index)
{
    json_t *o = json_object();

    json_object_set_new(o, "id", id_of(line));
    json_object_set_new(o, "index", json_integer(index));
    if (conf->embed) {
        json_object_set_new(o, "embedding", vector_of(a));
    } else if (conf->score) {
        json_object_set_new(o, "score", score_of(a));
    } else {
        struct ferry_reply said = reply_of(line, engine, a);
        json_object_set_new(o, "text", json_stringn(said.said, said.n_said));
        add_thought(o, &said);
        json_object_set_new(o, "finish_reason", json_string(finish_name(a->finish)));
        if (line->sample.temperature > 0)
            json_object_set_new(o, "seed", json_integer((json_int_t)batch_line_seed(line, conf, index)));
    }
    if (line->logprobs >= 0)
        json_object_set_new(o, "logprobs", logprobs_of(engine, a));
    json_object_set_new(o, "usage", usage_of(conf, a->n_prompt, conf->score ? 0 : a->n_tokens));
    json_object_set_new(o, "stats", batch_record_stats(line, index, a));
    return o;
}

static json_t *choice(const struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                      const struct ferry_answer *a, unsigned index)
{
    struct ferry_reply said = reply_of(line, engine, a);
    json_t *o = json_object(), *text = json_stringn(said.said, said.n_said);

    json_object_set_new(o, "index", json_integer(index));
    if (line->is_chat) {
        json_t *message = json_pack("{s:s, s:o}", "role", "assistant", "content", text);
        add_thought(message, &said);
        json_object_set_new(o, "message", message);
    } else {
        json_object_set_new(o, "text", text);
    }
    if (conf->score)
        json_object_set_new(o, "score", score_of(a));
    json_object_set_new(o, "logprobs", logprobs_of(engine, a));
    json_object_set_new(o, "finish_reason", json_string(finish_name(a->finish)));
    return o;
}

json_t *batch_record_answer(const struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                            const struct ferry_answer *a, unsigned index)
{
    if (line->form == BATCH_OPENAI && conf->embed)
        return json_pack("{s:s, s:i, s:o}", "object", "embedding", "index", (int)index, "embedding", vector_of(a));
    return (line->form == BATCH_OPENAI ? choice : short_answer)(line, conf, engine, a, index);
}

static json_t *openai_body(const struct batch_line *line, const struct conf *conf, const char *model, json_t *choices,
                           json_t *usage)
{
    char id[64];

    if (conf->embed)
        return json_pack("{s:s, s:o, s:s, s:o}", "object", "list", "data", choices, "model", model, "usage", usage);
    snprintf(id, sizeof id, "%s-%" PRIu64, line->is_chat ? "chatcmpl" : "cmpl", line->number);
    /* "created" has to be there, and has to be the same in every run: stats has the time. */
    return json_pack("{s:s, s:s, s:i, s:s, s:o, s:o}", "id", id, "object",
                     line->is_chat ? "chat.completion" : "text_completion", "created", 0, "model", model, "choices",
                     choices, "usage", usage);
}

json_t *batch_record_openai(const struct batch_line *line, const struct conf *conf, const char *model, json_t *choices,
                            uint64_t n_prompt, uint64_t n_completion, json_t *stats)
{
    char id[64], request[64];

    snprintf(id, sizeof id, "batch_req_%" PRIu64, line->number);
    snprintf(request, sizeof request, "req_%" PRIu64, line->number);
    json_t *body = openai_body(line, conf, model, choices, usage_of(conf, n_prompt, n_completion));
    return json_pack("{s:s, s:o, s:{s:i, s:s, s:o}, s:n, s:o}", "id", id, "custom_id", id_of(line), "response",
                     "status_code", 200, "request_id", request, "body", body, "error", "stats", stats);
}

json_t *batch_record_stats(const struct batch_line *line, unsigned index, const struct ferry_answer *a)
{
    json_t *o = json_pack("{s:I, s:i}", "line", (json_int_t)line->number, "index", (int)index);

    if (!a)
        return o;
    json_object_set_new(o, "finished", json_integer((json_int_t)time(NULL)));
    json_object_set_new(o, "wait_s", json_real((double)a->wait_ns * 1e-9));
    json_object_set_new(o, "run_s", json_real((double)a->run_ns * 1e-9));
    json_object_set_new(o, "shared_tokens", json_integer((json_int_t)a->n_shared));
    json_object_set_new(o, "preempted", json_integer(a->n_preempted));
    return o;
}

/* A message that quotes what was cut amid a character is no UTF-8: then it keeps its ASCII. */
static json_t *message_of(const char *text)
{
    char ascii[1024];
    json_t *s = json_string(text);

    if (s)
        return s;
    snprintf(ascii, sizeof ascii, "%s", text);
    for (char *c = ascii; *c; c++)
        if ((unsigned char)*c >= 0x80)
            *c = '?';
    return json_string(ascii);
}

json_t *batch_record_error(const struct batch_line *line, unsigned index, int code, const char *text)
{
    json_t *error = json_pack("{s:s, s:o, s:I}", "code", err_name(code), "message", message_of(text), "line",
                              (json_int_t)line->number);
    json_t *stats = batch_record_stats(line, index, NULL);
    char id[64];

    if (line->form == BATCH_SHORT)
        return json_pack("{s:o, s:i, s:o, s:o}", "id", id_of(line), "index", (int)index, "error", error, "stats",
                         stats);
    snprintf(id, sizeof id, "batch_req_%" PRIu64, line->number);
    return json_pack("{s:s, s:o, s:n, s:o, s:o}", "id", id, "custom_id", id_of(line), "response", "error", error,
                     "stats", stats);
}

static int to_text(const json_t *v, size_t flags, char **out, size_t *n_bytes)
{
    size_t n = v ? json_dumpb(v, NULL, 0, flags) : 0;
    char *text = n ? mem_alloc(n + 1, MEM_OTHER) : NULL;

    *n_bytes = n;
    if (text && json_dumpb(v, text, n, flags) != n) { /* for want of memory of its own */
        mem_free(text);
        text = NULL;
    }
    if (text)
        text[n] = '\0';
    *out = text;
    return text ? 0 : err(ERR_NOMEM, "a record of %zu bytes", n);
}

int batch_record_text(const json_t *record, char **out, size_t *n_bytes)
{
    return to_text(record, JSON_COMPACT | JSON_REAL_PRECISION(9), out, n_bytes); /* 9 digits name a float exactly */
}

int batch_record_made(const json_t *v, const char *what)
{
    return v ? 0 : err(ERR_NOMEM, "%s", what);
}

int batch_record_exact(const json_t *v, char **out, size_t *n_bytes)
{
    return to_text(v, JSON_COMPACT | JSON_REAL_PRECISION(17), out, n_bytes);
}

const char *batch_record_brief(const json_t *v, char *out, size_t n)
{
    char *text = NULL;
    size_t n_text;

    if (v && to_text(v, JSON_ENCODE_ANY | JSON_COMPACT, &text, &n_text))
        snprintf(out, n, "(no memory)");
    else
        text_printable(v ? text : "nothing", v ? n_text : strlen("nothing"), out, n);
    mem_free(text);
    return out;
}

int batch_record_key(const char *text, size_t n_bytes, struct batch_key *out)
{
    json_t *o;
    int rc = json_room_parse(text, n_bytes, JSON_ALLOW_NUL, &o); /* an answer may hold one */
    if (rc)
        return rc;
    const json_t *stats = json_object_get(o, "stats"), *line = json_object_get(stats, "line");
    const json_t *index = json_object_get(stats, "index");
    bool is_key = json_is_integer(line) && json_integer_value(line) > 0 && json_is_integer(index) &&
                  json_integer_value(index) >= 0 && json_integer_value(index) < BATCH_MAX_N;

    if (is_key)
        *out = (struct batch_key){(uint64_t)json_integer_value(line), (unsigned)json_integer_value(index)};
    json_decref(o);
    return is_key ? 0 : err(ERR_FORMAT, "no record");
}
