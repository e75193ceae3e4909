/* GGUF files: bytes in, a checked table of keys and directory of tensors out. Hostile input stops here: whatever this
 * hands out has been checked against the file's size, and errors name the key or tensor and the numbers. Reads headers
 * only, never tensor data. Everything is read-only after gguf_open; any thread. Views hold until gguf_close. */
#ifndef FERRY_MODEL_GGUF_H
#define FERRY_MODEL_GGUF_H

#include <stdbool.h>
#include <stdint.h>

#include "quant/quant.h"

#ifdef __cplusplus
extern "C" {
#endif

struct file_ops;
struct gguf;

/* Value types; the numbers are the format's. */
enum gguf_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_STRING = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
    GGUF_N_TYPE
};

/* Bytes as they lie in the file, which need not be UTF-8 and may hold a zero. Those of a scalar key have a NUL behind
 * them, elements of an array do not. */
struct gguf_str {
    const char *p; /* view */
    uint64_t n_bytes;
};

struct gguf_array {
    enum gguf_type type; /* of the elements */
    uint64_t n;
    const unsigned char *data; /* view: the first element, unaligned */
    const uint32_t *start; /* view: (n) distance of each string or array from data; NULL where it has to be walked */
};

struct gguf_key {
    const char *name; /* view, NUL-terminated, no zero inside */
    enum gguf_type type;
    struct gguf_array array; /* type ARRAY: the elements; else one element of that type */
};

struct gguf_tensor {
    const char *name; /* view, NUL-terminated, 1 to 63 bytes */
    enum quant_type type;
    int n_dims;     /* 1 to 4 */
    int64_t ne[4];  /* all > 0, 1 from n_dims on; ne[0] is a multiple of the type's block */
    int file;       /* part of a split file, from 0 */
    uint64_t off;   /* bytes from the start of that part; aligned as the file says, at least to 8 */
    uint64_t bytes; /* off + bytes lies inside the part (of a head: below 2^63); no two tensors overlap */
};

/* One file of a split model; a model in one piece has one. */
struct gguf_part {
    const char *path;
    uint64_t dev, ino, bytes;
    int64_t mtime_ns;
    uint64_t header_bytes; /* up to the last tensor's entry; the data begin after it */
    uint64_t end_bytes;    /* where its last tensor ends; past `bytes` where only a head was opened */
    uint64_t align_bytes;
};

/* Read a GGUF and, if it is split, all its parts (any part may be named). ops: how files are read, a view during the
 * call; NULL: plainly. ERR_IO, ERR_FORMAT, ERR_UNSUPPORTED (version, byte order, tensor type), ERR_LIMIT (header beyond
 * what any model has), ERR_NOMEM, ERR_STATE (the file changed while it was read). */
int gguf_open(const char *path, const struct file_ops *ops, struct gguf **out);

/* The same where the beginning of a file is enough, such as a download's: tensors may lie past its end. ERR_FORMAT says how
 * many bytes are needed at least when the header itself is cut. */
int gguf_open_head(const char *path, const struct file_ops *ops, struct gguf **out);
void gguf_close(struct gguf *g); /* takes NULL */

/* ---- keys ---- */

int gguf_n_keys(const struct gguf *g);
const struct gguf_key *gguf_key(const struct gguf *g, int i);            /* in the file's order */
const struct gguf_key *gguf_find(const struct gguf *g, const char *key); /* NULL: missing */
const char *gguf_type_name(enum gguf_type type);                         /* "u32", "str", "arr" */
uint64_t gguf_key_bytes(const struct gguf_key *key);                     /* of the value or elements, from array.data */

/* Values by name. The plain form wants the key: ERR_FORMAT if it is missing. The opt form takes a missing key for
 * "as is": it returns 0 and leaves *out alone, so set the default before. Both: ERR_FORMAT for a value of another type
 * or out of range, with key, type and value.
 * u64 and i64 take every integer type; f64 takes floats and integers. */
int gguf_u64(const struct gguf *g, const char *key, uint64_t *out);
int gguf_i64(const struct gguf *g, const char *key, int64_t *out);
int gguf_f64(const struct gguf *g, const char *key, double *out);
int gguf_bool(const struct gguf *g, const char *key, bool *out);
int gguf_str(const struct gguf *g, const char *key, struct gguf_str *out);
int gguf_opt_u64(const struct gguf *g, const char *key, uint64_t *out);
int gguf_opt_i64(const struct gguf *g, const char *key, int64_t *out);
int gguf_opt_f64(const struct gguf *g, const char *key, double *out);
int gguf_opt_bool(const struct gguf *g, const char *key, bool *out);
int gguf_opt_str(const struct gguf *g, const char *key, struct gguf_str *out);

/* Arrays: what the elements have to be. INT: integers, all within int64; FLOAT: floats or integers. */
enum gguf_want { GGUF_WANT_INT, GGUF_WANT_FLOAT, GGUF_WANT_BOOL, GGUF_WANT_STRING, GGUF_WANT_ARRAY };
int gguf_array(const struct gguf *g, const char *key, enum gguf_want want, struct gguf_array *out);
int gguf_opt_array(const struct gguf *g, const char *key, enum gguf_want want, struct gguf_array *out);

/* Elements, i < a->n (our own bug otherwise). The type has to be what the name says (as gguf_array asked): i64 takes
 * integers, f64 floats and integers. */
int64_t gguf_at_i64(const struct gguf_array *a, uint64_t i);
double gguf_at_f64(const struct gguf_array *a, uint64_t i);
bool gguf_at_bool(const struct gguf_array *a, uint64_t i);
struct gguf_str gguf_at_str(const struct gguf_array *a, uint64_t i);
struct gguf_array gguf_at_array(const struct gguf_array *a, uint64_t i);

/* ---- tensors ---- */

int gguf_n_tensors(const struct gguf *g);
const struct gguf_tensor *gguf_tensor(const struct gguf *g, int i);                 /* in the files' order */
const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name); /* NULL: missing */

/* ---- files ---- */

int gguf_version(const struct gguf *g);
int gguf_n_parts(const struct gguf *g);
const struct gguf_part *gguf_part(const struct gguf *g, int i);
uint64_t gguf_header_bytes(const struct gguf *g); /* of all parts */

/* Changes when a header byte, a size or a time of change does. */
uint64_t gguf_identity(const struct gguf *g);

#ifdef __cplusplus
}
#endif
#endif
