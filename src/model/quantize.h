/* A GGUF into another with smaller blocks: types by recipe, scales by importance, data streamed. Memory is bounded by the
 * threads, not by the model: each worker holds a slab of 2^18 elements. */
#ifndef FERRY_MODEL_QUANTIZE_H
#define FERRY_MODEL_QUANTIZE_H

#include <stdbool.h>
#include <stdint.h>

#include "src/model/gguf.h"
#include "src/model/recipe.h"

#ifdef __cplusplus
extern "C" {
#endif

struct file_ops;
struct out_ops;
struct imatrix;
struct quantize;

struct quantize_args {
    const struct gguf *gguf;       /* view until quantize_free, as are all pointers here */
    const struct file_ops *in_ops; /* how it is read; NULL: plainly */
    const struct recipe *recipe;
    bool pure;
    const struct imatrix *imatrix; /* NULL: all columns count alike */
    const char *imatrix_path;      /* kept in the metadata; NULL without imatrix */
    uint64_t part_bytes;           /* 0: one file */
};

/* What happens to one tensor. */
struct quantize_item {
    const struct gguf_tensor *tensor;
    struct recipe_choice choice;
    bool is_weighted; /* the importance matrix knows it */
    uint64_t bytes;   /* afterwards */
};

/* Choose all types and lay the result out; reads no data. ERR_FORMAT (metadata, an importance matrix of another shape), ERR_LIMIT,
 * ERR_NOMEM. */
int quantize_make(const struct quantize_args *args, struct quantize **out);
void quantize_free(struct quantize *q); /* takes NULL */

const struct quantize_item *quantize_item(const struct quantize *q, int tensor);
uint64_t quantize_bytes(const struct quantize *q); /* of the result, headers included */
int quantize_n_parts(const struct quantize *q);

struct quantize_run {
    const char *path;              /* of the result; parts get names of their own */
    const struct out_ops *out_ops; /* NULL: plainly */
    int n_threads;
    /* Run fn(worker, arg) for each worker 0..n_threads - 1, at once or not, and return when all have; worker 0 in the calling thread.
     * NULL: n_threads is 1. */
    void (*team)(void *team_arg, void (*fn)(int worker, void *arg), void *arg);
    void *team_arg;
    /* Bytes of input done, of all; called by the calling thread. false: stop. NULL: nobody wants to know. */
    bool (*progress)(void *progress_arg, uint64_t done, uint64_t total);
    void *progress_arg;
};

/* Do it, once. The result is there whole, or not at all. The same bytes for any number of threads. ERR_IO, ERR_NOMEM,
 * ERR_STATE (the input changed), ERR_FORMAT (a NaN or an infinity in it), ERR_LIMIT (a value too large for the type),
 * ERR_ARG (the result would replace the input), ERR_CANCEL. */
int quantize_run(struct quantize *q, const struct quantize_run *run);

#ifdef __cplusplus
}
#endif
#endif
