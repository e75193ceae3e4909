/* Between plan.c, which makes plans, and plan_text.c, which writes them down and reads them back. */
#ifndef FERRY_PLAN_PLAN_IN_H
#define FERRY_PLAN_PLAN_IN_H

#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Context of a plan that nobody gave one and memory does not bind. */
uint32_t plan_default_ctx(const struct model *m);

/* Pages of n_seq sequences of n_ctx positions; UINT64_MAX past 64 bits. */
uint64_t plan_kv_bytes(const struct kv_shape *shape, const struct plan *p);

/* What the budget has to hold: mapped weights do not count. */
uint64_t plan_must_fit_bytes(const struct plan *p);

/* The share of the (mapped) weights that memory cannot hold beside the rest; 0: all fit. */
double plan_missing_share(const struct plan *p);

/* Count every byte of a plan whose choices are made. ERR_UNSUPPORTED, ERR_NOMEM. */
int plan_count(const struct plan_in *in, struct kv_shape *shape, struct plan *p);

/* Seconds of a chat's turn, by which plans are compared; 0: not known. */
double plan_turn_s(const struct plan *p);

/* Does the counted plan fit? Then predict its speed. ERR_LIMIT with the numbers by purpose. */
int plan_check(const struct plan_in *in, struct plan *p);

#ifdef __cplusplus
}
#endif
#endif
