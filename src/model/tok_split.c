/* How text is cut into words before byte-pair merging: one row per `tokenizer.ggml.pre`. The regexes are facts of the model
 * families, from the tokenizer.json of each; Unicode properties come from PCRE2. Two things differ from the letter of those
 * files: \s is spelled out as Unicode's White_Space (PCRE2's own \s also takes U+180E), and case-blind contractions are
 * spelled in ASCII, as llama.cpp does (else U+017F would count as s). Where llama.cpp only comes near to a model's regex the
 * model's counts: capitals beyond ASCII and combining marks for gpt-4o and tekken, U+3000 behind a space for deepseek-llm. */
#include "src/model/tok_in.h"

#include <string.h>

#include "src/base/err.h"
#include "src/base/log.h"

#define WS "\\t-\\r\\x{85}\\p{Z}" /* inside a class */
#define SPACE "[" WS "]"
#define NOT_SPACE "[^" WS "]"
#define NOT_WORD "[^" WS "\\p{L}\\p{N}]"
#define CONTRACTION "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
#define LINES SPACE "*[\\r\\n]+"
#define REST SPACE "+(?!" NOT_SPACE ")|" SPACE "+"

#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?" NOT_WORD "+|" REST
/* The shape of Llama 3 and all after it; digits: how many stay together. */
#define LLAMA3(digits) \
    "(?:" CONTRACTION ")|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits "| ?" NOT_WORD "+[\\r\\n]*|" LINES "|" REST
/* Words also break where capitals follow small letters. */
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CASED(contraction, digits)                                                                                     \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" contraction "|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*" contraction \
    "|" digits "| ?" NOT_WORD "+[\\r\\n/]*|" LINES "|" REST
/* The same, but for Chinese letters, which have no case, and stay together. */
#define BUT_HAN(set) "(?:(?!\\p{sc:Han})" set ")"
#define UPPER_BUT_HAN BUT_HAN(UPPER)
#define LOWER_BUT_HAN BUT_HAN(LOWER)
/* Chinese, and what DeepSeek's first tokenizers took along with it. */
#define CJK_WIDE "[\\x{4e00}-\\x{9fa5}\\x{800}-\\x{4e00}\\x{ac00}-\\x{d7ff}]+"
/* Letters with case, as DeepSeek LLM lists them (an older Unicode's; newer letters are not in it). */
/* Outside clang-format, which counts these letters as bytes. */
/* clang-format off */
#define DEEPSEEK_LETTER \
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-" \
    "" \
    "ἕ" \
    "Ἐ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭ" \
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-" \
    "" \
    "𐓓" \
    "𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
/* clang-format on */

static const struct tok_split split_default = {
    .regex = {"[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"},
};
static const struct tok_split split_gpt2 = {.regex = {GPT2}};
static const struct tok_split split_digits_gpt2 = {.regex = {"\\p{N}", GPT2}};
static const struct tok_split split_falcon = {.regex = {"[\\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"}};
static const struct tok_split split_llama3 = {.regex = {LLAMA3("\\p{N}{1,3}")}, .whole_words = true, .add_bos = true};
static const struct tok_split split_llama3_merged = {.regex = {LLAMA3("\\p{N}{1,3}")}};
static const struct tok_split split_llama3_whole = {.regex = {LLAMA3("\\p{N}{1,3}")}, .whole_words = true};
static const struct tok_split split_qwen2 = {.regex = {LLAMA3("\\p{N}")}};
static const struct tok_split split_qwen35 = {
    .regex = {"(?:" CONTRACTION ")|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^" WS
              "\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" LINES "|" REST},
};
static const struct tok_split split_gpt4o = {.regex = {CASED("(?:" CONTRACTION ")?", "\\p{N}{1,3}")}};
static const struct tok_split split_kimi = {
    .regex = {"\\p{sc:Han}+|[^\\r\\n\\p{L}\\p{N}]?" UPPER_BUT_HAN "*" LOWER_BUT_HAN "+(?:" CONTRACTION
              ")?|[^\\r\\n\\p{L}\\p{N}]?" UPPER_BUT_HAN "+" LOWER_BUT_HAN "*(?:" CONTRACTION
              ")?|\\p{N}{1,3}| ?" NOT_WORD "+[\\r\\n]*|" LINES "|" REST},
};
static const struct tok_split split_tekken = {.regex = {CASED("", "\\p{N}")}, .whole_words = true, .add_bos = true};
static const struct tok_split split_deepseek_llm = {
    /* (?<!space) keeps the fifth from looking at every start inside a long run of spaces */
    .regex = {"[\r\n]", SPACE "?[" DEEPSEEK_LETTER "]+",
              SPACE "?[!-/:-~\\x{ff01}-\\x{ff0f}\\x{ff1a}-\\x{ff5e}\\x{2018}-\\x{201f}\\x{3000}-\\x{3002}]+",
              "(?<!" SPACE ")" SPACE "++\\z", CJK_WIDE, "\\p{N}+"},
};
static const struct tok_split split_deepseek_coder = {
    .regex = {"[\r\n]", SPACE "?\\p{L}+", SPACE "?\\p{P}+", CJK_WIDE, "\\p{N}"},
};
static const struct tok_split split_deepseek3 = {
    .regex = {"\\p{N}{1,3}", "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{309f}\\x{30a0}-\\x{30ff}]+",
              "[!-/:-@\\[-`{-~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|" LINES
              "|" REST},
};
static const struct tok_split split_bailing = {
    .regex = {"(?:" CONTRACTION ")|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?" NOT_WORD "+[\\r\\n]*|" SPACE
              "*[\\r\\n]|" REST},
};
static const struct tok_split split_seed = {
    .regex = {"(?:" CONTRACTION ")|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^" WS "\\p{L}\\p{N}\\r\\n]+|" LINES
              "|" REST},
};

/* Names that are only used by embedding models, which want a separator token behind the text, are left out on purpose. */
static const struct {
    const char *pre;
    const struct tok_split *split;
} rows[] = {
    {"default", &split_default},
    {"gpt-2", &split_gpt2},
    {"mpt", &split_gpt2},
    {"phi-2", &split_gpt2},
    {"olmo", &split_gpt2},
    {"jais", &split_gpt2},
    {"gigachat", &split_gpt2},
    {"mellum", &split_gpt2},
    {"a.x-4.0", &split_gpt2},
    {"exaone4", &split_gpt2},
    {"trillion", &split_gpt2},
    {"granite-docling", &split_gpt2},
    {"smollm", &split_digits_gpt2},
    {"starcoder", &split_digits_gpt2},
    {"refact", &split_digits_gpt2},
    {"command-r", &split_digits_gpt2},
    {"codeshell", &split_digits_gpt2},
    {"exaone", &split_digits_gpt2},
    {"minerva-7b", &split_digits_gpt2},
    {"mellum2", &split_digits_gpt2},
    {"falcon", &split_falcon},
    {"llama-bpe", &split_llama3},
    {"llama3", &split_llama3},
    {"llama-v3", &split_llama3},
    {"falcon3", &split_llama3},
    {"falcon-h1", &split_llama3},
    {"pixtral", &split_llama3},
    {"midm-2.0", &split_llama3},
    {"lfm2", &split_llama3},
    {"dbrx", &split_llama3_merged},
    {"smaug-bpe", &split_llama3_merged},
    {"chatglm-bpe", &split_llama3_merged},
    {"glm4", &split_llama3_whole},
    {"glm5", &split_llama3_whole},
    {"qwen2", &split_qwen2},
    {"deepseek-r1-qwen", &split_qwen2},
    {"megrez", &split_qwen2},
    {"kormo", &split_qwen2},
    {"hunyuan", &split_qwen2},
    {"stablelm2", &split_qwen2},
    {"solar-open", &split_qwen2},
    {"grok-2", &split_qwen2},
    {"qwen35", &split_qwen35},
    {"gpt-4o", &split_gpt4o},
    {"llama4", &split_gpt4o},
    {"kanana2", &split_gpt4o},
    {"minimax-m2", &split_gpt4o},
    {"tekken", &split_tekken},
    {"kimi-k2", &split_kimi},
    {"deepseek-llm", &split_deepseek_llm},
    {"deepseek-coder", &split_deepseek_coder},
    {"deepseek-v3", &split_deepseek3},
    {"hunyuan-dense", &split_deepseek3},
    {"joyai-llm", &split_deepseek3},
    {"bailingmoe", &split_bailing},
    {"bailingmoe2", &split_bailing},
    {"llada-moe", &split_bailing},
    {"seed-coder", &split_seed},
};

static void *re_alloc(size_t bytes, void *arg)
{
    (void)arg;
    return mem_alloc(bytes, MEM_TOK);
}

static void re_free(void *p, void *arg)
{
    (void)arg;
    mem_free(p);
}

static int compile(struct tok *tok, const char *regex)
{
    int code;
    size_t at;
    pcre2_compile_context *ctx = pcre2_compile_context_create(tok->re_mem);
    if (!ctx)
        return err(ERR_NOMEM, "tokenizer: regex");
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)regex, PCRE2_ZERO_TERMINATED,
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_NO_AUTO_CAPTURE, &code, &at, ctx);
    pcre2_compile_context_free(ctx);
    if (!re && code == PCRE2_ERROR_HEAP_FAILED)
        return err(ERR_NOMEM, "tokenizer: regex");
    if (!re) {
        char msg[128];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)msg, sizeof msg);
        return err(ERR_UNSUPPORTED, "tokenizer.ggml.pre: this PCRE2 refuses its regex at %zu: %s", at, msg);
    }
    tok->re[tok->n_re++] = re;
    /* where there is no JIT the interpreter gives the same matches */
    return pcre2_jit_compile(re, PCRE2_JIT_COMPLETE) == PCRE2_ERROR_NOMEMORY ? err(ERR_NOMEM, "tokenizer: regex") : 0;
}

int tok_split_init(struct tok *tok, const char *pre)
{
    if (!pre) {
        log_warn("tokenizer.ggml.pre is missing: text is split the 'default' way, which may not be what the model was "
                 "trained on");
        pre = "default";
    }
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (strcmp(pre, rows[i].pre) == 0)
            tok->split = rows[i].split;
    if (!tok->split)
        return err(ERR_UNSUPPORTED, "tokenizer.ggml.pre: unknown pre-tokenizer '%.64s'", pre);
    tok->re_mem = pcre2_general_context_create(re_alloc, re_free, NULL);
    tok->re_match = tok->re_mem ? pcre2_match_context_create(tok->re_mem) : NULL;
    if (!tok->re_match)
        return err(ERR_NOMEM, "tokenizer: regex");
    /* None of the regexes backtracks more than once over what it read, so a limit would only hit honest long inputs. */
    pcre2_set_match_limit(tok->re_match, UINT32_MAX);
    int rc = 0;
    for (int i = 0; i < TOK_MAX_REGEX && tok->split->regex[i] && rc == 0; i++)
        rc = compile(tok, tok->split->regex[i]);
    return rc;
}

void tok_split_done(struct tok *tok)
{
    for (int i = 0; i < tok->n_re; i++)
        pcre2_code_free(tok->re[i]);
    tok->n_re = 0;
    pcre2_match_context_free(tok->re_match);
    pcre2_general_context_free(tok->re_mem);
    tok->re_match = NULL;
    tok->re_mem = NULL;
}

static int cut(struct tok_work *work, int level, const char *p, size_t n, tok_split_word *word)
{
    const struct tok *tok = work->tok;
    if (level == tok->n_re)
        return word(work, p, n);
    size_t done = 0;
    int rc = 0;
    while (done < n && rc == 0) {
        int found = pcre2_match(tok->re[level], (PCRE2_SPTR)p, n, done, PCRE2_NO_UTF_CHECK, work->match, tok->re_match);
        if (found == PCRE2_ERROR_NOMATCH)
            break;
        if (found == PCRE2_ERROR_NOMEMORY || found == PCRE2_ERROR_HEAPLIMIT)
            return err(ERR_NOMEM, "tokenizing: splitting %zu bytes", n);
        if (found < 0)
            return err(ERR_LIMIT, "tokenizing: splitting %zu bytes failed with PCRE2 error %d", n, found);
        const size_t *ends = pcre2_get_ovector_pointer(work->match);
        size_t from = ends[0], to = ends[1]; /* copies: the next level overwrites them */
        if (from > done)
            rc = cut(work, level + 1, p + done, from - done, word);
        if (rc == 0)
            rc = cut(work, level + 1, p + from, to - from, word);
        done = to;
    }
    if (rc == 0 && done < n)
        rc = cut(work, level + 1, p + done, n - done, word);
    return rc;
}

int tok_split_run(struct tok_work *work, const char *text, size_t n, tok_split_word *word)
{
    if (!work->match) {
        work->match = pcre2_match_data_create(1, work->tok->re_mem);
        if (!work->match)
            return err(ERR_NOMEM, "tokenizing: regex");
    }
    return cut(work, 0, text, n, word);
}
