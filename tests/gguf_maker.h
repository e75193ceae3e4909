/* A writer of small GGUF files that can be told to lie, for the suites of the parser. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_GGUF_MAKER_H
#define FERRY_TESTS_GGUF_MAKER_H

#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "tests/memfile.h"

#include <check.h>
#include <string.h>

struct bytes {
    unsigned char p[1 << 14];
    size_t n;
};

static inline void maker_put(struct bytes *b, uint64_t v, int n)
{
    ck_assert_uint_le(b->n + 8, sizeof b->p);
    for (int i = 0; i < n; i++)
        b->p[b->n++] = (unsigned char)(v >> (8 * i));
}

static inline void maker_put_n(struct bytes *b, const void *p, size_t n)
{
    ck_assert_uint_le(b->n + n, sizeof b->p);
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

static inline void maker_put_str(struct bytes *b, const char *s)
{
    maker_put(b, strlen(s), 8);
    maker_put_n(b, s, strlen(s));
}

struct maker {
    uint64_t magic, version, n_keys, n_tensors;
    struct bytes keys, tensors;
    uint64_t align, data_bytes; /* behind the header */
};

static inline void maker_key(struct maker *m, const char *name, enum gguf_type type)
{
    maker_put_str(&m->keys, name);
    maker_put(&m->keys, type, 4);
    m->n_keys++;
}

static inline void maker_key_u32(struct maker *m, const char *name, uint32_t v)
{
    maker_key(m, name, GGUF_U32);
    maker_put(&m->keys, v, 4);
}

static inline void maker_key_str(struct maker *m, const char *name, const char *v)
{
    maker_key(m, name, GGUF_STRING);
    maker_put_str(&m->keys, v);
}

static inline void maker_key_array(struct maker *m, const char *name, enum gguf_type type, uint64_t n)
{
    maker_key(m, name, GGUF_ARRAY);
    maker_put(&m->keys, type, 4);
    maker_put(&m->keys, n, 8);
}

static inline void maker_tensor(struct maker *m, const char *name, int type, uint64_t ne0, uint64_t ne1, uint64_t off)
{
    maker_put_str(&m->tensors, name);
    maker_put(&m->tensors, 2, 4);
    maker_put(&m->tensors, ne0, 8);
    maker_put(&m->tensors, ne1, 8);
    maker_put(&m->tensors, (uint64_t)type, 4);
    maker_put(&m->tensors, off, 8);
    m->n_tensors++;
}

static inline void maker_tensor3(struct maker *m, const char *name, uint64_t ne0, uint64_t ne1, uint64_t ne2,
                                 uint64_t off)
{
    maker_put_str(&m->tensors, name);
    maker_put(&m->tensors, 3, 4);
    maker_put(&m->tensors, ne0, 8);
    maker_put(&m->tensors, ne1, 8);
    maker_put(&m->tensors, ne2, 8);
    maker_put(&m->tensors, QUANT_F32, 4);
    maker_put(&m->tensors, off, 8);
    m->n_tensors++;
}

/* A small valid model: 2 tensors, 4 tokens. */
static inline void maker_init(struct maker *m)
{
    memset(m, 0, sizeof *m);
    m->magic = 0x46554747;
    m->version = 3;
    m->align = 32;
    m->data_bytes = 4 * 64 + 2 * 34;
    maker_key_str(m, "general.architecture", "llama");
    maker_key_u32(m, "llama.block_count", 1);
    maker_key_array(m, "tokenizer.ggml.tokens", GGUF_STRING, 4);
    maker_put_str(&m->keys, "<s>");
    maker_put_str(&m->keys, "a");
    maker_put_str(&m->keys, "");
    maker_put_str(&m->keys, "bc");
    maker_key_array(m, "tokenizer.ggml.scores", GGUF_F32, 4);
    maker_put(&m->keys, 0, 8);
    maker_put(&m->keys, 0, 8);
    maker_tensor(m, "x.weight", QUANT_F32, 32, 2, 0);
    maker_tensor(m, "y.weight", QUANT_Q8_0, 64, 1, 256);
}

/* The file, padded as its alignment says. */
static inline void maker_finish(const struct maker *m, struct bytes *out)
{
    static const unsigned char zeros[4096];

    out->n = 0;
    maker_put(out, m->magic, 4);
    maker_put(out, m->version, 4);
    maker_put(out, m->n_tensors, 8);
    maker_put(out, m->n_keys, 8);
    maker_put_n(out, m->keys.p, m->keys.n);
    maker_put_n(out, m->tensors.p, m->tensors.n);
    if (m->align && m->align <= sizeof zeros && out->n % m->align)
        maker_put_n(out, zeros, (size_t)(m->align - out->n % m->align));
    maker_put_n(out, zeros, (size_t)m->data_bytes);
}

static inline int maker_open_bytes(const struct bytes *b, struct gguf **g)
{
    struct memfiles files = {0};
    struct file_ops ops = memfile_ops(&files);

    memfile_add(&files, "m.gguf", b->p, b->n);
    int rc = gguf_open("m.gguf", &ops, g);
    ck_assert_int_eq(files.n_open, 0);
    return rc;
}

static inline uint64_t maker_live_bytes(void)
{
    return mem_live_bytes(MEM_META);
}

#endif
