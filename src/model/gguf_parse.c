/* Owns the header's bytes and the lists made from them.
 *
 * The header is read into one block, which grows while it is parsed and moves when it does; whatever points into it by
 * then is moved along (block_resize). Names and scalar strings get their NUL in place, over a byte of the field behind
 * them, once everything has been read. */
#include "src/model/gguf_parse.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Far beyond any model (256 thousand tokens with merges make 20 MB of header), and small enough that a sparse file of
 * terabytes cannot take all memory: offsets into a header fit in 32 bits and string lengths in an int. */
#define MAX_HEADER_BYTES (1 * GIB)
#define MAX_KEYS ((uint64_t)1 << 16)
#define MAX_TENSORS ((uint64_t)1 << 18)
#define MAX_KEY_BYTES 65535      /* GGUF specification */
#define MAX_TENSOR_NAME_BYTES 63 /* and a NUL are the 64 bytes that ggml has for a name */
#define MAX_NESTING 4            /* arrays in arrays; no known file has any */
#define READ_STEP_BYTES (256 * KIB)

/* The shortest entries there can be, by which counts are held against the bytes left. */
enum {
    MIN_KEY_BYTES = 8 + 1 + 4 + 1,            /* name "k", type, an 8-bit value */
    MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8, /* name "t", one dimension, type, offset */
    MIN_ARRAY_BYTES = 4 + 8,
};

struct reader {
    struct gguf_header *h;
    const struct gguf_source *source;
    uint64_t pos;
    char where[128]; /* the key or tensor being read, for errors */
};

uint64_t gguf_parse_number(const unsigned char *p, int n_bytes)
{
    uint64_t v = 0;

    for (int i = 0; i < n_bytes; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

static const struct {
    const char *name;
    int bytes; /* 0: varies */
} types[GGUF_N_TYPE] = {
    [GGUF_U8] = {"u8", 1},      [GGUF_I8] = {"i8", 1},     [GGUF_U16] = {"u16", 2}, [GGUF_I16] = {"i16", 2},
    [GGUF_U32] = {"u32", 4},    [GGUF_I32] = {"i32", 4},   [GGUF_F32] = {"f32", 4}, [GGUF_BOOL] = {"bool", 1},
    [GGUF_STRING] = {"str", 0}, [GGUF_ARRAY] = {"arr", 0}, [GGUF_U64] = {"u64", 8}, [GGUF_I64] = {"i64", 8},
    [GGUF_F64] = {"f64", 8},
};

const char *gguf_parse_type_name(enum gguf_type type)
{
    return types[type].name;
}

int gguf_parse_type_bytes(enum gguf_type type)
{
    return types[type].bytes;
}

const char *gguf_parse_shown(const void *name, uint64_t n_bytes, char buf[80])
{
    const unsigned char *s = name;
    size_t n = n_bytes < 76 ? (size_t)n_bytes : 76;

    for (size_t i = 0; i < n; i++)
        buf[i] = s[i] >= 0x20 && s[i] < 0x7f ? (char)s[i] : '?';
    memcpy(buf + n, n < n_bytes ? "..." : "", n < n_bytes ? 4 : 1);
    return buf;
}

static int __attribute__((format(printf, 3, 4))) fail(const struct reader *r, int code, const char *fmt, ...)
{
    char text[256];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return err(code, "%s: %s: %s", r->h->info.path, r->where, text);
}

/* Room for one more item behind n: where the items are now, or NULL (they stand). */
static void *grow(void *items, uint64_t n, uint64_t *room, size_t item_bytes)
{
    if (n < *room)
        return items;
    uint64_t more = *room ? *room * 2 : 32;
    void *p = mem_realloc(items, (size_t)more * item_bytes, MEM_META);
    if (p)
        *room = more;
    return p;
}

/* ---- the header's bytes ---- */

static const void *moved(const void *p, const unsigned char *from, const unsigned char *to)
{
    return p ? to + ((const unsigned char *)p - from) : NULL;
}

static int block_resize(struct gguf_header *h, uint64_t bytes)
{
    unsigned char *old = h->block, *block = mem_alloc((size_t)bytes + 1, MEM_META);

    if (!block)
        return err(ERR_NOMEM, "%s: a header of %" PRIu64 " bytes", h->info.path, bytes);
    if (old)
        memcpy(block, old, (size_t)(h->n_read_bytes < bytes ? h->n_read_bytes : bytes));
    for (uint64_t i = 0; i < h->n_keys; i++) {
        h->keys[i].name = moved(h->keys[i].name, old, block);
        h->keys[i].array.data = moved(h->keys[i].array.data, old, block);
    }
    for (uint64_t i = 0; i < h->n_tensors; i++)
        h->tensors[i].name = moved(h->tensors[i].name, old, block);
    h->block = block;
    h->block_bytes = bytes;
    if (h->n_read_bytes > bytes)
        h->n_read_bytes = bytes;
    mem_free(old);
    return 0;
}

static uint64_t bytes_left(const struct reader *r)
{
    return r->h->info.bytes - r->pos;
}

/* Only a beginning is there, and the header goes on for n bytes more at least. */
static int cut(const struct reader *r, uint64_t n)
{
    return fail(r, ERR_FORMAT,
                "the header is cut: %" PRIu64 " bytes are here, at least %" PRIu64
                " are needed (no known model has more than 32 MiB of it)",
                r->h->info.bytes, r->pos + n);
}

/* Have n bytes at pos in the block, which may move. `what` says what they are, for the error. */
static int need(struct reader *r, uint64_t n, const char *what)
{
    struct gguf_header *h = r->h;

    if (n > bytes_left(r) && r->h->is_head && n <= MAX_HEADER_BYTES)
        return cut(r, n);
    if (n > bytes_left(r))
        return fail(r, ERR_FORMAT,
                    "%s of %" PRIu64 " bytes at offset %" PRIu64 ", but the file ends %" PRIu64 " bytes later", what, n,
                    r->pos, bytes_left(r));
    if (r->pos + n <= h->n_read_bytes)
        return 0;
    if (n > MAX_HEADER_BYTES || r->pos + n > MAX_HEADER_BYTES)
        return fail(r, ERR_LIMIT, "%s of %" PRIu64 " bytes at offset %" PRIu64 ": headers may have %" PRIu64 " bytes",
                    what, n, r->pos, (uint64_t)MAX_HEADER_BYTES);
    uint64_t end = size_up(r->pos + n, READ_STEP_BYTES);
    if (end > h->info.bytes)
        end = h->info.bytes;
    if (end > h->block_bytes) {
        uint64_t twice = 2 * h->block_bytes < h->info.bytes ? 2 * h->block_bytes : h->info.bytes;
        int rc = block_resize(h, end > twice ? end : twice);
        if (rc)
            return rc;
    }
    int rc = r->source->read(r->source->ctx, h->n_read_bytes, h->block + h->n_read_bytes, end - h->n_read_bytes);
    if (!rc)
        h->n_read_bytes = end;
    return rc;
}

static int read_number(struct reader *r, int n_bytes, const char *what, uint64_t *out)
{
    int rc = need(r, (uint64_t)n_bytes, what);

    if (rc)
        return rc;
    *out = gguf_parse_number(r->h->block + r->pos, n_bytes);
    r->pos += (uint64_t)n_bytes;
    return 0;
}

/* Step over a string; its bytes end at pos. */
static int read_string(struct reader *r, const char *what, uint64_t *n_bytes)
{
    int rc = read_number(r, 8, what, n_bytes);

    if (!rc)
        rc = need(r, *n_bytes, what);
    if (!rc)
        r->pos += *n_bytes;
    return rc;
}

/* A name of 1 to max bytes without zeros; where it is until the block moves. */
static int read_name(struct reader *r, const char *kind, uint64_t max_bytes, const char **out)
{
    uint64_t n_bytes = 0;
    char buf[80];
    int rc = read_string(r, "a name", &n_bytes);

    if (rc)
        return rc;
    const char *name = (const char *)r->h->block + r->pos - n_bytes;
    if (n_bytes < 1 || n_bytes > max_bytes)
        return fail(r, ERR_FORMAT, "its name \"%s\" has %" PRIu64 " bytes, allowed are 1 to %" PRIu64,
                    gguf_parse_shown(name, n_bytes, buf), n_bytes, max_bytes);
    snprintf(r->where, sizeof r->where, "%s \"%s\"", kind, gguf_parse_shown(name, n_bytes, buf));
    const char *zero = memchr(name, 0, (size_t)n_bytes);
    if (zero)
        return fail(r, ERR_FORMAT, "its name has a zero byte at %td", zero - name);
    *out = name;
    return 0;
}

/* ---- keys ---- */

static int check_bools(const struct reader *r, uint64_t n)
{
    const unsigned char *p = r->h->block + r->pos;

    for (uint64_t i = 0; i < n; i++) {
        if (p[i] > 1)
            return fail(r, ERR_FORMAT, "element %" PRIu64 " of type bool is %d, neither 0 nor 1", i, p[i]);
    }
    return 0;
}

static int read_array(struct reader *r, struct gguf_array *out, uint32_t **out_start, int nesting);

/* n values of one type. start, if not NULL, gets each one's distance from the first. */
static int read_values(struct reader *r, enum gguf_type type, uint64_t n, uint32_t *start, int nesting)
{
    uint64_t first = r->pos, n_bytes;
    int rc = 0;

    if (types[type].bytes) {
        n_bytes = n * (uint64_t)types[type].bytes; /* read_array has held n against the bytes left */
        rc = need(r, n_bytes, "a value");
        if (!rc && type == GGUF_BOOL)
            rc = check_bools(r, n);
        r->pos += rc ? 0 : n_bytes;
        return rc;
    }
    for (uint64_t i = 0; i < n && !rc; i++) {
        if (start)
            start[i] = (uint32_t)(r->pos - first);
        if (type == GGUF_STRING) {
            rc = read_string(r, "a string", &n_bytes);
        } else {
            struct gguf_array inner;
            rc = read_array(r, &inner, NULL, nesting + 1);
        }
    }
    return rc;
}

/* An array's head and elements. out gets type and n, *out_start (if wanted) the index of elements of varying size. */
static int read_array(struct reader *r, struct gguf_array *out, uint32_t **out_start, int nesting)
{
    uint64_t type = 0, n = 0;
    int rc;

    if (nesting > MAX_NESTING)
        return fail(r, ERR_LIMIT, "arrays nested deeper than %d", MAX_NESTING);
    if ((rc = read_number(r, 4, "an element type", &type)) || (rc = read_number(r, 8, "an element count", &n)))
        return rc;
    if (type >= GGUF_N_TYPE)
        return fail(r, ERR_FORMAT, "array of elements of type %" PRIu64 ", known are 0 to %d", type, GGUF_N_TYPE - 1);
    uint64_t least = type == GGUF_STRING ? 8 : type == GGUF_ARRAY ? MIN_ARRAY_BYTES : (uint64_t)types[type].bytes;
    if (n > bytes_left(r) / least && r->h->is_head && n <= MAX_HEADER_BYTES / least)
        return cut(r, n * least);
    if (n > bytes_left(r) / least)
        return fail(r, ERR_FORMAT,
                    "array of %" PRIu64 " elements of type %s, but the file ends %" PRIu64 " bytes later", n,
                    types[type].name, bytes_left(r));
    if (n > MAX_HEADER_BYTES / least)
        return fail(r, ERR_LIMIT, "array of %" PRIu64 " elements of type %s: headers may have %" PRIu64 " bytes", n,
                    types[type].name, (uint64_t)MAX_HEADER_BYTES);
    uint32_t *start = NULL;
    if (out_start && !types[type].bytes && n) {
        start = mem_alloc((size_t)n * sizeof *start, MEM_META);
        if (!start)
            return fail(r, ERR_NOMEM, "an index of %" PRIu64 " elements", n);
        *out_start = start;
    }
    *out = (struct gguf_array){.type = (enum gguf_type)type, .n = n, .start = start};
    return read_values(r, out->type, n, start, nesting);
}

static int read_key(struct reader *r)
{
    struct gguf_header *h = r->h;
    struct gguf_key *keys = grow(h->keys, h->n_keys, &h->key_room, sizeof *keys);
    uint64_t type = 0;
    int rc;

    if (!keys)
        return fail(r, ERR_NOMEM, "a table of %" PRIu64 " keys", h->n_keys + 1);
    h->keys = keys;
    struct gguf_key *key = &keys[h->n_keys];
    *key = (struct gguf_key){0};
    h->n_keys++; /* from here on block_resize moves its pointers, and closing frees its index */
    if ((rc = read_name(r, "key", MAX_KEY_BYTES, &key->name)) || (rc = read_number(r, 4, "a type", &type)))
        return rc;
    if (type >= GGUF_N_TYPE)
        return fail(r, ERR_FORMAT, "value of type %" PRIu64 ", known are 0 to %d", type, GGUF_N_TYPE - 1);
    key->type = (enum gguf_type)type;
    uint64_t value = r->pos;
    key->array = (struct gguf_array){.type = key->type, .n = 1};
    if (key->type == GGUF_ARRAY) {
        uint32_t *start = NULL;
        rc = read_array(r, &key->array, &start, 1);
        key->array.start = start; /* also when it failed half-way: part_close frees it */
        value += MIN_ARRAY_BYTES;
    } else {
        rc = read_values(r, key->type, 1, NULL, 0);
    }
    key->array.data = h->block + value;
    return rc;
}

/* ---- tensors ---- */

static int read_shape(struct reader *r, struct gguf_tensor *t, uint64_t *n_elements)
{
    uint64_t n_dims = 0, ne = 0;
    int rc = read_number(r, 4, "a number of dimensions", &n_dims);

    if (rc)
        return rc;
    if (n_dims < 1 || n_dims > 4)
        return fail(r, ERR_FORMAT, "%" PRIu64 " dimensions, allowed are 1 to 4", n_dims);
    t->n_dims = (int)n_dims;
    *n_elements = 1;
    for (int dim = 0; dim < 4; dim++) {
        t->ne[dim] = 1;
        if (dim >= t->n_dims)
            continue;
        if ((rc = read_number(r, 8, "a dimension", &ne)))
            return rc;
        if (ne < 1 || ne > INT64_MAX)
            return fail(r, ERR_FORMAT, "dimension %d is %" PRIu64, dim, ne);
        if (!size_mul(*n_elements, ne, n_elements) || *n_elements > INT64_MAX)
            return fail(r, ERR_FORMAT, "more than 2^63 elements: dimension %d is %" PRIu64, dim, ne);
        t->ne[dim] = (int64_t)ne;
    }
    return 0;
}

static int read_tensor(struct reader *r)
{
    struct gguf_header *h = r->h;
    uint64_t n_elements = 0, type = 0;
    struct gguf_tensor *tensors = grow(h->tensors, h->n_tensors, &h->tensor_room, sizeof *tensors);
    int rc;

    if (!tensors)
        return fail(r, ERR_NOMEM, "a table of %" PRIu64 " tensors", h->n_tensors + 1);
    h->tensors = tensors;
    struct gguf_tensor *t = &tensors[h->n_tensors];
    *t = (struct gguf_tensor){0};
    h->n_tensors++;
    if ((rc = read_name(r, "tensor", MAX_TENSOR_NAME_BYTES, &t->name)) || (rc = read_shape(r, t, &n_elements)) ||
        (rc = read_number(r, 4, "a type", &type)) || (rc = read_number(r, 8, "an offset", &t->off)))
        return rc;
    const struct quant_info *info = type <= INT_MAX ? quant_info((int)type) : NULL;
    if (!info)
        return fail(r, ERR_UNSUPPORTED, "type id %" PRIu64 " is not known", type);
    t->type = info->type;
    if (t->ne[0] % info->block_len)
        return fail(r, ERR_FORMAT, "rows of %" PRId64 " elements are no whole number of %s blocks of %d", t->ne[0],
                    info->name, info->block_len);
    if (!size_mul(n_elements / (uint64_t)info->block_len, (uint64_t)info->block_bytes, &t->bytes))
        return fail(r, ERR_FORMAT, "%" PRIu64 " elements of %s are more than 2^64 bytes", n_elements, info->name);
    return 0;
}

/* ---- the whole header ---- */

uint64_t gguf_parse_mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * UINT64_C(0x9e3779b97f4a7c15); /* 2^64 / golden ratio, as Knuth's multiplicative hash */
    return h ^ h >> 29;
}

static uint64_t hash_bytes(const unsigned char *p, uint64_t n)
{
    uint64_t h = gguf_parse_mix(0, n), i = 0;

    for (; i + 8 <= n; i += 8)
        h = gguf_parse_mix(h, gguf_parse_number(p + i, 8));
    return gguf_parse_mix(h, gguf_parse_number(p + i, (int)(n - i)));
}

static void put_nul(struct gguf_header *h, const void *after)
{
    h->block[(const unsigned char *)after - h->block] = 0;
}

/* Put a NUL behind each name and scalar string. From the last to the first: behind a string lies the length of the next
 * name. */
static void terminate(struct gguf_header *h)
{
    for (uint64_t i = h->n_tensors; i-- > 0;) {
        const char *name = h->tensors[i].name;
        put_nul(h, name + gguf_parse_number((const unsigned char *)name - 8, 8));
    }
    for (uint64_t i = h->n_keys; i-- > 0;) {
        const struct gguf_key *key = &h->keys[i];
        put_nul(h, key->name + gguf_parse_number((const unsigned char *)key->name - 8, 8));
        if (key->type == GGUF_STRING)
            put_nul(h, key->array.data + 8 + gguf_parse_number(key->array.data, 8));
    }
}

static int read_prelude(struct reader *r, uint64_t *n_tensors, uint64_t *n_keys)
{
    uint64_t magic = 0, version = 0;
    int rc;

    if ((rc = read_number(r, 4, "the magic number", &magic)))
        return rc;
    if (magic != 0x46554747) /* "GGUF" */
        return fail(r, ERR_FORMAT, "it begins with 0x%08" PRIx64 ", not with \"GGUF\"", magic);
    if ((rc = read_number(r, 4, "the version", &version)))
        return rc;
    if (version && !(version & 0xffff))
        return fail(r, ERR_UNSUPPORTED, "version 0x%08" PRIx64 ": the file is big-endian", version);
    if (version != 2 && version != 3)
        return fail(r, ERR_UNSUPPORTED, "version %" PRIu64 ", known are 2 and 3", version);
    r->h->version = (uint32_t)version;
    if ((rc = read_number(r, 8, "the number of tensors", n_tensors)) ||
        (rc = read_number(r, 8, "the number of keys", n_keys)))
        return rc;
    if (r->h->is_head && *n_keys <= MAX_KEYS && *n_tensors <= MAX_TENSORS) {
        uint64_t least = *n_keys * MIN_KEY_BYTES + *n_tensors * MIN_TENSOR_BYTES;
        return least > bytes_left(r) ? cut(r, least) : 0;
    }
    if (*n_keys > bytes_left(r) / MIN_KEY_BYTES)
        return fail(r, ERR_FORMAT, "%" PRIu64 " keys in %" PRIu64 " bytes", *n_keys, bytes_left(r));
    if (*n_tensors > bytes_left(r) / MIN_TENSOR_BYTES)
        return fail(r, ERR_FORMAT, "%" PRIu64 " tensors in %" PRIu64 " bytes", *n_tensors, bytes_left(r));
    if (*n_keys > MAX_KEYS || *n_tensors > MAX_TENSORS)
        return fail(r, ERR_LIMIT, "%" PRIu64 " keys and %" PRIu64 " tensors, allowed are %" PRIu64 " and %" PRIu64,
                    *n_keys, *n_tensors, MAX_KEYS, MAX_TENSORS);
    return 0;
}

int gguf_parse(struct gguf_header *h, const struct gguf_source *source)
{
    struct reader r = {.h = h, .source = source, .where = "header"};
    uint64_t n_tensors = 0, n_keys = 0;
    int rc = read_prelude(&r, &n_tensors, &n_keys);

    for (uint64_t i = 0; i < n_keys && !rc; i++) {
        snprintf(r.where, sizeof r.where, "key %" PRIu64 " of %" PRIu64, i + 1, n_keys);
        rc = read_key(&r);
    }
    for (uint64_t i = 0; i < n_tensors && !rc; i++) {
        snprintf(r.where, sizeof r.where, "tensor %" PRIu64 " of %" PRIu64, i + 1, n_tensors);
        rc = read_tensor(&r);
    }
    if (rc)
        return rc;
    h->info.header_bytes = r.pos;
    h->hash = hash_bytes(h->block, r.pos);
    rc = block_resize(h, r.pos); /* what was read ahead is tensor data */
    if (!rc)
        terminate(h);
    return rc;
}

void gguf_parse_done(struct gguf_header *h)
{
    for (uint64_t i = 0; i < h->n_keys; i++)
        mem_free((void *)(uintptr_t)h->keys[i].array.start);
    mem_free(h->keys);
    mem_free(h->tensors);
    mem_free(h->block);
    *h = (struct gguf_header){0};
}
