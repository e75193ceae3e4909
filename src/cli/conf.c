/* The table of options and the reader of argv and environment. What an option does is the subcommands' business. */
#include "src/cli/conf.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define AT(field) offsetof(struct conf, field)
#define TALKERS "chat run"
#define DRAWERS TALKERS " batch"
#define ENGINES DRAWERS " eval bench"

/* An option of two subcommands with two meanings is two rows. Order is that of the help. */
const struct conf_option conf_options[] = {
    {"prompt", 'p', CONF_TEXT, "run", AT(prompt), 0, "TEXT", NULL, NULL, NULL, 0, 0, "the prompt"},
    {"file", 'f', CONF_FILE, "run", AT(file), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "read the prompt from a file; - is stdin"},
    {"raw", 0, CONF_FLAG, "run", AT(raw), 0, NULL, NULL, NULL, NULL, 0, 0,
     "continue the text as it is, without the chat template; control tokens in it stay text"},
    {"template-var", 0, CONF_VAR, DRAWERS, AT(vars), 0, "NAME=VALUE", NULL, NULL, NULL, 0, 0,
     "a variable that the model's chat template reads, as enable_thinking=false or reasoning_effort=low; may be given "
     "again"},
    {"system", 0, CONF_TEXT, TALKERS, AT(system), 0, "TEXT", NULL, NULL, NULL, 0, 0, "a system message in front"},
    {"input", 'i', CONF_FILE, "batch", AT(input), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "one request of JSON a line; - is stdin"},
    {"output", 'o', CONF_FILE, "batch", AT(output), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "one record a line; FILE.ferry beside it keeps what a resumed run has to know"},
    {"order", 0, CONF_CHOICE, "batch", AT(order), 0, "ORDER", "finished", "finished", "finished|input", 0, 0,
     "of the records: as they are finished, or as the requests stand in the input"},
    {"sequences", 's', CONF_COUNT, "batch", AT(n_sequences), 0, "N", "the plan's choice", NULL, NULL, 1, 4096,
     "most requests that are answered together"},
    {"explain", 0, CONF_FLAG, "batch", AT(explain), 0, NULL, NULL, NULL, NULL, 0, 0,
     "only show how the number of sequences is chosen: memory, what a step reads, predicted speed"},
    {"score", 0, CONF_FLAG, "batch", AT(score), 0, NULL, NULL, NULL, NULL, 0, 0,
     "do not answer: log-probabilities of the \"completion\" that each request gives"},
    {"embed", 0, CONF_CHOICE, "batch", AT(embed), 0, "POOLING", NULL, NULL, "mean|last", 0, 0,
     "do not answer: one vector for each \"input\", from the hidden states behind the final norm: the mean over all "
     "tokens, or "
     "the last token's"},
    {"normalize", 0, CONF_CHOICE, "batch", AT(normalize), 0, "HOW", "l2", "l2", "l2|none", 0, 0,
     "vectors of --embed have Euclidean length 1, as embedding services give them, or are left as they are"},
    {"spill", 0, CONF_FILE, "batch", AT(spill), 0, "FOLDER", NULL, NULL, NULL, 0, 0,
     "keep KV pages of requests that have to wait for memory there, where that is faster than computing them again"},
    {"restart", 0, CONF_FLAG, "batch", AT(restart), 0, NULL, NULL, NULL, NULL, 0, 0,
     "forget an earlier run: the output is overwritten"},
    {"accept-changes", 0, CONF_FLAG, "batch", AT(accept_changes), 0, NULL, NULL, NULL, NULL, 0, 0,
     "go on though input, model or options are not those that the output was begun with"},
    {"max-tokens", 'n', CONF_COUNT, DRAWERS, AT(n_tokens), 0, "N", "until the model ends", NULL, NULL, 1, INT32_MAX,
     "most tokens of an answer"},
    {"grammar", 0, CONF_FILE, DRAWERS, AT(grammar), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "answers are sentences of this grammar (GBNF, as llama.cpp's files); what is thought before them is free"},
    {"json-schema", 0, CONF_FILE, DRAWERS, AT(json_schema), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "answers are JSON that this JSON Schema holds of; a keyword that is not supported is an error"},

    {"tokens", 0, CONF_TEXT, "eval", AT(tokens), 0, "IDS", NULL, NULL, NULL, 0, 0,
     "these token ids, a comma between them, or @FILE; nothing is added to them"},
    {"logits", 0, CONF_FILE, "eval", AT(logits), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "write float32 logits, (ids, vocabulary) row after row"},
    {"prefill", 0, CONF_COUNT, "eval", AT(n_prefill), AT(has_n_prefill), "N", "all", NULL, NULL, 1, INT32_MAX,
     "run the first N ids as a prompt and the others one by one"},
    {"text", 0, CONF_FILE, "eval", AT(text), 0, "FILE", NULL, NULL, NULL, 0, 0, "perplexity of this text; - is stdin"},

    {"prompt", 'p', CONF_COUNT, "bench", AT(bench_prompt), 0, "N", "512", "512", NULL, 0, INT32_MAX,
     "tokens of the prefill test; 0: none"},
    {"generate", 'n', CONF_COUNT, "bench", AT(bench_generate), 0, "N", "128", "128", NULL, 0, INT32_MAX,
     "tokens of the decode test; 0: none"},
    {"sequences", 's', CONF_COUNT, "bench", AT(n_sequences), 0, "N", "a session", NULL, NULL, 1, 4096,
     "so many sequences at once, as a batch runs them; tokens/s are of all together"},
    {"depth", 'd', CONF_COUNT, "bench", AT(bench_depth), 0, "N", "0", "0", NULL, 0, INT32_MAX,
     "tokens that the session holds before each test begins"},
    {"reps", 'r', CONF_COUNT, "bench", AT(n_reps), 0, "N", "5", "5", NULL, 1, 1000,
     "repetitions counted, after one that warms up"},

    {"decode", 0, CONF_FLAG, "tokenize", AT(decode), 0, NULL, NULL, NULL, NULL, 0, 0,
     "the way back: a JSON array of ids on stdin, text on stdout"},
    {"special", 0, CONF_FLAG, "tokenize", AT(special), 0, NULL, NULL, NULL, NULL, 0, 0,
     "text that spells a control token becomes that token; decoding writes them out"},
    {"bos", 0, CONF_FLAG, "tokenize", AT(bos), 0, NULL, NULL, NULL, NULL, 0, 0, "put the begin-of-text token first"},

    {"tensors", 0, CONF_FLAG, "info", AT(tensors), 0, NULL, NULL, NULL, NULL, 0, 0, "list every tensor"},

    {"imatrix", 0, CONF_FILE, "quantize", AT(imatrix), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "importance of columns, as llama-imatrix measures it: GGUF or .dat"},
    {"split", 0, CONF_SIZE, "quantize", AT(split_bytes), 0, "SIZE", "one file", NULL, NULL, 0, 0,
     "write parts of at most this size: NAME-00001-of-0000N.gguf"},
    {"pure", 0, CONF_FLAG, "quantize", AT(pure), 0, NULL, NULL, NULL, NULL, 0, 0,
     "the same type for all matrices, no mixture"},
    {"dry-run", 0, CONF_FLAG, "quantize", AT(dry_run), 0, NULL, NULL, NULL, NULL, 0, 0,
     "only say how large it would be; without TYPE: for every type"},
    {"verbose", 'v', CONF_FLAG, "quantize", AT(verbose), 0, NULL, NULL, NULL, NULL, 0, 0,
     "list what every tensor becomes"},

    {"ram", 0, CONF_SIZE, ENGINES " plan", AT(ram_bytes), 0, "SIZE", "what is free, less a margin", NULL, NULL, 0, 0,
     "all memory that ferry may use: 512M, 8G, 1.5GiB"},
    {"expert-ram", 0, CONF_SIZE, ENGINES " plan", AT(expert_ram_bytes), 0, "SIZE", "all, or what --ram leaves", NULL,
     NULL, 0, 0, "most memory for experts; the others are read from the file when they are wanted"},
    {"ctx", 0, CONF_COUNT, ENGINES " plan", AT(n_ctx), 0, "N", "the model's, at most 8192", NULL, NULL, 1, INT32_MAX,
     "positions that a session can hold"},
    {"threads", 0, CONF_COUNT, ENGINES " plan quantize", AT(n_threads), 0, "N", "all cores allowed", NULL, NULL, 1,
     1024, "threads that compute"},
    {"kv-type", 0, CONF_CHOICE, ENGINES " plan", AT(kv_type), 0, "TYPE", "f16", NULL, "f16|q8_0", 0, 0,
     "type of the key and value cache"},
    {"plan", 0, CONF_FILE, ENGINES, AT(plan), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "run this saved plan; --ram, --ctx and what else it settles are then its own"},
    {"io", 0, CONF_CHOICE, ENGINES " plan", AT(io), 0, "HOW", "auto", NULL, "auto|uring|pread|mmap", 0, 0,
     "how weights are read"},
    {"prefill", 0, CONF_CHOICE, "chat run batch bench plan", AT(prefill), 0, "HOW", "int", NULL, "int|blas", 0, 0,
     "how quantized prompt rows are multiplied: integer dots, or OpenBLAS (rounds differently)"},
    {"prefill-by", 0, CONF_CHOICE, "eval", AT(prefill), 0, "HOW", "int", NULL, "int|blas", 0, 0,
     "what --prefill is to the other subcommands: how quantized prompt rows are multiplied"},
    {"chunk", 0, CONF_COUNT, ENGINES " plan", AT(chunk_tok), 0, "N", "the plan's choice", NULL, NULL, 1, 65536,
     "prompt tokens a step"},
    {"isa", 0, CONF_TEXT, ENGINES " plan", AT(isa), 0, "NAME", "the best there is", NULL, NULL, 0, 0,
     "kernels to use, by instruction set: avx512vnni, avx512, avx2, ref"},
    {"device", 0, CONF_TEXT, ENGINES " plan", AT(device), 0, "NAME", "cpu", NULL, NULL, 0, 0,
     "who computes: cpu, cuda:N (GPU N all but the experts, or the first layers, that do not fit it; where ferry was "
     "built with CUDA), or "
     "auto "
     "(cuda:0 if it is there)"},
    {"vram", 0, CONF_SIZE, ENGINES, AT(vram_bytes), 0, "SIZE", "what is free, less a margin", NULL, NULL, 0, 0,
     "with --device cuda:N, memory of that GPU that ferry may use"},
    {"gpu-copies", 0, CONF_CHOICE, ENGINES " plan", AT(gpu_copies), 0, "WHEN", "auto", NULL, "auto|never|always", 0, 0,
     "experts that are not on the GPU are copied there for a step: when that is sooner than computing them on the CPU, "
     "never, or always"},
    {"no-pin", 0, CONF_FLAG, ENGINES " plan", AT(no_pin), 0, NULL, NULL, NULL, NULL, 0, 0,
     "leave threads where the system puts them"},

    {"temp", 0, CONF_REAL, DRAWERS, AT(temperature), 0, "T", "0.8", "0.8", NULL, 0, 100,
     "temperature; 0 takes the likeliest token each time"},
    {"top-k", 0, CONF_INT, DRAWERS, AT(top_k), 0, "N", "40", "40", NULL, 0, INT32_MAX,
     "draw from the N likeliest; 0: off"},
    {"top-p", 0, CONF_REAL, DRAWERS, AT(top_p), 0, "P", "0.95", "0.95", NULL, 0, 1,
     "draw from the fewest whose probabilities reach P; 1: off"},
    {"min-p", 0, CONF_REAL, DRAWERS, AT(min_p), 0, "P", "0.05", "0.05", NULL, 0, 1,
     "drop what is less likely than P times the likeliest; 0: off"},
    {"repeat-penalty", 0, CONF_REAL, DRAWERS, AT(repeat_penalty), 0, "F", "1", "1", NULL, 0.01, 100,
     "make tokens seen lately less likely by this factor; 1: off"},
    {"presence-penalty", 0, CONF_REAL, DRAWERS, AT(presence_penalty), 0, "F", "0", "0", NULL, -100, 100,
     "take F off the logit of each token seen lately"},
    {"frequency-penalty", 0, CONF_REAL, DRAWERS, AT(frequency_penalty), 0, "F", "0", "0", NULL, -100, 100,
     "take F off for every time that it was seen lately"},
    {"penalty-window", 0, CONF_INT, DRAWERS, AT(penalty_window), 0, "N", "64", "64", NULL, -1, INT32_MAX,
     "tokens that count as lately; -1: all"},
    {"seed", 0, CONF_SEED, DRAWERS " bench", AT(seed), AT(has_seed), "S", "another each time; batch, bench: 0", NULL,
     NULL, 0, 0, "of the random draws: same seed, same text"},

    {"mem-rate", 0, CONF_RATE, "plan", AT(mem_bytes_per_s), 0, "RATE", "as ferry probe saved it", NULL, NULL, 0, 0,
     "memory read by all cores: 60G/s"},
    {"disk", 0, CONF_RATE, "plan", AT(disk_bytes_per_s), 0, "RATE", "as ferry probe saved it", NULL, NULL, 0, 0,
     "rate of the model's disk: 3.5G/s"},
    {"cores", 0, CONF_COUNT, "plan", AT(n_cores), 0, "N", "this machine's", NULL, NULL, 1, 1024,
     "cores of the machine"},
    {"vram", 0, CONF_SIZE, "plan", AT(vram_bytes), 0, "SIZE", "no GPU", NULL, NULL, 0, 0,
     "with --device cuda:N as there; alone, memory of a GPU that is described: what it would hold, and how fast that "
     "might be"},
    {"gpu-rate", 0, CONF_RATE, "plan", AT(gpu_bytes_per_s), 0, "RATE", "as ferry probe saved it", NULL, NULL, 0, 0,
     "the GPU's memory: 256G/s"},
    {"pcie", 0, CONF_RATE, "plan", AT(pcie_bytes_per_s), 0, "RATE", "as ferry probe saved it", NULL, NULL, 0, 0,
     "the way to it: 12G/s"},
    {"device", 0, CONF_TEXT, "probe", AT(device), 0, "NAME", "auto", NULL, NULL, 0, 0,
     "the GPU to measure: cuda:N, auto (cuda:0 if it is there), cpu (none)"},
    {"gpu-rate", 0, CONF_RATE, "probe", AT(gpu_bytes_per_s), 0, "RATE", "as measured, or saved before", NULL, NULL, 0,
     0, "what the memory of a GPU gives that is not here: 256G/s"},
    {"pcie", 0, CONF_RATE, "probe", AT(pcie_bytes_per_s), 0, "RATE", "as measured, or saved before", NULL, NULL, 0, 0,
     "what the way to it gives: 12G/s"},
    {"skew", 0, CONF_REAL, "plan", AT(skew), 0, "S", "0", "0", NULL, 0, 4,
     "how far the router has favourites (as tools/make-synthetic --router-skew); 0: none, the most is read"},
    {"explain", 0, CONF_FLAG, "plan", AT(explain), 0, NULL, NULL, NULL, NULL, 0, 0,
     "other plans too, and why they lost"},
    {"save", 0, CONF_FILE, "plan", AT(save), 0, "FILE", NULL, NULL, NULL, 0, 0, "write the plan as JSON"},

    {"stats", 0, CONF_FLAG, TALKERS, AT(stats), 0, NULL, NULL, NULL, NULL, 0, 0,
     "what each answer took and what moved where, on stderr"},
    {"trace", 0, CONF_FILE, TALKERS " bench", AT(trace), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "write a timeline of the last steps, for Perfetto or tools/plot-trace; takes 10 MiB of --ram"},
    {"trace-experts", 0, CONF_FILE, TALKERS " bench", AT(trace_experts), 0, "FILE", NULL, NULL, NULL, 0, 0,
     "write which experts each step wanted, for tools/replay; takes 16 MiB of --ram"},
    {"json", 0, CONF_FLAG, "run info eval bench plan probe quantize", AT(json), 0, NULL, NULL, NULL, NULL, 0, 0,
     "the report as JSON on stdout"},
    {"json", 0, CONF_FLAG, "batch", AT(json), 0, NULL, NULL, NULL, NULL, 0, 0,
     "progress as JSON on stderr, an object a second; full_steps: steps in which all --sequences answers go on, as the "
     "plan predicts and as measured"},
    {"quiet", 'q', CONF_FLAG, ENGINES " probe quantize", AT(quiet), 0, NULL, NULL, NULL, NULL, 0, 0,
     "no progress and no statistics on stderr"},
    {NULL, 0, CONF_FLAG, NULL, 0, 0, NULL, NULL, NULL, NULL, 0, 0, NULL},
};

bool conf_takes(const struct conf_option *option, const char *command)
{
    size_t n = strlen(command);

    for (const char *p = option->commands; *p;) {
        size_t len = strcspn(p, " ");
        if (len == n && !memcmp(p, command, n))
            return true;
        p += len;
        p += strspn(p, " ");
    }
    return false;
}

/* ---- values ---- */

static bool is_number_end(const char *text, const char *end)
{
    return end != text && !*end && errno == 0;
}

int conf_rate(const char *text, double *out_bytes_per_s)
{
    static const char units[] = "KMGT";
    char *end;

    errno = 0;
    double x = strtod(text, &end);
    bool digits = (*text >= '0' && *text <= '9') || *text == '.';
    if (end == text || !digits)
        return err(ERR_ARG, "\"%s\" is not a rate; write for example 60G/s or 900M/s", text);
    for (int i = 0; units[i]; i++) {
        if ((*end & ~0x20) != units[i])
            continue;
        end++;
        double base = *end == 'i' ? 1024 : 1000;
        end += *end == 'i';
        for (int k = 0; k <= i; k++)
            x *= base;
        break;
    }
    end += *end == 'B' || *end == 'b';
    if (!strcmp(end, "/s"))
        end += 2;
    if (*end)
        return err(ERR_ARG, "the rate \"%s\" ends in \"%s\"; units are K, M, G and T bytes a second", text, end);
    if (!isfinite(x) || x <= 0)
        return err(ERR_ARG, "the rate \"%s\" has to be above zero and finite", text);
    *out_bytes_per_s = x;
    return 0;
}

static int read_integer(const struct conf_option *o, const char *text, int64_t *out)
{
    char *end;

    errno = 0;
    long long x = strtoll(text, &end, 10);
    if (!is_number_end(text, end))
        return err(ERR_ARG, "--%s: \"%s\" is not a whole number", o->name, text);
    if ((double)x < o->min || (double)x > o->max)
        return err(ERR_ARG, "--%s: %lld is outside %.0f to %.0f", o->name, x, o->min, o->max);
    *out = x;
    return 0;
}

static int read_real(const struct conf_option *o, const char *text, double *out)
{
    char *end;

    errno = 0;
    double x = strtod(text, &end);
    if (!is_number_end(text, end) || !isfinite(x))
        return err(ERR_ARG, "--%s: \"%s\" is not a number", o->name, text);
    if (x < o->min || x > o->max)
        return err(ERR_ARG, "--%s: %g is outside %g to %g", o->name, x, o->min, o->max);
    *out = x;
    return 0;
}

static int read_seed(const struct conf_option *o, const char *text, uint64_t *out)
{
    char *end;

    errno = 0;
    unsigned long long x = strtoull(text, &end, 0);
    if (!is_number_end(text, end) || *text < '0' || *text > '9')
        return err(ERR_ARG, "--%s: \"%s\" is not a whole number from 0 to 2^64 - 1", o->name, text);
    *out = x;
    return 0;
}

static int read_choice(const struct conf_option *o, const char *text, const char **out)
{
    size_t n = strlen(text);

    for (const char *p = o->choices; *p;) {
        size_t len = strcspn(p, "|");
        if (len == n && !memcmp(p, text, n)) {
            *out = text;
            return 0;
        }
        p += len;
        p += *p == '|';
    }
    return err(ERR_ARG, "--%s: \"%s\" is none of %s", o->name, text, o->choices);
}

static int named(int rc, const struct conf_option *o)
{
    return rc ? err(rc, "--%s: %s", o->name, err_text()) : 0;
}

static int set_value(struct conf *c, const struct conf_option *o, const char *text)
{
    void *field = (char *)c + o->offset;
    int64_t x;
    int rc = 0;

    switch (o->kind) {
    case CONF_FLAG:
        *(bool *)field = true;
        break;
    case CONF_COUNT:
        rc = read_integer(o, text, &x);
        if (!rc)
            *(uint32_t *)field = (uint32_t)x;
        break;
    case CONF_INT:
        rc = read_integer(o, text, field);
        break;
    case CONF_SEED:
        rc = read_seed(o, text, field);
        break;
    case CONF_REAL:
        rc = read_real(o, text, field);
        break;
    case CONF_SIZE:
        rc = named(size_parse(text, field), o);
        break;
    case CONF_RATE:
        rc = named(conf_rate(text, field), o);
        break;
    case CONF_TEXT:
    case CONF_FILE:
        *(const char **)field = text;
        break;
    case CONF_CHOICE:
        rc = read_choice(o, text, field);
        break;
    case CONF_VAR:
        rc = named(vars_read(field, text), o);
        break;
    }
    if (!rc && o->given_offset)
        *(bool *)((char *)c + o->given_offset) = true;
    return rc;
}

/* Presets stand for what the user did not write: they count as not given. */
static int set_presets(struct conf *c, const char *command)
{
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (!o->preset || !conf_takes(o, command))
            continue;
        int rc = set_value(c, o, o->preset);
        if (rc)
            return rc;
        if (o->given_offset)
            *(bool *)((char *)c + o->given_offset) = false;
    }
    return 0;
}

/* ---- words ---- */

/* Slips between two words: letters left out, added, changed or swapped with their neighbour. Longer words match nothing. */
static size_t distance(const char *a, const char *b)
{
    enum { MAX = 40 };
    size_t rows[3][MAX + 1], n = strlen(b);
    size_t *older = rows[0], *last = rows[1], *row = rows[2];

    if (n > MAX || strlen(a) > MAX)
        return MAX;
    for (size_t j = 0; j <= n; j++)
        last[j] = j;
    for (size_t i = 1; a[i - 1]; i++) {
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            size_t best = last[j - 1] + (a[i - 1] != b[j - 1]);
            if (last[j] + 1 < best)
                best = last[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && older[j - 2] + 1 < best)
                best = older[j - 2] + 1;
            row[j] = best;
        }
        size_t *free_row = older;
        older = last;
        last = row;
        row = free_row;
    }
    return last[n];
}

/* Two slips in a word are still that word; short words must share more than half. */
static bool is_near(const char *word, size_t d)
{
    return d <= 2 && d < (strlen(word) + 1) / 2;
}

static int unknown_option(const struct conf_command *command, const char *word, const char *name)
{
    const struct conf_option *best = NULL;
    size_t best_d = SIZE_MAX;

    for (const struct conf_option *o = conf_options; o->name; o++) {
        size_t d = distance(name, o->name);
        if (conf_takes(o, command->name) && d < best_d) {
            best = o;
            best_d = d;
        }
    }
    if (best && is_near(name, best_d))
        return err(ERR_ARG, "ferry %s has no option %s; did you mean --%s?", command->name, word, best->name);
    return err(ERR_ARG, "ferry %s has no option %s", command->name, word);
}

static int unknown_command(const struct conf_command *commands, const char *word)
{
    const struct conf_command *best = NULL;
    size_t best_d = SIZE_MAX;

    for (const struct conf_command *c = commands; c->name; c++) {
        size_t d = distance(word, c->name);
        if (d < best_d) {
            best = c;
            best_d = d;
        }
    }
    if (word[0] == '-')
        return err(ERR_ARG, "ferry has no option %s (options follow the subcommand)", word);
    if (best && is_near(word, best_d))
        return err(ERR_ARG, "ferry has no subcommand \"%s\"; did you mean \"%s\"?", word, best->name);
    return err(ERR_ARG, "ferry has no subcommand \"%s\"", word);
}

static const struct conf_option *find_name(const struct conf_command *command, const char *name, size_t n)
{
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (strlen(o->name) == n && !memcmp(o->name, name, n) && conf_takes(o, command->name))
            return o;
    }
    return NULL;
}

static const struct conf_option *find_letter(const struct conf_command *command, char letter)
{
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (o->letter && o->letter == letter && conf_takes(o, command->name))
            return o;
    }
    return NULL;
}

struct walk {
    const struct conf_command *command;
    char **argv; /* view; NULL-terminated */
    int next;    /* index of the word to read next */
};

/* The value of an option: what was glued to it, or the next word. */
static int take_value(struct walk *w, const struct conf_option *o, const char *word, const char *glued,
                      const char **out)
{
    *out = NULL;
    if (o->kind == CONF_FLAG) {
        if (glued)
            return err(ERR_ARG, "%s: --%s takes no value", word, o->name);
        return 0;
    }
    *out = glued ? glued : w->argv[w->next];
    if (!*out)
        return err(ERR_ARG, "%s wants a value: %s", word, o->value);
    w->next += !glued;
    return 0;
}

static int read_option(struct walk *w, const char *word, struct conf *out)
{
    const struct conf_option *o;
    const char *glued = NULL, *value;

    if (word[1] == '-') {
        size_t n = strcspn(word + 2, "=");
        o = find_name(w->command, word + 2, n);
        if (word[2 + n])
            glued = word + 2 + n + 1;
    } else {
        o = find_letter(w->command, word[1]);
        if (word[2])
            glued = word + 2;
    }
    if (!o)
        return unknown_option(w->command, word, word[1] == '-' ? word + 2 : word + 1);
    int rc = take_value(w, o, word, glued, &value);
    return rc ? rc : set_value(out, o, value);
}

static int read_words(struct walk *w, struct conf *out, enum conf_found *found)
{
    bool only_args = false;
    int n_args = 0;

    while (w->argv[w->next]) {
        const char *word = w->argv[w->next++];
        if (!only_args && !strcmp(word, "--")) {
            only_args = true;
        } else if (!only_args && (!strcmp(word, "--help") || !strcmp(word, "-h"))) {
            *found = CONF_FOUND_HELP;
            return 0;
        } else if (!only_args && word[0] == '-' && word[1]) {
            int rc = read_option(w, word, out);
            if (rc)
                return rc;
        } else if (n_args++ < w->command->max_args) {
            *(n_args == 1 ? &out->model : &out->words[n_args - 2]) = word;
        } else {
            return err(ERR_ARG, "ferry %s: \"%s\" is one word too many", w->command->name, word);
        }
    }
    if (n_args < w->command->min_args)
        return err(ERR_ARG, "ferry %s wants a model: ferry %s %s", w->command->name, w->command->name,
                   w->command->synopsis);
    *found = CONF_FOUND_COMMAND;
    return 0;
}

/* ---- environment ---- */

/* base/ferry, or home/below/ferry. The XDG rules: a relative base does not count. */
static int make_dir_name(const char *base, const char *home, const char *below, char **out)
{
    const char *root = base && base[0] == '/' ? base : home;
    const char *middle = root == base ? "" : below;

    *out = NULL;
    if (!root || root[0] != '/')
        return 0;
    size_t n = strlen(root) + strlen(middle) + sizeof "/ferry";
    *out = mem_alloc(n, MEM_OTHER);
    if (!*out)
        return err(ERR_NOMEM, "name of a folder: %zu bytes", n);
    snprintf(*out, n, "%s%s/ferry", root, middle);
    return 0;
}

/* Open MPI's mpirun; others that speak PMI; srun, which says it to every step. */
static uint32_t read_ranks(void)
{
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    uint32_t n_ranks = 0;

    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *text = getenv(names[i]);
        long n = text ? strtol(text, NULL, 10) : 0;
        if (n > n_ranks && n <= INT_MAX)
            n_ranks = (uint32_t)n;
    }
    return n_ranks;
}

static int read_environment(struct conf *out)
{
    const char *home = getenv("HOME"), *no_color = getenv("NO_COLOR"), *term = getenv("TERM");

    out->n_ranks = read_ranks();
    out->no_color = (no_color && no_color[0]) || !term || !strcmp(term, "dumb");
    int rc = make_dir_name(getenv("XDG_CACHE_HOME"), home, "/.cache", &out->cache_dir);
    return rc ? rc : make_dir_name(getenv("XDG_STATE_HOME"), home, "/.local/state", &out->state_dir);
}

static bool find_program_option(const char *word, enum conf_found *found)
{
    static const struct {
        const char *word;
        enum conf_found found;
    } rows[] = {
        {"--help", CONF_FOUND_HELP},         {"-h", CONF_FOUND_HELP},
        {"help", CONF_FOUND_HELP},           {"--version", CONF_FOUND_VERSION},
        {"--man-page", CONF_FOUND_MAN_PAGE}, {"--bash-completion", CONF_FOUND_COMPLETION},
    };

    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (!strcmp(word, rows[i].word)) {
            *found = rows[i].found;
            return true;
        }
    }
    return false;
}

int conf_parse(const struct conf_command *commands, int argc, char **argv, struct conf *out, enum conf_found *found,
               const struct conf_command **command)
{
    *out = (struct conf){0};
    *command = NULL;
    if (argc < 2)
        return err(ERR_ARG, "which subcommand?");
    if (find_program_option(argv[1], found)) {
        const char *topic = *found == CONF_FOUND_HELP ? argv[2] : NULL;
        for (const struct conf_command *c = commands; topic && c->name; c++) {
            if (!strcmp(c->name, topic))
                *command = c;
        }
        return topic && !*command ? unknown_command(commands, topic) : 0;
    }
    for (const struct conf_command *c = commands; c->name; c++) {
        if (!strcmp(c->name, argv[1]))
            *command = c;
    }
    if (!*command)
        return unknown_command(commands, argv[1]);

    struct walk w = {*command, argv, 2};
    out->command = (*command)->name;
    int rc = read_environment(out);
    if (!rc)
        rc = set_presets(out, out->command);
    return rc ? rc : read_words(&w, out, found);
}

void conf_done(struct conf *conf)
{
    mem_free(conf->cache_dir);
    mem_free(conf->state_dir);
    vars_done(&conf->vars);
    conf->cache_dir = conf->state_dir = NULL;
}
