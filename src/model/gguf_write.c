/* Owns a GGUF while it is written: its header as bytes, which part and place each tensor has, and the parts' files. What
 * tensors hold is the caller's. */
#include "src/model/gguf_write.h"

#include "io/out.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/table.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define MAX_PARTS 65535                      /* split.count is a u16 */
#define MAX_HEADER_BYTES (UINT64_C(1) << 30) /* half of what readers take */
#define PREFIX_BYTES 24                      /* magic, version, counts of tensors and keys */

struct buffer {
    unsigned char *p; /* own */
    uint64_t n, room;
};

struct key {
    char *name; /* own; first, as table wants it */
};

struct tensor {
    char *name; /* own; first, as table wants it */
    enum quant_type type;
    int n_dims, part;
    int64_t ne[4];
    uint64_t bytes, off; /* off from the start of its part's data */
};

struct part {
    int first, end;               /* tensors */
    uint64_t data_off, end_bytes; /* where the data begin, the size of the file */
    struct out *file;             /* own; NULL before gguf_write_open */
};

struct gguf_write {
    struct buffer keys; /* encoded */
    struct key *key;    /* own */
    struct tensor *tensors;
    struct part *parts;
    uint64_t n_keys, key_room, n_tensors, tensor_room, n_parts, part_room;
    uint64_t align_bytes;
};

/* ---- growing ---- */

/* Room for one more item of an array that doubles. */
static int grow(void **items, uint64_t n, uint64_t *room, size_t item_bytes)
{
    if (n < *room)
        return 0;
    uint64_t more = *room ? 2 * *room : 64;
    void *p = mem_realloc(*items, (size_t)more * item_bytes, MEM_META);
    if (!p)
        return err(ERR_NOMEM, "a header of %" PRIu64 " entries", more);
    *items = p;
    *room = more;
    return 0;
}

/* Append; p NULL: zeros. */
static int put(struct buffer *b, const void *p, uint64_t n)
{
    if (n > MAX_HEADER_BYTES - b->n)
        return err(ERR_LIMIT, "a header of over %" PRIu64 " bytes", (uint64_t)MAX_HEADER_BYTES);
    if (b->n + n > b->room) {
        uint64_t room = 2 * (b->n + n) + 256;
        unsigned char *fresh = mem_realloc(b->p, (size_t)room, MEM_META);
        if (!fresh)
            return err(ERR_NOMEM, "a header of %" PRIu64 " bytes", room);
        b->p = fresh;
        b->room = room;
    }
    if (p)
        memcpy(b->p + b->n, p, (size_t)n);
    else
        memset(b->p + b->n, 0, (size_t)n);
    b->n += n;
    return 0;
}

static int put_number(struct buffer *b, uint64_t v, int n_bytes)
{
    unsigned char p[8];

    for (int i = 0; i < 8; i++)
        p[i] = (unsigned char)(v >> 8 * i);
    return put(b, p, (uint64_t)n_bytes);
}

static int put_str(struct buffer *b, const char *p, uint64_t n)
{
    int rc = put_number(b, n, 8);
    return rc ? rc : put(b, p, n);
}

int gguf_write_make(struct gguf_write **out)
{
    *out = mem_zalloc(1, sizeof **out, MEM_META);
    if (!*out)
        return err(ERR_NOMEM, "a GGUF to write: %zu bytes", sizeof **out);
    (*out)->align_bytes = 32; /* GGUF specification: the default */
    return 0;
}

void gguf_write_free(struct gguf_write *w)
{
    if (!w)
        return;
    for (uint64_t i = 0; i < w->n_parts; i++)
        out_close(w->parts[i].file);
    for (uint64_t i = 0; i < w->n_keys; i++)
        mem_free(w->key[i].name);
    for (uint64_t i = 0; i < w->n_tensors; i++)
        mem_free(w->tensors[i].name);
    mem_free(w->keys.p);
    mem_free(w->key);
    mem_free(w->tensors);
    mem_free(w->parts);
    mem_free(w);
}

/* ---- keys ---- */

static int begin_key(struct gguf_write *w, const char *name, enum gguf_type type)
{
    int rc = grow((void **)&w->key, w->n_keys, &w->key_room, sizeof *w->key);

    if (rc)
        return rc;
    char *own_name = mem_strdup(name, MEM_META);
    if (!own_name)
        return err(ERR_NOMEM, "key \"%.64s\"", name);
    w->key[w->n_keys++].name = own_name;
    if (!(rc = put_str(&w->keys, name, strlen(name))))
        rc = put_number(&w->keys, type, 4);
    return rc;
}

int gguf_write_key(struct gguf_write *w, const struct gguf_key *key)
{
    int rc = begin_key(w, key->name, key->type);

    if (!rc && key->type == GGUF_ARRAY && !(rc = put_number(&w->keys, key->array.type, 4)))
        rc = put_number(&w->keys, key->array.n, 8);
    if (!rc)
        rc = put(&w->keys, key->array.data, gguf_key_bytes(key));
    if (!rc && !strcmp(key->name, "general.alignment"))
        w->align_bytes = (uint64_t)gguf_at_i64(&key->array, 0); /* gguf_open() has refused what is no integer */
    return rc;
}

static int write_number(struct gguf_write *w, const char *name, enum gguf_type type, uint64_t v, int n_bytes)
{
    int rc = begin_key(w, name, type);
    return rc ? rc : put_number(&w->keys, v, n_bytes);
}

int gguf_write_u16(struct gguf_write *w, const char *name, uint16_t v)
{
    return write_number(w, name, GGUF_U16, v, 2);
}

int gguf_write_u32(struct gguf_write *w, const char *name, uint32_t v)
{
    return write_number(w, name, GGUF_U32, v, 4);
}

int gguf_write_i32(struct gguf_write *w, const char *name, int32_t v)
{
    return write_number(w, name, GGUF_I32, (uint32_t)v, 4);
}

int gguf_write_str(struct gguf_write *w, const char *name, const char *p, uint64_t n_bytes)
{
    int rc = begin_key(w, name, GGUF_STRING);
    return rc ? rc : put_str(&w->keys, p, n_bytes);
}

/* ---- tensors ---- */

int gguf_write_tensor(struct gguf_write *w, const char *name, enum quant_type type, int n_dims, const int64_t *ne)
{
    const struct quant_info *info = quant_info((int)type);
    struct tensor t = {.type = type, .n_dims = n_dims, .ne = {1, 1, 1, 1}};
    uint64_t n_rows = 1;

    if (!name[0] || strlen(name) > 63)
        return err(ERR_ARG, "tensor name \"%.80s\": wanted are 1 to 63 bytes", name);
    if (!info || n_dims < 1 || n_dims > 4)
        return err(ERR_ARG, "tensor \"%s\": type %d with %d dimensions", name, (int)type, n_dims);
    for (int d = 0; d < n_dims; d++) {
        t.ne[d] = ne[d];
        if (ne[d] < 1 || (d && !size_mul(n_rows, (uint64_t)ne[d], &n_rows)))
            return err(ERR_ARG, "tensor \"%s\": dimension %d is %" PRId64, name, d, ne[d]);
    }
    if (ne[0] % info->block_len || !size_mul(quant_row_bytes(type, ne[0]), n_rows, &t.bytes) || t.bytes > INT64_MAX)
        return err(ERR_ARG, "tensor \"%s\": rows of %" PRId64 " cannot be of type %s", name, ne[0], info->name);
    int rc = grow((void **)&w->tensors, w->n_tensors, &w->tensor_room, sizeof *w->tensors);
    if (rc)
        return rc;
    t.name = mem_strdup(name, MEM_META);
    if (!t.name)
        return err(ERR_NOMEM, "tensor \"%s\"", name);
    w->tensors[w->n_tensors++] = t;
    return 0;
}

/* ---- places ---- */

static uint64_t entry_bytes(const struct tensor *t)
{
    return 8 + strlen(t->name) + 4 + 8 * (uint64_t)t->n_dims + 4 + 8;
}

/* The keys of a part: all of them in the first, in the others those that its bytes depend on. */
static int put_split_keys(const struct gguf_write *w, struct buffer *b, int part, uint64_t *n_keys)
{
    static const char no[] = "split.no", count[] = "split.count", tensors[] = "split.tensors.count",
                      align[] = "general.alignment";
    int rc = 0;

    *n_keys = part ? 0 : w->n_keys;
    if (!part)
        rc = put(b, w->keys.p, w->keys.n);
    if (w->n_parts == 1 || rc)
        return rc;
    if (part && w->align_bytes != 32) {
        *n_keys += 1;
        if ((rc = put_str(b, align, sizeof align - 1)) || (rc = put_number(b, GGUF_U32, 4)) ||
            (rc = put_number(b, w->align_bytes, 4)))
            return rc;
    }
    *n_keys += 3;
    if ((rc = put_str(b, no, sizeof no - 1)) || (rc = put_number(b, GGUF_U16, 4)) ||
        (rc = put_number(b, (uint64_t)part, 2)) || (rc = put_str(b, count, sizeof count - 1)) ||
        (rc = put_number(b, GGUF_U16, 4)) || (rc = put_number(b, w->n_parts, 2)) ||
        (rc = put_str(b, tensors, sizeof tensors - 1)) || (rc = put_number(b, GGUF_I32, 4)))
        return rc;
    return put_number(b, w->n_tensors, 4);
}

/* The most that split keys add to a part. */
#define SPLIT_KEYS_BYTES 160

static int add_part(struct gguf_write *w, int first)
{
    int rc = grow((void **)&w->parts, w->n_parts, &w->part_room, sizeof *w->parts);

    if (!rc && w->n_parts == MAX_PARTS)
        rc = err(ERR_LIMIT, "over %d parts; make them larger", MAX_PARTS);
    if (!rc)
        w->parts[w->n_parts++] = (struct part){.first = first, .end = first};
    return rc;
}

/* Which tensors go to which part, and where in its data. */
static int place(struct gguf_write *w, uint64_t part_bytes)
{
    uint64_t header = 0, data = 0;
    int rc = add_part(w, 0);

    header = PREFIX_BYTES + w->keys.n + SPLIT_KEYS_BYTES;
    for (uint64_t i = 0; i < w->n_tensors && !rc; i++) {
        struct tensor *t = &w->tensors[i];
        uint64_t bytes = size_up(t->bytes, w->align_bytes);
        uint64_t after = size_up(header + entry_bytes(t), w->align_bytes) + data + bytes;
        if (part_bytes && data && after > part_bytes) {
            if ((rc = add_part(w, (int)i)))
                return rc;
            header = PREFIX_BYTES + SPLIT_KEYS_BYTES;
            data = 0;
        }
        t->part = (int)w->n_parts - 1;
        t->off = data;
        header += entry_bytes(t);
        if (!size_add(data, bytes, &data) || data > INT64_MAX / 2)
            return err(ERR_LIMIT, "tensors of over 2^62 bytes");
        w->parts[w->n_parts - 1].end = (int)i + 1;
        w->parts[w->n_parts - 1].end_bytes = data;
    }
    return rc;
}

static int check_names(const struct gguf_write *w)
{
    struct table t = {0};
    const char *twice = NULL;
    int rc = table_init(&t, w->key, w->n_keys, sizeof *w->key, &twice);

    table_done(&t);
    if (!rc && twice)
        return err(ERR_ARG, "key \"%.64s\" is there twice", twice);
    if (!rc)
        rc = table_init(&t, w->tensors, w->n_tensors, sizeof *w->tensors, &twice);
    table_done(&t);
    return !rc && twice ? err(ERR_ARG, "tensor \"%.64s\" is there twice", twice) : rc;
}

/* The whole header of a part, padded to where its data begin. */
static int make_header(const struct gguf_write *w, int part, struct buffer *b)
{
    const struct part *p = &w->parts[part];
    uint64_t n_keys;
    int rc;

    b->n = 0;
    if ((rc = put(b, "GGUF", 4)) || (rc = put_number(b, 3, 4)) ||
        (rc = put_number(b, (uint64_t)(p->end - p->first), 8)) || (rc = put_number(b, 0, 8)) ||
        (rc = put_split_keys(w, b, part, &n_keys)))
        return rc;
    for (int i = 0; i < 8; i++)
        b->p[16 + i] = (unsigned char)(n_keys >> 8 * i);
    for (int i = p->first; i < p->end; i++) {
        const struct tensor *t = &w->tensors[i];
        if ((rc = put_str(b, t->name, strlen(t->name))) || (rc = put_number(b, (uint64_t)t->n_dims, 4)))
            return rc;
        for (int d = 0; d < t->n_dims && !rc; d++)
            rc = put_number(b, (uint64_t)t->ne[d], 8);
        if (rc || (rc = put_number(b, (uint64_t)t->type, 4)) || (rc = put_number(b, t->off, 8)))
            return rc;
    }
    return put(b, NULL, size_up(b->n, w->align_bytes) - b->n);
}

int gguf_write_layout(struct gguf_write *w, uint64_t part_bytes)
{
    struct buffer header = {0};
    int rc = 0;

    if (w->align_bytes < 8 || w->align_bytes > MAX_HEADER_BYTES / 2 || (w->align_bytes & (w->align_bytes - 1)))
        return err(ERR_ARG, "an alignment of %" PRIu64 " bytes", w->align_bytes);
    if ((rc = check_names(w)) || (rc = place(w, part_bytes)))
        return rc;
    for (uint64_t i = 0; i < w->n_parts && !rc; i++) {
        if ((rc = make_header(w, (int)i, &header)))
            break;
        w->parts[i].data_off = header.n;
        w->parts[i].end_bytes += header.n;
    }
    mem_free(header.p);
    return rc;
}

int gguf_write_n_parts(const struct gguf_write *w)
{
    return (int)w->n_parts;
}

uint64_t gguf_write_bytes(const struct gguf_write *w)
{
    uint64_t bytes = 0;

    for (uint64_t i = 0; i < w->n_parts; i++)
        bytes += w->parts[i].end_bytes;
    return bytes;
}

int gguf_write_part_path(const struct gguf_write *w, const char *path, int i, char **out)
{
    static const char end[] = ".gguf";
    size_t n = strlen(path), n_end = sizeof end - 1;
    size_t room = n + 64;

    *out = mem_alloc(room, MEM_META);
    if (!*out)
        return err(ERR_NOMEM, "%s: names of its parts", path);
    if (n >= n_end && !strcmp(path + n - n_end, end))
        n -= n_end;
    if (w->n_parts == 1)
        snprintf(*out, room, "%s", path);
    else
        snprintf(*out, room, "%.*s-%05d-of-%05d.gguf", (int)n, path, i + 1, (int)w->n_parts);
    return 0;
}

/* ---- files ---- */

static int open_part(struct gguf_write *w, const char *path, int i, struct buffer *header, const struct out_ops *ops)
{
    struct part *p = &w->parts[i];
    char *name = NULL;
    int rc = make_header(w, i, header);

    if (!rc)
        rc = gguf_write_part_path(w, path, i, &name);
    if (!rc)
        rc = out_open(name, p->end_bytes, ops, &p->file);
    if (!rc)
        rc = out_write(p->file, 0, header->p, header->n);
    mem_free(name);
    return rc;
}

int gguf_write_open(struct gguf_write *w, const char *path, const struct out_ops *ops)
{
    struct buffer header = {0};
    int rc = 0;

    for (uint64_t i = 0; i < w->n_parts && !rc; i++)
        rc = open_part(w, path, (int)i, &header, ops);
    mem_free(header.p);
    return rc;
}

int gguf_write_data(struct gguf_write *w, int tensor, uint64_t off, const void *p, uint64_t bytes)
{
    const struct tensor *t = &w->tensors[tensor];
    const struct part *part = &w->parts[t->part];

    assert(off <= t->bytes && bytes <= t->bytes - off);
    return out_write(part->file, part->data_off + t->off + off, p, bytes);
}

int gguf_write_commit(struct gguf_write *w)
{
    int rc = 0;

    for (uint64_t i = 0; i < w->n_parts && !rc; i++)
        rc = out_sync(w->parts[i].file);
    for (uint64_t i = 0; i < w->n_parts && !rc; i++)
        rc = out_publish(w->parts[i].file);
    for (uint64_t i = 0; i < w->n_parts && rc; i++)
        out_retract(w->parts[i].file);
    return rc;
}
