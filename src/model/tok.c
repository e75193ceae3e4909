/* Making a tokenizer from a checked vocabulary, and the calls that walk a text through it. How text is merged into tokens is in
 * tok_bpe.c and tok_spm.c, special tokens in tok_special.c, the way back in tok_stream.c. */
#include "src/model/tok_in.h"

#include <string.h>

#include "src/base/err.h"
#include "src/model/gguf.h"

#define MAX_TOKENS \
    ((int64_t)1 << 26) /* 100 times the largest vocabulary; keeps every number of a symbol within int32 */
#define MAX_TEXT_BYTES ((size_t)1 << 29) /* three times this, as marks or U+FFFD, still counts within int32 */

void tok_source_init(struct tok_source *src)
{
    *src = (struct tok_source){0};
    src->bos = src->eos = src->eot = src->eom = src->unk = TOK_UNSET;
    src->fim_pad = src->fim_rep = src->fim_sep = TOK_UNSET;
    src->add_bos = src->add_eos = src->add_space_prefix = TOK_UNSET;
}

static int check_counts(const struct tok_source *src)
{
    if (src->n_tokens < 1 || src->n_tokens > MAX_TOKENS)
        return err(ERR_FORMAT, "tokenizer.ggml.tokens: %lld tokens", (long long)src->n_tokens);
    if (src->scores && src->n_scores != src->n_tokens)
        return err(ERR_FORMAT, "tokenizer.ggml.scores: %lld for %lld tokens", (long long)src->n_scores,
                   (long long)src->n_tokens);
    if (src->types && src->n_types != src->n_tokens)
        return err(ERR_FORMAT, "tokenizer.ggml.token_type: %lld for %lld tokens", (long long)src->n_types,
                   (long long)src->n_tokens);
    if (src->n_merges < 0 || src->n_merges > MAX_TOKENS)
        return err(ERR_FORMAT, "tokenizer.ggml.merges: %lld merges", (long long)src->n_merges);
    return 0;
}

static int set_id(const struct tok *tok, const char *key, int64_t id, int64_t usual, int32_t *out)
{
    if (id == TOK_UNSET)
        id = usual < tok->n_vocab ? usual : TOK_NONE;
    if (id < TOK_NONE || id >= tok->n_vocab)
        return err(ERR_FORMAT, "tokenizer.ggml.%s_token_id: %lld, but there are %d tokens", key, (long long)id,
                   (int)tok->n_vocab);
    *out = (int32_t)id;
    return 0;
}

static int set_ids(struct tok *tok, const struct tok_source *src)
{
    /* A SentencePiece file that says nothing means Llama's own order. For BPE there is no usual place. */
    const struct {
        const char *key;
        int64_t id, usual;
        int32_t *out;
    } rows[] = {
        {"bos", src->bos, tok->is_bpe ? TOK_NONE : 1, &tok->bos},
        {"eos", src->eos, tok->is_bpe ? TOK_NONE : 2, &tok->eos},
        {"unknown", src->unk, tok->is_bpe ? TOK_NONE : 0, &tok->unk},
        {"eot", src->eot, TOK_NONE, &tok->eot},
        {"eom", src->eom, TOK_NONE, &tok->eom},
        {"fim_pad", src->fim_pad, TOK_NONE, &tok->fim_pad},
        {"fim_rep", src->fim_rep, TOK_NONE, &tok->fim_rep},
        {"fim_sep", src->fim_sep, TOK_NONE, &tok->fim_sep},
    };
    int rc = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows && rc == 0; i++)
        rc = set_id(tok, rows[i].key, rows[i].id, rows[i].usual, rows[i].out);
    return rc;
}

static int set_attr(struct tok *tok, const struct tok_source *src)
{
    static const uint16_t attr_of[] = {
        0, TOK_ATTR_NORMAL, TOK_ATTR_UNKNOWN, TOK_ATTR_CONTROL, TOK_ATTR_USER, TOK_ATTR_UNUSED, TOK_ATTR_BYTE};
    for (int32_t id = 0; id < tok->n_vocab; id++) {
        int32_t type = src->types ? src->types[id] : TOK_TYPE_NORMAL;
        if (type < 0 || type > TOK_TYPE_BYTE)
            return err(ERR_FORMAT, "tokenizer.ggml.token_type[%d]: %d", (int)id, (int)type);
        tok->attr[id] = attr_of[type];
    }
    return 0;
}

static int copy_texts(struct tok *tok, const struct tok_source *src)
{
    size_t n = (size_t)tok->n_vocab;
    tok->text = mem_zalloc(n, sizeof *tok->text, MEM_TOK);
    tok->piece = mem_zalloc(n, sizeof *tok->piece, MEM_TOK);
    tok->attr = mem_zalloc(n, sizeof *tok->attr, MEM_TOK);
    tok->model = mem_strdup(src->model, MEM_TOK);
    tok->pre = mem_strdup(src->pre ? src->pre : "default", MEM_TOK);
    if (!tok->text || !tok->piece || !tok->attr || !tok->model || !tok->pre)
        return err(ERR_NOMEM, "tokenizer: %d tokens", (int)tok->n_vocab);
    int rc = tok_map_init(&tok->by_text, tok->n_vocab);
    for (int32_t id = 0; id < tok->n_vocab && rc == 0; id++) {
        rc = tok_map_keep(tok, src->tokens[id].p, src->tokens[id].n, &tok->text[id]);
        if (rc == 0 && tok->text[id].n) /* of tokens with one spelling the first is found; an empty one never */
            rc = tok_map_put(&tok->by_text, tok->arena, tok->text, id);
        if (rc == 0 && tok->text[id].n > tok->max_text_bytes)
            tok->max_text_bytes = tok->text[id].n;
    }
    return rc;
}

static int build(struct tok *tok, const struct tok_source *src)
{
    int rc = copy_texts(tok, src);
    if (rc == 0)
        rc = set_attr(tok, src);
    if (rc == 0)
        rc = set_ids(tok, src);
    if (rc == 0)
        rc = tok_special_init(tok, src->name);
    if (rc == 0)
        rc = tok->is_bpe ? tok_bpe_init(tok, src) : tok_spm_init(tok, src);
    if (rc)
        return rc;
    for (int32_t id = 0; id < tok->n_vocab; id++)
        if (tok->piece[id].n > tok->max_piece_bytes)
            tok->max_piece_bytes = tok->piece[id].n;
    if (tok->max_piece_bytes > INT32_MAX / 8)
        return err(ERR_LIMIT, "tokenizer.ggml.tokens: one of %u bytes", tok->max_piece_bytes);
    tok->add_bos = src->add_bos == TOK_UNSET ? (tok->is_bpe ? tok->split->add_bos : true) : src->add_bos != 0;
    tok->add_eos = src->add_eos == TOK_UNSET ? false : src->add_eos != 0;
    tok->add_space_prefix = src->add_space_prefix == TOK_UNSET ? !tok->is_bpe : src->add_space_prefix != 0;
    return 0;
}

int tok_make(const struct tok_source *src, struct tok **out)
{
    bool is_bpe = src->model && strcmp(src->model, "gpt2") == 0;
    if (!is_bpe && (!src->model || strcmp(src->model, "llama") != 0))
        return err(ERR_UNSUPPORTED, "tokenizer.ggml.model: '%.64s'; ferry knows 'llama' and 'gpt2'",
                   src->model ? src->model : "");
    int rc = check_counts(src);
    if (rc)
        return rc;
    struct tok *tok = mem_zalloc(1, sizeof *tok, MEM_TOK);
    if (!tok)
        return err(ERR_NOMEM, "tokenizer");
    tok->is_bpe = is_bpe;
    tok->n_vocab = (int32_t)src->n_tokens;
    rc = build(tok, src);
    if (rc)
        tok_free(tok);
    else
        *out = tok;
    return rc;
}

void tok_free(struct tok *tok)
{
    if (!tok)
        return;
    tok_split_done(tok);
    tok_map_done(&tok->by_text);
    tok_map_done(&tok->by_sym);
    mem_free(tok->pair);
    mem_free(tok->sym);
    mem_free(tok->score);
    mem_free(tok->special);
    mem_free(tok->attr);
    mem_free(tok->piece);
    mem_free(tok->text);
    mem_free(tok->arena);
    mem_free(tok->pre);
    mem_free(tok->model);
    mem_free(tok);
}

/* ---- GGUF ---- */

static int read_strings(const struct gguf *gguf, const char *key, struct tok_str **out, int64_t *n)
{
    struct gguf_array a = {.n = 0};
    int rc = gguf_opt_array(gguf, key, GGUF_WANT_STRING, &a);
    if (rc || a.n == 0)
        return rc;
    struct tok_str *s = mem_zalloc(a.n, sizeof *s, MEM_TOK);
    if (!s)
        return err(ERR_NOMEM, "%s: %llu strings", key, (unsigned long long)a.n);
    for (uint64_t i = 0; i < a.n; i++) {
        struct gguf_str g = gguf_at_str(&a, i);
        s[i] = (struct tok_str){.p = g.p, .n = g.n_bytes};
    }
    *out = s;
    *n = (int64_t)a.n;
    return 0;
}

static int read_scores(const struct gguf *gguf, float **out, int64_t *n)
{
    struct gguf_array a = {.n = 0};
    int rc = gguf_opt_array(gguf, "tokenizer.ggml.scores", GGUF_WANT_FLOAT, &a);
    if (rc || a.n == 0)
        return rc;
    *out = mem_zalloc(a.n, sizeof **out, MEM_TOK);
    if (!*out)
        return err(ERR_NOMEM, "tokenizer.ggml.scores: %llu", (unsigned long long)a.n);
    for (uint64_t i = 0; i < a.n; i++)
        (*out)[i] = (float)gguf_at_f64(&a, i);
    *n = (int64_t)a.n;
    return 0;
}

static int read_types(const struct gguf *gguf, int32_t **out, int64_t *n)
{
    struct gguf_array a = {.n = 0};
    int rc = gguf_opt_array(gguf, "tokenizer.ggml.token_type", GGUF_WANT_INT, &a);
    if (rc || a.n == 0)
        return rc;
    *out = mem_zalloc(a.n, sizeof **out, MEM_TOK);
    if (!*out)
        return err(ERR_NOMEM, "tokenizer.ggml.token_type: %llu", (unsigned long long)a.n);
    for (uint64_t i = 0; i < a.n; i++) {
        int64_t type = gguf_at_i64(&a, i);
        (*out)[i] = type < 0 || type > TOK_TYPE_BYTE ? -1 : (int32_t)type; /* -1: tok_make() refuses it */
    }
    *n = (int64_t)a.n;
    return 0;
}

static int read_id(const struct gguf *gguf, const char *key, int64_t *out)
{
    if (!gguf_find(gguf, key))
        return 0;
    int64_t id = 0;
    int rc = gguf_i64(gguf, key, &id);
    if (rc)
        return rc;
    if (id == UINT32_MAX || id == -1) /* how some writers say "none" */
        id = TOK_NONE;
    else if (id < 0)
        return err(ERR_FORMAT, "%s: %lld", key, (long long)id);
    *out = id;
    return 0;
}

static int read_flag(const struct gguf *gguf, const char *key, int *out)
{
    if (!gguf_find(gguf, key))
        return 0;
    bool flag = false;
    int rc = gguf_bool(gguf, key, &flag);
    *out = flag;
    return rc;
}

static int read_scalars(const struct gguf *gguf, struct tok_source *src)
{
    struct gguf_str model = {0}, pre = {0}, name = {0};
    int rc = gguf_str(gguf, "tokenizer.ggml.model", &model);
    if (rc == 0)
        rc = gguf_opt_str(gguf, "tokenizer.ggml.pre", &pre);
    if (rc == 0)
        rc = gguf_opt_str(gguf, "general.name", &name);
    if (rc)
        return rc;
    src->model = model.p;
    src->pre = pre.p && *pre.p ? pre.p : NULL;
    src->name = name.p;
    const struct {
        const char *key;
        int64_t *out;
    } ids[] = {
        {"tokenizer.ggml.bos_token_id", &src->bos},         {"tokenizer.ggml.eos_token_id", &src->eos},
        {"tokenizer.ggml.eot_token_id", &src->eot},         {"tokenizer.ggml.eom_token_id", &src->eom},
        {"tokenizer.ggml.unknown_token_id", &src->unk},     {"tokenizer.ggml.fim_pad_token_id", &src->fim_pad},
        {"tokenizer.ggml.fim_rep_token_id", &src->fim_rep}, {"tokenizer.ggml.fim_sep_token_id", &src->fim_sep},
    };
    for (size_t i = 0; i < sizeof ids / sizeof *ids && rc == 0; i++)
        rc = read_id(gguf, ids[i].key, ids[i].out);
    if (rc == 0)
        rc = read_flag(gguf, "tokenizer.ggml.add_bos_token", &src->add_bos);
    if (rc == 0)
        rc = read_flag(gguf, "tokenizer.ggml.add_eos_token", &src->add_eos);
    if (rc == 0)
        rc = read_flag(gguf, "tokenizer.ggml.add_space_prefix", &src->add_space_prefix);
    return rc;
}

int tok_from_gguf(const struct gguf *gguf, struct tok **out)
{
    struct tok_source src;
    struct tok_str *tokens = NULL, *merges = NULL;
    float *scores = NULL;
    int32_t *types = NULL;
    tok_source_init(&src);
    int rc = read_scalars(gguf, &src);
    if (rc == 0)
        rc = read_strings(gguf, "tokenizer.ggml.tokens", &tokens, &src.n_tokens);
    if (rc == 0)
        rc = read_strings(gguf, "tokenizer.ggml.merges", &merges, &src.n_merges);
    if (rc == 0)
        rc = read_scores(gguf, &scores, &src.n_scores);
    if (rc == 0)
        rc = read_types(gguf, &types, &src.n_types);
    src.tokens = tokens;
    src.merges = merges;
    src.scores = scores;
    src.types = types;
    if (rc == 0)
        rc = tok_make(&src, out);
    mem_free(types);
    mem_free(scores);
    mem_free(merges);
    mem_free(tokens);
    return rc;
}

/* ---- encoding ---- */

static int encode_frags(struct tok_work *work, const char *text, const struct tok_frag *frag, int64_t n_frags)
{
    const struct tok *tok = work->tok;
    bool after_special = true; /* also at the very beginning */
    int rc = 0;
    for (int64_t i = 0; i < n_frags && rc == 0; i++) {
        if (frag[i].id != TOK_NONE)
            rc = tok_work_id(work, frag[i].id);
        else if (tok->is_bpe)
            rc = tok_bpe_encode(work, text + frag[i].off, frag[i].n);
        else
            rc = tok_spm_encode(work, text + frag[i].off, frag[i].n, tok->add_space_prefix && after_special);
        after_special = frag[i].id != TOK_NONE;
    }
    return rc;
}

int tok_encode(const struct tok *tok, const char *text, size_t bytes, unsigned flags, int32_t **ids, int64_t *n)
{
    if (bytes > MAX_TEXT_BYTES)
        return err(ERR_LIMIT, "tokenizing: a text of %zu bytes, at most %zu", bytes, MAX_TEXT_BYTES);
    if ((flags & TOK_BOS && tok->bos == TOK_NONE) || (flags & TOK_EOS && tok->eos == TOK_NONE))
        return err(ERR_ARG, "this model has no %s token", flags & TOK_BOS && tok->bos == TOK_NONE ? "BOS" : "EOS");
    struct tok_work work = {.tok = tok};
    struct tok_frag *frag = NULL;
    int64_t n_frags = 0;
    int rc = flags & TOK_BOS ? tok_work_id(&work, tok->bos) : 0;
    if (rc == 0 && bytes)
        rc = tok_special_cut(&work, text, (uint32_t)bytes, flags, &frag, &n_frags);
    if (rc == 0)
        rc = encode_frags(&work, text, frag, n_frags);
    if (rc == 0 && flags & TOK_EOS)
        rc = tok_work_id(&work, tok->eos);
    if (rc == 0 && !work.ids) {
        work.ids = mem_alloc(sizeof *work.ids, MEM_TOK);
        if (!work.ids)
            rc = err(ERR_NOMEM, "tokenizing");
    }
    if (rc == 0) {
        *ids = work.ids;
        *n = work.n_ids;
        work.ids = NULL;
    }
    mem_free(frag);
    tok_work_done(&work);
    return rc;
}

/* ---- questions ---- */

static bool is_id(const struct tok *tok, int32_t id)
{
    return id >= 0 && id < tok->n_vocab;
}

static int give(const struct tok *tok, int32_t id, const struct tok_span *span, const char **bytes, int *n)
{
    if (!is_id(tok, id))
        return err(ERR_ARG, "token %d: there are %d", (int)id, (int)tok->n_vocab);
    *bytes = tok->arena + span[id].off;
    *n = (int)span[id].n;
    return 0;
}

int tok_piece(const struct tok *tok, int32_t id, const char **bytes, int *n)
{
    return give(tok, id, tok->piece, bytes, n);
}

int tok_text(const struct tok *tok, int32_t id, const char **bytes, int *n)
{
    return give(tok, id, tok->text, bytes, n);
}

int32_t tok_find(const struct tok *tok, const char *text, size_t bytes)
{
    return tok_map_get(&tok->by_text, tok->arena, tok->text, text, bytes);
}

int32_t tok_n_vocab(const struct tok *tok)
{
    return tok->n_vocab;
}

int32_t tok_bos(const struct tok *tok)
{
    return tok->bos;
}

int32_t tok_eos(const struct tok *tok)
{
    return tok->eos;
}

int32_t tok_eot(const struct tok *tok)
{
    return tok->eot;
}

int32_t tok_unk(const struct tok *tok)
{
    return tok->unk;
}

enum tok_type tok_type_of(const struct tok *tok, int32_t id)
{
    unsigned attr = is_id(tok, id) ? tok->attr[id] : 0;
    if (attr & TOK_ATTR_CONTROL)
        return TOK_TYPE_CONTROL;
    return attr & TOK_ATTR_USER      ? TOK_TYPE_USER
           : attr & TOK_ATTR_UNKNOWN ? TOK_TYPE_UNKNOWN
           : attr & TOK_ATTR_BYTE    ? TOK_TYPE_BYTE
           : attr & TOK_ATTR_UNUSED  ? TOK_TYPE_UNUSED
           : attr & TOK_ATTR_NORMAL  ? TOK_TYPE_NORMAL
                                     : TOK_TYPE_UNDEFINED;
}

bool tok_is_eog(const struct tok *tok, int32_t id)
{
    return is_id(tok, id) && tok->attr[id] & TOK_ATTR_EOG;
}

bool tok_add_bos(const struct tok *tok)
{
    return tok->add_bos && tok->bos != TOK_NONE;
}

bool tok_add_eos(const struct tok *tok)
{
    return tok->add_eos && tok->eos != TOK_NONE;
}

bool tok_add_space_prefix(const struct tok *tok)
{
    return tok->add_space_prefix;
}

const char *tok_model_name(const struct tok *tok)
{
    return tok->model;
}

const char *tok_pre_name(const struct tok *tok)
{
    return tok->pre;
}
