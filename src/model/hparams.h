/* Metadata to hyperparameters: reads a family's keys and checks every number. Used by model.c and the families. */
#ifndef FERRY_MODEL_HPARAMS_H
#define FERRY_MODEL_HPARAMS_H

#include "src/model/gguf.h"
#include "src/model/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Most values of what is compressed, of a head. */
#define HPARAMS_MAX_RANK (1 << 16)

/* Fill m->hp and m->layers (heads, ff, window) from the keys of m->arch, then let the family add its own. m->layers is
 * allocated here; n_vocab, n_ff_expert and n_ff_shared may stay 0 (the weights tell). ERR_FORMAT names key and number. */
int hparams_read(const struct gguf *g, struct model *m);

/* A whole number, or a finite float, in [lo, hi] from "<arch>.<what>"; a missing key leaves *out alone (hparams_int: only when
 * opt). ERR_FORMAT. */
int hparams_int(const struct gguf *g, const char *arch, const char *what, bool opt, int64_t lo, int64_t hi, int *out);
int hparams_f32(const struct gguf *g, const char *arch, const char *what, double lo, double hi, float *out);

/* For families whose files say how the router works: gating function and whether gates are normalised; what the file leaves out stays.
 * ERR_FORMAT. */
int hparams_router(const struct gguf *g, struct model *m);

/* The same for families whose routers are sigmoids unless the file says otherwise. */
int hparams_router_sigmoid(const struct gguf *g, struct model *m);

/* For families whose chosen experts' gates are divided by their sum, of which the files say nothing. */
int hparams_gates_sum_to_1(const struct gguf *g, struct model *m);

/* For families whose layers with windows rotate as the others do, unless the file names a base for them. ERR_FORMAT. */
int hparams_rope_alike(const struct gguf *g, struct model *m);

/* For families with sliding windows: the window (default_window if the file names none; 0: full attention then) and which
 * layers have it: all but the last of each pattern, unless the file says otherwise. ERR_FORMAT. */
int hparams_windows(const struct gguf *g, struct model *m, int default_window, int default_pattern);

/* For families with gated delta nets: their heads, and which layers are such: all but the last of each four, unless the file says
 * otherwise. ERR_FORMAT. */
int hparams_delta(const struct gguf *g, struct model *m);

/* Make m->rope[0] and, if some layer has a window, m->rope[1]. ERR_NOMEM. */
int hparams_rope(struct model *m);

#ifdef __cplusplus
}
#endif
#endif
