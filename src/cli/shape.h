/* Shapes of well-known models, for planning without a file: the header that such a file would have is made in memory. */
#ifndef FERRY_CLI_SHAPE_H
#define FERRY_CLI_SHAPE_H

#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Multi-head latent attention: ranks of queries (0: they are not compressed) and of keys and values, values of a head that are rotated,
 * that are not, and that it gives. And of experts: how many are always on, groups, of which so many are chosen (0: none), and whether a
 * bias takes part in the choice. */
struct shape_latent {
    int q_rank, kv_rank, n_rot, n_nope, n_v;
    int n_shared, n_group, n_group_used;
    bool has_select_bias;
};

struct shape {
    const char *name, *arch;
    int n_layer, n_embd, n_head, n_head_kv, head_dim;
    int n_expert, n_used, n_ff;
    int n_dense;    /* layers without experts in front */
    int n_ff_dense; /* of these; 0: as of an expert */
    int n_vocab, n_ctx, window;
    bool is_qk_plain;                  /* q and k have no norms */
    bool is_mxfp4;                     /* experts MXFP4, the rest Q8_0; otherwise the mix of most downloads, Q4_K_M */
    const struct shape_latent *latent; /* view; NULL: plain attention */
    int n_key_head, n_value_head;      /* of gated delta nets; 0: there are none */
};

/* The row of that name, or NULL; all rows, the last with a NULL name. */
const struct shape *shape_find(const char *name);
const struct shape *shape_all(void);

/* A model of that shape, whose weights nobody can read. ERR_UNSUPPORTED for an architecture that ferry cannot run; ERR_NOMEM.
 * Caller closes it with model_close. */
int shape_open(const struct shape *shape, struct model **out);

#ifdef __cplusplus
}
#endif
#endif
