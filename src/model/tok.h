/* Tokenizers: text to token ids and back. Two kinds are known: SentencePiece ("llama") and byte-level BPE ("gpt2") with
 * a regex split named by `tokenizer.ggml.pre`. A tok is immutable after it is made: any number of threads may use one. */
#ifndef FERRY_MODEL_TOK_H
#define FERRY_MODEL_TOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct gguf;
struct tok;

enum tok_flag {
    TOK_SPECIAL =
        1, /* encode: text that spells a control token becomes that token; decode: control tokens are written out */
    TOK_BOS =
        2, /* encode: put BOS first (whether the model wants one is tok_add_bos()'s answer); ERR_ARG if it has none */
    TOK_EOS = 4,  /* encode: put EOS last, likewise */
    TOK_TRIM = 8, /* decode: drop the space that a SentencePiece encode put in front */
};

/* The token types of `tokenizer.ggml.token_type`, by their GGUF numbers. */
enum tok_type {
    TOK_TYPE_UNDEFINED = 0,
    TOK_TYPE_NORMAL = 1,
    TOK_TYPE_UNKNOWN = 2,
    TOK_TYPE_CONTROL = 3,
    TOK_TYPE_USER = 4,
    TOK_TYPE_UNUSED = 5,
    TOK_TYPE_BYTE = 6,
};

#define TOK_NONE (-1)  /* there is no such token */
#define TOK_UNSET (-2) /* the file does not say: the kind's default holds */

struct tok_str {
    const char *p; /* view; not NUL-terminated, NULL only if n is 0 */
    uint64_t n;    /* bytes */
};

/* What a vocabulary says, before it is checked. All pointers are views that tok_make() reads and does not keep. */
struct tok_source {
    const char *model; /* tokenizer.ggml.model: "llama", "gpt2" */
    const char *pre;   /* tokenizer.ggml.pre; NULL: not said */
    const char *name;  /* general.name; NULL: not said (some families' whitespace rules go by it) */
    int64_t n_tokens;
    const struct tok_str *tokens; /* (n_tokens) */
    int64_t n_scores;             /* n_tokens, or 0 with scores NULL */
    const float *scores;          /* (n_scores) */
    int64_t n_types;              /* n_tokens, or 0 with types NULL: all normal */
    const int32_t *types;         /* (n_types), enum tok_type */
    int64_t n_merges;
    const struct tok_str *merges;                               /* (n_merges), "left right", best first */
    int64_t bos, eos, eot, eom, unk, fim_pad, fim_rep, fim_sep; /* ids, TOK_NONE or TOK_UNSET */
    int add_bos, add_eos, add_space_prefix;                     /* 0, 1 or TOK_UNSET */
};

/* A source in which everything is NULL, 0 or unset. */
void tok_source_init(struct tok_source *src);

/* Check a vocabulary and build a tokenizer that owns copies of all it needs; *out must be given to tok_free().
 * ERR_FORMAT (text names the GGUF key), ERR_UNSUPPORTED (model or pre unknown), ERR_LIMIT, ERR_NOMEM. Any thread. */
int tok_make(const struct tok_source *src, struct tok **out);

/* The same from a GGUF file's keys; works on vocabulary-only files. The file may be closed afterwards. */
int tok_from_gguf(const struct gguf *gguf, struct tok **out);

void tok_free(struct tok *tok); /* takes NULL */

/* Ids of text (bytes long, may hold NUL); bytes that are not UTF-8 count as U+FFFD each (BPE) or as themselves (byte tokens).
 * flags: of enum tok_flag. *ids is the caller's, freed by mem_free(); a valid pointer also when *n is 0.
 * ERR_NOMEM, ERR_LIMIT (text over 512 MiB), ERR_ARG (BOS or EOS asked for, none there). Any thread. */
int tok_encode(const struct tok *tok, const char *text, size_t bytes, unsigned flags, int32_t **ids, int64_t *n);

/* The bytes that a token stands for in text; control tokens give their name. A piece alone need not be whole UTF-8.
 * View, as long as tok lives. ERR_ARG: no such id. */
int tok_piece(const struct tok *tok, int32_t id, const char **bytes, int *n);

/* The token's text as the vocabulary spells it. Otherwise as tok_piece(). */
int tok_text(const struct tok *tok, int32_t id, const char **bytes, int *n);

/* The id of the token spelled exactly so in the vocabulary, or TOK_NONE. */
int32_t tok_find(const struct tok *tok, const char *text, size_t bytes);

/* Text of ids: valid UTF-8 (bad bytes become U+FFFD), NUL-terminated, n_bytes without the NUL. *text is the caller's,
 * freed by mem_free(). flags: TOK_SPECIAL, TOK_TRIM. ERR_ARG: an id is none; ERR_NOMEM. */
int tok_decode(const struct tok *tok, const int32_t *ids, int64_t n, unsigned flags, char **text, int64_t *n_bytes);

int32_t tok_n_vocab(const struct tok *tok);
int32_t tok_bos(const struct tok *tok); /* or TOK_NONE, as the next three */
int32_t tok_eos(const struct tok *tok);
int32_t tok_eot(const struct tok *tok);
int32_t tok_unk(const struct tok *tok);
enum tok_type tok_type_of(const struct tok *tok, int32_t id); /* TOK_TYPE_UNDEFINED for what is no id */
bool tok_is_eog(const struct tok *tok, int32_t id);           /* does the answer end here? false for what is no id */
bool tok_add_bos(const struct tok *tok);                      /* does the model want BOS in front of a text? */
bool tok_add_eos(const struct tok *tok);
bool tok_add_space_prefix(const struct tok *tok);
const char *tok_model_name(const struct tok *tok); /* view, as long as tok lives */
const char *tok_pre_name(const struct tok *tok);   /* "default" if the file said none */

/* Ids in, text out: gives a character only when it is whole. One stream per answer; one thread at a time. */
struct tok_stream {
    const struct tok *tok; /* view; outlives the stream */
    char *buf;             /* own */
    unsigned flags;
    int n_held; /* bytes of an unfinished character, 0 to 3 */
    char held[4];
};

/* flags: TOK_SPECIAL, TOK_TRIM. All memory is taken here, so that a step allocates nothing. ERR_NOMEM. */
int tok_stream_init(struct tok_stream *stream, const struct tok *tok, unsigned flags);

/* *text: valid UTF-8, not NUL-terminated, maybe empty; view, until the next call on the stream. ERR_ARG: no such id. */
int tok_stream_push(struct tok_stream *stream, int32_t id, const char **text, int *n);

/* What is left: an unfinished character comes out as U+FFFD. The stream is then ready for the next answer. */
void tok_stream_finish(struct tok_stream *stream, const char **text, int *n);

void tok_stream_done(struct tok_stream *stream); /* frees; takes a stream whose init failed, too */

#ifdef __cplusplus
}
#endif
#endif
