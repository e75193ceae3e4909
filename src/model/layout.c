/* Owns the arithmetic of holding weights in memory: stretches of files, and where they go. */
#include "src/model/layout.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <inttypes.h>
#include <stdlib.h>

uint64_t layout_weight_bytes(const struct weight *w)
{
    return w->t.stride[1] * (uint64_t)w->t.ne[1] * (uint64_t)w->t.ne[2];
}

/* The weight with only n of its matrices. */
struct part {
    const struct weight *w;
    int64_t n;
};

static int compare_place(const void *a, const void *b)
{
    const struct weight *x = ((const struct part *)a)->w, *y = ((const struct part *)b)->w;

    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->off < y->off ? -1 : x->off > y->off;
}

static uint64_t span_of(const struct part *part)
{
    struct tensor t = part->w->t;
    t.ne[2] = part->n;
    return tensor_bytes(&t);
}

/* Append the weight to the last range, or begin a new one behind it. */
static int place(struct layout *l, const struct part *part, uint64_t *weight_off)
{
    const struct weight *w = part->w;
    /* From its first byte to its last: gate and up in one stack lie between each other. */
    uint64_t span_bytes = span_of(part), first = w->off - w->off % LAYOUT_BLOCK_BYTES, data_end, end;
    struct layout_range *r = l->n_ranges ? &l->ranges[l->n_ranges - 1] : NULL;

    if (!size_add(w->off, span_bytes, &data_end) || !size_align(data_end, LAYOUT_BLOCK_BYTES, &end))
        return err(ERR_LIMIT, "%s: %" PRIu64 " bytes at offset %" PRIu64 " lie beyond any file", w->name, span_bytes,
                   w->off);
    if (!r || r->file != w->file || r->end < first) {
        r = &l->ranges[l->n_ranges++];
        *r = (struct layout_range){.file = w->file, .off = first, .end = first, .memory_off = l->bytes};
    }
    *weight_off = r->memory_off + (w->off - r->off);
    if (data_end > r->data_end)
        r->data_end = data_end;
    if (end > r->end) {
        if (!size_add(l->bytes, end - r->end, &l->bytes))
            return err(ERR_LIMIT, "%s: the weights up to here take more than 2^64 bytes", w->name);
        r->end = end;
    }
    return 0;
}

/* n_expert: NULL: all. */
static int init(const struct model *m, struct model_span span, const int *n_expert, struct layout *out)
{
    size_t n = (size_t)m->n_weights, n_placed = 0;
    struct part *by_place = mem_zalloc(n, sizeof *by_place, MEM_META);
    int rc = 0;

    *out = (struct layout){.bytes = 0};
    out->ranges = mem_zalloc(n, sizeof *out->ranges, MEM_META);
    out->weight_off = mem_zalloc(n, sizeof *out->weight_off, MEM_META);
    if (!by_place || !out->ranges || !out->weight_off) {
        rc = err(ERR_NOMEM, "places of %d weights: %zu bytes", m->n_weights,
                 n * (sizeof *out->ranges + sizeof *by_place + sizeof *out->weight_off));
        goto out;
    }
    for (int i = 0; i < m->n_weights; i++) {
        const struct weight *w = &m->weights[i];
        int64_t n_held = w->is_expert && n_expert ? n_expert[w->layer] : w->t.ne[2];
        if (n_held > 0 && model_span_has(m, span, i))
            by_place[n_placed++] = (struct part){w, n_held};
    }
    qsort(by_place, n_placed, sizeof *by_place, compare_place);
    for (size_t i = 0; i < n_placed && !rc; i++)
        rc = place(out, &by_place[i], &out->weight_off[by_place[i].w - m->weights]);
out:
    mem_free(by_place);
    if (rc)
        layout_done(out);
    return rc;
}

int layout_init(const struct model *m, struct layout *out)
{
    return init(m, model_all(m), NULL, out);
}

int layout_init_part(const struct model *m, struct model_span span, const int *n_expert, struct layout *out)
{
    return init(m, span, n_expert, out);
}

int layout_init_dense(const struct model *m, struct model_span span, struct layout *out)
{
    int *none = mem_zalloc((size_t)m->hp.n_layer, sizeof *none, MEM_META);

    *out = (struct layout){.bytes = 0};
    int rc = none ? init(m, span, none, out) : err(ERR_NOMEM, "places in %d layers", m->hp.n_layer);
    mem_free(none);
    return rc;
}

uint32_t layout_share(const struct model *m, int first_layer, uint32_t n, int *n_expert)
{
    uint32_t n_placed = 0;
    bool more = true;

    for (int layer = 0; layer < m->hp.n_layer; layer++)
        n_expert[layer] = 0;
    while (more && n_placed < n) {
        more = false;
        for (int layer = first_layer; layer < m->hp.n_layer && n_placed < n; layer++) {
            int stack = m->layers[layer].w[ROLE_EXPERT_GATE];
            if (stack < 0 || n_expert[layer] == m->weights[stack].t.ne[2])
                continue;
            n_expert[layer]++;
            n_placed++;
            more = true;
        }
    }
    return n_placed;
}

void layout_done(struct layout *l)
{
    mem_free(l->ranges);
    mem_free(l->weight_off);
    *l = (struct layout){.bytes = 0};
}
