/* ferry info: what a GGUF file says about itself. Any family, also those that ferry cannot run. */
#include "src/cli/cmd.h"

#include "quant/quant.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/model/gguf.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Longer arrays (vocabularies) are told by their length. */
enum { SHOWN_IN_TEXT = 8, SHOWN_IN_JSON = 256, ROLE_BYTES = 64 };

/* Tensors of one type, or of one role: the name without its layer. */
struct group {
    char name[ROLE_BYTES];
    int n;
    uint64_t n_params, bytes;
};

struct info {
    const struct gguf *gguf; /* view */
    struct group *types;     /* own: (n_types), as the next */
    struct group *roles;
    int n_types, n_roles;
    uint64_t n_params, bytes, file_bytes, missing_bytes; /* missing: of a download that was cut */
};

/* ---- sums ---- */

static uint64_t n_params(const struct gguf_tensor *t)
{
    return (uint64_t)t->ne[0] * (uint64_t)t->ne[1] * (uint64_t)t->ne[2] * (uint64_t)t->ne[3];
}

/* "blk.12.ffn_up.weight" plays the role "ffn_up.weight". */
static const char *role_of(const char *name)
{
    if (strncmp(name, "blk.", 4))
        return name;
    const char *p = name + 4 + strspn(name + 4, "0123456789");
    return *p == '.' && p[1] ? p + 1 : name;
}

static void count(struct group *groups, int *n_groups, const char *name, const struct gguf_tensor *t)
{
    int i = 0;

    while (i < *n_groups && strcmp(groups[i].name, name))
        i++;
    if (i == *n_groups)
        snprintf(groups[(*n_groups)++].name, ROLE_BYTES, "%s", name);
    groups[i].n++;
    groups[i].n_params += n_params(t);
    groups[i].bytes += t->bytes;
}

static int by_bytes(const void *a, const void *b)
{
    const struct group *x = a, *y = b;
    return x->bytes != y->bytes ? (x->bytes < y->bytes ? 1 : -1) : strcmp(x->name, y->name);
}

static int collect(const struct gguf *gguf, struct info *info)
{
    size_t n = (size_t)gguf_n_tensors(gguf);

    *info = (struct info){.gguf = gguf};
    info->types = mem_zalloc(n + 1, sizeof *info->types, MEM_OTHER);
    info->roles = mem_zalloc(n + 1, sizeof *info->roles, MEM_OTHER);
    if (!info->types || !info->roles)
        return err(ERR_NOMEM, "sizes of %zu tensors", n);
    for (int i = 0; i < (int)n; i++) {
        const struct gguf_tensor *t = gguf_tensor(gguf, i);
        count(info->types, &info->n_types, quant_info((int)t->type)->name, t);
        count(info->roles, &info->n_roles, role_of(t->name), t);
        info->n_params += n_params(t);
        info->bytes += t->bytes;
    }
    for (int i = 0; i < gguf_n_parts(gguf); i++) {
        const struct gguf_part *part = gguf_part(gguf, i);
        info->file_bytes += part->bytes;
        info->missing_bytes += part->end_bytes > part->bytes ? part->end_bytes - part->bytes : 0;
    }
    qsort(info->types, (size_t)info->n_types, sizeof *info->types, by_bytes);
    qsort(info->roles, (size_t)info->n_roles, sizeof *info->roles, by_bytes);
    return 0;
}

/* ---- for people ---- */

static void print_element(const struct gguf_array *a, uint64_t i)
{
    char shown[96];
    struct gguf_str s;

    switch (a->type) {
    case GGUF_STRING:
        s = gguf_at_str(a, i);
        text_printable(s.p, s.n_bytes, shown, sizeof shown);
        printf("\"%s\"%s", shown, s.n_bytes >= sizeof shown ? "..." : "");
        break;
    case GGUF_BOOL:
        fputs(gguf_at_bool(a, i) ? "true" : "false", stdout);
        break;
    case GGUF_F32:
    case GGUF_F64:
        printf("%g", gguf_at_f64(a, i));
        break;
    case GGUF_ARRAY:
        fputs("[...]", stdout);
        break;
    case GGUF_U64:
        printf("%" PRIu64, (uint64_t)gguf_at_i64(a, i));
        break;
    default:
        printf("%" PRId64, gguf_at_i64(a, i));
    }
}

static void print_key(const struct gguf_key *key)
{
    char name[128];

    text_printable(key->name, strlen(key->name), name, sizeof name);
    printf("  %-44s ", name);
    if (key->type != GGUF_ARRAY) {
        print_element(&key->array, 0);
    } else {
        uint64_t n = key->array.n < SHOWN_IN_TEXT ? key->array.n : SHOWN_IN_TEXT;
        putchar('[');
        for (uint64_t i = 0; i < n; i++) {
            fputs(i ? ", " : "", stdout);
            print_element(&key->array, i);
        }
        if (n < key->array.n)
            printf(", ... %" PRIu64 " in all", key->array.n);
        putchar(']');
    }
    putchar('\n');
}

static void print_groups(const char *title, const struct group *groups, int n, uint64_t all_bytes)
{
    char size[32];

    printf("\n%-34s %8s %16s %10s\n", title, "tensors", "parameters", "size");
    for (int i = 0; i < n; i++)
        printf("  %-32s %8d %16" PRIu64 " %10s %6.1f %%\n", groups[i].name, groups[i].n, groups[i].n_params,
               size_format(groups[i].bytes, size, sizeof size),
               all_bytes ? 100 * (double)groups[i].bytes / (double)all_bytes : 0);
}

static void print_tensor(const struct gguf_tensor *t)
{
    char name[80], shape[96], size[32];
    int n = 0;

    text_printable(t->name, strlen(t->name), name, sizeof name);
    for (int d = 0; d < t->n_dims; d++)
        n += snprintf(shape + n, sizeof shape - (size_t)n, "%s%" PRId64, d ? " x " : "", t->ne[d]);
    printf("  %-40s %-8s %-28s %10s  part %d at %" PRIu64 "\n", name, quant_info((int)t->type)->name, shape,
           size_format(t->bytes, size, sizeof size), t->file, t->off);
}

static void print_text(const struct info *info, bool tensors)
{
    const struct gguf *g = info->gguf;
    char a[32], b[32];

    for (int i = 0; i < gguf_n_parts(g); i++)
        printf("%-10s %s\n", i ? "" : "file", gguf_part(g, i)->path);
    printf("size       %s, of which header %s; GGUF version %d\n", size_format(info->file_bytes, a, sizeof a),
           size_format(gguf_header_bytes(g), b, sizeof b), gguf_version(g));
    if (info->missing_bytes)
        printf("missing    %s of tensors lie past the end: only a beginning is here\n",
               size_format(info->missing_bytes, a, sizeof a));
    printf("tensors    %d, %" PRIu64 " parameters", gguf_n_tensors(g), info->n_params);
    if (info->n_params)
        printf(", %.2f bits each", 8 * (double)info->bytes / (double)info->n_params);
    printf("\n\nmetadata\n");
    for (int i = 0; i < gguf_n_keys(g); i++)
        print_key(gguf_key(g, i));
    print_groups("by type", info->types, info->n_types, info->bytes);
    print_groups("by role", info->roles, info->n_roles, info->bytes);
    if (!tensors)
        return;
    printf("\ntensors\n");
    for (int i = 0; i < gguf_n_tensors(g); i++)
        print_tensor(gguf_tensor(g, i));
}

/* ---- JSON ---- */

/* Bytes that are no UTF-8 are told as printable text. */
static json_t *json_text(const char *p, uint64_t n_bytes)
{
    char shown[256];
    json_t *v = json_stringn(p, (size_t)n_bytes);

    if (v)
        return v;
    text_printable(p, (size_t)n_bytes, shown, sizeof shown);
    for (char *c = shown; *c; c++)
        *c = (unsigned char)*c < 0x80 ? *c : '?';
    return json_string(shown);
}

static json_t *json_element(const struct gguf_array *a, uint64_t i)
{
    struct gguf_str s;
    json_t *number;

    switch (a->type) {
    case GGUF_STRING:
        s = gguf_at_str(a, i);
        return json_text(s.p, s.n_bytes);
    case GGUF_BOOL:
        return json_boolean(gguf_at_bool(a, i));
    case GGUF_F32:
    case GGUF_F64:
        /* NaN and infinities are not JSON. */
        number = json_real(gguf_at_f64(a, i));
        return number ? number : json_null();
    case GGUF_ARRAY:
        return json_pack("{s:s, s:I}", "array_of", gguf_type_name(gguf_at_array(a, i).type), "n",
                         (json_int_t)gguf_at_array(a, i).n);
    default:
        return json_integer(gguf_at_i64(a, i));
    }
}

static json_t *json_value(const struct gguf_key *key)
{
    if (key->type != GGUF_ARRAY)
        return json_element(&key->array, 0);
    if (key->array.n > SHOWN_IN_JSON)
        return json_pack("{s:s, s:I}", "array_of", gguf_type_name(key->array.type), "n", (json_int_t)key->array.n);
    json_t *a = json_array();
    for (uint64_t i = 0; i < key->array.n; i++)
        json_array_append_new(a, json_element(&key->array, i));
    return a;
}

static json_t *json_groups(const struct group *groups, int n)
{
    json_t *a = json_array();

    for (int i = 0; i < n; i++)
        json_array_append_new(a, json_pack("{s:o, s:i, s:I, s:I}", "name",
                                           json_text(groups[i].name, strlen(groups[i].name)), "tensors", groups[i].n,
                                           "parameters", (json_int_t)groups[i].n_params, "bytes",
                                           (json_int_t)groups[i].bytes));
    return a;
}

static json_t *json_tensors(const struct gguf *g)
{
    json_t *a = json_array();

    for (int i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);
        json_t *shape = json_array();
        for (int d = 0; d < t->n_dims; d++)
            json_array_append_new(shape, json_integer(t->ne[d]));
        json_array_append_new(a,
                              json_pack("{s:o, s:s, s:o, s:I, s:i, s:I}", "name", json_text(t->name, strlen(t->name)),
                                        "type", quant_info((int)t->type)->name, "shape", shape, "bytes",
                                        (json_int_t)t->bytes, "part", t->file, "offset", (json_int_t)t->off));
    }
    return a;
}

static int print_json(const struct info *info, bool tensors)
{
    const struct gguf *g = info->gguf;
    json_t *o = json_object(), *files = json_array(), *metadata = json_object();

    for (int i = 0; i < gguf_n_parts(g); i++)
        json_array_append_new(files, json_text(gguf_part(g, i)->path, strlen(gguf_part(g, i)->path)));
    for (int i = 0; i < gguf_n_keys(g); i++) {
        const struct gguf_key *key = gguf_key(g, i);
        json_object_set_new(metadata, key->name, json_value(key));
    }
    json_object_set_new(o, "files", files);
    json_object_set_new(o, "file_bytes", json_integer((json_int_t)info->file_bytes));
    json_object_set_new(o, "missing_bytes", json_integer((json_int_t)info->missing_bytes));
    json_object_set_new(o, "header_bytes", json_integer((json_int_t)gguf_header_bytes(g)));
    json_object_set_new(o, "version", json_integer(gguf_version(g)));
    json_object_set_new(o, "n_tensors", json_integer(gguf_n_tensors(g)));
    json_object_set_new(o, "n_parameters", json_integer((json_int_t)info->n_params));
    json_object_set_new(o, "metadata", metadata);
    json_object_set_new(o, "by_type", json_groups(info->types, info->n_types));
    json_object_set_new(o, "by_role", json_groups(info->roles, info->n_roles));
    if (tensors)
        json_object_set_new(o, "tensors", json_tensors(g));
    int failed = json_dumpf(o, stdout, JSON_INDENT(2));
    json_decref(o);
    putchar('\n');
    return failed ? err(ERR_NOMEM, "the report as JSON") : 0;
}

int cmd_info(const struct conf *conf)
{
    struct gguf *gguf = NULL;
    struct info info = {0};
    int rc = gguf_open_head(conf->model, NULL, &gguf);

    if (!rc)
        rc = collect(gguf, &info);
    if (!rc && conf->json)
        rc = print_json(&info, conf->tensors);
    else if (!rc)
        print_text(&info, conf->tensors);
    mem_free(info.types);
    mem_free(info.roles);
    gguf_close(gguf);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
