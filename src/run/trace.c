/* Owns the ring of events and the list of wanted experts, and how both are written down. */
#include "src/run/trace.h"

#include "src/base/err.h"
#include "src/base/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* In the list of wanted experts: a step begins, its rows follow. No layer has this number. */
#define STEP_MARK UINT16_MAX

struct trace {
    struct trace_event *events;    /* own: (cap_events) a ring */
    uint64_t cap_events, n_events; /* n_events: ever added */
    uint16_t *wanted;              /* own: (cap_wanted) n_wanted of them: STEP_MARK, rows; or layer, n, ids */
    size_t cap_wanted, n_wanted;
    bool is_full;
};

uint64_t trace_bytes(const struct trace_args *args)
{
    return args->n_events * sizeof(struct trace_event) + args->n_ids * sizeof(uint16_t);
}

int trace_open(const struct trace_args *args, struct trace **out)
{
    struct trace *t = mem_zalloc(1, sizeof *t, MEM_OTHER);

    *out = NULL;
    if (!t)
        return err(ERR_NOMEM, "a handle of %zu bytes", sizeof *t);
    t->cap_events = args->n_events;
    t->cap_wanted = args->n_ids;
    t->events = mem_zalloc(t->cap_events, sizeof *t->events, MEM_OTHER);
    t->wanted = mem_zalloc(t->cap_wanted, sizeof *t->wanted, MEM_OTHER);
    if (!t->events || !t->wanted) {
        trace_close(t);
        return err(ERR_NOMEM, "a timeline of %" PRIu32 " events and %" PRIu32 " ids", args->n_events, args->n_ids);
    }
    *out = t;
    return 0;
}

void trace_close(struct trace *t)
{
    if (!t)
        return;
    mem_free(t->wanted);
    mem_free(t->events);
    mem_free(t);
}

bool trace_has_timeline(const struct trace *t)
{
    return t && t->cap_events;
}

void trace_add(struct trace *t, const struct trace_event *e)
{
    if (trace_has_timeline(t))
        t->events[t->n_events++ % t->cap_events] = *e;
}

/* Two numbers, and ids behind them; what does not fit as a whole is left out, as is all that comes later. */
static void add_wanted(struct trace *t, uint16_t a, uint16_t b, const int32_t *ids, size_t n)
{
    t->is_full = t->is_full || n + 2 > t->cap_wanted - t->n_wanted;
    if (t->is_full)
        return;
    uint16_t *p = t->wanted + t->n_wanted;
    p[0] = a;
    p[1] = b;
    for (size_t i = 0; i < n; i++)
        p[2 + i] = (uint16_t)ids[i];
    t->n_wanted += n + 2;
}

void trace_step(struct trace *t, int n_rows)
{
    if (t && t->cap_wanted)
        add_wanted(t, STEP_MARK, n_rows < UINT16_MAX ? (uint16_t)n_rows : UINT16_MAX, NULL, 0);
}

bool trace_has_wanted(const struct trace *t)
{
    return t && t->cap_wanted;
}

void trace_wanted(struct trace *t, int layer, const int32_t *ids, int n)
{
    if (trace_has_wanted(t))
        add_wanted(t, (uint16_t)layer, (uint16_t)n, ids, (size_t)n);
}

/* ---- writing ---- */

static int create(const char *path, FILE **out)
{
    *out = fopen(path, "we");
    return *out ? 0 : err(ERR_IO, "%s: cannot create: %s", path, strerror(errno));
}

static int finish(FILE *f, const char *path)
{
    bool is_bad = ferror(f) != 0;

    is_bad = fclose(f) != 0 || is_bad;
    return is_bad ? err(ERR_IO, "%s: writing failed", path) : 0;
}

/* Compute and waits follow each other on one track. Reads overlap, so each is an asynchronous pair with an id of its own. */
static void write_event(FILE *f, const struct trace_event *e, uint64_t number, uint64_t zero_ns)
{
    static const char *const names[] = {"step", "dense", "experts", "wait", "down",
                                        "up",   "pages", "move",    "read", "read ahead"};
    double begin_us = (double)(e->begin_ns - zero_ns) * 1e-3, end_us = (double)(e->end_ns - zero_ns) * 1e-3;

    if (e->what < TRACE_READ) {
        fprintf(f,
                "{\"ph\":\"X\",\"pid\":1,\"tid\":%d,\"name\":\"%s\",\"ts\":%.3f,\"dur\":%.3f,"
                "\"args\":{\"layer\":%" PRId32 ",\"n\":%" PRId32 "}}",
                e->what == TRACE_STEP ? 1 : 2, names[e->what], begin_us, end_us - begin_us, e->layer, e->id);
        return;
    }
    fprintf(f,
            "{\"ph\":\"b\",\"cat\":\"disk\",\"pid\":1,\"tid\":3,\"id\":%" PRIu64
            ",\"name\":\"%s\",\"ts\":%.3f,\"args\":{\"layer\":%" PRId32 ",\"expert\":%" PRId32 ",\"bytes\":%" PRIu64
            "}},\n",
            number, names[e->what], begin_us, e->layer, e->id, e->bytes);
    fprintf(f, "{\"ph\":\"e\",\"cat\":\"disk\",\"pid\":1,\"tid\":3,\"id\":%" PRIu64 ",\"name\":\"%s\",\"ts\":%.3f}",
            number, names[e->what], end_us);
}

int trace_write(const struct trace *t, const char *path)
{
    uint64_t n = t->n_events < t->cap_events ? t->n_events : t->cap_events, first = t->n_events - n,
             zero_ns = UINT64_MAX;
    FILE *f;
    int rc = create(path, &f);

    if (rc)
        return rc;
    for (uint64_t i = first; i < t->n_events; i++) {
        const struct trace_event *e = &t->events[i % t->cap_events];
        zero_ns = e->begin_ns < zero_ns ? e->begin_ns : zero_ns;
    }
    fputs("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n", f);
    for (int track = 1; track <= 3; track++)
        fprintf(f, "{\"ph\":\"M\",\"pid\":1,\"tid\":%d,\"name\":\"thread_name\",\"args\":{\"name\":\"%s\"}}%s\n", track,
                track == 1   ? "steps"
                : track == 2 ? "compute"
                             : "disk",
                track < 3 || n ? "," : "");
    for (uint64_t i = first; i < t->n_events; i++) {
        write_event(f, &t->events[i % t->cap_events], i, zero_ns);
        fputs(i + 1 < t->n_events ? ",\n" : "\n", f);
    }
    fputs("]}\n", f);
    return finish(f, path);
}

int trace_write_wanted(const struct trace *t, const char *path)
{
    FILE *f;
    int rc = create(path, &f);

    if (rc)
        return rc;
    for (size_t i = 0; i < t->n_wanted;) {
        const uint16_t *p = t->wanted + i;
        bool is_step = p[0] == STEP_MARK;
        fprintf(f, is_step ? "step %u" : "%u", is_step ? p[1] : p[0]);
        for (size_t k = 0; !is_step && k < p[1]; k++)
            fprintf(f, " %u", p[2 + k]);
        fputc('\n', f);
        i += is_step ? 2 : 2 + (size_t)p[1];
    }
    if (t->is_full)
        fputs("full\n", f);
    return finish(f, path);
}
