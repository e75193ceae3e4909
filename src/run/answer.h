/* What one sequence says: its drawn tokens as text, what ends it, and the log-probabilities noted on the way. */
#ifndef FERRY_RUN_ANSWER_H
#define FERRY_RUN_ANSWER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/model/tok.h"

#ifdef __cplusplus
extern "C" {
#endif

struct answer_rules {
    size_t max_tok;          /* 0: no bound of its own */
    bool ignore_end;         /* the model's end tokens are tokens like others */
    const char *const *stop; /* (n_stop) texts that end the answer and are no part of it */
    size_t n_stop;
    int n_top; /* note the log-probability of each token, and this many best ones; -1: note nothing */
};

enum answer_end {
    ANSWER_GOES_ON,
    ANSWER_STOP,    /* an end token, or one of rules.stop */
    ANSWER_LENGTH,  /* max_tok */
    ANSWER_CONTEXT, /* no more positions */
    ANSWER_SCORED,  /* the given tokens were judged; nothing was drawn */
    ANSWER_POOLED,  /* they became a vector */
    ANSWER_FAILED,  /* this answer alone: error says why */
};

struct answer {
    struct answer_rules rules; /* stop: own copies */
    enum answer_end end;
    struct tok_stream stream;
    bool has_text; /* there is a vocabulary */
    char *text;    /* own: (n_text) and a NUL */
    size_t n_text, cap_text;
    size_t n_tok;       /* drawn (without the one that ended it), or scored */
    size_t n_greedy;    /* of scored tokens, how many were the likeliest */
    int32_t *token;     /* own: (n_tok) */
    float *logprob;     /* own: (n_tok) if rules.n_top >= 0 */
    int32_t *top;       /* own: (n_tok, rules.n_top) best first */
    float *top_logprob; /* own: (n_tok, rules.n_top) */
    size_t cap_tok;
    int status;      /* code of a failed one */
    char error[256]; /* and its text */
};

/* tok (view, outlives the answer) NULL: numbers only. ERR_NOMEM. */
int answer_init(struct answer *a, const struct answer_rules *rules, const struct tok *tok);
void answer_done(struct answer *a); /* takes a zeroed one, or one whose init failed */

/* A token was drawn from logits (n_vocab), which are looked at if log-probabilities are noted. Sets a->end when it ended the answer,
 * ANSWER_FAILED without memory. */
void answer_take(struct answer *a, int32_t token, const float *logits, int n_vocab);

/* A given token, and the logits of the position before it. */
void answer_score(struct answer *a, int32_t token, const float *logits, int n_vocab);

/* It ends here, for this reason; an unfinished character becomes text. */
void answer_finish(struct answer *a, enum answer_end end);

/* It fails here, with the thread's last error. */
void answer_fail(struct answer *a, int code);

#ifdef __cplusplus
}
#endif
#endif
