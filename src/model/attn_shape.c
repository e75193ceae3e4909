/* Owns the sizes of what attention on two sides needs beside the activations. */
#include "src/model/attn_shape.h"

#include "src/base/size.h"

/* So that one generated row has a wave of 128k positions. */
enum { LEAST_PLACES = 256 };

enum { ALIGN = 256 };

static void raise_to(uint64_t *most, uint64_t bytes)
{
    *most = bytes > *most ? bytes : *most;
}

bool attn_shape_is_split(const struct op *op)
{
    return (op->kind == OP_KV_APPEND || op->kind == OP_ATTENTION) && op->p.attn.window == 0;
}

uint64_t attn_shape_page_bytes(const struct op_attn *p)
{
    uint64_t v_bytes = (uint64_t)p->n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(p->kv_type, op_attn_v_row(p));
    return p->v_off + v_bytes - p->k_off;
}

static uint64_t state_bytes(const struct op_attn *p)
{
    return (uint64_t)p->n_head * (uint64_t)(p->head_dim_v + 2) * sizeof(float);
}

struct op attn_shape_states(const struct op *attention, int64_t n_rows, struct tensor *dst)
{
    struct op op = *attention;

    *dst = tensor_make(QUANT_F32, (int64_t)(state_bytes(&op.p.attn) / sizeof(float)), n_rows, 1, NULL);
    op.kind = OP_ATTN_STATES;
    op.dst[0] = dst;
    return op;
}

/* Room for bytes behind *off. */
static uint64_t place(uint64_t *off, uint64_t bytes)
{
    uint64_t at = *off;

    *off = size_up(at + bytes, ALIGN);
    return at;
}

static void lay_out(struct attn_shape *s, uint64_t n_rows)
{
    uint64_t n_places = (uint64_t)s->n_places;

    s->half_bytes = DEVICE_SEGMENT_PAGES * s->stage_page_bytes;
    s->states_off = place(&s->dev_bytes, n_places * s->state_row);
    s->sums_off = place(&s->dev_bytes, n_rows * s->state_row);
    s->stage_off = place(&s->dev_bytes, 2 * s->half_bytes);
    s->q_off = place(&s->host_bytes, n_rows * s->q_row);
    s->k_off = place(&s->host_bytes, n_rows * s->k_row);
    s->v_off = place(&s->host_bytes, n_rows * s->v_row);
    s->host_states_off = place(&s->host_bytes, n_places * s->state_row);
}

void attn_shape_of(const struct program *p, struct attn_shape *out)
{
    *out = (struct attn_shape){.n_places = p->n_rows > LEAST_PLACES ? p->n_rows : LEAST_PLACES};
    for (int i = 0; i < p->n_ops; i++) {
        const struct op *op = &p->ops[i];
        if (!attn_shape_is_split(op))
            continue;
        if (op->kind == OP_KV_APPEND) {
            raise_to(&out->k_row, op->src[0]->stride[1]);
            raise_to(&out->v_row, op->src[1] ? op->src[1]->stride[1] : 0);
            raise_to(&out->stage_page_bytes, size_up(attn_shape_page_bytes(&op->p.attn), ALIGN));
        } else {
            raise_to(&out->q_row, op->src[0]->stride[1]);
            raise_to(&out->state_row, state_bytes(&op->p.attn));
        }
    }
    if (out->state_row)
        lay_out(out, (uint64_t)p->n_rows);
}
