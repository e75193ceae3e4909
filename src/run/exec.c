/* Owns what a step needs, laid out when it is opened, and what comes before and behind the walk down the op list (exec_walk.c): pages that
 * come back, the rows, the logits that come down. */
#include "src/run/exec_in.h"

#include <inttypes.h>
#include <string.h>

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"
#include "src/model/program.h"
#include "src/run/attn.h"
#include "src/run/cache.h"
#include "src/run/lift.h"
#include "src/run/moe.h"
#include "src/run/store.h"
#include "src/run/trace.h"

/* Steps of more rows are prompts: no two are alike. */
#define TIMED_ROWS 8

/* The best logits come by multiples of so many, so that steps which want a few more or less are one CUDA graph. */
#define TOP_STEP 64

/* What mem_map rounds up to. */
#define PAGE_BYTES 4096

_Static_assert((int)PLAN_LIFT_FENCES == (int)LIFT_FENCES, "as the plan counts them");

static bool has_memory(const struct exec *e)
{
    return e->main.dev->ops->alloc != NULL;
}

static uint64_t logits_bytes(const struct exec *e)
{
    return tensor_bytes(e->main.program->logits);
}

/* What the host needs for what it computes. */
static int take_host_scratch(struct exec *e, const struct plan *plan)
{
    e->host_scratch_bytes = plan_host_scratch(plan, e->main.program, e->before.program, e->host->ops);
    e->host_scratch = mem_map(e->host_scratch_bytes, MEM_SCRATCH);
    if (!e->host_scratch)
        return err(ERR_NOMEM, "%" PRIu64 " bytes of scratch beside the device", e->host_scratch_bytes);
    return e->host->ops->set_scratch(e->host, e->host_scratch, e->host_scratch_bytes);
}

static int take_memory(struct exec *e)
{
    const struct program *p = e->main.program;
    struct device *dev = e->main.dev;
    e->scratch_bytes = size_up(e->scratch_bytes, 64);
    if (has_memory(e)) {
        int rc = dev->ops->alloc(dev, e->arena_bytes, &e->main.arena);
        if (rc == 0)
            rc = dev->ops->alloc(dev, e->scratch_bytes, &e->scratch);
        if (rc == 0 && e->before.program) /* rows go up from there */
            rc = dev->ops->alloc_host(dev, e->before.program->arena_bytes, &e->before.arena);
        if (rc == 0 && e->half.program)
            rc = dev->ops->alloc(dev, e->half.program->arena_bytes, &e->half.arena);
        if (rc < 0)
            return rc;
        e->logits = mem_map(logits_bytes(e), MEM_SCRATCH);
        e->best_bytes = tensor_bytes(p->top->dst[0]);
        e->best = mem_map(e->best_bytes, MEM_SCRATCH);
        return e->logits && e->best ? 0 : err(ERR_NOMEM, "logits of %" PRIu64 " bytes", logits_bytes(e));
    }
    e->main.arena = mem_map(e->arena_bytes, MEM_SCRATCH);
    e->scratch = mem_map(e->scratch_bytes, MEM_SCRATCH);
    if (!e->main.arena || !e->scratch)
        return err(ERR_NOMEM, "activations of %" PRIu64 " bytes and %" PRIu64 " bytes of scratch", e->arena_bytes,
                   e->scratch_bytes);
    return 0;
}

static void give_memory(struct exec *e)
{
    struct device *dev = e->main.dev;
    mem_unmap(e->host_scratch, e->host_scratch_bytes, MEM_SCRATCH);
    if (has_memory(e)) {
        mem_unmap(e->best, e->best_bytes, MEM_SCRATCH);
        mem_unmap(e->logits, e->logits ? logits_bytes(e) : 0, MEM_SCRATCH);
        dev->ops->release(dev, e->half.arena);
        dev->ops->release_host(dev, e->before.arena);
        dev->ops->release(dev, e->scratch);
        dev->ops->release(dev, e->main.arena);
    } else {
        mem_unmap(e->scratch, e->scratch_bytes, MEM_SCRATCH);
        mem_unmap(e->main.arena, e->arena_bytes, MEM_SCRATCH);
    }
}

/* weight: where the store has one for the part. Weights are only ever an op's w, which is const. */
static void bind(const struct exec *e, struct part *part, const void *weight(const struct store *s, int i))
{
    program_bind_arena(part->program, part->arena);
    for (int i = 0; i < e->model->n_weights; i++)
        part->program->weights[i].data = (void *)weight(e->store, i);
}

static int check_op(const struct op *op, const struct device_ops *ops)
{
    return ops->can(op) ? 0
                        : err(ERR_UNSUPPORTED, "device %s cannot run %s of layer %d", ops->name,
                              device_op_name(op->kind), op->layer);
}

/* host: computes experts, too, beside the part's device; NULL: nobody does. */
static int check_ops(const struct part *part, const struct device *host)
{
    const struct program *p = part->program;
    int rc = p->logits ? check_op(&p->hidden, part->dev->ops) : 0;

    for (int i = 0; i < p->n_ops && rc == 0; i++) {
        rc = check_op(&p->ops[i], part->dev->ops);
        if (rc == 0 && host && p->ops[i].kind == OP_MOE)
            rc = check_op(&p->ops[i], host->ops);
    }
    return rc;
}

static int make_part(const struct exec *e, const struct plan *plan, enum plan_part which, struct part *part)
{
    int rc = plan_program(plan, e->model, which, &part->program);
    if (rc == 0)
        rc = check_ops(part, which == PLAN_BEFORE ? NULL : e->host);
    if (rc < 0)
        return rc;
    part->seqs = mem_zalloc((size_t)e->n_seqs, sizeof *part->seqs, MEM_META);
    return part->seqs ? 0 : err(ERR_NOMEM, "views of %d sequences", e->n_seqs);
}

static int take_moe(struct exec *e, const struct exec_args *args, struct part *part, struct moe *moe)
{
    const struct plan *plan = args->plan;
    bool is_beside = part == &e->main && plan_is_split(plan);

    part->moe = moe;
    return moe_init(moe,
                    &(struct moe_args){.program = part->program,
                                       .store = e->store,
                                       .dev = part->dev,
                                       .host = is_beside ? e->host : NULL,
                                       .trace = e->trace,
                                       .look_ahead = plan->look_ahead && (is_beside || part->dev->ops->alloc == NULL),
                                       .n_ahead = (int)plan->pace.n_ahead,
                                       .plan = plan,
                                       .rates = args->rates,
                                       .clock = e->clock});
}

/* In the arena of the device's own layers, which begin where these end. */
static int take_lift(struct exec *e, const struct plan *plan)
{
    struct lift_args args = {.host_program = e->before.program,
                             .dev = e->main.dev,
                             .host = e->host,
                             .store = e->store,
                             .trace = e->trace,
                             .arena = e->main.arena};
    struct device_step step;
    int rc = plan_program(plan, e->model, PLAN_BEFORE, &args.program);

    if (rc < 0)
        return rc;
    plan_device_step(plan, e->model, &step);
    args.first_fence = step.n_fences - (plan_has_host_kv(plan) ? PLAN_ATTN_FENCES : 0) - PLAN_LIFT_FENCES;
    e->lift_rows = (int)plan->gpu.lift_rows;
    return lift_init(&e->lift, &args);
}

/* What the device needs for its own layers and, where it computes the host's in some steps, for those. */
static void count_device_memory(struct exec *e, const struct plan *plan)
{
    const struct program *p = e->main.program, *before = e->before.program;
    const struct device_ops *ops = e->main.dev->ops;
    const int n_threads = (int)plan->n_threads;

    e->arena_bytes = p->arena_bytes;
    e->scratch_bytes = ops->scratch_bytes(p->ops, p->n_ops, p->n_rows, n_threads);
    if (!plan_has_lift(plan))
        return;
    uint64_t bytes = ops->scratch_bytes(before->ops, before->n_ops, before->n_rows, n_threads);
    e->scratch_bytes = bytes > e->scratch_bytes ? bytes : e->scratch_bytes;
    e->arena_bytes = before->arena_bytes > e->arena_bytes ? before->arena_bytes : e->arena_bytes;
}

/* half: 0 or 1, of a step in halves. */
static int take_attn(const struct exec *e, const struct plan *plan, struct part *part, int half)
{
    struct device_step step;

    plan_device_step(plan, e->model, &step);
    return attn_init(&part->attn, &(struct attn_args){.program = part->program,
                                                      .dev = part->dev,
                                                      .host = e->host,
                                                      .n_seqs = e->n_seqs,
                                                      .n_ctx = plan->n_ctx,
                                                      .stage_rows = (int)plan->gpu.stage_rows,
                                                      .fence = step.n_fences - PLAN_ATTN_FENCES + half});
}

static int open_parts(struct exec *e, const struct exec_args *args)
{
    const struct plan *plan = args->plan;
    const struct program *p;
    int rc = make_part(e, plan, PLAN_MAIN, &e->main);

    if (rc == 0 && plan_has_host_layers(plan))
        rc = make_part(e, plan, PLAN_BEFORE, &e->before);
    if (rc == 0 && plan_has_halves(plan))
        rc = make_part(e, plan, PLAN_HALF, &e->half);
    if (rc < 0)
        return rc;
    p = e->main.program;
    count_device_memory(e, plan);
    rc = take_memory(e);
    if (rc < 0)
        return rc;
    bind(e, &e->main, store_weight);
    if (e->before.program)
        bind(e, &e->before, store_host_weight);
    if (e->half.program)
        bind(e, &e->half, store_weight);
    if (p->top) {
        e->top_data = p->top->dst[0]->data;
        p->top->dst[0] = &e->top;
    }
    rc = e->main.dev->ops->set_scratch(e->main.dev, e->scratch, e->scratch_bytes);
    if (rc == 0 && e->host)
        rc = take_host_scratch(e, plan);
    if (rc == 0)
        rc = take_moe(e, args, &e->main, &e->moe);
    if (rc == 0 && e->before.program)
        rc = take_moe(e, args, &e->before, &e->before_moe);
    if (rc == 0 && plan_has_lift(plan))
        rc = take_lift(e, plan);
    e->half.moe = &e->moe; /* no more than a few rows at a time, and one half after the other */
    if (rc == 0 && plan_has_host_kv(plan))
        rc = take_attn(e, plan, &e->main, 0);
    if (rc == 0 && e->half.program)
        rc = take_attn(e, plan, &e->half, 1);
    return rc;
}

static void count_memory(struct exec *e)
{
    uint64_t before_bytes = e->before.program ? e->before.program->arena_bytes : 0;
    uint64_t half_bytes = e->half.program ? e->half.program->arena_bytes : 0;

    e->dense_bytes = model_decode_bytes(e->model, model_all(e->model));
    for (int layer = 0; layer < e->model->hp.n_layer; layer++)
        e->dense_bytes -= (uint64_t)e->model->hp.n_expert_used * model_expert_bytes(e->model, layer);
    e->stats.scratch_bytes = size_up(e->arena_bytes, PAGE_BYTES) + size_up(before_bytes, PAGE_BYTES) +
                             size_up(e->scratch_bytes, PAGE_BYTES) + size_up(e->host_scratch_bytes, PAGE_BYTES) +
                             e->main.attn.shape.dev_bytes + e->main.attn.shape.host_bytes +
                             e->half.attn.shape.dev_bytes + e->half.attn.shape.host_bytes + half_bytes;
}

int exec_open(const struct exec_args *args, struct exec **out)
{
    *out = NULL;
    const struct plan *plan = args->plan;
    struct exec *e = mem_zalloc(1, sizeof *e, MEM_META);
    if (!e)
        return err(ERR_NOMEM, "an executor");
    e->model = args->model;
    e->main.dev = e->half.dev = args->device;
    e->before.dev = args->host;
    e->host = args->host;
    e->store = args->store;
    e->trace = args->trace;
    e->n_seqs = (int)plan->n_seq;
    e->clock = args->clock ? args->clock : clock_ns;
    tier_init(&e->tier, false);
    int rc = open_parts(e, args);
    if (rc < 0) {
        exec_close(e);
        return rc;
    }
    count_memory(e);
    *out = e;
    return 0;
}

void exec_close(struct exec *e)
{
    if (!e)
        return;
    lift_done(&e->lift);
    attn_done(&e->half.attn);
    attn_done(&e->main.attn);
    moe_done(&e->before_moe);
    moe_done(&e->moe);
    mem_free(e->half.seqs);
    mem_free(e->before.seqs);
    mem_free(e->main.seqs);
    give_memory(e);
    program_free(e->half.program);
    program_free(e->before.program);
    program_free(e->main.program);
    mem_free(e);
}

void exec_set_pace(struct exec *e, const struct plan_pace *pace)
{
    e->moe.ahead.n_likely = e->before_moe.ahead.n_likely = (int)pace->n_ahead;
    store_set_reads(e->store, (int)pace->n_reads);
}

static int check_batch(const struct exec *e, const struct batch *b)
{
    const struct program *p = e->main.program;
    if (b->n_rows < 1 || b->n_rows > p->n_rows || b->n_out > p->n_out || b->n_seqs > e->n_seqs ||
        b->n_second > e->n_seqs)
        return err(ERR_LIMIT, "a step of %d rows, %d of logits, %d sequences; the plan allows %d, %d and %d", b->n_rows,
                   b->n_out, b->n_seqs, p->n_rows, p->n_out, e->n_seqs);
    for (int row = 0; row < b->n_rows; row++)
        if (b->token[row] < 0 || b->token[row] >= e->model->hp.n_vocab)
            return err(ERR_ARG, "token %d of a vocabulary of %d", b->token[row], e->model->hp.n_vocab);
    return 0;
}

/* Rows of the step's second half; 0: it is walked as a whole. */
static int n_second_of(const struct exec *e, const struct batch *b)
{
    return e->half.program ? b->n_second : 0;
}

static int run_step(struct exec *e, const struct rows *rows, const struct batch *batch, const int *cancel)
{
    struct trace_event event = {.what = TRACE_STEP, .id = rows->n, .begin_ns = e->trace ? clock_ns() : 0};

    trace_step(e->trace, rows->n);
    int rc = exec_walk(e, rows, n_second_of(e, batch), cancel);
    if (rc == 0 && batch->wants_hidden)
        rc = exec_walk_dense(e, &e->main, &e->main.program->hidden, 1, rows);
    if (rc == 0)
        rc = e->main.dev->ops->sync(e->main.dev);
    else if (e->before.program) /* the next one's rows must not be written over what is still going up */
        e->main.dev->ops->sync(e->main.dev);
    if (rc == 0)
        rc = store_check(e->store);
    event.end_ns = e->trace ? clock_ns() : 0;
    trace_add(e->trace, &event);
    return rc;
}

/* A step whose experts both sides compute is timed, and now and then one side is left out. */
static int run_timed(struct exec *e, const struct rows *rows, const struct batch *batch, const int *cancel)
{
    if (!e->moe.host)
        return run_step(e, rows, batch, cancel);
    int kind = rows->n <= TIMED_ROWS ? rows->n : TIER_NO_KIND;
    moe_use_gpu(&e->moe, tier_begin(&e->tier, kind));
    uint64_t from_ns = e->clock();
    int rc = run_step(e, rows, batch, cancel);
    if (rc == 0)
        tier_end(&e->tier, kind, (double)(e->clock() - from_ns) * 1e-9);
    return rc;
}

/* Pages that were the host's, to where there is room by now, beside what follows. */
static int bring_back(struct exec *e, struct cache *cache)
{
    struct trace_event event = {.what = TRACE_BACK, .begin_ns = e->trace ? clock_ns() : 0};
    struct cache_back_stats before;

    cache_back_stats(cache, &before);
    int rc = cache_back_step(cache);
    cache_back_stats(cache, &e->stats.back);
    event.id = (int32_t)(e->stats.back.n_pages - before.n_pages);
    event.bytes = e->stats.back.bytes - before.bytes;
    event.end_ns = e->trace ? clock_ns() : 0;
    if (event.id)
        trace_add(e->trace, &event);
    return rc;
}

/* TOP_K in this step: for all rows alike, if any will do with the best; they lie side by side, so that one copy brings them. */
static void set_top(struct exec *e, const struct batch *b)
{
    struct op *op = e->main.program->top;
    int most = 0;

    if (!op)
        return;
    for (int i = 0; i < b->n_out; i++)
        most = b->n_top[i] > most ? b->n_top[i] : most;
    if (most > 1)
        most = (int)size_up((uint64_t)most, TOP_STEP);
    if (most > 0)
        e->top = tensor_make(QUANT_I32, 2 * most, b->n_out, 1, e->top_data);
    else
        e->top.ne[0] = 0;
}

static int bring_logits(struct exec *e, int first, int n)
{
    const struct tensor *out = e->main.program->logits;
    uint64_t bytes = out->stride[1] * (uint64_t)n;
    int rc = e->main.dev->ops->download(e->main.dev, e->logits + (size_t)first * (size_t)out->ne[0],
                                        tensor_row(out, first), bytes);

    e->stats.down_bytes += rc == 0 ? bytes : 0;
    return rc;
}

/* Does all of row i come? Where nothing of it is finite, too: the sampler then says what there is instead. */
static bool is_whole(const struct exec *e, int i)
{
    return e->n_top[i] == 0 || e->best[i * e->top.ne[0]] < 0;
}

/* What was asked for of each row, in as few copies as can be. */
static int bring_down(struct exec *e)
{
    int rc = 0;

    if (e->top.ne[0]) {
        rc = e->main.dev->ops->download(e->main.dev, e->best, e->top.data, tensor_bytes(&e->top));
        e->stats.down_bytes += rc == 0 ? tensor_bytes(&e->top) : 0;
    }
    for (int i = 0, n; i < e->n_said && rc == 0; i += n + 1) {
        for (n = 0; i + n < e->n_said && is_whole(e, i + n);)
            n++;
        if (n > 0)
            rc = bring_logits(e, i, n);
    }
    return rc;
}

void exec_row(const struct exec *e, int i, struct sample_row *row)
{
    const int n_vocab = e->model->hp.n_vocab;
    const int k = (int)(e->top.ne[0] / 2);
    const int32_t *best = e->best ? e->best + (size_t)i * 2 * (size_t)k : NULL;

    *row = (struct sample_row){.n = n_vocab, .logit = e->said + (size_t)i * (size_t)n_vocab};
    if (!best || is_whole(e, i))
        return;
    row->id = best;
    row->logit = (const float *)(best + k);
    for (row->n = k; row->id[row->n - 1] < 0;)
        row->n--;
}

/* Which pages whose walk will see. */
static void view_pages(struct exec *e, const struct batch *b)
{
    const int n_second = n_second_of(e, b), first_seq = n_second ? b->seq[b->n_rows - n_second] : b->n_seqs;

    for (int i = 0; i < b->n_seqs; i++) {
        cache_view(b->seqs[i], &e->main.seqs[i]);
        if (e->before.program)
            cache_view_host(b->seqs[i], &e->before.seqs[i]);
        if (e->half.program)
            e->half.seqs[i] = e->main.seqs[i];
    }
    if (e->main.attn.dev)
        attn_begin(&e->main.attn, b, 0, first_seq, e->main.seqs);
    if (n_second)
        attn_begin(&e->half.attn, b, first_seq, b->n_seqs, e->half.seqs);
}

int exec_run(struct exec *e, const struct batch *batch, const int *cancel, const float **logits)
{
    *logits = NULL;
    int rc = check_batch(e, batch);
    if (rc == 0)
        rc = bring_back(e, cache_of(batch->seqs[0]));
    if (rc < 0)
        return rc;
    view_pages(e, batch);
    const struct rows rows = {.n = batch->n_rows,
                              .n_out = batch->n_out,
                              .n_prompt = batch->n_prompt,
                              .token = batch->token,
                              .pos = batch->pos,
                              .seq = batch->seq,
                              .out_row = batch->out_row,
                              .seqs = e->main.seqs};
    uint64_t expert_bytes = e->stats.expert_bytes;
    e->n_hidden = 0;
    e->n_top = batch->n_top;
    e->n_said = batch->n_out;
    set_top(e, batch);
    rc = run_timed(e, &rows, batch, cancel);
    if (rc == 0 && e->logits)
        rc = bring_down(e);
    if (rc < 0)
        return rc;
    e->n_hidden = batch->wants_hidden ? batch->n_rows : 0;
    e->stats.n_steps++;
    e->stats.n_rows += (uint64_t)batch->n_rows;
    e->stats.weight_bytes += e->dense_bytes + (e->stats.expert_bytes - expert_bytes);
    e->said = e->logits ? e->logits : e->main.program->logits->data;
    *logits = batch->n_out > 0 ? e->said : NULL;
    return 0;
}

int exec_hidden(struct exec *e, int first, int n, float *out)
{
    const struct tensor *x = e->main.program->hidden.dst[0];
    const size_t row_bytes = (size_t)x->ne[0] * sizeof *out;

    if (first < 0 || n < 1 || first > e->n_hidden - n)
        return err(ERR_STATE, "hidden states of rows %d to %d; the last step has %d", first, first + n - 1,
                   e->n_hidden);
    const char *from = (const char *)x->data + (size_t)first * x->stride[1];
    if (has_memory(e)) {
        int rc = e->main.dev->ops->download(e->main.dev, out, from, (uint64_t)n * row_bytes);
        e->stats.down_bytes += rc == 0 ? (uint64_t)n * row_bytes : 0;
        return rc;
    }
    memcpy(out, from, (size_t)n * row_bytes);
    return 0;
}

void exec_stats(const struct exec *e, struct exec_stats *out)
{
    const struct moe *moe = &e->moe, *before = &e->before_moe;
    const struct attn_stats *attn = &e->main.attn.stats, *half = &e->half.attn.stats;
    const struct device *dev = e->main.dev;

    *out = e->stats;
    out->down_bytes += moe->stats.down_bytes + attn->down_bytes + half->down_bytes;
    out->up_bytes += moe->stats.up_bytes + attn->up_bytes + half->up_bytes;
    out->n_dev_segments = attn->n_dev_segments + half->n_dev_segments;
    out->n_host_segments = attn->n_host_segments + half->n_host_segments;
    out->n_staged_segments = attn->n_staged_segments + half->n_staged_segments;
    out->lift = e->lift.stats;
    out->is_lift_refused = e->lift.program && !lift_is_on(&e->lift);
    out->down_bytes += e->lift.stats.down_bytes;
    out->up_bytes += e->lift.stats.up_bytes;
    out->n_expert_rows = moe->stats.n_rows + before->stats.n_rows;
    out->n_host_rows = moe->stats.n_host_rows + before->stats.n_rows;
    out->split = moe->split.stats;
    if (moe->split.landing)
        landing_stats(moe->split.landing, &out->landing);
    if (dev->ops->n_launches)
        out->n_launches = dev->ops->n_launches(e->main.dev);
    out->tier = e->tier;
}
