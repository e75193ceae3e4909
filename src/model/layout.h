/* Where a model's weights lie when they are held in memory: as in the files, but without the stretches that nobody uses.
 * Blocks of 4 KiB of a file become blocks of 4 KiB of memory, so that reads past the page cache (O_DIRECT) put weights in
 * their place. Pure arithmetic: the planner counts with it, the store lays out with it. */
#ifndef FERRY_MODEL_LAYOUT_H
#define FERRY_MODEL_LAYOUT_H

#include <stdint.h>

#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LAYOUT_BLOCK_BYTES 4096

/* A stretch of a file without a block that no weight uses. */
struct layout_range {
    int file;
    uint64_t off, end;   /* in the file; whole blocks: the last one may reach past the file's end */
    uint64_t data_end;   /* where the last weight of the stretch ends */
    uint64_t memory_off; /* of the first block, in memory */
};

struct layout {
    struct layout_range *ranges; /* own: (n_ranges) by file and offset */
    int n_ranges;
    uint64_t *weight_off; /* own: (model.n_weights) of the weight's first byte, in memory */
    uint64_t bytes;       /* of memory; whole blocks */
};

/* ERR_NOMEM; ERR_LIMIT when offsets overflow. On failure there is nothing to be done with *out. */
int layout_init(const struct model *m, struct layout *out);

/* The same of a span alone, without stacks of experts, for a store that reads those when they are wanted. weight_off of what has no place
 * is 0. */
int layout_init_dense(const struct model *m, struct model_span span, struct layout *out);

/* The same with the first n_expert[layer] (n_layer) matrices of each stack: a place for so many experts of a layer, whichever. */
int layout_init_part(const struct model *m, struct model_span span, const int *n_expert, struct layout *out);
void layout_done(struct layout *l);

/* Share n places for experts among the layers from first_layer on that have some, as evenly as their numbers allow, lower layers first:
 * n_expert (n_layer). Returns how many found one. */
uint32_t layout_share(const struct model *m, int first_layer, uint32_t n, int *n_expert);

/* Bytes of a weight in the file: rows times matrices. */
uint64_t layout_weight_bytes(const struct weight *w);

#ifdef __cplusplus
}
#endif
#endif
