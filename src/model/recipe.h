/* Which type each tensor of a file gets when it is quantized: the mixtures that people download, chosen tensor by tensor as
 * llama-quantize chooses them. Pure: reads names, shapes and metadata, no data. */
#ifndef FERRY_MODEL_RECIPE_H
#define FERRY_MODEL_RECIPE_H

#include <stdbool.h>
#include <stdint.h>

#include "src/model/gguf.h"

#ifdef __cplusplus
extern "C" {
#endif

enum recipe_mix {
    RECIPE_Q4_0,
    RECIPE_Q4_1,
    RECIPE_Q5_0,
    RECIPE_Q5_1,
    RECIPE_Q8_0,
    RECIPE_Q2_K,
    RECIPE_Q2_K_S,
    RECIPE_Q3_K_S,
    RECIPE_Q3_K_M,
    RECIPE_Q3_K_L,
    RECIPE_Q4_K_S,
    RECIPE_Q4_K_M,
    RECIPE_Q5_K_S,
    RECIPE_Q5_K_M,
    RECIPE_Q6_K,
    RECIPE_IQ4_NL,
    RECIPE_IQ4_XS,
    RECIPE_MXFP4,
    RECIPE_MXFP4_MOE,
    RECIPE_F16,
    RECIPE_BF16,
    RECIPE_F32
};

struct recipe {
    const char *name;
    enum recipe_mix mix;
    enum quant_type type; /* of what no rule mentions */
    int file_type;        /* general.file_type */
    const char *about;
};

/* The row with that name, case-insensitive; NULL if none. */
const struct recipe *recipe_find(const char *name);

/* Row i; NULL past the last one. Aliases ("Q4_K" for "Q4_K_M") are rows too. */
const struct recipe *recipe_at(int i);

struct recipe_choice {
    enum quant_type type;
    bool is_kept;     /* as it is: norms, biases, routers, whatever is no matrix */
    bool is_fallback; /* its rows are no multiple of the wanted type's block */
};

struct recipe_options {
    bool pure;        /* one type for all matrices, no mixture */
    bool has_imatrix; /* some rules spend more bits where there is none */
};

/* Choose for every tensor. choices: (gguf_n_tensors). ERR_FORMAT for metadata of the wrong type, ERR_NOMEM. */
int recipe_choose(const struct recipe *recipe, const struct gguf *g, const struct recipe_options *options,
                  struct recipe_choice *choices);

#ifdef __cplusplus
}
#endif
#endif
