/* The lines that ferry batch reads. */
#ifndef FERRY_CLI_BATCH_IN_H
#define FERRY_CLI_BATCH_IN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "src/cli/text.h"

#ifdef __cplusplus
extern "C" {
#endif

struct batch_in {
    const char *path; /* view */
    FILE *f;          /* own: the file, or what stdin held, in a file without a name */
    char *block;      /* own: read ahead */
    size_t n_block, at_block;
    uint64_t number;                       /* of the line that was read last, from 1 on */
    uint64_t n_bytes, n_lines, n_requests; /* of all; requests: lines that are not blank */
    uint64_t hash;                         /* FNV-1a of all bytes */
};

/* Open, count and hash. "-" is stdin, which is copied, so that it can be gone through twice. ERR_IO, ERR_NOMEM. */
int batch_in_open(struct batch_in *in, const char *path);
void batch_in_close(struct batch_in *in); /* takes one whose open failed */

/* The next line that is not blank, into line; its number in in->number. *more false: there is none. ERR_IO, ERR_NOMEM. */
int batch_in_next(struct batch_in *in, struct text *line, bool *more);

/* Zeroed memory, freed with ferry_free; NULL, with an error's text that names what it was for, if there is none. */
void *batch_in_zalloc(size_t n, size_t item_bytes, const char *what);

#ifdef __cplusplus
}
#endif
#endif
