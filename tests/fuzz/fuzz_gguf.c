/* Any bytes as a GGUF: opening ends in a model or an error, what it hands out can be read to the last byte, and nothing
 * stays behind. An input that begins with 'S' is a model in two parts; the two bytes behind it are the length of the
 * first. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "tests/fuzz/fuzz.h"
#include "tests/memfile.h"

#include <stdlib.h>

static volatile uint64_t sink; /* so that no read is optimised away */

static void look_at_bytes(const char *p, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        sink += (unsigned char)p[i];
}

static void look_at_array(const struct gguf_array *a)
{
    /* Walked elements cost n each: all of a short array, the ends of a long one. */
    for (uint64_t i = 0; i < a->n; i++) {
        if (i >= 64 && i + 2 < a->n)
            i = a->n - 2;
        if (a->type == GGUF_STRING) {
            struct gguf_str s = gguf_at_str(a, i);
            look_at_bytes(s.p, s.n_bytes);
        } else if (a->type == GGUF_ARRAY) {
            struct gguf_array inner = gguf_at_array(a, i);
            look_at_array(&inner);
        } else if (a->type == GGUF_BOOL) {
            sink += gguf_at_bool(a, i);
        } else {
            sink += gguf_at_f64(a, i) > 0;
        }
    }
}

static void look_at_key(const struct gguf *g, const struct gguf_key *key)
{
    struct gguf_str s;
    struct gguf_array a;
    uint64_t u;
    int64_t i;
    double f;
    bool b;

    if (gguf_find(g, key->name) != key)
        abort();
    look_at_array(&key->array);
    sink += (unsigned char)gguf_type_name(key->type)[0];
    if (!gguf_u64(g, key->name, &u))
        sink += u;
    if (!gguf_i64(g, key->name, &i))
        sink += (uint64_t)i;
    if (!gguf_f64(g, key->name, &f))
        sink += f > 0;
    if (!gguf_bool(g, key->name, &b))
        sink += b;
    if (!gguf_str(g, key->name, &s))
        look_at_bytes(s.p, s.n_bytes + 1); /* the NUL too */
    for (int want = GGUF_WANT_INT; want <= GGUF_WANT_ARRAY; want++) {
        if (!gguf_array(g, key->name, (enum gguf_want)want, &a))
            sink += a.n;
    }
}

static void look_at_tensors(const struct gguf *g)
{
    for (int i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);
        const struct gguf_part *part = gguf_part(g, t->file);
        if (gguf_find_tensor(g, t->name) != t || t->n_dims < 1 || t->n_dims > 4 || strlen(t->name) > 63)
            abort();
        if (t->off < part->header_bytes || t->off > part->bytes || t->bytes > part->bytes - t->off)
            abort();
        for (int dim = 0; dim < 4; dim++) {
            if (t->ne[dim] < 1)
                abort();
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);
    struct gguf *g;

    if (n > 3 && data[0] == 'S') {
        size_t at = 3 + (size_t)(data[1] | data[2] << 8);
        at = at < n ? at : n;
        memfile_add(&files, "m-00001-of-00002.gguf", data + 3, at - 3);
        memfile_add(&files, "m-00002-of-00002.gguf", data + at, n - at);
    } else {
        memfile_add(&files, "m-00001-of-00002.gguf", data, n);
    }
    if (!gguf_open("m-00001-of-00002.gguf", &ops, &g)) {
        for (int i = 0; i < gguf_n_keys(g); i++)
            look_at_key(g, gguf_key(g, i));
        look_at_tensors(g);
        sink += gguf_identity(g) + gguf_header_bytes(g) + (uint64_t)gguf_version(g);
        gguf_close(g);
    } else if (!err_text()[0]) {
        abort();
    }
    if (mem_live_bytes(MEM_META) || files.n_open)
        abort();
    return 0;
}
