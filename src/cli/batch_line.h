/* What one line of a batch's input asks, in one of two forms: OpenAI's, or a short one. With conf->embed it has inputs, not a prompt. */
#ifndef FERRY_CLI_BATCH_LINE_H
#define FERRY_CLI_BATCH_LINE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/cli/conf.h"
#include "src/cli/grammars.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Answers that a line may ask for: their state is a word of bits. */
#define BATCH_MAX_N 64

enum batch_form { BATCH_SHORT, BATCH_OPENAI };

struct batch_line {
    uint64_t number;
    enum batch_form form;
    bool is_chat;     /* messages, not a prompt */
    json_t *root;     /* own: what the others are views of */
    const json_t *id; /* view: "id" or "custom_id"; NULL: none */
    const json_t *body;
    unsigned n;        /* answers, or inputs to embed */
    size_t max_tokens; /* 0: no bound */
    bool ignore_eos, has_seed;
    int logprobs; /* -1: none */
    struct ferry_sample_opts sample;
    const char *stop[16]; /* (n_stop) views */
    size_t n_stop;
    struct vars vars; /* own: of the chat template, over conf's */
    bool has_wish;    /* it says itself what the answer has to be; else the options do */
    struct grammars_wish wish;
    char *schema;     /* own: what wish is a view of, if it was no text */
    bool begins_amid; /* a chat whose answer begins amid a thought; batch_line_tokens finds out, as thought */
    enum ferry_thought thought;
};

/* What one line says, with what it leaves out from conf. ERR_FORMAT says what is wrong; id and form are set as far as they
 * could be read. batch_line_done() in any case. */
int batch_line_read(const struct conf *conf, const char *text, size_t n_bytes, uint64_t number, struct batch_line *out);
void batch_line_done(struct batch_line *line);

/* Its prompt as tokens; with conf->score the completion behind it, whose tokens are the last n_scored. Caller frees *tokens with
 * ferry_free. ERR_FORMAT, codes of ferry_tokenize and ferry_chat_prompt. */
int batch_line_tokens(struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                      int32_t **tokens, size_t *n_tokens, size_t *n_scored);

/* Input `index` of a line to be embedded, as tokens, with what the file wants at beginning and end. As batch_line_tokens. */
int batch_line_input(const struct batch_line *line, const struct ferry_engine *engine, unsigned index, int32_t **tokens,
                     size_t *n_tokens);

/* The seed of its answer `index`: the line's own, or one that the run's seed and the line's number give. */
uint64_t batch_line_seed(const struct batch_line *line, const struct conf *conf, unsigned index);

#ifdef __cplusplus
}
#endif
#endif
