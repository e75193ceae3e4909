/* Every weight byte in flight or resident. The store fetches weights as the plan says and lends them out; nobody else reads
 * the model's files after open. */
#ifndef FERRY_RUN_STORE_H
#define FERRY_RUN_STORE_H

#include <stdbool.h>
#include <stdint.h>

#include "src/model/model.h"
#include "src/plan/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

struct store;
struct trace;
struct file_ops;

struct store_args {
    const struct model *model;  /* view, outlives the store */
    const struct plan *plan;    /* copied: io and sizes */
    struct device *device;      /* view, outlives the store: with a GPU in the plan, that GPU; otherwise NULL */
    const struct file_ops *ops; /* view, outlives the store; NULL: plain files */
    struct trace *trace;        /* view, outlives the store; NULL: nobody wants to know */
    /* While loading; false stops (ERR_CANCEL). May be NULL. */
    bool (*progress)(uint64_t done, uint64_t total, void *arg);
    void *progress_arg;
    /* Tests: as in ring_args (io/ring.h), of the reads of experts. */
    int (*read_fault)(void *arg, uint64_t off, int res);
    void *read_fault_arg;
};

/* Bytes of anonymous memory that holding this model's weights takes (0 when mapped), rounding included: layout.bytes of
 * model/layout.h, which the plan counts with. UINT64_MAX when even the table for it finds no memory. */
uint64_t store_bytes(const struct model *m, enum plan_io io);

/* Load (or map) the weights: dense ones of the device's layers and some of their experts into its memory, where there is one, and the
 * other experts into slots if there is room for all; of other experts that have slots (plan.slot_ram_bytes) none yet. ERR_IO names file,
 * offset and bytes; ERR_NOMEM; ERR_DEVICE; ERR_CANCEL; ERR_STATE when a file is no longer the one whose header was read (size or time
 * changed). */
int store_open(const struct store_args *args, struct store **out);
void store_close(struct store *s); /* takes NULL */

/* Is all that was lent since the last such question what the files held when they were opened? Mapped files show at once what is
 * written to them; what is read is checked as it comes. ERR_STATE names the file and what changed. Exec thread. */
int store_check(struct store *s);

/* A dense weight's bytes, by its index in model.weights: aligned as in its file (at least to 8), in the device's memory if there is
 * one. View until close; NULL for what lies in the other memory alone, and for a stack of experts (lease those), unless that memory is
 * the device's and holds all of it for good. */
const void *store_weight(const struct store *s, int weight);

/* The same in the host's memory, where the plan has layers before the device's, or no device. */
const void *store_host_weight(const struct store *s, int weight);

/* All of the latter, in one piece of memory (mem_map); it stays the store's. */
void store_host_memory(const struct store *s, void **memory, uint64_t *bytes);

/* The same as a copy in the host's memory: dst has room for layout_weight_bytes() (model/layout.h). ERR_DEVICE. */
int store_copy_weight(const struct store *s, int weight, void *dst);

/* Are weights in the memory of a device that has its own? And all experts of a layer? */
bool store_has_device(const struct store *s);
bool store_is_on_device(const struct store *s, int layer);

/* Where an expert of a layer is now. */
enum store_place { STORE_ON_DEVICE, STORE_IN_MEMORY, STORE_ON_DISK };
enum store_place store_where(const struct store *s, int layer, int expert);

/* Of a layer, those on disk. */
int store_n_on_disk(const struct store *s, int layer);

/* From the next loan on, lend what lies on the device (false: as if it did not, but for layers of which it has all experts). */
void store_use_device(struct store *s, bool use);

/* One expert of a layer, readable until the next store_next of its lease, or its release. */
struct store_expert {
    int expert;
    bool on_device;   /* w is memory of the device */
    bool is_pinned;   /* w is the host's, and a device may copy it from there (device.h: pin) */
    const void *w[3]; /* gate, up, down; any alignment */
};

/* An expert that is in the host's memory, without a loan: readable until the next call. False: it is not. */
bool store_peek(const struct store *s, int layer, int expert, struct store_expert *out);

/* A loan of some experts of one layer; plain value, zero it first. */
struct store_lease {
    int layer, n, n_given;
    const int32_t *ids;
    int n_seen; /* of ids, looked for on the device */
    bool open;
};

/* Begin a loan of experts ids (n different ones, view until release): starts reading the absent ones, never waits for them. It
 * may be larger than the slots are: what was given is let go by the next store_next, and its slot used for the rest. With
 * slots there is one loan at a time (ERR_STATE). On failure there is no loan. Exec thread. ERR_ARG, ERR_IO. */
int store_lease(struct store *s, int layer, const int32_t *ids, int n, struct store_lease *lease);

/* Up to max experts of the loan that are readable and were not given yet: first those on the device, alone, then resident ones.
 * wait: block until there is one. *n_out is 0 when all were given, or none is ready and wait is false. ERR_IO (file, offset,
 * bytes) when one could not be read, ERR_STATE when its file is not the one that was opened; then the loan may be walked on,
 * which tries the same ones again, or released. */
int store_next(struct store *s, struct store_lease *lease, bool wait, struct store_expert *out, int max, int *n_out);

/* The host has computed these experts, which the last store_next gave it, beside a device: one of them may be chosen to move there, if it
 * is wanted more than one that is there. Where there is no device it does nothing. */
void store_offer(struct store *s, const struct store_lease *lease, const struct store_expert *experts, int n);

/* Is an expert on its way to the device? Then store_move_on, between loans, copies the next piece of it into pinned memory and sends it
 * off, or sees whether all has come. The host is to call it when it would wait anyway. *is_more: there are pieces left. ERR_DEVICE:
 * that expert does not move, and the one whose place it was to have has none. */
bool store_is_moving(const struct store *s);
int store_move_on(struct store *s, bool *is_more);

/* Hold the memory of a pinned expert of the present loan, which a device copies from, until the next loan begins: the device has to be done
 * with it then. False: too many are held already; it may be let go by the next store_next. */
bool store_keep(struct store *s, const struct store_lease *lease, int expert);

/* Experts that the next loan, of this layer, will likely want: read in what time the disk has left once all that the open loan
 * wants is on its way. Advice: takes no loan and evicts none, forgets the hint before it, and never fails. Where all experts
 * are resident, or are read by pread, it does nothing. What was read stays at least until that loan begins. ids are copied. */
void store_hint(struct store *s, int layer, const int32_t *ids, int n);

/* Experts of a layer that loans of the host's have wanted so far, those of most loans first: at most n of them into ids. Returns how many;
 * 0 where none have slots. */
int store_favourites(const struct store *s, int layer, int n, int32_t *ids);

/* Between loans: with so many reads in flight another expert is not begun from now on, PLAN_LEAST_READS to PLAN_MAX_READS. Without
 * slots it does nothing. */
void store_set_reads(struct store *s, int n);

/* End the loan, also one that failed or was not walked to its end. */
void store_release(struct store *s, struct store_lease *lease);

struct store_stats {
    uint64_t load_bytes, load_ns;      /* at open */
    uint64_t resident_bytes;           /* memory for weights: slots too, filled or not */
    uint64_t disk_bytes, disk_wait_ns; /* since open, after loading */
    uint64_t
        disk_busy_ns; /* while any read was in flight, as far as was seen: the end of one that nobody waits for is seen late */
    uint64_t n_expert_hits, n_expert_misses; /* experts on loan that were there, or on their way; that had to be read */
    uint64_t n_device_hits;                  /* of the former, on the device */
    uint64_t n_moves, move_bytes; /* experts that have moved to the device since it was loaded; bytes staged for that */
    uint64_t n_repeats;           /* reads that failed once and were repeated, at open too */
    uint64_t n_hint_reads, n_hint_hits;  /* experts read because of a hint; of these, wanted before they had to go */
    uint64_t hint_bytes, hint_hit_bytes; /* theirs */
    uint64_t n_guessed,
        n_guessed_rightly; /* experts on loan in layers that some were hinted at; of these, named by the hint */
    uint64_t pinned_bytes; /* of the slots, for a device that copies from them */
};
void store_stats(const struct store *s, struct store_stats *out);

#ifdef __cplusplus
}
#endif
#endif
