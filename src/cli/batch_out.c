/* Owns the output and its journal. The output alone says what is done: every record carries its line and index. So nothing has
 * to be written twice, and no two files can disagree after a power loss. */
#include "src/cli/batch_out.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/model/json_room.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define ABOUT "ferry_batch"
enum { ABOUT_FORMAT = 1 };

/* The journal begins with what cmd_batch.c describes a run with. */
#define ABOUT_BEGIN "{\"ferry\":{"
#define FOREIGN \
    " is there, and no journal of ferry batch: it is left as it is. Take it away, or give the output another name"

struct batch_kept {
    struct batch_key key;
    uint64_t off;
    size_t n_bytes;
};

/* ---- what is there ---- */

static uint64_t bit(struct batch_key key)
{
    return UINT64_C(1) << key.index;
}

uint64_t batch_out_done(const struct batch_out *o, uint64_t line)
{
    return line <= o->n_lines ? o->done[line] : 0;
}

bool batch_out_is_whole(const struct batch_out *o, uint64_t line)
{
    uint64_t all = o->n_records[line] < 64 ? (UINT64_C(1) << o->n_records[line]) - 1 : UINT64_MAX;

    return (o->done[line] & all) == all;
}

static bool is_before(struct batch_key a, struct batch_key b)
{
    return a.line != b.line ? a.line < b.line : a.index < b.index;
}

/* Remember a record in the journal, in its place by key. Those that had their turn make room first: what is held does not grow
 * with the length of the run. */
static int keep(struct batch_out *o, struct batch_key key, uint64_t off, size_t n_bytes)
{
    if (o->n_kept == o->cap_kept && o->first_kept > o->cap_kept / 2) {
        o->n_kept -= o->first_kept;
        memmove(o->kept, o->kept + o->first_kept, o->n_kept * sizeof *o->kept);
        o->first_kept = 0;
    }
    if (o->n_kept == o->cap_kept) {
        size_t cap = o->cap_kept ? 2 * o->cap_kept : 64;
        struct batch_kept *p = mem_realloc(o->kept, cap * sizeof *p, MEM_OTHER);
        if (!p)
            return err(ERR_NOMEM, "%zu records that wait for their turn", cap);
        o->kept = p;
        o->cap_kept = cap;
    }
    size_t at = o->n_kept++;
    for (; at > o->first_kept && is_before(key, o->kept[at - 1].key); at--)
        o->kept[at] = o->kept[at - 1];
    o->kept[at] = (struct batch_kept){key, off, n_bytes};
    return 0;
}

/* A line of the output of an earlier run. */
static int on_out_line(const char *line, size_t n_bytes, uint64_t off, void *arg)
{
    struct batch_out *o = arg;
    struct batch_key key;

    int rc = batch_record_key(line, n_bytes, &key);
    if (rc == ERR_FORMAT && !off && !o->conf->restart)
        return err(ERR_STATE, "%s begins with a line that is no record of ferry batch. --restart overwrites it",
                   o->conf->output);
    if (rc)
        return rc;
    /* Of a line that a changed input no longer has, nothing is wanted. */
    if (key.line > o->n_lines)
        return 0;
    o->n_done += !(o->written[key.line] & bit(key));
    o->done[key.line] |= bit(key);
    o->written[key.line] |= bit(key);
    return 0;
}

struct side_reader {
    struct batch_out *o;
    json_t *about; /* own: what the journal says last; NULL: nothing */
    const json_t *wanted;
};

static int on_side_line(const char *line, size_t n_bytes, uint64_t off, void *arg)
{
    struct side_reader *r = arg;
    struct batch_key key;
    json_t *v;
    int rc = json_room_parse(line, n_bytes, 0, &v);

    if (rc == ERR_NOMEM)
        return rc;
    if (!rc && json_object_get(v, ABOUT)) {
        json_decref(r->about);
        r->about = v;
        return 0;
    }
    json_decref(v);
    if (!r->about)
        return err(ERR_STATE, "%s.ferry" FOREIGN, r->o->conf->output);
    rc = batch_record_key(line, n_bytes, &key);
    if (rc)
        return rc;
    if (!r->o->in_order || key.line > r->o->n_lines || r->o->done[key.line] & bit(key))
        return 0;
    r->o->done[key.line] |= bit(key);
    r->o->n_done++;
    return keep(r->o, key, off, n_bytes);
}

/* ---- is it of this run? ---- */

/* What an option says that was not given, and so the journal of a version that did not know it. */
static bool is_nothing(const json_t *v)
{
    return json_is_null(v) || (json_is_object(v) && !json_object_size(v));
}

/* The first member that differs, as an error. */
static int compare(const char *path, const json_t *was, const json_t *is)
{
    static const char *const parts[] = {"input", "model", "options"};
    static const char *const others[] = {"another input", "another model", "other options"};
    char a[160], b[160];

    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const json_t *old = json_object_get(was, parts[i]), *now = json_object_get(is, parts[i]);
        const char *name;
        json_t *v;
        json_object_foreach((json_t *)now, name, v)
        {
            const json_t *w = json_object_get(old, name);
            if (json_equal(w, v) || (!w && is_nothing(v)))
                continue;
            batch_record_brief(w, a, sizeof a);
            batch_record_brief(v, b, sizeof b);
            return err(ERR_STATE,
                       "%s was begun with %s: %s was %s, is %s. --accept-changes goes on all the same, "
                       "--restart begins anew",
                       path, others[i], name, a, b);
        }
    }
    return 0;
}

static int write_about(struct batch_out *o, const json_t *about)
{
    size_t n = 0;
    char *text = NULL;
    json_t *copy = json_copy((json_t *)about);

    /* jansson tells only of its last failure: what a copy has to hold is counted. */
    bool is_whole = !json_object_set_new(copy, ABOUT, json_integer(ABOUT_FORMAT)) &&
                    json_object_size(copy) == json_object_size(about) + 1;
    int rc = is_whole ? batch_record_exact(copy, &text, &n) : err(ERR_NOMEM, "what the answers depend on");
    json_decref(copy);
    if (!rc)
        rc = ferry_journal_append(o->side, text, n, NULL);
    mem_free(text);
    return rc ? rc : ferry_journal_sync(o->side);
}

static bool is_empty(const char *path)
{
    struct stat st;
    return stat(path, &st) || st.st_size == 0;
}

/* Before the output is touched: may it be? */
static int check_about(struct batch_out *o, struct side_reader *r)
{
    const char *path = o->conf->output;

    if (!r->about && !o->conf->restart && !is_empty(path))
        return err(ERR_STATE,
                   "%s is there, and not from a run of ferry batch that could go on. --restart overwrites it", path);
    if (r->about && !o->conf->restart && !o->conf->accept_changes)
        return compare(path, r->about, r->wanted);
    return 0;
}

static int open_side(struct batch_out *o, struct side_reader *r)
{
    size_t n = strlen(o->conf->output) + sizeof ".ferry";
    char *path = mem_alloc(n, MEM_OTHER);

    if (!path)
        return err(ERR_NOMEM, "the journal's name");
    snprintf(path, n, "%s.ferry", o->conf->output);
    int rc = ferry_journal_open(path, ABOUT_BEGIN, on_side_line, r, &o->side);
    mem_free(path);
    return rc;
}

static int forget_all(struct batch_out *o)
{
    memset(o->done, 0, (o->n_lines + 1) * sizeof *o->done);
    memset(o->written, 0, (o->n_lines + 1) * sizeof *o->written);
    o->n_kept = o->first_kept = 0;
    o->n_done = 0;
    int rc = ferry_journal_clear(o->side);
    return rc ? rc : ferry_journal_clear(o->out);
}

/* What stands in the output has been found there only now: what the journal kept of it has had its turn. */
static void drop_written(struct batch_out *o)
{
    size_t n = 0;

    for (size_t i = 0; i < o->n_kept; i++) {
        if (o->written[o->kept[i].key.line] & bit(o->kept[i].key))
            o->n_done--;
        else
            o->kept[n++] = o->kept[i];
    }
    o->n_kept = n;
}

static int open_both(struct batch_out *o, struct side_reader *r)
{
    int rc = open_side(o, r);
    if (!rc)
        rc = check_about(o, r);
    if (!rc)
        rc = ferry_journal_open(o->conf->output, NULL, on_out_line, o, &o->out);
    if (rc)
        return rc;
    drop_written(o);
    o->resumed = r->about && !o->conf->restart;
    o->n_cut = ferry_journal_n_cut(o->out) + ferry_journal_n_cut(o->side);
    if (o->conf->restart)
        rc = forget_all(o);
    if (!rc && (!o->resumed || o->conf->accept_changes))
        rc = write_about(o, r->wanted);
    return rc;
}

int batch_out_open(struct batch_out *o, const struct conf *conf, const json_t *about, uint64_t n_lines)
{
    struct side_reader r = {.o = o, .wanted = about};

    *o = (struct batch_out){.conf = conf, .n_lines = n_lines, .due = {1, 0}};
    o->in_order = !strcmp(conf->order, "input");
    o->done = mem_zalloc(n_lines + 1, sizeof *o->done, MEM_OTHER);
    o->written = mem_zalloc(n_lines + 1, sizeof *o->written, MEM_OTHER);
    o->n_records = mem_zalloc(n_lines + 1, sizeof *o->n_records, MEM_OTHER);
    int rc = o->done && o->written && o->n_records ? open_both(o, &r)
                                                   : err(ERR_NOMEM, "the state of %" PRIu64 " lines", n_lines);
    json_decref(r.about);
    return rc;
}

void batch_out_close(struct batch_out *o)
{
    ferry_journal_close(o->out);
    ferry_journal_close(o->side);
    mem_free(o->done);
    mem_free(o->written);
    mem_free(o->n_records);
    mem_free(o->kept);
    *o = (struct batch_out){0};
}

/* ---- writing ---- */

static int write_out(struct batch_out *o, struct batch_key key, const char *text, size_t n_bytes)
{
    int rc = ferry_journal_append(o->out, text, n_bytes, NULL);

    if (!rc)
        o->written[key.line] |= bit(key);
    return rc;
}

static int write_kept(struct batch_out *o, const struct batch_kept *kept)
{
    char *text = mem_alloc(kept->n_bytes, MEM_OTHER);

    if (!text)
        return err(ERR_NOMEM, "a record of %zu bytes", kept->n_bytes);
    int rc = ferry_journal_read(o->side, kept->off, text, kept->n_bytes);
    if (!rc)
        rc = write_out(o, kept->key, text, kept->n_bytes);
    mem_free(text);
    return rc;
}

/* Write what is due of what was kept. */
static int write_due(struct batch_out *o)
{
    while (o->due.line <= o->n_read) {
        if (o->due.index >= o->n_records[o->due.line]) {
            o->due = (struct batch_key){o->due.line + 1, 0};
            continue;
        }
        if (!(o->written[o->due.line] & bit(o->due))) {
            const struct batch_kept *next = &o->kept[o->first_kept];
            if (o->first_kept == o->n_kept || is_before(o->due, next->key) || is_before(next->key, o->due))
                return 0;
            int rc = write_kept(o, next);
            if (rc)
                return rc;
            o->first_kept++;
        }
        o->due.index++;
    }
    return 0;
}

int batch_out_expect(struct batch_out *o, uint64_t line, unsigned n_records)
{
    o->n_records[line] = (uint8_t)n_records;
    o->n_read = line;
    return o->in_order ? write_due(o) : 0;
}

int batch_out_add(struct batch_out *o, struct batch_key key, const char *text, size_t n_bytes)
{
    bool is_due = !is_before(key, o->due) && !is_before(o->due, key);
    int rc;

    if (!o->in_order || is_due) {
        rc = write_out(o, key, text, n_bytes);
    } else {
        uint64_t off;
        rc = ferry_journal_append(o->side, text, n_bytes, &off);
        if (!rc)
            rc = keep(o, key, off, n_bytes);
    }
    if (rc)
        return rc;
    o->done[key.line] |= bit(key);
    o->n_done++;
    return o->in_order ? write_due(o) : 0;
}

int batch_out_sync(struct batch_out *o)
{
    int rc = ferry_journal_sync(o->out);
    return rc ? rc : ferry_journal_sync(o->side);
}
