/* A file for the KV pages of sequences that gave theirs back: written when they are taken away, read when the sequence goes on. The
 * file has no name, so that nothing of it is left whatever ends the process, and grows as it is needed. One thread. */
#ifndef FERRY_RUN_SPILL_H
#define FERRY_RUN_SPILL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct spill;
struct cache;
struct cache_seq;

/* How the system is asked; tests plug in one that fails. Results are a count, else -errno. */
struct spill_ops {
    void *ctx; /* view: passed to each call */
    int64_t (*write_at)(void *ctx, int fd, const void *p, size_t n_bytes, uint64_t off);
    int64_t (*read_at)(void *ctx, int fd, void *p, size_t n_bytes, uint64_t off);
};

struct spill_args {
    const char *dir;             /* where the file lies; looked at, not kept */
    const struct cache *cache;   /* view, outlives the spill; without windows */
    int64_t chunk_tok;           /* the cache's */
    const struct spill_ops *ops; /* view until close; NULL: the system */
};

/* One sequence's pages; zeroed: nothing. */
struct spilled {
    int32_t *place; /* own: (n_places) in the file, group by group, then slot by slot */
    int64_t n_places, len;
};

/* ERR_IO (the folder takes no file), ERR_NOMEM. */
int spill_open(const struct spill_args *args, struct spill **out);
void spill_close(struct spill *s); /* takes NULL */

/* Keep all that seq holds, at least one position; it stays as it is. After an error (ERR_IO, say a full disk; ERR_NOMEM,
 * ERR_DEVICE) out is zeroed. */
int spill_save(struct spill *s, const struct cache_seq *seq, struct spilled *out);

/* Bring seq, which holds the first of the same tokens, or none, as far as what was kept goes, or as there are free pages. After an
 * error (ERR_IO, ERR_DEVICE) it is whole, but shorter. What was kept is dropped in any case. */
int spill_load(struct spill *s, struct spilled *what, struct cache_seq *seq);
void spill_drop(struct spill *s, struct spilled *what);

/* What keeping n_tok positions and getting them back takes, as far as it has been measured; 0: not yet. */
double spill_ns(const struct spill *s, int64_t n_tok);

#ifdef __cplusplus
}
#endif
#endif
