/* Messages and progress on stderr. stdout belongs to the subcommands. */
#include "src/cli/term.h"

#include "src/base/clock.h"
#include "src/base/err.h"
#include "src/base/size.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Work that ends before this is not worth a line. */
#define SILENT_NS UINT64_C(500000000)
#define REDRAW_NS UINT64_C(100000000)
#define LINE_NS UINT64_C(5000000000)

int term_fail(int code)
{
    if (code == ERR_CANCEL) {
        fputs("ferry: interrupted\n", stderr);
        return CONF_EXIT_INTERRUPTED;
    }
    fprintf(stderr, "ferry: %s\n", err_text()[0] ? err_text() : err_name(code));
    return CONF_EXIT_FAILED;
}

int term_usage(const struct conf *conf, const char *fmt, ...)
{
    va_list args;

    fprintf(stderr, "ferry: ferry %s ", conf->command);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fprintf(stderr, "\nTry: ferry %s --help\n", conf->command);
    return CONF_EXIT_USAGE;
}

void term_progress_begin(struct term_progress *p, const struct conf *conf, const char *what, const char *unit)
{
    *p = (struct term_progress){.what = what, .unit = unit, .quiet = conf->quiet, .start_ns = clock_ns()};
    p->last_ns = p->start_ns;
}

static void format_line(const struct term_progress *p, uint64_t done, uint64_t total, double s, char *line,
                        size_t line_bytes)
{
    char a[32], b[32], rate[48];
    double per_s = s > 0 ? (double)done / s : 0;

    if (p->unit) {
        snprintf(a, sizeof a, "%" PRIu64, done);
        snprintf(b, sizeof b, "%" PRIu64 " %s", total, p->unit);
        snprintf(rate, sizeof rate, "%.3g %s/s", per_s, p->unit);
    } else {
        size_format(done, a, sizeof a);
        size_format(total, b, sizeof b);
        snprintf(rate, sizeof rate, "%.2f GB/s", per_s / 1e9);
    }
    int n = snprintf(line, line_bytes, "%s: %s of %s, %s", p->what, a, b, rate);
    if (done && done < total && n > 0 && (size_t)n < line_bytes)
        snprintf(line + n, line_bytes - (size_t)n, ", %.0f s left", (double)(total - done) / per_s);
}

/* Is it time for a line? */
static bool is_due(const struct term_progress *p, uint64_t now_ns)
{
    bool is_terminal = isatty(STDERR_FILENO) == 1;

    if (p->quiet || now_ns - p->start_ns < SILENT_NS)
        return false;
    if (p->shown && now_ns - p->last_ns < (is_terminal ? REDRAW_NS : LINE_NS))
        return false;
    return p->shown || is_terminal || now_ns - p->start_ns >= LINE_NS;
}

void term_progress_at(struct term_progress *p, uint64_t done, uint64_t total)
{
    char line[160];

    format_line(p, done, total, (double)(clock_ns() - p->start_ns) * 1e-9, line, sizeof line);
    term_progress_text(p, line);
}

void term_progress_text(struct term_progress *p, const char *line)
{
    uint64_t now_ns = clock_ns();

    if (!is_due(p, now_ns))
        return;
    p->shown = true;
    p->last_ns = now_ns;
    if (isatty(STDERR_FILENO) == 1)
        fprintf(stderr, "\r\033[K%s", line);
    else
        fprintf(stderr, "%s\n", line);
    fflush(stderr);
}

void term_progress_end(struct term_progress *p)
{
    if (p->shown && isatty(STDERR_FILENO) == 1) {
        fputs("\r\033[K", stderr);
        fflush(stderr);
    }
    p->shown = false;
}
