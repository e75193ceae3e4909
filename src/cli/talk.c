/* Opens an engine from options and lets a session answer. Knows ferry.h only, and where the machine's profile lies. */
#include "src/cli/talk.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/profile.h"
#include "src/cli/stop.h"
#include "src/cli/term.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static bool on_load(uint64_t done, uint64_t total, void *arg)
{
    term_progress_at(arg, done, total);
    return !stop_asked();
}

struct ferry_engine_opts talk_engine_opts(const struct conf *conf, uint32_t n_ctx, uint32_t n_out,
                                          struct term_progress *progress)
{
    struct ferry_engine_opts o;

    ferry_engine_opts_init(&o);
    o.ram_bytes = conf->ram_bytes;
    o.expert_ram_bytes = conf->expert_ram_bytes;
    o.n_ctx = n_ctx;
    o.n_threads = conf->n_threads;
    o.chunk_tok = conf->chunk_tok;
    o.n_out = n_out;
    o.kv_type = conf->kv_type;
    o.io = conf->io;
    o.prefill = conf->prefill;
    o.isa = conf->isa;
    o.device = conf->device;
    o.vram_bytes = conf->vram_bytes;
    o.copies = conf->gpu_copies;
    o.ids_only = conf->tokens != NULL;
    o.no_pin = conf->no_pin;
    o.plan_path = conf->plan;
    o.trace = conf->trace != NULL;
    o.trace_experts = conf->trace_experts != NULL;
    o.progress = on_load;
    o.progress_arg = progress;
    return o;
}

static struct ferry_sample_opts sample_opts(const struct conf *conf)
{
    struct ferry_sample_opts o;

    ferry_sample_opts_init(&o);
    o.temperature = (float)conf->temperature;
    o.top_k = (int32_t)conf->top_k;
    o.top_p = (float)conf->top_p;
    o.min_p = (float)conf->min_p;
    o.repeat_penalty = (float)conf->repeat_penalty;
    o.presence_penalty = (float)conf->presence_penalty;
    o.frequency_penalty = (float)conf->frequency_penalty;
    o.penalty_window = (int32_t)conf->penalty_window;
    o.seed = conf->has_seed ? conf->seed : clock_ns();
    return o;
}

/* Only those who draw have sampler options in their table; zeros would be out of range. */
static bool draws(const struct conf *conf)
{
    return conf->repeat_penalty > 0;
}

/* The template's variables from here on, if it reads them; takes the list. */
static int take_vars(struct talk *t, struct vars *vars)
{
    struct ferry_chat_opts o = vars_opts(vars);
    int rc = o.n_vars ? ferry_chat_check(t->engine, &o) : 0;
    struct vars unused = rc ? *vars : t->vars;

    if (!rc)
        t->vars = *vars;
    vars_done(&unused);
    return rc;
}

int talk_set_var(struct talk *t, const char *text)
{
    struct vars vars = {0};
    int rc = vars_add(&vars, &t->vars);

    if (!rc)
        rc = vars_read(&vars, text);
    if (!rc)
        return take_vars(t, &vars);
    vars_done(&vars);
    return rc;
}

static int take_grammar(struct talk *t)
{
    struct grammars_wish wish;
    struct text text = {0};
    int rc = grammars_read(t->conf, &text, &wish);

    if (!rc)
        rc = grammars_get(&t->grammars, t->engine, &wish, &t->grammar);
    text_done(&text);
    return rc;
}

int talk_open(const struct conf *conf, uint32_t n_ctx, uint32_t n_out, struct talk *out)
{
    struct term_progress progress;
    struct ferry_engine_opts opts = talk_engine_opts(conf, n_ctx, n_out, &progress);
    struct ferry_sample_opts sample = sample_opts(conf);
    char *profile = NULL;

    *out = (struct talk){.conf = conf};
    int rc = profile_path(conf, &profile);
    if (rc)
        return rc;
    opts.profile_path = profile;
    stop_begin();
    term_progress_begin(&progress, conf, "loading", NULL);
    rc = ferry_engine_open(conf->model, &opts, &out->engine);
    mem_free(profile);
    term_progress_end(&progress);
    if (!rc)
        rc = ferry_session_make(out->engine, draws(conf) ? &sample : NULL, &out->session);
    if (rc)
        return rc;
    ferry_engine_info(out->engine, &out->info);
    stop_watch(out->session);
    rc = take_grammar(out);
    if (rc)
        return rc;
    struct vars vars = {0};
    rc = vars_add(&vars, &conf->vars);
    if (!rc)
        return take_vars(out, &vars);
    vars_done(&vars);
    return rc;
}

void talk_close(struct talk *t)
{
    stop_end();
    vars_done(&t->vars);
    ferry_session_free(t->session);
    grammars_done(&t->grammars);
    ferry_engine_close(t->engine);
    t->session = NULL;
    t->engine = NULL;
}

int talk_prompt(struct talk *t, const struct ferry_message *messages, size_t n, int32_t **tokens, size_t *n_tokens)
{
    struct ferry_chat_opts o = vars_opts(&t->vars);
    char *prompt = NULL;

    *tokens = NULL;
    int rc = ferry_chat_prompt(t->engine, messages, n, &o, &prompt);
    if (!rc)
        rc = ferry_tokenize(t->engine, prompt, strlen(prompt), FERRY_TOKENS_SPECIAL, tokens, n_tokens);
    t->thought = rc ? FERRY_THOUGHT_NONE : ferry_thought_of(t->engine, prompt);
    ferry_free(prompt);
    return rc;
}

static bool on_prompt(size_t done, size_t total, void *arg)
{
    term_progress_at(arg, done, total);
    return !stop_asked();
}

static int feed(struct talk *t, const int32_t *tokens, size_t n)
{
    const int32_t *held = ferry_session_tokens(t->session);
    size_t n_held = ferry_session_n_tokens(t->session), n_same = 0;
    struct term_progress progress;

    while (n_same < n && n_same < n_held && held[n_same] == tokens[n_same])
        n_same++;
    /* The last token is always run: its logits are what the answer begins with. */
    if (n_same == n)
        n_same--;
    int rc = n_same < n_held ? ferry_session_truncate(t->session, n_same) : 0;
    if (rc)
        return rc;
    term_progress_begin(&progress, t->conf, "reading the prompt", "tokens");
    rc = ferry_session_append(t->session, tokens + n_same, n - n_same, on_prompt, &progress);
    term_progress_end(&progress);
    return rc;
}

int talk_feed(struct talk *t, const int32_t *tokens, size_t n)
{
    if (!n)
        return err(ERR_ARG, "the prompt is empty");
    if (n >= t->info.n_ctx)
        return err(ERR_LIMIT,
                   "the context is full: the conversation takes %zu tokens, the context holds %" PRIu32
                   " (--ctx N makes it larger)",
                   n, t->info.n_ctx);
    int rc = feed(t, tokens, n);
    /* A Ctrl-C that came when the answer had just ended was for that answer, and was still to be taken. */
    if (rc == FERRY_ERR_CANCEL && !stop_asked())
        rc = feed(t, tokens, n);
    ferry_session_grammar(t->session, t->grammar, t->thought);
    ferry_session_stats(t->session, &t->fed);
    return rc;
}

const char *talk_end_name(enum talk_end end)
{
    static const char *const names[] = {"end", "length", "context", "interrupted"};
    return names[end];
}

static int show(const char *p, size_t n_bytes)
{
    if (!n_bytes)
        return 0;
    errno = 0;
    if (fwrite(p, 1, n_bytes, stdout) != n_bytes || fflush(stdout))
        return err(ERR_IO, "writing to stdout: %s", errno ? strerror(errno) : "failed");
    return 0;
}

static int take_piece(struct talk_answer *out, bool shown, const char *p, size_t n_bytes)
{
    int rc = text_add(&out->text, p, n_bytes);
    return rc || !shown ? rc : show(p, n_bytes);
}

/* One token of the answer; *ended: it was the last. */
static int step(struct talk *t, struct ferry_stream *stream, bool shown, struct talk_answer *out, bool *ended)
{
    uint32_t most = t->conf->n_tokens;
    const char *piece;
    size_t n_bytes;
    int32_t token;

    *ended = true;
    if (stop_asked()) {
        out->end = TALK_END_INTERRUPTED;
        return 0;
    }
    if (most && out->n_tokens >= most) {
        out->end = TALK_END_LENGTH;
        return 0;
    }
    if (ferry_session_n_tokens(t->session) >= t->info.n_ctx) {
        out->end = TALK_END_CONTEXT;
        return 0;
    }
    int rc = ferry_session_step(t->session, &token);
    if (rc == FERRY_ERR_CANCEL) {
        out->end = TALK_END_INTERRUPTED;
        return 0;
    }
    if (rc)
        return rc;
    if (ferry_token_is_end(t->engine, token)) {
        out->end = TALK_END_MODEL;
        return 0;
    }
    *ended = false;
    out->n_tokens++;
    rc = ferry_stream_push(stream, token, &piece, &n_bytes);
    if (!rc)
        rc = take_piece(out, shown, piece, n_bytes);
    if (!rc)
        rc = ferry_session_is_whole(t->session, ended);
    return rc; /* out->end: by the model, unless it is set */
}

int talk_reply(struct talk *t, bool shown, struct talk_answer *out)
{
    struct ferry_stream *stream = NULL;
    bool ended = false;
    const char *piece;
    size_t n_bytes;

    *out = (struct talk_answer){.end = TALK_END_MODEL};
    int rc = ferry_stream_make(t->engine, &stream);
    while (!rc && !ended)
        rc = step(t, stream, shown, out, &ended);
    if (!rc)
        rc = ferry_stream_finish(stream, &piece, &n_bytes);
    if (!rc)
        rc = take_piece(out, shown, piece, n_bytes);
    ferry_stream_free(stream);
    return rc;
}

/* ---- statistics ---- */

void talk_stats_begin(const struct talk *t, struct ferry_stats *start)
{
    ferry_session_stats(t->session, start);
}

static double rate(uint64_t n, uint64_t ns)
{
    return ns ? (double)n * 1e9 / (double)ns : 0;
}

static double percent(uint64_t part, uint64_t of)
{
    return of ? 100 * (double)part / (double)of : 0;
}

/* What lies in memory, and how much of it was read for each token. */
static void print_memory(const struct ferry_stats *now, const struct ferry_stats *start)
{
    uint64_t n = now->n_generated - start->n_generated, ns = now->generate_ns - start->generate_ns;
    uint64_t bytes = now->weight_bytes_generate - start->weight_bytes_generate;
    uint64_t n_hits = now->expert_hits - start->expert_hits, n_misses = now->expert_misses - start->expert_misses;

    fprintf(stderr, "[memory: dense %.1f MB, experts %.1f MB, KV %.1f MB, scratch %.1f MB",
            (double)now->dense_bytes / 1e6, (double)now->expert_bytes / 1e6, (double)now->kv_bytes / 1e6,
            (double)now->scratch_bytes / 1e6);
    if (n_hits + n_misses)
        fprintf(stderr, "; of %" PRIu64 " experts wanted %.1f %% were there or on their way", n_hits + n_misses,
                percent(n_hits, n_hits + n_misses));
    if (n)
        fprintf(stderr, "; weights read %.1f MB a token, %.1f GB/s", (double)bytes / (double)n / 1e6,
                rate(bytes, ns) / 1e9);
    fprintf(stderr, "]\n");
}

/* Experts of layers that GPU and CPU share, by the way that they went, and what the choice between the ways was worth. */
static void print_ways(const struct ferry_stats *now, const struct ferry_stats *start)
{
    uint64_t n_gpu = now->gpu_experts - start->gpu_experts, n_copied = now->copied_experts - start->copied_experts;
    uint64_t n_cpu = now->cpu_experts - start->cpu_experts, n_read = now->read_experts - start->read_experts;
    uint64_t n_ahead = now->ahead_copies - start->ahead_copies;
    double predicted_s = now->experts_predicted_s - start->experts_predicted_s;
    double measured_s = now->experts_measured_s - start->experts_measured_s;

    if (!(n_gpu + n_copied + n_cpu))
        return;
    fprintf(stderr,
            "[experts: %" PRIu64 " on the GPU, %" PRIu64 " copied there (%.2f MB, %" PRIu64
            " from pinned slots), %" PRIu64 " by the CPU; %" PRIu64 " of the latter two read first",
            n_gpu, n_copied, (double)(now->copy_bytes - start->copy_bytes) / 1e6,
            now->direct_copies - start->direct_copies, n_cpu, n_read);
    if (n_ahead)
        fprintf(stderr, "; %" PRIu64 " copies sent ahead, %.1f %% of them rightly", n_ahead,
                percent(now->ahead_copies_wanted - start->ahead_copies_wanted, n_ahead));
    if (measured_s > 0)
        fprintf(stderr, "; predicted %.3f s, measured %.3f s", predicted_s, measured_s);
    if (now->step_with_gpu_s > 0)
        fprintf(stderr, "; a step %.3g ms with the GPU's experts, %.3g ms without%s", 1e3 * now->step_with_gpu_s,
                1e3 * now->step_without_gpu_s, now->gpu_experts_off ? ": they are switched off" : "");
    fprintf(stderr, "]\n");
}

/* Who computed attention over how much of a cache that lies on two sides. */
static void print_segments(const struct ferry_stats *now, const struct ferry_stats *start)
{
    uint64_t n_gpu = now->gpu_segments - start->gpu_segments, n_host = now->host_segments - start->host_segments;
    uint64_t n_staged = now->staged_segments - start->staged_segments, n = n_gpu + n_host + n_staged;

    if (n_host + n_staged)
        fprintf(stderr,
                "; of %" PRIu64 " segments of KV read %.1f %% lay with it, %.1f %% came up, the CPU took the others", n,
                percent(n_gpu, n), percent(n_staged, n));
    if (now->returned_bytes > start->returned_bytes)
        fprintf(stderr, "; %" PRIu64 " segments came back to it (%.1f MB)",
                now->returned_segments - start->returned_segments,
                (double)(now->returned_bytes - start->returned_bytes) / 1e6);
    if (now->lifted_steps > start->lifted_steps)
        fprintf(stderr, "; in %" PRIu64 " steps it computed the CPU's layers, too, whose weights came up (%.1f MB)",
                now->lifted_steps - start->lifted_steps, (double)(now->lifted_bytes - start->lifted_bytes) / 1e6);
}

/* What the GPU holds, what crossed to and from it, and whose experts were computed where. */
static void print_gpu(const struct ferry_stats *now, const struct ferry_stats *start)
{
    uint64_t n_rows = now->expert_rows - start->expert_rows, n_host = now->host_expert_rows - start->host_expert_rows;

    fprintf(stderr, "[GPU: %.1f MB of its memory; %.2f MB up to it, %.2f MB down", (double)now->vram_bytes / 1e6,
            (double)(now->up_bytes - start->up_bytes) / 1e6, (double)(now->down_bytes - start->down_bytes) / 1e6);
    if (n_rows)
        fprintf(stderr,
                "; of %" PRIu64 " rows of experts it computed %.1f %%, the CPU the others; %" PRIu64
                " experts moved to it (%.1f MB)",
                n_rows, percent(n_rows - n_host, n_rows), now->expert_moves - start->expert_moves,
                (double)(now->expert_move_bytes - start->expert_move_bytes) / 1e6);
    if (now->steps > start->steps)
        fprintf(stderr, "; %.1f launches a step",
                (double)(now->launches - start->launches) / (double)(now->steps - start->steps));
    print_segments(now, start);
    fprintf(stderr, "]\n");
    print_ways(now, start);
}

/* What came from disk, how fast, and for how much of the time nothing could be done meanwhile. */
static void print_disk(const struct ferry_stats *now, const struct ferry_stats *start)
{
    uint64_t ns = now->generate_ns - start->generate_ns + now->prompt_ns - start->prompt_ns;
    uint64_t bytes = now->disk_bytes - start->disk_bytes, wait_ns = now->disk_wait_ns - start->disk_wait_ns;
    uint64_t n_hints = now->hint_reads - start->hint_reads, n_right = now->hint_hits - start->hint_hits;
    uint64_t hint_bytes = now->hint_bytes - start->hint_bytes;

    fprintf(stderr, "[disk: loaded %.1f MB in %.2f s", (double)now->load_bytes / 1e6, (double)now->load_ns * 1e-9);
    if (bytes)
        fprintf(stderr, "; then %.1f MB, %.2f GB/s while reads were in flight, waited %.2f s (%.1f %% of the time)",
                (double)bytes / 1e6, rate(bytes, now->disk_busy_ns - start->disk_busy_ns) / 1e9, (double)wait_ns * 1e-9,
                percent(wait_ns, ns));
    if (n_hints)
        fprintf(stderr,
                "; %" PRIu64
                " experts read ahead, %.1f MB, %.1f %% of them rightly, %.1f MB in vain; guesses named %.1f %% "
                "of what was wanted",
                n_hints, (double)hint_bytes / 1e6, percent(n_right, n_hints),
                (double)(hint_bytes - (now->hint_hit_bytes - start->hint_hit_bytes)) / 1e6,
                percent(now->guessed_rightly - start->guessed_rightly, now->guessed - start->guessed));
    if (now->read_repeats)
        fprintf(stderr, "; %" PRIu64 " reads failed once and were repeated", now->read_repeats);
    fprintf(stderr, "]\n");
}

void talk_news_print(struct talk *t)
{
    char news[256];

    if (ferry_engine_gpu_news(t->engine, &t->n_gpu_news, news, sizeof news)[0])
        fprintf(stderr, "ferry: %s\n", news);
}

void talk_stats_print(const struct talk *t, const struct ferry_stats *start, bool all)
{
    struct ferry_stats now;

    ferry_session_stats(t->session, &now);
    uint64_t n_prompt = now.n_prompt - start->n_prompt, n_generated = now.n_generated - start->n_generated;
    fprintf(stderr,
            "[prompt %" PRIu64 " tokens, %.1f tokens/s; answer %" PRIu64
            " tokens, %.1f tokens/s; context %zu of %" PRIu32 "]\n",
            n_prompt, rate(n_prompt, now.prompt_ns - start->prompt_ns), n_generated,
            rate(n_generated, now.generate_ns - start->generate_ns), ferry_session_n_tokens(t->session), t->info.n_ctx);
    if (!all)
        return;
    char review[1024];
    if (ferry_session_review(t->session, &t->fed, &now, review, sizeof review)[0])
        fprintf(stderr, "[%s]\n", review);
    if (ferry_engine_refit(t->engine, review, sizeof review)[0])
        fprintf(stderr, "[%s]\n", review);
    print_memory(&now, start);
    if (now.vram_bytes)
        print_gpu(&now, start);
    print_disk(&now, start);
    fprintf(stderr, "[%" PRIu32 " threads, %s]\n", t->info.n_threads, t->info.isa);
}

int talk_trace(const struct talk *t)
{
    int rc = t->conf->trace ? ferry_engine_trace(t->engine, t->conf->trace) : 0;

    return !rc && t->conf->trace_experts ? ferry_engine_trace_experts(t->engine, t->conf->trace_experts) : rc;
}
