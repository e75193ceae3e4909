/* What ranks say to each other. */
#include "src/cli/batch_rank.h"

#include "src/cli/batch_record.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Of a rank that is given its lines: those that run, and half as many, so that it does not wait for rank 0's steps. What it has
 * cannot be given to another. */
#define LINES_OF_RANK(n_batch) ((n_batch) + ((n_batch) + 1) / 2)

/* ---- lines that were given away ---- */

static int queue_put(struct batch_queue *q, uint64_t number, uint64_t there, const char *text, size_t n_bytes)
{
    struct batch_given *g = batch_in_zalloc(1, sizeof *g + n_bytes, "a line of the input");

    if (!g)
        return FERRY_ERR_NOMEM;
    g->number = number;
    g->there = there;
    g->n_bytes = n_bytes;
    memcpy(g->text, text, n_bytes);
    *(q->first ? q->end : &q->first) = g;
    q->end = &g->next;
    q->n++;
    return 0;
}

/* Take out the one that *at points to. */
static struct batch_given *queue_take(struct batch_queue *q, struct batch_given **at)
{
    struct batch_given *g = *at;

    if (!g)
        return NULL;
    *at = g->next;
    if (!*at)
        q->end = at; /* means nothing where it was the only one */
    q->n--;
    g->next = NULL;
    return g;
}

/* All of `from` behind what is in q. */
static void queue_move(struct batch_queue *q, struct batch_queue *from)
{
    if (!from->first)
        return;
    *(q->first ? q->end : &q->first) = from->first;
    q->end = from->end;
    q->n += from->n;
    *from = (struct batch_queue){0};
}

static void queue_drop(struct batch_queue *q)
{
    while (q->first)
        ferry_free(queue_take(q, &q->first));
}

/* ---- rank 0 ---- */

int batch_rank_make_held(struct batch_run *r)
{
    r->held = batch_in_zalloc((size_t)r->team.n_ranks, sizeof *r->held, "the lines of other ranks");
    return r->held ? 0 : FERRY_ERR_NOMEM;
}

void batch_rank_drop_held(struct batch_run *r)
{
    for (int k = 0; r->held && k < r->team.n_ranks; k++)
        queue_drop(&r->held[k]);
    queue_drop(&r->again);
    ferry_free(r->held);
    r->held = NULL;
}

/* Let rank `to` answer it. */
int batch_rank_give_line(struct batch_run *r, int to, uint64_t number, const char *text, size_t n_bytes)
{
    struct team_head head = {.kind = TEAM_LINE, .number = number, .bits = batch_out_done(&r->out, number)};
    int rc = queue_put(&r->held[to], number, head.bits, text, n_bytes);

    r->team.member[to].n_wanted--;
    return rc ? rc : team_send(&r->team, to, &head, text, n_bytes);
}

struct batch_given *batch_rank_next_again(struct batch_run *r)
{
    return queue_take(&r->again, &r->again.first);
}

/* Rank k has sent a record of the line: does it hold it any longer? */
static void let_go(struct batch_run *r, int k, uint64_t line)
{
    struct batch_given **at = &r->held[k].first;

    if (!batch_out_is_whole(&r->out, line))
        return;
    while (*at && (*at)->number != line)
        at = &(*at)->next;
    ferry_free(queue_take(&r->held[k], at));
}

/* What rank k had is free again. */
static void bear_loss(struct batch_run *r, int k)
{
    struct team_member *m = &r->team.member[k];
    struct batch_queue *had = &r->held[k];

    if ((!m->is_gone || had->n) && !r->conf->quiet)
        fprintf(stderr, "\nferry: process %d of %d is lost; the others answer its %" PRIu64 " lines\n", k,
                r->team.n_ranks, had->n);
    m->is_gone = m->got_end = true;
    m->n_wanted = 0;
    m->stats.n_running = 0;
    queue_move(&r->again, had);
}

/* A line of which nothing has begun; NULL: there is none. */
static struct batch_group *find_untouched(const struct batch_run *r)
{
    for (size_t i = 0; i < r->n_pending; i++) {
        struct batch_group *g = r->pending[i].group;
        bool is_untouched = r->pending[i].id && g->n_left == g->n_submitted;
        for (size_t k = 0; k < r->n_pending && is_untouched; k++)
            if (r->pending[k].id && r->pending[k].group == g && ferry_batch_has_begun(r->batch, r->pending[k].id))
                is_untouched = false;
        if (is_untouched)
            return g;
    }
    return NULL;
}

static int give_group(struct batch_run *r, int to, struct batch_group *g)
{
    char *text;
    size_t n;
    int rc = batch_record_exact(g->line.root, &text, &n);

    if (!rc)
        rc = batch_rank_give_line(r, to, g->line.number, text, n);
    if (!rc) {
        batch_run_withdraw(r, g);
        batch_run_free_group(g);
    }
    ferry_free(text);
    return rc;
}

/* The input is at its end, or nothing more shall begin: who still wants lines is given those that wait here, and whoever cannot get
 * any more is told. */
int batch_rank_share(struct batch_run *r, bool stopping)
{
    struct batch_group *g = NULL;
    int rc = 0, to;

    if (team_is_alone(&r->team))
        return 0;
    while (!rc && !stopping && (to = team_hungriest(&r->team)) && (g = find_untouched(r)))
        rc = give_group(r, to, g);
    bool is_end = stopping || !(r->again.n || find_untouched(r));
    for (int k = 1; k < r->team.n_ranks && !rc; k++) {
        struct team_member *m = &r->team.member[k];
        if (m->got_end || (!is_end && !m->was_stopped))
            continue;
        m->got_end = true;
        m->n_wanted = 0;
        rc = team_send(&r->team, k, &(struct team_head){.kind = TEAM_END}, NULL, 0);
    }
    return rc;
}

/* Do two ranks answer alike? */
static int compare_ranks(const struct batch_run *r, const struct team_message *m)
{
    static const char *const parts[] = {"ferry", "model", "options"};
    json_t *theirs = json_loadb(m->text, m->n_bytes, 0, NULL), *v;
    const char *name;
    int rc = 0;

    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        json_object_foreach(json_object_get(r->about, parts[i]), name, v)
        {
            const json_t *w = json_object_get(json_object_get(theirs, parts[i]), name);
            if (rc || json_equal(v, w))
                continue;
            char here[160], there[160];
            rc =
                team_refuse("rank %d would give other answers: %s %s is %s there, and %s here", m->from, parts[i], name,
                            batch_record_brief(w, there, sizeof there), batch_record_brief(v, here, sizeof here));
        }
    json_decref(theirs);
    return rc;
}

static int take_record(struct batch_run *r, const struct team_message *m)
{
    struct batch_key key = {m->head.number, (unsigned)m->head.index}, said;

    int rc = batch_record_key(m->text, m->n_bytes, &said);
    if (rc == FERRY_ERR_NOMEM)
        return rc;
    if (rc || said.line != key.line || said.index != key.index || key.line > r->in.n_lines ||
        batch_out_done(&r->out, key.line) >> key.index & 1)
        return team_refuse("rank %d sent a record of line %" PRIu64 " that was not asked for", m->from, key.line);
    r->n_failed += m->head.bits != 0;
    rc = batch_out_add(&r->out, key, m->text, m->n_bytes);
    if (!rc)
        let_go(r, m->from, key.line);
    return rc;
}

/* Messages of the others. */
int batch_rank_hear_others(struct batch_run *r)
{
    struct team_message m;
    bool got = true;
    int rc = 0;

    while (!rc && !team_is_alone(&r->team)) {
        rc = team_receive(&r->team, &m, &got);
        if (rc || !got)
            break;
        struct team_member *member = &r->team.member[m.from];
        if (m.head.kind != TEAM_LOST)
            member->stats = m.head.stats;
        switch ((enum team_kind)m.head.kind) {
        case TEAM_READY:
            rc = compare_ranks(r, &m);
            break;
        case TEAM_WANT:
            member->n_wanted += member->got_end ? 0 : m.head.number;
            break;
        case TEAM_RECORD:
            rc = take_record(r, &m);
            break;
        case TEAM_BYE:
            member->is_gone = true;
            member->was_stopped = m.head.number != 0;
            member->n_wanted = 0;
            queue_drop(&r->held[m.from]); /* one that was stopped leaves lines to another run */
            break;
        case TEAM_LOST:
            bear_loss(r, m.from);
            break;
        default:
            rc = team_refuse("rank %d sent a message of kind %" PRIu64, m.from, m.head.kind);
        }
    }
    return rc;
}

bool batch_rank_are_others_gone(const struct batch_run *r)
{
    for (int k = 1; k < r->team.n_ranks; k++)
        if (!r->team.member[k].is_gone || !r->team.member[k].got_end)
            return false;
    return true;
}

bool batch_rank_was_other_stopped(const struct batch_run *r)
{
    for (int k = 1; k < r->team.n_ranks; k++)
        if (r->team.member[k].was_stopped)
            return true;
    return false;
}

/* ---- the others ---- */

static int keep_given(struct batch_run *r, const struct team_message *m)
{
    r->n_asked--;
    return queue_put(&r->given, m->head.number, m->head.bits, m->text, m->n_bytes);
}

void batch_rank_drop_given(struct batch_run *r)
{
    queue_drop(&r->given);
}

/* Of the losses one counts: rank 0 has the input and the output. */
static int hear_of_loss(int who)
{
    return who ? 0
               : team_refuse("process 0, which writes the answers, is lost: the same command goes on where it stopped");
}

/* Messages of rank 0; no_more: the end was among them. */
int batch_rank_hear_first(struct batch_run *r)
{
    struct team_message m;
    bool got = true;
    int rc = 0;

    while (!rc) {
        rc = team_receive(&r->team, &m, &got);
        if (rc || !got)
            break;
        if (m.head.kind == TEAM_END)
            r->no_more = true;
        else if (m.head.kind == TEAM_LINE && r->n_asked)
            rc = keep_given(r, &m);
        else if (m.head.kind == TEAM_LOST)
            rc = hear_of_loss(m.from);
        else
            rc = team_refuse("rank %d sent a message of kind %" PRIu64, m.from, m.head.kind);
    }
    return rc;
}

/* Begin what was given while there is room, and ask for more in good time, but not for each line alone. */
int batch_rank_take_given(struct batch_run *r)
{
    uint64_t most = LINES_OF_RANK(r->info.n_batch), held;
    int rc = 0;

    while (!rc && r->given.n && batch_run_has_room(r)) {
        struct batch_given *line = queue_take(&r->given, &r->given.first);
        struct batch_group *g = NULL;
        r->there = line->there;
        rc = batch_run_open_line(r, line->text, line->n_bytes, line->number, &g);
        if (g)
            rc = batch_run_begin_line(r, g);
        ferry_free(line);
    }
    held = r->n_flying + r->given.n + r->n_asked;
    if (rc || r->no_more || held + (most + 7) / 8 > most)
        return rc;
    r->n_asked += most - held;
    return batch_run_tell(r, &(struct team_head){.kind = TEAM_WANT, .number = most - held}, NULL, 0);
}

/* What rank 0 says about an input that the others do not see. */
int batch_rank_say_hello(struct batch_run *r)
{
    int rc = 0;

    for (int k = 1; k < r->team.n_ranks && !rc; k++)
        rc = team_send(&r->team, k, &(struct team_head){.kind = TEAM_HELLO, .number = r->seq_tok}, NULL, 0);
    return rc;
}

int batch_rank_wait_for_hello(struct batch_run *r)
{
    struct team_message m;
    bool got = false;

    while (!got) {
        int rc = team_receive(&r->team, &m, &got);
        if (!rc && got && m.head.kind == TEAM_LOST) {
            rc = hear_of_loss(m.from);
            got = false;
        }
        if (rc)
            return rc;
        if (!got)
            team_rest();
    }
    if (m.head.kind != TEAM_HELLO)
        return team_refuse("rank %d began with a message of kind %" PRIu64, m.from, m.head.kind);
    r->seq_tok = (uint32_t)m.head.number;
    return 0;
}

int batch_rank_say_ready(struct batch_run *r)
{
    size_t n;
    char *text;
    int rc = batch_record_exact(r->about, &text, &n);

    if (!rc)
        rc = batch_run_tell(r, &(struct team_head){.kind = TEAM_READY}, text, n);
    ferry_free(text);
    return rc;
}
