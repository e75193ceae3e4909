/* Shared beginnings: a radix tree over the prompts of those who run and of some who ran, and whose KV pages hold them. Pages
 * themselves are shared by cache_fork: counted, and copied by whoever writes into a shared one first. One thread. */
#ifndef FERRY_RUN_PREFIX_H
#define FERRY_RUN_PREFIX_H

#include <stdbool.h>
#include <stdint.h>

#include "src/run/cache.h"

#ifdef __cplusplus
extern "C" {
#endif

struct prefix;
struct prefix_node;

/* One who runs, kept by its owner from join to leave. */
struct prefix_user {
    struct cache_seq *seq;    /* own; its first tokens are those of the path to leaf, as far as it has come */
    struct prefix_node *leaf; /* view; NULL: joined nothing */
    struct prefix_user *next; /* view: another of the same leaf */
};

/* cache: view, outlives the tree. ERR_NOMEM. */
int prefix_open(struct cache *cache, struct prefix **out);
void prefix_close(struct prefix *p); /* after all users left; takes NULL */

struct prefix_match {
    int64_t n_now;             /* tokens whose pages can be shared at once */
    int64_t n_soon;            /* tokens that `maker` is on the way to; 0: nobody is further than n_now */
    struct prefix_user *maker; /* view, until it leaves */
};

/* What there is for a prompt that begins with tokens (n). */
void prefix_look(const struct prefix *p, const int32_t *tokens, int64_t n, struct prefix_match *out);

/* Give user a sequence that shares all that can be had at once (cache_len(user->seq) says how much), and let others share
 * tokens (n) with it from now on. ERR_NOMEM, ERR_LIMIT when no sequence is left; nothing has changed then. */
int prefix_join(struct prefix *p, const int32_t *tokens, int64_t n, struct prefix_user *user);

/* Free user's sequence. What it held of its tokens stays for others, until prefix_shrink; without_trace: does not. */
void prefix_leave(struct prefix *p, struct prefix_user *user, bool without_trace);

/* Let go of the pages that were wanted longest ago and that no user holds the tree to. false: there are none. */
bool prefix_shrink(struct prefix *p);

/* The same of pages of which some are the device's, in a cache that lies on two sides, and nobody else's. */
bool prefix_leave_device(struct prefix *p);

#ifdef __cplusplus
}
#endif
#endif
