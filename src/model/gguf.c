/* Owns a model's headers, its parts' identity, and the tables by name. Reading one header is gguf_parse's; what keys
 * mean is the business of model, tok and template: only what keys, tensors and parts say about each other's sizes is
 * checked here, so that no reader above has to doubt it. */
#include "src/model/gguf.h"

#include "io/file.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/gguf_parse.h"
#include "src/model/table.h"

#include <assert.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SPLITS 99999                /* five digits in a part's name */
#define MAX_TENSORS ((uint64_t)1 << 20) /* of all parts */

_Static_assert(offsetof(struct gguf_key, name) == 0 && offsetof(struct gguf_tensor, name) == 0, "table looks there");

struct part {
    struct gguf_header header;
    char *path; /* own */
    struct table keys;
};

/* How files are asked for, and how much of one has to be there. */
struct how {
    const struct file_ops *ops; /* view */
    bool is_head;
};

struct gguf {
    struct part *parts; /* own: (n_parts) */
    int n_parts;
    struct gguf_tensor *tensors; /* own */
    uint64_t n_tensors;
    struct table tensor_table;
    uint64_t identity;
};

/* ---- one part ---- */

/* How the getters see a part: as a model of that part alone. */
static struct gguf alone(struct part *part)
{
    return (struct gguf){.parts = part, .n_parts = 1};
}

struct extent {
    uint64_t off, bytes;
    const char *name;
};

static int by_offset(const void *a, const void *b)
{
    const struct extent *x = a, *y = b;

    return x->off < y->off ? -1 : x->off > y->off;
}

static int check_overlaps(const struct gguf_header *h)
{
    struct extent *sorted = mem_alloc((size_t)h->n_tensors * sizeof *sorted, MEM_META);
    char a[80], b[80];
    int rc = 0;

    if (!sorted)
        return err(ERR_NOMEM, "%s: a table of %" PRIu64 " tensors", h->info.path, h->n_tensors);
    for (uint64_t i = 0; i < h->n_tensors; i++) {
        const struct gguf_tensor *t = &h->tensors[i];
        sorted[i] = (struct extent){t->off, t->bytes, t->name};
    }
    qsort(sorted, (size_t)h->n_tensors, sizeof *sorted, by_offset);
    for (uint64_t i = 1; i < h->n_tensors && !rc; i++) {
        const struct extent *x = &sorted[i - 1], *y = &sorted[i];
        if (x->bytes > y->off - x->off)
            rc = err(ERR_FORMAT,
                     "%s: tensor \"%s\": its bytes %" PRIu64 " to %" PRIu64
                     " overlap those of tensor \"%s\" from %" PRIu64,
                     h->info.path, gguf_parse_shown(x->name, strlen(x->name), a), x->off, x->off + x->bytes,
                     gguf_parse_shown(y->name, strlen(y->name), b), y->off);
    }
    mem_free(sorted);
    return rc;
}

/* From offsets behind the header to offsets in the file, which has to be large enough. */
static int place_tensors(struct gguf_header *h)
{
    struct gguf_part *info = &h->info;
    uint64_t file_bytes = h->is_head ? (uint64_t)INT64_MAX : info->bytes;
    uint64_t data_off =
        size_up(info->header_bytes, info->align_bytes); /* headers are below 2^31, alignments below 2^32 */
    char buf[80];

    for (uint64_t i = 0; i < h->n_tensors; i++) {
        struct gguf_tensor *t = &h->tensors[i];
        if (t->off % info->align_bytes)
            return err(ERR_FORMAT, "%s: tensor \"%s\": offset %" PRIu64 " is no multiple of the alignment %" PRIu64,
                       info->path, gguf_parse_shown(t->name, strlen(t->name), buf), t->off, info->align_bytes);
        if (t->off > file_bytes || data_off > file_bytes - t->off || t->bytes > file_bytes - t->off - data_off)
            return err(ERR_FORMAT,
                       "%s: tensor \"%s\": %" PRIu64 " bytes at offset %" PRIu64 " behind a header of %" PRIu64
                       " do not fit in a file of %" PRIu64,
                       info->path, gguf_parse_shown(t->name, strlen(t->name), buf), t->bytes, t->off, data_off,
                       file_bytes);
        t->off += data_off;
        if (t->off + t->bytes > info->end_bytes)
            info->end_bytes = t->off + t->bytes;
    }
    return check_overlaps(h);
}

/* Names to keys, alignment, tensors' places. */
static int part_check(struct part *part)
{
    struct gguf_header *h = &part->header;
    struct gguf g = alone(part);
    const char *twice;
    char buf[80];
    uint64_t align = 32; /* GGUF specification: the default */
    int rc = table_init(&part->keys, h->keys, h->n_keys, sizeof h->keys[0], &twice);

    if (rc)
        return rc;
    if (twice)
        return err(ERR_FORMAT, "%s: key \"%s\" is there twice", part->path,
                   gguf_parse_shown(twice, strlen(twice), buf));
    if ((rc = gguf_opt_u64(&g, "general.alignment", &align)))
        return rc;
    /* The specification wants a multiple of 8; ggml a power of two. */
    if (align < 8 || align > UINT32_MAX || (align & (align - 1)))
        return err(ERR_FORMAT, "%s: key \"general.alignment\" is %" PRIu64 ", no power of two from 8 to 2^31",
                   part->path, align);
    h->info.align_bytes = align;
    return place_tensors(h);
}

static void part_close(struct part *part)
{
    gguf_parse_done(&part->header);
    table_done(&part->keys);
    mem_free(part->path);
    part->path = NULL;
}

static int read_file(void *ctx, uint64_t off, void *dst, uint64_t bytes)
{
    return file_read(ctx, off, dst, bytes);
}

/* On failure part is all zeros. */
static int part_open(struct part *part, const char *path, const struct how *how)
{
    struct file *f = NULL;
    int rc;

    *part = (struct part){.path = mem_strdup(path, MEM_META), .header.is_head = how->is_head};
    if (!part->path)
        return err(ERR_NOMEM, "%s: its name", path);
    if ((rc = file_open(path, how->ops, &f)))
        goto out;
    const struct file_id *id = file_identity(f);
    part->header.info = (struct gguf_part){
        .path = part->path, .dev = id->dev, .ino = id->ino, .bytes = id->bytes, .mtime_ns = id->mtime_ns};
    if ((rc = gguf_parse(&part->header, &(struct gguf_source){f, read_file})) || (rc = part_check(part)))
        goto out;
    rc = file_check(f, id); /* nobody wrote to it meanwhile */
out:
    file_close(f);
    if (rc)
        part_close(part);
    return rc;
}

/* ---- split files ---- */

struct split {
    uint64_t no, count;
};

static int split_read(struct part *part, struct split *out)
{
    struct gguf g = alone(part);
    int rc;

    *out = (struct split){.no = 0, .count = 1};
    if ((rc = gguf_opt_u64(&g, "split.no", &out->no)) || (rc = gguf_opt_u64(&g, "split.count", &out->count)))
        return rc;
    if (!out->count) /* written by tools that do not split */
        out->count = 1;
    if (out->count > MAX_SPLITS)
        return err(ERR_LIMIT, "%s: key \"split.count\" is %" PRIu64 ", allowed are %d", part->path, out->count,
                   MAX_SPLITS);
    if (out->no >= out->count)
        return err(ERR_FORMAT, "%s: key \"split.no\" is %" PRIu64 " of a \"split.count\" of %" PRIu64, part->path,
                   out->no, out->count);
    return 0;
}

/* "-00001-of-00001.gguf", and room for numbers of any size, which MAX_SPLITS has refused by then. */
enum { SUFFIX_BYTES = 64 };

static void split_suffix(const struct split *s, char buf[static SUFFIX_BYTES])
{
    snprintf(buf, SUFFIX_BYTES, "-%05d-of-%05d.gguf", (int)s->no + 1, (int)s->count);
}

/* The path of another part, from the path and place of one. *out: caller frees. */
static int split_path(const char *path, const struct split *have, uint64_t want_no, char **out)
{
    char suffix[SUFFIX_BYTES];
    size_t n_path = strlen(path), n_suffix;

    split_suffix(have, suffix);
    n_suffix = strlen(suffix);
    if (n_path < n_suffix || strcmp(path + n_path - n_suffix, suffix) != 0)
        return err(ERR_FORMAT,
                   "%s: keys \"split.no\" and \"split.count\" are %" PRIu64 " and %" PRIu64
                   ", but the name does not end in %s, so the other parts cannot be found",
                   path, have->no, have->count, suffix);
    *out = mem_strdup(path, MEM_META);
    if (!*out)
        return err(ERR_NOMEM, "%s: its name", path);
    split_suffix(&(struct split){want_no, have->count}, suffix);
    memcpy(*out + n_path - n_suffix, suffix, n_suffix);
    return 0;
}

/* Open part no of the model that `path` is part `have` of. */
static int split_open(struct part *part, const char *path, const struct split *have, uint64_t no, const struct how *how)
{
    struct split got;
    char *name = NULL;
    int rc = split_path(path, have, no, &name);

    if (rc)
        return rc;
    if ((rc = part_open(part, name, how)))
        goto out;
    rc = split_read(part, &got);
    if (!rc && (got.no != no || got.count != have->count))
        rc = err(ERR_FORMAT,
                 "%s: its keys \"split.no\" and \"split.count\" are %" PRIu64 " and %" PRIu64 ", wanted %" PRIu64
                 " and %" PRIu64,
                 name, got.no, got.count, no, have->count);
    if (rc)
        part_close(part);
out:
    mem_free(name);
    return rc;
}

static int open_parts(struct gguf *g, const char *path, const struct how *how)
{
    struct part named, *parts;
    struct split have;
    int rc = part_open(&named, path, how);

    if (rc)
        return rc;
    if ((rc = split_read(&named, &have)))
        goto out;
    parts = mem_zalloc((size_t)have.count, sizeof *parts, MEM_META);
    if (!parts) {
        rc = err(ERR_NOMEM, "%s: a table of %" PRIu64 " parts", path, have.count);
        goto out;
    }
    g->parts = parts;
    for (uint64_t no = 0; no < have.count; no++) {
        if (no == have.no) {
            parts[no] = named;
            named = (struct part){0};
        } else if ((rc = split_open(&parts[no], path, &have, no, how))) {
            goto out;
        }
        g->n_parts = (int)no + 1;
    }
out:
    part_close(&named);
    return rc;
}

/* One list of tensors from all parts. */
static int merge_tensors(struct gguf *g)
{
    const char *path = g->parts[0].path, *twice;
    char buf[80];
    uint64_t n = 0, expected;
    int rc;

    for (int i = 0; i < g->n_parts; i++)
        n += g->parts[i].header.n_tensors;
    if (n > MAX_TENSORS)
        return err(ERR_LIMIT, "%s: %" PRIu64 " tensors in all parts, allowed are %" PRIu64, path, n, MAX_TENSORS);
    expected = n;
    if (g->n_parts > 1 && (rc = gguf_opt_u64(g, "split.tensors.count", &expected)))
        return rc;
    if (n != expected)
        return err(ERR_FORMAT,
                   "%s: key \"split.tensors.count\" is %" PRIu64 ", but the %d parts have %" PRIu64 " tensors", path,
                   expected, g->n_parts, n);
    g->tensors = mem_alloc((size_t)n * sizeof g->tensors[0], MEM_META);
    if (!g->tensors)
        return err(ERR_NOMEM, "%s: a table of %" PRIu64 " tensors", path, n);
    for (int i = 0; i < g->n_parts; i++) {
        struct gguf_header *h = &g->parts[i].header;
        for (uint64_t k = 0; k < h->n_tensors; k++) {
            g->tensors[g->n_tensors] = h->tensors[k];
            g->tensors[g->n_tensors++].file = i;
        }
        mem_free(h->tensors);
        h->tensors = NULL;
        h->n_tensors = 0;
    }
    rc = table_init(&g->tensor_table, g->tensors, n, sizeof g->tensors[0], &twice);
    if (!rc && twice)
        rc = err(ERR_FORMAT, "%s: tensor \"%s\" is there twice", path, gguf_parse_shown(twice, strlen(twice), buf));
    return rc;
}

/* ---- what keys and tensors say about each other ---- */

static int check_token_arrays(const struct gguf *g)
{
    static const char *const others[] = {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"};
    const struct gguf_key *tokens = gguf_find(g, "tokenizer.ggml.tokens");

    if (!tokens)
        return 0;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        const struct gguf_key *other = gguf_find(g, others[i]);
        if (other && other->array.n != tokens->array.n)
            return err(ERR_FORMAT, "%s: key \"%s\" has %" PRIu64 " elements, \"tokenizer.ggml.tokens\" %" PRIu64,
                       g->parts[0].path, others[i], other->array.n, tokens->array.n);
    }
    return 0;
}

/* Which dimension of a tensor counts experts, by the end of its name. */
static const struct {
    const char *suffix;
    int dim;
} expert_dims[] = {
    {"_exps.weight", 2},
    {"_exps.bias", 1},
    {".ffn_gate_inp.weight", 1},
    {".exp_probs_b.bias", 0},
};

static int check_expert_tensor(const struct gguf *g, const struct gguf_tensor *t, const char *key, uint64_t n_expert)
{
    size_t n_name = strlen(t->name);
    char name[80], shown_key[80];

    for (size_t i = 0; i < sizeof expert_dims / sizeof expert_dims[0]; i++) {
        size_t n = strlen(expert_dims[i].suffix);
        int dim = expert_dims[i].dim;
        if (n_name >= n && strcmp(t->name + n_name - n, expert_dims[i].suffix) == 0 && (uint64_t)t->ne[dim] != n_expert)
            return err(ERR_FORMAT, "%s: tensor \"%s\": dimension %d is %" PRId64 ", but key \"%s\" is %" PRIu64,
                       g->parts[t->file].path, gguf_parse_shown(t->name, n_name, name), dim, t->ne[dim],
                       gguf_parse_shown(key, strlen(key), shown_key), n_expert);
    }
    return 0;
}

static int check_experts(const struct gguf *g)
{
    struct gguf_str arch = {"", 0};
    uint64_t n_expert = 0, n_used = 0;
    char key[128], used_key[128], a[80], b[80];
    int rc = gguf_opt_str(g, "general.architecture", &arch);

    /* A longer name is no architecture's; which ones there are is the model's matter. */
    if (rc || !arch.n_bytes || arch.n_bytes > 64)
        return rc;
    snprintf(key, sizeof key, "%s.expert_count", arch.p);
    snprintf(used_key, sizeof used_key, "%s.expert_used_count", arch.p);
    if ((rc = gguf_opt_u64(g, key, &n_expert)) || (rc = gguf_opt_u64(g, used_key, &n_used)))
        return rc;
    if (n_used > n_expert)
        return err(ERR_FORMAT, "%s: key \"%s\" is %" PRIu64 ", \"%s\" only %" PRIu64, g->parts[0].path,
                   gguf_parse_shown(used_key, strlen(used_key), a), n_used, gguf_parse_shown(key, strlen(key), b),
                   n_expert);
    for (uint64_t i = 0; i < g->n_tensors && n_expert && !rc; i++)
        rc = check_expert_tensor(g, &g->tensors[i], key, n_expert);
    return rc;
}

/* ---- open and close ---- */

static int open_as(const char *path, const struct how *how, struct gguf **out)
{
    struct gguf *g = mem_zalloc(1, sizeof *g, MEM_META);
    int rc;

    *out = NULL;
    if (!g)
        return err(ERR_NOMEM, "%s: a handle of %zu bytes", path, sizeof *g);
    if ((rc = open_parts(g, path, how)) || (rc = merge_tensors(g)) || (rc = check_token_arrays(g)) ||
        (rc = check_experts(g))) {
        gguf_close(g);
        return rc;
    }
    for (int i = 0; i < g->n_parts; i++) {
        const struct gguf_header *h = &g->parts[i].header;
        g->identity = gguf_parse_mix(g->identity, h->hash);
        g->identity = gguf_parse_mix(g->identity, h->info.bytes);
        g->identity = gguf_parse_mix(g->identity, (uint64_t)h->info.mtime_ns);
    }
    *out = g;
    return 0;
}

int gguf_open(const char *path, const struct file_ops *ops, struct gguf **out)
{
    return open_as(path, &(struct how){ops, false}, out);
}

int gguf_open_head(const char *path, const struct file_ops *ops, struct gguf **out)
{
    return open_as(path, &(struct how){ops, true}, out);
}

void gguf_close(struct gguf *g)
{
    if (!g)
        return;
    for (int i = 0; i < g->n_parts; i++)
        part_close(&g->parts[i]);
    mem_free(g->parts);
    mem_free(g->tensors);
    table_done(&g->tensor_table);
    mem_free(g);
}

/* ---- keys ---- */

int gguf_n_keys(const struct gguf *g)
{
    return (int)g->parts[0].header.n_keys;
}

const struct gguf_key *gguf_key(const struct gguf *g, int i)
{
    assert(i >= 0 && i < gguf_n_keys(g));
    return &g->parts[0].header.keys[i];
}

const struct gguf_key *gguf_find(const struct gguf *g, const char *key)
{
    return table_find(&g->parts[0].keys, key);
}

const char *gguf_type_name(enum gguf_type type)
{
    return gguf_parse_type_name(type);
}

static bool is_integer(enum gguf_type type)
{
    return type <= GGUF_I32 || type == GGUF_U64 || type == GGUF_I64;
}

static bool is_signed(enum gguf_type type)
{
    return type == GGUF_I8 || type == GGUF_I16 || type == GGUF_I32 || type == GGUF_I64;
}

static bool is_number(enum gguf_type type)
{
    return is_integer(type) || type == GGUF_F32 || type == GGUF_F64;
}

/* An integer's bits, sign-extended to 64 where the type has a sign. */
static uint64_t integer(enum gguf_type type, const unsigned char *p)
{
    int n_bytes = gguf_parse_type_bytes(type);
    uint64_t v = gguf_parse_number(p, n_bytes), sign = (uint64_t)1 << (8 * n_bytes - 1);

    return is_signed(type) ? (v ^ sign) - sign : v;
}

static double number(enum gguf_type type, const unsigned char *p)
{
    uint64_t bits = gguf_parse_number(p, gguf_parse_type_bytes(type));
    uint32_t low = (uint32_t)bits;
    double d;
    float f;

    switch (type) {
    case GGUF_F32:
        memcpy(&f, &low, sizeof f);
        return (double)f;
    case GGUF_F64:
        memcpy(&d, &bits, sizeof d);
        return d;
    default:
        return is_signed(type) ? (double)(int64_t)integer(type, p) : (double)bits;
    }
}

static bool fits(enum gguf_type type, enum gguf_want want)
{
    switch (want) {
    case GGUF_WANT_INT:
        return is_integer(type);
    case GGUF_WANT_FLOAT:
        return is_number(type);
    case GGUF_WANT_BOOL:
        return type == GGUF_BOOL;
    case GGUF_WANT_STRING:
        return type == GGUF_STRING;
    case GGUF_WANT_ARRAY:
        return type == GGUF_ARRAY;
    }
    return false;
}

static const char *const want_names[] = {
    [GGUF_WANT_INT] = "integer",   [GGUF_WANT_FLOAT] = "number", [GGUF_WANT_BOOL] = "bool",
    [GGUF_WANT_STRING] = "string", [GGUF_WANT_ARRAY] = "array",
};

/* The error of a key that is not there, or 0 where it may be missing. */
static int missing(const struct gguf *g, const char *key, bool is_optional)
{
    char buf[80];

    if (is_optional)
        return 0;
    return err(ERR_FORMAT, "%s: key \"%s\" is missing", g->parts[0].path, gguf_parse_shown(key, strlen(key), buf));
}

/* *out: the value's bytes, NULL if an optional key is missing. */
static int scalar(const struct gguf *g, const char *key, bool is_optional, enum gguf_want want,
                  const struct gguf_key **out)
{
    const struct gguf_key *k = gguf_find(g, key);
    char buf[80];

    *out = k;
    if (!k)
        return missing(g, key, is_optional);
    if (k->type == GGUF_ARRAY || !fits(k->type, want))
        return err(ERR_FORMAT, "%s: key \"%s\" is of type %s, wanted is one %s", g->parts[0].path,
                   gguf_parse_shown(key, strlen(key), buf), gguf_type_name(k->type), want_names[want]);
    return 0;
}

static int get_u64(const struct gguf *g, const char *key, bool is_optional, uint64_t *out)
{
    const struct gguf_key *k;
    char buf[80];
    int rc = scalar(g, key, is_optional, GGUF_WANT_INT, &k);

    if (rc || !k)
        return rc;
    uint64_t v = integer(k->type, k->array.data);
    if (is_signed(k->type) && v > INT64_MAX)
        return err(ERR_FORMAT, "%s: key \"%s\" is %" PRId64 ", wanted is 0 or more", g->parts[0].path,
                   gguf_parse_shown(key, strlen(key), buf), (int64_t)v);
    *out = v;
    return 0;
}

static int get_i64(const struct gguf *g, const char *key, bool is_optional, int64_t *out)
{
    const struct gguf_key *k;
    char buf[80];
    int rc = scalar(g, key, is_optional, GGUF_WANT_INT, &k);

    if (rc || !k)
        return rc;
    uint64_t v = integer(k->type, k->array.data);
    if (!is_signed(k->type) && v > INT64_MAX)
        return err(ERR_FORMAT, "%s: key \"%s\" is %" PRIu64 ", wanted is less than 2^63", g->parts[0].path,
                   gguf_parse_shown(key, strlen(key), buf), v);
    *out = (int64_t)v;
    return 0;
}

static int get_f64(const struct gguf *g, const char *key, bool is_optional, double *out)
{
    const struct gguf_key *k;
    int rc = scalar(g, key, is_optional, GGUF_WANT_FLOAT, &k);

    if (!rc && k)
        *out = number(k->type, k->array.data);
    return rc;
}

static int get_bool(const struct gguf *g, const char *key, bool is_optional, bool *out)
{
    const struct gguf_key *k;
    int rc = scalar(g, key, is_optional, GGUF_WANT_BOOL, &k);

    if (!rc && k)
        *out = k->array.data[0];
    return rc;
}

static int get_str(const struct gguf *g, const char *key, bool is_optional, struct gguf_str *out)
{
    const struct gguf_key *k;
    int rc = scalar(g, key, is_optional, GGUF_WANT_STRING, &k);

    if (!rc && k)
        *out = gguf_at_str(&k->array, 0);
    return rc;
}

static int get_array(const struct gguf *g, const char *key, bool is_optional, enum gguf_want want,
                     struct gguf_array *out)
{
    const struct gguf_key *k = gguf_find(g, key);
    char buf[80];

    if (!k)
        return missing(g, key, is_optional);
    if (k->type != GGUF_ARRAY || !fits(k->array.type, want))
        return err(ERR_FORMAT, "%s: key \"%s\" is of type %s%s, wanted is an array of type %s", g->parts[0].path,
                   gguf_parse_shown(key, strlen(key), buf), k->type == GGUF_ARRAY ? "array of " : "",
                   gguf_type_name(k->array.type), want_names[want]);
    for (uint64_t i = 0; want == GGUF_WANT_INT && k->array.type == GGUF_U64 && i < k->array.n; i++) {
        uint64_t v = gguf_parse_number(k->array.data + 8 * i, 8);
        if (v > INT64_MAX)
            return err(ERR_FORMAT, "%s: key \"%s\": element %" PRIu64 " is %" PRIu64 ", wanted is less than 2^63",
                       g->parts[0].path, gguf_parse_shown(key, strlen(key), buf), i, v);
    }
    *out = k->array;
    return 0;
}

int gguf_u64(const struct gguf *g, const char *key, uint64_t *out)
{
    return get_u64(g, key, false, out);
}

int gguf_i64(const struct gguf *g, const char *key, int64_t *out)
{
    return get_i64(g, key, false, out);
}

int gguf_f64(const struct gguf *g, const char *key, double *out)
{
    return get_f64(g, key, false, out);
}

int gguf_bool(const struct gguf *g, const char *key, bool *out)
{
    return get_bool(g, key, false, out);
}

int gguf_str(const struct gguf *g, const char *key, struct gguf_str *out)
{
    return get_str(g, key, false, out);
}

int gguf_array(const struct gguf *g, const char *key, enum gguf_want want, struct gguf_array *out)
{
    return get_array(g, key, false, want, out);
}

int gguf_opt_u64(const struct gguf *g, const char *key, uint64_t *out)
{
    return get_u64(g, key, true, out);
}

int gguf_opt_i64(const struct gguf *g, const char *key, int64_t *out)
{
    return get_i64(g, key, true, out);
}

int gguf_opt_f64(const struct gguf *g, const char *key, double *out)
{
    return get_f64(g, key, true, out);
}

int gguf_opt_bool(const struct gguf *g, const char *key, bool *out)
{
    return get_bool(g, key, true, out);
}

int gguf_opt_str(const struct gguf *g, const char *key, struct gguf_str *out)
{
    return get_str(g, key, true, out);
}

int gguf_opt_array(const struct gguf *g, const char *key, enum gguf_want want, struct gguf_array *out)
{
    return get_array(g, key, true, want, out);
}

/* ---- elements ---- */

static uint64_t value_bytes(enum gguf_type type, const unsigned char *p);

/* The bytes of n values that lie one behind the other. */
static uint64_t values_bytes(enum gguf_type type, uint64_t n, const unsigned char *p)
{
    uint64_t bytes = 0;

    if (gguf_parse_type_bytes(type))
        return n * (uint64_t)gguf_parse_type_bytes(type);
    for (uint64_t i = 0; i < n; i++)
        bytes += value_bytes(type, p + bytes);
    return bytes;
}

/* Of a string or an array; the parser has bounded how deep this goes. */
static uint64_t value_bytes(enum gguf_type type, const unsigned char *p)
{
    if (type == GGUF_STRING)
        return 8 + gguf_parse_number(p, 8);
    return 12 + values_bytes((enum gguf_type)gguf_parse_number(p, 4), gguf_parse_number(p + 4, 8), p + 12);
}

uint64_t gguf_key_bytes(const struct gguf_key *key)
{
    return values_bytes(key->array.type, key->array.n, key->array.data);
}

static const unsigned char *element(const struct gguf_array *a, uint64_t i)
{
    assert(i < a->n);
    return a->data + (a->start ? a->start[i] : values_bytes(a->type, i, a->data));
}

int64_t gguf_at_i64(const struct gguf_array *a, uint64_t i)
{
    assert(is_integer(a->type));
    return (int64_t)integer(a->type, element(a, i));
}

double gguf_at_f64(const struct gguf_array *a, uint64_t i)
{
    assert(is_number(a->type));
    return number(a->type, element(a, i));
}

bool gguf_at_bool(const struct gguf_array *a, uint64_t i)
{
    assert(a->type == GGUF_BOOL);
    return *element(a, i);
}

struct gguf_str gguf_at_str(const struct gguf_array *a, uint64_t i)
{
    assert(a->type == GGUF_STRING);
    const unsigned char *p = element(a, i);
    return (struct gguf_str){(const char *)p + 8, gguf_parse_number(p, 8)};
}

struct gguf_array gguf_at_array(const struct gguf_array *a, uint64_t i)
{
    assert(a->type == GGUF_ARRAY);
    const unsigned char *p = element(a, i);
    return (struct gguf_array){
        .type = (enum gguf_type)gguf_parse_number(p, 4), .n = gguf_parse_number(p + 4, 8), .data = p + 12};
}

/* ---- tensors and files ---- */

int gguf_n_tensors(const struct gguf *g)
{
    return (int)g->n_tensors;
}

const struct gguf_tensor *gguf_tensor(const struct gguf *g, int i)
{
    assert(i >= 0 && i < gguf_n_tensors(g));
    return &g->tensors[i];
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name)
{
    return table_find(&g->tensor_table, name);
}

int gguf_version(const struct gguf *g)
{
    return (int)g->parts[0].header.version;
}

int gguf_n_parts(const struct gguf *g)
{
    return g->n_parts;
}

const struct gguf_part *gguf_part(const struct gguf *g, int i)
{
    assert(i >= 0 && i < g->n_parts);
    return &g->parts[i].header.info;
}

uint64_t gguf_header_bytes(const struct gguf *g)
{
    uint64_t bytes = 0;

    for (int i = 0; i < g->n_parts; i++)
        bytes += g->parts[i].header.info.header_bytes;
    return bytes;
}

uint64_t gguf_identity(const struct gguf *g)
{
    return g->identity;
}
