/* Owns each thread's last error text. Deciding what to say is the caller's. */
#include "src/base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { TEXT_BYTES = 1024 };

static _Thread_local char last_text[TEXT_BYTES];

/* Callers say what the memory was for. A text that quotes another one has the words already. */
static void say_no_memory(char *text)
{
    static const char words[] = "no memory for ";
    const size_t n = sizeof words - 1;

    if (strstr(text, words))
        return;
    text[TEXT_BYTES - 1 - n] = '\0';
    memmove(text + n, text, strlen(text) + 1);
    memcpy(text, words, n);
}

int err(int code, const char *fmt, ...)
{
    /* Formatted aside first: a caller may pass err_text() as an argument to put a name in front of it. */
    char text[TEXT_BYTES];
    int saved_errno = errno;
    va_list ap;

    va_start(ap, fmt);
    if (vsnprintf(text, sizeof text, fmt, ap) < 0)
        snprintf(text, sizeof text, "(error text \"%.200s\" could not be formatted)", fmt);
    va_end(ap);
    if (code == ERR_NOMEM)
        say_no_memory(text);
    memcpy(last_text, text, strlen(text) + 1);
    errno = saved_errno;
    return code;
}

const char *err_text(void)
{
    return last_text;
}

void err_clear(void)
{
    last_text[0] = '\0';
}

const char *err_name(int code)
{
    switch (code) {
    case ERR_NOMEM:
        return "ERR_NOMEM";
    case ERR_IO:
        return "ERR_IO";
    case ERR_FORMAT:
        return "ERR_FORMAT";
    case ERR_LIMIT:
        return "ERR_LIMIT";
    case ERR_ARG:
        return "ERR_ARG";
    case ERR_UNSUPPORTED:
        return "ERR_UNSUPPORTED";
    case ERR_STATE:
        return "ERR_STATE";
    case ERR_CANCEL:
        return "ERR_CANCEL";
    case ERR_DEVICE:
        return "ERR_DEVICE";
    }
    return "ERR_?";
}
