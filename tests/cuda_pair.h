/* A CUDA device over the emulated runtime beside the plain C kernels on the CPU: all memory of an op - results, arguments, pages - is
 * mirrored on the device, and compared afterwards to its last byte: what should not have been written must still be there. lint: C, as
 * Check's suites are */
#ifndef FERRY_TESTS_CUDA_PAIR_H
#define FERRY_TESTS_CUDA_PAIR_H

#include "tests/cpu_step.h"

#include "cuda/cuda.h"
#include "tests/emu/emu.h"

enum { MAX_MIRRORS = 64 };

struct mirror {
    char *host, *dev;
    uint64_t bytes;
};

/* A device with copies of the host's memory. */
struct pair {
    struct device *cuda;
    struct mirror mirrors[MAX_MIRRORS];
    int n_mirrors;
    void *scratch;
};

static inline struct pair pair_open(enum device_prefill prefill)
{
    struct pair p = {.n_mirrors = 0};
    struct cuda_opts opts = {.most = {.n_rows = 224, .n_seqs = 4, .n_ctx = 20000, .n_expert = 64, .n_expert_used = 8},
                             .prefill = prefill};
    ck_assert_msg(cuda_open(&opts, &p.cuda) == 0, "%s", err_text());
    return p;
}

static inline void pair_close(struct pair *p)
{
    for (int i = 0; i < p->n_mirrors; i++)
        p->cuda->ops->release(p->cuda, p->mirrors[i].dev);
    p->cuda->ops->release(p->cuda, p->scratch);
    p->cuda->ops->close(p->cuda);
    ck_assert_int_eq(emu_n_live(), 0);
}

/* Where the device has what the host has at that address; it must have been mirrored. */
static inline void *there(const struct pair *p, const void *host)
{
    for (int i = 0; i < p->n_mirrors; i++)
        if ((const char *)host >= p->mirrors[i].host && (const char *)host < p->mirrors[i].host + p->mirrors[i].bytes)
            return p->mirrors[i].dev + ((const char *)host - p->mirrors[i].host);
    ck_abort_msg("an address without a mirror");
}

static inline void mirror(struct pair *p, void *host, uint64_t bytes)
{
    void *dev;

    for (int i = 0; i < p->n_mirrors; i++)
        if ((char *)host >= p->mirrors[i].host && (char *)host < p->mirrors[i].host + p->mirrors[i].bytes)
            return; /* or what it is a part of, which came first */
    ck_assert_int_lt(p->n_mirrors, MAX_MIRRORS);
    ck_assert_msg(p->cuda->ops->alloc(p->cuda, bytes, &dev) == 0, "%s", err_text());
    ck_assert_msg(p->cuda->ops->upload(p->cuda, dev, host, bytes) == 0, "%s", err_text());
    p->mirrors[p->n_mirrors++] = (struct mirror){host, dev, bytes};
}

static inline void mirror_tensor(struct pair *p, const struct tensor *t)
{
    if (t)
        mirror(p, t->data, tensor_bytes(t));
}

/* The same words; any NaN is as good as another. */
static inline void same_memory(struct pair *p, const char *what)
{
    for (int i = 0; i < p->n_mirrors; i++) {
        const struct mirror *m = &p->mirrors[i];
        char *got = mem_alloc(m->bytes, MEM_OTHER);
        ck_assert_msg(p->cuda->ops->download(p->cuda, got, m->dev, m->bytes) == 0, "%s", err_text());
        for (uint64_t at = 0; at < m->bytes; at += 4) {
            uint64_t n = m->bytes - at < 4 ? m->bytes - at : 4;
            float a = 0, b = 0;
            memcpy(&a, got + at, n);
            memcpy(&b, m->host + at, n);
            if (memcmp(&a, &b, n) && !(n == 4 && isnan(a) && isnan(b)))
                ck_abort_msg("%s: byte %d of %d of memory %d: %.9g instead of %.9g", what, (int)at, (int)m->bytes, i,
                             (double)a, (double)b);
        }
        mem_free(got);
    }
}

enum { MAX_OPS = 16 };

/* An op with the device's addresses; t: room for its tensors. */
static inline struct op moved(const struct pair *p, const struct op *op, struct tensor t[3 * OP_MAX_IO])
{
    struct op o = *op;

    for (int i = 0; i < OP_MAX_IO; i++) {
        const struct tensor **io[3] = {&o.dst[i], &o.src[i], &o.w[i]};
        for (int k = 0; k < 3; k++) {
            if (!*io[k])
                continue;
            t[3 * i + k] = **io[k];
            if (t[3 * i + k].data)
                t[3 * i + k].data = there(p, t[3 * i + k].data);
            *io[k] = &t[3 * i + k];
        }
    }
    return o;
}

/* Run on the device; the rows' pages and the ops' experts are the device's already. */
static inline int run_there(struct pair *p, const struct op *ops, int n_ops, const struct rows *rows)
{
    static struct tensor t[MAX_OPS][3 * OP_MAX_IO];
    struct op there_ops[MAX_OPS];
    const struct device_ops *d = p->cuda->ops;
    int n = rows->n > rows->n_out ? rows->n : rows->n_out;

    for (int i = 0; i < n_ops; i++)
        there_ops[i] = moved(p, &ops[i], t[i]);
    if (!p->scratch) {
        uint64_t bytes = d->scratch_bytes(there_ops, n_ops, n, 1);
        ck_assert_int_eq(d->alloc(p->cuda, bytes, &p->scratch), 0);
        ck_assert_int_eq(d->set_scratch(p->cuda, p->scratch, bytes), 0);
    }
    emu_in_step(true);
    int rc = d->run(p->cuda, there_ops, n_ops, rows);
    if (rc == 0)
        rc = d->sync(p->cuda);
    emu_in_step(false);
    return rc;
}

static inline void mirror_ops(struct pair *p, const struct op *ops, int n_ops)
{
    for (int i = 0; i < n_ops; i++)
        for (int k = 0; k < OP_MAX_IO; k++) {
            mirror_tensor(p, ops[i].dst[k]);
            mirror_tensor(p, ops[i].src[k]);
            mirror_tensor(p, ops[i].w[k]);
        }
}

static inline void run_here(const struct op *ops, int n_ops, const struct rows *rows)
{
    struct fixture f = fixture_open("ref", 1, DEVICE_PREFILL_INT);
    fixture_run(&f, ops, n_ops, rows);
    fixture_close(&f);
}

/* Ops whose memory is all in their tensors. */
static inline void same_result(const struct op *ops, int n_ops, const struct rows *rows, const char *what)
{
    struct pair p = pair_open(DEVICE_PREFILL_INT);

    mirror_ops(&p, ops, n_ops);
    for (int i = 0; i < n_ops; i++)
        ck_assert_msg(p.cuda->ops->can(&ops[i]), "%s", what);
    ck_assert_msg(run_there(&p, ops, n_ops, rows) == 0, "%s: %s", what, err_text());
    run_here(ops, n_ops, rows);
    same_memory(&p, what);
    pair_close(&p);
}

/* A tensor whose rows are further apart than they are long. */
static inline struct tensor t_apart(int64_t width, int64_t n, int apart)
{
    struct tensor t = t_make(QUANT_F32, width + apart, n, 1);
    t.ne[0] = width;
    return t;
}

static inline void t_done(struct tensor *t)
{
    t->ne[0] = (int64_t)(t->stride[1] / quant_row_bytes(t->type, quant_info((int)t->type)->block_len)) *
               quant_info((int)t->type)->block_len;
    t_free(t);
}

/* ---- cards ---- */

/* With bulk copies, and by asynchronous copies of threads: on cards of which some give a block little room, and whose warps have many sets
 * of rows each. */
static const int pair_cards[][3] = {{9, 4, EMU_MAX_SHARED}, {8, 1, 99 * 1024}, {8, 2, 64 * 1024}, {12, 3, 99 * 1024}};
enum { N_PAIR_CARDS = sizeof pair_cards / sizeof *pair_cards };

static inline void pair_use_card(int i)
{
    emu_set_card(pair_cards[i][0], pair_cards[i][1], pair_cards[i][2]);
}

/* ---- weights ---- */

/* Where a block's half scales are; -1: none. */
static inline void half_places(enum quant_type type, int place[2])
{
    place[0] = type == QUANT_IQ1_M || type == QUANT_MXFP4 || type == QUANT_NVFP4 ? -1
               : type == QUANT_Q2_K                                              ? 80
               : type == QUANT_Q3_K                                              ? 108
               : type == QUANT_Q6_K                                              ? 208
               : type == QUANT_TQ1_0                                             ? 52
               : type == QUANT_TQ2_0                                             ? 64
                                                                                 : 0;
    place[1] = type == QUANT_Q4_1 || type == QUANT_Q5_1 || type == QUANT_Q4_K || type == QUANT_Q5_K ? 2
               : type == QUANT_Q2_K                                                                 ? 82
                                                                                                    : -1;
}

/* Any codes and sub-scales, with ordinary float scales. */
static inline struct tensor t_codes(enum quant_type type, int64_t ne0, int64_t ne1, int64_t ne2)
{
    const struct quant_info *info = quant_info((int)type);
    struct tensor t = tensor_make(type, ne0, ne1, ne2, NULL);
    int place[2];

    if (info->block_len == 1)
        return t_weight(type, ne0, ne1, ne2);
    t.data = guarded_make(tensor_bytes(&t));
    half_places(type, place);
    for (uint64_t at = 0; at < tensor_bytes(&t); at += (uint64_t)info->block_bytes) {
        uint8_t *block = (uint8_t *)t.data + at;
        for (int i = 0; i < info->block_bytes; i++)
            block[i] = (uint8_t)rnd_bits();
        for (int i = 0; i < 2; i++)
            if (place[i] >= 0) {
                uint16_t h = quant_f32_to_f16(rnd());
                memcpy(block + place[i], &h, sizeof h);
            }
        if (type == QUANT_MXFP4)
            block[0] = (uint8_t)(120 + rnd_int(16));
        for (int i = 0; i < 4 && type == QUANT_IQ1_M; i++) /* a half from 0.5 to 1 on top of four words */
            block[49 + 2 * i] = (uint8_t)((block[49 + 2 * i] & 15) | (0x3801 >> 4 * i & 15) << 4);
    }
    return t;
}

static const enum quant_type weight_types[] = {
#define T(NAME, text, id, len, bytes, act, fn) QUANT_##NAME,
#include "quant/types.def"
#undef T
};
enum { N_WEIGHT_TYPES = sizeof weight_types / sizeof *weight_types };

/* Before each test. */
static inline void pair_setup(void)
{
    emu_reset(1);
    rnd_seed(1);
}

#endif
