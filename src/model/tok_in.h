/* What the files of the tokenizer share; nobody else includes this. */
#ifndef FERRY_MODEL_TOK_IN_H
#define FERRY_MODEL_TOK_IN_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "src/base/mem.h"
#include "src/model/tok.h"

#ifdef __cplusplus
extern "C" {
#endif

enum tok_attr {
    TOK_ATTR_NORMAL = 1,
    TOK_ATTR_UNKNOWN = 2,
    TOK_ATTR_CONTROL = 4, /* may stand beside another type: well-known names count as control whatever the file says */
    TOK_ATTR_USER = 8,
    TOK_ATTR_UNUSED = 16,
    TOK_ATTR_BYTE = 32,
    TOK_ATTR_LSTRIP = 64, /* white space to the left of the token vanishes */
    TOK_ATTR_RSTRIP = 128,
    TOK_ATTR_EOG = 256,
};

/* A stretch of the arena. */
struct tok_span {
    uint32_t off, n;
};

/* Strings to numbers, open addressing. Keys are spans of an arena, held in an array beside it. */
struct tok_map {
    int32_t *slot; /* own; (mask + 1); -1: empty */
    uint32_t mask;
    uint32_t n_used;
};

#define TOK_MAX_REGEX 6

/* One way of cutting text into words before the merges. Regexes apply one after the other, each to the pieces that the
 * one before left: matches and what lies between them become pieces. */
struct tok_split {
    const char *regex[TOK_MAX_REGEX];
    bool whole_words; /* a word that is a token is not merged up from its bytes */
    bool add_bos;     /* if the file does not say */
};

/* One pair of neighbours that may merge. */
struct tok_pair {
    uint64_t key;   /* left symbol << 32 | right symbol; TOK_NO_PAIR: empty slot */
    int32_t rank;   /* lower merges first */
    int32_t result; /* symbol */
};
#define TOK_NO_PAIR UINT64_MAX

struct tok {
    char *model, *pre; /* own */
    int32_t n_vocab;
    char *arena; /* own: all texts */
    uint64_t arena_bytes, arena_cap;
    struct tok_span *text;  /* own; (n_vocab): as the vocabulary spells it */
    struct tok_span *piece; /* own; (n_vocab): what it stands for */
    uint16_t *attr;         /* own; (n_vocab); bits of enum tok_attr */
    struct tok_map by_text;
    uint32_t max_piece_bytes, max_text_bytes;
    int32_t bos, eos, eot, eom, unk, fim_pad, fim_rep, fim_sep;
    bool add_bos, add_eos, add_space_prefix;
    int32_t byte_id[256]; /* the token or, for BPE, symbol of a single byte; TOK_NONE */

    int32_t *special; /* own; (n_special): control, user and unknown tokens, ordered by text */
    int32_t n_special;
    int32_t special_from[257]; /* where the texts with a given first byte begin in special */

    float *score; /* own; (n_vocab); SentencePiece only */

    bool is_bpe;
    struct tok_span *sym; /* own; (n_sym): bytes of a symbol; the first n_vocab are the tokens */
    int32_t n_sym, cap_sym;
    struct tok_map by_sym;
    struct tok_pair *pair; /* own; (pair_mask + 1) */
    uint32_t pair_mask;
    const struct tok_split *split;
    pcre2_general_context *re_mem; /* own, as the regexes */
    pcre2_match_context *re_match;
    pcre2_code *re[TOK_MAX_REGEX];
    int n_re;
};

/* tok_map.c */
int tok_map_init(struct tok_map *map, int64_t n_keys); /* room for so many keys; ERR_NOMEM */
void tok_map_done(struct tok_map *map);
/* The number of a string, or TOK_NONE. */
int32_t tok_map_get(const struct tok_map *map, const char *arena, const struct tok_span *key, const char *p, size_t n);
/* Enter key[id] unless an equal string is there already. ERR_NOMEM. */
int tok_map_put(struct tok_map *map, const char *arena, const struct tok_span *key, int32_t id);
/* Room for n more bytes at the end of the arena, which may move. ERR_NOMEM, ERR_LIMIT (4 GiB in all). */
int tok_map_room(struct tok *tok, uint64_t n);
/* Copy a string, which is not in the arena, to its end. Likewise. */
int tok_map_keep(struct tok *tok, const char *p, size_t n, struct tok_span *out);

/* tok_work.c: what one encode call carries along */
struct tok_sym {
    uint32_t off, n;    /* stretch of the text; n == 0: eaten by its left neighbour */
    int32_t prev, next; /* index, -1 at the ends */
    int32_t id;         /* BPE: symbol or TOK_NONE; else unused */
};

struct tok_node {
    uint64_t key; /* smallest first: order << 32 | left index */
    int32_t right;
    int32_t result;
    uint32_t n; /* bytes of both; tells when the pair is no longer what it was */
};

struct tok_work {
    const struct tok *tok; /* view */
    const char *text;      /* view: what the symbols' offsets mean */
    int32_t *ids;          /* own until given to the caller */
    int64_t n_ids, cap_ids;
    struct tok_sym *sym; /* own */
    int64_t n_sym, cap_sym;
    struct tok_node *heap; /* own */
    int64_t n_heap, cap_heap;
    pcre2_match_data *match; /* own */
};

/* May left and right (neighbours) merge? Fills order (smaller first) and result. */
typedef bool tok_work_pair(const struct tok_work *work, const struct tok_sym *left, const struct tok_sym *right,
                           uint32_t *order, int32_t *result);

void tok_work_done(struct tok_work *work);
int tok_work_id(struct tok_work *work, int32_t id); /* append a token */
int tok_work_sym(struct tok_work *work, uint32_t off, uint32_t n,
                 int32_t id);                                          /* append a symbol, linked to the one before */
int tok_work_merge(struct tok_work *work, tok_work_pair *pair);        /* merge the symbols until no pair is left */
int tok_work_push(struct tok_work *work, const struct tok_node *node); /* the heap itself, for other uses */
bool tok_work_pop(struct tok_work *work, struct tok_node *out);

/* tok_special.c */
int tok_special_init(struct tok *tok,
                     const char *model_name); /* names, end-of-generation set, the table of special texts */
struct tok_frag {
    uint32_t off, n; /* stretch of the text */
    int32_t id;      /* a token, or TOK_NONE: text to be tokenized */
};
/* Cut text at special tokens. *frags is the caller's (mem_free()). */
int tok_special_cut(struct tok_work *work, const char *text, uint32_t n, unsigned flags, struct tok_frag **frags,
                    int64_t *n_frags);

/* tok_split.c */
int tok_split_init(struct tok *tok, const char *pre); /* pre may be NULL */
void tok_split_done(struct tok *tok);
typedef int tok_split_word(struct tok_work *work, const char *word, size_t n);
int tok_split_run(struct tok_work *work, const char *text, size_t n, tok_split_word *word);

/* tok_bpe.c, tok_spm.c */
int tok_bpe_init(struct tok *tok, const struct tok_source *src); /* also fills the pieces */
int tok_bpe_encode(struct tok_work *work, const char *text, size_t n);
int tok_spm_init(struct tok *tok, const struct tok_source *src);
int tok_spm_encode(struct tok_work *work, const char *text, size_t n, bool prefix);

/* tok_stream.c: a copy of text in which every byte that is not UTF-8 is U+FFFD; mem_free() */
int tok_stream_clean(const char *text, size_t n, char **out, size_t *n_out);
/* Is text valid UTF-8? */
bool tok_stream_is_utf8(const char *text, size_t n);

#ifdef __cplusplus
}
#endif
#endif
