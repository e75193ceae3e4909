/* Where the records of ferry batch go, and what is there already: the output, and beside it a journal (OUTPUT.ferry) that says
 * of which input, model and options it is, and keeps records whose turn has not come (--order input). */
#ifndef FERRY_CLI_BATCH_OUT_H
#define FERRY_CLI_BATCH_OUT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "src/cli/batch_record.h"
#include "src/cli/conf.h"
#include "src/ferry.h"

#ifdef __cplusplus
extern "C" {
#endif

struct batch_kept; /* a record in the journal */

struct batch_out {
    const struct conf *conf; /* view */
    bool in_order;
    struct ferry_journal *out, *side; /* own */
    uint64_t n_lines;
    uint64_t *done, *written; /* own: (n_lines + 1) a bit for each record of a line: is there; stands in the output */
    uint8_t *n_records;       /* own: (n_lines + 1) of a line; 0: blank, or not read yet */
    uint64_t n_read;          /* lines up to this one have been read */
    struct batch_key due;     /* --order input: the record to be written next */
    struct batch_kept *kept;  /* own: (n_kept) by line and index, from first_kept on */
    size_t n_kept, first_kept, cap_kept;
    uint64_t n_done, n_failed; /* records, of the earlier runs too */
    uint64_t n_cut;            /* bytes of torn ends */
    bool resumed;
};

/* Open output and journal. about: {"input":…, "model":…, "options":…}, compared with what the journal says: ERR_STATE says what
 * differs, or that the output is not of such a run, unless conf->restart (both begin anew) or conf->accept_changes. n_lines: of
 * the input. batch_out_close() in any case. */
int batch_out_open(struct batch_out *o, const struct conf *conf, const json_t *about, uint64_t n_lines);
void batch_out_close(struct batch_out *o);

/* Line `line` was read and gives so many records. ERR_IO, ERR_NOMEM: records that were kept may have come to be due. */
int batch_out_expect(struct batch_out *o, uint64_t line, unsigned n_records);

/* The records of a line that are there: bit i for record i. */
uint64_t batch_out_done(const struct batch_out *o, uint64_t line);

/* Is every record there that a line gives, which has been read? */
bool batch_out_is_whole(const struct batch_out *o, uint64_t line);

/* Write a record (a line of text), or keep it until its turn. ERR_IO: the disk is full, ...: it is not there. */
int batch_out_add(struct batch_out *o, struct batch_key key, const char *text, size_t n_bytes);

/* Everything on the disk. */
int batch_out_sync(struct batch_out *o);

#ifdef __cplusplus
}
#endif
#endif
