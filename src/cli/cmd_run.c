/* ferry run: one prompt, one answer. */
#include "src/cli/cmd.h"

#include "src/cli/stop.h"
#include "src/cli/talk.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

/* A prompt longer than any context is a mistake, such as -f /dev/zero. */
#define MAX_PROMPT_BYTES ((uint64_t)256 << 20)

static int make_tokens(struct talk *t, const struct text *prompt, int32_t **tokens, size_t *n)
{
    const struct conf *conf = t->conf;
    struct ferry_message messages[2];
    size_t n_messages = 0;

    if (conf->raw)
        return ferry_tokenize(t->engine, text_str(prompt), prompt->n_bytes, FERRY_TOKENS_BOS, tokens, n);
    int rc = text_check(prompt, "the prompt");
    if (rc)
        return rc;
    if (conf->system)
        messages[n_messages++] = (struct ferry_message){"system", conf->system};
    messages[n_messages++] = (struct ferry_message){"user", text_str(prompt)};
    return talk_prompt(t, messages, n_messages, tokens, n);
}

static int print_json(const struct talk *t, const struct talk_answer *a, size_t n_prompt)
{
    struct ferry_stats s;

    ferry_session_stats(t->session, &s);
    json_t *o = json_pack(
        "{s:s, s:i, s:i, s:s, s:s, s:{s:f, s:f, s:I, s:I, s:I, s:f, s:I, s:I}}", "model", t->info.name, "prompt_tokens",
        (int)n_prompt, "tokens", (int)a->n_tokens, "end", talk_end_name(a->end), "text", text_str(&a->text), "stats",
        "prompt_s", (double)s.prompt_ns * 1e-9, "generate_s", (double)s.generate_ns * 1e-9, "weight_bytes_prompt",
        (json_int_t)s.weight_bytes_prompt, "weight_bytes_generate", (json_int_t)s.weight_bytes_generate, "load_bytes",
        (json_int_t)s.load_bytes, "load_s", (double)s.load_ns * 1e-9, "disk_bytes", (json_int_t)s.disk_bytes,
        "kv_bytes", (json_int_t)s.kv_bytes);
    int failed = !o || json_dumpf(o, stdout, JSON_INDENT(2));
    json_decref(o);
    putchar('\n');
    return failed ? FERRY_ERR_NOMEM : 0;
}

static int answer(struct talk *t, const struct text *prompt, int *status)
{
    const struct conf *conf = t->conf;
    struct ferry_stats start;
    struct talk_answer a = {0};
    int32_t *tokens = NULL;
    size_t n = 0;

    talk_stats_begin(t, &start);
    int rc = make_tokens(t, prompt, &tokens, &n);
    if (!rc)
        rc = talk_feed(t, tokens, n);
    if (!rc)
        rc = talk_reply(t, !conf->json, &a);
    if (!rc && conf->json)
        rc = print_json(t, &a, n);
    else if (!rc)
        putchar('\n');
    if (!rc && a.end == TALK_END_CONTEXT)
        fprintf(stderr, "ferry: the context of %u tokens is full; the answer is cut (--ctx N makes it larger)\n",
                (unsigned)t->info.n_ctx);
    if (!rc && !conf->quiet) {
        fflush(stdout);
        talk_news_print(t);
        talk_stats_print(t, &start, conf->stats);
    }
    if (!rc && a.end == TALK_END_INTERRUPTED)
        *status = CONF_EXIT_INTERRUPTED;
    text_done(&a.text);
    ferry_free(tokens);
    return rc;
}

int cmd_run(const struct conf *conf)
{
    struct text prompt = {0};
    struct talk t = {0};
    int status = CONF_EXIT_DONE, rc;

    if (!conf->prompt == !conf->file)
        return term_usage(conf, "wants a prompt: one of -p TEXT and -f FILE");
    if (conf->raw && conf->system)
        return term_usage(conf, "--raw knows no --system: without the template there are no messages");
    if (grammars_conflict(conf))
        return term_usage(conf, grammars_conflict(conf));
    if (conf->raw && conf->vars.n)
        return term_usage(conf, "--raw knows no --template-var: there is no template");
    rc = conf->file ? text_read(&prompt, conf->file, MAX_PROMPT_BYTES)
                    : text_add(&prompt, conf->prompt, strlen(conf->prompt));
    if (!rc) {
        rc = talk_open(conf, conf->n_ctx, 0, &t);
        if (!rc)
            rc = answer(&t, &prompt, &status);
        if (!rc)
            rc = talk_trace(&t);
        talk_close(&t);
    }
    text_done(&prompt);
    return rc ? term_fail(rc) : status;
}
