/* libedit on a terminal, stdio elsewhere; several lines to one message. */
#include "src/cli/lines.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/cli/stop.h"

#include <errno.h>
#include <histedit.h>
#include <langinfo.h>
#include <locale.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wchar.h>

#define QUOTES "\"\"\""
enum { HISTORY_LINES = 1000 };

struct lines {
    EditLine *editor;   /* own; NULL: no terminal */
    History *history;   /* own */
    char *path;         /* own: the history's file; NULL: not kept */
    const char *prompt; /* view: a constant */
    bool is_cleared;    /* the signal met a line with something on it */
};

/* ---- the editor ---- */

static char *show_prompt(EditLine *editor)
{
    struct lines *l = NULL;

    el_get(editor, EL_CLIENTDATA, &l);
    return (char *)l->prompt; /* libedit only reads it, but its type says otherwise */
}

/* One character. libedit's own reader goes on after a signal; this one comes back, so that Ctrl-C can clear the line. */
static int read_character(EditLine *editor, wchar_t *out)
{
    mbstate_t state = {0};
    struct lines *l = NULL;
    char byte;

    for (;;) {
        ssize_t n = read(STDIN_FILENO, &byte, 1);
        if (n < 0 && errno == EINTR && !stop_asked())
            continue;
        if (n < 0) {
            el_get(editor, EL_CLIENTDATA, &l);
            l->is_cleared = el_line(editor)->lastchar > el_line(editor)->buffer;
        }
        if (n <= 0)
            return n < 0 ? -1 : 0;
        size_t rc = mbrtowc(out, &byte, 1, &state);
        if (rc == (size_t)-2)
            continue;
        if (rc == (size_t)-1)
            *out = L'?';
        return 1;
    }
}

static int make_path(const struct conf *conf, struct lines *l)
{
    size_t n;

    if (!conf->state_dir)
        return 0;
    n = strlen(conf->state_dir) + sizeof "/history";
    l->path = mem_alloc(n, MEM_OTHER);
    if (!l->path)
        return err(ERR_NOMEM, "a path of %zu bytes", n);
    snprintf(l->path, n, "%s/history", conf->state_dir);
    for (char *p = strchr(l->path + 1, '/'); p; p = strchr(p + 1, '/')) {
        *p = '\0';
        mkdir(l->path, 0700); /* where that fails the history is not kept, which is no reason not to talk */
        *p = '/';
    }
    return 0;
}

static int open_editor(const struct conf *conf, struct lines *l)
{
    HistEvent event;

    /* libedit thinks in wide characters; numbers keep the C locale. */
    setlocale(LC_CTYPE, "");
    if (strcmp(nl_langinfo(CODESET), "UTF-8"))
        setlocale(LC_CTYPE, "C.UTF-8");
    l->editor = el_init("ferry", stdin, stdout, stderr);
    l->history = history_init();
    if (!l->editor || !l->history)
        return err(ERR_NOMEM, "the line editor");
    history(l->history, &event, H_SETSIZE, HISTORY_LINES);
    history(l->history, &event, H_SETUNIQUE, 1);
    el_set(l->editor, EL_CLIENTDATA, l);
    el_set(l->editor, EL_PROMPT, show_prompt);
    el_set(l->editor, EL_EDITOR, "emacs");
    el_set(l->editor, EL_HIST, history, l->history);
    el_set(l->editor, EL_GETCFN, read_character);
    el_source(l->editor, NULL);
    int rc = make_path(conf, l);
    if (!rc && l->path)
        history(l->history, &event, H_LOAD, l->path);
    return rc;
}

int lines_open(const struct conf *conf, struct lines **out)
{
    struct lines *l = mem_zalloc(1, sizeof *l, MEM_OTHER);
    int rc = 0;

    *out = NULL;
    if (!l)
        return err(ERR_NOMEM, "a reader of lines");
    if (isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1)
        rc = open_editor(conf, l);
    if (rc) {
        lines_close(l);
        return rc;
    }
    *out = l;
    return 0;
}

void lines_close(struct lines *l)
{
    HistEvent event;

    if (!l)
        return;
    if (l->history && l->path) {
        /* What was said is nobody else's business. */
        mode_t mask = umask(077);
        history(l->history, &event, H_SAVE, l->path);
        umask(mask);
    }
    if (l->editor)
        el_end(l->editor);
    if (l->history)
        history_end(l->history);
    mem_free(l->path);
    mem_free(l);
}

bool lines_is_terminal(const struct lines *l)
{
    return l->editor != NULL;
}

/* ---- lines ---- */

static int read_edited(struct lines *l, struct text *out, enum lines_got *got)
{
    HistEvent event;
    int n = 0;

    errno = 0;
    l->is_cleared = false;
    const char *line = el_gets(l->editor, &n);
    if (stop_asked()) {
        *got = l->is_cleared ? LINES_CLEARED : LINES_INTERRUPT;
        putchar('\n');
        return 0;
    }
    if (!line || n <= 0) {
        *got = LINES_END;
        putchar('\n');
        return 0;
    }
    *got = LINES_MESSAGE;
    if (strspn(line, " \t\n") < (size_t)n)
        history(l->history, &event, H_ENTER, line);
    return text_add(out, line, (size_t)n);
}

static int read_plain(struct text *out, enum lines_got *got)
{
    bool any = false;
    int c = EOF, rc = 0;

    errno = 0;
    while (!rc && (c = getc(stdin)) != EOF) {
        char byte = (char)c;
        any = true;
        rc = text_add(out, &byte, 1);
        if (c == '\n')
            break;
    }
    if (!rc && c == EOF && ferror(stdin)) {
        clearerr(stdin);
        if (errno == EINTR && stop_asked())
            *got = LINES_INTERRUPT;
        else
            rc = err(ERR_IO, "stdin: %s", strerror(errno));
        return rc;
    }
    *got = any ? LINES_MESSAGE : LINES_END;
    return rc;
}

/* One line more on *out, its newline dropped. */
static int read_line(struct lines *l, const char *prompt, struct text *out, enum lines_got *got)
{
    l->prompt = prompt;
    int rc = l->editor ? read_edited(l, out, got) : read_plain(out, got);
    if (!rc && out->n_bytes && out->p[out->n_bytes - 1] == '\n')
        out->p[--out->n_bytes] = '\0';
    return rc;
}

static bool ends_in(const struct text *t, size_t from, const char *end)
{
    size_t n = strlen(end);
    return t->n_bytes >= from + n && !memcmp(t->p + t->n_bytes - n, end, n);
}

static void cut(struct text *t, size_t n_bytes)
{
    t->n_bytes -= n_bytes;
    t->p[t->n_bytes] = '\0';
}

/* Goes on until the quotes that end it, or the end of input. */
static int read_quoted(struct lines *l, struct text *out, enum lines_got *got)
{
    const size_t n_quotes = strlen(QUOTES);

    memmove(out->p, out->p + n_quotes, out->n_bytes - n_quotes + 1);
    out->n_bytes -= n_quotes;
    while (!ends_in(out, 0, QUOTES)) {
        int rc = out->n_bytes ? text_add(out, "\n", 1) : 0;
        if (!rc)
            rc = read_line(l, "... ", out, got);
        if (rc || *got == LINES_CLEARED || *got == LINES_INTERRUPT) {
            *got = LINES_CLEARED;
            return rc;
        }
        if (*got == LINES_END)
            break;
    }
    if (*got == LINES_MESSAGE)
        cut(out, n_quotes);
    if (out->n_bytes && out->p[out->n_bytes - 1] == '\n')
        cut(out, 1);
    *got = LINES_MESSAGE;
    return 0;
}

int lines_read(struct lines *l, struct text *out, enum lines_got *got)
{
    text_clear(out);
    int rc = read_line(l, "> ", out, got);
    if (rc || *got != LINES_MESSAGE || !out->n_bytes)
        return rc;
    if (!strncmp(out->p, QUOTES, strlen(QUOTES)))
        return read_quoted(l, out, got);
    while (ends_in(out, 0, "\\")) {
        out->p[out->n_bytes - 1] = '\n';
        rc = read_line(l, "... ", out, got);
        if (rc || *got == LINES_CLEARED || *got == LINES_INTERRUPT) {
            *got = LINES_CLEARED;
            return rc;
        }
        if (*got == LINES_END)
            break;
    }
    *got = LINES_MESSAGE;
    return 0;
}
