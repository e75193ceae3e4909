/* The plans that were not taken. Each is made by the same planner from changed wishes. */
#include "src/plan/plan_in.h"

#include "src/base/err.h"
#include "src/base/mem.h"
#include "src/base/size.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* Time of a prompt and an answer counts: a chat's turn. */
enum { ANSWER_TOK = 256 };

double plan_turn_s(const struct plan *p)
{
    if (p->prefill_tok_per_s <= 0 || p->decode_tok_per_s <= 0)
        return 0;
    return PLAN_PROMPT_TOK / p->prefill_tok_per_s + ANSWER_TOK / p->decode_tok_per_s;
}

enum { MAX_OTHERS = 8, NAME_BYTES = 48, TEXT_BYTES = 4096 };

/* What else could be wanted. */
struct other {
    char name[NAME_BYTES];
    struct plan_opts opts;
    bool is_cpu; /* without the GPU */
    bool is_gpu; /* with it, though the CPU alone is no slower */
};

static struct other *add(struct other *list, int *n, const struct plan_in *in, const char *name)
{
    struct other *o = &list[(*n)++];

    *o = (struct other){.opts = in->opts ? *in->opts : (struct plan_opts){.ram_bytes = 0}};
    snprintf(o->name, sizeof o->name, "%s", name);
    return o;
}

static int list_others(const struct plan *p, const struct plan_in *in, struct other *list)
{
    int n = 0;

    if (p->unused.decode_tok_per_s > 0 && in->gpu)
        add(list, &n, in, "with the GPU")->is_gpu = true;
    if (p->has_gpu) {
        add(list, &n, in, "--device cpu")->is_cpu = true;
    } else if (p->io != PLAN_IO_MMAP) {
        struct plan_opts *o = &add(list, &n, in, "--io mmap")->opts;
        o->io = PLAN_IO_MMAP;
        o->expert_ram_bytes = 0;
    } else if (p->expert_bytes) {
        add(list, &n, in, "--io uring")->opts.io = PLAN_IO_URING;
    }
    if (p->io == PLAN_IO_URING && p->slot_ram_bytes)
        add(list, &n, in, "--io pread")->opts.io = PLAN_IO_PREAD;
    if (p->n_ctx / 2 >= DEVICE_PAGE_TOK) {
        struct other *o = add(list, &n, in, "");
        o->opts.n_ctx = p->n_ctx / 2;
        snprintf(o->name, sizeof o->name, "--ctx %" PRIu32, p->n_ctx / 2);
    }
    if (p->kv_type == QUANT_F16)
        add(list, &n, in, "--kv-type q8_0")->opts.kv_type = QUANT_Q8_0;
    for (int twice = 0; twice < 2; twice++) {
        uint32_t chunk_tok = twice ? 2 * p->chunk_tok : p->chunk_tok / 2;
        if (!chunk_tok || chunk_tok > p->n_ctx)
            continue;
        struct other *o = add(list, &n, in, "");
        o->opts.chunk_tok = chunk_tok;
        snprintf(o->name, sizeof o->name, "--chunk %" PRIu32, chunk_tok);
    }
    return n;
}

/* Why it is not the plan: 3 % is what predictions cannot tell apart. */
static const char *reason(const struct plan *p, const struct plan *other, const struct other *wish)
{
    const struct plan_opts *opts = &wish->opts;
    double s = plan_turn_s(p), other_s = plan_turn_s(other);

    if (wish->is_gpu)
        return "decodes no faster";
    if (opts->n_ctx && opts->n_ctx < p->n_ctx)
        return s > 0 && other_s < 0.97 * s ? "faster, but only half the context" : "only half the context";
    if (opts->kv_type != p->kv_type && opts->kv_type == QUANT_Q8_0)
        return s > 0 && other_s < 0.97 * s ? "faster, but rounds the cache" : "rounds the cache";
    if (s <= 0 || other_s <= 0)
        return "the rates are not known";
    return other_s > 1.03 * s ? "slower" : other_s < 0.97 * s ? "faster, but was not asked for" : "no faster";
}

/* One line of the table. */
static int write_plan(char *out, size_t out_bytes, const char *name, const struct plan *p, const char *why)
{
    char size[32];

    return snprintf(out, out_bytes, "  %-16s %8.3g %8.3g %9.3g %10s   %s\n", name, p->decode_tok_per_s,
                    p->prefill_tok_per_s, p->first_token_s, size_format(plan_must_fit_bytes(p), size, sizeof size),
                    why);
}

int plan_compare(const struct plan *plan, const struct plan_in *in, char **out)
{
    struct other others[MAX_OTHERS];
    char text[TEXT_BYTES];
    int n_others = list_others(plan, in, others), rc = 0;
    size_t n = (size_t)snprintf(text, sizeof text, "\n%-18s %8s %8s %9s %10s\n  %-16s %8s %8s %9s\n", "other plans",
                                "decode", "prefill", "1st token", "memory", "", "tokens/s", "tokens/s", "s");

    *out = NULL;
    n += (size_t)write_plan(text + n, sizeof text - n, "this one", plan, "");
    for (int i = 0; i < n_others && n < sizeof text; i++) {
        struct plan other;
        bool has_gpu = others[i].is_gpu || (plan->has_gpu && !others[i].is_cpu);
        const struct plan_in wishes = {in->machine, in->model, &others[i].opts, in->cpu, has_gpu ? in->gpu : NULL};
        rc = others[i].is_gpu ? plan_make_with_gpu(&wishes, &other) : plan_make(&wishes, &other);
        if (rc == ERR_NOMEM)
            return rc;
        if (rc)
            n += (size_t)snprintf(text + n, sizeof text - n, "  %-16s %.160s\n", others[i].name, err_text());
        else
            n +=
                (size_t)write_plan(text + n, sizeof text - n, others[i].name, &other, reason(plan, &other, &others[i]));
    }
    err_clear();
    *out = mem_strdup(text, MEM_OTHER);
    return *out ? 0 : err(ERR_NOMEM, "other plans as text: %zu bytes", n);
}
