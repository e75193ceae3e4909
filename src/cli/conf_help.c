/* What the table of options says to people and to shells: help, the manual page (roff), completion (bash). */
#include "src/cli/conf.h"

#include <string.h>

enum { WIDTH = 80, COLUMN = 28 };

/* Text wrapped at WIDTH, continued at column `left`; `at` is where the line stands now. */
static void wrap(FILE *out, const char *text, int left, int at)
{
    while (*text) {
        int n = (int)strcspn(text, " ");
        if (at > left && at + 1 + n >= WIDTH) {
            fprintf(out, "\n%*s", left, "");
            at = left;
        } else if (at > left) {
            fputc(' ', out);
            at++;
        }
        fprintf(out, "%.*s", n, text);
        at += n;
        text += n;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

/* Lines of a text, each handed on without its newline. */
static const char *next_line(const char **text, char *line, size_t line_bytes)
{
    if (!**text)
        return NULL;
    size_t n = strcspn(*text, "\n");
    snprintf(line, line_bytes, "%.*s", (int)n, *text);
    *text += n;
    *text += **text == '\n';
    return line;
}

static void print_paragraphs(FILE *out, const char *text)
{
    char line[1024];

    while (next_line(&text, line, sizeof line))
        wrap(out, line, 0, 0);
}

/* "-p, --prompt TEXT" */
static void spell(const struct conf_option *o, char *buf, size_t buf_bytes)
{
    char letter[8] = "    ";

    if (o->letter)
        snprintf(letter, sizeof letter, "-%c, ", o->letter);
    snprintf(buf, buf_bytes, "%s--%s%s%s", letter, o->name, o->value ? " " : "", o->value ? o->value : "");
}

/* The help text with its choices and its default. */
static void describe(const struct conf_option *o, char *buf, size_t buf_bytes)
{
    size_t n = (size_t)snprintf(buf, buf_bytes, "%s", o->help);

    if (o->choices && n < buf_bytes)
        n += (size_t)snprintf(buf + n, buf_bytes - n, ": %s", o->choices);
    if (o->shown && n < buf_bytes)
        snprintf(buf + n, buf_bytes - n, " (default: %s)", o->shown);
}

static void print_option(FILE *out, const struct conf_option *o)
{
    char head[80], text[512];

    spell(o, head, sizeof head);
    describe(o, text, sizeof text);
    fprintf(out, "  %-*s", COLUMN - 2, head);
    if (strlen(head) > COLUMN - 3)
        fprintf(out, "\n%*s", COLUMN, "");
    wrap(out, text, COLUMN, COLUMN);
}

void conf_help(FILE *out, const struct conf_command *commands)
{
    fputs("ferry runs large language models (GGUF files) on machines that are too small\n"
          "for them.\n\n"
          "Usage: ferry COMMAND [MODEL] [options]\n\n",
          out);
    for (const struct conf_command *c = commands; c->name; c++)
        fprintf(out, "  %-10s %s\n", c->name, c->purpose);
    fputs("\n"
          "ferry COMMAND --help says more, with an example. Options follow the subcommand.\n"
          "ferry --version names the version.\n"
          "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n",
          out);
}

void conf_help_command(FILE *out, const struct conf_command *command)
{
    char line[1024];
    const char *example = command->example;

    fprintf(out, "Usage: ferry %s %s\n\n", command->name, command->synopsis);
    print_paragraphs(out, command->about);
    fputs("\nOptions:\n", out);
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (conf_takes(o, command->name))
            print_option(out, o);
    }
    fprintf(out, "  %-*s%s\n", COLUMN - 2, "-h, --help", "this text");
    fputs("\nExample:\n", out);
    while (next_line(&example, line, sizeof line))
        fprintf(out, "  %s\n", line);
}

/* ---- roff ---- */

/* Text for roff: backslashes, hyphens and leading dots are its own. */
static void roff(FILE *out, const char *text)
{
    bool first = true;

    for (; *text; text++) {
        if (first && (*text == '.' || *text == '\''))
            fputs("\\&", out);
        if (*text == '\\')
            fputs("\\e", out);
        else if (*text == '-')
            fputs("\\-", out);
        else
            fputc(*text, out);
        first = *text == '\n';
    }
}

static void roff_line(FILE *out, const char *before, const char *text, const char *after)
{
    fputs(before, out);
    roff(out, text);
    fputs(after, out);
}

static void roff_option(FILE *out, const struct conf_option *o)
{
    char text[512];

    fputs(".TP\n", out);
    if (o->letter)
        fprintf(out, "\\fB\\-%c\\fR, ", o->letter);
    roff_line(out, "\\fB\\-\\-", o->name, "\\fR");
    if (o->value)
        roff_line(out, " \\fI", o->value, "\\fR");
    fputc('\n', out);
    describe(o, text, sizeof text);
    roff_line(out, "", text, "\n");
}

static void roff_command(FILE *out, const struct conf_command *command)
{
    char line[1024];
    const char *text = command->about;

    roff_line(out, ".SS ferry ", command->name, " ");
    roff_line(out, "", command->synopsis, "\n");
    while (next_line(&text, line, sizeof line))
        roff_line(out, ".PP\n", line, "\n");
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (conf_takes(o, command->name))
            roff_option(out, o);
    }
    fputs(".PP\nExample:\n.PP\n.nf\n.RS\n", out);
    text = command->example;
    while (next_line(&text, line, sizeof line))
        roff_line(out, "", line, "\n");
    fputs(".RE\n.fi\n", out);
}

void conf_help_man_page(FILE *out, const struct conf_command *commands, const char *version)
{
    fprintf(out, ".TH FERRY 1 \"\" \"ferry %s\" \"User Commands\"\n", version);
    fputs(".SH NAME\nferry \\- run large language models on machines that are too small for them\n"
          ".SH SYNOPSIS\n\\fBferry\\fR \\fICOMMAND\\fR [\\fIMODEL\\fR] [\\fIoptions\\fR]\n"
          ".SH DESCRIPTION\n"
          "MODEL is a GGUF file; of a split one, any part.\n"
          "Options follow the subcommand.\n"
          "Sizes read 512M, 8G, 1.5GiB, in powers of 1024; rates read 60G/s, in powers of 1000.\n"
          "Output for a person goes to stderr where stdout carries a result.\n"
          ".SH COMMANDS\n",
          out);
    for (const struct conf_command *c = commands; c->name; c++)
        roff_command(out, c);
    fputs(".SH EXIT STATUS\n"
          ".TP\n0\ndone\n.TP\n1\nfailed; the message says what, where and how much\n.TP\n2\nwrong usage\n"
          ".TP\n130\ninterrupted; what was finished is kept\n"
          ".SH ENVIRONMENT\n"
          ".TP\nXDG_CACHE_HOME, XDG_STATE_HOME, HOME\nwhere the files below lie\n"
          ".TP\nNO_COLOR, TERM\nno colours if NO_COLOR is not empty or TERM is dumb\n"
          ".SH FILES\n"
          ".TP\n~/.cache/ferry/machine.json\nwhat \\fBferry probe\\fR measured\n"
          ".TP\n~/.local/state/ferry/history\nlines typed in \\fBferry chat\\fR\n",
          out);
}

/* ---- bash ---- */

static void print_words(FILE *out, const char *words, char separator)
{
    for (; *words; words++)
        fputc(*words == separator ? ' ' : *words, out);
}

static void completion_values(FILE *out, const struct conf_command *command)
{
    for (const struct conf_option *o = conf_options; o->name; o++) {
        if (!o->value || !conf_takes(o, command->name))
            continue;
        fprintf(out, "        %s:--%s", command->name, o->name);
        if (o->letter)
            fprintf(out, "|%s:-%c", command->name, o->letter);
        fputs(") ", out);
        if (o->kind == CONF_CHOICE) {
            fputs("words=\"", out);
            print_words(out, o->choices, '|');
            fputs("\" ;;\n", out);
        } else {
            fprintf(out, "words=%s ;;\n", o->kind == CONF_FILE ? "" : "' '");
        }
    }
}

void conf_help_completion(FILE *out, const struct conf_command *commands)
{
    fputs("# bash completion for ferry, written by ferry --bash-completion\n"
          "_ferry() {\n"
          "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=\n"
          "    COMPREPLY=()\n"
          "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
          "        COMPREPLY=($(compgen -W \"",
          out);
    for (const struct conf_command *c = commands; c->name; c++)
        fprintf(out, "%s ", c->name);
    fputs("--help --version\" -- \"$cur\"))\n"
          "        return\n"
          "    fi\n"
          "    case \"${COMP_WORDS[1]}:$prev\" in\n",
          out);
    for (const struct conf_command *c = commands; c->name; c++)
        completion_values(out, c);
    fputs("        *)\n"
          "            if [[ $cur == -* ]]; then\n"
          "                case \"${COMP_WORDS[1]}\" in\n",
          out);
    for (const struct conf_command *c = commands; c->name; c++) {
        fprintf(out, "                %s) words=\"--help", c->name);
        for (const struct conf_option *o = conf_options; o->name; o++) {
            if (conf_takes(o, c->name))
                fprintf(out, " --%s", o->name);
        }
        fputs("\" ;;\n", out);
    }
    fputs("                esac\n"
          "            fi\n"
          "            ;;\n"
          "    esac\n"
          "    if [ -n \"$words\" ]; then\n"
          "        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
          "    else\n"
          "        COMPREPLY=($(compgen -f -- \"$cur\"))\n"
          "    fi\n"
          "}\n"
          "complete -o filenames -F _ferry ferry\n",
          out);
}
