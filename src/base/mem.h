/* Every allocation of ferry: counted by purpose, so that a plan's bytes can be held against what was really taken. */
#ifndef FERRY_BASE_MEM_H
#define FERRY_BASE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum mem_tag { MEM_META, MEM_WEIGHTS, MEM_KV, MEM_SCRATCH, MEM_STAGE, MEM_TOK, MEM_OTHER, MEM_N_TAG };

/* Small things. mem_alloc gives uninitialised bytes, mem_zalloc n * item_bytes zeroed ones with the product checked.
 * Alignment 64. NULL when memory is out or the product overflows (no err() text: the caller knows what it was for).
 * A size of 0 gives a valid pointer. Any thread. */
void *mem_alloc(size_t bytes, enum mem_tag tag);
void *mem_zalloc(size_t n, size_t item_bytes, enum mem_tag tag);

/* Grow or shrink what the two above gave (p may be NULL); on NULL the old block stands. */
void *mem_realloc(void *p, size_t bytes, enum mem_tag tag);
char *mem_strdup(const char *s, enum mem_tag tag);
void mem_free(void *p); /* takes NULL */

/* Big things: whole pages of zeroed anonymous memory, huge pages asked for from 2 MiB on. 4 KiB aligned (2 MiB from 2 MiB on). */
void *mem_map(uint64_t bytes, enum mem_tag tag);
void mem_unmap(void *p, uint64_t bytes, enum mem_tag tag); /* takes NULL; bytes as asked of mem_map */

/* How pages of mapped memory that are not there yet shall lie on NUMA nodes, bit i of nodes being node i: page by page in turn, or on
 * those alone. False: the system refuses it (a sandbox, nodes that this process may not use). */
enum mem_spread { MEM_INTERLEAVED, MEM_BOUND };
bool mem_place(void *p, uint64_t bytes, enum mem_spread spread, uint64_t nodes);

/* Bytes alive now, and the most that ever were, under one tag. */
uint64_t mem_live_bytes(enum mem_tag tag);
uint64_t mem_peak_bytes(enum mem_tag tag);
const char *mem_tag_name(enum mem_tag tag);

/* Tests: let the nth allocation from now on (1 = the next) fail once; 0 turns it off. Process-wide. */
void mem_fail_nth(uint64_t n);
/* Tests: allocations asked for since the last mem_fail_nth(). */
uint64_t mem_n_calls(void);

#ifdef __cplusplus
}
#endif
#endif
