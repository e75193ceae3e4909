/* Chat templates: the Jinja text of `tokenizer.chat_template` turns messages into the prompt that a model was trained on.
 * Templates come out of downloaded files and are hostile input: parsing depth, steps, recursion and output are bounded. */
#ifndef FERRY_MODEL_TEMPLATE_H
#define FERRY_MODEL_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct template_code; /* a parsed template */

struct template_message {
    const char *role;    /* view */
    const char *content; /* view */
};

enum template_kind { TEMPLATE_BOOL, TEMPLATE_INT, TEMPLATE_STRING, TEMPLATE_NONE };

/* One more variable that a template may read, e.g. enable_thinking. */
struct template_var {
    const char *name; /* view */
    enum template_kind kind;
    int64_t integer;    /* TEMPLATE_BOOL, TEMPLATE_INT */
    const char *string; /* view; TEMPLATE_STRING */
};

struct template_args {
    const struct template_message *messages; /* (n_messages) */
    int n_messages;
    bool add_generation_prompt;
    const char *bos; /* text of the BOS token, "" or NULL if none */
    const char *eos;
    const struct template_var *vars; /* (n_vars) */
    int n_vars;
    int64_t now_s; /* seconds since 1970, UTC: what strftime_now() writes */
};

/* Parse text (bytes long). *out must be given to template_free(). ERR_FORMAT: no valid template, ERR_UNSUPPORTED: a construct
 * ferry does not know (the text names construct and line), ERR_LIMIT: too deep or too long, ERR_NOMEM. Any thread. */
int template_make(const char *text, size_t bytes, struct template_code **out);

/* Write the prompt. *text is the caller's (mem_free()), NUL-terminated, n_bytes without the NUL. ERR_ARG: the template itself
 * refused the conversation by raise_exception (its words are the error text); ERR_FORMAT, ERR_UNSUPPORTED: an operation on
 * values that it does not fit; ERR_LIMIT: steps, depth or output; ERR_NOMEM. A template is immutable: any thread. */
int template_render(const struct template_code *t, const struct template_args *args, char **text, size_t *n_bytes);

/* Does the template name this variable anywhere? One that it does not name changes nothing. */
bool template_reads(const struct template_code *t, const char *name);

void template_free(struct template_code *t); /* takes NULL */

#ifdef __cplusplus
}
#endif
#endif
