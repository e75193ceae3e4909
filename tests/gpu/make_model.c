/* make_model SHAPE LAYERS OUT.gguf: a file of one of `ferry plan`'s shapes (src/cli/shape.c) with random weights, for timing on a
 * machine that has nothing but ferry. Types and bytes are right, the words are nonsense: tools/make-synthetic without Python. */
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/cli/shape.h"
#include "src/cli/text.h"
#include "src/model/gguf_write.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A matrix is drawn once for each type and width, a few rows of it, and written over and over from different rows. */
enum { MAX_POOLS = 16, END_TOKEN = 257 };
#define POOL_BYTES MIB
/* The router's logits: their spread, and the spread of the experts' popularity (exp of it), as tools/make-synthetic has them. */
#define ROUTER_SPREAD 1.5
#define ROUTER_SKEW 0.35

struct pool {
    enum quant_type type;
    int64_t width;
    char *rows; /* own */
    uint64_t n_rows, row_bytes;
};

static struct pool pools[MAX_POOLS];
static int n_pools;
static uint64_t random_state = 1;

/* xorshift64*, and from it normal numbers by the polar method of Marsaglia. */
static double uniform(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (double)(random_state * UINT64_C(0x2545f4914f6cdd1d) >> 11) * 0x1p-53;
}

static double normal(void)
{
    double x, y, s;

    do {
        x = 2 * uniform() - 1;
        y = 2 * uniform() - 1;
        s = x * x + y * y;
    } while (s >= 1 || s == 0);
    return x * sqrt(-2 * log(s) / s);
}

/* ---- data ---- */

static int pool_make(enum quant_type type, int64_t width, struct pool *p)
{
    float *x = mem_zalloc((size_t)width, sizeof *x, MEM_OTHER);

    *p = (struct pool){.type = type, .width = width, .row_bytes = quant_row_bytes(type, width)};
    p->n_rows = POOL_BYTES / p->row_bytes + 1;
    p->rows = x ? mem_zalloc(p->n_rows, p->row_bytes, MEM_OTHER) : NULL;
    for (uint64_t row = 0; p->rows && row < p->n_rows; row++) {
        for (int64_t i = 0; i < width; i++)
            x[i] = (float)(normal() / sqrt((double)width));
        quant_info((int)type)->from_float(x, p->rows + row * p->row_bytes, width);
    }
    mem_free(x);
    return p->rows ? 0 : err(ERR_NOMEM, "rows of %s", quant_info((int)type)->name);
}

static int pool_find(enum quant_type type, int64_t width, const struct pool **out)
{
    for (int i = 0; i < n_pools; i++) {
        *out = &pools[i];
        if (pools[i].type == type && pools[i].width == width)
            return 0;
    }
    if (n_pools == MAX_POOLS)
        return err(ERR_LIMIT, "more than %d kinds of rows", MAX_POOLS);
    *out = &pools[n_pools];
    return pool_make(type, width, &pools[n_pools++]);
}

static int write_matrix(struct gguf_write *w, int i, const struct gguf_tensor *t)
{
    const struct pool *p = NULL;
    int rc = pool_find(t->type, t->ne[0], &p);

    for (uint64_t at = 0; at < t->bytes && rc == 0;) {
        uint64_t first = (uint64_t)(uniform() * (double)p->n_rows / 2), n = (p->n_rows - first) * p->row_bytes;
        n = n < t->bytes - at ? n : t->bytes - at;
        rc = gguf_write_data(w, i, at, p->rows + first * p->row_bytes, n);
        at += n;
    }
    return rc;
}

/* Norms are ones; everything else that is not quantized is a router. */
static int write_floats(struct gguf_write *w, int i, const struct gguf_tensor *t)
{
    float *x = mem_alloc(t->bytes, MEM_OTHER);

    if (!x)
        return err(ERR_NOMEM, "%s", t->name);
    for (int64_t row = 0; row < t->ne[1]; row++) {
        double heat = exp(ROUTER_SKEW * normal());
        for (int64_t c = 0; c < t->ne[0]; c++)
            x[row * t->ne[0] + c] =
                t->n_dims == 1 ? 1.0f : (float)(normal() * heat * ROUTER_SPREAD / sqrt((double)t->ne[0]));
    }
    int rc = gguf_write_data(w, i, 0, x, t->bytes);
    mem_free(x);
    return rc;
}

/* ---- keys ---- */

static int add_string(struct text *t, const char *s, size_t n)
{
    uint64_t n_bytes = n;
    int rc = text_add(t, &n_bytes, sizeof n_bytes);
    return rc ? rc : text_add(t, s, n);
}

/* A code point below 2048. */
static size_t utf8(int c, char out[2])
{
    out[0] = (char)(c < 128 ? c : 0xc0 | c >> 6);
    out[1] = (char)(0x80 | (c & 63));
    return c < 128 ? 1 : 2;
}

/* GPT-2's way to write bytes: those that print as they are, the others from U+0100 on; then a merge, an end, fillers. */
static int write_vocabulary(struct gguf_write *w, int n_vocab)
{
    struct text tokens = {0}, types = {0}, merges = {0};
    int rc = n_vocab < 260 ? err(ERR_ARG, "a vocabulary of %d", n_vocab) : 0, spare = 256;

    for (int i = 0; i < n_vocab && !rc; i++) {
        bool prints = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
        int32_t type = i < END_TOKEN ? 1 : i == END_TOKEN ? 3 : 5; /* normal, control, unused */
        char s[32];
        size_t n = i < 256 ? utf8(prints ? i : spare++, s) : (size_t)snprintf(s, sizeof s, "<|unused %d|>", i);
        if (i == 256)
            n = (size_t)snprintf(s, sizeof s, "\u0120t");
        rc = add_string(&tokens, s, n);
        if (!rc)
            rc = text_add(&types, &type, sizeof type);
    }
    if (!rc)
        rc = add_string(&merges, "\u0120 t", strlen("\u0120 t"));
    const struct gguf_key keys[] = {
        {"tokenizer.ggml.tokens", GGUF_ARRAY, {GGUF_STRING, (uint64_t)n_vocab, (unsigned char *)tokens.p, NULL}},
        {"tokenizer.ggml.token_type", GGUF_ARRAY, {GGUF_I32, (uint64_t)n_vocab, (unsigned char *)types.p, NULL}},
        {"tokenizer.ggml.merges", GGUF_ARRAY, {GGUF_STRING, 1, (unsigned char *)merges.p, NULL}}};
    for (size_t i = 0; i < sizeof keys / sizeof *keys && !rc; i++)
        rc = gguf_write_key(w, &keys[i]);
    if (!rc)
        rc = gguf_write_str(w, "tokenizer.ggml.model", "gpt2", 4);
    if (!rc)
        rc = gguf_write_str(w, "tokenizer.ggml.pre", "gpt-2", 5);
    if (!rc)
        rc = gguf_write_u32(w, "tokenizer.ggml.eos_token_id", END_TOKEN);
    text_done(&tokens);
    text_done(&types);
    text_done(&merges);
    return rc;
}

static int write_header(struct gguf_write *w, const struct gguf *g, int n_vocab)
{
    int rc = 0;

    for (int i = 0; i < gguf_n_keys(g) && !rc; i++)
        if (strncmp(gguf_key(g, i)->name, "tokenizer.", strlen("tokenizer.")) != 0)
            rc = gguf_write_key(w, gguf_key(g, i));
    if (!rc)
        rc = write_vocabulary(w, n_vocab);
    for (int i = 0; i < gguf_n_tensors(g) && !rc; i++) {
        const struct gguf_tensor *t = gguf_tensor(g, i);
        rc = gguf_write_tensor(w, t->name, t->type, t->n_dims, t->ne);
    }
    return rc ? rc : gguf_write_layout(w, 0);
}

static int write_file(const struct model *m, int n_vocab, const char *path)
{
    struct gguf_write *w = NULL;
    int rc = gguf_write_make(&w);

    if (!rc)
        rc = write_header(w, m->gguf, n_vocab);
    if (!rc)
        rc = gguf_write_open(w, path, NULL);
    for (int i = 0; i < gguf_n_tensors(m->gguf) && !rc; i++) {
        const struct gguf_tensor *t = gguf_tensor(m->gguf, i);
        rc = t->type == QUANT_F32 ? write_floats(w, i, t) : write_matrix(w, i, t);
    }
    if (!rc)
        rc = gguf_write_commit(w);
    gguf_write_free(w);
    for (int i = 0; i < n_pools; i++)
        mem_free(pools[i].rows);
    return rc;
}

int main(int argc, char **argv)
{
    const struct shape *known = argc == 4 ? shape_find(argv[1]) : NULL;
    struct model *m = NULL;
    int n_layer = argc == 4 ? atoi(argv[2]) : 0;

    if (!known || n_layer < 1) {
        fprintf(stderr, "make_model SHAPE LAYERS OUT.gguf; shapes:");
        for (const struct shape *s = shape_all(); s->name; s++)
            fprintf(stderr, " %s", s->name);
        fprintf(stderr, "\n");
        return 2;
    }
    struct shape shape = *known;
    shape.n_layer = n_layer;
    int rc = shape_open(&shape, &m);
    if (!rc)
        rc = write_file(m, shape.n_vocab, argv[3]);
    if (rc)
        fprintf(stderr, "%s\n", err_text());
    model_close(m);
    return rc ? 1 : 0;
}
