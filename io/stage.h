/* Aligned counted buffers that bytes pass through on their way from disk. Where the memory comes from is an argument,
 * so that pinned memory can be had from a device that io/ never sees. */
#ifndef FERRY_IO_STAGE_H
#define FERRY_IO_STAGE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Slots begin on such a boundary: what O_DIRECT asks of memory. */
#define STAGE_ALIGN 4096

struct stage_alloc {
    void *ctx;                                 /* view until stage_close */
    void *(*alloc)(void *ctx, uint64_t bytes); /* NULL when there is none; any alignment */
    void (*free)(void *ctx, void *p, uint64_t bytes);
};

/* Pages from mem_map(), tag MEM_STAGE. */
extern const struct stage_alloc stage_plain;

struct stage;

/* n_slots buffers of slot_bytes each, rounded up to STAGE_ALIGN, in one allocation. alloc is a view until stage_close;
 * NULL: stage_plain. ERR_NOMEM, ERR_ARG, ERR_LIMIT (size beyond 2^64). */
int stage_open(const struct stage_alloc *alloc, int n_slots, uint64_t slot_bytes, struct stage **out);
void stage_close(struct stage *s); /* takes NULL; every slot has to be released (our own bug otherwise) */

/* What stage_open will ask of the allocator; 0 on overflow. For plans. */
uint64_t stage_bytes(int n_slots, uint64_t slot_bytes);

/* A free slot, held once; -1 when all are held. Any thread. */
int stage_take(struct stage *s);
/* Hold a held slot once more, so that two readers can part independently; give one hold back. Any thread. */
void stage_hold(struct stage *s, int slot);
void stage_release(struct stage *s, int slot);

void *stage_slot(const struct stage *s, int slot); /* its memory: a view while held */
int stage_n_free(const struct stage *s);           /* as of now; other threads may change it */

/* All slots together, for registering with the ring. */
void *stage_base(const struct stage *s);

#ifdef __cplusplus
}
#endif
#endif
