/* Options: every one of them is a row of one table, and this is the only reader of argv and of the environment. Help, the
 * manual page and the shell completion are written from the same table. Main thread only. */
#ifndef FERRY_CLI_CONF_H
#define FERRY_CLI_CONF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "src/cli/vars.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Exit statuses of the program. */
enum conf_exit { CONF_EXIT_DONE = 0, CONF_EXIT_FAILED = 1, CONF_EXIT_USAGE = 2, CONF_EXIT_INTERRUPTED = 130 };

/* What the user asked for. Strings are views of argv (until main ends) unless said otherwise; a zero is "not given" where the
 * table names no default. */
struct conf {
    const char *command;
    const char *model;    /* first word after the subcommand; NULL: none given */
    const char *words[2]; /* those after it */
    /* engine */
    uint64_t ram_bytes, expert_ram_bytes;
    uint32_t n_ctx, n_threads, chunk_tok;
    const char *kv_type, *io, *prefill, *isa, *device, *gpu_copies;
    bool no_pin;
    const char *plan;
    /* sampling */
    double temperature, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty;
    int64_t top_k, penalty_window;
    uint64_t seed;
    bool has_seed;
    /* chat, run */
    const char *system, *prompt, *file;
    uint32_t n_tokens;
    bool raw;
    struct vars vars;                  /* own; batch, too */
    const char *grammar, *json_schema; /* files, of which at most one is named; batch, too */
    /* batch */
    const char *input, *output, *order;
    const char *spill;             /* NULL: nowhere */
    const char *embed, *normalize; /* embed NULL: answers or scores */
    uint32_t n_sequences;
    bool score, restart, accept_changes;
    /* tokenize */
    bool decode, special, bos;
    /* eval */
    const char *tokens, *logits, *text;
    uint32_t n_prefill;
    bool has_n_prefill;
    /* bench */
    uint32_t bench_prompt, bench_generate, bench_depth, n_reps;
    /* a machine that is described, for plan */
    double mem_bytes_per_s, disk_bytes_per_s, gpu_bytes_per_s, pcie_bytes_per_s, skew;
    uint64_t vram_bytes;
    uint32_t n_cores;
    bool explain; /* batch, too */
    const char *save;
    /* quantize */
    const char *imatrix;
    uint64_t split_bytes;
    bool pure, dry_run, verbose;
    /* output */
    bool stats, json, quiet, tensors;
    const char *trace, *trace_experts;
    /* from the environment */
    uint32_t n_ranks;            /* processes that mpirun or srun started together with this one; 0: none did */
    char *cache_dir, *state_dir; /* own: ".../ferry"; NULL: the environment names no place */
    bool no_color;
};

/* One subcommand: a row of main.c's table, which ends with a NULL name. */
struct conf_command {
    const char *name;
    const char *purpose;                 /* one line, at most 60 characters */
    const char *synopsis;                /* what follows "ferry NAME" in the usage line */
    const char *about;                   /* paragraphs for the help, each on a line of its own */
    const char *example;                 /* one command line a line */
    int min_args, max_args;              /* words that are no options: 0 to 3 */
    int (*run)(const struct conf *conf); /* an exit status */
};

/* What conf_parse found. */
enum conf_found {
    CONF_FOUND_COMMAND, /* run it */
    CONF_FOUND_HELP,    /* --help, of the program (*command NULL) or of *command */
    CONF_FOUND_VERSION,
    CONF_FOUND_MAN_PAGE,
    CONF_FOUND_COMPLETION,
};

/* Read argv and the environment. *command: the row that was named, or NULL. On failure *command still says how far it got.
 * ERR_ARG: wrong usage, the text says which word; ERR_NOMEM. Either way the caller gives out to conf_done. */
int conf_parse(const struct conf_command *commands, int argc, char **argv, struct conf *out, enum conf_found *found,
               const struct conf_command **command);
void conf_done(struct conf *conf);

/* Read "60G/s", "3.5GB/s", "900M": bytes a second in powers of 1000 (of 1024 with an i: "56GiB/s"), as data sheets have them.
 * ERR_ARG. */
int conf_rate(const char *text, double *out_bytes_per_s);

/* ---- the table, as tests and conf_help.c see it ---- */

enum conf_kind {
    CONF_FLAG,   /* no value; bool */
    CONF_COUNT,  /* uint32_t in [min, max] */
    CONF_INT,    /* int64_t in [min, max] */
    CONF_SEED,   /* uint64_t */
    CONF_REAL,   /* double in [min, max] */
    CONF_SIZE,   /* uint64_t bytes */
    CONF_RATE,   /* double bytes a second */
    CONF_TEXT,   /* const char * */
    CONF_FILE,   /* const char *: a path */
    CONF_CHOICE, /* const char *: one of choices */
    CONF_VAR,    /* one more of struct vars; may be given again */
};

struct conf_option {
    const char *name; /* without the two hyphens */
    char letter;      /* 0: none */
    enum conf_kind kind;
    const char *commands; /* names of the subcommands that take it, a space between them */
    size_t offset;        /* in struct conf; a bool "given" field, if there is one, at given_offset */
    size_t given_offset;  /* 0: none */
    const char *value;    /* what the value is called in help; NULL for flags */
    const char *shown;    /* the default as help shows it; NULL: none */
    const char *preset;   /* the default as the user would write it; NULL: zero */
    const char *choices;  /* "a|b|c" */
    double min, max;
    const char *help;
};

extern const struct conf_option conf_options[]; /* ends with a NULL name */

/* Does this subcommand take this option? */
bool conf_takes(const struct conf_option *option, const char *command);

/* ---- texts (conf_help.c); write errors are the caller's to ask of the stream ---- */

void conf_help(FILE *out, const struct conf_command *commands);
void conf_help_command(FILE *out, const struct conf_command *command);
void conf_help_man_page(FILE *out, const struct conf_command *commands, const char *version);
void conf_help_completion(FILE *out, const struct conf_command *commands);

#ifdef __cplusplus
}
#endif
#endif
