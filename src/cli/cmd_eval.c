/* ferry eval: logits of given tokens into a file, or the perplexity of a text. */
#include "src/cli/cmd.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/stop.h"
#include "src/cli/talk.h"
#include "src/cli/term.h"
#include "src/cli/text.h"
#include "src/ferry.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Rows of logits a step, which the plan counts: a vocabulary of 256 Ki floats makes 64 MiB of them. How a prompt is cut changes no bit. */
enum { ROWS = 64 };
/* Of logits that were written, in the system's memory: within the margin that a plan leaves of what is free. */
#define MOST_CACHED_BYTES ((uint64_t)64 << 20)
#define MAX_INPUT_BYTES ((uint64_t)1 << 30)
#define DEFAULT_WINDOW 512
/* Under this the half of a window that counts is no text any more. */
#define LEAST_WINDOW 8

/* ---- tokens given ---- */

/* "1,2,3", with spaces and newlines wherever; *tokens is the caller's. */
static int parse_tokens(const char *p, int32_t **tokens, size_t *n)
{
    size_t n_most = 1;

    for (const char *q = p; *q; q++)
        n_most += *q == ',' || *q == ' ' || *q == '\n';
    *n = 0;
    *tokens = mem_zalloc(n_most, sizeof **tokens, MEM_TOK);
    if (!*tokens)
        return err(ERR_NOMEM, "%zu token ids", n_most);
    for (p += strspn(p, " \n\t\r["); *p;) {
        char *end;
        errno = 0;
        long id = strtol(p, &end, 10);
        if (end == p || errno || id < 0 || id > INT32_MAX || *n == n_most)
            return err(ERR_ARG, "--tokens: \"%.20s\" is no token id (after %zu of them)", p, *n);
        (*tokens)[(*n)++] = (int32_t)id;
        p = end + strspn(end, " ,\n\t\r]");
    }
    return *n ? 0 : err(ERR_ARG, "--tokens: no token ids");
}

static int read_tokens(const char *word, int32_t **tokens, size_t *n)
{
    struct text text = {0};
    int rc = 0;

    *tokens = NULL;
    if (word[0] == '@')
        rc = text_read(&text, word + 1, MAX_INPUT_BYTES);
    if (!rc)
        rc = parse_tokens(word[0] == '@' ? text_str(&text) : word, tokens, n);
    text_done(&text);
    return rc;
}

static int check_tokens(const struct talk *t, const int32_t *tokens, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if ((uint32_t)tokens[i] >= t->info.n_vocab)
            return err(ERR_ARG, "token %zu is %" PRId32 "; the vocabulary has %" PRIu32, i, tokens[i], t->info.n_vocab);
    }
    return 0;
}

/* ---- logits to a file ---- */

/* Own: f. */
struct logits_file {
    FILE *f;
    const char *path; /* view */
    size_t n_vocab;
    uint64_t cached_bytes; /* written since the system was last told to let go */
};

/* The file may be much larger than the memory, and what the system keeps of it counts against a limit (cgroup) as ferry's own does. */
static int drop_cache(struct logits_file *to)
{
    int fd = fileno(to->f);

    to->cached_bytes = 0;
    if (fdatasync(fd)) /* EINVAL: a pipe or the like, of which nothing is kept */
        return errno == EINVAL ? 0 : err(ERR_IO, "%s: %s", to->path, strerror(errno));
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    return 0;
}

static int write_rows(const float *rows, size_t n_rows, void *arg)
{
    struct logits_file *to = arg;
    size_t n_floats = n_rows * to->n_vocab;

    errno = 0;
    if (fwrite(rows, sizeof *rows, n_floats, to->f) != n_floats)
        return err(ERR_IO, "%s: %zu bytes cannot be written: %s", to->path, n_floats * sizeof *rows, strerror(errno));
    to->cached_bytes += n_floats * sizeof *rows;
    return to->cached_bytes < MOST_CACHED_BYTES ? 0 : drop_cache(to);
}

/* Run tokens [first, end) and write their rows. */
static int write_logits(struct talk *t, struct logits_file *to, const int32_t *tokens, size_t first, size_t end,
                        bool prompt)
{
    struct term_progress progress;
    int rc = 0;

    term_progress_begin(&progress, t->conf, prompt ? "prompt" : "one by one", "tokens");
    for (size_t at = first; at < end && !rc; at += ROWS) {
        size_t n = end - at < ROWS ? end - at : ROWS;
        rc = stop_asked() ? err(ERR_CANCEL, "interrupted")
                          : ferry_session_each_logits(t->session, tokens + at, n, prompt, write_rows, to);
        term_progress_at(&progress, at + n - first, end - first);
    }
    term_progress_end(&progress);
    return rc;
}

static int print_logits_report(const struct talk *t, size_t n, size_t n_prefill)
{
    if (!t->conf->json) {
        if (!t->conf->quiet)
            fprintf(stderr, "%zu tokens (%zu as a prompt) x %" PRIu32 " logits to %s\n", n, n_prefill, t->info.n_vocab,
                    t->conf->logits);
        return 0;
    }
    json_t *o = json_pack("{s:I, s:I, s:I, s:s}", "n_tokens", (json_int_t)n, "n_prefill", (json_int_t)n_prefill,
                          "n_vocab", (json_int_t)t->info.n_vocab, "logits", t->conf->logits);
    int failed = !o || json_dumpf(o, stdout, 0);
    json_decref(o);
    putchar('\n');
    return failed ? err(ERR_NOMEM, "the report as JSON") : 0;
}

static int eval_tokens(struct talk *t, const int32_t *tokens, size_t n)
{
    const struct conf *conf = t->conf;
    size_t n_prefill = conf->has_n_prefill && conf->n_prefill < n ? conf->n_prefill : n;
    struct logits_file to = {.path = conf->logits, .n_vocab = t->info.n_vocab};
    int rc = check_tokens(t, tokens, n);

    if (!rc && !(to.f = fopen(conf->logits, "wbe")))
        rc = err(ERR_IO, "%s: %s", conf->logits, strerror(errno));
    if (!rc)
        rc = write_logits(t, &to, tokens, 0, n_prefill, true);
    if (!rc)
        rc = write_logits(t, &to, tokens, n_prefill, n, false);
    errno = 0;
    if (to.f && fclose(to.f) && !rc)
        rc = err(ERR_IO, "%s: %s", conf->logits, strerror(errno));
    return rc ? rc : print_logits_report(t, n, n_prefill);
}

/* ---- perplexity ---- */

struct score {
    double sum, sum_squares; /* of -log p */
    size_t n, n_vocab;
    const int32_t *next; /* view: what follows the token that is run next */
};

/* -log softmax(row)[token], in double: the sum runs over the whole vocabulary. */
static double loss(const float *row, size_t n_vocab, int32_t token)
{
    double most = row[0], sum = 0;

    for (size_t i = 1; i < n_vocab; i++)
        most = row[i] > most ? row[i] : most;
    for (size_t i = 0; i < n_vocab; i++)
        sum += exp(row[i] - most);
    return log(sum) + most - row[token];
}

static int score_rows(const float *rows, size_t n_rows, void *arg)
{
    struct score *s = arg;

    for (size_t i = 0; i < n_rows; i++) {
        double x = loss(rows + i * s->n_vocab, s->n_vocab, *s->next++);
        s->sum += x;
        s->sum_squares += x * x;
        s->n++;
    }
    return 0;
}

/* One window: all of it is run, the tokens of its second half are scored by the logits before them. */
static int score_window(struct talk *t, const int32_t *tokens, size_t n, struct score *s)
{
    size_t n_before = n / 2;
    int rc = ferry_session_truncate(t->session, 0);

    if (!rc)
        rc = ferry_session_append(t->session, tokens, n_before, NULL, NULL);
    s->next = tokens + n_before + 1;
    return rc ? rc : ferry_session_each_logits(t->session, tokens + n_before, n - 1 - n_before, true, score_rows, s);
}

static int print_perplexity(const struct talk *t, const struct score *s, size_t n_windows, size_t window)
{
    double mean = s->sum / (double)s->n;
    double variance = s->sum_squares / (double)s->n - mean * mean;
    /* Of a mean of n; through exp() it is that share of the perplexity. */
    double error = sqrt((variance > 0 ? variance : 0) / (double)s->n) * exp(mean);

    if (!t->conf->json) {
        printf("perplexity %.4f +- %.4f over %zu tokens (%zu windows of %zu)\n", exp(mean), error, s->n, n_windows,
               window);
        return 0;
    }
    json_t *o =
        json_pack("{s:f, s:f, s:f, s:I, s:I, s:I}", "perplexity", exp(mean), "error", error, "mean_nll", mean,
                  "n_tokens", (json_int_t)s->n, "n_windows", (json_int_t)n_windows, "window", (json_int_t)window);
    int failed = !o || json_dumpf(o, stdout, 0);
    json_decref(o);
    putchar('\n');
    return failed ? err(ERR_NOMEM, "the report as JSON") : 0;
}

/* The token that the model wants in front of a text, or -1. */
static int find_bos(const struct talk *t, int32_t *bos)
{
    int32_t *tokens = NULL;
    size_t n = 0;
    int rc = ferry_tokenize(t->engine, "", 0, FERRY_TOKENS_BOS, &tokens, &n);

    *bos = !rc && n ? tokens[0] : -1;
    ferry_free(tokens);
    return rc;
}

static int score_text(struct talk *t, int32_t *tokens, size_t n, size_t window, int32_t bos)
{
    struct term_progress progress;
    struct score s = {.n_vocab = t->info.n_vocab};
    size_t n_windows = n / window;
    int rc = 0;

    term_progress_begin(&progress, t->conf, "reading", "tokens");
    for (size_t i = 0; i < n_windows && !rc; i++) {
        int32_t *first = tokens + i * window, was = *first;
        if (bos >= 0)
            *first = bos;
        rc = stop_asked() ? err(ERR_CANCEL, "interrupted") : score_window(t, first, window, &s);
        *first = was;
        term_progress_at(&progress, (i + 1) * window, n_windows * window);
    }
    term_progress_end(&progress);
    return rc ? rc : print_perplexity(t, &s, n_windows, window);
}

static int eval_text(struct talk *t, const struct text *text)
{
    int32_t *tokens = NULL, bos = -1;
    size_t n = 0, window = t->info.n_ctx;
    int rc = ferry_tokenize(t->engine, text_str(text), text->n_bytes, FERRY_TOKENS_BOS, &tokens, &n);

    if (!rc)
        rc = find_bos(t, &bos);
    if (window > n)
        window = n;
    if (!rc && window < LEAST_WINDOW)
        rc = err(ERR_ARG, "--text: %zu tokens in windows of %" PRIu32 " are too few; %d at least", n, t->info.n_ctx,
                 LEAST_WINDOW);
    if (!rc)
        rc = score_text(t, tokens, n, window, bos);
    ferry_free(tokens);
    return rc;
}

int cmd_eval(const struct conf *conf)
{
    struct text text = {0};
    struct talk t = {0};
    int32_t *tokens = NULL;
    size_t n = 0;
    int rc;

    if (!conf->tokens == !conf->text)
        return term_usage(conf, "wants one of --tokens IDS and --text FILE");
    if (!conf->tokens != !conf->logits)
        return term_usage(conf, "wants --tokens IDS and --logits FILE together");
    rc = conf->tokens ? read_tokens(conf->tokens, &tokens, &n) : text_read(&text, conf->text, MAX_INPUT_BYTES);
    if (!rc) {
        uint32_t n_ctx = conf->n_ctx ? conf->n_ctx : conf->tokens ? (uint32_t)n : DEFAULT_WINDOW;
        rc = talk_open(conf, n_ctx, ROWS, &t);
        if (!rc)
            rc = conf->tokens ? eval_tokens(&t, tokens, n) : eval_text(&t, &text);
        talk_close(&t);
    }
    mem_free(tokens);
    text_done(&text);
    return rc ? term_fail(rc) : CONF_EXIT_DONE;
}
