/* ferry chat: the conversation at a terminal, or message by message from a pipe. */
#include "src/cli/cmd.h"

#include "src/cli/dialog.h"
#include "src/cli/lines.h"
#include "src/cli/stop.h"
#include "src/cli/talk.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct chat {
    struct talk talk;
    struct dialog dialog;
    struct lines *lines;      /* own */
    struct ferry_stats start; /* before the last answer */
    int n_interrupts;         /* in a row, at the prompt */
    bool quit;
};

/* One command: its row is all that /help knows of it. */
struct chat_command {
    const char *name, *value, *help;
    int (*run)(struct chat *c, const char *rest);
};

/* Words about the conversation; an answer alone goes to stdout. */
#define NOTE(...) fprintf(stderr, "[" __VA_ARGS__), fputs("]\n", stderr)

/* ---- an answer ---- */

static int feed(struct chat *c)
{
    const struct ferry_message *messages;
    int32_t *tokens = NULL;
    size_t n_messages, n_tokens = 0;

    int rc = dialog_messages(&c->dialog, &messages, &n_messages);
    if (!rc)
        rc = talk_prompt(&c->talk, messages, n_messages, &tokens, &n_tokens);
    if (!rc)
        rc = talk_feed(&c->talk, tokens, n_tokens);
    ferry_free(tokens);
    return rc;
}

static void note_end(const struct chat *c, enum talk_end end)
{
    if (end == TALK_END_CONTEXT)
        NOTE("the context of %" PRIu32 " tokens is full: the answer is cut; /undo or /reset makes room",
             c->talk.info.n_ctx);
    else if (end == TALK_END_LENGTH)
        NOTE("cut after %" PRIu32 " tokens (-n)", c->talk.conf->n_tokens);
    else if (end == TALK_END_INTERRUPTED)
        NOTE("stopped");
}

/* The last turn is the user's: answer it. What fails leaves the conversation as it was before that turn; only what ends the
 * chat is returned. */
static int answer(struct chat *c)
{
    size_t n_before = c->dialog.n - 1;
    struct talk_answer a = {0};

    talk_stats_begin(&c->talk, &c->start);
    int rc = feed(c);
    if (rc == FERRY_ERR_CANCEL) {
        NOTE("stopped: the message was not taken");
    } else if (rc) {
        fprintf(stderr, "ferry: %s\n", ferry_error());
        if (rc == FERRY_ERR_LIMIT)
            NOTE("the message was not taken; /undo takes back a turn, /reset all");
    }
    if (rc) {
        dialog_keep(&c->dialog, n_before);
        return rc == FERRY_ERR_NOMEM || rc == FERRY_ERR_IO || rc == FERRY_ERR_DEVICE ? rc : 0;
    }
    rc = talk_reply(&c->talk, true, &a);
    putchar('\n');
    fflush(stdout);
    if (!rc && !a.text.n_bytes && a.end == TALK_END_INTERRUPTED)
        dialog_keep(&c->dialog, n_before);
    else if (!rc)
        rc = dialog_add(&c->dialog, text_str(&a.text), a.text.n_bytes);
    if (!rc)
        note_end(c, a.end);
    if (!rc)
        talk_news_print(&c->talk);
    if (!rc && c->talk.conf->stats)
        talk_stats_print(&c->talk, &c->start, true);
    text_done(&a.text);
    return rc;
}

/* ---- commands ---- */

static int chat_reset(struct chat *c, const char *rest)
{
    (void)rest;
    dialog_keep(&c->dialog, 0);
    NOTE("a new conversation%s", c->dialog.system.n_bytes ? ", the system message stays" : "");
    return 0;
}

static int chat_system(struct chat *c, const char *rest)
{
    int rc = dialog_set_system(&c->dialog, rest);
    if (!rc)
        NOTE("%s", *rest ? "the system message is set, from the next answer on" : "no system message");
    return rc;
}

static int chat_set(struct chat *c, const char *rest)
{
    const struct vars *vars = &c->talk.vars;
    int rc = *rest ? talk_set_var(&c->talk, rest) : 0;

    if (rc)
        fprintf(stderr, "ferry: %s\n", ferry_error());
    for (size_t i = 0; !rc && i < vars->n; i++) {
        const struct ferry_var *v = &vars->v[i];
        if (v->kind == FERRY_VAR_TEXT)
            NOTE("%s=%s", v->name, v->text);
        else if (v->kind == FERRY_VAR_BOOL)
            NOTE("%s=%s", v->name, v->number ? "true" : "false");
        else
            NOTE("%s=%" PRId64, v->name, v->number);
    }
    if (!rc && !vars->n)
        NOTE("no variable of the chat template is set; /set enable_thinking=false sets one");
    return rc == FERRY_ERR_NOMEM ? rc : 0;
}

static int chat_stats(struct chat *c, const char *rest)
{
    (void)rest;
    talk_stats_print(&c->talk, &c->start, true);
    return 0;
}

static int chat_undo(struct chat *c, const char *rest)
{
    (void)rest;
    if (c->dialog.n < 2) {
        NOTE("nothing to take back");
        return 0;
    }
    dialog_keep(&c->dialog, c->dialog.n - 2);
    NOTE("the last message and its answer are gone; %zu left", c->dialog.n / 2);
    return 0;
}

static int chat_regen(struct chat *c, const char *rest)
{
    (void)rest;
    if (c->dialog.n < 2) {
        NOTE("there is no answer yet");
        return 0;
    }
    dialog_keep(&c->dialog, c->dialog.n - 1);
    return answer(c);
}

static int chat_quit(struct chat *c, const char *rest)
{
    (void)rest;
    c->quit = true;
    return 0;
}

static int chat_help(struct chat *c, const char *rest);

static const struct chat_command commands[] = {
    {"/help", NULL, "this text", chat_help},
    {"/reset", NULL, "begin a new conversation", chat_reset},
    {"/system", "TEXT", "set the system message; none without TEXT", chat_system},
    {"/set", "NAME=VALUE", "set a variable of the chat template; without one: what is set", chat_set},
    {"/undo", NULL, "take back the last message and its answer", chat_undo},
    {"/regen", NULL, "answer the last message anew", chat_regen},
    {"/stats", NULL, "what the last answer took", chat_stats},
    {"/quit", NULL, "end (so does Ctrl-D)", chat_quit},
};

static int chat_help(struct chat *c, const char *rest)
{
    (void)c;
    (void)rest;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(stderr, "  %-8s %-10s %s\n", commands[i].name, commands[i].value ? commands[i].value : "",
                commands[i].help);
    fputs("A backslash at the end of a line goes on in the next; \"\"\" begins and ends several lines.\n"
          "Ctrl-C stops an answer or clears a line; twice in a row on an empty one it ends the chat.\n",
          stderr);
    return 0;
}

static int run_command(struct chat *c, const char *line)
{
    size_t n = strcspn(line, " \t");
    const char *rest = line + n + strspn(line + n, " \t");

    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strlen(commands[i].name) == n && !memcmp(commands[i].name, line, n))
            return commands[i].run(c, rest);
    }
    NOTE("no command %.*s; /help lists them", (int)n, line);
    return 0;
}

/* ---- the loop ---- */

static int take_message(struct chat *c, const struct text *line)
{
    const char *p = text_str(line);

    if (!p[strspn(p, " \t\n")])
        return 0;
    if (p[0] == '/' && p[1] != '/')
        return run_command(c, p);
    /* Two slashes begin a message that begins with one. */
    size_t n_skipped = p[0] == '/';
    int rc = dialog_add(&c->dialog, p + n_skipped, line->n_bytes - n_skipped);
    return rc ? rc : answer(c);
}

static int loop(struct chat *c)
{
    struct text line = {0};
    enum lines_got got = LINES_MESSAGE;
    int rc = 0;

    while (!rc && !c->quit) {
        stop_clear();
        stop_watch(NULL); /* at the prompt a signal is for the line, not for the next answer */
        rc = lines_read(c->lines, &line, &got);
        if (rc || got == LINES_END || stop_for_good())
            break;
        if (got == LINES_INTERRUPT) {
            c->quit = ++c->n_interrupts >= 2 || !lines_is_terminal(c->lines);
            if (!c->quit)
                NOTE("Ctrl-C again or /quit ends the chat");
            continue;
        }
        c->n_interrupts = 0;
        if (got == LINES_CLEARED)
            continue;
        stop_watch(c->talk.session);
        rc = take_message(c, &line);
    }
    text_done(&line);
    return rc;
}

static void greet(const struct chat *c)
{
    const struct ferry_info *info = &c->talk.info;

    if (lines_is_terminal(c->lines) && !c->talk.conf->quiet)
        fprintf(stderr, "%s (%s, %" PRIu32 " layers), context %" PRIu32 " tokens. /help lists the commands.\n",
                info->name, info->architecture, info->n_layer, info->n_ctx);
}

int cmd_chat(const struct conf *conf)
{
    struct chat c = {0};
    int status = CONF_EXIT_DONE;

    if (grammars_conflict(conf))
        return term_usage(conf, grammars_conflict(conf));
    int rc = talk_open(conf, conf->n_ctx, 0, &c.talk);

    if (!rc && !c.talk.info.has_chat_template) {
        fprintf(stderr, "ferry: %s has no chat template; ferry run --raw continues plain text\n", conf->model);
        talk_close(&c.talk);
        return CONF_EXIT_FAILED;
    }
    if (!rc && conf->system)
        rc = dialog_set_system(&c.dialog, conf->system);
    if (!rc)
        rc = lines_open(conf, &c.lines);
    if (!rc) {
        greet(&c);
        rc = loop(&c);
    }
    if (!rc)
        rc = talk_trace(&c.talk);
    if (stop_for_good() || (rc == 0 && stop_asked() && !lines_is_terminal(c.lines)))
        status = CONF_EXIT_INTERRUPTED;
    lines_close(c.lines);
    dialog_done(&c.dialog);
    talk_close(&c.talk);
    return rc ? term_fail(rc) : status;
}
