/* Owns the texts of a conversation. */
#include "src/cli/dialog.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <string.h>

static int grow(struct dialog *d)
{
    size_t cap = d->cap ? 2 * d->cap : 16;
    struct text *turns = mem_realloc(d->turns, cap * sizeof *turns, MEM_OTHER);

    if (turns)
        d->turns = turns;
    struct ferry_message *messages = turns ? mem_realloc(d->messages, (cap + 1) * sizeof *messages, MEM_OTHER) : NULL;
    if (!messages)
        return err(ERR_NOMEM, "a conversation of %zu turns", cap);
    d->messages = messages;
    d->cap = cap;
    return 0;
}

int dialog_add(struct dialog *d, const char *bytes, size_t n_bytes)
{
    int rc = d->n == d->cap ? grow(d) : 0;

    if (rc)
        return rc;
    d->turns[d->n] = (struct text){0};
    rc = text_add(&d->turns[d->n], bytes, n_bytes);
    if (!rc)
        d->n++;
    return rc;
}

void dialog_keep(struct dialog *d, size_t n)
{
    while (d->n > n)
        text_done(&d->turns[--d->n]);
}

int dialog_set_system(struct dialog *d, const char *text)
{
    struct text copy = {0};
    int rc = text_add(&copy, text, strlen(text));

    if (rc)
        return rc;
    text_done(&d->system);
    d->system = copy;
    return 0;
}

int dialog_messages(struct dialog *d, const struct ferry_message **messages, size_t *n)
{
    size_t at = 0;
    int rc = d->cap ? 0 : grow(d);

    if (rc)
        return rc;
    if (d->system.n_bytes)
        d->messages[at++] = (struct ferry_message){"system", text_str(&d->system)};
    for (size_t turn = 0; turn < d->n; turn++)
        d->messages[at++] = (struct ferry_message){turn % 2 ? "assistant" : "user", text_str(&d->turns[turn])};
    *messages = d->messages;
    *n = at;
    return 0;
}

void dialog_done(struct dialog *d)
{
    dialog_keep(d, 0);
    text_done(&d->system);
    mem_free(d->turns);
    mem_free(d->messages);
    *d = (struct dialog){0};
}
