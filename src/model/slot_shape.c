/* Owns the arithmetic of expert slots: classes of equal size, and how many of each some memory gives. */
#include "src/model/slot_shape.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/layout.h"

#include <inttypes.h>

static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};

uint64_t slot_shape_matrix_bytes(uint64_t bytes)
{
    return size_up(bytes + LAYOUT_BLOCK_BYTES - 1, LAYOUT_BLOCK_BYTES);
}

/* 0: the layer has no experts. */
static uint64_t layer_slot_bytes(const struct model *m, int layer)
{
    uint64_t sum = 0;

    for (int i = 0; i < 3; i++) {
        int w = m->layers[layer].w[stacks[i]];
        if (w < 0)
            return 0;
        sum += slot_shape_matrix_bytes(model_matrix_bytes(&m->weights[w]));
    }
    return sum;
}

static void add_layer(const struct model *m, int layer, int n_away, struct slot_shape *s)
{
    uint64_t slot_bytes = layer_slot_bytes(m, layer);
    int i = 0;

    s->class_of[layer] = -1;
    int n_experts = slot_bytes ? (int)m->weights[m->layers[layer].w[ROLE_EXPERT_GATE]].t.ne[2] - n_away : 0;
    if (n_experts <= 0)
        return;
    while (i < s->n_classes && s->classes[i].slot_bytes != slot_bytes)
        i++;
    if (i == s->n_classes)
        s->classes[s->n_classes++] = (struct slot_class){.slot_bytes = slot_bytes, .n_used = 1};
    struct slot_class *c = &s->classes[i];
    int n_used = m->hp.n_expert_used < n_experts ? m->hp.n_expert_used : n_experts;
    c->n_layers++;
    c->n_experts += n_experts;
    if (n_used > c->n_used)
        c->n_used = n_used;
    s->class_of[layer] = i;
    s->n_experts += n_experts;
}

static int n_stacked(const struct model *m, int layer)
{
    int stack = m->layers[layer].w[ROLE_EXPERT_GATE];
    return stack < 0 ? 0 : (int)m->weights[stack].t.ne[2];
}

/* Slots for all experts of the layers of which not all are away; false: ram_bytes are too few. */
static bool all_fit(const struct model *m, const int *n_away, uint64_t ram_bytes, struct slot_shape *s)
{
    uint64_t bytes = 0;

    for (int layer = 0; layer < m->hp.n_layer; layer++)
        add_layer(m, layer, n_away[layer] == n_stacked(m, layer) ? n_away[layer] : 0, s);
    for (int i = 0; i < s->n_classes; i++)
        bytes += (uint64_t)s->classes[i].n_experts * s->classes[i].slot_bytes;
    if (bytes <= ram_bytes)
        return true;
    s->n_classes = s->n_experts = 0;
    return false;
}

/* What is left beyond the least is shared in proportion, rounded down; then slot by slot while one fits. */
static void share(struct slot_shape *s, uint64_t left_bytes)
{
    double wanted_bytes = 0;

    for (int i = 0; i < s->n_classes; i++)
        wanted_bytes += (double)(s->classes[i].n_experts - s->classes[i].n_slots) * (double)s->classes[i].slot_bytes;
    double part = wanted_bytes > (double)left_bytes ? (double)left_bytes / wanted_bytes : 1;
    for (int i = 0; i < s->n_classes; i++) {
        struct slot_class *c = &s->classes[i];
        int n = (int)(part * (c->n_experts - c->n_slots));
        if ((uint64_t)n > left_bytes / c->slot_bytes)
            n = (int)(left_bytes / c->slot_bytes);
        c->n_slots += n;
        left_bytes -= (uint64_t)n * c->slot_bytes;
    }
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < s->n_classes; i++) {
            struct slot_class *c = &s->classes[i];
            if (c->n_slots == c->n_experts || c->slot_bytes > left_bytes)
                continue;
            c->n_slots++;
            left_bytes -= c->slot_bytes;
            more = true;
        }
    }
}

int slot_shape_init(const struct model *m, const int *n_away, uint64_t ram_bytes, struct slot_shape *out)
{
    size_t n = (size_t)m->hp.n_layer;
    uint64_t least_bytes = 0;
    char a[32], b[32];
    int rc = 0;

    *out = (struct slot_shape){.bytes = 0};
    out->classes = mem_zalloc(n, sizeof *out->classes, MEM_META);
    out->class_of = mem_zalloc(n, sizeof *out->class_of, MEM_META);
    if (!out->classes || !out->class_of) {
        slot_shape_done(out);
        return err(ERR_NOMEM, "sizes of the experts of %zu layers", n);
    }
    bool has_all = n_away && all_fit(m, n_away, ram_bytes, out);
    for (int layer = 0; !has_all && layer < m->hp.n_layer; layer++)
        add_layer(m, layer, n_away ? n_away[layer] : 0, out);
    for (int i = 0; i < out->n_classes; i++) {
        struct slot_class *c = &out->classes[i];
        c->n_slots = c->n_used;
        least_bytes += (uint64_t)c->n_used * c->slot_bytes;
    }
    if (ram_bytes && ram_bytes < least_bytes)
        rc = err(ERR_LIMIT, "expert slots: %s allowed, a token needs %s at least", size_format(ram_bytes, a, sizeof a),
                 size_format(least_bytes, b, sizeof b));
    if (rc) {
        slot_shape_done(out);
        return rc;
    }
    if (ram_bytes)
        share(out, ram_bytes - least_bytes);
    for (int i = 0; i < out->n_classes; i++) {
        out->n_slots += out->classes[i].n_slots;
        out->bytes += (uint64_t)out->classes[i].n_slots * out->classes[i].slot_bytes;
    }
    return 0;
}

void slot_shape_done(struct slot_shape *s)
{
    mem_free(s->classes);
    mem_free(s->class_of);
    *s = (struct slot_shape){.bytes = 0};
}
