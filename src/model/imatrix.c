/* Owns the index of an importance matrix and its open file.
 * .dat: i32 entries; per entry i32 length and bytes of the name, i32 calls, i32 values, float32 values (mean square times
 * calls); optionally i32 chunks, i32 length and bytes of the data set's name. GGUF: per weight two float32 tensors,
 * NAME.in_sum2 (columns, experts) of sums of squares and NAME.counts (1, experts) of how many were summed. */
#include "src/model/imatrix.h"

#include "io/file.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/gguf.h"
#include "src/model/gguf_parse.h"
#include "src/model/table.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#define MAX_ENTRIES (1 << 20)
#define MAX_NAME 4096
#define PIECE_FLOATS 16384 /* read at a time while checking: 64 KiB */

struct imatrix_entry {
    char *name; /* own; first, as table wants it */
    uint64_t off, n_values;
    uint64_t counts_off, n_counts; /* n_counts 0: one count for all, which is `calls` */
    float calls;
};

struct imatrix {
    struct file *file;             /* own */
    struct imatrix_entry *entries; /* own */
    uint64_t n_entries, room;
    struct table by_name;
    uint64_t n_chunks;
    char *dataset; /* own; NULL: unknown */
};

/* ---- entries ---- */

static int add_entry(struct imatrix *im, const char *name, size_t n_name, const struct imatrix_entry *entry)
{
    if (im->n_entries == im->room) {
        uint64_t room = im->room ? 2 * im->room : 256;
        void *p = mem_realloc(im->entries, (size_t)room * sizeof *im->entries, MEM_META);
        if (!p)
            return err(ERR_NOMEM, "%s: an index of %" PRIu64 " entries", file_path(im->file), room);
        im->entries = p;
        im->room = room;
    }
    struct imatrix_entry *e = &im->entries[im->n_entries];
    *e = *entry;
    e->name = mem_zalloc(1, n_name + 1, MEM_META);
    if (!e->name)
        return err(ERR_NOMEM, "%s: the name of entry %" PRIu64, file_path(im->file), im->n_entries);
    memcpy(e->name, name, n_name);
    im->n_entries++;
    return 0;
}

/* n floats at off: all finite and not below 0. */
static int check_floats(const struct imatrix *im, const char *name, uint64_t off, uint64_t n, float *piece)
{
    char shown[80];

    for (uint64_t at = 0; at < n; at += PIECE_FLOATS) {
        uint64_t now = n - at < PIECE_FLOATS ? n - at : PIECE_FLOATS;
        int rc = file_read(im->file, off + 4 * at, piece, 4 * now);
        if (rc)
            return rc;
        for (uint64_t k = 0; k < now; k++)
            if (!(piece[k] >= 0.0f) || !isfinite(piece[k]))
                return err(ERR_FORMAT, "%s: entry \"%s\": value %" PRIu64 " is %g, no mean square", file_path(im->file),
                           gguf_parse_shown(name, strlen(name), shown), at + k, (double)piece[k]);
    }
    return 0;
}

static int check_entries(struct imatrix *im)
{
    float *piece = mem_alloc(PIECE_FLOATS * sizeof *piece, MEM_SCRATCH);
    const char *twice = NULL;
    char shown[80];
    int rc = piece ? 0 : err(ERR_NOMEM, "%s: %zu bytes to read it", file_path(im->file), PIECE_FLOATS * sizeof *piece);

    for (uint64_t i = 0; i < im->n_entries && !rc; i++) {
        const struct imatrix_entry *e = &im->entries[i];
        rc = check_floats(im, e->name, e->off, e->n_values, piece);
        if (!rc)
            rc = check_floats(im, e->name, e->counts_off, e->n_counts, piece);
    }
    mem_free(piece);
    if (!rc)
        rc = table_init(&im->by_name, im->entries, im->n_entries, sizeof *im->entries, &twice);
    if (!rc && twice)
        rc = err(ERR_FORMAT, "%s: entry \"%s\" is there twice", file_path(im->file),
                 gguf_parse_shown(twice, strlen(twice), shown));
    return rc;
}

/* ---- .dat ---- */

struct reader {
    struct imatrix *im;
    uint64_t off, end;
};

static int read_i32(struct reader *r, const char *what, int32_t *out)
{
    unsigned char p[4];

    if (r->end - r->off < 4)
        return err(ERR_FORMAT, "%s: %s: the file ends at %" PRIu64, file_path(r->im->file), what, r->end);
    int rc = file_read(r->im->file, r->off, p, 4);
    r->off += 4;
    *out = (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    return rc;
}

/* A length and that many bytes, none of them zero. buf: (MAX_NAME + 1). */
static int read_name(struct reader *r, char *buf, int32_t *n)
{
    int rc = read_i32(r, "length of a name", n);

    if (rc)
        return rc;
    if (*n < 0 || *n > MAX_NAME || (uint64_t)*n > r->end - r->off)
        return err(ERR_FORMAT, "%s: a name of %" PRId32 " bytes at offset %" PRIu64, file_path(r->im->file), *n,
                   r->off);
    rc = file_read(r->im->file, r->off, buf, (uint64_t)*n);
    r->off += (uint64_t)*n;
    buf[*n] = '\0';
    if (!rc && memchr(buf, '\0', (size_t)*n))
        return err(ERR_FORMAT, "%s: the name before offset %" PRIu64 " has a zero byte", file_path(r->im->file),
                   r->off);
    return rc;
}

static int read_entry(struct reader *r, char *name)
{
    int32_t n_name, calls, n_values;
    char shown[80];
    int rc;

    if ((rc = read_name(r, name, &n_name)) || (rc = read_i32(r, "calls of an entry", &calls)) ||
        (rc = read_i32(r, "size of an entry", &n_values)))
        return rc;
    if (n_values < 1 || (uint64_t)n_values > (r->end - r->off) / 4)
        return err(ERR_FORMAT, "%s: entry \"%s\" has %" PRId32 " values, %" PRIu64 " bytes are left",
                   file_path(r->im->file), gguf_parse_shown(name, strlen(name), shown), n_values, r->end - r->off);
    struct imatrix_entry e = {.off = r->off, .n_values = (uint64_t)n_values, .calls = calls > 0 ? (float)calls : 1.0f};
    r->off += 4 * e.n_values;
    return add_entry(r->im, name, (size_t)n_name, &e);
}

/* Chunks and data set, which early files do not have. */
static int read_tail(struct reader *r, char *name)
{
    int32_t n_chunks = 0, n_name = 0;
    int rc = r->off < r->end ? read_i32(r, "number of chunks", &n_chunks) : 0;

    if (!rc && r->off < r->end)
        rc = read_name(r, name, &n_name);
    if (rc)
        return rc;
    r->im->n_chunks = n_chunks > 0 ? (uint64_t)n_chunks : 0;
    if (n_name && !(r->im->dataset = mem_strdup(name, MEM_META)))
        return err(ERR_NOMEM, "%s: the name of its data", file_path(r->im->file));
    return 0;
}

static int open_dat(struct imatrix *im)
{
    struct reader r = {im, 0, file_identity(im->file)->bytes};
    char *name = mem_alloc(MAX_NAME + 1, MEM_META);
    int32_t n = 0;
    int rc = name ? read_i32(&r, "number of entries", &n)
                  : err(ERR_NOMEM, "%s: a name of %d bytes", file_path(im->file), MAX_NAME);

    if (!rc && (n < 1 || n > MAX_ENTRIES))
        rc = err(ERR_FORMAT, "%s: neither a GGUF nor an imatrix.dat: it begins with %" PRId32 " entries",
                 file_path(im->file), n);
    for (int32_t i = 0; i < n && !rc; i++)
        rc = read_entry(&r, name);
    if (!rc)
        rc = read_tail(&r, name);
    mem_free(name);
    return rc;
}

/* ---- GGUF ---- */

/* The counts that belong to a tensor of sums, checked. */
static int add_sums(struct imatrix *im, const struct gguf *g, const struct gguf_tensor *sums, size_t n_name)
{
    char name[80], shown[80];

    memcpy(name, sums->name, n_name);
    memcpy(name + n_name, ".counts", sizeof ".counts"); /* shorter than ".in_sum2", and a name has 63 bytes at most */
    const struct gguf_tensor *counts = gguf_find_tensor(g, name);
    name[n_name] = '\0';
    if (!counts)
        return err(ERR_FORMAT, "%s: \"%s\" has sums but no counts", file_path(im->file),
                   gguf_parse_shown(name, strlen(name), shown));
    if (sums->type != QUANT_F32 || counts->type != QUANT_F32)
        return err(ERR_FORMAT, "%s: \"%s\": sums and counts are not F32", file_path(im->file),
                   gguf_parse_shown(name, strlen(name), shown));
    struct imatrix_entry e = {
        .off = sums->off, .n_values = sums->bytes / 4, .counts_off = counts->off, .n_counts = counts->bytes / 4};
    if (e.n_values % e.n_counts)
        return err(ERR_FORMAT, "%s: \"%s\" has %" PRIu64 " sums and %" PRIu64 " counts", file_path(im->file),
                   gguf_parse_shown(name, strlen(name), shown), e.n_values, e.n_counts);
    return add_entry(im, name, n_name, &e);
}

static int read_keys(struct imatrix *im, const struct gguf *g)
{
    struct gguf_array names = {0};
    int rc;

    if ((rc = gguf_opt_u64(g, "imatrix.chunk_count", &im->n_chunks)) ||
        (rc = gguf_opt_array(g, "imatrix.datasets", GGUF_WANT_STRING, &names)) || !names.n)
        return rc;
    struct gguf_str s = gguf_at_str(&names, 0);
    im->dataset = s.n_bytes <= MAX_NAME ? mem_zalloc(1, (size_t)s.n_bytes + 1, MEM_META) : NULL;
    if (!im->dataset)
        return s.n_bytes <= MAX_NAME
                   ? err(ERR_NOMEM, "%s: the name of its data", file_path(im->file))
                   : err(ERR_LIMIT, "%s: a data set's name of %" PRIu64 " bytes", file_path(im->file), s.n_bytes);
    memcpy(im->dataset, s.p, (size_t)s.n_bytes);
    return 0;
}

static int open_gguf(struct imatrix *im, const char *path, const struct file_ops *ops)
{
    static const char end[] = ".in_sum2";
    struct gguf *g = NULL;
    int rc = gguf_open(path, ops, &g);

    if (!rc && gguf_n_parts(g) > 1)
        rc = err(ERR_UNSUPPORTED, "%s: an importance matrix in %d parts", path, gguf_n_parts(g));
    if (!rc)
        rc = read_keys(im, g);
    for (int i = 0; !rc && i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);
        size_t n = strlen(t->name), n_end = sizeof end - 1;
        if (n > n_end && !strcmp(t->name + n - n_end, end))
            rc = add_sums(im, g, t, n - n_end);
    }
    if (!rc && !im->n_entries)
        rc = err(ERR_FORMAT, "%s: no importance matrix: no tensor's name ends in %s", path, end);
    gguf_close(g);
    return rc;
}

/* ---- both ---- */

int imatrix_open(const char *path, const struct file_ops *ops, struct imatrix **out)
{
    struct imatrix *im = mem_zalloc(1, sizeof *im, MEM_META);
    unsigned char magic[4] = {0};
    int rc = im ? 0 : err(ERR_NOMEM, "%s: a handle of %zu bytes", path, sizeof *im);

    *out = NULL;
    if (!rc)
        rc = file_open(path, ops, &im->file);
    if (!rc && file_identity(im->file)->bytes >= 4)
        rc = file_read(im->file, 0, magic, 4);
    if (!rc)
        rc = memcmp(magic, "GGUF", 4) ? open_dat(im) : open_gguf(im, path, ops);
    if (!rc)
        rc = check_entries(im);
    if (!rc)
        rc = file_check(im->file, file_identity(im->file)); /* nobody wrote to it meanwhile */
    if (rc)
        imatrix_close(im);
    else
        *out = im;
    return rc;
}

void imatrix_close(struct imatrix *im)
{
    if (!im)
        return;
    for (uint64_t i = 0; i < im->n_entries; i++)
        mem_free(im->entries[i].name);
    mem_free(im->entries);
    table_done(&im->by_name);
    mem_free(im->dataset);
    file_close(im->file);
    mem_free(im);
}

int imatrix_n_entries(const struct imatrix *im)
{
    return (int)im->n_entries;
}

uint64_t imatrix_n_chunks(const struct imatrix *im)
{
    return im->n_chunks;
}

const char *imatrix_dataset(const struct imatrix *im)
{
    return im->dataset;
}

const struct imatrix_entry *imatrix_find(const struct imatrix *im, const char *weight)
{
    return table_find(&im->by_name, weight);
}

uint64_t imatrix_n_values(const struct imatrix_entry *entry)
{
    return entry->n_values;
}

int imatrix_read(const struct imatrix *im, const struct imatrix_entry *entry, uint64_t expert, uint64_t n_columns,
                 float *out, bool *is_known)
{
    float count = entry->calls;
    int rc = 0;

    assert(n_columns && entry->n_values % n_columns == 0 && expert < entry->n_values / n_columns);
    if (entry->n_counts) { /* one count, or one per expert */
        uint64_t which = expert * n_columns / (entry->n_values / entry->n_counts);
        rc = file_read(im->file, entry->counts_off + 4 * which, &count, 4);
    }
    *is_known = count > 0.0f;
    if (rc || !*is_known)
        return rc;
    rc = file_read(im->file, entry->off + 4 * expert * n_columns, out, 4 * n_columns);
    for (uint64_t k = 0; k < n_columns && !rc; k++)
        out[k] /= count;
    return rc;
}
