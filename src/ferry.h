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
    const char *isa;       /* NULL: the best; else "avx2", "ref", … */
    bool ids_only;         /* leave the vocabulary unread: tokens are numbers, text functions give FERRY_ERR_STATE */
    bool no_pin;           /* leave threads where the system puts them */
    const char *plan_path; /* a saved plan to run instead of making one; NULL: make one */
    /* Loading: done of total bytes so far. Return false to stop (FERRY_ERR_CANCEL). May be NULL. */
    bool (*progress)(uint64_t done, uint64_t total, void *arg);
    void *progress_arg;
    uint64_t expert_ram_bytes; /* most memory for experts; the others are read when wanted; 0: the plan's choice */
    const char *device;        /* who computes: "cpu" (NULL), or "cuda:N" where ferry was built with CUDA */
};

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
};

/* Facts about an open engine; strings are views until close. */
void ferry_engine_info(const struct ferry_engine *engine, struct ferry_info *out);

/* The plan as text for a person (json false) or as JSON. Caller frees with ferry_free. */
int ferry_engine_plan(const struct ferry_engine *engine, bool json, char **out);

/* ---- text and tokens ---- */

enum ferry_token_flags {
    FERRY_TOKENS_SPECIAL = 1, /* text of control tokens becomes the control token */
    FERRY_TOKENS_BOS = 2,     /* put BOS first, if the file says that prompts begin with it */
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

/* Lay out a conversation by the file's own chat template. add_generation: end where the assistant begins to speak.
 * Tokenize the result with FERRY_TOKENS_SPECIAL and without BOS (the template writes it). ERR_UNSUPPORTED when the file has
 * no template or one that ferry cannot follow. Caller frees *out. */
int ferry_chat_prompt(const struct ferry_engine *engine, const struct ferry_message *messages, size_t n,
                      bool add_generation, char **out);

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

/* Draw the next token from what the session has seen and put it at its end. ERR_STATE when nothing was appended yet,
 * ERR_LIMIT when the session is full (n_ctx). */
int ferry_session_step(struct ferry_session *session, int32_t *token);

/* Tokens held so far; view until the next call that changes the session. */
size_t ferry_session_n_tokens(const struct ferry_session *session);
const int32_t *ferry_session_tokens(const struct ferry_session *session);

/* Forget all but the first n tokens. Where a sliding window has already let go of what they need, the kept tokens are run
 * again by the next append or step. */
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
    uint64_t hint_reads, hint_hits; /* experts read because the next layer would likely want them; that were right */
};

void ferry_session_stats(const struct ferry_session *session, struct ferry_stats *out);

#ifdef __cplusplus
}
#endif
#endif
