/* What ferry batch writes: one record of JSON a line, in the form that the request had. All that may differ between two runs
 * stands under "stats", and so do line and index, by which a resumed run knows what is done. */
#ifndef FERRY_CLI_BATCH_RECORD_H
#define FERRY_CLI_BATCH_RECORD_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/cli/batch_line.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Which record: answer `index` of line `line`. The OpenAI form has all answers of a line in one record, number 0. */
struct batch_key {
    uint64_t line;
    unsigned index;
};

/* Records that a line gives. */
unsigned batch_record_count(const struct batch_line *line);

/* One answer as a part of a record: the record itself (short form), or one of its choices. NULL without memory. */
json_t *batch_record_answer(const struct batch_line *line, const struct conf *conf, const struct ferry_engine *engine,
                            const struct ferry_answer *a, unsigned index);

/* The OpenAI record of a line whose choices (or embeddings) are all there; counts are sums over them. Takes the reference to
 * choices. */
json_t *batch_record_openai(const struct batch_line *line, const struct conf *conf, const char *model, json_t *choices,
                            uint64_t n_prompt, uint64_t n_completion, json_t *stats);

/* What differs from run to run. */
json_t *batch_record_stats(const struct batch_line *line, unsigned index, const struct ferry_answer *a);

/* A record that says why a line, or one of its answers, has none: code and the thread's last error. */
json_t *batch_record_error(const struct batch_line *line, unsigned index, int code, const char *text);

/* To one line of text, which the caller frees with ferry_free. ERR_NOMEM, also for a record that is NULL. */
int batch_record_text(const json_t *record, char **out, size_t *n_bytes);

/* The same for what is no record: its numbers are doubles, and are the same when they are read again. */
int batch_record_exact(const json_t *v, char **out, size_t *n_bytes);

/* 0, or ERR_NOMEM with `what` in its text where v could not be made (NULL). */
int batch_record_made(const json_t *v, const char *what);

/* Any value in one line of text, cut to n bytes; NULL is "nothing". Returns out. */
const char *batch_record_brief(const json_t *v, char *out, size_t n);

/* Which record is this line of an earlier output? ERR_FORMAT: it is none; ERR_NOMEM. */
int batch_record_key(const char *text, size_t n_bytes, struct batch_key *out);

#ifdef __cplusplus
}
#endif
#endif
