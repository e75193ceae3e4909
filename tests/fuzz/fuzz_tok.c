/* Any bytes as a vocabulary and a text. The first byte chooses the kind and the split; then come tokens, each with a byte of length,
 * a byte of type and score, its text, up to a length of 0; then merges, each with a byte of length, up to a 0; the rest is text.
 * What is promised: a tokenizer or an error; ids in range; a text that is valid UTF-8, the same at once and as a stream. */
#include "src/base/err.h"
#include "src/base/log.h"
#include "src/base/mem.h"
#include "src/model/tok.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { MAX = 256 };

struct input {
    const uint8_t *p;
    size_t n;
};

static unsigned byte(struct input *in)
{
    if (in->n == 0)
        return 0;
    in->n--;
    return *in->p++;
}

static struct tok_str text(struct input *in, size_t n)
{
    struct tok_str s = {(const char *)in->p, n < in->n ? n : in->n};
    in->p += s.n;
    in->n -= s.n;
    return s;
}

static void check_text(const struct tok *tok, const int32_t *ids, int64_t n)
{
    struct tok_stream s;
    char *whole = NULL;
    int64_t n_whole = 0, at = 0;
    const char *p;
    int len;

    if (tok_decode(tok, ids, n, TOK_SPECIAL, &whole, &n_whole) || tok_stream_init(&s, tok, TOK_SPECIAL))
        abort();
    for (int64_t i = 0; i <= n; i++) {
        if (i == n)
            tok_stream_finish(&s, &p, &len);
        else if (tok_stream_push(&s, ids[i], &p, &len))
            abort();
        if (len > n_whole - at || memcmp(whole + at, p, (size_t)len))
            abort();
        at += len;
    }
    if (at != n_whole)
        abort();
    tok_stream_done(&s);
    mem_free(whole);
}

static void check_encode(const struct tok *tok, const struct input *in, unsigned flags)
{
    int32_t *ids = NULL;
    int64_t n = 0;
    if (tok_encode(tok, (const char *)in->p, in->n, flags, &ids, &n) == 0) {
        for (int64_t i = 0; i < n; i++) {
            if (ids[i] < 0 || ids[i] >= tok_n_vocab(tok))
                abort();
        }
        check_text(tok, ids, n);
    } else if (!*err_text()) {
        abort();
    }
    mem_free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char *const pres[] = {
        "default", "gpt-2",        "smollm",         "falcon",      "llama-bpe",  "qwen2",      "qwen35",   "gpt-4o",
        "tekken",  "deepseek-llm", "deepseek-coder", "deepseek-v3", "bailingmoe", "seed-coder", "nonsense", NULL};
    static struct tok_str tokens[MAX], merges[MAX];
    static int32_t types[MAX];
    static float scores[MAX];
    struct input in = {data, n};
    struct tok_source src;
    struct tok *tok = NULL;
    uint64_t live = mem_live_bytes(MEM_TOK);
    unsigned kind = byte(&in), len;

    log_to(NULL, NULL, LOG_WARN);
    err_clear();
    tok_source_init(&src);
    src.model = kind & 128 ? "llama" : "gpt2";
    src.pre = pres[kind & 15];
    src.name = kind & 64 ? "Phi-3" : NULL;
    while (src.n_tokens < MAX && (len = byte(&in)) != 0) {
        unsigned how = byte(&in);
        types[src.n_tokens] = (int32_t)(how % 8);
        scores[src.n_tokens] = -(float)(how / 8);
        tokens[src.n_tokens++] = text(&in, len);
    }
    while (src.n_merges < MAX && (len = byte(&in)) != 0)
        merges[src.n_merges++] = text(&in, len);
    src.tokens = tokens;
    src.merges = merges;
    src.types = types;
    src.scores = scores;
    src.n_types = src.n_scores = src.n_tokens;
    src.bos = kind & 32 ? 0 : TOK_UNSET;
    if (tok_make(&src, &tok) == 0) {
        check_encode(tok, &in, 0);
        check_encode(tok, &in, TOK_SPECIAL);
        check_encode(tok, &in, TOK_SPECIAL | TOK_BOS | TOK_EOS);
    } else if (!*err_text()) {
        abort();
    }
    tok_free(tok);
    if (mem_live_bytes(MEM_TOK) != live)
        abort();
    return 0;
}
