/* Error codes and the text of the last error, kept per thread. */
#ifndef FERRY_BASE_ERR_H
#define FERRY_BASE_ERR_H

#ifdef __cplusplus
extern "C" {
#endif

enum err_code {
    ERR_NOMEM = -1,       /* an allocation failed */
    ERR_IO = -2,          /* the system refused or broke off a read, write, open or map */
    ERR_FORMAT = -3,      /* a file says something impossible */
    ERR_LIMIT = -4,       /* it would not fit a budget or a fixed bound */
    ERR_ARG = -5,         /* the caller asked for something impossible */
    ERR_UNSUPPORTED = -6, /* well formed, but ferry cannot do it */
    ERR_STATE = -7,       /* right call, wrong moment */
    ERR_CANCEL = -8,      /* the user stopped it */
    ERR_DEVICE = -9,      /* a GPU or its driver failed */
};

/* Keep the formatted text as this thread's last error and return code, so that a caller writes
 * `return err(ERR_IO, ...)`. The text names what broke and the numbers; whoever is above passes the code on. With ERR_NOMEM
 * it says what the memory was for, and "no memory for " is put in front. Texts longer than 1023 bytes are cut. Never
 * allocates. Any thread. */
int err(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The text of this thread's last err(), "" if none. View, until the next err() of the thread. */
const char *err_text(void);

/* Forget this thread's text. */
void err_clear(void);

/* "ERR_IO" for ERR_IO; "ERR_?" for what is no code. */
const char *err_name(int code);

#ifdef __cplusplus
}
#endif
#endif
