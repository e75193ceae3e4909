/* Owns the walk of all tensors' data from one file to another. Which type a tensor gets is recipe's, how scales are found is quant's, where
 * bytes go is gguf_write's. Workers claim slabs of elements and read, convert and write each by themselves: where a slab
 * goes is known beforehand, so nothing waits for anything and the bytes do not depend on who does what. */
#include "src/model/quantize.h"

#include "io/file.h"
#include "io/out.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/gguf_parse.h"
#include "src/model/gguf_write.h"
#include "src/model/imatrix.h"

#include <assert.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* A multiple of every block length: 1 MiB as floats, large enough for disks, small enough that workers end together. */
#define SLAB ((int64_t)1 << 18)

#define QUANTIZATION_VERSION 2 /* of the K-quants' layout, as GGUF files say it */

#define HALF_MAX 65504.0f

struct quantize {
    struct quantize_args args;
    struct quantize_item *items;          /* own: (n) */
    const struct imatrix_entry **entries; /* own: (n), of views */
    int n;
    struct gguf_write *out; /* own */
    bool is_used;
};

/* ---- what will be written ---- */

static bool is_rewritten(const char *key)
{
    static const char *const keys[] = {"general.file_type", "general.quantization_version", "split.no", "split.count",
                                       "split.tensors.count"};

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (!strcmp(key, keys[i]))
            return true;
    return !strncmp(key, "quantize.imatrix.", strlen("quantize.imatrix."));
}

static int write_imatrix_keys(struct quantize *q)
{
    const struct imatrix *im = q->args.imatrix;
    const char *path = q->args.imatrix_path, *dataset = imatrix_dataset(im);
    uint64_t n_chunks = imatrix_n_chunks(im);
    int rc;

    if ((rc = gguf_write_str(q->out, "quantize.imatrix.file", path, strlen(path))) ||
        (dataset && (rc = gguf_write_str(q->out, "quantize.imatrix.dataset", dataset, strlen(dataset)))) ||
        (rc = gguf_write_u32(q->out, "quantize.imatrix.entries_count", (uint32_t)imatrix_n_entries(im))))
        return rc;
    return n_chunks && n_chunks <= UINT32_MAX
               ? gguf_write_u32(q->out, "quantize.imatrix.chunks_count", (uint32_t)n_chunks)
               : 0;
}

static int write_keys(struct quantize *q)
{
    const struct gguf *g = q->args.gguf;
    int rc = 0;

    for (int i = 0; i < gguf_n_keys(g) && !rc; i++)
        if (!is_rewritten(gguf_key(g, i)->name))
            rc = gguf_write_key(q->out, gguf_key(g, i));
    if (rc || (rc = gguf_write_u32(q->out, "general.quantization_version", QUANTIZATION_VERSION)) ||
        (rc = gguf_write_u32(q->out, "general.file_type", (uint32_t)q->args.recipe->file_type)))
        return rc;
    return q->args.imatrix ? write_imatrix_keys(q) : 0;
}

/* Importance of another shape is that of another model. The vocabulary's is nobody's loss: tools differ in what they collect for it. */
static int find_entry(struct quantize *q, int i)
{
    const struct gguf_tensor *t = q->items[i].tensor;
    const struct imatrix_entry *e = q->args.imatrix ? imatrix_find(q->args.imatrix, t->name) : NULL;

    if (!e || q->items[i].choice.is_kept)
        return 0;
    char name[80];
    uint64_t have = imatrix_n_values(e), want = (uint64_t)t->ne[0] * (uint64_t)t->ne[2] * (uint64_t)t->ne[3];
    if (have != want && !strstr(t->name, "token_embd"))
        return err(ERR_FORMAT, "%s: entry \"%s\" has %" PRIu64 " values, the tensor %" PRIu64, q->args.imatrix_path,
                   gguf_parse_shown(t->name, strlen(t->name), name), have, want);
    q->entries[i] = have == want ? e : NULL;
    q->items[i].is_weighted = have == want;
    return 0;
}

static int lay_out(struct quantize *q, const struct recipe_choice *choices)
{
    int rc = write_keys(q);

    for (int i = 0; i < q->n && !rc; i++) {
        const struct gguf_tensor *t = gguf_tensor(q->args.gguf, i);
        uint64_t n_rows = (uint64_t)t->ne[1] * (uint64_t)t->ne[2] * (uint64_t)t->ne[3];
        q->items[i] = (struct quantize_item){.tensor = t, .choice = choices[i]};
        q->items[i].bytes = quant_row_bytes(choices[i].type, t->ne[0]) * n_rows;
        if (!(rc = find_entry(q, i)))
            rc = gguf_write_tensor(q->out, t->name, choices[i].type, t->n_dims, t->ne);
    }
    return rc ? rc : gguf_write_layout(q->out, q->args.part_bytes);
}

int quantize_make(const struct quantize_args *args, struct quantize **out)
{
    struct quantize *q = mem_zalloc(1, sizeof *q, MEM_META);
    struct recipe_choice *choices = NULL;
    struct recipe_options options = {.pure = args->pure, .has_imatrix = args->imatrix != NULL};
    int n = gguf_n_tensors(args->gguf), rc = 0;

    *out = NULL;
    if (!q)
        return err(ERR_NOMEM, "the list of what to quantize");
    q->args = *args;
    q->n = n;
    q->items = mem_zalloc((size_t)n, sizeof *q->items, MEM_META);
    q->entries = mem_zalloc((size_t)n, sizeof *q->entries, MEM_META);
    choices = mem_zalloc((size_t)n, sizeof *choices, MEM_META);
    if (!q->items || !q->entries || !choices)
        rc = err(ERR_NOMEM, "a list of %d tensors", n);
    if (!rc)
        rc = recipe_choose(args->recipe, args->gguf, &options, choices);
    if (!rc)
        rc = gguf_write_make(&q->out);
    if (!rc)
        rc = lay_out(q, choices);
    mem_free(choices);
    if (rc)
        quantize_free(q);
    else
        *out = q;
    return rc;
}

void quantize_free(struct quantize *q)
{
    if (!q)
        return;
    gguf_write_free(q->out);
    mem_free(q->items);
    mem_free(q->entries);
    mem_free(q);
}

const struct quantize_item *quantize_item(const struct quantize *q, int tensor)
{
    return &q->items[tensor];
}

uint64_t quantize_bytes(const struct quantize *q)
{
    return gguf_write_bytes(q->out);
}

int quantize_n_parts(const struct quantize *q)
{
    return gguf_write_n_parts(q->out);
}

/* ---- the work ---- */

/* A worker's memory. */
struct bench {
    unsigned char *in, *out; /* own: a slab of the widest type each */
    float *x;                /* own: (SLAB) */
    float *weights;          /* own: (max_columns) of the expert below; NULL without importance */
    int tensor;              /* whose importance that is; -1: nobody's */
    uint64_t expert;
    bool is_known;
};

struct job {
    struct quantize *q;
    const struct quantize_run *run;
    struct file **files;   /* own: (n_files), one per part of the input */
    struct bench *benches; /* own: (n_threads) */
    int n_files;
    uint64_t total;

    pthread_mutex_t lock; /* of all below */
    int tensor;           /* where the next slab begins */
    int64_t element;
    uint64_t done;
    int rc; /* the first worker's that failed, with its text */
    char text[1024];
};

struct slab {
    int tensor;
    int64_t first, n; /* elements */
};

static int64_t n_elements(const struct gguf_tensor *t)
{
    return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3];
}

static bool claim(struct job *job, struct slab *slab)
{
    bool is_one = false;

    pthread_mutex_lock(&job->lock);
    if (!job->rc && job->tensor < job->q->n) {
        int64_t left = n_elements(job->q->items[job->tensor].tensor) - job->element;
        *slab = (struct slab){job->tensor, job->element, left < SLAB ? left : SLAB};
        job->element += slab->n;
        if (slab->n == left) {
            job->tensor++;
            job->element = 0;
        }
        is_one = true;
    }
    pthread_mutex_unlock(&job->lock);
    return is_one;
}

/* Workers' error texts are their threads': what goes up is the first one. */
static void fail(struct job *job, int rc)
{
    pthread_mutex_lock(&job->lock);
    if (!job->rc) {
        job->rc = rc;
        snprintf(job->text, sizeof job->text, "%s", err_text());
    }
    pthread_mutex_unlock(&job->lock);
}

static int check_floats(const struct gguf_tensor *t, const float *x, int64_t first, int64_t n, enum quant_type type)
{
    float peak = 0.0f;
    bool is_finite = true;
    char name[80];

    for (int64_t k = 0; k < n; k++) {
        float a = fabsf(x[k]);
        peak = a > peak ? a : peak;
        is_finite = is_finite && a <= FLT_MAX;
    }
    if (!is_finite)
        return err(ERR_FORMAT, "tensor \"%s\": a NaN or an infinity among elements %" PRId64 " to %" PRId64,
                   gguf_parse_shown(t->name, strlen(t->name), name), first, first + n - 1);
    if (peak > HALF_MAX && type != QUANT_F32 && type != QUANT_BF16 && type != QUANT_MXFP4)
        return err(ERR_LIMIT, "tensor \"%s\": %g is too large for %s, which holds halves; BF16 takes it",
                   gguf_parse_shown(t->name, strlen(t->name), name), (double)peak, quant_info((int)type)->name);
    return 0;
}

/* The importance of the columns of the expert that element `first` belongs to; NULL in *weights: all alike. */
static int find_weights(struct job *job, struct bench *b, int tensor, uint64_t expert, const float **weights)
{
    const struct imatrix_entry *entry = job->q->entries[tensor];
    uint64_t n_columns = (uint64_t)job->q->items[tensor].tensor->ne[0];
    int rc = 0;

    *weights = NULL;
    if (!entry)
        return 0;
    if (b->tensor != tensor || b->expert != expert) {
        b->tensor = -1;
        rc = imatrix_read(job->q->args.imatrix, entry, expert, n_columns, b->weights, &b->is_known);
        b->tensor = rc ? -1 : tensor;
        b->expert = expert;
    }
    *weights = !rc && b->is_known ? b->weights : NULL;
    return rc;
}

/* Floats of a slab to blocks, row by row: importance is by column. */
static int pack(struct job *job, struct bench *b, const struct slab *slab)
{
    const struct gguf_tensor *t = job->q->items[slab->tensor].tensor;
    const struct quant_info *to = quant_info((int)job->q->items[slab->tensor].choice.type);

    for (int64_t at = 0, n; at < slab->n; at += n) {
        int64_t row = (slab->first + at) / t->ne[0], column = (slab->first + at) % t->ne[0];
        unsigned char *out = b->out + quant_row_bytes(to->type, at);
        const float *weights;
        n = slab->n - at < t->ne[0] - column ? slab->n - at : t->ne[0] - column;
        int rc = find_weights(job, b, slab->tensor, (uint64_t)(row / t->ne[1]), &weights);
        if (rc)
            return rc;
        if (weights && to->fit)
            to->fit(b->x + at, weights + column, out, n);
        else
            to->from_float(b->x + at, out, n);
    }
    return 0;
}

static int do_slab(struct job *job, struct bench *b, const struct slab *slab)
{
    const struct quantize_item *item = &job->q->items[slab->tensor];
    const struct gguf_tensor *t = item->tensor;
    uint64_t in_off = quant_row_bytes(t->type, slab->first), in_bytes = quant_row_bytes(t->type, slab->n);
    int rc = file_read(job->files[t->file], t->off + in_off, b->in, in_bytes);

    if (rc)
        return rc;
    if (item->choice.type == t->type)
        return gguf_write_data(job->q->out, slab->tensor, in_off, b->in, in_bytes);
    quant_info((int)t->type)->to_float(b->in, b->x, slab->n);
    if ((rc = check_floats(t, b->x, slab->first, slab->n, item->choice.type)) || (rc = pack(job, b, slab)))
        return rc;
    return gguf_write_data(job->q->out, slab->tensor, quant_row_bytes(item->choice.type, slab->first), b->out,
                           quant_row_bytes(item->choice.type, slab->n));
}

static uint64_t count_done(struct job *job, uint64_t bytes)
{
    pthread_mutex_lock(&job->lock);
    uint64_t done = job->done += bytes;
    pthread_mutex_unlock(&job->lock);
    return done;
}

static void work(int worker, void *arg)
{
    struct job *job = arg;
    const struct quantize_run *run = job->run;
    struct slab slab;

    while (claim(job, &slab)) {
        int rc = do_slab(job, &job->benches[worker], &slab);
        if (!rc) {
            uint64_t done = count_done(job, quant_row_bytes(job->q->items[slab.tensor].tensor->type, slab.n));
            if (worker == 0 && run->progress && !run->progress(run->progress_arg, done, job->total))
                rc = err(ERR_CANCEL, "%s: stopped; nothing was written", run->path);
        }
        if (rc)
            fail(job, rc);
    }
}

/* ---- before and after ---- */

static int open_benches(struct job *job)
{
    uint64_t max_columns = 0, in_bytes = 0, out_bytes = 0;
    int n_threads = job->run->n_threads;

    for (int i = 0; i < job->q->n; i++) {
        const struct quantize_item *item = &job->q->items[i];
        uint64_t in = quant_row_bytes(item->tensor->type, SLAB), out = quant_row_bytes(item->choice.type, SLAB);
        in_bytes = in > in_bytes ? in : in_bytes;
        out_bytes = out > out_bytes ? out : out_bytes;
        if (job->q->entries[i] && (uint64_t)item->tensor->ne[0] > max_columns)
            max_columns = (uint64_t)item->tensor->ne[0];
        job->total += item->tensor->bytes;
    }
    job->benches = mem_zalloc((size_t)n_threads, sizeof *job->benches, MEM_SCRATCH);
    for (int i = 0; job->benches && i < n_threads; i++) {
        struct bench *b = &job->benches[i];
        b->tensor = -1;
        b->in = mem_alloc((size_t)in_bytes, MEM_SCRATCH);
        b->out = mem_alloc((size_t)out_bytes, MEM_SCRATCH);
        b->x = mem_alloc(SLAB * sizeof *b->x, MEM_SCRATCH);
        b->weights = mem_alloc((size_t)max_columns * sizeof *b->weights, MEM_SCRATCH);
        if (!b->in || !b->out || !b->x || !b->weights)
            return err(ERR_NOMEM, "the slabs of %d threads", n_threads);
    }
    return job->benches ? 0 : err(ERR_NOMEM, "a list of %d threads", n_threads);
}

static struct file_id identity_of(const struct gguf_part *p)
{
    return (struct file_id){.dev = p->dev, .ino = p->ino, .bytes = p->bytes, .mtime_ns = p->mtime_ns};
}

static int open_inputs(struct job *job)
{
    const struct gguf *g = job->q->args.gguf;
    int n = gguf_n_parts(g), rc = 0;

    job->files = mem_zalloc((size_t)n, sizeof *job->files, MEM_META);
    if (!job->files)
        return err(ERR_NOMEM, "a list of %d files", n);
    job->n_files = n;
    for (int i = 0; i < n && !rc; i++) {
        struct file_id then = identity_of(gguf_part(g, i));
        if (!(rc = file_open(gguf_part(g, i)->path, job->q->args.in_ops, &job->files[i])))
            rc = file_check(job->files[i], &then);
    }
    return rc;
}

/* Nobody wrote to the input meanwhile. */
static int check_inputs(const struct job *job)
{
    int rc = 0;

    for (int i = 0; i < job->n_files && !rc; i++)
        rc = file_check(job->files[i], file_identity(job->files[i]));
    return rc;
}

/* A result in the place of its own source would be whole, but its user's original gone. */
static int check_target(const struct quantize *q, const char *path)
{
    int rc = 0;

    for (int part = 0; part < gguf_write_n_parts(q->out) && !rc; part++) {
        char *name = NULL;
        struct file *there = NULL;
        if ((rc = gguf_write_part_path(q->out, path, part, &name)))
            return rc;
        if (!file_open(name, q->args.in_ops, &there)) { /* mostly there is none */
            for (int i = 0; i < gguf_n_parts(q->args.gguf) && !rc; i++) {
                const struct gguf_part *in = gguf_part(q->args.gguf, i);
                if (in->dev == file_identity(there)->dev && in->ino == file_identity(there)->ino)
                    rc = err(ERR_ARG, "%s: is the input", name);
            }
            file_close(there);
        }
        mem_free(name);
    }
    return rc;
}

static void job_done(struct job *job)
{
    for (int i = 0; i < job->n_files; i++)
        file_close(job->files[i]);
    for (int i = 0; job->benches && i < job->run->n_threads; i++) {
        mem_free(job->benches[i].in);
        mem_free(job->benches[i].out);
        mem_free(job->benches[i].x);
        mem_free(job->benches[i].weights);
    }
    mem_free(job->files);
    mem_free(job->benches);
    pthread_mutex_destroy(&job->lock);
}

int quantize_run(struct quantize *q, const struct quantize_run *run)
{
    struct job job = {.q = q, .run = run, .lock = PTHREAD_MUTEX_INITIALIZER};
    int rc;

    assert(run->n_threads >= 1 && (run->team || run->n_threads == 1) && !q->is_used);
    q->is_used = true;
    if ((rc = check_target(q, run->path)) || (rc = open_inputs(&job)) || (rc = open_benches(&job)) ||
        (rc = gguf_write_open(q->out, run->path, run->out_ops)))
        goto out;
    if (run->team)
        run->team(run->team_arg, work, &job);
    else
        work(0, &job);
    if (job.rc)
        rc = err(job.rc, "%s", job.text);
    if (rc || (rc = check_inputs(&job)))
        goto out;
    rc = gguf_write_commit(q->out);
out:
    job_done(&job);
    return rc;
}
