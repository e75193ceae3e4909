/* Between plan.c, which makes plans, and plan_text.c, which writes them down and reads them back. */
#ifndef FERRY_PLAN_PLAN_IN_H
#define FERRY_PLAN_PLAN_IN_H

#include "src/model/program.h"
#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Below this a conversation is no use; mapping the weights is then the better way out. */
enum { PLAN_LEAST_CTX = 1024 };

/* Context of a plan that nobody gave one and memory does not bind. */
uint32_t plan_default_ctx(const struct model *m);

/* Pages of n_seq sequences of n_ctx positions: in the only memory there is or the GPU's, and in the host's beside that; UINT64_MAX
 * past 64 bits. */
uint64_t plan_kv_bytes(const struct kv_shape *shape, const struct plan *p);
uint64_t plan_kv_host_bytes(const struct kv_shape *shape, const struct plan *p);
/* Of all sequences' records of recurrent layers, of so many bytes each. */
uint64_t plan_record_bytes(uint64_t record_bytes, const struct plan *p);
/* What a refusal says of them; "" for 0. */
const char *plan_say_records(uint64_t record_bytes, char *out, size_t out_bytes);

/* What the budget has to hold: mapped weights do not count. */
uint64_t plan_must_fit_bytes(const struct plan *p);

/* The share of the (mapped) weights that memory cannot hold beside the rest; 0: all fit. */
double plan_missing_share(const struct plan *p);

/* Does it fit memory and, with a GPU, the GPU's? */
bool plan_fits(const struct plan *p);

/* Another context: count what depends on it anew. */
void plan_set_ctx(const struct plan_in *in, const struct kv_shape *shape, uint32_t n_ctx, struct plan *p);

/* The longest context that fits, in whole pages, if there is one of at least floor positions; false: the plan is as it was. The
 * chunk stays what it is (scratch was counted with it), so a context is never shorter than that. */
bool plan_lower_ctx(const struct plan_in *in, const struct kv_shape *shape, uint32_t floor, struct plan *p);

/* Count weights, and slots of slot_ram_bytes, anew. ERR_NOMEM, ERR_LIMIT. */
int plan_count_weights(const struct model *m, struct plan *p);

/* What slots may take instead of what they do: all that the budget has left. */
uint64_t plan_slot_room(const struct plan *p);

/* ERR_LIMIT, with the numbers of memory, or of the GPU where it is that which does not fit. */
int plan_refuse(const struct plan *p, const struct plan_in *in);

/* ---- the GPU's part (plan_gpu.c), for plans with one ---- */

/* What is wanted of it. ERR_ARG, ERR_LIMIT, ERR_UNSUPPORTED. */
int plan_gpu_choose(const struct plan_in *in, const struct plan_opts *o, struct plan *p);

/* Activations and scratch, of both sides. before: of the CPU's layers; NULL: it has none. */
void plan_gpu_scratch(const struct plan_in *in, const struct program *program, const struct program *before,
                      const struct program *half, struct plan *p);

/* Its weights, and slots for the other experts. ERR_NOMEM, ERR_LIMIT, ERR_FORMAT (experts without a place). */
int plan_gpu_weights(const struct model *m, struct plan *p);

/* What depends on the context, and the sum. */
void plan_gpu_total(const struct plan_in *in, const struct kv_shape *shape, struct plan *p);

/* As many layers as fit, as many of their experts as fit beside the rest; slots for the others in what memory is left. ERR_LIMIT with
 * the numbers. */
int plan_gpu_fit(const struct plan_in *in, const struct plan_opts *o, struct kv_shape *shape, struct plan *p);
int plan_gpu_refuse(const struct plan *p, const struct plan_in *in);

/* Count every byte of a plan whose choices are made. ERR_UNSUPPORTED, ERR_NOMEM. */
int plan_count(const struct plan_in *in, struct kv_shape *shape, struct plan *p);

/* plan_make() with the GPU of in, even where the CPU alone would be faster. */
int plan_make_with_gpu(const struct plan_in *in, struct plan *out);

/* Seconds of a chat's turn, by which plans are compared; 0: not known. */
double plan_turn_s(const struct plan *p);

/* Does the counted plan fit? Then predict its speed. ERR_LIMIT with the numbers by purpose. */
int plan_check(const struct plan_in *in, struct plan *p);

#ifdef __cplusplus
}
#endif
#endif
