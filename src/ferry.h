/* ferry: run large mixture-of-experts language models on a machine that is too small for them. The public C API.
 *
 * An engine owns a model, the machine it was planned for and the plan; a session is one conversation: its tokens, its KV
 * cache, its sampler. Handles are opaque. Nothing here writes to stdout or ends the process.
 * Functions that can fail return 0 or a negative FERRY_ERR_*; ferry_error() then says what, where and how much.
 * One engine runs one step at a time: calls on sessions of an engine must not overlap in time, except ferry_session_cancel. */
#ifndef FERRY_H
#define FERRY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ferry_status {
    FERRY_OK = 0,
    FERRY_ERR_NOMEM = -1,
    FERRY_ERR_IO = -2,
    FERRY_ERR_FORMAT = -3,
    FERRY_ERR_LIMIT = -4,
    FERRY_ERR_ARG = -5,
    FERRY_ERR_UNSUPPORTED = -6,
    FERRY_ERR_STATE = -7,
    FERRY_ERR_CANCEL = -8,
    FERRY_ERR_DEVICE = -9,
};

struct ferry_engine;
struct ferry_session;
struct ferry_stream;

const char *ferry_version(void);

/* What the last failed call of this thread had to say; "" if nothing. View, until the thread's next failing call. */
const char *ferry_error(void);

/* Give back memory that a function here handed out. Takes NULL. */
void ferry_free(void *p);

/* ---- engine ---- */

struct ferry_engine_opts {
    size_t struct_bytes;   /* set by ferry_engine_opts_init */
    uint64_t ram_bytes;    /* all memory ferry may use; 0: what is free under the cgroup limit, less a margin */
    uint32_t n_ctx;        /* positions a session can hold; 0: the model's, at most 8192 and what fits */
    uint32_t n_sessions;   /* sessions alive at once; 0: 1 */
    uint32_t n_threads;    /* 0: the cores this process may use */
    uint32_t chunk_tok;    /* prompt tokens a step; 0: the plan's choice */
    uint32_t n_out;        /* most rows of logits a step; 0: 1 */
    const char *kv_type;   /* "f16" (NULL) or "q8_0" */
    const char *io;        /* how weights are read: "auto" (NULL), "uring", "pread", "mmap" */
    const char *prefill;   /* "int" (NULL) or "blas": see cpu/README.md */
    const char *isa;       /* NULL: the best; else "avx512vnni", "avx512", "avx2", "ref" */
    bool ids_only;         /* leave the vocabulary unread: tokens are numbers, text functions give FERRY_ERR_STATE */
    bool no_pin;           /* leave threads where the system puts them */
    const char *plan_path; /* a saved plan to run instead of making one; NULL: make one */
    /* Loading: done of total bytes so far. Return false to stop (FERRY_ERR_CANCEL). May be NULL. */
    bool (*progress)(uint64_t done, uint64_t total, void *arg);
    void *progress_arg;
    uint64_t expert_ram_bytes; /* most memory for experts; the others are read when wanted; 0: the plan's choice */
    /* Rates of this machine that `ferry probe` saved, for predictions; NULL: none are known. */
    const char *profile_path;
    /* Sequences that a ferry_batch runs at once; 0: this engine has no batch; FERRY_BATCH_AUTO: the plan's choice. A saved plan
     * settles it, too. */
    uint32_t n_batch;
    uint32_t batch_tok;  /* positions that one of them is expected to take; 0: 512 */
    uint32_t batch_most; /* with FERRY_BATCH_AUTO: more sequences than this there will never be; 0: not known */
    bool trace;          /* keep a timeline of the last steps: 10 MiB, which the plan counts */
    bool trace_experts;  /* keep which experts each step wanted: 16 MiB, which the plan counts */
    /* Who computes: "cpu", or "cuda:N" where ferry was built with CUDA: GPU N all but the experts that do not fit its memory, the CPU
     * those. "auto": "cuda:0" where there is one that works, else "cpu". NULL: "cpu". A saved plan says it in place of the last two. */
    const char *device;
    uint64_t vram_bytes; /* with a GPU, how much of its memory ferry may use; 0: what is free, less a margin */
    /* A folder where a ferry_batch may keep KV pages of requests that have to wait for memory, in a file without a name; NULL: they
     * are computed again. */
    const char *spill_dir;
    /* Experts that do not lie on the GPU go there for a step: "auto" (NULL): when that is sooner than computing them on the CPU, by what
     * both are measured to take; "never"; "always": as many as there is room for. Results are the same. */
    const char *copies;
};

#define FERRY_BATCH_AUTO UINT32_MAX

void ferry_engine_opts_init(struct ferry_engine_opts *opts);

/* Read a GGUF (the first file, if it is split), plan, load. opts may be NULL (defaults); strings are copied. */
int ferry_engine_open(const char *model_path, const struct ferry_engine_opts *opts, struct ferry_engine **out);

/* Close after its sessions have been freed. Takes NULL. */
void ferry_engine_close(struct ferry_engine *engine);

struct ferry_info {
    const char *name; /* general.name, or the file's name */
    const char *architecture;
    uint32_t n_layer, n_embd, n_vocab, n_ctx_train, n_ctx; /* n_ctx: of this engine's sessions */
    uint32_t n_expert, n_expert_used;                      /* 0: dense */
    uint32_t n_threads;
    const char *isa;
    uint64_t file_bytes, resident_bytes; /* of the model; held in memory by ferry for weights */
    int32_t bos, eos;                    /* -1: none */
    bool has_chat_template;
    /* By the plan; 0: not known. Prefill: of a prompt of 512 tokens. is_measured: from rates of kernels that probe measured;
     * otherwise decode is the most that memory allows. */
    double predicted_prefill_tok_per_s, predicted_decode_tok_per_s;
    bool is_measured;
    uint64_t identity; /* of the model: its header, size, time and sampled bytes */
    uint32_t n_batch;  /* sequences that a batch runs at once; 0: opened without */
};

/* Facts about an open engine; strings are views until close. */
void ferry_engine_info(const struct ferry_engine *engine, struct ferry_info *out);

/* The plan as text for a person (json false) or as JSON. Caller frees with ferry_free. */
int ferry_engine_plan(const struct ferry_engine *engine, bool json, char **out);

/* Write what was kept since open: the timeline, as trace events in JSON that chrome://tracing and Perfetto open; the wanted
 * experts, as lines "step ROWS" and "LAYER ID ID...". ERR_IO; ERR_STATE when the engine was not asked to keep them. */
int ferry_engine_trace(const struct ferry_engine *engine, const char *path);
int ferry_engine_trace_experts(const struct ferry_engine *engine, const char *path);

/* ---- text and tokens ---- */

enum ferry_token_flags {
    FERRY_TOKENS_SPECIAL = 1, /* text of control tokens becomes the control token */
    FERRY_TOKENS_BOS = 2,     /* put BOS first, if the file says that prompts begin with it */
    FERRY_TOKENS_EOS = 4,     /* put EOS last, if the file says so: embedding models look there */
};

/* Text (any bytes) to ids. Caller frees *out with ferry_free. */
int ferry_tokenize(const struct ferry_engine *engine, const char *text, size_t n_bytes, int flags, int32_t **out,
                   size_t *n_out);

/* The bytes of one token as they appear in text (nothing for a control token). View until close; not NUL-terminated. */
int ferry_token_text(const struct ferry_engine *engine, int32_t token, const char **out, size_t *n_bytes);

/* Does this token end an answer? */
bool ferry_token_is_end(const struct ferry_engine *engine, int32_t token);

/* Tokens to text that never splits a character: push gives whatever whole characters are ready (view until the next
 * push, finish or free), finish what was left over. */
int ferry_stream_make(const struct ferry_engine *engine, struct ferry_stream **out);
int ferry_stream_push(struct ferry_stream *stream, int32_t token, const char **out, size_t *n_bytes);
int ferry_stream_finish(struct ferry_stream *stream, const char **out, size_t *n_bytes);
void ferry_stream_free(struct ferry_stream *stream);

struct ferry_message {
    const char *role; /* "system", "user", "assistant" */
    const char *content;
};

/* A variable that a template may read beside the conversation: enable_thinking, reasoning_effort, ... */
enum ferry_var_kind { FERRY_VAR_TEXT, FERRY_VAR_INT, FERRY_VAR_BOOL };

struct ferry_var {
    const char *name;
    enum ferry_var_kind kind;
    const char *text; /* FERRY_VAR_TEXT */
    int64_t number;   /* FERRY_VAR_INT; FERRY_VAR_BOOL: 0 or 1 */
};

struct ferry_chat_opts {
    size_t struct_bytes;
    bool no_generation;           /* end behind the last message, not where the assistant begins to speak */
    const struct ferry_var *vars; /* (n_vars); of one name the last counts */
    size_t n_vars;
};

void ferry_chat_opts_init(struct ferry_chat_opts *opts);

/* Lay out a conversation by the file's own chat template. opts may be NULL (defaults).
 * An assistant's message may be an answer as it came: of one in channels (gpt-oss) what it says in the final one goes back.
 * Tokenize the result with FERRY_TOKENS_SPECIAL and without BOS (the template writes it). ERR_UNSUPPORTED when the file has
 * no template or one that ferry cannot follow; codes of ferry_chat_check. Caller frees *out. */
int ferry_chat_prompt(const struct ferry_engine *engine, const struct ferry_message *messages, size_t n,
                      const struct ferry_chat_opts *opts, char **out);

/* Does the template read all of these variables? ERR_ARG: not that one, or the conversation itself goes by its name. */
int ferry_chat_check(const struct ferry_engine *engine, const struct ferry_chat_opts *opts);

/* An answer taken apart: what the model thought aloud before, and what it says to the reader. Views into the answer. */
struct ferry_reply {
    const char *thought, *said;
    size_t n_thought, n_said; /* bytes; n_thought 0: it did not think */
};

/* Does this prompt, as ferry_chat_prompt gave it, leave the model amid a thought (<think>), which an answer then begins with? */
bool ferry_reply_begins_amid(const struct ferry_engine *engine, const char *prompt);

/* Take an answer apart: thoughts between <think> and </think>, where the vocabulary has these; in channels (gpt-oss) all but what the final
 * one says. An answer that was cut while thinking says nothing. */
void ferry_reply_split(const struct ferry_engine *engine, bool begins_amid, const char *text, size_t n_bytes,
                       struct ferry_reply *out);

/* ---- grammars ---- */

/* Which texts an answer may be. At every draw the candidates are the tokens that keep the answer's text the beginning of a sentence of the
 * grammar (a token may end amid a character), and the end tokens exactly where a sentence may end; penalties, cuts and
 * temperature then see no others. Log-probabilities stay those of all tokens. When nothing but the end is possible the answer has
 * ended. Made once for an engine, and shared by sessions and requests, which hold it until they are freed. */
struct ferry_grammar;

enum ferry_grammar_kind {
    FERRY_GRAMMAR_GBNF,        /* llama.cpp's form of grammar files, but for its matching of token ids */
    FERRY_GRAMMAR_JSON_SCHEMA, /* documents that a JSON Schema (2020-12) holds of; n_bytes 0: any JSON object */
};

/* ERR_FORMAT says where the text is wrong, ERR_UNSUPPORTED what in it is not supported, and where; ERR_STATE (ids_only), ERR_LIMIT,
 * ERR_NOMEM. */
int ferry_grammar_make(struct ferry_engine *engine, enum ferry_grammar_kind kind, const char *text, size_t n_bytes,
                       struct ferry_grammar **out);
void ferry_grammar_free(struct ferry_grammar *grammar); /* takes NULL; before the engine is closed */

/* Models that think first do so without a grammar: until the thought has ended all tokens may come but those that end the
 * answer, and the sentence begins behind </think>, or up to two line feeds later; in channels (gpt-oss) behind <|message|> of
 * the final one. */
enum ferry_thought {
    FERRY_THOUGHT_NONE, /* the answer is the sentence */
    FERRY_THOUGHT_MAY,  /* a thought may come first: a first token <think> begins one */
    FERRY_THOUGHT_AMID, /* the answer begins amid one, or in a channel */
};

/* Which it is for a prompt as ferry_chat_prompt gave it. */
enum ferry_thought ferry_thought_of(const struct ferry_engine *engine, const char *prompt);

/* ---- sessions ---- */

struct ferry_sample_opts {
    size_t struct_bytes;
    float temperature;    /* 0: greedy, exact */
    int32_t top_k;        /* 0: off */
    float top_p, min_p;   /* 1 and 0: off */
    float repeat_penalty; /* 1: off; divides (multiplies, if negative) logits of tokens in the window */
    float presence_penalty, frequency_penalty; /* 0: off */
    int32_t penalty_window;                    /* last tokens looked at; -1: all; default 64 */
    uint64_t seed;                             /* same seed, same draw */
};

void ferry_sample_opts_init(struct ferry_sample_opts *opts);

/* sample may be NULL (greedy). ERR_LIMIT when n_sessions are alive already. */
int ferry_session_make(struct ferry_engine *engine, const struct ferry_sample_opts *sample, struct ferry_session **out);
void ferry_session_free(struct ferry_session *session); /* takes NULL */

/* Change the sampler from the next step on; the random state starts anew from seed. */
int ferry_session_sample_opts(struct ferry_session *session, const struct ferry_sample_opts *sample);

/* Progress of a prompt: tokens done of total. Return false to stop: what was run stays. */
typedef bool ferry_prompt_progress(size_t done, size_t total, void *arg);

/* Run these tokens after those the session holds. ERR_LIMIT (nothing done) if they would pass n_ctx; ERR_CANCEL keeps the
 * tokens run so far (ferry_session_n_tokens says how many). */
int ferry_session_append(struct ferry_session *session, const int32_t *tokens, size_t n,
                         ferry_prompt_progress *progress, void *arg);

/* As append, and write every row's logits to out (n, n_vocab). prompt false: run them as generated tokens, one by one. */
int ferry_session_logits(struct ferry_session *session, const int32_t *tokens, size_t n, bool prompt, float *out);

/* Takes rows of logits (n_rows, n_vocab), view until it returns. An error (negative) ends the run, and is what it returns. */
typedef int ferry_take_logits(const float *rows, size_t n_rows, void *arg);

/* The same in no memory but the plan's: take has the rows of each step, in order. */
int ferry_session_each_logits(struct ferry_session *session, const int32_t *tokens, size_t n, bool prompt,
                              ferry_take_logits *take, void *arg);

/* Draw the next token from what the session has seen and put it at its end. ERR_STATE when nothing was appended yet,
 * ERR_LIMIT when the session is full (n_ctx). */
int ferry_session_step(struct ferry_session *session, int32_t *token);

/* From here on the session's tokens, drawn or appended, are an answer that this grammar holds for; NULL: none does. ferry_session_step then
 * gives ERR_STATE where nothing may come next, ERR_ARG when an appended token did not fit. */
void ferry_session_grammar(struct ferry_session *session, struct ferry_grammar *grammar, enum ferry_thought thought);

/* Is the answer whole by its grammar, so that the next token could only end it? Codes of ferry_session_step. */
int ferry_session_is_whole(struct ferry_session *session, bool *out);

/* Tokens held so far; view until the next call that changes the session. */
size_t ferry_session_n_tokens(const struct ferry_session *session);
const int32_t *ferry_session_tokens(const struct ferry_session *session);

/* Forget all but the first n tokens. Where a sliding window has already let go of what they need, or recurrent layers have no state of just
 * so many, the kept tokens, or the last ones, are run again by the next append or step. */
int ferry_session_truncate(struct ferry_session *session, size_t n);

/* A second session with the same tokens and cache (pages are shared until one of them writes), and its own sampler state. */
int ferry_session_fork(const struct ferry_session *session, struct ferry_session **out);

/* Stop the append or step now running, from a signal handler or another thread: it returns ERR_CANCEL at the next chunk or
 * layer boundary and the session stays usable. With nothing running, the next append or step returns at once. */
void ferry_session_cancel(struct ferry_session *session);

struct ferry_stats {
    uint64_t n_prompt, n_generated; /* tokens run */
    uint64_t prompt_ns, generate_ns;
    uint64_t weight_bytes_prompt, weight_bytes_generate; /* weights read from memory, by what was touched */
    uint64_t disk_bytes, disk_wait_ns;
    uint64_t load_ns, load_bytes; /* of the engine */
    uint64_t kv_bytes, scratch_bytes;
    uint64_t expert_hits, expert_misses; /* experts that steps wanted: in memory already, read from disk */
    uint64_t disk_busy_ns;               /* of disk_bytes: while any read was in flight */
    uint64_t dense_bytes, expert_bytes;  /* memory for weights: always held, and for experts */
    uint64_t hint_reads, hint_hits; /* experts read because the next layer would likely want them; that were right */
    /* With a GPU: all that the plan takes of its memory, of dense_bytes, expert_bytes and kv_bytes what lies there; what went to it
     * and came from it, beside tokens and page tables; experts' rows (one a token and chosen expert), and how many the CPU computed. */
    uint64_t vram_bytes, up_bytes, down_bytes, expert_rows, host_expert_rows;
    uint64_t expert_moves,
        expert_move_bytes;               /* experts that have moved to the GPU since it was loaded; copied for that */
    uint64_t hint_bytes, hint_hit_bytes; /* bytes of the former, and of those that were right */
    uint64_t guessed,
        guessed_rightly;   /* experts that layers wanted which guesses were made for; that the guesses named */
    uint64_t read_repeats; /* reads of the model's file that failed once and were repeated, while loading too */
    /* Of the layers whose experts GPU and CPU share: how many of the experts that steps wanted lay on the GPU, were copied there for
     * the step, were computed by the CPU; how many of the latter two had to be read from disk first. Of the copies, those made before
     * the router had chosen, and how many of these were wanted. Bytes copied. */
    uint64_t gpu_experts, copied_experts, cpu_experts, read_experts, ahead_copies, ahead_copies_wanted, copy_bytes;
    /* Copies made from where experts lay, in slots that are pinned; how much of those is. */
    uint64_t direct_copies, pinned_bytes;
    /* Seconds of those layers' experts, predicted when the choice was made and measured, of steps in which both are known. */
    double experts_predicted_s, experts_measured_s;
    uint64_t launches, steps; /* kernels and graphs of them given to the GPU, and steps, since the engine was opened */
    /* Whether the GPU computes experts at all is tried now and then: seconds of a step with and without in the last trial (0: there was
     * none yet), how often that has been changed, and if it is without now. */
    double step_with_gpu_s, step_without_gpu_s;
    uint32_t gpu_switches;
    bool gpu_experts_off;
    /* Where the KV cache lies in both memories: segments of 512 positions that a row saw in a layer, which lay with the GPU; in the host's
     * memory, the CPU computed with them there; or they came up. Counted in steps that touch some of the host's. */
    uint64_t gpu_segments, host_segments, staged_segments;
    /* Segments that had to leave the GPU for the host's memory, that came back, and bytes that were copied for the latter. */
    uint64_t left_segments, returned_segments, returned_bytes;
    /* Steps of many rows in which the GPU computed the CPU's layers, too, and weights that came up for it. */
    uint64_t lifted_steps, lifted_bytes;
};

void ferry_session_stats(const struct ferry_session *session, struct ferry_stats *out);

/* One line for a person when the GPU has been left to compute experts, or not to, since *n_seen changes of that (which is brought up to
 * date; 0 in the beginning): which way is faster by measured steps. Or, once, that a GPU that was asked for is not used, because it holds
 * a part of the layers only and is predicted to make the model no faster. "" when nothing has changed. Returns buf. */
const char *ferry_engine_gpu_news(const struct ferry_engine *engine, uint32_t *n_seen, char *buf, size_t buf_bytes);

/* How what was generated between two readings of a session's statistics compares with the plan's prediction, and which rate was
 * off: one line into buf; "" when nothing was predicted or generated. Prompts may not have run in between. Returns buf. */
const char *ferry_session_review(const struct ferry_session *session, const struct ferry_stats *from,
                                 const struct ferry_stats *to, char *buf, size_t buf_bytes);

/* What an engine has made of predictions that were wrong: which rates it corrected, what it tried then, and what it kept (by that
 * no result changes). One line into buf; "" when nothing was. Returns buf. */
const char *ferry_engine_refit(const struct ferry_engine *engine, char *buf, size_t buf_bytes);

/* ---- many prompts at once ---- */

/* A batch runs many prompts together: one row of each that is being answered and at most a chunk of prompt rows a step, so
 * that each weight read serves all. They join and leave at every step, share the pages of equal beginnings, and give pages
 * back when memory runs out. Each answer is bit for bit what a session alone would say. The engine was opened with n_batch. */
struct ferry_batch;

/* How the hidden states of a request's tokens (after the model's final norm, before the vocabulary) become one vector. */
enum ferry_pooling {
    FERRY_POOLING_NONE,
    FERRY_POOLING_MEAN, /* the mean over all tokens: every one is run */
    FERRY_POOLING_LAST, /* that of the last token */
};

struct ferry_request {
    size_t struct_bytes;   /* set by ferry_request_init */
    const int32_t *tokens; /* (n_tokens) the prompt; copied, as all below */
    size_t n_tokens;
    size_t n_scored;         /* do not answer, but judge the last n_scored tokens: their log-probabilities */
    size_t max_tokens;       /* of the answer; 0: until the model ends it or the context is full */
    bool ignore_eos;         /* the model's end tokens do not end the answer */
    const char *const *stop; /* (n_stop) texts that end the answer and are no part of it */
    size_t n_stop;
    int logprobs; /* log-probabilities of the tokens, and of so many best ones; -1: none. Scoring always gives them */
    const struct ferry_sample_opts *sample; /* NULL: greedy */
    enum ferry_pooling
        pooling;    /* do not answer, but give an embedding: one vector for the prompt, which may fill the context */
    bool normalize; /* the embedding's Euclidean length is 1, as services give it */
    struct ferry_grammar *grammar; /* of the answer; held. NULL: none */
    enum ferry_thought thought;    /* with a grammar */
};

void ferry_request_init(struct ferry_request *request);

enum ferry_finish {
    FERRY_FINISH_STOP,    /* the model ended it, or a stop text came */
    FERRY_FINISH_LENGTH,  /* max_tokens */
    FERRY_FINISH_CONTEXT, /* the context is full */
    FERRY_FINISH_SCORED,
    FERRY_FINISH_FAILED, /* this one alone: status and error say why */
    FERRY_FINISH_POOLED, /* an embedding */
};

struct ferry_answer {
    uint64_t id;
    enum ferry_finish finish;
    const char *text; /* UTF-8, (n_bytes) and a NUL */
    size_t n_bytes;
    const int32_t *tokens; /* (n_tokens) drawn, without the one that ended it; or those scored */
    size_t n_tokens;
    size_t n_prompt, n_shared; /* prompt tokens; how many of them were not run, because another's pages held them */
    size_t n_greedy;           /* of scored tokens, how many were the likeliest */
    const float *logprobs;     /* (n_tokens); NULL: not asked for */
    const int32_t *top_tokens; /* (n_tokens, n_top), best first */
    const float *top_logprobs; /* (n_tokens, n_top) */
    int n_top;
    const float *embedding; /* (n_embd); NULL: not asked for. The same bits whatever ran beside it */
    size_t n_embd;
    int status; /* of a failed one */
    const char *error;
    uint64_t wait_ns, run_ns; /* from submit to its first step, and from there to its end */
    uint32_t n_preempted;     /* how often it gave its pages back and was run again */
    void *own;                /* the library's */
};

/* How the plan chooses the number of sequences, as text: for several numbers what is held, what a step reads and how long it
 * takes. Reads only the model's header. Caller frees *out with ferry_free. */
int ferry_batch_explain(const char *model_path, const struct ferry_engine_opts *opts, char **out);

/* ERR_STATE (no n_batch), ERR_NOMEM, ERR_IO (spill_dir takes no file), ERR_UNSUPPORTED (spill_dir, for a model with sliding windows
 * or recurrent layers). */
int ferry_batch_make(struct ferry_engine *engine, struct ferry_batch **out);
void ferry_batch_free(struct ferry_batch *batch); /* drops what waits and runs; takes NULL */

/* *id is never 0. ERR_ARG (a grammar for what is scored or pooled, too), ERR_LIMIT (the prompt leaves no room for an answer),
 * ERR_NOMEM: the batch is as it was. */
int ferry_batch_submit(struct ferry_batch *batch, const struct ferry_request *request, uint64_t *id);

/* Give an answer that is finished, or else run one step and look again; *out NULL: none yet. The answer is the caller's, by
 * ferry_answer_free. After an error nothing is lost, and the next call tries again. */
int ferry_batch_poll(struct ferry_batch *batch, struct ferry_answer **out);
void ferry_answer_free(struct ferry_answer *answer); /* takes NULL */

/* Has it begun, and was its answer not given yet? One that is finished and waits for its poll has begun. */
bool ferry_batch_has_begun(const struct ferry_batch *batch, uint64_t id);

/* Drop a request. FERRY_ERR_ARG: there is none of that id any more. */
int ferry_batch_cancel(struct ferry_batch *batch, uint64_t id);

/* Make the poll that runs, or else the next one, return ERR_CANCEL soon. Safe in a signal handler and from other threads. */
void ferry_batch_interrupt(struct ferry_batch *batch);

struct ferry_batch_stats {
    uint32_t n_waiting, n_running, n_finished, most_running;
    uint64_t n_steps, step_ns;
    uint64_t n_prompt, n_generated; /* tokens run as given; drawn */
    uint64_t n_shared;              /* prompt tokens not run, because another's pages held them */
    uint64_t n_preempted, n_rerun;  /* how often pages were given back; tokens run again for it */
    uint64_t n_spilled,
        n_spill_failed; /* how often they were kept on disk meanwhile; how often writing or reading failed */
    uint64_t kv_pages, kv_pages_used;
    uint64_t
        n_sat_out; /* times that a sequence waited for a step because its pages lay in the host's memory beside a GPU's */
    uint64_t n_halved;     /* steps in halves, of which the CPU attended to one while the GPU computed the other */
    uint64_t weight_bytes; /* of the weights that steps touched, each once a step */
    uint64_t disk_bytes, disk_wait_ns, expert_hits, expert_misses; /* as in ferry_stats */
};
void ferry_batch_stats(const struct ferry_batch *batch, struct ferry_batch_stats *out);

/* How steps in which n_batch answers each went on by a token, and no prompt was run, compare with what the plan predicted of them: one
 * line into buf; "" when nothing was predicted or there were none. What the engine made of that: ferry_engine_refit. Returns buf. */
const char *ferry_batch_review(const struct ferry_batch *batch, char *buf, size_t buf_bytes);

/* One line for a person when sequences whose pages lie in the host's memory beside a GPU's have been left to wait for their pages to come
 * back, or not to, or steps to be run in halves, or not, since *n_seen changes of that (which is brought up to date; 0 in the beginning):
 * which way brings more tokens by measured steps. "" when nothing has changed. Returns buf. */
const char *ferry_batch_news(const struct ferry_batch *batch, uint32_t *n_seen, char *buf, size_t buf_bytes);

/* The same as ferry_batch_review() as numbers; 0: nothing was predicted; there were none. */
struct ferry_batch_speed {
    double predicted_tok_per_s, measured_tok_per_s;
};
void ferry_batch_speed(const struct ferry_batch *batch, struct ferry_batch_speed *out);

/* ---- results that survive ---- */

/* A file of lines, each a record. A run that was killed, lost its power or filled the disk leaves whole lines and at most one
 * torn end, which the next open cuts off. The file is locked: one process at a time. */
struct ferry_journal;

/* Called at open for each whole line (without its end; off: where it begins). 0: a record; FERRY_ERR_FORMAT: none, so that it and
 * all behind it are cut off; another error ends the opening. */
typedef int ferry_journal_line(const char *line, size_t n_bytes, uint64_t off, void *arg);

/* Open, or make an empty one. begin: what the file begins with, or its end if it is shorter than that; NULL: anything.
 * ERR_STATE: it begins otherwise, and was left as it is, or another process has it; ERR_IO, ERR_UNSUPPORTED (no regular file). */
int ferry_journal_open(const char *path, const char *begin, ferry_journal_line *on_line, void *arg,
                       struct ferry_journal **out);
void ferry_journal_close(struct ferry_journal *journal);       /* without sync; takes NULL */
uint64_t ferry_journal_n_cut(struct ferry_journal *journal);   /* bytes cut off at open */
uint64_t ferry_journal_n_bytes(struct ferry_journal *journal); /* of whole lines */

/* Add a line (n_bytes, no line end in it); it reaches the disk within about a second of appends, or with sync. ERR_IO: the file
 * holds what it held before. *off (may be NULL): where the line begins. */
int ferry_journal_append(struct ferry_journal *journal, const char *line, size_t n_bytes, uint64_t *off);
int ferry_journal_sync(struct ferry_journal *journal);
int ferry_journal_read(struct ferry_journal *journal, uint64_t off, void *p, size_t n_bytes);
int ferry_journal_clear(struct ferry_journal *journal); /* forget all lines */

#ifdef __cplusplus
}
#endif
#endif
