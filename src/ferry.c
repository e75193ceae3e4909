/* The public API over the rooms: opens them in order, closes them in reverse, and translates options. Back ends are listed
 * here and nowhere else. */
#include "src/ferry.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "cpu/cpu.h"
#ifdef FERRY_HAVE_CUDA
#include "cuda/cuda.h"
#endif
#include "io/file.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/ferry_in.h"
#include "src/model/gguf.h"
#include "src/model/layout.h"
#include "src/model/model.h"
#include "src/model/template.h"
#include "src/model/tok.h"
#include "src/model/tok_trie.h"
#include "src/plan/cost.h"
#include "src/plan/machine.h"
#include "src/plan/plan.h"
#include "src/plan/plan_batch.h"
#include "src/plan/tune.h"
#include "src/run/cache.h"
#include "src/run/exec.h"
#include "src/run/sample.h"
#include "src/run/session.h"
#include "src/run/store.h"
#include "src/run/trace.h"

/* What a trace keeps: about a thousand tokens of a large model; and the experts of some ten thousand. */
enum { TRACE_EVENTS = 1 << 18, TRACE_IDS = 1 << 23 };

_Static_assert((int)FERRY_ERR_NOMEM == (int)ERR_NOMEM && (int)FERRY_ERR_DEVICE == (int)ERR_DEVICE,
               "public codes are the internal ones");

const char *ferry_version(void)
{
    return PACKAGE_VERSION;
}

const char *ferry_error(void)
{
    return err_text();
}

void ferry_free(void *p)
{
    mem_free(p);
}

/* ---- engine ---- */

void ferry_engine_opts_init(struct ferry_engine_opts *opts)
{
    memset(opts, 0, sizeof *opts);
    opts->struct_bytes = sizeof *opts;
}

/* The number of a word in a list of them; ERR_ARG names the option. NULL is the first. */
static int pick(const char *option, const char *word, const char *const *words, int n)
{
    if (!word)
        return 0;
    for (int i = 0; i < n; i++)
        if (strcasecmp(word, words[i]) == 0)
            return i;
    return err(ERR_ARG, "%s = %.40s: expected %s, %s…", option, word, words[0], words[1]);
}

static struct trace_args trace_args_of(const struct ferry_engine_opts *o)
{
    return (struct trace_args){.n_events = o->trace ? TRACE_EVENTS : 0, .n_ids = o->trace_experts ? TRACE_IDS : 0};
}

static int plan_options(const struct ferry_engine_opts *o, struct plan_opts *out)
{
    static const char *const io_words[] = {"auto", "uring", "pread", "mmap"};
    static const enum plan_io io_values[] = {PLAN_IO_AUTO, PLAN_IO_URING, PLAN_IO_PREAD, PLAN_IO_MMAP};
    static const char *const kv_words[] = {"f16", "q8_0"};
    const struct trace_args trace = trace_args_of(o);
    static const char *const prefill_words[] = {"int", "blas"}, *const copies_words[] = {"auto", "never", "always"};
    static const enum plan_copies copies_values[] = {PLAN_COPIES_AUTO, PLAN_COPIES_NEVER, PLAN_COPIES_ALWAYS};
    int io = pick("io", o->io, io_words, 4), kv = pick("kv_type", o->kv_type, kv_words, 2);
    int prefill = pick("prefill", o->prefill, prefill_words, 2);
    int copies = pick("copies", o->copies, copies_words, 3);
    if (io < 0 || kv < 0 || prefill < 0 || copies < 0)
        return ERR_ARG;
    *out = (struct plan_opts){.ram_bytes = o->ram_bytes,
                              .n_ctx = o->n_ctx,
                              .n_seq = o->n_sessions,
                              .chunk_tok = o->chunk_tok,
                              .n_out = o->n_out,
                              .n_threads = o->n_threads,
                              .kv_type = kv ? QUANT_Q8_0 : QUANT_F16,
                              .io = io_values[io],
                              .prefill = prefill ? DEVICE_PREFILL_BLAS : DEVICE_PREFILL_INT,
                              .no_pin = o->no_pin,
                              .expert_ram_bytes = o->expert_ram_bytes,
                              .vram_bytes = o->vram_bytes,
                              .trace_bytes = trace_bytes(&trace),
                              .copies = copies_values[copies]};
    if (o->isa) {
        if (strlen(o->isa) >= sizeof out->isa || !cpu_isa_has(o->isa))
            return err(ERR_UNSUPPORTED, "isa = %.40s: this machine cannot run it", o->isa);
        strcpy(out->isa, o->isa);
    }
    return 0;
}

/* The text of a saved plan or profile, NUL-terminated; the caller frees. */
static int read_text(const char *path, char **out)
{
    const uint64_t max_bytes = 1 << 20; /* they have a few KiB */
    struct file *f = NULL;
    int rc = file_open(path, NULL, &f);
    if (rc < 0)
        return rc;
    uint64_t bytes = file_identity(f)->bytes;
    char *text = bytes <= max_bytes ? mem_alloc(bytes + 1, MEM_OTHER) : NULL;
    if (!text)
        rc = err(bytes <= max_bytes ? ERR_NOMEM : ERR_LIMIT,
                 "%s: %" PRIu64 " bytes are too many for a plan or a profile", path, bytes);
    else
        rc = file_read(f, 0, text, bytes);
    file_close(f);
    if (rc < 0) {
        mem_free(text);
        return rc;
    }
    text[bytes] = '\0';
    *out = text;
    return 0;
}

/* Which device the options name. */
struct wish {
    bool is_gpu;
    int number; /* of the GPU */
};

static bool is_auto(const char *device)
{
    return device && strcmp(device, "auto") == 0;
}

/* Is there a GPU 0 that can be used? */
static bool has_gpu(void)
{
#ifdef FERRY_HAVE_CUDA
    uint64_t free_bytes, total_bytes;
    return cuda_memory(0, &free_bytes, &total_bytes) == 0;
#else
    return false;
#endif
}

static int read_device(const char *name, struct wish *out)
{
    int end = 0;

    *out = (struct wish){.is_gpu = false};
    if (is_auto(name))
        name = has_gpu() ? "cuda:0" : "cpu";
    if (!name || strcmp(name, "cpu") == 0)
        return 0;
    out->is_gpu = true;
    if (sscanf(name, "cuda:%4d%n", &out->number, &end) != 1 || name[end] || out->number < 0)
        return err(ERR_ARG, "device = %.40s: expected auto, cpu or cuda:N", name);
#ifndef FERRY_HAVE_CUDA
    return err(ERR_UNSUPPORTED, "device cuda:%d: this ferry was built without CUDA", out->number);
#else
    return 0;
#endif
}

static const struct device_ops *gpu_ops(void)
{
#ifdef FERRY_HAVE_CUDA
    return &cuda_device_ops;
#else
    return NULL;
#endif
}

/* What plans are made from: for the GPU, if one is wished for. */
static struct plan_in plan_inputs(const struct ferry_engine *e, const struct plan_opts *opts, bool has_gpu)
{
    return (struct plan_in){.machine = &e->machine,
                            .model = e->model,
                            .opts = opts,
                            .cpu = &cpu_device_ops,
                            .gpu = has_gpu ? gpu_ops() : NULL};
}

static int take_profile(const char *path, const char *model_path, struct machine *m)
{
    char *text = NULL;
    int rc = read_text(path, &text);
    if (rc < 0)
        return rc;
    rc = machine_take_rates(text, model_path, m);
    mem_free(text);
    return rc < 0 ? err(rc, "%s: %s (ferry probe writes it anew)", path, err_text()) : 0;
}

/* This machine, with the rates that a profile knows. */
static int find_machine(const struct ferry_engine_opts *o, const char *model_path, struct machine *out)
{
    int rc = machine_find(out);
    if (rc < 0)
        return rc;
    const char *const *isa = cpu_isa_names(); /* best first; plain C, which every machine has, is the last */
    while (!cpu_isa_has(*isa))
        isa++;
    strcpy(out->isa, *isa);
    return o->profile_path ? take_profile(o->profile_path, model_path, out) : 0;
}

/* The GPU's memory, where one is wished for. */
static int find_gpu(const struct wish *wish, struct plan_opts *opts, struct machine *m)
{
    opts->gpu_number = (uint32_t)wish->number;
#ifdef FERRY_HAVE_CUDA
    if (wish->is_gpu) {
        char id[CUDA_ID_BYTES];
        int rc = cuda_memory(wish->number, &m->vram_free_bytes, &m->vram_total_bytes);
        if (rc == 0)
            rc = cuda_id(wish->number, id);
        if (rc == 0)
            machine_use_gpu(m, id);
        return rc;
    }
#endif
    (void)m;
    return 0;
}

/* Everything that a plan is made from but the model. */
static int read_wishes(const struct ferry_engine_opts *o, const char *model_path, struct wish *wish,
                       struct plan_opts *opts, struct machine *m)
{
    int rc = plan_options(o, opts);
    if (rc == 0)
        rc = read_device(o->device, wish);
    if (rc == 0)
        rc = find_machine(o, model_path, m);
    if (rc == 0 && opts->vram_bytes && !wish->is_gpu && !o->plan_path)
        rc = err(ERR_ARG, "vram = %" PRIu64 " bytes: of which GPU? device has to be cuda:N", opts->vram_bytes);
    return rc ? rc : find_gpu(wish, opts, m);
}

/* A saved plan says who computes; options may say the same. device: as they name it; NULL: they do not. */
static int check_device(const struct plan *p, const char *path, const char *device, const struct wish *wish)
{
    bool was_asked = p->has_gpu || p->unused.decode_tok_per_s > 0; /* for a GPU */
    uint32_t number = p->has_gpu ? p->gpu.number : p->unused.number;

    if (!device || is_auto(device) || (!wish->is_gpu && !p->has_gpu) ||
        (wish->is_gpu && was_asked && (uint32_t)wish->number == number))
        return 0;
    if (p->has_gpu)
        return err(ERR_STATE, "%s: the plan is for cuda:%" PRIu32 ", not for %s", path, p->gpu.number, device);
    return err(ERR_STATE, "%s: the plan is for the cpu, not for %s", path, device);
}

static int load_plan(struct ferry_engine *e, const struct ferry_engine_opts *o, const struct wish *wish)
{
    const struct trace_args trace = trace_args_of(o);
    const struct plan_opts opts = {.trace_bytes = trace_bytes(&trace)};
    struct plan_in in = plan_inputs(e, &opts, true);
    char *text = NULL;
    int rc = read_text(o->plan_path, &text);

    if (rc == 0)
        rc = plan_from_json(text, &in, &e->plan);
    mem_free(text);
    return rc ? rc : check_device(&e->plan, o->plan_path, o->device, wish);
}

static int batch_plan(const struct ferry_engine_opts *o, const struct plan_in *in, struct plan_batch *batch,
                      struct plan *plan)
{
    const struct plan_batch_opts opts = {
        .n_seq = o->n_batch == FERRY_BATCH_AUTO ? 0 : o->n_batch, .most_seq = o->batch_most, .seq_tok = o->batch_tok};
    return plan_batch_make(in, &opts, batch, plan);
}

static int make_plan(struct ferry_engine *e, const struct ferry_engine_opts *o)
{
    struct plan_opts opts;
    struct plan_batch batch;
    struct wish wish;
    int rc = read_wishes(o, e->model->path, &wish, &opts, &e->machine);
    if (rc < 0)
        return rc;
    if (o->plan_path)
        return load_plan(e, o, &wish);
    struct plan_in in = plan_inputs(e, &opts, wish.is_gpu);
    if (!o->n_batch)
        return plan_make(&in, &e->plan);
    rc = batch_plan(o, &in, &batch, &e->plan);
    if (!rc && batch.has_rates)
        e->batch = batch.points[batch.chosen];
    return rc;
}

/* What work is held against. */
static void watch_plan(struct ferry_engine *e)
{
    struct plan expected = e->plan;

    if (!plan_is_measured(&e->plan, &e->machine))
        return;
    if (e->plan.kv_tok)
        plan_batch_expect(&e->batch, &expected);
    refit_init(&e->refit, &expected, e->model->hp.n_expert_used);
}

static int open_cpu(const struct plan *p, struct device **out)
{
    return cpu_open(&(struct cpu_opts){.n_threads = (int)p->n_threads,
                                       .isa = p->isa[0] ? p->isa : NULL,
                                       .pin = p->pin,
                                       .is_beside_gpu = p->has_gpu,
                                       .prefill = p->prefill},
                    out);
}

static int open_gpu(const struct plan *p, const struct model *m, struct device **out)
{
#ifdef FERRY_HAVE_CUDA
    struct cuda_opts opts = {.ordinal = (int)p->gpu.number, .prefill = p->prefill};

    plan_device_step(p, m, &opts.most);
    return cuda_open(&opts, out);
#else
    (void)m;
    (void)out;
    return err(ERR_UNSUPPORTED, "GPU %" PRIu32 ": this ferry was built without CUDA", p->gpu.number);
#endif
}

static int open_devices(struct ferry_engine *e)
{
    const struct plan *p = &e->plan;
    int rc = p->has_gpu ? open_gpu(p, e->model, &e->device) : open_cpu(p, &e->device);
    if (rc == 0 && (plan_is_split(p) || plan_has_host_kv(p) || plan_has_host_layers(p)))
        rc = open_cpu(p, &e->host);
    if (rc < 0)
        return rc;
    const char *isa = p->has_gpu && !e->host ? "" : cpu_isa_used(e->host ? e->host : e->device);
    snprintf(e->isa, sizeof e->isa, "%s%s%s", p->has_gpu ? e->device->ops->name : "", e->host ? " and " : "", isa);
    return 0;
}

/* Frequencies that the file scales, before the model is run. */
static int take_rope_factors(struct ferry_engine *e)
{
    int w = e->model->w[ROLE_ROPE_FREQS];
    if (w < 0)
        return 0;
    float *factors = mem_alloc(layout_weight_bytes(&e->model->weights[w]), MEM_META);
    if (!factors)
        return err(ERR_NOMEM, "factors of rotary frequencies");
    int rc = store_copy_weight(e->store, w, factors);
    if (rc == 0)
        model_rope_factors(e->model, factors);
    mem_free(factors);
    return rc;
}

static int open_rooms(struct ferry_engine *e, const struct ferry_engine_opts *o)
{
    const struct plan *p = &e->plan;
    e->trace_experts = o->trace_experts;
    const struct trace_args trace = trace_args_of(o);
    int rc = trace_open(&trace, &e->trace);
    if (rc == 0)
        rc = open_devices(e);
    if (rc == 0)
        rc = store_open(&(struct store_args){.model = e->model,
                                             .plan = p,
                                             .device = p->has_gpu ? e->device : NULL,
                                             .trace = e->trace,
                                             .progress = o->progress,
                                             .progress_arg = o->progress_arg},
                        &e->store);
    if (rc == 0)
        rc = take_rope_factors(e);
    struct kv_shape shape;
    if (rc == 0)
        rc = model_kv_shape(e->model, p->kv_type, (int)p->gpu.first_layer, &shape, NULL);
    if (rc == 0)
        rc = cache_open(&(struct cache_args){.shape = &shape,
                                             .n_seq = (int)p->n_seq,
                                             .n_ctx = p->n_ctx,
                                             .chunk_tok = p->chunk_tok,
                                             .pool_tok = p->kv_tok,
                                             .n_tables = p->kv_tok ? (int)p->n_seq * 3 : 0,
                                             .device = e->device,
                                             .dev_tok = p->gpu.kv_tok,
                                             .back_steps = (int)p->gpu.stage_rows,
                                             .back_bytes = CACHE_BACK_BYTES},
                        &e->cache);
    struct offload_rates rates;
    cost_gpu_rates(&e->machine, (int)p->n_threads, &rates);
    if (rc == 0)
        rc = exec_open(&(struct exec_args){.model = e->model,
                                           .plan = p,
                                           .device = e->device,
                                           .host = e->host,
                                           .store = e->store,
                                           .trace = e->trace,
                                           .rates = &rates},
                       &e->exec);
    return rc;
}

static int engine_options(const struct ferry_engine_opts *in, struct ferry_engine_opts *out)
{
    ferry_engine_opts_init(out);
    if (in && in->struct_bytes > sizeof *out)
        return err(ERR_ARG, "options of %zu bytes; this library knows %zu", in->struct_bytes, sizeof *out);
    if (in)
        memcpy(out, in, in->struct_bytes);
    return 0;
}

int ferry_batch_explain(const char *model_path, const struct ferry_engine_opts *opts, char **out)
{
    struct ferry_engine e = {.tok = NULL};
    struct ferry_engine_opts o;
    struct plan_opts plan_opts;
    struct plan_batch batch;
    struct wish wish = {.is_gpu = false};

    *out = NULL;
    int rc = engine_options(opts, &o);
    if (rc == 0)
        rc = read_wishes(&o, model_path, &wish, &plan_opts, &e.machine);
    if (rc == 0)
        rc = model_open(model_path, NULL, &e.model);
    struct plan_in in = plan_inputs(&e, &plan_opts, wish.is_gpu);
    if (rc == 0)
        rc = batch_plan(&o, &in, &batch, &e.plan);
    if (rc == 0)
        rc = plan_batch_explain(&batch, out);
    model_close(e.model);
    return rc;
}

int ferry_engine_open(const char *model_path, const struct ferry_engine_opts *opts, struct ferry_engine **out)
{
    *out = NULL;
    struct ferry_engine_opts o;
    int rc = engine_options(opts, &o);
    if (rc < 0)
        return rc;
    struct ferry_engine *e = mem_zalloc(1, sizeof *e, MEM_OTHER);
    if (!e)
        return err(ERR_NOMEM, "an engine");
    rc = model_open(model_path, NULL, &e->model);
    if (rc == 0)
        rc = o.ids_only ? 0 : tok_from_gguf(e->model->gguf, &e->tok);
    if (rc == 0 && e->tok && tok_n_vocab(e->tok) > e->model->hp.n_vocab)
        rc = err(ERR_FORMAT, "%s: %d tokens, but the model has logits of %d", model_path, tok_n_vocab(e->tok),
                 e->model->hp.n_vocab);
    if (rc == 0 && o.spill_dir && !(e->spill_dir = mem_strdup(o.spill_dir, MEM_OTHER)))
        rc = err(ERR_NOMEM, "the name of a folder");
    if (rc == 0)
        rc = make_plan(e, &o);
    if (rc == 0)
        rc = open_rooms(e, &o);
    if (rc == 0)
        watch_plan(e);
    if (rc < 0) {
        ferry_engine_close(e);
        return rc;
    }
    *out = e;
    return 0;
}

void ferry_engine_close(struct ferry_engine *e)
{
    if (!e)
        return;
    template_free(e->chat);
    exec_close(e->exec);
    cache_close(e->cache);
    store_close(e->store); /* its weights may lie in the device's memory */
    if (e->host)
        e->host->ops->close(e->host);
    if (e->device)
        e->device->ops->close(e->device);
    trace_close(e->trace);
    tok_trie_free(e->trie);
    tok_free(e->tok);
    model_close(e->model);
    mem_free(e->spill_dir);
    mem_free(e);
}

void ferry_engine_info(const struct ferry_engine *e, struct ferry_info *out)
{
    const struct hparams *hp = &e->model->hp;
    struct store_stats st;
    store_stats(e->store, &st);
    uint64_t file_bytes = 0;
    for (int i = 0; i < gguf_n_parts(e->model->gguf); i++)
        file_bytes += gguf_part(e->model->gguf, i)->bytes;
    *out = (struct ferry_info){.name = e->model->name,
                               .architecture = model_arch(e->model),
                               .n_layer = (uint32_t)hp->n_layer,
                               .n_embd = (uint32_t)hp->n_embd,
                               .n_vocab = (uint32_t)hp->n_vocab,
                               .n_ctx_train = (uint32_t)hp->n_ctx_train,
                               .n_ctx = e->plan.n_ctx,
                               .n_expert = (uint32_t)hp->n_expert,
                               .n_expert_used = (uint32_t)hp->n_expert_used,
                               .n_threads = e->plan.n_threads,
                               .isa = e->isa,
                               .file_bytes = file_bytes,
                               .resident_bytes = st.resident_bytes,
                               .bos = e->tok ? tok_bos(e->tok) : -1,
                               .eos = e->tok ? tok_eos(e->tok) : -1,
                               .has_chat_template = gguf_find(e->model->gguf, "tokenizer.chat_template") != NULL,
                               .predicted_prefill_tok_per_s = e->plan.prefill_tok_per_s,
                               .predicted_decode_tok_per_s = e->plan.decode_tok_per_s,
                               .is_measured = plan_is_measured(&e->plan, &e->machine),
                               .identity = e->model->identity,
                               .n_batch = e->plan.kv_tok ? e->plan.n_seq : 0};
}

int ferry_engine_plan(const struct ferry_engine *e, bool json, char **out)
{
    struct plan_in in = plan_inputs(e, NULL, e->plan.has_gpu);
    return json ? plan_to_json(&e->plan, out) : plan_explain(&e->plan, &in, out);
}

int ferry_engine_trace(const struct ferry_engine *e, const char *path)
{
    return trace_has_timeline(e->trace) ? trace_write(e->trace, path)
                                        : err(ERR_STATE, "no timeline was kept: the engine was opened without");
}

int ferry_engine_trace_experts(const struct ferry_engine *e, const char *path)
{
    return e->trace_experts ? trace_write_wanted(e->trace, path)
                            : err(ERR_STATE, "no wanted experts were kept: the engine was opened without");
}

/* ---- sessions ---- */

void ferry_sample_opts_init(struct ferry_sample_opts *opts)
{
    struct sample_opts d;
    sample_opts_init(&d);
    *opts = (struct ferry_sample_opts){.struct_bytes = sizeof *opts,
                                       .temperature = d.temperature,
                                       .top_k = d.top_k,
                                       .top_p = d.top_p,
                                       .min_p = d.min_p,
                                       .repeat_penalty = d.repeat_penalty,
                                       .presence_penalty = d.presence_penalty,
                                       .frequency_penalty = d.frequency_penalty,
                                       .penalty_window = d.penalty_window,
                                       .seed = d.seed};
}

int ferry_sample_options(const struct ferry_sample_opts *in, struct sample_opts *out)
{
    struct ferry_sample_opts o;
    ferry_sample_opts_init(&o);
    if (in && in->struct_bytes > sizeof o)
        return err(ERR_ARG, "sampler options of %zu bytes; this library knows %zu", in->struct_bytes, sizeof o);
    if (in)
        memcpy(&o, in, in->struct_bytes);
    *out = (struct sample_opts){.temperature = o.temperature,
                                .top_k = o.top_k,
                                .top_p = o.top_p,
                                .min_p = o.min_p,
                                .repeat_penalty = o.repeat_penalty,
                                .presence_penalty = o.presence_penalty,
                                .frequency_penalty = o.frequency_penalty,
                                .penalty_window = o.penalty_window,
                                .seed = o.seed};
    return 0;
}

int ferry_session_make(struct ferry_engine *e, const struct ferry_sample_opts *sample, struct ferry_session **out)
{
    *out = NULL;
    struct sample_opts opts;
    int rc = ferry_sample_options(sample, &opts);
    if (rc < 0)
        return rc;
    struct ferry_session *fs = mem_zalloc(1, sizeof *fs, MEM_OTHER);
    if (!fs)
        return err(ERR_NOMEM, "a session");
    fs->engine = e;
    rc = session_make(
        &(struct session_args){
            .exec = e->exec, .cache = e->cache, .plan = &e->plan, .n_vocab = e->model->hp.n_vocab, .sample = &opts},
        &fs->s);
    if (rc < 0) {
        mem_free(fs);
        return rc;
    }
    *out = fs;
    return 0;
}

void ferry_session_free(struct ferry_session *fs)
{
    if (!fs)
        return;
    session_free(fs->s);
    mem_free(fs);
}

int ferry_session_sample_opts(struct ferry_session *fs, const struct ferry_sample_opts *sample)
{
    struct sample_opts opts;
    int rc = ferry_sample_options(sample, &opts);
    return rc < 0 ? rc : session_sample(fs->s, &opts);
}

int ferry_session_append(struct ferry_session *fs, const int32_t *tokens, size_t n, ferry_prompt_progress *progress,
                         void *arg)
{
    return session_append(fs->s, tokens, n, progress, arg);
}

int ferry_session_logits(struct ferry_session *fs, const int32_t *tokens, size_t n, bool prompt, float *out)
{
    return session_logits(fs->s, tokens, n, prompt, out);
}

int ferry_session_each_logits(struct ferry_session *fs, const int32_t *tokens, size_t n, bool prompt,
                              ferry_take_logits *take, void *arg)
{
    return session_each_logits(fs->s, tokens, n, prompt, take, arg);
}

void ferry_see(struct ferry_engine *e, const struct tune_seen *before, const struct tune_seen *after)
{
    e->seen.n_tok += after->n_tok - before->n_tok;
    e->seen.ns += after->ns - before->ns;
    e->seen.disk_bytes += after->disk_bytes - before->disk_bytes;
    e->seen.disk_wait_ns += after->disk_wait_ns - before->disk_wait_ns;
    if (refit_feed(&e->refit, &e->seen))
        exec_set_pace(e->exec, &e->refit.pace);
}

/* What sessions have generated and the store has read so far. */
static struct tune_seen look(const struct ferry_session *fs)
{
    struct session_stats s;
    struct store_stats st;

    session_stats(fs->s, &s);
    store_stats(fs->engine->store, &st);
    return (struct tune_seen){
        .n_tok = s.n_generated, .ns = s.generate_ns, .disk_bytes = st.disk_bytes, .disk_wait_ns = st.disk_wait_ns};
}

int ferry_session_step(struct ferry_session *fs, int32_t *token)
{
    struct ferry_engine *e = fs->engine;
    struct tune_seen before = look(fs);
    int rc = session_step(fs->s, token);
    struct tune_seen after = look(fs);

    /* The first token of an answer was computed with its prompt. Beside a batch's steps nothing was predicted. */
    if (rc < 0 || after.n_tok == before.n_tok || e->plan.kv_tok)
        return rc;
    ferry_see(e, &before, &after);
    return 0;
}

size_t ferry_session_n_tokens(const struct ferry_session *fs)
{
    return session_n_tokens(fs->s);
}

const int32_t *ferry_session_tokens(const struct ferry_session *fs)
{
    return session_tokens(fs->s);
}

int ferry_session_truncate(struct ferry_session *fs, size_t n)
{
    return session_truncate(fs->s, n);
}

int ferry_session_fork(const struct ferry_session *fs, struct ferry_session **out)
{
    *out = NULL;
    struct ferry_session *copy = mem_zalloc(1, sizeof *copy, MEM_OTHER);
    if (!copy)
        return err(ERR_NOMEM, "a session");
    copy->engine = fs->engine;
    int rc = session_fork(fs->s, &copy->s);
    if (rc < 0) {
        mem_free(copy);
        return rc;
    }
    *out = copy;
    return 0;
}

void ferry_session_cancel(struct ferry_session *fs)
{
    session_cancel(fs->s);
}

/* What the GPU did, and whether it was worth it. */
static void gpu_stats(const struct exec_stats *ex, struct ferry_stats *out)
{
    out->gpu_experts = ex->split.n_gpu;
    out->copied_experts = ex->split.n_copied;
    out->cpu_experts = ex->split.n_cpu;
    out->read_experts = ex->split.n_read;
    out->ahead_copies = ex->landing.n_ahead;
    out->ahead_copies_wanted = ex->landing.n_ahead_found;
    out->copy_bytes = ex->landing.bytes;
    out->direct_copies = ex->landing.n_direct;
    out->experts_predicted_s = ex->split.predicted_s;
    out->experts_measured_s = ex->split.measured_s;
    out->launches = ex->n_launches;
    out->steps = ex->n_steps;
    out->step_with_gpu_s = ex->tier.on_s;
    out->step_without_gpu_s = ex->tier.off_s;
    out->gpu_switches = ex->tier.n_changes;
    out->gpu_experts_off = ex->tier.is_off;
}

void ferry_session_stats(const struct ferry_session *fs, struct ferry_stats *out)
{
    struct session_stats s;
    struct store_stats st;
    struct exec_stats ex;
    session_stats(fs->s, &s);
    store_stats(fs->engine->store, &st);
    exec_stats(fs->engine->exec, &ex);
    const struct plan *p = &fs->engine->plan;
    *out = (struct ferry_stats){.n_prompt = s.n_prompt,
                                .n_generated = s.n_generated,
                                .prompt_ns = s.prompt_ns,
                                .generate_ns = s.generate_ns,
                                .weight_bytes_prompt = s.prompt_weight_bytes,
                                .weight_bytes_generate = s.generate_weight_bytes,
                                .disk_bytes = st.disk_bytes,
                                .disk_wait_ns = st.disk_wait_ns,
                                .load_ns = st.load_ns,
                                .load_bytes = st.load_bytes,
                                .kv_bytes = p->kv_bytes + p->gpu.kv_bytes + p->record_bytes + p->gpu.record_bytes,
                                .scratch_bytes = ex.scratch_bytes,
                                .expert_hits = st.n_expert_hits,
                                .expert_misses = st.n_expert_misses,
                                .disk_busy_ns = st.disk_busy_ns,
                                .dense_bytes = p->dense_bytes + p->gpu.dense_bytes,
                                .expert_bytes = p->expert_bytes + p->gpu.expert_bytes,
                                .hint_reads = st.n_hint_reads,
                                .hint_hits = st.n_hint_hits,
                                .vram_bytes = p->gpu.total_bytes,
                                .up_bytes = ex.up_bytes,
                                .down_bytes = ex.down_bytes,
                                .expert_rows = ex.n_expert_rows,
                                .host_expert_rows = ex.n_host_rows,
                                .hint_bytes = st.hint_bytes,
                                .hint_hit_bytes = st.hint_hit_bytes,
                                .guessed = st.n_guessed,
                                .guessed_rightly = st.n_guessed_rightly,
                                .read_repeats = st.n_repeats,
                                .pinned_bytes = st.pinned_bytes,
                                .expert_moves = st.n_moves,
                                .expert_move_bytes = st.move_bytes,
                                .gpu_segments = ex.n_dev_segments,
                                .host_segments = ex.n_host_segments,
                                .staged_segments = ex.n_staged_segments,
                                .left_segments = ex.back.n_out,
                                .returned_segments = ex.back.n_back,
                                .returned_bytes = ex.back.bytes,
                                .lifted_steps = ex.lift.n_steps,
                                .lifted_bytes = ex.lift.weight_bytes};
    gpu_stats(&ex, out);
}

const char *ferry_engine_gpu_news(const struct ferry_engine *e, uint32_t *n_seen, char *buf, size_t buf_bytes)
{
    const struct plan_unused *unused = &e->plan.unused;
    struct exec_stats ex;

    buf[0] = '\0';
    exec_stats(e->exec, &ex);
    uint32_t n_changes = ex.tier.n_changes + (unused->decode_tok_per_s > 0 || ex.is_lift_refused);
    if (n_changes != *n_seen && unused->decode_tok_per_s > 0)
        snprintf(buf, buf_bytes,
                 "GPU %" PRIu32 " is not used: with all but %" PRIu32
                 " of %d layers there, at most %.3g tokens/s are expected, from the CPU alone %.3g",
                 unused->number, unused->first_layer, e->model->hp.n_layer, unused->decode_tok_per_s,
                 e->plan.decode_tok_per_s);
    else if (n_changes != *n_seen && ex.tier.n_changes == 0)
        snprintf(buf, buf_bytes,
                 "the system does not pin the weights of the CPU's layers (%" PRIu64
                 " bytes): the GPU computes no prompts of these, the CPU does",
                 e->plan.dense_bytes);
    else if (n_changes != *n_seen)
        snprintf(
            buf, buf_bytes,
            "the CPU alone computes experts in %.3g ms a step, GPU and CPU in %.3g: the GPU computes %s from now on, "
            "until trials say otherwise",
            1e3 * ex.tier.off_s, 1e3 * ex.tier.on_s, ex.tier.is_off ? "none" : "its own again");
    *n_seen = n_changes;
    return buf;
}

const char *ferry_session_review(const struct ferry_session *fs, const struct ferry_stats *from,
                                 const struct ferry_stats *to, char *buf, size_t buf_bytes)
{
    const struct ferry_engine *e = fs->engine;
    const struct tune_seen seen = {.n_tok = to->n_generated - from->n_generated,
                                   .ns = to->generate_ns - from->generate_ns,
                                   .disk_bytes = to->disk_bytes - from->disk_bytes,
                                   .disk_wait_ns = to->disk_wait_ns - from->disk_wait_ns};
    struct tune t;

    buf[0] = '\0';
    if (!plan_is_measured(&e->plan, &e->machine))
        return buf;
    tune_compare(&e->plan, &seen, &t);
    return tune_text(&e->plan, &t, buf, buf_bytes);
}

const char *ferry_engine_refit(const struct ferry_engine *e, char *buf, size_t buf_bytes)
{
    return refit_text(&e->refit, buf, buf_bytes);
}
