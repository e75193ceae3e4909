/* Messages for people: warnings and progress notes, to one sink. Errors travel as return codes (err.h), not here. */
#ifndef FERRY_BASE_LOG_H
#define FERRY_BASE_LOG_H

#ifdef __cplusplus
extern "C" {
#endif

enum log_level { LOG_WARN = 0, LOG_INFO = 1, LOG_DEBUG = 2 };

/* Where lines go: text has no newline. NULL silences. The default writes "ferry: text" to stderr at LOG_WARN. */
typedef void log_sink(enum log_level level, const char *text, void *arg);

/* Set the sink and the chattiest level that reaches it. Call before threads start. */
void log_to(log_sink *sink, void *arg, enum log_level max_level);

/* Lines over 1023 bytes are cut. Any thread; not from exec_run and below. */
void log_warn(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void log_info(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void log_debug(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#ifdef __cplusplus
}
#endif
#endif
