/* Importance matrices: for each column of a weight (of each expert) the mean square of what it is multiplied with, as
 * llama-imatrix measures it. Both forms of file: GGUF, and the older .dat. Hostile input stops here. Only an index is held;
 * values are read when asked for. Read-only after imatrix_open; any thread. */
#ifndef FERRY_MODEL_IMATRIX_H
#define FERRY_MODEL_IMATRIX_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct file_ops;
struct imatrix;
struct imatrix_entry;

/* Reads all of the file once: every value has to be finite and not negative. ops: how files are read, a view until
 * imatrix_close; NULL: plainly. ERR_IO, ERR_FORMAT, ERR_LIMIT, ERR_NOMEM. */
int imatrix_open(const char *path, const struct file_ops *ops, struct imatrix **out);
void imatrix_close(struct imatrix *im); /* takes NULL */

int imatrix_n_entries(const struct imatrix *im);
uint64_t imatrix_n_chunks(const struct imatrix *im);   /* of text that it was measured on; 0: the file does not say */
const char *imatrix_dataset(const struct imatrix *im); /* view; NULL: the file does not say */

/* What is known of the weight with that name; NULL: nothing. View until imatrix_close. */
const struct imatrix_entry *imatrix_find(const struct imatrix *im, const char *weight);

/* How many values it has: columns times experts. */
uint64_t imatrix_n_values(const struct imatrix_entry *entry);

/* Importance of n_columns columns of one expert, n_columns * experts being the entry's values. *is_known: false, and out
 * untouched, for an expert that no token came to. ERR_IO. */
int imatrix_read(const struct imatrix *im, const struct imatrix_entry *entry, uint64_t expert, uint64_t n_columns,
                 float *out, bool *is_known);

#ifdef __cplusplus
}
#endif
#endif
