/* Owns the one sink for messages. */
#include "src/base/log.h"

#include <stdarg.h>
#include <stdio.h>

enum { LINE_BYTES = 1024 };

static void write_stderr(enum log_level level, const char *text, void *arg)
{
    (void)level;
    (void)arg;
    fprintf(stderr, "ferry: %s\n", text);
}

static log_sink *sink = write_stderr;
static void *sink_arg;
static enum log_level sink_level = LOG_WARN;

void log_to(log_sink *new_sink, void *arg, enum log_level max_level)
{
    sink = new_sink;
    sink_arg = arg;
    sink_level = max_level;
}

static void __attribute__((format(printf, 2, 0))) send(enum log_level level, const char *fmt, va_list ap)
{
    char text[LINE_BYTES];

    if (!sink || level > sink_level)
        return;
    if (vsnprintf(text, sizeof text, fmt, ap) >= 0)
        sink(level, text, sink_arg);
}

void log_warn(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    send(LOG_WARN, fmt, ap);
    va_end(ap);
}

void log_info(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    send(LOG_INFO, fmt, ap);
    va_end(ap);
}

void log_debug(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    send(LOG_DEBUG, fmt, ap);
    va_end(ap);
}
