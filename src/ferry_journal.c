/* The public face of run/journal. */
#include "src/ferry.h"
#include "src/run/journal.h"

/* The handle is the journal itself: nothing is added to it. */
static struct journal *inner(struct ferry_journal *j)
{
    return (struct journal *)j;
}

int ferry_journal_open(const char *path, const char *begin, ferry_journal_line *on_line, void *arg,
                       struct ferry_journal **out)
{
    struct journal *j;
    int rc = journal_open(&(struct journal_args){.path = path, .begin = begin, .on_line = on_line, .arg = arg}, &j);

    *out = (struct ferry_journal *)j;
    return rc;
}

void ferry_journal_close(struct ferry_journal *j)
{
    journal_close(inner(j));
}

uint64_t ferry_journal_n_cut(struct ferry_journal *j)
{
    return journal_n_cut(inner(j));
}

uint64_t ferry_journal_n_bytes(struct ferry_journal *j)
{
    return journal_n_bytes(inner(j));
}

int ferry_journal_append(struct ferry_journal *j, const char *line, size_t n_bytes, uint64_t *off)
{
    return journal_append(inner(j), line, n_bytes, off);
}

int ferry_journal_sync(struct ferry_journal *j)
{
    return journal_sync(inner(j));
}

int ferry_journal_read(struct ferry_journal *j, uint64_t off, void *p, size_t n_bytes)
{
    return journal_read(inner(j), off, p, n_bytes);
}

int ferry_journal_clear(struct ferry_journal *j)
{
    return journal_clear(inner(j));
}
