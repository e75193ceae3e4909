/* For the tests of cpu/: tensors over memory with guard bytes, pages of a KV cache, and one call that runs ops on a fresh
 * device. Everything random comes from rnd() with a seed of the test's own. */
#ifndef FERRY_TESTS_CPU_STEP_H
#define FERRY_TESTS_CPU_STEP_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "src/base/err.h"
#include "src/base/mem.h"

#define GUARD_BYTES 64
#define GUARD 0xa5

/* xorshift64*; uniform in [-1, 1). */
static uint64_t rnd_state = 1;

static inline uint64_t rnd_bits(void)
{
    rnd_state ^= rnd_state >> 12;
    rnd_state ^= rnd_state << 25;
    rnd_state ^= rnd_state >> 27;
    return rnd_state * UINT64_C(0x2545f4914f6cdd1d);
}

static inline float rnd(void)
{
    return (float)((double)(rnd_bits() >> 11) * 0x1p-52 - 1.0);
}

static inline int rnd_int(int n)
{
    return (int)(rnd_bits() >> 33) % n;
}

static inline void rnd_seed(uint64_t seed)
{
    rnd_state = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
}

/* Memory between two guards, filled with NaN bits. */
static inline void *guarded_make(uint64_t bytes)
{
    char *p = (char *)mem_alloc(bytes + 2 * GUARD_BYTES, MEM_OTHER);
    ck_assert_ptr_nonnull(p);
    memset(p, GUARD, GUARD_BYTES);
    memset(p + GUARD_BYTES, 0xff, bytes);
    memset(p + GUARD_BYTES + bytes, GUARD, GUARD_BYTES);
    return p + GUARD_BYTES;
}

static inline void guarded_free(void *p, uint64_t bytes)
{
    if (!p)
        return;
    unsigned char *raw = (unsigned char *)p - GUARD_BYTES;
    for (int i = 0; i < GUARD_BYTES; i++)
        ck_assert_msg(raw[i] == GUARD && raw[GUARD_BYTES + bytes + (uint64_t)i] == GUARD, "guard byte %d overwritten",
                      i);
    mem_free(raw);
}

/* A tensor with memory of its own; of F32 random. */
static inline struct tensor t_make(enum quant_type type, int64_t ne0, int64_t ne1, int64_t ne2)
{
    struct tensor t = tensor_make(type, ne0, ne1, ne2, NULL);
    t.data = guarded_make(tensor_bytes(&t));
    if (type == QUANT_F32)
        for (int64_t i = 0; i < ne0 * ne1 * ne2; i++)
            ((float *)t.data)[i] = rnd();
    return t;
}

/* Random weights of any type that has a quantizer. */
static inline struct tensor t_weight(enum quant_type type, int64_t ne0, int64_t ne1, int64_t ne2)
{
    struct tensor t = t_make(type, ne0, ne1, ne2);
    float *x = (float *)mem_alloc((size_t)ne0 * sizeof *x, MEM_OTHER);
    for (int64_t row = 0; row < ne1 * ne2; row++) {
        for (int64_t i = 0; i < ne0; i++)
            x[i] = rnd();
        quant_info((int)type)->from_float(x, (char *)t.data + (uint64_t)row * t.stride[1], ne0);
    }
    mem_free(x);
    return t;
}

static inline void t_free(struct tensor *t)
{
    guarded_free(t->data, tensor_bytes(t));
    t->data = NULL;
}

static inline float *t_f32(const struct tensor *t, int64_t row)
{
    return (float *)tensor_row(t, row);
}

/* Row `row` of matrix `slice` as floats. Caller frees with mem_free. */
static inline float *t_row_floats(const struct tensor *t, int64_t slice, int64_t row)
{
    float *x = (float *)mem_alloc((size_t)t->ne[0] * sizeof *x, MEM_OTHER);
    quant_info((int)t->type)->to_float((char *)tensor_slice(t, slice) + (uint64_t)row * t->stride[1], x, t->ne[0]);
    return x;
}

/* A device with its scratch. */
struct fixture {
    struct device *dev;
    void *scratch;
    uint64_t scratch_bytes;
    int n_threads;
};

static inline struct fixture fixture_open(const char *isa, int n_threads, enum device_prefill prefill)
{
    struct fixture f = {NULL, NULL, 0, n_threads};
    struct cpu_opts opts;
    memset(&opts, 0, sizeof opts);
    opts.n_threads = n_threads;
    opts.isa = isa;
    opts.prefill = prefill;
    ck_assert_msg(cpu_open(&opts, &f.dev) == 0, "%s", err_text());
    return f;
}

static inline void fixture_close(struct fixture *f)
{
    f->dev->ops->close(f->dev);
    guarded_free(f->scratch, f->scratch_bytes);
    f->scratch = NULL;
}

/* Run with exactly the scratch that the device asks for. */
static inline void fixture_run(struct fixture *f, const struct op *ops, int n_ops, const struct rows *rows)
{
    int n_rows = rows->n > rows->n_out ? rows->n : rows->n_out;
    guarded_free(f->scratch, f->scratch_bytes);
    f->scratch_bytes = f->dev->ops->scratch_bytes(ops, n_ops, n_rows, f->n_threads);
    f->scratch = guarded_make(f->scratch_bytes);
    ck_assert_int_eq(f->dev->ops->set_scratch(f->dev, f->scratch, f->scratch_bytes), 0);
    for (int i = 0; i < n_ops; i++)
        ck_assert_msg(f->dev->ops->can(&ops[i]), "op %d (%s)", i, device_op_name(ops[i].kind));
    ck_assert_msg(f->dev->ops->run(f->dev, ops, n_ops, rows) == 0, "%s", err_text());
}

/* Pages of one sequence for one group of layers: n_pages of page_bytes, in an order of their own. */
struct seq_pages {
    void **page; /* (n_pages) */
    char *memory;
    int64_t n_pages;
    uint64_t page_bytes;
    struct kv_seq view;
};

static inline struct seq_pages seq_pages_make(int64_t n_pages, uint64_t page_bytes, int group)
{
    struct seq_pages s;
    memset(&s, 0, sizeof s);
    s.n_pages = n_pages;
    s.page_bytes = page_bytes;
    s.page = (void **)mem_zalloc((size_t)n_pages, sizeof *s.page, MEM_OTHER);
    s.memory = (char *)guarded_make((uint64_t)n_pages * page_bytes);
    for (int64_t i = 0; i < n_pages; i++) /* the last page first: nothing may count on neighbours */
        s.page[i] = s.memory + (uint64_t)(n_pages - 1 - i) * page_bytes;
    s.view.page[group] = s.page;
    return s;
}

static inline void seq_pages_free(struct seq_pages *s)
{
    guarded_free(s->memory, (uint64_t)s->n_pages * s->page_bytes);
    mem_free(s->page);
}

#endif
