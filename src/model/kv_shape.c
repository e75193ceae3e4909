/* Owns the arithmetic of KV pages: how many bytes a page of a group of layers has, where a layer's rows lie in it, and how
 * many pages a sequence can come to hold. Who holds which page is run/cache.c's business. */
#include "src/model/model.h"

#include "src/base/err.h"
#include "src/base/size.h"

#include <inttypes.h>

/* Group 0: full attention; group 1: sliding windows; and both again for the host's layers. A model of window layers only has an empty
 * group 0 (pages of 0 bytes, and none of them), so that a layer's group always follows from its window and its side alone. */
enum { FULL, WINDOW, N_KINDS };
_Static_assert(2 * N_KINDS <= DEVICE_MAX_GROUPS, "kinds of layers on two sides");

enum { ROWS_ALIGN = 64 }; /* device.h: k_off and v_off are multiples of it */

static int check_head_dim(enum quant_type type, const char *what, int head_dim)
{
    if (type != QUANT_F16 && type != QUANT_Q8_0) {
        const struct quant_info *info = quant_info((int)type);
        return err(ERR_UNSUPPORTED, "KV cache of type %s: only F16 and Q8_0 can be written", info ? info->name : "?");
    }
    int block_len = quant_info((int)type)->block_len;
    if (head_dim % block_len)
        return err(ERR_UNSUPPORTED, "KV cache of type %s: a head's %s row has %d values, which is no multiple of %d",
                   quant_info((int)type)->name, what, head_dim, block_len);
    return 0;
}

/* One layer's K or V rows of a page, rounded so that what follows is aligned. */
static uint64_t rows_bytes(enum quant_type type, int n_head_kv, int head_dim)
{
    return size_up((uint64_t)n_head_kv * DEVICE_PAGE_TOK * quant_row_bytes(type, head_dim), ROWS_ALIGN);
}

uint64_t model_kv_conv_bytes(const struct model *m)
{
    const struct model_delta *d = &m->hp.delta;
    uint64_t channels =
        2 * (uint64_t)d->n_head_k * (uint64_t)d->head_dim_k + (uint64_t)d->n_head_v * (uint64_t)d->head_dim_v;

    return size_up((uint64_t)(d->n_conv - 1) * channels * sizeof(float), ROWS_ALIGN);
}

uint64_t model_kv_record_bytes(const struct model *m)
{
    const struct model_delta *d = &m->hp.delta;
    uint64_t s_floats = (uint64_t)d->n_head_v * (uint64_t)d->head_dim_k * (uint64_t)d->head_dim_v;

    return model_kv_conv_bytes(m) + size_up(s_floats * sizeof(float), ROWS_ALIGN);
}

uint64_t model_kv_record_off(const struct model *m, int layer, int first_layer)
{
    uint64_t off = 0;

    for (int i = layer < first_layer ? 0 : first_layer; i < layer; i++)
        off += m->layers[i].is_recurrent ? model_kv_record_bytes(m) : 0;
    return off;
}

int64_t model_kv_records(int64_t n_seq, bool is_pool)
{
    return is_pool ? 2 * n_seq + n_seq / 4 + 1 : 3 * n_seq;
}

int model_kv_shape(const struct model *m, enum quant_type type, int first_layer, struct kv_shape *out,
                   struct op_attn *p)
{
    struct kv_shape s = {.type = type, .n_groups = 1};
    int rc = check_head_dim(type, "K", m->hp.head_dim_k);

    if (!rc)
        rc = check_head_dim(type, "V", m->hp.head_dim_v);
    if (rc)
        return rc;
    for (int layer = 0; layer < m->hp.n_layer; layer++) {
        const struct model_layer *l = &m->layers[layer];
        if (l->is_recurrent) {
            *(layer < first_layer ? &s.host_record_bytes : &s.record_bytes) += model_kv_record_bytes(m);
            continue;
        }
        int group = (l->window > 0 ? WINDOW : FULL) + (layer < first_layer ? N_KINDS : 0);
        uint64_t k_off = s.page_bytes[group];
        uint64_t v_off = k_off + rows_bytes(type, l->n_head_kv, m->hp.head_dim_k);

        s.page_bytes[group] = v_off;
        if (m->hp.kv_is_latent)
            v_off = k_off;
        else
            s.page_bytes[group] += rows_bytes(type, l->n_head_kv, m->hp.head_dim_v);
        s.on_host[group] = layer < first_layer;
        if (group >= s.n_groups)
            s.n_groups = group + 1;
        /* Layers of different windows share their pages, which then live as long as the widest wants. */
        if (l->window > s.window[group])
            s.window[group] = l->window;
        if (p) {
            p[layer].group = group;
            p[layer].k_off = k_off;
            p[layer].v_off = v_off;
            p[layer].v_in_k = m->hp.kv_is_latent;
        }
    }
    *out = s;
    return 0;
}

int64_t model_kv_pages(const struct kv_shape *s, int group, int64_t n_tok, int64_t chunk_tok)
{
    int64_t n_all = n_tok / DEVICE_PAGE_TOK + (n_tok % DEVICE_PAGE_TOK != 0);

    if (group >= s->n_groups || !s->page_bytes[group] || n_tok <= 0)
        return 0;
    if (!s->window[group] || chunk_tok >= n_tok)
        return n_all;
    /* While a chunk is written, its first position still looks at the window - 1 positions before it. A stretch of
     * n >= 2 positions that begins on the last one of a page touches (n - 2) / page + 2 pages, and none touches more. */
    int64_t n = s->window[group] - 1 + (chunk_tok > 0 ? chunk_tok : 1);
    int64_t n_window = n < 2 ? 1 : (n - 2) / DEVICE_PAGE_TOK + 2;
    return n_window < n_all ? n_window : n_all;
}

int64_t model_kv_pool_pages(const struct kv_shape *s, int group, const struct kv_pool *pool)
{
    int64_t one = model_kv_pages(s, group, pool->n_ctx, pool->chunk_tok), all;

    if (__builtin_mul_overflow(one, pool->n_seq, &all))
        return -1;
    if (pool->pool_tok <= 0)
        return all;
    /* Whoever holds a page of a window group holds one of the full group for the same positions: no group needs more. */
    int64_t shared = pool->pool_tok / DEVICE_PAGE_TOK + (pool->pool_tok % DEVICE_PAGE_TOK != 0);
    if (shared < one)
        shared = one;
    return shared < all ? shared : all;
}

int64_t model_kv_dev_pages(const struct kv_shape *s, int group, const struct kv_pool *pool)
{
    int64_t all = model_kv_pool_pages(s, group, pool), dev = pool->dev_tok / DEVICE_PAGE_TOK;

    if (s->on_host[group])
        return 0;
    return s->window[group] || !pool->dev_tok || all < dev ? all : dev;
}

int64_t model_kv_host_pages(const struct kv_shape *s, int group, const struct kv_pool *pool)
{
    int64_t all = model_kv_pool_pages(s, group, pool), rest = all - model_kv_dev_pages(s, group, pool);

    return rest > 0 && pool->n_seq > 1 && !s->on_host[group] ? rest + 2 * DEVICE_SEGMENT_PAGES : rest;
}
