/* Who runs in the next step. */
#include "src/run/sched.h"

#include "src/device/device.h"

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows of logits that n_rows more rows give. */
static int64_t out_of(const struct sched_seq *s, int64_t n_rows)
{
    int64_t first = s->first_out > s->len ? s->first_out : s->len, end = s->len + n_rows;

    return end > first ? end - first : 0;
}

static void give(struct sched_seq *s, int64_t n_rows, int64_t *rows_left, int64_t *out_left)
{
    int64_t before_out = s->first_out > s->len ? s->first_out - s->len : 0;

    if (s->cut > s->len)
        n_rows = least(n_rows, s->cut - s->len);
    n_rows = least(least(n_rows, s->n_tok - s->len), *rows_left);
    n_rows = least(n_rows, before_out + *out_left);
    s->n_rows = (int)n_rows;
    s->n_out = (int)out_of(s, n_rows);
    *rows_left -= s->n_rows;
    *out_left -= s->n_out;
}

void sched_rows(struct sched_seq *seqs, int n, const struct sched_limits *limits)
{
    int64_t rows_left = limits->n_rows, out_left = limits->n_out;

    for (int i = 0; i < n; i++) {
        seqs[i].n_rows = seqs[i].n_out = 0;
        if (!seqs[i].waits && seqs[i].n_tok - seqs[i].len == 1)
            give(&seqs[i], 1, &rows_left, &out_left);
    }
    rows_left = least(rows_left, limits->chunk_tok);
    for (int i = 0; i < n; i++)
        if (!seqs[i].waits && seqs[i].n_tok - seqs[i].len > 1)
            give(&seqs[i], rows_left, &rows_left, &out_left);
}

bool sched_admits(int64_t n_tok, int64_t free_tok, int n_running)
{
    return n_running == 0 || n_tok <= free_tok - (int64_t)(n_running + 1) * (DEVICE_PAGE_TOK / 2);
}
