/* Owns the file, and which places of it are free. A place holds a page of any group; it begins at a multiple of the block that
 * O_DIRECT wants, which keeps pages out of the system's cache: that would take from the memory that was too small. */
#include "src/run/spill.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/device/device.h"
#include "src/run/cache.h"

#define BLOCK_BYTES 4096

struct spill {
    struct spill_args args; /* dir: not used after open */
    int fd;
    uint64_t place_bytes;
    void *page;                 /* own: (place_bytes) on its way */
    int32_t *free_place;        /* own: (cap_free) a stack of n_free */
    int64_t n_free, cap_free;   /* cap_free: room for all places that there are */
    int64_t n_places;           /* of the file */
    uint64_t moved_ns, n_moved; /* pages written or read, and how long that took */
};

static int64_t plain_write_at(void *ctx, int fd, const void *p, size_t n_bytes, uint64_t off)
{
    (void)ctx;
    ssize_t n = pwrite(fd, p, n_bytes, (off_t)off);
    return n < 0 ? -errno : n;
}

static int64_t plain_read_at(void *ctx, int fd, void *p, size_t n_bytes, uint64_t off)
{
    (void)ctx;
    ssize_t n = pread(fd, p, n_bytes, (off_t)off);
    return n < 0 ? -errno : n;
}

static const struct spill_ops plain = {NULL, plain_write_at, plain_read_at};

/* ---- open and close ---- */

static int open_file(struct spill *s)
{
    const int flags = O_TMPFILE | O_RDWR | O_CLOEXEC;

    s->fd = open(s->args.dir, flags | O_DIRECT, 0600);
    if (s->fd < 0 && errno == EINVAL) /* a file system in memory */
        s->fd = open(s->args.dir, flags, 0600);
    return s->fd < 0 ? err(ERR_IO, "a file for KV pages in %s: %s", s->args.dir, strerror(errno)) : 0;
}

int spill_open(const struct spill_args *args, struct spill **out)
{
    *out = NULL;
    struct spill *s = mem_zalloc(1, sizeof *s, MEM_META);
    if (!s)
        return err(ERR_NOMEM, "the state of spilled pages");
    s->args = *args;
    s->fd = -1;
    if (!s->args.ops)
        s->args.ops = &plain;
    for (int group = 0; group < cache_n_groups(args->cache); group++)
        if (cache_page_bytes(args->cache, group) > s->place_bytes)
            s->place_bytes = cache_page_bytes(args->cache, group);
    s->place_bytes = size_up(s->place_bytes, BLOCK_BYTES);
    int rc = open_file(s);
    if (rc == 0) {
        s->page = mem_map(s->place_bytes, MEM_SCRATCH);
        rc = s->page ? 0 : err(ERR_NOMEM, "a KV page of %" PRIu64 " bytes", s->place_bytes);
    }
    s->args.dir = NULL;
    if (rc < 0) {
        spill_close(s);
        return rc;
    }
    *out = s;
    return 0;
}

void spill_close(struct spill *s)
{
    if (!s)
        return;
    if (s->fd >= 0)
        close(s->fd);
    mem_unmap(s->page, s->page ? s->place_bytes : 0, MEM_SCRATCH);
    mem_free(s->free_place);
    mem_free(s);
}

/* ---- places ---- */

/* One that is free, or a new one. Room to give it back is made now, so that dropping cannot fail. */
static int take_place(struct spill *s, int32_t *out)
{
    if (s->n_free > 0) {
        *out = s->free_place[--s->n_free];
        return 0;
    }
    if (s->n_places == s->cap_free) {
        int64_t cap = s->cap_free ? 2 * s->cap_free : 64;
        int32_t *p = cap > INT32_MAX ? NULL : mem_realloc(s->free_place, (size_t)cap * sizeof *p, MEM_META);
        if (!p)
            return err(ERR_NOMEM, "places for %" PRId64 " spilled pages", cap);
        s->free_place = p;
        s->cap_free = cap;
    }
    *out = (int32_t)s->n_places++;
    return 0;
}

void spill_drop(struct spill *s, struct spilled *what)
{
    for (int64_t i = 0; i < what->n_places; i++)
        s->free_place[s->n_free++] = what->place[i];
    mem_free(what->place);
    *what = (struct spilled){0};
}

/* ---- pages ---- */

static int move(struct spill *s, int32_t place, bool is_write)
{
    const struct spill_ops *ops = s->args.ops;
    uint64_t off = (uint64_t)place * s->place_bytes, start_ns = clock_ns();

    for (uint64_t done = 0; done < s->place_bytes;) {
        char *p = (char *)s->page + done;
        int64_t n = is_write ? ops->write_at(ops->ctx, s->fd, p, s->place_bytes - done, off + done)
                             : ops->read_at(ops->ctx, s->fd, p, s->place_bytes - done, off + done);
        if (n == -EINTR)
            continue;
        if (n <= 0)
            return err(ERR_IO, "%s a KV page of %" PRIu64 " bytes: %s", is_write ? "keeping" : "getting back",
                       s->place_bytes, n < 0 ? strerror((int)-n) : "nothing was moved");
        done += (uint64_t)n;
    }
    s->moved_ns += clock_ns() - start_ns;
    s->n_moved++;
    return 0;
}

static int64_t slots_of(int64_t n_tok)
{
    return (n_tok + DEVICE_PAGE_TOK - 1) / DEVICE_PAGE_TOK;
}

/* Groups that have pages. */
static int n_groups(const struct spill *s)
{
    int n = 0;

    for (int group = 0; group < cache_n_groups(s->args.cache); group++)
        n += cache_page_bytes(s->args.cache, group) > 0;
    return n;
}

static int save_page(struct spill *s, const struct cache_seq *seq, int group, int64_t slot, struct spilled *out)
{
    int32_t place = 0;
    int rc = cache_save_page(seq, group, slot, s->page);

    if (rc == 0)
        rc = take_place(s, &place);
    if (rc < 0)
        return rc;
    out->place[out->n_places++] = place;
    return move(s, place, true);
}

int spill_save(struct spill *s, const struct cache_seq *seq, struct spilled *out)
{
    int64_t n_slots = slots_of(cache_len(seq));
    int rc = 0;

    *out = (struct spilled){.len = cache_len(seq)};
    out->place = mem_alloc((size_t)(n_slots * n_groups(s)) * sizeof *out->place, MEM_META);
    if (!out->place)
        rc = err(ERR_NOMEM, "places of %" PRId64 " spilled pages", n_slots * n_groups(s));
    for (int group = 0; group < cache_n_groups(s->args.cache); group++)
        for (int64_t slot = 0; slot < n_slots && rc == 0 && cache_page_bytes(s->args.cache, group) > 0; slot++)
            rc = save_page(s, seq, group, slot, out);
    if (rc < 0)
        spill_drop(s, out);
    return rc;
}

/* The pages of positions [len, len + n), which lie in one slot and are reserved. */
static int load_slot(struct spill *s, const struct spilled *what, struct cache_seq *seq)
{
    int64_t slot = cache_len(seq) / DEVICE_PAGE_TOK, n_slots = slots_of(what->len);
    int rc = 0, nth = 0;

    for (int group = 0; group < cache_n_groups(s->args.cache) && rc == 0; group++) {
        if (cache_page_bytes(s->args.cache, group) == 0)
            continue;
        rc = move(s, what->place[nth++ * n_slots + slot], false);
        if (rc == 0)
            rc = cache_load_page(seq, group, slot, s->page);
    }
    return rc;
}

int spill_load(struct spill *s, struct spilled *what, struct cache_seq *seq)
{
    int rc = 0;

    while (rc == 0 && cache_len(seq) < what->len) {
        int64_t len = cache_len(seq), n = DEVICE_PAGE_TOK - len % DEVICE_PAGE_TOK;
        n = n < what->len - len ? n : what->len - len;
        n = n < s->args.chunk_tok ? n : s->args.chunk_tok;
        if (!cache_has_room(seq, n))
            break;
        rc = cache_reserve(seq, n);
        if (rc == 0)
            rc = load_slot(s, what, seq);
        cache_commit(seq, rc == 0 ? n : 0);
    }
    spill_drop(s, what);
    return rc;
}

double spill_ns(const struct spill *s, int64_t n_tok)
{
    double n_pages = (double)(slots_of(n_tok) * n_groups(s));

    return s->n_moved ? 2 * n_pages * (double)s->moved_ns / (double)s->n_moved : 0;
}
