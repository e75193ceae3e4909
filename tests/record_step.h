/* A recurrent layer's ops on sequences with records of their own, for the tests of cpu/ and cuda/. lint: C, as Check's suites are */
#ifndef FERRY_TESTS_RECORD_STEP_H
#define FERRY_TESTS_RECORD_STEP_H

#include "tests/cpu_step.h"

enum { REC_SEQS = 3, REC_ROWS = 96, REC_OPS = 3 };

struct rec_shape {
    int n_head_k, n_head_v, head_dim_k, head_dim_v, n_conv;
    bool is_tiled;
};

static const struct rec_shape rec_shapes[] = {{2, 4, 16, 16, 4, false},
                                              {2, 4, 128, 128, 4, true},
                                              {1, 1, 3, 5, 2, false},
                                              {3, 6, 7, 33, 3, true},
                                              {1, 2, 130, 70, 8, false}};
enum { REC_N_SHAPES = sizeof rec_shapes / sizeof *rec_shapes };

/* What a step is: rows of sequences, in this order. */
struct rec_step {
    int n_rows[REC_SEQS];
};

/* Two sequences side by side, then one alone, then a third that begins beside both. */
static const struct rec_step rec_steps[] = {{{11, 2, 0}}, {{1, 1, 0}}, {{0, 3, 0}}, {{9, 1, 2}}, {{1, 1, 1}}};
enum { REC_N_STEPS = sizeof rec_steps / sizeof *rec_steps, REC_MAX_POS = 22 };

struct rec_world {
    struct rec_shape s;
    int64_t keys, values, channels;
    uint64_t delta_off, bytes;    /* of a record; the layer's part begins behind some others */
    struct tensor x, alpha, beta; /* of all positions: row seq * REC_MAX_POS + pos */
    struct tensor conv, dt, a;
    struct tensor in, in_alpha, in_beta, mid, out; /* of a step */
    char *record[REC_SEQS][2]; /* guarded: (bytes) which of them is there: len is odd or even in steps */
    int now[REC_SEQS], len[REC_SEQS];
    int32_t pos[REC_ROWS], seq[REC_ROWS];
    struct kv_seq seqs[REC_SEQS];
    struct rows rows;
};

enum { REC_OFF = 192 };

static inline struct rec_world rec_make(const struct rec_shape *s)
{
    struct rec_world w = {.s = *s};

    w.keys = (int64_t)s->n_head_k * s->head_dim_k;
    w.values = (int64_t)s->n_head_v * s->head_dim_v;
    w.channels = 2 * w.keys + w.values;
    w.delta_off = REC_OFF + ((uint64_t)(s->n_conv - 1) * (uint64_t)w.channels * sizeof(float) + 63) / 64 * 64;
    w.bytes = w.delta_off + (uint64_t)s->head_dim_k * (uint64_t)w.values * sizeof(float) + 64;
    w.x = t_make(QUANT_F32, w.channels, REC_SEQS * REC_MAX_POS, 1);
    w.alpha = t_make(QUANT_F32, s->n_head_v, REC_SEQS * REC_MAX_POS, 1);
    w.beta = t_make(QUANT_F32, s->n_head_v, REC_SEQS * REC_MAX_POS, 1);
    w.conv = t_make(QUANT_F32, s->n_conv, w.channels, 1);
    w.dt = t_make(QUANT_F32, s->n_head_v, 1, 1);
    w.a = t_make(QUANT_F32, s->n_head_v, 1, 1);
    for (int i = 0; i < s->n_head_v; i++)
        t_f32(&w.a, 0)[i] = -fabsf(t_f32(&w.a, 0)[i]);
    w.in = t_make(QUANT_F32, w.channels, REC_ROWS, 1);
    w.in_alpha = t_make(QUANT_F32, s->n_head_v, REC_ROWS, 1);
    w.in_beta = t_make(QUANT_F32, s->n_head_v, REC_ROWS, 1);
    w.mid = t_make(QUANT_F32, w.channels, REC_ROWS, 1);
    w.out = t_make(QUANT_F32, w.values, REC_ROWS, 1);
    for (int i = 0; i < 2 * REC_SEQS; i++)
        w.record[i / 2][i % 2] = (char *)guarded_make(w.bytes);
    return w;
}

static inline void rec_free(struct rec_world *w)
{
    struct tensor *all[] = {&w->x,  &w->alpha,    &w->beta,    &w->conv, &w->dt, &w->a,
                            &w->in, &w->in_alpha, &w->in_beta, &w->mid,  &w->out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        t_free(all[i]);
    for (int i = 0; i < 2 * REC_SEQS; i++)
        guarded_free(w->record[i / 2][i % 2], w->bytes);
}

/* Views are the world's: it is not to be moved. */
static inline void rec_ops(const struct rec_world *w, struct op ops[REC_OPS])
{
    const struct rec_shape *s = &w->s;
    const struct op list[REC_OPS] = {
        {.kind = OP_CONV, .dst = {&w->mid}, .src = {&w->in}, .w = {&w->conv}, .p.conv.off = REC_OFF},
        {.kind = OP_L2_NORM, .dst = {&w->mid}, .src = {&w->mid}, .p.l2 = {2 * s->n_head_k, s->head_dim_k, 1e-6f}},
        {.kind = OP_DELTA_NET,
         .dst = {&w->out},
         .src = {&w->mid, &w->in_alpha, &w->in_beta},
         .w = {&w->dt, &w->a},
         .p.delta = {s->n_head_k, s->n_head_v, s->head_dim_k, s->head_dim_v, s->is_tiled, w->delta_off}}};
    memcpy(ops, list, sizeof list);
}

/* The rows of a step, and where its sequences' records are. */
static inline void rec_begin(struct rec_world *w, const struct rec_step *step)
{
    int n = 0;

    for (int s = 0; s < REC_SEQS; s++) {
        for (int i = 0; i < step->n_rows[s]; i++, n++) {
            int64_t at = s * REC_MAX_POS + w->len[s] + i;
            w->pos[n] = w->len[s] + i;
            w->seq[n] = s;
            memcpy(t_f32(&w->in, n), t_f32(&w->x, at), (size_t)w->channels * sizeof(float));
            memcpy(t_f32(&w->in_alpha, n), t_f32(&w->alpha, at), (size_t)w->s.n_head_v * sizeof(float));
            memcpy(t_f32(&w->in_beta, n), t_f32(&w->beta, at), (size_t)w->s.n_head_v * sizeof(float));
        }
        w->seqs[s] = (struct kv_seq){.record = w->len[s] ? w->record[s][w->now[s]] : NULL,
                                     .next_record = w->record[s][!w->now[s]]};
    }
    w->rows = (struct rows){.n = n, .pos = w->pos, .seq = w->seq, .seqs = w->seqs};
}

static inline void rec_end(struct rec_world *w, const struct rec_step *step)
{
    for (int s = 0; s < REC_SEQS; s++)
        if (step->n_rows[s]) {
            w->len[s] += step->n_rows[s];
            w->now[s] ^= 1;
        }
}

#endif
