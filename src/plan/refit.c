/* Owns the decision when a prediction was wrong, and what is tried then. What is measured and applied is the caller's. */
#include "src/plan/refit.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void refit_init(struct refit *r, const struct plan *p, int n_used)
{
    *r = (struct refit){.now = *p, .pace = p->pace, .best = p->pace, .n_used = n_used};
    r->is_on = p->decode_tok_per_s > 0;
}

static bool is_same(const struct plan_pace *a, const struct plan_pace *b)
{
    return a->n_ahead == b->n_ahead && a->n_reads == b->n_reads;
}

static struct tune_seen since(const struct tune_seen *begun, const struct tune_seen *total)
{
    return (struct tune_seen){.n_tok = total->n_tok - begun->n_tok,
                              .ns = total->ns - begun->ns,
                              .disk_bytes = total->disk_bytes - begun->disk_bytes,
                              .disk_wait_ns = total->disk_wait_ns - begun->disk_wait_ns};
}

static double s_per_tok(const struct tune_seen *w)
{
    return (double)w->ns * 1e-9 / (double)w->n_tok;
}

/* ---- trials ---- */

/* What differs from the best in one thing; false: there is no such candidate. */
static bool make_candidate(const struct refit *r, int i, struct plan_pace *out)
{
    const uint32_t k = (uint32_t)r->n_used;
    const uint32_t ahead[] = {0, (k + 3) / 4, (k + 1) / 2, k}, reads[] = {4, 12, PLAN_MAX_READS};
    enum { N_AHEAD = sizeof ahead / sizeof *ahead, N = N_AHEAD + sizeof reads / sizeof *reads };

    *out = r->best;
    if (i < N_AHEAD)
        out->n_ahead = r->now.look_ahead ? ahead[i] : 0; /* without, nobody could ask a router */
    else if (i < N)
        out->n_reads = reads[i - N_AHEAD];
    return i < N;
}

/* From candidate i on, the next that is not what is in force. */
static void begin_trial(struct refit *r, int i)
{
    struct plan_pace pace;

    while ((r->is_trying = make_candidate(r, i, &pace)) && is_same(&pace, &r->best))
        i++;
    r->candidate = i;
    r->n_turns = r->n_won = 0;
    r->sum_s[0] = r->sum_s[1] = 0;
    r->pace = r->best; /* A comes first */
}

static bool is_turn_of_candidate(int turn)
{
    return turn % 4 == 1 || turn % 4 == 2;
}

static void end_trial(struct refit *r, bool is_kept)
{
    struct plan_pace pace;

    make_candidate(r, r->candidate, &pace);
    if (r->n_trials < REFIT_MAX_TRIALS)
        r->trials[r->n_trials++] = (struct refit_trial){pace, r->sum_s[0] / r->sum_s[1], is_kept};
    if (is_kept)
        r->best = pace;
    begin_trial(r, r->candidate + 1);
}

/* A turn is over. */
static void take_turn(struct refit *r, double s)
{
    bool is_b = is_turn_of_candidate(r->n_turns), is_second = r->n_turns % 2;
    int n_pairs = ++r->n_turns / 2;

    r->sum_s[is_b] += s;
    if (is_second)
        r->n_won += is_b ? s < r->turn_s : r->turn_s < s;
    r->turn_s = s;
    if (is_second && n_pairs - r->n_won > REFIT_PAIRS - REFIT_WINS) {
        end_trial(r, false);
        return;
    }
    if (n_pairs == REFIT_PAIRS) {
        end_trial(r, r->sum_s[0] >= REFIT_GAIN * r->sum_s[1]);
        return;
    }
    r->pace = r->best;
    if (is_turn_of_candidate(r->n_turns))
        make_candidate(r, r->candidate, &r->pace);
}

static void try_on(struct refit *r, const struct tune_seen *total)
{
    struct tune_seen w = since(&r->begun, total);

    if (w.ns < REFIT_TURN_NS || w.n_tok < REFIT_TURN_TOK)
        return;
    r->begun = *total;
    take_turn(r, s_per_tok(&w));
    if (r->is_trying)
        return;
    r->takes_next = true;
    r->n_wrong = 0;
    r->rest_until_ns = total->ns + REFIT_REST_NS;
}

/* ---- watching ---- */

/* What was measured is expected from now on: its parts in the proportions in which they were off. */
static void correct(struct refit *r, const struct tune *t)
{
    r->now.decode_dense_s *= t->compute;
    r->now.decode_expert_s *= t->compute;
    r->now.missed_bytes_per_tok = (uint64_t)((double)r->now.missed_bytes_per_tok * t->misses);
    r->now.decode_tok_per_s = t->measured_tok_per_s;
}

static bool is_wrong(const struct refit *r, double s)
{
    return fabs(s * r->now.decode_tok_per_s - 1) > (r->n_refits ? REFIT_AGAIN : TUNE_CLOSE);
}

/* Two windows in a row that say the same. */
static bool is_wrong_again(struct refit *r, double s)
{
    bool is_alike = r->n_wrong && fabs(s / r->wrong_s - 1) <= TUNE_CLOSE;

    r->n_wrong = !is_wrong(r, s) ? 0 : is_alike ? r->n_wrong + 1 : 1;
    r->wrong_s = s;
    return r->n_wrong > 1;
}

static void watch(struct refit *r, const struct tune_seen *total)
{
    struct tune_seen w = since(&r->begun, total);
    struct tune t;

    if (w.ns < REFIT_WATCH_NS || w.n_tok < TUNE_LEAST_TOK)
        return;
    r->begun = *total;
    if (!r->n_windows++)
        return;
    tune_compare(&r->now, &w, &t);
    if (r->takes_next) {
        r->takes_next = false;
        correct(r, &t);
        return;
    }
    if (!is_wrong_again(r, s_per_tok(&w)))
        return;
    r->n_wrong = 0;
    r->n_refits++;
    r->last = t;
    correct(r, &t);
    if (r->now.pace.n_reads && total->ns >= r->rest_until_ns) {
        r->n_trials = 0;
        begin_trial(r, 0);
    }
}

bool refit_feed(struct refit *r, const struct tune_seen *total)
{
    struct plan_pace before = r->pace;

    if (!r->is_on)
        return false;
    if (r->is_trying)
        try_on(r, total);
    else
        watch(r, total);
    return !is_same(&before, &r->pace);
}

/* ---- for people ---- */

static void say(char *buf, size_t buf_bytes, const char *format, ...) __attribute__((format(printf, 3, 4)));

static void say(char *buf, size_t buf_bytes, const char *format, ...)
{
    size_t n = strlen(buf);
    va_list args;

    va_start(args, format);
    vsnprintf(buf + n, buf_bytes - n, format, args);
    va_end(args);
}

const char *refit_text(const struct refit *r, char *buf, size_t buf_bytes)
{
    static const char *const offs[] = {"several things a little", "computing", "the bytes read", "the wait for a byte"};

    buf[0] = '\0';
    if (!r->n_refits)
        return buf;
    say(buf, buf_bytes,
        "re-fitted %" PRIu32
        " time%s, last because of %s (computing took %.2f, bytes read were %.2f, a byte was waited "
        "for %.2f of what was expected); expects %.3g tokens/s",
        r->n_refits, r->n_refits == 1 ? "" : "s", offs[r->last.off], r->last.compute, r->last.misses, r->last.disk,
        r->now.decode_tok_per_s);
    for (int i = 0; i < r->n_trials; i++) {
        const struct refit_trial *t = &r->trials[i];
        say(buf, buf_bytes, "%s %" PRIu32 " experts ahead with %" PRIu32 " reads in flight: %.2f of the speed, %s",
            i ? ";" : "; tried", t->pace.n_ahead, t->pace.n_reads, t->gain, t->is_kept ? "kept" : "undone");
    }
    if (r->is_trying)
        say(buf, buf_bytes, "; still trying");
    return buf;
}
