/* Writing GGUF files, in one piece or in parts: keys and tensors are named first, then laid out, then the tensors' bytes come
 * in any order. What is written can be read by gguf.h: names, shapes and alignment are checked as there. Nothing shows at
 * the path before gguf_write_commit(). */
#ifndef FERRY_MODEL_GGUF_WRITE_H
#define FERRY_MODEL_GGUF_WRITE_H

#include <stdint.h>

#include "src/model/gguf.h"

#ifdef __cplusplus
extern "C" {
#endif

struct out_ops;
struct gguf_write;

/* ERR_NOMEM. */
int gguf_write_make(struct gguf_write **out);
/* Takes NULL. What was not committed is gone. */
void gguf_write_free(struct gguf_write *w);

/* ---- what it holds; before gguf_write_layout(). One thread. Names and values are copied. ---- */

/* ERR_NOMEM, ERR_LIMIT (a header beyond what readers take). "general.alignment" is heeded. */
int gguf_write_key(struct gguf_write *w, const struct gguf_key *key);
int gguf_write_u16(struct gguf_write *w, const char *name, uint16_t v);
int gguf_write_u32(struct gguf_write *w, const char *name, uint32_t v);
int gguf_write_i32(struct gguf_write *w, const char *name, int32_t v);
int gguf_write_str(struct gguf_write *w, const char *name, const char *p, uint64_t n_bytes);

/* Tensors are numbered in the order in which they are named, and lie in that order. ERR_ARG for a name of no or over 63
 * bytes, a shape that the type cannot have. */
int gguf_write_tensor(struct gguf_write *w, const char *name, enum quant_type type, int n_dims, const int64_t *ne);

/* Place everything, in parts of at most part_bytes where a tensor is not larger alone; 0: in one. ERR_ARG for a name that
 * is there twice or an alignment that is none, ERR_LIMIT for over 65535 parts. */
int gguf_write_layout(struct gguf_write *w, uint64_t part_bytes);

/* ---- after it ---- */

int gguf_write_n_parts(const struct gguf_write *w);
uint64_t gguf_write_bytes(const struct gguf_write *w); /* of all parts, headers included */

/* The name of part i of a file that the user calls path: "m-00001-of-00003.gguf" for "m.gguf"; path itself if there is one
 * part. *out: caller frees. ERR_NOMEM. */
int gguf_write_part_path(const struct gguf_write *w, const char *path, int i, char **out);

/* Begin the files and write their headers. ops: how files are written, a view until gguf_write_free; NULL: plainly. ERR_IO,
 * ERR_NOMEM. */
int gguf_write_open(struct gguf_write *w, const char *path, const struct out_ops *ops);

/* bytes of tensor number `tensor`, from off on, within its size. Any thread. ERR_IO. */
int gguf_write_data(struct gguf_write *w, int tensor, uint64_t off, const void *p, uint64_t bytes);

/* To the disk, then give all parts their names. ERR_IO: then none has one. */
int gguf_write_commit(struct gguf_write *w);

#ifdef __cplusplus
}
#endif
#endif
