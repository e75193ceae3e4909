/* The header of one GGUF file: from bytes to a list of keys and a list of tensors, each checked by itself. gguf.c owns
 * the files, looks names up, and checks what keys, tensors and parts say about each other. For gguf.c alone, but for
 * gguf_parse_shown(): whoever tells of a name shows it so. */
#ifndef FERRY_MODEL_GGUF_PARSE_H
#define FERRY_MODEL_GGUF_PARSE_H

#include <stdbool.h>
#include <stdint.h>

#include "src/model/gguf.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A header, while it is parsed and afterwards. All zeros but what is said to be set before is how it begins. */
struct gguf_header {
    struct gguf_part info; /* path (view), bytes: set before; header_bytes: set by gguf_parse */
    unsigned char *block;  /* own: the header, (block_bytes + 1), one more for a last NUL */
    uint64_t block_bytes, n_read_bytes;
    struct gguf_key *keys; /* own, with each key's array.start */
    uint64_t n_keys, key_room;
    struct gguf_tensor *tensors; /* own; off counts from the end of the header, still unchecked against the file */
    uint64_t n_tensors, tensor_room;
    uint32_t version;
    uint64_t hash; /* of the header bytes as they are in the file */
    bool is_head;  /* set before: only a file's beginning, which has to hold the header */
};

/* Where the bytes come from: all of them, or an error. */
struct gguf_source {
    void *ctx;
    int (*read)(void *ctx, uint64_t off, void *dst, uint64_t bytes);
};

/* h->info.path, h->info.bytes and h->is_head must be set, the rest zero. On failure too, gguf_parse_done has to be called. */
int gguf_parse(struct gguf_header *h, const struct gguf_source *source);
void gguf_parse_done(struct gguf_header *h);

/* A number of n_bytes as it lies in the file. */
uint64_t gguf_parse_number(const unsigned char *p, int n_bytes);

/* Name of a value type, and bytes of such a value; 0: it varies. */
const char *gguf_parse_type_name(enum gguf_type type);
int gguf_parse_type_bytes(enum gguf_type type);

/* One step of a hash that depends on every v so far. */
uint64_t gguf_parse_mix(uint64_t h, uint64_t v);

/* Names come from strangers and end on terminals: only what prints, and not too much of it. Returns buf. */
const char *gguf_parse_shown(const void *name, uint64_t n_bytes, char buf[80]);

#ifdef __cplusplus
}
#endif
#endif
