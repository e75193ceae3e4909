/* What chat and run share, and eval and bench in part: an engine opened from options, a session, an answer that streams. */
#ifndef FERRY_CLI_TALK_H
#define FERRY_CLI_TALK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/cli/conf.h"
#include "src/cli/grammars.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

struct talk {
    const struct conf *conf;       /* view */
    struct ferry_engine *engine;   /* own */
    struct ferry_session *session; /* own */
    struct ferry_info info;
    struct ferry_stats fed;        /* when the prompt had been read, and the answer began */
    struct vars vars;              /* own: conf's, which a chat may change */
    struct grammars grammars;      /* own */
    struct ferry_grammar *grammar; /* view: of answers; NULL: none */
    enum ferry_thought thought;    /* of the prompt that talk_prompt made last */
    uint32_t n_gpu_news;           /* changes of what the GPU computes that were told */
};

/* The engine's options that conf says; progress (begun by the caller) shows the loading, and must live until the engine is open. */
struct term_progress;
struct ferry_engine_opts talk_engine_opts(const struct conf *conf, uint32_t n_ctx, uint32_t n_out,
                                          struct term_progress *progress);

/* Load the model, with progress, and make one session; and the grammar that conf names. n_ctx, n_out: as in the engine's options. Signals
 * are watched from here to talk_close. Codes of ferry_engine_open(); of ferry_grammar_make(); of ferry_chat_check(), if conf has variables
 * of a chat template; ERR_CANCEL when the user stopped it. */
int talk_open(const struct conf *conf, uint32_t n_ctx, uint32_t n_out, struct talk *out);
void talk_close(struct talk *t); /* takes one whose open failed, too */

/* Set a variable of the template, "NAME=VALUE". What fails changes nothing. Codes of vars_read and ferry_chat_check. */
int talk_set_var(struct talk *t, const char *text);

/* Lay the messages out by the model's template and tokenize. *tokens: caller frees with ferry_free. */
int talk_prompt(struct talk *t, const struct ferry_message *messages, size_t n, int32_t **tokens, size_t *n_tokens);

/* Make the session hold exactly these tokens: what it shares with them stays, the rest is run, with progress. ERR_LIMIT with the
 * numbers when they leave no room for an answer; the session is then as it was. */
int talk_feed(struct talk *t, const int32_t *tokens, size_t n);

enum talk_end {
    TALK_END_MODEL,       /* the model ended its answer */
    TALK_END_LENGTH,      /* -n tokens */
    TALK_END_CONTEXT,     /* the context is full */
    TALK_END_INTERRUPTED, /* Ctrl-C */
};

/* "end", "length", ... as JSON says it. */
const char *talk_end_name(enum talk_end end);

struct talk_answer {
    struct text text; /* all of it; text_done() by the caller */
    size_t n_tokens;  /* without the one that ended it */
    enum talk_end end;
};

/* Draw tokens until something ends the answer. shown: also write them to stdout as they come; ERR_IO when that fails. */
int talk_reply(struct talk *t, bool shown, struct talk_answer *out);

/* Counters at the start of an answer; then the difference, on one line of stderr, or several if all is wanted. */
void talk_stats_begin(const struct talk *t, struct ferry_stats *start);
/* What people should know of the GPU, if there is anything new: a line on stderr. */
void talk_news_print(struct talk *t);

void talk_stats_print(const struct talk *t, const struct ferry_stats *start, bool all);

/* Write the traces that were asked for (--trace, --trace-experts). ERR_IO. */
int talk_trace(const struct talk *t);

#ifdef __cplusplus
}
#endif
#endif
