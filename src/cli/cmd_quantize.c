/* ferry quantize: a model file into a smaller one. */
#include "src/cli/cmd.h"
#include "src/cli/stop.h"
#include "src/cli/term.h"
#include "src/cli/text.h"

#include "cpu/pool.h"
#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/size.h"
#include "src/model/imatrix.h"
#include "src/model/quantize.h"
#include "src/plan/machine.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

struct work {
    const struct conf *conf;
    const struct recipe *recipe;
    struct gguf *gguf;       /* own */
    struct imatrix *imatrix; /* own; NULL: none asked for */
    struct quantize *q;      /* own */
    struct term_progress progress;
    double seconds;
};

/* What happens to the tensors, added up. */
struct sums {
    uint64_t in_bytes, bytes; /* of tensors */
    uint64_t n_params, bytes_of[QUANT_ID_END];
    int n_of[QUANT_ID_END];
    int n_changed, n_kept, n_fallback, n_unweighted, n_requantized;
    int source_type; /* the first quantized one that is quantized again; -1: none */
};

static struct sums add_up(const struct work *w)
{
    struct sums s = {.source_type = -1};

    for (int i = 0; i < gguf_n_tensors(w->gguf); i++) {
        const struct quantize_item *item = quantize_item(w->q, i);
        const struct gguf_tensor *t = item->tensor;
        s.in_bytes += t->bytes;
        s.bytes += item->bytes;
        s.n_params += (uint64_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]);
        s.bytes_of[item->choice.type] += item->bytes;
        s.n_of[item->choice.type]++;
        s.n_kept += item->choice.is_kept;
        s.n_fallback += item->choice.is_fallback;
        if (item->choice.type == t->type)
            continue;
        s.n_changed++;
        s.n_unweighted += w->imatrix && !item->is_weighted && quant_info((int)item->choice.type)->fit;
        if (quant_info((int)t->type)->block_len > 1) {
            s.n_requantized++;
            s.source_type = s.source_type < 0 ? (int)t->type : s.source_type;
        }
    }
    return s;
}

/* ---- what is said before ---- */

static void print_item(const struct quantize_item *item)
{
    char name[80], a[32], b[32];
    const struct gguf_tensor *t = item->tensor;

    text_printable(t->name, strlen(t->name), name, sizeof name);
    fprintf(stderr, "%-40s %-7s -> %-7s %10s -> %10s%s%s\n", name, quant_info((int)t->type)->name,
            quant_info((int)item->choice.type)->name, size_format(t->bytes, a, sizeof a),
            size_format(item->bytes, b, sizeof b), item->is_weighted ? "  weighted" : "",
            item->choice.is_fallback ? "  (rows do not fit the type)" : "");
}

static void warn(const struct work *w, const struct sums *s)
{
    if (w->conf->verbose)
        for (int i = 0; i < gguf_n_tensors(w->gguf); i++)
            print_item(quantize_item(w->q, i));
    if (s->n_requantized)
        fprintf(stderr,
                "ferry: %d tensor%s already quantized (%s): quantizing again loses more than the 16-bit original "
                "would\n",
                s->n_requantized, s->n_requantized == 1 ? " is" : "s are", quant_info(s->source_type)->name);
    if (s->n_unweighted)
        fprintf(stderr, "ferry: %d tensor%s not in the importance matrix: all columns count alike there\n",
                s->n_unweighted, s->n_unweighted == 1 ? " is" : "s are");
    if (w->recipe->mix == RECIPE_Q2_K_S && !w->imatrix)
        fputs("ferry: Q2_K_S without --imatrix is of little use\n", stderr);
}

/* ---- what is said afterwards ---- */

static double bits_each(const struct sums *s, uint64_t bytes)
{
    return s->n_params ? 8 * (double)bytes / (double)s->n_params : 0;
}

static void print_text(const struct work *w, const struct sums *s)
{
    char a[32], b[32];

    printf("%-10s %s, %.2f bits a weight (from %s, %.2f)\n", w->recipe->name,
           size_format(quantize_bytes(w->q), a, sizeof a), bits_each(s, s->bytes),
           size_format(s->in_bytes, b, sizeof b), bits_each(s, s->in_bytes));
    for (int id = 0; id < QUANT_ID_END; id++)
        if (s->n_of[id])
            printf("  %-8s %5d tensors %10s\n", quant_info(id)->name, s->n_of[id],
                   size_format(s->bytes_of[id], a, sizeof a));
    if (s->n_fallback)
        printf("  %d of them of a type with smaller blocks, because their rows do not fit the recipe's (--verbose "
               "names them)\n",
               s->n_fallback);
    if (!w->conf->dry_run)
        printf("%d file%s in %.1f s, %.0f MB/s of input\n", quantize_n_parts(w->q),
               quantize_n_parts(w->q) == 1 ? "" : "s", w->seconds,
               w->seconds > 0 ? (double)s->in_bytes / 1e6 / w->seconds : 0);
}

static json_t *json_of(const struct work *w, const struct sums *s)
{
    json_t *types = json_object();

    for (int id = 0; id < QUANT_ID_END; id++)
        if (s->n_of[id])
            json_object_set_new(types, quant_info(id)->name,
                                json_pack("{s:i, s:I}", "tensors", s->n_of[id], "bytes", (json_int_t)s->bytes_of[id]));
    return json_pack("{s:s, s:I, s:I, s:i, s:f, s:i, s:i, s:i, s:i, s:i, s:f, s:o}", "type", w->recipe->name,
                     "bytes_in", (json_int_t)s->in_bytes, "bytes", (json_int_t)quantize_bytes(w->q), "files",
                     quantize_n_parts(w->q), "bits_per_weight", bits_each(s, s->bytes), "changed", s->n_changed, "kept",
                     s->n_kept, "fallback", s->n_fallback, "requantized", s->n_requantized, "unweighted",
                     s->n_unweighted, "seconds", w->seconds, "types", types);
}

static int print_json(json_t *o)
{
    int failed = !o || json_dumpf(o, stdout, JSON_INDENT(2));

    json_decref(o);
    putchar('\n');
    return failed ? err(ERR_NOMEM, "the report as JSON") : 0;
}

/* ---- the work ---- */

static int make(struct work *w, const struct recipe *recipe)
{
    struct quantize_args args = {.gguf = w->gguf,
                                 .recipe = recipe,
                                 .pure = w->conf->pure,
                                 .imatrix = w->imatrix,
                                 .imatrix_path = w->conf->imatrix,
                                 .part_bytes = w->conf->split_bytes};

    w->recipe = recipe;
    quantize_free(w->q);
    return quantize_make(&args, &w->q);
}

static bool on_progress(void *arg, uint64_t done, uint64_t total)
{
    struct work *w = arg;

    term_progress_at(&w->progress, done, total);
    return !stop_asked();
}

static void run_team(void *team, void (*fn)(int worker, void *arg), void *arg)
{
    pool_run(team, fn, arg);
}

static int run(struct work *w)
{
    struct machine machine;
    struct pool *pool = NULL;
    uint64_t start_ns = clock_ns();
    int rc = machine_find(&machine);
    int n_threads = w->conf->n_threads ? (int)w->conf->n_threads : rc ? 1 : machine.n_cores;

    if (!rc)
        rc = pool_open(n_threads, false, &pool);
    if (rc)
        return rc;
    struct quantize_run run = {.path = w->conf->words[0],
                               .n_threads = n_threads,
                               .team = run_team,
                               .team_arg = pool,
                               .progress = on_progress,
                               .progress_arg = w};
    stop_begin();
    term_progress_begin(&w->progress, w->conf, "quantizing", NULL);
    rc = quantize_run(w->q, &run);
    term_progress_end(&w->progress);
    stop_end();
    pool_close(pool);
    w->seconds = (double)(clock_ns() - start_ns) * 1e-9;
    return rc;
}

/* The size of every type. */
static int list_types(struct work *w)
{
    json_t *list = w->conf->json ? json_array() : NULL;
    char a[32];
    int rc = 0;

    for (int i = 0; recipe_at(i) && !rc; i++) {
        bool is_alias = recipe_find(recipe_at(i)->about) != NULL;
        if (is_alias || (rc = make(w, recipe_at(i))))
            continue;
        struct sums s = add_up(w);
        if (list)
            json_array_append_new(list, json_of(w, &s));
        else
            printf("%-10s %10s  %5.2f bits  %s\n", w->recipe->name, size_format(quantize_bytes(w->q), a, sizeof a),
                   bits_each(&s, s.bytes), w->recipe->about);
    }
    if (!rc && list)
        return print_json(list);
    json_decref(list);
    return rc;
}

static int one_type(struct work *w, const struct recipe *recipe)
{
    int rc = make(w, recipe);
    struct sums s;

    if (rc)
        return rc;
    s = add_up(w);
    if (!w->conf->quiet)
        warn(w, &s);
    if (!w->conf->dry_run && (rc = run(w)))
        return rc;
    if (w->conf->json)
        return print_json(json_of(w, &s));
    if (!w->conf->quiet || w->conf->dry_run)
        print_text(w, &s);
    return 0;
}

int cmd_quantize(const struct conf *conf)
{
    struct work w = {.conf = conf};
    /* With --dry-run nothing is written, and OUT may be left out. */
    const char *type = conf->words[1] ? conf->words[1] : conf->dry_run ? conf->words[0] : NULL;
    const struct recipe *recipe = type ? recipe_find(type) : NULL;

    if (!conf->dry_run && !conf->words[1])
        return term_usage(conf, "wants three words: IN OUT TYPE");
    if (type && !recipe)
        return term_usage(conf, "knows no type \"%s\"", type);
    int rc = gguf_open(conf->model, NULL, &w.gguf);
    if (!rc && conf->imatrix)
        rc = imatrix_open(conf->imatrix, NULL, &w.imatrix);
    if (!rc)
        rc = type ? one_type(&w, recipe) : list_types(&w);
    quantize_free(w.q);
    imatrix_close(w.imatrix);
    gguf_close(w.gguf);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
