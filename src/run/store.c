/* Owns the memory that weights are held in (or the mapped files), and the loans of experts. Leaves to others how bytes come
 * from disk (store_load.c, io/), where each weight goes (model/layout.h), what lies on a GPU (store_gpu.c), and what is computed
 * with it.
 * Dense weights are resident: with a GPU in its memory, those of the layers before its own in the host's. Experts are, too, and a loan has
 * nothing to wait for, unless the plan gives them slots: then store_slots.c reads them when they are wanted. */
#include "src/run/store.h"

#include "io/file.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf.h"
#include "src/model/layout.h"
#include "src/run/store_gpu.h"
#include "src/run/store_load.h"
#include "src/run/store_slots.h"
#include "src/run/touch.h"

#include <assert.h>
#include <inttypes.h>
#include <string.h>

struct store {
    const struct model *model; /* view */
    const char *
        *weight; /* own: (n_weights) views of each one's first byte in the host's memory; NULL: it is not there */
    struct file **files; /* own: (n_files); open only while loading, or mapped, or read by slots */
    int n_files;
    bool is_mapped;
    char *memory; /* own: (memory_bytes); NULL when mapped, or where a device has all */
    uint64_t memory_bytes;
    struct store_gpu *gpu;     /* own; NULL: all weights are in host memory */
    struct device *dev;        /* view; NULL: the same */
    struct store_slots *slots; /* own; NULL: all experts are resident, or on the device */
    int32_t *host_ids;         /* own: (n_expert) of the loan, those that are not on the device */
    int32_t *hint_ids;         /* own: (n_expert) of the hint, the same */
    struct store_lease host;   /* their loan */
    bool skips_device;         /* loans do not look there */
    struct store_stats stats;
};

uint64_t store_bytes(const struct model *m, enum plan_io io)
{
    struct layout layout;

    if (io == PLAN_IO_MMAP)
        return 0;
    if (layout_init(m, &layout))
        return UINT64_MAX;
    uint64_t bytes = layout.bytes;
    layout_done(&layout);
    return bytes;
}

/* ---- files ---- */

static int check_same(struct file *f, const struct gguf_part *part)
{
    return file_check(
        f, &(struct file_id){.dev = part->dev, .ino = part->ino, .bytes = part->bytes, .mtime_ns = part->mtime_ns});
}

static int check_files(const struct store *s)
{
    int rc = 0;

    for (int i = 0; i < s->n_files && !rc; i++)
        rc = s->model->gguf ? check_same(s->files[i], gguf_part(s->model->gguf, i))
                            : file_check(s->files[i], file_identity(s->files[i]));
    return rc;
}

static int open_files(struct store *s, const struct store_args *a)
{
    const struct gguf *gguf = a->model->gguf;
    int rc = 0, n_files = gguf ? gguf_n_parts(gguf) : 1;

    s->files = mem_zalloc((size_t)n_files, sizeof *s->files, MEM_META);
    if (!s->files)
        return err(ERR_NOMEM, "handles of %d files", n_files);
    for (; s->n_files < n_files && !rc; s->n_files += !rc)
        rc = file_open(gguf ? gguf_part(gguf, s->n_files)->path : a->model->path, a->ops, &s->files[s->n_files]);
    return rc ? rc : check_files(s);
}

static void close_files(struct store *s)
{
    for (int i = 0; i < s->n_files; i++) {
        s->stats.n_repeats += file_n_repeats(s->files[i]);
        file_close(s->files[i]);
    }
    mem_free(s->files);
    s->files = NULL;
    s->n_files = 0;
}

/* A weight past the end of its file would be a signal when it is touched, where the file is mapped. */
static int check_ends(const struct store *s)
{
    for (int i = 0; i < s->model->n_weights; i++) {
        const struct weight *w = &s->model->weights[i];
        if (w->file < 0 || w->file >= s->n_files)
            return err(ERR_FORMAT, "%s lies in file %d of %d", w->name, w->file, s->n_files);
        uint64_t bytes = tensor_bytes(&w->t), file_bytes = file_identity(s->files[w->file])->bytes;
        if (bytes > file_bytes || w->off > file_bytes - bytes)
            return err(ERR_IO, "%s: %s takes %" PRIu64 " bytes at offset %" PRIu64 ", the file ends at %" PRIu64,
                       file_path(s->files[w->file]), w->name, bytes, w->off, file_bytes);
    }
    return 0;
}

/* ---- open ---- */

static int map_weights(struct store *s)
{
    const struct model *m = s->model;

    s->is_mapped = true;
    for (int i = 0; i < m->n_weights; i++) {
        const void *base;
        int rc = file_map(s->files[m->weights[i].file], &base);
        if (rc)
            return rc;
        s->weight[i] = (const char *)base + m->weights[i].off;
    }
    return 0;
}

static int open_slots(struct store *s, const struct store_args *a)
{
    return store_slots_open(&(struct store_slots_args){.args = a, .files = s->files, .n_files = s->n_files}, &s->slots);
}

/* Dense weights, and experts if they have no slots, into memory; beside a device those of the host's layers. */
static int load_weights(struct store *s, const struct store_args *a, const struct layout *layout)
{
    const struct model_span span = plan_span(a->plan, s->model, a->plan->has_gpu ? PLAN_BEFORE : PLAN_MAIN);

    s->memory_bytes = layout->bytes;
    s->memory = mem_map(layout->bytes, MEM_WEIGHTS);
    if (!s->memory)
        return err(ERR_NOMEM, "weights of %s: %" PRIu64 " bytes", s->model->path, layout->bytes);
    int rc = store_load_place(a->plan, s->memory, layout->bytes);
    if (rc)
        return rc;
    for (int i = 0; i < s->model->n_weights; i++)
        if (model_span_has(s->model, span, i) && !(a->plan->slot_ram_bytes && s->model->weights[i].is_expert))
            s->weight[i] = s->memory + layout->weight_off[i];

    struct store_load load = {
        .args = a, .layout = layout, .files = s->files, .n_files = s->n_files, .memory = s->memory};
    struct touch *touch = NULL;
    uint64_t load_bytes = 0;
    rc = touch_start(s->memory, layout->bytes, &touch);
    if (!rc && a->plan->slot_ram_bytes) /* before the dense weights: its memory is touched while they are read */
        rc = open_slots(s, a);
    if (!rc)
        rc = store_load_run(&load, a->plan->io, &load_bytes);
    touch_stop(touch);
    s->stats.load_bytes += load_bytes;
    s->stats.resident_bytes += s->memory_bytes;
    return rc;
}

/* Experts of the layer that the host should have, into host_ids: those that are not on the device, or, unless all are there, all. */
static int wanted_of(struct store *s, int layer, bool all)
{
    struct store_expert e;
    int n = 0, stack = s->model->layers[layer].w[ROLE_EXPERT_GATE];
    int n_expert = stack < 0 ? 0 : (int)s->model->weights[stack].t.ne[2];

    all = all && store_gpu_n_experts(s->gpu, layer) < n_expert;
    for (int i = 0; i < n_expert; i++)
        if (all || !store_gpu_find(s->gpu, layer, i, &e))
            s->host_ids[n++] = i;
    return n;
}

/* Is there a slot for each of them? n_wanted (n_layer): how many; *total_bytes: all of them. */
static bool count_wanted(struct store *s, bool all, int *n_wanted, uint64_t *total_bytes)
{
    *total_bytes = 0;
    for (int layer = 0; layer < s->model->hp.n_layer; layer++) {
        n_wanted[layer] = wanted_of(s, layer, all);
        *total_bytes += n_wanted[layer] ? (uint64_t)n_wanted[layer] * model_expert_bytes(s->model, layer) : 0;
    }
    return store_slots_have_room(s->slots, n_wanted);
}

/* Where memory has room for all experts, or for all that the device has not, they are read now, as they are without a device: wanted one
 * by one, many a token would wait for one, and while any is on disk routers are asked ahead, which an H200 waited 150 us a layer for. */
static int read_host_experts(struct store *s, const struct store_args *a)
{
    const int n_layer = s->model->hp.n_layer;
    uint64_t total = 0, done = 0;
    int rc = 0, *n_wanted = mem_zalloc((size_t)n_layer, sizeof *n_wanted, MEM_META);

    if (!n_wanted)
        return err(ERR_NOMEM, "numbers of experts of %d layers", n_layer);
    bool all = count_wanted(s, true, n_wanted, &total), has_room = all || count_wanted(s, false, n_wanted, &total);
    for (int layer = 0; has_room && layer < n_layer && !rc; layer++) {
        if (!n_wanted[layer])
            continue;
        rc = store_slots_read(s->slots, layer, s->host_ids, wanted_of(s, layer, all));
        done += (uint64_t)n_wanted[layer] * model_expert_bytes(s->model, layer);
        if (!rc && a->progress && !a->progress(done, total, a->progress_arg))
            rc = err(ERR_CANCEL, "loading was stopped after %" PRIu64 " of %" PRIu64 " bytes of experts", done, total);
    }
    s->stats.load_bytes += store_slots_begin(s->slots);
    mem_free(n_wanted);
    return rc;
}

/* Dense weights and some experts to the device, those of the host's layers into memory, slots for the other experts. */
static int load_device(struct store *s, const struct store_args *a, const struct layout *layout)
{
    struct store_gpu_args gpu = {.args = a, .files = s->files, .n_files = s->n_files};
    int rc = store_gpu_open(&gpu, &s->stats.load_bytes, &s->gpu);

    if (rc)
        return rc;
    s->dev = a->device;
    s->stats.resident_bytes = store_gpu_bytes(s->gpu);
    if (plan_has_host_layers(a->plan))
        rc = load_weights(s, a, layout);
    else if (a->plan->slot_ram_bytes)
        rc = open_slots(s, a);
    if (rc || !s->slots)
        return rc;
    s->host_ids = mem_zalloc((size_t)s->model->hp.n_expert, sizeof *s->host_ids, MEM_META);
    s->hint_ids = mem_zalloc((size_t)s->model->hp.n_expert, sizeof *s->hint_ids, MEM_META);
    if (!s->host_ids || !s->hint_ids)
        return err(ERR_NOMEM, "a loan of %d experts", s->model->hp.n_expert);
    return read_host_experts(s, a);
}

static int fill(struct store *s, const struct store_args *a, const struct layout *layout)
{
    if (a->plan->io == PLAN_IO_MMAP)
        return map_weights(s);
    int rc = a->plan->has_gpu ? load_device(s, a, layout) : load_weights(s, a, layout);
    if (!rc)
        rc = check_files(s); /* what was read of a file that changed meanwhile is of no use */
    if (!rc && !s->slots)
        close_files(s);
    return rc;
}

/* What lies in the host's memory. */
static int lay_out(const struct store_args *a, struct layout *out)
{
    const struct plan *p = a->plan;

    if (p->has_gpu || p->slot_ram_bytes)
        return layout_init_dense(a->model, plan_span(p, a->model, p->has_gpu ? PLAN_BEFORE : PLAN_MAIN), out);
    return layout_init(a->model, out);
}

int store_open(const struct store_args *a, struct store **out)
{
    struct store *s = mem_zalloc(1, sizeof *s, MEM_META);
    struct layout layout = {.bytes = 0};
    uint64_t start_ns = clock_ns();
    int rc;

    *out = NULL;
    if (!s || !(s->weight = mem_zalloc((size_t)a->model->n_weights, sizeof *s->weight, MEM_META))) {
        rc = err(ERR_NOMEM, "addresses of %d weights", a->model->n_weights);
        goto out;
    }
    s->model = a->model;
    rc = lay_out(a, &layout);
    if (!rc)
        rc = open_files(s, a);
    if (!rc)
        rc = check_ends(s);
    if (!rc)
        rc = fill(s, a, &layout);
    if (rc)
        goto out;
    s->stats.load_ns = clock_ns() - start_ns;
    *out = s;
    s = NULL;
out:
    layout_done(&layout);
    store_close(s);
    return rc;
}

void store_close(struct store *s)
{
    if (!s)
        return;
    store_slots_close(s->slots);
    store_gpu_close(s->gpu);
    close_files(s);
    mem_unmap(s->memory, s->memory_bytes, MEM_WEIGHTS);
    mem_free(s->hint_ids);
    mem_free(s->host_ids);
    mem_free(s->weight);
    mem_free(s);
}

int store_check(struct store *s)
{
    return s->is_mapped ? check_files(s) : 0;
}

/* ---- loans ---- */

const void *store_weight(const struct store *s, int weight)
{
    assert(weight >= 0 && weight < s->model->n_weights);
    const struct weight *w = &s->model->weights[weight];
    if (s->gpu)
        return w->is_expert && !store_is_on_device(s, w->layer) ? NULL : store_gpu_weight(s->gpu, weight);
    return store_host_weight(s, weight);
}

const void *store_host_weight(const struct store *s, int weight)
{
    assert(weight >= 0 && weight < s->model->n_weights);
    return s->model->weights[weight].is_expert ? NULL : s->weight[weight];
}

void store_host_memory(const struct store *s, void **memory, uint64_t *bytes)
{
    *memory = s->memory;
    *bytes = s->memory_bytes;
}

int store_copy_weight(const struct store *s, int weight, void *dst)
{
    uint64_t bytes = layout_weight_bytes(&s->model->weights[weight]);
    const void *here = store_host_weight(s, weight);

    if (!here)
        return s->dev->ops->download(s->dev, dst, store_weight(s, weight), bytes);
    memcpy(dst, here, bytes);
    return 0;
}

bool store_has_device(const struct store *s)
{
    return s->gpu != NULL;
}

bool store_is_on_device(const struct store *s, int layer)
{
    int stack = s->model->layers[layer].w[ROLE_EXPERT_GATE];
    return s->gpu && (stack < 0 || store_gpu_n_experts(s->gpu, layer) == s->model->weights[stack].t.ne[2]);
}

static const enum role stacks[3] = {ROLE_EXPERT_GATE, ROLE_EXPERT_UP, ROLE_EXPERT_DOWN};

void store_use_device(struct store *s, bool use)
{
    s->skips_device = !use;
}

static bool find_on_device(const struct store *s, int layer, int expert, struct store_expert *out)
{
    bool is_seen = !s->skips_device || store_is_on_device(s, layer);
    return is_seen && store_gpu_find(s->gpu, layer, expert, out);
}

static int n_experts_of(const struct store *s, int layer)
{
    int stack = layer >= 0 && layer < s->model->hp.n_layer ? s->model->layers[layer].w[ROLE_EXPERT_GATE] : -1;
    return stack < 0 ? 0 : (int)s->model->weights[stack].t.ne[2];
}

enum store_place store_where(const struct store *s, int layer, int expert)
{
    struct store_expert e;

    if (s->gpu && find_on_device(s, layer, expert, &e))
        return STORE_ON_DEVICE;
    return !s->slots || store_slots_peek(s->slots, layer, expert, &e) ? STORE_IN_MEMORY : STORE_ON_DISK;
}

int store_n_on_disk(const struct store *s, int layer)
{
    int n = 0;

    for (int i = 0; i < n_experts_of(s, layer); i++)
        n += store_where(s, layer, i) == STORE_ON_DISK;
    return n;
}

bool store_peek(const struct store *s, int layer, int expert, struct store_expert *out)
{
    return s->slots && store_slots_peek(s->slots, layer, expert, out);
}

/* A loan of those that are not on the device. */
static int lease_host(struct store *s, const struct store_lease *lease)
{
    struct store_expert expert;
    int n = 0;

    store_gpu_begin(s->gpu, lease->layer, lease->ids, lease->n);
    s->host = (struct store_lease){.layer = lease->layer, .ids = s->host_ids};
    for (int i = 0; i < lease->n; i++)
        if (!find_on_device(s, lease->layer, lease->ids[i], &expert))
            s->host_ids[n++] = lease->ids[i];
    s->host.n = n;
    int rc = n ? store_slots_lease(s->slots, &s->host) : 0;
    s->host.open = n && !rc;
    return rc;
}

int store_lease(struct store *s, int layer, const int32_t *ids, int n, struct store_lease *lease)
{
    assert(!lease->open);
    if (layer < 0 || layer >= s->model->hp.n_layer)
        return err(ERR_ARG, "experts of layer %d: the model has %d layers", layer, s->model->hp.n_layer);
    const int *w = s->model->layers[layer].w;
    for (int i = 0; i < 3; i++)
        if (w[stacks[i]] < 0)
            return err(ERR_ARG, "layer %d has no experts", layer);
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->weights[w[ROLE_EXPERT_GATE]].t.ne[2])
            return err(ERR_ARG, "layer %d has no expert %d, but %" PRId64, layer, ids[i],
                       s->model->weights[w[ROLE_EXPERT_GATE]].t.ne[2]);
    *lease = (struct store_lease){.layer = layer, .n = n, .ids = ids, .open = true};
    int rc = s->gpu ? lease_host(s, lease) : s->slots ? store_slots_lease(s->slots, lease) : 0;
    lease->open = !rc;
    return rc;
}

/* Those on the device that were not given yet. */
static int give_device(struct store *s, struct store_lease *lease, struct store_expert *out, int max)
{
    int n = 0;

    while (lease->n_seen < lease->n && n < max)
        n += find_on_device(s, lease->layer, lease->ids[lease->n_seen++], &out[n]);
    lease->n_given += n;
    s->stats.n_device_hits += (uint64_t)n;
    return n;
}

static int next_beside_device(struct store *s, struct store_lease *lease, bool wait, struct store_expert *out, int max,
                              int *n_out)
{
    *n_out = give_device(s, lease, out, max);
    if (*n_out || !s->host.open)
        return 0;
    int rc = store_slots_next(s->slots, &s->host, wait, out, max, n_out);
    lease->n_given += *n_out;
    return rc;
}

int store_next(struct store *s, struct store_lease *lease, bool wait, struct store_expert *out, int max, int *n_out)
{
    const int *w = s->model->layers[lease->layer].w;
    int n = lease->n - lease->n_given;

    assert(lease->open);
    if (s->gpu)
        return next_beside_device(s, lease, wait, out, max, n_out);
    if (s->slots)
        return store_slots_next(s->slots, lease, wait, out, max, n_out);
    if (n > max)
        n = max;
    for (int i = 0; i < n; i++) {
        out[i].expert = lease->ids[lease->n_given + i];
        out[i].on_device = out[i].is_pinned = false;
        for (int k = 0; k < 3; k++) {
            int stack = w[stacks[k]];
            out[i].w[k] = s->weight[stack] + (uint64_t)out[i].expert * s->model->weights[stack].t.stride[2];
        }
    }
    lease->n_given += n;
    *n_out = n;
    return 0;
}

void store_offer(struct store *s, const struct store_lease *lease, const struct store_expert *experts, int n)
{
    for (int i = 0; i < n && s->gpu && !s->skips_device; i++)
        store_gpu_offer(s->gpu, lease->layer, experts[i].expert);
}

bool store_is_moving(const struct store *s)
{
    return s->gpu && store_gpu_is_moving(s->gpu);
}

/* Its slot is not held from piece to piece, so it is looked for each time: wherever it lies whole, it is what the file says. */
int store_move_on(struct store *s, bool *is_more)
{
    struct store_expert from;
    int layer, expert;
    bool is_there = store_gpu_wants(s->gpu, &layer, &expert) && store_peek(s, layer, expert, &from);

    return store_gpu_move_on(s->gpu, is_there ? &from : NULL, is_more);
}

bool store_keep(struct store *s, const struct store_lease *lease, int expert)
{
    return s->slots && store_slots_keep(s->slots, lease->layer, expert);
}

/* Those that are not on the device. A layer of experts may stand before one that has none. */
static void hint_host(struct store *s, int layer, const int32_t *ids, int n)
{
    struct store_expert expert;
    int n_host = 0, n_experts = n_experts_of(s, layer);

    for (int i = 0; i < n && n_host < n_experts; i++)
        if (ids[i] >= 0 && ids[i] < n_experts && !find_on_device(s, layer, ids[i], &expert))
            s->hint_ids[n_host++] = ids[i];
    store_slots_hint(s->slots, layer, s->hint_ids, n_host);
}

void store_hint(struct store *s, int layer, const int32_t *ids, int n)
{
    if (s->slots && s->gpu)
        hint_host(s, layer, ids, n);
    else if (s->slots)
        store_slots_hint(s->slots, layer, ids, n);
}

int store_favourites(const struct store *s, int layer, int n, int32_t *ids)
{
    return s->slots ? store_slots_favourites(s->slots, layer, n, ids) : 0;
}

void store_set_reads(struct store *s, int n)
{
    if (s->slots)
        store_slots_set_reads(s->slots, n);
}

void store_release(struct store *s, struct store_lease *lease)
{
    struct store_lease *host = s->gpu ? &s->host : lease;
    if (s->slots && lease->open && host->open)
        store_slots_release(s->slots, host);
    host->open = false;
    lease->open = false;
}

void store_stats(const struct store *s, struct store_stats *out)
{
    *out = s->stats;
    out->n_expert_hits += s->stats.n_device_hits;
    for (int i = 0; i < s->n_files; i++)
        out->n_repeats += file_n_repeats(s->files[i]);
    if (s->gpu)
        store_gpu_stats(s->gpu, out);
    if (s->slots)
        store_slots_stats(s->slots, out);
}
